"""What the tests of decision records read back, and records to emit."""

from __future__ import annotations

from typing import Any

import orjson

from sidecar.decisions import (
    DecisionOutcome,
    DecisionRecord,
    DecisionSource,
    DecisionTrigger,
    DecisionType,
)
from sidecar.library.runtime import ThreadedStore, configured_store
from sidecar.store.base import StoredDecision


def stored(store: ThreadedStore | None = None, **filters: str) -> list[StoredDecision]:
    """What the log of the configured store holds, or of another one, oldest first."""
    chosen = store or configured_store()
    page = chosen.read_sync(lambda engine: engine.decisions(filters, before=None, limit=1000))
    assert page.next is None
    return list(reversed(page.rows))


def envelopes(store: ThreadedStore | None = None, **filters: str) -> list[dict[str, Any]]:
    return [orjson.loads(row.envelope) for row in stored(store, **filters)]


def records(store: ThreadedStore | None = None, **filters: str) -> list[dict[str, Any]]:
    """The 14 fields of every record in the log, oldest first."""
    return [envelope["record"] for envelope in envelopes(store, **filters)]


def decided(**fields: Any) -> DecisionRecord:
    """A record that a person made, unless told otherwise."""
    return DecisionRecord(
        **{
            "decision_type": DecisionType.ROUTING,
            "decision_source": DecisionSource.HUMAN,
            "decision_trigger": DecisionTrigger.EXPLICIT,
            "decision_outcome": DecisionOutcome.SELECTED,
            **fields,
        }
    )
