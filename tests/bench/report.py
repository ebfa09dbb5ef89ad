"""What the runs add up to: medians and ranges, ratios of each pair, as a table and as JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tabulate import tabulate

from tests.bench import chart

Run = Mapping[str, float]  # the measures of one side of one pair, by name
Pair = tuple[Run, Run]


@dataclass(frozen=True)
class Measure:
    """How a measure is called and written."""

    title: str
    decimals: int


MEASURES = {
    "rate": Measure("requests a second", 0),
    "cpu_us": Measure("CPU a request, µs", 0),
    "busy": Measure("the proxy's core busy, %", 0),
    "p50_ms": Measure("p50, ms", 2),
    "p99_ms": Measure("p99, ms", 2),
    "fdatasync_ms": Measure("fdatasync, ms", 3),
    "resident_mib": Measure("resident memory, MiB", 1),
}


@dataclass(frozen=True)
class Figure:
    """A number that one pair gives, and what it should be, where the project has set itself a mark."""

    title: str
    compute: Callable[[Run, Run], float]
    at_least: float | None = None
    at_most: float | None = None

    @property
    def wanted(self) -> str:
        if self.at_least is not None:
            return f"at least {self.at_least:g}"
        return f"at most {self.at_most:g}" if self.at_most is not None else ""

    def holds(self, value: float) -> bool | None:
        """Whether a value is as wanted; None where nothing is."""
        if self.at_least is not None:
            return value >= self.at_least
        return None if self.at_most is None else value <= self.at_most


@dataclass(frozen=True)
class Result:
    """A comparison with the pairs that were measured, in their order."""

    name: str
    title: str
    left: str
    right: str
    figures: Sequence[Figure]
    pairs: Sequence[Pair]
    shown: str = "rate"  # the measure that the picture shows


class Spread(NamedTuple):
    """The median, the lowest and the highest of some values."""

    median: float
    low: float
    high: float

    def text(self, decimals: int) -> str:
        return f"{self.median:,.{decimals}f} [{self.low:,.{decimals}f}-{self.high:,.{decimals}f}]"


def spread(values: Iterable[float]) -> Spread:
    ordered = sorted(values)
    return Spread(statistics.median(ordered), ordered[0], ordered[-1])


def side(result: Result, which: int) -> dict[str, Spread]:
    """The spread of each measure that all runs of a side have."""
    runs = [pair[which] for pair in result.pairs]
    return {name: spread(run[name] for run in runs) for name in MEASURES if all(name in run for run in runs)}


def outcome(result: Result, figure: Figure) -> Spread:
    return spread(figure.compute(*pair) for pair in result.pairs)


def tables(results: Sequence[Result]) -> str:
    """A table for each comparison, and one of all figures."""
    parts = []
    for result in results:
        left, right = side(result, 0), side(result, 1)
        rows = []
        for name in left | right:
            measure = MEASURES[name]
            cells = [each[name].text(measure.decimals) if name in each else "" for each in (left, right)]
            rows.append([measure.title, *cells])
        table = tabulate(rows, ["", result.left, result.right], disable_numparse=True)
        parts.append(f"{result.name}: {result.title}\n{table}")
    parts.append(
        "Figures: the median over the pairs, and the lowest and the highest pair\n" + _figures(results)
    )
    return "\n\n".join(parts)


def _figures(results: Sequence[Result]) -> str:
    rows = []
    for result in results:
        for figure in result.figures:
            found = outcome(result, figure)
            verdict = {None: "", True: "yes", False: "NO"}[figure.holds(found.median)]
            rows.append([result.name, figure.title, found.text(2), figure.wanted, verdict])
    return tabulate(
        rows, ["comparison", "figure", "median [range]", "wanted", "holds"], disable_numparse=True
    )


def document(results: Sequence[Result], conditions: Mapping[str, Any]) -> dict[str, Any]:
    """Everything, as JSON: the conditions, every run, the spreads and the figures."""
    return {
        "conditions": dict(conditions),
        "comparisons": [
            {
                "name": result.name,
                "title": result.title,
                "left": result.left,
                "right": result.right,
                "pairs": [[dict(run) for run in pair] for pair in result.pairs],
                "left_spread": {name: found._asdict() for name, found in side(result, 0).items()},
                "right_spread": {name: found._asdict() for name, found in side(result, 1).items()},
                "figures": [
                    {
                        "title": figure.title,
                        "values": [figure.compute(*pair) for pair in result.pairs],
                        **outcome(result, figure)._asdict(),
                        "at_least": figure.at_least,
                        "at_most": figure.at_most,
                    }
                    for figure in result.figures
                ],
            }
            for result in results
        ],
    }


def picture(results: Sequence[Result], conditions: str, *, dark: bool) -> str:
    """One measure of each comparison as two bars, with the first figure below its title."""
    groups = []
    for result in results:
        sides = (side(result, 0), side(result, 1))
        measure, figure = MEASURES[result.shown], result.figures[0]
        bars = []
        for title, found in zip((result.left, result.right), sides, strict=True):
            shown = found[result.shown]
            bars.append(chart.Bar(title, *shown, text=f"{shown.median:,.{measure.decimals}f}"))
        summary = f"{measure.title}; {figure.title}: {outcome(result, figure).text(2)}"
        groups.append(chart.Group(result.title, summary, tuple(bars)))
    return chart.svg(groups, conditions, dark=dark)


def write(folder: Path, results: Sequence[Result], conditions: Mapping[str, Any]) -> list[Path]:
    """Writes bench.json, bench-light.svg and bench-dark.svg; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    said = (
        f"pairs of runs: {conditions['pairs']}, each run {conditions['seconds']:g} s, "
        f"{conditions['connections']} connections, {conditions['processor']}, {conditions['date']}"
    )
    texts = {
        "bench.json": json.dumps(document(results, conditions), indent=1) + "\n",
        "bench-light.svg": picture(results, said, dark=False),
        "bench-dark.svg": picture(results, said, dark=True),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in texts]
