"""Masking: what a JSON pointer finds in a record is replaced before the record becomes bytes.

Who a record is about cannot be masked, so that the log stays one that can be searched and verified.
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

# What may be masked, besides the places strictly below the first two.
_BELOW = ("decision_inputs", "details")
_WHOLE = ("decision_reason",)
# What says whom a record is about and what decided it.
IDENTITY: tuple[Tokens, ...] = (
    ("decision_inputs", "policy_id"),
    ("decision_inputs", "principal"),
    ("details", "admission_id"),
    ("details", "policy_revision"),
    ("details", "rules"),
    ("details", "count"),
)


def pointer(text: str) -> Tokens:
    """The steps of a JSON pointer (RFC 6901) into a record. Raises ValueError where it may not be masked."""
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
    """Pointers as `pointer` reads them. With a key equal values get equal masks, without it all values do.

    A mask takes the 14 fields of `Record.to_dict()` and gives them back with every value that a pointer
    finds replaced, whatever it is. What it is given is never changed; what needs no change is not copied.
    """

    pointers: tuple[Tokens, ...]
    key: bytes | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        # Each once and the shorter first: a mask stands for a value as it came, not for one masked before.
        object.__setattr__(self, "pointers", tuple(sorted(set(self.pointers), key=len)))

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        masked: Any = record
        for tokens in self.pointers:
            masked = self._replaced(masked, tokens)
        found: dict[str, Any] = masked
        return found

    def _replaced(self, value: Any, tokens: Tokens) -> Any:
        """The value with a mask where the steps lead; the very same value where they lead nowhere."""
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
    """JSON that is the same for equal values: sorted keys, no white space, ASCII only.

    A number is written by its value: 1, 1.0 and 1e0 are one. What JSON does not know is written as its text.
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
    """Sign, digits and power of ten, exactly: neither rounded to a double nor to a decimal context."""
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
