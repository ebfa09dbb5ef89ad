"""`verify` names the first record that is altered, missing or out of order, and what else is not as it was
left: tables, triggers, switches, keys, bindings. It reads beside a writer."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import random
import shutil
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest

from sidecar.core.chain import GENESIS, link
from sidecar.core.command import (
    Admitted,
    Bind,
    Emit,
    Issued,
    Reconcile,
    Refuse,
    Revoke,
    Settle,
    Turn,
    Turned,
)
from sidecar.core.masking import Mask, pointer
from sidecar.core.record import CausalRole, DecisionOutcome, DecisionType, Record
from sidecar.errors import LogTampered, Refusal, StoreUnavailable
from sidecar.files.jsonvalue import dumps
from sidecar.files.signing import SigningKey
from sidecar.ids import new_decision_id
from sidecar.store._migrate import migrations
from sidecar.store.attestation import Attestation, Attested
from sidecar.store.export import exported
from sidecar.store.verify import verify_sqlite
from tests.store.conftest import OpenStore, admit, issue

TEXTS = (
    "decision_id",
    "event",
    "decision_type",
    "decision_outcome",
    "tenant_id",
    "scope_id",
    "incident_id",
    "action",
    "request_id",
    "run_id",
    "admission_id",
)


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


@contextmanager
def unguarded(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection to a log whose triggers are gone for the time being."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA synchronous = OFF")
        triggers = connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
        for name, _ in triggers:
            connection.execute(f"DROP TRIGGER {name}")
        yield connection
        for _, sql in triggers:
            connection.execute(sql)


def tamper(path: Path, *statements: str, parameters: tuple[Any, ...] = ()) -> None:
    """Write past the triggers, as somebody with the file in hand could, and put them back."""
    with unguarded(path) as connection:
        for statement in statements:
            connection.execute(statement, parameters)


def remodel(path: Path, *statements: str) -> None:
    """Change the schema, or whatever else no trigger keeps from being changed."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statement in statements:
            connection.execute(statement)


