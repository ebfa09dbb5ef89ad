"""Money is a whole number of micro-dollars. Dollars exist only at the edges.

0.1 + 0.1 + 0.1 dollars is exactly 0.3 dollars here, because it is 100000 three times.
"""

from __future__ import annotations

from decimal import ROUND_CEILING, Context, Decimal, InvalidOperation

MICROS_PER_DOLLAR = 1_000_000

# The default context rounds to nearest at 28 digits. An amount may have more digits, and must round up.
_UP = Context(prec=100, rounding=ROUND_CEILING)

# This limit is far above any ceiling. Thousands of such amounts still fit into a signed 64-bit column.
MAX_MICROS = 1_000_000_000 * MICROS_PER_DOLLAR


def to_micros(dollars: Decimal | int | float | str) -> int:
    """Convert dollars to micro-dollars. A fraction of a micro-dollar rounds up, so cost is never understated.

    A float counts as the decimal that Python prints for it. Raises ValueError unless the amount is finite and
    between 0 and a billion dollars.
    """
    if isinstance(dollars, bool):
        raise ValueError("an amount of dollars is a number")
    try:
        # `or` normalizes a zero that has a sign or an exponent.
        amount = Decimal(repr(dollars) if isinstance(dollars, float) else dollars) or Decimal(0)
    except (InvalidOperation, ValueError) as exc:
        raise ValueError("an amount of dollars is a decimal number") from exc
    # This test bounds the exponent before any arithmetic, because 1e999999999 must not become an integer.
    if not amount.is_finite() or amount.is_signed() or amount.adjusted() > 9:
        raise ValueError("an amount of dollars is finite and between 0 and 1000000000")
    if amount.adjusted() < -20:
        return 1
    micros = int(_UP.multiply(amount, MICROS_PER_DOLLAR).to_integral_value(rounding=ROUND_CEILING))
    if micros > MAX_MICROS:
        raise ValueError("an amount of dollars is finite and between 0 and 1000000000")
    return micros


def is_whole_micros(dollars: Decimal) -> bool:
    """Whether the amount has no fraction of a micro-dollar.

    Ceilings need this, because they are not rounded.
    """
    return Decimal(to_micros(dollars)) == _UP.multiply(dollars, MICROS_PER_DOLLAR)


def to_dollars(micros: int) -> float:
    """Convert micro-dollars to a JSON number of dollars, which prints exactly below 2**53 micro-dollars."""
    return micros / MICROS_PER_DOLLAR
