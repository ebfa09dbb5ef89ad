"""Requests that no route lists: `gate.unlisted` lets them pass, records them or refuses them."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from itertools import chain
from typing import Any

import pytest

from sidecar.errors import StoreUnavailable
from sidecar.gate import deadlines, floods
from sidecar.policies.replay import Replay, replayed
from sidecar.store.verify import verify_sqlite
from tests.client import Connection, HeaderList, Message, connect, read_message, request_bytes
from tests.support import EXECUTE, POLICIES, House, Open, eventually, replies, reset, sends

READS = ("GET", "HEAD", "OPTIONS")
WRITES = ("POST", "PUT", "PATCH", "DELETE", "PROPFIND")
SWITCHING = [("Connection", "Upgrade"), ("Upgrade", "websocket"), ("Sec-WebSocket-Version", "13")]
ID = [("X-Request-Id", "req_1")]


async def unlisted(open_house: Open, **section: Any) -> House:
    return await open_house(gate={"unlisted": section})


def error_of(answer: Message) -> tuple[int, str]:
    return answer.status, answer.json()["error"]


def arrived(house: House) -> list[tuple[str, str]]:
    return [(message.method, message.target) for message in house.backend.seen]


def without_place(record: dict[str, Any]) -> dict[str, Any]:
    """A record without its place in the log, its id and its time."""
    passing = ("writer", "seq", "hash", "decision_id", "decided_at", "recorded_at", "previous_hash")
    return {name: value for name, value in record.items() if name not in passing}


# The record of a pass, whole. It says nothing about a scope.
PASSED: dict[str, Any] = {
    "origin": "gate",
    "event": "unlisted",
    "scope_id": None,
    "incident_id": None,
    "action": None,
    "admission_id": None,
    "principal": {"id": "anonymous", "kind": "service", "method": "none"},
    "decision_type": "policy",
    "decision_source": "system",
    "decision_trigger": "explicit",
    "decision_inputs": {
        "policy_id": "scoped_execution",
        "principal": "anonymous",
        "method": "DELETE",
        "path": "/pods/cart-0",
    },
    "decision_outcome": "selected",
    "decision_reason": None,
    "run_id": None,
    "workflow_id": None,
    "tenant_id": "default",
    "request_id": "req_1",
    "causal_role": "in_run",
    "details": {"policy_revision": "rev-1", "route": None, "rules": []},
}


# The three treatments --------------------------------------------------------------------------------


@pytest.mark.parametrize("section", [{}, {"reads": "pass", "writes": "pass", "except": ["/x"]}])
async def test_by_default_everything_passes_and_nothing_is_recorded(
    open_house: Open, section: dict[str, Any]
) -> None:
    house = await unlisted(open_house, **section)
    for method in READS + WRITES:
        assert (await house.data(method, "/pods/cart-0")).status == 200
    assert arrived(house) == [(method, "/pods/cart-0") for method in READS + WRITES]
    assert await house.records() == []


async def test_a_recorded_write_passes_untouched_and_its_record_has_method_and_path(open_house: Open) -> None:
    house = await unlisted(open_house, writes="record")
    forged = [("Scopegate-Decision-Id", "mine"), *ID]
    answer = await house.data("DELETE", "/pods/cart-0?token=secret", forged, b"body")
    assert (answer.status, answer.json()) == (200, {"done": True})
    assert answer.header("Scopegate-Decision-Id") is answer.header("X-Request-Id") is None
    (message,) = house.backend.seen
    assert (message.target, message.body) == ("/pods/cart-0?token=secret", b"body")
    assert message.headers("Scopegate-Decision-Id") == ["mine"]
    assert message.header("traceparent") is None
    (record,) = await house.records()
    assert without_place(record) == PASSED
    assert await house.metric('scopegate_unlisted_total{access="writes",result="recorded"}') == 1
    assert await house.metric('scopegate_passed_through_total{outcome="answered"}') == 1
    assert (await house.record(record["decision_id"]))["execution"] is None


async def test_the_record_is_on_disk_before_a_byte_goes_to_the_backend(open_house: Open) -> None:
    house = await unlisted(open_house, writes="record")
    found: list[int] = []

    async def look(request: Message, writer: asyncio.StreamWriter) -> None:
        found.append(len(await house.records("&event=unlisted")))
        await replies()(request, writer)

    house.backend.script = look
    assert (await house.data("POST", "/x")).status == 200
    assert found == [1]


async def test_a_refused_write_is_recorded_and_nothing_reaches_the_backend(open_house: Open) -> None:
    house = await unlisted(open_house, writes="refuse")
    answer = await house.data("DELETE", "/pods/cart-0?token=secret", ID, b"body")
    assert error_of(answer) == (403, "not_listed")
    message = "No route lists DELETE for this path; gate.unlisted.writes is refuse."
    assert answer.json() == {
        "type": "urn:scopegate:error:not_listed",
        "title": "No route lists this request",
        "status": 403,
        "detail": message,
        "error": "not_listed",
        "message": message,
        "decision_id": answer.json()["decision_id"],
    }
    assert house.backend.connections == 0
    (record,) = await house.records()
    assert record["decision_id"] == answer.json()["decision_id"] == answer.header("Scopegate-Decision-Id")
    assert without_place(record) == {
        **PASSED,
        "event": "refused",
        "decision_outcome": "blocked",
        "decision_reason": "not_listed",
        "details": {**PASSED["details"], "message": message},
    }
    assert await house.metric('scopegate_unlisted_total{access="writes",result="refused"}') == 1
    decided = 'scopegate_decisions_total{action="none",outcome="blocked",reason="not_listed",route="none"}'
    assert await house.metric(decided) == 1


@pytest.mark.parametrize(("access", "others"), [("reads", "writes"), ("writes", "reads")])
@pytest.mark.parametrize("treatment", ["record", "refuse"])
async def test_reads_and_writes_are_treated_apart(
    open_house: Open, access: str, others: str, treatment: str
) -> None:
    house = await unlisted(open_house, **{access: treatment})
    treated = READS if access == "reads" else WRITES
    for method in READS + WRITES:
        answer = await house.data(method, "/x")
        assert answer.status == (403 if method in treated and treatment == "refuse" else 200), method
    records = await house.records()
    assert [record["decision_inputs"]["method"] for record in reversed(records)] == list(treated)
    assert {record["event"] for record in records} == {"unlisted" if treatment == "record" else "refused"}


@pytest.mark.parametrize("treatment", ["record", "refuse"])
async def test_what_a_route_lists_is_gated_as_ever_and_a_read_of_its_path_is_not_listed(
    open_house: Open, treatment: str
) -> None:
    house = await unlisted(open_house, reads=treatment, writes=treatment)
    assert (await house.execute(await house.issue())).status == 200
    assert error_of(await house.execute(None)) == (400, "scoped_execution_required")
    assert error_of(await house.data("DELETE", EXECUTE)) == (405, "method_not_allowed")
    before = len(house.backend.seen)
    answer = await house.data("GET", EXECUTE)
    (record, *_) = await house.records()
    assert record["decision_inputs"]["path"] == EXECUTE
    if treatment == "refuse":
        assert error_of(answer) == (403, "not_listed")
        assert len(house.backend.seen) == before
    else:
        assert (answer.status, record["event"]) == (200, "unlisted")


async def test_the_calls_of_the_sidecar_itself_are_not_concerned(open_house: Open) -> None:
    house = await unlisted(open_house, reads="refuse", writes="refuse")
    scope = await house.issue()
    assert (await house.revoke(scope)).status == 200
    assert (await house.data("GET", "/api/v1/recovery/scopes/inc_1")).status == 200


@pytest.mark.parametrize("treatment", ["record", "refuse"])
async def test_a_shadow_route_lists_its_path(open_house: Open, treatment: str) -> None:
    routes = [{"path": "/pilot/run", "mode": "shadow"}]
    house = await open_house(gate={"routes": routes, "unlisted": {"reads": treatment, "writes": treatment}})
    for target in ("/pilot/run", "/pilot//run"):
        assert (await house.data("POST", target, ID, b"restart it")).status == 200
    assert [record["event"] for record in await house.records()] == ["admitted", "admitted"]
    answer = await house.data("POST", "/pilot/stop")
    assert answer.status == (403 if treatment == "refuse" else 200)
    expected = "unlisted" if treatment == "record" else "refused"
    assert [record["event"] for record in await house.records()] == [expected, "admitted", "admitted"]


async def test_methods_that_a_route_lets_pass_are_not_listed(open_house: Open) -> None:
    passing = {"path": "/run", "other_methods": "pass"}
    refusing = {"path": "/stop", "methods": ["GET", "DELETE"]}
    unlisted = {"reads": "record", "writes": "refuse"}
    house = await open_house(gate={"routes": [passing, refusing], "unlisted": unlisted})
    assert error_of(await house.data("PUT", "/run")) == (403, "not_listed")
    assert error_of(await house.data("PUT", "/stop")) == (405, "method_not_allowed")
    for method, target in (("GET", "/run"), ("OPTIONS", "/stop")):
        assert (await house.data(method, target)).status == 200
    for method, target in (("POST", "/run"), ("GET", "/stop"), ("DELETE", "/stop")):
        answer = await house.data(method, target)
        assert answer.status in (400, 415), answer
    assert arrived(house) == [("GET", "/run"), ("OPTIONS", "/stop")]
    passed = [record["decision_inputs"]["path"] for record in await house.records("&event=unlisted")]
    assert passed == ["/stop", "/run"]


async def test_rules_about_ambiguous_paths_hosts_and_upgrades_hold_as_ever(open_house: Open) -> None:
    house = await unlisted(open_house, reads="refuse", writes="refuse")
    assert error_of(await house.data("POST", "/api/v1//recovery/execute")) == (400, "ambiguous_path")
    assert error_of(await house.data("POST", "/x", [("X-Original-URL", EXECUTE)])) == (
        400,
        "override_refused",
    )
    assert error_of(await house.data("CONNECT", "x:1")) == (400, "upgrade_refused")
    assert error_of(await house.data("GET", "/x", [("Host", "a b")])) == (400, "invalid_request")
    assert house.backend.seen == []


async def test_a_read_with_a_method_override_is_treated_as_the_stricter_of_both(open_house: Open) -> None:
    house = await unlisted(open_house, reads="pass", writes="refuse")
    override = [("X-HTTP-Method-Override", "DELETE")]
    assert error_of(await house.data("GET", "/x", override)) == (403, "not_listed")
    assert error_of(await house.data("GET", "/x", [("X_Http_Method", "DELETE")])) == (403, "not_listed")
    assert (await house.data("GET", "/x")).status == 200
    assert len(house.backend.seen) == 1


async def test_a_write_with_a_method_override_stays_a_write(open_house: Open) -> None:
    house = await unlisted(open_house, writes="refuse")
    answer = await house.data("POST", "/x", [("X-HTTP-Method-Override", "GET")])
    assert error_of(answer) == (403, "not_listed")


async def test_a_long_path_is_cut_in_its_record(open_house: Open) -> None:
    house = await unlisted(open_house, writes="record")
    await house.data("POST", "/%FF%C3%BC%3Ftoken=secret")
    await house.data("POST", "/" + "a" * 5000)
    long, strange = await house.records()
    assert strange["decision_inputs"]["path"] == "/%FF%C3%BC"
    assert long["decision_inputs"]["path"] == "/" + "a" * 511


async def test_a_body_passes_in_constant_memory_after_its_record(open_house: Open) -> None:
    house = await unlisted(open_house, writes="record")
    reader, writer = await connect(house.sidecar.data_address)
    size = 4 << 20
    writer.write(request_bytes("PUT", "/file", [("Content-Length", str(size))], b""))
    for _ in range(64):
        writer.write(b"x" * (size // 64))
        await writer.drain()
    answer = await read_message(reader)
    writer.close()
    assert answer is not None
    assert answer.status == 200
    assert len(house.backend.seen[0].body) == size


# WebSockets ------------------------------------------------------------------------------------------


async def test_a_websocket_is_a_read_that_is_refused_before_any_upgrade(open_house: Open) -> None:
    house = await unlisted(open_house, reads="refuse")
    answer = await house.data("GET", "/socket", SWITCHING)
    assert error_of(answer) == (403, "not_listed")
    assert house.backend.connections == 0


async def test_a_recorded_websocket_is_tunnelled_after_its_record(open_house: Open) -> None:
    house = await unlisted(open_house, reads="record", writes="refuse")
    house.backend.script = sends(
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\nhello",
        then="close",
    )
    reader, writer = await connect(house.sidecar.data_address)
    writer.write(request_bytes("GET", "/socket", SWITCHING))
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 ")
    assert await reader.readexactly(5) == b"hello"
    writer.close()
    (record,) = await house.records()
    assert (record["event"], record["decision_inputs"]["path"]) == ("unlisted", "/socket")


# The store -------------------------------------------------------------------------------------------


def failing(monkeypatch: pytest.MonkeyPatch, house: House) -> None:
    async def fail(*arguments: Any, **options: Any) -> None:
        raise StoreUnavailable("disk I/O error")

    monkeypatch.setattr(house.sidecar.store.engine, "transact", fail)


@pytest.mark.parametrize("tokens", [float(floods.BURST), 0.0])
async def test_what_cannot_be_recorded_does_not_pass(
    open_house: Open, monkeypatch: pytest.MonkeyPatch, tokens: float
) -> None:
    house = await unlisted(open_house, reads="pass", writes="record")
    for allowance in house.sidecar.unlisted_log._allowances.values():
        monkeypatch.setattr(allowance, "left", tokens)
    monkeypatch.setattr(floods, "PER_SECOND", 0.0)
    failing(monkeypatch, house)
    answers = await asyncio.gather(*(house.data("POST", "/x") for _ in range(3)))
    assert [error_of(answer) for answer in answers] == [(503, "store_unavailable")] * 3
    assert {answer.header("Retry-After") for answer in answers} == {"1"}
    assert all(answer.json()["cause"] == "disk I/O error" for answer in answers)
    assert house.backend.seen == []
    assert (await house.data("GET", "/x")).status == 200
    unrecorded = 'scopegate_unrecorded_refusals_total{reason="store_unavailable"}'
    assert await house.metric(unrecorded) == 3


async def test_a_refusal_stays_a_refusal_while_the_store_does_not_work(
    open_house: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = await unlisted(open_house, writes="refuse")
    failing(monkeypatch, house)
    answer = await house.data("POST", "/x")
    assert error_of(answer) == (403, "not_listed")
    assert "decision_id" not in answer.json()
    assert await house.metric('scopegate_unrecorded_refusals_total{reason="not_listed"}') == 1


async def test_nothing_passes_recorded_with_a_clock_that_cannot_be_trusted(open_house: Open) -> None:
    house = await unlisted(open_house, writes="record")
    assert (await house.data("POST", "/x")).status == 200
    house.clock.set(3600)
    answer = await house.data("POST", "/x")
    assert (error_of(answer), answer.json()["cause"]) == ((503, "store_unavailable"), "clock")
    refused, passed = await house.records()
    assert (refused["event"], passed["event"]) == ("refused", "unlisted")
    assert refused["decision_inputs"]["path"] == "/x"
    assert len(house.backend.seen) == 1


async def test_a_record_that_comes_too_late_is_taken_back(
    open_house: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = await open_house(gate={"unlisted": {"writes": "record"}}, store={"deadline_seconds": 0.1})
    engine, may_commit = house.sidecar.store.engine, asyncio.Event()
    transact = engine.transact

    async def held_up(*arguments: Any, **options: Any) -> None:
        await may_commit.wait()
        await transact(*arguments, **options)

    monkeypatch.setattr(engine, "transact", held_up)
    assert error_of(await house.data("POST", "/x")) == (503, "store_unavailable")
    house.sidecar.store.deadline_seconds = 5.0
    may_commit.set()
    while len(records := await house.records()) < 2:
        await asyncio.sleep(0.01)
    refused, passed = records
    assert (refused["event"], refused["decision_reason"]) == ("refused", "store_unavailable")
    assert refused["details"]["admission_id"] == passed["decision_id"]
    assert house.backend.seen == []


async def test_without_policies_unlisted_requests_are_recorded_all_the_same(open_house: Open) -> None:
    house = await open_house(gate={"unlisted": {"writes": "record"}}, policies=None)
    assert (await house.data("POST", "/x")).status == 200
    (record,) = await house.records()
    assert record["details"] == {"route": None, "rules": []}


# Floods ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("treatment", ["record", "refuse"])
async def test_a_flood_is_counted_in_summaries(
    open_house: Open, monkeypatch: pytest.MonkeyPatch, treatment: str
) -> None:
    monkeypatch.setattr(floods, "BURST", 10)
    monkeypatch.setattr(floods, "PER_SECOND", 0.0)
    house = await unlisted(open_house, writes=treatment)
    count, connections = 60, 20

    async def ask(number: int) -> list[int]:
        with Connection(house.sidecar.data_address) as connection:
            share = range(count // connections)
            return [(await connection.ask("PUT", f"/{number % 4}")).status for _ in share]

    statuses = Counter(chain(*await asyncio.gather(*map(ask, range(connections)))))
    assert statuses == {200 if treatment == "record" else 403: count}
    assert len(house.backend.seen) == (count if treatment == "record" else 0)
    event = "unlisted" if treatment == "record" else "refused"
    records = await house.records(f"&event={event}")
    assert sum(record["details"].get("count", 1) for record in records) == count
    summaries = [record for record in records if "count" in record["details"]]
    assert len(records) - len(summaries) == 10
    assert len(summaries) <= 6
    for summary in summaries:
        assert set(summary["details"]["subjects"]) <= {f"PUT /{number}" for number in range(4)}
        assert "path" not in summary["decision_inputs"]
    result = "recorded" if treatment == "record" else "refused"
    assert await house.metric(f'scopegate_unlisted_total{{access="writes",result="{result}"}}') == count


async def test_a_flood_of_reads_leaves_writes_and_refusals_their_own_records(
    open_house: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(floods, "BURST", 2)
    monkeypatch.setattr(floods, "PER_SECOND", 0.0)
    house = await unlisted(open_house, reads="record", writes="record")
    await asyncio.gather(*(house.data("GET", "/x") for _ in range(6)))
    await house.data("POST", "/y")
    await house.execute(None)
    events = Counter(
        (record["event"], record["decision_inputs"].get("method"), record["details"].get("count"))
        for record in await house.records()
    )
    assert events == {
        ("unlisted", "GET", None): 2,
        ("unlisted", None, 4): 1,
        ("unlisted", "POST", None): 1,
        ("refused", None, None): 1,
    }


async def test_a_summary_of_one_is_an_ordinary_record(
    open_house: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(floods, "BURST", 0)
    house = await unlisted(open_house, writes="record")
    await house.data("DELETE", "/pods/cart-0", ID)
    (record,) = await house.records()
    assert without_place(record) == PASSED


# The log ---------------------------------------------------------------------------------------------


async def test_the_log_verifies_and_replay_has_nothing_to_decide_again(open_house: Open) -> None:
    house = await unlisted(open_house, reads="refuse", writes="record")
    for method in ("POST", "GET", "DELETE"):
        await house.data(method, "/x")
    await house.execute(await house.issue())
    await house.sidecar.store.until_idle()
    assert verify_sqlite(house.database).records == 6
    findings = [*replayed(house.database, Replay(POLICIES), lambda done, total: None)]
    assert [(found.what, found.kind) for found in findings] == [
        ("grant", "unchanged"),
        ("execute", "unchanged"),
    ]


async def test_the_path_can_be_masked(open_house: Open) -> None:
    house = await open_house(gate={"unlisted": {"writes": "record"}}, log={"mask": ["/decision_inputs/path"]})
    await house.data("POST", "/secret/x")
    (record,) = await house.records("&event=unlisted")
    assert (record["decision_inputs"]["method"], record["decision_inputs"]["path"]) == ("POST", "[masked]")


async def test_lists_find_unlisted_requests_by_event_tenant_and_request(open_house: Open) -> None:
    house = await open_house(gate={"unlisted": {"writes": "record"}, "tenant_header": "X-Tenant"})
    await house.data("POST", "/x", [("X-Tenant", "one"), *ID])
    await house.data("POST", "/y", [("X-Tenant", "two")])
    await house.data("POST", "/z")
    for query, paths in {
        "&event=unlisted": ["/z", "/y", "/x"],
        "&event=unlisted&tenant_id=one": ["/x"],
        "&event=unlisted&outcome=selected&type=policy": ["/z", "/y", "/x"],
        "&request_id=req_1": ["/x"],
        "&event=refused": [],
    }.items():
        assert [one["decision_inputs"]["path"] for one in await house.records(query)] == paths
    assert {one["tenant_id"] for one in await house.records()} == {"one", "two", "default"}


# Clients and deadlines -------------------------------------------------------------------------------


async def test_a_client_that_leaves_before_its_record_is_committed_sends_nothing_on(
    open_house: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = await unlisted(open_house, writes="record")
    engine, begun, may_commit = house.sidecar.store.engine, asyncio.Event(), asyncio.Event()
    transact = engine.transact

    async def held_up(*arguments: Any, **options: Any) -> None:
        begun.set()
        await may_commit.wait()
        await transact(*arguments, **options)

    monkeypatch.setattr(engine, "transact", held_up)
    _, writer = await connect(house.sidecar.data_address)
    writer.write(request_bytes("POST", "/x", [("Content-Length", "1")], b"x"))
    await begun.wait()
    (connection,) = house.sidecar._data_server.connections
    reset(writer)
    await eventually(lambda: connection.transport is None)
    may_commit.set()
    await house.sidecar.store.until_idle()
    assert (await house.data("GET", "/y")).status == 200
    assert arrived(house) == [("GET", "/y")]


async def test_a_record_that_hangs_ends_with_the_outer_deadline(
    open_house: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = await unlisted(open_house, writes="record")

    async def hang(*arguments: Any) -> str:
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr(house.sidecar.unlisted_log, "record", hang)
    monkeypatch.setattr(deadlines, "judging_seconds", lambda settings: 0.05)
    answer = await house.data("POST", "/x")
    assert error_of(answer) == (503, "store_unavailable")
    assert house.backend.seen == []


# Exceptions ------------------------------------------------------------------------------------------

EXCEPTED = ["/healthz", "**/login", "/static/{file}/raw", "/openapi.json", "/openapi"]


@pytest.mark.parametrize(
    "target",
    [
        "/healthz",
        "/healthz?deep=1",
        "/login",
        "/app/login",
        "/static/x/raw",
        "/static/%78/raw",
        "/openapi.json",
    ],
)
async def test_an_excepted_path_passes_with_every_method_and_no_record(open_house: Open, target: str) -> None:
    house = await unlisted(open_house, reads="refuse", writes="refuse", **{"except": EXCEPTED})
    for method in ("GET", "POST", "DELETE"):
        assert (await house.data(method, target)).status == 200
    assert len(house.backend.seen) == 3
    assert await house.records() == []


@pytest.mark.parametrize(
    "target",
    [
        "/healthz2",
        "/a/healthz",
        "/healthz/x",
        "/Healthz",
        "/%68ealthz",
        "/healthz/",
        "//healthz",
        "/healthz/../admin",
        "/admin/../healthz",
        "/admin;/healthz",
        "/healthz;x=1",
        "/healthz%3fx",
        "/healthz%00/admin",
        "/healthz.json",
        "/admin%2flogin",
        "/admin/..%2flogin",
        "/admin%3f/login",
        "/admin%23/login",
        "/admin;/login",
        "/admin\\login",
        "/static/../raw",
        "/static/..%2f..%2fadmin/raw",
        "/static/a%2fb/raw",
        "/static//raw",
        "/static/./raw",
        "http://h/healthz",
    ],
)
async def test_a_path_with_a_reading_that_is_not_excepted_does_not_pass(
    open_house: Open, target: str
) -> None:
    house = await unlisted(open_house, reads="refuse", writes="refuse", **{"except": EXCEPTED})
    assert error_of(await house.data("POST", target)) == (403, "not_listed")
    assert house.backend.seen == []


@pytest.mark.parametrize(
    "headers",
    [
        [("X-Original-URL", "/admin")],
        [("X_Rewrite_Url", "/admin")],
        [("X-Forwarded-Uri", "/login, /admin")],
        [("X-Forwarded-Prefix", "/admin")],
        [("X-Forwarded-Prefix", "/app"), ("X-Forwarded-Prefix", "/other")],
        [("X-Forwarded-Host", "h/admin?")],
        [("Script-Name", "/app")],
        [("X-Original-URL", "/login")] * 9,
    ],
)
async def test_a_header_that_may_lead_elsewhere_ends_an_exception(
    open_house: Open, headers: HeaderList
) -> None:
    house = await unlisted(open_house, reads="refuse", **{"except": ["/healthz", "/login"]})
    assert error_of(await house.data("GET", "/login", headers)) == (403, "not_listed")
    assert house.backend.seen == []


@pytest.mark.parametrize(
    "headers",
    [
        [("X-Forwarded-Host", "gate.example"), ("X-Forwarded-Proto", "https"), ("X-Forwarded-Port", "443")],
        [("X-Original-URI", "/app/login?next=/")],
        [("X-Forwarded-Prefix", "/app/")],
        [("X-HTTP-Method-Override", "PUT")],
    ],
)
async def test_the_headers_of_ordinary_proxies_leave_an_exception_in_force(
    open_house: Open, headers: HeaderList
) -> None:
    house = await unlisted(open_house, reads="refuse", writes="refuse", **{"except": ["**/login"]})
    assert (await house.data("GET", "/login", headers)).status == 200


async def test_a_prefix_that_is_taken_off_an_excepted_path_ends_the_exception(open_house: Open) -> None:
    house = await unlisted(open_house, reads="refuse", **{"except": ["/app/login", "/app/app/login"]})
    prefixed = [("X-Forwarded-Prefix", "/app")]
    assert error_of(await house.data("GET", "/app/login", prefixed)) == (403, "not_listed")


async def test_an_exception_never_opens_what_a_route_lists(open_house: Open) -> None:
    house = await unlisted(open_house, writes="refuse", **{"except": [EXECUTE, "**/execute"]})
    assert error_of(await house.execute(None)) == (400, "scoped_execution_required")
    assert error_of(await house.data("POST", "/api/v1//recovery/execute")) == (400, "ambiguous_path")
    assert house.backend.seen == []


async def test_an_excepted_websocket_is_tunnelled_unrecorded(open_house: Open) -> None:
    house = await unlisted(open_house, reads="refuse", **{"except": ["/socket"]})
    assert (await house.data("GET", "/socket", SWITCHING)).status == 200  # the backend declines the upgrade
    assert await house.records() == []


# What is said about it -------------------------------------------------------------------------------


async def test_the_start_and_the_status_say_what_becomes_of_them(
    open_house: Open, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    house = await unlisted(open_house, reads="record", writes="refuse", **{"except": ["/healthz"]})
    (line,) = [one for one in caplog.records if one.getMessage().startswith("what becomes of requests")]
    told = vars(line)
    assert (line.levelname, told["reads"], told["writes"]) == ("INFO", "record", "refuse")
    assert told["excepted"] == ["/healthz"]
    status = (await house.admin("GET", "/api/v1/status")).json()
    assert status["unlisted"] == {"reads": "record", "writes": "refuse", "excepted": ["/healthz"]}


async def test_the_access_log_names_the_record(open_house: Open, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "scopegate.access")
    house = await unlisted(open_house, reads="refuse", writes="record")
    await house.data("POST", "/x")
    await house.data("GET", "/x")
    refused, passed = await house.records()
    lines = [vars(record) for record in caplog.records]
    assert [(one["route"], one["status"], one["outcome"], one["decision_id"]) for one in lines] == [
        ("passed", 200, "answered", passed["decision_id"]),
        ("passed", 403, "not_listed", refused["decision_id"]),
    ]
