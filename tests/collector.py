"""An OTLP collector: it takes spans over HTTP as protobuf, and keeps them. Told to, it does not answer."""

from __future__ import annotations

import gzip
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

INTERNAL, SERVER, CLIENT = Span.SPAN_KIND_INTERNAL, Span.SPAN_KIND_SERVER, Span.SPAN_KIND_CLIENT


@dataclass(frozen=True)
class Seen:
    """A span as it came, ids in hexadecimal."""

    name: str
    kind: int
    trace_id: str
    span_id: str
    parent_id: str
    state: str
    begin: int
    end: int
    attributes: dict[str, Any]
    failed: bool
    resource: dict[str, Any]


class Collector(ThreadingHTTPServer):
    """`with Collector() as collector:`; `collector.url` is what the sidecar is configured with."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Export)
        self.url = f"http://127.0.0.1:{self.server_port}/v1/traces"
        self.spans: list[Seen] = []
        self.paths: list[str] = []
        self.asked = threading.Event()
        self.go_on = threading.Event()  # cleared, it never answers
        self.go_on.set()
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02})

    def __enter__(self) -> Collector:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.go_on.set()
        self.shutdown()
        self._thread.join()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A sidecar that has gone is no news."""

    def until(self, count: int, seconds: float = 10.0) -> list[Seen]:
        """The spans, once there are so many, in the order in which they began."""
        self.wait(lambda: len(self.spans) >= count, seconds)
        assert len(self.spans) == count, [span.name for span in self.spans]
        return sorted(self.spans, key=lambda span: (span.begin, -span.end))

    def wait(self, holds: Callable[[], bool], seconds: float = 10.0) -> None:
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, f"only these spans came: {[span.name for span in self.spans]}"
            time.sleep(0.02)


class _Export(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.set()
        self.server.go_on.wait(60)
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        self.server.paths.append(self.path)
        request = ExportTraceServiceRequest.FromString(body)
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                self.server.spans += [_seen(span, resource.resource.attributes) for span in scope.spans]
        answer = ExportTraceServiceResponse().SerializeToString()
        self.wfile.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/x-protobuf\r\nContent-Length: %d\r\n\r\n%b"
            % (len(answer), answer)
        )


def _seen(span: Span, resource: Sequence[KeyValue]) -> Seen:
    return Seen(
        name=span.name,
        kind=span.kind,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        state=span.trace_state,
        begin=span.start_time_unix_nano,
        end=span.end_time_unix_nano,
        attributes=_values(span.attributes),
        failed=span.status.code == Status.STATUS_CODE_ERROR,
        resource=_values(resource),
    )


def _values(pairs: Sequence[KeyValue]) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value") or "string_value") for pair in pairs}
