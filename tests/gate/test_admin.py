"""The admin and ops listeners: records, executions, reconciliation, status, readiness, metrics."""

from __future__ import annotations

import asyncio
import math
import re
import sqlite3
import threading
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import aiosqlite
import pytest

from sidecar.core.policy import ActionPolicy, PolicySet, RiskClass
from sidecar.store.connection import in_thread
from sidecar.store.sqlite import SqliteEngine
from tests.client import Message, ask
from tests.support import Backend, House, Open, opened, replies, sends


def assert_problem(answer: Message, status: int, error: str) -> dict[str, Any]:
    assert answer.status == status, answer.body
    assert answer.header("Content-Type") == "application/problem+json"
    body: dict[str, Any] = answer.json()
    assert (body["error"], body["status"]) == (error, status)
    return body


async def unknown_execution(house: House, **terms: Any) -> tuple[dict[str, Any], str]:
    """A scope of failover (hold 0.1) and the decision id of its execution whose answer was lost."""
    script, house.backend.script = house.backend.script, sends(then="reset")
    scope = await house.issue(**{"action": "failover", "max_cost_usd": 5, **terms})
    decision_id: str = (await house.execute(scope)).json()["decision_id"]
    house.backend.script = script
    return scope, decision_id


async def reconcile(house: House, decision_id: str, **document: Any) -> Message:
    return await house.admin("POST", f"/api/v1/executions/{decision_id}/reconcile", document)


def reader_of(house: House) -> aiosqlite.Connection:
    engine = house.sidecar.store.engine
    assert isinstance(engine, SqliteEngine)
    assert engine._reader is not None
    return engine._reader


async def stop_reading(house: House) -> None:
    """From now on the database refuses every read of its lists."""

    def refuse(connection: sqlite3.Connection) -> None:
        connection.set_authorizer(lambda *_: sqlite3.SQLITE_DENY)

    await in_thread(reader_of(house), refuse)


# Decisions ----------------------------------------------------------------------------------------------


async def test_a_record_is_shown_with_its_14_fields_and_its_envelopes(house: House) -> None:
    await house.execute(await house.issue())
    (record,) = await house.records("&event=admitted")
    assert {
        "decision_id",
        "decision_type",
        "decision_source",
        "decision_trigger",
        "decision_inputs",
        "decision_outcome",
        "decision_reason",
        "run_id",
        "workflow_id",
        "tenant_id",
        "request_id",
        "causal_role",
        "decided_at",
        "details",
        "writer",
        "seq",
        "origin",
        "event",
        "scope_id",
        "incident_id",
        "action",
    } <= set(record)


async def test_decisions_are_filtered(house: House) -> None:
    scope = await house.issue(incident_id="inc_a")
    await house.execute(scope, headers=[("X-Request-Id", "req-1")])
    await house.execute(scope, headers=[("X-Request-Id", "req-2")])
    await house.issue(incident_id="inc_b")
    for query, count in {
        "": 5,
        "&type=policy": 4,
        "&type=recovery": 1,
        "&outcome=blocked": 1,
        "&outcome=selected": 4,
        "&event=issued": 2,
        "&event=refused": 1,
        f"&scope_id={scope['scope_id']}": 4,
        "&incident_id=inc_a": 4,
        "&incident_id=inc_b": 1,
        "&request_id=req-1": 2,
        "&tenant_id=default": 5,
        "&tenant_id=none": 0,
        "&run_id=none": 0,
        "&type=policy&outcome=selected&incident_id=inc_a": 2,
        "&action=retry_agent": 3,
        "&action=none": 0,
        "&since=1970-01-01T00:00:00Z": 5,
        "&since=9999-01-01T00:00:00Z": 0,
        "&since=2000-01-01T02:00:00%2B02:00&action=retry_agent&event=refused": 1,
    }.items():
        assert len(await house.records(query)) == count, query


async def test_decisions_come_newest_first_in_pages(house: House) -> None:
    for _ in range(5):
        await house.execute(None)
    seqs: list[int] = []
    before = ""
    while True:
        page = (await house.admin("GET", f"/api/v1/decisions?limit=2{before}")).json()
        seqs += [record["seq"] for record in page["decisions"]]
        if page["next"] is None:
            break
        before = f"&before={page['next']}"
    assert seqs == [5, 4, 3, 2, 1]
    assert len((await house.admin("GET", "/api/v1/decisions")).json()["decisions"]) == 5


