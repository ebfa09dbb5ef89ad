"""The pool of connections, and the one place where a request begins. Until then it is `NotSent`."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterable, Sequence

from sidecar.upstream.answer import AnswerParser, NotSent
from sidecar.upstream.exchange import Connection, Exchange

_WITH_BODY = (b"POST", b"PUT", b"PATCH")


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
        self._connections: set[Connection] = set()
        self._opening = 0
        self._idle: OrderedDict[Connection, None] = OrderedDict()  # longest idle first
        self._waiters: OrderedDict[asyncio.Future[Connection | None], None] = OrderedDict()

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
        request, promised, may_upgrade = request_head(method, target, headers, body, chunked)
        connection = self._pooled() or await self._obtain()
        # Nothing is awaited from here to the write: up to it the request provably has not left.
        exchange = connection.exchange = Exchange(connection, AnswerParser(method == b"HEAD", may_upgrade))
        await exchange.begin(request, body, promised, head_deadline)
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

    async def _open(self) -> Connection:
        """The one place that knows TCP."""
        loop = asyncio.get_running_loop()
        return (await loop.create_connection(lambda: Connection(self._where), self._host, self._port))[1]

    def _pooled(self) -> Connection | None:
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

    async def _obtain(self) -> Connection:
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

    async def _turn(self) -> Connection | None:
        """Wait in line for a connection, or for None: the right, counted as opening, to open one."""
        waiter: asyncio.Future[Connection | None] = asyncio.get_running_loop().create_future()
        self._waiters[waiter] = None
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self.offer(waiter.result())  # it came in the moment of giving up: to the next
            raise
        finally:
            self._waiters.pop(waiter, None)

    async def _dial(self) -> Connection:
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
                self.offer(None)
        self._opening -= 1
        self._connections.add(connection)
        connection.pool = self
        return connection

    def offer(self, free: Connection | None) -> None:
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

    def lost(self, connection: Connection) -> None:
        self._connections.discard(connection)
        self._idle.pop(connection, None)
        self._opening += 1
        self.offer(None)


def request_head(
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
