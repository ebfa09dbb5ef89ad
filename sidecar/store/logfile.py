"""Reads the log from its file, read only and in short pages, so that it works beside a running sidecar."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from sidecar.errors import LogTampered, StoreUnavailable
from sidecar.store.connection import read_only_uri
from sidecar.store.sqlite import UNLOGGED_BINDINGS

# Records per page. A page is small enough to stay in the processor's cache while it is checked.
PAGE = 256
# The start of a full read. It is below 1, so that a forged record before record 1 is read, too.
START = -(2**63)

# The schema version and every object of the schema. Objects that SQLite makes by itself are left out: the
# indexes of constraints, which have no sql, and the statistics tables of ANALYZE.
_SCHEMA = """
    SELECT (SELECT user_version FROM pragma_user_version), type, name, tbl_name, CAST(sql AS TEXT)
    FROM sqlite_master WHERE sql NOT GLOB 'CREATE TABLE sqlite_stat[0-9]*'"""

# The prefixes of SQLite's error names for a damaged or altered file. The SQL of this package is well formed,
# so a plain SQLITE_ERROR means that a table or column is missing.
_DAMAGED = ("SQLITE_CORRUPT", "SQLITE_NOTADB", "SQLITE_FORMAT", "SQLITE_ERROR")


# The exceptions that a read may raise. UnicodeDecodeError is one of them because the message of an SQLite
# error may quote bytes of a damaged file.
READ_ERRORS = (sqlite3.Error, UnicodeDecodeError)


class LogFile:
    """An open log. `opened` translates the exceptions that its reads raise."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        # A log of an older release has no such column until a newer sidecar opens it.
        columns = connection.execute("SELECT name FROM pragma_table_info('decisions')").fetchall()
        self.recorded_at = "recorded_at" if ("recorded_at",) in columns else "NULL"

    def writer(self) -> str:
        """The name of the log's writer. Raises LogTampered if it is missing."""
        found = self._connection.execute("SELECT value FROM meta WHERE key = 'writer'").fetchone()
        if found is None:
            raise LogTampered("the name of the log's writer is missing")
        return str(found[0])

    def last(self) -> int:
        """The number of the last record; 0 if the log is empty."""
        found = self._connection.execute("SELECT COALESCE(MAX(seq), 0) FROM decisions").fetchone()
        return int(found[0])

    def next_after(self, seq: int | None) -> int | None:
        """The number of the first record after `seq`; of the first record if `seq` is None."""
        behind = "WHERE seq > ?" if seq is not None else "WHERE ? IS NULL"
        found = self._connection.execute(f"SELECT MIN(seq) FROM decisions {behind}", (seq,)).fetchone()
        return None if found[0] is None else int(found[0])

    def hash_of(self, seq: int) -> bytes | None:
        found = self._connection.execute("SELECT hash FROM decisions WHERE seq = ?", (seq,)).fetchone()
        return None if found is None else bytes(found[0])

    def kept_under(self, key: bytes) -> str | None:
        """The decision that is kept under this key."""
        sql = "SELECT decision_id FROM kept_once WHERE key = ?"
        found = self._connection.execute(sql, (key,)).fetchone()
        return None if found is None else str(found[0])

    def run_of(self, seq: int) -> str | None:
        """The run that a record was bound to."""
        found = self._connection.execute("SELECT run_id FROM run_bindings WHERE seq = ?", (seq,)).fetchone()
        return None if found is None else str(found[0])

    def unlogged(self) -> list[tuple[int, str]]:
        """The bindings that no record names yet, as pairs of record number and run."""
        return self._connection.execute(UNLOGGED_BINDINGS).fetchall()

    def schema(self) -> list[Any]:
        """As `schema_of`."""
        return schema_of(self._connection)

    def first(self, sql: str) -> Any:
        """The first row of a query; None if it finds none."""
        return self._connection.execute(sql).fetchone()

    def rows(self, sql: str) -> Iterator[Any]:
        """The rows of a query."""
        return iter(self._connection.execute(sql))

    def pages(self, columns: str, after: int, last: int) -> Iterator[list[Any]]:
        """Yield the records after `after` up to `last` in order, in pages. The first column is the seq.

        No read transaction is open between two pages. If a page cannot be read, the records before the
        damage are yielded one by one, and then the error is raised.
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
    """(version, kind, name, table, sql) of every object in a schema that SQLite did not make by itself."""
    return connection.execute(_SCHEMA).fetchall()


@contextmanager
def opened(path: Path) -> Iterator[LogFile]:
    """Open a log to read it.

    Raises StoreUnavailable if the file is missing or cannot be read, and LogTampered if it is damaged.
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
    """Describe the damage that an error reports; None if the error does not mean damage."""
    if isinstance(exc, UnicodeDecodeError):
        return "it holds bytes that are no text"
    name: str | None = getattr(exc, "sqlite_errorname", None)
    if name is None:  # the error is not SQLite's: Python could not decode a text column
        return "a column holds bytes that are no text" if "decode" in str(exc) else None
    return f"{exc} ({name})" if name.startswith(_DAMAGED) else None
