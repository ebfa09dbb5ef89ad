"""The decorator `requires_scoped_execution`: a function runs risky recovery actions only within a scope."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from sidecar.core.command import Admit, Admitted, Refuse
from sidecar.core.facts import is_identifier
from sidecar.core.policy import PolicySet, RiskClass
from sidecar.core.rehearsal import RecoveryAction, reported_cost
from sidecar.core.scope import Scope
from sidecar.errors import Refusal
from sidecar.library.actions import ending
from sidecar.library.boundscope import scope_of
from sidecar.library.commands import (
    admission,
    admit,
    admit_sync,
    copied,
    known,
    refusal_of,
    settle_sync,
    to_its_end,
)
from sidecar.library.runtime import ThreadedStore, configured_store

R = TypeVar("R")

# Keywords of the guard. The function also gets those of them that its signature accepts.
KEYWORDS = ("scope_id", "incident_id", "skip_scope")


def requires_scoped_execution(
    risk_threshold: RiskClass = RiskClass.MEDIUM,
) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """Decorator to enforce scoped pre-execution for risky recovery actions.

    The function, sync or async, takes exactly one RecoveryAction among its arguments. An action below the
    threshold runs without a scope. At or above the threshold the call must carry a `scope_id`. The scope must
    allow the action's `name` and target agents. It must belong to the incident of the `incident_id` keyword,
    or, without one, to the incident of the action. An attempt is consumed before the function begins, and
    settled when the function ends. The function may return a mapping with `cost_usd`. If a catalogue is
    configured, the higher of its risk and the action's risk counts, and an unlisted action is never below the
    threshold.

    Calls raise ScopedExecutionRequired without a scope, with `skip_scope=True`, or without a RecoveryAction.
    They also raise the other subclasses of ScopeRefused, and StoreUnavailable. In all these cases nothing has
    run. Decorating raises ValueError for an invalid threshold, and TypeError for a generator function,
    because it has no single end.
    """
    threshold = RiskClass(risk_threshold)

    def decorate(function: Callable[..., R]) -> Callable[..., R]:
        if not callable(function):
            raise TypeError("requires_scoped_execution decorates functions")
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError("a generator function has no one end; guard the function that it calls")
        return _guarded(function, threshold)

    return decorate


def _guarded(function: Callable[..., Any], threshold: RiskClass) -> Callable[..., Any]:
    signature = inspect.signature(function)
    kept_back = [name for name in KEYWORDS if not _accepts(signature, name)]

    def prepare(
        args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[ThreadedStore, Callable[[], Any], Mapping[str, Any], RecoveryAction | Refuse | None]:
        """The store, the call without the keywords that are only the guard's, those keywords (also if given
        by position), and the action that needs a scope."""
        args, kwargs = _snapshots(args, kwargs)
        arguments = {name: value for name, value in kwargs.items() if name not in kept_back}
        # `bind` raises for arguments that the function does not accept, before anything is consumed.
        named = {**signature.bind(*args, **arguments).arguments, **kwargs}
        keywords = {name: named.get(name) for name in KEYWORDS}
        store = configured_store()
        risky = _risky_action(store.policies, threshold, [*args, *kwargs.values()], keywords)
        return store, functools.partial(function, *args, **arguments), keywords, risky

    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def run_within_scope(*args: Any, **kwargs: Any) -> Any:
            store, run, keywords, risky = prepare(args, kwargs)
            if risky is None:
                return await run()
            scope = await store.read(scope_of(keywords["scope_id"]))
            admitted = await admit(store, _command(store.policies, risky, keywords, scope))
            return await _returned(store, admitted, run())

        return run_within_scope

    @functools.wraps(function)
    def run_within_scope_sync(*args: Any, **kwargs: Any) -> Any:
        store, run, keywords, risky = prepare(args, kwargs)
        if risky is None:
            return run()
        scope = store.read_sync(scope_of(keywords["scope_id"]))
        admitted = admit_sync(store, _command(store.policies, risky, keywords, scope))
        try:
            returned = run()
        except BaseException as exc:
            outcome, cause = ending(exc)
            settle_sync(store, admitted, outcome, cause=cause)
            raise
        if inspect.isawaitable(returned):  # the execution ends with it
            return _returned(store, admitted, returned)
        settle_sync(store, admitted, "answered", reported_cost(returned))
        return returned

    return run_within_scope_sync


async def _returned(store: ThreadedStore, admitted: Admitted, running: Awaitable[Any]) -> Any:
    returned, _ = await to_its_end(store, admitted, running)
    return returned


def _snapshots(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with a copy of each action, so that the function gets the action that was judged."""
    return tuple(map(_snapshot, args)), {name: _snapshot(value) for name, value in kwargs.items()}


def _snapshot(value: Any) -> Any:
    if not isinstance(value, RecoveryAction):
        return value
    return replace(value, parameters=copied(value.parameters), target_agents=copied(value.target_agents))


def _accepts(signature: inspect.Signature, name: str) -> bool:
    """Whether a function accepts a keyword."""
    if any(each.kind is each.VAR_KEYWORD for each in signature.parameters.values()):
        return True
    found = signature.parameters.get(name)
    return found is not None and found.kind in (found.KEYWORD_ONLY, found.POSITIONAL_OR_KEYWORD)


def _risky_action(
    policies: PolicySet, threshold: RiskClass, values: list[Any], keywords: Mapping[str, Any]
) -> RecoveryAction | Refuse | None:
    """The action that needs a scope, a refusal if no scope could help, or None below the threshold."""
    actions = [value for value in values if isinstance(value, RecoveryAction)]
    if len(actions) != 1:
        message = f"A guarded function takes exactly one RecoveryAction; this call carried {len(actions)}."
        return _required(policies, message, keywords, None)
    (action,) = actions
    entry = policies.action(action.name)
    risk = RiskClass.CRITICAL if entry is None else max(action.risk_class, entry.risk)
    if risk < threshold:
        return None
    if keywords["skip_scope"]:
        message = f"An action of {risk.value} risk cannot skip its scope."
        return _required(policies, message, keywords, action.name)
    return action


def _required(policies: PolicySet, message: str, keywords: Mapping[str, Any], action: str | None) -> Refuse:
    claims = known(None, keywords["incident_id"], action)
    members = {"incident_id": claims.incident_id, "action": claims.action}
    return refusal_of(policies, Refusal("scoped_execution_required", message, members), claims)


def _command(
    policies: PolicySet, risky: RecoveryAction | Refuse, keywords: Mapping[str, Any], scope: Scope | None
) -> Admit | Refuse:
    if isinstance(risky, Refuse):
        return risky
    scope_id, incident_id = keywords["scope_id"], keywords["incident_id"]
    if incident_id is None and scope is not None:
        incident_id = scope.incident_id
    elif incident_id is None and is_identifier(scope_id):
        missing = Refusal("scope_not_found", "No scope has this scope_id.", {"scope_id": scope_id})
        return refusal_of(policies, missing, known(scope_id, None, risky.name))
    return admission(
        policies,
        scope_id=scope_id,
        incident_id=incident_id,
        action=risky.name,
        parameters=risky.parameters,
        target_agents=risky.target_agents or None,
    )
