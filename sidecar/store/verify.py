"""Recomputes the hash chain of a log, and holds it against signed checkpoints; then looks at what is kept
beside the chain: the schema with its triggers, the switches, and what refers to records.

A record is compared as it stands: its bytes with its hash, its columns with its bytes. Nothing is ever
serialized again. The loop over the records is written to be fast; what is wrong with one is looked into
only once something is.

Keys and bindings stand beside the log, and the log says which there must be: a record names the key under
which it is kept once, and the first record after a binding names the records that were bound, and their run.
A binding that no record has followed yet stands in a second row, which is no more than a copy. Records of
releases that did not say so yet prove nothing of their keys and bindings.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import orjson

from sidecar.core.chain import GENESIS
from sidecar.core.record import iso_time
from sidecar.errors import LogTampered, StoreUnavailable
from sidecar.store.attestation import NONE, Attestation, Attested
from sidecar.store.logfile import READ_ERRORS, START, LogFile, damage_of, opened, schema_of
from sidecar.store.migrate import migrations

_COLUMNS = (
    "event, decision_type, decision_outcome, decided_at, tenant_id, scope_id, incident_id, action, "
    "request_id, run_id, admission_id"
)
_NAMES = ("seq", *_COLUMNS.split(", "), "recorded_at", "decision_id", "envelope", "hash")

# A word, a text or name in quotes, a comment, white space, or any other character, as SQLite reads them.
_TOKEN = re.compile(
    r"""\w+|'(?:[^']|'')*'|"(?:[^"]|"")*"|--[^\n]*|/\*.*?\*/|[ \t\n\f\r]+|.""", re.ASCII | re.DOTALL
)
_SAYS_NOTHING = ("--", "/*", " ", "\t", "\n", "\f", "\r")

# A switch that does not stand as its last record left it. Where a mask hides how that was, its time counts.
_STRAY_SWITCH = """
    WITH turned AS (
        SELECT json_extract(CAST(envelope AS TEXT), '$.record.decision_inputs.policy_id') AS name,
            CASE json_type(CAST(envelope AS TEXT), '$.record.details.on')
                WHEN 'true' THEN 1 WHEN 'false' THEN 0 END AS is_on,
            decided_at, MAX(seq) AS seq
        FROM decisions WHERE event = 'switched' GROUP BY 1
    )
    SELECT name, seq FROM (SELECT name FROM switches UNION SELECT name FROM turned)
    LEFT JOIN switches USING (name) LEFT JOIN turned USING (name)
    WHERE switches.is_on IS NOT COALESCE(turned.is_on, switches.is_on)
        OR switches.changed_at IS NOT turned.decided_at
    ORDER BY name"""
_STRAY_KEY = """
    SELECT hex(key), decision_id FROM kept_once
    WHERE NOT EXISTS (SELECT 1 FROM decisions WHERE decisions.decision_id = kept_once.decision_id) LIMIT 1"""
_STRAY_BINDING = """
    SELECT run_id, seq FROM run_bindings
    WHERE NOT EXISTS (SELECT 1 FROM decisions WHERE decisions.seq = run_bindings.seq) LIMIT 1"""

_NOT_OURS = (KeyError, TypeError, ValueError, OverflowError)

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Verified:
    """What was verified: how many records, the writer and the hash at the end of the chain, and the
    checkpoint that attests most of them."""

    writer: str
    records: int
    head: bytes
    attested: Attested | None


def verify_sqlite(
    path: Path, progress: Progress = lambda done, total: None, attestation: Attestation = NONE
) -> Verified:
    """Check every record up to the one that is last now, and then what is kept beside them. `progress` gets
    (records done, records in all).

    The attestation has to be read before this begins: what it says is then in the log already. Raises
    LogTampered at the first record that is altered, missing or out of order, where the log is not what was
    attested, and where a table, trigger, switch, key or binding is not as the sidecar leaves it;
    StoreUnavailable where the database cannot be read.
    """
    if attestation.attested and not path.exists():
        raise LogTampered(f"the database {path} is gone, of which {attestation.attested[-1]} attests records")
    with opened(path) as log:
        chain = _Chain(log, progress)
        first = log.next_after(None)
        if first is not None and first < 1:
            raise LogTampered(f"record {first} was put before record 1")
        agreed: Attested | None = None
        for attested in sorted(attestation.attested, key=lambda one: one.checkpoint.count):
            checkpoint = attested.checkpoint
            if checkpoint.writer != chain.writer:
                raise LogTampered(
                    f"{attested} is of writer {checkpoint.writer}, this log of writer {chain.writer}: "
                    "another log was put in its place"
                )
            if checkpoint.count > chain.total:
                continue
            chain.follow(checkpoint.count)
            if chain.head.hex() != checkpoint.head:
                raise LogTampered(_rewritten(agreed, attested))
            agreed = attested
        chain.follow(chain.total)
        beyond = max(attestation.attested, key=lambda one: one.checkpoint.count, default=None)
        if beyond is not None and beyond.checkpoint.count > chain.total:
            missing = f"{chain.total + 1} to {beyond.checkpoint.count}"
            raise LogTampered(
                f"records {missing} are missing from the end: {beyond} attests {beyond.checkpoint.count}"
            )
        _check_beside(log, chain.beside)
        return Verified(chain.writer, chain.seq, chain.head, agreed)


