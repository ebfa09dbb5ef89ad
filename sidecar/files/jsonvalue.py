"""Converts any Python value of a record to JSON, as an immediate copy. `plain` never raises.

A decision record is evidence, so no value may keep it from being written. A value that JSON cannot hold
becomes text. A value that cannot be read is replaced by a marker.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterator, Mapping, Set
from dataclasses import fields, is_dataclass
from datetime import date, datetime, time
from enum import Enum
from typing import Any

import orjson

MAX_DEPTH = 64
# The copy stops at this size. Without the limit, a few lists that contain each other would grow
# exponentially. The part copied so far is at least as many bytes of JSON, so it is too large for a record in
# any case.
MAX_SIZE = 1 << 20

CYCLE = "<contains itself>"
TOO_DEEP = "<too deep>"
TOO_LARGE = "<too large>"
UNREADABLE = "<unreadable>"

_SMALLEST, _LARGEST = -(2**63), 2**64 - 1


def plain(value: object) -> Any:
    """A copy of the value in dicts, lists, text, numbers of at most 64 bits, booleans and None.

    Times become ISO 8601, enumerations their values, bytes UTF-8, dataclasses dicts; larger integers, NaN,
    infinities, decimals and everything else become text. Lone surrogates are escaped.
    """
    return _Copy().of(value, 0)


def as_text(value: object) -> str | None:
    """The value as text. If `plain` returns text, that text; otherwise its JSON. None stays None."""
    copied = plain(value)
    return copied if copied is None or isinstance(copied, str) else _as_json(copied)


class _Copy:
    """The state of one copy: the size that is left, and the containers that enclose the current value."""

    def __init__(self) -> None:
        self._left = MAX_SIZE
        self._around: set[int] = set()

    def of(self, value: object, depth: int) -> Any:
        try:
            return self._of(value, depth)
        except Exception:
            # A __str__, a property or an iterator of the caller's class raised.
            return UNREADABLE

    def _of(self, value: object, depth: int) -> Any:
        match value:
            case None | True | False:
                self._left -= 2
                return value
            case Enum():
                return self.of(value.value, depth)
            case str():
                return self._text(value)
            case int():
                return self._number(int.__int__(value))
            case float():
                return self._number(float.__float__(value))
            case bytes() | bytearray() | memoryview():
                return self._text(bytes(value).decode("utf-8", "backslashreplace"))
            case datetime() | date() | time():
                return self._text(value.isoformat())
            case Mapping() | list() | tuple() | deque() | Set():
                return self._within(value, depth)
            case _ if is_dataclass(value) and not isinstance(value, type):
                return self._within(value, depth)
            case _:
                return self._text(str(value))

    def _text(self, value: str) -> str:
        # Call the method of str itself, because a subclass may override it.
        text = str.encode(value, "utf-8", "backslashreplace").decode("utf-8")
        self._left -= 2 + len(text)
        return text

    def _number(self, number: int | float) -> Any:
        if isinstance(number, float):
            if not math.isfinite(number):
                return self._text(json.dumps(number))
        elif not _SMALLEST <= number <= _LARGEST:
            try:
                return self._text(str(number))
            except ValueError:  # Python limits the number of decimal digits that it writes
                return self._text(hex(number))
        self._left -= 2
        return number

    def _within(self, value: Any, depth: int) -> Any:
        """The copy of a container."""
        if id(value) in self._around:
            return CYCLE
        if depth >= MAX_DEPTH:
            return TOO_DEEP
        self._left -= 1
        self._around.add(id(value))
        try:
            if isinstance(value, Mapping):
                return self._object(iter(list(value.items())), depth)
            if is_dataclass(value):
                names = (field.name for field in fields(value))
                return self._object(((name, getattr(value, name)) for name in names), depth)
            members = [self.of(member, depth + 1) for member in self._bounded(iter(list(value)))]
            if self._left <= 0:
                members.append(TOO_LARGE)
            # A set has no order. Sorting it makes the record of equal sets equal.
            return sorted(members, key=_as_json) if isinstance(value, Set) else members
        finally:
            self._around.discard(id(value))

    def _object(self, members: Iterator[tuple[Any, Any]], depth: int) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, member in self._bounded(members):
            name = self._text(key) if isinstance(key, str) else self._key(key, depth)
            given, number = name, len(result)
            while name in result:  # 1 and "1" are two keys of a dict
                number += 1
                name = f"{given} #{number}"
            result[name] = self.of(member, depth + 1)
        if self._left <= 0:
            result[TOO_LARGE] = TOO_LARGE
        return result

    def _key(self, key: object, depth: int) -> str:
        """A key as text: 1 is "1", None is "null", (1, 2) is "[1, 2]"."""
        copied = self.of(key, depth + 1)
        return copied if isinstance(copied, str) else _as_json(copied)

    def _bounded(self, members: Iterator[Any]) -> Iterator[Any]:
        """The members, until the size is used up."""
        for member in members:
            if self._left <= 0:
                return
            yield member


def _as_json(value: object) -> str:
    return json.dumps(value, sort_keys=True)


def dumps(value: object, *, sort_keys: bool = False) -> bytes:
    """JSON without white space. Decimals become numbers. An integer beyond 64 bits keeps its digits, although
    orjson does not support it. Raises TypeError for a value that is not JSON."""
    option = orjson.OPT_SORT_KEYS if sort_keys else 0
    try:
        return orjson.dumps(value, default=float, option=option)
    except TypeError:
        return orjson.dumps(_within_64_bits(value), default=float, option=option)


def _within_64_bits(value: object) -> object:
    match value:
        case dict():
            return {key: _within_64_bits(member) for key, member in value.items()}
        case list() | tuple():
            return [_within_64_bits(member) for member in value]
        case int() if not _SMALLEST <= value <= _LARGEST:
            return str(value)
        case _:
            return value
