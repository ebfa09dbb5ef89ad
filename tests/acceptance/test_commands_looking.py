"""What operators and the platform ask: status, health, executions, completion; and what nobody answers."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.conftest import (
    EXECUTE,
    PROJECT,
    Address,
    Backend,
    Program,
    ask_json,
    execution,
    executions,
    issue_scope,
    scope_of,
    scopegate,
    write_configuration,
)
from tests.certificates import Authority
from tests.support import unused_port


@pytest.fixture(scope="module")
def backend() -> Iterator[Backend]:
    with Backend() as running:
        yield running


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory: pytest.TempPathFactory, backend: Backend) -> Iterator[Program]:
    folder = tmp_path_factory.mktemp("looking")
    config = write_configuration(folder, backend.address, upstream={"response_timeout_seconds": 0.5})
    with Program(config) as running:
        yield running


def at(address: Address) -> str:
    return f"{address[0]}:{address[1]}"


def lines(ended: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """What it says, by label."""
    assert (ended.returncode, ended.stderr) == (0, ""), ended
    # A label is as long as the longest one at most.
    rows = [
        re.split(r" {2,}| (?=[0-9.]+ [KMGT]?i?B$)", line, maxsplit=1) for line in ended.stdout.splitlines()
    ]
    return dict(rows)


def unknown_execution(sidecar: Program, backend: Backend) -> str:
    """The decision under which something was executed that nobody knows the end of."""
    before = {one["decision_id"] for one in executions(sidecar.admin, "unknown")}
    scope = issue_scope(sidecar.data, incident="inc_unknown")
    backend.go_on.clear()
    try:
        answer = ask_json(sidecar.data, "POST", EXECUTE, execution(scope, incident="inc_unknown"))
    finally:
        backend.go_on.set()
    assert answer.status == 504
    (new,) = {one["decision_id"] for one in executions(sidecar.admin, "unknown")} - before
    assert isinstance(new, str)
    return new


# Status -------------------------------------------------------------------------------------------------


def test_the_status_is_told_in_lines(sidecar: Program) -> None:
    told = lines(scopegate("status", "--admin", at(sidecar.admin)))
    assert next(iter(told.items())) == ("gate", "ready")
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ \(\d+ (s|min) ago\)", told["up since"])
    assert (told["draining"], told["in flight"]) == ("no", "0")
    assert told["store"] == f"sqlite:///{sidecar.store}"
    assert re.fullmatch(r"[\d.]+ KiB, and [\d.]+ KiB of WAL", told["size"])
    assert told["last reload"].startswith("ok, 20")
    assert (told["scope needed"], told["in shadow"]) == ("from low risk on", "no route")
    assert told["data on"] == f"{at(sidecar.data)}, which issues scopes"
    assert (told["admin on"], told["ops on"]) == (at(sidecar.admin), at(sidecar.ops))


def test_the_status_as_json_names_the_listeners_and_the_one_that_issues_scopes(sidecar: Program) -> None:
    ended = scopegate("status", "--admin", at(sidecar.admin), "--json")
    assert (ended.returncode, ended.stderr) == (0, "")
    status = json.loads(ended.stdout)
    assert status["listeners"] == {name: at(getattr(sidecar, name)) for name in ("data", "admin", "ops")}
    assert status["scopes_served_on"] == "data"


def test_an_execution_that_nobody_knows_the_end_of_shows_with_its_age(
    sidecar: Program, backend: Backend
) -> None:
    decision_id = unknown_execution(sidecar, backend)
    told = lines(scopegate("status", "--admin", at(sidecar.admin)))
    assert re.fullmatch(r"\d+ to reconcile, the oldest \d+ s ago", told["unknown"])
    ended = scopegate("executions", "list", "--admin", at(sidecar.admin), "--status", "unknown")
    assert any(line.startswith(f"{decision_id}  unknown ") for line in ended.stdout.splitlines())


def test_a_configuration_that_was_refused_shows_in_the_status(tmp_path: Path, backend: Backend) -> None:
    with Program(write_configuration(tmp_path, backend.address)) as sidecar:
        actions = tmp_path / "policies" / "actions.yaml"
        actions.write_text("actions:\n  retry_agent: {risk: tiny}\n")
        sidecar.signal(signal.SIGHUP)

        def told() -> list[str] | None:
            shown = scopegate("status", "--admin", at(sidecar.admin)).stdout.splitlines()
            return shown if any(line.startswith("last reload    REFUSED, ") for line in shown) else None

        assert any("actions.yaml:2:" in line for line in sidecar.until("the reload is refused", told))


# Health -------------------------------------------------------------------------------------------------


def test_a_sidecar_that_is_ready_exits_0_with_each_check(sidecar: Program) -> None:
    ended = scopegate("health", "--ops", at(sidecar.ops))
    assert (ended.returncode, ended.stderr) == (0, "")
    first, *checks = ended.stdout.splitlines()
    assert first == "ready"
    well = dict.fromkeys(("store", "log", "policies", "clock"), "ok")
    assert {line.split()[0]: line.split()[1] for line in checks} == {**well, "draining": "no"}
    as_json = scopegate("health", "--ops", at(sidecar.ops), "--json")
    assert json.loads(as_json.stdout)["ready"] is True
    alive = scopegate("health", "--ops", at(sidecar.ops), "--live")
    assert (alive.returncode, alive.stdout) == (0, "alive\n")


def test_a_sidecar_that_is_not_ready_exits_1_and_says_why(tmp_path: Path, backend: Backend) -> None:
    with Program(write_configuration(tmp_path, backend.address)) as sidecar:
        sidecar.store.rename(sidecar.store.with_suffix(".away"))
        sidecar.until("notices", lambda: scopegate("health", "--ops", at(sidecar.ops)).returncode == 1)
        ended = scopegate("health", "--ops", at(sidecar.ops))
        assert (ended.returncode, ended.stderr) == (1, "")
        assert ended.stdout.startswith("not ready\nstore      the database file ")
        as_json = scopegate("health", "--ops", at(sidecar.ops), "--json")
        assert (as_json.returncode, json.loads(as_json.stdout)["ready"]) == (1, False)
        assert scopegate("health", "--ops", at(sidecar.ops), "--live").returncode == 0
        first = scopegate("status", "--admin", at(sidecar.admin)).stdout.splitlines()[0]
        assert re.match(r"gate +NOT READY: store, log: the database file .+ was moved", first)


def test_a_health_check_reads_the_address_from_the_configuration(sidecar: Program) -> None:
    ended = scopegate("health", "--config", sidecar.config, "--set", f"ops.listen={at(sidecar.ops)}")
    assert (ended.returncode, ended.stderr) == (0, "")
    everywhere = f"ops.listen=0.0.0.0:{sidecar.ops[1]}"
    assert scopegate("health", "--config", sidecar.config, "--set", everywhere).returncode == 0


def test_a_health_check_imports_nothing_that_it_does_not_need() -> None:
    program = (
        "import atexit, sys\n"
        "atexit.register(lambda: print(*sys.modules))\n"
        "from sidecar.cli.main import main\n"
        f"main(['health', '--ops', '127.0.0.1:{unused_port()}'], standalone_mode=False)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert ended.returncode == 3
    imported = set(ended.stdout.split())
    assert "sidecar.cli.status" in imported
    heavy = {
        "sidecar.serve",
        "aiohttp",
        "pydantic",
        "prometheus_client",
        "aiosqlite",
        "asyncio",
        "cryptography",
    }
    assert imported & heavy == set()


# Executions ---------------------------------------------------------------------------------------------


def test_an_unknown_execution_is_reconciled_once(sidecar: Program, backend: Backend) -> None:
    decision_id = unknown_execution(sidecar, backend)
    asked = ("executions", "reconcile", decision_id, "--admin", at(sidecar.admin), "--reason", "in its logs")
    ended = scopegate(*asked, "--outcome", "executed", "--cost-usd", "0.004")
    told = lines(ended)
    assert (told["execution"], told["status"], told["cost"]) == (decision_id, "executed", "0.004 USD")
    again = scopegate(*asked, "--outcome", "not_executed")
    assert (again.returncode, again.stdout) == (1, "")
    assert "scopegate: not_reconcilable: " in again.stderr
    shown = ("scopes", "show", told["scope"], "--admin", at(sidecar.admin), "--json")
    scope_id = json.loads(scopegate(*shown).stdout)["scope_id"]
    assert scope_of(sidecar.data, scope_id, incident="inc_unknown")["cost_used_usd"] == 0.004
    listing = ("decisions", "list", "--admin", at(sidecar.admin), "--event", "reconciled", "--limit", "1")
    details = json.loads(scopegate(*listing, "--json").stdout)["decisions"][0]["details"]
    assert (details["reconciled_because"], details["reconciled_by"]) == ("in its logs", told["by"])
    assert told["reason"] == "in its logs"
    row = scopegate(*listing).stdout.splitlines()[1]
    assert row.split()[1:3] == ["reconciled", "executed"]
    assert f"  in its logs; by {told['by']}; " in row


def test_what_was_not_executed_gives_its_attempt_back(sidecar: Program, backend: Backend) -> None:
    decision_id = unknown_execution(sidecar, backend)
    ended = scopegate(
        *("executions", "reconcile", decision_id, "--admin", at(sidecar.admin)),
        *("--outcome", "not_executed", "--reason", "never seen", "--by", "alice", "--json"),
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    reconciled = json.loads(ended.stdout)
    assert (reconciled["decision_id"], reconciled["status"]) == (decision_id, "not_executed")
    scope = scope_of(sidecar.data, reconciled["scope_id"], incident="inc_unknown")
    assert (scope["attempts_used"], scope["status"]) == (0, "active")


def test_without_unknown_executions_the_list_says_so(tmp_path: Path, backend: Backend) -> None:
    with Program(write_configuration(tmp_path, backend.address)) as sidecar:
        asked = ("executions", "list", "--admin", at(sidecar.admin), "--status", "unknown")
        ended = scopegate(*asked)
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "There is no such execution.\n")
        as_json = scopegate(*asked, "--json")
        assert json.loads(as_json.stdout) == {"executions": [], "next": None}


# Reaching it --------------------------------------------------------------------------------------------

ASKING: dict[str, tuple[str, ...]] = {
    "status": (),
    "health": (),
    "scopes list": (),
    "scopes show": ("scope_1",),
    "scopes revoke": ("scope_1",),
    "scopes create": ("--incident-id", "i", "--action", "retry_agent", "--intent", "why"),
    "decisions list": (),
    "decisions show": ("1",),
    "decisions tail": (),
    "executions list": (),
    "executions reconcile": ("1", "--outcome", "executed", "--reason", "why"),
    "explain": ("--action", "retry_agent"),
}


def asked_of(command: str, address: str) -> subprocess.CompletedProcess[str]:
    listener = "--ops" if command == "health" else "--admin"
    return scopegate(*command.split(), listener, address, *ASKING[command])


@pytest.mark.parametrize("command", ASKING)
def test_where_nobody_listens_every_command_exits_3_and_names_the_address(command: str) -> None:
    address = f"127.0.0.1:{unused_port()}"
    ended = asked_of(command, address)
    assert (ended.returncode, ended.stdout) == (3, "")
    name = "ops" if command == "health" else "admin"
    assert ended.stderr == (
        f"scopegate: no sidecar answers on {address} (Connection refused); is it running, and is this its "
        f"{name}.listen?\n"
    )


@contextmanager
def saying(answer: bytes | None) -> Iterator[str]:
    """A listener that answers each connection with the same bytes, or never."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0.05)
        over = threading.Event()
        kept: list[socket.socket] = []

        def serve() -> None:
            while not over.is_set():
                try:
                    connection, _ = listening.accept()
                except TimeoutError:
                    continue
                kept.append(connection)
                if answer is not None:
                    connection.recv(65_536)
                    connection.sendall(answer)
                    connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield at(listening.getsockname())
        finally:
            over.set()
            thread.join()
            for connection in kept:
                connection.close()


