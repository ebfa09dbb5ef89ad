"""One gated request, top to bottom: admit and commit, forward, settle. Nothing is forwarded unrecorded.

The execution runs in a task of its own, so that a client that hangs up loses nothing (G9). A refusal is a
value (`Refused`), as is an answer (`Forwarded`); nothing that can happen in between escapes as an exception.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace
from typing import Any, Literal

from sidecar.core.bounds import Case, judge
from sidecar.core.command import (
    Admit,
    Admitted,
    Denied,
    Issue,
    Issued,
    Reconcile,
    Reply,
    Revoke,
    Revoked,
    Settled,
)
from sidecar.core.facts import Claims
from sidecar.core.policy import PolicySet
from sidecar.core.scope import Scope
from sidecar.cost import reported_cost
from sidecar.errors import Refusal, StoreUnavailable, unavailable
from sidecar.ids import new_decision_id
from sidecar.outcomes import (
    Explanation,
    Forwarded,
    Judged,
    Outcome,
    Remainder,
    Undelivered,
    admission_headers,
)
from sidecar.refusals import Asked, RefusalLog, Refused
from sidecar.settlements import Settlements
from sidecar.store.batch import LateReply, Store
from sidecar.telemetry import Metrics
from sidecar.upstream import Exchange, NotSent, TimedOut, Unanswered, Upstream

logger = logging.getLogger("scopegate.gate")

RETRY_AFTER_SECONDS = 1
# What executions that a drain gives up on are given to be written down.
LAST_WRITES_SECONDS = 5.0
MAX_CLOCK_LAG_SECONDS = 60.0


class Gate:
    """Admits, forwards and settles. A request keeps the policy set it began with; `policies` may change."""

    def __init__(
        self,
        *,
        store: Store,
        upstream: Upstream,
        refusals: RefusalLog,
        metrics: Metrics,
        policies: PolicySet | None,
        response_timeout_seconds: float,
        max_answer_bytes: int,
        max_in_flight: int,
    ) -> None:
        self.policies = policies
        self.refusals = refusals
        self.draining = False
        self._store = store
        self._upstream = upstream
        self._metrics = metrics
        self._response_timeout = response_timeout_seconds
        self._max_answer = max_answer_bytes
        self._max_in_flight = max_in_flight
        self._in_flight: set[asyncio.Task[Any]] = set()
        self._settlements = Settlements(store, metrics)

    # The way of one request --------------------------------------------------------------------

    def unready(self) -> tuple[Refusal, int] | None:
        """Why nothing can be admitted now, with the seconds after which to try again; None: go ahead."""
        if self.draining:
            return Refusal("draining", "The sidecar is shutting down; send the request to another one."), 5
        if self.policies is None:
            return Refusal("policy_unavailable", "No valid policy set is loaded; nothing is allowed."), 30
        lag = self._store.clock_lag_seconds()
        if lag > MAX_CLOCK_LAG_SECONDS:
            cause = f"The wall clock is {lag:.0f} s behind the last record; correct the system time."
            return Refusal("store_unavailable", cause, {"cause": "clock"}), 30
        return None

    async def execute(self, judged: Judged) -> Outcome:
        """Decide on a request and carry it through if it is admitted, even if the caller is cancelled."""
        unready = self.unready()
        if unready is None and len(self._in_flight) >= self._max_in_flight:
            unready = Refusal("overloaded", f"{self._max_in_flight} gated requests are in flight."), 1
        if unready is not None:
            refusal, retry_after = unready
            return await self.refuse(refusal, self._asked(judged), retry_after=retry_after)
        started: asyncio.Future[Outcome | Denied] = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(self._execute(judged, started), name="scopegate-execution")
        self._in_flight.add(task)
        task.add_done_callback(self._finished)
        self._metrics.in_flight.set(len(self._in_flight))
        outcome = await asyncio.shield(started)
        if isinstance(outcome, Denied):
            # Here, not in the task: a flood that waits for its summary takes nobody's place in flight.
            return await self.refusals.denied(outcome, self._asked(judged))
        return outcome

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._in_flight.discard(task)
        self._metrics.in_flight.set(len(self._in_flight))

    async def explain(self, claims: Claims, tenant_id: str) -> Explanation:
        """What `execute` would answer now. Asks the same bounds, consumes and records nothing (G10)."""
        unready = self.unready()
        if unready is not None or self.policies is None:
            return Explanation(refusal=unready[0] if unready else None, scope=None, hold=0)
        scope = await self._store.engine.scope(claims.scope_id) if claims.scope_id else None
        case = Case.of(claims, tenant_id, scope, self.policies, self._store.now())
        mine = scope is not None and scope.tenant_id == tenant_id
        return Explanation(refusal=judge(case), scope=scope if mine else None, hold=case.hold)

    async def issue(self, scope: Scope, ttl_seconds: int, asked: Asked) -> Issued | Refused:
        """Grant a scope, if the policies allow it."""
        assert self.policies is not None
        command = Issue(
            decision_id=new_decision_id(),
            scope=scope,
            ttl=ttl_seconds,
            policies=self.policies,
            request_id=asked.request_id,
            principal=asked.principal,
            record_denial=self.refusals.reserve(),
        )
        reply = await self._grant(command, asked)
        assert isinstance(reply, Issued | Refused)
        return reply

    async def revoke(self, scope_id: str, asked: Asked) -> Revoked | Refused:
        """Withdraw a scope."""
        command = Revoke(
            decision_id=new_decision_id(),
            scope_id=scope_id,
            tenant_id=asked.tenant_id,
            request_id=asked.request_id,
            principal=asked.principal,
            record_denial=self.refusals.reserve(),
        )
        reply = await self._grant(command, asked)
        assert isinstance(reply, Revoked | Refused)
        return reply

    async def _grant(self, command: Issue | Revoke, asked: Asked) -> Reply | Refused:
        asked = replace(asked, policies=self.policies)
        try:
            reply = await self._submit(command)
        except StoreUnavailable as exc:
            return self._unconfirmed(exc, asked)
        if isinstance(reply, Denied):
            return await self.refusals.denied(reply, asked)
        self._metrics.decisions.labels("selected", "none", "none").inc()
        return reply

    async def reconcile(self, command: Reconcile) -> Settled | Denied:
        """Say what became of an `unknown` execution. Raises StoreUnavailable."""
        reply = await self._store.submit(command)
        if isinstance(reply, Settled):
            self._settlements.count_overrun(reply)
            return reply
        assert isinstance(reply, Denied)
        return reply

    async def refuse(self, refusal: Refusal, asked: Asked, *, retry_after: int | None = None) -> Refused:
        """Refuse without asking the store."""
        asked = replace(asked, policies=self.policies)
        return await self.refusals.refuse(refusal, asked, retry_after=retry_after)

    def _asked(self, judged: Judged) -> Asked:
        return Asked(
            claims=judged.claims,
            tenant_id=judged.tenant_id,
            request_id=judged.request_id,
            principal=judged.principal,
            policies=self.policies,
        )

    async def _execute(self, judged: Judged, answer: asyncio.Future[Outcome | Denied]) -> None:
        """The whole life of one request. `answer` is set once there is one; a long one goes on behind it."""
        try:
            admitted = await self._admit(judged)
            if not isinstance(admitted, Admitted):
                _set(answer, admitted)
            else:
                await self._forward(judged, admitted, answer)
        except asyncio.CancelledError:
            # The drain is over and nothing was admitted; an admission under way is given back.
            draining = Refusal("draining", "The sidecar shut down before the request was judged.")
            self.refusals.unrecorded(draining, self._asked(judged), "the drain is over")
            _set(answer, Refused(refusal=draining, retry_after=RETRY_AFTER_SECONDS))
        except Exception as exc:
            # Whoever waits must not hang, whatever went wrong.
            logger.exception("a gated request failed", extra={"request_id": judged.request_id})
            if not answer.done():
                answer.set_exception(exc)

    async def _admit(self, judged: Judged) -> Admitted | Denied | Refused:
        policies = self.policies
        assert policies is not None
        command = Admit(
            decision_id=new_decision_id(),
            claims=judged.claims,
            policies=policies,
            tenant_id=judged.tenant_id,
            request_id=judged.request_id,
            principal=judged.principal,
            body_sha256=judged.body_sha256,
            record_denial=self.refusals.reserve(),
        )
        begun = time.perf_counter()
        try:
            reply = await self._submit(command, late=self._settlements.give_back)
        except StoreUnavailable as exc:
            return self._unconfirmed(exc, self._asked(judged))
        self._metrics.commit.observe(time.perf_counter() - begun)
        if isinstance(reply, Denied):
            return reply
        assert isinstance(reply, Admitted)
        self._metrics.decisions.labels("selected", "none", policies.label(judged.claims.action or "")).inc()
        return reply

    def _unconfirmed(self, exc: StoreUnavailable, asked: Asked) -> Refused:
        refusal = unavailable(exc)
        self.refusals.unrecorded(refusal, asked, str(exc))
        return Refused(refusal=refusal, retry_after=RETRY_AFTER_SECONDS)

    async def _submit(self, command: Admit | Issue | Revoke, *, late: LateReply | None = None) -> Reply:
        """Submit what may be denied; its place among the refusals is free again where it is not."""
        reply: Reply | None = None
        try:
            reply = await self._store.submit(command, late=late)
            return reply
        finally:
            if not isinstance(reply, Denied):
                self.refusals.release(command.record_denial)

    async def _forward(
        self, judged: Judged, admitted: Admitted, answer: asyncio.Future[Outcome | Denied]
    ) -> None:
        """Send, read and settle. Ends in exactly one settlement, whatever happens (G8)."""
        seconds = admitted.timeout_seconds or self._response_timeout
        begun = time.perf_counter()
        ending: tuple[Literal["not_sent", "unknown"], Refusal]
        try:
            exchange = await self._send(judged, admitted, seconds)
            with exchange:
                left = max(0.0, seconds - (time.perf_counter() - begun))
                async with asyncio.timeout(left) as deadline:
                    body, complete = await exchange.read_up_to(self._max_answer)
                if not complete:
                    await self._stream(judged, admitted, exchange, body, answer, deadline.when() or 0.0)
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
            # Only the end of a drain cancels an execution.
            cause = "the sidecar shut down before the answer came"
            message = f"{cause.capitalize()}; whether the backend acted is unknown."
            ending = "unknown", Refusal("upstream_timeout", message, {"cause": cause})
        except Exception as exc:
            logger.exception("forwarding failed", extra={"decision_id": admitted.execution.decision_id})
            message = "The sidecar failed while forwarding; whether the backend acted is unknown."
            ending = "unknown", Refusal("upstream_failed", message, {"cause": f"internal error: {exc!r}"})
        else:
            self._metrics.upstream.observe(time.perf_counter() - begun)
            cost = reported_cost(judged.cost_source, exchange.head, body)
            settled = await self._settlements.settle(
                admitted, judged.log_fields, "answered", cost, exchange.head.status
            )
            _set(
                answer,
                Forwarded(
                    admitted=admitted, **self._shown(settled or admitted), head=exchange.head, body=body
                ),
            )
            return
        self._metrics.upstream.observe(time.perf_counter() - begun)
        outcome, refusal = ending
        settled = await self._settlements.settle(
            admitted, judged.log_fields, outcome, cause=str(refusal.members["cause"])
        )
        _set(answer, Undelivered(admitted=admitted, **self._shown(settled or admitted), refusal=refusal))

    async def _send(self, judged: Judged, admitted: Admitted, seconds: float) -> Exchange:
        headers = (*judged.headers, *admission_headers(admitted))
        try:
            return await self._upstream.send(
                judged.method, judged.target, headers, judged.body, head_deadline=seconds
            )
        except ValueError as exc:
            # The client refuses to write such a request at all.
            raise NotSent(f"the request cannot be forwarded as it came: {exc}") from exc

    async def _stream(
        self,
        judged: Judged,
        admitted: Admitted,
        exchange: Exchange,
        body: bytes,
        answer: asyncio.Future[Outcome | Denied],
        deadline: float,
    ) -> None:
        """A long answer: its head goes to the client now, its settlement waits for its end.

        `deadline` is in the loop's time and counts the backend's time only.
        """
        rest = Remainder(patience=self._response_timeout)
        _set(
            answer,
            Forwarded(admitted=admitted, **self._shown(admitted), head=exchange.head, body=body, rest=rest),
        )
        try:
            await self._pass_on(judged, admitted, exchange, rest, deadline)
        except BaseException:
            rest.break_off()  # whoever reads it must not wait for ever
            raise

    async def _pass_on(
        self, judged: Judged, admitted: Admitted, exchange: Exchange, rest: Remainder, deadline: float
    ) -> None:
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
                deadline += loop.time() - handed  # the backend is not to blame for a slow client
        except (Unanswered, TimeoutError, asyncio.CancelledError) as exc:
            cause = str(exc) or "the answer did not end in time"
            await self._settlements.settle(admitted, judged.log_fields, "unknown", None, status, cause)
            rest.break_off()
            return
        cost = reported_cost(judged.cost_source, exchange.head, None)
        await self._settlements.settle(admitted, judged.log_fields, "answered", cost, status)
        try:
            await rest.feed(None)
        except asyncio.CancelledError:
            rest.break_off()

    def _shown(self, last: Settled | Admitted) -> dict[str, Any]:
        """The scope as it stands after the last thing that is known to be written."""
        return {"scope": last.scope, "scope_status": last.scope.status(self._store.now())}

    # The end -----------------------------------------------------------------------------------

    async def drain(self, seconds: float) -> int:
        """Admit nothing more, let what is in flight end; the rest, which is counted, ends as `unknown`."""
        self.draining = True
        if self._in_flight:
            await asyncio.wait(self._in_flight, timeout=seconds)
        unfinished = list(self._in_flight)
        for task in unfinished:
            task.cancel()
        if unfinished:
            await asyncio.wait(unfinished, timeout=LAST_WRITES_SECONDS)
            await self._store.until_idle()  # an admission under way is told, and then given back
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
