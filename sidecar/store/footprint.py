"""How much room a database takes, how much is left for it, and how fast it grows.

The growth is read off the log, whose records are in the order of their times: so it is right from the first
moment after a start, nothing has to be counted meanwhile, and a log of any length is asked a few times only.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path

from sidecar.store.base import Footprint

DAY = 24 * 60 * 60 * 1_000_000

_IS_YOUNGER = """
    SELECT EXISTS (SELECT 1 FROM decisions WHERE seq = ? AND COALESCE(recorded_at, decided_at) > ?)"""
# The pages that an empty database has, about: one for each table and index, and those of the schema's text.
_EMPTY = """
    SELECT COUNT(NULLIF(rootpage, 0)) + SUM(LENGTH(sql)) / (SELECT page_size FROM pragma_page_size) + 1
    FROM sqlite_master"""


def measured(connection: sqlite3.Connection, path: Path, now: int) -> Footprint:
    """The footprint of the database of a path, to which the connection is open."""
    return Footprint(
        size=_known(lambda: os.stat(path).st_size),
        wal_size=_known(lambda: os.stat(f"{path}-wal").st_size),
        free=_known(lambda: shutil.disk_usage(path.parent).free),  # what is left to others than root
        growth_per_day=_known(lambda: _grown(connection, now - DAY)),
    )


def _known(measure: Callable[[], int]) -> int | None:
    """Each by itself: who looks after a broken disk needs what can still be told. Readiness says what
    broke."""
    try:
        return measure()
    except (OSError, sqlite3.Error):
        return None


def _grown(connection: sqlite3.Connection, since: int) -> int:
    """The bytes that came since a time: the share that its records have in all that the database holds."""

    def is_younger(seq: int) -> int:
        found: tuple[int] = connection.execute(_IS_YOUNGER, (seq, since)).fetchone()
        return found[0]

    (last,) = connection.execute("SELECT COALESCE(MAX(seq), 0) FROM decisions").fetchone()
    if not last:
        return 0
    younger = last - bisect_left(range(1, last + 1), 1, key=is_younger)
    # Its pages, and not its file, which lags behind by what the WAL holds.
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    (page_size,) = connection.execute("PRAGMA page_size").fetchone()
    (empty,) = connection.execute(_EMPTY).fetchone()
    return int(max(0, pages - empty) * page_size * younger // last)