def http(status: str, body: bytes) -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


@pytest.mark.parametrize("command", ["status", "health", "scopes create", "decisions tail"])
@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"220 mail.test ESMTP\r\n", "does not speak HTTP"),
        (b"", "hangs up"),
        (http("200 OK", b"<html>"), "200, and not as a sidecar would"),
        (http("200 OK", b"[]"), "200, and not as a sidecar would"),
        (http("200 OK", b"[" * 100_000), "200, and not as a sidecar would"),
        (http("500 Oops", b"{}"), "500, and not as a sidecar would"),
        (
            http("404 Not Found", b'{"error": "not_found", "message": "No \\u001b[2Jsuch page."}'),
            "404: No \\x1b[2Jsuch page; is this its",
        ),
    ],
)
def test_who_is_no_sidecar_is_not_believed(command: str, answer: bytes, said: str) -> None:
    with saying(answer) as address:
        ended = asked_of(command, address)
    assert (ended.returncode, ended.stdout) == (3, ""), ended
    assert said in ended.stderr
    assert address in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("command", ASKING)
def test_an_answer_without_what_a_sidecar_tells_is_none_of_its(command: str) -> None:
    with saying(http("200 OK", b'{"scopes_served_on": "admin", "surprise": [], "next": null}')) as address:
        ended = asked_of(command, address)
    assert (ended.returncode, ended.stdout) == (3, ""), ended
    assert "not as a sidecar" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


