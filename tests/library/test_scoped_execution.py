"""Scopes and executions in the library: the recovery API, every refusal with its record, and callables."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import math
import os
import pickle
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar import scoped_execution
from sidecar.core.command import LiftFreeze, SetFreeze, Turn
from sidecar.core.policy import PolicySet
from sidecar.core.wording import visible_chars
from sidecar.errors import ERRORS, ScopegateError
from sidecar.ids import new_decision_id
from sidecar.library.commands import grant
from sidecar.library.refusals import SCOPE_ERRORS
from sidecar.library.runtime import UNRESTRICTED, configured_store
from sidecar.scoped_execution import (
    ScopeActionMismatch,
    ScopedExecutionRequired,
    ScopeExhausted,
    ScopeExpired,
    ScopeIncidentMismatch,
    ScopeNotFound,
    ScopeRefused,
    ScopeRevoked,
    ScopeTargetMismatch,
    StoreUnavailable,
    create_recovery_scope,
    execute_with_scope,
    get_scope_store,
    register_action,
    validate_scope_required,
)
from tests.library.conftest import Reconfigure
from tests.library.recorded import envelopes
from tests.library.scopes import endings, executed, executions, granted, last_envelope, settled
from tests.support import eventually

pytestmark = pytest.mark.usefixtures("store_url")

RESULT = [
    "success",
    "scope_id",
    "action",
    "incident_id",
    "attempt_number",
    "scope_status",
    "attempts_remaining",
    "cost_used_usd",
    "executed_at",
]


# The recovery API ----------------------------------------------------------------------------------------


async def test_a1_to_a5_of_pin_162_hold_one_after_the_other() -> None:
    with pytest.raises(ScopedExecutionRequired) as a1:
        await execute_with_scope(None, "retry_agent", "inc_123")
    assert (a1.value.http_status, a1.value.code) == (400, "scoped_execution_required")

    scope = await create_recovery_scope(
        "inc_123", "retry_agent", "Recover from hallucinated legal response", 0.50, 1
    )
    assert scope["intent"] == "Recover from hallucinated legal response"
    assert datetime.fromisoformat(scope["expires_at"]) > datetime.now(UTC)

    done = await execute_with_scope(scope["scope_id"], "retry_agent", "inc_123")
    assert (done["success"], done["scope_status"], done["attempts_remaining"]) == (True, "exhausted", 0)

    with pytest.raises(ScopeExhausted) as a4:
        await execute_with_scope(scope["scope_id"], "retry_agent", "inc_123")
    assert (a4.value.http_status, a4.value.code, a4.value.bound) == (400, "scope_exhausted", "max_attempts")

    with pytest.raises(ScopeActionMismatch) as a5:
        await execute_with_scope(scope["scope_id"], "drop_database", "inc_123")
    assert (a5.value.http_status, a5.value.code) == (403, "action_outside_scope")

    assert [each["event"] for each in envelopes()] == [
        "refused",
        "issued",
        "admitted",
        "settled",
        "refused",
        "refused",
    ]


# Asking for a scope --------------------------------------------------------------------------------------


async def test_a_scope_has_the_defaults_of_the_contract_and_leaves_a_record() -> None:
    before = datetime.now(UTC)
    scope = await create_recovery_scope("inc_1", "retry_agent", "because")
    assert scope.pop("scope_id").startswith("scope_")
    created = datetime.fromisoformat(scope.pop("created_at"))
    assert abs(created - before) < timedelta(seconds=5)
    assert datetime.fromisoformat(scope.pop("expires_at")) - created == timedelta(seconds=300)
    assert scope == {
        "incident_id": "inc_1",
        "allowed_actions": ["retry_agent"],
        "max_cost_usd": 0.5,
        "max_attempts": 1,
        "intent": "because",
        "target_agents": [],
        "created_by": "system",
        "attempts_used": 0,
        "attempts_remaining": 1,
        "cost_used_usd": 0.0,
        "status": "active",
    }
    (envelope,) = envelopes()
    assert (envelope["event"], envelope["origin"]) == ("issued", "library")
    assert envelope["record"]["decision_inputs"]["policy_id"] == "scope_grant"
    assert envelope["record"]["details"]["intent"] == "because"
    assert envelope["record"]["details"]["created_by"] == "system"


async def test_the_limits_of_http_do_not_bind_the_library() -> None:
    scope = await create_recovery_scope(
        "inc_1", "retry_agent", "x" * 2000, 5000, 11, 1, ["a", "b"], created_by="on call"
    )
    assert (scope["max_cost_usd"], scope["max_attempts"]) == (5000, 11)
    assert (scope["target_agents"], scope["created_by"]) == (["a", "b"], "on call")
    lasts = datetime.fromisoformat(scope["expires_at"]) - datetime.fromisoformat(scope["created_at"])
    assert lasts == timedelta(seconds=1)


WRONG_TERMS: dict[str, list[Any]] = {
    "incident_id": [None, "", 7, "a\nb", "x" * 257, "\ud800"],
    "action": [None, "", 7, ["retry_agent"], "a\tb"],
    "intent": [None, "", " \n ", "\u200b" * 20, "\u2800 \u2800", 7, "x" * 2001, "why \ud800"],
    "max_cost_usd": [None, "1", True, -0.01, math.nan, math.inf, 1e-7, 0.1 + 0.2, 10**400, Decimal("sNaN")],
    "max_attempts": [None, "1", True, 0, -1, 1.0, 2**70],
    "ttl_seconds": [None, "60", True, 0, -1, 1.5, 2**70],
    "target_agents": ["a", ["a", 7], [""], {}, {"a"}, 7],
    "created_by": [None, "", 7, "a\nb"],
}


@pytest.mark.parametrize(
    ("term", "value"), [(term, value) for term, values in WRONG_TERMS.items() for value in values]
)
async def test_a_term_that_is_none_is_a_value_error_that_names_it(term: str, value: Any) -> None:
    with pytest.raises(ValueError, match="allowed_actions" if term == "action" else term):
        await granted(**{term: value})
    assert envelopes() == []


@pytest.mark.parametrize("actions", ["retry_agent", [], [""], None, {"retry_agent"}, ["a", 7]])
def test_the_actions_of_a_scope_are_a_list_of_names(actions: Any) -> None:
    with pytest.raises(ValueError, match="allowed_actions"):
        get_scope_store().create_scope("inc_1", actions, "a test")
    assert envelopes() == []


@given(
    micros=st.integers(0, 10**12),
    attempts=st.integers(1, 10**6),
    ttl=st.integers(1, 10**8),
    intent=st.text(min_size=1, max_size=50).filter(lambda text: visible_chars(text) > 0),
)
def test_terms_in_bounds_are_taken_exactly_as_they_are(
    micros: int, attempts: int, ttl: int, intent: str
) -> None:
    issue = grant(
        UNRESTRICTED,
        incident_id="i",
        allowed_actions=["a", "b", "a"],
        intent=intent,
        max_cost_usd=micros / 1_000_000,
        max_attempts=attempts,
        ttl_seconds=ttl,
        target_agents=None,
        created_by="t",
    )
    assert (issue.scope.max_cost, issue.scope.max_attempts, issue.ttl) == (micros, attempts, ttl)
    assert (issue.scope.intent, issue.scope.allowed_actions) == (intent, ("a", "b"))


async def test_an_action_that_the_catalogue_does_not_list_gets_no_scope(reconfigure: Reconfigure) -> None:
    reconfigure("{restart_pod: {risk: low}}")
    with pytest.raises(ScopeRefused) as refused:
        await granted()
    assert (refused.value.code, refused.value.http_status) == ("policy_denied", 403)
    assert (refused.value.action, refused.value.rules) == ("retry_agent", [])
    envelope = last_envelope()
    assert (envelope["event"], envelope["record"]["decision_outcome"]) == ("refused", "policy_blocked")
    assert envelope["record"]["decision_id"] == refused.value.decision_id
    assert await granted(action="restart_pod")


# Refusals ------------------------------------------------------------------------------------------------

MEMBERS = ("scope_id", "incident_id", "action", "bound", "expires_at", "target_agents", "member", "rules")


async def refusal_of(kind: type[ScopeRefused], scope_id: Any, parameters: Any = None, **claims: Any) -> Any:
    """The refusal of an execution, of exactly one class: consumes nothing, and leaves its record."""
    before = None if not isinstance(scope_id, str) else get_scope_store().get_scope(scope_id)
    with pytest.raises(ScopeRefused) as caught:
        await executed(scope_id, parameters, **claims)
    refused = caught.value
    assert type(refused) is kind
    assert refused.http_status == ERRORS[refused.code].status
    assert str(refused) == refused.message != ""
    assert {name: getattr(refused, name) for name in MEMBERS} == {
        name: refused.members.get(name) for name in MEMBERS
    }
    envelope = last_envelope()
    record = envelope["record"]
    assert (envelope["event"], envelope["origin"]) == ("refused", "library")
    assert (record["decision_id"], record["decision_reason"]) == (refused.decision_id, refused.code)
    assert record["details"]["message"] == refused.message
    assert {name: record["details"][name] for name in refused.members} == refused.members
    after = None if not isinstance(scope_id, str) else get_scope_store().get_scope(scope_id)
    assert before == after
    return refused


@pytest.mark.parametrize("scope_id", [None, ""])
async def test_without_a_scope_nothing_is_executed(scope_id: str | None) -> None:
    refused = await refusal_of(ScopedExecutionRequired, scope_id)
    assert refused.members == {"incident_id": "inc_1", "action": "retry_agent"}
    assert last_envelope()["record"]["decision_outcome"] == "blocked"


async def test_validating_without_a_scope_records_the_refusal_and_raises_it() -> None:
    with pytest.raises(ScopedExecutionRequired) as refused:
        await validate_scope_required("inc_1", "retry_agent")
    assert (refused.value.incident_id, refused.value.action) == ("inc_1", "retry_agent")
    (envelope,) = envelopes()
    assert (envelope["event"], envelope["origin"]) == ("refused", "library")
    assert (envelope["incident_id"], envelope["action"]) == ("inc_1", "retry_agent")
    assert envelope["record"]["decision_id"] == refused.value.decision_id


@pytest.mark.parametrize("names", [(None, None), ("", "retry_agent"), (7, "retry_agent")])
async def test_validating_always_raises(names: Any) -> None:
    with pytest.raises(ScopeRefused):
        await validate_scope_required(*names)
    assert [each["event"] for each in envelopes()] == ["refused"]


async def test_a_scope_that_does_not_exist_is_not_found() -> None:
    refused = await refusal_of(ScopeNotFound, "scope_none")
    assert (refused.http_status, refused.members) == (404, {"scope_id": "scope_none"})


async def test_a_scope_is_for_its_own_incident_only() -> None:
    scope_id = await granted()
    refused = await refusal_of(ScopeIncidentMismatch, scope_id, incident_id="inc_2")
    assert (refused.http_status, refused.members) == (403, {"scope_id": scope_id, "incident_id": "inc_2"})


async def test_a_scope_is_for_its_own_actions_only() -> None:
    scope_id = await granted()
    refused = await refusal_of(ScopeActionMismatch, scope_id, action="reset")
    assert (refused.http_status, refused.members) == (403, {"scope_id": scope_id, "action": "reset"})


@pytest.mark.parametrize("named", [[], ["c"], ["a", "c"]])
async def test_a_scope_with_target_agents_is_for_those_only(named: list[str]) -> None:
    scope_id = await granted(target_agents=["a", "b"])
    refused = await refusal_of(ScopeTargetMismatch, scope_id, {"target_agents": named})
    assert (refused.http_status, refused.members) == (403, {"scope_id": scope_id, "target_agents": named})
    assert (await refusal_of(ScopeTargetMismatch, scope_id)).target_agents == []
    assert (await executed(scope_id, {"target_agents": ["b"]}))["success"] is True


async def test_a_revoked_scope_permits_nothing_though_attempts_are_left() -> None:
    scope_id = await granted(max_attempts=2)
    get_scope_store().revoke_scope(scope_id)
    refused = await refusal_of(ScopeRevoked, scope_id)
    assert (refused.http_status, refused.members) == (400, {"scope_id": scope_id})


async def test_an_expired_scope_permits_nothing() -> None:
    scope_id = await granted(ttl_seconds=1)
    (issued,) = get_scope_store().get_scopes_for_incident("inc_1")
    await asyncio.sleep(1.05)
    refused = await refusal_of(ScopeExpired, scope_id)
    expires_at = issued.expires_at.isoformat(timespec="microseconds")
    assert (refused.http_status, refused.members) == (
        400,
        {"scope_id": scope_id, "expires_at": expires_at},
    )


async def test_attempts_and_cost_are_exhausted_each_under_its_own_name(reconfigure: Reconfigure) -> None:
    reconfigure("{retry_agent: {risk: low, max_cost_usd: 0.10}}")
    scope_id = await granted(max_cost_usd=0.5)
    await executed(scope_id)
    refused = await refusal_of(ScopeExhausted, scope_id)
    assert refused.members == {"scope_id": scope_id, "bound": "max_attempts"}
    narrow = await granted(max_cost_usd=0.199999, max_attempts=2)
    await executed(narrow)
    refused = await refusal_of(ScopeExhausted, narrow)
    assert refused.members == {"scope_id": narrow, "bound": "max_cost_usd"}


async def test_a_scope_that_could_never_be_spent_is_a_value_error_and_recorded(
    reconfigure: Reconfigure,
) -> None:
    reconfigure("{retry_agent: {risk: low, max_cost_usd: 0.60}}")
    for terms in ({}, {"max_cost_usd": 0.599999}):
        with pytest.raises(ValueError, match=r"^max_cost_usd must be at least 0\.6, because .*'retry_agent'"):
            await granted(**terms)
        record = last_envelope()["record"]
        assert (record["decision_outcome"], record["decision_reason"]) == ("blocked", "invalid_scope")
        assert record["details"]["min_cost_usd"] == 0.6
    await executed(await granted(max_cost_usd=0.6))


async def test_an_action_that_left_the_catalogue_is_denied(store_url: str, reconfigure: Reconfigure) -> None:
    if store_url == "memory://":
        reconfigure("{retry_agent: {risk: low}}")
        scope_id = await granted()
        configured_store().policies = PolicySet(revision="later", actions={})
    else:
        scope_id = await granted()
        reconfigure("{restart_pod: {risk: low}}")
    refused = await refusal_of(ScopeRefused, scope_id)
    assert (refused.code, refused.http_status, refused.action) == ("policy_denied", 403, "retry_agent")
    assert last_envelope()["record"]["decision_outcome"] == "policy_blocked"


@pytest.mark.parametrize(
    ("claims", "member"),
    [
        ({"scope_id": 7}, "/scope_id"),
        ({"scope_id": "a\nb"}, "/scope_id"),
        ({"incident_id": ["inc_1"]}, "/incident_id"),
        ({"action": 7}, "/action"),
        ({"parameters": "all"}, "/parameters"),
        ({"parameters": [1]}, "/parameters"),
        ({"parameters": {"target_agents": "a"}}, "/parameters/target_agents"),
        ({"parameters": {"target_agents": ["a", 7]}}, "/parameters/target_agents"),
        ({"parameters": {"target_agents": ("a",)}}, "/parameters/target_agents"),
        ({"parameters": {"Target_Agents": ["a"]}}, "/parameters/Target_Agents"),
        ({"incident_id": None}, "incident_id"),
        ({"action": ""}, "action"),
    ],
)
async def test_what_cannot_be_read_is_refused_by_name(claims: dict[str, Any], member: str) -> None:
    claims = {"scope_id": await granted(), **claims}
    refused = await refusal_of(ScopeRefused, claims.pop("scope_id"), claims.pop("parameters", None), **claims)
    assert (refused.code, refused.http_status) == ("invalid_request", 400)
    assert (refused.member, refused.members) == (member, {"member": member})


@pytest.mark.parametrize("name", ["reset_attempts", "expired", "not found", "max_cost_usd", "revoked"])
async def test_the_class_is_chosen_by_the_code_and_never_by_words_in_a_name(name: str) -> None:
    other = await granted(incident_id=name, action=name)
    await refusal_of(ScopeActionMismatch, await granted(), action=name)
    await refusal_of(ScopeIncidentMismatch, other)
    await refusal_of(ScopedExecutionRequired, None, action=name, incident_id=name)
    await executed(other, action=name, incident_id=name)
    await refusal_of(ScopeExhausted, other, action=name, incident_id=name)


async def test_the_first_check_that_fails_decides() -> None:
    """A scope on which all fails at once, asked for less and less that is wrong."""
    scope_id = await granted(target_agents=["a"], ttl_seconds=1)
    right = {"target_agents": ["a"]}
    await executed(scope_id, right)
    await asyncio.sleep(1.05)
    wrong: dict[str, Any] = {"incident_id": "inc_2", "action": "reset"}
    await refusal_of(ScopeRefused, 7, {"target_agents": 7}, **wrong)
    await refusal_of(ScopedExecutionRequired, None, **{**wrong, "incident_id": None})
    await refusal_of(ScopeNotFound, "scope_none", **wrong)
    await refusal_of(ScopeIncidentMismatch, scope_id, **wrong)
    await refusal_of(ScopeActionMismatch, scope_id, action="reset")
    await refusal_of(ScopeTargetMismatch, scope_id)
    await refusal_of(ScopeExpired, scope_id, right)
    get_scope_store().revoke_scope(scope_id)
    await refusal_of(ScopeRevoked, scope_id, right)


async def test_attempts_are_said_to_be_used_up_before_cost_is() -> None:
    register_action("retry_agent", lambda parameters: {"cost_usd": 0.5})
    used_up, too_dear = await granted(max_cost_usd=0.5), await granted(max_cost_usd=0.5, max_attempts=2)
    await executed(used_up)
    await executed(too_dear)
    assert (await refusal_of(ScopeExhausted, used_up)).bound == "max_attempts"
    assert (await refusal_of(ScopeExhausted, too_dear)).bound == "max_cost_usd"


def test_every_exception_has_the_code_and_status_of_the_wire() -> None:
    assert {kind.__name__: (code, ERRORS[code].status) for code, kind in SCOPE_ERRORS.items()} == {
        "ScopedExecutionRequired": ("scoped_execution_required", 400),
        "ScopeNotFound": ("scope_not_found", 404),
        "ScopeIncidentMismatch": ("incident_mismatch", 403),
        "ScopeActionMismatch": ("action_outside_scope", 403),
        "ScopeTargetMismatch": ("target_outside_scope", 403),
        "ScopeRevoked": ("scope_revoked", 400),
        "ScopeExpired": ("scope_expired", 400),
        "ScopeExhausted": ("scope_exhausted", 400),
    }
    for kind in SCOPE_ERRORS.values():
        assert issubclass(kind, ScopeRefused)
        assert issubclass(kind, ScopegateError)
        plain = kind("in words")
        assert (str(plain), plain.http_status, plain.scope_id) == (
            "in words",
            ERRORS[plain.code].status,
            None,
        )


async def test_a_refusal_survives_a_trip_to_another_process() -> None:
    refused = await refusal_of(ScopeActionMismatch, await granted(), action="reset")
    copy = pickle.loads(pickle.dumps(refused))
    assert type(copy) is ScopeActionMismatch
    assert vars(copy) == vars(refused)
    assert str(copy) == str(refused)


# Executing -----------------------------------------------------------------------------------------------


async def test_without_a_callable_an_execution_consumes_records_and_returns() -> None:
    scope_id = await granted(max_attempts=2)
    done = await executed(scope_id, {"depth": 2})
    assert list(done) == RESULT
    assert abs(datetime.fromisoformat(done.pop("executed_at")) - datetime.now(UTC)) < timedelta(seconds=5)
    assert done == {
        "success": True,
        "scope_id": scope_id,
        "action": "retry_agent",
        "incident_id": "inc_1",
        "attempt_number": 1,
        "scope_status": "active",
        "attempts_remaining": 1,
        "cost_used_usd": 0.0,
    }
    _, admitted, ended = envelopes()
    assert (admitted["event"], admitted["origin"]) == ("admitted", "library")
    assert admitted["record"]["decision_inputs"]["parameters"] == {"depth": 2}
    assert (ended["event"], ended["admission_id"]) == ("settled", admitted["record"]["decision_id"])
    assert ended["record"]["details"]["outcome"] == "answered"
    assert (await executed(scope_id))["attempt_number"] == 2


async def test_a_sync_callable_runs_in_a_thread_and_its_answer_comes_back() -> None:
    ran: list[Any] = []

    @register_action("retry_agent")
    def retry(parameters: dict[str, Any]) -> str:
        ran.append((threading.current_thread(), parameters))
        return "done"

    scope_id = await granted()
    done = await executed(scope_id, {"depth": 2})
    assert list(done) == [*RESULT, "result"]
    assert done["result"] == "done"
    ((thread, parameters),) = ran
    assert thread is not threading.current_thread()
    assert thread.daemon is True
    assert parameters == {"depth": 2}


async def test_an_async_callable_runs_in_the_callers_loop() -> None:
    async def retry(parameters: dict[str, Any]) -> Any:
        await asyncio.sleep(0)
        return asyncio.get_running_loop(), parameters

    assert register_action("retry_agent", retry) is retry
    done = await executed(await granted())
    assert done["result"] == (asyncio.get_running_loop(), {})


class Restart:
    async def __call__(self, parameters: dict[str, Any]) -> str:
        await asyncio.sleep(0)
        return "restarted"


async def resumed(word: str, parameters: dict[str, Any]) -> str:
    await asyncio.sleep(0)
    return word


@pytest.mark.parametrize(
    ("run", "returned"),
    [
        (Restart(), "restarted"),
        (functools.partial(resumed, "resumed"), "resumed"),
        (lambda parameters: resumed("later", parameters), "later"),
        (dict, {}),
    ],
)
async def test_whatever_can_be_called_may_be_registered(run: Any, returned: Any) -> None:
    register_action("retry_agent", run)
    assert (await executed(await granted()))["result"] == returned


@pytest.mark.parametrize("name", ["", None, 7, "a\nb", "x" * 257])
def test_an_action_is_registered_under_a_name(name: Any) -> None:
    with pytest.raises(ValueError, match="name of an action"):
        register_action(name, dict)


def test_only_what_can_be_called_is_registered(registered_actions: dict[str, Any]) -> None:
    wrong: Any = "retry"
    with pytest.raises(TypeError, match="callable"):
        register_action("retry_agent", wrong)
    assert registered_actions == {}


async def test_the_last_callable_registered_for_an_action_runs() -> None:
    register_action("retry_agent", lambda parameters: "first")
    register_action("retry_agent", lambda parameters: "second")
    assert (await executed(await granted()))["result"] == "second"


async def test_what_was_judged_is_what_the_callable_gets() -> None:
    """The caller may change its dict as soon as it has asked; who is targeted stays as it was judged."""
    got: list[Any] = []
    register_action("retry_agent", got.append)
    scope_id = await granted(target_agents=["a"])
    parameters: dict[str, Any] = {"target_agents": ["a"]}
    executing = asyncio.create_task(executed(scope_id, parameters))
    await asyncio.sleep(0)
    parameters["target_agents"].append("b")
    parameters["more"] = True
    await executing
    assert got == [{"target_agents": ["a"]}]


async def test_parameters_that_are_not_json_reach_the_callable_and_the_record_has_them_as_text() -> None:
    got: list[Any] = []
    register_action("retry_agent", got.append)
    when, agents = datetime(2026, 1, 1, tzinfo=UTC), frozenset({"b"})
    await executed(await granted(), {"when": when, "agents": agents, 7: math.nan})
    assert got[0]["when"] is when
    assert got[0]["agents"] is agents
    admitted = envelopes(event="admitted")[0]["record"]["decision_inputs"]["parameters"]
    assert admitted == {"when": "2026-01-01T00:00:00+00:00", "agents": ["b"], "7": "NaN"}


async def test_a_record_leaves_large_parameters_out() -> None:
    await executed(await granted(), {"text": "x" * 20_000})
    inputs = envelopes(event="admitted")[0]["record"]["decision_inputs"]
    assert "parameters" not in inputs
    assert inputs["parameters_left_out"]["body_bytes"] > 20_000


async def test_a_sync_callable_sees_the_context_of_its_caller() -> None:
    trace = contextvars.ContextVar("trace", default="none")
    trace.set("t-1")
    register_action("retry_agent", lambda parameters: trace.get())
    assert (await executed(await granted()))["result"] == "t-1"


@pytest.mark.parametrize("is_async", [True, False])
async def test_an_exception_is_an_end_and_comes_through(is_async: bool) -> None:
    def boom(parameters: dict[str, Any]) -> None:
        raise LookupError("no such agent")

    async def boom_later(parameters: dict[str, Any]) -> None:
        await asyncio.sleep(0)
        boom(parameters)

    register_action("retry_agent", boom_later if is_async else boom)
    scope_id = await granted(max_attempts=2)
    with pytest.raises(LookupError, match="no such agent"):
        await executed(scope_id)
    (execution,) = executions(scope_id)
    assert execution.status == "answered"
    assert execution.cause == "the action raised LookupError: no such agent"
    assert last_envelope()["record"]["details"]["cause"] == execution.cause
    found = get_scope_store().get_scope(scope_id)
    assert found is not None
    assert found.attempts_used == 1


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("even this")


@pytest.mark.parametrize(
    ("raised", "cause"),
    [
        (Unspeakable(), "the action raised Unspeakable"),
        (ValueError("x" * 2_000 + "\ud800"), "the action raised ValueError: " + "x" * 288),
        (ValueError("\ud800"), "the action raised ValueError: \\ud800"),
        (TimeoutError(), "the action raised TimeoutError"),
    ],
)
async def test_the_cause_of_an_end_can_always_be_written_down(raised: Exception, cause: str) -> None:
    def boom(parameters: dict[str, Any]) -> None:
        raise raised

    register_action("retry_agent", boom)
    scope_id = await granted()
    with pytest.raises(type(raised)):
        await executed(scope_id)
    (execution,) = executions(scope_id)
    assert (execution.status, execution.cause) == ("answered", cause)


async def test_a_callable_that_stops_an_iteration_has_raised() -> None:
    def stop(parameters: dict[str, Any]) -> None:
        raise StopIteration

    register_action("retry_agent", stop)
    scope_id = await granted()
    with pytest.raises(RuntimeError, match="StopIteration"):
        await executed(scope_id)
    assert endings(scope_id) == ["answered"]


async def test_an_execution_whose_caller_is_cancelled_is_unknown() -> None:
    begun, cut = asyncio.Event(), asyncio.Event()

    @register_action("retry_agent")
    async def retry(parameters: dict[str, Any]) -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            cut.set()

    scope_id = await granted()
    executing = asyncio.create_task(executed(scope_id))
    await begun.wait()
    executing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await executing
    await cut.wait()
    assert await settled(scope_id) == ["unknown"]
    assert executions(scope_id)[0].cause == "the action was cancelled"
    await refusal_of(ScopeExhausted, scope_id)


async def test_a_sync_callable_of_a_cancelled_caller_is_left_behind() -> None:
    begun, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    @register_action("retry_agent")
    def retry(parameters: dict[str, Any]) -> None:
        begun.set()
        go_on.wait(10)
        ended.set()

    scope_id = await granted()
    executing = asyncio.create_task(executed(scope_id))
    await eventually(begun.is_set)
    executing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await executing
    assert await settled(scope_id) == ["unknown"]
    go_on.set()
    await eventually(ended.is_set)
    assert endings(scope_id) == ["unknown"]


async def test_an_execution_that_is_cancelled_before_it_begins_gives_its_attempt_back() -> None:
    """Wherever in its admission it is cut, also at the moment when the reply is on its way."""
    ran: list[Any] = []
    register_action("retry_agent", ran.append)
    scope_id = await granted(max_attempts=1_000, max_cost_usd=1)

    async def cut(number: int) -> bool:
        executing = asyncio.create_task(executed(scope_id))
        await asyncio.sleep(number % 20 / 4_000)
        executing.cancel()
        try:
            await executing
        except asyncio.CancelledError:
            return True
        return False

    cancelled = (await asyncio.gather(*map(cut, range(400)))).count(True)
    assert cancelled > 0
    await eventually(lambda: len(executions(scope_id)) == 400)
    found = await settled(scope_id)
    # Whatever had begun had begun; nothing else is counted.
    assert found.count("not_sent") + len(ran) == 400
    scope = get_scope_store().get_scope(scope_id)
    assert scope is not None
    assert scope.attempts_used == len(ran)


@pytest.mark.parametrize("kind", ["async", "stubborn", "sync"])
async def test_a_callable_that_outlasts_its_timeout_is_unknown(reconfigure: Reconfigure, kind: str) -> None:
    reconfigure("{retry_agent: {risk: low, timeout_seconds: 0.1, max_cost_usd: 0.1}}")
    go_on, cut = threading.Event(), threading.Event()

    async def retry(parameters: dict[str, Any]) -> None:
        while not go_on.is_set():
            try:
                await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                cut.set()
                if kind == "async":
                    raise

    register_action("retry_agent", (lambda parameters: go_on.wait(10)) if kind == "sync" else retry)
    scope_id = await granted()
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"did not end within 0.1 s"):
        await executed(scope_id)
    assert 0.1 <= time.monotonic() - began < 5
    (execution,) = executions(scope_id)
    assert (execution.status, execution.cause) == ("unknown", "the action did not end within 0.1 s")
    scope = get_scope_store().get_scope(scope_id)
    assert scope is not None
    assert (scope.attempts_used, scope.cost_used_usd) == (1, 0.1)
    assert cut.is_set() is (kind != "sync")
    go_on.set()
    await asyncio.sleep(0.02)
    assert endings(scope_id) == ["unknown"]


async def test_a_timeout_that_a_callable_raises_itself_is_an_answer(reconfigure: Reconfigure) -> None:
    reconfigure("{retry_agent: {risk: low, timeout_seconds: 5}}")

    @register_action("retry_agent")
    async def retry(parameters: dict[str, Any]) -> None:
        raise TimeoutError("the agent did not answer")

    scope_id = await granted()
    with pytest.raises(TimeoutError, match="the agent did not answer"):
        await executed(scope_id)
    assert endings(scope_id) == ["answered"]


async def test_a_callable_for_which_there_is_no_thread_was_not_sent() -> None:
    ran: list[Any] = []
    register_action("retry_agent", ran.append)
    scope_id = await granted()
    before = threading.stack_size(1 << 47)  # more than there are addresses
    try:
        with pytest.raises(RuntimeError, match="no thread"):
            await executed(scope_id)
    finally:
        threading.stack_size(before)
    assert (ran, endings(scope_id)) == ([], ["not_sent"])
    assert (await executed(scope_id))["attempts_remaining"] == 0


async def test_an_execution_may_execute_another() -> None:
    inner = await granted(action="clear_cache")

    @register_action("retry_agent")
    async def retry(parameters: dict[str, Any]) -> Any:
        done = await execute_with_scope(inner, "clear_cache", "inc_1")
        return done["success"]

    outer = await granted()
    assert (await executed(outer))["result"] is True
    assert endings(outer) == endings(inner) == ["answered"]


# Money ---------------------------------------------------------------------------------------------------


async def test_three_tenths_fill_a_ceiling_of_three_tenths_exactly(reconfigure: Reconfigure) -> None:
    reconfigure("{retry_agent: {risk: low, max_cost_usd: 0.1}}")
    register_action("retry_agent", lambda parameters: {"cost_usd": 0.1})
    scope_id = await granted(max_cost_usd=0.3, max_attempts=10)
    done = [await executed(scope_id) for _ in range(3)]
    assert [each["cost_used_usd"] for each in done] == [0.1, 0.2, 0.3]
    assert [each["scope_status"] for each in done] == ["active", "active", "exhausted"]
    assert (await refusal_of(ScopeExhausted, scope_id)).bound == "max_cost_usd"


@pytest.mark.parametrize(
    ("returned", "cost"),
    [
        ({"cost_usd": 0.04}, 0.04),
        ({"cost_usd": 0}, 0.0),
        ({"cost_usd": Decimal("0.000000001")}, 0.000001),
        ({"cost_usd": "0.04"}, 0.1),
        ({"cost_usd": -1}, 0.1),
        ({"cost_usd": None}, 0.1),
        ({"cost_usd": True}, 0.1),
        ({}, 0.1),
        (None, 0.1),
        (0.04, 0.1),
    ],
)
async def test_what_an_execution_cost_takes_the_place_of_what_was_held(
    reconfigure: Reconfigure, returned: Any, cost: float
) -> None:
    reconfigure("{retry_agent: {risk: low, max_cost_usd: 0.1}}")
    held: list[float] = []

    @register_action("retry_agent")
    def retry(parameters: dict[str, Any]) -> Any:
        found = get_scope_store().get_scope(scope_id)
        assert found is not None
        held.append(found.cost_used_usd)
        return returned

    scope_id = await granted(max_attempts=2)
    assert (await executed(scope_id))["cost_used_usd"] == cost
    assert held == [0.1]


async def test_a_cost_above_what_was_held_exhausts_the_scope(reconfigure: Reconfigure) -> None:
    reconfigure("{retry_agent: {risk: low, max_cost_usd: 0.1}}")
    register_action("retry_agent", lambda parameters: {"cost_usd": 0.11})
    scope_id = await granted(max_attempts=9)
    done = await executed(scope_id)
    assert (done["scope_status"], done["cost_used_usd"]) == ("exhausted", 0.11)
    assert last_envelope()["record"]["details"]["cost_overrun"] is True


# Many at once --------------------------------------------------------------------------------------------


async def test_a_hundred_tasks_at_three_attempts_run_three_times() -> None:
    ran: list[Any] = []

    @register_action("retry_agent")
    async def retry(parameters: dict[str, Any]) -> None:
        ran.append(parameters["number"])
        await asyncio.sleep(0.01)

    scope_id = await granted(max_attempts=3)
    results = await asyncio.gather(
        *(executed(scope_id, {"number": number}) for number in range(100)), return_exceptions=True
    )
    done = [each for each in results if isinstance(each, dict)]
    assert len(ran) == len(done) == 3
    assert sorted(each["attempt_number"] for each in done) == [1, 2, 3]
    assert {type(each) for each in results if not isinstance(each, dict)} == {ScopeExhausted}
    assert len(envelopes(event="refused")) == 97


def test_a_hundred_threads_at_three_attempts_run_three_times() -> None:
    ran: list[Any] = []
    register_action("retry_agent", ran.append)
    scope = get_scope_store().create_scope("inc_1", ["retry_agent"], "a test", max_attempts=3)
    together = threading.Barrier(100)

    def execute(number: int) -> bool:
        together.wait()
        try:
            asyncio.run(executed(scope.scope_id, {"number": number}))
        except ScopeExhausted:
            return False
        return True

    with ThreadPoolExecutor(100) as pool:
        done = list(pool.map(execute, range(100)))
    assert done.count(True) == len(ran) == 3
    assert endings(scope.scope_id) == ["answered"] * 3


# When the store fails ------------------------------------------------------------------------------------


def moved(database: Path) -> Path:
    return database.rename(database.with_suffix(".moved"))


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
async def test_nothing_runs_that_the_store_cannot_record(database: Path) -> None:
    ran: list[Any] = []
    register_action("retry_agent", ran.append)
    scope_id = await granted()
    away = moved(database)
    with pytest.raises(StoreUnavailable, match="moved"):
        await executed(scope_id)
    with pytest.raises(StoreUnavailable, match="moved"):
        await validate_scope_required("inc_1", "retry_agent")
    with pytest.raises(StoreUnavailable, match="moved"):
        await granted()
    assert ran == []
    away.rename(database)
    assert (await executed(scope_id))["attempt_number"] == 1


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
async def test_an_end_that_cannot_be_written_is_written_later(database: Path) -> None:
    away: list[Path] = []
    register_action("retry_agent", lambda parameters: away.append(moved(database)))
    scope_id = await granted()
    done = await executed(scope_id)
    assert (done["success"], done["attempts_remaining"]) == (True, 0)
    assert endings(scope_id) == ["in_flight"]
    away[0].rename(database)
    assert await settled(scope_id) == ["answered"]


async def test_a_store_that_was_closed_behind_an_execution_does_not_cost_its_result(
    reconfigure: Reconfigure, caplog: pytest.LogCaptureFixture
) -> None:
    register_action("retry_agent", lambda parameters: reconfigure())
    done = await executed(await granted())
    assert done["success"] is True
    assert "may not have been written down" in caplog.text


# Over restarts and processes -----------------------------------------------------------------------------


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
async def test_a_restart_keeps_scopes_attempts_and_revocations(reconfigure: Reconfigure) -> None:
    half, revoked = await granted(max_attempts=2), await granted()
    await executed(half)
    get_scope_store().revoke_scope(revoked)
    reconfigure()
    assert (await executed(half))["attempt_number"] == 2
    await refusal_of(ScopeExhausted, half)
    await refusal_of(ScopeRevoked, revoked)


OTHER_PROCESS = """
import asyncio, sys
from sidecar.scoped_execution import StoreUnavailable, configure, execute_with_scope, register_action

