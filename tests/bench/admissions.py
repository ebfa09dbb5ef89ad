"""Group commit against one transaction each, in one run: admissions a second at N concurrent callers.

    python -m tests.bench.admissions [--folder /dev/shm] [--concurrency 64] [--seconds 5] [--only NAME --json]

Three ways to admit, on the same kind of file with the same schema, durability and core:
  plain aiosqlite       one transaction each, one awaited call a statement, as its documentation shows it
  one transaction each  this store, held to one command a transaction (one thread hop each)
  group commit          this store
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from unittest import mock

import aiosqlite

from sidecar.core.command import Admit, Admitted, Issue, Issued
from sidecar.core.facts import Claims
from sidecar.core.policy import ActionPolicy, PolicySet, RiskClass
from sidecar.core.scope import Scope
from sidecar.core.state import State
from sidecar.ids import new_decision_id, new_scope_id
from sidecar.store import _rows as rows
from sidecar.store import batch, sqlite
from sidecar.store._changes import apply_all
from sidecar.store.batch import Store
from sidecar.store.sqlite import SqliteEngine

POLICIES = PolicySet(revision="bench", actions={"retry_agent": ActionPolicy(risk=RiskClass.LOW, hold=1)})


def wall_clock() -> int:
    return time.time_ns() // 1000


def issue(number: int) -> Issue:
    return Issue(
        decision_id=new_decision_id(),
        ttl=3600,
        policies=POLICIES,
        scope=Scope(
            scope_id=new_scope_id(),
            tenant_id="default",
            incident_id=f"inc_{number}",
            allowed_actions=("retry_agent",),
            max_cost=10**12,
            max_attempts=10**9,
            created_at=0,
            expires_at=0,
            intent="measure the store",
            target_agents=(),
            created_by="bench",
        ),
    )


def admission(scope_id: str, incident_id: str) -> Admit:
    return Admit(
        decision_id=new_decision_id(),
        request_id=new_decision_id(),
        policies=POLICIES,
        body_sha256="0" * 64,
        claims=Claims(
            scope_id=scope_id,
            incident_id=incident_id,
            action="retry_agent",
            parameters={"agent": "a-17", "reason": "stuck", "retries": 3},
        ),
    )


async def measure(folder: Path, concurrency: int, seconds: float, max_batch: int) -> tuple[int, float]:
    """(admissions, seconds) with at most `max_batch` commands a transaction."""
    with mock.patch.object(batch, "MAX_BATCH", max_batch):
        store = Store(SqliteEngine(folder / f"bench-{max_batch}.db"), clock=wall_clock, deadline_seconds=30)
        await store.open()
        scopes = []
        for number in range(concurrency):
            issued = await store.submit(issue(number))
            assert isinstance(issued, Issued)
            scopes.append(issued.scope)
        begun = time.perf_counter()
        until = begun + seconds

        async def admit(scope: Scope, clock: Callable[[], float] = time.perf_counter) -> int:
            count = 0
            while clock() < until:
                reply = await store.submit(admission(scope.scope_id, scope.incident_id))
                assert isinstance(reply, Admitted), reply
                count += 1
            return count

        counts = await asyncio.gather(*(admit(scope) for scope in scopes))
        taken = time.perf_counter() - begun
        await store.close()
        return sum(counts), taken


async def measure_plain(folder: Path, concurrency: int, seconds: float) -> tuple[int, float]:
    """The same admissions written the usual way with aiosqlite."""
    engine = SqliteEngine(folder / "bench-plain.db")
    store = Store(engine, clock=wall_clock, deadline_seconds=30)
    await store.open()
    scope_ids = []
    for number in range(concurrency):
        issued = await store.submit(issue(number))
        assert isinstance(issued, Issued)
        scope_ids.append((issued.scope.scope_id, issued.scope.incident_id))
    head = await engine.head()
    await store.close()
    connection = await aiosqlite.connect(folder / "bench-plain.db", isolation_level=None)
    for pragma in ("synchronous = FULL", "foreign_keys = ON", "recursive_triggers = ON"):
        await connection.execute(f"PRAGMA {pragma}")
    turn = asyncio.Lock()  # one connection holds one transaction at a time
    begun = time.perf_counter()
    until = begun + seconds

    async def admit(scope_id: str, incident_id: str) -> int:
        nonlocal head
        count = 0
        while time.perf_counter() < until:
            command = admission(scope_id, incident_id)
            async with turn:
                await connection.execute("BEGIN IMMEDIATE")
                cursor = await connection.execute(
                    f"SELECT {rows.SCOPE_COLUMNS} FROM scopes WHERE scope_id = ?", (scope_id,)
                )
                row = await cursor.fetchone()
                assert row is not None
                state = State(scopes={scope_id: rows.scope_from_row(tuple(row))}, executions={})
                changes, head = apply_all([command], state, head, wall_clock(), [])
                await connection.execute(sqlite._UPDATE_SCOPE, rows.scope_counters(changes.scopes[0]))
                await connection.execute(sqlite._ADMIT_EXECUTION, rows.execution_to_row(changes.admitted[0]))
                await connection.execute(sqlite._APPEND, rows.log_to_row(changes.log[0]))
                await connection.execute("COMMIT")
            count += 1
        return count

    counts = await asyncio.gather(*(admit(*scope) for scope in scope_ids))
    taken = time.perf_counter() - begun
    await connection.close()
    return sum(counts), taken


async def main() -> None:
    ways: dict[str, Callable[[Path, int, float], Awaitable[tuple[int, float]]]] = {
        "plain aiosqlite": measure_plain,
        "one transaction each": partial(measure, max_batch=1),
        "group commit": partial(measure, max_batch=batch.MAX_BATCH),
    }
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", default="/dev/shm", help="where the databases are made (default: tmpfs)")
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--only", choices=ways, help="one of the three")
    parser.add_argument("--json", action="store_true", help="an object a line, for programs")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        rates: dict[str, float] = {}
        for name in [arguments.only] if arguments.only else ways:
            used = time.process_time()
            count, taken = await ways[name](Path(folder), arguments.concurrency, arguments.seconds)
            used = time.process_time() - used
            rates[name] = count / taken
            if arguments.json:
                print(json.dumps({"admissions": count, "seconds": taken, "cpu_seconds": used}))
            else:
                print(f"{name:22} {count:8d} admissions in {taken:.2f} s: {rates[name]:8.0f} a second")
        if len(rates) > 1 and not arguments.json:
            for name in ("plain aiosqlite", "one transaction each"):
                print(f"group commit makes {rates['group commit'] / rates[name]:.1f} times {name}")


if __name__ == "__main__":
    asyncio.run(main())
