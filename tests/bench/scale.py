"""Measures the sidecar on a database of ten million scopes and twenty million records, against a small one.

    python -m tests.bench.scale build FOLDER    makes both databases, in about an hour; needs 40 GB of disk
    python -m tests.bench.scale run FOLDER      measures, in some minutes; the databases can be used again

Both databases are written by the sidecar's own migrations, decisions and rows, so `scopegate log verify`
accepts them. Every second scope has been executed once. The records are of the last thirty days.

`run` prints the throughput of gated requests on the big database divided by that on the small one, once with
requests that mostly use the latest scopes, and once with requests that use any scope alike. It also prints
what the start costs, and how long each kind of list page takes.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import shutil
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import click

from sidecar.core.command import Admit, Command, Issue, Reply, Settle
from sidecar.core.facts import Claims
from sidecar.core.instant import SECOND, iso_time
from sidecar.core.policy import ActionPolicy, PolicySet, RiskClass
from sidecar.core.scope import Scope
from sidecar.core.state import Names, State
from sidecar.ids import new_scope_id
from sidecar.store._changes import apply_all
from sidecar.store.base import Changes
from sidecar.store.connection import read_only_uri
from sidecar.store.sqlite import SqliteEngine
from tests.bench import load, targets
from tests.bench.processes import BenchError, two_cores
from tests.bench.targets import Rig, Target

SCOPES = 10_000_000
SMALL_SCOPES = 10_000
RECORDS_PER_SCOPE = 2  # on average: the grant of each, and two for the execution of every second one
BYTES_PER_SCOPE = 4_000  # of disk, with records, indexes and the WAL; rounded up
SCOPES_PER_BATCH = 1_000
SCOPES_PER_INCIDENT = 10
PERIOD_SECONDS = 30 * 86_400
TTL_SECONDS = 366 * 86_400
CONNECTIONS = 64
PREPARED = 20_000  # different requests that wrk sends in turn
RECENT_SCOPES = 1_000  # the mean age, in scopes, where the latest ones are used
PAGES = 20  # reads of each list page
POLICIES = PolicySet(revision="bench", actions={load.ACTION: ActionPolicy(risk=RiskClass.LOW, hold=100_000)})
BIG, SMALL = "big.db", "small.db"


# Building -----------------------------------------------------------------------------------------------


class Ids:
    """Ids of decisions as `sidecar.ids` makes them, for times in the past: UUIDv7, in ascending order."""

    def __init__(self) -> None:
        self._made = 0

    def at(self, micros: int) -> str:
        self._made += 1
        digits = f"{micros // 1000 << 80 | 0x7 << 76 | 0x2 << 62 | self._made:032x}"
        return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def commands(first: int, count: int, now: int, ids: Ids) -> Iterator[Command]:
    """The commands that grant scopes `first` and after it, and execute under every second one."""
    for number in range(first, first + count):
        incident_id = f"inc_{number // SCOPES_PER_INCIDENT}"
        scope = Scope(
            scope_id=new_scope_id(),
            tenant_id="default",
            incident_id=incident_id,
            allowed_actions=(load.ACTION,),
            max_cost=10**12,
            max_attempts=targets.ATTEMPTS,
            created_at=0,
            expires_at=0,
            intent="measure how the store grows",
            target_agents=(),
            created_by="bench",
        )
        yield Issue(decision_id=ids.at(now), scope=scope, ttl=TTL_SECONDS, policies=POLICIES)
        if number % 2:
            continue
        admission = ids.at(now)
        claims = Claims(
            scope_id=scope.scope_id,
            incident_id=incident_id,
            action=load.ACTION,
            parameters={"agent": "agent-17", "reason": "stuck for ten minutes", "retries": 3},
        )
        yield Admit(
            decision_id=admission,
            request_id=ids.at(now),
            claims=claims,
            policies=POLICIES,
            body_sha256="0" * 64,
        )
        yield Settle(decision_id=ids.at(now), admission_id=admission, outcome="answered", http_status=200)


async def build(file: Path, scopes: int, progress: Callable[[int], object]) -> None:
    """Makes a database of so many scopes. `progress` is called with the number of new ones."""
    ids, ends = Ids(), time.time_ns() // 1000
    engine = SqliteEngine(file)
    head = await engine.open()

    def decide(batch: Sequence[Command], now: int, state: State) -> Changes:
        nonlocal head
        replies: list[Reply] = []
        changes, head = apply_all(batch, state, head, now, replies)
        return changes

    try:
        for first in range(0, scopes, SCOPES_PER_BATCH):
            count = min(SCOPES_PER_BATCH, scopes - first)
            now = ends - (scopes - first) * PERIOD_SECONDS * SECOND // scopes
            batch = list(commands(first, count, now, ids))
            await engine.transact(Names(), partial(decide, batch, now), durable=False)
            await engine.tidy()
            progress(count)
    finally:
        await engine.close()


def build_all(folder: Path, scopes: int, small: int) -> None:
    """Raises BenchError if the disk is too small or a database is there already."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    needed = (scopes + small) * BYTES_PER_SCOPE
    if free < needed:
        raise BenchError(f"{folder} has {free / 1e9:.1f} GB free; {needed / 1e9:.1f} GB are needed")
    for name, count in ((SMALL, small), (BIG, scopes)):
        file = folder / name
        if file.exists():
            raise BenchError(f"{file} is there already; remove it, or name another folder")
        making = file.with_suffix(".making")
        for left in (making, Path(f"{making}-wal"), Path(f"{making}-shm")):
            left.unlink(missing_ok=True)
        with click.progressbar(length=count, label=f"{count:,} scopes", file=sys.stderr) as bar:
            asyncio.run(build(making, count, bar.update))
        making.rename(file)
        Path(f"{making}.lock").unlink(missing_ok=True)  # of the store that has written it
        print(f"{file}: {file.stat().st_size / 1e9:.2f} GB")