def rewrite(path: Path, name: str, change: Callable[[str], str]) -> None:
    """Give an object of the schema another text, past all that SQLite checks."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        (before,) = connection.execute("SELECT sql FROM sqlite_master WHERE name = ?", (name,)).fetchone()
        after = change(before)
        assert after != before
        connection.execute("PRAGMA writable_schema = ON")
        connection.execute("UPDATE sqlite_master SET sql = ? WHERE name = ?", (after, name))
        connection.execute("PRAGMA writable_schema = RESET")


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


@pytest.mark.parametrize("seq", [0, -5, -(2**63)])
async def test_a_record_that_was_put_before_the_first_is_found(log: Path, seq: int) -> None:
    columns = ", ".join(("event", "decision_type", "decision_outcome", "decided_at", "tenant_id"))
    tamper(
        log,
        f"INSERT INTO decisions (seq, decision_id, {columns}, envelope, hash) "
        f"SELECT {seq}, 'mine', {columns}, envelope, hash FROM decisions WHERE seq = 7",
    )
    assert verdict(log) == f"record {seq} was put before record 1"


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


def test_what_is_not_there_cannot_be_verified(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable, match="no database"):
        verify_sqlite(tmp_path / "none.db")


def test_what_is_no_database_any_more_is_tampering(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_bytes(b"not a database at all, but a text " * 100)
    assert "no log any more: file is not a database" in verdict(tmp_path / "text.db")


@pytest.mark.parametrize("table", ["decisions", "meta"])
async def test_a_table_that_is_gone_is_tampering(log: Path, table: str) -> None:
    remodel(log, f"ALTER TABLE {table} RENAME TO other")
    assert f"no such table: {table}" in verdict(log)


def test_verifying_changes_nothing(log: Path) -> None:
    before = log.read_bytes()
    verify_sqlite(log)
    assert log.read_bytes() == before


# What is kept beside the records -------------------------------------------------------------------------

VERSIONS = [number for number, _, _ in migrations("sqlite")]


def made_up_to(version: int) -> sqlite3.Connection:
    """A database in memory as the migrations up to a version make it."""
    connection = sqlite3.connect(":memory:", isolation_level=None)
    for number, _, sql in migrations("sqlite"):
        if number <= version:
            connection.executescript(f"{sql}\nPRAGMA user_version = {number};")
    return connection


def objects_of(version: int) -> list[tuple[str, str]]:
    with closing(made_up_to(version)) as connection:
        return connection.execute("SELECT type, name FROM sqlite_master WHERE sql IS NOT NULL").fetchall()


def as_of(version: int, log: Path) -> Path:
    """The same log as a release of that schema version would have left it."""
    old = log.with_suffix(f".{version}")
    with closing(made_up_to(version)) as connection:
        connection.execute(f"ATTACH '{log}' AS new")
        for table in ("meta", "decisions"):
            names = ", ".join(row[1] for row in connection.execute(f"PRAGMA main.table_info({table})"))
            connection.execute(f"INSERT INTO main.{table} SELECT {names} FROM new.{table}")
        connection.execute("DETACH new")
        connection.execute(f"VACUUM INTO '{old}'")
    return old


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_log_that_no_new_release_has_opened_yet_verifies(log: Path, version: int) -> None:
    old = as_of(version, log)
    assert verify_sqlite(old).records == 8
    remodel(old, "DROP TRIGGER decisions_are_never_deleted")
    assert verdict(old) == (
        f"the trigger decisions_are_never_deleted is missing: the schema is not that of version {version}"
    )


@pytest.mark.parametrize(("kind", "name"), [each for each in objects_of(VERSIONS[-1]) if each[0] != "table"])
async def test_a_trigger_an_index_or_a_view_that_is_gone_is_named(log: Path, kind: str, name: str) -> None:
    remodel(log, f"DROP {kind} {name}")
    assert verdict(log).startswith(f"the {kind} {name} is missing: the schema is not that of version ")


@pytest.mark.parametrize("table", ["scopes", "executions", "kept_once", "switches", "run_bindings"])
async def test_a_table_beside_the_log_that_is_gone_is_named(log: Path, table: str) -> None:
    remodel(log, f"ALTER TABLE {table} RENAME TO other")
    assert verdict(log).startswith(f"the table {table} is missing: ")


async def test_a_trigger_that_was_made_harmless_is_named(log: Path) -> None:
    remodel(
        log,
        "DROP TRIGGER decisions_are_never_changed",
        "CREATE TRIGGER decisions_are_never_changed BEFORE UPDATE ON decisions WHEN FALSE BEGIN"
        " SELECT RAISE(ABORT, 'the decision log is append-only'); END",
    )
    assert verdict(log).startswith("the trigger decisions_are_never_changed was altered: ")


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("decisions", " STRICT", ""),
        ("scopes", " CHECK (attempts_used BETWEEN 0 AND max_attempts)", ""),
        ("scopes", "max_attempts)", "max_attempts/* */OR 1)"),
        ("meta", "value TEXT NOT NULL", "value TEXT -- NOT NULL\n"),
        ("decisions_are_never_changed", "append-only", "append only"),
        ("decisions_are_never_changed", "the decision log", "the  decision log"),
        ("decisions_are_never_changed", "ABORT", "FAIL"),
        ("policy_decisions", "'denied'", "'allowed'"),
    ],
)
async def test_an_altered_text_in_the_schema_is_named(log: Path, name: str, before: str, after: str) -> None:
    rewrite(log, name, lambda sql: sql.replace(before, after))
    assert f" {name} was altered: " in verdict(log)


@pytest.mark.parametrize(
    ("kind", "statement"),
    [
        ("trigger", "AFTER INSERT ON decisions BEGIN UPDATE scopes SET attempts_used = 0; END"),
        ("view", "AS SELECT 1"),
        ("table", "(seq INTEGER)"),
        ("index", "ON decisions (action)"),
    ],
)
async def test_what_somebody_added_to_the_schema_is_named(log: Path, kind: str, statement: str) -> None:
    remodel(log, f"CREATE {kind} mine {statement}")
    assert verdict(log).startswith(f"the {kind} mine was added: ")


async def test_how_the_schema_is_spaced_and_commented_does_not_matter(log: Path) -> None:
    rewrite(log, "decisions", lambda sql: sql.replace(" NOT NULL", "\tNOT/* 'a\ncomment */-- it's one\nNULL"))
    rewrite(log, "decisions_are_never_changed", lambda sql: sql.replace("\n", " "))
    assert verify_sqlite(log).records == 8


async def test_what_sqlite_itself_adds_to_the_schema_does_not_matter(log: Path) -> None:
    remodel(log, "ANALYZE")
    with closing(sqlite3.connect(log)) as connection:
        assert connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'sqlite_stat1'").fetchone()
    assert verify_sqlite(log).records == 8


async def test_an_older_version_than_the_schema_has_is_found(log: Path) -> None:
    remodel(log, "PRAGMA user_version = 1")
    assert verdict(log).endswith("the schema is not that of version 1")


async def test_a_newer_schema_than_is_known_is_not_judged(log: Path) -> None:
    remodel(log, f"PRAGMA user_version = {VERSIONS[-1] + 1}")
    with pytest.raises(StoreUnavailable, match="verify with a newer sidecar"):
        verify_sqlite(log)


@pytest.fixture
async def beside(open_store: OpenStore, tmp_path: Path) -> Path:
    """A closed log with a switch that was turned on, off and on, two keys, and a binding of record 1."""
    path = tmp_path / "beside.db"
    store = await open_store(path)
    for once in (b"one", b"other"):
        record = Record(
            decision_id=new_decision_id(),
            decision_type=DecisionType.ROUTING,
            decision_outcome=DecisionOutcome.SELECTED,
            decided_at=1,
            request_id="req" if once == b"one" else None,
            causal_role=CausalRole.PRE_RUN,
        )
        await store.submit(Emit(record=record, origin="library", once=once))
    for on in (True, False, True):
        await store.submit(turn(on))
    await store.submit(Bind(request_id="req", run_id="run_1"))
    await store.close()
    assert verify_sqlite(path).records == 5
    return path


def turn(on: bool) -> Turn:
    return Turn(decision_id=new_decision_id(), switch="care_kill_switch", on=on, origin="api")


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE switches SET is_on = 0",
        "UPDATE switches SET changed_at = changed_at + 1",
        "DELETE FROM switches",
    ],
)
async def test_a_switch_that_does_not_stand_as_its_last_record_says_is_named(
    beside: Path, statement: str
) -> None:
    remodel(beside, statement)
    assert verdict(beside) == "the switch care_kill_switch does not stand as record 5 left it"


async def test_a_switch_that_nobody_turned_is_named(beside: Path) -> None:
    remodel(beside, "INSERT INTO switches (name, is_on, changed_at) VALUES ('another', 0, 0)")
    assert verdict(beside) == "the switch another was never turned by a record"


async def test_a_switch_stands_as_it_was_turned_last_also_within_one_transaction(
    open_store: OpenStore, beside: Path
) -> None:
    store = await open_store(beside)
    await asyncio.gather(*(store.submit(turn(on)) for on in (False, True, False)))
    assert verify_sqlite(beside).records == 8
    await store.close()
    remodel(beside, "UPDATE switches SET is_on = 1")
    assert verdict(beside) == "the switch care_kill_switch does not stand as record 8 left it"


async def test_where_a_mask_hides_how_a_switch_was_turned_its_time_still_counts(
    open_store: OpenStore, tmp_path: Path
) -> None:
    path = tmp_path / "masked.db"
    store = await open_store(path, mask=Mask(pointers=(pointer("/details/on"),)))
    await store.submit(turn(True))
    await store.close()
    assert verify_sqlite(path).records == 1
    remodel(path, "UPDATE switches SET changed_at = 0")
    assert verdict(path) == "the switch care_kill_switch does not stand as record 1 left it"


async def test_a_key_of_a_record_that_is_not_there_is_named(beside: Path) -> None:
    tamper(beside, "UPDATE kept_once SET decision_id = 'none' WHERE key = CAST('other' AS BLOB)")
    assert verdict(beside) == (
        f"the key {b'other'.hex().upper()} in kept_once names decision none, which is not in the log"
    )


async def test_a_binding_of_a_record_that_is_not_there_is_named(beside: Path) -> None:
    tamper(beside, "UPDATE run_bindings SET seq = 6")
    assert verdict(beside) == "the run run_1 is bound to record 6, which is not in the log"


@pytest.mark.parametrize(
    ("statement", "wrong"),
    [
        (
            "DELETE FROM kept_once WHERE key = CAST('one' AS BLOB)",
            "the key 6F6E65 of record 1 is missing from",
        ),
        (
            "UPDATE kept_once SET key = CAST('two' AS BLOB) WHERE key = CAST('one' AS BLOB)",
            "the key 6F6E65 of",
        ),
        (
            "UPDATE kept_once SET decision_id = (SELECT decision_id FROM decisions WHERE seq = 3) "
            "WHERE key = CAST('one' AS BLOB)",
            "the key 6F6E65 of record 1 names another decision in kept_once",
        ),
        ("DELETE FROM run_bindings", "record 1 is missing from run_bindings, but was bound to run_1 by"),
        ("UPDATE run_bindings SET run_id = 'run_2'", "record 1 is bound to run_2 in run_bindings, but was"),
        ("UPDATE run_bindings SET seq = 2", "record 1 is missing from run_bindings, but was"),
    ],
)
@pytest.mark.parametrize("followed", [False, True])
async def test_a_key_or_binding_that_was_removed_or_altered_is_named(
    beside: Path, open_store: OpenStore, statement: str, wrong: str, followed: bool
) -> None:
    if followed:
        store = await open_store(beside)
        await store.submit(turn(True))
        await store.close()
        with closing(sqlite3.connect(beside)) as connection:
            assert not connection.execute("SELECT 1 FROM meta WHERE key GLOB 'bound:*'").fetchone()
        assert verify_sqlite(beside).records == 6
    tamper(beside, statement)
    assert verdict(beside).startswith(wrong)


async def test_the_next_record_says_which_records_were_bound_even_after_a_restart(
    beside: Path, open_store: OpenStore
) -> None:
    store = await open_store(beside)
    reply = await store.submit(turn(True))
    assert isinstance(reply, Turned)
    stored = await store.engine.decision(reply.decision_id)
    assert stored is not None
    assert orjson.loads(stored.envelope)["run_bindings"] == [[1, "run_1"]]
    reply = await store.submit(turn(True))
    assert isinstance(reply, Turned)
    stored = await store.engine.decision(reply.decision_id)
    assert stored is not None
    assert "run_bindings" not in orjson.loads(stored.envelope)


@pytest.mark.parametrize(
    "said", [{"kept_once": "zz"}, {"kept_once": 1}, {"run_bindings": 1}, {"run_bindings": [[99, "x"]]}]
)
async def test_a_rewritten_record_that_says_what_no_record_says_is_named(
    beside: Path, said: dict[str, Any]
) -> None:
    """As somebody could who makes the whole chain anew where nothing attests it."""
    with unguarded(beside) as connection:
        rows = connection.execute("SELECT seq, envelope FROM decisions ORDER BY seq").fetchall()
        head = GENESIS
        for seq, envelope in rows:
            told = {**orjson.loads(envelope), **(said if seq == 3 else {})}
            made = dumps(told, sort_keys=True)
            head = link(head, made)
            connection.execute("UPDATE decisions SET envelope = ?, hash = ? WHERE seq = ?", (made, head, seq))
    assert verdict(beside).startswith("record 3 was altered")


async def test_a_record_is_named_before_anything_beside_the_records(beside: Path) -> None:
    tamper(beside, "UPDATE decisions SET action = 'x' WHERE seq = 3")
    remodel(beside, "DROP TRIGGER decisions_are_never_changed", "DELETE FROM switches")
    assert verdict(beside) == "record 3 was altered: column action is not what its bytes say"


# Whatever is done to a log of every sort of record ------------------------------------------------------


@pytest.fixture
async def varied_log(open_store: OpenStore, tmp_path: Path) -> Path:
    """A closed log of eight records, the sixth of which has nearly every column."""
    path = tmp_path / "varied.db"
    store = await open_store(path)
    reply = await store.submit(issue())
    assert isinstance(reply, Issued)
    admitted = await store.submit(admit(reply.scope.scope_id, target_agents=("a",)))
    assert isinstance(admitted, Admitted)
    admission = admitted.execution.decision_id
    await store.submit(Settle(decision_id=new_decision_id(), admission_id=admission, outcome="unknown"))
    await store.submit(
        Reconcile(decision_id=new_decision_id(), admission_id=admission, outcome="executed", reason="ö")
    )
    await store.submit(Revoke(decision_id=new_decision_id(), scope_id=reply.scope.scope_id))
    for request_id in ("req_ä", None):
        record = Record(
            decision_id=new_decision_id(),
            decision_type=DecisionType.ROUTING,
            decision_outcome=DecisionOutcome.SELECTED,
            decided_at=1_234_567_890_123_456,
            run_id="run_1",
            request_id=request_id,
        )
        await store.submit(Emit(record=record, origin="library"))
    await store.submit(admit("scope_none"))
    await store.close()
    assert verify_sqlite(path).records == 8
    return path


@pytest.fixture
async def varied(varied_log: Path) -> AsyncIterator[sqlite3.Connection]:
    """A connection that may do anything to it."""
    with unguarded(varied_log) as connection:
        yield connection


def found(connection: sqlite3.Connection) -> str:
    path = Path(connection.execute("PRAGMA database_list").fetchone()[2])
    return verdict(path)


def columns_of(connection: sqlite3.Connection) -> list[str]:
    return [row[1] for row in connection.execute("PRAGMA table_info(decisions)").fetchall()]


@pytest.mark.parametrize("seq", [2, 3, 6])
async def test_every_byte_of_every_column_of_a_record_counts(varied: sqlite3.Connection, seq: int) -> None:
    for column in columns_of(varied):
        (kind, value) = varied.execute(
            f"SELECT typeof({column}), {column} FROM decisions WHERE seq = {seq}"
        ).fetchone()
        if kind == "null":
            continue
        raw = value.to_bytes(8, "big", signed=True) if kind == "integer" else value
        raw = raw.encode() if isinstance(raw, str) else raw
        for place in range(len(raw)):
            for bit in (0x01, 0x80) if kind == "text" else (0x40,):
                altered: Any = bytearray(raw)
                altered[place] ^= bit
                altered = int.from_bytes(altered, "big", signed=True) if kind == "integer" else bytes(altered)
                set_to = "CAST(? AS TEXT)" if kind == "text" else "?"
                varied.execute(f"UPDATE decisions SET {column} = {set_to} WHERE seq = {seq}", (altered,))
                told = found(varied)
                assert told.startswith(f"record {seq} "), (column, place, told)
                now_at = altered if column == "seq" else seq
                varied.execute(f"UPDATE decisions SET {column} = ? WHERE seq = {now_at}", (value,))
    assert found(varied).startswith("the trigger "), "every record is as it was"


async def test_every_column_that_is_emptied_or_filled_is_found(varied: sqlite3.Connection) -> None:
    nullable = [row[1] for row in varied.execute("PRAGMA table_info(decisions)") if not row[3] and not row[5]]
    for column in nullable:
        for seq in range(1, 9):
            (value,) = varied.execute(f"SELECT {column} FROM decisions WHERE seq = {seq}").fetchone()
            other = 0 if column == "recorded_at" else "x"
            varied.execute(
                f"UPDATE decisions SET {column} = ? WHERE seq = {seq}", (other if value is None else None,)
            )
            told = found(varied)
            assert told == f"record {seq} was altered: column {column} is not what its bytes say"
            varied.execute(f"UPDATE decisions SET {column} = ? WHERE seq = {seq}", (value,))


async def test_any_record_that_is_dropped_but_the_last_is_found(varied: sqlite3.Connection) -> None:
    names = ", ".join(columns_of(varied))
    for seq in range(1, 8):
        row = varied.execute(f"SELECT {names} FROM decisions WHERE seq = {seq}").fetchone()
        varied.execute(f"DELETE FROM decisions WHERE seq = {seq}")
        assert found(varied) == f"record {seq} is missing: the next one in the log is {seq + 1}"
        varied.execute(f"INSERT INTO decisions ({names}) VALUES ({', '.join('?' * len(row))})", row)


async def test_any_two_records_that_are_swapped_are_found(varied: sqlite3.Connection) -> None:
    def swap(one: int, other: int) -> None:
        for old, new in ((one, 100), (other, one), (100, other)):
            varied.execute(f"UPDATE decisions SET seq = {new} WHERE seq = {old}")

    for one, other in itertools.combinations(range(1, 9), 2):
        swap(one, other)
        assert found(varied).startswith(f"record {one} ")
        swap(one, other)


async def test_a_column_of_another_type_is_found(varied: sqlite3.Connection) -> None:
    """Only somebody who rewrites the schema gets one past STRICT."""
    (sql,) = varied.execute("SELECT sql FROM sqlite_master WHERE name = 'decisions'").fetchone()
    varied.execute("PRAGMA writable_schema = ON")
    varied.execute(
        "UPDATE sqlite_master SET sql = ? WHERE name = 'decisions'", (sql.removesuffix(" STRICT"),)
    )
    varied.execute("PRAGMA writable_schema = RESET")
    for column, value in (
        ("envelope", "text"),
        ("hash", "text"),
        ("decided_at", "text"),
        ("decided_at", b"x"),
        ("event", b"x"),
        ("recorded_at", 1.5),
        ("action", 1),
        ("envelope", 1),
        ("hash", 1.5),
    ):
        (before,) = varied.execute(f"SELECT {column} FROM decisions WHERE seq = 4").fetchone()
        varied.execute(f"UPDATE decisions SET {column} = ? WHERE seq = 4", (value,))
        assert found(varied).startswith("record 4 was altered"), (column, value)
        varied.execute(f"UPDATE decisions SET {column} = ? WHERE seq = 4", (before,))


@pytest.mark.parametrize("flips", [150, pytest.param(1_500, marks=pytest.mark.slow)])
def test_whatever_byte_of_the_file_is_flipped_it_is_found_or_nothing_reads_otherwise(
    varied_log: Path, flips: int
) -> None:
    path = varied_log
    remodel(path, "PRAGMA journal_mode = DELETE")  # one file, so that all of it is in these bytes
    true = b"".join(line for _, _, line in exported(path))
    raw = path.read_bytes()
    # Without it a flip in the count of a page could pass, as one that cuts records off the end.
    head = verify_sqlite(path)
    signed = SigningKey.generate().checkpoint(writer=head.writer, count=8, head=head.head, time="now")
    attestation = Attestation(attested=[Attested(1, signed)])
    chance = random.Random(5)
    tampered = 0
    for place in (*range(100), *(chance.randrange(len(raw)) for _ in range(flips))):
        flipped = bytearray(raw)
        flipped[place] ^= 1 << chance.randrange(8)
        path.write_bytes(flipped)
        try:
            verified = verify_sqlite(path, attestation=attestation)
        except LogTampered:
            tampered += 1
        except StoreUnavailable:
            assert place < 100  # the header says that the file is of another format
        else:
            assert verified.records == 8
            assert b"".join(line for _, _, line in exported(path)) == true
    assert tampered > flips // 30


async def test_damage_is_named_at_the_first_record_that_cannot_be_read(
    open_store: OpenStore, tmp_path: Path
) -> None:
    path = tmp_path / "log.db"
    store = await open_store(path)
    for start in range(0, 3_000, 500):
        await asyncio.gather(*(store.submit(admit(f"scope_{start + number}")) for number in range(500)))
    await store.close()
    raw = bytearray(path.read_bytes())
    with closing(sqlite3.connect(path)) as connection:
        leaf = raw.index(connection.execute("SELECT hash FROM decisions WHERE seq = 2000").fetchone()[0])
    page = leaf // 4_096 * 4_096
    raw[page : page + 8] = bytes(8)
    path.write_bytes(raw)
    told = verdict(path)
    record = int(told.split()[1])
    assert 1_990 < record <= 2_000
    assert "cannot be read: database disk image is malformed" in told


async def test_what_is_exported_can_be_checked_without_this_program(
    open_store: OpenStore, tmp_path: Path
) -> None:
    store = await open_store(tmp_path / "log.db")
    await asyncio.gather(*(store.submit(admit(f"scope_{number}")) for number in range(600)))
    lines = [line for _, _, line in exported(tmp_path / "log.db")]  # beside the writer
    assert len(lines) == 600
    previous = bytes(32)
    for seq, line in enumerate(lines, start=1):
        told = json.loads(line)
        assert list(told) == ["seq", "hash", "previous_hash", "envelope"]
        assert (told["seq"], told["previous_hash"]) == (seq, previous.hex())
        raw = line.split(b'"envelope":', 1)[1].removesuffix(b"}\n")
        previous = hashlib.sha256(previous + raw).digest()
        assert told["hash"] == previous.hex()
        assert told["envelope"]["seq"] == seq
    assert [line for _, _, line in exported(tmp_path / "log.db", after=598)] == lines[598:]
    assert list(exported(tmp_path / "log.db", after=600)) == []
    assert list(exported(tmp_path / "log.db", after=10**9)) == []
