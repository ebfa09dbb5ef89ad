"""The program as whoever runs it meets it: exit codes, signals, and what a crash leaves behind."""

from __future__ import annotations

import shutil
import signal
import socket
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from sidecar.cli.main import main
from tests.acceptance.conftest import (
    ASK_SECONDS,
    EXECUTE,
    Backend,
    Program,
    ask,
    ask_json,
    execution,
    executions,
    issue_scope,
    scope_of,
    scopegate,
    write_configuration,
)
from tests.client import BlockingConnection, Message, as_json
from tests.tokens import EC_KEY, RSA_KEY, jwk, key_set

NOWHERE = ("127.0.0.1", 9)


def in_here(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """`scopegate` for commands that neither serve nor log, without the half second that a process takes."""
    ended = CliRunner().invoke(main, [str(argument) for argument in arguments])
    return subprocess.CompletedProcess(arguments, ended.exit_code, ended.stdout, ended.stderr)


@pytest.fixture
def backend() -> Iterator[Backend]:
    with Backend() as running:
        yield running


@pytest.fixture
def sidecar(tmp_path: Path, backend: Backend) -> Iterator[Program]:
    with Program(write_configuration(tmp_path, backend.address)) as running:
        yield running


@pytest.fixture
def aside() -> Iterator[ThreadPoolExecutor]:
    """Threads for requests that take their time."""
    with ThreadPoolExecutor(32) as pool:
        yield pool


def execute(sidecar: Program, scope_id: str) -> Message:
    return ask_json(sidecar.data, "POST", EXECUTE, execution(scope_id))


# Starting ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["run", "check"])
@pytest.mark.parametrize(
    ("text", "place", "key"),
    [
        ("upstream:\n  url: http://127.0.0.1:9\n  tiemout: 3\n", ":3:3:", "upstream.tiemout"),
        ("upstream:\n  url: http://127.0.0.1:9\n  max_connections: x\n", ":3:3:", "upstream.max_connections"),
        ("upstream:\n  url: [1\n", ":", ""),
        ("data: {listen: 127.0.0.1:0}\n", ":", "upstream.url"),
    ],
    ids=["unknown key", "wrong type", "no YAML", "missing key"],
)
def test_a_mistake_in_the_configuration_exits_2_and_says_where(
    tmp_path: Path, command: str, text: str, place: str, key: str
) -> None:
    config = tmp_path / "scopegate.yaml"
    config.write_text(text)
    ended = (scopegate if command == "run" else in_here)(command, "--config", config)
    assert ended.returncode == 2, ended
    assert f"{config}{place}" in ended.stderr
    assert key in ended.stderr
    assert "Traceback" not in ended.stderr


def no_folder(policies: Path) -> None:
    shutil.rmtree(policies)


def empty_folder(policies: Path) -> None:
    (policies / "actions.yaml").unlink()


def unknown_risk(policies: Path) -> None:
    (policies / "actions.yaml").write_text("actions:\n  retry_agent: {risk: dreadful}\n")


@pytest.mark.parametrize(
    ("spoil", "told"),
    [(no_folder, "policies"), (empty_folder, "policies"), (unknown_risk, "actions.yaml:2:")],
)
def test_without_a_valid_policy_set_it_exits_2(
    tmp_path: Path, spoil: Callable[[Path], None], told: str
) -> None:
    config = write_configuration(tmp_path, NOWHERE)
    spoil(tmp_path / "policies")
    for ended in (scopegate("run", "--config", config), in_here("check", "--config", config)):
        assert ended.returncode == 2, ended
        assert told in ended.stderr
        assert "Traceback" not in ended.stderr


def test_a_configuration_that_does_not_exist_exits_2(tmp_path: Path) -> None:
    ended = scopegate("run", "--config", tmp_path / "none.yaml")
    assert (ended.returncode, "none.yaml" in ended.stderr, "Traceback" in ended.stderr) == (2, True, False)


def test_run_refuses_a_store_in_memory_with_exit_2(tmp_path: Path) -> None:
    config = write_configuration(tmp_path, NOWHERE, store={"url": "memory://"})
    ended = scopegate("run", "--config", config)
    assert ended.returncode == 2, ended
    assert "store.url" in ended.stderr


@pytest.mark.parametrize("listener", ["data", "admin", "ops"])
def test_a_port_in_use_exits_1_and_names_it(tmp_path: Path, listener: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        config = write_configuration(tmp_path, NOWHERE, **{listener: {"listen": address}})
        ended = scopegate("run", "--config", config)
    assert ended.returncode == 1, ended
    assert f"{listener}.listen: cannot listen on {address}" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_second_process_on_a_store_exits_1_and_names_the_first(sidecar: Program) -> None:
    ended = scopegate("run", "--config", sidecar.config)
    assert ended.returncode == 1, ended
    assert f"pid {sidecar.pid})" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert ask(sidecar.ops, "GET", "/health/ready").status == 200


def test_check_is_content_with_a_good_configuration(tmp_path: Path) -> None:
    config = write_configuration(tmp_path, NOWHERE)
    ended = scopegate("check", "--config", config)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert str(config) in ended.stdout
    assert not (tmp_path / "var").exists(), "check touched the store"


def test_check_names_the_actions_of_routes_that_the_catalogue_lacks(tmp_path: Path) -> None:
    config = write_configuration(tmp_path, NOWHERE)
    routes = (
        "gate.routes=[{name: retry_agent, path: /a, body: any}, {name: retry-agnet, path: /b, body: any}]"
    )
    ended = scopegate("check", "--config", config, "--set", routes)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "refused, because no policy lists them: retry-agnet\n" in ended.stdout
    assert "no policy lists them" not in scopegate("check", "--config", config).stdout


def test_check_reads_the_keys_of_the_issuer_as_run_does(tmp_path: Path) -> None:
    config, keys = write_configuration(tmp_path, NOWHERE), tmp_path / "jwks.json"
    known = {"issuer": "https://issuer.test", "audience": "scopegate", "jwks": str(keys)}
    options = [word for name, value in known.items() for word in ("--set", f"auth.jwt.{name}={value}")]
    keys.write_bytes(key_set(jwk(RSA_KEY, "a"), jwk(EC_KEY, "b", use="enc")))
    ended = in_here("check", "--config", config, *options)
    assert ended.returncode == 0
    assert f"issuer keys    {keys}: ok, 1 key\n" in ended.stdout
    column = keys.read_text().index('{"kty": "EC"') + 1
    ignored = f"warning: {keys}:1:{column}: is not for verifying signatures, so it is ignored\n"
    assert ended.stderr.startswith(ignored)
    # A method without roles refuses every call.
    assert "warning: The policies list no roles" in ended.stderr.removeprefix(ignored)
    keys.write_bytes(key_set({"kty": "oct", "k": "c2VjcmV0"}))
    for command in ("check", "run"):
        ended = scopegate(command, "--config", config, *options)
        assert ended.returncode != 0
        assert f"{keys}:1:11: holds a secret (member k)" in ended.stderr
        assert "Traceback" not in ended.stderr
        assert "c2VjcmV0" not in ended.stderr
    url = ["--set", "auth.jwt.jwks=https://127.0.0.1:9/jwks"]
    ended = in_here("check", "--config", config, *options, *url)
    assert ended.returncode == 0
    assert "issuer keys    https://127.0.0.1:9/jwks: fetched while the sidecar runs\n" in ended.stdout


def test_check_warns_of_an_action_that_no_scope_can_cover(tmp_path: Path) -> None:
    config = write_configuration(tmp_path, NOWHERE)
    policies = tmp_path / "few"
    policies.mkdir()
    (policies / "a.yaml").write_text(
        "actions:\n  failover_db: {risk: critical, max_cost_usd: 5}\n"
        "  'drop_*': {risk: high, max_cost_usd: 5.01}\n  retry: {risk: low}\n"
    )
    limited = ["--set", "scopes.limits.max_cost_usd=5", "--set", f"policies={policies}"]
    ended = scopegate("check", "--config", config, *limited)
    assert ended.returncode == 0
    assert ended.stderr == (
        "warning: the action drop_* holds 5.01 US dollars, and scopes.limits.max_cost_usd is 5, so every "
        "scope for it is refused; raise the limit, or lower max_cost_usd of the action\n"
    )
    assert "2 actions and 1 glob of actions listed; any other is refused" in ended.stdout


# Stopping ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_sidecar_stops_at_once_although_clients_are_connected(
    sidecar: Program, number: signal.Signals
) -> None:
    issue_scope(sidecar.data)
    with socket.create_connection(sidecar.data) as client, socket.create_connection(sidecar.admin):
        client.sendall(b"GET /half HTTP/1.1\r\n")
        begun = time.monotonic()
        sidecar.signal(number)
        assert sidecar.wait() == 0
    assert time.monotonic() - begun < 4
    assert not sidecar.store.with_name("scopegate.db-wal").exists(), "the store was not closed"


@dataclass
class Load:
    """What clients on keep-alive connections saw while the sidecar was stopped."""

    sidecar: Program
    answered: list[Message] = field(default_factory=list)
    turned_away: int = 0
    lost: list[str] = field(default_factory=list)

    def client(self, number: int) -> None:
        """Issue scopes and spend them until the sidecar takes no more connections."""
        connection = BlockingConnection(self.sidecar.data)
        turn = 0
        scope = ""
        try:
            while True:
                turn += 1
                if turn % 11 == 1:
                    target, body = (
                        "/api/v1/recovery/scope",
                        {
                            "incident_id": "inc-1",
                            "action": "retry_agent",
                            "intent": "load",
                            "max_attempts": 10,
                        },
                    )
                else:
                    target, body = EXECUTE, execution(scope)
                fresh = connection.socket is None
                headers, encoded = as_json(body)
                headers.append(("X-Request-Id", f"{number}-{turn}"))
                try:
                    answer = connection.ask("POST", target, headers, encoded)
                except ConnectionRefusedError:
                    return
                except ConnectionError as exc:
                    if not fresh:
                        self.lost.append(f"{number}-{turn}: {exc!r}")
                    self.turned_away += 1
                    return
                self.answered.append(answer)
                if turn % 11 == 1:
                    scope = answer.json().get("scope_id", scope)
        finally:
            connection.close()


def test_sigterm_under_load_loses_no_request(
    sidecar: Program, backend: Backend, aside: ThreadPoolExecutor
) -> None:
    backend.delay = 0.05
    load = Load(sidecar)
    clients = [aside.submit(load.client, number) for number in range(20)]
    sidecar.until("executes", lambda: len(backend.seen) > 150 or None, 30)
    begun = time.monotonic()
    sidecar.signal(signal.SIGTERM)
    assert sidecar.wait() == 0, sidecar.log()
    assert time.monotonic() - begun < 5
    for client in clients:
        client.result(ASK_SECONDS)
    assert load.lost == []
    statuses = {answer.status for answer in load.answered}
    assert statuses <= {200, 201, 503}
    assert all(answer.json()["error"] == "draining" for answer in load.answered if answer.status == 503)
    executed = [one.header("scopegate-decision-id") or "" for one in load.answered if one.status == 200]
    assert len(executed) > 100
    assert sorted(executed) == sorted(backend.seen)
    with sqlite3.connect(sidecar.store) as store:
        found = store.execute("SELECT status, COUNT(*) FROM executions GROUP BY status").fetchall()
    store.close()
    assert found == [("answered", len(executed))]
    assert "Traceback" not in sidecar.log()
    assert scopegate("log", "verify", "--config", sidecar.config).returncode == 0


def test_requests_that_come_while_draining_are_refused_as_such(
    sidecar: Program, backend: Backend, aside: ThreadPoolExecutor
) -> None:
    first, second = issue_scope(sidecar.data), issue_scope(sidecar.data)
    backend.go_on.clear()
    connection = BlockingConnection(sidecar.data)
    try:
        connection.ask("GET", "/api/v1/recovery/scopes/inc-1")  # so that it is open before the drain
        running = aside.submit(execute, sidecar, first)
        sidecar.until("executes", lambda: backend.seen)
        sidecar.signal(signal.SIGTERM)
        sidecar.until_logged("draining")
        ready = ask(sidecar.ops, "GET", "/health/ready")
        assert (ready.status, ready.json()["checks"]["draining"]["ok"]) == (503, False)
        refused = connection.ask_json("POST", EXECUTE, execution(second))
        assert (refused.status, refused.json()["error"]) == (503, "draining")
        assert refused.headers("retry-after")
    finally:
        connection.close()
        backend.go_on.set()
    assert running.result(ASK_SECONDS).status == 200
    assert sidecar.wait() == 0
    assert len(backend.seen) == 1


def test_a_second_signal_exits_at_once(sidecar: Program, backend: Backend, aside: ThreadPoolExecutor) -> None:
    scope = issue_scope(sidecar.data)
    backend.go_on.clear()
    running = aside.submit(execute, sidecar, scope)
    sidecar.until("executes", lambda: backend.seen)
    sidecar.signal(signal.SIGTERM)
    sidecar.until_logged("draining")
    begun = time.monotonic()
    sidecar.signal(signal.SIGTERM)
    assert sidecar.wait() == 1
    assert time.monotonic() - begun < 1
    assert isinstance(running.exception(ASK_SECONDS), ConnectionError)
    sidecar.start()
    assert [shown["status"] for shown in executions(sidecar.admin)] == ["unknown"]


def test_a_drain_that_ends_before_the_backend_leaves_an_unknown_execution(
    tmp_path: Path, backend: Backend, aside: ThreadPoolExecutor
) -> None:
    config = write_configuration(tmp_path, backend.address, shutdown={"drain_seconds": 1})
    with Program(config) as sidecar:
        scope = issue_scope(sidecar.data, attempts=2)
        backend.go_on.clear()
        running = aside.submit(execute, sidecar, scope)
        sidecar.until("executes", lambda: backend.seen)
        begun = time.monotonic()
        sidecar.signal(signal.SIGTERM)
        assert sidecar.wait() == 0
        assert time.monotonic() - begun >= 0.8  # of the limit, for requests; the rest is for closing
        answer = running.result(ASK_SECONDS)
        assert (answer.status, answer.json()["error"]) == (504, "upstream_timeout")
        assert answer.headers("scopegate-decision-id") == backend.seen
        sidecar.start()
        (left,) = executions(sidecar.admin, "unknown")
        assert [left["decision_id"]] == backend.seen
        assert scope_of(sidecar.data, scope)["attempts_remaining"] == 1


UNFINISHED_BODY = b"Host: x\r\nContent-Type: application/json\r\nContent-Length: 10\r\n\r\n{"
ENDLESS = {
    "an idle connection": ("data", b""),
    "an unfinished head": ("data", b"GET / HTTP/1.1\r\nHo"),
    "an unfinished gated body": ("data", b"POST /recovery/execute HTTP/1.1\r\n" + UNFINISHED_BODY),
    "an unfinished upload": ("data", b"POST /upload HTTP/1.1\r\n" + UNFINISHED_BODY),
    "an unfinished body for admin": ("admin", b"POST /api/v1/explain HTTP/1.1\r\n" + UNFINISHED_BODY),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ENDLESS)
def test_what_has_no_end_of_its_own_does_not_hold_up_the_drain(
    tmp_path: Path, backend: Backend, name: str
) -> None:
    listener, sent = ENDLESS[name]
    config = write_configuration(tmp_path, backend.address, shutdown={"drain_seconds": 0.5})
    with (
        Program(config) as sidecar,
        socket.create_connection(getattr(sidecar, listener), timeout=ASK_SECONDS) as client,
    ):
        client.sendall(sent)
        assert ask(sidecar.ops, "GET", "/health/live").status == 200  # by now it has come in
        begun = time.monotonic()
        sidecar.signal(signal.SIGTERM)
        assert sidecar.wait() == 0
        assert time.monotonic() - begun < 4


# Crashing ----------------------------------------------------------------------------------------------


def reconcile(sidecar: Program, decision_id: str, **body: Any) -> Message:
    target = f"/api/v1/executions/{decision_id}/reconcile"
    return ask_json(sidecar.admin, "POST", target, {"reason": "looked", **body})


def killed_while_executing(
    sidecar: Program, backend: Backend, aside: ThreadPoolExecutor, scope: str, count: int
) -> list[str]:
    """The decisions under which executions were at the backend when the sidecar was killed and restarted."""
    backend.go_on.clear()
    running: list[Future[Message]] = [aside.submit(execute, sidecar, scope) for _ in range(count)]
    sidecar.until("executes", lambda: len(backend.seen) == count or None)
    for decision_id in backend.seen:  # while the backend works, the record can already be read
        shown = ask(sidecar.admin, "GET", f"/api/v1/decisions/{decision_id}").json()
        assert (shown["event"], shown["outcome"]) == ("admitted", "in_flight")
    sidecar.kill()
    for request in running:
        assert isinstance(request.exception(ASK_SECONDS), ConnectionError)
    backend.go_on.set()
    sidecar.start()
    return list(backend.seen)


def test_what_was_in_flight_at_a_kill_is_unknown_and_can_be_reconciled_both_ways(
    sidecar: Program, backend: Backend, aside: ThreadPoolExecutor
) -> None:
    scope = issue_scope(sidecar.data, attempts=2)
    happened, not_happened = killed_while_executing(sidecar, backend, aside, scope, 2)

    unknown = executions(sidecar.admin, "unknown")
    assert {shown["decision_id"] for shown in unknown} == {happened, not_happened}
    assert execute(sidecar, scope).json()["error"] == "scope_exhausted"
    assert "scopegate_unknown_executions 2.0" in ask(sidecar.ops, "GET", "/metrics").body.decode()

    done = reconcile(sidecar, happened, outcome="executed", cost_usd=0.004)
    assert (done.status, done.json()["status"], done.json()["cost_usd"]) == (200, "executed", 0.004)
    assert scope_of(sidecar.data, scope)["attempts_remaining"] == 0
    undone = reconcile(sidecar, not_happened, outcome="not_executed")
    assert (undone.status, undone.json()["status"]) == (200, "not_executed")
    assert executions(sidecar.admin, "unknown") == []
    shown = scope_of(sidecar.data, scope)
    assert (shown["attempts_remaining"], shown["cost_used_usd"]) == (1, 0.004)

    for decision_id in (happened, not_happened):
        for outcome in ("executed", "not_executed"):
            again = reconcile(sidecar, decision_id, outcome=outcome)
            assert (again.status, again.json()["error"]) == (409, "not_reconcilable")
    missing = reconcile(sidecar, "01890000-0000-7000-8000-000000000000", outcome="executed")
    assert (missing.status, missing.json()["error"]) == (404, "decision_not_found")

    assert execute(sidecar, scope).status == 200
    assert execute(sidecar, scope).json()["error"] == "scope_exhausted"
    assert scopegate("log", "verify", "--config", sidecar.config).returncode == 0


def test_an_answered_execution_survives_a_kill_and_cannot_be_reconciled(sidecar: Program) -> None:
    scope = issue_scope(sidecar.data, attempts=2)
    decision_id = execute(sidecar, scope).headers("scopegate-decision-id")[0]
    sidecar.kill()
    sidecar.start()
    (shown,) = executions(sidecar.admin)
    assert (shown["decision_id"], shown["status"], shown["cost_usd"]) == (decision_id, "answered", 0.001)
    assert reconcile(sidecar, decision_id, outcome="not_executed").status == 409
    assert scope_of(sidecar.data, scope)["attempts_remaining"] == 1


# The log -----------------------------------------------------------------------------------------------


def test_the_log_verifies_beside_a_running_sidecar(sidecar: Program, aside: ThreadPoolExecutor) -> None:
    ending = threading.Event()

    def load() -> None:
        while not ending.is_set():
            execute(sidecar, issue_scope(sidecar.data))

    clients = [aside.submit(load) for _ in range(4)]
    try:
        for _ in range(2):
            ended = scopegate("log", "verify", "--config", sidecar.config)
            assert ended.returncode == 0, ended
            assert "ok: " in ended.stdout
            assert "not attested" in ended.stdout
    finally:
        ending.set()
    for client in clients:
        client.result(ASK_SECONDS)
    assert ask(sidecar.ops, "GET", "/health/ready").status == 200


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sidecar that has stopped, with nine records in its log."""
    folder = tmp_path_factory.mktemp("recorded")
    with Backend() as backend, Program(write_configuration(folder, backend.address)) as sidecar:
        for _ in range(3):
            assert execute(sidecar, issue_scope(sidecar.data)).status == 200
        assert sidecar.stop() == 0
    return folder


@pytest.mark.parametrize(
    ("sql", "first"),
    [
        ("UPDATE decisions SET envelope = CAST(replace(envelope, 'inc-1', 'x') AS BLOB) WHERE seq = 4", 4),
        ("UPDATE decisions SET incident_id = 'inc-2' WHERE seq = 5", 5),
        ("UPDATE decisions SET decided_at = decided_at + 1 WHERE seq = 2", 2),
        ("UPDATE decisions SET event = 'settled' WHERE seq = 2", 2),
        ("UPDATE decisions SET hash = zeroblob(32) WHERE seq = 3", 3),
        ("DELETE FROM decisions WHERE seq = 1", 1),
        ("DELETE FROM decisions WHERE seq = 6", 6),
        (
            "UPDATE decisions SET seq = -1 WHERE seq = 3; UPDATE decisions SET seq = 3 WHERE seq = 4;"
            "UPDATE decisions SET seq = 4 WHERE seq = -1",
            3,
        ),
        ("DELETE FROM decisions WHERE seq = 6; UPDATE decisions SET seq = seq - 1 WHERE seq > 6", 6),
    ],
    ids=[
        "altered",
        "index altered",
        "time altered",
        "event altered",
        "hash altered",
        "first deleted",
        "deleted",
        "swapped",
        "gap closed",
    ],
)
def test_tampering_with_the_log_exits_4_and_names_the_first_record(
    recorded: Path, tmp_path: Path, sql: str, first: int
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(recorded, folder)
    store = sqlite3.connect(folder / "var" / "scopegate.db")
    assert store.execute("SELECT COUNT(*) FROM decisions").fetchone() == (9,)
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        store.executescript(sql)
    store.rollback()
    for (trigger,) in store.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
        store.execute(f"DROP TRIGGER {trigger}")
    store.executescript(sql)
    store.commit()
    store.close()
    ended = in_here("log", "verify", "--config", folder / "scopegate.yaml")
    assert ended.returncode == 4, ended
    assert f"record {first} " in ended.stderr


def test_the_exit_code_of_verify_reaches_the_shell(recorded: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(recorded, folder)
    assert scopegate("log", "verify", "--config", folder / "scopegate.yaml").returncode == 0
    with sqlite3.connect(folder / "var" / "scopegate.db") as store:
        store.execute("DROP TRIGGER decisions_are_never_deleted")
        store.execute("DELETE FROM decisions WHERE seq = 5")
    store.close()
    ended = scopegate("log", "verify", "--config", folder / "scopegate.yaml")
    assert (ended.returncode, ended.stdout) == (4, "")
    assert "TAMPERED: record 5 is missing" in ended.stderr


def test_verify_without_a_store_is_no_tampering(tmp_path: Path) -> None:
    ended = scopegate("log", "verify", "--config", write_configuration(tmp_path, NOWHERE))
    assert ended.returncode == 1, ended
    assert "there is no database" in ended.stderr
    assert not (tmp_path / "var").exists()
