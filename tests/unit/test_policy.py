"""The policy set: whom a rule is about, and how the rules for an action are found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.core import policy
from sidecar.core.policy import (
    FACTS,
    MOST_SELECTED_AGENTS,
    MOST_SELECTIONS,
    MOST_UNLISTED,
    SCOPE_FACTS,
    ActionPolicy,
    Brake,
    Condition,
    Joint,
    Match,
    Phase,
    PolicySet,
    RiskClass,
    Rule,
    Subject,
)
from sidecar.core.principal import PrincipalKind
from tests.unit.test_rules import ACTIONS, RISKS, When, matches, rule_sets

PHASES: tuple[Phase, ...] = ("issue", "execute")
NOBODY = {"incident_id": "", "tenant_id": "", "principal": "", "target_agents": ()}


def caller(
    incident_id: str,
    tenant_id: str,
    principal: str,
    target_agents: tuple[str, ...],
    kind: PrincipalKind = "service",
    groups: tuple[str, ...] = (),
) -> Subject:
    return Subject(
        action="restart_pod",
        risk=None,
        incident_id=incident_id,
        tenant_id=tenant_id,
        principal=principal,
        principal_kind=kind,
        principal_groups=groups,
        target_agents=target_agents,
    )


def test_an_empty_match_is_about_everybody() -> None:
    for risk in (None, *RiskClass):
        assert Match().action_matches("anything", risk)
    assert Match().rest_matches(caller("inc", "tenant", "ann", ("a",), "human", ("oncall",)))
    assert Match().rest_matches(caller("", "", "", ()))


def test_the_action_is_matched_by_its_name_and_its_risk() -> None:
    match = Match(risk=frozenset({RiskClass.HIGH, RiskClass.CRITICAL}), action=("restart_*", "failover_db"))
    assert match.action_matches("restart_node", RiskClass.HIGH)
    assert match.action_matches("failover_db", RiskClass.CRITICAL)
    assert not match.action_matches("restart_node", RiskClass.LOW)
    assert not match.action_matches("restart_node", None)
    assert not match.action_matches("retry_agent", RiskClass.HIGH)


@pytest.mark.parametrize(
    ("match", "yes", "no"),
    [
        (Match(incident_id=("drill-*",)), ("drill-1", "t", "p", ()), ("inc-1", "t", "p", ())),
        (Match(tenant_id=("acme",)), ("i", "acme", "p", ()), ("i", "other", "p", ())),
        (Match(principal=("ann", "b*")), ("i", "t", "bob", ()), ("i", "t", "carl", ())),
        (Match(principal_kind=("agent",)), ("i", "t", "p", (), "agent"), ("i", "t", "p", (), "human")),
        (
            Match(principal_group=("sre-*", "oncall")),
            ("i", "t", "p", (), "human", ("dba", "sre-leads")),
            ("i", "t", "p", (), "human", ("dba",)),
        ),
        (Match(principal_group=("*",)), ("i", "t", "p", (), "human", ("dba",)), ("i", "t", "p", ())),
        (Match(target_agents=("db-*",)), ("i", "t", "p", ("web-1", "db-1")), ("i", "t", "p", ("web-1",))),
        (Match(target_agents=("*",)), ("i", "t", "p", ("web-1",)), ("i", "t", "p", ())),
        (
            Match(incident_id=("i",), tenant_id=("t",), principal=("p",), target_agents=("a",)),
            ("i", "t", "p", ("a",)),
            ("i", "t", "p", ("b",)),
        ),
    ],
)
def test_each_member_of_a_match_has_to_agree_and_of_target_agents_one_is_enough(
    match: Match, yes: tuple[Any, ...], no: tuple[Any, ...]
) -> None:
    assert match.rest_matches(caller(*yes))
    assert not match.rest_matches(caller(*no))


def test_a_brake_looks_back_as_far_as_the_longer_of_its_two_times() -> None:
    assert Brake(window_seconds=60, cooldown_seconds=5).horizon_seconds == 60
    assert Brake(window_seconds=60, cooldown_seconds=90).horizon_seconds == 90
    assert Brake(cooldown_seconds=5).horizon_seconds == 5


def test_only_a_condition_on_what_the_scope_knows_reads_the_scope() -> None:
    assert not Rule(id="plain", on="execute").reads_scope
    for fact in FACTS:
        rule = Rule(id=fact, on="execute", when=When(reads=frozenset({"action", fact})))
        assert rule.reads_scope is (fact in SCOPE_FACTS)
    assert frozenset(FACTS) > SCOPE_FACTS


# Finding the rules for an action --------------------------------------------------------------------------


def ids(rules: tuple[Rule, ...]) -> set[str]:
    assert len({rule.id for rule in rules}) == len(rules), "a rule was found twice"
    return {rule.id for rule in rules}


def test_rules_are_found_by_name_by_pattern_and_by_risk() -> None:
    policies = PolicySet(
        revision="r",
        actions={
            "restart_pod": ActionPolicy(risk=RiskClass.MEDIUM),
            "failover_db": ActionPolicy(risk=RiskClass.CRITICAL),
        },
        rules=(
            Rule(id="named", on="execute", match=Match(action=("restart_pod", "restart_pod"))),
            Rule(id="both", on="execute", match=Match(action=("restart_pod", "failover_*"))),
            Rule(id="pattern", on="execute", match=Match(action=("restart_*",))),
            Rule(id="risky", on="execute", match=Match(risk=frozenset({RiskClass.CRITICAL}))),
            Rule(
                id="risky-by-name",
                on="execute",
                match=Match(risk=frozenset({RiskClass.CRITICAL}), action=("restart_pod", "failover_db")),
            ),
            Rule(id="all", on="execute"),
            Rule(id="grants", on="issue"),
        ),
    )
    assert ids(policies.about("execute", "restart_pod")) == {"named", "both", "pattern", "all"}
    assert ids(policies.about("execute", "failover_db")) == {"both", "risky", "risky-by-name", "all"}
    assert ids(policies.about("execute", "restart_node")) == {"pattern", "all"}
    assert ids(policies.about("issue", "restart_pod")) == {"grants"}


def test_an_action_that_is_not_listed_has_the_star_s_risk_or_none() -> None:
    rules = (
        Rule(id="risky", on="issue", match=Match(risk=frozenset({RiskClass.HIGH}))),
        Rule(id="named", on="issue", match=Match(action=("odd",))),
    )
    star = ActionPolicy(risk=RiskClass.HIGH)
    without = PolicySet(revision="r", actions={}, rules=rules)
    with_star = PolicySet(revision="r", actions={}, unlisted=star, rules=rules)
    assert ids(without.about("issue", "odd")) == {"named"}
    assert ids(with_star.about("issue", "odd")) == {"named", "risky"}
    assert (without.action("odd"), with_star.action("odd")) == (None, star)


def test_the_brakes_of_an_action_are_its_rules_that_count() -> None:
    brake = Brake(max_attempts=1, window_seconds=60)
    policies = PolicySet(
        revision="r",
        actions={"restart_pod": ActionPolicy(risk=RiskClass.LOW)},
        rules=(
            Rule(id="counts", on="execute", brake=brake),
            Rule(id="counts-in-shadow", on="execute", brake=brake, shadow=True),
            Rule(id="denies", on="execute", deny=True),
            Rule(id="elsewhere", on="execute", match=Match(action=("failover_db",)), brake=brake),
        ),
    )
    subject = Subject(
        action="restart_pod", risk=RiskClass.LOW, incident_id="inc", tenant_id="t", principal="p"
    )
    (bundle,) = policies.selected("execute", subject)
    (tally,) = bundle.tallies
    assert ids(tally.rules) == {"counts", "counts-in-shadow"}
    assert policies.horizons("restart_pod") == ((False, False, 60),)


@given(rules=rule_sets(), star=st.none() | st.sampled_from(RiskClass))
def test_what_is_found_for_an_action_is_what_looking_at_every_rule_would_find(
    rules: tuple[Rule, ...], star: RiskClass | None
) -> None:
    unlisted = None if star is None else ActionPolicy(risk=star)
    catalogue = {name: ActionPolicy(risk=risk) for name, risk in RISKS.items()}
    policies = PolicySet(revision="r", actions=catalogue, unlisted=unlisted, rules=rules)
    for action in (*ACTIONS, "restart_", "never heard of", ""):
        risk = RISKS.get(action, star)
        about = {rule.id for rule in rules if rule.on == "execute" and matches(rule.match, action, risk)}
        for _ in range(2):  # the second time it is known
            assert ids(policies.about("execute", action)) == about
        horizons: dict[tuple[bool, bool], int] = {}
        for rule in rules:
            if rule.brake and rule.id in about:
                key = "incident_id" in rule.brake.per, "action" in rule.brake.per
                horizons[key] = max(horizons.get(key, 0), rule.brake.horizon_seconds)
        assert {(one, two): seconds for one, two, seconds in policies.horizons(action)} == horizons


def test_names_that_nobody_listed_do_not_pile_up_in_memory() -> None:
    policies = PolicySet(revision="r", actions={"known": ActionPolicy(risk=RiskClass.LOW)})
    for number in range(MOST_UNLISTED + 1_000):
        policies.about("execute", f"invented-{number}")
        assert len(policies._found) <= MOST_UNLISTED + 1
    policies.about("execute", "known")
    assert ("execute", "known") in policies._found


def test_a_brake_on_issue_counts_nothing() -> None:
    policies = PolicySet(
        revision="r", actions={}, rules=(Rule(id="r", on="issue", brake=Brake(cooldown_seconds=1)),)
    )
    (bundle,) = policies.selected("issue", somebody())
    assert (bundle.standing, bundle.tallies) == ((), ())


# Selecting the rules that match a request -----------------------------------------------------------------


def somebody(**facts: Any) -> Subject:
    known = {
        "action": "restart_pod",
        "risk": RiskClass.MEDIUM,
        "incident_id": "inc_1",
        "tenant_id": "default",
    }
    return Subject(**{**known, "principal": "anonymous", **facts})


SOMEBODY = st.builds(
    somebody,
    action=st.sampled_from(ACTIONS),
    incident_id=st.sampled_from(["inc_1", "x-ray", ""]),
    tenant_id=st.sampled_from(["default", "acme"]),
    principal=st.sampled_from(["ann", "bob"]),
    target_agents=st.sampled_from([(), ("a",), ("b", "a"), ("b",), ("b",) * MOST_SELECTED_AGENTS + ("a",)]),
)


@given(rules=rule_sets(), asking=st.lists(SOMEBODY, max_size=12))
def test_the_rules_that_are_selected_are_those_that_match_whoever_asked_before(
    rules: tuple[Rule, ...], asking: list[Subject]
) -> None:
    catalogue = {name: ActionPolicy(risk=risk) for name, risk in RISKS.items()}
    policies = PolicySet(revision="r", actions=catalogue, rules=rules)
    for subject in asking:
        for phase in PHASES:
            found = [
                rule.id
                for bundle in policies.selected(phase, subject)
                for rule in (
                    *(rule for rule in bundle.standing if rule.brake is None),
                    *(rule for tally in bundle.tallies for rule in tally.rules),
                    *(rule for group in (*bundle.early, *bundle.late) for rule in group.rules),
                )
            ]
            wanted = [
                rule.id
                for rule in rules
                if rule.on == phase
                and matches(rule.match, subject.action, RISKS.get(subject.action))
                and rule.match.rest_matches(subject)
            ]
            assert sorted(found) == sorted(wanted)


def test_what_was_selected_does_not_pile_up_in_memory() -> None:
    match = Match(incident_id=("inc-*",), target_agents=("a*",))
    policies = PolicySet(
        revision="r", actions={}, rules=(Rule(id="r", on="execute", match=match, deny=True),)
    )
    for number in range(MOST_SELECTIONS + 10):
        asking = somebody(incident_id=f"inc-{number}", target_agents=("a",))
        assert len(policies.selected("execute", asking)) == 1
    assert len(policies._selected) == 10
    many = tuple(f"a-{number}" for number in range(MOST_SELECTED_AGENTS + 1))
    assert len(policies.selected("execute", somebody(incident_id="inc-1", target_agents=many))) == 1
    assert len(policies._selected) == 10


# Conditions that are judged together ----------------------------------------------------------------------


def test_conditions_that_cannot_be_joined_are_halved_until_they_can() -> None:
    asked: list[int] = []

    def join(conditions: Sequence[Condition]) -> Joint | None:
        asked.append(len(conditions))
        if len(conditions) > 2 or len(conditions) == 1:
            return None
        return lambda subject: [one(subject) for one in conditions]

    rules = tuple(
        Rule(id=f"r-{number}", on="execute", when=When(reads=frozenset({"action"})), deny=True)
        for number in range(5)
    )
    policies = PolicySet(revision="r", actions={"restart_pod": ActionPolicy(risk=RiskClass.LOW)}, rules=rules)
    policies = replace(policies, join=join)
    (bundle,) = policies.selected("execute", somebody())
    groups = [[rule.id for rule in group.rules] for group in bundle.early]
    assert groups == [["r-0", "r-1"], ["r-2"], ["r-3", "r-4"]]
    assert [group.joint is None for group in bundle.early] == [False, True, False]
    assert asked == [5, 2, 3, 1, 2]
    # Another action with the same conditions shares what was joined.
    for number in range(MOST_UNLISTED):
        policies.about("execute", f"invented-{number}")
    (other,) = policies.selected("execute", somebody(action="invented-once-more"))
    assert other is not bundle
    assert [group.joint for group in other.early] == [group.joint for group in bundle.early]
    assert asked == [5, 2, 3, 1, 2]


def test_the_conditions_that_are_joined_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "MOST_JOINED", 5)
    rules = tuple(
        Rule(
            id=f"{action}-{number}",
            on="execute",
            match=Match(action=(action,)),
            when=When(reads=frozenset({"action"})),
            deny=True,
        )
        for action in ("one", "two")
        for number in range(4)
    )

    def join(conditions: Sequence[Condition]) -> Joint:
        return lambda subject: [one(subject) for one in conditions]

    policies = PolicySet(revision="r", actions={}, rules=rules, join=join)
    sizes = []
    for action in ("one", "two", "one"):
        (bundle,) = policies.selected("execute", somebody(action=action))
        assert [rule.id for group in bundle.early for rule in group.rules] == [
            f"{action}-{number}" for number in range(4)
        ]
        sizes.append([len(group.rules) for group in bundle.early if group.joint is not None])
    assert sizes == [[4], [1], [4]]
