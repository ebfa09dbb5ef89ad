"""Deadlines on a loop whose time the test moves, so that no test depends on the machine's."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.eventloop.timers import Deadline, Deadlines


class ScriptedLoop:
    """The part of an event loop that deadlines use. `pass_time` runs what becomes due."""

    def __init__(self) -> None:
        self.now = 0.0
        self.due: list[tuple[float, int, Callable[[], object]]] = []
        self.scheduled = 0
        self.faults: list[dict[str, Any]] = []

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, callback: Callable[[], object]) -> None:
        self.scheduled += 1
        heappush(self.due, (when, self.scheduled, callback))

    def call_later(self, seconds: float, callback: Callable[[], object]) -> None:
        self.call_at(self.now + seconds, callback)

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        self.faults.append(context)

    def pass_time(self, until: float) -> None:
        while self.due and self.due[0][0] <= until:
            self.now, _, callback = heappop(self.due)
            callback()
        self.now = until


@pytest.fixture
def loop() -> ScriptedLoop:
    return ScriptedLoop()


def deadlines_of(loop: ScriptedLoop) -> Deadlines:
    return Deadlines(cast(asyncio.AbstractEventLoop, loop))


def test_a_deadline_passes_at_its_time_and_once(loop: ScriptedLoop) -> None:
    passed: list[float] = []
    deadlines_of(loop).begin(5.0, lambda: passed.append(loop.now))
    loop.pass_time(4.999)
    assert passed == []
    loop.pass_time(100.0)
    assert passed == [5.0]


def test_a_deadline_that_ends_before_does_not_pass_and_may_end_twice(loop: ScriptedLoop) -> None:
    passed: list[float] = []
    deadline = deadlines_of(loop).begin(5.0, lambda: passed.append(loop.now))
    loop.pass_time(4.999)
    deadline.end()
    loop.pass_time(100.0)
    deadline.end()
    assert passed == []


def test_one_that_begins_later_passes_later_although_one_timer_serves_both(loop: ScriptedLoop) -> None:
    deadlines, passed = deadlines_of(loop), list[float]()
    for begins in (0.0, 1.5, 4.75):
        loop.pass_time(begins)
        deadlines.begin(5.0, lambda: passed.append(loop.now))
    assert loop.scheduled == 1
    loop.pass_time(100.0)
    assert passed == [5.0, 6.5, 9.75]


def test_a_callback_that_fails_is_reported_and_the_next_deadline_still_passes(loop: ScriptedLoop) -> None:
    deadlines, passed = deadlines_of(loop), list[float]()

    def fails() -> None:
        raise RuntimeError("a fault")

    deadlines.begin(5.0, fails)
    deadlines.begin(5.0, lambda: passed.append(loop.now))
    loop.pass_time(100.0)
    assert passed == [5.0]
    assert [str(fault["exception"]) for fault in loop.faults] == ["a fault"]


def test_a_callback_may_begin_and_end_deadlines(loop: ScriptedLoop) -> None:
    deadlines, passed = deadlines_of(loop), list[float]()

    def again() -> None:
        other.end()
        deadlines.begin(5.0, lambda: passed.append(loop.now))

    deadlines.begin(5.0, again)
    other = deadlines.begin(5.0, lambda: passed.append(-1.0))
    loop.pass_time(100.0)
    assert passed == [10.0]


def test_nothing_is_left_of_deadlines_that_are_over(loop: ScriptedLoop) -> None:
    deadlines = deadlines_of(loop)
    for number in range(100):
        deadlines.begin(5.0 + number, lambda: None).end()
    loop.pass_time(1_000.0)
    assert deadlines._lines == {}
    assert loop.due == []


@given(
    st.lists(
        st.tuples(
            st.floats(0, 3, allow_subnormal=False),  # time that passes before it begins
            st.sampled_from((1.0, 2.0, 5.0)),
            st.one_of(st.none(), st.floats(0, 6, allow_subnormal=False)),  # when it ends after it began
        ),
        max_size=20,
    )
)
def test_exactly_those_pass_that_do_not_end_before_and_each_at_its_time(
    wanted: list[tuple[float, float, float | None]],
) -> None:
    loop = ScriptedLoop()
    deadlines, passed, expected = deadlines_of(loop), dict[int, float](), dict[int, float]()
    begun: list[tuple[float, int, Deadline]] = []
    now = 0.0
    for number, (pause, seconds, ends) in enumerate(wanted):
        now += pause
        while begun and begun[0][0] <= now:
            at, _, deadline = heappop(begun)
            loop.pass_time(at)
            deadline.end()
        loop.pass_time(now)

        def note(number: int = number) -> None:
            passed[number] = loop.now

        deadline = deadlines.begin(seconds, note)
        if ends is not None:
            heappush(begun, (now + ends, number, deadline))
        if ends is None or now + ends >= now + seconds:
            expected[number] = now + seconds
    while begun:
        at, _, deadline = heappop(begun)
        loop.pass_time(at)
        deadline.end()
    loop.pass_time(now + 100)
    assert passed == expected


async def test_what_held_its_deadline_is_freed_when_that_ends() -> None:
    class Request:
        deadline: Deadline

        def give_up(self) -> None: ...

    request = Request()
    request.deadline = Deadlines().begin(60, request.give_up)
    freed = weakref.ref(request)
    gc.disable()
    try:
        request.deadline.end()
        del request
        assert freed() is None
    finally:
        gc.enable()
