"""Freezes over real sockets: one call stops the executions that it matches, and says why."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from sidecar.core.roles import ROLES, Holders, Roles
from tests.client import Message, as_json, ask
from tests.support import EXECUTE, POLICIES, House, Open

FREEZES = "/api/v1/freezes"
BODY = {"incident_id": "inc_1", "action": "retry_agent"}


async def freeze(house: House, headers: Any = (), **terms: Any) -> dict[str, Any]:
    answer = await house.admin("POST", FREEZES, {"match": {}, "reason": "a split", **terms}, headers)
    assert answer.status == 201, answer.body
    made: dict[str, Any] = answer.json()
    return made


async def execute(house: House, scope_id: str | None = None, headers: Any = (), **more: Any) -> Message:
    kind, body = as_json({**BODY, **({} if scope_id is None else {"scope_id": scope_id}), **more})
    return await house.data("POST", EXECUTE, [*kind, *headers], body)


async def test_a_frozen_execution_is_refused_with_the_freeze_and_goes_on_once_it_is_lifted(
    open_house: Open,
) -> None:
    house = await open_house()
    scope = await house.issue()
    made = await freeze(house, match={"action": "retry_*", "route": ["*"]}, reason="the primary is split")
    assert (made["match"], made["except"], made["active"]) == (
        {"action": ["retry_*"], "route": ["*"]},
        {},
        True,
    )
    refused = await execute(house, scope["scope_id"])
    assert refused.status == 403
    body = refused.json()
    assert (body["error"], body["freeze_id"], body["reason"], body["ends_at"]) == (
        "frozen",
        made["freeze_id"],
        "the primary is split",
        None,
    )
    assert refused.header("Retry-After") is None
    assert house.backend.seen == []
    (listed,) = (await house.admin("GET", FREEZES)).json()["freezes"]
    assert listed == made
    lifted = await house.admin("DELETE", f"{FREEZES}/{made['freeze_id']}", {"reason": "whole again"})
    assert (lifted.status, lifted.json()["active"]) == (200, False)
    assert (await house.admin("GET", FREEZES)).json() == {"freezes": []}
    (ended,) = (await house.admin("GET", f"{FREEZES}?all=true")).json()["freezes"]
    assert (ended["lifted_because"], ended["lifted_by"]) == ("whole again", "anonymous")
    # Nothing was consumed meanwhile.
    assert (await execute(house, scope["scope_id"])).status == 200
    events = [(one["event"], one["decision_reason"]) for one in await house.records()]
    assert events[::-1] == [
        ("issued", None),
        ("frozen", None),
        ("refused", "frozen"),
        ("unfrozen", None),
        ("admitted", None),
        ("settled", None),
    ]


async def test_the_list_of_all_freezes_is_bounded_and_yet_holds_each_that_is_in_force(
    open_house: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sidecar.web.api.freezes.MOST_LISTED", 2)
    house = await open_house()
    made = [await freeze(house, match={"action": f"a{number}"}, reason="r") for number in range(4)]
    oldest, second, third, newest = (one["freeze_id"] for one in made)
    for freeze_id in (second, third, newest):
        await house.admin("DELETE", f"{FREEZES}/{freeze_id}", {"reason": "whole again"})
    listed = (await house.admin("GET", f"{FREEZES}?all=true")).json()["freezes"]
    assert [one["freeze_id"] for one in listed] == [newest, third, oldest]


async def test_a_freeze_with_an_end_says_when_to_retry(open_house: Open) -> None:
    house = await open_house()
    scope = await house.issue()
    until = datetime.now(UTC) + timedelta(seconds=100)
    made = await freeze(house, until=until.isoformat())
    refused = await execute(house, scope["scope_id"])
    assert refused.json()["ends_at"] == made["ends_at"]
    assert 1 <= int(refused.header("Retry-After") or 0) <= 100
    assert refused.json()["retry_after_seconds"] == int(refused.header("Retry-After") or 0)
    house.clock.move(101)
    assert (await execute(house, scope["scope_id"])).status == 200
    assert (await house.admin("GET", FREEZES)).json() == {"freezes": []}


async def test_a_freeze_shows_in_status_readiness_and_metrics_and_does_not_make_it_unready(
    open_house: Open,
) -> None:
    house = await open_house()
    assert "scopegate_freezes_active 0.0" in await house.metrics()
    made = await freeze(house)
    ready = await ask(house.sidecar.ops_address, "GET", "/health/ready")
    assert (ready.status, ready.json()["freezes_active"]) == (200, 1)
    status = (await house.admin("GET", "/api/v1/status")).json()
    assert (status["freezes_active"], status["freezes"]) == (1, [made])
    assert "scopegate_freezes_active 1.0" in await house.metrics()


async def test_scopes_are_granted_while_executions_are_frozen(open_house: Open) -> None:
    house = await open_house()
    await freeze(house)
    assert (await house.issue())["status"] == "active"


async def test_explain_says_what_is_frozen(open_house: Open) -> None:
    house = await open_house()
    scope = await house.issue()
    made = await freeze(house)
    asked = {**BODY, "scope_id": scope["scope_id"]}
    explained = (await house.admin("POST", "/api/v1/explain", asked)).json()
    assert (explained["allowed"], explained["error"]) == (False, "frozen")
    assert explained["members"]["freeze_id"] == made["freeze_id"]


async def test_a_freeze_wins_over_shadow_mode_even_for_a_request_that_cannot_be_read(
    open_house: Open,
) -> None:
    house = await open_house(gate={"routes": [{"path": EXECUTE, "mode": "shadow"}]})

    async def unread() -> Message:
        return await house.data("POST", EXECUTE, [("Content-Type", "application/json")], b"{")

    assert (await execute(house)).status == 200
    assert (await unread()).status == 200
    made = await freeze(house, match={"action": "retry_agent"})
    house.backend.seen.clear()
    for answer in (await execute(house), await unread()):
        assert (answer.status, answer.json()["error"]) == (403, "frozen")
        assert answer.json()["freeze_id"] == made["freeze_id"]
        record = (await house.admin("GET", f"/api/v1/decisions/{answer.json()['decision_id']}")).json()
        assert (record["event"], record["decision_reason"]) == ("refused", "frozen")
    assert house.backend.seen == []
    explained = await house.admin("POST", "/api/v1/explain", {"incident_id": "inc_1"})
    assert explained.json()["error"] == "frozen"


async def test_a_freeze_holds_where_no_scope_is_needed(open_house: Open) -> None:
    house = await open_house(gate={"scope_required_from": "critical"})
    assert (await execute(house)).status == 200
    await freeze(house)
    assert (await execute(house)).json()["error"] == "frozen"


async def test_a_repeat_under_an_idempotency_key_is_frozen(open_house: Open) -> None:
    house = await open_house()
    scope = await house.issue()
    key = [("Idempotency-Key", "a-key-of-one-action")]
    assert (await execute(house, scope["scope_id"], key)).status == 200
    made = await freeze(house)
    assert (await execute(house, scope["scope_id"], key)).json()["error"] == "frozen"
    await house.admin("DELETE", f"{FREEZES}/{made['freeze_id']}", {"reason": "over"})
    again = await execute(house, scope["scope_id"], key)
    assert (again.status, again.header("Idempotency-Replayed")) == (200, "true")
    assert len(house.backend.seen) == 1


AUTH = {"proxy": {"header": "X-User", "groups_header": "X-Groups", "trusted": ["127.0.0.1"]}}
EVERYBODY = replace(POLICIES, roles=Roles({role: Holders(groups=("*",)) for role in ROLES}))


async def test_those_that_are_excepted_go_on(open_house: Open) -> None:
    house = await open_house(policies=EVERYBODY, auth=AUTH)

    def by(user: str, *groups: str) -> list[tuple[str, str]]:
        return [("X-User", user), ("X-Groups", ",".join(groups))]

    scope = await house.issue(headers=by("anna", "oncall"), max_attempts=3)
    terms = {"match": {"action": "*"}, "except": {"principal_group": "commanders"}}
    await freeze(house, by("anna", "oncall"), **terms)
    assert (await execute(house, scope["scope_id"], by("bot", "bots"))).json()["error"] == "frozen"
    assert (await execute(house, scope["scope_id"], by("carla", "oncall", "commanders"))).status == 200
    (listed,) = (await house.admin("GET", FREEZES, None, by("anna", "oncall"))).json()["freezes"]
    assert listed["set_by"] == "anna"


@pytest.mark.parametrize(
    ("document", "member", "said"),
    [
        ({"reason": "r"}, "match", "is required"),
        ({"match": {}}, "reason", "is required"),
        ({"match": None, "reason": "r"}, "match", "must be an object"),
        ({"match": ["x"], "reason": "r"}, "match", "must be an object"),
        ({"match": {}, "except": None, "reason": "r"}, "except", "must be an object"),
        ({"match": {}, "reason": " "}, "reason", "cannot be blank"),
        ({"match": {"actions": "x"}, "reason": "r"}, "match/actions", "is not known here"),
        ({"match": {"action": []}, "reason": "r"}, "match/action", "must have 1 to 100 entries"),
        ({"match": {"action": ["x"] * 101}, "reason": "r"}, "match/action", "must have 1 to 100 entries"),
        ({"match": {"action": None}, "reason": "r"}, "match/action", "must be a string of"),
        ({"match": {"action": {"a": 1}}, "reason": "r"}, "match/action", "must be a string of"),
        (
            {"match": {"principal_kind": "robot"}, "reason": "r"},
            "match/principal_kind",
            "human, service, agent",
        ),
        ({"match": {"principal_kind": "agents*"}, "reason": "r"}, "match/principal_kind", "that matches one"),
        ({"match": {"risk": ["low", "huge"]}, "reason": "r"}, "match/risk", "low, medium, high, critical"),
        ({"match": {}, "except": {"x": "y"}, "reason": "r"}, "except/x", "is not known here"),
        ({"match": {}, "reason": "r", "until": "2001-01-01T00:00:00Z"}, "until", "must be in the future"),
        ({"match": {}, "reason": "r", "until": "2101-01-01T00:00:00"}, "until", "a time with its offset"),
        ({"match": {}, "reason": "r", "until": 5}, "until", "a time with its offset"),
        (
            {"match": {}, "reason": "r", "until": "9999-12-31T23:59:59-01:00"},
            "until",
            "a time with its offset",
        ),
        ({"match": {}, "reason": "r", "for": "2h"}, "for", "is not known here"),
    ],
)
async def test_a_freeze_that_is_not_valid_names_the_member(
    open_house: Open, document: dict[str, Any], member: str, said: str
) -> None:
    house = await open_house()
    answer = await house.admin("POST", FREEZES, document)
    assert (answer.status, answer.json()["error"]) == (422, "invalid_freeze"), answer.body
    assert answer.json()["member"] == member
    assert answer.json()["errors"][0]["member"] == f"/{member}"
    assert said in answer.json()["message"]
    assert (await house.admin("GET", FREEZES)).json() == {"freezes": []}


async def test_lifting_needs_a_reason_and_a_freeze(open_house: Open) -> None:
    house = await open_house()
    made = await freeze(house)
    path = f"{FREEZES}/{made['freeze_id']}"
    for document in ({}, {"reason": ""}, {"because": "x"}):
        assert (await house.admin("DELETE", path, document)).json()["error"] == "invalid_freeze"
    assert (await house.admin("DELETE", path)).status in (400, 415, 422)
    unknown = await house.admin("DELETE", f"{FREEZES}/none", {"reason": "r"})
    assert (unknown.status, unknown.json()["error"], unknown.json()["freeze_id"]) == (
        404,
        "freeze_not_found",
        "none",
    )
    assert (await house.admin("GET", FREEZES)).json()["freezes"] == [made]


async def test_no_execution_is_admitted_after_a_freeze_has_answered(open_house: Open) -> None:
    """200 callers execute again and again, each at its next turn, until they are refused."""
    house = await open_house(gate={"max_in_flight": 500})
    scopes = [await house.issue(incident_id=f"inc_{number}", max_attempts=10) for number in range(200)]
    answers: list[Message] = []

    async def run(number: int) -> None:
        status = 200
        while status == 200:
            scope_id = scopes[number]["scope_id"]
            answer = await execute(house, scope_id, incident_id=f"inc_{number}")
            answers.append(answer)
            status = answer.status

    running = [asyncio.create_task(run(number)) for number in range(200)]
    while not answers:
        await asyncio.sleep(0.001)
    made = await freeze(house)
    late = await execute(house, (await house.issue())["scope_id"])
    await asyncio.gather(*running)
    assert late.json()["freeze_id"] == made["freeze_id"]
    assert {answer.json().get("error") for answer in answers if answer.status != 200} == {"frozen"}
    records = (await house.records())[::-1]
    (at,) = (place for place, one in enumerate(records) if one["event"] == "frozen")
    admitted = [place for place, one in enumerate(records) if one["event"] == "admitted"]
    assert all(place < at for place in admitted)
    assert len(admitted) == len(house.backend.seen) == [answer.status for answer in answers].count(200)
    refused = [one for one in records if one["decision_reason"] == "frozen"]
    assert sum(one["details"].get("count", 1) for one in refused) == 201
