"""What the tests of scopes ask for, and what they read back."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from sidecar.core.scope import Execution
from sidecar.library.runtime import configured_store
from sidecar.scoped_execution import create_recovery_scope, execute_with_scope
from tests.library.recorded import envelopes


async def granted(**terms: Any) -> str:
    """The id of a scope: one attempt of retry_agent for inc_1 unless told otherwise."""
    scope = await create_recovery_scope(
        **{"incident_id": "inc_1", "action": "retry_agent", "intent": "a test", **terms}
    )
    scope_id: str = scope["scope_id"]
    return scope_id


async def executed(scope_id: str | None, parameters: Any = None, **claims: Any) -> dict[str, Any]:
    """Execute retry_agent for inc_1 unless told otherwise."""
    named: Any = {"action": "retry_agent", "incident_id": "inc_1", **claims}
    return await execute_with_scope(scope_id, named["action"], named["incident_id"], parameters)


def executions(scope_id: str) -> Sequence[Execution]:
    """The executions of a scope, in the order of their admission."""
    found = configured_store().read_sync(lambda engine: engine.executions_of(scope_id))
    return sorted(found, key=lambda each: (each.admitted_at, each.attempt_number))


def endings(scope_id: str) -> list[str]:
    return [each.status for each in executions(scope_id)]


def last_envelope() -> dict[str, Any]:
    return envelopes()[-1]


async def settled(scope_id: str, *, seconds: float = 5.0) -> list[str]:
    """How the executions of a scope ended, once none is in flight."""
    until = asyncio.get_running_loop().time() + seconds
    while "in_flight" in (found := endings(scope_id)):
        assert asyncio.get_running_loop().time() < until, found
        await asyncio.sleep(0.005)
    return found
