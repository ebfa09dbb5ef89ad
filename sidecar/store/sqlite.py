"""The SQLite engine: one connection writes and checkpoints, and nothing else writes.

Locks keep a second store out. `sidecar.store._ownership` holds them and explains why only SQLite opens the
database. Lists read through a second connection that cannot write.
"""

from __future__ import annotations

import os
import sqlite3
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import aiosqlite
import orjson

from sidecar.core.brakes import AdmissionGroup
from sidecar.core.chain import GENESIS
from sidecar.core.command import Switch
from sidecar.core.freeze import Freeze
from sidecar.core.scope import Execution, Scope
from sidecar.core.state import Names, State
from sidecar.errors import StoreUnavailable
from sidecar.store import _freezes as freezerows
from sidecar.store import _keys as keys
from sidecar.store import _rows as rows
from sidecar.store._admission_cache import AdmissionCache, Overlaid
from sidecar.store._footprint import measured
from sidecar.store._freezes import FreezesInForce
from sidecar.store._lately import LatelyWritten
from sidecar.store._migrate import migrate
from sidecar.store._ownership import Ownership
from sidecar.store.base import (
    ChainHead,
    Changes,
    ExecutionsWanted,
    Footprint,
    Page,
    ScopesWanted,
    StoredDecision,
)
from sidecar.store.connection import connected, forgetting_damage, in_thread, read_only_uri, translated
from sidecar.store.lists import (
    STORED_DECISION,
    cursor,
    decisions_page,
    executions_page,
    page,
    scopes_page,
    scopes_query,
    stored_decision,
)

_NAMED = "IN (SELECT value FROM json_each(?))"
IS_KEPT = "SELECT 1 FROM kept_once WHERE key = ?"
IS_ON = "SELECT 1 FROM switches WHERE name = ? AND is_on"
# A request has few records, so a field without a column can be read from the envelope.
_UNBOUND = """
    SELECT seq FROM decisions LEFT JOIN run_bindings b USING (seq)
    WHERE request_id = ? AND decisions.run_id IS NULL AND b.run_id IS NULL
        AND json_extract(CAST(envelope AS TEXT), '$.record.causal_role') = 'pre_run'
    ORDER BY seq"""


def load(
    connection: sqlite3.Connection,
    names: Names,
    cache: AdmissionCache | None = None,
    lately: LatelyWritten | None = None,
    freezes: FreezesInForce | None = None,
) -> State:
    """Load the named rows. Rows that `cache`, `lately` and `freezes` hold are not read again."""
    lately = lately or LatelyWritten()
    claimed = keys.load(connection, names.keys) if names.keys else {}
    holders = [each.admission_id for each in claimed.values()] if claimed else ()
    executions, missing = lately.executions((*names.executions, *holders) if holders else names.executions)
    if missing:
        for row in connection.execute(
            f"SELECT {rows.EXECUTION_COLUMNS} FROM executions WHERE decision_id {_NAMED}",
            (orjson.dumps(missing).decode(),),
        ):
            execution = rows.execution_from_row(row)
            executions[execution.decision_id] = execution
    wanted = dict.fromkeys(names.scopes)
    wanted.update((each.scope_id, None) for each in executions.values() if each.scope_id is not None)
    scopes, missing = lately.scopes(wanted)
    if missing:
        for row in connection.execute(
            f"SELECT {rows.SCOPE_COLUMNS} FROM scopes WHERE scope_id {_NAMED}",
            (orjson.dumps(missing).decode(),),
        ):
            scope = rows.scope_from_row(row)
            scopes[scope.scope_id] = scope
    once = (key for key in names.once if connection.execute(IS_KEPT, (key,)).fetchone())
    on = (switch for switch in names.switches if connection.execute(IS_ON, (switch,)).fetchone())
    unbound = {
        request_id: [seq for (seq,) in connection.execute(_UNBOUND, (request_id,))]
        for request_id in names.requests
    }
    # Nearly always no freeze is named, and those in force are known.
    known = None if freezes is None or names.freezes else freezes.known
    admissions, counting = (cache or AdmissionCache(counted)).of(connection, names.groups)
    return State(
        scopes=scopes,
        executions=Overlaid(counting, executions),
        admissions=admissions,
        found=None if cache is None else cache.found,
        kept=frozenset(once),
        on=frozenset(on),
        unbound=unbound,
        claimed=claimed,
        freezes=known if known is not None else (freezes or FreezesInForce()).load(connection, names),
    )


