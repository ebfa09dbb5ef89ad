"""The path of one gated request: admit and commit, forward, settle. Nothing is forwarded unrecorded.

The execution runs in a task of its own, so that it survives a client that hangs up (G9). A refusal
(`Refused`) and an answer (`Forwarded`) are values. Failures of the store and the backend become values, too.

Each execution has one `InFlight`, which ends in `Gate._end`: when its task is done, or when its outer
deadline has passed and the task still waits for something. `Gate._end` does what the task has not done: it
frees the place in flight, answers the client and settles the execution. After that its task sends nothing, so
that an execution settled as `not_sent` was never sent.
"""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from sidecar.core.command import (
    Admit,
    Admitted,
    Denied,
    Reconcile,
    Repeated,
    Replayed,
    Reply,
    Report,
    Settled,
    SettledOutcome,
)
from sidecar.core.idempotency import KeptAnswer
from sidecar.core.rules import previewed
from sidecar.errors import Refusal, StoreUnavailable, clock_refusal
from sidecar.eventloop.timers import Deadline, Deadlines
from sidecar.gate import deadlines
from sidecar.gate._cost import reported_cost
from sidecar.gate.messages import (
    Forwarded,
    GatedRequest,
    Outcome,
    Refused,
    Remainder,
    Undelivered,
    admission_headers,
)
from sidecar.gate.observer import Observer
from sidecar.gate.places import Place, Places
from sidecar.gate.refusal_log import CLOCK_RETRY_AFTER_SECONDS, RETRY_AFTER_SECONDS, RefusalLog
from sidecar.gate.replays import ReplayLog, kept_answer, replay, status_only
from sidecar.gate.reports import TimeLimits, completion_headers, digest_of, new_token
from sidecar.gate.settlement import Settlements
from sidecar.ids import new_decision_id
from sidecar.live.snapshot import Snapshot
from sidecar.settings.routes import Route
from sidecar.store.batch import Store
from sidecar.telemetry.events import LogEvent
from sidecar.upstream import Exchange, NotSent, TimedOut, Unanswered, Upstream
from sidecar.upstream.custody import NO_CUSTODY, Carried, Custody, Echo

# What executions that a drain gives up on are given to be written down.
LAST_WRITES_SECONDS = 5.0
LATE = "it did not end in time"
FAILED = "the sidecar failed"
SHUT_DOWN = "the sidecar shut down"
_DRAINING = Refused(
    refusal=Refusal("draining", "The sidecar is shutting down; send the request to another one."),
    retry_after=5,
)


@dataclass(slots=True, eq=False)
class InFlight:
    """The state of one gated request, from its place in flight to its settlement."""

    request: GatedRequest
    answer: asyncio.Future[Outcome | Denied | Replayed]  # a long answer goes on streaming after this is set
    task: asyncio.Task[None] = field(init=False)
    deadline: Deadline = field(init=False)  # the outer one
    decision_id: str | None = None  # the id of the submitted admission
    token: str | None = None  # its completion token; None: it is not reported
    admitted: Admitted | None = None
    sent: bool = False  # a byte of the request may have been sent
    carried: Carried | None = None  # the credentials that it was sent with
    settled: bool = False
    rest: Remainder | None = None  # the rest of a long answer
    ended: bool = False


