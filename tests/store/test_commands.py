"""Every command through every engine: what is applied, what it leaves in the log, what a batch shares."""

from __future__ import annotations

import asyncio
import hashlib
import sqlite3
from typing import Any
from unittest import mock

import orjson
import pytest

from sidecar.clock import wall_clock
from sidecar.core.command import (
    Admitted,
    Denied,
    Issued,
    NotInFlight,
    Reconcile,
    Recorded,
    Refuse,
    Reply,
    Revoke,
    Revoked,
    Settle,
    Settled,
)
from sidecar.core.scope import Scope
from sidecar.errors import Refusal, StoreClosed, StoreOverloaded, StoreUnavailable
from sidecar.ids import new_decision_id
from sidecar.store import batch
from sidecar.store.base import StoredDecision
from sidecar.store.batch import Store
from sidecar.store.connection import in_thread
from sidecar.store.sqlite import SqliteEngine
from tests.store.conftest import OpenStore, admit, issue
from tests.support import Clock


async def issued(store: Store, **terms: Any) -> Scope:
    reply = await store.submit(issue(**terms))
    assert isinstance(reply, Issued)
    return reply.scope


async def admitted(store: Store, scope: Scope, action: str = "failover") -> Admitted:
    reply = await store.submit(admit(scope.scope_id, action))
    assert isinstance(reply, Admitted), reply
    return reply


def settle(admission_id: str, outcome: Any = "answered", cost: int | None = None) -> Settle:
    return Settle(decision_id=new_decision_id(), admission_id=admission_id, outcome=outcome, cost=cost)


async def current(store: Store, scope: Scope) -> Scope:
    found = await store.engine.scope(scope.scope_id)
    assert found is not None
    return found


async def whole_log(store: Store) -> list[StoredDecision]:
    """Oldest first."""
    rows: list[StoredDecision] = []
    before = None
    while True:
        page = await store.engine.decisions({}, before=before, limit=1000)
        rows += page.rows
        if page.next is None:
            return rows[::-1]
        before = page.next


