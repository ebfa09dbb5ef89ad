"""Starts the program by a fork of a process that has imported it, which saves the half second of each start.

`python -m tests.forkserver FD` imports the program once and then waits on the Unix socket FD for requests.
For each request it forks a child, which takes over the given directory, environment and standard descriptors
and runs `scopegate` with the given arguments. The child is the real program: it has its own process id,
receives signals and ends as Python ends. Only the start of the interpreter and the imports are shared. Tests
of the start itself run `python -m sidecar` in a new interpreter.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import io
import json
import os
import pkgutil
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

PROJECT = Path(__file__).parents[1]
# A request passes standard input, output and error, and the pipe for the process id and then the exit code.
DESCRIPTORS = 4
_NUMBER = struct.Struct("i")


class Process:
    """One running command, with the part of `subprocess.Popen` that tests use."""

    def __init__(self, reports: int) -> None:
        self._reports = reports
        self.returncode: int | None = None
        pid = self._report(None)
        assert pid is not None
        self.pid = pid

    def _report(self, seconds: float | None) -> int | None:
        """The next report of the fork server. None if it does not come in time."""
        if not select.select([self._reports], [], [], seconds)[0]:
            return None
        report = os.read(self._reports, _NUMBER.size)
        assert report, "the fork server is gone"
        return int(_NUMBER.unpack(report)[0])

    def poll(self) -> int | None:
        """The exit code, or None while it runs. After a signal it is the negative signal number."""
        if self.returncode is None:
            self.returncode = self._report(0)
            if self.returncode is not None:
                os.close(self._reports)
        return self.returncode

    def wait(self, seconds: float | None = None) -> int:
        """The exit code. Raises subprocess.TimeoutExpired if it does not end within `seconds`."""
        if self.returncode is None:
            select.select([self._reports], [], [], seconds)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired("scopegate", seconds or 0.0)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


_server: socket.socket | None = None
_one_at_a_time = threading.Lock()


def start(
    arguments: Sequence[str],
    *,
    stdout: IO[bytes] | None = None,
    stderr: IO[bytes] | None = None,
    directory: Path = PROJECT,
) -> Process:
    """Start `scopegate` with arguments. Its standard input is empty, and output without a file is dropped."""
    request = json.dumps(
        {"arguments": [*arguments], "directory": str(directory), "environment": dict(os.environ)}
    ).encode()
    reports, reporting = os.pipe()
    with open(os.devnull, "r+b") as null, _one_at_a_time:
        passed = [null.fileno(), (stdout or null).fileno(), (stderr or null).fileno(), reporting]
        try:
            server = _running_server()
            socket.send_fds(server, [_NUMBER.pack(len(request))], passed)
            server.sendall(request)
        finally:
            os.close(reporting)
    return Process(reports)


def run(*arguments: str, seconds: float) -> subprocess.CompletedProcess[str]:
    """Run `scopegate` to its end. Raises subprocess.TimeoutExpired if that takes longer than `seconds`."""
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        process = start(arguments, stdout=stdout, stderr=stderr)
        try:
            code = process.wait(seconds)
        finally:
            process.kill()
        return subprocess.CompletedProcess(["scopegate", *arguments], code, _text(stdout), _text(stderr))


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode()


def _running_server() -> socket.socket:
    global _server
    if _server is None:
        _server, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "tests.forkserver", str(theirs.fileno())]
            server = subprocess.Popen(command, cwd=PROJECT, pass_fds=[theirs.fileno()])
        atexit.register(_stop, server)
    return _server


def _stop(server: subprocess.Popen[bytes]) -> None:
    assert _server is not None
    _server.close()
    server.wait()


# The server ---------------------------------------------------------------------------------------------


def _serve(control: socket.socket) -> None:
    """Fork for each request until the other end is closed. Returns only in a child, which is ready to run."""
    running: dict[int, int] = {}  # where to report the exit code of each child
    woken, wakes = socket.socketpair()
    wakes.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(wakes.fileno())
    # The terminal sends Ctrl-C to this process too. It ends when the test run does.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        ready, _, _ = select.select([control, woken], [], [])
        if woken in ready:
            woken.recv(4096)
            _report_ended(running)
        if control not in ready:
            continue
        length, passed, _, _ = socket.recv_fds(control, _NUMBER.size, DESCRIPTORS)
        if not length:
            sys.exit(0)
        request = control.recv(_NUMBER.unpack(length)[0], socket.MSG_WAITALL)
        pid = os.fork()
        if pid == 0:
            _become(json.loads(request), passed[:3])
            return
        *standard, reporting = passed
        for descriptor in standard:
            os.close(descriptor)
        running[pid] = reporting
        os.write(reporting, _NUMBER.pack(pid))


def _report_ended(running: dict[int, int]) -> None:
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        reporting = running.pop(pid)
        with suppress(BrokenPipeError):  # the test that started it may have ended
            os.write(reporting, _NUMBER.pack(os.waitstatus_to_exitcode(status)))
        os.close(reporting)


def _become(request: Mapping[str, object], standard: Sequence[int]) -> None:
    """Take over what a new process would have."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, descriptor in enumerate(standard):
        os.dup2(descriptor, number)
    os.closerange(3, 1024)
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)))
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(io.FileIO(1, "w", closefd=False)))
    stderr = io.BufferedWriter(io.FileIO(2, "w", closefd=False))
    sys.stderr = io.TextIOWrapper(stderr, errors="backslashreplace", line_buffering=True)
    os.chdir(str(request["directory"]))
    environment = request["environment"]
    assert isinstance(environment, dict)
    os.environ.clear()
    os.environ.update(environment)
    time.tzset()
    arguments = request["arguments"]
    assert isinstance(arguments, list)
    sys.argv = ["scopegate", *arguments]


if __name__ == "__main__":
    from sidecar import cli
    from sidecar.__main__ import main

    for module in pkgutil.iter_modules(cli.__path__, "sidecar.cli."):
        importlib.import_module(module.name)
    importlib.import_module("sidecar.cli.process")
    gc.freeze()
    _serve(socket.socket(fileno=int(sys.argv[1])))
    main()
