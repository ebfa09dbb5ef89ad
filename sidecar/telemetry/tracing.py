"""The tracing interface of the gate. Only the module `otel` depends on OpenTelemetry.

The base classes `Tracing` and `Trace` trace nothing. Callers pass a trace along with its request explicitly.
A context variable would not do, because the execution runs in a task of its own and can outlive the task of
the request.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

from sidecar.core.facts import Claims

Headers = Sequence[tuple[bytes, bytes]]
Stage = Literal["judge", "commit", "settle"]

_TRACEPARENT = re.compile(
    r"(?P<version>(?!ff)[0-9a-f]{2})-(?P<trace>(?!0{32})[0-9a-f]{32})-(?P<span>(?!0{16})[0-9a-f]{16})"
    r"-[0-9a-f]{2}(?P<more>-.*)?"
)
_NO_IDS: Mapping[str, str] = MappingProxyType({})


class Trace:
    """The trace of one gated request. Times are values of `time.perf_counter`, in seconds."""

    __slots__ = ()

    @property
    def ids(self) -> Mapping[str, str]:
        """`trace_id` and `span_id` for log lines; empty without a trace."""
        return _NO_IDS

    def claimed(self, claims: Claims) -> None:
        """The gate has read the claims of the request."""

    def over(self, stage: Stage, begun: float, outcome: str | None = None) -> None:
        """A stage that started at `begun` ends now."""

    def sent_on(self, headers: Headers) -> Headers:
        """Begin the stage `upstream`. Return the headers with which the backend continues this trace."""
        return headers

    def came_back(self, status: int | None = None, failure: str | None = None) -> None:
        """The stage `upstream` ends: with a status, without an answer, or with an answer that was cut off."""

    def ended(self, status: int | None, outcome: str | None, decision_id: str | None) -> None:
        """The answer has ended or broken off. Stages of an execution that outlives it may still follow."""


NO_TRACE = Trace()


class Tracing:
    """Begins traces."""

    def begin(self, *, method: str, path: str, route: str | None, headers: Headers, begun: float) -> Trace:
        """Begin the trace of a gated request. It continues the client's trace if the headers name one."""
        del method, path, route, headers, begun
        return NO_TRACE

    async def close(self, seconds: float) -> None:
        """Stop tracing, and hand over the remaining spans within this time."""


def trace_ids(traceparent: str | None) -> dict[str, Any]:
    """`trace_id` and `span_id` of a W3C traceparent header; empty if it is absent or not valid."""
    found = _TRACEPARENT.fullmatch(traceparent or "")
    # Only a version above 00 may append fields.
    if found is None or (found["version"] == "00" and found["more"] is not None):
        return {}
    return {"trace_id": found["trace"], "span_id": found["span"]}
