"""config/cookbook/metrics.md, from the table of metrics, the alerts and the dashboard."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from sidecar.errors import ERRORS
from sidecar.telemetry.metrics import TABLE, Label, Metric
from tests.reference import MADE, ROOT

MONITORING = ROOT / "config/monitoring"
PAGE = ROOT / "config/cookbook/metrics.md"


def pages() -> dict[Path, str]:
    alerts = yaml.safe_load((MONITORING / "alerts.yaml").read_text(encoding="utf-8"))
    dashboard = json.loads((MONITORING / "dashboard.json").read_text(encoding="utf-8"))
    lines = [
        "# Metrics",
        "",
        MADE,
        "",
        "`/metrics` on the ops listener answers with these metrics, as text in Prometheus' format 0.0.4.",
        "Counters begin with 0 at each start, so look at their increase. What is normal is taken from the",
        "panels of the [dashboard](../monitoring/dashboard.json). The descriptions of the",
        "[alerts](../monitoring/alerts.yaml) on a metric say what to do.",
        "",
        "| metric | type | labels |",
        "|---|---|---|",
    ]
    lines += [
        f"| [`{row.name}`](#{row.name}) | {row.kind} | {', '.join(f'`{label}`' for label in row.labels)} |"
        for row in TABLE
    ]
    for row in TABLE:
        lines += ["", f"## {row.name}", "", *_about(row, alerts, dashboard)]
    lines += [
        "",
        "## Reasons",
        "",
        "The values of `reason` are the error codes, or `none` where nothing was refused.",
        "[Errors](../reference/wire.md#errors) says what to do about each.",
        "",
        "| reason | status | what |",
        "|---|---|---|",
        *(f"| `{kind.code}` | {kind.status} | {kind.title} |" for kind in ERRORS.values()),
    ]
    return {PAGE: "\n".join(lines) + "\n"}


def _about(row: Metric[Any], alerts: Any, dashboard: Any) -> Iterator[str]:
    yield f"{row.kind.capitalize()}. {row.meaning}"
    if row.buckets:
        unit = " seconds" if row.family.endswith("_seconds") else ""
        yield ""
        yield f"Buckets, up to: {', '.join(f'{bound:g}' for bound in row.buckets)}{unit}, and everything."
    if row.labels:
        yield from ("", "| label | value | what |", "|---|---|---|")
        for name, label in row.labels.items():
            for value, what in _values(label):
                yield f"| `{name}` | {value} | {what} |"
    normal = [
        f"- {panel['title']}: {found[0].removeprefix('Normal').lstrip(': ')}"
        for panel in dashboard["panels"]
        if any(_asks(row, target["expr"]) for target in panel.get("targets", ()))
        and (found := re.findall(r"Normal(?:: | is ).+$", panel["description"]))
    ]
    if normal:
        yield from ("", "Normal, on the dashboard's panels:", "", *normal)
    asking = [
        f"`{rule['alert']}` ({rule['labels']['severity']})"
        for group in alerts["groups"]
        for rule in group["rules"]
        if _asks(row, rule["expr"])
    ]
    if asking:
        yield ""
        yield "Alerts: " + ", ".join(asking) + "."


def _asks(row: Metric[Any], query: str) -> bool:
    return re.search(rf"\b{row.family}(_total|_bucket|_sum|_count)?\b", query) is not None


def _values(label: Label) -> Iterator[tuple[str, str]]:
    """The last two columns: a row for each value that has a meaning, and one for all others."""
    if isinstance(label, str):
        yield "", label
    elif ERRORS.keys() <= label.keys():
        yield "`none`, or a code" if "none" in label else "a code", "why: see [Reasons](#reasons)"
    else:
        plain = ", ".join(f"`{value}`" for value, what in label.items() if not what)
        if plain:
            yield plain, ""
        yield from ((f"`{value}`", what) for value, what in label.items() if what)
