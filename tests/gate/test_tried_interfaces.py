"""Calls of real interfaces that once could not be gated, or were executed ungated past a correct-looking
configuration: each with the configuration that gates it now.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sidecar.core.policy import ActionPolicy, Brake, PolicySet, RiskClass, Rule
from tests.cases import load_cases
from tests.client import as_json
from tests.interfaces import (
    INCIDENT,
    POLICIES,
    SCOPE,
    Call,
    arrives_and_is_recorded,
    is_refused_without_a_scope_of_its_own,
    stub,
)
from tests.support import House, opened, serving_backend

TRIED = load_cases("tried")


@asynccontextmanager
async def before(
    interface: Mapping[str, Any], folder: Path, gate: Mapping[str, Any], policies: PolicySet = POLICIES
) -> AsyncIterator[House]:
    async with serving_backend() as backend:
        backend.script = stub(interface)
        async with opened(folder, backend, policies=policies, gate=gate) as house:
            yield house


@pytest.mark.parametrize("case", TRIED, ids=lambda case: case["tried"])
async def test_a_call_that_could_not_be_gated_is_gated(tmp_path: Path, case: Mapping[str, Any]) -> None:
    call = Call.of(case)
    interface = {"answers": case.get("answers", []), "otherwise": {"status": 200, "json": {}}}
    async with before(interface, tmp_path, case["gate"]) as house:
        await is_refused_without_a_scope_of_its_own(house, call)
        await arrives_and_is_recorded(house, call)


async def test_a_method_that_the_route_does_not_list_can_be_let_through(tmp_path: Path) -> None:
    route = {"path": "/api/v1/workflows/{namespace}/{name}/retry", "name": "w.retry", "body": "any"}
    interface = {"answers": [], "otherwise": {"status": 200, "json": {}}}
    async with before(interface, tmp_path, {"routes": [route]}) as house:
        refused = await house.data("PUT", "/api/v1/workflows/shop/w/retry", body=b"")
        assert (refused.status, refused.header("Allow")) == (405, "POST, GET, HEAD, OPTIONS")
    async with before(interface, tmp_path, {"routes": [{**route, "other_methods": "pass"}]}) as house:
        assert (await house.data("PUT", "/api/v1/workflows/shop/w/retry", body=b"")).status == 200


AIRFLOW = {
    "answers": [{"to": "POST /api/v2/dags/{dag}/dagRuns", "status": 200, "json": {"state": "queued"}}],
    "otherwise": {"status": 404},
}
TRIGGER = "/api/v2/dags/restart_web/dagRuns"


async def trigger(house: House) -> Any:
    scope = await house.issue(action="airflow.trigger")
    kind, body = as_json({"conf": {}})
    return await house.data("POST", TRIGGER, [*kind, (SCOPE, scope["scope_id"]), (INCIDENT, "inc_1")], body)


async def test_one_in_flight_waits_for_the_report_of_a_run_that_airflow_only_queued(tmp_path: Path) -> None:
    own = {
        "name": "airflow.trigger",
        "path": ["/api/v1/dags/{dag}/dagRuns", "/api/v2/dags/{dag}/dagRuns"],
        "scope_id": f"header:{SCOPE}",
        "incident_id": f"header:{INCIDENT}",
        "action": "const:airflow.trigger",
        "parameters": "/conf",
        "target_agents": ["path:dag"],
        "completion": "report",
    }
    one = Rule(id="one", on="execute", brake=Brake(window_seconds=3600, one_in_flight=True))
    policies = replace(POLICIES, rules=(one,))
    gate = {
        "presets": ["airflow"],
        "routes": [own],
        "completion_base_url": "http://127.0.0.1:8000",
    }
    async with before(AIRFLOW, tmp_path, gate, policies) as house:
        first = await trigger(house)
        assert first.status == 200
        assert (await trigger(house)).json()["error"] == "braked"
        (arrived,) = house.backend.seen
        decision_id = first.header("Scopegate-Decision-Id")
        bearer = ("Authorization", f"Bearer {arrived.header('Scopegate-Completion-Token')}")
        kind, body = as_json({"outcome": "succeeded"})
        complete = f"/api/v1/recovery/executions/{decision_id}/complete"
        assert (await house.data("POST", complete, [*kind, bearer], body)).status == 200
        assert (await trigger(house)).status == 200


async def test_a_404_of_the_backend_costs_neither_an_attempt_nor_the_hold(tmp_path: Path) -> None:
    held = ActionPolicy(risk=RiskClass.HIGH, hold=400_000)
    policies = PolicySet(revision="rev-1", actions={"awx.launch": held})
    interface = {"answers": [], "otherwise": {"status": 404, "json": {"detail": "Not found."}}}
    async with before(interface, tmp_path, {"presets": ["awx"], "routes": []}, policies) as house:
        scope = await house.issue(action="awx.launch", max_cost_usd=0.5)
        headers = [(SCOPE, scope["scope_id"]), (INCIDENT, "inc_1")]
        for _ in range(3):
            answer = await house.data("POST", "/api/v2/job_templates/7/launch/", headers, b"")
            assert answer.status == 404
            assert answer.header("Scopegate-Attempts-Remaining") == "1"
        found = await house.scope(scope)
        assert (found["attempts_remaining"], found["cost_used_usd"]) == (1, 0)
