"""Decision records of other services over HTTP, the runs bound to them, and the kill switch."""

from __future__ import annotations

from typing import cast

from aiohttp import web

from sidecar.core.command import Bind, Emit, Emitted, NotEmitted, RunBound, Switch, Turn, Turned
from sidecar.core.emission import CARESignalAccessError, Kind, emission
from sidecar.core.facts import is_identifier
from sidecar.errors import Refusal
from sidecar.ids import new_decision_id
from sidecar.live.terms import Live
from sidecar.store.batch import Store
from sidecar.telemetry.metrics import Metrics
from sidecar.web.serving.body import read_document
from sidecar.web.wire.asked import request_id_of
from sidecar.web.wire.emittermodels import EMITTER_MODELS, BackfillRequest
from sidecar.web.wire.models import validated, wrong
from sidecar.web.wire.problem import answer, problem

KILL_SWITCH: Switch = "care_kill_switch"


class EmitterApi:
    """Handlers of the admin listener. They answer once the record is stored; otherwise 503."""

    def __init__(self, *, store: Store, metrics: Metrics, live: Live) -> None:
        self._store = store
        self._metrics = metrics
        self._live = live

    def routes(self) -> list[web.RouteDef]:
        return [
            # The pattern of `kind` matches no decision_id.
            web.post("/api/v1/decisions/{kind:[a-z_]+}", self._emit),
            web.post("/api/v1/runs/{run_id}/backfill", self._backfill),
            web.get("/api/v1/care/kill-switch", self._switch),
            web.put("/api/v1/care/kill-switch", self._turn_on),
            web.delete("/api/v1/care/kill-switch", self._turn_off),
        ]

    async def _emit(self, request: web.Request) -> web.Response:
        """Answer 201 with the record, or 200 with null if the emission rule or a prior record forbids it."""
        kind = cast(Kind, request.match_info["kind"])
        if kind not in EMITTER_MODELS:
            known = ", ".join(EMITTER_MODELS)
            return problem(Refusal("not_found", f"There is no such kind of decision; there are {known}."))
        body = await read_document(request)
        told = body if isinstance(body, Refusal) else validated(EMITTER_MODELS[kind], body, "invalid_request")
        if isinstance(told, Refusal):
            return problem(told)
        try:
            made = emission(
                kind,
                told.model_dump(),
                decision_id=new_decision_id(),
                now=self._store.now(),
                min_confidence=self._live.terms.settings.care.min_confidence,
            )
        except CARESignalAccessError as exc:
            return problem(wrong("invalid_request", "signals_used", f"holds what may not be used: {exc}"))
        if made is None:
            self._metrics.emissions.labels(kind, "ruled_out").inc()
            return answer(None)
        reply = await self._store.submit(
            Emit(record=made.record, origin="api", once=made.once, unless_switched=made.unless_switched)
        )
        if isinstance(reply, NotEmitted):
            self._metrics.emissions.labels(kind, reply.why).inc()
            return answer(None)
        assert isinstance(reply, Emitted)
        self._metrics.emissions.labels(kind, "recorded").inc()
        recorded = answer(reply.record.to_dict(), status=201)
        recorded.headers["Scopegate-Decision-Id"] = reply.record.decision_id
        return recorded

    async def _backfill(self, request: web.Request) -> web.Response:
        run_id = request.match_info["run_id"]
        if not is_identifier(run_id):
            return problem(wrong("invalid_request", "run_id", "must be 1 to 256 printable characters"))
        body = await read_document(request)
        told = body if isinstance(body, Refusal) else validated(BackfillRequest, body, "invalid_request")
        if isinstance(told, Refusal):
            return problem(told)
        if not told.request_id:
            return answer({"updated": 0})
        reply = await self._store.submit(Bind(request_id=told.request_id, run_id=run_id))
        assert isinstance(reply, RunBound)
        return answer({"updated": reply.count})

    async def _switch(self, request: web.Request) -> web.Response:
        del request
        return answer({"active": await self._store.engine.is_on(KILL_SWITCH)})

    async def _turn_on(self, request: web.Request) -> web.Response:
        return await self._turn(request, on=True)

    async def _turn_off(self, request: web.Request) -> web.Response:
        return await self._turn(request, on=False)

    async def _turn(self, request: web.Request, *, on: bool) -> web.Response:
        reply = await self._store.submit(
            Turn(
                decision_id=new_decision_id(),
                switch=KILL_SWITCH,
                on=on,
                origin="api",
                request_id=request_id_of(request),
            )
        )
        assert isinstance(reply, Turned)
        turned = answer({"active": reply.on})
        turned.headers["Scopegate-Decision-Id"] = reply.decision_id
        return turned
