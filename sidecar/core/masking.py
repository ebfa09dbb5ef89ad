"""Masking replaces the values that JSON pointers find in a record, before the record becomes bytes.

The identity of a record cannot be masked, so that the log can still be searched and verified.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from sidecar.core.pointer import index, parse

Tokens = tuple[str, ...]

MASKED = "[masked]"

# Members whose inner values may be masked, but not the member as a whole; and members that may be masked
# whole.
_BELOW = ("decision_inputs", "details")
_WHOLE = ("decision_reason",)
# The members that identify the subject of a record and the policies that decided it.
IDENTITY: tuple[Tokens, ...] = (
    ("decision_inputs", "policy_id"),
    ("decision_inputs", "principal"),
    ("decision_inputs", "principal_groups"),
    ("details", "admission_id"),
    ("details", "policy_revision"),
    ("details", "rules"),
    ("details", "count"),
    # What a freeze matches, and until when.
    ("details", "freeze_id"),
    ("details", "match"),
    ("details", "except"),
    ("details", "ends_at"),
)


def pointer(text: str) -> Tokens:
    """The steps of a JSON pointer (RFC 6901) into a record. Raises ValueError if it may not be masked."""
    tokens = parse(text)
    if not tokens or "" in tokens:
        raise ValueError("names no member, or an empty one; write /member or /member/member")
    for identity in IDENTITY:
        if tokens[: len(identity)] == identity:
            name = "/".join(identity)
            raise ValueError(f"/{name} tells records apart and cannot be masked; mask another member")
    if tokens in [(name,) for name in _BELOW]:
        raise ValueError(f"{text} as a whole cannot be masked; name a member below it, {text}/member")
    if tokens[0] not in _BELOW and tokens not in [(name,) for name in _WHOLE]:
        raise ValueError(
            "cannot be masked; only members below /decision_inputs and /details can, and /decision_reason"
        )
    return tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Mask:
    """A mask with pointers as `pointer` parses them.

    With a key, equal values get equal masks. Without a key, all values get the same mask. A mask takes the 14
    fields of `Record.to_dict()` and returns them with every value that a pointer finds replaced. It never
    changes its argument, and copies only the parts that change.
    """

    pointers: tuple[Tokens, ...]
    key: bytes | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        # Shorter pointers come first, because a mask must be computed from an original value, not a masked
        # one.
        object.__setattr__(self, "pointers", tuple(sorted(set(self.pointers), key=len)))

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        masked: Any = record
        for tokens in self.pointers:
            masked = self._replaced(masked, tokens)
        found: dict[str, Any] = masked
        return found

    def _replaced(self, value: Any, tokens: Tokens) -> Any:
        """The value with a mask at the place of the steps, or the identical object if they find nothing."""
        if not tokens:
            return self._mask(value)
        step, rest = tokens[0], tokens[1:]
        if isinstance(value, Mapping) and step in value:
            inner = self._replaced(value[step], rest)
            return value if inner is value[step] else {**value, step: inner}
        if isinstance(value, list | tuple) and (place := index(step, value)) is not None:
            inner = self._replaced(value[place], rest)
            return value if inner is value[place] else [*value[:place], inner, *value[place + 1 :]]
        return value

    def _mask(self, value: Any) -> str:
        if self.key is None:
            return MASKED
        digest = hmac.digest(self.key, canonical(value).encode("ascii"), "sha256")
        return f"[masked:{digest.hex()[:16]}]"


def canonical(value: Any) -> str:
    """JSON that is identical for equal values: sorted keys, no white space, ASCII only.

    A number is written by its value, so 1, 1.0 and 1e0 are identical. A value that JSON cannot express is
    written as a string.
    """
    match value:
        case None:
            return "null"
        case True:
            return "true"
        case False:
            return "false"
        case int() | float() | Decimal():
            return _number(value)
        case Mapping():
            members = sorted((_text(str(name)), canonical(member)) for name, member in value.items())
            return "{" + ",".join(f"{name}:{member}" for name, member in members) + "}"
        case list() | tuple():
            return "[" + ",".join(map(canonical, value)) + "]"
        case str():
            return _text(value)
        case _:
            return _text(str(value))


def _text(value: str) -> str:
    return json.dumps(value)


def _number(value: int | float | Decimal) -> str:
    """Sign, digits and power of ten.

    The number is exact: it is not rounded to a double or a decimal context.
    """
    decimal = Decimal(str(value)) if isinstance(value, float) else Decimal(value)
    if not decimal.is_finite():
        return _text(str(decimal))
    sign, digits, exponent = decimal.as_tuple()
    written = "".join(map(str, digits)).lstrip("0")
    significant = written.rstrip("0")
    if not significant:
        return "0"
    power = int(exponent) + len(written) - len(significant)
    return f"{'-' if sign else ''}{significant}e{power}"
