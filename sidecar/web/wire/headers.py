"""Which headers go on and which end here.

1. Headers of one connection end here (RFC 9110, section 7.6.1), and so do those that `Connection` names. It
   cannot name the headers that say where a message goes and where it ends: without them the backend would
   see another request than the one that was judged.
2. An offer to switch protocols is such a header. Java's HttpClient offers h2c with its first request, and
   goes on in HTTP/1.1 where the offer is not accepted. So the offer is dropped and the request goes on.
3. All other headers go on as the bytes that came, in their order. A value that is decoded and encoded again
   may arrive as another one: aiohttp, for example, drops bytes that are not UTF-8 when it writes a header.
4. Only the sidecar sends `Scopegate-*`. The names are compared as the most careless server reads them.
5. An answer with the status 204 or 1xx has no body, so nothing may frame one: a client that believes a length
   there would take the next answer for that body.

Programs send nearly always the same header names in the same order. What follows from the names alone is
therefore cached as a `_Layout`, and `HeaderFields` answers most questions without a walk over the headers.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Protocol

from sidecar.core import headernames
from sidecar.core.cache import Cache
from sidecar.core.headernames import is_our_own
from sidecar.core.targetheaders import decides, read_as

Headers = Sequence[tuple[bytes, bytes]]

# Where a request that is no call of the sidecar has its bearer token. It never goes on.
CREDENTIAL = "scopegate-authorization"
HOP_BY_HOP = frozenset(name.encode() for name in headernames.HOP_BY_HOP)
_FRAMING = frozenset({b"content-length", b"transfer-encoding"})
# Headers that Connection cannot remove, because they say where a message goes and how its body is read.
_NEVER_STRIPPED = frozenset({b"host", b"content-length", b"content-type"})
_NOTHING: frozenset[bytes] = frozenset()

# The lists of names whose layout is cached: the most of them, and the most bytes of one.
MAX_LAYOUTS = 512
MAX_LAYOUT_BYTES = 1024
# The values of Connection that are cached, alike.
MAX_OPTIONS = 256
MAX_OPTIONS_BYTES = 64


@dataclass(frozen=True, slots=True)
class _Layout:
    """What follows from the names of a message's headers. A tuple has one item for each header."""

    places: dict[bytes, tuple[int, ...]]  # by name in lower case
    deciding: tuple[tuple[int, str], ...]  # the place and name of each header that `classify` looks at
    lasting: tuple[bool, ...]  # whether it is not hop-by-hop
    read: dict[str, tuple[int, ...]]  # places by the name as the most careless server reads it
    ours: tuple[int, ...]  # the places of the credential for the sidecar
    foreign: tuple[bool, ...]  # whether it is neither hop-by-hop nor `Scopegate-*`


def _layout_of(names: tuple[bytes, ...]) -> _Layout:
    places: dict[bytes, tuple[int, ...]] = {}
    for place, name in enumerate(names):
        places[name.lower()] = (*places.get(name.lower(), ()), place)
    texts = tuple(map(text_of, names))
    read: dict[str, tuple[int, ...]] = {}
    for place, text in enumerate(texts):
        name_read = read_as(text)
        read[name_read] = (*read.get(name_read, ()), place)
    lasting = tuple(name.lower() not in HOP_BY_HOP for name in names)
    return _Layout(
        places=places,
        deciding=tuple((place, text) for place, text in enumerate(texts) if decides(text)),
        lasting=lasting,
        read=read,
        ours=read.get(CREDENTIAL, ()),
        foreign=tuple(lasts and not is_our_own(text) for lasts, text in zip(lasting, texts, strict=True)),
    )


def _bytes_of(names: tuple[bytes, ...]) -> int:
    return sum(map(len, names)) + len(names)


_layouts = Cache(_layout_of, max_entries=MAX_LAYOUTS, max_size=MAX_LAYOUT_BYTES, size=_bytes_of)


def _options_in(value: bytes) -> frozenset[bytes]:
    named = frozenset(name.strip().lower() for name in value.split(b","))
    return named - HOP_BY_HOP - _NEVER_STRIPPED


_options = Cache(_options_in, max_entries=MAX_OPTIONS, max_size=MAX_OPTIONS_BYTES)


def text_of(raw: bytes) -> str:
    """A name or value as text. Bytes that are not UTF-8 become lone surrogates."""
    return raw.decode("utf-8", "surrogateescape")


