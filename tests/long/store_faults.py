"""A thousand attempts under each fault of the store: nothing is executed, readiness goes off and comes back.

    python -m tests.long.store_faults [--attempts 1000] [--only NAME ...] [--quick]

1,000 attempts under each fault take about 3 minutes in all; --quick makes 100 of each in a minute. Each fault
has a real sidecar and a store of its own:
  locked            another process holds SQLite's write lock
  full              the disk has no byte left: a small tmpfs, which root mounts; else RLIMIT_FSIZE is 0
  moved             the database was renamed away
  corrupt header    the first 100 bytes of the database are overwritten
  corrupt body      all pages but the first are overwritten
  corrupt scopes    the roots of the scopes' table and indexes are overwritten, all else works
  hanging           statements and commits do not return
Before each corruption the WAL is emptied into the database, so that what is overwritten is what is read.

While the fault lasts clients attempt executions, /health/ready is asked 50 ms after each of its answers, and
other requests pass. What must hold:
  no execution reaches the backend, each attempt is answered 503 with Retry-After, what passes is answered;
  readiness is off within a second of the first attempt that failed, and stays off while the cause is there;
  it is on again once the cause is gone, and then an execution goes through;
  no scope has lost an attempt, no admission is without outcome, the chain verifies, integrity_check is ok.
In the table, "off after" counts from the first attempt that failed (below 0: it was off before), and "on
after" counts from the end of the cause. "how" says what it took: nothing (alone), or the next attempt.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.acceptance.conftest import write_configuration
from tests.client import Lost
from tests.long.rig import (
    PROJECT,
    Backend,
    Client,
    Findings,
    Progress,
    Sidecar,
    alongside,
    command,
    issue_many,
    milliseconds,
    pages,
    raise_on_sigterm,
    serving,
    table,
)

WORKERS = 50
SCOPES = 20
ATTEMPTS_A_SCOPE = 10
POLL_SECONDS = 0.05
PASS_SECONDS = 0.02
QUIET_SECONDS = 1.5
FAULT_SECONDS = 4.0  # at least, so that readiness is seen off for a while
OFF_SECONDS = 1.0
ALONE_SECONDS = 10.0  # for readiness to come back
SETTLED_SECONDS = 10.0
TMPFS = "16m"
HEADER_BYTES = 100


@dataclass
class Stage:
    """A sidecar, its backend, and its store."""

    sidecar: Sidecar
    backend: Backend
    store: Path
    folder: Path


class Fault:
    """Something that is done to a store, and undone."""

    name = ""
    module = "sidecar"

    def prepare(self, folder: Path) -> None:
        """Before the sidecar starts."""

    def begin(self, stage: Stage) -> None:
        raise NotImplementedError

    def end(self, stage: Stage) -> None:
        raise NotImplementedError

    def clean(self) -> None:
        """Whatever has happened."""


class Locked(Fault):
    name = "locked"

    def __init__(self) -> None:
        self._holder: subprocess.Popen[bytes] | None = None

    def begin(self, stage: Stage) -> None:
        self._holder = subprocess.Popen(
            [sys.executable, "-m", "tests.long.store_faults", "--hold", str(stage.store)],
            cwd=PROJECT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != b"locked\n":
            raise RuntimeError("the write lock was not to be had")

    def end(self, stage: Stage) -> None:
        assert self._holder is not None
        self._holder.communicate(b"\n", timeout=10)

    def clean(self) -> None:
        if self._holder is not None and self._holder.poll() is None:
            self._holder.kill()
            self._holder.wait()


def hold(path: str) -> None:
    """Hold the write lock until a line comes."""
    with closing(sqlite3.connect(path, isolation_level=None, timeout=10)) as database:
        database.execute("BEGIN IMMEDIATE")
        print("locked", flush=True)
        sys.stdin.readline()
        database.execute("ROLLBACK")


class Full(Fault):
    name = "full"

    def __init__(self) -> None:
        self._mounted: Path | None = None
        self._limit: tuple[int, int] | None = None

    def prepare(self, folder: Path) -> None:
        var = folder / "var"
        var.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={TMPFS}", "tmpfs", str(var)]
        with suppress(OSError):
            if subprocess.run(mount, check=False, capture_output=True).returncode == 0:
                self._mounted = var
        if self._mounted is None:
            self.name = "full (RLIMIT_FSIZE)"

    def begin(self, stage: Stage) -> None:
        if self._mounted is None:
            self._limit = resource.prlimit(stage.sidecar.pid, resource.RLIMIT_FSIZE)
            resource.prlimit(stage.sidecar.pid, resource.RLIMIT_FSIZE, (0, self._limit[1]))
            return
        with (self._mounted / "filler").open("wb", buffering=0) as filler:
            for size in (1 << 16, 1 << 12, 1):
                with suppress(OSError):
                    while filler.write(bytes(size)):
                        pass

    def end(self, stage: Stage) -> None:
        if self._limit is not None:
            resource.prlimit(stage.sidecar.pid, resource.RLIMIT_FSIZE, self._limit)
        else:
            assert self._mounted is not None
            (self._mounted / "filler").unlink()

    def clean(self) -> None:
        if self._mounted is not None:
            subprocess.run(["umount", str(self._mounted)], check=False, capture_output=True)


class Moved(Fault):
    name = "moved"

    def begin(self, stage: Stage) -> None:
        os.rename(stage.store, stage.store.with_suffix(".away"))

    def end(self, stage: Stage) -> None:
        os.rename(stage.store.with_suffix(".away"), stage.store)


Places = Callable[[Path], list[tuple[int, int]]]


class Corrupt(Fault):
    """Overwrites (offset, length) of the database. What the sidecar has written there since is left alone."""

    def __init__(self, name: str, places: Places) -> None:
        self.name = name
        self._places = places
        self._before: list[tuple[int, bytes]] = []

    def begin(self, stage: Stage) -> None:
        _empty_wal(stage.store)
        places = self._places(stage.store)
        with stage.store.open("r+b", buffering=0) as database:
            for offset, length in places:
                before = os.pread(database.fileno(), length, offset)
                self._before.append((offset, before))
                os.pwrite(database.fileno(), _garbage(before), offset)

    def end(self, stage: Stage) -> None:
        os.kill(stage.sidecar.pid, signal.SIGSTOP)
        try:
            with stage.store.open("r+b", buffering=0) as database:
                for offset, before in self._before:
                    if os.pread(database.fileno(), len(before), offset) == _garbage(before):
                        os.pwrite(database.fileno(), before, offset)
        finally:
            os.kill(stage.sidecar.pid, signal.SIGCONT)


def _garbage(before: bytes) -> bytes:
    return bytes(byte ^ 0xA5 for byte in before)


def _empty_wal(store: Path) -> None:
    end = time.monotonic() + 10
    while time.monotonic() < end:
        with closing(sqlite3.connect(store, isolation_level=None, timeout=1)) as database:
            if database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0:
                return
        time.sleep(0.05)
    raise RuntimeError("the WAL could not be emptied")


def _header(store: Path) -> list[tuple[int, int]]:
    return [(0, HEADER_BYTES)]


def _body(store: Path) -> list[tuple[int, int]]:
    page = _page_size(store)
    return [(offset, page) for offset in range(page, store.stat().st_size, page)]


def _scopes(store: Path) -> list[tuple[int, int]]:
    page = _page_size(store)
    with closing(sqlite3.connect(f"file:{store}?mode=ro", uri=True)) as database:
        roots = database.execute(
            "SELECT rootpage FROM sqlite_master WHERE tbl_name = 'scopes' AND rootpage > 0"
        )
        return [((root - 1) * page, page) for (root,) in roots]


def _page_size(store: Path) -> int:
    with store.open("rb") as database:
        database.seek(16)
        size = int.from_bytes(database.read(2), "big")
    return 65536 if size == 1 else size


class Hanging(Fault):
    name = "hanging"
    module = "tests.long.hanging"

    def begin(self, stage: Stage) -> None:
        (stage.folder / "hang").touch()

    def end(self, stage: Stage) -> None:
        (stage.folder / "hang").unlink()


def faults() -> list[Fault]:
    corruptions: list[tuple[str, Places]] = [
        ("corrupt header", _header),
        ("corrupt body", _body),
        ("corrupt scopes", _scopes),
    ]
    return [Locked(), Full(), Moved(), *(Corrupt(*each) for each in corruptions), Hanging()]


# What is watched while it lasts ------------------------------------------------------------------------


@dataclass
class Watch:
    """Readiness and passing requests: when each was asked and answered, and how (0: not at all)."""

    stage: Stage
    polls: list[tuple[float, float, int]] = field(default_factory=list)
    passed: list[tuple[float, float, int]] = field(default_factory=list)
    last_reasons: str = ""

    async def ready(self) -> None:
        with Client(self.stage.sidecar.ops) as client:
            while True:
                asked = time.monotonic()
                try:
                    answer = await client.ask("GET", "/health/ready")
                    status = answer.status
                    if status != 200:
                        checks = answer.json()["checks"]
                        self.last_reasons = "; ".join(
                            f"{name}: {check['reason']}" for name, check in checks.items() if not check["ok"]
                        )
                except Lost:
                    status = 0
                self.polls.append((asked, time.monotonic(), status))
                await asyncio.sleep(POLL_SECONDS)

    async def passing(self) -> None:
        with Client(self.stage.sidecar.data) as client:
            while True:
                asked = time.monotonic()
                try:
                    status = (await client.ask("GET", "/size/100")).status
                except Lost:
                    status = 0
                self.passed.append((asked, time.monotonic(), status))
                await asyncio.sleep(PASS_SECONDS)

    def latencies(self, since: float, until: float) -> list[float]:
        return [done - asked for asked, done, _ in self.passed if since <= asked and done <= until]

    async def on_again(self, since: float, seconds: float) -> float | None:
        """Seconds until readiness, asked after `since`, was on; None: not within that time."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for asked, done, status in reversed(self.polls):
                if asked >= since and status == 200:
                    first = min(d for a, d, s in self.polls if a >= since and s == 200)
                    return min(first, done) - since
                if asked < since:
                    break
            await asyncio.sleep(POLL_SECONDS / 2)
        return None


