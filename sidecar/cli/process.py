"""The process of `scopegate run`: its signals, its start, and its end."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
from typing import Any

from sidecar.errors import ScopegateError
from sidecar.live.reload import Contents, Files
from sidecar.serve import Sidecar
from sidecar.startup import reload_requested
from sidecar.telemetry.events import LogEvent
from sidecar.telemetry.logqueue import flush_logs, never_wait_for_logs
from sidecar.web.serving.listener import file_limit, raise_file_limit

# How many new values there may be before the garbage collector walks them. Almost all of them belong to
# requests in flight, and reference counting frees them. With Python's 700 it walked them every eight
# requests, which took a tenth of the CPU.
YOUNG_VALUES = 10_000


async def _started(sidecar: Sidecar, stopping: asyncio.Event) -> bool:
    """Start the sidecar and return True. If it must stop during the start, close it and return False.

    Raises ScopegateError.
    """
    starting = asyncio.create_task(sidecar.__aenter__())
    stop_requested = asyncio.create_task(stopping.wait())
    await asyncio.wait([starting, stop_requested], return_when=asyncio.FIRST_COMPLETED)
    stop_requested.cancel()
    if not starting.done():
        LogEvent.STOPPED_DURING_START.log()
        starting.cancel()
        await asyncio.wait([starting], timeout=sidecar.settings.shutdown.drain_seconds)
        if not starting.done():
            LogEvent.START_HANGS.log()
            logging.shutdown()
            os._exit(1)
    if starting.cancelled():
        return False
    starting.result()
    return True


def spare_the_collector() -> None:
    """Exclude what the start made from garbage collection, which would walk it during requests.

    A full collection stops every request: for 30 ms and more with these values, for a few without them.
    Reference counting still frees a value that was excluded. Only a cycle of such values stays, so at most
    what the first configuration and policies hold.
    """
    gc.freeze()
    gc.set_threshold(YOUNG_VALUES, *gc.get_threshold()[1:])


async def run(contents: Contents, files: Files) -> None:
    """Serve until SIGTERM or SIGINT, then drain. A second signal exits at once. SIGHUP reloads.

    Raises ScopegateError.
    """
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()

    def stop() -> None:
        if stopping.is_set():
            os._exit(1)
        stopping.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    never_wait_for_logs()
    raise_file_limit()
    settings = contents.loaded.settings
    sidecar = Sidecar(settings, contents.policies, callers=contents.callers, files=files)
    if sidecar.connections["data"] < settings.gate.max_in_flight:
        LogEvent.LOW_FILE_LIMIT.log(limit=file_limit(), connections=sidecar.connections["data"])
    reloads: set[asyncio.Task[Any]] = set()

    def reload() -> None:
        task = loop.create_task(sidecar.reloader.reload("signal"))
        reloads.add(task)
        task.add_done_callback(reloads.discard)

    loop.add_signal_handler(signal.SIGHUP, reload)
    try:
        if await _started(sidecar, stopping):
            spare_the_collector()
            if reload_requested():
                reload()
            await stopping.wait()
            await sidecar.stop()
    except ScopegateError:
        flush_logs()  # the lines that led to the error must precede its message
        raise
    if sidecar.hung:
        logging.shutdown()
        os._exit(1)  # the interpreter would wait for the thread of a hanging storage
    keys = sidecar.issuer_keys
    reading = sidecar.renewal.reading or sidecar.custody.reading or (keys is not None and keys.reading)
    if sidecar.reloader.is_reading() or reading:
        logging.shutdown()
        os._exit(0)  # the interpreter would wait for the thread that reads files
