"""Freezes in every engine: they hold across restarts and failed commits, and the log proves them."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from sidecar.core.command import Admitted, Denied, FreezeLifted, FreezeSet, Issued, LiftFreeze, SetFreeze
from sidecar.core.freeze import Freeze
from sidecar.core.instant import SECOND
from sidecar.errors import LogTampered, StoreUnavailable
from sidecar.ids import new_decision_id
from sidecar.store import sqlite
from sidecar.store.batch import Store
from sidecar.store.verify import verify_sqlite
from tests.store.conftest import OpenStore, admit, issue
from tests.support import Clock


async def set_freeze(store: Store, **more: Any) -> Freeze:
    reply = await store.submit(
        SetFreeze(**{"decision_id": new_decision_id(), "match": {}, "reason": "a test", **more})
    )
    assert isinstance(reply, FreezeSet)
    return reply.freeze


async def lift(store: Store, freeze: Freeze) -> None:
    reply = await store.submit(
        LiftFreeze(decision_id=new_decision_id(), freeze_id=freeze.freeze_id, reason="over")
    )
    assert isinstance(reply, FreezeLifted)


async def granted(store: Store) -> str:
    reply = await store.submit(issue(max_attempts=100, max_cost=50_000_000))
    assert isinstance(reply, Issued)
    return reply.scope.scope_id


async def code(store: Store, scope_id: str) -> str:
    reply = await store.submit(admit(scope_id, "retry_agent"))
    if isinstance(reply, Admitted):
        return "admitted"
    assert isinstance(reply, Denied)
    return reply.refusal.code


async def test_a_freeze_holds_from_its_commit_until_it_is_lifted(
    open_store: OpenStore, tmp_path: Path
) -> None:
    store = await open_store(tmp_path / "gate.db")
    scope_id = await granted(store)
    assert await code(store, scope_id) == "admitted"
    freeze = await set_freeze(store, match={"action": ("retry_*",)})
    other = await set_freeze(store, match={"action": ("other",)})
    assert await code(store, scope_id) == "frozen"
    await lift(store, other)
    assert await code(store, scope_id) == "frozen"
    await lift(store, freeze)
    assert await code(store, scope_id) == "admitted"
    found = await store.engine.scope(scope_id)
    assert found is not None
    assert found.attempts_used == 2
    assert await store.engine.freezes_in_force(store.now()) == []
    assert [each.freeze_id for each in await store.engine.freezes(limit=10)] == [
        other.freeze_id,
        freeze.freeze_id,
    ]


async def test_a_freeze_holds_after_a_restart_and_ends_at_its_time(
    open_store: OpenStore, tmp_path: Path, clock: Clock
) -> None:
    store = await open_store(tmp_path / "gate.db")
    scope_id = await granted(store)
    await set_freeze(store, ends_at=store.now() + 60 * SECOND)
    await store.close()
    again = await open_store(tmp_path / "gate.db")
    assert await code(again, scope_id) == "frozen"
    clock.move(61)
    assert await code(again, scope_id) == "admitted"
    # A later freeze is known beside the one that has ended.
    await set_freeze(again)
    assert await code(again, scope_id) == "frozen"


async def test_a_commit_that_fails_leaves_the_freezes_as_they_were(
    open_store: OpenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await open_store(tmp_path / "gate.db")
    scope_id = await granted(store)
    assert await code(store, scope_id) == "admitted"  # the writer knows the freezes now: none

    def fail(*_: object) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    with monkeypatch.context() as broken:
        broken.setattr(sqlite, "_save", fail)
        with pytest.raises(StoreUnavailable):
            await set_freeze(store)
    assert await code(store, scope_id) == "admitted"
    freeze = await set_freeze(store)
    with monkeypatch.context() as broken:
        broken.setattr(sqlite, "_save", fail)
        with pytest.raises(StoreUnavailable):
            await lift(store, freeze)
    assert await code(store, scope_id) == "frozen"


async def test_a_freeze_and_an_execution_of_one_batch_are_applied_in_their_order(
    open_store: OpenStore, tmp_path: Path
) -> None:
    import asyncio

    store = await open_store(tmp_path / "gate.db")
    scope_id = await granted(store)
    before = asyncio.create_task(code(store, scope_id))
    await asyncio.sleep(0)
    frozen = asyncio.create_task(set_freeze(store))
    await asyncio.sleep(0)
    after = asyncio.create_task(code(store, scope_id))
    assert (await before, (await frozen).reason, await after) == ("admitted", "a test", "frozen")


@pytest.mark.parametrize(
    "change",
    [
        "DELETE FROM freezes",
        "UPDATE freezes SET ends_at = set_at WHERE lifted_at IS NULL",
        'UPDATE freezes SET matching = \'{"action":["x"]}\' WHERE lifted_at IS NULL',
        'UPDATE freezes SET excepted = \'{"action":["*"]}\'',
        "UPDATE freezes SET matching = 'x'",
        "UPDATE freezes SET matching = '[]'",
        "UPDATE freezes SET matching = '{\"action\":5}'",
        "UPDATE freezes SET excepted = 'null'",
        "UPDATE freezes SET ends_at = 999999999999999999 WHERE ends_at IS NOT NULL",
        "UPDATE freezes SET tenant_id = 'other'",
        "UPDATE freezes SET reason = 'other'",
        "UPDATE freezes SET set_by = 'other'",
        "UPDATE freezes SET lifted_by = 'other' WHERE lifted_at IS NOT NULL",
        "UPDATE freezes SET lifted_for = 'other' WHERE lifted_at IS NOT NULL",
        "UPDATE freezes SET lifted_at = set_at, lifted_in = freeze_id WHERE lifted_at IS NULL",
        "UPDATE freezes SET lifted_at = NULL, lifted_in = NULL",
        "INSERT INTO freezes SELECT 'x', tenant_id, matching, excepted, reason, set_at, set_by, ends_at, "
        "NULL, NULL, NULL, NULL FROM freezes LIMIT 1",
        "UPDATE freezes SET lifted_in = (SELECT lifted_in FROM freezes WHERE lifted_in IS NOT NULL), "
        "lifted_at = (SELECT lifted_at FROM freezes WHERE lifted_in IS NOT NULL) WHERE lifted_at IS NULL",
    ],
)
async def test_a_freeze_that_is_not_as_the_log_says_is_found(
    open_store: OpenStore, tmp_path: Path, change: str
) -> None:
    path = tmp_path / "gate.db"
    store = await open_store(path)
    await set_freeze(store, match={"action": ("a*",)})
    await lift(store, await set_freeze(store, ends_at=store.now() + SECOND, excepted={"route": ("r",)}))
    await store.close()
    assert verify_sqlite(path).records == 3
    with closing(sqlite3.connect(path)) as raw, raw:
        raw.execute(change)
    with pytest.raises(LogTampered, match="freeze"):
        verify_sqlite(path)