@dataclass
class Attempts:
    """Executions that are attempted by many clients at once, each to be refused."""

    stage: Stage
    scopes: list[str]
    count: int
    progress: Progress
    done: int = 0
    first_failed: float | None = None
    answers: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    async def run(self) -> None:
        left = iter(range(self.count))
        await asyncio.gather(*(self._worker(left) for _ in range(min(WORKERS, self.count))))

    async def _worker(self, left: object) -> None:
        assert hasattr(left, "__next__")
        with Client(self.stage.sidecar.data) as client:
            for number in iter(lambda: next(left, None), None):
                try:
                    answer = await client.execute(self.scopes[number % len(self.scopes)])
                except Lost as exc:
                    self.wrong.append(f"no answer: {exc}")
                    continue
                finally:
                    self.done += 1
                if self.first_failed is None and answer.status != 200:
                    self.first_failed = time.monotonic()
                code = answer.json()["error"] if answer.status != 200 else "executed"
                self.answers[f"{answer.status} {code}"] += 1
                if answer.status != 503 or not answer.header("Retry-After"):
                    self.wrong.append(f"answered {answer.status} {answer.body[:150]!r}")
                self.progress.show(self.done, f"({self.answers.most_common(1)[0][0]})")


# One fault ---------------------------------------------------------------------------------------------


