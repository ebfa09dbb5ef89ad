"""Paged lists: cursors, and SQL that reads a page in bounded time from a list of any length.

Every index of the log ends in the sequence number. A filter that an index serves is read newest first and
stops at the end of the page. The columns event, type and outcome have few values, so any combination of
filters on them is a handful of exact index ranges. Each range is read up to the length of one page, and the
ranges are merged.

Scopes have an index by incident only. Any other filter is checked on a bounded part of the list. Such a page
may be short, or empty, and still have a next page.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from itertools import product
from typing import Any, get_args

from sidecar.core.record import DecisionOutcome, DecisionType, Event
from sidecar.store import rows
from sidecar.store.base import Page, ScopesWanted

# The filter names of the admin interface, and the columns that they select on.
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

# The most selective first. One of them alone leads to few records, and the other filters are checked on
# those.
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

# How many scopes a page looks at if no index serves its filter. This takes about 5 ms.
SCOPES_LOOKED_AT = 20_000
# A cheap condition that every scope of a status meets. `Scope.status` then decides.
_NECESSARY: Mapping[str, str] = {
    "active": "revoked_at IS NULL AND expires_at > ?",
    "exhausted": "attempts_used > 0 AND ? IS NOT NULL",
    "expired": "expires_at <= ?",
    "revoked": "revoked_at IS NOT NULL AND ? IS NOT NULL",
}
# The names of all tenants, found with one index step for each.
_TENANTS = """
    WITH RECURSIVE tenants (name) AS (
        SELECT MIN(tenant_id) FROM scopes
        UNION ALL
        SELECT (SELECT MIN(tenant_id) FROM scopes WHERE tenant_id > name) FROM tenants WHERE name IS NOT NULL
    )
    SELECT name FROM tenants"""


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
    """Index ranges that together hold exactly the wanted records, each with its parameters."""
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
    # The plus keeps SQLite from choosing an index of a column that is only checked.
    columns = {**{name: f"+{column}" for name, column in FILTERS.items()}, "run_id": _RUN}
    checked = "".join(f" AND {columns[name]} = ?" for name in others)
    wanted = (filters[subject], *(filters[name] for name in others))
    log = "SELECT seq FROM decisions LEFT JOIN run_bindings b USING (seq) WHERE decisions"
    ranges: list[Query] = [(f"{log}.{subject} = ?{checked}", wanted)]
    if subject == "run_id":  # the run is in the record, or was bound to the record later
        bound = "SELECT seq FROM run_bindings b JOIN decisions USING (seq) WHERE b.run_id = ?"
        ranges.append((bound + checked, wanted))
    return ranges


def scopes_query(wanted: ScopesWanted, below: int, limit: int) -> Query:
    """SQL and parameters for the newest `limit` candidate scopes with a sequence number under `below`."""
    table, where = "scopes", ["seq < ?"]
    parameters: list[Any] = [below]
    if wanted.incident_id is not None:
        table = "scopes INDEXED BY scopes_by_incident"
        where.append("incident_id = ?")
        parameters.append(wanted.incident_id)
        if wanted.tenant_id is None:
            where.append(f"tenant_id IN ({_TENANTS})")
    elif wanted.bounded:
        where.append("seq >= ?")
        parameters.append(below - SCOPES_LOOKED_AT)
    if wanted.tenant_id is not None:
        # The plus keeps SQLite from choosing an index that is not in the order of the list.
        where.append("tenant_id = ?" if wanted.incident_id is not None else "+tenant_id = ?")
        parameters.append(wanted.tenant_id)
    if wanted.status is not None:
        where.append(_NECESSARY[wanted.status])
        parameters.append(wanted.now)
    found = f"SELECT {rows.SCOPE_COLUMNS}, seq FROM {table} WHERE {' AND '.join(where)}"
    return f"{found} ORDER BY seq DESC LIMIT ?", (*parameters, limit)


def scopes_page(found: list[Any], wanted: ScopesWanted, below: int, limit: int) -> Page:
    """The page of scopes below `below`. `found` holds the rows of a query for `limit` + 1 rows."""
    shown = page(found, limit, rows.scope_from_row)
    scopes = [scope for scope in shown.rows if wanted.status in (None, scope.status(wanted.now))]
    rest = below - SCOPES_LOOKED_AT
    return Page(scopes, str(rest) if shown.next is None and wanted.bounded and rest > 1 else shown.next)


# The two forms of a cursor.
CURSOR = "[0-9]{1,18}"
DECISION_CURSOR = "[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"


class UnknownCursor(ValueError):
    """A cursor is not the `next` of a page. The message says what to give."""

    def __init__(self) -> None:
        super().__init__("takes the value of next of the page before")


def cursor(before: str | None) -> int:
    """Parse a cursor: the sequence number below which the next page starts. Raises UnknownCursor."""
    if before is None:
        return 2**63 - 1
    if not re.fullmatch(CURSOR, before):
        raise UnknownCursor
    return int(before)


def decision_cursor(before: str | None) -> str:
    """Parse a cursor of a list that is ordered by decision id. Raises UnknownCursor."""
    if before is None:
        return "~"  # sorts after every id
    if not re.fullmatch(DECISION_CURSOR, before):
        raise UnknownCursor
    return before


def page(found: list[Any], limit: int, value: Callable[[Any], Any]) -> Page:
    """Make a page. `found` holds up to `limit` + 1 rows; the extra row shows that there is a next page."""
    shown = found[:limit]
    return Page([value(row) for row in shown], str(shown[-1][-1]) if len(found) > limit else None)
