"""The store stopped, moved, locked or hanging: whoever emits goes on, in time, and it is counted."""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY

from sidecar import decisions
from sidecar.decisions import (
    DecisionRecord,
    DecisionRecordService,
    activate_care_kill_switch,
    backfill_run_id_for_request,
    configure,
    deactivate_care_kill_switch,
    emit_budget_enforcement_decision,
    emit_care_optimization_decision,
    emit_policy_precheck_decision,
    emit_recovery_evaluation_decision,
    emit_routing_decision,
    get_decision_service,
    is_care_kill_switch_active,
)
from sidecar.errors import StoreUnavailable
from sidecar.library.runtime import configured_store
from sidecar.store.connection import in_thread
from sidecar.store.sqlite import SqliteEngine
from tests.library.recorded import decided, records

DEADLINE = 0.3
MOST_SECONDS = 3.0  # far below what hangs in these tests, far above the deadline

sqlite_only = pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)


@pytest.fixture(autouse=True)
def short_deadline(store_url: str) -> None:
    configure(store_url, deadline_seconds=DEADLINE)


def counted() -> float:
    return REGISTRY.get_sample_value("scopegate_library_emissions_failed_total") or 0.0


@contextmanager
def failing(times: int) -> Iterator[None]:
    """In here so many records are not kept; each is counted twice over, and none takes long."""
    service = get_decision_service()
    failures, metric, begun = service.failures, counted(), time.monotonic()
    yield
    assert (service.failures - failures, counted() - metric) == (times, times)
    assert time.monotonic() - begun < MOST_SECONDS * max(times, 1)


@contextmanager
def hanging() -> Iterator[None]:
    """The threads in which SQLite works do not come back, as over a file system that is gone."""
    released = threading.Event()
    engine = configured_store().read_sync(_engine)
    threads = [engine._writer, *([engine._reader] if engine._reader is not None else [])]

    async def hang(_: object) -> None:
        hops = [in_thread(each, lambda connection: released.wait()) for each in threads if each is not None]
        await asyncio.gather(*hops)

    with pytest.raises(StoreUnavailable):
        configured_store().read_sync(hang)
    try:
        yield
    finally:
        released.set()


async def _engine(engine: object) -> SqliteEngine:
    assert isinstance(engine, SqliteEngine)
    return engine


@contextmanager
def moved_away(database: Path) -> Iterator[None]:
    away = database.with_suffix(".away")
    os.rename(database, away)
    try:
        yield
    finally:
        os.rename(away, database)


# Trouble -----------------------------------------------------------------------------------------------


@sqlite_only
async def test_a_database_that_is_moved_away_costs_its_records_and_nothing_else(
    database: Path, caplog: pytest.LogCaptureFixture
) -> None:
    service = get_decision_service()
    assert service.emit_sync(decided(run_id="before"))
    with moved_away(database), failing(2), caplog.at_level(logging.ERROR, "scopegate.decisions"):
        record = decided()
        assert service.emit_sync(record) is False
        assert await service.emit(record) is False
    lines = [each.getMessage() for each in caplog.records if each.name == "scopegate.decisions"]
    assert len(lines) == 2
    assert all(record.decision_id in line and "moved" in line for line in lines)
    assert service.emit_sync(decided(run_id="after"))
    assert [each["run_id"] for each in records()] == ["before", "after"]


@pytest.mark.slow
async def test_a_store_that_hangs_is_given_up_in_bounded_time_and_works_again_later() -> None:
    service = get_decision_service()
    assert service.emit_sync(decided(run_id="before"))
    with failing(3), hanging():
        assert service.emit_sync(decided()) is False
        assert await service.emit(decided()) is False
        assert await asyncio.to_thread(service.emit_sync, decided()) is False
    assert await service.emit(decided(run_id="after"))
    assert "after" in [each["run_id"] for each in records()]


async def test_while_the_store_hangs_an_async_caller_s_loop_goes_on() -> None:
    service = get_decision_service()
    assert await service.emit(decided())
    with hanging():
        emitting = asyncio.create_task(service.emit(decided()))
        gaps = []
        while not emitting.done():
            begun = time.monotonic()
            await asyncio.sleep(0.005)
            gaps.append(time.monotonic() - begun)
        assert emitting.result() is False
    assert len(gaps) > 5
    assert max(gaps) < DEADLINE


def test_200_callers_of_a_store_that_hangs_wait_beside_each_other_not_behind() -> None:
    service = get_decision_service()
    assert service.emit_sync(decided())

    async def all_at_once() -> list[bool]:
        return list(await asyncio.gather(*(service.emit(decided()) for _ in range(200))))

    with hanging():
        begun = time.monotonic()
        assert asyncio.run(all_at_once()) == [False] * 200
        assert time.monotonic() - begun < MOST_SECONDS


