"""A copy of a database, made while a sidecar writes to it, and verified before it takes its name.

The copy is of one moment: a read transaction is open from its first page to its last. Without that, every
commit of another process would have the copying begin anew. But it keeps the WAL of the source from
beginning anew, so whoever copies has an eye on how far that grows. Until the copy is whole and verified it is
in a folder of its own, which is gone whatever happens; what a killed one leaves, the next one removes.
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
from sidecar.store.logfile import READ_ERRORS, damage_of, opened
from sidecar.store.sqlite import read_only_uri, told
from sidecar.store.verify import Progress, Verified, verify_sqlite

# Pages copied at once, 4 MiB in all: between two such steps it can be interrupted.
PAGES = 1_024
# As much progress as is told of the copying, again of the verifying, and again of looking at every page.
THIRD = 1_000
# What the WAL of the source may grow by, where as much is left on its disk.
WAL_GROWTH = 1 << 30
# How often it is looked at, and how long a copying may stand still that should have given up.
LOOK_SECONDS = 1.0
STANDSTILL_SECONDS = 10.0

_FOLDER = ".scopegate-backup-"
# Whoever is at work in such a folder holds a lock on this file in it.
_HELD = "held"


@dataclass(frozen=True, slots=True, kw_only=True)
class Backup:
    """A backup that is in its place: what was verified of it, and its bytes."""

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
    """Copy a database, verify the copy, and give it its name. `progress` gets (done, in all), in no unit.

    The attestation has to be read before this begins. Raises LogTampered where the database is not as a
    sidecar leaves it, StoreUnavailable where it cannot be read or the copy cannot be made; either way there
    is no copy then. Where it should give up and cannot, because a disk does not answer, another thread calls
    `hung`: only the end of the process lets the WAL go then.
    """
    _check_place(target, replace=replace)
    with opened(source):
        pass  # there is a database, and it can be read
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
        # SQLite would take it for a part of the new file.
        if os.path.lexists(f"{target}{suffix}"):
            raise StoreUnavailable(
                f"{target}{suffix} is there, so a database {target.name} is in use or was not closed; "
                "take another name"
            )


@contextmanager
def _folder_in(place: Path) -> Iterator[Path]:
    """A folder for the copy, with a lock in it that ends with this process, however that ends."""
    for held in place.glob(f"{_FOLDER}*/{_HELD}"):
        with suppress(OSError):  # somebody is at work in it, it is another user's, or it is gone by now
            os.close(_locked(held))
            shutil.rmtree(held.parent)
    with TemporaryDirectory(dir=place, prefix=_FOLDER) as name:
        folder = Path(name)
        lock = _locked(folder / "new")
        try:
            # It has this name only once it is locked, so that nobody finds it free.
            os.rename(folder / "new", folder / _HELD)
            yield folder
        finally:
            os.close(lock)


def _locked(path: Path) -> int:
    """An open file that nobody else has locked. Raises BlockingIOError where somebody has."""
    number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(number)
        raise
    return number


def _copy(source: Path, copy: Path, progress: Progress, hung: Callable[[StoreUnavailable], None]) -> None:
    """Copy a database of this moment into a file that needs no other beside it."""
    os.close(os.open(copy, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    with (
        _translated(source, copy.parent.parent),
        closing(sqlite3.connect(copy, isolation_level=None)) as made,
    ):
        # What is cut off half-way is thrown away as a whole, and what is whole is put onto the disk at once.
        made.execute("PRAGMA journal_mode = OFF")
        made.execute("PRAGMA synchronous = OFF")
        # The source is closed first, so that its WAL can begin anew, however long the other takes.
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
    """Gives what is to be called at every step: it raises StoreUnavailable once the WAL has grown too far.

    A full disk would close the gate, which is worse than no backup. Half of what is free is left to others.
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
            f"{wal} has grown by {grown:,} bytes, for as long as the copying lasts it cannot begin anew, and "
            f"its disk has {free:,} free: back up onto a faster disk, or at a quieter time"
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
    """A copy that fills the disk would stop the sidecar whose store is on it, too."""
    (pages,) = live.execute("PRAGMA page_count").fetchone()
    (page_size,) = live.execute("PRAGMA page_size").fetchone()
    free = shutil.disk_usage(folder).free
    if free < pages * page_size:
        raise StoreUnavailable(
            f"the copy takes {pages * page_size:,} bytes and {folder} has {free:,} free: "
            "free some, or take another disk"
        )


def _check_every_page(copy: Path) -> None:
    """The log is not all that a store holds: what is damaged in the scopes, say, shows only here."""
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
            raise StoreUnavailable(f"cannot copy {source} into {folder}: {told(exc)}") from exc
        raise LogTampered(f"{source} is damaged, or no log any more: {damage}") from exc


def _sync(path: Path) -> None:
    """Put a file, or what a folder lists, onto the disk."""
    number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(number)
    finally:
        os.close(number)
