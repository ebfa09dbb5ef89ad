"""Is this request gated? What any parser could read as a gated path is judged or refused. No I/O.

A request target is *gated* if one of its readings matches a route; it is *judged* only if it spells the
route out, so that every parser behind us agrees on it. In between, it is refused as ambiguous. Where the
readings are too many to try, that is ambiguous, too (source: gate.md, G4 and "One gated request", 1).
"""

from __future__ import annotations

import re
import unicodedata
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import unquote_to_bytes

from sidecar.errors import Refusal

LOOKING = ("GET", "HEAD", "OPTIONS")

# Compared in lower case, `_` read as `-` (CGI and WSGI cannot tell the two apart). All begin with X or S.
TARGET_OVERRIDES = {"x-original-url": "X-Original-URL", "x-rewrite-url": "X-Rewrite-URL"}
# What a WSGI server takes off the path's beginning: gunicorn believes it from loopback, unless told not to.
PREFIX_OVERRIDES = {"script-name": "SCRIPT_NAME", "x-script-name": "X-Script-Name"}
METHOD_OVERRIDES = {
    "x-http-method-override": "X-HTTP-Method-Override",
    "x-http-method": "X-HTTP-Method",
    "x-method-override": "X-Method-Override",
}
OVERRIDES = TARGET_OVERRIDES | PREFIX_OVERRIDES | METHOD_OVERRIDES

MOST_DECODINGS = 2  # of every part of a target; a third decoding is beyond what gate.md promises
MOST_READINGS = 256  # a plain target has one or two, a strange one some dozens
MOST_CHARACTERS = 1 << 15  # over all readings of one target, so that a long one is cheap, too
LONGEST_SHOWN = 200


@dataclass(frozen=True, slots=True)
class RoutePattern:
    """A gated path: `/v1/run` is that path, `**/run` any path that ends so, `{name}` any one segment.

    Make one with `parse`. `folded` is `segments` in lower case.
    """

    text: str
    anywhere: bool
    segments: tuple[str, ...]
    folded: tuple[str, ...]
    names: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> RoutePattern:
        """The pattern that a configured path means. ValueError is one sentence that says what to write."""
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
    """Not gated in any reading, or a GET, HEAD or OPTIONS that only looks."""


@dataclass(frozen=True, slots=True)
class Gated:
    """A request to judge: which pattern it spells, and the decoded values of its {name} segments."""

    index: int
    path_params: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Rejected:
    """A request for a gated path that is turned away unjudged. `allow` fills the Allow header of a 405."""

    refusal: Refusal
    allow: tuple[str, ...] = ()


def classify(
    method: str,
    target: str,
    headers: Collection[tuple[str, str]],
    has_body: bool,
    patterns: Sequence[RoutePattern],
) -> PassThrough | Gated | Rejected:
    """What is to be done with a request. `target` is raw, its bytes as UTF-8 with surrogateescape.

    `headers` are read more than once. Never raises.
    """
    place = _place(target, patterns)
    if place is None:
        return _passing(target, headers, patterns)
    if isinstance(place, str):
        return _refused("ambiguous_path", f"The path is gated, but not in one reading only: {place}.", target)
    if method != "POST" and method not in LOOKING:
        message = "Only POST executes here; GET, HEAD and OPTIONS pass if they carry nothing."
        return Rejected(Refusal("method_not_allowed", message), allow=("POST", *LOOKING))
    if wants_websocket(headers):
        return _refused("upgrade_refused", "A WebSocket on a gated path could execute there unseen.", target)
    for override, _ in _overrides(headers, OVERRIDES):
        return _refused("override_refused", f"The header {override} is refused on a gated path.", target)
    if method == "POST":
        return place
    if has_body:
        return _refused("override_refused", f"A {method} with a body is refused on a gated path.", target)
    return PassThrough()


def wants_websocket(headers: Iterable[tuple[str, str]]) -> bool:
    """Whether the headers ask for a WebSocket, and for nothing else.

    Any other offer to switch protocols is optional (RFC 9110, section 7.8): it ends here, like every
    hop-by-hop header, and the request goes on in HTTP/1.1.
    """
    offers = [value.strip().lower() for name, value in headers if name.lower() == "upgrade"]
    return offers == ["websocket"]


