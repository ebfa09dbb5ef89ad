"""`scopegate decisions` against the running program: list, show, and follow over whatever happens to it."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sidecar.core.shortid import short_id
from tests.acceptance.conftest import (
    EXECUTE,
    PROJECT,
    Backend,
    Program,
    ask,
    ask_json,
    execution,
    issue_scope,
    scopegate,
    write_configuration,
)
from tests.support import unused_port


@pytest.fixture(scope="module")
def backend() -> Iterator[Backend]:
    with Backend() as running:
        yield running


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory: pytest.TempPathFactory, backend: Backend) -> Iterator[Program]:
    config = write_configuration(tmp_path_factory.mktemp("decisions"), backend.address)
    with Program(config) as running:
        yield running


def at(sidecar: Program) -> str:
    return f"{sidecar.admin[0]}:{sidecar.admin[1]}"


def decisions(sidecar: Program, *arguments: str) -> subprocess.CompletedProcess[str]:
    command, *others = arguments
    return scopegate("decisions", command, "--admin", at(sidecar), *others)


def listed(sidecar: Program, *arguments: str) -> list[dict[str, Any]]:
    ended = decisions(sidecar, "list", "--json", *arguments)
    assert (ended.returncode, ended.stderr) == (0, "")
    found: list[dict[str, Any]] = json.loads(ended.stdout)["decisions"]
    return found


def spent(sidecar: Program, incident: str) -> str:
    """A scope that was issued, spent, and asked for once too often: four records."""
    scope_id = issue_scope(sidecar.data, incident=incident)
    for status in (200, 400):
        answer = ask_json(sidecar.data, "POST", EXECUTE, execution(scope_id, incident=incident))
        assert answer.status == status
    return scope_id


# Lists --------------------------------------------------------------------------------------------------


def test_decisions_are_listed_newest_first_with_whole_ids(sidecar: Program) -> None:
    scope_id = spent(sidecar, "inc_list")
    ended = decisions(sidecar, "list", "--incident-id", "inc_list")
    assert (ended.returncode, ended.stderr) == (0, "")
    head, *rows = ended.stdout.splitlines()
    assert head.split() == ["TIME", "EVENT", "OUTCOME", "ACTION", "INCIDENT", "SCOPE", "DECISION", "WHY"]
    assert [row.split()[1] for row in rows] == ["refused", "settled", "admitted", "issued"]
    assert rows[0].endswith("scope_exhausted")
    assert all(re.search(r"  [0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}(  |$)", row) for row in rows)
    assert len(listed(sidecar, "--scope-id", scope_id)) == 4


@pytest.mark.parametrize(
    ("wanted", "events"),
    [
        (("--event", "issued"), ["issued"]),
        (("--outcome", "blocked"), ["refused"]),
        (("--type", "recovery"), ["settled"]),
        (("--type", "policy", "--outcome", "selected"), ["admitted", "issued"]),
        (("--tenant", "default", "--limit", "1"), ["refused"]),
        (("--tenant", "nobody"), []),
        (("--request-id", "none"), []),
        (("--run-id", "none"), []),
    ],
)
def test_filters_narrow_each_other(sidecar: Program, wanted: tuple[str, ...], events: list[str]) -> None:
    incident = f"inc_{abs(hash(wanted))}"
    spent(sidecar, incident)
    found = listed(sidecar, "--incident-id", incident, *wanted)
    assert [record["event"] for record in found] == events


def test_a_grant_shows_its_actions_its_intent_and_who_asked(sidecar: Program) -> None:
    ended = scopegate(
        *("scopes", "create", "--admin", at(sidecar), "--data", f"{sidecar.data[0]}:{sidecar.data[1]}"),
        *("--incident-id", "inc_who", "--action", "retry_agent"),
        *("--intent", "The pod does not answer", "--created-by", "alice"),
    )
    assert ended.returncode == 0, ended
    (row,) = decisions(sidecar, "list", "--incident-id", "inc_who").stdout.splitlines()[1:]
    assert "  retry_agent  " in row
    assert row.endswith("  The pod does not answer; by alice")


def test_tables_show_how_an_execution_ended_and_json_what_is_recorded(sidecar: Program) -> None:
    scope_id = spent(sidecar, "inc_words")
    shown = decisions(sidecar, "list", "--scope-id", scope_id).stdout
    assert [row.split()[1:3] for row in shown.splitlines()[1:3]] == [
        ["refused", "by"],
        ["settled", "answered"],
    ]
    assert "selected" not in shown
    assert [one["decision_outcome"] for one in listed(sidecar, "--scope-id", scope_id)] == [
        "blocked",
        *["selected"] * 3,
    ]


def test_requests_that_no_route_lists_are_shown_with_method_and_path(
    backend: Backend, tmp_path: Path
) -> None:
    unlisted = {"reads": "refuse", "writes": "record", "except": ["/healthz"]}
    with Program(write_configuration(tmp_path, backend.address, gate={"unlisted": unlisted})) as sidecar:
        assert ask_json(sidecar.data, "POST", "/pods/cart-0?token=secret", {}).status == 200
        assert ask(sidecar.data, "GET", "/pods").status == 403
        assert ask_json(sidecar.data, "POST", "/healthz", {}).status == 200
        shown = decisions(sidecar, "list").stdout.splitlines()
        assert [line.split()[1] for line in shown[1:]] == ["refused", "unlisted"]
        assert shown[1].endswith("  not_listed; GET /pods")
        assert shown[2].endswith("  POST /pods/cart-0")
        (passed,) = listed(sidecar, "--event", "unlisted")
        assert passed["decision_outcome"] == "selected"
        assert listed(sidecar, "--type", "policy", "--outcome", "selected") == [passed]
        one = decisions(sidecar, "show", passed["decision_id"])
        assert one.returncode == 0
        assert "secret" not in one.stdout
        state = scopegate("status", "--admin", at(sidecar)).stdout
        assert re.search(r"not listed +reads refuse, writes record, except /healthz\n", state)
        verified = scopegate("log", "verify", "--config", str(sidecar.config))
        assert verified.returncode == 0, verified


def test_an_action_and_a_time_narrow_a_list(sidecar: Program) -> None:
    spent(sidecar, "inc_since")
    wanted = ("--incident-id", "inc_since")
    assert len(listed(sidecar, *wanted, "--action", "retry_agent", "--since", "1h")) == 3
    assert len(listed(sidecar, "--action", "retry_agent", "--since", "7d", "--limit", "3")) == 3
    for since in ("0s", "9999-01-01T00:00:00Z"):
        assert listed(sidecar, *wanted, "--since", since) == []
    assert listed(sidecar, *wanted, "--action", "none") == []
    wrong = decisions(sidecar, "list", "--since", "yesterday")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "'--since'" in wrong.stderr


def test_an_empty_list_says_so_where_programs_do_not_read(sidecar: Program) -> None:
    ended = decisions(sidecar, "list", "--incident-id", "inc_nothing")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "There is no such decision.\n")


def test_one_decision_is_shown_with_its_hash_and_its_execution(sidecar: Program) -> None:
    scope_id = spent(sidecar, "inc_one")
    (admitted,) = listed(sidecar, "--scope-id", scope_id, "--event", "admitted")
    ended = decisions(sidecar, "show", admitted["decision_id"])
    assert (ended.returncode, ended.stderr) == (0, "")
    whole = json.loads(decisions(sidecar, "show", admitted["decision_id"], "--json").stdout)
    assert f"hash       {whole['hash']}\n" in ended.stdout
    assert f"previous   {whole['previous_hash']}\n" in ended.stdout
    assert f"scope      {short_id(scope_id)}\n" in ended.stdout
    assert "\ndetails\n" in ended.stdout
    assert f"\nexecution  {admitted['decision_id']}\nstatus     answered\n" in ended.stdout
    assert "cost       0.001 USD\n" in ended.stdout
    unknown = decisions(sidecar, "show", "none")
    assert (unknown.returncode, unknown.stdout) == (1, "")
    assert "scopegate: decision_not_found: " in unknown.stderr


def test_what_others_wrote_moves_no_cursor(sidecar: Program) -> None:
    scope_id = issue_scope(sidecar.data, incident="inc_esc")
    body = execution(scope_id, incident="inc_esc")
    body["parameters"] = {"\x1b[2J": "\x9b31m \u202eback\r\n\x7f", "list": ["\x1b]0;title\x07"]}
    answer = ask_json(sidecar.data, "POST", EXECUTE, body)
    (decision_id,) = answer.headers("Scopegate-Decision-Id")
    for ended in (
        decisions(sidecar, "show", decision_id),
        decisions(sidecar, "show", decision_id, "--json"),
        decisions(sidecar, "list", "--incident-id", "inc_esc"),
    ):
        assert (ended.returncode, ended.stderr) == (0, "")
        assert decision_id in ended.stdout
        assert ended.stdout.replace("\n", "").isprintable(), ended.stdout


def test_on_a_terminal_long_reasons_are_cut_and_ids_are_not(sidecar: Program) -> None:
    spent(sidecar, "inc_terminal")
    asked = ["decisions", "list", "--admin", at(sidecar), "--incident-id", "inc_terminal"]
    shown = _on_a_terminal(asked, columns=128).splitlines()
    (refused,) = [line for line in shown if "  refused " in line]
    assert re.search(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}  sc\w*\u2026$", refused), shown
    narrow = _on_a_terminal(asked, columns=40)
    assert len(re.findall(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", narrow)) == 4


def _on_a_terminal(arguments: list[str], *, columns: int) -> str:
    """What the command prints where standard output is a terminal of so many columns."""
    ours, theirs = pty.openpty()
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "sidecar", *arguments],
            cwd=PROJECT,
            stdout=theirs,
            env={**os.environ, "COLUMNS": str(columns)},
        )
        os.close(theirs)
        told = b""
        while True:
            try:
                piece = os.read(ours, 65_536)
            except OSError:  # the other end is closed
                piece = b""
            if not piece:
                break
            told += piece
        assert process.wait(20) == 0
        return told.decode().replace("\r\n", "\n")
    finally:
        os.close(ours)


# Following ----------------------------------------------------------------------------------------------


class Tail:
    """`scopegate decisions tail` as a process, and what it said so far."""

    def __init__(self, process: subprocess.Popen[bytes], said: Path, told: Path) -> None:
        self.process = process
        self._said = said
        self._told = told

    def records(self) -> list[dict[str, Any]]:
        whole = self._said.read_text().rpartition("\n")[0]
        return [json.loads(line) for line in whole.splitlines()]

    def errors(self) -> str:
        return self._told.read_text()

    def until(self, what: str, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < end, (what, self._said.read_text(), self.errors())
            assert self.process.poll() is None, (what, self.errors())
            time.sleep(0.02)


@contextmanager
def tail(folder: Path, *arguments: str) -> Iterator[Tail]:
    said, told = folder / "said", folder / "told"
    with said.open("wb") as stdout, told.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "sidecar", "decisions", "tail", "--interval", "0.1", *arguments],
            cwd=PROJECT,
            stdout=stdout,
            stderr=stderr,
        )
    try:
        yield Tail(process, said, told)
    finally:
        process.kill()
        process.wait()


def test_the_newest_come_first_and_then_each_new_one_once(sidecar: Program, tmp_path: Path) -> None:
    spent(sidecar, "inc_tail")
    before = listed(sidecar, "--incident-id", "inc_tail")[:2][::-1]
    with tail(
        tmp_path, "--admin", at(sidecar), "--json", "-n", "2", "--incident-id", "inc_tail"
    ) as following:
        following.until("the newest two", lambda: len(following.records()) == 2)
        assert following.records() == before
        for _ in range(3):
            spent(sidecar, "inc_tail")
            spent(sidecar, "inc_other")
        following.until("all that came", lambda: len(following.records()) == 2 + 12)
        time.sleep(0.3)
        assert following.records() == listed(sidecar, "--incident-id", "inc_tail")[:14][::-1]
        following.process.send_signal(signal.SIGINT)
        assert following.process.wait(10) == 0
        assert following.errors() == ""


def test_more_than_a_page_at_once_comes_whole_and_in_order(sidecar: Program, tmp_path: Path) -> None:
    with tail(tmp_path, "--admin", at(sidecar), "--json", "-n", "0", "--event", "emitted") as following:
        body = {"run_id": "r", "budget_requested": 1, "budget_available": 2, "enforcement": "hard"}

        def emits_and_shows() -> bool:
            assert ask_json(sidecar.admin, "POST", "/api/v1/decisions/budget", body).status == 201
            return bool(following.records())

        following.until("has begun", emits_and_shows)
        os.kill(following.process.pid, signal.SIGSTOP)
        for _ in range(250):
            assert ask_json(sidecar.admin, "POST", "/api/v1/decisions/budget", body).status == 201
        os.kill(following.process.pid, signal.SIGCONT)
        (newest,) = listed(sidecar, "--event", "emitted", "--limit", "1")
        following.until("all of them", lambda: following.records()[-1]["seq"] == newest["seq"])
        seqs = [record["seq"] for record in following.records()]
    assert len(seqs) > 250
    shown = listed(sidecar, "--event", "emitted", "--limit", str(len(seqs)))
    assert seqs == [record["seq"] for record in shown][::-1]


def test_it_goes_on_over_a_restart_and_loses_nothing(backend: Backend, tmp_path: Path) -> None:
    listen = f"127.0.0.1:{unused_port()}"
    with Program(write_configuration(tmp_path, backend.address, admin={"listen": listen})) as sidecar:
        spent(sidecar, "inc_restart")
        with tail(tmp_path, "--config", str(sidecar.config), "--json", "-n", "1") as following:
            following.until("the newest", lambda: len(following.records()) == 1)
            sidecar.kill()
            following.until("that it is away", lambda: "trying again" in following.errors())
            sidecar.start()
            spent(sidecar, "inc_restart")
            following.until("what came since", lambda: len(following.records()) >= 5)
            time.sleep(0.3)
            assert following.records() == listed(sidecar, "--limit", "5")[::-1]
            assert sidecar.stop() == 0
            following.until("that it is away again", lambda: following.errors().count("trying") == 2)
            following.process.send_signal(signal.SIGINT)
            assert following.process.wait(10) == 0
            said = following.errors().splitlines()
    assert len(said) == 3, said
    assert said[0].startswith(f"scopegate: no sidecar answers on {listen} (")
    assert said[1] == "scopegate: it answers again"


def test_for_people_each_record_is_a_line(sidecar: Program, tmp_path: Path) -> None:
    spent(sidecar, "inc_lines")
    with tail(tmp_path, "--admin", at(sidecar), "--incident-id", "inc_lines") as following:
        said = tmp_path / "said"
        following.until("four lines", lambda: said.read_text().count("\n") == 4)
        events = [line.split()[1] for line in said.read_text().splitlines()]
    assert events == ["issued", "admitted", "settled", "refused"]
