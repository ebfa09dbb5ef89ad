"""Applies numbered .sql files to a database. `user_version` holds the number of the last one applied."""

from __future__ import annotations

import sqlite3
from importlib import resources

from sidecar.errors import StoreUnavailable


def migrations(engine: str) -> list[tuple[int, str, str]]:
    """(number, file name, SQL) of each migration of an engine, in order."""
    folder = resources.files("sidecar.store") / "sql" / engine
    files = sorted(
        (entry.name, entry.read_text("utf-8")) for entry in folder.iterdir() if entry.name.endswith(".sql")
    )
    return [(int(name.split("_", 1)[0]), name, sql) for name, sql in files]


def migrate(connection: sqlite3.Connection) -> None:
    """Apply the missing migrations, each in its own transaction.

    Raises StoreUnavailable if the database is newer than this program.
    """
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    steps = migrations("sqlite")
    if version > steps[-1][0]:
        raise StoreUnavailable(
            f"the database has schema version {version}, this sidecar knows {steps[-1][0]}: "
            "use a newer sidecar"
        )
    for number, _, sql in steps:
        if number > version:
            connection.executescript(f"BEGIN IMMEDIATE;\n{sql}\nPRAGMA user_version = {number};\nCOMMIT;")
