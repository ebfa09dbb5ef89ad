"""Paged lists: cursors, and SQL that reads a page in bounded time from a list of any length.

Every index of the log ends in the sequence number. A filter that an index serves is read newest first and
stops at the end of the page. The columns event, type and outcome have few values, so any combination of
filters on them is a handful of exact index ranges. Each range is read up to the length of one page, and the
ranges are merged. Records are appended in the order of their times, so a binary search finds the first one of
a time.

Other filters have no index, because every index makes the writer slower. They are checked on a bounded part
of the list. Such a page may be short, or empty, and still have a next page. These filters are: the action of
decisions, unless the subject is given as well; the action and the time of executions, unless the incident is
given as well; and the status and the tenant of scopes, unless the incident is given as well.
"""

from __future__ import annotations

import re
import sqlite3
from bisect import bisect_left
from collections.abc import Callable, Mapping
from itertools import pairwise, product
from typing import Any, get_args

from sidecar.core.record import DecisionOutcome, DecisionType, Event
from sidecar.store import _rows as rows
from sidecar.store.base import ExecutionsWanted, Page, ScopesWanted, StoredDecision

# The filter names of the admin interface, and the columns that they select on.
FILTERS: Mapping[str, str] = {
    "type": "decision_type",
    "outcome": "decision_outcome",
    "event": "event",
    "scope_id": "scope_id",
    "incident_id": "incident_id",
    "action": "action",
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
_RECORDED = "COALESCE(recorded_at, decided_at)"

STORED_DECISION = """
    SELECT d.envelope, d.hash, COALESCE(p.hash, zeroblob(32)), b.run_id, d.seq
    FROM {found} d
    LEFT JOIN decisions p ON p.seq = d.seq - 1
    LEFT JOIN run_bindings b ON b.seq = d.seq"""

Query = tuple[str, tuple[Any, ...]]

# How many rows a page looks at if no index serves its filter. This takes about 5 ms.
LOOKED_AT = 20_000
# How much earlier than its admission the id of an execution may have been made, in milliseconds. The limit is
# generous: the wall clock may be a minute behind the log, and a command waits for at most a few seconds.
ID_AGE = 3_600_000
# A cheap condition that every scope of a status meets. `Scope.status` then decides.
_NECESSARY: Mapping[str, str] = {
    "active": "revoked_at IS NULL AND expires_at > ?",
    "exhausted": "attempts_used > 0 AND ? IS NOT NULL",
    "expired": "expires_at <= ?",
    "revoked": "revoked_at IS NOT NULL AND ? IS NOT NULL",
}
# The names of all tenants of a table, found with one index step for each.
_TENANTS = """
    WITH RECURSIVE tenants (name) AS (
        SELECT MIN(tenant_id) FROM {table}
        UNION ALL
        SELECT (SELECT MIN(tenant_id) FROM {table} WHERE tenant_id > name) FROM tenants WHERE name IS NOT NULL
    )
    SELECT name FROM tenants"""


def decisions_query(
    filters: Mapping[str, str], below: int, limit: int, *, floor: int = 1, since: int | None = None
) -> Query:
    """SQL and parameters for the newest `limit` records with a sequence number from `floor` to under
    `below`."""
    window, bounds = "seq >= ? AND seq < ?", [floor, below]
    if since is not None:
        window, bounds = f"{window} AND {_RECORDED} >= ?", [*bounds, since]
    ranges = [
        (f"SELECT seq FROM ({sql} AND {window} ORDER BY seq DESC LIMIT ?)", (*wanted, *bounds, limit))
        for sql, wanted in _ranges(filters)
    ]
    found = " UNION ALL ".join(sql for sql, _ in ranges)
    newest = f"(SELECT * FROM decisions WHERE seq IN (SELECT seq FROM ({found}) ORDER BY seq DESC LIMIT ?))"
    sql = f"{STORED_DECISION.format(found=newest)} ORDER BY d.seq DESC"
    return sql, (*(value for _, wanted in ranges for value in wanted), limit)


def decisions_page(
    connection: sqlite3.Connection,
    filters: Mapping[str, str],
    since: int | None,
    before: str | None,
    limit: int,
) -> Page:
    """A page of decisions. Raises UnknownCursor."""
    (last,) = connection.execute("SELECT COALESCE(MAX(seq), 0) FROM decisions").fetchone()
    below = min(cursor(before), last + 1)
    first = 1 if since is None else _first_since(connection, since, last)
    bounded = "action" in filters and not filters.keys() & set(_SUBJECTS)
    floor = max(first, below - LOOKED_AT) if bounded else first
    query = decisions_query(filters, below, limit + 1, floor=floor, since=since)
    found = page(connection.execute(*query).fetchall(), limit, stored_decision)
    return Page(found.rows, str(floor)) if found.next is None and floor > first else found


def stored_decision(row: Any) -> StoredDecision:
    return StoredDecision(envelope=row[0], hash=row[1], previous=row[2], bound_run_id=row[3], seq=row[4])


def _first_since(connection: sqlite3.Connection, since: int, last: int) -> int:
    """The lowest sequence number that a record of a time from `since` on may have.

    Times never fall from one record to the next, except where an operator accepted a clock. The search is
    therefore repeated between any two such records.
    """
    accepted = "SELECT seq FROM decisions WHERE event = 'clock_accepted' ORDER BY seq"
    steps = [seq for (seq,) in connection.execute(accepted)]
    for begin, end in pairwise([1, *steps, last + 1]):
        found = recorded_since(connection, since, range(begin, end))
        if found < end:
            return found
    return last + 1


def recorded_since(connection: sqlite3.Connection, since: int, seqs: range) -> int:
    """The first of these numbers whose record is from `since` or later, else the end of the range.

    A record that is missing, because the log was altered, has the time of the one before it.
    """
    newest = f"SELECT {_RECORDED} FROM decisions WHERE seq <= ? ORDER BY seq DESC LIMIT 1"
    sql = f"SELECT COALESCE(({newest}), 0)"
    return seqs.start + bisect_left(
        seqs, since, key=lambda seq: connection.execute(sql, (seq,)).fetchone()[0]
    )


def _ranges(filters: Mapping[str, str]) -> list[Query]:
    """Index ranges that together hold exactly the wanted records, each with its parameters."""
    for subject in _SUBJECTS:
        if subject in filters:
            return _of_subject(subject, filters)
    names = [name for name in ("action", "tenant_id") if name in filters]
    where = "".join(f"{name} = ? AND " for name in names)
    wanted = tuple(filters[name] for name in names)
    tenant = "tenant_id" in filters
    if not filters.keys() & KINDS.keys():
        index = " INDEXED BY decisions_by_tenant" if tenant else ""
        return [(f"SELECT seq FROM decisions{index} WHERE {where}1", wanted)]
    values = [(filters[name],) if name in filters else known for name, known in KINDS.items()]
    columns = "event = ? AND decision_type = ? AND decision_outcome = ?"
    index = "decisions_by_tenant_and_kind" if tenant else "decisions_by_kind"
    sql = f"SELECT seq FROM decisions INDEXED BY {index} WHERE {where}{columns}"
    return [(sql, (*wanted, *kind)) for kind in product(*values)]


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
    if wanted.prefix is not None:
        # The pluses keep SQLite on the index of the ids. `~` sorts after every character of an id.
        table, where = "scopes INDEXED BY sqlite_autoindex_scopes_1", ["+seq < ?"]
        where.append("scope_id >= ? AND scope_id < ?")
        parameters += [wanted.prefix, f"{wanted.prefix}~"]
        if wanted.incident_id is not None:
            where.append("+incident_id = ?")
            parameters.append(wanted.incident_id)
    elif wanted.incident_id is not None:
        table = "scopes INDEXED BY scopes_by_incident"
        where.append("incident_id = ?")
        parameters.append(wanted.incident_id)
        if wanted.tenant_id is None:
            where.append(f"tenant_id IN ({_TENANTS.format(table='scopes')})")
    elif wanted.bounded:
        where.append("seq >= ?")
        parameters.append(below - LOOKED_AT)
    if wanted.tenant_id is not None:
        # The plus keeps SQLite from choosing an index that is not in the order of the list.
        served = wanted.incident_id is not None and wanted.prefix is None
        where.append("tenant_id = ?" if served else "+tenant_id = ?")
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
    rest = below - LOOKED_AT
    return Page(scopes, str(rest) if shown.next is None and wanted.bounded and rest > 1 else shown.next)


def executions_query(wanted: ExecutionsWanted, below: str, limit: int, *, floor: str = "") -> Query:
    """SQL and parameters for the newest `limit` executions with an id from `floor` to under `below`."""
    columns = f"SELECT {rows.EXECUTION_COLUMNS}, decision_id FROM executions"
    where, parameters = _piece_of_executions(wanted, below, floor)
    for test, value in (("+action = ?", wanted.action), ("+admitted_at >= ?", wanted.since)):
        if value is not None:
            where += f" AND {test}"
            parameters = (*parameters, value)
    newest = "ORDER BY decision_id DESC LIMIT ?"
    if wanted.incident_id is None:
        return f"{columns} WHERE {where} {newest}", (*parameters, limit)
    index = "executions INDEXED BY executions_by_incident"
    subject = f"tenant_id IN ({_TENANTS.format(table='executions')}) AND incident_id = ?"
    found = f"SELECT decision_id FROM {index} WHERE {subject} AND {where} {newest}"
    return (
        f"{columns} WHERE decision_id IN ({found}) ORDER BY decision_id DESC",
        (wanted.incident_id, *parameters, limit),
    )


def executions_page(
    connection: sqlite3.Connection, wanted: ExecutionsWanted, before: str | None, limit: int
) -> Page:
    """A page of executions. Raises UnknownCursor."""
    below, floor = decision_cursor(before), ""
    if wanted.bounded:
        where, parameters = _piece_of_executions(wanted, below, floor)
        sql = f"SELECT decision_id FROM executions WHERE {where} ORDER BY decision_id DESC LIMIT 1 OFFSET ?"
        last = connection.execute(sql, (*parameters, LOOKED_AT - 1)).fetchone()
        floor = "" if last is None else last[0]
    query = executions_query(wanted, below, limit + 1, floor=floor)
    found = page(connection.execute(*query).fetchall(), limit, rows.execution_from_row)
    return found if found.next is not None else Page(found.rows, floor or None)


def _piece_of_executions(wanted: ExecutionsWanted, below: str, floor: str) -> Query:
    """The part of the list that the primary key, or the index of executions that are not answered, serves.

    Ids of executions begin with their time, so they bound the part if a time of admission is wanted.
    """
    if wanted.since is not None:
        digits = f"{max(0, wanted.since // 1_000 - ID_AGE):012x}"
        floor = max(floor, f"{digits[:8]}-{digits[8:]}")
    sql, parameters = "decision_id < ? AND decision_id >= ?", [below, floor]
    if wanted.status is not None:
        sql += " AND status = ?"
        parameters.append(wanted.status)
        if wanted.status != "answered":
            sql += " AND status <> 'answered'"  # redundant, but SQLite needs it to use the partial index
    return sql, tuple(parameters)


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
