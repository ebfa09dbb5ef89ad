"""Nothing is sent twice, and nothing that may have left is ever called unsent.

HTTP/1.1 towards the one upstream: an asyncio Protocol, with llhttp as its parser (httptools). Target,
header names, values and their order go out and come back byte for byte; no redirect is followed and
nothing is retried. The errors say what can be proven: `NotSent` until the one write that begins a
request, `Unanswered` from then on, whatever goes wrong. No TLS, no Unix sockets (another connector in
`Upstream._open` would do), no pipelining; trailers and interim answers are dropped.
"""

from __future__ import annotations

import asyncio
import select
from collections import OrderedDict
from collections.abc import AsyncIterable, Sequence
from dataclasses import dataclass
from typing import cast

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

from sidecar.errors import ScopegateError

_MAX_HEAD = 64 * 1024
_PAUSE_ABOVE = 256 * 1024  # what waits for the caller; a read takes all of it and so resumes
_PIECE = 64  # about what Python itself needs for one piece, so that tiny chunks are not free
_ONE_WRITE = 64 * 1024  # a longer body is not copied behind its head
_LINGER_SECONDS = 5.0  # for the last bytes of a tunnel when both sides are through
_WITH_BODY = (b"POST", b"PUT", b"PATCH")


class NotSent(ScopegateError):
    """No byte of the request left: refused, unreachable, no connection in time, or found closed."""


class Unanswered(ScopegateError):
    """Bytes may have left, and there is no whole answer."""


class TimedOut(Unanswered):
    """The head of the answer did not come before its deadline."""


class Failed(Unanswered):
    """Reset, cut, malformed, or given up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The head of an answer, with the bytes of reason and headers as they came."""

    status: int
    reason: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    version: tuple[int, int]


class _AnswerParser:
    """Bytes in, one answer out; no I/O. The `on_` methods are those that httptools calls."""

    __slots__ = (
        "_barren", "_bodyless", "_fault", "_headers", "_http", "_may_upgrade", "_reason",
        "complete", "head", "pieces", "reusable", "tunnel", "until_eof", "waiting",
    )  # fmt: skip

    def __init__(self, bodyless: bool, may_upgrade: bool) -> None:
        self.head: Head | None = None
        self.pieces: list[bytes] = []
        self.waiting = 0  # what the pieces weigh
        self.complete = self.tunnel = False
        self.reusable = False  # the connection can carry another exchange
        self.until_eof = False  # the end of the connection is the true end of the body
        self._bodyless, self._may_upgrade = bodyless, may_upgrade
        self._reason = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._fault = ""
        self._barren = 0  # bytes since the last that brought something
        self._http = HttpResponseParser(self)

    def feed(self, data: bytes) -> None:
        """Take in what arrived. HttpParserError: it is no answer that can be trusted."""
        if self.tunnel:
            return self._keep(data)
        before = self.waiting
        try:
            self._http.feed_data(data)
        except HttpParserUpgrade as exc:
            self._switch(data[exc.args[0] :])
        except HttpParserError:
            if not self.complete:
                raise
            self.reusable = False  # this answer is whole; what came behind it is not one
        # Heads (interim ones, too), trailers and chunk extensions without end are bounded here.
        self._barren = self._barren + len(data) if self.waiting == before else 0
        if self._barren > _MAX_HEAD and not self.complete:
            self._fault = f"more than {_MAX_HEAD} bytes of head or trailers"
        if self._fault:
            raise HttpParserError(self._fault)
        if self.complete:
            del self._http  # it refers back to us: else each exchange would wait for the cycle collector
        return None

    def take(self) -> bytes:
        taken = self.pieces[0] if len(self.pieces) == 1 else b"".join(self.pieces)
        self.pieces.clear()
        self.waiting = 0
        return taken

    def on_message_begin(self) -> None:
        if self.complete:
            self.reusable = False

    def on_status(self, reason: bytes) -> None:
        self._reason += reason  # in parts, if packets split it

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.head is None:  # else it is a trailer
            self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        if self.head is not None:
            return  # a second answer, behind a complete one
        status, version = self._http.get_status_code(), self._http.get_http_version()
        if status < 100 or version not in ("1.0", "1.1"):
            self._fault = f"HTTP version {version}, status {status}"
        if status < 200 and status != 101:
            self._reason, self._headers = b"", []
            return
        bodyless = self._bodyless or status in (101, 204, 304)
        size, framed = 0, False
        for name, value in self._headers:
            length = len(name)
            size += length + len(value) + 4
            if length == 14 and name.lower() == b"content-length":
                framed = True
            elif length == 17 and name.lower() == b"transfer-encoding" and not bodyless:
                # Another coding nobody behind us could undo, for this header goes no further.
                if framed or value.strip().lower() != b"chunked":
                    self._fault = f"transfer coding {value!r}"
                framed = True
        if size > _MAX_HEAD:
            self._fault = f"more than {_MAX_HEAD} bytes of head"
        self.until_eof = not framed and not bodyless
        self.reusable = version == "1.1" and self._http.should_keep_alive()
        self.head = Head(
            status=status, reason=self._reason, headers=tuple(self._headers), version=(1, int(version[2]))
        )
        # llhttp cannot be told that this answers a HEAD, and would wait for a body.
        self.complete = self._bodyless and status != 101

    def on_body(self, body: bytes) -> None:
        if self.complete:
            self.reusable = False
        elif self.head is None:
            self._fault = "an interim answer with a body"
        else:
            self._keep(body)

    def on_message_complete(self) -> None:
        if self.head is not None and self.head.status != 101:
            self.complete = True

    def _keep(self, piece: bytes) -> None:
        self.pieces.append(piece)
        self.waiting += len(piece) + _PIECE

    def _switch(self, rest: bytes) -> None:
        if not self._may_upgrade:
            self._fault = "it switches protocols unasked"
        self.tunnel = self.until_eof = True
        del self._http
        if rest:
            self._keep(rest)


