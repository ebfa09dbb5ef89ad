"""Writes the upstream's answers to the client, and ends the ones that cannot go on.

An answer is written byte for byte; nothing is renamed or re-encoded. aiohttp's own responses add Date, Server
and Content-Type, and drop header bytes that are not UTF-8. `RawAnswer` therefore writes its head itself. It
relies on two internals of aiohttp 3.14: `StreamResponse._start` and the header buffer of `StreamWriter`.
Tests in tests/gate fail if they change.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import cast

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http_writer import StreamWriter

from sidecar.core.command import Admitted, Settled
from sidecar.gate import deadlines
from sidecar.gate.messages import Forwarded, GatedRequest
from sidecar.web.data._annotate import annotated
from sidecar.web.serving.accesslog import CLIENT_LEFT, visit_of
from sidecar.web.serving.connections import DataConnection
from sidecar.web.wire.headers import Headers, end_to_end, unframed, value_of, without_our_own

_BODILESS = frozenset({204, 304})


class RawAnswer(web.StreamResponse):
    """An answer whose head is given as bytes. `content_length` None: the length of the body is not known."""

    def __init__(
        self, status: int, reason: bytes, headers: Headers, *, content_length: int | None, close: bool = False
    ) -> None:
        super().__init__(status=status)
        self._raw_reason = reason
        self._raw_headers = unframed(status, headers)
        self._raw_length = content_length
        self._close_after = close
        self.ends_with_connection = False  # the body is delimited by connection close

    async def _start(self, request: web.BaseRequest) -> AbstractStreamWriter:
        self._req = request
        writer = self._payload_writer = request._payload_writer
        stream = cast(StreamWriter, writer)
        keep_alive = request.keep_alive and not self._close_after
        version = request.version
        lines = [b"HTTP/%d.%d %d %b" % (version[0], version[1], self.status, self._raw_reason)]
        lines += [b"%b: %b" % header for header in self._raw_headers]
        if not (request.method == "HEAD" or self.status in _BODILESS or self.status < 200):
            if self._raw_length is not None:
                stream.length = self._raw_length
            elif version >= (1, 1):
                stream.enable_chunking()
                lines.append(b"Transfer-Encoding: chunked")
            else:
                self.ends_with_connection = True
                keep_alive = False
        if keep_alive and version == (1, 0):
            lines.append(b"Connection: keep-alive")
        elif not keep_alive and version == (1, 1):
            lines.append(b"Connection: close")
        self._keep_alive = keep_alive
        # The head stays in the writer's buffer, so that a small body leaves in the same packet.
        stream._headers_buf = b"\r\n".join(lines) + b"\r\n\r\n"
        stream._headers_written = False
        return writer

    def send_head(self) -> None:
        """Send the head now, before any byte of the body has arrived."""
        if self._payload_writer is not None:
            self._payload_writer.send_headers()

    def mark_ended(self) -> None:
        """Write nothing more, because a tunnel took the connection over, or because it is being cut."""
        self._eof_sent = True
        self._keep_alive = False


def declared_length(headers: Headers) -> int | None:
    """The Content-Length of an answer, None if it has none."""
    value = value_of(headers, b"content-length")
    return int(value) if value is not None and value.isdigit() else None


def client_left() -> RawAnswer:
    """The end of a request whose client left before there was an answer. Nothing of it is sent."""
    answer = RawAnswer(CLIENT_LEFT, b"", (), content_length=None)
    answer.mark_ended()
    return answer


def broken_off(request: web.BaseRequest) -> RawAnswer:
    """The end of an answer that cannot go on: its client sees that it is not whole."""
    answer = client_left()
    answer.ends_with_connection = True
    cut(request, answer)
    return answer


def cut(request: web.BaseRequest, answer: RawAnswer) -> None:
    """End the connection without ending the answer, so that the client sees that it is not whole."""
    answer.mark_ended()
    transport = request.transport
    if transport is None:
        return
    if answer.ends_with_connection:
        # An orderly close would be the end of the body. A TCP reset, or TLS without close_notify, shows the
        # cut. A Unix socket has neither, so an answer delimited by connection close looks whole there.
        raw = transport.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()
    else:
        transport.close()


async def write_forwarded(
    request: web.BaseRequest, gated: GatedRequest, forwarded: Forwarded, *, now: int, draining: bool
) -> web.StreamResponse:
    """Write the backend's answer to a gated request, with what the gate says of the scope."""
    head = forwarded.head
    headers = without_our_own(end_to_end(head.headers))
    headers = [(name, value) for name, value in headers if name.lower() != b"x-request-id"]
    body = forwarded.body
    settings = gated.snapshot.settings
    if settings.gate.annotate_response and forwarded.rest is None:
        headers, body = annotated(forwarded, headers, body, now=now)
    headers += admission_report(forwarded.last, now)
    headers.append((b"X-Request-Id", gated.facts.request_id.encode()))
    length = declared_length(headers)
    if length is None and forwarded.rest is None:
        length = len(body)
        if request.method != "HEAD" and head.status not in (204, 304):
            headers.append((b"Content-Length", b"%d" % length))
    answer = RawAnswer(
        head.status,
        head.reason,
        headers,
        content_length=length,
        close=draining or cast(DataConnection, request.protocol).ending,
    )
    rest, patience = forwarded.rest, settings.upstream.response_timeout_seconds
    visit = visit_of(request)
    visit.outcome, visit.decision_id = "answered", forwarded.last.execution.decision_id
    try:
        await answer.prepare(request)
        if rest is None:
            async with asyncio.timeout(patience):
                await answer.write_eof(body)
            visit.head_sent, visit.sent = True, len(body)
            return answer
        async with asyncio.timeout(deadlines.answering_seconds(gated)):
            piece = body
            while piece:
                async with asyncio.timeout(patience):
                    await answer.write(piece)
                visit.sent += len(piece)
                piece = await rest.read()
        if rest.cut:
            visit.outcome = "unknown"
            cut(request, answer)
        else:
            await answer.write_eof()
    except (ConnectionError, TimeoutError) as exc:
        if isinstance(exc, TimeoutError) and request.transport is not None:
            request.transport.abort()  # a client that does not read must not hold the connection for ever
        answer.mark_ended()
        if rest is not None:
            visit.outcome = "client_left"
            rest.abandon()
    except Exception:
        if rest is not None:
            rest.abandon()
        raise
    return answer


def admission_report(last: Settled | Admitted, now: int) -> list[tuple[bytes, bytes]]:
    """The headers with which an answer reports the execution and what is left of its scope."""
    headers = [(b"Scopegate-Decision-Id", last.execution.decision_id.encode())]
    if last.scope is not None:
        headers += [
            (b"Scopegate-Scope-Status", last.scope.status(now).encode()),
            (b"Scopegate-Attempts-Remaining", b"%d" % last.scope.attempts_remaining),
        ]
    return headers
