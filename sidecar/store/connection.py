"""Connections to SQLite: opening one, running functions in its thread, and explaining its failures."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import aiosqlite

from sidecar.errors import StoreUnavailable

T = TypeVar("T")

# Advice that SQLite's messages do not give, by the prefix of the error's name.
_ADVICE = {
    "SQLITE_FULL": ": free some disk space",
    "SQLITE_IOERR": ": look at the disk, its free space and the file-size limit",
    "SQLITE_READONLY": ": the file or its folder cannot be written to",
    "SQLITE_CANTOPEN": ": the file or its folder is not there or not accessible",
}


def read_only_uri(path: Path) -> str:
    """The URI with which SQLite opens a database and never writes to it."""
    return f"file:{quote(os.fsencode(path))}?mode=ro"  # a file name is bytes, and not always text


async def connected(database: str, **options: Any) -> aiosqlite.Connection:
    """Connect to a database. If the caller is cancelled meanwhile, the connection is closed.

    Otherwise its thread would outlive the event loop, and print a traceback when it reports to it.
    """

    async def connect() -> aiosqlite.Connection:
        return await aiosqlite.connect(database, isolation_level=None, **options)

    connecting = asyncio.ensure_future(connect())
    try:
        return await asyncio.shield(connecting)
    except asyncio.CancelledError:
        with suppress(sqlite3.Error):
            await (await connecting).close()
        raise


async def in_thread(connection: aiosqlite.Connection, function: Callable[[sqlite3.Connection], T]) -> T:
    """Run a function with the raw connection in aiosqlite's thread: one hop for a whole transaction.

    If the caller is cancelled, the function still runs to its end, and its result is dropped. aiosqlite has
    no public call for this. Only this function uses its private members.
    """
    execute: Callable[..., Coroutine[Any, Any, T]] = connection._execute
    return await execute(function, connection._conn)


def forgetting_damage(connection: sqlite3.Connection, function: Callable[[sqlite3.Connection], T]) -> T:
    """Run a function, and empty SQLite's cache if it met a damaged page. The cache would keep that page, and
    reads would still fail after the file is repaired."""
    try:
        return function(connection)
    except sqlite3.DatabaseError as exc:
        if (getattr(exc, "sqlite_errorname", None) or "").startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
            with suppress(sqlite3.Error):
                connection.execute("PRAGMA shrink_memory")
        raise


@contextmanager
def translated() -> Iterator[None]:
    """Translate the failures of SQLite to StoreUnavailable. A violated constraint is not translated."""
    try:
        yield
    except sqlite3.IntegrityError:
        raise
    except (sqlite3.Error, OSError) as exc:
        raise StoreUnavailable(f"SQLite: {describe(exc)}") from exc


def describe(exc: Exception) -> str:
    """Describe a failure of SQLite: its message, its name, and what to do about it."""
    name: str = getattr(exc, "sqlite_errorname", None) or type(exc).__name__
    hint = next((advice for prefix, advice in _ADVICE.items() if name.startswith(prefix)), "")
    return f"{exc} ({name}{hint})"
