"""What time it is when a clock is set: no moment with a wrong wall clock outlives itself."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from sidecar.clock import ACCEPT, SECOND, Moment, Timekeeper

START = 1_767_225_600 * SECOND
DAY = 86_400


@dataclass
class Clocks:
    """A wall clock and one that only counts; both stand still until they are told to go on."""

    wall: int = START
    elapsed: int = 5 * SECOND

    def keeper(self, last: int = 0) -> Timekeeper:
        keeper = Timekeeper(lambda: self.wall, lambda: self.elapsed, settle_seconds=300)
        keeper.begin(last)
        return keeper

    def wait(self, seconds: float) -> None:
        self.wall += round(seconds * SECOND)
        self.elapsed += round(seconds * SECOND)

    def set(self, seconds: float) -> None:
        self.wall += round(seconds * SECOND)


@pytest.fixture
def clocks() -> Clocks:
    return Clocks()


def write(keeper: Timekeeper) -> Moment:
    moment = keeper.read()
    assert moment.trouble is None
    keeper.wrote(moment)
    return moment


def test_time_is_the_wall_clocks_while_it_runs_as_time_passes(clocks: Clocks) -> None:
    keeper = clocks.keeper()
    for seconds in (0, 0.5, 59, 61, DAY, 365 * DAY):
        clocks.wait(seconds)
        assert write(keeper).now == clocks.wall


@pytest.mark.parametrize("ahead", [61, 3_600, DAY, 365 * DAY])
def test_a_jump_ahead_is_not_believed_and_time_goes_on_without_it(clocks: Clocks, ahead: int) -> None:
    keeper = clocks.keeper()
    before = write(keeper).now
    clocks.set(ahead)
    clocks.wait(7)
    moment = keeper.read()
    assert moment.now == before + 7 * SECOND
    assert moment.trouble is not None
    assert ACCEPT in moment.trouble
    clocks.set(-ahead)
    assert write(keeper).now == clocks.wall


def test_a_jump_of_a_minute_is_believed(clocks: Clocks) -> None:
    keeper = clocks.keeper()
    clocks.set(60)
    assert write(keeper).now == clocks.wall


def test_a_jump_is_seen_after_any_idle_time_because_that_is_counted(clocks: Clocks) -> None:
    keeper = clocks.keeper()
    clocks.wait(30 * DAY)
    clocks.set(61)
    assert keeper.read().trouble is not None


def test_a_clock_that_jumped_is_believed_once_it_has_been_stable_for_long_enough(clocks: Clocks) -> None:
    keeper = clocks.keeper()
    clocks.set(DAY)
    for _ in range(30):
        assert keeper.read().trouble is not None
        clocks.wait(10)
    assert write(keeper).now == clocks.wall


def test_a_clock_that_jumps_again_settles_anew(clocks: Clocks) -> None:
    keeper = clocks.keeper()
    clocks.set(DAY)
    assert keeper.read().trouble is not None
    clocks.wait(299)
    clocks.set(2)
    assert keeper.read().trouble is not None
    clocks.wait(299)
    assert keeper.read().trouble is not None
    clocks.wait(1)
    assert keeper.read().trouble is None


@pytest.mark.parametrize("ahead", [0, 61, 365 * DAY])
def test_at_a_start_any_forward_time_is_believed(clocks: Clocks, ahead: int) -> None:
    last = START - ahead * SECOND
    moment = clocks.keeper(last).read()
    assert (moment.now, moment.trouble) == (START, None)


@pytest.mark.parametrize("back", [0.000_001, 1, 50, 60])
def test_a_clock_that_was_set_back_a_little_counts_on_from_the_last_record(
    clocks: Clocks, back: float
) -> None:
    keeper = clocks.keeper()
    last = write(keeper).now
    clocks.set(-back)
    assert keeper.read().now == last
    for seconds in (1, 10, 100):
        clocks.wait(seconds)
        last += seconds * SECOND
        assert write(keeper).now == last


@pytest.mark.parametrize("back", [61, DAY])
def test_a_clock_that_is_far_behind_decides_nothing_and_waiting_does_not_help(
    clocks: Clocks, back: int
) -> None:
    keeper = clocks.keeper()
    last = write(keeper).now
    clocks.set(-back)
    for _ in range(2):
        moment = keeper.read()
        assert (moment.now, moment.lag_seconds) == (last, back)
        assert moment.trouble is not None
        assert ACCEPT in moment.trouble
        clocks.wait(2 * DAY)
        last += 2 * DAY * SECOND
    clocks.set(back)
    assert write(keeper).now == clocks.wall == last


def test_a_start_behind_the_last_record_counts_on_from_it(clocks: Clocks) -> None:
    keeper = clocks.keeper(START + 50 * SECOND)
    clocks.wait(10)
    moment = keeper.read()
    assert (moment.now, moment.trouble) == (START + 60 * SECOND, None)
    assert clocks.keeper(clocks.wall + 61 * SECOND).read().trouble is not None


@pytest.mark.parametrize("step", [-365 * DAY, -DAY, -50, 0, 61, DAY])
def test_an_accepted_clock_counts_from_then_on(clocks: Clocks, step: int) -> None:
    keeper = clocks.keeper()
    write(keeper)
    clocks.set(step)
    keeper.accept(keeper.read())
    for seconds in (0, 10, DAY):
        clocks.wait(seconds)
        assert write(keeper).now == clocks.wall


def test_time_never_runs_back_while_a_clock_is_set_back_and_forth(clocks: Clocks) -> None:
    keeper = clocks.keeper()
    last = 0
    for step in (50, -70, 30, 59, -100, 40, -1, DAY, -DAY, 61):
        clocks.set(step)
        clocks.wait(0.5)
        moment = keeper.read()
        assert moment.now >= last
        last = moment.now
        keeper.wrote(moment)


def test_what_the_database_says_of_the_last_record_counts(clocks: Clocks) -> None:
    keeper = clocks.keeper()
    keeper.found(START + 30 * SECOND)
    assert keeper.read().now == START + 30 * SECOND