@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        "limit=1001",
        "limit=x",
        "limit=00000000100000",
        "before=x",
        "before=-1",
        "surprise=1",
        "limit=1&limit=2",
        "scope=x",
        "type=x",
        "type=",
        "outcome=Selected",
        "event=issue",
        "event=issued&event=issued",
        "since=1h",
        "since=2026-01-01T00:00:00",
        "since=",
    ],
)
async def test_a_wrong_query_is_refused(house: House, query: str) -> None:
    body = assert_problem(await house.admin("GET", f"/api/v1/decisions?{query}"), 400, "invalid_request")
    assert body["member"] == query.partition("=")[0]


@pytest.mark.parametrize("text", ["%ff", "%ED%A0%80", "%00", "x" * 1000, "';DROP"])
async def test_a_strange_filter_or_name_finds_nothing_and_breaks_nothing(house: House, text: str) -> None:
    answer = await house.admin("GET", f"/api/v1/decisions?scope_id={text}")
    assert answer.status in (200, 400)
    answer = await house.admin("GET", f"/api/v1/decisions/{text}")
    assert answer.status in (400, 404)
    assert answer.header("Content-Type") == "application/problem+json"


async def test_an_unknown_decision_is_not_found(house: House) -> None:
    assert_problem(await house.admin("GET", "/api/v1/decisions/none"), 404, "decision_not_found")


async def test_one_decision_comes_with_its_hash_link(house: House) -> None:
    first = (await house.execute(None)).json()["decision_id"]
    second = (await house.execute(None)).json()["decision_id"]
    one, two = await house.record(first), await house.record(second)
    assert one["previous_hash"] == "00" * 32
    assert two["previous_hash"] == one["hash"]
    assert (one["execution"], one["outcome"]) == (None, None)


async def test_other_paths_and_methods_are_problems(house: House) -> None:
    assert_problem(await house.admin("GET", "/nothing"), 404, "not_found")
    answer = await house.admin("DELETE", "/api/v1/decisions")
    assert_problem(answer, 405, "method_not_allowed")
    assert "GET" in (answer.header("Allow") or "")


# Scopes -------------------------------------------------------------------------------------------------


async def every_scope(house: House, query: str = "") -> list[dict[str, Any]]:
    """The scopes that a query finds, over pages of one."""
    found: list[dict[str, Any]] = []
    before = ""
    while True:
        answer = await house.admin("GET", f"/api/v1/scopes?limit=1{query}{before}")
        assert answer.status == 200, answer.body
        page = answer.json()
        found += page["scopes"]
        if page["next"] is None:
            return found
        before = f"&before={page['next']}"


async def test_scopes_of_all_incidents_and_tenants_are_listed_newest_first(open_house: Open) -> None:
    house = await open_house(gate={"tenant_header": "X-Tenant"})
    ids = [
        (await house.issue(incident_id=incident, headers=[("X-Tenant", tenant)]))["scope_id"]
        for incident, tenant in (("inc_1", "a"), ("inc_2", "a"), ("inc_1", "b"))
    ]
    for query, wanted in {
        "": ids[::-1],
        "&incident_id=inc_1": [ids[2], ids[0]],
        "&tenant_id=a": [ids[1], ids[0]],
        "&incident_id=inc_1&tenant_id=b": [ids[2]],
        "&tenant_id=none": [],
    }.items():
        assert [scope["scope_id"] for scope in await every_scope(house, query)] == wanted, query
    assert [scope["tenant_id"] for scope in await every_scope(house)] == ["b", "a", "a"]


async def test_scopes_are_filtered_by_the_status_that_they_have_now(house: House) -> None:
    brief = await house.issue(ttl_seconds=60)
    active, used, revoked = [await house.issue() for _ in range(3)]
    assert (await house.execute(used)).status == 200
    assert (await house.revoke(revoked)).status == 200
    assert len(await every_scope(house, "&status=active")) == 2
    house.clock.move(61)
    for status, scope in {"active": active, "exhausted": used, "expired": brief, "revoked": revoked}.items():
        (found,) = await every_scope(house, f"&status={status}")
        assert (found["scope_id"], found["status"]) == (scope["scope_id"], status)


