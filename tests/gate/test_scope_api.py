"""The scope endpoints of the recovery API: granting, listing and revoking."""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace
from datetime import datetime
from typing import Any

import pytest

from sidecar.core.policy import ActionPolicy, Limit, RiskClass, Rule
from tests.client import Message, as_json, ask
from tests.support import EXECUTE, POLICIES, SCOPE, SCOPES, Backend, House, Open, replies, sends


def assert_problem(answer: Message, status: int, error: str) -> dict[str, Any]:
    assert answer.status == status, answer.body
    assert answer.header("Content-Type") == "application/problem+json"
    body: dict[str, Any] = answer.json()
    assert body["error"] == error
    assert {"type", "title", "status", "detail", "message"} <= set(body)
    return body


# Asking for one -----------------------------------------------------------------------------------------


async def test_a_scope_is_granted_with_its_defaults(house: House) -> None:
    answer = await house.ask_for_scope()
    assert answer.status == 201
    body = answer.json()
    assert re.fullmatch(r"scope_[0-9a-f]{24,}", body.pop("scope_id"))
    expires = datetime.fromisoformat(body.pop("expires_at"))
    assert expires.tzinfo is not None
    assert abs(expires.timestamp() * 1e6 - house.clock() - 300e6) < 5e6
    assert body == {
        "incident_id": "inc_1",
        "allowed_actions": ["retry_agent"],
        "max_cost_usd": 0.5,
        "max_attempts": 1,
        "intent": "a test",
        "status": "active",
        "attempts_remaining": 1,
        "target_agents": [],
        "created_by": "api",
    }


async def test_a_grant_leaves_a_record(house: House) -> None:
    answer = await house.ask_for_scope(created_by="ops", intent="because")
    (record,) = await house.records()
    assert record["decision_id"] == answer.header("Scopegate-Decision-Id")
    assert record["decision_inputs"]["policy_id"] == "scope_grant"
    assert (record["decision_outcome"], record["event"]) == ("selected", "issued")
    assert record["scope_id"] == answer.json()["scope_id"]
    assert record["details"]["created_by"] == "ops"
    assert record["details"]["created_by_verified"] is False


async def test_every_term_may_be_asked_for(house: House) -> None:
    terms: dict[str, Any] = {
        "max_cost_usd": 100,
        "max_attempts": 10,
        "ttl_seconds": 3600,
        "target_agents": ["a", "b"],
        "created_by": "somebody",
        "intent": "x" * 2000,
    }
    granted = await house.issue(action=..., allowed_actions=["retry_agent", "failover"], **terms)
    assert granted["allowed_actions"] == ["retry_agent", "failover"]
    assert {name: granted.get(name) for name in terms if name != "ttl_seconds"} == {
        name: value for name, value in terms.items() if name != "ttl_seconds"
    }


@pytest.mark.parametrize(
    ("member", "value"),
    [
        ("max_cost_usd", 0),
        ("max_cost_usd", 0.000001),
        ("max_cost_usd", 100.0),
        ("max_attempts", 1),
        ("ttl_seconds", 60),
        ("ttl_seconds", 3600),
        ("target_agents", []),
    ],
)
async def test_the_bounds_themselves_are_within(house: House, member: str, value: Any) -> None:
    await house.issue(**{member: value})


OF_WRONG_VALUES: dict[str, list[Any]] = {
    "incident_id": [..., None, "", 7, "x" * 257, "a\nb", []],
    "action": [..., None, "", 7, "x" * 257, "a\x00"],
    "intent": [..., None, "", "  \n", "\u200b" * 20, "\u2800 \ufeff\u3164", 7, "x" * 2001],
    "max_cost_usd": [None, "", "1", True, -0.01, 100.000001, 101, 1e-7, []],
    "max_attempts": [None, "", "1", True, 0, -1, 11, 1.0, 1.5, 2**70],
    "ttl_seconds": [None, "", "60", True, 59, 0, -1, 3601, 60.0],
    "target_agents": [None, "", "a", ["a", 1], [""], ["a\n"], {}],
    "created_by": [None, "", 7, "a\nb"],
    "allowed_actions": [None, "", [], [""], ["retry_agent", 7], "retry_agent"],
    "surprise": [1],
    "Intent": ["x"],
    "scope_id": ["scope_mine"],
    "tenant_id": ["mine"],
}
WRONG = [(member, value) for member, values in OF_WRONG_VALUES.items() for value in values]


