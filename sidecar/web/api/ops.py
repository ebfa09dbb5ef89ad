"""The ops listener: liveness, readiness and metrics. It serves nothing else."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from contextlib import suppress
from typing import TypeVar, cast

from aiohttp import web

from sidecar.core.instant import SECOND
from sidecar.errors import StoreUnavailable
from sidecar.gate.execution import Gate
from sidecar.live.snapshot import Live
from sidecar.store.base import Footprint
from sidecar.store.batch import Store
from sidecar.telemetry.instruments import Gauge
from sidecar.telemetry.metrics import Metrics
from sidecar.upstream.custody import NO_CUSTODY, Custody
from sidecar.web.api.operation import Answer, Operation, Reply
from sidecar.web.api.routes import routes
from sidecar.web.serving.hosts import well_formed_hosts
from sidecar.web.wire import health
from sidecar.web.wire.problem import SERVER, problems

T = TypeVar("T")

# The maximum age of a store check for a scrape. The check writes to the disk and occupies the one writer, so
# frequent scrapes must not cause frequent writes. A readiness request always checks anew.
FRESH_SECONDS = 10.0


class ReadinessCheck:
    """Whether the gate can decide requests, and if not, why. It does not depend on the upstream."""

    def __init__(self, *, store: Store, gate: Gate, live: Live, custody: Custody = NO_CUSTODY) -> None:
        self._custody = custody
        self._store = store
        self._gate = gate
        self._live = live
        self._checked_at = float("-inf")

    async def checks(self, *, fresh_seconds: float = 0.0) -> dict[str, str | None]:
        """Each check with its problem, or None if it passes. The store's check may be `fresh_seconds` old."""
        if time.monotonic() - self._checked_at >= fresh_seconds:
            self._checked_at = time.monotonic()  # set before the check, so that concurrent requests share it
            with suppress(StoreUnavailable):  # the store keeps the error in `last_error`
                await self._store.check()
        # The check may be old. A decision that failed since then counts all the same.
        failing = self._store.last_error
        found = {
            "store": failing,
            "log": failing,
            "policies": None if self._live.snapshot.policies else "no valid policy set is loaded",
            "clock": self._store.clock_trouble(),
            "draining": "the sidecar is shutting down" if self._gate.draining else None,
        }
        return found | {"credentials": self._custody.trouble} if self._custody.holds else found

    async def state(self) -> health.Readiness:
        checks = await self.checks()
        shown = cast("health.Checks", {name: health.check(problem) for name, problem in checks.items()})
        return {
            "ready": not any(checks.values()),
            "checks": shown,
            "freezes_active": await self._freezes_active(),
        }

    async def _freezes_active(self) -> int | None:
        found = await in_time(self._store, self._store.engine.freezes_in_force(self._store.now()))
        return None if found is None else len(found)


class Ops:
    """Handlers of the ops listener."""

    def __init__(self, readiness: ReadinessCheck, *, store: Store, metrics: Metrics) -> None:
        self._readiness = readiness
        self._store = store
        self._metrics = metrics

    def application(self) -> web.Application:
        application = web.Application(middlewares=[problems, well_formed_hosts])
        application.add_routes(routes(OPS, self))
        return application

    async def live(self, request: web.Request) -> health.Liveness:
        del request
        return {"alive": True}

    async def ready(self, request: web.Request) -> Reply[health.Readiness]:
        del request
        state = await self._readiness.state()
        return Reply(state, status=200 if state["ready"] else 503)

    async def metrics(self, request: web.Request) -> web.Response:
        del request
        for name, problem in (await self._readiness.checks(fresh_seconds=FRESH_SECONDS)).items():
            self._metrics.ready.labels(name).set(problem is None)
        self._metrics.store_queue.set(self._store.waiting)
        metrics, (unknown, running, footprint) = self._metrics, await measured(self._store)
        frozen = await in_time(self._store, self._store.engine.freezes_in_force(self._store.now()))
        found: list[tuple[Gauge, float | None]] = [
            (metrics.store_size, footprint.size),
            (metrics.store_wal_size, footprint.wal_size),
            (metrics.store_free, footprint.free),
            (metrics.store_growth, footprint.growth_per_day),
        ]
        if unknown is not None:
            count, oldest = unknown
            age = 0.0 if oldest is None else max(0.0, (self._store.now() - oldest) / SECOND)
            found += [(metrics.unknown, count), (metrics.oldest_unknown, age)]
        if running is not None:
            found.append((metrics.running, running[0]))
        if frozen is not None:
            found.append((metrics.freezes_active, len(frozen)))
        for gauge, value in found:
            if value is not None:  # otherwise the last known value stays
                gauge.set(value)
        return web.Response(
            body=self._metrics.page(),
            headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8", "Server": SERVER},
        )


Counted = tuple[int, int | None]


async def measured(store: Store) -> tuple[Counted | None, Counted | None, Footprint]:
    """The count of unknown executions with the oldest one's time, that of running ones with the earliest time
    limit, and the store's footprint.

    A value that cannot be read in time is None. A store that fails or hangs therefore does not block the
    metrics or the status.
    """
    until = asyncio.get_running_loop().time() + store.deadline_seconds
    unknown = await _until(until, store.engine.unknown_executions())
    running = await _until(until, store.engine.running_executions())
    return unknown, running, await _until(until, store.engine.footprint(store.now())) or Footprint()


async def in_time(store: Store, reading: Awaitable[T]) -> T | None:
    """What is read from the store, or None if it cannot be read in time."""
    return await _until(asyncio.get_running_loop().time() + store.deadline_seconds, reading)


async def _until(moment: float, reading: Awaitable[T]) -> T | None:
    try:
        async with asyncio.timeout_at(moment):
            return await reading
    except (StoreUnavailable, TimeoutError):
        return None  # readiness reports the reason


OPS = (
    Operation(
        listener="ops",
        call="GET /health/live",
        name="getLiveness",
        tag="Health",
        summary="Does the process answer?",
        answers=(Answer("It does."),),
        handler=Ops.live,
    ),
    Operation(
        listener="ops",
        call="GET /health/ready",
        name="getReadiness",
        tag="Health",
        summary="Can it decide?",
        description="Does not depend on the backend.",
        answers=(
            Answer("It can."),
            Answer(status="503", description="It cannot; `reason` says why."),
        ),
        handler=Ops.ready,
    ),
    Operation(
        listener="ops",
        call="GET /metrics",
        name="getMetrics",
        tag="Health",
        summary="Metrics, as Prometheus reads them",
        answers=(Answer("All of them.", contents={"text/plain": {"type": "string"}}),),
        handler=Ops.metrics,
    ),
)
