"""The scope endpoints of the recovery API: request, list and revoke scopes, and the scope test."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from urllib.parse import parse_qsl

from aiohttp import web

from sidecar.core.facts import IDENTIFIER_RULE, Claims
from sidecar.core.instant import iso_time
from sidecar.core.money import to_dollars
from sidecar.core.principal import Principal
from sidecar.core.rules import TERMS, ScopeTerms
from sidecar.core.scope import Scope
from sidecar.errors import ERRORS, Refusal, StoreUnavailable, unavailable
from sidecar.gate.execution import Gate
from sidecar.gate.grants import Grants
from sidecar.gate.messages import Refused, RequestFacts
from sidecar.ids import new_scope_id
from sidecar.live.snapshot import Live, Snapshot
from sidecar.store.batch import Store
from sidecar.store.lists import UnknownCursor
from sidecar.web.api import scopetest
from sidecar.web.api.operation import (
    AFTER_NUMBER,
    BODY_ERRORS,
    DECISION_ID_HEADER,
    LIMIT,
    REQUEST_ID,
    REQUEST_ID_HEADER,
    STORE_ERRORS,
    TO_DECISION,
    UNREADY_ERRORS,
    Answer,
    Body,
    Operation,
    Parameter,
    Reply,
    link,
)
from sidecar.web.api.routes import response
from sidecar.web.serving.accesslog import names_scope
from sidecar.web.serving.body import read_json
from sidecar.web.serving.roles import lacking
from sidecar.web.wire import answers
from sidecar.web.wire.headers import fields_of
from sidecar.web.wire.models import IDENTIFIER, ScopeRequest, ScopeTestRequest, validated, wrong
from sidecar.web.wire.problem import problem, refused_problem
from sidecar.web.wire.request import AnyRequest, paging_of, shown_tenant, tenant_for, tenant_of

RECOVERY_PREFIX = "/api/v1/recovery/"
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

    @staticmethod
    def owns(target: str) -> bool:
        """Whether a raw target is the path of a scope endpoint."""
        if not target.startswith(RECOVERY_PREFIX):
            return False
        path = target.partition("?")[0]
        if path == SCOPE_PATH:
            return True
        name = path.removeprefix(SCOPES_PREFIX)
        return (name != path and bool(name) and "/" not in name) or scopetest.candidate_of(path) is not None

    async def handle(
        self, request: AnyRequest, target: str, request_id: str, principal: Principal
    ) -> web.Response:
        """Answer a request to a scope endpoint."""
        if not self.owns(target):  # the router accepted another spelling of the path
            return problem(Refusal("not_found", "Nothing is served under this path."), request_id=request_id)
        try:
            result = await self._serve(request, target, request_id, principal)
        except StoreUnavailable as exc:
            result = unavailable(exc)
        except UnknownCursor as exc:
            result = wrong("invalid_request", "before", str(exc))
        return response(result, request_id=request_id)

    async def refuse(
        self, request: AnyRequest, target: str, request_id: str, refusal: Refusal
    ) -> web.Response:
        """Refuse a request to a scope endpoint unread. Record it if it would have issued or revoked one, and
        if its credential is not valid."""
        path, snapshot = target.partition("?")[0], self._live.snapshot
        name = (
            scopetest.decoded_name(path.removeprefix(SCOPES_PREFIX))
            if path.startswith(SCOPES_PREFIX)
            else None
        )
        changes = (request.method, path) == ("POST", SCOPE_PATH) or (
            request.method == "DELETE" and name is not None
        )
        if not changes and ERRORS[refusal.code].status not in (401, 429):
            return problem(refusal, request_id=request_id)
        facts = RequestFacts(
            gatekept="scope_grant",
            tenant_id=tenant_of(fields_of(request), snapshot.settings.gate.tenant_header) or "default",
            request_id=request_id,
            policies=snapshot.policies,
            claims=Claims(scope_id=name),
        )
        return refused_problem(await self._gate.refusals.refuse(refusal, facts), request_id)

    async def _serve(self, request: AnyRequest, target: str, request_id: str, principal: Principal) -> object:
        path, _, query = target.partition("?")
        snapshot = self._live.snapshot
        candidate = scopetest.candidate_of(path)
        allow = ("GET", "DELETE") if path != SCOPE_PATH and candidate is None else ("POST",)
        if request.method not in allow:
            refusal = Refusal("method_not_allowed", f"{request.method} is not served here.")
            return problem(refusal, request_id=request_id, allow=allow)
        roles = _ROLES["POST test" if candidate is not None else request.method]
        lacks = lacking(principal, snapshot, *roles)
        if lacks is not None:
            return await self._refused(request, lacks, request_id, principal, snapshot)
        if candidate is not None:
            return await self.test(request, candidate, snapshot)
        # Without a method of authentication, every caller may do what operators may.
        operates = lacking(principal, snapshot, "operator") is None
        tenant = tenant_for(
            principal,
            fields_of(request),
            snapshot.settings.gate.tenant_header,
            across=operates and path != SCOPE_PATH,
        )
        if path == SCOPE_PATH:
            return await self.issue(request, tenant, request_id, principal, snapshot)
        if isinstance(tenant, Refusal):
            return await self._refused(request, tenant, request_id, principal, snapshot)
        if tenant is None:
            return _no_tenant(snapshot)
        name = scopetest.decoded_name(path.removeprefix(SCOPES_PREFIX))
        if name is None:
            return Refusal("invalid_request", f"The last path segment must be {IDENTIFIER_RULE}.")
        if request.method == "GET":
            return await self.list(name, query, tenant, None if operates else principal)
        names_scope(request, name)
        return await self.revoke(name, tenant, request_id, principal, snapshot, own_only=not operates)

    async def test(
        self, request: AnyRequest, candidate: str, snapshot: Snapshot
    ) -> scopetest.Rehearsal | Refusal:
        return scopetest.rehearse(candidate, await _body(request, snapshot))

    async def _refused(
        self,
        request: AnyRequest,
        refusal: Refusal,
        request_id: str,
        principal: Principal,
        snapshot: Snapshot,
    ) -> Refused:
        """Record that a caller may not make a call."""
        facts = RequestFacts(
            gatekept="scope_grant",
            tenant_id=shown_tenant(principal, fields_of(request), snapshot.settings.gate.tenant_header),
            request_id=request_id,
            principal=principal,
            policies=snapshot.policies,
        )
        return await self._gate.refusals.refuse(refusal, facts)

    async def issue(
        self,
        request: AnyRequest,
        tenant: str | Refusal | None,
        request_id: str,
        principal: Principal,
        snapshot: Snapshot,
    ) -> Reply[answers.GrantedScope] | Refused:
        facts = RequestFacts(
            gatekept="scope_grant",
            tenant_id=tenant if isinstance(tenant, str) else principal.tenant_id,
            request_id=request_id,
            principal=principal,
            policies=snapshot.policies,
        )
        refuse = self._gate.refusals.refuse
        unready = self._gate.unready(snapshot)
        if unready is not None:
            return await refuse(unready.refusal, facts, retry_after=unready.retry_after)
        if isinstance(tenant, Refusal):
            return await refuse(tenant, facts)
        wanted = await _wanted(request, snapshot) if tenant is not None else _no_tenant(snapshot)
        if isinstance(wanted, Refusal):
            return await refuse(wanted, facts)
        facts = replace(facts, claims=Claims(incident_id=wanted.incident_id))
        granted = _scope_terms(wanted, snapshot)
        if isinstance(granted, Refusal):
            return await refuse(granted, facts)
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
            executors=tuple(wanted.executors or ()),
            issuer_kind=principal.kind,
            issuer_method=principal.method,
            **_creator(wanted, principal),
        )
        defaulted = frozenset(term for term in TERMS if getattr(wanted, term) is None)
        reply = await self._grants.issue(scope, granted.ttl_seconds, defaulted, facts)
        if isinstance(reply, Refused):
            return reply
        names_scope(request, reply.scope.scope_id)
        body = answers.granted(reply.scope, self._store.now())
        return Reply(body, status=201, decision_id=reply.decision_id)

    async def list(
        self, incident_id: str, query: str, tenant: str, issuer: Principal | None
    ) -> answers.ScopeList | Refusal:
        """A page of an incident's scopes, or only of those for which `issuer` asked."""
        paging = paging_of(dict(parse_qsl(query, keep_blank_values=True)))
        if isinstance(paging, Refusal):
            return paging
        limit, before = paging
        page, total = await self._store.engine.scopes(
            tenant, incident_id, None if issuer is None else issuer.id, before=before, limit=limit
        )
        now = self._store.now()
        return {
            "incident_id": incident_id,
            "scopes": [answers.scope(scope, now) for scope in page.rows],
            "total": total,
            "next": page.next,
        }

    async def revoke(
        self,
        scope_id: str,
        tenant: str,
        request_id: str,
        principal: Principal,
        snapshot: Snapshot,
        *,
        own_only: bool,
    ) -> Reply[answers.Revocation] | Refused:
        facts = RequestFacts(
            policies=snapshot.policies,
            gatekept="scope_grant",
            tenant_id=tenant,
            request_id=request_id,
            principal=principal,
            claims=Claims(scope_id=scope_id),
        )
        reply = await self._grants.revoke(scope_id, facts, own_only=own_only)
        if isinstance(reply, Refused):
            return reply
        return Reply(
            {
                "success": True,
                "data": {"scope_id": scope_id, "status": "revoked"},
                "meta": {"timestamp": iso_time(self._store.now()), "request_id": request_id},
            },
            decision_id=reply.decision_id,
        )