@pytest.mark.parametrize(("member", "value"), WRONG, ids=range(len(WRONG)))
async def test_a_wrong_term_is_named_and_the_refusal_recorded(house: House, member: str, value: Any) -> None:
    body = assert_problem(await house.ask_for_scope(**{member: value}), 422, "invalid_scope")
    assert body["member"].split("/")[0] == member
    record = await house.record(body["decision_id"])
    assert record["decision_inputs"]["policy_id"] == "scope_grant"
    assert (record["decision_outcome"], record["decision_reason"]) == ("blocked", "invalid_scope")
    assert (await house.scopes())["total"] == 0


@pytest.mark.parametrize("terms", [{}, {"max_cost_usd": 0.5}, {"max_cost_usd": 0}])
@pytest.mark.parametrize(
    "members", [{"action": "dear"}, {"action": ..., "allowed_actions": ["dear", "failover"]}]
)
async def test_a_ceiling_below_the_hold_of_an_action_is_refused_with_the_least_amount(
    house: House, terms: dict[str, Any], members: dict[str, Any]
) -> None:
    dear = ActionPolicy(risk=RiskClass.LOW, hold=500_001)
    house.adopt(replace(POLICIES, actions={**POLICIES.actions, "dear": dear}))
    body = assert_problem(await house.ask_for_scope(**members, **terms), 422, "invalid_scope")
    assert (body["member"], body["min_cost_usd"]) == ("max_cost_usd", 0.500001)
    assert body["errors"] == [
        {
            "member": "/max_cost_usd",
            "problem": "must be at least 0.500001, because an execution of 'dear' holds that amount",
        }
    ]
    record = await house.record(body["decision_id"])
    assert record["decision_inputs"]["policy_id"] == "scope_grant"
    assert (record["decision_outcome"], record["decision_reason"]) == ("blocked", "invalid_scope")
    details = record["details"]
    assert (details["min_cost_usd"], details["max_cost_usd"]) == (0.500001, terms.get("max_cost_usd", 0.5))
    assert (await house.scopes())["total"] == 0
    scope = await house.issue(**members, max_cost_usd=body["min_cost_usd"])
    assert (await house.execute(scope, action="dear")).status == 200


async def test_a_default_that_a_rule_lowers_below_the_hold_is_refused_with_the_rule(house: House) -> None:
    frugal = Rule(id="frugal", on="issue", limit=Limit(max_cost=99_999))
    house.adopt(replace(POLICIES, rules=(frugal,)))
    body = assert_problem(await house.ask_for_scope(action="failover"), 422, "invalid_scope")
    assert (body["member"], body["min_cost_usd"]) == ("max_cost_usd", 0.1)
    assert "(rules that lowered it to 0.099999: frugal)" in body["message"]
    assert_problem(await house.ask_for_scope(action="failover", max_cost_usd=0.1), 403, "policy_denied")


@pytest.mark.parametrize(
    ("action", "allowed", "granted"),
    [("failover", ["retry_agent", "failover"], True), ("failover", ["retry_agent"], False)],
)
async def test_action_and_allowed_actions_together_must_agree(
    house: House, action: str, allowed: list[str], granted: bool
) -> None:
    answer = await house.ask_for_scope(action=action, allowed_actions=allowed)
    if granted:
        assert answer.status == 201
        assert set(answer.json()["allowed_actions"]) == set(allowed)
    else:
        assert_problem(answer, 422, "invalid_scope")


async def test_an_action_that_is_not_in_the_catalogue_is_denied(house: House) -> None:
    body = assert_problem(await house.ask_for_scope(action="rm_rf"), 403, "policy_denied")
    assert body["rules"] == []
    record = await house.record(body["decision_id"])
    assert (record["decision_outcome"], record["decision_reason"]) == ("policy_blocked", "policy_denied")
    assert record["details"]["rules"] == []


