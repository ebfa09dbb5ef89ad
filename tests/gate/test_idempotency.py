"""Idempotency keys: a request that is repeated under its key is executed once, and gets the same answer."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from sidecar.core.policy import PolicySet
from sidecar.gate.floods import Allowance
from tests.client import HeaderList, Message, ask
from tests.support import (
    EXECUTE,
    Backend,
    Clock,
    House,
    Open,
    opened,
    replies,
    sends,
    unused_port,
)

KEY = "key-00000001"
HOUR = 3600
# Headers that name a message, and so differ between two equal answers.
OF_ONE_MESSAGE = {"x-request-id", "idempotency-replayed"}


def under(key: str = KEY) -> HeaderList:
    return [("Idempotency-Key", key)]


def lasting(answer: Message) -> list[tuple[str, str]]:
    """The headers of an answer that its replays have, too."""
    return sorted((name, value) for name, value in answer.raw_headers if name.lower() not in OF_ONE_MESSAGE)


def problem(answer: Message, status: int, error: str) -> dict[str, Any]:
    body: dict[str, Any] = answer.json()
    assert (answer.status, body["error"]) == (status, error)
    return body


def decided(answer: Message) -> str:
    """The decision that an answer names."""
    found = answer.header("Scopegate-Decision-Id")
    assert found is not None
    return found


async def ended(house: House, execution: str, outcome: str) -> None:
    answer = await house.admin("POST", f"/api/v1/executions/{execution}/reconcile", {"outcome": outcome})
    assert answer.status == 200, answer.body


def keys_in(database: Path) -> int:
    with closing(sqlite3.connect(database)) as connection:
        (count,) = connection.execute("SELECT COUNT(*) FROM idempotency_keys").fetchone()
        return int(count)


def copied(database: Path) -> Path:
    """A folder with the files of a database as they are now, which is how a crash would leave them."""
    folder = database.parent / "after"
    folder.mkdir()
    for suffix in ("", "-wal"):
        shutil.copy(f"{database}{suffix}", folder / f"{database.name}{suffix}")
    return folder


# A repeat ----------------------------------------------------------------------------------------------


async def test_a_repeat_gets_the_first_answer_and_is_not_forwarded(house: House, backend: Backend) -> None:
    backend.script = replies(
        b'{"n": 1}', status="202 Accepted", headers=[("Content-Type", "a/b"), ("X-N", "1")]
    )
    scope = await house.issue(max_attempts=3)
    first = await house.execute(scope, headers=under())
    backend.script = replies(b'{"n": 2}')
    repeat = await house.execute(scope, headers=under())
    assert first.header("Idempotency-Replayed") is None
    assert repeat.header("Idempotency-Replayed") == "true"
    assert (repeat.status, repeat.body) == (first.status, first.body) == (202, b'{"n": 1}')
    assert lasting(repeat) == lasting(first)
    assert len(backend.executions) == 1


async def test_a_repeat_consumes_nothing(house: House) -> None:
    scope = await house.issue(action="failover", max_attempts=3, max_cost_usd=0.3)
    await house.execute(scope, headers=under())
    before = await house.scope(scope)
    for _ in range(3):
        assert (await house.execute(scope, headers=under())).status == 200
    assert await house.scope(scope) == before
    assert before["attempts_used"] == 1


async def test_a_repeat_leaves_a_record_that_names_the_execution(house: House) -> None:
    scope = await house.issue()
    first = await house.execute(scope, headers=under())
    repeat = await house.execute(scope, headers=[*under(), ("X-Request-Id", "second")])
    assert decided(repeat) == decided(first)
    (record,) = await house.records("&event=replayed")
    assert (record["decision_type"], record["decision_outcome"]) == ("policy", "none")
    assert (record["decision_reason"], record["request_id"]) == (None, "second")
    assert record["details"]["admission_id"] == decided(first)
    assert record["details"]["http_status"] == 200
    assert record["details"]["route"] == "**/recovery/execute"
    assert record["scope_id"] == scope["scope_id"]
    assert record["admission_id"] is None
    events = Counter(one["event"] for one in await house.records())
    assert events == {"issued": 1, "admitted": 1, "settled": 1, "replayed": 1}


async def test_a_repeat_needs_no_valid_scope(house: House, clock: Clock) -> None:
    scope = await house.issue(max_attempts=2)
    first = await house.execute(scope, headers=under())
    await house.revoke(scope)
    revoked = await house.execute(scope, headers=under())
    clock.move(2 * HOUR)
    expired = await house.execute(scope, headers=under())
    assert lasting(revoked) == lasting(expired) == lasting(first)
    assert (first.header("Scopegate-Scope-Status"), first.header("Scopegate-Attempts-Remaining")) == (
        "active",
        "1",
    )
    problem(await house.execute(scope, headers=under("another-key")), 400, "scope_revoked")


async def test_a_repeat_gets_its_answer_though_policies_would_refuse_it_now(house: House) -> None:
    scope = await house.issue()
    await house.execute(scope, headers=under())
    house.adopt(PolicySet(revision="rev-2", actions={}))
    assert (await house.execute(scope, headers=under())).header("Idempotency-Replayed") == "true"
    problem(await house.execute(scope), 400, "scope_exhausted")


async def test_without_policies_a_repeat_is_refused(house: House) -> None:
    scope = await house.issue()
    await house.execute(scope, headers=under())
    house.adopt(None)
    problem(await house.execute(scope, headers=under()), 503, "policy_unavailable")


async def test_an_action_without_a_scope_is_repeated_alike(open_house: Open, backend: Backend) -> None:
    house = await open_house(gate={"scope_required_from": "high"})
    first = await house.execute(None, headers=under())
    repeat = await house.execute(None, headers=under())
    assert (first.status, repeat.status) == (200, 200)
    assert lasting(repeat) == lasting(first)
    assert repeat.header("Scopegate-Scope-Status") is None
    assert len(backend.executions) == 1


async def test_a_repeat_gets_the_members_that_the_first_answer_was_given(open_house: Open) -> None:
    house = await open_house(gate={"annotate_response": True})
    scope = await house.issue(max_attempts=3)
    first = await house.execute(scope, headers=under())
    await house.execute(scope)
    repeat = await house.execute(scope, headers=under())
    assert first.json()["attempts_remaining"] == 2
    assert repeat.body == first.body
    assert lasting(repeat) == lasting(first)


async def test_an_error_of_the_backend_is_repeated_as_it_was(house: House, backend: Backend) -> None:
    backend.script = replies(b"broken", status="500 Internal Server Error", headers=[])
    scope = await house.issue(max_attempts=2)
    for _ in range(2):
        answer = await house.execute(scope, headers=under())
        assert (answer.status, answer.body) == (500, b"broken")
    assert len(backend.executions) == 1


@pytest.mark.parametrize("status", ["204 No Content", "304 Not Modified"])
async def test_an_answer_without_a_body_is_repeated_without_one(
    house: House, backend: Backend, status: str
) -> None:
    backend.script = sends(f"HTTP/1.1 {status}\r\nX-A: b\r\n\r\n".encode())
    scope = await house.issue()
    first = await house.execute(scope, headers=under())
    repeat = await house.execute(scope, headers=under())
    assert (repeat.status, repeat.body) == (int(status[:3]), b"")
    assert lasting(repeat) == lasting(first)


async def test_a_chunked_answer_is_repeated_whole(house: House, backend: Backend) -> None:
    backend.script = sends(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n")
    scope = await house.issue()
    first = await house.execute(scope, headers=under())
    repeat = await house.execute(scope, headers=under())
    assert first.body == repeat.body == b"abc"
    assert lasting(repeat) == lasting(first)


async def test_cookies_are_not_kept(house: House, backend: Backend) -> None:
    backend.script = replies(headers=[("Set-Cookie", "session=secret"), ("X-Kept", "yes")])
    scope = await house.issue()
    first = await house.execute(scope, headers=under())
    repeat = await house.execute(scope, headers=under())
    assert first.header("Set-Cookie") == "session=secret"
    assert repeat.header("Set-Cookie") is None
    assert repeat.header("X-Kept") == "yes"
    with closing(sqlite3.connect(house.database)) as connection:
        assert "secret" not in str(connection.execute("SELECT * FROM idempotency_keys").fetchall())


async def test_the_key_goes_to_the_backend_and_stands_nowhere_in_the_store(
    house: House, backend: Backend
) -> None:
    headers = [("iDeMpOtEnCy-kEy", KEY), ("Connection", "keep-alive, Idempotency-Key")]
    await house.execute(await house.issue(), headers=headers)
    assert ("iDeMpOtEnCy-kEy", KEY) in backend.executions[0].raw_headers
    stored = b"".join(path.read_bytes() for path in house.database.parent.glob("gate.db*"))
    assert KEY.encode() not in stored


async def test_a_repeat_is_counted_and_stands_in_the_access_log(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    scope = await house.issue()
    first = await house.execute(scope, headers=under())
    await house.execute(scope, headers=under())
    labels = 'action="retry_agent",outcome="none",reason="none",route="**/recovery/execute"'
    assert await house.metric(f"scopegate_decisions_total{{{labels}}}") == 1
    assert (
        await house.metric('scopegate_executions_total{outcome="answered",route="**/recovery/execute"}') == 1
    )
    lines: list[Any] = [line for line in caplog.records if line.name == "scopegate.access"]
    executed = [line for line in lines if line.path == EXECUTE]
    assert [line.outcome for line in executed] == ["answered", "replayed"]
    assert {line.decision_id for line in executed} == {decided(first)}


async def test_an_answer_is_repeated_after_a_restart(tmp_path: Path, backend: Backend, clock: Clock) -> None:
    async with opened(tmp_path, backend, clock=clock) as house:
        scope = await house.issue()
        first = await house.execute(scope, headers=under())
    async with opened(tmp_path, backend, clock=clock) as house:
        repeat = await house.execute(scope, headers=under())
    assert (repeat.status, repeat.body, lasting(repeat)) == (200, first.body, lasting(first))
    assert len(backend.executions) == 1


ANY_BODY = {
    "name": "run",
    "path": "/run",
    "methods": ["GET", "DELETE"],
    "body": ["empty", "any"],
    "action": "const:retry_agent",
}


@pytest.mark.parametrize("method", ["GET", "HEAD", "DELETE"])
async def test_a_request_of_any_method_is_repeated_alike(
    open_house: Open, backend: Backend, method: str
) -> None:
    house = await open_house(gate={"routes": [ANY_BODY]})
    scope = await house.issue(max_attempts=3)
    named = [("X-Recovery-Scope-Id", scope["scope_id"]), ("X-Recovery-Incident-Id", "inc_1"), *under()]
    first = await house.data(method, "/run", named)
    repeat = await house.data(method, "/run", named)
    assert first.status == repeat.status == 200
    assert repeat.header("Idempotency-Replayed") == "true"
    assert (repeat.body, lasting(repeat)) == (first.body, lasting(first))
    assert [message.method for message in backend.seen] == [method]


async def test_another_method_under_the_key_is_another_request(open_house: Open, backend: Backend) -> None:
    house = await open_house(gate={"routes": [ANY_BODY]})
    scope = await house.issue(max_attempts=3)
    named = [("X-Recovery-Scope-Id", scope["scope_id"]), ("X-Recovery-Incident-Id", "inc_1"), *under()]
    assert (await house.data("GET", "/run", named)).status == 200
    problem(await house.data("DELETE", "/run", named), 422, "idempotency_key_reused")
    assert len(backend.seen) == 1


async def test_of_a_long_answer_to_head_no_body_is_made(open_house: Open, backend: Backend) -> None:
    house = await open_house(gate={"routes": [ANY_BODY]})
    backend.script = replies(b"x" * 70_000)
    scope = await house.issue()
    named = [("X-Recovery-Scope-Id", scope["scope_id"]), ("X-Recovery-Incident-Id", "inc_1"), *under()]
    first = await house.data("HEAD", "/run", named)
    repeat = await house.data("HEAD", "/run", named)
    assert first.header("Content-Length") == "70000"
    assert (repeat.status, repeat.body, lasting(repeat)) == (200, b"", lasting(first))


# Long answers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "limit", "kept"),
    [(65_536, 1 << 20, True), (65_537, 1 << 20, False), (65_536, 65_536, True), (65_536, 65_535, False)],
)
async def test_of_a_long_answer_status_and_decision_are_kept(
    open_house: Open, backend: Backend, size: int, limit: int, kept: bool
) -> None:
    house = await open_house(gate={"max_answer_bytes": limit, "annotate_response": True})
    backend.script = replies(b"x" * size, status="201 Created", headers=[("X-Long", "yes")])
    scope = await house.issue()
    first = await house.execute(scope, headers=under())
    assert (first.status, len(first.body)) == (201, size)
    await house.ended(decided(first))
    repeat = await house.execute(scope, headers=under())
    assert (repeat.status, repeat.header("Idempotency-Replayed")) == (201, "true")
    assert decided(repeat) == decided(first)
    if kept:
        assert (repeat.body, repeat.header("X-Long")) == (first.body, "yes")
    else:
        assert repeat.json() == {"status": 201, "decision_id": decided(first)}
        assert (repeat.header("Content-Type"), repeat.header("X-Long")) == ("application/json", None)
    assert len(backend.executions) == 1


async def test_while_a_long_answer_streams_its_request_is_in_flight(
    open_house: Open, backend: Backend
) -> None:
    house = await open_house(gate={"max_answer_bytes": 10})
    release = asyncio.Event()

    async def script(request: Message, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 40\r\n\r\n" + b"x" * 20)
        await writer.drain()
        await release.wait()
        writer.write(b"x" * 20)

    backend.script = script
    scope = await house.issue()
    first = asyncio.create_task(house.execute(scope, headers=under()))
    await backend.arrived.wait()
    problem(await house.execute(scope, headers=under()), 409, "idempotency_in_flight")
    release.set()
    assert (await first).body == b"x" * 40
    await house.ended(decided(await first))
    assert (await house.execute(scope, headers=under())).json()["status"] == 200


# Another request under the key -------------------------------------------------------------------------


async def test_another_body_under_the_key_is_refused(house: House, backend: Backend) -> None:
    scope = await house.issue(max_attempts=3)
    first = await house.execute(scope, headers=under())
    answer = await house.execute(scope, headers=under(), note="another")
    body = problem(answer, 422, "idempotency_key_reused")
    record = await house.record(body["decision_id"])
    assert (record["event"], record["decision_outcome"]) == ("refused", "blocked")
    assert record["decision_reason"] == "idempotency_key_reused"
    assert body["decision_id"] != decided(first)
    assert (await house.scope(scope))["attempts_used"] == 1
    assert len(backend.executions) == 1


async def test_another_target_under_the_key_is_refused(house: House) -> None:
    scope = await house.issue(max_attempts=3)
    await house.execute(scope, headers=under())
    answer = await house.execute(scope, headers=under(), target=f"{EXECUTE}?dry=1")
    problem(answer, 422, "idempotency_key_reused")


async def test_another_request_is_refused_before_the_state_of_the_first_is_told(
    house: House, backend: Backend
) -> None:
    release = asyncio.Event()
    backend.script = replies(after=release)
    scope = await house.issue(max_attempts=3)
    first = asyncio.create_task(house.execute(scope, headers=under()))
    await backend.arrived.wait()
    answer = await house.execute(scope, headers=under(), note="another")
    problem(answer, 422, "idempotency_key_reused")
    release.set()
    assert (await first).status == 200


# In flight and unknown ---------------------------------------------------------------------------------


async def test_while_the_first_is_in_flight_a_repeat_is_told_to_come_again(
    house: House, backend: Backend
) -> None:
    release = asyncio.Event()
    backend.script = replies(after=release)
    scope = await house.issue(max_attempts=3)
    first = asyncio.create_task(house.execute(scope, headers=under()))
    await backend.arrived.wait()
    answer = await house.execute(scope, headers=under())
    body = problem(answer, 409, "idempotency_in_flight")
    assert answer.header("Retry-After") == "1"
    record = await house.record(decided(answer))
    assert (record["event"], record["decision_reason"]) == ("refused", "idempotency_in_flight")
    release.set()
    assert decided(await first) == body["decision_id"]
    assert (await house.execute(scope, headers=under())).header("Idempotency-Replayed") == "true"
    assert len(backend.executions) == 1


async def test_a_client_that_left_gets_the_answer_when_it_repeats_its_request(
    house: House, backend: Backend
) -> None:
    release = asyncio.Event()
    backend.script = replies(after=release)
    scope = await house.issue()
    gone = asyncio.create_task(house.execute(scope, headers=under()))
    await backend.arrived.wait()
    gone.cancel()
    release.set()
    await house.ended(backend.executions[0].header("Scopegate-Decision-Id") or "")
    repeat = await house.execute(scope, headers=under())
    assert (repeat.status, repeat.body) == (200, b'{"done": true}')
    assert repeat.header("Idempotency-Replayed") == "true"
    assert len(backend.executions) == 1


async def test_a_replay_that_cannot_be_recorded_is_refused(house: House, backend: Backend) -> None:
    scope = await house.issue()
    await house.execute(scope, headers=under())
    house.database.unlink()
    problem(await house.execute(scope, headers=under()), 503, "store_unavailable")
    assert len(backend.executions) == 1


async def test_an_unknown_outcome_stays_a_conflict_until_it_is_reconciled(
    house: House, backend: Backend
) -> None:
    backend.script = sends(then="reset")
    scope = await house.issue(max_attempts=3)
    lost = problem(await house.execute(scope, headers=under()), 502, "upstream_failed")
    answer = await house.execute(scope, headers=under())
    body = problem(answer, 409, "outcome_unknown")
    assert body["decision_id"] == lost["decision_id"]
    assert answer.header("Retry-After") is None
    record = await house.record(decided(answer))
    assert (record["event"], record["decision_reason"]) == ("refused", "outcome_unknown")
    assert len(backend.executions) == 1
    backend.script = replies()
    await ended(house, lost["decision_id"], "not_executed")
    freed = await house.execute(scope, headers=under())
    assert (freed.status, freed.header("Idempotency-Replayed")) == (200, None)
    assert len(backend.executions) == 2


async def test_an_execution_that_was_reconciled_as_executed_keeps_the_conflict(
    house: House, backend: Backend, clock: Clock
) -> None:
    backend.script = sends(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf", then="close")
    scope = await house.issue(max_attempts=3, ttl_seconds=3600)
    lost = problem(await house.execute(scope, headers=under()), 502, "upstream_failed")
    clock.move(30 * HOUR)  # the key of an execution that waits to be reconciled does not expire
    problem(await house.execute(scope, headers=under()), 409, "outcome_unknown")
    await ended(house, lost["decision_id"], "executed")
    clock.move(23 * HOUR)  # a day counts from the end
    body = problem(await house.execute(scope, headers=under()), 409, "outcome_unknown")
    assert (body["decision_id"], body["execution_status"]) == (lost["decision_id"], "executed")
    assert len(backend.executions) == 1


async def test_an_execution_that_was_never_sent_frees_its_key(
    open_house: Open, tmp_path: Path, backend: Backend
) -> None:
    house = await open_house(upstream_port=unused_port())
    scope = await house.issue()
    problem(await house.execute(scope, headers=under()), 502, "upstream_unreachable")
    problem(await house.execute(scope, headers=under()), 502, "upstream_unreachable")
    # Another request may use the free key, too.
    problem(await house.execute(scope, headers=under(), note="another"), 502, "upstream_unreachable")


async def test_a_refusal_keeps_nothing(house: House, backend: Backend) -> None:
    problem(await house.execute(None, headers=under()), 400, "scoped_execution_required")
    scope = await house.issue()
    problem(await house.execute(scope, headers=under(), action="failover"), 403, "action_outside_scope")
    assert keys_in(house.database) == 0
    assert (await house.execute(scope, headers=under())).status == 200
    assert len(backend.executions) == 1


async def test_an_execution_that_a_crash_left_is_never_executed_again(
    tmp_path: Path, backend: Backend, clock: Clock
) -> None:
    backend.script = replies(after=asyncio.Event())
    async with opened(tmp_path, backend, clock=clock) as house:
        scope = await house.issue(max_attempts=3)
        gone = asyncio.create_task(house.execute(scope, headers=under()))
        await backend.arrived.wait()
        after = copied(house.database)
        gone.cancel()
    backend.script = replies()
    async with opened(after, backend, clock=clock) as house:
        problem(await house.execute(scope, headers=under()), 409, "outcome_unknown")
    assert len(backend.executions) == 1


# Whose key it is ---------------------------------------------------------------------------------------


async def test_tenants_do_not_share_keys(open_house: Open, backend: Backend) -> None:
    house = await open_house(gate={"tenant_header": "X-Tenant"})
    for tenant in ("one", "two"):
        named = [("X-Tenant", tenant)]
        scope = await house.issue(headers=named)
        answer = await house.execute(scope, headers=[*named, *under()])
        assert (answer.status, answer.header("Idempotency-Replayed")) == (200, None)
    assert len(backend.executions) == 2


async def test_routes_do_not_share_keys(open_house: Open, backend: Backend) -> None:
    house = await open_house(gate={"routes": [{"path": "/run"}, {"path": "/again"}]})
    scope = await house.issue(max_attempts=2)
    for target in ("/run", "/again"):
        answer = await house.execute(scope, target=target, headers=under())
        assert (answer.status, answer.header("Idempotency-Replayed")) == (200, None)
    assert len(backend.executions) == 2


async def test_a_shadow_route_forwards_every_repeat(open_house: Open, backend: Backend) -> None:
    house = await open_house(gate={"routes": [{"path": "**/recovery/execute", "mode": "shadow"}]})
    for _ in range(2):
        assert (await house.execute(None, headers=under())).status == 200
    assert (await house.execute(None, headers=under("short"))).status == 200
    assert len(backend.executions) == 3
    assert keys_in(house.database) == 0


async def test_a_request_that_is_not_gated_passes_with_any_key(house: House, backend: Backend) -> None:
    for _ in range(2):
        assert (await house.data("POST", "/other", under("short"), b"x")).status == 200
    assert len(backend.executions) == 2


# The header --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["12345678", "k" * 255, "with blanks, and = signs"])
async def test_a_key_has_8_to_255_printable_characters(house: House, key: str) -> None:
    assert (await house.execute(await house.issue(), headers=under(key))).status == 200


@pytest.mark.parametrize(
    "headers",
    [
        under("1234567"),
        under("k" * 256),
        under(""),
        under("tab\tinside"),
        under("next\x85line"),
        under("not-utf-8-\xff"),
        [*under(), *under()],
        [*under(), *under("key-00000002")],
        [*under(), ("Idempotency_Key", KEY)],
        [("Idempotency_Key", KEY)],
        [("idempotency_KEY", KEY)],
    ],
)
async def test_any_other_key_is_refused(house: House, backend: Backend, headers: HeaderList) -> None:
    scope = await house.issue()
    body = problem(await house.execute(scope, headers=headers), 400, "invalid_request")
    assert body["member"].lower().replace("_", "-") == "header:idempotency-key"
    assert (await house.record(body["decision_id"]))["decision_reason"] == "invalid_request"
    assert (await house.scope(scope))["attempts_used"] == 0
    assert backend.executions == []


# Expiry ------------------------------------------------------------------------------------------------


async def test_a_key_is_kept_for_a_day(house: House, backend: Backend, clock: Clock) -> None:
    scope = await house.issue()
    first = await house.execute(scope, headers=under())
    clock.move(24 * HOUR - 5)
    assert lasting(await house.execute(scope, headers=under())) == lasting(first)
    clock.move(5)
    problem(await house.execute(scope, headers=under()), 400, "scope_expired")
    assert (await house.execute(await house.issue(), headers=under())).status == 200
    assert len(backend.executions) == 2


async def test_the_time_can_be_set(open_house: Open, clock: Clock) -> None:
    house = await open_house(gate={"idempotency_ttl": 60})
    scope = await house.issue(max_attempts=2)
    await house.execute(scope, headers=under())
    clock.move(55)
    assert (await house.execute(scope, headers=under())).header("Idempotency-Replayed") == "true"
    clock.move(5)
    assert (await house.execute(scope, headers=under())).header("Idempotency-Replayed") is None


async def test_expired_keys_are_deleted_while_new_ones_come(open_house: Open, clock: Clock) -> None:
    house = await open_house(gate={"idempotency_ttl": 60}, scopes={"limits": {"max_attempts": 1000}})
    for _ in range(4):
        scope = await house.issue(max_attempts=20)
        for number in range(20):
            assert (await house.execute(scope, headers=under(f"key-{number:08}"))).status == 200
        clock.move(61)
        scope = await house.issue(max_attempts=20)
        for number in range(20):
            key = under(f"{scope['scope_id']}-{number}")
            assert (await house.execute(scope, headers=key)).status == 200
        clock.move(61)
    assert keys_in(house.database) <= 40


# Many at once ------------------------------------------------------------------------------------------


async def test_of_a_hundred_equal_requests_at_once_one_is_executed(house: House, backend: Backend) -> None:
    backend.script = replies(after=0.05)
    scope = await house.issue(max_attempts=10)
    answers = await asyncio.gather(*(house.execute(scope, headers=under()) for _ in range(100)))
    assert len(backend.executions) == 1
    answered = [answer for answer in answers if answer.status == 200]
    assert answered
    assert {answer.body for answer in answered} == {b'{"done": true}'}
    assert len({decided(answer) for answer in answered}) == 1
    for answer in answers:
        if answer.status != 200:
            problem(answer, 409, "idempotency_in_flight")
    assert (await house.scope(scope))["attempts_used"] == 1


async def test_a_repeat_that_follows_an_answer_is_always_a_replay(house: House, backend: Backend) -> None:
    scopes = [await house.issue(max_attempts=10) for _ in range(4)]

    async def follow(lane: int) -> None:
        for number in range(5):
            key = under(f"lane-{lane}-{number}")
            assert (await house.execute(scopes[lane // 2], headers=key)).status == 200
            repeat = await house.execute(scopes[lane // 2], headers=key)
            assert repeat.header("Idempotency-Replayed") == "true"

    await asyncio.gather(*map(follow, range(8)))
    assert len(backend.executions) == 40


async def test_a_flood_of_replays_is_recorded_in_counted_summaries(house: House, backend: Backend) -> None:
    scope = await house.issue()
    await house.execute(scope, headers=under())
    allowance = house.sidecar.gate.refusals._allowance = Allowance(lambda: 0.0)
    allowance.left = 3.0  # a burst has gone before
    answers = await asyncio.gather(*(house.execute(scope, headers=under()) for _ in range(40)))
    assert {answer.header("Idempotency-Replayed") for answer in answers} == {"true"}
    records = await house.records("&event=replayed")
    summaries = [one for one in records if "count" in one["details"]]
    assert summaries
    assert sum(one["details"].get("count", 1) for one in records) == 40
    assert summaries[0]["details"]["subjects"] == [scope["scope_id"]]
    assert (summaries[0]["decision_outcome"], summaries[0]["details"]["route"]) == (
        "none",
        "**/recovery/execute",
    )
    assert len(backend.executions) == 1


async def test_explaining_claims_no_key(house: House) -> None:
    kind, body = house.execution(await house.issue())
    answer = await ask(house.sidecar.admin_address, "POST", "/api/v1/explain", [*kind, *under()], body)
    assert answer.json()["allowed"] is True
    assert keys_in(house.database) == 0


# Facts in headers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("X-Recovery-Scope-Id", "scope_another"),
        ("X-Recovery-Incident-Id", "inc_another"),
        ("X-Action", "failover"),
        ("X-Agent", "agent-2"),
    ],
)
async def test_another_fact_in_a_header_under_the_key_is_another_request(
    open_house: Open, backend: Backend, header: str, value: str
) -> None:
    house = await open_house(
        gate={
            "routes": [
                {
                    "name": "run-it",
                    "path": "/run",
                    "body": "empty",
                    "action": "header:X-Action",
                    "target_agents": ["header:X-Agent"],
                }
            ]
        }
    )
    scope = await house.issue()
    named = {
        "X-Recovery-Scope-Id": scope["scope_id"],
        "X-Recovery-Incident-Id": "inc_1",
        "X-Action": "retry_agent",
        "X-Agent": "agent-1",
        "Idempotency-Key": KEY,
    }
    assert (await house.data("POST", "/run", list(named.items()))).status == 200
    repeat = await house.data("POST", "/run", list(named.items()))
    assert repeat.header("Idempotency-Replayed") == "true"
    other = await house.data("POST", "/run", list({**named, header: value}.items()))
    body = problem(other, 422, "idempotency_key_reused")
    assert (await house.record(body["decision_id"]))["decision_reason"] == "idempotency_key_reused"
    assert len(backend.seen) == 1
