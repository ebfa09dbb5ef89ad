"""One request and its answer on one connection. Every failure after the first write is `Unanswered`."""

from __future__ import annotations

import asyncio
import math
import select
import ssl
from collections.abc import AsyncIterable
from contextlib import suppress
from functools import partial
from typing import Protocol, cast

from sidecar.eventloop.receiving import limit_reads
from sidecar.eventloop.timers import Deadline, Deadlines
from sidecar.files.tls import describe_failure
from sidecar.upstream._answer import AnswerParser, AnswerState, Failed, TimedOut, Unanswered
from sidecar.upstream._head import AnswerHead

_ONE_WRITE = 64 * 1024  # a longer body is written on its own, because joining it to the head would copy it
_PAUSE_ABOVE = 256 * 1024  # bytes that wait for the caller; `read` takes all of them and resumes reading
_LINGER_SECONDS = 5.0  # time to flush the last bytes of a tunnel after both sides have ended
_COMPLETE, _FAILED = AnswerState.COMPLETE, AnswerState.FAILED  # Python 3.11 looks them up in Python code


class Exchange:
    """One request that was sent, and its answer while it arrives.

    An exchange ends once: its parser is complete, or the exchange has failed. A failed exchange feeds nothing
    more to its parser. The connection returns to the pool once the whole answer has arrived, even if the
    caller is still reading. Leaving the `with` block or calling `abort` before that closes the connection.
    """

    head: AnswerHead
    _failure: Unanswered | None = None
    _sender: asyncio.Task[None] | None = None  # sends a streamed body
    _waiter: asyncio.Future[None] | None = None
    _deadline: Deadline | None = None  # of the head
    _sent_at = -math.inf  # time of the last write of a streamed body
    _write_ended = False

    def __init__(self, connection: UpstreamConnection, parser: AnswerParser) -> None:
        self._connection, self._parser = connection, parser

    def __enter__(self) -> Exchange:
        return self

    def __exit__(self, *_: object) -> None:
        # Without its connection the exchange is complete. An ended tunnel still flushes its last bytes.
        if self._connection.exchange is self and not (self._write_ended and self.complete):
            self.abort()

    async def begin(
        self,
        request: bytes,
        body: bytes | AsyncIterable[bytes] | None,
        promised: int | None,
        head_deadline: float | None,
    ) -> None:
        """Write the request, and return when the head of its answer has arrived.

        `Upstream.send` aborts the exchange if this raises.
        """
        connection, parser = self._connection, self._parser
        if body is None:
            connection.write(request)
        elif not isinstance(body, bytes):
            connection.write(request)
            self._sent_at = connection.loop.time()
            self._sender = connection.loop.create_task(self._stream(body, promised))
        elif len(body) <= _ONE_WRITE:
            connection.write(request + body)
        else:
            connection.write(request)
            connection.write(body)
        if head_deadline is not None:
            self._deadline = connection.deadlines.begin(head_deadline, partial(self._late, head_deadline))
        try:
            while parser.head is None:
                await self._news()
        finally:
            if self._deadline is not None:
                self._deadline.end()
                self._deadline = None  # it refers back to this exchange
        self.head = parser.head

    @property
    def complete(self) -> bool:
        """Whether the answer has arrived to its proper end. A tunnel ends when the upstream ends its side."""
        return self._parser.state is _COMPLETE

    @property
    def upgraded(self) -> bool:
        """Whether the upstream switched protocols (101). Then `read` returns and `write` sends raw bytes."""
        return self._parser.tunnel

    async def read(self) -> bytes:
        """Return the body bytes that have arrived, b"" at the proper end. Safe to cancel and call again."""
        parser, connection = self._parser, self._connection
        while not parser.pieces:
            if parser.complete:
                return b""
            await self._news()
        if connection.paused and connection.exchange is self:
            connection.resume_reading()
        return parser.take()

    async def read_up_to(self, limit: int) -> tuple[bytes, bool]:
        """Return the whole body and True, or the bytes so far and False once they exceed `limit`."""
        parser = self._parser
        if parser.state is _COMPLETE and parser.waiting <= limit:
            return parser.take(), True
        pieces: list[bytes] = []
        size = 0
        while piece := await self.read():
            pieces.append(piece)
            size += len(piece)
            if size > limit:
                return b"".join(pieces), False
        return b"".join(pieces), True

    async def write(self, piece: bytes) -> None:
        """Send raw bytes into the tunnel. Return when there is room for more."""
        self._must_be_open()
        self._connection.write(piece)
        await self._connection.drain()
        self._must_be_open()

    def write_eof(self) -> None:
        """End the client's side of the tunnel. Reading goes on, except over TLS, which ends both sides."""
        self._must_be_open()
        self._write_ended = True
        transport = self._connection.transport
        if transport.can_write_eof():
            with suppress(OSError):  # the upstream has reset the connection; asyncio reports that later
                transport.write_eof()
        else:
            self._parser.end()
            self._wake()
        if self.complete:
            transport.close()
            self._connection.loop.call_later(_LINGER_SECONDS, transport.abort)

    def abort(self) -> None:
        """Give the exchange up. Close the connection at once, unless it has returned to the pool."""
        self._fail(Failed(f"the exchange with {self._connection.where} was given up"))
        if self._connection.exchange is self:  # a tunnel can be complete while its connection is open
            self._connection.transport.abort()

    def _must_be_open(self) -> None:
        if not self.upgraded:
            raise RuntimeError("only a tunnel can be written to")
        if self._connection.transport.is_closing():
            raise self._failure or Failed(f"the tunnel to {self._connection.where} is closed")

    def _news(self) -> asyncio.Future[None]:
        """What ends with the next bytes of the answer, with its end or with its failure."""
        if self._failure is not None:
            raise self._failure
        if self._waiter is not None and not self._waiter.done():
            raise RuntimeError("an exchange has one reader")
        waiter = self._waiter = self._connection.loop.create_future()
        return waiter

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _feed(self, data: bytes) -> None:
        parser = self._parser
        if self._failure is not None or parser.state is _COMPLETE:
            return  # the connection is being closed; an end that arrives now must not return it to the pool
        state = parser.feed(data)
        if state is _COMPLETE:
            self._finish()
        elif state is _FAILED:
            fault = f"malformed answer from {self._connection.where}: {parser.fault}"
            self._fail(Failed(fault), parser.cause)
        elif parser.waiting > _PAUSE_ABOVE:
            self._connection.pause_reading()
        self._wake()

    def _eof(self) -> bool:
        """Handle the end of the upstream's side. Return True to keep the client's side open."""
        parser = self._parser
        # A third party on the network can end a TCP connection but cannot forge TLS's own end, so an answer
        # over TLS must end with `ended_well`. A tunnel need not, because its own protocol marks its end.
        if self._failure is not None or parser.complete:
            return False
        if not parser.until_eof or not (parser.tunnel or self._connection.ended_well()):
            self._fail(Failed(f"connection closed by {self._connection.where} before the end of its answer"))
            return False
        parser.end()
        if not parser.tunnel:
            self._finish()
        self._wake()
        return parser.tunnel and not self._write_ended

    def _finish(self) -> None:
        unsent = self._sender is not None and not self._sender.done()
        if self._sender is not None:
            self._sender.cancel()  # the answer ended before the request was sent whole
        self._connection.release(self._parser.reusable and not unsent)

    def _fail(self, failure: Unanswered, cause: BaseException | None = None) -> None:
        if self._failure is None and not self._parser.complete:
            failure.__cause__ = cause
            self._failure = failure
            self._connection.abort()
            if self._sender is not None:
                self._sender.cancel()
            self._wake()

    def _late(self, seconds: float) -> None:
        """The deadline of the head has passed. Each write of a streamed body extends it."""
        connection = self._connection
        left = self._sent_at + seconds - connection.loop.time()
        if left > 0:
            self._deadline = connection.deadlines.begin(left, partial(self._late, seconds))
        elif self._parser.head is None:
            self._fail(TimedOut(f"no answer from {connection.where} within {seconds:g} s"))

    async def _stream(self, body: AsyncIterable[bytes], promised: int | None) -> None:
        """Send the body while `begin` waits for the answer, which may arrive before the body ends."""
        connection, left = self._connection, promised or 0
        try:
            async for piece in body:
                if not piece:
                    continue  # an empty chunk would end the body
                left -= len(piece)
                if promised is not None and left < 0:
                    raise ValueError("it is longer than its Content-Length")
                if connection.readable():  # read an early answer now, because a failing write would lose it
                    await asyncio.sleep(0)  # in this turn the loop finds the socket readable
                    await asyncio.sleep(0)  # by the end of this turn it has read the socket
                connection.write(b"%x\r\n%b\r\n" % (len(piece), piece) if promised is None else piece)
                await connection.drain()
                self._sent_at = connection.loop.time()
            if promised is None:
                connection.write(b"0\r\n\r\n")
            elif left:
                raise ValueError("it is shorter than its Content-Length")
        except BaseException as exc:
            self._sender = None  # so that `_fail` does not cancel this task
            self._fail(Failed(f"the request body broke off on its way to {connection.where}: {exc!r}"), exc)
            if not isinstance(exc, Exception):
                raise


