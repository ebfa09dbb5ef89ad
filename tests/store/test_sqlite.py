"""What only a file can suffer: two owners, a move, a full disk, a newer schema, a long log."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from sidecar.core.command import Admitted, Denied, Issued, Refuse, Report, Settle, Settled
from sidecar.core.policy import Brake, Rule
from sidecar.core.principal import Principal
from sidecar.core.scope import Scope
from sidecar.core.state import Names, State
from sidecar.errors import Refusal, StoreUnavailable
from sidecar.ids import new_decision_id
from sidecar.store import batch
from sidecar.store._migrate import migrations
from sidecar.store.base import Changes, ExecutionsWanted
from sidecar.store.batch import Store
from sidecar.store.connection import in_thread
from sidecar.store.sqlite import SqliteEngine
from sidecar.store.verify import verify_sqlite
from tests.store.conftest import OpenStore, admit, issue
from tests.support import POLICIES, Clock, eventually

ROOT = Path(__file__).parents[2]


def engine_of(store: Store) -> SqliteEngine:
    assert isinstance(store.engine, SqliteEngine)
    return store.engine


async def with_writer(store: Store, function: Callable[[sqlite3.Connection], Any]) -> Any:
    writer = engine_of(store)._writer
    assert writer is not None
    return await in_thread(writer, function)


async def issued(store: Store, **terms: Any) -> Scope:
    reply = await store.submit(issue(**terms))
    assert isinstance(reply, Issued)
    return reply.scope


def bytes_of(path: Path) -> bytes:
    return path.read_bytes()


def write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


@pytest.fixture
async def store(open_store: OpenStore, path: Path) -> Store:
    return await open_store(path)


# One owner ----------------------------------------------------------------------------------------------


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


async def test_a_second_process_is_kept_out_and_told_the_pid(store: Store, path: Path) -> None:
    second = await asyncio.to_thread(
        run_python,
        """
        import asyncio, sys
        from pathlib import Path
        from sidecar.errors import StoreUnavailable
        from sidecar.store.sqlite import SqliteEngine
        async def main():
            engine = SqliteEngine(Path(sys.argv[1]))
            try:
                await engine.open()
            except StoreUnavailable as exc:
                print(exc)
        asyncio.run(main())
        """,
        path,
    )
    assert f"pid {os.getpid()}" in second.stdout, second.stderr
    assert str(path) in second.stdout
    await issued(store)


async def test_the_lock_goes_with_its_owner(open_store: OpenStore, path: Path) -> None:
    first = await open_store(path)
    with pytest.raises(StoreUnavailable, match="in use"):
        await open_store(path)
    await first.close()
    await issued(await open_store(path))


async def test_nobody_but_the_owner_reads_the_files(store: Store, path: Path) -> None:
    await issued(store)
    for suffix in ("", "-wal", ".lock"):
        assert os.stat(f"{path}{suffix}").st_mode & 0o077 == 0, suffix


# Over restarts ------------------------------------------------------------------------------------------


async def test_reopening_keeps_everything(open_store: OpenStore, path: Path) -> None:
    store = await open_store(path)
    scope = await issued(store, target_agents=("a", "b"), intent="Überblick")
    reply = await store.submit(admit(scope.scope_id, target_agents=("b",)))
    assert isinstance(reply, Admitted)
    await store.close()
    again = await open_store(path)
    assert await again.engine.scope(scope.scope_id) == reply.scope
    assert await again.engine.execution(reply.execution.decision_id) == reply.execution
    await issued(again)
    verified = verify_sqlite(path)
    assert verified.records == 3


async def test_the_clock_of_the_last_record_survives_a_restart(
    open_store: OpenStore, path: Path, clock: Clock
) -> None:
    store = await open_store(path)
    await issued(store)
    await store.close()
    clock.move(-100)
    again = await open_store(path)
    assert 99 < again.clock_lag_seconds() < 101


async def test_a_newer_schema_is_refused_and_left_alone(open_store: OpenStore, path: Path) -> None:
    await (await open_store(path)).close()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 999")
    before = bytes_of(path)
    with pytest.raises(StoreUnavailable, match="version 999"):
        await open_store(path)
    assert bytes_of(path) == before


async def test_executions_of_the_second_schema_are_kept_settled_and_counted_by_brakes(
    open_store: OpenStore, path: Path, tmp_path: Path
) -> None:
    store = await open_store(path)
    scope = await issued(store)
    admissions = [
        admit(scope.scope_id),
        replace(admit(scope.scope_id, target_agents=("agent_1",)), principal=Principal(id="ann")),
    ]
    for command in admissions:
        assert isinstance(await store.submit(command), Admitted)
    await store.close()
    old = tmp_path / "old.db"
    with closing(sqlite3.connect(old, isolation_level=None)) as connection:
        for number, _, sql in migrations("sqlite")[:2]:
            connection.executescript(f"BEGIN;\n{sql}\nPRAGMA user_version = {number};\nCOMMIT;")
        connection.execute(f"ATTACH '{path}' AS new")
        for table in ("meta", "scopes", "executions", "decisions"):
            columns = ", ".join(row[1] for row in connection.execute(f"PRAGMA main.table_info({table})"))
            connection.execute(f"INSERT INTO main.{table} ({columns}) SELECT {columns} FROM new.{table}")
    migrated = await open_store(old)
    first, second = (command.decision_id for command in admissions)
    settled = await migrated.submit(
        Settle(decision_id=new_decision_id(), admission_id=first, outcome="answered")
    )
    assert isinstance(settled, Settled)
    kept = await migrated.engine.execution(second)
    assert kept is not None
    assert (kept.scope_id, kept.attempt_number, kept.status) == (scope.scope_id, 2, "in_flight")
    assert (kept.principal, kept.target_agents) == ("ann", ("agent_1",))
    brake = Rule(
        id="brake", on="execute", brake=Brake(per=("incident_id",), max_attempts=2, window_seconds=60)
    )
    braked = await migrated.submit(replace(admit(scope.scope_id), policies=replace(POLICIES, rules=(brake,))))
    assert isinstance(braked, Denied)
    assert braked.refusal.code == "braked"
    await migrated.close()
    assert verify_sqlite(old).records == 5


async def test_executions_of_an_older_release_are_answered_or_lost_and_take_no_report(
    open_store: OpenStore, tmp_path: Path
) -> None:
    old = tmp_path / "old.db"
    with closing(sqlite3.connect(old, isolation_level=None)) as connection:
        for number, _, sql in migrations("sqlite")[:3]:
            connection.executescript(f"BEGIN;\n{sql}\nPRAGMA user_version = {number};\nCOMMIT;")
        for number, status in enumerate(("in_flight", "answered", "unknown", "executed")):
            connection.execute(
                "INSERT INTO executions VALUES (?, NULL, 't', 'i', 'a', 'r', NULL, 5, 9, ?, NULL, NULL, 200, "
                "'why', 'ann', '[\"x\"]')",
                (f"0196000{number}-0000-7000-8000-000000000000", status),
            )
    migrated = await open_store(old)
    found = (await migrated.engine.executions(ExecutionsWanted(), before=None, limit=10)).rows
    assert [each.status for each in found] == ["executed", "unknown", "answered", "in_flight"]
    for each in found:
        assert (each.tenant_id, each.hold, each.admitted_at, each.http_status) == ("t", 5, 9, 200)
        assert (each.cause, each.principal, each.target_agents) == ("why", "ann", ("x",))
        assert (each.route, each.report_token, each.report_by) == (None, None, None)
        reply = await migrated.submit(
            Report(
                decision_id=new_decision_id(),
                admission_id=each.decision_id,
                token_sha256=bytes(32),
                outcome="succeeded",
            )
        )
        assert isinstance(reply, Denied)
        assert reply.refusal.code == "completion_refused"
    assert await migrated.engine.running_executions() == (0, None)


async def test_what_is_no_database_is_refused(open_store: OpenStore, path: Path) -> None:
    write(path, b"this is a diary, not a database " * 200)
    with pytest.raises(StoreUnavailable, match=r"cannot open|not a database"):
        await open_store(path)


async def test_a_folder_that_cannot_be_made_is_named(open_store: OpenStore, tmp_path: Path) -> None:
    write(tmp_path / "file", b"")
    with pytest.raises(StoreUnavailable, match="file"):
        await open_store(tmp_path / "file" / "store.db")


# Durability ---------------------------------------------------------------------------------------------


async def test_only_a_batch_of_settlements_may_be_lost_on_power_failure(store: Store) -> None:
    seen: list[tuple[str, int]] = []
    engine = engine_of(store)
    transact = engine.transact

    async def observed(names: Names, decide: Callable[[State], Changes], *, durable: bool) -> None:
        def deciding(state: State) -> Changes:
            writer = engine._writer
            assert writer is not None
            (level,) = writer._conn.execute("PRAGMA synchronous").fetchone()
            changes = decide(state)
            seen.append(("+".join(row.entry.event for row in changes.log), level))
            return changes

        await transact(names, deciding, durable=durable)

    def settle(reply: object) -> Settle:
        assert isinstance(reply, Admitted)
        return Settle(
            decision_id=new_decision_id(), admission_id=reply.execution.decision_id, outcome="answered"
        )

    full, normal = 2, 1
    with mock.patch.object(engine, "transact", observed):
        scope = await issued(store)
        one = await store.submit(admit(scope.scope_id))
        two = await store.submit(admit(scope.scope_id))
        await store.submit(settle(one))
        await asyncio.gather(store.submit(settle(two)), store.submit(admit(scope.scope_id)))
        await store.submit(Refuse(decision_id=new_decision_id(), refusal=Refusal("invalid_request", "x")))
    assert seen == [
        ("issued", full),
        ("admitted", full),
        ("admitted", full),
        ("settled", normal),
        ("settled+admitted", full),
        ("refused", full),
    ]


# A database that is no longer where it was --------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", "-wal"])
async def test_a_file_that_is_moved_stops_the_store_until_it_is_back(
    store: Store, path: Path, suffix: str
) -> None:
    scope = await issued(store, max_attempts=9)
    name = Path(f"{path}{suffix}")
    away = Path(f"{path}.away")
    os.rename(name, away)
    for _ in range(2):
        with pytest.raises(StoreUnavailable, match="moved") as caught:
            await store.submit(admit(scope.scope_id))
        assert str(name) in str(caught.value)
    with pytest.raises(StoreUnavailable, match="moved"):
        await store.check()
    os.rename(away, name)
    await store.check()
    reply = await store.submit(admit(scope.scope_id))
    assert isinstance(reply, Admitted)
    assert reply.execution.attempt_number == 1
    assert verify_sqlite(path).records == 2


@pytest.mark.parametrize("suffix", ["", "-wal"])
async def test_a_file_that_is_unlinked_or_replaced_stops_the_store(
    store: Store, path: Path, suffix: str
) -> None:
    scope = await issued(store)
    name = Path(f"{path}{suffix}")
    copy = bytes_of(name)
    os.unlink(name)
    with pytest.raises(StoreUnavailable, match="moved"):
        await store.submit(admit(scope.scope_id))
    write(name, copy)
    with pytest.raises(StoreUnavailable, match="replaced"):
        await store.submit(admit(scope.scope_id))


async def test_a_symbolic_link_to_another_database_is_noticed(store: Store, path: Path) -> None:
    scope = await issued(store)
    os.rename(path, f"{path}.real")
    os.symlink(f"{path}.real", path)  # the same file by another way is still the same file
    assert isinstance(await store.submit(admit(scope.scope_id)), Admitted)


# A disk that is full ------------------------------------------------------------------------------------


async def test_a_full_database_stops_the_store_until_there_is_room(store: Store) -> None:
    scope = await issued(store, max_attempts=1000, max_cost=10**12)
    unlimited = (await with_writer(store, lambda c: c.execute("PRAGMA max_page_count").fetchone()))[0]
    await with_writer(store, lambda c: c.execute("PRAGMA max_page_count = 1").fetchone())
    with pytest.raises(StoreUnavailable, match="full"):
        await asyncio.gather(*(store.submit(admit(scope.scope_id)) for _ in range(500)))
    assert store.last_error is not None
    await with_writer(store, lambda c: c.execute(f"PRAGMA max_page_count = {unlimited}").fetchone())
    before = await store.engine.scope(scope.scope_id)
    assert before is not None
    reply = await store.submit(admit(scope.scope_id))
    assert isinstance(reply, Admitted)
    assert reply.execution.attempt_number == before.attempts_used + 1


async def test_a_limit_on_the_size_of_files_stops_the_store_and_it_recovers(path: Path) -> None:
    finished = await asyncio.to_thread(
        run_python,
        """
        import asyncio, os, resource, sys, time
        from pathlib import Path
        from sidecar.core.command import Admitted
        from sidecar.errors import StoreUnavailable
        from sidecar.store.batch import Store
        from sidecar.store.sqlite import SqliteEngine
        from sidecar.store.verify import verify_sqlite
        from tests.store.conftest import admit, issue
        async def main():
            path = Path(sys.argv[1])
            store = Store(SqliteEngine(path), clock=lambda: time.time_ns() // 1000, deadline_seconds=5)
            await store.open()
            scope = (await store.submit(issue(max_attempts=1000, max_cost=10**12))).scope
            limit = os.stat(f"{path}-wal").st_size + 20_000
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            admitted, failure = 0, None
            while failure is None:
                try:
                    await store.submit(admit(scope.scope_id))
                    admitted += 1
                except StoreUnavailable as exc:
                    failure = exc
            try:
                await store.submit(admit(scope.scope_id))
            except StoreUnavailable:
                print("still full")
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            reply = await store.submit(admit(scope.scope_id))
            assert isinstance(reply, Admitted)
            assert reply.execution.attempt_number == admitted + 1, (reply.execution, admitted)
            await store.close()
            assert verify_sqlite(path).records == admitted + 2
            print("recovered after", failure)
        asyncio.run(main())
        """,
        path,
    )
    assert "still full" in finished.stdout, finished.stderr
    assert "recovered after SQLite:" in finished.stdout, finished.stderr


# A long log ---------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_the_wal_stays_bounded_over_20_000_admissions_while_somebody_reads(
    open_store: OpenStore, path: Path
) -> None:
    store = await open_store(path, deadline_seconds=60.0)
    scopes = [await issued(store, max_attempts=10**6, max_cost=10**15) for _ in range(8)]
    largest = pages = 0
    done = False

    async def read() -> None:
        nonlocal largest, pages
        before = None
        while not done:
            page = await store.engine.decisions({}, before=before, limit=100)
            before = page.next
            pages += 1
            largest = max(largest, (await store.engine.footprint(0)).wal_size or 0)
            await asyncio.sleep(0.002)

    async def admit_many(scope: Scope) -> None:
        for _ in range(2500 // 50):
            await asyncio.gather(*(store.submit(admit(scope.scope_id)) for _ in range(50)))

    reading = asyncio.create_task(read())
    await asyncio.gather(*(admit_many(scope) for scope in scopes))
    done = True
    await reading
    assert pages > 20
    assert ((await store.engine.footprint(0)).size or 0) > 10_000_000
    assert 0 < largest < 16_777_216, f"the WAL grew to {largest} bytes"
    assert (await asyncio.to_thread(verify_sqlite, path)).records == 20_008


async def test_the_settlement_that_had_to_wait_finds_its_execution_after_a_restart(
    open_store: OpenStore, path: Path
) -> None:
    store = await open_store(path)
    scope = await issued(store)
    reply = await store.submit(admit(scope.scope_id))
    assert isinstance(reply, Admitted)
    await store.close()
    again = await open_store(path)
    settle = Settle(
        decision_id=new_decision_id(), admission_id=reply.execution.decision_id, outcome="answered", cost=5
    )
    assert isinstance(await again.submit(settle), Settled)


async def test_a_store_that_hangs_does_not_hold_up_its_closing(tmp_path: Path) -> None:
    engine = SqliteEngine(tmp_path / "gate.db")
    store = Store(engine, clock=lambda: 1, deadline_seconds=0.1)
    await store.open()
    release = threading.Event()
    assert engine._writer is not None
    stuck = asyncio.ensure_future(in_thread(engine._writer, lambda _: release.wait()))
    with mock.patch.object(batch, "CLOSE_SECONDS", 0.1):
        assert not await store.close()
    release.set()
    await stuck
    await eventually(lambda: engine._writer is None)


async def test_a_head_that_cannot_be_read_closes_the_store_but_does_not_end_its_writer(
    tmp_path: Path,
) -> None:
    store = Store(SqliteEngine(tmp_path / "gate.db"), clock=lambda: 1, deadline_seconds=2)
    await store.open()
    with (
        mock.patch.object(store.engine, "head", side_effect=TypeError("no writer")),
        mock.patch.object(store.engine, "transact", side_effect=StoreUnavailable("gone")),
    ):
        for _ in range(2):
            with pytest.raises(StoreUnavailable):
                await store.submit(issue())
    assert isinstance(await store.submit(issue()), Issued)
    await store.close()


@pytest.mark.parametrize("size", [0, 4_096])
async def test_nothing_is_admitted_into_a_wal_that_was_cut_off(
    open_store: OpenStore, tmp_path: Path, size: int
) -> None:
    store = await open_store(tmp_path / "gate.db")
    scope = await issued(store, max_attempts=5)
    assert isinstance(await store.submit(admit(scope.scope_id)), Admitted)
    wal = tmp_path / "gate.db-wal"
    assert os.stat(wal).st_size > size
    os.truncate(wal, size)
    for _ in range(2):
        with pytest.raises(StoreUnavailable, match=r"cut off|SHORT_READ"):
            await store.submit(admit(scope.scope_id))


async def test_a_wal_that_another_program_has_emptied_by_a_checkpoint_is_used_on(
    open_store: OpenStore, tmp_path: Path
) -> None:
    store = await open_store(tmp_path / "gate.db")
    scope = await issued(store, max_attempts=5)
    database = tmp_path / "gate.db"
    program = "import sqlite3, sys; sqlite3.connect(sys.argv[1]).execute('PRAGMA wal_checkpoint(TRUNCATE)')"
    await asyncio.to_thread(subprocess.run, [sys.executable, "-c", program, str(database)], check=True)
    assert os.stat(f"{database}-wal").st_size == 0
    assert isinstance(await store.submit(admit(scope.scope_id)), Admitted)


@pytest.mark.parametrize(
    "table", ["BEFORE INSERT ON decisions", "BEFORE UPDATE ON scopes", "BEFORE INSERT ON executions"]
)
async def test_nothing_is_admitted_where_a_trigger_drops_a_row(
    open_store: OpenStore, tmp_path: Path, table: str
) -> None:
    store = await open_store(tmp_path / "gate.db")
    scope = await issued(store, max_attempts=5)
    trigger = f"CREATE TRIGGER stray {table} BEGIN SELECT RAISE(IGNORE); END"
    await with_writer(store, lambda connection: connection.execute(trigger))
    with pytest.raises(StoreUnavailable, match="triggers"):
        await store.submit(admit(scope.scope_id))
    await with_writer(store, lambda connection: connection.execute("DROP TRIGGER stray"))
    assert isinstance(await store.submit(admit(scope.scope_id)), Admitted)


async def test_a_log_that_lacks_records_is_still_measured_and_listed(
    open_store: OpenStore, tmp_path: Path, clock: Clock
) -> None:
    store = await open_store(tmp_path / "gate.db")
    since = clock()
    for _ in range(5):
        await issued(store)
    tampering = "DROP TRIGGER decisions_are_never_deleted; DELETE FROM decisions WHERE seq = 3"
    await with_writer(store, lambda connection: connection.executescript(tampering))
    assert (await engine_of(store).footprint(clock())).growth_per_day is not None
    page = await engine_of(store).decisions({}, since=since, before=None, limit=10)
    assert [row.seq for row in page.rows] == [5, 4, 2, 1]


@pytest.mark.parametrize("steps", range(6))
async def test_an_opening_that_is_cancelled_leaves_no_thread_behind(tmp_path: Path, steps: int) -> None:
    """A thread that outlived the event loop would print a traceback at the end of the program."""
    before = set(threading.enumerate())
    opening = asyncio.create_task(SqliteEngine(tmp_path / "gate.db").open())
    for _ in range(steps):
        await asyncio.sleep(0)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    await eventually(lambda: not set(threading.enumerate()) - before)
