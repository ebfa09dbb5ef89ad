"""Which role a call of a listener needs, and whether its caller holds it."""

from __future__ import annotations

from sidecar.core.principal import Principal
from sidecar.core.roles import Role, role_required
from sidecar.errors import Refusal
from sidecar.live.snapshot import Snapshot


def lacking(principal: Principal, snapshot: Snapshot, *roles: Role) -> Refusal | None:
    """The refusal of a principal that holds none of some roles, of which the first is the weakest.

    Without a method of authentication every caller may do everything. Without policies nothing is known of
    roles, so calls that need none of the policies are refused, too.
    """
    if not roles or not snapshot.methods.names:
        return None
    if snapshot.policies is not None and not snapshot.policies.roles.of(principal).isdisjoint(roles):
        return None
    return role_required(principal, *roles)
