"""Every refusal is recorded: singly, or in a flood as one counted summary that all of it shares.

A flood must not fill the disk, and still nothing may be refused without a trace. Above the limit a refusal
waits for its summary to be committed (at most a quarter of a second) and answers with that record's id;
the wait also slows down whoever floods.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from sidecar.core.command import Gatekept, Refuse
from sidecar.core.facts import Claims
from sidecar.errors import Refusal, StoreOverloaded, StoreUnavailable
from sidecar.ids import new_decision_id
from sidecar.store.batch import Store
from sidecar.telemetry import Metrics

logger = logging.getLogger("scopegate.gate")

# 1,000 refusals at once are recorded one by one; after that, 100 a second.
BURST = 1_000
PER_SECOND = 100.0
SUMMARY_SECONDS = 0.25
SHOWN_SUBJECTS = 10


def unavailable(exc: StoreUnavailable) -> Refusal:
    """What a store that could not commit is called on the wire, with its cause."""
    code = "overloaded" if isinstance(exc, StoreOverloaded) else "store_unavailable"
    return Refusal(code, f"Nothing was done: {exc}.", {"cause": str(exc)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """A refusal on its way to the answer; `decision_id` is None where no record could be made."""

    refusal: Refusal
    decision_id: str | None = None
    retry_after: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Who asked for what, as far as it could be read."""

    gatekept: Gatekept = "scoped_execution"
    claims: Claims = field(default_factory=Claims)
    tenant_id: str = "default"
    request_id: str | None = None
    principal: str = "anonymous"
    policy_revision: str | None = None


@dataclass(slots=True, eq=False)
class _Summary:
    refusal: Refusal
    asked: Asked
    recorded: asyncio.Future[str | None]
    count: int = 0
    subjects: dict[str, None] = field(default_factory=dict)


class RefusalLog:
    """Records refusals and knows when there are too many to record one by one."""

    def __init__(self, store: Store, metrics: Metrics, clock: Callable[[], float] | None = None) -> None:
        self._store = store
        self._metrics = metrics
        self._time = clock or asyncio.get_running_loop().time
        self._tokens = float(BURST)
        self._refilled = self._time()
        self._summaries: dict[tuple[str, str, str, str], _Summary] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def has_room(self) -> bool:
        """Whether the next refusal is recorded by itself."""
        now = self._time()
        self._tokens = min(float(BURST), self._tokens + (now - self._refilled) * PER_SECOND)
        self._refilled = now
        return self._tokens >= 1

    def spend(self) -> None:
        """One refusal was recorded by itself."""
        self._tokens -= 1

    async def record(self, refusal: Refusal, asked: Asked, *, retry_after: int | None = None) -> Refused:
        """Record a refusal that no command has recorded yet. Never raises: a refusal stays a refusal."""
        if not self.has_room():
            return await self.summarize(refusal, asked, retry_after=retry_after)
        self.spend()
        decision_id = await self._submit(refusal, asked, 1, None)
        return Refused(refusal=refusal, decision_id=decision_id, retry_after=retry_after)

    async def summarize(self, refusal: Refusal, asked: Asked, *, retry_after: int | None = None) -> Refused:
        """Count a refusal into the summary of its kind, and wait until that is committed."""
        kind = (asked.gatekept, refusal.code, str(refusal.members.get("bound", "")), asked.tenant_id)
        summary = self._summaries.get(kind)
        if summary is None:
            summary = _Summary(refusal, asked, asyncio.get_running_loop().create_future())
            self._summaries[kind] = summary
            task = asyncio.create_task(self._close(kind, summary), name="scopegate-refusal-summary")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        summary.count += 1
        subject = asked.claims.scope_id or asked.claims.incident_id
        if subject is not None and len(summary.subjects) < SHOWN_SUBJECTS:
            summary.subjects[subject] = None
        decision_id = await asyncio.shield(summary.recorded)
        return Refused(refusal=refusal, decision_id=decision_id, retry_after=retry_after)

    async def _close(self, kind: tuple[str, str, str, str], summary: _Summary) -> None:
        await asyncio.sleep(SUMMARY_SECONDS)
        del self._summaries[kind]
        if summary.count == 1:
            decision_id = await self._submit(summary.refusal, summary.asked, 1, None)
        else:
            shared = Asked(
                gatekept=summary.asked.gatekept,
                tenant_id=summary.asked.tenant_id,
                policy_revision=summary.asked.policy_revision,
            )
            refusal = Refusal(
                summary.refusal.code,
                f"{summary.count} refusals in {SUMMARY_SECONDS:g} s; the first: {summary.refusal.message}",
                {key: value for key, value in summary.refusal.members.items() if key == "bound"},
            )
            decision_id = await self._submit(refusal, shared, summary.count, list(summary.subjects))
        summary.recorded.set_result(decision_id)

    async def _submit(
        self, refusal: Refusal, asked: Asked, count: int, subjects: list[str] | None
    ) -> str | None:
        command = Refuse(
            decision_id=new_decision_id(),
            refusal=refusal,
            gatekept=asked.gatekept,
            claims=asked.claims,
            policy_revision=asked.policy_revision,
            tenant_id=asked.tenant_id,
            request_id=asked.request_id,
            principal=asked.principal,
            count=count,
            summary=None if subjects is None else {"subjects": subjects},
        )
        try:
            await self._store.submit(command)
        except StoreUnavailable as exc:
            self.count_unrecorded(refusal, asked, str(exc), count)
            return None
        return command.decision_id

    def count_unrecorded(self, refusal: Refusal, asked: Asked, cause: str, count: int = 1) -> None:
        """G5: while the store does not work, a refusal is at least counted and logged."""
        self._metrics.unrecorded.labels(refusal.code).inc(count)
        logger.warning(
            "refused, not recorded",
            extra={
                "error": refusal.code,
                "cause": cause,
                "count": count,
                "request_id": asked.request_id,
                "scope_id": asked.claims.scope_id,
                "incident_id": asked.claims.incident_id,
                "action": asked.claims.action,
            },
        )
