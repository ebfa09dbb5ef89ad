"""The limit of single records holds for denials whose callers gave up, too."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from sidecar.core.command import Denied, Reply, Revoke
from sidecar.errors import StoreUnavailable
from sidecar.gate import floods
from sidecar.gate.observer import Observer
from sidecar.gate.refusal_log import RefusalLog
from sidecar.ids import new_decision_id
from sidecar.store.batch import Store
from sidecar.store.sqlite import SqliteEngine
from sidecar.telemetry.metrics import Metrics
from tests.support import Clock


async def test_a_denial_that_is_recorded_late_counts_against_the_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(floods, "BURST", 1)
    clock, engine, may_commit = Clock(), SqliteEngine(None), asyncio.Event()
    store = Store(engine, clock=clock, elapsed=clock.elapsed, deadline_seconds=0.05)
    await store.open()
    transact = engine.transact

    async def held_up(*arguments: Any, **options: Any) -> None:
        await may_commit.wait()
        await transact(*arguments, **options)

    monkeypatch.setattr(engine, "transact", held_up)
    refusals = RefusalLog(store, Observer(Metrics()), clock=lambda: 0.0)
    arrived: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()

    def revocation() -> Revoke:
        return Revoke(decision_id=new_decision_id(), scope_id="sc_none", tenant_id="default")

    with pytest.raises(StoreUnavailable):
        await refusals.submit(revocation(), late=arrived.set_result)
    may_commit.set()
    late = await arrived
    assert isinstance(late, Denied)
    assert late.decision_id is not None
    store.deadline_seconds = 5.0
    denied = await refusals.submit(revocation(), late=lambda reply: None)
    assert isinstance(denied, Denied)
    assert denied.decision_id is None, "the one record of the burst was the late one"
    await store.close()
