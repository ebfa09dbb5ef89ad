"""What goes into the gate and what comes out of it. Values only, but for the rest of a long answer."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sidecar.core.brakes import Use
from sidecar.core.command import Admitted
from sidecar.core.facts import Claims, Source
from sidecar.core.policy import Rule
from sidecar.core.rules import Objection
from sidecar.core.scope import Scope, ScopeStatus
from sidecar.errors import Refusal
from sidecar.gate.places import Place
from sidecar.gate.refusal_log import Refused
from sidecar.live.terms import Terms
from sidecar.telemetry.tracing import NO_TRACE, Trace
from sidecar.upstream import Head

Headers = Sequence[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A gated request that could be read: what it claims, and the bytes that will be forwarded."""

    claims: Claims
    tenant_id: str
    request_id: str
    principal: str
    method: str
    target: bytes
    headers: Headers
    body: bytes
    body_sha256: str
    cost_source: Source
    terms: Terms
    place: Place
    shadow: bool = False
    log_fields: dict[str, Any] = field(default_factory=dict)
    trace: Trace = NO_TRACE


@dataclass(frozen=True, slots=True, kw_only=True)
class Forwarded:
    """The upstream's answer. `body` is whole, or, for one beyond `max_answer_bytes`, the part that `rest`
    goes on from; then the execution is settled when the rest has been read."""

    admitted: Admitted
    scope: Scope | None
    scope_status: ScopeStatus | None
    head: Head
    body: bytes
    rest: Remainder | None = None

    @property
    def decision_id(self) -> str:
        return self.admitted.execution.decision_id


@dataclass(frozen=True, slots=True, kw_only=True)
class Undelivered:
    """Admitted, but without an answer: why, and whether the attempt came back."""

    admitted: Admitted
    scope: Scope | None
    scope_status: ScopeStatus | None
    refusal: Refusal

    @property
    def decision_id(self) -> str:
        return self.admitted.execution.decision_id


Outcome = Forwarded | Undelivered | Refused


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """The refusal that an execution would meet, None: it would be admitted. `hold` in micro-dollars.

    `shadow` is what would be refused but is only recorded, `uses` how far each brake is used at `now`.
    """

    refusal: Refusal | None
    scope: Scope | None = None
    scope_required: bool = True
    hold: int = 0
    shadow: tuple[Objection, ...] = ()
    uses: tuple[tuple[Rule, Use], ...] = ()
    now: int = 0


class Remainder:
    """The rest of a long answer. The gate reads it to its end, whether the client stays or not.

    A client that reads slowly holds it up for at most `patience` seconds in all. Counted for each piece, that
    had no end: a client that took one now and then kept its execution in flight for as long as it liked.
    """

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._ended = False
        self._pieces: asyncio.Queue[bytes | None] = asyncio.Queue(maxsize=8)
        self._abandoned = False
        self.cut = False

    async def read(self) -> bytes:
        """The next piece, b"" at the end; then `cut` tells whether it was the true one."""
        return await self._pieces.get() or b""

    def abandon(self) -> None:
        """The client is gone: what comes is read and dropped."""
        self._abandoned = True
        self._drop()

    async def feed(self, piece: bytes | None) -> None:
        """Hand on a piece, None for the true end; waits while the client is slow, but not for ever."""
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
        """The end came too early; what the client has not taken yet is worth nothing any more. It comes
        once, and not behind the true one."""
        if self._ended:
            return
        self._ended = self.cut = True
        self._drop()
        self._pieces.put_nowait(None)

    def _drop(self) -> None:
        while not self._pieces.empty():
            self._pieces.get_nowait()


def admission_headers(admitted: Admitted) -> Headers:
    """What the upstream is told of the admission, and of a scope only if it was consumed."""
    told = [(b"Scopegate-Decision-Id", admitted.execution.decision_id.encode("ascii"))]
    if admitted.scope is not None:
        told += [
            (b"Scopegate-Scope-Id", admitted.scope.scope_id.encode("utf-8")),
            (b"Scopegate-Attempt-Number", str(admitted.execution.attempt_number).encode("ascii")),
        ]
    return told