@pytest.mark.parametrize("time", ["0", "soon", "nan", "11m", "1.5m"])
def test_a_time_that_cannot_be_waited_for_is_wrong_usage(time: str) -> None:
    ended = scopegate("health", "--ops", "127.0.0.1:1", "--timeout", time)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "--timeout" in ended.stderr


def test_a_time_to_wait_may_be_a_duration() -> None:
    with saying(None) as address:
        ended = scopegate("health", "--ops", address, "--timeout", "1s")
    assert "(not within 1 s)" in ended.stderr


def test_who_says_nothing_is_not_waited_for() -> None:
    with saying(None) as address:
        ended = scopegate("health", "--ops", address, "--timeout", "0.3")
    assert (ended.returncode, ended.stdout) == (3, "")
    assert f"no sidecar answers on {address} (not within 0.3 s)" in ended.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("status",),
        ("status", "--admin", "127.0.0.1"),
        ("status", "--admin", "192.0.2.1:80"),
        ("status", "--admin", "unix:relative.sock"),
        ("status", "--admin", "127.0.0.1:1", "--ca", "ca.pem"),
        ("status", "--admin", "https://127.0.0.1:1", "--key", "key.pem"),
        ("status", "--admin", "https://127.0.0.1:1", "--ca", "no-such-file.pem"),
        ("health",),
        ("health", "--ops", "127.0.0.1:0"),
        ("executions", "reconcile", "1", "--admin", "127.0.0.1:1", "--outcome", "executed"),
        ("executions", "list", "--admin", "127.0.0.1:1", "--limit", "0"),
        ("decisions", "list", "--admin", "127.0.0.1:1", "--event", "nothing"),
        ("decisions", "show", "--admin", "127.0.0.1:1", "a/b"),
    ],
)
def test_wrong_usage_exits_2_before_anybody_is_asked(arguments: tuple[str, ...]) -> None:
    ended = scopegate(*arguments)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr
    assert "Traceback" not in ended.stderr


