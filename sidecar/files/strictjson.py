"""JSON that can be read in one way only. What two parsers could read in two ways is refused (G4).

jiter refuses duplicate keys (after unescaping), lone surrogates, NaN and Infinity, bytes that are not
UTF-8, a byte order mark, trailing bytes, and more than 200 levels. Numbers are bounded here.
"""

from __future__ import annotations

from decimal import Decimal
from math import isinf
from typing import Any

import jiter

# A double holds 17 significant digits and exponents from -324 to 308; more is a trap for somebody's parser.
MAX_DIGITS = 64
MIN_EXPONENT, MAX_EXPONENT = -324, 308


class NotJson(ValueError):
    """The bytes are not strict JSON. The message says why and, where known, at which line and column."""


def parse(text: bytes) -> dict[str, Any]:
    """The one JSON object that the bytes hold; numbers with a fraction or exponent as Decimal."""
    document = parse_value(text)
    if not isinstance(document, dict):
        raise NotJson("the body must be one JSON object")
    return document


def parse_value(text: bytes) -> Any:
    """The one JSON value that the bytes hold, which may be a list, text or number as well."""
    try:
        document = jiter.from_json(
            text, allow_inf_nan=False, catch_duplicate_keys=True, float_mode="decimal", cache_mode="keys"
        )
    except ValueError as exc:
        raise NotJson(str(exc)) from exc
    _bound_numbers(document)
    return document


def _bound_numbers(document: Any) -> None:
    waiting: list[Any] = [document]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)
        elif isinstance(value, Decimal):
            beyond = value and not MIN_EXPONENT <= value.adjusted() <= MAX_EXPONENT
            if beyond or len(value.as_tuple().digits) > MAX_DIGITS or _is_lost(value):
                raise NotJson("a number has too many digits or too large an exponent")
        elif isinstance(value, int) and abs(value) >= 10**MAX_DIGITS:
            raise NotJson("a number has too many digits or too large an exponent")


def _is_lost(number: Decimal) -> bool:
    """Whether whoever reads it as a double reads an infinity, or a zero that it is not."""
    double = float(number)
    return isinf(double) or (double == 0 and number != 0)
