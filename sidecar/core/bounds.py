"""The bounds of one admission, as an ordered table. The first bound that fails gives the answer.

The order has two visible effects. An exhausted scope that is used for an unlisted action answers
`action_outside_scope`, and an exhausted scope that is revoked answers `scope_revoked`. The bounds of the
catalogue follow those of the scope, and the rules follow both. No clock, no I/O.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import cast

from sidecar.core.facts import Claims
from sidecar.core.globs import globbed
from sidecar.core.instant import iso_time
from sidecar.core.money import to_dollars
from sidecar.core.policy import ActionPolicy, PolicySet
from sidecar.core.principal import Principal
from sidecar.core.scope import Scope
from sidecar.errors import Refusal


@dataclass(slots=True)  # one is made for every request, and a frozen one costs twice as much
class BoundInput:
    """The facts that a bound may read. `entry` is the action's catalogue entry, None if it is not listed.

    `granted` is the scope, for the bounds after `_scope_exists`. `announced_cost` is the cost that the caller
    expects, in micro-dollars, or 0 if it is not known yet.
    """

    claims: Claims
    tenant_id: str
    principal: Principal
    scope: Scope | None
    granted: Scope
    entry: ActionPolicy | None
    now: int
    announced_cost: int

    @classmethod
    def of(
        cls,
        claims: Claims,
        tenant_id: str,
        principal: Principal,
        scope: Scope | None,
        policies: PolicySet,
        now: int,
        announced_cost: int = 0,
    ) -> BoundInput:
        entry = policies.action(claims.action or "")
        return cls(claims, tenant_id, principal, scope, cast(Scope, scope), entry, now, announced_cost)

    @property
    def hold(self) -> int:
        """The amount to hold: the catalogue's `max_cost_usd`, or the announced cost if it is higher."""
        return max(self.entry.hold if self.entry else 0, self.announced_cost)


def _scope_given(case: BoundInput) -> Refusal | None:
    return None if case.claims.scope_id is not None else _scope_required(case.claims)


def _scope_required(claims: Claims) -> Refusal:
    return Refusal(
        "scoped_execution_required",
        "A recovery action without a valid execution scope is invalid by definition: ask for a scope, "
        "then send its scope_id.",
        {"incident_id": claims.incident_id, "action": claims.action},
    )


def _members_given(case: BoundInput) -> Refusal | None:
    return _missing_member(case.claims)


def _missing_member(claims: Claims) -> Refusal | None:
    for member in ("incident_id", "action"):
        if getattr(claims, member) is None:
            return Refusal("invalid_request", f"{member} is missing or empty.", {"member": member})
    return None


def _scope_exists(case: BoundInput) -> Refusal | None:
    # The answer for another tenant's scope is the same as for a scope that does not exist.
    if case.scope is not None and case.scope.tenant_id == case.tenant_id:
        return None
    return Refusal("scope_not_found", "No scope has this scope_id.", {"scope_id": case.claims.scope_id})


def _incident_matches(case: BoundInput) -> Refusal | None:
    if case.granted.incident_id == case.claims.incident_id:
        return None
    return Refusal(
        "incident_mismatch",
        "The scope was granted for another incident.",
        {"scope_id": case.granted.scope_id, "incident_id": case.claims.incident_id},
    )


def _action_allowed(case: BoundInput) -> Refusal | None:
    if case.claims.action in case.granted.allowed_actions:
        return None
    return Refusal(
        "action_outside_scope",
        "The scope does not list this action.",
        {"scope_id": case.granted.scope_id, "action": case.claims.action},
    )


def _targets_allowed(case: BoundInput) -> Refusal | None:
    allowed = case.granted.target_agents
    named = case.claims.target_agents
    if not allowed or (named and set(named) <= set(allowed)):
        return None
    return Refusal(
        "target_outside_scope",
        "The scope is for certain target agents; name them, and only them.",
        {"scope_id": case.granted.scope_id, "target_agents": list(named)},
    )


def _executor_allowed(case: BoundInput) -> Refusal | None:
    executors, principal = case.granted.executors, case.principal
    # Like a role, a scope is for `anonymous` only by its literal name.
    if not executors or principal.id in executors:
        return None
    if principal.is_authenticated and globbed(executors, principal.id):
        return None
    return Refusal(
        "executor_outside_scope",
        "The scope is for certain executors, and this one is not among them.",
        {"scope_id": case.granted.scope_id, "principal": principal.id},
    )


