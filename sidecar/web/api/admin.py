"""The admin listener: the calls of operators, and of programs that record decisions."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from aiohttp import web

from sidecar.errors import Refusal
from sidecar.live.snapshot import Live
from sidecar.store.batch import Store
from sidecar.web.api.access import Access
from sidecar.web.api.decisions import DECISIONS, DecisionLists
from sidecar.web.api.docs import DOCUMENTATION, Docs
from sidecar.web.api.emitters import EmitterApi
from sidecar.web.api.executions import EXECUTIONS, ExecutionApi
from sidecar.web.api.explain import EXPLAIN, ExplainApi
from sidecar.web.api.freezes import FREEZES, FreezeApi
from sidecar.web.api.routes import routes
from sidecar.web.api.scopelists import SCOPE_LISTS, ScopeLists
from sidecar.web.api.scopes import SCOPES, ScopeApi
from sidecar.web.api.state import STATE, StateApi
from sidecar.web.serving.hosts import Guard
from sidecar.web.wire.headers import fields_of
from sidecar.web.wire.problem import problem, problems
from sidecar.web.wire.request import request_id_of


class Admin:
    """The application of the admin listener. Its rows say who may make which call."""

    def __init__(
        self,
        *,
        store: Store,
        live: Live,
        scopes: ScopeApi | None,
        executions: ExecutionApi,
        explain: ExplainApi,
        emitters: EmitterApi,
        state: StateApi,
        docs: Docs,
        access: Access,
    ) -> None:
        self._scopes = scopes
        self._access = access
        self._guard = Guard("admin", live)
        self._routes = [
            *routes(DECISIONS, DecisionLists(store), access),
            *routes(SCOPE_LISTS, ScopeLists(store), access),
            *routes(EXECUTIONS, executions, access),
            *routes((EXPLAIN,), explain, access),
            *routes(FREEZES, FreezeApi(store), access),
            *routes(STATE, state, access),
            *emitters.routes(access),
            *routes(DOCUMENTATION, docs, access),
        ]

    def application(self) -> web.Application:
        application = web.Application(middlewares=[problems, self._guarded])
        application.add_routes(self._routes)
        if self._scopes is not None:
            for path in dict.fromkeys(operation.path for operation in SCOPES):
                application.router.add_route("*", path, self._scope_api)
        return application

    @web.middleware
    async def _guarded(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        refusal = self._guard.refusal(request)
        if refusal is None:
            return await handler(request)
        if self._scopes is not None and self._scopes.owns(request.raw_path):
            return await self._scopes.refuse(
                request, request.raw_path, request_id_of(fields_of(request)), refusal
            )
        return problem(refusal)

    async def _scope_api(self, request: web.Request) -> web.StreamResponse:
        assert self._scopes is not None
        request_id = request_id_of(fields_of(request))
        principal = self._access.identify(request)
        if isinstance(principal, Refusal):
            return await self._scopes.refuse(request, request.raw_path, request_id, principal)
        return await self._scopes.handle(request, request.raw_path, request_id, principal)
