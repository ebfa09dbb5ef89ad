"""Writes down how executions ended, at once or later. The client's answer never waits long for it.

The client's answer waits for a settlement only for a limited time. If the store refuses a settlement, fails
or does not answer, the settlement is kept in memory and submitted again. A settlement that is committed twice
changes nothing the second time, because its execution has ended already.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import replace

from sidecar.core.command import Admitted, Issued, Reply, Revoke, Settle, Settled, SettledOutcome
from sidecar.core.idempotency import KeptAnswer, without_body
from sidecar.core.principal import Principal
from sidecar.core.record import Origin
from sidecar.errors import CommandFailed, StoreClosed
from sidecar.eventloop.timers import Deadlines
from sidecar.gate.messages import GatedRequest
from sidecar.gate.observer import Observer
from sidecar.gate.reports import TimeLimits
from sidecar.ids import new_decision_id
from sidecar.store.batch import Store
from sidecar.telemetry.events import LogEvent

# The most settlements that wait for the store. A further one is lost, and its execution ends as `unknown` at
# the next start, which is the safe outcome.
MAX_KEPT = 10_000
FIRST_PAUSE_SECONDS = 0.05
LONGEST_PAUSE_SECONDS = 2.0
# The time to wait for the store beyond its own deadline.
GRACE_SECONDS = 0.5


class Settlements:
    """Records settlements, and keeps those in memory that must wait for the store."""

    def __init__(
        self, store: Store, observer: Observer, origin: Origin = "gate", limits: TimeLimits | None = None
    ) -> None:
        self._store = store
        self._origin: Origin = origin
        self._observer = observer
        self._limits = limits
        self._deadlines = Deadlines()
        self._kept: deque[Settle | Revoke] = deque()
        self._writer: asyncio.Task[None] | None = None

    async def settle(
        self,
        admitted: Admitted,
        outcome: SettledOutcome,
        *,
        cost: int | None = None,
        http_status: int | None = None,
        cause: str | None = None,
        answer: KeptAnswer | None = None,
        request: GatedRequest | None = None,
    ) -> Settled | None:
        """Record how an execution ended. The result is None if the settlement must wait for the store, or if
        a report has ended the execution before."""
        command = Settle(
            decision_id=new_decision_id(),
            admission_id=admitted.execution.decision_id,
            outcome=outcome,
            cost=cost,
            http_status=http_status,
            cause=cause,
            answer=answer,
            origin=self._origin,
        )
        begun = time.perf_counter()
        reply = await self._submit(command)
        self._observer.settled(admitted.execution, command, reply, begun, request)
        if outcome == "running" and reply is not None and self._limits is not None:
            self._limits.note(reply)
        return reply if isinstance(reply, Settled) else None

    def give_back(self, reply: Reply) -> None:
        """Reverse an admission or a grant that was committed after its request had been given up."""
        if isinstance(reply, Issued):
            scope = reply.scope
            LogEvent.LATE_GRANT_REVOKED.log(
                decision_id=reply.decision_id, scope_id=scope.scope_id, incident_id=scope.incident_id
            )
            self._keep(
                Revoke(
                    decision_id=new_decision_id(),
                    scope_id=scope.scope_id,
                    tenant_id=scope.tenant_id,
                    principal=Principal(id="scopegate"),
                    cause="the scope was committed only after its request had been given up",
                    origin=self._origin,
                )
            )
        if isinstance(reply, Admitted):
            cause = "the admission was committed only after its request had been given up"
            self._observer.ended("not_sent", reply.execution.route)
            self.later(reply.execution.decision_id, "not_sent", cause)

    def later(self, admission_id: str, outcome: SettledOutcome, cause: str) -> None:
        """Record later how an execution ended. It changes nothing if the execution was not admitted."""
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
        """Wait for the kept settlements a last time.

        Executions of lost ones are `unknown` after a restart.
        """
        if self._writer is not None and not self._writer.done():
            await asyncio.wait([self._writer], timeout=seconds)
            self._writer.cancel()
        if self._kept:
            LogEvent.SETTLEMENTS_LOST.log(count=len(self._kept))

    async def _submit(self, command: Settle) -> Reply | None:
        """Settle now, or keep the settlement for later. Cancellation does not interrupt the write."""
        task = asyncio.current_task()
        assert task is not None
        deadline = self._deadlines.begin(self._store.deadline_seconds + GRACE_SECONDS, task.cancel)
        # The reply comes late if the task is cancelled while the settlement is being committed.
        replies: list[Reply] = []
        try:
            while not replies:
                try:
                    replies.append(await self._store.submit(command, late=replies.append))
                except asyncio.CancelledError:
                    # A settlement that is submitted again changes nothing if it was committed before.
                    task.uncancel()
                    if deadline.due <= asyncio.get_running_loop().time():
                        break
            if replies:
                return replies[0]
            cause = "the store did not answer"
        except Exception as exc:
            cause = str(exc)
        finally:
            deadline.end()
        LogEvent.SETTLEMENT_WAITS.log(decision_id=command.admission_id, cause=cause)
        self._keep(command)
        return None

    def _keep(self, command: Settle | Revoke) -> None:
        if len(self._kept) >= MAX_KEPT:
            _lost(command, f"{MAX_KEPT} are waiting already")
            return
        if isinstance(command, Settle) and command.answer is not None:
            command = replace(command, answer=without_body(command.answer))  # its memory must be bounded
        self._kept.append(command)
        self._observer.unsettled(len(self._kept))
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write_kept(), name="scopegate-settlements")

    async def _write_kept(self) -> None:
        """Write one after the other. One that fails is tried again behind the others."""
        pause = FIRST_PAUSE_SECONDS
        while self._kept:
            try:
                async with asyncio.timeout(self._store.deadline_seconds + GRACE_SECONDS):
                    reply = await self._store.submit(self._kept[0])
                self._observer.overrun(reply)
                if self._limits is not None:
                    self._limits.note(reply)
            except CommandFailed as exc:
                # A retry would fail again and block the other commands.
                _lost(self._kept[0], str(exc))
            except StoreClosed:
                return
            except Exception:
                # The storage may fail for this command only, so the others go first.
                self._kept.rotate(-1)
                await asyncio.sleep(pause)
                pause = min(pause * 2, LONGEST_PAUSE_SECONDS)
                continue
            self._kept.popleft()
            self._observer.unsettled(len(self._kept))
            pause = FIRST_PAUSE_SECONDS


def _lost(command: Settle | Revoke, cause: str) -> None:
    if isinstance(command, Settle):
        LogEvent.SETTLEMENT_LOST.log(decision_id=command.admission_id, cause=cause)
    else:
        LogEvent.LATE_GRANT_STANDS.log(scope_id=command.scope_id, cause=cause)
