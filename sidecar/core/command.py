"""Commands: every change to the sidecar's state is one of these values.

A command carries the policy set that was in force when its request began. A reload therefore never judges one
request by a mixture of two sets. The caller supplies all ids, because the core draws no random numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sidecar.core.facts import Claims
from sidecar.core.freeze import Freeze, Pattern
from sidecar.core.idempotency import Claim, KeptAnswer
from sidecar.core.policy import PolicySet, RiskClass
from sidecar.core.principal import ANONYMOUS, Principal
from sidecar.core.record import Origin, Record
from sidecar.core.rules import GrantJudgment, Objection, Preview
from sidecar.core.scope import Execution, ReportedOutcome, Scope
from sidecar.core.valueclass import valueclass
from sidecar.errors import Refusal

# What a record is about: an execution, a scope, or a call of the sidecar that its caller may not make.
Gatekept = Literal["scoped_execution", "scope_grant", "access"]
Switch = Literal["care_kill_switch"]

# The most characters of a path that a summary shows.
SHOWN_PATH_CHARS = 200


@dataclass(frozen=True, slots=True)
class RequestLine:
    """The method of a request that no route lists, and its path as logs show it, without the query."""

    method: str
    path: str

    def __str__(self) -> str:
        return f"{self.method} {self.path[:SHOWN_PATH_CHARS]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Issue:
    """Grant a scope. `scope` holds the terms. Its times are set when the command is applied.

    `defaulted` names the terms (of `rules.TERMS`) that the request omitted. Policies may lower them. `judged`
    is an earlier judgment by the rules. If it is None, the rules judge when the command is applied.
    """

    decision_id: str
    scope: Scope
    ttl: int
    policies: PolicySet
    defaulted: frozenset[str] = frozenset()
    judged: GrantJudgment | None = None
    request_id: str | None = None
    principal: Principal = ANONYMOUS
    record_denial: bool = True
    origin: Origin = "gate"


@valueclass
class Admit:
    """Admit one execution if its scope and the policies allow it, and consume an attempt of the scope.

    If `record_denial` is false, a denial leaves no record of its own, because the caller is in a flood and
    records it in a counted summary. `announced_cost` is the cost that the caller expects. If it exceeds the
    catalogue's hold, it is the hold. `preview` is an earlier judgment by the rules. If it is None, the rules
    judge when the command is applied. An action with a risk below `scope_required_from` needs no scope. On a
    `shadow` route, a refusal is only recorded. With `claim`, a request that repeats an earlier one under its
    idempotency key is not admitted: it gets what `core.idempotency` says. An execution that ends by report
    has the SHA-256 of its completion token as `report_token`, and `report_seconds` for its report.
    """

    decision_id: str
    claims: Claims
    policies: PolicySet
    tenant_id: str = "default"
    request_id: str = ""
    principal: Principal = ANONYMOUS
    route: str | None = None
    body_sha256: str | None = None
    announced_cost: int = 0
    preview: Preview | None = None
    scope_required_from: RiskClass = RiskClass.LOW
    shadow: bool = False
    claim: Claim | None = None
    record_denial: bool = True
    report_token: bytes | None = None
    report_seconds: int | None = None
    origin: Origin = "gate"


@dataclass(frozen=True, slots=True, kw_only=True)
class Refuse:
    """Record a refusal that was decided without the store. With `count` above 1, record a flood of refusals.

    With `shadow`, the request is admitted, and the record says that it would have been refused. `line` is set
    if no route lists the request.
    """

    decision_id: str
    refusal: Refusal
    gatekept: Gatekept = "scoped_execution"
    claims: Claims = field(default_factory=Claims)
    policy_revision: str | None = None
    tenant_id: str = "default"
    request_id: str | None = None
    principal: Principal = ANONYMOUS
    route: str | None = None
    count: int = 1
    summary: Mapping[str, Any] | None = None
    shadow: bool = False
    line: RequestLine | None = None
    origin: Origin = "gate"


@dataclass(frozen=True, slots=True, kw_only=True)
class PassUnlisted:
    """Record that a request passes which no route lists. With `count` above 1, record a flood of them, which
    has a `summary` instead of a `line`."""

    decision_id: str
    line: RequestLine | None
    policy_revision: str | None = None
    tenant_id: str = "default"
    request_id: str | None = None
    principal: Principal = ANONYMOUS
    count: int = 1
    summary: Mapping[str, Any] | None = None
    origin: Origin = "gate"


# What an answer, or its absence, makes of an execution in flight.
SettledOutcome = Literal["answered", "running", "not_executed", "not_sent", "unknown"]


@valueclass
class Settle:
    """Record how an admitted execution ended. `cost` is the upstream's report, None if there was none.

    With the outcome `running`, it has not ended: it will be reported. That leaves no record. `answer` is what
    repeats of the request get, None if it has no idempotency key.
    """

    decision_id: str
    admission_id: str
    outcome: SettledOutcome
    cost: int | None = None
    http_status: int | None = None
    cause: str | None = None
    answer: KeptAnswer | None = None
    origin: Origin = "gate"


@dataclass(frozen=True, slots=True, kw_only=True)
class CountReplays:
    """Record a flood of replays, which are `count`. `subjects` are some of their scopes or incidents."""

    decision_id: str
    count: int
    subjects: tuple[str, ...]
    policy_revision: str | None = None
    tenant_id: str = "default"
    request_id: str | None = None
    principal: Principal = ANONYMOUS
    route: str | None = None
    origin: Origin = "gate"


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Report how an execution ended. The report wins over an answer that is still to come or was lost.

    `token_sha256` is the SHA-256 of the presented completion token. If `cost` is None, the hold is the cost.
    `detail` is free text of the reporter.
    """

    decision_id: str
    admission_id: str
    token_sha256: bytes
    outcome: ReportedOutcome
    cost: int | None = None
    detail: str | None = None
    request_id: str | None = None
    origin: Origin = "api"


