"""Reads YAML strictly: text that two YAML versions read differently is an error.

YAML 1.1 reads `no` as false, `017` as 15 and `12:30` as 750; YAML 1.2 reads text, 17 and text. Anchors,
tags, merge keys and duplicate keys can give a file a meaning that its reader does not see. All of these are
errors with `file:line:column`.

PyYAML's own parser decides about every error, and its messages and places are shown. libyaml parses events
fifteen times as fast, so it reads first if both parsers are known to agree on the text. If libyaml stops, or
the text contains an error, PyYAML's parser reads the text again. So a text that either parser refuses is
refused.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sidecar.files._regular import NotRegular, read_regular
from sidecar.files.faults import ConfigurationError, Fault, shown

MAX_BYTES = 1_048_576

# Every character that is not printable in YAML, and the line ends that only YAML 1.1 knows. A comment that
# contains such a line end could hide a key.
_FORBIDDEN = re.compile(
    "[^\t\n\r\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]"
)
LINE_END = re.compile("\r\n|\r|\n")

# A comment right behind the indicator of a block scalar. Only libyaml accepts it.
_COMMENTED_BLOCK = re.compile(r"[|>][-+0-9]*#")

# Patterns for PyYAML's errors (context and problem), and the message for each. The first match wins.
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
        "a comma, ] or } is missing before here; inside [] or {}, text with braces such as {name} or ${...} "
        "needs quotes",
    ),
    (r"expected the node content", "a value is missing here; text that begins with a bracket needs quotes"),
    (r"<document start>", "text follows after the end of the document; remove it"),
    (r"directive|incompatible", "directives (%) have no use here; remove the line"),
)


class Unreadable(Exception):
    """The rest of the text cannot be read. `position` is line and column, from 1."""

    def __init__(self, position: tuple[int, int], message: str) -> None:
        super().__init__(message)
        self.position = position
        self.message = message


class Undecided(Exception):
    """The fast parser cannot be trusted with this text."""


def decoded(raw: str | bytes) -> str:
    """Decode a file. Raises Unreadable if it is too large or contains invisible characters."""
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
    """libyaml's events. Raises Undecided if it is not installed, or may read the text differently."""
    loader = getattr(yaml, "CSafeLoader", None)
    # libyaml accepts a tab between tokens, and PyYAML does not.
    if loader is None or "\t" in text or _COMMENTED_BLOCK.search(text):
        raise Undecided
    parser = loader(text)
    questioned = "?" in text
    try:
        for event in iter(parser.get_event, None):
            # Inside [] and {}, PyYAML reads a question mark in plain text as the indicator of a key.
            if questioned and type(event) is yaml.ScalarEvent and not event.style and "?" in event.value:
                raise Undecided
            yield event
    except yaml.YAMLError as exc:
        raise Undecided from exc
    finally:
        parser.dispose()


def careful(text: str) -> Iterator[Any]:
    """PyYAML's events, with its errors translated. PyYAML passes some bad numbers on to int() and chr()."""
    last: Any = None
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            last = event.end_mark
            yield event
    except yaml.MarkedYAMLError as exc:
        cause = f"{exc.context or ''}: {exc.problem or ''}"
        message = next((words for pattern, words in _SYNTAX if re.search(pattern, cause)), None)
        # PyYAML notices an open quote at the end of the file. The message names the place where it opens.
        opened = "found unexpected" in cause and "quoted scalar" in cause
        mark = exc.context_mark if opened else exc.problem_mark
        raise Unreadable(_place(mark), message or f"is not YAML ({exc.problem or 'unreadable'})") from exc
    except (yaml.YAMLError, ValueError, OverflowError) as exc:
        message = "behind this place stands an escape or a number that YAML does not know"
        raise Unreadable(_place(last), message) from exc


def _place(mark: Any) -> tuple[int, int]:
    """The line and column, from 1, of a mark of PyYAML."""
    return (mark.line + 1, mark.column + 1) if mark is not None else (1, 1)


def _position(before: str) -> tuple[int, int]:
    """Line and column, from 1, of the character after the given text."""
    lines = LINE_END.split(before)
    return len(lines), len(lines[-1]) + 1


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

