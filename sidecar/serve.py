"""The wiring of the sidecar: from the settings to the store, the gate and the listeners, and the drain.

This is the only module that wires the parts together. It makes no decisions.
"""

from __future__ import annotations

import asyncio
import time
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

from aiohttp import web

from sidecar.auth import callers as callerfiles
from sidecar.auth.callers import Callers
from sidecar.auth.methods import Bearers, Methods
from sidecar.clock import Clock, second_clock, wall_clock
from sidecar.core.policy import PolicySet
from sidecar.files.tls import Credentials, client_context, server_context
from sidecar.gate.execution import Gate
from sidecar.gate.grants import Grants
from sidecar.gate.observer import Observer
from sidecar.gate.refusal_log import RefusalLog
from sidecar.gate.reports import TimeLimits
from sidecar.gate.unlisted_log import UnlistedLog
from sidecar.live.access import warning_of
from sidecar.live.reload import Files, Reloader, announce_unlisted, warn_of_openings
from sidecar.live.renewal import LOOK_SECONDS, Renewal
from sidecar.live.snapshot import Live, Snapshot
from sidecar.settings.addresses import Address
from sidecar.settings.auth import JwtSection
from sidecar.settings.sections import (
    ListenTlsSection,
    LogSection,
    Settings,
    TelemetrySection,
    UpstreamSection,
)
from sidecar.store.batch import Store
from sidecar.store.checkpoints import Checkpointer
from sidecar.store.crash import account_for_crash
from sidecar.store.sqlite import SqliteEngine
from sidecar.telemetry.events import LogEvent
from sidecar.telemetry.metrics import Metrics
from sidecar.telemetry.tracing import Tracing
from sidecar.upstream import Upstream, UpstreamTls
from sidecar.upstream.custody import Custody
from sidecar.web.api.access import Access
from sidecar.web.api.admin import Admin
from sidecar.web.api.docs import Docs
from sidecar.web.api.emitters import EmitterApi
from sidecar.web.api.executions import ExecutionApi
from sidecar.web.api.explain import ExplainApi
from sidecar.web.api.ops import Ops, ReadinessCheck
from sidecar.web.api.reports import ReportApi
from sidecar.web.api.scopes import ScopeApi
from sidecar.web.api.state import About, StateApi
from sidecar.web.data.passthrough import PassThroughProxy
from sidecar.web.data.plane import DataPlane
from sidecar.web.serving.accesslog import AccessLog
from sidecar.web.serving.connections import (
    Connection,
    keep_requests_out_of_logs,
    require_fast_parser,
)
from sidecar.web.serving.dataconnection import DataServer
from sidecar.web.serving.identity import Identities
from sidecar.web.serving.listener import Factory, Listener, connections, file_limit
from sidecar.web.wire.answers import Listeners

if TYPE_CHECKING:
    from sidecar.auth.jwks import IssuerKeys

# The time before an idle connection is closed in the drain.
LAST_CALL_SECONDS = 0.5
POLL_SECONDS = 0.02
# The time to write answers that are ready. aiohttp waits for this time twice.
FLUSH_SECONDS = 1.0
# The time for a TLS handshake and for a request head, on listeners without a setting for it.
HANDSHAKE_SECONDS = 5.0
HEAD_SECONDS = 10.0
# The mode of a Unix socket: its group may use the data and ops sockets, only its owner the admin socket.
SOCKET_MODES = {"data": 0o660, "admin": 0o600, "ops": 0o660}
# The time to send the last spans, as far as the drain limit leaves it.
SPANS_SECONDS = 2.0