async def _wanted(request: AnyRequest, snapshot: Snapshot) -> ScopeRequest | Refusal:
    body = await _body(request, snapshot)
    return body if isinstance(body, Refusal) else validated(ScopeRequest, body, "invalid_scope")


async def _body(request: AnyRequest, snapshot: Snapshot) -> dict[str, Any] | Refusal:
    bounds = snapshot.settings.gate
    return await read_json(
        request, max_bytes=bounds.max_body_bytes, timeout_seconds=bounds.body_timeout_seconds
    )


def _creator(wanted: ScopeRequest, principal: Principal) -> dict[str, Any]:
    """Who created a scope: its caller if that is known, and otherwise the person that the request names."""
    if not principal.is_authenticated:
        return {"created_by": wanted.created_by}
    named = wanted.created_by if "created_by" in wanted.model_fields_set else principal.id
    return {"created_by": principal.id, "on_behalf_of": None if named == principal.id else named}


def _no_tenant(snapshot: Snapshot) -> Refusal:
    named = snapshot.settings.gate.tenant_header
    return Refusal("invalid_request", f"{named} must name one tenant.", {"member": f"header:{named}"})


def _scope_terms(wanted: ScopeRequest, snapshot: Snapshot) -> ScopeTerms | Refusal:
    """The terms with defaults filled in, or a refusal that names the first term out of bounds."""
    if not wanted.actions:
        return wrong("invalid_scope", "action", "is required (or allowed_actions)")
    if wanted.action and wanted.allowed_actions and wanted.action not in wanted.allowed_actions:
        return wrong("invalid_scope", "action", "must be among allowed_actions where both are given")
    if wanted.executors is not None and not snapshot.methods.names:
        what = "has no effect without a method of authentication; leave it out, or configure one"
        return wrong("invalid_scope", "executors", what)
    limits, defaults = snapshot.settings.scopes.limits, snapshot.settings.scopes.defaults
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


