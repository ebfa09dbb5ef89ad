"""Policies are read as a whole or not at all, and every mistake is named with its place."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.core.policy import ActionPolicy, RiskClass
from sidecar.files.faults import ConfigurationError
from sidecar.policies._sections import RuleSection
from sidecar.policies.files import load
from sidecar.settings.keys import keys

SHIPPED = Path(__file__).parents[2] / "policies"
NOBODY = 65534


@contextmanager
def no_privileges() -> Iterator[None]:
    """Modes of files mean nothing to root."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(before)


@pytest.fixture
def anybody() -> Iterator[Path]:
    """A folder that anybody may enter."""
    with TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder


def faults(folder: Path) -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        load(folder)
    return [
        str(fault).replace(f"{folder}/", "").replace(str(folder), "FOLDER") for fault in caught.value.faults
    ]


def fault_of(folder: Path, text: str) -> str:
    found = faults(write(folder, a=text))
    assert len(found) == 1, found
    return found[0]


def test_actions_of_all_files_become_one_set(tmp_path: Path) -> None:
    write(
        tmp_path,
        a='actions:\n  retry: {risk: low, max_cost_usd: 0.10}\n  "*": {risk: high}\n',
        b="actions:\n  failover: {risk: critical, max_cost_usd: 5, timeout_seconds: 120}\n",
        c="# nothing yet\n",
    )
    policies = load(tmp_path)
    assert policies.actions == {
        "retry": ActionPolicy(risk=RiskClass.LOW, hold=100_000),
        "failover": ActionPolicy(risk=RiskClass.CRITICAL, hold=5_000_000, timeout_seconds=120.0),
    }
    assert policies.unlisted == ActionPolicy(risk=RiskClass.HIGH)


def test_without_a_star_an_unlisted_action_has_no_policy(tmp_path: Path) -> None:
    policies = load(write(tmp_path, a="actions: {retry: {risk: low}}"))
    assert policies.unlisted is None
    assert policies.action("other") is None


def test_an_entry_whose_name_is_a_glob_lists_every_action_that_matches(tmp_path: Path) -> None:
    write(
        tmp_path,
        a='actions:\n  restart_*: {risk: medium}\n  restart_db: {risk: critical}\n  "*": {risk: high}',
        b="actions:\n  restart_d*: {risk: low}\n  '?': {risk: low}",
    )
    policies = load(tmp_path)
    assert set(policies.actions) == {"restart_db"}
    assert set(policies.globs) == {"restart_*", "restart_d*", "?"}
    risks = {name: getattr(policies.action(name), "risk", None) for name in ("restart_db", "restart_pod")}
    assert risks == {"restart_db": RiskClass.CRITICAL, "restart_pod": RiskClass.MEDIUM}
    assert policies.action("restart_disk") == ActionPolicy(risk=RiskClass.LOW)
    assert policies.action("x") == ActionPolicy(risk=RiskClass.LOW)
    assert policies.action("drop") == ActionPolicy(risk=RiskClass.HIGH)
    labels = [policies.label(name) for name in ("restart_db", "restart_pod", "restart_disk", "drop")]
    assert labels == ["restart_db", "restart_*", "restart_d*", "other"]


def test_globs_of_two_files_between_which_nothing_decides_name_both_places(tmp_path: Path) -> None:
    write(tmp_path, a="actions:\n  restart_*_1: {risk: low}", b="actions:\n  restart_*_2: {risk: low}")
    assert faults(tmp_path) == [
        "b.yaml:2:3: actions.restart_*_2: begins like restart_*_1 at a.yaml:2:3 and is as long, so neither "
        "decides before the other; name the actions, or make one glob longer"
    ]


@pytest.mark.parametrize("glob", ["restart_pod", "restart_*", "*_pod", "restart_pod_?", "[rs]*"])
def test_a_rule_may_be_about_actions_that_only_a_glob_lists(tmp_path: Path, glob: str) -> None:
    rule = f"  - {{id: r, on: execute, match: {{action: '{glob}'}}, effect: deny}}"
    write(tmp_path, a=f"actions:\n  restart_*: {{risk: low}}\nrules:\n{rule}")
    assert len(load(tmp_path).rules) == 1


