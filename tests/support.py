"""The surroundings of a test: a scripted backend on a real socket, a sidecar in front of it, and a clock."""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sidecar.clock import elapsed_clock, wall_clock
from sidecar.core.command import Admit
from sidecar.core.facts import Claims
from sidecar.core.policy import ActionPolicy, PolicySet, RiskClass
from sidecar.gate.reports import digest_of, new_token
from sidecar.ids import new_decision_id
from sidecar.serve import Sidecar
from sidecar.settings.addresses import Address, Listen, SocketFile
from sidecar.settings.reading import default
from sidecar.settings.sections import ListenTlsSection
from tests.client import STREAM_LIMIT, HeaderList, Message, as_json, ask, read_message

SECOND = 1_000_000
EXECUTE = "/api/v1/recovery/execute"
SCOPE = "/api/v1/recovery/scope"
SCOPES = "/api/v1/recovery/scopes/"

POLICIES = PolicySet(
    revision="rev-1",
    actions={
        "retry_agent": ActionPolicy(risk=RiskClass.LOW),
        "failover": ActionPolicy(risk=RiskClass.HIGH, hold=100_000),
        "patient": ActionPolicy(risk=RiskClass.LOW, timeout_seconds=0.15),
    },
)


class Clock:
    """The clocks of a test, in microseconds: the wall clock (since 1970) and the monotonic clock.

    Both run. A test can let time pass on both, and can set the wall clock forward and back.
    """

    def __init__(self) -> None:
        self.offset = 0
        self.passed = 0

    def __call__(self) -> int:
        return wall_clock() + self.passed + self.offset

    def elapsed(self) -> int:
        return elapsed_clock() + self.passed

    def move(self, seconds: float) -> None:
        """Let time pass. A negative number sets the wall clock back."""
        if seconds < 0:
            self.set(seconds)
        else:
            self.passed += int(seconds * SECOND)

    def set(self, seconds: float) -> None:
        """Set the wall clock forward or back, while no time passes."""
        self.offset += int(seconds * SECOND)


# The backend --------------------------------------------------------------------------------------------

Script = Callable[[Message, asyncio.StreamWriter], Awaitable[None]]


def reset(writer: asyncio.StreamWriter) -> None:
    """Close a connection with RST."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def replies(
    body: bytes = b'{"done": true}',
    *,
    status: str = "200 OK",
    headers: HeaderList = (("Content-Type", "application/json"),),
    after: asyncio.Event | float | None = None,
) -> Script:
    """A script that answers: at once, after a number of seconds, or when an event is set."""

    async def script(request: Message, writer: asyncio.StreamWriter) -> None:
        if isinstance(after, asyncio.Event):
            await after.wait()
        elif after is not None:
            await asyncio.sleep(after)
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers)
        head = f"HTTP/1.1 {status}\r\n{lines}Content-Length: {len(body)}\r\n\r\n".encode("latin-1")
        writer.write(head + (b"" if request.method == "HEAD" else body))

    return script


def sends(*pieces: bytes | float, then: str = "stay") -> Script:
    """A script that sends raw pieces, with pauses in seconds between them.

    Then it stays for the next request, or closes, resets or hangs.
    """

    async def script(request: Message, writer: asyncio.StreamWriter) -> None:
        for piece in pieces:
            if isinstance(piece, bytes):
                writer.write(piece)
                await writer.drain()
            else:
                await asyncio.sleep(piece)
        if then == "close":
            writer.close()
        elif then == "reset":
            reset(writer)
        elif then == "hang":
            await asyncio.Event().wait()

    return script


@dataclass
class Backend:
    """A backend that records every request and runs `script` for it."""

    address: Address
    script: Script = field(default_factory=replies)
    seen: list[Message] = field(default_factory=list)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    scheme: str = "http"
    connections: int = 0
    # Serves the connections itself, where they do not carry HTTP.
    instead: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]] | None = None
    _tasks: set[asyncio.Task[Any]] = field(default_factory=set)

    @property
    def url(self) -> str:
        """The value for `upstream.url`."""
        unix = isinstance(self.address, SocketFile)
        return str(self.address) if unix else f"{self.scheme}://{self.address}"

    @property
    def executions(self) -> list[Message]:
        return [message for message in self.seen if message.method == "POST"]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        try:
            if self.instead is not None:
                await self.instead(reader, writer)
                return
            while (message := await read_message(reader)) is not None:
                self.seen.append(message)
                self.arrived.set()
                await self.script(message, writer)
                if writer.is_closing():
                    return
                await writer.drain()
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.close()

    async def stop(self) -> None:
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.sleep(0)


@asynccontextmanager
async def serving_backend(
    *, tls: ssl.SSLContext | None = None, path: Path | None = None
) -> AsyncIterator[Backend]:
    """A backend on a free port or on the Unix socket `path`, with TLS if `tls` is given."""
    backend = Backend(Listen("127.0.0.1", 0), scheme="http" if tls is None else "https")
    server: asyncio.Server
    if path is None:
        server = await asyncio.start_server(
            backend.serve, "127.0.0.1", 0, backlog=2048, limit=STREAM_LIMIT, ssl=tls
        )
        backend.address = Listen(*server.sockets[0].getsockname()[:2])
    else:
        server = await asyncio.start_unix_server(backend.serve, path, backlog=2048, limit=STREAM_LIMIT)
        backend.address = SocketFile(path)
    try:
        yield backend
    finally:
        server.close()
        await backend.stop()


def unused_port() -> int:
    """A port without a listener."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port: int = held.getsockname()[1]
        return port