_ID_HEADERS = (DECISION_ID_HEADER, REQUEST_ID_HEADER)

SCOPES = (
    Operation(
        listener="scopes",
        call="POST /api/v1/recovery/scope",
        name="createScope",
        tag="Scopes",
        summary="Request a scope",
        description="Every action must be in the policy catalogue. Grant and refusal are both recorded.",
        parameters=(REQUEST_ID,),
        body=Body(
            schema=ScopeRequest,
            examples={
                "one attempt of one action": {
                    "incident_id": "inc_123",
                    "action": "retry_agent",
                    "intent": "Recover from hallucinated legal response",
                    "max_cost_usd": 0.50,
                    "max_attempts": 1,
                }
            },
        ),
        answers=(
            Answer(
                "The scope, granted.",
                status="201",
                headers=_ID_HEADERS,
                links={
                    "Listed": link("listScopes", id="$response.body#/incident_id"),
                    "Revoke": link("revokeScope", id="$response.body#/scope_id"),
                    **TO_DECISION,
                },
            ),
        ),
        errors=(*BODY_ERRORS, "invalid_scope", "policy_denied", *UNREADY_ERRORS),
        error_headers=_ID_HEADERS,
        tenant="required",
        roles=("issuer",),
        handler=ScopeApi.issue,
    ),
    Operation(
        listener="scopes",
        call="GET /api/v1/recovery/scopes/{id}",
        name="listScopes",
        tag="Scopes",
        summary="List an incident's scopes",
        description="Newest first. An unknown incident has an empty list.",
        parameters=(
            Parameter("id", "path", IDENTIFIER, "The incident."),
            LIMIT,
            AFTER_NUMBER,
            REQUEST_ID,
        ),
        answers=(Answer("A page of them.", headers=(REQUEST_ID_HEADER,)),),
        errors=("invalid_request", *STORE_ERRORS),
        error_headers=(REQUEST_ID_HEADER,),
        tenant="required",
        roles=("issuer", "operator"),
        handler=ScopeApi.list,
    ),
    Operation(
        listener="scopes",
        call="DELETE /api/v1/recovery/scopes/{id}",
        name="revokeScope",
        tag="Scopes",
        summary="Revoke a scope",
        description="Can be repeated. Nothing is admitted once it is answered.",
        parameters=(
            Parameter("id", "path", IDENTIFIER, "The scope."),
            REQUEST_ID,
        ),
        answers=(Answer("Revoked.", headers=_ID_HEADERS, links=TO_DECISION),),
        errors=("invalid_request", "scope_not_found", *STORE_ERRORS),
        error_headers=_ID_HEADERS,
        tenant="required",
        roles=("issuer", "operator"),
        handler=ScopeApi.revoke,
    ),
    Operation(
        listener="scopes",
        call="POST /api/v1/recovery/candidates/{id}/scope-test",
        name="testScope",
        tag="Scopes",
        summary="Rehearse a recovery action",
        description="A dry run or a simulation. Executes, consumes and records nothing.",
        parameters=(
            Parameter("id", "path", IDENTIFIER, "The action."),
            REQUEST_ID,
        ),
        body=Body(
            schema=ScopeTestRequest,
            examples={
                "dry run": {
                    "action_type": "scale",
                    "risk_class": "high",
                    "parameters": {"target_agents": ["agent_1"]},
                },
                "on a tenth": {"action_type": "retry", "risk_class": "low", "scope_type": "request_sample"},
            },
        ),
        answers=(Answer("What it would do.", headers=(REQUEST_ID_HEADER,)),),
        errors=BODY_ERRORS,
        error_headers=(REQUEST_ID_HEADER,),
        roles=("observer",),
        handler=ScopeApi.test,
    ),
)

# The roles of each method. Only the scope test has a path of its own with POST.
_ROLES = {
    **{operation.method: operation.roles for operation in SCOPES if operation.name != "testScope"},
    "POST test": next(operation.roles for operation in SCOPES if operation.name == "testScope"),
}
