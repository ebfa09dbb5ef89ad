"""Pass-through: forwards target, body bytes and end-to-end headers unchanged, in constant memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

from aiohttp import web

from sidecar.core.targetheaders import wants_websocket
from sidecar.errors import Refusal
from sidecar.live.snapshot import Live
from sidecar.telemetry.events import LogEvent
from sidecar.telemetry.metrics import Metrics
from sidecar.upstream import Exchange, NotSent, TimedOut, Unanswered, Upstream
from sidecar.upstream.custody import NO_CUSTODY, Carried, Custody, Echo
from sidecar.web.data._answers import PASSED_HEADERS, RawAnswer, client_left, cut
from sidecar.web.serving.body import Taken, expect_continue
from sidecar.web.serving.connections import broken_body, end_side
from sidecar.web.serving.dataconnection import DataConnection
from sidecar.web.serving.datarequest import DataRequest
from sidecar.web.wire.headers import HeaderFields, Headers, unframed, without_our_own
from sidecar.web.wire.problem import problem

TUNNEL_BUFFER_BYTES = 256 * 1024
# One in so many connections to the upstream is reserved for gated requests.
RESERVED_ONE_IN = 4


@dataclass(frozen=True, slots=True)
class ShadowRecord:
    """A gated request that shadow mode passes through unjudged: its decision, the body read so far, and
    whether the credentials of admitted requests go with it.

    They do not go with a request that can be read in several ways, or whose method or headers are not those
    of the route, because it may reach any path of the backend. Nor do they with one whose caller may not
    execute.
    """

    decision_id: str
    taken: Taken
    is_credited: bool

    def marked(self, headers: Headers) -> list[tuple[bytes, bytes]]:
        """Replace the `Scopegate-*` headers by the decision id, which is thus genuine."""
        return [*without_our_own(headers), (b"Scopegate-Decision-Id", self.decision_id.encode("ascii"))]


class PassThroughProxy:
    """Carries requests to the upstream and answers back to the client. Records no decision."""

    def __init__(
        self,
        upstream: Upstream,
        metrics: Metrics,
        *,
        live: Live,
        custody: Custody = NO_CUSTODY,
    ) -> None:
        self._custody = custody
        settings = live.snapshot.settings.upstream
        max_connections = settings.max_connections
        self._upstream = upstream
        self._metrics = metrics
        # Some connections are reserved for the gate, because a stream can hold one for an unlimited time.
        self._slots = _Slots(max(1, max_connections - max(1, max_connections // RESERVED_ONE_IN)))
        self._slot_timeout = settings.connect_timeout_seconds
        self._live = live
        self.draining = False
        self.under_way = 0

    async def carry(self, request: DataRequest, recorded: ShadowRecord | None = None) -> web.Response | None:
        """Forward one request and relay its answer to the end, or return the problem that answers it.

        A gated request must be `recorded` before.
        """
        unfit = uncarried(request.fields)
        if unfit is not None:
            return problem(unfit)
        decision_id = recorded.decision_id if recorded else None
        as_gated = recorded is not None and recorded.is_credited
        carried = self._custody.gated if as_gated else self._custody.passing
        # Those of gated requests were looked at before the record was written.
        if carried is not None and carried.trouble is not None and not as_gated:
            self._metrics.passed.labels(carried.trouble.code).inc()
            return problem(carried.trouble, retry_after=1, decision_id=decision_id)
        if not (self._slots.take() or await self._slots.wait(self._slot_timeout)):
            self._metrics.passed.labels("overloaded").inc()
            refusal = Refusal("overloaded", "Too many requests are passing through.")
            return problem(refusal, retry_after=1, decision_id=decision_id)
        self.under_way += 1
        self._metrics.passing.set(self.under_way)
        refused: Refusal | None = None
        try:
            if request.protocol.transport is None or broken_body(request.content) is not None:
                raise asyncio.CancelledError  # the client left, or its body broke, during the wait for a slot
            outcome = await self._carry(request, recorded, carried)
        except ValueError as exc:
            refused = Refusal("invalid_request", f"The request cannot be forwarded as it came: {exc}.")
        except NotSent as exc:
            refused = Refusal("upstream_unreachable", f"Nothing was sent: {exc}.")
        except TimedOut as exc:
            refused = Refusal("upstream_timeout", f"The backend did not answer: {exc}.")
        except Unanswered as exc:
            refused = broken_body(request.content) or Refusal(
                "upstream_failed", f"The backend's answer was lost: {exc}."
            )
        except asyncio.CancelledError:
            refused = broken_body(request.content)
            if request.transport is None:
                refused, outcome = None, "client_left"
                client_left(request)
            elif refused is None:
                raise
            _task_of(request).uncancel()
        finally:
            self._slots.release()
            self.under_way -= 1
            self._metrics.passing.set(self.under_way)
        if refused is not None:
            outcome = refused.code
        self._metrics.passed.labels(outcome).inc()
        request.outcome = outcome
        return None if refused is None else problem(refused, decision_id=decision_id)

    async def _carry(
        self, request: DataRequest, recorded: ShadowRecord | None, carried: Carried | None
    ) -> str:
        """Forward a request and relay its answer. Return the outcome."""
        fields = request.fields
        headers = fields.end_to_end(without=request.withheld)
        if recorded is not None:
            headers = recorded.marked(headers)
        if carried is not None:
            headers = carried.put(headers)
        upgrading = is_websocket(request)
        if upgrading:
            headers += [(b"Connection", b"Upgrade"), (b"Upgrade", b"websocket")]
        body: bytes | AsyncIterator[bytes] | None = None
        chunked = False
        if request.body_exists and not upgrading:
            chunked = b"content-length" not in fields.places
            if not chunked and recorded is None and b"expect" not in fields.places:
                body = request.whole_body()
            if body is None:
                body = _body(request, recorded.taken if recorded else Taken())
        connection = request.protocol
        connection.on_lost = _task_of(request).cancel  # `carry` handles it
        try:
            exchange = await self._upstream.send(
                request.method,
                target_bytes(request.target),
                headers,
                body,
                chunked=chunked,
                head_deadline=self._live.snapshot.settings.upstream.response_timeout_seconds,
            )
        finally:
            connection.on_lost = None
        with exchange:
            echo = None if carried is None else carried.listening(exchange.head)
            try:
                if exchange.upgraded:
                    await self._tunnel(request, exchange)
                    return "tunnelled"
                return await self._relay(request, exchange, recorded, echo)
            finally:
                if echo is not None and echo.heard:
                    self._metrics.credential_echoes.inc()
                    LogEvent.CREDENTIAL_ECHOED.log(request_id=request.request_id)

    async def _relay(
        self, request: DataRequest, exchange: Exchange, recorded: ShadowRecord | None, echo: Echo | None
    ) -> str:
        head, connection = exchange.head, request.protocol
        headers: Headers = PASSED_HEADERS[head.headers]
        answer = RawAnswer(
            request,
            head.status,
            head.reason,
            headers if recorded is None else recorded.marked(headers),
            content_length=head.content_length,
            close=self.draining or connection.ending,
        )
        connection.on_lost = exchange.abort  # else a silent answer would go on after its client has left
        try:
            if exchange.complete:
                body = await exchange.read()
                if echo is not None:
                    echo.hear(body)
                answer.send_whole(body)
                request.sent = len(body)
                if connection.writing_paused:
                    await connection.drain()
                return "answered"
            answer.send_head()
            while piece := await exchange.read():
                if echo is not None:
                    echo.hear(piece)
                await answer.write(piece)
            await answer.end()
        except Unanswered as exc:
            request.keep_alive = False
            if request.transport is None:
                return "client_left"
            LogEvent.PASSING_CUT.log(cause=str(exc))
            cut(request, ends_with_connection=answer.ends_with_connection)
            return "cut"
        except ConnectionError:
            request.keep_alive = False
            return "client_left"
        finally:
            connection.on_lost = None
        return "answered"

    async def _tunnel(self, request: DataRequest, exchange: Exchange) -> None:
        """Relay raw bytes in both directions after a 101, until both sides have ended or one breaks."""
        protocol, transport = request.protocol, request.transport
        request.status, request.keep_alive = exchange.head.status, False
        if transport is None:
            return
        transport.write(_switching_head(exchange))
        request.head_sent = request.answering = True
        inbound = _Inbound(protocol)
        protocol.set_tunnel(inbound)
        protocol.on_lost = exchange.abort

        async def upstream_to_client() -> None:
            while piece := await exchange.read():
                transport.write(piece)
                request.sent += len(piece)
                await protocol.drain()
            if not end_side(protocol.transport):
                transport.close()

        async def client_to_upstream() -> None:
            while piece := await inbound.read():
                await exchange.write(piece)
            exchange.write_eof()

        directions = [
            asyncio.ensure_future(upstream_to_client()),
            asyncio.ensure_future(client_to_upstream()),
        ]
        try:
            done, _ = await asyncio.wait(directions, return_when=asyncio.FIRST_EXCEPTION)
            for direction in done:
                failure = direction.exception()
                if failure is not None and not isinstance(failure, Unanswered | ConnectionError):
                    raise failure
        finally:
            protocol.on_lost = None
            for direction in directions:
                direction.cancel()
            await asyncio.gather(*directions, return_exceptions=True)
            transport.close()


class _Slots:
    """Counts the connections that pass-through requests may take. The longest wait ends first."""

    def __init__(self, free: int) -> None:
        self._free = free
        self._waiting: dict[asyncio.Future[None], None] = {}  # the longest wait first

    def take(self) -> bool:
        """Take a slot if one is free."""
        if not self._free:
            return False
        self._free -= 1
        return True

    async def wait(self, seconds: float) -> bool:
        """Take a slot once one is free. Return False if none is within this time."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[turn] = None
        try:
            async with asyncio.timeout(seconds):
                await turn
        except BaseException as exc:
            if turn.done() and not turn.cancelled():
                self.release()  # the slot came together with the end of the wait
            if isinstance(exc, TimeoutError):
                return False
            raise
        finally:
            self._waiting.pop(turn, None)
        return True

    def release(self) -> None:
        """Give a slot back."""
        while self._waiting:
            turn = next(iter(self._waiting))
            del self._waiting[turn]
            if not turn.done():
                return turn.set_result(None)
        self._free += 1
        return None


