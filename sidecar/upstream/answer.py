"""Bytes in, one answer out. No I/O. And what can be said of a request that got none."""

from __future__ import annotations

from dataclasses import dataclass

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

from sidecar.errors import ScopegateError

_MAX_HEAD = 64 * 1024
_PIECE = 64  # about what Python itself needs for one piece, so that tiny chunks are not free


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


class AnswerParser:
    """Bytes in, one answer out; no I/O. The `on_` methods are those that httptools calls."""

    __slots__ = (
        "_barren",
        "_bodyless",
        "_fault",
        "_headers",
        "_http",
        "_may_upgrade",
        "_reason",
        "complete",
        "head",
        "pieces",
        "reusable",
        "tunnel",
        "until_eof",
        "waiting",
    )

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
