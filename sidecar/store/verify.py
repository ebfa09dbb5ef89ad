"""Recomputes the hash chain of a log. Reads only, and in short pages: it works beside a running sidecar."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from sidecar.core.chain import GENESIS, link
from sidecar.core.record import iso_time
from sidecar.errors import LogTampered, StoreUnavailable
from sidecar.store import rows
from sidecar.store.sqlite import read_only_uri

PAGE = 2_000
FIRST_ROWID = -(2**63)


@dataclass(frozen=True, slots=True)
class Verified:
    """What was verified: how many records, and the writer and hash at the end of the chain."""

    writer: str
    records: int
    head: bytes


def verify_sqlite(path: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> Verified:
    """Check every record up to the one that is last now. `progress` gets (records done, records in all).

    Raises LogTampered at the first record that is altered, missing or out of order, StoreUnavailable where
    the database cannot be read.
    """
    if not path.exists():
        raise StoreUnavailable(f"there is no database {path}; has the sidecar run with this configuration?")
    try:
        connection = sqlite3.connect(read_only_uri(path), uri=True, isolation_level=None)
        try:
            named = connection.execute("SELECT value FROM meta WHERE key = 'writer'").fetchone()
            if named is None:
                raise LogTampered("the name of the log's writer is missing")
            (writer,) = named
            (total,) = connection.execute("SELECT COALESCE(MAX(seq), 0) FROM decisions").fetchone()
            previous, seq = GENESIS, 0
            for row in _records(connection, total):
                if row[0] != seq + 1:
                    raise LogTampered(f"record {seq + 1} is missing: the next one in the log is {row[0]}")
                previous = _check(row, writer, previous)
                seq += 1
                if seq % PAGE == 0:
                    progress(seq, total)
            progress(seq, total)
            return Verified(writer, seq, previous)
        finally:
            connection.close()
    except sqlite3.OperationalError as exc:
        if "no such table" in str(exc):
            raise LogTampered(f"the log is gone from {path}: {exc}") from exc
        raise StoreUnavailable(f"cannot read {path}: {exc}") from exc
    except sqlite3.Error as exc:
        raise StoreUnavailable(f"cannot read {path}: {exc}") from exc


def _records(connection: sqlite3.Connection, last: int) -> Iterator[Any]:
    seq = FIRST_ROWID  # what was put before record 1 is read, too, and found out
    while True:
        page = connection.execute(
            f"SELECT {rows.LOG_COLUMNS} FROM decisions WHERE seq > ? AND seq <= ? ORDER BY seq LIMIT ?",
            (seq, last, PAGE),
        ).fetchall()
        yield from page
        if len(page) < PAGE:
            return
        seq = page[-1][0]


def _check(row: Any, writer: str, previous: bytes) -> bytes:
    """The hash of a record whose bytes, place and index columns agree. Raises LogTampered."""
    seq, envelope, hash_ = row[0], row[13], row[14]
    expected = link(previous, envelope)
    if expected != hash_:
        raise LogTampered(f"record {seq} was altered: its bytes and its hash do not belong together")
    try:
        told = orjson.loads(envelope)
        place = told["writer"], told["seq"]
        index = _index(row, told)
    except (KeyError, TypeError, ValueError, OverflowError) as exc:
        raise LogTampered(f"record {seq} was altered: its bytes and columns are no record of ours") from exc
    if place != (writer, seq):
        raise LogTampered(f"record {seq} is out of place: it says writer {place[0]}, seq {place[1]}")
    for column, (shown, said) in index.items():
        if shown != said:
            raise LogTampered(f"record {seq} was altered: column {column} is not what its bytes say")
    return expected


def _index(row: Any, told: Any) -> dict[str, tuple[object, object]]:
    """Each index column: what it shows, and what the bytes say."""
    record = told["record"]
    return {
        "decision_id": (row[1], record["decision_id"]),
        "event": (row[2], told["event"]),
        "decision_type": (row[3], record["decision_type"]),
        "decision_outcome": (row[4], record["decision_outcome"]),
        "decided_at": (iso_time(row[5]), record["decided_at"]),
        "tenant_id": (row[6], record["tenant_id"]),
        "scope_id": (row[7], told["scope_id"]),
        "incident_id": (row[8], told["incident_id"]),
        "action": (row[9], told["action"]),
        "request_id": (row[10], record["request_id"]),
        "run_id": (row[11], record["run_id"]),
        "admission_id": (row[12], told["admission_id"]),
    }