def test_the_revision_is_a_hash_of_names_and_contents(tmp_path: Path) -> None:
    first = write(tmp_path, a="actions: {x: {risk: low}}", b="actions: {y: {risk: low}}")
    fed = b""
    for name, content in (
        (b"a.yaml", b"actions: {x: {risk: low}}"),
        (b"b.yaml", b"actions: {y: {risk: low}}"),
    ):
        fed += len(name).to_bytes(8, "big") + name + len(content).to_bytes(8, "big") + content
    before = load(first).revision
    assert before == hashlib.sha256(fed).hexdigest()[:16]
    (tmp_path / "b.yaml").rename(tmp_path / "c.yaml")
    assert load(tmp_path).revision != before


def test_hidden_files_folders_and_other_files_are_not_read(tmp_path: Path) -> None:
    write(tmp_path, a="actions: {x: {risk: low}}")
    (tmp_path / ".hidden.yaml").write_text("nonsense: [")
    (tmp_path / "notes.txt").write_text("nonsense: [")
    (tmp_path / "tests.yaml").mkdir()
    (tmp_path / "b.yml").write_text("actions: {y: {risk: low}}")
    assert sorted(load(tmp_path).actions) == ["x", "y"]


def test_a_config_map_of_symbolic_links_is_read(tmp_path: Path) -> None:
    (tmp_path / "..2026").mkdir()
    (tmp_path / "..2026" / "a.yaml").write_text("actions: {x: {risk: low}}")
    (tmp_path / "..data").symlink_to("..2026")
    (tmp_path / "a.yaml").symlink_to("..data/a.yaml")
    assert list(load(tmp_path).actions) == ["x"]


def test_a_file_that_cannot_be_read_is_no_file_to_skip(tmp_path: Path) -> None:
    write(tmp_path, a="actions: {x: {risk: low}}")
    (tmp_path / "b.yaml").symlink_to("gone.yaml")
    assert faults(tmp_path) == [
        "b.yaml: cannot be read (No such file or directory); check the name and the permissions"
    ]


@pytest.mark.parametrize("text", ["", " \n\t\n"])
def test_a_file_that_holds_nothing_may_be_one_that_was_cut_short(tmp_path: Path, text: str) -> None:
    rule = "{id: r, on: issue, match: {action: six}, effect: deny}"
    write(tmp_path, a=f"actions: {{x: {{risk: low}}}}\nrules: [{rule}]")
    assert faults(write(tmp_path, b=text)) == ["b.yaml: is empty; remove the file if that is intended"]
    (tmp_path / "b.yaml").write_text("actions: {six: {risk: low}}")
    assert len(load(tmp_path).rules) == 1


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path: Path) -> None:
    write(tmp_path, a="actions: {x: {risk: low}}")
    os.mkfifo(tmp_path / "b.yaml")
    assert faults(tmp_path) == ["b.yaml: is not a regular file; remove it, or put one in its place"]


def test_a_folder_that_is_closed_is_named(anybody: Path) -> None:
    policies = anybody / "policies"
    policies.mkdir()
    write(policies, a="actions: {x: {risk: low}}")
    for mode in (0o444, 0o111, 0):
        policies.chmod(mode)
        with no_privileges():
            assert faults(policies) == [
                "FOLDER: the policies folder cannot be read (Permission denied); "
                "let the sidecar read and enter it"
            ]
    policies.chmod(0o755)
    with no_privileges():
        assert list(load(policies).actions) == ["x"]


def test_a_folder_that_is_missing_or_empty_says_what_to_do(tmp_path: Path) -> None:
    assert faults(tmp_path) == [
        "FOLDER: contains no *.yaml file; add one with actions:, such as the shipped policies/actions.yaml"
    ]
    assert faults(tmp_path / "gone") == [
        "FOLDER: the policies folder cannot be read (No such file or directory); create it, "
        "or correct the key policies"
    ]


