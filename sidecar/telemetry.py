"""What the sidecar says about itself: metrics and logs. No label and no log line carries a secret or a body.

Labels are bounded: outcomes and error codes come from fixed tables, actions from the catalogue.
"""

from __future__ import annotations

import json
import logging
import platform
import sys
from collections.abc import Callable
from typing import Any, Literal, TextIO

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from pythonjsonlogger.json import JsonFormatter

from sidecar import __version__

_FAST = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_SLOW = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


def without_created_series() -> None:
    """No second series for each metric, which nobody here reads. This holds for the whole process, so it is
    for a sidecar to say, and not for a program that embeds the library."""
    disable: Callable[[], None] = disable_created_metrics
    disable()


class Metrics:
    """Every metric, in a registry of its own. The names are promises (README, "Metrics")."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self.decisions = Counter(
            "scopegate_decisions",
            "Gate decisions: outcome, the error code as reason (none where it was let through), action.",
            ("outcome", "reason", "action"),
            registry=registry,
        )
        self.unrecorded = Counter(
            "scopegate_unrecorded_refusals",
            "Refusals that could not be recorded, because the store did not work.",
            ("reason",),
            registry=registry,
        )
        self.executions = Counter(
            "scopegate_executions", "How executions ended.", ("outcome",), registry=registry
        )
        self.emissions = Counter(
            "scopegate_emissions",
            "Decisions that others told over the admin interface: recorded, or why not.",
            ("kind", "result"),
            registry=registry,
        )
        self.shadow_refusals = Counter(
            "scopegate_shadow_refusals",
            "What rules and routes in shadow mode would have refused; rule is empty for a route.",
            ("reason", "rule"),
            registry=registry,
        )
        self.condition_errors = Counter(
            "scopegate_condition_errors",
            "Conditions (when) that could not be judged, and so refused.",
            ("rule",),
            registry=registry,
        )
        self.cost_overruns = Counter(
            "scopegate_cost_overruns", "Executions that cost more than their hold.", registry=registry
        )
        self.judge = Histogram(
            "scopegate_judge_seconds", "Reading and judging a request.", buckets=_FAST, registry=registry
        )
        self.commit = Histogram(
            "scopegate_commit_seconds", "Admission, committed.", buckets=_FAST, registry=registry
        )
        self.upstream = Histogram(
            "scopegate_upstream_seconds", "The backend's work on a request.", buckets=_SLOW, registry=registry
        )
        self.settle = Histogram(
            "scopegate_settle_seconds", "Settlement, committed.", buckets=_FAST, registry=registry
        )
        self.in_flight = Gauge("scopegate_in_flight", "Gated requests being worked on.", registry=registry)
        self.passing = Gauge(
            "scopegate_passing_through", "Pass-through requests under way.", registry=registry
        )
        self.passed = Counter(
            "scopegate_passed_through",
            "Pass-through requests by how they ended.",
            ("outcome",),
            registry=registry,
        )
        self.batch_size = Histogram(
            "scopegate_store_batch_size", "Commands in one transaction.", buckets=_SIZES, registry=registry
        )
        self.batch_seconds = Histogram(
            "scopegate_store_batch_seconds", "One transaction.", buckets=_FAST, registry=registry
        )
        self.store_failures = Counter(
            "scopegate_store_failures", "Transactions that failed.", registry=registry
        )
        self.store_queue = Gauge(
            "scopegate_store_queue", "Commands waiting for the store.", registry=registry
        )
        self.unsettled = Gauge(
            "scopegate_unsettled", "Settlements kept in memory until the store takes them.", registry=registry
        )
        self.unknown = Gauge(
            "scopegate_unknown_executions", "Executions that wait to be reconciled.", registry=registry
        )
        self.oldest_unknown = Gauge(
            "scopegate_oldest_unknown_execution_seconds",
            "Age of the oldest of them; 0: none.",
            registry=registry,
        )
        self.checkpoint_failures = Counter(
            "scopegate_checkpoint_failures", "Checkpoints that could not be written.", registry=registry
        )
        self.checkpoint_seq = Gauge(
            "scopegate_checkpoint_seq",
            "Records that the last checkpoint attests; 0: none since the start.",
            registry=registry,
        )
        self.reloads = Counter(
            "scopegate_reloads",
            "Reloads of configuration and policies: ok, unchanged, or refused.",
            ("result",),
            registry=registry,
        )
        for result in ("ok", "unchanged", "refused"):
            self.reloads.labels(result)
        self.last_reload_success = Gauge(
            "scopegate_last_reload_success",
            "Whether the last reload, or else the start, could use the files: 1 or 0.",
            registry=registry,
        )
        self.last_reload_time = Gauge(
            "scopegate_last_reload_timestamp_seconds",
            "When that was, in seconds since 1970.",
            registry=registry,
        )
        build = Gauge(
            "scopegate_build_info", "Always 1; the labels tell.", ("version", "python"), registry=registry
        )
        build.labels(__version__, platform.python_version()).set(1)

    def batch_committed(self, size: int, seconds: float) -> None:
        self.batch_size.observe(size)
        self.batch_seconds.observe(seconds)

    def batch_failed(self, size: int) -> None:
        del size
        self.store_failures.inc()

    def page(self) -> bytes:
        """The page that Prometheus reads (text format 0.0.4)."""
        return generate_latest(self.registry)


class _TextFormatter(logging.Formatter):
    """`time level message key=value ...`, for people."""

    _ordinary = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        extras = {key: value for key, value in vars(record).items() if key not in self._ordinary}
        head, newline, traceback = line.partition("\n")
        told = "".join(
            f" {key}={value if isinstance(value, int | float) else json.dumps(value, default=str)}"
            for key, value in extras.items()
            if value is not None
        )
        return f"{head}{told}{newline}{traceback}"


def set_up_logging(
    format: Literal["json", "text"], level: str = "INFO", stream: TextIO | None = None
) -> None:
    """Send all logs to `stream` (standard error by default), one line each."""
    handler = logging.StreamHandler(stream or sys.stderr)
    if format == "text":
        handler.setFormatter(_TextFormatter("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S"))
    else:
        handler.setFormatter(
            JsonFormatter(
                "%(levelname)s %(name)s %(message)s",
                rename_fields={"levelname": "level", "name": "logger"},
                timestamp="time",
            )
        )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    # These libraries report at INFO what our own records say better.
    for noisy in ("aiosqlite", "asyncio", "watchfiles"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def trace_ids(traceparent: str | None) -> dict[str, Any]:
    """`trace_id` and `span_id` of a W3C traceparent header; empty where there is none."""
    parts = (traceparent or "").split("-")
    if len(parts) < 4 or len(parts[1]) != 32 or len(parts[2]) != 16:
        return {}
    return {"trace_id": parts[1], "span_id": parts[2]}
