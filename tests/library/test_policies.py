"""Policies in a program that embeds the library: the same rules, limits and brakes as at the gate."""

from __future__ import annotations

from pathlib import Path

import pytest

from sidecar.library.runtime import configure
from sidecar.scoped_execution import (
    ScopeRefused,
    create_recovery_scope,
    execute_with_scope,
    get_scope_store,
)
from tests.library.recorded import envelopes

POLICIES = """\
actions: {restart_pod: {risk: medium}, failover_db: {risk: critical, targets_required: true}}
rules:
  - {id: cheap, on: issue, limit: {max_cost_usd: 0.25, max_attempts: 3}, reason: Small steps.}
  - {id: twice, on: execute, brake: {per: [incident_id], max_attempts: 2, window_seconds: 3600}}
"""


@pytest.fixture(autouse=True)
def policies(tmp_path: Path) -> None:
    folder = tmp_path / "policies"
    folder.mkdir()
    (folder / "all.yaml").write_text(POLICIES, encoding="utf-8")
    configure(f"sqlite:///{tmp_path / 'store.db'}", policies=folder)


async def test_a_default_above_a_limit_is_lowered_and_a_wish_above_it_is_refused() -> None:
    granted = await create_recovery_scope("inc_1", "restart_pod", "it hangs")
    assert granted["max_cost_usd"] == 0.25
    with pytest.raises(ScopeRefused) as refused:
        await create_recovery_scope("inc_1", "restart_pod", "it hangs", max_attempts=4)
    assert (refused.value.code, refused.value.http_status) == ("policy_denied", 403)
    assert (refused.value.rules, refused.value.members["limit"]) == (["cheap"], "max_attempts")
    assert "Small steps." in str(refused.value)


async def test_a_brake_holds_and_consumes_nothing() -> None:
    scope = await create_recovery_scope("inc_1", "restart_pod", "it hangs", max_attempts=3)
    for _ in range(2):
        await execute_with_scope(scope["scope_id"], "restart_pod", "inc_1")
    bound = get_scope_store().get_scope(scope["scope_id"])
    assert bound is not None
    assert bound.can_execute("restart_pod", "inc_1") == (False, "braked")
    with pytest.raises(ScopeRefused) as refused:
        await execute_with_scope(scope["scope_id"], "restart_pod", "inc_1")
    assert (refused.value.code, refused.value.http_status, refused.value.rules) == ("braked", 429, ["twice"])
    assert 3590 < refused.value.members["retry_after_seconds"] <= 3600
    assert bound.to_dict()["attempts_used"] == 2


async def test_an_action_that_needs_its_targets_named_is_refused_without_them() -> None:
    with pytest.raises(ScopeRefused, match="targets_required"):
        await create_recovery_scope("inc_1", "failover_db", "the primary is gone")
    granted = await create_recovery_scope(
        "inc_1", "failover_db", "the primary is gone", target_agents=["db_1"]
    )
    assert granted["target_agents"] == ["db_1"]


async def test_every_record_says_that_the_library_wrote_it() -> None:
    scope = await create_recovery_scope("inc_1", "restart_pod", "it hangs", max_attempts=2)
    await execute_with_scope(scope["scope_id"], "restart_pod", "inc_1")
    get_scope_store().revoke_scope(scope["scope_id"])
    found = envelopes()
    assert {envelope["event"] for envelope in found} == {"issued", "admitted", "settled", "revoked"}
    assert {envelope["origin"] for envelope in found} == {"library"}
    assert {envelope["record"]["request_id"] for envelope in found} == {None}
