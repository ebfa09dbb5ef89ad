"""The heads of answers: how one is read, and what it says.

llhttp reads a head, piece by piece as packets bring it. A head that arrives whole is looked up first: under
load an upstream repeats its heads until their Date changes.
"""

from __future__ import annotations

import re
from typing import Final

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

from sidecar.core.cache import Cache

FRAMING = frozenset({b"content-length", b"transfer-encoding", b"upgrade"})
FRAMING_SIZES = frozenset(map(len, FRAMING))  # cheaper to look up than a name in lower case

_VERSIONS = {"1.0": (1, 0), "1.1": (1, 1)}
_REASON = re.compile(rb"[\t\x20-\x7e\x80-\xff]*")
_MAX_HEADS = 64
_MAX_CACHED_BYTES = 2048


class AnswerHead:
    """The head of an answer, with the reason and the headers as the bytes that arrived.

    `content_length` is the number in its Content-Length, and None if it has none. `codings` and `upgrades`
    are the values of Transfer-Encoding and Upgrade, in lower case. `keep_alive` says whether the connection
    may carry another exchange. Answers with the same head may share one value.
    """

    __slots__ = (
        "codings",
        "content_length",
        "headers",
        "keep_alive",
        "reason",
        "status",
        "upgrades",
        "version",
    )

    def __init__(
        self,
        status: int,
        reason: bytes,
        headers: tuple[tuple[bytes, bytes], ...],
        version: tuple[int, int],
        *,
        content_length: int | None,
        codings: tuple[bytes, ...],
        upgrades: tuple[bytes, ...],
        keep_alive: bool,
    ) -> None:
        self.status: Final = status
        self.reason: Final = reason
        self.headers: Final = headers
        self.version: Final = version
        self.content_length: Final = content_length
        self.codings: Final = codings
        self.upgrades: Final = upgrades
        self.keep_alive: Final = keep_alive


class MalformedHead(Exception):
    """The bytes are no head that has one reading. The text says why, and quotes nothing of them."""


class HeadReader:
    """Reads one head with llhttp. httptools calls the `on_` methods."""

    def __init__(self) -> None:
        self._http: HttpResponseParser | None = HttpResponseParser(self)
        self._status: int | None = None  # set once llhttp has read the head
        self._reason, self._keep_alive = b"", False
        self._headers: list[tuple[bytes, bytes]] = []

    def feed(self, piece: bytes, *, last: bool) -> AnswerHead | None:
        """Read the next bytes. The `last` ones end with the empty line; only then a head is returned.

        Raises MalformedHead.
        """
        http = self._http
        assert http is not None
        try:
            http.feed_data(piece)
        except HttpParserUpgrade:
            pass  # llhttp has read the head; the caller decides whether the upstream may switch
        except HttpParserError as exc:
            self._http = None
            raise MalformedHead(str(exc)) from exc
        if self._status is None and not last:
            return None
        # llhttp's parser refers back to this reader. Dropping it breaks the cycle, so that an exchange is
        # freed without the cycle collector.
        self._http = None
        if self._status is None or not last:
            raise MalformedHead("its head does not end in an empty line")
        return self._judged(self._status, http.get_http_version())

    def on_status(self, reason: bytes) -> None:
        self._reason += reason  # httptools calls this once for each part if packets split the reason

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        assert self._http is not None
        self._status, self._keep_alive = self._http.get_status_code(), self._http.should_keep_alive()

    def _judged(self, status: int, version: str) -> AnswerHead:
        if not 100 <= status <= 599 or version not in _VERSIONS:
            raise MalformedHead(f"HTTP version {version}, status {status}")
        if _REASON.fullmatch(self._reason) is None:
            raise MalformedHead("a control character in its reason")
        lengths: list[bytes] = []
        codings: list[bytes] = []
        upgrades: list[bytes] = []
        headers = self._headers
        for place, (name, value) in enumerate(headers):
            if len(name) in FRAMING_SIZES and (known := name.lower()) in FRAMING:
                stripped = value.strip(b" \t")
                if known == b"content-length":
                    lengths.append(stripped)
                    # Other parsers may not read a value with white space as a number.
                    headers[place] = name, stripped
                elif known == b"transfer-encoding":
                    codings.append(stripped.lower())
                else:
                    upgrades.append(stripped.lower())
        if len(lengths) > 1 or (lengths and not lengths[0].isdigit()):
            raise MalformedHead("not one Content-Length that is a number")
        return AnswerHead(
            status,
            self._reason,
            tuple(headers),
            _VERSIONS[version],
            content_length=int(lengths[0]) if lengths else None,
            codings=tuple(codings),
            upgrades=tuple(upgrades),
            keep_alive=self._keep_alive,
        )


def _read_whole(raw: bytes) -> AnswerHead:
    head = HeadReader().feed(raw, last=True)
    assert head is not None
    return head


# By the bytes of a whole head, with its empty line. Raises MalformedHead.
whole_heads = Cache(_read_whole, max_entries=_MAX_HEADS, max_size=_MAX_CACHED_BYTES)