class Exchange:
    """One request that has gone out, and its answer as it comes in.

    Once the answer has arrived whole, the connection returns to the pool by itself, though the caller
    may still be reading. Leaving the `with` block, or `abort`, closes it if that has not happened.
    """

    __slots__ = (
        "_connection", "_failure", "_parser", "_sender", "_sent_at", "_timer", "_waiter", "_write_ended",
        "head",
    )  # fmt: skip

    head: Head

    def __init__(self, connection: _Connection, parser: _AnswerParser) -> None:
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

    async def write(self, piece: bytes) -> None:
        """Send raw bytes into the tunnel; returns when there is room for more."""
        self._must_be_open()
        self._connection.write(piece)
        await self._connection.drain()
        self._must_be_open()

    def write_eof(self) -> None:
        """Nothing more will be written into the tunnel. Reading goes on."""
        self._must_be_open()
        self._write_ended = True
        transport = self._connection.transport
        transport.write_eof()
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
        try:
            parser.feed(data)
        except HttpParserError as exc:
            return self._fail(Failed(f"malformed answer from {self._connection.where}: {exc}"), exc)
        if parser.complete:
            self._finish()
        elif parser.waiting > _PAUSE_ABOVE:
            self._connection.transport.pause_reading()
        return self._wake()

    def _eof(self) -> bool:
        """The upstream ends its side. True keeps ours open."""
        parser = self._parser
        if not parser.until_eof:
            self._fail(Failed(f"connection closed by {self._connection.where} before the end of its answer"))
            return False
        parser.complete = True
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
            self._connection.transport.abort()
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


class _Connection(asyncio.Protocol):
    """One connection: it carries one exchange at a time, and nobody speaks on it unasked."""

    transport: asyncio.Transport

    def __init__(self, where: str) -> None:
        self.where = where
        self.exchange: Exchange | None = None
        self.pool: Upstream | None = None  # once it holds a slot
        self.idle_since = 0.0
        self._poll = select.poll()
        self._full = False
        self._room: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # asyncio itself sets TCP_NODELAY
        self._poll.register(transport.get_extra_info("socket").fileno(), select.POLLIN)

    def data_received(self, data: bytes) -> None:
        if self.exchange is None:
            self.transport.abort()
        else:
            self.exchange._feed(data)

    def eof_received(self) -> bool:
        return self.exchange is not None and self.exchange._eof()

    def connection_lost(self, exc: Exception | None) -> None:
        self.resume_writing()
        if self.exchange is not None:
            self.exchange._fail(Failed(f"connection to {self.where} lost: {exc or 'closed'}"), exc)
        if self.pool is not None:
            self.pool._lost(self)

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

    def fit(self) -> bool:
        """Open and silent. A request begins on no other, lest a stale answer is taken for its own."""
        return not self.transport.is_closing() and not self.readable()

    def release(self, reusable: bool) -> None:
        self.exchange = None
        if not reusable or self.pool is None or self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            self.transport.resume_reading()
            self.pool._offer(self)


