"""A store of each engine, and commands for it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sidecar.core.command import Admit, Issue
from sidecar.core.facts import Claims
from sidecar.core.scope import Scope
from sidecar.ids import new_decision_id, new_scope_id
from sidecar.store.batch import Store
from sidecar.store.sqlite import SqliteEngine
from tests.support import POLICIES, Clock

OpenStore = Callable[..., Awaitable[Store]]


def issue(**terms: Any) -> Issue:
    """A grant for inc_1, by default of three attempts."""
    scope = Scope(
        scope_id=new_scope_id(),
        tenant_id="default",
        incident_id="inc_1",
        allowed_actions=("retry_agent", "failover"),
        max_cost=500_000,
        max_attempts=3,
        created_at=0,
        expires_at=0,
        intent="a test",
        target_agents=(),
        created_by="tests",
    )
    ttl = terms.pop("ttl", 300)
    return Issue(decision_id=new_decision_id(), scope=replace(scope, **terms), ttl=ttl, policies=POLICIES)


def admit(scope_id: str | None, action: str = "failover", **options: Any) -> Admit:
    agents = options.pop("target_agents", ())
    claims = Claims(scope_id=scope_id, incident_id="inc_1", action=action, target_agents=agents)
    return Admit(decision_id=new_decision_id(), claims=claims, policies=POLICIES, request_id="req", **options)


@pytest.fixture
async def open_store(clock: Clock) -> AsyncIterator[OpenStore]:
    """Opens stores and closes them at the end of the test."""
    async with AsyncExitStack() as stack:

        async def open_one(path: Path | None, **options: Any) -> Store:
            if "clock" not in options:
                options["elapsed"] = clock.elapsed
            options = {"clock": clock, "deadline_seconds": 5.0, **options}
            store = Store(SqliteEngine(path), **options)
            stack.push_async_callback(store.close)
            await store.open()
            return store

        yield open_one


@pytest.fixture(params=["memory", "sqlite"])
async def store(request: pytest.FixtureRequest, open_store: OpenStore, tmp_path: Path) -> Store:
    """An open store. A test runs once for each engine."""
    return await open_store(None if request.param == "memory" else tmp_path / "store.db")
