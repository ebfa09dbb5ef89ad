"""`scopegate routes suggest`: what becomes of the operations of a backend, from its OpenAPI document."""

from __future__ import annotations

import asyncio
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.cli.main import main
from sidecar.cli.operations import MAX_BASES, Backend, Body, read
from sidecar.cli.suggestion import MAX_NAME_CHARS, Suggestion, suggested
from sidecar.files import yamlfile
from sidecar.files.faults import ConfigurationError
from sidecar.live.snapshot import Snapshot
from sidecar.policies import files as policyfiles
from sidecar.settings.reading import load
from sidecar.web.data.trial import tried
from tests.client import request_bytes

DOCUMENTS = Path(__file__).parents[1] / "openapi"
JSON_BODY = {"required": True, "content": {"application/json": {}}}


def backend(tmp_path: Path, **document: Any) -> Backend:
    file = tmp_path / "api.json"
    file.write_text(json.dumps({"openapi": "3.0.3", "info": {"title": "T"}, **document}), encoding="utf-8")
    return read(file)


def one(
    tmp_path: Path, path: str = "/x", method: str = "post", *, more: Any = None, **operation: Any
) -> Suggestion:
    """The suggestion for one operation. `more` are further members of the document."""
    return suggested(backend(tmp_path, paths={path: {method: operation}}, **(more or {})))


def body(tmp_path: Path, content: dict[str, Any], *, required: bool = True, **more: Any) -> Body:
    request = {"required": required, "content": content}
    found = backend(tmp_path, paths={"/x": {"post": {"requestBody": request}}}, **more)
    return found.operations[0].body


def faults(tmp_path: Path, **document: Any) -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        backend(tmp_path, **document)
    return [str(fault).partition("api.json:")[2] for fault in caught.value.faults]


def paths(suggestion: Suggestion) -> dict[str, list[str]]:
    return {route.name: [pattern.text for pattern in route.patterns] for route in suggestion.routes}


def routes(suggestion: Suggestion) -> list[dict[str, Any]]:
    """The routes as the configuration holds them."""
    tree = yamlfile.parse(suggestion.configuration(), "scopegate.yaml", environment={}).value
    found: list[dict[str, Any]] = tree["gate"]["routes"]
    return found


# Which operations ---------------------------------------------------------------------------------------


def test_every_operation_that_writes_gets_a_route_and_an_action_and_every_read_passes(tmp_path: Path) -> None:
    methods = ("get", "head", "options", "post", "put", "patch", "delete")
    item = {method: {"operationId": f"{method}It"} for method in methods}
    found = suggested(backend(tmp_path, paths={"/a/b": item}))
    assert [(route.name, route.method, route.risk) for route in found.routes] == [
        ("postIt", "POST", "medium"),
        ("putIt", "PUT", "medium"),
        ("patchIt", "PATCH", "medium"),
        ("deleteIt", "DELETE", "high"),
    ]
    becomes = {row["method"]: row["becomes"] for row in found.rows()}
    assert len(becomes) == len(methods)
    assert {becomes[name] for name in ("GET", "HEAD", "OPTIONS")} == {"passes, as gate.unlisted.reads says"}
    assert becomes["DELETE"] == "route deleteIt"
    catalogue = yamlfile.parse(found.catalogue(), "actions.yaml").value["actions"]
    assert catalogue == {
        "postIt": {"risk": "medium"},
        "putIt": {"risk": "medium"},
        "patchIt": {"risk": "medium"},
        "deleteIt": {"risk": "high"},
    }


def test_a_route_takes_scope_and_incident_from_headers_and_its_action_is_a_constant(tmp_path: Path) -> None:
    (route,) = routes(one(tmp_path, operationId="restart", requestBody=JSON_BODY))
    assert route == {
        "name": "restart",
        "path": "/x",
        "methods": ["POST"],
        "body": "json",
        "action": "const:restart",
        "scope_id": "header:X-Recovery-Scope-Id",
        "incident_id": "header:X-Recovery-Incident-Id",
    }


def test_a_method_that_no_route_can_list_is_said_to_be_ungated(tmp_path: Path) -> None:
    found = one(tmp_path, method="trace")
    assert found.routes == ()
    (row,) = found.rows()
    assert row["becomes"] == (
        "no route: a route cannot list the method TRACE; it passes, as gate.unlisted.writes says"
    )


