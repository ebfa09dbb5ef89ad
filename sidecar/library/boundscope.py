"""Scopes as objects: `BoundExecutionScope` is a snapshot of a stored scope, and `ScopeStore` grants and finds
scopes.

Both are sync and work from any thread, inside and outside a running loop. Every check asks the store; a
snapshot permits nothing by itself.
"""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any, ClassVar

from sidecar.core.command import Admit, Issued, Refuse, Revoke, Revoked
from sidecar.core.facts import is_identifier
from sidecar.core.instant import iso_time, to_datetime
from sidecar.core.money import to_dollars
from sidecar.core.scope import RELEASING, Execution, Scope
from sidecar.errors import StoreUnavailable
from sidecar.ids import new_decision_id
from sidecar.library.commands import TENANT, admission, admit_sync, allowed, grant, micros_of, settle_sync
from sidecar.library.runtime import Query, ThreadedStore, configured_store
from sidecar.store.base import Engine, Page
from sidecar.store.batch import predicted

# Scopes per read. The executions of each scope are read with it.
PAGE = 200


@dataclass
class BoundExecutionScope:
    """A bound execution scope that gates recovery actions: a snapshot of the stored scope at the last read.

    Times are aware and in UTC, money is in dollars. `status` is active, exhausted, expired or revoked. An
    object built by hand, with a `scope_id` that the store does not know, permits nothing.
    """

    scope_id: str
    incident_id: str
    allowed_actions: list[str]
    max_cost_usd: float
    max_attempts: int
    expires_at: datetime
    intent: str
    target_agents: list[str] = field(default_factory=list)
    created_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    created_by: str = "system"
    attempts_used: int = 0
    cost_used_usd: float = 0.0
    status: str = "active"
    execution_log: list[dict[str, Any]] = field(default_factory=list)

    def is_valid(self) -> bool:
        """Whether the stored scope is active now. False if the store does not answer."""
        store = configured_store()
        try:
            scope = store.read_sync(scope_of(self.scope_id))
        except StoreUnavailable:
            return False
        return scope is not None and scope.status(store.now()) == "active"

    def can_execute(self, action: str, incident_id: str) -> tuple[bool, str | None]:
        """Whether the stored scope would admit this action now, for its own target agents; if not, the code
        of the refusal. Consumes and records nothing."""
        store = configured_store()
        try:
            command = self._admission(store, incident_id, action)
            if isinstance(command, Refuse):
                return False, command.refusal.code
            found = store.read_sync(lambda engine: predicted(engine, command, store.now()))
        except StoreUnavailable:
            return False, "store_unavailable"
        return found.refusal is None, None if found.refusal is None else found.refusal.code

    def consume(self, action: str, cost_usd: float = 0.0) -> None:
        """Consume one attempt for an action that costs `cost_usd`, and refresh this object.

        Raises ScopeRefused (its subclasses say why), ValueError for an invalid cost, and StoreUnavailable.
        Nothing is consumed then.
        """
        cost = micros_of("cost_usd", cost_usd)
        store = configured_store()
        admitted = admit_sync(store, self._admission(store, self.incident_id, action, cost))
        scope = settle_sync(store, admitted, "answered", cost)
        try:
            executions = store.read_sync(lambda engine: engine.executions_of(self.scope_id))
        except StoreUnavailable:
            executions = [admitted.execution]  # the attempt is consumed even though the read failed
        self._refresh(snapshot(scope, executions, store.now()))

    def _admission(
        self, store: ThreadedStore, incident_id: str, action: str, cost: int = 0
    ) -> Admit | Refuse:
        """The command for an execution on the scope's own target agents. Raises StoreUnavailable."""
        scope = store.read_sync(scope_of(self.scope_id))
        return admission(
            store.policies,
            scope_id=self.scope_id,
            incident_id=incident_id,
            action=action,
            target_agents=[] if scope is None else list(scope.target_agents),
            announced_cost=cost,
        )

    def to_dict(self) -> dict[str, Any]:
        """Every field but `execution_log`, with `attempts_remaining`; times in ISO 8601.

        The object is refreshed first. If the store does not know the scope or does not answer, the fields are
        returned as they are, but the status is never active after the expiry.
        """
        store = configured_store()
        try:
            found = store.read_sync(_with_executions(self.scope_id))
        except StoreUnavailable:
            found = None
        if found is not None:
            scope, executions = found
            self._refresh(snapshot(scope, executions, store.now()))
        elif self.status == "active" and self.expires_at <= to_datetime(store.now()):
            self.status = "expired"
        return members_of(self)

    def _refresh(self, now: BoundExecutionScope) -> None:
        for each in fields(self):
            setattr(self, each.name, getattr(now, each.name))


def members_of(scope: BoundExecutionScope) -> dict[str, Any]:
    """The members that `BoundExecutionScope.to_dict` returns, without asking the store."""
    shown = {each.name: getattr(scope, each.name) for each in fields(scope) if each.name != "execution_log"}
    return {
        **shown,
        "allowed_actions": list(scope.allowed_actions),
        "target_agents": list(scope.target_agents),
        "expires_at": scope.expires_at.isoformat(timespec="microseconds"),
        "created_at": scope.created_at.isoformat(timespec="microseconds"),
        "attempts_remaining": max(0, scope.max_attempts - scope.attempts_used),
    }


