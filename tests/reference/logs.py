"""config/cookbook/logs.md, from the table of log events."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

from sidecar.telemetry.events import FIELDS, LOGGERS, LogEvent
from tests.reference import MADE, ROOT

PAGE = ROOT / "config/cookbook/logs.md"

EVERY_LINE: Mapping[str, str] = {
    "time": "when, in ISO 8601, UTC",
    "level": "`INFO`, `WARNING` or `ERROR`; lines with `DEBUG` below are not shown",
    "logger": "the part of the sidecar that logs the line; see below",
    "message": "what happened, in one of the sentences below",
    "exc_info": "the traceback of an exception (marked * below)",
}


def pages() -> dict[Path, str]:
    lines = [
        "# Log lines",
        "",
        MADE,
        "",
        "The sidecar logs to standard error: a JSON object a line or, with `--log-format text`, for people.",
        "No line carries a body, a key or a header but those named here. These lines are for following what",
        "happens. Decisions are in the [decision log](../reference/log.md), which is complete and",
        "tamper-evident.",
        "",
        "## Every line",
        "",
        "| field | what |",
        "|---|---|",
        *(f"| `{name}` | {meaning} |" for name, meaning in EVERY_LINE.items()),
        "",
        "## Fields",
        "",
        "A line also has the fields of its message, `null` where there is no value. The text format leaves",
        "out those that are null.",
        "",
        "| field | what |",
        "|---|---|",
        *(f"| `{name}` | {meaning} |" for name, meaning in sorted(FIELDS.items())),
        "",
        "## Messages",
        "",
        "`…` stands for a part that varies; * marks a traceback.",
    ]
    for logger, about in LOGGERS.items():
        lines += ["", f"### {logger}", "", about, ""]
        lines += ["| level | message | fields | what it means, and what to do |", "|---|---|---|---|"]
        lines += _rows([event for event in LogEvent if event.logger.name == logger])
    return {PAGE: "\n".join(lines) + "\n"}


def _rows(events: list[LogEvent]) -> Iterator[str]:
    """One row a message, the worst first."""
    for event in sorted(events, key=lambda event: (-event.level, event.message)):
        fields = ", ".join(f"`{name}`" for name in event.fields if name != "exc_info")
        message = event.message.replace("%s", "…") + ("\\*" if "exc_info" in event.fields else "")
        yield f"| {logging.getLevelName(event.level)} | {message} | {fields} | {event.meaning} |"