def _rewritten(agreed: Attested | None, attested: Attested) -> str:
    known = f"records 1 to {agreed.checkpoint.count} are as {agreed} says" if agreed else "none are attested"
    return (
        f"the log was rewritten somewhere up to record {attested.checkpoint.count}: its chain is not the one "
        f"that {attested} attests; {known}"
    )


# Beside the chain ----------------------------------------------------------------------------------


def _check_beside(log: LogFile, beside: str | None) -> None:
    """Raises LogTampered where the schema is not what the migrations make, where a switch does not stand as
    the log says, where something refers to a record that is not there, and with `beside`, which is what the
    records have found wrong of keys and bindings."""
    found = log.schema()
    _check_schema(found)
    if not any(row[1:3] == ("table", "switches") for row in found):
        return  # a log that was not written to since an update has nothing of the rest yet
    if stray := log.first(_STRAY_SWITCH):
        name, seq = stray
        wrong = "was never turned by a record" if seq is None else f"does not stand as record {seq} left it"
        raise LogTampered(f"the switch {name} {wrong}")
    if stray := log.first(_STRAY_KEY):
        raise LogTampered(
            f"the key {stray[0]} in kept_once names decision {stray[1]}, which is not in the log"
        )
    if stray := log.first(_STRAY_BINDING):
        raise LogTampered(f"the run {stray[0]} is bound to record {stray[1]}, which is not in the log")
    if beside is not None:
        raise LogTampered(beside)
    for bound, run_id in log.unsaid():
        if missing := _wrong_binding(log, bound, run_id, "what the next record is to say"):
            raise LogTampered(missing)


def _wrong_binding(log: LogFile, bound: int, run_id: str, source: str) -> str | None:
    found = log.run_of(bound)
    if found == run_id:
        return None
    there = "is missing from run_bindings" if found is None else f"is bound to {found} in run_bindings"
    return f"record {bound} {there}, but was bound to {run_id} by {source}"


def _check_schema(rows: Sequence[Any]) -> None:
    """A trigger that is missing lets records be changed, and one that was added may change them itself."""
    version = max((row[0] for row in rows), default=0)
    made, found = _made(version), [_meaning(row) for row in rows]
    for one in (*made, *found):
        if one in made and one in found:
            continue
        known, there = (any(one[:2] == other[:2] for other in others) for others in (made, found))
        wrong = "is missing" if not there else "was altered" if known else "was added"
        raise LogTampered(f"the {one[0]} {one[1]} {wrong}: the schema is not that of version {version}")


def _made(version: int) -> list[tuple[Any, ...]]:
    """The schema of a version, as the migrations make it."""
    steps = migrations("sqlite")
    if version > steps[-1][0]:
        raise StoreUnavailable(
            f"the database has schema version {version}, this sidecar knows {steps[-1][0]}: "
            "verify with a newer sidecar"
        )
    with closing(sqlite3.connect(":memory:")) as connection:
        for number, _, sql in steps:
            if number <= version:
                connection.executescript(sql)
        return [_meaning(row) for row in schema_of(connection)]


def _meaning(row: Any) -> tuple[Any, ...]:
    """What an object of a schema is, however its sql is spaced and commented."""
    _, kind, name, table, sql = row
    return kind, name, table, [token for token in _TOKEN.findall(sql) if not token.startswith(_SAYS_NOTHING)]


# The chain -----------------------------------------------------------------------------------------