class _Inbound:
    """Buffers the client's bytes of a tunnel."""

    def __init__(self, protocol: DataConnection) -> None:
        self._protocol = protocol
        self._pieces: list[bytes] = []
        self._waiting = 0
        self._paused = False
        self._ended = False
        self._arrived = asyncio.Event()

    def feed_data(self, data: bytes) -> None:
        self._pieces.append(data)
        self._waiting += len(data)
        if self._waiting > TUNNEL_BUFFER_BYTES and not self._paused:
            self._paused = True
            self._protocol.pause_reading()
        self._arrived.set()

    def feed_eof(self) -> None:
        self._ended = True
        self._arrived.set()

    async def read(self) -> bytes:
        """Return the bytes that have arrived, b"" at the end."""
        while not self._pieces and not self._ended:
            self._arrived.clear()
            await self._arrived.wait()
        pieces, self._pieces, self._waiting = self._pieces, [], 0
        if self._paused:
            self._paused = False
            self._protocol.resume_reading()
        return b"".join(pieces)


def uncarried(fields: HeaderFields) -> Refusal | None:
    """Why the framing of a request makes it impossible to forward; None if it can be forwarded."""
    if b"transfer-encoding" not in fields.places:
        return None
    if [coding.strip().lower() for coding in fields.values(b"transfer-encoding")] == [b"chunked"]:
        return None
    # The backend could not undo another coding, because the sidecar does not forward this header.
    return Refusal("invalid_request", "No Transfer-Encoding but chunked is understood.")


