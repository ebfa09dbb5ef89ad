"""The cost of an execution, as the backend's answer reports it.

An answer may be any JSON value, not only an object: `/0/cost` reads the first item of a list. If a pointer
finds nothing or the amount is unreadable, the hold is the cost.
"""

from __future__ import annotations

import re
from decimal import Decimal

from sidecar.core.facts import Source
from sidecar.core.money import MAX_MICROS, to_micros
from sidecar.core.pointer import follow
from sidecar.files.strictjson import MAX_EXPONENT, NotJson, parse_value
from sidecar.upstream import AnswerHead

# An amount in a header has the syntax of a non-negative JSON number. Decimal alone would accept more.
_AMOUNT = re.compile(r"(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]{1,3})?", re.ASCII)


def reported_cost(source: Source, head: AnswerHead, body: bytes | None) -> int | None:
    """The cost that the answer reports, in micro-dollars, or None if it is absent or unreadable."""
    value: object = None
    if source.kind == "header":
        values = [text for name, text in head.headers if name.lower() == source.name.encode("ascii")]
        value = values[0].decode("latin-1").strip() if len(values) == 1 else None
    elif body is not None:
        try:
            value = follow(parse_value(body), source.tokens)
        except NotJson:
            return None
    if isinstance(value, str) and not _AMOUNT.fullmatch(value):
        return None
    if not isinstance(value, str | int | Decimal) or isinstance(value, bool):
        return None
    amount = Decimal(value) or Decimal(0)  # normalizes a zero that has an exponent
    if amount < 0 or amount.adjusted() > MAX_EXPONENT:
        return None
    # An amount above the limit certainly exceeds the hold, so it becomes the limit.
    return MAX_MICROS if amount.adjusted() > 8 else to_micros(amount)
