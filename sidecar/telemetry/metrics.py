"""The sidecar's metrics and logs. No label and no log line carries a secret or a body.

Labels are bounded: outcomes and error codes come from fixed tables, actions from the catalogue.
"""

from __future__ import annotations

import json
import logging
import platform
import re
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
from sidecar.telemetry.logqueue import DroppedLines

_TRACEPARENT = re.compile(
    r"(?P<version>(?!ff)[0-9a-f]{2})-(?P<trace>(?!0{32})[0-9a-f]{32})-(?P<span>(?!0{16})[0-9a-f]{16})"
    r"-[0-9a-f]{2}(?P<more>-.*)?"
)

_FAST = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_SLOW = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)

EXECUTION_OUTCOMES = ("answered", "not_sent", "unknown")
PASSED_OUTCOMES = (
    "answered",
    "tunnelled",
    "client_left",
    "cut",
    "invalid_request",
    "overloaded",
    "upstream_unreachable",
    "upstream_failed",
    "upstream_timeout",
)


def _measured(name: str, meaning: str, registry: CollectorRegistry) -> Gauge:
    """A gauge of a value from the store. It is NaN until measured, because a zero would set off alerts."""
    gauge = Gauge(name, f"{meaning} NaN: not measured since the start.", registry=registry)
    gauge.set(float("nan"))
    return gauge


def without_created_series() -> None:
    """Disable the `_created` series of all metrics, because the sidecar does not use them.

    Only `serve` calls this, because it applies to the whole process. A program that embeds the library
    decides for itself.
    """
    disable: Callable[[], None] = disable_created_metrics
    disable()


class Metrics:
    """Every metric, in a registry of its own. The metric names are a stable interface."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self.decisions = Counter(
            "scopegate_decisions",
            "Decisions about gated requests, and about issuing and revoking scopes (action none): outcome, "
            "error code as reason (none: let through), action (other: not in the catalogue).",
            ("outcome", "reason", "action"),
            registry=registry,
        )
        self.unrecorded = Counter(
            "scopegate_unrecorded_refusals",
            "Refusals that could not be recorded, because the store did not work.",
            ("reason",),
            registry=registry,
        )
        # Prometheus' increase() does not see the first event of a series that begins with it. Series that
        # alerts use therefore begin with zero.
        for reason in ("store_unavailable", "overloaded", "draining"):
            self.unrecorded.labels(reason)
        self.executions = Counter(
            "scopegate_executions",
            "Executions by how they ended: answered (a 5xx, too), provably not_sent, or unknown.",
            ("outcome",),
            registry=registry,
        )
        for outcome in EXECUTION_OUTCOMES:
            self.executions.labels(outcome)
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
            "scopegate_cost_overruns",
            "Executions that cost more than their hold, which exhausts their scope.",
            registry=registry,
        )
        self.judge = Histogram(
            "scopegate_judge_seconds",
            "Until a gated request, with its body, was read and understood; before the store is asked.",
            buckets=_FAST,
            registry=registry,
        )
        self.commit = Histogram(
            "scopegate_commit_seconds",
            "Until a decision about an execution was on disk, with its wait for the writer.",
            buckets=_FAST,
            registry=registry,
        )
        self.upstream = Histogram(
            "scopegate_upstream_seconds",
            "From an admission until the backend's answer was there, or was given up.",
            buckets=_SLOW,
            registry=registry,
        )
        self.settle = Histogram(
            "scopegate_settle_seconds",
            "Until the end of an execution was written, or kept in memory for later.",
            buckets=_FAST,
            registry=registry,
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
        for outcome in PASSED_OUTCOMES:
            self.passed.labels(outcome)
        self.batch_size = Histogram(
            "scopegate_store_batch_size",
            "Commands in one transaction of the store.",
            buckets=_SIZES,
            registry=registry,
        )
        self.batch_seconds = Histogram(
            "scopegate_store_batch_seconds",
            "How long one transaction of the store took.",
            buckets=_FAST,
            registry=registry,
        )
        self.store_failures = Counter(
            "scopegate_store_failures", "Transactions of the store that failed.", registry=registry
        )
        self.store_queue = Gauge(
            "scopegate_store_queue", "Commands waiting for the store.", registry=registry
        )
        self.store_size = _measured("scopegate_store_size_bytes", "Bytes of the database file.", registry)
        self.store_wal_size = _measured(
            "scopegate_store_wal_size_bytes", "Bytes of its write-ahead log.", registry
        )
        self.store_free = _measured(
            "scopegate_store_free_bytes", "Bytes free on the disk of the database.", registry
        )
        self.store_growth = _measured(
            "scopegate_store_growth_bytes",
            "Bytes added in the last 24 hours, by the share of their records.",
            registry,
        )
        self.unsettled = Gauge(
            "scopegate_unsettled", "Settlements kept in memory until the store takes them.", registry=registry
        )
        self.unknown = _measured(
            "scopegate_unknown_executions",
            "Executions of which nobody knows how they ended, and that wait to be reconciled.",
            registry,
        )
        self.oldest_unknown = _measured(
            "scopegate_oldest_unknown_execution_seconds",
            "Age of the oldest execution that waits to be reconciled; 0: none does.",
            registry,
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
            "When the last reload, or else the start, was; in seconds since 1970.",
            registry=registry,
        )
        self.certificate_expiry = Gauge(
            "scopegate_certificate_expiry_timestamp_seconds",
            "When the certificate in use ends, in seconds since 1970: that of a listener, or the one that is "
            "shown to the upstream.",
            ("listener",),
            registry=registry,
        )
        self.ready = Gauge(
            "scopegate_ready",
            "Each check of /health/ready: 1 well, 0 not. Clients should be sent here only while all are 1.",
            ("check",),
            registry=registry,
        )
        registry.register(DroppedLines())
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
        """The metrics in the Prometheus text format 0.0.4."""
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
    """Send all logs to `stream` (standard error by default), one line for each record."""
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
    # The sidecar's own log lines cover what these libraries report at INFO.
    for noisy in ("aiosqlite", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def trace_ids(traceparent: str | None) -> dict[str, Any]:
    """`trace_id` and `span_id` of a W3C traceparent header; empty if it is absent or not valid."""
    found = _TRACEPARENT.fullmatch(traceparent or "")
    # Only a version above 00 may append fields.
    if found is None or (found["version"] == "00" and found["more"] is not None):
        return {}
    return {"trace_id": found["trace"], "span_id": found["span"]}
