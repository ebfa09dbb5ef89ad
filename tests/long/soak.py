"""An hour at half load: memory and descriptors must be flat.

    python -m tests.long.soak [--minutes 60] [--clients 32] [--rate N] [--csv FILE] [--quick]

Takes the minutes that it is given, and 2 more at the end to verify the log; --quick runs for one minute. It
needs 4 GB of disk for an hour, which it frees. Other work beside it only makes the full load smaller.

For 20 seconds all clients ask as fast as they can: the full load. Then they ask half as often, or `--rate`
times a second: executions, scopes, refusals, passing requests of 1, 64 and 256 KiB, lists. Beside it goes a
scrape of the metrics each 5 seconds and a reload of changed policies each minute. Each 30 seconds a line goes
to the CSV file: memory, descriptors, threads, sizes of WAL and database, requests, medians and p99.

The ends of the curve are the first 5 minutes after a warm-up of 5, and the last 5; of a shorter run, a fifth
each. Exit code 1 where
  memory grew by more than 10 MiB (medians of the ends), descriptors by more than 5 or threads by more than 2
    (the least of each end, since a busy moment needs more connections, and a leak never gives them back);
  more than 5 descriptors more are open when the load is over than before it began;
  the WAL was larger than 128 MiB;
  an answer was not the one that is due, or more than one request in a thousand got a 503;
  an execution has no outcome, the sidecar is not ready, or the log does not verify.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tests.acceptance.conftest import write_configuration
from tests.client import Lost, Message
from tests.long.rig import (
    Client,
    Findings,
    Progress,
    Sidecar,
    alongside,
    command,
    execution,
    median,
    milliseconds,
    pages,
    raise_on_sigterm,
    serving,
    table,
)
from tests.support import EXECUTE

FULL_SECONDS = 20.0
SAMPLE_SECONDS = 30.0
SAMPLES_AT_LEAST = 30
END_SECONDS = 300.0  # of the curve, and of the warm-up
END_PART = 0.2
SCRAPE_SECONDS = 5.0
RELOAD_SECONDS = 60.0
IDLE_SECONDS = 5.0  # for connections that nobody uses to be closed
LATE_SECONDS = 1.0  # behind its plan by more, the load is not caught up with
MORE_MIB = 10.0
MORE_DESCRIPTORS = 5
MORE_THREADS = 2
MOST_WAL_MIB = 128.0
MOST_503 = 0.001
ATTEMPTS = 3
SCOPES_AN_INCIDENT = 50
SPENT_SCOPES = 100
MEDIUM = b"m" * (64 << 10)
POLICIES = "actions:\n  retry_agent: {{risk: low, max_cost_usd: 0.0{cost}}}\n"


# The load ----------------------------------------------------------------------------------------------


@dataclass
class Scope:
    """A scope that was issued: the attempts that no client has claimed, and those that were answered."""

    scope_id: str
    incident: str
    left: int = ATTEMPTS
    answered: int = 0


@dataclass
class Load:
    """What clients ask for, and how long it took since the last sample."""

    sidecar: Sidecar
    chance: random.Random = field(default_factory=lambda: random.Random(1))
    gated: list[float] = field(default_factory=list)
    passing: list[float] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)
    busy: Counter[str] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)
    skipped: int = 0
    _open: deque[Scope] = field(default_factory=deque)
    _spent: deque[Scope] = field(default_factory=lambda: deque(maxlen=SPENT_SCOPES))
    _issued: int = 0
    _next: float = 0.0

    @property
    def total(self) -> int:
        return sum(self.done.values())

    async def client(self, rate: float | None) -> None:
        """One of many that share the rate, in requests a second; None: as fast as it can."""
        kinds: list[tuple[str, float, Callable[[Client, Client], Awaitable[None]]]] = [
            ("execution", 30, self._execute),
            ("scope", 12, self._issue),
            ("refusal", 8, self._refused),
            ("passing 1 KiB", 35, partial(self._pass, "GET", "/size/1024", None)),
            ("passing 64 KiB up", 5, partial(self._pass, "POST", "/upload", MEDIUM)),
            ("passing 256 KiB down", 3, partial(self._pass, "GET", f"/size/{256 << 10}", None)),
            ("list", 7, self._list),
        ]
        weights = [weight for _, weight, _ in kinds]
        with Client(self.sidecar.data) as data, Client(self.sidecar.admin) as admin:
            while True:
                if rate is not None:
                    await self._turn(rate)
                name, _, ask = self.chance.choices(kinds, weights)[0]
                try:
                    await ask(data, admin)
                except Lost as exc:
                    self.wrong[f"{name}: no answer: {exc}"[:200]] += 1
                self.done[name] += 1

    async def _turn(self, rate: float) -> None:
        now = time.monotonic()
        if self._next < now - LATE_SECONDS:
            if self._next:
                self.skipped += int((now - self._next) * rate)
            self._next = now
        mine, self._next = self._next, self._next + 1 / rate
        if mine > now:
            await asyncio.sleep(mine - now)

    def _due(self, answer: Message, *expected: int) -> bool:
        if answer.status in expected:
            return True
        if answer.status == 503:
            self.busy[answer.json()["error"]] += 1
        else:
            self.wrong[f"{answer.status}, not {expected}: {answer.body[:150]!r}"] += 1
        return False

    async def _issue(self, data: Client, admin: Client) -> None:
        self._issued += 1
        incident = f"inc-{self._issued // SCOPES_AN_INCIDENT}"
        answer = await data.issue(incident, ATTEMPTS, ttl_seconds=3600)
        if self._due(answer, 201):
            self._open.append(Scope(answer.json()["scope_id"], incident))

    async def _execute(self, data: Client, admin: Client) -> None:
        if not self._open:
            await self._issue(data, admin)
        if not self._open:
            return
        scope = self._open[0]
        scope.left -= 1
        if not scope.left:
            self._open.popleft()
        begun = time.monotonic()
        answer = await data.execute(scope.scope_id, scope.incident)
        if self._due(answer, 200):
            self.gated.append(time.monotonic() - begun)
            scope.answered += 1
            if scope.answered == ATTEMPTS:
                self._spent.append(scope)

    async def _refused(self, data: Client, admin: Client) -> None:
        which = self.chance.randrange(5)
        spent = self.chance.choice(self._spent) if self._spent else Scope("scope-0", "inc-0")
        if which == 0:
            answer = await data.ask_json("POST", EXECUTE, execution(None))
        elif which == 1:
            answer = await data.execute("no-such-scope")
        elif which == 2:
            answer = await data.execute(spent.scope_id, "another-incident")
        elif which == 3:
            answer = await data.ask("POST", EXECUTE, [("Content-Type", "application/json")], b'{"scope_id": ')
        else:
            answer = await data.execute(spent.scope_id, spent.incident)
        self._due(answer, 400, 403, 404)

    async def _pass(self, method: str, target: str, body: bytes | None, data: Client, admin: Client) -> None:
        begun = time.monotonic()
        answer = await data.ask(method, target, (), body)
        if self._due(answer, 200):
            self.passing.append(time.monotonic() - begun)

    async def _list(self, data: Client, admin: Client) -> None:
        which = self.chance.randrange(3)
        if which == 0:
            incident = f"inc-{self.chance.randint(0, self._issued // SCOPES_AN_INCIDENT)}"
            answer = await data.ask("GET", f"/api/v1/recovery/scopes/{incident}?limit=20")
        elif which == 1:
            answer = await admin.ask("GET", "/api/v1/decisions?event=admitted&limit=20")
        else:
            answer = await admin.ask("GET", "/api/v1/executions?limit=20")
        self._due(answer, 200)

    async def scrapes(self) -> None:
        with Client(self.sidecar.ops) as client:
            while True:
                await self._beside("scrape", partial(client.ask, "GET", "/metrics"))
                await asyncio.sleep(SCRAPE_SECONDS)

    async def reloads(self) -> None:
        policies = self.sidecar.config.parent / "policies" / "actions.yaml"
        number = 0
        with Client(self.sidecar.admin) as client:
            while True:
                await asyncio.sleep(RELOAD_SECONDS)
                number += 1
                policies.write_text(POLICIES.format(cost=1 + number % 2))
                await self._beside("reload", partial(client.ask, "POST", "/api/v1/reload", (), b""))

    async def _beside(self, name: str, ask: Callable[[], Awaitable[Message]]) -> None:
        try:
            self._due(await ask(), 200)
        except Lost as exc:
            self.wrong[f"{name}: no answer: {exc}"[:200]] += 1
        self.done[name] += 1


# The curve ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """One line of the CSV file."""

    seconds: float
    rss_mib: float
    descriptors: int
    threads: int
    wal_mib: float
    database_mib: float
    cpu: float
    requests: int
    gated_p50_ms: float
    gated_p99_ms: float
    passing_p50_ms: float
    passing_p99_ms: float


class Curve:
    """Samples, in memory and in the file."""

    def __init__(self, load: Load, path: Path, seconds: float) -> None:
        self._load = load
        self._path = path
        self._store = load.sidecar.config.parent / "var" / "scopegate.db"
        self._begun = self._last = time.monotonic()
        self._cpu, self._requests = self._cpu_seconds(), load.total
        self.every = min(SAMPLE_SECONDS, seconds / SAMPLES_AT_LEAST)
        self.seconds = seconds
        self.samples: list[Sample] = []

    async def follow(self) -> None:
        """Until the time is over."""
        progress = Progress("soak", self.seconds)
        with self._path.open("w", newline="") as file:
            lines = csv.writer(file)
            lines.writerow(Sample.__dataclass_fields__)
            while time.monotonic() - self._begun < self.seconds:
                await asyncio.sleep(self.every)
                sample = self._sample()
                self.samples.append(sample)
                lines.writerow([getattr(sample, name) for name in Sample.__dataclass_fields__])
                file.flush()
                note = f"({sample.rss_mib:.1f} MiB, {sample.descriptors} files, p50 {sample.gated_p50_ms} ms)"
                progress.show(sample.seconds, note)

    def _cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self._load.sidecar.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _sample(self) -> Sample:
        load, now = self._load, time.monotonic()
        gated, load.gated = load.gated, []
        passing, load.passing = load.passing, []
        cpu, requests, passed = self._cpu_seconds(), load.total, now - self._last
        sample = Sample(
            seconds=round(now - self._begun, 1),
            rss_mib=round(load.sidecar.rss_mib(), 2),
            descriptors=load.sidecar.descriptors(),
            threads=load.sidecar.threads(),
            wal_mib=_mib(Path(f"{self._store}-wal")),
            database_mib=_mib(self._store),
            cpu=round((cpu - self._cpu) / passed, 3),
            requests=requests - self._requests,
            gated_p50_ms=round(milliseconds(gated), 2),
            gated_p99_ms=round(milliseconds(gated, 0.99), 2),
            passing_p50_ms=round(milliseconds(passing), 2),
            passing_p99_ms=round(milliseconds(passing, 0.99), 2),
        )
        self._cpu, self._requests, self._last = cpu, requests, now
        return sample

    def ends(self) -> tuple[list[Sample], list[Sample]]:
        """The first minutes after the warm-up, and the last."""
        window = min(END_SECONDS, self.seconds * END_PART)
        first = [one for one in self.samples if window < one.seconds <= 2 * window + self.every / 2]
        last = [one for one in self.samples if one.seconds > self.samples[-1].seconds - window]
        return first, last


def _mib(path: Path) -> float:
    return round(path.stat().st_size / (1 << 20), 2) if path.exists() else 0.0


def compare(curve: Curve, findings: Findings) -> None:
    """Print the ends of the curve, and hold them against the tolerances."""
    first, last = curve.ends()
    if not first or not last:
        findings.found.append("there are no samples of the curve's ends")
        return
    minutes = min(END_SECONDS, curve.seconds * END_PART) / 60
    rows: list[list[object]] = [
        [f"of {minutes:.1f} minutes", "", "first", "last", "grown by", "allowed", "of all: least", "most"]
    ]
    tolerances = {"rss_mib": MORE_MIB, "descriptors": MORE_DESCRIPTORS, "threads": MORE_THREADS}
    for name in list(Sample.__dataclass_fields__)[1:]:
        least = name in ("descriptors", "threads")
        of = min if least else median
        before, after = (of([getattr(one, name) for one in end]) for end in (first, last))
        values = [getattr(one, name) for one in curve.samples]
        allowed = tolerances.get(name)
        row = [name, "least" if least else "median", f"{before:g}", f"{after:g}", f"{after - before:+.2f}"]
        rows.append([*row, "" if allowed is None else f"{allowed:g}", f"{min(values):g}", f"{max(values):g}"])
        if allowed is not None:
            findings.check(after - before <= allowed, f"{name} grew from {before:g} to {after:g}")
    table(rows)
    wal = max(one.wal_mib for one in curve.samples)
    findings.check(wal <= MOST_WAL_MIB, f"the WAL grew to {wal:g} MiB")


# Running it --------------------------------------------------------------------------------------------


async def full_load(sidecar: Sidecar, clients: int, seconds: float) -> tuple[float, Load]:
    """Requests a second when all ask as fast as they can."""
    load = Load(sidecar)
    begun = time.monotonic()
    async with alongside(*(load.client(None) for _ in range(clients))):
        await asyncio.sleep(seconds)
        rate = load.total / (time.monotonic() - begun)
    await asyncio.sleep(1.0)  # what was broken off is settled
    return rate, load


async def soak(options: argparse.Namespace, folder: Path, findings: Findings) -> None:
    async with serving() as backend:
        config = write_configuration(folder, backend.address)
        async with Sidecar(config) as sidecar:
            idle = await at_rest_descriptors(sidecar)
            full, first = await full_load(sidecar, options.clients, 5.0 if options.quick else FULL_SECONDS)
            rate = options.rate or full / 2
            p50, p99 = milliseconds(first.gated), milliseconds(first.gated, 0.99)
            print(f"full load: {full:.0f} requests a second, executions p50 {p50:.1f} ms, p99 {p99:.1f} ms")
            print(f"now {rate:.0f} a second for {options.minutes:g} minutes", flush=True)
            broken_off = await unknown(sidecar)
            load = Load(sidecar, random.Random(2), _issued=first._issued + SCOPES_AN_INCIDENT)
            curve = Curve(load, options.csv, options.minutes * 60)
            clients = [load.client(rate) for _ in range(options.clients)]
            async with alongside(*clients, load.scrapes(), load.reloads()):
                await curve.follow()
                took = load.total
            await asyncio.sleep(IDLE_SECONDS)
            at_rest = await at_rest_descriptors(sidecar)
            findings.check(
                at_rest - idle <= MORE_DESCRIPTORS, f"{at_rest} descriptors at rest, {idle} before"
            )
            await afterwards(sidecar, broken_off, options.clients, findings)
            findings.check((await sidecar.stop()) == 0, "it did not stop in order")
        print()
        compare(curve, findings)
        print(f"descriptors at rest: {idle} before, {at_rest} after")
        report(load, took, options, findings)
    verified = command("log", "verify", "--config", config, seconds=1800)
    findings.check(verified.returncode == 0, f"log verify: {verified.returncode} {verified.stderr[-300:]}")
    print(f"log verify: {verified.stdout.split(',')[0].strip()}")


async def at_rest_descriptors(sidecar: Sidecar) -> int:
    """Descriptors after one more request, which closes the connections to the backend that idled too long."""
    with Client(sidecar.data) as client:
        await client.ask("GET", "/size/1")
    await asyncio.sleep(0.5)
    return sidecar.descriptors()


async def unknown(sidecar: Sidecar) -> int:
    target = "/api/v1/executions?status=unknown"
    return len([one async for one in pages(sidecar.admin, target, "executions")])


async def afterwards(sidecar: Sidecar, broken_off: int, clients: int, findings: Findings) -> None:
    target = "/api/v1/executions?status=in_flight"
    in_flight = len([one async for one in pages(sidecar.admin, target, "executions")])
    findings.check(not in_flight, f"{in_flight} executions are without outcome")
    more = await unknown(sidecar) - broken_off
    # What the clients were at when the time was over, they left.
    findings.check(more <= clients, f"{more} executions are unknown")
    with Client(sidecar.ops) as client:
        ready = await client.ask("GET", "/health/ready")
    findings.check(ready.status == 200, f"not ready afterwards: {ready.body[:300]!r}")


def report(load: Load, took: int, options: argparse.Namespace, findings: Findings) -> None:
    print(f"\n{took} requests: " + ", ".join(f"{count} x {name}" for name, count in load.done.most_common()))
    busy = sum(load.busy.values())
    print(f"503: {busy} {dict(load.busy) or ''}; left out since the machine was busy: {load.skipped}")
    findings.check(busy <= took * MOST_503, f"{busy} of {took} requests got a 503: {dict(load.busy)}")
    findings.check(took > 0, "nothing was asked")
    for what, count in load.wrong.most_common(10):
        findings.found.append(f"{count} x {what}")
    print(f"the curve: {options.csv}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--rate", type=float, help="requests a second (default: half of the full load)")
    parser.add_argument("--csv", type=Path, default=Path(tempfile.gettempdir()) / "scopegate-soak.csv")
    parser.add_argument("--quick", action="store_true", help="one minute")
    options = parser.parse_args()
    if options.quick:
        options.minutes = min(1.0, options.minutes)
    raise_on_sigterm()
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    findings = Findings()
    try:
        asyncio.run(soak(options, folder, findings))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return findings.report(f"{options.minutes:g} minutes at half load, memory and descriptors flat")


if __name__ == "__main__":
    sys.exit(main())
