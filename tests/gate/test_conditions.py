"""Conditions in CEL, at work in the gate: what they refuse, what it leaves, and that none runs for long."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from sidecar.core.policy import Rule
from sidecar.policies._conditions import condition
from tests.support import POLICIES, House

# With 256 agents, 65,536 steps.
LONG = 'target_agents.all(a, target_agents.all(b, a != "x" || b != "y"))'


def adopt(house: House, text: str, *, shadow: bool = False) -> None:
    rule = Rule(id="asked", on="execute", when=condition(text), deny=True, shadow=shadow)
    house.adopt(replace(POLICIES, rules=(rule,)))


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ('action == "retry_agent" && risk == "low" && tenant_id == "default"', 403),
        ('incident_id == "inc_2"', 200),
        ('principal == "anonymous" && "a" in target_agents', 403),
        ("has(parameters.force) && parameters.force", 403),
        ("parameters.weight > 0.4 && parameters.count == 3", 403),
        ('intent == "a test"', 403),
        ("max_cost_micros == 500000", 403),
        ("attempts_used == 0 && attempts_remaining == 1", 403),
        ("attempts_used > 0", 200),
        ("scope_age_seconds >= 60", 200),
        ('now < timestamp("2020-01-01T00:00:00Z")', 200),
    ],
)
async def test_a_condition_reads_what_the_request_and_its_scope_say(
    house: House, text: str, status: int
) -> None:
    scope = await house.issue(target_agents=["a"])
    adopt(house, text)
    parameters = {"force": True, "weight": 0.5, "count": 3}
    answer = await house.execute(scope, target_agents=["a"], parameters=parameters)
    assert answer.status == status, answer.body
    if status == 403:
        assert answer.json()["rules"] == ["asked"]


async def test_the_time_of_a_condition_is_the_stores_and_its_record_says_when_it_was_judged(
    house: House,
) -> None:
    adopt(house, 'now >= timestamp("2126-12-24T00:00:00Z")')
    assert (await house.execute(await house.issue())).status == 200
    (admitted,) = await house.records("&event=admitted")
    house.clock.move((datetime(2126, 12, 24, tzinfo=UTC) - datetime.now(UTC)).total_seconds() + 1)
    answer = await house.execute(await house.issue())
    assert answer.status == 403
    refused = await house.record(answer.json()["decision_id"])
    for record in (admitted, refused):
        assert record["details"]["judged_at"] <= record["decided_at"]
    assert refused["details"]["judged_at"] >= "2126-12-24T00:00:00"


@pytest.mark.parametrize(
    "text", ["parameters.nothing == 1", "1 / attempts_used == 1", "parameters.text", LONG]
)
async def test_what_cannot_be_judged_refuses_is_recorded_and_counted(house: House, text: str) -> None:
    agents = [f"agent_{number}" for number in range(256)]
    scope = await house.issue(target_agents=agents)
    adopt(house, text)
    begun = time.perf_counter()
    answer = await house.execute(scope, target_agents=agents, parameters={"text": "neither true nor false"})
    assert time.perf_counter() - begun < 5
    assert (answer.status, answer.json()["error"], answer.json()["rules"]) == (
        403,
        "policy_denied",
        ["asked"],
    )
    why = answer.json()["condition_error"]
    record = await house.record(answer.json()["decision_id"])
    assert record["details"]["condition_error"] == why
    assert await house.metric('scopegate_condition_errors_total{rule="asked"}') == 1
    assert (await house.scope(scope))["attempts_used"] == 0
    assert house.backend.executions == []


async def test_in_shadow_even_that_only_stands_in_the_record(house: House) -> None:
    scope = await house.issue()
    adopt(house, "parameters.nothing == 1", shadow=True)
    answer = await house.execute(scope)
    assert answer.status == 200
    record = await house.record(answer.header("Scopegate-Decision-Id") or "")
    (would,) = record["details"]["would_refuse"]
    assert would["rule"] == "asked"
    assert would["condition_error"]
    assert await house.metric('scopegate_condition_errors_total{rule="asked"}') == 1
