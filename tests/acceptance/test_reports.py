"""Executions that are reported later, by the real program: kills, restarts and the command line."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.acceptance.conftest import (
    EXECUTE,
    Backend,
    Program,
    ask,
    ask_json,
    execution,
    executions,
    issue_scope,
    scope_of,
    scopegate,
    write_configuration,
)
from tests.client import Message, as_json

SECONDS = 600


@pytest.fixture
def backend() -> Iterator[Backend]:
    with Backend() as running:
        yield running


def configured(folder: Path, backend: Backend, seconds: int = SECONDS) -> Path:
    route = {
        "path": "**/recovery/execute",
        "completion": "report",
        "completion_timeout_seconds": seconds,
    }
    gate = {"completion_base_url": "http://127.0.0.1:1", "routes": [route]}
    return write_configuration(folder, backend.address, gate=gate)


@pytest.fixture
def sidecar(tmp_path: Path, backend: Backend) -> Iterator[Program]:
    with Program(configured(tmp_path, backend)) as running:
        yield running


def execute(sidecar: Program, scope_id: str) -> Message:
    return ask_json(sidecar.data, "POST", EXECUTE, execution(scope_id))


def report(sidecar: Program, backend: Backend, decision_id: str, outcome: str) -> Message:
    kind, body = as_json({"outcome": outcome})
    token = ("Authorization", f"Bearer {backend.tokens[decision_id]}")
    path = f"/api/v1/recovery/executions/{decision_id}/complete"
    return ask(sidecar.data, "POST", path, [*kind, token], body)


def test_a_kill_ends_no_running_execution_and_reports_win_over_what_it_left_unknown(
    sidecar: Program, backend: Backend
) -> None:
    scope = issue_scope(sidecar.data, attempts=4)
    for _ in range(2):
        assert execute(sidecar, scope).status == 200
    running = list(backend.seen)
    backend.go_on.clear()
    with ThreadPoolExecutor(2) as aside:
        asked = [aside.submit(execute, sidecar, scope) for _ in range(2)]
        sidecar.until("the backend has all", lambda: len(backend.seen) == 4 or None)
        sidecar.kill()
        backend.go_on.set()
        for each in asked:
            assert isinstance(each.exception(20), ConnectionError)
    unknown = [each for each in backend.seen if each not in running]
    sidecar.start()

    assert {each["decision_id"] for each in executions(sidecar.admin, "running")} == set(running)
    assert {each["decision_id"] for each in executions(sidecar.admin, "unknown")} == set(unknown)
    admin = f"{sidecar.admin[0]}:{sidecar.admin[1]}"
    listed = scopegate("executions", "list", "--admin", admin, "--status", "running")
    assert listed.returncode == 0
    assert all(each in listed.stdout for each in running)
    shown = scopegate("status", "--admin", admin).stdout
    assert "2 to be reported" in shown

    for decision_id, outcome in zip(
        [*running, *unknown], ["succeeded", "not_executed", "failed", "not_executed"], strict=True
    ):
        for _ in range(2):
            answer = report(sidecar, backend, decision_id, outcome)
            assert (answer.status, answer.json()["status"]) == (200, outcome)
    assert scope_of(sidecar.data, scope)["attempts_used"] == 2
    other = report(sidecar, backend, running[0], "failed")
    assert (other.status, other.json()["error"]) == (409, "completion_conflict")
    sidecar.kill()
    sidecar.start()
    statuses = {each["decision_id"]: each["status"] for each in executions(sidecar.admin)}
    assert [statuses[each] for each in [*running, *unknown]] == [
        "succeeded",
        "not_executed",
        "failed",
        "not_executed",
    ]
    assert scopegate("log", "verify", "--config", sidecar.config).returncode == 0


def test_sigterm_ends_no_running_execution(sidecar: Program, backend: Backend) -> None:
    scope = issue_scope(sidecar.data)
    assert execute(sidecar, scope).status == 200
    assert sidecar.stop() == 0
    sidecar.start()
    assert report(sidecar, backend, backend.seen[0], "succeeded").json()["scope_status"] == "exhausted"


def test_a_time_limit_that_passes_while_the_program_is_down_is_noticed_at_its_start(
    tmp_path: Path, backend: Backend
) -> None:
    with Program(configured(tmp_path, backend, seconds=1)) as sidecar:
        assert execute(sidecar, issue_scope(sidecar.data)).status == 200
        sidecar.kill()
        time.sleep(1)
        sidecar.start()
        sidecar.until("it is unknown", lambda: executions(sidecar.admin, "unknown"))
        answer = report(sidecar, backend, backend.seen[0], "succeeded")
        assert (answer.status, answer.json()["error"]) == (403, "completion_refused")
        assert sidecar.until_logged("an execution was not reported in time")
