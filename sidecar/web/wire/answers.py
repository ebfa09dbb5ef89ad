"""The sidecar's answers about scopes, decisions, executions and itself: one model each, and who makes it.

A handler returns a model or a value that this module turns into one. `forms` says what a model is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NotRequired, cast

import orjson

from sidecar.core import freeze as core_freeze
from sidecar.core import scope as core
from sidecar.core.instant import iso_time
from sidecar.core.money import to_dollars
from sidecar.core.policy import RiskClass
from sidecar.core.principal import Method, PrincipalKind
from sidecar.core.record import (
    CausalRole,
    DecisionOutcome,
    DecisionSource,
    DecisionTrigger,
    DecisionType,
    Event,
    Origin,
)
from sidecar.core.scope import ExecutionStatus, ReportedOutcome, ScopeStatus
from sidecar.core.unlisted import Treatment
from sidecar.errors import ERRORS
from sidecar.web.wire.forms import LATER, OPEN, Count, Dollars, Keywords, Time, TypedDict
from sidecar.web.wire.health import Check, Checks, FreezesActive

Hash = Annotated[str, Keywords(pattern="^[0-9a-f]{64}$")]
ScopeId = Annotated[str, Keywords(pattern="^scope_[0-9a-f]{24,}$")]
DecisionId = Annotated[str, Keywords(format="uuid")]
Bound = Literal["max_attempts", "max_cost_usd"]
Code = Annotated[str, Keywords(enum=list(ERRORS))]

# Scopes ---------------------------------------------------------------------------------------------


class OnBehalfOf(TypedDict):
    """A person or service that a request names, which is not verified."""

    id: str
    verified: Literal[False]


class GrantedScope(TypedDict):
    """A scope as it was granted."""

    scope_id: ScopeId
    incident_id: str
    allowed_actions: list[str]
    max_cost_usd: Dollars
    max_attempts: Count
    expires_at: Time
    intent: str
    status: ScopeStatus
    attempts_remaining: Count
    target_agents: list[str]
    created_by: str
    executors: NotRequired[
        Annotated[list[str], Keywords(description="The only principals that may spend it: ids or globs.")]
    ]
    on_behalf_of: NotRequired[
        Annotated[OnBehalfOf, Keywords(description="The creator that the request names beside its caller.")]
    ]


class Scope(GrantedScope):
    """A scope as it stands, and what was used of it."""

    created_at: Time
    attempts_used: Count
    cost_used_usd: Annotated[Dollars, Keywords(description="The settled cost and the open holds.")]


class ScopeList(TypedDict):
    """A page of an incident's scopes, newest first; `total` counts all of them."""

    incident_id: str
    scopes: list[Scope]
    total: Count
    next: str | None


class TenantScope(Scope):
    """A scope as operators see it."""

    tenant_id: str


class ScopePage(TypedDict):
    """A page of scopes, newest first. A filtered one may be short, or empty, and still have a `next`."""

    scopes: list[TenantScope]
    next: str | None


class RevokedScope(TypedDict):
    scope_id: str
    status: Literal["revoked"]


class RevocationMeta(TypedDict):
    timestamp: Time
    request_id: str


class Revocation(TypedDict):
    """A scope that was withdrawn."""

    success: Literal[True]
    data: RevokedScope
    meta: RevocationMeta


def scope(stored: core.Scope, now: int) -> Scope:
    """The scope with the attempts that remain, and with its status at `now`."""
    shown: Scope = {
        "scope_id": stored.scope_id,
        "incident_id": stored.incident_id,
        "allowed_actions": list(stored.allowed_actions),
        "max_cost_usd": to_dollars(stored.max_cost),
        "max_attempts": stored.max_attempts,
        "expires_at": iso_time(stored.expires_at),
        "intent": stored.intent,
        "target_agents": list(stored.target_agents),
        "created_at": iso_time(stored.created_at),
        "created_by": stored.created_by,
        "attempts_used": stored.attempts_used,
        "attempts_remaining": stored.attempts_remaining,
        "cost_used_usd": to_dollars(stored.spent),
        "status": stored.status(now),
    }
    if stored.executors:
        shown["executors"] = list(stored.executors)
    if stored.on_behalf_of is not None:
        shown["on_behalf_of"] = {"id": stored.on_behalf_of, "verified": False}
    return shown


