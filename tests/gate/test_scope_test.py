"""`POST /api/v1/recovery/candidates/{id}/scope-test`: says what an action would do, and does nothing."""

from __future__ import annotations

from typing import Any

import pytest

from sidecar.scoped_execution import test_recovery_scope
from tests.client import Message, as_json
from tests.gate.test_scope_api import assert_problem
from tests.support import Backend, House, Open

PREFIX = "/api/v1/recovery/candidates/"
PATH = PREFIX + "cand-1/scope-test"


async def tried(house: House, path: str = PATH, **members: Any) -> Message:
    """A dry run of a retry of low risk unless told otherwise; ... leaves out."""
    wanted = {"action_type": "retry", "risk_class": "low", **members}
    kind, body = as_json({name: value for name, value in wanted.items() if value is not ...})
    return await house.data("POST", path, kind, body)


async def test_by_default_it_is_a_dry_run(house: House) -> None:
    answer = await house.data(
        "POST",
        PATH,
        [*as_json(0)[0], ("X-Request-Id", "mine")],
        as_json({"action_type": "scale", "risk_class": "medium"})[1],
    )
    assert (answer.status, answer.header("Content-Type")) == (200, "application/json")
    assert answer.header("X-Request-Id") == "mine"
    told = answer.json()
    assert 0 <= told.pop("duration_ms") < 1_000
    assert told == {
        "success": True,
        "cost_delta_cents": 100,
        "failure_count": 0,
        "policy_violations": [],
        "execution_hash": "cfaae56e43dcadd0",
        "scope_coverage": 0.0,
        "samples_tested": 0,
        "details": {"mode": "dry_run", "estimated_cost_cents": 100, "risk_class": "medium"},
        "risk_class": "medium",
        "scope_type": "dry_run",
    }


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"action_type": ""},
        {"risk_class": "critical"},
        {"risk_class": "critical", "parameters": {"target_agents": ["a"], "depth": 2}},
        {"scope_type": "agent_subset"},
        {"scope_type": "request_sample", "scope_fraction": 0.25, "action_name": "retry_agent"},
        {"scope_type": "budget_fraction", "scope_fraction": 1},
        {"scope_type": "agent_subset", "scope_fraction": -3},
        {"scope_type": "agent_subset", "scope_fraction": 1e300},
        {"parameters": {"target_agents": None}},
    ],
)
async def test_it_answers_what_the_library_answers(house: House, asked: dict[str, Any]) -> None:
    answer = await tried(house, **asked)
    assert answer.status == 200, answer.body
    library = await test_recovery_scope(
        **{
            "action_id": "cand-1",
            "action_name": "unregistered",
            "action_type": "retry",
            "risk_class": "low",
            "parameters": {},
            **asked,
        }
    )
    told = answer.json()
    assert list(told) == list(library)
    assert {**told, "duration_ms": 0} == {**library, "duration_ms": 0}


async def test_nothing_is_consumed_recorded_or_sent(house: House, backend: Backend) -> None:
    scope = await house.issue()
    before = await house.records()
    for scope_type in ("dry_run", "agent_subset"):
        assert (await tried(house, action_name="retry_agent", scope_type=scope_type)).status == 200
    assert_problem(await tried(house, risk_class="extreme"), 400, "invalid_request")
    assert await house.records() == before
    assert (await house.scope(scope))["attempts_used"] == 0
    assert backend.seen == []


async def test_it_needs_no_store(house: House) -> None:
    house.database.rename(house.database.with_suffix(".moved"))
    assert (await tried(house)).status == 200


WRONG: dict[str, list[Any]] = {
    "action_type": [..., None, 7, ["retry"]],
    "risk_class": [..., None, "", "extreme", "HIGH", 7],
    "action_name": [None, "", 7, "a\nb", "x" * 257],
    "parameters": [None, "", [], 7],
    "parameters/target_agents": ["a", ["a", 7], [""], {}, 7],
    "scope_type": [None, "", "everything", 7],
    "scope_fraction": [None, "", "0.1", True, [0.1]],
    "surprise": [1],
    "action_id": ["mine"],
    "Risk_Class": ["low"],
}


