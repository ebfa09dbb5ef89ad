"""Thousands of cases made from the OpenAPI document, all checks and all phases, in two configurations.

    python -m tests.long.schemathesis_run [--examples 200] [--seed 1]

Each call gets up to that many cases in each phase; then calls that lead to each other are played alone.
Exit code 1 where an answer is not as the document says.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.fuzzing import ANY_ACTION, ELSEWHERE, STORIES, Run, furnish, run
from tests.support import opened, serving_backend


async def play(title: str, examples: int, seed: int, **options: Any) -> Run:
    """One run against a sidecar of its own."""
    begun = time.perf_counter()
    sections = options.pop("sections", {"policies": ANY_ACTION})
    with tempfile.TemporaryDirectory() as folder:
        async with serving_backend() as backend, opened(Path(folder), backend, **sections) as house:
            if sections.keys().isdisjoint(ELSEWHERE):
                await furnish(house)
            before = len(backend.executions)
            url = f"http://{house.sidecar.admin_address}/openapi.json"
            found = await asyncio.to_thread(run, url, examples=examples, seed=seed, **options)
            executed = len(backend.executions) - before
            ready, reasons = await house.ready()
    if ready != 200:
        found.wrong["the sidecar afterwards"] = f"is not ready: {reasons}"
    cases = ", ".join(f"{count} {phase}" for phase, count in found.cases.items())
    seconds = time.perf_counter() - begun
    print(f"{title}: {cases}; {found.checks} checks; {executed} executed; {seconds:.0f} s", flush=True)
    return found


async def everything(examples: int, seed: int) -> bool:
    runs = [
        await play("default", examples, seed),
        await play("elsewhere", examples, seed, sections=dict(ELSEWHERE)),
        *[
            await play(" > ".join(story), examples, seed, phases=("stateful",), only=story)
            for story in STORIES
        ],
        await play(
            f"elsewhere: {' > '.join(STORIES[0])}",
            examples,
            seed,
            phases=("stateful",),
            only=STORIES[0],
            sections={**ELSEWHERE, "policies": ANY_ACTION},
        ),
    ]
    statuses: dict[str, Counter[int]] = {}
    for found in runs:
        for call, counted in found.statuses.items():
            statuses.setdefault(call, Counter()).update(counted)
    print()
    for call, counted in sorted(statuses.items()):
        print(f"{call:<56}", "  ".join(f"{status}: {count}" for status, count in sorted(counted.items())))
    wrong = {title: text for found in runs for title, text in found.wrong.items()}
    never = [call for call, counted in statuses.items() if not any(status < 400 for status in counted)]
    for title, text in wrong.items():
        print(f"\nWRONG: {title}\n{text}")
    if never:
        print(f"\nNEVER ACCEPTED: {', '.join(never)}")
    total = sum(found.cases.total() for found in runs)
    print(f"\n{total} cases, {sum(found.checks for found in runs)} checks: {'NOT WELL' if wrong else 'WELL'}")
    return not wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--examples", type=int, default=200, help="cases a call and phase (default: 200)")
    parser.add_argument("--seed", type=int, default=1, help="another seed makes other cases (default: 1)")
    options = parser.parse_args()
    return 0 if asyncio.run(everything(options.examples, options.seed)) else 1


if __name__ == "__main__":
    sys.exit(main())
