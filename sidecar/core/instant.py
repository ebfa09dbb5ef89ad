"""An instant is a whole number of microseconds since 1970 (UTC). Dates and text exist only at the edges."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from functools import lru_cache

# Microseconds.
SECOND = 1_000_000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


def to_datetime(instant: int) -> datetime:
    return _EPOCH + instant * _MICROSECOND


def to_instant(time: datetime) -> int:
    """Raises TypeError for a time without its offset from UTC."""
    return (time - _EPOCH) // _MICROSECOND


def iso_time(instant: int) -> str:
    """The instant as ISO 8601 in UTC, always with six decimals so that it sorts as text."""
    return f"{_whole_second(instant // SECOND)}.{instant % SECOND:06d}+00:00"


@lru_cache(maxsize=1024)  # records and answers name the same few seconds again and again
def _whole_second(second: int) -> str:
    return to_datetime(second * SECOND).isoformat()[:19]


def parse_time(text: str) -> int:
    """A time in ISO 8601 as an instant. Raises ValueError, also if the offset is missing, or if the time is
    not in the years 1 to 9999 of UTC."""
    try:
        instant = to_instant(datetime.fromisoformat(text))
        to_datetime(instant)
    except TypeError as exc:
        raise ValueError("a time needs its offset from UTC, such as Z") from exc
    except OverflowError as exc:
        raise ValueError("a time must be in the years 1 to 9999") from exc
    return instant
