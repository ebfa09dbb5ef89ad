"""The parser of answers, which does no I/O, and the errors for a request without an answer.

An earlier parser kept two flags, "complete" and "failed". One step could set both, and each flag then made
its reader assume that the other one had been handled. The rules below exclude that.

1. An answer is in one `AnswerState` at a time, and `COMPLETE` and `FAILED` are two of them. A step leads to
   one state; the two that end it are never left.
2. A head is judged when it is whole, and shown only once it is accepted. An answer that fails has no head
   and no body any more: its bytes that were not taken yet are dropped.
3. Packets decide nothing. A head reaches llhttp cut off at its empty line, so that nothing behind it is read
   before it is judged. What bounds heads, chunk lines and trailers is counted by the byte.
4. llhttp reads heads only; where the body ends is decided here, from headers that allow one reading:
   at most one Content-Length, or `chunked` alone, or the end of the connection. A body that two parsers
   could end in two places is refused.
5. An interim answer (1xx) has no body. A 101 is accepted only from an upstream that was offered a protocol,
   and only for that one.
6. Bytes behind a complete answer are not part of it. They keep its connection from being used again.
"""

from __future__ import annotations

import re
from enum import Enum

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

from sidecar.errors import ScopegateError

# The limit for all heads of one answer together, and for framing (chunk lines, trailers) between body bytes.
MAX_HEAD_BYTES = 64 * 1024
_PIECE = 64  # about Python's own overhead for one piece; counting it keeps tiny chunks from being free

_FIRST_BYTE = ord("H")
_VERSIONS = {"1.0": (1, 0), "1.1": (1, 1)}
_EMPTY_LINE = b"\r\n\r\n"
FRAMING = frozenset({b"content-length", b"transfer-encoding", b"upgrade"})
FRAMING_SIZES = frozenset(map(len, FRAMING))
_TEXT = rb"[\t\x20-\x7e\x80-\xff]*"
_REASON = re.compile(_TEXT)
_CHUNK_LINE_WHOLE = re.compile(rb"([0-9A-Fa-f]{1,16})(?:;" + _TEXT + rb")?")
_CHUNK_END_WHOLE = re.compile(rb"")
_TRAILER_WHOLE = re.compile(rb"(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:" + _TEXT + rb")?")
# The valid beginnings of an unfinished framing line. The parser checks the first bytes of a line, so that it
# refuses garbage at once instead of waiting for a line end that may never come.
_BEGUN = 32
_CHUNK_LINE_BEGUN = re.compile(rb"[0-9A-Fa-f]{1,16}(?:;" + _TEXT + rb")?\r?")
_CHUNK_END_BEGUN = re.compile(rb"\r?")
_TRAILER_BEGUN = re.compile(rb"\r|[!#$%&'*+.^_`|~0-9A-Za-z-]+(?::" + _TEXT + rb"\r?)?")


class NotSent(ScopegateError):
    """No byte of the request was sent: the connection was refused, impossible, too late or already closed."""


class Unanswered(ScopegateError):
    """Bytes of the request may have been sent, and no whole answer arrived."""


class TimedOut(Unanswered):
    """The head of the answer did not arrive before its deadline."""


class Failed(Unanswered):
    """The exchange was reset, cut off, malformed or given up."""


class AnswerHead:
    """The head of an answer, with the reason and the headers as the bytes that arrived.

    `content_length` is the number in its Content-Length, and None if it has none.
    """

    __slots__ = ("content_length", "headers", "reason", "status", "version")

    def __init__(
        self,
        status: int,
        reason: bytes,
        headers: tuple[tuple[bytes, bytes], ...],
        version: tuple[int, int],
        content_length: int | None,
    ) -> None:
        self.status, self.reason, self.headers = status, reason, headers
        self.version, self.content_length = version, content_length


class AnswerState(Enum):
    """What the parser expects next, or how the answer ended."""

    HEAD = "a head"  # of the answer, or of the next one after an interim answer
    COUNTED = "a body of known length"
    CHUNK_LINE = "a chunk size"
    CHUNK = "a chunk"
    CHUNK_END = "the end of a chunk"
    TRAILERS = "a trailer or the empty line"
    UNTIL_EOF = "a body that ends with the connection"
    TUNNEL = "another protocol"
    COMPLETE = "complete"
    FAILED = "failed"  # `fault` says why


# Python 3.11 looks up a member of an Enum in Python code, so the parser does it once.
_HEAD, _COUNTED, _UNTIL_EOF = AnswerState.HEAD, AnswerState.COUNTED, AnswerState.UNTIL_EOF
_CHUNK_LINE, _CHUNK, _CHUNK_END = AnswerState.CHUNK_LINE, AnswerState.CHUNK, AnswerState.CHUNK_END
_TRAILERS, _TUNNEL = AnswerState.TRAILERS, AnswerState.TUNNEL
_COMPLETE, _FAILED = AnswerState.COMPLETE, AnswerState.FAILED


