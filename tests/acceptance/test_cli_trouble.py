"""What commands make of servers that are none of ours, of answers that do not come, and of a full disk."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.acceptance.conftest import (
    EXECUTE,
    PROJECT,
    Address,
    Backend,
    Program,
    ask_json,
    execution,
    issue_scope,
    scopegate,
    write_configuration,
)

pytestmark = pytest.mark.slow

Speak = Callable[[socket.socket, threading.Event], None]


def at(address: Address) -> str:
    return f"{address[0]}:{address[1]}"


def http(document: object, status: str = "200 OK") -> bytes:
    body = json.dumps(document).encode()
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


@contextmanager
def speaking(speak: Speak) -> Iterator[str]:
    """A listener that treats one connection after the other as it likes."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0.05)
        over = threading.Event()

        def serve() -> None:
            while not over.is_set():
                try:
                    connection, _ = listening.accept()
                except TimeoutError:
                    continue
                connection.settimeout(5)
                with connection, suppress(OSError):
                    speak(connection, over)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield at(listening.getsockname())
        finally:
            over.set()
            thread.join()


def saying(document: object) -> Speak:
    def speak(connection: socket.socket, over: threading.Event) -> None:
        del over
        connection.recv(65_536)
        connection.sendall(http(document))

    return speak


def stranger(ended: subprocess.CompletedProcess[str]) -> str:
    """Exit code 3 and one sentence."""
    assert (ended.returncode, ended.stdout) == (3, ""), ended
    assert len(ended.stderr.splitlines()) == 1, ended.stderr
    assert ended.stderr.startswith("scopegate: ")
    return ended.stderr


# Answers of the wrong types ---------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [(), ("--json",)])
@pytest.mark.parametrize(
    ("command", "document", "odd"),
    [
        ("health", {"ready": True, "checks": {"a": 1}}, "checks"),
        ("health", {"ready": "yes"}, "ready"),
        ("health --live", {"alive": 1}, "alive"),
        ("status", {"uptime_seconds": "x"}, "uptime_seconds"),
        ("status", {"uptime_seconds": 1e300}, "uptime_seconds"),
        ("scopes list", {"scopes": [1], "next": None}, "scopes[0]"),
        ("scopes list", {"scopes": {}, "next": None}, "scopes"),
        ("executions list", {"executions": [{}], "next": None}, "executions[0].decision_id"),
        ("executions list", {"executions": [], "next": 7}, "next"),
        ("decisions list", {"decisions": [{"decision_id": []}], "next": None}, "decisions[0].decision_id"),
        ("explain", {"allowed": True, "error": None, "message": 1}, "message"),
    ],
)
def test_an_answer_of_other_types_is_none_of_a_sidecar(
    command: str, document: object, odd: str, form: tuple[str, ...]
) -> None:
    asked = ("--action", "retry_agent") if command == "explain" else ()
    with speaking(saying(document)) as address:
        listener = "--ops" if command.startswith("health") else "--admin"
        said = stranger(scopegate(*command.split(), listener, address, *asked, *form))
    assert f"not as a sidecar would ({odd} is missing or no such value)" in said


# Time -------------------------------------------------------------------------------------------------------


