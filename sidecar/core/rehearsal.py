"""Scoped pre-execution: a rehearsal of a recovery action on a sample, or without running it.

This module handles values only. The caller runs the action, measures its duration, and sets `duration_ms`,
which is 0 here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from decimal import Decimal
from enum import Enum
from hashlib import sha256
from math import isinf
from types import MappingProxyType
from typing import Any

from sidecar.core.facts import IDENTIFIER_RULE, is_identifier
from sidecar.core.money import MAX_MICROS, to_micros
from sidecar.core.policy import RiskClass
from sidecar.core.wording import visible_chars

MICROS_PER_CENT = 10_000
DEFAULT_TIMEOUT_MS = 30_000
MAX_TIMEOUT_MS = 24 * 3_600 * 1_000
MIN_FRACTION, MAX_FRACTION = 0.01, 1.0
# The number of samples that a simulated rehearsal assumes in total.
SIMULATED_SAMPLES = 100

# The estimated cost of one execution in cents, by the type of the action.
COST_CENTS: Mapping[str, int] = MappingProxyType(
    {"retry": 10, "fallback": 5, "circuit_break": 0, "scale": 100}
)
OTHER_COST_CENTS = 20

# The parameters that hold a budget. Units do not matter, because a budget is only scaled.
BUDGETS = ("budget", "budget_cents", "budget_usd", "max_cost_usd")


class ExecutionScope(str, Enum):
    """The type of a scoped execution. It says what the sample is taken from."""

    AGENT_SUBSET = "agent_subset"
    REQUEST_SAMPLE = "request_sample"
    BUDGET_FRACTION = "budget_fraction"
    DRY_RUN = "dry_run"


@dataclass(frozen=True, slots=True)
class RecoveryAction:
    """A recovery action to be tested in scoped execution. `name` is the action that a scope lists.

    Raises ValueError for an unknown risk class, an invalid timeout, or names that are not text.
    """

    id: str
    name: str
    risk_class: RiskClass
    action_type: str
    parameters: dict[str, Any] = field(default_factory=dict)
    target_agents: list[str] = field(default_factory=list)
    timeout_ms: int = DEFAULT_TIMEOUT_MS

    def __post_init__(self) -> None:
        for member in ("id", "name", "action_type"):
            if not isinstance(getattr(self, member), str):
                raise ValueError(f"{member} must be a string")
        object.__setattr__(self, "risk_class", RiskClass(self.risk_class))
        checked_timeout(self.timeout_ms)


@dataclass(frozen=True, slots=True)
class ScopedExecutionResult:
    """Result of a scoped execution test. `scope_coverage` is the tested part, from 0.0 to 1.0."""

    success: bool
    cost_delta_cents: int
    failure_count: int
    policy_violations: list[str]
    execution_hash: str
    duration_ms: int
    scope_coverage: float
    samples_tested: int
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The input of a rehearsal: `size` of `total` items. Both are None if the items cannot be counted."""

    parameters: dict[str, Any]
    size: int | None = None
    total: int | None = None


# Requests -----------------------------------------------------------------------------------------------


def checked_timeout(milliseconds: object) -> float:
    """The timeout, unchanged. Raises ValueError unless it is a number above 0 and at most one day."""
    if isinstance(milliseconds, bool) or not isinstance(milliseconds, int | float):
        raise ValueError("timeout_ms must be a number of milliseconds")
    if not 0 < milliseconds <= MAX_TIMEOUT_MS:
        raise ValueError(f"timeout_ms must be above 0 and at most {MAX_TIMEOUT_MS}")
    return milliseconds


def clamped(fraction: object) -> float:
    """The fraction, limited to 0.01 to 1.0.

    Raises ValueError for NaN and for a value that is not a number.
    """
    if isinstance(fraction, bool) or not isinstance(fraction, int | float) or fraction != fraction:
        raise ValueError("scope_fraction must be a number")
    return float(min(max(fraction, MIN_FRACTION), MAX_FRACTION))


