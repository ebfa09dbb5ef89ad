"""The call of the admin listener that accepts the wall clock when the clock and the log disagree."""

from __future__ import annotations

from aiohttp import web

from sidecar.core.command import AcceptClock, ClockAccepted
from sidecar.core.record import iso_time
from sidecar.ids import new_decision_id
from sidecar.store.batch import Store
from sidecar.telemetry.events import LogEvent
from sidecar.web.wire.asked import request_id_of
from sidecar.web.wire.problem import answer


class ClockApi:
    """A handler of the admin listener. It answers once the acceptance is on disk; otherwise 503."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def routes(self) -> list[web.RouteDef]:
        return [web.post("/api/v1/store/accept-clock", self._accept)]

    async def _accept(self, request: web.Request) -> web.Response:
        reply = await self._store.submit(
            AcceptClock(decision_id=new_decision_id(), request_id=request_id_of(request))
        )
        assert isinstance(reply, ClockAccepted)
        step = (reply.now - reply.before) / 1_000_000
        LogEvent.CLOCK_ACCEPTED.log(decision_id=reply.decision_id, step_seconds=step)
        return answer(
            {
                "decision_id": reply.decision_id,
                "now": iso_time(reply.now),
                "time_before": iso_time(reply.before),
                "step_seconds": step,
            }
        )
