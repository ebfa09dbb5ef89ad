"""The policy set: whom a rule is about, and how the rules for an action are found."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.core.policy import (
    FACTS,
    MOST_UNLISTED,
    SCOPE_FACTS,
    ActionPolicy,
    Brake,
    Match,
    PolicySet,
    RiskClass,
    Rule,
    globbed,
)
from tests.unit.test_rules import ACTIONS, RISKS, When, matches, rule_sets


@pytest.mark.parametrize(
    ("globs", "value", "means"),
    [
        ((), "anything", True),
        (("restart_pod",), "restart_pod", True),
        (("restart_pod",), "restart_pod_2", False),
        (("restart_pod",), "a restart_pod", False),
        (("restart_*",), "restart_", True),
        (("restart_*",), "restart", False),
        (("*_db",), "failover_db", True),
        (("*_db",), "failover_db2", False),
        (("temp-?",), "temp-1", True),
        (("temp-?",), "temp-12", False),
        (("temp-?",), "temp-", False),
        (("db-[12]",), "db-2", True),
        (("db-[12]",), "db-3", False),
        (("db-[!12]",), "db-3", True),
        (("db-[12]",), "db-[12]", True),  # whoever is really called so is meant, too
        (("Restart_*",), "restart_pod", False),
        (("a.c",), "abc", False),
        (("a+",), "aa", False),
        (("a", "b*"), "bc", True),
        (("a", "b*"), "c", False),
        (("*",), "", True),
        (("",), "", True),
        (("a",), "", False),
        (("*",), "two\nlines", True),
    ],
)
def test_a_glob_means_the_whole_value_and_case_counts(
    globs: tuple[str, ...], value: str, means: bool
) -> None:
    assert globbed(globs, value) is means


NOBODY = {"incident_id": "", "tenant_id": "", "principal": "", "target_agents": ()}


def test_an_empty_match_is_about_everybody() -> None:
    for risk in (None, *RiskClass):
        assert Match().action_matches("anything", risk)
    assert Match().rest_matches("inc", "tenant", "somebody", ("a",))
    assert Match().rest_matches("", "", "", ())


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
    match: Match,
    yes: tuple[str, str, str, tuple[str, ...]],
    no: tuple[str, str, str, tuple[str, ...]],
) -> None:
    assert match.rest_matches(*yes)
    assert not match.rest_matches(*no)


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
    assert ids(policies.brakes("restart_pod")) == {"counts", "counts-in-shadow"}


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
        assert ids(policies.brakes(action)) == {rule.id for rule in rules if rule.brake} & about


def test_names_that_nobody_listed_do_not_pile_up_in_memory() -> None:
    policies = PolicySet(revision="r", actions={"known": ActionPolicy(risk=RiskClass.LOW)})
    for number in range(MOST_UNLISTED + 1_000):
        policies.about("execute", f"invented-{number}")
    policies.about("execute", "known")
    assert ("execute", "known") in policies._found
    assert len(policies._found) == MOST_UNLISTED + 1
