"""Settles the admissions that a crash left without an outcome. Their outcome is unknown (G8)."""

from __future__ import annotations

import asyncio

from sidecar.core.command import Settle
from sidecar.core.record import Origin
from sidecar.ids import new_decision_id
from sidecar.store.batch import Store
from sidecar.telemetry.events import LogEvent

PAGE = 500
CAUSE = "the process stopped before the outcome was written"


async def account_for_crash(store: Store, origin: Origin = "gate") -> None:
    """Settle as `unknown` every execution that an earlier process left in flight.

    Call it before the first admission. Raises StoreUnavailable.
    """
    count = 0
    while (page := await store.engine.executions("in_flight", before=None, limit=PAGE)).rows:
        settlements = (
            Settle(
                decision_id=new_decision_id(),
                admission_id=execution.decision_id,
                outcome="unknown",
                cause=CAUSE,
                origin=origin,
            )
            for execution in page.rows
        )
        await asyncio.gather(*map(store.submit, settlements))
        count += len(page.rows)
    if count:
        LogEvent.LEFT_UNKNOWN.log(count=count)
