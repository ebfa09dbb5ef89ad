"""Scopes as objects, and the store that they ask: snapshots permit nothing by themselves."""

from __future__ import annotations

import asyncio
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.core.command import Admitted, Issued
from sidecar.library import boundscope
from sidecar.library.commands import grant, settle
from sidecar.library.runtime import configured_store
from sidecar.scoped_execution import (
    BoundExecutionScope,
    ScopeActionMismatch,
    ScopeExhausted,
    ScopeExpired,
    ScopeIncidentMismatch,
    ScopeNotFound,
    ScopeRefused,
    ScopeRevoked,
    ScopeStore,
    StoreUnavailable,
    create_recovery_scope,
    get_scope_store,
    register_action,
)
from tests.library.conftest import Reconfigure
from tests.library.recorded import envelopes
from tests.library.scopes import endings, executed, granted, last_envelope
from tests.support import eventually

pytestmark = pytest.mark.usefixtures("store_url")


def created(**terms: Any) -> BoundExecutionScope:
    """One attempt of retry_agent for inc_1 unless told otherwise."""
    wanted = {"incident_id": "inc_1", "allowed_actions": ["retry_agent"], "intent": "a test", **terms}
    return get_scope_store().create_scope(**wanted)


def by_hand(**changes: Any) -> BoundExecutionScope:
    """A scope that nobody granted."""
    forged = BoundExecutionScope(
        scope_id="scope_" + "0" * 32,
        incident_id="inc_1",
        allowed_actions=["retry_agent"],
        max_cost_usd=100.0,
        max_attempts=100,
        expires_at=datetime.now(UTC) + timedelta(days=1),
        intent="mine",
    )
    return replace(forged, **changes)


# The store -----------------------------------------------------------------------------------------------


def test_there_is_one_store_object() -> None:
    assert ScopeStore() is ScopeStore() is get_scope_store() is ScopeStore._instance


def test_a_created_scope_has_the_defaults_of_the_contract() -> None:
    scope = created()
    assert scope == BoundExecutionScope(
        scope_id=scope.scope_id,
        incident_id="inc_1",
        allowed_actions=["retry_agent"],
        max_cost_usd=0.5,
        max_attempts=1,
        expires_at=scope.created_at + timedelta(seconds=300),
        intent="a test",
        target_agents=[],
        created_at=scope.created_at,
        created_by="system",
        attempts_used=0,
        cost_used_usd=0.0,
        status="active",
        execution_log=[],
    )
    assert scope.created_at.tzinfo is UTC
    assert abs(scope.created_at - datetime.now(UTC)) < timedelta(seconds=5)
    assert get_scope_store().get_scope(scope.scope_id) == scope
    assert [each.name for each in fields(scope)] == [
        "scope_id",
        "incident_id",
        "allowed_actions",
        "max_cost_usd",
        "max_attempts",
        "expires_at",
        "intent",
        "target_agents",
        "created_at",
        "created_by",
        "attempts_used",
        "cost_used_usd",
        "status",
        "execution_log",
    ]


def test_a_created_scope_takes_all_its_terms() -> None:
    scope = get_scope_store().create_scope("inc_9", ["a", "b"], "why", 7.25, 4, 90, ["x"], "on call")
    assert (scope.allowed_actions, scope.target_agents, scope.created_by) == (["a", "b"], ["x"], "on call")
    assert (scope.max_cost_usd, scope.max_attempts, scope.intent) == (7.25, 4, "why")
    assert scope.expires_at - scope.created_at == timedelta(seconds=90)
    envelope = last_envelope()
    assert (envelope["event"], envelope["origin"], envelope["scope_id"]) == (
        "issued",
        "library",
        scope.scope_id,
    )


@pytest.mark.parametrize("scope_id", ["scope_none", "", None, 7, "x" * 300, "\ud800"])
def test_a_scope_that_is_not_there_is_none(scope_id: Any) -> None:
    assert get_scope_store().get_scope(scope_id) is None
    assert get_scope_store().revoke_scope(scope_id) is False


