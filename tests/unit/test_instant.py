"""Instants: to dates and text, and back."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.core.instant import iso_time, parse_time, to_datetime, to_instant


def test_a_time_has_six_decimals_and_its_offset() -> None:
    assert iso_time(0) == "1970-01-01T00:00:00.000000+00:00"
    assert iso_time(1_767_225_600_000_001) == "2026-01-01T00:00:00.000001+00:00"


@given(st.integers(0, 253_402_300_799_999_999))
def test_an_instant_survives_the_way_to_a_date_and_back(instant: int) -> None:
    assert to_instant(to_datetime(instant)) == instant
    assert to_instant(datetime.fromisoformat(iso_time(instant))) == instant


def test_a_date_counts_with_its_offset_and_not_without() -> None:
    assert to_instant(datetime(1970, 1, 1, 2, tzinfo=timezone(timedelta(hours=2)))) == 0
    with pytest.raises(TypeError):
        to_instant(datetime(1970, 1, 1))  # noqa: DTZ001 - a date without an offset is what is tested


def test_a_time_is_read_as_it_is_written() -> None:
    assert parse_time(iso_time(1_234_567)) == 1_234_567
    assert parse_time("1970-01-01T01:00:01+01:00") == 1_000_000
    for text in ("yesterday", "1970-01-01T00:00:00"):
        with pytest.raises(ValueError, match=r"isoformat|offset"):
            parse_time(text)


@pytest.mark.parametrize("text", ["9999-12-31T23:59:59-01:00", "0001-01-01T00:00:00+01:00"])
def test_a_time_that_cannot_be_written_in_utc_is_not_read(text: str) -> None:
    with pytest.raises(ValueError, match="in the years 1 to 9999"):
        parse_time(text)
