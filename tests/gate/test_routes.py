"""The name of a route, in records, answers and metrics (`gate.routes`)."""

from __future__ import annotations

import pytest

from tests.support import House, Open

NAMED = {"routes": [{"name": "run-action", "path": "**/recovery/execute"}]}


@pytest.fixture
async def house(open_house: Open) -> House:
    return await open_house(gate=NAMED)


async def test_an_execution_names_its_route_in_both_records_and_its_metric(house: House) -> None:
    answer = await house.execute(await house.issue())
    record = await house.record(answer.header("Scopegate-Decision-Id") or "")
    assert record["details"]["route"] == "run-action"
    assert record["execution"]["route"] == "run-action"
    (settled,) = await house.records("&event=settled")
    assert settled["details"]["route"] == "run-action"
    assert await house.metric('scopegate_executions_total{outcome="answered",route="run-action"}') == 1


async def test_a_refusal_names_its_route_in_the_answer_the_record_and_the_metric(house: House) -> None:
    answer = await house.execute(None)
    body = answer.json()
    assert (body["error"], body["route"]) == ("scoped_execution_required", "run-action")
    record = await house.record(body["decision_id"])
    assert record["details"]["route"] == "run-action"
    labels = 'action="retry_agent",outcome="blocked",reason="scoped_execution_required",route="run-action"'
    assert await house.metric(f"scopegate_decisions_total{{{labels}}}") == 1


async def test_without_a_name_the_path_names_the_route(open_house: Open) -> None:
    house = await open_house(gate={"routes": [{"path": "/v1/run"}]})
    answer = await house.execute(None, target="/v1/run")
    assert answer.json()["route"] == "/v1/run"


async def test_an_execution_that_has_not_happened_yet_is_a_zero_of_each_route(house: House) -> None:
    for outcome in ("answered", "not_sent", "unknown"):
        series = f'scopegate_executions_total{{outcome="{outcome}",route="run-action"}}'
        assert await house.metric(series) == 0
