"""The kinds of numbers in configuration and policies: counts, seconds and dollars, each with its bounds."""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated, Any

from sidecar.core.duration import EXAMPLES, PATTERN, seconds_of
from sidecar.core.money import is_whole_micros, to_dollars, to_micros
from sidecar.settings.faults import kind
from sidecar.settings.values import Kind

MAX_SECONDS = 86_400
MAX_LIFETIME_SECONDS = 366 * MAX_SECONDS
MAX_COUNT = 1_000_000
MAX_DOLLARS = 1_000_000_000


def whole(low: int, high: int) -> Kind:
    """Whole numbers between two bounds, both included."""

    def check(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"expects a whole number, found {kind(value)}")
        if not low <= value <= high:
            raise ValueError(f"must be from {low} to {high}")
        return value

    return Kind(check, {"type": "integer", "minimum": low, "maximum": high})


def number(low: float, high: float, *, above: bool = False) -> Kind:
    """Numbers between two bounds. The lower one is included unless they must lie above it."""

    def check(value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"expects a number, found {kind(value)}")
        # Not a number fails every comparison.
        if not (low < value if above else low <= value) or not value <= high:
            raise ValueError(
                f"must be above {low} and at most {high}" if above else f"must be from {low} to {high}"
            )
        return float(value)

    lower = {"exclusiveMinimum" if above else "minimum": low}
    return Kind(check, {"type": "number", **lower, "maximum": high})


def seconds(low: float, high: float, *, above: bool = False) -> Kind:
    """As `number`, in seconds, which may also be written as a duration."""
    return _or_duration(number(low, high, above=above))


def whole_seconds(low: int, high: int) -> Kind:
    """As `whole`, in seconds, which may also be written as a duration."""
    return _or_duration(whole(low, high))


def _or_duration(numbers: Kind) -> Kind:
    check: Any = numbers.check

    def checked(value: object) -> object:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ValueError(_wanted(value))
        given = seconds_of(value) if isinstance(value, str) else value
        if given is None:
            raise ValueError(_wanted(value))
        try:
            return check(given)
        except ValueError as exc:
            # A bound without its unit would be hard to compare with a duration.
            unit = " seconds" if isinstance(value, str) else ""
            raise ValueError(f"{exc}{unit}") from exc

    def _wanted(value: object) -> str:
        number = "a whole number" if numbers.schema["type"] == "integer" else "a number"
        return f"expects {number} of seconds, or a duration such as {EXAMPLES}, found {kind(value)}"

    schema = {**numbers.schema, "type": [numbers.schema["type"], "string"], "pattern": f"^{PATTERN}$"}
    return Kind(checked, schema)


def _micros(value: object) -> int:
    """Dollars as micro-dollars, exactly: a bound is never rounded."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"expects an amount of dollars, found {kind(value)}")
    micros = to_micros(value)
    if not is_whole_micros(Decimal(repr(value))):
        raise ValueError("has a fraction of a micro-dollar; use at most six digits after the point")
    return micros


Seconds = Annotated[float, seconds(0, MAX_SECONDS, above=True)]
Grace = Annotated[float, seconds(0, MAX_SECONDS)]
Fraction = Annotated[float, number(0, 1)]
Bytes = Annotated[int, whole(1, 1 << 30)]
Count = Annotated[int, whole(1, MAX_COUNT)]
ErrorStatus = Annotated[int, whole(400, 599)]
Lifetime = Annotated[int, whole_seconds(1, MAX_LIFETIME_SECONDS)]
# Micro-dollars; the file has dollars.
Dollars = Annotated[int, Kind(_micros, {"type": "number", "minimum": 0, "maximum": MAX_DOLLARS}, to_dollars)]