def is_websocket(request: DataRequest) -> bool:
    """Whether the client asks to switch to a WebSocket (RFC 6455, section 4.1)."""
    fields = request.fields
    if b"upgrade" not in fields.places or not wants_websocket(fields.deciding()):
        return False
    if request.method != "GET" or request.body_exists:
        return False
    options = ",".join(fields.texts(b"connection")).lower().split(",")
    return "upgrade" in (option.strip() for option in options)


def upgrade_refusal(request: DataRequest) -> Refusal | None:
    """Refuse every protocol switch but a WebSocket. CONNECT would carry requests past the gate."""
    if request.method == "CONNECT":
        return Refusal("upgrade_refused", "CONNECT is refused.")
    fields = request.fields
    if b"upgrade" not in fields.places:
        return None
    if wants_websocket(fields.deciding()) and not is_websocket(request):
        message = "A WebSocket begins with a GET without a body, with Connection: Upgrade."
        return Refusal("upgrade_refused", message)
    return None


def target_bytes(target: str) -> bytes:
    """The raw target as the bytes that came."""
    return target.encode("utf-8", "surrogateescape")


def _task_of(request: DataRequest) -> asyncio.Task[None]:
    task = request.protocol.task
    assert task is not None
    return task


async def _body(request: DataRequest, taken: Taken) -> AsyncIterator[bytes]:
    for piece in taken.pieces:
        yield piece
    if not taken.begun:
        expect_continue(request, request.fields)
    while piece := await request.content.readany():
        yield piece


def _switching_head(exchange: Exchange) -> bytes:
    lines = [b"HTTP/1.1 101 " + exchange.head.reason]
    lines += [name + b": " + value for name, value in unframed(101, exchange.head.headers)]
    return b"\r\n".join(lines) + b"\r\n\r\n"
