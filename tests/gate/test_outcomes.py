"""How executions end: what the backend does, what the client gets, and what is recorded."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from sidecar.core.policy import ActionPolicy, PolicySet, RiskClass
from sidecar.gate import deadlines
from tests.client import Message, connect, request_bytes
from tests.support import EXECUTE, Backend, House, Open, replies, sends, unused_port

LONG = b"x" * 300_000


async def settled_record(house: House, decision_id: str) -> dict[str, Any]:
    (found,) = [record for record in await house.records() if record["admission_id"] == decision_id]
    return found


def assert_problem(answer: Message, status: int, error: str) -> dict[str, Any]:
    assert answer.status == status, answer.body
    assert answer.header("Content-Type") == "application/problem+json"
    body: dict[str, Any] = answer.json()
    assert body["error"] == error
    assert body["status"] == status
    assert body["type"]
    assert body["title"]
    assert body["detail"]
    assert body["message"]
    return body


async def test_an_answer_is_passed_on_and_the_attempt_is_consumed(house: House) -> None:
    scope = await house.issue(max_attempts=2)
    answer = await house.execute(scope)
    assert answer.status == 200
    assert answer.json() == {"done": True}
    assert answer.header("Scopegate-Scope-Status") == "active"
    assert answer.header("Scopegate-Attempts-Remaining") == "1"
    execution = await house.ended(answer.header("Scopegate-Decision-Id") or "")
    assert execution["status"] == "answered"
    assert execution["http_status"] == 200


async def test_a_settled_record_is_a_recovery_with_an_id_of_its_own(house: House) -> None:
    answer = await house.execute(await house.issue())
    decision_id = answer.header("Scopegate-Decision-Id") or ""
    record = await settled_record(house, decision_id)
    assert record["decision_type"] == "recovery"
    assert record["decision_outcome"] == "selected"
    assert record["event"] == "settled"
    assert record["decision_id"] != decision_id
    assert record["details"]["admission_id"] == decision_id


async def test_an_admission_is_recorded_as_a_policy_decision(house: House) -> None:
    answer = await house.execute(await house.issue(), parameters={"depth": 3})
    record = await house.record(answer.header("Scopegate-Decision-Id") or "")
    assert record["decision_type"] == "policy"
    assert record["decision_source"] == "system"
    assert record["decision_trigger"] == "explicit"
    assert record["causal_role"] == "in_run"
    assert record["decision_outcome"] == "selected"
    assert record["decision_inputs"]["policy_id"] == "scoped_execution"
    assert record["decision_inputs"]["parameters"] == {"depth": 3}
    assert record["event"] == "admitted"
    assert record["origin"] == "gate"
    assert record["action"] == "retry_agent"
    assert record["incident_id"] == "inc_1"
    assert record["outcome"] == "answered"


@pytest.mark.parametrize("status", ["500 Internal Server Error", "503 Service Unavailable", "404 Not Found"])
async def test_an_error_of_the_backend_is_an_answer(house: House, backend: Backend, status: str) -> None:
    backend.script = replies(b"broken", status=status, headers=[("X-Why", "disk")])
    scope = await house.issue()
    answer = await house.execute(scope)
    assert answer.status == int(status[:3])
    assert answer.body == b"broken"
    assert answer.header("X-Why") == "disk"
    assert answer.header("Scopegate-Scope-Status") == "exhausted"
    execution = await house.ended(answer.header("Scopegate-Decision-Id") or "")
    assert (execution["status"], execution["http_status"]) == ("answered", int(status[:3]))


async def test_a_redirect_is_passed_on_and_not_followed(house: House, backend: Backend) -> None:
    backend.script = replies(b"", status="307 Temporary Redirect", headers=[("Location", "/elsewhere")])
    answer = await house.execute(await house.issue())
    assert (answer.status, answer.header("Location")) == (307, "/elsewhere")
    assert len(backend.seen) == 1


async def test_a_refused_connection_gives_attempt_and_hold_back(open_house: Open) -> None:
    house = await open_house(upstream_port=unused_port())
    scope = await house.issue(action="failover", max_cost_usd=0.1)
    for _ in range(2):
        answer = await house.execute(scope)
        body = assert_problem(answer, 502, "upstream_unreachable")
        execution = await house.ended(body["decision_id"])
        assert execution["status"] == "not_sent"
        assert execution["cost_usd"] == 0
        listed = await house.scope(scope)
        assert (listed["attempts_used"], listed["cost_used_usd"], listed["status"]) == (0, 0, "active")
    record = await settled_record(house, body["decision_id"])
    assert record["decision_outcome"] == "none"


async def test_a_connection_that_does_not_come_about_in_time_is_not_sent(open_house: Open) -> None:
    # A backend whose one connection is taken: the next has to wait for it.
    house = await open_house(
        upstream={"connect_timeout_seconds": 0.1, "max_connections": 1, "response_timeout_seconds": 5}
    )
    release = asyncio.Event()
    house.backend.script = replies(after=release)
    scope = await house.issue(max_attempts=2)
    first = asyncio.create_task(house.execute(scope))
    await house.backend.arrived.wait()
    body = assert_problem(await house.execute(scope), 502, "upstream_unreachable")
    assert (await house.ended(body["decision_id"]))["status"] == "not_sent"
    release.set()
    assert (await first).status == 200
    assert len(house.backend.seen) == 1


@pytest.mark.parametrize("begun", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf"])
async def test_a_backend_that_hangs_is_unknown_and_keeps_attempt_and_hold(
    open_house: Open, begun: bytes
) -> None:
    house = await open_house(upstream={"response_timeout_seconds": 0.15})
    house.backend.script = sends(begun, then="hang")
    scope = await house.issue(action="failover", max_attempts=1)
    body = assert_problem(await house.execute(scope), 504, "upstream_timeout")
    execution = await house.ended(body["decision_id"])
    assert (execution["status"], execution["cost_usd"]) == ("unknown", None)
    listed = await house.scope(scope)
    assert (listed["attempts_used"], listed["cost_used_usd"]) == (1, 0.1)
    assert (await settled_record(house, body["decision_id"]))["decision_outcome"] == "none"


async def test_a_dripping_answer_is_bounded_to_its_last_byte(open_house: Open) -> None:
    house = await open_house(upstream={"response_timeout_seconds": 0.2})
    drip = [piece for _ in range(40) for piece in (b"x", 0.02)]
    house.backend.script = sends(b"HTTP/1.1 200 OK\r\nContent-Length: 40\r\n\r\n", *drip)
    assert_problem(await house.execute(await house.issue()), 504, "upstream_timeout")


async def test_the_timeout_of_an_action_replaces_that_of_the_upstream(house: House, backend: Backend) -> None:
    backend.script = sends(then="hang")
    answer = await house.execute(await house.issue(action="patient"))
    assert_problem(answer, 504, "upstream_timeout")


@pytest.mark.parametrize(
    ("begun", "then"),
    [
        (b"", "reset"),
        (b"", "close"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf", "close"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf", "reset"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n", "close"),
        (b"this is not HTTP\r\n\r\n", "stay"),
    ],
)
async def test_a_lost_answer_is_unknown_and_keeps_the_attempt(
    house: House, backend: Backend, begun: bytes, then: str
) -> None:
    backend.script = sends(begun, then=then)
    scope = await house.issue(action="failover")
    body = assert_problem(await house.execute(scope), 502, "upstream_failed")
    assert (await house.ended(body["decision_id"]))["status"] == "unknown"
    assert len(backend.seen) == 1
    listed = await house.scope(scope)
    assert (listed["attempts_used"], listed["cost_used_usd"]) == (1, 0.1)


async def test_an_undelivered_answer_tells_the_decision_and_the_scope(house: House, backend: Backend) -> None:
    backend.script = sends(then="reset")
    answer = await house.execute(await house.issue())
    assert answer.header("Scopegate-Decision-Id") == answer.json()["decision_id"]
    assert answer.header("Scopegate-Scope-Status") == "exhausted"
    assert answer.header("X-Request-Id")


# Long answers -------------------------------------------------------------------------------------------


async def test_a_long_answer_streams_whole_and_settles_at_its_end(open_house: Open) -> None:
    house = await open_house(gate={"max_answer_bytes": 1000})
    house.backend.script = replies(LONG, headers=[("X-Recovery-Cost-USD", "0.2")])
    scope = await house.issue(action="failover", max_attempts=3)
    answer = await house.execute(scope)
    assert (answer.status, answer.body, answer.whole) == (200, LONG, True)
    execution = await house.ended(answer.header("Scopegate-Decision-Id") or "")
    assert (execution["status"], execution["cost_usd"]) == ("answered", 0.2)


async def test_a_long_answer_tells_the_status_of_its_scope_as_of_its_head(open_house: Open) -> None:
    house = await open_house(gate={"max_answer_bytes": 1000})
    answers = replies(LONG)

    async def after_a_minute(request: Message, writer: asyncio.StreamWriter) -> None:
        house.clock.move(61)
        await answers(request, writer)

    house.backend.script = after_a_minute
    answer = await house.execute(await house.issue(max_attempts=3, ttl_seconds=60))
    assert (answer.status, answer.header("Scopegate-Scope-Status")) == (200, "expired")


async def test_a_long_answers_head_and_first_bytes_come_before_its_end(open_house: Open) -> None:
    house = await open_house(gate={"max_answer_bytes": 10})
    goes_on = asyncio.Event()

    async def script(request: Message, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n" + b"a" * 50)
        await goes_on.wait()
        writer.write(b"b" * 50)

    house.backend.script = script
    scope = await house.issue()
    reader, writer = await connect(house.sidecar.data_address)
    kind, body = house.execution(scope)
    writer.write(request_bytes("POST", EXECUTE, kind, body))
    head = await reader.readuntil(b"\r\n\r\n")
    assert await reader.readexactly(50) == b"a" * 50
    (execution,) = (await house.admin("GET", "/api/v1/executions?status=in_flight")).json()["executions"]
    assert execution["scope_id"] == scope["scope_id"]
    goes_on.set()
    assert await reader.readexactly(50) == b"b" * 50
    writer.close()
    assert b"scopegate-decision-id" in head.lower()
    assert (await house.ended(execution["decision_id"]))["status"] == "answered"


@pytest.mark.parametrize("then", ["close", "reset", "hang"])
async def test_a_long_answer_that_is_cut_is_unknown_and_the_client_sees_the_cut(
    open_house: Open, then: str
) -> None:
    house = await open_house(gate={"max_answer_bytes": 1000}, upstream={"response_timeout_seconds": 0.2})
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 300000\r\n\r\n"
    house.backend.script = sends(head + LONG[:100_000], 0.02, then=then)
    scope = await house.issue(action="failover")
    answer = await house.execute(scope)
    assert answer.status == 200
    assert not answer.whole
    execution = await house.ended(answer.header("Scopegate-Decision-Id") or "")
    assert execution["status"] == "unknown"
    assert (await house.scope(scope))["cost_used_usd"] == 0.1


async def test_a_client_that_leaves_a_long_answer_does_not_stop_its_settlement(open_house: Open) -> None:
    house = await open_house(gate={"max_answer_bytes": 1000})
    goes_on = asyncio.Event()

    async def script(request: Message, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 8000000\r\nX-Recovery-Cost-USD: 0.3\r\n\r\n")
        writer.write(bytes(2_000_000))
        await goes_on.wait()
        for _ in range(6):
            writer.write(bytes(1_000_000))
            await writer.drain()

    house.backend.script = script
    scope = await house.issue(action="failover")
    reader, writer = await connect(house.sidecar.data_address)
    kind, body = house.execution(scope)
    writer.write(request_bytes("POST", EXECUTE, kind, body))
    await reader.readuntil(b"\r\n\r\n")
    writer.transport.abort()
    goes_on.set()
    (execution,) = (await house.admin("GET", "/api/v1/executions")).json()["executions"]
    ended = await house.ended(execution["decision_id"])
    assert (ended["status"], ended["cost_usd"]) == ("answered", 0.3)


async def test_a_fault_of_the_sidecar_itself_leaves_no_execution_in_flight(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> int:
        raise RuntimeError("a fault of our own")

    monkeypatch.setattr("sidecar.gate.execution.reported_cost", fails)
    answer = await house.execute(await house.issue())
    assert_problem(answer, 500, "internal_error")
    (admitted,) = [record for record in await house.records() if record["event"] == "admitted"]
    execution = await house.ended(admitted["decision_id"])
    assert (execution["status"], execution["cause"]) == ("unknown", "the sidecar failed")
    assert (await settled_record(house, admitted["decision_id"]))["decision_outcome"] == "none"


# The outer deadline -------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Bounds of a sidecar whose outer deadlines pass soon, but not before a busy machine is through."""
    monkeypatch.setattr(deadlines, "MARGIN_SECONDS", 0.2)
    return {
        "store": {"deadline_seconds": 0.5},
        "upstream": {"connect_timeout_seconds": 0.5, "response_timeout_seconds": 0.5},
        "gate": {"max_answer_bytes": 1_000, "body_timeout_seconds": 0.5},
    }


