"""Numbered .sql files bring a database up to date; `user_version` says how far it is."""

from __future__ import annotations

import sqlite3
from importlib import resources

from sidecar.errors import StoreUnavailable


def migrations(engine: str) -> list[tuple[int, str, str]]:
    """(number, file name, SQL) of an engine's migrations, in order."""
    folder = resources.files("sidecar.store") / "sql" / engine
    files = sorted(
        (entry.name, entry.read_text("utf-8")) for entry in folder.iterdir() if entry.name.endswith(".sql")
    )
    return [(int(name.split("_", 1)[0]), name, sql) for name, sql in files]


def migrate(connection: sqlite3.Connection) -> None:
    """Apply what is missing, each file in a transaction of its own. A newer database is refused."""
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
