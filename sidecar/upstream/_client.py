"""The connection pool and `Upstream.send`, the one place where a request begins.

A failure before `send` writes the request raises `NotSent`.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from sidecar.eventloop.timers import Deadlines
from sidecar.files.tls import Credentials, describe_failure
from sidecar.settings.addresses import Address, SocketFile
from sidecar.upstream._answer import AnswerParser, NotSent
from sidecar.upstream._exchange import Exchange, UpstreamConnection
from sidecar.upstream._head import FRAMING, FRAMING_SIZES

_SPACE = ord(" ")
_WITH_BODY = (b"POST", b"PUT", b"PATCH")
_STEP_SECONDS = 0.001
_VERDICT_SECONDS = 0.1
_TURNS_TO_LOSE = 3  # turns until the loop has called `connection_lost`; over TLS it does so in the last one


@dataclass(frozen=True, slots=True, kw_only=True)
class UpstreamTls:
    """TLS settings for the upstream: the credentials, and the name that its certificate must have."""

    credentials: Credentials
    server_name: str


class Upstream:
    """The upstream and its connection pool. A free connection goes to the caller that has waited longest.

    A slot is a connection or the right to open one. A connection holds its slot until it is lost.
    """

    def __init__(
        self,
        address: Address,
        *,
        secured: UpstreamTls | None = None,
        connect_timeout: float,
        reuse_idle_seconds: float,
        max_connections: int,
    ) -> None:
        self._address, self._secured = address, secured
        self._where = str(address)
        self._connect_timeout, self._reuse_idle_seconds = connect_timeout, reuse_idle_seconds
        self._max_connections = max_connections
        self._closed = False
        self._connections: set[UpstreamConnection] = set()
        self._opening = 0
        self._deadlines = Deadlines()
        self._idle: deque[UpstreamConnection] = deque()  # the longest idle one first
        self._waiters: OrderedDict[asyncio.Future[UpstreamConnection | None], None] = OrderedDict()

    @property
    def in_use(self) -> int:
        """The number of connections that carry an exchange, are being opened or are being closed."""
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
        """Send one request, and return once the head of its answer has arrived.

        `send` sends `headers`, which are end-to-end ones, unchanged, and adds the framing. `head_deadline` is
        in seconds, from the last write of the request to the head. Cancelling `send` closes the connection.
        Raises NotSent, Unanswered, and ValueError for a request that the caller built wrongly. A ValueError
        means that nothing was sent.
        """
        method = method.encode("ascii") if isinstance(method, str) else method
        request, promised, offer = request_head(method, target, headers, body, chunked)
        connection = self._pooled() or await self._obtain()
        # There is no await from here to the write, so that the request provably has not been sent before it.
        exchange = connection.exchange = Exchange(connection, AnswerParser(method == b"HEAD", offer))
        try:
            await exchange.begin(request, body, promised, head_deadline)
        except BaseException:
            exchange.abort()
            raise
        return exchange

    async def close(self) -> None:
        """Close every connection. Running exchanges fail, and waiting requests raise `NotSent`."""
        self._closed = True
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_exception(NotSent(f"the client of {self._where} is closed"))
        for connection in tuple(self._connections):
            if connection.exchange is not None:
                connection.exchange.abort()
            connection.transport.abort()
        for _ in range(_TURNS_TO_LOSE):
            await asyncio.sleep(0)

    async def _open(self) -> UpstreamConnection:
        """Connect to the upstream over TCP, TLS or a Unix socket."""
        loop = asyncio.get_running_loop()
        address, secured = self._address, self._secured
        new = partial(UpstreamConnection, self._where, self._deadlines)
        if isinstance(address, SocketFile):
            _, connection = await loop.create_unix_connection(new, sock=await _to_socket_file(address))
            return connection
        if secured is None:
            _, connection = await loop.create_connection(new, address.host, address.port)
            return connection
        _, connection = await loop.create_connection(
            new,
            address.host,
            address.port,
            ssl=secured.credentials.context,
            server_hostname=secured.server_name,
        )
        await _settle(connection, shown=secured.credentials.ends is not None)
        return connection

    def _pooled(self) -> UpstreamConnection | None:
        idle = self._idle
        if idle:
            stale = time.monotonic() - self._reuse_idle_seconds
            while idle and idle[0].idle_since <= stale:
                idle.popleft().transport.abort()
        while idle:
            connection = idle.pop()  # the one used last
            if connection.fit():
                return connection
            connection.transport.abort()
        return None

    async def _obtain(self) -> UpstreamConnection:
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
                    connection.transport.abort()  # the connection was closed while it was handed over
                else:
                    self._opening += 1
                late = f"no connection to {self._where} within {self._connect_timeout:g} s"
                connection = None
                try:
                    connection = await self._dial()
                finally:
                    if connection is None:
                        self.offer(None)  # opening failed, so the slot is free again
        except TimeoutError as exc:
            raise NotSent(late) from exc
        self._opening -= 1
        self._connections.add(connection)
        connection.pool = self
        return connection

    async def _turn(self) -> UpstreamConnection | None:
        """Wait in line for a slot: a connection, or None for the right, counted as opening, to open one."""
        waiter: asyncio.Future[UpstreamConnection | None] = asyncio.get_running_loop().create_future()
        self._waiters[waiter] = None
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self.offer(waiter.result())  # the slot arrived with the cancellation; pass it on
            raise
        finally:
            self._waiters.pop(waiter, None)

    async def _dial(self) -> UpstreamConnection:
        """Open a connection on which a request may begin. Raises NotSent."""
        try:
            connection = await self._open()
            if self._closed or not connection.fit():
                connection.transport.abort()
                why = f": {describe_failure(connection.lost_by)}" if connection.lost_by else ""
                raise NotSent(f"connection closed by {self._where} before anything was sent{why}")
            return connection
        except ssl.SSLCertVerificationError as exc:
            raise NotSent(f"certificate of {self._where} is not trusted: {describe_failure(exc)}") from exc
        except ssl.SSLError as exc:
            raise NotSent(f"no TLS with {self._where}: {describe_failure(exc)}") from exc
        except ConnectionRefusedError as exc:
            raise NotSent(f"connection refused by {self._where}") from exc
        except (OSError, UnicodeError) as exc:  # UnicodeError: a host name that IDNA cannot encode
            why = str(exc) or "it closed the connection"
            raise NotSent(f"cannot connect to {self._where}: {why}") from exc

    def offer(self, free: UpstreamConnection | None) -> None:
        """Give a free slot to the caller that has waited longest. None: a slot that is counted as opening."""
        while self._waiters:
            waiter, _ = self._waiters.popitem(last=False)
            if not waiter.done():
                return waiter.set_result(free)
        if free is None:
            self._opening -= 1
        elif self._closed or not self._reuse_idle_seconds:
            free.transport.abort()
        else:
            free.idle_since = time.monotonic()
            self._idle.append(free)
        return None

    def lost(self, connection: UpstreamConnection) -> None:
        self._connections.discard(connection)
        with suppress(ValueError):  # nearly always it is in use
            self._idle.remove(connection)
        self._opening += 1
        self.offer(None)


async def _to_socket_file(address: SocketFile) -> socket.socket:
    """Return a connected socket. asyncio's own `sock_connect` mistakes a full queue for a made connection."""
    opened = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        opened.setblocking(False)
        while True:
            try:
                opened.connect(str(address.path))
                return opened
            except BlockingIOError:
                await asyncio.sleep(_STEP_SECONDS)
            except (FileNotFoundError, PermissionError) as exc:
                raise NotSent(f"cannot connect to {address}: {exc.strerror}") from exc
    except BaseException:
        opened.close()
        raise


