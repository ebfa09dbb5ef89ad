"""Models of the sidecar's own answers. A test checks the answers against them; no handler uses them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from sidecar.core.policy import RiskClass
from sidecar.core.record import (
    CausalRole,
    DecisionOutcome,
    DecisionSource,
    DecisionTrigger,
    DecisionType,
    Event,
    Origin,
)
from sidecar.core.rehearsal import ExecutionScope
from sidecar.core.scope import ExecutionStatus, ScopeStatus
from sidecar.errors import ERRORS

Time = Annotated[str, Field(json_schema_extra={"format": "date-time"})]
Dollars = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]
Hash = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
ScopeId = Annotated[str, Field(pattern="^scope_[0-9a-f]{24,}$")]
DecisionId = Annotated[str, Field(json_schema_extra={"format": "uuid"})]
Bound = Literal["max_attempts", "max_cost_usd"]
Term = Literal["max_attempts", "ttl_seconds", "max_cost_usd"]
Code = Annotated[str, Field(json_schema_extra={"enum": list(ERRORS)})]
# A member that an answer leaves out if it has no value. It is never null instead.
ABSENT: Any = Field(default=None)


class AnswerModel(BaseModel):
    """An answer has the members that its model names, and no other."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        schema = handler.resolve_ref_schema(handler(core_schema))
        for member in schema.get("properties", {}).values():
            member.pop("default", None)  # the default only marks a member that may be absent
        return schema


# Errors ---------------------------------------------------------------------------------------------


class WrongMember(AnswerModel):
    """One member of a body that is wrong, as a JSON pointer, and why."""

    member: str
    problem: str


class Problem(AnswerModel):
    """An error, as RFC 9457 has it. `error` says which; choose by it, not by the text. The members behind
    `detail` are those that the code brings along."""

    error: Code
    message: str
    type: Annotated[str, Field(pattern="^urn:scopegate:error:[a-z_]+$")]
    title: str
    status: Annotated[int, Field(ge=400, le=599)]
    detail: str
    decision_id: Annotated[str, Field(description="Under which the refusal is recorded.")] = ABSENT
    scope_id: str = ABSENT
    incident_id: str | None = ABSENT
    action: str | None = ABSENT
    target_agents: list[str] = ABSENT
    bound: Annotated[Bound, Field(description="What of the scope is used up.")] = ABSENT
    expires_at: Time = ABSENT
    rules: Annotated[list[str], Field(description="The policy rules that deny it.")] = ABSENT
    limit: Annotated[Term, Field(description="The term of a scope that a rule limits.")] = ABSENT
    value: Annotated[float, Field(ge=0, description="The most that the limit leaves.")] = ABSENT
    require: Annotated[
        Literal["intent_min_chars", "target_agents"], Field(description="What a rule wants to be said.")
    ] = ABSENT
    condition_error: Annotated[str, Field(description="Why a rule's condition could not be judged.")] = ABSENT
    ends_at: Annotated[
        Time | None, Field(description="When the brake ends; null: once what is in flight has ended.")
    ] = ABSENT
    retry_after_seconds: Annotated[int, Field(ge=1)] = ABSENT
    member: Annotated[str, Field(description="The first member that is missing or wrong.")] = ABSENT
    errors: Annotated[
        list[WrongMember] | list[str],
        Field(description="All members, or all places in files, that are wrong."),
    ] = ABSENT
    cause: Annotated[str, Field(description="What made it impossible to decide or to deliver.")] = ABSENT
    path: str = ABSENT
    max_bytes: Count = ABSENT
    execution_status: ExecutionStatus = ABSENT


# Scopes ---------------------------------------------------------------------------------------------


class GrantedScope(AnswerModel):
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


class Scope(GrantedScope):
    """A scope as it stands, and what was used of it."""

    created_at: Time
    attempts_used: Count
    cost_used_usd: Annotated[Dollars, Field(description="What was spent and what is held.")]


class ScopeList(AnswerModel):
    """A page of an incident's scopes, newest first; `total` counts all of them."""

    incident_id: str
    scopes: list[Scope]
    total: Count
    next: str | None


class RevokedScope(AnswerModel):
    scope_id: str
    status: Literal["revoked"]


class RevocationMeta(AnswerModel):
    timestamp: Time
    request_id: str


class Revocation(AnswerModel):
    """A scope that was withdrawn."""

    success: Literal[True]
    data: RevokedScope
    meta: RevocationMeta


class Rehearsal(AnswerModel):
    """What a recovery action would do."""

    success: bool
    cost_delta_cents: Count
    failure_count: Count
    policy_violations: list[str]
    execution_hash: Annotated[str, Field(pattern="^[0-9a-f]{16}$")]
    duration_ms: Count
    scope_coverage: Annotated[float, Field(ge=0, le=1)]
    samples_tested: Count
    details: dict[str, Any]
    risk_class: RiskClass
    scope_type: ExecutionScope


# Decisions and executions ---------------------------------------------------------------------------


class DecisionRecord(AnswerModel):
    """The 14 fields of a decision record."""

    decision_id: Annotated[str, Field(description="A UUID, unless a program named its record otherwise.")]
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


