"""Pass-through: forwards target, body bytes and end-to-end headers unchanged, in constant memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, cast

from aiohttp import web

from sidecar.core.target import wants_websocket
from sidecar.errors import Refusal
from sidecar.live.snapshot import Live
from sidecar.telemetry.events import LogEvent
from sidecar.telemetry.metrics import Metrics
from sidecar.upstream import Exchange, NotSent, TimedOut, Unanswered, Upstream
from sidecar.web.data._answers import RawAnswer, client_left, cut, declared_length
from sidecar.web.serving.accesslog import visit_of
from sidecar.web.serving.body import Taken, expect_continue
from sidecar.web.serving.connections import DataConnection, broken_body
from sidecar.web.wire.headers import HeaderFields, end_to_end, unframed, without_our_own
from sidecar.web.wire.problem import problem

TUNNEL_BUFFER_BYTES = 256 * 1024
# One in so many connections to the upstream is reserved for gated requests.
RESERVED_ONE_IN = 4


@dataclass(frozen=True, slots=True)
class ShadowRecord:
    """A gated request that shadow mode passes through unjudged: its decision, and the body read so far."""

    decision_id: str
    taken: Taken


class PassThroughProxy:
    """Carries requests to the upstream and answers back to the client. Records no decision."""

    def __init__(
        self,
        upstream: Upstream,
        metrics: Metrics,
        *,
        live: Live,
    ) -> None:
        settings = live.snapshot.settings.upstream
        max_connections = settings.max_connections
        self._upstream = upstream
        self._metrics = metrics
        # Some connections are reserved for the gate, because a stream can hold one for an unlimited time.
        self._slots = asyncio.Semaphore(max(1, max_connections - max(1, max_connections // RESERVED_ONE_IN)))
        self._slot_timeout = settings.connect_timeout_seconds
        self._live = live
        self.draining = False
        self.under_way = 0

    async def carry(
        self,
        request: web.BaseRequest,
        target: bytes,
        fields: HeaderFields,
        recorded: ShadowRecord | None = None,
    ) -> web.StreamResponse:
        """Forward one request and relay its answer to the end. A gated request must be `recorded` before."""
        unfit = uncarried(fields)
        if unfit is not None:
            return problem(unfit)
        decision_id = recorded.decision_id if recorded else None
        try:
            async with asyncio.timeout(self._slot_timeout):
                await self._slots.acquire()
        except TimeoutError:
            self._metrics.passed.labels("overloaded").inc()
            refusal = Refusal("overloaded", "Too many requests are passing through.")
            return problem(refusal, retry_after=1, decision_id=decision_id)
        self.under_way += 1
        self._metrics.passing.set(self.under_way)
        try:
            if request.transport is None or broken_body(request) is not None:
                raise asyncio.CancelledError  # the client left, or its body broke, during the wait for a slot
            answer, outcome = await self._carry(request, target, fields, recorded)
        except ValueError as exc:
            outcome = "invalid_request"
            refusal = Refusal(outcome, f"The request cannot be forwarded as it came: {exc}.")
            answer = problem(refusal, decision_id=decision_id)
        except NotSent as exc:
            outcome = "upstream_unreachable"
            answer = problem(Refusal(outcome, f"Nothing was sent: {exc}."), decision_id=decision_id)
        except TimedOut as exc:
            outcome = "upstream_timeout"
            refusal = Refusal(outcome, f"The backend did not answer: {exc}.")
            answer = problem(refusal, decision_id=decision_id)
        except Unanswered as exc:
            refusal = broken_body(request) or Refusal(
                "upstream_failed", f"The backend's answer was lost: {exc}."
            )
            outcome, answer = refusal.code, problem(refusal, decision_id=decision_id)
        except asyncio.CancelledError:
            broken = broken_body(request)
            if request.transport is None:
                outcome, answer = "client_left", client_left()
            elif broken is not None:
                outcome, answer = broken.code, problem(broken, decision_id=decision_id)
            else:
                raise
        finally:
            self._slots.release()
            self.under_way -= 1
            self._metrics.passing.set(self.under_way)
        self._metrics.passed.labels(outcome).inc()
        visit_of(request).outcome = outcome
        if self.draining:
            answer.force_close()
        return answer

    async def _carry(
        self, request: web.BaseRequest, target: bytes, fields: HeaderFields, recorded: ShadowRecord | None
    ) -> tuple[web.StreamResponse, str]:
        headers = _marked(fields.end_to_end(), recorded)
        upgrading = is_websocket(request, fields)
        if upgrading:
            headers += [(b"Connection", b"Upgrade"), (b"Upgrade", b"websocket")]
        has_length = b"content-length" in fields.places
        streamed = request.body_exists and not upgrading
        connection = cast(DataConnection, request.protocol)
        task = asyncio.current_task()
        assert task is not None
        connection.on_lost = task.cancel  # if the client leaves or breaks its body; `carry` handles it
        try:
            exchange = await self._upstream.send(
                request.method,
                target,
                headers,
                _body(request, fields, recorded.taken if recorded else Taken()) if streamed else None,
                chunked=streamed and not has_length,
                head_deadline=self._live.snapshot.settings.upstream.response_timeout_seconds,
            )
        finally:
            connection.on_lost = None
        with exchange:
            if exchange.upgraded:
                return await self._tunnel(request, exchange), "tunnelled"
            return await self._relay(request, exchange, recorded)

    async def _relay(
        self, request: web.BaseRequest, exchange: Exchange, recorded: ShadowRecord | None
    ) -> tuple[web.StreamResponse, str]:
        head = exchange.head
        answer = RawAnswer(
            head.status,
            head.reason,
            _marked(end_to_end(head.headers), recorded),
            content_length=declared_length(head.headers),
            close=self.draining or cast(DataConnection, request.protocol).ending,
        )
        connection, visit = cast(DataConnection, request.protocol), visit_of(request)
        connection.on_lost = exchange.abort  # else a silent answer would go on after its client has left
        try:
            await answer.prepare(request)
            if not exchange.complete:
                answer.send_head()
                visit.head_sent = True
            while piece := await exchange.read():
                await answer.write(piece)
                visit.sent += len(piece)
            await answer.write_eof()
        except Unanswered as exc:
            if request.transport is None:
                answer.mark_ended()
                return answer, "client_left"
            LogEvent.PASSING_CUT.log(cause=str(exc))
            cut(request, answer)
            return answer, "cut"
        except ConnectionError:
            answer.mark_ended()
            return answer, "client_left"
        finally:
            connection.on_lost = None
        return answer, "answered"

    async def _tunnel(self, request: web.BaseRequest, exchange: Exchange) -> web.StreamResponse:
        """Relay raw bytes in both directions after a 101, until both sides have ended or one breaks."""
        answer = RawAnswer(
            exchange.head.status, exchange.head.reason, exchange.head.headers, content_length=None
        )
        protocol, visit = cast(DataConnection, request.protocol), visit_of(request)
        transport = request.transport
        answer.mark_ended()
        if transport is None:
            return answer
        transport.write(_switching_head(exchange))
        visit.head_sent = True
        inbound = _Inbound(protocol)
        protocol.set_parser(cast(Any, inbound))
        protocol.on_lost = exchange.abort

        async def upstream_to_client() -> None:
            while piece := await exchange.read():
                transport.write(piece)
                visit.sent += len(piece)
                await protocol._drain_helper()
            if not protocol.end_side():
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
        return answer


class _Inbound:
    """Buffers the client's bytes of a tunnel. Takes the place of aiohttp's own WebSocket reader."""

    def __init__(self, protocol: DataConnection) -> None:
        self._protocol = protocol
        self._pieces: list[bytes] = []
        self._waiting = 0
        self._paused = False
        self._ended = False
        self._arrived = asyncio.Event()

    def feed_data(self, data: bytes) -> tuple[bool, bytes]:
        self._pieces.append(data)
        self._waiting += len(data)
        if self._waiting > TUNNEL_BUFFER_BYTES and not self._paused:
            self._paused = True
            self._protocol.pause_reading()
        self._arrived.set()
        return False, b""

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
    codings = [coding.strip().lower() for coding in fields.values(b"transfer-encoding")]
    if codings and codings != [b"chunked"]:
        # The backend could not undo another coding, because the sidecar does not forward this header.
        return Refusal("invalid_request", "No Transfer-Encoding but chunked is understood.")
    return None


def is_websocket(request: web.BaseRequest, fields: HeaderFields) -> bool:
    """Whether the client asks to switch to a WebSocket (RFC 6455, section 4.1)."""
    if not _offers_websocket(fields) or request.method != "GET" or request.body_exists:
        return False
    options = ",".join(fields.texts(b"connection")).lower().split(",")
    return "upgrade" in (option.strip() for option in options)


def _offers_websocket(fields: HeaderFields) -> bool:
    return b"upgrade" in fields.places and wants_websocket(fields.deciding())


def upgrade_refusal(request: web.BaseRequest, fields: HeaderFields) -> Refusal | None:
    """Refuse every protocol switch but a WebSocket. CONNECT would carry requests past the gate."""
    if request.method == "CONNECT":
        return Refusal("upgrade_refused", "CONNECT is refused.")
    if _offers_websocket(fields) and not is_websocket(request, fields):
        message = "A WebSocket begins with a GET without a body, with Connection: Upgrade."
        return Refusal("upgrade_refused", message)
    return None


def _marked(headers: list[tuple[bytes, bytes]], recorded: ShadowRecord | None) -> list[tuple[bytes, bytes]]:
    """Replace the `Scopegate-*` headers of a recorded request by its decision id, which is thus genuine."""
    if recorded is None:
        return headers
    return [*without_our_own(headers), (b"Scopegate-Decision-Id", recorded.decision_id.encode("ascii"))]


async def _body(request: web.BaseRequest, fields: HeaderFields, taken: Taken) -> AsyncIterator[bytes]:
    for piece in taken.pieces:
        yield piece
    if not taken.begun:
        expect_continue(request, fields)
    while piece := await request.content.readany():
        yield piece


def _switching_head(exchange: Exchange) -> bytes:
    lines = [b"HTTP/1.1 101 " + exchange.head.reason]
    lines += [name + b": " + value for name, value in unframed(101, exchange.head.headers)]
    return b"\r\n".join(lines) + b"\r\n\r\n"
