"""The calls of the ops listener as rows of the document."""

from __future__ import annotations

from sidecar.web.api.openapi.operation import Answer, Operation, in_json, shows
from sidecar.web.wire import answermodels

OPS: tuple[Operation, ...] = (
    Operation(
        listener="ops",
        method="get",
        path="/health/live",
        name="getLiveness",
        tag="Health",
        summary="Does the process answer?",
        answers=(shows("It does.", answermodels.Liveness),),
    ),
    Operation(
        listener="ops",
        method="get",
        path="/health/ready",
        name="getReadiness",
        tag="Health",
        summary="Can it decide?",
        description="Does not depend on the backend.",
        answers=(
            shows("It can.", answermodels.Readiness),
            Answer(
                status="503",
                description="It cannot; `reason` says why.",
                contents=in_json(answermodels.Readiness),
            ),
        ),
    ),
    Operation(
        listener="ops",
        method="get",
        path="/metrics",
        name="getMetrics",
        tag="Health",
        summary="Metrics, as Prometheus reads them",
        answers=(
            Answer(
                status="200",
                description="All of them.",
                contents={"text/plain": {"type": "string"}},
            ),
        ),
    ),
)
