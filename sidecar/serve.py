"""The only wiring: settings, store, gate, listeners; run, and drain. Nothing is decided here."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import signal
import socket
import time
from collections.abc import Callable
from types import FrameType, TracebackType

from aiohttp import web

from sidecar.core.command import Settle
from sidecar.core.policy import PolicySet
from sidecar.errors import ScopegateError
from sidecar.gate import Gate
from sidecar.ids import new_decision_id
from sidecar.refusals import RefusalLog
from sidecar.settings import Listen, Settings
from sidecar.store.base import Clock
from sidecar.store.batch import Store
from sidecar.store.sqlite import SqliteEngine
from sidecar.telemetry import Metrics
from sidecar.upstream import Upstream
from sidecar.web.admin import About, Admin
from sidecar.web.data import DataLimits, DataPlane, GatedRoute
from sidecar.web.ops import Ops
from sidecar.web.passthrough import PassThrough
from sidecar.web.scopes import ScopeApi, ScopeTerms
from sidecar.web.server import DataServer, require_fast_parser

logger = logging.getLogger("scopegate")

BACKLOG = 2048
RECOVERY_PAGE = 500
# What a connection that idles through the drain is given before it is closed.
LAST_CALL_SECONDS = 0.5
# What answers that are ready get to be written, whatever is left of the drain.
FLUSH_SECONDS = 2.0


def wall_clock() -> int:
    """Microseconds since 1970 (UTC)."""
    return time.time_ns() // 1_000


class Sidecar:
    """One running sidecar: `async with Sidecar(settings, policies) as sidecar`."""

    def __init__(self, settings: Settings, policies: PolicySet | None, *, clock: Clock = wall_clock) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.store = Store(
            SqliteEngine(settings.store.file),
            clock=clock,
            deadline_seconds=settings.store.deadline_seconds,
            observer=self.metrics,
        )
        self._policies = policies
        self._clock = clock
        self._data: asyncio.Server | None = None
        self._runners: list[web.AppRunner] = []

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
        require_fast_parser()
        await self.store.open()
        await self._account_for_crash()
        self._wire()
        settings = self.settings
        self.ops_address = await self._serve("ops", self._ops.application(), settings.ops.listen)
        self.admin_address = await self._serve("admin", self._admin.application(), settings.admin.listen)
        self._data = await self._listening(
            "data",
            settings.data.listen,
            lambda listen: asyncio.get_running_loop().create_server(
                self._data_server, listen.host, listen.port, backlog=BACKLOG
            ),
        )
        self.data_address = _address(self._data.sockets[0])
        logger.info("listening", extra={"listener": "data", "address": str(self.data_address)})

    def _wire(self) -> None:
        settings, gate_settings = self.settings, self.settings.gate
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
            policies=self._policies,
            response_timeout_seconds=settings.upstream.response_timeout_seconds,
            max_answer_bytes=gate_settings.max_answer_bytes,
            max_in_flight=gate_settings.max_in_flight,
        )
        scopes = ScopeApi(
            store=self.store,
            gate=self.gate,
            defaults=_terms(settings.scopes.defaults),
            limits=_terms(settings.scopes.limits),
            max_body_bytes=gate_settings.max_body_bytes,
            body_timeout_seconds=gate_settings.body_timeout_seconds,
            tenant_header=gate_settings.tenant_header,
        )
        on_data = settings.scopes.serve_on == "data"
        self.passing = PassThrough(
            self.upstream,
            self.metrics,
            head_timeout_seconds=settings.upstream.response_timeout_seconds,
        )
        plane = DataPlane(
            gate=self.gate,
            passing=self.passing,
            scopes=scopes if on_data else None,
            routes=[GatedRoute(pattern=route.path, sources=route.sources) for route in gate_settings.routes],
            limits=DataLimits(
                max_body_bytes=gate_settings.max_body_bytes,
                body_timeout_seconds=gate_settings.body_timeout_seconds,
                annotate_response=gate_settings.annotate_response,
                tenant_header=gate_settings.tenant_header,
            ),
            metrics=self.metrics,
        )
        self._data_server = DataServer(plane.handle, head_timeout_seconds=gate_settings.head_timeout_seconds)
        self._admin = Admin(
            store=self.store,
            gate=self.gate,
            scopes=None if on_data else scopes,
            sources=gate_settings.routes[0].sources,
            tenant_header=gate_settings.tenant_header,
            about=About(
                started_at=self._clock(),
                store_url=settings.store.url,
                config_revision=hashlib.sha256(settings.model_dump_json().encode()).hexdigest()[:16],
            ),
        )
        self._ops = Ops(store=self.store, gate=self.gate, metrics=self.metrics)

    async def _account_for_crash(self) -> None:
        """Admissions without an outcome belong to a process that died: nobody knows how they ended (G8)."""
        count = 0
        while (page := await self.store.engine.executions("in_flight", before=None, limit=RECOVERY_PAGE)).rows:
            cause = "the sidecar stopped before the outcome was written"
            await asyncio.gather(
                *(
                    self.store.submit(
                        Settle(
                            decision_id=new_decision_id(),
                            admission_id=execution.decision_id,
                            outcome="unknown",
                            cause=cause,
                        )
                    )
                    for execution in page.rows
                )
            )
            count += len(page.rows)
        if count:
            logger.warning(
                "executions without an outcome are now unknown; reconcile them", extra={"count": count}
            )

    async def _serve(self, name: str, application: web.Application, listen: Listen) -> Listen:
        runner = web.AppRunner(application, access_log=None, handle_signals=False)
        await runner.setup()
        self._runners.append(runner)

        async def begin(listen: Listen) -> Listen:
            await web.TCPSite(runner, listen.host, listen.port).start()
            host, port = runner.addresses[0][:2]
            return Listen(host, port)

        address = await self._listening(name, listen, begin)
        logger.info("listening", extra={"listener": name, "address": str(address)})
        return address

    @staticmethod
    async def _listening[T](name: str, listen: Listen, begin: Callable[[Listen], T]) -> T:
        raise NotImplementedError

    # Stopping ----------------------------------------------------------------------------------

    async def stop(self) -> None:
        """Take nothing new in, let what is in flight end within the drain limit, then close everything."""
        limit = self.settings.shutdown.drain_seconds
        until = time.monotonic() + limit
        self.gate.draining = self.passing.draining = True
        logger.info("draining", extra={"in_flight": self.gate.in_flight, "drain_seconds": limit})
        self._stop_listening()
        unfinished = await self.gate.drain(limit)
        if unfinished:
            logger.warning("the drain is over; executions end as unknown", extra={"count": unfinished})
        await self._until_quiet(until)
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
        while self.passing.under_way and time.monotonic() < until:
            await asyncio.sleep(0.02)
        last_call = time.monotonic() + LAST_CALL_SECONDS
        while self._data_server.connections and time.monotonic() < last_call:
            await asyncio.sleep(0.02)

    async def _close(self) -> None:
        if self._data is not None:
            self._data.close()
        if hasattr(self, "upstream"):
            await self.upstream.close()
        for runner in self._runners:
            await runner.cleanup()
        await self.store.close()


def _terms(values: object) -> ScopeTerms:
    raise NotImplementedError


def _address(listening: socket.socket) -> Listen:
    host, port = listening.getsockname()[:2]
    return Listen(host, port)
