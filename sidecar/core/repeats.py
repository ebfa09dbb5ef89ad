"""What a request gets that repeats an earlier one under its idempotency key, and the record that it leaves.

A replay comes before every bound and every rule, because it executes nothing. It consumes nothing either, so
it needs no valid scope: the first request has consumed it. The record of a replay has the event `replayed`
and the outcome `none`: nothing was let through, and nothing refused it.
"""

from __future__ import annotations

from sidecar.core.command import Admit, CountReplays, Denied, Replayed
from sidecar.core.entries import gate_entry
from sidecar.core.facts import Claims
from sidecar.core.idempotency import Claim, Claimed, earlier, scope_then
from sidecar.core.record import Entry
from sidecar.core.scope import Execution, Scope
from sidecar.errors import Refusal

# The reply to a repeat, and its record if it leaves one.
Repeat = tuple[Denied | Replayed, Entry | None]


def repeated(
    command: Admit, claim: Claim, claimed: Claimed, execution: Execution | None, scope: Scope | None, now: int
) -> Repeat | None:
    """The reply to a request whose key is claimed; None: the key is free again.

    `execution` is the one that holds the key, and `scope` is its scope as it is now.
    """
    found = earlier(claim, claimed, execution, now)
    if found is None:
        return None
    revision = command.policies.revision
    decision_id = command.decision_id if command.record_denial else None
    if isinstance(found, Refusal):
        entry = None
        if decision_id is not None:
            entry = gate_entry(command, "refused", found, command.claims, revision, now)
        return Denied(found, decision_id), entry
    assert execution is not None  # without it there is no answer
    replayed = Replayed(
        scope=scope_then(scope, claimed.counters),
        execution=execution,
        answer=found,
        answered_at=claimed.answered_at or now,
        decision_id=decision_id,
    )
    if decision_id is None:
        return replayed, None
    return replayed, gate_entry(
        command,
        "replayed",
        None,
        command.claims,
        revision,
        now,
        admission_id=execution.decision_id,
        http_status=found.status,
    )


def summary_of(command: CountReplays, now: int) -> Entry:
    """The record of a flood of replays."""
    return gate_entry(
        command,
        "replayed",
        None,
        Claims(),
        command.policy_revision,
        now,
        count=command.count,
        subjects=list(command.subjects),
    )