class LoggedDecision(DecisionRecord):
    """A record with its envelope, which no caller can set."""

    writer: str
    seq: Annotated[int, Field(ge=1, description="Its place in the writer's log.")]
    origin: Origin
    event: Event
    scope_id: str | None
    incident_id: str | None
    action: str | None
    admission_id: Annotated[str | None, Field(description="The admission that it ends.")]
    recorded_at: Annotated[Time, Field(description="Where it was decided at another time.")] = ABSENT


class DecisionList(AnswerModel):
    """A page of decisions, newest first."""

    decisions: list[LoggedDecision]
    next: str | None


class Execution(AnswerModel):
    """An admitted execution, and how it ended."""

    decision_id: DecisionId
    scope_id: Annotated[str | None, Field(description="Null where no scope was needed.")]
    tenant_id: str
    incident_id: str
    action: str
    request_id: str
    attempt_number: Annotated[int | None, Field(ge=1)]
    status: ExecutionStatus
    hold_usd: Dollars
    cost_usd: Dollars | None
    http_status: int | None
    cause: str | None
    admitted_at: Time
    ended_at: Time | None


class ExecutionList(AnswerModel):
    """A page of executions, newest first."""

    executions: list[Execution]
    next: str | None


class Decision(LoggedDecision):
    """A decision with its hash link, the execution that it admitted or ended, and how that ended."""

    hash: Hash
    previous_hash: Hash
    execution: Execution | None
    outcome: ExecutionStatus | None


class Backfill(AnswerModel):
    """How many records have the run from now on."""

    updated: Count


class KillSwitch(AnswerModel):
    """Whether the switch is on: then no optimized route is recorded."""

    active: bool


# Operations -----------------------------------------------------------------------------------------


class Left(AnswerModel):
    """What a scope still allows."""

    attempts: Count
    cost_usd: Dollars
    seconds: Annotated[float, Field(ge=0)]


class BrakeUse(AnswerModel):
    """How far a brake is used by what the request is about."""

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


class WouldRefuse(BaseModel):
    """A refusal that is only recorded, with what its error brings along. `rule` null: by a shadow route."""

    model_config = ConfigDict(extra="allow", frozen=True)

    rule: str | None
    error: Code
    message: str


class Explanation(AnswerModel):
    """What an execution would meet now. `members` are those that the error would bring along."""

    route: Annotated[str, Field(description="The path of the route that judges it, as it is configured.")]
    allowed: bool
    error: Code | None
    message: str
    bound: Bound | None
    rules: list[str]
    members: dict[str, Any]
    next: Annotated[str, Field(description="What to do about it.")]
    hold_usd: Dollars
    scope_required: bool
    scope: Scope | None
    left: Left | None
    brakes: list[BrakeUse]
    would_refuse: list[WouldRefuse]
    policy_revision: str | None


class StoreStatus(AnswerModel):
    """Where the store is, without secrets, and its bytes on disk; null: not to be measured."""

    url: str
    size: Count | None
    wal_size: Annotated[Count | None, Field(description="Of what is not in the database itself yet.")]
    free: Annotated[Count | None, Field(description="Left on its disk.")]
    growth_per_day: Annotated[Count | None, Field(description="Added in the last 24 hours.")]


class LastReload(AnswerModel):
    time: Time
    ok: bool
    errors: list[str]


class AcceptedClock(AnswerModel):
    """The time that counts from now on, and the one that counted before."""

    decision_id: DecisionId
    now: Time
    time_before: Time
    step_seconds: float


class Reloaded(AnswerModel):
    """What is in force after a reload. `changed` are the keys of the configuration whose values are others
    now, and `policies` where the set is; `shadowed` are the keys of the file that the environment or a flag
    overrides."""

    policy_revision: str | None
    config_revision: str
    changed: list[str]
    shadowed: list[str]


class Listeners(AnswerModel):
    """`host:port`, `https://host:port` with TLS, or `unix:/path`."""

    data: str
    admin: str
    ops: str


class Check(AnswerModel):
    ok: bool
    reason: str | None


class Status(AnswerModel):
    """What runs here, and how it is."""

    ready: bool
    checks: Checks
    version: str
    uptime_seconds: float
    draining: bool
    in_flight: Count
    unknown_executions: Annotated[Count | None, Field(description="Null: the store cannot be read.")]
    oldest_unknown_admitted_at: Time | None
    clock: Annotated[Check, Field(description="Whether decisions are made by the wall clock.")]
    store: StoreStatus
    policy_revision: str | None
    config_revision: str
    last_reload: LastReload
    scope_required_from: RiskClass
    shadow_routes: Annotated[list[str], Field(description="Paths on which nothing is refused.")]
    scopes_served_on: Annotated[
        Literal["data", "admin"], Field(description="The listener that issues and revokes scopes.")
    ]
    listeners: Annotated[Listeners, Field(description="Where each one listens.")]


class Liveness(AnswerModel):
    alive: Literal[True]


class Checks(AnswerModel):
    store: Check
    log: Check
    policies: Check
    clock: Check
    draining: Check


class Readiness(AnswerModel):
    """Whether requests can be decided, and what stands against it."""

    ready: bool
    checks: Checks


class TenantScope(Scope):
    """A scope as operators see it."""

    tenant_id: str


class ScopePage(AnswerModel):
    """A page of scopes, newest first. A filtered one may be short, or empty, and still have a `next`."""

    scopes: list[TenantScope]
    next: str | None


class SpentScope(TenantScope):
    """A scope with the executions that it admitted, oldest first."""

    executions: list[Execution]