# TLS and Unix sockets -----------------------------------------------------------------------------------


def test_a_configured_certificate_is_trusted_as_it_is_and_no_other(tmp_path: Path, backend: Backend) -> None:
    authority = Authority(tmp_path)
    pair = authority.issue("listener", address="192.0.2.1")
    config = write_configuration(
        tmp_path, backend.address, **{name: {"tls": pair.settings()} for name in ("data", "admin", "ops")}
    )
    with Program(config) as sidecar:
        admin, ops = f"https://{at(sidecar.admin)}", f"https://{at(sidecar.ops)}"
        told = lines(scopegate("status", "--config", config, "--admin", admin))
        assert told["data on"] == f"https://{at(sidecar.data)}, which issues scopes"
        assert scopegate("health", "--config", config, "--ops", ops).returncode == 0
        created = scopegate(
            *("scopes", "create", "-q", "--config", config, "--admin", admin),
            *("--data", f"https://{at(sidecar.data)}"),
            *("--incident-id", "i", "--action", "retry_agent", "--intent", "why"),
        )
        assert (created.returncode, created.stderr) == (0, ""), created
        # From the same authority, but not the certificate that is configured.
        other = authority.issue("other").settings()
        sets = [f"admin.tls.{key}={value}" for key, value in other.items()]
        refused = scopegate(
            "status", "--config", config, "--admin", admin, *(word for one in sets for word in ("--set", one))
        )
        assert (refused.returncode, refused.stdout) == (3, "")
        assert "its certificate is not trusted" in refused.stderr
        # An authority vouches for a name, and this one is for another host.
        named = scopegate("status", "--admin", admin, "--ca", authority.certificate_file)
        assert (named.returncode, named.stdout) == (3, "")
        assert "its certificate is not trusted: " in named.stderr
        assert scopegate("status", "--admin", at(sidecar.admin)).returncode == 3