# Running ------------------------------------------------------------------------------------------------


class Opened(NamedTuple):
    """A database that a sidecar serves, what its start cost, and the requests against it."""

    target: Target
    start_cpu_seconds: float
    requests: dict[str, list[load.Request]]


def requests(file: Path, prepared: int) -> dict[str, list[load.Request]]:
    """Gated requests under the latest scopes mostly, and under all scopes alike."""
    chosen = random.Random(1)
    with sqlite3.connect(read_only_uri(file), uri=True) as connection:
        (last,) = connection.execute("SELECT MAX(seq) FROM scopes").fetchone()

        def request(seq: int) -> load.Request:
            named = connection.execute("SELECT scope_id, incident_id FROM scopes WHERE seq = ?", (seq,))
            return load.Request(targets.JSON_TYPE, load.body(*named.fetchone()))

        ages = (int(chosen.expovariate(1 / RECENT_SCOPES)) for _ in range(prepared))
        return {
            "latest scopes": [request(max(1, last - age)) for age in ages],
            "any scope": [request(chosen.randint(1, last)) for _ in range(prepared)],
        }


def open_database(rig: Rig, file: Path, prepared: int, held: ExitStack) -> Opened:
    target = held.enter_context(targets.scopegate(rig, name=file.name, database=file.resolve()))
    return Opened(target, target.cpu_seconds(), requests(file, prepared))


def measure(rig: Rig, opened: Opened, kind: str, seconds: float) -> load.Load:
    return load.run(
        f"http://127.0.0.1:{opened.target.port}{load.GATED_TARGET}",
        opened.requests[kind],
        connections=CONNECTIONS,
        seconds=seconds,
        core=rig.cores.load,
        folder=rig.folder,
    )


def pages(file: Path) -> list[str]:
    """The path and query of each kind of list page, with values from the middle of the database."""
    with sqlite3.connect(read_only_uri(file), uri=True) as connection:
        (middle,) = connection.execute("SELECT MAX(seq) / 2 FROM decisions").fetchone()
        decided_at, scope_id, incident_id, request_id = connection.execute(
            "SELECT decided_at, scope_id, incident_id, request_id FROM decisions "
            "WHERE seq >= ? AND request_id IS NOT NULL ORDER BY seq LIMIT 1",
            (middle,),
        ).fetchone()
    since = quote(iso_time(decided_at))
    decisions, executions, scopes = "/api/v1/decisions", "/api/v1/executions", "/api/v1/scopes"
    return [
        f"{decisions}?limit=100",
        f"{decisions}?limit=100&before={middle}",
        f"{decisions}?limit=100&event=settled",
        f"{decisions}?limit=100&event=refused",
        f"{decisions}?limit=100&type=policy&outcome=selected",
        f"{decisions}?limit=100&tenant_id=default",
        f"{decisions}?limit=100&scope_id={scope_id}",
        f"{decisions}?limit=100&incident_id={incident_id}",
        f"{decisions}?limit=100&request_id={request_id}",
        f"{decisions}?limit=100&run_id=none",
        f"{decisions}?limit=100&action={load.ACTION}",
        f"{decisions}?limit=100&action=none",
        f"{decisions}?limit=100&since={since}",
        f"{executions}?limit=100",
        f"{executions}?limit=100&status=unknown",
        f"{executions}?limit=100&incident_id={incident_id}",
        f"{executions}?limit=100&action=none",
        f"{executions}?limit=100&since={since}",
        f"{scopes}?limit=100",
        f"{scopes}?limit=100&incident_id={incident_id}",
        f"{scopes}?limit=100&status=exhausted",
        f"{scopes}?limit=100&tenant_id=none",
    ]


