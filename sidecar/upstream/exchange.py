"""One request and its answer on one connection. From the first write on, what goes wrong is `Unanswered`."""

from __future__ import annotations

import asyncio
import select
import ssl
from collections.abc import AsyncIterable
from contextlib import suppress
from typing import Protocol, cast

from sidecar.files.tls import told
from sidecar.upstream.answer import AnswerParser, Failed, Head, State, TimedOut, Unanswered

_ONE_WRITE = 64 * 1024  # a longer body is not copied behind its head
_PAUSE_ABOVE = 256 * 1024  # what waits for the caller; a read takes all of it and so resumes
_LINGER_SECONDS = 5.0  # for the last bytes of a tunnel when both sides are through


class Exchange:
    """One request that has gone out, and its answer as it comes in.

    It ends once: either its parser is complete, or it has failed, and then nothing more is fed to the parser.
    Once the answer has arrived whole, the connection returns to the pool by itself, though the caller
    may still be reading. Leaving the `with` block, or `abort`, closes it if that has not happened.
    """

    __slots__ = (
        "_connection",
        "_failure",
        "_parser",
        "_sender",
        "_sent_at",
        "_timer",
        "_waiter",
        "_write_ended",
        "head",
    )

    head: Head

    def __init__(self, connection: Connection, parser: AnswerParser) -> None:
        self._connection, self._parser = connection, parser
        self._failure: Unanswered | None = None
        self._sender: asyncio.Task[None] | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._sent_at = 0.0  # when the last of the request went out so far
        self._write_ended = False

    def __enter__(self) -> Exchange:
        return self

    def __exit__(self, *_: object) -> None:
        if not (self._write_ended and self.complete):  # else the tunnel flushes its last bytes
            self.abort()

    async def begin(
        self,
        request: bytes,
        body: bytes | AsyncIterable[bytes] | None,
        promised: int | None,
        head_deadline: float | None,
    ) -> None:
        """Write the request, and return when the head of its answer is there. See `Upstream.send`, which
        aborts an exchange that does not begin."""
        connection = self._connection
        try:
            if isinstance(body, bytes) and len(body) <= _ONE_WRITE:
                connection.write(request + body)
            else:
                connection.write(request)
                if isinstance(body, bytes):
                    connection.write(body)
                elif body is not None:
                    self._sender = asyncio.get_running_loop().create_task(self._stream(body, promised))
            if head_deadline is not None:
                self._watch(head_deadline)
            await self._answered()
        finally:
            if self._timer is not None:
                self._timer.cancel()

    @property
    def complete(self) -> bool:
        """The answer arrived to its true end; a tunnel: the upstream has said all that it will say."""
        return self._parser.complete

    @property
    def upgraded(self) -> bool:
        """The upstream switched protocols (101): `read` gives raw bytes, and `write` sends them."""
        return self._parser.tunnel

    async def read(self) -> bytes:
        """What has arrived of the body, b"" at its true end. Safe to cancel and call again."""
        parser = self._parser
        while not parser.pieces:
            if parser.complete:
                return b""
            await self._news()
        if self._connection.exchange is self:
            self._connection.transport.resume_reading()
        return parser.take()

    async def read_up_to(self, limit: int) -> tuple[bytes, bool]:
        """The whole body and True, or, once more than `limit` bytes have come, what came and False."""
        pieces: list[bytes] = []
        size = 0
        while piece := await self.read():
            pieces.append(piece)
            size += len(piece)
            if size > limit:
                return b"".join(pieces), False
        return b"".join(pieces), True

    async def write(self, piece: bytes) -> None:
        """Send raw bytes into the tunnel; returns when there is room for more."""
        self._must_be_open()
        self._connection.write(piece)
        await self._connection.drain()
        self._must_be_open()

    def write_eof(self) -> None:
        """Nothing more will be written into the tunnel. Reading goes on, but over TLS, which ends as one."""
        self._must_be_open()
        self._write_ended = True
        transport = self._connection.transport
        if transport.can_write_eof():
            with suppress(OSError):  # the upstream has reset the connection, of which asyncio tells later
                transport.write_eof()
        else:
            self._parser.end()
            self._wake()
        if self.complete:
            transport.close()
            asyncio.get_running_loop().call_later(_LINGER_SECONDS, transport.abort)

    def abort(self) -> None:
        """Give up: unless the answer is complete, close the connection at once."""
        self._fail(Failed(f"the exchange with {self._connection.where} was given up"))
        if self._connection.exchange is self:  # a tunnel is complete and open
            self._connection.transport.abort()

    def _must_be_open(self) -> None:
        if not self.upgraded:
            raise RuntimeError("only a tunnel can be written to")
        if self._connection.transport.is_closing():
            raise self._failure or Failed(f"the tunnel to {self._connection.where} is closed")

    async def _answered(self) -> None:
        while self._parser.head is None:
            await self._news()
        self.head = self._parser.head

    async def _news(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._waiter is not None and not self._waiter.done():
            raise RuntimeError("an exchange has one reader")
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _feed(self, data: bytes) -> None:
        parser = self._parser
        if self._failure is not None or parser.complete:
            return  # it is being closed, and must not come back to the pool by ending now
        state = parser.feed(data)
        if state is State.FAILED:
            fault = f"malformed answer from {self._connection.where}: {parser.fault}"
            self._fail(Failed(fault), parser.cause)
        elif state is State.COMPLETE:
            self._finish()
        elif parser.waiting > _PAUSE_ABOVE:
            self._connection.transport.pause_reading()
        self._wake()

    def _eof(self) -> bool:
        """The upstream ends its side. True keeps ours open."""
        parser = self._parser
        # Whoever is between us could end a connection, but not in the name of TLS. A tunnel's own protocol
        # says where it ends.
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
            self._sender.cancel()  # the answer did not wait for the rest of the request
        self._connection.release(self._parser.reusable and not unsent)

    def _fail(self, failure: Unanswered, cause: BaseException | None = None) -> None:
        if self._failure is None and not self._parser.complete:
            failure.__cause__ = cause
            self._failure = failure
            self._connection.abort()
            if self._sender is not None:
                self._sender.cancel()
            self._wake()

    def _watch(self, seconds: float) -> None:
        """Fail unless the head comes in time. A body that is still on its way puts that off."""
        loop = asyncio.get_running_loop()
        self._sent_at = loop.time()
        self._timer = loop.call_later(seconds, self._late, seconds)

    def _late(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        due = self._sent_at + seconds
        if due > loop.time():
            self._timer = loop.call_at(due, self._late, seconds)
        elif self._parser.head is None:
            self._fail(TimedOut(f"no answer from {self._connection.where} within {seconds:g} s"))

    async def _stream(self, body: AsyncIterable[bytes], promised: int | None) -> None:
        """Send the body while the answer is awaited, which may come before the body's end."""
        connection, left = self._connection, promised or 0
        loop = asyncio.get_running_loop()
        try:
            async for piece in body:
                if not piece:
                    continue  # as a chunk it would end the body
                left -= len(piece)
                if promised is not None and left < 0:
                    raise ValueError("it is longer than its Content-Length")
                if connection.readable():  # take an early answer in before a failing write loses it:
                    await asyncio.sleep(0)  # in this turn the loop finds it readable,
                    await asyncio.sleep(0)  # by the end of this one it has read it
                connection.write(b"%x\r\n%b\r\n" % (len(piece), piece) if promised is None else piece)
                await connection.drain()
                self._sent_at = loop.time()
            if promised is None:
                connection.write(b"0\r\n\r\n")
            elif left:
                raise ValueError("it is shorter than its Content-Length")
        except BaseException as exc:
            self._sender = None  # lest it cancels itself
            self._fail(Failed(f"the request body broke off on its way to {connection.where}: {exc!r}"), exc)
            if not isinstance(exc, Exception):
                raise


class Pool(Protocol):
    """What a connection tells of itself."""

    def lost(self, connection: Connection, /) -> None:
        """It is closed, and its slot is free."""

    def offer(self, free: Connection, /) -> None:
        """It can carry another exchange."""


class Connection(asyncio.Protocol):
    """One connection: it carries one exchange at a time, and nobody speaks on it unasked."""

    transport: asyncio.Transport

    def __init__(self, where: str) -> None:
        self.where = where
        self.exchange: Exchange | None = None
        self.pool: Pool | None = None  # once it holds a slot
        self.idle_since = 0.0
        self.lost_by: Exception | None = None
        self.spoiled = False  # something came on it unasked
        self._tls: ssl.SSLObject | None = None
        self._poll = select.poll()
        self._full = False
        self._room: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # asyncio itself sets TCP_NODELAY
        self._tls = transport.get_extra_info("ssl_object")
        self._poll.register(transport.get_extra_info("socket").fileno(), select.POLLIN)

    def data_received(self, data: bytes) -> None:
        if self.exchange is None:
            self.spoiled = True
            self.abort()
        else:
            self.exchange._feed(data)

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
            self.exchange._fail(Failed(f"connection to {self.where} lost: {told(exc)}"), exc)
        if self.pool is not None:
            self.pool.lost(self)

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
            self._room = asyncio.get_running_loop().create_future()
            await self._room

    def readable(self) -> bool:
        """Bytes, an end or an error lie in the socket. One system call."""
        return bool(self._poll.poll(0))

    def ended_well(self) -> bool:
        """Whether an end that came is the upstream's own; without TLS nobody can tell."""
        if self._tls is None:
            return True
        try:
            return not self._tls.read(1)
        except ssl.SSLZeroReturnError:
            return True
        except ssl.SSLError:  # it still wants to read
            return False

    def fit(self) -> bool:
        """Open and silent. A request begins on no other, lest a stale answer is taken for its own."""
        return not self.spoiled and not self.transport.is_closing() and not self.readable()

    def _unsent(self) -> bool:
        """Whether bytes wait for the upstream to read. What lies beneath TLS only the socket tells."""
        if self._tls is None or self.transport.get_write_buffer_size():
            return self.transport.get_write_buffer_size() > 0
        room = select.poll()
        room.register(self.transport.get_extra_info("socket").fileno(), select.POLLOUT)
        return not room.poll(0)

    def abort(self) -> None:
        """Close it at once. asyncio's TLS, which may be calling us with what came last, fails if it is torn
        down under its feet: it is given to the end of this turn."""
        if self._tls is None:
            self.transport.abort()
        else:
            asyncio.get_running_loop().call_soon(self.transport.abort)

    def release(self, reusable: bool) -> None:
        self.exchange = None
        if not reusable or self.pool is None or self._unsent():
            self.abort()
        else:
            self.transport.resume_reading()
            self.pool.offer(self)
