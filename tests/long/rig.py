"""What the scripts here stand on: the real program as a process, a backend that counts, clients, figures.

Everything is on loopback. A script ends what it started, by its process id, also when SIGTERM ends it.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.client import STREAM_LIMIT, Connection, HostAndPort, Message, as_json, read_message
from tests.support import EXECUTE, SCOPE

PROJECT = Path(__file__).parents[2]
START_SECONDS = 30.0
STOP_SECONDS = 45.0
ACTION = "retry_agent"

Address = HostAndPort
Headers = list[tuple[str, str]]


class DidNotStart(Exception):
    """The sidecar ended, or was silent for too long, when it should have started."""


# The sidecar -------------------------------------------------------------------------------------------


class Sidecar:
    """`scopegate run` as a process; `module` is what runs it."""

    data: Address
    admin: Address
    ops: Address

    def __init__(self, config: Path, module: str = "sidecar", **environment: str) -> None:
        self.config = config
        self.log_file = config.parent / "sidecar.log"
        self._command = [sys.executable, "-m", module, "run", "--config", str(config)]
        self._environment = {**os.environ, **environment}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def log(self) -> str:
        return self.log_file.read_text(errors="replace") if self.log_file.exists() else ""

    def spawn(self) -> None:
        """Start the process, and do not wait."""
        with self.log_file.open("wb") as output:
            self._process = subprocess.Popen(
                self._command,
                cwd=PROJECT,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=output,
            )

    async def listening(self) -> None:
        """Wait until all three listeners are open. Raises DidNotStart."""
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            if self._addresses():
                return
            if not self.running:
                break
            await asyncio.sleep(0.01)
        raise DidNotStart(f"exit code {self._process and self._process.poll()}: {self.log()[-2000:]}")

    def _addresses(self) -> bool:
        found: dict[str, Address] = {}
        for line in self.log().splitlines(keepends=True):
            if line.endswith("\n") and '"listening"' in line:
                logged = json.loads(line)
                host, _, port = logged["address"].rpartition(":")
                found[logged["listener"]] = host, int(port)
        if len(found) < 3:
            return False
        self.data, self.admin, self.ops = found["data"], found["admin"], found["ops"]
        return True

    async def start(self) -> None:
        self.spawn()
        try:
            await self.listening()
        except BaseException:
            self.kill()
            raise

    async def stop(self) -> int:
        """SIGTERM; the exit code, or -9 where it had to be killed."""
        assert self._process is not None
        self._process.terminate()
        end = time.monotonic() + STOP_SECONDS
        while self.running and time.monotonic() < end:
            await asyncio.sleep(0.02)
        self.kill()
        return self._process.returncode

    def kill(self) -> None:
        """SIGKILL, where it still runs."""
        if self._process is not None:
            if self._process.poll() is None:
                self._process.kill()
            self._process.wait()

    async def __aenter__(self) -> Sidecar:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()

    # Figures of the process, from /proc

    def rss_mib(self) -> float:
        """Resident memory, files that are mapped left out: those pages are the kernel's to drop."""
        return _status(self.pid, "RssAnon") / 1024

    def threads(self) -> int:
        return _status(self.pid, "Threads")

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))