def test_what_a_person_has_to_decide_stands_in_comments(tmp_path: Path) -> None:
    answers: dict[str, Any] = {"202": {}, "404": {}, "409": {}, "500": {}, "default": {}}
    text = one(
        tmp_path, "/n/{ns}/p/{pod}/kill", responses=answers, more={"servers": [{"url": "https://h/api"}]}
    ).configuration()
    for words in (
        '# DECIDE: target_agents: ["path:ns/path:pod"]',
        "# DECIDE: not_executed_on: [404, 409]",
        "# DECIDE: completion: report",
        "# DECIDE: the address of the backend. The document names https://h/api.",
        "# DECIDE whether a preset",
        "# DECIDE for each route: does the operation change anything",
    ):
        assert words in text
    assert "max_cost_usd" in one(tmp_path).catalogue()


# Names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "operation", "name"),
    [
        ("/x", {"operationId": "restartPod"}, "restartPod"),
        ("/x", {"operationId": "pods/restart all!"}, "pods_restart_all"),
        ("/x", {"operationId": "2fa"}, "post_2fa"),
        ("/x", {"operationId": "on"}, "on"),
        ("/pets/{pet-id}/photos", {}, "post_pets_pet_id_photos"),
        ("/pets", {"operationId": "日本"}, "post_pets"),
        ("/", {}, "post"),
        ("/x", {"operationId": "a" * 100}, "a" * MAX_NAME_CHARS),
    ],
)
def test_an_action_is_named_by_its_operation_id_else_by_method_and_path(
    tmp_path: Path, path: str, operation: dict[str, str], name: str
) -> None:
    found = one(tmp_path, path, **operation)
    (route,) = routes(found)
    assert (route["name"], route["action"]) == (name, f"const:{name}")
    assert list(yamlfile.parse(found.catalogue(), "a.yaml").value["actions"]) == [name]


def test_names_that_become_the_same_are_numbered(tmp_path: Path) -> None:
    long = "a" * 100
    items = {
        f"/{n}": {"post": {"operationId": name}}
        for n, name in enumerate(["a b", "a/b", "a_b", long, long + "b"])
    }
    names = [route.name for route in suggested(backend(tmp_path, paths=items)).routes]
    assert names == ["a_b", "a_b_2", "a_b_3", "a" * 64, "a" * 62 + "_2"]


# Paths --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/p/{pod-name}/x", "/p/{pod_name}/x"),
        ("/p/{1}/x", "/p/{part_1}/x"),
        ("/{a-b}/{a_b}/x", "/{a_b}/{a_b_2}/x"),
        ("/{größe}/x", "/{gr__e}/x"),
        ("/x?action=run", "/x"),
        ("/x#fragment", "/x"),
        ("/x/{a}:{b}", "/x/{a}:{b}"),
        ("/x/{proxy+}", "/x/{proxy...}"),
        ("/x/{file-path=**}", "/x/{file_path...}"),
        ("/x/", "/x/"),
        ("/", "/"),
    ],
)
def test_variables_are_renamed_and_queries_are_left_out(tmp_path: Path, path: str, expected: str) -> None:
    assert list(paths(one(tmp_path, path)).values()) == [[expected]]


def test_a_dollar_before_a_variable_is_no_variable_of_the_environment(tmp_path: Path) -> None:
    found = one(tmp_path, "/$HOME/x")
    assert routes(found)[0]["path"] == "/$HOME/x"


def test_a_path_that_no_route_can_express_is_commented_out_with_the_reason(tmp_path: Path) -> None:
    items = {"/a b": {"post": {"summary": "Blank\n\x1b[2J"}}, "/ok": {"post": {}}}
    found = suggested(backend(tmp_path, paths=items))
    assert list(paths(found)) == ["post_ok"]
    text = found.configuration()
    assert "# NOT GATED: POST /a b (line 1): Blank \\x1b[2J\n    #   a route path is printable ASCII" in text
    assert found.rows()[0]["becomes"].startswith("no route: a route path is printable ASCII")
    assert len(routes(found)) == 1


