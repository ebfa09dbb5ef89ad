"""A route in shadow mode refuses nothing for what a client sent, only what it cannot record (policies.md)."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from sidecar.core.policy import Rule
from tests.client import Message, connect, read_message, request_bytes
from tests.support import EXECUTE, POLICIES, House, Open, replies, unused_port

SHADOW = {"routes": [{"path": "**/recovery/execute", "mode": "shadow"}]}
JSON = [("Content-Type", "application/json")]


@pytest.fixture
async def house(open_house: Open) -> House:
    return await open_house(gate=SHADOW)


async def only_record(house: House) -> dict[str, Any]:
    (record,) = await house.records("&event=admitted")
    return record


def seen(house: House) -> Message:
    (message,) = house.backend.seen
    return message


async def test_without_a_scope_it_goes_through_consumes_nothing_and_is_recorded(house: House) -> None:
    answer = await house.execute(None)
    assert (answer.status, answer.json()) == (200, {"done": True})
    assert answer.header("Scopegate-Scope-Status") is None
    assert seen(house).header("Scopegate-Scope-Id") is None
    assert seen(house).header("Scopegate-Attempt-Number") is None
    decision = answer.header("Scopegate-Decision-Id")
    assert seen(house).header("Scopegate-Decision-Id") == decision
    record = await house.record(decision or "")
    assert (record["event"], record["decision_outcome"], record["decision_reason"]) == (
        "admitted",
        "selected",
        None,
    )
    (would,) = record["details"]["would_refuse"]
    assert would["error"] == "scoped_execution_required"
    assert record["execution"]["status"] == "answered"
    assert record["execution"]["scope_id"] is record["execution"]["attempt_number"] is None
    line = 'scopegate_shadow_refusals_total{reason="scoped_execution_required",rule=""}'
    assert await house.metric(line) == 1


async def test_a_valid_scope_is_consumed_as_ever(house: House) -> None:
    scope = await house.issue()
    answer = await house.execute(scope)
    assert answer.status == 200
    assert seen(house).header("Scopegate-Scope-Id") == scope["scope_id"]
    assert (await house.scope(scope))["status"] == "exhausted"
    assert "would_refuse" not in (await only_record(house))["details"]


async def test_a_used_up_scope_lets_through_without_being_overdrawn(house: House) -> None:
    scope = await house.issue()
    await house.execute(scope)
    answer = await house.execute(scope)
    assert answer.status == 200
    assert (await house.scope(scope))["attempts_used"] == 1
    record = await house.record(answer.header("Scopegate-Decision-Id") or "")
    assert record["details"]["would_refuse"][0]["error"] == "scope_exhausted"
    assert record["scope_id"] is None


async def test_a_rule_refuses_nothing_on_it_either_and_the_scope_is_consumed(house: House) -> None:
    scope = await house.issue()
    house.adopt(replace(POLICIES, rules=(Rule(id="freeze", on="execute", deny=True),)))
    answer = await house.execute(scope)
    assert answer.status == 200
    assert (await house.scope(scope))["status"] == "exhausted"
    record = await house.record(answer.header("Scopegate-Decision-Id") or "")
    assert [(one["rule"], one["error"]) for one in record["details"]["would_refuse"]] == [
        ("freeze", "policy_denied")
    ]


UNREADABLE: dict[str, tuple[str, str, list[tuple[str, str]], bytes]] = {
    "invalid_request": ("POST", EXECUTE, JSON, b'{"scope_id": 7}'),
    "unsupported_media_type": ("POST", EXECUTE, [("Content-Type", "text/plain")], b"restart it"),
    "method_not_allowed": ("PUT", EXECUTE, JSON, b"{}"),
    "ambiguous_path": ("POST", "/api/v1/recovery/./execute", JSON, b"{}"),
    "override_refused": ("POST", EXECUTE, [*JSON, ("X-HTTP-Method-Override", "DELETE")], b"{}"),
    "body_too_large": ("POST", EXECUTE, JSON, b'{"a": "' + b"x" * 5000 + b'"}'),
    "scoped_execution_required": ("POST", EXECUTE, JSON, b'{"action": "retry_agent"}'),
}


@pytest.mark.parametrize("code", UNREADABLE)
async def test_what_cannot_be_judged_arrives_byte_for_byte_once_it_is_recorded(
    open_house: Open, code: str
) -> None:
    house = await open_house(gate={**SHADOW, "max_body_bytes": 1000})
    method, target, headers, body = UNREADABLE[code]
    forged = [("Scopegate-Scope-Id", "scope_forged"), ("Scopegate_Decision_Id", "forged")]
    answer = await house.data(method, target, [*headers, *forged], body)
    assert answer.status == 200
    arrived = seen(house)
    assert (arrived.method, arrived.target, arrived.body) == (method, target, body)
    decision = answer.header("Scopegate-Decision-Id")
    assert arrived.headers("Scopegate-Decision-Id") == [decision]
    assert arrived.header("Scopegate-Scope-Id") is arrived.header("Scopegate_Decision_Id") is None
    record = await only_record(house)
    assert record["decision_id"] == decision
    (would,) = record["details"]["would_refuse"]
    assert would["error"] == code


async def test_a_body_that_comes_slowly_is_let_through_to_its_end(open_house: Open) -> None:
    house = await open_house(gate={**SHADOW, "body_timeout_seconds": 0.1})
    reader, writer = await connect(house.sidecar.data_address)
    writer.write(request_bytes("POST", EXECUTE, [*JSON, ("Content-Length", "20")], b"0123456789"))
    await asyncio.sleep(0.3)
    writer.write(b"abcdefghij")
    answer = await read_message(reader)
    writer.close()
    assert answer is not None
    assert answer.status == 200
    assert seen(house).body == b"0123456789abcdefghij"
    assert (await only_record(house))["details"]["would_refuse"][0]["error"] == "body_timeout"


async def test_a_client_that_waits_for_100_continue_is_told_once(house: House) -> None:
    reader, writer = await connect(house.sidecar.data_address)
    headers = [("Content-Type", "text/plain"), ("Expect", "100-continue"), ("Content-Length", "2")]
    writer.write(request_bytes("POST", EXECUTE, headers, b""))
    assert await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5) == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(b"hi")
    answer = await reader.readuntil(b"\r\n\r\n")
    writer.close()
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert seen(house).body == b"hi"


async def test_what_cannot_be_recorded_is_refused(house: House) -> None:
    house.database.unlink()
    for body in (b'{"scope_id": 7}', b'{"incident_id": "inc_1", "action": "retry_agent"}'):
        answer = await house.data("POST", EXECUTE, JSON, body)
        assert (answer.status, answer.json()["error"]) == (503, "store_unavailable")
    assert house.backend.seen == []


async def test_without_policies_it_refuses_as_ever(open_house: Open) -> None:
    house = await open_house(gate=SHADOW, policies=None)
    assert (await house.execute(None)).status == 503
    assert (await house.data("PUT", EXECUTE, JSON, b"{}")).status == 503
    assert house.backend.seen == []


async def test_while_it_drains_it_refuses_as_ever(house: House) -> None:
    house.sidecar.gate.draining = True
    assert (await house.execute(None)).status == 503
    assert (await house.data("PUT", EXECUTE, JSON, b"{}")).status == 503


async def test_nothing_that_a_client_sends_chooses_it(open_house: Open) -> None:
    """A path that an enforced route matches in any reading is enforced, whatever shadow route it spells."""
    routes = [
        {"path": ["/trial/recovery/execute", "/x/trial/recovery/execute"], "mode": "shadow"},
        {"path": "**/recovery/execute", "mode": "enforce"},
    ]
    house = await open_house(gate={"routes": routes})
    for target in ("/trial/recovery/execute", "/x/trial/recovery/execute", "/recovery/execute"):
        assert (await house.execute(None, target=target)).status == 400
    assert (await house.execute(None, target="/trial/recovery/./execute")).status == 400
    assert house.backend.seen == []


async def test_two_routes_each_have_their_mode(open_house: Open) -> None:
    routes = [{"path": "/pilot/run", "mode": "shadow"}, {"path": "/run"}]
    house = await open_house(gate={"routes": routes})
    assert (await house.execute(None, target="/pilot/run")).status == 200
    assert (await house.execute(None, target="/pilot//run")).status == 200
    refused = await house.execute(None, target="/run")
    assert (refused.status, refused.json()["error"]) == (400, "scoped_execution_required")
    refused = await house.execute(None, target="//run")
    assert refused.status == 400
    assert len(house.backend.seen) == 2


async def test_a_lost_answer_of_one_without_a_scope_is_unknown_and_can_be_reconciled(house: House) -> None:
    house.backend.script = replies(after=asyncio.Event())
    answer = await house.execute(None, action="patient")
    assert answer.status == 504
    decision = answer.header("Scopegate-Decision-Id") or ""
    assert (await house.ended(decision))["status"] == "unknown"
    reconciled = await house.admin(
        "POST", f"/api/v1/executions/{decision}/reconcile", {"outcome": "executed"}
    )
    assert (reconciled.status, reconciled.json()["status"]) == (200, "executed")


async def test_a_raised_threshold_lets_a_low_risk_through_recorded_and_held_to_rules(
    open_house: Open,
) -> None:
    house = await open_house(gate={"scope_required_from": "medium"})
    answer = await house.execute(None)
    assert answer.status == 200
    record = await house.record(answer.header("Scopegate-Decision-Id") or "")
    assert record["details"]["scope_waived"]
    assert record["execution"]["status"] == "answered"
    high = await house.execute(None, action="failover")
    assert (high.status, high.json()["error"]) == (400, "scoped_execution_required")
    unlisted = await house.execute(None, action="format_disk")
    assert unlisted.json()["error"] == "scoped_execution_required"
    nobody = await house.execute(None, incident_id=...)
    assert (nobody.status, nobody.json()["error"]) == (400, "invalid_request")
    named = await house.execute(None, scope_id="scope_none")
    assert named.json()["error"] == "scope_not_found"
    house.adopt(replace(POLICIES, rules=(Rule(id="freeze", on="execute", deny=True),)))
    assert (await house.execute(None)).json()["rules"] == ["freeze"]
    status = (await house.admin("GET", "/api/v1/status")).json()
    assert status["scope_required_from"] == "medium"


async def test_the_status_names_the_routes_in_shadow(house: House) -> None:
    status = (await house.admin("GET", "/api/v1/status")).json()
    assert status["shadow_routes"] == ["**/recovery/execute"]


@pytest.mark.parametrize(("enforced", "warned"), [("/run", [["/pilot/run"]]), ("**/run", [])])
async def test_only_routes_that_refuse_nothing_are_warned_of(
    open_house: Open, caplog: pytest.LogCaptureFixture, enforced: str, warned: list[list[str]]
) -> None:
    await open_house(gate={"routes": [{"path": "/pilot/run", "mode": "shadow"}, {"path": enforced}]})
    told = [vars(line)["routes"] for line in caplog.records if "shadow" in line.getMessage()]
    assert told == warned


async def test_the_body_of_a_let_through_request_may_be_streamed(open_house: Open) -> None:
    house = await open_house(gate={**SHADOW, "max_body_bytes": 100})
    reader, writer = await connect(house.sidecar.data_address)
    headers = [*JSON, ("Transfer-Encoding", "chunked")]
    writer.write(request_bytes("POST", EXECUTE, headers, None))
    for _ in range(50):
        writer.write(b"a\r\n0123456789\r\n")
        await writer.drain()
    writer.write(b"0\r\n\r\n")
    answer = await read_message(reader)
    writer.close()
    assert answer is not None
    assert answer.status == 200
    assert seen(house).body == b"0123456789" * 50


async def test_explain_says_what_would_be_let_through_and_why_it_would_not(house: House) -> None:
    for members, code in (
        ({}, "scoped_execution_required"),
        ({"scope_id": 7}, "invalid_request"),
        ({"action": ...}, "scoped_execution_required"),
    ):
        told = await house.explain(None, **members)
        assert (told["allowed"], told["error"]) == (True, None)
        assert [one["error"] for one in told["would_refuse"]] == [code]


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ([("Content-Type", "text/plain"), ("Transfer-Encoding", "gzip, chunked")], "invalid_request"),
        ([("Connection", "Upgrade"), ("Upgrade", "websocket"), ("Content-Length", "0")], "upgrade_refused"),
    ],
)
async def test_what_could_not_be_carried_is_refused_and_not_recorded_as_let_through(
    house: House, headers: list[tuple[str, str]], code: str
) -> None:
    answer = await house.data("POST", EXECUTE, headers, b"0\r\n\r\n" if code == "invalid_request" else b"")
    assert answer.status == 400
    assert house.backend.seen == []
    assert await house.records("&event=admitted") == []
    if answer.header("Scopegate-Decision-Id"):
        assert answer.json()["error"] == code


async def test_an_answer_that_failed_names_the_decision_under_which_it_was_let_through(
    open_house: Open,
) -> None:
    house = await open_house(gate=SHADOW, upstream_port=unused_port())
    answer = await house.data("POST", EXECUTE, JSON, b"no json")
    assert (answer.status, answer.json()["error"]) == (502, "upstream_unreachable")
    assert answer.json()["decision_id"] == (await only_record(house))["decision_id"]
