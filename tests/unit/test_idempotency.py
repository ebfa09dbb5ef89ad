"""What a request gets whose idempotency key an earlier one holds: the rules, as a table over all statuses."""

from __future__ import annotations

from typing import Any

import pytest

from sidecar.core.facts import Claims
from sidecar.core.idempotency import (
    Claimed,
    KeptAnswer,
    answered,
    claim_of,
    claimed_by,
    earlier,
    is_key,
    kept_until,
    scope_then,
    without_body,
)
from sidecar.core.scope import Execution, Scope
from sidecar.errors import Refusal

NOW = 1_700_000_000_000_000
KEPT_FOR = 1_000
CLAIM = claim_of(
    "key-00000001",
    principal="p",
    tenant_id="t",
    route="r",
    method="POST",
    target=b"/",
    body_sha256="a",
    claims=Claims(),
    kept_for=KEPT_FOR,
)
ANOTHER = claim_of(
    "key-00000001",
    principal="p",
    tenant_id="t",
    route="r",
    method="POST",
    target=b"/",
    body_sha256="b",
    claims=Claims(),
    kept_for=KEPT_FOR,
)
ANSWER = KeptAnswer(key=CLAIM.key, status=200, reason=b"OK", body=b"x")
# What a repeat gets, by the status of the execution: where its answer is kept, and where it is not.
TABLE = {
    "in_flight": ("idempotency_in_flight", "idempotency_in_flight"),
    "answered": ("the answer", "outcome_unknown"),
    "running": ("the answer", "outcome_unknown"),
    "succeeded": ("the answer", "outcome_unknown"),
    "failed": ("the answer", "outcome_unknown"),
    "unknown": ("outcome_unknown", "outcome_unknown"),
    "executed": ("outcome_unknown", "outcome_unknown"),
    "not_sent": ("free", "free"),
    "not_executed": ("free", "free"),
}
OPEN = {"in_flight", "running", "unknown"}


def execution(status: Any, ended_at: int | None = None) -> Execution:
    return Execution(
        decision_id="first",
        scope_id=None,
        tenant_id="t",
        incident_id="i",
        action="a",
        request_id="",
        attempt_number=None,
        hold=0,
        admitted_at=NOW,
        status=status,
        ended_at=ended_at,
    )


def held(answer: KeptAnswer | None = None) -> Claimed:
    claimed = claimed_by(CLAIM, "first", NOW)
    return (answer and answered(claimed, answer, "first", None, NOW)) or claimed


def outcome(found: KeptAnswer | Refusal | None) -> str:
    if found is None:
        return "free"
    return "the answer" if found is ANSWER else found.code if isinstance(found, Refusal) else "?"


@pytest.mark.parametrize("status", TABLE)
def test_the_status_of_the_execution_decides_what_a_repeat_gets(status: str) -> None:
    for answer, expected in zip((ANSWER, None), TABLE[status], strict=True):
        ended = None if status in OPEN else NOW
        assert outcome(earlier(CLAIM, held(answer), execution(status, ended), NOW + 1)) == expected


@pytest.mark.parametrize("status", TABLE)
def test_another_request_is_told_so_first_unless_the_key_is_free(status: str) -> None:
    expected = "free" if TABLE[status][0] == "free" else "idempotency_key_reused"
    assert outcome(earlier(ANOTHER, held(ANSWER), execution(status, NOW), NOW + 1)) == expected


@pytest.mark.parametrize("status", TABLE)
def test_a_key_expires_some_time_after_the_end_and_never_before_the_end(status: str) -> None:
    ended = None if status in OPEN else NOW + 10
    last = NOW + 10 + KEPT_FOR - 1
    assert outcome(earlier(CLAIM, held(ANSWER), execution(status, ended), last)) == TABLE[status][0]
    expected = TABLE[status][0] if status in OPEN else "free"
    assert outcome(earlier(CLAIM, held(ANSWER), execution(status, ended), last + 1)) == expected


def test_a_refusal_names_the_execution_that_holds_the_key() -> None:
    flying = earlier(CLAIM, held(), execution("in_flight"), NOW)
    assert isinstance(flying, Refusal)
    assert flying.members == {"decision_id": "first", "retry_after_seconds": 1}
    lost = earlier(CLAIM, held(), execution("unknown"), NOW)
    assert isinstance(lost, Refusal)
    assert lost.members == {"decision_id": "first", "execution_status": "unknown"}


def test_where_the_execution_is_gone_from_the_store_the_key_is_kept_for_its_time() -> None:
    assert outcome(earlier(CLAIM, held(ANSWER), None, NOW + KEPT_FOR - 1)) == "outcome_unknown"
    assert kept_until(held(), None, NOW) == NOW + KEPT_FOR
    assert outcome(earlier(CLAIM, held(ANSWER), None, NOW + KEPT_FOR)) == "free"


def test_an_answer_is_kept_once_and_only_for_the_execution_that_holds_the_key() -> None:
    assert answered(None, ANSWER, "first", None, NOW) is None
    assert answered(held(), ANSWER, "second", None, NOW) is None
    assert answered(held(ANSWER), ANSWER, "first", None, NOW) is None


def test_the_scope_of_a_replay_is_the_scope_of_the_first_answer() -> None:
    scope = Scope(
        scope_id="s",
        tenant_id="t",
        incident_id="i",
        allowed_actions=("a",),
        max_cost=10,
        max_attempts=3,
        created_at=NOW,
        expires_at=NOW + 1,
        intent="",
        target_agents=(),
        created_by="",
        attempts_used=1,
        held=2,
        settled=3,
    )
    kept = answered(held(), ANSWER, "first", scope, NOW)
    assert kept is not None
    later = scope.counted(attempts_used=3, held=0, settled=9, overrun=True)
    assert scope_then(later, kept.counters) == scope
    assert scope_then(None, kept.counters) is None
    assert scope_then(later, None) is None


@pytest.mark.parametrize(
    ("value", "good"),
    [
        ("1234567", False),
        ("12345678", True),
        ("k" * 255, True),
        ("k" * 256, False),
        ("with blanks", True),
        ("übergröße", True),
        ("nul\0inside", False),
        ("lone \udcff surrogate", False),
        ("zero\u200bwidth", False),
    ],
)
def test_a_key_has_8_to_255_printable_characters(value: str, good: bool) -> None:
    assert is_key(value) is good


def test_of_a_long_answer_only_the_status_is_kept() -> None:
    assert without_body(ANSWER) == KeptAnswer(key=CLAIM.key, status=200, reason=b"OK")
