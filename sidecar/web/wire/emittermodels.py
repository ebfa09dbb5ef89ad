"""The arguments of the emitters, as the bodies of `POST /api/v1/decisions/{kind}`; one model a kind.

Names, order and defaults are those of the emitter functions in `sidecar.decisions`.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from sidecar.core.emission import ALLOWED_SIGNALS, Kind
from sidecar.core.facts import MAX_ID_CHARS, is_identifier
from sidecar.core.scope import MAX_INTENT_CHARS
from sidecar.web.wire.models import PRINTABLE, Identifier, WireModel


def _fraction(value: object) -> object:
    """Convert a number to float, because the strict JSON parser returns int or Decimal."""
    if isinstance(value, int | Decimal) and not isinstance(value, bool):
        return float(value)
    return value


def _identifier_or_empty(value: object) -> object:
    if value == "" or is_identifier(value):
        return value
    raise ValueError("must be a string of at most 256 printable characters")


Reason = Annotated[str, Field(max_length=MAX_INTENT_CHARS)]
Number = Annotated[float, BeforeValidator(_fraction), WithJsonSchema({"type": "number"})]
# Cents, steps and counts, within the range of a signed 64-bit integer.
Whole = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Role = Literal["pre_run", "in_run", "post_run"]
# The core decides which signals are allowed, and names a forbidden one in its refusal.
Signal = Annotated[Identifier, WithJsonSchema({"type": "string", "enum": sorted(ALLOWED_SIGNALS)})]


class Routing(WireModel):
    """A routing decision: which agent gets a request, or why none."""

    run_id: Identifier | None = None
    routed: bool
    selected_agent: Identifier | None = None
    eligible_agents: list[Any] | None = None
    rejection_reason: Reason | None = None
    tenant_id: Identifier = "default"
    details: dict[str, Any] | None = None
    request_id: Identifier | None = None
    causal_role: Role = "pre_run"


class Recovery(WireModel):
    """What the recovery engine made of a failure."""

    run_id: Identifier | None = None
    evaluated: bool
    triggered: bool = False
    action: Identifier | None = None
    candidates_count: Whole = 0
    reason: Reason | None = None
    tenant_id: Identifier = "default"
    request_id: Identifier | None = None
    causal_role: Role = "in_run"


class Memory(WireModel):
    """Whether memory was queried, found something, and gave it to the run."""

    run_id: Identifier | None = None
    queried: bool
    matched: bool = False
    injected: bool = False
    sources: list[Any] | None = None
    reason: Reason | None = None
    tenant_id: Identifier = "default"
    request_id: Identifier | None = None
    causal_role: Role = "in_run"


class Policy(WireModel):
    """A policy check and what it found."""

    run_id: Identifier | None = None
    policy_id: Identifier
    evaluated: bool
    violated: bool = False
    severity: Identifier = "warning"
    reason: Reason | None = None
    tenant_id: Identifier = "default"
    request_id: Identifier | None = None
    causal_role: Role = "in_run"


class Budget(WireModel):
    """A budget check: requested against available."""

    run_id: Identifier | None = None
    budget_requested: Whole
    budget_available: Whole
    enforcement: Identifier = "soft"
    simulation_feasible: bool | None = None
    proceeded: bool = True
    reason: Reason | None = None
    tenant_id: Identifier = "default"
    request_id: Identifier | None = None
    causal_role: Role = "pre_run"


class BudgetEnforcement(WireModel):
    """A run halted by its hard budget. One record a run."""

    run_id: Identifier
    budget_limit_cents: Whole
    budget_consumed_cents: Whole
    step_cost_cents: Whole
    completed_steps: Whole
    total_steps: Whole
    tenant_id: Identifier = "default"


class PolicyPrecheck(WireModel):
    """A check before a run. Recorded only where the posture is strict and it failed or could not be made;
    one record a request and outcome."""

    request_id: Identifier
    posture: Identifier
    passed: bool
    service_available: bool = True
    violations: list[Any] | None = None
    tenant_id: Identifier = "default"


class RecoveryEvaluation(WireModel):
    """What recovery came to after a halt or a failure. One record a run and failure type."""

    run_id: Identifier
    request_id: Identifier
    recovery_class: Identifier
    recovery_action: Identifier | None = None
    failure_type: Identifier
    failure_context: dict[str, Any] | None = None
    tenant_id: Identifier = "default"


class CareOptimization(WireModel):
    """An optimized route instead of the baseline. Recorded only where the optimization is on, not in shadow,
    changes the agent, is confident enough, and the kill switch is off; one record a request."""

    request_id: Identifier
    baseline_agent: Identifier
    optimized_agent: Identifier
    confidence_score: Number
    signals_used: list[Signal]
    optimization_enabled: bool
    shadow_mode: bool
    tenant_id: Identifier = "default"


class BackfillRequest(WireModel):
    """The request whose pre-run records get the run; an empty one has none."""

    request_id: Annotated[
        str,
        BeforeValidator(_identifier_or_empty),
        WithJsonSchema({"type": "string", "maxLength": MAX_ID_CHARS, "pattern": PRINTABLE}),
    ]


EMITTER_MODELS: Mapping[Kind, type[WireModel]] = {
    "routing": Routing,
    "recovery": Recovery,
    "memory": Memory,
    "policy": Policy,
    "budget": Budget,
    "budget_enforcement": BudgetEnforcement,
    "policy_precheck": PolicyPrecheck,
    "recovery_evaluation": RecoveryEvaluation,
    "care_optimization": CareOptimization,
}
