"""Seed 004 over HTTP: records that services tell, runs bound to them, the kill switch."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml

from sidecar.core.emission import FORBIDDEN_SIGNALS
from sidecar.web.wire.emittermodels import EMITTER_MODELS
from tests.client import ask
from tests.support import Backend, House, Open, opened

DECISIONS = "/api/v1/decisions"
SWITCH = "/api/v1/care/kill-switch"

HALT = {
    "run_id": "run_1",
    "budget_limit_cents": 100,
    "budget_consumed_cents": 110,
    "step_cost_cents": 20,
    "completed_steps": 3,
    "total_steps": 5,
}
CHOICE = {
    "request_id": "req_1",
    "baseline_agent": "a",
    "optimized_agent": "b",
    "confidence_score": 0.9,
    "signals_used": ["latency_p50"],
    "optimization_enabled": True,
    "shadow_mode": False,
}
ROUTED = {"routed": True, "selected_agent": "agent_1", "eligible_agents": ["agent_1"], "request_id": "req_1"}
IDEMPOTENT: dict[str, dict[str, Any]] = {
    "budget_enforcement": HALT,
    "policy_precheck": {"request_id": "req_1", "posture": "strict", "passed": False},
    "recovery_evaluation": {
        "run_id": "run_1",
        "request_id": "req_1",
        "recovery_class": "R1",
        "recovery_action": "retry",
        "failure_type": "timeout",
    },
    "care_optimization": CHOICE,
}


async def told(house: House, kind: str, body: object) -> tuple[int, Any]:
    answer = await house.admin("POST", f"{DECISIONS}/{kind}", body)
    return answer.status, answer.json()


async def turn(house: House, method: str) -> Any:
    answer = await ask(house.sidecar.admin_address, method, SWITCH)
    assert answer.status == 200
    return answer.json()


async def test_a_record_that_is_told_is_stored_before_it_is_answered(house: House) -> None:
    status, record = await told(house, "routing", ROUTED)
    assert status == 201
    assert len(record) == 14
    stored = await house.record(record["decision_id"])
    assert {name: stored[name] for name in record} == record
    assert (stored["event"], stored["origin"]) == ("emitted", "api")
    assert (stored["scope_id"], stored["incident_id"], stored["action"]) == (None, None, None)


@pytest.mark.parametrize("kind", IDEMPOTENT)
async def test_of_two_hundred_at_once_under_one_key_one_is_recorded(house: House, kind: str) -> None:
    answers = await asyncio.gather(*(told(house, kind, IDEMPOTENT[kind]) for _ in range(200)))
    assert sorted(status for status, _ in answers) == [200] * 199 + [201]
    assert [record for status, record in answers if status == 200] == [None] * 199
    assert len(await house.records("&event=emitted")) == 1


async def test_failure_types_that_differ_only_in_wildcards_are_different(house: House) -> None:
    evaluation = IDEMPOTENT["recovery_evaluation"]
    kinds = ("a_b", "a%b", "axb", "A_B", "a\\_b")
    statuses = [
        (await told(house, "recovery_evaluation", {**evaluation, "failure_type": kind}))[0] for kind in kinds
    ]
    assert statuses == [201] * len(kinds)


async def test_what_the_rule_leaves_out_is_null_and_leaves_no_record(house: House) -> None:
    advisory = {**IDEMPOTENT["policy_precheck"], "posture": "advisory"}
    assert await told(house, "policy_precheck", advisory) == (200, None)
    assert await told(house, "care_optimization", {**CHOICE, "confidence_score": 0.499999}) == (200, None)
    assert await house.records() == []
    assert (await told(house, "care_optimization", {**CHOICE, "confidence_score": 0.5}))[0] == 201


async def test_the_least_confidence_is_a_setting(open_house: Open) -> None:
    house = await open_house(care={"min_confidence": 0.95})
    assert await told(house, "care_optimization", CHOICE) == (200, None)
    assert (await told(house, "care_optimization", {**CHOICE, "confidence_score": 0.95}))[0] == 201


@pytest.mark.parametrize("signal", [*sorted(FORBIDDEN_SIGNALS), "unheard_of"])
async def test_a_forbidden_or_unknown_signal_is_always_refused(house: House, signal: str) -> None:
    silent = {**CHOICE, "optimization_enabled": False, "signals_used": ["latency_p50", signal]}
    status, problem = await told(house, "care_optimization", silent)
    assert (status, problem["error"], problem["member"]) == (400, "invalid_request", "signals_used")
    assert signal in problem["message"]


async def test_the_kill_switch_stops_emission_at_once_and_leaves_the_key_free(house: House) -> None:
    assert (await ask(house.sidecar.admin_address, "GET", SWITCH)).json() == {"active": False}
    assert await turn(house, "PUT") == {"active": True}
    assert await told(house, "care_optimization", CHOICE) == (200, None)
    assert (await told(house, "routing", ROUTED))[0] == 201
    assert await turn(house, "DELETE") == {"active": False}
    assert (await told(house, "care_optimization", CHOICE))[0] == 201
    switched = await house.records("&event=switched")
    assert [record["details"]["on"] for record in switched] == [False, True]
    assert switched[0]["decision_inputs"] == {"policy_id": "care_kill_switch", "principal": "anonymous"}


async def test_the_kill_switch_survives_a_restart(tmp_path: Path, backend: Backend) -> None:
    async with opened(tmp_path, backend) as house:
        await turn(house, "PUT")
    async with opened(tmp_path, backend) as house:
        assert (await ask(house.sidecar.admin_address, "GET", SWITCH)).json() == {"active": True}
        assert await told(house, "care_optimization", CHOICE) == (200, None)


async def test_a_run_is_bound_to_the_records_made_before_it(house: House) -> None:
    path = "/api/v1/runs/run_9/backfill"
    ids = [(await told(house, "routing", ROUTED))[1]["decision_id"] for _ in range(2)]
    _, in_run = await told(house, "routing", {**ROUTED, "causal_role": "in_run"})
    _, with_run = await told(house, "routing", {**ROUTED, "run_id": "run_1"})
    _, other = await told(house, "routing", {**ROUTED, "request_id": "req_2"})
    bound = await house.admin("POST", path, {"request_id": "req_1"})
    assert (bound.status, bound.json()) == (200, {"updated": 2})
    assert (await house.admin("POST", path, {"request_id": "req_1"})).json() == {"updated": 0}
    assert {record["decision_id"] for record in await house.records("&run_id=run_9")} == set(ids)
    for record in await house.records("&run_id=run_9&type=routing&request_id=req_1"):
        assert record["run_id"] == "run_9"
    for untouched, run in ((in_run, None), (with_run, "run_1"), (other, None)):
        assert (await house.record(untouched["decision_id"]))["run_id"] == run


@pytest.mark.parametrize("request_id", ["", "req_unheard_of"])
async def test_a_run_of_nothing_updates_nothing(house: House, request_id: str) -> None:
    bound = await house.admin("POST", "/api/v1/runs/run_9/backfill", {"request_id": request_id})
    assert (bound.status, bound.json()) == (200, {"updated": 0})


async def test_what_policies_and_budgets_decided_also_reads_as_taxonomy(house: House) -> None:
    _, halted = await told(house, "budget_enforcement", HALT)
    _, allowed = await told(
        house, "budget", {"budget_requested": 1, "budget_available": 2, "request_id": "r", "reason": "fits"}
    )
    await told(house, "routing", ROUTED)
    await house.admin("POST", "/api/v1/runs/run_9/backfill", {"request_id": "r"})
    with closing(sqlite3.connect(f"file:{house.database}?mode=ro", uri=True)) as connection:
        cursor = connection.execute("SELECT * FROM policy_decisions ORDER BY created_at")
        names = [column[0] for column in cursor.description]
        rows = [dict(zip(names, row, strict=True)) for row in cursor]
    assert rows == [
        {
            "id": record["decision_id"],
            "run_id": run,
            "policy_type": record["decision_type"],
            "decision": decision,
            "rationale": record["decision_reason"],
            "is_synthetic": 0,
            "capture_confidence_score": 1.0,
            "created_at": record["decided_at"],
        }
        for record, run, decision in ((halted, "run_1", "denied"), (allowed, "run_9", "allowed"))
    ]


@pytest.mark.parametrize(
    ("kind", "body", "member"),
    [
        ("routing", {}, "routed"),
        ("routing", {**ROUTED, "routed": 1}, "routed"),
        ("routing", {**ROUTED, "agent": "x"}, "agent"),
        ("routing", {**ROUTED, "causal_role": "before"}, "causal_role"),
        ("budget", {"budget_requested": 1.5, "budget_available": 2}, "budget_requested"),
        ("budget_enforcement", {**HALT, "total_steps": 2**63}, "total_steps"),
        ("care_optimization", {**CHOICE, "confidence_score": "0.9"}, "confidence_score"),
    ],
)
async def test_a_wrong_argument_is_named(house: House, kind: str, body: Any, member: str) -> None:
    status, problem = await told(house, kind, body)
    assert (status, problem["error"], problem["member"]) == (400, "invalid_request", member)
    assert await house.records() == []


async def test_an_unknown_kind_is_not_found(house: House) -> None:
    status, problem = await told(house, "guess", {})
    assert (status, problem["error"]) == (404, "not_found")
    assert "care_optimization" in problem["message"]


async def test_numbers_that_json_has_are_kept(house: House) -> None:
    details = {"large": 10**30, "exact": 0.1, "deep": [{"n": 1e300}]}
    status, record = await told(house, "routing", {**ROUTED, "details": details})
    assert status == 201
    stored = await house.record(record["decision_id"])
    assert (
        stored["details"] == record["details"] == {"large": str(10**30), "exact": 0.1, "deep": [{"n": 1e300}]}
    )


async def test_what_was_told_is_counted(house: House) -> None:
    await told(house, "budget_enforcement", HALT)
    await told(house, "budget_enforcement", HALT)
    counted = 'scopegate_emissions_total{kind="budget_enforcement",result="%s"}'
    assert await house.metric(counted % "recorded") == 1
    assert await house.metric(counted % "repeated") == 1


def test_the_models_take_the_arguments_of_the_library() -> None:
    """One list of arguments: the contract's, as `sidecar.decisions` keeps it."""
    text = (Path(__file__).parents[1] / "cases/seed_004_contract.yaml").read_text("utf-8")
    contract = yaml.safe_load(text)
    signatures = {function["name"]: function["signature"] for function in contract["exports"]["functions"]}
    for kind, model in EMITTER_MODELS.items():
        inside = signatures[f"emit_{kind}_decision"].partition("(")[2].rpartition(")")[0]
        names = [part.partition(":")[0].strip() for part in inside.split(", ") if ":" in part]
        assert list(model.model_fields) == names, kind
