"""A copy of a database, made while a sidecar writes to it, and verified before it takes its name.

The copy is of one moment: a read transaction is open from its first page to its last. Without that, every
commit of another process would have the copying begin anew. Until the copy is whole and verified it is in a
folder of its own, which is gone whatever happens.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
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
# As much progress as is told of the copying, and again of the verifying.
HALF = 1_000


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
) -> Backup:
    """Copy a database, verify the copy, and give it its name. `progress` gets (done, in all), in no unit.

    The attestation has to be read before this begins. Raises LogTampered where the database is not as a
    sidecar leaves it, StoreUnavailable where it cannot be read or the copy cannot be made; either way there
    is no copy then.
    """
    _check_place(target, replace=replace)
    with opened(source):
        pass  # there is a database, and it can be read
    try:
        with TemporaryDirectory(dir=target.parent, prefix=".scopegate-backup-") as folder:
            copy = Path(folder) / target.name
            _copy(source, copy, lambda done, total: progress(HALF * done // max(1, total), 2 * HALF))
            try:
                verified = verify_sqlite(
                    copy, lambda done, total: progress(HALF + HALF * done // total, 2 * HALF), attestation
                )
            except LogTampered as exc:
                raise LogTampered(str(exc).replace(str(copy), f"the copy of {source}")) from exc
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


def _copy(source: Path, copy: Path, progress: Progress) -> None:
    """Copy a database of this moment into a file that needs no other beside it."""
    os.close(os.open(copy, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    with (
        _translated(source, copy.parent.parent),
        closing(sqlite3.connect(read_only_uri(source), uri=True, isolation_level=None)) as live,
        closing(sqlite3.connect(copy, isolation_level=None)) as made,
    ):
        # What is cut off half-way is thrown away as a whole, and what is whole is put onto the disk at once.
        made.execute("PRAGMA journal_mode = OFF")
        made.execute("PRAGMA synchronous = OFF")
        live.execute("BEGIN")
        live.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
        _check_room(live, copy.parent.parent)

        def step(status: int, remaining: int, total: int) -> None:
            del status
            progress(total - remaining, total)

        live.backup(made, pages=PAGES, progress=step)
        live.execute("ROLLBACK")  # the WAL of the source can begin anew
        made.execute("PRAGMA journal_mode = DELETE")


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