def test_an_authority_is_trusted_and_a_certificate_shown(tmp_path: Path, backend: Backend) -> None:
    authority = Authority(tmp_path)
    tls = authority.issue("listener").settings(client_ca_file=authority.certificate_file)
    client = authority.issue("client")
    with Program(write_configuration(tmp_path, backend.address, admin={"tls": tls})) as sidecar:
        asked = ("status", "--admin", f"https://{at(sidecar.admin)}", "--ca", authority.certificate_file)
        shows = ("--cert", client.certificate_file, "--key", client.key_file)
        ended = scopegate(*asked, *shows)
        assert (ended.returncode, ended.stderr) == (0, ""), ended
        without = scopegate(*asked)
        assert (without.returncode, without.stdout) == (3, "")
        assert "no sidecar answers on https://" in without.stderr


def test_a_sidecar_is_asked_over_unix_sockets(tmp_path: Path, backend: Backend) -> None:
    paths = {name: tmp_path / f"{name}.sock" for name in ("admin", "ops", "data")}
    config = write_configuration(
        tmp_path, backend.address, **{name: {"listen": f"unix:{path}"} for name, path in paths.items()}
    )
    program = Program(config)
    with (tmp_path / "log").open("wb") as log:
        running = subprocess.Popen(
            [sys.executable, "-m", "sidecar", "run", "--config", str(config)], cwd=PROJECT, stderr=log
        )
    try:
        program.until("is ready", lambda: scopegate("health", "--config", config).returncode == 0, 20)
        assert scopegate("status", "--admin", f"unix:{paths['admin']}").returncode == 0
        ended = scopegate(
            *("scopes", "create", "--config", config, "--incident-id", "i", "--action", "retry_agent"),
            *("--intent", "why", "--json"),
        )
        assert (ended.returncode, ended.stderr) == (0, ""), ended
        assert json.loads(ended.stdout)["status"] == "active"
    finally:
        running.kill()
        running.wait()
    ended = scopegate("status", "--config", config)
    assert (ended.returncode, ended.stdout) == (3, "")
    assert f"no sidecar answers on unix:{paths['admin']} (Connection refused)" in ended.stderr


# Completion ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shell", "sign"), [("bash", "complete -o"), ("zsh", "#compdef scopegate"), ("fish", "complete --")]
)
def test_each_shell_gets_its_completion(shell: str, sign: str) -> None:
    ended = scopegate("completion", shell)
    assert ended.returncode == 0
    assert sign in ended.stdout
    assert "_SCOPEGATE_COMPLETE" in ended.stdout


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("scopegate sc", "scopes"),
        ("scopegate scopes re", "revoke"),
        ("scopegate executions list --status un", "unknown"),
        ("scopegate decisions tail --event adm", "admitted"),
        ("scopegate completion z", "zsh"),
    ],
)
def test_commands_and_values_complete(monkeypatch: pytest.MonkeyPatch, words: str, wanted: str) -> None:
    monkeypatch.setenv("_SCOPEGATE_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    ended = scopegate()
    assert ended.stdout.split() == [f"plain,{wanted}"]


def test_an_unknown_shell_is_wrong_usage() -> None:
    assert scopegate("completion", "tcsh").returncode == 2


def test_a_list_that_nobody_reads_on_ends_quietly(sidecar: Program, tmp_path: Path) -> None:
    read, write = socket.socketpair()
    read.close()
    with write:
        ended: Any = subprocess.run(
            [sys.executable, "-m", "sidecar", "status", "--admin", at(sidecar.admin)],
            cwd=PROJECT,
            stdout=write.fileno(),
            stderr=subprocess.PIPE,
            timeout=20,
            check=False,
        )
    assert ended.stderr == b""


def test_the_status_says_what_it_can_while_the_stores_folder_is_gone(
    tmp_path: Path, backend: Backend
) -> None:
    with Program(write_configuration(tmp_path, backend.address)) as sidecar:
        (tmp_path / "var").rename(tmp_path / "elsewhere")
        told = lines(scopegate("status", "--admin", at(sidecar.admin)))
        assert told["size"] == "not known"
        assert told["store"].endswith("/var/scopegate.db")
        assert scopegate("health", "--ops", at(sidecar.ops)).returncode == 1
        (tmp_path / "elsewhere").rename(tmp_path / "var")
