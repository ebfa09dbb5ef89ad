"""Money is a whole number of micro-dollars."""

from __future__ import annotations

import math
from contextlib import suppress
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.core.money import MAX_MICROS, is_whole_micros, to_dollars, to_micros

micros = st.integers(0, MAX_MICROS)
amounts = st.decimals(0, 10**9, allow_nan=False, allow_infinity=False)


@given(micros)
def test_there_and_back_is_the_same(value: int) -> None:
    assert to_micros(to_dollars(value)) == value
    assert to_micros(Decimal(value).scaleb(-6)) == value
    assert to_micros(f"{value // 10**6}.{value % 10**6:06d}") == value


@given(amounts)
def test_a_fraction_of_a_micro_dollar_rounds_up(amount: Decimal) -> None:
    assert to_micros(amount) == math.ceil(Fraction(amount) * 10**6)


@given(amounts)
def test_a_ceiling_has_no_fraction_of_a_micro_dollar(amount: Decimal) -> None:
    assert is_whole_micros(amount) == ((Fraction(amount) * 10**6).denominator == 1)


@given(st.floats(0, 10**9, allow_nan=False))
def test_a_float_counts_as_the_decimal_that_it_prints_as(amount: float) -> None:
    assert to_micros(amount) == to_micros(repr(amount))


@given(st.integers(1, 1000))
def test_tenths_add_up_exactly(count: int) -> None:
    assert sum(to_micros(0.1) for _ in range(count)) == to_micros(Decimal(count) / 10)


@pytest.mark.parametrize(
    "value",
    [
        "NaN",
        "sNaN",
        "Infinity",
        "-Infinity",
        "-1",
        "-0.0000001",
        "1e999",
        "1e999999999",
        "1e10",
        "1000000000.000001",
        "",
        "abc",
        "0x1",
        "1,5",
        "--1",
        True,
        False,
        -1,
        10**10,
        10**400,
        float("nan"),
        float("inf"),
        -0.5,
        Decimal("-1e-99"),
    ],
)
def test_what_is_no_amount_is_refused(value: str | int | float | Decimal) -> None:
    with pytest.raises(ValueError, match="amount of dollars"):
        to_micros(value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("0", 0),
        ("-0", 0),
        (-0.0, 0),
        ("0e5", 0),
        ("0E30", 0),
        ("-0E30", 0),
        ("0.000e999", 0),
        ("0e-30", 0),
        (Decimal("0E+999999"), 0),
        ("1e-999999", 1),
        ("1e-20", 1),
        ("0.0000001", 1),
        ("1000000000", MAX_MICROS),
        (10**9, MAX_MICROS),
        (0.3, 300_000),
        (0.1 + 0.2, 300_001),
    ],
)
def test_the_edges(value: str | int | float, expected: int) -> None:
    assert to_micros(value) == expected


@given(st.text(max_size=12))
def test_no_text_breaks_it(text: str) -> None:
    with suppress(ValueError):
        assert 0 <= to_micros(text) <= MAX_MICROS
