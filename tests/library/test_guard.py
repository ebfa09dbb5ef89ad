"""`requires_scoped_execution`: what runs without a scope, what needs one, and how a guarded run ends."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from typing import Any

import pytest

from sidecar.library.commands import admission, admit, to_its_end
from sidecar.library.runtime import configured_store
from sidecar.scoped_execution import (
    RecoveryAction,
    RiskClass,
    ScopeActionMismatch,
    ScopedExecutionRequired,
    ScopeExhausted,
    ScopeIncidentMismatch,
    ScopeNotFound,
    ScopeRefused,
    ScopeTargetMismatch,
    StoreUnavailable,
    execute_with_scope,
    get_scope_store,
    requires_scoped_execution,
)
from tests.library.conftest import Reconfigure
from tests.library.recorded import envelopes
from tests.library.scopes import endings, executions, granted, last_envelope, settled

pytestmark = pytest.mark.usefixtures("store_url")

RISKS = list(RiskClass)


def action(risk: RiskClass = RiskClass.HIGH, **members: Any) -> RecoveryAction:
    return RecoveryAction(
        **{"id": "cand-1", "name": "retry_agent", "risk_class": risk, "action_type": "retry", **members}
    )


@requires_scoped_execution()
def recover(action: RecoveryAction, depth: int = 1) -> str:
    """Bring it back."""
    return f"{action.name} {depth}"


@requires_scoped_execution()
async def recover_later(action: RecoveryAction, depth: int = 1) -> str:
    """Bring it back, in time."""
    await asyncio.sleep(0)
    return f"{action.name} {depth}"


async def outcome_of(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    returned = function(*args, **kwargs)
    return await returned if inspect.isawaitable(returned) else returned


BOTH = pytest.mark.parametrize("function", [recover, recover_later], ids=["sync", "async"])


# What needs a scope --------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", RISKS)
@pytest.mark.parametrize("risk", RISKS)
async def test_an_action_needs_a_scope_from_the_threshold_on(risk: RiskClass, threshold: RiskClass) -> None:
    ran: list[RecoveryAction] = []

    @requires_scoped_execution(threshold)
    def carry_out(action: RecoveryAction) -> None:
        ran.append(action)

    if RISKS.index(risk) < RISKS.index(threshold):
        carry_out(action(risk))
        assert (len(ran), envelopes()) == (1, [])
    else:
        with pytest.raises(ScopedExecutionRequired) as refused:
            carry_out(action(risk))
        assert (refused.value.action, refused.value.incident_id) == ("retry_agent", None)
        assert ran == []
        envelope = last_envelope()
        assert (envelope["event"], envelope["origin"]) == ("refused", "library")
        assert envelope["record"]["decision_reason"] == "scoped_execution_required"
        assert envelope["record"]["decision_id"] == refused.value.decision_id


@BOTH
async def test_the_threshold_is_medium_by_default(function: Callable[..., Any]) -> None:
    assert await outcome_of(function, action(RiskClass.LOW), depth=3) == "retry_agent 3"
    with pytest.raises(ScopedExecutionRequired):
        await outcome_of(function, action(RiskClass.MEDIUM))


@BOTH
async def test_a_scope_lets_it_run_once_and_is_consumed(function: Callable[..., Any]) -> None:
    scope_id = await granted()
    assert await outcome_of(function, action(), 2, scope_id=scope_id, incident_id="inc_1") == "retry_agent 2"
    assert endings(scope_id) == ["answered"]
    with pytest.raises(ScopeExhausted):
        await outcome_of(function, action(), scope_id=scope_id, incident_id="inc_1")
    assert [each["event"] for each in envelopes()] == ["issued", "admitted", "settled", "refused"]


@BOTH
async def test_without_an_incident_the_scopes_own_counts(function: Callable[..., Any]) -> None:
    scope_id = await granted(incident_id="inc_7")
    await outcome_of(function, action(), scope_id=scope_id)
    assert executions(scope_id)[0].incident_id == "inc_7"


@BOTH
@pytest.mark.parametrize("scope_id", [None, ""])
async def test_no_scope_is_no_scope(function: Callable[..., Any], scope_id: Any) -> None:
    with pytest.raises(ScopedExecutionRequired) as refused:
        await outcome_of(function, action(), scope_id=scope_id, incident_id="inc_1")
    assert refused.value.incident_id == "inc_1"


@BOTH
async def test_every_bound_of_the_scope_holds(function: Callable[..., Any]) -> None:
    scope_id = await granted(target_agents=["a"])
    with pytest.raises(ScopeNotFound):
        await outcome_of(function, action(), scope_id="scope_none")
    with pytest.raises(ScopeNotFound):
        await outcome_of(function, action(), scope_id="scope_none", incident_id="inc_1")
    with pytest.raises(ScopeIncidentMismatch):
        await outcome_of(function, action(), scope_id=scope_id, incident_id="inc_2")
    with pytest.raises(ScopeActionMismatch):
        await outcome_of(function, action(name="reset"), scope_id=scope_id)
    with pytest.raises(ScopeTargetMismatch):
        await outcome_of(function, action(), scope_id=scope_id)
    with pytest.raises(ScopeTargetMismatch):
        await outcome_of(function, action(target_agents=["b"]), scope_id=scope_id)
    refused = [each["record"]["decision_reason"] for each in envelopes(event="refused")]
    assert refused == [
        "scope_not_found",
        "scope_not_found",
        "incident_mismatch",
        "action_outside_scope",
        "target_outside_scope",
        "target_outside_scope",
    ]
    assert endings(scope_id) == []
    await outcome_of(function, action(target_agents=["a"]), scope_id=scope_id)


async def test_target_agents_in_the_parameters_alone_are_judged_as_well() -> None:
    scope_id = await granted(target_agents=["a"])
    with pytest.raises(ScopeTargetMismatch):
        recover(action(parameters={"target_agents": ["b"]}), scope_id=scope_id)
    with pytest.raises(ScopeRefused) as refused:
        recover(action(parameters={"target_agents": ["b"]}, target_agents=["a"]), scope_id=scope_id)
    assert refused.value.code == "invalid_request"
    assert endings(scope_id) == []


@BOTH
@pytest.mark.parametrize("wrong", [{"scope_id": 7}, {"scope_id": "a\n"}, {"incident_id": ["inc_1"]}])
async def test_names_of_a_wrong_type_are_refused(function: Callable[..., Any], wrong: dict[str, Any]) -> None:
    with pytest.raises(ScopeRefused) as refused:
        await outcome_of(function, action(), **{"scope_id": await granted(), **wrong})
    assert refused.value.code == "invalid_request"
    assert last_envelope()["record"]["decision_reason"] == "invalid_request"


@BOTH
async def test_skipping_the_scope_is_refused_even_with_a_scope(function: Callable[..., Any]) -> None:
    scope_id = await granted()
    with pytest.raises(ScopedExecutionRequired, match="cannot skip") as refused:
        await outcome_of(function, action(), scope_id=scope_id, incident_id="inc_1", skip_scope=True)
    assert (refused.value.action, refused.value.incident_id) == ("retry_agent", "inc_1")
    assert last_envelope()["record"]["decision_id"] == refused.value.decision_id
    assert endings(scope_id) == []
    assert await outcome_of(function, action(), scope_id=scope_id, skip_scope=False) == "retry_agent 1"


@BOTH
async def test_below_the_threshold_there_is_no_scope_to_skip(function: Callable[..., Any]) -> None:
    assert await outcome_of(function, action(RiskClass.LOW), skip_scope=True) == "retry_agent 1"
    assert envelopes() == []


@pytest.mark.parametrize("count", [0, 2])
async def test_exactly_one_action_is_judged(count: int) -> None:
    ran: list[Any] = []
    guarded: Any = requires_scoped_execution()(lambda *args, **kwargs: ran.append(args))
    scope_id = await granted()
    low = action(RiskClass.LOW)
    with pytest.raises(ScopedExecutionRequired, match="exactly one RecoveryAction") as refused:
        guarded(*[low] * count, scope_id=scope_id)
    assert refused.value.action is None
    assert last_envelope()["record"]["decision_id"] == refused.value.decision_id
    assert (ran, endings(scope_id)) == ([], [])


async def test_an_action_may_come_under_any_name() -> None:
    @requires_scoped_execution()
    def carry_out(*, candidate: RecoveryAction) -> str:
        return candidate.name

    with pytest.raises(ScopedExecutionRequired):
        carry_out(candidate=action())
    assert carry_out(candidate=action(), scope_id=await granted()) == "retry_agent"


async def test_one_beside_another_in_the_keywords_is_one_too_many() -> None:
    @requires_scoped_execution()
    def carry_out(first: RecoveryAction, *, second: RecoveryAction) -> None:
        raise AssertionError("it ran")

    with pytest.raises(ScopedExecutionRequired, match="carried 2"):
        carry_out(action(RiskClass.LOW), second=action(RiskClass.LOW))


# The catalogue -------------------------------------------------------------------------------------------


@BOTH
async def test_the_higher_of_two_risks_counts(reconfigure: Reconfigure, function: Callable[..., Any]) -> None:
    reconfigure("{retry_agent: {risk: high, max_cost_usd: 0.1}, clear_cache: {risk: low}}")
    with pytest.raises(ScopedExecutionRequired):
        await outcome_of(function, action(RiskClass.LOW))
    with pytest.raises(ScopedExecutionRequired):
        await outcome_of(function, action(RiskClass.HIGH, name="clear_cache"))
    assert await outcome_of(function, action(RiskClass.LOW, name="clear_cache")) == "clear_cache 1"


@BOTH
async def test_an_action_that_the_catalogue_does_not_list_is_never_of_low_risk(
    reconfigure: Reconfigure, function: Callable[..., Any]
) -> None:
    reconfigure("{clear_cache: {risk: low}}")
    with pytest.raises(ScopedExecutionRequired):
        await outcome_of(function, action(RiskClass.LOW))


# The function and its call -------------------------------------------------------------------------------


async def test_the_function_gets_the_keywords_that_its_signature_takes() -> None:
    got: list[Any] = []

    @requires_scoped_execution()
    def one(action: RecoveryAction, *, scope_id: str) -> None:
        got.append(scope_id)

    @requires_scoped_execution()
    def everything(action: RecoveryAction, **more: Any) -> None:
        got.append(more)

    scope_id = await granted(max_attempts=2)
    one(action(), scope_id=scope_id, incident_id="inc_1", skip_scope=False)
    everything(action(), scope_id=scope_id, incident_id="inc_1", skip_scope=False)
    assert got == [scope_id, {"scope_id": scope_id, "incident_id": "inc_1", "skip_scope": False}]


async def test_a_scope_that_the_function_takes_may_come_by_position() -> None:
    @requires_scoped_execution()
    def carry_out(action: RecoveryAction, scope_id: str, skip_scope: bool = False) -> str:
        return scope_id

    scope_id = await granted()
    with pytest.raises(ScopedExecutionRequired):
        carry_out(action(), scope_id, True)
    assert carry_out(action(), scope_id) == scope_id
    assert endings(scope_id) == ["answered"]


async def test_a_call_that_the_function_would_not_take_consumes_nothing() -> None:
    wrong: Any = recover
    scope_id = await granted()
    with pytest.raises(TypeError):
        wrong(action(), surprise=1, scope_id=scope_id)
    with pytest.raises(TypeError):
        await outcome_of(recover_later, action(), 1, 2, scope_id=scope_id)
    assert endings(scope_id) == []


async def test_a_method_is_guarded_like_a_function() -> None:
    class Agents:
        @requires_scoped_execution()
        async def restart(self, action: RecoveryAction) -> str:
            return action.name

        @staticmethod
        @requires_scoped_execution()
        def stop(action: RecoveryAction) -> str:
            return action.name

    scope_id = await granted(max_attempts=2)
    assert await Agents().restart(action(), scope_id=scope_id) == "retry_agent"
    assert Agents.stop(action(), scope_id=scope_id) == "retry_agent"
    with pytest.raises(ScopeExhausted):
        await Agents().restart(action(), scope_id=scope_id)


def test_a_guarded_function_looks_like_itself() -> None:
    assert (recover.__name__, recover.__doc__) == ("recover", "Bring it back.")
    assert list(inspect.signature(recover).parameters) == ["action", "depth"]
    assert inspect.iscoroutinefunction(recover_later)
    assert not inspect.iscoroutinefunction(recover)


def test_a_generator_function_has_no_one_end() -> None:
    def steps(action: RecoveryAction) -> Iterator[int]:
        yield 1

    async def later(action: RecoveryAction) -> AsyncIterator[int]:
        yield 1

    for function in (steps, later):
        with pytest.raises(TypeError, match="generator"):
            requires_scoped_execution()(function)


def test_what_is_no_function_or_no_threshold_cannot_be_used() -> None:
    nothing: Any = None
    with pytest.raises(TypeError, match="functions"):
        requires_scoped_execution()(nothing)
    for wrong in ("extreme", None, recover):
        threshold: Any = wrong
        with pytest.raises(ValueError, match="RiskClass"):
            requires_scoped_execution(threshold)


# How a guarded run ends ----------------------------------------------------------------------------------


@pytest.mark.parametrize("is_async", [False, True])
async def test_the_cost_of_a_run_is_what_it_returns(reconfigure: Reconfigure, is_async: bool) -> None:
    reconfigure("{retry_agent: {risk: high, max_cost_usd: 0.1}}")

    def bill(action: RecoveryAction) -> dict[str, float]:
        return {"cost_usd": 0.03}

    async def bill_later(action: RecoveryAction) -> dict[str, float]:
        return bill(action)

    guarded: Any = requires_scoped_execution()(bill_later if is_async else bill)
    scope_id = await granted(max_attempts=3)
    await outcome_of(guarded, action(), scope_id=scope_id)
    await outcome_of(recover, action(), scope_id=scope_id)
    found = get_scope_store().get_scope(scope_id)
    assert found is not None
    assert found.cost_used_usd == 0.13


@pytest.mark.parametrize("is_async", [False, True])
async def test_a_run_that_raises_has_ended_and_its_exception_comes_through(is_async: bool) -> None:
    def boom(action: RecoveryAction) -> None:
        raise LookupError("no such agent")

    async def boom_later(action: RecoveryAction) -> None:
        boom(action)

    guarded: Any = requires_scoped_execution()(boom_later if is_async else boom)
    scope_id = await granted()
    with pytest.raises(LookupError, match="no such agent"):
        await outcome_of(guarded, action(), scope_id=scope_id)
    (execution,) = executions(scope_id)
    assert (execution.status, execution.cause) == (
        "answered",
        "the action raised LookupError: no such agent",
    )


async def test_a_run_that_is_cancelled_is_unknown() -> None:
    begun = asyncio.Event()

    @requires_scoped_execution()
    async def hang(action: RecoveryAction) -> None:
        begun.set()
        await asyncio.Event().wait()

    scope_id = await granted()
    running = asyncio.ensure_future(hang(action(), scope_id=scope_id))
    await begun.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert await settled(scope_id) == ["unknown"]


async def test_a_run_that_is_interrupted_is_unknown() -> None:
    @requires_scoped_execution()
    def interrupted(action: RecoveryAction) -> None:
        raise KeyboardInterrupt

    scope_id = await granted()
    with pytest.raises(KeyboardInterrupt):
        interrupted(action(), scope_id=scope_id)
    (execution,) = executions(scope_id)
    assert (execution.status, execution.cause) == (
        "unknown",
        "the action was interrupted by KeyboardInterrupt",
    )


async def test_a_sync_function_that_returns_something_to_await_ends_when_that_does() -> None:
    @requires_scoped_execution()
    @functools.wraps(recover_later)
    def carry_out(action: RecoveryAction) -> Any:
        return asyncio.sleep(0, {"cost_usd": 0.2})

    scope_id = await granted()
    running = carry_out(action(), scope_id=scope_id)
    assert endings(scope_id) == ["in_flight"]
    assert await running == {"cost_usd": 0.2}
    assert [(each.status, each.cost) for each in executions(scope_id)] == [("answered", 200_000)]


class Forever:
    def __await__(self) -> Generator[None, None, None]:
        while True:
            yield


async def test_a_run_of_which_the_loop_is_gone_is_unknown() -> None:
    scope_id = await granted()
    store = configured_store()
    asked = admission(store.policies, scope_id=scope_id, incident_id="inc_1", action="retry_agent")
    running = to_its_end(store, await admit(store, asked), Forever())
    running.send(None)
    running.close()  # as a coroutine is that outlives its loop; to wait for the store would be an error here
    while endings(scope_id) == ["in_flight"]:
        await asyncio.sleep(0.005)
    assert endings(scope_id) == ["unknown"]


async def test_a_guarded_run_may_execute_within_a_scope_of_its_own() -> None:
    inner = await granted(action="clear_cache")

    @requires_scoped_execution()
    async def carry_out(action: RecoveryAction) -> Any:
        return await execute_with_scope(inner, "clear_cache", "inc_1")

    outer = await granted()
    assert (await carry_out(action(), scope_id=outer))["success"] is True
    assert endings(outer) == endings(inner) == ["answered"]


@BOTH
async def test_nothing_runs_that_the_store_cannot_record(function: Callable[..., Any]) -> None:
    scope_id = await granted()
    configured_store().close()
    with pytest.raises(StoreUnavailable):
        await outcome_of(function, action(), scope_id=scope_id)
    with pytest.raises(StoreUnavailable):
        await outcome_of(function, action())
    assert await outcome_of(function, action(RiskClass.LOW)) == "retry_agent 1"


async def test_a_hundred_guarded_runs_at_three_attempts_are_three() -> None:
    ran: list[int] = []

    @requires_scoped_execution()
    async def carry_out(action: RecoveryAction, number: int) -> None:
        ran.append(number)

    scope_id = await granted(max_attempts=3)
    results = await asyncio.gather(
        *(carry_out(action(), number, scope_id=scope_id) for number in range(100)), return_exceptions=True
    )
    assert len(ran) == results.count(None) == 3
    assert {type(each) for each in results} == {type(None), ScopeExhausted}


async def test_an_action_that_is_changed_while_it_is_judged_runs_as_it_was_judged() -> None:
    ran: list[list[str]] = []

    @requires_scoped_execution()
    async def carry_out(action: RecoveryAction) -> None:
        ran.append(list(action.target_agents))

    changing = action()
    scope_id = await granted()
    running = asyncio.ensure_future(carry_out(changing, scope_id=scope_id))
    await asyncio.sleep(0)
    changing.target_agents.append("prod")
    await running
    assert ran == [[]]
