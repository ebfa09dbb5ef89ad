"""The pages of config/cookbook: each folder is copied, started, walked through and stopped, as readers do."""

from __future__ import annotations

import ast
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.conftest import PROJECT, Backend, scopegate
from tests.described import DOCUMENT
from tests.tools import tool

pytestmark = pytest.mark.slow

COOKBOOK = PROJECT / "config" / "cookbook"
FOLDERS = sorted(folder.name for folder in COOKBOOK.iterdir() if (folder / "run.sh").exists())
# Programs that have to be there, and the variable by which a page's run.sh finds them.
PROGRAMS = {"node": ("NODE", "node"), "nginx": ("NGINX", "nginx"), "envoy": ("ENVOY", "envoy")}
PORTS = {
    "GATE_PORT": 8000,
    "PROXY_PORT": 8080,
    "BACKEND_PORT": 9000,
    "ADMIN_PORT": 9901,
    "OPS_PORT": 9902,
    "ENVOY_ADMIN_PORT": 9903,
}

READY_SECONDS = 30.0
WALK_SECONDS = 60.0
STOP_SECONDS = 15.0


class Page:
    """A copy of one folder, on free ports, with this interpreter and this tree's scopegate."""

    def __init__(self, name: str, place: Path) -> None:
        tool("curl")
        self.folder = place / name
        shutil.copytree(COOKBOOK / name, self.folder, ignore=shutil.ignore_patterns("__pycache__"))
        self.temporary = place / "temporary"
        self.temporary.mkdir()
        programs = place / "programs"
        programs.mkdir()
        command = programs / "scopegate"
        command.write_text(f"#!/bin/sh\nPYTHONPATH='{PROJECT}' exec '{sys.executable}' -m sidecar \"$@\"\n")
        command.chmod(0o755)
        self.ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
        self.store = "sqlite:///var/scopegate.db"
        self.environment = {
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(place),
            "TMPDIR": str(self.temporary),
            "SCOPEGATE": str(command),
            "PYTHON": sys.executable,
            "SCOPEGATE_STORE__URL": self.store,
            **{variable: str(port) for variable, port in self.ports.items()},
        }
        if name in PROGRAMS:
            variable, program = PROGRAMS[name]
            self.environment[variable] = tool(program)
        self._log = place / "run.log"
        self._running: subprocess.Popen[bytes] | None = None

    def log(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def run(self, command: str) -> subprocess.CompletedProcess[str]:
        """A command line in the folder, to its end."""
        return subprocess.run(
            ["sh", "-eu", "-c", command],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=WALK_SECONDS,
            check=False,
        )

    def start(self) -> None:
        """Start run.sh; returns without waiting."""
        with self._log.open("wb") as output:
            self._running = subprocess.Popen(
                ["./run.sh"],
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def until_ready(self) -> None:
        assert self._running is not None
        end = time.monotonic() + READY_SECONDS
        while "\nReady: " not in f"\n{self.log()}":
            if self._running.poll() is not None or time.monotonic() > end:
                pytest.fail(f"run.sh does not get ready:\n{self.log()}")
            time.sleep(0.02)

    def wait(self) -> int:
        assert self._running is not None
        try:
            return self._running.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            pytest.fail(f"run.sh did not end within {STOP_SECONDS:g} s:\n{self.log()}")

    def stop(self) -> int:
        """Ask run.sh alone to end, as a supervisor would; what it started is its own to end."""
        assert self._running is not None
        self._running.send_signal(signal.SIGTERM)
        return self.wait()

    def left_running(self) -> bool:
        """Whether anything that run.sh started is still there."""
        assert self._running is not None
        end = time.monotonic() + 2.0
        while time.monotonic() < end:
            try:
                os.killpg(self._running.pid, 0)
            except ProcessLookupError:
                return False
            time.sleep(0.02)
        return True

    def clean_up(self) -> None:
        """Kill the session that `start` opened, whatever is left of it."""
        if self._running is not None:
            try:
                os.killpg(self._running.pid, signal.SIGKILL)
            except ProcessLookupError:
                return
            self._running.wait()


def free_ports(count: int) -> list[int]:
    """As many ports, each free a moment ago, and none that the system gives away by itself."""
    with ExitStack() as held:
        found: list[int] = []
        for port in random.sample(range(20_000, 30_000), 200):
            with suppress(OSError):
                held.enter_context(socket.create_server(("127.0.0.1", port)))
                found.append(port)
            if len(found) == count:
                return found
    pytest.fail("no free ports")


@pytest.fixture
def page(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Page]:
    copy = Page(request.param, tmp_path)
    try:
        yield copy
    finally:
        copy.clean_up()


def blocks(text: str) -> list[str]:
    """What stands in the blocks of shell commands of a page."""
    return re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def change(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def slow_but_one(names: Iterable[str]) -> list[Any]:
    """Pages as parameters. The everyday run takes one, because each starts a sidecar, a service and curls."""
    return [name if name == "flask" else pytest.param(name, marks=pytest.mark.slow) for name in names]


each_page = pytest.mark.parametrize("page", slow_but_one(FOLDERS), indirect=True)


@each_page
def test_a_page_runs_as_it_stands_and_all_that_it_says_holds(page: Page) -> None:
    page.start()
    page.until_ready()
    for _ in range(2):  # what the first walk left behind is in nobody's way
        walked = page.run("./try.sh")
        assert walked.returncode == 0, f"{walked.stdout}\n{page.log()}"
        assert walked.stdout.endswith("All of it holds.\n")
        assert walked.stdout.count("  ok ") >= 10

    start, walk, *further = blocks((page.folder / "README.md").read_text())
    assert (start, walk) == ("./run.sh\n", "./try.sh\n")
    for commands in further:
        for variable, port in PORTS.items():
            commands = commands.replace(f"127.0.0.1:{port}", f"127.0.0.1:{page.ports[variable]}")
        ran = page.run(commands)
        assert ran.returncode == 0, f"{commands}\n{ran.stdout}\n{page.log()}"

    assert page.stop() == 0, page.log()
    assert "Traceback" not in page.log()
    assert not page.left_running()
    assert list(page.temporary.iterdir()) == []
    verified = scopegate(
        "log", "verify", "--config", page.folder / "scopegate.yaml", "--set", f"store.url={page.store}"
    )
    assert verified.returncode == 0, verified.stderr
    records = re.search(r"(\d+) records", verified.stdout)
    assert records is not None
    assert int(records[1]) >= 6


@each_page
def test_a_page_keeps_nothing_unless_it_is_told_where(page: Page) -> None:
    del page.environment["SCOPEGATE_STORE__URL"]
    before = {file.name for file in page.folder.iterdir()}
    page.start()
    page.until_ready()
    assert any(page.temporary.rglob("scopegate.db"))
    assert page.stop() == 0
    assert {file.name for file in page.folder.iterdir()} - before <= {"__pycache__"}
    assert list(page.temporary.iterdir()) == []


@pytest.mark.parametrize("page", ["envoy"], indirect=True)
@pytest.mark.parametrize("variable", PORTS)
def test_a_port_that_is_taken_is_named_before_anything_starts(page: Page, variable: str) -> None:
    with Backend() as neighbour:
        page.environment[variable] = str(neighbour.server_port)
        page.start()
        assert page.wait() == 1
    assert page.log() == f"run.sh: port {neighbour.server_port} is taken; choose another one\n"
    assert list(page.temporary.iterdir()) == []


@each_page
def test_a_sidecar_that_does_not_start_ends_it_with_a_message_and_leaves_nothing_running(page: Page) -> None:
    page.environment["SCOPEGATE"] = "false"
    page.start()
    assert page.wait() == 1
    assert f"run.sh: nothing answers on http://127.0.0.1:{page.ports['OPS_PORT']}/health/ready" in page.log()
    assert not page.left_running()
    assert list(page.temporary.iterdir()) == []


@each_page
def test_the_walk_says_so_where_nothing_runs(page: Page) -> None:
    walked = page.run("./try.sh")
    assert walked.returncode == 1
    assert "start ./run.sh first" in walked.stdout


# What the pages warn of is true: with the line changed, their own walk fails.
UNDONE = {
    "fastapi": ("policies/actions.yaml", "max_attempts: 1}", "max_attempts: 2}"),
    "flask": ("scopegate.yaml", '"**/incidents', '"/incidents'),
    "nginx": ("nginx.conf.template", "proxy_pass http://gate;", "proxy_pass http://gate/;"),
    "envoy": (
        "envoy.template.yaml",
        "{cidr_ranges: [{address_prefix: 192.0.2.1, prefix_len: 32}]}",
        "{}",
    ),
    "agent": ("policies/roles.yaml", "issuer: {groups: [people]}", "issuer: {groups: [people, agents]}"),
}


@pytest.mark.parametrize("page", slow_but_one(UNDONE), indirect=True)
def test_the_walk_fails_where_a_line_that_matters_is_undone(page: Page) -> None:
    name, line, undone = UNDONE[page.folder.name]
    change(page.folder / name, line, undone)
    page.start()
    page.until_ready()
    walked = page.run("./try.sh")
    assert walked.returncode == 1, walked.stdout
    assert "FAILED" in walked.stdout


@pytest.mark.parametrize("page", ["flask"], indirect=True)
def test_even_a_wsgi_server_that_believes_its_neighbour_is_not_reached_around_the_gate(page: Page) -> None:
    change(page.folder / "gunicorn.conf.py", 'forwarded_allow_ips = ""', 'forwarded_allow_ips = "127.0.0.1"')
    change(page.folder / "scopegate.yaml", '"**/incidents', '"/incidents')
    page.start()
    page.until_ready()
    post = "curl -s -H 'Content-Type: application/json' -H 'SCRIPT_NAME: /elsewhere' -d '{}' "
    path = "/elsewhere/incidents/inc_1/actions/retry_agent/run"
    reached = page.run(f"{post} http://127.0.0.1:{page.ports['BACKEND_PORT']}{path}")
    assert "this did not come through the gate" in reached.stdout  # the view was: it takes the prefix off
    refused = page.run(f"{post} http://127.0.0.1:{page.ports['GATE_PORT']}{path}")
    assert '"override_refused"' in refused.stdout


# The files ------------------------------------------------------------------------------------------------


FILES = [
    COOKBOOK / "README.md",
    *sorted(
        file
        for name in FOLDERS
        for file in (COOKBOOK / name).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    ),
]
PAGES = [file for file in FILES if file.name == "README.md"]
SCRIPTS = [file for file in FILES if file.suffix == ".sh"]


def named(file: Path) -> str:
    return str(file.relative_to(COOKBOOK))


@pytest.mark.parametrize("script", SCRIPTS, ids=named)
def test_a_script_is_plain_sh_short_and_may_be_executed(script: Path) -> None:
    assert subprocess.run(["sh", "-n", script], check=False).returncode == 0
    assert os.access(script, os.X_OK)
    lines = script.read_text().splitlines()
    assert lines[0] == "#!/bin/sh"
    assert "set -eu" in lines
    assert script.name != "run.sh" or len(lines) <= 50


@pytest.mark.parametrize("file", FILES, ids=named)
def test_a_page_holds_on_any_machine_and_by_itself(file: Path) -> None:
    text = file.read_text()
    assert re.findall(r"(?<![\w.:/$}*])/(?:home|root|tmp|usr|opt|work|var|etc|Users)/[^\s]*", text) == []
    if file.name != "README.md":
        assert re.findall(r"""(?:^|[\s"'=(])\.\./""", text, re.MULTILINE) == []
    # Every port has the same default wherever it stands, and may be chosen.
    for variable, default in re.findall(r"\$\{(\w+_PORT):-?(\d+)\}", text):
        assert int(default) == PORTS[variable]


@pytest.mark.parametrize("file", PAGES, ids=named)
def test_a_page_names_only_files_that_are_there(file: Path) -> None:
    text = file.read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (file.parent / link).exists(), link
    for row in re.findall(r"^\| (`.*?`) \|", text, re.MULTILINE):
        for name in re.findall(r"`([^`]+)`", row):
            assert (file.parent / name).exists(), name
    for command in blocks(text):
        for name in re.findall(r"(?:\./|--config )([\w.]+)", command):
            assert (file.parent / name).exists(), name


def test_the_index_has_every_folder() -> None:
    index = (COOKBOOK / "README.md").read_text()
    assert re.findall(r"^\| \[(\w+)/\]\(\1/README\.md\)", index, re.MULTILINE) != []
    assert set(re.findall(r"^\| \[(\w+)/\]\(\1/README\.md\)", index, re.MULTILINE)) == set(FOLDERS)


# The agent's client ---------------------------------------------------------------------------------------


class Scripted(BaseHTTPRequestHandler):
    """In place of a gate: answers that only come about where something breaks, one for each execution."""

    protocol_version = "HTTP/1.1"
    server: ScriptedGate

    def do_GET(self) -> None:
        self.answer(200, "application/json", b'{"healthy": false}')

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.executions += 1
        answer = self.server.answers.pop(0)
        if answer is None:
            self.close_connection = True
        else:
            self.answer(*answer)

    def answer(self, status: int, content_type: str, body: bytes, retry_after: str | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        if retry_after is not None:
            self.send_header("Retry-After", retry_after)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nobody reads it."""


class ScriptedGate(ThreadingHTTPServer):
    answers: list[Any]
    executions = 0


STORE_UNAVAILABLE = b'{"error": "store_unavailable", "message": "The store does not answer."}'


def run_agent(answers: list[Any]) -> tuple[int, int, str]:
    """Its exit code, how often it executed, and what it said."""
    with ScriptedGate(("127.0.0.1", 0), Scripted) as gate:
        gate.answers = answers
        serving = threading.Thread(target=gate.serve_forever, kwargs={"poll_interval": 0.02})
        serving.start()
        try:
            ended = subprocess.run(
                [sys.executable, "agent.py", "--incident", "i", "--agent", "a", "--action", "retry_agent"],
                cwd=COOKBOOK / "agent",
                env={**os.environ, "GATE_PORT": str(gate.server_port), "PYTHONDONTWRITEBYTECODE": "1"},
                capture_output=True,
                text=True,
                timeout=WALK_SECONDS,
                check=False,
            )
        finally:
            gate.shutdown()
            serving.join()
    return ended.returncode, gate.executions, ended.stdout + ended.stderr


@pytest.mark.parametrize(
    "answer", [None, (502, "text/html", b"<h1>Bad Gateway</h1>"), (504, "application/json", b"{}")]
)
def test_the_agent_does_not_repeat_what_may_have_been_executed(answer: Any) -> None:
    code, executions, said = run_agent([answer])
    assert (code, executions) == (5, 1), said
    assert "it may have been executed" in said


def test_the_agent_waits_as_long_as_it_is_told_to_and_no_longer_than_is_sensible() -> None:
    problem = "application/problem+json"
    begun = time.monotonic()
    code, executions, said = run_agent(
        [(503, problem, STORE_UNAVAILABLE, "1"), (503, problem, STORE_UNAVAILABLE, "600")]
    )
    assert (code, executions) == (4, 2), said
    assert 1.0 <= time.monotonic() - begun < 30.0


def test_the_agent_knows_what_to_do_about_every_refusal_of_an_execution() -> None:
    tree = ast.parse((COOKBOOK / "agent" / "agent.py").read_text())
    (advice,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and node.targets[0].id == "ADVICE"
    )
    assert isinstance(advice, ast.Dict)
    known = {key.value for key in advice.keys if isinstance(key, ast.Constant)}
    responses = DOCUMENT.operation("execute")["responses"].values()
    problems = [each["content"].get("application/problem+json", {}) for each in responses]
    possible = {code for problem in problems for code in problem.get("examples", {})}
    # What no request of the agent's own making is answered with.
    strange = {"ambiguous_path", "override_refused", "upgrade_refused", "unsupported_media_type"}
    strange |= {"idempotency_in_flight", "idempotency_key_reused", "outcome_unknown"}  # it sends no key
    assert possible - known == {*strange, "body_timeout", "body_too_large", "internal_error"}
    assert known <= possible