def test_the_scopes_of_an_incident_are_listed_newest_first_over_all_pages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(boundscope, "PAGE", 3)
    mine = [created(intent=f"number {number}").scope_id for number in range(8)]
    created(incident_id="inc_2")
    assert [each.scope_id for each in get_scope_store().get_scopes_for_incident("inc_1")] == mine[::-1]


@pytest.mark.parametrize("incident_id", ["inc_none", "", None, 7])
def test_an_unknown_incident_has_no_scopes(incident_id: Any) -> None:
    created()
    assert get_scope_store().get_scopes_for_incident(incident_id) == []


def test_a_revocation_is_repeatable_and_recorded_each_time() -> None:
    scope = created(max_attempts=3)
    assert get_scope_store().revoke_scope(scope.scope_id) is True
    assert get_scope_store().revoke_scope(scope.scope_id) is True
    revoked = envelopes(event="revoked")
    assert [(each["scope_id"], each["origin"]) for each in revoked] == [(scope.scope_id, "library")] * 2
    found = get_scope_store().get_scope(scope.scope_id)
    assert found is not None
    assert found.status == "revoked"
    with pytest.raises(ScopeRevoked):
        scope.consume("retry_agent")


def test_a_revocation_of_nothing_is_recorded_as_refused() -> None:
    assert get_scope_store().revoke_scope("scope_none") is False
    envelope = last_envelope()
    assert (envelope["event"], envelope["origin"]) == ("refused", "library")
    assert envelope["record"]["decision_reason"] == "scope_not_found"


def test_lapsed_scopes_are_counted_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boundscope, "PAGE", 2)
    store = get_scope_store()
    lapsed = [created(ttl_seconds=1) for _ in range(3)]
    used_up, revoked, living = created(ttl_seconds=1), created(ttl_seconds=1), created()
    used_up.consume("retry_agent")
    store.revoke_scope(revoked.scope_id)
    assert store.cleanup_expired() == 0
    threading.Event().wait(1.05)
    before = envelopes()
    assert store.cleanup_expired() == store.cleanup_expired() == 3
    assert envelopes() == before
    statuses = {each.scope_id: each.status for each in store.get_scopes_for_incident("inc_1")}
    assert statuses == {
        **{each.scope_id: "expired" for each in lapsed},
        used_up.scope_id: "exhausted",
        revoked.scope_id: "revoked",
        living.scope_id: "active",
    }


def test_a_scope_of_another_tenant_does_not_exist() -> None:
    command = grant(
        configured_store().policies,
        incident_id="inc_1",
        allowed_actions=["retry_agent"],
        intent="theirs",
        max_cost_usd=0.5,
        max_attempts=1,
        ttl_seconds=1,
        target_agents=None,
        created_by="acme",
    )
    issued = configured_store().submit_sync(replace(command, scope=replace(command.scope, tenant_id="acme")))
    assert isinstance(issued, Issued)
    store, scope_id = get_scope_store(), issued.scope.scope_id
    assert store.get_scope(scope_id) is None
    assert store.get_scopes_for_incident("inc_1") == []
    assert store.revoke_scope(scope_id) is False
    forged = by_hand(scope_id=scope_id)
    assert forged.is_valid() is False
    assert forged.can_execute("retry_agent", "inc_1") == (False, "scope_not_found")
    with pytest.raises(ScopeNotFound):
        forged.consume("retry_agent")
    threading.Event().wait(1.05)
    assert store.cleanup_expired() == 0


async def test_the_sync_faces_work_inside_a_running_loop() -> None:
    scope = created(max_attempts=2)
    assert scope.is_valid()
    assert scope.can_execute("retry_agent", "inc_1") == (True, None)
    scope.consume("retry_agent")
    assert (await executed(scope.scope_id))["attempt_number"] == 2
    assert scope.to_dict()["status"] == "exhausted"
    assert get_scope_store().cleanup_expired() == 0


# Asking ----------------------------------------------------------------------------------------------------


def test_asking_consumes_and_records_nothing() -> None:
    scope = created()
    before = envelopes()
    for _ in range(3):
        assert scope.is_valid() is True
        assert scope.can_execute("retry_agent", "inc_1") == (True, None)
        assert scope.can_execute("reset", "inc_1") == (False, "action_outside_scope")
        scope.to_dict()
    assert envelopes() == before
    scope.consume("retry_agent")


