"""PIN-162's scope endpoints: ask for a scope, list an incident's scopes, revoke one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, unquote_to_bytes

from aiohttp import web

from sidecar.core.command import Denied, Issue, Issued, Revoke, Revoked
from sidecar.core.facts import Claims, is_identifier
from sidecar.core.money import to_dollars
from sidecar.core.record import iso_time
from sidecar.core.scope import Scope
from sidecar.errors import Refusal
from sidecar.gate import Gate
from sidecar.ids import new_decision_id, new_scope_id
from sidecar.refusals import Asked
from sidecar.store.batch import Store
from sidecar.web.body import read_json
from sidecar.web.models import ScopeRequest, validated, wrong
from sidecar.web.problem import answer, problem

SCOPE_PATH = "/api/v1/recovery/scope"
SCOPES_PREFIX = "/api/v1/recovery/scopes/"
MIN_TTL_SECONDS = 60
DEFAULT_PAGE = 100
MAX_PAGE = 1_000


@dataclass(frozen=True, slots=True, kw_only=True)
class ScopeTerms:
    """One value for each term of a scope: the defaults, or the limits. Money in micro-dollars."""

    max_attempts: int
    ttl_seconds: int
    max_cost: int


class ScopeApi:
    """Serves exactly the two raw paths below, for every method; any other spelling is not its own."""

    def __init__(
        self,
        *,
        store: Store,
        gate: Gate,
        defaults: ScopeTerms,
        limits: ScopeTerms,
        max_body_bytes: int,
        body_timeout_seconds: float,
        tenant_header: str | None,
    ) -> None:
        self._store = store
        self._gate = gate
        self._defaults = defaults
        self._limits = limits
        self._max_body_bytes = max_body_bytes
        self._body_timeout = body_timeout_seconds
        self._tenant_header = tenant_header

    def owns(self, target: str) -> bool:
        """Whether a raw target is one of the sidecar's own."""
        path = target.partition("?")[0]
        if path == SCOPE_PATH:
            return True
        name = path.removeprefix(SCOPES_PREFIX)
        return name != path and bool(name) and "/" not in name

    async def handle(self, request: web.BaseRequest, target: str, request_id: str) -> web.Response:
        """Answer a request to one of them. Raises StoreUnavailable."""
        path, _, query = target.partition("?")
        tenant = tenant_of(request, self._tenant_header)
        if tenant is None:
            named = self._tenant_header
            refusal = Refusal(
                "invalid_request", f"{named} must name one tenant.", {"member": f"header:{named}"}
            )
            return problem(refusal, request_id=request_id)
        if path == SCOPE_PATH:
            if request.method == "POST":
                return await self._issue(request, tenant, request_id)
            return _not_allowed(request, ("POST",), request_id)
        try:
            name = unquote_to_bytes(path.removeprefix(SCOPES_PREFIX)).decode("utf-8")
        except UnicodeDecodeError:
            name = ""
        if request.method not in ("GET", "DELETE"):
            return _not_allowed(request, ("GET", "DELETE"), request_id)
        if not is_identifier(name):
            refusal = Refusal(
                "invalid_request", "The last path segment must be 1 to 256 printable characters."
            )
            return problem(refusal, request_id=request_id)
        if request.method == "GET":
            return await self._list(name, query, tenant, request_id)
        return await self._revoke(name, tenant, request_id)

    async def _issue(self, request: web.BaseRequest, tenant: str, request_id: str) -> web.Response:
        asked = Asked(gatekept="scope_grant", tenant_id=tenant, request_id=request_id)
        unready = self._gate.unready()
        if unready is not None:
            refused = await self._gate.refuse(unready[0], asked, retry_after=unready[1])
            return problem(
                unready[0], request_id=request_id, decision_id=refused.decision_id, retry_after=unready[1]
            )
        policies = self._gate.policies
        assert policies is not None
        body = await read_json(request, max_bytes=self._max_body_bytes, timeout_seconds=self._body_timeout)
        wanted = body if isinstance(body, Refusal) else validated(ScopeRequest, body[1], "invalid_scope")
        terms = wanted if isinstance(wanted, Refusal) else self._terms(wanted)
        if isinstance(wanted, Refusal) or isinstance(terms, Refusal):
            refusal = wanted if isinstance(wanted, Refusal) else terms
            assert isinstance(refusal, Refusal)
            if not isinstance(wanted, Refusal):
                asked = Asked(
                    gatekept="scope_grant",
                    tenant_id=tenant,
                    request_id=request_id,
                    claims=Claims(incident_id=wanted.incident_id),
                )
            refused = await self._gate.refuse(refusal, asked)
            return problem(refusal, request_id=request_id, decision_id=refused.decision_id)
        scope = Scope(
            scope_id=new_scope_id(),
            tenant_id=tenant,
            incident_id=wanted.incident_id,
            allowed_actions=wanted.actions,
            max_cost=terms.max_cost,
            max_attempts=terms.max_attempts,
            created_at=0,
            expires_at=0,
            intent=wanted.intent,
            target_agents=tuple(wanted.target_agents),
            created_by=wanted.created_by,
        )
        issue = Issue(
            decision_id=new_decision_id(),
            scope=scope,
            ttl=terms.ttl_seconds,
            policies=policies,
            request_id=request_id,
        )
        reply = await self._store.submit(issue)
        self._gate.count_grant(reply.refusal if isinstance(reply, Denied) else None)
        if isinstance(reply, Denied):
            return problem(reply.refusal, request_id=request_id, decision_id=reply.decision_id)
        assert isinstance(reply, Issued)
        granted = answer(self._granted(reply.scope), status=201, request_id=request_id)
        granted.headers["Scopegate-Decision-Id"] = reply.decision_id
        return granted

    def _terms(self, wanted: ScopeRequest) -> ScopeTerms | Refusal:
        """The terms with defaults filled in, or the first that is out of bounds."""
        if not wanted.actions:
            return wrong("invalid_scope", "action", "is required (or allowed_actions)")
        if wanted.action and wanted.allowed_actions and wanted.action not in wanted.allowed_actions:
            return wrong("invalid_scope", "action", "must be among allowed_actions where both are given")
        limits, defaults = self._limits, self._defaults
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

    async def _revoke(self, scope_id: str, tenant: str, request_id: str) -> web.Response:
        revoke = Revoke(
            decision_id=new_decision_id(), scope_id=scope_id, tenant_id=tenant, request_id=request_id
        )
        reply = await self._store.submit(revoke)
        if isinstance(reply, Denied):
            return problem(reply.refusal, request_id=request_id, decision_id=reply.decision_id)
        assert isinstance(reply, Revoked)
        body = {
            "success": True,
            "data": {"scope_id": scope_id, "status": "revoked"},
            "meta": {"timestamp": iso_time(self._store.now()), "request_id": request_id},
        }
        revoked = answer(body, request_id=request_id)
        revoked.headers["Scopegate-Decision-Id"] = reply.decision_id
        return revoked


def paging_of(query: dict[str, str]) -> tuple[int, str | None] | Refusal:
    """`limit` (100 by default, 1000 at most) and the cursor `before`."""
    text = query.get("limit", str(DEFAULT_PAGE))
    if not re.fullmatch(r"[1-9][0-9]{0,3}", text) or int(text) > MAX_PAGE:
        return wrong("invalid_request", "limit", f"must be from 1 to {MAX_PAGE}")
    return int(text), query.get("before")


def tenant_of(request: web.BaseRequest, header: str | None) -> str | None:
    """`default` without a tenant header; None where the header does not name exactly one tenant."""
    if header is None:
        return "default"
    values = request.headers.getall(header, [])
    if len(values) != 1 or not is_identifier(values[0]):
        return None
    return values[0]


def _not_allowed(request: web.BaseRequest, allow: tuple[str, ...], request_id: str) -> web.Response:
    refusal = Refusal("method_not_allowed", f"{request.method} is not served here.")
    return problem(refusal, request_id=request_id, allow=allow)
