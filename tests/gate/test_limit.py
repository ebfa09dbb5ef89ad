"""The outer deadline of a gated request cancels its task once, and leaves no trace of that in the task."""

from __future__ import annotations

import asyncio

import pytest

from sidecar.eventloop.timers import Deadlines
from sidecar.web.data.plane import _Limit

SOON = 0.001


def limit_of_this_task(seconds: float) -> _Limit:
    task = asyncio.current_task()
    assert task is not None
    return _Limit(Deadlines(), task, seconds)


def cancellations() -> int:
    task = asyncio.current_task()
    assert task is not None
    return task.cancelling()


async def test_a_block_that_is_cut_off_raises_a_timeout() -> None:
    limit = limit_of_this_task(SOON)
    with pytest.raises(TimeoutError), limit:
        await asyncio.Event().wait()
    assert limit.passed
    assert cancellations() == 0


async def test_a_block_that_goes_on_although_it_was_cut_off_ends_as_it_ends() -> None:
    limit = limit_of_this_task(SOON)
    with limit:
        with pytest.raises(asyncio.CancelledError):
            await asyncio.Event().wait()
        limit.extend(SOON)  # a deadline that has passed stays
        async with asyncio.timeout(5):  # counts its own cancellation only
            await asyncio.sleep(5 * SOON)
    assert cancellations() == 0


async def test_a_fault_of_the_block_is_no_timeout() -> None:
    async def fails() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError as exc:
            raise ValueError("a defect") from exc

    limit = limit_of_this_task(SOON)
    with pytest.raises(ValueError, match="a defect"), limit:
        await fails()
    assert cancellations() == 0


async def test_a_cancellation_by_others_is_never_taken_for_the_deadline() -> None:
    async def limited(seconds: float) -> None:
        with limit_of_this_task(seconds):
            await asyncio.Event().wait()

    task = asyncio.create_task(limited(3600))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    async def both_at_once() -> None:
        limit = limit_of_this_task(3600)
        with limit:
            this = asyncio.current_task()
            assert this is not None
            loop = asyncio.get_running_loop()
            loop.call_soon(limit._cut)
            loop.call_soon(this.cancel)
            await asyncio.Event().wait()

    with pytest.raises(asyncio.CancelledError):
        await asyncio.create_task(both_at_once())


async def test_a_limit_that_was_extended_or_has_ended_does_not_pass_at_its_first_time() -> None:
    limit = limit_of_this_task(SOON)
    with limit:
        limit.extend(3600)
        await asyncio.sleep(5 * SOON)
        limit.extend(SOON)
        limit.end()
        await asyncio.sleep(5 * SOON)
    assert not limit.passed
    assert cancellations() == 0
