"""Writes the upstream's answers to the client, and ends the ones that cannot go on.

An answer is written byte for byte; nothing is renamed, re-encoded or added.
"""

from __future__ import annotations

import asyncio
import socket
import struct

from sidecar.core.cache import Cache
from sidecar.core.command import Admitted, Settled
from sidecar.gate import deadlines
from sidecar.gate.messages import Forwarded, GatedRequest
from sidecar.web.data._annotate import annotated
from sidecar.web.serving.accesslog import CLIENT_LEFT
from sidecar.web.serving.datarequest import DataRequest
from sidecar.web.wire.headers import Headers, end_to_end, unframed, without_our_own

_BODILESS = frozenset({204, 304})
_DRAIN_ABOVE = 64 * 1024  # bytes written between two waits for the client to read


class RawAnswer:
    """The backend's answer on its way to the client. Writing raises ConnectionError if the client has gone.

    `content_length` None: the length of the body is not known. With `close`, the connection ends with it.
    """

    __slots__ = ("_chunked", "_connection", "_head", "_request", "_undrained", "ends_with_connection")

    def __init__(
        self,
        request: DataRequest,
        status: int,
        reason: bytes,
        headers: Headers,
        *,
        content_length: int | None,
        close: bool,
    ) -> None:
        self._request, self._connection = request, request.protocol
        self._undrained = 0
        self._chunked = self.ends_with_connection = False
        keep_alive = request.keep_alive and not close
        version = request.version
        lines = [b"HTTP/1.%d %d %b" % (version[1], status, reason)]
        lines += [name + b": " + value for name, value in unframed(status, headers)]
        if content_length is None and not (request.method == "HEAD" or status in _BODILESS or status < 200):
            if version >= (1, 1):
                self._chunked = True
                lines.append(b"Transfer-Encoding: chunked")
            else:
                self.ends_with_connection = True  # the body is delimited by connection close
                keep_alive = False
        if keep_alive and version == (1, 0):
            lines.append(b"Connection: keep-alive")
        elif not keep_alive and version == (1, 1):
            lines.append(b"Connection: close")
        lines.append(b"\r\n")
        request.status, request.keep_alive = status, keep_alive
        # The head waits for the first bytes of the body, so that a small answer is one packet.
        self._head = b"\r\n".join(lines)

    def send_head(self) -> None:
        """Send the head now, before any byte of the body has arrived."""
        self._send(b"")
        self._request.head_sent = True

    async def write(self, piece: bytes) -> None:
        """Send a piece of the body. Waits for a client that reads slowly."""
        self._send(b"%x\r\n%b\r\n" % (len(piece), piece) if self._chunked else piece)
        self._request.sent += len(piece)
        if self._undrained > _DRAIN_ABOVE:
            self._undrained = 0
            await self._connection.drain()

    async def end(self) -> None:
        """End the answer."""
        if self._chunked or self._head:
            self._send(b"0\r\n\r\n" if self._chunked else b"")
        await self._connection.drain()

    def send_whole(self, body: bytes) -> None:
        """Send an answer that is here whole, in one write. `drain` of the connection waits for the client."""
        if self._chunked:
            self._send(b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if body else b"0\r\n\r\n")
        else:
            self._send(body)

    def _send(self, data: bytes) -> None:
        if self._head:
            data, self._head = self._head + data, b""
        self._connection.send(data)
        self._request.answering = True
        self._undrained += len(data)


_AnswerHeaders = tuple[tuple[bytes, bytes], ...]


def _bytes_of(headers: _AnswerHeaders) -> int:
    return sum(len(name) + len(value) for name, value in headers)


def _passed(headers: _AnswerHeaders) -> _AnswerHeaders:
    return tuple(end_to_end(headers))


def _gated(headers: _AnswerHeaders) -> _AnswerHeaders:
    return tuple(pair for pair in without_our_own(end_to_end(headers)) if pair[0].lower() != b"x-request-id")


