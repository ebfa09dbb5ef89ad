"""What somebody might try who wants to execute unseen, to starve the gate, or to fill its disk."""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest

from sidecar.core.facts import read
from sidecar.errors import StoreUnavailable
from sidecar.gate import floods
from sidecar.web.serving.body import PARSERS
from tests.client import as_json, ask, connect, read_message, request_bytes
from tests.gate.test_store_faults import SlowStore
from tests.support import EXECUTE, SCOPES, Backend, Open, eventually, replies
from tests.support import House as House

SWITCHING = [("Connection", "Upgrade"), ("Upgrade", "websocket"), ("Sec-WebSocket-Version", "13")]


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "POST"])
async def test_a_gated_path_is_never_tunnelled(house: House, backend: Backend, method: str) -> None:
    answer = await house.data(method, EXECUTE, SWITCHING)
    assert answer.status == 400
    assert backend.seen == []
    (record,) = await house.records()
    assert record["decision_reason"] == "upgrade_refused"
    if method != "HEAD":
        assert answer.json()["error"] == "upgrade_refused"
        assert answer.json()["decision_id"] == record["decision_id"]


async def test_a_websocket_with_a_body_is_refused_and_not_an_error(house: House, backend: Backend) -> None:
    answer = await house.data("GET", "/ws", SWITCHING, b"12345")
    assert (answer.status, answer.json()["error"]) == (400, "upgrade_refused")
    assert backend.seen == []


async def test_streams_that_never_end_leave_connections_to_the_gate(
    open_house: Open, backend: Backend
) -> None:
    house = await open_house(upstream={"max_connections": 4, "connect_timeout_seconds": 0.2})
    scope = await house.issue(max_attempts=2)
    release = asyncio.Event()
    backend.script = replies(after=release)
    waiting = [asyncio.create_task(house.data("GET", f"/events/{number}")) for number in range(3)]
    await eventually(lambda: len(backend.seen) == 3)
    backend.script = replies()
    assert (await house.execute(scope)).status == 200
    turned_away = await house.data("GET", "/events/4")
    assert (turned_away.status, turned_away.json()["error"]) == (503, "overloaded")
    assert turned_away.header("Retry-After") == "1"
    release.set()
    assert [answer.status for answer in await asyncio.gather(*waiting)] == [200, 200, 200]
    assert (await house.data("GET", "/events/5")).status == 200


async def test_the_log_keeps_the_parameters_of_a_small_body_and_the_digest_of_a_large_one(
    house: House, backend: Backend
) -> None:
    scope = await house.issue(max_attempts=2)
    for size, kept in ((15_000, True), (200_000, False)):
        kind, body = house.execution(scope, parameters={"note": "x" * size})
        answer = await house.data("POST", EXECUTE, kind, body)
        assert answer.status == 200
        assert backend.executions[-1].body == body
        inputs = (await house.record(answer.header("Scopegate-Decision-Id") or ""))["decision_inputs"]
        assert ("parameters" in inputs) is kept
        assert inputs["body_sha256"] == hashlib.sha256(body).hexdigest()
        if not kept:
            assert inputs["parameters_left_out"] == {"body_bytes": len(body)}


