"""The answer of `explain`: the refusal that a request would get, the rest of its scope, and the next step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sidecar.core.brakes import Use
from sidecar.core.facts import Claims
from sidecar.core.money import to_dollars
from sidecar.core.policy import Rule
from sidecar.core.record import iso_time
from sidecar.core.scope import Scope
from sidecar.errors import ERRORS, Refusal
from sidecar.gate.messages import Explanation
from sidecar.live.terms import Terms
from sidecar.settings.sections import Route

ALLOWED = "Nothing; it would be let through."


def explained(
    explanation: Explanation,
    terms: Terms,
    route: Route,
    claims: Claims | None = None,
    tenant_id: str = "default",
) -> dict[str, Any]:
    """The answer of `explain` for a route. It includes the claims if they could be read."""
    refusal, scope = explanation.refusal, explanation.scope
    members = dict(refusal.members) if refusal else {}
    facets: dict[str, Any] = {"tenant_id": tenant_id, "principal": "anonymous"}  # the gate's only principal
    if claims is not None:
        facets |= {
            "incident_id": claims.incident_id,
            "action": claims.action,
            "target_agents": list(claims.target_agents),
        }
    return {
        "route": route.path.text,
        "allowed": refusal is None,
        "error": refusal.code if refusal else None,
        "message": refusal.message if refusal else "This would be admitted.",
        "bound": members.get("bound"),
        "rules": members.get("rules", []),
        "members": members,
        "next": _next(refusal, explanation) if refusal else ALLOWED,
        "hold_usd": to_dollars(explanation.hold),
        "scope_required": explanation.scope_required,
        "scope": None if scope is None else scope.to_dict(explanation.now),
        "left": None if scope is None else _left(scope, explanation.now),
        "brakes": [_brake(rule, use, facets) for rule, use in explanation.uses],
        "would_refuse": [one.to_dict() for one in explanation.shadow],
        "policy_revision": terms.policies.revision if terms.policies else None,
    }


def _next(refusal: Refusal, explanation: Explanation) -> str:
    """The advice for a refusal."""
    scope, hold = explanation.scope, explanation.hold
    if scope is not None and refusal.members.get("bound") == "max_cost_usd":
        # A ceiling below the hold could never cover it. A higher one could until the scope was spent.
        needed = hold if scope.max_cost < hold else scope.spent + hold
        return f"Ask for a scope with max_cost_usd of at least {to_dollars(needed):.12g}."
    return ERRORS[refusal.code].advice


def _left(scope: Scope, now: int) -> dict[str, Any]:
    """The rest of the scope: attempts, cost and time."""
    usable = scope.status(now) == "active"
    return {
        "attempts": scope.attempts_remaining if usable else 0,
        "cost_usd": to_dollars(max(0, scope.max_cost - scope.spent)) if usable else 0.0,
        "seconds": max(0, scope.expires_at - now) / 1_000_000 if usable else 0.0,
    }


def _brake(rule: Rule, use: Use, facets: Mapping[str, Any]) -> dict[str, Any]:
    """The use of a brake by earlier executions with the same facets as the request."""
    assert rule.brake is not None
    return {
        "rule": rule.id,
        "reason": rule.reason,
        "mode": "shadow" if rule.shadow else "enforce",
        "per": {facet: facets[facet] for facet in rule.brake.per},
        "used": use.count,
        "max_attempts": rule.brake.max_attempts,
        "window_seconds": rule.brake.window_seconds,
        "holds": use.why is not None,
        "why": use.why,
        "ends_at": None if use.until is None else iso_time(use.until),
    }
