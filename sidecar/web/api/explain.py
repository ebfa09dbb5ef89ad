"""`explain`: the refusal that an execution would get, the rest of its scope, and the next step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast, get_args

from aiohttp import web

from sidecar.auth.identity import Identity
from sidecar.core.brakes import Use
from sidecar.core.facts import (
    DEFAULT_SOURCES,
    IDENTIFIER_RULE,
    Claims,
    FactSources,
    Request,
    Source,
    is_identifier,
    read,
)
from sidecar.core.instant import SECOND, iso_time
from sidecar.core.money import to_dollars
from sidecar.core.policy import Rule
from sidecar.core.principal import ANONYMOUS, ANONYMOUS_ID, DEFAULT_TENANT, Principal, PrincipalKind
from sidecar.core.scope import Scope
from sidecar.errors import ERRORS, Refusal, StoreUnavailable, unavailable
from sidecar.gate.grants import Grants
from sidecar.gate.messages import Prediction, RequestFacts
from sidecar.live.snapshot import Live, Snapshot
from sidecar.settings.routes import Route
from sidecar.web.api.access import asking
from sidecar.web.api.operation import Answer, Body, Operation, choice
from sidecar.web.api.routes import Query
from sidecar.web.serving.body import read_document
from sidecar.web.serving.roles import lacking
from sidecar.web.wire import answers
from sidecar.web.wire.headers import fields_of
from sidecar.web.wire.models import wrong
from sidecar.web.wire.request import tenant_for, unknown

ALLOWED = "Nothing; it would be let through."


class ExplainApi:
    """A handler of the admin listener. It answers 200 for any body, because a refusal is what it explains."""

    def __init__(self, *, grants: Grants, live: Live) -> None:
        self._grants = grants
        self._live = live

    async def explain(self, request: web.Request, query: Query) -> answers.Explanation | Refusal:
        snapshot = self._live.snapshot
        header = snapshot.settings.gate.tenant_header
        routes = {route.label: route for route in snapshot.settings.gate.routes}
        body = await read_document(request)
        name = query.given.get("route", next(iter(snapshot.enforced or routes.values())).label)
        if name not in routes:
            return unknown("route", tuple(routes))
        route = snapshot.judging(routes[name])
        shadow = route in snapshot.shadow_routes
        principal = _judged(asking(request), query, snapshot)
        if isinstance(principal, Refusal):
            return principal
        named = tenant_for(principal, fields_of(request), header)
        tenant = named if isinstance(named, str) else None
        lacks = lacking(principal, snapshot, "executor")
        claims: Claims | Refusal
        if isinstance(body, Refusal):
            claims = body
        elif lacks is not None:
            claims = lacks
        elif isinstance(named, Refusal):
            claims = named
        elif tenant is None:
            claims = Refusal("invalid_request", f"{header} must name one tenant.")
        else:
            claims = read(Request(document=body), _in_a_body(route.sources))
        facts = RequestFacts(
            claims=Claims() if isinstance(claims, Refusal) else claims,
            tenant_id=tenant or DEFAULT_TENANT,
            principal=principal,
            route=route.label,
        )
        try:
            if isinstance(claims, Refusal):
                explanation = await self._grants.unread(claims, facts, snapshot, shadow=shadow)
            else:
                explanation = await self._grants.explain(facts, snapshot, shadow=shadow)
        except StoreUnavailable as exc:
            explanation = Prediction(refusal=unavailable(exc))
        if isinstance(claims, Refusal):
            return answer_for(explanation, snapshot, route, principal)
        return answer_for(explanation, snapshot, route, principal, claims, facts.tenant_id)


def _judged(caller: Principal, query: Query, snapshot: Snapshot) -> Principal | Refusal:
    """The principal to judge: the caller, or another one that an operator names."""
    named = query.given.get("principal")
    for name in ("principal_kind", "principal_groups"):
        if named is None and name in query.given:
            return wrong("invalid_request", name, "is about another principal; name it by principal")
    if named is None:
        return caller
    if not snapshot.methods.names:
        return wrong("invalid_request", "principal", "has no effect without a method of authentication")
    if named == ANONYMOUS_ID:
        return lacking(caller, snapshot, "operator") or ANONYMOUS
    groups = query.given.get("principal_groups")
    listed = None if groups is None else tuple(part for part in groups.split(",") if part)
    for name, value in (("principal", named), *(("principal_groups", one) for one in listed or ())):
        if not is_identifier(value):
            return wrong("invalid_request", name, f"must be {IDENTIFIER_RULE}")
    kind = cast("PrincipalKind | None", query.given.get("principal_kind"))
    methods = snapshot.methods
    other = methods.callers.principals.completed(Identity(id=named, kind=kind, groups=listed)).principal(
        methods.names[0]
    )
    # Operators of tenant `default` may look at all tenants.
    if caller.tenant_id != DEFAULT_TENANT and other.tenant_id != caller.tenant_id:
        return Refusal("tenant_mismatch", f"{named} is of another tenant.", {"tenant_id": caller.tenant_id})
    return lacking(caller, snapshot, "operator") or other


def _in_a_body(sources: FactSources) -> FactSources:
    """The places of a route, where the body holds all facts but constants: a fact that the route reads from
    elsewhere in the request stands in the body at its default place."""

    def in_the_body(place: Source, default: tuple[Source, ...]) -> tuple[Source, ...]:
        return (place,) if place.kind in ("pointer", "const") else default

    usual = DEFAULT_SOURCES
    agents = [each for place in sources.target_agents for each in in_the_body(place, usual.target_agents)]
    return FactSources(
        scope_id=in_the_body(sources.scope_id, (usual.scope_id,))[0],
        incident_id=in_the_body(sources.incident_id, (usual.incident_id,))[0],
        action=in_the_body(sources.action, (usual.action,))[0],
        parameters=sources.parameters,
        target_agents=tuple(dict.fromkeys(agents)),
    )


def answer_for(
    explanation: Prediction,
    snapshot: Snapshot,
    route: Route,
    principal: Principal,
    claims: Claims | None = None,
    tenant_id: str = "default",
) -> answers.Explanation:
    """The answer for a route. It includes the claims if they could be read."""
    refusal, scope = explanation.refusal, explanation.scope
    members: dict[str, Any] = dict(refusal.members) if refusal else {}
    facets: dict[str, Any] = {"tenant_id": tenant_id, "principal": principal.id}
    if claims is not None:
        facets |= {
            "incident_id": claims.incident_id,
            "action": claims.action,
            "target_agents": list(claims.target_agents),
        }
    return {
        "route": route.label,
        "allowed": refusal is None,
        "error": refusal.code if refusal else None,
        "message": refusal.message if refusal else "This would be admitted.",
        "bound": members.get("bound"),
        "rules": members.get("rules", []),
        "members": members,
        "next": _next(refusal, explanation) if refusal else ALLOWED,
        "hold_usd": to_dollars(explanation.hold),
        "scope_required": explanation.scope_required,
        "scope": None if scope is None else answers.scope(scope, explanation.now),
        "left": None if scope is None else _left(scope, explanation.now),
        "brakes": [_brake(rule, use, facets) for rule, use in explanation.uses],
        "would_refuse": [cast("answers.WouldRefuse", one.to_dict()) for one in explanation.shadow],
        "policy_revision": snapshot.policies.revision if snapshot.policies else None,
    }


def _next(refusal: Refusal, explanation: Prediction) -> str:
    """The advice for a refusal."""
    scope, hold = explanation.scope, explanation.hold
    if scope is not None and refusal.members.get("bound") == "max_cost_usd":
        # Nothing of a new scope is spent, so its ceiling has to cover this execution only.
        return f"Ask for a new scope with max_cost_usd of at least {to_dollars(hold):.12g}."
    return ERRORS[refusal.code].advice


def _left(scope: Scope, now: int) -> answers.Left:
    """The rest of the scope: attempts, cost and time."""
    usable = scope.status(now) == "active"
    return {
        "attempts": scope.attempts_remaining if usable else 0,
        "cost_usd": to_dollars(max(0, scope.max_cost - scope.spent)) if usable else 0.0,
        "seconds": max(0, scope.expires_at - now) / SECOND if usable else 0.0,
    }


def _brake(rule: Rule, use: Use, facets: Mapping[str, Any]) -> answers.BrakeUse:
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


EXPLAIN = Operation(
    call="POST /api/v1/explain",
    name="explain",
    tag="Decisions",
    summary="Would this be admitted?",
    description="Takes the body of an execution, and answers 200 for any body: a refusal is explained. "
    "Consumes and records nothing. Facts are read where the route has them in its body. A fact that the "
    "route reads from the path, the query, a header or a form is a member of the body here (`scope_id`, "
    "`incident_id`, `action`, `target_agents`). The answer names the route.",
    parameters=(
        choice(
            "route",
            "The name of a gated route: its path if it has no other. Without it the first route that "
            "refuses is judged, else the first. Where another route goes before this one, as an enforced one "
            "does before one in shadow, that one judges.",
        ),
        choice("principal", "Who executes, if that is not the caller; for operators."),
        choice(
            "principal_kind", "Its kind; without this as `auth.principals` says.", get_args(PrincipalKind)
        ),
        choice(
            "principal_groups", "Its groups, separated by commas; without this as `auth.principals` says."
        ),
    ),
    body=Body(
        schema={"anyOf": [{"$ref": "#/components/schemas/ExecuteRequest"}, {}]},
        examples={"without a scope": {"incident_id": "inc_123", "action": "retry_agent"}},
        required=False,
    ),
    answers=(Answer("What an execution would meet now."),),
    errors=("invalid_request", "tenant_mismatch"),
    tenant="optional",
    roles=("observer",),
    handler=ExplainApi.explain,
)
