"""The real program as a process of its own, before real backends. Everything here waits with a bound, and
ends what it started."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar

import pytest
import yaml

from tests import forkserver

PROJECT = Path(__file__).parents[2]
START_SECONDS = 20.0
STOP_SECONDS = 20.0
ASK_SECONDS = 15.0
LOG_SECONDS = 5.0
LOG_PAUSE_SECONDS = 0.15

EXECUTE = "/api/v1/recovery/execute"

T = TypeVar("T")
Address = tuple[str, int]
Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
Play = Callable[[Script], Awaitable[Address]]


@dataclass(frozen=True)
class Answer:
    """An answer as it came: nothing decompressed, no redirect followed; only the chunks are put together."""

    status: int
    reason: str
    headers: list[tuple[str, str]]
    body: bytes

    def values(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key.lower() == name.lower()]

    def json(self) -> Any:
        return json.loads(self.body)


def ask(
    address: Address,
    method: str,
    target: str,
    headers: Sequence[tuple[str, str]] = (),
    body: bytes | Iterable[bytes] | None = None,
) -> Answer:
    """One request on a connection of its own, with these headers and Host only; an iterable is chunked."""
    connection = http.client.HTTPConnection(*address, timeout=ASK_SECONDS)
    try:
        return ask_on(connection, method, target, headers, body)
    finally:
        connection.close()


def ask_on(
    connection: http.client.HTTPConnection,
    method: str,
    target: str,
    headers: Sequence[tuple[str, str]] = (),
    body: bytes | Iterable[bytes] | None = None,
) -> Answer:
    """The same on an open connection."""
    connection.putrequest(method, target, skip_host=True, skip_accept_encoding=True)
    connection.putheader("Host", "localhost")
    for name, value in headers:
        connection.putheader(name, value)
    chunked = body is not None and not isinstance(body, bytes)
    if chunked:
        connection.putheader("Transfer-Encoding", "chunked")
    elif isinstance(body, bytes):
        connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(body, encode_chunked=chunked)
    response = connection.getresponse()
    return Answer(response.status, response.reason, response.getheaders(), response.read())


def ask_json(address: Address, method: str, target: str, body: Mapping[str, Any] | None = None) -> Answer:
    """One request with a JSON body."""
    if body is None:
        return ask(address, method, target)
    return ask(address, method, target, [("Content-Type", "application/json")], json.dumps(body).encode())


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


def execution(scope_id: str, *, incident: str = "inc-1") -> dict[str, Any]:
    """The body that spends one attempt of it."""
    return {"scope_id": scope_id, "incident_id": incident, "action": "retry_agent", "parameters": {}}


def scope_of(data: Address, scope_id: str, *, incident: str = "inc-1") -> dict[str, Any]:
    """The scope as the list of its incident shows it."""
    listed = ask(data, "GET", f"/api/v1/recovery/scopes/{incident}?limit=1000").json()["scopes"]
    (scope,) = (shown for shown in listed if shown["scope_id"] == scope_id)
    assert isinstance(scope, dict)
    return scope


def executions(admin: Address, status: str | None = None) -> list[dict[str, Any]]:
    """All of them, page by page."""
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
    """A folder with a configuration on free ports and a policy set; `sections` go on top."""
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
        """What it logged since it was last started, once no more comes: a thread writes it a moment later."""
        before, now = None, self.log()
        end = time.monotonic() + LOG_SECONDS
        while now != before and time.monotonic() < end:
            time.sleep(LOG_PAUSE_SECONDS)
            before, now = now, self.log()
        return _lines(now)

    def start(self) -> None:
        """Returns once it listens on all three addresses."""
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
                told = json.loads(line)
                host, _, port = told["address"].rpartition(":")
                found[told["listener"]] = host, int(port)
        return found if len(found) == 3 else None

    def until(self, what: str, condition: Callable[[], T | None], seconds: float = 5.0) -> T:
        """The first value of `condition` that says something."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if value := condition():
                return value
            time.sleep(0.01)
        pytest.fail(f"not within {seconds:g} s: {what}\n{self.log()}")

    def until_logged(self, message: str) -> dict[str, Any]:
        def line() -> dict[str, Any] | None:
            return next((told for told in _lines(self.log()) if told["message"] == message), None)

        return self.until(f"logs {message!r}", line)

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def wait(self, seconds: float = STOP_SECONDS) -> int:
        """Its exit code."""
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
        """SIGKILL, if it still runs."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()


def _lines(log: str) -> list[dict[str, Any]]:
    whole = log[: log.rfind("\n") + 1]
    return [json.loads(line) for line in whole.splitlines() if line.startswith("{")]


def scopegate(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    return forkserver.run(*map(str, arguments), seconds=START_SECONDS)


@dataclass(frozen=True)
class Pair:
    """A backend, and the sidecar before it."""

    backend: Address
    sidecar: Program


@pytest.fixture(scope="session")
def httpbin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """httpbin under gunicorn: a backend that nobody here wrote."""
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
        with suppress(OSError, http.client.HTTPException):
            if ask(address, "GET", "/get").status == 200:
                return
        time.sleep(0.05)
    pytest.fail(f"httpbin does not answer (exit code {process.poll()}):\n{log.read_text()}")


# The times that the tests of scripted backends wait for.
RESPONSE_TIMEOUT = 1.2
HEAD_TIMEOUT = 0.8


@pytest.fixture(scope="session")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[socket.socket, Program]]:
    """One sidecar for all scripted backends, which take turns on one listening socket."""
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
    """The sidecar before the backend that `play` scripts."""
    return stage[1]


@pytest.fixture
async def play(stage: tuple[socket.socket, Program]) -> AsyncIterator[Play]:
    """Start a backend that runs the script on each connection; gives its own address."""
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
                pass  # the other side went, or the test is over
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
    """A backend that answers executions in threads, and remembers under which decision each came."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Execution)
        self.address: Address = ("127.0.0.1", self.server_port)
        self.delay = 0.0
        self.seen: list[str] = []
        self.go_on = threading.Event()  # cleared, it hangs
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
        """A sidecar that was killed is no news."""


class _Execution(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Backend

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.seen.append(self.headers["Scopegate-Decision-Id"])
        time.sleep(self.server.delay)
        self.server.go_on.wait(STOP_SECONDS)
        body = b'{"done": true}'
        self.wfile.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nX-Recovery-Cost-USD: 0.001\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
        )
