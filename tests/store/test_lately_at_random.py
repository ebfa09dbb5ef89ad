"""The rows that the writer wrote lately are the rows that the database holds, whatever happens to either."""

from __future__ import annotations

import asyncio
import random
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Literal

import pytest

from sidecar.core.command import (
    AcceptClock,
    Admitted,
    Command,
    Denied,
    Issued,
    Reconcile,
    Reply,
    Revoke,
    Settle,
)
from sidecar.errors import StoreUnavailable
from sidecar.ids import new_decision_id
from sidecar.store import _rows as rows
from sidecar.store import sqlite
from sidecar.store._lately import LatelyWritten
from sidecar.store.base import Changes
from sidecar.store.batch import Store
from sidecar.store.sqlite import SqliteEngine
from tests.store.conftest import OpenStore, admit, issue
from tests.support import Clock

OUTCOMES: tuple[Literal["answered", "not_sent", "unknown"], ...] = ("answered", "not_sent", "unknown")


def cache_of(store: Store) -> LatelyWritten:
    assert isinstance(store.engine, SqliteEngine)
    return store.engine._lately


def held_against_the_database(store: Store, path: Path) -> int:
    """How many rows the writer knows; each is compared with the row in the database."""
    lately = cache_of(store)
    with closing(sqlite3.connect(path)) as connection:
        scopes = {
            scope.scope_id: scope
            for scope in map(
                rows.scope_from_row, connection.execute(f"SELECT {rows.SCOPE_COLUMNS} FROM scopes")
            )
        }
        executions = {
            execution.decision_id: execution
            for execution in map(
                rows.execution_from_row,
                connection.execute(f"SELECT {rows.EXECUTION_COLUMNS} FROM executions"),
            )
        }
    known_scopes, known_executions = lately._scopes.by_id, lately._executions.by_id
    assert known_scopes == {name: scopes[name] for name in known_scopes}
    assert known_executions == {name: executions[name] for name in known_executions}
    return len(known_scopes) + len(known_executions)


async def submitted(store: Store, commands: Sequence[Command]) -> list[Reply]:
    replies = await asyncio.gather(*map(store.submit, commands), return_exceptions=True)
    for reply in replies:
        assert not isinstance(reply, BaseException) or isinstance(reply, StoreUnavailable), reply
    return [reply for reply in replies if not isinstance(reply, BaseException)]


async def test_what_the_writer_knows_is_what_the_database_holds(
    open_store: OpenStore, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    dice = random.Random(11)
    path = tmp_path / "store.db"
    store = await open_store(path)
    assert isinstance(store.engine, SqliteEngine)
    store.engine._lately = LatelyWritten(max_scopes=8, max_executions=8)
    scopes: list[str] = []
    flying: list[str] = []
    ended: list[str] = []
    compared = 0
    kinds: set[type[object]] = set()
    for _ in range(300):
        commands: list[Command] = []
        for _ in range(dice.randint(1, 6)):
            step = dice.random()
            if step < 0.2 or not scopes:
                commands.append(issue(max_attempts=dice.randint(1, 5), ttl=dice.choice([1, 300])))
            elif step < 0.6:
                commands.append(admit(dice.choice(scopes[-12:]), dice.choice(["failover", "retry_agent"])))
            elif step < 0.8 and flying:
                admission_id = dice.choice(flying)
                cost = dice.choice([None, 0, 50_000, 900_000])
                commands.append(
                    Settle(
                        decision_id=new_decision_id(),
                        admission_id=admission_id,
                        outcome=dice.choice(OUTCOMES),
                        cost=cost,
                    )
                )
                ended.append(admission_id)
            elif step < 0.9 and ended:
                commands.append(
                    Reconcile(
                        decision_id=new_decision_id(),
                        admission_id=dice.choice(ended),
                        outcome=dice.choice(["executed", "not_executed"]),
                    )
                )
            else:
                commands.append(Revoke(decision_id=new_decision_id(), scope_id=dice.choice(scopes[-12:])))
        trouble = dice.random()
        if trouble < 0.1:
            with monkeypatch.context() as patch:
                patch.setattr(SqliteEngine, "_check_wal", _fails)  # the commit has taken effect
                await submitted(store, commands)
        elif trouble < 0.2:
            with monkeypatch.context() as patch:
                patch.setattr(sqlite, "_save", _saves_and_fails)
                await submitted(store, commands)
        elif trouble < 0.3:
            with closing(sqlite3.connect(path)) as other, other:  # an operator's hand
                changed = dice.choice(["", *scopes[-8:]])
                other.execute("UPDATE scopes SET revoked_at = 5 WHERE scope_id = ?", (changed,))
            await submitted(store, commands)
        elif trouble < 0.4:
            clock.move(2)
            await submitted(store, commands)
        elif trouble < 0.45:
            clock.set(-3)
            await submitted(store, [AcceptClock(decision_id=new_decision_id())])
        else:
            for reply in await submitted(store, commands):
                kinds.add(type(reply))
                if isinstance(reply, Issued):
                    scopes.append(reply.scope.scope_id)
                elif isinstance(reply, Admitted):
                    flying.append(reply.execution.decision_id)
        await store.check()
        compared += held_against_the_database(store, path)
        assert len(cache_of(store)._scopes.by_id) <= 8
        assert len(cache_of(store)._executions.by_id) <= 8
    assert compared > 1_000
    assert {Issued, Admitted, Denied} <= kinds


def _fails(engine: SqliteEngine) -> None:
    raise StoreUnavailable("the disk is gone")


def _saves_and_fails(connection: sqlite3.Connection, changes: Changes) -> None:
    _save(connection, changes)
    raise StoreUnavailable("the disk is full")


_save = sqlite._save
