"""Setting and lifting freezes: what changes, what is recorded and what is answered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from sidecar.core.applied import Applied
from sidecar.core.command import Denied, FreezeLifted, FreezeSet, LiftFreeze, SetFreeze
from sidecar.core.entries import freeze_entry
from sidecar.core.freeze import MAX_IN_FORCE, Freeze, not_found, too_many
from sidecar.core.principal import DEFAULT_TENANT


def set_freeze(command: SetFreeze, freezes: Mapping[str, Freeze], now: int) -> Applied:
    """Put a freeze in force. It is refused if too many are."""
    if sum(each.is_in_force(now) for each in freezes.values()) >= MAX_IN_FORCE:
        return Applied(reply=Denied(too_many(), None))
    freeze = Freeze(
        freeze_id=command.decision_id,
        tenant_id=command.principal.tenant_id,
        match=command.match,
        excepted=command.excepted,
        reason=command.reason,
        set_at=now,
        set_by=command.principal.id,
        ends_at=command.ends_at,
    )
    return Applied(reply=FreezeSet(freeze), freeze=freeze, entry=freeze_entry(command, "frozen", freeze, now))


def lift_freeze(command: LiftFreeze, freezes: Mapping[str, Freeze], now: int) -> Applied:
    """Lift a freeze. The command is repeatable: a freeze that is lifted already stays as it is, unrecorded.

    A principal of the tenant `default` may lift every freeze, another one those of its tenant.
    """
    freeze = freezes.get(command.freeze_id)
    if freeze is None or command.principal.tenant_id not in (DEFAULT_TENANT, freeze.tenant_id):
        # The answer for another tenant's freeze is the same as for one that does not exist.
        return Applied(reply=Denied(not_found(command.freeze_id), None))
    if freeze.lifted_at is not None:
        return Applied(reply=FreezeLifted(freeze))
    lifted = replace(
        freeze,
        lifted_at=now,
        lifted_by=command.principal.id,
        lifted_for=command.reason,
        lifted_in=command.decision_id,
    )
    return Applied(
        reply=FreezeLifted(lifted), freeze=lifted, entry=freeze_entry(command, "unfrozen", lifted, now)
    )
