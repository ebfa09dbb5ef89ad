"""Idempotency keys: a request that a client repeats under its `Idempotency-Key` is executed once.

1. A key belongs to one principal, one tenant and one route. The store holds a digest of the four, so that no
   key stands there in clear. A second digest identifies the request: its method, target and body, and what
   it claims, because a scope or an action may stand in a header.
2. The transaction that admits an execution claims its key. A refusal claims nothing.
3. The status of the execution that holds the key decides what a repeat gets:

   | status of the execution | a repeat |
   |---|---|
   | `in_flight` | 409 `idempotency_in_flight` |
   | `unknown`, `executed`, or any other without a kept answer | 409 `outcome_unknown` |
   | `not_sent`, `not_executed` | the key is free, and the repeat is judged as a first request |
   | any other | the kept answer |

   No status is copied to the key, so a key cannot disagree with its execution.
4. The settlement keeps the answer in its own transaction, before a client has it. A body above
   `MAX_KEPT_BODY_BYTES` and an answer that streams are not kept; a repeat then gets status and decision_id.
5. A key is kept for some time after its execution ended, and in any case until then. An execution that waits
   to be reconciled has not ended.
"""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256

from sidecar.core.facts import Claims
from sidecar.core.scope import RELEASING, Execution, Scope
from sidecar.core.valueclass import valueclass
from sidecar.errors import Refusal

MIN_KEY_CHARS = 8
MAX_KEY_CHARS = 255
KEY_RULE = f"{MIN_KEY_CHARS} to {MAX_KEY_CHARS} printable characters"
MAX_KEPT_BODY_BYTES = 64 * 1024

# An execution in one of these statuses has no final outcome, so its key is kept. The backend of a `running`
# one has answered and reports the outcome later.
OPEN = frozenset({"in_flight", "running", "unknown"})
# The answer of these is unknown, or must not be repeated.
_WITHOUT_ANSWER = frozenset({"unknown", "executed"})
# The Retry-After of a request whose first one is still in flight.
RETRY_AFTER_SECONDS = 1

Headers = tuple[tuple[bytes, bytes], ...]
# What a settlement changes in a scope: attempts_used, held, settled, overrun and revoked_at.
Counters = tuple[int, int, int, bool, int | None]


@valueclass
class Claim:
    """A request's claim to its key, for which `key` and `request` are the digests of rules 1 and 3.

    `kept_for` is how long the key is kept after the end of its execution, in microseconds.
    """

    key: bytes
    request: bytes
    kept_for: int


@valueclass
class KeptAnswer:
    """The answer that repeats get. `body` is None if it is not kept; `headers` are then empty."""

    key: bytes
    status: int
    reason: bytes
    headers: Headers = ()
    body: bytes | None = None


@valueclass
class Claimed:
    """A key in the store, and the execution that holds it.

    `expires_at` is the earliest time at which the key may be forgotten. `answered_at` is when the answer was
    kept, and `counters` are those of the scope at that time. All times are in microseconds since 1970.
    """

    key: bytes
    request: bytes
    admission_id: str
    kept_for: int
    expires_at: int
    answer: KeptAnswer | None = None
    answered_at: int | None = None
    counters: Counters | None = None


def is_key(value: str) -> bool:
    """Whether a value obeys KEY_RULE."""
    return MIN_KEY_CHARS <= len(value) <= MAX_KEY_CHARS and value.isprintable()


def claim_of(
    key: str,
    *,
    principal: str,
    tenant_id: str,
    route: str,
    method: str,
    target: bytes,
    body_sha256: str,
    claims: Claims,
    kept_for: int,
) -> Claim:
    """The claim of a request to its key."""
    claimed = (
        claims.scope_id or "",
        claims.incident_id or "",
        claims.action or "",
        *claims.target_agents,
    )
    owner = (principal.encode(), tenant_id.encode(), route.encode(), key.encode())
    return Claim(
        key=_digest(*owner),
        request=_digest(method.encode(), target, body_sha256.encode(), *(each.encode() for each in claimed)),
        kept_for=kept_for,
    )


def _digest(*parts: bytes) -> bytes:
    """SHA-256 over the parts, each after its length, so that no two lists of parts have the same bytes."""
    return sha256(b"".join(b"%d:%b" % (len(part), part) for part in parts)).digest()


def earlier(
    claim: Claim, claimed: Claimed, execution: Execution | None, now: int
) -> KeptAnswer | Refusal | None:
    """What a request gets because an earlier one claimed its key; None: the key is free for it.

    `execution` is the one that holds the key. It is None if the store does not have it any more.
    """
    status = None if execution is None else execution.status
    if status in RELEASING or now >= kept_until(claimed, execution, now):
        return None
    if claim.request != claimed.request:
        return Refusal(
            "idempotency_key_reused", "Another request was sent under this Idempotency-Key before."
        )
    holder = {"decision_id": claimed.admission_id}
    if status == "in_flight":
        return Refusal(
            "idempotency_in_flight",
            "The first request under this Idempotency-Key is still in flight.",
            {**holder, "retry_after_seconds": RETRY_AFTER_SECONDS},
        )
    if claimed.answer is None or status is None or status in _WITHOUT_ANSWER:
        known = "may have been executed" if status in (None, "unknown") else "was executed"
        return Refusal(
            "outcome_unknown",
            f"The first request under this Idempotency-Key {known}, and its answer is not known.",
            {**holder, "execution_status": status or "unknown"},
        )
    return claimed.answer


def kept_until(claimed: Claimed, execution: Execution | None, now: int) -> int:
    """Until when a key is kept, as far as that is known at the time `now`."""
    if execution is None:
        return claimed.expires_at
    if execution.status in OPEN:
        return now + claimed.kept_for
    return (execution.ended_at or execution.admitted_at) + claimed.kept_for


def claimed_by(claim: Claim, admission_id: str, now: int) -> Claimed:
    """The key after an admission has claimed it."""
    return Claimed(
        key=claim.key,
        request=claim.request,
        admission_id=admission_id,
        kept_for=claim.kept_for,
        expires_at=now + claim.kept_for,
    )


def answered(
    claimed: Claimed | None, answer: KeptAnswer, admission_id: str, scope: Scope | None, now: int
) -> Claimed | None:
    """The key with the answer of the execution that holds it.

    None if another execution holds the key by now, or if it has an answer, because the first one counts.
    """
    if claimed is None or claimed.admission_id != admission_id or claimed.answer is not None:
        return None
    counters: Counters | None = None
    if scope is not None:
        counters = (scope.attempts_used, scope.held, scope.settled, scope.overrun, scope.revoked_at)
    return Claimed(
        key=claimed.key,
        request=claimed.request,
        admission_id=admission_id,
        kept_for=claimed.kept_for,
        expires_at=now + claimed.kept_for,
        answer=answer,
        answered_at=now,
        counters=counters,
    )


def scope_then(scope: Scope | None, counters: Counters | None) -> Scope | None:
    """The scope as it was when the answer was kept, because a repeat gets the answer that the first got."""
    if scope is None or counters is None:
        return None
    attempts_used, held, settled, overrun, revoked_at = counters
    return replace(
        scope,
        attempts_used=attempts_used,
        held=held,
        settled=settled,
        overrun=overrun,
        revoked_at=revoked_at,
    )


def without_body(answer: KeptAnswer) -> KeptAnswer:
    """The answer of which only the status is kept."""
    return KeptAnswer(key=answer.key, status=answer.status, reason=answer.reason)
