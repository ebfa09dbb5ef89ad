"""The data listener: it judges a request, answers it itself, or passes it through unchanged.

The raw request target decides which, because a router would normalise it first.
"""

from __future__ import annotations

import asyncio
from typing import cast

from aiohttp import web

from sidecar.core.target import Rejected
from sidecar.errors import Refusal, StoreUnavailable, unavailable
from sidecar.gate import deadlines
from sidecar.gate.execution import Gate
from sidecar.gate.messages import GatedRequest, Refused, RequestFacts, Undelivered
from sidecar.gate.observer import Observer
from sidecar.live.snapshot import Live, Snapshot
from sidecar.telemetry.events import LogEvent
from sidecar.telemetry.metrics import Metrics
from sidecar.telemetry.tracing import Tracing
from sidecar.web.api.scopes import ScopeApi
from sidecar.web.data import passthrough
from sidecar.web.data._answers import admission_report, broken_off, client_left, write_forwarded
from sidecar.web.data._reading import Course, course_of, facts_of, read_gated, target_bytes
from sidecar.web.serving.accesslog import AccessLog, visit_of
from sidecar.web.serving.body import Taken
from sidecar.web.serving.connections import DataConnection, broken_body
from sidecar.web.serving.hosts import Guard, malformed
from sidecar.web.wire.headers import HeaderFields, fields_of
from sidecar.web.wire.problem import problem, refused_problem
from sidecar.web.wire.request import request_id_of


