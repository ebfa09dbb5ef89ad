"""Backs up a database while a sidecar writes to it, and verifies the copy before it gets its final name.

The copy is a snapshot: one read transaction is open from its first page to its last. Without it, every commit
of another process would restart the copy. The open transaction also keeps the WAL of the source from being
reset, so the backup watches how far the WAL grows and gives up at a limit. Until the copy is complete and
verified it is in a folder of its own. That folder is removed in any case; if the process is killed, the
next backup removes it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from sidecar.errors import LogTampered, StoreUnavailable
from sidecar.store.attestation import NONE, Attestation
from sidecar.store.connection import describe, read_only_uri
from sidecar.store.logfile import READ_ERRORS, damage_of, opened
from sidecar.store.verify import Progress, Verified, verify_sqlite

# Pages copied in one step, 4 MiB. The copy can be interrupted between two steps.
PAGES = 1_024
# Units of progress for each of the three phases: copying, verifying the log, checking every page.
THIRD = 1_000
# The limit, in bytes, on the growth of the source's WAL. The limit is lower if the disk has less free space.
WAL_GROWTH = 1 << 30
# How often another thread checks the WAL, and how long a copy over that limit may make no progress.
LOOK_SECONDS = 1.0
STANDSTILL_SECONDS = 10.0

_FOLDER = ".scopegate-backup-"
# A running backup holds a lock on this file in its folder.
_HELD = "held"


@dataclass(frozen=True, slots=True, kw_only=True)
class Backup:
    """A finished backup: the result of its verification, and its size in bytes."""

    verified: Verified
    size: int


def back_up(
    source: Path,
    target: Path,
    *,
    replace: bool = False,
    attestation: Attestation = NONE,
    progress: Progress = lambda done, total: None,
    hung: Callable[[StoreUnavailable], None] = lambda exc: None,
) -> Backup:
    """Copy a database, verify the copy, and move it to `target`. `progress` gets (done, total).

    The caller reads the attestation before the copy starts. Raises LogTampered if the database is not as a
    sidecar leaves it, and StoreUnavailable if it cannot be read or the copy cannot be made. No copy is left
    in either case. If the copy should give up but a disk does not answer, another thread calls `hung`; then
    only the end of the process releases the WAL.
    """
    _check_place(target, replace=replace)
    with opened(source):
        pass  # opening it proves that the database exists and can be read
    try:
        with _folder_in(target.parent) as folder:
            copy = folder / "copy.db"
            _copy(source, copy, lambda done, total: progress(THIRD * done // max(1, total), 3 * THIRD), hung)
            try:
                verified = verify_sqlite(
                    copy, lambda done, total: progress(THIRD + THIRD * done // total, 3 * THIRD), attestation
                )
                _check_every_page(copy)
            except LogTampered as exc:
                raise LogTampered(str(exc).replace(str(copy), f"the copy of {source}")) from exc
            progress(3 * THIRD, 3 * THIRD)
            _sync(copy)
            size = copy.stat().st_size
            _check_place(target, replace=replace)
            os.replace(copy, target)
            _sync(target.parent)
    except OSError as exc:
        raise StoreUnavailable(f"cannot write {target}: {exc.strerror or exc}") from exc
    return Backup(verified=verified, size=size)


def _check_place(target: Path, *, replace: bool) -> None:
    if os.path.lexists(target) and not replace:
        raise StoreUnavailable(f"{target} is there already; --force replaces it")
    if target.exists() and not target.is_file():
        raise StoreUnavailable(f"{target} is no file that could be replaced")
    for suffix in ("-wal", "-journal"):
        # SQLite would read this file as part of the new database.
        if os.path.lexists(f"{target}{suffix}"):
            raise StoreUnavailable(
                f"{target}{suffix} is there, so a database {target.name} is in use or was not closed; "
                "take another name"
            )


@contextmanager
def _folder_in(place: Path) -> Iterator[Path]:
    """A folder for the copy. The lock in it is released when this process ends, even if it is killed."""
    for held in place.glob(f"{_FOLDER}*/{_HELD}"):
        with suppress(OSError):  # another backup holds it, another user owns it, or it is gone by now
            os.close(_locked(held))
            shutil.rmtree(held.parent)
    with TemporaryDirectory(dir=place, prefix=_FOLDER) as name:
        folder = Path(name)
        lock = _locked(folder / "new")
        try:
            # The file gets its name after it is locked, so that another backup never finds it unlocked.
            os.rename(folder / "new", folder / _HELD)
            yield folder
        finally:
            os.close(lock)


def _locked(path: Path) -> int:
    """Open and lock a file, and return its descriptor. Raises BlockingIOError if it is locked already."""
    number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(number)
        raise
    return number


def _copy(source: Path, copy: Path, progress: Progress, hung: Callable[[StoreUnavailable], None]) -> None:
    """Copy a snapshot of a database into a single file, without a WAL beside it."""
    os.close(os.open(copy, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    with (
        _translated(source, copy.parent.parent),
        closing(sqlite3.connect(copy, isolation_level=None)) as made,
    ):
        # No journal is needed: an incomplete copy is deleted, and a complete one is synced once at the end.
        made.execute("PRAGMA journal_mode = OFF")
        made.execute("PRAGMA synchronous = OFF")
        # The source is closed first, so that its WAL can be reset even if closing the copy takes long.
        with (
            closing(sqlite3.connect(read_only_uri(source), uri=True, isolation_level=None)) as live,
            _watched(source, hung) as check_wal,
        ):
            live.execute("BEGIN")
            live.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
            _check_room(live, copy.parent.parent)

            def step(status: int, remaining: int, total: int) -> None:
                del status
                check_wal()
                progress(total - remaining, total)

            live.backup(made, pages=PAGES, progress=step)
        made.execute("PRAGMA journal_mode = DELETE")


@contextmanager
def _watched(source: Path, hung: Callable[[StoreUnavailable], None]) -> Iterator[Callable[[], None]]:
    """Yields a function to call at every step. It raises StoreUnavailable once the WAL has grown too far.

    A full disk would close the gate, which is worse than no backup. So the WAL may take at most half of the
    free space.
    """
    wal = Path(f"{source.resolve()}-wal")
    before = _size(wal)
    stepped = time.monotonic()
    ended = threading.Event()

    def overgrown() -> StoreUnavailable | None:
        grown, free = _size(wal) - before, shutil.disk_usage(wal.parent).free
        if grown <= min(WAL_GROWTH, free):
            return None
        return StoreUnavailable(
            f"{wal} has grown by {grown:,} bytes, because it cannot be reset during the backup, and its disk "
            f"has {free:,} free: back up onto a faster disk, or at a quieter time"
        )

    def step() -> None:
        nonlocal stepped
        if exc := overgrown():
            raise exc
        stepped = time.monotonic()

    def watch() -> None:
        while not ended.wait(LOOK_SECONDS):
            exc = overgrown()
            if exc is not None and time.monotonic() - stepped > STANDSTILL_SECONDS:
                hung(exc)
                return

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield step
    finally:
        ended.set()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _check_room(live: sqlite3.Connection, folder: Path) -> None:
    """Raise StoreUnavailable if the copy would fill the disk, because a full disk stops a sidecar."""
    (pages,) = live.execute("PRAGMA page_count").fetchone()
    (page_size,) = live.execute("PRAGMA page_size").fetchone()
    free = shutil.disk_usage(folder).free
    if free < pages * page_size:
        raise StoreUnavailable(
            f"the copy takes {pages * page_size:,} bytes and {folder} has {free:,} free: "
            "free some, or take another disk"
        )


def _check_every_page(copy: Path) -> None:
    """Check the pages and references of all tables. Damage outside the log, as in scopes, shows only here."""
    with opened(copy) as log:
        (found,) = log.first("PRAGMA integrity_check(1)")
        if found != "ok":
            raise LogTampered(f"{copy} is damaged: {' '.join(found.split())}")
        if stray := log.first("PRAGMA foreign_key_check"):
            table, _, other, _ = stray
            raise LogTampered(f"{copy} is damaged: {table} refers to a row of {other} that is not there")


@contextmanager
def _translated(source: Path, folder: Path) -> Iterator[None]:
    try:
        yield
    except READ_ERRORS as exc:
        damage = damage_of(exc)
        if damage is None:
            raise StoreUnavailable(f"cannot copy {source} into {folder}: {describe(exc)}") from exc
        raise LogTampered(f"{source} is damaged, or no log any more: {damage}") from exc


def _sync(path: Path) -> None:
    """Sync a file, or the entries of a folder, to the disk."""
    number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(number)
    finally:
        os.close(number)
