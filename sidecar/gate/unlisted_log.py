"""Records the requests that pass although no route lists them, before they are forwarded.

Each has a record of its own, or in a flood a part of one counted summary. A request whose record is not
committed does not pass.
"""

from __future__ import annotations

from collections.abc import Callable

from sidecar.core.command import PassUnlisted
from sidecar.core.unlisted import Access
from sidecar.errors import StoreUnavailable
from sidecar.gate.floods import Allowance, Summaries, Summary
from sidecar.gate.messages import Refused, RequestFacts
from sidecar.gate.observer import Observer
from sidecar.gate.refusal_log import RefusalLog
from sidecar.ids import new_decision_id
from sidecar.store.batch import Store

UNFORESEEN = StoreUnavailable("the sidecar failed to record it")


class UnlistedLog:
    """Records passes. Reads and writes have a limit each, because there may be far more reads."""

    def __init__(
        self,
        store: Store,
        refusals: RefusalLog,
        observer: Observer,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self._store = store
        self._refusals = refusals
        self._observer = observer
        self._allowances: dict[Access, Allowance] = {"reads": Allowance(clock), "writes": Allowance(clock)}
        self._summaries: Summaries[None, str | StoreUnavailable] = Summaries(self._write)

    async def record(self, access: Access, facts: RequestFacts) -> Refused | str:
        """Record that a request passes, and return the id of the record; or refuse the request."""
        written: str | StoreUnavailable | None
        if self._allowances[access].take():
            written = await self._submit(facts, 1, None)
        else:
            written = await self._summaries.join((access, facts.tenant_id, facts.principal), None, facts)
        if isinstance(written, str):
            self._observer.unlisted(access, "recorded")
            return written
        return await self._refusals.unconfirmed(written or UNFORESEEN, facts)

    async def _write(self, summary: Summary[None, str | StoreUnavailable]) -> str | StoreUnavailable:
        if summary.count == 1:
            return await self._submit(summary.facts, 1, None)
        return await self._submit(summary.shared, summary.count, list(summary.subjects))

    async def _submit(
        self, facts: RequestFacts, count: int, subjects: list[str] | None
    ) -> str | StoreUnavailable:
        command = PassUnlisted(
            decision_id=new_decision_id(),
            line=facts.line,
            policy_revision=facts.policies.revision if facts.policies else None,
            tenant_id=facts.tenant_id,
            request_id=facts.request_id or None,
            principal=facts.principal,
            count=count,
            summary=None if subjects is None else {"subjects": subjects},
        )
        try:
            await self._store.submit(
                command, late=lambda reply: self._refusals.take_back(command.decision_id, facts, count)
            )
        except StoreUnavailable as exc:
            return exc
        return command.decision_id
