"""Who asks: what records say of it, what rules see of it, and which roles it holds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sidecar.core.applied import Applied
from sidecar.core.apply import apply
from sidecar.core.command import AcceptClock, Admit, Denied, Emit, Issue, Reconcile, Revoke, Settle, Turn
from sidecar.core.facts import Claims
from sidecar.core.policy import ActionPolicy, Match, PolicySet, Require, RiskClass, Rule
from sidecar.core.principal import ANONYMOUS, Principal, PrincipalKind
from sidecar.core.record import DecisionOutcome, DecisionType, Entry, Record
from sidecar.core.roles import NO_ROLES, ROLES, Holders, Roles, role_required
from sidecar.core.scope import Scope
from sidecar.core.state import State

NOW = 1_700_000_000_000_000
MINUTE = 60_000_000
ACTIONS = {"restart_pod": ActionPolicy(risk=RiskClass.MEDIUM)}
POLICIES = PolicySet(revision="r1", actions=ACTIONS)
CLAIMS = Claims(scope_id="scope_1", incident_id="inc_1", action="restart_pod")
ANN = Principal(id="ann", kind="human", groups=("oncall", "dba"), method="tokens")
BOB = Principal(id="bob", kind="human", method="proxy")
BOT = Principal(id="bot-7", kind="agent", groups=("bots",), method="jwt")
SCOPE = Scope(
    scope_id="scope_1",
    tenant_id="default",
    incident_id="inc_1",
    allowed_actions=("restart_pod",),
    max_cost=0,
    max_attempts=3,
    created_at=NOW,
    expires_at=NOW + 5 * MINUTE,
    intent="bring it back",
    target_agents=(),
    created_by="ann",
    issuer_kind="human",
    issuer_method="tokens",
)


def admit(principal: Principal, *rules: Rule, **changes: Any) -> Admit:
    policies = replace(POLICIES, rules=rules)
    return Admit(
        **{"decision_id": "d-1", "claims": CLAIMS, "policies": policies, "principal": principal, **changes}
    )


def applied(command: Any, scope: Scope = SCOPE, **rows: Any) -> Applied:
    return apply(command, State(scopes={scope.scope_id: scope}, **rows), NOW + 1)


def entry(result: Applied) -> Entry:
    assert result.entry is not None
    return result.entry


def envelope(result: Applied) -> dict[str, Any]:
    return entry(result).envelope("writer", 1)


# Records ------------------------------------------------------------------------------------------------


def test_the_envelope_of_every_record_names_the_principal_that_asked() -> None:
    record = Record(
        decision_id="d-2",
        decision_type=DecisionType.ROUTING,
        decision_outcome=DecisionOutcome.SELECTED,
        decided_at=NOW,
        decision_inputs={"principal": "a word of the caller"},
    )
    flying = applied(admit(ANN)).execution
    assert flying is not None
    unknown = replace(flying, status="unknown")
    for result in (
        applied(admit(ANN)),
        applied(admit(ANN, claims=replace(CLAIMS, scope_id=None))),
        applied(Issue(decision_id="d-3", scope=SCOPE, ttl=60, policies=POLICIES, principal=ANN)),
        applied(Revoke(decision_id="d-4", scope_id="scope_1", principal=ANN)),
        applied(Emit(record=record, origin="api", principal=ANN)),
        applied(Turn(decision_id="d-5", switch="care_kill_switch", on=True, origin="api", principal=ANN)),
        applied(AcceptClock(decision_id="d-6", principal=ANN)),
        applied(
            Settle(decision_id="d-7", admission_id="d-1", outcome="answered"), executions={"d-1": flying}
        ),
        applied(
            Reconcile(decision_id="d-8", admission_id="d-1", outcome="executed", principal=ANN),
            executions={"d-1": unknown},
        ),
    ):
        assert envelope(result)["principal"] == {"id": "ann", "kind": "human", "method": "tokens"}


def test_a_caller_that_presents_nothing_is_anonymous_of_kind_service_by_no_method() -> None:
    found = envelope(applied(admit(ANONYMOUS)))
    assert found["principal"] == {"id": "anonymous", "kind": "service", "method": "none"}


def test_the_inputs_have_the_id_as_text_and_the_groups_if_there_are_some() -> None:
    inputs = entry(applied(admit(ANN))).record.decision_inputs
    assert (inputs["principal"], inputs["principal_groups"]) == ("ann", ["oncall", "dba"])
    assert "principal_groups" not in entry(applied(admit(BOB))).record.decision_inputs


def test_the_records_of_an_execution_say_who_issued_its_scope_and_others_do_not() -> None:
    admission = applied(admit(BOT))
    assert admission.execution is not None
    settled = applied(
        Settle(decision_id="d-2", admission_id="d-1", outcome="answered"),
        executions={"d-1": admission.execution},
    )
    for result in (admission, settled):
        found = envelope(result)
        assert found["issuer"] == {"id": "ann", "kind": "human", "method": "tokens"}
        assert found["approvers"] == []
        assert found["principal"]["id"] == "bot-7"
    refused = envelope(applied(admit(BOT, claims=replace(CLAIMS, incident_id="inc_2"))))
    assert "issuer" not in refused
    assert "approvers" not in refused


def test_an_execution_that_needs_no_scope_has_no_issuer() -> None:
    command = admit(BOT, claims=replace(CLAIMS, scope_id=None), scope_required_from=RiskClass.CRITICAL)
    found = envelope(applied(command))
    assert (found["event"], found["issuer"], found["approvers"]) == ("admitted", None, [])


def test_the_issuer_of_a_scope_that_a_caller_without_credential_asked_for_is_anonymous() -> None:
    unproven = replace(SCOPE, created_by="a word of the caller", issuer_kind="service", issuer_method="none")
    assert unproven.proven_issuer is None
    found = envelope(applied(admit(BOT), unproven))
    assert found["issuer"] == {"id": "anonymous", "kind": "service", "method": "none"}


@pytest.mark.parametrize(
    ("issuer", "executor", "source"),
    [
        ("human", ANN, "human"),
        ("human", BOT, "hybrid"),
        ("agent", ANN, "hybrid"),
        ("service", BOT, "system"),
        ("service", ANONYMOUS, "system"),
    ],
)
def test_the_source_of_a_decision_is_human_if_only_people_took_part_and_system_if_none_did(
    issuer: PrincipalKind, executor: Principal, source: str
) -> None:
    scope = replace(SCOPE, issuer_kind=issuer)
    admission = applied(admit(executor), scope)
    assert admission.execution is not None
    settle = Settle(decision_id="d-2", admission_id="d-1", outcome="unknown")
    settled = applied(settle, scope, executions={"d-1": admission.execution})
    for result in (admission, settled):
        assert entry(result).record.decision_source.value == source


def test_an_operator_who_reconciles_takes_part() -> None:
    scope = replace(SCOPE, issuer_kind="service")
    admission = applied(admit(BOT), scope)
    assert admission.execution is not None
    lost = replace(admission.execution, status="unknown")
    command = Reconcile(decision_id="d-2", admission_id="d-1", outcome="executed", principal=ANN)
    found = entry(applied(command, scope, executions={"d-1": lost}))
    assert found.record.decision_source.value == "hybrid"
    assert found.record.decision_inputs["principal"] == "ann"


def test_a_grant_records_its_executors_and_on_whose_behalf_it_was_asked_for() -> None:
    scope = replace(SCOPE, executors=("bot-*",), on_behalf_of="carl")
    details = entry(
        applied(Issue(decision_id="d", scope=scope, ttl=60, policies=POLICIES, principal=ANN))
    ).record.details
    assert details["created_by_verified"] is True
    assert details["executors"] == ["bot-*"]
    assert details["on_behalf_of"] == {"id": "carl", "verified": False}
    plain = entry(applied(Issue(decision_id="d", scope=SCOPE, ttl=60, policies=POLICIES))).record.details
    assert not {"executors", "on_behalf_of"} & plain.keys()


# Rules --------------------------------------------------------------------------------------------------

UNPROVEN = replace(SCOPE, issuer_method="none")


@pytest.mark.parametrize(
    ("require", "executor", "scope", "refused"),
    [
        (Require(executor_is_not_issuer=True), BOB, SCOPE, False),
        (Require(executor_is_not_issuer=True), ANN, SCOPE, True),
        (Require(executor_is_not_issuer=True), ANONYMOUS, SCOPE, True),
        (Require(executor_is_not_issuer=True), BOB, UNPROVEN, True),
        (Require(executor_is_issuer=True), ANN, SCOPE, False),
        (Require(executor_is_issuer=True), BOB, SCOPE, True),
        (Require(executor_is_issuer=True), ANN, UNPROVEN, True),
    ],
)
def test_a_rule_may_require_that_the_issuer_is_or_is_not_the_executor_and_both_must_be_known(
    require: Require, executor: Principal, scope: Scope, refused: bool
) -> None:
    rule = Rule(id="four-eyes", on="execute", require=require)
    reply = applied(admit(executor, rule), scope).reply
    assert isinstance(reply, Denied) is refused
    if isinstance(reply, Denied):
        assert reply.refusal.code == "policy_denied"
        assert reply.refusal.members["require"].startswith("executor_is_")


@pytest.mark.parametrize(
    ("match", "principal", "refused"),
    [
        (Match(principal_kind=("agent",)), BOT, True),
        (Match(principal_kind=("agent",)), ANN, False),
        (Match(principal_group=("d?a",)), ANN, True),
        (Match(principal_group=("dba",)), BOT, False),
        (Match(principal=("bot-*",)), BOT, True),
    ],
)
def test_a_rule_matches_the_kind_and_the_groups_of_the_principal(
    match: Match, principal: Principal, refused: bool
) -> None:
    rule = Rule(id="no", on="execute", match=match, deny=True)
    assert isinstance(applied(admit(principal, rule)).reply, Denied) is refused


# Roles --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("holders", "principal", "holds"),
    [
        (Holders(groups=("oncall",)), ANN, True),
        (Holders(groups=("on*",)), ANN, True),
        (Holders(groups=("oncall",)), BOT, False),
        (Holders(groups=("*",)), BOT, True),
        (Holders(groups=("*",)), BOB, False),  # it has no group
        (Holders(ids=("bob",)), BOB, True),
        (Holders(ids=("b*",)), BOT, True),
        (Holders(ids=("bob",), groups=("bots",)), BOT, True),
        (Holders(ids=("*",)), ANONYMOUS, False),
        (Holders(ids=("*", "anonymous")), ANONYMOUS, True),
        (Holders(ids=("anon*",), groups=("*",)), ANONYMOUS, False),
    ],
)
def test_a_role_is_held_by_id_and_by_group_and_by_anonymous_only_by_its_name(
    holders: Holders, principal: Principal, holds: bool
) -> None:
    assert Roles({"issuer": holders}).hold(principal, "issuer") is holds


def test_a_role_that_no_file_lists_is_held_by_no_principal() -> None:
    for principal in (ANN, BOB, BOT, ANONYMOUS):
        assert not any(NO_ROLES.hold(principal, role) for role in ROLES)
        assert NO_ROLES.of(principal) == frozenset()


@pytest.mark.parametrize("kind", ["human", "service", "agent"])
def test_only_a_human_can_be_an_approver_even_if_a_file_lists_others(kind: PrincipalKind) -> None:
    roles = Roles({"approver": Holders(groups=("*",), ids=("*",))})
    assert roles.hold(replace(ANN, kind=kind), "approver") is (kind == "human")


def test_the_roles_of_two_principals_with_one_id_are_their_own() -> None:
    roles = Roles({"issuer": Holders(groups=("oncall",)), "approver": Holders(ids=("*",))})
    for _ in range(2):  # the second time they are remembered
        assert roles.of(replace(ANN, kind="human", groups=("oncall",))) == {"issuer", "approver"}
        assert roles.of(replace(ANN, kind="agent", groups=("oncall",))) == {"issuer"}
        assert roles.of(replace(ANN, kind="agent", groups=())) == frozenset()


def test_the_roles_of_a_bounded_number_of_principals_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidecar.core.roles.MOST_KNOWN", 2)
    roles = Roles({"issuer": Holders(ids=("bot-*",))})
    for number in range(5):
        assert roles.of(replace(BOT, id=f"bot-{number}")) == {"issuer"}
        assert roles.of(replace(BOB, id=f"bob-{number}")) == frozenset()
    assert len(roles._known) <= 2


def test_the_refusal_names_the_weakest_role_that_would_do() -> None:
    refusal = role_required(BOT, "issuer", "operator")
    assert refusal.code == "role_required"
    assert refusal.members == {"role": "issuer", "principal": "bot-7"}
    assert "issuer or operator" in refusal.message
    roles = Roles({"operator": Holders(ids=("bob",))})
    assert roles.of(BOB) == {"operator"}


# Revoking -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("principal", "scope", "error"),
    [(ANN, SCOPE, None), (BOB, SCOPE, "role_required"), (ANN, UNPROVEN, "role_required")],
)
def test_a_caller_who_is_no_operator_revokes_only_scopes_that_it_asked_for(
    principal: Principal, scope: Scope, error: str | None
) -> None:
    result = applied(Revoke(decision_id="d-1", scope_id="scope_1", principal=principal, own_only=True), scope)
    if error is None:
        assert result.scope is not None
        assert result.scope.revoked_at == NOW + 1
    else:
        assert isinstance(result.reply, Denied)
        assert (result.reply.refusal.code, result.reply.refusal.members["role"]) == (error, "operator")
        assert result.scope is None
        assert entry(result).event == "refused"