@sqlite_only
def test_a_database_that_another_connection_has_locked_is_given_up(database: Path) -> None:
    other = sqlite3.connect(database, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with failing(1):
        assert get_decision_service().emit_sync(decided()) is False
    other.execute("ROLLBACK")
    other.close()
    assert get_decision_service().emit_sync(decided(run_id="after"))


def test_a_store_that_was_stopped_is_given_up_at_once() -> None:
    assert get_decision_service().emit_sync(decided())
    configured_store().close()
    with failing(1):
        assert get_decision_service().emit_sync(decided()) is False


def test_a_store_that_cannot_be_opened_is_tried_again_at_the_next_record(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.write_text("in the way")
    service = DecisionRecordService(f"sqlite:///{folder / 'decisions.db'}")
    assert service.emit_sync(decided()) is False
    assert asyncio.run(service.emit(decided())) is False
    assert service.failures == 2
    folder.unlink()
    assert asyncio.run(service.emit(decided())) is True
    assert service.failures == 2
    configure(f"sqlite:///{folder / 'decisions.db'}")


@pytest.mark.parametrize(("padding", "kept"), [(1_048_576 - 500, True), (1_048_576, False)])
async def test_a_record_of_more_than_a_mebibyte_is_refused(padding: int, kept: bool) -> None:
    service = get_decision_service()
    assert service.emit_sync(decided())
    with failing(0 if kept else 2):
        assert service.emit_sync(decided(details={"padding": "x" * padding})) is kept
        assert await service.emit(decided(details={"padding": "x" * padding})) is kept
    with failing(0 if kept else 1):
        assert emit_routing_decision(None, True, "a", details={"padding": "x" * padding}).run_id is None
    assert len(records()) == (4 if kept else 1)


def test_a_record_that_is_emitted_twice_is_kept_once() -> None:
    record = decided()
    assert get_decision_service().emit_sync(record) is True
    with failing(1):
        assert get_decision_service().emit_sync(record) is False
    assert len(records()) == 1


@pytest.mark.parametrize("wrong", [None, "record", {}, decided().to_dict(), DecisionRecord])
async def test_what_is_no_record_is_the_caller_s_mistake_and_named_as_one(wrong: Any) -> None:
    service = get_decision_service()
    named = rf"^record must be a DecisionRecord, not {type(wrong).__name__}$"
    with failing(0):
        with pytest.raises(TypeError, match=named):
            service.emit_sync(wrong)
        with pytest.raises(TypeError, match=named):
            await service.emit(wrong)
    assert records() == []


# The functions ------------------------------------------------------------------------------------------

EMITTERS: dict[str, Callable[[], object]] = {
    "routing": lambda: emit_routing_decision(None, True, "a", request_id="r"),
    "budget_enforcement": lambda: emit_budget_enforcement_decision("run", 1, 1, 1, 1, 1),
    "policy_precheck": lambda: emit_policy_precheck_decision("r", "strict", False),
    "recovery_evaluation": lambda: emit_recovery_evaluation_decision("run", "r", "R3", None, "halted"),
    "care_optimization": lambda: emit_care_optimization_decision("r", "a", "b", 1.0, [], True, False),
}


@sqlite_only
@pytest.mark.parametrize("emit", EMITTERS.values(), ids=EMITTERS.keys())
def test_an_emitter_returns_its_record_though_the_store_fails(
    emit: Callable[[], object], database: Path
) -> None:
    with moved_away(database), failing(2):
        assert emit() is not None
        assert emit() is not None
    assert records() == []
    assert emit() is not None
    assert len(records()) == 1


def test_what_cannot_be_asked_counts_as_not_recorded_and_the_kill_switch_as_on() -> None:
    assert emit_budget_enforcement_decision("run", 1, 1, 1, 1, 1) is not None
    with hanging(), failing(0):
        assert decisions._check_budget_enforcement_exists("run") is False
        assert is_care_kill_switch_active() is True
    assert decisions._check_budget_enforcement_exists("run") is True
    assert is_care_kill_switch_active() is False


@sqlite_only
def test_a_backfill_and_a_turn_of_the_kill_switch_say_that_they_failed(database: Path) -> None:
    emit_routing_decision(None, True, "a", request_id="r")
    with moved_away(database), failing(3):
        assert backfill_run_id_for_request("r", "run") == 0
        assert activate_care_kill_switch() is False
        assert deactivate_care_kill_switch() is False
    assert is_care_kill_switch_active() is False
    assert backfill_run_id_for_request("r", "run") == 1
