"""What the values of labels mean."""

from __future__ import annotations

from collections.abc import Mapping

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