class AnswerParser:
    """Parses one answer from the bytes of its connection, without I/O. httptools calls the `on_` methods."""

    # Every exchange makes a parser, so the first values stand here, where making one does not cost anything.
    state = _HEAD
    fault = ""
    cause: BaseException | None = None
    head: AnswerHead | None = None
    waiting = 0  # size of the pieces, with an overhead for each
    tunnel = False  # the upstream switched protocols; stays set after the end
    reusable = False  # the connection can carry another exchange
    _http: HttpResponseParser | None = None  # parses the head that has begun
    _seam = b""  # the last bytes of that head so far; its empty line may have begun in them
    _status: int | None = None  # status of a head that llhttp has read
    _reason, _keep_alive = b"", False
    _overhead = 0  # bytes of heads, or of framing since the last body byte
    _left = 0  # bytes that remain of the body or the chunk
    _line: bytearray  # the unfinished framing line

    def __init__(self, bodyless: bool, offer: bytes | None) -> None:
        """`bodyless`: the request was a HEAD. `offer`: the protocol that the upstream may switch to."""
        self.pieces: list[bytes] = []
        self._bodyless, self._offer = bodyless, offer
        self._headers: list[tuple[bytes, bytes]] = []

    @property
    def complete(self) -> bool:
        return self.state is _COMPLETE

    @property
    def until_eof(self) -> bool:
        """Whether the end of the connection is the proper end of the answer."""
        return self.state is _UNTIL_EOF or self.state is _TUNNEL

    def feed(self, data: bytes) -> AnswerState:
        """Parse bytes that arrived, and return the new state of the answer."""
        at, size, state = 0, len(data), self.state
        while at < size:
            if state is _HEAD:
                at = self._take_head(data, at)
            elif state is _COUNTED or state is _CHUNK:
                at = self._take_counted(data, at)
            elif state is _UNTIL_EOF or state is _TUNNEL:
                at = self._keep(data, at, size)
            elif state is _COMPLETE or state is _FAILED:
                self.reusable = False  # rule 6: bytes follow a complete answer
                break
            else:
                at = self._take_line(data, at)
            state = self.state
        return state

    def end(self) -> AnswerState:
        """Handle the end of the connection, which the caller trusts to be the upstream's own."""
        if self.until_eof:
            self.state = _COMPLETE
        elif self.state is not _COMPLETE and self.state is not _FAILED:
            self._fail("it ends early")
        return self.state

    def take(self) -> bytes:
        taken = self.pieces[0] if len(self.pieces) == 1 else b"".join(self.pieces)
        self.pieces.clear()
        self.waiting = 0
        return taken

    # The head ----------------------------------------------------------------------------------

    def _take_head(self, data: bytes, at: int) -> int:
        """Parse a head up to its empty line. Judge it once it is whole."""
        http, seam = self._http, self._seam
        if http is None:
            if data[at] != _FIRST_BYTE:
                return self._fail("it does not begin with HTTP")  # llhttp would skip empty lines
            http = self._http = HttpResponseParser(self)
        if seam and (found := (seam + data[at : at + 3]).find(_EMPTY_LINE)) >= 0:
            end = at + found - len(seam) + 4
        elif (found := data.find(_EMPTY_LINE, at)) >= 0:
            end = found + 4
        else:
            end = len(data)
        self._overhead += end - at
        if self._overhead > MAX_HEAD_BYTES:
            return self._fail(f"more than {MAX_HEAD_BYTES} bytes of head")
        piece = data[at:end]
        try:
            http.feed_data(piece)
        except HttpParserUpgrade:
            pass  # llhttp has read the head; `_judge` decides whether the upstream may switch
        except HttpParserError as exc:
            return self._fail(str(exc), exc)
        status = self._status
        if (status is None) == (found >= 0):
            return self._fail("its head does not end in an empty line")
        if status is None:
            self._seam = (seam + piece[-3:])[-3:]
            return end
        # llhttp's parser refers back to this one. Dropping it breaks the cycle, so that an exchange is freed
        # without the cycle collector.
        self._http = None
        begun_here = not seam and piece.startswith(b"HTTP/1.1 ")
        self._judge(status, "1.1" if begun_here else http.get_http_version())
        if self.state is _HEAD:  # it was an interim answer
            self._seam, self._status, self._reason, self._headers = b"", None, b"", []
        return end

    def on_status(self, reason: bytes) -> None:
        self._reason += reason  # httptools calls this once for each part if packets split the reason

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        http = self._http
        assert http is not None
        self._status, self._keep_alive = http.get_status_code(), http.should_keep_alive()

    def _judge(self, status: int, version: str) -> int | None:
        """Accept a whole head or fail. The next state follows from its framing headers."""
        if not 100 <= status <= 599 or version not in _VERSIONS:
            return self._fail(f"HTTP version {version}, status {status}")
        reason, headers = self._reason, self._headers
        if _REASON.fullmatch(reason) is None:
            return self._fail("a control character in its reason")
        lengths: list[bytes] = []
        codings: list[bytes] = []
        upgrades: list[bytes] = []
        for index, (name, value) in enumerate(headers):
            if len(name) in FRAMING_SIZES and (known := name.lower()) in FRAMING:
                value = value.strip(b" \t")
                if known == b"content-length":
                    # Without the white space, because other parsers may not read a value with it as a number.
                    headers[index] = name, value
                    lengths.append(value)
                elif known == b"transfer-encoding":
                    codings.append(value.lower())
                else:
                    upgrades.append(value.lower())
        if len(lengths) > 1 or (lengths and not lengths[0].isdigit()):
            return self._fail(f"Content-Length {b', '.join(lengths)!r}")
        length = int(lengths[0]) if lengths else None
        if status < 200:
            if length or codings:
                return self._fail(f"status {status} with a body")
            if status != 101:
                return None
            if self._offer is None or upgrades != [self._offer.strip().lower()]:
                return self._fail("it switches to a protocol that was not offered")
        bodyless = self._bodyless or status in (204, 304)
        if codings and not bodyless and (lengths or codings != [b"chunked"]):
            # The client could not undo another coding, because this header goes no further.
            return self._fail(f"Transfer-Encoding {b', '.join(codings)!r}" + " with a length" * bool(lengths))
        self.head = AnswerHead(status, reason, tuple(headers), _VERSIONS[version], length)
        self.reusable = self._keep_alive and version == "1.1"
        self._overhead = 0
        if status == 101:
            self.state, self.tunnel = _TUNNEL, True
        elif bodyless or length == 0:
            self.state = _COMPLETE
        elif codings:
            self.state, self._line = _CHUNK_LINE, bytearray()
        elif length is not None:
            self.state, self._left = _COUNTED, length
        else:
            self.state = _UNTIL_EOF
        return None

    # The body ----------------------------------------------------------------------------------

    def _keep(self, data: bytes, at: int, end: int) -> int:
        self.pieces.append(data[at:end])
        self.waiting += end - at + _PIECE
        self._overhead = 0
        return end

    def _take_counted(self, data: bytes, at: int) -> int:
        end = min(len(data), at + self._left)
        self._left -= end - at
        self._keep(data, at, end)
        if not self._left:
            self.state = _COMPLETE if self.state is _COUNTED else _CHUNK_END
        return end

    def _take_line(self, data: bytes, at: int) -> int:
        """Parse a framing line. The next state follows once the line is whole."""
        found = data.find(b"\n", at)
        end = found + 1 if found >= 0 else len(data)
        self._overhead += end - at
        if self._overhead > MAX_HEAD_BYTES:
            return self._fail(f"more than {MAX_HEAD_BYTES} bytes of chunk lines or trailers")
        self._line += data[at:end]
        whole, begun = _LINES[self.state]
        if found < 0:
            if len(self._line) <= _BEGUN and begun.fullmatch(self._line) is None:
                return self._fail(f"{bytes(self._line)!r} where {self.state.value} is expected")
            return end
        line = bytes(self._line)
        self._line.clear()
        match = whole.fullmatch(line, 0, len(line) - 2)
        if match is None or not line.endswith(b"\r\n"):
            return self._fail(f"{line[:_BEGUN]!r} where {self.state.value} is expected")
        if self.state is _CHUNK_LINE:
            self._left = int(match[1], 16)
            self.state = _CHUNK if self._left else _TRAILERS
        elif self.state is _CHUNK_END:
            self.state = _CHUNK_LINE
        elif len(line) == 2:
            self.state = _COMPLETE
        return end

    def _fail(self, fault: str, cause: BaseException | None = None) -> int:
        """Fail the answer and drop its head and body. Return 0, because `feed` parses nothing more."""
        self.state, self.fault, self.cause = _FAILED, fault, cause
        self.head = self._http = None
        self.reusable = False
        self.pieces.clear()
        self.waiting = 0
        return 0


_LINES = {
    _CHUNK_LINE: (_CHUNK_LINE_WHOLE, _CHUNK_LINE_BEGUN),
    _CHUNK_END: (_CHUNK_END_WHOLE, _CHUNK_END_BEGUN),
    _TRAILERS: (_TRAILER_WHOLE, _TRAILER_BEGUN),
}
