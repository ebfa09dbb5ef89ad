"""The data listener: it judges a request, answers it itself, or passes it through unchanged.

The raw request target decides which, because a router would normalise it first.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import TracebackType

from aiohttp import web

from sidecar.core.principal import Principal
from sidecar.core.target import Gated, Rejected
from sidecar.core.unlisted import Unlisted, not_listed
from sidecar.errors import Refusal, StoreUnavailable, unavailable
from sidecar.eventloop.timers import Deadlines
from sidecar.gate import deadlines
from sidecar.gate.execution import Gate
from sidecar.gate.messages import GatedRequest, Refused, RequestFacts, Undelivered
from sidecar.gate.observer import Observer
from sidecar.gate.unlisted_log import UnlistedLog
from sidecar.live.snapshot import Live, Snapshot
from sidecar.settings.auth import Area
from sidecar.telemetry.events import LogEvent
from sidecar.telemetry.metrics import Metrics
from sidecar.telemetry.tracing import Tracing
from sidecar.web.api.reports import COMPLETE, ReportApi
from sidecar.web.api.scopes import ScopeApi
from sidecar.web.data import passthrough
from sidecar.web.data._answers import admission_report, broken_off, client_left, write_forwarded
from sidecar.web.data._reading import Course, course_of, facts_of, read_gated
from sidecar.web.serving.body import Taken
from sidecar.web.serving.connections import broken_body
from sidecar.web.serving.datarequest import DataRequest
from sidecar.web.serving.hosts import Guard, malformed
from sidecar.web.serving.identity import Identities, withheld
from sidecar.web.serving.roles import lacking
from sidecar.web.wire.problem import problem, refused_problem, with_place
from sidecar.web.wire.request import request_id_of


class DataPlane:
    """The handler of the data listener."""

    def __init__(
        self,
        *,
        gate: Gate,
        passing: passthrough.PassThroughProxy,
        unlisted: UnlistedLog,
        scopes: ScopeApi | None,
        reports: ReportApi,
        identities: Identities,
        live: Live,
        metrics: Metrics,
        observer: Observer,
        tracing: Tracing,
    ) -> None:
        self._gate = gate
        self._passing = passing
        self._unlisted = unlisted
        self._scopes = scopes
        self._reports = reports
        self._identities = identities
        self._live = live
        self._guard = Guard("data", live)
        self._metrics = metrics
        self._observer = observer
        self._tracing = tracing
        self._deadlines = Deadlines()

    async def handle(self, request: DataRequest) -> web.Response | None:
        """Answer one request, or return the sidecar's own answer to it.

        An unexpected error is logged and answered with 500, never forwarded.
        """
        answer: web.Response | None
        try:
            answer = await self._route(request)
        except StoreUnavailable as exc:
            answer = self._failed(request, unavailable(exc))
        except ConnectionError:
            answer = None
            client_left(request)
        except Exception as exc:
            LogEvent.REQUEST_FAILED.log(exc=exc, method=request.method)
            refusal = Refusal("internal_error", "The sidecar failed; nothing more was forwarded.")
            answer = self._failed(request, refusal)
        if self._gate.draining or request.protocol.ending:
            request.keep_alive = False
        return answer

    @staticmethod
    def _failed(request: DataRequest, refusal: Refusal) -> web.Response | None:
        """The answer after a fault: a problem, or a cut if the head of another answer has already been sent.

        A second head would become part of the first answer's body.
        """
        if not request.answering:
            return problem(refusal)
        broken_off(request)
        return None

    async def _route(self, request: DataRequest) -> web.Response | None:
        target, snapshot = request.target, self._live.snapshot
        request.access_log = snapshot.settings.telemetry.access_log
        if self._scopes is not None and self._scopes.owns(target):
            request.route = "scopes"
            request_id = request_id_of(request.fields)
            foreign = self._guard.refusal(request)
            if foreign is not None:
                return await self._scopes.refuse(request, target, request_id, foreign)
            principal = self._identities.of(
                request.fields, request.transport, snapshot, place="call", area="scopes"
            )
            if isinstance(principal, Refusal):
                return await self._scopes.refuse(request, target, request_id, principal)
            request.principal = principal
            return await self._scopes.handle(request, target, request_id, principal)
        if COMPLETE in target and self._reports.owns(target):
            request.route = "reports"
            foreign = self._guard.refusal(request)
            if foreign is not None:
                return problem(foreign, request_id=request_id_of(request.fields))
            return await self._reports.handle(request, target, request_id_of(request.fields))
        unnamed = malformed(request, request.fields)
        course = course_of(request, snapshot)
        if snapshot.methods.names:
            if snapshot.methods.proxy is not None:  # else it is the credential's places alone
                request.withheld = withheld(request.fields, request.transport, snapshot)
            unproven = await self._unproven(request, course, snapshot)
            if unproven is not None:
                return unproven
        if course is None:
            if unnamed is not None:
                self._metrics.passed.labels(unnamed.code).inc()
                return problem(unnamed)
            switching = passthrough.upgrade_refusal(request)
            if switching is not None:
                return problem(switching)
            unlisted = snapshot.unlisted
            if unlisted is not None:
                return await self._not_listed(request, unlisted, snapshot)
            return await self._passing.carry(request)
        request.route = "gated"
        request.trace = self._tracing.begin(
            method=request.method,
            path=request.logged_path,
            route=None if course.route is None else course.route.label,
            headers=request.raw_headers,
            begun=request.begun,
        )
        request.trace_id = request.trace.ids.get("trace_id")
        task = request.protocol.task
        assert task is not None
        limit = _Limit(self._deadlines, task, deadlines.judging_seconds(snapshot.settings))
        try:
            with limit:
                return await self._gated(request, course, snapshot, unnamed, limit)
        except TimeoutError:
            if not limit.passed:
                raise
        # Nothing of it was forwarded, because the gate ends an execution before its outer deadline.
        return self._undecided(facts_of(request, course, snapshot))

    def _undecided(self, facts: RequestFacts) -> web.Response:
        """The answer if the outer deadline passed, which is not the request's fault."""
        LogEvent.UNDECIDED.log(request_id=facts.request_id)
        refused = self._gate.refusals.undecided("it was not decided in time", facts)
        return refused_problem(refused, facts.request_id, route=facts.route)

    async def _unproven(
        self, request: DataRequest, course: Course | None, snapshot: Snapshot
    ) -> web.Response | None:
        """Find out who asks. The answer to a request whose credential is missing or not valid, else None."""
        area: Area = "pass" if course is None else "gated"
        principal = self._identities.of(
            request.fields, request.transport, snapshot, place="request", area=area
        )
        if isinstance(principal, Principal):
            request.principal = principal
            return None
        request.route = "passed" if course is None else "gated"
        facts = facts_of(request, course, snapshot)
        if course is None:
            facts = replace(facts, gatekept="access")
        refused = await self._gate.refusals.refuse(principal, facts)
        return refused_problem(refused, facts.request_id, route=facts.route)

    # A request that no route lists -------------------------------------------------------------

    async def _not_listed(
        self, request: DataRequest, unlisted: Unlisted, snapshot: Snapshot
    ) -> web.Response | None:
        """Pass a request, record and pass it, or refuse it, as `gate.unlisted` says."""
        treatment, access = unlisted.treatment(request.method, request.target, request.fields.deciding())
        if treatment == "pass":
            return await self._passing.carry(request)
        facts = facts_of(request, None, snapshot)
        task = request.protocol.task
        assert task is not None
        limit = _Limit(self._deadlines, task, deadlines.judging_seconds(snapshot.settings))
        try:
            with limit:
                if treatment == "refuse":
                    self._observer.unlisted(access, "refused")
                    refusal = not_listed(request.method, access)
                    return await self._refuse(Refused(refusal=refusal), facts)
                unfit = passthrough.uncarried(request.fields) or broken_body(request.content)
                if unfit is not None:
                    self._metrics.passed.labels(unfit.code).inc()
                    return problem(unfit)
                recorded = await self._unlisted.record(access, facts)
        except TimeoutError:
            if not limit.passed:
                raise
            return self._undecided(facts)
        request.request_id = facts.request_id
        if isinstance(recorded, Refused):
            return refused_problem(recorded, facts.request_id)
        request.decision_id = recorded
        return await self._passing.carry(request)

    # A gated request ---------------------------------------------------------------------------

    async def _gated(
        self,
        request: DataRequest,
        course: Course,
        snapshot: Snapshot,
        unnamed: Refusal | None,
        limit: _Limit,
    ) -> web.Response | None:
        """Judge and execute a gated request. `unnamed` is the refusal of a request without a valid host."""
        taken = Taken()
        if unnamed is not None:
            # Shadow routes refuse it too, because the backend would choose where it goes.
            self._observer.judged(request.trace, request.begun)
            return await self._refuse(Refused(refusal=unnamed), facts_of(request, course, snapshot))
        refusal = None
        # Without policies, the reason is that nothing can be decided.
        if snapshot.methods.names and snapshot.policies is not None:
            refusal = lacking(request.principal, snapshot, "executor")
        if refusal is None and isinstance(course.verdict, Rejected):
            refusal = course.verdict.refusal
        if refusal is not None:
            self._observer.judged(request.trace, request.begun)
            return await self._unjudged(request, course, refusal, snapshot, taken, limit)
        place = self._gate.enter(snapshot)
        if isinstance(place, Refused):
            self._observer.judged(request.trace, request.begun)
            return await self._refuse(place, facts_of(request, course, snapshot))
        gated: GatedRequest | Refusal | None = None
        try:
            gated = await read_gated(request, course, snapshot, taken, place)
        finally:
            # A refusal may have to wait for its summary; it must not hold a place meanwhile.
            if not isinstance(gated, GatedRequest):
                place.leave()
        self._observer.judged(request.trace, request.begun, gated)
        if isinstance(gated, Refusal):
            if not course.shadow:
                taken.pieces.clear()
                del place  # gives back the memory that it counts
            return await self._unjudged(request, course, gated, snapshot, taken, limit)
        return await self._execute(request, gated, limit)

    async def _execute(self, request: DataRequest, gated: GatedRequest, limit: _Limit) -> web.Response | None:
        facts = gated.facts
        request.request_id, request.scope_id = facts.request_id, facts.claims.scope_id
        request.trace_id = gated.log_fields.get("trace_id")
        limit.extend(deadlines.executing_seconds(gated) + deadlines.judging_seconds(gated.snapshot.settings))
        try:
            outcome = await self._gate.execute(gated)
        finally:
            if not gated.place.carried:
                gated.place.leave()
        limit.end()
        if isinstance(outcome, Refused):
            placed = with_place(outcome, gated.route.sources)
            return refused_problem(placed, facts.request_id, route=facts.route)
        # The time of the settlement, unless it is still to come: a long answer streams, or the store fails.
        ended_at = outcome.last.execution.ended_at
        now = self._gate.now() if ended_at is None else ended_at
        if isinstance(outcome, Undelivered):
            report = admission_report(outcome.last, now)
            return problem(
                outcome.refusal,
                request_id=facts.request_id,
                decision_id=outcome.last.execution.decision_id,
                route=facts.route,
                headers={name.decode(): value.decode() for name, value in report},
            )
        if outcome.answered_at is not None:
            now = outcome.answered_at
        await write_forwarded(request, gated, outcome, now=now, draining=self._gate.draining)
        return None

    async def _unjudged(
        self,
        request: DataRequest,
        course: Course,
        refusal: Refusal,
        snapshot: Snapshot,
        taken: Taken,
        limit: _Limit,
    ) -> web.Response | None:
        """Refuse a request that cannot be judged. On a shadow route, record that and pass it through."""
        facts, refused = facts_of(request, course, snapshot), Refused(refusal=refusal)
        if course.shadow:
            unfit = (
                passthrough.upgrade_refusal(request)
                or passthrough.uncarried(request.fields)
                or broken_body(request.content)
            )
            blocked = self._gate.unready_to_send(snapshot) if unfit is None else Refused(refusal=unfit)
            if blocked is None:
                return await self._pass_over(request, course, refusal, facts, taken, limit)
            refused = blocked
        allow = course.verdict.allow if isinstance(course.verdict, Rejected) else ()
        return await self._refuse(refused, facts, allow=allow)

    async def _pass_over(
        self,
        request: DataRequest,
        course: Course,
        refusal: Refusal,
        facts: RequestFacts,
        taken: Taken,
        limit: _Limit,
    ) -> web.Response | None:
        """Record a refusal that a shadow route does not enforce, and pass the request through."""
        recorded = await self._gate.refusals.pass_over(refusal, facts)
        if isinstance(recorded, Refused):
            return refused_problem(recorded, facts.request_id, route=facts.route)
        request.decision_id = recorded
        limit.end()
        credited = isinstance(course.verdict, Gated) and refusal.code != "role_required"
        return await self._passing.carry(request, passthrough.ShadowRecord(recorded, taken, credited))

    async def _refuse(
        self, refused: Refused, facts: RequestFacts, *, allow: tuple[str, ...] = ()
    ) -> web.Response:
        """Record a refusal, and answer with it."""
        recorded = await self._gate.refusals.refuse(refused.refusal, facts, retry_after=refused.retry_after)
        return refused_problem(recorded, facts.request_id, route=facts.route, allow=allow)


class _Limit:
    """The outer deadline of a gated request. A block that is cut off by it raises TimeoutError."""

    __slots__ = ("_cancelling", "_deadline", "_deadlines", "_task", "passed")

    def __init__(self, deadlines: Deadlines, task: asyncio.Task[None], seconds: float) -> None:
        self._deadlines, self._task = deadlines, task
        self._cancelling = task.cancelling()
        self.passed = False
        self._deadline = deadlines.begin(seconds, self._pass)

    def extend(self, seconds: float) -> None:
        """Move the deadline to `seconds` from now. A deadline that has passed stays."""
        if not self.passed:
            self._deadline.end()
            self._deadline = self._deadlines.begin(seconds, self._pass)

    def end(self) -> None:
        """Remove the deadline."""
        self._deadline.end()

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._deadline.end()
        if self.passed and self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise TimeoutError from exc

    def _pass(self) -> None:
        # After a pause of the process, an execution's deadline may pass later in this same iteration. Its
        # answer comes first, so the block is cut off in the next iteration.
        self._deadline = self._deadlines.begin(0.0, self._cut)

    def _cut(self) -> None:
        self.passed = True
        self._task.cancel()
