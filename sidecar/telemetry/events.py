"""Every log line of the sidecar, as one table. A call site is `LogEvent.DRAINING.log(in_flight=3, ...)`.

To add an event, add a row to `LogEvent` and call it, then run `python -m tests.reference`, which writes
config/cookbook/logs.md. Messages and the names of fields are a stable interface. No line carries a secret or
a body.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from enum import Enum
from logging import DEBUG, ERROR, INFO, WARNING
from typing import Any

# What each logger is about.
LOGGERS: Mapping[str, str] = {
    "scopegate": "Starting and stopping.",
    "scopegate.access": "The access log: one line for each request on the data listener "
    "(`telemetry.access_log`).",
    "scopegate.checkpoints": "Signed checkpoints of the decision log.",
    "scopegate.decisions": "Decision records, in a Python program that embeds the library.",
    "scopegate.gate": "Gated requests.",
    "scopegate.library": "Scopes and executions, in a Python program that embeds the library.",
    "scopegate.passthrough": "Requests that pass through.",
    "scopegate.reload": "Configuration and policies.",
    "scopegate.store": "The database.",
    "scopegate.tls": "The certificates of the listeners, and the client certificate for the backend.",
    "scopegate.tracing": "Traces for OpenTelemetry.",
    "scopegate.web": "The listeners.",
}

# The fields that a log line can carry beside time, level, logger, message and exc_info.
FIELDS: Mapping[str, str] = {
    "action": "the action that the request named; null: none could be read",
    "actions": "the number of actions in the catalogue in force",
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
    "count": "the number of executions, settlements, refusals or connections that the line is about",
    "decision_id": "the decision record; of an execution, the one that admitted it; null: none is recorded",
    "drain_seconds": "the time that requests in flight have to end",
    "duration_ms": "milliseconds from the request's head to the end of its answer",
    "error": "the error code of the answer",
    "errors": "every mistake in the files, each with file, line, column and key",
    "gated_routes": "the number of routes that are enforced",
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
    "outcome": "how it ended: of a request `answered`, an error code, or the end of a pass-through request; "
    "of a reconciled execution `executed` or `not_executed`",
    "path": "the path of the request, without its query",
    "policy_revision": "the hash of the policies that are now in force",
    "remote": "the address of the client, or of the proxy before the sidecar",
    "request_id": "the request's X-Request-Id; the sidecar makes one for a request without it",
    "route": "where the request went: `gated`, `scopes` (the sidecar's own calls) or `passed`",
    "routes": "the paths of the routes in shadow mode",
    "rule": "the rule in shadow mode; null: the route or the scope would have refused",
    "rules": "the rules that refused; of a reload: the number of rules",
    "scope_id": "the scope that the request named, or that was spent",
    "settled": "whether the outcome is written; false: it waits in memory for the store",
    "shadowed": "the keys whose value in the file is overridden by the environment or a flag",
    "span_id": "the caller's span, from its traceparent header",
    "status": "the status that the client got; null: none, 499: the client left before",
    "step_seconds": "how far accepting the wall clock moved the sidecar's time; below 0: back",
    "trace_id": "the trace, from the request's traceparent header",
    "valid_until": "when the certificate expires",
    "writer": "the database that is in use, by its name in the log",
}

_BUG = "This is a bug in the sidecar: report it, with the log around it."
_RECONCILE = "`scopegate executions list --status unknown` lists the executions to reconcile."
_STORE = "Look for the cause in the store."

_EXECUTION = (
    "decision_id request_id scope_id incident_id action attempt_number http_status cause settled "
    "trace_id? span_id?"
)
_CLAIMS = "request_id scope_id incident_id action"
_RELOAD = (
    "actions rules gated_routes old_actions old_rules old_gated_routes cause changed shadowed "
    "policy_revision old_policy_revision config_revision old_config_revision"
)


class LogEvent(Enum):
    """One log line each: logger, level, message, fields, and what it means and what to do.

    A message takes the positional arguments of `log` as `%s`. Fields are names from FIELDS; a line may lack a
    field that ends with `?`. The field `exc_info` says that a traceback comes with the line.
    """

    # Starting and stopping
    OPEN_DOOR = (
        "scopegate",
        WARNING,
        "whoever reaches the data listener can issue scopes; set scopes.serve_on: admin to prevent it",
        "",
        "The data listener is open to other hosts and issues scopes to every client.",
    )
    UNKNOWN_VARIABLE = (
        "scopegate",
        WARNING,
        "%s",
        "",
        "An environment variable begins with `SCOPEGATE_` and names no key. The sidecar ignores it.",
    )
    LOW_FILE_LIMIT = (
        "scopegate",
        WARNING,
        "the file limit leaves the data listener fewer connections than gate.max_in_flight; raise it",
        "limit connections",
        "Raise the hard limit of open files, or lower `upstream.max_connections`.",
    )
    DRAINING = (
        "scopegate",
        INFO,
        "draining",
        "in_flight drain_seconds",
        "SIGTERM or SIGINT came. The sidecar accepts no new requests.",
    )
    DRAIN_IS_OVER = (
        "scopegate",
        WARNING,
        "the drain is over; executions end as unknown",
        "count",
        f"They took longer than `shutdown.drain_seconds`. {_RECONCILE}",
    )
    STOPPED = ("scopegate", INFO, "stopped", "", "The end of an orderly stop.")
    STOPPED_DURING_START = (
        "scopegate",
        INFO,
        "stopping before the start was complete",
        "",
        "SIGTERM or SIGINT came while the store was being opened. The sidecar served nothing.",
    )
    START_HANGS = (
        "scopegate",
        ERROR,
        "the start cannot be ended in time; the storage may hang",
        "",
        "Opening the store took longer than `shutdown.drain_seconds` after SIGTERM. The process ends with "
        "code 1. Check the disk.",
    )

    # Requests
    REQUEST = (
        "scopegate.access",
        INFO,
        "request",
        "method path status duration_ms bytes remote route outcome request_id decision_id scope_id trace_id",
        "A request was answered, or its connection broke.",
    )
    EXECUTED = (
        "scopegate.gate",
        INFO,
        "executed",
        _EXECUTION,
        "The backend answered a gated request.",
    )
    NOT_ANSWERED = (
        "scopegate.gate",
        INFO,
        "execution %s",
        _EXECUTION,
        "`execution not_sent` or `execution unknown`: no answer came. `cause` gives the reason.",
    )
    REFUSED = (
        "scopegate.gate",
        INFO,
        "refused",
        f"error bound rules decision_id {_CLAIMS}",
        "A gated request, or a request for a scope, was refused. `error` gives the reason.",
    )
    WOULD_BE_REFUSED = (
        "scopegate.gate",
        INFO,
        "would be refused",
        f"error rule {_CLAIMS}",
        "A rule or a route in shadow mode would have refused this request. It went through.",
    )
    REFUSED_UNRECORDED = (
        "scopegate.gate",
        WARNING,
        "refused, not recorded",
        f"error cause count {_CLAIMS}",
        "The store did not work, so this line is the only trace of the refusal: keep it. `cause` gives the "
        "store's error.",
    )
    SETTLEMENT_WAITS = (
        "scopegate.gate",
        WARNING,
        "a settlement waits for the store",
        "decision_id cause",
        "The client has its answer; the outcome waits in memory. Do not restart before "
        "`scopegate_unsettled` is 0.",
    )
    SETTLEMENT_LOST = (
        "scopegate.gate",
        ERROR,
        "a settlement is lost; its execution is unknown after a restart",
        "decision_id cause",
        "More than 10,000 settlements waited for the store, or the store can never write this one. Reconcile "
        "`decision_id` after the next start.",
    )
    SETTLEMENTS_LOST = (
        "scopegate.gate",
        ERROR,
        "settlements are lost; their executions are unknown after a restart",
        "count",
        f"The sidecar stopped while the store did not work. After the next start {_RECONCILE}",
    )
    LATE_GRANT_REVOKED = (
        "scopegate.gate",
        WARNING,
        "a scope was granted too late and is revoked",
        "decision_id scope_id incident_id",
        "The store was slow, so the caller got 503 and does not know the scope. The record of the revocation "
        "gives the reason.",
    )
    LATE_GRANT_STANDS = (
        "scopegate.gate",
        ERROR,
        "a scope that was granted too late could not be revoked",
        "scope_id cause",
        "The caller does not know the scope, which may stand until it expires. Revoke `scope_id`.",
    )
    GATED_REQUEST_FAILED = (
        "scopegate.gate",
        ERROR,
        "a gated request failed",
        "request_id? exc_info",
        f"The client got 500 and nothing was forwarded. {_BUG}",
    )
    GATED_REQUEST_HANGS = (
        "scopegate.gate",
        ERROR,
        "a gated request did not end in time",
        "request_id decision_id",
        f"A part of it hung. The client got 5xx; what may have been sent is unknown. {_BUG}",
    )
    FORWARDING_FAILED = (
        "scopegate.gate",
        ERROR,
        "forwarding failed",
        "decision_id exc_info",
        f"The execution is unknown until it is reconciled. {_BUG}",
    )
    PASSING_CUT = (
        "scopegate.passthrough",
        INFO,
        "an answer passing through was cut",
        "cause",
        "The backend broke off its answer, and the client got the same broken answer.",
    )

    # Listeners and the sidecar's own calls
    LISTENING = (
        "scopegate.web",
        INFO,
        "listening",
        "listener address",
        "A listener is open. The sidecar is up once all three are open.",
    )
    FILE_LIMIT_STAYS = (
        "scopegate.web",
        INFO,
        "the file limit stays as it is",
        "cause limit",
        "The system did not let the process raise it.",
    )
    CANNOT_ACCEPT = (
        "scopegate.web",
        ERROR,
        "cannot accept connections",
        "listener cause",
        "The process has run out of file descriptors or memory; `cause` says which. It tries again ten times "
        "a second, and logs this once a second at most. Raise the file limit (`ulimit -n`).",
    )
    TOO_MANY_CONNECTIONS = (
        "scopegate.web",
        WARNING,
        "too many connections",
        "listener limit count",
        "The listener reset `count` connections beyond `limit` since the last such line, which it logs once "
        "a minute at most. Find out which clients connect; for `data`, raise the file limit.",
    )
    CONNECTION_BROKE_OFF = (
        "scopegate.web",
        DEBUG,
        "a connection broke off",
        "listener cause",
        "The client closed a connection as soon as it was open.",
    )
    HANDSHAKE_BROKE_OFF = (
        "scopegate.web",
        DEBUG,
        "a TLS handshake broke off",
        "listener cause",
        "The client left during the handshake. It may be a port probe.",
    )
    HANDSHAKE_FAILED = (
        "scopegate.web",
        INFO,
        "a TLS handshake failed",
        "listener cause",
        "The client speaks no TLS or too old a version, does not trust the certificate, or lacks the client "
        "certificate that the listener requires.",
    )
    UNPARSABLE = (
        "scopegate.web",
        INFO,
        "a request could not be parsed",
        "cause",
        "The request is not valid HTTP. The client got 400.",
    )
    REQUEST_FAILED = (
        "scopegate.web",
        ERROR,
        "a request failed",
        "method? path? exc_info",
        f"The client got 500. {_BUG}",
    )
    UNDECIDED = (
        "scopegate.web",
        ERROR,
        "a gated request was not decided in time",
        "request_id",
        f"Reading it or recording its refusal hung. The client got 503 and nothing was forwarded. {_BUG}",
    )
    FOREIGN = (
        "scopegate.web",
        WARNING,
        "refused by its host or its site",
        "listener method error",
        "A call of the sidecar itself named a host that is not the listener's (`error` is "
        "`misdirected_request`), or a browser sent a change from another site (`cross_site`). Put the name "
        "of a proxy before the listener into `allowed_hosts`. Any other such request may be a web page that "
        "attacks.",
    )
    CLOCK_ACCEPTED = (
        "scopegate.web",
        WARNING,
        "the wall clock was accepted",
        "decision_id step_seconds",
        "An operator accepted the wall clock. The sidecar's time moved by `step_seconds`.",
    )
    RECONCILED = (
        "scopegate.web",
        INFO,
        "reconciled",
        "decision_id outcome scope_id",
        "An operator reported how an unknown execution ended.",
    )

    # Configuration, policies, certificates
    RELOADED = (
        "scopegate.reload",
        INFO,
        "reloaded",
        _RELOAD,
        "A new configuration or new policies are in force; `changed` lists the differences.",
    )
    RELOADED_WITH_FEWER = (
        "scopegate.reload",
        WARNING,
        "reloaded with fewer %s",
        _RELOAD,
        "There are fewer actions, rules or gated routes than before: check whether a file was truncated.",
    )
    RELOADED_UNCHANGED = (
        "scopegate.reload",
        INFO,
        "reloaded; nothing is different",
        _RELOAD,
        "The files say the same as what is in force.",
    )
    RELOAD_REFUSED = (
        "scopegate.reload",
        ERROR,
        "reload refused; the old configuration and policies stay in force",
        "cause errors",
        "`errors` lists every mistake, as `scopegate check` does. Correct the files: the sidecar reads them "
        "again by itself.",
    )
    RELOAD_IMPOSSIBLE = (
        "scopegate.reload",
        WARNING,
        "reload refused",
        "cause errors",
        "The sidecar is shutting down.",
    )
    RELOAD_FAILED = (
        "scopegate.reload",
        ERROR,
        "reading configuration and policies failed",
        "exc_info",
        f"The old ones stay in force. {_BUG}",
    )
    SCOPELESS_ACTIONS = (
        "scopegate.reload",
        WARNING,
        "actions below %s risk need no scope",
        "",
        "`gate.scope_required_from` says so. These actions are still recorded.",
    )
    SHADOW_ROUTES = (
        "scopegate.reload",
        WARNING,
        "routes in shadow mode protect nothing, they only record",
        "routes",
        "Set `mode: enforce` once these routes would refuse only what they should.",
    )
    CERTIFICATE_RENEWED = (
        "scopegate.tls",
        INFO,
        "certificate renewed",
        "listener valid_until",
        "New connections get the new certificate.",
    )
    CERTIFICATE_EXPIRED = (
        "scopegate.tls",
        WARNING,
        "certificate has expired; renew it",
        "listener valid_until",
        "Clients refuse to connect. Replace the certificate.",
    )
    CERTIFICATE_NOT_RENEWED = (
        "scopegate.tls",
        ERROR,
        "certificate not renewed; the old one stays in force",
        "listener cause",
        "The files changed and cannot be used; `cause` gives the reason. Correct them: the sidecar reads "
        "them again by itself.",
    )
    RENEWAL_FAILED = (
        "scopegate.tls",
        ERROR,
        "looking for a renewed certificate failed",
        "exc_info",
        f"The old certificate stays in force. {_BUG}",
    )

    # The store and its log
    COMMIT_FAILED = (
        "scopegate.store",
        ERROR,
        "a batch could not be committed",
        "cause batch_size",
        "Its requests got 503. `cause` is the database's error: disk full, read-only, file moved.",
    )
    COMMAND_FAILED = (
        "scopegate.store",
        ERROR,
        "a command could not be applied",
        "exc_info",
        f"Its request got 503. {_BUG}",
    )
    HEAD_UNREADABLE = (
        "scopegate.store",
        ERROR,
        "the head of the log cannot be read",
        "exc_info",
        "The database is damaged. The sidecar decides nothing until it is whole: restore a backup.",
    )
    STORE_HANGS = (
        "scopegate.store",
        ERROR,
        "the store hangs and cannot be closed; what it was writing may be lost",
        "",
        f"The disk does not respond. After the next start {_RECONCILE}",
    )
    HOUSEKEEPING_FAILED = (
        "scopegate.store",
        WARNING,
        "housekeeping of the store failed",
        "cause",
        "The write-ahead log was not emptied; `cause` gives the reason. The sidecar tries again.",
    )
    LEFT_UNKNOWN = (
        "scopegate.store",
        WARNING,
        "executions without an outcome are now unknown; reconcile them",
        "count",
        f"The previous sidecar was killed. {_RECONCILE}",
    )
    CHECKPOINT_FAILED = (
        "scopegate.checkpoints",
        ERROR,
        "a checkpoint could not be written",
        "cause checkpoint_file",
        "The sidecar tries again in ten seconds. Until it succeeds, records that are cut off the log's end "
        "cannot be noticed: check the disk and the folder of `log.checkpoint_file`.",
    )
    FOREIGN_CHECKPOINTS = (
        "scopegate.checkpoints",
        WARNING,
        "the checkpoint file holds checkpoints of another database, so this log will verify as tampered "
        "with: give a new log.checkpoint_file, or put the old database back",
        "checkpoint_file writer other_writers",
        "The message says what to do.",
    )

    # Traces
    SPANS_LOST = (
        "scopegate.tracing",
        WARNING,
        "spans are lost; the collector did not take them in time",
        "",
        "Decisions are not affected. Check whether the collector is up.",
    )
    TRACING_FAILED = (
        "scopegate.tracing",
        WARNING,
        "tracing does not work as it should",
        "cause",
        "`cause` is the error of the OpenTelemetry library, most often about the collector.",
    )

    # Python programs that embed the library
    EMISSION_UNCONFIRMED = (
        "scopegate.decisions",
        ERROR,
        "the store did not confirm %s: %s",
        "exc_info?",
        "The record may be missing in the log; `scopegate_library_emissions_failed_total` counts these. "
        f"{_STORE}",
    )
    LOOKUP_FAILED = (
        "scopegate.decisions",
        WARNING,
        "the store cannot say whether a decision is recorded: %s",
        "",
        f"The decision counts as not recorded. {_STORE}",
    )
    KILL_SWITCH_UNREADABLE = (
        "scopegate.decisions",
        WARNING,
        "the store cannot say whether the kill switch is on, so it counts as on: %s",
        "",
        f"Routing is not optimized meanwhile. {_STORE}",
    )
    END_UNCONFIRMED = (
        "scopegate.library",
        ERROR,
        "the end of an execution may not have been written down; then it is unknown after a restart",
        "decision_id cause",
        "Check in the target system whether `decision_id` was executed, and reconcile it.",
    )

    def __init__(self, logger: str, level: int, message: str, fields: str, meaning: str) -> None:
        names = fields.split()
        self.logger = logging.getLogger(logger)
        self.level = level
        self.message = message
        self.fields = tuple(name.removesuffix("?") for name in names)
        self.optional_fields = frozenset(name[:-1] for name in names if name.endswith("?"))
        self.meaning = meaning

    def log(self, *args: object, exc: BaseException | None = None, **fields: Any) -> None:
        """Write the line. `args` fill the message's `%s`; the traceback of `exc` comes with it, if given."""
        if self.logger.isEnabledFor(self.level):
            # As Logger._log does it, without its walk up the stack to the call site, which takes longer.
            site = sys._getframe(1)
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