class Upstream:
    """The upstream and the connections to it. Whoever waits longest for one gets the next.

    A slot is a connection, or the right to open one; a connection holds its slot until it is lost.
    """

    def __init__(
        self, host: str, port: int, *, connect_timeout: float, reuse_idle_seconds: float, max_connections: int
    ) -> None:
        self._host, self._port = host, port
        self._where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._connect_timeout, self._reuse_idle_seconds = connect_timeout, reuse_idle_seconds
        self._max_connections = max_connections
        self._closed = False
        self._connections: set[_Connection] = set()
        self._opening = 0
        self._idle: OrderedDict[_Connection, None] = OrderedDict()  # longest idle first
        self._waiters: OrderedDict[asyncio.Future[_Connection | None], None] = OrderedDict()

    @property
    def in_use(self) -> int:
        """Connections that carry an exchange, are being opened, or are just being closed."""
        return len(self._connections) + self._opening - len(self._idle)

    @property
    def idle(self) -> int:
        return len(self._idle)

    async def send(
        self,
        method: bytes | str,
        target: bytes,
        headers: Sequence[tuple[bytes, bytes]],
        body: bytes | AsyncIterable[bytes] | None,
        *,
        chunked: bool = False,
        head_deadline: float | None = None,
    ) -> Exchange:
        """Send one request; return with the head of its answer. Cancelled, it closes the connection.

        `headers` are end-to-end ones and go out as they are; framing is added here. `head_deadline`
        is in seconds, from the last write of the request to the head. Raises ValueError (nothing sent,
        the caller's fault), NotSent, Unanswered.
        """
        method = method.encode("ascii") if isinstance(method, str) else method
        request, promised, may_upgrade = _request_head(method, target, headers, body, chunked)
        connection = self._pooled() or await self._obtain()
        # Nothing is awaited from here to the write: up to it the request provably has not left.
        exchange = Exchange(connection, _AnswerParser(method == b"HEAD", may_upgrade))
        connection.exchange = exchange
        loop = asyncio.get_running_loop()
        try:
            if isinstance(body, bytes) and len(body) <= _ONE_WRITE:
                connection.write(request + body)
            else:
                connection.write(request)
                if isinstance(body, bytes):
                    connection.write(body)
                elif body is not None:
                    exchange._sender = loop.create_task(exchange._stream(body, promised))
            if head_deadline is not None:
                exchange._watch(head_deadline)
            await exchange._answered()
        except BaseException:
            exchange.abort()
            raise
        finally:
            if exchange._timer is not None:
                exchange._timer.cancel()
        return exchange

    async def close(self) -> None:
        """Close every connection: what is under way fails, what waits is not sent."""
        self._closed = True
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_exception(NotSent(f"the client of {self._where} is closed"))
        for connection in tuple(self._connections):
            if connection.exchange is not None:
                connection.exchange.abort()
            connection.transport.abort()
        await asyncio.sleep(0)  # in which the loop tells each of its loss

    async def _open(self) -> _Connection:
        """The one place that knows TCP."""
        loop = asyncio.get_running_loop()
        return (await loop.create_connection(lambda: _Connection(self._where), self._host, self._port))[1]

    def _pooled(self) -> _Connection | None:
        idle = self._idle
        if idle:
            stale = asyncio.get_running_loop().time() - self._reuse_idle_seconds
            while idle and (oldest := next(iter(idle))).idle_since <= stale:
                del idle[oldest]
                oldest.transport.abort()
        while idle:
            connection, _ = idle.popitem()  # the warmest
            if connection.fit():
                return connection
            connection.transport.abort()
        return None

    async def _obtain(self) -> _Connection:
        if self._closed:
            raise NotSent(f"the client of {self._where} is closed")
        late = f"no free connection to {self._where} within {self._connect_timeout:g} s"
        try:
            async with asyncio.timeout(self._connect_timeout):
                while len(self._connections) + self._opening >= self._max_connections:
                    connection = await self._turn()
                    if connection is None:
                        break
                    if connection.fit():
                        return connection
                    connection.transport.abort()  # it died on its way to us
                else:
                    self._opening += 1
                late = f"no connection to {self._where} within {self._connect_timeout:g} s"
                return await self._dial()
        except TimeoutError as exc:
            raise NotSent(late) from exc

    async def _turn(self) -> _Connection | None:
        """Wait in line for a connection, or for None: the right, counted as opening, to open one."""
        waiter: asyncio.Future[_Connection | None] = asyncio.get_running_loop().create_future()
        self._waiters[waiter] = None
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self._offer(waiter.result())  # it came in the moment of giving up: to the next
            raise
        finally:
            self._waiters.pop(waiter, None)

    async def _dial(self) -> _Connection:
        """Open a connection in a slot that is counted as opening."""
        opened = False
        try:
            connection = await self._open()
            if self._closed or not connection.fit():
                connection.transport.abort()
                raise NotSent(f"connection closed by {self._where} before anything was sent")
            opened = True
        except ConnectionRefusedError as exc:
            raise NotSent(f"connection refused by {self._where}") from exc
        except (OSError, UnicodeError) as exc:  # UnicodeError: a host name that IDNA cannot encode
            raise NotSent(f"cannot connect to {self._where}: {exc}") from exc
        finally:
            if not opened:
                self._offer(None)
        self._opening -= 1
        self._connections.add(connection)
        connection.pool = self
        return connection

    def _offer(self, free: _Connection | None) -> None:
        """A free connection, or None for a slot counted as opening, goes to whoever waits longest."""
        while self._waiters:
            waiter, _ = self._waiters.popitem(last=False)
            if not waiter.done():
                return waiter.set_result(free)
        if free is None:
            self._opening -= 1
        elif self._closed or not self._reuse_idle_seconds:
            free.transport.abort()
        else:
            free.idle_since = asyncio.get_running_loop().time()
            self._idle[free] = None
        return None

    def _lost(self, connection: _Connection) -> None:
        self._connections.discard(connection)
        self._idle.pop(connection, None)
        self._opening += 1
        self._offer(None)


