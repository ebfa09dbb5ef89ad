"""Floods: beyond a limit, requests of one kind share one record, which counts them.

A flood must not fill the disk, but every recorded request must leave a trace. Above the limit, a request is
added to the summary of its kind, which closes within a quarter of a second. It waits for the summary's
commit. The wait also slows down the clients of the flood.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from sidecar.gate.messages import RequestFacts

# A burst of 1,000 requests is recorded one by one; after that, 100 a second.
BURST = 1_000
PER_SECOND = 100.0
SUMMARY_SECONDS = 0.25
SHOWN_SUBJECTS = 10

First = TypeVar("First")
Written = TypeVar("Written")


class Allowance:
    """How many records may still be written one by one."""

    __slots__ = ("_refilled", "_time", "left")

    def __init__(self, time: Callable[[], float] | None = None) -> None:
        self._time = time or asyncio.get_running_loop().time
        self._refilled = self._time()
        self.left = float(BURST)

    def take(self) -> bool:
        """Take one record from the allowance. False: there is none left."""
        now = self._time()
        self.left = min(float(BURST), self.left + (now - self._refilled) * PER_SECOND)
        self._refilled = now
        if self.left < 1:
            return False
        self.left -= 1
        return True


@dataclass(slots=True, eq=False)
class Summary(Generic[First, Written]):
    """The requests that one record counts. `first` is what their log keeps of the first one."""

    first: First
    facts: RequestFacts
    written: asyncio.Future[Written | None]
    count: int = 0
    subjects: dict[str, None] = field(default_factory=dict)

    def add(self, facts: RequestFacts) -> None:
        """Count one more request."""
        self.count += 1
        subject = facts.subject
        if subject is not None and len(self.subjects) < SHOWN_SUBJECTS:
            self.subjects[subject] = None

    @property
    def shared(self) -> RequestFacts:
        """The facts that all requests of a summary of several have in common."""
        return RequestFacts(
            gatekept=self.facts.gatekept,
            tenant_id=self.facts.tenant_id,
            principal=self.facts.principal,
            route=self.facts.route,
            policies=self.facts.policies,
        )


class Summaries(Generic[First, Written]):
    """The open summaries, one for each kind of request. `write` writes a summary when it closes."""

    def __init__(self, write: Callable[[Summary[First, Written]], Awaitable[Written]]) -> None:
        self._write = write
        self.open: dict[Hashable, Summary[First, Written]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def join(self, kind: Hashable, first: First, facts: RequestFacts) -> Written | None:
        """Add a request to the summary of its kind and wait until that is written. None: writing failed in a
        way that `write` did not foresee."""
        summary = self.open.get(kind)
        if summary is None:
            summary = Summary(first, facts, asyncio.get_running_loop().create_future())
            self.open[kind] = summary
            task = asyncio.create_task(self._close(kind, summary), name="scopegate-flood-summary")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        summary.add(facts)
        return await asyncio.shield(summary.written)

    async def _close(self, kind: Hashable, summary: Summary[First, Written]) -> None:
        await asyncio.sleep(SUMMARY_SECONDS)
        del self.open[kind]
        written: Written | None = None
        try:
            written = await self._write(summary)
        finally:
            summary.written.set_result(written)  # its clients wait for this