def _status(pid: int, name: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise LookupError(name)


def command(*arguments: str | Path, seconds: float = 600.0) -> subprocess.CompletedProcess[str]:
    """Run a command of the program to its end."""
    return subprocess.run(
        [sys.executable, "-m", "sidecar", *map(str, arguments)],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


# Clients -----------------------------------------------------------------------------------------------


class Client(Connection):
    """A connection with the requests of these scripts."""

    def __enter__(self) -> Client:
        return self

    async def issue(self, incident: str = "inc-1", attempts: int = 1, **members: Any) -> Message:
        """Ask for a scope."""
        wanted = {"incident_id": incident, "action": ACTION, "intent": "a run by hand"}
        return await self.ask_json("POST", SCOPE, {**wanted, "max_attempts": attempts, **members})

    async def execute(
        self, scope_id: str, incident: str = "inc-1", target: str = EXECUTE, key: str | None = None
    ) -> Message:
        """Spend an attempt, under an idempotency key if one is given."""
        kind, body = as_json(execution(scope_id, incident))
        named = [] if key is None else [("Idempotency-Key", key)]
        return await self.ask("POST", target, [*kind, *named], body)


def execution(scope_id: str | None, incident: str = "inc-1") -> dict[str, Any]:
    """The body that spends one attempt."""
    return {"scope_id": scope_id, "incident_id": incident, "action": ACTION, "parameters": {}}


async def issue_many(address: Address, count: int, *, attempts: int = 10, at_once: int = 16) -> list[str]:
    """That many scopes of `inc-1`."""
    issued: list[str] = []

    async def one() -> None:
        with Client(address) as client:
            while len(issued) < count:
                answer = await client.issue(attempts=attempts, ttl_seconds=3600)
                if answer.status != 201:
                    raise RuntimeError(f"no scope: {answer.status} {answer.body!r}")
                issued.append(answer.json()["scope_id"])

    await asyncio.gather(*(one() for _ in range(at_once)))
    return issued[:count]


async def pages(address: Address, target: str, name: str) -> AsyncIterator[dict[str, Any]]:
    """What a list of the admin interface holds, page by page."""
    before = ""
    with Client(address) as client:
        while True:
            joint = "&" if "?" in target else "?"
            page = (await client.ask("GET", f"{target}{joint}limit=1000{before}")).json()
            for item in page[name]:
                yield item
            if page["next"] is None:
                return
            before = f"&before={page['next']}"


# The backend -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """One execution that reached the backend."""

    decision_id: str
    scope_id: str
    at: float
    key: str | None = None  # its idempotency key


Behaviour = Callable[[Message, asyncio.StreamWriter, "Backend"], Any]


@dataclass
class Backend:
    """Counts the executions that it sees, under which decision and scope, and passes all else.

    `GET /size/N` is answered with N bytes, any other request with its own body. `delay` gives the least and
    the most seconds that an execution takes. A `behaviour` awaits instead of all this; it gives None to let
    the backend answer as ever, True once it has answered itself, False to end the connection.
    """

    address: Address = ("", 0)
    delay: tuple[float, float] = (0.0, 0.0)
    behaviour: Behaviour | None = None
    seen: list[Seen] = field(default_factory=list)
    connections: int = 0
    chance: random.Random = field(default_factory=random.Random)
    _tasks: set[asyncio.Task[Any]] = field(default_factory=set)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        try:
            while (request := await read_message(reader)) is not None and request.whole:
                if not await self._answer(request, writer):
                    return
                await writer.drain()
        except (OSError, asyncio.CancelledError):
            pass  # the sidecar left, or the script ends
        finally:
            self.connections -= 1
            self._tasks.discard(task)
            writer.close()

    async def _answer(self, request: Message, writer: asyncio.StreamWriter) -> bool:
        decision_id = request.header("Scopegate-Decision-Id")
        executing = request.method == "POST" and decision_id is not None
        if executing:
            scope_id = request.header("Scopegate-Scope-Id") or ""
            key = request.header("Idempotency-Key")
            self.seen.append(Seen(decision_id or "", scope_id, time.monotonic(), key))
        if self.behaviour is not None:
            answered: bool | None = await self.behaviour(request, writer, self)
            if answered is not None:
                return answered
        if executing:
            if self.delay[1]:
                await asyncio.sleep(self.chance.uniform(*self.delay))
            writer.write(b"HTTP/1.1 200 OK\r\nX-Recovery-Cost-USD: 0.001\r\nContent-Length: 2\r\n\r\nok")
            return True
        size = request.target.removeprefix("/size/")
        body = b"x" * int(size) if size.isdigit() else request.body
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        return True

    async def idle(self, seconds: float = 5.0) -> None:
        """Wait until no sidecar is connected, so that all that was sent has been counted."""
        end = time.monotonic() + seconds
        while self.connections and time.monotonic() < end:
            await asyncio.sleep(0.005)

    async def close(self) -> None:
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@asynccontextmanager
async def serving(**options: Any) -> AsyncIterator[Backend]:
    """A backend on a free port."""
    backend = Backend(**options)
    server = await asyncio.start_server(backend.serve, "127.0.0.1", 0, limit=STREAM_LIMIT, backlog=2048)
    backend.address = server.sockets[0].getsockname()[:2]
    try:
        yield backend
    finally:
        server.close()
        await backend.close()


# Figures -----------------------------------------------------------------------------------------------


def milliseconds(seconds: Sequence[float], part: float = 0.5) -> float:
    """A quantile of times in milliseconds; not a number without any."""
    if not seconds:
        return float("nan")
    ordered = sorted(seconds)
    return ordered[min(len(ordered) - 1, int(len(ordered) * part))] * 1000


def median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else float("nan")


@dataclass
class Findings:
    """What does not hold. Each kind is shown a few times and counted."""

    found: list[str] = field(default_factory=list)

    def check(self, holds: bool, violation: str) -> None:
        if not holds:
            self.found.append(violation)

    def report(self, well: str) -> int:
        """Print the verdict; the exit code."""
        if not self.found:
            print(f"\nWELL: {well}", flush=True)
            return 0
        print(f"\nNOT WELL, {len(self.found)} findings:")
        for violation in self.found[:30]:
            print(f"  {violation}")
        if len(self.found) > 30:
            print(f"  and {len(self.found) - 30} more")
        sys.stdout.flush()
        return 1


class Progress:
    """A bar on standard error with the time that is left; without a terminal a line each so many seconds."""

    LINE_SECONDS = 30.0
    WIDTH = 30

    def __init__(self, label: str, total: float) -> None:
        self._label, self._total = label, total
        self._begun = self._shown = time.monotonic()
        self._terminal = sys.stderr.isatty()

    def show(self, done: float, note: str = "") -> None:
        now = time.monotonic()
        if now - self._shown < (0.2 if self._terminal else self.LINE_SECONDS) and done < self._total:
            return
        self._shown = now
        part = min(1.0, done / self._total) if self._total else 1.0
        left = (now - self._begun) * (1 - part) / part if part else float("nan")
        bar = "#" * int(part * self.WIDTH) + "-" * (self.WIDTH - int(part * self.WIDTH))
        line = f"{self._label} [{bar}] {part:4.0%}, {left / 60:.1f} min left {note}"
        end = "\n" if not self._terminal or part == 1.0 else ""
        print(f"\r{line}\033[K" if self._terminal else line, end=end, file=sys.stderr, flush=True)


def raise_on_sigterm() -> None:
    """SIGTERM ends the script as Ctrl-C does, so that every `finally` runs."""

    def end(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, end)


def table(rows: Sequence[Sequence[object]]) -> None:
    """Print rows; the first cell of each to the left, the others to the right."""
    widths = [max(len(str(row[column])) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        first, *rest = map(str, row)
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    sys.stdout.flush()


async def cancelled(tasks: Sequence[asyncio.Task[Any]]) -> None:
    """End tasks, and raise what one of them failed with."""
    for task in tasks:
        task.cancel()
    for ended in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(ended, BaseException) and not isinstance(ended, asyncio.CancelledError):
            raise ended


@asynccontextmanager
async def alongside(*works: Any) -> AsyncIterator[None]:
    """Run coroutines beside a block, and end them with it."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        yield
    finally:
        await cancelled(tasks)
