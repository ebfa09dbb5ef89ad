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
from dataclasses import dataclass
from enum import Enum

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

from sidecar.errors import ScopegateError

# The limit for all heads of one answer together, and for framing (chunk lines, trailers) between body bytes.
MAX_HEAD_BYTES = 64 * 1024
_PIECE = 64  # about Python's own overhead for one piece; counting it keeps tiny chunks from being free

_EMPTY_LINE = b"\r\n\r\n"
_TEXT = rb"[\t\x20-\x7e\x80-\xff]*"
_REASON = re.compile(_TEXT)
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,16})(?:;" + _TEXT + rb")?")
_CHUNK_END = re.compile(rb"")
_TRAILER = re.compile(rb"(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:" + _TEXT + rb")?")
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


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerHead:
    """The head of an answer, with the reason and the headers as the bytes that arrived."""

    status: int
    reason: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    version: tuple[int, int]


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


_ENDED = (AnswerState.COMPLETE, AnswerState.FAILED)


class AnswerParser:
    """Parses one answer from the bytes of its connection, without I/O. httptools calls the `on_` methods."""

    def __init__(self, bodyless: bool, offer: bytes | None) -> None:
        """`bodyless`: the request was a HEAD. `offer`: the protocol that the upstream may switch to."""
        self.state = AnswerState.HEAD
        self.fault = ""
        self.cause: BaseException | None = None
        self.head: AnswerHead | None = None
        self.pieces: list[bytes] = []
        self.waiting = 0  # size of the pieces, with an overhead for each
        self.tunnel = False  # the upstream switched protocols; stays set after the end
        self.reusable = False  # the connection can carry another exchange
        self._bodyless, self._offer = bodyless, offer
        self._http: HttpResponseParser | None = None  # parses the head that has begun
        self._seam = b""  # the last bytes of that head so far; its empty line may have begun in them
        self._status: int | None = None  # status of a head that llhttp has read
        self._version, self._reason, self._keep_alive = "", b"", False
        self._headers: list[tuple[bytes, bytes]] = []
        self._overhead = 0  # bytes of heads, or of framing since the last body byte
        self._left = 0  # bytes that remain of the body or the chunk
        self._line = bytearray()  # the unfinished framing line

    @property
    def complete(self) -> bool:
        return self.state is AnswerState.COMPLETE

    @property
    def until_eof(self) -> bool:
        """Whether the end of the connection is the proper end of the answer."""
        return self.state in (AnswerState.UNTIL_EOF, AnswerState.TUNNEL)

    def feed(self, data: bytes) -> AnswerState:
        """Parse bytes that arrived, and return the new state of the answer."""
        at, size = 0, len(data)
        while at < size and self.state not in _ENDED:
            if self.state is AnswerState.HEAD:
                at = self._take_head(data, at)
            elif self.state in (AnswerState.UNTIL_EOF, AnswerState.TUNNEL):
                at = self._keep(data, at, size)
            elif self.state in (AnswerState.COUNTED, AnswerState.CHUNK):
                at = self._take_counted(data, at)
            else:
                at = self._take_line(data, at)
        if at < size:
            self.reusable = False  # rule 6: bytes follow a complete answer
        return self.state

    def end(self) -> AnswerState:
        """Handle the end of the connection, which the caller trusts to be the upstream's own."""
        if self.until_eof:
            self.state = AnswerState.COMPLETE
        elif self.state not in _ENDED:
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
        if self._http is None:
            if data[at] != ord("H"):
                return self._fail("it does not begin with HTTP")  # llhttp would skip empty lines
            self._http = HttpResponseParser(self)
        seam = self._seam + data[at : at + 3]
        if (found := seam.find(_EMPTY_LINE)) >= 0:
            end = at + found - len(self._seam) + 4
        elif (found := data.find(_EMPTY_LINE, at)) >= 0:
            end = found + 4
        else:
            end = len(data)
        self._overhead += end - at
        if self._overhead > MAX_HEAD_BYTES:
            return self._fail(f"more than {MAX_HEAD_BYTES} bytes of head")
        piece = data[at:end]
        try:
            self._http.feed_data(piece)
        except HttpParserUpgrade:
            pass  # llhttp has read the head; `_judge` decides whether the upstream may switch
        except HttpParserError as exc:
            return self._fail(str(exc), exc)
        if (self._status is None) == (found >= 0):
            return self._fail("its head does not end in an empty line")
        self._seam = b"" if found >= 0 else (self._seam + piece[-3:])[-3:]
        if self._status is not None:
            # llhttp's parser refers back to this one. Dropping it breaks the cycle, so that an exchange is
            # freed without the cycle collector.
            self._http = None
            self._judge(self._status)
            self._status, self._reason, self._headers = None, b"", []
        return end

    def on_status(self, reason: bytes) -> None:
        self._reason += reason  # httptools calls this once for each part if packets split the reason

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        assert self._http is not None
        self._status, self._version = self._http.get_status_code(), self._http.get_http_version()
        self._keep_alive = self._http.should_keep_alive()

    def _judge(self, status: int) -> int | None:
        """Accept a whole head or fail. The next state follows from its framing headers."""
        version = self._version
        if not 100 <= status <= 599 or version not in ("1.0", "1.1"):
            return self._fail(f"HTTP version {version}, status {status}")
        if _REASON.fullmatch(self._reason) is None:
            return self._fail("a control character in its reason")
        lengths, codings, upgrades = [], [], []
        for index, (name, value) in enumerate(self._headers):
            size = len(name)
            if size == 14 and name.lower() == b"content-length":
                # Strip white space, because other parsers may not read a value with it as a number.
                self._headers[index] = name, value.strip(b" \t")
                lengths.append(value.strip(b" \t"))
            elif size == 17 and name.lower() == b"transfer-encoding":
                codings.append(value.strip(b" \t").lower())
            elif size == 7 and name.lower() == b"upgrade":
                upgrades.append(value.strip(b" \t").lower())
        if len(lengths) > 1 or not all(map(bytes.isdigit, lengths)):
            return self._fail(f"Content-Length {b', '.join(lengths)!r}")
        length = int(lengths[0]) if lengths else None
        if status < 200 and (length or codings):
            return self._fail(f"status {status} with a body")
        if status < 200 and status != 101:
            return None
        bodyless = self._bodyless or status in (204, 304)
        if codings and not bodyless and (lengths or codings != [b"chunked"]):
            # The client could not undo another coding, because this header goes no further.
            return self._fail(f"Transfer-Encoding {b', '.join(codings)!r}" + " with a length" * bool(lengths))
        if status == 101 and (self._offer is None or upgrades != [self._offer.strip().lower()]):
            return self._fail("it switches to a protocol that was not offered")
        self.head = AnswerHead(
            status=status, reason=self._reason, headers=tuple(self._headers), version=(1, int(version[2]))
        )
        self.reusable = version == "1.1" and self._keep_alive
        self._overhead = 0
        if status == 101:
            self.state, self.tunnel = AnswerState.TUNNEL, True
        elif bodyless or length == 0:
            self.state = AnswerState.COMPLETE
        elif codings:
            self.state = AnswerState.CHUNK_LINE
        elif length is not None:
            self.state, self._left = AnswerState.COUNTED, length
        else:
            self.state = AnswerState.UNTIL_EOF
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
            self.state = AnswerState.COMPLETE if self.state is AnswerState.COUNTED else AnswerState.CHUNK_END
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
        if self.state is AnswerState.CHUNK_LINE:
            self._left = int(match[1], 16)
            self.state = AnswerState.CHUNK if self._left else AnswerState.TRAILERS
        elif self.state is AnswerState.CHUNK_END:
            self.state = AnswerState.CHUNK_LINE
        elif len(line) == 2:
            self.state = AnswerState.COMPLETE
        return end

    def _fail(self, fault: str, cause: BaseException | None = None) -> int:
        """Fail the answer and drop its head and body. Return 0, because `feed` parses nothing more."""
        self.state, self.fault, self.cause = AnswerState.FAILED, fault, cause
        self.head = self._http = None
        self.reusable = False
        self.pieces.clear()
        self.waiting = 0
        return 0


_LINES = {
    AnswerState.CHUNK_LINE: (_CHUNK_LINE, _CHUNK_LINE_BEGUN),
    AnswerState.CHUNK_END: (_CHUNK_END, _CHUNK_END_BEGUN),
    AnswerState.TRAILERS: (_TRAILER, _TRAILER_BEGUN),
}
