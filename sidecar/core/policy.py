"""The policy set: the actions and rules of the operators, as one immutable value. This module reads no files.

Rules combine in two ways: a refusal by any rule refuses, and of several limits the strictest holds. The order
of rules therefore never matters. The module `rules` judges requests by a policy set.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from fnmatch import translate
from functools import lru_cache
from typing import Any, Literal, Protocol

# The most unlisted actions for which a policy set caches the matching rules.
MOST_UNLISTED = 4_096

Phase = Literal["issue", "execute"]
# The facets by which a brake may count.
Facet = Literal["incident_id", "action", "tenant_id", "principal", "target_agents"]


class RiskClass(str, Enum):
    """The risk of a recovery action, in rising order."""

    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"
    CRITICAL = "critical"

    # The comparisons of str would sort alphabetically.
    def __lt__(self, other: str) -> bool:
        return _rank(self) < _rank(other)

    def __le__(self, other: str) -> bool:
        return _rank(self) <= _rank(other)

    def __gt__(self, other: str) -> bool:
        return _rank(self) > _rank(other)

    def __ge__(self, other: str) -> bool:
        return _rank(self) >= _rank(other)


def _rank(risk: str) -> int:
    return tuple(RiskClass).index(RiskClass(risk))


@dataclass(frozen=True, slots=True, kw_only=True)
class ActionPolicy:
    """One entry of the catalogue.

    `hold` is the amount that an execution sets aside until its cost is known, in micro-dollars. If
    `timeout_seconds` is set, it replaces the upstream's response timeout. With `targets_required`, a request
    for the action must name target agents.
    """

    risk: RiskClass
    hold: int = 0
    timeout_seconds: float | None = None
    targets_required: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """The facts that the rules read of one execution, or of one action of a requested grant.

    For a grant, the terms are the requested ones and no attempt is used. For an execution that needs no
    scope, the intent is empty and the numbers are zero. `max_cost` is the scope's ceiling in micro-dollars.
    `now` is in microseconds since 1970 (UTC).
    """

    action: str
    risk: RiskClass | None
    incident_id: str
    tenant_id: str
    principal: str
    target_agents: tuple[str, ...] = ()
    parameters: Mapping[str, Any] = field(default_factory=dict)
    intent: str = ""
    max_cost: int = 0
    attempts_used: int = 0
    attempts_remaining: int = 0
    scope_age_seconds: int = 0
    now: int = 0


# The facts that a condition may read. SCOPE_FACTS are the ones that only the scope holds.
FACTS = (
    "action",
    "risk",
    "incident_id",
    "tenant_id",
    "principal",
    "target_agents",
    "parameters",
    "intent",
    "max_cost_micros",
    "attempts_used",
    "attempts_remaining",
    "scope_age_seconds",
    "now",
)
SCOPE_FACTS = frozenset(
    {"intent", "max_cost_micros", "attempts_used", "attempts_remaining", "scope_age_seconds"}
)


class Condition(Protocol):
    """A rule's `when`. `reads` names the facts that it may read; additional names are harmless."""

    @property
    def text(self) -> str: ...

    @property
    def reads(self) -> frozenset[str]: ...

    def __call__(self, subject: Subject) -> bool:
        """Whether the condition holds. Raises ConditionFailed if it cannot be judged or is not a boolean."""


@lru_cache(maxsize=65_536)
def _regex(glob: str) -> re.Pattern[str]:
    return re.compile(translate(glob))