async def suffer(fault: Fault, count: int, folder: Path, findings: Findings) -> list[str]:
    """One fault from its beginning to its end; its row of the table."""

    def check(holds: bool, violation: str) -> None:
        findings.check(holds, f"{fault.name}: {violation}")

    fault.prepare(folder)
    async with serving() as backend:
        config = write_configuration(folder, backend.address)
        sidecar = Sidecar(config, fault.module, HANG_WHILE=str(folder / "hang"))
        stage = Stage(sidecar, backend, folder / "var" / "scopegate.db", folder)
        async with sidecar:
            scopes = await issue_many(sidecar.data, SCOPES, attempts=ATTEMPTS_A_SCOPE)
            with Client(sidecar.data) as client:
                for scope in scopes:
                    answer = await client.execute(scope)
                    check(answer.status == 200, f"before it: {answer.status} {answer.body[:150]!r}")
            watch = Watch(stage)
            attempts = Attempts(stage, scopes, count, Progress(fault.name, count))
            quiet_since = time.monotonic()
            async with alongside(watch.passing()):
                await asyncio.sleep(QUIET_SECONDS)
                begun = time.monotonic()
                executed_before = len(backend.seen)
                await asyncio.to_thread(fault.begin, stage)
                try:
                    async with alongside(watch.ready()):
                        await attempts.run()
                        await asyncio.sleep(max(0.0, FAULT_SECONDS - (time.monotonic() - begun)))
                        ended = time.monotonic()
                        fault.end(stage)
                        on, how = await _recover(stage, watch, scopes[0], ended, check)
                finally:
                    with suppress(OSError, ValueError):
                        (folder / "hang").unlink(missing_ok=True)
            executed = len([one for one in backend.seen[executed_before:] if one.at < ended])
            check(executed == 0, f"{executed} executions reached the backend")
            check(not attempts.wrong, f"{len(attempts.wrong)} answers are wrong, as {attempts.wrong[:1]}")
            bad = [status for asked, done, status in watch.passed if status != 200 and done <= ended]
            check(not bad, f"{len(bad)} passing requests failed: {Counter(bad)}")
            off = _off(watch, attempts.first_failed, ended, check)
            await _afterwards(stage, scopes, check)
            quiet = milliseconds(watch.latencies(quiet_since, begun))
            under = watch.latencies(begun, ended)
            check((await sidecar.stop()) == 0, "it did not stop in order")
        _at_rest(stage, check)
    codes = ", ".join(f"{number} x {code}" for code, number in attempts.answers.most_common(2))
    return [
        fault.name,
        str(attempts.done),
        str(executed),
        codes,
        off,
        f"{on:.2f} s" if on is not None else "never",
        how,
        f"{quiet:.1f} / {milliseconds(under):.1f} / {milliseconds(under, 1.0):.0f}",
    ]