# The house ----------------------------------------------------------------------------------------------


@dataclass
class House:
    """A running sidecar between a client and a backend."""

    sidecar: Sidecar
    backend: Backend
    clock: Clock
    database: Path
    tls: ssl.SSLContext | None = None  # for the client, on listeners that have a certificate

    def speaks(self, listener: ListenTlsSection) -> ssl.SSLContext | None:
        """The client's TLS context for a listener, None for plain HTTP."""
        return None if listener.certificate_file is None else self.tls

    def adopt(self, policies: PolicySet | None) -> None:
        """Judge later requests by these policies."""
        self.sidecar.live.snapshot = replace(self.sidecar.live.snapshot, policies=policies)

    # The data listener

    async def data(
        self, method: str, target: str, headers: HeaderList = (), body: bytes | None = None
    ) -> Message:
        tls = self.speaks(self.sidecar.settings.data.tls)
        return await ask(self.sidecar.data_address, method, target, headers, body, tls=tls)

    async def issue(self, *, headers: HeaderList = (), **members: Any) -> dict[str, Any]:
        """A granted scope. By default it has one attempt of retry_agent for inc_1."""
        answer = await self.ask_for_scope(headers=headers, **members)
        assert answer.status == 201, answer.body
        granted: dict[str, Any] = answer.json()
        return granted

    async def ask_for_scope(self, *, headers: HeaderList = (), **members: Any) -> Message:
        wanted = {"incident_id": "inc_1", "action": "retry_agent", "intent": "a test", **members}
        kind, body = as_json({name: value for name, value in wanted.items() if value is not ...})
        return await self.data("POST", SCOPE, [*kind, *headers], body)

    async def execute(
        self,
        scope: Mapping[str, Any] | None,
        *,
        target: str = EXECUTE,
        headers: HeaderList = (),
        **members: Any,
    ) -> Message:
        """Execute under a scope, by default its first action for its incident. `...` omits a member."""
        kind, body = self.execution(scope, **members)
        return await self.data("POST", target, [*kind, *headers], body)

    @staticmethod
    def execution(scope: Mapping[str, Any] | None, **members: Any) -> tuple[list[tuple[str, str]], bytes]:
        asked: dict[str, Any] = {"incident_id": "inc_1", "action": "retry_agent"}
        if scope is not None:
            asked = {
                "scope_id": scope["scope_id"],
                "incident_id": scope["incident_id"],
                "action": scope["allowed_actions"][0],
            }
        asked.update(members)
        return as_json({name: value for name, value in asked.items() if value is not ...})

    async def revoke(self, scope: Mapping[str, Any]) -> Message:
        return await self.data("DELETE", SCOPES + scope["scope_id"])

    async def scopes(self, incident_id: str = "inc_1", query: str = "") -> Any:
        answer = await self.data("GET", SCOPES + incident_id + query)
        assert answer.status == 200, answer.body
        return answer.json()

    async def scope(self, scope: Mapping[str, Any]) -> dict[str, Any]:
        """The scope as its incident's list shows it now."""
        listed = (await self.scopes(scope["incident_id"], "?limit=1000"))["scopes"]
        (found,) = [each for each in listed if each["scope_id"] == scope["scope_id"]]
        return dict(found)

    # The admin listener

    async def admin(
        self, method: str, target: str, document: object = None, headers: HeaderList = ()
    ) -> Message:
        kind, body = as_json(document)
        tls = self.speaks(self.sidecar.settings.admin.tls)
        if document is None:
            return await ask(self.sidecar.admin_address, method, target, headers, tls=tls)
        return await ask(self.sidecar.admin_address, method, target, [*kind, *headers], body, tls=tls)

    async def records(self, query: str = "") -> list[dict[str, Any]]:
        """All records that match a query, from all pages, newest first."""
        found: list[dict[str, Any]] = []
        before = ""
        while True:
            answer = await self.admin("GET", f"/api/v1/decisions?limit=1000{query}{before}")
            assert answer.status == 200, answer.body
            page = answer.json()
            found += page["decisions"]
            if page["next"] is None:
                return found
            before = f"&before={page['next']}"

    async def record(self, decision_id: str) -> dict[str, Any]:
        answer = await self.admin("GET", f"/api/v1/decisions/{decision_id}")
        assert answer.status == 200, answer.body
        found: dict[str, Any] = answer.json()
        return found

    async def ended(self, decision_id: str) -> dict[str, Any]:
        """An execution when it is no longer in flight."""
        for _ in range(300):
            execution: dict[str, Any] = (await self.record(decision_id))["execution"]
            if execution["status"] != "in_flight":
                return execution
            await asyncio.sleep(0.01)
        raise AssertionError("the execution is still in flight")

    async def running(self) -> tuple[str, HeaderList]:
        """An execution that can be reported: the target of its report, and the header with its token."""
        scope, token = await self.issue(), new_token()
        policies = self.sidecar.live.snapshot.policies
        assert policies is not None
        command = Admit(
            decision_id=new_decision_id(),
            claims=Claims(scope_id=scope["scope_id"], incident_id="inc_1", action="retry_agent"),
            policies=policies,
            report_token=digest_of(token),
            report_seconds=600,
        )
        await self.sidecar.store.submit(command)
        target = f"/api/v1/recovery/executions/{command.decision_id}/complete"
        return target, [("Authorization", f"Bearer {token}")]

    async def report(self, target: str, headers: HeaderList, **members: Any) -> Message:
        kind, body = as_json(members)
        return await self.data("POST", target, [*kind, *headers], body)

    async def explain(self, scope: Mapping[str, Any] | None, **members: Any) -> Any:
        kind, body = self.execution(scope, **members)
        answer = await ask(self.sidecar.admin_address, "POST", "/api/v1/explain", kind, body)
        assert answer.status == 200, answer.body
        return answer.json()

    # The ops listener

    async def ready(self) -> tuple[int, dict[str, str]]:
        """The status code of /health/ready, and the reason of each failed check."""
        answer = await ask(self.sidecar.ops_address, "GET", "/health/ready")
        checks = answer.json()["checks"]
        return answer.status, {name: check["reason"] for name, check in checks.items() if not check["ok"]}

    async def metrics(self) -> str:
        tls = self.speaks(self.sidecar.settings.ops.tls)
        answer = await ask(self.sidecar.ops_address, "GET", "/metrics", tls=tls)
        assert answer.status == 200
        return answer.body.decode()

    async def metric(self, line: str) -> float:
        """The value of one series, 0 if the page does not have it (yet)."""
        for found in (await self.metrics()).splitlines():
            if found.startswith(f"{line} "):
                return float(found.split(" ")[-1])
        return 0.0


