"""Decision records for decisions made outside the gate: one table with one row per emitter.

A row says what its record holds, and when no record is emitted. The library and the admin interface both use
this table. The emission rules are frozen. No clock, no I/O.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from types import MappingProxyType
from typing import Any, Literal

from sidecar.core.command import Switch
from sidecar.core.record import CausalRole, DecisionOutcome, DecisionTrigger, DecisionType, Record
from sidecar.errors import ScopegateError

Kind = Literal[
    "routing",
    "recovery",
    "memory",
    "policy",
    "budget",
    "budget_enforcement",
    "policy_precheck",
    "recovery_evaluation",
    "care_optimization",
]
Arguments = Mapping[str, Any]

MIN_CONFIDENCE = 0.50


@dataclass(frozen=True, slots=True, kw_only=True)
class Emission:
    """A record to append.

    `once` is a key under which the record is kept only once. While the switch `unless_switched` is on, the
    record is not appended.
    """

    record: Record
    once: bytes | None
    unless_switched: Switch | None


# Signals -------------------------------------------------------------------------------------------

ALLOWED_SIGNALS = frozenset(
    {
        "latency_p50",
        "latency_p95",
        "cost_per_run",
        "success_rate",
        "recovery_occurred",
        "agent_availability",
        "context_size_bucket",
    }
)
FORBIDDEN_SIGNALS = frozenset(
    {
        "policy_outcome",
        "budget_halt_reason",
        "recovery_class",
        "customer_content",
        "safety_events",
        "founder_overrides",
        "failure_details",
        "user_feedback",
    }
)


class CARESignalAccessError(ScopegateError):
    """Routing optimization may not read this signal, because the signal is forbidden or unknown."""

    def __init__(self, message: str, signal: object = None) -> None:
        super().__init__(message)
        self.signal = signal


def check_signal(name: object) -> None:
    """Raises CARESignalAccessError unless routing optimization may read this signal."""
    if isinstance(name, str) and name in ALLOWED_SIGNALS:
        return
    known = isinstance(name, str) and name in FORBIDDEN_SIGNALS
    raise CARESignalAccessError(f"the signal {name!r} is {'forbidden' if known else 'unknown'}", name)


# Outcomes, rules and details that need more than one expression --------------------------------------


def _routing_outcome(given: Arguments) -> DecisionOutcome:
    if given["routed"]:
        return DecisionOutcome.SELECTED if given["selected_agent"] else DecisionOutcome.NONE
    return DecisionOutcome.REJECTED if given["rejection_reason"] else DecisionOutcome.NONE


def _routing_reason(given: Arguments) -> str | None:
    """The reason names the selected agent, because the details belong to the caller."""
    if _routing_outcome(given) is DecisionOutcome.SELECTED:
        return f"selected agent {given['selected_agent']}"
    reason: str | None = given["rejection_reason"]
    return reason


def _recovery_outcome(given: Arguments) -> DecisionOutcome:
    if not given["evaluated"]:
        return DecisionOutcome.SKIPPED
    return DecisionOutcome.SELECTED if given["triggered"] else DecisionOutcome.NONE


def _memory_outcome(given: Arguments) -> DecisionOutcome:
    if not given["queried"]:
        return DecisionOutcome.SKIPPED
    if not given["matched"]:
        return DecisionOutcome.NONE
    return DecisionOutcome.SELECTED if given["injected"] else DecisionOutcome.BLOCKED


def _policy_outcome(given: Arguments) -> DecisionOutcome:
    if not given["evaluated"]:
        return DecisionOutcome.SKIPPED
    if not given["violated"]:
        return DecisionOutcome.SELECTED
    return DecisionOutcome.BLOCKED if given["severity"] == "error" else DecisionOutcome.REJECTED


def _is_exceeded(given: Arguments) -> bool:
    return bool(given["budget_requested"] > given["budget_available"])


def _budget_outcome(given: Arguments) -> DecisionOutcome:
    if not _is_exceeded(given):
        return DecisionOutcome.SELECTED
    if given["enforcement"] == "hard":
        return DecisionOutcome.BLOCKED
    return DecisionOutcome.SELECTED if given["proceeded"] else DecisionOutcome.REJECTED


def _policy_precheck_outcome(given: Arguments) -> DecisionOutcome:
    if not given["service_available"]:
        return DecisionOutcome.POLICY_UNAVAILABLE
    return DecisionOutcome.POLICY_BLOCKED


def _policy_precheck_emits(given: Arguments, min_confidence: float) -> bool:
    del min_confidence
    return given["posture"] == "strict" and not (given["passed"] and given["service_available"])


def _recovery_evaluation_outcome(given: Arguments) -> DecisionOutcome:
    if given["recovery_action"] and given["recovery_class"] == "R1":
        return DecisionOutcome.RECOVERY_APPLIED
    if given["recovery_action"] and given["recovery_class"] == "R2":
        return DecisionOutcome.RECOVERY_SUGGESTED
    return DecisionOutcome.RECOVERY_SKIPPED


def _care_optimization_emits(given: Arguments, min_confidence: float) -> bool:
    """Signals are checked first: a forbidden signal raises an error even if nothing would be recorded."""
    for signal in _listed(given["signals_used"]):
        check_signal(signal)
    return bool(
        given["optimization_enabled"]
        and not given["shadow_mode"]
        and given["optimized_agent"] != given["baseline_agent"]
        and given["confidence_score"] >= min_confidence  # false for NaN
    )


def _care_optimization(given: Arguments) -> dict[str, Any]:
    return {
        "baseline": given["baseline_agent"],
        "optimized": given["optimized_agent"],
        "confidence": given["confidence_score"],
        "signals": _listed(given["signals_used"]),
    }


def _listed(value: object) -> list[Any]:
    """The value as a list. None becomes an empty list, a single value becomes a list of one."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple | set | frozenset) else [value]