# The first characters of numbers, and of plain text that YAML 1.1 and 1.2 type differently. The only other
# such text are the words below, of at most three letters.
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
    """Plain values (dict, list, str, int, float, bool, None) and the place of each.

    `marks` holds line and column of each key and item, `starts` those of the texts after keys. `broken` holds
    the paths of faults, at which the value is only a placeholder. `source` is the text that was read.
    """

    file: str
    value: Any
    marks: Mapping[KeyPath, tuple[int, int]] = field(default_factory=dict)
    broken: frozenset[KeyPath] = frozenset()
    starts: Mapping[KeyPath, tuple[int, int]] = field(default_factory=dict)
    source: str = ""

    def place(self, path: KeyPath) -> str:
        """`file:line:column` of a key or item, or of the nearest known one above it."""
        while path and path not in self.marks:
            path = path[:-1]
        return self._at(*self.marks.get(path, (1, 1)))

    def place_within(self, path: KeyPath, text: str, line: int, column: int) -> tuple[str, str]:
        """The place of a character of the text at a path, given its line and column in that text.

        If the file does not show the text literally (folded, on several lines, with escapes), the result is
        the place where the text begins, and words that identify the character.
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
        """Whether a fault at the path or above it is already reported."""
        return bool(self.broken) and any(path[:length] in self.broken for length in range(len(path) + 1))

    def _at(self, line: int, column: int) -> str:
        return f"{self.file}:{line}:{column}"


def parse(text: str | bytes, file: str, *, environment: Mapping[str, str] | None = None) -> Document:
    """Parse one document. Raises ConfigurationError with every fault found."""
    document, faults = survey(text, file, environment=environment)
    if document is None or faults:
        raise ConfigurationError(faults)
    return document


def survey(
    text: str | bytes, file: str, *, environment: Mapping[str, str] | None = None
) -> tuple[Document | None, tuple[Fault, ...]]:
    """Like `parse`, but returns the faults. The document is None if the text cannot be read to its end."""
    try:
        source = decoded(text)
    except Unreadable as exc:
        return None, (_fault_at(file, exc),)
    with suppress(Undecided, Unreadable):
        reading = _Reading(file, environment)
        document = reading.run(source, fast(source))
        if not reading.faults:
            return document, ()
    reading = _Reading(file, environment)
    try:
        document = reading.run(source, careful(source))
    except Unreadable as exc:
        return None, in_order([*reading.faults, _fault_at(file, exc)])
    return document, in_order(reading.faults)


def contents(path: Path) -> bytes:
    """Read at most MAX_BYTES + 1 bytes of a file. Raises ConfigurationError if it cannot be read."""
    try:
        return read_regular(path, MAX_BYTES + 1)
    except NotRegular:
        message = "is not a regular file; remove it, or put one in its place"
    except (OSError, ValueError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc)
        message = f"cannot be read ({reason}); check the name and the permissions"
    raise ConfigurationError([Fault(str(path), "", message)])


def plain(text: str) -> Any:
    """A plain scalar's value: YAML 1.2's null, truth values and numbers, else text. May raise ValueError."""
    if text in _NULL:
        return None
    if text in _TRUTH:
        return _TRUTH[text]
    if text[0] not in _TELLING and (len(text) > 3 or not _WORD.fullmatch(text)):
        return text  # most values end here; the patterns would give the same result, more slowly
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


def dotted(path: KeyPath) -> str:
    """`("gate", "routes", 0, "mode")` as `gate.routes[0].mode`."""
    key = ""
    for step in path:
        key += f"[{step}]" if isinstance(step, int) else f".{shown(step)}" if key else shown(step)
    return key


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean "..."?`, or an empty text if no known word is similar."""
    words = {each.lower(): each for each in known}
    near = difflib.get_close_matches(word.lower(), words, n=1, cutoff=0.6)
    return f'; did you mean "{words[near[0]]}"?' if near else ""


def in_order(faults: Iterable[Fault]) -> tuple[Fault, ...]:
    """Faults by file, line and column; those without a position (environment, flags) come last."""

    def position(fault: Fault) -> tuple[bool, str, int, int]:
        found = re.fullmatch(r"(.*):([0-9]+):([0-9]+)", fault.place, re.DOTALL)
        return (False, found[1], int(found[2]), int(found[3])) if found else (True, fault.place, 0, 0)

    return tuple(sorted(faults, key=position))


class _Reading:
    """One pass over the events of one text. Raises Unreadable if it cannot continue."""

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
        line, column = _place(event.start_mark)
        self.faults.append(Fault(f"{self.file}:{line}:{column}", dotted(path), message))

    def _document(self, events: Iterator[Any]) -> Any:
        value: Any = None
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent):
                if self.marks:
                    raise Unreadable(
                        _place(event.start_mark), "a second document begins here; keep one per file"
                    )
                if event.tags:
                    self._fault(event, (), "directives (%TAG) have no use here; remove the line")
                root = next(events)
                value = self._value(root, events, ())
                self.marks[()] = _place((event if value is None else root).start_mark)
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
            raise Unreadable(_place(event.start_mark), message)
        if isinstance(event, yaml.MappingStartEvent):
            return self._mapping(events, path)
        items: list[Any] = []
        for item in events:
            if isinstance(item, yaml.SequenceEndEvent):
                break
            here = (*path, len(items))
            self.marks[here] = _place(item.start_mark)
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
                self._fault(event, here, f"is already in line {line}; remove one of them")
                key = None
            if key is None:
                # The value of an unusable key is read only to find its faults, and leaves no marks.
                kept = self.marks, self.starts, self.broken
                self.marks, self.starts, self.broken = {}, {}, set()
                self._value(next(events), events, here)
                self.marks, self.starts, self.broken = kept
            else:
                self.marks[here] = _place(event.start_mark)
                behind = next(events)
                value = mapping[key] = self._value(behind, events, here)
                if isinstance(value, str):
                    self.starts[here] = _place(behind.start_mark)
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
            # Text from the environment may be a secret, so the message does not repeat it.
            said = shown(filled) if "${" not in text else f"{shown(text)}, once filled in,"
            self._fault(event, path, f"{said} {exc}")
            return None

    def _characters(self, event: Any, text: str, path: KeyPath) -> str | None:
        """Join surrogate pairs as JSON writes them. Half a pair, and NUL, are faults."""
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
        """Fill in `${VAR}` and `${VAR:default}`. The result is always text, never structure."""
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
