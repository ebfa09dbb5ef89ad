"""Prepares signals and standard descriptors before anything else is imported, and makes imports cheap.

Importing the program takes almost half a second, and Python installs no handler for SIGTERM in that time.

1. Process 1, as in a container, ignores every signal without a handler. A SIGTERM during the imports would be
   lost, and the container would be killed at the end of its grace period. So `run` handles SIGTERM from its
   first line on. Until the event loop takes over the signals, nothing is listening or open and there is
   nothing to drain, so the process ends at once with code 0.
2. A handler is installed at every moment. Python calls the old handler for a signal that arrives before
   `signal.signal` replaces it. The event loop opens its wake-up pipe before it replaces the handler, so it
   receives every later signal.
3. SIGHUP asks for a reload. The request is remembered until the program can reload, because the files may
   have been read just before they were changed.
4. Other commands behave as usual: Ctrl-C prints "Aborted!", and SIGTERM ends them. They need a handler for
   SIGTERM only as process 1.
5. The system gives a closed descriptor 0, 1 or 2 (`2>&-`) to the next file that is opened. If that is the
   database, printed text would go into it. So each closed descriptor is opened as /dev/null first.
6. Text that standard error does not accept (a full disk, a pipe without a reader) is dropped. The exit code
   reports how a command ended, and an exception while a message is printed would change it.

Signals that arrive earlier, while Python itself starts, cannot be handled here. If the parent process blocks
them, they wait, and the last line of the preparation for `run` unblocks them.
"""

import gc
import io
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# The exit code that a shell reports for a program that SIGTERM ended.
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
    """Whether SIGHUP arrived before the program could reload."""
    return _reload_requested


# Imports -----------------------------------------------------------------------------------------------

# aiohttp makes a TLS context for its client on import, which the sidecar does not use. The context would hold
# every root certificate of the system, which costs 40 ms and 10 MiB.
_NO_CERTIFICATES = {"SSL_CERT_FILE": os.devnull, "SSL_CERT_DIR": os.devnull}


@contextmanager
def cheap_imports() -> Iterator[None]:
    """Within it, importing the libraries of `run` takes a fifth less time.

    The garbage collector is off meanwhile, and never walks what was made: sixty thousand classes, functions
    and tables stay, and fewer than three hundred values could be freed.
    """
    before = {name: os.environ.get(name) for name in _NO_CERTIFICATES}
    os.environ.update(_NO_CERTIFICATES)
    # pydantic would read the metadata of every installed package in search of plugins, at the first model
    # that is built. This stays in the environment, because some models are built later.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


# Signals ------------------------------------------------------------------------------------------------

# The handlers end the process themselves, because an exception could be lost in an import or a destructor.


def _end_well(number: int, frame: object) -> None:
    os._exit(0)


def _end_as_terminated(number: int, frame: object) -> None:
    os._exit(_TERMINATED)


def _request_reload(number: int, frame: object) -> None:
    global _reload_requested
    _reload_requested = True


# Descriptors --------------------------------------------------------------------------------------------


class _Forgiving(io.FileIO):
    """A file that drops bytes which it cannot write, and reports them as written."""

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
            # The system gives the lowest free number, and all lower numbers are in use by now.
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