def dripping(connection: socket.socket, over: threading.Event) -> None:
    connection.recv(65_536)
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{")
    while not over.wait(0.1):
        connection.sendall(b" ")


def dripping_heads(connection: socket.socket, over: threading.Event) -> None:
    connection.recv(65_536)
    connection.sendall(b"HTTP/1.1 200 OK\r\nX-Slow: ")
    while not over.wait(0.1):
        connection.sendall(b"a")


@pytest.mark.parametrize("speak", [dripping, dripping_heads])
def test_a_server_that_drips_is_not_waited_for_longer_than_one_that_is_silent(speak: Speak) -> None:
    with speaking(speak) as address:
        begun = time.monotonic()
        ended = scopegate("health", "--ops", address, "--timeout", "0.5")
        took = time.monotonic() - begun
    assert "(not within 0.5 s)" in stranger(ended)
    assert took < 3


@pytest.mark.parametrize("command", ["scopes", "decisions", "executions"])
def test_a_list_that_names_the_same_page_again_is_not_followed_for_ever(command: str) -> None:
    with speaking(saying({command: [], "next": "abc"})) as address:
        said = stranger(scopegate(command, "list", "--admin", address))
    assert "(next is missing or no such value)" in said


# Whether it was done ----------------------------------------------------------------------------------------


def hanging_up(connection: socket.socket, over: threading.Event) -> None:
    del over
    connection.recv(65_536)


def silent(connection: socket.socket, over: threading.Event) -> None:
    connection.recv(65_536)
    over.wait(10)


@pytest.mark.parametrize(
    ("speak", "why"), [(hanging_up, "it hangs up"), (silent, "not within 5 s"), (dripping, "not within 5 s")]
)
def test_a_change_that_nobody_answered_may_have_been_made_and_is_not_called_unreachable(
    speak: Speak, why: str
) -> None:
    with speaking(speak) as address:
        ended = scopegate(
            *("executions", "reconcile", "an-id", "--admin", address),
            *("--outcome", "executed", "--reason", "why"),
        )
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == (
        f"scopegate: {address} got the request but did not answer in full ({why}); it may have been "
        "carried out: look with `scopegate decisions show an-id` before you repeat it\n"
    )


def test_a_grant_that_nobody_answered_says_where_to_look(sidecar: Program) -> None:
    with speaking(hanging_up) as address:
        ended = scopegate(
            *("scopes", "create", "--admin", at(sidecar.admin), "--data", address),
            *("--incident-id", "inc 7", "--action", "retry_agent", "--intent", "why"),
        )
    assert (ended.returncode, ended.stdout) == (1, "")
    assert "`scopegate scopes list --incident-id 'inc 7'`" in ended.stderr


def test_what_changes_nothing_is_unreachable_where_nobody_answers() -> None:
    with speaking(hanging_up) as address:
        said = stranger(scopegate("explain", "--admin", address, "--action", "retry_agent"))
    assert "no sidecar answers" in said


# What cannot be written -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def backend() -> Iterator[Backend]:
    with Backend() as running:
        yield running


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory: pytest.TempPathFactory, backend: Backend) -> Iterator[Program]:
    folder = tmp_path_factory.mktemp("trouble")
    with Program(
        write_configuration(folder, backend.address, gate={"scope_required_from": "medium"})
    ) as running:
        yield running


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "command", ["config schema", "--version", "status", "scopes list", "store backup", "log export"]
)
def test_on_a_full_disk_every_command_ends_with_a_sentence(
    sidecar: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, unbuffered: str
) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    config = ("--config", str(sidecar.config))
    asked = {
        "status": ("--admin", at(sidecar.admin)),
        "scopes list": ("--admin", at(sidecar.admin), "--json"),
        "store backup": (str(tmp_path / "copy.db"), *config),
        "log export": config,
    }
    issue_scope(sidecar.data)
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "sidecar", *command.split(), *asked.get(command, ())],
            cwd=PROJECT,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=30,
            check=False,
        )
    assert ended.returncode == 1, ended
    assert len(ended.stderr.splitlines()) == 1, ended.stderr
    assert re.match(
        r"scopegate: (standard output cannot be written|cannot write to standard output)", ended.stderr
    )
    assert "No space left on device" in ended.stderr
    if command == "store backup":
        assert (tmp_path / "copy.db").exists()


# Wrong usage ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("decisions", "list", "--incident-id", "x" * 9_000), "1 to 256 printable characters"),
        (("decisions", "tail", "--scope-id", "x" * 257), "1 to 256 printable characters"),
        (("scopes", "list", "--incident-id", "x" * 257), "1 to 256 printable characters"),
        (("scopes", "list", "--tenant", "x" * 257), "1 to 256 printable characters"),
        (("decisions", "list", "--run-id", "x" * 9_000), "give shorter values"),
        (("executions", "list", "--before", "9" * 9_000), "give shorter values"),
    ],
)
def test_what_is_too_long_to_be_asked_is_wrong_usage(
    sidecar: Program, arguments: tuple[str, ...], said: str
) -> None:
    ended = scopegate(*arguments, "--admin", at(sidecar.admin))
    assert (ended.returncode, ended.stdout) == (2, "")
    assert said in ended.stderr


