"""How executions end (core/endings.py): by an answer, a report, a time limit, or an operator."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256
from typing import Any

import pytest

from sidecar.core.applied import Applied
from sidecar.core.apply import apply
from sidecar.core.command import (
    Command,
    Denied,
    Lapse,
    NotInFlight,
    Reconcile,
    Repeated,
    Report,
    Settle,
    Settled,
)
from sidecar.core.endings import NO_REPORT
from sidecar.core.record import DecisionOutcome
from sidecar.core.scope import Execution, Scope
from sidecar.core.state import State, names
from tests.unit.test_apply import (
    ISSUED_AT,
    SCOPE,
    SECOND,
    entry_of,
    execution_of,
    in_flight,
    scope_of,
    state_of,
)

TOKEN = sha256(b"the token").digest()
LIMIT = ISSUED_AT + 60 * SECOND
NOW = ISSUED_AT + SECOND


def reportable(status: Any = "running", **changes: Any) -> tuple[Scope, Execution]:
    """A scope with one execution of a route with `completion: report`."""
    scope, execution = in_flight()
    values = {"report_token": TOKEN, "report_by": LIMIT, "route": "restart", "status": status, **changes}
    return scope, replace(execution, **values)


def given(scope: Scope, execution: Execution, command: Command, now: int = NOW) -> Applied:
    return apply(command, state_of(scope, execution), now)


def report(outcome: Any, **changes: Any) -> Report:
    return Report(
        **{"decision_id": "d-2", "admission_id": "d-1", "token_sha256": TOKEN, "outcome": outcome, **changes}
    )


def refused(applied: Applied) -> str:
    assert isinstance(applied.reply, Denied)
    assert (applied.entry, applied.scope, applied.execution) == (None, None, None)
    return applied.reply.refusal.code


@pytest.mark.parametrize("outcome", ["succeeded", "failed"])
@pytest.mark.parametrize("status", ["in_flight", "running", "unknown"])
def test_a_report_ends_an_execution_whose_end_is_not_known(status: str, outcome: str) -> None:
    applied = given(*reportable(status), report(outcome, cost=40_000, detail="12 pods", request_id="r-9"))
    assert isinstance(applied.reply, Settled)
    assert (execution_of(applied).status, execution_of(applied).cost) == (outcome, 40_000)
    assert (scope_of(applied).held, scope_of(applied).settled) == (0, 40_000)
    record = entry_of(applied).record
    assert record.decision_outcome is DecisionOutcome.SELECTED
    assert record.details["route"] == "restart"
    assert (record.details["reported_detail"], record.details["reported_by_request"]) == ("12 pods", "r-9")
    assert record.details["cost_reported"] is True


def test_a_report_without_a_cost_costs_the_hold() -> None:
    applied = given(*reportable(), report("failed"))
    assert (execution_of(applied).cost, scope_of(applied).settled) == (100_000, 100_000)
    assert entry_of(applied).record.details["cost_reported"] is False
    assert "reported_detail" not in entry_of(applied).record.details


def test_a_report_that_nothing_was_executed_gives_attempt_and_hold_back() -> None:
    applied = given(*reportable(), report("not_executed"))
    assert (scope_of(applied).attempts_used, scope_of(applied).held) == (0, 0)
    assert entry_of(applied).record.decision_outcome is DecisionOutcome.NONE


def test_the_same_report_changes_nothing_and_another_one_conflicts() -> None:
    ended = reportable("succeeded", cost=100_000)
    again = given(*ended, report("succeeded"))
    assert isinstance(again.reply, Repeated)
    assert again.entry is None
    assert refused(given(*ended, report("succeeded", cost=1))) == "completion_conflict"
    assert refused(given(*ended, report("failed"))) == "completion_conflict"


@pytest.mark.parametrize(
    ("execution", "command", "now"),
    [
        (reportable(), report("failed", token_sha256=sha256(b"another").digest()), NOW),
        (reportable(report_token=None), report("failed", token_sha256=bytes(32)), NOW),
        (reportable(), report("failed", admission_id="none"), NOW),
        (reportable("not_sent"), report("failed"), NOW),
        (reportable(), report("failed"), LIMIT),
    ],
    ids=["a wrong token", "no token", "no execution", "not sent", "at the limit"],
)
def test_a_report_without_a_valid_token_is_refused(
    execution: tuple[Scope, Execution], command: Report, now: int
) -> None:
    assert refused(given(*execution, command, now)) == "completion_refused"


def test_just_before_the_limit_a_report_counts() -> None:
    assert isinstance(given(*reportable(), report("failed"), LIMIT - 1).reply, Settled)


def test_an_answer_leaves_an_execution_running_without_a_record_until_its_limit() -> None:
    answer = Settle(decision_id="d-2", admission_id="d-1", outcome="running", http_status=202)
    running = given(*reportable("in_flight"), answer, LIMIT - 1)
    assert (execution_of(running).status, execution_of(running).http_status) == ("running", 202)
    assert running.entry is None
    late = given(*reportable("in_flight"), answer, LIMIT)
    assert (execution_of(late).status, execution_of(late).cause) == ("unknown", NO_REPORT)


def test_an_execution_that_is_not_reported_in_time_is_unknown_and_keeps_its_hold() -> None:
    lapse = Lapse(decision_id="d-2", admission_id="d-1")
    assert isinstance(given(*reportable(), lapse, LIMIT - 1).reply, NotInFlight)
    assert isinstance(given(*reportable("succeeded"), lapse, LIMIT).reply, NotInFlight)
    applied = given(*reportable(), lapse, LIMIT)
    assert (execution_of(applied).status, execution_of(applied).cost) == ("unknown", None)
    assert scope_of(applied).held == 100_000


def test_after_an_operator_has_ended_it_the_token_is_void() -> None:
    reconcile = Reconcile(decision_id="d-2", admission_id="d-1", outcome="executed")
    scope, execution = reportable()
    applied = given(scope, execution, reconcile)
    assert execution_of(applied).report_token is None
    assert (
        refused(given(scope_of(applied), execution_of(applied), report("succeeded"))) == "completion_refused"
    )


def test_reports_and_time_limits_need_the_row_of_their_execution() -> None:
    needed = names([report("failed"), Lapse(decision_id="d-3", admission_id="d-9")], NOW)
    assert needed.executions == ("d-1", "d-9")


def test_without_a_scope_an_execution_is_reported_as_well() -> None:
    _, execution = reportable(scope_id=None)
    applied = apply(report("succeeded"), State(executions={"d-1": execution}), NOW)
    assert isinstance(applied.reply, Settled)
    assert applied.scope is None
    assert SCOPE.held == 0
