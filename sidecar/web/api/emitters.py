"""Decision records of other services over HTTP, the runs bound to them, and the kill switch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

from aiohttp import web
from pydantic import BaseModel

from sidecar.core.command import Bind, Emit, Emitted, NotEmitted, RunBound, Switch, Turn, Turned
from sidecar.core.emission import CARESignalAccessError, Kind, emission
from sidecar.core.facts import IDENTIFIER_RULE, is_identifier
from sidecar.errors import Refusal
from sidecar.ids import new_decision_id
from sidecar.live.snapshot import Live
from sidecar.store.batch import Store
from sidecar.telemetry.metrics import Metrics
from sidecar.web.api.access import Access, asking
from sidecar.web.api.operation import (
    BODY_ERRORS,
    DECISION_ID_HEADER,
    REQUEST_ID,
    STORE_ERRORS,
    SUBMIT_ERRORS,
    TO_DECISION,
    Answer,
    Body,
    Operation,
    Parameter,
    Reply,
)
from sidecar.web.api.routes import read_model, response, routes
from sidecar.web.wire import answers
from sidecar.web.wire.emittermodels import EMITTER_MODELS, BackfillRequest
from sidecar.web.wire.forms import Count, TypedDict
from sidecar.web.wire.headers import fields_of
from sidecar.web.wire.models import IDENTIFIER, wrong
from sidecar.web.wire.request import request_id_of

KILL_SWITCH: Switch = "care_kill_switch"


class Backfill(TypedDict):
    """How many records have the run from now on."""

    updated: Count


class KillSwitch(TypedDict):
    """Whether the switch is on. While it is on, no optimized route is recorded."""

    active: bool


class EmitterApi:
    """Handlers of the admin listener. They answer once the record is stored; otherwise 503."""

    def __init__(self, *, store: Store, metrics: Metrics, live: Live) -> None:
        self._store = store
        self._metrics = metrics
        self._live = live

    def routes(self, access: Access) -> list[web.RouteDef]:
        async def emitted(request: web.Request) -> web.StreamResponse:
            # All rows of emitters ask for the same roles.
            refused = await access.check(request, EMITTERS[0])
            return refused or response(await self.emit(request))

        # The pattern of `kind` matches no decision_id.
        emit = web.post("/api/v1/decisions/{kind:[a-z_]+}", emitted)
        return [emit, *routes(RUNS_AND_SWITCH, self, access)]

    async def emit(self, request: web.Request) -> Reply[answers.DecisionRecord] | Refusal | None:
        """Answer 201 with the record, or 200 with null if the emission rule or a prior record forbids it."""
        kind = cast(Kind, request.match_info["kind"])
        if kind not in EMITTER_MODELS:
            known = ", ".join(EMITTER_MODELS)
            return Refusal("not_found", f"There is no such kind of decision; there are {known}.")
        given = await read_model(request, EMITTER_MODELS[kind])
        if isinstance(given, Refusal):
            return given
        try:
            made = emission(
                kind,
                given.model_dump(),
                decision_id=new_decision_id(),
                now=self._store.now(),
                min_confidence=self._live.snapshot.settings.care.min_confidence,
            )
        except CARESignalAccessError as exc:
            return wrong("invalid_request", "signals_used", f"holds what may not be used: {exc}")
        if made is None:
            self._metrics.emissions.labels(kind, "ruled_out").inc()
            return None
        reply = await self._store.submit(
            Emit(
                record=made.record,
                origin="api",
                principal=asking(request),
                once=made.once,
                unless_switched=made.unless_switched,
            )
        )
        if isinstance(reply, NotEmitted):
            self._metrics.emissions.labels(kind, reply.why).inc()
            return None
        assert isinstance(reply, Emitted)
        self._metrics.emissions.labels(kind, "recorded").inc()
        record = cast("answers.DecisionRecord", reply.record.to_dict())
        return Reply(record, status=201, decision_id=reply.record.decision_id)

    async def backfill(self, request: web.Request) -> Backfill | Refusal:
        run_id = request.match_info["run_id"]
        if not is_identifier(run_id):
            return wrong("invalid_request", "run_id", f"must be {IDENTIFIER_RULE}")
        given = await read_model(request, BackfillRequest)
        if isinstance(given, Refusal):
            return given
        if not given.request_id:
            return {"updated": 0}
        reply = await self._store.submit(Bind(request_id=given.request_id, run_id=run_id))
        assert isinstance(reply, RunBound)
        return {"updated": reply.count}

    async def switch(self, request: web.Request) -> KillSwitch:
        del request
        return {"active": await self._store.engine.is_on(KILL_SWITCH)}

    async def turn_on(self, request: web.Request) -> Reply[KillSwitch]:
        return await self._turn(request, on=True)

    async def turn_off(self, request: web.Request) -> Reply[KillSwitch]:
        return await self._turn(request, on=False)

    async def _turn(self, request: web.Request, *, on: bool) -> Reply[KillSwitch]:
        reply = await self._store.submit(
            Turn(
                decision_id=new_decision_id(),
                switch=KILL_SWITCH,
                on=on,
                origin="api",
                request_id=request_id_of(fields_of(request)),
                principal=asking(request),
            )
        )
        assert isinstance(reply, Turned)
        return Reply({"active": reply.on}, decision_id=reply.decision_id)


_EXAMPLES: Mapping[str, Any] = {
    "routing": {"routed": True, "selected_agent": "agent_1", "eligible_agents": ["agent_1", "agent_2"]},
    "recovery": {"evaluated": True, "triggered": True, "action": "retry_agent", "candidates_count": 2},
    "memory": {"queried": True, "matched": True, "injected": False, "reason": "too old"},
    "policy": {"policy_id": "content", "evaluated": True, "violated": True, "severity": "error"},
    "budget": {"budget_requested": 500, "budget_available": 300, "enforcement": "hard"},
    "budget_enforcement": {
        "run_id": "run_1",
        "budget_limit_cents": 100,
        "budget_consumed_cents": 110,
        "step_cost_cents": 20,
        "completed_steps": 3,
        "total_steps": 5,
    },
    "policy_precheck": {"request_id": "req_1", "posture": "strict", "passed": False, "violations": ["pii"]},
    "recovery_evaluation": {
        "run_id": "run_1",
        "request_id": "req_1",
        "recovery_class": "R1",
        "recovery_action": "retry_agent",
        "failure_type": "timeout",
    },
    "care_optimization": {
        "request_id": "req_1",
        "baseline_agent": "agent_1",
        "optimized_agent": "agent_2",
        "confidence_score": 0.9,
        "signals_used": ["latency_p50"],
        "optimization_enabled": True,
        "shadow_mode": False,
    },
}


def _emitter(kind: Kind, model: type[BaseModel]) -> Operation:
    return Operation(
        call=f"POST /api/v1/decisions/{kind}",
        name="tell" + kind.title().replace("_", ""),
        tag="Emitters",
        summary=f"Record a decision: {kind.replace('_', ' ')}",
        description=" ".join((model.__doc__ or "").split()),
        body=Body(schema=model, examples={kind.replace("_", " "): _EXAMPLES[kind]}),
        answers=(
            Answer("Recorded.", status="201", headers=(DECISION_ID_HEADER,), links=TO_DECISION),
            Answer(
                "There is no record, because of the emission rule, an earlier record or the kill switch.",
                contents={"application/json": {"type": "null"}},
            ),
        ),
        errors=(*BODY_ERRORS, *SUBMIT_ERRORS),
        roles=("recorder",),
        handler=EmitterApi.emit,
    )


def _switch(
    method: Literal["GET", "PUT", "DELETE"], name: str, summary: str, handler: Callable[..., Any]
) -> Operation:
    turns = method != "GET"
    return Operation(
        call=f"{method} /api/v1/care/kill-switch",
        name=name,
        tag="Emitters",
        summary=summary,
        description="It applies to everything on the same store, and survives a restart.",
        parameters=(REQUEST_ID,) if turns else (),
        answers=(
            Answer(
                "Whether it is on.",
                headers=(DECISION_ID_HEADER,) if turns else (),
                links=TO_DECISION if turns else {},
            ),
        ),
        errors=STORE_ERRORS,
        roles=("operator",) if turns else ("observer",),
        handler=handler,
    )


EMITTERS = tuple(_emitter(kind, model) for kind, model in EMITTER_MODELS.items())
RUNS_AND_SWITCH = (
    Operation(
        call="POST /api/v1/runs/{run_id}/backfill",
        name="backfill",
        tag="Emitters",
        summary="Bind a run to the decisions before it",
        description="Its request's records from before the run, where they have no run yet.",
        parameters=(Parameter("run_id", "path", IDENTIFIER),),
        body=Body(schema=BackfillRequest, examples={"a request": {"request_id": "req_1"}}),
        answers=(Answer("Bound."),),
        errors=(*BODY_ERRORS, *SUBMIT_ERRORS),
        roles=("recorder",),
        handler=EmitterApi.backfill,
    ),
    _switch("GET", "getKillSwitch", "Is the kill switch of optimized routing on?", EmitterApi.switch),
    _switch("PUT", "turnKillSwitchOn", "Turn the kill switch on", EmitterApi.turn_on),
    _switch("DELETE", "turnKillSwitchOff", "Turn the kill switch off", EmitterApi.turn_off),
)
