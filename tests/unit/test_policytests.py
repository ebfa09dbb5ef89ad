"""Tests of policies: what a file may say, what it is decided by, and how a difference is told."""

from __future__ import annotations

import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sidecar.core.policy import (
    ActionPolicy,
    Brake,
    Limit,
    Match,
    PolicySet,
    Require,
    RiskClass,
    Rule,
    Subject,
)
from sidecar.files.faults import ConfigurationError
from sidecar.policies import testing as policytests

SEEN: list[Subject] = []


class Look:
    """A condition that notes what it is asked about, and holds for what is forced."""

    text = "parameters.force"
    reads = frozenset({"parameters", "intent", "now"})

    def __call__(self, subject: Subject) -> bool:
        SEEN.append(subject)
        return subject.parameters.get("force") is True


POLICIES = PolicySet(
    revision="rev-1",
    actions={
        "retry": ActionPolicy(risk=RiskClass.LOW),
        "restart_pod": ActionPolicy(risk=RiskClass.MEDIUM, hold=250_000),
        "failover": ActionPolicy(risk=RiskClass.CRITICAL, hold=5_000_000),
    },
    rules=(
        Rule(
            id="single-use",
            on="issue",
            match=Match(risk=frozenset({RiskClass.CRITICAL})),
            limit=Limit(max_attempts=1, ttl_seconds=60, max_cost=10_000_000),
            require=Require(intent_min_chars=20),
        ),
        Rule(
            id="storm-brake",
            on="execute",
            match=Match(action=("restart_*",)),
            brake=Brake(per=("incident_id",), max_attempts=2, window_seconds=600, one_in_flight=True),
        ),
        Rule(id="forced", on="execute", when=Look(), deny=True),
        Rule(id="watched", on="execute", match=Match(principal=("bob",)), deny=True, shadow=True),
    ),
)


def write(folder: Path, text: str, name: str = "cases") -> Path:
    tests = folder / "tests"
    tests.mkdir(exist_ok=True)
    (tests / f"{name}.yaml").write_text(textwrap.dedent(text), encoding="utf-8")
    return folder


def outcomes(folder: Path, text: str) -> list[list[str]]:
    """For each test the differences, without their file."""
    tests = policytests.read(write(folder, text))
    assert tests
    return [
        [
            f"{fault.place.rpartition('cases.yaml:')[2]} {fault.key}: {fault.message}"
            for fault in run.differences
        ]
        for run in (policytests.run(test, POLICIES) for test in tests)
    ]


def faults(folder: Path, text: str) -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        policytests.read(write(folder, text))
    return [str(fault).partition("cases.yaml:")[2] for fault in caught.value.faults]


def fault(folder: Path, text: str) -> str:
    found = faults(folder, text)
    assert len(found) == 1, found
    return found[0]


def decided(folder: Path, on: str, facts: str, want: str, more: str = "") -> list[str]:
    """The differences of one test."""
    text = f"tests:\n- {{name: a, on: {on}, facts: {facts}, want: {want}{more}}}\n"
    (found,) = outcomes(folder, text)
    return [difference.partition(" ")[2] for difference in found]


# What is decided ----------------------------------------------------------------------------------------


def test_a_grant_on_default_terms_is_allowed_and_lowered_by_name(tmp_path: Path) -> None:
    want = "{verdict: allowed, rules: [single-use], max_attempts: 1, ttl_seconds: 60, max_cost_usd: 5}"
    assert decided(tmp_path, "issue", "{action: failover, max_cost_usd: 5}", want) == []


def test_an_action_that_a_glob_lists_is_judged_by_its_entry(tmp_path: Path) -> None:
    case = "{name: a, on: execute, facts: {action: stop_pod}, want: {verdict: allowed}}"
    (test,) = policytests.read(write(tmp_path, f"tests: [{case}]"))
    entry = ActionPolicy(risk=RiskClass.LOW, hold=9_000_000)
    assert policytests.run(test, replace(POLICIES, globs={"stop_*": entry})).differences == ()
    assert policytests.run(test, replace(POLICIES, globs={"start_*": entry})).message is not None


def test_times_of_a_test_may_be_durations(tmp_path: Path) -> None:
    want = "{verdict: allowed, ttl_seconds: 1m, max_attempts: 1}"
    assert decided(tmp_path, "issue", "{action: failover, max_cost_usd: 5, ttl_seconds: 60s}", want) == []
    history = ", history: [{seconds_ago: 1m}, {seconds_ago: 2m}]"
    braked = "{verdict: refused, error: braked, rules: [storm-brake], retry_after_seconds: 8m}"
    assert decided(tmp_path, "execute", "{action: restart_pod}", braked, history) == []