class Gate:
    """Holds up the engine's writer thread of a store: what is submitted meanwhile waits."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._transact = store.engine.transact
        self.entered = asyncio.Event()
        self.free = asyncio.Event()

    def __enter__(self) -> Gate:
        async def transact(*args: Any, **options: Any) -> None:
            self.entered.set()
            await self.free.wait()
            await self._transact(*args, **options)

        self._patch = mock.patch.object(self._store.engine, "transact", transact)
        self._patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.free.set()
        self._patch.stop()


# Each command -------------------------------------------------------------------------------------------


async def test_issue_stores_the_scope_with_its_times(store: Store) -> None:
    scope = await issued(store, ttl=60)
    assert await current(store, scope) == scope
    assert scope.expires_at - scope.created_at == 60_000_000
    assert scope.created_at > 0


async def test_admit_consumes_an_attempt_holds_the_cost_and_records(store: Store) -> None:
    scope = await issued(store)
    reply = await admitted(store, scope)
    assert reply.execution.attempt_number == 1
    now = await current(store, scope)
    assert (now.attempts_used, now.held, now.settled) == (1, 100_000, 0)
    stored = await store.engine.decision(reply.execution.decision_id)
    assert stored is not None
    assert orjson.loads(stored.envelope)["event"] == "admitted"
    execution = await store.engine.execution(reply.execution.decision_id)
    assert execution == reply.execution


async def test_a_denial_consumes_nothing_and_records_the_bound(store: Store) -> None:
    scope = await issued(store, max_attempts=1)
    await admitted(store, scope)
    command = admit(scope.scope_id)
    reply = await store.submit(command)
    assert isinstance(reply, Denied)
    assert reply.refusal.members["bound"] == "max_attempts"
    stored = await store.engine.decision(command.decision_id)
    assert stored is not None
    record = orjson.loads(stored.envelope)["record"]
    assert (record["decision_reason"], record["details"]["bound"]) == ("scope_exhausted", "max_attempts")
    assert (await current(store, scope)).attempts_used == 1


async def test_a_denial_in_a_flood_leaves_no_record_of_its_own(store: Store) -> None:
    reply = await store.submit(admit("scope_none", record_denial=False))
    assert isinstance(reply, Denied)
    assert reply.decision_id is None
    assert await whole_log(store) == []


async def test_refuse_records(store: Store) -> None:
    command = Refuse(decision_id=new_decision_id(), refusal=Refusal("invalid_request", "It is not JSON."))
    assert isinstance(await store.submit(command), Recorded)
    (stored,) = await whole_log(store)
    assert orjson.loads(stored.envelope)["record"]["decision_outcome"] == "blocked"


@pytest.mark.parametrize(
    ("outcome", "cost", "attempts", "held", "spent"),
    [
        ("answered", None, 1, 0, 100_000),
        ("answered", 30_000, 1, 0, 30_000),
        ("answered", 0, 1, 0, 0),
        ("not_sent", None, 0, 0, 0),
        ("unknown", None, 1, 100_000, 0),
    ],
)
async def test_settle_replaces_releases_or_keeps_the_hold(
    store: Store, outcome: str, cost: int | None, attempts: int, held: int, spent: int
) -> None:
    scope = await issued(store)
    reply = await admitted(store, scope)
    assert isinstance(await store.submit(settle(reply.execution.decision_id, outcome, cost)), Settled)
    now = await current(store, scope)
    assert (now.attempts_used, now.held, now.settled) == (attempts, held, spent)


async def test_an_execution_is_settled_once(store: Store) -> None:
    reply = await admitted(store, await issued(store))
    await store.submit(settle(reply.execution.decision_id, "answered", 7))
    again = await store.submit(settle(reply.execution.decision_id, "not_sent"))
    assert isinstance(again, NotInFlight)
    found = await store.engine.execution(reply.execution.decision_id)
    assert found is not None
    assert (found.status, found.cost) == ("answered", 7)


async def test_a_cost_above_its_hold_exhausts_the_scope(store: Store) -> None:
    scope = await issued(store)
    reply = await admitted(store, scope)
    settled = await store.submit(settle(reply.execution.decision_id, "answered", 100_001))
    assert isinstance(settled, Settled)
    assert settled.overrun
    denied = await store.submit(admit(scope.scope_id))
    assert isinstance(denied, Denied)
    assert denied.refusal.code == "scope_exhausted"
    assert (await current(store, scope)).settled == 100_001


async def test_a_revoked_scope_admits_nothing_and_a_release_does_not_revive_it(store: Store) -> None:
    scope = await issued(store, max_attempts=1)
    reply = await admitted(store, scope)
    for _ in range(2):
        revoke = Revoke(decision_id=new_decision_id(), scope_id=scope.scope_id)
        assert isinstance(await store.submit(revoke), Revoked)
    await store.submit(settle(reply.execution.decision_id, "not_sent"))
    denied = await store.submit(admit(scope.scope_id))
    assert isinstance(denied, Denied)
    assert denied.refusal.code == "scope_revoked"


async def test_revoking_what_is_not_there_is_denied_and_recorded(store: Store) -> None:
    reply = await store.submit(Revoke(decision_id=new_decision_id(), scope_id="scope_none"))
    assert isinstance(reply, Denied)
    assert len(await whole_log(store)) == 1


@pytest.mark.parametrize(("outcome", "attempts", "spent"), [("executed", 1, 40_000), ("not_executed", 0, 0)])
async def test_reconcile_ends_an_unknown_execution(
    store: Store, outcome: Any, attempts: int, spent: int
) -> None:
    scope = await issued(store)
    reply = await admitted(store, scope)
    admission_id = reply.execution.decision_id
    reconcile = Reconcile(
        decision_id=new_decision_id(), admission_id=admission_id, outcome=outcome, cost=40_000
    )
    early = await store.submit(reconcile)
    assert isinstance(early, Denied)
    assert early.refusal.code == "not_reconcilable"
    await store.submit(settle(admission_id, "unknown"))
    assert (await store.engine.unknown_executions())[0] == 1
    assert isinstance(await store.submit(reconcile), Settled)
    now = await current(store, scope)
    assert (now.attempts_used, now.held, now.settled) == (attempts, 0, spent)
    assert (await store.engine.unknown_executions())[0] == 0


# The log ------------------------------------------------------------------------------------------------


async def test_the_log_is_linked_and_its_sequence_has_no_gaps(store: Store) -> None:
    scope = await issued(store, max_attempts=50, max_cost=10**9)
    replies = await asyncio.gather(*(store.submit(admit(scope.scope_id)) for _ in range(60)))
    for reply in replies:
        if isinstance(reply, Admitted):
            await store.submit(settle(reply.execution.decision_id))
    previous = bytes(32)
    log = await whole_log(store)
    assert [row.seq for row in log] == list(range(1, 1 + 60 + 50 + 1))
    for row in log:
        assert row.previous == previous
        assert row.hash == hashlib.sha256(previous + row.envelope).digest()
        envelope = orjson.loads(row.envelope)
        assert envelope["seq"] == row.seq
        previous = row.hash
    assert len({orjson.loads(row.envelope)["writer"] for row in log}) == 1


async def test_decision_ids_are_uuids_of_version_7(store: Store) -> None:
    await issued(store)
    (row,) = await whole_log(store)
    decision_id = orjson.loads(row.envelope)["record"]["decision_id"]
    assert decision_id[14] == "7"
    assert decision_id[19] in "89ab"


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE decisions SET action = 'other'",
        "UPDATE decisions SET envelope = x'00' WHERE seq = 1",
        "DELETE FROM decisions",
        "DELETE FROM decisions WHERE seq = 1",
        "INSERT OR REPLACE INTO decisions SELECT * FROM decisions",
        "REPLACE INTO decisions SELECT * FROM decisions WHERE seq = 1",
    ],
)
async def test_the_database_refuses_to_change_a_record(store: Store, sql: str) -> None:
    await issued(store)
    before = await whole_log(store)
    assert isinstance(store.engine, SqliteEngine)
    writer = store.engine._writer
    assert writer is not None
    with pytest.raises(sqlite3.DatabaseError, match="append-only"):
        await in_thread(writer, lambda connection: connection.execute(sql))
    assert await whole_log(store) == before


async def test_a_number_beyond_64_bits_in_a_record_is_kept_as_digits(store: Store) -> None:
    command = Refuse(
        decision_id=new_decision_id(),
        refusal=Refusal("invalid_request", "x", {"big": 2**70, "small": [1, -1]}),
    )
    await store.submit(command)
    (row,) = await whole_log(store)
    assert orjson.loads(row.envelope)["record"]["details"]["big"] == str(2**70)


# Group commit -------------------------------------------------------------------------------------------


async def test_what_waits_goes_into_one_transaction_in_the_order_it_came(store: Store) -> None:
    sizes: list[int] = []

    class Observer:
        def batch_committed(self, size: int, seconds: float) -> None:
            sizes.append(size)

        def batch_failed(self, size: int) -> None:
            raise AssertionError

    store._observer = Observer()
    scope = await issued(store, max_attempts=100, max_cost=10**9)
    with Gate(store) as gate:
        waiting = [asyncio.create_task(store.submit(admit(scope.scope_id)))]
        await gate.entered.wait()
        waiting += [asyncio.create_task(store.submit(admit(scope.scope_id))) for _ in range(40)]
        await asyncio.sleep(0)
        gate.free.set()
        replies = await asyncio.gather(*waiting)
    numbers = [reply.execution.attempt_number for reply in replies if isinstance(reply, Admitted)]
    assert numbers == list(range(1, 42))
    assert sizes == [1, 1, 40]


async def test_a_command_that_cannot_be_applied_does_not_hurt_its_batch(store: Store) -> None:
    scope = await issued(store, max_attempts=10, max_cost=10**9)
    good = [admit(scope.scope_id) for _ in range(4)]
    twin = admit(scope.scope_id)
    await store.submit(twin)
    results = await asyncio.gather(
        *(store.submit(command) for command in (*good[:2], twin, *good[2:])), return_exceptions=True
    )
    assert [isinstance(result, Admitted) for result in results] == [True, True, False, True, True]
    assert isinstance(results[2], StoreUnavailable)
    assert (await current(store, scope)).attempts_used == 5
    assert [row.seq for row in await whole_log(store)] == [1, 2, 3, 4, 5, 6]


async def test_a_command_withdrawn_before_it_began_never_applies(store: Store) -> None:
    store.deadline_seconds = 0.05
    scope = await issued(store)
    late: list[Reply] = []
    with Gate(store) as gate:
        first = asyncio.create_task(store.submit(admit(scope.scope_id), late=late.append))
        await gate.entered.wait()
        second = asyncio.create_task(store.submit(admit(scope.scope_id), late=late.append))
        for task in (first, second):
            with pytest.raises(StoreUnavailable, match="within"):
                await task
        gate.free.set()
        await store.submit(Refuse(decision_id=new_decision_id(), refusal=Refusal("invalid_request", "x")))
    # The first had begun, so it was committed, and its reply went to whom it concerns; the second had not.
    assert len(late) == 1
    assert isinstance(late[0], Admitted)
    assert (await current(store, scope)).attempts_used == 1


async def test_a_cancelled_command_that_had_begun_is_told_as_late(store: Store) -> None:
    scope = await issued(store)
    late: list[Reply] = []
    with Gate(store) as gate:
        tasks = [asyncio.create_task(store.submit(admit(scope.scope_id), late=late.append))]
        await gate.entered.wait()
        tasks.append(asyncio.create_task(store.submit(admit(scope.scope_id), late=late.append)))
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        gate.free.set()
        await store.submit(Refuse(decision_id=new_decision_id(), refusal=Refusal("invalid_request", "x")))
    assert len(late) == 1
    assert (await current(store, scope)).attempts_used == 1


async def test_the_queue_is_bounded_for_admissions_and_never_for_settlements(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "MAX_QUEUE", 3)
    scope = await issued(store)
    reply = await admitted(store, scope)
    with Gate(store) as gate:
        tasks = [asyncio.create_task(store.submit(admit(scope.scope_id)))]
        await gate.entered.wait()
        tasks += [asyncio.create_task(store.submit(admit(scope.scope_id))) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(StoreOverloaded):
            await store.submit(admit(scope.scope_id))
        with pytest.raises(StoreOverloaded):
            await store.submit(issue())
        settling = asyncio.create_task(store.submit(settle(reply.execution.decision_id)))
        await asyncio.sleep(0)
        gate.free.set()
        assert isinstance(await settling, Settled)
        await asyncio.gather(*tasks)


async def test_after_a_failed_commit_the_head_is_read_again(store: Store) -> None:
    scope = await issued(store, max_attempts=9, max_cost=10**9)
    transact = store.engine.transact

    async def committed_but_told_otherwise(*args: Any, **options: Any) -> None:
        await transact(*args, **options)
        raise StoreUnavailable("the answer to COMMIT was lost")

    with (
        mock.patch.object(store.engine, "transact", committed_but_told_otherwise),
        pytest.raises(StoreUnavailable, match="COMMIT"),
    ):
        await store.submit(admit(scope.scope_id))
    assert store.last_error
    await admitted(store, scope)
    assert store.last_error is None
    assert [row.seq for row in await whole_log(store)] == [1, 2, 3]


@pytest.mark.parametrize("failure", [StoreUnavailable("gone"), OSError("gone"), RuntimeError("gone")])
@pytest.mark.parametrize("head_fails", [False, True])
async def test_what_was_committed_though_its_commit_failed_is_told_as_late(
    store: Store, failure: Exception, head_fails: bool
) -> None:
    scope = await issued(store, max_attempts=9, max_cost=10**9)
    transact, read_head = store.engine.transact, store.engine.head
    late: list[Reply] = []

    async def committed_but_told_otherwise(*args: Any, **options: Any) -> None:
        await transact(*args, **options)
        raise failure

    async def head() -> Any:
        if head_fails and not late and told:
            raise StoreUnavailable("gone")
        return await read_head()

    told = ["the disk is away"]
    with (
        mock.patch.object(store.engine, "head", head),
        mock.patch.object(store.engine, "transact", committed_but_told_otherwise),
    ):
        waiting = [store.submit(admit(scope.scope_id), late=late.append) for _ in range(3)]
        refused = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(each, StoreUnavailable) for each in refused)
    told.clear()
    await admitted(store, scope)
    assert [type(reply) for reply in late] == [Admitted] * 3
    assert len(await whole_log(store)) == 5


async def test_a_closed_store_says_so(store: Store) -> None:
    await store.close()
    with pytest.raises(StoreClosed):
        await store.submit(issue())


async def test_closing_commits_what_waits(store: Store) -> None:
    task = asyncio.create_task(store.submit(issue()))
    await asyncio.sleep(0)
    await store.close()
    assert isinstance(await task, Issued)


# Time ---------------------------------------------------------------------------------------------------


async def test_time_never_runs_backwards_in_the_log(store: Store, clock: Clock) -> None:
    await issued(store)
    clock.move(-30)
    await issued(store)
    times = [orjson.loads(row.envelope)["record"]["decided_at"] for row in await whole_log(store)]
    assert times == sorted(times)
    assert 29 < store.clock_lag_seconds() < 31


async def test_a_scope_expires_at_its_very_moment(open_store: OpenStore) -> None:
    instant = wall_clock()
    store = await open_store(None, clock=lambda: instant)
    scope = await issued(store, ttl=60)
    instant += 60_000_000 - 1
    await admitted(store, scope)
    instant += 1
    denied = await store.submit(admit(scope.scope_id))
    assert isinstance(denied, Denied)
    assert denied.refusal.code == "scope_expired"


# Lists --------------------------------------------------------------------------------------------------


async def test_lists_come_newest_first_in_pages(store: Store) -> None:
    scopes = [await issued(store) for _ in range(5)]
    await issued(store, incident_id="inc_2")
    await issued(store, tenant_id="other")
    found: list[str] = []
    before = None
    for expected in (2, 2, 1):
        page, total = await store.engine.scopes("default", "inc_1", before=before, limit=2)
        assert total == 5
        assert len(page.rows) == expected
        found += [scope.scope_id for scope in page.rows]
        before = page.next
    assert before is None
    assert found == [scope.scope_id for scope in reversed(scopes)]


@pytest.mark.parametrize("cursor", ["", "x", "-1", "1.0", "\u0663", "9" * 19, "1 OR 1=1"])
async def test_a_cursor_is_a_number_of_ours(store: Store, cursor: str) -> None:
    with pytest.raises(ValueError, match="before"):
        await store.engine.decisions({}, before=cursor, limit=1)
