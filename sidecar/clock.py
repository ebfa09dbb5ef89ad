"""The time that decides: a wall clock that is believed only as far as a second clock bears it out.

A wall clock can be set. What is written in one moment with a wrong one outlives that moment: scopes that do
not expire, brakes that hold for a day, a log whose end lies in the future. So the wall clock is held against
a clock that only counts, and against the time of the last record.

1. At a start, any time that is not before the last record is believed: nothing is known of the time between.
2. A wall clock that has moved more than `MAX_STEP_SECONDS` further than the time that passed since the last
   reading has jumped ahead. Nothing is decided until it has run on steadily for the time to settle, or until
   an operator accepts it. What must be written meanwhile (how executions ended, revocations, refusals) gets
   the last time that was believed, and what passed since.
3. A wall clock that is before the last record is not used. Time counts on from that record by the second
   clock, so a brake or a scope ends when its own seconds are over, however far the wall clock was set back.
   It goes on so until the wall clock has caught up, since going over to it earlier would be a step back.
4. A wall clock that is more than `MAX_STEP_SECONDS` behind the time so counted is wrong, or the log is.
   Nothing is decided until it is corrected, or until an operator accepts it: waiting does not help, because
   the log's time goes on, too.
5. Accepting makes the wall clock's time the log's, forward or back. It is a record, and the only one whose
   time may be before that of the record before it.

The second clock is Linux's CLOCK_BOOTTIME, which goes on while the machine sleeps; elsewhere it is
CLOCK_MONOTONIC, which on macOS does so, too. A virtual machine that its host suspends may see neither run on:
then its wall clock has jumped ahead when it wakes, and has to settle.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

# Microseconds, from a beginning of the clock's own.
Clock = Callable[[], int]

SECOND = 1_000_000
# How far a wall clock may be from the time that is expected before nothing is decided by it.
MAX_STEP_SECONDS = 60
# What a wall clock that settles may gain or lose from one reading to the next.
STEADY_SECONDS = 1
# The default of `clock.settle_seconds`.
SETTLE_SECONDS = 300.0

ACCEPT = "scopegate store accept-clock --config FILE"

_COUNTER: int = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def wall_clock() -> int:
    """Microseconds since 1970 (UTC)."""
    return time.time_ns() // 1_000


def elapsed_clock() -> int:
    """Microseconds that passed since some moment. Setting the wall clock does not change them."""
    return time.clock_gettime_ns(_COUNTER) // 1_000


def second_clock(wall: Clock, elapsed: Clock | None) -> Clock:
    """The clock that bears a wall clock out: the one given, else the system's beside the system's wall clock;
    a wall clock that is injected by itself bears itself out, and is never seen to jump."""
    return elapsed or (elapsed_clock if wall is wall_clock else wall)


@dataclass(frozen=True, slots=True)
class Moment:
    """One reading: the time that counts and the wall clock's, in microseconds since 1970, and the second
    clock's. `trouble` is why nothing may be decided now, None: go ahead."""

    now: int
    wall: int
    elapsed: int
    trouble: str | None

    @property
    def lag_seconds(self) -> float:
        """How far the wall clock is behind the time that counts; 0 where it is not."""
        return max(0.0, (self.now - self.wall) / SECOND)


class Timekeeper:
    """Reads both clocks and says what time it is. It may be asked from any thread. `elapsed` None: see
    `second_clock`."""

    def __init__(
        self,
        wall: Clock = wall_clock,
        elapsed: Clock | None = None,
        *,
        settle_seconds: float = SETTLE_SECONDS,
    ) -> None:
        self._wall = wall
        self._elapsed = second_clock(wall, elapsed)
        self._settle_seconds = settle_seconds
        self._lock = threading.Lock()
        self.begin(0)

    def begin(self, last: int) -> None:
        """Start from the time of the last record, 0 where there is none. Any later time is believed."""
        with self._lock:
            self._record, self._recorded_at = last, self._elapsed()
            self._believe(max(last, self._wall()), self._recorded_at)

    def _believe(self, now: int, elapsed: int) -> None:
        """Go on from this reading, and forget that the wall clock was behind or ahead."""
        self._last, self._read_at = now, elapsed
        self._behind = False
        # A wall clock that has jumped: its last reading, and since when it is steady.
        self._jumped: tuple[int, int] | None = None
        self._steady_since = elapsed

    def read(self) -> Moment:
        """What time it is now."""
        with self._lock:
            wall, elapsed = self._wall(), self._elapsed()
            expected = self._last + max(0, elapsed - self._read_at)
            if wall - expected > MAX_STEP_SECONDS * SECOND and not self._has_settled(wall, elapsed):
                left = self._settle_seconds - (elapsed - self._steady_since) / SECOND
                return Moment(expected, wall, elapsed, _ahead((wall - expected) / SECOND, left))
            self._jumped = None
            now = self._record + max(0, elapsed - self._recorded_at)
            self._behind = wall < (now if self._behind else self._record)
            if not self._behind:
                now = wall
            self._last, self._read_at = now, elapsed
            lag = (now - wall) / SECOND
            return Moment(now, wall, elapsed, _behind(lag) if lag > MAX_STEP_SECONDS else None)

    def _has_settled(self, wall: int, elapsed: int) -> bool:
        """Whether a clock that has jumped has run on steadily for long enough."""
        if self._jumped is None:
            steady = False
        else:
            before, read_at = self._jumped
            steady = abs((wall - before) - (elapsed - read_at)) <= STEADY_SECONDS * SECOND
        if not steady:
            self._steady_since = elapsed
        self._jumped = wall, elapsed
        return elapsed - self._steady_since >= self._settle_seconds * SECOND

    def wrote(self, moment: Moment) -> None:
        """The last record has the time of this reading."""
        with self._lock:
            if moment.now >= self._record:
                self._record, self._recorded_at = moment.now, moment.elapsed

    def found(self, last: int) -> None:
        """The last record has this time, as the database says after a commit of which nothing is known."""
        with self._lock:
            if last > self._record:
                self._record, self._recorded_at = last, self._elapsed()

    def accept(self, moment: Moment) -> None:
        """The wall clock of this reading is right, and the last record has its time."""
        with self._lock:
            self._record, self._recorded_at = moment.wall, moment.elapsed
            self._believe(moment.wall, moment.elapsed)


def _ahead(seconds: float, left: float) -> str:
    return (
        f"the wall clock has jumped {seconds:.0f} s ahead; nothing is decided by it until it has been stable "
        f"for {max(1.0, left):.0f} s more; if it is right, accept it: {ACCEPT}"
    )


def _behind(lag: float) -> str:
    return (
        f"the wall clock is {lag:.0f} s behind the last record; correct the system time, or, if it is right, "
        f"accept it: {ACCEPT}"
    )
