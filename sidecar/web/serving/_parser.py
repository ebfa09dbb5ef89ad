"""Parses the requests of one connection. It feeds aiohttp's parser so that no request is lost or mixed up.

aiohttp 3.14 parses a packet whole. Four things go wrong if a packet holds more than one part of a request:

1. A fault behind a head, in the same packet, raises an exception, and the parsed head is lost with it. The
   request is never judged and leaves no record. A fault in a later packet reaches the connection, but not the
   request whose body it breaks. That request waits for the rest of its body until its deadline, which then
   blames the backend.
2. The bytes behind an `Upgrade` that is not accepted are dropped, a whole request included.
3. Trailers of a chunked body stay in the parser and become headers of the connection's next request. Behind
   a proxy that shares connections, one client would set the headers of another.
4. The length of chunk extensions, which carry no data, is not limited. Neither is the length of all headers
   together.

This parser therefore feeds aiohttp's parser in pieces that end where a head or a body ends:

- A head ends with an empty line, and so does a chunked body, with or without trailers. Each piece ends there
  at the latest. An empty line elsewhere only makes a piece shorter.
- This parser counts the bytes of a body with a Content-Length to find its end.
- A fault inside a body is set on that body. The request gets a 400 from its own handler.
- Any other fault gets an answer of its own, behind the answers to the requests before it.
- This parser parses nothing behind a fault.
- After a chunked body that ends in trailers, it uses a new aiohttp parser.

A method that the parser does not know is refused. The refusal names the method, because a method is no
secret, but only once the whole method has arrived, and only if it is a short token. The request line is never
changed to suit the parser.

This file, `connections` and `dataconnection` rely on internals of aiohttp's parser and its connections.
tests/gate/test_parser.py fails if they change.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import Callable
from typing import Any

from aiohttp import http_exceptions as faults
from aiohttp import web
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http import HttpVersion10, HttpVersion11
from aiohttp.http_parser import HttpRequestParser, RawRequestMessage
from aiohttp.streams import EMPTY_PAYLOAD, StreamReader
from aiohttp.web_protocol import _ErrInfo

from sidecar.errors import Refusal

MAX_LINE_BYTES = 16 * 1024
MAX_HEADER_BYTES = 32 * 1024
MAX_HEAD_BYTES = 64 * 1024
MAX_HEADERS = 128
# aiohttp stops reading once a request has left twice as many bytes of its body untaken.
READ_AHEAD_BYTES = 64 * 1024
# Requests that may wait behind the one being answered. Few clients send a request before the last answer.
PIPELINED = 2
# The limit for chunk bytes beside the body: sizes, extensions, trailers. A chunk of one byte needs five more.
MAX_CHUNK_EXTRA_BYTES = 16 * 1024
CHUNK_EXTRA_PER_BYTE = 16

_VERSIONS = (HttpVersion11, HttpVersion10)
_END = b"\r\n\r\n"
_NO_TRAILERS = b"\n0\r\n\r\n"
_TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]*")  # RFC 9110, section 5.6.2
MAX_METHOD_CHARS = 32
_FORESEEN = MAX_METHOD_CHARS + 1

Message = tuple[RawRequestMessage | _ErrInfo, StreamReader]


class UnknownMethod(faults.BadHttpMethod):
    """A method that the parser does not know. `method` is its name."""

    def __init__(self, method: str) -> None:
        super().__init__(f"unknown method {method}")
        self.method = method


class TooLong(faults.BadHttpMessage):
    """A head, or the framing around the chunks of a body, is too long."""


class Overloaded(faults.HttpProcessingError):
    """The connections of a listener hold too many bytes that no request has taken."""


class BrokenBody(web.RequestPayloadError):
    """The body of a request cannot be read to its end. `refusal` says why, without quoting it."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