def test_the_id_only_and_json_are_not_asked_for_together(sidecar: Program) -> None:
    ended = scopegate(
        *("scopes", "create", "-q", "--json", "--admin", at(sidecar.admin), "--data", at(sidecar.data)),
        *("--incident-id", "inc_both", "--action", "retry_agent", "--intent", "why"),
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "give --quiet or --json, not both" in ended.stderr
    listed = scopegate("scopes", "list", "--admin", at(sidecar.admin), "--incident-id", "inc_both")
    assert listed.stderr == "There is no such scope.\n"


# Why: the last column of decisions --------------------------------------------------------------------------


def why(sidecar: Program, incident: str) -> dict[str, str]:
    """The last column, by event: the newest of each."""
    ended = scopegate("decisions", "list", "--admin", at(sidecar.admin), "--incident-id", incident)
    assert (ended.returncode, ended.stderr) == (0, "")
    head, *rows = ended.stdout.splitlines()
    begin = head.index("WHY")
    return {row.split()[1]: row[begin:] for row in reversed(rows)}


RULES = """\
rules:
  - {id: not-for-five, on: execute, match: {incident_id: [inc_5]}, effect: deny, reason: frozen}
  - {id: rehearsed, on: execute, mode: shadow, match: {incident_id: [inc_6]}, effect: deny, reason: soon}
"""


def test_the_last_column_says_rules_what_would_be_refused_and_what_it_cost(
    tmp_path: Path, backend: Backend
) -> None:
    config = write_configuration(tmp_path, backend.address, gate={"scope_required_from": "medium"})
    (tmp_path / "policies" / "rules.yaml").write_text(RULES)
    with Program(config) as sidecar:
        for incident in ("inc_5", "inc_6"):
            scope_id = issue_scope(sidecar.data, incident=incident, cost=0.02)
            ask_json(sidecar.data, "POST", EXECUTE, execution(scope_id, incident=incident))
        bare = {"incident_id": "inc_7", "action": "retry_agent"}
        assert ask_json(sidecar.data, "POST", EXECUTE, bare).status == 200
        assert why(sidecar, "inc_5")["refused"] == "policy_denied; rules not-for-five"
        assert why(sidecar, "inc_6")["admitted"] == "would refuse: rehearsed"
        assert why(sidecar, "inc_6")["settled"] == "cost 0.001 USD"
        assert why(sidecar, "inc_7")["admitted"] == "without a scope"
        listed = scopegate("decisions", "list", "--admin", at(sidecar.admin), "--scope-id", scope_id)
        assert all(scope_id[:14] in row for row in listed.stdout.splitlines()[1:])
        following = ("decisions", "tail", "--incident-id", "inc_6", "--interval", "0.1")
        tail = subprocess.Popen(
            [sys.executable, "-m", "sidecar", *following, "--admin", at(sidecar.admin)],
            cwd=PROJECT,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert tail.stdout is not None
            lines = [tail.stdout.readline() for _ in range(3)]
        finally:
            tail.kill()
            tail.communicate()
        assert [scope_id[:14] in line for line in lines] == [True] * 3
        assert lines[1].endswith("  would refuse: rehearsed\n")


def test_a_cost_above_its_hold_is_said_to_be_an_overrun(tmp_path: Path, backend: Backend) -> None:
    config = write_configuration(tmp_path, backend.address)
    actions = tmp_path / "policies" / "actions.yaml"
    actions.write_text("actions:\n  retry_agent: {risk: low, max_cost_usd: 0.0005}\n")
    with Program(config) as sidecar:
        scope_id = issue_scope(sidecar.data)
        assert ask_json(sidecar.data, "POST", EXECUTE, execution(scope_id)).status == 200
        assert why(sidecar, "inc-1")["settled"] == "cost 0.001 USD (overrun)"