@pytest.mark.parametrize(
    ("headers", "body", "status", "error"),
    [
        ([("Content-Type", "text/plain")], b"{}", 415, "unsupported_media_type"),
        ([], b"{}", 415, "unsupported_media_type"),
        ([("Content-Type", "application/json")], b"[]", 400, "invalid_request"),
        ([("Content-Type", "application/json")], b'{"intent":"a","intent":"b"}', 400, "invalid_request"),
        ([("Content-Type", "application/json")], b'{"intent":"a"} x', 400, "invalid_request"),
        ([("Content-Type", "application/json")], b'{"max_cost_usd":1e999}', 400, "invalid_request"),
        ([("Content-Type", "application/json")], b" " * 1_048_577, 413, "body_too_large"),
    ],
)
async def test_its_body_is_read_as_strictly(
    house: House, headers: list[tuple[str, str]], body: bytes, status: int, error: str
) -> None:
    problem = assert_problem(await house.data("POST", SCOPE, headers, body), status, error)
    assert (await house.record(problem["decision_id"]))["decision_reason"] == error


async def test_limits_and_defaults_come_from_the_configuration(open_house: Open) -> None:
    house = await open_house(
        scopes={
            "defaults": {"max_attempts": 2, "ttl_seconds": 30, "max_cost_usd": 1},
            "limits": {"max_attempts": 2, "ttl_seconds": 90, "max_cost_usd": 1.5},
        }
    )
    granted = await house.issue()
    assert (granted["max_attempts"], granted["max_cost_usd"]) == (2, 1)
    beyond: list[tuple[str, Any]] = [("max_attempts", 3), ("ttl_seconds", 91), ("max_cost_usd", 1.500001)]
    for member, value in beyond:
        assert_problem(await house.ask_for_scope(**{member: value}), 422, "invalid_scope")


# Other methods and spellings ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "allow", "methods"),
    [
        (SCOPE, {"POST"}, ["GET", "PUT", "DELETE", "PATCH", "OPTIONS"]),
        (SCOPES + "inc_1", {"GET", "DELETE"}, ["POST", "PUT", "PATCH", "OPTIONS"]),
        (SCOPES + "inc_1?a=1", {"GET", "DELETE"}, ["POST"]),
    ],
)
async def test_other_methods_are_not_allowed(
    house: House, backend: Backend, path: str, allow: set[str], methods: list[str]
) -> None:
    for method in methods:
        answer = await house.data(method, path)
        assert_problem(answer, 405, "method_not_allowed")
        assert set((answer.header("Allow") or "").split(", ")) == allow
    head = await house.data("HEAD", path)
    assert (head.status, set((head.header("Allow") or "").split(", "))) == (405, allow)
    assert backend.seen == []


@pytest.mark.parametrize(
    "path",
    [
        SCOPE + "/",
        "/" + SCOPE,
        SCOPE.upper(),
        SCOPE.replace("v1", "%761"),
        SCOPE + ";x",
        "/v0/.." + SCOPE,
        SCOPES,
        SCOPES + "a/b",
        "/api/v1/recovery/scopes",
        "/api/v1/recovery/scopes//x",
        "/x" + SCOPE,
        SCOPE + "%20",
    ],
)
async def test_other_spellings_pass_through(house: House, backend: Backend, path: str) -> None:
    for method in ("GET", "POST", "DELETE"):
        assert (await house.data(method, path)).status == 200
        assert backend.seen[-1].target == path


async def test_scopes_may_be_served_on_the_admin_listener(open_house: Open) -> None:
    house = await open_house(scopes={"serve_on": "admin"})
    wanted = {"incident_id": "inc_1", "action": "retry_agent", "intent": "a test"}
    assert (await house.admin("POST", SCOPE, wanted)).status == 201
    granted = (await house.admin("POST", SCOPE, wanted)).json()
    listed = (await house.admin("GET", SCOPES + "inc_1?limit=1")).json()
    assert listed["total"] == 2
    assert (await house.execute(granted)).status == 200
    assert (await house.admin("DELETE", SCOPES + granted["scope_id"])).json()["success"] is True
    answer = await house.admin("PUT", SCOPES + "x")
    assert_problem(answer, 405, "method_not_allowed")
    seen = len(house.backend.seen)
    kind, body = as_json(wanted)
    assert (await house.data("POST", SCOPE, kind, body)).json() == {"done": True}
    assert (await house.data("GET", SCOPES + "inc_1")).json() == {"done": True}
    assert len(house.backend.seen) == seen + 2


async def test_on_the_data_listener_the_admin_listener_has_none(house: House) -> None:
    assert (await house.admin("POST", SCOPE, {})).status == 404


# Listing ------------------------------------------------------------------------------------------------


