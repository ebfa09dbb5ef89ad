"""The core, from its specification: bounds as cases, settlement and reconciliation as sentences."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.core.applied import Applied
from sidecar.core.apply import apply
from sidecar.core.bounds import CATALOGUE_BOUNDS, SCOPE_BOUNDS, BoundInput, incomplete, judge
from sidecar.core.chain import GENESIS, link
from sidecar.core.command import (
    AcceptClock,
    Admit,
    Admitted,
    Bind,
    ClockAccepted,
    Command,
    CountReplays,
    Denied,
    Emit,
    Emitted,
    Issue,
    Issued,
    LiftFreeze,
    NotEmitted,
    NotInFlight,
    PassUnlisted,
    Reconcile,
    Recorded,
    Refuse,
    Replayed,
    RequestLine,
    Revoke,
    Revoked,
    RunBound,
    SetFreeze,
    Settle,
    Settled,
    Switch,
    Turn,
    Turned,
)
from sidecar.core.facts import Claims
from sidecar.core.idempotency import KeptAnswer, claim_of, claimed_by
from sidecar.core.instant import iso_time
from sidecar.core.policy import ActionPolicy, Limit, Match, PolicySet, RiskClass, Rule
from sidecar.core.principal import ANONYMOUS, Principal
from sidecar.core.record import DecisionOutcome, DecisionType, Entry, Record
from sidecar.core.scope import Execution, ExecutionStatus, Scope
from sidecar.core.state import Names, State, names
from sidecar.errors import ERRORS, Refusal
from sidecar.web.wire import answers
from tests.cases import load_cases

SECOND = 1_000_000
ISSUED_AT = 1_767_225_600 * SECOND  # 2026-01-01T00:00:00Z
CASES = load_cases("bounds")

POLICIES = PolicySet(
    revision="rev-1",
    actions={
        "retry_agent": ActionPolicy(risk=RiskClass.LOW, hold=100_000, timeout_seconds=7),
        "restart_agent": ActionPolicy(risk=RiskClass.MEDIUM, hold=300_000),
        "failover_db": ActionPolicy(risk=RiskClass.CRITICAL, hold=600_000),
        "clear_cache": ActionPolicy(risk=RiskClass.LOW),
        "drain_node": ActionPolicy(risk=RiskClass.HIGH, targets_required=True),
    },
)
SCOPE = Scope(
    scope_id="scope_1",
    tenant_id="default",
    incident_id="inc_1",
    allowed_actions=("retry_agent", "restart_agent"),
    max_cost=500_000,
    max_attempts=2,
    created_at=ISSUED_AT,
    expires_at=ISSUED_AT + 300 * SECOND,
    intent="bring the agent back",
    target_agents=(),
    created_by="oncall",
)
CLAIMS = Claims(scope_id="scope_1", incident_id="inc_1", action="retry_agent", parameters={"agent": "a"})


def admit(claims: Claims = CLAIMS, **changes: Any) -> Admit:
    return Admit(
        **{"decision_id": "d-1", "claims": claims, "policies": POLICIES, "request_id": "r-1", **changes}
    )


def state_of(scope: Scope = SCOPE, *executions: Execution) -> State:
    return State(
        scopes={scope.scope_id: scope},
        executions={execution.decision_id: execution for execution in executions},
    )


def in_flight(scope: Scope = SCOPE, hold: int = 100_000) -> tuple[Scope, Execution]:
    """A scope with one execution under way, as admission leaves them."""
    execution = Execution(
        decision_id="d-1",
        scope_id=scope.scope_id,
        tenant_id="default",
        incident_id="inc_1",
        action="retry_agent",
        request_id="r-1",
        attempt_number=scope.attempts_used + 1,
        hold=hold,
        admitted_at=ISSUED_AT,
    )
    return replace(scope, attempts_used=scope.attempts_used + 1, held=scope.held + hold), execution


def settle(outcome: Any, scope: Scope, execution: Execution, **changes: Any) -> Applied:
    command = Settle(decision_id="d-2", admission_id="d-1", outcome=outcome, **changes)
    return apply(command, state_of(scope, execution), ISSUED_AT + SECOND)


def entry_of(applied: Applied) -> Entry:
    assert applied.entry is not None
    return applied.entry


def scope_of(applied: Applied) -> Scope:
    assert applied.scope is not None
    return applied.scope


def execution_of(applied: Applied) -> Execution:
    assert applied.execution is not None
    return applied.execution


# Admission -----------------------------------------------------------------------------------------


def case_values(case: dict[str, Any]) -> tuple[Scope, Claims, int]:
    changes: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in case.get("scope", {}).items()
        if key != "revoked_after"
    }
    if "revoked_after" in case.get("scope", {}):
        changes["revoked_at"] = ISSUED_AT + case["scope"]["revoked_after"] * SECOND
    claimed: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in case.get("claims", {}).items()
    }
    now = ISSUED_AT + round(case.get("seconds", 1) * SECOND)
    return replace(SCOPE, **changes), replace(CLAIMS, **claimed), now


def asking(case: dict[str, Any]) -> Principal:
    return Principal(**case["principal"]) if "principal" in case else ANONYMOUS


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_a_bound(case: dict[str, Any]) -> None:
    scope, claims, now = case_values(case)
    tenant = case.get("tenant_id", "default")
    applied = apply(admit(claims, tenant_id=tenant, principal=asking(case)), state_of(scope), now)
    record = entry_of(applied).record
    if "error" in case:
        assert isinstance(applied.reply, Denied)
        assert applied.reply.refusal.code == case["error"]
        assert applied.reply.decision_id == "d-1"
        if "members" in case:
            assert applied.reply.refusal.members == case["members"]
            assert {key: record.details[key] for key in case["members"]} == case["members"]
        assert entry_of(applied).event == "refused"
        assert applied.scope is None
        assert applied.execution is None
        assert record.decision_reason == case["error"]
    else:
        assert isinstance(applied.reply, Admitted)
        assert scope_of(applied).attempts_used == scope.attempts_used + 1
        assert entry_of(applied).event == "admitted"
    for key, wanted in case.get("record", {}).items():
        value = getattr(record, f"decision_{key}")
        assert getattr(value, "value", value) == wanted
    assert record.decision_type.value == "policy"
    assert record.decision_source.value == "system"
    assert record.decision_trigger.value == "explicit"
    assert record.causal_role.value == "in_run"
    assert record.decision_inputs["policy_id"] == "scoped_execution"
    assert record.details["policy_revision"] == "rev-1"
    assert record.details["rules"] == []


BOUNDS = (*SCOPE_BOUNDS, *CATALOGUE_BOUNDS)


def test_every_bound_has_a_case_that_fails_on_it() -> None:
    failing = set()
    for case in CASES:
        scope, claims, now = case_values(case)
        judged = BoundInput.of(
            claims,
            case.get("tenant_id", "default"),
            asking(case),
            scope if claims.scope_id == scope.scope_id else None,
            POLICIES,
            now,
        )
        failing |= {next((bound for bound in BOUNDS if bound(judged)), None)}
    assert failing == {*BOUNDS, None}


def test_an_admission_consumes_one_attempt_and_holds_what_the_catalogue_says() -> None:
    applied = apply(admit(body_sha256="ab"), state_of(), ISSUED_AT)
    assert scope_of(applied) == replace(SCOPE, attempts_used=1, held=100_000)
    assert execution_of(applied) == in_flight()[1]
    assert isinstance(applied.reply, Admitted)
    assert applied.reply.timeout_seconds == 7
    record = entry_of(applied).record
    assert record.decision_inputs == {
        "policy_id": "scoped_execution",
        "principal": "anonymous",
        "parameters": {"agent": "a"},
        "body_sha256": "ab",
    }
    assert record.details == {
        "attempt_number": 1,
        "attempts_remaining": 1,
        "hold_usd": 0.1,
        "risk": "low",
        "granted_to": "oncall",
        "policy_revision": "rev-1",
        "rules": [],
    }
    assert (entry_of(applied).scope_id, entry_of(applied).incident_id, entry_of(applied).action) == (
        "scope_1",
        "inc_1",
        "retry_agent",
    )


def test_an_action_that_is_not_listed_takes_the_entry_for_all_others() -> None:
    policies = replace(POLICIES, unlisted=ActionPolicy(risk=RiskClass.HIGH))
    scope = replace(SCOPE, allowed_actions=("odd",))
    applied = apply(admit(replace(CLAIMS, action="odd"), policies=policies), state_of(scope), ISSUED_AT)
    assert isinstance(applied.reply, Admitted)
    assert entry_of(applied).record.details["risk"] == "high"
    assert policies.label("odd") == "other"
    assert policies.label("retry_agent") == "retry_agent"


def test_a_denial_in_a_flood_leaves_its_record_to_the_summary() -> None:
    applied = apply(admit(replace(CLAIMS, incident_id="inc_2"), record_denial=False), state_of(), ISSUED_AT)
    assert isinstance(applied.reply, Denied)
    assert applied.reply.decision_id is None
    assert applied.entry is None


def test_a_denied_grant_or_revocation_in_a_flood_leaves_its_record_to_the_summary_too() -> None:
    unlisted = replace(SCOPE, allowed_actions=("unlisted",))
    grant = apply(issue(scope=unlisted, record_denial=False), state_of(), ISSUED_AT)
    revocation = Revoke(decision_id="d-1", scope_id="scope_x", record_denial=False)
    for applied in (grant, apply(revocation, state_of(), ISSUED_AT)):
        assert isinstance(applied.reply, Denied)
        assert applied.reply.decision_id is None
        assert applied.entry is None


def test_a_record_leaves_the_parameters_of_a_large_body_out() -> None:
    for size, kept in ((16 * 1024, True), (16 * 1024 + 1, False)):
        inputs = entry_of(
            apply(admit(replace(CLAIMS, body_bytes=size)), state_of(), ISSUED_AT)
        ).record.decision_inputs
        assert ("parameters" in inputs) is kept
        assert inputs.get("parameters_left_out") == (None if kept else {"body_bytes": size})


def test_three_tenths_fill_a_ceiling_of_three_tenths_exactly() -> None:
    scope = replace(SCOPE, max_cost=300_000, max_attempts=10)
    for _ in range(3):
        scope = scope_of(apply(admit(), state_of(scope), ISSUED_AT))
    assert scope.held == scope.max_cost
    assert scope.status(ISSUED_AT) == "exhausted"
    fourth = apply(admit(), state_of(scope), ISSUED_AT)
    assert isinstance(fourth.reply, Denied)
    assert fourth.reply.refusal.members["bound"] == "max_cost_usd"


def test_explaining_asks_the_same_bounds_as_admitting() -> None:
    for case in CASES:
        scope, claims, now = case_values(case)
        tenant = case.get("tenant_id", "default")
        known = scope if claims.scope_id == scope.scope_id else None
        refusal = judge(
            BoundInput.of(claims, tenant, asking(case), known, POLICIES, now),
            (*SCOPE_BOUNDS, *CATALOGUE_BOUNDS),
        )
        assert (refusal.code if refusal else None) == case.get("error")


# Issuing, refusing, revoking -------------------------------------------------------------------------


def issue(**changes: Any) -> Issue:
    return Issue(
        **{
            "decision_id": "d-1",
            "scope": SCOPE,
            "ttl": 60,
            "policies": POLICIES,
            "request_id": "r-1",
            **changes,
        }
    )


def test_an_issued_scope_lives_from_the_moment_it_is_committed() -> None:
    now = ISSUED_AT + 5 * SECOND
    applied = apply(issue(), state_of(), now)
    assert isinstance(applied.reply, Issued)
    assert (scope_of(applied).created_at, scope_of(applied).expires_at) == (now, now + 60 * SECOND)
    record = entry_of(applied).record
    assert entry_of(applied).event == "issued"
    assert record.decision_outcome.value == "selected"
    assert record.decision_inputs == {"policy_id": "scope_grant", "principal": "anonymous"}
    assert record.details["intent"] == "bring the agent back"
    assert record.details["created_by"] == "oncall"
    assert record.details["created_by_verified"] is False
    assert record.details["max_cost_usd"] == 0.5


def test_a_scope_for_an_action_that_no_policy_lists_is_refused_and_recorded() -> None:
    scope = replace(SCOPE, allowed_actions=("retry_agent", "unlisted"), target_agents=("a",))
    applied = apply(issue(scope=scope), state_of(), ISSUED_AT)
    assert isinstance(applied.reply, Denied)
    assert applied.reply.refusal.code == "policy_denied"
    assert applied.scope is None
    entry = entry_of(applied)
    assert (entry.event, entry.scope_id, entry.incident_id) == ("refused", None, "inc_1")
    assert entry.record.decision_outcome.value == "policy_blocked"
    assert entry.record.decision_inputs["target_agents"] == ["a"]
    assert entry.record.details["allowed_actions"] == ["retry_agent", "unlisted"]


def test_a_refusal_that_needs_no_scope_is_recorded_as_it_is() -> None:
    refusal = Refusal("ambiguous_path", "Two readings.", {"path": "/x"})
    applied = apply(
        Refuse(decision_id="d-1", refusal=refusal, tenant_id="acme", request_id="r-1"), state_of(), ISSUED_AT
    )
    assert applied.reply == Recorded("d-1")
    record = entry_of(applied).record
    assert record.decision_reason == "ambiguous_path"
    assert record.details == {"path": "/x", "message": "Two readings.", "rules": []}
    assert record.tenant_id == "acme"


def test_what_a_shadow_route_lets_through_unjudged_is_recorded_as_admitted_with_what_was_wrong() -> None:
    refusal = Refusal("invalid_request", "It is not JSON.", {"member": "body"})
    command = Refuse(decision_id="d-1", refusal=refusal, policy_revision="rev-1", shadow=True)
    applied = apply(command, state_of(), ISSUED_AT)
    assert applied == Applied(reply=Recorded("d-1"), entry=applied.entry)
    entry = entry_of(applied)
    assert (entry.event, entry.scope_id) == ("admitted", None)
    assert entry.record.decision_outcome is DecisionOutcome.SELECTED
    assert entry.record.decision_reason is None
    assert entry.record.details == {
        "would_refuse": [
            {"rule": None, "error": "invalid_request", "message": "It is not JSON.", "member": "body"}
        ],
        "scope_waived": "the route is in shadow mode",
        "route_mode": "shadow",
        "policy_revision": "rev-1",
        "rules": [],
    }


def test_a_flood_is_recorded_with_its_count() -> None:
    refusal = Refusal("overloaded", "Too many.")
    applied = apply(
        Refuse(decision_id="d-1", refusal=refusal, count=7, summary={"subjects": ["s"]}),
        state_of(),
        ISSUED_AT,
    )
    record = entry_of(applied).record
    assert record.decision_outcome.value == "policy_unavailable"
    assert record.details["count"] == 7
    assert record.details["subjects"] == ["s"]
    bare = apply(Refuse(decision_id="d-1", refusal=refusal, count=2), state_of(), ISSUED_AT)
    assert entry_of(bare).record.details["count"] == 2


def test_revoking_is_repeatable_and_keeps_the_first_time() -> None:
    revoke = Revoke(decision_id="d-1", scope_id="scope_1")
    first = apply(revoke, state_of(), ISSUED_AT + SECOND)
    again = apply(revoke, state_of(scope_of(first)), ISSUED_AT + 2 * SECOND)
    assert isinstance(first.reply, Revoked)
    assert isinstance(again.reply, Revoked)
    assert scope_of(again).revoked_at == ISSUED_AT + SECOND
    assert entry_of(again).event == "revoked"
    assert entry_of(again).incident_id == "inc_1"


@pytest.mark.parametrize(("scope_id", "tenant"), [("scope_x", "default"), ("scope_1", "acme")])
def test_revoking_what_is_not_there_or_not_ones_own_is_refused(scope_id: str, tenant: str) -> None:
    applied = apply(Revoke(decision_id="d-1", scope_id=scope_id, tenant_id=tenant), state_of(), ISSUED_AT)
    assert isinstance(applied.reply, Denied)
    assert applied.reply.refusal.code == "scope_not_found"
    assert entry_of(applied).event == "refused"


def test_a_release_does_not_revive_a_revoked_scope() -> None:
    scope, execution = in_flight(replace(SCOPE, max_attempts=1))
    revoked = scope_of(
        apply(Revoke(decision_id="d", scope_id="scope_1"), state_of(scope, execution), ISSUED_AT)
    )
    assert revoked.status(ISSUED_AT) == "exhausted"
    released = scope_of(settle("not_sent", revoked, execution))
    assert released.status(ISSUED_AT) == "revoked"
    denied = apply(admit(), state_of(released), ISSUED_AT).reply
    assert isinstance(denied, Denied)
    assert denied.refusal.code == "scope_revoked"


def test_a_scope_that_had_expired_goes_on_showing_so_after_its_revocation() -> None:
    late = ISSUED_AT + 400 * SECOND
    revoked = scope_of(apply(Revoke(decision_id="d", scope_id="scope_1"), state_of(), late))
    assert revoked.status(late) == "expired"


# Settling and reconciling ----------------------------------------------------------------------------


def test_an_answer_without_a_cost_settles_the_hold() -> None:
    scope, execution = in_flight()
    applied = settle("answered", scope, execution, http_status=200)
    assert (scope_of(applied).held, scope_of(applied).settled, scope_of(applied).attempts_used) == (
        0,
        100_000,
        1,
    )
    assert execution_of(applied).status == "answered"
    entry = entry_of(applied)
    assert (entry.event, entry.admission_id) == ("settled", "d-1")
    assert entry.record.decision_type.value == "recovery"
    assert entry.record.decision_outcome.value == "selected"
    assert entry.record.decision_reason is None
    assert entry.record.details == {
        "admission_id": "d-1",
        "outcome": "answered",
        "attempt_number": 1,
        "hold_usd": 0.1,
        "cost_usd": 0.1,
        "cost_reported": False,
        "cost_overrun": False,
        "http_status": 200,
        "cause": None,
    }


@pytest.mark.parametrize(
    ("hold", "cost", "overrun"), [(100_000, 100_000, False), (100_000, 100_001, True), (0, 100_001, False)]
)
def test_a_cost_above_a_hold_that_is_not_zero_is_an_overrun(hold: int, cost: int, overrun: bool) -> None:
    scope, execution = in_flight(hold=hold)
    applied = settle("answered", scope, execution, cost=cost)
    assert isinstance(applied.reply, Settled)
    assert applied.reply.overrun is overrun
    assert scope_of(applied).settled == cost
    assert scope_of(applied).overrun is overrun
    assert (scope_of(applied).status(ISSUED_AT) == "exhausted") is overrun
    assert entry_of(applied).record.details["cost_overrun"] is overrun


def test_an_overrun_is_not_forgotten_by_the_next_settlement() -> None:
    scope, execution = in_flight(replace(SCOPE, overrun=True))
    assert scope_of(settle("answered", scope, execution, cost=1)).overrun is True


def test_what_was_not_sent_gives_attempt_and_hold_back() -> None:
    scope, execution = in_flight()
    applied = settle("not_sent", scope, execution, cause="connection refused")
    assert scope_of(applied) == SCOPE
    assert execution_of(applied).cost == 0
    record = entry_of(applied).record
    assert (record.decision_outcome.value, record.decision_reason) == ("none", "not_sent")
    assert record.details["cause"] == "connection refused"


def test_what_ended_unknown_keeps_attempt_and_hold() -> None:
    scope, execution = in_flight()
    applied = settle("unknown", scope, execution)
    assert scope_of(applied) == scope
    assert (execution_of(applied).status, execution_of(applied).cost) == ("unknown", None)
    assert entry_of(applied).record.decision_outcome.value == "none"


def test_a_second_settlement_changes_nothing() -> None:
    scope, execution = in_flight()
    ended = execution_of(settle("unknown", scope, execution))
    applied = settle("answered", scope, ended)
    assert applied == Applied(reply=NotInFlight(ended))
    nobody = apply(Settle(decision_id="d-2", admission_id="d-9", outcome="answered"), state_of(), ISSUED_AT)
    assert nobody == Applied(reply=NotInFlight(None))


def reconcile(outcome: str, scope: Scope, execution: Execution, **changes: Any) -> Applied:
    command = Reconcile(**{"decision_id": "d-3", "admission_id": "d-1", "outcome": outcome, **changes})
    return apply(command, state_of(scope, execution), ISSUED_AT + 2 * SECOND)


@pytest.mark.parametrize(("cost", "settled"), [(None, 100_000), (0, 0), (42, 42)])
def test_reconciled_as_executed_costs_what_is_said_or_the_hold(cost: int | None, settled: int) -> None:
    scope, execution = in_flight()
    unknown = execution_of(settle("unknown", scope, execution))
    applied = reconcile(
        "executed", scope, unknown, cost=cost, reason="seen in its log", reconciled_by="alice"
    )
    assert (scope_of(applied).settled, scope_of(applied).held, scope_of(applied).attempts_used) == (
        settled,
        0,
        1,
    )
    entry = entry_of(applied)
    assert entry.event == "reconciled"
    assert entry.record.decision_outcome.value == "selected"
    assert entry.record.details["reconciled_because"] == "seen in its log"
    assert entry.record.details["reconciled_by"] == "alice"


def test_reconciled_as_not_executed_gives_attempt_and_hold_back() -> None:
    scope, execution = in_flight()
    unknown = execution_of(settle("unknown", scope, execution))
    applied = reconcile("not_executed", scope, unknown)
    assert scope_of(applied) == SCOPE
    assert entry_of(applied).record.decision_outcome.value == "none"
    assert applied.entry is not None
    assert "reconciled_by" not in applied.entry.record.details


def test_an_execution_without_a_scope_ends_like_any_other_and_releases_nothing() -> None:
    bare = replace(in_flight()[1], scope_id=None, attempt_number=None)
    known = State(executions={"d-1": bare})
    settled = apply(Settle(decision_id="d-2", admission_id="d-1", outcome="unknown"), known, ISSUED_AT)
    assert settled.reply == Settled(None, replace(bare, status="unknown", ended_at=ISSUED_AT), False)
    assert settled.scope is None
    known = State(executions={"d-1": execution_of(settled)})
    ends: list[tuple[Any, int]] = [("executed", 100_000), ("not_executed", 0)]
    for outcome, cost in ends:
        command = Reconcile(decision_id="d-3", admission_id="d-1", outcome=outcome)
        applied = apply(command, known, ISSUED_AT)
        assert applied.scope is None
        assert execution_of(applied).cost == cost
        assert entry_of(applied).scope_id is None
        assert entry_of(applied).record.details["attempt_number"] is None


def test_only_an_unknown_execution_can_be_reconciled() -> None:
    scope, execution = in_flight()
    flying = reconcile("executed", scope, execution).reply
    assert isinstance(flying, Denied)
    assert flying.refusal.code == "not_reconcilable"
    nobody = reconcile("executed", scope, execution, admission_id="d-9").reply
    assert isinstance(nobody, Denied)
    assert nobody.refusal.code == "decision_not_found"


# Records of others, switches, runs ------------------------------------------------------------------

KILL: Switch = "care_kill_switch"
RECORD = Record(
    decision_id="d-7",
    decision_type=DecisionType.CARE_ROUTING_OPTIMIZED,
    decision_outcome=DecisionOutcome.OPTIMIZED_SELECTED,
    decided_at=ISSUED_AT - SECOND,
)


def emit(**changes: Any) -> Emit:
    return Emit(**{"record": RECORD, "origin": "library", **changes})


def turn(*, on: bool) -> Turn:
    return Turn(decision_id="d-8", switch=KILL, on=on, origin="api", principal=Principal(id="oncall"))


def test_an_accepted_wall_clock_is_recorded_with_its_distance_from_the_time_before() -> None:
    command = AcceptClock(decision_id="d1", before=61_000_000, principal=Principal(id="someone"))
    applied = apply(command, State(), 1_000_000)
    assert applied.reply == ClockAccepted(decision_id="d1", before=61_000_000, now=1_000_000)
    entry = entry_of(applied)
    assert (entry.event, entry.record.decided_at) == ("clock_accepted", 1_000_000)
    assert entry.record.details["step_seconds"] == -60


def test_a_record_of_others_is_kept_as_it_is_with_the_time_at_which_it_was_recorded() -> None:
    applied = apply(emit(), State(), ISSUED_AT)
    assert applied.reply == Emitted(RECORD)
    envelope = entry_of(applied).envelope("w-1", 4)
    assert envelope["record"]["decided_at"] == "2025-12-31T23:59:59.000000+00:00"
    assert envelope["recorded_at"] == "2026-01-01T00:00:00.000000+00:00"
    assert (envelope["event"], envelope["origin"]) == ("emitted", "library")


def test_a_record_is_kept_only_once_under_a_key() -> None:
    first = apply(emit(once=b"k"), State(kept={b"other"}), ISSUED_AT)
    assert (first.reply, first.kept) == (Emitted(RECORD), b"k")
    again = apply(emit(once=b"k"), State(kept={b"k"}), ISSUED_AT)
    assert again == Applied(reply=NotEmitted("repeated"))


def test_a_switch_that_is_on_keeps_a_record_out_and_its_key_free() -> None:
    out = apply(emit(once=b"k", unless_switched=KILL), State(on={KILL}), ISSUED_AT)
    assert out == Applied(reply=NotEmitted("switched_off"))
    assert apply(emit(once=b"k"), State(on={KILL}), ISSUED_AT).reply == Emitted(RECORD)
    assert apply(emit(unless_switched=KILL), State(), ISSUED_AT).reply == Emitted(RECORD)


@pytest.mark.parametrize("on", [True, False])
@pytest.mark.parametrize("was_on", [True, False])
def test_every_turn_of_a_switch_is_recorded(on: bool, was_on: bool) -> None:
    applied = apply(turn(on=on), State(on={KILL} if was_on else frozenset()), ISSUED_AT)
    assert applied.reply == Turned(on, "d-8")
    assert applied.turned == turn(on=on)
    entry = entry_of(applied)
    assert (entry.event, entry.origin) == ("switched", "api")
    assert entry.record.decision_outcome is DecisionOutcome.SELECTED
    assert entry.record.decision_inputs == {"policy_id": KILL, "principal": "oncall"}
    assert entry.record.details == {"on": on, "was_on": was_on, "rules": []}


def test_a_run_is_bound_to_the_records_that_wait_for_one() -> None:
    bind = Bind(request_id="req", run_id="run")
    assert apply(bind, State(unbound={"req": [3, 5], "other": [7]}), ISSUED_AT) == Applied(
        reply=RunBound(2), bound=bind
    )
    assert apply(bind, State(unbound={"req": []}), ISSUED_AT) == Applied(reply=RunBound(0))


def test_a_cost_that_is_announced_is_held_where_it_is_above_the_catalogue_s() -> None:
    def held(cost: int) -> int:
        reply = apply(admit(announced_cost=cost), state_of(), ISSUED_AT).reply
        assert isinstance(reply, Admitted)
        return reply.execution.hold

    assert (held(0), held(99_999), held(500_000)) == (100_000, 100_000, 500_000)
    too_much = apply(admit(announced_cost=500_001), state_of(), ISSUED_AT).reply
    assert isinstance(too_much, Denied)
    assert too_much.refusal.members["bound"] == "max_cost_usd"


def test_risk_is_an_order() -> None:
    low, medium, high, critical = RiskClass
    assert low < medium < high < critical
    assert critical > high >= high
    assert low <= low
    assert sorted(["high", "low"], key=RiskClass) == ["low", "high"]


# The rest ------------------------------------------------------------------------------------------


def test_a_command_names_the_rows_that_it_needs() -> None:
    def needed(*commands: Command) -> Names:
        return names(commands, 0)

    assert needed() == Names()
    assert needed(admit()) == needed(admit(), admit()) == Names(scopes=("scope_1",), frozen_at=0)
    assert needed(Revoke(decision_id="d", scope_id="s")) == Names(scopes=("s",))
    ending = Names(executions=("a",))
    assert needed(Settle(decision_id="d", admission_id="a", outcome="answered")) == ending
    assert needed(Reconcile(decision_id="d", admission_id="a", outcome="executed")) == ending
    assert needed(issue(), Refuse(decision_id="d", refusal=Refusal("draining", ""))) == Names()
    assert needed(emit(once=b"k", unless_switched=KILL)) == Names(once=(b"k",), switches=(KILL,))
    assert needed(emit(), admit(replace(CLAIMS, scope_id=None))) == Names(frozen_at=0)
    unread = Refuse(decision_id="d", refusal=Refusal("draining", ""), shadow=True)
    assert needed(unread) == needed(SetFreeze(decision_id="d", match={}, reason="r")) == Names(frozen_at=0)
    assert needed(LiftFreeze(decision_id="d", freeze_id="f", reason="r")) == Names(freezes=("f",))
    assert needed(turn(on=True)) == Names(switches=(KILL,))
    assert needed(Bind(request_id="req", run_id="run")) == Names(requests=("req",))


@pytest.mark.parametrize(
    ("claims", "code"),
    [
        (CLAIMS, None),
        (replace(CLAIMS, scope_id=None), None),
        (replace(CLAIMS, incident_id=None), "invalid_request"),
        (replace(CLAIMS, action=None), "invalid_request"),
        (replace(CLAIMS, scope_id=None, action=None), "scoped_execution_required"),
    ],
)
def test_claims_without_an_incident_or_an_action_are_incomplete(claims: Claims, code: str | None) -> None:
    refusal = incomplete(claims)
    assert (refusal.code if refusal else None) == code
    # A scope would not help: the whole table gives the same answer.
    case = BoundInput.of(claims, "default", ANONYMOUS, None, POLICIES, 0)
    assert refusal is None or refusal == judge(case, SCOPE_BOUNDS)


def test_a_link_covers_the_one_before_and_the_bytes() -> None:
    assert link(GENESIS, b"a") != link(GENESIS, b"b")
    assert link(link(GENESIS, b"a"), b"b") != link(GENESIS, b"b")
    assert link(GENESIS, b"").hex() == "66687aadf862bd776c8fc18b8e9f8e20089714856ee233b3902a591d0d5f2925"


def test_an_envelope_shows_the_fourteen_fields_and_who_wrote_them() -> None:
    envelope = entry_of(apply(admit(), state_of(), ISSUED_AT)).envelope("w-1", 4)
    assert (envelope["writer"], envelope["seq"], envelope["origin"]) == ("w-1", 4, "gate")
    assert len(envelope["record"]) == 14
    assert envelope["record"]["decided_at"] == "2026-01-01T00:00:00.000000+00:00"


def test_a_scope_shows_what_is_left_of_it() -> None:
    scope, execution = in_flight()
    shown = answers.scope(scope, ISSUED_AT)
    assert shown["attempts_remaining"] == 1
    assert shown["cost_used_usd"] == 0.1
    assert shown["status"] == "active"
    assert shown["expires_at"] == iso_time(SCOPE.expires_at)
    assert replace(scope, attempts_used=9).attempts_remaining == 0
    assert scope.status(SCOPE.expires_at) == "expired"
    told = answers.execution(execution)
    assert (told["status"], told["hold_usd"], told["cost_usd"], told["ended_at"]) == (
        "in_flight",
        0.1,
        None,
        None,
    )
    ended = answers.execution(execution_of(settle("answered", scope, execution)))
    assert (ended["cost_usd"], ended["ended_at"]) == (0.1, iso_time(ISSUED_AT + SECOND))


def test_every_refusal_of_the_core_stands_in_the_table_of_errors() -> None:
    assert {case["error"] for case in CASES if "error" in case} <= set(ERRORS)


# Any history at all ----------------------------------------------------------------------------------

STEPS = st.one_of(
    st.tuples(st.just("admit"), st.sampled_from(["retry_agent", "restart_agent"])),
    st.tuples(st.just("settle"), st.sampled_from(["answered", "not_sent", "unknown"])),
    st.tuples(st.just("reconcile"), st.sampled_from(["executed", "not_executed"])),
    st.tuples(st.just("revoke"), st.just("")),
    st.tuples(st.just("wait"), st.just("")),
)


@given(
    steps=st.lists(
        st.tuples(STEPS, st.integers(0, 5), st.one_of(st.none(), st.integers(0, 400_000))), max_size=25
    )
)
def test_no_history_breaks_the_bounds(steps: list[tuple[tuple[str, str], int, int | None]]) -> None:
    """G2 and G3 over any order of commands, against sums made the plain way."""
    scope, now, made = SCOPE, ISSUED_AT, 0
    executions: dict[str, Execution] = {}
    for step, which, cost in steps:
        kind: str = step[0]
        what: Any = step[1]
        ids = list(executions)
        chosen = ids[which % len(ids)] if ids else "d-none"
        command: Command
        match kind:
            case "admit":
                made += 1
                command = admit(replace(CLAIMS, action=what), decision_id=f"a-{made}")
            case "settle":
                command = Settle(decision_id="s", admission_id=chosen, outcome=what, cost=cost)
            case "reconcile":
                command = Reconcile(decision_id="s", admission_id=chosen, outcome=what, cost=cost)
            case "revoke":
                command = Revoke(decision_id="s", scope_id="scope_1")
            case _:
                now += 100 * SECOND
                continue
        before = scope
        applied = apply(command, State(scopes={"scope_1": scope}, executions=executions), now)
        scope = applied.scope or scope
        if applied.execution is not None:
            executions = {**executions, applied.execution.decision_id: applied.execution}
        if isinstance(applied.reply, Admitted):
            assert before.revoked_at is None
            assert now < before.expires_at
            assert scope.spent <= scope.max_cost
        counted = [e for e in executions.values() if e.status not in ("not_sent", "not_executed")]
        assert scope.attempts_used == len(counted) <= scope.max_attempts
        assert scope.held == sum(e.hold for e in counted if e.cost is None)
        assert scope.settled == sum(e.cost or 0 for e in counted)


# Repeats under an idempotency key --------------------------------------------------------------------

CLAIM = claim_of(
    "key-00000001",
    principal="anonymous",
    tenant_id="default",
    route="restart",
    method="POST",
    target=b"/",
    body_sha256="a",
    claims=Claims(),
    kept_for=60 * SECOND,
)
ANSWER = KeptAnswer(key=CLAIM.key, status=200, reason=b"OK", body=b"done")


def repeat(state: State, **changes: Any) -> Applied:
    return apply(admit(decision_id="d-9", claim=CLAIM, **changes), state, ISSUED_AT + 2 * SECOND)


def answered_under_a_key() -> tuple[State, Applied]:
    """The rows after a first request under a key was admitted and answered, and that last step."""
    scope, execution = in_flight()
    claimed = claimed_by(CLAIM, "d-1", ISSUED_AT)
    state = replace(state_of(scope, execution), claimed={CLAIM.key: claimed})
    settle = Settle(decision_id="d-2", admission_id="d-1", outcome="answered", answer=ANSWER)
    applied = apply(settle, state, ISSUED_AT + SECOND)
    assert applied.claimed is not None
    after = replace(state_of(scope_of(applied), execution_of(applied)), claimed={CLAIM.key: applied.claimed})
    return after, applied


def test_an_admission_claims_its_key_and_a_denial_claims_nothing() -> None:
    admitted = repeat(state_of())
    assert admitted.claimed == claimed_by(CLAIM, "d-9", ISSUED_AT + 2 * SECOND)
    denied = repeat(state_of(replace(SCOPE, attempts_used=2)))
    assert isinstance(denied.reply, Denied)
    assert denied.claimed is None


def test_a_repeat_gets_the_first_answer_and_leaves_a_record_but_consumes_nothing() -> None:
    state, _ = answered_under_a_key()
    applied = repeat(state)
    assert isinstance(applied.reply, Replayed)
    assert applied.reply.answer is ANSWER
    assert (applied.scope, applied.execution) == (None, None)
    entry = entry_of(applied)
    assert (entry.event, entry.record.decision_outcome) == ("replayed", DecisionOutcome.NONE)
    assert entry.record.details["admission_id"] == "d-1"


def test_in_a_flood_a_repeat_leaves_no_record_of_its_own() -> None:
    state, _ = answered_under_a_key()
    applied = repeat(state, record_denial=False)
    assert isinstance(applied.reply, Replayed)
    assert applied.entry is None
    summary = apply(CountReplays(decision_id="d-8", count=7, subjects=("scope_1",)), state, ISSUED_AT)
    assert (entry_of(summary).event, entry_of(summary).record.details["count"]) == ("replayed", 7)


@pytest.mark.parametrize("recorded", [True, False])
def test_a_repeat_of_a_request_in_flight_is_refused(recorded: bool) -> None:
    scope, execution = in_flight()
    claimed = claimed_by(CLAIM, "d-1", ISSUED_AT)
    state = replace(state_of(scope, execution), claimed={CLAIM.key: claimed})
    applied = repeat(state, record_denial=recorded)
    assert isinstance(applied.reply, Denied)
    assert applied.reply.refusal.code == "idempotency_in_flight"
    assert (applied.entry is not None) is recorded


def test_after_an_execution_that_was_not_sent_the_key_is_free() -> None:
    scope, execution = in_flight()
    claimed = claimed_by(CLAIM, "d-1", ISSUED_AT)
    ended = replace(execution, status="not_sent", ended_at=ISSUED_AT)
    state = replace(state_of(scope, ended), claimed={CLAIM.key: claimed})
    assert isinstance(repeat(state).reply, Admitted)


def test_an_answer_is_kept_after_a_report_but_not_where_nothing_was_executed() -> None:
    cases: tuple[tuple[ExecutionStatus, bool], ...] = (("succeeded", True), ("not_executed", False))
    for status, kept in cases:
        scope, execution = in_flight()
        ended = replace(execution, status=status, ended_at=ISSUED_AT, cost=0)
        claimed = claimed_by(CLAIM, "d-1", ISSUED_AT)
        state = replace(state_of(scope, ended), claimed={CLAIM.key: claimed})
        settle = Settle(decision_id="d-2", admission_id="d-1", outcome="answered", answer=ANSWER)
        assert (apply(settle, state, ISSUED_AT).claimed is not None) is kept


def test_an_answer_of_an_execution_that_the_store_lacks_is_kept_nowhere() -> None:
    settle = Settle(decision_id="d-2", admission_id="d-1", outcome="answered", answer=ANSWER)
    assert apply(settle, State(), ISSUED_AT).claimed is None


def test_the_keys_of_a_claim_and_of_an_answer_are_among_the_rows_that_commands_need() -> None:
    settle = Settle(decision_id="d-2", admission_id="d-1", outcome="answered", answer=ANSWER)
    assert names([admit(claim=CLAIM)], 0).keys == (CLAIM.key,)
    assert names([settle], 0).keys == (CLAIM.key,)


# What no route lists ---------------------------------------------------------------------------------


def test_a_request_that_no_route_lists_is_recorded_with_its_method_and_path() -> None:
    line = RequestLine("PUT", "/elsewhere")
    applied = apply(PassUnlisted(decision_id="d-1", line=line), State(), ISSUED_AT)
    record = entry_of(applied).record
    assert (entry_of(applied).event, record.decision_outcome) == ("unlisted", DecisionOutcome.SELECTED)
    assert (record.decision_inputs["method"], record.decision_inputs["path"]) == ("PUT", "/elsewhere")
    assert record.details["route"] is None
    assert str(line) == "PUT /elsewhere"


def test_a_flood_of_them_is_recorded_with_its_count() -> None:
    flood = PassUnlisted(decision_id="d-1", line=None, count=3, summary={"subjects": ["PUT /a"]})
    details = entry_of(apply(flood, State(), ISSUED_AT)).record.details
    assert (details["count"], details["subjects"]) == (3, ["PUT /a"])


def test_a_refused_one_names_its_method_and_path_too() -> None:
    refusal = Refusal("not_listed", "No route lists it.")
    command = Refuse(decision_id="d-1", refusal=refusal, line=RequestLine("PUT", "/elsewhere"))
    record = entry_of(apply(command, State(), ISSUED_AT)).record
    assert (record.decision_reason, record.decision_inputs["path"]) == ("not_listed", "/elsewhere")
    assert record.details["route"] is None


# Opaque bodies ---------------------------------------------------------------------------------------


def test_the_record_of_an_admission_names_its_route() -> None:
    assert entry_of(apply(admit(route="restart"), state_of(), ISSUED_AT)).record.details["route"] == "restart"


def test_the_record_of_an_opaque_body_has_its_size() -> None:
    claims = replace(CLAIMS, parameters={}, body_bytes=9, opaque=True)
    record = entry_of(apply(admit(claims), state_of(), ISSUED_AT)).record
    assert record.decision_inputs["body_bytes"] == 9


# Grants that could never be spent --------------------------------------------------------------------


def test_a_grant_below_the_hold_of_one_of_its_actions_is_refused_with_the_least_ceiling() -> None:
    command = Issue(decision_id="d-1", scope=replace(SCOPE, max_cost=299_999), ttl=60, policies=POLICIES)
    applied = apply(command, State(), ISSUED_AT)
    assert isinstance(applied.reply, Denied)
    refusal = applied.reply.refusal
    assert (refusal.code, refusal.members["min_cost_usd"]) == ("invalid_scope", 0.3)
    assert entry_of(applied).record.decision_reason == "invalid_scope"
    enough = replace(command, scope=replace(SCOPE, max_cost=300_000))
    assert isinstance(apply(enough, State(), ISSUED_AT).reply, Issued)


def test_where_a_rule_lowered_the_ceiling_the_refusal_names_the_rule() -> None:
    low = Rule(id="low", on="issue", match=Match(), limit=Limit(max_cost=100_000))
    policies = replace(POLICIES, rules=(low,))
    command = Issue(
        decision_id="d-1", scope=SCOPE, ttl=60, policies=policies, defaulted=frozenset({"max_cost_usd"})
    )
    reply = apply(command, State(), ISSUED_AT).reply
    assert isinstance(reply, Denied)
    assert "rules that lowered it to 0.1: low" in reply.refusal.message
