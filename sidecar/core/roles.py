"""Roles: what a principal may call. A role that no file lists is held by no principal.

The policy folder lists who holds a role, by id and by group. Both are globs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from sidecar.core.globs import globbed
from sidecar.core.principal import Principal
from sidecar.errors import Refusal

# The principals whose roles are remembered.
MOST_KNOWN = 4_096

Role = Literal["issuer", "executor", "approver", "observer", "operator", "recorder"]
ROLES: tuple[Role, ...] = get_args(Role)


@dataclass(frozen=True, slots=True, kw_only=True)
class Holders:
    """Who holds a role. A principal holds it if one of its groups or its id matches."""

    groups: tuple[str, ...] = ()
    ids: tuple[str, ...] = ()

    def include(self, principal: Principal) -> bool:
        """Whether a principal is one of them. `anonymous` is only by its literal name."""
        if not principal.is_authenticated:
            return principal.id in self.ids
        return (bool(self.ids) and globbed(self.ids, principal.id)) or (
            bool(self.groups) and any(globbed(self.groups, group) for group in principal.groups)
        )


@dataclass(frozen=True, slots=True)
class Roles:
    """The holders of each role that the policies list."""

    holders: Mapping[Role, Holders] = field(default_factory=dict)
    _known: dict[Principal, frozenset[Role]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def of(self, principal: Principal) -> frozenset[Role]:
        """The roles that a principal holds. They follow from the principal alone, so they are remembered."""
        known = self._known.get(principal)
        if known is None:
            if len(self._known) >= MOST_KNOWN:
                self._known.clear()
            known = self._known[principal] = frozenset(
                role for role in self.holders if self.hold(principal, role)
            )
        return known

    def hold(self, principal: Principal, role: Role) -> bool:
        """Whether a principal holds a role. Only a human can be an approver, even if a file lists others."""
        found = self.holders.get(role)
        if found is None or (role == "approver" and principal.kind != "human"):
            return False
        return found.include(principal)


NO_ROLES = Roles()


def role_required(principal: Principal, *roles: Role) -> Refusal:
    """The refusal of a principal that holds none of the roles that would do. The first is the weakest."""
    which = " or ".join(roles)
    return Refusal(
        "role_required",
        f"{principal.id} does not hold the role {which}.",
        {"role": roles[0], "principal": principal.id},
    )
