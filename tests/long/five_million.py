"""A log of five million records: how fast it is verified, and whether what is done to it is found and named.

    python -m tests.long.five_million [--records 5000000] [--keep DIR]

Builds the log with the real core and engine, then verifies it on one core, says where the time goes, and
flips a byte, drops a record, swaps two, rewrites the end and cuts it off, each put back before the next; then
times pages of the decision list under every filter.
Needs 1.6 GB of disk for each million records. Exit code 1 if anything was not found or not rightly named.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Any

import click
import orjson

from sidecar.core.instant import iso_time
from sidecar.errors import LogTampered
from sidecar.files.signing import SigningKey
from sidecar.store.attestation import Attestation, read_checkpoints
from sidecar.store.logfile import PAGE, START, LogFile
from sidecar.store.verify import _COLUMNS, Verified, _Chain, verify_sqlite
from tests.long import pages
from tests.long.biglog import BEGUN, Progress, build

SAMPLE = 300_000  # records to see where the time goes
CUT = 1_000  # records at the end that are rewritten, and cut off


# Verifying ---------------------------------------------------------------------------------------------


def sign(path: Path, checkpoints: Path, key: SigningKey) -> None:
    """Attest every hundredth part of a log, and all of it."""
    with closing(sqlite3.connect(path)) as connection:
        (writer,) = connection.execute("SELECT value FROM meta WHERE key = 'writer'").fetchone()
        (total,) = connection.execute("SELECT MAX(seq) FROM decisions").fetchone()
        with checkpoints.open("wb") as stream:
            for count in sorted({total * part // 100 for part in range(1, 101)} - {0}):
                (head,) = connection.execute("SELECT hash FROM decisions WHERE seq = ?", (count,)).fetchone()
                time_ = iso_time(BEGUN + count * 1_000_000)
                stream.write(key.checkpoint(writer=writer, count=count, head=head, time=time_).line())


def where_the_time_goes(path: Path) -> None:
    """The parts of verifying one record, each alone, over the first records."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        log = LogFile(connection)
        last = min(SAMPLE, log.last())

        def read(columns: str) -> list[Any]:
            return [row for page in log.pages(columns, START, last) for row in page]

        def read_all() -> None:
            for _ in log.pages(f"{_COLUMNS}, recorded_at, decision_id, envelope, hash", START, last):
                pass

        envelopes = [row[1] for row in read("envelope")]

        def hash_all() -> None:
            head = bytes(32)
            for envelope in envelopes:
                head = hashlib.sha256(head + envelope).digest()

        def parse_all() -> None:
            for envelope in envelopes:
                orjson.loads(envelope)

        size = sum(map(len, envelopes)) / last
        whole = _seconds(lambda: _first(path, last))
        parts = {
            "reading 16 columns from SQLite": _seconds(read_all),
            "SHA-256 of the bytes": _seconds(hash_all),
            "parsing the JSON": _seconds(parse_all),
        }
        parts["comparing, and all the rest"] = whole - sum(parts.values())
        print(f"\nWhere the time goes ({last} records of {size:.0f} bytes each, {PAGE} a page):")
        for name, seconds in parts.items():
            print(f"  {name:32} {seconds / last * 1e6:5.2f} us a record  {seconds / whole:6.1%}")
        print(
            f"  {'together':32} {whole / last * 1e6:5.2f} us a record  {last / whole:,.0f} records a second"
        )