def action_asked_for(
    action_id: str,
    action_name: str,
    action_type: str,
    risk_class: str,
    parameters: Mapping[str, Any] | None,
) -> RecoveryAction:
    """The action that plain values describe. Its target agents are taken from its parameters.

    Raises ValueError for an invalid member.
    """
    if parameters is not None and not isinstance(parameters, Mapping):
        raise ValueError("parameters must be a dict")
    own = dict(parameters or {})
    agents = own.get("target_agents")
    if agents is None:
        agents = []
    if not isinstance(agents, list) or not all(is_identifier(agent) for agent in agents):
        raise ValueError(f"parameters/target_agents must be a list of strings of {IDENTIFIER_RULE}")
    return RecoveryAction(
        id=action_id,
        name=action_name,
        risk_class=RiskClass(risk_class),
        action_type=action_type,
        parameters=own,
        target_agents=list(agents),
    )


# Without running anything -------------------------------------------------------------------------------


def without_running(action: RecoveryAction, scope: ExecutionScope, fraction: float) -> ScopedExecutionResult:
    """The result of a dry run or a simulation, neither of which runs the action."""
    return dry_run(action) if scope is ExecutionScope.DRY_RUN else simulated(action, scope, fraction)


def dry_run(action: RecoveryAction) -> ScopedExecutionResult:
    """The result of a dry run: whether the action is well formed, and its estimated cost."""
    violations = [problem for problem, is_so in _VIOLATIONS if is_so(action)]
    cents = estimated_cents(action)
    return ScopedExecutionResult(
        success=not violations,
        cost_delta_cents=cents,
        failure_count=len(violations),
        policy_violations=violations,
        execution_hash=execution_hash(
            {"action_id": action.id, "scope": ExecutionScope.DRY_RUN.value, "dry_run": True}
        ),
        duration_ms=0,
        scope_coverage=0.0,
        samples_tested=0,
        details={
            "mode": "dry_run",
            "estimated_cost_cents": cents,
            "risk_class": action.risk_class.value,
        },
    )


_VIOLATIONS: tuple[tuple[str, Callable[[RecoveryAction], bool]], ...] = (
    ("action_type is empty", lambda action: not visible_chars(action.action_type)),
    (
        "an action of high or critical risk must name its target agents",
        lambda action: action.risk_class >= RiskClass.HIGH and not action.target_agents,
    ),
)


def estimated_cents(action: RecoveryAction) -> int:
    return COST_CENTS.get(action.action_type, OTHER_COST_CENTS)


def simulated(action: RecoveryAction, scope: ExecutionScope, fraction: float) -> ScopedExecutionResult:
    """The result of a rehearsal of an action for which no callable is registered."""
    samples = max(1, round(SIMULATED_SAMPLES * fraction))
    return ScopedExecutionResult(
        success=True,
        cost_delta_cents=0,
        failure_count=0,
        policy_violations=[],
        execution_hash=_scoped_hash(action, scope, fraction),
        duration_ms=0,
        scope_coverage=fraction,
        samples_tested=samples,
        details=_scoped_details(scope, samples),
    )


# On a sample --------------------------------------------------------------------------------------------


def sample_of(action: RecoveryAction, scope: ExecutionScope, fraction: float) -> Sample:
    """The parameters of the action, reduced to the fraction. The action itself is not changed."""
    parameters = {**action.parameters, "scope_fraction": fraction}
    if scope is ExecutionScope.AGENT_SUBSET:
        return _cut(parameters, "target_agents", action.target_agents or parameters.get("target_agents"))
    if scope is ExecutionScope.REQUEST_SAMPLE:
        return _cut(parameters, "requests", parameters.get("requests"))
    for name in BUDGETS:
        budget = parameters.get(name)
        if isinstance(budget, int | float | Decimal) and not isinstance(budget, bool):
            parameters[name] = _part(budget, fraction)
    return Sample(parameters=parameters)


def _cut(parameters: dict[str, Any], name: str, whole: object) -> Sample:
    """The first items of a list, at least one. Without a list, the parameters stay as they are."""
    if not isinstance(whole, list) or not whole:
        return Sample(parameters=parameters)
    size = max(1, round(len(whole) * parameters["scope_fraction"]))
    return Sample(parameters={**parameters, name: whole[:size]}, size=size, total=len(whole))


def _part(budget: int | float | Decimal, fraction: float) -> float | Decimal:
    """A part of a budget, computed in decimal: a tenth of 0.7 is 0.07, not 0.06999999999999999.

    Raises ValueError if a finite budget would become infinite.
    """
    part = _decimal(budget) * _decimal(fraction)
    if isinstance(budget, Decimal):
        return part
    if part.is_finite() and isinf(float(part)):
        raise ValueError("a budget is too large")
    return float(part)