async def test_an_unknown_incident_has_an_empty_list(house: House) -> None:
    body = await house.scopes("inc_unknown")
    assert (body["incident_id"], body["scopes"], body["total"]) == ("inc_unknown", [], 0)


async def test_a_listed_scope_has_the_fields_of_to_dict(house: House) -> None:
    scope = await house.issue()
    listed = await house.scope(scope)
    assert set(listed) == {
        "scope_id",
        "incident_id",
        "allowed_actions",
        "max_cost_usd",
        "max_attempts",
        "expires_at",
        "intent",
        "target_agents",
        "created_at",
        "created_by",
        "attempts_used",
        "attempts_remaining",
        "cost_used_usd",
        "status",
    }


async def test_a_list_has_pages_and_the_full_count(house: House) -> None:
    ids = [(await house.issue(incident_id="inc p"))["scope_id"] for _ in range(5)]
    await house.issue()
    found: list[str] = []
    query = "?limit=2"
    while True:
        body = await house.scopes("inc%20p", query)
        assert (body["total"], body["incident_id"]) == (5, "inc p")
        found += [scope["scope_id"] for scope in body["scopes"]]
        if body["next"] is None:
            break
        query = f"?limit=2&before={body['next']}"
    assert found == ids[::-1]


@pytest.mark.parametrize(
    "query",
    [
        "?limit=0",
        "?limit=1001",
        "?limit=-1",
        "?limit=x",
        "?limit=",
        "?limit=1.0",
        "?limit=%D9%A3",
        "?limit=00000000100000",
        "?limit=" + "9" * 40,
        "?before=x",
        "?before=-1",
        "?before=" + "9" * 30,
    ],
)
async def test_a_wrong_page_is_refused(house: House, query: str) -> None:
    assert_problem(await house.data("GET", SCOPES + "inc_1" + query), 400, "invalid_request")


@pytest.mark.parametrize("name", ["%00", "a%0Ab", "%ff", "x" * 257])
async def test_a_name_that_is_no_id_is_refused(house: House, name: str) -> None:
    for method in ("GET", "DELETE"):
        assert_problem(await house.data(method, SCOPES + name), 400, "invalid_request")


# Revoking and statuses ----------------------------------------------------------------------------------


async def test_a_revocation_answers_and_is_recorded_each_time(house: House) -> None:
    scope = await house.issue()
    for _ in range(2):
        answer = await house.data("DELETE", SCOPES + scope["scope_id"], [("X-Request-Id", "mine")])
        assert answer.status == 200
        body = answer.json()
        assert body["success"] is True
        assert body["data"] == {"scope_id": scope["scope_id"], "status": "revoked"}
        assert body["meta"]["request_id"] == "mine"
        assert datetime.fromisoformat(body["meta"]["timestamp"])
    records = await house.records("&event=revoked")
    assert [record["scope_id"] for record in records] == [scope["scope_id"]] * 2
    assert {record["decision_inputs"]["policy_id"] for record in records} == {"scope_grant"}
    assert {record["details"]["policy_revision"] for record in records} == {"rev-1"}
    refused = await house.execute(scope)
    assert assert_problem(refused, 400, "scope_revoked")["scope_id"] == scope["scope_id"]


async def test_revoking_an_unknown_scope_is_not_found_and_recorded(house: House) -> None:
    body = assert_problem(await house.data("DELETE", SCOPES + "scope_none"), 404, "scope_not_found")
    assert body["scope_id"] == "scope_none"
    assert (await house.record(body["decision_id"]))["decision_inputs"]["policy_id"] == "scope_grant"


async def test_a_revocation_during_flight_lets_it_end_and_a_release_does_not_revive_it(
    house: House, backend: Backend
) -> None:
    scope = await house.issue(max_attempts=2)
    done = asyncio.Event()
    backend.script = replies(after=done)
    executing = asyncio.create_task(house.execute(scope))
    await backend.arrived.wait()
    await house.revoke(scope)
    assert (await house.scope(scope))["status"] == "revoked"
    done.set()
    assert (await executing).status == 200
    assert (await house.execute(scope)).json()["error"] == "scope_revoked"