def test_the_base_path_of_the_servers_comes_first(tmp_path: Path) -> None:
    def bases(*servers: dict[str, Any]) -> list[str]:
        return next(iter(paths(one(tmp_path, more={"servers": list(servers)})).values()))

    assert bases({"url": "https://h:8443/api/v1/"}) == ["/api/v1/x"]
    assert bases({"url": "/v2"}, {"url": "v3"}, {"url": "./v4/../v5"}) == ["/v2/x", "/v3/x", "/v5/x"]
    assert bases({"url": "//h/v6?a=b"}, {"url": "https://other/v6#c"}) == ["/v6/x"]
    assert bases({"url": "/"}) == bases() == bases({"url": "https://h"}) == bases({"url": "."}) == ["/x"]
    versions = {
        "version": {"default": "v1", "enum": ["v1", "v2"]},
        "host": {"default": "h", "enum": ["h", "i"]},
    }
    assert bases({"url": "https://{host}/{version}", "variables": versions}) == ["/v1/x", "/v2/x"]
    whole = {"server": {"default": "https://h/base"}}
    assert bases({"url": "{server}/v7", "variables": whole}) == ["/base/v7/x"]


def test_servers_of_a_path_and_of_an_operation_replace_those_above(tmp_path: Path) -> None:
    item = {
        "servers": [{"url": "/path"}],
        "post": {"operationId": "a"},
        "put": {"operationId": "b", "servers": [{"url": "/operation"}]},
    }
    found = suggested(
        backend(
            tmp_path, servers=[{"url": "/root"}], paths={"/x": item, "/y": {"post": {"operationId": "c"}}}
        )
    )
    assert paths(found) == {"a": ["/path/x"], "b": ["/operation/x"], "c": ["/root/y"]}


def test_a_server_variable_without_a_list_of_values_is_taken_as_its_default_and_noted(tmp_path: Path) -> None:
    variables = {"base": {"default": "v2"}, "host": {"default": "h"}}
    found = one(tmp_path, more={"servers": [{"url": "https://{host}/{base}", "variables": variables}]})
    assert list(paths(found).values()) == [["/v2/x"]]
    assert found.backend.notes == ("the server variable {base} is taken as its default, 'v2'",)
    assert "# DECIDE: the server variable {base}" in found.configuration()
    ended = scopegate(tmp_path / "api.json")
    assert "the server variable {base}" in ended.stderr


def test_operations_that_a_request_could_both_mean_share_a_route(tmp_path: Path) -> None:
    items = {
        "/a/{x}/run": {"post": {"operationId": "first", "requestBody": JSON_BODY}},
        "/a/b/{y}": {"post": {"operationId": "second"}, "delete": {"operationId": "third"}},
        "/a/b/run": {"post": {"operationId": "exact"}},
    }
    found = suggested(backend(tmp_path, paths=items))
    assert paths(found) == {
        "first": ["/a/{x}/run", "/a/b/{y}"],
        "third": ["/a/b/{y}"],
        "exact": ["/a/b/run"],
    }
    assert found.routes[0].kinds == ["json", "empty"]
    becomes = [row["becomes"] for row in found.rows()]
    assert becomes[1] == "route first, shared with /a/{x}/run"
    assert "These operations share a route" in found.configuration()


def test_the_same_path_under_two_names_of_its_variable_is_one_path(tmp_path: Path) -> None:
    items = {
        "/p/{id}/run": {"post": {"operationId": "first"}},
        "/p/{pid}/run": {"post": {"operationId": "second"}, "put": {"operationId": "other"}},
        "/q?a=1": {"post": {"operationId": "third"}},
        "/q?a=2": {"post": {"operationId": "fourth"}},
    }
    found = suggested(backend(tmp_path, paths=items))
    assert paths(found) == {"first": ["/p/{id}/run"], "other": ["/p/{pid}/run"], "third": ["/q"]}


def test_routes_of_which_each_conflicts_with_the_next_become_one(tmp_path: Path) -> None:
    names = ("/a/{x}/c", "/a/b/{y}", "/{z}/b/d", "/x/y/{w}")
    found = suggested(backend(tmp_path, paths={name: {"post": {"operationId": name}} for name in names}))
    assert list(paths(found).values()) == [list(names[:3]), [names[3]]]


