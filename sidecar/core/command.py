"""Commands: every change to what the sidecar knows is one of these values.

A command carries the policy set under which its request began, so that a reload can never judge one
request by a mixture of two sets. Ids come from outside: the core draws no random numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sidecar.core.facts import Claims
from sidecar.core.policy import PolicySet, RiskClass
from sidecar.core.record import Origin, Record
from sidecar.core.rules import GrantJudgment, Objection, Preview
from sidecar.core.scope import Execution, Scope
from sidecar.errors import Refusal

Gatekept = Literal["scoped_execution", "scope_grant"]
Switch = Literal["care_kill_switch"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Issue:
    """Grant a scope. `scope` holds the terms; its times are set when the command is applied.

    `defaulted` names the terms (of `rules.TERMS`) that nobody asked for: policies may lower them. `judged` is
    what the rules have said already, None: they are asked when the command is applied.
    """

    decision_id: str
    scope: Scope
    ttl: int
    policies: PolicySet
    defaulted: frozenset[str] = frozenset()
    judged: GrantJudgment | None = None
    request_id: str | None = None
    principal: str = "anonymous"
    created_by_verified: bool = False
    record_denial: bool = True
    origin: Origin = "gate"


@dataclass(frozen=True, slots=True, kw_only=True)
class Admit:
    """Let one execution through if its scope and the policies allow it, and consume the scope.

    With `record_denial` off, a denial leaves no record of its own: the caller is in a flood and will
    record it in a counted summary. `announced_cost` is what the caller knows that it will cost; where it is
    above the catalogue's hold, it is what is held. `preview` is what the rules have said already, None: they
    are asked when the command is applied. An action of a risk below `scope_required_from` needs no scope. On
    a `shadow` route what would be a refusal is only recorded.
    """

    decision_id: str
    claims: Claims
    policies: PolicySet
    tenant_id: str = "default"
    request_id: str = ""
    principal: str = "anonymous"
    body_sha256: str | None = None
    announced_cost: int = 0
    preview: Preview | None = None
    scope_required_from: RiskClass = RiskClass.LOW
    shadow: bool = False
    record_denial: bool = True
    origin: Origin = "gate"


@dataclass(frozen=True, slots=True, kw_only=True)
class Refuse:
    """Record a refusal that needed no scope to be decided, or, with `count` above 1, a flood of them.

    With `shadow` it only would have been one: the request is let through.
    """

    decision_id: str
    refusal: Refusal
    gatekept: Gatekept = "scoped_execution"
    claims: Claims = field(default_factory=Claims)
    policy_revision: str | None = None
    tenant_id: str = "default"
    request_id: str | None = None
    principal: str = "anonymous"
    count: int = 1
    summary: Mapping[str, Any] | None = None
    shadow: bool = False
    origin: Origin = "gate"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settle:
    """Say how an admitted execution ended. `cost` is what the upstream reported, None where it did not."""

    decision_id: str
    admission_id: str
    outcome: Literal["answered", "not_sent", "unknown"]
    cost: int | None = None
    http_status: int | None = None
    cause: str | None = None
    origin: Origin = "gate"


@dataclass(frozen=True, slots=True, kw_only=True)
class Revoke:
    """Withdraw a scope for good. Repeatable; each call is recorded.

    `cause`: why the sidecar does it of its own accord.
    """

    decision_id: str
    scope_id: str
    policy_revision: str | None = None
    tenant_id: str = "default"
    request_id: str | None = None
    principal: str = "anonymous"
    record_denial: bool = True
    cause: str | None = None
    origin: Origin = "gate"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reconcile:
    """Say what became of an execution that ended `unknown`. `cost` None means: the hold."""

    decision_id: str
    admission_id: str
    outcome: Literal["executed", "not_executed"]
    cost: int | None = None
    reason: str | None = None
    request_id: str | None = None
    principal: str = "anonymous"
    origin: Origin = "gate"


@dataclass(frozen=True, slots=True, kw_only=True)
class Emit:
    """Append a record that somebody else decided.

    `once` is a key under which a record is kept only once; `unless_switched` names a switch that, while it
    is on, keeps the record out. Both are looked at in the transaction that appends.
    """

    record: Record
    origin: Origin
    once: bytes | None = None
    unless_switched: Switch | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """Turn a switch on or off. Repeatable; each call is recorded."""

    decision_id: str
    switch: Switch
    on: bool
    origin: Origin
    request_id: str | None = None
    principal: str = "anonymous"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bind:
    """Bind a run to the records of a request that were made before there was one."""

    request_id: str
    run_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AcceptClock:
    """Take the wall clock's time for right. It is applied by itself, and `now` is that time.

    `before` is the time that counted until then, in microseconds since 1970: it may be after `now`.
    """

    decision_id: str
    before: int = 0
    request_id: str | None = None
    principal: str = "anonymous"
    origin: Origin = "api"


Command = Issue | Admit | Refuse | Settle | Revoke | Reconcile | Emit | Turn | Bind | AcceptClock


@dataclass(frozen=True, slots=True)
class Issued:
    """`shadow` holds what would have been refused, if it were not only recorded."""

    scope: Scope
    decision_id: str
    shadow: tuple[Objection, ...] = ()


@dataclass(frozen=True, slots=True)
class Admitted:
    """`scope` is as it stands after this attempt was consumed, None where none was needed; `shadow` as in
    Issued."""

    scope: Scope | None
    execution: Execution
    timeout_seconds: float | None
    shadow: tuple[Objection, ...] = ()


@dataclass(frozen=True, slots=True)
class Denied:
    """`decision_id` is None where no record was to be left; `objections` are all that stood against it."""

    refusal: Refusal
    decision_id: str | None
    objections: tuple[Objection, ...] = ()


@dataclass(frozen=True, slots=True)
class Recorded:
    decision_id: str


@dataclass(frozen=True, slots=True)
class Settled:
    """`overrun`: the reported cost was above a hold that was not zero."""

    scope: Scope | None
    execution: Execution
    overrun: bool


@dataclass(frozen=True, slots=True)
class NotInFlight:
    """A settlement for an execution that has ended already, or never was: nothing changed."""

    execution: Execution | None


@dataclass(frozen=True, slots=True)
class Revoked:
    scope: Scope
    decision_id: str


@dataclass(frozen=True, slots=True)
class Emitted:
    record: Record


@dataclass(frozen=True, slots=True)
class NotEmitted:
    """Nothing was appended: a record is kept under that key already, or a switch is on."""

    why: Literal["repeated", "switched_off"]


@dataclass(frozen=True, slots=True)
class Turned:
    on: bool
    decision_id: str


@dataclass(frozen=True, slots=True)
class Bound:
    """How many records have their run from now on."""

    count: int


@dataclass(frozen=True, slots=True)
class ClockAccepted:
    """Both in microseconds since 1970: the time that counted before, and the one that counts from now on."""

    decision_id: str
    before: int
    now: int


Granting = Issued | Admitted | Denied | Revoked
Ending = Settled | NotInFlight
Reply = Granting | Ending | Recorded | Emitted | NotEmitted | Turned | Bound | ClockAccepted