@pytest.mark.parametrize("listed", ["globs", "unlisted"])
async def test_the_outer_deadline_knows_the_timeout_of_an_action_without_an_entry_of_its_own(
    open_house: Open, monkeypatch: pytest.MonkeyPatch, listed: str
) -> None:
    monkeypatch.setattr(deadlines, "MARGIN_SECONDS", 0)
    # Without the action's timeout the outer deadline would pass after 0.6 seconds.
    house = await open_house(
        store={"deadline_seconds": 0.2},
        upstream={"connect_timeout_seconds": 0.1, "response_timeout_seconds": 0.1},
    )
    entry = ActionPolicy(risk=RiskClass.LOW, timeout_seconds=5)
    house.adopt(
        PolicySet(revision="r", actions={}, globs={"restart_*": entry})
        if listed == "globs"
        else PolicySet(revision="r", actions={}, unlisted=entry)
    )
    house.backend.script = replies(after=0.8)
    scope = await house.issue(action="restart_pod")
    assert (await house.execute(scope, action="restart_pod")).status == 200


async def hangs(*args: object, **options: object) -> Any:
    """As a future that nothing resolves; being cancelled does not help."""
    while True:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if asyncio.current_task() in leaving:
                raise


leaving: set[asyncio.Task[Any] | None] = set()


