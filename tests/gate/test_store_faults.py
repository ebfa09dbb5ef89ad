"""The store is gone, full, moved, slow or behind its time: nothing is forwarded, the cause is named (G6)."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from sidecar.core.instant import iso_time
from sidecar.core.policy import Brake, Rule
from sidecar.errors import StoreUnavailable
from sidecar.store.base import ExecutionsWanted
from sidecar.store.connection import in_thread
from sidecar.store.sqlite import SqliteEngine
from sidecar.store.verify import verify_sqlite
from tests.client import Message, connect, read_message, request_bytes
from tests.gate.test_policies import with_rules
from tests.support import (
    EXECUTE,
    SECOND,
    Backend,
    Clock,
    House,
    Open,
    eventually,
    opened,
    replies,
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

    await in_thread(writer, limit)


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


async def test_of_an_answer_whose_settlement_waits_a_repeat_gets_the_status_once_it_is_written(
    house: House, backend: Backend
) -> None:
    """The bodies of waiting settlements would fill the memory."""
    key = [("Idempotency-Key", "the-action-1")]
    scope = await house.issue()
    async with settlements_fail(house):
        answer = await house.execute(scope, headers=key)
        assert answer.body == b'{"done": true}'
        refused = await house.execute(scope, headers=key)
        assert (refused.status, refused.json()["error"]) == (503, "store_unavailable")
    decision_id = answer.header("Scopegate-Decision-Id") or ""
    assert (await house.ended(decision_id))["status"] == "answered"
    repeat = await house.execute(scope, headers=key)
    assert (repeat.status, repeat.header("Idempotency-Replayed")) == (200, "true")
    assert repeat.json() == {"status": 200, "decision_id": decision_id}
    assert len(backend.executions) == 1


async def test_an_overrun_is_counted_though_its_settlement_was_late(house: House, backend: Backend) -> None:
    backend.script = replies(headers=[("X-Recovery-Cost-USD", "0.3")])
    scope = await house.issue(action="failover", max_cost_usd=5)
    async with settlements_fail(house):
        answer = await house.execute(scope)
    await house.ended(answer.header("Scopegate-Decision-Id") or "")
    assert await house.metric("scopegate_cost_overruns_total") == 1


async def test_an_execution_that_is_cancelled_while_its_settlement_is_committed_gets_the_reply(
    house: House, backend: Backend
) -> None:
    """As the end of a drain cancels it. The answer and the metrics know the settled scope."""
    answering, slow = replies(headers=[("X-Recovery-Cost-USD", "0.3")]), SlowStore(house)
    with ExitStack() as until_cancelled:

        async def then_slow(request: Message, writer: asyncio.StreamWriter) -> None:
            until_cancelled.enter_context(slow)
            await answering(request, writer)

        backend.script = then_slow
        scope = await house.issue(action="failover", max_attempts=3, max_cost_usd=0.3)
        executing = asyncio.create_task(house.execute(scope))
        await slow.entered.wait()
        (flight,) = house.sidecar.gate._in_flight
        for _ in range(2):
            flight.task.cancel()
            await asyncio.sleep(0)
    answer = await executing
    assert (answer.status, answer.header("Scopegate-Scope-Status")) == (200, "exhausted")
    assert await house.metric("scopegate_cost_overruns_total") == 1
    (record,) = await house.records("&event=settled")
    assert record["admission_id"] == answer.header("Scopegate-Decision-Id")


async def test_a_grant_that_is_committed_after_its_deadline_is_revoked_and_its_record_says_why(
    open_house: Open,
) -> None:
    house = await open_house(store={"deadline_seconds": 0.1})
    with SlowStore(house) as store:
        assert_unavailable(await house.ask_for_scope(), "0.1 s")
        store.free.set()

        async def taken_back() -> bool:
            return len(await house.records("&event=revoked")) == 1

        await eventually(taken_back)
    (listed,) = (await house.admin("GET", "/api/v1/scopes")).json()["scopes"]
    assert listed["status"] == "revoked"
    (record,) = await house.records("&event=revoked")
    assert record["scope_id"] == listed["scope_id"]
    assert record["details"]["cause"] == "the scope was committed only after its request had been given up"
    assert record["decision_inputs"]["principal"] == "scopegate"


# Readiness ----------------------------------------------------------------------------------------------


async def checks(house: House) -> set[str]:
    """What is not well, as the metrics say it; scraping makes no fresh look at the store."""
    found = {name: await house.metric(f'scopegate_ready{{check="{name}"}}') for name in CHECKS}
    return {name for name, value in found.items() if value != 1}


CHECKS = ("store", "log", "policies", "clock", "draining")


async def test_a_commit_that_fails_turns_readiness_off_at_once_and_one_that_succeeds_on_again(
    house: House,
) -> None:
    scope = await house.issue(max_attempts=3)
    assert (await house.ready())[0] == 200
    engine = engine_of(house)
    broken = mock.AsyncMock(side_effect=StoreUnavailable("the disk is on fire"))
    with mock.patch.object(engine, "transact", broken), mock.patch.object(engine, "rehearse", broken):
        assert_unavailable(await house.execute(scope), "fire")
        assert await checks(house) == {"store", "log"}
        for _ in range(3):  # though the small write of a probe would succeed
            status, reasons = await house.ready()
            assert (status, set(reasons)) == (503, {"store", "log"})
            assert "fire" in reasons["store"]
    assert (await house.execute(scope)).status == 200
    assert await checks(house) == set()
    assert (await house.ready())[0] == 200


async def test_readiness_stays_off_where_a_probe_fits_and_a_decision_does_not(house: House) -> None:
    scope = await house.issue()
    await limit_pages(house, 1)
    assert_unavailable(await house.execute(scope, parameters={"padding": "x" * 15_000}), "full")
    await engine_of(house).probe()
    for _ in range(3):
        assert (await house.ready())[0] == 503
    await limit_pages(house, 1_000_000)
    assert (await house.ready())[0] == 200


@pytest.mark.parametrize("failing", ["storage", "command", "deadline"])
async def test_readiness_recovers_without_traffic_and_without_being_asked(
    open_house: Open, failing: str
) -> None:
    house = await open_house(store={"deadline_seconds": 0.2})
    scope = await house.issue(max_attempts=3)
    store = house.sidecar.store
    if failing == "deadline":
        with SlowStore(house):
            assert_unavailable(await house.execute(scope), "0.2 s")
            assert store.last_error is not None
    else:
        cause = StoreUnavailable("a fault") if failing == "storage" else RuntimeError("a fault")
        with mock.patch.object(engine_of(house), "transact", side_effect=cause):
            assert_unavailable(await house.execute(scope), "a fault")
        assert store.last_error is not None

    async def recovered() -> bool:
        return store.last_error is None

    await eventually(recovered)
    assert (await house.ready())[0] == 200
    assert len(await house.records("&event=issued")) == 1


async def test_readiness_stays_off_where_a_table_that_decisions_need_is_gone(house: House) -> None:
    scope = await house.issue()
    writer = engine_of(house)._writer
    assert writer is not None

    def rename(before: str, after: str) -> Any:
        return lambda connection: connection.execute(f"ALTER TABLE {before} RENAME TO {after}")

    await in_thread(writer, rename("executions", "elsewhere"))
    assert_unavailable(await house.execute(scope))
    for _ in range(2):
        assert (await house.ready())[0] == 503
    await in_thread(writer, rename("elsewhere", "executions"))
    assert (await house.ready())[0] == 200
    assert (await house.execute(scope)).status == 200


async def test_a_rehearsed_decision_leaves_nothing_behind(house: House) -> None:
    await house.issue()
    before = await house.records()
    store = house.sidecar.store
    store.last_error = "a fault"
    await store.check()
    assert await house.records() == before
    page = await store.engine.executions(ExecutionsWanted(), before=None, limit=10)
    assert not page.rows
    writer = engine_of(house)._writer
    assert writer is not None
    left = await in_thread(
        writer, lambda connection: connection.execute("SELECT key FROM meta ORDER BY key").fetchall()
    )
    assert left == [("probe",), ("writer",)]


async def test_a_second_sidecar_is_kept_out_though_the_lock_file_is_gone_and_the_first_goes_on(
    house: House, backend: Backend
) -> None:
    scope = await house.issue()
    os.unlink(f"{house.database}.lock")
    with pytest.raises(StoreUnavailable, match="in use"):
        async with opened(house.database.parent, backend):
            pass
    assert (await house.execute(scope)).status == 200
    assert (await house.ready())[0] == 200


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


DAY = 86_400


async def accept_clock(house: House) -> dict[str, Any]:
    answer = await house.admin("POST", "/api/v1/store/accept-clock")
    assert answer.status == 200, answer.body
    told: dict[str, Any] = answer.json()
    return told


def assert_refused_by_the_clock(answer: Message) -> None:
    assert (answer.status, answer.json()["error"], answer.json()["cause"]) == (
        503,
        "store_unavailable",
        "clock",
    )
    assert "scopegate store accept-clock --config FILE" in answer.json()["message"]
    assert int(answer.header("Retry-After") or "") >= 1


async def test_a_clock_that_jumps_ahead_decides_nothing_and_no_record_has_its_time(
    house: House, backend: Backend, clock: Clock
) -> None:
    scope, other = await house.issue(), await house.issue()
    before = clock()
    clock.set(DAY)
    assert_refused_by_the_clock(await house.execute(scope))
    assert_refused_by_the_clock(await house.ask_for_scope())
    assert backend.seen == []
    status, reasons = await house.ready()
    assert (status, list(reasons)) == (503, ["clock"])
    told = (await house.admin("GET", "/api/v1/status")).json()["clock"]
    assert not told["ok"]
    assert "jumped" in told["reason"]
    assert (await house.revoke(other)).status == 200
    body = {"request_id": "req", "routed": True, "selected_agent": "a", "eligible_agents": ["a"]}
    emitted = await house.admin("POST", "/api/v1/decisions/routing", body)
    assert emitted.status in (200, 201), emitted.body
    limit = iso_time(before + 600 * SECOND)
    assert all(record["decided_at"] < limit for record in await house.records())
    clock.set(-DAY)
    assert (await house.execute(scope)).status == 200
    assert (await house.ready())[0] == 200


async def test_a_jump_between_the_look_and_the_commit_admits_nothing(
    house: House, backend: Backend, clock: Clock
) -> None:
    scope = await house.issue()
    with SlowStore(house) as store:
        first = asyncio.create_task(house.ask_for_scope())
        await store.entered.wait()
        second = asyncio.create_task(house.execute(scope))

        async def waits() -> bool:
            return house.sidecar.store.waiting == 1

        await eventually(waits)
        clock.set(DAY)
        store.free.set()
        assert (await first).status == 201  # it was given its time before
        assert_refused_by_the_clock(await second)
    assert backend.seen == []


async def test_a_jump_ahead_is_believed_once_it_has_settled(house: House, clock: Clock) -> None:
    await house.issue()
    clock.set(DAY)
    assert (await house.ask_for_scope()).status == 503
    clock.move(299)
    assert (await house.ask_for_scope()).status == 503
    clock.move(2)
    assert (await house.ask_for_scope()).status == 201


async def test_a_clock_that_jumps_while_a_body_arrives_leaves_a_recorded_refusal(
    house: House, backend: Backend, clock: Clock
) -> None:
    kind, body = house.execution(await house.issue())
    reader, writer = await connect(house.sidecar.data_address)
    headers = [*kind, ("Expect", "100-continue"), ("Content-Length", str(len(body)))]
    writer.write(request_bytes("POST", EXECUTE, headers))
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100")
    clock.set(DAY)
    writer.write(body)
    answer = await read_message(reader)
    writer.close()
    assert answer is not None
    assert_refused_by_the_clock(answer)
    assert backend.seen == []
    (refused,) = await house.records("&event=refused")
    assert refused["decision_id"] == answer.json()["decision_id"]


@pytest.mark.parametrize("step", [DAY, -DAY])
async def test_an_operator_accepts_a_clock_and_a_record_says_so(
    house: House, clock: Clock, step: int
) -> None:
    scope = await house.issue()
    clock.set(step)
    assert_refused_by_the_clock(await house.execute(scope))
    told = await accept_clock(house)
    assert abs(told["step_seconds"] - step) < 60
    (record,) = await house.records("&event=clock_accepted")
    assert record["decision_id"] == told["decision_id"]
    assert record["decided_at"] == told["now"]
    assert record["details"]["step_seconds"] == told["step_seconds"]
    assert (await house.ready())[0] == 200
    granted = await house.issue()
    assert abs(datetime.fromisoformat(granted["expires_at"]).timestamp() - clock() / SECOND - 300) < 60
    assert (await house.execute(granted)).status == 200
    # The one that was issued ahead keeps its end.
    assert (await house.scope(scope))["expires_at"] == scope["expires_at"]
    assert verify_sqlite(house.database).records == len(await house.records())


async def test_a_record_a_day_ahead_closes_the_gate_until_the_clock_is_accepted_and_not_for_a_day(
    tmp_path: Path, backend: Backend, clock: Clock
) -> None:
    clock.set(DAY)
    async with opened(tmp_path, backend, clock=clock) as house:
        ahead = await house.issue()
    clock.set(-DAY)
    for _ in range(2):
        async with opened(tmp_path, backend, clock=clock) as house:
            assert_refused_by_the_clock(await house.execute(ahead))
            assert (await house.ready())[0] == 503
    async with opened(tmp_path, backend, clock=clock) as house:
        await accept_clock(house)
        assert (await house.execute(await house.issue())).status == 200
    async with opened(tmp_path, backend, clock=clock) as house:
        assert (await house.ready())[0] == 200
        assert (await house.execute(ahead)).status == 200


@pytest.mark.parametrize("restarts", [False, True])
@pytest.mark.parametrize("step", [-50, -DAY])
async def test_a_brake_holds_for_its_window_and_no_longer_whatever_was_accepted(
    tmp_path: Path, backend: Backend, clock: Clock, step: int, restarts: bool
) -> None:
    braked = with_rules(Rule(id="slow", on="execute", brake=Brake(cooldown_seconds=10)))
    async with AsyncExitStack() as stack:
        house = await stack.enter_async_context(opened(tmp_path, backend, clock=clock, policies=braked))
        scope = await house.issue(max_attempts=9, ttl_seconds=3_600)
        assert (await house.execute(scope)).status == 200
        clock.set(step)
        if step == -DAY:
            await accept_clock(house)
        if restarts:
            await stack.aclose()
            house = await stack.enter_async_context(opened(tmp_path, backend, clock=clock, policies=braked))
        answer = await house.execute(scope)
        assert answer.status == 429, answer.body
        assert 1 <= int(answer.header("Retry-After") or "") <= 10
        clock.move(10)
        assert (await house.execute(scope)).status == 200
        # Nor once the time comes by which it was admitted.
        clock.move(-step - 5)
        fresh = await house.issue(max_attempts=9)
        assert (await house.execute(fresh)).status == 200


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


@pytest.mark.parametrize("from_page", [0, 1])
async def test_a_database_whose_damage_is_undone_decides_again_without_a_restart(
    house: House, from_page: int
) -> None:
    """Bytes of the file are overwritten, from the first page on or behind it, and later put back."""
    scope = await house.issue(max_attempts=3)
    assert (await house.execute(scope)).status == 200
    # By another process, so that nothing is left of the pages in the memory of this one.
    empty = (
        f"import sqlite3; sqlite3.connect({str(house.database)!r}).execute('PRAGMA wal_checkpoint(TRUNCATE)')"
    )
    await asyncio.to_thread(subprocess.run, [sys.executable, "-c", empty], check=True)
    sound = house.database.read_bytes()
    file = os.open(house.database, os.O_RDWR)
    try:
        os.pwrite(file, os.urandom(len(sound) - from_page * 4096), from_page * 4096)
        for _ in range(5):
            answer = await house.execute(scope)
            assert answer.status == 503
            assert (await house.ready())[0] == 503
        assert len(house.backend.seen) == 1
        os.pwrite(file, sound, 0)
        await eventually(lambda: _decides(house, scope), seconds=10)
        assert (await house.ready())[0] == 200
    finally:
        # To close it earlier would drop the locks that SQLite holds in this process.
        os.close(file)


async def _decides(house: House, scope: dict[str, Any]) -> bool:
    return (await house.execute(scope)).status in (200, 400)
