"""Connections of aiohttp, with a deadline for unfinished request heads. They never quote a request.

Bytes that cannot be parsed may hold secrets, like any other request. Neither the answer nor a log line quotes
them, except for the name of an unknown method. Both describe the fault in the sidecar's own words.

A FIN on a TCP connection means one of two things: the client left, or it only has nothing more to ask
(`shutdown`, as `nc -N` does). The moment of the FIN tells which:

- After a whole request and before its answer, the client waits for the answer. It gets the answer, and then
  the connection closes.
- Within a request, or after an answer has begun, the client left.

asyncio stops reading at a FIN and so does not see a reset that comes later. A half-closed connection is
therefore checked every second while it waits. A client that ends its side, reads everything that came, and
then leaves sends nothing more. TCP keep-alive finds out whether it is still there. TLS ends both directions
at once, so a FIN always means there that the client left.
"""

from __future__ import annotations

import asyncio
import logging
import select
import socket
import sys
from contextlib import suppress
from typing import Any, cast

from aiohttp import http_exceptions as faults
from aiohttp import web
from aiohttp.streams import StreamReader
from aiohttp.web_protocol import RequestHandler

from sidecar.errors import Refusal, ScopegateError
from sidecar.telemetry.events import LogEvent
from sidecar.web.serving._parser import (
    PIPELINED,
    READ_AHEAD_BYTES,
    BrokenBody,
    Overloaded,
    RequestParser,
    TooLong,
    UnknownMethod,
)
from sidecar.web.wire.problem import problem

KEEP_ALIVE_SECONDS = 75.0
LINGERING_SECONDS = 1.0  # time to read the rest of a body that no handler reads
LOOK_SECONDS = 1.0  # between two looks at a client that has ended its side
PROBE_SECONDS = 15  # between two questions of the system whether it is still there; Linux forgets it after 60

# The descriptions that replace aiohttp's messages, which quote the request. The first matching class counts.
FAULTS: tuple[tuple[type[Exception], str], ...] = (
    (faults.LineTooLong, "the request line or a header is too long"),
    (TooLong, "its head, or what surrounds its chunks, is too long"),
    (faults.InvalidHeader, "a header is not one of HTTP/1.1"),
    (UnknownMethod, "its method does not pass here"),
    (Overloaded, "the connections of this listener hold too much memory"),
    (faults.BadHttpMethod, "it does not begin with a method, as TLS to a listener without it does not"),
    (faults.BadStatusLine, "the request line is not one of HTTP/1.1"),
    (faults.InvalidURLError, "the target is not a valid URL"),
    (faults.PayloadEncodingError, "the body is not encoded as its headers say"),
    (faults.BadHttpMessage, "the headers or the chunks of the body break the rules of HTTP/1.1"),
)
UNKNOWN_FAULT = "it cannot be read"


def require_fast_parser() -> None:
    """Raises ScopegateError for aiohttp's pure-Python parser, because it parses some requests differently."""
    from aiohttp import http_parser

    if http_parser.HttpRequestParser is http_parser.HttpRequestParserPy:
        raise ScopegateError(
            "aiohttp runs on its pure-Python HTTP parser; install a wheel of aiohttp with its C extension, "
            "and do not set AIOHTTP_NO_EXTENSIONS"
        )


def refusal_of(exc: BaseException | None) -> Refusal:
    """The refusal of a request that cannot be parsed."""
    if isinstance(exc, Overloaded):
        message = "The connections of this listener hold too much memory at the moment."
        return Refusal("overloaded", message, {"cause": "memory"})
    if isinstance(exc, UnknownMethod):
        return Refusal("invalid_request", f"The method {exc.method} does not pass here, on any path.")
    return Refusal("invalid_request", f"This is not HTTP as it should be: {fault(exc)}.")


def broken_body(body: StreamReader) -> Refusal | None:
    """Why the body of a request cannot be read to its end; None if no fault was found so far."""
    exc = body.exception()
    return exc.refusal if isinstance(exc, BrokenBody) else None


def quoting(exc: BaseException | None) -> BaseException | None:
    """The first exception in the chain of causes whose message may quote the request."""
    while exc is not None:
        if isinstance(exc, faults.HttpProcessingError | web.RequestPayloadError):
            return exc
        exc = exc.__cause__ or exc.__context__
    return None


def fault(exc: BaseException | None) -> str:
    """A description of the fault that does not quote the request."""
    return next((words for kind, words in FAULTS if isinstance(exc, kind)), UNKNOWN_FAULT)


