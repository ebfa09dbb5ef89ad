"""The HTTP server of the data listener: an asyncio Protocol around the parser, without aiohttp's server.

For each request, aiohttp's server makes a task and a writer and moves two timers. Here each connection has
one task, which answers its requests in order, and one timer:

1. `data_received` parses. Requests wait in a queue of PIPELINED; when it is full, the transport pauses.
2. The task takes a request, has the handler answer it, and reports its end to the access log. The handler
   writes the answer, or returns one of the sidecar's own answers, which the connection writes.
3. A connection that waits for a request has a deadline: KEEP_ALIVE_SECONDS after the last answer, or the time
   for a head once its first bytes have arrived. The timer is not moved for each request. When it rings, it
   looks at the deadline, and rings again at the deadline if that is later.
4. A client that ends its side is treated as on every listener; see the module `connections`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from typing import Protocol

from aiohttp import web
from aiohttp.base_protocol import BaseProtocol
from aiohttp.client_exceptions import ClientConnectionResetError
from aiohttp.streams import StreamReader
from aiohttp.tcp_helpers import tcp_keepalive
from aiohttp.web_protocol import ERROR, _ErrInfo

from sidecar.errors import Refusal
from sidecar.eventloop.receiving import limit_reads
from sidecar.telemetry.events import LogEvent
from sidecar.web.serving._parser import PIPELINED, READ_AHEAD_BYTES, Message, Overloaded, RequestParser
from sidecar.web.serving._responses import serialized
from sidecar.web.serving.connections import (
    KEEP_ALIVE_SECONDS,
    LINGERING_SECONDS,
    ClientWatch,
    end_side,
    fault,
    quoting,
    refusal_of,
)
from sidecar.web.serving.datarequest import DataRequest
from sidecar.web.wire.problem import problem

# The limit for bytes that no request has taken, on all connections of the data listener together.
CONNECTION_BYTES = 256 * 1024 * 1024
FREE_BYTES = 16 * 1024  # one connection may always hold this much
RECOUNT_SECONDS = 0.05

# Answers a request, or returns the sidecar's own answer to it, which the connection writes.
Handler = Callable[[DataRequest], Awaitable[web.Response | None]]
# Called at the end of each request, with the sidecar's own answer to it, if that is what it got.
Ended = Callable[[DataRequest, web.Response | None], None]


class Tunnel(Protocol):
    """Takes what the client sends after the protocol was switched."""

    def feed_data(self, data: bytes, /) -> None: ...

    def feed_eof(self) -> None: ...


class Buffers:
    """Limits the bytes that the connections of a listener hold and no request has taken yet.

    One connection holds little: a head, the part of a body that is read ahead, a few requests that wait. All
    connections together may hold a lot. The sum of all arriving bytes is an upper bound of the bytes held.
    Only if that sum exceeds the limit are the bytes of each connection counted anew. A connection that holds
    at most FREE_BYTES is never refused.
    """

    def __init__(self, connections: Iterable[DataConnection], max_bytes: int = CONNECTION_BYTES) -> None:
        self._connections, self._max_bytes = connections, max_bytes
        self._held = 0  # at least as much as is held
        self._counted_at = float("-inf")

    def admit(self, connection: DataConnection, size: int) -> bool:
        """Whether a connection may hold so many bytes more."""
        if self._held + size > self._max_bytes:
            now = asyncio.get_running_loop().time()
            if now >= self._counted_at + RECOUNT_SECONDS:
                self._counted_at = now
                self._held = sum(each.held for each in self._connections)
            if self._held + size > self._max_bytes and connection.held + size > FREE_BYTES:
                return False
        self._held += size
        return True


class DataServer:
    """Creates a `DataConnection` for each connection. It decompresses no body and cancels no handler."""

    def __init__(self, handler: Handler, *, on_ended: Ended, head_timeout_seconds: float) -> None:
        self.handler, self.on_ended = handler, on_ended
        self.head_timeout_seconds = head_timeout_seconds
        self.connections: set[DataConnection] = set()  # those that are open, or still answer a request
        self.buffers = Buffers(self.connections)

    def __call__(self) -> DataConnection:
        return DataConnection(self)

    def pre_shutdown(self) -> None:
        """Close each connection once the request that it answers has its answer."""
        for connection in tuple(self.connections):
            connection.close()

    async def shutdown(self, seconds: float) -> None:
        """Close all connections. Requests have this time to end, and the same time again without a body."""
        await asyncio.gather(*(connection.shutdown(seconds) for connection in self.connections))
        self.connections.clear()


class DataConnection(BaseProtocol):
    """One connection of the data listener."""

    def __init__(self, server: DataServer) -> None:
        loop = asyncio.get_running_loop()
        self._requests = RequestParser(self, loop, broke=self._body_broke, refusal_of=refusal_of)
        super().__init__(loop, self._requests)  # type: ignore[arg-type]  # has what BaseProtocol calls
        self._server = server
        self.remote: str | None = None  # the client's address, as logs show it
        # Called when the client goes away, or breaks off its body, while a request is being answered.
        self.on_lost: Callable[[], object] | None = None
        self.task: asyncio.Task[None] | None = None  # answers the requests; begins with the first
        self._messages: deque[Message] = deque()
        self._waiter: asyncio.Future[None] | None = None  # of the task, while there is no request
        self._current: DataRequest | None = None  # the request that is being answered
        self._closing = False  # no further request is read
        self._half_closed = False  # the client sends no further request, and waits for its answer
        self._tunnel: Tunnel | None = None
        self._tail = b""  # bytes behind a request for another protocol
        self._within_head = True
        self._due = 0.0  # the deadline while no request is being answered
        self._timer: asyncio.TimerHandle | None = None
        self._watch: ClientWatch | None = None  # once the client has ended its side

    # What asyncio calls ------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        limit_reads(transport)
        assert self.transport is not None
        tcp_keepalive(self.transport)
        peer = transport.get_extra_info("peername")
        if peer is not None:
            self.remote = _shown(str(peer[0] if isinstance(peer, tuple | list) else peer))
        self._server.connections.add(self)
        self._expect(self._server.head_timeout_seconds)

    def data_received(self, data: bytes) -> None:
        if self._closing:
            return
        if self._tunnel is not None:
            if data:
                self._tunnel.feed_data(data)
            return
        if data and not self._server.buffers.admit(self, len(data)):
            self._requests.fail(Overloaded(message="too much is held"))
            data = b""
        if self._upgraded:
            self._tail += data
            if not self._buffer_paused and len(self._tail) >= READ_AHEAD_BYTES:
                self._pause_reading_for_buffer()
            return
        self._parse(data)

    def eof_received(self) -> bool | None:
        """The client has ended its side. Return True to keep the sidecar's side open."""
        transport = self.transport
        if transport is None or transport.get_extra_info("sslcontext") is not None:
            return None
        if self._tunnel is not None:
            self._tunnel.feed_eof()  # a tunnel can be half-closed, too
        elif self._waits_for_an_answer():
            self._half_closed = True
        else:
            return None
        self._watch = ClientWatch(transport, self._loop)
        return True

    def connection_lost(self, exc: BaseException | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._watch is not None:
            self._watch.end()
        self._closing = True
        if self.on_lost is not None:
            self.on_lost()
        super().connection_lost(exc)
        if self._current is not None:
            self._current.content.set_exception(exc or ConnectionResetError("Connection lost"))
        if self._tunnel is not None:
            self._tunnel.feed_eof()
        self._wake()
        if self.task is None or self.task.done():
            self._server.connections.discard(self)
        else:
            self.task.add_done_callback(lambda _: self._server.connections.discard(self))

    def resume_reading(self, resume_parser: bool = True) -> None:
        """A body has been read. aiohttp calls this for each piece; nearly always nothing was paused."""
        requests = self._requests
        if self._reading_paused or requests.paused or requests.backlog:
            super().resume_reading(resume_parser)

    # What handlers use -------------------------------------------------------------------------

    def send(self, data: bytes) -> None:
        """Write. Raises ConnectionError if the client has gone."""
        transport = self.transport
        if transport is None or transport.is_closing():
            raise ClientConnectionResetError("Cannot write to closing transport")
        transport.write(data)

    async def drain(self) -> None:
        """Wait until there is room for more. Raises ConnectionError if the client has gone."""
        if self._paused and self.transport is not None:
            await self._drain_helper()

    def set_tunnel(self, tunnel: Tunnel) -> None:
        """From now on, everything that the client sends goes to `tunnel`."""
        self._tunnel = tunnel
        tail, self._tail = self._tail, b""
        if tail:
            tunnel.feed_data(tail)
        if self._half_closed:
            tunnel.feed_eof()
        if self._buffer_paused:
            self._resume_if_drained()

    @property
    def ending(self) -> bool:
        """Whether the connection closes after the present request, without reading another one."""
        return (self._half_closed or self._upgraded or self._requests.dead) and not self._messages

    @property
    def held(self) -> int:
        """The number of bytes that have arrived and that no request has taken."""
        return self._requests.held + len(self._tail)

    # What the server calls ---------------------------------------------------------------------

    def close(self) -> None:
        """Close once the request that is being answered has its answer."""
        self._closing = True
        if not self._busy:
            self._hang_up()
        self._wake()

    def force_close(self) -> None:
        """Close now. What was written is still sent."""
        self._closing = True
        self._hang_up()
        self.transport = None
        self._wake()

    async def shutdown(self, seconds: float) -> None:
        """Wait for the request that is being answered, at last in vain, and close."""
        self._closing = True
        task = self.task
        if task is not None and self._busy:
            await asyncio.wait([task], timeout=seconds)
            if self._current is not None:
                self._current.content.set_exception(asyncio.CancelledError())
                await asyncio.wait([task], timeout=seconds)
            task.cancel()
        self.force_close()

    # Requests ----------------------------------------------------------------------------------

    @property
    def _busy(self) -> bool:
        """Whether a request is being answered, or waits for that."""
        return self._current is not None or bool(self._messages)

    def _parse(self, data: bytes) -> None:
        messages, self._upgraded, tail = self._requests.feed_data(data)
        if messages:
            self._within_head = False
            self._messages.extend(messages)
            if self.task is None:
                self.task = self._loop.create_task(self._serve())
            else:
                self._wake()
            if not self._buffer_paused and len(self._messages) >= PIPELINED:
                self._pause_reading_for_buffer()
        elif data and not self._within_head and not self._busy:
            self._within_head = True
            self._expect(self._server.head_timeout_seconds, self._due)
        if self._upgraded:
            self._tail = tail

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _resume_if_drained(self) -> None:
        """Go on reading once few requests, or few bytes behind a request for another protocol, wait."""
        if self._tail and len(self._tail) >= READ_AHEAD_BYTES:
            return
        if not self._upgraded:
            # Parse what waits while the transport is still paused, because that may fill the queue again.
            self.data_received(b"")
            if len(self._messages) >= PIPELINED:
                return
        self._resume_reading_for_buffer()

    async def _serve(self) -> None:
        """Answer the requests in order, until the connection closes."""
        messages = self._messages
        try:
            while messages or not self._closing:
                if not messages:
                    self._expect(KEEP_ALIVE_SECONDS)
                    self._waiter = self._loop.create_future()
                    await self._waiter
                    continue
                message, content = messages.popleft()
                self._requests.message_consumed()
                if self._buffer_paused and len(messages) <= PIPELINED // 2:
                    self._resume_if_drained()
                if not await self._answer(message, content) or self._closing:
                    break
        except Exception as exc:
            LogEvent.REQUEST_FAILED.log(exc=exc)
            self.force_close()
        except BaseException:
            self.force_close()
            raise
        finally:
            self._current = None
        self._hang_up()

    def _hang_up(self) -> None:
        """Close the transport, once: a second call would keep one with TLS from being aborted."""
        transport = self.transport
        if transport is not None and not transport.is_closing():
            transport.close()

    async def _answer(self, message: object, content: StreamReader) -> bool:
        """Answer one request. Return whether the connection goes on."""
        answer: web.Response | None
        if isinstance(message, _ErrInfo):
            request = self._current = DataRequest(self, ERROR)
            request.route = None
            answer = _unparsable(message.exc)
        else:
            # The parser returns nothing else beside faults.
            request = self._current = DataRequest(self, message, content)  # type: ignore[arg-type]
            try:
                answer = await self._server.handler(request)
            except asyncio.CancelledError:
                request.status = None
                self._server.on_ended(request, None)
                raise
        if self._upgraded and not self._messages and self._tunnel is None:
            self._decline_upgrade()
        goes_on = True
        if answer is not None:
            try:
                await self._respond(request, answer)
            except ConnectionError:
                goes_on = False
        if self._requests.answered():
            # Closing while the client still sends would cause a reset, which can destroy the answer.
            end_side(self.transport)
        if self._half_closed and not self._messages:
            self._closing = True
        self._server.on_ended(request, answer)
        if goes_on and not content.is_eof():
            await self._linger(content)
        self._current = None
        return goes_on and request.keep_alive

    async def _respond(self, request: DataRequest, answer: web.Response) -> None:
        """Write one of the sidecar's own answers."""
        request.status = answer.status
        data = serialized(request, answer)
        self.send(data)
        request.answering = True
        if self._paused:
            await self.drain()

    def _decline_upgrade(self) -> None:
        """The request for another protocol was answered without it. What came behind it is a request."""
        self._requests.set_upgraded(False)
        self._upgraded = False
        tail, self._tail = self._tail, b""
        if tail:
            self._parse(tail)
            if self._buffer_paused and len(self._messages) < PIPELINED:
                self._resume_if_drained()

    async def _linger(self, content: StreamReader) -> None:
        """Read the rest of a body that no handler has read, for a short time. Then close."""
        if self.transport is not None and not self._closing:
            try:
                async with asyncio.timeout(LINGERING_SECONDS):
                    while not content.is_eof():
                        await content.readany()
            except (TimeoutError, OSError):
                pass
            except Exception as exc:
                LogEvent.UNPARSABLE.log(cause=fault(quoting(exc)))
                self.force_close()
        if not content.is_eof():
            self._closing = True
            content.set_exception(web.PayloadAccessError())

    def _body_broke(self, body: StreamReader) -> None:
        request = self._current
        if request is not None and request.content is body and self.on_lost is not None:
            self.on_lost()

    # Deadlines ---------------------------------------------------------------------------------

    def _expect(self, seconds: float, at_most: float = float("inf")) -> None:
        """Close unless a request comes within this time."""
        due = self._due = min(self._loop.time() + seconds, at_most)
        timer = self._timer
        if timer is not None:
            if timer.when() <= due:
                return
            timer.cancel()
        self._timer = self._loop.call_at(due, self._ring)

    def _ring(self) -> None:
        self._timer = None
        if self._busy:
            return  # the deadline begins anew after the answer
        if self._loop.time() < self._due:
            self._timer = self._loop.call_at(self._due, self._ring)
        else:
            self.force_close()

    # The end of the client's side ---------------------------------------------------------------

    def _waits_for_an_answer(self) -> bool:
        """Whether all requests have arrived whole, at least one is unanswered, and no answer has begun."""
        request = self._current
        if self._requests.within_body or self._closing or not self._busy:
            return False
        return request is None or not request.answering


def request_of(raw: bytes) -> DataRequest | Refusal:
    """The request in these bytes, parsed as on a connection, or the refusal of bytes that cannot be parsed.

    It has no client to answer. Call it within an event loop.
    """

    async def unserved(request: DataRequest) -> web.Response | None:
        raise NotImplementedError

    server = DataServer(unserved, on_ended=lambda request, answer: None, head_timeout_seconds=0.0)
    connection = DataConnection(server)
    messages, _, _ = connection._requests.feed_data(raw)
    if not messages:
        return Refusal("invalid_request", "The request has no end.")
    message, content = messages[0]
    if isinstance(message, _ErrInfo):
        return refusal_of(quoting(message.exc))
    connection._requests.message_consumed()
    return DataRequest(connection, message, content)


def _unparsable(exc: BaseException) -> web.Response:
    quoted = quoting(exc)
    LogEvent.UNPARSABLE.log(cause=fault(quoted))
    answer = problem(refusal_of(quoted))
    answer.force_close()
    return answer


def _shown(address: str) -> str | None:
    """The client's address. A socket for IPv4 and IPv6 shows 192.0.2.1 as ::ffff:192.0.2.1."""
    mapped = address.removeprefix("::ffff:")
    return (mapped if "." in mapped else address) or None
