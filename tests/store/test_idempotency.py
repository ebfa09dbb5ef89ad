"""Idempotency keys in a store: no order of commands admits a second execution under a live key."""

from __future__ import annotations

import asyncio
import sqlite3
import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.core.command import (
    Admit,
    Admitted,
    Denied,
    Issued,
    Reconcile,
    Replayed,
    Reply,
    Revoke,
    Settle,
    Settled,
)
from sidecar.core.facts import Claims
from sidecar.core.idempotency import Claim, KeptAnswer, claim_of, without_body
from sidecar.errors import StoreUnavailable
from sidecar.ids import new_decision_id
from sidecar.store import sqlite
from sidecar.store.base import Changes
from sidecar.store.batch import Store
from sidecar.store.crash import account_for_crash
from sidecar.store.sqlite import SqliteEngine
from sidecar.store.verify import verify_sqlite
from tests.store.conftest import OpenStore, admit, issue
from tests.support import SECOND, Clock

HOUR = 3600
KEPT_FOR = 24 * HOUR * SECOND
Step = tuple[Any, ...]


def claim(key: str, request: str = "a", **whose: str) -> Claim:
    owner = {"principal": "anonymous", "tenant_id": "default", "route": "r", **whose}
    return claim_of(
        key, method="POST", target=b"/run", body_sha256=request, claims=Claims(), kept_for=KEPT_FOR, **owner
    )


def answer_to(one: Claim, body: bytes | None = b"done") -> KeptAnswer:
    kept = KeptAnswer(
        key=one.key, status=201, reason=b"Made \xfc", headers=((b"X-\xff", b"\x80"),), body=body
    )
    return kept if body is not None else without_body(kept)


async def granted(store: Store, **terms: Any) -> str:
    reply = await store.submit(issue(max_attempts=1_000, max_cost=10**9, ttl=HOUR * 1_000, **terms))
    assert isinstance(reply, Issued)
    return reply.scope.scope_id


def keyed(scope_id: str | None, one: Claim, **options: Any) -> Admit:
    return replace(admit(scope_id, "retry_agent", **options), claim=one)


def settling(reply: Reply, outcome: Literal["answered", "not_sent", "unknown"], one: Claim) -> Settle:
    assert isinstance(reply, Admitted)
    return Settle(
        decision_id=new_decision_id(),
        admission_id=reply.execution.decision_id,
        outcome=outcome,
        answer=answer_to(one) if outcome == "answered" else None,
    )


def code_of(reply: Reply) -> str:
    return reply.refusal.code if isinstance(reply, Denied) else type(reply).__name__


# One after the other -----------------------------------------------------------------------------------


async def test_the_stored_answer_is_the_answer_that_was_kept(store: Store) -> None:
    one = claim("k")
    scope_id = await granted(store)
    first = await store.submit(keyed(scope_id, one))
    settled = await store.submit(settling(first, "answered", one))
    await store.submit(keyed(scope_id, claim("another")))
    await store.submit(Revoke(decision_id=new_decision_id(), scope_id=scope_id))
    reply = await store.submit(keyed(scope_id, one))
    assert isinstance(settled, Settled)
    assert isinstance(reply, Replayed)
    assert reply.answer == answer_to(one)
    assert reply.scope == settled.scope  # as it was then
    assert reply.execution == settled.execution
    assert reply.answered_at == settled.execution.ended_at


@pytest.mark.parametrize("body", [b"", None])
async def test_an_empty_body_is_not_a_body_that_is_not_kept(store: Store, body: bytes | None) -> None:
    one = claim("k")
    first = await store.submit(keyed(await granted(store), one))
    await store.submit(replace(settling(first, "answered", one), answer=answer_to(one, body)))
    reply = await store.submit(keyed(None, one))
    assert isinstance(reply, Replayed)
    assert reply.answer.body == body


@pytest.mark.parametrize("whose", ["principal", "tenant_id", "route"])
async def test_a_key_belongs_to_a_principal_a_tenant_and_a_route(store: Store, whose: str) -> None:
    scope_id = await granted(store)
    assert code_of(await store.submit(keyed(scope_id, claim("k")))) == "Admitted"
    assert code_of(await store.submit(keyed(scope_id, claim("k", **{whose: "other"})))) == "Admitted"
    assert code_of(await store.submit(keyed(scope_id, claim("k")))) == "idempotency_in_flight"


def test_no_two_lists_of_parts_have_the_same_digest() -> None:
    assert claim("k", principal="ab", tenant_id="c").key != claim("k", principal="a", tenant_id="bc").key


