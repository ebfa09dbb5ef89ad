"""The exceptions that tell a program why its scope or execution was refused, one class for each code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sidecar.errors import ERRORS, Refusal, ScopegateError


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


# Each exception by its code.
SCOPE_ERRORS: Mapping[str, type[ScopeRefused]] = {kind.code: kind for kind in ScopeRefused.__subclasses__()}


def scope_refused(refusal: Refusal, decision_id: str | None) -> ScopeRefused:
    """The library's exception for a refusal: the class of its code, or ScopeRefused for other codes."""
    kind = SCOPE_ERRORS.get(refusal.code, ScopeRefused)
    return kind(refusal.message, code=refusal.code, decision_id=decision_id, members=refusal.members)
