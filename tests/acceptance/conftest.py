"""The real program as a process, in front of real backends.

Every wait here has a time limit, and every fixture ends the processes that it started.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar

import pytest
import yaml

from tests import forkserver
from tests.client import ANSWER_SECONDS, BlockingConnection, Body, HeaderList, HostAndPort, Message, as_json
from tests.collector import Collector

PROJECT = Path(__file__).parents[2]
START_SECONDS = 20.0
STOP_SECONDS = 20.0
ASK_SECONDS = ANSWER_SECONDS
LOG_SECONDS = 5.0
LOG_PAUSE_SECONDS = 0.15

EXECUTE = "/api/v1/recovery/execute"

T = TypeVar("T")
Address = HostAndPort
Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
Play = Callable[[Script], Awaitable[Address]]


def ask(address: Address, method: str, target: str, headers: HeaderList = (), body: Body = None) -> Message:
    """The answer to one request on a connection of its own. Raises Lost."""
    with BlockingConnection(address) as connection:
        return connection.ask(method, target, headers, body)


def ask_json(
    address: Address, method: str, target: str, document: Mapping[str, Any] | None = None
) -> Message:
    """The same with a JSON body."""
    if document is None:
        return ask(address, method, target)
    return ask(address, method, target, *as_json(document))


def issue_scope(data: Address, *, incident: str = "inc-1", attempts: int = 1, cost: float = 0.5) -> str:
    """A scope for `retry_agent`."""
    answer = ask_json(
        data,
        "POST",
        "/api/v1/recovery/scope",
        {
            "incident_id": incident,
            "action": "retry_agent",
            "intent": "a test",
            "max_attempts": attempts,
            "max_cost_usd": cost,
        },
    )
    assert answer.status == 201, answer
    scope_id = answer.json()["scope_id"]
    assert isinstance(scope_id, str)
    return scope_id


def issue_many(data: Address, count: int) -> list[str]:
    """Scopes for `retry_agent`, from one connection."""
    wanted = {"incident_id": "inc-1", "action": "retry_agent", "intent": "many"}
    with BlockingConnection(data) as connection:
        answers = [connection.ask_json("POST", "/api/v1/recovery/scope", wanted) for _ in range(count)]
    assert {answer.status for answer in answers} == {201}
    return [answer.json()["scope_id"] for answer in answers]


def execution(scope_id: str, *, incident: str = "inc-1") -> dict[str, Any]:
    """The body of an execution, which consumes one attempt of the scope."""
    return {"scope_id": scope_id, "incident_id": incident, "action": "retry_agent", "parameters": {}}


def scope_of(data: Address, scope_id: str, *, incident: str = "inc-1") -> dict[str, Any]:
    """The scope as its incident's list shows it."""
    listed = ask(data, "GET", f"/api/v1/recovery/scopes/{incident}?limit=1000").json()["scopes"]
    (scope,) = (shown for shown in listed if shown["scope_id"] == scope_id)
    assert isinstance(scope, dict)
    return scope


def executions(admin: Address, status: str | None = None) -> list[dict[str, Any]]:
    """All executions, from all pages."""
    found: list[dict[str, Any]] = []
    before = ""
    while True:
        wanted = f"&status={status}" if status else ""
        page = ask(admin, "GET", f"/api/v1/executions?limit=1000{wanted}{before}").json()
        found += page["executions"]
        if page["next"] is None:
            return found
        before = f"&before={page['next']}"


def write_configuration(folder: Path, backend: Address, **sections: Mapping[str, Any]) -> Path:
    """Write a configuration with free ports, and policies. `sections` are added to the configuration."""
    policies = folder / "policies"
    policies.mkdir(parents=True, exist_ok=True)
    (policies / "actions.yaml").write_text(
        "actions:\n  retry_agent: {risk: low, max_cost_usd: 0.01}\n  restart_agent: {risk: medium}\n"
    )
    document: dict[str, Any] = {
        "data": {"listen": "127.0.0.1:0"},
        "admin": {"listen": "127.0.0.1:0"},
        "ops": {"listen": "127.0.0.1:0"},
        "upstream": {"url": f"http://{backend[0]}:{backend[1]}"},
        "store": {"url": "sqlite:///var/scopegate.db"},
        "policies": "policies/",
    }
    for name, section in sections.items():
        document[name] = {**document.get(name, {}), **section}
    config = folder / "scopegate.yaml"
    config.write_text(yaml.safe_dump(document, sort_keys=False))
    return config