@pytest.mark.parametrize(
    ("member", "value"), [(member, value) for member, values in WRONG.items() for value in values]
)
async def test_a_wrong_member_is_named(house: House, member: str, value: Any) -> None:
    first, _, inner = member.partition("/")
    wanted: dict[str, Any] = {first: {inner: value} if inner else value}
    body = assert_problem(await tried(house, **wanted), 400, "invalid_request")
    assert body["member"] == member
    assert body["errors"][0]["member"] == f"/{member}"
    assert body["message"].startswith(f"{member} ")
    assert "decision_id" not in body


@pytest.mark.parametrize(
    ("headers", "body", "status", "error"),
    [
        ([("Content-Type", "text/plain")], b"{}", 415, "unsupported_media_type"),
        ([("Content-Type", "application/json")], b"[]", 400, "invalid_request"),
        (
            [("Content-Type", "application/json")],
            b'{"risk_class":"low","risk_class":"low"}',
            400,
            "invalid_request",
        ),
        ([("Content-Type", "application/json")], b'{"scope_fraction":NaN}', 400, "invalid_request"),
        ([("Content-Type", "application/json")], b" " * 1_048_577, 413, "body_too_large"),
    ],
)
async def test_its_body_is_read_strictly(
    house: House, headers: list[tuple[str, str]], body: bytes, status: int, error: str
) -> None:
    assert_problem(await house.data("POST", PATH, headers, body), status, error)


async def test_the_id_is_read_from_the_path(house: House) -> None:
    hashes = {
        (await tried(house, PREFIX + name + "/scope-test")).json()["execution_hash"]
        for name in ("cand-1", "%63and-1", "cand-2", "cand%202", "b%C3%A4r")
    }
    assert len(hashes) == 4


@pytest.mark.parametrize("name", ["%00", "a%0Ab", "%ff", "x" * 257])
async def test_a_name_that_is_no_id_is_refused(house: House, name: str) -> None:
    body = assert_problem(await tried(house, PREFIX + name + "/scope-test"), 400, "invalid_request")
    assert body["member"] == "id"


@pytest.mark.parametrize("path", [PATH, PATH + "?a=1"])
async def test_other_methods_are_not_allowed(house: House, backend: Backend, path: str) -> None:
    for method in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD"):
        answer = await house.data(method, path)
        assert (answer.status, answer.header("Allow")) == (405, "POST")
        if method != "HEAD":
            assert_problem(answer, 405, "method_not_allowed")
    assert backend.seen == []


async def test_a_query_changes_nothing(house: House) -> None:
    assert (await tried(house, PATH + "?risk_class=high")).json()["risk_class"] == "low"


@pytest.mark.parametrize(
    "path",
    [
        PATH + "/",
        "/" + PATH,
        PATH.upper(),
        PATH.replace("v1", "%761"),
        PATH.replace("scope-test", "scope%2Dtest"),
        PATH + ";x",
        PATH + "s",
        "/x" + PATH,
        PREFIX + "scope-test",
        PREFIX + "/scope-test",
        PREFIX + "a/b/scope-test",
        PREFIX + "cand-1",
        PREFIX + "cand-1/scope-test/more",
        "/api/v1/recovery/candidates",
    ],
)
async def test_other_spellings_pass_through(house: House, backend: Backend, path: str) -> None:
    for method in ("GET", "POST"):
        assert (await house.data(method, path)).status == 200
        assert backend.seen[-1].target == path


async def test_it_moves_to_the_admin_listener_with_the_scopes(open_house: Open) -> None:
    house = await open_house(scopes={"serve_on": "admin"})
    wanted = {"action_type": "retry", "risk_class": "low"}
    answer = await house.admin("POST", PATH, wanted)
    assert (answer.status, answer.json()["success"]) == (200, True)
    assert_problem(await house.admin("GET", PATH), 405, "method_not_allowed")
    for other in (PATH.replace("v1", "%761"), PREFIX + "a%2Fb/scope-test".replace("-", "%2D")):
        assert_problem(await house.admin("POST", other, wanted), 404, "not_found")
    assert (await tried(house)).json() == {"done": True}
    assert house.backend.seen[-1].target == PATH


async def test_on_the_data_listener_the_admin_listener_has_none(house: House) -> None:
    assert (await house.admin("POST", PATH, {})).status == 404


async def test_no_tenant_is_needed_for_what_belongs_to_nobody(open_house: Open) -> None:
    house = await open_house(gate={"tenant_header": "X-Tenant"})
    assert (await tried(house)).status == 200