@dataclass(frozen=True, slots=True, kw_only=True)
class Lapse:
    """End a running execution as `unknown` if its time to be reported has passed."""

    decision_id: str
    admission_id: str
    origin: Origin = "gate"


@dataclass(frozen=True, slots=True, kw_only=True)
class Revoke:
    """Revoke a scope permanently. The command is repeatable, and each call is recorded.

    With `own_only`, the scope must be one that its principal asked for. `cause` is set if the sidecar revokes
    the scope on its own, and says why.
    """

    decision_id: str
    scope_id: str
    policy_revision: str | None = None
    tenant_id: str = "default"
    request_id: str | None = None
    principal: Principal = ANONYMOUS
    record_denial: bool = True
    own_only: bool = False
    cause: str | None = None
    origin: Origin = "gate"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reconcile:
    """Resolve an execution that ended `unknown` or is `running`. If `cost` is None, the hold is the cost.
    `reconciled_by` is the person that the caller names, unverified."""

    decision_id: str
    admission_id: str
    outcome: Literal["executed", "not_executed"]
    cost: int | None = None
    reason: str | None = None
    reconciled_by: str | None = None
    request_id: str | None = None
    principal: Principal = ANONYMOUS
    origin: Origin = "gate"


@dataclass(frozen=True, slots=True, kw_only=True)
class Emit:
    """Append a record of a decision made outside the gate.

    `once` is a key under which a record is kept only once. While the switch `unless_switched` is on, the
    record is not appended. Both are tested in the transaction that appends the record.
    """

    record: Record
    origin: Origin
    principal: Principal = ANONYMOUS
    once: bytes | None = None
    unless_switched: Switch | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """Turn a switch on or off. The command is repeatable, and each call is recorded."""

    decision_id: str
    switch: Switch
    on: bool
    origin: Origin
    request_id: str | None = None
    principal: Principal = ANONYMOUS


@dataclass(frozen=True, slots=True, kw_only=True)
class SetFreeze:
    """Put a freeze in force, until `ends_at` (microseconds since 1970) or until it is lifted. The freeze gets
    the `decision_id` as its id, and holds in the tenant of its principal."""

    decision_id: str
    match: Pattern
    reason: str
    excepted: Pattern = field(default_factory=dict)
    ends_at: int | None = None
    request_id: str | None = None
    principal: Principal = ANONYMOUS
    origin: Origin = "api"


