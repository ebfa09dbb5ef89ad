"""Predicts the judgment of an execution with the code and rows of a real admission. It changes nothing."""

from __future__ import annotations

from sidecar.core.apply import Judgment, Past, State, judgment, names
from sidecar.core.command import Admit
from sidecar.core.scope import Scope
from sidecar.store.base import Engine
from sidecar.store.batch import rows_of


async def foreseen(engine: Engine, command: Admit, now: int) -> tuple[Judgment, Scope | None]:
    """The judgment, and the scope that the command names. Raises StoreUnavailable."""

    def view(state: State) -> tuple[Judgment, Scope | None]:
        scope = state.scopes.get(command.claims.scope_id or "")
        return judgment(command, scope, Past(state.admissions, state.executions), now), scope

    return await engine.look(rows_of([names(command)], now), view)
