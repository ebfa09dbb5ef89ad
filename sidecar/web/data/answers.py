"""Writes the upstream's answer to the client byte for byte, and adds, renames and re-encodes nothing.

aiohttp's own responses add Date, Server and Content-Type, and drop header bytes that are not UTF-8. This
response writes its head itself. It relies on two internals of aiohttp 3.14: `StreamResponse._start` and the
header buffer of `StreamWriter`. Tests in tests/gate fail if they change.
"""

from __future__ import annotations

from typing import cast

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http_writer import StreamWriter

from sidecar.web.wire.headers import Headers, unframed

_BODILESS = frozenset({204, 304})


class RawAnswer(web.StreamResponse):
    """An answer whose head is given as bytes. `content_length` None: the length of the body is not known."""

    def __init__(
        self, status: int, reason: bytes, headers: Headers, *, content_length: int | None, close: bool = False
    ) -> None:
        super().__init__(status=status)
        self._raw_reason = reason
        self._raw_headers = unframed(status, headers)
        self._raw_length = content_length
        self._close_after = close
        self.ends_with_connection = False  # the body is delimited by connection close

    async def _start(self, request: web.BaseRequest) -> AbstractStreamWriter:
        self._req = request
        writer = self._payload_writer = request._payload_writer
        stream = cast(StreamWriter, writer)
        keep_alive = request.keep_alive and not self._close_after
        version = request.version
        lines = [b"HTTP/%d.%d %d %b" % (version[0], version[1], self.status, self._raw_reason)]
        lines += [b"%b: %b" % header for header in self._raw_headers]
        if not (request.method == "HEAD" or self.status in _BODILESS or self.status < 200):
            if self._raw_length is not None:
                stream.length = self._raw_length
            elif version >= (1, 1):
                stream.enable_chunking()
                lines.append(b"Transfer-Encoding: chunked")
            else:
                self.ends_with_connection = True
                keep_alive = False
        if keep_alive and version == (1, 0):
            lines.append(b"Connection: keep-alive")
        elif not keep_alive and version == (1, 1):
            lines.append(b"Connection: close")
        self._keep_alive = keep_alive
        # The head stays in the writer's buffer, so that a small body leaves in the same packet.
        stream._headers_buf = b"\r\n".join(lines) + b"\r\n\r\n"
        stream._headers_written = False
        return writer

    def send_head(self) -> None:
        """Send the head now, before any byte of the body has arrived."""
        if self._payload_writer is not None:
            self._payload_writer.send_headers()

    def mark_ended(self) -> None:
        """Write nothing more, because a tunnel took the connection over, or because it is being cut."""
        self._eof_sent = True
        self._keep_alive = False
