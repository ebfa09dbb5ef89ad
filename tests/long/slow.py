"""Hundreds of slow clients and backends at once: others do not notice, and each is closed in time.

    python -m tests.long.slow [--count 500] [--rounds 2] [--seconds 5] [--only KIND ...] [--quick]

Two rounds of 500 take about 3 minutes; --quick does one round of 100 in one. `--seconds` is each of the three
timeouts (head, body, response) of the sidecar. A round has these kinds, each with 500 connections at
once, which send or get a byte each 1.5 seconds:
  heads             request heads that never end: closed within head_timeout
  gated bodies      bodies of executions: 408 within body_timeout
  passing bodies    uploads that go on: they may, until the client leaves; then nothing of them stays
  stopped bodies    uploads that stop half way: answered 504 within response_timeout
  gated heads       executions whose answer's head never ends: 504 within response_timeout
  gated answers     executions whose answer's body never ends: the same
  passing heads     passing requests whose answer's head never ends: the same
  streams           passing answers that never end: they may, until the client leaves

What must hold beside these ends: the medians of other requests, an execution and a passing one every 20 ms,
stay within twice the quiet medians of the same run; memory after the last round is at most 8 MiB above that
after the first; descriptors are back after each kind; the sidecar is ready, each execution has its outcome.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tests.acceptance.conftest import write_configuration
from tests.client import Lost, Message, read_message, request_bytes
from tests.long.rig import (
    Address,
    Backend,
    Client,
    Findings,
    Progress,
    Sidecar,
    alongside,
    execution,
    issue_many,
    median,
    milliseconds,
    pages,
    raise_on_sigterm,
    serving,
    table,
)
from tests.support import EXECUTE

TRICKLE_SECONDS = 1.5
PROBE_SECONDS = 0.02
QUIET_SECONDS = 2.0
LATE_SECONDS = 2.0  # for the end of a connection to arrive on a busy machine
EARLY_SECONDS = 0.5
BACK_SECONDS = 10.0
TIMES_QUIET = 2.0
MORE_MIB = 8.0
MORE_DESCRIPTORS = 5
BODY_BYTES = 400
ATTEMPTS = 10

End = tuple[str, float]  # how it ended, and after how many seconds


# The backend's part ------------------------------------------------------------------------------------


async def behave(request: Message, writer: asyncio.StreamWriter, backend: Backend) -> bool | None:
    """Heads and bodies that never end, by the first segment of the target."""
    kind = request.target.split("/")[1]
    if kind == "endless-head":
        writer.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        piece = b"x"
    elif kind == "endless-body":
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        piece = b"1\r\nx\r\n"
    else:
        return None
    while True:
        writer.write(piece)
        await writer.drain()
        await asyncio.sleep(TRICKLE_SECONDS)


# The clients' part -------------------------------------------------------------------------------------


@dataclass
class Slow:
    """One connection of a kind; `left_after`: seconds after which the client leaves by itself."""

    address: Address
    request: bytes
    trickle: bytes = b""
    left_after: float | None = None

    async def run(self) -> End:
        reader, writer = await asyncio.open_connection(*self.address)
        begun = time.monotonic()
        try:
            writer.write(self.request)
            async with alongside(self._trickle(writer)):
                try:
                    async with asyncio.timeout(self.left_after or 60.0):
                        how = await self._end(reader)
                except TimeoutError:
                    how = "left" if self.left_after else "never"
            return how, time.monotonic() - begun
        finally:
            writer.close()

    async def _trickle(self, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            for number in range(len(self.trickle)):
                await asyncio.sleep(TRICKLE_SECONDS)
                writer.write(self.trickle[number : number + 1])
                await writer.drain()

    async def _end(self, reader: asyncio.StreamReader) -> str:
        try:
            answer = await read_message(reader)
        except OSError:
            answer = None
        if answer is None:
            return "closed"
        return str(answer.status) + ("" if answer.whole else " cut")


@dataclass(frozen=True)
class Kind:
    """A kind of slowness: how one is made, and how it must end."""

    name: str
    make: Callable[[Address, str, float], Slow]
    ends: tuple[str, ...]
    in_time: bool = True  # closed by the sidecar within the timeout; else the client leaves
    gated: bool = False


def post(address: Address, target: str, body: bytes, length: int | None = None) -> bytes:
    headers = [
        ("Host", f"{address[0]}:{address[1]}"),
        ("Content-Type", "application/json"),
        ("Content-Length", str(len(body) if length is None else length)),
    ]
    return request_bytes("POST", target, headers) + body


def get(address: Address, target: str) -> bytes:
    return request_bytes("GET", target, [("Host", f"{address[0]}:{address[1]}")])


def executing(address: Address, prefix: str, scope: str) -> bytes:
    return post(address, f"/{prefix}{EXECUTE}", json.dumps(execution(scope)).encode())


KINDS = (
    Kind(
        "heads",
        lambda address, scope, seconds: Slow(
            address, b"GET /size", b"/10 HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow:"
        ),
        ("closed", "408"),
    ),
    Kind(
        "gated bodies",
        lambda address, scope, seconds: Slow(
            address, post(address, EXECUTE, b"{", BODY_BYTES), b" " * BODY_BYTES
        ),
        ("408",),
    ),
    Kind(
        "passing bodies",
        lambda address, scope, seconds: Slow(
            address, post(address, "/upload", b"{", BODY_BYTES), b" " * (BODY_BYTES - 2), seconds + 2
        ),
        ("left", "408", "504"),
        in_time=False,
    ),
    Kind(
        "stopped bodies",
        lambda address, scope, seconds: Slow(address, post(address, "/upload", b"x" * 200, BODY_BYTES)),
        ("504", "408"),
    ),
    Kind(
        "gated heads",
        lambda address, scope, seconds: Slow(address, executing(address, "endless-head", scope)),
        ("504",),
        gated=True,
    ),
    Kind(
        "gated answers",
        lambda address, scope, seconds: Slow(address, executing(address, "endless-body", scope)),
        ("504",),
        gated=True,
    ),
    Kind(
        "passing heads",
        lambda address, scope, seconds: Slow(address, get(address, "/endless-head")),
        ("504",),
    ),
    Kind(
        "streams",
        lambda address, scope, seconds: Slow(address, get(address, "/endless-body"), b"", seconds + 2),
        ("left",),
        in_time=False,
    ),
)


# Others, and the figures -------------------------------------------------------------------------------


@dataclass
class Others:
    """The requests that must not notice: (begun, seconds) of those that were answered well."""

    data: Address
    gated: list[tuple[float, float]] = field(default_factory=list)
    passing: list[tuple[float, float]] = field(default_factory=list)
    failed: Counter[str] = field(default_factory=Counter)

    async def execute(self) -> None:
        with Client(self.data) as client:
            while True:
                try:
                    issued = await client.issue("inc-others", ATTEMPTS, ttl_seconds=3600)
                    scope = issued.json()["scope_id"]
                except (Lost, KeyError) as exc:
                    self.failed[f"issuing: {exc!r}"[:100]] += 1
                    await asyncio.sleep(PROBE_SECONDS)
                    continue
                for _ in range(ATTEMPTS):
                    await self._one(self.gated, "execution", partial(client.execute, scope, "inc-others"))

    async def ask(self) -> None:
        with Client(self.data) as client:
            while True:
                await self._one(self.passing, "passing", partial(client.ask, "GET", "/size/1024"))

    async def _one(
        self, times: list[tuple[float, float]], kind: str, ask: Callable[[], Awaitable[Message]]
    ) -> None:
        begun = time.monotonic()
        try:
            status = (await ask()).status
        except Lost:
            status = 0
        if status == 200:
            times.append((begun, time.monotonic() - begun))
        else:
            self.failed[f"{kind}: {status or 'no answer'}"] += 1
        await asyncio.sleep(PROBE_SECONDS)


def since(times: list[tuple[float, float]], moment: float) -> list[float]:
    return [seconds for begun, seconds in times if begun >= moment]


@dataclass
class Gauges:
    """Memory and descriptors of the sidecar, four times a second."""

    sidecar: Sidecar
    rss: list[float] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)

    async def watch(self) -> None:
        while True:
            self.rss.append(self.sidecar.rss_mib())
            self.descriptors.append(self.sidecar.descriptors())
            await asyncio.sleep(0.25)


# Running it --------------------------------------------------------------------------------------------


class Run:
    """All kinds against one sidecar."""

    def __init__(self, sidecar: Sidecar, options: argparse.Namespace, findings: Findings) -> None:
        self.sidecar = sidecar
        self.count: int = options.count
        self.rounds: int = options.rounds
        self.seconds: float = options.seconds
        self.kinds = [kind for kind in KINDS if not options.only or kind.name.startswith(tuple(options.only))]
        self.findings = findings
        self.others = Others(sidecar.data)
        self.quiet_gated: list[float] = []
        self.quiet_passing: list[float] = []
        self.after_round: list[float] = []
        self.idle_descriptors = 0
        self.gated = 0
        self.rows: list[list[object]] = [
            [
                "kind",
                "ended as",
                "after s: median / most",
                "gated ms",
                "passing ms",
                "MiB: before / peak / after",
                "files",
            ]
        ]

    async def run(self) -> None:
        progress = Progress("slow", self.rounds * len(self.kinds))
        before = self.sidecar.rss_mib()
        async with alongside(self.others.execute(), self.others.ask()):
            await asyncio.sleep(QUIET_SECONDS)
            self.idle_descriptors = self.sidecar.descriptors()
            for number in range(self.rounds):
                for at, kind in enumerate(self.kinds):
                    await self.one(kind)
                    progress.show(number * len(self.kinds) + at + 1, f"({kind.name})")
                self.after_round.append(self.sidecar.rss_mib())
        grown = self.after_round[-1] - self.after_round[0]
        self.findings.check(
            grown <= MORE_MIB, f"memory grew by {grown:.1f} MiB over the rounds after the first"
        )
        self.findings.check(not self.others.failed, f"other requests failed: {dict(self.others.failed)}")
        table(self.rows)
        rounds = ", ".join(f"{mib:.1f}" for mib in self.after_round)
        print(f"\nmemory at first {before:.1f} MiB, after each round {rounds} MiB ({grown:+.1f})")
        print(
            f"quiet medians: gated {median(self.quiet_gated) * 1000:.2f} ms, passing "
            f"{median(self.quiet_passing) * 1000:.2f} ms; above, each is shown as so many times that"
        )

    async def one(self, kind: Kind) -> None:
        """One kind, and a quiet moment before it."""
        quiet = time.monotonic()
        await asyncio.sleep(QUIET_SECONDS)
        self.quiet_gated += since(self.others.gated, quiet)
        self.quiet_passing += since(self.others.passing, quiet)
        data = self.sidecar.data
        scopes = [""] * self.count
        if kind.gated:
            few = await issue_many(data, -(-self.count // ATTEMPTS), attempts=ATTEMPTS)
            scopes = [few[number // ATTEMPTS] for number in range(self.count)]
            self.gated += self.count
        before, gauges = self.sidecar.rss_mib(), Gauges(self.sidecar)
        begun = time.monotonic()
        async with alongside(gauges.watch()):
            connections = []
            for number, scope in enumerate(scopes):
                slow = kind.make(data, scope, self.seconds)
                connections.append(asyncio.create_task(slow.run()))
                if number % 25 == 24:
                    await asyncio.sleep(0.02)
            ended = await asyncio.gather(*connections)
            gated, passing = since(self.others.gated, begun), since(self.others.passing, begun)
            back = await self._descriptors_back()
        self._judge(kind, ended, gauges, back)
        times = self._times_quiet(kind, "gated", gated, self.quiet_gated)
        times_passing = self._times_quiet(kind, "passing", passing, self.quiet_passing)
        after = self.sidecar.rss_mib()
        seconds = [taken for _, taken in ended]
        how = ", ".join(
            f"{number} x {end}" for end, number in Counter(end for end, _ in ended).most_common(2)
        )
        files = f"{self.idle_descriptors} / {max(gauges.descriptors)} / {back}"
        self.rows.append(
            [
                kind.name,
                how,
                f"{median(seconds):.1f} / {max(seconds):.1f}",
                times,
                times_passing,
                f"{before:.0f} / {max(gauges.rss):.0f} / {after:.0f}",
                files,
            ]
        )

    async def _descriptors_back(self) -> int:
        """Descriptors, once they are as few as before, or do not become so."""
        end = time.monotonic() + BACK_SECONDS
        while time.monotonic() < end:
            if self.sidecar.descriptors() <= self.idle_descriptors + MORE_DESCRIPTORS:
                break
            await asyncio.sleep(0.1)
        return self.sidecar.descriptors()

    def _judge(self, kind: Kind, ended: list[End], gauges: Gauges, back: int) -> None:
        check = self.findings.check
        strange = Counter(how for how, _ in ended if how not in kind.ends)
        check(not strange, f"{kind.name}: ended as {dict(strange)}, not as {' or '.join(kind.ends)}")
        if kind.in_time:
            late = [seconds for _, seconds in ended if seconds > self.seconds + LATE_SECONDS]
            check(
                not late, f"{kind.name}: {len(late)} ended too late, after up to {max(late, default=0):.1f} s"
            )
            early = [seconds for _, seconds in ended if seconds < self.seconds - EARLY_SECONDS]
            check(
                not early, f"{kind.name}: {len(early)} ended too early, after {min(early, default=0):.1f} s"
            )
        held = max(gauges.descriptors) - self.idle_descriptors
        check(held >= self.count, f"{kind.name}: only {held} descriptors more than before were open at once")
        most = self.idle_descriptors + MORE_DESCRIPTORS
        check(back <= most, f"{kind.name}: {back} descriptors are open after it, {most} at most expected")

    def _times_quiet(self, kind: Kind, name: str, times: list[float], quiet: list[float]) -> str:
        ratio = median(times) / median(quiet)
        self.findings.check(
            ratio <= TIMES_QUIET, f"{kind.name}: the median of {name} requests is {ratio:.1f} x"
        )
        return f"{median(times) * 1000:.2f} ({ratio:.1f} x), p99 {milliseconds(times, 0.99):.0f}"


async def afterwards(sidecar: Sidecar, run: Run, findings: Findings) -> None:
    with Client(sidecar.ops) as client:
        ready = await client.ask("GET", "/health/ready")
    findings.check(ready.status == 200, f"not ready afterwards: {ready.body[:300]!r}")
    status = Counter(
        [one["status"] async for one in pages(sidecar.admin, "/api/v1/executions", "executions")]
    )
    print(f"executions: {dict(status)}")
    findings.check(not status["in_flight"], f"{status['in_flight']} executions are without outcome")
    findings.check(status["unknown"] == run.gated, f"{status['unknown']} unknown, {run.gated} never ended")


async def everything(options: argparse.Namespace, folder: Path, findings: Findings) -> None:
    timeouts = {"head_timeout_seconds": options.seconds, "body_timeout_seconds": options.seconds}
    async with serving(behaviour=behave) as backend:
        config = write_configuration(
            folder,
            backend.address,
            gate=timeouts,
            # Passing requests get three quarters of these, and here 500 are to pass at once.
            upstream={"response_timeout_seconds": options.seconds, "max_connections": 4 * options.count},
        )
        async with Sidecar(config) as sidecar:
            run = Run(sidecar, options, findings)
            await run.run()
            await afterwards(sidecar, run, findings)
            findings.check((await sidecar.stop()) == 0, "it did not stop in order")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--count", type=int, default=500, help="connections of each kind (default: 500)")
    parser.add_argument("--rounds", type=int, default=2, help="default: 2")
    parser.add_argument("--seconds", type=float, default=5.0, help="each timeout (default: 5)")
    parser.add_argument("--only", nargs="+", metavar="KIND", help="kinds whose names begin so")
    parser.add_argument("--quick", action="store_true", help="one round of 100")
    options = parser.parse_args()
    if options.quick:
        options.count, options.rounds = min(100, options.count), 1
    raise_on_sigterm()
    folder = Path(tempfile.mkdtemp(prefix="slow-"))
    findings = Findings()
    begun = time.monotonic()
    asyncio.run(everything(options, folder, findings))
    print(f"{(time.monotonic() - begun) / 60:.1f} minutes")
    if findings.found:
        print(f"kept: {folder}")
    else:
        shutil.rmtree(folder)
    return findings.report(f"{options.count} of each kind: others did not notice, all ended in time")


if __name__ == "__main__":
    sys.exit(main())