def _first(path: Path, last: int) -> None:
    """Verify the beginning of a log only."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        _Chain(LogFile(connection), lambda done, total: None).follow(last)


def _seconds(work: Callable[[], object]) -> float:
    """Processor time, the better of two."""
    taken = []
    for _ in range(2):
        begun = time.process_time()
        work()
        taken.append(time.process_time() - begun)
    return min(taken)


# Tampering ---------------------------------------------------------------------------------------------


@contextmanager
def unguarded(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection to a log whose triggers are gone for the time being."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA synchronous = OFF")
        triggers = connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
        for name, _ in triggers:
            connection.execute(f"DROP TRIGGER {name}")
        try:
            yield connection
        finally:
            for _, sql in triggers:
                connection.execute(sql)


def row(connection: sqlite3.Connection, seq: int) -> tuple[Any, ...]:
    found: tuple[Any, ...] = connection.execute("SELECT * FROM decisions WHERE seq = ?", (seq,)).fetchone()
    return found


def put(connection: sqlite3.Connection, rows: Sequence[tuple[Any, ...]]) -> None:
    marks = ", ".join("?" * len(rows[0]))
    connection.execute("BEGIN")
    connection.executemany(f"INSERT INTO decisions VALUES ({marks})", rows)
    connection.execute("COMMIT")


@contextmanager
def flipped(connection: sqlite3.Connection, seq: int) -> Iterator[None]:
    (raw,) = connection.execute("SELECT envelope FROM decisions WHERE seq = ?", (seq,)).fetchone()
    altered = bytearray(raw)
    altered[len(raw) // 2] ^= 1
    connection.execute("UPDATE decisions SET envelope = ? WHERE seq = ?", (bytes(altered), seq))
    yield
    connection.execute("UPDATE decisions SET envelope = ? WHERE seq = ?", (raw, seq))


@contextmanager
def dropped(connection: sqlite3.Connection, seq: int) -> Iterator[None]:
    gone = row(connection, seq)
    connection.execute("DELETE FROM decisions WHERE seq = ?", (seq,))
    yield
    put(connection, [gone])


@contextmanager
def swapped(connection: sqlite3.Connection, one: int, other: int) -> Iterator[None]:
    def swap() -> None:
        for old, new in ((one, -1), (other, one), (-1, other)):
            connection.execute("UPDATE decisions SET seq = ? WHERE seq = ?", (new, old))

    swap()
    yield
    swap()


@contextmanager
def rewritten(connection: sqlite3.Connection, seq: int) -> Iterator[None]:
    """One record altered, and the chain behind it made anew: by itself it is perfect."""
    rows = connection.execute(
        "SELECT seq, envelope, hash FROM decisions WHERE seq >= ? ORDER BY seq", (seq,)
    ).fetchall()
    (previous,) = connection.execute("SELECT hash FROM decisions WHERE seq = ?", (seq - 1,)).fetchone()
    altered = []
    for number, envelope, _ in rows:
        if number == seq:
            told = orjson.loads(envelope)
            told["record"]["decision_reason"] = "another one"
            envelope = orjson.dumps(told, option=orjson.OPT_SORT_KEYS)
        previous = hashlib.sha256(previous + envelope).digest()
        altered.append((envelope, previous, number))
    statement = "UPDATE decisions SET envelope = ?, hash = ? WHERE seq = ?"
    connection.execute("BEGIN")
    connection.executemany(statement, altered)
    connection.execute("COMMIT")
    yield
    connection.execute("BEGIN")
    connection.executemany(statement, [(envelope, hash_, number) for number, envelope, hash_ in rows])
    connection.execute("COMMIT")


@contextmanager
def cut(connection: sqlite3.Connection, last: int) -> Iterator[None]:
    gone = connection.execute("SELECT * FROM decisions WHERE seq > ? ORDER BY seq", (last,)).fetchall()
    connection.execute("DELETE FROM decisions WHERE seq > ?", (last,))
    yield
    put(connection, gone)


# Running it --------------------------------------------------------------------------------------------


@contextmanager
def bar(label: str, disk: Path | None = None) -> Iterator[Progress]:
    """A progress bar on standard error that shows how much of the disk is used, too."""
    shown = 0

    def used(_: object) -> str | None:
        return f"{gigabytes(disk):.2f} GB" if disk is not None else None

    with click.progressbar(length=1, label=f"{label:24}", file=sys.stderr, item_show_func=used) as drawn:

        def progress(done: int, total: int) -> None:
            nonlocal shown
            if done - shown >= total / 200 or done == total:
                drawn.length = max(1, total)
                drawn.update(done - shown, ...)
                shown = done

        yield progress


def gigabytes(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.iterdir()) / 1e9


def verified(path: Path, attestation: Attestation, label: str) -> tuple[Verified, float]:
    """What verify says, and the processor time that it took."""
    with bar(label) as progress:
        begun = time.process_time()
        found = verify_sqlite(path, progress, attestation)
        return found, time.process_time() - begun


def verdict(path: Path, attestation: Attestation, label: str) -> str:
    try:
        verified(path, attestation, label)
    except LogTampered as exc:
        return str(exc)
    return "nothing was found"


def tampered(path: Path, attestation: Attestation, records: int) -> list[str]:
    """Do everything to a log that must be found; what was not, or not rightly named."""
    wrong = []
    at, end = records * 7 // 10, records - CUT
    attested = next(one.checkpoint.count for one in attestation.attested if one.checkpoint.count >= end)
    cases: tuple[tuple[str, Callable[[sqlite3.Connection], AbstractContextManager[None]], str], ...] = (
        ("a flipped byte", lambda log: flipped(log, at), f"record {at} was altered: its bytes"),
        ("a dropped record", lambda log: dropped(log, at), f"record {at} is missing: the next one"),
        ("two swapped records", lambda log: swapped(log, at, at + 3), f"record {at} was altered: its bytes"),
        (
            "a rewritten end",
            lambda log: rewritten(log, end),
            f"the log was rewritten somewhere up to record {attested}:",
        ),
        ("a cut tail", lambda log: cut(log, end), f"records {end + 1} to {records} are missing from the end"),
    )
    with unguarded(path) as connection:
        for name, tamper, expected in cases:
            with tamper(connection):
                told = verdict(path, attestation, name)
            print(f"  {name:22} {told}", flush=True)
            if not told.startswith(expected):
                wrong.append(f"{name}: expected {expected!r}")
    return wrong


def run(folder: Path, records: int) -> list[str]:
    path, key = folder / "log.db", SigningKey.generate()
    begun = time.perf_counter()
    with bar("Building", folder) as progress:
        build(path, records, progress)
    taken = time.perf_counter() - begun
    print(
        f"Built {records} records in {taken:.0f} s: {records / taken:,.0f} a second, "
        f"{gigabytes(folder):.2f} GB"
    )
    sign(path, folder / "checkpoints.jsonl", key)
    attestation = read_checkpoints(folder / "checkpoints.jsonl", [key.public])
    before, taken = verified(path, attestation, "Verifying")
    total = before.records
    print(f"Verified {total} records on one core in {taken:.1f} s: {total / taken:,.0f} records a second")
    where_the_time_goes(path)
    print("\nWhat is done to it, and what verify says:")
    wrong = tampered(path, attestation, total)
    after, _ = verified(path, attestation, "all put back")
    if after != before:
        wrong.append("put back, the log is not what it was")
    return wrong + pages.report(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--records", type=int, default=5_000_000)
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="build there, and leave it (default: temporary)"
    )
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # one core is what is measured
    folder = options.keep or Path(tempfile.mkdtemp(prefix="five-million-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        wrong = run(folder, options.records)
    finally:
        if options.keep is None:
            shutil.rmtree(folder)
    print("\n".join(wrong) if wrong else "\nWELL: everything was found and rightly named")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
