"""What the code cannot say of itself: what loggers are about, what log lines mean and what to do then, what
labels mean. Tests hold these tables to the code, so that nothing is left out or left over."""

from __future__ import annotations

from collections.abc import Mapping

from tests.logged import OPEN

# The values of labels. A sentence where they are open; else what those mean that do not say so themselves.
VALUES: Mapping[tuple[str, str], Mapping[str, str] | str] = {
    ("scopegate_decisions", "outcome"): {
        "selected": "let through; or a scope was issued or revoked",
        "blocked": "refused by a bound of the scope, or as malformed",
        "policy_blocked": "refused by a rule or the catalogue",
        "policy_unavailable": "nothing could be decided",
    },
    ("scopegate_decisions", "action"): (
        "the actions of the catalogue; `other`: one that it does not list; `none`: it could not be read, or "
        "a scope was "
        "issued or revoked"
    ),
    ("scopegate_executions", "outcome"): {
        "answered": "the backend answered, perhaps with an error",
        "not_sent": "provably nothing was sent; attempt and hold returned",
        "unknown": "the answer was lost or late; attempt and hold stay until somebody reconciles it",
    },
    ("scopegate_emissions", "result"): {
        "ruled_out": "the emission rule says that there is no record",
        "repeated": "it is recorded already",
        "switched_off": "the kill switch is on",
    },
    ("scopegate_shadow_refusals", "rule"): "ids of rules; empty: the route or the scope",
    ("scopegate_condition_errors", "rule"): "ids of rules",
    ("scopegate_passed_through", "outcome"): {
        "answered": "the whole answer went to the client",
        "tunnelled": "a WebSocket, to its end",
        "client_left": "the client did not wait for the end",
        "cut": "the backend broke its answer off",
        "invalid_request": "it could not be forwarded as it came",
        "overloaded": "no connection to the backend was free",
        "upstream_unreachable": "nothing was sent",
        "upstream_failed": "the answer was lost",
        "upstream_timeout": "no answer began in time",
    },
    ("scopegate_reloads", "result"): {
        "ok": "something changed and is in force",
        "unchanged": "nothing was different",
        "refused": "the files cannot be used; the old ones hold",
    },
    ("scopegate_certificate_expiry_timestamp_seconds", "listener"): {
        "upstream": "the one that is shown to the backend",
    },
    ("scopegate_ready", "check"): {
        "store": "it can write (checked at most ten seconds ago)",
        "log": "the last decisions could be recorded",
        "policies": "a valid set is loaded",
        "clock": "it is not behind the log",
        "draining": "it is not shutting down",
    },
    ("scopegate_build_info", "version"): "the release",
    ("scopegate_build_info", "python"): "the version of Python",
}

LOGGERS: Mapping[str, str] = {
    "scopegate": "Starting and stopping.",
    "scopegate.access": "The access log: a line for each request on the data listener "
    "(`telemetry.access_log`).",
    "scopegate.checkpoints": "Signed checkpoints of the decision log.",
    "scopegate.decisions": "Only in a Python program that embeds the library: decision records.",
    "scopegate.gate": "What becomes of gated requests.",
    "scopegate.library": "Only in a Python program that embeds the library: scopes and executions.",
    "scopegate.passthrough": "What is not gated.",
    "scopegate.reload": "Configuration and policies.",
    "scopegate.store": "The database.",
    "scopegate.tls": "Certificates: those of the listeners, and the one that is shown to the backend.",
    "scopegate.tracing": "Traces for OpenTelemetry.",
    "scopegate.web": "The listeners themselves.",
}

_BUG = "A mistake in the sidecar: report it, with the traceback."
_UNKNOWN = "`scopegate executions list --status unknown` names what has to be reconciled."

