"""The observer: metrics, traces and logs of gated requests and grants hang on it.

The code on the way of a request tells it what happened: `judged`, `committed`, `answered`, `settled`, or how
the request was refused. The observer decides nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from sidecar.core.command import Admitted, NotInFlight, Replayed, Reply, Settle, Settled
from sidecar.core.entries import outcome_of
from sidecar.core.rules import Objection
from sidecar.core.scope import Execution
from sidecar.core.unlisted import Access
from sidecar.errors import Refusal
from sidecar.gate.messages import GatedRequest, RequestFacts
from sidecar.telemetry.events import LogEvent
from sidecar.telemetry.metrics import Metrics
from sidecar.telemetry.tracing import Trace


class Observer:
    """Keeps the metrics, traces and logs. `begun` is always a value of `time.perf_counter`, in seconds."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    # The way of a gated request ----------------------------------------------------------------

    def entered(self, in_flight: int) -> None:
        """A gated request took or left its place; so many are in flight."""
        self._metrics.in_flight.set(in_flight)

    def judged(self, trace: Trace, begun: float, request: GatedRequest | Refusal | None = None) -> None:
        """A request was read and understood, or refused. None: it was refused before its body was read."""
        if isinstance(request, GatedRequest):
            trace.claimed(request.facts.claims)
        trace.over("judge", begun)
        if request is not None:
            self._metrics.judge.observe(time.perf_counter() - begun)

    def committed(self, request: GatedRequest, begun: float, reply: Reply | None) -> None:
        """The decision on an execution is committed. `reply` is None if the store did not confirm it."""
        request.trace.over("commit", begun)
        if reply is not None:
            self._metrics.commit.observe(time.perf_counter() - begun)
        if isinstance(reply, Admitted):
            self.allowed(request.facts, reply.shadow)

    def answered(
        self, request: GatedRequest, begun: float, *, status: int | None = None, failure: str | None = None
    ) -> None:
        """The backend's whole answer came, or `failure` says how it failed."""
        self._metrics.upstream.observe(time.perf_counter() - begun)
        request.trace.came_back(status, failure)

    def echoed(self, request_id: str) -> None:
        """The backend has sent back a credential that only the sidecar should hold."""
        self._metrics.credential_echoes.inc()
        LogEvent.CREDENTIAL_ECHOED.log(request_id=request_id)

    def settled(
        self,
        execution: Execution,
        command: Settle,
        reply: Reply | None,
        begun: float,
        request: GatedRequest | None,
    ) -> None:
        """An execution is settled. `reply` is None if the settlement must wait for the store.

        An execution that is running has not ended, and one that a report has ended before is counted already.
        """
        self._metrics.settle.observe(time.perf_counter() - begun)
        if isinstance(reply, Settled):
            outcome = reply.execution.status
            if reply.overrun:
                self._metrics.cost_overruns.inc()
        else:
            outcome = "running" if isinstance(reply, NotInFlight) else command.outcome
        if outcome != "running":
            self.ended(outcome, execution.route)
        fields: dict[str, Any] = {
            "decision_id": execution.decision_id,
            "request_id": execution.request_id,
            "scope_id": execution.scope_id,
            "incident_id": execution.incident_id,
            "action": execution.action,
            "attempt_number": execution.attempt_number,
            "http_status": command.http_status,
            "cause": command.cause,
            "settled": reply is not None,
        }
        if request is not None:
            fields |= request.log_fields
            request.trace.over("settle", begun, command.outcome)
        if command.outcome == "answered":
            LogEvent.EXECUTED.log_fields(fields)
        else:
            LogEvent.ENDED_OTHERWISE.log(command.outcome, **fields)

    def ended(self, outcome: str, route: str | None) -> None:
        """An execution of a route has ended, with this status."""
        self._metrics.executions.labels(outcome, route or "none").inc()

    def reported(self, reply: Settled) -> None:
        """A report has ended an execution."""
        execution = reply.execution
        self.ended(execution.status, execution.route)
        self.overrun(reply)
        LogEvent.REPORTED.log(
            decision_id=execution.decision_id,
            outcome=execution.status,
            scope_id=execution.scope_id,
            incident_id=execution.incident_id,
            action=execution.action,
        )

    def overrun(self, reply: Reply | None) -> None:
        """Count a cost overrun, which a settlement or a reconciliation may report."""
        if isinstance(reply, Settled) and reply.overrun:
            self._metrics.cost_overruns.inc()

    def unlisted(self, access: Access, result: Literal["recorded", "refused"]) -> None:
        """A request that no route lists passes with a record, or is refused."""
        self._metrics.unlisted.labels(access, result).inc()

    def unsettled(self, count: int) -> None:
        """So many settlements are kept in memory until the store takes them."""
        self._metrics.unsettled.set(count)

    # Decisions ---------------------------------------------------------------------------------

    def allowed(self, facts: RequestFacts, shadow: Sequence[Objection] = ()) -> None:
        """A request was let through, in spite of the objections of rules and routes in shadow mode."""
        self._metrics.decisions.labels("selected", "none", facts.action_label, facts.route or "none").inc()
        self._count_conditions(shadow)
        for objection in shadow:
            self._metrics.shadow_refusals.labels(objection.refusal.code, objection.rule_id or "").inc()
            LogEvent.WOULD_BE_REFUSED.log(
                error=objection.refusal.code, rule=objection.rule_id, **_claims(facts)
            )

    def refused(
        self,
        facts: RequestFacts,
        refusal: Refusal,
        decision_id: str | None,
        objections: Iterable[Objection] = (),
    ) -> None:
        """A request was refused, and the refusal is recorded unless `decision_id` is None."""
        self._count_conditions(objections)
        self._count(facts, refusal)
        LogEvent.REFUSED.log(
            error=refusal.code,
            bound=refusal.members.get("bound"),
            rules=refusal.members.get("rules"),
            decision_id=decision_id,
            **_claims(facts),
        )

    def replayed(self, facts: RequestFacts, replayed: Replayed) -> None:
        """A request got the answer of an earlier one under its idempotency key."""
        self._metrics.decisions.labels("none", "none", facts.action_label, facts.route or "none").inc()
        LogEvent.REPLAYED.log(
            decision_id=replayed.execution.decision_id, http_status=replayed.answer.status, **_claims(facts)
        )

    def refused_unrecorded(self, facts: RequestFacts, refusal: Refusal, cause: str) -> None:
        """A request was refused, and the refusal cannot be recorded."""
        self.unrecorded(facts, refusal, cause)
        self._count(facts, refusal)

    def unrecorded(self, facts: RequestFacts, refusal: Refusal, cause: str, count: int = 1) -> None:
        """`count` refusals cannot be recorded, because the store does not work; the log has this line."""
        self._metrics.unrecorded.labels(refusal.code).inc(count)
        LogEvent.REFUSED_UNRECORDED.log(error=refusal.code, cause=cause, count=count, **_claims(facts))

    def _count(self, facts: RequestFacts, refusal: Refusal) -> None:
        outcome = outcome_of(refusal).value
        self._metrics.decisions.labels(outcome, refusal.code, facts.action_label, facts.route or "none").inc()

    def _count_conditions(self, objections: Iterable[Objection]) -> None:
        """Count each condition that failed."""
        for objection in objections:
            if "condition_error" in objection.refusal.members:
                self._metrics.condition_errors.labels(objection.rule_id or "").inc()


def _claims(facts: RequestFacts) -> dict[str, Any]:
    return {
        "request_id": facts.request_id or None,
        "scope_id": facts.claims.scope_id,
        "incident_id": facts.claims.incident_id,
        "action": facts.claims.action,
    }
