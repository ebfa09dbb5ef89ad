"""What the gate tells of a request to whoever traces it. Only otel knows OpenTelemetry.

`Tracing` and `Trace` themselves are the ones that trace nothing. A trace goes with its request by hand, never
by context: the execution runs in a task of its own and outlives the one that asked for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Literal

from sidecar.core.facts import Claims

Headers = Sequence[tuple[bytes, bytes]]
Stage = Literal["judge", "commit", "settle"]

_NO_IDS: Mapping[str, str] = MappingProxyType({})


class Trace:
    """One gated request. Times are those of `time.perf_counter`."""

    __slots__ = ()

    @property
    def ids(self) -> Mapping[str, str]:
        """`trace_id` and `span_id` for log lines; empty where there is no trace."""
        return _NO_IDS

    def claimed(self, claims: Claims) -> None:
        """What the request says that it wants."""

    def over(self, stage: Stage, begun: float, outcome: str | None = None) -> None:
        """A stage ended just now."""

    def sent_on(self, headers: Headers) -> Headers:
        """The headers that let the backend go on with this trace. The stage `upstream` begins."""
        return headers

    def came_back(self, status: int | None = None, failure: str | None = None) -> None:
        """The stage `upstream` ended: with a status, without an answer, or with one that was cut."""

    def ended(self, status: int | None, outcome: str | None, decision_id: str | None) -> None:
        """The answer ended or broke off. The stages of an execution that outlives it may still come."""


NO_TRACE = Trace()


class Tracing:
    """Begins traces."""

    def begin(self, *, method: str, path: str, route: str | None, headers: Headers, begun: float) -> Trace:
        """The trace of a gated request: the client's, where its headers name one, or a new one."""
        del method, path, route, headers, begun
        return NO_TRACE

    async def close(self, seconds: float) -> None:
        """Hand over what is left, within this time. Nothing is traced any more."""
