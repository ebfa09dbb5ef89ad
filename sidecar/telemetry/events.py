"""Every log line of the sidecar, as one table. A call site is `LogEvent.DRAINING.log(in_flight=3, ...)`.

To add an event, add a row to `LogEvent` and call it, then run `python -m tests.reference`, which writes
config/cookbook/logs.md. Messages and the names of fields are a stable interface. No line carries a secret or
a body.

A scope_id is shown in its short form, which this module makes of the field `scope_id`.

A line goes through `logging`, as the lines of any library, unless nothing but the queue of a served process
would hear it. Then it goes straight into that queue, because a record of `logging` and its way to the handler
take several times as long as the line itself.
"""

from __future__ import annotations

import json
import logging
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from enum import Enum
from functools import cached_property, partialmethod
from logging import DEBUG, ERROR, INFO, WARNING
from typing import Any

from sidecar.core.shortid import short_id

# The fields that a log line can carry beside time, level, logger, message and exc_info.
FIELDS: Mapping[str, str] = {
    "action": "the action that the request named; null: none could be read",
    "actions": "the number of actions, and of globs of actions, in the catalogue in force",
    "address": "where the listener listens, host:port, with the port that the system chose for port 0",
    "attempt_number": "the number of the attempt in its scope; null: the execution needed no scope",
    "batch_size": "the number of commands in the transaction",
    "bound": "the bound of the scope that refused; null: it was no bound",
    "bytes": "the number of bytes sent of the answer's body",
    "cause": "the reason that the store, the system or the backend gave; of a reload: what started it",
    "changed": "the keys that a reload changed, and `policies`",
    "checkpoint_file": "the file that checkpoints are appended to",
    "config_revision": "the hash of the configuration that is now in force",
    "connections": "the number of connections that the data listener may hold",
    "count": "how many executions, settlements, refusals, connections or lines the line is about",
    "decision_id": "the decision record; of an execution, the one that admitted it; null: none is recorded",
    "drain_seconds": "the time that requests in flight have to end",
    "duration_ms": "milliseconds from the request's head to the end of its answer",
    "error": "the error code of the answer",
    "ends_at": "when the freeze ends; null: when it is lifted",
    "excepted": "the paths that pass in any case, by `gate.unlisted.except`",
    "errors": "every mistake in the files, each with file, line, column and key",
    "freeze_id": "the freeze, which is also the decision that set it",
    "frozen": "what is frozen, in words",
    "gated_routes": "the number of routes that are enforced",
    "ignored": "the keys of the set that verify no signatures here, each with its place and the reason",
    "header": "the header of the credential",
    "http_status": "the status of the backend's answer; null: there was none",
    "in_flight": "the number of gated requests under way",
    "incident_id": "the incident that the request named",
    "limit": "how many connections the listener may hold, or how many files the process may have open",
    "listener": "`data`, `admin` or `ops`; of certificates also `upstream`",
    "method": "the method of the request",
    "old_actions": "`actions` before the reload",
    "old_config_revision": "`config_revision` before the reload",
    "old_gated_routes": "`gated_routes` before the reload",
    "old_policy_revision": "`policy_revision` before the reload",
    "old_rules": "`rules` before the reload",
    "other_writers": "the databases whose checkpoints the file already holds",
    "outcome": "how it ended: of a request `answered`, `replayed` (the answer of an earlier one under its "
    "`Idempotency-Key`), an error code, or the end of a pass-through request; "
    "of a reconciled execution `executed` or `not_executed`",
    "path": "the path of the request, without its query",
    "principal": "the id of the caller that asked for it",
    "policy_revision": "the hash of the policies that are now in force",
    "says": "one sentence about what callers may do, and why",
    "reason": "why, as the caller says",
    "reads": "what becomes of unlisted GET, HEAD, OPTIONS and WebSockets: `pass`, `record` or `refuse`",
    "remote": "the address of the client, or of the proxy before the sidecar",
    "request_id": "the request's X-Request-Id; the sidecar makes one for a request without it",
    "route": "where the request went: `gated`, `scopes` and `reports` (the sidecar's own calls) or `passed`",
    "routes": "the paths of the routes in shadow mode",
    "rule": "the rule in shadow mode; null: the route or the scope would have refused",
    "rules": "the rules that refused; of a reload: the number of rules",
    "scope_id": "the scope that the request named, or that was spent, in its short form: `scope_` "
    "and 8 characters",
    "settled": "whether the outcome is written; false: it waits in memory for the store",
    "shadowed": "the keys whose value in the file is overridden by the environment or a flag",
    "span_id": "the caller's span, from its traceparent header",
    "status": "the status that the client got; null: none, 499: the client left before",
    "step_seconds": "how far accepting the wall clock moved the sidecar's time; below 0: back",
    "tokens": "the number of tokens",
    "trace_id": "the trace, from the request's traceparent header",
    "valid_until": "when the certificate expires",
    "writes": "what becomes of unlisted requests of all other methods: `pass`, `record` or `refuse`",
    "writer": "the database that is in use, by its name in the log",
}

