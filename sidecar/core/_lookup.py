"""Which patterns match a path: a lookup that takes the same time for one pattern and for hundreds.

Patterns stand in a tree by their segments. A lookup goes down the tree with the segments of a path, so it
meets only patterns that begin like the path. Patterns for any prefix stand in a second tree by their segments
from the last to the first.

A pattern is also found by a path that lacks only the slash at its end, because servers and proxies append
one. It is found by a path whose variable is empty, because `/tasks//run` must not pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from sidecar.core.pattern import RoutePattern, Segment


@dataclass(frozen=True, slots=True)
class Entry:
    """A pattern of a route, which is given by its index. `adds_slash`: for paths without the last slash."""

    route: int
    pattern: RoutePattern
    adds_slash: bool = False


class _Node:
    """The patterns that begin with the same segments, from the root to here."""

    __slots__ = ("_endings", "_openings", "_others", "_variable", "ends", "literals", "rests")

    def __init__(self) -> None:
        self.literals: dict[str, _Node] = {}
        self.ends: list[Entry] = []
        self.rests: list[Entry] = []
        self._variable: _Node | None = None
        # Segments with a variable in a part of them, by the text at the end, else at the beginning. The
        # outer key is its length. A segment that has neither is among the others.
        self._endings: dict[int, dict[str, list[tuple[Segment, _Node]]]] = {}
        self._openings: dict[int, dict[str, list[tuple[Segment, _Node]]]] = {}
        self._others: list[tuple[Segment, _Node]] = []

    def below(self, segment: Segment) -> _Node:
        """The node below for a segment of a pattern, which is made if there is none yet."""
        if not segment.names:
            return self.literals.setdefault(segment.texts[0], _Node())
        if segment.texts == ("", ""):
            self._variable = self._variable or _Node()
            return self._variable
        opening, ending = segment.texts[0], segment.texts[-1]
        if ending:
            alike = self._endings.setdefault(len(ending), {}).setdefault(ending, [])
        elif opening:
            alike = self._openings.setdefault(len(opening), {}).setdefault(opening, [])
        else:
            alike = self._others
        for other, node in alike:
            if other.texts == segment.texts:
                return node
        alike.append((segment, _Node()))
        return alike[-1][1]

    def matching(self, part: str) -> Iterator[_Node]:
        """The nodes below whose segment matches a segment of a path."""
        literal = self.literals.get(part)
        if literal is not None:
            yield literal
        if self._variable is not None:
            yield self._variable
        for segment, node in self._partial(part):
            if segment.values(part) is not None:
                yield node

    def _partial(self, part: str) -> Iterator[tuple[Segment, _Node]]:
        for length, alike in self._endings.items():
            yield from alike.get(part[-length:], ())
        for length, alike in self._openings.items():
            yield from alike.get(part[:length], ())
        yield from self._others


class Lookup:
    """Finds the patterns that match a path in lower case, without regard to case."""

    __slots__ = ("_from_end", "_from_start")

    def __init__(self, entries: Iterable[tuple[int, RoutePattern]]) -> None:
        self._from_start, self._from_end = _Node(), _Node()
        for route, pattern in entries:
            self._add(Entry(route, pattern), pattern.folded)
            if pattern.has_slash and len(pattern.folded) > 1:
                self._add(Entry(route, pattern, adds_slash=True), pattern.folded[:-1])

    def _add(self, entry: Entry, segments: Sequence[Segment]) -> None:
        anywhere = entry.pattern.anywhere
        node = self._from_end if anywhere else self._from_start
        for segment in reversed(segments) if anywhere else segments:
            node = node.below(segment)
        (node.ends if entry.pattern.rest is None else node.rests).append(entry)

    def matching(self, path: str) -> list[Entry]:
        """The patterns that a path in lower case matches."""
        before, *parts = path.split("/")
        found: list[Entry] = []
        if not parts:
            return found
        if not before:
            nodes = [self._from_start]
            for part in parts:
                for node in nodes:
                    found += node.rests
                nodes = [below for node in nodes for below in node.matching(part)]
                if not nodes:
                    break
            for node in nodes:
                found += node.ends
        nodes = [self._from_end]
        for part in reversed(parts):
            nodes = [below for node in nodes for below in node.matching(part)]
            if not nodes:
                break
            for node in nodes:
                found += node.ends
        if not parts[-1]:
            found = [entry for entry in found if not entry.adds_slash]
        return found
