"""The first and the last moments of the program: signals during its start, and what it is started with.

Process 1 of a container ignores SIGTERM until it has a handler. So does every process that inherits an
ignored SIGTERM, which needs no privilege; where namespaces are permitted, a real process 1 is tested as well.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import pytest

from tests.acceptance.conftest import (
    EXECUTE,
    PROJECT,
    START_SECONDS,
    STOP_SECONDS,
    Address,
    ask,
    ask_json,
    execution,
    issue_scope,
    scopegate,
    write_configuration,
)

pytestmark = pytest.mark.slow

T = TypeVar("T")

TERM, INT, HUP = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
NAMESPACE = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")

# Stands where a package is imported: says that the import has begun, and goes on when it is told to.
STUB = """
import os, sys
os.write({told}, b".")
os.read({go}, 1)
sys.path.remove({folder!r})
del sys.modules[{name!r}]
import {name}
"""


def namespaces_are_permitted() -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run([*NAMESPACE, "true"], capture_output=True, check=False).returncode == 0


WAYS = ["ignored", *(["process 1"] if namespaces_are_permitted() else [])]


def ignoring_sigterm() -> None:
    signal.signal(TERM, signal.SIG_IGN)


@contextmanager
def started(
    *arguments: str | Path, way: str = "", before: Callable[[], None] | None = None, **options: Any
) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The command, and the number of its process."""
    command = [sys.executable, "-m", "sidecar", *map(str, arguments)]
    process: subprocess.Popen[str] = subprocess.Popen(
        [*NAMESPACE, *command] if way == "process 1" else command,
        cwd=PROJECT,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=ignoring_sigterm if way == "ignored" else before,
        **options,
    )
    try:
        yield process, until(lambda: child_of(process.pid)) if way == "process 1" else process.pid
    finally:
        process.kill()
        process.communicate()


def child_of(pid: int) -> int | None:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(children[0]) if children else None


def until(condition: Callable[[], T | None], seconds: float = START_SECONDS) -> T:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if (found := condition()) is not None:
            return found
        time.sleep(0.005)
    pytest.fail(f"not within {seconds:g} s")


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> (number - 1) & 1)


def has_open(pid: int, file: Path) -> bool | None:
    with suppress(OSError):  # a descriptor that is closed meanwhile
        return any(os.readlink(each) == str(file) for each in Path(f"/proc/{pid}/fd").iterdir()) or None
    return None


@contextmanager
def stopped_at_import(
    folder: Path, name: str, *arguments: str | Path, way: str = ""
) -> Iterator[tuple[subprocess.Popen[str], int, Callable[[], object]]]:
    """The command while it imports `name`, and a function that lets the import go on."""
    told, tell = os.pipe()
    wait, go = os.pipe()
    stubs = folder / "stubs"
    stubs.mkdir()
    (stubs / f"{name}.py").write_text(STUB.format(told=tell, go=wait, folder=str(stubs), name=name))
    environment = {**os.environ, "PYTHONPATH": str(stubs)}
    try:
        with started(*arguments, way=way, env=environment, pass_fds=(tell, wait)) as (process, pid):
            assert os.read(told, 1) == b"."
            yield process, pid, lambda: os.write(go, b".")
    finally:
        for descriptor in (told, tell, wait, go):
            os.close(descriptor)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_configuration(tmp_path, ("127.0.0.1", 9))


# Signals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("number", [TERM, INT])
@pytest.mark.parametrize("name", ["click", "aiohttp"])
def test_run_stops_while_it_is_still_being_imported(
    tmp_path: Path, config: Path, name: str, number: signal.Signals, way: str
) -> None:
    with stopped_at_import(tmp_path, name, "run", "--config", config, way=way) as (process, pid, _):
        os.kill(pid, number)
        assert process.wait(STOP_SECONDS) == 0
        assert process.communicate() == ("", "")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("delay", [0, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.1])
def test_no_moment_of_the_start_loses_sigterm(config: Path, delay: float, way: str) -> None:
    with started("run", "--config", config, way=way) as (process, pid):
        until(lambda: catches(pid, TERM) or None)
        time.sleep(delay)
        os.kill(pid, TERM)
        assert process.wait(STOP_SECONDS) == 0