async def test_one_scope_is_shown_with_its_executions(house: House) -> None:
    scope = await house.issue(max_attempts=3)
    ids = [(await house.execute(scope)).header("Scopegate-Decision-Id") for _ in range(2)]
    answer = await house.admin("GET", f"/api/v1/scopes/{scope['scope_id']}")
    assert answer.status == 200
    shown = answer.json()
    assert [execution["decision_id"] for execution in shown.pop("executions")] == ids
    assert shown == {**(await house.scope(scope)), "tenant_id": "default"}
    unknown = await house.admin("GET", "/api/v1/scopes/scope_unknown")
    assert assert_problem(unknown, 404, "scope_not_found")["scope_id"] == "scope_unknown"


async def test_looking_at_scopes_consumes_and_records_nothing(house: House) -> None:
    scope = await house.issue()
    records = await house.records()
    for path in ("/api/v1/scopes", "/api/v1/scopes?status=active", f"/api/v1/scopes/{scope['scope_id']}"):
        assert (await house.admin("GET", path)).status == 200
    assert await house.records() == records
    assert (await house.scope(scope))["attempts_remaining"] == 1


@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        "limit=1001",
        "before=x",
        "surprise=1",
        "status=lost",
        "status=",
        "status=active&status=active",
    ],
)
async def test_a_wrong_query_for_scopes_is_refused(house: House, query: str) -> None:
    body = assert_problem(await house.admin("GET", f"/api/v1/scopes?{query}"), 400, "invalid_request")
    assert body["member"] == query.partition("=")[0]


# Executions and reconciliation --------------------------------------------------------------------------


async def test_executions_are_listed_by_status(house: House) -> None:
    await house.execute(await house.issue())
    ids = [(await unknown_execution(house))[1] for _ in range(3)]
    listed = (await house.admin("GET", "/api/v1/executions?status=unknown&limit=2")).json()
    assert [each["decision_id"] for each in listed["executions"]] == ids[:0:-1]
    rest = (await house.admin("GET", f"/api/v1/executions?status=unknown&before={listed['next']}")).json()
    assert ([each["decision_id"] for each in rest["executions"]], rest["next"]) == (ids[:1], None)
    assert len((await house.admin("GET", "/api/v1/executions")).json()["executions"]) == 4
    assert len((await house.admin("GET", "/api/v1/executions?status=answered")).json()["executions"]) == 1
    for query in ("status=lost", "since=yesterday", "before=x&action=failover"):
        assert_problem(await house.admin("GET", f"/api/v1/executions?{query}"), 400, "invalid_request")


async def test_executions_are_filtered(house: House) -> None:
    await house.execute(await house.issue(action="retry_agent", incident_id="inc_a"))
    await unknown_execution(house)
    for query, count in {
        "action=retry_agent": 1,
        "action=failover&status=unknown": 1,
        "action=failover&status=answered": 0,
        "incident_id=inc_a": 1,
        "incident_id=inc_a&action=failover": 0,
        "since=1970-01-01T00:00:00Z": 2,
        "since=9999-01-01T00:00:00Z": 0,
        "incident_id=inc_a&since=9999-01-01T00:00:00Z": 0,
    }.items():
        listed = (await house.admin("GET", f"/api/v1/executions?{query}")).json()
        assert (len(listed["executions"]), listed["next"]) == (count, None), query


async def test_reconciled_as_executed_its_cost_replaces_the_hold(house: House) -> None:
    scope, decision_id = await unknown_execution(house, max_attempts=2)
    answer = await reconcile(house, decision_id, outcome="executed", cost_usd=0.04, reason="seen in the logs")
    assert answer.status == 200
    assert (answer.json()["status"], answer.json()["cost_usd"]) == ("executed", 0.04)
    listed = await house.scope(scope)
    assert (listed["attempts_used"], listed["cost_used_usd"], listed["status"]) == (1, 0.04, "active")
    (record,) = await house.records("&event=reconciled")
    assert (record["decision_type"], record["decision_outcome"]) == ("recovery", "selected")
    assert record["details"]["admission_id"] == decision_id
    assert "seen in the logs" in record["details"].values()