@pytest.fixture
async def let_go() -> AsyncIterator[None]:
    """What hangs for good is let go with the test."""
    yield
    leaving.update(asyncio.all_tasks())
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        if task.get_name() == "scopegate-execution":
            task.cancel()
    await asyncio.sleep(0)
    leaving.clear()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "status", "error", "ending"),
    [
        ("sidecar.gate.execution.Gate._admit", 503, "store_unavailable", None),
        ("sidecar.gate.execution.Gate._forward", 502, "upstream_unreachable", "not_sent"),
        ("sidecar.upstream.Upstream.send", 504, "upstream_timeout", "unknown"),
        ("sidecar.upstream.Exchange.read_up_to", 504, "upstream_timeout", "unknown"),
        ("sidecar.gate.settlement.Settlements.settle", 504, "upstream_timeout", "unknown"),
    ],
)
async def test_what_hangs_for_good_is_ended_by_the_outer_deadline(
    open_house: Open,
    quick: dict[str, Any],
    let_go: None,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    status: int,
    error: str,
    ending: str | None,
) -> None:
    house = await open_house(**quick)
    scope = await house.issue(action="failover", max_attempts=2)
    with monkeypatch.context() as patch:
        patch.setattr(place, hangs)
        body = assert_problem(await house.execute(scope), status, error)
    assert house.sidecar.gate.in_flight == 0
    if ending is not None:
        execution = await house.ended(body["decision_id"])
        assert (execution["status"], execution["cause"]) == (ending, "it did not end in time")
    assert (await house.scope(scope))["attempts_used"] == (ending == "unknown")
    assert (await house.execute(scope)).status == 200