async def test_a_large_body_is_read_in_a_thread_of_its_own(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: dict[str, list[bool]] = {"body.parse": [], "data._reading.read": []}

    def noted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            threads[name].append(threading.current_thread() is threading.main_thread())
            return call(*arguments)

        return run

    parse, size = PARSERS["json"]
    monkeypatch.setitem(PARSERS, "json", (noted("body.parse", parse), size))
    monkeypatch.setattr("sidecar.web.data._reading.read", noted("data._reading.read", read))
    small = await house.execute(None, parameters={"a": [1.5]})
    large = await house.execute(None, parameters={"a": [1.5] * 20_000})
    for answer in (small, large):
        assert answer.json()["error"] == "scoped_execution_required"
    assert threads == {"body.parse": [True, False], "data._reading.read": [True, False]}


async def test_probing_readiness_does_not_let_the_write_ahead_log_grow(house: House) -> None:
    with mock.patch("sidecar.store.sqlite.ROWS_PER_CHECKPOINT", 50):
        for _ in range(400):
            await house.sidecar.store.check()
    footprint = await house.sidecar.store.engine.footprint(house.clock())
    assert footprint.wal_size is not None
    assert footprint.wal_size < 60 * 3 * 4200


async def test_a_flood_of_revocations_of_nothing_is_summed_up(house: House) -> None:
    with mock.patch.object(floods, "BURST", 5), mock.patch.object(floods, "PER_SECOND", 0.0):
        answers = await asyncio.gather(*(house.data("DELETE", f"{SCOPES}scope_{n}") for n in range(60)))
        assert {answer.status for answer in answers} == {404}
        records = await house.records()
    ids = {answer.json()["decision_id"] for answer in answers}
    assert ids == {record["decision_id"] for record in records}
    assert sum(record["details"].get("count", 1) for record in records) == 60
    assert len(records) <= 6


@pytest.mark.parametrize(
    "header", ["X_Scope", "x_scope", "X_Tenant", "Content_Type", "Content_Length", "Transfer_Encoding"]
)
async def test_a_header_that_cgi_would_read_as_a_judged_one_is_refused(
    open_house: Open, backend: Backend, header: str
) -> None:
    route = {"path": "**/recovery/execute", "scope_id": "header:X-Scope"}
    house = await open_house(gate={"routes": [route], "tenant_header": "X-Tenant"})
    scope = await house.issue(headers=[("X-Tenant", "a")], max_attempts=2)
    judged = [("X-Tenant", "a"), ("X-Scope", scope["scope_id"])]
    refused = await house.execute(scope, scope_id=..., headers=[*judged, (header, "1")])
    assert (refused.status, refused.json()["error"]) == (400, "invalid_request")
    assert refused.json()["member"] == f"header:{header}"
    assert backend.seen == []
    admitted = await house.execute(scope, scope_id=..., headers=[*judged, ("X_Other", "1")])
    assert admitted.status == 200


@pytest.mark.parametrize(
    "twin", ["INCIDENT=x", "incident[]=x", "incident.a=x", "a=1;incident=x", "incident%5B%5D=x"]
)
async def test_a_query_name_that_can_be_read_as_a_judged_one_is_refused(
    open_house: Open, backend: Backend, twin: str
) -> None:
    route = {"path": "**/recovery/execute", "incident_id": "query:incident"}
    house = await open_house(gate={"routes": [route]})
    scope = await house.issue(max_attempts=2)
    target = f"{EXECUTE}?incident=inc_1"
    refused = await house.execute(scope, target=f"{target}&{twin}", incident_id=...)
    assert (refused.status, refused.json()["error"]) == (400, "invalid_request")
    assert backend.seen == []
    assert (await house.execute(scope, target=f"{target}&incidents=2&other=1", incident_id=...)).status == 200


async def test_an_admission_that_commits_as_the_drain_ends_is_given_back(open_house: Open) -> None:
    house = await open_house(store={"deadline_seconds": 2}, shutdown={"drain_seconds": 0.1})
    scope = await house.issue()
    with SlowStore(house) as store:
        asked = asyncio.create_task(house.execute(scope))
        await store.entered.wait()
        stopping = asyncio.create_task(house.sidecar.stop())
        await asyncio.sleep(0.25)
        store.free.set()
        answer = await asked
        await stopping
    assert (answer.status, answer.json()["error"]) == (503, "draining")
    again = await open_house()
    (execution,) = (await again.admin("GET", "/api/v1/executions")).json()["executions"]
    assert (execution["status"], execution["cause"]) == ("not_sent", "the sidecar shut down")
    assert (await again.scope(scope))["attempts_remaining"] == 1


async def test_a_client_that_does_not_read_does_not_make_an_answer_unknown(
    open_house: Open, backend: Backend
) -> None:
    house = await open_house(gate={"max_answer_bytes": 1000}, upstream={"response_timeout_seconds": 2})
    scope = await house.issue()
    backend.script = replies(b"x" * 40_000_000)
    kind, body = as_json({**json.loads(house.execution(scope)[1])})
    reader, writer = await connect(house.sidecar.data_address)
    writer.write(request_bytes("POST", EXECUTE, kind, body))
    await eventually(lambda: len(backend.executions) == 1)
    decision_id = backend.executions[0].header("Scopegate-Decision-Id") or ""
    assert (await house.ended(decision_id))["status"] == "answered"  # though nobody has read it
    answer = await read_message(reader)
    assert answer is not None
    assert not answer.whole
    writer.close()


async def test_a_request_id_that_is_no_text_does_not_reach_the_store(open_house: Open) -> None:
    house = await open_house(scopes={"serve_on": "admin"})
    kind, body = as_json({"incident_id": "inc_1", "action": "retry_agent", "intent": "a test"})
    headers = [*kind, ("X-Request-Id", "\xff\xfe")]
    address = house.sidecar.admin_address
    answer = await ask(address, "POST", "/api/v1/recovery/scope", headers, body)
    assert answer.status == 201
    (record,) = await house.records()
    assert record["request_id"] == answer.header("X-Request-Id")


@pytest.mark.parametrize(
    "name",
    [
        "scope.id",
        "scope id",
        "scope[id",
        " scope_id",
        "scope_id%00x",
        "x=1;scope.id",
        "SCOPE_ID",
        "scope_id[a]",
    ],
)
async def test_a_query_name_that_php_reads_as_a_judged_one_is_refused(
    open_house: Open, backend: Backend, name: str
) -> None:
    house = await open_house(gate={"routes": [{"path": "**/recovery/execute", "scope_id": "query:scope_id"}]})
    scope = await house.issue(max_attempts=2)
    target = f"{EXECUTE}?scope_id={scope['scope_id']}"
    refused = await house.execute(scope, target=f"{target}&{name.replace(' ', '+')}=s2", scope_id=...)
    assert (refused.status, refused.json()["error"]) == (400, "invalid_request")
    assert backend.seen == []
    assert (await house.execute(scope, target=f"{target}&scopes=2", scope_id=...)).status == 200


@pytest.mark.parametrize("target", [EXECUTE, "/elsewhere", "/api/v1/recovery/scope"])
async def test_the_connection_ends_with_an_upgrade_that_did_not_happen(house: House, target: str) -> None:
    reader, writer = await connect(house.sidecar.data_address)
    writer.write(request_bytes("POST", target, [("Connection", "Upgrade"), ("Upgrade", "websocket")], b"{}"))
    async with asyncio.timeout(5):
        answer = await read_message(reader)
        assert answer is not None
        assert answer.status >= 400
        assert answer.header("Connection") == "close"
        assert await reader.read() == b""
    writer.close()


async def test_a_client_that_never_reads_does_not_hold_its_connection_for_ever(
    open_house: Open, backend: Backend
) -> None:
    house = await open_house(gate={"max_answer_bytes": 1000}, upstream={"response_timeout_seconds": 0.3})
    scope = await house.issue()
    backend.script = replies(b"x" * 40_000_000)
    kind, body = house.execution(scope)
    _, writer = await connect(house.sidecar.data_address)
    writer.write(request_bytes("POST", EXECUTE, kind, body))
    await eventually(lambda: len(backend.executions) == 1)
    await eventually(lambda: not house.sidecar._data_server.connections)
    writer.close()


async def test_a_grant_that_the_store_does_not_confirm_is_counted(house: House) -> None:
    scope = await house.issue()
    with mock.patch.object(house.sidecar.store.engine, "transact", side_effect=StoreUnavailable("gone")):
        for answer in (await house.ask_for_scope(), await house.revoke(scope)):
            assert (answer.status, answer.json()["error"]) == (503, "store_unavailable")
            assert answer.header("Retry-After") == "1"
            assert "decision_id" not in answer.json()
    assert await house.metric('scopegate_unrecorded_refusals_total{reason="store_unavailable"}') == 2
