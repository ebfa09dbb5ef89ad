"""Headers that can name another target than the request line, and what they say of it. No I/O.

Some are known to replace the target, its method or its beginning (`OVERRIDES`). Applications build a URL from
others (`REBUILDING`) and parse it again: with `X-Forwarded-Host: x/recovery/execute?`, a request for any path
executes. Whether a header leads to a gated path is decided in target.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

from sidecar.core.cache import Cache
from sidecar.core.host import BRACKETED, NAME

# The keys are in the form that `read_as` returns. All begin with X or S.
TARGET_OVERRIDES = {"x-original-url": "X-Original-URL", "x-rewrite-url": "X-Rewrite-URL"}
# A WSGI server removes this value from the beginning of the path. By default gunicorn trusts it from
# loopback.
PREFIX_OVERRIDES = {"script-name": "SCRIPT_NAME", "x-script-name": "X-Script-Name"}
METHOD_OVERRIDES = {
    "x-http-method-override": "X-HTTP-Method-Override",
    "x-http-method": "X-HTTP-Method",
    "x-method-override": "X-Method-Override",
}
OVERRIDES = TARGET_OVERRIDES | PREFIX_OVERRIDES | METHOD_OVERRIDES
# A proxy puts the original target into these headers before it rewrites the target. Some applications trust
# them.
ORIGINALS = {
    "x-original-uri": "X-Original-URI",
    "x-original-path": "X-Original-Path",
    "x-rewrite-uri": "X-Rewrite-URI",
    "x-request-uri": "X-Request-URI",
    "x-forwarded-uri": "X-Forwarded-Uri",
    "x-forwarded-path": "X-Forwarded-Path",
    "x-replaced-path": "X-Replaced-Path",
    "x-envoy-original-path": "X-Envoy-Original-Path",
    "x-forwarded-url": "X-Forwarded-Url",
    "x-override-url": "X-Override-URL",
    "x-request-url": "X-Request-URL",
    "x-rewrite-path": "X-Rewrite-Path",
    "x-http-destinationurl": "X-HTTP-DestinationURL",
    "x-waws-unencoded-url": "X-Waws-Unencoded-Url",  # Azure
}

# The part of a rebuilt URL that each header supplies. Ordinary proxies send these headers, so a plain value
# passes.
REBUILDING = {
    "x-forwarded-host": ("X-Forwarded-Host", "host"),
    "x-original-host": ("X-Original-Host", "host"),
    "x-forwarded-server": ("X-Forwarded-Server", "host"),
    "x-host": ("X-Host", "host"),
    "x-http-host": ("X-HTTP-Host", "host"),
    "x-http-host-override": ("X-HTTP-Host-Override", "host"),
    "x-envoy-original-host": ("X-Envoy-Original-Host", "host"),
    "x-forwarded-port": ("X-Forwarded-Port", "port"),
    "x-forwarded-proto": ("X-Forwarded-Proto", "scheme"),
    "x-forwarded-protocol": ("X-Forwarded-Protocol", "scheme"),
    "x-forwarded-scheme": ("X-Forwarded-Scheme", "scheme"),
    "x-url-scheme": ("X-Url-Scheme", "scheme"),
    "x-scheme": ("X-Scheme", "scheme"),
    "x-forwarded-prefix": ("X-Forwarded-Prefix", "prefix"),
    "x-forwarded-pathbase": ("X-Forwarded-PathBase", "prefix"),
    "x-forwarded-context": ("X-Forwarded-Context", "prefix"),
    "x-ingress-path": ("X-Ingress-Path", "prefix"),  # Home Assistant
    "forwarded": ("Forwarded", "forwarded"),
}
_DECIDING = frozenset({"upgrade", *OVERRIDES, *ORIGINALS, *REBUILDING})
_HARMLESS = "(?:[A-Za-z0-9._~-]|%(?!2[35EF]|3[BF]|5C|7F)[2-7][0-9A-F])"
_PLAIN_PARTS = {
    "host": re.compile(rf"(?:{NAME}|{BRACKETED})?(?::[0-9]*)?"),
    "port": re.compile(r"[0-9]*"),
    "scheme": re.compile(r"[A-Za-z0-9+.-]*"),
    "prefix": re.compile(rf"(?:/(?!\.){_HARMLESS}+)*/?"),
}
_FORWARDED_PAIR = re.compile(r'(host|proto)\s*=\s*("(?:[^"\\]|\\.)*"?|[^;,]*)', re.IGNORECASE)


# The most headers, and characters of one header or path, that are remembered.
MAX_HEADERS = 1024
LONGEST_REMEMBERED = 256

_NOT_FROM_BYTES = re.compile("[\ud800-\udc7f\udd00-\udfff]")


def path_of(target: str) -> str:
    """The path of a raw target. Surrogates that stand for no byte are replaced."""
    path = target.partition("?")[0]  # every parser begins the query at a raw ?
    return path if path.isascii() else _NOT_FROM_BYTES.sub("\ufffd", path)


def decides(name: str) -> bool:
    """Whether headers of this name can change what `classify` finds."""
    return read_as(name) in _DECIDING


def _header_decides(header: tuple[str, str]) -> bool:
    """Whether a header can change what `classify` finds. A plain host, port or scheme cannot."""
    name = header[0]
    if not decides(name):
        return False
    return read_as(name) not in REBUILDING or any(
        part == "prefix" or not is_plain(part, value) for _, part, value in rebuilding([header])
    )


def _chars_of(header: tuple[str, str]) -> int:
    return len(header[0]) + len(header[1])


# A proxy before the sidecar sends the same values again and again.
deciding = Cache(_header_decides, max_entries=MAX_HEADERS, max_size=LONGEST_REMEMBERED, size=_chars_of)


def wants_websocket(headers: Iterable[tuple[str, str]]) -> bool:
    """Whether the headers ask for a WebSocket and no other protocol.

    Any other offer to switch protocols is optional (RFC 9110, section 7.8). The sidecar drops it like every
    hop-by-hop header, and the request continues in HTTP/1.1.
    """
    offers = [value.strip().lower() for name, value in headers if name.lower() == "upgrade"]
    return offers == ["websocket"]


# CGI and WSGI write a header's name in letters, digits and `_`. Apache and lighttpd replace every other
# character by `_`.
_AS_DASH = str.maketrans(dict.fromkeys("!#$%&'*+.^_`|~", "-"))


def read_as(name: str) -> str:
    """A header name as the most lenient server reads it: in lower case, with all punctuation as `-`."""
    return name.lower().translate(_AS_DASH)


def overrides(headers: Iterable[tuple[str, str]], known: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    """The values of the headers in `known`, each with the canonical name from `known`."""
    for name, value in headers:
        if name[:1] in "xXsS":
            canonical = known.get(read_as(name))
            if canonical is not None:
                yield canonical, value


def targets_in(headers: Iterable[tuple[str, str]], known: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    """Each target that these headers name.

    A proxy may have appended its own target after a comma. A comma may also belong to a path, so both the
    whole value and its parts are yielded.
    """
    for name, text in overrides(headers, known):
        yield name, text.strip()
        if "," in text:
            yield from ((name, value.strip()) for value in text.split(","))


def is_plain(part: str, value: str) -> bool:
    """Whether a value is no more than this part of a URL."""
    return _PLAIN_PARTS[part].fullmatch(value) is not None


def rebuilding(headers: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str, str]]:
    """Each value of the rebuilding headers, with the header's name and the part of a URL that it supplies."""
    for key, text in headers:
        if key[:1] not in "xXfF":
            continue
        name, part = REBUILDING.get(read_as(key), ("", ""))
        if part == "forwarded":
            for pair in _FORWARDED_PAIR.finditer(text):
                value = pair[2].strip()
                if value.startswith('"'):
                    value = re.sub(r"\\(.)", r"\1", value.strip('"'))
                yield name, "host" if pair[1].lower() == "host" else "scheme", value
        elif part:
            parts = [each.strip() for each in text.split(",")]
            if len(parts) > 1 and not all(is_plain(part, value) for value in parts):
                yield name, part, text.strip()  # a comma may also belong to a path
            for value in parts:
                yield name, part, value


def leads(headers: Iterable[tuple[str, str]]) -> Iterator[tuple[Literal["target", "prefix", "unknown"], str]]:
    """Where headers could lead a backend: to another target, to the path with or without a prefix, or to a
    path that cannot be told. The texts are the target's path, the prefix, and the header's name."""
    for header in headers:
        name, value = read_as(header[0]), header[1].strip()
        if not deciding[header] or name == "upgrade" or name in METHOD_OVERRIDES:
            continue
        if (name in TARGET_OVERRIDES or name in ORIGINALS) and "," not in value:
            yield "target", path_of(value)
        elif name not in REBUILDING:
            yield "unknown", header[0]
        for _, part, found in rebuilding([header]):
            if part == "prefix" and is_plain(part, found):
                yield "prefix", found.rstrip("/")
            else:
                yield "unknown", header[0]
