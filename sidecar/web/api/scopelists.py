"""Scopes for operators: the scopes of all incidents and tenants. Reading a scope consumes nothing."""

from __future__ import annotations

from typing import Any, cast, get_args

from aiohttp import web

from sidecar.core.scope import Scope, ScopeStatus
from sidecar.errors import Refusal
from sidecar.store.base import ScopesWanted
from sidecar.store.batch import Store
from sidecar.web.wire.asked import paging_of, query_of, unknown
from sidecar.web.wire.models import wrong
from sidecar.web.wire.problem import answer, problem

SCOPE_STATUSES = get_args(ScopeStatus)


class ScopeLists:
    """Handlers of the admin listener for the list of scopes and for one scope."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/api/v1/scopes", self._scopes),
            web.get("/api/v1/scopes/{scope_id}", self._scope),
        ]

    async def _scopes(self, request: web.Request) -> web.Response:
        asked = query_of(request, ("incident_id", "status", "tenant_id", "limit", "before"))
        if isinstance(asked, Refusal):
            return problem(asked)
        status = asked.get("status")
        if status is not None and status not in SCOPE_STATUSES:
            return problem(unknown("status", SCOPE_STATUSES))
        paging = paging_of(asked)
        if isinstance(paging, Refusal):
            return problem(paging)
        limit, before = paging
        wanted = ScopesWanted(
            incident_id=asked.get("incident_id"),
            tenant_id=asked.get("tenant_id"),
            status=cast("ScopeStatus | None", status),
            now=self._store.now(),
        )
        try:
            page = await self._store.engine.scopes_wanted(wanted, before=before, limit=limit)
        except ValueError as exc:
            return problem(wrong("invalid_request", "before", str(exc)))
        return answer({"scopes": [_shown(scope, wanted.now) for scope in page.rows], "next": page.next})

    async def _scope(self, request: web.Request) -> web.Response:
        scope_id = request.match_info["scope_id"]
        scope = await self._store.engine.scope(scope_id)
        if scope is None:
            named = {"scope_id": scope_id[:256]}
            return problem(Refusal("scope_not_found", "No scope has this scope_id.", named))
        executions = await self._store.engine.executions_of(scope_id)
        shown = _shown(scope, self._store.now())
        return answer({**shown, "executions": [execution.to_dict() for execution in executions]})


def _shown(scope: Scope, now: int) -> dict[str, Any]:
    return {**scope.to_dict(now), "tenant_id": scope.tenant_id}