async def test_reconciled_as_executed_without_a_cost_it_costs_its_hold(house: House) -> None:
    scope, decision_id = await unknown_execution(house)
    assert (await reconcile(house, decision_id, outcome="executed")).json()["cost_usd"] == 0.1
    assert (await house.scope(scope))["cost_used_usd"] == 0.1


async def test_reconciled_as_not_executed_attempt_and_hold_come_back(house: House) -> None:
    scope, decision_id = await unknown_execution(house)
    assert (await reconcile(house, decision_id, outcome="not_executed")).status == 200
    listed = await house.scope(scope)
    assert (listed["attempts_used"], listed["cost_used_usd"], listed["status"]) == (0, 0, "active")
    (record,) = await house.records("&event=reconciled")
    assert record["decision_outcome"] == "none"
    assert (await house.execute(scope)).status == 200


async def test_a_reconciled_cost_above_the_hold_is_an_overrun_like_any_other(house: House) -> None:
    scope, decision_id = await unknown_execution(house, max_attempts=3)
    await reconcile(house, decision_id, outcome="executed", cost_usd=0.2)
    assert (await house.scope(scope))["status"] == "exhausted"
    assert (await house.records("&event=reconciled"))[0]["details"]["cost_overrun"] is True
    assert await house.metric("scopegate_cost_overruns_total") == 1


async def test_only_what_is_unknown_can_be_reconciled(house: House, backend: Backend) -> None:
    _, decision_id = await unknown_execution(house)
    await reconcile(house, decision_id, outcome="executed")
    for ended in (
        decision_id,
        (await house.execute(await house.issue())).header("Scopegate-Decision-Id") or "",
    ):
        assert_problem(await reconcile(house, ended, outcome="not_executed"), 409, "not_reconcilable")
    assert_problem(await reconcile(house, "none", outcome="executed"), 404, "decision_not_found")
    refused = (await house.execute(None)).json()["decision_id"]
    assert_problem(await reconcile(house, refused, outcome="executed"), 404, "decision_not_found")


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"outcome": "maybe"},
        {"outcome": None},
        {"outcome": "executed", "cost_usd": -1},
        {"outcome": "executed", "cost_usd": "1"},
        {"outcome": "executed", "cost_usd": True},
        {"outcome": "executed", "surprise": 1},
        {"outcome": "executed", "reason": 7},
        {"outcome": "executed", "reason": "x" * 2001},
        {"outcome": "executed", "reason": " "},
        {"outcome": "executed", "reason": "\u200b" * 20},
        {"outcome": "not_executed", "cost_usd": 1},
        [],
    ],
)
async def test_a_wrong_reconciliation_is_refused(house: House, document: object) -> None:
    _, decision_id = await unknown_execution(house)
    answer = await house.admin("POST", f"/api/v1/executions/{decision_id}/reconcile", document)
    assert_problem(answer, 400, "invalid_request")
    assert (await house.ended(decision_id))["status"] == "unknown"


@pytest.mark.parametrize("request_id", ["caf\xe9\xff", "x" * 300])
async def test_a_request_id_that_no_record_can_hold_does_no_harm(house: House, request_id: str) -> None:
    _, decision_id = await unknown_execution(house)
    path = f"/api/v1/executions/{decision_id}/reconcile"
    answer = await house.admin("POST", path, {"outcome": "executed"}, [("X-Request-Id", request_id)])
    assert answer.status == 200, answer.body


# Status, readiness, metrics -----------------------------------------------------------------------------


async def test_status_tells_versions_sizes_and_revisions(house: House) -> None:
    await unknown_execution(house)
    status = (await house.admin("GET", "/api/v1/status")).json()
    assert status["version"]
    assert status["uptime_seconds"] >= 0
    assert status["store"]["url"] == f"sqlite:///{house.database}"
    assert set(status["store"]) == {"url", "size", "wal_size", "free", "growth_per_day"}
    assert status["store"]["size"] > 0
    assert status["store"]["wal_size"] > 0
    assert status["store"]["free"] > 0
    assert status["policy_revision"] == "rev-1"
    assert status["config_revision"]
    assert status["last_reload"]["ok"] is True
    assert {"time", "errors"} <= set(status["last_reload"])


