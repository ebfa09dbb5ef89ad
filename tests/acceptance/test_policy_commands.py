"""`scopegate policy` as an operator meets it: tests beside the policies, a new set tried on a real log."""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.conftest import (
    EXECUTE,
    Backend,
    Program,
    ask_json,
    execution,
    issue_scope,
    scopegate,
    write_configuration,
)

ACTIONS = "actions:\n  retry_agent: {risk: low, max_cost_usd: 0.01}\n  restart_agent: {risk: medium}\n"
RULES = """
rules:
  - id: storm-brake
    on: execute
    match: {action: "retry_*"}
    brake: {per: [incident_id], max_attempts: 2, window_seconds: 3600}
    reason: Twice is enough.
"""
TESTS = """
tests:
  - name: a third retry is braked
    on: execute
    now: 2026-12-24T12:00:00Z
    facts: {action: retry_agent}
    history: [{seconds_ago: 60}, {seconds_ago: 120}]
    want: {verdict: refused, error: braked, rules: [storm-brake], retry_after_seconds: 3480}
  - name: a second retry is not
    on: execute
    facts: {action: retry_agent}
    history: [{seconds_ago: 60}]
    want: {verdict: allowed}
"""


def policy_set(folder: Path, rules: str = RULES, tests: str = TESTS, actions: str = ACTIONS) -> Path:
    (folder / "tests").mkdir(parents=True)
    (folder / "actions.yaml").write_text(actions)
    (folder / "rules.yaml").write_text(rules)
    (folder / "tests" / "brakes.yaml").write_text(tests)
    return folder


# policy test --------------------------------------------------------------------------------------------


def test_tests_that_hold_exit_0(tmp_path: Path) -> None:
    ended = scopegate("policy", "test", policy_set(tmp_path / "policies"))
    assert (ended.returncode, ended.stderr) == (0, "")
    *lines, summary = ended.stdout.splitlines()
    assert lines == ["ok    brakes.yaml: a third retry is braked", "ok    brakes.yaml: a second retry is not"]
    assert summary.startswith("all 2 tests hold, policies revision ")


def test_a_test_that_does_not_hold_exits_1_and_says_what_came_and_why(tmp_path: Path) -> None:
    folder = policy_set(
        tmp_path / "policies", tests=TESTS.replace("seconds_ago: 60}]", "seconds_ago: 60}, {seconds_ago: 1}]")
    )
    ended = scopegate("policy", "test", folder)
    assert (ended.returncode, ended.stderr) == (1, "")
    assert ended.stdout.splitlines()[1:-1] == [
        "FAIL  brakes.yaml: a second retry is not",
        f"      {folder}/tests/brakes.yaml:13:12: want.verdict: wanted allowed, got refused",
        "      the gate says braked: 2 executions in 3600 s are the most. storm-brake: Twice is enough.",
    ]
    assert ended.stdout.splitlines()[-1].startswith("1 of 2 tests do not hold, policies revision ")


def test_a_set_or_a_test_that_cannot_be_read_exits_2_with_every_mistake(tmp_path: Path) -> None:
    folder = policy_set(
        tmp_path / "policies",
        rules=RULES.replace("max_attempts", "max_atempts"),
        tests=TESTS.replace("verdict: allowed", "verdikt: allowed"),
    )
    ended = scopegate("policy", "test", folder)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert f"{folder}/rules.yaml:6:" in ended.stderr
    assert f"{folder}/tests/brakes.yaml:13:12: tests[1].want.verdikt: is not a known key; " in ended.stderr
    assert scopegate("policy", "test", tmp_path / "none").returncode == 2
    shutil.rmtree(folder / "tests")
    (folder / "rules.yaml").write_text(RULES)
    ended = scopegate("policy", "test", folder)
    assert ended.returncode == 2
    assert "contains no *.yaml file" in ended.stderr


# policy replay ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sidecar that has stopped: four executions of one incident, two of another."""
    folder = tmp_path_factory.mktemp("recorded")
    with Backend() as backend, Program(write_configuration(folder, backend.address)) as sidecar:
        for incident, count in (("inc-1", 4), ("inc-2", 2)):
            scope = issue_scope(sidecar.data, incident=incident, attempts=count)
            for _ in range(count + 1):  # the last is one too many for the scope
                execute(sidecar, scope, incident)
        assert sidecar.stop() == 0
    return folder


def execute(sidecar: Program, scope: str, incident: str) -> None:
    body = {**execution(scope, incident=incident), "parameters": {"agent": "legal"}}
    assert ask_json(sidecar.data, "POST", EXECUTE, body).status in (200, 400)


@pytest.fixture
def folder(recorded: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(recorded, tmp_path / "copy"))


def report(folder: Path, new: Path, *more: str) -> Any:
    ended = scopegate(
        "policy", "replay", "--config", folder / "scopegate.yaml", "--policies", new, "--json", *more
    )
    assert (ended.returncode, ended.stderr) == (0, ""), ended
    return json.loads(ended.stdout)


def test_a_stricter_set_lists_what_it_would_have_refused(folder: Path, tmp_path: Path) -> None:
    new = policy_set(tmp_path / "new")
    ended = scopegate("policy", "replay", "--config", folder / "scopegate.yaml", "--policies", new)
    assert (ended.returncode, ended.stderr) == (0, ""), ended
    lines = ended.stdout.splitlines()
    assert lines[0].split() == ["decision", "time", "what", "action", "incident", "recorded", "->", "now"]
    for line in lines[1:3]:
        assert line.endswith(
            "Z  execute  retry_agent           inc-1                 allowed -> braked (storm-brake)"
        )
    assert lines[3] == ""
    summary = {" ".join(words[:-1]): words[-1] for words in (line.split() for line in lines[6:])}
    assert summary == {
        "decided again": "8",
        "unchanged": "6",
        "would be refused": "2",
        "would be allowed": "0",
    }
    assert lines[4].startswith("recorded under revision  ")
    assert lines[4].endswith(" (8)")
    assert lines[5].startswith("replayed under revision  ")
    assert lines[5].endswith(f", {new}")


