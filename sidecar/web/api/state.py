"""The state of the sidecar on the admin listener: its status, reloading, and accepting the wall clock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

from aiohttp import web

from sidecar import __version__
from sidecar.core.command import AcceptClock, ClockAccepted
from sidecar.core.instant import SECOND, iso_time
from sidecar.errors import Refusal
from sidecar.gate.execution import Gate
from sidecar.ids import new_decision_id
from sidecar.live.access import warning_of
from sidecar.live.reload import Reload, Reloader
from sidecar.live.snapshot import Live, Snapshot
from sidecar.store.batch import Store
from sidecar.telemetry.events import LogEvent
from sidecar.web.api.access import asking
from sidecar.web.api.operation import REQUEST_ID, STORE_ERRORS, Answer, Operation
from sidecar.web.api.ops import ReadinessCheck, in_time, measured
from sidecar.web.wire import answers
from sidecar.web.wire.forms import TypedDict
from sidecar.web.wire.headers import fields_of
from sidecar.web.wire.health import check
from sidecar.web.wire.request import request_id_of


class Reloaded(TypedDict):
    """What is in force after a reload. `changed` are the keys of the configuration whose values changed, and
    `policies` if the set did; `shadowed` are the keys of the file that the environment or a flag
    overrides."""

    policy_revision: str | None
    config_revision: str
    changed: list[str]
    shadowed: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What only the start knows, for `status`. `started_at` is by `elapsed`, in microseconds."""

    started_at: int
    elapsed: Callable[[], int]
    store_url: str
    listeners: Callable[[], answers.Listeners]
    scopes_served_on: Literal["data", "admin"]


class StateApi:
    """Handlers of the admin listener. A reload is the same as by SIGHUP, and is awaited to its end."""

    def __init__(
        self,
        *,
        store: Store,
        gate: Gate,
        live: Live,
        reloader: Reloader,
        readiness: ReadinessCheck,
        about: About,
    ) -> None:
        self._store = store
        self._gate = gate
        self._live = live
        self._reloader = reloader
        self._readiness = readiness
        self._about = about

    async def status(self, request: web.Request) -> answers.Status:
        del request
        snapshot = self._live.snapshot
        unlisted = snapshot.settings.gate.unlisted
        readiness = await self._readiness.state()  # first, because it writes what is measured
        unknown, running, footprint = await measured(self._store)
        count, oldest = unknown or (None, None)
        now = self._store.now()
        frozen = await in_time(self._store, self._store.engine.freezes_in_force(now)) or ()
        return {
            **readiness,
            "freezes": [answers.freeze(each, now) for each in frozen],
            "version": __version__,
            "uptime_seconds": (self._about.elapsed() - self._about.started_at) / SECOND,
            "draining": self._gate.draining,
            "in_flight": self._gate.in_flight,
            "unknown_executions": count,
            "oldest_unknown_admitted_at": None if oldest is None else iso_time(oldest),
            "running_executions": None if running is None else running[0],
            "clock": check(self._store.clock_trouble()),
            "store": {
                "url": self._about.store_url,
                "size": footprint.size,
                "wal_size": footprint.wal_size,
                "free": footprint.free,
                "growth_per_day": footprint.growth_per_day,
            },
            "policy_revision": snapshot.policies.revision if snapshot.policies else None,
            "config_revision": snapshot.revision,
            "last_reload": last_reload(self._reloader.last),
            "scope_required_from": snapshot.settings.gate.scope_required_from,
            "shadow_routes": [route.label for route in snapshot.shadow_routes],
            "unlisted": {
                "reads": unlisted.reads,
                "writes": unlisted.writes,
                "excepted": [path.text for path in unlisted.excepted],
            },
            "auth": authentication(snapshot),
            "scopes_served_on": self._about.scopes_served_on,
            "listeners": self._about.listeners(),
        }

    async def reload(self, request: web.Request) -> Reloaded | Refusal:
        del request
        reload = await self._reloader.reload("call")
        if reload.errors:
            first, *others = reload.errors
            more = f" (and {len(others)} more)" if others else ""
            changed = "Only the tokens were changed" if reload.changed else "Nothing was changed"
            message = f"{changed}: {first}{more}."
            return Refusal("reload_refused", message, {"errors": list(reload.errors)})
        policies = reload.snapshot.policies
        return {
            "policy_revision": policies.revision if policies else None,
            "config_revision": reload.snapshot.revision,
            "changed": list(reload.changed),
            "shadowed": list(reload.shadowed),
        }

    async def accept_clock(self, request: web.Request) -> answers.AcceptedClock:
        """Accept the wall clock. The answer comes once the acceptance is on disk; otherwise it is 503."""
        reply = await self._store.submit(
            AcceptClock(
                decision_id=new_decision_id(),
                request_id=request_id_of(fields_of(request)),
                principal=asking(request),
            )
        )
        assert isinstance(reply, ClockAccepted)
        step = (reply.now - reply.before) / SECOND
        LogEvent.CLOCK_ACCEPTED.log(decision_id=reply.decision_id, step_seconds=step)
        return {
            "decision_id": reply.decision_id,
            "now": iso_time(reply.now),
            "time_before": iso_time(reply.before),
            "step_seconds": step,
        }


def authentication(snapshot: Snapshot) -> answers.Authentication:
    """How callers prove who they are, with one sentence about what that means."""
    names, auth = snapshot.methods.names, snapshot.settings.auth
    return {
        "methods": list(cast("list[Literal['tokens', 'jwt', 'mtls', 'proxy']]", names)),
        "required": auth.required,
        "required_on": list(auth.required_on) if auth.required else [],
        "says": warning_of(snapshot) or "Callers are authenticated, and roles say who may do what.",
    }


def last_reload(reload: Reload) -> answers.LastReload:
    return {"time": iso_time(reload.time), "ok": not reload.errors, "errors": list(reload.errors)}


STATE = (
    Operation(
        call="GET /api/v1/status",
        name="getStatus",
        tag="Status",
        summary="Readiness, version, store, revisions, unknown executions",
        answers=(Answer("The state of the sidecar."),),
        errors=STORE_ERRORS,
        roles=("observer",),
        handler=StateApi.status,
    ),
    Operation(
        call="POST /api/v1/reload",
        name="reload",
        tag="Status",
        summary="Read configuration and policies anew",
        description="Either all of it is in force with the answer, or nothing is changed.",
        answers=(Answer("It is in force."),),
        errors=("reload_refused",),
        roles=("operator",),
        handler=StateApi.reload,
    ),
    Operation(
        call="POST /api/v1/store/accept-clock",
        name="acceptClock",
        tag="Status",
        summary="Accept the wall clock",
        description="Where it jumped ahead, or is behind the log. Each call is recorded.",
        parameters=(REQUEST_ID,),
        answers=(Answer("The wall clock counts from now on."),),
        errors=STORE_ERRORS,
        roles=("operator",),
        handler=StateApi.accept_clock,
    ),
)
