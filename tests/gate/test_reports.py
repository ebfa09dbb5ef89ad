"""Executions that end by report (`completion: report`), and answers that say that nothing was executed."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import sqlite3
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sidecar.core.command import Lapse, NotInFlight, Settled
from sidecar.core.policy import Brake, Rule
from sidecar.gate import reports
from sidecar.ids import new_decision_id
from sidecar.store.verify import verify_sqlite
from tests.client import HeaderList, Message, as_json
from tests.gate.test_outcomes import assert_problem, settled_record
from tests.support import POLICIES, Backend, Clock, House, Open, eventually, opened, replies, sends

BASE = "http://127.0.0.1:8000"
REPORTED: dict[str, Any] = {
    "completion_base_url": BASE,
    "routes": [
        {
            "path": "**/recovery/execute",
            "completion": "report",
            "completion_timeout_seconds": 600,
            "not_executed_on": [409, 503],
        }
    ],
}
ACCEPTED = replies(b'{"job": 7}', status="202 Accepted")


@pytest.fixture
async def house(open_house: Open, backend: Backend) -> House:
    backend.script = ACCEPTED
    return await open_house(gate=REPORTED)


class Job:
    """One execution as its backend knows it: where and with which token it reports."""

    def __init__(self, house: House, request: Message) -> None:
        self.house = house
        self.url = request.header("Scopegate-Completion-Url") or ""
        self.token = request.header("Scopegate-Completion-Token") or ""
        self.decision_id = request.header("Scopegate-Decision-Id") or ""

    async def report(
        self,
        outcome: str = "succeeded",
        *,
        token: str | None = None,
        house: House | None = None,
        **members: Any,
    ) -> Message:
        return await self.send({"outcome": outcome, **members}, token=token, house=house)

    async def send(
        self,
        document: object,
        *,
        token: str | None = None,
        house: House | None = None,
        headers: HeaderList = (),
        body: bytes | None = None,
    ) -> Message:
        kind, encoded = as_json(document)
        credentials = [("Authorization", f"Bearer {token or self.token}")]
        target = self.url.removeprefix(BASE)
        wanted = [*kind, *credentials, *headers]
        return await (house or self.house).data("POST", target, wanted, encoded if body is None else body)

    async def execution(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = (await self.house.record(self.decision_id))["execution"]
        return found


async def begun(house: House, scope: Mapping[str, Any] | None = None, **members: Any) -> Job:
    """An execution that runs: its backend has answered 202."""
    answer = await house.execute(scope or await house.issue(), **members)
    assert answer.status == 202, answer.body
    job = Job(house, house.backend.executions[-1])
    assert (await job.execution())["status"] == "running"
    return job


# Running ------------------------------------------------------------------------------------------------


async def test_an_answer_of_2xx_leaves_the_execution_running_with_its_hold_and_without_a_record(
    house: House,
) -> None:
    scope = await house.issue(action="failover", max_attempts=2, max_cost_usd=1)
    answer = await house.execute(scope)
    assert answer.status == 202
    assert answer.json() == {"job": 7}
    assert answer.header("Scopegate-Attempts-Remaining") == "1"
    record = await house.record(answer.header("Scopegate-Decision-Id") or "")
    execution = record["execution"]
    assert (execution["status"], execution["http_status"]) == ("running", 202)
    assert (execution["cost_usd"], execution["ended_at"]) == (None, None)
    assert execution["report_by"] == record["details"]["report_by"]
    assert [each["event"] for each in await house.records()] == ["admitted", "issued"]
    listed = await house.scope(scope)
    assert (listed["attempts_used"], listed["cost_used_usd"]) == (1, 0.1)


async def test_the_backend_gets_a_url_and_a_token_of_256_bits_which_the_store_has_only_as_a_digest(
    house: House,
) -> None:
    first, second = await begun(house), await begun(house)
    assert first.url == f"{BASE}/api/v1/recovery/executions/{first.decision_id}/complete"
    assert re.fullmatch(r"[A-Za-z0-9_-]{43}", first.token)
    assert first.token != second.token
    with closing(sqlite3.connect(house.database)) as connection:
        (stored,) = connection.execute(
            "SELECT report_token FROM executions WHERE decision_id = ?", (first.decision_id,)
        ).fetchone()
    assert stored == hashlib.sha256(first.token.encode()).digest()
    everything = b"".join(path.read_bytes() for path in house.database.parent.iterdir() if path.is_file())
    assert first.token.encode() not in everything


async def test_a_client_cannot_give_the_backend_a_token_of_its_own(house: House) -> None:
    await house.execute(
        await house.issue(),
        headers=[("Scopegate-Completion-Token", "mine"), ("scopegate_completion_url", "http://evil/")],
    )
    (sent,) = house.backend.executions
    tokens = [
        value for name, value in sent.raw_headers if name.lower().replace("_", "-").startswith("scopegate-c")
    ]
    assert len(tokens) == 2
    assert "mine" not in tokens


async def test_a_route_that_ends_by_its_answer_sends_no_token(open_house: Open) -> None:
    house = await open_house()
    await house.execute(await house.issue())
    (sent,) = house.backend.executions
    assert sent.header("Scopegate-Completion-Token") is None
    assert sent.header("Scopegate-Completion-Url") is None


@pytest.mark.parametrize("status", ["302 Found", "400 Bad Request", "500 Internal Server Error"])
async def test_another_status_than_2xx_ends_the_execution_as_answered(
    house: House, backend: Backend, status: str
) -> None:
    backend.script = replies(status=status, headers=[("X-Recovery-Cost-USD", "0.03")])
    answer = await house.execute(await house.issue())
    execution = await house.ended(answer.header("Scopegate-Decision-Id") or "")
    assert (execution["status"], execution["cost_usd"]) == ("answered", 0.03)
    assert assert_problem(await Job(house, backend.seen[-1]).report(), 409, "completion_conflict")


async def test_a_long_2xx_answer_leaves_the_execution_running_and_a_cut_one_unknown(
    open_house: Open, backend: Backend
) -> None:
    house = await open_house(gate={**REPORTED, "max_answer_bytes": 1000})
    backend.script = replies(b"x" * 50_000, status="202 Accepted")
    answer = await house.execute(await house.issue())
    assert len(answer.body) == 50_000
    job = Job(house, backend.seen[-1])

    async def runs() -> bool:
        return bool((await job.execution())["status"] == "running")

    await eventually(runs)
    backend.script = sends(b"HTTP/1.1 202 Accepted\r\nContent-Length: 10\r\n\r\nabc", then="close")
    cut = await house.execute(await house.issue())
    assert cut.status == 502
    assert (await house.ended(cut.json()["decision_id"]))["status"] == "unknown"


# Reports ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outcome", ["succeeded", "failed"])
async def test_a_report_ends_the_execution_with_its_cost(house: House, outcome: str) -> None:
    scope = await house.issue(action="failover", max_attempts=2, max_cost_usd=1)
    job = await begun(house, scope)
    answer = await job.report(outcome, cost_usd=0.04, detail="12 pods")
    assert answer.status == 200, answer.body
    assert answer.json() == {"decision_id": job.decision_id, "status": outcome, "scope_status": "active"}
    execution = await job.execution()
    assert (execution["status"], execution["cost_usd"]) == (outcome, 0.04)
    assert execution["ended_at"] is not None
    listed = await house.scope(scope)
    assert (listed["attempts_used"], listed["cost_used_usd"]) == (1, 0.04)
    record = await settled_record(house, job.decision_id)
    assert (record["event"], record["origin"], record["decision_type"]) == ("settled", "api", "recovery")
    assert (record["decision_outcome"], record["decision_reason"]) == ("selected", None)
    details = record["details"]
    assert (details["outcome"], details["cost_usd"], details["cost_reported"]) == (outcome, 0.04, True)
    assert details["reported_detail"] == "12 pods"
    assert details["reported_by_request"] == answer.header("X-Request-Id")


async def test_a_report_that_nothing_was_executed_gives_attempt_and_hold_back_once(house: House) -> None:
    scope = await house.issue(action="failover", max_cost_usd=1)
    job = await begun(house, scope)
    assert (await house.scope(scope))["status"] == "exhausted"
    for _ in range(2):
        answer = await job.report("not_executed")
        assert answer.json() == {
            "decision_id": job.decision_id,
            "status": "not_executed",
            "scope_status": "active",
        }
    listed = await house.scope(scope)
    assert (listed["attempts_used"], listed["cost_used_usd"]) == (0, 0)
    record = await settled_record(house, job.decision_id)
    assert (record["decision_outcome"], record["decision_reason"]) == ("none", "not_executed")


async def test_a_report_without_a_cost_costs_the_hold(house: House) -> None:
    job = await begun(house, await house.issue(action="failover", max_cost_usd=1))
    await job.report()
    assert (await job.execution())["cost_usd"] == 0.1
    assert (await settled_record(house, job.decision_id))["details"]["cost_reported"] is False


async def test_a_reported_cost_above_the_hold_exhausts_the_scope(house: House) -> None:
    scope = await house.issue(action="failover", max_attempts=3, max_cost_usd=1)
    job = await begun(house, scope)
    assert (await job.report(cost_usd=0.11)).json()["scope_status"] == "exhausted"
    assert await house.metric("scopegate_cost_overruns_total") == 1


async def test_a_report_without_a_scope_has_no_scope_status(open_house: Open, backend: Backend) -> None:
    backend.script = ACCEPTED
    house = await open_house(gate={**REPORTED, "scope_required_from": "high"})
    answer = await house.execute(None)
    assert answer.status == 202
    reported = await Job(house, backend.seen[-1]).report()
    assert reported.json()["scope_status"] is None


async def test_the_same_report_again_is_200_and_another_is_a_conflict_that_changes_nothing(
    house: House,
) -> None:
    job = await begun(house, await house.issue(action="failover", max_cost_usd=1))
    first = await job.report(cost_usd=0.02, detail="done")
    again = await job.report(cost_usd=0.02, detail="done, as I said")
    assert (again.status, again.json()) == (200, first.json())
    for outcome, cost in (("failed", 0.02), ("succeeded", 0.03), ("succeeded", None), ("not_executed", None)):
        body = assert_problem(await job.report(outcome, cost_usd=cost), 409, "completion_conflict")
        assert body["execution_status"] == "succeeded"
    assert (await job.execution())["cost_usd"] == 0.02
    assert len([each for each in await house.records() if each["event"] == "settled"]) == 1


async def test_of_two_reports_at_once_one_wins_and_the_same_one_is_repeated(house: House) -> None:
    job = await begun(house, await house.issue(max_attempts=5))
    outcomes = ["succeeded", "failed", "succeeded", "failed", "not_executed"]
    answers = await asyncio.gather(*map(job.report, outcomes))
    ended = (await job.execution())["status"]
    assert [answer.status for answer in answers] == [200 if each == ended else 409 for each in outcomes]
    assert len([each for each in await house.records() if each["event"] == "settled"]) == 1


# Before and without an answer ---------------------------------------------------------------------------


async def test_a_report_while_the_request_is_in_flight_wins_over_its_answer(
    house: House, backend: Backend
) -> None:
    release = asyncio.Event()
    backend.script = replies(status="202 Accepted", after=release)
    scope = await house.issue(max_attempts=2)
    asked = asyncio.create_task(house.execute(scope))
    await backend.arrived.wait()
    await eventually(lambda: bool(backend.executions))
    job = Job(house, backend.executions[-1])
    assert (await job.execution())["status"] == "in_flight"
    assert (await job.report("failed")).status == 200
    release.set()
    answer = await asked
    assert answer.status == 202
    assert (await job.execution())["status"] == "failed"
    assert (await house.scope(scope))["attempts_used"] == 1
    assert len([each for each in await house.records() if each["event"] == "settled"]) == 1
    series = 'scopegate_executions_total{{outcome="{}",route="**/recovery/execute"}}'
    assert await house.metric(series.format("failed")) == 1
    assert await house.metric(series.format("answered")) == 0
    assert (await job.report("failed")).status == 200


@pytest.mark.parametrize("outcome", ["succeeded", "failed", "not_executed"])
async def test_a_report_wins_after_the_answer_was_lost(house: House, backend: Backend, outcome: str) -> None:
    backend.script = sends(then="reset")
    scope = await house.issue(action="failover", max_cost_usd=1)
    lost = await house.execute(scope)
    assert_problem(lost, 502, "upstream_failed")
    job = Job(house, backend.executions[-1])
    assert (await job.execution())["status"] == "unknown"
    assert (await job.report(outcome)).status == 200
    execution = await job.execution()
    assert execution["status"] == outcome
    assert execution["cause"] is not None
    listed = await house.scope(scope)
    released = outcome == "not_executed"
    assert listed["attempts_used"] == (0 if released else 1)
    assert listed["cost_used_usd"] == (0 if released else 0.1)
    settled = [each["details"]["outcome"] for each in await house.records() if each["event"] == "settled"]
    assert settled == [outcome, "unknown"]


# Who may report -----------------------------------------------------------------------------------------


async def test_every_refused_token_gets_the_same_answer_and_nothing_changes(house: House) -> None:
    job, other = await begun(house), await begun(house)
    nobody = Job(house, house.backend.executions[-1])
    nobody.url = nobody.url.replace(nobody.decision_id, "01961234-5678-7abc-8def-0123456789ab")
    target = job.url.removeprefix(BASE)
    kind, body = as_json({"outcome": "succeeded"})
    answers = [
        await job.report(token=other.token),
        await job.report(token=job.token[:-1]),
        await job.report(token="x"),
        await nobody.report(),
        await house.data("POST", target, kind, body),
        await house.data("POST", target, [*kind, ("Authorization", f"Basic {job.token}")], body),
        await house.data("POST", target, [*kind, ("Authorization", job.token)], body),
        await job.send({"outcome": "succeeded"}, headers=[("Authorization", f"Bearer {job.token}")]),
        await house.data(
            "POST",
            "/api/v1/recovery/executions/what/complete",
            [*kind, ("Authorization", f"Bearer {job.token}")],
            body,
        ),
        # The token is looked at first, so what it is sent with is not.
        await job.send([], token=other.token),
        await house.data("POST", target, (), b"\xff"),
    ]
    assert {answer.body for answer in answers} == {answers[0].body}
    assert_problem(answers[0], 403, "completion_refused")
    for each in (job, other):
        assert (await each.execution())["status"] == "running"
    assert [each for each in await house.records() if each["event"] in ("settled", "refused")] == []


async def test_a_report_after_the_time_limit_is_refused_and_the_execution_is_unknown(house: House) -> None:
    scope = await house.issue(max_attempts=2)
    job = await begun(house, scope)
    house.clock.move(600)
    assert_problem(await job.report(), 403, "completion_refused")

    async def is_unknown() -> bool:
        return bool((await job.execution())["status"] == "unknown")

    await eventually(is_unknown)
    execution = await job.execution()
    assert execution["cause"] == "no report came within the time limit"
    assert (await house.scope(scope))["attempts_used"] == 1
    record = await settled_record(house, job.decision_id)
    assert (record["decision_outcome"], record["decision_reason"]) == ("none", "unknown")
    assert_problem(await job.report(), 403, "completion_refused")
    assert (
        await house.metric('scopegate_executions_total{outcome="unknown",route="**/recovery/execute"}') == 1
    )
    assert await house.metric("scopegate_running_executions") == 0
    assert await house.metric("scopegate_unknown_executions") == 1


async def test_the_same_report_is_refused_after_the_time_limit_as_well(house: House) -> None:
    job = await begun(house)
    assert (await job.report()).status == 200
    house.clock.move(601)
    assert_problem(await job.report(), 403, "completion_refused")
    assert (await job.execution())["status"] == "succeeded"


async def test_a_report_just_before_the_limit_counts_though_the_answer_was_lost(
    house: House, backend: Backend
) -> None:
    backend.script = sends(then="reset")
    await house.execute(await house.issue())
    house.clock.move(590)
    assert (await Job(house, backend.executions[-1]).report()).status == 200


async def test_an_answer_that_comes_after_the_time_limit_leaves_the_execution_unknown(
    house: House, backend: Backend
) -> None:
    release = asyncio.Event()
    backend.script = replies(status="202 Accepted", after=release)
    asked = asyncio.create_task(house.execute(await house.issue()))
    await eventually(lambda: bool(backend.executions))
    house.clock.move(601)
    release.set()
    assert (await asked).status == 202
    assert (await Job(house, backend.executions[-1]).execution())["status"] == "unknown"


@pytest.mark.parametrize("outcome", ["executed", "not_executed"])
async def test_an_operator_reconciles_a_running_execution_and_no_report_is_taken_afterwards(
    house: House, outcome: str
) -> None:
    scope = await house.issue(action="failover", max_cost_usd=1)
    job = await begun(house, scope)
    reconcile = f"/api/v1/executions/{job.decision_id}/reconcile"
    answer = await house.admin("POST", reconcile, {"outcome": outcome, "reason": "seen"})
    assert answer.status == 200, answer.body
    assert answer.json()["status"] == outcome
    assert (await house.scope(scope))["attempts_used"] == (1 if outcome == "executed" else 0)
    for report in ("succeeded", "not_executed"):
        assert_problem(await job.report(report), 403, "completion_refused")
    assert (await job.execution())["status"] == outcome
    assert (await settled_record(house, job.decision_id))["event"] == "reconciled"


async def test_a_reported_execution_cannot_be_reconciled(house: House) -> None:
    job = await begun(house)
    await job.report("failed")
    reconcile = f"/api/v1/executions/{job.decision_id}/reconcile"
    body = assert_problem(
        await house.admin("POST", reconcile, {"outcome": "executed"}), 409, "not_reconcilable"
    )
    assert body["execution_status"] == "failed"


# Malformed reports --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("document", "member"),
    [
        ({}, "outcome"),
        ({"outcome": None}, "outcome"),
        ({"outcome": "executed"}, "outcome"),
        ({"outcome": ["succeeded"]}, "outcome"),
        ({"outcome": "succeeded", "cost_usd": -1}, "cost_usd"),
        ({"outcome": "succeeded", "cost_usd": "0.04"}, "cost_usd"),
        ({"outcome": "succeeded", "cost_usd": 0.0000001}, "cost_usd"),
        ({"outcome": "not_executed", "cost_usd": 0.04}, "cost_usd"),
        ({"outcome": "succeeded", "detail": 5}, "detail"),
        ({"outcome": "succeeded", "detail": "x" * 2001}, "detail"),
        ({"outcome": "succeeded", "details": "x"}, "details"),
    ],
)
async def test_a_malformed_report_names_its_member_and_changes_nothing(
    house: House, document: Any, member: str
) -> None:
    job = await begun(house)
    body = assert_problem(await job.send(document), 400, "invalid_request")
    assert body["member"] == member
    assert (await job.execution())["status"] == "running"
    assert (await job.report(detail="x" * 2000)).status == 200


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"{", b'{"outcome": "succeeded", "outcome": "failed"}', b'{"outcome": "succeeded"} x'],
)
async def test_a_report_that_is_not_strict_json_changes_nothing(house: House, body: bytes) -> None:
    job = await begun(house)
    assert assert_problem(await job.send({}, body=body), 400, "invalid_request")["member"] == "body"
    assert (await job.execution())["status"] == "running"


async def test_a_report_in_another_media_type_is_refused(house: House) -> None:
    job = await begun(house)
    headers = [("Authorization", f"Bearer {job.token}"), ("Content-Type", "text/plain")]
    target = job.url.removeprefix(BASE)
    answer = await house.data("POST", target, headers, b'{"outcome": "succeeded"}')
    assert_problem(answer, 415, "unsupported_media_type")


# The call's place ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "OPTIONS"])
async def test_the_path_of_the_call_takes_post_only(house: House, method: str) -> None:
    job = await begun(house)
    seen = len(house.backend.seen)
    answer = await house.data(method, job.url.removeprefix(BASE))
    assert_problem(answer, 405, "method_not_allowed")
    assert answer.header("Allow") == "POST"
    assert len(house.backend.seen) == seen


@pytest.mark.parametrize(
    "target",
    [
        "/api/v1/recovery/executions//complete",
        "/api/v1/recovery/executions/complete",
        "/api/v1/recovery/executions/a/b/complete",
        "/api/v1/recovery/executions/a/complete/",
        "/api/v1/recovery/executions/a/Complete",
        "/x/api/v1/recovery/executions/a/complete",
    ],
)
async def test_other_spellings_of_the_path_pass_through(house: House, target: str) -> None:
    await house.data("GET", target)
    assert house.backend.seen[-1].target == target


async def test_the_call_refuses_foreign_hosts_and_other_sites(house: House) -> None:
    job = await begun(house)
    assert_problem(
        await job.send({"outcome": "failed"}, headers=[("Host", "evil.example")]), 421, "misdirected_request"
    )
    assert_problem(
        await job.send({"outcome": "failed"}, headers=[("Origin", "http://evil.example")]), 403, "cross_site"
    )
    assert (await job.execution())["status"] == "running"


async def test_reports_are_taken_on_the_data_listener_though_admin_serves_scopes(
    open_house: Open, backend: Backend
) -> None:
    backend.script = ACCEPTED
    house = await open_house(gate={**REPORTED, "scope_required_from": "high"}, scopes={"serve_on": "admin"})
    await house.execute(None)
    assert (await Job(house, backend.seen[-1]).report()).status == 200


# Statuses that say that nothing was executed ------------------------------------------------------------


@pytest.mark.parametrize("completion", ["answer", "report"])
async def test_a_listed_status_ends_the_execution_as_not_executed(
    open_house: Open, backend: Backend, completion: str
) -> None:
    route = {**REPORTED["routes"][0], "completion": completion}
    house = await open_house(gate={"completion_base_url": BASE, "routes": [route]})
    backend.script = replies(b"busy", status="409 Conflict", headers=[("X-Recovery-Cost-USD", "0.05")])
    scope = await house.issue(action="failover", max_cost_usd=1)
    answer = await house.execute(scope)
    assert (answer.status, answer.body) == (409, b"busy")
    assert answer.header("Scopegate-Scope-Status") == "active"
    assert answer.header("Scopegate-Attempts-Remaining") == "1"
    decision_id = answer.header("Scopegate-Decision-Id") or ""
    execution = await house.ended(decision_id)
    assert (execution["status"], execution["http_status"]) == ("not_executed", 409)
    assert execution["cost_usd"] == 0
    record = await settled_record(house, decision_id)
    assert (record["decision_outcome"], record["decision_reason"]) == ("none", "not_executed")
    assert record["details"]["cost_reported"] is False
    series = 'scopegate_executions_total{outcome="not_executed",route="**/recovery/execute"}'
    assert await house.metric(series) == 1


async def test_a_status_that_is_not_listed_consumes_the_attempt(house: House, backend: Backend) -> None:
    backend.script = replies(status="404 Not Found")
    answer = await house.execute(await house.issue())
    assert answer.header("Scopegate-Scope-Status") == "exhausted"


async def test_an_answer_that_is_cut_is_unknown_though_its_status_is_listed(
    open_house: Open, backend: Backend
) -> None:
    house = await open_house(gate={**REPORTED, "max_answer_bytes": 10})
    for body in (b"abc", b"a long answer, which streams"):
        backend.script = sends(b"HTTP/1.1 409 Conflict\r\nContent-Length: 90\r\n\r\n" + body, then="close")
        scope = await house.issue()
        kind, encoded = house.execution(scope)
        with suppress(ConnectionError, AssertionError):
            await house.data("POST", "/api/v1/recovery/execute", kind, encoded)
        decision_id = backend.executions[-1].header("Scopegate-Decision-Id") or ""
        assert (await house.ended(decision_id))["status"] == "unknown"
        assert (await house.scope(scope))["attempts_used"] == 1


async def test_a_long_answer_with_a_listed_status_is_not_executed(open_house: Open, backend: Backend) -> None:
    house = await open_house(gate={**REPORTED, "max_answer_bytes": 10})
    backend.script = replies(b"x" * 10_000, status="503 Service Unavailable")
    scope = await house.issue()
    answer = await house.execute(scope)
    assert (await house.ended(answer.header("Scopegate-Decision-Id") or ""))["status"] == "not_executed"
    assert (await house.scope(scope))["attempts_used"] == 0


# Restarts -----------------------------------------------------------------------------------------------


async def test_a_running_execution_survives_a_stop_and_is_reported_to_the_next_process(
    tmp_path: Path, backend: Backend, clock: Clock
) -> None:
    backend.script = ACCEPTED
    async with opened(tmp_path, backend, clock=clock, gate=REPORTED) as house:
        scope = await house.issue(action="failover", max_attempts=2, max_cost_usd=1)
        first, second = await begun(house, scope), await begun(house, scope)
    async with opened(tmp_path, backend, clock=clock, gate=REPORTED) as house:
        assert await house.metric("scopegate_running_executions") == 2
        listed = (await house.admin("GET", "/api/v1/executions?status=running")).json()["executions"]
        assert [each["decision_id"] for each in listed] == [second.decision_id, first.decision_id]
        assert (await house.admin("GET", "/api/v1/status")).json()["running_executions"] == 2
        assert (await first.report("not_executed", house=house)).status == 200
        assert (await house.scope(scope))["attempts_used"] == 1
        assert_problem(await first.report(token=second.token, house=house), 403, "completion_refused")
    verify_sqlite(tmp_path / "gate.db")


async def test_the_time_limit_goes_on_over_restarts(tmp_path: Path, backend: Backend, clock: Clock) -> None:
    backend.script = ACCEPTED
    async with opened(tmp_path, backend, clock=clock, gate=REPORTED) as house:
        passed = await begun(house)
        clock.move(300)
        later = await begun(house)
    clock.move(300)
    async with opened(tmp_path, backend, clock=clock, gate=REPORTED) as house:
        passed.house = later.house = house

        async def is_unknown(job: Job) -> bool:
            return bool((await job.execution())["status"] == "unknown")

        await eventually(lambda: is_unknown(passed))
        assert (await later.execution())["status"] == "running"
        clock.move(300)
        await eventually(lambda: is_unknown(later))


async def test_a_limit_is_kept_though_the_route_has_gone(
    tmp_path: Path, backend: Backend, clock: Clock
) -> None:
    backend.script = ACCEPTED
    async with opened(tmp_path, backend, clock=clock, gate=REPORTED) as house:
        job = await begun(house)
    async with opened(tmp_path, backend, clock=clock) as house:
        assert (await job.report(house=house)).status == 200


async def test_many_limits_that_pass_at_once_are_all_noticed(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reports, "PAGE", 2)
    scope = await house.issue(max_attempts=5)
    jobs = [await begun(house, scope) for _ in range(5)]
    house.clock.move(600)

    async def all_unknown() -> bool:
        return {(await job.execution())["status"] for job in jobs} == {"unknown"}

    await eventually(all_unknown)
    assert len([each for each in await house.records() if each["event"] == "settled"]) == 5


async def test_two_timers_end_an_execution_once(house: House) -> None:
    job = await begun(house)
    limit = [Lapse(decision_id=new_decision_id(), admission_id=job.decision_id) for _ in range(2)]
    store = house.sidecar.store
    assert [type(await store.submit(each)) for each in limit] == [NotInFlight, NotInFlight]
    house.clock.move(600)
    replies_ = await asyncio.gather(*map(store.submit, limit), return_exceptions=True)
    assert {type(reply) for reply in replies_} <= {Settled, NotInFlight}
    assert (await job.execution())["status"] == "unknown"
    assert len([each for each in await house.records() if each["event"] == "settled"]) == 1


async def test_a_clock_that_is_set_back_leaves_an_execution_its_time(house: House) -> None:
    """As an operator accepts it: what was admitted ahead of time keeps its age, and so its limit."""
    house.clock.set(100_000)
    assert (await house.admin("POST", "/api/v1/store/accept-clock", {})).status == 200
    job = await begun(house)
    house.clock.set(-100_000)
    assert (await house.admin("POST", "/api/v1/store/accept-clock", {})).status == 200
    house.clock.move(590)
    assert (await job.execution())["status"] == "running"
    house.clock.move(10)
    assert_problem(await job.report(), 403, "completion_refused")


async def test_an_execution_whose_running_is_written_late_has_its_limit_as_well(
    house: House, backend: Backend
) -> None:
    release = asyncio.Event()
    backend.script = replies(status="202 Accepted", after=release)
    house.sidecar.store.deadline_seconds = 0.1
    asked = asyncio.create_task(house.execute(await house.issue()))
    await eventually(lambda: bool(backend.executions))
    away = house.database.with_suffix(".away")
    os.rename(house.database, away)
    release.set()
    assert (await asked).status == 202
    assert await house.metric("scopegate_unsettled") == 1
    os.rename(away, house.database)
    job = Job(house, backend.executions[-1])

    async def has(status: str) -> bool:
        return bool((await job.execution())["status"] == status)

    await eventually(lambda: has("running"))
    house.clock.move(600)
    await eventually(lambda: has("unknown"))


async def test_a_report_while_the_store_fails_is_503_and_can_be_sent_again(house: House) -> None:
    job = await begun(house)
    away = house.database.with_suffix(".away")
    os.rename(house.database, away)
    answer = await job.report()
    assert (answer.status, answer.json()["error"]) == (503, "store_unavailable")
    os.rename(away, house.database)
    assert (await job.report()).status == 200


# Brakes -------------------------------------------------------------------------------------------------


async def test_a_brake_with_one_in_flight_waits_for_the_report_however_long_it_takes(
    tmp_path: Path, backend: Backend, clock: Clock
) -> None:
    brake = Brake(per=("incident_id",), window_seconds=10, one_in_flight=True)
    policies = replace(POLICIES, rules=(Rule(id="one", on="execute", brake=brake),))
    backend.script = ACCEPTED
    async with opened(tmp_path, backend, clock=clock, policies=policies, gate=REPORTED) as house:
        scope = await house.issue(max_attempts=3)
        job = await begun(house, scope)
        assert_problem(await house.execute(scope), 429, "braked")
        clock.move(100)
        braked = assert_problem(await house.execute(scope), 429, "braked")
        assert braked["ends_at"] is None
        assert "is still running" in braked["message"]
    async with opened(tmp_path, backend, clock=clock, policies=policies, gate=REPORTED) as house:
        explained = await house.explain(scope)
        assert explained["error"] == "braked"
        assert explained["brakes"][0]["why"] == f"Execution {job.decision_id} is still running."
        assert_problem(await house.execute(scope), 429, "braked")
        assert (await job.report("failed", house=house)).status == 200
        await begun(house, scope)


async def test_an_execution_that_was_not_executed_still_counts_for_brakes(
    open_house: Open, backend: Backend
) -> None:
    brake = Brake(per=("incident_id",), window_seconds=100, max_attempts=2)
    policies = replace(POLICIES, rules=(Rule(id="two", on="execute", brake=brake),))
    house = await open_house(gate=REPORTED, policies=policies)
    scope = await house.issue()
    backend.script = replies(status="409 Conflict")
    assert (await house.execute(scope)).status == 409
    backend.script = ACCEPTED
    assert (await (await begun(house, scope)).report("not_executed")).status == 200
    assert_problem(await house.execute(scope), 429, "braked")


async def test_a_shadow_route_sends_a_token_for_what_it_lets_through(
    open_house: Open, backend: Backend
) -> None:
    backend.script = ACCEPTED
    route = {**REPORTED["routes"][0], "mode": "shadow"}
    house = await open_house(gate={"completion_base_url": BASE, "routes": [route]})
    job = Job(house, (await house.execute(None), backend.executions[-1])[1])
    assert (await job.report("failed")).json()["scope_status"] is None


# Idempotency keys ---------------------------------------------------------------------------------------

KEY = [("Idempotency-Key", "key-00000001")]


@pytest.mark.parametrize("outcome", [None, "succeeded", "failed"])
async def test_a_repeat_gets_the_first_answer_while_it_runs_and_after_its_report(
    house: House, outcome: str | None
) -> None:
    scope = await house.issue()
    first = await house.execute(scope, headers=KEY)
    job = Job(house, house.backend.executions[-1])
    if outcome is not None:
        assert (await job.report(outcome)).status == 200
    again = await house.execute(scope, headers=KEY)
    assert (again.status, again.body) == (first.status, first.body)
    assert again.header("Idempotency-Replayed") == "true"
    assert len(house.backend.executions) == 1


async def test_a_report_that_nothing_was_executed_frees_the_key(house: House) -> None:
    scope = await house.issue()
    await house.execute(scope, headers=KEY)
    await Job(house, house.backend.executions[-1]).report("not_executed")
    again = await house.execute(scope, headers=KEY)
    assert again.header("Idempotency-Replayed") is None
    assert len(house.backend.executions) == 2


async def test_a_status_that_says_that_nothing_was_executed_frees_the_key(
    house: House, backend: Backend
) -> None:
    scope = await house.issue()
    backend.script = replies(status="409 Conflict")
    await house.execute(scope, headers=KEY)
    backend.script = ACCEPTED
    assert (await house.execute(scope, headers=KEY)).status == 202
    assert len(backend.executions) == 2


async def test_a_repeat_after_the_time_limit_is_of_unknown_outcome(house: House) -> None:
    scope = await house.issue(ttl_seconds=3600)
    await house.execute(scope, headers=KEY)
    job = Job(house, house.backend.executions[-1])
    house.clock.move(600)

    async def is_unknown() -> bool:
        return bool((await job.execution())["status"] == "unknown")

    await eventually(is_unknown)
    assert_problem(await house.execute(scope, headers=KEY), 409, "outcome_unknown")


async def test_an_answer_that_comes_after_the_report_is_the_one_that_repeats_get(
    house: House, backend: Backend
) -> None:
    release = asyncio.Event()
    backend.script = replies(b'{"late": true}', status="202 Accepted", after=release)
    scope = await house.issue()
    asked = asyncio.create_task(house.execute(scope, headers=KEY))
    await eventually(lambda: bool(backend.executions))
    await Job(house, backend.executions[-1]).report()
    assert_problem(await house.execute(scope, headers=KEY), 409, "outcome_unknown")
    release.set()
    assert (await asked).status == 202
    again = await house.execute(scope, headers=KEY)
    assert (again.status, again.json()) == (202, {"late": True})
    assert len(backend.executions) == 1
