"""The log as a file: read only and in short pages, so beside a running sidecar, too."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from sidecar.errors import LogTampered, StoreUnavailable
from sidecar.store.sqlite import UNSAID, read_only_uri

# What is read at once. Small enough to stay in the processor's cache while it is worked on.
PAGE = 256
# Before all records: what somebody put in front of record 1 is read, too.
START = -(2**63)

# Every object of a schema and the version of it. What SQLite makes by itself is left out: the indexes of
# constraints, which have no sql, and the tables in which ANALYZE keeps what it found.
_SCHEMA = """
    SELECT (SELECT user_version FROM pragma_user_version), type, name, tbl_name, CAST(sql AS TEXT)
    FROM sqlite_master WHERE sql NOT GLOB 'CREATE TABLE sqlite_stat[0-9]*'"""

# What SQLite calls a file that somebody has been at, by the beginning of its error's name. Our own SQL is
# well formed, so that a plain SQLITE_ERROR speaks of a table or column that is gone.
_DAMAGED = ("SQLITE_CORRUPT", "SQLITE_NOTADB", "SQLITE_FORMAT", "SQLITE_ERROR")


# What reading may raise: where the words of an error quote a file that is damaged, they may be no text.
READ_ERRORS = (sqlite3.Error, UnicodeDecodeError)


class LogFile:
    """An open log. What reading raises is for `opened` to translate."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        # A log that was not written to since an update has no such column yet.
        columns = connection.execute("SELECT name FROM pragma_table_info('decisions')").fetchall()
        self.recorded_at = "recorded_at" if ("recorded_at",) in columns else "NULL"

    def writer(self) -> str:
        """The name of the log's writer. Raises LogTampered where it has none."""
        found = self._connection.execute("SELECT value FROM meta WHERE key = 'writer'").fetchone()
        if found is None:
            raise LogTampered("the name of the log's writer is missing")
        return str(found[0])

    def last(self) -> int:
        """The number of the last record, 0 where there is none."""
        found = self._connection.execute("SELECT COALESCE(MAX(seq), 0) FROM decisions").fetchone()
        return int(found[0])

    def next_after(self, seq: int | None) -> int | None:
        """The number of the first record behind another one; None: of the first of all."""
        behind = "WHERE seq > ?" if seq is not None else "WHERE ? IS NULL"
        found = self._connection.execute(f"SELECT MIN(seq) FROM decisions {behind}", (seq,)).fetchone()
        return None if found[0] is None else int(found[0])

    def hash_of(self, seq: int) -> bytes | None:
        found = self._connection.execute("SELECT hash FROM decisions WHERE seq = ?", (seq,)).fetchone()
        return None if found is None else bytes(found[0])

    def kept_under(self, key: bytes) -> str | None:
        """The decision that is kept under a key."""
        sql = "SELECT decision_id FROM kept_once WHERE key = ?"
        found = self._connection.execute(sql, (key,)).fetchone()
        return None if found is None else str(found[0])

    def run_of(self, seq: int) -> str | None:
        """The run that a record was bound to."""
        found = self._connection.execute("SELECT run_id FROM run_bindings WHERE seq = ?", (seq,)).fetchone()
        return None if found is None else str(found[0])

    def unsaid(self) -> list[tuple[int, str]]:
        """The bindings of which no record tells yet: numbers of records and their runs."""
        return self._connection.execute(UNSAID).fetchall()

    def schema(self) -> list[Any]:
        """As `schema_of`."""
        return schema_of(self._connection)

    def first(self, sql: str) -> Any:
        """The first row that a query finds, None where it finds none."""
        return self._connection.execute(sql).fetchone()

    def pages(self, columns: str, after: int, last: int) -> Iterator[list[Any]]:
        """The records behind `after` and up to `last` in order, in pages; the first column is their seq.

        No read is open while a page is out. Where one cannot be read, what stands before the damage comes
        record by record, and then the error.
        """
        sql = f"SELECT seq, {columns} FROM decisions WHERE seq > ? AND seq <= ? ORDER BY seq LIMIT ?"
        size = PAGE
        while after < last:
            try:
                page = self._connection.execute(sql, (after, last, size)).fetchall()
            except READ_ERRORS:
                if size == 1:
                    raise
                size = 1
                continue
            if not page:
                return
            yield page
            after = page[-1][0]


def schema_of(connection: sqlite3.Connection) -> list[Any]:
    """(version, kind, name, table, sql) of every object in a schema that is ours to judge."""
    return connection.execute(_SCHEMA).fetchall()


@contextmanager
def opened(path: Path) -> Iterator[LogFile]:
    """Open a log to read it.

    Raises StoreUnavailable where there is none or it cannot be read, LogTampered where the file is damaged.
    """
    try:
        path.stat()
    except FileNotFoundError as exc:
        message = f"there is no database {path}; has the sidecar run with this configuration?"
        raise StoreUnavailable(message) from exc
    except OSError as exc:
        raise StoreUnavailable(f"cannot read {path}: {exc.strerror or exc}") from exc
    try:
        with closing(sqlite3.connect(read_only_uri(path), uri=True, isolation_level=None)) as connection:
            connection.execute("PRAGMA trusted_schema = OFF")
            yield LogFile(connection)
    except READ_ERRORS as exc:
        damage = damage_of(exc)
        if damage is None:
            raise StoreUnavailable(f"cannot read {path}: {exc}") from exc
        raise LogTampered(f"{path} is damaged, or no log any more: {damage}") from exc


def damage_of(exc: sqlite3.Error | UnicodeDecodeError) -> str | None:
    """What is wrong with the file, None where the error does not speak of damage."""
    if isinstance(exc, UnicodeDecodeError):
        return "it holds bytes that are no text"
    name: str | None = getattr(exc, "sqlite_errorname", None)
    if name is None:  # SQLite itself found nothing wrong; Python does where a column should be text
        return "a column holds bytes that are no text" if "decode" in str(exc) else None
    return f"{exc} ({name})" if name.startswith(_DAMAGED) else None
