"""Caches the executions that brakes count, so that a batch reads only the tallies that are not cached yet.

The cache stays true because only its writer changes the database, and the writer adds every commit to it.
When a transaction fails, the whole cache is dropped and read again.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from sidecar.core.brakes import Found, Tally, tallies_with
from sidecar.core.scope import Execution

# Beyond these limits the whole cache is dropped and read again on demand.
MAX_TALLIES = 5_000
MAX_EXECUTIONS = 200_000
# A tally is checked for staleness after this many requests. Brakes with different windows share a tally, so a
# name that is too old for one brake may still count for another.
ASKS_PER_LOOK = 256

Reading = Callable[[sqlite3.Connection, Tally, int], Sequence[Execution]]


@dataclass(slots=True)
class _Kept:
    """The executions of a tally by name, oldest first: those admitted after `since`, and those in flight.

    `asked` is the earliest time requested in the last `asks` requests.
    """

    since: int
    names: list[str]
    asked: int
    asks: int = 0


class Recent:
    """Executions by tally. `found` holds results of the core, which stay true while names are added."""

    def __init__(self, read: Reading) -> None:
        self._read = read
        self._tallies: dict[Tally, _Kept] = {}
        self._executions: dict[str, Execution] = {}
        self.found: Found = {}

    def of(
        self, connection: sqlite3.Connection, wanted: Mapping[Tally, int]
    ) -> tuple[dict[Tally, list[str]], dict[str, Execution]]:
        """The names of each tally, at least as far back as wanted, and the executions that they name."""
        if len(self._tallies) > MAX_TALLIES or len(self._executions) > MAX_EXECUTIONS:
            self.forget()
        admissions: dict[Tally, list[str]] = {}
        executions: dict[str, Execution] = {}
        for tally, since in wanted.items():
            kept = self._tallies.get(tally)
            if kept is None or kept.since > since:
                kept = self._load(connection, tally, since)
            kept.asked, kept.asks = min(kept.asked, since), kept.asks + 1
            if kept.asks >= ASKS_PER_LOOK:
                if kept.names and self._is_stale(kept, kept.asked):
                    self._age(kept, kept.asked)
                kept.asked, kept.asks = since, 0
            admissions[tally] = kept.names
            executions.update((name, self._executions[name]) for name in kept.names)
        return admissions, executions

    def learn(self, committed: Iterable[Execution]) -> None:
        """Add committed executions to the cache."""
        for execution in committed:
            name = execution.decision_id
            if name in self._executions:
                self._executions[name] = execution
                continue
            for tally in tallies_with(execution):
                if tally in self._tallies:
                    self._tallies[tally].names.append(name)
                    self._executions[name] = execution

    def forget(self) -> None:
        self._tallies.clear()
        self._executions.clear()
        self.found.clear()

    def _load(self, connection: sqlite3.Connection, tally: Tally, since: int) -> _Kept:
        read = self._read(connection, tally, since)
        self._executions.update((execution.decision_id, execution) for execution in read)
        kept = self._tallies[tally] = _Kept(since, [execution.decision_id for execution in read], since)
        self.found.clear()
        return kept

    def _is_stale(self, kept: _Kept, since: int) -> bool:
        """Whether half of the names are too old for every brake."""
        return self._executions[kept.names[len(kept.names) // 2]].admitted_at <= since

    def _age(self, kept: _Kept, since: int) -> None:
        kept.names[:] = [
            name
            for name in kept.names
            if self._executions[name].admitted_at > since or self._executions[name].status == "in_flight"
        ]
        kept.since = since
        self.found.clear()