async def test_status_tells_whether_the_gate_is_ready_and_why_not(house: House) -> None:
    status = (await house.admin("GET", "/api/v1/status")).json()
    assert status["ready"] is True
    away = house.database.with_suffix(".away")
    house.database.rename(away)
    status = (await house.admin("GET", "/api/v1/status")).json()
    away.rename(house.database)
    assert status["ready"] is False
    assert {name for name, check in status["checks"].items() if not check["ok"]} == {"store", "log"}
    assert "moved" in status["checks"]["store"]["reason"]


async def test_who_reconciles_stands_in_the_record(house: House) -> None:
    _, decision_id = await unknown_execution(house)
    assert (await reconcile(house, decision_id, outcome="executed", reconciled_by="alice")).status == 200
    _, other = await unknown_execution(house)
    assert (await reconcile(house, other, outcome="executed")).status == 200
    without, record = await house.records("&event=reconciled")
    assert record["details"]["reconciled_by"] == "alice"
    assert "reconciled_by" not in without["details"]
    assert record["decision_inputs"]["principal"] == "anonymous"


async def test_the_root_of_admin_leads_to_the_documentation(house: House) -> None:
    answer = await house.admin("GET", "/")
    assert (answer.status, answer.header("Location")) == (308, "/docs")


async def test_status_answers_when_the_folder_of_the_store_is_gone(tmp_path: Path, backend: Backend) -> None:
    folder = tmp_path / "store"
    folder.mkdir()
    async with opened(folder, backend) as house:
        await unknown_execution(house)
        folder.rename(tmp_path / "away")
        answer = await house.admin("GET", "/api/v1/status")
        assert await house.ready() == (503, ANY)
        (tmp_path / "away").rename(folder)
    assert answer.status == 200
    told = answer.json()
    assert {told["store"][name] for name in ("size", "wal_size", "free")} == {None}
    # What was open stays readable.
    assert told["store"]["growth_per_day"] > 0
    assert told["unknown_executions"] == 1


async def test_status_and_metrics_answer_when_the_store_cannot_be_read(house: House) -> None:
    await unknown_execution(house)
    before = await house.metrics()
    await stop_reading(house)
    told = (await house.admin("GET", "/api/v1/status")).json()
    assert (told["unknown_executions"], told["oldest_unknown_admitted_at"]) == (None, None)
    assert told["store"]["growth_per_day"] is None
    assert told["store"]["size"] == house.database.stat().st_size
    # The last known values stand.
    for name in ("unknown_executions", "store_growth_bytes"):
        line = f"scopegate_{name} {await house.metric(f'scopegate_{name}')}"
        assert line in before


@pytest.mark.parametrize("place", ["status", "metrics"])
async def test_a_disk_that_hangs_keeps_nobody_waiting(open_house: Open, place: str) -> None:
    house = await open_house(store={"deadline_seconds": 0.2})
    go_on = threading.Event()
    hung = asyncio.create_task(in_thread(reader_of(house), lambda _: go_on.wait(10)))
    try:
        if place == "status":
            told = (await house.admin("GET", "/api/v1/status")).json()
            assert (told["unknown_executions"], told["store"]["size"]) == (None, None)
        else:
            assert math.isnan(await house.metric("scopegate_unknown_executions"))
        assert not hung.done()
    finally:
        go_on.set()
        await hung


async def test_growth_in_status_and_metrics_is_that_of_the_last_24_hours(house: House) -> None:
    async def grown() -> int:
        told: int = (await house.admin("GET", "/api/v1/status")).json()["store"]["growth_per_day"]
        assert await house.metric("scopegate_store_growth_bytes") == told
        return told

    assert await grown() == 0
    for _ in range(60):
        await house.execute(None, parameters={"note": "x" * 4_000})
    assert 60 * 4_000 < await grown() < 60 * 8_000
    house.clock.move(25 * 3_600)
    assert await grown() == 0


@pytest.mark.parametrize("serve_on", ["data", "admin"])
async def test_status_tells_where_it_listens_and_who_issues_scopes(open_house: Open, serve_on: str) -> None:
    house = await open_house(scopes={"serve_on": serve_on})
    status = (await house.admin("GET", "/api/v1/status")).json()
    assert status["scopes_served_on"] == serve_on
    assert status["listeners"] == {
        "data": str(house.sidecar.data_address),
        "admin": str(house.sidecar.admin_address),
        "ops": str(house.sidecar.ops_address),
    }
    assert "0" not in [address.rpartition(":")[2] for address in status["listeners"].values()]