def test_a_signal_that_was_blocked_before_python_began_is_not_lost(config: Path) -> None:
    def blocking() -> None:
        ignoring_sigterm()
        signal.pthread_sigmask(signal.SIG_BLOCK, [TERM])

    with started("run", "--config", config, before=blocking) as (process, pid):
        os.kill(pid, TERM)
        assert process.wait(STOP_SECONDS) == 0


def test_sighup_during_the_start_is_kept_until_a_reload_is_possible(tmp_path: Path, config: Path) -> None:
    with stopped_at_import(tmp_path, "aiohttp", "run", "--config", config) as (process, pid, go_on):
        os.kill(pid, HUP)
        go_on()
        assert process.stderr is not None
        reloaded = next(line for line in process.stderr if '"cause":"signal"' in line)
        assert json.loads(reloaded)["message"] == "reloaded; nothing is different"
        os.kill(pid, TERM)
        assert process.wait(STOP_SECONDS) == 0


@contextmanager
def locked_store(config: Path) -> Iterator[None]:
    """A database that another connection holds, so that opening it takes a second and then fails.

    A test whose signal comes later, because the machine is busy, tries again.
    """
    store = config.parent / "var" / "scopegate.db"
    store.parent.mkdir(exist_ok=True)
    holder = sqlite3.connect(store, isolation_level=None)
    try:
        holder.execute("BEGIN EXCLUSIVE")
        yield
    finally:
        holder.close()


def test_a_sidecar_that_opens_its_store_stops_without_serving(config: Path) -> None:
    for _ in range(10):
        with locked_store(config), started("run", "--config", config) as (process, pid):
            until(lambda: has_open(pid, config.parent / "var" / "scopegate.db"))
            os.kill(pid, TERM)
            code = process.wait(STOP_SECONDS)
            _, log = process.communicate()
        if "database is locked" not in log:
            break
    assert code == 0
    messages = [json.loads(line)["message"] for line in log.splitlines()]
    assert messages == ["stopping before the start was complete"]


def test_a_second_signal_ends_a_start_at_once(config: Path) -> None:
    codes: list[int] = []
    for _ in range(10):
        with locked_store(config), started("run", "--config", config) as (process, pid):
            until(lambda: has_open(pid, config.parent / "var" / "scopegate.db"))
            os.kill(pid, TERM)
            assert process.stderr is not None
            if "stopping before" in process.stderr.readline():
                os.kill(pid, TERM)
                codes.append(process.wait(STOP_SECONDS))
        if codes[-1:] == [1]:
            break
    assert codes[-1:] == [1]


def test_ctrl_c_aborts_another_command_even_while_it_is_imported(tmp_path: Path, config: Path) -> None:
    with stopped_at_import(tmp_path, "click", "check", "--config", config) as (process, pid, _):
        os.kill(pid, INT)
        assert process.wait(STOP_SECONDS) == 1
        assert process.communicate() == ("", "\nAborted!\n")


def test_sigterm_ends_another_command_as_it_always_did(tmp_path: Path, config: Path) -> None:
    with stopped_at_import(tmp_path, "click", "check", "--config", config) as (process, pid, _):
        os.kill(pid, TERM)
        assert process.wait(STOP_SECONDS) == -TERM


def test_as_process_1_another_command_has_a_handler_for_sigterm() -> None:
    """What it does needs no namespace: it is told that it is process 1."""
    program = (
        "import os, signal; from sidecar import startup; own = os.getpid(); os.getpid = lambda: 1\n"
        "startup.prepare(serving=False); os.kill(own, signal.SIGTERM); signal.pause()"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, timeout=START_SECONDS, check=False)
    assert ended.returncode == 128 + TERM


def test_the_installed_command_begins_like_python_m_sidecar() -> None:
    scripts = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"scopegate": "sidecar.__main__:main"}


# Standard input, output and error ---------------------------------------------------------------------------

