"""Money is a whole number of micro-dollars. Dollars exist only at the edges.

0.1 + 0.1 + 0.1 dollars is exactly 0.3 dollars here, because it is 100000 three times.
"""

from __future__ import annotations

from decimal import ROUND_CEILING, Context, Decimal, InvalidOperation

MICROS_PER_DOLLAR = 1_000_000

# The default context rounds to 28 digits and to nearest; an amount may have more digits, and only rounds up.
_UP = Context(prec=100, rounding=ROUND_CEILING)

# Far above any ceiling, and well inside a signed 64-bit column even when thousands add up.
MAX_MICROS = 1_000_000_000 * MICROS_PER_DOLLAR


def to_micros(dollars: Decimal | int | float | str) -> int:
    """Dollars to micro-dollars; fractions of a micro-dollar round up, so cost is never understated.

    A float counts as the decimal that it prints as. Raises ValueError for what is not a finite
    amount from 0 to a billion dollars.
    """
    if isinstance(dollars, bool):
        raise ValueError("an amount of dollars is a number")
    try:
        # Zero is zero, whatever its sign and its exponent.
        amount = Decimal(repr(dollars) if isinstance(dollars, float) else dollars) or Decimal(0)
    except (InvalidOperation, ValueError) as exc:
        raise ValueError("an amount of dollars is a decimal number") from exc
    # adjusted() bounds the exponent before any arithmetic: 1e999999999 must not become an integer.
    if not amount.is_finite() or amount.is_signed() or amount.adjusted() > 9:
        raise ValueError("an amount of dollars is finite and between 0 and 1000000000")
    if amount.adjusted() < -20:
        return 1
    micros = int(_UP.multiply(amount, MICROS_PER_DOLLAR).to_integral_value(rounding=ROUND_CEILING))
    if micros > MAX_MICROS:
        raise ValueError("an amount of dollars is finite and between 0 and 1000000000")
    return micros


def is_whole_micros(dollars: Decimal) -> bool:
    """Whether the amount has no fraction of a micro-dollar (a ceiling must not be rounded)."""
    return Decimal(to_micros(dollars)) == _UP.multiply(dollars, MICROS_PER_DOLLAR)


def to_dollars(micros: int) -> float:
    """Micro-dollars to the JSON number of dollars that prints exactly (below 2**53 micro-dollars)."""
    return micros / MICROS_PER_DOLLAR
