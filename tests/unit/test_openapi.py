"""The OpenAPI document: valid, complete, the same each time, and its schemas are what the code checks."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import schemathesis
from hypothesis import given
from hypothesis import strategies as st

from sidecar import __version__
from sidecar.core.facts import is_identifier
from sidecar.core.wording import visible_chars
from sidecar.errors import ERRORS, Refusal
from sidecar.files.strictjson import NotJson, parse
from sidecar.settings.reading import Listen, default
from sidecar.web.api import docs
from sidecar.web.api.openapi.document import document
from sidecar.web.wire.emittermodels import EMITTER_MODELS, BackfillRequest
from sidecar.web.wire.models import (
    IDENTIFIER,
    INTENT,
    ReconcileRequest,
    ScopeRequest,
    ScopeTestRequest,
    WireModel,
    validated,
)
from tests.described import DOCUMENT, STRANGE, Described, made


def routed(*routes: dict[str, Any], **gate: Any) -> Described:
    return made(gate={"routes": list(routes), **gate})


# Configurations in which the document differs.
OTHERS = {
    "on admin": made(scopes={"serve_on": "admin"}),
    "tenants": made(gate={"tenant_header": "X-Tenant-Id"}),
    "routes": routed(
        {"path": "**/recovery/execute"},
        {
            "path": "/v1/incidents/{incident}/runs/{run}/heal",
            "scope_id": "header:X-Scope-Id",
            "incident_id": "path:incident",
            "action": "query:action",
            "parameters": "/arguments",
            "target_agents": ["/target/agents", "query:agent"],
        },
    ),
}


def every(name: str, value: Any) -> Iterator[Any]:
    """All values that stand under a name, at any depth."""
    if isinstance(value, dict):
        for key, member in value.items():
            if key == name:
                yield member
            yield from every(name, member)
    elif isinstance(value, list):
        for member in value:
            yield from every(name, member)


# The document as a whole --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["default", *OTHERS])
def test_it_is_valid_openapi_and_holds_together(name: str) -> None:
    described = DOCUMENT if name == "default" else OTHERS[name]
    whole = json.loads(json.dumps(described.document))
    schemathesis.openapi.from_dict(whole).validate()
    assert (whole["openapi"], whole["info"]["version"]) == ("3.1.0", __version__)
    for reference in every("$ref", whole):
        part = whole
        for step in reference.removeprefix("#/").split("/"):
            part = part[step]
    names = [operation["operationId"] for _, _, operation in described.operations()]
    assert len(names) == len(set(names))
    assert set(every("operationId", whole)) == set(names)  # links lead somewhere
    tags = [tag["name"] for tag in whole["tags"]]
    assert {tag for _, _, operation in described.operations() for tag in operation["tags"]} == set(tags)
    for path, _, operation in described.operations():
        told = {each["name"] for each in operation.get("parameters", []) if each["in"] == "path"}
        assert told == set(re.findall(r"\{(\w+)\}", path))
        assert operation["summary"]
        assert operation["responses"]
    for schema in every("schema", whole):
        described.validator(schema)


def test_it_is_the_same_bytes_in_every_process() -> None:
    program = (
        "import json; from sidecar.settings.reading import Listen, default;"
        "from sidecar.web.api.openapi.document import document;"
        "told = document(default('http://127.0.0.1:9000'), data=Listen('127.0.0.1', 8000),"
        " ops=Listen('127.0.0.1', 9902)); print(json.dumps(told))"
    )
    for seed in ("1", "2"):
        printed = subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(docs.__file__).parents[2])},
            capture_output=True,
            check=True,
        )
        assert printed.stdout.decode().strip() == json.dumps(DOCUMENT.document)


def test_every_error_code_is_described_under_its_status() -> None:
    found: set[tuple[str, int]] = set()
    problems = [
        *(answer for _, _, operation in DOCUMENT.operations() for answer in operation["responses"].values()),
        *DOCUMENT.document["components"]["responses"].values(),
    ]
    for answer in problems:
        described = answer.get("content", {}).get("application/problem+json")
        if described is not None:
            rule = described["schema"]["properties"]
            found |= {(code, rule["status"]["const"]) for code in rule["error"]["enum"]}
            assert set(described["examples"]) == set(rule["error"]["enum"])
            for example in described["examples"].values():
                DOCUMENT.validator(described["schema"]).validate(example["value"])
    assert found == {(kind.code, kind.status) for kind in ERRORS.values()}


def test_every_example_of_a_body_is_as_its_schema_says() -> None:
    examples = 0
    for _, _, operation in DOCUMENT.operations():
        for content in operation.get("requestBody", {}).get("content", {}).values():
            for example in content["examples"].values():
                DOCUMENT.validator(content["schema"]).validate(example["value"])
                examples += 1
    assert examples >= 15


def test_each_path_says_on_which_listener_it_is() -> None:
    for described, scopes in ((DOCUMENT, "http://127.0.0.1:8000"), (OTHERS["on admin"], "/")):
        paths = described.document["paths"]
        for path, url in {
            "/api/v1/recovery/scope": scopes,
            "/api/v1/recovery/scopes/{id}": scopes,
            "/api/v1/recovery/candidates/{id}/scope-test": scopes,
            "/api/v1/recovery/execute": "http://127.0.0.1:8000",
            "/api/v1/status": "/",
            "/metrics": "http://127.0.0.1:9902",
        }.items():
            assert [server["url"] for server in paths[path]["servers"]] == [url], path


@pytest.mark.parametrize(
    ("host", "url"),
    [("0.0.0.0", "http://localhost:1"), ("::", "http://localhost:1"), ("::1", "http://[::1]:1")],
)
def test_a_listener_is_shown_where_it_is_reached(host: str, url: str) -> None:
    told = document(default("http://127.0.0.1:9000"), data=Listen(host, 1), ops=Listen("127.0.0.1", 9902))
    assert [server["url"] for server in told["servers"]] == ["/", url, "http://127.0.0.1:9902"]


def test_the_terms_of_a_scope_are_those_that_are_configured() -> None:
    described = made(
        scopes={
            "defaults": {"max_attempts": 2, "ttl_seconds": 61, "max_cost_usd": 1},
            "limits": {"max_attempts": 3, "ttl_seconds": 90, "max_cost_usd": 1.5},
        }
    )
    terms = described.document["components"]["schemas"]["ScopeRequest"]["properties"]
    bounds = ("minimum", "maximum", "default")
    assert [terms["max_attempts"][bound] for bound in bounds] == [1, 3, 2]
    assert [terms["ttl_seconds"][bound] for bound in bounds] == [60, 90, 61]
    assert [terms["max_cost_usd"][bound] for bound in bounds] == [0, 1.5, 1]


def test_a_tenant_is_asked_for_where_one_is_needed() -> None:
    needs = {
        operation["operationId"]: parameter["required"]
        for _, _, operation in OTHERS["tenants"].operations()
        for parameter in operation.get("parameters", [])
        if parameter["name"] == "X-Tenant-Id"
    }
    assert needs == {
        "createScope": True,
        "listScopes": True,
        "revokeScope": True,
        "execute": True,
        "explain": False,
    }


# What is gated ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "path"),
    [
        ("**/recovery/execute", "/api/v1/recovery/execute"),
        ("**/execute", "/api/v1/recovery/execute"),
        ("**/run", "/run"),
        ("/recovery/execute", "/recovery/execute"),
        ("/v1/{tenant}/run", "/v1/{tenant}/run"),
    ],
)
def test_a_gated_route_is_shown_under_a_path_that_it_gates(pattern: str, path: str) -> None:
    described = routed({"path": pattern})
    gated = [each for each, method, operation in described.operations() if operation["tags"] == ["Execute"]]
    assert gated == [path] * 4
    assert (pattern in described.operation("execute")["description"]) == pattern.startswith("**")


def test_facts_are_described_where_the_route_has_them() -> None:
    described = OTHERS["routes"]
    parameters = {each["name"]: each for each in described.operation("execute2")["parameters"]}
    assert {name: (each["in"], each["required"]) for name, each in parameters.items()} == {
        "incident": ("path", True),
        "run": ("path", True),
        "action": ("query", True),
        "X-Scope-Id": ("header", True),
        "agent": ("query", False),
        "Idempotency-Key": ("header", False),
        "X-Request-Id": ("header", False),
    }
    body = described.validator({"$ref": "#/components/schemas/ExecuteRequest2"})
    for good in (
        "{}",
        '{"arguments": {}}',
        '{"arguments": null}',
        '{"target": {"agents": ["a"]}}',
        '{"target": 7}',
    ):
        assert body.is_valid(json.loads(good)), good
    for bad in ("[]", '{"arguments": 7}', '{"target": {"agents": "a"}}', '{"target": {"agents": [""]}}'):
        assert not body.is_valid(json.loads(bad)), bad
    first = described.validator({"$ref": "#/components/schemas/ExecuteRequest"})
    whole = {"scope_id": "s", "incident_id": "i", "action": "a"}
    for more in ("{}", '{"parameters": ""}', '{"parameters": {"target_agents": ["a"]}}', '{"other": 1}'):
        assert first.is_valid({**whole, **json.loads(more)}), more
    for less in ('{"scope_id": ""}', '{"action": null}', '{"parameters": {"target_agents": "a"}}'):
        assert not first.is_valid({**whole, **json.loads(less)}), less


def test_a_granted_scope_leads_to_the_call_that_spends_it() -> None:
    found = {
        "scope_id": "$response.body#/scope_id",
        "incident_id": "$response.body#/incident_id",
        "action": "$response.body#/allowed_actions/0",
    }
    links = DOCUMENT.operation("createScope")["responses"]["201"]["links"]
    assert (links["Execute"]["requestBody"], "parameters" in links["Execute"]) == (found, False)
    elsewhere = {"scope_id": "header:X-Scope-Id", "incident_id": "path:incident", "action": "/what/to_do"}
    described = routed({"path": "/{incident}/heal", **elsewhere})
    links = described.operation("createScope")["responses"]["201"]["links"]
    assert links["Execute"]["parameters"] == {
        "header.X-Scope-Id": found["scope_id"],
        "path.incident": found["incident_id"],
    }
    assert links["Execute"]["requestBody"] == {"what": {"to_do": found["action"]}}
    assert "Execute" not in routed({"path": "/metrics"}).operation("createScope")["responses"]["201"]["links"]


def test_a_scopes_tenant_goes_along_to_what_asks_for_it() -> None:
    links = OTHERS["tenants"].operation("createScope")["responses"]["201"]["links"]
    along = {name for name, link in links.items() if "header.X-Tenant-Id" in link.get("parameters", {})}
    assert along == {"Execute", "Listed", "Revoke"}


def test_a_path_that_stands_for_two_things_is_shown_once() -> None:
    described = routed(
        {"path": "**/recovery/execute"}, {"path": "/api/v1/recovery/execute"}, {"path": "/api/v1/status"}
    )
    assert "execute2" not in described.names
    assert "execute3" not in described.names
    assert described.document["paths"]["/api/v1/status"]["servers"][0]["url"] == "/"


# Schemas and code ---------------------------------------------------------------------------------------


def test_printable_in_a_schema_is_printable_in_the_code() -> None:
    validator = jsonschema_rs.Draft202012Validator(IDENTIFIER)
    others = [
        hex(code)
        for code in range(sys.maxunicode + 1)
        if unicodedata.category(chr(code)) not in ("Cs", "Cn")  # what no text has; what is new since
        and validator.is_valid(chr(code)) != is_identifier(chr(code))
    ]
    assert others == []
    for text in ("", "x" * 256, "x" * 257, "a b", "a\nb", "\U0001f600" * 256):
        assert validator.is_valid(text) == is_identifier(text), text


def test_visible_in_a_schema_is_visible_in_the_code() -> None:
    validator = jsonschema_rs.Draft202012Validator(INTENT)
    others = [
        hex(code)
        for code in range(sys.maxunicode + 1)
        if unicodedata.category(chr(code)) not in ("Cs", "Cn")
        and unicodedata.category(chr(code))[0] != "M"  # a mark alone is no word
        and validator.is_valid(chr(code)) != bool(visible_chars(chr(code)))
    ]
    assert others == []
    for text in ("", " \n", "\u200b a", "a \u2800", "\u2800 \u3164", "\u0301"):
        assert validator.is_valid(text) == bool(visible_chars(text)), text


MODELS: dict[type[WireModel], dict[str, Any]] = {
    ScopeRequest: {"incident_id": "i", "action": "a", "intent": "why"},
    ReconcileRequest: {"outcome": "executed", "cost_usd": 0},
    ScopeTestRequest: {"action_type": "retry", "risk_class": "low"},
    BackfillRequest: {"request_id": "r"},
    **{
        model: DOCUMENT.example(f"tell{kind.title().replace('_', '')}")
        for kind, model in EMITTER_MODELS.items()
    },
}
# What is checked behind the model; tests/gate/test_openapi.py asks the sidecar itself.
BEHIND = ("max_attempts", "ttl_seconds", "max_cost_usd", "signals_used", "parameters")


# With a method of authentication, a scope may name its executors.
AUTHENTICATED = made(auth={"proxy": {"header": "X-User", "trusted": ["unix"]}})


def test_what_names_a_principal_is_in_the_document_only_with_a_method_of_authentication() -> None:
    for made_of, is_there in ((DOCUMENT, False), (AUTHENTICATED, True)):
        terms = made_of.document["components"]["schemas"]["ScopeRequest"]["properties"]
        parameters = {one["name"] for one in made_of.operation("explain")["parameters"]}
        assert ("executors" in terms, "principal" in parameters) == (is_there, is_there)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_a_body_is_valid_by_its_schema_if_and_only_if_its_model_takes_it(model: type[WireModel]) -> None:
    schema = AUTHENTICATED.validator({"$ref": f"#/components/schemas/{model.__name__}"})

    def agrees(body: dict[str, Any]) -> None:
        read = parse(json.dumps(body).encode())
        taken = not isinstance(validated(model, read, "invalid_request"), Refusal)
        assert schema.is_valid(body) == taken, body

    whole = MODELS[model]
    assert schema.is_valid(whole)
    agrees(whole)
    agrees({**whole, "surprise": 1})
    agrees({})
    for name in model.model_fields:
        if (model, name) != (ScopeRequest, "action"):
            agrees({key: value for key, value in whole.items() if key != name})
        for value in STRANGE if name not in BEHIND else ():
            agrees({**whole, name: value})


@given(st.floats(min_value=0, max_value=2e9) | st.integers(0, 10**10))
def test_an_amount_is_valid_by_its_schema_if_and_only_if_it_is_whole_millionths(dollars: float) -> None:
    try:
        body = parse(json.dumps({"outcome": "executed", "cost_usd": dollars}).encode())
    except NotJson:
        return
    schema = DOCUMENT.validator({"$ref": "#/components/schemas/ReconcileRequest"})
    taken = not isinstance(validated(ReconcileRequest, body, "invalid_request"), Refusal)
    assert schema.is_valid({"outcome": "executed", "cost_usd": dollars}) == taken
