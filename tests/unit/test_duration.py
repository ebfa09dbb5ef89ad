"""Durations: a whole number and one unit."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.core.duration import PATTERN, UNITS, seconds_of


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("10s", 10), ("5m", 300), ("2h", 7_200), ("1d", 86_400), ("0s", 0), ("999999999s", 999_999_999)],
)
def test_a_whole_number_and_one_unit_are_a_duration(text: str, seconds: int) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize(
    "text",
    [
        *("", "10", "s", "10 s", " 10s", "10s\n", "1.5h", "1h30m", "-1s", "+1s", "05s"),
        *("1w", "1S", "1ms", "\u0661s", "1000000000s"),
    ],
)
def test_anything_else_is_none(text: str) -> None:
    assert seconds_of(text) is None


@given(st.integers(0, 999_999_999), st.sampled_from(sorted(UNITS)))
def test_every_number_of_every_unit_is_read_exactly(number: int, unit: str) -> None:
    assert seconds_of(f"{number}{unit}") == number * UNITS[unit]


@given(st.text("0123456789smhd. -"))
def test_the_pattern_of_the_schema_admits_what_the_parser_reads(text: str) -> None:
    assert (seconds_of(text) is not None) == (re.search(f"^{PATTERN}$", text) is not None)
