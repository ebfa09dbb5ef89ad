"""`scopegate scopes` against the running program: ask for a scope, look at scopes, revoke one."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sidecar.core.shortid import short_id
from tests.acceptance.conftest import (
    EXECUTE,
    Backend,
    Program,
    ask_json,
    execution,
    issue_scope,
    scopegate,
    write_configuration,
)

SCOPE_ID = re.compile(r"scope_[0-9a-f]{24,}")
INTENT = ("--intent", "a test of the command line")


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    with (
        Backend() as backend,
        Program(write_configuration(tmp_path_factory.mktemp("scopes"), backend.address)) as running,
    ):
        yield running


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """Scopes are issued on the admin listener, and belong to tenants."""
    config = write_configuration(
        tmp_path_factory.mktemp("guarded"),
        ("127.0.0.1", 1),
        scopes={"serve_on": "admin"},
        gate={"tenant_header": "X-Tenant"},
    )
    with Program(config) as running:
        yield running


def admin_of(sidecar: Program) -> tuple[str, str]:
    return "--admin", f"{sidecar.admin[0]}:{sidecar.admin[1]}"


def data_of(sidecar: Program) -> tuple[str, str]:
    return "--data", f"{sidecar.data[0]}:{sidecar.data[1]}"


def scopes(sidecar: Program, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command, *others = arguments
    at = data_of(sidecar) if command in ("create", "revoke") else ()
    return scopegate("scopes", command, *admin_of(sidecar), *at, *others)


def lines(ended: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """What it says, by label."""
    assert (ended.returncode, ended.stderr) == (0, ""), ended
    return {line[:10].strip(): line[11:] for line in ended.stdout.splitlines() if line}


def created(sidecar: Program, incident: str, *terms: str) -> str:
    ended = scopes(
        sidecar, "create", "-q", "--incident-id", incident, "--action", "retry_agent", *INTENT, *terms
    )
    assert (ended.returncode, ended.stderr) == (0, ""), ended
    assert SCOPE_ID.fullmatch(ended.stdout.strip()), "nothing but the id, for use in a shell"
    return ended.stdout.strip()


def shown(sidecar: Program, scope_id: str) -> dict[str, Any]:
    ended = scopes(sidecar, "show", scope_id, "--json")
    assert (ended.returncode, ended.stderr) == (0, ""), ended
    scope: dict[str, Any] = json.loads(ended.stdout)
    return scope


def test_a_scope_is_asked_for_with_all_its_terms_and_can_be_spent(sidecar: Program) -> None:
    ended = scopes(
        sidecar,
        *("create", "--incident-id", "inc_123", "--action", "retry_agent", "--action", "restart_agent"),
        *(*INTENT, "--max-attempts", "3", "--ttl", "5m", "--max-cost-usd", "0.25"),
        *("--target-agent", "a", "--target-agent", "b", "--created-by", "an operator"),
    )
    told = lines(ended)
    assert told["status"] == "active"
    assert told["actions"] == "retry_agent, restart_agent"
    assert (told["attempts"], told["cost"]) == ("3 of 3 left", "0.25 of 0.25 USD left")
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ \(in [45] min\)", told["expires"])
    assert (told["agents"], told["by"]) == ("a, b", "an operator")
    assert told["decision"]
    body = {**execution(told["scope"], incident="inc_123"), "target_agents": ["a"]}
    assert ask_json(sidecar.data, "POST", EXECUTE, body).status == 200
    scope = shown(sidecar, told["scope"])
    assert (scope["attempts_used"], scope["max_cost_usd"], scope["max_attempts"]) == (1, 0.25, 3)


def test_what_is_left_out_gets_its_default_and_the_login_name_asks(
    sidecar: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGNAME", "somebody")
    scope = shown(sidecar, created(sidecar, "inc_default"))
    assert (scope["max_attempts"], scope["max_cost_usd"]) == (1, 0.5)
    assert (scope["created_by"], scope["tenant_id"]) == ("somebody", "default")


def test_a_grant_as_json_is_one_document(sidecar: Program) -> None:
    ended = scopes(sidecar, "create", "--json", "--incident-id", "inc_j", "--action", "retry_agent", *INTENT)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert json.loads(ended.stdout)["status"] == "active"


def test_a_refusal_says_why_and_under_which_decision_and_exits_1(sidecar: Program) -> None:
    asked = ("create", "--incident-id", "inc_123", "--action", "unheard_of", *INTENT)
    ended = scopes(sidecar, *asked)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert "scopegate: policy_denied: " in ended.stderr
    assert re.search(r"^decision_id +[0-9a-f-]{36}$", ended.stderr, re.MULTILINE)
    ended = scopes(
        sidecar, "create", "--incident-id", "i", "--action", "retry_agent", *INTENT, "--max-attempts", "99"
    )
    assert (ended.returncode, ended.stdout) == (1, "")
    assert "invalid_scope: max_attempts must be from 1 to 10" in ended.stderr
    assert re.search(r"^member +max_attempts$", ended.stderr, re.MULTILINE)
    as_json = scopes(sidecar, *asked, "--json")
    assert (as_json.returncode, json.loads(as_json.stdout)["error"]) == (1, "policy_denied")


def test_a_scope_that_could_never_be_spent_says_the_least_ceiling(sidecar: Program) -> None:
    asked = ("create", "--incident-id", "inc_123", "--action", "retry_agent", *INTENT, "--max-cost-usd")
    ended = scopes(sidecar, *asked, "0.009")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert "invalid_scope: max_cost_usd must be at least 0.01, because" in ended.stderr
    assert re.search(r"^min_cost_usd +0\.01$", ended.stderr, re.MULTILINE)
    assert scopes(sidecar, *asked, "0.01").returncode == 0


@pytest.mark.parametrize(
    "terms",
    [
        ("--ttl", "soon"),
        ("--ttl", "-5"),
        ("--ttl", "1.5h"),
        ("--ttl", "1h30m"),
        ("--max-cost-usd", "nan"),
        ("--max-cost-usd", "-1"),
        ("--max-cost-usd", "1e99"),
        ("--max-attempts", "x"),
    ],
)
def test_wrong_terms_are_wrong_usage(sidecar: Program, terms: tuple[str, str]) -> None:
    ended = scopes(sidecar, "create", "--incident-id", "i", "--action", "retry_agent", *INTENT, *terms)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert terms[0] in ended.stderr


def test_scopes_are_listed_newest_first_with_short_ids_and_whole_ones_as_json(sidecar: Program) -> None:
    ids = [created(sidecar, "inc_list", "--max-attempts", "2") for _ in range(3)]
    assert scopes(sidecar, "revoke", ids[1]).returncode == 0
    ended = scopes(sidecar, "list", "--incident-id", "inc_list")
    assert (ended.returncode, ended.stderr) == (0, "")
    head, *rows = ended.stdout.splitlines()
    heads = "SCOPE STATUS INCIDENT ACTIONS ATTEMPTS COST USD CREATED EXPIRES BY INTENT"
    assert " ".join(head.split()) == heads
    assert [row.split()[:3] for row in rows] == [
        [short_id(ids[2]), "active", "inc_list"],
        [short_id(ids[1]), "revoked", "inc_list"],
        [short_id(ids[0]), "active", "inc_list"],
    ]
    assert "0/2" in rows[0]
    assert rows[0].endswith("a test of the command line")
    active = scopes(sidecar, "list", "--incident-id", "inc_list", "--status", "active", "--json")
    assert [scope["scope_id"] for scope in json.loads(active.stdout)["scopes"]] == [ids[2], ids[0]]


def test_a_list_that_is_cut_says_how_to_go_on(sidecar: Program) -> None:
    ids = [created(sidecar, "inc_pages") for _ in range(3)]
    ended = scopes(sidecar, "list", "--incident-id", "inc_pages", "--limit", "2")
    assert [row.split()[0] for row in ended.stdout.splitlines()[1:]] == [short_id(ids[2]), short_id(ids[1])]
    more = re.search(r"--before (\d+)$", ended.stderr)
    assert more, ended.stderr
    rest = scopes(sidecar, "list", "--incident-id", "inc_pages", "--before", more[1], "--json")
    document = json.loads(rest.stdout)
    assert [scope["scope_id"] for scope in document["scopes"]] == ids[:1]
    assert document["next"] is None


def test_an_empty_list_says_so_where_programs_do_not_read(sidecar: Program) -> None:
    ended = scopes(sidecar, "list", "--incident-id", "inc_none")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "There is no such scope.\n")
    ended = scopes(sidecar, "list", "--incident-id", "inc_none", "--json")
    assert (ended.returncode, json.loads(ended.stdout)) == (0, {"scopes": [], "next": None})


def test_a_scope_is_shown_with_what_is_left_and_what_it_admitted(sidecar: Program) -> None:
    scope_id = issue_scope(sidecar.data, incident="inc_show", attempts=3)
    answer = ask_json(sidecar.data, "POST", EXECUTE, execution(scope_id, incident="inc_show"))
    ended = scopes(sidecar, "show", scope_id)
    told = lines(ended)
    assert told["attempts"] == "2 of 3 left"
    assert told["cost"] == "0.499 of 0.5 USD left"
    (decision_id,) = answer.headers("Scopegate-Decision-Id")
    (row,) = [line for line in ended.stdout.splitlines() if line.startswith(decision_id)]
    assert "answered" in row
    fresh = scopes(sidecar, "show", created(sidecar, "inc_show"))
    assert (fresh.returncode, fresh.stderr) == (0, "It has admitted nothing.\n")


def test_revoking_says_what_was_revoked_and_can_be_repeated(sidecar: Program) -> None:
    scope_id = created(sidecar, "inc_revoke")
    for _ in range(2):
        told = lines(scopes(sidecar, "revoke", scope_id))
        assert (told["revoked"], told["status"], told["incident"]) == (
            short_id(scope_id),
            "revoked",
            "inc_revoke",
        )
        assert told["intent"] == "a test of the command line"
    refused = ask_json(sidecar.data, "POST", EXECUTE, execution(scope_id, incident="inc_revoke"))
    assert refused.json()["error"] == "scope_revoked"
    as_json = scopes(sidecar, "revoke", scope_id, "--json")
    assert json.loads(as_json.stdout)["data"] == {"scope_id": scope_id, "status": "revoked"}


@pytest.mark.parametrize("command", ["show", "revoke"])
def test_what_is_not_there_exits_1(sidecar: Program, command: str) -> None:
    ended = scopes(sidecar, command, "scope_unknown")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert "scopegate: scope_not_found: " in ended.stderr
    ended = scopes(sidecar, command, "../status")
    assert (ended.returncode, ended.stdout) == (2, "")


def test_where_the_admin_listener_issues_scopes_it_is_asked(guarded: Program) -> None:
    at = (*admin_of(guarded), "--config", guarded.config)
    asked = ("--incident-id", "inc_t", "--action", "retry_agent", *INTENT)
    ended = scopegate("scopes", "create", "-q", *at, "--tenant", "acme", *asked)
    assert (ended.returncode, ended.stderr) == (0, ""), ended
    scope_id = ended.stdout.strip()
    other = scopegate("scopes", "create", "-q", *at, "--tenant", "Zo\u00eb", *asked).stdout.strip()
    assert shown(guarded, scope_id)["tenant_id"] == "acme"
    listed = scopes(guarded, "list", "--incident-id", "inc_t")
    assert [row.split()[0] for row in listed.stdout.splitlines()[1:]] == [
        short_id(other),
        short_id(scope_id),
    ]
    assert "TENANT" in listed.stdout.splitlines()[0]
    own = scopes(guarded, "list", "--tenant", "acme", "--json")
    assert [scope["scope_id"] for scope in json.loads(own.stdout)["scopes"]] == [scope_id]
    assert scopegate("scopes", "revoke", *at, "--tenant", "Zo\u00eb", scope_id).returncode == 1
    assert scopegate("scopes", "revoke", *at, "--tenant", "acme", scope_id).returncode == 0
    assert shown(guarded, scope_id)["status"] == "revoked"
    without = scopegate("scopes", "create", *at, *asked)
    assert (without.returncode, without.stdout) == (2, "")
    assert "name it with --tenant" in without.stderr


def test_what_others_wrote_moves_no_cursor(sidecar: Program) -> None:
    intent = "\x1b[2Jgone \x9b31m \u202eback\nnext line"
    body = {"incident_id": "inc_esc", "action": "retry_agent", "intent": intent}
    answer = ask_json(sidecar.data, "POST", "/api/v1/recovery/scope", body)
    assert answer.status == 201
    scope_id = answer.json()["scope_id"]
    for ended in (
        scopes(sidecar, "show", scope_id),
        scopes(sidecar, "list", "--incident-id", "inc_esc"),
        scopes(sidecar, "list", "--incident-id", "inc_esc", "--json"),
        scopes(sidecar, "revoke", scope_id),
    ):
        assert ended.returncode == 0, ended
        assert "gone" in ended.stdout
        assert ended.stdout.replace("\n", "").isprintable(), ended.stdout
    assert "\\x1b[2Jgone \\x9b31m \\u202eback\\nnext line" in scopes(sidecar, "show", scope_id).stdout
