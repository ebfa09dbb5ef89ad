"""What the writer wrote lately is not read again, unless a failure or another program came between."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from sidecar.core.command import Admitted, Denied, Issued, Settle, Settled
from sidecar.core.scope import Execution, Scope
from sidecar.errors import StoreUnavailable
from sidecar.ids import new_decision_id
from sidecar.store import _rows as rows
from sidecar.store._lately import LatelyWritten
from sidecar.store.base import Changes
from sidecar.store.batch import Store
from sidecar.store.sqlite import SqliteEngine
from tests.store.conftest import OpenStore, admit, issue
from tests.store.test_lately_at_random import held_against_the_database
from tests.support import Clock


async def granted(store: Store, **terms: Any) -> Scope:
    reply = await store.submit(issue(**terms))
    assert isinstance(reply, Issued)
    return reply.scope


def changes(
    *, issued: tuple[Scope, ...] = (), admitted: tuple[Execution, ...] = (), ended: tuple[Execution, ...] = ()
) -> Changes:
    return Changes(
        now=0,
        issued=issued,
        scopes=(),
        admitted=admitted,
        executions=ended,
        log=(),
        kept=(),
        turned=(),
        bound=(),
    )


async def test_an_admission_and_its_settlement_read_no_rows_that_were_just_written(
    open_store: OpenStore,
) -> None:
    store = await open_store(None)
    scope = await granted(store)
    with mock.patch.object(rows, "scope_from_row", side_effect=AssertionError("was read")):
        admitted = await store.submit(admit(scope.scope_id))
        assert isinstance(admitted, Admitted)
        settled = await store.submit(
            Settle(
                decision_id=new_decision_id(),
                admission_id=admitted.execution.decision_id,
                outcome="answered",
            )
        )
    assert isinstance(settled, Settled)
    assert settled.scope is not None
    assert settled.scope.attempts_used == 1


async def test_a_change_by_another_program_counts_at_once(open_store: OpenStore, tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    store = await open_store(path)
    scope = await granted(store)
    with closing(sqlite3.connect(path)) as other:
        other.execute("UPDATE scopes SET attempts_used = max_attempts")
        other.commit()
    assert isinstance(await store.submit(admit(scope.scope_id)), Denied)
    held_against_the_database(store, path)


async def test_a_failed_transaction_leaves_nothing_cached(open_store: OpenStore, tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    store = await open_store(path)
    scope = await granted(store)
    assert held_against_the_database(store, path) == 1
    assert isinstance(store.engine, SqliteEngine)
    # The check comes before the commit, so the admission is undone.
    moved = mock.patch.object(store.engine, "_check_files", side_effect=StoreUnavailable("moved"))
    with moved, pytest.raises(StoreUnavailable, match="moved"):
        await store.submit(admit(scope.scope_id))
    assert held_against_the_database(store, path) == 0
    admitted = await store.submit(admit(scope.scope_id))
    assert isinstance(admitted, Admitted)
    assert admitted.execution.attempt_number == 1


async def test_an_engine_that_is_opened_again_has_nothing_cached(tmp_path: Path, clock: Clock) -> None:
    # SQLite counts the commits of others for each connection anew, so the old count says nothing.
    path, engine = tmp_path / "store.db", SqliteEngine(tmp_path / "store.db")
    store = Store(engine, clock=clock, elapsed=clock.elapsed, deadline_seconds=5.0)
    await store.open()
    scope = await granted(store)
    await store.close()
    with closing(sqlite3.connect(path)) as other:
        other.execute("UPDATE scopes SET attempts_used = max_attempts")
        other.commit()
    again = Store(engine, clock=clock, elapsed=clock.elapsed, deadline_seconds=5.0)
    await again.open()
    try:
        assert isinstance(await again.submit(admit(scope.scope_id)), Denied)
    finally:
        await again.close()


async def test_the_rows_written_longest_ago_are_dropped(open_store: OpenStore) -> None:
    store = await open_store(None)
    scopes = [(await granted(store)) for _ in range(3)]
    replies = [await store.submit(admit(scope.scope_id)) for scope in scopes]
    executions = [reply.execution for reply in replies if isinstance(reply, Admitted)]
    cached = LatelyWritten(max_scopes=2, max_executions=2)
    cached.learn(changes(issued=tuple(scopes), admitted=tuple(executions)))
    ids = [scope.scope_id for scope in scopes]
    assert cached.scopes(ids) == ({ids[1]: scopes[1], ids[2]: scopes[2]}, ids[:1])
    names = [execution.decision_id for execution in executions]
    assert cached.executions(names)[1] == names[:1]
    # A row that is written again counts as new.
    cached.learn(changes(issued=(scopes[1],)))
    cached.learn(changes(issued=(scopes[0],)))
    assert cached.scopes(ids)[1] == ids[2:]
    # An execution that has ended is not kept.
    cached.learn(changes(ended=(replace(executions[2], status="answered"),)))
    assert cached.executions(names)[1] == [names[0], names[2]]
