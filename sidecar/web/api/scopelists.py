"""Scopes for operators: the scopes of all incidents and tenants. Reading a scope consumes nothing."""

from __future__ import annotations

import re
from typing import cast, get_args

from aiohttp import web

from sidecar.core.scope import ScopeStatus
from sidecar.core.shortid import ABBREVIATION, PREFIX, SHOWN_CHARS
from sidecar.errors import Refusal
from sidecar.store.base import ScopesWanted
from sidecar.store.batch import Store
from sidecar.web.api.operation import (
    AFTER_NUMBER,
    LIMIT,
    SCOPE_ID,
    STORE_ERRORS,
    Answer,
    Operation,
    Parameter,
    choice,
    link,
)
from sidecar.web.api.routes import Query
from sidecar.web.wire import answers
from sidecar.web.wire.models import wrong


class ScopeLists:
    """Handlers of the admin listener for the list of scopes and for one scope."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def list(self, request: web.Request, query: Query) -> answers.ScopePage | Refusal:
        del request
        prefix = query.given.get("scope_id_prefix")
        if prefix is not None and not re.fullmatch(ABBREVIATION, prefix):
            digits = f"at least {SHOWN_CHARS} hexadecimal digits"
            return wrong("invalid_request", "scope_id_prefix", f"must be {PREFIX} and {digits}")
        wanted = ScopesWanted(
            incident_id=query.given.get("incident_id"),
            tenant_id=query.given.get("tenant_id"),
            status=cast("ScopeStatus | None", query.given.get("status")),
            prefix=prefix,
            now=self._store.now(),
        )
        page = await self._store.engine.scopes_wanted(wanted, before=query.before, limit=query.limit)
        return {
            "scopes": [answers.tenant_scope(scope, wanted.now) for scope in page.rows],
            "next": page.next,
        }

    async def one(self, request: web.Request) -> answers.SpentScope | Refusal:
        scope_id = request.match_info["scope_id"]
        scope = await self._store.engine.scope(scope_id)
        if scope is None:
            return Refusal("scope_not_found", "No scope has this scope_id.", {"scope_id": scope_id[:256]})
        executions = await self._store.engine.executions_of(scope_id)
        return {
            **answers.tenant_scope(scope, self._store.now()),
            "executions": [answers.execution(execution) for execution in executions],
        }


SCOPE_LISTS = (
    Operation(
        call="GET /api/v1/scopes",
        name="listAllScopes",
        tag="Scopes",
        summary="List the scopes of all incidents and tenants",
        description="Newest first. Without `incident_id` a page reads only a part of the list. If a status "
        "or tenant is given, it may then be short or empty, and still have a `next`.",
        parameters=(
            choice("incident_id", "Of this incident."),
            choice("status", "With this status now.", get_args(ScopeStatus)),
            choice("tenant_id", "Of this tenant."),
            Parameter(
                "scope_id_prefix",
                "query",
                {"type": "string", "pattern": f"^{ABBREVIATION}$"},
                "Whose scope_id begins so, as logs and tables show it.",
            ),
            LIMIT,
            AFTER_NUMBER,
        ),
        answers=(
            Answer(
                "A page of them.",
                links={"Newest": link("getScope", scope_id="$response.body#/scopes/0/scope_id")},
            ),
        ),
        errors=("invalid_request", *STORE_ERRORS),
        roles=("observer",),
        handler=ScopeLists.list,
    ),
    Operation(
        call="GET /api/v1/scopes/{scope_id}",
        name="getScope",
        tag="Scopes",
        summary="One scope, with its executions",
        parameters=(SCOPE_ID,),
        answers=(Answer("What is left of it, and what it admitted."),),
        errors=("scope_not_found", *STORE_ERRORS),
        roles=("observer",),
        handler=ScopeLists.one,
    ),
)
