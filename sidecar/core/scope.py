"""An execution scope: a limited permission and its remaining attempts and budget. Values only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from sidecar.core.money import to_dollars
from sidecar.core.record import iso_time

ScopeStatus = Literal["active", "exhausted", "expired", "revoked"]
ExecutionStatus = Literal["in_flight", "answered", "not_sent", "unknown", "executed", "not_executed"]

# These endings prove that nothing was executed, so they return the attempt and the hold (G2, G8).
RELEASING: frozenset[str] = frozenset({"not_sent", "not_executed"})

MAX_INTENT_CHARS = 2_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """The terms of a scope, which never change, and the counters that admission and settlement update.

    Times are in microseconds since 1970 (UTC), money is in micro-dollars. `held` is the sum of the holds of
    executions without a known cost. `overrun` is true once a reported cost exceeded its hold.
    """

    scope_id: str
    tenant_id: str
    incident_id: str
    allowed_actions: tuple[str, ...]
    max_cost: int
    max_attempts: int
    created_at: int
    expires_at: int
    intent: str
    target_agents: tuple[str, ...]
    created_by: str
    attempts_used: int = 0
    settled: int = 0
    held: int = 0
    overrun: bool = False
    revoked_at: int | None = None

    @property
    def attempts_remaining(self) -> int:
        return max(0, self.max_attempts - self.attempts_used)

    @property
    def spent(self) -> int:
        """The amount that counts against the ceiling: settled cost and open holds, in micro-dollars."""
        return self.settled + self.held

    @property
    def cost_exhausted(self) -> bool:
        """G3: an overrun exhausts the scope. Spending all of a ceiling above zero exhausts it, too."""
        return self.overrun or 0 < self.max_cost <= self.spent

    def status(self, now: int) -> ScopeStatus:
        """The status to show. A scope that was exhausted or expired before its revocation stays so."""
        if self.attempts_remaining == 0 or self.cost_exhausted:
            return "exhausted"
        if self.revoked_at is not None:
            return "expired" if self.expires_at <= self.revoked_at else "revoked"
        return "expired" if now >= self.expires_at else "active"

    def to_dict(self, now: int) -> dict[str, Any]:
        """The scope as a JSON object, with the attempts that remain and the status at `now`."""
        return {
            "scope_id": self.scope_id,
            "incident_id": self.incident_id,
            "allowed_actions": list(self.allowed_actions),
            "max_cost_usd": to_dollars(self.max_cost),
            "max_attempts": self.max_attempts,
            "expires_at": iso_time(self.expires_at),
            "intent": self.intent,
            "target_agents": list(self.target_agents),
            "created_at": iso_time(self.created_at),
            "created_by": self.created_by,
            "attempts_used": self.attempts_used,
            "attempts_remaining": self.attempts_remaining,
            "cost_used_usd": to_dollars(self.spent),
            "status": self.status(now),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """One admitted execution and its ending. The id of the admitting decision identifies it.

    An execution that needs no scope (a low risk, a shadow route) has neither scope nor attempt number.
    """

    decision_id: str
    scope_id: str | None
    tenant_id: str
    incident_id: str
    action: str
    request_id: str
    attempt_number: int | None
    hold: int
    admitted_at: int
    principal: str = "anonymous"
    target_agents: tuple[str, ...] = ()
    status: ExecutionStatus = "in_flight"
    cost: int | None = None
    ended_at: int | None = None
    http_status: int | None = None
    cause: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "decision_id": self.decision_id,
            "scope_id": self.scope_id,
            "tenant_id": self.tenant_id,
            "incident_id": self.incident_id,
            "action": self.action,
            "request_id": self.request_id,
            "attempt_number": self.attempt_number,
            "status": self.status,
            "hold_usd": to_dollars(self.hold),
            "cost_usd": None if self.cost is None else to_dollars(self.cost),
            "http_status": self.http_status,
            "cause": self.cause,
            "admitted_at": iso_time(self.admitted_at),
            "ended_at": None if self.ended_at is None else iso_time(self.ended_at),
        }