class Gate:
    """Admits, forwards and settles gated requests. A request keeps the snapshot that it began with."""

    def __init__(
        self,
        *,
        store: Store,
        upstream: Upstream,
        refusals: RefusalLog,
        observer: Observer,
        limits: TimeLimits | None = None,
        custody: Custody = NO_CUSTODY,
    ) -> None:
        self.refusals = refusals
        self._custody = custody
        self.draining = False
        self._store = store
        self._upstream = upstream
        self._observer = observer
        self._places = Places(observer.entered)
        self._in_flight: set[InFlight] = set()
        self._lingering: set[asyncio.Task[None]] = set()  # those whose requests were given up
        self._deadlines = Deadlines()
        self._settlements = Settlements(store, observer, limits=limits)
        self._replays = ReplayLog(store, refusals, observer)

    # The way of one request --------------------------------------------------------------------

    def unready(self, snapshot: Snapshot) -> Refused | None:
        """Why nothing can be decided now, with the seconds to wait before a retry; None if it can be."""
        if self.draining:
            return _DRAINING
        if snapshot.policies is None:
            refusal = Refusal("policy_unavailable", "No valid policy set is loaded; nothing is allowed.")
            return Refused(refusal=refusal, retry_after=30)
        trouble = self._store.clock_trouble()
        if trouble is not None:
            return Refused(refusal=clock_refusal(trouble), retry_after=CLOCK_RETRY_AFTER_SECONDS)
        return None

    def unready_to_send(self, snapshot: Snapshot) -> Refused | None:
        """Why nothing can be admitted and sent now: as `unready`, or because a credential is missing."""
        carried = self._custody.gated
        if carried is not None and carried.trouble is not None:
            return self.unready(snapshot) or Refused(refusal=carried.trouble, retry_after=RETRY_AFTER_SECONDS)
        return self.unready(snapshot)

    def enter(self, snapshot: Snapshot) -> Place | Refused:
        """Take a place in flight before the request's body is read, or return the refusal."""
        held = self._custody.gated is not None
        unready = self.unready_to_send(snapshot) if held else self.unready(snapshot)
        if unready is not None:
            return unready
        max_in_flight = snapshot.settings.gate.max_in_flight
        place = self._places.take(max_in_flight)
        if place is not None:
            return place
        message = f"{max_in_flight} gated requests are in flight."
        return Refused(
            refusal=Refusal("overloaded", message, {"cause": "in_flight"}), retry_after=RETRY_AFTER_SECONDS
        )

    async def execute(self, request: GatedRequest) -> Outcome:
        """Decide on a request that has entered and, if it is admitted, execute it even if the caller is
        cancelled.

        Its place is left once it has ended, in every case.
        """
        if self.draining:  # since it entered; the drain waits only for executions that had begun
            request.place.leave()
            return await self.refusals.refuse(
                _DRAINING.refusal, request.facts, retry_after=_DRAINING.retry_after
            )
        flight = self._begin(request)
        try:
            outcome = await flight.answer
        except asyncio.CancelledError:
            # After a pause of the whole process, all deadlines pass in one iteration of the event loop. If
            # the execution's deadline passed first, its answer says how the execution ended.
            if flight.answer.cancelled() or not flight.answer.done():
                raise
            outcome = flight.answer.result()
        # A request that is not forwarded is handled here, not in the task. If it waits for its summary, it
        # must not occupy a place in flight.
        if isinstance(outcome, Denied):
            return await self.refusals.denied(outcome, request.facts)
        if isinstance(outcome, Replayed):
            unrecorded = await self._replays.record(outcome, request.facts)
            return unrecorded or replay(outcome, request.method)
        return outcome

    def give_back(self, reply: Reply) -> None:
        """Reverse an admission or a grant that was committed after its request had been given up."""
        self._settlements.give_back(reply)

    def _begin(self, request: GatedRequest) -> InFlight:
        loop = asyncio.get_running_loop()
        flight = InFlight(request, loop.create_future())
        flight.deadline = self._deadlines.begin(
            deadlines.executing_seconds(request), partial(self._give_up, flight, LATE)
        )
        flight.task = loop.create_task(self._execute(flight), name="scopegate-execution")
        flight.task.add_done_callback(partial(self._done, flight))
        self._in_flight.add(flight)
        request.place.carried = True
        return flight

    def _done(self, flight: InFlight, task: asyncio.Task[None]) -> None:
        failure = None if task.cancelled() else task.exception()
        if failure is not None:
            LogEvent.GATED_REQUEST_FAILED.log(exc=failure)
        self._end(flight, SHUT_DOWN if self.draining else FAILED)

    def _give_up(self, flight: InFlight, cause: str) -> None:
        """End a request whose deadline has passed, or that a drain does not wait for any longer."""
        if not flight.task.done():
            facts = flight.request.facts
            LogEvent.GATED_REQUEST_HANGS.log(request_id=facts.request_id, decision_id=flight.decision_id)
            # asyncio itself refers to a task only weakly.
            self._lingering.add(flight.task)
            flight.task.add_done_callback(self._lingering.discard)
            flight.task.cancel()
        self._end(flight, cause)

    def _end(self, flight: InFlight, cause: str) -> None:
        """Free its place, answer its client and settle its execution, unless its task did. Never waits."""
        if flight.ended:
            return
        flight.ended = True
        flight.deadline.end()
        self._in_flight.discard(flight)
        facts = flight.request.facts
        flight.request.place.leave()
        if flight.decision_id is not None and not flight.settled:
            outcome: Literal["not_sent", "unknown"] = "unknown" if flight.sent else "not_sent"
            if flight.admitted is not None:
                self._observer.ended(outcome, facts.route)
            self._settlements.later(flight.decision_id, outcome, cause)
        if flight.rest is not None:
            flight.rest.break_off()  # its reader must not wait for ever
        if flight.answer.done():
            return
        if flight.admitted is None:
            _set(flight.answer, self.refusals.undecided(cause, facts))
        else:
            code = "upstream_timeout" if flight.sent else "upstream_unreachable"
            known = "whether the backend acted is unknown" if flight.sent else "nothing was sent"
            refusal = Refusal(code, f"The execution was given up, since {cause}; {known}.", {"cause": cause})
            _set(flight.answer, Undelivered(last=flight.admitted, refusal=refusal))

    async def reconcile(self, command: Reconcile) -> Settled | Denied:
        """Resolve an `unknown` or a `running` execution. Raises StoreUnavailable."""
        reply = await self._store.submit(command)
        assert isinstance(reply, Settled | Denied)
        self._observer.overrun(reply)
        return reply

    async def report(self, command: Report) -> Settled | Repeated | Denied:
        """End an execution as its backend reports. Raises StoreUnavailable."""
        reply = await self._store.submit(command)
        assert isinstance(reply, Settled | Repeated | Denied)
        if isinstance(reply, Settled):
            self._observer.reported(reply)
        return reply

    async def _execute(self, flight: InFlight) -> None:
        """Admit and forward one request. This is the body of its task."""
        facts, answer = flight.request.facts, flight.answer
        try:
            admitted = await self._admit(flight)
            if isinstance(admitted, Admitted):
                await self._forward(flight, admitted)
            else:
                _set(answer, admitted)
        except asyncio.CancelledError:
            # The drain ended before an admission was confirmed. An admission that commits later is reversed.
            if not answer.done():
                draining = Refusal("draining", "The sidecar shut down before the request was judged.")
                _set(answer, self.refusals.unrecorded(draining, facts, "the drain is over"))
        except Exception as exc:
            # The client must have an answer after every fault.
            LogEvent.GATED_REQUEST_FAILED.log(exc=exc, request_id=facts.request_id)
            if not answer.done():
                answer.set_exception(exc)

    async def _admit(self, flight: InFlight) -> Admitted | Denied | Replayed | Refused:
        request, facts = flight.request, flight.request.facts
        policies, route = request.snapshot.policies, request.route
        assert policies is not None
        reported = route.completion == "report"
        if reported:
            flight.token = new_token()
        command = Admit(
            decision_id=new_decision_id(),
            claims=facts.claims,
            policies=policies,
            preview=previewed(facts.claims, facts.tenant_id, facts.principal, policies, self._store.now()),
            scope_required_from=request.snapshot.settings.gate.scope_required_from,
            shadow=request.shadow,
            claim=request.claim,
            tenant_id=facts.tenant_id,
            request_id=facts.request_id,
            principal=facts.principal,
            route=facts.route,
            body_sha256=request.body_sha256,
            report_token=None if flight.token is None else digest_of(flight.token),
            report_seconds=route.completion_timeout_seconds if reported else None,
        )
        flight.decision_id = command.decision_id
        begun = time.perf_counter()
        reply: Reply | None = None
        try:
            reply = await self.refusals.submit(command, late=self._settlements.give_back)
        except StoreUnavailable as exc:
            flight.decision_id = None  # not committed, or reversed through `late`
            return await self.refusals.unconfirmed(exc, facts)
        finally:
            self._observer.committed(request, begun, reply)
        if isinstance(reply, Denied | Replayed):
            flight.decision_id = None
            return reply
        assert isinstance(reply, Admitted)
        flight.admitted = reply
        return reply

    async def _forward(self, flight: InFlight, admitted: Admitted) -> None:
        """Send, read and settle. Every path ends in exactly one settlement (G8)."""
        request, settings = flight.request, flight.request.snapshot.settings
        seconds = admitted.timeout_seconds or settings.upstream.response_timeout_seconds
        begun = time.perf_counter()
        try:
            exchange = await self._send(flight, admitted, seconds)
            with exchange:
                limit = settings.gate.max_answer_bytes
                due = asyncio.get_running_loop().time() + max(0.0, seconds - (time.perf_counter() - begun))
                if exchange.complete:  # the usual case: nothing is waited for, so nothing is limited
                    body, complete = await exchange.read_up_to(limit)
                else:
                    async with asyncio.timeout_at(due):
                        body, complete = await exchange.read_up_to(limit)
                if not complete:
                    await self._stream(flight, admitted, exchange, body, begun, due)
                    return
        except (Exception, asyncio.CancelledError) as exc:
            lost, refusal = _unanswered(exc, seconds, admitted)
            self._observer.answered(request, begun, failure=refusal.code)
            settled = await self._settle(flight, admitted, lost, cause=str(refusal.members["cause"]))
            _set(flight.answer, Undelivered(last=settled or admitted, refusal=refusal))
            return
        status = exchange.head.status
        self._observer.answered(request, begun, status=status)
        outcome = _outcome_by(request.route, status) if request.route.reads_status else "answered"
        cost = reported_cost(request.route.cost, exchange.head, body) if outcome == "answered" else None
        answer = None if request.claim is None else kept_answer(request.claim, exchange.head, body)
        if flight.carried is not None and flight.carried.is_echoed(exchange.head, body):
            self._observer.echoed(request.facts.request_id)
            answer = answer and status_only(answer)
        settled = await self._settle(flight, admitted, outcome, cost=cost, http_status=status, answer=answer)
        _set(flight.answer, Forwarded(last=settled or admitted, head=exchange.head, body=body))

    async def _send(self, flight: InFlight, admitted: Admitted, seconds: float) -> Exchange:
        if flight.ended:
            raise NotSent("its deadline passed before it was sent")
        flight.sent, request = True, flight.request
        ours = admission_headers(admitted)
        if flight.token is not None:
            base, decision_id = request.snapshot.settings.completion_base, admitted.execution.decision_id
            ours = [*ours, *completion_headers(base, decision_id, flight.token)]
        carried = flight.carried = self._custody.gated
        theirs = request.headers if carried is None else carried.put(request.headers)
        headers = request.trace.sent_on((*theirs, *ours))
        try:
            return await self._upstream.send(
                request.method, request.target, headers, request.body, head_deadline=seconds
            )
        except ValueError as exc:
            # The upstream client refuses to write such a request.
            raise NotSent(f"the request cannot be forwarded as it came: {exc}") from exc

    async def _stream(
        self,
        flight: InFlight,
        admitted: Admitted,
        exchange: Exchange,
        body: bytes,
        begun: float,
        deadline: float,
    ) -> None:
        """Answer with a long answer. Its head goes to the client now, and it is settled when it ends.

        `deadline` is in the loop's time and counts the backend's time only.
        """
        patience = deadlines.client_seconds(flight.request)
        rest = flight.rest = Remainder(patience)
        loop = asyncio.get_running_loop()
        flight.deadline.end()
        settings = flight.request.snapshot.settings
        # In whole seconds, because deadlines of the same length share a timer.
        left = math.ceil(deadlines.streaming_seconds(settings, deadline - loop.time(), patience))
        flight.deadline = self._deadlines.begin(left, partial(self._give_up, flight, LATE))
        _set(flight.answer, Forwarded(last=admitted, head=exchange.head, body=body, rest=rest))
        echo = None
        if flight.carried is not None:
            echo = flight.carried.listening(exchange.head)
            echo.hear(body)
        await self._pass_on(flight, admitted, exchange, rest, begun, deadline, echo)

    async def _pass_on(
        self,
        flight: InFlight,
        admitted: Admitted,
        exchange: Exchange,
        rest: Remainder,
        begun: float,
        deadline: float,
        echo: Echo | None,
    ) -> None:
        request, status = flight.request, exchange.head.status
        loop = asyncio.get_running_loop()
        try:
            while True:
                async with asyncio.timeout_at(deadline):
                    piece = await exchange.read()
                if not piece:
                    break
                if echo is not None:
                    echo.hear(piece)
                handed = loop.time()
                await rest.feed(piece)
                deadline += loop.time() - handed  # a slow client does not use up the backend's time
        except (Unanswered, TimeoutError, asyncio.CancelledError) as exc:
            cause = str(exc) or "the answer did not end in time"
            self._observer.answered(request, begun, status=status, failure="unknown")
            if echo is not None and echo.heard:  # what the client has got of the answer repeats it
                self._observer.echoed(request.facts.request_id)
            await self._settle(flight, admitted, "unknown", http_status=status, cause=cause)
            rest.break_off()
            return
        self._observer.answered(request, begun, status=status)
        outcome = _outcome_by(request.route, status)
        cost = reported_cost(request.route.cost, exchange.head, None) if outcome == "answered" else None
        answer = None if request.claim is None else kept_answer(request.claim, exchange.head, None)
        if echo is not None and echo.heard:
            self._observer.echoed(request.facts.request_id)
            answer = answer and status_only(answer)
        await self._settle(flight, admitted, outcome, cost=cost, http_status=status, answer=answer)
        try:
            await rest.feed(None)
        except asyncio.CancelledError:
            rest.break_off()

    async def _settle(
        self,
        flight: InFlight,
        admitted: Admitted,
        outcome: SettledOutcome,
        *,
        cost: int | None = None,
        http_status: int | None = None,
        cause: str | None = None,
        answer: KeptAnswer | None = None,
    ) -> Settled | None:
        """Settle. The result is None if the settlement must wait, or was made when the request ended."""
        if flight.ended:
            return None
        settled = await self._settlements.settle(
            admitted,
            outcome,
            cost=cost,
            http_status=http_status,
            cause=cause,
            answer=answer,
            request=flight.request,
        )
        flight.settled = True
        return settled

    # Shutdown ----------------------------------------------------------------------------------

    async def drain(self, seconds: float) -> int:
        """Stop admitting, and wait for the executions in flight.

        An execution that does not end within `seconds` is settled as `unknown`, or as `not_sent` if nothing
        was sent. Returns the number of these executions.
        """
        self.draining = True
        if self._in_flight:
            await asyncio.wait([flight.task for flight in self._in_flight], timeout=seconds)
        unfinished = list(self._in_flight)
        for flight in unfinished:
            flight.task.cancel()
        if unfinished:
            await asyncio.wait([flight.task for flight in unfinished], timeout=LAST_WRITES_SECONDS)
            for flight in unfinished:
                self._give_up(flight, SHUT_DOWN)
            await self._store.until_idle()  # late commits are reported here, and then reversed
        await self._settlements.close()
        return len(unfinished)

    @property
    def in_flight(self) -> int:
        return len(self._in_flight)

    def now(self) -> int:
        """The store's time, in microseconds since 1970 (UTC)."""
        return self._store.now()


