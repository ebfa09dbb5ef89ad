"""Idempotency keys of executions that are reported, or that a status ends as not executed."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.client import HeaderList, Message
from tests.gate.test_reports import ACCEPTED, REPORTED, Job
from tests.support import Backend, Clock, House, Open, eventually, replies, sends

KEY: HeaderList = [("Idempotency-Key", "the-action-1")]


@pytest.fixture
async def house(open_house: Open, backend: Backend) -> House:
    backend.script = ACCEPTED
    return await open_house(gate=REPORTED)


async def first(house: House, scope: dict[str, Any]) -> tuple[Message, Job]:
    """The first request under the key, and its execution as the backend knows it."""
    answer = await house.execute(scope, headers=KEY)
    return answer, Job(house, house.backend.executions[-1])


def assert_replayed(repeat: Message, answer: Message) -> None:
    assert repeat.header("Idempotency-Replayed") == "true"
    assert (repeat.status, repeat.body) == (answer.status, answer.body)
    for name in ("Scopegate-Decision-Id", "Scopegate-Scope-Status", "Scopegate-Attempts-Remaining"):
        assert repeat.header(name) == answer.header(name)


def error_of(answer: Message) -> tuple[int, str]:
    return answer.status, answer.json()["error"]


async def test_a_running_execution_replays_its_first_answer(
    house: House, backend: Backend, clock: Clock
) -> None:
    scope = await house.issue(max_attempts=3)
    answer, _ = await first(house, scope)
    assert answer.status == 202
    for seconds in (0, 500):
        clock.move(seconds)
        assert_replayed(await house.execute(scope, headers=KEY), answer)
    assert len(backend.executions) == 1


@pytest.mark.parametrize("outcome", ["succeeded", "failed"])
async def test_a_reported_execution_replays_its_first_answer(
    house: House, backend: Backend, outcome: str
) -> None:
    scope = await house.issue(max_attempts=3)
    answer, job = await first(house, scope)
    assert (await job.report(outcome, cost_usd=0.04)).status == 200
    assert_replayed(await house.execute(scope, headers=KEY), answer)
    assert len(backend.executions) == 1


async def test_a_report_that_nothing_was_executed_frees_the_key(house: House, backend: Backend) -> None:
    scope = await house.issue(max_attempts=1)
    _, job = await first(house, scope)
    assert (await job.report("not_executed")).status == 200
    again = await house.execute(scope, headers=KEY)
    assert (again.status, again.header("Idempotency-Replayed")) == (202, None)
    assert len(backend.executions) == 2


@pytest.mark.parametrize("status", ["409 Conflict", "503 Service Unavailable"])
async def test_a_status_that_says_that_nothing_was_executed_frees_the_key(
    house: House, backend: Backend, status: str
) -> None:
    scope = await house.issue(max_attempts=1)
    backend.script = replies(b"busy", status=status)
    assert (await house.execute(scope, headers=KEY)).body == b"busy"
    backend.script = ACCEPTED
    again = await house.execute(scope, headers=KEY)
    assert (again.status, again.header("Idempotency-Replayed")) == (202, None)
    assert len(backend.executions) == 2


async def test_an_execution_that_was_not_reported_in_time_is_an_unknown_outcome(
    house: House, backend: Backend, clock: Clock
) -> None:
    scope = await house.issue(max_attempts=3, ttl_seconds=3600)
    answer, job = await first(house, scope)
    clock.move(601)
    decision_id = answer.header("Scopegate-Decision-Id") or ""

    async def has_lapsed() -> bool:
        return bool((await house.record(decision_id))["execution"]["status"] == "unknown")

    assert (await job.report("succeeded")).status == 403  # too late
    await eventually(has_lapsed)
    repeat = await house.execute(scope, headers=KEY)
    assert error_of(repeat) == (409, "outcome_unknown")
    assert repeat.json()["decision_id"] == decision_id
    assert len(backend.executions) == 1


async def test_a_report_that_wins_over_the_answer_keeps_the_answer_for_repeats(
    house: House, backend: Backend
) -> None:
    release = asyncio.Event()
    backend.script = replies(b'{"job": 7}', status="202 Accepted", after=release)
    scope = await house.issue(max_attempts=3)
    executing = asyncio.create_task(house.execute(scope, headers=KEY))
    await backend.arrived.wait()
    job = Job(house, backend.executions[0])
    assert (await job.report("succeeded")).status == 200
    early = await house.execute(scope, headers=KEY)
    assert error_of(early) == (409, "outcome_unknown")  # executed, and its answer is still to come
    release.set()
    answer = await executing
    repeat = await house.execute(scope, headers=KEY)
    assert (repeat.header("Idempotency-Replayed"), repeat.body) == ("true", answer.body)
    assert len(backend.executions) == 1


async def test_a_report_after_a_lost_answer_leaves_nothing_to_repeat(house: House, backend: Backend) -> None:
    backend.script = sends(then="reset")
    scope = await house.issue(max_attempts=3)
    _, job = await first(house, scope)
    assert (await job.report("succeeded")).status == 200
    repeat = await house.execute(scope, headers=KEY)
    assert error_of(repeat) == (409, "outcome_unknown")
    assert repeat.json()["execution_status"] == "succeeded"
    assert len(backend.executions) == 1
