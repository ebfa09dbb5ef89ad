"""Scoped pre-execution of registered callables. The rules are in `sidecar.core.rehearsal`.

A rehearsal that runs a callable is recorded first. If the record cannot be committed, nothing runs. A dry run
or a simulation executes nothing and records nothing.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from sidecar.core import rehearsal
from sidecar.core.command import Emit
from sidecar.core.record import CausalRole, DecisionOutcome, DecisionTrigger, DecisionType, Record
from sidecar.core.rehearsal import ExecutionScope, RecoveryAction, ScopedExecutionResult
from sidecar.errors import StoreUnavailable
from sidecar.files.jsonvalue import plain
from sidecar.ids import new_decision_id
from sidecar.library.actions import Unfinished, begin, registered
from sidecar.library.commands import TENANT
from sidecar.library.runtime import configured_store


class ScopedExecutionContext:
    """M6 Scoped Execution primitive: one rehearsal of one action.

    `scope_fraction` is clamped to 0.01..1.0. The callable registered for the action's name gets the shorter
    of `timeout_ms` and the action's own timeout. If a sync callable takes longer, its thread keeps running,
    because a thread cannot be stopped. Raises ValueError for an unknown scope, a fraction that is not a
    number, and a timeout that is not above 0.
    """

    def __init__(
        self,
        action: RecoveryAction,
        scope: ExecutionScope = ExecutionScope.DRY_RUN,
        scope_fraction: float = 0.1,
        timeout_ms: int = rehearsal.DEFAULT_TIMEOUT_MS,
    ) -> None:
        self.action = action
        self.scope = ExecutionScope(scope)
        self.scope_fraction = rehearsal.clamped(scope_fraction)
        self.timeout_ms = min(rehearsal.checked_timeout(timeout_ms), action.timeout_ms)
        self._begun = time.monotonic()

    async def execute(self) -> ScopedExecutionResult:
        """Rehearse the action. Never raises; a failure is part of the result."""
        self._begun = time.monotonic()
        try:
            if self.scope is ExecutionScope.DRY_RUN:
                result = self._dry_run_validate()
            else:
                result = await self._execute_scoped()
        except Unfinished as exc:
            result = rehearsal.failed(f"timeout: {exc}")
        except StoreUnavailable as exc:
            result = rehearsal.failed(
                f"store_unavailable: the rehearsal could not be recorded, so nothing was run: {exc}"
            )
        except Exception as exc:
            result = rehearsal.failed(plain(f"{type(exc).__name__}: {exc}"))
        return replace(result, duration_ms=self._elapsed_ms())

    def _dry_run_validate(self) -> ScopedExecutionResult:
        return rehearsal.dry_run(self.action)

    async def _execute_scoped(self) -> ScopedExecutionResult:
        run = registered(self.action.name)
        if run is None:
            return rehearsal.simulated(self.action, self.scope, self.scope_fraction)
        sample = rehearsal.sample_of(self.action, self.scope, self.scope_fraction)
        await self._record()
        returned = await begin(run, sample.parameters, self.timeout_ms / 1_000)
        return rehearsal.observed(self.action, self.scope, self.scope_fraction, sample, returned)

    async def _record(self) -> None:
        """Record that a callable is about to run. Raises StoreUnavailable."""
        store = configured_store()
        record = Record(
            decision_id=new_decision_id(),
            decision_type=DecisionType.RECOVERY,
            decision_outcome=DecisionOutcome.SELECTED,
            decision_trigger=DecisionTrigger.EXPLICIT,
            causal_role=CausalRole.PRE_RUN,
            tenant_id=TENANT,
            decided_at=store.now(),
            decision_inputs=plain(
                {
                    "action": self.action.name,
                    "action_type": self.action.action_type,
                    "risk_class": self.action.risk_class.value,
                    "scope_type": self.scope.value,
                    "scope_fraction": self.scope_fraction,
                }
            ),
            details={"rehearsal": True},
        )
        await store.submit(Emit(record=record, origin="library"))

    def _estimate_cost(self) -> int:
        """In cents."""
        return rehearsal.estimated_cents(self.action)

    def _elapsed_ms(self) -> int:
        return round((time.monotonic() - self._begun) * 1_000)


async def test_recovery_scope(
    action_id: str,
    action_name: str,
    action_type: str,
    risk_class: str,
    parameters: dict[str, Any],
    scope_type: str = "dry_run",
    scope_fraction: float = 0.1,
) -> dict[str, Any]:
    """Test a recovery action in scoped execution. Returns the fields of ScopedExecutionResult, with
    `risk_class` and `scope_type` as strings.

    The target agents are `parameters["target_agents"]`. Raises ValueError for an unknown risk class or scope
    type, and for values of a wrong type.
    """
    action = rehearsal.action_asked_for(action_id, action_name, action_type, risk_class, parameters)
    context = ScopedExecutionContext(action, ExecutionScope(scope_type), scope_fraction)
    return rehearsal.shown(await context.execute(), action, context.scope)


# The name is part of the recovery API. Pytest must not collect the function as a test where it is imported.
test_recovery_scope.__dict__["__test__"] = False