def test_what_the_suggested_routes_would_refuse_is_said(tmp_path: Path) -> None:
    items: dict[str, Any] = {"/Case/x": {"post": {}}, "/case/x": {"get": {}}, "/y": {"put": {}, "trace": {}}}
    found = suggested(backend(tmp_path, paths=items))
    becomes = {(row["method"], row["path"]): row["becomes"] for row in found.rows()}
    assert becomes["GET", "/case/x"].startswith("refused: ambiguous_path: ")
    assert becomes["TRACE", "/y"].startswith("refused: method_not_allowed: ")
    text = found.configuration()
    assert "    # REFUSED with these routes: GET /case/x (line 1)\n    #   ambiguous_path: " in text
    assert "NOT GATED" not in text


# Bodies -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "required", "kinds"),
    [
        (["application/json"], True, ("json",)),
        (["Application/JSON; charset=utf-8"], True, ("json",)),
        (["application/json"], False, ("json", "empty")),
        (["application/x-www-form-urlencoded"], True, ("form",)),
        (
            ["application/json", "application/x-www-form-urlencoded", "text/xml"],
            True,
            ("json", "form", "any"),
        ),
        (["application/json", "multipart/form-data"], True, ("json", "any")),
        (["application/x-www-form-urlencoded", "multipart/form-data"], True, ("any",)),
        (["application/json", "text/json"], True, ("any",)),
        (["multipart/form-data"], False, ("any",)),
        (["*/*"], True, ("any",)),
        ([], True, ("any",)),
    ],
)
def test_the_kinds_of_a_body_follow_from_its_media_types(
    tmp_path: Path, content: list[str], required: bool, kinds: tuple[str, ...]
) -> None:
    assert body(tmp_path, {name: {} for name in content}, required=required).kinds == kinds


def test_an_operation_without_a_request_body_takes_an_empty_one(tmp_path: Path) -> None:
    assert routes(one(tmp_path, method="delete"))[0]["body"] == "empty"


def test_json_under_another_media_type_is_listed_as_such(tmp_path: Path) -> None:
    found = body(tmp_path, {"application/merge-patch+json": {}, "application/json": {}})
    assert (found.kinds, found.content_types) == (("json",), ("application/merge-patch+json",))
    request = {"content": {"application/json-patch+json": {"schema": {"type": "array"}}}}
    (route,) = routes(one(tmp_path, method="patch", requestBody=request))
    assert (route["body"], route["content_types"]) == (["json", "empty"], "application/json-patch+json")


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "array"},
        {"type": ["object", "string"]},
        {"oneOf": [{"type": "object"}, {"$ref": "#/components/schemas/List"}]},
        {"allOf": [{"$ref": "#/components/schemas/Again"}]},
    ],
)
def test_json_that_may_be_no_object_is_taken_as_any(tmp_path: Path, schema: dict[str, Any]) -> None:
    schemas = {
        "List": {"type": "array"},
        "Again": {"anyOf": [{"$ref": "#/components/schemas/Again"}, {"$ref": "#/components/schemas/List"}]},
    }
    found = body(tmp_path, {"application/json": {"schema": schema}}, components={"schemas": schemas})
    assert found.kinds == ("any",)
    assert found.note is not None


@pytest.mark.parametrize(
    ("members", "parameters"),
    [
        ({"parameters": {"type": "array"}}, None),
        ({"target_agents": {"type": "string"}}, None),
        ({"Target_Agents": {"type": "array"}, "parameters": {"type": "object"}}, "/parameters"),
        ({"Parameters": {"type": "object"}}, "/Parameters"),
        ({"Parameters": {"$ref": "#/components/schemas/Map"}, "other": {}}, "/Parameters"),
        ({"Parameters": {}, "PARAMETERS": {}}, None),
    ],
)
def test_a_body_that_the_default_places_would_misread_gets_places_of_its_own(
    tmp_path: Path, members: dict[str, Any], parameters: str | None
) -> None:
    request = {"required": True, "content": {"application/json": {"schema": {"properties": members}}}}
    schemas = {"Map": {"type": "object"}}
    found = one(tmp_path, requestBody=request, more={"components": {"schemas": schemas}})
    (route,) = routes(found)
    assert (route["body"], route["parameters"], route["target_agents"]) == ("json", parameters, [])
    assert "    # Places of its own, because the member " in found.configuration()