def counted_query(group: AdmissionGroup, since: int) -> tuple[str, tuple[Any, ...]]:
    """SQL and parameters for the admissions of a group that a brake may count, oldest first.

    The second SELECT finds those still under way, of any age, by the partial index of executions that are not
    answered. The plus signs keep SQLite from another index, with which it would read the whole history of an
    incident.
    """
    agreeing = {name: value for name, value in group._asdict().items() if value is not None}
    # Few executions of an incident belong to another action, so the index by incident is the selective one.
    by_incident = group.incident_id is not None
    alike = "".join(f" AND {'+' if by_incident and name == 'action' else ''}{name} = ?" for name in agreeing)
    flying = "".join(f" AND +{name} = ?" for name in agreeing)
    where = f"SELECT {rows.EXECUTION_COLUMNS} FROM executions WHERE"
    return (
        f"{where} admitted_at > ? AND status <> 'not_sent'{alike} UNION ALL "
        f"{where} status IN ('in_flight', 'running') AND status <> 'answered' AND +admitted_at <= ?{flying} "
        "ORDER BY admitted_at",
        (since, *agreeing.values(), since, *agreeing.values()),
    )


def counted(connection: sqlite3.Connection, group: AdmissionGroup, since: int) -> list[Execution]:
    """The executions that `counted_query` finds."""
    return [rows.execution_from_row(row) for row in connection.execute(*counted_query(group, since))]


T = TypeVar("T")

# Rows written between two checkpoints. Checkpoints are small, so that none delays the batches behind it.
ROWS_PER_CHECKPOINT = 2_000

_ISSUE_SCOPE = f"""
    INSERT INTO scopes ({rows.SCOPE_COLUMNS}) VALUES ({rows.placeholders(rows.SCOPE_COLUMNS)})"""
_UPDATE_SCOPE = """
    UPDATE scopes SET attempts_used = ?, settled = ?, held = ?, overrun = ?, revoked_at = ?
    WHERE scope_id = ?"""
_ADMIT_EXECUTION = f"""
    INSERT INTO executions ({rows.EXECUTION_COLUMNS})
    VALUES ({rows.placeholders(rows.EXECUTION_COLUMNS)})"""
_END_EXECUTION = """
    UPDATE executions SET status = ?, cost = ?, ended_at = ?, http_status = ?, cause = ?, report_token = ?
    WHERE decision_id = ?"""
_APPEND = f"""
    INSERT INTO decisions ({rows.LOG_COLUMNS}) VALUES ({rows.placeholders(rows.LOG_COLUMNS)})"""
_KEEP = "INSERT INTO kept_once (key, decision_id) VALUES (?, ?)"
_TURN = """
    INSERT INTO switches (name, is_on, changed_at) VALUES (?, ?, ?)
    ON CONFLICT (name) DO UPDATE SET is_on = excluded.is_on, changed_at = excluded.changed_at"""
_BIND = "INSERT INTO run_bindings (seq, run_id, bound_at) VALUES (?, ?, ?)"
# A binding that no record names yet is also in `meta`, under the number of its record.
UNLOGGED_BINDINGS = "SELECT CAST(SUBSTR(key, 7) AS INTEGER), value FROM meta WHERE key GLOB 'bound:*'"
_NOTE_BINDING = "INSERT INTO meta (key, value) VALUES ('bound:' || ?, ?)"
_DROP_BINDING = "DELETE FROM meta WHERE key = 'bound:' || ?"
# Brakes count by age, and a time limit counts from the admission. When a clock that was ahead is corrected,
# executions admitted by it keep their age and their limit.
_STEP = """
    UPDATE executions SET admitted_at = admitted_at - ?1, report_by = report_by - ?1
    WHERE admitted_at > ?2"""