def test_a_grant_that_could_never_be_spent_is_refused(tmp_path: Path) -> None:
    want = "{verdict: refused, error: invalid_scope, rules: []}"
    for facts in ("{action: failover}", "{action: failover, max_cost_usd: 4.99}"):
        assert decided(tmp_path, "issue", facts, want) == []


def test_a_term_that_is_asked_for_is_refused_above_a_limit(tmp_path: Path) -> None:
    want = "{verdict: refused, error: policy_denied, rules: [single-use]}"
    for term in ("max_attempts: 2", "ttl_seconds: 61", "max_cost_usd: 10.01", "intent: too short"):
        assert decided(tmp_path, "issue", f"{{action: failover, {term}}}", want) == []
    assert decided(tmp_path, "issue", "{action: failover, max_cost_usd: 10.00}", "{verdict: allowed}") == []
    for term in ("max_attempts: 1", "ttl_seconds: 60"):
        facts = f"{{action: failover, max_cost_usd: 5, {term}}}"
        assert decided(tmp_path, "issue", facts, "{verdict: allowed}") == []


def test_a_grant_for_several_actions_is_judged_for_each(tmp_path: Path) -> None:
    want = "{verdict: refused, error: policy_denied, rules: []}"
    assert decided(tmp_path, "issue", "{actions: [retry, unheard_of]}", want) == []
    assert (
        decided(tmp_path, "issue", "{actions: [retry, restart_pod]}", "{verdict: allowed, rules: []}") == []
    )


def test_an_execution_without_more_words_has_a_scope_that_fits(tmp_path: Path) -> None:
    for action in ("retry", "restart_pod", "failover"):
        assert decided(tmp_path, "execute", f"{{action: {action}}}", "{verdict: allowed, rules: []}") == []
        targeted = f"{{action: {action}, target_agents: [a, b], incident_id: inc_9, tenant_id: t}}"
        assert decided(tmp_path, "execute", targeted, "{verdict: allowed}") == []
    used = "{action: failover, scope: {attempts_used: 5}}"
    assert decided(tmp_path, "execute", used, "{verdict: allowed}") == []


@pytest.mark.parametrize("scope", ["{max_attempts: 2, attempts_used: 2}", "{max_cost_usd: 0.1}"])
def test_a_scope_that_does_not_fit_is_refused_by_its_own_bounds(tmp_path: Path, scope: str) -> None:
    want = "{verdict: refused, error: scope_exhausted, rules: []}"
    assert decided(tmp_path, "execute", f"{{action: failover, scope: {scope}}}", want) == []


def test_rules_see_every_fact_of_a_test(tmp_path: Path) -> None:
    SEEN.clear()
    facts = (
        "{action: retry, incident_id: i, tenant_id: t, principal: ann, principal_kind: human,"
        " principal_groups: [oncall], target_agents: a,"
        " parameters: {force: true}, scope: {intent: why, max_attempts: 4, attempts_used: 1,"
        " max_cost_usd: 2.5, age_seconds: 30, issuer: bob}}"
    )
    want = "{verdict: refused, error: policy_denied, rules: [forced]}"
    assert decided(tmp_path, "execute", facts, want, ", now: 2026-12-24T12:30:00+01:00") == []
    (seen,) = SEEN
    assert seen == Subject(
        action="retry",
        risk=RiskClass.LOW,
        incident_id="i",
        tenant_id="t",
        principal="ann",
        principal_kind="human",
        principal_groups=("oncall",),
        issuer="bob",
        target_agents=("a",),
        parameters={"force": True},
        intent="why",
        max_cost=2_500_000,
        attempts_used=1,
        attempts_remaining=3,
        scope_age_seconds=30,
        now=1_798_111_800_000_000,  # 2026-12-24T11:30:00Z
    )


def test_rules_in_shadow_are_told_apart(tmp_path: Path) -> None:
    want = "{verdict: allowed, rules: [], would_refuse: [watched]}"
    assert decided(tmp_path, "execute", "{action: retry, principal: bob}", want) == []
    assert decided(tmp_path, "execute", "{action: retry}", want) == [
        "want.would_refuse: wanted [watched], got []"
    ]