def _request_head(
    method: bytes,
    target: bytes,
    headers: Sequence[tuple[bytes, bytes]],
    body: bytes | AsyncIterable[bytes] | None,
    chunked: bool,
) -> tuple[bytes, int | None, bool]:
    """The head as it goes out, the length that it promises, and whether it asks for an upgrade."""
    if not method or not target or b" " in method or b" " in target:
        raise ValueError(f"not a method and a target: {method!r} {target!r}")
    lines = [method + b" " + target + b" HTTP/1.1"]
    promised, may_upgrade = None, False
    for name, value in headers:
        lines.append(name + b": " + value)
        length = len(name)
        if length == 14 and name.lower() == b"content-length":
            if promised is not None or not value.isdigit():
                raise ValueError(f"not one Content-Length: {value!r}")
            promised = int(value)
        elif length == 17 and name.lower() == b"transfer-encoding":
            raise ValueError("the framing is decided here, not by a Transfer-Encoding header")
        elif length == 7 and name.lower() == b"upgrade":
            may_upgrade = True
    if body is None or isinstance(body, bytes):
        size = len(body or b"")
        if chunked or (promised is not None and promised != size):
            raise ValueError(f"a body of {size} bytes cannot go out under this framing")
        if promised is None and body is not None and (body or method in _WITH_BODY):
            lines.append(b"Content-Length: %d" % size)
    elif chunked == (promised is not None):
        raise ValueError("a streamed body needs either a Content-Length or to be chunked")
    elif chunked:
        lines.append(b"Transfer-Encoding: chunked")
    head = b"\r\n".join(lines)
    breaks = len(lines) - 1
    if head.count(b"\n") != breaks or head.count(b"\r") != breaks or b"\0" in head:
        raise ValueError("CR, LF or NUL in a request head")
    return head + b"\r\n\r\n", promised, may_upgrade