def hang(parameters):
    print("running", flush=True)
    sys.stdin.read()

register_action("retry_agent", hang)
try:
    configure(sys.argv[1])
except StoreUnavailable as exc:
    print(exc)
    raise SystemExit(3)
asyncio.run(execute_with_scope(sys.argv[2], "retry_agent", "inc_1"))
"""


def other_process(store_url: str, scope_id: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", OTHER_PROCESS, store_url, scope_id],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
async def test_a_second_process_is_told_who_owns_the_store(store_url: str) -> None:
    with other_process(store_url, await granted()) as other:
        assert other.stdout is not None
        told = await asyncio.to_thread(other.stdout.read)
    assert other.returncode == 3
    assert f"in use by another process (pid {os.getpid()})" in told


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
async def test_an_execution_that_was_in_flight_at_a_kill_is_unknown_afterwards(
    store_url: str, reconfigure: Reconfigure
) -> None:
    scope_id = await granted(max_attempts=2)
    scoped_execution.configure()  # lets go of the file
    with other_process(store_url, scope_id) as other:
        assert other.stdout is not None
        assert await asyncio.to_thread(other.stdout.readline) == "running\n"
        other.kill()
        other.wait()
    reconfigure()
    assert endings(scope_id) == ["unknown"]
    done = await executed(scope_id)
    assert (done["attempt_number"], done["attempts_remaining"]) == (2, 0)
    await refusal_of(ScopeExhausted, scope_id)


# One store for all faces ---------------------------------------------------------------------------------


async def test_the_log_of_scopes_and_of_other_decisions_is_one() -> None:
    await configured_store().submit(
        Turn(decision_id=new_decision_id(), switch="care_kill_switch", on=True, origin="library")
    )
    await granted()
    assert [(each["seq"], each["event"]) for each in envelopes()] == [(1, "switched"), (2, "issued")]


def test_the_module_explains_itself() -> None:
    words = scoped_execution.__doc__ or ""
    for name in (*(kind.__name__ for kind in SCOPE_ERRORS.values()), *SCOPE_ERRORS, "StoreUnavailable"):
        assert name in words
    assert {name for name in scoped_execution.__all__ if not hasattr(scoped_execution, name)} == set()


# Freezes -------------------------------------------------------------------------------------------------


async def test_a_program_executes_nothing_that_is_frozen_on_its_store() -> None:
    scope = await create_recovery_scope("inc_1", "retry_agent", "a test", 0.50, 2)
    freeze = SetFreeze(decision_id=new_decision_id(), match={"action": ("retry_*",)}, reason="a split")
    await configured_store().submit(freeze)
    with pytest.raises(ScopeRefused) as refused:
        await execute_with_scope(scope["scope_id"], "retry_agent", "inc_1")
    assert (refused.value.code, refused.value.http_status) == ("frozen", 403)
    assert refused.value.members["reason"] == "a split"
    record = last_envelope()
    assert (record["event"], record["origin"], record["record"]["decision_reason"]) == (
        "refused",
        "library",
        "frozen",
    )
    await configured_store().submit(
        LiftFreeze(decision_id=new_decision_id(), freeze_id=freeze.decision_id, reason="over")
    )
    done = await execute_with_scope(scope["scope_id"], "retry_agent", "inc_1")
    assert done["attempt_number"] == 1


# Principals ----------------------------------------------------------------------------------------------


async def test_records_of_a_program_say_library_and_service_and_keep_its_word_on_who_asked() -> None:
    scope = await create_recovery_scope("inc_1", "retry_agent", "a test", 0.50, 2, created_by="anna")
    await execute_with_scope(scope["scope_id"], "retry_agent", "inc_1")
    with pytest.raises(ScopeRefused):
        await execute_with_scope(scope["scope_id"], "other", "inc_1")
    found = envelopes()
    assert [each["event"] for each in found] == ["issued", "admitted", "settled", "refused"]
    assert {each["origin"] for each in found} == {"library"}
    asked = {"id": "anonymous", "kind": "service", "method": "none"}
    assert [each["principal"] for each in found] == [asked] * 4
    assert found[0]["record"]["details"]["created_by"] == "anna"
    assert found[0]["record"]["details"]["created_by_verified"] is False
    # No method has established anna, so nothing is proven of the issuer.
    assert found[1]["issuer"] == asked
    assert found[1]["record"]["details"]["granted_to"] == "anna"
