"""Lists, page by page: cursors, and the SQL of the decision list, so that a page is fast in a long log.

Every index of the log ends in the sequence number. A filter that one of them serves is read newest first and
stops at the end of the page. What happened (event, type, outcome) takes few values, so any combination of
those filters is a handful of exact index ranges, each read up to one page long and merged.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from itertools import product
from typing import Any, get_args

from sidecar.core.record import DecisionOutcome, DecisionType, Event
from sidecar.store.base import Page

# The names of the admin interface, and the columns behind them.
FILTERS: Mapping[str, str] = {
    "type": "decision_type",
    "outcome": "decision_outcome",
    "event": "event",
    "scope_id": "scope_id",
    "incident_id": "incident_id",
    "request_id": "request_id",
    "run_id": "run_id",
    "tenant_id": "tenant_id",
}

# The most selective first: one of them alone leads to few records, the other filters are then checked there.
_SUBJECTS = ("scope_id", "request_id", "run_id", "incident_id")
KINDS: Mapping[str, tuple[str, ...]] = {
    "event": get_args(Event),
    "type": tuple(kind.value for kind in DecisionType),
    "outcome": tuple(outcome.value for outcome in DecisionOutcome),
}

_RUN = "COALESCE(decisions.run_id, b.run_id)"

STORED_DECISION = """
    SELECT d.envelope, d.hash, COALESCE(p.hash, zeroblob(32)), b.run_id, d.seq
    FROM {found} d
    LEFT JOIN decisions p ON p.seq = d.seq - 1
    LEFT JOIN run_bindings b ON b.seq = d.seq"""

Query = tuple[str, tuple[Any, ...]]


def decisions_query(filters: Mapping[str, str], below: int, limit: int) -> Query:
    """SQL and parameters for the newest `limit` records with a sequence number under `below`."""
    ranges = [
        (f"SELECT seq FROM ({sql} AND seq < ? ORDER BY seq DESC LIMIT ?)", (*wanted, below, limit))
        for sql, wanted in _ranges(filters)
    ]
    found = " UNION ALL ".join(sql for sql, _ in ranges)
    newest = f"(SELECT * FROM decisions WHERE seq IN (SELECT seq FROM ({found}) ORDER BY seq DESC LIMIT ?))"
    sql = f"{STORED_DECISION.format(found=newest)} ORDER BY d.seq DESC"
    return sql, (*(value for _, wanted in ranges for value in wanted), limit)


def _ranges(filters: Mapping[str, str]) -> list[Query]:
    """Index ranges that hold all the records wanted, and no other, each with its parameters."""
    for subject in _SUBJECTS:
        if subject in filters:
            return _of_subject(subject, filters)
    tenant = filters.get("tenant_id")
    if not filters.keys() & KINDS.keys():
        if tenant is None:
            return [("SELECT seq FROM decisions WHERE 1", ())]
        return [("SELECT seq FROM decisions INDEXED BY decisions_by_tenant WHERE tenant_id = ?", (tenant,))]
    values = [(filters[name],) if name in filters else known for name, known in KINDS.items()]
    columns = "event = ? AND decision_type = ? AND decision_outcome = ?"
    if tenant is None:
        sql = f"SELECT seq FROM decisions INDEXED BY decisions_by_kind WHERE {columns}"
        return [(sql, kind) for kind in product(*values)]
    index = "decisions_by_tenant_and_kind"
    sql = f"SELECT seq FROM decisions INDEXED BY {index} WHERE tenant_id = ? AND {columns}"
    return [(sql, (tenant, *kind)) for kind in product(*values)]


def _of_subject(subject: str, filters: Mapping[str, str]) -> list[Query]:
    others = [name for name in filters if name != subject]
    # The plus keeps SQLite from choosing another index for what is only to be checked.
    columns = {**{name: f"+{column}" for name, column in FILTERS.items()}, "run_id": _RUN}
    checked = "".join(f" AND {columns[name]} = ?" for name in others)
    wanted = (filters[subject], *(filters[name] for name in others))
    log = "SELECT seq FROM decisions LEFT JOIN run_bindings b USING (seq) WHERE decisions"
    ranges: list[Query] = [(f"{log}.{subject} = ?{checked}", wanted)]
    if subject == "run_id":  # in the record, or bound to it later
        bound = "SELECT seq FROM run_bindings b JOIN decisions USING (seq) WHERE b.run_id = ?"
        ranges.append((bound + checked, wanted))
    return ranges


def cursor(before: str | None) -> int:
    """A cursor is the sequence number to go on below. Raises ValueError for anything else."""
    if before is None:
        return 2**63 - 1
    if not before.isascii() or not before.isdigit() or len(before) > 18:
        raise ValueError("takes the value of next of the page before")
    return int(before)


def decision_cursor(before: str | None) -> str:
    """As `cursor`, for a list in the order of decision ids."""
    if before is None:
        return "~"  # behind every id
    if not re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", before):
        raise ValueError("takes the value of next of the page before")
    return before


def page(found: list[Any], limit: int, value: Callable[[Any], Any]) -> Page:
    """One row more than wanted was read: it tells whether there is a next page."""
    shown = found[:limit]
    return Page([value(row) for row in shown], str(shown[-1][-1]) if len(found) > limit else None)
