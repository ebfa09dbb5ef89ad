"""How a scope_id is shown to people: `scope_` and its first eight characters, in logs, traces and tables.

A scope_id names a scope, and where no method of authentication is configured, it also lets its bearer act.
Places that many people read therefore show no whole one. JSON answers and decision records keep it.
"""

from __future__ import annotations

import re

PREFIX = "scope_"
SHOWN_CHARS = 8
# The text before the part that is left out.
SHORT_LENGTH = len(PREFIX) + SHOWN_CHARS
# What a scope may be looked up by: its whole id, or a beginning that is no shorter than the short form.
ABBREVIATION = f"{PREFIX}[0-9a-f]{{{SHOWN_CHARS},64}}"

# A text is searched first, because few have an id, and a replacement takes longer than a search.
# The ids of the recovery API have at least 24 digits after the prefix.
_HIDDEN = 24 - SHOWN_CHARS
_ID = re.compile(f"({PREFIX}[0-9a-f]{{{SHOWN_CHARS}}})[0-9a-f]{{{_HIDDEN},}}")
_ID_BYTES = re.compile(_ID.pattern.encode())
# In a path, each character may be percent-encoded any number of times.
_DIGIT = "(?:[0-9a-f]|%(?:25)*(?:3[0-9]|[46][1-6]))"
_ID_IN_PATH = re.compile(
    "((?:s|%(?:25)*[57]3)(?:c|%(?:25)*[46]3)(?:o|%(?:25)*[46]f)(?:p|%(?:25)*[57]0)(?:e|%(?:25)*[46]5)"
    f"(?:_|%(?:25)*5f){_DIGIT}{{{SHOWN_CHARS}}}){_DIGIT}{{{_HIDDEN},}}",
    re.IGNORECASE,
)


def short_id(scope_id: str) -> str:
    """The short form of a scope_id. A text that a client sent as one, and that has another form, stays."""
    if scope_id[: len(PREFIX)].lower() == PREFIX:
        return scope_id[:SHORT_LENGTH]
    return shortened(scope_id)


def shortened(text: str) -> str:
    """A text with each whole scope_id in it in its short form."""
    return _ID.sub(r"\1", text) if _ID.search(text) else text


def shortened_bytes(text: bytes) -> bytes:
    """The same for UTF-8."""
    return _ID_BYTES.sub(rb"\1", text) if _ID_BYTES.search(text) else text


def shortened_path(path: str) -> str:
    """The same for the path of a request, where a scope_id may be percent-encoded or in upper case."""
    return _ID_IN_PATH.sub(r"\1", path) if _ID_IN_PATH.search(path) else path
