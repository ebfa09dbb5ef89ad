"""The real program, whose database hangs while a file is there, as on a disk that does not answer.

HANG_WHILE names the file. Each statement and each commit of a connection that may write then blocks its
thread, as a write to such a disk would. `store_faults` runs it.
"""

from __future__ import annotations

import os
import sqlite3
import time
from pathlib import Path
from typing import Any

HANG_WHILE = Path(os.environ["HANG_WHILE"])
POLL_SECONDS = 0.01

_connect = sqlite3.connect


def wait() -> None:
    while HANG_WHILE.exists():
        time.sleep(POLL_SECONDS)


class Hanging(sqlite3.Connection):
    """A connection whose disk may hang."""

    def execute(self, *arguments: Any) -> sqlite3.Cursor:
        wait()
        return super().execute(*arguments)

    def executemany(self, *arguments: Any) -> sqlite3.Cursor:
        wait()
        return super().executemany(*arguments)

    def commit(self) -> None:
        wait()
        super().commit()


def connect(database: Any, *arguments: Any, **options: Any) -> sqlite3.Connection:
    if "mode=ro" not in str(database):
        options["factory"] = Hanging
    found: sqlite3.Connection = _connect(database, *arguments, **options)
    return found


if __name__ == "__main__":
    vars(sqlite3)["connect"] = connect  # where aiosqlite looks it up
    from sidecar.cli.main import main

    main(prog_name="scopegate")
