"""`POST /api/v1/recovery/candidates/{id}/scope-test`: describes what a recovery action would do.

A sidecar has no callables to try out, so the test is a dry run or a simulation. It executes, consumes and
records nothing, and does not use the store.
"""

from __future__ import annotations

from dataclasses import replace
from time import perf_counter
from typing import Any
from urllib.parse import unquote_to_bytes

from aiohttp import web

from sidecar.core.facts import is_identifier
from sidecar.core.rehearsal import (
    ExecutionScope,
    RecoveryAction,
    action_asked_for,
    clamped,
    shown,
    without_running,
)
from sidecar.errors import Refusal
from sidecar.web.wire.models import ScopeTestRequest, validated, wrong
from sidecar.web.wire.problem import answer, problem

PREFIX = "/api/v1/recovery/candidates/"
SUFFIX = "/scope-test"


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


def tested(segment: str, body: dict[str, Any] | Refusal, request_id: str) -> web.Response:
    """The answer to a scope test: the members of the library's `test_recovery_scope`, or 400."""
    begun = perf_counter()
    asked = body if isinstance(body, Refusal) else validated(ScopeTestRequest, body, "invalid_request")
    if isinstance(asked, Refusal):
        return problem(asked, request_id=request_id)
    action = _action(segment, asked)
    if isinstance(action, Refusal):
        return problem(action, request_id=request_id)
    scope = ExecutionScope(asked.scope_type)
    result = without_running(action, scope, clamped(asked.scope_fraction))
    took = round((perf_counter() - begun) * 1_000)
    return answer(shown(replace(result, duration_ms=took), action, scope), request_id=request_id)


def _action(segment: str, asked: ScopeTestRequest) -> RecoveryAction | Refusal:
    action_id = named(segment)
    if action_id is None:
        return wrong("invalid_request", "id", "must be 1 to 256 printable characters")
    try:
        return action_asked_for(
            action_id,
            asked.action_name or action_id,
            asked.action_type,
            asked.risk_class,
            asked.parameters,
        )
    except ValueError as exc:
        # The model has checked everything else, so the core can only object to the target agents.
        member = "parameters/target_agents"
        return wrong("invalid_request", member, str(exc).removeprefix(f"{member} "))
