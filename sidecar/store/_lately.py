"""Caches the rows that the writer wrote lately, so that a batch reads only rows that are not cached yet.

An execution is settled soon after it was admitted, and scopes are used several times within minutes. The
cache stays true because only its writer changes these rows:

1. It learns what a transaction wrote once that is committed. A transaction that fails empties it, even if it
   was perhaps committed.
2. SQLite counts the commits of other connections (`PRAGMA data_version`). Where another program has changed
   the database, the cache is emptied before anything is read. The count belongs to one connection, so an
   engine that is opened again begins with an empty cache.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from typing import Generic, TypeVar

from sidecar.core.scope import Execution, Scope
from sidecar.store.base import Changes

MAX_SCOPES = 8_192
MAX_EXECUTIONS = 8_192

Row = TypeVar("Row", Scope, Execution)


class _Rows(Generic[Row]):
    """Rows by their ids. Beyond `max_rows`, the one that was written longest ago is dropped."""

    def __init__(self, max_rows: int) -> None:
        self._max_rows = max_rows
        self.by_id: dict[str, Row] = {}

    def put(self, row_id: str, row: Row) -> None:
        self.by_id.pop(row_id, None)
        self.by_id[row_id] = row
        if len(self.by_id) > self._max_rows:
            del self.by_id[next(iter(self.by_id))]


class LatelyWritten:
    """The scopes that were written lately, and the executions in flight among those."""

    def __init__(self, max_scopes: int = MAX_SCOPES, max_executions: int = MAX_EXECUTIONS) -> None:
        self._scopes: _Rows[Scope] = _Rows(max_scopes)
        self._executions: _Rows[Execution] = _Rows(max_executions)
        self._version: int | None = None

    def check(self, connection: sqlite3.Connection) -> bool:
        """Forget everything if another connection has changed the database. Return whether it has.

        `connection` is the writer's, within its transaction.
        """
        (version,) = connection.execute("PRAGMA data_version").fetchone()
        if version == self._version:
            return False
        self._version = version
        self.forget()
        return True

    def forget(self) -> None:
        self._scopes.by_id.clear()
        self._executions.by_id.clear()

    def learn(self, changes: Changes) -> None:
        """Add what a transaction has committed."""
        for scope in (*changes.issued, *changes.scopes):
            self._scopes.put(scope.scope_id, scope)
        for execution in changes.admitted:
            self._executions.put(execution.decision_id, execution)
        for execution in changes.executions:  # nearly always its last change
            self._executions.by_id.pop(execution.decision_id, None)

    def scopes(self, wanted: Iterable[str]) -> tuple[dict[str, Scope], list[str]]:
        """The cached scopes among the wanted ones, and the ids of the others."""
        return _divided(self._scopes.by_id, wanted)

    def executions(self, wanted: Iterable[str]) -> tuple[dict[str, Execution], list[str]]:
        """The cached executions among the wanted ones, and the ids of the others."""
        return _divided(self._executions.by_id, wanted)


def _divided(cached: dict[str, Row], wanted: Iterable[str]) -> tuple[dict[str, Row], list[str]]:
    found, others = {}, []
    for row_id in wanted:
        row = cached.get(row_id)
        if row is None:
            others.append(row_id)
        else:
            found[row_id] = row
    return found, others