@pytest.mark.parametrize("text", ["# nothing\n", "actions:\n", "actions: {}\n"])
def test_a_folder_without_any_action_is_no_policy_set(tmp_path: Path, text: str) -> None:
    assert faults(write(tmp_path, a=text)) == [
        "FOLDER: actions: no file lists an action, so every request would be refused; "
        "list some under actions:"
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "- x",
            "a.yaml:1:1: expects a map such as {actions: {restart_pod: {risk: low}}, rules: []}, "
            "found a list",
        ),
        ("actions: [x]", "a.yaml:1:1: actions: expects a map, found a list"),
        ("action: {x: {risk: low}}", 'a.yaml:1:1: action: is not a known key; did you mean "actions"?'),
        (
            "actions: {x: {risk: low}}\nrules: {x: 1}",
            "a.yaml:2:1: rules: expects a list, found a map",
        ),
        (
            "actions: {x: {risk: low}}\nrule: []",
            'a.yaml:2:1: rule: is not a known key; did you mean "rules"?',
        ),
        ("actions:\n  x: low", "a.yaml:2:3: actions.x: expects a map such as {risk: low}, found text"),
        ("actions:\n  x:", "a.yaml:2:3: actions.x: expects a map such as {risk: low}, found nothing"),
        (
            "actions:\n  x: {}",
            "a.yaml:2:3: actions.x.risk: is required; add one of low, medium, high, critical",
        ),
        (
            "actions:\n  x: {risk: hihg}",
            'a.yaml:2:7: actions.x.risk: expects one of low, medium, high, critical; did you mean "high"?',
        ),
        (
            "actions:\n  x: {risk: [low]}",
            "a.yaml:2:7: actions.x.risk: expects one of low, medium, high, critical",
        ),
        (
            "actions:\n  x: {risk: low, timeout_second: 5}",
            'a.yaml:2:18: actions.x.timeout_second: is not a known key; did you mean "timeout_seconds"?',
        ),
        (
            "actions:\n  x: {risk: low, targets_required: 1}",
            "a.yaml:2:18: actions.x.targets_required: expects true or false, found a number",
        ),
        (
            "actions:\n  restart_*: {risk: lo}",
            "a.yaml:2:15: actions.restart_*.risk: expects one of low, medium, high, critical; did you mean "
            '"low"?',
        ),
        (
            "actions:\n  restart_*: {risk: low}\n  restart_?: {risk: high}",
            "a.yaml:3:3: actions.restart_?: begins like restart_* at a.yaml:2:3 and is as long, so neither "
            "decides before the other; name the actions, or make one glob longer",
        ),
        (
            "actions:\n  restart_*: {risk: low}\nrules:\n"
            "  - {id: r, on: execute, match: {action: 'stop_*'}, effect: deny}",
            "a.yaml:4:34: rules[0].match.action: matches no action of the catalogue; correct it, or list the "
            "action",
        ),
        (
            'actions:\n  "": {risk: low}',
            "a.yaml:2:3: actions.: the name of an action is 1 to 256 printable characters",
        ),
        (
            'actions:\n  "a\\n": {risk: low}',
            "a.yaml:2:3: actions.a\\n: the name of an action is 1 to 256 printable characters",
        ),
        (
            "actions:\n  x: {risk: low, max_cost_usd: -1}",
            "a.yaml:2:18: actions.x.max_cost_usd: an amount of dollars is finite and between 0 and "
            "1000000000",
        ),
        (
            "actions:\n  x: {risk: low, max_cost_usd: 0.0000001}",
            "a.yaml:2:18: actions.x.max_cost_usd: has a fraction of a micro-dollar; use at most six "
            "digits after the point",
        ),
        (
            'actions:\n  x: {risk: low, max_cost_usd: "1"}',
            "a.yaml:2:18: actions.x.max_cost_usd: expects an amount of dollars, found text",
        ),
        (
            "actions:\n  x: {risk: low, timeout_seconds: 0}",
            "a.yaml:2:18: actions.x.timeout_seconds: must be above 0 and at most 86400",
        ),
        (
            "actions:\n  x: {risk: low, timeout_seconds: 86400.5}",
            "a.yaml:2:18: actions.x.timeout_seconds: must be above 0 and at most 86400",
        ),
        (
            "actions:\n  x: {risk: low, timeout_seconds: true}",
            "a.yaml:2:18: actions.x.timeout_seconds: expects a number of seconds, or a duration such as 10s, "
            "5m, 2h or 1d, found true or false",
        ),
        (
            "actions:\n  x: {risk: low}\n  x: {risk: low}",
            "a.yaml:3:3: actions.x: is already in line 2; remove one of them",
        ),
        (
            "actions:\n  *: {risk: low}",
            'a.yaml:2:4: aliases and anchors are refused; put text such as "*" in quotes',
        ),
    ],
)
def test_a_mistake_is_named_with_its_place_and_what_to_do(tmp_path: Path, text: str, expected: str) -> None:
    assert fault_of(tmp_path, text) == expected


