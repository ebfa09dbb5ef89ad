"""From bytes to the events of a YAML text. PyYAML's own parser alone says what is refused, and how.

libyaml splits a text fifteen times as fast, and reads first wherever both are known to see the same. Where it
does not get to the end, or what it shows is refused, PyYAML's own parser reads the text again: so nothing
passes that one of the two refuses, and every message and place is that of one parser.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

MAX_BYTES = 1_048_576

# YAML's printable characters less those that only YAML 1.1 takes for line ends: behind one of them a
# comment could hide a key.
_FORBIDDEN = re.compile(
    "[^\t\n\r\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]"
)
LINE_END = re.compile("\r\n|\r|\n")

# What only libyaml takes for a comment, right behind the sign of a block of text.
_COMMENTED_BLOCK = re.compile(r"[|>][-+0-9]*#")

# What PyYAML says (its context and problem), and what to do about it. First match wins.
_SYNTAX: tuple[tuple[str, str], ...] = (
    (r"character '\\t'", "a tab stands where YAML allows only spaces; replace it by spaces"),
    (r"cannot start any token", "text cannot begin with this character; put the text in quotes"),
    (r"scanning an (alias|anchor)", 'aliases and anchors are refused; put text such as "*" in quotes'),
    (r"\btag\b|undefined tag", "tags (!) are refused; put text that begins with ! in quotes"),
    (r"quoted scalar: found unexpected", "the quoted text that begins here is never closed; add the quote"),
    (r"double-quoted scalar", "this is no escape; write \\\\ for a backslash, or use single quotes"),
    (r"values are not allowed", "a ': ' cannot stand here; put the text in quotes, or correct the indent"),
    (r"expected ':'", "a ':' is missing behind this key; add it, or correct the indentation"),
    (r"block (mapping|collection): ", "this does not fit the lines above; correct the indentation"),
    (
        r"flow (sequence|mapping): ",
        "a comma, ] or } is missing before here; a ${...} inside [] or {} needs quotes",
    ),
    (r"expected the node content", "a value is missing here; text that begins with a bracket needs quotes"),
    (r"<document start>", "text follows after the end of the document; remove it"),
    (r"directive|incompatible", "directives (%) have no use here; remove the line"),
)


class Unreadable(Exception):
    """The rest of the text cannot be read: at which line and column, from 1, and why."""

    def __init__(self, position: tuple[int, int], message: str) -> None:
        super().__init__(message)
        self.position = position
        self.message = message


class Undecided(Exception):
    """The fast parser is not the one to say what this text means."""


def decoded(raw: str | bytes) -> str:
    """The text of a file, bounded, without what could not be seen in it. Raises Unreadable."""
    if len(raw) > MAX_BYTES:
        raise Unreadable((1, 1), f"is larger than {MAX_BYTES} bytes; split it or make it shorter")
    if isinstance(raw, str):
        text = raw
    else:
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as exc:
            before = raw[: exc.start].decode("utf-8")
            raise Unreadable(_position(before), "is not UTF-8 here; save the file as UTF-8") from exc
    text = text.removeprefix("\ufeff")
    found = _FORBIDDEN.search(text)
    if found:
        message = f"U+{ord(found[0]):04X} is refused; remove it, or write an escape"
        raise Unreadable(_position(text[: found.start()]), message)
    return text


def fast(text: str) -> Iterator[Any]:
    """libyaml's events. Raises Undecided where it is not installed, or might see something else."""
    loader = getattr(yaml, "CSafeLoader", None)
    # A tab between tokens is nothing to libyaml.
    if loader is None or "\t" in text or _COMMENTED_BLOCK.search(text):
        raise Undecided
    parser = loader(text)
    asked = "?" in text
    try:
        for event in iter(parser.get_event, None):
            # Inside [] and {}, a question mark in plain text is the sign of a key to PyYAML.
            if asked and type(event) is yaml.ScalarEvent and not event.style and "?" in event.value:
                raise Undecided
            yield event
    except yaml.YAMLError as exc:
        raise Undecided from exc
    finally:
        parser.dispose()


def careful(text: str) -> Iterator[Any]:
    """PyYAML's events, its errors translated. It lets some numbers through to int() and chr()."""
    last: Any = None
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            last = event.end_mark
            yield event
    except yaml.MarkedYAMLError as exc:
        cause = f"{exc.context or ''}: {exc.problem or ''}"
        message = next((words for pattern, words in _SYNTAX if re.search(pattern, cause)), None)
        # An open quote is noticed at the end of the file; where it began is what helps.
        opened = "found unexpected" in cause and "quoted scalar" in cause
        mark = exc.context_mark if opened else exc.problem_mark
        raise Unreadable(of(mark), message or f"is not YAML ({exc.problem or 'unreadable'})") from exc
    except (yaml.YAMLError, ValueError, OverflowError) as exc:
        message = "behind this place stands an escape or a number that YAML does not know"
        raise Unreadable(of(last), message) from exc


def of(mark: Any) -> tuple[int, int]:
    """Line and column, from 1, of one of PyYAML's marks."""
    return (mark.line + 1, mark.column + 1) if mark is not None else (1, 1)


def _position(before: str) -> tuple[int, int]:
    """Line and column, from 1, of what follows the given text."""
    lines = LINE_END.split(before)
    return len(lines), len(lines[-1]) + 1
