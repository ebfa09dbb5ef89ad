"""Names that a lenient backend may take for a judged one: keys of objects, and names in queries and forms.

A backend may read another member than the judged one, because it compares names less strictly. Real programs
apply these rules to names:

1. They fold case and Unicode compatibility forms (Go's encoding/json, ASP.NET, Jackson if configured so).
2. They end a name at NUL, because the name passes through C.
3. They drop control and format characters, because they clean their input.
4. They trim blanks at both ends.
5. In queries and forms, they read `a[b]` and `a.b` as parts of `a`. PHP replaces blank, dot and `[` by `_`.
   Older servers begin a new name behind `;`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from sidecar.core._readings import folded, is_format
from sidecar.core.cache import Cache

# The names whose readings are cached: the most of them, and the most characters of one.
MAX_NAMES = 512
MAX_NAME_CHARS = 64

_PARTS_BEGIN = re.compile(r"[\[.\s;]")
_PUNCTUATION = re.compile(r"[ .\[]")


def spellings(name: str) -> tuple[str, ...]:
    """The forms in which a lenient parser compares a name: whole, and cut at NUL."""
    if name.isascii() and name.isprintable():
        return (name.strip().lower(),)
    # A parser may trim leading NULs before it cuts at a later NUL.
    cut = next(filter(None, map(_cleaned, name.split("\0"))), "")
    return (_cleaned(name), cut) if "\0" in name else (cut,)


def _cleaned(name: str) -> str:
    dropped = {ord(each): None for each in set(name) if unicodedata.category(each) == "Cc" or is_format(each)}
    kept = name.translate(dropped) if dropped else name
    return folded(kept).strip()


def wanted(name: str) -> frozenset[str]:
    """The readings of a judged name. A name that shares one of its own readings (`read_as`) is a lookalike.

    A part of the judged name is not among them: `job` is no lookalike of `job.name`, which other frameworks
    than PHP read as a name of its own.
    """
    return frozenset(form for found in spellings(name) for form in (found, _flat(found)))


def _readings(name: str) -> frozenset[str]:
    return frozenset(
        form
        for found in spellings(name)
        for form in (found, _PARTS_BEGIN.split(found, maxsplit=1)[0], _flat(found))
    )


def _flat(name: str) -> str:
    """The name as PHP writes it. `a[b]` is written as `a.b` is, because some parsers read both alike."""
    return _PUNCTUATION.sub("_", name.replace("]", ""))


read_as: Cache[str, frozenset[str]] = Cache(_readings, max_entries=MAX_NAMES, max_size=MAX_NAME_CHARS)
"""The names that some server may read in one name of a query or a form."""


def lookalike(pairs: Sequence[tuple[str, str]], name: str, readings: frozenset[str]) -> str | None:
    """The first name in a query or form that some server may read as `name`, but that is another one.

    `readings` are those of the judged name (`wanted`). Equal names are left to the caller.
    """
    for found, value in pairs:
        if found != name and not readings.isdisjoint(read_as[found]):
            return found
        if ";" in value or ";" in found:  # as older servers split
            for piece in f"{found}={value}".split(";")[1:]:
                behind = piece.partition("=")[0]
                if not readings.isdisjoint(read_as[behind]):
                    return behind
    return None
