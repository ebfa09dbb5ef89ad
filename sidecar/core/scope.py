"""An execution scope: a limited permission and its remaining attempts and budget. Values only."""

from __future__ import annotations

from typing import Any, Literal

from sidecar.core.principal import ANONYMOUS_ID, Method, Principal, PrincipalKind
from sidecar.core.valueclass import valueclass

ScopeStatus = Literal["active", "exhausted", "expired", "revoked"]
ExecutionStatus = Literal[
    "in_flight",
    "running",
    "answered",
    "not_sent",
    "unknown",
    "succeeded",
    "failed",
    "not_executed",
    "executed",
]
# How a backend may report that its execution ended.
ReportedOutcome = Literal["succeeded", "failed", "not_executed"]

# An execution that has not ended yet: its answer, or its report, is still to come.
UNDER_WAY: frozenset[str] = frozenset({"in_flight", "running"})
# These endings prove that nothing was executed, so they return the attempt and the hold (G2, G8).
RELEASING: frozenset[str] = frozenset({"not_sent", "not_executed"})

MAX_INTENT_CHARS = 2_000


@valueclass
class Scope:
    """The terms of a scope, which never change, and the counters that admission and settlement update.

    `created_by` is the id of the principal that asked for it, if a method established one; otherwise it is
    what the request says. `on_behalf_of` is what the request says beside an established principal. Only
    principals that match `executors` (ids or globs) may spend it; empty: every executor may.

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
    executors: tuple[str, ...] = ()
    issuer_kind: PrincipalKind = "service"
    issuer_method: Method = "none"
    on_behalf_of: str | None = None
    attempts_used: int = 0
    settled: int = 0
    held: int = 0
    overrun: bool = False
    revoked_at: int | None = None

    @property
    def proven_issuer(self) -> str | None:
        """The id of the principal that asked for it; None if no method established that."""
        return None if self.issuer_method == "none" else self.created_by

    @property
    def issuer(self) -> dict[str, Any]:
        """The principal that asked for it, as the envelope of a record shows it."""
        return {
            "id": self.proven_issuer or ANONYMOUS_ID,
            "kind": self.issuer_kind,
            "method": self.issuer_method,
        }

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

    def counted(
        self, *, attempts_used: int, held: int, settled: int | None = None, overrun: bool | None = None
    ) -> Scope:
        """The same scope with other counters. None leaves a counter as it is."""
        return Scope(
            scope_id=self.scope_id,
            tenant_id=self.tenant_id,
            incident_id=self.incident_id,
            allowed_actions=self.allowed_actions,
            max_cost=self.max_cost,
            max_attempts=self.max_attempts,
            created_at=self.created_at,
            expires_at=self.expires_at,
            intent=self.intent,
            target_agents=self.target_agents,
            created_by=self.created_by,
            executors=self.executors,
            issuer_kind=self.issuer_kind,
            issuer_method=self.issuer_method,
            on_behalf_of=self.on_behalf_of,
            attempts_used=attempts_used,
            settled=self.settled if settled is None else settled,
            held=held,
            overrun=self.overrun if overrun is None else overrun,
            revoked_at=self.revoked_at,
        )

    def status(self, now: int) -> ScopeStatus:
        """The status to show. A scope that was exhausted or expired before its revocation stays so."""
        if self.attempts_remaining == 0 or self.cost_exhausted:
            return "exhausted"
        if self.revoked_at is not None:
            return "expired" if self.expires_at <= self.revoked_at else "revoked"
        return "expired" if now >= self.expires_at else "active"


@valueclass
class Execution:
    """One admitted execution and its ending. The id of the admitting decision identifies it.

    An execution that needs no scope (a low risk, a shadow route) has neither scope nor attempt number.
    `route` is the label of its route, or None if a program asked for it. An execution that ends by report has
    the SHA-256 of its completion token as `report_token`, until an operator reconciles it, and `report_by`:
    from that time on (microseconds since 1970) no report is taken.
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
    principal: str = ANONYMOUS_ID
    principal_kind: PrincipalKind = "service"
    principal_method: Method = "none"
    principal_groups: tuple[str, ...] = ()
    target_agents: tuple[str, ...] = ()
    route: str | None = None
    report_token: bytes | None = None
    report_by: int | None = None
    status: ExecutionStatus = "in_flight"
    cost: int | None = None
    ended_at: int | None = None
    http_status: int | None = None
    cause: str | None = None

    @property
    def asked_by(self) -> Principal:
        """The principal that asked for it."""
        return Principal(
            id=self.principal,
            kind=self.principal_kind,
            groups=self.principal_groups,
            tenant_id=self.tenant_id,
            method=self.principal_method,
        )

    def ended(
        self,
        status: ExecutionStatus,
        *,
        cost: int | None,
        ended_at: int,
        http_status: int | None,
        cause: str | None,
    ) -> Execution:
        """The same execution with its ending."""
        return Execution(
            decision_id=self.decision_id,
            scope_id=self.scope_id,
            tenant_id=self.tenant_id,
            incident_id=self.incident_id,
            action=self.action,
            request_id=self.request_id,
            attempt_number=self.attempt_number,
            hold=self.hold,
            admitted_at=self.admitted_at,
            principal=self.principal,
            principal_kind=self.principal_kind,
            principal_method=self.principal_method,
            principal_groups=self.principal_groups,
            target_agents=self.target_agents,
            route=self.route,
            report_token=self.report_token,
            report_by=self.report_by,
            status=status,
            cost=cost,
            ended_at=ended_at,
            http_status=http_status,
            cause=cause,
        )
