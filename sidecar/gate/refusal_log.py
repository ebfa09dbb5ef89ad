"""Every refusal is recorded: one by one, or in a flood as part of one counted summary.

A flood must not fill the disk, but every refusal must leave a trace. Above the limit, a refusal is added to
the summary that closes within a quarter of a second. It waits for the summary's commit and answers with the
id of that record. The wait also slows down the clients of the flood.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from sidecar.core.command import Admit, Denied, Gatekept, Issue, Refuse, Reply, Revoke
from sidecar.core.entries import outcome_of
from sidecar.core.facts import Claims
from sidecar.core.policy import PolicySet
from sidecar.core.rules import Objection
from sidecar.errors import Refusal, StoreUnavailable, unavailable
from sidecar.ids import new_decision_id
from sidecar.store.batch import LateReply, Store
from sidecar.telemetry.metrics import Metrics

logger = logging.getLogger("scopegate.gate")

# A burst of 1,000 refusals is recorded one by one; after that, 100 a second.
BURST = 1_000
PER_SECOND = 100.0
SUMMARY_SECONDS = 0.25
SHOWN_SUBJECTS = 10
# The members that all refusals of a summary share.
SHARED_MEMBERS = ("bound", "rules", "limit", "value")
# The Retry-After of a request that the store did not confirm.
RETRY_AFTER_SECONDS = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """A refusal on its way to the answer. `decision_id` is None if no record could be made."""

    refusal: Refusal
    decision_id: str | None = None
    retry_after: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The principal and the claims of a request, as far as they could be read."""

    gatekept: Gatekept = "scoped_execution"
    claims: Claims = field(default_factory=Claims)
    tenant_id: str = "default"
    request_id: str | None = None
    principal: str = "anonymous"
    policies: PolicySet | None = None

    @property
    def action_label(self) -> str:
        """The action as a metric label. Only names of the catalogue are used."""
        if self.claims.action is None or self.policies is None:
            return "none"
        return self.policies.label(self.claims.action)


@dataclass(slots=True, eq=False)
class _Summary:
    refusal: Refusal
    asked: Asked
    recorded: asyncio.Future[str | None]
    count: int = 0
    subjects: dict[str, None] = field(default_factory=dict)


