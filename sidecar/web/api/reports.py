"""The call with which a backend reports how an execution ended (`completion: report`).

Its caller needs no role: the completion token, which only the backend of this execution got, permits it. The
token is looked at before anything else, so a caller without it learns nothing about executions.
"""

from __future__ import annotations

import re
from dataclasses import replace

from aiohttp import web

from sidecar.core.command import Denied, Report
from sidecar.core.endings import COMPLETION_REFUSED, is_reportable
from sidecar.errors import Refusal
from sidecar.gate.execution import Gate
from sidecar.gate.reports import COMPLETE, EXECUTIONS_PREFIX, digest_of
from sidecar.ids import new_decision_id
from sidecar.live.snapshot import Live
from sidecar.store.batch import Store
from sidecar.store.lists import DECISION_CURSOR
from sidecar.telemetry.events import LogEvent
from sidecar.upstream.custody import NO_CUSTODY, Custody
from sidecar.web.api.operation import (
    BODY_ERRORS,
    EXECUTION_ID,
    REQUEST_ID,
    REQUEST_ID_HEADER,
    STORE_ERRORS,
    Answer,
    Body,
    Operation,
)
from sidecar.web.api.routes import response
from sidecar.web.serving.body import read_json
from sidecar.web.serving.datarequest import DataRequest
from sidecar.web.serving.identity import OURS, bearer_in
from sidecar.web.wire import answers
from sidecar.web.wire.models import ExecutionReport, validated, wrong
from sidecar.web.wire.problem import problem

__all__ = ["COMPLETE", "REPORTS", "ReportApi"]

_DECISION_ID = re.compile(DECISION_CURSOR)


class ReportApi:
    """Serves the raw path of the call, for every method, and no other spelling of it."""

    def __init__(self, *, store: Store, gate: Gate, live: Live, custody: Custody = NO_CUSTODY) -> None:
        self._store = store
        self._gate = gate
        self._live = live
        self._custody = custody

    def owns(self, target: str) -> bool:
        """Whether a raw target is the path of the call."""
        return _named(target) is not None

    async def handle(self, request: DataRequest, target: str, request_id: str) -> web.Response:
        """Answer a request to the call. Raises StoreUnavailable."""
        decision_id = _named(target)
        assert decision_id is not None
        if request.method != "POST":
            refusal = Refusal("method_not_allowed", f"{request.method} is not served here.")
            return problem(refusal, request_id=request_id, allow=("POST",))
        return response(await self.report(request, decision_id, request_id), request_id=request_id)

    async def report(
        self, request: DataRequest, decision_id: str, request_id: str
    ) -> answers.ReportedExecution | Refusal:
        token = bearer_in(request.fields.texts(OURS))
        found = token is not None and _DECISION_ID.fullmatch(decision_id)
        execution = await self._store.engine.execution(decision_id) if found else None
        presented = digest_of(token or "")
        if not is_reportable(execution, presented, self._store.now()) or execution is None:
            LogEvent.REPORT_REFUSED.log(decision_id=decision_id if found else None)
            return COMPLETION_REFUSED
        request.decision_id, request.scope_id = decision_id, execution.scope_id
        wanted = await self._wanted(request)
        if isinstance(wanted, Refusal):
            return wanted
        reply = await self._gate.report(
            Report(
                decision_id=new_decision_id(),
                admission_id=decision_id,
                token_sha256=presented,
                outcome=wanted.outcome,
                cost=wanted.cost_usd,
                detail=self._without_credentials(wanted.detail),
                request_id=self._without_credentials(request_id),
            )
        )
        if isinstance(reply, Denied):
            return reply.refusal
        return {
            "decision_id": decision_id,
            "status": wanted.outcome,
            "scope_status": None if reply.scope is None else reply.scope.status(self._store.now()),
        }

    def _without_credentials(self, text: str | None) -> str | None:
        """A text of the backend for the record. It holds the credentials, and may repeat them."""
        carried = self._custody.gated
        return text if carried is None or text is None else carried.hidden(text)

    async def _wanted(self, request: DataRequest) -> ExecutionReport | Refusal:
        """The report in the body, or why it cannot be read. Every such refusal names the member."""
        bounds = self._live.snapshot.settings.gate
        body = await read_json(
            request, max_bytes=bounds.max_body_bytes, timeout_seconds=bounds.body_timeout_seconds
        )
        if isinstance(body, Refusal):
            if body.code != "invalid_request":
                return body
            return replace(body, members={"member": "body", **body.members})
        wanted = validated(ExecutionReport, body, "invalid_request")
        if isinstance(wanted, ExecutionReport) and wanted.outcome == "not_executed" and wanted.cost_usd:
            return wrong("invalid_request", "cost_usd", "must be absent or 0 where nothing was executed")
        return wanted


def _named(target: str) -> str | None:
    """The decision_id in a raw target that is the path of the call."""
    path = target.partition("?")[0]
    if not path.startswith(EXECUTIONS_PREFIX) or not path.endswith(COMPLETE):
        return None
    name = path[len(EXECUTIONS_PREFIX) : -len(COMPLETE)]
    return name if name and "/" not in name else None


REPORTS = (
    Operation(
        listener="data",
        call="POST /api/v1/recovery/executions/{decision_id}/complete",
        name="reportExecution",
        tag="Executions",
        summary="Report how an execution ended",
        description="For backends of routes with `completion: report`. The token and this URL come with the "
        "request, in `Scopegate-Completion-Token` and `Scopegate-Completion-Url`. Send the token as "
        "`Authorization: Bearer`. The same report can be repeated.",
        parameters=(EXECUTION_ID, REQUEST_ID),
        body=Body(
            schema=ExecutionReport,
            examples={
                "succeeded": {"outcome": "succeeded", "cost_usd": 0.04, "detail": "12 pods restarted"},
                "not executed": {"outcome": "not_executed"},
            },
        ),
        answers=(Answer("The execution has ended.", headers=(REQUEST_ID_HEADER,)),),
        errors=(
            *BODY_ERRORS,
            "completion_refused",
            "completion_conflict",
            "misdirected_request",
            "cross_site",
            *STORE_ERRORS,
        ),
        error_headers=(REQUEST_ID_HEADER,),
        secured=True,
        handler=ReportApi.report,
    ),
)
