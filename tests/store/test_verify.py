"""`verify` names the first record that is altered, missing or out of order, and reads beside a writer."""

from __future__ import annotations

import hashlib
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from sidecar.core.command import Admitted, Issued, Refuse, Settle
from sidecar.errors import LogTampered, Refusal, StoreUnavailable
from sidecar.ids import new_decision_id
from sidecar.store.verify import verify_sqlite
from tests.store.conftest import OpenStore, admit, issue

TEXTS = (
    "decision_id", "event", "decision_type", "decision_outcome", "tenant_id",
    "scope_id", "incident_id", "action", "request_id", "run_id", "admission_id",
)  # fmt: skip


@pytest.fixture
async def log(open_store: OpenStore, tmp_path: Path) -> Path:
    """A closed database of eight records; the fourth is an admission, the fifth its settlement."""
    path = tmp_path / "log.db"
    store = await open_store(path)
    for _ in range(2):
        await store.submit(Refuse(decision_id=new_decision_id(), refusal=Refusal("invalid_request", "x")))
    reply = await store.submit(issue())
    assert isinstance(reply, Issued)
    admitted = await store.submit(admit(reply.scope.scope_id))
    assert isinstance(admitted, Admitted)
    await store.submit(
        Settle(decision_id=new_decision_id(), admission_id=admitted.execution.decision_id, outcome="answered")
    )
    for _ in range(3):
        await store.submit(admit("scope_none"))
    await store.close()
    return path


def tamper(path: Path, *statements: str, parameters: tuple[Any, ...] = ()) -> None:
    """Write past the triggers, as somebody with the file in hand could."""
    with closing(sqlite3.connect(path)) as connection, connection:
        for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            connection.execute(f"DROP TRIGGER {name}")
        for statement in statements:
            connection.execute(statement, parameters)


def verdict(path: Path) -> str:
    with pytest.raises(LogTampered) as caught:
        verify_sqlite(path)
    return str(caught.value)


async def test_a_true_log_verifies_with_its_count_and_head(log: Path) -> None:
    done: list[tuple[int, int]] = []
    verified = verify_sqlite(log, lambda one, all_: done.append((one, all_)))
    assert verified.records == 8
    assert done[-1] == (8, 8)
    with closing(sqlite3.connect(log)) as connection:
        (head,) = connection.execute("SELECT hash FROM decisions WHERE seq = 8").fetchone()
    assert verified.head == head


async def test_it_works_beside_a_running_writer(open_store: OpenStore, tmp_path: Path) -> None:
    store = await open_store(tmp_path / "running.db")
    for _ in range(3):
        await store.submit(issue())
    assert verify_sqlite(tmp_path / "running.db").records == 3
    await store.submit(issue())


async def test_an_empty_log_verifies(open_store: OpenStore, tmp_path: Path) -> None:
    await (await open_store(tmp_path / "empty.db")).close()
    assert verify_sqlite(tmp_path / "empty.db").records == 0


