"""What a crash leaves behind: admissions without an outcome, of which nobody knows how they ended (G8)."""

from __future__ import annotations

import asyncio
import logging

from sidecar.core.command import Settle
from sidecar.core.record import Origin
from sidecar.ids import new_decision_id
from sidecar.store.batch import Store

logger = logging.getLogger("scopegate.store")

PAGE = 500
CAUSE = "the process stopped before the outcome was written"


async def account_for_crash(store: Store, origin: Origin = "gate") -> None:
    """Settle as `unknown` what a process that is gone had in flight. To be called before the first admission.

    Raises StoreUnavailable.
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
        logger.warning(
            "executions without an outcome are now unknown; reconcile them", extra={"count": count}
        )
