"""Scopegate in a Python program: no recovery action without a scope, and no sidecar process needed.

> A recovery action without a valid execution scope is invalid by definition.

    from sidecar.scoped_execution import (
        ScopeRefused, configure, create_recovery_scope, execute_with_scope, register_action)

    configure("sqlite:///var/scopes.db", policies="policies/")   # without it: in memory, every action allowed

    @register_action("retry_agent")
    async def retry_agent(parameters):          # sync functions run in a thread
        ...
        return {"cost_usd": 0.04}               # without a cost the catalogue's max_cost_usd counts

    scope = await create_recovery_scope("inc_123", "retry_agent", "it answered with an invented ruling")
    try:
        done = await execute_with_scope(scope["scope_id"], "retry_agent", "inc_123", {"agent": "legal"})
    except ScopeRefused as refused:
        print(refused.code, refused.decision_id)

The HTTP gate and these functions use the same core, the same store and the same decision log. Every grant,
admission, refusal, settlement and revocation is a record in the log, with the origin `library`.

What executing costs
    Before the callable begins, an execution consumes one attempt and holds the catalogue's `max_cost_usd`.
    When the callable returns, its `cost_usd` replaces the hold. An exception is an answer, too: the attempt
    stays consumed, and the exception propagates. If a callable takes longer than the catalogue's
    `timeout_seconds` (TimeoutError), or its caller is cancelled, the execution ends `unknown`. Then attempt
    and hold stay until an operator reconciles the execution (admin interface of a sidecar). The thread of a
    sync callable keeps running after that, because a thread cannot be stopped.

What is refused
    Every refusal is a ScopeRefused, an Exception with `code`, `http_status`, `message`, `decision_id` and
    `members`; each member is also an attribute. Wrong types are checked first, then the first check that
    fails decides:

    ======================= ==== =========================== ============================================
    exception               HTTP code                        attributes
    ======================= ==== =========================== ============================================
    ScopedExecutionRequired 400  scoped_execution_required   incident_id, action
    ScopeNotFound           404  scope_not_found             scope_id
    ScopeIncidentMismatch   403  incident_mismatch           scope_id, incident_id
    ScopeActionMismatch     403  action_outside_scope        scope_id, action
    ScopeTargetMismatch     403  target_outside_scope        scope_id, target_agents
    ScopeRevoked            400  scope_revoked               scope_id
    ScopeExpired            400  scope_expired               scope_id, expires_at
    ScopeExhausted          400  scope_exhausted             scope_id, bound: max_attempts or max_cost_usd
    ScopeRefused            403  policy_denied               action: no policy lists it
    ScopeRefused            403  frozen                      an operator has frozen it
    ScopeRefused            400  invalid_request             member: what has a wrong type or is missing
    ======================= ==== =========================== ============================================

    Invalid terms of a scope raise ValueError: a blank intent, a cost below 0, or a `max_cost_usd` below the
    amount that an execution of one of its actions holds, because such a scope could never be spent.

When the store fails
    Nothing is executed without a record. If the store cannot commit within `deadline_seconds`, the call
    raises StoreUnavailable, naming the cause, and nothing has run. `BoundExecutionScope.is_valid` and
    `can_execute` then return False. A settlement that cannot be committed is kept in memory and written
    later, and the caller gets its result. Executions in flight when the program died become `unknown` when
    the store is opened again. Refusals consume nothing. Calls that only read consume and record nothing.

The functions are async; `BoundExecutionScope` and `ScopeStore` are sync. All of them work from any thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sidecar.core.command import Issued
from sidecar.core.instant import iso_time
from sidecar.core.money import to_dollars
from sidecar.core.policy import RiskClass
from sidecar.core.rehearsal import ExecutionScope, RecoveryAction, ScopedExecutionResult
from sidecar.errors import StoreUnavailable
from sidecar.library.actions import NotBegun, begin, register_action, registered
from sidecar.library.boundscope import BoundExecutionScope, ScopeStore, members_of, snapshot
from sidecar.library.commands import admission, admit, allowed, copied, grant, settle, to_its_end
from sidecar.library.guard import requires_scoped_execution
from sidecar.library.refusals import (
    ScopeActionMismatch,
    ScopedExecutionRequired,
    ScopeExhausted,
    ScopeExpired,
    ScopeIncidentMismatch,
    ScopeNotFound,
    ScopeRefused,
    ScopeRevoked,
    ScopeTargetMismatch,
)
from sidecar.library.rehearsals import ScopedExecutionContext, test_recovery_scope
from sidecar.library.runtime import configure, configured_store

__all__ = [
    "configure",
    "register_action",
    "create_recovery_scope",
    "execute_with_scope",
    "validate_scope_required",
    "requires_scoped_execution",
    "test_recovery_scope",
    "get_scope_store",
    "BoundExecutionScope",
    "ScopeStore",
    "RiskClass",
    "ExecutionScope",
    "RecoveryAction",
    "ScopedExecutionContext",
    "ScopedExecutionResult",
    "ScopeRefused",
    "ScopedExecutionRequired",
    "ScopeNotFound",
    "ScopeIncidentMismatch",
    "ScopeActionMismatch",
    "ScopeTargetMismatch",
    "ScopeRevoked",
    "ScopeExpired",
    "ScopeExhausted",
    "StoreUnavailable",
]

_scope_store = ScopeStore()


def get_scope_store() -> ScopeStore:
    """Get the global scope store."""
    return _scope_store


async def create_recovery_scope(
    incident_id: str,
    action: str,
    intent: str,
    max_cost_usd: float = 0.50,
    max_attempts: int = 1,
    ttl_seconds: int = 300,
    target_agents: list[str] | None = None,
    created_by: str = "system",
) -> dict[str, Any]:
    """Create a bound execution scope for recovery action: the gate step.

    Returns the scope as `BoundExecutionScope.to_dict` does. Raises ValueError, naming the wrong term (also a
    `max_cost_usd` below what an execution of the action holds), ScopeRefused (`policy_denied`) for an action
    that the configured catalogue does not list, and StoreUnavailable.
    """
    store = configured_store()
    command = grant(
        store.policies,
        incident_id,
        [action],
        intent,
        max_cost_usd,
        max_attempts,
        ttl_seconds,
        target_agents,
        created_by,
    )
    issued = allowed(command, await store.submit(command))
    assert isinstance(issued, Issued)
    return members_of(snapshot(issued.scope, (), store.now()))


async def execute_with_scope(
    scope_id: str | None,
    action: str,
    incident_id: str,
    parameters: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Execute a recovery action within a valid scope: consume and record, then run the registered callable.

    The target agents are `parameters["target_agents"]`. Returns success, scope_id, action, incident_id,
    attempt_number, scope_status, attempts_remaining, cost_used_usd and executed_at. If a callable is
    registered, `result` is its return value. Raises ScopeRefused (its subclasses say why), StoreUnavailable,
    TimeoutError, and the exceptions of the callable.
    """
    store = configured_store()
    # A copy, so that the callable gets the parameters that were judged.
    given = copied(dict(parameters)) if isinstance(parameters, Mapping) else parameters
    command = admission(
        store.policies, scope_id=scope_id, incident_id=incident_id, action=action, parameters=given
    )
    admitted = await admit(store, command)
    execution = admitted.execution
    run = registered(execution.action)
    done: dict[str, Any] = {}
    if run is None:
        scope = await settle(store, admitted, "answered")
    else:
        try:
            running = begin(run, given if isinstance(given, dict) else {}, admitted.timeout_seconds)
        except NotBegun as exc:
            await settle(store, admitted, "not_sent", cause=str(exc))
            raise
        done["result"], scope = await to_its_end(store, admitted, running)
    return {
        "success": True,
        "scope_id": scope.scope_id,
        "action": execution.action,
        "incident_id": scope.incident_id,
        "attempt_number": execution.attempt_number,
        "scope_status": scope.status(store.now()),
        "attempts_remaining": scope.attempts_remaining,
        "cost_used_usd": to_dollars(scope.spent),
        "executed_at": iso_time(store.now()),
        **done,
    }


async def validate_scope_required(incident_id: str, action: str) -> None:
    """Refuse an execution without a scope: record the refusal and raise it.

    Call it when a request carries no scope_id. Always raises ScopedExecutionRequired, ScopeRefused for names
    of a wrong type, or StoreUnavailable.
    """
    store = configured_store()
    await admit(store, admission(store.policies, scope_id=None, incident_id=incident_id, action=action))
