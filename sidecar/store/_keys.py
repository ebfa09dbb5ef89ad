"""Idempotency keys in SQLite: the rows of the keys that a batch names, and forgetting those that expired.

The writer reads the named keys within its transaction, which holds SQLite's write lock from its begin on, so
no key can be claimed between this read and the write. A row holds a copy of nothing that the execution says.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Any

import orjson

from sidecar.core.idempotency import Claimed, KeptAnswer, kept_until
from sidecar.core.scope import RELEASING
from sidecar.store import _rows as rows

_COLUMNS = (
    "key, request, admission_id, kept_for, expires_at, answered_at, counters, status, reason, headers, body"
)
_LOAD = f"SELECT {_COLUMNS} FROM idempotency_keys WHERE key = ?"
# A key that is free again, or has its answer now, has a row already.
SAVE = f"""
    INSERT INTO idempotency_keys ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
    ON CONFLICT (key) DO UPDATE SET
        request = excluded.request, admission_id = excluded.admission_id, kept_for = excluded.kept_for,
        expires_at = excluded.expires_at, answered_at = excluded.answered_at, counters = excluded.counters,
        status = excluded.status, reason = excluded.reason, headers = excluded.headers,
        body = excluded.body"""
_EXPIRED = """
    SELECT rowid, key, request, admission_id, kept_for, expires_at
    FROM idempotency_keys WHERE expires_at <= ? ORDER BY expires_at LIMIT ?"""
_EXECUTION = f"SELECT {rows.EXECUTION_COLUMNS} FROM executions WHERE decision_id = ?"
_FORGET = "DELETE FROM idempotency_keys WHERE rowid = ?"
_KEEP_UNTIL = "UPDATE idempotency_keys SET expires_at = ? WHERE rowid = ?"


def load(connection: sqlite3.Connection, keys: Sequence[bytes]) -> dict[bytes, Claimed]:
    """Those of the keys that are claimed."""
    found = (connection.execute(_LOAD, (key,)).fetchone() for key in keys)
    return {row[0]: _claimed_from_row(row) for row in found if row is not None}


def forget_some(connection: sqlite3.Connection, now: int, limit: int) -> None:
    """Delete at most `limit` keys that expired. Those of executions that have not ended are kept longer.

    A transaction that claims keys forgets twice as many, so the table does not grow beyond the live keys.
    """
    for rowid, key, request, admission_id, kept_for, expires_at in connection.execute(
        _EXPIRED, (now, limit)
    ).fetchall():
        claimed = Claimed(
            key=key, request=request, admission_id=admission_id, kept_for=kept_for, expires_at=expires_at
        )
        row = connection.execute(_EXECUTION, (admission_id,)).fetchone()
        execution = None if row is None else rows.execution_from_row(row)
        until = kept_until(claimed, execution, now)
        if until <= now or (execution is not None and execution.status in RELEASING):
            connection.execute(_FORGET, (rowid,))
        else:
            connection.execute(_KEEP_UNTIL, (until, rowid))


def claimed_to_row(claimed: Claimed) -> rows.Row:
    answer = claimed.answer
    kept: tuple[Any, ...] = (None, None, None, None)
    if answer is not None:
        headers = [[_text(name), _text(value)] for name, value in answer.headers]
        kept = (answer.status, _text(answer.reason), orjson.dumps(headers).decode(), answer.body)
    counters = None if claimed.counters is None else orjson.dumps(claimed.counters).decode()
    return (
        claimed.key,
        claimed.request,
        claimed.admission_id,
        claimed.kept_for,
        claimed.expires_at,
        claimed.answered_at,
        counters,
        *kept,
    )


def _claimed_from_row(row: rows.Row) -> Claimed:
    answer = None
    if row[7] is not None:
        answer = KeptAnswer(
            key=row[0],
            status=row[7],
            reason=_bytes(row[8]),
            headers=tuple((_bytes(name), _bytes(value)) for name, value in orjson.loads(row[9])),
            body=row[10],
        )
    return Claimed(
        key=row[0],
        request=row[1],
        admission_id=row[2],
        kept_for=row[3],
        expires_at=row[4],
        answer=answer,
        answered_at=row[5],
        counters=None if row[6] is None else tuple(orjson.loads(row[6])),
    )


def _text(raw: bytes) -> str:
    return raw.decode("latin-1")


def _bytes(text: str) -> bytes:
    return text.encode("latin-1")
