"""How large a SQLite database is, and how fast it grows.

The growth of the database is computed from the log, whose records are in the order of their times. So the
figure is right from the start of the process, and a binary search reads only a few records of the log.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

from sidecar.core.instant import SECOND
from sidecar.store.base import Footprint
from sidecar.store.lists import recorded_since

DAY = 24 * 60 * 60 * SECOND

# About as many pages as an empty database has: one for each table and index, and those of the schema's text.
_EMPTY = """
    SELECT COUNT(NULLIF(rootpage, 0)) + SUM(LENGTH(sql)) / (SELECT page_size FROM pragma_page_size) + 1
    FROM sqlite_master"""


def measured(connection: sqlite3.Connection, path: Path, now: int) -> Footprint:
    """The footprint of the database at `path`, to which `connection` is open."""
    return Footprint(
        size=_known(lambda: os.stat(path).st_size),
        wal_size=_known(lambda: os.stat(f"{path}-wal").st_size),
        free=_known(lambda: shutil.disk_usage(path.parent).free),  # without the reserve of root
        growth_per_day=_known(lambda: _grown(connection, now - DAY)),
    )


def _known(measure: Callable[[], int]) -> int | None:
    """Measure one value; None if that fails. One failure must not hide the other values from an operator with
    a broken disk. Readiness reports the failure itself."""
    try:
        return measure()
    except (OSError, sqlite3.Error):
        return None


def _grown(connection: sqlite3.Connection, since: int) -> int:
    """The bytes added since a time, estimated as the share of the younger records in the whole database."""
    (last,) = connection.execute("SELECT COALESCE(MAX(seq), 0) FROM decisions").fetchone()
    if not last:
        return 0
    younger = last + 1 - recorded_since(connection, since + 1, range(1, last + 1))
    # The page count, not the file size, because the file lacks the pages that are still in the WAL.
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    (page_size,) = connection.execute("PRAGMA page_size").fetchone()
    (empty,) = connection.execute(_EMPTY).fetchone()
    return int(max(0, pages - empty) * page_size * younger // last)
