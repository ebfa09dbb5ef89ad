"""Checks the answers of a sidecar by the models they are made from. An answer that does not fit is rejected.

A check is more tolerant than the model, because the sidecar may be of another version: it ignores unknown
members, takes any text for a word of a list, and lets members marked `LATER` be missing. Health checks use
it, so it imports next to nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NotRequired, Union, get_args, get_origin, get_type_hints

from sidecar.web.wire.forms import LATER, OPEN, Keywords

# The model of an answer, or the type of one of its members.
Shape = Any

# Larger than every count and size in an answer, and small enough to print and to calculate with.
_MAX_COUNT = 10**18
# Larger than every number of dollars and seconds, and small enough for a date.
_MAX_NUMBER = 1e10
_members = cache(lambda model: get_type_hints(model, include_extras=True))


def misfit(value: Any, shape: Shape) -> str | None:
    """The place of the first value that does not fit its shape; None if all fit."""
    place = next(_misfits(value, shape, ""), None)
    return "the answer" if place == "" else place


def is_number(value: Any) -> bool:
    """Whether a value is a number that can be printed and calculated with."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _MAX_COUNT


def _misfits(value: Any, shape: Shape, place: str) -> Iterator[str]:
    origin: Any = get_origin(shape)
    arms = get_args(shape)
    if origin is Annotated:
        shape, *marks = arms
        if LATER in marks and value is None:
            return
        if OPEN in marks:
            one = next(iter(_members(shape).values()))
            if not isinstance(value, dict) or any(misfit(each, one) for each in value.values()):
                yield place
            return
        if not all(_obeys(value, mark.keywords) for mark in marks if isinstance(mark, Keywords)):
            yield place
        yield from _misfits(value, shape, place)
    elif origin in (Union, UnionType):
        if value is not None or NoneType not in arms:
            (arm,) = (each for each in arms if each is not NoneType)
            yield from _misfits(value, arm, place)
    elif origin is list:
        if not isinstance(value, list):
            yield place
            return
        for index, each in enumerate(value):
            yield from _misfits(each, arms[0], f"{place}[{index}]")
    elif isinstance(shape, type) and hasattr(shape, "__total__"):
        yield from _misfits_of_members(value, shape, place)
    elif shape is not Any and not _is_of(value, origin or shape, arms):
        yield place


def _misfits_of_members(value: Any, model: Shape, place: str) -> Iterator[str]:
    """Those of a JSON object. Wrong members come before missing ones, because they say more."""
    if not isinstance(value, dict):
        yield place
        return
    above = f"{place}." if place else ""
    members = _members(model)
    for name, shape in members.items():
        if name in value:
            inner = get_args(shape)[0] if get_origin(shape) is NotRequired else shape
            yield from _misfits(value[name], inner, f"{above}{name}")
    for name, shape in members.items():
        if name not in value and get_origin(shape) is not NotRequired and LATER not in get_args(shape):
            yield f"{above}{name}"


def _is_of(value: Any, kind: Any, words: tuple[Any, ...]) -> bool:
    """Whether a value is of a type without members. The words of a `Literal` are all of one type."""
    if kind is Literal:
        return isinstance(value, type(words[0]))
    if kind is int or kind is float:
        most = _MAX_COUNT if isinstance(value, int) and kind is int else _MAX_NUMBER
        return is_number(value) and isinstance(value, int | kind) and abs(value) < most
    return isinstance(value, dict if kind is dict else bool if kind is bool else str)


def _obeys(value: Any, keywords: dict[str, Any]) -> bool:
    """Whether a value obeys the keywords on which calculations depend: a minimum and the form of a time."""
    if "minimum" in keywords and is_number(value) and value < keywords["minimum"]:
        return False
    return keywords.get("format") != "date-time" or value is None or _is_time(value)


def _is_time(value: Any) -> bool:
    """Whether a value is a time with its offset, within the years that date arithmetic supports."""
    try:
        then = datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return False
    return then.tzinfo is not None and 1970 <= then.year < 9000