async def _settle(connection: UpstreamConnection, *, shown: bool) -> None:
    """Read what TLS sends after its handshake, so that `fit` does not mistake it for a stale answer.

    In TLS 1.3 the client ends its handshake before the upstream has verified the client's certificate. The
    upstream's session ticket proves that it accepted the certificate. If a certificate was `shown`, wait for
    the ticket for at most `_VERDICT_SECONDS`, so that a refused certificate raises `NotSent`.
    """
    loop = asyncio.get_running_loop()
    tls: ssl.SSLObject = connection.transport.get_extra_info("ssl_object")
    until = loop.time() + _VERDICT_SECONDS
    if shown and tls.version() == "TLSv1.3":
        while not (tls.session and tls.session.has_ticket) and loop.time() < until:
            if connection.transport.is_closing():
                break
            await asyncio.sleep(_STEP_SECONDS)
    while connection.readable() and not connection.transport.is_closing():
        await asyncio.sleep(0)
    if connection.transport.is_closing():
        await asyncio.sleep(0)  # one turn, in which the loop reports the reason to the connection


def request_head(
    method: bytes,
    target: bytes,
    headers: Sequence[tuple[bytes, bytes]],
    body: bytes | AsyncIterable[bytes] | None,
    chunked: bool,
) -> tuple[bytes, int | None, bytes | None]:
    """Return the head as bytes, the length that it declares, and the protocol that it offers to switch to.

    Raises ValueError if the head or the framing is not valid.
    """
    if not method or not target or _SPACE in method or _SPACE in target:
        raise ValueError(f"not a method and a target: {method!r} {target!r}")
    promised: int | None = None
    offer: bytes | None = None
    for name, value in headers:
        if len(name) in FRAMING_SIZES and (known := name.lower()) in FRAMING:
            if known == b"transfer-encoding":
                raise ValueError("the framing is decided here, not by a Transfer-Encoding header")
            if known == b"upgrade":
                offer = value
            elif promised is not None or not value.isdigit():
                raise ValueError(f"not one Content-Length: {value!r}")
            else:
                promised = int(value)
    lines = [method + b" " + target + b" HTTP/1.1", *map(b": ".join, headers)]
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
    if len(head) - len(head.translate(None, b"\r\n\0")) != 2 * (len(lines) - 1):
        raise ValueError("CR, LF or NUL in a request head")
    return head + b"\r\n\r\n", promised, offer
