"""The rows that commands need, and their current values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field

from sidecar.core.brakes import AdmissionGroup, CountCache, groups_for
from sidecar.core.command import (
    Admit,
    Bind,
    Command,
    Emit,
    Lapse,
    LiftFreeze,
    Reconcile,
    Refuse,
    Report,
    Revoke,
    SetFreeze,
    Settle,
    Switch,
    Turn,
)
from sidecar.core.freeze import Freeze
from sidecar.core.idempotency import Claimed
from sidecar.core.instant import SECOND
from sidecar.core.scope import Execution, Scope


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """The rows that commands need.

    `scopes` are scope ids. `executions` are admission ids; the scope of each execution is loaded with it.
    `groups` maps each group to a time in microseconds: its admissions after that time are loaded, and those
    still in flight, but never executions that were not sent. `once` are keys under which a record is kept
    once. `requests` are request ids; their records without a run are loaded. `keys` are digests of
    idempotency keys; the execution that holds each is loaded with it. `freezes` are ids of freezes. With
    `frozen_at`, the freezes that are in force at this time are loaded, too.
    """

    scopes: Sequence[str] = ()
    executions: Sequence[str] = ()
    groups: Mapping[AdmissionGroup, int] = field(default_factory=dict)
    once: Sequence[bytes] = ()
    switches: Sequence[Switch] = ()
    requests: Sequence[str] = ()
    keys: Sequence[bytes] = ()
    freezes: Sequence[str] = ()
    frozen_at: int | None = None


def names(commands: Iterable[Command], now: int) -> Names:
    """The rows that commands need, each row once. `now` is in microseconds since 1970 (UTC)."""
    scopes: dict[str, None] = {}
    executions: dict[str, None] = {}
    groups: dict[AdmissionGroup, int] = {}
    once: dict[bytes, None] = {}
    switches: dict[Switch, None] = {}
    requests: dict[str, None] = {}
    keys: dict[bytes, None] = {}
    freezes: dict[str, None] = {}
    frozen_at: int | None = None
    for command in commands:
        match command:
            case Admit(claims=claims):
                frozen_at = now
                if claims.scope_id is not None:
                    scopes[claims.scope_id] = None
                if command.claim is not None:
                    keys[command.claim.key] = None
                wanted = groups_for(command.policies, command.tenant_id, claims.incident_id, claims.action)
                for group, seconds in wanted.items():
                    since = now - seconds * SECOND
                    groups[group] = min(groups.get(group, since), since)
            case Settle():
                executions[command.admission_id] = None
                if command.answer is not None:
                    keys[command.answer.key] = None
            case Report() | Lapse() | Reconcile():
                executions[command.admission_id] = None
            case Revoke():
                scopes[command.scope_id] = None
            case Emit():
                if command.once is not None:
                    once[command.once] = None
                if command.unless_switched is not None:
                    switches[command.unless_switched] = None
            case Turn():
                switches[command.switch] = None
            case Refuse(shadow=True) | SetFreeze():
                frozen_at = now
            case LiftFreeze():
                freezes[command.freeze_id] = None
            case Bind():
                requests[command.request_id] = None
            case _:
                pass
    return Names(
        scopes=tuple(scopes),
        executions=tuple(executions),
        groups=groups,
        once=tuple(once),
        switches=tuple(switches),
        requests=tuple(requests),
        keys=tuple(keys),
        freezes=tuple(freezes),
        frozen_at=frozen_at,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """The current rows that a batch of commands names. A name without a row is absent.

    `admissions` lists the ids of the executions that brakes count, by group, oldest first. `executions` holds
    these executions. With `found`, a brake examines each of them only once for many decisions, and stops
    counting once its answer is known. Without it, every decision counts all of them. `kept` holds the keys
    whose record exists already. `on` holds the switches that are on. `unbound` maps each named request
    to the sequence numbers of its pre-run records that have no run. `claimed` holds the idempotency keys that
    are claimed, by their digests. `freezes` holds the named freezes and those in force, by their ids.
    """

    scopes: Mapping[str, Scope] = field(default_factory=dict)
    executions: Mapping[str, Execution] = field(default_factory=dict)
    admissions: Mapping[AdmissionGroup, Sequence[str]] = field(default_factory=dict)
    found: CountCache | None = field(default=None, repr=False, compare=False)
    kept: Set[bytes] = frozenset()
    on: Set[Switch] = frozenset()
    unbound: Mapping[str, Sequence[int]] = field(default_factory=dict)
    claimed: Mapping[bytes, Claimed] = field(default_factory=dict)
    freezes: Mapping[str, Freeze] = field(default_factory=dict)
