"""The inputs and outputs of the gate. All are plain values, except the rest of a long answer."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sidecar.core.brakes import Use
from sidecar.core.command import Admitted, Gatekept, RequestLine, Settled
from sidecar.core.facts import Claims
from sidecar.core.idempotency import Claim
from sidecar.core.policy import PolicySet, Rule
from sidecar.core.principal import ANONYMOUS, Principal
from sidecar.core.rules import Objection
from sidecar.core.scope import Scope
from sidecar.core.valueclass import valueclass
from sidecar.errors import Refusal
from sidecar.gate.places import Place
from sidecar.live.snapshot import Snapshot
from sidecar.settings.routes import Route
from sidecar.telemetry.tracing import NO_TRACE, Trace
from sidecar.upstream import AnswerHead

Headers = Sequence[tuple[bytes, bytes]]


@valueclass
class RequestFacts:
    """The facts about a request that its decision record names, as far as they could be read.

    `route` is the label of its route, None if it has none or several could be meant. `line` is set if no
    route lists the request.
    """

    gatekept: Gatekept = "scoped_execution"
    claims: Claims = field(default_factory=Claims)
    tenant_id: str = "default"
    request_id: str = ""
    principal: Principal = ANONYMOUS
    route: str | None = None
    policies: PolicySet | None = None
    line: RequestLine | None = None

    @property
    def subject(self) -> str | None:
        """What the summary of a flood shows of the request."""
        if self.line is not None:
            return str(self.line)
        return self.claims.scope_id or self.claims.incident_id

    @property
    def action_label(self) -> str:
        """The action as a metric label. Only names in the catalogue, actions and globs, are used."""
        if self.claims.action is None or self.policies is None:
            return "none"
        return self.policies.label(self.claims.action)


@valueclass
class GatedRequest:
    """A gated request that could be read: its facts, and the bytes to forward.

    `claim` is the claim to its idempotency key, if it has one.
    """

    facts: RequestFacts
    method: str
    target: bytes
    headers: Headers
    body: bytes
    body_sha256: str
    route: Route
    snapshot: Snapshot
    place: Place
    shadow: bool = False
    claim: Claim | None = None
    log_fields: Mapping[str, Any] = field(default_factory=dict)
    trace: Trace = NO_TRACE


@dataclass(frozen=True, slots=True, kw_only=True)
class Forwarded:
    """The upstream's answer. `last` is the last confirmed write, which holds the consumed scope, if any.

    `body` is the whole body, or the first part of a body above `max_answer_bytes`. `rest` then holds the
    other part, and the execution is settled when the rest has been read. `answered_at` is set for a replay
    under an idempotency key: when the answer was kept, in microseconds since 1970.
    """

    last: Settled | Admitted
    head: AnswerHead
    body: bytes
    rest: Remainder | None = None
    answered_at: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Undelivered:
    """An admitted execution without an answer: the reason, and the last confirmed write."""

    last: Settled | Admitted
    refusal: Refusal


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """A refusal on its way to the answer. `decision_id` is None if no record could be made."""

    refusal: Refusal
    decision_id: str | None = None
    retry_after: int | None = None


Outcome = Forwarded | Undelivered | Refused


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """The predicted decision on an execution. If `refusal` is None, the execution would be admitted.

    `hold` is in micro-dollars. `shadow` holds the objections that are only recorded. `uses` gives the use of
    each brake at `now`.
    """

    refusal: Refusal | None
    scope: Scope | None = None
    scope_required: bool = True
    hold: int = 0
    shadow: tuple[Objection, ...] = ()
    uses: tuple[tuple[Rule, Use], ...] = ()
    now: int = 0


class Remainder:
    """The rest of a long answer. The gate reads it to its end, even if the client hangs up.

    A slow client may delay the rest for at most `patience` seconds in total. A limit for each piece would not
    be enough, because a client that takes a piece now and then could keep its execution in flight for ever.
    """

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._ended = False
        self._pieces: asyncio.Queue[bytes | None] = asyncio.Queue(maxsize=8)
        self._abandoned = False
        self.cut = False

    async def read(self) -> bytes:
        """The next piece, or b"" at the end. `cut` then says whether the answer ended too early."""
        return await self._pieces.get() or b""

    def abandon(self) -> None:
        """Drop all further pieces, because the client is gone."""
        self._abandoned = True
        self._drop()

    async def feed(self, piece: bytes | None) -> None:
        """Pass on a piece, or None for the complete end. Waits for a slow client within `patience`."""
        if self._abandoned or self._ended:
            return
        begun = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(self._patience):
                await self._pieces.put(piece)
        except TimeoutError:
            self.abandon()
            self.break_off()
        self._patience -= asyncio.get_running_loop().time() - begun
        self._ended = self._ended or piece is None

    def break_off(self) -> None:
        """End the rest too early and drop the pieces that the client has not taken yet.

        It does nothing if the rest has ended already.
        """
        if self._ended:
            return
        self._ended = self.cut = True
        self._drop()
        self._pieces.put_nowait(None)

    def _drop(self) -> None:
        while not self._pieces.empty():
            self._pieces.get_nowait()


def admission_headers(admitted: Admitted) -> Headers:
    """The headers that name the admission to the upstream, and the scope if one was consumed."""
    headers = [(b"Scopegate-Decision-Id", admitted.execution.decision_id.encode("ascii"))]
    if admitted.scope is not None:
        headers += [
            (b"Scopegate-Scope-Id", admitted.scope.scope_id.encode("utf-8")),
            (b"Scopegate-Attempt-Number", str(admitted.execution.attempt_number).encode("ascii")),
        ]
    return headers