def _passing(
    target: str, headers: Iterable[tuple[str, str]], patterns: Sequence[RoutePattern]
) -> PassThrough | Rejected:
    """A target that is not gated passes, unless a header would put a gated one in its place."""
    paths = [_path_of(target)]
    for name, value in _overrides(headers, TARGET_OVERRIDES):
        if _place(value.strip(), patterns) is not None:
            return _refused("override_refused", f"The header {name} names a gated path.", target)
        paths.append(_path_of(value))
    # Whatever is taken off the beginning, before decoding or after, a gated path's last segment remains.
    if any(_may_match(path, patterns) for path in paths):
        for name, _ in _overrides(headers, PREFIX_OVERRIDES):
            return _refused("override_refused", f"Without what {name} takes off it could be gated.", target)
    return PassThrough()


def _overrides(headers: Iterable[tuple[str, str]], known: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    """The headers that are in `known`, under the name that it gives them."""
    for name, value in headers:
        if name[:1] in "xXsS":
            canonical = known.get(name.lower().replace("_", "-"))
            if canonical is not None:
                yield canonical, value


def _refused(code: str, message: str, target: str) -> Rejected:
    """A refusal that shows the path, without its query, where that is short and fit for JSON."""
    path = target.partition("?")[0]
    shown = path.isascii() and len(path) <= LONGEST_SHOWN
    return Rejected(Refusal(code, message, {"path": path} if shown else {}))


def _path_of(target: str) -> str:
    path = target.partition("?")[0]  # for every parser a raw ? begins the query
    return path if path.isascii() else _NOT_FROM_BYTES.sub("\ufffd", path)


def _place(target: str, patterns: Sequence[RoutePattern]) -> Gated | str | None:
    """Gated where the target spells a pattern out; a clause that says why it is ambiguous; or None."""
    path = _path_of(target)
    if not _may_match(path, patterns):
        return None
    spelled = [index for index, pattern in enumerate(patterns) if _standing(pattern, pattern.segments, path)]
    if not spelled:
        return _other_reading(path, patterns)
    # Another pattern could match in another reading, and ask for other facts: /run;x/recovery/execute.
    others = [pattern for index, pattern in enumerate(patterns) if index not in spelled]
    return _doubt(path) or _other_reading(path, others) or _judged(spelled[0], patterns[spelled[0]], path)


def _standing(pattern: RoutePattern, wanted: Sequence[str], path: str) -> list[str]:
    """The segments of a path that stand for the wanted ones of a pattern; empty if it does not match."""
    if not path.endswith(wanted[-1]):
        return []
    segments = path.split("/")
    before = len(segments) - len(wanted)
    if before < 1 or (not pattern.anywhere and (before > 1 or segments[0])):
        return []
    found = segments[before:]
    # An empty {name} matches, too: /incidents//run is nothing that should pass. _doubt refuses it.
    if any(name != segment and name[0] != "{" for name, segment in zip(wanted, found, strict=True)):
        return []
    return found


# ---- literal paths ---------------------------------------------------------------------------------

_RAW_DOUBT = re.compile(r"[^!-~]|[#\\]")
_RAW_SEPARATOR = re.compile(r"[/.;]")
_SEPARATOR = re.compile(r"[/.;#?\\\0]")
_ESCAPE = re.compile(r"%[0-9A-Fa-f]{2}")


def _doubt(path: str) -> str | None:
    """Why parsers could disagree about a path that spells a pattern; None if they cannot."""
    if not path.startswith("/"):
        return "it does not begin with a slash"
    # ";x" and "..;x" are an empty and a dot segment for who drops parameters.
    if any(segment.partition(";")[0] in ("", ".", "..") for segment in path[1:].split("/")):
        return "it has an empty segment or a dot segment"
    if _RAW_DOUBT.search(path):
        return "it has a #, a backslash, or a character that is not printable ASCII"
    # The separators that stand there raw are plain to all; only those that decoding makes are not.
    text = _RAW_SEPARATOR.sub("x", path)
    for _ in range(MOST_DECODINGS if "%" in path else 0):
        text = _folded(_overlong(_decoded(text)))
        if _SEPARATOR.search(text):
            return "it has an encoded slash, dot, semicolon, #, ?, backslash or NUL"
    return None


def _judged(index: int, pattern: RoutePattern, path: str) -> Gated | str:
    """The values of the {name} segments of a path without doubt, or why one of them is ambiguous."""
    if pattern.names and ";" in path:
        return "a ; may cut off or change a segment that names something"
    values = {}
    for name, segment in zip(pattern.segments, _standing(pattern, pattern.segments, path), strict=True):
        if name.startswith("{"):
            try:
                value = unquote_to_bytes(segment).decode()
            except UnicodeDecodeError:
                return f"the segment {name} is not UTF-8"
            if _ESCAPE.search(value):
                return f"the segment {name} is escaped twice"
            values[name[1:-1]] = value
    return Gated(index, values)


# ---- readings --------------------------------------------------------------------------------------
# A reading is a text without capital ASCII letters. Bytes that are not UTF-8 are lone surrogates in it.

_NOT_FROM_BYTES = re.compile("[\ud800-\udc7f\udd00-\udfff]")
_OVERLONG = re.compile(
    "[\udcc0\udcc1][\udc80-\udcbf]"
    "|\udce0[\udc80-\udc9f][\udc80-\udcbf]"
    "|\udcf0[\udc80-\udc8f][\udc80-\udcbf]{2}"
    "|\udcf8\udc80[\udc80-\udcbf]{3}"
    "|\udcfc\udc80\udc80[\udc80-\udcbf]{3}"
)
_SCHEME = re.compile(r"\A[a-z][a-z0-9+.-]*:/*")
_AUTHORITY = re.compile(r"\A//+[^/]*")
_PARAMETERS = re.compile(r";[^/]*")
_SLASHES = re.compile(r"//+")
_ENDINGS = "/." + "".join(chr(code) for code in range(0x3001) if code <= 0x20 or chr(code).isspace())


def _decoded(text: str) -> str:
    return unquote_to_bytes(text.encode("utf-8", "surrogateescape")).decode("utf-8", "surrogateescape")


def _decoded_but_for_slashes(text: str) -> str:
    return "%2f".join(map(_decoded, text.split("%2f")))


def _overlong(text: str) -> str:
    return text if text.isascii() else _OVERLONG.sub(_shortened, text)


def _shortened(match: re.Match[str]) -> str:
    code = ord(match[0][0]) & 1  # of all these lead bytes only C1 carries a bit
    for continuation in match[0][1:]:
        code = code << 6 | ord(continuation) & 0x3F
    return "\ufffd" if 0xD800 <= code < 0xE000 else chr(code)


def _folded(text: str) -> str:
    # Each character by itself: what composes with a neighbour is not ASCII, as patterns are, and long runs
    # of accents need no sorting.
    return text.lower() if text.isascii() else text.translate({ord(each): _fold(each) for each in set(text)})


@lru_cache(maxsize=4096)
def _fold(character: str) -> str:
    # Upper case first: the dotless i meets the ASCII i only there.
    folded = unicodedata.normalize("NFKC", character).upper().casefold()
    return unicodedata.normalize("NFKC", folded)


def _without_dot_segments(text: str) -> str:
    root, *segments = text.split("/")
    kept: list[str] = []
    for segment in segments:
        if segment == "..":
            del kept[-1:]
        elif segment != ".":
            kept.append(segment)
    return "/".join([root, *kept])


@dataclass(frozen=True, slots=True)
class _Step:
    """One thing that a parser may do to a path; `decodings` of it are spent by it."""

    name: str
    read: Callable[[str], str]
    decodings: int = 0


# Each step may follow each; the order only decides which way is found, and named, first.
STEPS: tuple[_Step, ...] = (
    # Every framework decodes once; a proxy before it, or a careless handler, makes it twice.
    _Step("percent-decoding", _decoded, 1),
    # URL libraries see %2e%2e as dots, and many servers decode all else, but leave %2f as it is.
    _Step("percent-decoding all but slashes", _decoded_but_for_slashes, 1),
    # Lenient UTF-8 decoders take C0 AF, E0 80 AF, ... for a slash.
    _Step("overlong UTF-8", _overlong),
    # Case-blind routers; frameworks that normalize, for which U+FF0F is a slash and U+2025 two dots.
    _Step("Unicode folding", _folded),
    # Windows servers and URL libraries of browsers.
    _Step("backslashes as slashes", lambda text: text.replace("\\", "/")),
    # RFC 3986, 5.2.4; composed with the others it also works on what they have made.
    _Step("resolving dot segments", _without_dot_segments),
    # nginx, and most routers that split at slashes.
    _Step("merging slashes", lambda text: _SLASHES.sub("/", text)),
    # Old servlet containers cut at ";jsessionid"; newer ones drop parameters segment by segment.
    _Step("cutting at a semicolon", lambda text: text.partition(";")[0]),
    _Step("dropping parameters", lambda text: _PARAMETERS.sub("", text)),
    # Who parses a URL after decoding it sees a fragment or a query where %23 or %3F was.
    _Step("cutting at a #", lambda text: text.partition("#")[0]),
    _Step("cutting at a ?", lambda text: text.partition("?")[0]),
    # C strings end there.
    _Step("cutting at a NUL", lambda text: text.partition("\0")[0]),
    # Routers with optional slashes; file systems that drop dots and spaces.
    _Step("stripping its end", lambda text: text.rstrip(_ENDINGS)),
    # Rails and its kin take an extension for the wanted format.
    _Step("dropping .json", lambda text: text.removesuffix(".json")),
    # RFC 9112, 3.2.2 obliges every server to take the absolute form.
    _Step("dropping the scheme", lambda text: _SCHEME.sub("//", text)),
    # "//host/path" is a reference to another host for every URL library.
    _Step("dropping the authority", lambda text: _AUTHORITY.sub("", text)),
    # Who joins a base and a path.
    _Step("adding the first slash", lambda text: text if text.startswith("/") else "/" + text),
)


def _may_match(path: str, patterns: Sequence[RoutePattern]) -> bool:
    """A cheap test that every path with a matching reading passes, and hardly any other.

    In the reading that matches, the pattern's last segment L stands, once folded, after a slash. Two kinds
    of steps led there. Those that split, cut or drop never join characters within a segment, so what
    became L was contiguous all the time. Those that rewrite (decoding, overlong, folding) turn each group
    of characters into one or more, never into none. Here all rewriting is done as early as can be: after
    n decodings everything has become L that can with n. Nor does early rewriting unmake L: without "%" it
    is final, and no escape reaches into it from the left, where the group that became a slash (or a
    colon, or nothing) still stands. So L is in one of the three texts.
    """
    text = path
    for _ in range(MOST_DECODINGS + 1):
        text = _folded(_overlong(text))
        for pattern in patterns:
            if pattern.folded[-1] in text:
                return True
        if text.isascii() and "%" not in text:
            return False
        text = _decoded(text)
    return False


def _other_reading(path: str, patterns: Sequence[RoutePattern]) -> str | None:
    """A clause that says how some reading of the path matches a pattern; None if none does."""
    if not _may_match(path, patterns):
        return None
    start = path.lower()
    fewest = {start: 0}  # each reading, and the fewest decodings that lead to it
    waiting: deque[tuple[str, int, tuple[str, ...]]] = deque([(start, 0, ())])
    characters = 0
    while waiting:
        text, decodings, steps = waiting.popleft()
        folded = _folded(text)
        characters += len(folded)
        if len(fewest) > MOST_READINGS or characters > MOST_CHARACTERS:
            return "it has more readings than are tried"
        for pattern in patterns:
            if _standing(pattern, pattern.folded, folded):
                return f"it reaches {pattern.text} only by {', '.join(steps) or 'folding case'}"
        for step in STEPS:
            spent = decodings + step.decodings
            if spent > MOST_DECODINGS:
                continue
            reading = step.read(text).lower()
            if spent < fewest.get(reading, MOST_DECODINGS + 1):
                fewest[reading] = spent
                waiting.append((reading, spent, (*steps, step.name)))
    return None
