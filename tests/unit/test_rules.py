"""What rules say to one request: alone, together in any order, and judged in two halves or in one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sidecar.core.applied import Applied
from sidecar.core.apply import apply, judgment
from sidecar.core.brakes import AdmissionGroup
from sidecar.core.command import Admit, Admitted, Denied, Issue, Issued
from sidecar.core.facts import Claims
from sidecar.core.granting import granted
from sidecar.core.instant import iso_time
from sidecar.core.policy import (
    ActionPolicy,
    Brake,
    Condition,
    Joint,
    Limit,
    Match,
    PolicySet,
    Require,
    RiskClass,
    Rule,
    Subject,
)
from sidecar.core.principal import ANONYMOUS, Principal
from sidecar.core.record import Entry
from sidecar.core.rules import (
    Conditions,
    Objection,
    Preview,
    braked,
    judged,
    objections,
    preview,
    previewed,
    refusal_by,
    subject_of,
    unjudged,
)
from sidecar.core.scope import Execution, Scope
from sidecar.core.state import State
from sidecar.errors import ConditionFailed, Refusal

SECOND = 1_000_000
NOW = 1_767_225_600 * SECOND  # 2026-01-01T00:00:00Z

RISKS = {
    "retry_agent": RiskClass.LOW,
    "restart_pod": RiskClass.MEDIUM,
    "restart_node": RiskClass.HIGH,
    "failover_db": RiskClass.CRITICAL,
}
ACTIONS = (*RISKS, "odd")
TARGETS_REQUIRED = "restart_node"
CATALOGUE = {
    name: ActionPolicy(risk=risk, hold=1_000, targets_required=name == TARGETS_REQUIRED)
    for name, risk in RISKS.items()
}


@dataclass(frozen=True)
class When:
    """A condition: a plain function of the subject. It fails where that raises LookupError."""

    reads: frozenset[str] = frozenset()
    holds: Callable[[Subject], bool] = field(default=lambda subject: True, compare=False)
    text: str = "a plain function"

    def __call__(self, subject: Subject) -> bool:
        try:
            return self.holds(subject)
        except LookupError as exc:
            raise ConditionFailed(f"it finds no {exc}.") from exc


def when(reads: str, holds: Callable[[Subject], bool]) -> When:
    return When(reads=frozenset(reads.split()), holds=holds, text=reads)


def policies_of(*rules: Rule, **changes: Any) -> PolicySet:
    return PolicySet(**{"revision": "rev-1", "actions": CATALOGUE, "rules": rules, **changes})


SCOPE = Scope(
    scope_id="scope_1",
    tenant_id="default",
    incident_id="inc_1",
    allowed_actions=ACTIONS,
    max_cost=500_000,
    max_attempts=5,
    created_at=NOW - 90 * SECOND,
    expires_at=NOW + 300 * SECOND,
    intent="bring it back",
    target_agents=(),
    created_by="oncall",
    attempts_used=2,
)
GRANT = replace(SCOPE, allowed_actions=("retry_agent", "restart_pod"), attempts_used=0)
CLAIMS = Claims(scope_id="scope_1", incident_id="inc_1", action="restart_pod")


def subject(**changes: Any) -> Subject:
    return Subject(
        **{
            "action": "restart_pod",
            "risk": RiskClass.MEDIUM,
            "incident_id": "inc_1",
            "tenant_id": "default",
            "principal": "anonymous",
            "now": NOW,
            **changes,
        }
    )


def admit(policies: PolicySet, claims: Claims = CLAIMS, **changes: Any) -> Admit:
    return Admit(**{"decision_id": "d-1", "claims": claims, "policies": policies, **changes})


def issue(policies: PolicySet, **changes: Any) -> Issue:
    return Issue(**{"decision_id": "d-1", "scope": GRANT, "ttl": 300, "policies": policies, **changes})


def state(scope: Scope = SCOPE, *executions: Execution) -> State:
    """Everything that was executed is in every group that an execution may ask for."""
    groups = {AdmissionGroup(), *(AdmissionGroup(action=name) for name in ACTIONS)}
    groups |= {
        AdmissionGroup(tenant_id=one, incident_id=two, action=three)
        for one in ("default", "acme")
        for two in ("inc_1", "inc_2")
        for three in (None, *ACTIONS)
    }
    return State(
        scopes={scope.scope_id: scope},
        executions={one.decision_id: one for one in executions},
        admissions={group: [one.decision_id for one in executions if _in(group, one)] for group in groups},
    )


def _in(group: AdmissionGroup, execution: Execution) -> bool:
    return all(
        getattr(group, name) in (None, getattr(execution, name))
        for name in ("tenant_id", "incident_id", "action")
    )


def refusal_of(applied: Applied) -> Refusal | None:
    return applied.reply.refusal if isinstance(applied.reply, Denied) else None


def entry_of(applied: Applied) -> Entry:
    assert applied.entry is not None
    return applied.entry


def details_of(applied: Applied) -> Any:
    return entry_of(applied).record.details


# Subjects -----------------------------------------------------------------------------------------------


def test_an_execution_is_to_the_rules_what_it_claims_and_what_its_scope_says() -> None:
    claims = replace(CLAIMS, parameters={"force": True}, target_agents=("a",))
    bare = subject_of(claims, "acme", Principal(id="ann"), policies_of(), NOW)
    assert bare == Subject(
        action="restart_pod",
        risk=RiskClass.MEDIUM,
        incident_id="inc_1",
        tenant_id="acme",
        principal="ann",
        target_agents=("a",),
        parameters={"force": True},
        now=NOW,
    )
    assert (bare.intent, bare.max_cost, bare.attempts_used, bare.attempts_remaining) == ("", 0, 0, 0)
    whole = subject_of(claims, "acme", Principal(id="ann"), policies_of(), NOW, SCOPE)
    assert whole == replace(
        bare,
        intent="bring it back",
        max_cost=500_000,
        attempts_used=2,
        attempts_remaining=3,
        scope_age_seconds=90,
    )


def test_what_is_not_claimed_is_empty_and_what_is_not_listed_has_no_risk() -> None:
    nothing = subject_of(Claims(), "default", ANONYMOUS, policies_of(), NOW)
    assert (nothing.action, nothing.incident_id, nothing.risk) == ("", "", None)
    star = policies_of(unlisted=ActionPolicy(risk=RiskClass.HIGH))
    assert subject_of(Claims(action="odd"), "t", Principal(id="p"), star, NOW).risk is RiskClass.HIGH


@pytest.mark.parametrize(
    ("microseconds", "seconds"), [(0, 0), (999_999, 0), (SECOND, 1), (90_999_999, 90), (-5 * SECOND, 0)]
)
def test_a_scope_s_age_is_in_whole_seconds_and_never_negative(microseconds: int, seconds: int) -> None:
    scope = replace(SCOPE, created_at=NOW - microseconds)
    found = subject_of(CLAIMS, "default", ANONYMOUS, policies_of(), NOW, scope)
    assert found.scope_age_seconds == seconds


# One rule -----------------------------------------------------------------------------------------------


def said(rule: Rule, about: Subject) -> list[Objection]:
    return list(objections(rule, about))


def test_a_rule_that_denies_says_why() -> None:
    (one,) = said(Rule(id="freeze", on="execute", deny=True, reason="Holidays."), subject())
    assert one.refusal == Refusal(
        "policy_denied", "The rule denies it. freeze: Holidays.", {"rules": ["freeze"]}
    )
    assert (one.rule_id, one.shadow, one.until) == ("freeze", False, None)
    (bare,) = said(Rule(id="freeze", on="execute", deny=True, shadow=True), subject())
    assert bare.refusal.message == "The rule denies it. (rule freeze)"
    assert bare.shadow


@pytest.mark.parametrize(
    ("intent", "agents", "lacking"),
    [
        ("x" * 20, ("a",), []),
        ("x" * 19, ("a",), ["intent_min_chars"]),
        (" " * 9 + "x" * 19 + "\n", ("a",), ["intent_min_chars"]),
        ("\u200b" * 9 + "x" * 19 + "\u2800", ("a",), ["intent_min_chars"]),
        ("\u200b" + "x" + " " * 18 + "x", ("a",), []),
        ("x" * 20, (), ["target_agents"]),
        ("", (), ["intent_min_chars", "target_agents"]),
    ],
)
def test_a_requirement_names_what_is_lacking(
    intent: str, agents: tuple[str, ...], lacking: list[str]
) -> None:
    rule = Rule(id="say-it", on="issue", require=Require(intent_min_chars=20, target_agents=True))
    found = said(rule, subject(intent=intent, target_agents=agents))
    assert [one.refusal.members["require"] for one in found] == lacking
    only_agents = Rule(id="aim", on="issue", require=Require(target_agents=True))
    assert [one.refusal.members["require"] for one in said(only_agents, subject(target_agents=agents))] == [
        name for name in lacking if name == "target_agents"
    ]


def test_a_rule_whose_condition_could_not_be_judged_says_only_that() -> None:
    rule = Rule(id="odd", on="issue", require=Require(intent_min_chars=20), deny=True, reason="Because.")
    one = unjudged(rule, "it divides by zero.")
    assert one.refusal.code == "policy_denied"
    assert one.refusal.members == {"rules": ["odd"], "condition_error": "it divides by zero."}
    assert one.refusal.message == "The condition could not be judged: it divides by zero. odd: Because."


@pytest.mark.parametrize(
    ("microseconds", "seconds"),
    [
        (None, 1),
        (-SECOND, 1),
        (0, 1),
        (1, 1),
        (SECOND, 1),
        (SECOND + 1, 2),
        (2 * SECOND - 1, 2),
        (2 * SECOND, 2),
        (3600 * SECOND + 1, 3601),
    ],
)
def test_retry_after_is_rounded_up_to_whole_seconds_and_at_least_one(
    microseconds: int | None, seconds: int
) -> None:
    until = None if microseconds is None else NOW + microseconds
    rule = Rule(id="storm", on="execute", reason="Too often.")
    found = braked(rule, "3 are the most.", until, NOW, "then")
    assert found.refusal.retry_after_seconds == seconds
    assert found.refusal.members == {"rules": ["storm"], "retry_after_seconds": seconds, "ends_at": "then"}
    assert (found.refusal.code, found.refusal.message) == ("braked", "3 are the most. storm: Too often.")
    assert found.until == until


def test_an_objection_stands_in_records_without_the_list_of_its_rules() -> None:
    found = braked(Rule(id="storm", on="execute"), "Too often.", NOW, NOW, iso_time(NOW))
    assert found.to_dict() == {
        "rule": "storm",
        "error": "braked",
        "message": "Too often. (rule storm)",
        "retry_after_seconds": 1,
        "ends_at": "2026-01-01T00:00:00.000000+00:00",
    }
    bound = Objection(Refusal("scope_not_found", "No scope.", {"scope_id": "s"}), None, shadow=True)
    assert bound.to_dict() == {
        "rule": None,
        "error": "scope_not_found",
        "message": "No scope.",
        "scope_id": "s",
    }


# Objections together ------------------------------------------------------------------------------------


def denial(rule_id: str | None, **members: Any) -> Objection:
    rules = [] if rule_id is None else [rule_id]
    return Objection(Refusal("policy_denied", f"No to {rule_id}.", {"rules": rules, **members}), rule_id)


def brake(rule_id: str, until: int | None) -> Objection:
    return braked(Rule(id=rule_id, on="execute"), "Wait.", until, NOW, None)


def test_without_an_objection_that_counts_nothing_is_refused() -> None:
    assert refusal_by([]) is None
    assert refusal_by([replace(denial("quiet"), shadow=True)]) is None


def test_what_only_a_shadow_says_is_not_part_of_a_refusal() -> None:
    found = refusal_by([replace(denial("a-quiet"), shadow=True), denial("loud")])
    assert found == Refusal("policy_denied", "No to loud.", {"rules": ["loud"]})


def test_a_denial_goes_before_a_brake_and_names_no_brake() -> None:
    found = refusal_by([brake("a-brake", NOW + 9_000 * SECOND), denial("denial")])
    assert found == Refusal("policy_denied", "No to denial.", {"rules": ["denial"]})


def test_of_brakes_the_one_that_ends_last_is_said_and_one_that_nobody_knows_the_end_of_last() -> None:
    known = [brake("b", NOW + 2 * SECOND), brake("c", NOW + 9 * SECOND), brake("a", None)]
    for found in (refusal_by(known), refusal_by(known[::-1])):
        assert found is not None
        assert found.members["retry_after_seconds"] == 9
        assert found.members["rules"] == ["a", "b", "c"]
        assert found.message == "Wait. (rule c) Refused by a, b as well."


def test_an_answer_names_all_rules_and_its_message_the_first_few() -> None:
    found = refusal_by([denial(f"rule-{number}") for number in range(9)])
    assert found is not None
    assert found.members["rules"] == [f"rule-{number}" for number in range(9)]
    assert found.message == ("No to rule-0. Refused by rule-1, rule-2, rule-3, rule-4, rule-5 as well.")


def test_the_catalogue_refuses_before_any_rule_and_is_no_rule() -> None:
    found = refusal_by([denial("a-rule"), denial(None, action="odd")])
    assert found is not None
    assert found.members == {"rules": ["a-rule"], "action": "odd"}
    assert found.message == "No to None. Refused by a-rule as well."


# Grants -------------------------------------------------------------------------------------------------

ALL = frozenset({"max_attempts", "ttl_seconds", "max_cost_usd"})


def limiting(rule_id: str, **limit: int) -> Rule:
    return Rule(id=rule_id, on="issue", limit=Limit(**limit))


def test_a_limit_says_nothing_to_what_is_at_it() -> None:
    rules = limiting("exact", max_attempts=5, ttl_seconds=300, max_cost=500_000)
    granted = apply(issue(policies_of(rules)), state(), NOW)
    assert isinstance(granted.reply, Issued)
    assert details_of(granted)["rules"] == []


def test_a_limit_that_is_passed_is_named_with_its_value_in_dollars_where_it_is_money() -> None:
    for limit, told, message in (
        ({"max_attempts": 4}, ("max_attempts", 4), "max_attempts may be at most 4. (rule tight)"),
        ({"ttl_seconds": 299}, ("ttl_seconds", 299), "ttl_seconds may be at most 299. (rule tight)"),
        (
            {"max_cost": 499_999},
            ("max_cost_usd", 0.499999),
            "max_cost_usd may be at most 0.499999. (rule tight)",
        ),
    ):
        refusal = refusal_of(apply(issue(policies_of(limiting("tight", **limit))), state(), NOW))
        assert refusal == Refusal(
            "policy_denied", message, {"rules": ["tight"], "limit": told[0], "value": told[1]}
        )


def test_only_defaults_are_lowered_and_only_as_far_as_they_have_to() -> None:
    policies = policies_of(
        limiting("loose", max_attempts=4, ttl_seconds=200), limiting("tight", max_attempts=3, max_cost=1_000)
    )
    granted = apply(issue(policies, defaulted=ALL), state(), NOW)
    assert isinstance(granted.reply, Issued)
    scope = granted.reply.scope
    assert (scope.max_attempts, scope.max_cost, scope.expires_at) == (3, 1_000, NOW + 200 * SECOND)
    assert details_of(granted)["rules"] == ["loose", "tight"]
    refusal = refusal_of(apply(issue(policies, defaulted=ALL - {"ttl_seconds"}), state(), NOW))
    assert refusal is not None
    assert refusal.members == {"rules": ["loose"], "limit": "ttl_seconds", "value": 200}


def test_a_limit_in_shadow_lowers_no_default_and_only_records_what_it_would_refuse() -> None:
    shadow = replace(limiting("quiet", max_attempts=1, ttl_seconds=1), shadow=True)
    granted = apply(issue(policies_of(shadow), defaulted=frozenset({"ttl_seconds"})), state(), NOW)
    assert isinstance(granted.reply, Issued)
    scope = granted.reply.scope
    assert (scope.max_attempts, scope.expires_at) == (5, NOW + 300 * SECOND)
    assert details_of(granted)["rules"] == []
    assert [one["limit"] for one in details_of(granted)["would_refuse"]] == ["max_attempts"]


def test_the_strictest_of_several_limits_is_the_one_that_is_named() -> None:
    loose, strict = limiting("a-loose", max_attempts=3), limiting("b-strict", max_attempts=1)
    for rules in ((loose, strict), (strict, loose)):
        refusal = refusal_of(apply(issue(policies_of(*rules)), state(), NOW))
        assert refusal is not None
        assert refusal.members == {"rules": ["a-loose", "b-strict"], "limit": "max_attempts", "value": 1}


def test_a_rule_that_denies_outright_is_said_before_a_limit() -> None:
    outright = Rule(id="z-deny", on="issue", deny=True, reason="Not now.")
    refusal = refusal_of(
        apply(issue(policies_of(limiting("a-limit", max_attempts=1), outright)), state(), NOW)
    )
    assert refusal is not None
    assert refusal.members == {"rules": ["a-limit", "z-deny"]}
    assert refusal.message.startswith("The rule denies it. z-deny: Not now.")


def test_a_rule_that_objects_to_two_actions_in_the_same_words_objects_once() -> None:
    deny = Rule(id="quiet", on="issue", deny=True, shadow=True)
    granted = apply(issue(policies_of(deny)), state(), NOW)
    assert [one["rule"] for one in details_of(granted)["would_refuse"]] == ["quiet"]


# Two halves ---------------------------------------------------------------------------------------------


def ids(conditions: Conditions) -> list[str]:
    """The rules whose condition holds, where none failed."""
    assert not conditions.failed
    return [rule.id for rule in conditions.holding]


def late(known: Preview) -> list[str]:
    """The rules whose condition waits for the scope."""
    return [rule.id for bundle in known.bundles for group in bundle.late for rule in group.rules]


def asked_twice() -> tuple[list[Subject], Callable[[Subject], bool]]:
    seen: list[Subject] = []

    def holds(about: Subject) -> bool:
        seen.append(about)
        return True

    return seen, holds


def test_a_condition_that_reads_no_scope_state_is_judged_once_and_before() -> None:
    seen, holds = asked_twice()
    policies = policies_of(Rule(id="r", on="execute", when=when("action now parameters", holds), deny=True))
    about = subject_of(CLAIMS, "default", ANONYMOUS, policies, NOW)
    known = preview(policies, "execute", about)
    assert known.judged_at == NOW
    assert late(known) == []
    assert refusal_of(apply(admit(policies, preview=known), state(), NOW + SECOND)) is not None
    assert seen == [about]


def test_a_condition_that_reads_scope_state_waits_for_the_scope() -> None:
    seen, holds = asked_twice()
    policies = policies_of(Rule(id="r", on="execute", when=when("attempts_used", holds), deny=True))
    known = preview(policies, "execute", subject_of(CLAIMS, "default", ANONYMOUS, policies, NOW))
    assert late(known) == ["r"]
    assert seen == []
    apply(admit(policies, preview=known), state(), NOW)
    assert [one.attempts_used for one in seen] == [2]


def test_a_condition_on_a_grant_waits_for_nothing() -> None:
    policies = policies_of(Rule(id="r", on="issue", when=when("intent", lambda one: "x" in one.intent)))
    assert ids(preview(policies, "issue", subject(intent="no")).early) == []
    found = preview(policies, "issue", subject(intent="x"))
    assert ids(found.early) == ["r"]
    assert late(found) == []


def test_what_does_not_apply_is_left_out_before_its_condition_is_asked() -> None:
    seen, holds = asked_twice()
    rule = Rule(id="r", on="execute", match=Match(tenant_id=("acme",)), when=when("action", holds))
    assert preview(policies_of(rule), "execute", subject()).bundles == ()
    assert seen == []
    assert ids(preview(policies_of(rule), "execute", subject(tenant_id="acme")).early) == ["r"]


def test_a_condition_that_waited_and_does_not_hold_applies_no_more() -> None:
    rules = [
        Rule(id="used", on="execute", when=when("attempts_used", lambda one: one.attempts_used > 1)),
        Rule(id="unused", on="execute", when=when("attempts_used", lambda one: one.attempts_used == 0)),
    ]
    known = preview(policies_of(*rules), "execute", subject())
    assert late(known) == ["used", "unused"]
    (bundle,) = known.bundles
    assert ids(
        judged(
            bundle.late,
            subject_of(CLAIMS, "default", ANONYMOUS, policies_of(*rules), NOW, SCOPE),
        )
    ) == ["used"]


@pytest.mark.parametrize("reads", ["parameters", "attempts_used"])
def test_a_condition_that_fails_refuses_in_either_half(reads: str) -> None:
    rule = Rule(id="odd", on="execute", when=when(reads, lambda one: bool(one.parameters["size"])))
    policies = policies_of(rule)
    known = preview(policies, "execute", subject_of(CLAIMS, "default", ANONYMOUS, policies, NOW))
    for command in (admit(policies), admit(policies, preview=known)):
        refusal = refusal_of(apply(command, state(), NOW))
        assert refusal is not None
        assert refusal.code == "policy_denied"
        assert refusal.members == {"rules": ["odd"], "condition_error": "it finds no 'size'."}


def test_a_rule_whose_condition_could_not_be_judged_neither_limits_nor_counts() -> None:
    failing = when("parameters", lambda one: bool(one.parameters["size"]))
    limit = replace(limiting("limit", max_attempts=1), when=failing, shadow=True)
    storm = Rule(id="storm", on="execute", when=failing, brake=Brake(cooldown_seconds=60), shadow=True)
    policies = policies_of(limit, storm)
    past = state(SCOPE, execution("e-1", at=NOW - SECOND))
    for command, rule_id in ((issue(policies), "limit"), (admit(policies), "storm")):
        (told,) = details_of(apply(command, past, NOW))["would_refuse"]
        assert (told["rule"], told["error"]) == (rule_id, "policy_denied")
    found = judgment(admit(policies), past, NOW)
    assert found.uses == ()


def test_conditions_judged_together_that_fail_are_judged_one_by_one() -> None:
    def join(conditions: Sequence[Condition]) -> Joint:
        def judge(about: Subject) -> list[bool]:
            together.append(about)
            return [one(about) for one in conditions]

        return judge

    together: list[Subject] = []
    rules = [
        Rule(id=f"size-{size}", on="execute", when=when("parameters", sized(size)), deny=True)
        for size in range(3)
    ]
    policies = policies_of(*rules, join=join)
    known = preview(policies, "execute", subject(parameters={"size": 1}))
    assert ids(known.early) == ["size-1"]
    assert ids(preview(policies, "execute", subject(parameters={"size": 9})).early) == []
    failed = preview(policies, "execute", subject())
    assert [rule.id for rule, why in failed.early.failed] == ["size-0", "size-1", "size-2"]
    assert len(together) == 3


def sized(size: int) -> Callable[[Subject], bool]:
    return lambda about: bool(about.parameters["size"] == size)


def test_a_record_says_when_a_condition_was_judged_if_that_was_before() -> None:
    conditional = policies_of(Rule(id="r", on="execute", when=when("now", lambda one: True), shadow=True))
    for policies, told in ((conditional, True), (policies_of(), False)):
        about = subject_of(CLAIMS, "default", ANONYMOUS, policies, NOW - SECOND)
        known = preview(policies, "execute", about)
        details = details_of(apply(admit(policies, preview=known), state(), NOW))
        assert details.get("judged_at") == (iso_time(NOW - SECOND) if told else None)
        assert "judged_at" not in details_of(apply(admit(policies), state(), NOW))


def test_a_judgment_says_how_far_each_brake_that_applies_is_used() -> None:
    rules = [
        Rule(id="used", on="execute", brake=Brake(max_attempts=2, window_seconds=60)),
        Rule(id="elsewhere", on="execute", match=Match(tenant_id=("acme",)), brake=Brake(cooldown_seconds=9)),
        Rule(id="no-brake", on="execute"),
    ]
    policies = policies_of(*rules)
    known = state(SCOPE, execution("e-1", at=NOW - SECOND))
    found = judgment(admit(policies), known, NOW)
    assert found.refusal is None
    assert [(rule.id, used.count, used.until) for rule, used in found.uses] == [("used", 1, None)]


# Without a scope ----------------------------------------------------------------------------------------

BARE = replace(CLAIMS, scope_id=None)
DENY = Rule(id="freeze", on="execute", deny=True)


def test_below_the_threshold_an_execution_without_a_scope_is_recorded_as_one() -> None:
    applied = apply(admit(policies_of(), BARE, scope_required_from=RiskClass.HIGH), state(), NOW)
    assert isinstance(applied.reply, Admitted)
    assert (applied.scope, applied.reply.scope, applied.reply.shadow) == (None, None, ())
    execution = applied.reply.execution
    assert (execution.scope_id, execution.attempt_number, execution.hold) == (None, None, 1_000)
    assert entry_of(applied).scope_id is None
    assert details_of(applied) == {
        "attempt_number": None,
        "attempts_remaining": None,
        "hold_usd": 0.001,
        "risk": "medium",
        "granted_to": None,
        "scope_waived": "medium risk needs no scope (gate.scope_required_from)",
        "policy_revision": "rev-1",
        "rules": [],
    }
    at_it = apply(admit(policies_of(), BARE, scope_required_from=RiskClass.MEDIUM), state(), NOW)
    refusal = refusal_of(at_it)
    assert refusal is not None
    assert refusal.code == "scoped_execution_required"


def test_below_the_threshold_rules_hold_and_a_scope_that_is_named_counts() -> None:
    low: dict[str, Any] = {"scope_required_from": RiskClass.CRITICAL}
    denied = refusal_of(apply(admit(policies_of(DENY), BARE, **low), state(), NOW))
    assert denied is not None
    assert denied.members["rules"] == ["freeze"]
    consumed = apply(admit(policies_of(), **low), state(), NOW).scope
    assert consumed == replace(SCOPE, attempts_used=3, held=1_000)
    gone = refusal_of(apply(admit(policies_of(), replace(CLAIMS, scope_id="gone"), **low), state(), NOW))
    assert gone is not None
    assert gone.code == "scope_not_found"


def test_a_shadow_route_lets_through_what_has_no_valid_scope_and_says_what_was_wrong() -> None:
    for claims, wrong in (
        (BARE, "scoped_execution_required"),
        (replace(CLAIMS, scope_id="gone"), "scope_not_found"),
        (replace(CLAIMS, incident_id="inc_2"), "incident_mismatch"),
    ):
        applied = apply(admit(policies_of(DENY), claims, shadow=True), state(), NOW)
        assert isinstance(applied.reply, Admitted)
        assert (applied.scope, applied.reply.execution.scope_id) == (None, None)
        assert applied.reply.execution.attempt_number is None
        assert entry_of(applied).scope_id is None
        details = details_of(applied)
        assert [(one["rule"], one["error"]) for one in details["would_refuse"]] == [
            (None, wrong),
            ("freeze", "policy_denied"),
        ]
        assert (details["scope_waived"], details["route_mode"]) == ("the route is in shadow mode", "shadow")


def test_a_shadow_route_consumes_a_valid_scope_even_for_what_is_forbidden() -> None:
    applied = apply(admit(policies_of(DENY), replace(CLAIMS, action="odd"), shadow=True), state(), NOW)
    assert isinstance(applied.reply, Admitted)
    assert applied.scope == replace(SCOPE, attempts_used=3)
    assert entry_of(applied).scope_id == "scope_1"
    details = details_of(applied)
    assert [one["rule"] for one in details["would_refuse"]] == [None, "freeze"]
    assert "scope_waived" not in details


def test_a_grant_for_targets_that_are_not_named_is_refused_where_the_catalogue_wants_them() -> None:
    aimed = replace(GRANT, allowed_actions=(TARGETS_REQUIRED,))
    refusal = refusal_of(apply(issue(policies_of(), scope=aimed), state(), NOW))
    assert refusal is not None
    assert refusal.members == {"rules": [], "action": TARGETS_REQUIRED}
    named = replace(aimed, target_agents=("a",))
    assert isinstance(apply(issue(policies_of(), scope=named), state(), NOW).reply, Issued)


# Any rules, in any order --------------------------------------------------------------------------------


def execution(name: str, *, at: int, **changes: Any) -> Execution:
    return Execution(
        **{
            "decision_id": name,
            "scope_id": None,
            "tenant_id": "default",
            "incident_id": "inc_1",
            "action": "restart_pod",
            "request_id": "r",
            "attempt_number": None,
            "hold": 0,
            "admitted_at": at,
            "status": "answered",
            **changes,
        }
    )


def matches(match: Match, action: str, risk: RiskClass | None) -> bool:
    """The part of a match that the action decides, looked up the plain way."""
    by_name = not match.action or any(fnmatchcase(action, glob) for glob in match.action)
    return by_name and (not match.risk or risk in match.risk)


CONDITIONS = st.sampled_from(
    [
        when("principal", lambda one: one.principal == "ann"),
        when("now", lambda one: one.now % (2 * SECOND) == 0),
        when("parameters", lambda one: bool(one.parameters["size"])),
        when("attempts_used", lambda one: one.attempts_used > 1),
        when("intent target_agents", lambda one: "back" in one.intent and not one.target_agents),
        when("scope_age_seconds parameters", lambda one: one.parameters["size"] < one.scope_age_seconds),
        when("max_cost_micros", lambda one: one.max_cost > 100_000),
    ]
)
MATCHES = st.builds(
    Match,
    risk=st.just(frozenset()) | st.frozensets(st.sampled_from(RiskClass), max_size=3),
    action=st.just(())
    | st.lists(st.sampled_from(["restart_*", "*_db", "restart_[np]*", "*", *ACTIONS]), max_size=3).map(tuple),
    incident_id=st.sampled_from([(), (), (), ("inc_1",), ("x*",)]),
    tenant_id=st.sampled_from([(), (), (), ("default",), ("acme",)]),
    principal=st.sampled_from([(), (), (), ("a*",)]),
    principal_kind=st.sampled_from([(), (), (), ("agent",)]),
    principal_group=st.sampled_from([(), (), (), ("d*", "oncall")]),
    target_agents=st.sampled_from([(), (), (), ("a",)]),
)
BRAKES = st.builds(
    Brake,
    per=st.sampled_from([(), ("incident_id",), ("action",), ("principal", "tenant_id"), ("target_agents",)]),
    max_attempts=st.none() | st.integers(1, 3),
    window_seconds=st.sampled_from([5, 60, 600]),
    cooldown_seconds=st.sampled_from([0, 0, 5, 61]),
    one_in_flight=st.booleans(),
)


@st.composite
def rule_sets(draw: st.DrawFn, most: int = 6) -> tuple[Rule, ...]:
    """Rules of every kind, with ids that say nothing about what they do."""
    rules = []
    for rule_id in draw(st.permutations([f"rule-{letter}" for letter in "abcdef"[:most]])):
        kind = draw(st.sampled_from(["none", "limit", "require", "brake", "brake", "deny"]))
        if kind == "none":
            continue
        on = {"limit": "issue", "brake": "execute"}.get(kind) or draw(st.sampled_from(["issue", "execute"]))
        limit = st.builds(
            Limit,
            max_attempts=st.none() | st.integers(1, 6),
            ttl_seconds=st.none() | st.sampled_from([1, 200, 300]),
            max_cost=st.none() | st.sampled_from([0, 400_000, 500_000]),
        )
        require = st.builds(
            Require,
            intent_min_chars=st.sampled_from([0, 13, 14]),
            target_agents=st.booleans(),
            executor_is_not_issuer=st.booleans() if on == "execute" else st.just(False),
            executor_is_issuer=st.booleans() if on == "execute" else st.just(False),
        )
        rules.append(
            Rule(
                id=rule_id,
                on="issue" if on == "issue" else "execute",
                match=draw(MATCHES),
                when=draw(st.none() | CONDITIONS),
                limit=draw(limit) if kind == "limit" else None,
                require=draw(require) if kind == "require" else None,
                brake=draw(BRAKES) if kind == "brake" else None,
                deny=kind == "deny",
                shadow=draw(st.sampled_from([False, False, True])),
                reason=draw(st.sampled_from(["", "Because."])),
            )
        )
    return tuple(rules)


@st.composite
def pasts(draw: st.DrawFn) -> State:
    """Executions of the last ten minutes, and the scope."""
    executions = [
        execution(
            f"e-{number}",
            at=NOW - draw(st.integers(0, 600)) * SECOND,
            action=draw(st.sampled_from(ACTIONS)),
            incident_id=draw(st.sampled_from(["inc_1", "inc_1", "inc_2"])),
            tenant_id=draw(st.sampled_from(["default", "default", "acme"])),
            principal=draw(st.sampled_from(["anonymous", "ann"])),
            principal_kind=draw(st.sampled_from(["human", "agent"])),
            principal_groups=draw(st.sampled_from([(), ("oncall",), ("oncall", "dba")])),
            target_agents=draw(st.sampled_from([(), ("a",), ("b",)])),
            status=draw(st.sampled_from(["answered", "answered", "unknown", "in_flight", "not_sent"])),
        )
        for number in range(draw(st.integers(0, 8)))
    ]
    scope = replace(SCOPE, attempts_used=draw(st.sampled_from([0, 2, 5])))
    return state(scope, *executions)


PRINCIPALS = (
    ANONYMOUS,
    Principal(id="ann", kind="human", groups=("oncall",), method="tokens"),
    Principal(id="bot-7", kind="agent", groups=("bots", "dba"), method="jwt"),
)


@st.composite
def requests(draw: st.DrawFn) -> Callable[[PolicySet], Admit]:
    """An execution under any policies: with its scope or none, on a shadow route or not."""
    claims = Claims(
        scope_id=draw(st.sampled_from(["scope_1", "scope_1", None, "scope_nobody"])),
        incident_id=draw(st.sampled_from(["inc_1", "inc_1", "inc_1", "inc_2", None])),
        action=draw(st.sampled_from(ACTIONS)),
        parameters=draw(st.sampled_from([{}, {"size": 0}, {"size": 9}])),
        target_agents=draw(st.sampled_from([(), ("a",), ("a", "b")])),
    )
    options = {
        "principal": draw(st.sampled_from(PRINCIPALS)),
        "scope_required_from": draw(st.sampled_from([RiskClass.LOW, RiskClass.LOW, RiskClass.CRITICAL])),
        "shadow": draw(st.sampled_from([False, False, True])),
    }
    return lambda policies: admit(policies, claims, **options)


@st.composite
def grants(draw: st.DrawFn) -> Callable[[PolicySet], Issue]:
    """A grant under any policies."""
    scope = replace(
        SCOPE,
        allowed_actions=tuple(draw(st.lists(st.sampled_from(ACTIONS), min_size=1, max_size=3, unique=True))),
        target_agents=draw(st.sampled_from([(), ("a",), ("a", "b")])),
        max_attempts=draw(st.integers(1, 7)),
        attempts_used=0,
    )
    options = {
        "principal": draw(st.sampled_from(PRINCIPALS)),
        "defaulted": draw(st.sampled_from([frozenset(), ALL, frozenset({"max_attempts"})])),
    }
    return lambda policies: issue(policies, scope=scope, **options)


COMMANDS = st.one_of(requests(), grants())
STARS = st.sampled_from([None, ActionPolicy(risk=RiskClass.LOW, hold=7)])


def in_two_orders(rules: tuple[Rule, ...]) -> st.SearchStrategy[tuple[Sequence[Rule], Sequence[Rule]]]:
    return st.tuples(st.just(rules), st.permutations(rules))


ONE_IN_FLIGHT = Rule(id="a-brake", on="execute", match=Match(), brake=Brake(one_in_flight=True))
NAMES_AGENTS = Rule(id="b-requires", on="execute", match=Match(), require=Require(target_agents=True))


@given(orders=rule_sets().flatmap(in_two_orders), past=pasts(), make=COMMANDS, star=STARS)
@example(  # a brake and a requirement, both of which object
    orders=((ONE_IN_FLIGHT, NAMES_AGENTS), (NAMES_AGENTS, ONE_IN_FLIGHT)),
    past=state(SCOPE, execution("e-0", at=NOW - SECOND, status="in_flight")),
    make=admit,
    star=None,
)
def test_the_order_of_rules_changes_neither_the_answer_nor_the_record(
    orders: tuple[Sequence[Rule], Sequence[Rule]],
    past: State,
    make: Callable[[PolicySet], Admit | Issue],
    star: ActionPolicy | None,
) -> None:
    one, other = (apply(make(policies_of(*rules, unlisted=star)), past, NOW) for rules in orders)
    assert one == other


@given(rules=rule_sets(), past=pasts(), make=COMMANDS, star=STARS)
def test_a_rule_more_never_turns_a_refusal_into_an_admission(
    rules: tuple[Rule, ...],
    past: State,
    make: Callable[[PolicySet], Admit | Issue],
    star: ActionPolicy | None,
) -> None:
    refused = False
    for count in range(len(rules) + 1):
        reply = apply(make(policies_of(*rules[:count], unlisted=star)), past, NOW).reply
        assert not (refused and not isinstance(reply, Denied))
        refused = isinstance(reply, Denied)


@given(rules=rule_sets(), past=pasts(), make=COMMANDS, star=STARS)
def test_rules_refuse_together_exactly_what_one_of_them_refuses_alone(
    rules: tuple[Rule, ...],
    past: State,
    make: Callable[[PolicySet], Admit | Issue],
    star: ActionPolicy | None,
) -> None:
    bare = apply(make(policies_of(unlisted=star)), past, NOW).reply
    alone = {rule.id: apply(make(policies_of(rule, unlisted=star)), past, NOW).reply for rule in rules}
    together = apply(make(policies_of(*rules, unlisted=star)), past, NOW).reply
    refusals = {rule_id: found.refusal for rule_id, found in alone.items() if isinstance(found, Denied)}
    if isinstance(bare, Denied) and bare.refusal.code != "invalid_scope":
        assert isinstance(together, Denied)
        assert together.refusal.code == bare.refusal.code
        return
    if refusals and {found.code for found in refusals.values()} == {"invalid_scope"}:
        # Nothing denies the grant, but its ceiling is below a hold, perhaps because a rule has lowered it.
        assert isinstance(together, Denied)
        assert together.refusal.code == "invalid_scope"
        return
    if isinstance(bare, Denied) and not refusals:
        assert not rules
        return
    if not refusals:
        assert isinstance(together, Admitted | Issued)
        would = [one for found in alone.values() for one in _shadow(found)]
        rest = [one for one in would if one.rule_id is not None] + list(_shadow(bare))
        assert sorted(map(repr, _shadow(together))) == sorted(map(repr, rest))
        if isinstance(together, Issued):
            scopes = [found.scope for found in alone.values() if isinstance(found, Issued)]
            for term in ("max_attempts", "max_cost", "expires_at"):
                least = min((getattr(one, term) for one in scopes), default=getattr(_issued(bare), term))
                assert getattr(together.scope, term) == least
        return
    assert isinstance(together, Denied)
    codes = {found.code for found in refusals.values()}
    code = "policy_denied" if "policy_denied" in codes else "braked"
    alike = {rule_id: found for rule_id, found in refusals.items() if found.code == code}
    assert (together.refusal.code, together.refusal.members["rules"]) == (code, sorted(alike))
    if code == "braked":
        longest = max(found.members["retry_after_seconds"] for found in alike.values())
        assert together.refusal.members["retry_after_seconds"] == longest
    limits = [found.members for found in alike.values() if "limit" in found.members]
    if "limit" in together.refusal.members:
        named = together.refusal.members["limit"]
        assert len(limits) == len(alike), "a limit is named only where nothing denies outright"
        assert together.refusal.members["value"] == min(
            found["value"] for found in limits if found["limit"] == named
        )


def _shadow(reply: Any) -> Sequence[Objection]:
    found: Sequence[Objection] = reply.shadow
    return found


def _issued(reply: Any) -> Scope:
    assert isinstance(reply, Issued)
    return reply.scope


@given(rules=rule_sets(), past=pasts(), make=requests(), star=STARS)
def test_judged_in_two_halves_or_in_one_the_answer_and_the_record_are_the_same(
    rules: tuple[Rule, ...],
    past: State,
    make: Callable[[PolicySet], Admit],
    star: ActionPolicy | None,
) -> None:
    policies = policies_of(*rules, unlisted=star)
    within = make(policies)
    about = subject_of(within.claims, within.tenant_id, within.principal, policies, NOW)
    known = preview(policies, "execute", about)
    assert previewed(within.claims, within.tenant_id, within.principal, policies, NOW) == known
    before = replace(within, preview=known)
    one, other = apply(within, past, NOW), apply(before, past, NOW)
    assert replace(one, entry=None) == replace(other, entry=None)
    assert _unjudged(entry_of(one)) == _unjudged(entry_of(other))


def _unjudged(entry: Entry) -> Entry:
    details = {name: value for name, value in entry.record.details.items() if name != "judged_at"}
    return replace(entry, record=replace(entry.record, details=details))


def test_a_grant_that_was_judged_before_gets_the_same_answer_and_its_record_says_when() -> None:
    asked_about: list[str] = []

    def late_enough(subject: Subject) -> bool:
        asked_about.append(subject.action)
        return subject.now >= NOW

    late = when("now", late_enough)
    by_action = when("action", lambda subject: subject.action == "retry_agent")
    policies = policies_of(
        Rule(id="late", on="issue", when=late, limit=Limit(max_attempts=1)),
        Rule(id="retries", on="issue", when=by_action, limit=Limit(ttl_seconds=60)),
    )
    command = issue(policies, defaulted=frozenset({"max_attempts", "ttl_seconds"}))
    plain = apply(command, State(), NOW)
    judged = apply(replace(command, judged=granted(command, NOW)), State(), NOW + SECOND)
    assert plain.entry is not None
    assert judged.entry is not None
    assert judged.entry.record.details["rules"] == plain.entry.record.details["rules"]
    assert judged.entry.record.details["judged_at"] == iso_time(NOW)
    assert "judged_at" not in plain.entry.record.details
    # What does not look at the action is asked once, however many actions are asked for.
    assert len(asked_about) == 2
