"""Every preset before a stub of its interface: what is gated and by which facts, and what passes untouched.

The cases stand in `tests/cases/presets`, one file for each preset.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from sidecar.policies.files import load
from sidecar.settings.presets import NAMES
from sidecar.settings.routes import routes_of_preset
from tests.cases import load_cases
from tests.client import Message, ask
from tests.interfaces import (
    INCIDENT,
    POLICIES,
    SCOPE,
    Call,
    arrives_and_is_recorded,
    is_refused_without_a_scope_of_its_own,
    stub,
    through,
)
from tests.support import House, opened, serving_backend

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
    assert not failed, "\n".join(failed)


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


# Reads that are POST ------------------------------------------------------------------------------------

CATALOGUE = """
actions:
  "AmazonSSM.Get*": {risk: low}
  "AmazonSSM.Describe*": {risk: low}
  "AmazonSSM.*": {risk: high}
"""


async def test_reads_of_aws_are_told_by_the_catalogue_and_need_no_scope(tmp_path: Path) -> None:
    (tmp_path / "policies").mkdir()
    (tmp_path / "policies" / "actions.yaml").write_text(CATALOGUE, encoding="utf-8")
    gate = {"presets": ["aws-ssm"], "routes": [], "scope_required_from": "medium"}

    async def call(house: House, operation: str, *more: tuple[str, str]) -> Message:
        kind = ("Content-Type", "application/x-amz-json-1.1")
        target = ("X-Amz-Target", f"AmazonSSM.{operation}")
        return await house.data("POST", "/", [kind, target, *more], b"{}")

    async with serving_backend() as backend:
        backend.script = stub(CASES["aws-ssm"]["interface"])
        async with opened(tmp_path, backend, policies=load(tmp_path / "policies"), gate=gate) as house:
            read = await call(house, "DescribeInstanceInformation", (INCIDENT, "inc_1"))
            assert read.status == 200
            record = await house.record(read.header("Scopegate-Decision-Id") or "")
            assert (record["action"], record["scope_id"]) == ("AmazonSSM.DescribeInstanceInformation", None)
            refused = await call(house, "SendCommand", (INCIDENT, "inc_1"))
            assert refused.json()["error"] == "scoped_execution_required"
            unnamed = await call(house, "DescribeInstanceInformation")
            assert (unnamed.status, unnamed.json()["member"]) == (400, "incident_id")
            assert [message.header("X-Amz-Target") for message in backend.seen] == [
                "AmazonSSM.DescribeInstanceInformation"
            ]
