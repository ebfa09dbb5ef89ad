"""The OpenAPI document as a yardstick: whether an answer is one that it describes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jsonschema_rs

from sidecar.settings.reading import Listen, default
from sidecar.web.api.openapi.document import document
from tests.client import Message
from tests.support import House

METHODS = ("get", "head", "options", "post", "put", "delete")


@dataclass(frozen=True)
class Described:
    """A document, and what it says."""

    document: Mapping[str, Any]

    def operations(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """Every call: its path, its method, and what is said of it."""
        for path, item in self.document["paths"].items():
            for method in METHODS:
                if method in item:
                    yield path, method, item[method]

    @property
    def names(self) -> set[str]:
        return {operation["operationId"] for _, _, operation in self.operations()}

    def operation(self, name: str) -> dict[str, Any]:
        (found,) = [each for _, _, each in self.operations() if each["operationId"] == name]
        return found

    def example(self, name: str) -> dict[str, Any]:
        """The first body that is shown for a call."""
        content = self.operation(name)["requestBody"]["content"]["application/json"]
        shown: dict[str, Any] = next(iter(content["examples"].values()))["value"]
        return shown

    def validator(self, schema: Mapping[str, Any]) -> jsonschema_rs.Validator:
        """Of a schema that may refer to those with a name."""
        whole = {"allOf": [schema], "components": self.document["components"]}
        return jsonschema_rs.Draft202012Validator(whole, validate_formats=True)

    def assert_answered(self, name: str, answer: Message) -> None:
        """That an answer of a call is one of those that are described."""
        responses = self.operation(name)["responses"]
        described = responses.get(str(answer.status), responses.get("default"))
        assert described is not None, f"{name} is not said to answer {answer.status}: {answer.body!r}"
        self.assert_described(described, answer)

    def assert_described(self, described: Mapping[str, Any], answer: Message) -> None:
        """That an answer is as one response of the document says."""
        for header, rule in described.get("headers", {}).items():
            value = answer.header(header)
            assert value is not None or not rule.get("required"), f"{header} is missing"
            if value is not None:
                shown = int(value) if rule["schema"].get("type") == "integer" else value
                self.validator(rule["schema"]).validate(shown)
        contents = described.get("content", {})
        kind = (answer.header("Content-Type") or "").partition(";")[0]
        assert kind in contents or "*/*" in contents or not (answer.body or contents), kind
        if not answer.body and "*/*" in contents:
            return  # the backend's, to a HEAD
        schema = contents.get(kind, contents.get("*/*", {})).get("schema", {})
        if kind.endswith("json"):
            self.validator(schema).validate(answer.json())


def made(**sections: Any) -> Described:
    """The document for settings, with the data listener on port 8000 and the ops listener on 9902."""
    settings = default("http://127.0.0.1:9000", **sections)
    return Described(document(settings, data=Listen("127.0.0.1", 8000), ops=Listen("127.0.0.1", 9902)))


DOCUMENT = made()

# Values that tell types, bounds and spellings apart.
STRANGE: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    10,
    11,
    60,
    59,
    3600,
    3601,
    100,
    101,
    10**9,
    10**9 + 1,
    2**63 - 1,
    2**63,
    -(2**63),
    -(2**63) - 1,
    0.5,
    -0.5,
    0.000001,
    0.0000001,
    0.1234567,
    100.000001,
    "",
    " ",
    "a",
    "a\nb",
    "\xa0",
    "x" * 256,
    "x" * 257,
    "x" * 2000,
    "x" * 2001,
    "executed",
    "not_executed",
    "low",
    "dry_run",
    "pre_run",
    "latency_p50",
    "policy_outcome",
    [],
    ["a"],
    [""],
    ["a", 1],
    ["a"] * 256,
    ["a"] * 257,
    ["a"] * 101,
    [None],
    ["latency_p50"],
    {},
    {"a": 1},
    {"target_agents": ["a"]},
    {"target_agents": "a"},
    {"target_agents": None},
)


async def described(house: House) -> Described:
    """The document that a sidecar serves."""
    answer = await house.admin("GET", "/openapi.json")
    assert answer.status == 200
    return Described(answer.json())
