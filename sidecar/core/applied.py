"""What comes of applying one command. Values only."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sidecar.core.command import Bind, Reply, Turn
from sidecar.core.freeze import Freeze
from sidecar.core.idempotency import Claimed
from sidecar.core.record import Entry
from sidecar.core.rules import Objection
from sidecar.core.scope import Execution, Scope
from sidecar.core.valueclass import valueclass


@valueclass
class Applied:
    """The result of applying one command: the reply, the changes, the entry for the log."""

    reply: Reply
    scope: Scope | None = None
    execution: Execution | None = None
    entry: Entry | None = None
    kept: bytes | None = None
    turned: Turn | None = None
    bound: Bind | None = None
    claimed: Claimed | None = None
    freeze: Freeze | None = None


def shadow_details(shadow: Iterable[Objection]) -> dict[str, Any]:
    """The details that a record holds about refusals in shadow mode."""
    would_refuse = [one.to_dict() for one in shadow]
    return {"would_refuse": would_refuse} if would_refuse else {}