def granted(stored: core.Scope, now: int) -> GrantedScope:
    """The members of a new scope, which are some of those of `Scope`."""
    whole: Mapping[str, Any] = scope(stored, now)
    return cast("GrantedScope", {name: whole[name] for name in GrantedScope.__annotations__ if name in whole})


def tenant_scope(stored: core.Scope, now: int) -> TenantScope:
    return {**scope(stored, now), "tenant_id": stored.tenant_id}


# Executions -----------------------------------------------------------------------------------------


class Execution(TypedDict):
    """An admitted execution, and how it ended."""

    decision_id: DecisionId
    scope_id: Annotated[str | None, Keywords(description="Null if no scope was needed.")]
    tenant_id: str
    incident_id: str
    action: str
    route: Annotated[
        str | None, Keywords(description="The name of its route. Null if a program asked for it.")
    ]
    request_id: str
    attempt_number: Annotated[int, Keywords(minimum=1)] | None
    status: ExecutionStatus
    hold_usd: Dollars
    cost_usd: Dollars | None
    http_status: int | None
    cause: str | None
    admitted_at: Time
    report_by: Annotated[
        Time | None,
        LATER,
        Keywords(description="Until when it may be reported. Null if its answer ends it."),
    ]
    ended_at: Time | None


class ReportedExecution(TypedDict):
    """An execution that was reported, and its scope afterwards."""

    decision_id: DecisionId
    status: ReportedOutcome
    scope_status: Annotated[ScopeStatus | None, Keywords(description="Null if no scope was needed.")]


class ExecutionList(TypedDict):
    """A page of executions, newest first."""

    executions: list[Execution]
    next: str | None


class SpentScope(TenantScope):
    """A scope with the executions that it admitted, oldest first."""

    executions: list[Execution]


def execution(stored: core.Execution) -> Execution:
    return {
        "decision_id": stored.decision_id,
        "scope_id": stored.scope_id,
        "tenant_id": stored.tenant_id,
        "incident_id": stored.incident_id,
        "action": stored.action,
        "route": stored.route,
        "request_id": stored.request_id,
        "attempt_number": stored.attempt_number,
        "status": stored.status,
        "hold_usd": to_dollars(stored.hold),
        "cost_usd": None if stored.cost is None else to_dollars(stored.cost),
        "http_status": stored.http_status,
        "cause": stored.cause,
        "admitted_at": iso_time(stored.admitted_at),
        "report_by": None if stored.report_by is None else iso_time(stored.report_by),
        "ended_at": None if stored.ended_at is None else iso_time(stored.ended_at),
    }


# Freezes --------------------------------------------------------------------------------------------

FreezePattern = Annotated[
    dict[str, list[str]], Keywords(description="For each fact, the globs of which one must match.")
]
# `except` is no name in Python, so this model is not a class.
Freeze = TypedDict(
    "Freeze",
    {
        "freeze_id": DecisionId,
        "tenant_id": str,
        "match": FreezePattern,
        "except": FreezePattern,
        "reason": str,
        "set_at": Time,
        "set_by": str,
        "ends_at": Time | None,
        "active": bool,
        "lifted_at": Time | None,
        "lifted_by": str | None,
        "lifted_because": str | None,
    },
)
Freeze.__doc__ = "A freeze of executions. It is active until it ends or is lifted."


class FreezeList(TypedDict):
    """Freezes, newest first."""

    freezes: list[Freeze]


