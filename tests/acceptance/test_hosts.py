"""The running program under names that are not its own, and its commands under every name that they use."""

from __future__ import annotations

import asyncio
import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from tests.acceptance.conftest import (
    EXECUTE,
    Address,
    Backend,
    Program,
    ask_json,
    execution,
    issue_scope,
    scopegate,
    write_configuration,
)
from tests.client import BlockingConnection

SCOPE = "/api/v1/recovery/scope"
SWITCH = "/api/v1/care/kill-switch"


def said(address: Address, raw: bytes) -> tuple[int, Any]:
    """The status and the document of the answer to these bytes."""
    with BlockingConnection(address) as connection:
        answer = connection.send(raw)
    return answer.status, answer.json() if answer.body else None


def raw(method: str, target: str, *headers: str, body: bytes = b"") -> bytes:
    lines = [f"{method} {target} HTTP/1.1", *headers, f"Content-Length: {len(body)}", "Connection: close"]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


@contextmanager
def forwarding(to: Address) -> Iterator[int]:
    """A port of this machine that leads to an address byte for byte, as `kubectl port-forward` does."""
    loop, started, stop = asyncio.new_event_loop(), threading.Event(), asyncio.Event()
    ports: list[int] = []

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while piece := await reader.read(65_536):
            writer.write(piece)
            await writer.drain()
        writer.close()

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(*to)
        await asyncio.gather(carry(reader, back), carry(there, writer), return_exceptions=True)

    async def serve() -> None:
        server = await asyncio.start_server(forward, "127.0.0.1", 0)
        ports.append(server.sockets[0].getsockname()[1])
        started.set()
        await stop.wait()
        server.close()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    assert started.wait(10)
    try:
        yield ports[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.close()


def test_what_a_backend_would_take_for_a_gated_target_never_reaches_it(tmp_path: Path) -> None:
    with Backend() as backend, Program(write_configuration(tmp_path, backend.address)) as program:
        kind, body = "Content-Type: application/json", json.dumps(execution("scope_x")).encode()
        for target, host in (
            ("/foo", "x/api/v1/recovery/execute?"),
            ("/execute", "x/api/v1/recovery"),
            ("/foo", "u@x/api/v1/recovery/execute#"),
            ("http://u@x/foo", "x"),
            ("http://x%2fapi%2fv1%2frecovery%2fexecute%3f/foo", "x"),
            (EXECUTE, "u@x"),
        ):
            status, problem = said(program.data, raw("POST", target, f"Host: {host}", kind, body=body))
            assert (status, problem["error"]) == (400, "invalid_request"), (target, host)
        assert backend.seen == []
        recorded = ask_json(program.admin, "GET", "/api/v1/decisions?event=refused").json()["decisions"]
        # The last two are gated without the host's help.
        assert [each["decision_reason"] for each in recorded] == ["invalid_request"] * 2


def test_a_web_page_can_neither_look_nor_change(tmp_path: Path) -> None:
    with Backend() as backend, Program(write_configuration(tmp_path, backend.address)) as program:
        evil, own = "Host: evil.example", f"Host: {program.admin[0]}:{program.admin[1]}"
        origin = "Origin: http://evil.example"
        for method, target in (("GET", "/api/v1/decisions"), ("PUT", SWITCH), ("POST", "/api/v1/reload")):
            status, problem = said(program.admin, raw(method, target, evil))
            assert (status, problem["error"]) == (421, "misdirected_request")
        for headers in ([own, origin], [own, "Origin: null"], [own, "Sec-Fetch-Site: cross-site"]):
            for method, target in (("PUT", SWITCH), ("POST", "/api/v1/reload")):
                status, problem = said(program.admin, raw(method, target, *headers))
                assert (status, problem["error"]) == (403, "cross_site")
        wanted = b'{"incident_id": "i", "action": "retry_agent", "intent": "why"}'
        kind, data = "Content-Type: application/json", f"Host: {program.data[0]}:{program.data[1]}"
        assert said(program.data, raw("POST", SCOPE, evil, kind, body=wanted))[0] == 421
        assert said(program.data, raw("POST", SCOPE, data, origin, kind, body=wanted))[0] == 403
        assert said(program.data, raw("POST", SCOPE, data, kind, body=wanted))[0] == 201
        # As a page of the listener itself would.
        page = [own, f"Origin: http://{program.admin[0]}:{program.admin[1]}", "Sec-Fetch-Site: same-origin"]
        assert said(program.admin, raw("PUT", SWITCH, *page)) == (200, {"active": True})
        assert said(program.admin, raw("DELETE", SWITCH, own)) == (200, {"active": False})
        assert said(program.ops, raw("GET", "/health/ready", "Host: 10.1.2.3:9902"))[0] == 200


def test_a_name_is_allowed_while_it_runs(tmp_path: Path) -> None:
    with Backend() as backend, Program(write_configuration(tmp_path, backend.address)) as program:
        asking = raw("GET", "/api/v1/status", "Host: gate.example:443")
        assert said(program.admin, asking)[0] == 421
        document = yaml.safe_load(program.config.read_text())
        document["admin"]["allowed_hosts"] = ["Gate.Example"]
        program.config.write_text(yaml.safe_dump(document))
        program.signal(signal.SIGHUP)
        program.until("answers to the name", lambda: said(program.admin, asking)[0] == 200)
        listed = said(program.admin, raw("GET", "/api/v1/status", "Host: other.example"))
        assert listed[0] == 421


def the_commands_work(admin: str, data: str) -> None:
    """Each kind of command, on both listeners."""
    for arguments in (
        ("status", "--admin", admin),
        ("decisions", "list", "--admin", admin),
        ("executions", "list", "--admin", admin),
        ("explain", "--admin", admin, "{}"),
        ("scopes", "list", "--admin", admin),
        ("scopes", "revoke", "--admin", admin, "--data", data, "--all", "--yes"),
    ):
        ended = scopegate(*arguments)
        would_be_refused = arguments[0] == "explain"
        assert ended.returncode == int(would_be_refused), (arguments, ended)
        assert "misdirected_request" not in ended.stdout + ended.stderr


def test_the_commands_work_by_address_by_name_and_through_a_forwarded_port(tmp_path: Path) -> None:
    with (
        Backend() as backend,
        Program(write_configuration(tmp_path, backend.address)) as program,
        forwarding(program.admin) as admin,
        forwarding(program.data) as data,
    ):
        for host, ports in (
            ("127.0.0.1", (program.admin[1], program.data[1])),
            ("localhost", (program.admin[1], program.data[1])),
            ("127.0.0.1", (admin, data)),
            ("localhost", (admin, data)),
        ):
            issue_scope(program.data)
            the_commands_work(f"{host}:{ports[0]}", f"{host}:{ports[1]}")


def test_the_commands_work_where_the_data_listener_is_open_to_all(tmp_path: Path) -> None:
    data = {"listen": "0.0.0.0:0", "allowed_hosts": ["gate.example"]}
    with Program(write_configuration(tmp_path, ("127.0.0.1", 1), data=data)) as program:
        issue_scope(program.data)
        the_commands_work(f"127.0.0.1:{program.admin[1]}", f"0.0.0.0:{program.data[1]}")