async def test_an_exhausted_scope_is_revoked_unseen_until_its_attempt_is_released(
    house: House, backend: Backend
) -> None:
    backend.script = sends(then="reset")
    scope = await house.issue(max_attempts=1)
    lost = await house.execute(scope)
    assert (await house.revoke(scope)).json()["data"]["status"] == "revoked"
    assert (await house.scope(scope))["status"] == "exhausted"
    assert (await house.execute(scope)).json()["error"] == "scope_revoked"
    path = f"/api/v1/executions/{lost.json()['decision_id']}/reconcile"
    assert (await house.admin("POST", path, {"outcome": "not_executed"})).status == 200
    listed = await house.scope(scope)
    assert (listed["status"], listed["attempts_remaining"]) == ("revoked", 1)
    assert (await house.execute(scope)).json()["error"] == "scope_revoked"


async def test_an_expired_scope_lists_as_such_though_it_is_revoked_then(house: House) -> None:
    scope = await house.issue(ttl_seconds=60)
    house.clock.move(60)
    assert (await house.scope(scope))["status"] == "expired"
    body = assert_problem(await house.execute(scope), 400, "scope_expired")
    assert (body["scope_id"], body["expires_at"]) == (scope["scope_id"], scope["expires_at"])
    assert (await house.revoke(scope)).json()["data"]["status"] == "revoked"
    assert (await house.scope(scope))["status"] == "expired"
    assert (await house.execute(scope)).json()["error"] == "scope_revoked"


async def test_a_used_up_scope_that_is_asked_for_another_action_answers_the_action(house: House) -> None:
    scope = await house.issue()
    await house.execute(scope)
    assert (await house.scope(scope))["status"] == "exhausted"
    body = assert_problem(await house.execute(scope, action="failover"), 403, "action_outside_scope")
    assert (body["scope_id"], body["action"]) == (scope["scope_id"], "failover")
    body = assert_problem(await house.execute(scope, incident_id="inc_2"), 403, "incident_mismatch")
    assert (body["scope_id"], body["incident_id"]) == (scope["scope_id"], "inc_2")


# Tenants ------------------------------------------------------------------------------------------------


async def test_another_tenants_scope_does_not_exist(open_house: Open) -> None:
    house = await open_house(gate={"tenant_header": "X-Tenant"})
    one, two = [("X-Tenant", "one")], [("x-tenant", "two")]
    scope = await house.issue(headers=one)
    refused = await house.execute(scope, headers=two)
    body = assert_problem(refused, 404, "scope_not_found")
    assert body["scope_id"] == scope["scope_id"]
    assert (await house.record(body["decision_id"]))["tenant_id"] == "two"
    assert (await house.data("GET", SCOPES + "inc_1", two)).json()["total"] == 0
    assert (await house.data("GET", SCOPES + "inc_1", one)).json()["total"] == 1
    assert_problem(await house.data("DELETE", SCOPES + scope["scope_id"], two), 404, "scope_not_found")
    assert (await house.execute(scope, headers=one)).status == 200
    kind, document = house.execution(scope)
    told = await ask(house.sidecar.admin_address, "POST", "/api/v1/explain", [*kind, *two], document)
    assert (told.json()["error"], told.json()["scope"]) == ("scope_not_found", None)
    assert {record["tenant_id"] for record in await house.records("&tenant_id=one")} == {"one"}


@pytest.mark.parametrize("headers", [[], [("X-Tenant", "")], [("X-Tenant", "a"), ("X-Tenant", "b")]])
async def test_a_tenant_that_is_not_one_is_refused(open_house: Open, headers: list[tuple[str, str]]) -> None:
    house = await open_house(gate={"tenant_header": "X-Tenant"})
    scope = await house.issue(headers=[("X-Tenant", "a")])
    assert_problem(await house.execute(scope, headers=headers), 400, "invalid_request")
    assert_problem(await house.ask_for_scope(headers=headers), 400, "invalid_request")
    assert house.backend.seen == []


async def test_the_body_cannot_name_a_tenant_or_principal(house: House) -> None:
    answer = await house.execute(await house.issue(), tenant_id="other", principal="root")
    record = await house.record(answer.header("Scopegate-Decision-Id") or "")
    assert record["tenant_id"] == "default"
    assert record["decision_inputs"]["principal"] == "anonymous"


async def test_scopes_of_the_gated_path_are_not_the_sidecars_own(house: House, backend: Backend) -> None:
    assert (await house.data("GET", EXECUTE)).status == 200
    assert backend.seen[0].target == EXECUTE
