"""Durations in files and on the command line: a whole number and one unit, such as `10s`, `5m`, `2h` or `1d`.

The bodies of requests hold numbers of seconds only.
"""

from __future__ import annotations

import re

UNITS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}
PATTERN = "(0|[1-9][0-9]{0,8})([smhd])"
EXAMPLES = "10s, 5m, 2h or 1d"


def seconds_of(text: str) -> int | None:
    """The number of seconds, or None if the text is no duration."""
    found = re.fullmatch(PATTERN, text)
    return None if found is None else int(found[1]) * UNITS[found[2]]
