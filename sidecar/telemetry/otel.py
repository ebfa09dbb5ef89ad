"""Traces through OpenTelemetry. Imported only if `telemetry.otlp_endpoint` is set. Needs the `[otel]` extra.

A thread sends the spans in batches. A collector that is down, slow or silent costs spans and nothing else.
The sidecar uses a tracer provider of its own and leaves the global one of the program unchanged.
"""

from __future__ import annotations

import asyncio
import logging
import re
import threading
import time
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar
from urllib.parse import urlsplit

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import (
    Span,
    SpanKind,
    StatusCode,
    Tracer,
    format_span_id,
    format_trace_id,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from sidecar import __version__
from sidecar.core.facts import Claims
from sidecar.core.shortid import short_id
from sidecar.errors import ScopegateError
from sidecar.telemetry.events import LogEvent
from sidecar.telemetry.tracing import NO_TRACE, Headers, Stage, Trace, Tracing

POLL_SECONDS = 0.02
COMPLAIN_EVERY_SECONDS = 60.0
TRACES_PATH = "/v1/traces"

_W3C = TraceContextTextMapPropagator()
_PROPAGATED = (b"traceparent", b"tracestate")
_QUERY = re.compile(r"\?\S+")  # the query of the collector's URL, which may hold a key

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S")


def _or_else(
    untraced: Callable[Concatenate[Any, P], R],
) -> Callable[[Callable[Concatenate[S, P], R]], Callable[Concatenate[S, P], R]]:
    """Wrap a tracing method so that an exception in it is logged, and `untraced` is called instead.

    An error in the SDK or in one of its plug-ins therefore costs a span and never an execution.
    """

    def guard(traced: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
        @wraps(traced)
        def guarded(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return traced(self, *args, **kwargs)
            except Exception as exc:
                _COMPLAINTS.complain(repr(exc))
                return untraced(self, *args, **kwargs)

        return guarded

    return guard


class OtelTracing(Tracing):
    """Sends spans to a collector by OTLP over HTTP. The OTEL_* environment variables apply to it."""

    def __init__(self, endpoint: str) -> None:
        """Raises ScopegateError if the OTEL_* variables hold values that cannot work."""
        _hear_complaints()
        named = OTELResourceDetector().detect().attributes.get("service.name", "scopegate")
        try:
            self._provider = TracerProvider(
                resource=Resource.create({"service.name": named, "service.version": __version__}),
                shutdown_on_exit=False,
            )
            url = urlsplit(endpoint)
            if not url.path.strip("/"):
                url = url._replace(path=TRACES_PATH)
            self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url.geturl())))
        except (ValueError, OSError) as exc:
            raise ScopegateError(
                f"telemetry.otlp_endpoint: tracing cannot start ({exc}); correct the OTEL_* variables"
            ) from exc
        self._tracer = self._provider.get_tracer("scopegate", __version__)

    @_or_else(Tracing.begin)
    def begin(self, *, method: str, path: str, route: str | None, headers: Headers, begun: float) -> Trace:
        span_name = f"{method} {route}" if route else method
        offset = time.time_ns() - time.perf_counter_ns()
        attributes = {"http.request.method": method, "url.path": _text(path)}
        if route:
            attributes["http.route"] = _text(route)
        span = self._tracer.start_span(
            _text(span_name),
            context=_W3C.extract(_given(headers), Context()),
            kind=SpanKind.SERVER,
            attributes=attributes,
            start_time=offset + int(begun * 1e9),
        )
        if not span.get_span_context().is_valid:  # OTEL_SDK_DISABLED
            return NO_TRACE
        return _OtelTrace(self._tracer, span, offset)

    async def close(self, seconds: float) -> None:
        # A thread of its own, because the SDK's shutdown blocks, and can wait much longer for its exporter.
        closing = threading.Thread(target=self._shut_down, name="scopegate-spans", daemon=True)
        until = time.monotonic() + seconds
        closing.start()
        while closing.is_alive() and time.monotonic() < until:
            await asyncio.sleep(POLL_SECONDS)
        if closing.is_alive():
            LogEvent.SPANS_LOST.log()

    @_or_else(lambda _: None)
    def _shut_down(self) -> None:
        self._provider.shutdown()