MESSAGES: Mapping[tuple[str, str], str] = {
    ("scopegate", "draining"): "SIGTERM or SIGINT came: nothing new is taken in.",
    ("scopegate", "stopped"): "The end of an orderly stop.",
    ("scopegate", "stopping before the start was complete"): (
        "SIGTERM or SIGINT came while the store was opened: what is open is closed, and nothing was served."
    ),
    ("scopegate", "the start cannot be ended in time; the storage may hang"): (
        "The store was being opened for longer than `shutdown.drain_seconds` after SIGTERM: the process ends "
        "with code 1. Look at the disk."
    ),
    ("scopegate", "the drain is over; executions end as unknown"): (
        f"They took longer than `shutdown.drain_seconds`. {_UNKNOWN}"
    ),
    (
        "scopegate",
        "anyone who reaches the data listener can issue scopes; set scopes.serve_on: admin to prevent it",
    ): "The data listener is open to other hosts, and grants scopes to anyone who asks.",
    (
        "scopegate",
        OPEN,
    ): "A variable of the environment begins with `SCOPEGATE_` and names no key: it is ignored.",
    ("scopegate.access", "request"): "A request was answered, or broke off.",
    ("scopegate.checkpoints", "a checkpoint could not be written"): (
        "Tried again in ten seconds. Until then records cut off the log's end would not show: look at the "
        "disk and the "
        "folder of `log.checkpoint_file`."
    ),
    (
        "scopegate.checkpoints",
        "the checkpoint file holds checkpoints of another database, so this log will verify as tampered "
        "with: give a "
        "new log.checkpoint_file, or put the old database back",
    ): "As it says.",
    ("scopegate.decisions", "the store cannot say whether a decision is recorded: …"): (
        "It counts as not recorded. See what the store's trouble is."
    ),
    (
        "scopegate.decisions",
        "the store cannot say whether the kill switch is on, so it counts as on: …",
    ): "Routing is not optimized meanwhile. See what the store's trouble is.",
    ("scopegate.decisions", "the store did not confirm …: …"): (
        "It may be missing in the log; `scopegate_library_emissions_failed_total` counts it. See what the "
        "store's "
        "trouble is."
    ),
    ("scopegate.gate", "a gated request did not end in time"): (
        f"Something in it hung; it was answered 5xx, and what may have been sent is unknown. {_BUG}"
    ),
    ("scopegate.gate", "a gated request failed"): f"It was answered 500 and nothing was forwarded. {_BUG}",
    ("scopegate.gate", "a scope was granted too late and is revoked"): (
        "Its caller was told 503, because the store was slow, and does not know of it. The record of the "
        "revocation says so."
    ),
    ("scopegate.gate", "a scope that was granted too late could not be revoked"): (
        "Its caller does not know of it, and it may stand until it expires. Revoke `scope_id`."
    ),
    ("scopegate.gate", "a settlement is lost; its execution is unknown after a restart"): (
        "More than 10,000 endings waited for the store, or this one can never be written. Settle it by hand "
        "after the "
        "next start: reconcile `decision_id`."
    ),
    ("scopegate.gate", "a settlement waits for the store"): (
        "The client has its answer; the ending waits in memory. Do not restart before `scopegate_unsettled` "
        "is 0."
    ),
    ("scopegate.gate", "executed"): "The backend answered a gated request.",
    (
        "scopegate.gate",
        "execution …",
    ): "`execution not_sent` or `execution unknown`: no answer came; `cause` says why.",
    ("scopegate.gate", "forwarding failed"): f"The execution is unknown until it is reconciled. {_BUG}",
    ("scopegate.gate", "refused"): "A gated request, or one for a scope; `error` says why.",
    ("scopegate.gate", "refused, not recorded"): (
        "The store did not work, so this line is the only trace of it: keep it. `cause` says what is wrong."
    ),
    ("scopegate.gate", "settlements are lost; their executions are unknown after a restart"): (
        f"The sidecar stopped while the store did not work. After the next start {_UNKNOWN}"
    ),
    ("scopegate.gate", "would be refused"): "By a rule or a route in shadow mode; it went through.",
    (
        "scopegate.library",
        "the end of an execution may not have been written down; then it is unknown after a restart",
    ): "See in what it acts on whether `decision_id` was executed, and reconcile it.",
    (
        "scopegate.passthrough",
        "an answer passing through was cut",
    ): "The backend broke off; the client saw that, too.",
    ("scopegate.reload", "actions below … risk need no scope"): (
        "`gate.scope_required_from` is set so. They are recorded all the same."
    ),
    ("scopegate.reload", "reading configuration and policies failed"): f"The old ones hold. {_BUG}",
    ("scopegate.reload", "reload refused"): "The sidecar is shutting down.",
    ("scopegate.reload", "reload refused; the old configuration and policies stay in force"): (
        "`errors` names every mistake; `scopegate check` does so, too. Correct the files: they are taken up "
        "by themselves."
    ),
    (
        "scopegate.reload",
        "reloaded",
    ): "New configuration or policies are in force; `changed` says what is new.",
    ("scopegate.reload", "reloaded with fewer …"): (
        "There are fewer actions, rules or gated routes than before: see whether a file was cut short."
    ),
    ("scopegate.reload", "reloaded; nothing is different"): "The files say what is in force already.",
    ("scopegate.reload", "routes in shadow mode protect nothing, they only record"): (
        "Set `mode: enforce` once what they would refuse is as it should be."
    ),
    ("scopegate.store", "a batch could not be committed"): (
        "Its requests were refused with 503. `cause` is the database's word: disk full, read-only, file "
        "moved."
    ),
    ("scopegate.store", "a command could not be applied"): f"Its request was refused with 503. {_BUG}",
    ("scopegate.store", "executions without an outcome are now unknown; reconcile them"): (
        f"The sidecar before this one was killed. {_UNKNOWN}"
    ),
    ("scopegate.store", "housekeeping of the store failed"): (
        "The write-ahead log was not emptied; it is tried again. `cause` says why."
    ),
    ("scopegate.store", "the head of the log cannot be read"): (
        "Somebody took the database apart: nothing is decided until it is whole. Put back a copy."
    ),
    ("scopegate.store", "the store hangs and cannot be closed; what it was writing may be lost"): (
        "The disk does not answer. After the next start look at what is unknown."
    ),
    (
        "scopegate.tls",
        "certificate has expired; renew it",
    ): "Clients refuse to connect. Put a new one in its place.",
    ("scopegate.tls", "certificate not renewed; the old one stays in force"): (
        "The files on the disk changed, but cannot be used: `cause` says why. Correct them; they are looked "
        "at again."
    ),
    ("scopegate.tls", "certificate renewed"): "New connections get the new one.",
    ("scopegate.tls", "looking for a renewed certificate failed"): f"The old one stays in force. {_BUG}",
    ("scopegate.tracing", "spans are lost; the collector did not take them in time"): (
        "Decisions are not touched by it. See whether the collector is up."
    ),
    (
        "scopegate.tracing",
        "tracing does not work as it should",
    ): "`cause` is the library's word, most often about the collector.",
    (
        "scopegate.web",
        "a TLS handshake broke off",
    ): "A client left while it connected; a probe of the port, perhaps.",
    ("scopegate.web", "a TLS handshake failed"): (
        "A client speaks no TLS, none that is new enough, does not trust the certificate, or has none of "
        "its own where one "
        "is asked for."
    ),
    ("scopegate.web", "a gated request was not decided in time"): (
        f"Reading it or recording its refusal hung; it was answered 503 and nothing was forwarded. {_BUG}"
    ),
    ("scopegate.web", "a request could not be parsed"): "It is no HTTP as it should be; it was answered 400.",
    ("scopegate.web", "refused by its host or its site"): (
        "A call of the sidecar itself came under a name that is not one of the listener's (`error` is "
        "`misdirected_request`), or a browser sent a change from another site (`cross_site`). Put the name "
        "of a proxy before the listener into `allowed_hosts`. Anything else may be a web page that attacks."
    ),
    ("scopegate.web", "a connection broke off"): "It was gone as soon as it was there.",
    ("scopegate.web", "cannot accept connections"): (
        "The system gives the process no more descriptors or no memory; `cause` says which. It tries again "
        "ten times a second, and says so once a second at most. Raise the file limit (`ulimit -n`)."
    ),
    (
        "scopegate",
        "the file limit leaves the data listener fewer connections than gate.max_in_flight; raise it",
    ): "Said at the start. Raise the hard limit of open files, or lower `upstream.max_connections`.",
    ("scopegate.web", "the file limit stays as it is"): "The system did not let the process raise it.",
    ("scopegate.web", "too many connections"): (
        "Those beyond `limit` were reset: `count` since this was last said, once a minute at most. Find out "
        "who connects; for data, raise the file limit."
    ),
    ("scopegate.web", "a request failed"): f"It was answered 500. {_BUG}",
    ("scopegate.web", "listening"): "A listener is open. The sidecar is up once all three are.",
    ("scopegate.web", "the wall clock was accepted"): (
        "An operator took it for right; time goes on from there, `step_seconds` from where it was."
    ),
    ("scopegate.web", "reconciled"): "Somebody said how an unknown execution ended.",
}
