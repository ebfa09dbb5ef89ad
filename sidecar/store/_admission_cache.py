"""Caches the executions that brakes count, so that a batch reads only the groups that are not cached yet.

The cache stays true because only its writer changes the database, and the writer adds every commit to it.
When a transaction fails, the whole cache is dropped and read again. A busy window holds many thousands of
executions, so a batch does not copy them: it lays its own changes over them.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sidecar.core.brakes import AdmissionGroup, CountCache, groups_containing
from sidecar.core.scope import UNDER_WAY, Execution

# Beyond these limits the whole cache is dropped and read again on demand.
MAX_GROUPS = 5_000
MAX_EXECUTIONS = 200_000
MAX_COUNTS = 10_000
# A group is checked for staleness after this many requests. Brakes with different windows share a group, so a
# name that is too old for one brake may still count for another.
REQUESTS_PER_CHECK = 256

Reading = Callable[[sqlite3.Connection, AdmissionGroup, int], Sequence[Execution]]


class Overlaid(dict[str, Execution]):
    """Executions by name, over others that are not copied: what it lacks is looked up below.

    It is for `[]` and `get` only. Everything else sees only what is above.
    """

    __slots__ = ("_below",)

    def __init__(self, below: Mapping[str, Execution], above: Mapping[str, Execution] | None = None) -> None:
        super().__init__(above or {})
        self._below = below

    def __missing__(self, name: str) -> Execution:
        return self._below[name]

    def get(self, name: str, default: Any = None) -> Any:
        try:
            return self[name]
        except KeyError:
            return default


class Grown(Sequence[str]):
    """The names of a group, which are not copied, and those that a batch appends."""

    __slots__ = ("_appended", "_stored")

    def __init__(self, stored: Sequence[str]) -> None:
        self._stored = stored
        self._appended: list[str] = []

    def append(self, name: str) -> None:
        self._appended.append(name)

    def __len__(self) -> int:
        return len(self._stored) + len(self._appended)

    def __getitem__(self, index: Any) -> Any:
        beyond = index - len(self._stored)
        return self._stored[index] if beyond < 0 else self._appended[beyond]


@dataclass(slots=True)
class _Kept:
    """The executions of a group by name, oldest first: those admitted after `since`, and those under
    way.

    `earliest` is the earliest time requested in the last `requests` requests.
    """

    since: int
    names: list[str]
    earliest: int
    requests: int = 0


class AdmissionCache:
    """Executions by group. `found` holds results of the core, which stay true while names are added."""

    def __init__(self, read: Reading) -> None:
        self._read = read
        self._groups: dict[AdmissionGroup, _Kept] = {}
        self._executions: dict[str, Execution] = {}
        self.found: CountCache = {}

    def of(
        self, connection: sqlite3.Connection, wanted: Mapping[AdmissionGroup, int]
    ) -> tuple[dict[AdmissionGroup, Sequence[str]], Mapping[str, Execution]]:
        """The names of each group, at least as far back as wanted, and the executions that they name.

        Both are views: they grow with the cache, and the caller does not change them.
        """
        if (
            len(self._groups) > MAX_GROUPS
            or len(self._executions) > MAX_EXECUTIONS
            or len(self.found) > MAX_COUNTS
        ):
            self.forget()
        admissions: dict[AdmissionGroup, Sequence[str]] = {}
        for group, since in wanted.items():
            kept = self._groups.get(group)
            if kept is None or kept.since > since:
                kept = self._load(connection, group, since)
            kept.earliest, kept.requests = min(kept.earliest, since), kept.requests + 1
            if kept.requests >= REQUESTS_PER_CHECK:
                if kept.names and self._is_stale(kept, kept.earliest):
                    self._age(group, kept, kept.earliest)
                kept.earliest, kept.requests = since, 0
            admissions[group] = kept.names
        return admissions, self._executions

    def learn(self, committed: Iterable[Execution]) -> None:
        """Add committed executions to the cache."""
        for execution in committed:
            name = execution.decision_id
            if name in self._executions:
                self._executions[name] = execution
                continue
            for group in groups_containing(execution) if self._groups else ():
                if group not in self._groups:
                    continue
                if execution.status == "in_flight":
                    self._groups[group].names.append(name)
                    self._executions[name] = execution
                else:
                    # It may be older than the names that are known: an unknown one that was reconciled.
                    # Behind them it would end the count of a brake early, so the group is read again.
                    del self._groups[group]
                    self._forget_counts(group)

    def forget(self) -> None:
        self._groups.clear()
        self._executions.clear()
        self.found.clear()

    def _load(self, connection: sqlite3.Connection, group: AdmissionGroup, since: int) -> _Kept:
        read = self._read(connection, group, since)
        self._executions.update((execution.decision_id, execution) for execution in read)
        if group in self._groups:
            self._forget_counts(group)
        kept = self._groups[group] = _Kept(since, [execution.decision_id for execution in read], since)
        return kept

    def _forget_counts(self, group: AdmissionGroup) -> None:
        for key in [key for key in self.found if key[1] == group]:
            del self.found[key]

    def _is_stale(self, kept: _Kept, since: int) -> bool:
        """Whether half of the names are too old for every brake."""
        return self._executions[kept.names[len(kept.names) // 2]].admitted_at <= since

    def _age(self, group: AdmissionGroup, kept: _Kept, since: int) -> None:
        kept.names[:] = [
            name
            for name in kept.names
            if self._executions[name].admitted_at > since or self._executions[name].status in UNDER_WAY
        ]
        kept.since = since
        self._forget_counts(group)
