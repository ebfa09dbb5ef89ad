"""A backup is of one moment, verified, and there whole or not at all; the footprint is what the disk says."""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import astuple, replace
from pathlib import Path

import pytest

from sidecar.core.command import Issued, Refuse
from sidecar.errors import LogTampered, Refusal, StoreUnavailable
from sidecar.files.signing import SigningKey
from sidecar.ids import new_decision_id
from sidecar.store import backup
from sidecar.store._migrate import migrations
from sidecar.store.attestation import Attestation, Attested
from sidecar.store.backup import PAGES, THIRD, back_up
from sidecar.store.base import Footprint
from sidecar.store.batch import Store
from sidecar.store.verify import verify_sqlite
from tests.store.conftest import OpenStore, admit, issue
from tests.support import Clock

HOUR = 3_600.0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """Where the backup goes: into a folder that holds nothing else."""
    (tmp_path / "backup").mkdir()
    return tmp_path / "backup" / "copy.db"


@pytest.fixture
async def beside(open_store: OpenStore, path: Path) -> Path:
    """The database of an open store, with an admission among its two records."""
    store = await open_store(path)
    reply = await store.submit(issue())
    assert isinstance(reply, Issued)
    await store.submit(admit(reply.scope.scope_id))
    return path


@pytest.fixture
async def closed(open_store: OpenStore, path: Path) -> Path:
    """The database of a closed store, with four records."""
    store = await open_store(path)
    await record(store, 4)
    await store.close()
    return path


@pytest.fixture
async def big(open_store: OpenStore, path: Path) -> Path:
    """A closed one whose copying takes several steps."""
    store = await open_store(path)
    await record(store, 60, reason="x" * 200_000)
    await store.close()
    assert steps_of(path) > 2
    return path


async def record(store: Store, count: int, *, reason: str = "x") -> None:
    for _ in range(count):
        await store.submit(Refuse(decision_id=new_decision_id(), refusal=Refusal("invalid_request", reason)))


def rows(path: Path) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute("SELECT * FROM decisions ORDER BY seq").fetchall()


def bytes_of(path: Path) -> int:
    """The bytes that a database says it has."""
    with closing(sqlite3.connect(path)) as connection:
        (count,) = connection.execute("PRAGMA page_count").fetchone()
        (size,) = connection.execute("PRAGMA page_size").fetchone()
    return int(count * size)


