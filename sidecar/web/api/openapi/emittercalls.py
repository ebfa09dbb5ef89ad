"""The calls of the admin listener for decision records of other services, as rows of the document."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel

from sidecar.web.api.openapi.operation import (
    BODY_ERRORS,
    DECISION_ID_HEADER,
    REQUEST_ID,
    STORE_ERRORS,
    SUBMIT_ERRORS,
    TO_DECISION,
    Answer,
    Body,
    Operation,
    Parameter,
    in_json,
    shows,
)
from sidecar.web.wire import answermodels, emittermodels
from sidecar.web.wire.models import IDENTIFIER

_BACKFILL = Operation(
    listener="admin",
    method="post",
    path="/api/v1/runs/{run_id}/backfill",
    name="backfill",
    tag="Emitters",
    summary="Bind a run to the decisions before it",
    description="Its request's records from before the run, where they have no run yet.",
    parameters=(Parameter(name="run_id", place="path", schema=IDENTIFIER, required=True),),
    body=Body(schema=emittermodels.BackfillRequest, examples={"a request": {"request_id": "req_1"}}),
    answers=(shows("Bound.", answermodels.Backfill),),
    errors=(*BODY_ERRORS, *SUBMIT_ERRORS),
)


def _switch(method: Literal["get", "put", "delete"], name: str, summary: str) -> Operation:
    turned = method != "get"
    return Operation(
        listener="admin",
        method=method,
        path="/api/v1/care/kill-switch",
        name=name,
        tag="Emitters",
        summary=summary,
        description="It holds for everything on the same store, and survives a restart.",
        parameters=(REQUEST_ID,) if turned else (),
        answers=(
            Answer(
                status="200",
                description="How it stands.",
                contents=in_json(answermodels.KillSwitch),
                headers=(DECISION_ID_HEADER,) if turned else (),
                links=TO_DECISION if turned else {},
            ),
        ),
        errors=STORE_ERRORS,
    )


_TOLD: Mapping[str, Any] = {
    "routing": {"routed": True, "selected_agent": "agent_1", "eligible_agents": ["agent_1", "agent_2"]},
    "recovery": {"evaluated": True, "triggered": True, "action": "retry_agent", "candidates_count": 2},
    "memory": {"queried": True, "matched": True, "injected": False, "reason": "too old"},
    "policy": {"policy_id": "content", "evaluated": True, "violated": True, "severity": "error"},
    "budget": {"budget_requested": 500, "budget_available": 300, "enforcement": "hard"},
    "budget_enforcement": {
        "run_id": "run_1",
        "budget_limit_cents": 100,
        "budget_consumed_cents": 110,
        "step_cost_cents": 20,
        "completed_steps": 3,
        "total_steps": 5,
    },
    "policy_precheck": {"request_id": "req_1", "posture": "strict", "passed": False, "violations": ["pii"]},
    "recovery_evaluation": {
        "run_id": "run_1",
        "request_id": "req_1",
        "recovery_class": "R1",
        "recovery_action": "retry_agent",
        "failure_type": "timeout",
    },
    "care_optimization": {
        "request_id": "req_1",
        "baseline_agent": "agent_1",
        "optimized_agent": "agent_2",
        "confidence_score": 0.9,
        "signals_used": ["latency_p50"],
        "optimization_enabled": True,
        "shadow_mode": False,
    },
}


def _emitter(kind: str, model: type[BaseModel]) -> Operation:
    return Operation(
        listener="admin",
        method="post",
        path=f"/api/v1/decisions/{kind}",
        name="tell" + kind.title().replace("_", ""),
        tag="Emitters",
        summary=f"Tell a decision: {kind.replace('_', ' ')}",
        description=" ".join((model.__doc__ or "").split()),
        body=Body(schema=model, examples={kind.replace("_", " "): _TOLD[kind]}),
        answers=(
            Answer(
                status="201",
                description="Recorded.",
                contents=in_json(answermodels.DecisionRecord),
                headers=(DECISION_ID_HEADER,),
                links=TO_DECISION,
            ),
            Answer(
                status="200",
                description="No record: the emission rule, an earlier record or the kill switch says none.",
                contents=in_json({"type": "null"}),
            ),
        ),
        errors=(*BODY_ERRORS, *SUBMIT_ERRORS),
    )


EMITTERS: tuple[Operation, ...] = (
    *(_emitter(kind, model) for kind, model in emittermodels.EMITTER_MODELS.items()),
    _BACKFILL,
    _switch("get", "getKillSwitch", "Is the kill switch of optimized routing on?"),
    _switch("put", "turnKillSwitchOn", "Turn the kill switch on"),
    _switch("delete", "turnKillSwitchOff", "Turn the kill switch off"),
)