class Program:
    """`scopegate run` as a process. Its log goes to a file, and into the message of a test that fails.

    With `through`, that command starts a new interpreter. Without it, the fork server starts the program.
    """

    data: Address
    admin: Address
    ops: Address

    def __init__(self, config: Path, *, through: Sequence[str] = ()) -> None:
        self.config = config
        self._through = through
        self.store = config.parent / "var" / "scopegate.db"
        self._log = config.parent / "sidecar.log"
        self._process: forkserver.Process | subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Program:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def log(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def log_lines(self) -> list[dict[str, Any]]:
        """The log lines since the last start, when no more arrive. The program writes them in a thread."""
        before, now = None, self.log()
        end = time.monotonic() + LOG_SECONDS
        while now != before and time.monotonic() < end:
            time.sleep(LOG_PAUSE_SECONDS)
            before, now = now, self.log()
        return _lines(now)

    def start(self) -> None:
        """Start the program. Returns when it listens on all three addresses."""
        with self._log.open("wb") as stderr:
            arguments = ["run", "--config", str(self.config)]
            if self._through:
                command = [*self._through, sys.executable, "-m", "sidecar", *arguments]
                self._process = subprocess.Popen(
                    command, cwd=PROJECT, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr
                )
            else:
                self._process = forkserver.start(arguments, stderr=stderr)
        try:
            addresses = self.until("listens", self._addresses, START_SECONDS)
        except BaseException:
            self.kill()
            raise
        self.data, self.admin, self.ops = (addresses[name] for name in ("data", "admin", "ops"))

    def _addresses(self) -> dict[str, Address] | None:
        assert self._process is not None
        if self._process.poll() is not None:
            pytest.fail(f"the sidecar ended with {self._process.returncode} at its start:\n{self.log()}")
        found: dict[str, Address] = {}
        for line in self.log().splitlines(keepends=True):
            if line.endswith("\n") and '"listening"' in line:
                logged = json.loads(line)
                host, _, port = logged["address"].rpartition(":")
                found[logged["listener"]] = host, int(port)
        return found if len(found) == 3 else None

    def until(self, what: str, condition: Callable[[], T | None], seconds: float = 5.0) -> T:
        """The first true value of `condition`."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if value := condition():
                return value
            time.sleep(0.01)
        pytest.fail(f"not within {seconds:g} s: {what}\n{self.log()}")

    def until_logged(self, message: str) -> dict[str, Any]:
        def line() -> dict[str, Any] | None:
            return next((one for one in _lines(self.log()) if one["message"] == message), None)

        return self.until(f"logs {message!r}", line)

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def wait(self, seconds: float = STOP_SECONDS) -> int:
        """The exit code. The test fails if the program does not end within `seconds`."""
        assert self._process is not None
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            pytest.fail(f"the sidecar did not end within {seconds:g} s:\n{self.log()}")

    def stop(self) -> int:
        self.signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        """Send SIGKILL if the program still runs."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()


def _lines(log: str) -> list[dict[str, Any]]:
    whole = log[: log.rfind("\n") + 1]
    return [json.loads(line) for line in whole.splitlines() if line.startswith("{")]


def scopegate(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return forkserver.run(*map(str, arguments), seconds=START_SECONDS)


@dataclass(frozen=True)
class Pair:
    """A backend and the sidecar in front of it."""

    backend: Address
    sidecar: Program


@pytest.fixture(scope="session")
def httpbin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """httpbin under gunicorn: a backend that is not part of this project."""
    folder = tmp_path_factory.mktemp("httpbin")
    log = folder / "gunicorn.log"
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address: Address = listening.getsockname()
        with log.open("wb") as output:
            process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "gunicorn",
                    "--bind",
                    f"fd://{listening.fileno()}",
                    "--worker-class",
                    "gthread",
                    "--threads",
                    "16",
                    "--worker-tmp-dir",
                    str(folder),
                    "--graceful-timeout",
                    "1",
                    "httpbin:app",
                ],
                cwd=folder,
                pass_fds=[listening.fileno()],
                stdout=output,
                stderr=output,
                env={**os.environ, "HOME": str(folder)},
            )
    try:
        _until_it_answers(address, process, log)
        with Program(write_configuration(folder, address)) as sidecar:
            yield Pair(address, sidecar)
    finally:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _until_it_answers(address: Address, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        with suppress(OSError):
            if ask(address, "GET", "/get").status == 200:
                return
        time.sleep(0.05)
    pytest.fail(f"httpbin does not answer (exit code {process.poll()}):\n{log.read_text()}")


# The timeouts that the tests with scripted backends wait for.
RESPONSE_TIMEOUT = 1.2
HEAD_TIMEOUT = 0.8


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """A collector of traces, to which programs send after a tenth of a second instead of five, without a
    proxy."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Collector() as running:
        yield running


@pytest.fixture(scope="session")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[socket.socket, Program]]:
    """One sidecar for all scripted backends, which use one listening socket in turn."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        config = write_configuration(
            tmp_path_factory.mktemp("stage"),
            listening.getsockname(),
            upstream={"response_timeout_seconds": RESPONSE_TIMEOUT},
            gate={"head_timeout_seconds": HEAD_TIMEOUT},
        )
        with Program(config) as sidecar:
            yield listening, sidecar