def page_times(admin: int, path: str) -> tuple[float, float]:
    """The first and the median time of a page, in milliseconds."""
    taken = []
    for _ in range(PAGES):
        begun = time.perf_counter()
        status, answer = load.ask(admin, "GET", path)
        taken.append((time.perf_counter() - begun) * 1000)
        if status != 200:
            raise BenchError(f"{path} was answered with {status}: {answer}")
    return taken[0], statistics.median(taken)


def run(rig: Rig, folder: Path, *, seconds: float, pairs: int, prepared: int = PREPARED) -> None:
    """Prints what the two databases of a folder cost, in turn. Raises BenchError."""
    for name in (SMALL, BIG):
        if not (folder / name).exists():
            raise BenchError(f"{folder / name} is missing; `scale build {folder}` makes it")
    with targets.backend(rig), ExitStack() as held:
        small, big = (open_database(rig, folder / name, prepared, held) for name in (SMALL, BIG))
        for name, each in ((SMALL, small), (BIG, big)):
            size = (folder / name).stat().st_size / 1e9
            (program,) = each.target.programs
            started = f"{program.start_seconds:.2f} s and {each.start_cpu_seconds:.2f} s of CPU"
            print(f"{name}: {size:.2f} GB, ready after {started}")
        for kind in small.requests:
            _compare(rig, kind, small, big, seconds, pairs)
        print(f"\n{'first ms':>9}{'median ms':>10}  page of the big database (median ms of the small one)")
        for path, other in zip(pages(folder / BIG), pages(folder / SMALL), strict=True):
            first, median = page_times(big.target.admin, path)
            print(f"{first:9.1f}{median:10.1f}  {path} ({page_times(small.target.admin, other)[1]:.1f})")


def _compare(rig: Rig, kind: str, small: Opened, big: Opened, seconds: float, pairs: int) -> None:
    """Prints how one kind of requests does on both databases, measured in turn after a warm-up."""
    for each in (small, big):
        measure(rig, each, kind, seconds / 4)
    runs = [tuple(measure(rig, each, kind, seconds) for each in (small, big)) for _ in range(pairs)]
    ratios = sorted(right.requests / right.seconds * left.seconds / left.requests for left, right in runs)
    p99 = [statistics.median(each[side].p99 for each in runs) / 1000 for side in (0, 1)]
    print(
        f"{kind}: throughput ratio {statistics.median(ratios):.2f} [{ratios[0]:.2f}-{ratios[-1]:.2f}], "
        f"p99 with checkpoints {p99[0]:.1f} ms small, {p99[1]:.1f} ms big"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.scale",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    which = parser.add_subparsers(dest="command", required=True)
    for name in ("build", "run"):
        added = which.add_parser(name)
        added.add_argument("folder", type=Path)
        if name == "build":
            added.add_argument("--scopes", type=int, default=SCOPES, help=f"default: {SCOPES}")
            added.add_argument("--small", type=int, default=SMALL_SCOPES, help=f"default: {SMALL_SCOPES}")
        else:
            added.add_argument("--seconds", type=float, default=8, help="of one run (default: 8)")
            added.add_argument("--pairs", type=int, default=5, help="of runs (default: 5)")
    arguments = parser.parse_args()
    try:
        if arguments.command == "build":
            build_all(arguments.folder, arguments.scopes, arguments.small)
            return 0
        with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="work-") as work:
            rig = Rig(Path(work).resolve(), two_cores())
            os.sched_setaffinity(0, {rig.cores.load})
            run(rig, arguments.folder, seconds=arguments.seconds, pairs=arguments.pairs)
    except BenchError as exc:
        print(exc, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
