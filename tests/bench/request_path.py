"""Counts what one gated request costs in our own code: calls, modules and values.

    python -m tests.bench.request_path

A real sidecar over a real SQLite file and a real backend serves a few requests first, so that caches are
full. Then every Python call in `sidecar/` is counted, on all threads, from the bytes of one request to its
settlement. A value is an instance whose `__init__` ran; the generated one of a dataclass counts too. Counts
do not depend on the machine, so they can be compared between two versions of the code.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import sidecar
from tests.support import House, opened, serving_backend

PACKAGE = str(Path(sidecar.__file__).parent)
WARM_UP_REQUESTS = 5


class Counts:
    """The calls of one request, by function; its values, by class."""

    def __init__(self) -> None:
        self.calls: Counter[tuple[str, str]] = Counter()
        self.values: Counter[str] = Counter()

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        if event != "call":
            return
        code = frame.f_code
        if code.co_name == "__init__":
            kind = type(frame.f_locals["self"]) if "self" in frame.f_locals else None
            if kind is not None and kind.__module__.startswith("sidecar"):
                self.values[kind.__qualname__] += 1
        if code.co_filename.startswith(PACKAGE):
            self.calls[(code.co_filename[len(PACKAGE) + 1 :], code.co_qualname)] += 1


async def execute(house: House, scope: Any) -> None:
    answer = await house.execute(scope)
    assert answer.status == 200, answer.body
    await house.ended(answer.header("Scopegate-Decision-Id") or "")


async def measured() -> Counts:
    counts = Counts()
    with tempfile.TemporaryDirectory() as folder:
        async with serving_backend() as backend:
            counting = False

            def count(frame: FrameType, event: str, argument: Any) -> None:
                if counting:
                    counts(frame, event, argument)

            threading.setprofile(count)  # for the thread of the store, which starts below
            async with opened(Path(folder), backend) as house:
                scope = await house.issue(max_attempts=WARM_UP_REQUESTS + 1)
                for _ in range(WARM_UP_REQUESTS):
                    await execute(house, scope)
                await asyncio.sleep(0.1)
                kind, body = house.execution(scope)
                counting = True
                sys.setprofile(count)
                answer = await house.data("POST", "/api/v1/recovery/execute", kind, body)
                await asyncio.sleep(0.05)  # the settlement's transaction may end after the answer
                sys.setprofile(None)
                counting = False
                assert answer.status == 200, answer.body
    return counts


def main() -> None:
    counts = asyncio.run(measured())
    modules = {module for module, _ in counts.calls}
    print(f"{sum(counts.calls.values())} calls of {len(counts.calls)} functions in {len(modules)} modules")
    print(f"{sum(counts.values.values())} values of {len(counts.values)} classes")
    for title, rows in (
        (
            "calls by module",
            Counter({m: sum(n for (k, _), n in counts.calls.items() if k == m) for m in modules}),
        ),
        ("values by class", counts.values),
        (
            "calls by function",
            Counter({f"{module}: {name}": n for (module, name), n in counts.calls.items()}),
        ),
    ):
        print(f"\n{title}")
        for name, count in rows.most_common():
            print(f"  {count:5d}  {name}")


if __name__ == "__main__":
    main()