def test_members_that_the_default_places_read_as_they_are_leave_the_defaults(tmp_path: Path) -> None:
    members = {"parameters": {"type": "object"}, "target_agents": {"type": ["array", "null"]}, "x": {}}
    request = {"required": True, "content": {"application/json": {"schema": {"properties": members}}}}
    (route,) = routes(one(tmp_path, requestBody=request))
    assert "parameters" not in route


def test_references_within_the_document_are_followed(tmp_path: Path) -> None:
    components = {
        "requestBodies": {"A~b/c": {"$ref": "#/components/requestBodies/B"}, "B": JSON_BODY},
        "pathItems": {"P": {"post": {"requestBody": {"$ref": "#/components/requestBodies/A~0b~1c"}}}},
    }
    found = backend(tmp_path, paths={"/x": {"$ref": "#/components/pathItems/P"}}, components=components)
    assert [(each.method, each.body.kinds) for each in found.operations] == [("POST", ("json",))]


# Mistakes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({"openapi": "2.0"}, "1:2: #/openapi: is missing or not 3.x"),
        ({"openapi": None, "swagger": "2.0"}, "#/swagger: is a version before OpenAPI 3"),
        ({"paths": []}, "#/paths: is not a map"),
        ({"paths": {"x": {}}}, "#/paths/x: is no path; begin it with a slash"),
        ({"paths": {"/x": []}}, "#/paths/~1x: is not a map"),
        ({"paths": {"/x": {"post": None}}}, "#/paths/~1x/post: is not a map"),
        ({"paths": {"/x": {"post": {"operationId": []}}}}, "#/paths/~1x/post/operationId: is not text"),
        ({"paths": {"/x": {"$ref": "other.yaml#/x"}}}, "#/paths/~1x/$ref: refers to another document"),
        (
            {"paths": {"/x": {"$ref": "#/nowhere"}}},
            "#/paths/~1x/$ref: refers to #/nowhere, which does not exist",
        ),
        (
            {"paths": {"/x": {"post": {"requestBody": {"$ref": "#/paths/~1x/post/requestBody"}}}}},
            "#/paths/~1x/post/requestBody/$ref: leads back to itself",
        ),
        ({"paths": {"/x": {"post": {"requestBody": {"content": []}}}}}, "requestBody/content: is not a map"),
        ({"servers": {}}, "#/servers: is not a list"),
        ({"servers": [{"url": []}]}, "#/servers/0/url: is not text"),
        (
            {"servers": [{"url": "/{v}", "variables": {"v": {"enum": ["a"]}}}]},
            "#/servers/0/variables/v: has no text as its default",
        ),
        (
            {"servers": [{"url": f"/{n}"} for n in range(MAX_BASES + 1)]},
            f"#/servers: gives {MAX_BASES + 1} base paths",
        ),
    ],
)
def test_a_mistake_is_named_with_its_line_and_its_member(
    tmp_path: Path, document: dict[str, Any], expected: str
) -> None:
    (fault,) = faults(tmp_path, **document)
    assert expected in fault
    line, column, _ = fault.split(":", 2)
    assert (int(line), int(column) > 0) == (1, True)


def test_all_mistakes_are_named_at_once_in_their_order(tmp_path: Path) -> None:
    items: dict[str, Any] = {"/x": {"post": []}, "y": {}, "/z": {"$ref": "#/"}}
    assert [fault.split(": ")[1] for fault in faults(tmp_path, paths=items)] == [
        "#/paths/~1x/post",
        "#/paths/y",
        "#/paths/~1z/$ref",
    ]


# The command --------------------------------------------------------------------------------------------


def scopegate(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["routes", "suggest", *map(str, arguments)])


def test_the_table_names_every_operation_and_the_files_are_printed_above_it() -> None:
    ended = scopegate(DOCUMENTS / "galaxy.yaml")
    assert ended.exit_code == 0
    above, _, table = ended.stdout.partition("\nMETHOD")
    assert "# ---- scopegate.yaml\n" in above
    assert "# ---- policies/actions.yaml\n" in above
    assert len(table.splitlines()) == 1 + len(read(DOCUMENTS / "galaxy.yaml").operations)