@pytest.mark.parametrize(
    ("history", "want"),
    [
        ("[]", "{verdict: allowed}"),
        ("[{seconds_ago: 9}]", "{verdict: allowed}"),
        ("[{seconds_ago: 9}, {seconds_ago: 10}]", "{verdict: refused, retry_after_seconds: 590}"),
        ("[{seconds_ago: 9, status: not_sent}, {seconds_ago: 10}]", "{verdict: allowed}"),
        ("[{seconds_ago: 9}, {seconds_ago: 600}]", "{verdict: allowed}"),
        ("[{seconds_ago: 9}, {seconds_ago: 10, incident_id: other}]", "{verdict: allowed}"),
        ("[{seconds_ago: 9}, {seconds_ago: 10, tenant_id: other}]", "{verdict: allowed}"),
        ("[{seconds_ago: 9}, {seconds_ago: 10, action: retry}]", "{verdict: allowed}"),
        ("[{seconds_ago: 9}, {seconds_ago: 10, principal: bob}]", "{verdict: refused}"),
        ("[{seconds_ago: 9, status: unknown}]", "{verdict: refused, retry_after_seconds: 591}"),
        (
            "[{seconds_ago: 900, status: in_flight}]",
            "{verdict: refused, error: braked, rules: [storm-brake]}",
        ),
        ("[{seconds_ago: 900, status: unknown}]", "{verdict: allowed}"),
    ],
)
def test_brakes_count_the_history(tmp_path: Path, history: str, want: str) -> None:
    assert decided(tmp_path, "execute", "{action: restart_pod}", want, f", history: {history}") == []


def test_a_difference_says_what_was_wanted_what_came_and_where(tmp_path: Path) -> None:
    text = """
        tests:
          - name: wrong in every way
            on: execute
            facts: {action: restart_pod, parameters: {force: true}}
            want:
              verdict: allowed
              rules: [storm-brake]
          - name: wrong terms
            on: issue
            facts: {action: failover, max_cost_usd: 5}
            want: {verdict: allowed, ttl_seconds: 300, max_cost_usd: 1.5, max_attempts: 1}
        """
    assert outcomes(tmp_path, text) == [
        [
            "7:7 want.verdict: wanted allowed, got refused",
            "8:7 want.rules: wanted [storm-brake], got [forced]",
        ],
        [
            "12:30 want.ttl_seconds: wanted 300, got 60",
            "12:48 want.max_cost_usd: wanted 1.5, got 5",
        ],
    ]
    outcome = policytests.run(policytests.read(tmp_path)[0], POLICIES)
    assert outcome.message == "policy_denied: The rule denies it. (rule forced)"


# What a file may say ------------------------------------------------------------------------------------


def test_files_are_read_in_name_order_and_hidden_ones_are_not(tmp_path: Path) -> None:
    case = "tests: [{name: NAME, on: issue, facts: {action: retry}, want: {verdict: allowed}}]"
    for name in ("b", "a", ".hidden"):
        write(tmp_path, case.replace("NAME", f"of {name}"), name)
    (tmp_path / "tests" / "c.yml").write_text(case.replace("NAME", "of c"))
    (tmp_path / "tests" / "d.txt").write_text("nonsense")
    assert [test.case.name for test in policytests.read(tmp_path)] == ["of a", "of b", "of c"]


def test_a_folder_without_tests_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as caught:
        policytests.read(tmp_path)
    assert str(caught.value) == f"{tmp_path}/tests: contains no *.yaml file; put one with tests: there"


