"""The routes of a sidecar (`gate.routes`): their names in records, and which of them judges a request."""

from __future__ import annotations

from typing import Any

import pytest

from tests.client import Message
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


# Which route judges -------------------------------------------------------------------------------------

PODS: list[dict[str, Any]] = [
    {"name": "restart", "path": ["/pods/{pod}", "/pods/{pod}/"], "target_agents": "path:pod"},
    {"name": "delete", "path": "/pods/{pod}", "methods": ["DELETE"], "target_agents": "path:pod"},
    {
        "name": "logs",
        "path": "/pods/{pod}/logs/{rest...}",
        "methods": ["GET", "PUT"],
        "other_methods": "pass",
    },
]


@pytest.fixture
async def pods(open_house: Open) -> House:
    return await open_house(gate={"routes": PODS})


async def sent(house: House, method: str, target: str, **members: Any) -> Message:
    """The answer to an execution by some method under a scope for the pod `web.1`."""
    scope = await house.issue(target_agents=["web.1"], max_attempts=5)
    headers, body = house.execution(scope, **members)
    return await house.data(method, target, headers, body)


@pytest.mark.parametrize(
    ("method", "target", "route"),
    [
        ("POST", "/pods/web.1", "restart"),
        ("POST", "/pods/web.1/", "restart"),
        ("POST", "/pods/%77eb.1", "restart"),
        ("DELETE", "/pods/web.1?grace=0", "delete"),
    ],
)
async def test_path_and_method_select_the_route_and_its_facts(
    pods: House, method: str, target: str, route: str
) -> None:
    answer = await sent(pods, method, target)
    assert answer.status == 200
    record = await pods.record(answer.header("Scopegate-Decision-Id") or "")
    assert record["details"]["route"] == route
    assert record["decision_inputs"]["target_agents"] == ["web.1"]
    (arrived,) = pods.backend.seen
    assert arrived.first == f"{method} {target} HTTP/1.1"


@pytest.mark.parametrize("method", ["POST", "DELETE"])
async def test_the_facts_of_the_path_are_those_of_the_scope(pods: House, method: str) -> None:
    answer = await sent(pods, method, "/pods/web.2")
    assert (answer.status, answer.json()["error"]) == (403, "target_outside_scope")
    assert pods.backend.seen == []


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("DELETE", "/pods/"),
        ("DELETE", "/pods/a%2Fweb.1"),
        ("DELETE", "/pods/web.1/"),  # with a slash that only the other method's route lists
        ("DELETE", "/pods/x/../web.1"),
        ("POST", "/pods/web.1/."),
        ("PUT", "/pods/web.1/logs/"),
        ("PUT", "/pods/web.1/logs/a//b"),
    ],
)
async def test_a_path_that_can_be_read_otherwise_is_refused_and_recorded(
    pods: House, method: str, target: str
) -> None:
    answer = await sent(pods, method, target)
    assert (answer.status, answer.json()["error"]) == (400, "ambiguous_path")
    record = await pods.record(answer.json()["decision_id"])
    assert (record["event"], record["decision_reason"]) == ("refused", "ambiguous_path")
    assert pods.backend.seen == []


async def test_a_method_that_no_route_of_the_path_lists_is_405_with_the_others_and_recorded(
    pods: House,
) -> None:
    answer = await sent(pods, "PATCH", "/pods/web.1")
    assert (answer.status, answer.json()["error"]) == (405, "method_not_allowed")
    allowed = (answer.header("Allow") or "").split(", ")
    assert sorted(allowed) == ["DELETE", "GET", "HEAD", "OPTIONS", "POST"]
    for method in ("GET", "OPTIONS"):
        assert (await pods.data(method, "/pods/web.1")).status == 200
    assert len(await pods.records("&event=refused")) == 1
    assert len(pods.backend.seen) == 2


async def test_a_listed_get_is_gated_with_head_and_other_methods_may_pass(pods: House) -> None:
    for method in ("GET", "HEAD", "PUT"):
        assert (await pods.data(method, "/pods/web.1/logs/a/b")).status >= 400
    assert pods.backend.seen == []
    assert (await sent(pods, "GET", "/pods/web.1/logs/a/b", target_agents=["web.1"])).status == 200
    for method in ("OPTIONS", "PATCH", "POST"):
        assert (await pods.data(method, "/pods/web.1/logs/a/b")).status == 200
    assert len(pods.backend.seen) == 4
    assert len(await pods.records("&event=admitted")) == 1


async def test_a_method_of_a_route_in_shadow_is_in_shadow_though_another_route_refuses_it(
    open_house: Open,
) -> None:
    trial = {"name": "trial", "path": "/pods/{pod}", "methods": ["PUT"], "mode": "shadow"}
    house = await open_house(gate={"routes": [PODS[1], trial]})
    headers, body = house.execution(None)
    assert (await house.data("PUT", "/pods/web.1", headers, body)).status == 200
    for method in ("DELETE", "PATCH"):
        assert (await house.data(method, "/pods/web.1", headers, body)).status >= 400
    allowed = (await house.data("PATCH", "/pods/web.1", headers, body)).header("Allow") or ""
    assert "PUT" in allowed
    assert len(house.backend.seen) == 1


async def test_the_root_may_be_gated(open_house: Open) -> None:
    house = await open_house(gate={"routes": [{"path": "/"}]})
    assert (await house.execute(await house.issue(), target="/")).status == 200
    assert (await house.execute(None, target="/?x")).status == 400
    for target in ("//", "/.", "/x/..", "/%2e", "/;a", "/%23"):
        refused = await house.execute(None, target=target)
        assert (refused.status, refused.json()["error"]) == (400, "ambiguous_path"), target
    assert (await house.data("POST", "/orders")).status == 200
    assert len(house.backend.seen) == 2