def _given(given: Arguments, name: str) -> dict[str, Any]:
    """A mapping from the argument's name to its value, empty if the argument was not given."""
    return {} if given[name] is None else {name: given[name]}


# The table -----------------------------------------------------------------------------------------


def _always(given: Arguments, min_confidence: float) -> bool:
    del given, min_confidence
    return True


def _reason(given: Arguments) -> str | None:
    reason: str | None = given.get("reason")
    return reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Emitter:
    """One kind of decision: the content of its record, when it is emitted, and its deduplication key.

    `causal_role` is the default. With `role_is_fixed`, no caller can change it. `emits` takes the arguments
    and the minimum confidence. `key` returns the parts of the key under which a record is kept only once. If
    `key` is None, every record is kept.
    """

    decision_type: DecisionType
    trigger: DecisionTrigger
    causal_role: CausalRole
    role_is_fixed: bool = False
    outcome: Callable[[Arguments], DecisionOutcome]
    inputs: Callable[[Arguments], dict[str, Any]]
    details: Callable[[Arguments], dict[str, Any]]
    reason: Callable[[Arguments], str | None] = _reason
    emits: Callable[[Arguments, float], bool] = _always
    key: Callable[[Arguments, DecisionOutcome], tuple[str, ...]] | None = None
    unless_switched: Switch | None = None