GOOD: dict[str, Any] = {
    "name": "a",
    "on": "execute",
    "facts": "{action: retry}",
    "want": "{verdict: allowed}",
}


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({"naem": "x"}, 'tests[0].naem: is not a known key; did you mean "name"?'),
        ({"name": None}, "tests[0].name: is required; add it"),
        ({"name": "7"}, "tests[0].name: expects text, found a number; write it in quotes"),
        ({"on": "excute"}, 'tests[0].on: expects one of issue, execute, role; did you mean "execute"?'),
        (
            {"now": "2026-12-24T12:00:00"},
            "tests[0].now: expects a time with its offset in ISO 8601, such as 2026-01-01T12:00:00Z",
        ),
        (
            {"now": "12:30"},
            "tests[0].now: 12:30 is base 60 to YAML 1.1: write one number, or put it in "
            "quotes if text is meant",
        ),
        ({"facts": "{}"}, "tests[0].facts.action: is required; add it"),
        (
            {"facts": "{action: a, max_attempts: 1}"},
            'tests[0].facts.max_attempts: is not a known key; did you mean "facts.scope.max_attempts"?',
        ),
        (
            {"facts": "{action: a, principle: b}"},
            'tests[0].facts.principle: is not a known key; did you mean "principal"?',
        ),
        ({"facts": "{action: a, parameters: [1]}"}, "tests[0].facts.parameters: expects a map, found a list"),
        (
            {"facts": "{action: a, scope: {atempts_used: 1}}"},
            'tests[0].facts.scope.atempts_used: is not a known key; did you mean "attempts_used"?',
        ),
        (
            {"facts": "{action: a, scope: {attempts_used: -1}}"},
            "tests[0].facts.scope.attempts_used: must be from 0 to 1000000000",
        ),
        (
            {"facts": "{action: a, scope: {max_cost_usd: 0.0000001}}"},
            "tests[0].facts.scope.max_cost_usd: has a fraction of a micro-dollar; "
            "use at most six digits after the point",
        ),
        (
            {"history": "[{second_ago: 1, seconds_ago: 1}]"},
            'tests[0].history[0].second_ago: is not a known key; did you mean "seconds_ago"?',
        ),
        ({"history": "[{status: answered}]"}, "tests[0].history[0].seconds_ago: is required; add it"),
        (
            {"history": "[{seconds_ago: 1, status: sent}]"},
            "tests[0].history[0].status: expects one of in_flight, running, answered, "
            'not_sent, unknown, succeeded, failed, not_executed, executed; did you mean "not_sent"?',
        ),
        ({"want": "{}"}, "tests[0].want.verdict: is required; add one of allowed, refused"),
        ({"want": "{verdict: denied}"}, "tests[0].want.verdict: expects one of allowed, refused"),
        (
            {"want": "{verdict: refused, error: policy_denyed}"},
            'tests[0].want.error: is not an error code; did you mean "policy_denied"?',
        ),
        (
            {"want": "{verdict: allowed, error: braked}"},
            "tests[0].want.error: applies only if the verdict is refused; remove it",
        ),
        (
            {"want": "{verdict: allowed, max_attempts: 1}"},
            'tests[0].want.max_attempts: is not a known key; did you mean "facts.scope.max_attempts"?',
        ),
        (
            {"on": "issue", "facts": "{action: a, actions: [b]}"},
            "tests[0].facts.action: is required, or actions as a list; give one of the two",
        ),
        ({"on": "issue", "history": "[]"}, "tests[0].history: is not a known key"),
        (
            {"on": "issue", "want": "{verdict: refused, ttl_seconds: 1}"},
            "tests[0].want.ttl_seconds: applies only if the verdict is allowed; remove it",
        ),
    ],
)
def test_a_mistake_is_named_with_its_place(tmp_path: Path, members: dict[str, Any], expected: str) -> None:
    given = {name: value for name, value in {**GOOD, **members}.items() if value is not None}
    lines = "".join(
        f"{'- ' if not index else '  '}{name}: {given[name]}\n" for index, name in enumerate(given)
    )
    place, _, message = fault(tmp_path, f"tests:\n{lines}").partition(" ")
    assert message == expected
    line, column, _ = place.split(":")
    # On the line of the member of the test that it is in; what is not there has the place of what it lacks.
    member = expected.partition("].")[2].replace("[", ".").replace(":", ".").partition(".")[0]
    assert int(line) == 2 + (list(given).index(member) if member in given else 0)
    assert int(column) >= 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "1:1: tests: is required; add it"),
        ("tests: {}", "1:1: tests: expects a list, found a map"),
        ("tests: []", "1:1: tests: is empty; add a value, or remove the key"),
        ("- a", "1:1: expects a map such as {tests: [...]}, found a list"),
        ("a", "1:1: expects a map such as {tests: [...]}, found text"),
        (
            "tests: [3]",
            "1:9: tests[0]: expects a map such as {name: ..., on: execute, facts: {...}, want: {...}}, "
            "found a number",
        ),
        ("tests: [", "1:9: a value is missing here; text that begins with a bracket needs quotes"),
    ],
)
def test_what_is_no_list_of_tests_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    assert fault(tmp_path, text) == expected


def test_each_name_stands_once_in_a_file(tmp_path: Path) -> None:
    case = "- {name: a, on: issue, facts: {action: retry}, want: {verdict: allowed}}\n"
    found = fault(tmp_path, f"tests:\n{case}{case}")
    assert found.startswith("3:4: tests[1].name: is already at ")
    write(tmp_path, f"tests:\n{case}")
    write(tmp_path, f"tests:\n{case}", "other")
    assert len(policytests.read(tmp_path)) == 2


def test_every_mistake_of_every_file_is_named_at_once(tmp_path: Path) -> None:
    write(tmp_path, "tests: [1, 2]", "a")
    write(tmp_path, "test: []", "b")
    (tmp_path / "tests" / "c.yaml").symlink_to("gone.yaml")
    with pytest.raises(ConfigurationError) as caught:
        policytests.read(tmp_path)
    assert [str(fault).rpartition("/")[2].partition(" ")[0] for fault in caught.value.faults] == [
        "a.yaml:1:9:",
        "a.yaml:1:12:",
        "b.yaml:1:1:",
        "b.yaml:1:1:",
        "c.yaml:",
    ]
