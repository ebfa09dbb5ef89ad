"""The table of error codes, refusals, and the exceptions of more than one room. It imports nothing of the
package.

Each code has one row in the table. From it are made the answer's status and title, the advice of `explain`,
the errors in the OpenAPI document, and the tables in `config/reference/wire.md`. A refusal is a value. An
exception means that something could not be decided or delivered. Only the library raises refusals as
exceptions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class ErrorKind:
    """One row of the table.

    `advice` is one sentence that says what the caller does next. `members` are those that every such answer
    has besides the ones of all errors, with an example of each. `retry` is whether the same request may
    succeed later.
    """

    code: str
    status: int
    title: str
    advice: str
    members: Mapping[str, Any] = field(default_factory=dict)
    retry: bool = False


_SCOPE = {"scope_id": "scope_0123456789abcdef0123456789abcdef"}

_HOLDER = {"decision_id": "01961234-5678-7abc-8def-0123456789ab"}

_ROWS: tuple[ErrorKind, ...] = (
    ErrorKind(
        "scoped_execution_required",
        400,
        "A recovery action needs an execution scope",
        "Ask for a scope (POST /api/v1/recovery/scope) and send its scope_id.",
        {"incident_id": "inc_123", "action": "retry_agent"},
    ),
    ErrorKind(
        "scope_exhausted",
        400,
        "The execution scope is used up",
        "See what its attempts achieved, then ask for a new scope if another one makes sense.",
        {**_SCOPE, "bound": "max_attempts"},
    ),
    ErrorKind(
        "scope_expired",
        400,
        "The execution scope has expired",
        "Ask for a new scope; they live for minutes only.",
        {**_SCOPE, "expires_at": "2026-01-31T12:05:00.000000+00:00"},
    ),
    ErrorKind(
        "scope_revoked",
        400,
        "The execution scope was revoked",
        "Find out who revoked it and why before you ask for another one.",
        _SCOPE,
    ),
    ErrorKind("invalid_request", 400, "The request cannot be judged", "Correct the member that is named."),
    ErrorKind(
        "ambiguous_path",
        400,
        "The path can be read in more than one way",
        "Spell the gated path out: no encoded slashes, dot segments or the like.",
    ),
    ErrorKind(
        "override_refused",
        400,
        "Method and target overrides are refused here",
        "Do not send method or target overrides (`X-HTTP-Method-Override` and the like).",
    ),
    ErrorKind(
        "upgrade_refused",
        400,
        "This protocol upgrade is refused",
        "Only WebSockets may upgrade, and not on a gated path; do not send CONNECT.",
    ),
    ErrorKind(
        "unauthenticated",
        401,
        "The credential is missing or not valid",
        "Send a valid credential by a method that `methods` names: `Authorization: Bearer` on calls of the "
        "sidecar, `Scopegate-Authorization: Bearer` on other requests, or a client certificate.",
        {"methods": ["tokens"]},
    ),
    ErrorKind(
        "incident_mismatch",
        403,
        "The scope belongs to another incident",
        "Ask for a scope for this incident.",
        {**_SCOPE, "incident_id": "inc_124"},
    ),
    ErrorKind(
        "action_outside_scope",
        403,
        "The scope does not allow this action",
        "Ask for a scope that lists this action.",
        {**_SCOPE, "action": "restart_pod"},
    ),
    ErrorKind(
        "target_outside_scope",
        403,
        "The scope does not allow these target agents",
        "Name only target agents of the scope, or ask for one that has them.",
        {**_SCOPE, "target_agents": ["agent_2"]},
    ),
    ErrorKind(
        "executor_outside_scope",
        403,
        "The scope is for other executors",
        "Have one of the executors of the scope execute it, or ask for a scope that names this one.",
        {**_SCOPE, "principal": "agent-7"},
    ),
    ErrorKind(
        "role_required",
        403,
        "The caller lacks the role",
        "Ask an operator to give the role to the caller, in `roles:` of the policies.",
        {"role": "executor", "principal": "agent-7"},
    ),
    ErrorKind(
        "tenant_mismatch",
        403,
        "The request names another tenant than the caller's",
        "Leave the tenant header out, or name the tenant of the caller there.",
        {"tenant_id": "default"},
    ),
    ErrorKind(
        "frozen",
        403,
        "Executions are frozen",
        "Wait until the freeze ends or is lifted; ask who set it, and why.",
        {
            "freeze_id": "01961234-5678-7abc-8def-0123456789ab",
            "reason": "the primary is split",
            "ends_at": "2026-01-31T12:34:56.000000+00:00",
            "retry_after_seconds": 1740,
        },
    ),
    ErrorKind(
        "policy_denied",
        403,
        "Policy denies this",
        "Read the rules' reasons; change the request, or have the policies changed.",
        {"rules": [], "action": "drop_database"},
    ),
    ErrorKind(
        "not_listed",
        403,
        "No route lists this request",
        "Use a path and a method that a route lists; an operator adds a route, or an exception to "
        "`gate.unlisted.except`.",
    ),
    ErrorKind(
        "cross_site",
        403,
        "Another site may not change this",
        "Send it from a page of the listener itself, or by a program that sends neither `Origin` nor "
        "`Sec-Fetch-Site`.",
    ),
    ErrorKind(
        "completion_refused",
        403,
        "The completion token is not valid",
        "Send the token that came with the request of this execution, before its time limit; after a "
        "reconciliation no report is taken.",
    ),
    ErrorKind(
        "scope_not_found",
        404,
        "No such execution scope",
        "Check the scope_id and the tenant; scopes are listed by incident.",
        _SCOPE,
    ),
    ErrorKind(
        "freeze_not_found",
        404,
        "No such freeze",
        "Check the freeze_id; `scopegate freezes --all` lists them.",
        {"freeze_id": "01961234-5678-7abc-8def-0123456789ab"},
    ),
    ErrorKind(
        "decision_not_found",
        404,
        "No such decision",
        "Check the decision_id; the admin listener lists decisions.",
        {"decision_id": "01961234-5678-7abc-8def-0123456789ab"},
    ),
    ErrorKind("not_found", 404, "No such resource", "Check the path; /openapi.json lists those that exist."),
    ErrorKind("method_not_allowed", 405, "Method not allowed", "Use a method that the `Allow` header names."),
    ErrorKind(
        "body_timeout",
        408,
        "The request body did not arrive in time",
        "Send the whole body within `gate.body_timeout_seconds`.",
        retry=True,
    ),
    ErrorKind(
        "idempotency_in_flight",
        409,
        "The first request under this Idempotency-Key is still in flight",
        "Send it again after `Retry-After`; it then gets the answer of the first.",
        {**_HOLDER, "retry_after_seconds": 1},
        retry=True,
    ),
    ErrorKind(
        "outcome_unknown",
        409,
        "The first request under this Idempotency-Key has no known answer",
        "Find out whether the backend acted, and reconcile the execution `decision_id`; `not_executed` frees "
        "the key.",
        {**_HOLDER, "execution_status": "unknown"},
    ),
    ErrorKind(
        "not_reconcilable",
        409,
        "The execution cannot be reconciled",
        "Reconcile only an execution that is `unknown` or `running`, and only once.",
        {"execution_status": "answered"},
    ),
    ErrorKind(
        "completion_conflict",
        409,
        "The execution has ended otherwise",
        "Do not report it again; the first ending stands.",
        {"execution_status": "succeeded"},
    ),
    ErrorKind(
        "reload_refused",
        409,
        "The new configuration or policies cannot be used; the old ones hold",
        "Correct the places that `errors` names, and reload again.",
        {"errors": ["policies/actions.yaml:3:11: actions.retry_agent.risk: expects one of low, medium"]},
    ),
    ErrorKind(
        "body_too_large",
        413,
        "The request body is too large",
        "Send at most `max_bytes` bytes, or have `gate.max_body_bytes` raised.",
        {"max_bytes": 1_048_576},
    ),
    ErrorKind(
        "unsupported_media_type",
        415,
        "A body of this kind cannot be judged here",
        "Send a kind of body that `body` names, with its content type, in UTF-8 and without encoding.",
        {"body": ["json"]},
    ),
    ErrorKind(
        "misdirected_request",
        421,
        "This host is not one of the listener's",
        "Use a loopback name, or add the name to `admin.allowed_hosts` (`data.allowed_hosts` for scopes on "
        "the data listener).",
    ),
    ErrorKind(
        "invalid_scope",
        422,
        "The requested scope is not valid",
        "Correct the terms that `errors` names, such as a blank intent, a bound past its limit, or a "
        "`max_cost_usd` below `min_cost_usd`.",
        {
            "member": "intent",
            "errors": [{"member": "/intent", "problem": "is required and must say why; it cannot be blank"}],
        },
    ),
    ErrorKind(
        "invalid_freeze",
        422,
        "The requested freeze is not valid",
        "Correct the members that `errors` names.",
        {
            "member": "match",
            "errors": [{"member": "/match", "problem": "is required; {} matches everything"}],
        },
    ),
    ErrorKind(
        "idempotency_key_reused",
        422,
        "Another request was sent under this Idempotency-Key",
        "Use a new key for each action; repeat a request with the same method, target and body.",
    ),
    ErrorKind(
        "braked",
        429,
        "Policy brakes this for a while",
        "Wait until it ends, or look for what the last executions did not mend.",
        {
            "rules": ["storm-brake"],
            "retry_after_seconds": 1740,
            "ends_at": "2026-01-31T12:34:56.000000+00:00",
        },
        retry=True,
    ),
    ErrorKind(
        "auth_throttled",
        429,
        "Too many credentials from this peer were not valid",
        "Correct the credential, then wait; requests with a valid one are served at once.",
        {"methods": ["tokens"], "retry_after_seconds": 10},
        retry=True,
    ),
    ErrorKind(
        "internal_error",
        500,
        "The sidecar failed",
        "Look for the cause in the sidecar's log; this is a bug in the sidecar.",
    ),
    ErrorKind(
        "upstream_unreachable",
        502,
        "The backend could not be reached; nothing was sent",
        "Check that the backend runs; a gated attempt has been given back.",
        {"cause": "connection refused"},
        retry=True,
    ),
    ErrorKind(
        "upstream_failed",
        502,
        "The backend's answer was lost",
        "Find out whether the backend acted; a gated execution is `unknown` until it is reconciled.",
        {"cause": "the connection was reset"},
    ),
    ErrorKind(
        "store_unavailable",
        503,
        "The store cannot record a decision",
        "Look at readiness (/health/ready) and at the store's disk.",
        {"cause": "disk I/O error"},
        retry=True,
    ),
    ErrorKind(
        "credential_unavailable",
        503,
        "The credential for the backend cannot be read",
        "Put the file of `upstream.credentials` back; nothing was consumed.",
        {"header": "Authorization"},
        retry=True,
    ),
    ErrorKind(
        "policy_unavailable",
        503,
        "No policy set is loaded",
        "Correct the policies; `scopegate check` names what is wrong.",
        retry=True,
    ),
    ErrorKind("overloaded", 503, "Too many requests are in flight", "Try again in a moment.", retry=True),
    ErrorKind(
        "draining",
        503,
        "The sidecar is shutting down",
        "Ask another sidecar, or wait for the restart.",
        retry=True,
    ),
    ErrorKind(
        "upstream_timeout",
        504,
        "The backend did not answer in time",
        "Find out whether the backend acted; a gated execution is `unknown` until it is reconciled.",
        {"cause": "no whole answer within 30 s"},
    ),
)

ERRORS: Mapping[str, ErrorKind] = {row.code: row for row in _ROWS}

_TEXT = {"type": "string"}
_TEXTS = {"type": "array", "items": _TEXT}
_TIME = {"type": "string", "format": "date-time"}
_NULL = {"type": "null"}

# Every member that an error may have besides the RFC's and its message, as JSON Schema.
MEMBERS: Mapping[str, Mapping[str, Any]] = {
    "decision_id": {
        **_TEXT,
        "description": "The decision that records the refusal, or the one that does not exist. Of "
        "`idempotency_in_flight` and `outcome_unknown`, the execution of the first request; the header "
        "`Scopegate-Decision-Id` then names the record of the refusal.",
    },
    "route": {**_TEXT, "description": "The name of the gated route; if it has none, its path."},
    "scope_id": {**_TEXT, "description": "The scope that the request names."},
    "incident_id": {"anyOf": [_TEXT, _NULL], "description": "The incident that the request names."},
    "action": {"anyOf": [_TEXT, _NULL], "description": "The action that the request names."},
    "target_agents": {**_TEXTS, "description": "The target agents that the request names."},
    "principal": {**_TEXT, "description": "The caller."},
    "role": {**_TEXT, "description": "The role that the call needs; if several would do, the weakest."},
    "methods": {
        **_TEXTS,
        "description": "The method of the credential that is not valid. If there is no credential, the "
        "methods that are configured.",
    },
    "tenant_id": {**_TEXT, "description": "The tenant of the caller."},
    "freeze_id": {**_TEXT, "description": "The freeze that the request meets, or that does not exist."},
    "reason": {**_TEXT, "description": "Why the freeze was set."},
    "header": {**_TEXT, "description": "The header whose value cannot be read."},
    "body": {**_TEXTS, "description": "The kinds of body that are accepted: json, form, empty, any."},
    "bound": {
        **_TEXT,
        "enum": ["max_attempts", "max_cost_usd"],
        "description": "The bound of the scope that is used up.",
    },
    "expires_at": {**_TIME, "description": "When the scope expired."},
    "rules": {
        **_TEXTS,
        "description": "The policy rules that refuse it. If there are none, the catalogue refuses it: the "
        "action is not listed, or names no target agents where it must.",
    },
    "limit": {
        **_TEXT,
        "enum": ["max_attempts", "ttl_seconds", "max_cost_usd"],
        "description": "The term of a scope that a rule limits.",
    },
    "value": {"type": "number", "minimum": 0, "description": "The most that the limit allows."},
    "require": {
        **_TEXT,
        "enum": ["intent_min_chars", "target_agents", "executor_is_not_issuer", "executor_is_issuer"],
        "description": "What a rule requires the request to say.",
    },
    "condition_error": {**_TEXT, "description": "Why a rule's condition could not be judged."},
    "ends_at": {
        "anyOf": [_TIME, _NULL],
        "description": "When the brake or the freeze ends. If it is null, the brake ends with the executions "
        "in flight, and the freeze when it is lifted.",
    },
    "retry_after_seconds": {
        "anyOf": [{"type": "integer", "minimum": 1}, _NULL],
        "description": "The seconds to wait before a retry, as in `Retry-After`; of a brake or a freeze, "
        "until it ends. Null: a freeze that holds until it is lifted.",
    },
    "member": {**_TEXT, "description": "The first member that is missing or wrong."},
    "min_cost_usd": {
        "type": "number",
        "minimum": 0,
        "description": "The least `max_cost_usd` with which each action of the scope could be executed.",
    },
    "errors": {
        "anyOf": [{"type": "array", "items": {"$ref": "#/components/schemas/WrongMember"}}, _TEXTS],
        "description": "Every member, or every place in the files, that is wrong.",
    },
    "cause": {**_TEXT, "description": "Why the sidecar could not decide or deliver."},
    "path": {**_TEXT, "description": "The path that can be read in more than one way."},
    "max_bytes": {"type": "integer", "minimum": 0, "description": "The largest body that is judged."},
    "execution_status": {**_TEXT, "description": "How the execution ended, or that it is in flight."},
}


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
