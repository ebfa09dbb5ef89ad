"""What routes cost: matching targets that no route gates, with hundreds of routes instead of one.

    python -m tests.bench.routes [--routes 500] [--targets 500] [--rounds 7]

Every target is new to the sidecar, so nothing that it remembers about paths helps. The plain targets look
like those of the routes. The targets with escapes have names in several languages, and some have escapes that
mean nothing. `beside` are plain targets that hold all words of one of the six routes, but are not its path.
The ratios are those of the last column to the first and to the second.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

from sidecar.core.pattern import RoutePattern
from sidecar.core.target import GatedCalls, GatedPaths, PassThrough, classify, conflicts

SHAPES = (
    "/api/v2/kinds{number}/{{kind}}/launch",
    "/api/v1/namespaces/{{namespace}}/things{number}/{{thing}}",
    "/services/{{service}}/actions/{{action}}:restart{number}",
    "/v1/jobs{number}/",
    "**/recovery/execute{number}",
    "/files{number}/{{rest...}}",
)
PLAIN = (
    "/api/v2/orders/{number}/items?page=2",
    "/api/v1/namespaces/shop-{number}/configmaps/web",
    "/static/app.{number}.js",
    "/orders/{number}/",
)
ESCAPED = (
    "/files/%D0%BE%D1%82%D1%87%D1%91%D1%82%20{number}/page.pdf",
    "/search/%E6%97%A5%E6%9C%AC{number}/a%2Fb",
    "/caf%C3%A9/{number}/%25/x",
    "/tags/{number}%zz/a+b",
)
BESIDE = (
    "/api/v1/namespaces/shop-{number}/things0/web/log",
    "/v1/jobs0/{number}",
    "/x{number}/recovery/execute0/history",
)


def gated(count: int) -> GatedPaths:
    patterns = [SHAPES[number % len(SHAPES)].format(number=number // len(SHAPES)) for number in range(count)]
    return GatedPaths(GatedCalls((RoutePattern.parse(text),)) for text in patterns)


def targets(shapes: Sequence[str], count: int, round_: int) -> list[str]:
    return [shapes[at % len(shapes)].format(number=f"{round_}{at:05}") for at in range(count)]


def milliseconds(work: Callable[[], object]) -> float:
    begun = time.process_time()
    work()
    return (time.process_time() - begun) * 1e3


def matching(paths: GatedPaths, shapes: Sequence[str], count: int, rounds: int) -> float:
    """Microseconds of CPU to classify one target that passes; the best of several rounds."""
    taken = []
    for round_ in range(rounds):
        fresh = targets(shapes, count, round_)
        forgetful = GatedPaths(paths.routes)
        assert all(
            isinstance(classify("POST", each, (), True, forgetful), PassThrough) for each in fresh[:20]
        )
        forgetful = GatedPaths(paths.routes)
        begun = time.process_time()
        for each in fresh:
            classify("POST", each, (), True, forgetful)
        taken.append((time.process_time() - begun) / count * 1e6)
    return min(taken)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--routes", type=int, default=500)
    parser.add_argument("--targets", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    few, many = gated(len(SHAPES)), gated(arguments.routes)
    one = GatedPaths([RoutePattern.parse("**/recovery/execute")])
    counts = (1, len(few.routes), len(many.routes))
    print(f"{'':8}" + "".join(f"{f'{count} routes':>13}" for count in counts) + "   ratios")
    for name, shapes in (("plain", PLAIN), ("escaped", ESCAPED), ("beside", BESIDE)):
        costs = [matching(paths, shapes, arguments.targets, arguments.rounds) for paths in (one, few, many)]
        shown = "".join(f"{cost:10.1f} us" for cost in costs)
        print(f"{name:8}{shown}   {costs[2] / costs[0]:.2f} {costs[2] / costs[1]:.2f}")
    making, comparing = (
        statistics.median(milliseconds(work) for _ in range(arguments.rounds))
        for work in (lambda: gated(arguments.routes), lambda: list(conflicts(many.routes)))
    )
    print(f"{len(many.routes)} routes are read in {making:.0f} ms and compared in {comparing:.0f} ms")


if __name__ == "__main__":
    main()