def test_a_refusal_is_told_by_its_code() -> None:
    scope = created(target_agents=["a"])
    assert scope.can_execute("retry_agent", "inc_1") == (True, None)  # on behalf of its own agents
    assert scope.can_execute("retry_agent", "inc_2") == (False, "incident_mismatch")
    assert scope.can_execute("reset", "inc_2") == (False, "incident_mismatch")
    wrong: Any = 7
    assert scope.can_execute(wrong, "inc_1") == (False, "invalid_request")
    scope.consume("retry_agent")
    assert scope.can_execute("retry_agent", "inc_1") == (False, "scope_exhausted")
    get_scope_store().revoke_scope(scope.scope_id)
    assert scope.can_execute("retry_agent", "inc_1") == (False, "scope_revoked")


def test_the_stored_scope_is_asked_and_not_the_snapshot() -> None:
    scope = created(max_attempts=2)
    get_scope_store().revoke_scope(scope.scope_id)
    assert scope.status == "active"
    assert scope.is_valid() is False
    assert scope.can_execute("retry_agent", "inc_1") == (False, "scope_revoked")
    scope.allowed_actions.append("reset")
    assert scope.can_execute("reset", "inc_1") == (False, "action_outside_scope")


def test_the_catalogue_is_asked_too(reconfigure: Reconfigure) -> None:
    reconfigure("{retry_agent: {risk: low, max_cost_usd: 0.2}}")
    scope = created(max_cost_usd=0.3, max_attempts=2)
    scope.consume("retry_agent", 0.2)
    assert scope.is_valid() is True
    assert scope.can_execute("retry_agent", "inc_1") == (False, "scope_exhausted")


def test_a_ceiling_below_the_hold_of_an_action_is_a_wrong_term(reconfigure: Reconfigure) -> None:
    reconfigure("{retry_agent: {risk: low, max_cost_usd: 0.2}}")
    assert created(max_cost_usd=0.2).is_valid() is True
    with pytest.raises(ValueError, match=r"max_cost_usd must be at least 0\.2,.* 'retry_agent' holds"):
        created(max_cost_usd=0.199999)


def test_a_lapsed_scope_never_shows_as_active() -> None:
    scope, snapshot = created(ttl_seconds=1), by_hand(expires_at=datetime.now(UTC))
    threading.Event().wait(1.05)
    assert (scope.is_valid(), scope.can_execute("retry_agent", "inc_1")) == (False, (False, "scope_expired"))
    assert scope.to_dict()["status"] == scope.status == "expired"
    assert snapshot.to_dict()["status"] == "expired"
    with pytest.raises(ScopeExpired):
        scope.consume("retry_agent")


def test_a_scope_that_was_built_by_hand_permits_nothing() -> None:
    forged = by_hand()
    assert forged.is_valid() is False
    assert forged.can_execute("retry_agent", "inc_1") == (False, "scope_not_found")
    with pytest.raises(ScopeNotFound):
        forged.consume("retry_agent")
    assert (forged.attempts_used, forged.execution_log) == (0, [])
    assert forged.to_dict()["attempts_remaining"] == 100
    with pytest.raises(ScopeNotFound):
        asyncio.run(executed(forged.scope_id))


def test_an_altered_snapshot_permits_no_more_than_the_stored_scope() -> None:
    scope = created()
    altered = replace(
        scope,
        allowed_actions=["reset"],
        max_attempts=99,
        max_cost_usd=99.0,
        expires_at=datetime.now(UTC) + timedelta(days=9),
    )
    with pytest.raises(ScopeActionMismatch):
        altered.consume("reset")
    with pytest.raises(ScopeIncidentMismatch):
        replace(scope, incident_id="inc_2").consume("retry_agent")
    altered.consume("retry_agent")
    assert (altered.allowed_actions, altered.max_attempts) == (["retry_agent"], 1)
    with pytest.raises(ScopeExhausted):
        altered.consume("retry_agent")


