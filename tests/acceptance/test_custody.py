"""Custody with the real program: the bytes of the credential are searched for wherever the sidecar writes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sidecar.settings.reading import Listen
from tests.acceptance.conftest import Program, scopegate, write_configuration
from tests.client import Message, as_json, ask
from tests.collector import Collector
from tests.support import EXECUTE, SCOPE, Backend, eventually, replies, sends

pytestmark = pytest.mark.slow

SECRET = "s3cr3t-of-the-backend"
ROUTES = [{"path": EXECUTE}, {"path": "/jobs/run", "name": "job", "completion": "report"}]
BODY = {"incident_id": "inc_1", "action": "retry_agent"}
# The backend sends the credential back wherever it can.
ECHO = (("Content-Type", "application/json"), ("X-Seen", f"Bearer {SECRET}"), ("X-Recovery-Cost-USD", SECRET))


@pytest.fixture
def program(tmp_path: Path, backend: Backend, collector: Collector) -> Iterator[Program]:
    assert isinstance(backend.address, Listen)
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "token").write_text(f"Bearer {SECRET}\n")
    entry = {"header": "Authorization", "value_file": "secrets/token", "on": ["gated", "pass"]}
    config = write_configuration(
        tmp_path,
        (backend.address.host, backend.address.port),
        upstream={"credentials": [entry], "response_timeout_seconds": 0.5},
        gate={"routes": ROUTES, "completion_base_url": "http://127.0.0.1:1"},
        telemetry={"otlp_endpoint": collector.url},
        scopes={"defaults": {"max_attempts": 10}},
    )
    with Program(config) as running:
        yield running


def written_under(folder: Path) -> list[Path]:
    """Every file but the one of the credential itself."""
    return [file for file in folder.rglob("*") if file.is_file() and file.parent.name != "secrets"]


async def issue(program: Program) -> dict[str, Any]:
    answer = await ask(Listen(*program.data), "POST", SCOPE, *as_json({**BODY, "intent": "a test"}))
    assert answer.status == 201, answer.body
    return {**BODY, "scope_id": answer.json()["scope_id"]}


async def execute(program: Program, wanted: dict[str, Any], path: str = EXECUTE, key: str = "") -> Message:
    kind, body = as_json(wanted)
    named = [("Idempotency-Key", key)] if key else []
    return await ask(Listen(*program.data), "POST", path, [*kind, *named], body)


async def test_the_bytes_of_the_credential_stand_nowhere(
    program: Program, backend: Backend, collector: Collector, tmp_path: Path
) -> None:
    wanted = await issue(program)
    data, admin, ops = (Listen(*each) for each in (program.data, program.admin, program.ops))
    echo = replies(json.dumps({"seen": f"Bearer {SECRET}"}).encode(), headers=ECHO)
    said: list[bytes] = []  # the answers of the sidecar itself

    # Answered, twice under a key, with an echo in every place.
    backend.script = echo
    assert SECRET.encode() in (await execute(program, wanted, key="a-key-of-one-action")).body
    said.append((await execute(program, wanted, key="a-key-of-one-action")).body)
    backend.script = replies(b"{}", status=f"200 {SECRET}")
    assert (await execute(program, wanted, key="another-key-of-an-action")).status == 200
    said.append((await execute(program, wanted, key="another-key-of-an-action")).first.encode())
    # Passed through.
    backend.script = echo
    assert SECRET.encode() in (await ask(data, "GET", "/elsewhere")).body
    # Answers that are broken, cut off and late.
    for script in (
        sends(f"HTTP/1.1 200 OK\r\nContent-Length: {SECRET}\r\n\r\n".encode(), then="close"),
        sends(f"HTTP/1.1 {SECRET} OK\r\n\r\n".encode(), then="close"),
        sends(f"{SECRET}\r\n\r\n".encode(), then="close"),
        sends(f"HTTP/1.1 200 OK\r\nTransfer-Encoding: {SECRET}\r\n\r\n".encode(), then="close"),
        sends(f"HTTP/1.1 200 OK\r\n{SECRET}\r\n\r\n".encode(), then="close"),
        sends(f"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{SECRET}\r\n".encode(), then="close"),
        sends(f"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n{SECRET}".encode(), then="close"),
        sends(f"HTTP/1.1 101 {SECRET}\r\nUpgrade: {SECRET}\r\n\r\n".encode(), then="close"),
        sends(then="hang"),
    ):
        backend.script = script
        said.append((await execute(program, await issue(program))).body)
    # A report that repeats it.
    backend.script = replies(b"{}")
    admitted = await execute(program, await issue(program), "/jobs/run")
    decision_id = admitted.header("Scopegate-Decision-Id")
    token = backend.seen[-1].header("Scopegate-Completion-Token")
    report = {"outcome": "succeeded", "detail": f"sent with Bearer {SECRET}"}
    kind, body = as_json(report)
    reported = await ask(
        data,
        "POST",
        f"/api/v1/recovery/executions/{decision_id}/complete",
        [*kind, ("Authorization", f"Bearer {token}")],
        body,
    )
    assert reported.status == 200, reported.body
    said.append(reported.body)
    # What the sidecar says of itself, with the file and without it.
    looked = (
        "/api/v1/status",
        "/api/v1/decisions?limit=1000",
        "/api/v1/executions",
        "/openapi.json",
        "/docs",
    )
    said += [(await ask(admin, "GET", path)).body for path in looked]
    said.append((await ask(ops, "GET", "/metrics")).body)
    assert b"scopegate_credential_echoes_total" in said[-1]
    shown = scopegate("config", "show", "--config", program.config)
    said += [shown.stdout.encode(), scopegate("check", "--config", program.config).stdout.encode()]
    (tmp_path / "secrets" / "token").write_text(f"Bearer {SECRET}\nand more\n")
    assert scopegate("check", "--config", program.config).returncode == 2
    said.append(scopegate("check", "--config", program.config).stderr.encode())

    async def lost() -> bool:
        return (await ask(ops, "GET", "/health/ready")).status == 503

    await eventually(lost)
    said.append((await execute(program, await issue(program))).body)
    assert b"credential_unavailable" in said[-1]
    said.append((await ask(ops, "GET", "/health/ready")).body)
    collector.wait(lambda: len(collector.spans) > 20)
    program.stop()

    assert [body for body in said if SECRET.encode() in body] == []
    assert SECRET not in program.log()
    assert SECRET not in repr(collector.spans)
    files = written_under(tmp_path)
    assert any(file.name == "scopegate.db" for file in files)
    assert [file for file in files if SECRET.encode() in file.read_bytes()] == []
