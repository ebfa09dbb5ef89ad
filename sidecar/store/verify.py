"""Verifies a log: recomputes its hash chain and compares it with signed checkpoints. Then checks the data
beside the chain: the schema with its triggers, the switches, and the rows that refer to records.

Records are compared as they are stored: the bytes with the hash, the columns with the bytes. Nothing is
serialized again. The loop over the records is written to be fast, so it only detects that a record is wrong.
A second function then finds out what is wrong with it.

Keys and bindings are in tables beside the log, and the log says which of them must exist. A record names the
key under which it is kept once. The first record after a binding names the bound records and their run. A
binding that no record has followed yet is proved only by a copy of it in a second row. Records of releases
that did not name keys and bindings prove nothing about them.
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
from sidecar.core.freeze import Freeze, written
from sidecar.core.instant import iso_time
from sidecar.errors import LogTampered, StoreUnavailable
from sidecar.store import _freezes as freezerows
from sidecar.store._migrate import migrations
from sidecar.store.attestation import NONE, Attestation, Attested
from sidecar.store.logfile import READ_ERRORS, START, LogFile, damage_of, opened, schema_of

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

# Finds a switch that is not as its last record left it. If a mask hides the position, only the time is
# compared.
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
# Each freeze, with what the records that set and lifted it say.
_FREEZES = f"""
    SELECT frozen.decided_at, frozen.tenant_id, frozen.envelope, unfrozen.decided_at, unfrozen.envelope,
        freezes.*
    FROM (SELECT {freezerows.COLUMNS} FROM freezes) AS freezes
    LEFT JOIN decisions AS frozen ON frozen.decision_id = freeze_id AND frozen.event = 'frozen'
    LEFT JOIN decisions AS unfrozen ON unfrozen.decision_id = lifted_in AND unfrozen.event = 'unfrozen'"""
_LOST_FREEZE = """
    SELECT decision_id FROM decisions WHERE event = 'frozen' AND decision_id NOT IN
        (SELECT freeze_id FROM freezes)
    UNION ALL
    SELECT decision_id FROM decisions WHERE event = 'unfrozen' AND decision_id NOT IN
        (SELECT lifted_in FROM freezes WHERE lifted_in IS NOT NULL) LIMIT 1"""
_STRAY_KEY = """
    SELECT hex(key), decision_id FROM kept_once
    WHERE NOT EXISTS (SELECT 1 FROM decisions WHERE decisions.decision_id = kept_once.decision_id) LIMIT 1"""
_STRAY_BINDING = """
    SELECT run_id, seq FROM run_bindings
    WHERE NOT EXISTS (SELECT 1 FROM decisions WHERE decisions.seq = run_bindings.seq) LIMIT 1"""

# How a mask begins that hides a value.
_MASK = "[masked"
_NOT_OURS = (KeyError, TypeError, ValueError, OverflowError)

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Verified:
    """The result of a verification.

    `records` counts the records, `head` is the hash at the end of the chain, and `attested` is the checkpoint
    that attests most of them.
    """

    writer: str
    records: int
    head: bytes
    attested: Attested | None


def verify_sqlite(
    path: Path, progress: Progress = lambda done, total: None, attestation: Attestation = NONE
) -> Verified:
    """Check every record up to the one that is last now, then the data beside the records. `progress` gets
    (records done, total).

    The caller reads the attestation before the verification starts, because the log then holds every attested
    record. Raises LogTampered at the first record that is altered, missing or out of order, if the log is not
    the attested one, and if a table, trigger, switch, key or binding is not as the sidecar leaves it. Raises
    StoreUnavailable if the database cannot be read.
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
    """Check the data beside the chain. Raises LogTampered if the schema is not the one that the migrations
    make, if a switch is not as the log says, if a row refers to a missing record, and with the message
    `beside`, the first fault that the records found in keys and bindings."""
    found = log.schema()
    _check_schema(found)
    if not any(row[1:3] == ("table", "switches") for row in found):
        return  # a log of an older release has none of the following tables
    if stray := log.first(_STRAY_SWITCH):
        name, seq = stray
        wrong = "was never turned by a record" if seq is None else f"does not stand as record {seq} left it"
        raise LogTampered(f"the switch {name} {wrong}")
    _check_freezes(log, found)
    if stray := log.first(_STRAY_KEY):
        raise LogTampered(
            f"the key {stray[0]} in kept_once names decision {stray[1]}, which is not in the log"
        )
    if stray := log.first(_STRAY_BINDING):
        raise LogTampered(f"the run {stray[0]} is bound to record {stray[1]}, which is not in the log")
    if beside is not None:
        raise LogTampered(beside)
    for bound, run_id in log.unlogged():
        if missing := _wrong_binding(log, bound, run_id, "what the next record is to say"):
            raise LogTampered(missing)


