"""The admin listener: decisions, executions and their outcomes, `explain`, and the status of the sidecar."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, get_args

import orjson
from aiohttp import web

from sidecar import __version__
from sidecar.core.command import Denied, Reconcile
from sidecar.core.facts import Request, read
from sidecar.core.record import iso_time
from sidecar.core.scope import ExecutionStatus
from sidecar.errors import Refusal, StoreUnavailable, unavailable
from sidecar.gate.execution import Gate
from sidecar.gate.grants import Grants
from sidecar.gate.messages import Explanation
from sidecar.ids import new_decision_id
from sidecar.live.terms import Live
from sidecar.store.base import ExecutionsWanted, StoredDecision
from sidecar.store.batch import Store
from sidecar.store.lists import FILTERS, KINDS
from sidecar.web.api.clockapi import ClockApi
from sidecar.web.api.docs import Docs
from sidecar.web.api.emitters import EmitterApi
from sidecar.web.api.explained import explained
from sidecar.web.api.ops import ReadinessCheck, looked_at
from sidecar.web.api.reloads import ReloadApi
from sidecar.web.api.scopelists import ScopeLists
from sidecar.web.api.scopes import ScopeApi
from sidecar.web.serving.body import read_document
from sidecar.web.serving.hosts import Guard
from sidecar.web.wire.asked import paging_of, query_of, request_id_of, since_of, tenant_of, unknown
from sidecar.web.wire.models import ReconcileRequest, validated, wrong
from sidecar.web.wire.problem import answer, problem, problems

logger = logging.getLogger("scopegate.web")

DECISION_FILTERS = tuple(FILTERS)
EXECUTION_STATUSES = get_args(ExecutionStatus)


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What only the start knows, for `status`. `started_at` is by `elapsed`, in microseconds."""

    started_at: int
    elapsed: Callable[[], int]
    store_url: str
    listeners: Callable[[], Mapping[str, str]]


