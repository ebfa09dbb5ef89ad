"""From rows to routes: reads the query by its row, calls the handler, and responds with its result."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from sidecar.errors import Refusal
from sidecar.gate.messages import Refused
from sidecar.store.lists import UnknownCursor
from sidecar.web.api.access import Access
from sidecar.web.api.operation import Operation, Reply
from sidecar.web.serving.body import read_document
from sidecar.web.wire.models import Model, validated, wrong
from sidecar.web.wire.problem import answer, problem, refused_problem
from sidecar.web.wire.request import paging_of, since_of, unknown


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """The query of a call: `limit`, `before` and `since` of a list, and the other parameters that were given.

    `since` is in microseconds since 1970."""

    limit: int
    before: str | None
    since: int | None
    given: dict[str, str]


def routes(
    operations: Iterable[Operation], owner: object, access: Access | None = None
) -> list[web.RouteDef]:
    """The routes of rows, whose handlers are methods of `owner`. `access` says who may make the calls; None:
    every caller may."""
    return [
        # `web.get` serves HEAD, too.
        web.get(operation.path, _served(operation, owner, access))
        if operation.method == "GET"
        else web.route(operation.method, operation.path, _served(operation, owner, access))
        for operation in operations
    ]


def _served(
    operation: Operation, owner: object, access: Access | None
) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    handler = operation.handler
    assert handler is not None

    async def serve(request: web.Request) -> web.StreamResponse:
        refused = None if access is None else await access.check(request, operation)
        if refused is not None:
            return refused
        if not operation.query:
            return response(await handler(owner, request))
        query = read_query(operation, request)
        if isinstance(query, Refusal):
            return problem(query)
        try:
            return response(await handler(owner, request, query))
        except UnknownCursor as exc:
            return problem(wrong("invalid_request", "before", str(exc)))

    return serve


def response(result: Any, *, request_id: str | None = None) -> web.Response:
    """The response for what a handler returned: itself, a refusal, or a model."""
    if isinstance(result, web.Response):
        return result
    if isinstance(result, Refusal):
        return problem(result, request_id=request_id)
    if isinstance(result, Refused):
        return refused_problem(result, request_id)
    if not isinstance(result, Reply):
        return answer(result, request_id=request_id)
    replied = answer(result.body, status=result.status, request_id=request_id)
    if result.decision_id is not None:
        replied.headers["Scopegate-Decision-Id"] = result.decision_id
    return replied


def read_query(operation: Operation, request: web.Request) -> Query | Refusal:
    """The query of a request by the parameters of its row.

    An unknown parameter is refused, because ignoring a misspelt filter would show the wrong rows.
    """
    known = {parameter.name: parameter for parameter in operation.query}
    for name in request.query:
        if name not in known:
            return wrong("invalid_request", name, f"is not known here; known are {', '.join(known)}")
        if len(request.query.getall(name)) > 1:
            return wrong("invalid_request", name, "is given more than once")
    given = dict(request.query)
    for name, value in given.items():
        values = known[name].schema.get("enum", [value])
        if value not in values:
            return unknown(name, values)
    paging, since = paging_of(given), since_of(given)
    if isinstance(paging, Refusal):
        return paging
    if isinstance(since, Refusal):
        return since
    limit, before = paging
    return Query(
        limit=limit,
        before=before,
        since=since,
        given={name: value for name, value in given.items() if name not in ("limit", "before", "since")},
    )


async def read_model(
    request: web.Request, model: type[Model], code: str = "invalid_request"
) -> Model | Refusal:
    """The body of a call to the admin listener, or why it cannot be used; `code` says that of a member."""
    body = await read_document(request)
    return body if isinstance(body, Refusal) else validated(model, body, code)