def steps_of(path: Path) -> int:
    """How many steps its copying takes."""
    return -(-bytes_of(path) // (4_096 * PAGES))


def refusal(source: Path, target: Path, *, replace: bool = False) -> str:
    before = sorted(target.parent.iterdir())
    with pytest.raises(StoreUnavailable) as caught:
        back_up(source, target, replace=replace)
    assert sorted(target.parent.iterdir()) == before, "something was left behind"
    return str(caught.value)


def verdict(source: Path, target: Path, attestation: Attestation | None = None) -> str:
    with pytest.raises(LogTampered) as caught:
        back_up(source, target, attestation=attestation or Attestation())
    assert list(target.parent.iterdir()) == [], "something was left behind"
    return str(caught.value)


# The copy -----------------------------------------------------------------------------------------------


def test_a_backup_beside_an_open_store_holds_every_record_to_the_byte(beside: Path, target: Path) -> None:
    made = back_up(beside, target)
    assert made.verified.records == 2
    assert rows(target) == rows(beside)
    assert target.stat().st_mode & 0o777 == 0o600
    assert list(target.parent.iterdir()) == [target]
    assert target.read_bytes()[18:20] == b"\x01\x01", "in WAL mode it would take a second file"
    assert made.size == target.stat().st_size == bytes_of(target)
    assert verify_sqlite(target) == made.verified
    assert list(target.parent.iterdir()) == [target], "verifying it makes nothing beside it either"


def test_a_backup_of_a_store_that_nobody_has_open_is_the_same(closed: Path, target: Path) -> None:
    assert back_up(closed, target).verified.records == 4
    assert rows(target) == rows(closed)


def test_what_a_killed_sidecar_left_in_the_wal_is_in_the_backup(
    beside: Path, target: Path, tmp_path: Path
) -> None:
    crashed = tmp_path / "crashed.db"
    for suffix in ("", "-wal"):  # as they stand, with nobody to write the WAL back
        shutil.copyfile(f"{beside}{suffix}", f"{crashed}{suffix}")
    assert crashed.stat().st_size < os.stat(f"{crashed}-wal").st_size
    assert back_up(crashed, target).verified.records == 2


def test_a_writer_that_commits_all_the_time_never_has_it_begin_anew(big: Path, target: Path) -> None:
    begun, done = threading.Event(), threading.Event()
    commits = 0

    def write() -> None:
        nonlocal commits
        begun.wait()
        with closing(sqlite3.connect(big, isolation_level=None)) as connection:
            connection.execute("PRAGMA wal_autocheckpoint = 20")
            while not done.is_set():
                connection.execute("INSERT INTO switches VALUES (?, 0, 0)", (f"s{commits}",))
                commits += 1

    told: list[int] = []
    committed: list[int] = []

    def progress(so_far: int, total: int) -> None:
        begun.set()
        before, until = commits, time.monotonic() + 30
        while commits < before + 30 and time.monotonic() < until:
            time.sleep(0.001)
        told.append(so_far)
        committed.append(commits)
        assert len(told) < 100, "it begins anew for ever"

    writer = threading.Thread(target=write)
    writer.start()
    try:
        made = back_up(big, target, progress=progress)
    finally:
        begun.set()
        done.set()
        writer.join()
    steps = steps_of(target)
    copying = told[:steps]
    assert copying == sorted(copying), "it went back"
    assert copying[-1] == THIRD
    assert committed[steps - 1] - committed[0] >= 30 * (steps - 1), "there was no commit between steps"
    # The writer began after the first step. So nothing of it may be there, and the copy verifies.
    assert made.verified.records == 60
    with closing(sqlite3.connect(target)) as copy, closing(sqlite3.connect(big)) as source:
        assert copy.execute("SELECT COUNT(*) FROM switches").fetchone() == (0,)
        assert source.execute("SELECT COUNT(*) FROM switches").fetchone() == (commits,)


def test_progress_goes_from_the_first_page_to_the_last_record(big: Path, target: Path) -> None:
    told: list[tuple[int, int]] = []
    back_up(big, target, progress=lambda done, total: told.append((done, total)))
    assert told == sorted(told)
    assert told[steps_of(big) - 1] == (THIRD, 3 * THIRD)
    assert told[-2:] == [(2 * THIRD, 3 * THIRD), (3 * THIRD, 3 * THIRD)]


async def test_a_backup_of_an_older_schema_stays_of_that_schema(
    open_store: OpenStore, path: Path, target: Path
) -> None:
    number, _, sql = migrations("sqlite")[0]
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(sql)
        connection.execute(f"PRAGMA user_version = {number}")
        connection.execute("INSERT INTO meta VALUES ('writer', 'old')")
        connection.commit()
    made = back_up(path, target)
    assert (made.verified.writer, made.verified.records) == ("old", 0)
    with closing(sqlite3.connect(target)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (number,)
    store = await open_store(target)
    await record(store, 1)
    assert store.durable.writer == "old"


async def test_a_store_goes_on_from_a_backup_where_its_records_end(
    open_store: OpenStore, closed: Path, target: Path
) -> None:
    made = back_up(closed, target)
    store = await open_store(target)
    assert (store.durable.seq, store.durable.hash) == (4, made.verified.head)
    await record(store, 3)
    await store.close()
    assert verify_sqlite(target).records == 7
    assert rows(target)[:4] == rows(closed)


# There whole or not at all ------------------------------------------------------------------------------


def test_a_record_that_was_altered_leaves_no_backup(closed: Path, target: Path) -> None:
    with closing(sqlite3.connect(closed)) as connection:
        connection.execute("DROP TRIGGER decisions_are_never_changed")
        connection.execute("UPDATE decisions SET decision_outcome = 'selected' WHERE seq = 3")
        connection.commit()
    found = verdict(closed, target)
    assert found == "record 3 was altered: column decision_outcome is not what its bytes say"


def test_records_that_a_checkpoint_attests_have_to_be_in_it(closed: Path, target: Path) -> None:
    writer = verify_sqlite(closed).writer
    checkpoint = SigningKey.generate().checkpoint(
        writer=writer, count=9, head=bytes(32), time="2026-01-01T00:00:00+00:00"
    )
    found = verdict(closed, target, Attestation(attested=[Attested(1, checkpoint)]))
    assert found.startswith("records 5 to 9 are missing from the end")


def test_a_damaged_database_is_named_and_never_its_copy(big: Path, target: Path) -> None:
    whole = big.read_bytes()
    for damaged in (
        whole[: len(whole) // 2],
        whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2),
        whole[:40_960] + bytes(40_960) + whole[81_920:],
        b"no database at all" * 1_000,
        b"",
    ):
        big.write_bytes(damaged)
        found = verdict(big, target)
        assert str(big) in found or found.startswith("record "), found
        assert str(target.parent) not in found


def damage_leaf(database: Path, table: str) -> None:
    """Spoil the content of a page of a table that is not in the log: verifying the log reads none of it."""
    with closing(sqlite3.connect(database)) as connection:
        (root,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", (table,)).fetchone()
        (size,) = connection.execute("PRAGMA page_size").fetchone()
    whole = bytearray(database.read_bytes())
    assert whole[(root - 1) * size] in (10, 13), "no leaf"
    whole[(root - 1) * size + 8 : root * size] = b"\xa5" * (size - 8)
    database.write_bytes(whole)


@pytest.mark.parametrize("table", ["scopes", "executions"])
def test_damage_outside_the_log_leaves_no_backup_and_the_old_one_stays(
    beside: Path, target: Path, tmp_path: Path, table: str
) -> None:
    back_up(beside, target)
    kept = target.read_bytes()
    damaged = tmp_path / "damaged.db"
    back_up(beside, damaged)
    damage_leaf(damaged, table)
    assert verify_sqlite(damaged).records == 2, "the log says nothing of it"
    with pytest.raises(LogTampered, match=re.escape(f"the copy of {damaged} is damaged: ")) as caught:
        back_up(damaged, target, replace=True)
    assert "\n" not in str(caught.value)
    assert target.read_bytes() == kept
    assert list(target.parent.iterdir()) == [target]


def test_an_execution_whose_scope_is_gone_leaves_no_backup(beside: Path, target: Path) -> None:
    with closing(sqlite3.connect(beside)) as connection:
        connection.execute("DELETE FROM scopes")  # with foreign keys off, as SQLite has them at first
        connection.commit()
    assert verify_sqlite(beside).records == 2, "the log says nothing of it"
    assert verdict(beside, target) == (
        f"the copy of {beside} is damaged: executions refers to a row of scopes that is not there"
    )


def test_a_source_whose_name_is_no_text_is_backed_up(closed: Path, target: Path) -> None:
    source = Path(os.fsdecode(os.fsencode(closed.parent) + b"/non\xff?%.db"))
    closed.rename(source)
    assert back_up(source, target).verified.records == 4


def test_a_source_that_is_not_there_is_told_as_such(path: Path, target: Path) -> None:
    assert refusal(path, target).startswith(f"there is no database {path};")
    assert not path.exists()


def test_a_schema_of_the_future_is_not_backed_up_unverified(closed: Path, target: Path) -> None:
    with closing(sqlite3.connect(closed)) as connection:
        connection.execute("PRAGMA user_version = 999")
    assert "verify with a newer sidecar" in refusal(closed, target)


def test_a_file_that_is_there_is_replaced_only_on_demand_and_by_a_verified_one(
    closed: Path, target: Path
) -> None:
    target.write_text("precious")
    assert refusal(closed, target) == f"{target} is there already; --force replaces it"
    assert target.read_text() == "precious"
    assert back_up(closed, target, replace=True).verified.records == 4
    assert verify_sqlite(target).records == 4
    kept = target.read_bytes()
    closed.write_bytes(closed.read_bytes()[:8_192])
    with pytest.raises(LogTampered):
        back_up(closed, target, replace=True)
    assert target.read_bytes() == kept


def test_a_link_is_replaced_and_not_what_it_leads_to(closed: Path, target: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("precious")
    target.symlink_to(other)
    assert "is there already" in refusal(closed, target)
    back_up(closed, target, replace=True)
    assert not target.is_symlink()
    assert other.read_text() == "precious"


def test_what_is_no_file_is_never_replaced(closed: Path, target: Path) -> None:
    target.mkdir()
    assert refusal(closed, target, replace=True) == f"{target} is no file that could be replaced"


def test_a_folder_that_is_not_there_is_not_made(closed: Path, tmp_path: Path) -> None:
    target = tmp_path / "none" / "copy.db"
    with pytest.raises(StoreUnavailable, match="No such file or directory"):
        back_up(closed, target)
    assert not target.parent.exists()


@pytest.mark.parametrize("suffix", ["-wal", "-journal"])
def test_a_wal_that_would_become_a_part_of_the_backup_is_refused(
    closed: Path, target: Path, suffix: str
) -> None:
    Path(f"{target}{suffix}").touch()
    assert refusal(closed, target).startswith(f"{target}{suffix} is there")


@pytest.mark.parametrize("moment", [1, THIRD, THIRD + 1, 2 * THIRD, 3 * THIRD])
def test_an_interrupted_backup_leaves_nothing(big: Path, target: Path, moment: int) -> None:
    def progress(done: int, total: int) -> None:
        if done >= moment:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        back_up(big, target, progress=progress)
    assert list(target.parent.iterdir()) == []


def test_a_disk_that_takes_no_more_leaves_nothing(big: Path, target: Path) -> None:
    program = """
        import resource, sys
        from pathlib import Path
        from sidecar.errors import StoreUnavailable
        from sidecar.store.backup import back_up
        resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, resource.RLIM_INFINITY))
        try:
            back_up(Path(sys.argv[1]), Path(sys.argv[2]))
        except StoreUnavailable as exc:
            print(exc)
        """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(big), str(target)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.stdout.startswith(f"cannot copy {big} into {target.parent}: disk I/O error"), ended
    assert "look at the disk, its free space and the file-size limit" in ended.stdout
    assert list(target.parent.iterdir()) == []


def test_a_disk_without_room_for_all_of_it_is_left_alone(
    big: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(target.parent)
    size = bytes_of(big)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=size - 1))
    assert refusal(big, target).startswith(f"the copy takes {size:,} bytes and {target.parent} has")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=size))
    assert back_up(big, target).size == size


# A WAL that cannot begin anew ---------------------------------------------------------------------------


@contextmanager
def growing(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection that never copies the WAL back, so that all it writes stays there."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA wal_autocheckpoint = 0")
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("INSERT INTO meta VALUES ('growing', '')")
        yield connection


def grow(connection: sqlite3.Connection, size: int) -> None:
    for _ in range(size // 1_000_000 + 1):
        connection.execute("UPDATE meta SET value = hex(randomblob(500000)) WHERE key = 'growing'")


@pytest.mark.parametrize("limit", ["what it may grow by", "half of what was free"])
def test_a_backup_gives_up_where_the_wal_of_its_source_grows_too_far(
    big: Path, target: Path, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage, size = shutil.disk_usage(target.parent), 4_000_000
    if limit == "what it may grow by":
        monkeypatch.setattr(backup, "WAL_GROWTH", size)
    else:
        small = {big.parent: usage._replace(free=size)}
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: small.get(folder, usage))
    with growing(big) as connection:
        grow(connection, 2 * size)
        back_up(big, target)  # what was there before is none of its doing
        kept = target.read_bytes()
        with pytest.raises(StoreUnavailable) as caught:
            back_up(big, target, replace=True, progress=lambda done, total: grow(connection, 2 * size))
    assert str(caught.value).startswith(f"{big}-wal has grown by ")
    assert target.read_bytes() == kept
    assert list(target.parent.iterdir()) == [target]


def test_a_copying_that_stands_still_meanwhile_is_told_by_another_thread(
    big: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backup, "WAL_GROWTH", 4_000_000)
    monkeypatch.setattr(backup, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(backup, "STANDSTILL_SECONDS", 0.3)
    told: list[str] = []
    hung = threading.Event()

    def on_hang(exc: StoreUnavailable) -> None:
        told.append(str(exc))
        hung.set()

    with growing(big) as connection:

        def stand_still(done: int, total: int) -> None:
            assert not hung.wait(0.6), "it stood still, but the WAL had not grown"
            grow(connection, 8_000_000)
            assert hung.wait(30)

        with pytest.raises(StoreUnavailable, match="has grown by"):
            back_up(big, target, progress=stand_still, hung=on_hang)
    assert len(told) == 1
    assert told[0].startswith(f"{big}-wal has grown by ")


# What a killed one leaves -------------------------------------------------------------------------------


def test_the_next_backup_removes_what_a_killed_one_left_and_nothing_that_is_held(
    big: Path, target: Path
) -> None:
    program = """
        import sys, time
        from pathlib import Path
        from sidecar.store.backup import back_up
        def stand_still(done, total):
            print("copying", flush=True)
            time.sleep(60)
        back_up(Path(sys.argv[1]), Path(sys.argv[2]), progress=stand_still)
        """
    other = target.with_name("other.db")
    foreign = target.parent / ".scopegate-backup-of-somebody"
    foreign.mkdir()
    (foreign / "precious").touch()
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), str(big), str(target)],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        text=True,
    ) as killed:
        try:
            assert killed.stdout is not None
            assert killed.stdout.readline() == "copying\n"
            (left,) = set(target.parent.iterdir()) - {foreign}
            assert left.stat().st_mode & 0o777 == 0o700
            back_up(big, other)
            assert (left / "copy.db").stat().st_size > 1_000_000, "it was at work"
        finally:
            killed.kill()
    assert (left / "copy.db").exists()
    back_up(big, other, replace=True)
    assert set(target.parent.iterdir()) == {other, foreign}
    assert (foreign / "precious").exists()