def test_beside_a_running_sidecar_a_machine_reads_the_same(folder: Path, tmp_path: Path) -> None:
    new = policy_set(tmp_path / "new")
    with Backend() as backend:
        write_configuration(folder, backend.address)
        with Program(folder / "scopegate.yaml") as sidecar:
            execute(sidecar, issue_scope(sidecar.data, incident="inc-1"), "inc-1")
            said = report(folder, new)
    assert [change["change"] for change in said["changes"]] == ["refused"] * 3
    assert said["changes"][0]["now"] == {
        "verdict": "refused",
        "error": "braked",
        "rules": ["storm-brake"],
        "would_refuse": [],
        "lowered": {},
    }
    summary = said["summary"]
    assert summary["counts"]["unchanged"] == 7
    assert summary["counts"]["refused"] == 3
    assert list(summary["recorded_under"].values()) == [10]


def test_under_its_own_set_nothing_changes(folder: Path) -> None:
    said = report(folder, folder / "policies")
    assert said["changes"] == []
    assert said["summary"]["counts"]["unchanged"] == 8
    assert [said["summary"]["replayed_under"]] == list(said["summary"]["recorded_under"])


def test_since_leaves_out_what_was_before_but_brakes_count_it(folder: Path, tmp_path: Path) -> None:
    new = policy_set(tmp_path / "new")
    with Backend() as backend:
        write_configuration(folder, backend.address)
        with Program(folder / "scopegate.yaml") as sidecar:
            before = datetime.now(UTC).isoformat()
            execute(sidecar, issue_scope(sidecar.data, incident="inc-2"), "inc-2")
            assert sidecar.stop() == 0
    for since in (before, before.replace("+00:00", "Z")):
        said = report(folder, new, "--since", since)
        assert [change["incident_id"] for change in said["changes"]] == ["inc-2"]
        assert said["summary"]["counts"] == {
            "unchanged": 1,
            "refused": 1,
            "allowed": 0,
            "otherwise": 0,
            "lowered": 0,
            "shadow": 0,
            "undecidable": 0,
        }
    assert sum(report(folder, new, "--since", "1h")["summary"]["counts"].values()) == 10
    assert sum(report(folder, new, "--since", "0s")["summary"]["counts"].values()) == 0


@pytest.mark.parametrize("since", ["yesterday", "2026-12-24", "2026-12-24T12:00:00", "24", "-1h"])
def test_a_time_that_cannot_be_read_is_wrong_usage(folder: Path, since: str) -> None:
    ended = scopegate(
        "policy",
        "replay",
        "--config",
        folder / "scopegate.yaml",
        "--policies",
        folder / "policies",
        f"--since={since}",
    )
    assert ended.returncode == 2
    message = " ".join(ended.stderr.split())
    assert "such as 2026-12-24T12:00:00Z, nor a duration such as 90m, 24h or 7d" in message


def test_what_is_undecidable_is_counted_with_its_reason(tmp_path: Path) -> None:
    with Backend() as backend:
        masks = {"mask": ["/decision_inputs/parameters/agent"]}
        config = write_configuration(tmp_path / "masked", backend.address, log=masks)
        with Program(config) as sidecar:
            scope = issue_scope(sidecar.data, attempts=3)
            for _ in range(3):
                execute(sidecar, scope, "inc-1")
            assert sidecar.stop() == 0
    rules = (
        "rules:\n  - {id: careful, on: execute, effect: deny, reason: r,"
        " when: 'has(parameters.agent) && parameters.agent == \"x\"'}\n"
    )
    new = policy_set(tmp_path / "new", rules=rules)
    ended = scopegate("policy", "replay", "--config", config, "--policies", new)
    assert ended.returncode == 0, ended
    lines = ended.stdout.splitlines()
    assert lines[-2].split() == ["undecidable", "3"]
    assert lines[-1].split()[:8] == [
        "3",
        "rule",
        "careful",
        "looks",
        "at",
        "parameters.agent:",
        "masked,",
        "for",
    ]
    assert len(lines) == 8, "the table leaves them out"
    said = report(tmp_path / "masked", new)
    assert [change["why"] for change in said["changes"]] == [
        "rule careful looks at parameters.agent: masked"
    ] * 3
    assert [why["count"] for why in said["summary"]["undecidable"]] == [3]


def test_a_set_that_cannot_be_read_exits_2_and_a_log_that_is_not_there_1(
    folder: Path, tmp_path: Path
) -> None:
    config = folder / "scopegate.yaml"
    new = policy_set(tmp_path / "new", rules="rules: [{id: x}]")
    ended = scopegate("policy", "replay", "--config", config, "--policies", new)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert f"{new}/rules.yaml:1:" in ended.stderr
    with (folder / "var" / "scopegate.db").open("r+b") as database:
        database.truncate(8_192)
    ended = scopegate("policy", "replay", "--config", config, "--policies", folder / "policies")
    assert ended.returncode == 4, ended
    shutil.rmtree(folder / "var")
    ended = scopegate("policy", "replay", "--config", config, "--policies", folder / "policies")
    assert ended.returncode == 1, ended
    assert "cannot replay: there is no database" in ended.stderr
