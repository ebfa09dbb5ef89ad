"""Deadlines that nearly always end before they pass, as those of requests do.

A timer of the event loop costs a heap entry, a handle and its cancellation. Deadlines of the same length pass
in the order in which they begin. So one line holds them in that order, and one timer of the loop serves the
whole line: beginning and ending a deadline is one change of a dictionary.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable


def _nothing() -> None:
    """The callback of a deadline that has ended."""


class Deadline:
    """One deadline. `callback` is called once if the deadline passes before `end`."""

    __slots__ = ("_line", "callback", "due")

    def __init__(self, line: _Line, callback: Callable[[], object], due: float) -> None:
        self._line, self.callback, self.due = line, callback, due
        line.deadlines[self] = None

    def end(self) -> None:
        """What the deadline limits is done. Does nothing if the deadline has passed or ended."""
        self._line.deadlines.pop(self, None)
        # What is limited often holds its deadline, and only the garbage collector could free the two.
        self.callback = _nothing


class _Line:
    """The deadlines of one length, in the order in which they pass."""

    __slots__ = ("_lines", "_loop", "_seconds", "deadlines")

    def __init__(self, lines: dict[float, _Line], loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        self._lines, self._loop, self._seconds = lines, loop, seconds
        self.deadlines: dict[Deadline, None] = {}
        loop.call_later(seconds, self._look)

    def _look(self) -> None:
        """Call what has passed, and look again when the next one may have."""
        now = self._loop.time()
        while self.deadlines:
            first = next(iter(self.deadlines))
            if first.due > now:
                self._loop.call_at(first.due, self._look)
                return
            del self.deadlines[first]
            try:
                first.callback()
            except Exception as exc:  # one that fails must not keep the others from passing
                context = {"message": "the callback of a deadline failed", "exception": exc}
                self._loop.call_exception_handler(context)
        del self._lines[self._seconds]


class Deadlines:
    """The deadlines of one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self._loop = loop or asyncio.get_running_loop()
        self._lines: dict[float, _Line] = {}

    def begin(self, seconds: float, callback: Callable[[], object]) -> Deadline:
        """Call `callback` in so many seconds, unless the deadline ends before."""
        line = self._lines.get(seconds)
        if line is None:
            line = self._lines[seconds] = _Line(self._lines, self._loop, seconds)
        return Deadline(line, callback, self._loop.time() + seconds)
