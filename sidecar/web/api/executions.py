"""Admitted executions for operators: their pages, and what became of one that has no known end."""

from __future__ import annotations

from typing import get_args

from aiohttp import web

from sidecar.core.command import Denied, Reconcile
from sidecar.core.scope import ExecutionStatus
from sidecar.errors import Refusal
from sidecar.gate.execution import Gate
from sidecar.ids import new_decision_id
from sidecar.store.base import ExecutionsWanted
from sidecar.store.batch import Store
from sidecar.telemetry.events import LogEvent
from sidecar.web.api.access import asking
from sidecar.web.api.operation import (
    AFTER_DECISION,
    BODY_ERRORS,
    EXECUTION_ID,
    LIMIT,
    REQUEST_ID,
    SINCE,
    STORE_ERRORS,
    Answer,
    Body,
    Operation,
    choice,
    link,
)
from sidecar.web.api.routes import Query, read_model
from sidecar.web.wire import answers
from sidecar.web.wire.headers import fields_of
from sidecar.web.wire.models import ReconcileRequest, wrong
from sidecar.web.wire.request import request_id_of


class ExecutionApi:
    """Handlers of the admin listener."""

    def __init__(self, *, store: Store, gate: Gate) -> None:
        self._store = store
        self._gate = gate

    async def list(self, request: web.Request, query: Query) -> answers.ExecutionList:
        del request
        wanted = ExecutionsWanted(**query.given, since=query.since)
        page = await self._store.engine.executions(wanted, before=query.before, limit=query.limit)
        return {"executions": [answers.execution(execution) for execution in page.rows], "next": page.next}

    async def reconcile(self, request: web.Request) -> answers.Execution | Refusal:
        wanted = await read_model(request, ReconcileRequest)
        if isinstance(wanted, Refusal):
            return wanted
        if wanted.outcome == "not_executed" and wanted.cost_usd:
            return wrong("invalid_request", "cost_usd", "must be absent or 0 where nothing was executed")
        decision_id = request.match_info["decision_id"]
        reply = await self._gate.reconcile(
            Reconcile(
                decision_id=new_decision_id(),
                admission_id=decision_id,
                outcome=wanted.outcome,
                cost=wanted.cost_usd,
                reason=wanted.reason,
                reconciled_by=wanted.reconciled_by,
                request_id=request_id_of(fields_of(request)),
                principal=asking(request),
                origin="api",
            )
        )
        if isinstance(reply, Denied):
            return reply.refusal
        LogEvent.RECONCILED.log(
            decision_id=decision_id, outcome=wanted.outcome, scope_id=reply.execution.scope_id
        )
        return answers.execution(reply.execution)


EXECUTIONS = (
    Operation(
        call="GET /api/v1/executions",
        name="listExecutions",
        tag="Executions",
        summary="List executions",
        description="Newest first. Operators reconcile those that are `unknown`; those that are `running` "
        "wait for their report. With `action` or `since`, and without `incident_id`, a page reads only "
        "a part of the list. It may then be short or empty, and still have a `next`.",
        parameters=(
            choice("status", "With this status.", get_args(ExecutionStatus)),
            choice("incident_id", "About this incident."),
            choice("action", "Of this action."),
            SINCE,
            LIMIT,
            AFTER_DECISION,
        ),
        answers=(
            Answer(
                "A page of them.",
                links={
                    "Reconcile": link("reconcile", decision_id="$response.body#/executions/0/decision_id")
                },
            ),
        ),
        errors=("invalid_request", *STORE_ERRORS),
        roles=("observer",),
        handler=ExecutionApi.list,
    ),
    Operation(
        call="POST /api/v1/executions/{decision_id}/reconcile",
        name="reconcile",
        tag="Executions",
        summary="Reconcile an unknown or a running execution",
        description="`not_executed` gives its attempt and its hold back. After this no report is taken.",
        parameters=(EXECUTION_ID, REQUEST_ID),
        body=Body(
            schema=ReconcileRequest,
            examples={
                "executed": {
                    "outcome": "executed",
                    "cost_usd": 0.04,
                    "reason": "seen in the logs",
                    "reconciled_by": "alice",
                },
                "not executed": {"outcome": "not_executed"},
            },
        ),
        answers=(Answer("The execution, ended."),),
        errors=(*BODY_ERRORS, "decision_not_found", "not_reconcilable", *STORE_ERRORS),
        roles=("operator",),
        handler=ExecutionApi.reconcile,
    ),
)
