"""Every command that the README, the reference and the help pages show is run as it stands there.

It is run in a folder with the shipped `config/` and `policies/`, beside a running sidecar with a past. Only
addresses (by free ports), folders of the system (by ones of the test) and ids that end in dots are replaced.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from sidecar.auth import tokenfile
from sidecar.auth.tokens import Token, digest_of
from tests.acceptance.conftest import (
    EXECUTE,
    PROJECT,
    START_SECONDS,
    STOP_SECONDS,
    Address,
    Backend,
    Program,
    ask,
    ask_json,
)
from tests.tools import tool
from tests.unit.test_docs import ALL_COMMANDS, PAGES, README, named_files

# The other pages of config/ and tests/ are held to what they show by tests of their own, or run by hand.
READ = [
    name
    for name in PAGES
    if name
    in ("README.md", "SECURITY.md", "policies/README.md", "config/deploy/README.md", "tests/README.md")
    or name.startswith("config/reference/")
]

# What is not run here, and why.
ELSEWHERE = {
    r"python3 -m venv ": "installs packages: .ci/run does it, from the same lines",
    r"\.venv/bin/": "what .ci/run does",
    r"docker ": "needs a container engine; tests/long/image.py takes the image's steps by hand",
    r"(until )?kubectl |as_operator |CONFIG=": (
        "needs a cluster; tests/unit/test_deploy.py validates what is applied"
    ),
    r"systemctl ": "needs systemd as the first process; tests/unit/test_deploy.py verifies the unit",
    r"SCOPEGATE_TOKEN_FILE=": "needs a sidecar on another host; tests/unit and tests/gate present tokens",
    r"sudo -u scopegate ": "needs the unit's user; the same commands stand in config/reference/backup.md",
}
# These go on until somebody ends them.
ENDLESS = re.compile(r"scopegate (run|demo(?! --once)|decisions tail)\b")
# What ends with 1, and says why: an execution that the scope does not allow, and the shipped configuration,
# which has no method of authentication.
MAY_REFUSE = re.compile(r"scopegate (explain|doctor)\b")


@dataclass(frozen=True)
class Shown:
    """A command, what it needs of the same block before it, and the status that is shown as its answer."""

    place: str
    text: str
    before: str = ""
    status: str | None = None

    def __str__(self) -> str:
        return f"{self.place}: {self.text[:70]}"


def of_page(page: str) -> Iterator[Shown]:
    for block in re.findall(r"^```sh\n(.+?)^```$", PAGES[page], re.MULTILINE | re.DOTALL):
        lines = re.sub(r"\\\n\s*", " ", block).splitlines()
        # An answer that is shown stands in a comment behind its request.
        answers = {
            index: found[1]
            for index, line in enumerate(lines)
            if (found := re.match(r"\s*# (\d{3})\b", line))
        }
        before, begun = "", ""
        for index, line in enumerate(lines):
            begun = f"{begun}\n{line}" if begun else line
            if line.lstrip().startswith("#") or not line.strip():
                begun = ""
            elif is_whole(begun):
                yield Shown(page, begun, before, answers.get(index + 1))
                if re.match(r"\w+=\$\(", begun):
                    before += begun + "\n"
                begun = ""
        assert not begun, f"not a whole command: {begun}"


def is_whole(text: str) -> bool:
    try:
        shlex.split(text, comments=True)
    except ValueError:
        return False
    return not text.rstrip().endswith("|")


def of_help() -> Iterator[Shown]:
    for name, command in ALL_COMMANDS.items():
        epilog = re.sub(r"\\\n\s*", " ", command.epilog or "")
        examples = re.split(r"^Examples?:$", epilog, maxsplit=1, flags=re.MULTILINE)
        lines = [line for line in examples[-1].splitlines() if line.startswith("  scopegate ")]
        assert lines, f"the help of {name} has no example"
        # What explains an example stands behind three blanks.
        yield from (Shown(name, re.split(r"\s{3,}", line.strip())[0]) for line in lines)


OF_PAGES = [shown for page in READ for shown in of_page(page)]
ALL = {shown.before + shown.text: shown for shown in (*OF_PAGES, *of_help())}
RUN = [shown for shown in ALL.values() if not re.match("|".join(ELSEWHERE), shown.text)]


class Stage:
    """The folder in which the commands are run, and the sidecar beside them."""

    def __init__(self, folder: Path, environment: dict[str, str], sidecar: Program, backend: Backend) -> None:
        self.folder, self.environment, self.sidecar, self._backend = folder, environment, sidecar, backend

    def admitted(self) -> str:
        """An execution that went well."""
        scope = self.scope()
        answer = ask_json(self.sidecar.data, "POST", EXECUTE, self._body(scope))
        assert answer.status == 200, answer
        return answer.headers("Scopegate-Decision-Id")[0]

    def refused(self) -> None:
        answer = ask_json(
            self.sidecar.data, "POST", EXECUTE, {"incident_id": "inc_123", "action": "retry_agent"}
        )
        assert answer.status == 400, answer

    def unknown(self) -> str:
        """An execution of which nobody knows how it ended."""
        self._backend.go_on.clear()
        try:
            answer = ask_json(self.sidecar.data, "POST", EXECUTE, self._body(self.scope()))
        finally:
            self._backend.go_on.set()
        assert answer.status == 504, answer
        return answer.headers("Scopegate-Decision-Id")[0]

    def frozen(self) -> str:
        """A freeze of nothing that the commands do."""
        terms = {"match": {"action": "none"}, "reason": "what unfreeze is about"}
        answer = ask_json(self.sidecar.admin, "POST", "/api/v1/freezes", terms)
        assert answer.status == 201, answer
        return str(answer.json()["freeze_id"])

    def scope(self) -> str:
        terms = {
            "incident_id": "inc_123",
            "allowed_actions": ["retry_agent", "restart_pod"],
            "intent": "what the commands of the documentation are about",
            "max_attempts": 3,
        }
        answer = ask_json(self.sidecar.data, "POST", "/api/v1/recovery/scope", terms)
        assert answer.status == 201, answer
        return str(answer.json()["scope_id"])

    @staticmethod
    def _body(scope: str) -> dict[str, object]:
        return {"scope_id": scope, "incident_id": "inc_123", "action": "retry_agent"}

    def put_in_place(self, text: str) -> str:
        """The command, with what exists here for what stands for it there."""
        cron = r"^[\d*]+( [\d*]+){4} scopegate /opt/scopegate/bin/(.+)$"  # times, user, command
        text = re.sub(cron, lambda found: found[2].replace("\\%", "%"), text)
        for name in ("/etc/scopegate", "/backup"):
            text = text.replace(f"{name}/", f"{self.folder}{name}/")
        if "scope_..." in text:
            text = text.replace("scope_...", self.scope())
        if "0192..." in text:
            made = (
                self.unknown
                if " reconcile " in text
                else self.frozen
                if "unfreeze" in text
                else self.admitted
            )
            text = text.replace("0192...", made())
        data = ANY_PORT if "scopegate run" in text else self.sidecar.data
        addresses = {"8000": data, "8999": data, "9901": self.sidecar.admin, "9902": self.sidecar.ops}
        for port, address in addresses.items():
            text = text.replace(f"127.0.0.1:{port}", f"127.0.0.1:{address[1]}")
        return text

    def start(self, text: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["sh", "-ec", text],
            cwd=self.folder,
            env={**self.environment, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


def listen_variables(data: Address, admin: Address, ops: Address) -> dict[str, str]:
    return {
        f"SCOPEGATE_{name}__LISTEN": f"{host}:{port}"
        for name, (host, port) in {"DATA": data, "ADMIN": admin, "OPS": ops}.items()
    }


ANY_PORT: Address = ("127.0.0.1", 0)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("commands")
    for name in ("config", "policies"):
        shutil.copytree(PROJECT / name, folder / name, ignore=shutil.ignore_patterns("var"))
    shutil.copytree(folder / "policies", folder / "new")
    # The file of "Put it before your own service", which lies beside its policies.
    (own,) = re.findall(r"^```yaml\n(# scopegate\.yaml.+?)^```$", README, re.MULTILINE | re.DOTALL)
    (folder / "scopegate.yaml").write_text(own)
    for name, text in named_files("config/reference/routes.md").items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    for name in ("etc/scopegate", "backup", "bin"):
        (folder / name).mkdir(parents=True)
    (folder / "etc/scopegate/scopegate.yaml").write_text(own)
    (folder / "etc/scopegate/policies").symlink_to(folder / "policies")
    shutil.copy(PROJECT / "tests/openapi/galaxy.yaml", folder / "openapi.yaml")
    (folder / "body.json").write_text('{"incident_id": "inc_123", "action": "restart_pod"}')
    command = folder / "bin/scopegate"
    command.write_text(f'#!/bin/sh\nPYTHONPATH={PROJECT} exec {sys.executable} -m sidecar "$@"\n')
    command.chmod(0o755)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("SCOPEGATE_")},
        "PATH": f"{command.parent}:{os.environ['PATH']}",
        "HOME": str(folder),
        "COLUMNS": "100",
    }
    made = subprocess.run(
        [command, "log", "keygen", folder / "log.key"], env=environment, capture_output=True, check=False
    )
    assert made.returncode == 0, made
    of_the_stage = {
        "SCOPEGATE_STORE__URL": f"sqlite:///{folder}/var/scopegate.db",
        "SCOPEGATE_LOG__SIGNING_KEY_FILE": f"{folder}/log.key",
        "SCOPEGATE_LOG__CHECKPOINT_FILE": f"{folder}/checkpoints.jsonl",
    }
    with Backend() as backend, pytest.MonkeyPatch.context() as patch:
        started = {
            **of_the_stage,
            **listen_variables(ANY_PORT, ANY_PORT, ANY_PORT),
            "SCOPEGATE_UPSTREAM__URL": f"http://127.0.0.1:{backend.address[1]}",
            "SCOPEGATE_UPSTREAM__RESPONSE_TIMEOUT_SECONDS": "0.6",
        }
        for name, value in started.items():
            patch.setenv(name, value)
        program = Program(folder / "config/scopegate.yaml")
        with program:
            environment |= of_the_stage | listen_variables(program.data, program.admin, program.ops)
            staged = Stage(folder, environment, program, backend)
            # A past: one executed, one refused, one of which nobody knows.
            staged.admitted()
            staged.refused()
            staged.unknown()
            yield staged
            assert ask(program.ops, "GET", "/health/live").status == 200


@pytest.mark.parametrize(
    "shown",
    [one if one.place == "README.md" else pytest.param(one, marks=pytest.mark.slow) for one in RUN],
    ids=str,
)
def test_a_command_that_is_shown_works_as_it_stands(stage: Stage, shown: Shown) -> None:
    for program in ("curl", "jq"):
        if re.search(rf"\b{program}\b", shown.text):
            tool(program)
    for made in ("etc/scopegate/log.key", "etc/scopegate/log.key.pub", "backup/scopegate.db"):
        (stage.folder / made).unlink(missing_ok=True)
    # The commands of tokens find two of ci, one of them made long ago.
    tokens = stage.folder / "tokens.yaml"
    for file in (tokens, stage.folder / "ci.token"):
        file.unlink(missing_ok=True)
    old = [Token(name="ci", digest=digest_of(made), created_at=0) for made in ("sg_one", "sg_two")]
    tokenfile.change(tokens, lambda _: old)
    environment = {}
    if shown.text.startswith("scopegate auth "):
        environment["SCOPEGATE_AUTH__TOKENS__FILE"] = str(tokens)
    text = stage.put_in_place(shown.before + shown.text)
    if ENDLESS.search(text):
        ended_by_hand(stage, text)
        return
    process = stage.start(text, **environment)
    try:
        output, _ = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    expected = (0, 1) if MAY_REFUSE.search(text) else (0,)
    assert process.returncode in expected, f"{text}\n{output}"
    assert "Traceback" not in output
    if "curl" in text:
        assert "curl: (" not in output
        assert '"internal_error"' not in output
    if shown.status is not None and "curl -i " in text:
        assert re.search(rf"^HTTP/1\.1 {shown.status}\b", output, re.MULTILINE), output


def ended_by_hand(stage: Stage, text: str) -> None:
    """Until it has something to say, then Ctrl-C; well ended is 0."""
    own = {"SCOPEGATE_STORE__URL": f"sqlite:///{stage.folder}/own/scopegate.db"}
    own |= listen_variables(ANY_PORT, ANY_PORT, ANY_PORT)
    for key in ("SIGNING_KEY_FILE", "CHECKPOINT_FILE"):
        own[f"SCOPEGATE_LOG__{key}"] = "null"
    process = stage.start(f"exec {text}", **({} if "tail" in text else own))
    assert process.stdout is not None
    # A sidecar listens on data last of all; the others are at work once they say anything.
    at_work = re.compile(r"listener[\": =]+data" if "scopegate run" in text else r".")
    said = ""
    try:
        os.set_blocking(process.stdout.fileno(), False)
        end = time.monotonic() + START_SECONDS
        while not at_work.search(said):
            if time.monotonic() > end or process.poll() is not None:
                pytest.fail(f"{text}: not at work ({process.poll()}):\n{said}")
            time.sleep(0.02)
            with suppress(BlockingIOError):
                said += os.read(process.stdout.fileno(), 1 << 16).decode()
            if "tail" in text:
                stage.admitted()
                stage.refused()
        process.send_signal(signal.SIGINT)
        assert process.wait(STOP_SECONDS) == 0, said
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        process.stdout.close()


def test_what_is_not_run_here_is_shown_somewhere() -> None:
    left = [shown.text for shown in ALL.values() if shown not in RUN]
    assert [pattern for pattern in ELSEWHERE if not any(re.match(pattern, text) for text in left)] == []


def test_commands_are_found_on_every_page_that_shows_some() -> None:
    assert {shown.place for shown in OF_PAGES} == {name for name in READ if "\n```sh\n" in PAGES[name]}
    assert {"README.md", "policies/README.md", "config/deploy/README.md"} <= {one.place for one in OF_PAGES}


def test_commands_of_the_readme_that_install_are_those_of_ci() -> None:
    ci = (PROJECT / ".ci/run").read_text(encoding="utf-8")
    for purpose in ("test", "demo"):
        assert f"<!-- {purpose} command -->" in ci
    checks = re.findall(r"\.venv/bin/(ruff|mypy|lint-imports)\b( \w+)?", PAGES["tests/README.md"])
    assert checks
    assert [name + word for name, word in checks if f'"$bin/{name}"{word}' not in ci] == []
