"""The sections of policy files: what an action and a rule may say, key by key.

A rule that cannot take effect is refused when it is read, never skipped. The text below a key is its row in
the reference.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainValidator, model_validator

from sidecar.core.policy import (
    ActionPolicy,
    Brake,
    Facet,
    Limit,
    Match,
    Phase,
    Require,
    Rule,
)
from sidecar.core.principal import PrincipalKind
from sidecar.core.roles import Holders
from sidecar.core.wording import visible_chars
from sidecar.policies._conditions import CelCondition, condition
from sidecar.settings.faults import Mistake, kind, refuse
from sidecar.settings.keys import Section
from sidecar.settings.numbers import MAX_SECONDS, Count, Dollars, Lifetime, Seconds, whole, whole_seconds
from sidecar.settings.values import (
    LIST,
    NOT_EMPTY,
    ONE_OR_MORE,
    Identifier,
    Identifiers,
    Risk,
)

MAX_REASON_CHARS = 1000

_BrakeSeconds = Annotated[int, whole_seconds(1, 30 * MAX_SECONDS)]


class PolicyFile(Section):
    """One file. Its actions and rules are validated one by one."""

    example = "{actions: {restart_pod: {risk: low}}, rules: []}"

    actions: dict[str, Any] | None = None
    rules: list[Any] | None = None
    roles: dict[str, Any] | None = None


class ActionSection(Section):
    """One entry of the catalogue."""

    example = "{risk: low}"

    risk: Risk
    """How much harm the action can do: `low`, `medium`, `high` or `critical`."""
    hold: Dollars = Field(0, alias="max_cost_usd")
    """US dollars that an execution holds against the scope until its real cost is known; 0 if left out. Set
    it to the most that one execution can cost: an execution whose hold does not fit under the scope's ceiling
    is refused before anything is sent. A scope for the action needs a `max_cost_usd` of at
    least this amount; a request for less gets 422 with `min_cost_usd`. If the amount exceeds
    `scopes.defaults.max_cost_usd`, requests must therefore name a `max_cost_usd`."""
    timeout_seconds: Annotated[Seconds | None, NOT_EMPTY] = None
    """Replaces `upstream.response_timeout_seconds` for this action. An execution that takes longer is
    `unknown` until it is reconciled, so set it for slow actions."""
    targets_required: bool = False
    """`true`: a request for the action must name its target agents."""

    def policy(self) -> ActionPolicy:
        return ActionPolicy(**dict(self))


_Globs = Annotated[Identifiers, NOT_EMPTY]


class MatchSection(Section):
    example = "{risk: high}"

    risk: Annotated[frozenset[Risk], LIST, ONE_OR_MORE, NOT_EMPTY] = frozenset()
    """The risk of the action."""
    action: _Globs = ()
    """The action. It must be able to match an action that the catalogue lists by name or by a glob, unless
    the catalogue has `"*"`."""
    incident_id: _Globs = ()
    """The incident."""
    tenant_id: _Globs = ()
    """The tenant."""
    principal: _Globs = ()
    """The id of the authenticated caller, else `anonymous`."""
    principal_kind: Annotated[tuple[PrincipalKind, ...], LIST, ONE_OR_MORE, NOT_EMPTY] = ()
    """The kind of the caller: `human`, `service` or `agent`."""
    principal_group: _Globs = ()
    """The groups of the caller. One matching group is enough."""
    target_agents: _Globs = ()
    """The target agents. One matching agent of a request is enough."""


class LimitSection(Section):
    example = "{max_attempts: 1}"

    max_attempts: Annotated[Count | None, NOT_EMPTY] = None
    """Executions under one scope."""
    ttl_seconds: Annotated[Lifetime | None, NOT_EMPTY] = None
    """Seconds until the scope expires."""
    max_cost: Annotated[Dollars | None, NOT_EMPTY] = Field(None, alias="max_cost_usd")
    """US dollars that all executions may cost together."""


class RequireSection(Section):
    example = "{intent_min_chars: 20}"

    intent_min_chars: Annotated[int, whole(1, 2000)] = 0
    """The least length of the intent. Characters that a reader sees count, and the spaces between them."""
    target_agents: bool = False
    """`true`: the request names target agents."""
    executor_is_not_issuer: bool = False
    """On execute, `true`: another principal than the one that asked for the scope executes it. Both must be
    authenticated."""
    executor_is_issuer: bool = False
    """On execute, `true`: the principal that asked for the scope executes it. Both must be authenticated."""


class BrakeSection(Section):
    example = "{max_attempts: 3, window_seconds: 3600}"

    per: Annotated[tuple[Facet, ...], LIST, ONE_OR_MORE] = ()
    """The facts by whose values executions are counted separately: `incident_id`, `action`, `tenant_id`,
    `principal`, `target_agents`. Without it all matching executions are counted together."""
    max_attempts: Annotated[Count | None, NOT_EMPTY] = None
    """Executions in any `window_seconds`."""
    window_seconds: _BrakeSeconds = 0
    """How long an execution counts for `max_attempts` and `one_in_flight`."""
    cooldown_seconds: _BrakeSeconds = 0
    """Seconds from one execution to the next."""
    one_in_flight: bool = False
    """`true`: none while another one runs. An execution with an unknown outcome counts as running until it is
    reconciled, or until `window_seconds` after its admission."""


def _denies(value: object) -> object:
    if value == "allow":
        raise ValueError(
            "allow has no effect: a request is allowed unless a rule refuses it; remove the rule"
        )
    return value


def _condition(value: object) -> CelCondition:
    if not isinstance(value, str):
        raise ValueError(f"expects a condition as text, found {kind(value)}; write it in quotes")
    return condition(value)


def _reason(value: object) -> str:
    """The reason on one line, even if the file breaks it into several."""
    if not isinstance(value, str):
        raise ValueError(f"expects text, found {kind(value)}; write it in quotes")
    line = " ".join(value.split())
    if len(line) > MAX_REASON_CHARS or not line.isprintable():
        raise ValueError(f"expects at most {MAX_REASON_CHARS} characters without controls")
    if value and not visible_chars(line):
        raise ValueError("says nothing that a reader sees; write a reason, or remove the key")
    return line


class RuleSection(Section):
    """One rule."""

    example = "{id: no-failover, on: execute, match: {action: failover_db}, effect: deny}"

    id: Identifier = Field(examples=["no-failover"])
    """The rule's name in answers, records and metrics. It is unique in all files."""
    on: Phase
    """When the rule applies: `issue`, to a request for a scope, or `execute`, to an execution."""
    match: MatchSection = MatchSection()
    """The requests that the rule is about. Each key holds a value or a list; all but `risk` may contain `*`,
    `?` and `[...]`. A key that is left out matches every request."""
    when: Annotated[CelCondition | None, PlainValidator(_condition)] = None
    """A [condition](#conditions) in CEL, the Common Expression Language. The rule applies if it holds. It
    needs the `[cel]` extra."""
    limit: Annotated[LimitSection | None, NOT_EMPTY] = None
    """On issue: the most that is granted. A request for more is refused, with `limit` and `value`; a default
    above it is lowered to it. If a lowered `max_cost_usd` is below what an action holds, the request gets
    422."""
    require: Annotated[RequireSection | None, NOT_EMPTY] = None
    """What a request must say."""
    brake: Annotated[BrakeSection | None, NOT_EMPTY] = None
    """On execute: how often the action may be executed. See [Brakes](#brakes)."""
    effect: Annotated[Literal["deny"] | None, BeforeValidator(_denies), NOT_EMPTY] = None
    """`deny` refuses every request that the rule is about."""
    mode: Literal["enforce", "shadow"] = "enforce"
    """`shadow` refuses nothing. What the rule would have refused stands in the record
    (`details.would_refuse`) and in a metric."""
    reason: Annotated[str, PlainValidator(_reason)] = ""
    """Why the rule exists. The answer of a refusal quotes it."""

    def rule(self) -> Rule:
        return Rule(
            id=self.id,
            on=self.on,
            match=Match(**dict(self.match)),
            when=self.when,
            limit=Limit(**dict(self.limit)) if self.limit else None,
            require=Require(**dict(self.require)) if self.require else None,
            brake=Brake(**dict(self.brake)) if self.brake else None,
            deny=self.effect == "deny",
            shadow=self.mode == "shadow",
            reason=self.reason,
        )


