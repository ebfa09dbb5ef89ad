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

# The names whose cleaned form is cached: the most of them (a form has fewer), and the most characters of one.
MAX_NAMES = 1024
MAX_NAME_CHARS = 64


def spellings(name: str) -> tuple[str, ...]:
    """The forms in which a lenient parser compares a name: whole, and cut at NUL."""
    if name.isascii() and name.isprintable():
        return (name.strip().lower(),)
    # A parser may trim leading NULs before it cuts at a later NUL.
    cut = next(filter(None, map(_cleaned, name.split("\0"))), "")
    return (_cleaned(name), cut) if "\0" in name else (cut,)


def _cleaned(name: str) -> str:
    return _without_ignored(name).strip()


def _without_ignored(text: str) -> str:
    """The text in folded form, without the characters that parsers drop."""
    if text.isascii() and text.isprintable():
        return text.lower()
    dropped = {ord(each): None for each in set(text) if unicodedata.category(each) == "Cc" or is_format(each)}
    return folded(text.translate(dropped) if dropped else text)


_cleaned_name: Cache[str, str] = Cache(_without_ignored, max_entries=MAX_NAMES, max_size=MAX_NAME_CHARS)


def pattern_of(name: str) -> re.Pattern[str]:
    """A pattern that finds lookalikes of a judged name in a cleaned field of a query or a form.

    It takes blank, dot, `[` and `_` for one another, ignores `]`, and lets `[`, `.`, a blank or `;` end the
    name, so it finds the name in every order of these readings. A part of the judged name is no lookalike:
    frameworks other than PHP read `job` and `job.name` as two names.
    """
    spelled = spellings(name)[0].replace("]", "")
    letters = [r"[ ._\[]" if each in " ._[" else re.escape(each) for each in spelled]
    # A name begins at the beginning of the field, or behind a `;`. Parsers skip blanks and NULs there.
    begin, between, end = r"(?:\A|;)[\s\]\0]*", r"\]*", r"(?=[\s\].\[;\0=]|\Z)"
    return re.compile(begin + between.join(letters) + end)


def lookalike(pairs: Sequence[tuple[str, str]], name: str, pattern: re.Pattern[str]) -> str | None:
    """The first name in a query or form that some server may read as `name`, but that is another one.

    `pattern` is that of the judged name (`pattern_of`). Equal names are left to the caller, unless their
    value has a `;`, at which older servers cut it.
    """
    for found, value in pairs:
        if ";" in value or ";" in found:
            field = f"{found}={value}"
            cleaned = _without_ignored(field)
        elif found == name:
            continue
        else:
            field, cleaned = found, _cleaned_name[found]
        if pattern.search(cleaned) or ("\0" in field and _cut_at_nul(pattern, field)):
            return found
    return None


def _cut_at_nul(pattern: re.Pattern[str], field: str) -> bool:
    """Whether a parser reads the name that ends names at NUL."""
    return pattern.search("\0".join(map(_without_ignored, field.split("\0")))) is not None