@pytest.mark.parametrize("seq", [1, 4, 8])
@pytest.mark.parametrize("column", ["envelope", "hash"])
async def test_a_flipped_bit_is_found(log: Path, column: str, seq: int) -> None:
    with closing(sqlite3.connect(log)) as connection:
        (value,) = connection.execute(f"SELECT {column} FROM decisions WHERE seq = {seq}").fetchone()
    for place in (0, len(value) // 2, len(value) - 1):
        copy = shutil.copy(log, log.with_suffix(f".{place}"))
        flipped = bytearray(value)
        flipped[place] ^= 1
        tamper(
            Path(copy), f"UPDATE decisions SET {column} = ? WHERE seq = {seq}", parameters=(bytes(flipped),)
        )
        assert verdict(Path(copy)).startswith(f"record {seq} ")


@pytest.mark.parametrize("column", TEXTS)
@pytest.mark.parametrize("value", ["other", None])
async def test_an_altered_index_column_is_found(log: Path, column: str, value: str | None) -> None:
    with closing(sqlite3.connect(log)) as connection:
        info = connection.execute("PRAGMA table_info(decisions)").fetchall()
        old = connection.execute(f"SELECT {column} FROM decisions WHERE seq = 4").fetchone()[0]
    required = {row[1] for row in info if row[3]}
    if value is None and (column in required or old is None):
        value = ""
    tamper(log, f"UPDATE decisions SET {column} = ? WHERE seq = 4", parameters=(value,))
    told = verdict(log)
    assert told.startswith("record 4 ")
    assert column in told


@pytest.mark.parametrize("value", [0, 1, -1, 2**40, 2**62, -(2**62)])
async def test_an_altered_time_is_found(log: Path, value: int) -> None:
    tamper(log, f"UPDATE decisions SET decided_at = {value} WHERE seq = 4")
    assert verdict(log).startswith("record 4 ")


@pytest.mark.parametrize("seq", [1, 2, 7])
async def test_a_deleted_record_is_found(log: Path, seq: int) -> None:
    tamper(log, f"DELETE FROM decisions WHERE seq = {seq}")
    assert verdict(log).startswith(f"record {seq} is missing")


async def test_a_deleted_record_is_found_though_the_rest_moved_up(log: Path) -> None:
    tamper(
        log,
        "DELETE FROM decisions WHERE seq = 2",
        *(f"UPDATE decisions SET seq = {seq - 1} WHERE seq = {seq}" for seq in range(3, 9)),
    )
    assert verdict(log).startswith("record 2 ")


async def test_a_gap_is_found(log: Path) -> None:
    tamper(log, "UPDATE decisions SET seq = 100 WHERE seq = 8")
    assert verdict(log).startswith("record 8 is missing")


async def test_swapped_records_are_found(log: Path) -> None:
    tamper(
        log,
        "UPDATE decisions SET seq = 100 WHERE seq = 6",
        "UPDATE decisions SET seq = 6 WHERE seq = 7",
        "UPDATE decisions SET seq = 7 WHERE seq = 100",
    )
    assert verdict(log).startswith("record 6 ")


async def test_a_record_that_was_slipped_in_is_found(log: Path) -> None:
    columns = ", ".join(
        ("decision_id", "event", "decision_type", "decision_outcome", "decided_at", "tenant_id")
    )
    tamper(
        log,
        "UPDATE decisions SET seq = 100 WHERE seq = 8",
        f"INSERT INTO decisions (seq, {columns}, envelope, hash) "
        f"SELECT 8, 'mine', event, decision_type, decision_outcome, decided_at, tenant_id, envelope, hash "
        "FROM decisions WHERE seq = 7",
        "UPDATE decisions SET seq = 9 WHERE seq = 100",
    )
    assert verdict(log).startswith("record 8 ")


@pytest.mark.parametrize("seq", [0, -5])
async def test_a_record_that_was_put_before_the_first_is_found(log: Path, seq: int) -> None:
    columns = ", ".join(("event", "decision_type", "decision_outcome", "decided_at", "tenant_id"))
    tamper(
        log,
        f"INSERT INTO decisions (seq, decision_id, {columns}, envelope, hash) "
        f"SELECT {seq}, 'mine', {columns}, envelope, hash FROM decisions WHERE seq = 7",
    )
    assert "record 1 " in verdict(log)


def rehashed(path: Path, seq: int, change: Callable[[bytes], bytes]) -> None:
    """Alter the bytes of one record and make its own hash fit."""
    with closing(sqlite3.connect(path)) as connection:
        (previous,) = connection.execute("SELECT hash FROM decisions WHERE seq = ?", (seq - 1,)).fetchone()
        (envelope,) = connection.execute("SELECT envelope FROM decisions WHERE seq = ?", (seq,)).fetchone()
    altered = change(envelope)
    assert altered != envelope
    tamper(
        path,
        f"UPDATE decisions SET envelope = ?, hash = ? WHERE seq = {seq}",
        parameters=(altered, hashlib.sha256(previous + altered).digest()),
    )


async def test_an_altered_record_with_a_fitting_hash_breaks_the_next_link(log: Path) -> None:
    rehashed(
        log, 4, lambda envelope: envelope.replace(b'"principal":"anonymous"', b'"principal":"Anonymous"')
    )
    assert verdict(log).startswith("record 5 ")


@pytest.mark.parametrize(
    "garbage", [b"", b"{", b"null", b"[]", b"{}", b'{"record":{}}', b'{"record":1}', b"\xff\xfe"]
)
async def test_bytes_that_are_no_envelope_are_tampering_and_no_crash(log: Path, garbage: bytes) -> None:
    rehashed(log, 8, lambda envelope: garbage)
    assert verdict(log).startswith("record 8 ")


async def test_another_writers_name_is_found(log: Path) -> None:
    tamper(log, "UPDATE meta SET value = 'somebody' WHERE key = 'writer'")
    assert verdict(log).startswith("record 1 ")


async def test_a_writers_name_that_is_gone_is_found(log: Path) -> None:
    tamper(log, "DELETE FROM meta WHERE key = 'writer'")
    assert "writer" in verdict(log)


def test_what_is_not_there_or_no_database_cannot_be_verified(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable, match="no database"):
        verify_sqlite(tmp_path / "none.db")
    (tmp_path / "text.db").write_bytes(b"not a database at all, but a text " * 100)
    with pytest.raises(StoreUnavailable, match="cannot read"):
        verify_sqlite(tmp_path / "text.db")


def test_verifying_changes_nothing(log: Path) -> None:
    before = log.read_bytes()
    verify_sqlite(log)
    assert log.read_bytes() == before
