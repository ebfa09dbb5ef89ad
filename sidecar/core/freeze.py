"""Freezes: an operator stops the executions that a pattern matches, until a time or until it is lifted.

1. A freeze matches an execution if every fact that `match` names matches, and `except` does not.
2. A fact matches if one of its values matches one of the globs. Without any fact, `match` matches everything,
   and `except` nothing.
3. In doubt an execution is frozen. A fact that is not known, such as the target agents of a request that
   names none, or an action that the catalogue does not list, matches in `match`, and does not in `except`.
4. `except` lets an execution through only if it is for all of its target agents. As with roles, only the
   literal name `anonymous` stands for a caller without a credential there.
5. A freeze holds in the tenant of the principal that set it. One of the tenant `default` holds in all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

from sidecar.core.facts import Claims
from sidecar.core.globs import globbed
from sidecar.core.instant import SECOND, iso_time
from sidecar.core.policy import RiskClass
from sidecar.core.principal import DEFAULT_TENANT, Principal
from sidecar.core.valueclass import valueclass
from sidecar.errors import Refusal

Fact = Literal[
    "action",
    "risk",
    "incident_id",
    "tenant_id",
    "principal",
    "principal_kind",
    "principal_group",
    "target_agents",
    "route",
]
FACTS: tuple[Fact, ...] = get_args(Fact)
# Of each fact that a pattern names, the globs of which one must match.
Pattern = Mapping[str, tuple[str, ...]]

# Every admission looks at all freezes in force, so their number is bounded. An operator needs a few.
MAX_IN_FORCE = 1_000


@valueclass
class Freeze:
    """One freeze. Times are in microseconds since 1970 (UTC). `freeze_id` is the decision_id of the record
    that set it, and `lifted_in` that of the record that lifted it."""

    freeze_id: str
    tenant_id: str
    match: Pattern
    excepted: Pattern
    reason: str
    set_at: int
    set_by: str
    ends_at: int | None = None
    lifted_at: int | None = None
    lifted_by: str | None = None
    lifted_for: str | None = None
    lifted_in: str | None = None

    def is_in_force(self, now: int) -> bool:
        return self.lifted_at is None and (self.ends_at is None or now < self.ends_at)


@valueclass
class Executing:
    """The facts of an execution that freezes read. `risk` is None if the catalogue does not list the action,
    and `route` if a program executes it."""

    claims: Claims
    tenant_id: str
    principal: Principal
    route: str | None
    risk: RiskClass | None

    def values(self, fact: str) -> Sequence[str] | None:
        """The values of a fact. None: it is not known."""
        claims, principal = self.claims, self.principal
        match fact:
            case "action":
                # A backend may read an action that the catalogue lacks as one that it has.
                return None if claims.action is None or self.risk is None else (claims.action,)
            case "risk":
                return None if self.risk is None else (self.risk.value,)
            case "incident_id":
                return None if claims.incident_id is None else (claims.incident_id,)
            case "tenant_id":
                return (self.tenant_id,)
            case "principal":
                return (principal.id,)
            case "principal_kind":
                return (principal.kind,)
            case "principal_group":
                return principal.groups
            case "target_agents":
                return claims.target_agents or None
            case _:
                return () if self.route is None else (self.route,)


def frozen(freezes: Iterable[Freeze], executing: Executing, now: int) -> Refusal | None:
    """The refusal of an execution by the freeze that ends last of those that match it; None: none does."""
    found: Freeze | None = None
    for freeze in freezes:
        if (
            freeze.is_in_force(now)
            and _matches(freeze, executing)
            and (found is None or _ends_later(freeze, found))
        ):
            found = freeze
    return None if found is None else _refusal(found, now)


def _matches(freeze: Freeze, executing: Executing) -> bool:
    if freeze.tenant_id not in (DEFAULT_TENANT, executing.tenant_id):
        return False
    for fact, globs in freeze.match.items():
        values = executing.values(fact)
        if values is not None and not any(globbed(globs, value) for value in values):
            return False
    return not freeze.excepted or not all(
        _excepts(fact, globs, executing) for fact, globs in freeze.excepted.items()
    )


def _excepts(fact: str, globs: tuple[str, ...], executing: Executing) -> bool:
    """Whether an exception's globs for a fact match an execution."""
    if fact == "principal" and not executing.principal.is_authenticated:
        return executing.principal.id in globs
    values = executing.values(fact)
    if not values:
        return False
    matching = (globbed(globs, value) for value in values)
    return all(matching) if fact == "target_agents" else any(matching)


def _ends_later(one: Freeze, other: Freeze) -> bool:
    return other.ends_at is not None and (one.ends_at is None or one.ends_at > other.ends_at)


def _refusal(freeze: Freeze, now: int) -> Refusal:
    until = "until it is lifted" if freeze.ends_at is None else f"until {iso_time(freeze.ends_at)}"
    return Refusal(
        "frozen",
        f"Executions like this one are frozen {until}: {freeze.reason}",
        {
            "freeze_id": freeze.freeze_id,
            "reason": freeze.reason,
            "ends_at": None if freeze.ends_at is None else iso_time(freeze.ends_at),
            # Whole seconds, rounded up, so that a retry does not come too early.
            "retry_after_seconds": None if freeze.ends_at is None else -((now - freeze.ends_at) // SECOND),
        },
    )


def not_found(freeze_id: str) -> Refusal:
    return Refusal("freeze_not_found", "No freeze has this freeze_id.", {"freeze_id": freeze_id})


def too_many() -> Refusal:
    problem = f"cannot be added, because {MAX_IN_FORCE:,} freezes are in force; lift some"
    return Refusal(
        "invalid_freeze",
        f"match {problem}.",
        {"member": "match", "errors": [{"member": "/match", "problem": problem}]},
    )


def describe(match: Mapping[str, Sequence[str]], excepted: Mapping[str, Sequence[str]]) -> str:
    """What a freeze stops, in words: `action restart_* or drain_*, except principal_group oncall`."""
    said = _facts(match) or "every execution"
    return f"{said}, except {_facts(excepted)}" if excepted else said


def _facts(pattern: Mapping[str, Sequence[str]]) -> str:
    return ", ".join(f"{fact} {' or '.join(globs)}" for fact, globs in pattern.items())


def written(pattern: Pattern) -> dict[str, Any]:
    """A pattern as JSON: for each fact, the list of its globs."""
    return {fact: list(globs) for fact, globs in pattern.items()}
