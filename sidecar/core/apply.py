"""The decision. `apply(command, state, now)` says what changes, what is recorded and what is answered.

No clock, no I/O. Every change to what the sidecar knows goes through here, one command at a time, so
the order of commands is the whole of its concurrency.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any

from sidecar.core import deciding
from sidecar.core.brakes import Found, Tally, tallies_for
from sidecar.core.command import (
    AcceptClock,
    Admit,
    Bind,
    Bound,
    ClockAccepted,
    Command,
    Denied,
    Emit,
    Emitted,
    Issue,
    NotEmitted,
    NotInFlight,
    Reconcile,
    Recorded,
    Refuse,
    Reply,
    Revoke,
    Revoked,
    Settle,
    Settled,
    Switch,
    Turn,
    Turned,
)
from sidecar.core.deciding import Decided, Past
from sidecar.core.entries import clock_accepted_entry, ended_entry, gate_entry, switched_entry
from sidecar.core.facts import Claims
from sidecar.core.record import Entry, Event, iso_time
from sidecar.core.rules import Objection
from sidecar.core.scope import RELEASING, Execution, Scope
from sidecar.errors import Refusal


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """The rows that a batch of commands names, as they stand. A name without a row is not in it.

    `admissions` names, by tally and oldest first, the executions that brakes count; they are among
    `executions`, and `found` remembers what brakes saw in them while a batch is decided. `kept` holds
    the keys under which a record is kept, `on` the switches that are on, and `unbound`, for each request
    named, the sequence numbers of its pre-run records that have no run.
    """

    scopes: Mapping[str, Scope] = field(default_factory=dict)
    executions: Mapping[str, Execution] = field(default_factory=dict)
    admissions: Mapping[Tally, Sequence[str]] = field(default_factory=dict)
    found: Found = field(default_factory=dict, repr=False, compare=False)
    kept: Set[bytes] = frozenset()
    on: Set[Switch] = frozenset()
    unbound: Mapping[str, Sequence[int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Applied:
    """What applying one command gives: the reply, what changed, the entry for the log."""

    reply: Reply
    scope: Scope | None = None
    execution: Execution | None = None
    entry: Entry | None = None
    kept: bytes | None = None
    turned: Turn | None = None
    bound: Bind | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Named:
    """The rows that a command needs. An admission's row brings its scope along. `tallies`: how many seconds
    back each is needed."""

    scope_id: str | None = None
    admission_id: str | None = None
    tallies: Mapping[Tally, int] = field(default_factory=dict)
    once: bytes | None = None
    switch: Switch | None = None
    request_id: str | None = None


_NOTHING = Named()


def names(command: Command) -> Named:
    """What of the store a command has to see."""
    match command:
        case Admit():
            claims = command.claims
            counted = tallies_for(command.policies, command.tenant_id, claims.incident_id, claims.action)
            return Named(scope_id=claims.scope_id, tallies=counted)
        case Settle() | Reconcile():
            return Named(admission_id=command.admission_id)
        case Revoke():
            return Named(scope_id=command.scope_id)
        case Emit():
            return Named(once=command.once, switch=command.unless_switched)
        case Turn():
            return Named(switch=command.switch)
        case Bind():
            return Named(request_id=command.request_id)
        case _:
            return _NOTHING


def apply(command: Command, state: State, now: int) -> Applied:
    """Apply one command to the rows that it names. `now` is in microseconds since 1970 (UTC)."""
    match command:
        case Admit():
            scope = state.scopes.get(command.claims.scope_id or "")
            past = Past(state.admissions, state.executions, state.found)
            return _decided(deciding.admit(command, scope, past, now))
        case Settle():
            return _settle(command, state, now)
        case Refuse():
            return _refuse(command, now)
        case Issue():
            return _decided(deciding.issue(command, now))
        case Revoke():
            return _revoke(command, state, now)
        case Emit():
            return _emit(command, state, now)
        case Turn():
            return _turn(command, state, now)
        case Bind():
            count = len(state.unbound.get(command.request_id, ()))
            return Applied(reply=Bound(count), bound=command if count else None)
        case AcceptClock():
            return Applied(
                reply=ClockAccepted(command.decision_id, command.before, now),
                entry=clock_accepted_entry(command, now),
            )
        case _:
            return _reconcile(command, state, now)


def _decided(decided: Decided) -> Applied:
    return Applied(reply=decided.reply, scope=decided.scope, execution=decided.execution, entry=decided.entry)


def _refuse(command: Refuse, now: int) -> Applied:
    counted: dict[str, Any] = (
        {} if command.count == 1 else {"count": command.count, **(command.summary or {})}
    )
    refusal: Refusal | None = command.refusal
    if command.shadow:
        counted["would_refuse"] = [Objection(command.refusal, None, shadow=True).to_dict()]
        counted["scope_waived"] = deciding.SHADOW_ROUTE
        counted["route_mode"] = "shadow"
        refusal = None
    entry = gate_entry(
        command,
        "admitted" if command.shadow else "refused",
        refusal,
        command.claims,
        command.policy_revision,
        now,
        gatekept=command.gatekept,
        **counted,
    )
    return Applied(reply=Recorded(command.decision_id), entry=entry)


def _revoke(command: Revoke, state: State, now: int) -> Applied:
    scope = state.scopes.get(command.scope_id)
    claims = Claims(scope_id=command.scope_id)
    if scope is None or scope.tenant_id != command.tenant_id:
        refusal = Refusal("scope_not_found", "No scope has this scope_id.", {"scope_id": command.scope_id})
        if not command.record_denial:
            return Applied(reply=Denied(refusal, None))
        entry = gate_entry(
            command, "refused", refusal, claims, command.policy_revision, now, gatekept="scope_grant"
        )
        return Applied(reply=Denied(refusal, command.decision_id), entry=entry)
    if scope.revoked_at is None:
        scope = replace(scope, revoked_at=now)
    because = {} if command.cause is None else {"cause": command.cause}
    entry = gate_entry(
        command,
        "revoked",
        None,
        replace(claims, incident_id=scope.incident_id),
        command.policy_revision,
        now,
        gatekept="scope_grant",
        revoked_at=iso_time(scope.revoked_at or now),
        **because,
    )
    return Applied(reply=Revoked(scope, command.decision_id), scope=scope, entry=entry)


def _emit(command: Emit, state: State, now: int) -> Applied:
    """The switch comes first: what it keeps out leaves no key behind either."""
    if command.unless_switched in state.on:
        return Applied(reply=NotEmitted("switched_off"))
    if command.once in state.kept:
        return Applied(reply=NotEmitted("repeated"))
    entry = Entry(event="emitted", origin=command.origin, record=command.record, recorded_at=now)
    return Applied(reply=Emitted(command.record), entry=entry, kept=command.once)


def _turn(command: Turn, state: State, now: int) -> Applied:
    entry = switched_entry(command, was_on=command.switch in state.on, now=now)
    return Applied(reply=Turned(command.on, command.decision_id), entry=entry, turned=command)


def _settle(command: Settle, state: State, now: int) -> Applied:
    execution = state.executions.get(command.admission_id)
    if execution is None or execution.status != "in_flight":
        return Applied(reply=NotInFlight(execution))
    scope = None if execution.scope_id is None else state.scopes[execution.scope_id]
    ended = replace(
        execution,
        status=command.outcome,
        ended_at=now,
        http_status=command.http_status,
        cause=command.cause,
        cost=_final_cost(command.outcome, command.cost, execution.hold),
    )
    return _ended(command, "settled", scope, ended, now)


def _reconcile(command: Reconcile, state: State, now: int) -> Applied:
    execution = state.executions.get(command.admission_id)
    if execution is None:
        missing = Refusal(
            "decision_not_found", "No admission has this decision_id.", {"decision_id": command.admission_id}
        )
        return Applied(reply=Denied(missing, None))
    if execution.status != "unknown":
        refusal = Refusal(
            "not_reconcilable",
            f"The execution is {execution.status}; only an unknown one can be reconciled.",
            {"execution_status": execution.status},
        )
        return Applied(reply=Denied(refusal, None))
    scope = None if execution.scope_id is None else state.scopes[execution.scope_id]
    ended = replace(
        execution,
        status=command.outcome,
        ended_at=now,
        cost=_final_cost(command.outcome, command.cost, execution.hold),
    )
    return _ended(command, "reconciled", scope, ended, now)


def _final_cost(outcome: str, reported: int | None, hold: int) -> int | None:
    """Nothing where nothing ran, unknown where nobody knows, else what was reported, else the hold."""
    if outcome in RELEASING:
        return 0
    if outcome == "unknown":
        return None
    return hold if reported is None else reported


def _ended(
    command: Settle | Reconcile, event: Event, scope: Scope | None, execution: Execution, now: int
) -> Applied:
    """End an execution: release, keep or replace its hold, and record it (G3, G8)."""
    overrun = execution.cost is not None and 0 < execution.hold < execution.cost
    if scope is not None and execution.status in RELEASING:
        scope = replace(scope, attempts_used=scope.attempts_used - 1, held=scope.held - execution.hold)
    elif scope is not None and execution.cost is not None:
        scope = replace(
            scope,
            held=scope.held - execution.hold,
            settled=scope.settled + execution.cost,
            overrun=scope.overrun or overrun,
        )
    entry = ended_entry(command, event, execution, overrun, now)
    return Applied(reply=Settled(scope, execution, overrun), scope=scope, execution=execution, entry=entry)
