"""The scope endpoints as rows of the document."""

from __future__ import annotations

from sidecar.web.api.openapi.operation import (
    AFTER_NUMBER,
    BODY_ERRORS,
    DECISION_ID_HEADER,
    LIMIT,
    REQUEST_ID,
    REQUEST_ID_HEADER,
    STORE_ERRORS,
    TO_DECISION,
    UNREADY_ERRORS,
    Answer,
    Body,
    Operation,
    Parameter,
    in_json,
)
from sidecar.web.wire import answermodels, models
from sidecar.web.wire.models import IDENTIFIER

_OF_SCOPES = (DECISION_ID_HEADER, REQUEST_ID_HEADER)

SCOPES: tuple[Operation, ...] = (
    Operation(
        listener="scopes",
        method="post",
        path="/api/v1/recovery/scope",
        name="createScope",
        tag="Scopes",
        summary="Ask for a scope",
        description="Every action must be in the policy catalogue. Grant and refusal are both recorded.",
        parameters=(REQUEST_ID,),
        body=Body(
            schema=models.ScopeRequest,
            examples={
                "PIN-162, step 2": {
                    "incident_id": "inc_123",
                    "action": "retry_agent",
                    "intent": "Recover from hallucinated legal response",
                    "max_cost_usd": 0.50,
                    "max_attempts": 1,
                }
            },
        ),
        answers=(
            Answer(
                status="201",
                description="The scope, granted.",
                contents=in_json(answermodels.GrantedScope),
                headers=_OF_SCOPES,
                links={
                    "Listed": {
                        "operationId": "listScopes",
                        "parameters": {"id": "$response.body#/incident_id"},
                    },
                    "Revoke": {
                        "operationId": "revokeScope",
                        "parameters": {"id": "$response.body#/scope_id"},
                    },
                    **TO_DECISION,
                },
            ),
        ),
        errors=(*BODY_ERRORS, "invalid_scope", "policy_denied", *UNREADY_ERRORS),
        told=_OF_SCOPES,
        tenant="required",
    ),
    Operation(
        listener="scopes",
        method="get",
        path="/api/v1/recovery/scopes/{id}",
        name="listScopes",
        tag="Scopes",
        summary="List an incident's scopes",
        description="Newest first. An unknown incident has an empty list.",
        parameters=(
            Parameter(name="id", place="path", schema=IDENTIFIER, description="The incident.", required=True),
            LIMIT,
            AFTER_NUMBER,
            REQUEST_ID,
        ),
        answers=(
            Answer(
                status="200",
                description="A page of them.",
                contents=in_json(answermodels.ScopeList),
                headers=(REQUEST_ID_HEADER,),
            ),
        ),
        errors=("invalid_request", *STORE_ERRORS),
        told=(REQUEST_ID_HEADER,),
        tenant="required",
    ),
    Operation(
        listener="scopes",
        method="delete",
        path="/api/v1/recovery/scopes/{id}",
        name="revokeScope",
        tag="Scopes",
        summary="Revoke a scope",
        description="Can be repeated. Nothing is admitted once it is answered.",
        parameters=(
            Parameter(name="id", place="path", schema=IDENTIFIER, description="The scope.", required=True),
            REQUEST_ID,
        ),
        answers=(
            Answer(
                status="200",
                description="Revoked.",
                contents=in_json(answermodels.Revocation),
                headers=_OF_SCOPES,
                links=TO_DECISION,
            ),
        ),
        errors=("invalid_request", "scope_not_found", *STORE_ERRORS),
        told=_OF_SCOPES,
        tenant="required",
    ),
    Operation(
        listener="scopes",
        method="post",
        path="/api/v1/recovery/candidates/{id}/scope-test",
        name="testScope",
        tag="Scopes",
        summary="Rehearse a recovery action",
        description="A dry run or a simulation. Executes, consumes and records nothing.",
        parameters=(
            Parameter(name="id", place="path", schema=IDENTIFIER, description="The action.", required=True),
            REQUEST_ID,
        ),
        body=Body(
            schema=models.ScopeTestRequest,
            examples={
                "dry run": {
                    "action_type": "scale",
                    "risk_class": "high",
                    "parameters": {"target_agents": ["agent_1"]},
                },
                "on a tenth": {"action_type": "retry", "risk_class": "low", "scope_type": "request_sample"},
            },
        ),
        answers=(
            Answer(
                status="200",
                description="What it would do.",
                contents=in_json(answermodels.Rehearsal),
                headers=(REQUEST_ID_HEADER,),
            ),
        ),
        errors=BODY_ERRORS,
        told=(REQUEST_ID_HEADER,),
    ),
)