class Sidecar:
    """One running sidecar: `async with Sidecar(settings, policies) as sidecar`. Raises ScopegateError.

    With `files`, the sources of these arguments, it can reload, and reloads when the files change. Without
    `callers` it reads the files that the settings name, and raises ConfigurationError if they are wrong.
    """

    def __init__(
        self,
        settings: Settings,
        policies: PolicySet | None,
        *,
        callers: Callers | None = None,
        files: Files | None = None,
        clock: Clock = wall_clock,
        elapsed: Clock | None = None,
        renewal_seconds: float = LOOK_SECONDS,
    ) -> None:
        require_fast_parser()
        keep_requests_out_of_logs()
        self.settings = settings
        self.connections = connections(file_limit(), settings.upstream.max_connections)
        self.metrics = Metrics()
        self._checkpointer = _checkpointer(settings.log, self.metrics)
        self.store = Store(
            SqliteEngine(settings.store.file),
            clock=clock,
            elapsed=elapsed,
            settle_seconds=settings.clock.settle_seconds,
            deadline_seconds=settings.store.deadline_seconds,
            observer=self._checkpointer or self.metrics,
            mask=settings.log.masking(),
        )
        self.custody = Custody(settings.upstream.credentials)
        self.issuer_keys, jwt = _issuer(settings.auth.jwt, self.metrics)
        known = callerfiles.read(settings.auth) if callers is None else callers
        self.live = Live(Snapshot(settings, policies, Methods.configured(settings.auth, known, jwt=jwt)))
        self.reloader = Reloader(files, live=self.live, metrics=self.metrics, clock=clock)
        self._files = files
        self.tracing = Tracing()
        self._watching: asyncio.Task[None] | None = None
        self._clock = clock
        self._elapsed = second_clock(clock, elapsed)
        self.data_address = settings.data.listen
        self.ops_address = settings.ops.listen
        self._renewal_seconds = renewal_seconds
        self._renewing: asyncio.Task[None] | None = None
        self._in_custody: asyncio.Task[None] | None = None
        self._credentials: list[Credentials] = []
        self._open: dict[str, Listener] = {}
        self._runners: list[web.AppRunner] = []
        self.hung = False  # the store or the checkpoint file could not be closed

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
        """Open the store, settle the executions that a crash left open, then listen.

        Raises ScopegateError.
        """
        self._wire()
        await self.store.open()
        await account_for_crash(self.store)
        await self.limits.begin()
        if self._checkpointer is not None:
            self._checkpointer.start(self.store)
        settings = self.settings
        self.ops_address = await self._serve("ops", self._ops.application(), settings.ops.listen)
        if self.issuer_keys is not None:
            self.issuer_keys.on_change = lambda: self.live.snapshot.methods.forget()
            await self.issuer_keys.start()
        self.admin_address = await self._serve("admin", self._admin.application(), settings.admin.listen)
        self.data_address = await self._listen("data", self._data_server, settings.data.listen)
        self._renewing = asyncio.create_task(self.renewal.watch())
        self._in_custody = asyncio.create_task(self.custody.watch())
        says = warning_of(self.live.snapshot)
        if says is not None:
            event = LogEvent.NO_ROLES if self.live.snapshot.methods.names else LogEvent.OPEN_CALLS
            event.log(says=says)
        announce_unlisted(self.live.snapshot.settings)
        warn_of_openings(self.live.snapshot.settings)
        if self._files is not None:
            self._watching = asyncio.create_task(self.reloader.watch())

    def _wire(self) -> None:
        settings = self.settings
        upstream_tls = _towards(settings.upstream)
        self._credentials = [
            credentials
            for credentials in (
                _listening("data", settings.data.tls),
                _listening("admin", settings.admin.tls),
                _listening("ops", settings.ops.tls),
                upstream_tls and upstream_tls.credentials,
            )
            if credentials
        ]
        self.renewal = Renewal(
            self._credentials, metrics=self.metrics, clock=self._clock, every=self._renewal_seconds
        )
        self.reloader.renew = self.renewal.look
        self.upstream = Upstream(
            settings.upstream.address,
            secured=upstream_tls,
            connect_timeout=settings.upstream.connect_timeout_seconds,
            reuse_idle_seconds=settings.upstream.reuse_idle_seconds,
            max_connections=settings.upstream.max_connections,
        )
        observer = Observer(self.metrics)
        self.limits = TimeLimits(self.store, observer)
        refusals = RefusalLog(self.store, observer)
        self.gate = Gate(
            store=self.store,
            upstream=self.upstream,
            refusals=refusals,
            observer=observer,
            limits=self.limits,
            custody=self.custody,
        )
        self.unlisted_log = UnlistedLog(self.store, refusals, observer)
        grants = Grants(store=self.store, gate=self.gate, observer=observer)
        scopes = ScopeApi(store=self.store, gate=self.gate, grants=grants, live=self.live)
        on_data = settings.scopes.serve_on == "data"
        self.passing = PassThroughProxy(self.upstream, self.metrics, live=self.live, custody=self.custody)
        self.tracing = _tracing(settings.telemetry)
        identities = Identities(self.metrics, self.store.now)
        access_log = AccessLog(self.live)
        plane = DataPlane(
            gate=self.gate,
            passing=self.passing,
            unlisted=self.unlisted_log,
            scopes=scopes if on_data else None,
            reports=ReportApi(store=self.store, gate=self.gate, live=self.live, custody=self.custody),
            identities=identities,
            live=self.live,
            metrics=self.metrics,
            observer=observer,
            tracing=self.tracing,
        )
        self._data_server = DataServer(
            plane.handle, on_ended=access_log.ended, head_timeout_seconds=settings.gate.head_timeout_seconds
        )
        readiness = ReadinessCheck(store=self.store, gate=self.gate, live=self.live, custody=self.custody)
        about = About(
            started_at=self._elapsed(),
            elapsed=self._elapsed,
            store_url=settings.store.url,
            listeners=self._listeners,
            scopes_served_on=settings.scopes.serve_on,
        )
        self._admin = Admin(
            store=self.store,
            live=self.live,
            scopes=None if on_data else scopes,
            executions=ExecutionApi(store=self.store, gate=self.gate),
            explain=ExplainApi(grants=grants, live=self.live),
            emitters=EmitterApi(store=self.store, metrics=self.metrics, live=self.live),
            state=StateApi(
                store=self.store,
                gate=self.gate,
                live=self.live,
                reloader=self.reloader,
                readiness=readiness,
                about=about,
            ),
            docs=Docs(self._document, self.live),
            access=Access(identities, refusals, self.live),
        )
        self._ops = Ops(readiness, store=self.store, metrics=self.metrics)

    def _document(self, settings: Settings) -> dict[str, Any]:
        """The OpenAPI document of these settings."""
        from sidecar.web.api.openapi.document import document  # slow to import, and read by few

        return document(settings, data=self.data_address, ops=self.ops_address)

    def _listeners(self) -> Listeners:
        """The actual address of each listener, as `status` shows it."""
        settings = self.settings
        return {
            "data": _url(self.data_address, settings.data.tls),
            "admin": _url(self.admin_address, settings.admin.tls),
            "ops": _url(self.ops_address, settings.ops.tls),
        }

    async def _serve(self, name: str, application: web.Application, address: Address) -> Address:
        runner = web.AppRunner(
            application, access_log=None, handle_signals=False, shutdown_timeout=FLUSH_SECONDS
        )
        await runner.setup()
        self._runners.append(runner)
        server = runner.server
        assert server is not None
        loop = asyncio.get_running_loop()
        return await self._listen(
            name, lambda: Connection(server, head_seconds=HEAD_SECONDS, loop=loop), address
        )

    async def _listen(self, name: str, protocol: Factory, address: Address) -> Address:
        patience = self.settings.gate.head_timeout_seconds if name == "data" else HANDSHAKE_SECONDS
        credentials = next((each for each in self._credentials if each.name == name), None)
        listener = self._open[name] = Listener(
            name,
            protocol,
            credentials=credentials,
            handshake_seconds=patience,
            mode=SOCKET_MODES[name],
            most=self.connections[name],
        )
        return await listener.open(address)

    # Stopping ----------------------------------------------------------------------------------

    async def stop(self) -> None:
        """Accept nothing new, wait for requests in flight within the drain limit, then close everything."""
        limit = self.live.snapshot.settings.shutdown.drain_seconds
        # Closing takes time, too. Draining and closing together stay within the limit unless it is very
        # short.
        patience = max(limit * 0.8, limit - LAST_CALL_SECONDS - 2 * FLUSH_SECONDS)
        ends = time.monotonic() + limit
        until = time.monotonic() + patience
        self.gate.draining = self.passing.draining = self.reloader.draining = True
        LogEvent.DRAINING.log(in_flight=self.gate.in_flight, drain_seconds=limit)
        self._open["data"].close()
        unfinished = await self.gate.drain(patience)
        if unfinished:
            LogEvent.DRAIN_IS_OVER.log(count=unfinished)
        await self._until_quiet(until)
        # The remaining requests may never end by themselves (event streams, WebSockets, stalled uploads).
        await self.upstream.close()
        self._data_server.pre_shutdown()
        await self._data_server.shutdown(FLUSH_SECONDS)
        await self._close(min(SPANS_SECONDS, max(LAST_CALL_SECONDS, ends - time.monotonic())))
        LogEvent.STOPPED.log()

    async def _until_quiet(self, until: float) -> None:
        """Wait for pass-through requests to end, and for idle connections for a short time."""
        last_call = time.monotonic() + LAST_CALL_SECONDS
        while (self.passing.under_way and time.monotonic() < until) or (
            (self._data_server.connections or self._open["data"].tasks) and time.monotonic() < last_call
        ):
            await asyncio.sleep(POLL_SECONDS)

    async def _close(self, spans_seconds: float = SPANS_SECONDS) -> None:
        spans = asyncio.create_task(self.tracing.close(spans_seconds))
        for listener in self._open.values():
            listener.close()
        await self.upstream.close()
        await self.limits.close()
        for task in (self._watching, self._renewing, self._in_custody):
            if task is not None:
                task.cancel()
                await asyncio.wait([task])
        if self.issuer_keys is not None:
            await self.issuer_keys.close()
        for runner in self._runners:
            await runner.cleanup()
        for listener in self._open.values():
            listener.abort()
        attested = True
        if self._checkpointer is not None:
            await self.store.until_idle()
            attested = await self._checkpointer.close()
        self.hung = not await self.store.close() or not attested
        await spans