class RefusalLog:
    """Records refusals, one by one or in summaries if there are too many."""

    def __init__(self, store: Store, metrics: Metrics, clock: Callable[[], float] | None = None) -> None:
        self._store = store
        self._metrics = metrics
        self._time = clock or asyncio.get_running_loop().time
        self._tokens = float(BURST)
        self._refilled = self._time()
        self._summaries: dict[tuple[str, str, str, str], _Summary] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def reserve(self) -> bool:
        """Whether the next refusal has a record of its own. If so, a token is taken until `release`."""
        now = self._time()
        self._tokens = min(float(BURST), self._tokens + (now - self._refilled) * PER_SECOND)
        self._refilled = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True

    def release(self, reserved: bool) -> None:
        """Return the token of `reserve`, because there was no refusal."""
        self._tokens += reserved

    async def refuse(self, refusal: Refusal, asked: Asked, *, retry_after: int | None = None) -> Refused:
        """Refuse a request without a command: record, count and log the refusal. Never raises."""
        if self.reserve():
            decision_id = await self._submit(refusal, asked, 1, None)
        else:
            decision_id = await self._summarize(refusal, asked)
        return self._told(refusal, asked, decision_id, retry_after)

    async def denied(self, denied: Denied, asked: Asked) -> Refused:
        """Refuse a request that a command denied. The denial has a record already, except in a flood."""
        self._count_conditions(denied.objections)
        decision_id, retry_after = denied.decision_id, denied.refusal.retry_after_seconds
        if decision_id is None:
            decision_id = await self._summarize(denied.refusal, asked)
        return self._told(denied.refusal, asked, decision_id, retry_after)

    async def submit(self, command: Admit | Issue | Revoke, *, late: LateReply | None = None) -> Reply:
        """Submit a command that may be denied. If it is not denied, its token is returned.

        Raises StoreUnavailable.
        """
        reply: Reply | None = None
        try:
            reply = await self._store.submit(command, late=late)
            return reply
        finally:
            if not isinstance(reply, Denied):
                self.release(command.record_denial)

    def unconfirmed(self, exc: StoreUnavailable, asked: Asked) -> Refused:
        """Refuse a request that the store did not confirm.

        The refusal is counted, because it has no record.
        """
        refusal = unavailable(exc)
        self.unrecorded(refusal, asked, str(exc))
        return Refused(refusal=refusal, retry_after=RETRY_AFTER_SECONDS)

    def undecided(self, cause: str, asked: Asked) -> Refused:
        """What was given up before it was decided is refused, and counted, since there is no record."""
        refusal = Refusal("store_unavailable", f"Nothing was let through: {cause}.", {"cause": cause})
        self.unrecorded(refusal, asked, cause)
        return Refused(refusal=refusal, retry_after=RETRY_AFTER_SECONDS)

    async def pass_over(self, refusal: Refusal, asked: Asked) -> Refused | str:
        """Record a refusal that is not enforced, because its route is in shadow mode. Returns its id.

        Each one has a record of its own, even in a flood, because nothing is admitted unrecorded (G1).
        """
        command = self._command(refusal, asked, 1, None, shadow=True)
        try:
            await self._store.submit(command, late=lambda reply: self._take_back(command, asked))
        except StoreUnavailable as exc:
            return self.unconfirmed(exc, asked)
        self._metrics.decisions.labels("selected", "none", asked.action_label).inc()
        self.let_through([Objection(refusal, None, shadow=True)], asked)
        return command.decision_id

    def _take_back(self, command: Refuse, asked: Asked) -> None:
        """Record that a request was refused, because its shadow record was committed too late."""
        refusal = Refusal(
            "store_unavailable",
            "Its record was committed too late; the request was refused.",
            {"admission_id": command.decision_id},
        )
        task = asyncio.create_task(self._record_late(refusal, asked), name="scopegate-late-record")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _record_late(self, refusal: Refusal, asked: Asked) -> None:
        await self._submit(refusal, asked, 1, None)

    def let_through(self, objections: Sequence[Objection], asked: Asked) -> None:
        """Count and log the objections of shadow rules and routes."""
        self._count_conditions(objections)
        for objection in objections:
            self._metrics.shadow_refusals.labels(objection.refusal.code, objection.rule_id or "").inc()
            logger.info(
                "would be refused",
                extra={
                    "error": objection.refusal.code,
                    "rule": objection.rule_id,
                    "request_id": asked.request_id,
                    "scope_id": asked.claims.scope_id,
                    "incident_id": asked.claims.incident_id,
                    "action": asked.claims.action,
                },
            )

    def _count_conditions(self, objections: Iterable[Objection]) -> None:
        """Count each condition that failed."""
        for objection in objections:
            if "condition_error" in objection.refusal.members:
                self._metrics.condition_errors.labels(objection.rule_id or "").inc()

    def unrecorded(self, refusal: Refusal, asked: Asked, cause: str) -> None:
        """Count and log a refusal that cannot be recorded."""
        self._count_unrecorded(refusal, asked, cause, 1)
        self._count(refusal, asked)

    def _told(
        self, refusal: Refusal, asked: Asked, decision_id: str | None, retry_after: int | None = None
    ) -> Refused:
        self._count(refusal, asked)
        logger.info(
            "refused",
            extra={
                "error": refusal.code,
                "bound": refusal.members.get("bound"),
                "rules": refusal.members.get("rules"),
                "decision_id": decision_id,
                "request_id": asked.request_id,
                "scope_id": asked.claims.scope_id,
                "incident_id": asked.claims.incident_id,
                "action": asked.claims.action,
            },
        )
        return Refused(refusal=refusal, decision_id=decision_id, retry_after=retry_after)

    def _count(self, refusal: Refusal, asked: Asked) -> None:
        outcome = outcome_of(refusal).value
        self._metrics.decisions.labels(outcome, refusal.code, asked.action_label).inc()

    async def _summarize(self, refusal: Refusal, asked: Asked) -> str | None:
        """Add a refusal to the summary of its kind, and wait until the summary is committed."""
        bound = refusal.members.get("bound") or ",".join(refusal.members.get("rules", ()))
        bound += refusal.members.get("limit", "")
        kind = (asked.gatekept, refusal.code, str(bound), asked.tenant_id)
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
        return await asyncio.shield(summary.recorded)

    async def _close(self, kind: tuple[str, str, str, str], summary: _Summary) -> None:
        await asyncio.sleep(SUMMARY_SECONDS)
        del self._summaries[kind]
        if summary.count == 1:
            decision_id = await self._submit(summary.refusal, summary.asked, 1, None)
        else:
            shared = Asked(
                gatekept=summary.asked.gatekept,
                tenant_id=summary.asked.tenant_id,
                policies=summary.asked.policies,
            )
            refusal = Refusal(
                summary.refusal.code,
                f"{summary.count} refusals in {SUMMARY_SECONDS:g} s; the first: {summary.refusal.message}",
                {key: value for key, value in summary.refusal.members.items() if key in SHARED_MEMBERS},
            )
            decision_id = await self._submit(refusal, shared, summary.count, list(summary.subjects))
        summary.recorded.set_result(decision_id)

    async def _submit(
        self, refusal: Refusal, asked: Asked, count: int, subjects: list[str] | None
    ) -> str | None:
        command = self._command(refusal, asked, count, subjects)
        try:
            await self._store.submit(command)
        except StoreUnavailable as exc:
            self._count_unrecorded(refusal, asked, str(exc), count)
            return None
        return command.decision_id

    @staticmethod
    def _command(
        refusal: Refusal, asked: Asked, count: int, subjects: list[str] | None, *, shadow: bool = False
    ) -> Refuse:
        return Refuse(
            decision_id=new_decision_id(),
            refusal=refusal,
            gatekept=asked.gatekept,
            claims=asked.claims,
            policy_revision=asked.policies.revision if asked.policies else None,
            tenant_id=asked.tenant_id,
            request_id=asked.request_id,
            principal=asked.principal,
            count=count,
            summary=None if subjects is None else {"subjects": subjects},
            shadow=shadow,
        )

    def _count_unrecorded(self, refusal: Refusal, asked: Asked, cause: str, count: int) -> None:
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
