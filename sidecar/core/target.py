"""Classification of requests: pass-through, gated or rejected. No I/O.

A request that any parser could read as a request for a gated path is judged or refused:

1. A request target is *gated* if one of its readings (_readings.py) matches a route.
2. It is *judged* only if it spells the route out, so that every parser behind the sidecar agrees on it.
3. A gated target that is not spelled out is refused as ambiguous. A target with more readings than can be
   tried is refused, too.

Headers can name another target. Some are known to replace the target, its method or its beginning
(`OVERRIDES`). Applications build a URL from others (`REBUILDING`) and parse it again: with
`X-Forwarded-Host: x/recovery/execute?`, a request for any path executes. Such a value in Host is refused on
every listener (host.py). In the other headers, a plain host, port or scheme cannot lead to another path. A
prefix, or a value that is not plain, is refused if it could lead to a gated path.

A reading takes milliseconds, and headers can hold thousands of values. At most `MAX_VALUES` values are read,
and a request with more is refused. Every operation on a text takes time proportional to its length.

Most requests are settled sooner. `could_reach` shows from the letters of a path that it cannot be gated. The
paths that could be are often the same ones, so `GatedPaths` remembers what it found out about them. Few
headers can change the outcome, and of these, plain values are remembered as harmless.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal
from urllib.parse import unquote_to_bytes

from sidecar.core import _readings as readings
from sidecar.core._readings import could_reach, decoded, folded, other_reading, shortened, taking_off
from sidecar.core.cache import Cache
from sidecar.core.host import BRACKETED, NAME
from sidecar.errors import Refusal

LOOKING = ("GET", "HEAD", "OPTIONS")

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

# The most header values that are read like a target. Proxies send one or two, and each may take milliseconds.
MAX_VALUES = 8

LONGEST_SHOWN = 200

# The most paths, headers, and characters of one of them that are remembered.
MAX_PLACES = 1024
MAX_HEADERS = 1024
LONGEST_REMEMBERED = 256


@dataclass(frozen=True, slots=True)
class RoutePattern:
    """The pattern of a gated path, made by `parse`.

    `/v1/run` matches exactly that path, `**/run` any path that ends in it, and `{name}` any one segment.
    `folded` is `segments` in lower case.
    """

    text: str
    anywhere: bool
    segments: tuple[str, ...]
    folded: tuple[str, ...]
    names: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> RoutePattern:
        """The pattern of a configured path. Raises ValueError with one sentence that says what to write."""
        path = text.removeprefix("**")
        if not path.startswith("/"):
            raise ValueError('a route path begins with "/", or with "**/" for any prefix')
        if re.search(r"[^!-~]|[%?#;\\*]", path):
            raise ValueError('a route path is printable ASCII without spaces % ? # ; \\ and a further "*"')
        segments = tuple(path[1:].split("/"))
        if any(segment in ("", ".", "..") for segment in segments):
            raise ValueError("a route path has no empty and no dot segment, and no slash at its end")
        names = tuple(segment[1:-1] for segment in segments if "{" in segment or "}" in segment)
        braced = tuple("{" + name + "}" for name in names)
        if not set(braced) <= set(segments) or not all(name.isidentifier() for name in names):
            raise ValueError("a {name} fills its segment of the route path and is a Python identifier")
        if len(set(names)) < len(names):
            raise ValueError("a {name} stands only once in a route path")
        if segments[-1] in braced or segments[-1].endswith("."):
            raise ValueError('the last segment of a route path is spelled out, and does not end in "."')
        folded = tuple(segment.lower() for segment in segments)
        return cls(text, text.startswith("**"), segments, folded, names)


@dataclass(frozen=True, slots=True)
class PassThrough:
    """A request that no reading makes gated, or a GET, HEAD or OPTIONS that only reads."""


PASSES = PassThrough()


@dataclass(frozen=True, slots=True)
class Gated:
    """A request to judge: the index of its pattern, and the decoded values of its {name} segments."""

    index: int
    path_params: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Rejected:
    """A request that is refused without being judged. `allow` fills the Allow header of a 405."""

    refusal: Refusal
    allow: tuple[str, ...] = ()


class GatedPaths:
    """The patterns of the gated paths, and the places of the paths that came lately."""

    __slots__ = ("_places", "last_segments", "patterns")

    def __init__(self, patterns: Iterable[RoutePattern]) -> None:
        self.patterns = tuple(patterns)
        self.last_segments = _last_segments(self.patterns)
        self._places: Cache[str, Gated | str | None] = Cache(
            self._place_of, max_entries=MAX_PLACES, max_size=LONGEST_REMEMBERED
        )

    def place(self, target: str) -> Gated | str | None:
        """Gated if the target spells a pattern out, a clause if it is ambiguous, else None."""
        path = path_of(target)
        places = self._places
        return places[path] if path in places or could_reach(path, self.last_segments) else None

    def _place_of(self, path: str) -> Gated | str | None:
        patterns = self.patterns
        standing = [_standing(one, one.segments, path) for one in patterns]
        others = [one for one, segments in zip(patterns, standing, strict=True) if not segments]
        if len(others) == len(patterns):
            return _other_reading(path, patterns)
        index = next(index for index, segments in enumerate(standing) if segments)
        # Another pattern could match in another reading and read other facts: /run;x/recovery/execute.
        return (
            _doubt(path)
            or _other_reading(path, others)
            or _judged(index, patterns[index], path, standing[index])
        )


def classify(
    method: str, target: str, headers: Collection[tuple[str, str]], has_body: bool, gated: GatedPaths
) -> PassThrough | Gated | Rejected:
    """Classify a request. `target` is the raw target, decoded as UTF-8 with surrogateescape.

    `headers` may lack those that `decides` excludes. Never raises.
    """
    if headers:
        headers = [header for header in headers if _decides[header]]
    place = gated.place(target)
    if place is None:
        return _passing(target, headers, gated) if headers else PASSES
    if isinstance(place, str):
        return _refused("ambiguous_path", f"Not every parser reads this path alike: {place}.", target)
    if method != "POST" and method not in LOOKING:
        message = "Only POST executes here; GET, HEAD and OPTIONS pass if they have no body."
        return Rejected(Refusal("method_not_allowed", message), allow=("POST", *LOOKING))
    refused = _misleading(target, headers, place, gated) if headers else None
    if refused is not None:
        return refused
    if method == "POST":
        return place
    if has_body:
        return _refused("override_refused", f"A {method} with a body is refused on a gated path.", target)
    return PASSES


def decides(name: str) -> bool:
    """Whether headers of this name can change what `classify` finds."""
    return read_as(name) in _DECIDING


def _header_decides(header: tuple[str, str]) -> bool:
    """Whether a header can change what `classify` finds. A plain host, port or scheme cannot."""
    name = header[0]
    if not decides(name):
        return False
    return read_as(name) not in REBUILDING or any(
        part == "prefix" or not _is_plain(part, value) for _, part, value in _rebuilding([header])
    )


def _chars_of(header: tuple[str, str]) -> int:
    return len(header[0]) + len(header[1])


# A proxy before the sidecar sends the same values again and again.
_decides = Cache(_header_decides, max_entries=MAX_HEADERS, max_size=LONGEST_REMEMBERED, size=_chars_of)


def _misleading(
    target: str, headers: Collection[tuple[str, str]], place: Gated, gated: GatedPaths
) -> Rejected | None:
    """The refusal of a gated request whose headers could make another request of it, or None."""
    if wants_websocket(headers):
        return _refused("upgrade_refused", "A WebSocket on a gated path could execute there unseen.", target)
    for override, _ in _overrides(headers, OVERRIDES):
        return _refused("override_refused", f"The header {override} is refused on a gated path.", target)
    for count, (original, value) in enumerate(_targets_in(headers, ORIGINALS)):
        if count >= MAX_VALUES or gated.place(value) not in (None, place):
            return _refused("override_refused", f"{original} names another gated path.", target)
    others = [pattern for index, pattern in enumerate(gated.patterns) if index != place.index]
    detour = _not_plain(headers) or _detour(target, headers, others)
    return None if detour is None else _refused("override_refused", detour, target)


def wants_websocket(headers: Iterable[tuple[str, str]]) -> bool:
    """Whether the headers ask for a WebSocket and no other protocol.

    Any other offer to switch protocols is optional (RFC 9110, section 7.8). The sidecar drops it like every
    hop-by-hop header, and the request continues in HTTP/1.1.
    """
    offers = [value.strip().lower() for name, value in headers if name.lower() == "upgrade"]
    return offers == ["websocket"]


def _passing(target: str, headers: Collection[tuple[str, str]], gated: GatedPaths) -> PassThrough | Rejected:
    """Pass a target that is not gated, unless a header could replace it by a gated one."""
    paths = [path_of(target)]
    names = gated.last_segments
    values = 0
    for name, value in _targets_in(headers, TARGET_OVERRIDES | ORIGINALS):
        paths.append(path_of(value))
        values += could_reach(paths[-1], names)
        if values > MAX_VALUES:
            return _refused("override_refused", f"With {name} there are more targets than are read.", target)
        if gated.place(value) is not None:
            return _refused("override_refused", f"The header {name} names a gated path.", target)
    # Removing a prefix, before decoding or after, leaves the last segment of a gated path.
    if any(could_reach(path, names) for path in paths):
        for name, _ in _overrides(headers, PREFIX_OVERRIDES):
            return _refused("override_refused", f"Without what {name} takes off it could be gated.", target)
    detour = _detour(target, headers, gated.patterns)
    return PASSES if detour is None else _refused("override_refused", detour, target)


# CGI and WSGI write a header's name in letters, digits and `_`. Apache and lighttpd replace every other
# character by `_`.
_AS_DASH = str.maketrans(dict.fromkeys("!#$%&'*+.^_`|~", "-"))


def read_as(name: str) -> str:
    """A header name as the most lenient server reads it: in lower case, with all punctuation as `-`."""
    return name.lower().translate(_AS_DASH)


def _overrides(headers: Iterable[tuple[str, str]], known: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    """The values of the headers in `known`, each with the canonical name from `known`."""
    for name, value in headers:
        if name[:1] in "xXsS":
            canonical = known.get(read_as(name))
            if canonical is not None:
                yield canonical, value


def _targets_in(headers: Iterable[tuple[str, str]], known: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    """Each target that these headers name.

    A proxy may have appended its own target after a comma. A comma may also belong to a path, so both the
    whole value and its parts are yielded.
    """
    for name, text in _overrides(headers, known):
        yield name, text.strip()
        if "," in text:
            yield from ((name, value.strip()) for value in text.split(","))


def _refused(code: str, message: str, target: str) -> Rejected:
    """A refusal. It shows the path without its query if the path is short and ASCII."""
    path = target.partition("?")[0]
    shown = path.isascii() and len(path) <= LONGEST_SHOWN
    return Rejected(Refusal(code, message, {"path": path} if shown else {}))


def path_of(target: str) -> str:
    path = target.partition("?")[0]  # every parser begins the query at a raw ?
    return path if path.isascii() else _NOT_FROM_BYTES.sub("\ufffd", path)


def _last_segments(patterns: Iterable[RoutePattern]) -> frozenset[str]:
    return frozenset(pattern.folded[-1] for pattern in patterns)


def _other_reading(
    path: str, patterns: Sequence[RoutePattern], *, before: str = "", more: Sequence[readings.Step] = ()
) -> str | None:
    """A clause that says how some reading of the path matches a pattern, or None if no reading does.

    Each reading is also tried with the prefix `before`. `more` are additional steps.
    """
    if not could_reach(path, _last_segments(patterns)):
        return None

    def matched(reading: str) -> str | None:
        for pattern in patterns:
            if _standing(pattern, pattern.folded, reading):
                return pattern.text
            if before and _standing(pattern, pattern.folded, before + reading):
                return pattern.text
        return None

    return other_reading(path, matched, more)


def _standing(pattern: RoutePattern, wanted: Sequence[str], path: str) -> list[str]:
    """The segments of a path that correspond to the wanted ones of a pattern, empty if it does not match."""
    if not path.endswith(wanted[-1]):
        return []
    segments = path.split("/")
    before = len(segments) - len(wanted)
    if before < 1 or (not pattern.anywhere and (before > 1 or segments[0])):
        return []
    found = segments[before:]
    # An empty {name} matches, too, because /incidents//run must not pass. _doubt refuses it.
    if any(name != segment and name[0] != "{" for name, segment in zip(wanted, found, strict=True)):
        return []
    return found


# ---- literal paths ---------------------------------------------------------------------------------

_RAW_DOUBT = re.compile(r"[^!-~]|[#\\]")
_PARAMETERS = re.compile(r";[^/]*")
_EMPTY_OR_DOTS = frozenset({"", ".", ".."})
_RAW_SEPARATOR = re.compile(r"[/.;]")
_SEPARATOR = re.compile(r"[/.;#?\\\0]")
_ESCAPE = re.compile(r"%(?:[0-9A-Fa-f]{2}|[uU][0-9A-Fa-f]{4})")
_NOT_FROM_BYTES = re.compile("[\ud800-\udc7f\udd00-\udfff]")


def _doubt(path: str) -> str | None:
    """The reason why parsers could disagree about a path that spells a pattern, or None."""
    if not path.startswith("/"):
        return "it does not begin with a slash"
    # A parser that drops parameters reads ";x" as an empty segment and "..;x" as a dot segment.
    if not _EMPTY_OR_DOTS.isdisjoint(_PARAMETERS.sub("", path[1:]).split("/")):
        return "it has an empty segment or a dot segment"
    if _RAW_DOUBT.search(path):
        return "it has a #, a backslash, or a character that is not printable ASCII"
    if "%" not in path:
        return None
    # All parsers agree on raw separators. Only separators that decoding produces are ambiguous.
    texts = {_RAW_SEPARATOR.sub("x", path)}
    for _ in range(readings.MAX_DECODINGS):
        texts = {opened for text in texts for opened in _opened(text)}
        if any(_SEPARATOR.search(text) for text in texts):
            return "it has an encoded slash, dot, semicolon, #, ?, backslash or NUL"
    return None


def _opened(text: str) -> Iterator[str]:
    """The text decoded once, with and without the characters that parsers drop."""
    for decoder in (decoded, readings.decoded_as_by_iis):
        plain = decoder(text.lower())
        for dropping in readings.DROPPING:
            yield folded(shortened(dropping(plain)))


def _judged(index: int, pattern: RoutePattern, path: str, found: Sequence[str]) -> Gated | str:
    """Gated with the values of the {name} segments, or a clause that says why a segment is ambiguous.

    `found` are the segments of the path that correspond to those of the pattern.
    """
    if pattern.names and ";" in path:
        return "a ; may cut off or change a segment that names something"
    values = {}
    for name, segment in zip(pattern.segments, found, strict=True):
        if name.startswith("{"):
            try:
                value = unquote_to_bytes(segment).decode()
            except UnicodeDecodeError:
                return f"the segment {name} is not UTF-8"
            if _ESCAPE.search(value):
                return f"the segment {name} is escaped twice"
            values[name[1:-1]] = value
    return Gated(index, values)


# ---- rebuilt targets -------------------------------------------------------------------------------


def _detour(target: str, headers: Iterable[tuple[str, str]], patterns: Sequence[RoutePattern]) -> str | None:
    """A sentence that names the header through which a rebuilt target could match a pattern, or None.

    A value that is not plain is examined less closely than a target. It is refused if it could hold the last
    segment of a gated path. It is also refused if two parts of the URL are not plain, because both together
    could hold the segment. Several prefixes, which an application may join, are examined as closely as one
    value that is not plain.
    """
    names, path = _last_segments(patterns), path_of(target)
    strange: set[str] = set()
    tried: set[tuple[str, str]] = set()
    prefixes: set[str] = set()
    for name, part, value in _rebuilding(headers):
        plain = _is_plain(part, value)
        if (plain and part != "prefix") or (part, value) in tried:
            continue
        tried.add((part, value))
        if not plain:
            strange.add(part)
            found = len(strange) > 1 or could_reach(value + path, names)
        else:
            prefixes.add(value.rstrip("/"))
            several = len(prefixes - {""}) > 1
            found = several and could_reach(path, names)
            found = found or any(_with_prefix(each, path, patterns) for each in {value, value.rstrip("/")})
        if found:
            return f"With {name} a gated path could be built."
        if len(tried) > MAX_VALUES:
            return f"With {name} there are more values than are read."
    return None


def _with_prefix(prefix: str, path: str, patterns: Sequence[RoutePattern]) -> bool:
    """Whether a path matches with a plain prefix added or removed, before or after it is decoded."""
    before = decoded(prefix).lower()
    return bool(prefix) and (
        _other_reading(prefix + path, patterns) is not None
        or _other_reading(path, patterns, before=before, more=[taking_off(prefix), taking_off(before)])
        is not None
    )


def _not_plain(headers: Iterable[tuple[str, str]]) -> str | None:
    """A sentence that names a header which could rebuild a gated path with other facts, or None."""
    for name, part, value in _rebuilding(headers):
        if not _is_plain(part, value):
            return f"On a gated path {name} must be a plain {part}."
    return None


def _is_plain(part: str, value: str) -> bool:
    return _PLAIN_PARTS[part].fullmatch(value) is not None


def _rebuilding(headers: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str, str]]:
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
            if len(parts) > 1 and not all(_is_plain(part, value) for value in parts):
                yield name, part, text.strip()  # a comma may also belong to a path
            for value in parts:
                yield name, part, value


# ---- for exceptions --------------------------------------------------------------------------------


def spells(pattern: RoutePattern, path: str) -> bool:
    """Whether a path spells a pattern out, in its case."""
    return bool(_standing(pattern, pattern.segments, path))


def matches(pattern: RoutePattern, reading: str) -> bool:
    """Whether a reading in its folded form matches a pattern."""
    return bool(_standing(pattern, pattern.folded, reading))


def leads(headers: Iterable[tuple[str, str]]) -> Iterator[tuple[Literal["target", "prefix", "unknown"], str]]:
    """Where headers could lead a backend: to another target, to the path with or without a prefix, or to a
    path that cannot be told. The texts are the target's path, the prefix, and the header's name."""
    for header in headers:
        name, value = read_as(header[0]), header[1].strip()
        if not _decides[header] or name == "upgrade" or name in METHOD_OVERRIDES:
            continue
        if (name in TARGET_OVERRIDES or name in ORIGINALS) and "," not in value:
            yield "target", path_of(value)
        elif name not in REBUILDING:
            yield "unknown", header[0]
        for _, part, found in _rebuilding([header]):
            if part == "prefix" and _is_plain(part, found):
                yield "prefix", found.rstrip("/")
            else:
                yield "unknown", header[0]