def test_a_document_may_come_from_standard_input() -> None:
    text = (DOCUMENTS / "galaxy.yaml").read_bytes()
    piped = CliRunner().invoke(main, ["routes", "suggest", "-"], input=text)
    assert piped.exit_code == 0
    assert "suggested from standard input." in piped.stdout
    wrong = CliRunner().invoke(main, ["routes", "suggest", "-"], input="openapi: 3.0.0\npaths: []\n")
    assert (wrong.exit_code, wrong.stderr) == (2, "standard input:2:1: #/paths: is not a map; write one\n")


def test_files_are_written_and_never_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "gate"
    ended = scopegate(DOCUMENTS / "petstore.json", "--output", folder)
    assert ended.exit_code == 0
    assert f"wrote {folder}/scopegate.yaml and {folder}/policies/actions.yaml" in ended.stdout
    assert "name: placeOrder" in (folder / "scopegate.yaml").read_text()
    before = (folder / "policies/actions.yaml").read_text()
    (folder / "scopegate.yaml").unlink()
    ended = scopegate(DOCUMENTS / "galaxy.yaml", "--output", folder)
    assert ended.exit_code == 2
    assert f"{folder}/policies/actions.yaml: exists already" in ended.stderr
    assert (folder / "policies/actions.yaml").read_text() == before
    assert not (folder / "scopegate.yaml").exists()


def test_a_document_that_cannot_be_read_or_needs_no_gate_writes_nothing(tmp_path: Path) -> None:
    document = tmp_path / "api.yaml"
    document.write_text("openapi: 3.0.0\npaths:\n  /x:\n    post: []\n")
    ended = scopegate(document, "--output", tmp_path / "gate")
    assert (ended.exit_code, ended.stdout) == (2, "")
    assert ended.stderr == f"{document}:4:5: #/paths/~1x/post: is not a map; write one\n"
    document.write_text("openapi: 3.0.0\npaths:\n  /x:\n    get: {}\n")
    ended = scopegate(document, "--output", tmp_path / "gate")
    assert ended.exit_code == 1
    assert "no operation gets a route" in ended.stderr
    assert "GET" in ended.stdout
    assert not (tmp_path / "gate").exists()


@pytest.mark.parametrize("document", ["airflow.yaml", "galaxy.yaml", "petstore.json"])
def test_check_accepts_the_suggestion_for_a_public_document_as_it_is(document: str, tmp_path: Path) -> None:
    assert scopegate(DOCUMENTS / document, "--output", tmp_path / "gate").exit_code == 0
    checked = CliRunner().invoke(main, ["check", "--config", str(tmp_path / "gate/scopegate.yaml")])
    assert (checked.exit_code, checked.stderr) == (0, "")


@pytest.mark.parametrize("document", ["airflow.yaml", "galaxy.yaml", "petstore.json"])
def test_what_a_person_has_to_decide_becomes_a_key_when_its_mark_is_deleted(
    document: str, tmp_path: Path
) -> None:
    found = suggested(read(DOCUMENTS / document))
    text, count = re.subn(r"# DECIDE: (?=\w+: )", "", found.configuration())
    (tmp_path / "scopegate.yaml").write_text(text, encoding="utf-8")
    gate = load(tmp_path / "scopegate.yaml", environment={}).settings.gate
    assert count > 2
    assert any(route.not_executed_on for route in gate.routes)
    assert any(str(place).startswith("path:") for route in gate.routes for place in route.target_agents)


# A body of each media type that the documents name.
BODIES = {
    "application/json": b"{}",
    "application/x-www-form-urlencoded": b"a=b",
    None: None,
}