class Admin:
    """Handlers of the admin listener. It has no authentication yet, so it binds to loopback only."""

    def __init__(
        self,
        *,
        store: Store,
        gate: Gate,
        scopes: ScopeApi | None,
        emitters: EmitterApi,
        reloads: ReloadApi,
        docs: Docs,
        grants: Grants,
        live: Live,
        readiness: ReadinessCheck,
        about: About,
    ) -> None:
        self._store = store
        self._gate = gate
        self._scopes = scopes
        self._emitters = emitters
        self._reloads = reloads
        self._docs = docs
        self._grants = grants
        self._live = live
        self._readiness = readiness
        self._about = about
        self._guard = Guard("admin", live)

    def application(self) -> web.Application:
        application = web.Application(middlewares=[problems, self._guarded])
        application.add_routes(
            [
                web.get("/api/v1/decisions", self._decisions),
                web.get("/api/v1/decisions/{decision_id}", self._decision),
                web.get("/api/v1/executions", self._executions),
                web.post("/api/v1/executions/{decision_id}/reconcile", self._reconcile),
                web.post("/api/v1/explain", self._explain),
                web.get("/api/v1/status", self._status),
            ]
        )
        application.add_routes(ScopeLists(self._store).routes())
        application.add_routes(self._emitters.routes())
        application.add_routes(self._reloads.routes())
        application.add_routes(ClockApi(self._store).routes())
        application.add_routes(self._docs.routes())
        if self._scopes is not None:
            application.router.add_route("*", "/api/v1/recovery/scope", self._scope_api)
            application.router.add_route("*", "/api/v1/recovery/scopes/{name}", self._scope_api)
            application.router.add_route(
                "*", "/api/v1/recovery/candidates/{name}/scope-test", self._scope_api
            )
        return application

    @web.middleware
    async def _guarded(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        refusal = self._guard.refusal(request)
        if refusal is None:
            return await handler(request)
        if self._scopes is not None and self._scopes.owns(request.raw_path):
            return await self._scopes.refuse(request, request.raw_path, request_id_of(request), refusal)
        return problem(refusal)

    async def _scope_api(self, request: web.Request) -> web.Response:
        assert self._scopes is not None
        return await self._scopes.handle(request, request.raw_path, request_id_of(request))

    async def _decisions(self, request: web.Request) -> web.Response:
        asked = query_of(request, (*DECISION_FILTERS, "since", "limit", "before"))
        if isinstance(asked, Refusal):
            return problem(asked)
        paging, since = paging_of(asked), since_of(asked)
        if isinstance(paging, Refusal):
            return problem(paging)
        if isinstance(since, Refusal):
            return problem(since)
        limit, before = paging
        filters = {name: value for name, value in asked.items() if name in DECISION_FILTERS}
        for name, known in KINDS.items():
            if filters.get(name, known[0]) not in known:
                return problem(unknown(name, known))
        try:
            page = await self._store.engine.decisions(filters, since=since, before=before, limit=limit)
        except ValueError as exc:
            return problem(wrong("invalid_request", "before", str(exc)))
        return answer({"decisions": [rendered(row) for row in page.rows], "next": page.next})

    async def _decision(self, request: web.Request) -> web.Response:
        decision_id = request.match_info["decision_id"]
        stored = await self._store.engine.decision(decision_id)
        if stored is None:
            return problem(_no_decision(decision_id))
        shown = rendered(stored)
        execution = await self._store.engine.execution(shown["admission_id"] or decision_id)
        return answer(
            {
                **shown,
                "hash": stored.hash.hex(),
                "previous_hash": stored.previous.hex(),
                "execution": None if execution is None else execution.to_dict(),
                "outcome": None if execution is None else execution.status,
            }
        )

    async def _executions(self, request: web.Request) -> web.Response:
        asked = query_of(request, ("status", "incident_id", "action", "since", "limit", "before"))
        if isinstance(asked, Refusal):
            return problem(asked)
        status = asked.get("status")
        if status is not None and status not in EXECUTION_STATUSES:
            return problem(unknown("status", EXECUTION_STATUSES))
        paging, since = paging_of(asked), since_of(asked)
        if isinstance(paging, Refusal):
            return problem(paging)
        if isinstance(since, Refusal):
            return problem(since)
        limit, before = paging
        wanted = ExecutionsWanted(
            status=status, incident_id=asked.get("incident_id"), action=asked.get("action"), since=since
        )
        try:
            page = await self._store.engine.executions(wanted, before=before, limit=limit)
        except ValueError as exc:
            return problem(wrong("invalid_request", "before", str(exc)))
        return answer({"executions": [execution.to_dict() for execution in page.rows], "next": page.next})

    async def _reconcile(self, request: web.Request) -> web.Response:
        body = await read_document(request)
        wanted = body if isinstance(body, Refusal) else validated(ReconcileRequest, body, "invalid_request")
        if isinstance(wanted, Refusal):
            return problem(wanted)
        if wanted.outcome == "not_executed" and wanted.cost_usd:
            return problem(
                wrong("invalid_request", "cost_usd", "must be absent or 0 where nothing was executed")
            )
        decision_id = request.match_info["decision_id"]
        reply = await self._gate.reconcile(
            Reconcile(
                decision_id=new_decision_id(),
                admission_id=decision_id,
                outcome=wanted.outcome,
                cost=wanted.cost_usd,
                reason=wanted.reason,
                reconciled_by=wanted.reconciled_by,
                request_id=request_id_of(request),
                origin="api",
            )
        )
        if isinstance(reply, Denied):
            return problem(reply.refusal)
        logger.info(
            "reconciled",
            extra={
                "decision_id": decision_id,
                "outcome": wanted.outcome,
                "scope_id": reply.execution.scope_id,
            },
        )
        return answer(reply.execution.to_dict())

    async def _explain(self, request: web.Request) -> web.Response:
        """Explain a request. The answer is 200 for any body, because a refusal is explained, not returned."""
        terms = self._live.terms
        header = terms.settings.gate.tenant_header
        routes = {route.path.text: route for route in terms.settings.gate.routes}
        asked = query_of(request, ("route",))
        body = await read_document(request)
        if isinstance(asked, Refusal):
            return problem(asked)
        name = asked.get("route", next(iter(terms.enforced or routes.values())).path.text)
        if name not in routes:
            return problem(unknown("route", tuple(routes)))
        route = terms.judging(routes[name])
        shadow = route in terms.shadow_routes
        tenant = tenant_of(request, header)
        if isinstance(body, Refusal):
            return answer(explained(self._grants.unread(body, terms, shadow=shadow), terms, route))
        if tenant is None:
            nobody = Refusal("invalid_request", f"{header} must name one tenant.")
            return answer(explained(self._grants.unread(nobody, terms, shadow=shadow), terms, route))
        claims = read(Request(document=body), route.sources)
        if isinstance(claims, Refusal):
            return answer(explained(self._grants.unread(claims, terms, shadow=shadow), terms, route))
        try:
            explanation = await self._grants.explain(claims, tenant, terms, shadow=shadow)
        except StoreUnavailable as exc:
            explanation = Explanation(refusal=unavailable(exc))
        return answer(explained(explanation, terms, route, claims, tenant))

    async def _status(self, request: web.Request) -> web.Response:
        del request
        terms = self._live.terms
        policies, gate = terms.policies, terms.settings.gate
        ready, (found, footprint) = await asyncio.gather(self._readiness.to_dict(), looked_at(self._store))
        unknown, oldest = found or (None, None)
        trouble = self._store.clock_trouble()
        return answer(
            {
                **ready,
                "version": __version__,
                "uptime_seconds": (self._about.elapsed() - self._about.started_at) / 1_000_000,
                "draining": self._gate.draining,
                "in_flight": self._gate.in_flight,
                "unknown_executions": unknown,
                "oldest_unknown_admitted_at": None if oldest is None else iso_time(oldest),
                "clock": {"ok": trouble is None, "reason": trouble},
                "store": {"url": self._about.store_url, **asdict(footprint)},
                "policy_revision": policies.revision if policies else None,
                "config_revision": terms.revision,
                "last_reload": self._reloads.last(),
                "scope_required_from": gate.scope_required_from,
                "shadow_routes": [route.path.text for route in terms.shadow_routes],
                "scopes_served_on": "data" if self._scopes is None else "admin",
                "listeners": self._about.listeners(),
            }
        )


def rendered(stored: StoredDecision) -> dict[str, Any]:
    """A record as JSON: its 14 fields, then the fields of its envelope, all read from the stored bytes.

    A record without a run shows the run that it was bound to later.
    """
    envelope: dict[str, Any] = orjson.loads(stored.envelope)
    record: dict[str, Any] = envelope.pop("record")
    for beside in ("kept_once", "run_bindings"):
        envelope.pop(beside, None)  # only `verify` uses these
    if record["run_id"] is None:
        record["run_id"] = stored.bound_run_id
    return {**record, **envelope}


def _no_decision(decision_id: str) -> Refusal:
    return Refusal(
        "decision_not_found", "No decision has this decision_id.", {"decision_id": decision_id[:256]}
    )
