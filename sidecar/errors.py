"""All error codes and exceptions. This module imports no other module of the package.

Each code has exactly one HTTP status, and this table is its only source. A refusal is a value. An exception
means that something could not be decided or delivered. Only the library raises refusals as exceptions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class ErrorKind:
    """One row of the table: the code on the wire, its HTTP status, its RFC 9457 title."""

    code: str
    status: int
    title: str


_ROWS: tuple[ErrorKind, ...] = (
    ErrorKind("scoped_execution_required", 400, "A recovery action needs an execution scope"),
    ErrorKind("scope_exhausted", 400, "The execution scope is used up"),
    ErrorKind("scope_expired", 400, "The execution scope has expired"),
    ErrorKind("scope_revoked", 400, "The execution scope was revoked"),
    ErrorKind("invalid_request", 400, "The request cannot be judged"),
    ErrorKind("ambiguous_path", 400, "The path can be read in more than one way"),
    ErrorKind("override_refused", 400, "Method and target overrides are refused here"),
    ErrorKind("upgrade_refused", 400, "This protocol upgrade is refused"),
    ErrorKind("incident_mismatch", 403, "The scope belongs to another incident"),
    ErrorKind("action_outside_scope", 403, "The scope does not allow this action"),
    ErrorKind("target_outside_scope", 403, "The scope does not allow these target agents"),
    ErrorKind("policy_denied", 403, "Policy denies this"),
    ErrorKind("cross_site", 403, "Another site may not change this"),
    ErrorKind("scope_not_found", 404, "No such execution scope"),
    ErrorKind("decision_not_found", 404, "No such decision"),
    ErrorKind("not_found", 404, "No such resource"),
    ErrorKind("method_not_allowed", 405, "Method not allowed"),
    ErrorKind("body_timeout", 408, "The request body did not arrive in time"),
    ErrorKind("not_reconcilable", 409, "The execution cannot be reconciled"),
    ErrorKind("reload_refused", 409, "The new configuration or policies cannot be used; the old ones hold"),
    ErrorKind("body_too_large", 413, "The request body is too large"),
    ErrorKind("unsupported_media_type", 415, "Only plain application/json can be judged"),
    ErrorKind("misdirected_request", 421, "This host is not one of the listener's"),
    ErrorKind("invalid_scope", 422, "The requested scope is not valid"),
    ErrorKind("braked", 429, "Policy brakes this for a while"),
    ErrorKind("internal_error", 500, "The sidecar failed"),
    ErrorKind("upstream_unreachable", 502, "The backend could not be reached; nothing was sent"),
    ErrorKind("upstream_failed", 502, "The backend's answer was lost"),
    ErrorKind("store_unavailable", 503, "The store cannot record a decision"),
    ErrorKind("policy_unavailable", 503, "No policy set is loaded"),
    ErrorKind("overloaded", 503, "Too many requests are in flight"),
    ErrorKind("draining", 503, "The sidecar is shutting down"),
    ErrorKind("upstream_timeout", 504, "The backend did not answer in time"),
)

ERRORS: Mapping[str, ErrorKind] = {row.code: row for row in _ROWS}


@dataclass(frozen=True, slots=True)
class Refusal:
    """The reason for a refusal: a code of the table, one sentence, and the members of the code.

    Each stage wraps it in a type of its own: `core.target.Rejected` before the body is read,
    `core.command.Denied` when a command is applied, and `gate.refusal_log.Refused` on its way to the answer.
    """

    code: str
    message: str
    members: Mapping[str, Any] = field(default_factory=dict)

    @property
    def retry_after_seconds(self) -> int | None:
        """The seconds to wait before a retry, or None if the refusal does not say so."""
        seconds: int | None = self.members.get("retry_after_seconds")
        return seconds


class ScopegateError(Exception):
    """The base class of all exceptions of this package."""


class StoreUnavailable(ScopegateError):
    """The store could not commit, or did not before its deadline. The message names the cause."""


class StoreOverloaded(StoreUnavailable):
    """The store's queue is full. The command was not started."""


class ClockUnsettled(StoreUnavailable):
    """The wall clock cannot be trusted now, so nothing is decided. The message names the remedy."""


def clock_refusal(trouble: str) -> Refusal:
    """The refusal if the wall clock cannot be trusted. `trouble` names the reason and the remedy."""
    return Refusal("store_unavailable", f"{trouble[:1].upper()}{trouble[1:]}.", {"cause": "clock"})