class _OtelTrace(Trace):
    """One request, as a span of kind server. If the sampler drops it, only that decision is propagated."""

    __slots__ = ("_ids", "_inside", "_offset", "_recorded", "_server", "_tracer", "_upstream")

    def __init__(self, tracer: Tracer, server: Span, offset: int) -> None:
        self._tracer = tracer
        self._server = server
        self._recorded = server.is_recording()  # read once, because an execution may outlive its server span
        self._inside = set_span_in_context(server, Context())
        # Converts perf_counter to the time of day. All spans use the same offset, so that a change of the
        # wall clock misplaces none of them.
        self._offset = offset
        self._upstream: Span | None = None
        context = server.get_span_context()
        self._ids = {
            "trace_id": format_trace_id(context.trace_id),
            "span_id": format_span_id(context.span_id),
        }

    @property
    def ids(self) -> Mapping[str, str]:
        return self._ids

    @_or_else(Trace.claimed)
    def claimed(self, claims: Claims) -> None:
        if self._recorded:
            for name in ("scope_id", "incident_id", "action"):
                value = getattr(claims, name)
                if value is not None:
                    value = short_id(value) if name == "scope_id" else value
                    self._server.set_attribute(f"scopegate.{name}", _text(value))

    @_or_else(Trace.over)
    def over(self, stage: Stage, begun: float, outcome: str | None = None) -> None:
        if self._recorded:
            span = self._tracer.start_span(stage, context=self._inside, start_time=self._at(begun))
            if outcome is not None:
                span.set_attribute("scopegate.outcome", outcome)
            span.end(self._now())

    @_or_else(Trace.sent_on)
    def sent_on(self, headers: Headers) -> Headers:
        inside = self._inside
        if self._recorded:
            self._upstream = self._tracer.start_span(
                "upstream", context=inside, kind=SpanKind.CLIENT, start_time=self._now()
            )
            inside = set_span_in_context(self._upstream, Context())
        carrier: dict[str, str] = {}
        _W3C.inject(carrier, inside)
        kept = [(name, value) for name, value in headers if name.lower() not in _PROPAGATED]
        return [*kept, *((name.encode(), value.encode()) for name, value in carrier.items())]

    @_or_else(Trace.came_back)
    def came_back(self, status: int | None = None, failure: str | None = None) -> None:
        if self._upstream is not None:
            _close(self._upstream, status, failure, self._now())

    @_or_else(Trace.ended)
    def ended(self, status: int | None, outcome: str | None, decision_id: str | None) -> None:
        if not self._recorded:
            return
        if outcome is not None:
            self._server.set_attribute("scopegate.outcome", outcome)
        if decision_id is not None:
            self._server.set_attribute("scopegate.decision_id", decision_id)
        failed = outcome == "unknown" or (status or 0) >= 500
        _close(self._server, status, outcome if failed and outcome != "answered" else None, self._now())

    def _at(self, moment: float) -> int:
        return self._offset + int(moment * 1e9)

    def _now(self) -> int:
        return self._offset + time.perf_counter_ns()


def _close(span: Span, status: int | None, failure: str | None, now: int) -> None:
    """End a span. A 5xx status and a `failure` mark it as an error; a refusal below 500 does not."""
    if status is not None:
        span.set_attribute("http.response.status_code", status)
    if failure is None and status is not None and status >= 500:
        failure = str(status)
    if failure is not None:
        span.set_attribute("error.type", failure)
        span.set_status(StatusCode.ERROR)
    span.end(now)


def _given(headers: Headers) -> dict[str, list[str]]:
    """The client's trace headers; empty unless exactly one is a traceparent (W3C Trace Context, 3.2)."""
    given: dict[str, list[str]] = {}
    for name, value in headers:
        lower = name.lower()
        if lower in _PROPAGATED:
            given.setdefault(lower.decode(), []).append(value.decode("latin-1"))
    return given if len(given.get("traceparent", ())) == 1 else {}


def _text(value: str) -> str:
    """The value in a form that protobuf can hold, because one lone surrogate would lose the whole batch."""
    return value.encode("utf-8", "backslashreplace").decode()


class _Complaints(logging.Handler):
    """Turns errors and warnings of the SDK into log lines of the sidecar, at most one a minute."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.silent_until = float("-inf")

    def emit(self, record: logging.LogRecord) -> None:
        # This logger quotes the headers for the collector, which may hold a token.
        hidden = record.name == "opentelemetry.util.re"
        self.complain(str(record.msg).replace("%s", "***") if hidden else record.getMessage())

    def complain(self, cause: str) -> None:
        if time.monotonic() >= self.silent_until:
            self.silent_until = time.monotonic() + COMPLAIN_EVERY_SECONDS
            LogEvent.TRACING_FAILED.log(cause=_QUERY.sub("?***", cause))


_COMPLAINTS = _Complaints()


def _hear_complaints() -> None:
    _COMPLAINTS.silent_until = float("-inf")
    sdk = logging.getLogger("opentelemetry")
    sdk.handlers[:] = [_COMPLAINTS]
    sdk.propagate = False
    # This logger quotes headers of clients, and so would let clients write into the log.
    logging.getLogger("opentelemetry.trace").setLevel(logging.CRITICAL)