class Pool(Protocol):
    """The reports that a connection makes to its pool."""

    def lost(self, connection: UpstreamConnection, /) -> None:
        """The connection is closed, and its slot is free."""

    def offer(self, free: UpstreamConnection, /) -> None:
        """The connection can carry another exchange."""


class UpstreamConnection(asyncio.Protocol):
    """One connection. It carries one exchange at a time. Bytes outside an exchange make it close."""

    loop: asyncio.AbstractEventLoop
    transport: asyncio.Transport

    def __init__(self, where: str, deadlines: Deadlines) -> None:
        self.where, self.deadlines = where, deadlines
        self.exchange: Exchange | None = None
        self.pool: Pool | None = None  # set once the connection holds a slot
        self.idle_since = 0.0
        self.lost_by: Exception | None = None
        self.spoiled = False  # bytes or an end arrived outside an exchange
        self.paused = False  # bytes that arrive stay in the socket
        self._tls: ssl.SSLObject | None = None
        self._poll = select.poll()
        self._full = False
        self._room: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.loop = asyncio.get_running_loop()
        self.transport = cast(asyncio.Transport, transport)  # asyncio itself sets TCP_NODELAY
        limit_reads(transport)
        self._tls = transport.get_extra_info("ssl_object")
        self._poll.register(transport.get_extra_info("socket").fileno(), select.POLLIN)

    def data_received(self, data: bytes) -> None:
        exchange = self.exchange
        if exchange is None:
            self.spoiled = True
            self.abort()
        else:
            exchange._feed(data)

    def eof_received(self) -> bool:
        if self.exchange is None:
            self.spoiled = True
            self.abort()
            return False
        return self.exchange._eof() and self._tls is None  # TLS ends both directions at once

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost_by = exc
        self.resume_writing()
        if self.exchange is not None:
            self.exchange._fail(Failed(f"connection to {self.where} lost: {describe_failure(exc)}"), exc)
        if self.pool is not None:
            self.pool.lost(self)

    def pause_reading(self) -> None:
        self.paused = True
        self.transport.pause_reading()

    def resume_reading(self) -> None:
        self.paused = False
        self.transport.resume_reading()

    def pause_writing(self) -> None:
        self._full = True

    def resume_writing(self) -> None:
        self._full = False
        if self._room is not None and not self._room.done():
            self._room.set_result(None)

    def write(self, data: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(data)

    async def drain(self) -> None:
        if self._full:
            if self._room is not None and not self._room.done():
                raise RuntimeError("a connection has one writer")
            self._room = self.loop.create_future()
            await self._room

    def readable(self) -> bool:
        """Whether the socket holds bytes, an end or an error. Costs one system call."""
        return bool(self._poll.poll(0))

    def ended_well(self) -> bool:
        """Whether the end of the connection is the upstream's own. Without TLS it always counts as such."""
        if self._tls is None:
            return True
        try:
            return not self._tls.read(1)
        except ssl.SSLZeroReturnError:
            return True
        except ssl.SSLError:  # TLS wants to read more: its own end has not arrived
            return False

    def fit(self) -> bool:
        """Whether the connection is open and silent. On any other, a request could get a stale answer."""
        return not self.spoiled and not self.transport.is_closing() and not self._poll.poll(0)

    def _unsent(self) -> bool:
        """Whether bytes wait for the upstream to read. Under TLS only the socket knows its own backlog."""
        if self.transport.get_write_buffer_size():
            return True
        if self._tls is None:
            return False
        room = select.poll()
        room.register(self.transport.get_extra_info("socket").fileno(), select.POLLOUT)
        return not room.poll(0)

    def abort(self) -> None:
        """Close the connection at once, over TLS at the end of this turn.

        asyncio's TLS may be in the middle of a call into this connection, and fails if the transport is
        aborted during that call.
        """
        if self._tls is None:
            self.transport.abort()
        else:
            self.loop.call_soon(self.transport.abort)

    def release(self, reusable: bool) -> None:
        self.exchange = None
        if not reusable or self.pool is None or self._unsent():
            self.abort()
        else:
            if self.paused:
                self.resume_reading()
            self.pool.offer(self)
