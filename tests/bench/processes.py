"""Programs that are measured: started on one core, read through /proc, and ended by their ids.

Each program leads a session of its own, so what it starts (nginx's worker) is found by the session's id. A
program ends with the bench, even if the bench is killed, because the kernel sends it SIGTERM then.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

START_SECONDS = 30.0
STOP_SECONDS = 10.0
TAIL_CHUNKS = 4  # of a program's output; they are shown when it fails
PIPE_BYTES = 1 << 20


class BenchError(Exception):
    """A comparison could not be measured; the text says why."""


class Cores(NamedTuple):
    """The core of what is measured, and the core of the load and the backend."""

    proxy: int
    load: int


def two_cores() -> Cores:
    """The first two cores that this process may use. Raises BenchError where there is only one."""
    usable = sorted(os.sched_getaffinity(0))
    if len(usable) < 2:
        raise BenchError("needs two cores: one for the proxy, one for the load and the backend")
    return Cores(*usable[:2])


def free_port() -> int:
    """A port of loopback on which nothing listens."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port: int = held.getsockname()[1]
        return port


def pinned(core: int, command: Sequence[str | Path]) -> list[str]:
    """A command line that runs a command on one core, and no longer than this process."""
    launcher = Path(__file__).with_name("pinned.py")
    return [sys.executable, "-I", str(launcher), str(core), *map(str, command)]


class Program:
    """One program on one core. Its output goes through a pipe, which a thread empties."""

    def __init__(
        self,
        name: str,
        command: Sequence[str | Path],
        *,
        core: int,
        folder: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.start_seconds: float | None = None  # from here until it was ready
        self._begun = time.monotonic()
        self._process = subprocess.Popen(
            pinned(core, command),
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._tail: deque[bytes] = deque(maxlen=TAIL_CHUNKS)
        assert self._process.stdout is not None
        fcntl.fcntl(self._process.stdout, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        self._reader = threading.Thread(target=self._read, args=(self._process.stdout.fileno(),), daemon=True)
        self._reader.start()

    def _read(self, descriptor: int) -> None:
        while chunk := os.read(descriptor, 1 << 16):
            self._tail.append(chunk)

    def tail(self) -> str:
        """The last lines of its output."""
        lines = b"".join(self._tail).decode(errors="replace").splitlines()
        return "\n".join(lines[-5:])

    def failure(self, reason: str) -> BenchError:
        return BenchError(f"{self.name} {reason}; its last output:\n{self.tail()}")

    def wait_for(self, ready: Callable[[], bool]) -> None:
        """Returns once `ready()` holds. Raises BenchError if the program ends before or is too slow."""
        until = time.monotonic() + START_SECONDS
        while not ready():
            if self._process.poll() is not None:
                self._reader.join(1)
                raise self.failure(f"ended with {self._process.returncode} instead of starting")
            if time.monotonic() > until:
                raise self.failure(f"did not start within {START_SECONDS:.0f} seconds")
            time.sleep(0.01)
        self.start_seconds = time.monotonic() - self._begun

    def _pids(self) -> list[int]:
        """Every process of the program's session."""
        return [pid for pid, fields in _processes() if int(fields[3]) == self._process.pid]

    def cpu_seconds(self) -> float:
        """User and system time of all its processes and their threads."""
        own = self._process.pid
        ticks = sum(int(fields[11]) + int(fields[12]) for _, fields in _processes() if int(fields[3]) == own)
        return ticks / os.sysconf("SC_CLK_TCK")

    def resident_bytes(self) -> int:
        """Resident memory of all its processes; shared pages count once for each."""
        pages = 0
        for pid in self._pids():
            pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def stop(self) -> None:
        """SIGTERM, ten seconds to end, and SIGKILL for what is then left of the session."""
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        for pid in self._pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join(STOP_SECONDS)
        assert self._process.stdout is not None
        self._process.stdout.close()


def _processes() -> list[tuple[int, list[str]]]:
    """The id of every process, and the fields of its stat file behind the name (proc(5))."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                text = Path(f"/proc/{entry}/stat").read_text(errors="replace")
            except (FileNotFoundError, ProcessLookupError):
                continue  # it ended meanwhile
            found.append((int(entry), text.rpartition(")")[2].split()))
    return found


def accepts(port: int) -> bool:
    """Whether something accepts connections on this port of loopback."""
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True
