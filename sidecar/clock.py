"""The sidecar's time: a wall clock that is trusted only as far as a second clock confirms it.

A wall clock can be set, and a wrong time has lasting effects: scopes that do not expire, brakes that hold for
a day, a log that ends in the future. The wall clock is therefore compared with a clock that only counts, and
with the time of the last record.

1. At a start, any time that is not before the last record is trusted, because nothing is known about the time
   in between.
2. A wall clock has jumped ahead if, since the last reading, it has advanced more than `MAX_STEP_SECONDS`
   further than the second clock. Nothing is decided until it has run steadily for the settling time, or until
   an operator accepts it. Records that must be written meanwhile (settlements, revocations, refusals) get the
   last trusted time plus the time that has passed since.
3. A wall clock that is before the last record is not used. Time continues from that record by the second
   clock. A brake or a scope therefore ends when its own seconds have passed, however far the wall clock was
   set back. This continues until the wall clock has caught up, because an earlier switch would be a step
   back.
4. If the wall clock is more than `MAX_STEP_SECONDS` behind this continued time, either the wall clock or the
   log is wrong. Nothing is decided until the clock is corrected, or until an operator accepts it. Waiting
   does not help, because the log's time advances, too.
5. Accepting the wall clock sets the log's time to it, forward or back. The acceptance is recorded. Only this
   record may have an earlier time than the record before it.

The second clock is CLOCK_BOOTTIME on Linux, which continues while the machine sleeps. Elsewhere it is
CLOCK_MONOTONIC, which on macOS does so, too. In a virtual machine that its host suspends, neither may
continue. The wall clock has then jumped ahead when the machine resumes, and must settle.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import NamedTuple

# A clock returns microseconds since a start of its own.
Clock = Callable[[], int]

SECOND = 1_000_000
# The most that a wall clock may differ from the expected time before decisions stop.
MAX_STEP_SECONDS = 60
# The most that a settling wall clock may gain or lose from one reading to the next.
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
    """The clock that confirms a wall clock: `elapsed` if given, else the system's second clock.

    An injected wall clock without `elapsed` confirms itself, so it never appears to jump.
    """
    return elapsed or (elapsed_clock if wall is wall_clock else wall)


class Moment(NamedTuple):
    """One reading of both clocks.

    `now` is the sidecar's time and `wall` the wall clock's, both in microseconds since 1970. `elapsed` is the
    second clock's. `trouble` is the reason why nothing may be decided now, or None.
    """

    now: int
    wall: int
    elapsed: int
    trouble: str | None

    @property
    def lag_seconds(self) -> float:
        """The seconds by which the wall clock is behind the sidecar's time, or 0 if it is not behind."""
        return max(0.0, (self.now - self.wall) / SECOND)


class Timekeeper:
    """Reads both clocks and determines the time.

    It is thread-safe. For `elapsed` None, see `second_clock`.
    """

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
        """Start from the time of the last record, 0 if there is none. Any later time is trusted."""
        with self._lock:
            self._record, self._recorded_at = last, self._elapsed()
            self._believe(max(last, self._wall()), self._recorded_at)

    def _believe(self, now: int, elapsed: int) -> None:
        """Continue from this reading, and forget that the wall clock was behind or ahead."""
        self._last, self._read_at = now, elapsed
        self._behind = False
        # If the wall clock has jumped: its last reading, and the start of its steady run.
        self._jumped: tuple[int, int] | None = None
        self._steady_since = elapsed

    def read(self) -> Moment:
        """Read both clocks and return the moment."""
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
        """Whether a wall clock that has jumped has run steadily for long enough."""
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
        """Note that the last record has the time of this reading."""
        with self._lock:
            if moment.now >= self._record:
                self._record, self._recorded_at = moment.now, moment.elapsed

    def found(self, last: int) -> None:
        """Note the time of the last record, read from the database after a commit with an unknown result."""
        with self._lock:
            if last > self._record:
                self._record, self._recorded_at = last, self._elapsed()

    def accept(self, moment: Moment) -> None:
        """Trust the wall clock of this reading, and note that the last record has its time."""
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