@pytest.mark.parametrize("document", ["airflow.yaml", "galaxy.yaml", "petstore.json"])
def test_each_operation_of_a_public_document_is_gated_or_passes_as_the_table_says(
    document: str, tmp_path: Path
) -> None:
    folder = tmp_path / "gate"
    scopegate(DOCUMENTS / document, "--output", folder)
    found = suggested(read(DOCUMENTS / document))
    snapshot = Snapshot(load(folder / "scopegate.yaml", environment={}).settings, None)
    gated = 0
    for operation, row in zip(found.backend.operations, found.rows(), strict=True):
        kind = next((kind for kind in operation.body.kinds), "empty")
        media_type = {"json": "application/json", "form": "application/x-www-form-urlencoded"}.get(kind)
        headers = [("X-Recovery-Scope-Id", "scope_1"), ("X-Recovery-Incident-Id", "inc_1")]
        headers += [("Content-Type", media_type)] if media_type else []
        for base in operation.bases:
            target = re.sub(r"\{[^}]*\}", "7", base + operation.path)
            raw = request_bytes(operation.method, target, headers, BODIES[media_type])
            trial = asyncio.run(tried(raw, snapshot))
            assert trial.refusal is None, (target, trial.refusal)
            if trial.route is None:
                assert row["becomes"] == "passes, as gate.unlisted.reads says"
                continue
            gated += 1
            assert row["becomes"].startswith(f"route {trial.route.label}")
            assert trial.claims is not None
            assert (trial.claims.action, trial.claims.scope_id) == (row["action"], "scope_1")
    assert gated > 5


TEXT = st.text(max_size=12)
PATHS = st.lists(
    st.sampled_from(
        ["a", "A", "b", "{x}", "{y-z}", "{x}:run", "{a}{b}", "{p+}", "", ".", "..", "a b", "ü", "${H}"]
    )
    | st.text("ab/{}$:*?#%;.~\\", max_size=4),
    max_size=4,
).map(lambda parts: "/" + "/".join(parts))
SCHEMAS = st.sampled_from([{}, {"type": "array"}, {"properties": {"Parameters": {}}}, {"type": "object"}])
TYPES = st.sampled_from(
    [
        "application/json",
        "application/x+json",
        "application/x-www-form-urlencoded",
        "multipart/form-data",
        "*/*",
    ]
)
OPERATIONS = st.fixed_dictionaries(
    {},
    optional={
        "operationId": TEXT,
        "summary": TEXT,
        "requestBody": st.fixed_dictionaries(
            {"content": st.dictionaries(TYPES, SCHEMAS.map(lambda schema: {"schema": schema}), max_size=3)},
            optional={"required": st.booleans()},
        ),
        "responses": st.dictionaries(st.sampled_from(["200", "202", "404", "x"]), st.just({}), max_size=3),
    },
)
ITEMS = st.dictionaries(st.sampled_from(["get", "post", "put", "delete", "trace"]), OPERATIONS, max_size=3)
SERVERS = st.lists(PATHS.map(lambda path: {"url": f"https://h{path}"}), max_size=2)


@given(items=st.dictionaries(PATHS, ITEMS, max_size=6), servers=SERVERS, title=TEXT)
@settings(max_examples=40, deadline=None)
def test_every_suggestion_is_a_configuration_that_can_be_loaded(
    items: dict[str, Any], servers: list[dict[str, str]], title: str
) -> None:
    document = {"openapi": "3.1.0", "info": {"title": title}, "servers": servers, "paths": items}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "api.json").write_text(json.dumps(document))
        found = suggested(read(folder / "api.json"))
        writes = [one for one in found.backend.operations if one.method not in ("GET", "HEAD", "OPTIONS")]
        assert len(writes) == len(found.without) + sum(len(route.operations) for route in found.routes)
        if not found.routes:
            return
        (folder / "policies").mkdir()
        (folder / "scopegate.yaml").write_text(found.configuration(), encoding="utf-8")
        (folder / "policies/actions.yaml").write_text(found.catalogue(), encoding="utf-8")
        gate = load(folder / "scopegate.yaml", environment={}).settings.gate
        assert [route.label for route in gate.routes] == [route.name for route in found.routes]
        assert set(policyfiles.load(folder / "policies").actions) == {route.name for route in found.routes}


def test_a_suggestion_depends_on_the_document_alone() -> None:
    for file in DOCUMENTS.glob("*.*"):
        if file.suffix != ".txt":
            made = [suggested(read(file)) for _ in range(2)]
            assert made[0].configuration() == made[1].configuration()
            assert made[0].catalogue() == made[1].catalogue()
