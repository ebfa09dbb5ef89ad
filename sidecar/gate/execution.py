"""The path of one gated request: admit and commit, forward, settle. Nothing is forwarded unrecorded.

The execution runs in a task of its own, so that it survives a client that hangs up (G9). A refusal
(`Refused`) and an answer (`Forwarded`) are values. Failures of the store and the backend become values, too.

Each execution has one `Life`, and each life ends in `Gate._end`: when its task is done, or when its outer
deadline has passed and the task still waits for something. `Gate._end` does what the task has not done: it
frees the place in flight, answers the client and settles the execution. A life that has ended sends nothing,
so that an execution settled as `not_sent` was never sent.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, field
from typing import Any, Literal

from sidecar.core.command import Admit, Admitted, Denied, Reconcile, Reply, Settled
from sidecar.core.rules import preview, subject_of
from sidecar.errors import Refusal, StoreUnavailable, clock_refusal
from sidecar.gate import deadlines
from sidecar.gate.cost import reported_cost
from sidecar.gate.messages import Forwarded, Judged, Outcome, Remainder, Undelivered, admission_headers
from sidecar.gate.places import Place, Places
from sidecar.gate.refusal_log import RETRY_AFTER_SECONDS, Asked, RefusalLog, Refused
from sidecar.gate.settlement import Settlements
from sidecar.ids import new_decision_id
from sidecar.live.terms import Terms
from sidecar.store.batch import Store
from sidecar.telemetry.metrics import Metrics
from sidecar.upstream import Exchange, NotSent, TimedOut, Unanswered, Upstream

logger = logging.getLogger("scopegate.gate")

# What executions that a drain gives up on are given to be written down.
LAST_WRITES_SECONDS = 5.0
LATE = "it did not end in time"
FAILED = "the sidecar failed"
SHUT_DOWN = "the sidecar shut down"


@dataclass(slots=True, eq=False)
class Life:
    """The state of one request on its way through the gate."""

    judged: Judged
    answer: asyncio.Future[Outcome | Denied]  # a long answer goes on streaming after this is set
    task: asyncio.Task[None] = field(init=False)
    timer: asyncio.TimerHandle = field(init=False)  # the outer deadline
    decision_id: str | None = None  # the id of the submitted admission
    admitted: Admitted | None = None
    sent: bool = False  # a byte of the request may have been sent
    settled: bool = False
    rest: Remainder | None = None  # the rest of a long answer
    ended: bool = False


class Gate:
    """Admits, forwards and settles gated requests. A request keeps the terms that it began with."""

    def __init__(
        self,
        *,
        store: Store,
        upstream: Upstream,
        refusals: RefusalLog,
        metrics: Metrics,
    ) -> None:
        self.refusals = refusals
        self.draining = False
        self._store = store
        self._upstream = upstream
        self._metrics = metrics
        self._places = Places(metrics.in_flight.set)
        self._in_flight: set[Life] = set()
        self._lingering: set[Life] = set()  # lives that ended while their tasks still run
        self._settlements = Settlements(store, metrics)

    # The way of one request --------------------------------------------------------------------

    def unready(self, terms: Terms) -> tuple[Refusal, int] | None:
        """The reason why nothing can be admitted now, with the seconds to wait before a retry, or None."""
        if self.draining:
            return Refusal("draining", "The sidecar is shutting down; send the request to another one."), 5
        if terms.policies is None:
            return Refusal("policy_unavailable", "No valid policy set is loaded; nothing is allowed."), 30
        trouble = self._store.clock_trouble()
        if trouble is not None:
            return clock_refusal(trouble), 30
        return None

    def enter(self, terms: Terms) -> Place | tuple[Refusal, int]:
        """Take a place in flight before the request's body is read, or return a refusal."""
        unready = self.unready(terms)
        if unready is not None:
            return unready
        most = terms.settings.gate.max_in_flight
        refusal = Refusal("overloaded", f"{most} gated requests are in flight.", {"cause": "in_flight"})
        return self._places.take(most) or (refusal, RETRY_AFTER_SECONDS)

    async def execute(self, judged: Judged) -> Outcome:
        """Decide on a request and, if it is admitted, execute it even if the caller is cancelled.

        Its place is left once it has ended, in every case.
        """
        unready = self.unready(judged.terms)
        if unready is not None:
            judged.place.leave()
            refusal, retry_after = unready
            return await self.refusals.refuse(refusal, self._asked(judged), retry_after=retry_after)
        life = self._begin(judged)
        try:
            outcome = await asyncio.shield(life.answer)
        except asyncio.CancelledError:
            # After a pause of the whole process, all deadlines pass in one iteration of the event loop. If
            # the execution's deadline passed first, its answer says how the execution ended.
            if not life.answer.done():
                raise
            outcome = life.answer.result()
        if isinstance(outcome, Denied):
            # The denial is handled here, not in the task. A refusal that waits for its summary must not
            # occupy a place in flight.
            return await self.refusals.denied(outcome, self._asked(judged))
        return outcome

    def give_back(self, reply: Reply) -> None:
        """Reverse an admission or a grant that was committed after its request had been given up."""
        self._settlements.give_back(reply)

    def _begin(self, judged: Judged) -> Life:
        loop = asyncio.get_running_loop()
        life = Life(judged, loop.create_future())
        life.timer = loop.call_later(deadlines.executing_seconds(judged), self._end, life, LATE)
        life.task = loop.create_task(self._execute(life), name="scopegate-execution")
        self._in_flight.add(life)
        judged.place.carried = True
        life.task.add_done_callback(lambda task: self._done(life, task))
        return life

    def _done(self, life: Life, task: asyncio.Task[None]) -> None:
        failure = None if task.cancelled() else task.exception()
        if failure is not None:
            logger.error("a gated request failed", exc_info=failure)
        self._end(life, SHUT_DOWN if self.draining else FAILED)

    def _end(self, life: Life, cause: str) -> None:
        """Free its place, answer its client and settle its execution, unless its task did. Never waits."""
        if life.ended:
            self._lingering.discard(life)
            return
        life.ended = True
        life.timer.cancel()
        self._in_flight.discard(life)
        life.judged.place.leave()
        if not life.task.done():
            logger.error(
                "a gated request did not end in time",
                extra={"request_id": life.judged.request_id, "decision_id": life.decision_id},
            )
            self._lingering.add(life)
            life.task.cancel()
        if life.decision_id is not None and not life.settled:
            outcome: Literal["not_sent", "unknown"] = "unknown" if life.sent else "not_sent"
            if life.admitted is not None:
                self._metrics.executions.labels(outcome).inc()
            self._settlements.later(life.decision_id, outcome, cause)
        if life.rest is not None:
            life.rest.break_off()  # its reader must not wait for ever
        if life.answer.done():
            return
        if life.admitted is None:
            _set(life.answer, self.refusals.undecided(cause, self._asked(life.judged)))
        else:
            code = "upstream_timeout" if life.sent else "upstream_unreachable"
            known = "whether the backend acted is unknown" if life.sent else "nothing was sent"
            refusal = Refusal(code, f"The execution was given up, since {cause}; {known}.", {"cause": cause})
            shown = self._shown(life.admitted)
            _set(life.answer, Undelivered(admitted=life.admitted, **shown, refusal=refusal))

    async def reconcile(self, command: Reconcile) -> Settled | Denied:
        """Resolve an `unknown` execution. Raises StoreUnavailable."""
        reply = await self._store.submit(command)
        if isinstance(reply, Settled):
            self._settlements.count_overrun(reply)
            return reply
        assert isinstance(reply, Denied)
        return reply

    def _asked(self, judged: Judged) -> Asked:
        return Asked(
            claims=judged.claims,
            tenant_id=judged.tenant_id,
            request_id=judged.request_id,
            principal=judged.principal,
            policies=judged.terms.policies,
        )

    async def _execute(self, life: Life) -> None:
        """Admit and forward one request. This is the body of its task."""
        judged, answer = life.judged, life.answer
        try:
            admitted = await self._admit(life)
            if isinstance(admitted, Admitted):
                await self._forward(life, admitted)
            else:
                _set(answer, admitted)
        except asyncio.CancelledError:
            # The drain ended before an admission was confirmed. An admission that commits later is reversed.
            if not answer.done():
                draining = Refusal("draining", "The sidecar shut down before the request was judged.")
                self.refusals.unrecorded(draining, self._asked(judged), "the drain is over")
                _set(answer, Refused(refusal=draining, retry_after=RETRY_AFTER_SECONDS))
        except Exception as exc:
            # The client must have an answer after every fault.
            logger.exception("a gated request failed", extra={"request_id": judged.request_id})
            if not answer.done():
                answer.set_exception(exc)

    async def _admit(self, life: Life) -> Admitted | Denied | Refused:
        judged = life.judged
        policies, asked = judged.terms.policies, self._asked(judged)
        assert policies is not None
        subject = subject_of(judged.claims, judged.tenant_id, judged.principal, policies, self._store.now())
        command = Admit(
            decision_id=new_decision_id(),
            claims=judged.claims,
            policies=policies,
            preview=preview(policies, "execute", subject),
            scope_required_from=judged.terms.settings.gate.scope_required_from,
            shadow=judged.shadow,
            tenant_id=judged.tenant_id,
            request_id=judged.request_id,
            principal=judged.principal,
            body_sha256=judged.body_sha256,
            record_denial=self.refusals.reserve(),
        )
        life.decision_id = command.decision_id
        begun = time.perf_counter()
        try:
            reply = await self.refusals.submit(command, late=self._settlements.give_back)
        except StoreUnavailable as exc:
            life.decision_id = None  # not committed, or reversed through `late`
            return self.refusals.unconfirmed(exc, asked)
        finally:
            judged.trace.over("commit", begun)
        self._metrics.commit.observe(time.perf_counter() - begun)
        if isinstance(reply, Denied):
            life.decision_id = None
            return reply
        assert isinstance(reply, Admitted)
        life.admitted = reply
        self._metrics.decisions.labels("selected", "none", asked.action_label).inc()
        self.refusals.let_through(reply.shadow, asked)
        return reply

    async def _forward(self, life: Life, admitted: Admitted) -> None:
        """Send, read and settle. Every path ends in exactly one settlement (G8)."""
        judged, answer = life.judged, life.answer
        settings = judged.terms.settings
        seconds = admitted.timeout_seconds or settings.upstream.response_timeout_seconds
        begun = time.perf_counter()
        ending: tuple[Literal["not_sent", "unknown"], Refusal]
        try:
            exchange = await self._send(life, admitted, seconds)
            with exchange:
                left = max(0.0, seconds - (time.perf_counter() - begun))
                async with asyncio.timeout(left) as deadline:
                    body, complete = await exchange.read_up_to(settings.gate.max_answer_bytes)
                if not complete:
                    await self._stream(life, admitted, exchange, body, deadline.when() or 0.0)
                    return
        except NotSent as exc:
            refusal = Refusal("upstream_unreachable", f"Nothing was sent: {exc}.", {"cause": str(exc)})
            ending = "not_sent", refusal
        except (TimedOut, TimeoutError):
            cause = f"no whole answer within {seconds:g} s"
            message = f"The backend gave {cause}; whether it acted is unknown."
            ending = "unknown", Refusal("upstream_timeout", message, {"cause": cause})
        except Unanswered as exc:
            message = f"The answer was lost ({exc}); whether the backend acted is unknown."
            ending = "unknown", Refusal("upstream_failed", message, {"cause": str(exc)})
        except asyncio.CancelledError:
            # The end of a drain cancels an execution. The outer deadline does so, too, but has settled it
            # before.
            cause = f"{SHUT_DOWN} before the answer came"
            message = f"{cause.capitalize()}; whether the backend acted is unknown."
            ending = "unknown", Refusal("upstream_timeout", message, {"cause": cause})
        except Exception as exc:
            logger.exception("forwarding failed", extra={"decision_id": admitted.execution.decision_id})
            message = "The sidecar failed while forwarding; whether the backend acted is unknown."
            ending = "unknown", Refusal("upstream_failed", message, {"cause": f"internal error: {exc!r}"})
        else:
            self._metrics.upstream.observe(time.perf_counter() - begun)
            status = exchange.head.status
            judged.trace.came_back(status)
            cost = reported_cost(judged.cost_source, exchange.head, body)
            settled = await self._settle(life, admitted, "answered", cost, status)
            _set(
                answer,
                Forwarded(
                    admitted=admitted, **self._shown(settled or admitted), head=exchange.head, body=body
                ),
            )
            return
        self._metrics.upstream.observe(time.perf_counter() - begun)
        outcome, refusal = ending
        judged.trace.came_back(failure=refusal.code)
        settled = await self._settle(life, admitted, outcome, cause=str(refusal.members["cause"]))
        _set(answer, Undelivered(admitted=admitted, **self._shown(settled or admitted), refusal=refusal))

    async def _send(self, life: Life, admitted: Admitted, seconds: float) -> Exchange:
        if life.ended:
            raise NotSent("its deadline passed before it was sent")
        life.sent, judged = True, life.judged
        headers = judged.trace.sent_on((*judged.headers, *admission_headers(admitted)))
        try:
            return await self._upstream.send(
                judged.method, judged.target, headers, judged.body, head_deadline=seconds
            )
        except ValueError as exc:
            # The upstream client refuses to write such a request.
            raise NotSent(f"the request cannot be forwarded as it came: {exc}") from exc

    async def _stream(
        self,
        life: Life,
        admitted: Admitted,
        exchange: Exchange,
        body: bytes,
        deadline: float,
    ) -> None:
        """Answer with a long answer. Its head goes to the client now, and it is settled when it ends.

        `deadline` is in the loop's time and counts the backend's time only.
        """
        settings = life.judged.terms.settings
        patience = deadlines.client_seconds(life.judged)
        rest = life.rest = Remainder(patience)
        loop = asyncio.get_running_loop()
        life.timer.cancel()
        left = deadlines.streaming_seconds(settings, deadline - loop.time(), patience)
        life.timer = loop.call_later(left, self._end, life, LATE)
        _set(
            life.answer,
            Forwarded(admitted=admitted, **self._shown(admitted), head=exchange.head, body=body, rest=rest),
        )
        await self._pass_on(life, admitted, exchange, rest, deadline)

    async def _pass_on(
        self, life: Life, admitted: Admitted, exchange: Exchange, rest: Remainder, deadline: float
    ) -> None:
        judged = life.judged
        status = exchange.head.status
        loop = asyncio.get_running_loop()
        try:
            while True:
                async with asyncio.timeout_at(deadline):
                    piece = await exchange.read()
                if not piece:
                    break
                handed = loop.time()
                await rest.feed(piece)
                deadline += loop.time() - handed  # a slow client does not use up the backend's time
        except (Unanswered, TimeoutError, asyncio.CancelledError) as exc:
            cause = str(exc) or "the answer did not end in time"
            judged.trace.came_back(status, "unknown")
            await self._settle(life, admitted, "unknown", None, status, cause)
            rest.break_off()
            return
        judged.trace.came_back(status)
        cost = reported_cost(judged.cost_source, exchange.head, None)
        await self._settle(life, admitted, "answered", cost, status)
        try:
            await rest.feed(None)
        except asyncio.CancelledError:
            rest.break_off()

    async def _settle(
        self,
        life: Life,
        admitted: Admitted,
        outcome: Literal["answered", "not_sent", "unknown"],
        cost: int | None = None,
        http_status: int | None = None,
        cause: str | None = None,
    ) -> Settled | None:
        """Settle. The result is None if the settlement must wait, or was made when the life ended."""
        if life.ended:
            return None
        judged = life.judged
        begun = time.perf_counter()
        settled = await self._settlements.settle(
            admitted, judged.log_fields, outcome, cost, http_status, cause
        )
        life.settled = True
        judged.trace.over("settle", begun, outcome)
        return settled

    def _shown(self, last: Settled | Admitted) -> dict[str, Any]:
        """The consumed scope, if any, and its status after the last confirmed write."""
        status = None if last.scope is None else last.scope.status(self._store.now())
        return {"scope": last.scope, "scope_status": status}

    # Shutdown ----------------------------------------------------------------------------------

    async def drain(self, seconds: float) -> int:
        """Stop admitting, and wait for the executions in flight.

        An execution that does not end within `seconds` is settled as `unknown`, or as `not_sent` if nothing
        was sent. Returns the number of these executions.
        """
        self.draining = True
        if self._in_flight:
            await asyncio.wait([life.task for life in self._in_flight], timeout=seconds)
        unfinished = list(self._in_flight)
        for life in unfinished:
            life.task.cancel()
        if unfinished:
            await asyncio.wait([life.task for life in unfinished], timeout=LAST_WRITES_SECONDS)
            for life in unfinished:
                self._end(life, SHUT_DOWN)
            await self._store.until_idle()  # late commits are reported here, and then reversed
        await self._settlements.close()
        return len(unfinished)

    @property
    def in_flight(self) -> int:
        return len(self._in_flight)

    def now(self) -> int:
        """The store's time, in microseconds since 1970 (UTC)."""
        return self._store.now()


def _set(answer: asyncio.Future[Outcome | Denied], value: Outcome | Denied) -> None:
    if not answer.done():
        answer.set_result(value)
