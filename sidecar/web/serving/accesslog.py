"""The access log: one line for each request on the data listener, once its answer has ended or broken off.

A line says where a request went and how it ended. It holds no query, no body and no header except the ids.
The trace of a request ends here, too.
"""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import dataclass
from typing import Literal

import orjson
from aiohttp import web

from sidecar.live.terms import Live
from sidecar.telemetry.events import LogEvent
from sidecar.telemetry.tracing import NO_TRACE, Trace, trace_ids
from sidecar.web.wire.request import MAX_REQUEST_ID_CHARS

MAX_PATH_CHARS = 512
# A target that is not a path begins with a host. So does a target that begins with two slashes.
_AUTHORITY = re.compile(r"(?P<before>(?:[^/?#]*:)?//+|(?!/))(?:[^/?#]*@)?")
# The pattern matches any number of encodings, because a backend that decodes all of them reads a query there.
_QUERY = re.compile(r"[?#]|%(?:25)*(?:3f|23)", re.IGNORECASE)
CLIENT_LEFT = 499  # the status that web servers log for a client that left before an answer began


@dataclass(slots=True, eq=False)
class Visit:
    """One request, with the facts for its log line that are known so far."""

    path: str
    begun: float
    wanted: Literal["all", "gated", "none"]
    request_id: str | None = None
    route: Literal["gated", "scopes", "passed"] = "passed"
    outcome: str | None = None
    decision_id: str | None = None
    scope_id: str | None = None
    trace_id: str | None = None
    head_sent: bool = False
    sent: int = 0  # bytes of the answer's body
    trace: Trace = NO_TRACE
    deadline: asyncio.Timeout | None = None  # the outer deadline of a gated request

    def extend(self, seconds: float | None) -> None:
        """Move the outer deadline to `seconds` from now; None removes it. A passed deadline stays."""
        if self.deadline is not None and not self.deadline.expired():
            loop = asyncio.get_running_loop()
            self.deadline.reschedule(None if seconds is None else loop.time() + seconds)


_VISIT = web.RequestKey("scopegate.visit", Visit)


class AccessLog:
    """Writes the access log. It is called at the beginning and at the end of each request."""

    def __init__(self, live: Live) -> None:
        self._live = live

    def begin(self, request: web.BaseRequest) -> Visit:
        """Start the log entry of a request that has arrived."""
        given = request.headers.get("X-Request-Id")
        visit = Visit(
            path=shown_path(request._message.path),
            begun=time.perf_counter(),
            wanted=self._live.terms.settings.telemetry.access_log,
            request_id=given[:MAX_REQUEST_ID_CHARS] if given else None,
            trace_id=trace_ids(request.headers.get("traceparent")).get("trace_id"),
        )
        request[_VISIT] = visit
        return visit

    def ended(self, request: web.BaseRequest, answer: web.StreamResponse | None) -> None:
        """Log a request whose answer has ended or broken off. None: it was given up without an answer."""
        visit = request.get(_VISIT)
        if visit is None:
            self._unparsed(request, answer)
            return
        if isinstance(answer, web.Response):
            _told(visit, request, answer)
        status = None if answer is None else answer.status
        if request.transport is None and answer is not None and not (visit.head_sent or visit.sent):
            status = CLIENT_LEFT
        visit.trace.ended(status, visit.outcome, visit.decision_id)
        if visit.wanted == "all" or (visit.wanted == "gated" and visit.route != "passed"):
            _write(request, visit, status, method=request.method, path=visit.path, route=visit.route)

    def _unparsed(self, request: web.BaseRequest, answer: web.StreamResponse | None) -> None:
        """Log a request that could not be parsed, unless the log is off: it may have meant any route."""
        visit = Visit(path="", begun=0.0, wanted=self._live.terms.settings.telemetry.access_log)
        if isinstance(answer, web.Response):
            _told(visit, request, answer)
        if visit.wanted != "none":
            status = None if answer is None else answer.status
            _write(request, visit, status, method=None, path=None, route=None)


def visit_of(request: web.BaseRequest) -> Visit:
    """The log entry of a request that is being answered."""
    visit: Visit = request[_VISIT]
    return visit


def names_scope(request: web.BaseRequest, scope_id: str) -> None:
    """Note the scope of a call to a scope endpoint. Does nothing on the admin listener, which has no log."""
    visit = request.get(_VISIT)
    if visit is not None:
        visit.scope_id = scope_id


def shown_path(target: str) -> str:
    """A raw target without its query, fragment and user, which may be secrets, cut to MAX_PATH_CHARS."""
    authority = _AUTHORITY.match(target)
    if authority is not None:
        target = authority["before"] + target[authority.end() :]
    return _QUERY.split(target, maxsplit=1)[0][:MAX_PATH_CHARS]


def _shown_remote(address: str) -> str:
    """The client's address. A socket for IPv4 and IPv6 shows 192.0.2.1 as ::ffff:192.0.2.1."""
    mapped = address.removeprefix("::ffff:")
    return mapped if "." in mapped else address


def _told(visit: Visit, request: web.BaseRequest, answer: web.Response) -> None:
    """Read the facts from an answer of the sidecar: the code from a problem, the ids from the headers."""
    body = answer.body if isinstance(answer.body, bytes) else b""
    if request.transport is not None and request.method != "HEAD":
        visit.sent = len(body)
    visit.request_id = answer.headers.get("X-Request-Id", visit.request_id)
    visit.decision_id = answer.headers.get("Scopegate-Decision-Id", visit.decision_id)
    is_problem = answer.content_type == "application/problem+json"
    visit.outcome = orjson.loads(body)["error"] if is_problem else "answered"


def _write(
    request: web.BaseRequest,
    visit: Visit,
    status: int | None,
    *,
    method: str | None,
    path: str | None,
    route: str | None,
) -> None:
    LogEvent.REQUEST.log(
        method=method,
        path=path,
        status=status,
        duration_ms=round((time.perf_counter() - visit.begun) * 1000, 1) if visit.begun else None,
        bytes=visit.sent,
        remote=_shown_remote(request.remote or "") or None,
        route=route,
        outcome=visit.outcome,
        request_id=visit.request_id,
        decision_id=visit.decision_id,
        scope_id=visit.scope_id,
        trace_id=visit.trace_id,
    )