EMITTERS: Mapping[Kind, Emitter] = MappingProxyType(
    {
        "routing": Emitter(
            decision_type=DecisionType.ROUTING,
            trigger=DecisionTrigger.EXPLICIT,
            causal_role=CausalRole.PRE_RUN,
            outcome=_routing_outcome,
            inputs=lambda given: {
                "eligible_agents": _listed(given["eligible_agents"]),
                "agents_count": len(_listed(given["eligible_agents"])),
            },
            details=lambda given: given["details"] or {},
            reason=_routing_reason,
        ),
        "recovery": Emitter(
            decision_type=DecisionType.RECOVERY,
            trigger=DecisionTrigger.REACTIVE,
            causal_role=CausalRole.IN_RUN,
            outcome=_recovery_outcome,
            inputs=lambda given: {
                "evaluated": given["evaluated"],
                "candidates_count": given["candidates_count"],
            },
            details=lambda given: _given(given, "action"),
        ),
        "memory": Emitter(
            decision_type=DecisionType.MEMORY,
            trigger=DecisionTrigger.EXPLICIT,
            causal_role=CausalRole.IN_RUN,
            outcome=_memory_outcome,
            inputs=lambda given: {
                "queried": given["queried"],
                "matched": given["matched"],
                "injected": given["injected"],
            },
            details=lambda given: _given(given, "sources"),
        ),
        "policy": Emitter(
            decision_type=DecisionType.POLICY,
            trigger=DecisionTrigger.EXPLICIT,
            causal_role=CausalRole.IN_RUN,
            outcome=_policy_outcome,
            inputs=lambda given: {"policy_id": given["policy_id"], "severity": given["severity"]},
            details=lambda given: {"violated": given["violated"], "severity": given["severity"]},
        ),
        "budget": Emitter(
            decision_type=DecisionType.BUDGET,
            trigger=DecisionTrigger.EXPLICIT,
            causal_role=CausalRole.PRE_RUN,
            outcome=_budget_outcome,
            inputs=lambda given: {
                "requested": given["budget_requested"],
                "available": given["budget_available"],
                "enforcement": given["enforcement"],
            },
            details=lambda given: {
                "exceeded": _is_exceeded(given),
                "simulation_feasible": given["simulation_feasible"],
                "proceeded": given["proceeded"],
            },
        ),
        "budget_enforcement": Emitter(
            decision_type=DecisionType.BUDGET_ENFORCEMENT,
            trigger=DecisionTrigger.REACTIVE,
            causal_role=CausalRole.IN_RUN,
            role_is_fixed=True,
            outcome=lambda _: DecisionOutcome.EXECUTION_HALTED,
            inputs=lambda given: {
                "budget_limit_cents": given["budget_limit_cents"],
                "budget_consumed_cents": given["budget_consumed_cents"],
                "step_cost_cents": given["step_cost_cents"],
                "completed_steps": given["completed_steps"],
                "total_steps": given["total_steps"],
            },
            details=lambda given: {
                "enforcement_mode": "hard",
                "halt_point": f"after_step_{given['completed_steps']}",
                "remaining_steps": given["total_steps"] - given["completed_steps"],
            },
            key=lambda given, _: (given["run_id"],),
        ),
        "policy_precheck": Emitter(
            decision_type=DecisionType.POLICY_PRE_CHECK,
            trigger=DecisionTrigger.EXPLICIT,
            causal_role=CausalRole.PRE_RUN,
            role_is_fixed=True,
            outcome=_policy_precheck_outcome,
            inputs=lambda given: {
                "posture": given["posture"],
                "violations": _listed(given["violations"]),
                "service_available": given["service_available"],
            },
            details=lambda given: {
                "posture": given["posture"],
                "blocked": True,
                "passed": given["passed"],
                "service_available": given["service_available"],
            },
            emits=_policy_precheck_emits,
            key=lambda given, outcome: (given["request_id"], outcome.value),
        ),
        "recovery_evaluation": Emitter(
            decision_type=DecisionType.RECOVERY_EVALUATION,
            trigger=DecisionTrigger.REACTIVE,
            causal_role=CausalRole.POST_RUN,
            role_is_fixed=True,
            outcome=_recovery_evaluation_outcome,
            inputs=lambda given: {
                "recovery_class": given["recovery_class"],
                "recovery_action": given["recovery_action"],
                "failure_type": given["failure_type"],
            },
            details=lambda given: {
                "failure_context": given["failure_context"] or {},
                "recovery_bounded": given["recovery_class"] == "R1",
                "requires_approval": given["recovery_class"] == "R2",
            },
            key=lambda given, _: (given["run_id"], given["failure_type"]),
        ),
        "care_optimization": Emitter(
            decision_type=DecisionType.CARE_ROUTING_OPTIMIZED,
            trigger=DecisionTrigger.AUTONOMOUS,
            causal_role=CausalRole.PRE_RUN,
            role_is_fixed=True,
            outcome=lambda _: DecisionOutcome.OPTIMIZED_SELECTED,
            inputs=_care_optimization,
            details=_care_optimization,
            emits=_care_optimization_emits,
            key=lambda given, _: (given["request_id"],),
            unless_switched="care_kill_switch",
        ),
    }
)


def once_key(decision_type: DecisionType, *parts: str | None) -> bytes:
    """The key under which a record is kept once.

    The key is a digest, so it has a fixed length and reveals nothing. The digested text is a JSON list,
    because two different lists of parts never have the same JSON.
    """
    # Parts are compared as text, as the record shows them: run 7 and run "7" are the same run.
    texts = (part if part is None else str(part) for part in parts)
    return sha256(json.dumps([decision_type.value, *texts]).encode("ascii")).digest()


def emission(
    kind: Kind,
    arguments: Arguments,
    *,
    decision_id: str,
    now: int,
    min_confidence: float = MIN_CONFIDENCE,
) -> Emission | None:
    """The record that an emitter appends for its arguments, or None if its rule emits no record.

    `arguments` holds every argument of the emitter by name. `now` is in microseconds since 1970 (UTC).
    Raises CARESignalAccessError for a signal that is not allowed, ValueError for an unknown causal role, and
    TypeError for values that cannot be compared.
    """
    row = EMITTERS[kind]
    if not row.emits(arguments, min_confidence):
        return None
    outcome = row.outcome(arguments)
    record = Record(
        decision_id=decision_id,
        decision_type=row.decision_type,
        decision_trigger=row.trigger,
        decision_inputs=row.inputs(arguments),
        decision_outcome=outcome,
        decision_reason=row.reason(arguments),
        run_id=arguments.get("run_id"),
        tenant_id=arguments["tenant_id"],
        request_id=arguments.get("request_id"),
        causal_role=row.causal_role if row.role_is_fixed else CausalRole(arguments["causal_role"]),
        decided_at=now,
        details=row.details(arguments),
    )
    once = None if row.key is None else once_key(row.decision_type, *row.key(arguments, outcome))
    return Emission(record=record, once=once, unless_switched=row.unless_switched)