def unavailable(exc: StoreUnavailable) -> Refusal:
    """The refusal if the store could not commit, with the cause."""
    if isinstance(exc, ClockUnsettled):
        return clock_refusal(str(exc))
    code = "overloaded" if isinstance(exc, StoreOverloaded) else "store_unavailable"
    return Refusal(
        code, f"The store did not confirm it, so nothing was let through: {exc}.", {"cause": str(exc)}
    )


class ConditionFailed(ScopegateError):
    """A rule's condition could not be evaluated, or is neither true nor false. The message says why."""


class CommandFailed(StoreUnavailable):
    """The storage works, but this command cannot be applied. A retry does not help."""


class StoreClosed(StoreUnavailable):
    """The store is closed or was never opened."""


class LogTampered(ScopegateError):
    """The decision log does not verify. The message names the first invalid record."""


class KeyFileUnusable(ScopegateError, ValueError):
    """A key file cannot be used. The message says why, and never shows the contents of the file."""


class CARESignalAccessError(ScopegateError):
    """Routing optimization may not read this signal, because the signal is forbidden or unknown."""

    def __init__(self, message: str, signal: object = None) -> None:
        super().__init__(message)
        self.signal = signal


@dataclass(frozen=True, slots=True)
class Fault:
    """One mistake in a file: its place, its key, and what to do about it.

    `place` is `file:line:column`, or the environment variable or flag that holds the value. `key` is the
    dotted key, or empty if the fault concerns the file as a whole.
    """

    place: str
    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.place}: {self.key}: {self.message}" if self.key else f"{self.place}: {self.message}"


class ConfigurationError(ScopegateError):
    """The configuration or the policies cannot be used. `faults` holds every fault that was found."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        super().__init__("\n".join(str(fault) for fault in faults))
        self.faults = tuple(faults)


# Refusals in the library -------------------------------------------------------------------------------


class ScopeRefused(ScopegateError):
    """A scope or an execution was refused: the library's form of a `Refusal`. Nothing was consumed.

    `code` and `http_status` are the same as on the wire. `decision_id` names the record of the refusal.
    `members` holds the members of the code; the ones below are also attributes, None if absent. Distinguish
    refusals by class or by `code`, never by the message.
    """

    code = "invalid_request"

    def __init__(
        self,
        message: str = "",
        *,
        code: str | None = None,
        decision_id: str | None = None,
        members: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.code
        self.http_status = ERRORS[self.code].status
        self.decision_id = decision_id
        self.members: dict[str, Any] = dict(members or {})
        self.scope_id: str | None = self.members.get("scope_id")
        self.incident_id: str | None = self.members.get("incident_id")
        self.action: str | None = self.members.get("action")
        self.bound: str | None = self.members.get("bound")
        self.expires_at: str | None = self.members.get("expires_at")
        self.target_agents: list[str] | None = self.members.get("target_agents")
        self.member: str | None = self.members.get("member")
        self.rules: list[str] | None = self.members.get("rules")


class ScopedExecutionRequired(ScopeRefused):
    """A recovery action needs a scope, and none was given."""

    code = "scoped_execution_required"


class ScopeNotFound(ScopeRefused):
    """No scope has this scope_id."""

    code = "scope_not_found"


class ScopeIncidentMismatch(ScopeRefused):
    """The scope was granted for another incident."""

    code = "incident_mismatch"


class ScopeActionMismatch(ScopeRefused):
    """The scope does not list this action."""

    code = "action_outside_scope"


class ScopeTargetMismatch(ScopeRefused):
    """The scope is limited to certain target agents, and the request named others or none."""

    code = "target_outside_scope"


class ScopeRevoked(ScopeRefused):
    """The scope was revoked."""

    code = "scope_revoked"


class ScopeExpired(ScopeRefused):
    """The scope has expired."""

    code = "scope_expired"


class ScopeExhausted(ScopeRefused):
    """The scope is exhausted. `bound` names the exhausted bound: `max_attempts` or `max_cost_usd`."""

    code = "scope_exhausted"


SCOPE_ERRORS: Mapping[str, type[ScopeRefused]] = {
    kind.code: kind
    for kind in (
        ScopedExecutionRequired,
        ScopeNotFound,
        ScopeIncidentMismatch,
        ScopeActionMismatch,
        ScopeTargetMismatch,
        ScopeRevoked,
        ScopeExpired,
        ScopeExhausted,
    )
}


def scope_refused(refusal: Refusal, decision_id: str | None) -> ScopeRefused:
    """The library's exception for a refusal: the class of its code, or ScopeRefused for other codes."""
    kind = SCOPE_ERRORS.get(refusal.code, ScopeRefused)
    return kind(refusal.message, code=refusal.code, decision_id=decision_id, members=refusal.members)
