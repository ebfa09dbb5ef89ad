"""Globs: `*` is any text, `?` one character, `[...]` one of several, `[!...]` one of all others.

Case counts, and a glob describes the whole text. Rules select requests by globs, and the catalogue lists
actions by them. In the catalogue one glob decides about an action:

1. The glob with the longest literal prefix wins. The prefix ends before the first `*`, `?` or `[`.
2. Of globs with equal prefixes the longer one wins.
3. Two globs of equal prefix and length are an error when the catalogue is loaded.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import translate
from functools import lru_cache
from itertools import chain, takewhile
from typing import Generic, TypeVar

from sidecar.core.cache import Cache
from sidecar.core.facts import MAX_ID_CHARS

V = TypeVar("V")

# The most names for which a table caches the glob that decides. Clients choose the names.
MOST_NAMES = 4_096

_WILD = re.compile(r"[*?\[]")
# As fnmatch reads a glob: a `[` that is never closed stands for itself.
_PART = re.compile(r"\*+|\?|\[!?\]?[^\]]*\]|.", re.DOTALL)


@lru_cache(maxsize=65_536)
def _regex(glob: str) -> re.Pattern[str]:
    return re.compile(translate(glob))


def is_glob(text: str) -> bool:
    """Whether a text has a wildcard."""
    return _WILD.search(text) is not None


def literal_prefix(glob: str) -> str:
    """The text before the first wildcard."""
    return _WILD.split(glob, maxsplit=1)[0]


def globbed(globs: Sequence[str], value: str) -> bool:
    """Whether a value matches any of the globs. No globs match every value.

    A value that is spelled like a glob matches it, too.
    """
    return not globs or any(glob == value or _regex(glob).match(value) is not None for glob in globs)


def overlap(one: str, other: str) -> bool:
    """Whether some text can match both globs. The answer may be a wrong True if both have `[...]`."""
    first, second = literal_prefix(one), literal_prefix(other)
    if one == other:
        return True
    if not (first.startswith(second) or second.startswith(first)):
        return False
    return _overlap(_PART.findall(one), _PART.findall(other))


def _overlap(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether some text matches both lists of parts.

    `reached` holds the lengths of the beginnings of `other` that share a text with the beginning of `one`.
    """
    reached = _extended({0}, other)
    for part in one:
        if part.startswith("*"):
            reached = set(range(min(reached), len(other) + 1)) if reached else reached
        else:
            stepped = {place for place in reached if place < len(other) and other[place].startswith("*")}
            stepped |= {
                place + 1
                for place in reached
                if place < len(other) and not other[place].startswith("*") and _alike(part, other[place])
            }
            reached = _extended(stepped, other)
    return len(other) in reached


def _extended(places: set[int], parts: Sequence[str]) -> set[int]:
    """The places, and those behind a `*`, which may stand for nothing."""
    found = set(places)
    for place in sorted(places):
        while place < len(parts) and parts[place].startswith("*"):
            place += 1
            found.add(place)
    return found


def _alike(one: str, other: str) -> bool:
    """Whether one character can match two parts, neither of which is a `*`."""
    if len(one) == 1 and one != "?":
        return _regex(other).match(one) is not None
    if len(other) == 1 and other != "?":
        return _regex(one).match(other) is not None
    return True


class GlobIndex:
    """Globs, indexed by their literal prefixes, so that few of them are compared with another glob."""

    def __init__(self, globs: Iterable[str]) -> None:
        self._by_prefix: dict[str, list[str]] = {}
        for glob in globs:
            self._by_prefix.setdefault(literal_prefix(glob), []).append(glob)
        self._prefixes = sorted(self._by_prefix)

    def overlaps(self, glob: str) -> bool:
        """Whether some text can match a glob and one of the index."""
        prefix = literal_prefix(glob)
        shorter = (prefix[:length] for length in range(len(prefix)))
        behind = range(bisect_left(self._prefixes, prefix), len(self._prefixes))
        longer = takewhile(lambda known: known.startswith(prefix), map(self._prefixes.__getitem__, behind))
        return any(
            overlap(glob, other)
            for known in chain(shorter, longer)
            for other in self._by_prefix.get(known, ())
        )


class GlobTable(Generic[V]):
    """Values by globs: finds the glob that decides about a name.

    Looking up a name for the second time costs one access to a dict. The first time costs one for each length
    that a literal prefix has.
    """

    def __init__(self, values: Mapping[str, V]) -> None:
        self._by_prefix: dict[str, list[tuple[str, V]]] = {}
        for glob in sorted(values, key=lambda glob: (-len(glob), glob)):
            self._by_prefix.setdefault(literal_prefix(glob), []).append((glob, values[glob]))
        self._lengths = sorted(set(map(len, self._by_prefix)), reverse=True)
        self._found: Cache[str, tuple[str, V] | None] = Cache(
            self._find, max_entries=MOST_NAMES, max_size=MAX_ID_CHARS
        )

    def find(self, name: str) -> tuple[str, V] | None:
        """The glob that decides about a name, and its value; None if no glob matches."""
        return self._found[name]

    def _find(self, name: str) -> tuple[str, V] | None:
        for length in self._lengths:
            for glob, value in self._by_prefix.get(name[:length], ()):
                if globbed((glob,), name):
                    return glob, value
        return None
