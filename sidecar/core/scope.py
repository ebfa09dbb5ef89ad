"""An execution scope: a limited permission and its remaining attempts and budget. Values only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