CLOSED = {"<&-": 0, ">&-": 1, "2>&-": 2}
REDIRECTIONS = [
    *CLOSED,
    ">&- 2>&-",
    "<&- 2>&-",
    "<&- >&- 2>&-",
    "2>/dev/full",
    ">/dev/full 2>/dev/full",
    "2</dev/null",
    "2>PIPE",
    ">PIPE 2>PIPE",
]
EVERYDAY = ("<&- >&- 2>&-", "2>/dev/full", ">PIPE 2>PIPE")
COMMANDS = {
    ("check", "--config", "{config}"): 0,
    ("check", "--config", "missing.yaml"): 2,
    ("check",): 2,
    ("run", "--config", "missing.yaml"): 2,
    ("health", "--ops", "127.0.0.1:9"): 3,
}


@contextmanager
def redirected(redirection: str, *arguments: str | Path) -> Iterator[subprocess.Popen[bytes]]:
    """The command as a shell starts it; PIPE is a pipe without a reader."""
    reader, pipe = os.pipe()
    os.close(reader)
    words = redirection.split()
    shell = " ".join(word for word in words if "PIPE" not in word)
    command = ["sh", "-c", f'exec "$@" {shell}', "sh", sys.executable, "-m", "sidecar"]
    process = subprocess.Popen(
        [*command, *map(str, arguments)],
        cwd=PROJECT,
        stdin=subprocess.DEVNULL,
        stdout=pipe if ">PIPE" in words else subprocess.DEVNULL,
        stderr=pipe if "2>PIPE" in words else subprocess.DEVNULL,
    )
    os.close(pipe)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def free_addresses(count: int) -> list[Address]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    found: list[Address] = [each.getsockname() for each in sockets]
    for each in sockets:
        each.close()
    return found


def is_ready(ops: Address) -> bool | None:
    try:
        return ask(ops, "GET", "/health/ready").status == 200 or None
    except OSError:
        return None


@pytest.mark.parametrize(
    "redirection",
    [each if each in EVERYDAY else pytest.param(each, marks=pytest.mark.slow) for each in REDIRECTIONS],
)
def test_run_serves_whatever_its_standard_descriptors_are(tmp_path: Path, redirection: str) -> None:
    data, admin, ops = free_addresses(3)
    listen = {
        name: {"listen": f"{address[0]}:{address[1]}"}
        for name, address in (("data", data), ("admin", admin), ("ops", ops))
    }
    config = write_configuration(tmp_path, ("127.0.0.1", 9), **listen)
    store = tmp_path / "var" / "scopegate.db"
    with redirected(redirection, "run", "--config", config) as process:
        until(lambda: is_ready(ops))
        for closed in CLOSED.keys() & redirection.split():
            assert os.readlink(f"/proc/{process.pid}/fd/{CLOSED[closed]}") == os.devnull
        scope = issue_scope(data)
        assert ask_json(data, "POST", EXECUTE, execution(scope)).status == 502  # there is no backend
        assert (tmp_path / "var" / "scopegate.db.lock").read_text() == f"{process.pid}\n"
        process.send_signal(TERM)
        assert process.wait(STOP_SECONDS) == 0
    assert store.read_bytes().startswith(b"SQLite format 3\0")
    verified = scopegate("log", "verify", "--config", config)
    assert verified.returncode == 0, verified


def commands_and_redirections() -> Iterator[Any]:
    """Every command with every redirection. The everyday run has each of them at least once."""
    for (arguments, code), redirection in product(COMMANDS.items(), REDIRECTIONS):
        everyday = code == 0 or redirection == EVERYDAY[0]
        yield pytest.param(arguments, code, redirection, marks=() if everyday else pytest.mark.slow)


@pytest.mark.parametrize(("arguments", "code", "redirection"), list(commands_and_redirections()))
def test_a_command_ends_with_its_code_whatever_its_standard_descriptors_are(
    config: Path, arguments: tuple[str, ...], code: int, redirection: str
) -> None:
    with redirected(redirection, *(each.format(config=config) for each in arguments)) as process:
        ended = process.wait(START_SECONDS)
    # An answer that its reader does not get has failed; with a closed descriptor there is no reader.
    lost = code == 0 and {">/dev/full", ">PIPE"} & {*redirection.split()}
    assert ended == (1 if lost else code)
