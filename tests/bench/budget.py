"""Counts what one gated request and one passing request cost, and fails if a count is above its budget.

    python -m tests.bench.budget                      counts, and compares with tests/bench/budget.json
    python -m tests.bench.budget --details gated      the functions and classes behind the counts
    python -m tests.bench.budget --write              makes today's counts the budget

A sidecar with its log serves one client over one connection that is open already, before a backend with open
connections. A request counts from its first byte until nothing has happened for a while, so its settlement
and its log lines count, too. Client and backend are on other threads, which do not count. Each count is the
median over several requests. It does not depend on the speed of the machine, so it can be compared between
two versions of the code.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import select
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import FrameType
from typing import Any

import sidecar
from sidecar.core.policy import ActionPolicy, PolicySet, RiskClass
from sidecar.serve import Sidecar
from sidecar.settings.addresses import Listen
from sidecar.settings.reading import default
from sidecar.telemetry.logqueue import flush_logs, never_wait_for_logs
from sidecar.telemetry.logs import set_up_logging
from tests.bench import load
from tests.client import BlockingConnection, as_json

FILE = Path(__file__).with_name("budget.json")
PACKAGE = str(Path(sidecar.__file__).parent)
REQUESTS = 15
WARM_UP_REQUESTS = 10
QUIET_SECONDS = 0.03
ANSWER = json.dumps({"status": "done", "note": "n" * 994}).encode()
SCOPE = {
    "incident_id": "inc_1",
    "action": load.ACTION,
    "intent": "count what an execution costs",
    "max_attempts": WARM_UP_REQUESTS + REQUESTS,
    "max_cost_usd": 5,
}
# What one request cost: by count, how often each name was counted.
Cost = dict[str, dict[str, int]]
# What is counted, with the meaning of each count.
COUNTS: Mapping[str, str] = {
    "calls": "calls of Python functions in sidecar/, on all threads",
    "values": "new values of classes in sidecar/: their __init__, or a named tuple's __new__",
    "library calls": "calls of other Python functions but the loop's own rounds",
    "tasks": "asyncio tasks",
    "futures": "asyncio futures, without tasks",
    "timers": "call_later and call_at, so timeouts as well",
    "callbacks": "call_soon: the loop runs something in its next round",
    "thread hops": "call_soon_threadsafe: another thread wakes the loop",
    "socket calls": "system calls on sockets",
    "epoll calls": "changes of what the loop waits for",
    "os calls": "other system calls by Python's os module",
    "statements": "calls of sqlite3 that run SQL, fetch rows or commit",
    "file writes": "write system calls of the process on files, SQLite's as well",
}
# Methods of a socket that are no system calls.
_NO_SYSTEM_CALLS = {"fileno", "gettimeout", "settimeout", "setblocking", "detach"}
# Functions of the loop that run once a round. How many rounds there are depends on the threads' timing.
_ROUNDS = {"_run_once", "select", "time", "_run", "_process_events"}
# The log's thread writes as many lines at once as have come, so its rounds depend on timing as well.
_LOG_ROUNDS = "LogQueue._"


class Tally:
    """What happened since `begin`, by count and by name. It is the profile function of counted threads."""

    def __init__(self) -> None:
        self.counting = False
        self.last = 0.0
        self.found: Cost = {}
        self._writes = 0

    def begin(self) -> None:
        self.found = {name: defaultdict(int) for name in COUNTS}
        self._writes = _written()
        self.last = time.monotonic()
        self.counting = True

    def end(self) -> Cost:
        """What was counted, once nothing has been for `QUIET_SECONDS`."""
        while time.monotonic() - self.last < QUIET_SECONDS:
            time.sleep(QUIET_SECONDS / 4)
        self.counting = False
        self.found["file writes"]["file writes"] = _written() - self._writes
        return self.found

    def add(self, count: str, name: str) -> None:
        if self.counting:
            self.found[count][name] += 1
            self.last = time.monotonic()

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if not self.counting:
            return
        if event == "call":
            self._called(frame)
        elif event == "c_call":
            self._called_c(frame, argument)

    def _called(self, frame: FrameType) -> None:
        code = frame.f_code
        made = None
        if code.co_name == "__init__":
            made = type(frame.f_locals.get("self"))
        elif code.co_name == "<lambda>" and code.co_varnames[:1] == ("_cls",):  # a named tuple's __new__
            made = frame.f_locals["_cls"]
        if made is not None and made.__module__.startswith("sidecar"):
            self.add("values", f"{made.__module__}.{made.__qualname__}")
        if code.co_qualname.startswith(_LOG_ROUNDS):
            return
        if code.co_filename.startswith(PACKAGE):
            self.add("calls", f"{code.co_filename[len(PACKAGE) + 1 :]}: {code.co_qualname}")
        elif code.co_name not in _ROUNDS and code.co_filename != __file__:
            folder, _, file = code.co_filename.rpartition("/")
            self.add("library calls", f"{folder.rpartition('/')[2]}/{file}: {code.co_qualname}")

    def _called_c(self, frame: FrameType, function: Any) -> None:
        owner, name = getattr(function, "__self__", None), function.__name__
        if isinstance(owner, sqlite3.Connection | sqlite3.Cursor):
            self.add("statements", f"{type(owner).__name__}.{name}")
        elif isinstance(owner, select.epoll):
            if name != "poll":
                self.add("epoll calls", name)
        elif isinstance(owner, socket.socket):
            if name not in _NO_SYSTEM_CALLS:
                self.add("socket calls", name)
        elif owner is sys.modules["posix"] and name != "fspath":
            if frame.f_code.co_qualname.startswith(_LOG_ROUNDS):
                self._writes += 1  # is not the request's
                return
            self.add("os calls", name)

    def watch(self, loop: asyncio.AbstractEventLoop) -> None:
        """Count what is made with this loop."""

        def counted(count: str, method: str) -> None:
            before: Callable[..., Any] = getattr(loop, method)

            def call(*arguments: Any, **named: Any) -> Any:
                self.add(count, _name(arguments))
                return before(*arguments, **named)

            setattr(loop, method, call)

        for count, method in (
            ("futures", "create_future"),
            ("timers", "call_at"),
            ("callbacks", "call_soon"),
            ("thread hops", "call_soon_threadsafe"),
        ):
            counted(count, method)

        def task(loop: asyncio.AbstractEventLoop, coroutine: Any, **named: Any) -> asyncio.Task[Any]:
            self.add("tasks", coroutine.__qualname__)
            return asyncio.Task(coroutine, loop=loop, **named)

        loop.set_task_factory(task)


def _name(arguments: tuple[Any, ...]) -> str:
    """The function that the loop is to call."""
    function = next((each for each in arguments if callable(each)), None)
    return getattr(function, "__qualname__", type(function).__qualname__) if arguments else "future"


def _written() -> int:
    """The number of write system calls of this process; those on sockets are not in it."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["syscw"])


