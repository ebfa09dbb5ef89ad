"""Every preset before a stub of its interface: what is gated and by which facts, and what passes untouched.

The cases stand in `tests/cases/presets`, one file for each preset.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from sidecar.core.policy import ActionPolicy, PolicySet, RiskClass
from sidecar.settings.presets import NAMES
from sidecar.settings.sections import routes_of_preset
from tests.cases import load_cases
from tests.client import Message, ask
from tests.interfaces import Call, stub
from tests.support import House, opened, serving_backend

POLICIES = PolicySet(revision="rev-1", actions={}, unlisted=ActionPolicy(risk=RiskClass.HIGH))
SCOPE, INCIDENT = "X-Recovery-Scope-Id", "X-Recovery-Incident-Id"
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding"}
CASES = {name: load_cases(f"presets/{name}") for name in NAMES}


@asynccontextmanager
async def before(name: str, folder: Path) -> AsyncIterator[House]:
    """A sidecar with one preset and no other route, before the stub of its interface."""
    async with serving_backend() as backend:
        backend.script = stub(CASES[name]["interface"])
        gate = {"presets": [name], "routes": []}
        async with opened(folder, backend, policies=POLICIES, gate=gate) as house:
            yield house


async def through(house: House, call: Call, *more: tuple[str, str]) -> Message:
    return await house.data(call.method, call.target, [*call.headers, *more], call.body)


def end_to_end(message: Message) -> list[tuple[str, str]]:
    return [(name, value) for name, value in message.raw_headers if name.lower() not in HOP_BY_HOP]


# What every preset promises -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_routes_of_a_preset_begin_with_its_name_and_read_scope_and_incident_from_headers(
    name: str,
) -> None:
    for route in routes_of_preset(name):
        assert route.name is not None
        assert route.name.startswith(f"{name}.")
        assert str(route.scope_id) == f"header:{SCOPE.lower()}"
        assert str(route.incident_id) == f"header:{INCIDENT.lower()}"


@pytest.mark.parametrize("name", NAMES)
def test_every_route_of_a_preset_has_a_call_that_must_be_gated(name: str) -> None:
    tried = {case["route"] for case in CASES[name]["gated"]}
    assert tried == {route.name for route in routes_of_preset(name)}


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_is_tried_with_a_status_by_which_nothing_was_executed(name: str) -> None:
    assert "not_executed" in {case.get("ends") for case in CASES[name]["gated"]}
    assert CASES[name]["neighbours"]


# Gated --------------------------------------------------------------------------------------------------


async def granted(house: House, call: Call, **other: Any) -> tuple[tuple[str, str], dict[str, Any]]:
    """The header of a scope for a call, and the scope."""
    agents = call.case.get("agents")
    wanted = {"action": call.case["action"], **({"target_agents": agents} if agents else {}), **other}
    scope = await house.issue(**wanted)
    return (SCOPE, scope["scope_id"]), scope


async def is_refused_without_a_scope_of_its_own(house: House, call: Call) -> None:
    at_inc_1 = (INCIDENT, "inc_1")
    mine, _ = await granted(house, call)
    of_another_action, _ = await granted(house, call, action="another.action")
    of_another_agent, _ = await granted(house, call, target_agents=["another-agent"])
    for headers, error in (
        ([at_inc_1], "scoped_execution_required"),
        ([at_inc_1, of_another_action], "action_outside_scope"),
        ([at_inc_1, of_another_agent], "target_outside_scope"),
        ([(INCIDENT, "inc_2"), mine], "incident_mismatch"),
        ([mine], "invalid_request"),
    ):
        refused = await through(house, call, *headers)
        if call.method == "HEAD":
            assert refused.status >= 400
        else:
            assert refused.json()["error"] == error, refused.body
            assert refused.json()["route"] == call.case["route"]
    assert house.backend.seen == []


async def arrives_and_is_recorded(house: House, call: Call) -> None:
    case = call.case
    mine, scope = await granted(house, call)
    answer = await through(house, call, mine, (INCIDENT, "inc_1"))
    assert answer.status == case["status"], answer.body
    (arrived,) = house.backend.seen
    assert (arrived.method, arrived.target) == (call.method, call.target)
    assert arrived.body == (call.body or b"")
    assert set(call.headers) <= set(arrived.raw_headers)

    decision_id = answer.header("Scopegate-Decision-Id")
    assert decision_id is not None
    record = await house.record(decision_id)
    inputs = record["decision_inputs"]
    assert record["details"]["route"] == case["route"]
    assert (record["scope_id"], record["incident_id"]) == (scope["scope_id"], "inc_1")
    assert record["action"] == case["action"]
    assert inputs["target_agents"] == case.get("agents", [])
    assert inputs.get("parameters") == case.get("parameters", inputs.get("parameters"))
    execution = await house.ended(decision_id)
    assert execution["status"] == case.get("ends", "answered")
    left = (await house.scope(scope))["attempts_remaining"]
    assert left == (1 if case.get("ends") == "not_executed" else 0)


@pytest.mark.parametrize("name", NAMES)
async def test_a_gated_call_needs_a_scope_for_its_action_and_target_and_arrives_as_it_was_sent(
    tmp_path: Path, name: str
) -> None:
    failed, routes = [], set[str]()
    async with before(name, tmp_path) as house:
        for call in map(Call.of, CASES[name]["gated"]):
            house.backend.seen.clear()
            try:
                if call.case["route"] not in routes:
                    routes.add(call.case["route"])
                    await is_refused_without_a_scope_of_its_own(house, call)
                await arrives_and_is_recorded(house, call)
            except AssertionError as exc:
                failed.append(f"{call}: {exc}")
    assert failed == []


@pytest.mark.parametrize("name", NAMES)
async def test_a_call_that_is_gated_but_not_clear_never_arrives(tmp_path: Path, name: str) -> None:
    found = []
    refused = [Call.of(case) for case in CASES[name]["refused"]]
    async with before(name, tmp_path) as house:
        scope = await house.issue(action="any.action")
        for call in refused:
            answer = await through(house, call, (SCOPE, scope["scope_id"]), (INCIDENT, "inc_1"))
            found.append((str(call), answer.json()["error"]))
        assert house.backend.seen == []
    assert found == [(str(call), call.case["error"]) for call in refused]


# Neighbours ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
async def test_neighbours_pass_byte_for_byte(tmp_path: Path, name: str) -> None:
    async with before(name, tmp_path) as house:
        for call in map(Call.of, CASES[name]["neighbours"]):
            headers = [("Host", "backend.example"), ("Accept", "*/*"), *call.headers]
            house.backend.seen.clear()
            direct = await ask(house.backend.address, call.method, call.target, headers, call.body)
            passed = await house.data(call.method, call.target, headers, call.body)
            assert len(house.backend.seen) == 2, f"{call}: {passed.body!r}"
            sent, arrived = house.backend.seen
            assert (arrived.first, arrived.body) == (sent.first, sent.body), call
            assert end_to_end(arrived) == end_to_end(sent), call
            answers = [(one.first, end_to_end(one), one.body) for one in (passed, direct)]
            assert answers[0] == answers[1], call
        assert await house.records() == []