class DataPlane:
    """The handler of the data listener."""

    def __init__(
        self,
        *,
        gate: Gate,
        passing: passthrough.PassThroughProxy,
        scopes: ScopeApi | None,
        live: Live,
        metrics: Metrics,
        observer: Observer,
        access: AccessLog,
        tracing: Tracing,
    ) -> None:
        self._gate = gate
        self._passing = passing
        self._scopes = scopes
        self._live = live
        self._guard = Guard("data", live)
        self._metrics = metrics
        self._observer = observer
        self._access = access
        self._tracing = tracing

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request. An unexpected error is logged and answered with 500, never forwarded."""
        self._access.begin(request)
        try:
            answer = await self._route(request)
        except StoreUnavailable as exc:
            answer = self._failed(request, unavailable(exc))
        except ConnectionError:
            answer = client_left()
        except asyncio.CancelledError:
            self._access.ended(request, None)
            raise
        except Exception as exc:
            LogEvent.REQUEST_FAILED.log(exc=exc, method=request.method)
            refusal = Refusal("internal_error", "The sidecar failed; nothing more was forwarded.")
            answer = self._failed(request, refusal)
        if self._gate.draining or cast(DataConnection, request.protocol).ending:
            answer.force_close()
        return answer

    @staticmethod
    def _failed(request: web.BaseRequest, refusal: Refusal) -> web.StreamResponse:
        """The answer after a fault: a problem, or a cut if the head of another answer has already been sent.

        A second head would become part of the first answer's body.
        """
        return broken_off(request) if request.writer.output_size > 0 else problem(refusal)

    async def _route(self, request: web.BaseRequest) -> web.StreamResponse:
        target = request._message.path  # the raw target, because yarl has changed every public form
        visit, fields = visit_of(request), fields_of(request)
        if self._scopes is not None and self._scopes.owns(target):
            visit.route = "scopes"
            foreign = self._guard.refusal(request)
            if foreign is not None:
                return await self._scopes.refuse(request, target, request_id_of(fields), foreign)
            return await self._scopes.handle(request, target, request_id_of(fields))
        unnamed = malformed(request, fields)
        snapshot = self._live.snapshot
        course = course_of(request, target, fields, snapshot)
        if course is None:
            if unnamed is not None:
                self._metrics.passed.labels(unnamed.code).inc()
                return problem(unnamed)
            switching = passthrough.upgrade_refusal(request, fields)
            if switching is not None:
                return problem(switching)
            return await self._passing.carry(request, target_bytes(target), fields)
        visit.route = "gated"
        visit.trace = self._tracing.begin(
            method=request.method,
            path=visit.path,
            route=None if course.route is None else course.route.path.text,
            headers=request.raw_headers,
            begun=visit.begun,
        )
        visit.trace_id = visit.trace.ids.get("trace_id", visit.trace_id)
        try:
            async with asyncio.timeout(deadlines.judging_seconds(snapshot.settings)) as visit.deadline:
                return await self._gated(request, target, fields, course, snapshot, unnamed)
        except TimeoutError:
            if visit.deadline is None or not visit.deadline.expired():
                raise
        # The outer deadline passed, which is not the request's fault. Nothing of it was forwarded, because
        # the gate ends an execution before that.
        facts = facts_of(fields, snapshot)
        LogEvent.UNDECIDED.log(request_id=facts.request_id)
        refused = self._gate.refusals.undecided("it was not decided in time", facts)
        return refused_problem(refused, facts.request_id)

    # A gated request ---------------------------------------------------------------------------

    async def _gated(
        self,
        request: web.BaseRequest,
        target: str,
        fields: HeaderFields,
        course: Course,
        snapshot: Snapshot,
        unnamed: Refusal | None,
    ) -> web.StreamResponse:
        """Judge and execute a gated request. `unnamed` is the refusal of a request without a valid host."""
        visit, taken = visit_of(request), Taken()
        if unnamed is not None:
            # Shadow routes refuse it too, because the backend would choose where it goes.
            self._observer.judged(visit.trace, visit.begun)
            return await self._refuse(Refused(refusal=unnamed), facts_of(fields, snapshot))
        if isinstance(course.verdict, Rejected):
            self._observer.judged(visit.trace, visit.begun)
            refusal = course.verdict.refusal
            return await self._unjudged(request, target, fields, course, refusal, snapshot, taken)
        place = self._gate.enter(snapshot)
        if isinstance(place, Refused):
            self._observer.judged(visit.trace, visit.begun)
            return await self._refuse(place, facts_of(fields, snapshot))
        gated: GatedRequest | Refusal | None = None
        try:
            gated = await read_gated(request, target, fields, course, snapshot, taken, place)
        finally:
            # A refusal may have to wait for its summary; it must not hold a place meanwhile.
            if not isinstance(gated, GatedRequest):
                place.leave()
        self._observer.judged(visit.trace, visit.begun, gated)
        if isinstance(gated, Refusal):
            if not course.shadow:
                taken.pieces.clear()
                del place  # gives back the memory that it counts
            return await self._unjudged(request, target, fields, course, gated, snapshot, taken)
        return await self._execute(request, gated)

    async def _execute(self, request: web.BaseRequest, gated: GatedRequest) -> web.StreamResponse:
        visit, facts = visit_of(request), gated.facts
        visit.request_id, visit.scope_id = facts.request_id, facts.claims.scope_id
        visit.trace_id = gated.log_fields.get("trace_id")
        visit.extend(deadlines.executing_seconds(gated) + deadlines.judging_seconds(gated.snapshot.settings))
        try:
            outcome = await self._gate.execute(gated)
        finally:
            if not gated.place.carried:
                gated.place.leave()
        visit.extend(None)
        if isinstance(outcome, Refused):
            return refused_problem(outcome, facts.request_id)
        if isinstance(outcome, Undelivered):
            report = admission_report(outcome.last, self._gate.now())
            return problem(
                outcome.refusal,
                request_id=facts.request_id,
                decision_id=outcome.last.execution.decision_id,
                headers={name.decode(): value.decode() for name, value in report},
            )
        return await write_forwarded(
            request, gated, outcome, now=self._gate.now(), draining=self._gate.draining
        )

    async def _unjudged(
        self,
        request: web.BaseRequest,
        target: str,
        fields: HeaderFields,
        course: Course,
        refusal: Refusal,
        snapshot: Snapshot,
        taken: Taken,
    ) -> web.StreamResponse:
        """Refuse a request that cannot be judged. On a shadow route, record that and pass it through."""
        facts, refused = facts_of(fields, snapshot), Refused(refusal=refusal)
        if course.shadow:
            unfit = (
                passthrough.upgrade_refusal(request, fields)
                or passthrough.uncarried(fields)
                or broken_body(request)
            )
            blocked = self._gate.unready(snapshot) if unfit is None else Refused(refusal=unfit)
            if blocked is None:
                return await self._pass_over(request, target, fields, refusal, facts, taken)
            refused = blocked
        allow = course.verdict.allow if isinstance(course.verdict, Rejected) else ()
        return await self._refuse(refused, facts, allow=allow)

    async def _pass_over(
        self,
        request: web.BaseRequest,
        target: str,
        fields: HeaderFields,
        refusal: Refusal,
        facts: RequestFacts,
        taken: Taken,
    ) -> web.StreamResponse:
        """Record a refusal that a shadow route does not enforce, and pass the request through."""
        recorded = await self._gate.refusals.pass_over(refusal, facts)
        if isinstance(recorded, Refused):
            return refused_problem(recorded, facts.request_id)
        visit = visit_of(request)
        visit.decision_id = recorded
        visit.extend(None)
        return await self._passing.carry(
            request, target_bytes(target), fields, passthrough.ShadowRecord(recorded, taken)
        )

    async def _refuse(
        self, refused: Refused, facts: RequestFacts, *, allow: tuple[str, ...] = ()
    ) -> web.StreamResponse:
        """Record a refusal, and answer with it."""
        recorded = await self._gate.refusals.refuse(refused.refusal, facts, retry_after=refused.retry_after)
        return refused_problem(recorded, facts.request_id, allow=allow)
