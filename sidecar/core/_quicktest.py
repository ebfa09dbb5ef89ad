"""A cheap test that shows of most paths that no reading of them matches a pattern.

It has false positives, but no false negatives. It takes the same time for one pattern and for hundreds.

Each pattern has an anchor: a word of its text, which is a run of letters, digits, `-`, `_` and `~` between
two other characters or ends of a segment. The test decodes all escapes of a path and takes it apart into
words:

1. A reading holds a word in one piece. The steps that split, cut, resolve and drop segments never join two
   parts of a segment. They also cut only at characters that belong to no word. The path therefore holds the
   word between two such characters.
2. Only characters that are not printable ASCII can have been dropped from within a word, so the test drops
   them first. A NUL may be dropped, or cut a word off.
3. A character beyond ASCII may have been folded to a part of the word.
4. A remaining percent sign, or a byte that is not UTF-8, may be the beginning of any characters (`soft`). The
   digits of an escape may then be gone, too.

Paths with a character of the cases 3 and 4, or a NUL, are rare. A piece with such a character is compared
character by character, with all anchors at once. `hard` and `soft` are sets of positions in the
anchors, one bit each: `hard` holds the positions after a character that was kept, `soft` those after one that
may still consume digits.

A pattern without a word, such as `/` or `/{name}`, has only few segments. A path with more segments that no
reading can lose, because they begin with a letter or digit before anything that parsers resolve, cut or
decode, does not match it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator

from sidecar.core._readings import MAX_DECODINGS, NOT_UTF8_EITHER, decoded, fold
from sidecar.core.pattern import RoutePattern

# The most characters that one escape, or one character beyond ASCII, can become.
MAX_MADE = 4

_WORD = re.compile("[a-z0-9_~-]+")
_NO_WORD = re.compile("[^a-z0-9_~-]+")
# What ends a word, however it is read, and what a piece between two of these may hold beside a word.
_SEPARATOR = re.compile(r"[ -$&-,./:-@\[-^`{-}]+")
_STRANGE = re.compile("[^a-z0-9_~-]")
_NOT_PRINTABLE = re.compile("[^ -~]+")


class QuickTest:
    """The test for a set of patterns."""

    __slots__ = ("_anchors", "_ends", "_solid", "_starts", "_wanted", "_wordless")

    def __init__(self, patterns: Iterable[RoutePattern]) -> None:
        words = {pattern: tuple(_words(pattern)) for pattern in patterns}
        counts = Counter(word for each in words.values() for word in set(each))
        # The word that the fewest patterns have tells them apart best; of these the last one, since paths
        # begin alike.
        self._anchors = frozenset(
            min(reversed(each), key=counts.__getitem__) for each in words.values() if each
        )
        wordless = [pattern for pattern, each in words.items() if not each]
        self._wordless = bool(wordless)
        # Matches a path that begins with more segments than a pattern without a word has. None: no path does.
        self._solid: re.Pattern[str] | None = None
        if wordless and not any(pattern.anywhere or pattern.rest is not None for pattern in wordless):
            most = max(len(pattern.segments) - pattern.has_slash for pattern in wordless)
            self._solid = re.compile(rf"(?:/[A-Za-z0-9_~-][!-\"$&-.0-:<->@-\[\]-~]*){{{most + 1}}}")
        self._wanted: dict[str, int] = {}
        self._starts = self._ends = 0
        at = 0
        for anchor in self._anchors:
            self._starts |= 1 << at
            for position, character in enumerate(anchor, start=at):
                self._wanted[character] = self._wanted.get(character, 0) | 1 << position
            at += len(anchor) + 1
            self._ends |= 1 << (at - 1)

    def could_reach(self, path: str) -> bool:
        """Whether some reading of a path may match a pattern."""
        text = path.lower()
        for _ in range(MAX_DECODINGS):
            if "%" not in text:
                break
            # A raw byte may be dropped before decoding, so it is never joined with an escape.
            text = "".join(map(decoded, NOT_UTF8_EITHER.split(text))).lower()
        if "%" in text or not (text.isascii() and text.isprintable()):
            if "%" in text or not _only_dropped(text):
                pieces = _SEPARATOR.split(text)
                return (
                    self._wordless
                    or not self._anchors.isdisjoint(pieces)
                    or any(map(self._could_hold, filter(_STRANGE.search, pieces)))
                )
            text = _NOT_PRINTABLE.sub("", text)
        if not self._anchors.isdisjoint(_NO_WORD.split(text)):
            return True
        return self._wordless and (self._solid is None or ".." in text or self._solid.match(path) is None)

    def could_be_held(self, text: str) -> bool:
        """Whether a path that is built of parts of a text may match a pattern. A part may begin anywhere."""
        text = text.lower()
        for _ in range(MAX_DECODINGS):
            if "%" not in text:
                break
            text = "".join(map(decoded, NOT_UTF8_EITHER.split(text))).lower()
        if self._wordless:
            return True
        if text.isascii() and text.isprintable() and "%" not in text:
            return any(map(text.__contains__, self._anchors))
        return self._could_hold(text)

    def _could_hold(self, text: str) -> bool:
        starts, ends, wanted = self._starts, self._ends, self._wanted

        def kept(hard: int, soft: int, character: str) -> tuple[int, int]:
            hard = ((hard | soft | starts) & wanted.get(character, 0)) << 1
            return hard, soft if character in "0123456789abcdefu" else 0

        hard = soft = 0
        for character in text:
            if " " <= character <= "~" and character != "%":
                hard, soft = kept(hard, soft, character)
            else:
                made = fold(character)
                if "%" in made or "\udc80" <= character <= "\udcff":
                    soft |= hard | starts
                    for _ in range(MAX_MADE):
                        soft |= soft << 1
                    hard = 0
                else:
                    after = hard, soft
                    for each in filter(str.isascii, made):
                        after = kept(*after, each)
                    hard, soft = hard | after[0], soft | after[1]
            if (hard | soft) & ends:
                return True
        return False


def _only_dropped(text: str) -> bool:
    """Whether parsers can only drop what is not printable ASCII, and make or cut nothing of it."""
    return not any(
        character == "\0"
        or "\udc80" <= character <= "\udcff"
        or (character > "\x7f" and any(map(str.isascii, fold(character))))
        for character in set(text)
    )


def _words(pattern: RoutePattern) -> Iterator[str]:
    """The words of a pattern, in lower case. What touches a variable is only a part of a word."""
    for segment in pattern.folded:
        for place, text in enumerate(segment.texts):
            for match in _WORD.finditer(text):
                begins = match.start() > 0 or place == 0
                ends = match.end() < len(text) or place == len(segment.texts) - 1
                if begins and ends:
                    yield match[0]