def freeze(stored: core_freeze.Freeze, now: int) -> Freeze:
    """The freeze, with whether it is in force at `now`."""
    return {
        "freeze_id": stored.freeze_id,
        "tenant_id": stored.tenant_id,
        "match": core_freeze.written(stored.match),
        "except": core_freeze.written(stored.excepted),
        "reason": stored.reason,
        "set_at": iso_time(stored.set_at),
        "set_by": stored.set_by,
        "ends_at": None if stored.ends_at is None else iso_time(stored.ends_at),
        "active": stored.is_in_force(now),
        "lifted_at": None if stored.lifted_at is None else iso_time(stored.lifted_at),
        "lifted_by": stored.lifted_by,
        "lifted_because": stored.lifted_for,
    }


# Decisions ------------------------------------------------------------------------------------------


class DecisionRecord(TypedDict):
    """The 14 fields of a decision record."""

    decision_id: Annotated[str, Keywords(description="A UUID, unless a program gave its record another id.")]
    decision_type: DecisionType
    decision_source: DecisionSource
    decision_trigger: DecisionTrigger
    decision_inputs: dict[str, Any]
    decision_outcome: DecisionOutcome
    decision_reason: str | None
    run_id: str | None
    workflow_id: str | None
    tenant_id: str
    request_id: str | None
    causal_role: CausalRole
    decided_at: Time
    details: dict[str, Any]


class Asker(TypedDict):
    """A principal, and the method of authentication that established it."""

    id: str
    kind: PrincipalKind
    method: Method


class LoggedDecision(DecisionRecord):
    """A record with its envelope, which no caller can set."""

    writer: str
    seq: Annotated[int, Keywords(minimum=1, description="Its place in the writer's log.")]
    origin: Origin
    event: Event
    scope_id: str | None
    incident_id: str | None
    action: str | None
    admission_id: Annotated[str | None, Keywords(description="The admission that it ends.")]
    principal: Annotated[Asker, LATER, Keywords(description="The caller that asked.")]
    issuer: NotRequired[
        Annotated[
            Asker | None,
            Keywords(description="Of an execution: who asked for its scope. Null: it needed none."),
        ]
    ]
    approvers: NotRequired[Annotated[list[Asker], Keywords(description="Of an execution: who approved it.")]]
    recorded_at: NotRequired[
        Annotated[Time, Keywords(description="When it was recorded, if the decision was made earlier.")]
    ]


class DecisionList(TypedDict):
    """A page of decisions, newest first."""

    decisions: list[LoggedDecision]
    next: str | None


class Decision(LoggedDecision):
    """A decision with its hash link, the execution that it admitted or ended, and how that ended."""

    hash: Hash
    previous_hash: Hash
    execution: Execution | None
    outcome: ExecutionStatus | None


def logged_decision(envelope: bytes, bound_run_id: str | None) -> LoggedDecision:
    """A record from its stored envelope: its 14 fields, then those of the envelope.

    A record without a run shows the run that it was bound to later.
    """
    members: dict[str, Any] = orjson.loads(envelope)
    record: dict[str, Any] = members.pop("record")
    for only_verified in ("kept_once", "run_bindings"):
        members.pop(only_verified, None)
    if record["run_id"] is None:
        record["run_id"] = bound_run_id
    return cast("LoggedDecision", {**record, **members})


# What an execution would meet -----------------------------------------------------------------------


class Left(TypedDict):
    """What a scope still allows."""

    attempts: Count
    cost_usd: Dollars
    seconds: Annotated[float, Keywords(minimum=0)]


class BrakeUse(TypedDict):
    """How far a brake is used by the executions that it counts together with the request."""

    rule: str
    reason: str
    mode: Literal["enforce", "shadow"]
    per: dict[str, Any]
    used: Count
    max_attempts: int | None
    window_seconds: Count
    holds: bool
    why: str | None
    ends_at: Time | None


