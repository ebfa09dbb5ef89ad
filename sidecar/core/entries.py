"""The decision records of the gate. The inputs hold the request, the details hold the findings."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

from sidecar.core.command import (
    AcceptClock,
    Admit,
    CountReplays,
    Issue,
    Lapse,
    LiftFreeze,
    PassUnlisted,
    Reconcile,
    Refuse,
    Report,
    RequestLine,
    Revoke,
    SetFreeze,
    Settle,
    Turn,
)
from sidecar.core.facts import Claims
from sidecar.core.freeze import Freeze, written
from sidecar.core.instant import SECOND, iso_time
from sidecar.core.money import to_dollars
from sidecar.core.principal import DEFAULT_TENANT, PrincipalKind
from sidecar.core.record import DecisionOutcome, DecisionSource, DecisionType, Entry, Event, Record
from sidecar.core.scope import Execution, Scope
from sidecar.errors import Refusal

# The log omits the parameters of a larger body, because any client could otherwise fill the disk. The digest
# of the body (`body_sha256`) still identifies the judged body.
MAX_RECORDED_BODY_BYTES = 16 * 1024

# The outcome says who refused: a policy, or the lack of a decision. Every other code stands for a bound of
# the scope or a malformed request, and has the outcome `blocked`.
OUTCOMES: Mapping[str, DecisionOutcome] = MappingProxyType(
    {
        "policy_denied": DecisionOutcome.POLICY_BLOCKED,
        "braked": DecisionOutcome.POLICY_BLOCKED,
        "policy_unavailable": DecisionOutcome.POLICY_UNAVAILABLE,
        "store_unavailable": DecisionOutcome.POLICY_UNAVAILABLE,
        "credential_unavailable": DecisionOutcome.POLICY_UNAVAILABLE,
        "overloaded": DecisionOutcome.POLICY_UNAVAILABLE,
        "draining": DecisionOutcome.POLICY_UNAVAILABLE,
    }
)


# The endings that say that the backend acted, whether or not it achieved anything.
_HAPPENED = frozenset({"answered", "succeeded", "failed", "executed"})


def source_of(*kinds: PrincipalKind) -> DecisionSource:
    """The authority that decided, by the kinds of the principals that took part."""
    people = kinds.count("human")
    if not people:
        return DecisionSource.SYSTEM
    return DecisionSource.HUMAN if people == len(kinds) else DecisionSource.HYBRID


def outcome_of(refusal: Refusal) -> DecisionOutcome:
    return OUTCOMES.get(refusal.code, DecisionOutcome.BLOCKED)


def gate_entry(
    command: Issue | Admit | Refuse | PassUnlisted | CountReplays | Revoke,
    event: Event,
    refusal: Refusal | None,
    claims: Claims,
    revision: str | None,
    now: int,
    *,
    gatekept: str = "scoped_execution",
    line: RequestLine | None = None,
    scope: Scope | None = None,
    **details: Any,
) -> Entry:
    """The entry of a gate record. The inputs hold the request, the details hold the findings. `line` is set
    if no route lists the request. `scope` is the one that an admission consumes."""
    asked = command.principal
    inputs: dict[str, Any] = {"policy_id": gatekept, "principal": asked.id}
    if asked.groups:
        inputs["principal_groups"] = list(asked.groups)
    if line is not None:
        inputs |= {"method": line.method, "path": line.path}
    if claims.target_agents:
        inputs["target_agents"] = list(claims.target_agents)
    if claims.opaque:
        inputs["body_bytes"] = claims.body_bytes
    elif claims.body_bytes > MAX_RECORDED_BODY_BYTES:
        inputs["parameters_left_out"] = {"body_bytes": claims.body_bytes}
    elif claims.parameters:
        inputs["parameters"] = claims.parameters
    if isinstance(command, Admit) and command.body_sha256:
        inputs["body_sha256"] = command.body_sha256
    if isinstance(command, Admit | Refuse | CountReplays) and command.route is not None:
        details["route"] = command.route
    if revision is not None:
        details["policy_revision"] = revision
    # A replay lets nothing through, and nothing refused it.
    outcome = DecisionOutcome.NONE if event == "replayed" else DecisionOutcome.SELECTED
    if refusal is not None:
        outcome = outcome_of(refusal)
        details.update(refusal.members)
        details["message"] = refusal.message
    details.setdefault("rules", [])
    tenant = command.scope.tenant_id if isinstance(command, Issue) else command.tenant_id
    return Entry(
        event=event,
        origin=command.origin,
        scope_id=claims.scope_id,
        incident_id=claims.incident_id,
        action=claims.action,
        principal=asked,
        of_execution=event == "admitted",
        issuer=None if scope is None else scope.issuer,
        record=Record(
            decision_id=command.decision_id,
            decision_type=DecisionType.POLICY,
            decision_outcome=outcome,
            decision_source=source_of(asked.kind)
            if scope is None
            else source_of(asked.kind, scope.issuer_kind),
            decision_inputs=inputs,
            decision_reason=None if refusal is None else refusal.code,
            tenant_id=tenant,
            request_id=command.request_id or None,
            decided_at=now,
            details=details,
        ),
    )


def ended_entry(
    command: Settle | Report | Lapse | Reconcile,
    event: Event,
    execution: Execution,
    scope: Scope | None,
    *,
    cost_reported: bool,
    overrun: bool,
    now: int,
) -> Entry:
    """The entry that ends an admission by settlement, report, time limit or reconciliation. An operator asks
    for a reconciliation; the other endings are those of what the execution's principal asked for."""
    asked = execution.asked_by
    inputs: dict[str, Any] = {"policy_id": "scoped_execution"}
    details: dict[str, Any] = {
        "admission_id": execution.decision_id,
        "outcome": execution.status,
        "attempt_number": execution.attempt_number,
        "hold_usd": to_dollars(execution.hold),
        "cost_usd": None if execution.cost is None else to_dollars(execution.cost),
        "cost_reported": cost_reported,
        "cost_overrun": overrun,
        "http_status": execution.http_status,
        "cause": execution.cause,
    }
    if execution.route is not None:
        details["route"] = execution.route
    kinds = [execution.principal_kind]
    if isinstance(command, Reconcile):
        asked = command.principal
        kinds.append(asked.kind)
        inputs["principal"] = command.principal.id
        details["reconciled_because"] = command.reason
        details["reconciled_by_request"] = command.request_id
        if command.reconciled_by is not None:
            details["reconciled_by"] = command.reconciled_by
    elif isinstance(command, Report):
        details["reported_by_request"] = command.request_id
        if command.detail is not None:
            details["reported_detail"] = command.detail
    if scope is not None:
        kinds.append(scope.issuer_kind)
    happened = execution.status in _HAPPENED
    return Entry(
        event=event,
        origin=command.origin,
        scope_id=execution.scope_id,
        incident_id=execution.incident_id,
        action=execution.action,
        admission_id=execution.decision_id,
        principal=asked,
        of_execution=True,
        issuer=None if scope is None else scope.issuer,
        record=Record(
            decision_id=command.decision_id,
            decision_type=DecisionType.RECOVERY,
            decision_source=source_of(*kinds),
            decision_outcome=DecisionOutcome.SELECTED if happened else DecisionOutcome.NONE,
            decision_inputs=inputs,
            decision_reason=None if happened else execution.status,
            tenant_id=execution.tenant_id,
            request_id=execution.request_id or None,
            decided_at=now,
            details=details,
        ),
    )


