"""`scopegate explain` against the running program: what it says, what it costs (nothing), and how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from sidecar.core.shortid import short_id
from tests.acceptance.conftest import (
    EXECUTE,
    PROJECT,
    START_SECONDS,
    Address,
    Backend,
    Program,
    ask,
    ask_json,
    execution,
    issue_scope,
    scope_of,
    scopegate,
    write_configuration,
)
from tests.support import unused_port

RULES = """
rules:
  - id: storm-brake
    on: execute
    match: {action: retry_agent}
    brake: {per: [incident_id, action], max_attempts: 2, window_seconds: 3600}
    reason: Twice is enough.
  - id: no-restart
    on: execute
    match: {action: restart_agent}
    effect: deny
    mode: shadow
    reason: Not on a Friday.
"""


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    folder = tmp_path_factory.mktemp("explain")
    with Backend() as backend:
        config = write_configuration(folder, backend.address)
        (folder / "policies" / "rules.yaml").write_text(RULES)
        with Program(config) as running:
            yield running


def explain(admin: Address, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return scopegate("explain", "--admin", f"{admin[0]}:{admin[1]}", *arguments)


def lines(ended: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """What it says, by label."""
    assert ended.stderr == "", ended
    told: dict[str, str] = {}
    label = ""
    for line in ended.stdout.splitlines():
        label = line[:10].strip() or label
        told[label] = line[11:]
    return told


def test_what_would_be_allowed_exits_0_and_consumes_nothing(sidecar: Program) -> None:
    scope = issue_scope(sidecar.data, incident="inc-free", attempts=3)
    for _ in range(3):
        ended = explain(sidecar.admin, json.dumps(execution(scope, incident="inc-free")))
        assert ended.returncode == 0, ended
    told = lines(ended)
    assert told["allowed"]
    assert told["scope"] == f"{short_id(scope)} for inc-free, active"
    assert told["left"].startswith("3 attempts, 0.5 USD, ")
    assert told["hold"] == "0.01 USD until the cost is known"
    assert told["brakes"] == "storm-brake (incident_id inc-free, action retry_agent): 0 of 2 used in 3600 s"
    assert told["policies"].startswith("revision ")
    assert scope_of(sidecar.data, scope, incident="inc-free")["attempts_used"] == 0


def test_what_would_be_refused_exits_1_with_the_reason_and_what_to_do(sidecar: Program) -> None:
    ended = explain(sidecar.admin, "--action", "retry_agent", "--incident-id", "inc-1")
    assert ended.returncode == 1, ended
    told = lines(ended)
    assert told["refused"].startswith("scoped_execution_required: ")
    assert told["next"].startswith("Ask for a scope")


def test_a_brake_that_holds_says_which_rule_and_until_when(sidecar: Program) -> None:
    scope = issue_scope(sidecar.data, incident="inc-storm", attempts=3)
    body = execution(scope, incident="inc-storm")
    for _ in range(2):
        assert ask_json(sidecar.data, "POST", EXECUTE, body).status == 200
    ended = explain(
        sidecar.admin, "--action", "retry_agent", "--incident-id", "inc-storm", "--scope-id", scope
    )
    assert ended.returncode == 1, ended
    told = lines(ended)
    assert told["refused"].startswith("braked: ")
    assert "Twice is enough." in told["refused"]
    assert told["rules"] == "storm-brake"
    assert told["left"].startswith("1 attempt, ")
    assert "2 of 2 used in 3600 s; holds until 20" in told["brakes"]


def test_a_bound_of_the_scope_is_named(sidecar: Program) -> None:
    scope = issue_scope(sidecar.data, incident="inc-used")
    body = execution(scope, incident="inc-used")
    assert ask_json(sidecar.data, "POST", EXECUTE, body).status == 200
    told = lines(explain(sidecar.admin, json.dumps(body)))
    assert told["refused"].startswith("scope_exhausted: ")
    assert told["bound"] == "max_attempts"
    assert told["left"] == "0 attempts, 0 USD, 0 s"


def test_what_shadow_rules_would_refuse_is_told(sidecar: Program) -> None:
    answer = ask_json(
        sidecar.data,
        "POST",
        "/api/v1/recovery/scope",
        {"incident_id": "inc-1", "action": "restart_agent", "intent": "a test"},
    )
    body = {"scope_id": answer.json()["scope_id"], "incident_id": "inc-1", "action": "restart_agent"}
    ended = explain(sidecar.admin, json.dumps(body))
    assert ended.returncode == 0, ended
    assert lines(ended)["in shadow"].startswith("no-restart: policy_denied: The rule denies it.")


# Several routes, several tenants ------------------------------------------------------------------------

OBSERVED = """
rules:
  - id: watched
    on: execute
    brake:
      per: [incident_id, action, tenant_id, principal, target_agents]
      max_attempts: 1
      window_seconds: 3600
    mode: shadow