# What a clause of a rule does: the keys of which it needs one, and the message without any.
_CLAUSES: Mapping[str, tuple[tuple[str, ...], str]] = {
    "limit": (
        ("max_attempts", "ttl_seconds", "max_cost_usd"),
        "limits nothing; add max_attempts, ttl_seconds or max_cost_usd",
    ),
    "require": (
        ("intent_min_chars", "target_agents", "executor_is_not_issuer", "executor_is_issuer"),
        "requires nothing; add intent_min_chars or target_agents: true",
    ),
    "brake": (
        ("max_attempts", "cooldown_seconds", "one_in_flight"),
        "brakes nothing; add max_attempts, cooldown_seconds or one_in_flight: true",
    ),
}
# The clauses that have no meaning in a phase.
_MISPLACED = {
    ("execute", "limit"): "is about what a scope may grant; write on: issue, or use a brake",
    ("issue", "brake"): "counts executions; write on: execute, or use a limit",
}


class HoldersSection(Section):
    """Who holds a role."""

    example = "{groups: [oncall]}"

    groups: _Globs = ()
    """The groups whose members hold the role. `"*"`: every caller with at least one group."""
    ids: _Globs = ()
    """The callers that hold the role. No glob matches `anonymous`, only that name."""

    @model_validator(mode="after")
    def _not_empty(self) -> HoldersSection:
        message = "names no holder; add groups or ids, or remove the role"
        refuse((not self.groups and not self.ids, (), message))
        return self

    def holders(self) -> Holders:
        return Holders(groups=self.groups, ids=self.ids)


