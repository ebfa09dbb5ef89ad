"""Turns a refusal into `application/problem+json` (RFC 9457). The table of errors gives the status."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any

from aiohttp import web

from sidecar.core.facts import FactSources, Source
from sidecar.core.shortid import shortened_path
from sidecar.errors import ERRORS, Refusal, StoreUnavailable, unavailable
from sidecar.files.jsonvalue import dumps
from sidecar.gate.messages import Refused
from sidecar.telemetry.events import LogEvent

SERVER = "scopegate"


def problem(
    refusal: Refusal,
    *,
    request_id: str | None = None,
    decision_id: str | None = None,
    retry_after: int | None = None,
    allow: tuple[str, ...] = (),
    route: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> web.Response:
    """The problem of a refusal: RFC 9457's members, `error`, `message`, and the members of its code."""
    kind = ERRORS[refusal.code]
    body = members_of(refusal)
    if route is not None:
        body["route"] = route
    answer_headers = dict(headers or {})
    if decision_id is not None:
        body.setdefault("decision_id", decision_id)
        answer_headers["Scopegate-Decision-Id"] = decision_id
    if request_id is not None:
        answer_headers["X-Request-Id"] = request_id
    if allow:
        answer_headers["Allow"] = ", ".join(allow)
    if kind.status == 401:
        answer_headers["WWW-Authenticate"] = 'Bearer realm="scopegate"'
    if retry_after is None:
        retry_after = refusal.retry_after_seconds
    if kind.status == 503 and retry_after is None:
        retry_after = 1
    if retry_after is not None:
        answer_headers["Retry-After"] = str(retry_after)
    return _response(kind.status, body, "application/problem+json", answer_headers)


def refused_problem(
    refused: Refused, request_id: str | None, *, route: str | None = None, allow: tuple[str, ...] = ()
) -> web.Response:
    """The problem of a refusal that was recorded, if the store allowed it."""
    return problem(
        refused.refusal,
        request_id=request_id,
        decision_id=refused.decision_id,
        retry_after=refused.retry_after,
        route=route,
        allow=allow,
    )


def with_place(refused: Refused, sources: FactSources) -> Refused:
    """The refusal of a request that lacks a fact, with the place from which its route reads that fact."""
    refusal = refused.refusal
    places: tuple[Source, ...]
    if refusal.code == "scoped_execution_required":
        places = (sources.scope_id,)
    elif refusal.code == "invalid_request" and refusal.members.get("member") in ("incident_id", "action"):
        places = (getattr(sources, refusal.members["member"]),)
    elif refusal.code == "target_outside_scope" and not refusal.members["target_agents"]:
        places = sources.target_agents
    else:
        return refused
    told = f"reads it from {' or '.join(map(str, places))}" if places else "reads no target agents"
    return replace(refused, refusal=replace(refusal, message=f"{refusal.message} This route {told}."))


def members_of(refusal: Refusal) -> dict[str, Any]:
    """The members of the problem of a refusal."""
    kind = ERRORS[refusal.code]
    return {
        "error": kind.code,
        "message": refusal.message,
        "type": f"urn:scopegate:error:{kind.code}",
        "title": kind.title,
        "status": kind.status,
        "detail": refusal.message,
        **refusal.members,
    }


def answer(
    body: Mapping[str, Any] | None, *, status: int = 200, request_id: str | None = None
) -> web.Response:
    """A JSON answer of the sidecar."""
    return _response(
        status, body, "application/json", {} if request_id is None else {"X-Request-Id": request_id}
    )


def _response(
    status: int, body: Mapping[str, Any] | None, content_type: str, headers: Mapping[str, str]
) -> web.Response:
    return web.Response(
        status=status,
        body=dumps(body),
        content_type=content_type,
        headers={"Server": SERVER, "Cache-Control": "no-store", **headers},
    )


@web.middleware
async def problems(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """The middleware that turns every error of a listener into a problem."""
    try:
        return await handler(request)
    except StoreUnavailable as exc:
        return problem(unavailable(exc))
    except web.HTTPMethodNotAllowed as exc:
        refusal = Refusal("method_not_allowed", f"{request.method} is not served here.")
        return problem(refusal, allow=tuple(sorted(exc.allowed_methods)))
    except web.HTTPNotFound:
        return problem(Refusal("not_found", "Nothing is served under this path."))
    except web.HTTPException:
        raise
    except Exception as exc:
        LogEvent.REQUEST_FAILED.log(exc=exc, path=shortened_path(request.path))
        return problem(Refusal("internal_error", "The sidecar failed."))