def test_what_lies_just_inside_the_bounds_is_read(tmp_path: Path) -> None:
    write(
        tmp_path,
        a="actions:\n  x: {risk: low, max_cost_usd: 1000000000, timeout_seconds: 86400}\n"
        "  y: {risk: low, max_cost_usd: 0.000001, timeout_seconds: 0.001}\n"
        "  z: {risk: low, timeout_seconds: 24h}\n"
        f"  {'n' * 256}: {{risk: low, max_cost_usd: 0}}\n",
    )
    actions = load(tmp_path).actions
    assert (actions["x"].hold, actions["x"].timeout_seconds) == (10**15, 86_400.0)
    assert (actions["y"].hold, actions["y"].timeout_seconds) == (1, 0.001)
    assert actions["n" * 256].hold == 0
    assert actions["z"].timeout_seconds == 86_400.0


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('actions:\n  x: {risk: low, max_cost_usd: "${COST}"}', "2:18: actions.x.max_cost_usd"),
        ('actions:\n  x: {risk: "${RISK:low}"}', "2:7: actions.x.risk"),
        ('actions:\n  "${NAME}": {risk: low}', "2:3: actions.${NAME}"),
        (
            "actions: {x: {risk: low}}\nrules:\n"
            '  - {id: r, on: issue, match: {incident_id: [a, "b-${INC}"]}, effect: deny}',
            "3:49: rules[0].match.incident_id[1]",
        ),
        (
            "actions: {x: {risk: low}}\nrules:\n"
            "  - {id: r, on: issue, effect: deny, reason: 'as ${WHO} said'}",
            "3:38: rules[0].reason",
        ),
        (
            "actions: {x: {risk: low}}\nrules:\n"
            "  - {id: r, on: issue, effect: deny, when: 'risk == \"${R}\"'}",
            "3:38: rules[0].when",
        ),
    ],
)
def test_a_variable_is_not_filled_in_and_so_refused(tmp_path: Path, text: str, place: str) -> None:
    wanted = f"a.yaml:{place}: variables are not substituted in policies; write the value"
    assert wanted in faults(write(tmp_path, a=text))


def test_what_only_looks_like_a_variable_is_text(tmp_path: Path) -> None:
    text = "actions: {x: {risk: low}} # ${COST}\nrules:\n"
    text += '  - {id: r, on: issue, effect: deny, reason: "$COST ${1} ${ ${}"}\n'
    assert load(write(tmp_path, a=text)).rules[0].reason == "$COST ${1} ${ ${}"


def test_target_agents_are_required_only_where_an_action_says_so(tmp_path: Path) -> None:
    write(
        tmp_path,
        a="actions:\n  x: {risk: low, targets_required: true}\n  y: {risk: low, targets_required: false}\n"
        "  z: {risk: low}\n",
    )
    actions = load(tmp_path).actions
    assert [actions[name].targets_required for name in "xyz"] == [True, False, False]