# The footprint ------------------------------------------------------------------------------------------


async def test_a_store_in_memory_has_no_footprint(open_store: OpenStore) -> None:
    store = await open_store(None)
    await record(store, 3)
    assert await store.engine.footprint(store.now()) == Footprint()


async def test_the_footprint_is_what_the_disk_says(open_store: OpenStore, path: Path) -> None:
    store = await open_store(path)
    await record(store, 30)
    found = await store.engine.footprint(store.now())
    assert found.size == os.stat(path).st_size
    assert found.wal_size == os.stat(f"{path}-wal").st_size
    assert found.wal_size
    disk = os.statvfs(path)
    assert found.free is not None
    assert abs(found.free - disk.f_bavail * disk.f_frsize) < 100_000_000


async def test_what_cannot_be_measured_takes_nothing_else_with_it(open_store: OpenStore, path: Path) -> None:
    store = await open_store(path)
    await record(store, 30)
    whole = await store.engine.footprint(store.now())
    assert None not in astuple(whole)
    os.rename(path, f"{path}.away")
    without = await store.engine.footprint(store.now())
    os.rename(f"{path}.away", path)
    assert replace(without, free=whole.free) == replace(whole, size=None)
    assert without.free is not None
    os.rename(path.parent, f"{path.parent}.away")
    gone = await store.engine.footprint(store.now())
    os.rename(f"{path.parent}.away", path.parent)
    assert gone == Footprint(growth_per_day=whole.growth_per_day)
    assert None not in astuple(await store.engine.footprint(store.now()))


