"""The load: wrk on one thread, which sends prepared requests in turn, and what it measured."""

from __future__ import annotations

import json
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from tests.bench.processes import BenchError, pinned

BODY_BYTES = 300
ACTION = "retry_agent"
GATED_TARGET = "/api/v1/recovery/execute"
PASSING_TARGET = "/api/v1/agents/heartbeat"
ANSWER_SECONDS = 10.0
GRACE_SECONDS = 30.0  # for wrk to end by itself
MARK = "measured "
NO_HEADERS: Mapping[str, str] = MappingProxyType({})

# wrk calls init once for its one thread, then request() for each request, and done() at the end. Without a
# response() it does not parse answers beyond their status, so the load takes little from the backend's core.
_SCRIPT = """
local bodies, headers = {
%(bodies)s
}, {
%(headers)s
}
local prepared, last, sent = {}, 0, 0

function init(arguments)
  for at, body in ipairs(bodies) do
    prepared[at] = wrk.format("POST", nil, headers[at], body)
  end
  last = #prepared
end

function request()
  sent = sent %% last + 1
  return prepared[sent]
end

function done(summary, latency)
  local errors = summary.errors
  io.write(string.format(
    '%(mark)s{"requests": %%d, "microseconds": %%d, "p50": %%d, "p99": %%d, "connect": %%d, "read": %%d, ' ..
    '"write": %%d, "status": %%d, "timeout": %%d}\\n',
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(99),
    errors.connect, errors.read, errors.write, errors.status, errors.timeout))
end
"""


class Request(NamedTuple):
    """One POST: its headers beside Host and Content-Length, and its body."""

    headers: Mapping[str, str]
    body: str


class Load(NamedTuple):
    """What one run of wrk measured. Latencies are in microseconds."""

    requests: int
    seconds: float
    p50: float
    p99: float


def body(scope_id: str, incident_id: str) -> str:
    """The body of an execution, 300 bytes of JSON."""
    parameters = {"agent": "agent-17", "reason": "stuck for ten minutes", "retries": 3, "note": ""}
    members = {
        "scope_id": scope_id,
        "incident_id": incident_id,
        "action": ACTION,
        "parameters": parameters,
    }
    parameters["note"] = "n" * (BODY_BYTES - len(json.dumps(members)))
    return json.dumps(members)


def script(requests: Sequence[Request]) -> str:
    """The Lua script that sends these requests in turn."""
    tables = []
    for request in requests:
        pairs = ", ".join(
            f"[ {_quoted(name)} ] = {_quoted(value)}" for name, value in request.headers.items()
        )
        tables.append(f"{{{pairs}}},")
    return _SCRIPT % {
        "bodies": "\n".join(f"{_quoted(request.body)}," for request in requests),
        "headers": "\n".join(tables),
        "mark": MARK,
    }


def _quoted(text: str) -> str:
    """A Lua string. Raises ValueError for what a long bracket cannot hold."""
    if "]==]" in text or text.startswith("\n"):
        raise ValueError(f"cannot be quoted for Lua: {text!r}")
    return f"[==[{text}]==]"


def measured(output: str) -> Load:
    """What the output of wrk says. Raises BenchError if it is not there, or if a request failed."""
    lines = [line for line in output.splitlines() if line.startswith(MARK)]
    if len(lines) != 1:
        raise BenchError(f"wrk printed no measurement; its output:\n{output}")
    figures: dict[str, int] = json.loads(lines[0].removeprefix(MARK))
    failed = {name: figures[name] for name in ("connect", "read", "write", "status", "timeout")}
    if any(failed.values()):
        counts = ", ".join(f"{name} {count}" for name, count in failed.items() if count)
        raise BenchError(f"of {figures['requests']} requests, some failed: {counts}")
    return Load(figures["requests"], figures["microseconds"] / 1e6, figures["p50"], figures["p99"])


def run(
    url: str,
    requests: Sequence[Request],
    *,
    connections: int,
    seconds: float,
    core: int,
    folder: Path,
    beside: Callable[[], object] = lambda: None,
) -> Load:
    """Sends the requests in turn for some seconds; `beside` is called twice a second meanwhile.

    Raises BenchError if one request is not answered with a status below 400.
    """
    lua = folder / "load.lua"
    lua.write_text(script(requests), encoding="utf-8")
    command = ["wrk", "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "-s", str(lua)]
    command += [f"--timeout={ANSWER_SECONDS:.0f}s", url]
    with subprocess.Popen(
        pinned(core, command),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        until = time.monotonic() + seconds + GRACE_SECONDS
        while True:
            try:
                output, _ = process.communicate(timeout=0.5)
                return measured(output)
            except subprocess.TimeoutExpired:
                beside()
                if time.monotonic() > until:
                    process.kill()
                    raise BenchError(f"wrk did not end within {seconds + GRACE_SECONDS:.0f} s") from None
            except BaseException:
                process.kill()
                raise


def ask(
    port: int, method: str, target: str, document: object = None, headers: Mapping[str, str] = NO_HEADERS
) -> tuple[int, Any]:
    """One request on a connection of its own: the status, and the answer's JSON."""
    with socket.create_connection(("127.0.0.1", port), ANSWER_SECONDS) as connection:
        return _exchange(connection, method, target, json.dumps(document), headers, close=True)


class Flood:
    """Wrong tokens, so many a second, from a thread of their own until the block ends. `answers` counts the
    answers by status."""

    def __init__(self, port: int, a_second: int) -> None:
        self._port, self._pause = port, 1 / a_second
        self._over = threading.Event()
        self.answers: Counter[int] = Counter()
        self._thread = threading.Thread(target=self._send)

    def __enter__(self) -> Flood:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _send(self) -> None:
        number, due = 0, time.monotonic()
        while not self._over.is_set():
            with socket.create_connection(("127.0.0.1", self._port), ANSWER_SECONDS) as connection:
                for _ in range(100):
                    number, due = number + 1, due + self._pause
                    if self._over.wait(max(0.0, due - time.monotonic())):
                        return
                    wrong = {"Scopegate-Authorization": f"Bearer sg_wrong{number}"}
                    status, _ = _exchange(connection, "POST", GATED_TARGET, body("scope", "inc"), wrong)
                    self.answers[status] += 1


def idle_connections(port: int, count: int, held: ExitStack) -> None:
    """Opens connections that have carried one passing request each; `held` closes them."""
    for number in range(count):
        connection = socket.create_connection(("127.0.0.1", port), ANSWER_SECONDS)
        held.enter_context(connection)
        status, _ = _exchange(connection, "POST", PASSING_TARGET, body("scope", f"inc_{number}"))
        if status != 200:
            raise BenchError(f"an idle connection's request was answered with {status}")


def _exchange(
    connection: socket.socket,
    method: str,
    target: str,
    content: str,
    headers: Mapping[str, str] = NO_HEADERS,
    *,
    close: bool = False,
) -> tuple[int, Any]:
    head = f"{method} {target} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    head += f"Content-Length: {len(content)}\r\n" + ("Connection: close\r\n" if close else "") + "\r\n"
    connection.sendall((head + content).encode())
    with connection.makefile("rb") as reader:
        status = int(reader.readline().split()[1])
        length = 0
        while (line := reader.readline()) not in (b"\r\n", b""):
            name, _, value = line.partition(b":")
            length = int(value) if name.lower() == b"content-length" else length
        answer = reader.read(length)
    return status, json.loads(answer) if answer else None