# Those headers of an answer that go on to the client. Under load they repeat until their Date changes.
PASSED_HEADERS = Cache(_passed, max_entries=64, max_size=2048, size=_bytes_of)
_GATED_HEADERS = Cache(_gated, max_entries=64, max_size=2048, size=_bytes_of)


def client_left(request: DataRequest) -> None:
    """The end of a request whose client left before there was an answer. Nothing of it is sent."""
    request.status, request.keep_alive = CLIENT_LEFT, False


def cut(request: DataRequest, *, ends_with_connection: bool) -> None:
    """End the connection without ending the answer, so that the client sees that it is not whole."""
    request.keep_alive = False
    transport = request.transport
    if transport is None:
        return
    if ends_with_connection:
        # An orderly close would be the end of the body. A TCP reset, or TLS without close_notify, shows the
        # cut. A Unix socket has neither, so an answer delimited by connection close looks whole there.
        raw = transport.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()
    else:
        transport.close()


def broken_off(request: DataRequest) -> None:
    """The end of an answer that cannot go on: its client sees that it is not whole."""
    client_left(request)
    cut(request, ends_with_connection=True)


async def write_forwarded(
    request: DataRequest, gated: GatedRequest, forwarded: Forwarded, *, now: int, draining: bool
) -> None:
    """Write the backend's answer to a gated request, with what the gate says of the scope."""
    head = forwarded.head
    headers, body, length = list(_GATED_HEADERS[head.headers]), forwarded.body, head.content_length
    settings = gated.snapshot.settings
    if settings.gate.annotate_response and forwarded.rest is None:
        headers, body = annotated(forwarded, headers, body, now=now)
        if body is not forwarded.body:
            length = None
    headers += admission_report(forwarded.last, now)
    headers.append((b"X-Request-Id", gated.facts.request_id.encode()))
    request.outcome, request.decision_id = "answered", forwarded.last.execution.decision_id
    if forwarded.answered_at is not None:
        headers.append((b"Idempotency-Replayed", b"true"))
        request.outcome = "replayed"
    if length is None and forwarded.rest is None:
        length = len(body)
        if request.method != "HEAD" and head.status not in _BODILESS:
            headers.append((b"Content-Length", b"%d" % length))
    answer = RawAnswer(
        request,
        head.status,
        head.reason,
        headers,
        content_length=length,
        close=draining or request.protocol.ending,
    )
    rest, patience = forwarded.rest, settings.upstream.response_timeout_seconds
    try:
        if rest is None:
            answer.send_whole(body)
            if request.protocol.writing_paused:
                async with asyncio.timeout(patience):
                    await request.protocol.drain()
            request.head_sent, request.sent = True, len(body)
            return
        async with asyncio.timeout(deadlines.answering_seconds(gated)):
            piece = body
            while piece:
                async with asyncio.timeout(patience):
                    await answer.write(piece)
                piece = await rest.read()
        if rest.cut:
            request.outcome = "unknown"
            cut(request, ends_with_connection=answer.ends_with_connection)
        else:
            await answer.end()
    except (ConnectionError, TimeoutError) as exc:
        if isinstance(exc, TimeoutError) and request.transport is not None:
            request.transport.abort()  # a client that does not read must not hold the connection for ever
        request.keep_alive = False
        if rest is not None:
            request.outcome = "client_left"
            rest.abandon()
    except Exception:
        if rest is not None:
            rest.abandon()
        raise


def admission_report(last: Settled | Admitted, now: int) -> list[tuple[bytes, bytes]]:
    """The headers with which an answer reports the execution and what is left of its scope."""
    headers = [(b"Scopegate-Decision-Id", last.execution.decision_id.encode())]
    if last.scope is not None:
        headers += [
            (b"Scopegate-Scope-Status", last.scope.status(now).encode()),
            (b"Scopegate-Attempts-Remaining", b"%d" % last.scope.attempts_remaining),
        ]
    return headers
