"""Executions that are reported: their token and URL, and the time limits of those that are not reported.

A backend that answers 202 works on. It gets a completion token with the request, and reports the end with it
(`Gate.report`). The store has the time limit of each running execution, so limits outlive a restart. A task
watches the earliest limit while any execution is running; `core.endings` judges it exactly.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets

from sidecar.core.command import Ending, Lapse, Reply, Settled
from sidecar.core.instant import SECOND
from sidecar.core.scope import Execution
from sidecar.errors import StoreClosed, StoreUnavailable
from sidecar.gate.observer import Observer
from sidecar.ids import new_decision_id
from sidecar.store.batch import Store
from sidecar.telemetry.events import LogEvent

RECOVERY_PREFIX = "/api/v1/recovery/"
# The path of the call that reports the end of an execution, which the admission's decision_id names.
EXECUTIONS_PREFIX = f"{RECOVERY_PREFIX}executions/"
COMPLETE = "/complete"

TOKEN_BYTES = 32
# How often the clock is read, at least: the sidecar's time may advance faster than the event loop's.
LOOK_SECONDS = 0.5
# Running executions that are ended at once.
PAGE = 500


def new_token() -> str:
    """A completion token: 256 bits from the system's CSPRNG, in 43 characters that need no quoting."""
    return secrets.token_urlsafe(TOKEN_BYTES)


def digest_of(token: str) -> bytes:
    """The SHA-256 of a completion token, which the store has in its place."""
    return hashlib.sha256(token.encode()).digest()


def completion_headers(base: str, decision_id: str, token: str) -> list[tuple[bytes, bytes]]:
    """The headers that let a backend report. `base` is the URL of the data listener."""
    url = f"{base}{EXECUTIONS_PREFIX}{decision_id}{COMPLETE}"
    return [
        (b"Scopegate-Completion-Url", url.encode("ascii")),
        (b"Scopegate-Completion-Token", token.encode("ascii")),
    ]


class TimeLimits:
    """Ends running executions as `unknown` once their time to be reported has passed."""

    def __init__(self, store: Store, observer: Observer) -> None:
        self._store = store
        self._observer = observer
        self._next: int | None = None  # the earliest limit, in microseconds since 1970
        self._watching: asyncio.Task[None] | None = None

    async def begin(self) -> None:
        """Take up the limits of the executions that an earlier process left running.

        Raises StoreUnavailable.
        """
        _, earliest = await self._store.engine.running_executions()
        self._watch_for(earliest)

    def note(self, reply: Reply) -> None:
        """Watch the limit of an execution that is running, according to the reply to its settlement."""
        if isinstance(reply, Ending) and reply.execution is not None:
            self.running(reply.execution)

    def running(self, execution: Execution) -> None:
        """Watch the limit of an execution if it is running."""
        if execution.status == "running":
            self._watch_for(execution.report_by)

    async def close(self) -> None:
        """Stop watching. Running executions stay so; the next process takes up their limits."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait([self._watching])

    def _watch_for(self, limit: int | None) -> None:
        if limit is None:
            return
        self._next = limit if self._next is None else min(limit, self._next)
        if self._watching is None or self._watching.done():
            self._watching = asyncio.create_task(self._watch(), name="scopegate-time-limits")

    async def _watch(self) -> None:
        while self._next is not None:
            left = (self._next - self._store.now()) / SECOND
            if left > 0:
                await asyncio.sleep(min(left, LOOK_SECONDS))
                continue
            due, self._next = self._next, None  # what is noted from here on is kept
            try:
                await self._end_overdue()
                _, earliest = await self._store.engine.running_executions()
            except StoreClosed:
                return
            except StoreUnavailable:
                earliest = due
                await asyncio.sleep(LOOK_SECONDS)
            self._watch_for(earliest)

    async def _end_overdue(self) -> None:
        overdue = await self._store.engine.overdue_executions(self._store.now(), limit=PAGE)
        commands = [Lapse(decision_id=new_decision_id(), admission_id=each) for each in overdue]
        for reply in await asyncio.gather(*map(self._store.submit, commands)):
            if isinstance(reply, Settled):
                execution = reply.execution
                self._observer.ended(execution.status, execution.route)
                LogEvent.REPORT_MISSING.log(
                    decision_id=execution.decision_id,
                    scope_id=execution.scope_id,
                    incident_id=execution.incident_id,
                    action=execution.action,
                )
