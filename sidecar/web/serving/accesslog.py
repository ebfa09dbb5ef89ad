"""The access log: one line for each request on the data listener, once its answer has ended or broken off.

A line says where a request went and how it ended. It holds no query, no body, no header except the ids, and
no whole scope_id. The trace of a request ends here, too.
"""

from __future__ import annotations

import time

import orjson
from aiohttp import web

from sidecar.live.snapshot import Live
from sidecar.telemetry.events import LogEvent
from sidecar.telemetry.tracing import trace_ids
from sidecar.web.serving.datarequest import DataRequest
from sidecar.web.wire.request import MAX_REQUEST_ID_CHARS, AnyRequest

CLIENT_LEFT = 499  # the status that web servers log for a client that left before an answer began


class AccessLog:
    """Writes the access log: a line at the end of each request."""

    def __init__(self, live: Live) -> None:
        self._live = live

    def ended(self, request: DataRequest, answer: web.Response | None) -> None:
        """Log a request that was answered or given up. `answer` is the sidecar's own one, if it got that."""
        if answer is not None:
            _note_answer(request, answer)
        status = request.status
        gone = request.transport is None
        if gone and status is not None and not (request.head_sent or request.sent):
            status = CLIENT_LEFT
        request.trace.ended(status, request.outcome, request.decision_id)
        wanted = request.access_log or self._live.snapshot.settings.telemetry.access_log
        # A request that could not be parsed may have meant any route.
        if wanted == "none" or (wanted == "gated" and request.route == "passed"):
            return
        parsed = request.route is not None
        LogEvent.REQUEST.log_fields(
            {
                "method": request.method if parsed else None,
                "path": request.logged_path if parsed else None,
                "status": status,
                "duration_ms": round((time.perf_counter() - request.begun) * 10_000) / 10 if parsed else None,
                "bytes": request.sent,
                "remote": request.protocol.remote,
                "route": request.route,
                "outcome": request.outcome,
                "request_id": request.request_id or _given_id(request),
                "decision_id": request.decision_id,
                "scope_id": request.scope_id,
                "trace_id": request.trace_id or _given_trace(request),
            }
        )


def names_scope(request: AnyRequest, scope_id: str) -> None:
    """Note the scope of a call to a scope endpoint. Does nothing on the admin listener, which has no log."""
    if isinstance(request, DataRequest):
        request.scope_id = scope_id


def _given_id(request: DataRequest) -> str | None:
    given = request.fields.text(b"x-request-id")
    return given[:MAX_REQUEST_ID_CHARS] if given else None


def _given_trace(request: DataRequest) -> str | None:
    given = request.fields.text(b"traceparent")
    return trace_ids(given).get("trace_id") if given else None


def _note_answer(request: DataRequest, answer: web.Response) -> None:
    """Read the facts from an answer of the sidecar: the code from a problem, the ids from the headers."""
    body = answer.body if isinstance(answer.body, bytes) else b""
    if request.transport is not None and request.method != "HEAD":
        request.sent = len(body)
    request.request_id = answer.headers.get("X-Request-Id", request.request_id)
    request.decision_id = answer.headers.get("Scopegate-Decision-Id", request.decision_id)
    is_problem = answer.content_type == "application/problem+json"
    request.outcome = orjson.loads(body)["error"] if is_problem else "answered"
