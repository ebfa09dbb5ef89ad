"""Floods of refusals and of requests: counted, bounded, and no decision without a trace (G5)."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from sidecar.core.policy import ActionPolicy, RiskClass
from sidecar.gate import floods
from tests.client import Connection, Message, as_json, connect, request_bytes
from tests.support import EXECUTE, POLICIES, Backend, House, Open, eventually, replies


async def flood(house: House, count: int, body: bytes, *, connections: int = 100) -> list[Message]:
    """Many requests at once over keep-alive connections."""
    kind, _ = as_json(None)

    async def one(share: int) -> list[Message]:
        with Connection(house.sidecar.data_address) as connection:
            return [await connection.ask("POST", EXECUTE, kind, body) for _ in range(share)]

    shares = await asyncio.gather(*(one(count // connections) for _ in range(connections)))
    return [answer for share in shares for answer in share]


def counted(records: list[dict[str, Any]]) -> int:
    return sum(record["details"].get("count", 1) for record in records)


@pytest.mark.parametrize("judged", [True, False])
async def test_beyond_the_limit_refusals_are_counted_in_summaries_whose_ids_are_found(
    house: House, backend: Backend, judged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(floods, "PER_SECOND", 0.0)
    _, body = house.execution(None, scope_id="scope_none") if judged else as_json([1])
    answers = await flood(house, 1500, body)
    assert Counter(answer.status for answer in answers) == {404 if judged else 400: 1500}
    ids = Counter(answer.json()["decision_id"] for answer in answers)
    records = {record["decision_id"]: record for record in await house.records("&event=refused")}
    assert set(ids) == set(records)
    assert counted(list(records.values())) == 1500
    for decision_id, times in ids.items():
        assert records[decision_id]["details"].get("count", 1) == times
    singles = sum(times == 1 for times in ids.values())
    assert singles >= floods.BURST
    summaries = [record for record in records.values() if "count" in record["details"]]
    assert summaries
    for summary in summaries:
        assert summary["decision_reason"] == ("scope_not_found" if judged else "invalid_request")
        if judged:
            assert summary["details"]["subjects"] == ["scope_none"]
    for decision_id in list(ids)[:3] + [summary["decision_id"] for summary in summaries]:
        assert (await house.record(decision_id))["decision_id"] == decision_id
    reason = "scope_not_found" if judged else "invalid_request"
    action = "retry_agent" if judged else "none"
    assert (
        await house.metric(
            f'scopegate_decisions_total{{action="{action}",outcome="blocked",reason="{reason}",route="**/recovery/execute"}}'
        )
        == 1500
    )
    assert backend.seen == []


async def test_a_summary_keeps_kinds_bounds_and_tenants_apart(
    open_house: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(floods, "BURST", 0)
    house = await open_house(gate={"tenant_header": "X-Tenant"})
    one, two = [("X-Tenant", "one")], [("X-Tenant", "two")]
    attempts = await house.issue(headers=one)
    await house.execute(attempts, headers=one)
    cost = await house.issue(headers=one, action="failover", max_cost_usd=0.1)
    failover = ActionPolicy(risk=RiskClass.HIGH, hold=100_001)  # more than the scope was granted for
    house.adopt(replace(POLICIES, actions={**POLICIES.actions, "failover": failover}))
    answers = await asyncio.gather(
        *(house.execute(attempts, headers=one) for _ in range(3)),
        *(house.execute(cost, headers=one) for _ in range(2)),
        *(house.execute(attempts, headers=two) for _ in range(2)),
    )
    records = [await house.record(decision_id) for decision_id in {a.json()["decision_id"] for a in answers}]
    told = {
        (record["tenant_id"], record["decision_reason"], record["details"].get("bound")): record["details"][
            "count"
        ]
        for record in records
    }
    assert told == {
        ("one", "scope_exhausted", "max_attempts"): 3,
        ("one", "scope_exhausted", "max_cost_usd"): 2,
        ("two", "scope_not_found", None): 2,
    }


async def test_a_refusal_alone_in_its_summary_is_recorded_in_full(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(house.sidecar.gate.refusals._allowance, "left", 0.0)
    monkeypatch.setattr(floods, "PER_SECOND", 0.0)
    answer = await house.execute(None, scope_id="scope_none", incident_id="inc_7")
    record = await house.record(answer.json()["decision_id"])
    assert record["incident_id"] == "inc_7"
    assert "count" not in record["details"]


async def test_a_client_that_leaves_a_flood_is_counted_all_the_same(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(house.sidecar.gate.refusals._allowance, "left", 0.0)
    monkeypatch.setattr(floods, "PER_SECOND", 0.0)
    monkeypatch.setattr(floods, "SUMMARY_SECONDS", 1.0)
    kind, body = house.execution(None, scope_id="scope_none")
    leaver = await connect(house.sidecar.data_address)
    leaver[1].write(request_bytes("POST", EXECUTE, kind, body))
    await leaver[1].drain()
    await eventually(lambda: bool(house.sidecar.gate.refusals._summaries.open))
    leaver[1].transport.abort()
    answer = await house.execute(None, scope_id="scope_none")
    assert (await house.record(answer.json()["decision_id"]))["details"]["count"] == 2


# Too many in flight -------------------------------------------------------------------------------------


async def test_beyond_max_in_flight_a_request_is_overloaded_and_recorded(open_house: Open) -> None:
    house = await open_house(gate={"max_in_flight": 2})
    done = asyncio.Event()
    house.backend.script = replies(after=done)
    scope = await house.issue(max_attempts=5)
    executing = [asyncio.create_task(house.execute(scope)) for _ in range(2)]
    while len(house.backend.seen) < 2:
        await asyncio.sleep(0.005)
    answer = await house.execute(scope)
    assert (answer.status, answer.json()["error"]) == (503, "overloaded")
    assert answer.header("Retry-After")
    record = await house.record(answer.json()["decision_id"])
    assert record["decision_outcome"] == "policy_unavailable"
    assert (await house.data("GET", "/elsewhere-too", [])).status == 200 if done.is_set() else True
    done.set()
    assert [each.status for each in await asyncio.gather(*executing)] == [200, 200]
    assert (await house.execute(scope)).status == 200
    assert (await house.scope(scope))["attempts_used"] == 3


async def test_a_flood_of_refusals_does_not_crowd_out_what_would_be_admitted(
    open_house: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refusal that waits for its summary is no longer in flight: it has been judged."""
    monkeypatch.setattr(floods, "PER_SECOND", 0.0)
    house = await open_house(gate={"max_in_flight": 10})
    monkeypatch.setattr(house.sidecar.gate.refusals._allowance, "left", 0.0)
    scope = await house.issue()
    flooding = [asyncio.create_task(house.execute(None, scope_id="scope_none")) for _ in range(10)]
    await asyncio.sleep(0.1)
    answer = await house.execute(scope)
    await asyncio.gather(*flooding)
    assert answer.status == 200, answer.body