def test_a_store_that_does_not_answer_says_no() -> None:
    scope = created()
    configured_store().close()
    assert scope.is_valid() is False
    assert scope.can_execute("retry_agent", "inc_1") == (False, "store_unavailable")
    assert scope.to_dict()["scope_id"] == scope.scope_id
    for ask in (
        lambda: scope.consume("retry_agent"),
        created,
        lambda: get_scope_store().get_scope(scope.scope_id),
        lambda: get_scope_store().get_scopes_for_incident("inc_1"),
        lambda: get_scope_store().revoke_scope(scope.scope_id),
        lambda: get_scope_store().cleanup_expired(),
    ):
        with pytest.raises(StoreUnavailable):
            ask()
    assert (scope.attempts_used, scope.status) == (0, "active")


# Consuming -------------------------------------------------------------------------------------------------


def test_consuming_spends_an_attempt_and_money_and_refreshes_the_object() -> None:
    scope = created(max_attempts=2)
    scope.consume("retry_agent", 0.1)
    assert (scope.attempts_used, scope.cost_used_usd, scope.status) == (1, 0.1, "active")
    ((first,),) = (scope.execution_log,)
    assert (first["action"], first["cost_usd"], first["attempt_number"]) == ("retry_agent", 0.1, 1)
    assert abs(datetime.fromisoformat(first["timestamp"]) - datetime.now(UTC)) < timedelta(seconds=5)
    scope.consume("retry_agent", cost_usd=0.2)
    assert (scope.cost_used_usd, scope.status) == (0.3, "exhausted")
    assert [each["attempt_number"] for each in scope.execution_log] == [1, 2]
    assert endings(scope.scope_id) == ["answered"] * 2
    assert get_scope_store().get_scope(scope.scope_id) == scope


def test_consuming_without_a_cost_costs_nothing() -> None:
    scope = created()
    scope.consume("retry_agent")
    assert (scope.cost_used_usd, scope.execution_log[0]["cost_usd"]) == (0.0, 0.0)


def test_three_tenths_fit_under_three_tenths_and_nothing_more() -> None:
    scope = created(max_cost_usd=0.3, max_attempts=10)
    for _ in range(3):
        scope.consume("retry_agent", 0.1)
    assert (scope.cost_used_usd, scope.status) == (0.3, "exhausted")
    with pytest.raises(ScopeExhausted) as refused:
        scope.consume("retry_agent", 0.000001)
    assert refused.value.bound == "max_cost_usd"


def test_a_cost_that_does_not_fit_is_refused_before_it_is_spent() -> None:
    scope = created(max_cost_usd=0.3, max_attempts=2)
    with pytest.raises(ScopeExhausted) as refused:
        scope.consume("retry_agent", 0.300001)
    assert (refused.value.bound, scope.attempts_used) == ("max_cost_usd", 0)
    scope.consume("retry_agent", 0.3)
    assert scope.cost_used_usd == 0.3


@pytest.mark.parametrize("cost", [-0.01, math.nan, math.inf, "0.1", None, True, 2e9])
def test_a_cost_that_is_none_consumes_nothing(cost: Any) -> None:
    scope = created()
    before = envelopes()
    with pytest.raises(ValueError, match="cost_usd"):
        scope.consume("retry_agent", cost)
    assert envelopes() == before


async def test_the_log_shows_executions_that_count(reconfigure: Reconfigure) -> None:
    reconfigure("{retry_agent: {risk: low, max_cost_usd: 0.1, timeout_seconds: 0.05}}")
    scope = created(max_attempts=3)
    register_action("retry_agent", lambda parameters: {"cost_usd": 0.02})
    await executed(scope.scope_id)

    @register_action("retry_agent")
    async def hang(parameters: dict[str, Any]) -> None:
        await asyncio.Event().wait()

    with pytest.raises(TimeoutError):
        await executed(scope.scope_id)
    cancelled = asyncio.create_task(executed(scope.scope_id))
    await asyncio.sleep(0)
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    await eventually(lambda: endings(scope.scope_id) == ["answered", "unknown", "not_sent"])
    found = get_scope_store().get_scope(scope.scope_id)
    assert found is not None
    shown = [(each["attempt_number"], each["cost_usd"]) for each in found.execution_log]
    assert shown == [(1, 0.02), (2, 0.1)]


