"""Scoped pre-execution, from its specification: each row of the table as a case, the rest as sentences."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, fields, replace
from decimal import Decimal
from hashlib import sha256
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.core.money import MAX_MICROS
from sidecar.core.policy import RiskClass
from sidecar.core.rehearsal import (
    DEFAULT_TIMEOUT_MS,
    MAX_TIMEOUT_MS,
    ExecutionScope,
    RecoveryAction,
    ScopedExecutionResult,
    action_asked_for,
    checked_timeout,
    clamped,
    estimated_cents,
    execution_hash,
    failed,
    observed,
    reported_cost,
    sample_of,
    shown,
    simulated,
    without_running,
)
from tests.cases import load_cases

CASES = load_cases("rehearsal")
ACTION = RecoveryAction("cand-1", "retry_agent", RiskClass.LOW, "retry")
SCOPED = [scope for scope in ExecutionScope if scope is not ExecutionScope.DRY_RUN]


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_a_rehearsal(case: dict[str, Any]) -> None:
    action = replace(ACTION, **case.get("action", {}))
    scope = ExecutionScope(case.get("scope", "dry_run"))
    fraction = clamped(case.get("fraction", 0.1))
    if "problem" in case:
        result = failed(case["problem"])
    elif "returns" in case:
        sample = sample_of(action, scope, fraction)
        assert sample.parameters == case.get("gets", sample.parameters)
        result = observed(action, scope, fraction, sample, case["returns"])
    else:
        result = without_running(action, scope, fraction)
    told = asdict(result)
    assert told.pop("duration_ms") == 0
    assert told == case["result"]


def test_the_fields_stand_in_the_order_of_the_contract() -> None:
    assert [each.name for each in fields(ScopedExecutionResult)] == [
        "success",
        "cost_delta_cents",
        "failure_count",
        "policy_violations",
        "execution_hash",
        "duration_ms",
        "scope_coverage",
        "samples_tested",
        "details",
    ]
    assert [each.name for each in fields(RecoveryAction)] == [
        "id",
        "name",
        "risk_class",
        "action_type",
        "parameters",
        "target_agents",
        "timeout_ms",
    ]
    assert {scope.name: scope.value for scope in ExecutionScope} == {
        "AGENT_SUBSET": "agent_subset",
        "REQUEST_SAMPLE": "request_sample",
        "BUDGET_FRACTION": "budget_fraction",
        "DRY_RUN": "dry_run",
    }


def test_an_action_needs_only_what_has_no_default() -> None:
    assert (ACTION.parameters, ACTION.target_agents, ACTION.timeout_ms) == ({}, [], 30_000)
    assert ACTION.parameters is not RecoveryAction("a", "b", RiskClass.LOW, "c").parameters


@pytest.mark.parametrize(
    "changes",
    [
        {"risk_class": "extreme"},
        {"risk_class": None},
        {"risk_class": "HIGH"},
        {"id": 7},
        {"name": None},
        {"action_type": b"retry"},
        {"timeout_ms": 0},
        {"timeout_ms": -1},
        {"timeout_ms": True},
        {"timeout_ms": "1"},
        {"timeout_ms": None},
        {"timeout_ms": math.nan},
        {"timeout_ms": MAX_TIMEOUT_MS + 1},
    ],
)
def test_an_action_that_is_none_cannot_be_made(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        replace(ACTION, **changes)


def test_the_value_of_a_risk_class_is_as_good_as_its_member() -> None:
    plain: Any = "high"
    assert replace(ACTION, risk_class=plain).risk_class is RiskClass.HIGH


@pytest.mark.parametrize("milliseconds", [1, 0.5, DEFAULT_TIMEOUT_MS, MAX_TIMEOUT_MS])
def test_a_timeout_is_a_number_above_zero(milliseconds: float) -> None:
    assert checked_timeout(milliseconds) == milliseconds


@pytest.mark.parametrize("fraction", [math.nan, None, "0.1", True, Decimal("0.1"), [0.1]])
def test_a_fraction_that_is_not_a_number_is_refused(fraction: Any) -> None:
    with pytest.raises(ValueError, match="scope_fraction"):
        clamped(fraction)


@given(st.one_of(st.floats(allow_nan=False), st.integers()))
def test_any_number_becomes_a_fraction_between_a_hundredth_and_one(number: float) -> None:
    fraction = clamped(number)
    assert isinstance(fraction, float)
    assert 0.01 <= fraction <= 1.0
    assert fraction == number or not 0.01 <= number <= 1.0


@pytest.mark.parametrize(("action_type", "cents"), [("retry", 10), ("scale", 100), ("", 20), ("retry ", 20)])
def test_an_estimate_goes_by_the_exact_type(action_type: str, cents: int) -> None:
    assert estimated_cents(replace(ACTION, action_type=action_type)) == cents


# What is asked for ---------------------------------------------------------------------------------------


def test_an_action_is_made_of_plain_values() -> None:
    parameters = {"target_agents": ["a", "b"], "depth": 1}
    action = action_asked_for("cand-1", "retry_agent", "retry", "high", parameters)
    assert action == replace(
        ACTION, risk_class=RiskClass.HIGH, parameters=parameters, target_agents=["a", "b"]
    )
    assert action.parameters is not parameters
    assert action_asked_for("cand-1", "retry_agent", "retry", "low", None) == ACTION
    assert (
        action_asked_for("cand-1", "retry_agent", "retry", "low", {"target_agents": None}).target_agents == []
    )


@pytest.mark.parametrize("agents", ["a", ["a", 7], [""], ["a\n"], ("a",), {}, 7, ["x" * 257]])
def test_target_agents_that_are_not_a_list_of_names_are_refused(agents: Any) -> None:
    with pytest.raises(ValueError, match=r"^parameters/target_agents must be a list of strings"):
        action_asked_for("cand-1", "retry_agent", "retry", "low", {"target_agents": agents})


@pytest.mark.parametrize("parameters", ["x", [("a", 1)], 7])
def test_parameters_that_are_no_dict_are_refused(parameters: Any) -> None:
    with pytest.raises(ValueError, match=r"^parameters must be a dict"):
        action_asked_for("cand-1", "retry_agent", "retry", "low", parameters)


def test_an_unknown_risk_class_is_refused() -> None:
    with pytest.raises(ValueError, match="extreme"):
        action_asked_for("cand-1", "retry_agent", "retry", "extreme", {})


# The sample ----------------------------------------------------------------------------------------------


@given(
    scope=st.sampled_from(SCOPED),
    size=st.integers(1, 300),
    fraction=st.floats(0.01, 1.0),
)
def test_a_sample_is_the_beginning_of_the_whole_and_leaves_it_alone(
    scope: ExecutionScope, size: int, fraction: float
) -> None:
    agents, requests = [f"agent-{n}" for n in range(size)], list(range(size))
    action = replace(ACTION, target_agents=agents, parameters={"requests": requests, "budget_usd": 2.5})
    before = json.dumps(asdict(action))
    sample = sample_of(action, scope, fraction)
    assert json.dumps(asdict(action)) == before
    cut = max(1, round(size * fraction))
    assert sample.parameters["scope_fraction"] == fraction
    assert sample.parameters.get("target_agents") == (
        agents[:cut] if scope is ExecutionScope.AGENT_SUBSET else None
    )
    assert sample.parameters["requests"] == (
        requests[:cut] if scope is ExecutionScope.REQUEST_SAMPLE else requests
    )
    budget = sample.parameters["budget_usd"]
    assert budget == pytest.approx(2.5 * fraction if scope is ExecutionScope.BUDGET_FRACTION else 2.5)
    assert (sample.size, sample.total) == (
        (None, None) if scope is ExecutionScope.BUDGET_FRACTION else (cut, size)
    )


def test_a_decimal_budget_stays_a_decimal() -> None:
    action = replace(ACTION, parameters={"budget_usd": Decimal("0.30")})
    part = sample_of(action, ExecutionScope.BUDGET_FRACTION, 0.1).parameters["budget_usd"]
    assert (part, type(part)) == (Decimal("0.030"), Decimal)


def test_a_budget_does_not_become_infinite_in_parts() -> None:
    with pytest.raises(ValueError, match="too large"):
        sample_of(replace(ACTION, parameters={"budget": 10**400}), ExecutionScope.BUDGET_FRACTION, 0.1)
    endless = replace(ACTION, parameters={"budget": math.inf})
    assert sample_of(endless, ExecutionScope.BUDGET_FRACTION, 0.1).parameters["budget"] == math.inf


@pytest.mark.parametrize("scope", [ExecutionScope.AGENT_SUBSET, ExecutionScope.REQUEST_SAMPLE])
def test_of_an_empty_list_nothing_is_cut(scope: ExecutionScope) -> None:
    action = replace(ACTION, parameters={"requests": [], "target_agents": []})
    sample = sample_of(action, scope, 0.5)
    assert sample.parameters == {"requests": [], "target_agents": [], "scope_fraction": 0.5}
    result = observed(action, scope, 0.5, sample, None)
    assert (result.scope_coverage, result.samples_tested) == (0.5, 1)


# What a callable returned --------------------------------------------------------------------------------


def seen(returned: object) -> ScopedExecutionResult:
    sample = sample_of(ACTION, ExecutionScope.AGENT_SUBSET, 0.1)
    return observed(ACTION, ExecutionScope.AGENT_SUBSET, 0.1, sample, returned)


@pytest.mark.parametrize(
    ("dollars", "cents"),
    [(0.01, 1), (0.010001, 2), (1e-30, 1), (0, 0), (Decimal("0.1"), 10), (2, 200), (0.1 + 0.2, 31)],
)
def test_a_cost_is_reported_in_cents_and_never_understated(dollars: Any, cents: int) -> None:
    result = seen({"cost_usd": dollars})
    assert (result.success, result.cost_delta_cents) == (True, cents)


@pytest.mark.parametrize(
    "dollars", ["0.1", True, -0.01, math.nan, math.inf, Decimal("sNaN"), 10**400, [0.1], 1_000_000_001]
)
def test_a_cost_that_cannot_be_read_is_a_violation(dollars: Any) -> None:
    result = seen({"cost_usd": dollars})
    assert (result.success, result.cost_delta_cents, result.failure_count) == (False, 0, 0)
    assert result.policy_violations == ["cost_usd of what the action returned cannot be read"]


@pytest.mark.parametrize(
    ("member", "value"),
    [
        ("failure_count", True),
        ("failure_count", 1.0),
        ("samples_tested", -1),
        ("samples_tested", "3"),
        ("policy_violations", "no"),
        ("policy_violations", ["no", 7]),
    ],
)
def test_a_member_of_a_wrong_type_is_a_violation(member: str, value: Any) -> None:
    result = seen({member: value})
    assert (result.success, result.failure_count, result.samples_tested) == (False, 0, 1)
    assert result.policy_violations == [f"{member} of what the action returned cannot be read"]


def test_members_that_are_none_are_absent() -> None:
    returned = {"cost_usd": None, "failure_count": None, "policy_violations": None, "samples_tested": None}
    assert seen(returned).success is True
    assert replace(seen(returned), details={}) == replace(seen({}), details={})


def test_no_samples_are_no_samples() -> None:
    assert seen({"samples_tested": 0}).samples_tested == 0


def test_violations_may_come_as_a_tuple() -> None:
    assert seen({"policy_violations": ("a", "b")}).policy_violations == ["a", "b"]


@pytest.mark.parametrize("returned", [object(), {"x": {1}}, {"x": math.nan}, {(1, 2): 3}])
def test_what_is_not_json_is_left_out_of_the_details(returned: object) -> None:
    result = seen(returned)
    assert result.success is True
    assert "result" not in result.details


def test_the_result_is_a_copy_of_what_was_returned() -> None:
    returned: dict[str, Any] = {"steps": ("a",)}
    result = seen(returned)
    returned["steps"] = ()
    assert result.details["result"] == {"steps": ["a"]}


@pytest.mark.parametrize(
    ("returned", "micros"),
    [
        ({"cost_usd": 0.1}, 100_000),
        ({"cost_usd": 0.1 + 0.2}, 300_001),
        ({"cost_usd": 0}, 0),
        ({"cost_usd": Decimal("0E+30")}, 0),
        ({"cost_usd": Decimal("1e-7")}, 1),
        ({"cost_usd": 1e9}, MAX_MICROS),
        ({"cost_usd": 10**400}, MAX_MICROS),
        ({"cost_usd": 999_999_999.999999}, 999_999_999_999_999),
        ({"cost_usd": "0.1"}, None),
        ({"cost_usd": True}, None),
        ({"cost_usd": -1}, None),
        ({"cost_usd": math.inf}, None),
        ({"cost_usd": math.nan}, None),
        ({"cost_usd": None}, None),
        ({}, None),
        (None, None),
        (0.1, None),
        ([("cost_usd", 1)], None),
    ],
)
def test_the_cost_of_an_execution_is_what_its_callable_says(returned: object, micros: int | None) -> None:
    assert reported_cost(returned) == micros


# Results -------------------------------------------------------------------------------------------------


def test_a_hash_covers_the_key_sorted_json() -> None:
    wanted = sha256(b'{"action_id": "x", "fraction": 0.5, "scope": "agent_subset"}').hexdigest()[:16]
    assert execution_hash({"scope": "agent_subset", "fraction": 0.5, "action_id": "x"}) == wanted
    assert simulated(replace(ACTION, id="x"), ExecutionScope.AGENT_SUBSET, 0.5).execution_hash == wanted


def test_the_same_rehearsal_has_the_same_hash_and_another_another() -> None:
    hashes = {
        without_running(replace(ACTION, id=name), scope, fraction).execution_hash
        for name in ("cand-1", "cand-2")
        for scope in SCOPED
        for fraction in (0.1, 0.2)
    }
    assert len(hashes) == 12
    ran = observed(ACTION, SCOPED[0], 0.1, sample_of(ACTION, SCOPED[0], 0.1), {"cost_usd": 1})
    assert ran.execution_hash == simulated(ACTION, SCOPED[0], 0.1).execution_hash


def test_a_result_is_shown_with_the_risk_class_and_the_scope_as_strings() -> None:
    result = failed("x")
    assert shown(result, replace(ACTION, risk_class=RiskClass.HIGH), ExecutionScope.AGENT_SUBSET) == {
        **asdict(result),
        "risk_class": "high",
        "scope_type": "agent_subset",
    }