# What each logger is about.
LOGGERS: dict[str, str] = {}


class EventQueue(logging.Handler, ABC):
    """A handler of `logging` that takes events as well as records."""

    @abstractmethod
    def put(self, event: LogEvent, fields: dict[str, Any]) -> None:
        """Write the line of an event that happens now. It keeps `fields`."""


# The queue that the root logger had as its only handler when `never_wait_for_logs` was called, if any. Events
# go straight into it while it still is the only one.
QUEUE_ALONE: list[EventQueue] = []


class _Logger:
    """Makes the rows of a logger: message, what it means and what to do, fields."""

    def __init__(self, name: str, about: str) -> None:
        self.name = name
        LOGGERS[name] = about

    def _row(
        self, level: int, message: str, meaning: str, fields: str = ""
    ) -> tuple[str, int, str, str, str]:
        return self.name, level, message, meaning, fields

    debug = partialmethod(_row, DEBUG)
    info = partialmethod(_row, INFO)
    warning = partialmethod(_row, WARNING)
    error = partialmethod(_row, ERROR)


_SIDECAR = _Logger("scopegate", "Starting and stopping.")
_ACCESS = _Logger(
    "scopegate.access",
    "The access log: one line for each request on the data listener (`telemetry.access_log`).",
)
_AUTH = _Logger("scopegate.auth", "How callers prove who they are.")
_CHECKPOINTS = _Logger("scopegate.checkpoints", "Signed checkpoints of the decision log.")
_DECISIONS = _Logger("scopegate.decisions", "Decision records, in a Python program that embeds the library.")
_GATE = _Logger("scopegate.gate", "Gated requests.")
_LIBRARY = _Logger("scopegate.library", "Scopes and executions, in a Python program that embeds the library.")
_PASSTHROUGH = _Logger("scopegate.passthrough", "Requests that pass through.")
_RELOAD = _Logger("scopegate.reload", "Configuration and policies.")
_STORE = _Logger("scopegate.store", "The database.")
_TLS = _Logger(
    "scopegate.tls", "The certificates of the listeners, and the client certificate for the backend."
)
_TRACING = _Logger("scopegate.tracing", "Traces for OpenTelemetry.")
_UPSTREAM = _Logger("scopegate.upstream", "The client for the backend.")
_WEB = _Logger("scopegate.web", "The listeners.")

_ROOT = logging.getLogger()
_TOP = logging.getLogger(_SIDECAR.name)

_BUG = "This is a bug in the sidecar: report it, with the log around it."
_RECONCILE = "`scopegate executions list --status unknown` lists the executions to reconcile."
_STORE_FAILS = "Look for the cause in the store."

_EXECUTION = (
    "decision_id request_id scope_id incident_id action attempt_number http_status cause settled "
    "trace_id? span_id?"
)
_CLAIMS = "request_id scope_id incident_id action"
_TERMS = (
    "actions rules gated_routes old_actions old_rules old_gated_routes cause changed shadowed "
    "policy_revision old_policy_revision config_revision old_config_revision"
)


