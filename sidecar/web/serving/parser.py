"""Requests from the bytes of one connection: aiohttp's parser, fed so that it loses none and blends no two.

aiohttp 3.14 parses a packet whole, and four things go wrong where a packet holds more than one part of a
request:

1. A fault behind a head, in the same packet, raises an exception that takes the parsed head with it. The
   request is never judged and leaves no record. A fault in a later packet is told to the connection, but
   not to the request whose body it spoils: that one waits for the rest until its deadline, which then
   blames the backend.
2. The bytes behind an `Upgrade` that is not accepted are dropped, a whole request included.
3. Trailers of a chunked body stay in the parser and become headers of the connection's next request. Behind
   a proxy that shares connections, one client would set the headers of another.
4. Chunk extensions, which carry nothing, may be as long as the client likes, and so may all headers together.

So this parser feeds aiohttp's in pieces that end where a head or a body ends:

- A head ends with an empty line, and so does a chunked body, in its trailers or without. Each piece ends
  there at the latest. An empty line elsewhere only makes a piece shorter.
- The end of a body with a Content-Length is counted.
- A fault inside a body is set on that body. The request gets its answer from its own handler: 400.
- Any other fault becomes an answer of its own, behind those of the requests before it.
- Nothing is parsed behind a fault.
- A chunked body that ends in trailers is followed by a new parser.

A method that the parser does not know is refused, and the refusal names it, since a method is no secret:
only once all of it is there, and only if it is a short token. The request line is never changed to suit the
parser.

All that relies on internals of aiohttp lies in this file and in `server`; tests/gate/test_parser.py fails
where they change.
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
from aiohttp.http_parser import HttpRequestParser, RawRequestMessage
from aiohttp.streams import EMPTY_PAYLOAD, StreamReader
from aiohttp.web_protocol import _ErrInfo

from sidecar.errors import Refusal

MAX_LINE_BYTES = 16 * 1024
MAX_HEADER_BYTES = 32 * 1024
MAX_HEAD_BYTES = 64 * 1024
MAX_HEADERS = 128
# aiohttp stops reading above twice as much of a body that its request has not taken.
READ_AHEAD_BYTES = 64 * 1024
# Requests that may wait behind the one that is answered. Few clients send any before they have their answer.
PIPELINED = 2
# What chunks may carry beside the body: extensions, trailers, sizes. A chunk of one byte needs five more.
MAX_CHUNK_EXTRA_BYTES = 16 * 1024
CHUNK_EXTRA_PER_BYTE = 16

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
    """A head, or what surrounds the chunks of a body, is too long."""


class Overloaded(faults.HttpProcessingError):
    """The connections of a listener hold too much that is not read."""


class BrokenBody(web.RequestPayloadError):
    """The body of a request cannot be read to its end; `refusal` says why, without a byte of it."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


