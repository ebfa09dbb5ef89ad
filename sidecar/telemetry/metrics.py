"""Every metric of the sidecar, as one table: the class `Metrics`. The names are a stable interface.

To add a metric, add a row and a call such as `metrics.cost_overruns.inc()`, then run
`python -m tests.reference`, which writes config/cookbook/metrics.md. No label carries a secret. Labels are
bounded: their values come from fixed tables, from the catalogue or from the policies.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable, Mapping
from itertools import product
from typing import Any, Generic, Literal, TypeAlias, TypeVar, get_args, overload

from prometheus_client import CollectorRegistry, generate_latest

from sidecar import __version__
from sidecar.core.emission import Kind
from sidecar.core.principal import PrincipalKind
from sidecar.errors import ERRORS
from sidecar.telemetry.instruments import Counter, Gauge, Histogram
from sidecar.telemetry.logqueue import DroppedLines

# The values of a label with their meanings ("": the value says it), or a sentence about a label whose values
# are not known beforehand.
Label: TypeAlias = Mapping[str, str] | str
M = TypeVar("M", bound="Counter | Gauge | Histogram | DroppedLines")

_FAST = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_SLOW = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_CODES = {code: kind.title for code, kind in ERRORS.items()}
_METHODS = {
    "tokens": "a token of `auth.tokens.file`",
    "jwt": "a JSON Web Token",
    "mtls": "a client certificate",
    "proxy": "the header of a trusted proxy",
}
_ROUTE = "names of routes; `none`: no route, or more than one could be meant"


class Metric(Generic[M]):
    """One row. `metrics.NAME` is its counter, gauge or histogram; `Metrics.NAME` is the row."""

    def __init__(
        self,
        type: type[M],
        family: str,
        meaning: str,
        /,
        *,
        buckets: tuple[float, ...] = (),
        zero: Iterable[str] | Literal["all"] = (),
        measured: bool = False,
        **labels: Label,
    ) -> None:
        """`zero` are the values of its one label whose series exist, with 0, from the start. `all` stands for
        every combination of the values of its labels.

        Prometheus' increase() does not see the first event of a series that begins with it, so the series
        that alerts use are in `zero`. A `measured` gauge shows a value from the store. It is NaN until
        measured, because a zero would set off alerts.
        """
        self.type = type
        self.family = family
        self.meaning = f"{meaning} NaN: not measured since the start." if measured else meaning
        self.labels = labels
        self.buckets = buckets
        self._zero = [*product(*labels.values())] if zero == "all" else [(value,) for value in zero]
        self._measured = measured

    @property
    def kind(self) -> str:
        """Its type, as Prometheus calls it."""
        return "counter" if self.type is DroppedLines else self.type.__name__.lower()

    @property
    def name(self) -> str:
        return self.family + ("_total" if self.kind == "counter" else "")

    def __set_name__(self, owner: type[Any], name: str) -> None:
        self.attribute = name

    @overload
    def __get__(self, metrics: None, owner: type[Any]) -> Metric[M]: ...
    @overload
    def __get__(self, metrics: Metrics, owner: type[Any]) -> M: ...
    def __get__(self, metrics: Metrics | None, owner: type[Any]) -> Metric[M] | M:
        # `make` puts the metric itself into the dictionary of the instance, where Python looks first.
        return self

    def make(self, registry: CollectorRegistry) -> M:
        options: dict[str, Any] = {"buckets": self.buckets} if self.buckets else {}
        made = self.type(self.family, self.meaning, tuple(self.labels), registry=registry, **options)
        if isinstance(made, Counter):
            for values in self._zero:
                made.labels(*values)
        if isinstance(made, Gauge) and self._measured:
            made.set(math.nan)
        return made


class Metrics:
    """Every metric, in a registry of its own."""

    decisions = Metric(
        Counter,
        "scopegate_decisions",
        "Decisions about gated requests, and about issuing and revoking scopes (action none): outcome, error "
        "code as reason (none: let through), action (other: not in the catalogue).",
        outcome={
            "selected": "let through; or a scope was issued or revoked",
            "none": "a replay: the answer of an earlier request under its `Idempotency-Key`",
            "blocked": "refused by a bound of the scope, or as malformed",
            "policy_blocked": "refused by a rule or the catalogue",
            "policy_unavailable": "no decision was possible",
        },
        reason={"none": "", **_CODES},
        action="the names in the catalogue, actions and globs; `other`: an action that it does not list; "
        "`none`: the request names no readable action, or a scope was issued or revoked",
        route=_ROUTE,
    )
    unrecorded = Metric(
        Counter,
        "scopegate_unrecorded_refusals",
        "Refusals that could not be recorded, because the store did not work.",
        reason=_CODES,
        zero=("store_unavailable", "overloaded", "draining"),
    )
    authenticated = Metric(
        Counter,
        "scopegate_authenticated_requests",
        "Requests whose caller a method of authentication has established.",
        method=_METHODS,
        principal_kind=dict.fromkeys(get_args(PrincipalKind), ""),
        zero="all",
    )
    auth_failures = Metric(
        Counter,
        "scopegate_auth_failures",
        "Requests that were refused because a credential was not valid, or was missing.",
        method=_METHODS | {"none": "a credential was required, and there was none"},
        zero="all",
    )
    jwt_keys = Metric(
        Gauge,
        "scopegate_jwt_keys",
        "Keys of the issuer in force (auth.jwt.jwks); 0: none, so every JSON Web Token is refused.",
    )
    jwt_key_failures = Metric(
        Counter,
        "scopegate_jwt_key_failures",
        "How often the keys of the issuer could not be read. The last good ones stay in force.",
    )
    executions = Metric(
        Counter,
        "scopegate_executions",
        "Executions by outcome. One that is unknown and reported later counts under both.",
        outcome={
            "answered": "the backend answered, perhaps with an error",
            "not_sent": "provably nothing was sent; the scope has its attempt and hold back",
            "unknown": "the answer or the report was lost or late; attempt and hold stay until an operator "
            "reconciles it",
            "succeeded": "its success was reported",
            "failed": "its failure was reported",
            "not_executed": "the status of the answer, or the report, says that nothing was executed; the "
            "scope has its attempt and hold back",
        },
        route=_ROUTE,
    )
    emissions = Metric(
        Counter,
        "scopegate_emissions",
        "Decisions that other services reported over the admin interface: recorded, or why not.",
        kind=dict.fromkeys(get_args(Kind), ""),
        result={
            "recorded": "",
            "ruled_out": "the emission rule says that there is no record",
            "repeated": "it is recorded already",
            "switched_off": "the kill switch is on",
        },
    )
    shadow_refusals = Metric(
        Counter,
        "scopegate_shadow_refusals",
        "What rules and routes in shadow mode would have refused; rule is empty for a route.",
        reason=_CODES,
        rule="ids of rules; empty: the route or the scope",
    )
    condition_errors = Metric(
        Counter,
        "scopegate_condition_errors",
        "Conditions (when) that could not be judged, and so refused.",
        rule="ids of rules",
    )
    cost_overruns = Metric(
        Counter,
        "scopegate_cost_overruns",
        "Executions that cost more than their hold, which exhausts their scope.",
    )
    judge = Metric(
        Histogram,
        "scopegate_judge_seconds",
        "The time to read and understand a gated request with its body, before the store is involved.",
        buckets=_FAST,
    )
    commit = Metric(
        Histogram,
        "scopegate_commit_seconds",
        "The time until a decision about an execution is on disk, including its wait for the writer.",
        buckets=_FAST,
    )
    upstream = Metric(
        Histogram,
        "scopegate_upstream_seconds",
        "The time from an admission until the backend's whole answer came, or was given up.",
        buckets=_SLOW,
    )
    settle = Metric(
        Histogram,
        "scopegate_settle_seconds",
        "The time until the end of an execution is written, or kept in memory for later.",
        buckets=_FAST,
    )
    in_flight = Metric(Gauge, "scopegate_in_flight", "Gated requests being worked on.")
    passing = Metric(Gauge, "scopegate_passing_through", "Pass-through requests under way.")
    passed = Metric(
        Counter,
        "scopegate_passed_through",
        "Pass-through requests by how they ended.",
        outcome={
            "answered": "the whole answer went to the client",
            "tunnelled": "a WebSocket, to its end",
            "client_left": "the client did not wait for the end",
            "cut": "the backend broke its answer off",
            "invalid_request": "the request could not be forwarded as it came",
            "overloaded": "no connection to the backend was free",
            "upstream_unreachable": "nothing was sent",
            "upstream_failed": "the answer was lost",
            "upstream_timeout": "no answer began in time",
        },
        zero="all",
    )
    unlisted = Metric(
        Counter,
        "scopegate_unlisted",
        "Requests that no route lists, recorded before they passed, or refused (gate.unlisted). Those that "
        "pass unrecorded do not count.",
        access={"reads": "GET, HEAD, OPTIONS and WebSockets", "writes": "all other methods"},
        result={"recorded": "it passed, and has a record", "refused": "403 `not_listed`"},
    )
    batch_size = Metric(
        Histogram, "scopegate_store_batch_size", "Commands in one transaction of the store.", buckets=_SIZES
    )
    batch_seconds = Metric(
        Histogram,
        "scopegate_store_batch_seconds",
        "How long one transaction of the store took.",
        buckets=_FAST,
    )
    store_failures = Metric(Counter, "scopegate_store_failures", "Transactions of the store that failed.")
    store_queue = Metric(Gauge, "scopegate_store_queue", "Commands waiting for the store.")
    store_size = Metric(Gauge, "scopegate_store_size_bytes", "Bytes of the database file.", measured=True)
    store_wal_size = Metric(
        Gauge, "scopegate_store_wal_size_bytes", "Bytes of its write-ahead log.", measured=True
    )
    store_free = Metric(
        Gauge, "scopegate_store_free_bytes", "Bytes free on the disk of the database.", measured=True
    )
    store_growth = Metric(
        Gauge,
        "scopegate_store_growth_bytes",
        "Bytes added in the last 24 hours, by the share of their records.",
        measured=True,
    )
    unsettled = Metric(Gauge, "scopegate_unsettled", "Settlements kept in memory until the store takes them.")
    unknown = Metric(
        Gauge,
        "scopegate_unknown_executions",
        "Executions with an unknown outcome that wait to be reconciled.",
        measured=True,
    )
    running = Metric(
        Gauge,
        "scopegate_running_executions",
        "Executions that were answered and wait for their report.",
        measured=True,
    )
    credential_echoes = Metric(
        Counter,
        "scopegate_credential_echoes",
        "Answers of the backend that contain a credential of upstream.credentials.",
    )
    freezes_active = Metric(
        Gauge,
        "scopegate_freezes_active",
        "Freezes that stop executions now.",
        measured=True,
    )
    oldest_unknown = Metric(
        Gauge,
        "scopegate_oldest_unknown_execution_seconds",
        "Age of the oldest execution that waits to be reconciled; 0: none does.",
        measured=True,
    )
    checkpoint_failures = Metric(
        Counter, "scopegate_checkpoint_failures", "Checkpoints that could not be written."
    )
    checkpoint_seq = Metric(
        Gauge,
        "scopegate_checkpoint_seq",
        "Records that the last checkpoint attests; 0: none since the start.",
    )
    reloads = Metric(
        Counter,
        "scopegate_reloads",
        "Reloads of configuration and policies: ok, unchanged, or refused.",
        result={
            "ok": "something changed and is in force",
            "unchanged": "nothing was different",
            "refused": "the files cannot be used; the old ones stay in force",
        },
        zero="all",
    )
    last_reload_success = Metric(
        Gauge,
        "scopegate_last_reload_success",
        "Whether the last reload, or else the start, could use the files: 1 or 0.",
    )
    last_reload_time = Metric(
        Gauge,
        "scopegate_last_reload_timestamp_seconds",
        "When the last reload, or else the start, was; in seconds since 1970.",
    )
    certificate_expiry = Metric(
        Gauge,
        "scopegate_certificate_expiry_timestamp_seconds",
        "When the certificate in use expires, in seconds since 1970.",
        listener={"data": "", "admin": "", "ops": "", "upstream": "the client certificate for the backend"},
    )
    ready = Metric(
        Gauge,
        "scopegate_ready",
        "Each check of /health/ready: 1 passes, 0 fails. Send clients here only while all are 1.",
        check={
            "store": "the store can write (checked at most ten seconds ago)",
            "log": "the last decisions could be recorded",
            "policies": "a valid set is loaded",
            "clock": "the clock is not behind the log",
            "credentials": "the credentials of `upstream.credentials` can be read; only if there are any",
            "draining": "the sidecar is not shutting down",
        },
    )
    log_lines_dropped = Metric(
        DroppedLines,
        "scopegate_log_lines_dropped",
        "Log lines that were not written, because standard error was not read in time.",
    )
    build_info = Metric(
        Gauge,
        "scopegate_build_info",
        "Always 1; the labels hold the versions.",
        version="the release",
        python="the version of Python",
    )

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        for row in TABLE:
            vars(self)[row.attribute] = row.make(self.registry)
        self.build_info.labels(__version__, platform.python_version()).set(1)

    def expect(self, routes: Iterable[str]) -> None:
        """Show the executions of these routes from now on, with 0.

        Prometheus' increase() does not see the first event of a series that begins with it.
        """
        for route in routes:
            for outcome in Metrics.executions.labels["outcome"]:
                self.executions.labels(outcome, route)

    def batch_committed(self, size: int, seconds: float) -> None:
        self.batch_size.observe(size)
        self.batch_seconds.observe(seconds)

    def batch_failed(self, size: int) -> None:
        del size
        self.store_failures.inc()

    def page(self) -> bytes:
        """The metrics in the Prometheus text format 0.0.4."""
        return generate_latest(self.registry)


TABLE: tuple[Metric[Any], ...] = tuple(row for row in vars(Metrics).values() if isinstance(row, Metric))
