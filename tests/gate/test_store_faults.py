"""The store is gone, full, moved, slow or behind its time: nothing is forwarded, the cause is named (G6)."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from sidecar.errors import StoreUnavailable
from sidecar.store.sqlite import SqliteEngine, _in_thread
from tests.support import (
    EXECUTE,
    Backend,
    Clock,
    House,
    Message,
    Open,
    connect,
    eventually,
    opened,
    read_message,
    replies,
    request_bytes,
    serving_backend,
)


def engine_of(house: House) -> SqliteEngine:
    engine = house.sidecar.store.engine
    assert isinstance(engine, SqliteEngine)
    return engine


async def limit_pages(house: House, pages: int) -> None:
    writer = engine_of(house)._writer
    assert writer is not None

    def limit(connection: sqlite3.Connection) -> None:
        connection.execute(f"PRAGMA max_page_count = {pages}").fetchone()

    await _in_thread(writer, limit)


class SlowStore:
    """Makes the transactions of a house wait until `free` is set, as a disk that hangs would."""

    def __init__(self, house: House) -> None:
        self.entered = asyncio.Event()
        self.free = asyncio.Event()
        engine = house.sidecar.store.engine
        transact = engine.transact

        async def slowly(*args: Any, **options: Any) -> None:
            self.entered.set()
            await self.free.wait()
            await transact(*args, **options)

        self._patch = mock.patch.object(engine, "transact", slowly)

    def __enter__(self) -> SlowStore:
        self._patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.free.set()
        self._patch.stop()


def assert_unavailable(answer: Message, *words: str) -> None:
    assert answer.status == 503, answer.body
    body = answer.json()
    assert body["error"] == "store_unavailable"
    assert int(answer.header("Retry-After") or "") >= 1
    for word in words:
        assert word in body["message"]
    assert "decision_id" not in body


async def test_a_moved_database_closes_the_gate_until_it_is_back(house: House, backend: Backend) -> None:
    scope = await house.issue(max_attempts=3)
    away = house.database.with_suffix(".away")
    os.rename(house.database, away)
    for _ in range(2):
        assert_unavailable(await house.execute(scope), str(house.database), "moved")
    assert_unavailable(await house.ask_for_scope(), str(house.database))
    assert_unavailable(await house.revoke(scope), str(house.database))
    assert backend.seen == []
    assert (await house.data("GET", "/elsewhere")).status == 200
    assert (await house.data("GET", "/api/v1/recovery/execute")).status == 200
    status, reasons = await house.ready()
    assert status == 503
    assert "moved" in reasons["store"]
    assert await house.metric("scopegate_store_failures_total") >= 3
    os.rename(away, house.database)
    assert (await house.ready())[0] == 200
    answer = await house.execute(scope)
    assert (answer.status, answer.header("Scopegate-Attempts-Remaining")) == (200, "2")


@pytest.mark.parametrize("suffix", ["", "-wal"])
async def test_an_unlinked_database_closes_the_gate(house: House, backend: Backend, suffix: str) -> None:
    scope = await house.issue()
    gone = Path(f"{house.database}{suffix}")
    os.unlink(gone)
    assert_unavailable(await house.execute(scope), str(gone))
    assert backend.seen == []
    assert (await house.data("GET", "/elsewhere")).status == 200


async def test_a_full_store_closes_the_gate_until_there_is_room(house: House, backend: Backend) -> None:
    scope = await house.issue(max_attempts=10)
    await limit_pages(house, 1)
    padding: dict[str, Any] = {"parameters": {"padding": "x" * 15_000}}
    answer = await house.execute(scope, **padding)
    assert_unavailable(answer, "full")
    assert backend.seen == []
    assert (await house.data("GET", "/elsewhere")).status == 200
    await limit_pages(house, 1_000_000)
    answer = await house.execute(scope, **padding)
    assert (answer.status, answer.header("Scopegate-Attempts-Remaining")) == (200, "9")


async def test_a_store_slower_than_its_deadline_closes_the_gate_and_the_late_admission_is_given_back(
    open_house: Open,
) -> None:
    house = await open_house(store={"deadline_seconds": 0.1})
    scope = await house.issue(action="failover", max_attempts=1)
    with SlowStore(house) as store:
        assert_unavailable(await house.execute(scope), "0.1 s")
        store.free.set()

        async def given_back() -> bool:
            return len(await house.records("&event=settled")) == 1

        await eventually(given_back)
    (execution,) = (await house.admin("GET", "/api/v1/executions")).json()["executions"]
    assert execution["status"] == "not_sent"
    assert house.backend.seen == []
    listed = await house.scope(scope)
    assert (listed["attempts_used"], listed["cost_used_usd"]) == (0, 0)
    assert (await house.execute(scope)).status == 200


async def test_a_client_that_hangs_up_while_the_store_is_slow_is_executed_and_settled(
    house: House, backend: Backend
) -> None:
    """G9: once an admission is submitted the request runs to its end."""
    scope = await house.issue()
    with SlowStore(house) as store:
        executing = asyncio.create_task(house.execute(scope))
        await store.entered.wait()
        executing.cancel()
        await asyncio.sleep(0.02)
        store.free.set()
        await backend.arrived.wait()
    execution = await house.ended(backend.seen[0].header("Scopegate-Decision-Id") or "")
    assert execution["status"] == "answered"


@asynccontextmanager
async def settlements_fail(house: House) -> AsyncIterator[None]:
    """While the backend works the store breaks; admissions before that were committed."""
    engine = house.sidecar.store.engine

    async def broken(*args: Any, **options: Any) -> None:
        raise StoreUnavailable("the disk is on fire")

    patch = mock.patch.object(engine, "transact", broken)
    script = house.backend.script

    async def then_break(request: Message, writer: asyncio.StreamWriter) -> None:
        patch.start()
        await script(request, writer)

    house.backend.script = then_break
    try:
        yield
    finally:
        house.backend.script = script
        patch.stop()


async def test_a_settlement_that_cannot_be_written_is_kept_and_the_client_gets_its_answer(
    house: House, backend: Backend
) -> None:
    backend.script = replies(headers=[("X-Recovery-Cost-USD", "0.3")])
    scope = await house.issue(action="failover", max_attempts=3, max_cost_usd=5)
    async with settlements_fail(house):
        answer = await house.execute(scope)
        assert answer.status == 200
        assert answer.body == b'{"done": true}'
        assert answer.header("Scopegate-Decision-Id")
        assert await house.metric("scopegate_unsettled") == 1
        record = await house.record(answer.header("Scopegate-Decision-Id") or "")
        assert record["execution"]["status"] == "in_flight"
        assert (await house.scope(scope))["cost_used_usd"] == 0.1
    execution = await house.ended(answer.header("Scopegate-Decision-Id") or "")
    assert (execution["status"], execution["cost_usd"], execution["http_status"]) == ("answered", 0.3, 200)
    assert await house.metric("scopegate_unsettled") == 0
    assert (await house.scope(scope))["status"] == "exhausted"


async def test_an_overrun_is_counted_though_its_settlement_was_late(house: House, backend: Backend) -> None:
    backend.script = replies(headers=[("X-Recovery-Cost-USD", "0.3")])
    scope = await house.issue(action="failover", max_cost_usd=5)
    async with settlements_fail(house):
        answer = await house.execute(scope)
    await house.ended(answer.header("Scopegate-Decision-Id") or "")
    assert await house.metric("scopegate_cost_overruns_total") == 1


# Time ---------------------------------------------------------------------------------------------------


async def test_a_clock_more_than_a_minute_behind_closes_the_gate(house: House, backend: Backend) -> None:
    scope = await house.issue()
    house.clock.move(-59)
    assert (await house.ready())[0] == 200
    house.clock.move(-2)
    answer = await house.execute(scope)
    assert answer.status == 503
    assert answer.header("Retry-After")
    assert "clock" in answer.json()["message"]
    assert (await house.ask_for_scope()).status == 503
    assert backend.seen == []
    status, reasons = await house.ready()
    assert (status, list(reasons)) == (503, ["clock"])
    assert (await house.data("GET", "/elsewhere")).status == 200
    house.clock.set(61)
    assert (await house.execute(scope)).status == 200
    assert (await house.ready())[0] == 200


async def test_a_clock_a_little_behind_makes_no_scope_live_longer_in_the_log(
    house: House, clock: Clock
) -> None:
    first = await house.issue()
    clock.move(-30)
    second = await house.issue()
    assert second["expires_at"] >= first["expires_at"]
    times = [record["decided_at"] for record in await house.records()]
    assert times == sorted(times, reverse=True)


# Draining -----------------------------------------------------------------------------------------------


async def test_while_draining_a_gated_request_is_refused_and_readiness_is_off(
    open_house: Open, tmp_path: Path
) -> None:
    folder = tmp_path / "draining"
    os.mkdir(folder)
    done = asyncio.Event()
    async with serving_backend() as backend:
        backend.script = replies(after=done)
        async with opened(folder, backend, shutdown={"drain_seconds": 5}) as house:
            scope = await house.issue(max_attempts=3)
            reader, writer = await connect(house.sidecar.data_address)
            executing = asyncio.create_task(house.execute(scope))
            await backend.arrived.wait()
            stopping = asyncio.create_task(house.sidecar.stop())
            await asyncio.sleep(0.02)
            kind, body = house.execution(scope)
            writer.write(request_bytes("POST", EXECUTE, kind, body))
            answer = await read_message(reader)
            assert answer is not None
            assert (answer.status, answer.json()["error"]) == (503, "draining")
            assert answer.header("Retry-After")
            assert answer.json()["decision_id"]
            status, reasons = await house.ready()
            assert (status, list(reasons)) == (503, ["draining"])
            done.set()
            assert (await executing).status == 200
            await stopping
            writer.close()
            with pytest.raises(OSError):
                await house.data("GET", "/")