def _tracing(telemetry: TelemetrySection) -> Tracing:
    if telemetry.otlp_endpoint is None:
        return Tracing()
    from sidecar.telemetry.otel import OtelTracing  # an optional extra, and slow to import

    return OtelTracing(telemetry.otlp_endpoint)


def _issuer(jwt: JwtSection, metrics: Metrics) -> tuple[IssuerKeys | None, Bearers | None]:
    """The keys of the issuer, and what verifies its tokens with them."""
    if jwt.issuer is None or jwt.jwks is None:
        return None, None
    from sidecar.auth.jwks import IssuerKeys  # an optional extra, and slow to import
    from sidecar.auth.jwt import JwtVerifier

    keys = IssuerKeys(jwt.jwks, metrics=metrics, ca_file=jwt.ca_file)
    return keys, JwtVerifier(jwt, keys)


def _checkpointer(log: LogSection, metrics: Metrics) -> Checkpointer | None:
    if log.signing_key_file is None or log.checkpoint_file is None:
        return None
    from sidecar.files.signing import load_signing_key  # slow to import

    return Checkpointer(load_signing_key(log.signing_key_file), log.checkpoint_file, metrics)


def _url(address: Address, tls: ListenTlsSection) -> str:
    return f"https://{address}" if tls.certificate_file else str(address)


def _listening(name: str, tls: ListenTlsSection) -> Credentials | None:
    if not tls.certificate_file:
        return None
    make = partial(server_context, is_optional=tls.is_certificate_optional)
    return Credentials(name, tls.files(), make)


def _towards(upstream: UpstreamSection) -> UpstreamTls | None:
    if upstream.verified_name is None:
        return None
    credentials = Credentials("upstream", upstream.tls.files(), client_context)
    return UpstreamTls(credentials=credentials, server_name=upstream.verified_name)
