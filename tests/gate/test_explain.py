"""What `explain` says is what the wire would answer: on each route, for each tenant, in words to act by."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from urllib.parse import quote

import pytest

from sidecar.core.policy import ActionPolicy, Brake, RiskClass, Rule
from tests.client import HeaderList, Message
from tests.described import DOCUMENT
from tests.support import POLICIES, House, Open, replies

BODY = {"incident_id": "inc_1", "action": "retry_agent"}
PILOT = {"path": "/pilot/run", "mode": "shadow"}
RUN = {"path": "/run"}


async def asked(
    house: House, route: str | None = None, *, headers: HeaderList = (), **members: Any
) -> Message:
    """What `explain` answers about a body, on a route if one is named."""
    target = "/api/v1/explain" + ("" if route is None else f"?route={quote(route, safe='')}")
    body = {name: value for name, value in (BODY | members).items() if value is not ...}
    return await house.admin("POST", target, body, headers)


async def explained(house: House, route: str | None = None, **options: Any) -> dict[str, Any]:
    answer = await asked(house, route, **options)
    assert answer.status == 200, answer.body
    DOCUMENT.assert_answered("explain", answer)
    told: dict[str, Any] = answer.json()
    return told


# Routes -------------------------------------------------------------------------------------------------


async def test_the_first_route_that_refuses_judges_unless_another_is_named(open_house: Open) -> None:
    house = await open_house(gate={"routes": [PILOT, RUN, {"path": "/v2/{incident}/run"}]})
    for route, judged, allowed in (
        (None, "/run", False),
        ("/run", "/run", False),
        ("/pilot/run", "/pilot/run", True),
        ("/v2/{incident}/run", "/v2/{incident}/run", False),
    ):
        told = await explained(house, route)
        assert (told["route"], told["allowed"]) == (judged, allowed)
    assert (await house.execute(None, target="/pilot/run")).status == 200
    assert (await house.execute(None, target="/run")).status == 400


async def test_where_all_routes_are_in_shadow_the_first_judges(open_house: Open) -> None:
    house = await open_house(gate={"routes": [PILOT, {"path": "/other", "mode": "shadow"}]})
    told = await explained(house)
    assert (told["route"], told["allowed"]) == ("/pilot/run", True)


async def test_each_route_reads_the_facts_where_it_has_them(open_house: Open) -> None:
    house = await open_house(gate={"routes": [RUN, {"path": "/heal", "action": "/what"}]})
    scope = await house.issue()
    spelled = {"scope_id": scope["scope_id"], "action": ..., "what": "retry_agent"}
    assert (await explained(house, "/run", **spelled))["error"] == "invalid_request"
    assert (await explained(house, "/heal", **spelled))["allowed"]


@pytest.mark.parametrize("query", ["route=/nowhere", "route=", "route=/run&route=/run", "rout=/run"])
async def test_an_unknown_route_is_refused_and_the_known_ones_are_named(open_house: Open, query: str) -> None:
    house = await open_house(gate={"routes": [PILOT, RUN]})
    answer = await house.admin("POST", f"/api/v1/explain?{query}", BODY)
    assert (answer.status, answer.json()["error"]) == (400, "invalid_request")
    DOCUMENT.assert_answered("explain", answer)
    if query in ("route=/nowhere", "route="):
        assert answer.json()["message"] == "route must be one of /pilot/run, /run."


TRIAL = {"path": "/trial/run", "mode": "shadow", "action": "/what"}
V1 = {"path": "/v1/{tenant}/run", "mode": "shadow"}


@pytest.mark.parametrize(
    ("routes", "in_shadow"),
    [
        ([TRIAL, {"path": "**/run"}], []),
        ([TRIAL, {"path": "/run"}], ["/trial/run"]),
        ([{"path": "**/TRIAL/run"}, TRIAL], []),
        ([V1, {"path": "/v1/acme/run"}], ["/v1/{tenant}/run"]),
        ([{**V1, "path": "/v1/acme/run"}, {"path": "/v1/{name}/run/now"}, {"path": "**/run"}], []),
        ([{**V1, "name": "post"}, {**V1, "mode": "enforce", "methods": ["PUT"], "name": "put"}], ["post"]),
    ],
)
async def test_a_shadow_route_that_an_enforced_one_matches_too_is_told_as_enforced(
    open_house: Open, routes: list[dict[str, Any]], in_shadow: list[str]
) -> None:
    house = await open_house(gate={"routes": routes})
    status = (await house.admin("GET", "/api/v1/status")).json()
    assert status["shadow_routes"] == in_shadow
    (shadow,) = (route for route in routes if route.get("mode") == "shadow")
    target = shadow["path"].replace("{tenant}", "t")
    told = await explained(house, shadow.get("name", shadow["path"]))
    answer = await house.execute(None, target=target)
    assert (told["allowed"], answer.status == 200) == (bool(in_shadow), bool(in_shadow))


async def test_what_an_enforced_route_takes_over_is_judged_by_its_facts(open_house: Open) -> None:
    house = await open_house(gate={"routes": [TRIAL, {"path": "**/run"}]})
    scope = await house.issue()
    told = await explained(house, "/trial/run", scope_id=scope["scope_id"])
    assert (told["route"], told["allowed"]) == ("**/run", True)
    assert (await house.execute(scope, target="/trial/run")).status == 200


@pytest.mark.parametrize("least", ["low", "high"])
@pytest.mark.parametrize("members", [{"incident_id": ...}, {"action": ...}, {"scope_id": "s", "action": ...}])
async def test_in_shadow_too_little_to_judge_by_is_told_as_it_is_recorded(
    open_house: Open, least: str, members: dict[str, Any]
) -> None:
    house = await open_house(gate={"routes": [PILOT], "scope_required_from": least})
    told = await explained(house, **members)
    answer = await house.execute(None, target="/pilot/run", **members)
    assert (told["allowed"], answer.status) == (True, 200)
    record = await house.record(answer.header("Scopegate-Decision-Id") or "")
    assert told["would_refuse"] == record["details"]["would_refuse"]
    assert told["would_refuse"]


@pytest.mark.parametrize("members", [{}, {"scope_id": 7}, {"action": ...}])
async def test_in_shadow_nothing_goes_through_that_could_not_be_recorded(
    open_house: Open, members: dict[str, Any]
) -> None:
    house = await open_house(gate={"routes": [PILOT]}, policies=None)
    told = await explained(house, **members)
    answer = await house.execute(None, target="/pilot/run", **members)
    assert (told["allowed"], told["error"]) == (False, "policy_unavailable")
    assert (answer.status, answer.json()["error"]) == (503, "policy_unavailable")


# Brakes -------------------------------------------------------------------------------------------------


async def test_a_brake_names_every_facet_that_it_counts_by(open_house: Open) -> None:
    house = await open_house(gate={"tenant_header": "X-Tenant"})
    brake = Brake(
        per=("incident_id", "action", "tenant_id", "principal", "target_agents"),
        max_attempts=5,
        window_seconds=60,
    )
    house.adopt(replace(POLICIES, rules=(Rule(id="storm", on="execute", brake=brake),)))
    acme = [("X-Tenant", "acme")]
    scope = await house.issue(headers=acme, max_attempts=2)
    members = {"scope_id": scope["scope_id"], "target_agents": ["a", "b"]}
    answer = await house.execute(scope, headers=acme, target_agents=["a", "b"])
    record = await house.record(answer.header("Scopegate-Decision-Id") or "")
    (shown,) = (await explained(house, headers=acme, **members))["brakes"]
    assert shown["used"] == 1
    assert shown["per"] == {
        "incident_id": "inc_1",
        "action": "retry_agent",
        "tenant_id": record["tenant_id"],
        "principal": record["decision_inputs"]["principal"],
        "target_agents": ["a", "b"],
    }
    assert record["tenant_id"] == "acme"


# What to do next ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ceiling", "cost"),
    [(0.05, None), (0.15, "0.12"), (0.1, "0.3")],
    ids=["a hold that was raised above the ceiling", "what was spent leaves no room", "an overrun"],
)
async def test_a_cost_ceiling_that_leaves_no_room_says_how_high_that_of_a_new_scope_must_be(
    house: House, ceiling: float, cost: str | None
) -> None:
    policies = replace(POLICIES, actions={**POLICIES.actions, "peek": ActionPolicy(risk=RiskClass.LOW)})
    cheaper = ActionPolicy(risk=RiskClass.HIGH, hold=50_000)
    house.adopt(replace(policies, actions={**policies.actions, "failover": cheaper}))
    wanted: dict[str, Any] = {"allowed_actions": ["failover", "peek"], "action": ..., "max_attempts": 5}
    scope = await house.issue(**wanted, max_cost_usd=ceiling)
    house.adopt(policies)
    if cost is not None:
        spends(house, cost)
        assert (await house.execute(scope, action="peek")).status == 200
    told = await explained(house, scope_id=scope["scope_id"], action="failover")
    assert (told["error"], told["bound"]) == ("scope_exhausted", "max_cost_usd")
    assert told["next"] == "Ask for a new scope with max_cost_usd of at least 0.1."
    assert (await house.execute(scope, action="failover")).json()["bound"] == "max_cost_usd"
    # Whoever does so is let through.
    spends(house, "0")
    enough = await house.issue(**wanted, max_cost_usd=0.1)
    assert (await house.execute(enough, action="failover")).status == 200


def spends(house: House, dollars: str) -> None:
    house.backend.script = replies(headers=[("X-Recovery-Cost-USD", dollars)])


async def test_attempts_that_are_used_up_ask_to_see_what_they_achieved(house: House) -> None:
    scope = await house.issue()
    await house.execute(scope)
    told = await explained(house, scope_id=scope["scope_id"])
    assert (told["error"], told["bound"]) == ("scope_exhausted", "max_attempts")
    assert told["next"].startswith("See what its attempts achieved")
