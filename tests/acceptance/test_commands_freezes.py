"""`scopegate freeze`, `freezes` and `unfreeze` with the real program, and a freeze after kill -9."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.acceptance.conftest import (
    EXECUTE,
    Backend,
    Program,
    ask_json,
    issue_scope,
    scopegate,
    write_configuration,
)


@pytest.fixture
def backend() -> Iterator[Backend]:
    with Backend() as running:
        yield running


@pytest.fixture
def program(tmp_path: Path, backend: Backend) -> Iterator[Program]:
    with Program(write_configuration(tmp_path, backend.address)) as running:
        yield running


def at(program: Program) -> tuple[str, str]:
    return "--admin", "{}:{}".format(*program.admin)


def execute(program: Program, scope_id: str) -> tuple[int, str | None]:
    answer = ask_json(
        program.data,
        "POST",
        EXECUTE,
        {"scope_id": scope_id, "incident_id": "inc-1", "action": "retry_agent"},
    )
    return answer.status, answer.json().get("error")


def test_one_command_stops_executions_and_one_lets_them_go_on(program: Program) -> None:
    scope_id = issue_scope(program.data, attempts=3)
    assert execute(program, scope_id) == (200, None)
    made = scopegate(
        *("freeze", "--action", "retry_*", "--except-group", "commanders", "--until", "2h"),
        *("--reason", "a storm", *at(program)),
    )
    assert made.returncode == 0, made.stderr
    assert "frozen     action retry_*, except principal_group commanders" in made.stdout
    assert execute(program, scope_id) == (403, "frozen")
    listed = scopegate("freezes", *at(program)).stdout.splitlines()
    assert len(listed) == 2
    assert "action retry_*, except principal_group commanders" in listed[1]
    freeze_id = listed[1].split()[0]
    status = scopegate("status", *at(program)).stdout.splitlines()
    assert status[0].startswith("FROZEN")
    assert "a storm (anonymous)" in status[0]
    health = scopegate("health", "--ops", "{}:{}".format(*program.ops))
    assert (health.returncode, "frozen     1 in force" in health.stdout) == (0, True)
    lifted = scopegate("unfreeze", freeze_id, "--reason", "over", *at(program))
    assert lifted.returncode == 0, lifted.stderr
    assert execute(program, scope_id) == (200, None)
    assert scopegate("freezes", *at(program)).stderr == "nothing is frozen\n"
    (ended,) = json.loads(scopegate("freezes", "--all", "--json", *at(program)).stdout)["freezes"]
    assert (ended["active"], ended["lifted_because"]) == (False, "over")
    said = scopegate("decisions", "list", *at(program)).stdout
    assert "frozen" in said
    assert "unfrozen" in said
    assert "a storm" in said


def test_a_freeze_that_was_answered_holds_after_kill_minus_nine(program: Program) -> None:
    scope_id = issue_scope(program.data, attempts=3)
    assert execute(program, scope_id) == (200, None)
    made = scopegate("freeze", "--all", "--reason", "a bad release", *at(program))
    program.kill()
    assert made.returncode == 0, made.stderr
    program.start()
    assert execute(program, scope_id) == (403, "frozen")
    assert scopegate("log", "verify", "--config", program.config).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--reason", "r"), "say what to freeze, for example --action 'restart_*'"),
        (
            ("--all", "--action", "x", "--reason", "r"),
            "--all freezes every execution; omit it, or the options",
        ),
        (("--all",), "Missing option '--reason'"),
        (("--all", "--reason", "r", "--until", "soon"), "'soon' is neither a duration such as 10s, 5m"),
        (("--all", "--reason", "r", "--until", "9999999d"), "'9999999d' ends after the year 9999"),
    ],
)
def test_a_freeze_that_does_not_say_what_or_why_is_not_set(
    program: Program, arguments: tuple[str, ...], said: str
) -> None:
    ended = scopegate("freeze", *arguments, *at(program))
    assert (ended.returncode, ended.stdout) == (2, "")
    assert said in " ".join(ended.stderr.split())
    assert scopegate("freezes", *at(program)).stderr == "nothing is frozen\n"


def test_the_sidecar_names_what_is_wrong_with_a_freeze(program: Program) -> None:
    robot = scopegate("freeze", "--kind", "robot", "--reason", "r", *at(program))
    assert robot.returncode == 1
    assert "match/principal_kind must be one of human, service, agent, or a glob" in robot.stderr
    unknown = scopegate("unfreeze", "none", "--reason", "r", *at(program))
    assert (unknown.returncode, "freeze_not_found" in unknown.stderr) == (1, True)
