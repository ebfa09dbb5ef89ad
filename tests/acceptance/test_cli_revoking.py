"""`scopegate scopes revoke --all`, and commands whose two addresses are of different sidecars."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.acceptance.conftest import (
    EXECUTE,
    PROJECT,
    Address,
    Backend,
    Program,
    ask,
    ask_json,
    execution,
    executions,
    issue_many,
    issue_scope,
    scopegate,
    write_configuration,
)
from tests.support import unused_port

pytestmark = pytest.mark.slow

Ended = subprocess.CompletedProcess[str]
DIFFERENT = "are of different sidecars"
REVOKE_ALL = (sys.executable, "-m", "sidecar", "scopes", "revoke", "--all")
ASKED = ("--incident-id", "inc-1", "--action", "retry_agent", "--intent", "why")


@pytest.fixture(scope="module")
def backend() -> Iterator[Backend]:
    with Backend() as running:
        yield running


@pytest.fixture
def sidecar(tmp_path: Path, backend: Backend) -> Iterator[Program]:
    config = write_configuration(tmp_path, backend.address, upstream={"response_timeout_seconds": 0.4})
    with Program(config) as running:
        yield running


@pytest.fixture
def other(tmp_path: Path, backend: Backend) -> Iterator[Program]:
    """A second sidecar with a store of its own."""
    with Program(write_configuration(tmp_path / "other", backend.address)) as running:
        yield running


def at(address: Address) -> str:
    return f"{address[0]}:{address[1]}"


def revoke(sidecar: Program, *arguments: str, data: Program | None = None) -> Ended:
    issues = (data or sidecar).data
    return scopegate("scopes", "revoke", "--admin", at(sidecar.admin), "--data", at(issues), *arguments)


def spend(sidecar: Program, scope_id: str, incident: str = "inc-1") -> str:
    """What the execution is refused with; empty where it is let through."""
    answer = ask_json(sidecar.data, "POST", EXECUTE, execution(scope_id, incident=incident))
    return str(answer.json().get("error", ""))


def test_all_scopes_that_are_not_over_are_revoked_of_every_incident(sidecar: Program) -> None:
    ids = [issue_scope(sidecar.data, incident=f"inc-{number}") for number in range(3)]
    assert revoke(sidecar, ids[0]).returncode == 0
    ended = revoke(sidecar, "--all", "--yes")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "2 scopes revoked\n", "")
    assert [spend(sidecar, one, f"inc-{n}") for n, one in enumerate(ids)] == ["scope_revoked"] * 3
    again = revoke(sidecar, "--all", "--yes")
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "There is no scope to revoke.\n")


def test_an_exhausted_scope_does_not_come_to_life_again_once_all_are_revoked(
    sidecar: Program, backend: Backend
) -> None:
    scope_id = issue_scope(sidecar.data)
    backend.go_on.clear()
    try:
        assert spend(sidecar, scope_id) == "upstream_timeout"
    finally:
        backend.go_on.set()
    ended = revoke(sidecar, "--all", "--yes", "--json")
    assert (ended.returncode, json.loads(ended.stdout)) == (0, {"revoked": [scope_id]}), ended
    (unknown,) = executions(sidecar.admin, "unknown")
    reconciled = scopegate(
        *("executions", "reconcile", unknown["decision_id"], "--admin", at(sidecar.admin)),
        *("--outcome", "not_executed", "--reason", "it was never sent"),
    )
    assert reconciled.returncode == 0, reconciled
    assert spend(sidecar, scope_id) == "scope_revoked"
    # It was exhausted when it was revoked, and is not taken for one that stands.
    assert json.loads(revoke(sidecar, "--all", "--yes", "--json").stdout) == {"revoked": []}


def test_with_an_incident_only_its_scopes_are_revoked(sidecar: Program) -> None:
    mine, theirs = (issue_scope(sidecar.data, incident=incident) for incident in ("inc-1", "inc-2"))
    ended = revoke(sidecar, "--all", "--yes", "--incident-id", "inc-1", "--json")
    assert json.loads(ended.stdout) == {"revoked": [mine]}
    assert spend(sidecar, theirs, "inc-2") == ""


def test_more_than_a_page_is_revoked_whole(sidecar: Program) -> None:
    ids = {*issue_many(sidecar.data, 1_050)}
    ended = _until_it_ends(sidecar)
    assert set(json.loads(ended.stdout)["revoked"]) == ids


def _until_it_ends(sidecar: Program) -> Ended:
    return subprocess.run(
        [*REVOKE_ALL, "--yes", "--json", "--admin", at(sidecar.admin), "--data", at(sidecar.data)],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )


def test_what_is_issued_meanwhile_is_revoked_as_well(sidecar: Program) -> None:
    first = {issue_scope(sidecar.data) for _ in range(40)}
    later: set[str] = set()

    def issue() -> None:
        # From when the first is gone.
        while not ask(sidecar.admin, "GET", "/api/v1/scopes?status=revoked").json()["scopes"]:
            time.sleep(0.005)
        later.update(issue_scope(sidecar.data, incident="inc-later") for _ in range(5))

    issuing = threading.Thread(target=issue)
    issuing.start()
    revoked = set(json.loads(_until_it_ends(sidecar).stdout)["revoked"])
    issuing.join()
    assert len(later) == 5
    assert revoked == first | later


def test_scopes_of_every_tenant_are_revoked_each_in_its_name(tmp_path: Path, backend: Backend) -> None:
    config = write_configuration(tmp_path, backend.address, gate={"tenant_header": "X-Tenant"})
    with Program(config) as sidecar:
        where = ("--config", config, "--admin", at(sidecar.admin), "--data", at(sidecar.data))
        ids = []
        for tenant in ("acme", "Zo\u00eb"):
            made = scopegate("scopes", "create", "-q", *where, *ASKED, "--tenant", tenant)
            assert made.returncode == 0, made
            ids.append(made.stdout.strip())
        blind = revoke(sidecar, "--all", "--yes", "--json")
        assert (blind.returncode, json.loads(blind.stdout)) == (1, {"revoked": []})
        assert "2 scopes not revoked" in blind.stderr
        assert all(one[:14] in blind.stderr for one in ids)
        one = scopegate("scopes", "revoke", "--all", "--yes", "--json", *where, "--tenant", "acme")
        assert json.loads(one.stdout) == {"revoked": ids[:1]}
        rest = scopegate("scopes", "revoke", "--all", "--yes", "--json", *where)
        assert json.loads(rest.stdout) == {"revoked": ids[1:]}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "give SCOPE_ID, or --all"),
        (("--all", "scope_1"), "give SCOPE_ID, or --all"),
        (("--all",), "give --yes with --all"),
        (("--yes", "scope_1"), "go with --all"),
    ],
)
def test_whoever_does_not_say_what_to_revoke_revokes_nothing(
    sidecar: Program, arguments: tuple[str, ...], said: str
) -> None:
    scope_id = issue_scope(sidecar.data)
    ended = subprocess.run(
        [sys.executable, "-m", "sidecar", "scopes", "revoke", "--admin", at(sidecar.admin), *arguments],
        cwd=PROJECT,
        capture_output=True,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=20,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert said in ended.stderr
    assert spend(sidecar, scope_id) == ""


@pytest.mark.parametrize(("said", "code", "then"), [("n", 1, ""), ("y", 0, "scope_revoked")])
def test_on_a_terminal_it_asks_first_with_their_number(
    sidecar: Program, said: str, code: int, then: str
) -> None:
    scope_id = issue_scope(sidecar.data)
    ours, theirs = pty.openpty()
    try:
        os.write(ours, f"{said}\n".encode())
        ended = subprocess.run(
            [*REVOKE_ALL, "--admin", at(sidecar.admin), "--data", at(sidecar.data)],
            cwd=PROJECT,
            stdin=theirs,
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    finally:
        os.close(ours)
        os.close(theirs)
    assert ended.returncode == code, ended
    assert f"Revoke 1 scope of 1 incident at {at(sidecar.data)}?" in ended.stderr
    assert spend(sidecar, scope_id) == then


# Two addresses, two sidecars --------------------------------------------------------------------------------


def active(sidecar: Program) -> list[str]:
    listed = ask(sidecar.admin, "GET", "/api/v1/scopes?status=active").json()["scopes"]
    return [scope["scope_id"] for scope in listed]


@pytest.mark.parametrize("command", ["create", "revoke"])
def test_with_an_admin_address_alone_nobody_guesses_where_data_is(sidecar: Program, command: str) -> None:
    scope_id = issue_scope(sidecar.data)
    asked = ASKED if command == "create" else (scope_id,)
    ended = scopegate("scopes", command, "--admin", at(sidecar.admin), *asked)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "give its address with --data" in ended.stderr
    assert active(sidecar) == [scope_id]


def test_a_scope_that_was_made_on_another_sidecar_is_revoked_again(sidecar: Program, other: Program) -> None:
    ended = scopegate(
        *("scopes", "create", "--admin", at(sidecar.admin), "--data", at(other.data), *ASKED),
    )
    assert (ended.returncode, ended.stdout) == (1, "")
    assert DIFFERENT in ended.stderr
    assert "was revoked again" in ended.stderr
    made = ask(other.admin, "GET", "/api/v1/scopes").json()["scopes"]
    assert [scope["status"] for scope in made] == ["revoked"]
    assert ask(sidecar.admin, "GET", "/api/v1/scopes").json()["scopes"] == []


def test_a_scope_is_not_said_to_be_revoked_where_another_sidecar_was_asked(
    sidecar: Program, other: Program
) -> None:
    scope_id = issue_scope(sidecar.data)
    for arguments in ((scope_id,), ("--all", "--yes")):
        ended = revoke(sidecar, *arguments, data=other)
        assert ended.returncode == 1
        assert DIFFERENT in ended.stderr
        assert scope_id[:14] in ended.stderr
    assert active(sidecar) == [scope_id]
    # One that the admin listener does not know is not looked for elsewhere.
    theirs = issue_scope(other.data)
    ended = revoke(sidecar, theirs, data=other)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert "scope_not_found" in ended.stderr
    assert active(other) == [theirs]


def test_a_copy_that_has_the_same_scopes_is_no_proof_either(
    tmp_path: Path, sidecar: Program, backend: Backend
) -> None:
    scope_id = issue_scope(sidecar.data)
    copied = write_configuration(tmp_path / "copy", backend.address)
    made = scopegate("store", "backup", tmp_path / "copy" / "copied.db", "--config", sidecar.config)
    assert made.returncode == 0, made
    (tmp_path / "copy" / "var").mkdir()
    (tmp_path / "copy" / "copied.db").rename(tmp_path / "copy" / "var" / "scopegate.db")
    with Program(copied) as copy:
        ended = revoke(sidecar, scope_id, data=copy)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert DIFFERENT in ended.stderr
    assert active(sidecar) == [scope_id]


def test_the_configuration_says_where_data_is(tmp_path: Path, backend: Backend) -> None:
    listens = {name: {"listen": f"127.0.0.1:{unused_port()}"} for name in ("data", "admin")}
    listens["data"]["listen"] = listens["data"]["listen"].replace("127.0.0.1", "0.0.0.0")
    config = write_configuration(tmp_path, backend.address, **listens)
    with Program(config):
        made = scopegate("scopes", "create", "-q", "--config", config, *ASKED)
        assert (made.returncode, made.stderr) == (0, ""), made
        gone = scopegate("scopes", "revoke", "--config", config, made.stdout.strip())
        assert (gone.returncode, gone.stderr) == (0, ""), gone