class _NoRequests(logging.Filter):
    """Removes the traceback from a log record if it would quote a request."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and quoting(record.exc_info[1]) is not None:
            record.exc_info = record.exc_text = None
        return True


_no_requests = _NoRequests()


def keep_requests_out_of_logs() -> None:
    """Filter the log lines that aiohttp writes without calling `Connection`. Applies to the whole process."""
    logging.getLogger("aiohttp.server").addFilter(_no_requests)


class Connection(RequestHandler):
    """One connection. It closes if a request head is late, so that slow senders hold no place."""

    def __init__(self, server: web.Server, *, head_seconds: float, **options: Any) -> None:
        ours: dict[str, Any] = {"access_log": None, "keepalive_timeout": KEEP_ALIVE_SECONDS}
        super().__init__(
            server, lingering_time=LINGERING_SECONDS, read_bufsize=READ_AHEAD_BYTES, **ours, **options
        )
        self._requests = RequestParser(self, self._loop, broke=lambda body: None, refusal_of=refusal_of)
        self._parser = cast(Any, self._requests)
        self._max_msg_queue_size, self._msg_queue_resume_size = PIPELINED, PIPELINED // 2
        self._half_closed = False  # the client sends no further request, and waits for its answer
        self._look_timer: asyncio.TimerHandle | None = None
        self._head_seconds = head_seconds
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._messages or self._current_request is not None or self._payload_parser is not None:
            self._stop_watching()
        elif data and self._head_timer is None:
            self._watch_head()

    def eof_received(self) -> bool | None:  # type: ignore[override]  # aiohttp's own always closes
        """The client has ended its side. Return True to keep the sidecar's side open."""
        if self.ssl_context is not None:
            return None
        if self._payload_parser is not None:
            self._payload_parser.feed_eof()  # a tunnel can be half-closed, too
        elif self._waits_for_an_answer():
            self._half_closed = True
        else:
            return None
        assert self.transport is not None
        ask_for_life(self.transport)
        self._look()
        return True

    def connection_lost(self, exc: BaseException | None) -> None:
        self._stop_watching()
        if self._look_timer is not None:
            self._look_timer.cancel()
        super().connection_lost(exc)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The answer that aiohttp gives on its own, mostly to a request that cannot be parsed."""
        if request.writer.output_size > 0:
            raise ConnectionError("an answer is under way already")
        quoted = quoting(exc)
        if status < 500 or quoted is not None:
            LogEvent.UNPARSABLE.log(cause=fault(quoted))
            answer = problem(refusal_of(quoted))
        else:
            LogEvent.REQUEST_FAILED.log(exc=exc)
            answer = problem(Refusal("internal_error", "The sidecar failed."))
        answer.force_close()
        return answer

    def log_exception(self, *args: Any, **options: Any) -> None:
        """Log the other errors of aiohttp, mostly about a body that no handler read."""
        exc = options.get("exc_info")
        quoted = quoting(exc if isinstance(exc, BaseException) else None)
        if quoted is None:
            super().log_exception(*args, **options)
        else:
            LogEvent.UNPARSABLE.log(cause=fault(quoted))

    def log_access(self, request: web.BaseRequest, response: web.StreamResponse, time: float | None) -> None:
        """aiohttp calls this for every answer, its own included, once it ended or broke off."""
        if self._requests.answered():
            # Closing while the client still sends would cause a reset, which can destroy the answer.
            end_side(self.transport)
        if self._half_closed and not self._messages:
            self.close()

    def _waits_for_an_answer(self) -> bool:
        """Whether all requests have arrived whole, at least one is unanswered, and no answer has begun."""
        if self._requests.within_body or not self._request_count or self._close or self._force_close:
            return False
        if self._waiter is not None and not self._waiter.done():
            return False  # aiohttp's loop is idle: every request has its answer
        request = self._current_request
        return request is None or request.writer.output_size == 0

    def _look(self) -> None:
        """Abort a half-closed connection if its client has gone."""
        transport = self.transport
        if transport is None:
            return
        if has_gone(transport):
            transport.abort()
        else:
            self._look_timer = self._loop.call_later(LOOK_SECONDS, self._look)

    def _watch_head(self) -> None:
        self._head_timer = self._loop.call_later(self._head_seconds, self._head_too_late)

    def _stop_watching(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_too_late(self) -> None:
        self._head_timer = None
        if self._current_request is None and not self._messages:
            self.force_close()


def end_side(transport: asyncio.Transport | None) -> bool:
    """End the sidecar's side. Return False over TLS, because that would end both directions."""
    if transport is None or not transport.can_write_eof():
        return False
    with suppress(OSError):  # the client has reset the connection meanwhile; asyncio reports that later
        transport.write_eof()
    return True


def ask_for_life(transport: asyncio.Transport) -> None:
    """Have the system ask whether a client that has ended its side is still there."""
    raw = transport.get_extra_info("socket")
    if sys.platform == "linux" and raw.family != socket.AF_UNIX:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, PROBE_SECONDS)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, PROBE_SECONDS)


def has_gone(transport: asyncio.Transport) -> bool:
    """Whether the client of a half-closed connection has gone. Only Linux shows that without reading."""
    if sys.platform != "linux":
        return False
    poll = select.poll()
    poll.register(transport.get_extra_info("socket").fileno(), 0)  # reports a reset or a full close
    return bool(poll.poll(0))