def _off(watch: Watch, first_failed: float | None, ended: float, check: Callable[[bool, str], None]) -> str:
    """When readiness went off, from the first attempt that failed."""
    if first_failed is None:
        check(False, "no attempt failed")
        return "-"
    offs = [done for _, done, status in watch.polls if status == 503 and done < ended]
    off = min(offs, default=None)
    check(
        off is not None and off - first_failed <= OFF_SECONDS,
        f"readiness was not off within {OFF_SECONDS:g} s of the first failed attempt",
    )
    still = [
        done for _, done, status in watch.polls if first_failed + OFF_SECONDS < done < ended and status == 200
    ]
    check(not still, f"readiness said 200 {len(still)} times while the cause was there")
    return "never" if off is None else f"{off - first_failed:+.2f} s"


async def _recover(
    stage: Stage,
    watch: Watch,
    scope: str,
    ended: float,
    check: Callable[[bool, str], None],
) -> tuple[float | None, str]:
    """Seconds from the end of the cause until readiness was on, and what that took."""
    how = "alone"
    on = await watch.on_again(ended, ALONE_SECONDS)
    if on is None:
        how = "next attempt"
        await _executes(stage, scope)
        on = await watch.on_again(ended, ALONE_SECONDS)
    if on is not None and await _executes(stage, scope):
        return on, how
    if on is not None:
        check(False, "readiness is on, and executions fail")
    check(on is not None, f"readiness did not come back: {watch.last_reasons[:200]}")
    return on, how


