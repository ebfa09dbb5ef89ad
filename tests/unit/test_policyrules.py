"""Rules from files: every key with the value that passes and the one that just fails, with its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from sidecar.core.policy import Brake, Limit, Match, PolicySet, Require, RiskClass, Rule
from sidecar.files.faults import ConfigurationError
from sidecar.policies.files import load

CATALOGUE = (
    "actions:\n  restart_pod: {risk: medium}\n  restart_agent: {risk: low}\n  failover_db: {risk: critical}\n"
)

EXAMPLE = "{id: no-failover, on: execute, match: {action: failover_db}, effect: deny}"


def read(folder: Path, rules: str, catalogue: str = CATALOGUE) -> PolicySet:
    (folder / "actions.yaml").write_text(catalogue, encoding="utf-8")
    (folder / "r.yaml").write_text(rules, encoding="utf-8")
    return load(folder)


def rule(folder: Path, text: str) -> Rule:
    """The rule that one map is, behind an id."""
    (found,) = read(folder, f"rules:\n  - {{id: r, {text}}}\n").rules
    return found


def faults(folder: Path, rules: str, catalogue: str = CATALOGUE) -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        read(folder, rules, catalogue)
    return [str(fault).replace(f"{folder}/", "") for fault in caught.value.faults]


def fault(folder: Path, text: str) -> str:
    """The one mistake of a rule, without its file and line."""
    found = faults(folder, f"rules:\n  - {{id: r, {text}}}\n")
    assert len(found) == 1, found
    assert found[0].startswith("r.yaml:2:")
    return (
        found[0].removeprefix("r.yaml:2:").removeprefix(f"{column_of(found[0])}: rules[0]").removeprefix(".")
    )


def column_of(said: str) -> int:
    return int(said.split(":")[2])


def test_the_rules_of_the_documentation_are_read_as_they_stand(tmp_path: Path) -> None:
    text = """
rules:
  - id: high-risk-is-single-use
    on: issue
    match: {risk: [high, critical]}
    limit: {max_attempts: 1, ttl_seconds: 300, max_cost_usd: 1.00}
    require: {intent_min_chars: 20, target_agents: true}
    reason: High-risk recovery is granted once, briefly, and with its reason written out.
  - id: storm-brake
    on: execute
    match: {action: "restart_*"}
    brake: {per: [incident_id, action], max_attempts: 3, window_seconds: 3600, cooldown_seconds: 60,
            one_in_flight: true}
    reason: A restart that did not help three times in an hour will not help a fourth time.
  - id: change-freeze
    on: execute
    when: risk != "low" && now >= timestamp("2026-12-24T00:00:00Z") && now < timestamp("2026-12-27T00:00:00Z")
    effect: deny
    mode: shadow
    reason: Holiday change freeze.
