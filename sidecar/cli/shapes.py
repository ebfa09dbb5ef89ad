"""The shapes of a sidecar's answers, as far as commands read them. An answer that does not match is rejected.

A shape is a test of one value, a dict of members (there may be others), or a list with the shape of every
entry. Health checks use it, so it imports next to nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, TypeAlias

Shape: TypeAlias = "Callable[[Any], bool] | Mapping[str, Shape] | list[Shape]"

_ABSENT = object()
# Larger than every amount, count and size in an answer, and small enough to print and to calculate with.
_MOST = 1e18
_LONGEST_SECONDS = 1e10


def misfit(value: Any, shape: Shape, place: str = "the answer") -> str | None:
    """The place of the first value that does not match its shape; None if all match."""
    if isinstance(shape, Mapping):
        if not isinstance(value, dict):
            return place
        return _first(
            misfit(value.get(name, _ABSENT), inner, _member(place, name)) for name, inner in shape.items()
        )
    if isinstance(shape, list):
        if not isinstance(value, list):
            return place
        return _first(misfit(one, shape[0], f"{place}[{index}]") for index, one in enumerate(value))
    return None if shape(value) else place


def _first(found: Any) -> str | None:
    return next((place for place in found if place is not None), None)


def _member(place: str, name: str) -> str:
    return name if place == "the answer" else f"{place}.{name}"


# Tests of one value -----------------------------------------------------------------------------------------


def text(value: Any) -> bool:
    return isinstance(value, str)


def flag(value: Any) -> bool:
    return isinstance(value, bool)


def number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -_MOST < value < _MOST


def count(value: Any) -> bool:
    return number(value) and isinstance(value, int)


def seconds(value: Any) -> bool:
    return number(value) and 0 <= value < _LONGEST_SECONDS


def instant(value: Any) -> bool:
    """A time with its offset, within the years that date arithmetic supports."""
    try:
        then = datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return False
    return then.tzinfo is not None and 1970 <= then.year < 9000


def members(value: Any) -> bool:
    return isinstance(value, dict)


def nullable(shape: Shape) -> Shape:
    """The shape, or null."""
    return lambda value: value is None or (value is not _ABSENT and misfit(value, shape) is None)


def optional(shape: Shape) -> Shape:
    """The shape, or null, or a missing member, because sidecars of other versions leave it out."""
    return lambda value: value is None or value is _ABSENT or misfit(value, shape) is None


def each(shape: Shape) -> Shape:
    """An object whose members all have this shape, under any name."""
    return lambda value: isinstance(value, dict) and all(misfit(one, shape) is None for one in value.values())


# Answers ----------------------------------------------------------------------------------------------------

ALIVE: Shape = {"alive": flag}
READY: Shape = {"ready": flag, "checks": optional(each({"ok": flag, "reason": optional(text)}))}

ACCEPTED_CLOCK: Shape = {
    "decision_id": text,
    "now": instant,
    "time_before": instant,
    "step_seconds": number,
}
STATUS: Shape = {
    "ready": optional(flag),
    "checks": optional(each({"ok": flag, "reason": optional(text)})),
    "clock": optional({"ok": flag, "reason": optional(text)}),
    "uptime_seconds": seconds,
    "version": text,
    "draining": flag,
    "in_flight": count,
    "oldest_unknown_admitted_at": nullable(instant),
    "unknown_executions": nullable(count),
    # A value that was not measured is null.
    "store": {
        "url": text,
        "size": nullable(number),
        "wal_size": nullable(number),
        "free": optional(number),
        "growth_per_day": optional(number),
    },
    "policy_revision": nullable(text),
    "config_revision": text,
    "last_reload": {"ok": flag, "time": instant, "errors": [text]},
    "scope_required_from": text,
    "shadow_routes": [text],
    "scopes_served_on": optional(text),
    "listeners": optional(each(text)),
}
SERVED: Shape = {"scopes_served_on": text}

_TERMS: dict[str, Shape] = {
    "scope_id": text,
    "status": text,
    "incident_id": text,
    "allowed_actions": [text],
    "intent": text,
    "target_agents": [text],
    "max_attempts": count,
    "attempts_remaining": count,
    "max_cost_usd": number,
    "expires_at": instant,
    "created_by": text,
}
GRANT: Shape = {
    **_TERMS,
    "cost_used_usd": optional(number),
    "created_at": optional(instant),
    "tenant_id": optional(text),
}
REVOKED: Shape = {"data": {"scope_id": text, "status": text}}
SCOPE: dict[str, Shape] = {
    **_TERMS,
    "tenant_id": text,
    "attempts_used": count,
    "cost_used_usd": number,
    "created_at": instant,
}
EXECUTION: Shape = {
    "decision_id": text,
    "status": text,
    "cause": nullable(text),
    "action": text,
    "incident_id": text,
    "scope_id": nullable(text),
    "attempt_number": nullable(count),
    "hold_usd": number,
    "cost_usd": nullable(number),
    "http_status": nullable(count),
    "admitted_at": instant,
    "ended_at": nullable(instant),
    "request_id": nullable(text),
}
SCOPE_WHOLE: Shape = {**SCOPE, "executions": [EXECUTION]}
DECISION: dict[str, Shape] = {
    "decision_id": text,
    "decision_type": text,
    "decision_outcome": text,
    "decision_source": text,
    "decision_trigger": text,
    "causal_role": text,
    "decision_reason": nullable(text),
    "decision_inputs": members,
    "details": members,
    "decided_at": instant,
    "recorded_at": optional(instant),
    "event": text,
    "origin": text,
    "seq": count,
    "writer": text,
    "tenant_id": text,
    **dict.fromkeys(
        ("action", "incident_id", "scope_id", "request_id", "run_id", "workflow_id", "admission_id"),
        nullable(text),
    ),
}
DECISION_WHOLE: Shape = {
    **DECISION,
    "hash": text,
    "previous_hash": text,
    "execution": nullable(EXECUTION),
}
EXPLAINED: Shape = {
    "allowed": flag,
    "error": nullable(text),
    "message": text,
    "next": text,
    "route": text,
    "rules": [text],
    "bound": nullable(text),
    "scope": nullable({"scope_id": text, "incident_id": text, "status": text}),
    "scope_required": flag,
    "left": nullable({"cost_usd": number, "seconds": number, "attempts": count}),
    "hold_usd": number,
    "brakes": [
        {
            "rule": text,
            "mode": text,
            "per": members,
            "used": count,
            "max_attempts": nullable(count),
            "window_seconds": nullable(number),
            "holds": flag,
            "ends_at": nullable(text),
        }
    ],
    "would_refuse": [{"rule": nullable(text), "error": text, "message": text}],
    "policy_revision": nullable(text),
}