async def _executes(stage: Stage, scope: str) -> bool:
    with Client(stage.sidecar.data) as client, suppress(Lost):
        return (await client.execute(scope)).status == 200
    return False


async def _afterwards(stage: Stage, scopes: list[str], check: Callable[[bool, str], None]) -> None:
    """Once the cause is gone: an execution goes through, and no attempt was lost or left open."""
    sidecar = stage.sidecar
    with Client(sidecar.data) as client:
        answer = await client.execute(scopes[-1])
        check(answer.status == 200, f"after it: {answer.status} {answer.body[:150]!r}")
    end = time.monotonic() + SETTLED_SECONDS
    while True:
        executions = [one async for one in pages(sidecar.admin, "/api/v1/executions", "executions")]
        open_ = [one["decision_id"] for one in executions if one["status"] == "in_flight"]
        if not open_ or time.monotonic() > end:
            break
        await asyncio.sleep(0.1)
    check(not open_, f"{len(open_)} admissions are without outcome")
    status = {one["decision_id"]: one["status"] for one in executions}
    unknown = [one for one in status.values() if one == "unknown"]
    check(not unknown, f"{len(unknown)} admissions are unknown")
    seen = [one.decision_id for one in stage.backend.seen]
    check(len(seen) == len(set(seen)), "the backend saw an execution twice")
    answered = {one for one, ended in status.items() if ended == "answered"}
    check(set(seen) == answered, f"{len(set(seen) ^ answered)} executions are here or there only")
    used = Counter(one.scope_id for one in stage.backend.seen)
    listed = {
        one["scope_id"]: one["attempts_used"]
        async for one in pages(sidecar.data, "/api/v1/recovery/scopes/inc-1", "scopes")
    }
    lost = [scope for scope in scopes if listed[scope] != used[scope]]
    check(not lost, f"{len(lost)} scopes have lost attempts")


def _at_rest(stage: Stage, check: Callable[[bool, str], None]) -> None:
    verified = command("log", "verify", "--config", stage.sidecar.config)
    check(verified.returncode == 0, f"log verify: {verified.returncode} {verified.stderr[-300:]}")
    with closing(sqlite3.connect(f"file:{stage.store}?mode=ro", uri=True)) as database:
        found = [line for (line,) in database.execute("PRAGMA integrity_check")]
    check(found == ["ok"], f"integrity_check: {found[:2]}")


async def everything(options: argparse.Namespace, findings: Findings) -> list[list[str]]:
    rows = [
        [
            "fault",
            "attempts",
            "executed",
            "answers",
            "off after",
            "on after",
            "how",
            "passing ms: quiet / fault / most",
        ]
    ]
    for fault in faults():
        if options.only and not any(fault.name.startswith(name) for name in options.only):
            continue
        folder = Path(tempfile.mkdtemp(prefix="store-faults-"))
        before = len(findings.found)
        try:
            rows.append(await suffer(fault, options.attempts, folder, findings))
        except Exception as exc:
            findings.found.append(f"{fault.name}: broke off: {exc!r}")
        finally:
            fault.clean()
        if len(findings.found) == before:
            shutil.rmtree(folder)
        else:
            print(f"{fault.name}: kept {folder}", file=sys.stderr, flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--attempts", type=int, default=1000, help="under each fault (default: 1000)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="faults whose names begin so")
    parser.add_argument("--quick", action="store_true", help="100 attempts")
    parser.add_argument("--hold", metavar="FILE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.hold is not None:
        hold(options.hold)
        return 0
    if options.quick:
        options.attempts = min(100, options.attempts)
    raise_on_sigterm()
    findings = Findings()
    begun = time.monotonic()
    rows = asyncio.run(everything(options, findings))
    print()
    table(rows)
    print(f"\n{(time.monotonic() - begun) / 60:.1f} minutes")
    return findings.report("no execution under any fault; readiness went off, and came back")


if __name__ == "__main__":
    sys.exit(main())