def switched_entry(command: Turn, *, was_on: bool, now: int) -> Entry:
    """The entry of a switch command, recorded even if the switch had that position already."""
    return _act(command, "switched", command.switch, now, {"on": command.on, "was_on": was_on})


def freeze_entry(
    command: SetFreeze | LiftFreeze, event: Literal["frozen", "unfrozen"], freeze: Freeze, now: int
) -> Entry:
    """The entry of a freeze that was set or lifted: what it matches, why, and until when."""
    details = {
        "freeze_id": freeze.freeze_id,
        "reason": command.reason,
        "match": written(freeze.match),
        "except": written(freeze.excepted),
        "ends_at": None if freeze.ends_at is None else iso_time(freeze.ends_at),
    }
    return _act(command, event, "freeze", now, details, tenant_id=freeze.tenant_id)


def clock_accepted_entry(command: AcceptClock, now: int) -> Entry:
    """The entry of a wall clock that an operator accepted, with its distance from the sidecar's time."""
    details = {"time_before": iso_time(command.before), "step_seconds": (now - command.before) / SECOND}
    return _act(command, "clock_accepted", "clock", now, details)


def _act(
    command: Turn | SetFreeze | LiftFreeze | AcceptClock,
    event: Event,
    policy_id: str,
    now: int,
    details: dict[str, Any],
    *,
    tenant_id: str = DEFAULT_TENANT,
) -> Entry:
    """The entry of what an operator did to the gate itself, which no rule decides."""
    return Entry(
        event=event,
        origin=command.origin,
        principal=command.principal,
        record=Record(
            decision_id=command.decision_id,
            decision_source=source_of(command.principal.kind),
            decision_type=DecisionType.POLICY,
            decision_outcome=DecisionOutcome.SELECTED,
            decision_inputs={"policy_id": policy_id, "principal": command.principal.id},
            tenant_id=tenant_id,
            request_id=command.request_id,
            decided_at=now,
            details={**details, "rules": []},
        ),
    )
