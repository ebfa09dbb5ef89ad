"""Every refusal is recorded: one by one, or in a flood as part of one counted summary (floods.py)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

from sidecar.core.command import Admit, Denied, Issue, Refuse, Replayed, Reply, Revoke
from sidecar.core.rules import Objection
from sidecar.errors import ClockUnsettled, Refusal, StoreUnavailable, unavailable
from sidecar.gate import floods
from sidecar.gate.floods import Allowance, Summaries, Summary
from sidecar.gate.messages import Refused, RequestFacts
from sidecar.gate.observer import Observer
from sidecar.ids import new_decision_id
from sidecar.store.batch import LateReply, Store

# The members that all refusals of a summary share.
SHARED_MEMBERS = ("bound", "rules", "limit", "value", "role", "methods")
THROTTLED = "auth_throttled"
# The Retry-After of a request that the store did not confirm.
RETRY_AFTER_SECONDS = 1
# The Retry-After while the clock cannot be trusted.
CLOCK_RETRY_AFTER_SECONDS = 30


class RefusalLog:
    """Records refusals, one by one or in summaries if there are too many."""

    def __init__(self, store: Store, observer: Observer, clock: Callable[[], float] | None = None) -> None:
        self._store = store
        self._observer = observer
        self._allowance = Allowance(clock)
        self._summaries: Summaries[Refusal, str | None] = Summaries(self._write)
        self._tasks: set[asyncio.Task[None]] = set()

    async def refuse(
        self, refusal: Refusal, facts: RequestFacts, *, retry_after: int | None = None
    ) -> Refused:
        """Refuse a request without a command: record, count and log the refusal. Never raises.

        A throttled credential always shares a summary, so that it takes nothing from the allowance of others.
        """
        if refusal.code != THROTTLED and self._allowance.take():
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
        """Submit a command that may be denied or be a replay. In a flood, that gets no record of its own.

        `late` gets the reply if it comes after the caller gave up. Raises StoreUnavailable.
        """
        reserved = self._allowance.take()
        if not reserved:
            command = replace(command, record_denial=False)

        def come_late(reply: Reply) -> None:
            if reserved and isinstance(reply, Denied | Replayed):
                self._allowance.left -= 1  # it was returned too early: the reply has a record
            late(reply)

        reply: Reply | None = None
        try:
            reply = await self._store.submit(command, late=come_late)
            return reply
        finally:
            if reserved and not isinstance(reply, Denied | Replayed):
                self._allowance.left += 1  # there was neither

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
            reply = await self._store.submit(
                command, late=lambda reply: self._undo(reply, command.decision_id, facts)
            )
        except StoreUnavailable as exc:
            return await self.unconfirmed(exc, facts)
        if isinstance(reply, Denied):  # a freeze wins over shadow mode
            return await self.denied(reply, facts)
        self._observer.allowed(facts, [Objection(refusal, None, shadow=True)])
        return command.decision_id

    def _undo(self, reply: Reply, decision_id: str, facts: RequestFacts) -> None:
        if not isinstance(reply, Denied):
            self.take_back(decision_id, facts)

    def take_back(self, decision_id: str, facts: RequestFacts, count: int = 1) -> None:
        """Record that requests were refused, because the record of their pass was committed too late."""
        refusal = Refusal(
            "store_unavailable",
            "Its record was committed too late; the request was refused.",
            {"admission_id": decision_id},
        )
        task = asyncio.create_task(self._record_late(refusal, facts, count), name="scopegate-late-record")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _record_late(self, refusal: Refusal, facts: RequestFacts, count: int) -> None:
        await self._submit(refusal, facts, count, None)

    async def _summarize(self, refusal: Refusal, facts: RequestFacts) -> str | None:
        """Add a refusal to the summary of its kind, and wait until the summary is committed."""
        bound = refusal.members.get("bound") or ",".join(refusal.members.get("rules", ()))
        bound += refusal.members.get("limit", "")
        kind = (facts.gatekept, refusal.code, str(bound), facts.tenant_id, facts.principal, facts.route)
        return await self._summaries.join(kind, refusal, facts)

    async def _write(self, summary: Summary[Refusal, str | None]) -> str | None:
        first, count = summary.first, summary.count
        if count == 1:
            return await self._submit(first, summary.facts, 1, None)
        refusal = Refusal(
            first.code,
            f"{count} refusals in {floods.SUMMARY_SECONDS:g} s; the first: {first.message}",
            {key: value for key, value in first.members.items() if key in SHARED_MEMBERS},
        )
        return await self._submit(refusal, summary.shared, count, list(summary.subjects))

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
            line=facts.line,
        )