class RequestParser:
    """Stands where `RequestHandler` has its parser, and has those of its methods that are called there.

    `broke` is called with a body that was spoiled, after its reader was told; `refusal_of` makes of a fault
    what its request is answered.
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
        self._fault: faults.HttpProcessingError | None = None  # waits for the rest of a method
        self._due: list[Message] = []  # what `fail` left for the next call
        self.dead = False  # nothing more is parsed
        self._paused = False  # by a body that is not read; aiohttp's parser may keep a rest of the last piece
        self._backlog = b""  # behind a pause, or behind requests that wait
        # The requests that wait, and the one that is answered: the bytes of the head, and the body.
        self._waiting: deque[tuple[int, StreamReader]] = deque()
        self._answered: tuple[int, StreamReader] = 0, EMPTY_PAYLOAD
        self._payload: StreamReader = EMPTY_PAYLOAD  # of the last request
        self._left = 0  # of a body with a Content-Length
        self._chunked = 0  # bytes of a chunked body as they came
        self._head = 0  # bytes of an unfinished head
        self._begin = b""  # of that head
        self._last = b""  # the last bytes of the last piece

    # What aiohttp calls ------------------------------------------------------------------------

    def feed_data(self, data: bytes) -> tuple[list[Message], bool, bytes]:
        """The requests that begin in the data, whether the last one asks for another protocol, and what
        follows it.

        A fault is among them as aiohttp's `_ErrInfo`. Never raises.
        """
        messages, self._due = self._due, []
        if self.dead:
            return messages, False, b""
        data, self._backlog = self._backlog + data if self._backlog else bytes(data), b""
        at = 0
        if self._paused:
            self._paused = False
            self._feed(b"", messages)
        while at < len(data) and not (self._paused or self.dead) and len(self._waiting) < PIPELINED:
            end = self._piece(data, at)
            upgraded, tail = self._feed(data[at:end], messages)
            at = end
            if upgraded:
                return messages, True, tail + data[at:]
        if not self.dead:
            self._backlog = data[at:]
        return messages, False, b""

    def message_consumed(self) -> None:
        """The handler takes the next request."""
        self._answered = self._waiting.popleft() if self._waiting else (0, EMPTY_PAYLOAD)

    def pause_reading(self) -> None:
        """A body has more than its reader takes."""
        self._paused = True
        self._parser.pause_reading()

    def set_upgraded(self, upgraded: bool) -> None:
        """The last request asked for another protocol and did not get it."""
        self._parser.set_upgraded(upgraded)

    # What a connection asks --------------------------------------------------------------------

    @property
    def within_body(self) -> bool:
        """The last request has not come to its end."""
        return not self._payload.is_eof()

    @property
    def held(self) -> int:
        """Bytes that were received and not taken by a handler, and those of the heads in use."""
        held = len(self._backlog) + self._head
        for head, body in (self._answered, *self._waiting):
            held += head if body is EMPTY_PAYLOAD else head + body._size
        return held

    def fail(self, fault: faults.HttpProcessingError) -> None:
        """Parse nothing more, for this reason; without a body to set it on, `feed_data` gives a message."""
        if not self.dead:
            self._failed(fault, self._due)

    def answered(self) -> bool:
        """The request that the handler took has its answer. True: its body was spoiled, and more may come.

        aiohttp reads the rest of a body before it closes, for a while, unless the body raises.
        """
        _, body = self._answered
        self._answered = 0, EMPTY_PAYLOAD
        if not isinstance(body.exception(), BrokenBody):
            return False
        body.set_exception(None)  # type: ignore[arg-type]  # as new
        return True

    # Pieces ------------------------------------------------------------------------------------

    def _new(self) -> Any:
        # Without a queue of its own: requests that wait are counted here.
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
        """Where the piece that begins at `at` ends: at the end of a head or a body, if not before."""
        if self._left:
            return min(len(data), at + self._left)
        before = self._last[-3:]
        found = (before + data[at : at + 3]).find(_END)  # it may have begun in an earlier piece
        if found >= 0:
            return at + found + len(_END) - len(before)
        found = data.find(_END, at)
        return len(data) if found < 0 else found + len(_END)

    def _feed(self, piece: bytes, messages: list[Message]) -> tuple[bool, bytes]:
        if self._fault is not None:
            self._begin += piece[:_FORESEEN]
            self._failed(self._fault, messages)
            return False, b""
        body = self._payload
        in_body, counted = not body.is_eof(), self._left > 0
        if not in_body:
            self._head += len(piece)
            if len(self._begin) < _FORESEEN:
                self._begin = (self._begin + piece[: 2 * _FORESEEN]).lstrip(b"\r\n")
        elif counted:
            self._left -= len(piece)
        else:
            self._chunked += len(piece)
        self._last = b"" if counted else (piece if len(piece) > 5 else self._last + piece)[-6:]
        try:
            found, upgraded, tail = self._parser.feed_data(piece)
        except faults.HttpProcessingError as exc:
            self._failed(exc, messages)
            return False, b""
        for message, payload in found:  # one at most
            self._found(message, payload, messages)
        if in_body and not counted:
            self._check_chunks(body, messages)
        elif self._head > MAX_HEAD_BYTES:
            self._failed(TooLong("the head"), messages)
        return upgraded and not self.dead, tail

    def _found(self, message: RawRequestMessage, payload: StreamReader, messages: list[Message]) -> None:
        if tuple(message.version) not in ((1, 0), (1, 1)):
            return self._failed(faults.BadStatusLine("version"), messages)
        if self._head > MAX_HEAD_BYTES:
            return None  # which `_feed` sees
        head, self._head, self._begin = self._head, 0, b""
        self._payload, self._chunked = payload, 0
        if not payload.is_eof() and not message.chunked:
            self._left = int(message.headers["Content-Length"])
        self._waiting.append((head, payload))
        messages.append((message, payload))
        return None

    def _check_chunks(self, body: StreamReader, messages: list[Message]) -> None:
        if body.is_eof():
            if not self._last.endswith(_NO_TRAILERS):
                self._parser = self._new()
        elif (
            not self._paused  # else the parser has not seen all of it
            and self._chunked > MAX_CHUNK_EXTRA_BYTES + (1 + CHUNK_EXTRA_PER_BYTE) * body.total_bytes
        ):
            self._failed(TooLong("chunks"), messages)

    def _failed(self, fault: faults.HttpProcessingError, messages: list[Message]) -> None:
        body = self._payload
        if self.within_body:
            self.dead, self._backlog = True, b""
            body.set_exception(BrokenBody(self._refusal_of(fault)))
            self._broke(body)
            return
        named = self._named(fault)
        if named is None:
            self._fault = fault
            return
        self.dead, self._backlog = True, b""
        self._waiting.append((0, EMPTY_PAYLOAD))
        messages.append((_ErrInfo(status=400, exc=named, message=""), EMPTY_PAYLOAD))

    def _named(self, fault: faults.HttpProcessingError) -> faults.HttpProcessingError | None:
        """The fault, with the name of the method if that is what is wrong; None while it is not all there."""
        # llhttp knows methods of RTSP, and refuses them once it sees that the request is one of HTTP.
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