def test_a_name_of_more_than_256_characters_is_refused(tmp_path: Path) -> None:
    assert "1 to 256 printable characters" in fault_of(tmp_path, f"actions: {{{'n' * 257}: {{risk: low}}}}")


def test_an_action_in_two_files_names_both_places(tmp_path: Path) -> None:
    write(tmp_path, a="actions:\n  x: {risk: low}\n", b="actions:\n\n  x: {risk: low}\n")
    assert faults(tmp_path) == ["b.yaml:3:3: actions.x: is already at a.yaml:2:3; keep one of them"]


def test_the_faults_of_all_files_are_reported_at_once(tmp_path: Path) -> None:
    write(tmp_path, a="actions:\n  x: {risk: no}\n", b="actions:\n  y: {}\n  'z\n", c="rules: {}\n")
    assert [fault.split(": ")[0] for fault in faults(tmp_path)] == ["a.yaml:2:13", "b.yaml:3:3", "c.yaml:1:1"]


def test_a_bad_file_among_a_hundred_is_named_with_line_column_key_and_nearest_name(tmp_path: Path) -> None:
    for number in range(100):
        (tmp_path / f"f{number:02}.yaml").write_text(
            f"actions: {{act_{number}: {{risk: low}}}}\n"
            f"rules:\n  - {{id: r{number}, on: issue, match: {{action: act_{number}}}, effect: deny}}\n"
        )
    assert len(load(tmp_path).rules) == 100
    (tmp_path / "f57.yaml").write_text(
        "actions: {act_57: {risk: low}}\n"
        "rules:\n  - {id: r57, on: issue, match: {acton: act_57}, effect: deny}\n"
    )
    assert faults(tmp_path) == [
        'f57.yaml:3:34: rules[0].match.acton: is not a known key; did you mean "action"?'
    ]


def test_the_tests_of_a_folder_are_no_policies_and_do_not_change_the_revision(tmp_path: Path) -> None:
    before = load(write(tmp_path, a="actions: {x: {risk: low}}")).revision
    (tmp_path / "tests").mkdir()
    write(tmp_path / "tests", a="nonsense: [")
    assert load(tmp_path).revision == before


@given(st.binary(max_size=200) | st.text(max_size=200))
@settings(deadline=None, max_examples=100)
def test_any_bytes_are_a_set_or_a_configuration_error(content: bytes | str) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "a.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        with suppress(ConfigurationError):
            load(Path(folder))


# What stands somewhere in a policy file, and what does not, in any combination.
KEYS = tuple(dict.fromkeys(key.path[-1] for key in keys(RuleSection)))
WORDS = st.sampled_from((*KEYS, "x", "restart_*", "issue", "execute", "deny", "allow", "shadow", "low"))
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 10**20)
    | st.floats(allow_nan=False)
    | WORDS
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=6),
    max_leaves=25,
)


@given(st.dictionaries(WORDS, VALUES, max_size=8), VALUES)
@settings(deadline=None, max_examples=200)
def test_any_rule_is_read_or_a_configuration_error(rule: dict[str, object], other: object) -> None:
    document = {"actions": {"x": {"risk": "low"}}, "rules": [{"id": "r", "on": "issue", **rule}, other]}
    with TemporaryDirectory() as folder:
        (Path(folder) / "a.yaml").write_text(json.dumps(document))
        with suppress(ConfigurationError):
            load(Path(folder))


def test_the_shipped_catalogue_loads_and_refuses_what_it_does_not_list() -> None:
    policies = load(SHIPPED)
    assert {policy.risk for policy in policies.actions.values()} == set(RiskClass)
    assert policies.unlisted is None
    assert policies.actions["failover_db"] == ActionPolicy(
        risk=RiskClass.CRITICAL, hold=5_000_000, timeout_seconds=120.0
    )