def snapshot(scope: Scope, executions: Sequence[Execution], now: int) -> BoundExecutionScope:
    """A stored scope as an object. Its `execution_log` leaves out executions that were given back."""
    return BoundExecutionScope(
        scope_id=scope.scope_id,
        incident_id=scope.incident_id,
        allowed_actions=list(scope.allowed_actions),
        max_cost_usd=to_dollars(scope.max_cost),
        max_attempts=scope.max_attempts,
        expires_at=to_datetime(scope.expires_at),
        intent=scope.intent,
        target_agents=list(scope.target_agents),
        created_at=to_datetime(scope.created_at),
        created_by=scope.created_by,
        attempts_used=scope.attempts_used,
        cost_used_usd=to_dollars(scope.spent),
        status=scope.status(now),
        execution_log=[
            {
                "action": execution.action,
                "cost_usd": to_dollars(execution.hold if execution.cost is None else execution.cost),
                "timestamp": iso_time(execution.admitted_at),
                "attempt_number": execution.attempt_number,
            }
            for execution in sorted(executions, key=lambda each: (each.admitted_at, each.attempt_number))
            if execution.status not in RELEASING
        ],
    )


class ScopeStore:
    """The scopes of the configured store. This class is a singleton without state.

    Every method raises StoreUnavailable if the store does not answer.
    """

    _instance: ClassVar[ScopeStore | None] = None
    _creating: ClassVar[threading.Lock] = threading.Lock()

    def __new__(cls) -> ScopeStore:
        with cls._creating:
            if cls._instance is None:
                cls._instance = super().__new__(cls)
            return cls._instance

    def create_scope(
        self,
        incident_id: str,
        allowed_actions: list[str],
        intent: str,
        max_cost_usd: float = 0.50,
        max_attempts: int = 1,
        ttl_seconds: int = 300,
        target_agents: list[str] | None = None,
        created_by: str = "system",
    ) -> BoundExecutionScope:
        """Grant a scope. Raises ValueError, naming the wrong term (also a `max_cost_usd` below what an
        execution of an action holds), and ScopeRefused with the code `policy_denied` for an action that the
        configured catalogue does not list."""
        store = configured_store()
        command = grant(
            store.policies,
            incident_id,
            allowed_actions,
            intent,
            max_cost_usd,
            max_attempts,
            ttl_seconds,
            target_agents,
            created_by,
        )
        issued = allowed(command, store.submit_sync(command))
        assert isinstance(issued, Issued)
        return snapshot(issued.scope, (), store.now())

    def get_scope(self, scope_id: str) -> BoundExecutionScope | None:
        """The scope; None if it does not exist."""
        store = configured_store()
        found = store.read_sync(_with_executions(scope_id))
        return None if found is None else snapshot(*found, store.now())

    def get_scopes_for_incident(self, incident_id: str) -> list[BoundExecutionScope]:
        """All scopes of an incident, newest first."""
        if not is_identifier(incident_id):
            return []
        store = configured_store()

        async def page_before(before: str | None, engine: Engine) -> Page:
            page, _ = await engine.scopes(TENANT, incident_id, before=before, limit=PAGE)
            rows = [(scope, await engine.executions_of(scope.scope_id)) for scope in page.rows]
            return replace(page, rows=rows)

        return [snapshot(scope, made, store.now()) for scope, made in _rows(store, page_before)]

    def revoke_scope(self, scope_id: str) -> bool:
        """Revoke a scope; False if it does not exist. The call is repeatable, and each call is recorded."""
        if not is_identifier(scope_id):
            return False
        store = configured_store()
        command = Revoke(
            decision_id=new_decision_id(),
            scope_id=scope_id,
            policy_revision=store.policies.revision,
            tenant_id=TENANT,
            origin="library",
        )
        return isinstance(store.submit_sync(command), Revoked)

    def cleanup_expired(self) -> int:
        """Count the scopes that expired before they were used up or revoked. Deletes none, because scopes are
        evidence."""
        store = configured_store()
        now = store.now()
        lapsed = _rows(store, lambda before, engine: engine.lapsed_scopes(now, before=before, limit=PAGE))
        return sum(scope.tenant_id == TENANT and scope.status(now) == "expired" for scope in lapsed)


# Queries on the store ------------------------------------------------------------------------------------


def scope_of(scope_id: object) -> Query[Scope | None]:
    """A scope of this tenant."""

    async def query(engine: Engine) -> Scope | None:
        if not isinstance(scope_id, str) or not is_identifier(scope_id):
            return None
        found = await engine.scope(scope_id)
        return found if found is not None and found.tenant_id == TENANT else None

    return query


def _with_executions(scope_id: object) -> Query[tuple[Scope, Sequence[Execution]] | None]:
    async def query(engine: Engine) -> tuple[Scope, Sequence[Execution]] | None:
        scope = await scope_of(scope_id)(engine)
        return None if scope is None else (scope, await engine.executions_of(scope.scope_id))

    return query


def _rows(
    store: ThreadedStore, page_before: Callable[[str | None, Engine], Awaitable[Page]]
) -> Iterator[Any]:
    """The rows of every page of a list."""
    before: str | None = None
    while True:
        page = store.read_sync(partial(page_before, before))
        yield from page.rows
        before = page.next
        if before is None:
            return