async def test_a_denied_request_claims_no_key(store: Store) -> None:
    assert code_of(await store.submit(keyed(None, claim("k")))) == "scoped_execution_required"
    assert code_of(await store.submit(keyed(await granted(store), claim("k", "b")))) == "Admitted"


async def test_a_late_settlement_keeps_no_answer_under_a_key_that_another_execution_holds(
    store: Store,
) -> None:
    one = claim("k")
    scope_id = await granted(store)
    first = await store.submit(keyed(scope_id, one))
    await store.submit(settling(first, "not_sent", one))
    second = await store.submit(keyed(scope_id, one))
    assert isinstance(second, Admitted)
    await store.submit(settling(first, "answered", one))
    assert code_of(await store.submit(keyed(scope_id, one))) == "idempotency_in_flight"


async def test_a_transaction_that_fails_claims_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    scope_id = await granted(store)
    with monkeypatch.context() as patch:
        patch.setattr(sqlite, "_save", _saves_and_fails)
        with pytest.raises(StoreUnavailable):
            await store.submit(keyed(scope_id, claim("k")))
    assert code_of(await store.submit(keyed(scope_id, claim("k", "b")))) == "Admitted"


def _saves_and_fails(connection: sqlite3.Connection, changes: Changes) -> None:
    _save(connection, changes)
    raise StoreUnavailable("the disk is full")


_save = sqlite._save


# Forgetting --------------------------------------------------------------------------------------------


def rows_in(path: Path) -> set[bytes]:
    with closing(sqlite3.connect(path)) as connection:
        return {key for (key,) in connection.execute("SELECT key FROM idempotency_keys")}


async def test_expired_keys_go_in_bounded_steps_and_open_ones_stay(
    open_store: OpenStore, tmp_path: Path, clock: Clock
) -> None:
    path = tmp_path / "store.db"
    store = await open_store(path)
    scope_id = await granted(store)
    outcomes: dict[str, Literal["answered", "not_sent", "unknown"] | None] = {
        "unknown": "unknown",
        "in flight": None,
        "not sent": "not_sent",
        **{f"answered {number}": "answered" for number in range(6)},
    }
    admissions: dict[str, str] = {}
    for name, outcome in outcomes.items():
        reply = await store.submit(keyed(scope_id, claim(name)))
        assert isinstance(reply, Admitted)
        admissions[name] = reply.execution.decision_id
        if outcome is not None:
            await store.submit(settling(reply, outcome, claim(name)))
    clock.move(25 * HOUR)
    expired = {claim(name).key for name in outcomes}
    await store.submit(keyed(scope_id, claim("new 0")))
    assert rows_in(path) & expired == expired  # two were looked at, and both are open
    for number in range(1, 5):
        await store.submit(keyed(scope_id, claim(f"new {number}")))
    assert rows_in(path) & expired == {claim("unknown").key, claim("in flight").key}
    assert code_of(await store.submit(keyed(scope_id, claim("unknown")))) == "outcome_unknown"
    await store.submit(
        Reconcile(decision_id=new_decision_id(), admission_id=admissions["unknown"], outcome="executed")
    )
    clock.move(25 * HOUR)
    for number in range(5, 10):
        await store.submit(keyed(scope_id, claim(f"new {number}")))
    assert claim("unknown").key not in rows_in(path)
    assert claim("in flight").key in rows_in(path)


# Any order ---------------------------------------------------------------------------------------------

KEYS = ("k1", "k2")
steps = st.lists(
    st.one_of(
        st.tuples(st.just("admit"), st.sampled_from(KEYS), st.sampled_from("ab"), st.booleans()),
        st.tuples(
            st.just("settle"), st.integers(0, 50), st.sampled_from(["answered", "not_sent", "unknown"])
        ),
        st.tuples(st.just("reconcile"), st.integers(0, 50), st.sampled_from(["executed", "not_executed"])),
        st.tuples(st.just("wait"), st.sampled_from([1, 12 * HOUR, 24 * HOUR, 30 * HOUR])),
        st.tuples(st.just("restart")),
    ),
    min_size=1,
    max_size=40,
)


@dataclass
class Holder:
    """The execution that was admitted last under a key, as the model has it."""

    admission_id: str
    claim: Claim
    request: str
    status: str = "in_flight"
    ended_at: int = 0

    def holds(self, now: int) -> bool:
        if self.status in ("in_flight", "unknown"):
            return True
        return self.status not in ("not_sent", "not_executed") and now < self.ended_at + KEPT_FOR


