"""Measures Scopegate against its peers, or against another checkout of itself, strictly in turn.

The proxy that is measured runs on one core, the load and the backend on another one. Both sides of a
comparison are started, and then measured A B A B; a figure is the median over these pairs.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from tests.bench import report, targets
from tests.bench.comparisons import COMPARISONS, Comparison, Scale, against
from tests.bench.processes import BenchError, two_cores
from tests.bench.report import Result, Run
from tests.bench.targets import PATHS, Rig

EXAMPLES = """
examples:
  python -m tests.bench --list                              the comparisons
  python -m tests.bench                                     all of them, in about half an hour
  python -m tests.bench --only gated-bare pass-bare         two of them
  python -m tests.bench --pairs 1 --seconds 1               does everything start? no figures to believe
  git worktree add ../before main
  python -m tests.bench --against ../before                 this checkout against that one
"""
WHERE_FROM = {
    "wrk": "apt-get install wrk",
    "nginx": "apt-get install nginx-light",
    "envoy": "pip install -c requirements.lock -e '.[test]'",
}
PACKAGES = ("fastapi", "sqlalchemy", "httpx")
BUILD = targets.CHECKOUT / "build/bench"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--pairs", type=int, default=5, metavar="N", help="pairs of runs of each comparison (default: 5)")
    add("--seconds", type=int, default=8, metavar="N", help="of one run (default: 8)")
    add("--connections", type=int, default=64, metavar="N", help="where none are named (default: 64)")
    add("--only", nargs="+", metavar="NAME", help="only these comparisons; --list names them")
    add("--list", action="store_true", help="list the comparisons, and end")
    add("--against", type=Path, metavar="PATH", help="compare with the sidecar of another checkout")
    add("--out", type=Path, default=BUILD, metavar="FOLDER", help="of bench.json and the pictures")
    add("--folder", type=Path, default=BUILD, metavar="FOLDER", help="on the disk that is measured")
    parsed = parser.parse_args()
    if min(parsed.pairs, parsed.seconds, parsed.connections) < 1:
        parser.error("--pairs, --seconds and --connections are at least 1")
    if parsed.against and not (parsed.against / "sidecar/__init__.py").is_file():
        parser.error(f"--against {parsed.against}: there is no sidecar/ in this folder")
    known = {each.name: each for each in _all(parsed)}
    for name in parsed.only or ():
        if name not in known:
            parser.error(f"--only {name}: there are {', '.join(known)}")
    return parsed


def _all(arguments: argparse.Namespace) -> tuple[Comparison, ...]:
    return against(arguments.against.resolve()) if arguments.against else COMPARISONS


def missing(comparisons: Sequence[Comparison]) -> list[str]:
    """A line for each program or package that is not here, with how to get it."""
    lines = []
    for need in dict.fromkeys(need for each in comparisons for need in each.needs):
        if need in PACKAGES:
            here, how = importlib.util.find_spec(need) is not None, WHERE_FROM["envoy"]
        else:
            here, how = shutil.which(need, path=PATHS) is not None, WHERE_FROM[need]
        if not here:
            lines.append(f"{need} is not installed: {how}")
    return lines


def _conditions(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What else one has to know to read the figures."""
    cpu = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    commit = _output("git", "-C", str(targets.CHECKOUT), "describe", "--always", "--dirty")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit,
        "against": str(arguments.against) if arguments.against else None,
        "pairs": arguments.pairs,
        "seconds": arguments.seconds,
        "connections": arguments.connections,
        "processor": cpu[0] if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "file system": _output("stat", "-f", "-c", "%T", str(folder)),
        "load average": os.getloadavg()[0],
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        "aiohttp": version("aiohttp"),
        "nginx": _output("nginx", "-v"),
        "wrk": _output("wrk", "-v").splitlines()[0] if shutil.which("wrk") else "",
    }


def _output(*command: str) -> str:
    """What a command prints, or nothing if it is not there."""
    path = shutil.which(command[0], path=PATHS)
    if path is None:
        return ""
    done = subprocess.run([path, *command[1:]], capture_output=True, text=True, timeout=10)
    return (done.stdout + done.stderr).strip()


class Progress:
    """One line on standard error for each run."""

    def __init__(self, runs: int) -> None:
        self._runs = runs
        self._done = 0
        self._begun = time.monotonic()

    def show(self, comparison: Comparison, side: str, run: Run) -> None:
        self._done += 1
        passed = time.monotonic() - self._begun
        left = passed / self._done * (self._runs - self._done)
        found = ", ".join(
            f"{measure.title} {run[name]:,.{measure.decimals}f}"
            for name, measure in report.MEASURES.items()
            if name in run
        )
        print(
            f"[{self._done}/{self._runs}, {left / 60:.0f} min left] {comparison.name}, {side}: {found}",
            file=sys.stderr,
            flush=True,
        )

    def skip(self, runs: int) -> None:
        self._runs -= runs


def _measured(comparison: Comparison, rig: Rig, arguments: argparse.Namespace, progress: Progress) -> Result:
    pairs = []
    scale = Scale(arguments.seconds, arguments.connections)
    with comparison.open(rig, scale) as sides:
        for _ in range(arguments.pairs):
            runs = []
            for title, side in zip((comparison.left, comparison.right), sides, strict=True):
                runs.append(side())
                progress.show(comparison, title, runs[-1])
            pairs.append((runs[0], runs[1]))
    return Result(
        comparison.name,
        comparison.title,
        comparison.left,
        comparison.right,
        comparison.figures,
        pairs,
        comparison.shown,
    )


def _end(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)


def main() -> int:
    arguments = _arguments()
    comparisons = [each for each in _all(arguments) if not arguments.only or each.name in arguments.only]
    if arguments.list:
        for each in comparisons:
            print(f"{each.name:20} {each.title}")
        return 0
    if lines := missing(comparisons):
        print("\n".join(lines), file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, _end)  # so that what was started is ended
    results: list[Result] = []
    failed = []
    progress = Progress(2 * arguments.pairs * len(comparisons))
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="work-") as name:
        folder = Path(name)
        conditions = _conditions(arguments, folder)
        if conditions["file system"] == "tmpfs":
            print(f"{arguments.folder} is in memory, where a commit costs nothing", file=sys.stderr)
        try:
            rig = Rig(folder, two_cores())
            os.sched_setaffinity(0, {rig.cores.load})
            with targets.backend(rig):
                for comparison in comparisons:
                    try:
                        results.append(_measured(comparison, rig, arguments, progress))
                    except BenchError as exc:
                        failed.append(comparison.name)
                        progress.skip(2 * arguments.pairs)
                        print(f"{comparison.name} failed: {exc}", file=sys.stderr)
        except BenchError as exc:
            print(exc, file=sys.stderr)
            return 1
        finally:
            if results:  # also when it was interrupted
                written = report.write(arguments.out, results, conditions)
                print(report.tables(results))
                print("\n" + "\n".join(f"wrote {file}" for file in written))
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
