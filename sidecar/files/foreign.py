"""Reads JSON and YAML that another program wrote, with the place of each value.

The sidecar's own files are read strictly (yamlfile.py). A document of another program may hold what is
refused there: keys such as `200`, anchors, tags, tabs. Such a document is read more generously here:

1. A key that stands twice in one map is still a mistake, because one of its values would be lost unseen.
2. Keys are text, and so is every scalar but true, false and null, as it is written.
3. Each YAML node is visited once, however many aliases refer to it. A node within itself is a mistake.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from sidecar.files._regular import NotRegular, read_regular
from sidecar.files.faults import ConfigurationError, Fault, shown
from sidecar.files.yamlfile import LINE_END, Document, KeyPath

MAX_BYTES = 16 * 1_048_576
MAX_DEPTH = 128

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],:]|[^\s{}\[\],:"]+', re.DOTALL)
_TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def read(path: Path) -> Document:
    """The document in a file. Raises ConfigurationError with one fault, which names the line."""
    try:
        raw = read_regular(path, MAX_BYTES + 1)
    except NotRegular:
        raise _error(str(path), None, "is not a regular file; name one") from None
    except (OSError, ValueError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc)
        message = f"cannot be read ({reason}); check the name and the permissions"
        raise _error(str(path), None, message) from exc
    return parse(raw, str(path))


def parse(raw: bytes, file: str) -> Document:
    """The document in these bytes. JSON is told from YAML by its first character."""
    if len(raw) > MAX_BYTES:
        raise _error(file, None, f"is larger than {MAX_BYTES} bytes; leave out what is not needed")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as exc:
        place = _Lines(raw[: exc.start].decode("utf-8")).place(exc.start)
        raise _error(file, place, "is not UTF-8 here; save the file as UTF-8") from exc
    text = text.removeprefix("\ufeff")
    return _json(text, file) if text.lstrip()[:1] in ("{", "[") else _yaml(text, file)


def _error(file: str, place: tuple[int, int] | None, message: str) -> ConfigurationError:
    where = file if place is None else f"{file}:{place[0]}:{place[1]}"
    return ConfigurationError([Fault(where, "", message)])


def _twice(file: str, key: str, place: tuple[int, int], first: tuple[int, int]) -> ConfigurationError:
    return _error(file, place, f"{shown(key)} is already in line {first[0]}; remove one of them")


def _too_deep(file: str, place: tuple[int, int] | None = None) -> ConfigurationError:
    return _error(file, place, f"is nested more than {MAX_DEPTH} levels deep; make it flatter")


# JSON ---------------------------------------------------------------------------------------------------


class _Lines:
    """Where the lines of a text begin."""

    def __init__(self, text: str) -> None:
        self._begins = [0, *(found.end() for found in LINE_END.finditer(text))]

    def place(self, offset: int) -> tuple[int, int]:
        """The line and column, from 1, of a character."""
        line = bisect_right(self._begins, offset)
        return line, offset - self._begins[line - 1] + 1


def _json(text: str, file: str) -> Document:
    try:
        value = json.loads(text, parse_int=str, parse_float=str, parse_constant=str)
    except json.JSONDecodeError as exc:
        message = f"is not JSON here ({exc.msg}); correct it"
        raise _error(file, (exc.lineno, exc.colno), message) from exc
    except RecursionError as exc:
        raise _too_deep(file) from exc
    marks: dict[KeyPath, tuple[int, int]] = {(): (1, 1)}
    _mark(_TOKEN.finditer(text), (), marks, _Lines(text), file)
    return Document(file, value, marks, source=text)


def _mark(
    tokens: Iterator[re.Match[str]],
    path: KeyPath,
    marks: dict[KeyPath, tuple[int, int]],
    lines: _Lines,
    file: str,
    first: re.Match[str] | None = None,
) -> None:
    """Note the places of all keys and items of the value that comes next in the tokens of valid JSON."""
    token = first or next(tokens)
    if token[0] not in ("{", "["):
        return
    if len(path) >= MAX_DEPTH:
        raise _too_deep(file, lines.place(token.start()))
    in_map, index = token[0] == "{", 0
    while (token := next(tokens))[0] not in ("}", "]"):
        if token[0] == ",":
            continue
        place = lines.place(token.start())
        if in_map:
            here = (*path, json.loads(token[0]))
            if here in marks:
                raise _twice(file, str(here[-1]), place, marks[here])
            next(tokens)  # the colon
        else:
            here = (*path, index)
            index += 1
        marks[here] = place
        _mark(tokens, here, marks, lines, file, None if in_map else token)


# YAML ---------------------------------------------------------------------------------------------------


def _yaml(text: str, file: str) -> Document:
    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        node = yaml.compose(text, Loader=loader)
    except yaml.MarkedYAMLError as exc:
        place = None if exc.problem_mark is None else (exc.problem_mark.line + 1, exc.problem_mark.column + 1)
        raise _error(file, place, f"is not YAML here ({exc.problem or exc.context}); correct it") from exc
    except (yaml.YAMLError, ValueError, OverflowError) as exc:
        reason = shown(" ".join(str(exc).split()), 200)
        raise _error(file, None, f"is not YAML ({reason}); correct it") from exc
    except RecursionError as exc:
        raise _too_deep(file) from exc
    reading = _Nodes(file)
    value = None if node is None else reading.value(node, ())
    return Document(file, value, reading.marks, source=text)


class _Nodes:
    """Makes plain values of YAML nodes. Equal nodes give the same value, and the places of the first path."""

    def __init__(self, file: str) -> None:
        self.marks: dict[KeyPath, tuple[int, int]] = {(): (1, 1)}
        self._file = file
        self._values: dict[int, Any] = {}
        self._open: set[int] = set()

    def value(self, node: Any, path: KeyPath) -> Any:
        if isinstance(node, yaml.ScalarNode):
            return _scalar(node)
        if id(node) in self._values:
            return self._values[id(node)]
        if id(node) in self._open:
            raise _error(self._file, _place(node), "contains itself; remove the alias")
        if len(path) >= MAX_DEPTH:
            raise _too_deep(self._file, _place(node))
        self._open.add(id(node))
        made = self._map(node, path) if isinstance(node, yaml.MappingNode) else self._list(node, path)
        self._open.discard(id(node))
        self._values[id(node)] = made
        return made

    def _list(self, node: Any, path: KeyPath) -> list[Any]:
        items = []
        for index, item in enumerate(node.value):
            self.marks[(*path, index)] = _place(item)
            items.append(self.value(item, (*path, index)))
        return items

    def _map(self, node: Any, path: KeyPath) -> dict[str, Any]:
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key, behind in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _error(
                    self._file, _place(key), "a list or a map cannot be a key; write the key as text"
                )
            if key.tag == "tag:yaml.org,2002:merge":
                for part in behind.value if isinstance(behind, yaml.SequenceNode) else [behind]:
                    found = self.value(part, (*path, "<<"))
                    merged = {**(found if isinstance(found, dict) else {}), **merged}
                continue
            here = (*path, key.value)
            if key.value in own:
                raise _twice(self._file, key.value, _place(key), self.marks[here])
            self.marks[here] = _place(key)
            own[key.value] = self.value(behind, here)
        return {**merged, **own}


def _scalar(node: Any) -> Any:
    kind = node.tag.rpartition(":")[2]
    if kind == "null":
        return None
    return _TRUTH[node.value.lower()] if kind == "bool" else node.value


def _place(node: Any) -> tuple[int, int]:
    return node.start_mark.line + 1, node.start_mark.column + 1
