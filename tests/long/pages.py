"""How long a filtered page of decisions takes in a long log, read by the engine as the admin listener does.

python -m tests.long.pages DATABASE
"""

from __future__ import annotations

import asyncio
import itertools
import random
import sqlite3
import statistics
import sys
import time
from contextlib import closing
from pathlib import Path

from sidecar.core.chain import GENESIS
from sidecar.store.lists import FILTERS, KINDS
from sidecar.store.sqlite import SqliteEngine

MEDIAN_BELOW_SECONDS = 0.020
PAGE = 100
TIMES = 9


def wanted(path: Path) -> list[dict[str, str]]:
    """Each filter alone, and all pairs of two, with values of records from all over the log; and values that
    no record has together."""
    chance = random.Random(3)
    columns = ", ".join(FILTERS.values())
    found: list[dict[str, str]] = [{}]
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        (last,) = connection.execute("SELECT MAX(seq) FROM decisions").fetchone()
        for size in (1, 2):
            for names in itertools.combinations(FILTERS, size):
                row = None
                while row is None or None in row:
                    seq = chance.randint(1, last)
                    chosen = ", ".join(FILTERS[name] for name in names)
                    row = connection.execute(
                        f"SELECT {chosen} FROM (SELECT {columns} FROM decisions WHERE seq >= ? "
                        f"AND {' IS NOT NULL AND '.join(FILTERS[name] for name in names)} IS NOT NULL "
                        "ORDER BY seq LIMIT 1)",
                        (seq,),
                    ).fetchone()
                    if row is None:  # no record has both
                        row = tuple(KINDS.get(name, ("none",))[0] for name in names)
                found.append(dict(zip(names, row, strict=True)))
        (tenant,) = connection.execute("SELECT tenant_id FROM decisions WHERE seq = 1").fetchone()
    return [
        *found,
        {"event": "refused", "outcome": "selected"},
        {"type": "recovery", "event": "admitted"},
        {"tenant_id": tenant, "type": "memory", "outcome": "recovery_applied"},
        {"tenant_id": "nobody"},
    ]


async def timed(path: Path) -> list[tuple[float, float, int, dict[str, str]]]:
    """For each filter: the median and the longest time of a page in seconds, and how many records it has."""
    engine = SqliteEngine(path)
    head = await engine.open()
    assert head.hash != GENESIS
    measured = []
    try:
        for filters in wanted(path):
            times = []
            for turn in range(TIMES):
                before = None if turn % 2 else str(head.seq // 2)
                begun = time.perf_counter()
                page = await engine.decisions(filters, before=before, limit=PAGE)
                times.append(time.perf_counter() - begun)
            measured.append((statistics.median(times), max(times), len(page.rows), filters))
    finally:
        await engine.close()
    return measured


def report(path: Path) -> list[str]:
    """Print how long pages took; what was too slow."""
    measured = sorted(asyncio.run(timed(path)), key=lambda one: -one[0])
    medians = [median for median, *_ in measured]
    print(f"\nPages of {PAGE} under {len(measured)} filters: median of the medians", end=" ")
    print(f"{statistics.median(medians) * 1e3:.2f} ms; the slowest:")
    for median, longest, rows, filters in measured[:6]:
        print(f"  {median * 1e3:8.2f} ms median {longest * 1e3:8.2f} ms longest {rows:4} records  {filters}")
    return [
        f"a page of {filters} took {median * 1e3:.0f} ms"
        for median, _, _, filters in measured
        if median > MEDIAN_BELOW_SECONDS
    ]


if __name__ == "__main__":
    slow = report(Path(sys.argv[1]))
    print("\n".join(slow) or "WELL: every page is fast")
    sys.exit(1 if slow else 0)
