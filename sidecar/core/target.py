"""Classification of requests: pass-through, gated or rejected. No I/O.

A request that any parser could read as a request for a gated path is judged or refused:

1. A request target is *gated* if one of its readings (_readings.py) matches a route.
2. It is *judged* only if it spells the route out, so that every parser behind the sidecar agrees on it.
3. A gated target that is not spelled out is refused as ambiguous. A target with more readings than can be
   tried is refused, too.
4. Among the routes that a target spells out, the method decides. Of two routes that list it, the one with an
   exact path goes before the one with variables. A target that spells a route out is ambiguous for a method
   if it has a reading that matches yet another route which lists this method.
5. A method that no route of the path lists is refused if one of these routes says so, else it passes. GET,
   HEAD and OPTIONS pass in any case if they have no body and no override, in a header or the query.

Headers can name another target (targetheaders.py). Those that replace the target, its method or its beginning
are refused on a gated path, and where they name one. Of those that applications build a URL from, a value in
Host is refused on every listener (host.py). In the other headers, a plain host, port or scheme cannot lead to
another path. A prefix, or a value that is not plain, is refused if it could lead to a gated path.

A reading takes milliseconds, and headers can hold thousands of values. At most `MAX_VALUES` values are read,
and a request with more is refused. Every operation on a text takes time proportional to its length.

Most requests are settled sooner. A quick test (_quicktest.py) shows from the words of a path that it cannot
be gated. The paths that could be are often the same ones, so `GatedPaths` remembers what it found out about
them. Few headers can change the outcome, and of these, plain values are remembered as harmless.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import parse_qsl, unquote_to_bytes

from sidecar.core import _readings as readings
from sidecar.core._lookup import Entry, Lookup
from sidecar.core._quicktest import QuickTest
from sidecar.core._readings import (
    ESCAPE,
    PARAMETERS,
    decoded,
    describe,
    folded,
    readings_of,
    shortened,
    steps_for,
    taking_off,
)
from sidecar.core.cache import Cache
from sidecar.core.form import replaces_method
from sidecar.core.pattern import RoutePattern, overlapping
from sidecar.core.targetheaders import (
    LONGEST_REMEMBERED,
    ORIGINALS,
    OVERRIDES,
    PREFIX_OVERRIDES,
    TARGET_OVERRIDES,
    deciding,
    is_plain,
    overrides,
    path_of,
    rebuilding,
    targets_in,
    wants_websocket,
)
from sidecar.errors import Refusal

# The methods that a route can list, in the order in which answers name them.
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
LOOKING = ("GET", "HEAD", "OPTIONS")

# The most header values that are read like a target. Proxies send one or two, and each may take milliseconds.
MAX_VALUES = 8

LONGEST_SHOWN = 200

# The most paths that are remembered.
MAX_PLACES = 1024


@dataclass(frozen=True, slots=True)
class GatedCalls:
    """The calls that one route gates: its paths, the methods that it lists, and what it does with others."""

    patterns: tuple[RoutePattern, ...]
    methods: frozenset[str] = frozenset({"POST"})
    passes_others: bool = False

    def lists(self, method: str) -> bool:
        """Whether the route gates the method. Frameworks run GET's handler for HEAD."""
        return method in self.methods or (method == "HEAD" and "GET" in self.methods)


def conflicts(routes: Sequence[GatedCalls]) -> Iterator[tuple[int, int, RoutePattern, RoutePattern]]:
    """Two routes, by their indexes, that some request would have both, with a pattern of each by which.

    Each pair of routes is given once.
    """
    flat = [(index, pattern) for index, route in enumerate(routes) for pattern in route.patterns]
    found: set[tuple[int, int]] = set()
    for first, second in overlapping([pattern for _, pattern in flat]):
        (one, pattern), (another, other) = flat[first], flat[second]
        if one == another or (one, another) in found:
            continue
        if any(routes[one].lists(method) and routes[another].lists(method) for method in METHODS):
            found.add((one, another))
            yield one, another, pattern, other


@dataclass(frozen=True, slots=True)
class PassThrough:
    """A request that no reading makes gated, or a GET, HEAD or OPTIONS that only reads."""


PASSES = PassThrough()


@dataclass(frozen=True, slots=True)
class Gated:
    """A request to judge: the index of its route, and the decoded values of the variables of its path."""

    index: int
    path_params: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Rejected:
    """A request that is refused without being judged. `allow` fills the Allow header of a 405."""

    refusal: Refusal
    allow: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Place:
    """What a path that spells routes out means for each method.

    `judged` holds the methods that its routes list, each with the request to judge, or a clause that says why
    the path is ambiguous. `refused` is the refusal of other methods, unless they pass.
    """

    judged: Mapping[str, Gated | str]
    refused: Rejected | None
    routes: frozenset[int]


