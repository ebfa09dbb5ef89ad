"""The calls of the admin listener as rows of the document; the emitters are in emittercalls."""

from __future__ import annotations

from typing import get_args

from sidecar.core.record import DecisionOutcome, DecisionType, Event
from sidecar.core.scope import ExecutionStatus, ScopeStatus
from sidecar.web.api.docs import FILES
from sidecar.web.api.openapi.operation import (
    AFTER_DECISION,
    AFTER_NUMBER,
    BODY_ERRORS,
    DECISION_ID,
    EXECUTION_ID,
    LIMIT,
    REQUEST_ID,
    SCOPE_ID,
    SINCE,
    STORE_ERRORS,
    Answer,
    Body,
    Operation,
    Parameter,
    filtered,
    in_json,
    shows,
)
from sidecar.web.wire import answermodels, models
from sidecar.web.wire import answermodels as scopemodels

DECISIONS: tuple[Operation, ...] = (
    Operation(
        listener="admin",
        method="get",
        path="/api/v1/decisions",
        name="listDecisions",
        tag="Decisions",
        summary="List decisions",
        description="Newest first. Filters narrow each other. With `action`, and without a scope, incident, "
        "request or run, a page looks at a piece of the list only, so it may be short, or empty, and still "
        "have a `next`.",
        parameters=(
            filtered("type", "Of this type.", tuple(kind.value for kind in DecisionType)),
            filtered("outcome", "With this outcome.", tuple(outcome.value for outcome in DecisionOutcome)),
            filtered("event", "Left by this event.", get_args(Event)),
            filtered("scope_id", "About this scope."),
            filtered("incident_id", "About this incident."),
            filtered("action", "About this action."),
            filtered("request_id", "Of this request."),
            filtered("run_id", "Of this run, told or bound later."),
            filtered("tenant_id", "Of this tenant."),
            SINCE,
            LIMIT,
            AFTER_NUMBER,
        ),
        answers=(
            shows(
                "A page of them.",
                answermodels.DecisionList,
                {
                    "Newest": {
                        "operationId": "getDecision",
                        "parameters": {"decision_id": "$response.body#/decisions/0/decision_id"},
                    }
                },
            ),
        ),
        errors=("invalid_request", *STORE_ERRORS),
    ),
    Operation(
        listener="admin",
        method="get",
        path="/api/v1/decisions/{decision_id}",
        name="getDecision",
        tag="Decisions",
        summary="One decision",
        parameters=(DECISION_ID,),
        answers=(shows("With its hash link, and its execution.", answermodels.Decision),),
        errors=("decision_not_found", *STORE_ERRORS),
    ),
    Operation(
        listener="admin",
        method="get",
        path="/api/v1/scopes",
        name="listAllScopes",
        tag="Scopes",
        summary="List the scopes of all incidents and tenants",
        description="Newest first. Without `incident_id` a page looks at a piece of the list only, so a page "
        "of some status or tenant may be short, or empty, and still have a `next`.",
        parameters=(
            filtered("incident_id", "Of this incident."),
            filtered("status", "That stand so now.", get_args(ScopeStatus)),
            filtered("tenant_id", "Of this tenant."),
            LIMIT,
            AFTER_NUMBER,
        ),
        answers=(
            shows(
                "A page of them.",
                scopemodels.ScopePage,
                {
                    "Newest": {
                        "operationId": "getScope",
                        "parameters": {"scope_id": "$response.body#/scopes/0/scope_id"},
                    }
                },
            ),
        ),
        errors=("invalid_request", *STORE_ERRORS),
    ),
    Operation(
        listener="admin",
        method="get",
        path="/api/v1/scopes/{scope_id}",
        name="getScope",
        tag="Scopes",
        summary="One scope, with its executions",
        parameters=(SCOPE_ID,),
        answers=(shows("What is left of it, and what it admitted.", scopemodels.SpentScope),),
        errors=("scope_not_found", *STORE_ERRORS),
    ),
    Operation(
        listener="admin",
        method="get",
        path="/api/v1/executions",
        name="listExecutions",
        tag="Executions",
        summary="List executions",
        description="Newest first. `unknown` are those that somebody must look into. With `action` or "
        "`since`, and without `incident_id`, a page looks at a piece of the list only, so it may be short, "
        "or empty, and still have a `next`.",
        parameters=(
            filtered("status", "That stand so.", get_args(ExecutionStatus)),
            filtered("incident_id", "About this incident."),
            filtered("action", "Of this action."),
            SINCE,
            LIMIT,
            AFTER_DECISION,
        ),
        answers=(
            shows(
                "A page of them.",
                answermodels.ExecutionList,
                {
                    "Reconcile": {
                        "operationId": "reconcile",
                        "parameters": {"decision_id": "$response.body#/executions/0/decision_id"},
                    }
                },
            ),
        ),
        errors=("invalid_request", *STORE_ERRORS),
    ),
    Operation(
        listener="admin",
        method="post",
        path="/api/v1/executions/{decision_id}/reconcile",
        name="reconcile",
        tag="Executions",
        summary="Say what became of an unknown execution",
        description="`not_executed` gives its attempt and its hold back.",
        parameters=(EXECUTION_ID, REQUEST_ID),
        body=Body(
            schema=models.ReconcileRequest,
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
        answers=(shows("The execution, ended.", answermodels.Execution),),
        errors=(*BODY_ERRORS, "decision_not_found", "not_reconcilable", *STORE_ERRORS),
    ),
)

STATUS: tuple[Operation, ...] = (
    Operation(
        listener="admin",
        method="get",
        path="/api/v1/status",
        name="getStatus",
        tag="Status",
        summary="Version, store, revisions, unknown executions",
        answers=(shows("How it is.", answermodels.Status),),
        errors=STORE_ERRORS,
    ),
    Operation(
        listener="admin",
        method="post",
        path="/api/v1/reload",
        name="reload",
        tag="Status",
        summary="Read configuration and policies anew",
        description="Either all of it is in force with the answer, or nothing is changed.",
        answers=(shows("It is in force.", answermodels.Reloaded),),
        errors=("reload_refused",),
    ),
    Operation(
        listener="admin",
        method="post",
        path="/api/v1/store/accept-clock",
        name="acceptClock",
        tag="Status",
        summary="Take the wall clock for right",
        description="Where it jumped ahead, or is behind the log. Each call is recorded.",
        parameters=(REQUEST_ID,),
        answers=(shows("It counts from now on.", answermodels.AcceptedClock),),
        errors=STORE_ERRORS,
    ),
    Operation(
        listener="admin",
        method="get",
        path="/openapi.json",
        name="getDocument",
        tag="Documentation",
        summary="This document",
        answers=(
            Answer(
                status="200",
                description="OpenAPI 3.1, for this version and configuration.",
                contents=in_json({"type": "object", "required": ["openapi", "info", "paths"]}),
            ),
        ),
    ),
    Operation(
        listener="admin",
        method="get",
        path="/docs",
        name="getPage",
        tag="Documentation",
        summary="This document as a page",
        answers=(
            Answer(
                status="200",
                description="The page.",
                contents={"text/html": {"type": "string"}},
                headers=("Content-Security-Policy",),
            ),
        ),
    ),
    Operation(
        listener="admin",
        method="get",
        path="/docs/",
        name="getPageElsewhere",
        tag="Documentation",
        summary="The page under another spelling",
        answers=(Answer(status="308", description="It is at /docs.", contents={}, headers=("Location",)),),
    ),
    Operation(
        listener="admin",
        method="get",
        path="/",
        name="getRoot",
        tag="Documentation",
        summary="Leads to the page",
        answers=(Answer(status="308", description="It is at /docs.", contents={}, headers=("Location",)),),
    ),
    Operation(
        listener="admin",
        method="get",
        path="/docs/{file}",
        name="getPageFile",
        tag="Documentation",
        summary="A file of the page",
        parameters=(
            Parameter(
                name="file", place="path", schema={"type": "string", "enum": list(FILES)}, required=True
            ),
        ),
        answers=(
            Answer(
                status="200",
                description="The file.",
                contents={
                    "text/javascript": {"type": "string"},
                    "text/css": {"type": "string"},
                    "image/png": {},
                },
                headers=("Content-Security-Policy",),
            ),
        ),
        errors=("not_found",),
    ),
)