class WouldRefuse(TypedDict):
    """A refusal that is only recorded, with the members of its error. `rule` is null if a shadow route
    refuses it."""

    rule: str | None
    error: Code
    message: str


# Pydantic reads this attribute, which TypedDict does not declare.
WouldRefuse.__pydantic_config__ = {"extra": "allow"}  # type: ignore[attr-defined]


class Explanation(TypedDict):
    """What an execution would meet now. `members` are those that the error would have."""

    route: Annotated[str, Keywords(description="The configured path of the route that judges it.")]
    allowed: bool
    error: Code | None
    message: str
    bound: Bound | None
    rules: list[str]
    members: dict[str, Any]
    next: Annotated[str, Keywords(description="What to do about it.")]
    hold_usd: Dollars
    scope_required: bool
    scope: Scope | None
    left: Left | None
    brakes: list[BrakeUse]
    would_refuse: list[WouldRefuse]
    policy_revision: str | None


# The sidecar itself ---------------------------------------------------------------------------------


class StoreStatus(TypedDict):
    """Where the store is, without secrets, and its bytes on disk; null: not to be measured."""

    url: str
    size: Count | None
    wal_size: Annotated[Count | None, Keywords(description="Bytes of the write-ahead log.")]
    free: Annotated[Count | None, LATER, Keywords(description="Bytes free on the disk of the database.")]
    growth_per_day: Annotated[Count | None, LATER, Keywords(description="Bytes added in the last 24 hours.")]


class LastReload(TypedDict):
    time: Time
    ok: bool
    errors: list[str]


class Listeners(TypedDict):
    """`host:port`, `https://host:port` with TLS, or `unix:/path`."""

    data: str
    admin: str
    ops: str


class UnlistedTreatment(TypedDict):
    """What becomes of requests that no route lists."""

    reads: Annotated[Treatment, Keywords(description="GET, HEAD, OPTIONS and WebSockets.")]
    writes: Annotated[Treatment, Keywords(description="All other methods.")]
    excepted: Annotated[
        list[str], Keywords(description="The paths of `gate.unlisted.except`, which pass in any case.")
    ]


class Authentication(TypedDict):
    """How callers prove who they are. `says` is one sentence about what that means here."""

    methods: list[Literal["tokens", "jwt", "mtls", "proxy"]]
    required: bool
    required_on: list[str]
    says: str


class Status(TypedDict):
    """What runs here, and how it is."""

    ready: Annotated[bool, LATER]
    checks: Annotated[Checks, LATER, OPEN]
    freezes_active: FreezesActive
    freezes: Annotated[list[Freeze], LATER, Keywords(description="Those in force, newest first.")]
    version: str
    uptime_seconds: Annotated[float, Keywords(minimum=0)]
    draining: bool
    in_flight: Count
    unknown_executions: Annotated[Count | None, Keywords(description="Null: the store cannot be read.")]
    oldest_unknown_admitted_at: Time | None
    running_executions: Annotated[
        Count | None, LATER, Keywords(description="Those that wait for their report.")
    ]
    clock: Annotated[Check, LATER, Keywords(description="Whether decisions are made by the wall clock.")]
    store: StoreStatus
    policy_revision: str | None
    config_revision: str
    last_reload: LastReload
    scope_required_from: RiskClass
    shadow_routes: Annotated[list[str], Keywords(description="Paths on which nothing is refused.")]
    unlisted: Annotated[UnlistedTreatment, LATER]
    auth: Annotated[Authentication, LATER]
    scopes_served_on: Annotated[
        Literal["data", "admin"],
        LATER,
        Keywords(description="The listener that issues and revokes scopes."),
    ]
    listeners: Annotated[Listeners, LATER, OPEN, Keywords(description="Where each one listens.")]


class AcceptedClock(TypedDict):
    """The time that counts from now on, and the one that counted before."""

    decision_id: DecisionId
    now: Time
    time_before: Time
    step_seconds: float