class GatedPaths:
    """The routes, and the places of the paths that came lately.

    A route may be given by its only pattern; it then gates POST.
    """

    __slots__ = ("_lookup", "_places", "_quick_test", "routes")

    def __init__(self, routes: Iterable[GatedCalls | RoutePattern]) -> None:
        self.routes = tuple(
            GatedCalls((route,)) if isinstance(route, RoutePattern) else route for route in routes
        )
        patterns = [(index, each) for index, route in enumerate(self.routes) for each in route.patterns]
        self._lookup = Lookup(patterns)
        self._quick_test = QuickTest(pattern for _, pattern in patterns)
        self._places: Cache[str, Place | str | None] = Cache(
            self._place_of, max_entries=MAX_PLACES, max_size=LONGEST_REMEMBERED
        )

    def place(self, target: str) -> Place | str | None:
        """The place of a target that spells routes out, a clause if it is ambiguous, else None."""
        path = path_of(target)
        places = self._places
        return places[path] if path in places or self._quick_test.could_reach(path) else None

    def could_reach(self, target: str) -> bool:
        """Whether a target may have a place, by the quick test alone."""
        return self._quick_test.could_reach(path_of(target))

    def could_be_built_of(self, text: str, apart_from: Collection[int] = ()) -> bool:
        """Whether a path of a route that is not in `apart_from` may be built of parts of a text."""
        quick_test = self._quick_test
        if apart_from:
            others = (route for index, route in enumerate(self.routes) if index not in apart_from)
            quick_test = QuickTest(pattern for route in others for pattern in route.patterns)
        return quick_test.could_be_held(text)

    def other_reading(
        self,
        path: str,
        apart_from: Collection[int] = (),
        *,
        before: str = "",
        more: Sequence[readings.Step] = (),
    ) -> str | None:
        """A clause that says how some reading of the path matches a route, or None if no reading does.

        Routes in `apart_from` do not count. Each reading is also tried with the prefix `before`. `more` are
        additional steps.
        """
        for reading in readings_of(path, (*readings.STEPS, *more) if more else steps_for(path)):
            if reading is None:
                return readings.TOO_MANY
            text, way = reading
            for each in (text, before + text) if before else (text,):
                for entry in self._lookup.matching(each):
                    if entry.route not in apart_from:
                        return _clause(entry, each, way)
        return None

    def _place_of(self, path: str) -> Place | str | None:
        segments = path[1:].split("/")
        spelled: dict[int, tuple[RoutePattern, Sequence[str]]] = {}
        for entry in self._lookup.matching(path.lower()):
            found = None if entry.adds_slash else entry.pattern.spelled_by(segments)
            # Of a route's own paths, the exact one is the one that counts.
            if found is not None and (entry.route not in spelled or entry.pattern.is_exact):
                spelled[entry.route] = entry.pattern, found
        if not spelled:
            return self.other_reading(path)
        return _doubt(path) or self._judged(path, spelled)

    def _judged(self, path: str, spelled: Mapping[int, tuple[RoutePattern, Sequence[str]]]) -> Place | str:
        # Exact paths first; otherwise the order of the configuration, in which no two list one method.
        order = sorted(spelled, key=lambda route: (not spelled[route][0].is_exact, route))
        # Another route could match in another reading and read other facts: /run;x/recovery/execute.
        rivals: dict[int, str] = {}
        emptied: dict[int, str] = {}
        for reading in readings_of(path, steps_for(path)):
            if reading is None:
                return readings.TOO_MANY
            text, way = reading
            for entry in self._lookup.matching(text):
                if entry.route not in spelled:
                    # An exact path /x/ goes before /x/{name} with an empty variable.
                    exempt = not way and _is_emptied(entry, text) and spelled[order[0]][0].is_exact
                    (emptied if exempt else rivals).setdefault(entry.route, _clause(entry, text, way))
        judged: dict[str, Gated | str] = {}
        listed = []
        for method in METHODS:
            first = next((route for route in order if self.routes[route].lists(method)), None)
            others = rivals if first is not None else {**rivals, **emptied}
            clause = next((others[route] for route in others if self.routes[route].lists(method)), None)
            if first is not None:
                listed.append(method)
            if clause is not None:
                judged[method] = clause
            elif first is not None:
                judged[method] = _gated(first, *spelled[first], path)
        refused = None
        if not all(self.routes[route].passes_others for route in (*order, *rivals)):
            allow = (*listed, *(method for method in LOOKING if method not in listed))
            refused = Rejected(Refusal("method_not_allowed", _not_allowed(listed)), allow=allow)
        return Place(judged, refused, frozenset(spelled))


def _clause(entry: Entry, reading: str, way: Sequence[str]) -> str:
    if not way and _is_emptied(entry, reading):
        return f"a variable of {entry.pattern.text} would be empty"
    return describe(entry.pattern.text, (*way, "adding a slash at its end") if entry.adds_slash else way)


