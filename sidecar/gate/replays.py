"""Idempotency keys at the gate: the answer that is kept for repeats, the answer of a replay, and its record.

A repeat gets what the first request got: status, headers and body of the backend's answer, and the state of
the scope after that execution. Cookies are never kept, because they may name a session of the first client.
Of an answer that is too long to be kept, a repeat gets the status, and a JSON body with status and
decision_id.
"""

from __future__ import annotations

from sidecar.core.command import CountReplays, Replayed, Settled
from sidecar.core.idempotency import MAX_KEPT_BODY_BYTES, Claim, KeptAnswer
from sidecar.errors import StoreUnavailable
from sidecar.files.jsonvalue import dumps
from sidecar.gate.floods import Summaries, Summary
from sidecar.gate.messages import Forwarded, Refused, RequestFacts
from sidecar.gate.observer import Observer
from sidecar.gate.refusal_log import RefusalLog
from sidecar.ids import new_decision_id
from sidecar.store.batch import Store
from sidecar.upstream import AnswerHead

_NEVER_KEPT = frozenset({b"set-cookie", b"set-cookie2"})
_BODILESS = frozenset({204, 304})
UNFORESEEN = StoreUnavailable("the sidecar failed to record the replay")
_JSON = ((b"Content-Type", b"application/json"),)


def kept_answer(claim: Claim, head: AnswerHead, body: bytes | None) -> KeptAnswer:
    """What is kept of an answer. `body` is None for an answer that streams."""
    if body is None or len(body) > MAX_KEPT_BODY_BYTES:
        return KeptAnswer(key=claim.key, status=head.status, reason=head.reason)
    headers = tuple(pair for pair in head.headers if pair[0].lower() not in _NEVER_KEPT)
    return KeptAnswer(key=claim.key, status=head.status, reason=head.reason, headers=headers, body=body)


def status_only(answer: KeptAnswer) -> KeptAnswer:
    """An answer of which only the status is kept, without the reason, which may say more."""
    return KeptAnswer(key=answer.key, status=answer.status, reason=b"")


def replay(replayed: Replayed, method: str) -> Forwarded:
    """The answer to a repeat with this method."""
    answer, execution = replayed.answer, replayed.execution
    if answer.body is not None:
        last = Settled(replayed.scope, execution, overrun=False)
        headers, body = answer.headers, answer.body
    else:
        last = Settled(None, execution, overrun=False)
        headers, body = _JSON, dumps({"status": answer.status, "decision_id": execution.decision_id})
        if method == "HEAD" or answer.status in _BODILESS:
            headers, body = (), b""
    lengths = [value for name, value in headers if name.lower() == b"content-length"]
    head = AnswerHead(
        answer.status,
        answer.reason,
        headers,
        (1, 1),
        content_length=int(lengths[0]) if lengths else None,
        codings=(),
        upgrades=(),
        keep_alive=False,
    )
    return Forwarded(last=last, head=head, body=body, answered_at=replayed.answered_at)


class ReplayLog:
    """Sees to it that every replay is recorded, counted and logged. A flood of them has counted summaries."""

    def __init__(self, store: Store, refusals: RefusalLog, observer: Observer) -> None:
        self._store = store
        self._refusals = refusals
        self._observer = observer
        self._summaries: Summaries[None, str | StoreUnavailable] = Summaries(self._write)

    async def record(self, replayed: Replayed, facts: RequestFacts) -> Refused | None:
        """Record a replay that has no record yet, because it is one of a flood. If that is not possible, the
        request is refused, because nothing is answered unrecorded."""
        if replayed.decision_id is None:
            written = await self._summaries.join((facts.tenant_id, facts.principal, facts.route), None, facts)
            if not isinstance(written, str):
                return await self._refusals.unconfirmed(written or UNFORESEEN, facts)
        self._observer.replayed(facts, replayed)
        return None

    async def _write(self, summary: Summary[None, str | StoreUnavailable]) -> str | StoreUnavailable:
        shared = summary.shared
        command = CountReplays(
            decision_id=new_decision_id(),
            count=summary.count,
            subjects=tuple(summary.subjects),
            policy_revision=shared.policies.revision if shared.policies else None,
            tenant_id=shared.tenant_id,
            principal=shared.principal,
            route=shared.route,
        )
        try:
            await self._store.submit(command)
        except StoreUnavailable as exc:
            return exc
        return command.decision_id