# The room that a rehearsal takes: four times the largest body that a record holds. This is more than a
# decision takes with its rows and indexes. The row is deleted again, so its pages are free for decisions.
_ROOM = "INSERT OR REPLACE INTO meta (key, value) VALUES ('rehearsal', ?)"
ROOM_BYTES = 65_536
_MAKE_ROOM = "DELETE FROM meta WHERE key = 'rehearsal'"

# The first bytes of a WAL, without the byte that gives the byte order of its checksums.
_WAL_BEGINS = b"\x37\x7f\x06"
_CUT_OFF = (
    "the WAL of the database was cut off or overwritten while in use, so what is written to it may be lost; "
    "restart the sidecar to begin with what is there"
)


class SqliteEngine:
    """One SQLite file. Without a path, a database in memory that lives as long as this object."""

    def __init__(self, path: Path | None) -> None:
        # SQLite keeps the WAL beside the target of a symbolic link, not beside the link.
        self._path = path.resolve() if path is not None else None
        self._ownership = Ownership(self._path) if self._path is not None else None
        self._writer: aiosqlite.Connection | None = None
        self._reader: aiosqlite.Connection | None = None
        self._identity: list[tuple[str, int, int]] = []
        self._wal: int | None = None  # a descriptor; SQLite holds no locks on that file
        self._wal_size = 0
        self._rows_since_checkpoint = 0
        self._full_sync = True
        self._admissions = AdmissionCache(counted)
        self._lately = LatelyWritten()
        self._freezes = FreezesInForce()

    # The writer --------------------------------------------------------------------------------

    async def open(self) -> ChainHead:
        try:
            if self._ownership is not None:
                self._ownership.take()
            self._writer = await connected(
                str(self._path) if self._path else ":memory:", cached_statements=64
            )
            await in_thread(self._writer, _prepare)
            self._forget()  # the writer of an earlier opening knew another state of the file
            if self._ownership is not None and self._ownership.inode is not None:
                # The identity is that of the locked file, because the path may name another file by now.
                self._identity = [(str(self._path), *self._ownership.inode), _identity(f"{self._path}-wal")]
                self._wal = os.open(f"{self._path}-wal", os.O_RDONLY | os.O_CLOEXEC)
                self._check_files()
            if self._path is not None:
                self._reader = await connected(read_only_uri(self._path), uri=True)
            return await self.head()
        except (OSError, sqlite3.Error) as exc:
            await self.close()
            raise StoreUnavailable(f"cannot open the database {self._path}: {exc}") from exc
        except BaseException:
            await self.close()
            raise

    async def head(self) -> ChainHead:
        return await self._write(_head)

    async def transact(self, names: Names, decide: Callable[[State], Changes], *, durable: bool) -> None:
        def transaction(connection: sqlite3.Connection) -> None:
            self._sync(connection, full=durable)
            connection.execute("BEGIN IMMEDIATE")
            try:
                if self._lately.check(connection):
                    self._forget()
                changes = decide(load(connection, names, self._admissions, self._lately, self._freezes))
                _save(connection, changes)
                self._check_files()
                connection.execute("COMMIT")
                self._check_wal()
            except BaseException:
                self._forget()
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
            if changes.stepped:
                self._forget()
            self._admissions.learn((*changes.admitted, *changes.executions))
            self._lately.learn(changes)
            if changes.freezes:
                self._freezes.learn(changes)
            self._rows_since_checkpoint += (
                len(changes.scopes) + len(changes.admitted) + len(changes.executions) + len(changes.log)
            )

        await self._write(transaction)

    async def rehearse(self, names: Names, decide: Callable[[State], Changes]) -> None:
        def rehearsal(connection: sqlite3.Connection) -> None:
            self._sync(connection, full=True)
            connection.execute("BEGIN IMMEDIATE")
            try:
                connection.execute("SAVEPOINT decision")
                _save(connection, decide(load(connection, names)))
                connection.execute("ROLLBACK TO decision")
                connection.execute(_ROOM, ("0" * ROOM_BYTES,))
                self._check_files()
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
            connection.execute(_MAKE_ROOM)
            self._check_wal()
            self._rows_since_checkpoint += 100

        await self._write(rehearsal)

    def _forget(self) -> None:
        self._admissions.forget()
        self._lately.forget()
        self._freezes.forget()

    def _sync(self, connection: sqlite3.Connection, *, full: bool) -> None:
        if full != self._full_sync:
            connection.execute(f"PRAGMA synchronous = {'FULL' if full else 'NORMAL'}")
            self._full_sync = full

    def _check_files(self) -> None:
        """Check before a commit that the files are still in place. In WAL mode SQLite does not notice that a
        file was moved or unlinked, and commits would be lost."""
        for name, device, inode in self._identity:
            try:
                same = _identity(name) == (name, device, inode)
            except OSError:
                same = False
            if not same:
                raise StoreUnavailable(
                    f"the database file {name} was moved, deleted or replaced while in use; "
                    "put it back, or restart the sidecar to begin with what is there"
                )
        # A checkpoint of another program may empty the WAL. Otherwise only a commit of this writer shortens
        # it.
        if self._wal is not None and 0 < os.fstat(self._wal).st_size < self._wal_size:
            raise StoreUnavailable(_CUT_OFF)

    def _check_wal(self) -> None:
        """Check after a commit that the WAL has its magic number, and remember its size as the minimum."""
        if self._wal is None:
            return
        if os.pread(self._wal, len(_WAL_BEGINS), 0) not in (b"", _WAL_BEGINS):
            raise StoreUnavailable(_CUT_OFF)
        self._wal_size = os.fstat(self._wal).st_size

    async def probe(self) -> None:
        def write(connection: sqlite3.Connection) -> None:
            self._check_files()
            self._sync(connection, full=True)
            connection.execute("INSERT OR REPLACE INTO meta (key, value) VALUES ('probe', datetime('now'))")
            self._check_wal()
            self._rows_since_checkpoint += 1  # probes alone must not let the WAL grow either

        await self._write(write)

    async def tidy(self) -> None:
        if self._path is not None and self._rows_since_checkpoint >= ROWS_PER_CHECKPOINT:
            await self._write(
                lambda connection: connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            )
            self._rows_since_checkpoint = 0

    async def close(self) -> None:
        """Close both connections, then release the locks. An open connection would keep the process alive,
        because the threads of aiosqlite are not daemons."""
        for connection in (self._reader, self._writer):
            if connection is not None:
                await connection.close()
        self._reader = self._writer = None
        if self._wal is not None:
            os.close(self._wal)
            self._wal = None
        self.abandon()

    def abandon(self) -> None:
        """In a forked child, close the copies of the parent's locks, so that the file is free when the parent
        ends."""
        if self._ownership is not None:
            self._ownership.release()

    async def _write(self, function: Callable[[sqlite3.Connection], T]) -> T:
        if self._writer is None:
            raise StoreUnavailable("the database is not open")
        with translated():
            return await in_thread(self._writer, lambda connection: forgetting_damage(connection, function))

    # Reading -----------------------------------------------------------------------------------

    async def _read(self, function: Callable[[sqlite3.Connection], T]) -> T:
        connection = self._reader or self._writer
        if connection is None:
            raise StoreUnavailable("the database is not open")
        with translated():
            return await in_thread(connection, lambda raw: forgetting_damage(raw, function))

    async def _rows(self, sql: str, parameters: tuple[Any, ...] = ()) -> list[Any]:
        return await self._read(lambda connection: connection.execute(sql, parameters).fetchall())

    async def look(self, names: Names, view: Callable[[State], T]) -> T:
        def reading(connection: sqlite3.Connection) -> T:
            connection.execute("BEGIN")  # one snapshot for all reads
            try:
                return view(load(connection, names))
            finally:
                connection.execute("ROLLBACK")

        return await self._read(reading)

    async def scope(self, scope_id: str) -> Scope | None:
        found = await self._rows(f"SELECT {rows.SCOPE_COLUMNS} FROM scopes WHERE scope_id = ?", (scope_id,))
        return rows.scope_from_row(found[0]) if found else None

    async def scopes(
        self,
        tenant_id: str,
        incident_id: str,
        issuer: str | None = None,
        *,
        before: str | None,
        limit: int,
    ) -> tuple[Page, int]:
        of_incident = "FROM scopes WHERE tenant_id = ? AND incident_id = ?"
        named: tuple[str, ...] = (tenant_id, incident_id)
        if issuer is not None:
            of_incident += " AND created_by = ? AND issuer_method <> 'none'"
            named = (*named, issuer)
        found = await self._rows(
            f"SELECT {rows.SCOPE_COLUMNS}, seq {of_incident} AND seq < ? ORDER BY seq DESC LIMIT ?",
            (*named, cursor(before), limit + 1),
        )
        total = await self._rows(f"SELECT COUNT(*) {of_incident}", named)
        return page(found, limit, rows.scope_from_row), total[0][0]

    async def scopes_wanted(self, wanted: ScopesWanted, *, before: str | None, limit: int) -> Page:
        def reading(connection: sqlite3.Connection) -> Page:
            (last,) = connection.execute("SELECT COALESCE(MAX(seq), 0) FROM scopes").fetchone()
            below = min(cursor(before), last + 1)
            found = connection.execute(*scopes_query(wanted, below, limit + 1)).fetchall()
            return scopes_page(found, wanted, below, limit)

        return await self._read(reading)

    async def lapsed_scopes(self, now: int, *, before: str | None, limit: int) -> Page:
        found = await self._rows(
            f"SELECT {rows.SCOPE_COLUMNS}, seq FROM scopes WHERE expires_at <= ? AND seq < ? "
            "ORDER BY seq DESC LIMIT ?",
            (now, cursor(before), limit + 1),
        )
        return page(found, limit, rows.scope_from_row)

    async def decisions(
        self, filters: Mapping[str, str], *, since: int | None = None, before: str | None, limit: int
    ) -> Page:
        return await self._read(lambda raw: decisions_page(raw, filters, since, before, limit))

    async def decision(self, decision_id: str) -> StoredDecision | None:
        found = await self._rows(
            f"{STORED_DECISION.format(found='decisions')} WHERE d.decision_id = ?", (decision_id,)
        )
        return stored_decision(found[0]) if found else None

    async def is_kept(self, key: bytes) -> bool:
        return bool(await self._rows(IS_KEPT, (key,)))

    async def is_on(self, switch: Switch) -> bool:
        return bool(await self._rows(IS_ON, (switch,)))

    async def freezes_in_force(self, now: int) -> Sequence[Freeze]:
        found = await self._rows(f"{freezerows.IN_FORCE} ORDER BY set_at DESC, freeze_id DESC", (now,))
        return [freezerows.from_row(row) for row in found]

    async def freezes(self, *, limit: int) -> Sequence[Freeze]:
        return [freezerows.from_row(row) for row in await self._rows(freezerows.NEWEST, (limit,))]

    async def executions_of(self, scope_id: str) -> Sequence[Execution]:
        # The log has an index by scope. Executions have none, because it would make settlements slower.
        found = await self._rows(
            f"SELECT {rows.EXECUTION_COLUMNS} FROM executions WHERE decision_id IN "
            "(SELECT decision_id FROM decisions WHERE scope_id = ? AND event = 'admitted') "
            "ORDER BY decision_id",
            (scope_id,),
        )
        return [rows.execution_from_row(row) for row in found]

    async def execution(self, decision_id: str) -> Execution | None:
        found = await self._rows(
            f"SELECT {rows.EXECUTION_COLUMNS} FROM executions WHERE decision_id = ?", (decision_id,)
        )
        return rows.execution_from_row(found[0]) if found else None

    async def executions(self, wanted: ExecutionsWanted, *, before: str | None, limit: int) -> Page:
        return await self._read(lambda raw: executions_page(raw, wanted, before, limit))

    async def unknown_executions(self) -> tuple[int, int | None]:
        found = await self._rows(
            "SELECT COUNT(*), MIN(admitted_at) FROM executions "
            "WHERE status = 'unknown' AND status <> 'answered'"
        )
        count, oldest = found[0]
        return count, oldest

    async def running_executions(self) -> tuple[int, int | None]:
        found = await self._rows(
            "SELECT COUNT(*), MIN(report_by) FROM executions INDEXED BY executions_running "
            "WHERE status = 'running'"
        )
        count, earliest = found[0]
        return count, earliest

    async def overdue_executions(self, now: int, *, limit: int) -> Sequence[str]:
        found = await self._rows(
            "SELECT decision_id FROM executions INDEXED BY executions_running "
            "WHERE status = 'running' AND report_by <= ? ORDER BY report_by LIMIT ?",
            (now, limit),
        )
        return [decision_id for (decision_id,) in found]

    async def footprint(self, now: int) -> Footprint:
        path = self._path
        if path is None:
            return Footprint()
        return await self._read(lambda connection: measured(connection, path, now))


