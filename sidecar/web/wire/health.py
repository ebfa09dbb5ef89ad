"""The answers of the ops listener: whether a sidecar lives, and whether it can decide."""

from __future__ import annotations

from typing import Annotated, Literal, NotRequired

from sidecar.web.wire.forms import LATER, OPEN, Keywords, TypedDict


class Liveness(TypedDict):
    alive: Literal[True]


class Check(TypedDict):
    ok: bool
    reason: Annotated[str | None, LATER]


class Checks(TypedDict):
    store: Check
    log: Check
    policies: Check
    clock: Check
    draining: Check
    credentials: NotRequired[Annotated[Check, Keywords(description="Only with `upstream.credentials`.")]]


FreezesActive = Annotated[
    int | None,
    LATER,
    Keywords(minimum=0, description="How many freezes are in force. Null: the store cannot be read."),
]


class Readiness(TypedDict):
    """Whether requests can be decided, and what stands against it."""

    ready: bool
    checks: Annotated[Checks, LATER, OPEN]
    freezes_active: FreezesActive


def check(trouble: str | None) -> Check:
    """A check that failed because of `trouble`, or passed if there is none."""
    return {"ok": trouble is None, "reason": trouble}