def _check_freezes(log: LogFile, schema: Sequence[Any]) -> None:
    """Check that the freezes are those that the log has set, and that those are lifted that it has lifted."""
    if not any(row[1:3] == ("table", "freezes") for row in schema):
        return  # a log of an older release has none
    if lost := log.first(_LOST_FREEZE):
        raise LogTampered(f"the freeze that record {lost[0]} set or lifted is not as that record left it")
    for set_at, tenant_id, frozen, lifted_at, unfrozen, *row in log.rows(_FREEZES):
        try:
            freeze = freezerows.from_row(tuple(row))
            stored = _stored(freeze)
        except (ValueError, TypeError, AttributeError, OverflowError) as exc:  # no sidecar writes these
            raise LogTampered(f"the freeze {row[0]} cannot be read, so no sidecar has written it") from exc
        said = _said(frozen, unfrozen)
        # What a mask hides is not compared.
        differing = [
            name
            for name, value in stored.items()
            if said.get(name) != value and not str(said.get(name)).startswith(_MASK)
        ]
        proven = (freeze.set_at, freeze.tenant_id, freeze.lifted_at) == (set_at, tenant_id, lifted_at)
        if differing or not proven:
            what = f" ({', '.join(differing)})" if differing else ""
            raise LogTampered(f"the freeze {freeze.freeze_id} is not as its records left it{what}")


def _stored(freeze: Freeze) -> dict[str, Any]:
    """What the row of a freeze says, by the names of its records."""
    return {
        "freeze_id": freeze.freeze_id,
        "match": written(freeze.match),
        "except": written(freeze.excepted),
        "ends_at": None if freeze.ends_at is None else iso_time(freeze.ends_at),
        "reason": freeze.reason,
        "set_by": freeze.set_by,
        "lifted": None if freeze.lifted_at is None else freeze.freeze_id,
        "lifted_by": freeze.lifted_by,
        "lifted_for": freeze.lifted_for,
    }


def _said(frozen: bytes | None, unfrozen: bytes | None) -> dict[str, Any]:
    """What the records that set and lifted a freeze say of it."""
    said: dict[str, Any] = {}
    if frozen is not None:
        record = orjson.loads(frozen)["record"]
        said = {**record["details"], "set_by": record["decision_inputs"]["principal"]}
    if unfrozen is not None:
        record = orjson.loads(unfrozen)["record"]
        details, by = record["details"], record["decision_inputs"]["principal"]
        said |= {"lifted": details["freeze_id"], "lifted_by": by, "lifted_for": details["reason"]}
    return said


def _wrong_binding(log: LogFile, bound: int, run_id: str, source: str) -> str | None:
    found = log.run_of(bound)
    if found == run_id:
        return None
    there = "is missing from run_bindings" if found is None else f"is bound to {found} in run_bindings"
    return f"record {bound} {there}, but was bound to {run_id} by {source}"


def _check_schema(rows: Sequence[Any]) -> None:
    """Compare the schema with that of its version. A missing trigger allows records to be changed, and an
    added one may change them itself."""
    version = max((row[0] for row in rows), default=0)
    made, found = _made(version), [_meaning(row) for row in rows]
    for one in (*made, *found):
        if one in made and one in found:
            continue
        known, there = (any(one[:2] == other[:2] for other in others) for others in (made, found))
        wrong = "is missing" if not there else "was altered" if known else "was added"
        raise LogTampered(f"the {one[0]} {one[1]} {wrong}: the schema is not that of version {version}")


def _made(version: int) -> list[tuple[Any, ...]]:
    """The schema that the migrations make for a version."""
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
    """A schema object in a form that does not depend on the spaces and comments of its SQL."""
    _, kind, name, table, sql = row
    return kind, name, table, [token for token in _TOKEN.findall(sql) if not token.startswith(_SAYS_NOTHING)]


# The chain -----------------------------------------------------------------------------------------


