"""How executions end: by an answer, a report, a time limit, or an operator. One rule for each command.

1. An execution ends once. An answer ends one that is `in_flight`; a time limit ends one that is `running`.
2. A report ends one that is `in_flight`, `running` or `unknown`: the reporter knows more than an answer that
   is still to come or was lost. A report after an ending that is known changes nothing.
3. A report needs the completion token of its execution. It is valid from sending until the time limit, which
   counts from the admission, and until an operator reconciles the execution.
4. The time limit is exact: it is judged here, at the time of the command. A timer only sees to it that a
   command comes.
"""

from __future__ import annotations

from dataclasses import replace
from hmac import compare_digest

from sidecar.core.command import (
    Denied,
    Ending,
    Lapse,
    NotInFlight,
    Reconcile,
    Repeated,
    Report,
    Settle,
    Settled,
)
from sidecar.core.entries import ended_entry
from sidecar.core.record import Entry, Event
from sidecar.core.scope import RELEASING, UNDER_WAY, Execution, Scope
from sidecar.errors import Refusal

# The cause of an execution that is unknown because its report did not come.
NO_REPORT = "no report came within the time limit"
COMPLETION_REFUSED = Refusal(
    "completion_refused",
    "The completion token is missing, belongs to another execution, or is no longer valid.",
)
# What a presented token is compared with if there is no execution or no token. No token has this digest.
_NO_TOKEN = bytes(32)

# What a rule returns: the reply, and the entry for the log if the execution ended.
Result = tuple[Ending | Denied, Entry | None]


def settle(command: Settle, execution: Execution | None, scope: Scope | None, now: int) -> Result:
    """End an execution in flight by its answer or by the lack of one, or note that it will be reported."""
    if execution is None or execution.status != "in_flight":
        return NotInFlight(execution), None
    outcome, cause, cost = command.outcome, command.cause, command.cost
    if outcome == "running":
        if now < (execution.report_by or 0):
            running = replace(execution, status="running", http_status=command.http_status)
            return Settled(scope, running, False), None
        outcome, cause = "unknown", NO_REPORT
    if outcome == "answered":
        cost = execution.hold if cost is None else cost
    else:
        cost = 0 if outcome in RELEASING else None
    ended = execution.ended(outcome, ended_at=now, http_status=command.http_status, cause=cause, cost=cost)
    return _ended(command, "settled", scope, ended, now, cost_reported=command.cost is not None)


def is_reportable(execution: Execution | None, token_sha256: bytes, now: int) -> bool:
    """Whether a token with this digest may report about an execution now. It takes the same time for any
    digest."""
    expected = None if execution is None else execution.report_token
    matches = compare_digest(token_sha256, expected or _NO_TOKEN)
    return (
        matches
        and expected is not None
        and execution is not None
        and execution.status != "not_sent"
        and now < (execution.report_by or 0)
    )


def report(command: Report, execution: Execution | None, scope: Scope | None, now: int) -> Result:
    """End an execution as its report says, unless it has a known ending already."""
    if execution is None or not is_reportable(execution, command.token_sha256, now):
        return Denied(COMPLETION_REFUSED, None), None
    cost = _final_cost(command.outcome, command.cost, execution.hold)
    if execution.status not in UNDER_WAY and execution.status != "unknown":
        if (execution.status, execution.cost) == (command.outcome, cost):
            return Repeated(scope, execution), None
        conflict = Refusal(
            "completion_conflict",
            f"The execution has ended already, as {execution.status}.",
            {"execution_status": execution.status},
        )
        return Denied(conflict, None), None
    ended = execution.ended(
        command.outcome,
        ended_at=now,
        http_status=execution.http_status,
        cause=execution.cause,
        cost=cost,
    )
    return _ended(command, "settled", scope, ended, now, cost_reported=command.cost is not None)


def lapse(command: Lapse, execution: Execution | None, scope: Scope | None, now: int) -> Result:
    """End a running execution whose time to be reported has passed. Its outcome is unknown (G8)."""
    if execution is None or execution.status != "running" or now < (execution.report_by or 0):
        return NotInFlight(execution), None
    ended = execution.ended(
        "unknown", ended_at=now, http_status=execution.http_status, cause=NO_REPORT, cost=None
    )
    return _ended(command, "settled", scope, ended, now, cost_reported=False)


def reconcile(command: Reconcile, execution: Execution | None, scope: Scope | None, now: int) -> Result:
    """End an unknown or a running execution as an operator says. Its completion token is void afterwards."""
    if execution is None:
        missing = Refusal(
            "decision_not_found", "No admission has this decision_id.", {"decision_id": command.admission_id}
        )
        return Denied(missing, None), None
    if execution.status not in ("unknown", "running"):
        refusal = Refusal(
            "not_reconcilable",
            f"The execution is {execution.status}; only an unknown or a running one can be reconciled.",
            {"execution_status": execution.status},
        )
        return Denied(refusal, None), None
    ended = execution.ended(
        command.outcome,
        ended_at=now,
        http_status=execution.http_status,
        cause=execution.cause,
        cost=_final_cost(command.outcome, command.cost, execution.hold),
    )
    if ended.report_token is not None:
        ended = replace(ended, report_token=None)
    return _ended(command, "reconciled", scope, ended, now, cost_reported=command.cost is not None)


def _final_cost(outcome: str, reported: int | None, hold: int) -> int:
    """The final cost: 0 if nothing ran, else the reported cost or the hold."""
    if outcome in RELEASING:
        return 0
    return hold if reported is None else reported


def _ended(
    command: Settle | Report | Lapse | Reconcile,
    event: Event,
    scope: Scope | None,
    execution: Execution,
    now: int,
    *,
    cost_reported: bool,
) -> Result:
    """End an execution: release, keep or replace its hold, and record the ending (G3, G8)."""
    overrun = execution.cost is not None and 0 < execution.hold < execution.cost
    if scope is not None and execution.status in RELEASING:
        scope = scope.counted(attempts_used=scope.attempts_used - 1, held=scope.held - execution.hold)
    elif scope is not None and execution.cost is not None:
        scope = scope.counted(
            attempts_used=scope.attempts_used,
            held=scope.held - execution.hold,
            settled=scope.settled + execution.cost,
            overrun=scope.overrun or overrun,
        )
    entry = ended_entry(
        command, event, execution, scope, cost_reported=cost_reported, overrun=overrun, now=now
    )
    return Settled(scope, execution, overrun), entry