def globbed(globs: Sequence[str], value: str) -> bool:
    """Whether a value matches any of the globs (`*`, `?`, `[...]`, case-sensitive).

    No globs match every value.
    """
    return not globs or any(glob == value or _regex(glob).match(value) is not None for glob in globs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """The requests that a rule matches. An empty member matches every request.

    `target_agents` matches if it matches one target agent of the request.
    """

    risk: frozenset[RiskClass] = frozenset()
    action: tuple[str, ...] = ()
    incident_id: tuple[str, ...] = ()
    tenant_id: tuple[str, ...] = ()
    principal: tuple[str, ...] = ()
    target_agents: tuple[str, ...] = ()

    def action_matches(self, action: str, risk: RiskClass | None) -> bool:
        """Whether the members that depend on the action alone match."""
        return (not self.risk or risk in self.risk) and globbed(self.action, action)

    def rest_matches(
        self, incident_id: str, tenant_id: str, principal: str, target_agents: Sequence[str]
    ) -> bool:
        """Whether the members that do not depend on the action match."""
        return (
            globbed(self.incident_id, incident_id)
            and globbed(self.tenant_id, tenant_id)
            and globbed(self.principal, principal)
            and (not self.target_agents or any(globbed(self.target_agents, one) for one in target_agents))
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """The maximum of each term of a scope, None for no limit. `max_cost` is in micro-dollars."""

    max_attempts: int | None = None
    ttl_seconds: int | None = None
    max_cost: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Require:
    """The facts that a request must supply. `intent_min_chars` counts characters as `visible_chars` does."""

    intent_min_chars: int = 0
    target_agents: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Brake:
    """A limit on how often something is executed.

    A brake counts the admissions that the rule's `match` matches, separately for each value of the facets in
    `per`. Without facets it counts all of them together.

    1. At most `max_attempts` executions are admitted in any `window_seconds`.
    2. At least `cooldown_seconds` lie between two admissions.
    3. With `one_in_flight`, an execution waits until no other is in flight. An execution with an unknown
       outcome that was admitted in the window counts as in flight.
    """

    per: tuple[Facet, ...] = ()
    max_attempts: int | None = None
    window_seconds: int = 0
    cooldown_seconds: int = 0
    one_in_flight: bool = False

    @property
    def horizon_seconds(self) -> int:
        """The number of seconds that the brake looks back."""
        return max(self.window_seconds, self.cooldown_seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One rule. A rule with `deny` refuses matching requests. A rule with `shadow` is only recorded.

    A rule applies if `match` matches and the condition `when`, if present, holds.
    """

    id: str
    on: Phase
    match: Match = field(default_factory=Match)
    when: Condition | None = None
    limit: Limit | None = None
    require: Require | None = None
    brake: Brake | None = None
    deny: bool = False
    shadow: bool = False
    reason: str = ""

    @property
    def reads_scope(self) -> bool:
        """Whether the condition may read facts that only the scope holds."""
        return self.when is not None and not self.when.reads.isdisjoint(SCOPE_FACTS)


@dataclass(frozen=True, slots=True)
class _Index:
    """The rules of one phase, indexed by action."""

    named: Mapping[str, tuple[Rule, ...]]  # rules without wildcards, by each action that they name
    patterned: tuple[Rule, ...]  # rules that name actions with wildcards, or no action at all

    @classmethod
    def of(cls, rules: Sequence[Rule]) -> _Index:
        named: dict[str, list[Rule]] = {}
        patterned = []
        for rule in rules:
            if rule.match.action and not any(_is_pattern(glob) for glob in rule.match.action):
                for action in dict.fromkeys(rule.match.action):
                    named.setdefault(action, []).append(rule)
            else:
                patterned.append(rule)
        return cls({action: tuple(found) for action, found in named.items()}, tuple(patterned))


def _is_pattern(glob: str) -> bool:
    return any(character in glob for character in "*?[")


@dataclass(frozen=True, kw_only=True)
class PolicySet:
    """All policies at one moment. `revision` is a hash of the contents of the policy files."""

    revision: str
    actions: Mapping[str, ActionPolicy]
    unlisted: ActionPolicy | None = None
    rules: tuple[Rule, ...] = ()
    _indexes: Mapping[Phase, _Index] = field(init=False, repr=False, compare=False)
    _found: dict[tuple[Phase, str], tuple[Rule, ...]] = field(init=False, repr=False, compare=False)
    _brakes: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        indexes: dict[Phase, _Index] = {}
        for phase in ("issue", "execute"):
            indexes[phase] = _Index.of([rule for rule in self.rules if rule.on == phase])
        object.__setattr__(self, "_indexes", indexes)
        object.__setattr__(self, "_found", {})
        object.__setattr__(self, "_brakes", any(rule.brake is not None for rule in self.rules))

    def action(self, name: str) -> ActionPolicy | None:
        """The entry for an action, or the `"*"` entry for an unlisted one. None means that it is refused."""
        return self.actions.get(name, self.unlisted)

    def label(self, name: str) -> str:
        """The action as a metric label.

        Unlisted actions share one label, so the number of labels is bounded.
        """
        return name if name in self.actions else "other"

    def about(self, phase: Phase, action: str) -> tuple[Rule, ...]:
        """The rules of a phase whose `match` on action and risk accepts the action."""
        found = self._found.get((phase, action))
        if found is None:
            entry = self.action(action)
            risk = None if entry is None else entry.risk
            index = self._indexes[phase]
            found = tuple(
                rule
                for rule in (*index.named.get(action, ()), *index.patterned)
                if rule.match.action_matches(action, risk)
            )
            if action in self.actions or len(self._found) < MOST_UNLISTED:
                self._found[(phase, action)] = found  # bounded, because clients choose the actions
        return found

    def brakes(self, action: str) -> tuple[Rule, ...]:
        """The rules for an action that have a brake."""
        if not self._brakes:
            return ()
        return tuple(rule for rule in self.about("execute", action) if rule.brake is not None)
