"""What a transaction has to see of the database before anything is decided."""

from __future__ import annotations

import sqlite3
from dataclasses import asdict
from typing import Any

import orjson

from sidecar.core.apply import State
from sidecar.core.brakes import Tally
from sidecar.core.scope import Execution, Scope
from sidecar.store import rows
from sidecar.store.base import Names
from sidecar.store.recent import Recent

_NAMED = "IN (SELECT value FROM json_each(?))"
IS_KEPT = "SELECT 1 FROM kept_once WHERE key = ?"
IS_ON = "SELECT 1 FROM switches WHERE name = ? AND is_on"
# Within one request there are few records, so what is no column may be read from the bytes.
_UNBOUND = """
    SELECT seq FROM decisions LEFT JOIN run_bindings b USING (seq)
    WHERE request_id = ? AND decisions.run_id IS NULL AND b.run_id IS NULL
        AND json_extract(CAST(envelope AS TEXT), '$.record.causal_role') = 'pre_run'
    ORDER BY seq"""


def load(connection: sqlite3.Connection, names: Names, recent: Recent | None = None) -> State:
    """The rows that are named, as they stand. What the writer knows of `recent` ones is not read again."""
    executions: dict[str, Execution] = {}
    wanted = list(names.scopes)
    if names.executions:
        for row in connection.execute(
            f"SELECT {rows.EXECUTION_COLUMNS} FROM executions WHERE decision_id {_NAMED}",
            (orjson.dumps(names.executions).decode(),),
        ):
            execution = rows.execution_from_row(row)
            executions[execution.decision_id] = execution
            if execution.scope_id is not None:
                wanted.append(execution.scope_id)
    scopes: dict[str, Scope] = {}
    if wanted:
        for row in connection.execute(
            f"SELECT {rows.SCOPE_COLUMNS} FROM scopes WHERE scope_id {_NAMED}",
            (orjson.dumps(wanted).decode(),),
        ):
            scope = rows.scope_from_row(row)
            scopes[scope.scope_id] = scope
    once = (key for key in names.once if connection.execute(IS_KEPT, (key,)).fetchone())
    on = (switch for switch in names.switches if connection.execute(IS_ON, (switch,)).fetchone())
    unbound = {
        request_id: [seq for (seq,) in connection.execute(_UNBOUND, (request_id,))]
        for request_id in names.requests
    }
    recent = recent or Recent(counted)
    admissions, lately = recent.of(connection, names.tallies)
    return State(
        scopes=scopes,
        executions=lately | executions,
        admissions=admissions,
        found=recent.found,
        kept=frozenset(once),
        on=frozenset(on),
        unbound=unbound,
    )


def counted_query(tally: Tally, since: int) -> tuple[str, tuple[Any, ...]]:
    """The admissions of a tally that a brake may count, oldest first.

    Those still in flight are found whatever their age, by the partial index on what is not answered; the plus
    signs keep SQLite from another index, under which it would read all of an incident's past.
    """
    agreeing = {name: value for name, value in asdict(tally).items() if value is not None}
    # Of an incident's executions few are another action's; of an action's, most are another incident's.
    by_incident = tally.incident_id is not None
    alike = "".join(f" AND {'+' if by_incident and name == 'action' else ''}{name} = ?" for name in agreeing)
    flying = "".join(f" AND +{name} = ?" for name in agreeing)
    where = f"SELECT {rows.EXECUTION_COLUMNS} FROM executions WHERE"
    return (
        f"{where} admitted_at > ? AND status <> 'not_sent'{alike} UNION ALL "
        f"{where} status = 'in_flight' AND status <> 'answered' AND +admitted_at <= ?{flying} "
        "ORDER BY admitted_at",
        (since, *agreeing.values(), since, *agreeing.values()),
    )


def counted(connection: sqlite3.Connection, tally: Tally, since: int) -> list[Execution]:
    """What the query finds."""
    return [rows.execution_from_row(row) for row in connection.execute(*counted_query(tally, since))]