def contradictions(rule: Mapping[str, Any]) -> Iterator[Mistake]:
    """The mistakes that only several keys of a rule show together.

    `rule` is as the file has it, so that mistakes in single keys do not hide these.
    """
    clauses = [key for key in _CLAUSES if key in rule]
    if "effect" not in rule and not clauses:
        yield Mistake((), "does nothing; add limit, require, brake or effect: deny")
    for key in clauses:
        if "effect" in rule and rule["effect"] != "allow":
            message = "does nothing beside effect: deny, which refuses anyway; remove one of them"
            yield Mistake((key,), message)
        for (phase, clause), message in _MISPLACED.items():
            if clause == key and phase == rule.get("on"):
                yield Mistake((key,), message)
        needed, message = _CLAUSES[key]
        if isinstance(rule[key], dict) and not _sets(rule[key], *needed):
            yield Mistake((key,), message)
    require = rule.get("require")
    if isinstance(require, dict) and rule.get("on") == "issue":
        for key in ("executor_is_not_issuer", "executor_is_issuer"):
            if _sets(require, key):
                yield Mistake(("require", key), "is about the executor; write on: execute")
    both = ("executor_is_issuer", "executor_is_not_issuer")
    if isinstance(require, dict) and all(_sets(require, key) for key in both):
        message = "contradicts executor_is_not_issuer, so it would refuse everything; remove one of them"
        yield Mistake(("require", "executor_is_issuer"), message)
    brake = rule.get("brake")
    if isinstance(brake, dict) and "window_seconds" not in brake:
        for key in ("max_attempts", "one_in_flight"):
            if _sets(brake, key):
                message = f"is required with {key}; add how long an execution counts"
                yield Mistake(("brake", "window_seconds"), message)
                break


def _sets(clause: Mapping[str, Any], *keys: str) -> bool:
    """Whether one of the keys has an effect. An invalid value counts, because it is a mistake of its own."""
    return any(clause.get(key, False) is not False for key in keys)