def _prepare(connection: sqlite3.Connection) -> None:
    for pragma in (
        "journal_mode = WAL",
        "synchronous = FULL",
        "foreign_keys = ON",
        "recursive_triggers = ON",
        "wal_autocheckpoint = 0",  # tidy() does it, between batches
        "journal_size_limit = 16777216",
        "busy_timeout = 1000",
        "trusted_schema = OFF",
    ):
        connection.execute(f"PRAGMA {pragma}")
    migrate(connection)
    connection.execute("INSERT OR IGNORE INTO meta (key, value) VALUES ('writer', ?)", (str(uuid.uuid4()),))


def _head(connection: sqlite3.Connection) -> ChainHead:
    (writer,) = connection.execute("SELECT value FROM meta WHERE key = 'writer'").fetchone()
    last = connection.execute(
        "SELECT seq, hash, COALESCE(recorded_at, decided_at) FROM decisions ORDER BY seq DESC LIMIT 1"
    ).fetchone()
    seq, hash_, time = last or (0, GENESIS, 0)
    return ChainHead(writer, seq, hash_, time, dict(connection.execute(UNLOGGED_BINDINGS).fetchall()))


def _save(connection: sqlite3.Connection, changes: Changes) -> None:
    """Write all changes of a transaction."""
    now = changes.now
    if changes.stepped:
        connection.execute(_STEP, (changes.stepped, now))
    _write_all(connection, _ISSUE_SCOPE, [rows.scope_to_row(each) for each in changes.issued])
    _write_all(connection, _UPDATE_SCOPE, [rows.scope_counters(each) for each in changes.scopes])
    _write_all(connection, _ADMIT_EXECUTION, [rows.execution_to_row(each) for each in changes.admitted])
    _write_all(connection, _END_EXECUTION, [rows.execution_ending(each) for each in changes.executions])
    _write_all(connection, _APPEND, [rows.log_to_row(each) for each in changes.log])
    if changes.claimed:
        _write_all(connection, keys.SAVE, [keys.claimed_to_row(each) for each in changes.claimed])
        keys.forget_some(connection, now, 2 * len(changes.claimed))
    if changes.freezes:
        _write_all(connection, freezerows.SAVE, [freezerows.to_row(each) for each in changes.freezes])
    if changes.kept:
        connection.executemany(_KEEP, changes.kept)
    if changes.turned:
        connection.executemany(_TURN, ((turn.switch, turn.on, now) for turn in changes.turned))
    if changes.bound:
        connection.executemany(_BIND, ((seq, bind.run_id, now) for seq, bind in changes.bound))
        connection.executemany(_NOTE_BINDING, ((seq, bind.run_id) for seq, bind in changes.bound))
    if changes.logged:
        connection.executemany(_DROP_BINDING, ((seq,) for seq in changes.logged))


def _write_all(connection: sqlite3.Connection, sql: str, wanted: Sequence[tuple[Any, ...]]) -> None:
    """Write every row, or raise StoreUnavailable: a foreign trigger can drop a row silently
    (RAISE(IGNORE))."""
    written = connection.executemany(sql, wanted).rowcount if wanted else 0
    if written != len(wanted):
        raise StoreUnavailable(f"the database took {written} of {len(wanted)} rows; look for triggers in it")


def _identity(name: str) -> tuple[str, int, int]:
    found = os.stat(name)
    return name, found.st_dev, found.st_ino