def observed(
    action: RecoveryAction, scope: ExecutionScope, fraction: float, sample: Sample, returned: object
) -> ScopedExecutionResult:
    """The result that a callable returned for its sample. A member that cannot be read is a violation."""
    told: Mapping[str, Any] = returned if isinstance(returned, Mapping) else {}
    found: dict[str, Any] = {}
    violations: list[str] = []
    for name, read in _TOLD.items():
        value = told.get(name)
        try:
            found[name] = None if value is None else read(value)
        except ValueError:
            found[name] = None
            violations.append(f"{name} of what the action returned cannot be read")
    violations = [*(found["policy_violations"] or ()), *violations]
    failures: int = found["failure_count"] or 0
    samples: int = found["samples_tested"] if found["samples_tested"] is not None else sample.size or 1
    details = _scoped_details(scope, samples)
    # The result keeps the members that were read, even if the returned value is not JSON.
    with suppress(TypeError, ValueError, RecursionError):
        details["result"] = json.loads(json.dumps(returned, allow_nan=False))
    return ScopedExecutionResult(
        success=not failures and not violations,
        cost_delta_cents=found["cost_usd"] or 0,
        failure_count=failures,
        policy_violations=violations,
        execution_hash=_scoped_hash(action, scope, fraction),
        duration_ms=0,
        scope_coverage=fraction if sample.size is None or not sample.total else sample.size / sample.total,
        samples_tested=samples,
        details=details,
    )


def failed(problem: str) -> ScopedExecutionResult:
    """The result of a rehearsal that failed internally."""
    return ScopedExecutionResult(
        success=False,
        cost_delta_cents=0,
        failure_count=1,
        policy_violations=[problem],
        execution_hash=execution_hash({"error": problem}),
        duration_ms=0,
        scope_coverage=0.0,
        samples_tested=0,
        details={"error": problem},
    )


def _scoped_hash(action: RecoveryAction, scope: ExecutionScope, fraction: float) -> str:
    return execution_hash({"action_id": action.id, "scope": scope.value, "fraction": fraction})


def _scoped_details(scope: ExecutionScope, samples: int) -> dict[str, Any]:
    return {"mode": "scoped", "scope_type": scope.value, "samples_tested": samples}


def execution_hash(of: Mapping[str, Any]) -> str:
    """The first 16 hex digits of the SHA-256 of key-sorted JSON, with the spacing of `json.dumps`."""
    return sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:16]


def shown(result: ScopedExecutionResult, action: RecoveryAction, scope: ExecutionScope) -> dict[str, Any]:
    """The fields of the result, with the risk class and the type of the scope as strings."""
    return {**asdict(result), "risk_class": action.risk_class.value, "scope_type": scope.value}


# Returned values ----------------------------------------------------------------------------------------


def reported_cost(returned: object) -> int | None:
    """The `cost_usd` in a callable's returned value, in micro-dollars, or None if absent or unreadable."""
    try:
        amount = _dollars(returned.get("cost_usd") if isinstance(returned, Mapping) else None)
    except ValueError:
        return None
    # An amount above the limit certainly exceeds the hold, so it becomes the limit.
    return MAX_MICROS if amount.adjusted() > 8 else to_micros(amount)


def _dollars(value: object) -> Decimal:
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        raise ValueError("an amount of dollars is a number")
    amount = _decimal(value)
    if not amount.is_finite() or amount < 0:
        raise ValueError("an amount of dollars is finite and not below 0")
    return amount or Decimal(0)  # normalizes a zero that has an exponent


def _decimal(number: int | float | Decimal) -> Decimal:
    """A float counts as the decimal that Python prints for it."""
    return Decimal(float.__repr__(number)) if isinstance(number, float) else Decimal(number)


def _cents(value: object) -> int:
    return -(-to_micros(_dollars(value)) // MICROS_PER_CENT)


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError("a count is a whole number")
    return value


def _texts(value: object) -> Sequence[str]:
    if not isinstance(value, list | tuple) or not all(isinstance(text, str) for text in value):
        raise ValueError("violations are a list of strings")
    return value


# The members of a callable's returned value that a rehearsal reads.
_TOLD: Mapping[str, Callable[[object], Any]] = MappingProxyType(
    {
        "cost_usd": _cents,
        "failure_count": _count,
        "policy_violations": _texts,
        "samples_tested": _count,
    }
)
