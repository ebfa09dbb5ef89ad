"""The first lines that run: what must hold before anything else is imported.

Importing the program takes about half a second, and Python installs no handler for SIGTERM in that time.

1. A process with the number 1, as in a container, ignores every signal that it has no handler for. A SIGTERM
   during the imports would be lost, and the container would be killed at the end of its grace period. So
   `run` stops from its first line on: until the event loop takes the signals over nothing is listening and
   nothing is open, there is nothing to drain, and the process ends at once with code 0.
2. No moment is without a handler. Python calls the old handler for what arrives before `signal.signal`
   replaces it, and the event loop opens its wake-up pipe before it does that, so it hears what arrives after.
3. SIGHUP asks for a reload. Before the program can reload, the request is kept: the files may have been read
   just before they were changed.
4. Other commands keep what users know: Ctrl-C says "Aborted!", and SIGTERM ends them. Only as process 1 they
   need a handler for that.
5. A descriptor 0, 1 or 2 that is closed (`2>&-`) is given to the next file that is opened, which may be the
   database, and then what is printed goes there. Each closed one becomes /dev/null first.
6. What standard error does not take (a full disk, a pipe without a reader) is dropped. The exit code still
   says how a command ended, and an exception on the way to a message would change it.

Signals that arrive before these lines, while Python itself starts, are out of reach, unless what starts the
program blocks them: then they wait, and the last line of the preparation for `run` lets them in.
"""

import io
import os
import signal
import sys

# What a shell reports for a program that SIGTERM ended.
_TERMINATED = 128 + signal.SIGTERM

_reload_requested = False


def prepare(*, serving: bool) -> None:
    """Take over signals and the three standard descriptors. `serving`: the command is `run`."""
    if serving:
        signal.signal(signal.SIGTERM, _end_well)
        signal.signal(signal.SIGINT, _end_well)
        signal.signal(signal.SIGHUP, _request_reload)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
    elif os.getpid() == 1:
        signal.signal(signal.SIGTERM, _end_as_terminated)
    _open_closed_descriptors()
    sys.stderr = _forgiving_stderr()


def reload_requested() -> bool:
    """Whether SIGHUP came before there was anything that could reload."""
    return _reload_requested


# Signals ------------------------------------------------------------------------------------------------

# The process ends in the handlers themselves: an exception could be lost in an import or a destructor.


def _end_well(number: int, frame: object) -> None:
    os._exit(0)


def _end_as_terminated(number: int, frame: object) -> None:
    os._exit(_TERMINATED)


def _request_reload(number: int, frame: object) -> None:
    global _reload_requested
    _reload_requested = True


# Descriptors --------------------------------------------------------------------------------------------


class _Forgiving(io.FileIO):
    """Counts as written what cannot be written."""

    def write(self, data: object) -> int:
        whole = memoryview(data)  # type: ignore[arg-type]  # before Python 3.12 a buffer's type has no name
        try:
            return super().write(whole) or whole.nbytes
        except OSError:
            return whole.nbytes


def _open_closed_descriptors() -> None:
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            # The system gives the lowest free number, and those below this one are taken by now.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if sys.stdin is None:
        sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)))
    if sys.stdout is None:
        sys.stdout = io.TextIOWrapper(io.BufferedWriter(io.FileIO(1, "w", closefd=False)))


def _forgiving_stderr() -> io.TextIOWrapper:
    """Standard error as Python makes it, except that it drops what it cannot write."""
    return io.TextIOWrapper(
        io.BufferedWriter(_Forgiving(2, "w", closefd=False)),
        encoding=None if sys.stderr is None else sys.stderr.encoding,
        errors="backslashreplace",
        line_buffering=True,
    )
