"""Patterns of gated paths: how they are written, what they match, and whether two of them overlap.

A pattern is a path whose segments may hold variables:

1. `**` before the path stands for any prefix, or none.
2. A `{name}` takes a segment, or a part of one beside other text: `/actions/{action}:run`. It takes at least
   one character.
3. `{rest...}` as the last segment takes one or more segments.
4. A slash at the end is part of the path. It counts as an empty last segment, which `/` consists of.

A segment with two variables can be split in more than one way if a variable holds the text between them. The
text between two variables therefore has a character that is neither a letter nor a digit, and a segment that
it occurs in twice is refused as ambiguous.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_NAME = re.compile(r"\{([^{}]*)\}")
_REST = "..."


@dataclass(frozen=True, slots=True)
class Segment:
    """One segment of a pattern: the names of its variables, and the text around them (one text more)."""

    texts: tuple[str, ...]
    names: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Segment:
        """Raises ValueError with one sentence that says what to write."""
        parts = _NAME.split(text)
        texts, names = tuple(parts[::2]), tuple(parts[1::2])
        if any("{" in each or "}" in each for each in texts) or not all(map(str.isidentifier, names)):
            raise ValueError("a {name} of a route path is a Python identifier; {name...} only ends the path")
        if not all(re.search("[^A-Za-z0-9]", each) for each in texts[1:-1]):
            raise ValueError(
                "two {name}s in one segment of a route path have text between them that is more than letters "
                "and digits, for example {team}:{agent}"
            )
        return cls(texts, names)

    @property
    def folded(self) -> Segment:
        return Segment(tuple(map(str.lower, self.texts)), self.names)

    @property
    def text(self) -> str:
        """The segment as it is written, each variable as `{}`."""
        return "{}".join(self.texts)

    def values(self, found: str, *, last: bool = False) -> list[str] | None:
        """The raw text of each variable in a segment of a path, or None if the segment does not match.

        Each variable is as short as possible, or with `last` as long as possible. If the two differ, the
        segment can be split in more than one way. A variable may be empty here.
        """
        texts = self.texts
        if len(texts) == 1:
            return [] if found == texts[0] else None
        start, end = len(texts[0]), len(found) - len(texts[-1])
        if start > end or not found.startswith(texts[0]) or not found.endswith(texts[-1]):
            return None
        values = []
        for between in reversed(texts[1:-1]) if last else texts[1:-1]:
            at = found.rfind(between, start, end) if last else found.find(between, start, end)
            if at < 0:
                return None
            values.append(found[at + len(between) : end] if last else found[start:at])
            start, end = (start, at) if last else (at + len(between), end)
        values.append(found[start:end])
        return values[::-1] if last else values

    def overlaps(self, other: Segment) -> bool:
        """Whether some text that is not empty matches both segments."""
        for one, another in ((self, other), (other, self)):
            if not one.names:
                values = another.values(one.texts[0])
                return values is not None and all(values)
        starts, ends = (
            sorted((self.texts[0], other.texts[0])),
            sorted((self.texts[-1], other.texts[-1]), key=len),
        )
        return starts[1].startswith(starts[0]) and ends[1].endswith(ends[0])


@dataclass(frozen=True, slots=True)
class RoutePattern:
    """The pattern of a gated path, made by `parse`.

    `segments` end with an empty one if the path ends with a slash. They do not contain `{rest...}`, whose
    name is `rest`. `folded` is `segments` in lower case.
    """

    text: str
    anywhere: bool
    segments: tuple[Segment, ...]
    folded: tuple[Segment, ...]
    names: tuple[str, ...]
    rest: str | None = None

    @classmethod
    def parse(cls, text: str) -> RoutePattern:
        """The pattern of a configured path. Raises ValueError with one sentence that says what to write."""
        path = text.removeprefix("**")
        anywhere = path != text
        if not path.startswith("/"):
            raise ValueError('a route path begins with "/", or with "**/" for any prefix')
        if "*" in path:
            raise ValueError(
                'a "*" of a route path is only in "**/" at its beginning; write {name} for one segment, and '
                "{name...} at the end for one or more"
            )
        if re.search(r"[^!-~]|[%?#;\\]", path):
            raise ValueError("a route path is printable ASCII without spaces % ? # ; \\")
        # What other routers write for a variable would gate only the path that has these characters in it.
        if re.search(r"[][<>^|]|/:\w", path):
            raise ValueError("a route path has no :name, <name>, [name] or regular expression; write {name}")
        parts = path[1:].split("/")
        # A last segment that is empty is a slash at the end, which takes a path before it behind "**".
        named = parts if parts[-1] or (path == "/" and anywhere) else parts[:-1]
        if any(part in ("", ".", "..") for part in named):
            raise ValueError("a route path has no empty and no dot segment")
        rest = None
        if parts[-1].startswith("{") and parts[-1].endswith(_REST + "}"):
            rest = parts.pop()[1 : -len(_REST) - 1]
            if not rest.isidentifier():
                raise ValueError("a {name...} of a route path has a Python identifier for its name")
            if anywhere:
                raise ValueError('a route path begins with "**/" or ends with {name...}, but not both')
        segments = tuple(map(Segment.parse, parts))
        if parts and parts[-1].endswith("."):
            raise ValueError('the last segment of a route path does not end in "."')
        names = tuple(name for segment in segments for name in segment.names)
        names = names if rest is None else (*names, rest)
        if len(set(names)) < len(names):
            raise ValueError("a {name} stands only once in a route path")
        folded = tuple(segment.folded for segment in segments)
        return cls(text, anywhere, segments, folded, names, rest)

    @property
    def is_exact(self) -> bool:
        """Whether the pattern matches only one path."""
        return not self.anywhere and not self.names

    @property
    def has_slash(self) -> bool:
        """Whether its paths end with a slash."""
        return self.rest is None and self.segments[-1].texts == ("",)

    def filled(self, value: str) -> str:
        """A path that the pattern matches, with this value for each variable."""
        parts = [segment.text.replace("{}", value) for segment in self.segments]
        return "/" + "/".join(parts if self.rest is None else [*parts, value])

    def values(self, found: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
        """Each variable with its raw text: of a `{name}` one, of `{rest...}` one for each segment.

        `found` are the segments that match: the last ones of a path if any prefix may stand before them.
        """
        for segment, part in zip(self.segments, found, strict=False):
            for name, value in zip(segment.names, segment.values(part) or (), strict=False):
                yield name, [value]
        if self.rest is not None:
            yield self.rest, list(found[len(self.segments) :])

    def spelled_by(self, segments: Sequence[str], *, folded: bool = False) -> Sequence[str] | None:
        """The segments of a path that spell the pattern out, without an empty variable, or None.

        `segments` are those of a whole path that begins with a slash, in lower case if `folded`.
        """
        length, extra = len(self.segments), len(segments) - len(self.segments)
        if extra < 0 or (extra > 0 and not self.anywhere and self.rest is None):
            return None
        found = segments[extra:] if self.anywhere else segments
        for segment, part in zip(self.folded if folded else self.segments, found, strict=False):
            values = segment.values(part)
            if values is None or not all(values):
                return None
        if self.rest is not None and (extra == 0 or not all(found[length:])):
            return None
        return found

    def overlaps(self, other: RoutePattern) -> bool:
        """Whether some path matches both patterns. Case and a slash at the end are not told apart."""
        one, another = self.without_slash, other.without_slash
        if (self.anywhere or self.rest is not None) and (other.anywhere or other.rest is not None):
            if self.anywhere != other.anywhere:
                return True  # the ends of one, and the beginnings of the other
        elif self.anywhere or self.rest is not None:
            if len(another) < len(one) + (self.rest is not None):
                return False
        elif other.anywhere or other.rest is not None:
            if len(one) < len(another) + (other.rest is not None):
                return False
        elif len(one) != len(another):
            return False
        if self.anywhere or other.anywhere:
            one, another = one[::-1], another[::-1]
        return all(a.overlaps(b) for a, b in zip(one, another, strict=False))

    @property
    def without_slash(self) -> tuple[Segment, ...]:
        """The folded segments without the empty one at the end."""
        return self.folded[:-1] if self.has_slash else self.folded


@dataclass(frozen=True, slots=True)
class RoutePath:
    """The paths of one route: one pattern, or several whose requests are judged alike."""

    patterns: tuple[RoutePattern, ...]

    @property
    def text(self) -> str:
        """The first path, which names the route if it has no other name."""
        return self.patterns[0].text

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(pattern.text for pattern in self.patterns)

    @property
    def names(self) -> tuple[str, ...]:
        """The variables that all paths have."""
        first, *others = self.patterns
        return tuple(name for name in first.names if all(name in other.names for other in others))


def overlapping(patterns: Sequence[RoutePattern]) -> Iterator[tuple[int, int]]:
    """The pairs of patterns, by their indexes, by which one request would have two routes.

    An exact path goes before one with variables, so such two overlap without a conflict.
    """
    exact: dict[str, list[int]] = {}
    fixed: dict[int, _Tree] = {}  # by the number of segments
    flexible: list[int] = []
    for index, pattern in enumerate(patterns):
        if pattern.is_exact:
            alike = exact.setdefault(pattern.text.lower().removesuffix("/"), [])
            yield from ((other, index) for other in alike)
            alike.append(index)
        elif pattern.anywhere or pattern.rest is not None:
            others = (other for other in range(index) if not patterns[other].is_exact)
            yield from ((other, index) for other in others if patterns[other].overlaps(pattern))
            flexible.append(index)
        else:
            yield from ((other, index) for other in flexible if patterns[other].overlaps(pattern))
            segments = pattern.without_slash
            tree = fixed.setdefault(len(segments), _Tree())
            yield from ((other, index) for other in tree.overlapping(segments))
            tree.add(segments, index)


class _Tree:
    """Patterns of one length by their segments, so that most pairs need not be compared."""

    def __init__(self) -> None:
        self._below: dict[tuple[str, ...], tuple[Segment, _Tree]] = {}
        self._variable: list[tuple[Segment, _Tree]] = []
        self._ends: list[int] = []

    def add(self, segments: Sequence[Segment], index: int) -> None:
        tree = self
        for segment in segments:
            if segment.texts not in tree._below:
                tree._below[segment.texts] = segment, _Tree()
                if segment.names:
                    tree._variable.append(tree._below[segment.texts])
            tree = tree._below[segment.texts][1]
        tree._ends.append(index)

    def overlapping(self, segments: Sequence[Segment]) -> list[int]:
        trees = [self]
        for segment in segments:
            trees = [below for tree in trees for below in tree._matching(segment)]
        return [index for tree in trees for index in tree._ends]

    def _matching(self, segment: Segment) -> Iterator[_Tree]:
        if segment.names:
            yield from (tree for other, tree in self._below.values() if other.overlaps(segment))
            return
        if segment.texts in self._below:
            yield self._below[segment.texts][1]
        yield from (tree for other, tree in self._variable if other.overlaps(segment))