def _is_emptied(entry: Entry, reading: str) -> bool:
    """Whether a reading matches a pattern only with a variable that is empty."""
    segments = reading.split("/")[1:]
    return not entry.adds_slash and entry.pattern.spelled_by(segments, folded=True) is None


def _not_allowed(listed: Sequence[str]) -> str:
    passing = [method for method in LOOKING if method not in listed]
    only = f"Only {_enumerated(listed)} execute{'s' if len(listed) == 1 else ''} here"
    return f"{only}; {_enumerated(passing)} without a body need{'s' if len(passing) == 1 else ''} no scope."


def _enumerated(words: Sequence[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def classify(
    method: str, target: str, headers: Collection[tuple[str, str]], has_body: bool, gated: GatedPaths
) -> PassThrough | Gated | Rejected:
    """Classify a request. `target` is the raw target, decoded as UTF-8 with surrogateescape.

    `headers` may lack those that `decides` excludes. Never raises.
    """
    if headers:
        headers = [header for header in headers if deciding[header]]
    place = gated.place(target)
    if place is None:
        return _passing(target, headers, gated) if headers else PASSES
    judged = place if isinstance(place, str) else place.judged.get(method)
    if isinstance(judged, str) or isinstance(place, str):
        return _refused("ambiguous_path", f"Not every parser reads this path alike: {judged}.", target)
    if judged is None and place.refused is not None and method not in LOOKING:
        return place.refused
    if "?" in target and _query_replaces_method(target):
        return _refused(
            "override_refused", "The field _method of the query is refused on a gated path.", target
        )
    refused = _misleading(method, target, headers, place, gated) if headers else None
    if refused is not None:
        return refused
    if judged is not None:
        return judged
    if has_body and method in LOOKING:
        return _refused("override_refused", f"A {method} with a body is refused on a gated path.", target)
    return PASSES


def _query_replaces_method(target: str) -> bool:
    """Whether a field of the query could replace the method: Symfony and Express read `?_method=DELETE`."""
    query = target.partition("?")[2].encode("utf-8", "ignore").decode()
    # Parsers that drop bytes that are not UTF-8 read more names as this one than those that refuse them.
    return replaces_method(parse_qsl(query, keep_blank_values=True, errors="ignore"))


def _misleading(
    method: str, target: str, headers: Collection[tuple[str, str]], place: Place, gated: GatedPaths
) -> Rejected | None:
    """The refusal of a gated request whose headers could make another request of it, or None."""
    if wants_websocket(headers):
        return _refused("upgrade_refused", "A WebSocket on a gated path could execute there unseen.", target)
    for override, _ in overrides(headers, OVERRIDES):
        return _refused("override_refused", f"The header {override} is refused on a gated path.", target)
    for count, (original, value) in enumerate(targets_in(headers, ORIGINALS)):
        if count >= MAX_VALUES or gated.place(value) not in (None, place):
            return _refused("override_refused", f"{original} names another gated path.", target)
    # A route that goes after another one on this path could go first on the rebuilt path.
    judged = place.judged.get(method)
    same = {
        route
        for route in place.routes
        if (isinstance(judged, Gated) and judged.index == route) or not gated.routes[route].lists(method)
    }
    detour = _not_plain(headers) or _detour(target, headers, gated, same)
    return None if detour is None else _refused("override_refused", detour, target)


def _passing(target: str, headers: Collection[tuple[str, str]], gated: GatedPaths) -> PassThrough | Rejected:
    """Pass a target that is not gated, unless a header could replace it by a gated one."""
    paths = [path_of(target)]
    values = 0
    for name, value in targets_in(headers, TARGET_OVERRIDES | ORIGINALS):
        paths.append(path_of(value))
        values += gated.could_reach(value)
        if values > MAX_VALUES:
            return _refused("override_refused", f"With {name} there are more targets than are read.", target)
        if gated.place(value) is not None:
            return _refused("override_refused", f"The header {name} names a gated path.", target)
    # What is left without a prefix, which is removed before decoding or after, is a part of the path.
    if any(map(gated.could_be_built_of, paths)):
        for name, _ in overrides(headers, PREFIX_OVERRIDES):
            return _refused("override_refused", f"Without what {name} takes off it could be gated.", target)
    detour = _detour(target, headers, gated)
    return PASSES if detour is None else _refused("override_refused", detour, target)


def _refused(code: str, message: str, target: str) -> Rejected:
    """A refusal. It shows the path without its query if the path is short and ASCII."""
    path = target.partition("?")[0]
    shown = path.isascii() and len(path) <= LONGEST_SHOWN
    return Rejected(Refusal(code, message, {"path": path} if shown else {}))


# ---- literal paths ---------------------------------------------------------------------------------

_RAW_DOUBT = re.compile(r"[^!-~]|[#\\]")
_EMPTY_OR_DOTS = frozenset({"", ".", ".."})
_RAW_SEPARATOR = re.compile(r"[/.;]")
_SEPARATOR = re.compile(r"[/.;#?\\\0]")


def _doubt(path: str) -> str | None:
    """The reason why parsers could disagree about a path that spells a pattern, or None."""
    if not path.startswith("/"):
        return "it does not begin with a slash"
    # A parser that drops parameters reads ";x" as an empty segment and "..;x" as a dot segment. A slash at
    # the end belongs to the pattern.
    segments = PARAMETERS.sub("", path[1:].removesuffix("/")).split("/")
    if path != "/" and not _EMPTY_OR_DOTS.isdisjoint(segments):
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


def _gated(route: int, pattern: RoutePattern, found: Sequence[str], path: str) -> Gated | str:
    """Gated with the values of the variables, or a clause that says why a variable is ambiguous.

    `found` are the segments of the path that spell the pattern out.
    """
    if pattern.names and ";" in path:
        return "a ; may cut off or change a segment that names something"
    values = {}
    for name, texts in pattern.values(found):
        parts = []
        for text in texts:
            try:
                part = unquote_to_bytes(text).decode()
            except UnicodeDecodeError:
                return f"the segment {{{name}}} is not UTF-8"
            if ESCAPE.search(part):
                return f"the segment {{{name}}} is escaped twice"
            parts.append(part)
        values[name] = "/".join(parts)
    for segment, text in zip(pattern.segments, found, strict=False):
        if len(segment.names) > 1:
            for reading in (text, unquote_to_bytes(text).decode()):
                if segment.values(reading) != segment.values(reading, last=True):
                    return f"the segment {segment.text} can be split in more than one way"
    return Gated(route, values)


# ---- rebuilt targets -------------------------------------------------------------------------------


def _detour(
    target: str, headers: Iterable[tuple[str, str]], gated: GatedPaths, apart_from: Collection[int] = ()
) -> str | None:
    """A sentence that names the header through which a rebuilt target could match a route, or None.

    Routes in `apart_from` do not count. A value that is not plain is examined less closely than a target. It
    is refused if a gated path could be built of it, of the prefixes and of the target. It is also refused if
    two parts of the URL are not plain, because both together could hold what the quick test looks for.
    Several prefixes, which an application may join, are examined as closely as one value that is not plain.
    """
    path = path_of(target)
    strange: dict[str, str] = {}
    prefixes: dict[str, str] = {}
    parts: set[str] = set()
    for name, part, value in rebuilding(headers):
        plain = is_plain(part, value)
        if (plain and part != "prefix") or value in (prefixes if plain else strange):
            continue
        (prefixes if plain else strange)[value] = name
        if not plain:
            parts.add(part)
        if len(prefixes) + len(strange) > MAX_VALUES:
            return f"With {name} there are more values than are read."
    several = len({value.rstrip("/") for value in prefixes} - {""}) > 1
    if strange or several:
        name = next(iter((strange or prefixes).values()))
        built = "".join((*strange, *prefixes, path))
        if len(parts) > 1 or gated.could_be_built_of(built, apart_from):
            return f"With {name} a gated path could be built."
    for value, name in prefixes.items():
        if any(_with_prefix(each, path, gated, apart_from) for each in {value, value.rstrip("/")}):
            return f"With {name} a gated path could be built."
    return None


def _with_prefix(prefix: str, path: str, gated: GatedPaths, apart_from: Collection[int]) -> bool:
    """Whether a path matches with a plain prefix added or removed, before or after it is decoded."""
    if not prefix or not gated.could_be_built_of(prefix + path):
        return False
    before = decoded(prefix).lower()
    return (
        gated.other_reading(prefix + path, apart_from) is not None
        or gated.other_reading(path, apart_from, before=before, more=[taking_off(prefix), taking_off(before)])
        is not None
    )


def _not_plain(headers: Iterable[tuple[str, str]]) -> str | None:
    """A sentence that names a header which could rebuild a gated path with other facts, or None."""
    for name, part, value in rebuilding(headers):
        if not is_plain(part, value):
            return f"On a gated path {name} must be a plain {part}."
    return None


# ---- for exceptions --------------------------------------------------------------------------------


def spells(pattern: RoutePattern, path: str) -> bool:
    """Whether a path spells a pattern out, in its case."""
    return path.startswith("/") and pattern.spelled_by(path[1:].split("/")) is not None


def matches(pattern: RoutePattern, reading: str) -> bool:
    """Whether a reading in its folded form spells a pattern out, but for its case."""
    return reading.startswith("/") and pattern.spelled_by(reading[1:].split("/"), folded=True) is not None
