"""The scope endpoints of the recovery API: request, list and revoke scopes, and the scope test."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from urllib.parse import parse_qsl

from aiohttp import web

from sidecar.core.facts import Claims
from sidecar.core.money import to_dollars
from sidecar.core.record import iso_time
from sidecar.core.rules import TERMS, ScopeTerms
from sidecar.core.scope import Scope
from sidecar.errors import Refusal, StoreUnavailable, unavailable
from sidecar.gate.execution import Gate
from sidecar.gate.grants import Grants
from sidecar.gate.messages import Refused, RequestFacts
from sidecar.ids import new_scope_id
from sidecar.live.terms import Live, Terms
from sidecar.store.batch import Store
from sidecar.web.api import scopetest
from sidecar.web.serving.accesslog import names_scope
from sidecar.web.serving.body import read_json
from sidecar.web.wire.asked import paging_of, tenant_of
from sidecar.web.wire.models import ScopeRequest, validated, wrong
from sidecar.web.wire.problem import answer, problem, refused_problem

SCOPE_PATH = "/api/v1/recovery/scope"
SCOPES_PREFIX = "/api/v1/recovery/scopes/"
MIN_TTL_SECONDS = 60


class ScopeApi:
    """Serves the raw paths of the scope endpoints, for every method, and no other spelling of these paths."""

    def __init__(self, *, store: Store, gate: Gate, grants: Grants, live: Live) -> None:
        self._store = store
        self._gate = gate
        self._grants = grants
        self._live = live

    def owns(self, target: str) -> bool:
        """Whether a raw target is the path of a scope endpoint."""
        path = target.partition("?")[0]
        if path == SCOPE_PATH:
            return True
        name = path.removeprefix(SCOPES_PREFIX)
        return (name != path and bool(name) and "/" not in name) or scopetest.candidate_of(path) is not None

    async def handle(self, request: web.BaseRequest, target: str, request_id: str) -> web.Response:
        """Answer a request to a scope endpoint."""
        if not self.owns(target):  # the router accepted another spelling of the path
            return problem(Refusal("not_found", "Nothing is served under this path."), request_id=request_id)
        try:
            return await self._serve(request, target, request_id)
        except StoreUnavailable as exc:
            return problem(unavailable(exc), request_id=request_id)

    async def refuse(
        self, request: web.BaseRequest, target: str, request_id: str, refusal: Refusal
    ) -> web.Response:
        """Refuse a request to a scope endpoint unread. Record it if it facts to issue or revoke a scope."""
        path, terms = target.partition("?")[0], self._live.terms
        name = scopetest.named(path.removeprefix(SCOPES_PREFIX)) if path.startswith(SCOPES_PREFIX) else None
        if (request.method, path) != ("POST", SCOPE_PATH) and (request.method != "DELETE" or name is None):
            return problem(refusal, request_id=request_id)
        facts = RequestFacts(
            gatekept="scope_grant",
            tenant_id=tenant_of(request, terms.settings.gate.tenant_header) or "default",
            request_id=request_id,
            policies=terms.policies,
            claims=Claims(scope_id=name),
        )
        return refused_problem(await self._gate.refusals.refuse(refusal, facts), request_id)

    async def _serve(self, request: web.BaseRequest, target: str, request_id: str) -> web.Response:
        path, _, query = target.partition("?")
        terms = self._live.terms
        tenant = tenant_of(request, terms.settings.gate.tenant_header)
        if path == SCOPE_PATH:
            if request.method == "POST":
                return await self._issue(request, tenant, request_id, terms)
            return _not_allowed(request, ("POST",), request_id)
        candidate = scopetest.candidate_of(path)
        if candidate is not None:
            if request.method == "POST":
                body = await _body(request, terms)
                return scopetest.tested(candidate, body, request_id)
            return _not_allowed(request, ("POST",), request_id)
        if request.method not in ("GET", "DELETE"):
            return _not_allowed(request, ("GET", "DELETE"), request_id)
        if tenant is None:
            return problem(_no_tenant(terms), request_id=request_id)
        name = scopetest.named(path.removeprefix(SCOPES_PREFIX))
        if name is None:
            refusal = Refusal(
                "invalid_request", "The last path segment must be 1 to 256 printable characters."
            )
            return problem(refusal, request_id=request_id)
        if request.method == "GET":
            return await self._list(name, query, tenant, request_id)
        names_scope(request, name)
        return await self._revoke(name, tenant, request_id, terms)

    async def _issue(
        self, request: web.BaseRequest, tenant: str | None, request_id: str, terms: Terms
    ) -> web.Response:
        facts = RequestFacts(
            gatekept="scope_grant",
            tenant_id=tenant or "default",
            request_id=request_id,
            policies=terms.policies,
        )
        refuse = self._gate.refusals.refuse
        unready = self._gate.unready(terms)
        if unready is not None:
            refused = await refuse(unready.refusal, facts, retry_after=unready.retry_after)
            return refused_problem(refused, request_id)
        wanted = await _wanted(request, terms) if tenant is not None else _no_tenant(terms)
        if isinstance(wanted, Refusal):
            return refused_problem(await refuse(wanted, facts), request_id)
        facts = replace(facts, claims=Claims(incident_id=wanted.incident_id))
        granted = _scope_terms(wanted, terms)
        if isinstance(granted, Refusal):
            return refused_problem(await refuse(granted, facts), request_id)
        scope = Scope(
            scope_id=new_scope_id(),
            tenant_id=facts.tenant_id,
            incident_id=wanted.incident_id,
            allowed_actions=wanted.actions,
            max_cost=granted.max_cost,
            max_attempts=granted.max_attempts,
            created_at=0,
            expires_at=0,
            intent=wanted.intent,
            target_agents=tuple(wanted.target_agents),
            created_by=wanted.created_by,
        )
        defaulted = frozenset(term for term in TERMS if getattr(wanted, term) is None)
        reply = await self._grants.issue(scope, granted.ttl_seconds, defaulted, facts)
        if isinstance(reply, Refused):
            return refused_problem(reply, request_id)
        names_scope(request, reply.scope.scope_id)
        told = answer(self._granted(reply.scope), status=201, request_id=request_id)
        told.headers["Scopegate-Decision-Id"] = reply.decision_id
        return told

    def _granted(self, scope: Scope) -> dict[str, Any]:
        shown = scope.to_dict(self._store.now())
        return {
            name: shown[name]
            for name in (
                "scope_id",
                "incident_id",
                "allowed_actions",
                "max_cost_usd",
                "max_attempts",
                "expires_at",
                "intent",
                "status",
                "attempts_remaining",
                "target_agents",
                "created_by",
            )
        }

    async def _list(self, incident_id: str, query: str, tenant: str, request_id: str) -> web.Response:
        paging = paging_of(dict(parse_qsl(query, keep_blank_values=True)))
        if isinstance(paging, Refusal):
            return problem(paging, request_id=request_id)
        limit, before = paging
        try:
            page, total = await self._store.engine.scopes(tenant, incident_id, before=before, limit=limit)
        except ValueError as exc:
            return problem(wrong("invalid_request", "before", str(exc)), request_id=request_id)
        now = self._store.now()
        shown = [scope.to_dict(now) for scope in page.rows]
        body = {"incident_id": incident_id, "scopes": shown, "total": total, "next": page.next}
        return answer(body, request_id=request_id)

    async def _revoke(self, scope_id: str, tenant: str, request_id: str, terms: Terms) -> web.Response:
        facts = RequestFacts(
            policies=terms.policies,
            gatekept="scope_grant",
            tenant_id=tenant,
            request_id=request_id,
            claims=Claims(scope_id=scope_id),
        )
        reply = await self._grants.revoke(scope_id, facts)
        if isinstance(reply, Refused):
            return refused_problem(reply, request_id)
        body = {
            "success": True,
            "data": {"scope_id": scope_id, "status": "revoked"},
            "meta": {"timestamp": iso_time(self._store.now()), "request_id": request_id},
        }
        revoked = answer(body, request_id=request_id)
        revoked.headers["Scopegate-Decision-Id"] = reply.decision_id
        return revoked


async def _wanted(request: web.BaseRequest, terms: Terms) -> ScopeRequest | Refusal:
    body = await _body(request, terms)
    return body if isinstance(body, Refusal) else validated(ScopeRequest, body, "invalid_scope")


async def _body(request: web.BaseRequest, terms: Terms) -> dict[str, Any] | Refusal:
    bounds = terms.settings.gate
    body = await read_json(
        request, max_bytes=bounds.max_body_bytes, timeout_seconds=bounds.body_timeout_seconds
    )
    return body if isinstance(body, Refusal) else body[1]


def _no_tenant(terms: Terms) -> Refusal:
    named = terms.settings.gate.tenant_header
    return Refusal("invalid_request", f"{named} must name one tenant.", {"member": f"header:{named}"})


def _scope_terms(wanted: ScopeRequest, terms: Terms) -> ScopeTerms | Refusal:
    """The terms with defaults filled in, or a refusal that names the first term out of bounds."""
    if not wanted.actions:
        return wrong("invalid_scope", "action", "is required (or allowed_actions)")
    if wanted.action and wanted.allowed_actions and wanted.action not in wanted.allowed_actions:
        return wrong("invalid_scope", "action", "must be among allowed_actions where both are given")
    limits, defaults = terms.settings.scopes.limits, terms.settings.scopes.defaults
    shortest = min(MIN_TTL_SECONDS, limits.ttl_seconds)
    attempts = defaults.max_attempts if wanted.max_attempts is None else wanted.max_attempts
    if not 1 <= attempts <= limits.max_attempts:
        return wrong("invalid_scope", "max_attempts", f"must be from 1 to {limits.max_attempts}")
    ttl = defaults.ttl_seconds if wanted.ttl_seconds is None else wanted.ttl_seconds
    if wanted.ttl_seconds is not None and not shortest <= ttl <= limits.ttl_seconds:
        return wrong("invalid_scope", "ttl_seconds", f"must be from {shortest} to {limits.ttl_seconds}")
    cost = defaults.max_cost if wanted.max_cost_usd is None else wanted.max_cost_usd
    if cost > limits.max_cost:
        ceiling = f"{to_dollars(limits.max_cost):g}"
        return wrong("invalid_scope", "max_cost_usd", f"must be from 0 to {ceiling}")
    return ScopeTerms(max_attempts=attempts, ttl_seconds=ttl, max_cost=cost)


def _not_allowed(request: web.BaseRequest, allow: tuple[str, ...], request_id: str) -> web.Response:
    refusal = Refusal("method_not_allowed", f"{request.method} is not served here.")
    return problem(refusal, request_id=request_id, allow=allow)
