"""Every error code and every exception. Imports nothing of ours.

A code has exactly one HTTP status, and this table is the only place that says which
(source: gate.md, "Errors of the wire"). A refusal is a value; an exception means that
something could not be decided or could not be delivered. Only the library raises refusals.
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
    """Why something is refused: a code of the table, one sentence, and the code's own members.

    Who refuses wraps it: `core.target.Rejected` before anything is read, `core.command.Denied` when a
    command is applied, and `refusals.Refused` once it is recorded and on its way to the answer.
    """

    code: str
    message: str
    members: Mapping[str, Any] = field(default_factory=dict)

    @property
    def retry_after_seconds(self) -> int | None:
        """When to try again, where the refusal itself says so."""
        seconds: int | None = self.members.get("retry_after_seconds")
        return seconds


class ScopegateError(Exception):
    """The root of every exception that is ours."""


class StoreUnavailable(ScopegateError):
    """The store could not commit, or not before its deadline. The message names the cause."""


class StoreOverloaded(StoreUnavailable):
    """The store's queue is full; nothing of the command was begun."""


class ClockUnsettled(StoreUnavailable):
    """The wall clock cannot be trusted now, so nothing is decided by it. The message names the way out."""


def clock_refusal(trouble: str) -> Refusal:
    """What is refused because the wall clock cannot be trusted; `trouble` says why, and the way out."""
    return Refusal("store_unavailable", f"{trouble[:1].upper()}{trouble[1:]}.", {"cause": "clock"})


def unavailable(exc: StoreUnavailable) -> Refusal:
    """What a store that could not commit is called on the wire, with its cause."""
    if isinstance(exc, ClockUnsettled):
        return clock_refusal(str(exc))
    code = "overloaded" if isinstance(exc, StoreOverloaded) else "store_unavailable"
    return Refusal(
        code, f"The store did not confirm it, so nothing was let through: {exc}.", {"cause": str(exc)}
    )


class ConditionFailed(ScopegateError):
    """A rule's condition could not be evaluated, or is neither true nor false. The message says why."""


class CommandFailed(StoreUnavailable):
    """The storage works, but this one command cannot be applied to it. Trying again would not help."""


class StoreClosed(StoreUnavailable):
    """The store is closed, or was never opened."""


class LogTampered(ScopegateError):
    """The decision log does not verify. The message names the first record that is wrong."""


class KeyFileUnusable(ScopegateError, ValueError):
    """A file that should hold a key cannot be used. The message says why, and never what it holds."""


class CARESignalAccessError(ScopegateError):
    """The optimization of routing may not look at this signal: it is forbidden, or nobody knows it."""

    def __init__(self, message: str, signal: object = None) -> None:
        super().__init__(message)
        self.signal = signal


@dataclass(frozen=True, slots=True)
class Fault:
    """One mistake in a file: where it stands and what to do about it.

    `place` is `file:line:column`, or the environment variable or flag that holds the value;
    `key` is the dotted key, empty where the file as a whole is meant.
    """

    place: str
    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.place}: {self.key}: {self.message}" if self.key else f"{self.place}: {self.message}"


class ConfigurationError(ScopegateError):
    """Configuration or policies cannot be used. Carries every fault that was found."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        super().__init__("\n".join(str(fault) for fault in faults))
        self.faults = tuple(faults)


# Refusals in the library -------------------------------------------------------------------------------


class ScopeRefused(ScopegateError):
    """A scope or an execution was refused: the library's form of a `Refusal`. Nothing was consumed.

    `code` and `http_status` are what the wire says, `decision_id` names the record that the refusal left,
    and `members` are what the code brings along; those below are attributes, too, None where absent.
    Choose by class or by `code`, never by the message.
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
    """A recovery action was to be executed without a scope."""

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
    """The scope is for certain target agents, and others, or none, were named."""

    code = "target_outside_scope"


class ScopeRevoked(ScopeRefused):
    """The scope was revoked."""

    code = "scope_revoked"


class ScopeExpired(ScopeRefused):
    """The scope's time is over."""

    code = "scope_expired"


class ScopeExhausted(ScopeRefused):
    """The scope is used up; `bound` says of what: `max_attempts` or `max_cost_usd`."""

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
    """The exception that a refusal raises in the library; ScopeRefused for a code without its own class."""
    kind = SCOPE_ERRORS.get(refusal.code, ScopeRefused)
    return kind(refusal.message, code=refusal.code, decision_id=decision_id, members=refusal.members)
