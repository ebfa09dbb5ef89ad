"""`scopegate config`: what is in force and who said so. Nothing secret is shown, and nothing is obeyed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from click.testing import CliRunner, Result

from sidecar.cli.config import without_secrets
from sidecar.cli.main import main
from sidecar.files.yamlfile import dotted, parse
from sidecar.live.reload import unchangeable
from sidecar.settings.reading import load
from sidecar.settings.sections import KEYS

SHIPPED = Path(__file__).parents[2] / "config" / "scopegate.yaml"
TEXT = """\
upstream:
  url: http://127.0.0.1:9000
store:
  url: sqlite:///${DB_FILE:scopegate}.db
gate:
  max_in_flight: 5
  tenant_header: ${TENANT_HEADER}
"""


def scopegate(*arguments: str | Path, environment: Mapping[str, str] | None = None) -> Result:
    given = {"TENANT_HEADER": "X-Tenant", **(environment or {})}
    return CliRunner().invoke(main, ["config", *map(str, arguments)], env=given)


def shown(*arguments: str | Path, **environment: str) -> dict[str, dict[str, Any]]:
    ended = scopegate("show", "--json", "--config", *arguments, environment=environment)
    assert (ended.exit_code, ended.stderr) == (0, "")
    members: dict[str, dict[str, Any]] = json.loads(ended.stdout)
    return members


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "c.yaml"
    file.write_text(TEXT, encoding="utf-8")
    return file


# Where a value comes from -------------------------------------------------------------------------------


def test_every_key_is_shown_in_the_order_of_the_shipped_file() -> None:
    marks = parse(SHIPPED.read_bytes(), "scopegate.yaml").marks
    in_order = [dotted(path) for path in marks if dotted(path) in KEYS]
    assert [*shown(SHIPPED)] == in_order
    table = scopegate("show", "--config", SHIPPED).stdout.splitlines()
    assert table[0].split() == ["KEY", "VALUE", "LIVE", "SOURCE"]
    assert [line.split()[0] for line in table[1:] if line[0] != " "] == in_order


def test_a_value_is_said_to_be_the_default_or_has_its_place_in_the_file(file: Path) -> None:
    members = shown(file)
    sources = {key: member["source"] for key, member in members.items() if member["source"] != "default"}
    assert sources == {
        "upstream.url": f"{file}:2:3",
        "store.url": f"{file}:4:3",
        "gate.max_in_flight": f"{file}:6:3",
        "gate.tenant_header": f"{file}:7:3",
    }
    assert members.keys() == KEYS.keys()
    assert {tuple(member["overrides"]) for member in members.values()} == {()}


def test_what_overrides_a_value_is_named_with_what_it_overrides(file: Path) -> None:
    variable = {"SCOPEGATE_GATE__MAX_IN_FLIGHT": "6", "SCOPEGATE_CARE__MIN_CONFIDENCE": "1"}
    flags = ("--set", "gate.max_in_flight=7", "--set", "shutdown.drain_seconds=0")
    members = shown(file, *flags, **variable)
    told = {key: (member["value"], member["source"], member["overrides"]) for key, member in members.items()}
    assert told["gate.max_in_flight"] == (
        7,
        "--set gate.max_in_flight",
        ["environment SCOPEGATE_GATE__MAX_IN_FLIGHT", f"{file}:6:3"],
    )
    assert told["care.min_confidence"] == (1.0, "environment SCOPEGATE_CARE__MIN_CONFIDENCE", [])
    assert told["shutdown.drain_seconds"] == (0.0, "--set shutdown.drain_seconds", [])
    assert told["gate.max_body_bytes"] == (1_048_576, "default", [])
    table = scopegate("show", "--config", file, *flags, "gate.max_in_flight", environment=variable)
    assert table.stdout.splitlines()[1].split(maxsplit=3) == [
        "gate.max_in_flight",
        "7",
        "yes",
        f"--set gate.max_in_flight, overrides environment SCOPEGATE_GATE__MAX_IN_FLIGHT, {file}:6:3",
    ]


def test_the_variables_that_a_value_was_made_of_are_named(file: Path) -> None:
    members = shown(file)
    assert members["store.url"]["value"] == f"sqlite:///{file.parent}/scopegate.db"
    named = {key: member["variables"] for key, member in members.items() if member["variables"]}
    assert named == {"store.url": ["DB_FILE"], "gate.tenant_header": ["TENANT_HEADER"]}
    lines = scopegate("show", "--config", file, "store.url", "gate.tenant_header").stdout.splitlines()
    assert lines[1].endswith(f"  {file}:4:3, from ${{DB_FILE}} (not set)")
    assert lines[2].endswith(f"  {file}:7:3, from ${{TENANT_HEADER}}")
    # A variable in a value that is overridden has no part in the one that is in force.
    assert shown(file, "--set", "store.url=memory://")["store.url"]["variables"] == []


def test_a_dollar_that_is_written_out_is_no_variable(file: Path) -> None:
    file.write_text(TEXT + "policies: a$${B}\n", encoding="utf-8")
    assert shown(file)["policies"]["variables"] == []
    assert shown(file)["policies"]["value"] == f"{file.parent}/a${{B}}"


def test_a_warning_about_the_environment_is_given_here_too(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ended = scopegate("show", "--config", file, environment={"SCOPEGATE_GATE__MAX_IN_FLITE": "1"})
    assert ended.exit_code == 0
    assert "environment SCOPEGATE_GATE__MAX_IN_FLITE: no key has this name" in caplog.text
    assert "MAX_IN_FLITE" not in ended.stdout


# The values ---------------------------------------------------------------------------------------------


def test_the_values_make_the_same_settings_when_they_are_read_again(tmp_path: Path, file: Path) -> None:
    file.write_text(
        TEXT + "  routes:\n    - path: /v/{name}/run\n      action: path:name\n      target_agents: /agent\n"
        "    - {path: /b, mode: shadow}\n"
        "scopes: {defaults: {max_cost_usd: 0.000001}, limits: {max_cost_usd: 12.5}}\n"
        "log: {mask: [/details/a]}\ndata: {listen: 'unix:x.sock'}\nadmin: {listen: '[::1]:1'}\n",
        encoding="utf-8",
    )
    tree: dict[str, Any] = {}
    for key, member in shown(file).items():
        *above, last = key.split(".")
        at = tree
        for step in above:
            at = at.setdefault(step, {})
        at[last] = member["value"]
    again = tmp_path / "elsewhere" / "again.yaml"
    again.parent.mkdir()
    again.write_text(json.dumps(tree), encoding="utf-8")
    environment = {"TENANT_HEADER": "X-Tenant"}
    assert load(again, environment={}).settings == load(file, environment=environment).settings
    assert tree["scopes"]["defaults"]["max_cost_usd"] == 0.000001


def test_a_route_is_one_indented_block(file: Path) -> None:
    lines = scopegate("show", "--config", file, "gate.routes").stdout.splitlines()
    at = lines[1].index("- name: null")
    assert [line[at:].rstrip() for line in lines[2:]] == [
        "  path: '**/recovery/execute'",
        "  methods: [POST]",
        "  other_methods: refuse",
        "  body: [json]",
        "  content_types: []",
        "  mode: enforce",
        "  scope_id: /scope_id",
        "  incident_id: /incident_id",
        "  action: /action",
        "  parameters: /parameters",
        "  target_agents: [/target_agents, /parameters/target_agents]",
        "  cost: header:x-recovery-cost-usd",
        "  not_executed_on: []",
        "  completion: answer",
        "  completion_timeout_seconds: 3600",
    ]
    assert {line[:at].strip() for line in lines[2:]} == {""}
    assert lines[1].endswith("default")


def test_the_keys_that_a_reload_may_change_are_marked(file: Path) -> None:
    assert {key for key, member in shown(file).items() if member["live"]} == {
        name for name, key in KEYS.items() if key.is_live
    }
    lines = scopegate("show", "--config", file, "gate.max_in_flight", "data.listen").stdout.splitlines()
    assert [line.split()[2] for line in lines[1:]] == ["default", "yes"]


@pytest.mark.parametrize(
    ("words", "keys"),
    [
        (["care"], ["care.min_confidence"]),
        (
            ["scopes.limits"],
            [f"scopes.limits.{key}" for key in ("max_attempts", "ttl_seconds", "max_cost_usd")],
        ),
        (
            ["store.url", "policies", "care", "store"],
            ["store.url", "store.deadline_seconds", "care.min_confidence", "policies"],
        ),
    ],
)
def test_keys_and_sections_may_be_named(file: Path, words: list[str], keys: list[str]) -> None:
    assert [*shown(file, *words)] == keys


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("gate.max_inflight", 'gate.max_inflight is not a known key; did you mean "gate.max_in_flight"?'),
        ("gate.max", "gate.max is not a known key"),
        ("gate.routes[0].path", 'gate.routes[0].path is not a known key; did you mean "gate.routes"?'),
        ("\x1b[31mgate", "\\x1b[31mgate is not a known key"),
    ],
)
def test_a_key_that_does_not_exist_is_refused_with_the_nearest(file: Path, word: str, message: str) -> None:
    ended = scopegate("show", "--config", file, word)
    assert (ended.exit_code, ended.stdout) == (2, "")
    assert message in ended.stderr
    assert "\x1b" not in ended.stderr


@pytest.mark.parametrize("text", [TEXT + "  max_inflight: 5\ncare: 5\n", "a: [", "", TEXT + "  x: ${NONE}\n"])
def test_mistakes_are_named_as_by_check(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")
    ended = scopegate("show", "--config", file, "--set", "gate.rotes=5")
    checked = CliRunner().invoke(
        main, ["check", "--config", str(file), "--set", "gate.rotes=5"], env={"TENANT_HEADER": "X-Tenant"}
    )
    assert (ended.exit_code, ended.stdout) == (2, "")
    assert ended.stderr == checked.stderr
    assert str(file) in ended.stderr


# What is not shown --------------------------------------------------------------------------------------


def test_keys_are_named_and_not_read(file: Path) -> None:
    key = file.parent / "mask.key"
    key.write_bytes(b"s3cret")  # too short for a key, and open to all: `run` would refuse it
    log = (
        "log: {signing_key_file: gone.key, checkpoint_file: c, mask: [/details/a], mask_key_file: mask.key}\n"
    )
    file.write_text(TEXT + log, encoding="utf-8")
    members = shown(file)
    assert members["log.mask_key_file"]["value"] == str(key)
    assert members["log.signing_key_file"]["value"] == str(file.parent / "gone.key")
    assert "s3cret" not in scopegate("show", "--config", file).output


@pytest.mark.parametrize(
    ("url", "masked"),
    [
        ("postgresql://user:s3cret@host/db", "postgresql://user:***@host/db"),
        (
            "postgresql://user:s3cret@host:5432/db?sslmode=require",
            "postgresql://user:***@host:5432/db?sslmode=***",
        ),
        ("postgresql://:s3cret@host/db", "postgresql://:***@host/db"),
        ("postgresql://user:s3/c@r:e@s3cret@host/db", "postgresql://user:***@host/db"),
        # Where the password ends, and whether there is one, nobody can tell.
        ("postgresql://user:s3#c/r?e@s3cret@host/db", "postgresql://***"),
        ("http://host:4318/v1/traces?key=s3c@ret", "http://***"),
        (
            "postgresql://host/db?user=u&password=s3cret&sslmode=",
            "postgresql://host/db?user=***&password=***&sslmode=***",
        ),
        ("http://host:4318/v1/traces?api-key=s3=cret", "http://host:4318/v1/traces?api-key=***"),
        ("http://host/?s3cret&;s3cret#s3cret&x=s3cret", "http://host/?***&;***#***"),
        ("http://host:4318/v1/traces", "http://host:4318/v1/traces"),
        ("postgresql://host/db?sslPassword=s3cret", "postgresql://host/db?sslPassword=***"),
        ("postgresql://user@host:5432/db", "postgresql://user@host:5432/db"),
        ("sqlite:////var/x:y@z.db", "sqlite:////var/x:y@z.db"),
        ("memory://", "memory://"),
        ("host=h password=s3cret", "***"),
        (["s3cret"], "***"),
        (None, None),
    ],
)
def test_of_a_secret_value_only_what_is_no_secret_is_shown(url: Any, masked: Any) -> None:
    assert without_secrets(KEYS["store.url"], url, {}) == masked
    assert without_secrets(KEYS["telemetry.otlp_endpoint"], url, {}) == masked
    assert without_secrets(KEYS["policies"], url, {}) == url


@pytest.mark.parametrize(
    "name",
    [
        "OTLP_TOKEN",
        "COLLECTOR_API_KEY",
        "password",
        "dbPassword",
        "DB_SECRET",
        "A_CREDENTIALS",
        "DB_PASS",
        "X_PW",
        "SIGNKEY",
        "APIKEY_2",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SECRET_VALUE",
        "PRIVATE_KEY",
        "TOKENS1",
        "_CRED_",
        "HTTP_AUTH_HEADER",
        "KEY_FILE_PASSPHRASE",
        "PASSWORD_FILES",
    ],
)
def test_what_a_variable_of_a_secrets_name_brought_is_masked(file: Path, name: str) -> None:
    endpoint = f"telemetry: {{otlp_endpoint: 'http://h/?key=${{{name}}}&x=${{HOME_PAGE:1}}'}}\n"
    file.write_text(TEXT + endpoint, encoding="utf-8")
    member = shown(file, **{name: "s3cret"})["telemetry.otlp_endpoint"]
    assert (member["value"], member["variables"]) == ("***", [name, "HOME_PAGE"])
    ended = scopegate("show", "--config", file, environment={name: "s3cret"})
    assert (ended.exit_code, "s3cret" in ended.output) == (0, False)


def test_a_variable_that_names_a_files_place_is_no_secret(file: Path) -> None:
    file.write_text(
        TEXT + "policies: ${TOKEN_FOLDER}/${KEY_FILE}/${db_pass_dir}/${PW_PATH}\n", encoding="utf-8"
    )
    members = shown(file, TOKEN_FOLDER="/a", KEY_FILE="b", db_pass_dir="c", PW_PATH="d")
    assert members["policies"]["value"] == "/a/b/c/d"


@pytest.mark.parametrize(
    "name", ["HOME_PAGE", "PASSENGERS", "KEYBOARD", "AUTHOR", "DB_FILE", "TENANT_HEADER"]
)
def test_a_variable_of_any_other_name_is_shown(file: Path, name: str) -> None:
    file.write_text(TEXT + f"policies: /${{{name}}}\n", encoding="utf-8")
    assert shown(file, **{name: "seen"})["policies"]["value"] == "/seen"


def test_a_reload_that_is_refused_does_not_tell_what_the_collectors_url_held(file: Path) -> None:
    endpoint = "telemetry: {otlp_endpoint: 'http://h/?api-key=s3cret'}\n"
    given = {"TENANT_HEADER": "X-Tenant"}
    file.write_text(TEXT + endpoint, encoding="utf-8")
    before = load(file, environment=given).settings
    file.write_text(TEXT + endpoint.replace("s3cret", "n3w"), encoding="utf-8")
    (fault,) = unchangeable(before, load(file, environment=given))
    assert str(fault).endswith("restart to change it, or put back the old value")
    assert fault.key == "telemetry.otlp_endpoint"


def test_nothing_that_is_shown_is_obeyed_by_a_terminal(tmp_path: Path) -> None:
    file = tmp_path / "\x1b[31m\u202ec.yaml"
    file.write_text(TEXT, encoding="utf-8")
    for options in ((), ("--json",)):
        ended = scopegate("show", "--config", file, *options)
        assert ended.exit_code == 0
        assert "[31m" in ended.stdout
        assert all(line.isprintable() for line in ended.stdout.splitlines())


# The schema ---------------------------------------------------------------------------------------------


def test_the_schema_is_printed_or_written(tmp_path: Path) -> None:
    printed = scopegate("schema")
    assert (printed.exit_code, printed.stderr) == (0, "")
    output = tmp_path / "scopegate.schema.json"
    output.write_text("an older one")
    written = scopegate("schema", "--output", output)
    assert (written.exit_code, written.output) == (0, "")
    assert output.read_text(encoding="utf-8") == printed.stdout
    made = json.loads(printed.stdout)
    jsonschema_rs.meta.validate(made)
    jsonschema_rs.Draft202012Validator(made).validate(parse(SHIPPED.read_bytes(), "scopegate.yaml").value)


def test_a_schema_that_cannot_be_written_is_a_failure(tmp_path: Path) -> None:
    ended = scopegate("schema", "--output", tmp_path / "gone" / "\x1b[31mx.json")
    assert (ended.exit_code, ended.stdout) == (1, "")
    assert "No such file or directory" in ended.stderr
    assert "\x1b" not in ended.stderr
