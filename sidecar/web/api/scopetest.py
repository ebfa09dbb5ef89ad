"""`POST /api/v1/recovery/candidates/{id}/scope-test`: describes what a recovery action would do.

A sidecar has no callables to try out, so the test is a dry run or a simulation. It executes, consumes and
records nothing, and does not use the store.
"""

from __future__ import annotations

from dataclasses import replace
from time import perf_counter
from typing import Annotated, Any, cast
from urllib.parse import unquote_to_bytes

from sidecar.core.facts import IDENTIFIER_RULE, is_identifier
from sidecar.core.policy import RiskClass
from sidecar.core.rehearsal import (
    ExecutionScope,
    RecoveryAction,
    action_asked_for,
    clamped,
    shown,
    without_running,
)
from sidecar.errors import Refusal
from sidecar.web.wire.forms import Count, Keywords, TypedDict
from sidecar.web.wire.models import ScopeTestRequest, validated, wrong

PREFIX = "/api/v1/recovery/candidates/"
SUFFIX = "/scope-test"


class Rehearsal(TypedDict):
    """What a recovery action would do."""

    success: bool
    cost_delta_cents: Count
    failure_count: Count
    policy_violations: list[str]
    execution_hash: Annotated[str, Keywords(pattern="^[0-9a-f]{16}$")]
    duration_ms: Count
    scope_coverage: Annotated[float, Keywords(minimum=0, maximum=1)]
    samples_tested: Count
    details: dict[str, Any]
    risk_class: RiskClass
    scope_type: ExecutionScope


def candidate_of(path: str) -> str | None:
    """The undecoded id in a raw path of the scope test; None for any other path."""
    segment = path.removeprefix(PREFIX).removesuffix(SUFFIX)
    return segment if segment and "/" not in segment and path == f"{PREFIX}{segment}{SUFFIX}" else None


def named(segment: str) -> str | None:
    """The decoded name in a raw path segment; None if it is not 1 to 256 printable characters."""
    try:
        name = unquote_to_bytes(segment).decode("utf-8")
    except UnicodeDecodeError:
        return None
    return name if is_identifier(name) else None


def tested(segment: str, body: dict[str, Any] | Refusal) -> Rehearsal | Refusal:
    """The answer to a scope test: the members of the library's `test_recovery_scope`, or a refusal."""
    begun = perf_counter()
    wanted = body if isinstance(body, Refusal) else validated(ScopeTestRequest, body, "invalid_request")
    if isinstance(wanted, Refusal):
        return wanted
    action = _action(segment, wanted)
    if isinstance(action, Refusal):
        return action
    scope = ExecutionScope(wanted.scope_type)
    result = without_running(action, scope, clamped(wanted.scope_fraction))
    took = round((perf_counter() - begun) * 1_000)
    return cast("Rehearsal", shown(replace(result, duration_ms=took), action, scope))


def _action(segment: str, wanted: ScopeTestRequest) -> RecoveryAction | Refusal:
    action_id = named(segment)
    if action_id is None:
        return wrong("invalid_request", "id", f"must be {IDENTIFIER_RULE}")
    try:
        return action_asked_for(
            action_id,
            wanted.action_name or action_id,
            wanted.action_type,
            wanted.risk_class,
            wanted.parameters,
        )
    except ValueError as exc:
        # The model has checked everything else, so the core can only object to the target agents.
        member = "parameters/target_agents"
        return wrong("invalid_request", member, str(exc).removeprefix(f"{member} "))
