"""The interface of a storage engine. All logic above this interface is shared by every engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from sidecar.core.command import Bind, Switch, Turn
from sidecar.core.freeze import Freeze
from sidecar.core.idempotency import Claimed
from sidecar.core.record import Entry
from sidecar.core.scope import Execution, Scope, ScopeStatus
from sidecar.core.state import Names, State

T = TypeVar("T")

# Records that were bound to a run, by sequence number.
Bindings = Mapping[int, str]


@dataclass(frozen=True, slots=True)
class ChainHead:
    """The end of a writer's chain: its name, the last sequence number, hash and time (0 and zeros: empty).

    `unlogged` holds the run bindings that no record names yet; the next record names them.
    """

    writer: str
    seq: int
    hash: bytes
    time: int
    unlogged: Bindings = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LogRow:
    """One record of the log: its source entry, its sequence number, its exact bytes and their hash."""

    seq: int
    entry: Entry
    envelope: bytes
    hash: bytes


@dataclass(frozen=True, slots=True)
class Changes:
    """What one transaction writes.

    `issued` and `admitted` are new scopes and executions. `scopes` and `executions` are rows in their new
    state. `log` are new log rows. `kept` pairs each key with the decision that is kept under it. `bound`
    pairs the sequence number of a record with its run. `logged` are the records whose binding the log names
    from now on. `now` is the time of the whole transaction. `stepped` is the number of microseconds to
    subtract from the admission time of every execution that was admitted after `now`. `claimed` are
    idempotency keys in their new state, and so are `freezes`.
    """

    now: int
    issued: Sequence[Scope]
    scopes: Sequence[Scope]
    admitted: Sequence[Execution]
    executions: Sequence[Execution]
    log: Sequence[LogRow]
    kept: Sequence[tuple[bytes, str]]
    turned: Sequence[Turn]
    bound: Sequence[tuple[int, Bind]]
    logged: Sequence[int] = ()
    stepped: int = 0
    claimed: Sequence[Claimed] = ()
    freezes: Sequence[Freeze] = ()


@dataclass(frozen=True, slots=True)
class Page:
    """One page of a list, newest first; `next` is the cursor of the following page or None."""

    rows: Sequence[Any]
    next: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ScopesWanted:
    """Which scopes to list. None matches any value. `status` is the status at `now`, and `prefix` is the
    beginning of the scope_id."""

    incident_id: str | None = None
    tenant_id: str | None = None
    status: ScopeStatus | None = None
    prefix: str | None = None
    now: int

    @property
    def bounded(self) -> bool:
        """Whether a page looks at a bounded part of the list only, because no index serves the filter."""
        served = self.incident_id is not None or self.prefix is not None
        return not served and not (self.tenant_id is None and self.status is None)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutionsWanted:
    """Which executions to list. None matches any value. `since` is the earliest time of admission, in
    microseconds since 1970."""

    status: str | None = None
    incident_id: str | None = None
    action: str | None = None
    since: int | None = None

    @property
    def bounded(self) -> bool:
        """Whether a page looks at a bounded part of the list only, because no index serves the filter."""
        return self.incident_id is None and not (self.action is None and self.since is None)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredDecision:
    """A record as the log holds it.

    `previous` is the hash of the record before it. `bound_run_id` is the run that the record was bound to
    after it was written.
    """

    seq: int
    envelope: bytes
    hash: bytes
    previous: bytes
    bound_run_id: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Sizes in bytes: the database, its WAL, the free space on its disk, and the growth in the last 24 hours.

    None means that the value could not be measured. A database in memory has no file to measure.
    """

    size: int | None = None
    wal_size: int | None = None
    free: int | None = None
    growth_per_day: int | None = None


class StoreObserver(Protocol):
    """Receives the outcome of every commit, for example to keep metrics."""

    def batch_committed(self, size: int, seconds: float) -> None: ...

    def batch_failed(self, size: int) -> None: ...


class Engine(Protocol):
    """One database, one writer."""

    async def open(self) -> ChainHead:
        """Take the database for this process and bring its schema up to date."""

    async def head(self) -> ChainHead:
        """Return the end of the chain as the database holds it."""

    async def transact(self, names: Names, decide: Callable[[State], Changes], *, durable: bool) -> None:
        """Load the named rows, call `decide`, write the changes it returns and commit, all or nothing.

        Raises StoreUnavailable if the storage fails. Any other exception from `decide` or from a constraint
        propagates unchanged. With `durable` False, a power failure may lose the transaction.
        """

    async def probe(self) -> None:
        """Write a meaningless row durably, which makes every earlier commit durable as well.

        Raises StoreUnavailable if the write fails.
        """

    async def rehearse(self, names: Names, decide: Callable[[State], Changes]) -> None:
        """Make the same changes as `transact` and undo them. Then write and commit as much as a large
        decision.

        Raises the same exceptions as `transact`.
        """

    async def look(self, names: Names, view: Callable[[State], T]) -> T:
        """Load the rows that a transaction would load now, and pass them to `view`. Runs off the event
        loop."""

    async def tidy(self) -> None:
        """Housekeeping between batches."""

    async def close(self) -> None: ...

    async def scope(self, scope_id: str) -> Scope | None: ...

    async def scopes(
        self,
        tenant_id: str,
        incident_id: str,
        issuer: str | None = None,
        *,
        before: str | None,
        limit: int,
    ) -> tuple[Page, int]:
        """A page of an incident's scopes, and the total number of them. With `issuer`, only those for which
        that authenticated principal asked."""

    async def scopes_wanted(self, wanted: ScopesWanted, *, before: str | None, limit: int) -> Page:
        """A page of scopes, of all tenants and incidents unless one is named.

        If no index serves the filter, a page may hold fewer than `limit` scopes, or none, and still have a
        next page.
        """

    async def lapsed_scopes(self, now: int, *, before: str | None, limit: int) -> Page:
        """A page of the scopes that were past their expiry at `now`, including revoked and exhausted ones."""

    async def decisions(
        self, filters: Mapping[str, str], *, since: int | None = None, before: str | None, limit: int
    ) -> Page:
        """A page of StoredDecision; `filters` maps columns of the log to the value wanted. `since` is the
        earliest time of the record, in microseconds since 1970."""

    async def decision(self, decision_id: str) -> StoredDecision | None: ...

    async def execution(self, decision_id: str) -> Execution | None: ...

    async def executions_of(self, scope_id: str) -> Sequence[Execution]:
        """All executions of a scope, oldest first."""

    async def is_kept(self, key: bytes) -> bool:
        """Whether a record is kept under this key."""

    async def is_on(self, switch: Switch) -> bool: ...

    async def freezes_in_force(self, now: int) -> Sequence[Freeze]:
        """The freezes in force, the newest first."""

    async def freezes(self, *, limit: int) -> Sequence[Freeze]:
        """The newest freezes, whether or not they are in force, the newest first."""

    async def executions(self, wanted: ExecutionsWanted, *, before: str | None, limit: int) -> Page: ...

    async def unknown_executions(self) -> tuple[int, int | None]:
        """How many executions are unknown, and when the oldest of them was admitted."""

    async def running_executions(self) -> tuple[int, int | None]:
        """How many executions are running, and when the first of them must have been reported."""

    async def overdue_executions(self, now: int, *, limit: int) -> Sequence[str]:
        """The ids of running executions that must have been reported by `now`, the earliest first."""

    async def footprint(self, now: int) -> Footprint:
        """The size of the database and the free space on its disk. Measured off the event loop."""
