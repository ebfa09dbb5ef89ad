"""The policy set: the actions and rules of the operators, as one immutable value. This module reads no files.

Rules combine in two ways: a refusal by any rule refuses, and of several limits the strictest holds. The order
of rules therefore never matters. The module `rules` judges requests by a policy set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from operator import attrgetter
from typing import Any, Literal, NamedTuple, Protocol

from sidecar.core.globs import GlobTable, globbed, is_glob
from sidecar.core.principal import PrincipalKind
from sidecar.core.roles import NO_ROLES, Roles

# The most actions without an entry of their own for which a policy set caches the matching rules.
MOST_UNLISTED = 4_096
# The most requests for which a policy set caches the matching bundles, and the most target agents of each.
MOST_SELECTIONS = 4_096
MOST_SELECTED_AGENTS = 8
# The most conditions in all joints of a policy set. In one of CEL, each takes about 4 KiB.
MOST_JOINED = 10_000

Phase = Literal["issue", "execute"]
# The facets by which a brake may count.
Facet = Literal["incident_id", "action", "tenant_id", "principal", "target_agents"]


class RiskClass(str, Enum):
    """The risk of a recovery action, in rising order."""

    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"
    CRITICAL = "critical"

    @property
    def rank(self) -> int:
        return _RANKS[self._name_]

    # The comparisons of str would sort alphabetically.
    def __lt__(self, other: str) -> bool:
        return self.rank < RiskClass(other).rank

    def __le__(self, other: str) -> bool:
        return self.rank <= RiskClass(other).rank

    def __gt__(self, other: str) -> bool:
        return self.rank > RiskClass(other).rank

    def __ge__(self, other: str) -> bool:
        return self.rank >= RiskClass(other).rank


_RANKS = {name: rank for rank, name in enumerate(RiskClass.__members__)}


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


@dataclass(slots=True, kw_only=True)  # one is made for every request, and a frozen one costs twice as much
class Subject:
    """The facts that the rules read of one execution, or of one action of a requested grant.

    For a grant, the terms are the requested ones and no attempt is used. For an execution that needs no
    scope, the intent is empty and the numbers are zero. `max_cost` is the scope's ceiling in micro-dollars.
    `issuer` is the principal that asked for the scope, None if there is no scope or the
    principal is not known.
    `now` is in microseconds since 1970 (UTC).
    """

    action: str
    risk: RiskClass | None
    incident_id: str
    tenant_id: str
    principal: str
    principal_kind: PrincipalKind = "service"
    principal_groups: tuple[str, ...] = ()
    target_agents: tuple[str, ...] = ()
    parameters: Mapping[str, Any] = field(default_factory=dict)
    intent: str = ""
    max_cost: int = 0
    attempts_used: int = 0
    attempts_remaining: int = 0
    scope_age_seconds: int = 0
    issuer: str | None = None
    now: int = 0


# The facts that a condition may read. SCOPE_FACTS are the ones that only the scope holds.
FACTS = (
    "action",
    "risk",
    "incident_id",
    "tenant_id",
    "principal",
    "principal_kind",
    "principal_groups",
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


# Judges several conditions at once: one result for each. Raises ConditionFailed if one cannot be judged.
Joint = Callable[[Subject], Sequence[bool]]
# Makes a Joint of conditions, or None if these conditions can only be judged one by one.
Joining = Callable[[Sequence[Condition]], Joint | None]


class Matched(Protocol):
    """What the members of a match that do not depend on the action look at: a subject, or an execution."""

    @property
    def incident_id(self) -> str: ...

    @property
    def tenant_id(self) -> str: ...

    @property
    def principal(self) -> str: ...

    @property
    def principal_kind(self) -> str: ...

    @property
    def principal_groups(self) -> tuple[str, ...]: ...

    @property
    def target_agents(self) -> tuple[str, ...]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """The requests that a rule matches. An empty member matches every request.

    `principal_group` matches if it matches one group of the principal, `target_agents` if it matches one
    target agent of the request.
    """

    risk: frozenset[RiskClass] = frozenset()
    action: tuple[str, ...] = ()
    incident_id: tuple[str, ...] = ()
    tenant_id: tuple[str, ...] = ()
    principal: tuple[str, ...] = ()
    principal_kind: tuple[str, ...] = ()
    principal_group: tuple[str, ...] = ()
    target_agents: tuple[str, ...] = ()

    def action_matches(self, action: str, risk: RiskClass | None) -> bool:
        """Whether the members that depend on the action alone match."""
        return (not self.risk or risk in self.risk) and globbed(self.action, action)

    @property
    def rest(self) -> tuple[tuple[str, ...], ...]:
        """The members that do not depend on the action, in the order of REST."""
        return (
            self.incident_id,
            self.tenant_id,
            self.principal,
            self.principal_kind,
            self.principal_group,
            self.target_agents,
        )

    def rest_matches(self, about: Matched) -> bool:
        """Whether the members that do not depend on the action match."""
        return (
            globbed(self.incident_id, about.incident_id)
            and globbed(self.tenant_id, about.tenant_id)
            and globbed(self.principal, about.principal)
            and globbed(self.principal_kind, about.principal_kind)
            and (
                not self.principal_group
                or any(globbed(self.principal_group, one) for one in about.principal_groups)
            )
            and (
                not self.target_agents or any(globbed(self.target_agents, one) for one in about.target_agents)
            )
        )


# The members of a match that do not depend on the action, as a subject has them.
REST = ("incident_id", "tenant_id", "principal", "principal_kind", "principal_groups", "target_agents")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """The maximum of each term of a scope, None for no limit. `max_cost` is in micro-dollars."""

    max_attempts: int | None = None
    ttl_seconds: int | None = None
    max_cost: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Require:
    """What a request must supply, and whether the issuer of its scope must or must not be its executor.

    `intent_min_chars` counts characters as `visible_chars` does. Without a scope, or without a method that
    established both principals, an execution satisfies neither of the last two.
    """

    intent_min_chars: int = 0
    target_agents: bool = False
    executor_is_not_issuer: bool = False
    executor_is_issuer: bool = False


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


# How rules are found and judged together -----------------------------------------------------------------


@dataclass(slots=True, eq=False)
class Tally:
    """The executions that brakes count together: those of brakes with the same `match` and the same `per`.

    `rules` are the brakes that hold without a condition. If `strictest` does not hold, none of them does.
    `facets` reads the values by which executions are counted separately, except target agents. Executions of
    the action that is judged need no check of their action.
    """

    match: Match
    rules: tuple[Rule, ...]
    strictest: Brake
    one_in_flight: bool
    facets: Callable[[Any], Any]
    by_incident: bool
    by_action: bool
    by_agent: bool
    checks_action: bool
    checks_rest: bool

    @classmethod
    def of(cls, rules: Sequence[Rule]) -> Tally:
        standing = tuple(rule for rule in rules if rule.when is None)
        brakes = [rule.brake for rule in standing if rule.brake is not None]
        attempts = [brake.max_attempts for brake in brakes if brake.max_attempts is not None]
        assert rules[0].brake is not None
        per = rules[0].brake.per
        facets = [facet for facet in per if facet != "target_agents"]
        return cls(
            match=rules[0].match,
            rules=standing,
            strictest=Brake(
                max_attempts=min(attempts, default=None),
                window_seconds=max((brake.window_seconds for brake in brakes), default=0),
                cooldown_seconds=max((brake.cooldown_seconds for brake in brakes), default=0),
                one_in_flight=any(brake.one_in_flight for brake in brakes),
            ),
            one_in_flight=any(rule.brake is not None and rule.brake.one_in_flight for rule in rules),
            facets=attrgetter(*facets) if facets else _no_facets,
            by_incident="incident_id" in per,
            by_action="action" in per,
            by_agent="target_agents" in per,
            checks_action="action" not in per and bool(rules[0].match.action or rules[0].match.risk),
            checks_rest=any(rules[0].match.rest),
        )


def _no_facets(_: object) -> None:
    return None


class _Joints:
    """Joins conditions, once for all actions that have the same ones, up to MOST_JOINED conditions."""

    def __init__(self, join: Joining) -> None:
        self._join = join
        self._made: dict[tuple[int, ...], Joint | None] = {}
        self._conditions = 0

    def __call__(self, conditions: Sequence[Condition]) -> Joint | None:
        key = tuple(map(id, conditions))
        if key not in self._made:
            if self._conditions + len(conditions) > MOST_JOINED:
                return None
            self._conditions += len(conditions)
            self._made[key] = self._join(conditions)
        return self._made[key]


class Conditional(NamedTuple):
    """Rules whose conditions are judged together by `joint`, or one by one if that is None or fails."""

    rules: tuple[Rule, ...]
    joint: Joint | None


def _conditional(rules: Sequence[Rule], join: Joining | None) -> tuple[Conditional, ...]:
    conditions = [rule.when for rule in rules if rule.when is not None]
    joint = join(conditions) if join is not None and rules else None
    if joint is None and join is not None and len(rules) > 1:
        half = len(rules) // 2
        return (*_conditional(rules[:half], join), *_conditional(rules[half:], join))
    return (Conditional(tuple(rules), joint),) if rules else ()


@dataclass(slots=True, eq=False)
class Bundle:
    """Rules about one action that match the same requests, so that one check serves all of them.

    `standing` are the rules that apply without a condition, except for their brakes, which are in `tallies`.
    If none of them denies, a request that satisfies `strictest` satisfies them all. `early` are the
    conditions on the request, `late` the conditions that read the scope of an execution.
    """

    match: Match
    standing: tuple[Rule, ...]
    denies: bool
    strictest: Require
    tallies: tuple[Tally, ...]
    early: tuple[Conditional, ...]
    late: tuple[Conditional, ...]


class _Docket:
    """The rules of one phase about one action, and their bundles.

    `read` reads the facets that the matches of the bundles read. `by_action_alone` is true if no fact of a
    request but its action decides which of the rules apply, or wait for the scope. `horizons` tells whether
    brakes count for one incident, whether for one action, and how many seconds they look back.
    """

    __slots__ = ("bundles", "by_action_alone", "horizons", "read", "rules")

    def __init__(
        self, phase: Phase, rules: tuple[Rule, ...], tallies: Mapping[int, Tally], join: Joining | None
    ) -> None:
        self.rules = rules
        horizons: dict[tuple[bool, bool], int] = {}
        alike: dict[tuple[tuple[str, ...], ...], list[Rule]] = {}
        for rule in rules:
            alike.setdefault(rule.match.rest, []).append(rule)
            tally = tallies.get(id(rule))
            if tally is not None and rule.brake is not None:
                counted_by = tally.by_incident, tally.by_action
                horizons[counted_by] = max(horizons.get(counted_by, 0), rule.brake.horizon_seconds)
        self.horizons = tuple((*counted_by, seconds) for counted_by, seconds in horizons.items())
        self.bundles = tuple(_bundle(phase, group, tallies, join) for group in alike.values())
        read = [
            name
            for place, name in enumerate(REST)
            if any(group[0].match.rest[place] for group in alike.values())
        ]
        self.read: Callable[[Subject], Any] | None = attrgetter(*read) if read else None
        self.by_action_alone = not read and not any(bundle.early for bundle in self.bundles)


def _bundle(
    phase: Phase, rules: Sequence[Rule], tallies: Mapping[int, Tally], join: Joining | None
) -> Bundle:
    plain = [rule for rule in rules if rule.when is None]
    conditional = [rule for rule in rules if rule.when is not None]
    late = [rule for rule in conditional if phase == "execute" and rule.reads_scope]
    early = [rule for rule in conditional if phase != "execute" or not rule.reads_scope]
    requirements = [rule.require for rule in plain if rule.require is not None]
    # A condition on a grant is judged once for all actions of the grant, so it is judged alone.
    join = join if phase == "execute" else None
    return Bundle(
        match=rules[0].match,
        standing=tuple(rule for rule in plain if rule.deny or rule.require or rule.limit),
        denies=any(rule.deny for rule in plain),
        strictest=Require(
            intent_min_chars=max((one.intent_min_chars for one in requirements), default=0),
            target_agents=any(one.target_agents for one in requirements),
            executor_is_not_issuer=any(one.executor_is_not_issuer for one in requirements),
            executor_is_issuer=any(one.executor_is_issuer for one in requirements),
        ),
        tallies=tuple(dict.fromkeys(tallies[id(rule)] for rule in plain if id(rule) in tallies)),
        early=_conditional(early, join),
        late=_conditional(late, join),
    )


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
            if rule.match.action and not any(is_glob(glob) for glob in rule.match.action):
                for action in dict.fromkeys(rule.match.action):
                    named.setdefault(action, []).append(rule)
            else:
                patterned.append(rule)
        return cls({action: tuple(found) for action, found in named.items()}, tuple(patterned))


@dataclass(frozen=True, kw_only=True)
class PolicySet:
    """All policies at one moment. `revision` is a hash of the contents of the policy files.

    The catalogue has three parts: `actions` by their names, `globs` for the actions that have no entry of
    their own, and `unlisted` for those that match no glob either.
    """

    revision: str
    actions: Mapping[str, ActionPolicy]
    globs: Mapping[str, ActionPolicy] = field(default_factory=dict)
    unlisted: ActionPolicy | None = None
    rules: tuple[Rule, ...] = ()
    roles: Roles = NO_ROLES
    join: Joining | None = field(default=None, repr=False, compare=False)
    _by_glob: GlobTable[ActionPolicy] = field(init=False, repr=False, compare=False)
    _indexes: Mapping[Phase, _Index] = field(init=False, repr=False, compare=False)
    _tallies: Mapping[int, Tally] = field(init=False, repr=False, compare=False)  # by the id() of each rule
    _joints: Joining | None = field(init=False, repr=False, compare=False)
    _found: dict[tuple[Phase, str], _Docket] = field(init=False, repr=False, compare=False)
    _selected: dict[tuple[_Docket, Any], tuple[Bundle, ...]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        indexes: dict[Phase, _Index] = {}
        for phase in ("issue", "execute"):
            indexes[phase] = _Index.of([rule for rule in self.rules if rule.on == phase])
        object.__setattr__(self, "_by_glob", GlobTable(self.globs))
        object.__setattr__(self, "_indexes", indexes)
        object.__setattr__(self, "_tallies", _tallies(self.rules))
        object.__setattr__(self, "_joints", None if self.join is None else _Joints(self.join))
        object.__setattr__(self, "_found", {})
        object.__setattr__(self, "_selected", {})

    def action(self, name: str) -> ActionPolicy | None:
        """The entry for an action: its own, else that of the glob that decides about it, else the `"*"`
        entry. None means that it is refused."""
        return self.actions.get(name) or self._unnamed(name)

    def _unnamed(self, name: str) -> ActionPolicy | None:
        found = self._by_glob.find(name) if self.globs else None
        return self.unlisted if found is None else found[1]

    def label(self, name: str) -> str:
        """The action as a metric label: its name, or the glob that lists it.

        Unlisted actions share one label, so the number of labels is bounded.
        """
        if name in self.actions:
            return name
        found = self._by_glob.find(name) if self.globs else None
        return "other" if found is None else found[0]

    def about(self, phase: Phase, action: str) -> tuple[Rule, ...]:
        """The rules of a phase whose `match` on action and risk accepts the action."""
        return self._docket(phase, action).rules

    def selected(self, phase: Phase, subject: Subject) -> tuple[Bundle, ...]:
        """The rules of a phase that match a subject."""
        docket = self._docket(phase, subject.action)
        if docket.read is None:
            return docket.bundles
        key = docket, docket.read(subject)
        found = self._selected.get(key)
        if found is None:
            agents = subject.target_agents
            found = tuple(bundle for bundle in docket.bundles if bundle.match.rest_matches(subject))
            # Bounded, because clients choose the facts.
            if len(agents) <= MOST_SELECTED_AGENTS:
                if len(self._selected) >= MOST_SELECTIONS:
                    self._selected.clear()
                self._selected[key] = found
        return found

    def selected_by_action(self, phase: Phase, action: str) -> tuple[Bundle, ...] | None:
        """The rules of a phase about an action, if no other fact of a request decides which of them apply."""
        docket = self._docket(phase, action)
        return docket.bundles if docket.by_action_alone else None

    def horizons(self, action: str) -> tuple[tuple[bool, bool, int], ...]:
        """The number of seconds that the brakes for an action look back, once for each kind of group.

        The members before it tell whether the group is of one incident, and whether of one action.
        """
        return self._docket("execute", action).horizons if self._tallies else ()

    def tally(self, rule: Rule) -> Tally:
        """What the brake of one of the rules counts."""
        return self._tallies[id(rule)]

    def _docket(self, phase: Phase, action: str) -> _Docket:
        found = self._found.get((phase, action))
        if found is None:
            entry = self.action(action)
            risk = None if entry is None else entry.risk
            index = self._indexes[phase]
            rules = tuple(
                rule
                for rule in (*index.named.get(action, ()), *index.patterned)
                if rule.match.action_matches(action, risk)
            )
            found = _Docket(phase, rules, self._tallies, self._joints)
            # Bounded, because clients choose the actions.
            if action not in self.actions and len(self._found) >= len(self.actions) + MOST_UNLISTED:
                self._found.clear()
            self._found[(phase, action)] = found
        return found


def _tallies(rules: Iterable[Rule]) -> dict[int, Tally]:
    """The tally of each rule with a brake, by the rule's id()."""
    alike: dict[tuple[Match, tuple[Facet, ...]], list[Rule]] = {}
    for rule in rules:
        if rule.brake is not None and rule.on == "execute":
            alike.setdefault((rule.match, rule.brake.per), []).append(rule)
    found: dict[int, Tally] = {}
    for group in alike.values():
        tally = Tally.of(group)
        found |= {id(rule): tally for rule in group}
    return found
