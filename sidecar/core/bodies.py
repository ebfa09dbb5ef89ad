"""The kinds of body that a route takes, and how the content type of a request names one of them.

1. `json`: `application/json`, which holds one object, and the further media types that the route lists,
   which hold an object or an array.
2. `form`: `application/x-www-form-urlencoded`.
3. `empty`: no bytes. The content type does not matter then.
4. `any`: opaque bytes, from which no fact is read. A body without bytes is one of them.

Beside `json` or `form`, a body is `any` only if its content type clearly names neither: a type that a
careless backend could take for JSON or a form (`text/json`, `application/json; charset=utf-16`), and a body
without a type, are refused. A body that names JSON and is broken is refused as well, so a request cannot
choose to be opaque. For the same reason an encoded body is accepted only where every body is opaque.

Many frameworks read a name from a form or a JSON body before they look for it in the query. Where a route
reads a fact from the query, an opaque body is therefore neither of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, Literal

from sidecar.core.cache import Cache

BodyKind = Literal["json", "form", "empty", "any"]
# How a body is read. `array or object` is the JSON of a further media type.
Reading = Literal["json", "array or object", "form", "empty", "any"]

JSON_READINGS: Final[tuple[Reading, ...]] = ("json", "array or object")
JSON_TYPE: Final = "application/json"
FORM_TYPE: Final = "application/x-www-form-urlencoded"
# What stands in media types that a careless backend reads as a form or as JSON.
_RESEMBLING = {"json": "json", "form": "form"}

_MAX_TYPES, _MAX_TYPE_BYTES = 64, 64


@dataclass(frozen=True, slots=True)
class Bodies:
    """The bodies that a route takes: the kinds, and the media types beside application/json that are JSON.

    `facts_in_query`: the route reads a fact from the query.
    """

    kinds: tuple[BodyKind, ...] = ("json",)
    json_types: tuple[str, ...] = ()
    facts_in_query: bool = False
    # The reading that a value of Content-Type asks for; None if the route does not take it.
    by_type: Cache[bytes, Reading | None] = field(init=False, compare=False, repr=False)
    # The reading of a body without content type.
    untyped: Reading | None = field(init=False, compare=False)
    # Whether a body without bytes is accepted with any content type.
    may_be_empty: bool = field(init=False, compare=False)
    # Whether the bytes may have a content encoding.
    may_be_encoded: bool = field(init=False, compare=False)
    # The kinds in words, for a message.
    described: str = field(init=False, compare=False)

    def __post_init__(self) -> None:
        opaque = "any" in self.kinds and not {"json", "form"} & set(self.kinds)
        bodiless = "any" in self.kinds or "empty" in self.kinds
        by_type = Cache(self._reading_of, max_entries=_MAX_TYPES, max_size=_MAX_TYPE_BYTES)
        object.__setattr__(self, "by_type", by_type)
        object.__setattr__(self, "untyped", "any" if opaque else "empty" if bodiless else None)
        object.__setattr__(self, "may_be_empty", bodiless)
        object.__setattr__(self, "may_be_encoded", opaque)
        object.__setattr__(self, "described", _in_words(self.kinds, self.json_types))

    def _reading_of(self, content_type: bytes) -> Reading | None:
        text = content_type.decode("utf-8", "surrogateescape")
        essence, *parameters = (part.strip().lower() for part in text.split(";"))
        if _is_utf8(parameters):
            if "json" in self.kinds and essence in self.json_types:
                return "array or object"
            if "json" in self.kinds and essence == JSON_TYPE:
                return "json"
            if "form" in self.kinds and essence == FORM_TYPE:
                return "form"
        resembled = {kind for kind, word in _RESEMBLING.items() if word in text.lower()}
        readable = {*_RESEMBLING} if self.facts_in_query else {*self.kinds}
        clear = self.may_be_encoded or is_media_type(essence)
        if "any" in self.kinds and clear and not resembled & readable:
            return "any"
        return "empty" if self.may_be_empty else None


def is_media_type(essence: str) -> bool:
    """Whether a text is `type/subtype` of RFC 9110's tokens, in lower case and without parameters."""
    kind, slash, subtype = essence.partition("/")
    return bool(slash) and _is_token(kind) and _is_token(subtype)


def _is_token(text: str) -> bool:
    marks = "!#$%&'*+-.^_`|~"
    return bool(text) and text.isascii() and all(each.isalnum() or each in marks for each in text)


def _is_utf8(parameters: Iterable[str]) -> bool:
    """Whether the parameters of a media type name no charset but utf-8, and nothing else."""
    given = [part for part in parameters if part]
    return not given or given in (["charset=utf-8"], ['charset="utf-8"'])


def _in_words(kinds: Iterable[BodyKind], json_types: Iterable[str]) -> str:
    words = {
        "json": "json (" + ", ".join(dict.fromkeys((JSON_TYPE, *json_types))) + ")",
        "form": f"form ({FORM_TYPE})",
        "empty": "empty (no bytes)",
        "any": "any",
    }
    return ", ".join(words[kind] for kind in kinds)


JSON_ONLY = Bodies()
