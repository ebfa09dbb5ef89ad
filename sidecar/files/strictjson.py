"""Parses JSON strictly: a text that two parsers could read differently is refused (G4).

jiter refuses duplicate keys (after unescaping), lone surrogates, NaN and Infinity, bytes that are not
UTF-8, a byte order mark, trailing bytes, and more than 200 levels. Numbers are bounded here.
"""

from __future__ import annotations

from decimal import Decimal
from math import isinf
from typing import Any

import jiter

# A double holds 17 significant digits and exponents from -324 to 308. Other parsers may misread larger
# numbers.
MAX_DIGITS = 64
MIN_EXPONENT, MAX_EXPONENT = -324, 308
_INTEGERS = 10**MAX_DIGITS


class NotJson(ValueError):
    """The bytes are not strict JSON. The message says why, and gives line and column if known."""


def parse(text: bytes) -> dict[str, Any]:
    """Parse one JSON object. Numbers with a fraction or exponent become Decimal."""
    document = parse_value(text)
    if not isinstance(document, dict):
        raise NotJson("the body must be one JSON object")
    return document


def parse_document(text: bytes) -> dict[str, Any] | list[Any]:
    """Parse one JSON object or array, as `parse` does."""
    document = parse_value(text)
    if not isinstance(document, dict | list):
        raise NotJson("the body must be one JSON object or array")
    return document


def parse_value(text: bytes) -> Any:
    """Parse one JSON value of any type."""
    try:
        document = jiter.from_json(
            text, allow_inf_nan=False, catch_duplicate_keys=True, float_mode="decimal", cache_mode="keys"
        )
    except ValueError as exc:
        raise NotJson(str(exc)) from exc
    _bound_numbers(document)
    return document


def _bound_numbers(document: Any) -> None:
    waiting: list[Any] = [[document]]  # containers themselves, because a view of each would take memory
    while waiting:
        container = waiting.pop()
        for value in container.values() if type(container) is dict else container:
            kind = type(value)  # jiter makes no instances of subclasses
            if kind is str:
                continue
            if kind is dict or kind is list:
                waiting.append(value)
            elif kind is Decimal:
                beyond = value and not MIN_EXPONENT <= value.adjusted() <= MAX_EXPONENT
                if beyond or len(value.as_tuple().digits) > MAX_DIGITS or _is_lost(value):
                    raise NotJson("a number has too many digits or too large an exponent")
            elif kind is int and not -_INTEGERS < value < _INTEGERS:
                raise NotJson("a number has too many digits or too large an exponent")


def _is_lost(number: Decimal) -> bool:
    """Whether the number, read as a double, becomes an infinity or a false zero."""
    double = float(number)
    return isinf(double) or (double == 0 and number != 0)
