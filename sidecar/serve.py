"""The only wiring: settings, store, gate, listeners; run, and drain. Nothing is decided here."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from aiohttp import web

from sidecar.checkpoints import Checkpointer
from sidecar.clock import wall_clock
from sidecar.core.policy import PolicySet
from sidecar.crash import account_for_crash
from sidecar.errors import ScopegateError
from sidecar.gate import Gate
from sidecar.grants import Grants
from sidecar.refusals import RefusalLog
from sidecar.reload import Files, Reloader, warn_of_openings
from sidecar.settings import Listen, Log, Settings
from sidecar.signing import load_signing_key
from sidecar.store.base import Clock
from sidecar.store.batch import Store
from sidecar.store.sqlite import SqliteEngine
from sidecar.telemetry import Metrics, without_created_series
from sidecar.terms import Live, Terms
from sidecar.upstream import Upstream
from sidecar.watch import watch
from sidecar.web.admin import About, Admin
from sidecar.web.data import DataPlane
from sidecar.web.docs import Docs
from sidecar.web.emitters import EmitterApi
from sidecar.web.openapi.document import document
from sidecar.web.ops import Ops
from sidecar.web.passthrough import PassThrough
from sidecar.web.reloads import ReloadApi
from sidecar.web.scopes import ScopeApi
from sidecar.web.server import DataServer, require_fast_parser

logger = logging.getLogger("scopegate")

BACKLOG = 2048
# What a connection that idles through the drain is given before it is closed.
LAST_CALL_SECONDS = 0.5
POLL_SECONDS = 0.02
# What answers that are ready get to be written. aiohttp waits for this long twice.
FLUSH_SECONDS = 1.0


class Sidecar:
    """One running sidecar: `async with Sidecar(settings, policies) as sidecar`. Raises ScopegateError.

    With the files that both were read from it can reload, and does so when they change.
    """

    def __init__(
        self,
        settings: Settings,
        policies: PolicySet | None,
        *,
        files: Files | None = None,
        clock: Clock = wall_clock,
    ) -> None:
        require_fast_parser()
        without_created_series()
        self.settings = settings
        self.metrics = Metrics()
        self._checkpointer = _checkpointer(settings.log, self.metrics)
        self.store = Store(
            SqliteEngine(settings.store.file),
            clock=clock,
            deadline_seconds=settings.store.deadline_seconds,
            observer=self._checkpointer or self.metrics,
            mask=settings.log.masking(),
        )
        self.live = Live(Terms(settings, policies))
        self.reloader = Reloader(files, live=self.live, metrics=self.metrics, clock=clock)
        self._files = files
        self._watching: asyncio.Task[None] | None = None
        self._clock = clock
        self.data_address = settings.data.listen
        self.ops_address = settings.ops.listen
        self._data: asyncio.Server | None = None
        self._runners: list[web.AppRunner] = []
        self.hung = False  # the store or the checkpoint file could not be closed
        self._late_connections: set[asyncio.Task[Any]] = set()

    async def __aenter__(self) -> Sidecar:
        try:
            await self.start()
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()

    # Starting ----------------------------------------------------------------------------------

    async def start(self) -> None:
        """Open the store, account for what a crash left behind, then listen. Raises ScopegateError."""
        self._wire()
        await self.store.open()
        await account_for_crash(self.store)
        if self._checkpointer is not None:
            self._checkpointer.start(self.store)
        settings = self.settings
        self.ops_address = await self._serve("ops", self._ops.application(), settings.ops.listen)
        self.admin_address = await self._serve("admin", self._admin.application(), settings.admin.listen)
        with _bind_errors("data", settings.data.listen):
            self._data = await asyncio.get_running_loop().create_server(
                self._data_server, settings.data.listen.host, settings.data.listen.port, backlog=BACKLOG
            )
        self.data_address = _listens("data", self._data.sockets[0].getsockname())
        warn_of_openings(self.live.terms.settings)
        if self._files is not None:
            self._watching = asyncio.create_task(watch(self._files, self.reloader.catch_up))

    def _wire(self) -> None:
        settings = self.settings
        address = settings.upstream.address
        self.upstream = Upstream(
            address.host,
            address.port,
            connect_timeout=settings.upstream.connect_timeout_seconds,
            reuse_idle_seconds=settings.upstream.reuse_idle_seconds,
            max_connections=settings.upstream.max_connections,
        )
        self.gate = Gate(
            store=self.store,
            upstream=self.upstream,
            refusals=RefusalLog(self.store, self.metrics),
            metrics=self.metrics,
        )
        grants = Grants(store=self.store, gate=self.gate, metrics=self.metrics)
        scopes = ScopeApi(store=self.store, gate=self.gate, grants=grants, live=self.live)
        on_data = settings.scopes.serve_on == "data"
        self.passing = PassThrough(self.upstream, self.metrics, live=self.live)
        plane = DataPlane(
            gate=self.gate,
            passing=self.passing,
            scopes=scopes if on_data else None,
            live=self.live,
            metrics=self.metrics,
        )
        self._data_server = DataServer(plane.handle, head_timeout_seconds=settings.gate.head_timeout_seconds)
        self._admin = Admin(
            store=self.store,
            gate=self.gate,
            scopes=None if on_data else scopes,
            grants=grants,
            live=self.live,
            emitters=EmitterApi(store=self.store, metrics=self.metrics, live=self.live),
            reloads=ReloadApi(self.reloader),
            docs=Docs(
                lambda settings: document(settings, data=self.data_address, ops=self.ops_address), self.live
            ),
            about=About(started_at=self._clock(), store_url=settings.store.url),
        )
        self._ops = Ops(store=self.store, gate=self.gate, live=self.live, metrics=self.metrics)

    async def _serve(self, name: str, application: web.Application, listen: Listen) -> Listen:
        runner = web.AppRunner(
            application, access_log=None, handle_signals=False, shutdown_timeout=FLUSH_SECONDS
        )
        await runner.setup()
        self._runners.append(runner)

        with _bind_errors(name, listen):
            await web.TCPSite(runner, listen.host, listen.port).start()
        return _listens(name, runner.addresses[0])

    # Stopping ----------------------------------------------------------------------------------

    async def stop(self) -> None:
        """Take nothing new in, let what is in flight end within the drain limit, then close everything."""
        limit = self.live.terms.settings.shutdown.drain_seconds
        # Closing takes a while, too; both together stay within the limit where that leaves room for it.
        patience = max(limit * 0.8, limit - LAST_CALL_SECONDS - 2 * FLUSH_SECONDS)
        until = time.monotonic() + patience
        self.gate.draining = self.passing.draining = self.reloader.draining = True
        logger.info("draining", extra={"in_flight": self.gate.in_flight, "drain_seconds": limit})
        self._stop_listening()
        unfinished = await self.gate.drain(patience)
        if unfinished:
            logger.warning("the drain is over; executions end as unknown", extra={"count": unfinished})
        await self._until_quiet(until)
        # What still goes on has no end of its own (events, WebSockets, uploads that stopped): cut it.
        await self.upstream.close()
        self._data_server.pre_shutdown()
        await self._data_server.shutdown(FLUSH_SECONDS)
        await self._close()
        logger.info("stopped")

    def _stop_listening(self) -> None:
        """Close the listening socket, but serve whoever has connected already."""
        if self._data is None:
            return
        loop = asyncio.get_running_loop()
        for listening in self._data.sockets:
            # asyncio's sockets cannot be accepted on; a duplicate of the descriptor can.
            duplicate = socket.socket(fileno=os.dup(listening.fileno()))
            duplicate.setblocking(False)
            with duplicate:
                while True:
                    try:
                        connection, _ = duplicate.accept()
                    except OSError:
                        break
                    connection.setblocking(False)
                    task = loop.create_task(loop.connect_accepted_socket(self._data_server, connection))
                    self._late_connections.add(task)
                    task.add_done_callback(self._late_connections.discard)
        self._data.close()

    async def _until_quiet(self, until: float) -> None:
        """Wait for pass-through requests to end, then give idle connections a last call."""
        last_call = time.monotonic() + LAST_CALL_SECONDS
        while (self.passing.under_way and time.monotonic() < until) or (
            self._data_server.connections and time.monotonic() < last_call
        ):
            await asyncio.sleep(POLL_SECONDS)

    async def _close(self) -> None:
        if self._data is not None:
            self._data.close()
        await self.upstream.close()
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait([self._watching])
        for runner in self._runners:
            await runner.cleanup()
        attested = True
        if self._checkpointer is not None:
            await self.store.until_idle()
            attested = await self._checkpointer.close()
        self.hung = not await self.store.close() or not attested


def _checkpointer(log: Log, metrics: Metrics) -> Checkpointer | None:
    if log.signing_key_file is None or log.checkpoint_file is None:
        return None
    return Checkpointer(load_signing_key(log.signing_key_file), log.checkpoint_file, metrics)


@contextmanager
def _bind_errors(name: str, listen: Listen) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise ScopegateError(f"{name}.listen: cannot listen on {listen}: {exc.strerror or exc}") from exc


def _listens(name: str, socket_name: tuple[Any, ...]) -> Listen:
    """The address that a listener really has, with the port that the system chose for port 0."""
    address = Listen(socket_name[0], socket_name[1])
    logger.info("listening", extra={"listener": name, "address": str(address)})
    return address


async def run(settings: Settings, policies: PolicySet, files: Files) -> None:
    """Serve until SIGTERM or SIGINT, then drain; a second one exits at once. SIGHUP reloads.

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
    sidecar = Sidecar(settings, policies, files=files)
    reloads: set[asyncio.Task[Any]] = set()

    def reload() -> None:
        task = loop.create_task(sidecar.reloader.reload("signal"))
        reloads.add(task)
        task.add_done_callback(reloads.discard)

    loop.add_signal_handler(signal.SIGHUP, reload)
    async with sidecar:
        await stopping.wait()
    if sidecar.hung:
        logging.shutdown()
        os._exit(1)  # the interpreter would wait for the thread of a storage that hangs
    if sidecar.reloader.is_reading():
        logging.shutdown()
        os._exit(0)  # and for one that reads files, which nobody needs any more