EXPECTED = {
    "in_flight": "idempotency_in_flight",
    "unknown": "outcome_unknown",
    "executed": "outcome_unknown",
    "answered": "Replayed",
}


class Run:
    """A store, and a model of its keys beside it."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.now = 1_700_000_000 * SECOND
        self.admitted: list[Holder] = []
        self.holders: dict[str, Holder] = {}

    async def open(self) -> None:
        self.store = Store(SqliteEngine(self.path), clock=lambda: self.now, deadline_seconds=5)
        await self.store.open()
        await account_for_crash(self.store)

    async def go(self, through: Sequence[Step]) -> None:
        await self.open()
        try:
            self.scope_id = await granted(self.store)
            for step in through:
                await self.step(step)
        finally:
            await self.store.close()

    async def step(self, step: Step) -> None:
        match step:
            case ("wait", seconds):
                self.now += seconds * SECOND
            case ("restart",) if self.path is not None:
                await self.store.close()
                await self.open()
                for one in self.admitted:
                    if one.status == "in_flight":
                        one.status, one.ended_at = "unknown", self.now
            case ("admit", key, request, recorded):
                await self.admit(key, request, recorded)
            case ("settle", number, outcome) if self.admitted:
                one = self.admitted[number % len(self.admitted)]
                answer = answer_to(one.claim) if outcome == "answered" else None
                await self.end(
                    one,
                    "in_flight",
                    Settle(
                        decision_id=new_decision_id(),
                        admission_id=one.admission_id,
                        outcome=outcome,
                        answer=answer,
                    ),
                )
            case ("reconcile", number, outcome) if self.admitted:
                one = self.admitted[number % len(self.admitted)]
                await self.end(
                    one,
                    "unknown",
                    Reconcile(decision_id=new_decision_id(), admission_id=one.admission_id, outcome=outcome),
                )

    async def admit(self, key: str, request: str, recorded: bool) -> None:
        one = claim(key, request)
        command = keyed(self.scope_id, one, record_denial=recorded)
        reply = await self.store.submit(command)
        holder = self.holders.get(key)
        if holder is None or not holder.holds(self.now):
            assert isinstance(reply, Admitted), reply
            self.holders[key] = Holder(command.decision_id, one, request)
            self.admitted.append(self.holders[key])
            return
        expected = EXPECTED[holder.status] if holder.request == request else "idempotency_key_reused"
        assert code_of(reply) == expected
        if isinstance(reply, Replayed):
            assert reply.execution.decision_id == holder.admission_id
            assert reply.answer == answer_to(one)
        assert isinstance(reply, Denied | Replayed)
        assert reply.decision_id == (command.decision_id if recorded else None)

    async def end(self, one: Holder, needed: str, command: Settle | Reconcile) -> None:
        reply = await self.store.submit(command)
        assert isinstance(reply, Settled) == (one.status == needed)
        if isinstance(reply, Settled):
            one.status, one.ended_at = command.outcome, self.now


@settings(max_examples=150, deadline=None)
@given(steps)
def test_any_order_of_commands_admits_once_under_a_live_key(through: list[Step]) -> None:
    asyncio.run(Run(None).go(through))


@settings(max_examples=20, deadline=None)
@given(steps)
def test_a_restart_changes_nothing_about_that(through: list[Step]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "keys.db"
        asyncio.run(Run(path).go(through))
        verify_sqlite(path)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(KEYS), st.sampled_from("ab")), min_size=1, max_size=60))
def test_of_any_requests_at_once_one_is_admitted_under_each_key(wanted: list[tuple[str, str]]) -> None:
    async def all_at_once() -> None:
        store = Store(SqliteEngine(None), clock=lambda: 1_700_000_000 * SECOND, deadline_seconds=5)
        await store.open()
        try:
            scope_id = await granted(store)
            commands = [keyed(scope_id, claim(*one)) for one in wanted]
            replies = await asyncio.gather(*map(store.submit, commands))
            for key in dict(wanted):
                of_key = [
                    (request, code_of(reply))
                    for (name, request), reply in zip(wanted, replies, strict=True)
                    if name == key
                ]
                first = of_key[0][0]
                assert of_key[0] == (first, "Admitted")
                for request, code in of_key[1:]:
                    held = "idempotency_in_flight" if request == first else "idempotency_key_reused"
                    assert code == held
        finally:
            await store.close()

    asyncio.run(all_at_once())