@dataclass(frozen=True, slots=True, kw_only=True)
class LiftFreeze:
    """Lift a freeze. The command is repeatable."""

    decision_id: str
    freeze_id: str
    reason: str
    request_id: str | None = None
    principal: Principal = ANONYMOUS
    origin: Origin = "api"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bind:
    """Bind a run to the records of a request that were made before the run existed."""

    request_id: str
    run_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AcceptClock:
    """Accept the wall clock's time. The command is applied on its own, with `now` as that time.

    `before` is the sidecar's time until then, in microseconds since 1970. It may be after `now`.
    """

    decision_id: str
    before: int = 0
    request_id: str | None = None
    principal: Principal = ANONYMOUS
    origin: Origin = "api"


Command = (
    Issue
    | Admit
    | Refuse
    | PassUnlisted
    | CountReplays
    | Settle
    | Report
    | Lapse
    | Revoke
    | Reconcile
    | Emit
    | Turn
    | SetFreeze
    | LiftFreeze
    | Bind
    | AcceptClock
)


@dataclass(frozen=True, slots=True)
class Issued:
    """A scope was granted. `shadow` holds the objections that were only recorded."""

    scope: Scope
    decision_id: str
    shadow: tuple[Objection, ...] = ()


@dataclass(frozen=True, slots=True)
class Admitted:
    """An execution was admitted.

    `scope` is the scope after this attempt was consumed, or None if the execution needed no scope. `shadow`
    holds the objections that were only recorded.
    """

    scope: Scope | None
    execution: Execution
    timeout_seconds: float | None
    shadow: tuple[Objection, ...] = ()


@dataclass(frozen=True, slots=True)
class Denied:
    """A command was refused.

    `decision_id` is None if it left no record. `objections` holds all objections.
    """

    refusal: Refusal
    decision_id: str | None
    objections: tuple[Objection, ...] = ()


@dataclass(frozen=True, slots=True)
class Replayed:
    """A request repeats an earlier one under its idempotency key, and gets the answer of that.

    `execution` is the earlier execution, and `scope` its scope as it was at `answered_at`. `decision_id` is
    None if the replay left no record.
    """

    scope: Scope | None
    execution: Execution
    answer: KeptAnswer
    answered_at: int
    decision_id: str | None


@dataclass(frozen=True, slots=True)
class Recorded:
    decision_id: str


@dataclass(frozen=True, slots=True)
class Settled:
    """An execution ended, or is running now. `overrun` is true if the reported cost exceeded a hold above
    zero."""

    scope: Scope | None
    execution: Execution
    overrun: bool


@dataclass(frozen=True, slots=True)
class NotInFlight:
    """The execution to settle has ended already or does not exist. Nothing changed."""

    execution: Execution | None


@dataclass(frozen=True, slots=True)
class Repeated:
    """The execution has ended already as this report says. Nothing changed."""

    scope: Scope | None
    execution: Execution


@dataclass(frozen=True, slots=True)
class Revoked:
    scope: Scope
    decision_id: str


@dataclass(frozen=True, slots=True)
class Emitted:
    record: Record


@dataclass(frozen=True, slots=True)
class NotEmitted:
    """Nothing was appended, because a record with that key exists already or a switch is on."""

    why: Literal["repeated", "switched_off"]


@dataclass(frozen=True, slots=True)
class Turned:
    on: bool
    decision_id: str


@dataclass(frozen=True, slots=True)
class FreezeSet:
    freeze: Freeze


@dataclass(frozen=True, slots=True)
class FreezeLifted:
    """A freeze was lifted, by this command or before."""

    freeze: Freeze


@dataclass(frozen=True, slots=True)
class RunBound:
    """A run was bound. `count` is the number of records that it was bound to."""

    count: int


@dataclass(frozen=True, slots=True)
class ClockAccepted:
    """The sidecar's time `before` and after (`now`) the command, both in microseconds since 1970."""

    decision_id: str
    before: int
    now: int


Granting = Issued | Admitted | Denied | Revoked
Ending = Settled | NotInFlight | Repeated
Freezing = FreezeSet | FreezeLifted
Reply = (
    Granting
    | Ending
    | Freezing
    | Replayed
    | Recorded
    | Emitted
    | NotEmitted
    | Turned
    | RunBound
    | ClockAccepted
)
