"""Readiness as a metric: it says what /health/ready says, and a scrape costs the store next to nothing."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

import pytest

from tests.client import ask
from tests.gate.test_admin import stop_reading
from tests.support import Backend, House, opened

MEASURED = (
    "store_free_bytes",
    "store_size_bytes",
    "store_wal_size_bytes",
    "store_growth_bytes",
    "unknown_executions",
    "oldest_unknown_execution_seconds",
)
CHECKS = ("store", "log", "policies", "clock", "draining")


async def ready(house: House) -> dict[str, float]:
    told = re.findall(r'^scopegate_ready\{check="(\w+)"\} (\S+)$', await house.metrics(), re.MULTILINE)
    return {name: float(value) for name, value in told}


async def asked(house: House) -> int:
    """The status of /health/ready."""
    return (await ask(house.sidecar.ops_address, "GET", "/health/ready")).status


@pytest.fixture
def writes(house: House, monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """An entry for each time that the store was asked to write to prove that it can."""
    seen: list[None] = []
    probe = house.sidecar.store.engine.probe

    async def counted() -> None:
        seen.append(None)
        await probe()

    monkeypatch.setattr(house.sidecar.store.engine, "probe", counted)
    return seen


async def test_every_check_of_a_sidecar_that_is_well_is_one(house: House) -> None:
    assert await ready(house) == dict.fromkeys(CHECKS, 1.0)


async def test_scrapes_in_a_row_write_once(house: House, writes: list[None]) -> None:
    for _ in range(5):
        assert await ready(house) == dict.fromkeys(CHECKS, 1.0)
    assert len(writes) == 1


async def test_asking_for_readiness_writes_every_time(house: House, writes: list[None]) -> None:
    await ready(house)
    assert [await asked(house) for _ in range(3)] == [200] * 3
    assert len(writes) == 4


async def test_what_readiness_found_is_what_the_next_scrape_says(house: House) -> None:
    away = f"{house.database}.away"
    os.rename(house.database, away)
    assert await asked(house) == 503
    gone = await ready(house)
    os.rename(away, house.database)
    assert await asked(house) == 200
    assert gone == {**dict.fromkeys(CHECKS, 1.0), "store": 0.0, "log": 0.0}
    assert await ready(house) == dict.fromkeys(CHECKS, 1.0)


async def measured(house: House) -> dict[str, float]:
    """What the store has to be asked for."""
    page = await house.metrics()
    values = {name: re.search(rf"^scopegate_{name} (\S+)$", page, re.MULTILINE) for name in MEASURED}
    return {name: float(value[1]) for name, value in values.items() if value}


async def test_what_was_never_measured_is_no_zero_that_would_set_off_an_alert(
    tmp_path: Path, backend: Backend
) -> None:
    folder = tmp_path / "store"
    folder.mkdir()
    async with opened(folder, backend) as house:
        await stop_reading(house)
        folder.rename(tmp_path / "away")
        first = await measured(house)
        (tmp_path / "away").rename(folder)
        then = await measured(house)
    assert [*first] == [*MEASURED]
    assert all(map(math.isnan, first.values()))
    assert {name for name, value in then.items() if math.isnan(value)} == set(MEASURED[3:])


async def test_what_was_measured_once_stands_until_it_can_be_measured_again(
    tmp_path: Path, backend: Backend
) -> None:
    folder = tmp_path / "store"
    folder.mkdir()
    async with opened(folder, backend) as house:
        before = await measured(house)
        folder.rename(tmp_path / "away")
        gone = await measured(house)
        (tmp_path / "away").rename(folder)
    assert not any(map(math.isnan, before.values()))
    assert {name: gone[name] for name in MEASURED[:3]} == {name: before[name] for name in MEASURED[:3]}


async def test_a_store_in_memory_has_no_bytes_to_tell(open_house: Any) -> None:
    house = await open_house(store={"url": "memory://"})
    found = await measured(house)
    assert found["unknown_executions"] == 0
    assert math.isnan(found["store_free_bytes"])
    told = (await house.admin("GET", "/api/v1/status")).json()["store"]
    assert told == {"url": "memory://", "size": None, "wal_size": None, "free": None, "growth_per_day": None}


async def test_a_drain_and_a_clock_that_is_behind_are_told_apart(open_house: Any, clock: Any) -> None:
    house = await open_house()
    await house.issue()
    clock.move(-120)
    house.sidecar.gate.draining = True
    assert await ready(house) == {**dict.fromkeys(CHECKS, 1.0), "clock": 0.0, "draining": 0.0}