@pytest.fixture
def sidecar(stage: tuple[socket.socket, Program]) -> Program:
    """The sidecar in front of the backend that `play` starts."""
    return stage[1]


@pytest.fixture
async def play(stage: tuple[socket.socket, Program]) -> AsyncIterator[Play]:
    """Starts a backend that runs a script on each connection, and returns the backend's address."""
    async for start in serving(stage[0]):
        yield start


async def serving(listening: socket.socket) -> AsyncIterator[Play]:
    """`play` on any listening socket."""
    servers: list[asyncio.Server] = []
    tasks: set[asyncio.Task[Any]] = set()
    failures: list[BaseException] = []

    async def start(script: Script) -> Address:
        async def run(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            tasks.add(task)
            try:
                await script(reader, writer)
            except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                pass  # the other side closed the connection, or the test has ended
            except BaseException as exc:
                failures.append(exc)
            finally:
                tasks.discard(task)
                writer.close()

        servers.append(await asyncio.start_server(run, sock=listening.dup()))
        address: Address = listening.getsockname()
        return address

    try:
        yield start
    finally:
        for server in servers:
            server.close()
        for task in tuple(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0.01)
    if failures:
        raise failures[0]


class Backend(ThreadingHTTPServer):
    """A backend that answers executions in threads and keeps the decision id of each."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Execution)
        self.address: Address = ("127.0.0.1", self.server_port)
        self.delay = 0.0
        self.seen: list[str] = []
        self.tokens: dict[str, str] = {}  # completion tokens by decision id
        self.go_on = threading.Event()  # the backend hangs while this is not set
        self.go_on.set()
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02})

    def __enter__(self) -> Backend:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.go_on.set()
        self.shutdown()
        self._thread.join()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore it: a sidecar that a test kills resets its connections."""


class _Execution(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Backend

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.seen.append(self.headers["Scopegate-Decision-Id"])
        if "Scopegate-Completion-Token" in self.headers:
            self.server.tokens[self.server.seen[-1]] = self.headers["Scopegate-Completion-Token"]
        time.sleep(self.server.delay)
        self.server.go_on.wait(STOP_SECONDS)
        body = b'{"done": true}'
        self.wfile.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nX-Recovery-Cost-USD: 0.001\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
        )