class LogEvent(Enum):
    """One log line each: its logger and level, its message, what it means and what to do, and its fields.

    A message takes the positional arguments of `log` as `%s`. Fields are names from FIELDS; a line may lack a
    field that ends with `?`. The field `exc_info` says that a traceback comes with the line.
    """

    # Starting and stopping
    OPEN_DOOR = _SIDECAR.warning(
        "anyone who reaches the data listener can issue scopes; set scopes.serve_on: admin to prevent it",
        "The data listener is open to other hosts and issues scopes to every client.",
    )
    UNKNOWN_VARIABLE = _SIDECAR.warning(
        "%s", "An environment variable begins with `SCOPEGATE_` and names no key. The sidecar ignores it."
    )
    LOW_FILE_LIMIT = _SIDECAR.warning(
        "the file limit leaves the data listener fewer connections than gate.max_in_flight; raise it",
        "Raise the hard limit of open files, or lower `upstream.max_connections`.",
        "limit connections",
    )
    DRAINING = _SIDECAR.info(
        "draining", "SIGTERM or SIGINT came. The sidecar accepts no new requests.", "in_flight drain_seconds"
    )
    DRAIN_IS_OVER = _SIDECAR.warning(
        "the drain is over; executions end as unknown",
        f"They took longer than `shutdown.drain_seconds`. {_RECONCILE}",
        "count",
    )
    LINES_DROPPED = _SIDECAR.warning(
        "log lines were dropped",
        "The reader of standard error is too slow. The decision log is complete.",
        "count",
    )
    STOPPED = _SIDECAR.info("stopped", "The end of an orderly stop.")
    STOPPED_DURING_START = _SIDECAR.info(
        "stopping before the start was complete",
        "SIGTERM or SIGINT came while the store was being opened. The sidecar served nothing.",
    )
    START_HANGS = _SIDECAR.error(
        "the start cannot be ended in time; the storage may hang",
        "Opening the store took longer than `shutdown.drain_seconds` after SIGTERM. The process ends with "
        "code 1. Check the disk.",
    )

    # Requests
    REQUEST = _ACCESS.info(
        "request",
        "A request was answered, or its connection broke.",
        "method path status duration_ms bytes remote route outcome request_id decision_id scope_id trace_id",
    )
    EXECUTED = _GATE.info("executed", "The backend answered a gated request.", _EXECUTION)
    ENDED_OTHERWISE = _GATE.info(
        "execution %s",
        "`execution not_sent` or `execution unknown`: no answer came. `cause` gives the reason. `execution "
        "not_executed`: the status of the answer says so. `execution running`: its end will be reported.",
        _EXECUTION,
    )
    REPORTED = _GATE.info(
        "execution reported",
        "The end of an execution was reported with its completion token.",
        "decision_id outcome scope_id incident_id action",
    )
    REPORT_REFUSED = _GATE.warning(
        "a report was refused",
        "The completion token is missing or wrong, or no longer valid. Nothing changed. If the backend sent "
        "it, raise `completion_timeout_seconds` of the route; otherwise someone guesses tokens.",
        "decision_id?",
    )
    REPORT_MISSING = _GATE.warning(
        "an execution was not reported in time",
        f"The execution is unknown now. Find out why the backend did not report. {_RECONCILE}",
        "decision_id scope_id incident_id action",
    )
    REFUSED = _GATE.info(
        "refused",
        "A gated request, a request for a scope, or one that no route lists was refused. `error` gives the "
        "reason.",
        f"error bound rules decision_id {_CLAIMS}",
    )
    REPLAYED = _GATE.info(
        "replayed",
        "A request repeated an earlier one under its `Idempotency-Key`, and got the answer of that. "
        "`decision_id` names the earlier execution.",
        f"decision_id http_status {_CLAIMS}",
    )
    WOULD_BE_REFUSED = _GATE.info(
        "would be refused",
        "A rule or a route in shadow mode would have refused this request. It went through.",
        f"error rule {_CLAIMS}",
    )
    REFUSED_UNRECORDED = _GATE.warning(
        "refused, not recorded",
        "The store did not work, so this line is the only trace of the refusal: keep it. `cause` gives the "
        "store's error.",
        f"error cause count {_CLAIMS}",
    )
    SETTLEMENT_WAITS = _GATE.warning(
        "a settlement waits for the store",
        "The client has its answer; the outcome waits in memory. Do not restart before "
        "`scopegate_unsettled` is 0.",
        "decision_id cause",
    )
    SETTLEMENT_LOST = _GATE.error(
        "a settlement is lost; its execution is unknown after a restart",
        "More than 10,000 settlements waited for the store, or the store can never write this one. Reconcile "
        "`decision_id` after the next start.",
        "decision_id cause",
    )
    SETTLEMENTS_LOST = _GATE.error(
        "settlements are lost; their executions are unknown after a restart",
        f"The sidecar stopped while the store did not work. After the next start {_RECONCILE}",
        "count",
    )
    LATE_GRANT_REVOKED = _GATE.warning(
        "a scope was granted too late and is revoked",
        "The store was slow, so the caller got 503 and does not know the scope. The record of the revocation "
        "gives the reason.",
        "decision_id scope_id incident_id",
    )
    LATE_GRANT_STANDS = _GATE.error(
        "a scope that was granted too late could not be revoked",
        "The caller does not know the scope, which may stand until it expires. Revoke `scope_id`.",
        "scope_id cause",
    )
    GATED_REQUEST_FAILED = _GATE.error(
        "a gated request failed",
        f"The client got 500 and nothing was forwarded. {_BUG}",
        "request_id? exc_info",
    )
    GATED_REQUEST_HANGS = _GATE.error(
        "a gated request did not end in time",
        f"A part of it hung. The client got 5xx; what may have been sent is unknown. {_BUG}",
        "request_id decision_id",
    )
    FORWARDING_FAILED = _GATE.error(
        "forwarding failed",
        f"The execution is unknown until it is reconciled. {_BUG}",
        "decision_id exc_info",
    )
    PASSING_CUT = _PASSTHROUGH.info(
        "an answer passing through was cut",
        "The backend broke off its answer, and the client got the same broken answer.",
        "cause",
    )

    # Listeners and the sidecar's own calls
    LISTENING = _WEB.info(
        "listening", "A listener is open. The sidecar is up once all three are open.", "listener address"
    )
    FILE_LIMIT_STAYS = _WEB.info(
        "the file limit stays as it is", "The system did not let the process raise it.", "cause limit"
    )
    CANNOT_ACCEPT = _WEB.error(
        "cannot accept connections",
        "The process has run out of file descriptors or memory; `cause` says which. It tries again ten times "
        "a second, and logs this once a second at most. Raise the file limit (`ulimit -n`).",
        "listener cause",
    )
    TOO_MANY_CONNECTIONS = _WEB.warning(
        "too many connections",
        "The listener reset `count` connections beyond `limit` since the last such line, which it logs once "
        "a minute at most. Find out which clients connect; for `data`, raise the file limit.",
        "listener limit count",
    )
    CONNECTION_BROKE_OFF = _WEB.debug(
        "a connection broke off", "The client closed a connection as soon as it was open.", "listener cause"
    )
    HANDSHAKE_BROKE_OFF = _WEB.debug(
        "a TLS handshake broke off",
        "The client left during the handshake. It may be a port probe.",
        "listener cause",
    )
    HANDSHAKE_FAILED = _WEB.info(
        "a TLS handshake failed",
        "The client speaks no TLS or too old a version, does not trust the certificate, or lacks the client "
        "certificate that the listener requires.",
        "listener cause",
    )
    UNPARSABLE = _WEB.info(
        "a request could not be parsed", "The request is not valid HTTP. The client got 400.", "cause"
    )
    REQUEST_FAILED = _WEB.error("a request failed", f"The client got 500. {_BUG}", "method? path? exc_info")
    UNDECIDED = _WEB.error(
        "a gated request was not decided in time",
        f"Reading it or recording its refusal hung. The client got 503 and nothing was forwarded. {_BUG}",
        "request_id",
    )
    FOREIGN = _WEB.warning(
        "refused by its host or its site",
        "A call of the sidecar itself named a host that is not the listener's (`error` is "
        "`misdirected_request`), or a browser sent a change from another site (`cross_site`). Put the name "
        "of a proxy before the listener into `allowed_hosts`. Any other such request may be a web page that "
        "attacks.",
        "listener method error",
    )
    CLOCK_ACCEPTED = _WEB.warning(
        "the wall clock was accepted",
        "An operator accepted the wall clock. The sidecar's time moved by `step_seconds`.",
        "decision_id step_seconds",
    )
    CREDENTIAL_RENEWED = _UPSTREAM.info(
        "a credential for the backend is renewed",
        "The value of a credential of `upstream.credentials` has changed, or can be read again.",
        "header",
    )
    CREDENTIAL_LOST = _UPSTREAM.error(
        "a credential for the backend cannot be read",
        "Requests that need it are refused with 503 before they consume anything. Put the file back.",
        "cause header",
    )
    CREDENTIAL_ECHOED = _UPSTREAM.warning(
        "the backend sends a credential back",
        "An answer contains a credential of `upstream.credentials`, so its client has seen it. Replace it.",
        "request_id",
    )
    FROZEN = _WEB.warning(
        "frozen",
        "An operator froze executions: none that matches is admitted.",
        "freeze_id principal frozen reason ends_at",
    )
    UNFROZEN = _WEB.info(
        "unfrozen",
        "An operator lifted a freeze.",
        "freeze_id principal reason",
    )
    RECONCILED = _WEB.info(
        "reconciled",
        "An operator said how an unknown or a running execution ended.",
        "decision_id outcome scope_id",
    )

    # Configuration, policies, certificates
    RELOADED = _RELOAD.info(
        "reloaded",
        "A new configuration or new policies are in force; `changed` lists the differences.",
        _TERMS,
    )
    RELOADED_WITH_FEWER = _RELOAD.warning(
        "reloaded with fewer %s",
        "There are fewer actions, rules or gated routes than before: check whether a file was truncated.",
        _TERMS,
    )
    RELOADED_UNCHANGED = _RELOAD.info(
        "reloaded; nothing is different", "The files say the same as what is in force.", _TERMS
    )
    RELOAD_REFUSED = _RELOAD.error(
        "reload refused; the old configuration and policies stay in force",
        "`errors` lists every mistake, as `scopegate check` does. Correct the files: the sidecar reads them "
        "again by itself.",
        "cause errors",
    )
    TOKENS_RELOADED = _RELOAD.info(
        "the tokens are renewed, although the reload is refused",
        "The file of tokens is valid and has changed. It takes effect although another file is wrong, so "
        "that a revoked token stops working.",
        "tokens",
    )
    RELOAD_IMPOSSIBLE = _RELOAD.warning("reload refused", "The sidecar is shutting down.", "cause errors")
    RELOAD_FAILED = _RELOAD.error(
        "reading configuration and policies failed", f"The old ones stay in force. {_BUG}", "exc_info"
    )
    OPEN_CALLS = _RELOAD.info(
        "every caller may do everything",
        "No method of `auth` is configured, which `says` explains. The line comes at the start.",
        "says",
    )
    NO_ROLES = _RELOAD.warning(
        "no caller holds a role",
        "List `roles:` in the policies; until then callers get 403, as `says` explains.",
        "says",
    )
    SCOPELESS_ACTIONS = _RELOAD.warning(
        "actions below %s risk need no scope",
        "`gate.scope_required_from` says so. These actions are still recorded.",
    )
    SHADOW_ROUTES = _RELOAD.warning(
        "routes in shadow mode protect nothing, they only record",
        "Set `mode: enforce` once these routes would refuse only what they should.",
        "routes",
    )
    UNLISTED = _RELOAD.info(
        "what becomes of requests that no route lists",
        "`gate.unlisted` says so. The line comes at the start, and when a reload changes that.",
        "reads writes excepted",
    )
    CERTIFICATE_RENEWED = _TLS.info(
        "certificate renewed", "New connections get the new certificate.", "listener valid_until"
    )
    CERTIFICATE_EXPIRED = _TLS.warning(
        "certificate has expired; renew it",
        "Clients refuse to connect. Replace the certificate.",
        "listener valid_until",
    )
    CERTIFICATE_NOT_RENEWED = _TLS.error(
        "certificate not renewed; the old one stays in force",
        "The files changed and cannot be used; `cause` gives the reason. Correct them: the sidecar reads "
        "them again by itself.",
        "listener cause",
    )
    RENEWAL_FAILED = _TLS.error(
        "looking for a renewed certificate failed", f"The old certificate stays in force. {_BUG}", "exc_info"
    )

    # The keys of an issuer
    ISSUER_KEYS_IN_FORCE = _AUTH.info(
        "the keys of the issuer are in force",
        "The set of `auth.jwt.jwks` was read for the first time, has changed, or can be read again.",
        "count ignored",
    )
    ISSUER_KEYS_KEPT = _AUTH.error(
        "the keys of the issuer could not be read; the last good ones stay in force",
        "`cause` gives the reason. The sidecar tries again by itself. A key that the issuer has withdrawn "
        "meanwhile is still accepted.",
        "cause",
    )
    ISSUER_KEYS_MISSING = _AUTH.warning(
        "no key of the issuer is known; every JSON Web Token is refused",
        "The set of `auth.jwt.jwks` could not be read since the start; `cause` gives the reason. The sidecar "
        "tries again by itself.",
        "cause",
    )
    ISSUER_KEYS_FAILED = _AUTH.error(
        "fetching the keys of the issuer failed", f"The keys in force stay. {_BUG}", "exc_info"
    )

    # The store and its log
    COMMIT_FAILED = _STORE.error(
        "a batch could not be committed",
        "Its requests got 503. `cause` is the database's error: disk full, read-only, file moved.",
        "cause batch_size",
    )
    COMMAND_FAILED = _STORE.error(
        "a command could not be applied", f"Its request got 503. {_BUG}", "exc_info"
    )
    HEAD_UNREADABLE = _STORE.error(
        "the head of the log cannot be read",
        "The database is damaged. The sidecar decides nothing until it is whole: restore a backup.",
        "exc_info",
    )
    STORE_HANGS = _STORE.error(
        "the store hangs and cannot be closed; what it was writing may be lost",
        f"The disk does not respond. After the next start {_RECONCILE}",
    )
    HOUSEKEEPING_FAILED = _STORE.warning(
        "housekeeping of the store failed",
        "The write-ahead log was not emptied; `cause` gives the reason. The sidecar tries again.",
        "cause",
    )
    LEFT_UNKNOWN = _STORE.warning(
        "executions without an outcome are now unknown; reconcile them",
        f"The previous sidecar was killed. {_RECONCILE}",
        "count",
    )
    CHECKPOINT_FAILED = _CHECKPOINTS.error(
        "a checkpoint could not be written",
        "The sidecar tries again in ten seconds. Until it succeeds, records that are cut off the log's end "
        "cannot be noticed: check the disk and the folder of `log.checkpoint_file`.",
        "cause checkpoint_file",
    )
    FOREIGN_CHECKPOINTS = _CHECKPOINTS.warning(
        "the checkpoint file holds checkpoints of another database, so this log will verify as tampered "
        "with: give a new log.checkpoint_file, or put the old database back",
        "The message says what to do.",
        "checkpoint_file writer other_writers",
    )

    # Traces
    SPANS_LOST = _TRACING.warning(
        "spans are lost; the collector did not take them in time",
        "Decisions are not affected. Check whether the collector is up.",
    )
    TRACING_FAILED = _TRACING.warning(
        "tracing does not work as it should",
        "`cause` is the error of the OpenTelemetry library, most often about the collector.",
        "cause",
    )

    # Python programs that embed the library
    EMISSION_UNCONFIRMED = _DECISIONS.error(
        "the store did not confirm %s: %s",
        "The record may be missing in the log; `scopegate_library_emissions_failed_total` counts these. "
        f"{_STORE_FAILS}",
        "exc_info?",
    )
    LOOKUP_FAILED = _DECISIONS.warning(
        "the store cannot say whether a decision is recorded: %s",
        f"The decision counts as not recorded. {_STORE_FAILS}",
    )
    KILL_SWITCH_UNREADABLE = _DECISIONS.warning(
        "the store cannot say whether the kill switch is on, so it counts as on: %s",
        f"Routing is not optimized meanwhile. {_STORE_FAILS}",
    )
    END_UNCONFIRMED = _LIBRARY.error(
        "the end of an execution may not have been written down; then it is unknown after a restart",
        "Check in the target system whether `decision_id` was executed, and reconcile it.",
        "decision_id cause",
    )

    def __init__(self, logger: str, level: int, message: str, meaning: str, fields: str) -> None:
        names = fields.split()
        self.logger = logging.getLogger(logger)
        self.level = level
        self.message = message
        self.fields = tuple(name.removesuffix("?") for name in names)
        self.optional_fields = frozenset(name[:-1] for name in names if name.endswith("?"))
        self.meaning = meaning
        # What each of its lines begins with.
        self.members = {"level": logging.getLevelName(level), "logger": logger, "message": message}

    @cached_property
    def json_head(self) -> bytes:
        """The beginning of its lines in JSON, up to the first field, in ASCII."""
        return json.dumps(self.members, separators=(",", ":"))[:-1].encode() + b","

    def log(self, *args: object, exc: BaseException | None = None, **fields: Any) -> None:
        """Write the line. `args` fill the message's `%s`; the traceback of `exc` comes with it, if given.

        The values of `fields` are strings, finite numbers, booleans, None, or sequences of strings.
        """
        if not args and exc is None:
            self.log_fields(fields)
        elif self.logger.isEnabledFor(self.level):
            _shorten(fields)
            self._handle(args, exc, fields)

    def log_fields(self, fields: dict[str, Any]) -> None:
        """As `log(**fields)`, in half the time, for the lines of every request. It keeps the dictionary."""
        if not self.logger.isEnabledFor(self.level):
            return
        _shorten(fields)
        if (
            QUEUE_ALONE
            and _ROOT.handlers == QUEUE_ALONE
            and not (self.logger.handlers or self.logger.filters or _TOP.handlers)
        ):
            QUEUE_ALONE[0].put(self, fields)
        else:
            self._handle((), None, fields)

    def _handle(self, args: tuple[object, ...], exc: BaseException | None, fields: Mapping[str, Any]) -> None:
        # As Logger._log does it, without the part of its walk up the stack that takes longer.
        site = sys._getframe(2)
        if site.f_code.co_filename == __file__ and site.f_back is not None:
            site = site.f_back
        code = site.f_code
        trace = None if exc is None else (type(exc), exc, exc.__traceback__)
        record = logging.getLogRecordFactory()(
            self.logger.name,
            self.level,
            code.co_filename,
            site.f_lineno,
            self.message,
            args,
            trace,
            code.co_name,
        )
        vars(record).update(fields)
        self.logger.handle(record)


def _shorten(fields: dict[str, Any]) -> None:
    scope_id = fields.get("scope_id")
    if scope_id is not None:
        fields["scope_id"] = short_id(scope_id)
