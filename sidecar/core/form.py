"""Parses forms (application/x-www-form-urlencoded) strictly: what two parsers read differently is refused.

A form is `name=value` pairs that `&` separates, with `+` for a blank and `%XX` for a byte of UTF-8. Parsers
disagree about everything beyond that:

1. A `%` without two hex digits stays as it is, is dropped, or is an error.
2. Bytes that are not UTF-8 are replaced, dropped, or read as Latin-1.
3. A line end or another control that is not escaped is kept, or trimmed with the blanks around the body.
4. Beyond about 1,000 fields PHP and Node's `qs` drop the rest; other parsers read it, or refuse the form.
5. `_method` replaces the method of the request (Rails, Laravel, Symfony and Express read it).

Which names could be read as which is judged where a fact is read (`lookalikes`), because other names of the
form do not matter.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from urllib.parse import unquote_to_bytes

from sidecar.core.lookalikes import lookalike, pattern_of

MAX_FIELDS = 1_000

_STRAY_PERCENT = re.compile(rb"%(?![0-9A-Fa-f]{2})")
_CONTROL = re.compile(rb"[\0-\x1f\x7f]")
_METHOD = "_method"
_METHOD_PATTERN = pattern_of(_METHOD)

Pairs = list[tuple[str, str]]


class NotForm(ValueError):
    """The bytes are no form that all parsers read alike. The message says why."""


def parse(body: bytes) -> Pairs:
    """The names and values of a form, in order and with equal names kept apart. Raises NotForm.

    A field without `=` has the value "". Empty fields (`a=1&&b=2`) are left out, as every parser does.
    """
    control = _CONTROL.search(body)
    if control is not None:
        raise NotForm(f"the control character at byte {control.start()} is not escaped")
    if body[:1] == b" " or body[-1:] == b" ":
        raise NotForm("a blank at its beginning or end is not escaped; write it as +")
    stray = _STRAY_PERCENT.search(body)
    if stray is not None:
        raise NotForm(f"the % at byte {stray.start()} does not begin an escape; write it as %25")
    if body.count(b"&") >= MAX_FIELDS:
        raise NotForm(f"it has more than {MAX_FIELDS} fields")
    pairs = [_decoded(field) for field in body.split(b"&") if field]
    if replaces_method(pairs):
        raise NotForm(f"a field {_METHOD} could replace the method that was judged")
    return pairs


def replaces_method(pairs: Sequence[tuple[str, str]]) -> bool:
    """Whether a field of a form or a query is `_method`, or some framework may read it so."""
    named = any(name == _METHOD for name, _ in pairs)
    return named or lookalike(pairs, _METHOD, _METHOD_PATTERN) is not None


def _decoded(field: bytes) -> tuple[str, str]:
    name, _, value = field.partition(b"=")
    return _text(name), _text(value)


def _text(raw: bytes) -> str:
    try:
        return unquote_to_bytes(raw.replace(b"+", b" ")).decode()
    except UnicodeDecodeError:
        raise NotForm("it is not UTF-8") from None