"""
ROUTES = [
    {"path": "/pilot/run", "mode": "shadow"},
    {"path": "**/recovery/execute"},
    {"path": "/v2/{incident}/run", "action": "/what"},
]


@pytest.fixture(scope="module")
def tenants(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """A sidecar that several tenants share, with several routes."""
    folder = tmp_path_factory.mktemp("tenants")
    with Backend() as backend:
        config = write_configuration(
            folder, backend.address, gate={"routes": ROUTES, "tenant_header": "X-Tenant"}
        )
        (folder / "policies" / "rules.yaml").write_text(OBSERVED)
        with Program(config) as running:
            yield running


def of_a_tenant(sidecar: Program, *arguments: str) -> subprocess.CompletedProcess[str]:
    return explain(sidecar.admin, "--config", sidecar.config, *arguments)


def test_a_route_is_chosen_by_its_path_and_the_answer_names_the_one_that_judged(tenants: Program) -> None:
    asked = ("--tenant", "acme", "--action", "retry_agent", "--incident-id", "inc-1")
    ended = of_a_tenant(tenants, *asked)
    assert (ended.returncode, lines(ended)["route"]) == (1, "**/recovery/execute")
    ended = of_a_tenant(tenants, "--route", "/v2/{incident}/run", *asked)
    assert (ended.returncode, lines(ended)["route"]) == (1, "/v2/{incident}/run")
    ended = of_a_tenant(tenants, "--route", "/pilot/run", *asked)
    assert (ended.returncode, lines(ended)["route"]) == (0, "/pilot/run")
    assert lines(ended)["in shadow"].strip().startswith("(route): scoped_execution_required: ")


def test_a_route_that_is_none_exits_2_and_names_those_that_are(tenants: Program) -> None:
    ended = of_a_tenant(tenants, "--tenant", "acme", "--route", "/nowhere?&\udcff", "--action", "retry_agent")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "route must be one of /pilot/run, **/recovery/execute, /v2/{incident}/run." in ended.stderr


def test_an_execution_is_explained_to_the_tenant_whose_it_is(tenants: Program) -> None:
    body = json.dumps({"incident_id": "inc-1", "action": "retry_agent", "intent": "a test"}).encode()
    name = [("Content-Type", "application/json"), ("X-Tenant", "Zo\u00eb".encode().decode("latin-1"))]
    granted = ask(tenants.data, "POST", "/api/v1/recovery/scope", name, body)
    assert granted.status == 201, granted
    asked = json.dumps(execution(granted.json()["scope_id"]))
    ended = of_a_tenant(tenants, "--tenant", "Zo\u00eb", asked)
    assert ended.returncode == 0, ended
    told = lines(ended)
    assert told["brakes"] == (
        "watched (incident_id inc-1, action retry_agent, tenant_id Zo\u00eb, principal anonymous, "
        "target_agents none), in shadow: 0 of 1 used in 3600 s"
    )
    assert "None" not in ended.stdout
    told = lines(of_a_tenant(tenants, "--tenant", "other", asked))
    assert told["refused"].startswith("scope_not_found: ")


def test_without_its_tenant_nothing_is_asked(sidecar: Program, tenants: Program) -> None:
    body = json.dumps(execution("scope_unknown"))
    for ended, said in (
        (of_a_tenant(tenants, body), "gate.tenant_header is X-Tenant"),
        (of_a_tenant(tenants, "--tenant", "a\nb", body), "printable"),
        (explain(tenants.admin, "--tenant", "acme", body), "--config FILE"),
        (of_a_tenant(sidecar, "--tenant", "acme", body), "has no gate.tenant_header"),
    ):
        assert (ended.returncode, ended.stdout) == (2, ""), ended
        assert said in ended.stderr, ended


def test_a_body_comes_from_a_file_or_from_standard_input(sidecar: Program, tmp_path: Path) -> None:
    body = json.dumps(execution("scope_unknown"))
    (tmp_path / "body.json").write_text(body)
    from_file = explain(sidecar.admin, tmp_path / "body.json")
    piped = subprocess.run(
        [sys.executable, "-m", "sidecar", "explain", "--admin", "http://{}:{}/".format(*sidecar.admin), "-"],
        cwd=PROJECT,
        input=body,
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
        check=False,
    )
    for ended in (from_file, piped):
        assert ended.returncode == 1, ended
        assert lines(ended)["refused"].startswith("scope_not_found: ")


def test_the_answer_as_it_is(sidecar: Program) -> None:
    ended = explain(sidecar.admin, "--json", json.dumps(execution("scope_unknown")))
    assert ended.returncode == 1, ended
    answer = json.loads(ended.stdout)
    assert (answer["allowed"], answer["error"]) == (False, "scope_not_found")


def test_the_address_comes_from_the_configuration(sidecar: Program) -> None:
    listen = f"admin.listen={sidecar.admin[0]}:{sidecar.admin[1]}"
    asked = ("--set", listen, "--action", "retry_agent", "--incident-id", "i")
    ended = scopegate("explain", "--config", sidecar.config, *asked)
    assert ended.returncode == 1, ended
    # Which port 0 became is not in the configuration.
    ended = scopegate("explain", "--config", sidecar.config, "--action", "retry_agent")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "name the real one with --admin" in ended.stderr


def test_where_nobody_listens_it_exits_3_and_names_the_address() -> None:
    address = ("127.0.0.1", unused_port())
    ended = explain(address, "--action", "retry_agent")
    assert (ended.returncode, ended.stdout) == (3, "")
    assert f"no sidecar answers on 127.0.0.1:{address[1]} (" in ended.stderr
    assert "is it running" in ended.stderr


@contextmanager
def something_else(status: int, body: bytes) -> Iterator[Address]:
    """A listener that is no sidecar's."""

    class Answering(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Answering) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield ("127.0.0.1", server.server_port)
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (200, b"<html>", "200, and not as a sidecar would"),
        (200, b'{"allowed": "yes"}', "200, and not as a sidecar would"),
        (404, b'{"error": "not_found", "message": "Nothing is served under this path."}', "404: Nothing is"),
    ],
)
def test_who_is_no_sidecar_is_not_believed(status: int, body: bytes, said: str) -> None:
    with something_else(status, body) as address:
        ended = explain(address, "--action", "retry_agent")
    assert (ended.returncode, ended.stdout) == (3, "")
    assert said in ended.stderr
    assert "is this its admin.listen?" in ended.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("--admin", "127.0.0.1:1"),
        ("--admin", "127.0.0.1:1", "--action", "a", "{}"),
        ("--admin", "192.0.2.1:80", "{}"),
        ("--admin", "127.0.0.1", "{}"),
        ("--admin", "127.0.0.1:1", "no-such-file.json"),
        ("{}",),
    ],
)
def test_wrong_usage_exits_2_before_anybody_is_asked(arguments: tuple[str, ...]) -> None:
    ended = scopegate("explain", *arguments)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr
