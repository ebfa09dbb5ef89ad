"""Plain conditions: Python judges them exactly as the engine would, at a small part of its cost.

Most conditions compare facts with constants, such as `attempts_used > 3 && risk != "critical"`. A call of the
engine costs as much as dozens of these comparisons. A condition is plain if it consists of the following; any
other text, and any value that is not named here, is left to the engine:

1. A text is compared with a constant of printable ASCII (`==`, `!=`), or searched in a list of them (`in`).
2. A number is compared with a whole number of at most 18 digits, and `now` with a constant timestamp in UTC.
3. Comparisons are combined by `&&` and `||`, without brackets. `&&` binds more tightly in both languages.
4. Texts are printable. Numbers are not negative and have at most 57 bits, so `now` is a time that the engine
   can hold. No step can fail then, so it makes no difference that CEL may judge both sides of `&&` and `||`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from sidecar.core.instant import parse_time

TEXTS = frozenset({"action", "risk", "incident_id", "tenant_id", "principal", "principal_kind"})
NUMBERS = frozenset({"max_cost_micros", "attempts_used", "attempts_remaining", "scope_age_seconds"})
NOW = "now"
_BIG = 2**57

_BLANK = r"[ \t\n\r\f]*"
_TEXT = r"""(?:"[ !#-&(-\[\]-~]*"|'[ !#-&(-\[\]-~]*')"""
# At most six decimals, because an instant is a number of microseconds.
_TIME = r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]{1,6})?Z"
_SIGN = "==|!=|<=|>=|<|>"
_WHOLE = r"-?(?:0|[1-9][0-9]{0,17})"
_TERM = re.compile(
    rf"""{_BLANK}(?:
        (?P<text>{"|".join(sorted(TEXTS))})(?:
            {_BLANK}(?P<equal>==|!=){_BLANK}(?P<constant>{_TEXT})
            |[ ]in[ ]\[(?P<list>{_TEXT}(?:,[ ]?{_TEXT})*)\])
        |(?P<number>{"|".join(sorted(NUMBERS))}){_BLANK}(?P<sign>{_SIGN}){_BLANK}(?P<whole>{_WHOLE})
        |now{_BLANK}(?P<order>{_SIGN}){_BLANK}timestamp\((?P<quote>["'])(?P<time>{_TIME})(?P=quote)\)
    ){_BLANK}(?P<then>&&|\|\||\Z)""",
    re.VERBOSE,
)
_THEN = {"&&": " and ", "||": " or "}


def translated(text: str) -> str | None:
    """A plain condition as a Python expression of the names of facts, None if the condition is not plain."""
    expression, position = "", 0
    while True:
        found = _TERM.match(text, position)
        if found is None:
            return None
        if found["number"]:
            expression += f"{found['number']} {found['sign']} {found['whole']}"
        elif found["time"]:
            try:
                expression += f"{NOW} {found['order']} {parse_time(found['time'])}"
            except ValueError:
                return None
        elif found["equal"]:
            expression += f"{found['text']} {found['equal']} {found['constant'][1:-1]!r}"
        else:
            constants = tuple(one[1:-1] for one in re.findall(_TEXT, found["list"]))
            expression += f"{found['text']} in {constants!r}"
        if not found["then"]:
            return expression
        expression += _THEN[found["then"]]
        position = found.end()


def function(facts: Sequence[str], expressions: Sequence[str]) -> Callable[..., tuple[bool, ...]]:
    """A function of the named facts that returns the values of translated conditions."""
    # The expressions contain nothing but what `translated` allows.
    made: Callable[..., tuple[bool, ...]] = eval(
        f"lambda {', '.join(facts)}: ({', '.join(expressions)},)", {}
    )
    return made


def is_plain(value: Any) -> bool:
    """Whether the engine can hold a value for certain."""
    return value.isprintable() if isinstance(value, str) else 0 <= value < _BIG
