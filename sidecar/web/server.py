"""aiohttp's low-level server, without a router, and with a deadline for unfinished request heads."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from sidecar.errors import Refusal, ScopegateError
from sidecar.web.problem import problem

logger = logging.getLogger("scopegate.web")

MAX_FAULT_CHARS = 200
KEEP_ALIVE_SECONDS = 75.0
MAX_LINE_BYTES = 16 * 1024
MAX_HEADER_BYTES = 32 * 1024

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
Ended = Callable[[web.BaseRequest, web.StreamResponse], None]


def require_fast_parser() -> None:
    """Raises ScopegateError on aiohttp's pure-Python parser, which reads some requests otherwise."""
    from aiohttp import http_parser

    if http_parser.HttpRequestParser is http_parser.HttpRequestParserPy:
        raise ScopegateError(
            "aiohttp runs on its pure-Python HTTP parser; install a wheel of aiohttp with its C extension, "
            "and do not set AIOHTTP_NO_EXTENSIONS"
        )


class DataConnection(RequestHandler):
    """One connection. A request head that is not finished in time closes it (slow senders hold no place)."""

    def __init__(self, server: DataServer, **options: Any) -> None:
        super().__init__(server, **options)
        self._head_seconds = server.head_timeout_seconds
        self._head_timer: asyncio.TimerHandle | None = None
        self._on_ended = server.on_ended
        # Called when the client goes away while a request is being answered.
        self.on_lost: Callable[[], object] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._messages or self._current_request is not None or self._payload_parser is not None:
            self._stop_watching()
        elif data and self._head_timer is None:
            self._watch_head()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._stop_watching()
        if self.on_lost is not None:
            self.on_lost()
        super().connection_lost(exc)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """What aiohttp answers without asking us, above all to a request that cannot be parsed."""
        if request.writer.output_size > 0:
            raise ConnectionError("an answer is under way already")
        if status < 500:
            fault = (message or "").strip().partition("\n")[0].rstrip(":")[:MAX_FAULT_CHARS]
            logger.info("a request could not be parsed", extra={"cause": fault})
            answer = problem(Refusal("invalid_request", f"This is not HTTP as it should be: {fault}."))
        else:
            logger.error("a request failed", exc_info=exc)
            answer = problem(Refusal("internal_error", "The sidecar failed."))
        answer.force_close()
        return answer

    def log_access(self, request: web.BaseRequest, response: web.StreamResponse, time: float | None) -> None:
        """aiohttp tells this of every answer once it ended or broke off, whoever made it."""
        self._on_ended(request, response)

    def _watch_head(self) -> None:
        self._head_timer = self._loop.call_later(self._head_seconds, self._head_too_late)

    def _stop_watching(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_too_late(self) -> None:
        self._head_timer = None
        if self._current_request is None and not self._messages:
            self.force_close()


class DataServer(web.Server):
    """Makes one `DataConnection` a connection. Bodies are never decompressed, handlers never cancelled."""

    def __init__(self, handler: Handler, *, on_ended: Ended, head_timeout_seconds: float) -> None:
        super().__init__(handler)
        self.on_ended = on_ended
        self.head_timeout_seconds = head_timeout_seconds

    def __call__(self) -> RequestHandler:
        return DataConnection(
            self,
            loop=self._loop,
            access_log=None,
            auto_decompress=False,
            keepalive_timeout=KEEP_ALIVE_SECONDS,
            lingering_time=1.0,
            max_line_size=MAX_LINE_BYTES,
            max_field_size=MAX_HEADER_BYTES,
        )
