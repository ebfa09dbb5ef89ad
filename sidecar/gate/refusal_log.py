"""Every refusal is recorded: one by one, or in a flood as part of one counted summary.

A flood must not fill the disk, but every refusal must leave a trace. Above the limit, a refusal is added to
the summary that closes within a quarter of a second. It waits for the summary's commit and answers with the
id of that record. The wait also slows down the clients of the flood.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from sidecar.core.command import Admit, Denied, Issue, Refuse, Reply, Revoke
from sidecar.core.rules import Objection
from sidecar.errors import ClockUnsettled, Refusal, StoreUnavailable, unavailable
from sidecar.gate.messages import Refused, RequestFacts
from sidecar.gate.observer import Observer
from sidecar.ids import new_decision_id
from sidecar.store.batch import LateReply, Store

# A burst of 1,000 refusals is recorded one by one; after that, 100 a second.
BURST = 1_000
PER_SECOND = 100.0
SUMMARY_SECONDS = 0.25
SHOWN_SUBJECTS = 10
# The members that all refusals of a summary share.
SHARED_MEMBERS = ("bound", "rules", "limit", "value")
# The Retry-After of a request that the store did not confirm.
RETRY_AFTER_SECONDS = 1
# The Retry-After while the clock cannot be trusted.
CLOCK_RETRY_AFTER_SECONDS = 30


# What the refusals of one summary share: the subject, code, bound, tenant and route.
_Kind = tuple[str, str, str, str, str | None]


@dataclass(slots=True, eq=False)
class _Summary:
    refusal: Refusal
    facts: RequestFacts
    recorded: asyncio.Future[str | None]
    count: int = 0
    subjects: dict[str, None] = field(default_factory=dict)


class RefusalLog:
    """Records refusals, one by one or in summaries if there are too many."""

    def __init__(self, store: Store, observer: Observer, clock: Callable[[], float] | None = None) -> None:
        self._store = store
        self._observer = observer
        self._time = clock or asyncio.get_running_loop().time
        self._tokens = float(BURST)
        self._refilled = self._time()
        self._summaries: dict[_Kind, _Summary] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def refuse(
        self, refusal: Refusal, facts: RequestFacts, *, retry_after: int | None = None
    ) -> Refused:
        """Refuse a request without a command: record, count and log the refusal. Never raises."""
        if self._reserve():
            decision_id = await self._submit(refusal, facts, 1, None)
        else:
            decision_id = await self._summarize(refusal, facts)
        self._observer.refused(facts, refusal, decision_id)
        return Refused(refusal=refusal, decision_id=decision_id, retry_after=retry_after)

    async def denied(self, denied: Denied, facts: RequestFacts) -> Refused:
        """Refuse a request that a command denied. The denial has a record already, except in a flood."""
        decision_id = denied.decision_id
        if decision_id is None:
            decision_id = await self._summarize(denied.refusal, facts)
        self._observer.refused(facts, denied.refusal, decision_id, denied.objections)
        return Refused(refusal=denied.refusal, decision_id=decision_id)

    async def submit(self, command: Admit | Issue | Revoke, *, late: LateReply) -> Reply:
        """Submit a command that may be denied. In a flood, its denial gets no record of its own.

        `late` gets the reply if it comes after the caller gave up. Raises StoreUnavailable.
        """
        reserved = self._reserve()
        if not reserved:
            command = replace(command, record_denial=False)

        def come_late(reply: Reply) -> None:
            if reserved and isinstance(reply, Denied):
                self._tokens -= 1  # it was returned too early: the denial has a record
            late(reply)

        reply: Reply | None = None
        try:
            reply = await self._store.submit(command, late=come_late)
            return reply
        finally:
            if reserved and not isinstance(reply, Denied):
                self._tokens += 1  # there was no refusal

    async def unconfirmed(self, exc: StoreUnavailable, facts: RequestFacts) -> Refused:
        """Refuse a request that the store did not confirm.

        If the clock is the reason, the store still records the refusal.
        """
        if isinstance(exc, ClockUnsettled):
            return await self.refuse(unavailable(exc), facts, retry_after=CLOCK_RETRY_AFTER_SECONDS)
        return self.unrecorded(unavailable(exc), facts, str(exc))

    def undecided(self, cause: str, facts: RequestFacts) -> Refused:
        """Refuse a request that was given up before it was decided."""
        refusal = Refusal("store_unavailable", f"Nothing was let through: {cause}.", {"cause": cause})
        return self.unrecorded(refusal, facts, cause)

    def unrecorded(self, refusal: Refusal, facts: RequestFacts, cause: str) -> Refused:
        """Refuse a request without a record. The refusal is counted and logged instead (G5)."""
        self._observer.refused_unrecorded(facts, refusal, cause)
        return Refused(refusal=refusal, retry_after=RETRY_AFTER_SECONDS)

    async def pass_over(self, refusal: Refusal, facts: RequestFacts) -> Refused | str:
        """Record a refusal that is not enforced, because its route is in shadow mode. Returns its id.

        Each one has a record of its own, even in a flood, because nothing is admitted unrecorded (G1).
        """
        command = self._command(refusal, facts, 1, None, shadow=True)
        try:
            await self._store.submit(command, late=lambda reply: self._take_back(command, facts))
        except StoreUnavailable as exc:
            return await self.unconfirmed(exc, facts)
        self._observer.allowed(facts, [Objection(refusal, None, shadow=True)])
        return command.decision_id

    def _take_back(self, command: Refuse, facts: RequestFacts) -> None:
        """Record that a request was refused, because its shadow record was committed too late."""
        refusal = Refusal(
            "store_unavailable",
            "Its record was committed too late; the request was refused.",
            {"admission_id": command.decision_id},
        )
        task = asyncio.create_task(self._record_late(refusal, facts), name="scopegate-late-record")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _record_late(self, refusal: Refusal, facts: RequestFacts) -> None:
        await self._submit(refusal, facts, 1, None)

    def _reserve(self) -> bool:
        """Whether the next refusal has a record of its own. If so, it takes a token."""
        now = self._time()
        self._tokens = min(float(BURST), self._tokens + (now - self._refilled) * PER_SECOND)
        self._refilled = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True

    async def _summarize(self, refusal: Refusal, facts: RequestFacts) -> str | None:
        """Add a refusal to the summary of its kind, and wait until the summary is committed."""
        bound = refusal.members.get("bound") or ",".join(refusal.members.get("rules", ()))
        bound += refusal.members.get("limit", "")
        kind = (facts.gatekept, refusal.code, str(bound), facts.tenant_id, facts.route)
        summary = self._summaries.get(kind)
        if summary is None:
            summary = _Summary(refusal, facts, asyncio.get_running_loop().create_future())
            self._summaries[kind] = summary
            task = asyncio.create_task(self._close(kind, summary), name="scopegate-refusal-summary")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        summary.count += 1
        subject = facts.claims.scope_id or facts.claims.incident_id
        if subject is not None and len(summary.subjects) < SHOWN_SUBJECTS:
            summary.subjects[subject] = None
        return await asyncio.shield(summary.recorded)

    async def _close(self, kind: _Kind, summary: _Summary) -> None:
        await asyncio.sleep(SUMMARY_SECONDS)
        del self._summaries[kind]
        decision_id: str | None = None
        try:
            if summary.count == 1:
                decision_id = await self._submit(summary.refusal, summary.facts, 1, None)
            else:
                shared = RequestFacts(
                    gatekept=summary.facts.gatekept,
                    tenant_id=summary.facts.tenant_id,
                    route=summary.facts.route,
                    policies=summary.facts.policies,
                )
                refusal = Refusal(
                    summary.refusal.code,
                    f"{summary.count} refusals in {SUMMARY_SECONDS:g} s; "
                    f"the first: {summary.refusal.message}",
                    {key: value for key, value in summary.refusal.members.items() if key in SHARED_MEMBERS},
                )
                decision_id = await self._submit(refusal, shared, summary.count, list(summary.subjects))
        finally:
            summary.recorded.set_result(decision_id)  # its clients wait for this

    async def _submit(
        self, refusal: Refusal, facts: RequestFacts, count: int, subjects: list[str] | None
    ) -> str | None:
        command = self._command(refusal, facts, count, subjects)
        try:
            await self._store.submit(command)
        except StoreUnavailable as exc:
            self._observer.unrecorded(facts, refusal, str(exc), count)
            return None
        return command.decision_id

    @staticmethod
    def _command(
        refusal: Refusal, facts: RequestFacts, count: int, subjects: list[str] | None, *, shadow: bool = False
    ) -> Refuse:
        return Refuse(
            decision_id=new_decision_id(),
            refusal=refusal,
            gatekept=facts.gatekept,
            claims=facts.claims,
            policy_revision=facts.policies.revision if facts.policies else None,
            tenant_id=facts.tenant_id,
            request_id=facts.request_id or None,
            principal=facts.principal,
            route=facts.route,
            count=count,
            summary=None if subjects is None else {"subjects": subjects},
            shadow=shadow,
        )