class Backend(BaseHTTPRequestHandler):
    """Reads each request whole, and answers 200 with 1 KiB of JSON in one piece."""

    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16

    def setup(self) -> None:
        sys.setprofile(None)  # this thread is not the sidecar's
        super().setup()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(ANSWER)))
        self.end_headers()
        self.wfile.write(ANSWER)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _requests(tally: Tally, data: tuple[str, int]) -> dict[str, list[Cost]]:
    """What each request cost, by kind. Runs on the client's thread."""
    sys.setprofile(None)
    with BlockingConnection(data) as client:
        scope = client.ask_json("POST", "/api/v1/recovery/scope", SCOPE).json()
        kind, body = as_json(json.loads(load.body(scope["scope_id"], "inc_1")))
        costs: dict[str, list[Cost]] = {}
        for name, target in (("gated", load.GATED_TARGET), ("passing", load.PASSING_TARGET)):
            costs[name] = []
            for number in range(WARM_UP_REQUESTS + REQUESTS):
                tally.begin()
                answer = client.ask("POST", target, kind, body)
                cost = tally.end()
                if answer.status != 200:
                    raise RuntimeError(f"{target} was answered with {answer.status}: {answer.body!r}")
                if number >= WARM_UP_REQUESTS:
                    costs[name].append(cost)
    return costs


async def _served(tally: Tally, folder: Path, backend: int) -> dict[str, list[Cost]]:
    anywhere = {"listen": "127.0.0.1:0"}
    settings = default(
        f"http://127.0.0.1:{backend}",
        data=anywhere,
        admin=anywhere,
        ops=anywhere,
        store={"url": f"sqlite:///{folder}/gate.db"},
        scopes={"limits": {"max_attempts": SCOPE["max_attempts"]}},
        shutdown={"drain_seconds": 0.2},
    )
    policies = PolicySet(revision="r", actions={load.ACTION: ActionPolicy(risk=RiskClass.LOW)})
    never_wait_for_logs()
    async with Sidecar(settings, policies) as running:
        address = running.data_address
        assert isinstance(address, Listen)
        tally.watch(asyncio.get_running_loop())
        sys.setprofile(tally)
        try:
            return await asyncio.to_thread(_requests, tally, (address.host, address.port))
        finally:
            sys.setprofile(None)