"""
    single_use, brake, freeze = read(tmp_path, text).rules
    assert single_use == Rule(
        id="high-risk-is-single-use",
        on="issue",
        match=Match(risk=frozenset({RiskClass.HIGH, RiskClass.CRITICAL})),
        limit=Limit(max_attempts=1, ttl_seconds=300, max_cost=1_000_000),
        require=Require(intent_min_chars=20, target_agents=True),
        reason="High-risk recovery is granted once, briefly, and with its reason written out.",
    )
    assert brake == Rule(
        id="storm-brake",
        on="execute",
        match=Match(action=("restart_*",)),
        brake=Brake(
            per=("incident_id", "action"),
            max_attempts=3,
            window_seconds=3600,
            cooldown_seconds=60,
            one_in_flight=True,
        ),
        reason="A restart that did not help three times in an hour will not help a fourth time.",
    )
    assert (freeze.deny, freeze.shadow, freeze.reads_scope) == (True, True, False)
    assert freeze.when is not None
    assert freeze.when.reads == {"risk", "now"}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("on: issue, effect: deny", Rule(id="r", on="issue", deny=True)),
        ("on: execute, effect: deny, mode: enforce", Rule(id="r", on="execute", deny=True)),
        ("on: issue, effect: deny, mode: shadow", Rule(id="r", on="issue", deny=True, shadow=True)),
        ("on: issue, effect: deny, match: {}", Rule(id="r", on="issue", deny=True)),
        (
            "on: issue, effect: deny, match: {risk: low}",
            Rule(id="r", on="issue", deny=True, match=Match(risk=frozenset({RiskClass.LOW}))),
        ),
        (
            'on: issue, effect: deny, match: {action: ["restart_???", failover_db], tenant_id: a, '
            'incident_id: "inc-[0-9]*", principal: [b, c], target_agents: d}',
            Rule(
                id="r",
                on="issue",
                deny=True,
                match=Match(
                    action=("restart_???", "failover_db"),
                    incident_id=("inc-[0-9]*",),
                    tenant_id=("a",),
                    principal=("b", "c"),
                    target_agents=("d",),
                ),
            ),
        ),
        (
            "on: issue, limit: {max_attempts: 1}",
            Rule(id="r", on="issue", limit=Limit(max_attempts=1)),
        ),
        (
            "on: issue, limit: {ttl_seconds: 1, max_cost_usd: 0}",
            Rule(id="r", on="issue", limit=Limit(ttl_seconds=1, max_cost=0)),
        ),
        (
            "on: issue, limit: {max_attempts: 1000000, ttl_seconds: 31622400, max_cost_usd: 0.000001}",
            Rule(id="r", on="issue", limit=Limit(max_attempts=1_000_000, ttl_seconds=31_622_400, max_cost=1)),
        ),
        (
            "on: execute, require: {intent_min_chars: 2000}",
            Rule(id="r", on="execute", require=Require(intent_min_chars=2000)),
        ),
        (
            "on: issue, require: {intent_min_chars: 1, target_agents: false}",
            Rule(id="r", on="issue", require=Require(intent_min_chars=1)),
        ),
        (
            "on: execute, brake: {cooldown_seconds: 2592000}",
            Rule(id="r", on="execute", brake=Brake(cooldown_seconds=2_592_000)),
        ),
        (
            "on: execute, brake: {cooldown_seconds: 5m, max_attempts: 1, window_seconds: 30d}",
            Rule(
                id="r",
                on="execute",
                brake=Brake(cooldown_seconds=300, max_attempts=1, window_seconds=2_592_000),
            ),
        ),
        ("on: issue, limit: {ttl_seconds: 2h}", Rule(id="r", on="issue", limit=Limit(ttl_seconds=7_200))),
        (
            "on: execute, brake: {per: [], max_attempts: 1, window_seconds: 1}",
            Rule(id="r", on="execute", brake=Brake(max_attempts=1, window_seconds=1)),
        ),
        (
            "on: execute, brake: {per: [incident_id, action, tenant_id, principal, target_agents], "
            "one_in_flight: true, window_seconds: 2592000}",
            Rule(
                id="r",
                on="execute",
                brake=Brake(
                    per=("incident_id", "action", "tenant_id", "principal", "target_agents"),
                    one_in_flight=True,
                    window_seconds=2_592_000,
                ),
            ),
        ),
        ('on: issue, effect: deny, reason: ""', Rule(id="r", on="issue", deny=True)),
        (
            f"on: issue, effect: deny, reason: {'x' * 1000}",
            Rule(id="r", on="issue", deny=True, reason="x" * 1000),
        ),
    ],
)
def test_what_lies_just_inside_the_bounds_is_read(tmp_path: Path, text: str, found: Rule) -> None:
    assert rule(tmp_path, text) == found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("effect: deny", "on: is required; add one of issue, execute"),
        ("on: isue, effect: deny", 'on: expects one of issue, execute; did you mean "issue"?'),
        ("on: [issue], effect: deny", "on: expects one of issue, execute"),
        (
            "on: issue, efect: deny, limit: {max_attempts: 1}",
            'efect: is not a known key; did you mean "effect"?',
        ),
        ("on: issue", ": does nothing; add limit, require, brake or effect: deny"),
        (
            "on: issue, effect: allow",
            "effect: allow has no effect: a request is allowed unless a rule refuses it; remove the rule",
        ),
        ("on: issue, effect: dney", 'effect: expects one of deny; did you mean "deny"?'),
        (
            "on: issue, effect: deny, limit: {max_attempts: 1}",
            "limit: does nothing beside effect: deny, which refuses anyway; remove one of them",
        ),
        (
            "on: issue, effect: deny, require: {target_agents: true}",
            "require: does nothing beside effect: deny, which refuses anyway; remove one of them",
        ),
        (
            "on: execute, effect: deny, brake: {cooldown_seconds: 1}",
            "brake: does nothing beside effect: deny, which refuses anyway; remove one of them",
        ),
        (
            "on: issue, effect: deny, mode: shadwo",
            'mode: expects one of enforce, shadow; did you mean "shadow"?',
        ),
        ("on: issue, effect: deny, mode: true", "mode: expects one of enforce, shadow"),
        ("on: issue, effect: deny, reason: 5", "reason: expects text, found a number; write it in quotes"),
        (
            f"on: issue, effect: deny, reason: {'x' * 1001}",
            "reason: expects at most 1000 characters without controls",
        ),
        (
            'on: issue, effect: deny, reason: "\\u2800 \\u3164"',
            "reason: says nothing that a reader sees; write a reason, or remove the key",
        ),
        (
            'on: issue, effect: deny, reason: "a\\u0007"',
            "reason: expects at most 1000 characters without controls",
        ),
        # match
        ("on: issue, effect: deny, match: high", "match: expects a map such as {risk: high}, found text"),
        (
            "on: issue, effect: deny, match: {acton: restart_pod}",
            'match.acton: is not a known key; did you mean "action"?',
        ),
        (
            "on: issue, effect: deny, match: {risk: []}",
            "match.risk: is empty; add a value, or remove the key",
        ),
        (
            "on: issue, effect: deny, match: {risk: [low, hihg]}",
            'match.risk[1]: expects one of low, medium, high, critical; did you mean "high"?',
        ),
        (
            'on: issue, effect: deny, match: {risk: "*"}',
            "match.risk: expects one of low, medium, high, critical",
        ),
        (
            "on: issue, effect: deny, match: {incident_id: 5}",
            "match.incident_id: expects text, found a number; write it in quotes",
        ),
        (
            "on: issue, effect: deny, match: {principal: [a, [b]]}",
            "match.principal[1]: expects text, found a list; write it in quotes",
        ),
        (
            'on: issue, effect: deny, match: {tenant_id: ""}',
            "match.tenant_id: expects 1 to 256 printable characters",
        ),
        (
            f"on: issue, effect: deny, match: {{target_agents: {'x' * 257}}}",
            "match.target_agents: expects 1 to 256 printable characters",
        ),
        # limit
        (
            "on: execute, limit: {max_attempts: 1}",
            "limit: is about what a scope may grant; write on: issue, or use a brake",
        ),
        ("on: issue, limit: 1", "limit: expects a map such as {max_attempts: 1}, found a number"),
        ("on: issue, limit: {}", "limit: limits nothing; add max_attempts, ttl_seconds or max_cost_usd"),
        ("on: issue, limit: {max_attempts: 0}", "limit.max_attempts: must be from 1 to 1000000"),
        ("on: issue, limit: {max_attempts: 1000001}", "limit.max_attempts: must be from 1 to 1000000"),
        (
            "on: issue, limit: {max_attempts: 1.5}",
            "limit.max_attempts: expects a whole number, found a decimal number",
        ),
        (
            "on: issue, limit: {max_attempts: true}",
            "limit.max_attempts: expects a whole number, found true or false",
        ),
        ("on: issue, limit: {ttl_seconds: 0}", "limit.ttl_seconds: must be from 1 to 31622400"),
        ("on: issue, limit: {ttl_seconds: 367d}", "limit.ttl_seconds: must be from 1 to 31622400 seconds"),
        (
            "on: issue, limit: {ttl_seconds: 2 h}",
            "limit.ttl_seconds: expects a whole number of seconds, or a duration such as 10s, 5m, 2h or 1d, "
            "found text",
        ),
        ("on: issue, limit: {ttl_seconds: 31622401}", "limit.ttl_seconds: must be from 1 to 31622400"),
        (
            "on: issue, limit: {max_cost_usd: -0.01}",
            "limit.max_cost_usd: an amount of dollars is finite and between 0 and 1000000000",
        ),
        (
            "on: issue, limit: {max_cost_usd: 0.0000001}",
            "limit.max_cost_usd: has a fraction of a micro-dollar; use at most six digits after the point",
        ),
        (
            "on: issue, limit: {max_attempt: 1, ttl_seconds: 1}",
            'limit.max_attempt: is not a known key; did you mean "max_attempts"?',
        ),
        # require
        ("on: issue, require: {}", "require: requires nothing; add intent_min_chars or target_agents: true"),
        (
            "on: issue, require: {target_agents: false}",
            "require: requires nothing; add intent_min_chars or target_agents: true",
        ),
        ("on: issue, require: {intent_min_chars: 0}", "require.intent_min_chars: must be from 1 to 2000"),
        ("on: issue, require: {intent_min_chars: 2001}", "require.intent_min_chars: must be from 1 to 2000"),
        (
            "on: issue, require: {target_agents: 1}",
            "require.target_agents: expects true or false, found a number",
        ),
        # brake
        (
            "on: issue, brake: {cooldown_seconds: 1}",
            "brake: counts executions; write on: execute, or use a limit",
        ),
        (
            "on: execute, brake: {per: [action]}",
            "brake: brakes nothing; add max_attempts, cooldown_seconds or one_in_flight: true",
        ),
        (
            "on: execute, brake: {one_in_flight: false, window_seconds: 1}",
            "brake: brakes nothing; add max_attempts, cooldown_seconds or one_in_flight: true",
        ),
        (
            "on: execute, brake: {per: [action, incident], cooldown_seconds: 1}",
            "brake.per[1]: expects one of incident_id, action, tenant_id, principal, target_agents; "
            'did you mean "incident_id"?',
        ),
        (
            "on: execute, brake: {max_attempts: 1}",
            "brake.window_seconds: is required with max_attempts; add how long an execution counts",
        ),
        (
            "on: execute, brake: {one_in_flight: true}",
            "brake.window_seconds: is required with one_in_flight; add how long an execution counts",
        ),
        (
            "on: execute, brake: {max_attempts: 0, window_seconds: 1}",
            "brake.max_attempts: must be from 1 to 1000000",
        ),
        (
            "on: execute, brake: {max_attempts: 1, window_seconds: 0}",
            "brake.window_seconds: must be from 1 to 2592000",
        ),
        (
            "on: execute, brake: {max_attempts: 1, window_seconds: 2592001}",
            "brake.window_seconds: must be from 1 to 2592000",
        ),
        (
            "on: execute, brake: {max_attempts: 1, window_seconds: 1.5}",
            "brake.window_seconds: expects a whole number, found a decimal number",
        ),
        ("on: execute, brake: {cooldown_seconds: 0}", "brake.cooldown_seconds: must be from 1 to 2592000"),
        (
            "on: execute, brake: {cooldown_seconds: 2592001}",
            "brake.cooldown_seconds: must be from 1 to 2592000",
        ),
        (
            'on: execute, brake: {one_in_flight: "true", window_seconds: 1}',
            "brake.one_in_flight: expects true or false, found text",
        ),
        (
            "on: execute, brake: {cooldown: 1, one_in_flight: true, window_seconds: 1}",
            'brake.cooldown: is not a known key; did you mean "cooldown_seconds"?',
        ),
        # when: the rest stands in test_conditions
        (
            "on: issue, effect: deny, when: true",
            "when: expects a condition as text, found true or false; write it in quotes",
        ),
        ('on: issue, effect: deny, when: ""', "when: is empty; write a condition, or remove the key"),
    ],
)
def test_a_mistake_in_a_rule_is_named(tmp_path: Path, text: str, message: str) -> None:
    assert fault(tmp_path, text) == message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rules:\n  - x\n", f"2:5: rules[0]: expects a map such as {EXAMPLE}, found text"),
        ("rules:\n  -\n", f"2:4: rules[0]: expects a map such as {EXAMPLE}, found nothing"),
        (
            "rules:\n  - on: issue\n    effect: deny\n",
            "2:5: rules[0].id: is required; add it, for example no-failover",
        ),
        (
            "rules:\n  - on: issue\n    id: 5\n    effect: deny\n",
            "3:5: rules[0].id: expects text, found a number; write it in quotes",
        ),
        (
            "rules:\n  - on: issue\n    id: ''\n    effect: deny\n",
            "3:5: rules[0].id: expects 1 to 256 printable characters",
        ),
        (
            f"rules:\n  - on: issue\n    id: {'x' * 257}\n    effect: deny\n",
            "3:5: rules[0].id: expects 1 to 256 printable characters",
        ),
        (
            "rules:\n  - {id: a, on: issue, effect: deny}\n  - {id: a, on: issue, effect: deny}\n",
            "3:6: rules[1].id: is already at r.yaml:2:6; give each rule its own id",
        ),
        (
            "rules:\n  - {id: a, on: issue, effect: deny}\n  - {id: b, on: issue, effect: &x deny}\n",
            "3:32: rules[1].effect: anchors (&) are refused; remove it, write each value out",
        ),
    ],
)
def test_a_mistake_in_a_list_of_rules_is_named_with_its_place(
    tmp_path: Path, text: str, expected: str
) -> None:
    assert faults(tmp_path, text) == [f"r.yaml:{expected}"]


def test_an_id_in_two_files_names_both_places(tmp_path: Path) -> None:
    (tmp_path / "q.yaml").write_text("rules:\n\n  - id: a\n    on: issue\n    effect: deny\n")
    assert faults(tmp_path, "rules:\n  - {id: a, on: issue, effect: deny}\n") == [
        "r.yaml:2:6: rules[0].id: is already at q.yaml:3:5; give each rule its own id"
    ]


def test_a_rules_key_without_rules_is_no_mistake(tmp_path: Path) -> None:
    assert read(tmp_path, "rules:\n").rules == ()
    assert read(tmp_path, "rules: []\n").rules == ()


def test_rules_without_any_action_are_no_policy_set(tmp_path: Path) -> None:
    found = faults(
        tmp_path, "rules:\n  - {id: a, on: issue, match: {action: x}, effect: deny}\n", "actions: {}\n"
    )
    assert len(found) == 1
    assert "no file lists an action" in found[0]


def test_a_reason_stands_on_one_line_however_it_is_broken(tmp_path: Path) -> None:
    text = "rules:\n  - id: a\n    on: issue\n    effect: deny\n    reason: >\n"
    text += "      Not\n      today.\n\n      Ever.\n"
    assert read(tmp_path, text).rules[0].reason == "Not today. Ever."


# Globs on actions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "glob", ["restart_pod", "restart_*", "*", "*_db", "restart_???", "[fr]*_db", "f*o*_d?", "restart_[!a]*"]
)
def test_a_glob_that_means_an_action_of_the_catalogue_is_read(tmp_path: Path, glob: str) -> None:
    assert rule(tmp_path, f'on: issue, effect: deny, match: {{action: "{glob}"}}').match.action == (glob,)


@pytest.mark.parametrize(
    ("glob", "near"),
    [
        ("restart_pods", '; did you mean "restart_pod"?'),
        ("restart_node*", '; did you mean "restart_pod"?'),
        ("Restart_*", '; did you mean "restart_pod"?'),
        ("restart_??", '; did you mean "restart_pod"?'),
        ("zzz*", "; correct it, or list the action"),
        ("[z]*", "; correct it, or list the action"),
    ],
)
def test_a_glob_that_means_no_action_is_a_mistake(tmp_path: Path, glob: str, near: str) -> None:
    found = fault(tmp_path, f'on: issue, effect: deny, match: {{action: [restart_pod, "{glob}"]}}')
    assert found == f"match.action[1]: matches no action of the catalogue{near}"


def test_with_a_star_entry_a_glob_may_mean_what_is_not_listed(tmp_path: Path) -> None:
    text = 'rules:\n  - {id: a, on: issue, match: {action: "zzz*"}, effect: deny}\n'
    assert read(tmp_path, text, CATALOGUE + '  "*": {risk: high}\n').rules[0].match.action == ("zzz*",)
    assert len(faults(tmp_path, text)) == 1


def test_a_glob_is_not_held_to_a_catalogue_of_which_a_part_could_not_be_read(tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_text("actions: {zzz: {risk: low}\n")
    found = faults(tmp_path, "rules:\n  - {id: a, on: issue, match: {action: zzz}, effect: deny}\n")
    assert [said.split(":")[0] for said in found] == ["b.yaml"]


def test_thousands_of_globs_that_mean_nothing_are_named_without_a_long_search(tmp_path: Path) -> None:
    catalogue = "actions:\n" + "".join(f"  act_{number}: {{risk: low}}\n" for number in range(1000))
    rules = "".join(
        f"  - {{id: r{number}, on: issue, match: {{action: act_x{number}}}, effect: deny}}\n"
        for number in range(2000)
    )
    found = faults(tmp_path, "rules:\n" + rules, catalogue)
    assert len(found) == 2000
    assert sum("did you mean" in said for said in found) == 20
