"""`scopegate auth`: tokens are made, listed and revoked, and a running sidecar takes them as they are."""

from __future__ import annotations

import json
import re
import stat
import time
from pathlib import Path

import pytest

from tests.acceptance.conftest import Program, scopegate, write_configuration

AUTH = {"auth": {"required": True, "tokens": {"file": "tokens.yaml"}}}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_configuration(tmp_path, ("127.0.0.1", 1), **AUTH)


def test_a_token_is_printed_once_and_only_its_digest_is_kept(config: Path) -> None:
    made = scopegate(
        "auth", "token", "ci", "--kind", "agent", "--group", "a", "--group", "b", "--config", config
    )
    assert made.returncode == 0, made.stderr
    secret = made.stdout.strip()
    assert re.fullmatch("sg_[0-9A-Za-z]{43}", secret)
    assert "ci, an agent of tenant default" in made.stderr
    assert "valid      until it is revoked" in made.stderr
    file = config.parent / "tokens.yaml"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert secret[3:] not in file.read_text() + made.stderr
    listed = json.loads(scopegate("auth", "list", "--json", "--config", config).stdout)["tokens"]
    assert [(one["name"], one["kind"], one["groups"], one["tenant_id"], one["state"]) for one in listed] == [
        ("ci", "agent", ["a", "b"], "default", "valid")
    ]
    assert set(listed[0]) == {
        *("name", "kind", "groups", "tenant_id", "sha256", "created_at", "not_after", "state")
    }


def test_a_token_can_go_to_a_file_that_only_its_owner_reads_and_never_replaces_one(config: Path) -> None:
    output = config.parent / "ci.token"
    made = scopegate("auth", "token", "ci", "--output", output, "--config", config)
    assert (made.returncode, made.stdout) == (0, "")
    assert stat.S_IMODE(output.stat().st_mode) == 0o600
    text = output.read_text()
    again = scopegate("auth", "token", "ci", "--output", output, "--config", config)
    assert again.returncode == 1
    assert "File exists; nothing was changed" in again.stderr
    assert output.read_text() == text
    assert len(json.loads(scopegate("auth", "list", "--json", "--config", config).stdout)["tokens"]) == 1


def test_tokens_are_revoked_by_name_and_by_age(config: Path) -> None:
    for name in ("ci", "ci", "anna"):
        assert scopegate("auth", "token", name, "--config", config).returncode == 0
    young = scopegate("auth", "revoke", "ci", "--older-than", "1h", "--config", config)
    assert (young.returncode, "ci has 2 tokens, but none is that old" in young.stderr) == (1, True)
    unknown = scopegate("auth", "revoke", "anne", "--config", config)
    assert (unknown.returncode, 'did you mean "anna"?' in unknown.stderr) == (1, True)
    ended = scopegate("auth", "revoke", "ci", "--config", config)
    assert (ended.returncode, ended.stdout.startswith("Revoked 2 of 2 tokens of ci.")) == (0, True)
    left = scopegate("auth", "list", "--config", config).stdout
    assert "anna" in left
    assert "ci " not in left


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("ci", "--kind", "robot"), "'robot' is not one of 'human', 'service', 'agent'"),
        (("ci", "--expires", "soon"), "is not a number of seconds, nor a duration such as 10s, 5m, 2h or 1d"),
        (("ci", "--expires", "5s"), "is not from 60 to"),
        (("anonymous",), "is the caller without a credential"),
        (("a\tb",), "must be 1 to 256 printable characters"),
        (("ci", "--group", ""), "must be 1 to 256 printable characters"),
    ],
)
def test_a_token_that_no_caller_could_use_is_not_made(
    config: Path, arguments: tuple[str, ...], said: str
) -> None:
    ended = scopegate("auth", "token", *arguments, "--config", config)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert said in " ".join(ended.stderr.split())
    assert not (config.parent / "tokens.yaml").exists()


def test_without_a_file_of_tokens_in_the_configuration_it_says_how_to_name_one(tmp_path: Path) -> None:
    config = write_configuration(tmp_path, ("127.0.0.1", 1))
    ended = scopegate("auth", "token", "ci", "--config", config)
    assert ended.returncode == 2
    assert "auth.tokens.file is not set; name the file of tokens there, for example" in ended.stderr


def test_a_start_without_the_file_says_what_makes_it(config: Path) -> None:
    ended = scopegate("check", "--config", config)
    assert ended.returncode == 2
    assert (
        "tokens.yaml: cannot be read (No such file or directory); `scopegate auth token NAME` makes it"
        in (ended.stderr)
    )


def test_a_running_sidecar_takes_a_new_token_and_refuses_a_revoked_one(config: Path) -> None:
    policies = config.parent / "policies" / "roles.yaml"
    policies.write_text("roles: {observer: {groups: [seers]}}\n")
    first, second = config.parent / "first", config.parent / "second"
    made = ("auth", "token", "seer", "--group", "seers", "--config", config)
    assert scopegate(*made, "--output", first).returncode == 0
    with Program(config) as program:
        at = ("status", "--admin", "{}:{}".format(*program.admin))
        assert scopegate(*at).returncode == 1
        assert scopegate(*at, "--token-file", first).returncode == 0
        assert scopegate(*made, "--output", second).returncode == 0
        ends = time.monotonic() + 10
        while scopegate(*at, "--token-file", second).returncode != 0:
            assert time.monotonic() < ends
        assert scopegate("auth", "revoke", "seer", "--config", config).returncode == 0
        while scopegate(*at, "--token-file", second).returncode == 0:
            assert time.monotonic() < ends


def test_a_new_token_is_what_the_table_of_principals_says_unless_an_option_says_otherwise(
    tmp_path: Path,
) -> None:
    (tmp_path / "principals.yaml").write_text(
        'principals: {"bot:agent-*": {kind: agent, groups: [bots], tenant_id: blue}}\n'
    )
    tokens = {"file": "tokens.yaml", "id_prefix": "bot:"}
    auth = {"required": True, "tokens": tokens, "principals": "principals.yaml"}
    config = write_configuration(tmp_path, ("127.0.0.1", 1), auth=auth)
    as_known = scopegate("auth", "token", "agent-7", "--config", config)
    assert "agent-7, an agent of tenant blue" in as_known.stderr
    scopegate("auth", "token", "agent-8", "--kind", "human", "--group", "oncall", "--config", config)
    scopegate("auth", "token", "ci", "--config", config)
    listed = json.loads(scopegate("auth", "list", "--json", "--config", config).stdout)["tokens"]
    assert [(one["name"], one["kind"], one["groups"], one["tenant_id"]) for one in listed] == [
        ("agent-7", "agent", ["bots"], "blue"),
        ("agent-8", "human", ["oncall"], "blue"),
        ("ci", "service", [], "default"),
    ]