def measured() -> dict[str, Cost]:
    """The requests whose counts are nearest to the medians, by kind, and the medians as their totals."""
    tally = Tally()
    with (
        tempfile.TemporaryDirectory() as folder,
        ThreadingHTTPServer(("127.0.0.1", 0), Backend) as backend,
    ):
        backend.daemon_threads = True
        threading.Thread(target=backend.serve_forever, daemon=True).start()
        threading.setprofile(tally)  # for the threads of the store and of the log, which start from here on
        set_up_logging("json")
        costs = asyncio.run(_served(tally, Path(folder), backend.server_port))
        threading.setprofile(None)
        backend.shutdown()
        flush_logs()
        logging.shutdown()
    return {
        kind: {name: _median([cost[name] for cost in each]) for name in COUNTS}
        for kind, each in costs.items()
    }


def _median(costs: list[dict[str, int]]) -> dict[str, int]:
    """The first of the costs whose total is the median of all."""
    wanted = statistics.median_low(sum(cost.values()) for cost in costs)
    return next(cost for cost in costs if sum(cost.values()) == wanted)


def totals(details: Mapping[str, Mapping[str, Mapping[str, int]]]) -> dict[str, dict[str, int]]:
    """The counts of each kind of request."""
    return {
        kind: {name: sum(found.values()) for name, found in counts.items()}
        for kind, counts in details.items()
    }


def risen(counts: Mapping[str, Mapping[str, int]], budget: Mapping[str, Mapping[str, int]]) -> list[str]:
    """A line for each count above its budget."""
    return [
        f"a {kind} request makes {count} {name}, and the budget is {budget[kind][name]}: {COUNTS[name]}"
        for kind, each in counts.items()
        for name, count in each.items()
        if count > budget[kind][name]
    ]


def _in_a_process() -> dict[str, Cost]:
    """The details from a process of its own, in which nothing else runs."""
    with tempfile.TemporaryFile() as log:
        ran = subprocess.run(
            [sys.executable, "-m", "tests.bench.budget", "--measure"],
            stdout=subprocess.PIPE,
            stderr=log,
            env={**os.environ, "PYTHONHASHSEED": "0"},
        )
        if ran.returncode != 0:
            log.seek(0)
            raise SystemExit(f"the requests could not be counted:\n{log.read().decode(errors='replace')}")
    details: dict[str, Cost] = json.loads(ran.stdout)
    return details


def _tables(counts: Mapping[str, Mapping[str, int]], budget: Mapping[str, Mapping[str, int]]) -> str:
    lines = [f"{'':16}{'gated':>8}{'budget':>8}{'passing':>10}{'budget':>8}"]
    for name in COUNTS:
        cells = [counts[kind][name] for kind in counts], [budget[kind].get(name, 0) for kind in counts]
        lines.append(
            f"{name:16}{cells[0][0]:8}{cells[1][0]:8}{cells[0][1]:10}{cells[1][1]:8}  {COUNTS[name]}"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.budget",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--details", choices=("gated", "passing"), help="what the counts consist of")
    parser.add_argument("--write", action="store_true", help="make today's counts the budget")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measured()))
        return 0
    details = _in_a_process()
    counts = totals(details)
    if arguments.details:
        for name, found in details[arguments.details].items():
            print(f"\n{name}: {counts[arguments.details][name]}")
            for function, count in Counter(found).most_common():
                print(f"  {count:5d}  {function}")
        return 0
    if arguments.write:
        FILE.write_text(json.dumps(counts, indent=2) + "\n", encoding="utf-8")
        print(f"wrote {FILE}")
    budget: dict[str, dict[str, int]] = json.loads(FILE.read_text(encoding="utf-8"))
    print(_tables(counts, budget))
    above = risen(counts, budget)
    if above:
        print("\n" + "\n".join(above))
        print(
            "\n`python -m tests.bench.budget --details gated` (or passing) names every function and value.\n"
            "Run it in this checkout and in the one before, and compare. If the rise is worth it, raise the\n"
            "budget with `python -m tests.bench.budget --write`, and say why in the commit."
        )
    return 1 if above else 0


if __name__ == "__main__":
    sys.exit(main())
