"""The configuration as a JSON Schema, for editors. It never refuses what the loader would accept.

The other way round it is silent about what only the loader knows: what depends on two keys, on files, or on
digits after the point. Beside each check in configvalues stands the part from here that says as much of it as
a schema can; types, bounds, defaults and words are those of the sections.
"""

from __future__ import annotations

import ast
import inspect
from itertools import pairwise
from typing import Any

from pydantic import BaseModel, WithJsonSchema
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import core_schema

from sidecar import __version__
from sidecar.core.host import BRACKETED, NAME

DIALECT = "https://json-schema.org/draft/2020-12/schema"

# `${VAR}` and `${VAR:default}`, allowed in any scalar value. A variable becomes text or a number, never a
# list.
VARIABLE = {"type": "string", "pattern": r"\$\{[A-Za-z_][A-Za-z0-9_]*(:[^}]*)?\}"}

_HOST = r"(\[[^\[\]]+\]|[A-Za-z0-9._-]+)"
_PORT = r":[0-9]{1,5}"
_LOOPBACK = r"(\[[^\[\]]+\]|localhost|127\.[0-9.]+)"
_SOCKET = r"[Uu][Nn][Ii][Xx]:.*[^/]"
_HTTP = r"[Hh][Tt][Tt][Pp][Ss]?://"
_HEADER = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_POINTER = r"(/([^/~]|~[01])+)+"


def _text(*patterns: str, nullable: bool = False) -> dict[str, Any]:
    """Text of one of some shapes; without one, any text but none."""
    pattern = {"pattern": f"^({'|'.join(patterns)})$"} if patterns else {"minLength": 1}
    return {"type": ["string", "null"] if nullable else "string", **pattern}


_PLACES = (_POINTER, "(path|query):[^ ]+", f"header:{_HEADER}")

ADDRESS = WithJsonSchema(_text(_HOST + _PORT, "unix:.*[^/]"))
OWN_ADDRESS = WithJsonSchema(_text(_LOOPBACK + _PORT, "unix:.*[^/]"))
UPSTREAM_URL = WithJsonSchema(_text(f"{_HTTP}{_HOST}({_PORT})?/?", _SOCKET))
COLLECTOR_URL = WithJsonSchema(_text(_HTTP + r"[^/?#@]+([/?#].*)?", nullable=True))
ALLOWED_HOST = WithJsonSchema(_text(NAME, BRACKETED))
HOST_NAME = WithJsonSchema(_text(_HOST, nullable=True))
STORE_URL = WithJsonSchema(_text("memory://", r"sqlite:///[^?#]*[^?#/]"))
FOLDER = WithJsonSchema(_text())
FILE = WithJsonSchema(_text() | {"type": ["string", "null"]})
DOLLARS = WithJsonSchema({"type": "number", "minimum": 0, "maximum": 1_000_000_000})
HEADER_NAME = WithJsonSchema(_text(_HEADER, nullable=True))
PATTERN = WithJsonSchema(_text(r"""(\*\*)?(/[!"$&-)+-.0-:<->@-\[\]-~]+)+"""))
PLACE = WithJsonSchema(_text(*_PLACES))
PLACES = WithJsonSchema(
    {"anyOf": [_text(*_PLACES), {"type": "array", "items": _text(*_PLACES), "minItems": 1}]}
)
BODY_PLACE = WithJsonSchema(_text(_POINTER))
ANSWER_PLACE = WithJsonSchema(_text(_POINTER, f"header:{_HEADER}"))
MASK_POINTER = WithJsonSchema(_text(r"/(decision_inputs|details)/.+", "/decision_reason"))


def schema_of(model: type[BaseModel], *, title: str, description: str) -> dict[str, Any]:
    """The schema of a file whose sections a model describes.

    No key is required, not even the one without a default: the environment may hold it. Defaults are shown as
    the file would have them, which is how the sections serialize.
    """
    made = model.model_json_schema(mode="serialization", schema_generator=_WithWords)
    whole = _section(made, made.pop("$defs", {}))
    return {
        "$schema": DIALECT,
        "$id": f"urn:scopegate:configuration:{__version__}",
        **whole,
        "title": title,
        "description": description,
        "$defs": {"variable": VARIABLE},
    }


class _WithWords(GenerateJsonSchema):
    """Adds the words below each key. Read when they are asked for: pydantic itself would read them at each
    start, which takes longer than to make the models."""

    def model_schema(self, schema: core_schema.ModelSchema) -> dict[str, Any]:
        made = super().model_schema(schema)
        model: type[BaseModel] = schema["cls"]
        for statement, below in pairwise(ast.iter_child_nodes(ast.parse(inspect.getsource(model)).body[0])):
            match statement, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(words))):
                    made["properties"][model.model_fields[name].alias or name]["description"] = words
        return made


def _section(made: dict[str, Any], named: dict[str, Any]) -> dict[str, Any]:
    """A map of keys. Left empty, which YAML reads as null, it is all defaults."""
    keys = _map(made, named)
    keys.pop("required", None)
    return {**keys, "type": ["object", "null"]}


def _map(made: dict[str, Any], named: dict[str, Any]) -> dict[str, Any]:
    said, rules = _split(made)
    keys = {key: _value(value, named) for key, value in made["properties"].items()}
    return {**said, **rules, "properties": keys}


def _value(made: dict[str, Any], named: dict[str, Any]) -> dict[str, Any]:
    """What stands behind a key, or is an item of a list. A scalar may also be a variable."""
    said, rules = _split(made)
    if "$ref" in rules:
        return _section(_named(rules, named), named)
    if "anyOf" in rules:
        return {**said, "anyOf": [_value(one, named) for one in rules["anyOf"]]}
    if rules.get("type") == "array":
        items = rules["items"]
        inner = _map(_named(items, named), named) if "$ref" in items else _value(items, named)
        return {**said, **rules, "items": inner}
    return {**said, "anyOf": [rules, {"$ref": "#/$defs/variable"}]}


def _named(reference: dict[str, Any], named: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = named[reference["$ref"].rpartition("/")[2]]
    return found


def _split(made: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is for the reader, on one line and as one would write it, and what is checked."""
    said: dict[str, Any] = {}
    if "description" in made:
        said["description"] = " ".join(made["description"].split())
    if "default" in made:
        default = made["default"]
        said["default"] = int(default) if isinstance(default, float) and default.is_integer() else default
    return said, {key: value for key, value in made.items() if key not in ("title", *said)}