def test_to_dict_shows_every_field_but_the_log() -> None:
    scope = created(max_attempts=3, target_agents=["a"])
    scope.consume("retry_agent", 0.25)
    shown = scope.to_dict()
    assert set(shown) == {each.name for each in fields(scope)} - {"execution_log"} | {"attempts_remaining"}
    assert (shown["attempts_used"], shown["attempts_remaining"], shown["cost_used_usd"]) == (1, 2, 0.25)
    assert shown["expires_at"] == scope.expires_at.isoformat(timespec="microseconds")
    shown["allowed_actions"].append("reset")
    assert scope.allowed_actions == ["retry_agent"]


async def test_both_ways_to_ask_for_a_scope_show_the_same() -> None:
    shown = await create_recovery_scope("inc_1", "retry_agent", "a test", target_agents=["a"])
    found = get_scope_store().get_scope(shown["scope_id"])
    assert found is not None
    assert found.to_dict() == shown


def test_attempts_remaining_are_never_below_zero() -> None:
    assert by_hand(attempts_used=200).to_dict()["attempts_remaining"] == 0


def test_a_hundred_threads_consume_three_attempts() -> None:
    scope = created(max_attempts=3)
    together = threading.Barrier(100)

    def consume(_: int) -> bool:
        own = get_scope_store().get_scope(scope.scope_id)
        assert own is not None
        together.wait()
        try:
            own.consume("retry_agent", 0.1)
        except ScopeExhausted:
            return False
        return True

    with ThreadPoolExecutor(100) as pool:
        assert list(pool.map(consume, range(100))).count(True) == 3
    found = get_scope_store().get_scope(scope.scope_id)
    assert found is not None
    assert (found.attempts_used, found.cost_used_usd, len(found.execution_log)) == (3, 0.3, 3)


def test_the_log_is_in_the_order_of_the_attempts() -> None:
    scope = created(max_attempts=40)
    with ThreadPoolExecutor(40) as pool:
        list(pool.map(lambda _: replace(scope).consume("retry_agent"), range(40)))
    found = get_scope_store().get_scope(scope.scope_id)
    assert found is not None
    assert [each["attempt_number"] for each in found.execution_log] == list(range(1, 41))


async def test_an_end_without_a_store_does_not_raise() -> None:
    scope_id = await granted()
    await executed(scope_id)
    (execution,) = await configured_store().read(lambda engine: engine.executions_of(scope_id))
    scope = await configured_store().read(lambda engine: engine.scope(scope_id))
    assert scope is not None
    store = configured_store()
    store.close()
    assert await settle(store, Admitted(scope, execution, None), "answered") == scope


# Any history -----------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(
    attempts=st.integers(1, 4),
    ceiling=st.integers(0, 500_000),
    steps=st.lists(st.one_of(st.integers(0, 300_000), st.sampled_from(["reset", "revoke"])), max_size=8),
)
def test_no_history_spends_more_than_was_granted(attempts: int, ceiling: int, steps: list[int | str]) -> None:
    """Consumed attempts and money against sums made the plain way."""
    scope = created(max_attempts=attempts, max_cost_usd=ceiling / 1_000_000)
    spent: list[int] = []
    revoked = False
    for step in steps:
        if step == "revoke":
            revoked = get_scope_store().revoke_scope(scope.scope_id)
            continue
        action, cost = ("retry_agent", step) if isinstance(step, int) else (step, 0)
        told, code = scope.can_execute(action, "inc_1")
        fits = len(spent) < attempts and sum(spent) + cost <= ceiling and not 0 < ceiling <= sum(spent)
        refused: str | None = None
        try:
            scope.consume(action, cost / 1_000_000)
            spent.append(cost)
        except ScopeRefused as exc:
            refused = exc.code
        assert (refused is None) == (action == "retry_agent" and not revoked and fits)
        assert told == (code is None)
        assert told or code == refused  # asked without a cost, so it may have said yes
        found = get_scope_store().get_scope(scope.scope_id)
        assert found is not None
        assert found.attempts_used == len(spent) <= attempts
        assert found.cost_used_usd == sum(spent) / 1_000_000 <= ceiling / 1_000_000
