"""`scopegate routes list` and `routes match`: what is gated, and what becomes of a request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from sidecar.cli.main import main

BODY = {"scope_id": "scope_1", "incident_id": "inc_1", "action": "restart_pod"}
JSON = ("-H", "Content-Type: application/json")


def scopegate(*arguments: str | Path, text: str | bytes | None = None, **environment: str) -> Result:
    return CliRunner().invoke(main, ["routes", *map(str, arguments)], input=text, env=environment)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "c.yaml"
    file.write_text(
        "upstream: {url: http://127.0.0.1:9000}\n"
        "gate:\n"
        "  routes:\n"
        '    - path: "**/recovery/execute"\n'
        "    - path: /run\n"
        "      mode: shadow\n"
        "      action: header:X-Action\n",
        encoding="utf-8",
    )
    return file


@pytest.fixture
def body(tmp_path: Path) -> Path:
    file = tmp_path / "body.json"
    file.write_text(json.dumps({**BODY, "target_agents": ["a", "b"], "parameters": {"wait": 1.5}}))
    return file


def matched(*arguments: str | Path, status: int = 0, text: str | bytes | None = None) -> dict[str, Any]:
    """What `match --json` says, and its exit code."""
    ended = scopegate("match", "--json", "--config", *arguments, text=text)
    assert (ended.exit_code, ended.stderr) == (status, "")
    document: dict[str, Any] = json.loads(ended.stdout)
    return document


# Listing ------------------------------------------------------------------------------------------------


def test_each_route_is_listed_with_its_places_and_the_line_that_configures_it(file: Path) -> None:
    listed = json.loads(scopegate("list", "--json", "--config", file).stdout)["routes"]
    assert [(one["name"], one["action"], one["scope_id"], one["mode"], one["source"]) for one in listed] == [
        ("**/recovery/execute", "/action", "/scope_id", "enforce", f"{file}:4:7"),
        ("/run", "header:x-action", "/scope_id", "shadow", f"{file}:5:7"),
    ]
    table = scopegate("list", "--config", file).stdout.splitlines()
    assert [line.split()[0] for line in table[:3]] == ["NAME", "**/recovery/execute", "/run"]


def test_a_route_that_no_file_gives_has_its_flag_or_variable_or_none_as_its_source(file: Path) -> None:
    flag = ("--set", "gate.routes=[{path: /x}]")
    (listed,) = json.loads(scopegate("list", "--json", "--config", file, *flag).stdout)["routes"]
    assert (listed["name"], listed["source"]) == ("/x", "--set gate.routes")
    file.write_text("upstream: {url: http://127.0.0.1:9000}\n", encoding="utf-8")
    (listed,) = json.loads(scopegate("list", "--json", "--config", file).stdout)["routes"]
    assert (listed["name"], listed["source"]) == ("**/recovery/execute", "default")


def test_a_route_of_a_preset_has_the_preset_as_its_source_unless_the_file_replaces_it(file: Path) -> None:
    flag = ("--set", "gate.presets=[awx]")
    own = '    - {name: awx.cancel, path: "/api/v2/jobs/{id}/cancel/", body: any}\n'
    file.write_text(file.read_text(encoding="utf-8") + own, encoding="utf-8")
    listed = json.loads(scopegate("list", "--json", "--config", file, *flag).stdout)["routes"]
    sources = {one["name"]: one["source"] for one in listed}
    assert sources["/run"] == f"{file}:5:7"
    assert sources["awx.cancel"] == f"{file}:8:7"
    assert sources["awx.launch"] == "preset awx"
    launch = ("POST", "/api/v2/job_templates/42/launch/", "-H", "X-Recovery-Scope-Id: scope_1")
    found = matched(file, *launch, *flag)
    assert found["route"] == {"name": "awx.launch", "source": "preset awx"}
    assert found["facts"]["target_agents"] == ["job_templates/42"]


def test_what_no_route_lists_is_shown_below_the_routes(file: Path) -> None:
    unlisted = {"reads": "pass", "writes": "pass", "except": []}
    assert json.loads(scopegate("list", "--json", "--config", file).stdout)["unlisted"] == unlisted
    flags = ("--set", "gate.unlisted.writes=record", "--set", "gate.unlisted.except=[/healthz]")
    table = scopegate("list", "--config", file, *flags).stdout.splitlines()
    assert table[-1] == "not listed: reads pass, writes record, except /healthz"


def test_a_configuration_that_cannot_be_used_is_named_with_its_line(file: Path) -> None:
    file.write_text("upstream: {url: http://127.0.0.1:9000}\ngate: {routes: [{path: x}]}\n", encoding="utf-8")
    for words in (("list",), ("match", "POST", "/x")):
        ended = scopegate(*words, "--config", file)
        assert (ended.exit_code, ended.stdout) == (2, "")
        assert f"{file}:2:18: gate.routes[0].path: " in ended.stderr


def test_the_places_of_incident_and_target_agents_are_listed(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(
        "upstream: {url: http://127.0.0.1:9000}\ngate: {presets: [docker], routes: []}\n", encoding="utf-8"
    )
    (first, *_) = json.loads(scopegate("list", "--config", file, "--json").stdout)["routes"]
    assert (first["target_agents"], first["incident_id"]) == (["path:*"], "header:x-recovery-incident-id")
    head = scopegate("list", "--config", file).stdout.splitlines()[0].split()
    assert {"TARGET_AGENTS", "INCIDENT_ID"} <= set(head)


# Matching -----------------------------------------------------------------------------------------------


def test_the_route_of_a_request_and_its_facts_are_shown(file: Path, body: Path) -> None:
    found = matched(file, "POST", "/api/v1/recovery/execute", *JSON, "--body", body)
    assert (found["outcome"], found["route"], found["error"]) == (
        "gated",
        {"name": "**/recovery/execute", "source": f"{file}:4:7"},
        None,
    )
    assert found["facts"] == {**BODY, "target_agents": ["a", "b"], "parameters": {"wait": 1.5}}
    assert [(one["name"], one["why"]) for one in found["others"]] == [("/run", "another path")]
    lines = scopegate(
        "match", "--config", file, "POST", "/x/recovery/execute", *JSON, "--body", body
    ).stdout.splitlines()
    assert lines[0] == f"gated      by **/recovery/execute, {file}:4:7"
    assert "action     restart_pod" in lines
    assert lines[-1].split(maxsplit=2) == ["/run", f"{file}:5:7", "another path"]


def test_many_routes_with_another_path_are_counted_and_the_others_named(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    paths = ", ".join(f"{{path: /x{index}}}" for index in range(20))
    file.write_text(
        f"upstream: {{url: http://127.0.0.1:9000}}\ngate: {{routes: [{paths}]}}\n", encoding="utf-8"
    )
    ended = scopegate("match", "--config", file, "DELETE", "/x7")
    assert ended.stdout.splitlines()[-2].endswith("DELETE is not among its methods")
    assert ended.stdout.splitlines()[-1] == "19 other routes: another path"
    assert len(matched(file, "DELETE", "/x7")["others"]) == 20


def test_a_fact_that_the_request_lacks_is_shown_as_none(file: Path) -> None:
    ended = scopegate("match", "--config", file, "POST", "/recovery/execute", *JSON, "--body", "-", text="{}")
    assert ended.exit_code == 0
    assert "scope      (none)" in ended.stdout.splitlines()


def test_a_request_that_no_route_takes_passes_with_exit_code_1(file: Path) -> None:
    found = matched(file, "POST", "/agents", status=1)
    assert (found["outcome"], found["route"], found["facts"]) == ("passes", None, None)
    assert {one["why"] for one in found["others"]} == {"another path"}
    found = matched(file, "GET", "/run", status=1)
    whys = {one["name"]: one["why"] for one in found["others"]}
    assert whys == {"**/recovery/execute": "another path", "/run": "GET is not among its methods"}


def test_what_becomes_of_a_request_that_no_route_lists_is_shown_with_its_key(file: Path) -> None:
    def unlisted(method: str, *flags: str, path: str = "/agents", status: int = 1) -> tuple[str, str]:
        found = matched(file, method, path, *flags, status=status)["unlisted"]
        return found["treatment"], found["key"]

    writes = ("--set", "gate.unlisted.writes=record", "--set", "gate.unlisted.except=[/login]")
    assert unlisted("POST") == ("pass", "gate.unlisted.writes")
    assert unlisted("GET", *writes) == ("pass", "gate.unlisted.reads")
    assert unlisted("POST", *writes) == ("record", "gate.unlisted.writes")
    assert unlisted("POST", *writes, path="/login") == ("pass", "gate.unlisted.except")
    ended = scopegate("match", "--config", file, "POST", "/agents", *writes)
    assert "it passes once a record is on disk (gate.unlisted.writes)" in ended.stdout


def test_a_request_that_no_route_lists_and_that_is_refused_does_not_pass(file: Path) -> None:
    found = matched(file, "GET", "/agents", "--set", "gate.unlisted.reads=refuse")
    assert (found["outcome"], found["error"]) == ("refused", "not_listed")
    assert found["unlisted"] == {"key": "gate.unlisted.reads", "treatment": "refuse"}


def test_each_route_that_does_not_take_a_request_has_its_reason(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(
        "upstream: {url: http://127.0.0.1:9000}\n"
        "gate:\n"
        "  routes:\n"
        '    - {name: one, path: "/jobs/{id}", methods: [DELETE], body: any}\n'
        "    - {name: all, path: /jobs/all, methods: [DELETE], body: [json, empty]}\n"
        '    - {name: stop, path: ["/jobs/{id}/stop", /jobs/all], methods: [POST], body: empty}\n'
        "    - {name: Case, path: /Jobs/x/y, methods: [POST], body: empty}\n",
        encoding="utf-8",
    )

    def whys(method: str, path: str, *more: str) -> dict[str, str]:
        found = matched(file, method, path, *more)
        taken = {} if found["route"] is None else {found["route"]["name"]: found["error"] or "takes it"}
        return taken | {each["name"]: each["why"].partition(":")[0] for each in found["others"]}

    assert whys("DELETE", "/jobs/all") == {
        "all": "takes it",
        "one": "all goes first",
        "stop": "DELETE is not among its methods",
        "Case": "another path",
    }
    assert whys("DELETE", "/jobs/all", "-H", "Content-Type: text/plain", "--body", str(file))["all"] == (
        "unsupported_media_type"
    )
    assert whys("PUT", "/jobs/7") == {
        "one": "PUT is not among its methods",
        "all": "another path",
        "stop": "another path",
        "Case": "another path",
    }
    assert whys("POST", "/jobs/x/y")["Case"] == "ambiguous_path"
    listed = json.loads(scopegate("list", "--json", "--config", file).stdout)["routes"]
    assert [(each["name"], each["methods"], each["path"], each["body"]) for each in listed] == [
        ("one", ["DELETE"], ["/jobs/{id}"], ["any"]),
        ("all", ["DELETE"], ["/jobs/all"], ["json", "empty"]),
        ("stop", ["POST"], ["/jobs/{id}/stop", "/jobs/all"], ["empty"]),
        ("Case", ["POST"], ["/Jobs/x/y"], ["empty"]),
    ]
    table = scopegate("list", "--config", file).stdout.splitlines()
    stop = next(index for index, line in enumerate(table) if line.startswith("stop "))
    assert table[stop].split()[:3] == ["stop", "POST", "/jobs/{id}/stop"]
    assert table[stop + 1].split() == ["/jobs/all"]
    assert [(each["action"], each["scope_id"]) for each in listed[:2]] == [
        ("const:one", "header:x-recovery-scope-id"),
        ("/action", "/scope_id"),
    ]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("POST", "/recovery/execute/"), "ambiguous_path"),
        (("POST", "/recovery/%65xecute%2F"), "ambiguous_path"),
        (("DELETE", "/recovery/execute"), "method_not_allowed"),
        (("POST", "/recovery/execute", "-H", "X-HTTP-Method-Override: PUT"), "override_refused"),
        (("POST", "/agents", "-H", "X-Original-URL: /recovery/execute"), "override_refused"),
        (("POST", "/recovery/execute"), "unsupported_media_type"),
        (("POST", "/recovery/execute", "-H", "Host: a b", *JSON), "invalid_request"),
    ],
)
def test_a_request_that_the_gate_refuses_is_gated_and_its_error_is_shown(
    file: Path, arguments: tuple[str, ...], error: str
) -> None:
    found = matched(file, *arguments)
    assert (found["outcome"], found["error"], found["facts"]) == ("gated", error, None)


def test_a_refusal_in_shadow_mode_is_said_to_be_one(file: Path) -> None:
    found = matched(file, "POST", "/run", "--body", "-", text="{}")
    assert (found["route"]["name"], found["shadow"]) == ("/run", True)
    ended = scopegate("match", "--config", file, "POST", "/run", "--body", "-", text="{}")
    assert "in shadow  unsupported_media_type: " in ended.stdout


def test_a_call_of_the_sidecar_itself_neither_passes_nor_is_gated(file: Path) -> None:
    assert matched(file, "POST", "/api/v1/recovery/scope")["outcome"] == "served"
    moved = ("--set", "scopes.serve_on=admin")
    assert matched(file, "POST", "/api/v1/recovery/scope", *moved, status=1)["outcome"] == "passes"


def test_what_the_parser_refuses_is_refused_on_any_path(file: Path) -> None:
    found = matched(file, "BREW", "/agents")
    assert (found["outcome"], found["error"]) == ("refused", "invalid_request")
    assert "BREW" in found["message"]


def test_a_url_gives_its_host_and_its_target_as_they_are_written(file: Path) -> None:
    for url in (
        "http://user:pw@gate.example:8000/recovery/execute?a=%2e#b",
        "HTTPS://[::1]/recovery/execute",
    ):
        assert matched(file, "post", url)["route"] is not None, url
    assert matched(file, "POST", "http://gate.example", status=1)["outcome"] == "passes"
    # A dot segment is what a client would have resolved. The command shows what becomes of it if it is sent.
    assert matched(file, "POST", "http://h/x/../recovery/execute")["error"] == "ambiguous_path"


def test_a_large_body_is_read_to_its_end_and_one_that_is_too_large_is_refused(file: Path) -> None:
    large = json.dumps({**BODY, "parameters": {"text": "x" * 900_000}})
    found = matched(file, "POST", "/recovery/execute", *JSON, "--body", "-", text=large)
    assert (found["error"], found["facts"]["scope_id"]) == (None, "scope_1")
    found = matched(file, "POST", "/recovery/execute", *JSON, "--body", "-", text="x" * 1_100_000)
    assert found["error"] == "body_too_large"


@pytest.mark.parametrize(
    "arguments",
    [
        ("POST", "agents"),
        ("POST", "/a b"),
        ("PO ST", "/a"),
        ("POST", "/a\r\nX: y"),
        ("POST", "/a", "-H", "nothing"),
        ("POST", "/a", "-H", "X: a\r\nY: b"),
        ("POST", "/a", "-H", "Content-Length: 3"),
        ("POST", "/a", "--body", "/nowhere"),
        ("POST",),
    ],
)
def test_wrong_usage_ends_with_2(file: Path, arguments: tuple[str, ...]) -> None:
    ended = scopegate("match", "--config", file, *arguments)
    assert (ended.exit_code, ended.stdout) == (2, "")


def test_text_of_a_request_is_shown_without_control_characters(file: Path) -> None:
    text = json.dumps({**BODY, "parameters": {"a": "\x1b[2J\u202e"}})
    ended = scopegate("match", "--config", file, "POST", "/recovery/execute", *JSON, "--body", "-", text=text)
    assert ended.exit_code == 0
    assert "\x1b" not in ended.stdout
    assert "\u202e" not in ended.stdout
