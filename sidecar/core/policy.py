"""The policy set: what operators allow, as one immutable value. No files here, only meaning.

The rules of combination are few: a refusal by any rule refuses, of several limits the strictest holds, and so
the order of rules never matters (source: policies.md). How a request is judged by them stands in rules.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from fnmatch import translate
from functools import lru_cache
from typing import Any, Literal, Protocol

# Actions that the catalogue does not list, for which it is kept which rules are about them.
MOST_UNLISTED = 4_096

Phase = Literal["issue", "execute"]
# What a brake may count by.
Facet = Literal["incident_id", "action", "tenant_id", "principal", "target_agents"]


class RiskClass(str, Enum):
    """How much harm a recovery action can do, in rising order."""

    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"
    CRITICAL = "critical"

    # Text sorts by letter; risk does not.
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

    `hold` is what an execution sets aside until its cost is known, in micro-dollars; `timeout_seconds`
    replaces the upstream's response timeout where it is given; with `targets_required` whoever asks for it
    names the target agents.
    """

    risk: RiskClass
    hold: int = 0
    timeout_seconds: float | None = None
    targets_required: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What one request, or one action that a grant is asked for, is to the rules.

    When a scope is asked for, its terms are those asked for, and nothing of it is used yet; an execution that
    needs no scope has an empty intent and zeros. `max_cost` is the scope's ceiling in micro-dollars, `now` in
    microseconds since 1970 (UTC).
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


# The facts that a condition may read, by name, in the order of policies.md; those that only the scope knows.
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
    """A rule's `when`. `reads` names the facts that it may look at (some more do no harm)."""

    @property
    def text(self) -> str: ...

    @property
    def reads(self) -> frozenset[str]: ...

    def __call__(self, subject: Subject) -> bool:
        """Whether it holds. Raises ConditionFailed where it cannot be said, or is neither true nor false."""


@lru_cache(maxsize=65_536)
def _regex(glob: str) -> re.Pattern[str]:
    return re.compile(translate(glob))


def globbed(globs: Sequence[str], value: str) -> bool:
    """Whether a value is meant by any of the globs (`*`, `?`, `[...]`, case counts); none: every value is."""
    return not globs or any(glob == value or _regex(glob).match(value) is not None for glob in globs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """Whom a rule is about. An empty member is about everybody; of target agents one is enough."""

    risk: frozenset[RiskClass] = frozenset()
    action: tuple[str, ...] = ()
    incident_id: tuple[str, ...] = ()
    tenant_id: tuple[str, ...] = ()
    principal: tuple[str, ...] = ()
    target_agents: tuple[str, ...] = ()

    def action_matches(self, action: str, risk: RiskClass | None) -> bool:
        """The part that the action alone decides."""
        return (not self.risk or risk in self.risk) and globbed(self.action, action)

    def rest_matches(
        self, incident_id: str, tenant_id: str, principal: str, target_agents: Sequence[str]
    ) -> bool:
        """The part that the action does not decide."""
        return (
            globbed(self.incident_id, incident_id)
            and globbed(self.tenant_id, tenant_id)
            and globbed(self.principal, principal)
            and (not self.target_agents or any(globbed(self.target_agents, one) for one in target_agents))
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """The most that a scope may grant; None: no limit. `max_cost` in micro-dollars."""

    max_attempts: int | None = None
    ttl_seconds: int | None = None
    max_cost: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Require:
    """What must be said. `intent_min_chars` counts the intent as `visible_chars` does."""

    intent_min_chars: int = 0
    target_agents: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Brake:
    """How often something may be executed. Counted are the admissions that the rule's `match` is about, apart
    for each value of the facets in `per` (none: all together).

    At most `max_attempts` in any `window_seconds`; `cooldown_seconds` from each to the next; with
    `one_in_flight` none while another is under way, or is unknown and was admitted in the window.
    """

    per: tuple[Facet, ...] = ()
    max_attempts: int | None = None
    window_seconds: int = 0
    cooldown_seconds: int = 0
    one_in_flight: bool = False

    @property
    def horizon_seconds(self) -> int:
        """How far back it looks."""
        return max(self.window_seconds, self.cooldown_seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One rule. A rule with `deny` refuses what it matches; `shadow` only records what it would do.

    It applies where `match` matches and the condition `when`, if it has one, holds.
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
        """Whether its condition may look at what only the scope knows."""
        return self.when is not None and not self.when.reads.isdisjoint(SCOPE_FACTS)


@dataclass(frozen=True, slots=True)
class _Index:
    """The rules of one phase, found by the action without looking at the others."""

    named: Mapping[str, tuple[Rule, ...]]  # by each action that a rule names without a wildcard
    patterned: tuple[Rule, ...]  # those that name actions with wildcards, or none at all

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
    """All policies at one moment. `revision` is a hash of the files' content."""

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
        """The entry for an action, the `"*"` entry for one that is not listed, or None: refused."""
        return self.actions.get(name, self.unlisted)

    def label(self, name: str) -> str:
        """The action as a metric label: only names of the catalogue, so labels stay bounded."""
        return name if name in self.actions else "other"

    def about(self, phase: Phase, action: str) -> tuple[Rule, ...]:
        """The rules of a phase that the action and its risk do not rule out."""
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
                self._found[(phase, action)] = found  # bounded, whatever clients ask for
        return found

    def brakes(self, action: str) -> tuple[Rule, ...]:
        """Those of them that count executions."""
        if not self._brakes:
            return ()
        return tuple(rule for rule in self.about("execute", action) if rule.brake is not None)