class HeaderFields:
    """The headers of one message: `pairs`, byte for byte and in order. Parameters are names in lower case."""

    __slots__ = ("_layout", "credential", "names", "pairs", "places")

    def __init__(self, pairs: Headers) -> None:
        self.pairs = pairs
        self.names = tuple([name for name, _ in pairs])
        self._layout = _layouts[self.names]
        self.credential = self._layout.ours  # the places of the credential for the sidecar
        self.places = self._layout.places  # of each name, by which `in` tells whether it is there

    def values(self, name: bytes) -> list[bytes]:
        """All values of a header."""
        pairs = self.pairs
        return [pairs[place][1] for place in self.places.get(name, ())]

    def texts(self, name: bytes) -> list[str]:
        """All values of a header as text."""
        pairs = self.pairs
        return [text_of(pairs[place][1]) for place in self.places.get(name, ())]

    def text(self, name: bytes) -> str | None:
        """The first value of a header as text, or None if it is absent."""
        places = self.places.get(name)
        return None if places is None else text_of(self.pairs[places[0]][1])

    def read_as(self, name: str) -> tuple[int, ...]:
        """The places of the headers that the most careless server reads as this name, in lower case."""
        return self._layout.read.get(name, ())

    def deciding(self) -> list[tuple[str, str]]:
        """The headers that `core.target.classify` looks at, as text."""
        deciding = self._layout.deciding
        return [(name, text_of(self.pairs[place][1])) for place, name in deciding] if deciding else []

    def ended_by_connection(self) -> frozenset[bytes]:
        """The names that end here because Connection names them, except those that end here anyway."""
        places = self.places.get(b"connection")
        if places is None:
            return _NOTHING
        if len(places) == 1:
            return _options[self.pairs[places[0]][1]]
        return _NOTHING.union(*[_options[self.pairs[place][1]] for place in places])

    def forwarded(
        self, *, ended: Collection[bytes], ours: bool, without: Collection[int] = ()
    ) -> list[tuple[bytes, bytes]]:
        """The headers that are neither hop-by-hop nor `ended`, with or without `Scopegate-*` (`ours`), except
        those at some places."""
        layout = self._layout
        kept = layout.lasting if ours else layout.foreign
        if without:
            remaining = list(kept)
            for place in without:
                remaining[place] = False
            kept = tuple(remaining)
        headers = list(compress(self.pairs, kept))
        if ended and not self.places.keys().isdisjoint(ended):
            return [pair for pair in headers if pair[0].lower() not in ended]
        return headers

    def end_to_end(self, *, without: Collection[int] = ()) -> list[tuple[bytes, bytes]]:
        """The headers to forward if none is the sidecar's, except those at some places."""
        return self.forwarded(ended=self.ended_by_connection(), ours=True, without=without)


class JudgedHeaders:
    """The names by which requests on a route are judged, in lower case, and by which their bodies are read.

    Connection cannot remove them. A header whose name differs from one of them in punctuation only is its
    twin, because CGI reads both alike.
    """

    __slots__ = ("_spelled", "_twins", "kept")

    def __init__(self, judged: Collection[str], framing: Collection[str]) -> None:
        self.kept = frozenset(name.encode() for name in judged)
        self._spelled = {read_as(name): name for name in sorted({*judged, *framing})}
        self._twins = Cache(self._twin_in, max_entries=MAX_LAYOUTS, max_size=MAX_LAYOUT_BYTES, size=_bytes_of)

    def twin_in(self, fields: HeaderFields) -> tuple[str, str] | None:
        """The first name of a header that is a twin, and the name of which it is one; None without a twin."""
        return self._twins[fields.names]

    def _twin_in(self, names: tuple[bytes, ...]) -> tuple[str, str] | None:
        for name in map(text_of, names):
            judged = self._spelled.get(read_as(name))
            if judged is not None and judged != name.lower():
                return name, judged
        return None


class _Message(Protocol):
    @property
    def raw_headers(self) -> Headers: ...


def fields_of(request: _Message) -> HeaderFields:
    """The headers of a request."""
    return HeaderFields(request.raw_headers)


def end_to_end(headers: Headers) -> list[tuple[bytes, bytes]]:
    """The headers to forward, byte for byte and in order."""
    return HeaderFields(headers).end_to_end()


def without_our_own(headers: Headers) -> list[tuple[bytes, bytes]]:
    """The headers without `Scopegate-*`, which only the sidecar may send. This also drops every name that a
    careless server could read as one of them."""
    return [
        (name, value)
        for name, value in headers
        if name[:1] not in b"sS" or not is_our_own(name.decode("latin-1"))
    ]


def unframed(status: int, headers: Headers) -> Headers:
    """The headers without the framing headers of a status that has no body (RFC 9110, section 8.6).

    A 204 and a 1xx have no body, and a client that believes a length there would wait for one. A 304 and the
    answer to HEAD keep their length, because it is the length that a GET would return.
    """
    if status != 204 and status >= 200:
        return headers
    return [(name, value) for name, value in headers if name.lower() not in _FRAMING]


def value_of(headers: Headers, name: bytes) -> bytes | None:
    """The first value of a header, or None if it is absent. `name` is in lower case."""
    for key, value in headers:
        if key.lower() == name:
            return value
    return None
