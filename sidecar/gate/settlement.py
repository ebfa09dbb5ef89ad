"""Writes down how executions ended, at once or later. The client's answer never waits long for it.

What was committed only after its caller had been told that it was not is taken back here, too: an admission
ends as not sent, and a scope is revoked, since its caller does not know its name and would ask for another.

A settlement that the store refuses, or does not answer, is not lost: it is kept and submitted again. One that
gets through twice finds its execution ended, and changes nothing.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Mapping
from typing import Any, Literal

from sidecar.core.command import Admitted, Issued, Reply, Revoke, Settle, Settled
from sidecar.core.record import Origin
from sidecar.errors import CommandFailed, StoreClosed, StoreUnavailable
from sidecar.ids import new_decision_id
from sidecar.store.batch import Store
from sidecar.telemetry.metrics import Metrics

logger = logging.getLogger("scopegate.gate")

# Settlements that the store would not take yet. Beyond it one is lost, and its execution ends as `unknown`
# at the next start, which is the safe side.
MAX_KEPT = 10_000
FIRST_PAUSE_SECONDS = 0.05
LONGEST_PAUSE_SECONDS = 2.0
# Beyond the store's own deadline, after which it is not waited for any more.
GRACE_SECONDS = 0.5


class Settlements:
    """Writes settlements, and keeps in memory those that have to wait for the store."""

    def __init__(self, store: Store, metrics: Metrics, origin: Origin = "gate") -> None:
        self._store = store
        self._origin: Origin = origin
        self._metrics = metrics
        self._kept: deque[Settle | Revoke] = deque()
        self._writer: asyncio.Task[None] | None = None

    async def settle(
        self,
        admitted: Admitted,
        log_fields: Mapping[str, Any],
        outcome: Literal["answered", "not_sent", "unknown"],
        cost: int | None = None,
        http_status: int | None = None,
        cause: str | None = None,
    ) -> Settled | None:
        """Write down how an execution ended; None where that has to wait for the store."""
        command = Settle(
            decision_id=new_decision_id(),
            admission_id=admitted.execution.decision_id,
            outcome=outcome,
            cost=cost,
            http_status=http_status,
            cause=cause,
            origin=self._origin,
        )
        begun = time.perf_counter()
        settled = await self._submit(command)
        self._metrics.settle.observe(time.perf_counter() - begun)
        self._metrics.executions.labels(outcome).inc()
        self.count_overrun(settled)
        logger.info(
            "executed" if outcome == "answered" else f"execution {outcome}",
            extra={
                "decision_id": admitted.execution.decision_id,
                "request_id": admitted.execution.request_id,
                "scope_id": admitted.execution.scope_id,
                "incident_id": admitted.execution.incident_id,
                "action": admitted.execution.action,
                "attempt_number": admitted.execution.attempt_number,
                "http_status": http_status,
                "cause": cause,
                "settled": settled is not None,
                **log_fields,
            },
        )
        return settled

    def give_back(self, reply: Reply) -> None:
        """Take back what was committed after its request had been given up."""
        if isinstance(reply, Issued):
            scope = reply.scope
            logger.warning(
                "a scope was granted too late and is revoked",
                extra={
                    "decision_id": reply.decision_id,
                    "scope_id": scope.scope_id,
                    "incident_id": scope.incident_id,
                },
            )
            self._keep(
                Revoke(
                    decision_id=new_decision_id(),
                    scope_id=scope.scope_id,
                    tenant_id=scope.tenant_id,
                    principal="scopegate",
                    cause="the scope was committed only after its request had been given up",
                    origin=self._origin,
                )
            )
        if isinstance(reply, Admitted):
            cause = "the admission was committed only after its request had been given up"
            self._metrics.executions.labels("not_sent").inc()
            self.later(reply.execution.decision_id, "not_sent", cause)

    def later(self, admission_id: str, outcome: Literal["not_sent", "unknown"], cause: str) -> None:
        """Write down without waiting for it how an execution ended, if it was admitted at all."""
        self._keep(
            Settle(
                decision_id=new_decision_id(),
                admission_id=admission_id,
                outcome=outcome,
                cause=cause,
                origin=self._origin,
            )
        )

    async def close(self, seconds: float = 2.0) -> None:
        """Give what is kept a last chance. What is lost then ends as `unknown` at the next start."""
        if self._writer is not None and not self._writer.done():
            await asyncio.wait([self._writer], timeout=seconds)
            self._writer.cancel()
        if self._kept:
            logger.error(
                "settlements are lost; their executions are unknown after a restart",
                extra={"count": len(self._kept)},
            )

    async def _submit(self, command: Settle) -> Settled | None:
        """Settle now, or keep it for later. Cancellation waits: what must be written is written."""
        loop = asyncio.get_running_loop()
        submitting = asyncio.ensure_future(self._store.submit(command))
        until = loop.time() + self._store.deadline_seconds + GRACE_SECONDS
        while not submitting.done() and (left := until - loop.time()) > 0:
            try:
                await asyncio.wait([submitting], timeout=left)
            except asyncio.CancelledError:
                continue
        failure: BaseException | None
        if not submitting.done():
            submitting.cancel()
            failure = StoreUnavailable("the store did not answer")
        elif submitting.cancelled():
            failure = StoreUnavailable("it was cancelled")
        else:
            failure = submitting.exception()
        if failure is None:
            reply = submitting.result()
            return reply if isinstance(reply, Settled) else None
        logger.warning(
            "a settlement waits for the store",
            extra={"decision_id": command.admission_id, "cause": str(failure)},
        )
        self._keep(command)
        return None

    def count_overrun(self, reply: Reply | None) -> None:
        """An execution may also be found to have cost too much when it is reconciled."""
        if isinstance(reply, Settled) and reply.overrun:
            self._metrics.cost_overruns.inc()

    def _keep(self, command: Settle | Revoke) -> None:
        if len(self._kept) >= MAX_KEPT:
            _lost(command, f"{MAX_KEPT} are waiting already")
            return
        self._kept.append(command)
        self._metrics.unsettled.set(len(self._kept))
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write_kept(), name="scopegate-settlements")

    async def _write_kept(self) -> None:
        """Write one after the other. One that fails is tried again behind the others."""
        pause = FIRST_PAUSE_SECONDS
        while self._kept:
            try:
                async with asyncio.timeout(self._store.deadline_seconds + GRACE_SECONDS):
                    self.count_overrun(await self._store.submit(self._kept[0]))
            except CommandFailed as exc:
                # It must not stand in the way of the others for ever.
                _lost(self._kept[0], str(exc))
            except StoreClosed:
                return
            except Exception:
                # The storage does not work, or not with this one: then it must not hold up the others.
                self._kept.rotate(-1)
                await asyncio.sleep(pause)
                pause = min(pause * 2, LONGEST_PAUSE_SECONDS)
                continue
            self._kept.popleft()
            self._metrics.unsettled.set(len(self._kept))
            pause = FIRST_PAUSE_SECONDS


def _lost(command: Settle | Revoke, cause: str) -> None:
    if isinstance(command, Settle):
        logger.error(
            "a settlement is lost; its execution is unknown after a restart",
            extra={"decision_id": command.admission_id, "cause": cause},
        )
    else:
        logger.error(
            "a scope that was granted too late could not be revoked",
            extra={"scope_id": command.scope_id, "cause": cause},
        )