def _outcome_by(route: Route, status: int) -> Literal["answered", "running", "not_executed"]:
    """What a whole answer with this status makes of an execution of a route."""
    if status in route.not_executed_on:
        return "not_executed"
    return "running" if route.completion == "report" and 200 <= status < 300 else "answered"


def _unanswered(
    exc: BaseException, seconds: float, admitted: Admitted
) -> tuple[Literal["not_sent", "unknown"], Refusal]:
    """The outcome of an execution that has no whole answer, and the refusal that its client gets."""
    # 1. Nothing was sent.
    if isinstance(exc, NotSent):
        return "not_sent", Refusal("upstream_unreachable", f"Nothing was sent: {exc}.", {"cause": str(exc)})
    code = "upstream_timeout"
    # 2. The backend was too slow.
    if isinstance(exc, TimedOut | TimeoutError):
        cause = f"no whole answer within {seconds:g} s"
        what = f"The backend gave {cause}"
    # 3. The end of a drain cancels an execution. So does the outer deadline, which has settled it before.
    elif isinstance(exc, asyncio.CancelledError):
        cause = f"{SHUT_DOWN} before the answer came"
        what = cause.capitalize()
    # 4. The answer was lost.
    elif isinstance(exc, Unanswered):
        code, cause, what = "upstream_failed", str(exc), f"The answer was lost ({exc})"
    # 5. The sidecar failed.
    else:
        LogEvent.FORWARDING_FAILED.log(exc=exc, decision_id=admitted.execution.decision_id)
        code, cause = "upstream_failed", f"internal error: {exc!r}"
        what = "The sidecar failed while forwarding"
    return "unknown", Refusal(code, f"{what}; whether the backend acted is unknown.", {"cause": cause})


def _set(answer: asyncio.Future[Outcome | Denied | Replayed], value: Outcome | Denied | Replayed) -> None:
    if not answer.done():
        answer.set_result(value)