async def test_uptime_is_counted_by_the_clock_of_the_house(house: House) -> None:
    house.clock.move(100)
    assert (await house.admin("GET", "/api/v1/status")).json()["uptime_seconds"] >= 100


async def test_it_is_alive_and_ready_without_a_backend(house: House) -> None:
    answer = await ask(house.sidecar.ops_address, "GET", "/health/live")
    assert answer.status == 200
    assert await house.ready() == (200, {})
    checks = (await ask(house.sidecar.ops_address, "GET", "/health/ready")).json()["checks"]
    assert set(checks) == {"store", "log", "policies", "clock", "draining"}
    assert house.backend.seen == []


async def test_the_ops_listener_serves_nothing_else(house: House) -> None:
    for path in ("/", "/api/v1/decisions", "/health", "/metrics/x"):
        assert (await ask(house.sidecar.ops_address, "GET", path)).status == 404


async def test_every_metric_is_there(house: House) -> None:
    page = await house.metrics()
    for name in (
        "decisions",
        "unrecorded_refusals",
        "executions",
        "cost_overruns",
        "judge_seconds",
        "commit_seconds",
        "upstream_seconds",
        "settle_seconds",
        "in_flight",
        "store_batch_size",
        "store_queue",
        "store_failures",
        "store_size_bytes",
        "store_wal_size_bytes",
        "store_free_bytes",
        "store_growth_bytes",
        "unknown_executions",
        "oldest_unknown_execution_seconds",
        "build_info",
    ):
        assert f"# TYPE scopegate_{name}" in page, name


async def test_the_age_of_the_oldest_unknown_execution_is_told(house: House) -> None:
    await unknown_execution(house)
    house.clock.move(50)
    assert await house.metric("scopegate_unknown_executions") == 1
    assert 50 <= await house.metric("scopegate_oldest_unknown_execution_seconds") < 60


async def test_no_ids_and_no_unlisted_actions_in_labels(house: House) -> None:
    scope = await house.issue(incident_id="inc_secret")
    await house.execute(scope, headers=[("X-Request-Id", "req_secret")])
    await house.execute(scope, action="made_up_action")
    await house.execute(None, scope_id="scope_secret")
    page = await house.metrics()
    for word in ("inc_secret", "req_secret", "scope_", "made_up_action"):
        assert word not in page.replace("scope_not_found", "").replace("scope_exhausted", ""), word
    assert not re.search(r"[0-9a-f]{8}-[0-9a-f]{4}", page)
    series = (
        'scopegate_decisions_total{action="other",outcome="blocked",reason="action_outside_scope",'
        'route="**/recovery/execute"}'
    )
    assert await house.metric(series) == 1
    assert (
        await house.metric(
            'scopegate_decisions_total{action="retry_agent",outcome="selected",reason="none",route="**/recovery/execute"}'
        )
        == 1
    )
    assert (
        await house.metric('scopegate_executions_total{outcome="answered",route="**/recovery/execute"}') == 1
    )


async def test_the_label_of_an_action_that_a_glob_lists_is_the_glob(house: House) -> None:
    low = ActionPolicy(risk=RiskClass.LOW)
    house.adopt(PolicySet(revision="r", actions={"restart_db": low}, globs={"restart_*": low}))
    for action in ("restart_db", "restart_pod", "restart_node"):
        assert (await house.execute(await house.issue(action=action), action=action)).status == 200
    selected = (
        'scopegate_decisions_total{action="%s",outcome="selected",reason="none",route="**/recovery/execute"}'
    )
    assert await house.metric(selected % "restart_*") == 2
    assert await house.metric(selected % "restart_db") == 1
    assert "restart_pod" not in await house.metrics()


async def test_the_kinds_of_metrics_that_are_observed_move(house: House, backend: Backend) -> None:
    backend.script = replies(after=0.02)
    await house.execute(await house.issue())
    for name in ("judge", "commit", "upstream", "settle", "store_batch"):
        assert await house.metric(f"scopegate_{name}_seconds_count") >= 1, name
    assert await house.metric("scopegate_in_flight") == 0
    assert await house.metric("scopegate_store_queue") == 0