Open = Callable[..., Awaitable[House]]


@asynccontextmanager
async def opened(
    folder: Path,
    backend: Backend,
    *,
    policies: PolicySet | None = POLICIES,
    clock: Clock | None = None,
    upstream_port: int | None = None,
    tls: ssl.SSLContext | None = None,
    renewal_seconds: float = 60.0,
    **sections: Any,
) -> AsyncIterator[House]:
    """A sidecar on free ports with a SQLite file in `folder`. `sections` are sections of its settings."""
    clock = clock or Clock()
    database = folder / "gate.db"
    for name in ("data", "admin", "ops"):
        sections.setdefault(name, {"listen": "127.0.0.1:0"})
    # Hundreds of requests at once take long on a busy machine. Tests of the deadline set their own.
    store = {"url": f"sqlite:///{database}", "deadline_seconds": 30.0}
    sections["store"] = {**store, **sections.get("store", {})}
    sections.setdefault("shutdown", {"drain_seconds": 0.2})
    upstream_url = backend.url if upstream_port is None else f"http://127.0.0.1:{upstream_port}"
    settings = default(upstream_url, **sections)
    async with Sidecar(
        settings, policies, clock=clock, elapsed=clock.elapsed, renewal_seconds=renewal_seconds
    ) as sidecar:
        yield House(sidecar, backend, clock, database, tls)


async def eventually(
    holds: Callable[[], Awaitable[bool]] | Callable[[], bool], *, seconds: float = 5.0
) -> None:
    """Wait until a condition holds."""
    until = asyncio.get_running_loop().time() + seconds
    while True:
        held = holds()
        if held if isinstance(held, bool) else await held:
            return
        assert asyncio.get_running_loop().time() < until, "the condition did not hold in time"
        await asyncio.sleep(0.005)