@pytest.mark.slow
@pytest.mark.parametrize("before", [False, True])
async def test_after_a_pause_of_the_whole_process_an_execution_is_not_said_to_have_been_refused(
    open_house: Open, quick: dict[str, Any], before: bool
) -> None:
    house = await open_house(**quick)
    if before:
        # The data listener's deadline of this request passes later than its execution's deadline. So the
        # timer of the former is older than that of the latter when the next request comes.
        await house.execute(await house.issue())
        await asyncio.sleep(2.4)

    def stop_the_process() -> None:
        time.sleep(4)  # as when a container is paused: every deadline has passed when the loop goes on

    async def pauses(request: Message, writer: asyncio.StreamWriter) -> None:
        stop_the_process()

    house.backend.script = pauses
    body = assert_problem(await house.execute(await house.issue()), 504, "upstream_timeout")
    assert (await house.ended(body["decision_id"]))["status"] == "unknown"


@pytest.mark.slow
async def test_a_refusal_whose_record_hangs_is_answered_in_time(
    open_house: Open, quick: dict[str, Any], let_go: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = await open_house(**quick)
    other = await house.issue(incident_id="inc_2")

    async def never(*args: object, **options: object) -> Any:
        await asyncio.Event().wait()

    with monkeypatch.context() as patch:
        patch.setattr("sidecar.store.batch.Store.submit", never)
        answers = [
            await house.data("POST", EXECUTE, [("Content-Type", "text/plain")], b"hello"),
            await house.data("PUT", EXECUTE),
            await house.execute(None),
            await house.execute(other, incident_id="inc_1"),
        ]
    assert [answer.status for answer in answers] == [503] * 4
    assert all(answer.header("Retry-After") for answer in answers)
    assert house.sidecar.gate.in_flight == 0
    assert house.backend.seen == []
    assert (await house.execute(other)).status == 200


async def test_an_answer_that_hangs_while_it_streams_is_cut(
    open_house: Open, quick: dict[str, Any], let_go: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = await open_house(**quick)
    house.backend.script = replies(LONG)
    scope = await house.issue()
    with monkeypatch.context() as patch:
        patch.setattr("sidecar.gate.execution.Gate._pass_on", hangs)
        answer = await house.execute(scope)
    assert (answer.status, answer.whole) == (200, False)
    assert house.sidecar.gate.in_flight == 0
    execution = await house.ended(answer.header("Scopegate-Decision-Id") or "")
    assert execution["status"] == "unknown"


async def test_a_client_that_reads_now_and_then_does_not_keep_its_execution_in_flight(
    open_house: Open, quick: dict[str, Any]
) -> None:
    quick["upstream"]["response_timeout_seconds"] = 2  # for the whole answer on a busy machine
    house = await open_house(**quick)
    house.backend.script = replies(bytes(20_000_000))  # more than all buffers on the way hold
    kind, body = house.execution(await house.issue())
    reader, writer = await connect(house.sidecar.data_address)
    writer.write(request_bytes("POST", EXECUTE, kind, body))
    await reader.readuntil(b"\r\n\r\n")
    begun = asyncio.get_running_loop().time()
    while house.sidecar.gate.in_flight:
        assert asyncio.get_running_loop().time() - begun < 30
        await reader.read(100_000)
        await asyncio.sleep(0.1)
    writer.transport.abort()
    (execution,) = (await house.admin("GET", "/api/v1/executions")).json()["executions"]
    assert execution["status"] == "answered"  # the backend is not to blame for a slow client
