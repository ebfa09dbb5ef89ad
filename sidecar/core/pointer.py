"""JSON pointers (RFC 6901): one interpretation for every setting that takes a pointer.

1. The empty text points at the whole document. Any other text begins with `/`, and each `/` begins a step.
2. In a step, `~1` stands for `/` and `~0` for `~`. Any other `~` is an error. The empty step names the
   member "".
3. In an object a step is the name of a member, even one of digits: `/0` finds the member "0".
4. In an array a step is an index: `0`, or digits that do not begin with 0. `01`, `+1`, `-1`, other scripts'
   digits, and an index at or beyond the end find nothing, and neither does `-`, the item after the last.
5. Nothing else has members: a step into text, a number or null finds nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

# What has members. `dict` stands first, because asking an abstract class takes longer.
OBJECT: Final = (dict, Mapping)

# `follow` returns this if a pointer finds nothing. None is a value here, because JSON has null.
ABSENT: Final[Any] = object()

_POINTER = re.compile(r"(?:/(?:[^/~]|~[01])*)*", re.DOTALL)
# No list needs an index with more digits, and Python refuses to parse a number with thousands of digits.
_INDEX = re.compile(r"0|[1-9][0-9]{0,17}")


def parse(text: str) -> tuple[str, ...]:
    """The unescaped steps of a pointer, empty for the whole document. Raises ValueError."""
    if not _POINTER.fullmatch(text):
        raise ValueError("expects a JSON pointer: /member or /member/member, with ~ as ~0 and / as ~1")
    return tuple(step.replace("~1", "/").replace("~0", "~") for step in text.split("/")[1:])


def follow(document: Any, steps: Iterable[str]) -> Any:
    """The value that the steps find in a document of mappings, lists and tuples, or `ABSENT`."""
    for step in steps:
        if isinstance(document, OBJECT):
            if step not in document:
                return ABSENT
            document = document[step]
        elif isinstance(document, list | tuple):
            place = index(step, document)
            if place is None:
                return ABSENT
            document = document[place]
        else:
            return ABSENT
    return document


def index(step: str, items: Sequence[Any]) -> int | None:
    """The index that a step names in a list, or None."""
    if not _INDEX.fullmatch(step):
        return None
    place = int(step)
    return place if place < len(items) else None