def _not_revoked(case: BoundInput) -> Refusal | None:
    if case.granted.revoked_at is None:
        return None
    return Refusal("scope_revoked", "The scope was revoked.", {"scope_id": case.granted.scope_id})


def _not_expired(case: BoundInput) -> Refusal | None:
    if case.now < case.granted.expires_at:
        return None
    return Refusal(
        "scope_expired",
        "The scope has expired.",
        {"scope_id": case.granted.scope_id, "expires_at": iso_time(case.granted.expires_at)},
    )


def _attempts_left(case: BoundInput) -> Refusal | None:
    if case.granted.attempts_remaining:
        return None
    return _exhausted(case, "max_attempts", "All attempts of the scope are used.")


def _cost_left(case: BoundInput) -> Refusal | None:
    scope = case.granted
    if not scope.cost_exhausted and scope.spent + case.hold <= scope.max_cost:
        return None
    return _exhausted(case, "max_cost_usd", "The scope's cost ceiling leaves no room for this action.")


def _exhausted(case: BoundInput, bound: str, message: str) -> Refusal:
    return Refusal("scope_exhausted", message, {"scope_id": case.granted.scope_id, "bound": bound})


def _action_in_catalogue(case: BoundInput) -> Refusal | None:
    if case.entry is not None:
        return None
    return not_in_catalogue(case.claims.action)


def not_in_catalogue(action: str | None) -> Refusal:
    return Refusal(
        "policy_denied",
        f"No policy lists the action {action!r}; add it to the catalogue (actions:) to allow it.",
        {"rules": [], "action": action},
    )


def _targets_named(case: BoundInput) -> Refusal | None:
    if case.entry is None or not case.entry.targets_required or case.claims.target_agents:
        return None
    return targets_required(case.claims.action)


def targets_required(action: str | None) -> Refusal:
    return Refusal(
        "policy_denied",
        f"The action {action!r} is only allowed for target agents that are named (targets_required).",
        {"rules": [], "action": action},
    )


def never_spendable(
    policies: PolicySet, actions: Iterable[str], max_cost: int, lowered_by: Sequence[str] = ()
) -> Refusal | None:
    """The refusal of a grant whose ceiling is below the hold of one of its actions, None if every hold fits.

    Every execution of such an action would be refused, so the grant only looks like permission. `max_cost` is
    the ceiling in micro-dollars, and `lowered_by` are the rules that lowered it.
    """
    least, action = max(
        ((entry.hold, action) for action in actions if (entry := policies.action(action)) is not None),
        key=lambda one: one[0],
        default=(0, ""),
    )
    if max_cost >= least:
        return None
    needed = f"{to_dollars(least):.12g}"
    problem = f"must be at least {needed}, because an execution of {action!r} holds that amount"
    if lowered_by:
        lowered = f"rules that lowered it to {to_dollars(max_cost):.12g}: {', '.join(lowered_by)}"
        problem += f" ({lowered})"
    return Refusal(
        "invalid_scope",
        f"max_cost_usd {problem}.",
        {
            "member": "max_cost_usd",
            "errors": [{"member": "/max_cost_usd", "problem": problem}],
            "min_cost_usd": to_dollars(least),
        },
    )


Bound = Callable[[BoundInput], Refusal | None]

SCOPE_BOUNDS: tuple[Bound, ...] = (
    _scope_given,
    _members_given,
    _scope_exists,
    _incident_matches,
    _action_allowed,
    _targets_allowed,
    _executor_allowed,
    _not_revoked,
    _not_expired,
    _attempts_left,
    _cost_left,
)
# The bounds of an execution that needs no scope.
UNSCOPED_BOUNDS: tuple[Bound, ...] = (_members_given,)
CATALOGUE_BOUNDS: tuple[Bound, ...] = (_action_in_catalogue, _targets_named)


def incomplete(claims: Claims) -> Refusal | None:
    """The refusal of claims without an incident or an action, which no scope and no brake can judge."""
    missing = _missing_member(claims)
    if missing is None or claims.scope_id is not None:
        return missing
    return _scope_required(claims)


def judge(case: BoundInput, bounds: Sequence[Bound]) -> Refusal | None:
    """The refusal of the first bound that fails, or None if all bounds hold."""
    for bound in bounds:
        refusal = bound(case)
        if refusal is not None:
            return refusal
    return None