class _Chain:
    """The chain as far as it was followed: `seq` records, the last of which has the hash `head`."""

    def __init__(self, log: LogFile, progress: Progress) -> None:
        self._log = log
        self._progress = progress
        self.writer = log.writer()
        self.total = log.last()
        self.seq = 0
        self.head = GENESIS
        # What the first record says of the tables beside the log that is not so.
        self.beside: str | None = None
        self._keys: list[tuple[int, bytes, str]] = []
        self._bindings: list[tuple[int, int, str]] = []

    def follow(self, last: int) -> None:
        """Go on up to a record. Raises LogTampered at the first one that is wrong."""
        columns = f"{_COLUMNS}, {self._log.recorded_at}, decision_id, envelope, hash"
        try:
            for page in self._log.pages(columns, self.seq or START, last):
                self._check(page)
                self._check_what_was_said()
                self._progress(self.seq, self.total)
        except READ_ERRORS as exc:
            damage = damage_of(exc)
            if damage is None:
                raise
            raise LogTampered(f"record {self.seq + 1} cannot be read: {damage}") from exc
        if self.seq < last:
            self._is_missing(self._log.next_after(self.seq))

    def _check(self, page: Sequence[Any]) -> None:
        """Every record of a page: its hash, its place, and its columns, all of them in one comparison."""
        seq, head, writer = self.seq, self.head, self.writer
        for row in page:
            seq += 1
            envelope, before = row[-2], head
            try:
                head = sha256(before + envelope).digest()
                told = orjson.loads(envelope)
                wrong = row != _row(row, seq, told, head)
                wrong = wrong or told["seq"] != seq or told["writer"] != writer
                if "kept_once" in told:
                    self._keys.append((seq, bytes.fromhex(told["kept_once"]), row[-3]))
                if "run_bindings" in told:
                    self._bindings += [(seq, *binding) for binding in _bindings_in(told)]
            except _NOT_OURS:
                wrong = True
            if wrong:
                self.seq, self.head = seq - 1, before
                self._look_into(row)
        self.seq, self.head = seq, head

    def _check_what_was_said(self) -> None:
        """Look for every key and binding that a page names; the first that is not there is remembered."""
        for seq, key, decision_id in self._keys if self.beside is None else ():
            found = self._log.kept_under(key)
            if found != decision_id:
                wrong = "is missing from" if found is None else "names another decision in"
                self.beside = f"the key {key.hex().upper()} of record {seq} {wrong} kept_once"
                break
        for seq, bound, run_id in self._bindings if self.beside is None else ():
            self.beside = self.beside or _wrong_binding(self._log, bound, run_id, f"record {seq}")
        self._keys.clear()
        self._bindings.clear()

    def _look_into(self, row: Any) -> None:
        """Say what is wrong with the next record. Raises LogTampered, always."""
        seq, envelope = self.seq + 1, row[-2]
        if row[0] != seq:
            self._is_missing(row[0])
        if not isinstance(envelope, bytes) or sha256(self.head + envelope).digest() != row[-1]:
            raise LogTampered(f"record {seq} was altered: its bytes and its hash do not belong together")
        try:
            told = orjson.loads(envelope)
            said = _row(row, seq, told, row[-1])
            bytes.fromhex(told.get("kept_once", "")), _bindings_in(told)
            place = told["writer"], told["seq"]
        except _NOT_OURS as exc:
            raise LogTampered(
                f"record {seq} was altered: its bytes and columns are no record of ours"
            ) from exc
        if place != (self.writer, seq):
            raise LogTampered(f"record {seq} is out of place: it says writer {place[0]}, seq {place[1]}")
        column = next(name for name, one, other in zip(_NAMES, row, said, strict=True) if one != other)
        raise LogTampered(f"record {seq} was altered: column {column} is not what its bytes say")

    def _is_missing(self, following: int | None) -> None:
        rest = "none follows" if following is None else f"the next one in the log is {following}"
        raise LogTampered(f"record {self.seq + 1} is missing: {rest}")


def _row(row: Any, seq: int, told: Any, head: bytes) -> tuple[Any, ...]:
    """What the row of an envelope has to be, in the order of `_NAMES`."""
    record = told["record"]
    return (
        seq,
        told["event"],
        record["decision_type"],
        record["decision_outcome"],
        _time(row[4], record["decided_at"]),
        record["tenant_id"],
        told["scope_id"],
        told["incident_id"],
        told["action"],
        record["request_id"],
        record["run_id"],
        told["admission_id"],
        _time(row[12], told.get("recorded_at")),
        record["decision_id"],
        row[14],
        head,
    )


def _bindings_in(told: Any) -> list[tuple[int, str]]:
    """The bindings that an envelope names. Raises ValueError and TypeError where they are none of ours."""
    named = told.get("run_bindings", [])
    if not all(0 < seq < told["seq"] and isinstance(run_id, str) for seq, run_id in named):
        raise ValueError("a binding of what is no record before this one")
    return [(seq, run_id) for seq, run_id in named]


def _time(instant: int | None, text: str | None) -> int | str | None:
    """The column itself where it is the time that the bytes say, else what they say."""
    return instant if _iso(instant) == text else text


# The records of one batch share their time.
@lru_cache(maxsize=16)
def _iso(instant: int | None) -> str | None:
    return None if instant is None else iso_time(instant)
