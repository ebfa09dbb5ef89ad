"""YAML without surprises: what two YAML versions would read differently is refused, never guessed.

YAML 1.1 reads `no` as false, `017` as 15 and `12:30` as 750; YAML 1.2 reads text, 17 and text. Anchors,
tags, merge keys and duplicate keys let a file say something else than what the eye sees. All of that is an
error with `file:line:column`. The text comes split into events; typing, bounds and places are ours.
"""

from __future__ import annotations

import difflib
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sidecar.errors import ConfigurationError, Fault
from sidecar.files import yamlevents
from sidecar.files.yamlevents import LINE_END, Undecided, Unreadable, of

MAX_DEPTH = 32
MAX_NUMBER_CHARS = 64

KeyPath = tuple[str | int, ...]

_NOT_TEXT = re.compile("[\0\ud800-\udfff]")
_VARIABLE = re.compile(r"\$\$\{|\$\{([A-Za-z_][A-Za-z0-9_]*)(:[^}]*)?\}|\$\{")

_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_TRUTH = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INTEGER = re.compile(r"[-+]?[0-9]+")
_RADIX = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")

_QUOTES = ", or put it in quotes if text is meant"

# Plain text that YAML 1.1 and 1.2 type differently, and what it is. All but the words, of three letters at
# most, begin with one of these, as numbers do.
_TELLING = "-+.0123456789=<"
_WORD = re.compile(r"(?i:yes|no|on|off|y|n)")
_SURPRISES: tuple[tuple[re.Pattern[str], str], ...] = (
    (_WORD, "is a truth value to YAML 1.1 only: write true or false"),
    (re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?"), "is base 60 to YAML 1.1: write one number"),
    (
        re.compile(r"[-+]?0[0-9][0-9_]*(\.[0-9_]*)?([eE][-+]?[0-9]+)?"),
        "is octal to YAML 1.1: write it without the zero, or as 0o17",
    ),
    (
        re.compile(
            r"(?=.*_)[-+]?(0x[0-9a-fA-F_]+|0b[01_]+|([0-9][0-9_]*)?\.?[0-9][0-9_]*\.?)([eE][-+]?[0-9]+)?"
        ),
        "is a number to YAML 1.1 only: write it without the underscores",
    ),
    (re.compile(r"[-+]?0b[01]+|[-+]0[xo][0-9a-fA-F]+"), "is a number to YAML 1.1 only: write it in decimal"),
    (re.compile(r"[-+]?\.(?i:inf)|\.(?i:nan)"), "is not a finite number: give one that is"),
    (re.compile(r"=|<<"), "has a meaning of its own to YAML 1.1: write something else"),
)


@dataclass(frozen=True, slots=True)
class Document:
    """Plain values (dict, list, str, int, float, bool, None) and where each of them stands.

    `marks` hold line and column of each key and item, `starts` those of the texts behind keys. `broken` holds
    the paths at which a fault was found and the value is only a stand-in. `source` is what was read.
    """

    file: str
    value: Any
    marks: Mapping[KeyPath, tuple[int, int]] = field(default_factory=dict)
    broken: frozenset[KeyPath] = frozenset()
    starts: Mapping[KeyPath, tuple[int, int]] = field(default_factory=dict)
    source: str = ""

    def place(self, path: KeyPath) -> str:
        """`file:line:column` of a key or item, or of the nearest one above it that is known."""
        while path and path not in self.marks:
            path = path[:-1]
        return self._at(*self.marks.get(path, (1, 1)))

    def place_within(self, path: KeyPath, text: str, line: int, column: int) -> tuple[str, str]:
        """The place of a character of the text at a path, given its line and column there.

        Where the file does not show the text as it is (folded, on several lines, with escapes): the place
        where the text begins, and words that say which character of it is meant.
        """
        lines = LINE_END.split(self.source)
        first, start = self.starts.get(path) or self.marks[path]
        shown_from = lines[first - 1][start - 1 :]
        sign = shown_from[:1]
        if sign == "|":
            wanted = "".join(text.split("\n")[line - 1 : line])
            found = "".join(lines[first + line - 1 : first + line])
            if wanted and found.endswith(wanted):
                return self._at(first + line, len(found) - len(wanted) + column), ""
        elif sign in ("'", '"'):
            if shown_from[1:].startswith(text + sign):
                return self._at(first, start + column), ""
        elif shown_from.startswith(text):
            return self._at(first, start + column - 1), ""
        return self._at(first, start), f" (line {line}, column {column} of this text)"

    def is_broken(self, path: KeyPath) -> bool:
        """Whether a fault at the path or above it was reported already."""
        return bool(self.broken) and any(path[:length] in self.broken for length in range(len(path) + 1))

    def _at(self, line: int, column: int) -> str:
        return f"{self.file}:{line}:{column}"


def parse(text: str | bytes, file: str, *, environment: Mapping[str, str] | None = None) -> Document:
    """One document, or ConfigurationError with every fault that was found."""
    document, faults = survey(text, file, environment=environment)
    if document is None or faults:
        raise ConfigurationError(faults)
    return document


def survey(
    text: str | bytes, file: str, *, environment: Mapping[str, str] | None = None
) -> tuple[Document | None, tuple[Fault, ...]]:
    """As `parse`, but gives the faults beside what could be read: no document, if not to its end."""
    try:
        source = yamlevents.decoded(text)
    except Unreadable as exc:
        return None, (_fault_at(file, exc),)
    with suppress(Undecided, Unreadable):
        reading = _Reading(file, environment)
        document = reading.run(source, yamlevents.fast(source))
        if not reading.faults:
            return document, ()
    reading = _Reading(file, environment)
    try:
        document = reading.run(source, yamlevents.careful(source))
    except Unreadable as exc:
        return None, in_order([*reading.faults, _fault_at(file, exc)])
    return document, in_order(reading.faults)


def contents(path: Path) -> bytes:
    """A file's bytes, bounded; ConfigurationError where it cannot be read."""
    try:
        with open(path, "rb", opener=_at_once) as stream:
            if stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                return stream.read(yamlevents.MAX_BYTES + 1)
            message = "is no regular file; remove it, or put one in its place"
    except (OSError, ValueError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc)
        message = f"cannot be read ({reason}); check the name and the permissions"
    raise ConfigurationError([Fault(str(path), "", message)])


def _at_once(name: str, flags: int) -> int:
    """Opens a file; a pipe in its place is not waited for."""
    return os.open(name, flags | os.O_NONBLOCK)


def plain(text: str) -> Any:
    """A plain scalar's value: YAML 1.2's null, truth values and numbers, else text. May raise ValueError."""
    if text in _NULL:
        return None
    if text in _TRUTH:
        return _TRUTH[text]
    if text[0] not in _TELLING and (len(text) > 3 or not _WORD.fullmatch(text)):
        return text  # most of what is written; the patterns would say the same, later
    for pattern, message in _SURPRISES:
        if pattern.fullmatch(text):
            raise ValueError(message + _QUOTES)
    integer = _INTEGER.fullmatch(text) or _RADIX.fullmatch(text)
    if not integer and not _FLOAT.fullmatch(text):
        return text
    if len(text) > MAX_NUMBER_CHARS:
        raise ValueError(f"is a number of over {MAX_NUMBER_CHARS} characters: write a shorter one" + _QUOTES)
    if integer:
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError("is too large a number: give a smaller one" + _QUOTES)
    return number


def shown(text: str, limit: int = 60) -> str:
    """Text for a message: one line, bounded, nothing that a terminal would obey."""
    cut = text if len(text) <= limit else text[:limit] + "..."
    return cut if cut.isprintable() else ascii(cut)[1:-1]


def dotted(path: KeyPath) -> str:
    """`("gate", "routes", 0, "mode")` as `gate.routes[0].mode`."""
    key = ""
    for step in path:
        key += f"[{step}]" if isinstance(step, int) else f".{shown(step)}" if key else shown(step)
    return key


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean "..."?`, or nothing where no known word is near."""
    near = difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=0.6)
    return f'; did you mean "{near[0]}"?' if near else ""


def in_order(faults: Iterable[Fault]) -> tuple[Fault, ...]:
    """Faults by file, line and column; those without a position (environment, flags) come last."""

    def position(fault: Fault) -> tuple[bool, str, int, int]:
        found = re.fullmatch(r"(.*):([0-9]+):([0-9]+)", fault.place, re.DOTALL)
        return (False, found[1], int(found[2]), int(found[3])) if found else (True, fault.place, 0, 0)

    return tuple(sorted(faults, key=position))


class _Reading:
    """One pass over the events of one text. Raises Unreadable where it cannot go on."""

    def __init__(self, file: str, environment: Mapping[str, str] | None) -> None:
        self.file = file
        self.environment = environment
        self.faults: list[Fault] = []
        self.marks: dict[KeyPath, tuple[int, int]] = {}
        self.starts: dict[KeyPath, tuple[int, int]] = {}
        self.broken: set[KeyPath] = set()

    def run(self, source: str, events: Iterator[Any]) -> Document:
        value = self._document(events)
        return Document(self.file, value, self.marks, frozenset(self.broken), self.starts, source)

    def _fault(self, event: Any, path: KeyPath, message: str) -> None:
        line, column = of(event.start_mark)
        self.faults.append(Fault(f"{self.file}:{line}:{column}", dotted(path), message))

    def _document(self, events: Iterator[Any]) -> Any:
        value: Any = None
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent):
                if self.marks:
                    raise Unreadable(of(event.start_mark), "a second document begins here; keep one per file")
                if event.tags:
                    self._fault(event, (), "directives (%TAG) have no use here; remove the line")
                root = next(events)
                value = self._value(root, events, ())
                self.marks[()] = of((event if value is None else root).start_mark)
        return value

    def _value(self, event: Any, events: Iterator[Any], path: KeyPath) -> Any:
        before = len(self.faults)
        self._refuse_decoration(event, path)
        value = self._scalar(event, path) if isinstance(event, yaml.ScalarEvent) else None
        if len(self.faults) > before:
            self.broken.add(path)
        if not isinstance(event, yaml.CollectionStartEvent):
            return value
        if len(path) >= MAX_DEPTH:
            message = f"is nested more than {MAX_DEPTH} levels deep; make it flatter"
            raise Unreadable(of(event.start_mark), message)
        if isinstance(event, yaml.MappingStartEvent):
            return self._mapping(events, path)
        items: list[Any] = []
        for item in events:
            if isinstance(item, yaml.SequenceEndEvent):
                break
            here = (*path, len(items))
            self.marks[here] = of(item.start_mark)
            items.append(self._value(item, events, here))
        return items

    def _refuse_decoration(self, event: Any, path: KeyPath) -> None:
        if isinstance(event, yaml.AliasEvent):
            self._fault(event, path, "aliases (*) are refused; write the value out, or put it in quotes")
        elif event.anchor is not None:
            self._fault(event, path, "anchors (&) are refused; remove it, write each value out")
        elif event.tag is not None:
            self._fault(event, path, "tags (!) are refused; remove it, or put the text in quotes")

    def _mapping(self, events: Iterator[Any], path: KeyPath) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        for event in events:
            if isinstance(event, yaml.MappingEndEvent):
                break
            key = self._key(event, events, path)
            here = path if key is None else (*path, key)
            if key is not None and here in self.marks:
                line, _ = self.marks[here]
                self._fault(event, here, f"stands in line {line} too; remove one of them")
                key = None
            if key is None:
                # The value of a key that cannot be used is read for its faults only, and leaves no marks.
                kept = self.marks, self.starts, self.broken
                self.marks, self.starts, self.broken = {}, {}, set()
                self._value(next(events), events, here)
                self.marks, self.starts, self.broken = kept
            else:
                self.marks[here] = of(event.start_mark)
                behind = next(events)
                value = mapping[key] = self._value(behind, events, here)
                if isinstance(value, str):
                    self.starts[here] = of(behind.start_mark)
        return mapping

    def _key(self, event: Any, events: Iterator[Any], path: KeyPath) -> str | None:
        if not isinstance(event, yaml.ScalarEvent):
            self._fault(event, path, "a list, map or alias cannot be a key; write the key as text")
            if not isinstance(event, yaml.AliasEvent):
                self._value(event, events, path)
            return None
        self._refuse_decoration(event, path)
        text = self._characters(event, event.value, path)
        if not event.style and text is not None:
            if text == "<<":
                self._fault(event, path, "merge keys (<<) are refused; write the keys out")
                return None
            try:
                typed = text if _WORD.fullmatch(text) else plain(text)
            except ValueError:
                typed = None
            if not isinstance(typed, str):
                said = f"the key {shown(text)}" if text else "a key without text"
                self._fault(event, path, f"{said} is not text to every reader; put it in quotes")
                return None
        return text

    def _scalar(self, event: Any, path: KeyPath) -> Any:
        text = self._characters(event, event.value, path)
        if text is None:
            return None
        filled = self._substituted(event, text, path) if self.environment is not None else text
        if filled is None:
            return None
        if event.style:
            return filled
        try:
            return plain(filled)
        except ValueError as exc:
            # What came from the environment may be a secret, and is not repeated.
            said = shown(filled) if "${" not in text else f"{shown(text)}, once filled in,"
            self._fault(event, path, f"{said} {exc}")
            return None

    def _characters(self, event: Any, text: str, path: KeyPath) -> str | None:
        """Joins surrogate pairs as JSON writes them; a half of one, or NUL, is no text."""
        if text.isascii() and "\0" not in text:
            return text
        try:
            joined = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
        except UnicodeDecodeError:
            joined = "\0"
        if "\0" in joined:
            self._fault(event, path, "escapes to NUL or half of a character; remove the escape")
            return None
        return joined

    def _substituted(self, event: Any, text: str, path: KeyPath) -> str | None:
        """`${VAR}` and `${VAR:default}` filled in. The result is only ever text, never structure."""
        environment = self.environment or {}
        problems: list[str] = []

        def fill(found: re.Match[str]) -> str:
            if found[0] == "$${":
                return "${"
            name, default = found[1], found[2]
            if name is None:
                problems.append("${ is not followed by NAME} or NAME:default}; write $${ for the text ${")
            elif name in environment:
                value = environment[name]
                if _NOT_TEXT.search(value):
                    problems.append(f"the variable {name} does not hold UTF-8 text; correct it")
                return value
            elif default is None:
                problems.append(f"the variable {name} is not set; set it, or write ${{{name}:default}}")
            return default[1:] if default else ""

        filled = _VARIABLE.sub(fill, text)
        for problem in problems:
            self._fault(event, path, problem)
        return None if problems else filled


def _fault_at(file: str, exc: Unreadable) -> Fault:
    line, column = exc.position
    return Fault(f"{file}:{line}:{column}", "", exc.message)
