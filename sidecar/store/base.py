"""What an engine must do, and nothing of how. All logic above this line is shared by every engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from sidecar.core.apply import State
from sidecar.core.brakes import Tally
from sidecar.core.command import Bind, Switch, Turn
from sidecar.core.record import Entry
from sidecar.core.scope import Execution, Scope, ScopeStatus

T = TypeVar("T")

# Records that were bound to a run, by sequence number.
Bindings = Mapping[int, str]


@dataclass(frozen=True, slots=True)
class Head:
    """The end of a writer's chain: its name, the last sequence number, hash and time (0 and zeros: empty).

    `unsaid` are the bindings of which no record tells yet; the next one does.
    """

    writer: str
    seq: int
    hash: bytes
    time: int
    unsaid: Bindings = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LogRow:
    """One record of the log: the entry it was made from, its place, its exact bytes and their hash."""

    seq: int
    entry: Entry
    envelope: bytes
    hash: bytes


@dataclass(frozen=True, slots=True)
class Names:
    """The rows that a batch needs: scopes by id, executions by admission (which bring their scopes along),
    admissions by tally, newer than a time (microseconds) or still in flight and all but those not sent, keys
    under which a record is kept once, switches, and requests by the records that have no run."""

    scopes: Sequence[str] = ()
    executions: Sequence[str] = ()
    tallies: Mapping[Tally, int] = field(default_factory=dict)
    once: Sequence[bytes] = ()
    switches: Sequence[Switch] = ()
    requests: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Changes:
    """What one transaction writes: new scopes, scopes and executions in their new state, new log rows; keys
    with the decision that is kept under each; switches; and records, by sequence number, with their run.

    `now` is when all of it is written. `said` are the records of whose binding the log tells now. `stepped`:
    executions after `now` were admitted so many microseconds earlier than they say.
    """

    now: int
    issued: Sequence[Scope]
    scopes: Sequence[Scope]
    executions: Sequence[Execution]
    log: Sequence[LogRow]
    kept: Sequence[tuple[bytes, str]]
    turned: Sequence[Turn]
    bound: Sequence[tuple[int, Bind]]
    said: Sequence[int] = ()
    stepped: int = 0


@dataclass(frozen=True, slots=True)
class Page:
    """One page of a list, newest first; `next` is the cursor of the following page or None."""

    rows: Sequence[Any]
    next: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ScopesWanted:
    """Which scopes to list; None: any. A status is the one at `now`."""

    incident_id: str | None = None
    tenant_id: str | None = None
    status: ScopeStatus | None = None
    now: int

    @property
    def bounded(self) -> bool:
        """Whether only a piece of the list is looked at, as no index leads to what is wanted."""
        return self.incident_id is None and not (self.tenant_id is None and self.status is None)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredDecision:
    """A record as the log holds it. `previous` is the hash that its own hash builds on, `bound_run_id` the
    run that the record was bound to after it was made."""

    seq: int
    envelope: bytes
    hash: bytes
    previous: bytes
    bound_run_id: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Bytes: of the database, of its WAL, free on its disk, and what came in the last 24 hours. None: it
    could not be measured, as in memory, where there is no file."""

    size: int | None = None
    wal_size: int | None = None
    free: int | None = None
    growth_per_day: int | None = None


class StoreObserver(Protocol):
    """Who wants to know how the writer fares."""

    def batch_committed(self, size: int, seconds: float) -> None: ...

    def batch_failed(self, size: int) -> None: ...


class Engine(Protocol):
    """One database, one writer."""

    async def open(self) -> Head:
        """Take the database for this process and bring its schema up to date."""

    async def head(self) -> Head:
        """The end of the chain as the database has it."""

    async def transact(self, names: Names, decide: Callable[[State], Changes], *, durable: bool) -> None:
        """Load what is named, call `decide`, write what it returns and commit, all or nothing.

        Raises StoreUnavailable where the storage failed; whatever else `decide` or a constraint raises
        comes through as it is. `durable` False allows that a power failure loses the transaction.
        """

    async def probe(self) -> None:
        """Write something that means nothing; then all that was committed before is durable, too.

        Raises StoreUnavailable where that does not work.
        """

    async def rehearse(self, names: Names, decide: Callable[[State], Changes]) -> None:
        """Do as `transact` does and undo it, then write and commit as much as a large decision takes.

        Raises what a transaction may raise.
        """

    async def look(self, names: Names, view: Callable[[State], T]) -> T:
        """What a view makes of what a transaction would load now. It is made off the event loop."""

    async def tidy(self) -> None:
        """Housekeeping between batches."""

    async def close(self) -> None: ...

    async def scope(self, scope_id: str) -> Scope | None: ...

    async def scopes(
        self, tenant_id: str, incident_id: str, *, before: str | None, limit: int
    ) -> tuple[Page, int]:
        """A page of an incident's scopes, and how many there are in all."""

    async def scopes_wanted(self, wanted: ScopesWanted, *, before: str | None, limit: int) -> Page:
        """A page of scopes, of all tenants and incidents unless one is named. One that no index serves may
        hold fewer than `limit`, or none, and still have a next one."""

    async def lapsed_scopes(self, now: int, *, before: str | None, limit: int) -> Page:
        """A page of the scopes whose time was over at `now`, whatever else became of them."""

    async def decisions(self, filters: Mapping[str, str], *, before: str | None, limit: int) -> Page:
        """A page of StoredDecision; `filters` maps columns of the log to the value wanted."""

    async def decision(self, decision_id: str) -> StoredDecision | None: ...

    async def execution(self, decision_id: str) -> Execution | None: ...

    async def executions_of(self, scope_id: str) -> Sequence[Execution]:
        """All executions of a scope, oldest first."""

    async def is_kept(self, key: bytes) -> bool:
        """Whether a record is kept under a key."""

    async def is_on(self, switch: Switch) -> bool: ...

    async def executions(self, status: str | None, *, before: str | None, limit: int) -> Page: ...

    async def unknown_executions(self) -> tuple[int, int | None]:
        """How many executions are unknown, and when the oldest of them was admitted."""

    async def footprint(self, now: int) -> Footprint:
        """What the database takes and leaves of its disk. It is measured off the event loop."""