class _Chain:
    """The chain as far as it was followed: `seq` is the number of its last record, `head` the hash."""

    def __init__(self, log: LogFile, progress: Progress) -> None:
        self._log = log
        self._progress = progress
        self.writer = log.writer()
        self.total = log.last()
        self.seq = 0
        self.head = GENESIS
        # The first fault that a record found in the tables beside the log.
        self.beside: str | None = None
        self._keys: list[tuple[int, bytes, str]] = []
        self._bindings: list[tuple[int, int, str]] = []

    def follow(self, last: int) -> None:
        """Check the records up to `last`. Raises LogTampered at the first wrong one."""
        columns = f"{_COLUMNS}, {self._log.recorded_at}, decision_id, envelope, hash"
        try:
            for page in self._log.pages(columns, self.seq or START, last):
                self._check(page)
                self._check_tables_beside()
                self._progress(self.seq, self.total)
        except READ_ERRORS as exc:
            damage = damage_of(exc)
            if damage is None:
                raise
            raise LogTampered(f"record {self.seq + 1} cannot be read: {damage}") from exc
        if self.seq < last:
            self._is_missing(self._log.next_after(self.seq))

    def _check(self, page: Sequence[Any]) -> None:
        """Check the hash, the place and the columns of each record of a page. One comparison covers them."""
        seq, head, writer = self.seq, self.head, self.writer
        for row in page:
            seq += 1
            envelope, before = row[-2], head
            try:
                head = sha256(before + envelope).digest()
                members = orjson.loads(envelope)
                wrong = row != _row(row, seq, members, head)
                wrong = wrong or members["seq"] != seq or members["writer"] != writer
                if "kept_once" in members:
                    self._keys.append((seq, bytes.fromhex(members["kept_once"]), row[-3]))
                if "run_bindings" in members:
                    self._bindings += [(seq, *binding) for binding in _bindings_in(members)]
            except _NOT_OURS:
                wrong = True
            if wrong:
                self.seq, self.head = seq - 1, before
                self._look_into(row)
        self.seq, self.head = seq, head

    def _check_tables_beside(self) -> None:
        """Look up every key and binding that a page names, and remember the first missing one."""
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
        """Find out what is wrong with the next record. Always raises LogTampered."""
        seq, envelope = self.seq + 1, row[-2]
        if row[0] != seq:
            self._is_missing(row[0])
        if not isinstance(envelope, bytes) or sha256(self.head + envelope).digest() != row[-1]:
            raise LogTampered(f"record {seq} was altered: its bytes and its hash do not belong together")
        try:
            members = orjson.loads(envelope)
            required = _row(row, seq, members, row[-1])
            bytes.fromhex(members.get("kept_once", "")), _bindings_in(members)
            place = members["writer"], members["seq"]
        except _NOT_OURS as exc:
            raise LogTampered(
                f"record {seq} was altered: its bytes and columns are no record of ours"
            ) from exc
        if place != (self.writer, seq):
            raise LogTampered(f"record {seq} is out of place: it says writer {place[0]}, seq {place[1]}")
        column = next(name for name, one, other in zip(_NAMES, row, required, strict=True) if one != other)
        raise LogTampered(f"record {seq} was altered: column {column} is not what its bytes say")

    def _is_missing(self, following: int | None) -> None:
        rest = "none follows" if following is None else f"the next one in the log is {following}"
        raise LogTampered(f"record {self.seq + 1} is missing: {rest}")


def _row(row: Any, seq: int, members: Any, head: bytes) -> tuple[Any, ...]:
    """The row that an envelope requires, in the order of `_NAMES`."""
    record = members["record"]
    return (
        seq,
        members["event"],
        record["decision_type"],
        record["decision_outcome"],
        _time(row[4], record["decided_at"]),
        record["tenant_id"],
        members["scope_id"],
        members["incident_id"],
        members["action"],
        record["request_id"],
        record["run_id"],
        members["admission_id"],
        _time(row[12], members.get("recorded_at")),
        record["decision_id"],
        row[14],
        head,
    )


def _bindings_in(members: Any) -> list[tuple[int, str]]:
    """The bindings that an envelope names. Raises ValueError or TypeError if they are malformed."""
    named = members.get("run_bindings", [])
    if not all(0 < seq < members["seq"] and isinstance(run_id, str) for seq, run_id in named):
        raise ValueError("a binding of what is no record before this one")
    return [(seq, run_id) for seq, run_id in named]


def _time(instant: int | None, text: str | None) -> int | str | None:
    """The column itself if it equals the time in the envelope; otherwise the text of the envelope."""
    return instant if _iso(instant) == text else text


# The records of one batch share their time, so a small cache suffices.
@lru_cache(maxsize=16)
def _iso(instant: int | None) -> str | None:
    return None if instant is None else iso_time(instant)
