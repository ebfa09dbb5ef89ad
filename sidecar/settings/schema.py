"""The configuration as a JSON Schema, for editors. It never refuses what the loader would accept.

It cannot express everything that the loader checks: conditions on two keys, on files, or on the number of
digits. Types, bounds, defaults and descriptions are those of the sections.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import core_schema

from sidecar import __version__
from sidecar.settings.keys import descriptions, without_links

DIALECT = "https://json-schema.org/draft/2020-12/schema"

# `${VAR}` and `${VAR:default}`, allowed in any scalar value. A variable becomes text or a number, never a
# list.
VARIABLE = {"type": "string", "pattern": r"\$\{[A-Za-z_][A-Za-z0-9_]*(:[^}]*)?\}"}


def schema_of(model: type[BaseModel], *, title: str, description: str) -> dict[str, Any]:
    """The schema of a file whose sections a model describes.

    No key is required, not even the one without a default: the environment may hold it. Defaults are shown as
    the file would have them, which is how the sections serialize.
    """
    made = model.model_json_schema(mode="serialization", schema_generator=_Described)
    whole = _section(made, made.pop("$defs", {}))
    return {
        "$schema": DIALECT,
        "$id": f"urn:scopegate:configuration:{__version__}",
        **whole,
        "title": title,
        "description": description,
        "$defs": {"variable": VARIABLE},
    }


class _Described(GenerateJsonSchema):
    """Adds the description of each key."""

    def model_schema(self, schema: core_schema.ModelSchema) -> dict[str, Any]:
        made = super().model_schema(schema)
        model: type[BaseModel] = schema["cls"]
        for name, text in descriptions(model).items():
            made["properties"][name]["description"] = without_links(text)
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
        said["description"] = without_links(" ".join(made["description"].split()))
    if "default" in made:
        default = made["default"]
        said["default"] = int(default) if isinstance(default, float) and default.is_integer() else default
    return said, {key: value for key, value in made.items() if key not in ("title", *said)}
