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
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from sidecar.core.target import read_as

Headers = Sequence[tuple[bytes, bytes]]

# Transfer-Encoding is hop-by-hop too, because each side frames the message anew. Trailers are not forwarded.
HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"http2-settings",
        b"keep-alive",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
_FRAMING = frozenset({b"content-length", b"transfer-encoding"})
# Headers that Connection cannot remove, because they say where a message goes and how its body is read.
_NEVER_STRIPPED = frozenset({b"host", b"content-length", b"content-type"})


def end_to_end(headers: Headers, *, kept: Collection[bytes] = ()) -> list[tuple[bytes, bytes]]:
    """The headers to forward, byte for byte and in order. Connection cannot remove `kept` (lower case)."""
    ending = HOP_BY_HOP
    named = [
        name.strip().lower()
        for key, value in headers
        if key.lower() == b"connection"
        for name in value.split(b",")
    ]
    if named:
        ending = ending | (set(named) - _NEVER_STRIPPED - set(kept))
    return [(name, value) for name, value in headers if name.lower() not in ending]


def without_our_own(headers: Headers) -> list[tuple[bytes, bytes]]:
    """The headers without `Scopegate-*`, which only the sidecar may send. This also drops every name that a
    careless server could read as one of them."""
    return [
        (name, value)
        for name, value in headers
        if name[:1] not in b"sS" or not read_as(name.decode("latin-1")).startswith("scopegate-")
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
