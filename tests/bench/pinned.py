"""Becomes a command on one core, which ends when its parent does.

    python tests/bench/pinned.py CORE COMMAND [ARGUMENT ...]

It is a program of its own because code between fork and exec is not safe in a process with threads. The
kernel keeps both settings over exec.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # prctl(2)


def main() -> None:
    core, command = int(sys.argv[1]), sys.argv[2:]
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    os.sched_setaffinity(0, {core})
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