async def grown(store: Store) -> int:
    grown = (await store.engine.footprint(store.now())).growth_per_day
    assert grown is not None
    return grown


async def test_growth_is_what_the_records_of_the_last_24_hours_take(
    open_store: OpenStore, path: Path, clock: Clock
) -> None:
    store = await open_store(path)
    assert await grown(store) == 0
    await record(store, 100, reason="x" * 10_000)
    first = await grown(store)
    assert 1_000_000 < first < 1_600_000
    clock.move(23 * HOUR)
    assert await grown(store) == first
    await record(store, 50, reason="x" * 10_000)
    assert first * 1.4 < await grown(store) < first * 1.6
    clock.move(2 * HOUR)  # the first hundred are older than a day now
    assert first * 0.4 < await grown(store) < first * 0.6
    await store.close()
    again = await open_store(path)
    assert first * 0.4 < await grown(again) < first * 0.6, "a restart forgets nothing"
    clock.move(24 * HOUR)
    assert await grown(again) == 0


async def test_a_nearly_empty_store_does_not_grow_by_what_an_empty_one_takes(
    open_store: OpenStore, path: Path
) -> None:
    store = await open_store(path)
    await record(store, 3)
    await store.close()
    assert os.stat(path).st_size > 100_000
    assert await grown(await open_store(path)) < 10_000


async def test_growth_counts_records_by_when_they_came_and_not_by_when_others_decided(
    open_store: OpenStore, path: Path
) -> None:
    store = await open_store(path)
    await record(store, 100, reason="x" * 10_000)
    before = await grown(store)
    await store.close()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("DROP TRIGGER decisions_are_never_changed")
        connection.execute("UPDATE decisions SET recorded_at = decided_at, decided_at = 1")
        connection.commit()
    assert await grown(await open_store(path)) == before > 1_000_000
