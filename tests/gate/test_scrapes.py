"""Readiness as a metric: it says what /health/ready says, and a scrape costs the store next to nothing."""

from __future__ import annotations

import os
import re
from typing import Any

import pytest

from tests.support import House, ask

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


async def test_a_drain_and_a_clock_that_is_behind_are_told_apart(open_house: Any, clock: Any) -> None:
    house = await open_house()
    await house.issue()
    clock.move(-120)
    house.sidecar.gate.draining = True
    assert await ready(house) == {**dict.fromkeys(CHECKS, 1.0), "clock": 0.0, "draining": 0.0}
