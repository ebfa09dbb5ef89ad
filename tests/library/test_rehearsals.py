"""Rehearsals in the library: what runs, on what, for how long, and what is recorded before it runs."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from dataclasses import asdict
from typing import Any

import pytest

from sidecar.core.rehearsal import MAX_TIMEOUT_MS, execution_hash
from sidecar.library.runtime import configured_store
from sidecar.scoped_execution import (
    ExecutionScope,
    RecoveryAction,
    RiskClass,
    ScopedExecutionContext,
    ScopedExecutionResult,
    register_action,
    test_recovery_scope,
)
from tests.cases import load_cases
from tests.library.recorded import envelopes
from tests.support import eventually

pytestmark = pytest.mark.usefixtures("store_url")

CASES = load_cases("rehearsal")
SCOPED = [scope for scope in ExecutionScope if scope is not ExecutionScope.DRY_RUN]


def action(**members: Any) -> RecoveryAction:
    return RecoveryAction(
        **{
            "id": "cand-1",
            "name": "retry_agent",
            "risk_class": RiskClass.LOW,
            "action_type": "retry",
            **members,
        }
    )


async def rehearsed(scope: ExecutionScope, fraction: float = 0.1, **members: Any) -> ScopedExecutionResult:
    return await ScopedExecutionContext(action(**members), scope, fraction).execute()


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
async def test_the_cases_hold_with_a_real_callable(case: dict[str, Any]) -> None:
    got: list[Any] = []
    if "problem" in case or "returns" in case:

        @register_action("retry_agent")
        def run(parameters: dict[str, Any]) -> Any:
            got.append(parameters)
            if "problem" in case:
                raise RuntimeError(case["problem"].removeprefix("RuntimeError: "))
            return case["returns"]

    scope = ExecutionScope(case.get("scope", "dry_run"))
    told = asdict(await rehearsed(scope, case.get("fraction", 0.1), **case.get("action", {})))
    assert 0 <= told.pop("duration_ms") < 5_000
    assert told == case["result"]
    if "gets" in case:
        assert got == [case["gets"]]


async def test_by_default_it_is_a_dry_run_of_a_tenth() -> None:
    context = ScopedExecutionContext(action())
    assert (context.scope, context.scope_fraction, context.timeout_ms) == (
        ExecutionScope.DRY_RUN,
        0.1,
        30_000,
    )
    result = await context.execute()
    assert (result.success, result.details["mode"], result.cost_delta_cents) == (True, "dry_run", 10)


async def test_a_dry_run_and_a_simulation_execute_and_record_nothing() -> None:
    ran: list[Any] = []
    register_action("retry_agent", ran.append)
    await rehearsed(ExecutionScope.DRY_RUN)
    await rehearsed(ExecutionScope.AGENT_SUBSET, name="unregistered")
    assert (ran, envelopes()) == ([], [])


@pytest.mark.parametrize("scope", SCOPED)
async def test_a_rehearsal_that_runs_something_is_recorded_before_it_runs(scope: ExecutionScope) -> None:
    seen: list[Any] = []
    register_action("retry_agent", lambda parameters: seen.extend(envelopes()))
    await rehearsed(scope, 0.25, risk_class=RiskClass.HIGH)
    (envelope,) = seen
    assert envelopes() == seen
    assert (envelope["event"], envelope["origin"]) == ("emitted", "library")
    record = envelope["record"]
    assert (record["decision_type"], record["decision_trigger"]) == ("recovery", "explicit")
    assert (record["decision_outcome"], record["causal_role"]) == ("selected", "pre_run")
    assert (record["decision_source"], record["tenant_id"]) == ("system", "default")
    assert record["decision_inputs"] == {
        "action": "retry_agent",
        "action_type": "retry",
        "risk_class": "high",
        "scope_type": scope.value,
        "scope_fraction": 0.25,
    }
    assert record["details"] == {"rehearsal": True}


async def test_nothing_is_rehearsed_that_the_store_cannot_record() -> None:
    ran: list[Any] = []
    register_action("retry_agent", ran.append)
    configured_store().close()
    result = await rehearsed(ExecutionScope.AGENT_SUBSET)
    assert ran == []
    assert (result.success, result.failure_count, result.scope_coverage) == (False, 1, 0.0)
    assert result.policy_violations[0].startswith("store_unavailable: ")
    assert result.execution_hash == execution_hash({"error": result.policy_violations[0]})
    assert (await rehearsed(ExecutionScope.DRY_RUN)).success is True


@pytest.mark.parametrize("kind", ["async", "stubborn", "sync"])
@pytest.mark.parametrize("whose", ["context", "action"])
async def test_the_shorter_timeout_is_enforced(kind: str, whose: str) -> None:
    go_on = threading.Event()

    async def run(parameters: dict[str, Any]) -> None:
        while not go_on.is_set():
            try:
                await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                if kind == "async":
                    raise

    register_action("retry_agent", (lambda parameters: go_on.wait(10)) if kind == "sync" else run)
    longest = {"context": MAX_TIMEOUT_MS, "action": MAX_TIMEOUT_MS, whose: 60}
    context = ScopedExecutionContext(
        action(timeout_ms=longest["action"]), ExecutionScope.AGENT_SUBSET, timeout_ms=longest["context"]
    )
    assert context.timeout_ms == 60
    began = time.monotonic()
    result = await context.execute()
    assert 0.06 <= time.monotonic() - began < 5
    assert (result.success, result.failure_count, result.scope_coverage) == (False, 1, 0.0)
    assert result.policy_violations == ["timeout: the action did not end within 0.06 s"]
    assert 60 <= result.duration_ms < 5_000
    go_on.set()
    await asyncio.sleep(0.02)


async def test_a_rehearsal_that_is_cancelled_is_cancelled() -> None:
    begun, cut = asyncio.Event(), asyncio.Event()

    @register_action("retry_agent")
    async def run(parameters: dict[str, Any]) -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            cut.set()

    rehearsing = asyncio.create_task(rehearsed(ExecutionScope.AGENT_SUBSET))
    await begun.wait()
    rehearsing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await rehearsing
    await eventually(cut.is_set)


async def test_what_goes_wrong_inside_is_told_whatever_its_words_are() -> None:
    def boom(parameters: dict[str, Any]) -> None:
        raise ValueError("\ud800")

    register_action("retry_agent", boom)
    result = await rehearsed(ExecutionScope.AGENT_SUBSET)
    assert result.policy_violations == ["ValueError: \\ud800"]


async def test_a_sample_that_cannot_be_made_runs_and_records_nothing() -> None:
    ran: list[Any] = []
    register_action("retry_agent", ran.append)
    result = await rehearsed(ExecutionScope.BUDGET_FRACTION, parameters={"budget": 10**5_000})
    assert (result.success, ran, envelopes()) == (False, [], [])


@pytest.mark.parametrize(
    "wrong",
    [
        {"scope": "everything"},
        {"scope": None},
        {"scope_fraction": math.nan},
        {"scope_fraction": "0.1"},
        {"scope_fraction": None},
        {"timeout_ms": 0},
        {"timeout_ms": None},
        {"timeout_ms": math.inf},
    ],
)
def test_a_context_that_is_none_cannot_be_made(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        ScopedExecutionContext(action(), **wrong)


# test_recovery_scope -------------------------------------------------------------------------------------


async def test_a_recovery_scope_is_tested_by_plain_values() -> None:
    told = await test_recovery_scope(
        "cand-1", "retry_agent", "scale", "critical", {"target_agents": ["a"], "depth": 1}
    )
    assert told.pop("duration_ms") >= 0
    assert told == {
        "success": True,
        "cost_delta_cents": 100,
        "failure_count": 0,
        "policy_violations": [],
        "execution_hash": "cfaae56e43dcadd0",
        "scope_coverage": 0.0,
        "samples_tested": 0,
        "details": {"mode": "dry_run", "estimated_cost_cents": 100, "risk_class": "critical"},
        "risk_class": "critical",
        "scope_type": "dry_run",
    }
    assert (type(told["risk_class"]), type(told["scope_type"])) == (str, str)


async def test_a_recovery_scope_runs_the_registered_callable_on_a_sample() -> None:
    got: list[Any] = []
    register_action("retry_agent", got.append)
    told = await test_recovery_scope(
        "cand-1",
        "retry_agent",
        "retry",
        "low",
        {"target_agents": ["a", "b", "c", "d"]},
        scope_type="agent_subset",
        scope_fraction=0.5,
    )
    assert got == [{"target_agents": ["a", "b"], "scope_fraction": 0.5}]
    assert (told["success"], told["scope_coverage"], told["samples_tested"]) == (True, 0.5, 2)


@pytest.mark.parametrize(
    "wrong",
    [
        {"risk_class": "extreme"},
        {"risk_class": "HIGH"},
        {"scope_type": "everything"},
        {"scope_fraction": math.nan},
        {"parameters": {"target_agents": "a"}},
        {"parameters": [1]},
        {"action_type": None},
        {"action_name": 7},
        {"action_id": None},
    ],
)
async def test_a_value_that_is_none_is_a_value_error(wrong: dict[str, Any]) -> None:
    plain = {
        "action_id": "cand-1",
        "action_name": "retry_agent",
        "action_type": "retry",
        "risk_class": "low",
        "parameters": {},
    }
    with pytest.raises(ValueError):
        await test_recovery_scope(**{**plain, **wrong})


def test_it_is_no_test_of_whoever_imports_it() -> None:
    assert vars(test_recovery_scope)["__test__"] is False
