"""Generated targets and bodies, each judged by the gate and read by careless parsers. Prints differentials.

    python -m tests.long.generated [--targets 1000000] [--patterns 1000000] [--bodies 1000000]
                                   [--seed 1]

`--targets` are judged by routes with exact paths and names amid a path, `--patterns` by routes that end with
a variable or a slash, have parts of segments, or have no word. A million of each takes less than half an hour
on one core that is free. Exit code 1 where there is a differential.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Callable

from tests import deforming, differential
from tests.corpus import counted

SHOWN = 50  # differentials of each kind; all are counted
BETWEEN_REPORTS = 1.0

Check = Callable[[random.Random], tuple[str, list[str]]]


def check_target(draw: random.Random) -> tuple[str, list[str]]:
    verdict, found = differential.of_request(*deforming.request(draw))
    return verdict, [found] if found else []


def check_pattern(draw: random.Random) -> tuple[str, list[str]]:
    case = draw.choice(differential.FURTHER)
    verdict, found = differential.of_request(*deforming.request(draw, case.spelled), case)
    return verdict, [found] if found else []


def check_body(draw: random.Random) -> tuple[str, list[str]]:
    return differential.of_body(deforming.body(draw))


def progress(name: str, done: int, total: int, begun: float) -> None:
    filled = 40 * done // max(total, 1)
    left = (time.monotonic() - begun) / max(done, 1) * (total - done)
    bar = "#" * filled + "." * (40 - filled)
    print(f"\r{name} [{bar}] {done:,} of {total:,}, {left:.0f} s left ", end="", file=sys.stderr, flush=True)


def run(name: str, check: Check, total: int, seed: int) -> int:
    """So many examples; how many differentials there were."""
    draw, verdicts, differentials = random.Random(seed), Counter[str](), 0
    begun = reported = time.monotonic()
    for number in range(total):
        verdict, found = check(draw)
        verdicts[verdict] += 1
        for each in found:
            differentials += 1
            if differentials <= SHOWN:
                print(f"\nDIFFERENTIAL: {each}", flush=True)
        if time.monotonic() - reported > BETWEEN_REPORTS and sys.stderr.isatty():
            progress(name, number, total, begun)
            reported = time.monotonic()
    if sys.stderr.isatty():
        progress(name, total, total, begun)
        print(file=sys.stderr)
    seconds = time.monotonic() - begun
    print(f"{total:,} {name} in {seconds:.0f} s: {counted(verdicts)}; {differentials} differentials")
    return differentials


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--targets", type=int, default=1_000_000)
    parser.add_argument("--patterns", type=int, default=1_000_000)
    parser.add_argument("--bodies", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    found = run("targets", check_target, options.targets, options.seed)
    found += run("targets of further patterns", check_pattern, options.patterns, options.seed)
    found += run("bodies", check_body, options.bodies, options.seed)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
