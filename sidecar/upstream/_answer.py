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

from sidecar.errors import ScopegateError
from sidecar.upstream._head import AnswerHead, HeadReader, MalformedHead, whole_heads

# The limit for all heads of one answer together, and for framing (chunk lines, trailers) between body bytes.
MAX_HEAD_BYTES = 64 * 1024
_PIECE = 64  # about Python's own overhead for one piece; counting it keeps tiny chunks from being free

_FIRST_BYTE = ord("H")
_EMPTY_LINE = b"\r\n\r\n"
_TEXT = rb"[\t\x20-\x7e\x80-\xff]*"
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

    __hash__ = object.__hash__  # Enum's own one is Python code


# Python 3.11 looks up a member of an Enum in Python code, so the parser does it once.
_HEAD, _COUNTED, _UNTIL_EOF = AnswerState.HEAD, AnswerState.COUNTED, AnswerState.UNTIL_EOF
_CHUNK_LINE, _CHUNK, _CHUNK_END = AnswerState.CHUNK_LINE, AnswerState.CHUNK, AnswerState.CHUNK_END
_TRAILERS, _TUNNEL = AnswerState.TRAILERS, AnswerState.TUNNEL
_COMPLETE, _FAILED = AnswerState.COMPLETE, AnswerState.FAILED


class AnswerParser:
    """Parses one answer from the bytes of its connection, without I/O."""

    # Every exchange makes a parser, so the first values stand here, where making one does not cost anything.
    state = _HEAD
    fault = ""
    cause: BaseException | None = None
    head: AnswerHead | None = None
    waiting = 0  # size of the pieces, with an overhead for each
    tunnel = False  # the upstream switched protocols; stays set after the end
    reusable = False  # the connection can carry another exchange
    _reader: HeadReader | None = None  # of the head that has begun
    _seam = b""  # the last bytes of that head so far; its empty line may have begun in them
    _overhead = 0  # bytes of heads, or of framing since the last body byte
    _left = 0  # bytes that remain of the body or the chunk
    _line: bytearray  # the unfinished framing line

    def __init__(self, bodyless: bool, offer: bytes | None) -> None:
        """`bodyless`: the request was a HEAD. `offer`: the protocol that the upstream may switch to."""
        self.pieces: list[bytes] = []
        self._bodyless, self._offer = bodyless, offer

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
        reader, seam = self._reader, self._seam
        if reader is None and data[at] != _FIRST_BYTE:
            return self._fail("it does not begin with HTTP")  # llhttp would skip empty lines
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
            if reader is None and found >= 0:
                self._judge(whole_heads[piece])
                return end
            if reader is None:
                reader = self._reader = HeadReader()
            head = reader.feed(piece, last=found >= 0)
        except MalformedHead as exc:
            return self._fail(str(exc), exc.__cause__)
        if head is None:
            self._seam = (seam + piece[-3:])[-3:]
        else:
            self._reader, self._seam = None, b""
            self._judge(head)
        return end

    def _judge(self, head: AnswerHead) -> int | None:
        """Accept a head or fail. The next state follows from its framing."""
        status, length, codings = head.status, head.content_length, head.codings
        if status < 200:
            if length or codings:
                return self._fail(f"status {status} with a body")
            if status != 101:
                return None
            if self._offer is None or head.upgrades != (self._offer.strip().lower(),):
                return self._fail("it switches to a protocol that was not offered")
        bodyless = self._bodyless or status == 204 or status == 304
        if codings and not bodyless and (length is not None or codings != (b"chunked",)):
            # The client could not undo another coding, because this header goes no further.
            with_length = "a Transfer-Encoding with a length"
            return self._fail("not one Transfer-Encoding: chunked" if length is None else with_length)
        self.head = head
        self.reusable = head.keep_alive and head.version == (1, 1)
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
        end, size = at + self._left, len(data)
        if end > size:
            self._left, end = end - size, size
        else:
            self.state = _COMPLETE if self.state is _COUNTED else _CHUNK_END
        return self._keep(data, at, end)

    def _take_line(self, data: bytes, at: int) -> int:
        """Parse a framing line. The next state follows once the line is whole."""
        found = data.find(b"\n", at)
        end = found + 1 if found >= 0 else len(data)
        self._overhead += end - at
        if self._overhead > MAX_HEAD_BYTES:
            return self._fail(f"more than {MAX_HEAD_BYTES} bytes of chunk lines or trailers")
        state, line, unfinished = self.state, data[at:end], self._line
        whole, begun = _LINES[state]
        if found < 0:
            unfinished += line
            if len(unfinished) <= _BEGUN and begun.fullmatch(unfinished) is None:
                return self._fail(f"other bytes where {state.value} is expected")
            return end
        if unfinished:
            line = bytes(unfinished) + line
            unfinished.clear()
        match = whole.fullmatch(line, 0, len(line) - 2)
        if match is None or not line.endswith(b"\r\n"):
            return self._fail(f"other bytes where {state.value} is expected")
        if state is _CHUNK_LINE:
            self._left = int(match[1], 16)
            self.state = _CHUNK if self._left else _TRAILERS
        elif state is _CHUNK_END:
            self.state = _CHUNK_LINE
        elif len(line) == 2:
            self.state = _COMPLETE
        return end

    def _fail(self, fault: str, cause: BaseException | None = None) -> int:
        """Fail the answer and drop its head and body. Return 0, because `feed` parses nothing more.

        `fault` is recorded, logged and answered, so it quotes nothing of the answer: a backend may send back
        a credential that only the sidecar holds.
        """
        self.state, self.fault, self.cause = _FAILED, fault, cause
        self.head = self._reader = None
        self.reusable = False
        self.pieces.clear()
        self.waiting = 0
        return 0


_LINES = {
    _CHUNK_LINE: (_CHUNK_LINE_WHOLE, _CHUNK_LINE_BEGUN),
    _CHUNK_END: (_CHUNK_END_WHOLE, _CHUNK_END_BEGUN),
    _TRAILERS: (_TRAILER_WHOLE, _TRAILER_BEGUN),
}
