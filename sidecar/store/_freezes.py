"""Freezes in SQLite: their rows, and those in force as the writer knows them.

Only the writer changes freezes, and every admission reads those in force. So the writer keeps them in memory.
What it keeps is true for the same reasons as the cache of rows in `_lately`: it learns a change once that is
committed, and forgets everything after a failure or when another program has changed the database.
"""

from __future__ import annotations

import sqlite3
from typing import Any

import orjson

from sidecar.core.freeze import Freeze, written
from sidecar.core.state import Names
from sidecar.store.base import Changes

COLUMNS = (
    "freeze_id, tenant_id, matching, excepted, reason, set_at, set_by, ends_at, lifted_at, lifted_by, "
    "lifted_for, lifted_in"
)
# A freeze is set once and lifted once.
SAVE = f"""
    INSERT INTO freezes ({COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
    ON CONFLICT (freeze_id) DO UPDATE SET
        lifted_at = excluded.lifted_at, lifted_by = excluded.lifted_by,
        lifted_for = excluded.lifted_for, lifted_in = excluded.lifted_in"""
IN_FORCE = f"SELECT {COLUMNS} FROM freezes WHERE lifted_at IS NULL AND (ends_at IS NULL OR ends_at > ?)"
NAMED = f"SELECT {COLUMNS} FROM freezes WHERE freeze_id = ?"
NEWEST = f"SELECT {COLUMNS} FROM freezes ORDER BY set_at DESC, freeze_id DESC LIMIT ?"


class FreezesInForce:
    """The freezes that are in force, or were when a transaction last changed one."""

    def __init__(self) -> None:
        self.known: dict[str, Freeze] | None = None

    def load(self, connection: sqlite3.Connection, names: Names) -> dict[str, Freeze]:
        """The freezes in force, if a command needs them, and those that are named."""
        if names.frozen_at is None and not names.freezes:
            return {}
        if self.known is None and names.frozen_at is not None:
            rows = connection.execute(IN_FORCE, (names.frozen_at,))
            self.known = {row[0]: from_row(row) for row in rows}
        found = self.known or {}
        for freeze_id in names.freezes:
            row = None if freeze_id in found else connection.execute(NAMED, (freeze_id,)).fetchone()
            if row is not None:
                found = {**found, freeze_id: from_row(row)}
        return found

    def learn(self, changes: Changes) -> None:
        """Add what a transaction has committed."""
        if self.known is None:
            return
        known = self.known | {freeze.freeze_id: freeze for freeze in changes.freezes}
        self.known = {name: freeze for name, freeze in known.items() if freeze.is_in_force(changes.now)}

    def forget(self) -> None:
        self.known = None


def from_row(row: tuple[Any, ...]) -> Freeze:
    return Freeze(
        freeze_id=row[0],
        tenant_id=row[1],
        match=_pattern(row[2]),
        excepted=_pattern(row[3]),
        reason=row[4],
        set_at=row[5],
        set_by=row[6],
        ends_at=row[7],
        lifted_at=row[8],
        lifted_by=row[9],
        lifted_for=row[10],
        lifted_in=row[11],
    )


def to_row(freeze: Freeze) -> tuple[Any, ...]:
    return (
        freeze.freeze_id,
        freeze.tenant_id,
        orjson.dumps(written(freeze.match)).decode(),
        orjson.dumps(written(freeze.excepted)).decode(),
        freeze.reason,
        freeze.set_at,
        freeze.set_by,
        freeze.ends_at,
        freeze.lifted_at,
        freeze.lifted_by,
        freeze.lifted_for,
        freeze.lifted_in,
    )


def _pattern(text: str) -> dict[str, tuple[str, ...]]:
    return {fact: tuple(globs) for fact, globs in orjson.loads(text).items()}
