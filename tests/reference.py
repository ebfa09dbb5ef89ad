"""Makes the reference of metrics and log lines from the code: `python -m tests.reference` writes both pages.

Whatever the code knows is taken from there: names, types, labels, buckets, fields, messages, levels. What it
cannot know, such as what to do about a warning, stands in reference_words.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from sidecar.core.command import NotEmitted
from sidecar.core.emission import Kind
from sidecar.core.entries import outcome_of
from sidecar.errors import ERRORS, Refusal
from sidecar.telemetry.metrics import EXECUTION_OUTCOMES, LOG_FIELDS, PASSED_OUTCOMES, Metrics
from tests.logged import LEVELS, OPEN, Logged, Source
from tests.reference_words import LOGGERS, MESSAGES, VALUES
from tests.rooms import MAP, map_page

ROOT = Path(__file__).parents[1]
MONITORING = ROOT / "config/monitoring"
METRICS_PAGE = ROOT / "config/cookbook/metrics.md"
LOGS_PAGE = ROOT / "config/cookbook/logs.md"
COMMAND = "python -m tests.reference"
MADE = (
    f"<!-- Made from the code by `{COMMAND}`. Do not edit this page: change the code, and run that again. -->"
)

EVERY_LINE: Mapping[str, str] = {
    "time": "when, in ISO 8601, UTC",
    "level": "`INFO`, `WARNING` or `ERROR`; what is `DEBUG` below is not shown",
    "logger": "the part of the sidecar that says it; see below",
    "message": "what happened, in one of the sentences below",
    "exc_info": "a traceback, where one belongs to it (marked * below)",
}

# The labels whose values are known beforehand. All others are open: names from policies and versions.
CLOSED: Mapping[tuple[str, str], Iterable[str]] = {
    ("scopegate_decisions", "outcome"): [
        "selected",
        *sorted({outcome_of(Refusal(code, "")).value for code in ERRORS}),
    ],
    ("scopegate_decisions", "reason"): ["none", *ERRORS],
    ("scopegate_unrecorded_refusals", "reason"): ERRORS,
    ("scopegate_executions", "outcome"): EXECUTION_OUTCOMES,
    ("scopegate_emissions", "kind"): get_args(Kind),
    ("scopegate_emissions", "result"): [
        "recorded",
        "ruled_out",
        *get_args(get_type_hints(NotEmitted)["why"]),
    ],
    ("scopegate_shadow_refusals", "reason"): ERRORS,
    ("scopegate_passed_through", "outcome"): PASSED_OUTCOMES,
    ("scopegate_reloads", "result"): ["ok", "unchanged", "refused"],
    ("scopegate_ready", "check"): ["store", "log", "policies", "clock", "draining"],
    ("scopegate_certificate_expiry_timestamp_seconds", "listener"): ["data", "admin", "ops", "upstream"],
}


@dataclass(frozen=True)
class Metric:
    """One metric as /metrics shows it."""

    family: str
    kind: str
    meaning: str
    labels: tuple[str, ...]
    buckets: tuple[float, ...]

    @property
    def name(self) -> str:
        return self.family + ("_total" if self.kind == "counter" else "")


def metrics() -> list[Metric]:
    """All of them, in the order of the code."""
    found = []
    for collector in Metrics().registry._collector_to_names:
        (family,) = collector.collect()
        bounds = getattr(collector, "_upper_bounds", None) or getattr(collector, "_kwargs", {}).get(
            "buckets", ()
        )
        found.append(
            Metric(
                family.name,
                family.type,
                family.documentation,
                tuple(getattr(collector, "_labelnames", ())),
                tuple(bound for bound in bounds if bound != float("inf")),
            )
        )
    return found


def label_values() -> dict[tuple[str, str], set[str]]:
    """The values that each label with a fixed table can have, by family and label."""
    return {key: set(values) for key, values in CLOSED.items()}


def logged() -> list[Logged]:
    return Source(ROOT / "sidecar").logged()


# metrics.md ---------------------------------------------------------------------------------------------


def metrics_page() -> str:
    alerts = yaml.safe_load((MONITORING / "alerts.yaml").read_text(encoding="utf-8"))
    dashboard = json.loads((MONITORING / "dashboard.json").read_text(encoding="utf-8"))
    lines = [
        "# Metrics",
        "",
        MADE,
        "",
        "What `/metrics` on the ops listener says: text in Prometheus' format 0.0.4. Counters begin",
        "with 0 at each start, so look at their increase. What is normal is taken from the panels of the",
        "[dashboard](../monitoring/dashboard.json); the [alerts](../monitoring/alerts.yaml) that look at a",
        "metric say in their descriptions what to do.",
        "",
        "| metric | type | labels |",
        "|---|---|---|",
    ]
    found = metrics()
    lines += [
        f"| [`{one.name}`](#{one.name}) | {one.kind} | {', '.join(f'`{label}`' for label in one.labels)} |"
        for one in found
    ]
    for metric in found:
        lines += ["", f"## {metric.name}", "", *_about(metric, alerts, dashboard)]
    lines += [
        "",
        "## Reasons",
        "",
        "The values of `reason` are the error codes; `none` where nothing was refused. What to do about each",
        "stands in [Errors](../reference/wire.md#errors).",
        "",
        "| reason | status | what |",
        "|---|---|---|",
        *(f"| `{kind.code}` | {kind.status} | {kind.title} |" for kind in ERRORS.values()),
    ]
    return "\n".join(lines) + "\n"


def _about(metric: Metric, alerts: Any, dashboard: Any) -> Iterator[str]:
    yield f"{metric.kind.capitalize()}. {metric.meaning}"
    if metric.buckets:
        unit = " seconds" if metric.family.endswith("_seconds") else ""
        yield ""
        yield f"Buckets, up to: {', '.join(f'{bound:g}' for bound in metric.buckets)}{unit}, and everything."
    if metric.labels:
        yield from ("", "| label | value | what |", "|---|---|---|")
        for label in metric.labels:
            for value, what in _values(metric.family, label):
                yield f"| `{label}` | {value} | {what} |"
    normal = [
        f"- {panel['title']}: {told[0].removeprefix('Normal').lstrip(': ')}"
        for panel in dashboard["panels"]
        if any(_asks(metric, target["expr"]) for target in panel.get("targets", ()))
        and (told := re.findall(r"Normal(?:: | is ).+$", panel["description"]))
    ]
    if normal:
        yield from ("", "Normal, on the dashboard's panels:", "", *normal)
    asking = [
        f"`{rule['alert']}` ({rule['labels']['severity']})"
        for group in alerts["groups"]
        for rule in group["rules"]
        if _asks(metric, rule["expr"])
    ]
    if asking:
        yield ""
        yield "Alerts: " + ", ".join(asking) + "."


def _asks(metric: Metric, query: str) -> bool:
    return re.search(rf"\b{metric.family}(_total|_bucket|_sum|_count)?\b", query) is not None


def _values(family: str, label: str) -> Iterator[tuple[str, str]]:
    """What stands in the last two columns: a row for each value that is explained, one for all others."""
    values = tuple(CLOSED.get((family, label), ()))
    words = VALUES.get((family, label), {})
    if isinstance(words, str):
        yield "", words
    elif set(values) >= set(ERRORS):
        yield "`none`, or a code" if "none" in values else "a code", "why: see [Reasons](#reasons)"
    else:
        plain = ", ".join(f"`{value}`" for value in values if value not in words)
        if plain:
            yield plain, ""
        yield from ((f"`{value}`", words[value]) for value in values if value in words)


# logs.md ------------------------------------------------------------------------------------------------


def logs_page() -> str:
    found = logged()
    lines = [
        "# Log lines",
        "",
        MADE,
        "",
        "The sidecar logs to standard error: a JSON object a line or, with `--log-format text`, for people.",
        "No line carries a body, a key or a header but those named here. What was decided stands in the",
        "[decision log](../reference/log.md), which is another thing: it is complete and cannot",
        "be altered unseen. These lines are for following what happens.",
        "",
        "## Every line",
        "",
        "| field | what |",
        "|---|---|",
        *(f"| `{name}` | {meaning} |" for name, meaning in EVERY_LINE.items()),
        "",
        "## Fields",
        "",
        "Beside these a line has the fields of its message, `null` where there is nothing to say. The text",
        "format leaves those out.",
        "",
        "| field | what |",
        "|---|---|",
        *(f"| `{name}` | {meaning} |" for name, meaning in sorted(LOG_FIELDS.items())),
    ]
    lines += [
        "",
        "## Messages",
        "",
        f"`{OPEN}` stands for what differs from line to line; * marks a traceback.",
    ]
    for logger in sorted({each.logger for each in found}):
        lines += ["", f"### {logger}", "", LOGGERS.get(logger, ""), ""]
        lines += ["| level | message | fields | what it means, and what to do |", "|---|---|---|---|"]
        lines += _rows([each for each in found if each.logger == logger])
    return "\n".join(lines) + "\n"


def _rows(found: list[Logged]) -> Iterator[str]:
    """One row a message, the worst first."""
    messages = {each.message: [other for other in found if other.message == each.message] for each in found}

    def worst(message: str) -> int:
        return -max(LEVELS.index(each.level) for each in messages[message])

    for message in sorted(messages, key=lambda message: (worst(message), message)):
        same = messages[message]
        levels = sorted({each.level for each in same}, key=LEVELS.index, reverse=True)
        fields = ", ".join(dict.fromkeys(f"`{name}`" for each in same for name in each.fields))
        level = " or ".join(each.upper() for each in levels)
        mark = "\\*" if any(each.traceback for each in same) else ""
        yield (f"| {level} | {message}{mark} | {fields} | {MESSAGES.get((found[0].logger, message), '')} |")


def main() -> None:
    for page, text in ((METRICS_PAGE, metrics_page()), (LOGS_PAGE, logs_page()), (MAP, map_page())):
        page.write_text(text, encoding="utf-8")
        print(page.relative_to(ROOT))


if __name__ == "__main__":
    main()
