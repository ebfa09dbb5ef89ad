"""Decision records and their envelopes: who decided what, when and why. Values only.

A caller may supply the fields of a record. The envelope around the record holds fields that no caller can
set.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from enum import Enum
from typing import Any, Literal

from sidecar.core.instant import iso_time
from sidecar.core.principal import ANONYMOUS, Principal
from sidecar.core.valueclass import valueclass

Origin = Literal["gate", "library", "api"]
Event = Literal[
    "issued",
    "admitted",
    "refused",
    "replayed",
    "settled",
    "revoked",
    "reconciled",
    "emitted",
    "switched",
    "frozen",
    "unfrozen",
    "clock_accepted",
    "unlisted",
]


class DecisionType(str, Enum):
    """Types of decisions that must be recorded."""

    ROUTING = "routing"
    RECOVERY = "recovery"
    MEMORY = "memory"
    POLICY = "policy"
    BUDGET = "budget"
    BUDGET_ENFORCEMENT = "budget_enforcement"
    POLICY_PRE_CHECK = "policy_pre_check"
    RECOVERY_EVALUATION = "recovery_evaluation"
    CARE_ROUTING_OPTIMIZED = "care_routing_optimized"


class DecisionSource(str, Enum):
    """The authority that made the decision."""

    HUMAN = "human"
    SYSTEM = "system"
    HYBRID = "hybrid"


class DecisionTrigger(str, Enum):
    """The reason why the decision was made."""

    EXPLICIT = "explicit"
    AUTONOMOUS = "autonomous"
    REACTIVE = "reactive"


class DecisionOutcome(str, Enum):
    """The result of the decision."""

    SELECTED = "selected"
    REJECTED = "rejected"
    SKIPPED = "skipped"
    BLOCKED = "blocked"
    NONE = "none"
    EXECUTION_HALTED = "execution_halted"
    POLICY_BLOCKED = "policy_blocked"
    POLICY_UNAVAILABLE = "policy_unavailable"
    RECOVERY_APPLIED = "recovery_applied"
    RECOVERY_SUGGESTED = "recovery_suggested"
    RECOVERY_SKIPPED = "recovery_skipped"
    BASELINE_SELECTED = "baseline_selected"
    OPTIMIZED_SELECTED = "optimized_selected"


class CausalRole(str, Enum):
    """The phase of a run in which the decision was made."""

    PRE_RUN = "pre_run"
    IN_RUN = "in_run"
    POST_RUN = "post_run"


@valueclass
class Record:
    """The 14 fields of a decision record. `decided_at` is in microseconds since 1970 (UTC)."""

    decision_id: str
    decision_type: DecisionType
    decision_outcome: DecisionOutcome
    decided_at: int
    decision_source: DecisionSource = DecisionSource.SYSTEM
    decision_trigger: DecisionTrigger = DecisionTrigger.EXPLICIT
    decision_inputs: Mapping[str, Any] = field(default_factory=dict)
    decision_reason: str | None = None
    run_id: str | None = None
    workflow_id: str | None = None
    tenant_id: str = "default"
    request_id: str | None = None
    causal_role: CausalRole = CausalRole.IN_RUN
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The 14 fields in the order of the wire, enums as values, the time as ISO 8601."""
        # `_value_` is what `value` returns, without a call: Python 3.11 looks `value` up in Python code.
        return {
            "decision_id": self.decision_id,
            "decision_type": self.decision_type._value_,
            "decision_source": self.decision_source._value_,
            "decision_trigger": self.decision_trigger._value_,
            "decision_inputs": self.decision_inputs,
            "decision_outcome": self.decision_outcome._value_,
            "decision_reason": self.decision_reason,
            "run_id": self.run_id,
            "workflow_id": self.workflow_id,
            "tenant_id": self.tenant_id,
            "request_id": self.request_id,
            "causal_role": self.causal_role._value_,
            "decided_at": iso_time(self.decided_at),
            "details": self.details,
        }


@valueclass
class Entry:
    """A record before it is appended to the log: the whole envelope except its place in the chain.

    `scope_id`, `incident_id` and `action` identify the subject. `admission_id` identifies the admission that
    a settlement or reconciliation ends. The envelope holds these fields so that a caller's inputs cannot
    forge them. `principal` is the caller that asked. A record `of_execution` is about an admitted execution,
    and says who issued its scope (None: it needed none). `recorded_at` is set if the caller supplied the time
    of the decision, because that time may differ from the time of the append.
    """

    event: Event
    record: Record
    origin: Origin = "gate"
    scope_id: str | None = None
    incident_id: str | None = None
    action: str | None = None
    admission_id: str | None = None
    principal: Principal = ANONYMOUS
    of_execution: bool = False
    issuer: Mapping[str, Any] | None = None
    recorded_at: int | None = None

    def envelope(self, writer: str, seq: int) -> dict[str, Any]:
        """The whole envelope, ready for serialization into canonical bytes."""
        envelope: dict[str, Any] = {
            "writer": writer,
            "seq": seq,
            "origin": self.origin,
            "event": self.event,
            "scope_id": self.scope_id,
            "incident_id": self.incident_id,
            "action": self.action,
            "admission_id": self.admission_id,
            "principal": self.principal.to_dict(),
            "record": self.record.to_dict(),
        }
        if self.of_execution:
            envelope["issuer"] = self.issuer
            envelope["approvers"] = []  # no scope needs approvals
        if self.recorded_at is not None:
            envelope["recorded_at"] = iso_time(self.recorded_at)
        return envelope