class RequestParser:
    """The parser of a connection. It also has the methods that aiohttp's own connections call.

    The parser calls `broke` with a broken body, after it has set the exception on that body. `refusal_of`
    translates a fault into the refusal that answers the request.
    """

    def __init__(
        self,
        protocol: BaseProtocol,
        loop: asyncio.AbstractEventLoop,
        *,
        broke: Callable[[StreamReader], None],
        refusal_of: Callable[[Exception], Refusal],
    ) -> None:
        self._protocol, self._loop = protocol, loop
        self._broke, self._refusal_of = broke, refusal_of
        self._parser = self._new()
        self._fault: faults.HttpProcessingError | None = None  # a fault that waits for the rest of a method
        self._due: list[Message] = []  # messages from `fail` for the next call of `feed_data`
        self.dead = False  # nothing more is parsed
        # A body that is not read pauses parsing. aiohttp's parser may then keep a rest of the last piece.
        self.paused = False
        self.backlog = b""  # unparsed bytes behind a pause, or behind requests that wait
        # The size of the head and the body, for each request that waits and for the one being answered.
        self._waiting: deque[tuple[int, StreamReader]] = deque()
        self._answered: tuple[int, StreamReader] = 0, EMPTY_PAYLOAD
        self._payload: StreamReader = EMPTY_PAYLOAD  # body of the last request
        self._left = 0  # bytes that remain of a body with a Content-Length
        self._chunked = 0  # bytes of a chunked body, with its framing
        self._head = 0  # bytes of an unfinished head
        self._begin = b""  # the first bytes of that head
        self._last = b""  # the last bytes of the last piece

    # What connections call ---------------------------------------------------------------------

    def feed_data(self, data: bytes) -> tuple[list[Message], bool, bytes]:
        """Return the requests that begin in the data, whether the last one asks for another protocol, and the
        bytes behind it.

        A fault is one of the requests, as aiohttp's `_ErrInfo`. Never raises.
        """
        messages, self._due = self._due, []
        if self.dead:
            return messages, False, b""
        if self.backlog:
            data, self.backlog = self.backlog + data, b""
        at, size = 0, len(data)
        if self.paused:
            self.paused = False
            self._feed(b"", messages)
        while at < size and not (self.paused or self.dead) and len(self._waiting) < PIPELINED:
            end = at + self._left if self._left else self._piece(data, at)
            upgraded, tail = self._feed(data[at:end], messages)
            at = end
            if upgraded:
                return messages, True, tail + data[at:]
        if at < size and not self.dead:
            self.backlog = data[at:]
        return messages, False, b""

    def message_consumed(self) -> None:
        """The handler takes the next request."""
        self._answered = self._waiting.popleft() if self._waiting else (0, EMPTY_PAYLOAD)

    def pause_reading(self) -> None:
        """Pause, because a body has more bytes than its reader takes."""
        self.paused = True
        self._parser.pause_reading()

    def set_upgraded(self, upgraded: bool) -> None:
        """The last request asked for another protocol. aiohttp calls this with False if it did not get it."""
        self._parser.set_upgraded(upgraded)

    # What a connection asks --------------------------------------------------------------------

    @property
    def within_body(self) -> bool:
        """Whether the body of the last request is unfinished."""
        return not self._payload.is_eof()

    @property
    def held(self) -> int:
        """The number of bytes that no handler has taken, plus the bytes of the heads in use."""
        held = len(self.backlog) + self._head
        for head, body in (self._answered, *self._waiting):
            held += head if body is EMPTY_PAYLOAD else head + body._size
        return held

    def fail(self, fault: faults.HttpProcessingError) -> None:
        """Stop parsing because of `fault`. Without an open body, the next `feed_data` returns the fault."""
        if not self.dead:
            self._failed(fault, self._due)

    def answered(self) -> bool:
        """The request that the handler took has its answer. Return whether its body was broken.

        The rest of a broken body may still arrive.

        The exception is removed from the body, because aiohttp reads the rest of a body for a while before it
        closes, unless the body raises.
        """
        _, body = self._answered
        self._answered = 0, EMPTY_PAYLOAD
        if not isinstance(body.exception(), BrokenBody):
            return False
        body.set_exception(None)  # type: ignore[arg-type]  # removes it
        return True

    # Pieces ------------------------------------------------------------------------------------

    def _new(self) -> Any:
        # The parser gets no limit for its own queue, because this class counts the requests that wait.
        return HttpRequestParser(
            self._protocol,
            self._loop,
            READ_AHEAD_BYTES,
            max_line_size=MAX_LINE_BYTES,
            max_field_size=MAX_HEADER_BYTES,
            max_headers=MAX_HEADERS,
            payload_exception=web.RequestPayloadError,
            auto_decompress=False,
        )

    def _piece(self, data: bytes, at: int) -> int:
        """The end of the piece that begins at `at`: at the latest, the end of a head or a chunked body."""
        if self._last:
            before = self._last[-3:]  # the empty line may have begun in an earlier piece
            found = (before + data[at : at + 3]).find(_END)
            if found >= 0:
                return at + found + len(_END) - len(before)
        found = data.find(_END, at)
        return len(data) if found < 0 else found + len(_END)

    def _feed(self, piece: bytes, messages: list[Message]) -> tuple[bool, bytes]:
        if self._fault is not None:
            self._begin += piece[:_FORESEEN]
            self._failed(self._fault, messages)
            return False, b""
        body, counted = self._payload, self._left > 0
        in_head = body.is_eof()
        if in_head:
            self._head += len(piece)
        elif counted:
            self._left -= len(piece)
        else:
            self._chunked += len(piece)
            self._keep_last(piece)
        try:
            found, upgraded, tail = self._parser.feed_data(piece)
            for message, payload in found:  # at most one
                self._found(message, payload, messages)
            if self._head:
                if self._head > MAX_HEAD_BYTES:
                    raise TooLong("the head")
                self._keep_begin(piece)
                self._keep_last(piece)
            elif not (in_head or counted):
                self._check_chunks(body)
        except faults.HttpProcessingError as exc:
            if in_head:
                self._keep_begin(piece)
            self._failed(exc, messages)
            return False, b""
        return upgraded, tail

    def _found(self, message: RawRequestMessage, payload: StreamReader, messages: list[Message]) -> None:
        if message.version not in _VERSIONS:
            raise faults.BadStatusLine("version")
        if self._head > MAX_HEAD_BYTES:
            return  # `_feed` refuses it
        self._waiting.append((self._head, payload))
        messages.append((message, payload))
        self._payload, self._head, self._begin, self._last = payload, 0, b"", b""
        if not payload.is_eof():
            if message.chunked:
                self._chunked, self._last = 0, _END
            else:
                self._left = int(message.headers["Content-Length"])

    def _keep_begin(self, piece: bytes) -> None:
        if len(self._begin) < _FORESEEN:
            self._begin = (self._begin + piece[: 2 * _FORESEEN]).lstrip(b"\r\n")

    def _keep_last(self, piece: bytes) -> None:
        self._last = (piece if len(piece) > 5 else self._last + piece)[-6:]

    def _check_chunks(self, body: StreamReader) -> None:
        if body.is_eof():
            if not self._last.endswith(_NO_TRAILERS):
                self._parser = self._new()
            self._last = b""
        elif (
            not self.paused  # while paused, the parser has not seen all of the body
            and self._chunked > MAX_CHUNK_EXTRA_BYTES + (1 + CHUNK_EXTRA_PER_BYTE) * body.total_bytes
        ):
            raise TooLong("chunks")

    def _failed(self, fault: faults.HttpProcessingError, messages: list[Message]) -> None:
        body = self._payload
        if self.within_body:
            self.dead, self.backlog = True, b""
            body.set_exception(BrokenBody(self._refusal_of(fault)))
            self._broke(body)
            return
        named = self._named(fault)
        if named is None:
            self._fault = fault
            return
        self.dead, self.backlog = True, b""
        self._waiting.append((0, EMPTY_PAYLOAD))
        messages.append((_ErrInfo(status=400, exc=named, message=""), EMPTY_PAYLOAD))

    def _named(self, fault: faults.HttpProcessingError) -> faults.HttpProcessingError | None:
        """The fault, with the method's name if the method is unknown; None until the method has arrived."""
        # llhttp knows the methods of RTSP, and refuses them once it sees that the request is HTTP.
        foreign = isinstance(fault, faults.BadStatusLine) and "Invalid method" in fault.message[:80]
        if not (foreign or isinstance(fault, faults.BadHttpMethod)):
            return fault
        token = _TOKEN.match(self._begin)
        method = token[0] if token else b""
        if len(method) == len(self._begin) <= MAX_METHOD_CHARS:
            return None
        if not method or len(method) > MAX_METHOD_CHARS or self._begin[len(method) : len(method) + 1] != b" ":
            return fault
        return UnknownMethod(method.decode("ascii"))
