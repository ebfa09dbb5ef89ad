"""The decision: `apply(command, state, now)` returns what changes, what is recorded and what is answered.

This module has no clock and does no I/O. Every change to the sidecar's state goes through `apply`, one
command at a time. The order of the commands is therefore the only concurrency there is.

Two commands ask for a decision: granting a scope, and executing under one. `endings` holds the rules by which
executions end. Each decision is judged in the same order:
the bounds of the request and its scope, then the freezes, then the catalogue, then the rules. If nothing
refuses the command, the decision holds the rows that change and the record.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, TypeVar

from sidecar.core import brakes, endings, idempotency
from sidecar.core.applied import Applied, shadow_details
from sidecar.core.bounds import (
    CATALOGUE_BOUNDS,
    SCOPE_BOUNDS,
    UNSCOPED_BOUNDS,
    BoundInput,
    judge,
)
from sidecar.core.brakes import Use
from sidecar.core.command import (
    AcceptClock,
    Admit,
    Admitted,
    Bind,
    ClockAccepted,
    Command,
    CountReplays,
    Denied,
    Emit,
    Emitted,
    Issue,
    Lapse,
    LiftFreeze,
    NotEmitted,
    PassUnlisted,
    Reconcile,
    Recorded,
    Refuse,
    Report,
    Revoke,
    Revoked,
    RunBound,
    SetFreeze,
    Settle,
    Settled,
    Turn,
    Turned,
)
from sidecar.core.entries import clock_accepted_entry, gate_entry, switched_entry
from sidecar.core.facts import Claims
from sidecar.core.freeze import Executing, frozen
from sidecar.core.freezing import lift_freeze, set_freeze
from sidecar.core.granting import issue
from sidecar.core.idempotency import Claim, KeptAnswer
from sidecar.core.instant import SECOND, iso_time
from sidecar.core.money import to_dollars
from sidecar.core.policy import Rule
from sidecar.core.record import Entry
from sidecar.core.repeats import repeated, summary_of
from sidecar.core.roles import role_required
from sidecar.core.rules import (
    Objection,
    in_order,
    preview,
    refusal_by,
    subject_of,
)
from sidecar.core.scope import RELEASING, Execution, Scope
from sidecar.core.state import State
from sidecar.errors import Refusal

E = TypeVar("E", Settle, Report, Lapse, Reconcile)

SHADOW_ROUTE = "the route is in shadow mode"


@dataclass(slots=True, kw_only=True)
class Judgment:
    """The judgment on one execution. It may go on if `refusal` is None.

    `scope` is the scope that the execution consumes. It is None if the execution needs no scope, and then
    `waived` gives the reason. `objections` holds every objection of the rules and the catalogue; `shadow`
    holds the ones that are only recorded. `uses` gives the use of each brake.
    """

    case: BoundInput
    scope: Scope | None
    refusal: Refusal | None
    shadow: tuple[Objection, ...] = ()
    objections: tuple[Objection, ...] = ()
    uses: tuple[tuple[Rule, Use], ...] = ()
    waived: str | None = None


# An execution -------------------------------------------------------------------------------------------


def judgment(command: Admit, state: State, now: int) -> Judgment:
    """Judge one execution as `admit` does, and say how far each brake is used."""
    uses: list[tuple[Rule, Use]] = []
    found = _judgment(command, state, now, uses)
    rules = command.policies.about("execute", command.claims.action or "")
    order = {id(rule): place for place, rule in enumerate(rules)}
    found.uses = tuple(sorted(uses, key=lambda one: order[id(one[0])]))
    return found


def _judgment(command: Admit, state: State, now: int, uses: list[tuple[Rule, Use]] | None = None) -> Judgment:
    """Judge one execution. The use of each brake is appended to `uses`; without it, few are found out."""
    claims, policies = command.claims, command.policies
    scope = state.scopes.get(claims.scope_id or "")
    case = BoundInput.of(
        claims, command.tenant_id, command.principal, scope, policies, now, command.announced_cost
    )
    waived = None
    found: list[Objection] = []
    refusal = judge(case, SCOPE_BOUNDS)
    if claims.scope_id is None and case.entry and case.entry.risk < command.scope_required_from:
        waived = f"{case.entry.risk.value} risk needs no scope (gate.scope_required_from)"
        refusal = judge(case, UNSCOPED_BOUNDS)
    if refusal is not None and command.shadow and judge(case, UNSCOPED_BOUNDS) is None:
        waived = SHADOW_ROUTE
        found.append(Objection(refusal, None, shadow=True))
        refusal = None
    if refusal is None and state.freezes:
        # A freeze wins over shadow mode, and over the lack of a need for a scope.
        refusal = _frozen(command, state, now)
    if refusal is not None:
        return Judgment(case=case, scope=None, refusal=refusal)
    consumed = None if waived is not None else case.granted
    refusal = judge(case, CATALOGUE_BOUNDS)
    if refusal is not None:
        found.append(Objection(refusal, None))
    found += _objections(command, consumed, state, now, uses)
    if not found:
        return Judgment(case=case, scope=consumed, refusal=None, waived=waived)
    if command.shadow:
        found = [replace(one, shadow=True) for one in found]
    found = in_order(found)
    return Judgment(
        case=case,
        scope=consumed,
        refusal=refusal_by(found),
        shadow=tuple(one for one in found if one.shadow),
        objections=tuple(found),
        waived=waived,
    )


def _frozen(command: Admit, state: State, now: int) -> Refusal | None:
    """The refusal of an execution, or of the repeat of one, by a freeze."""
    entry = command.policies.action(command.claims.action or "")
    executing = Executing(
        claims=command.claims,
        tenant_id=command.tenant_id,
        principal=command.principal,
        route=command.route,
        risk=None if entry is None else entry.risk,
    )
    return frozen(state.freezes.values(), executing, now)


def _objections(
    command: Admit, scope: Scope | None, state: State, now: int, uses: list[tuple[Rule, Use]] | None
) -> list[Objection]:
    """The objections of the rules to an execution. The use of each brake is appended to `uses`."""
    policies = command.policies
    known = command.preview
    if known is not None and not known.bundles:
        return []
    subject = subject_of(command.claims, command.tenant_id, command.principal, policies, now, scope)
    known = known or preview(policies, "execute", subject)
    return brakes.objections_to(
        known, subject, policies, state.admissions, state.executions, state.found, uses
    )


def admit(command: Admit, state: State, now: int) -> Applied:
    """Consume the scope, hold the cost and record it, or refuse."""
    repeated = None if command.claim is None else _repeated(command, command.claim, state, now)
    if repeated is not None:
        held = _frozen(command, state, now) if state.freezes else None
        return repeated if held is None else _denied(command, held, now)
    claims, revision = command.claims, command.policies.revision
    found = _judgment(command, state, now)
    details = shadow_details(found.shadow)
    if command.preview is not None and command.preview.conditional:
        # The conditions were judged at this time, which is earlier than the time of the record.
        details["judged_at"] = iso_time(command.preview.judged_at)
    if command.shadow:
        details["route_mode"] = "shadow"
    if found.refusal is not None:
        return _denied(command, found.refusal, now, found.objections, details)
    case, hold = found.case, found.case.hold
    consumed = found.scope
    if consumed is not None:
        consumed = consumed.counted(attempts_used=consumed.attempts_used + 1, held=consumed.held + hold)
    execution = Execution(
        decision_id=command.decision_id,
        scope_id=None if consumed is None else consumed.scope_id,
        tenant_id=command.tenant_id,
        incident_id=claims.incident_id or "",
        action=claims.action or "",
        request_id=command.request_id or "",
        attempt_number=None if consumed is None else consumed.attempts_used,
        hold=hold,
        admitted_at=now,
        principal=command.principal.id,
        principal_kind=command.principal.kind,
        principal_method=command.principal.method,
        principal_groups=command.principal.groups,
        target_agents=claims.target_agents,
        route=command.route,
        report_token=command.report_token,
        report_by=None if command.report_seconds is None else now + command.report_seconds * SECOND,
    )
    if execution.report_by is not None:
        details["report_by"] = iso_time(execution.report_by)
    if found.waived is not None:
        details["scope_waived"] = found.waived
    entry = gate_entry(
        command,
        "admitted",
        None,
        # The record names a scope only if the execution consumed it.
        claims if consumed is not None else replace(claims, scope_id=None),
        revision,
        now,
        scope=consumed,
        attempt_number=execution.attempt_number,
        attempts_remaining=None if consumed is None else consumed.attempts_remaining,
        hold_usd=to_dollars(hold),
        risk=case.entry.risk._value_ if case.entry else None,
        granted_to=None if consumed is None else consumed.created_by,
        **details,
    )
    timeout = case.entry.timeout_seconds if case.entry else None
    return Applied(
        reply=Admitted(consumed, execution, timeout, found.shadow),
        scope=consumed,
        execution=execution,
        entry=entry,
        claimed=None
        if command.claim is None
        else idempotency.claimed_by(command.claim, command.decision_id, now),
    )


def _denied(
    command: Admit,
    refusal: Refusal,
    now: int,
    objections: tuple[Objection, ...] = (),
    details: Mapping[str, Any] = MappingProxyType({}),
) -> Applied:
    """The refusal of an execution, with its record unless the caller keeps it in a summary."""
    if not command.record_denial:
        return Applied(reply=Denied(refusal, None, objections))
    revision = command.policies.revision
    return Applied(
        reply=Denied(refusal, command.decision_id, objections),
        entry=gate_entry(command, "refused", refusal, command.claims, revision, now, **details),
    )


def _repeated(command: Admit, claim: Claim, state: State, now: int) -> Applied | None:
    """What the request gets if its idempotency key is claimed already."""
    claimed = state.claimed.get(claim.key)
    if claimed is None:
        return None
    execution = state.executions.get(claimed.admission_id)
    scope = None if execution is None else state.scopes.get(execution.scope_id or "")
    repeat = repeated(command, claim, claimed, execution, scope, now)
    return None if repeat is None else Applied(reply=repeat[0], entry=repeat[1])


def apply(command: Command, state: State, now: int) -> Applied:
    """Apply one command to the rows that it names. `now` is in microseconds since 1970 (UTC)."""
    match command:
        case Admit():
            return admit(command, state, now)
        case Settle():
            if command.answer is not None:
                return _answered(command, command.answer, state, now)
            return _end(endings.settle, command, state, now)
        case Refuse():
            return _refuse(command, state, now)
        case CountReplays():
            return Applied(reply=Recorded(command.decision_id), entry=summary_of(command, now))
        case PassUnlisted():
            return _pass_unlisted(command, now)
        case Issue():
            return issue(command, now)
        case Revoke():
            return _revoke(command, state, now)
        case Emit():
            return _emit(command, state, now)
        case Turn():
            return _turn(command, state, now)
        case SetFreeze():
            return set_freeze(command, state.freezes, now)
        case LiftFreeze():
            return lift_freeze(command, state.freezes, now)
        case Bind():
            count = len(state.unbound.get(command.request_id, ()))
            return Applied(reply=RunBound(count), bound=command if count else None)
        case AcceptClock():
            return Applied(
                reply=ClockAccepted(command.decision_id, command.before, now),
                entry=clock_accepted_entry(command, now),
            )
        case Report():
            return _end(endings.report, command, state, now)
        case Lapse():
            return _end(endings.lapse, command, state, now)
        case _:
            return _end(endings.reconcile, command, state, now)


def _counted(command: Refuse | PassUnlisted) -> dict[str, Any]:
    """The details that only the summary of a flood has."""
    return {} if command.count == 1 else {"count": command.count, **(command.summary or {})}


def _refuse(command: Refuse, state: State, now: int) -> Applied:
    if command.shadow and state.freezes:
        # The request would be let through unread, and what is not known of it counts as frozen.
        executing = Executing(
            claims=command.claims,
            tenant_id=command.tenant_id,
            principal=command.principal,
            route=command.route,
            risk=None,
        )
        held = frozen(state.freezes.values(), executing, now)
        if held is not None:
            applied = _refuse(replace(command, refusal=held, shadow=False), state, now)
            return replace(applied, reply=Denied(held, command.decision_id))
    counted = _counted(command)
    refusal: Refusal | None = command.refusal
    if command.line is not None:
        counted["route"] = None
    if command.shadow:
        counted["would_refuse"] = [Objection(command.refusal, None, shadow=True).to_dict()]
        counted["scope_waived"] = SHADOW_ROUTE
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
        line=command.line,
        **counted,
    )
    return Applied(reply=Recorded(command.decision_id), entry=entry)


def _pass_unlisted(command: PassUnlisted, now: int) -> Applied:
    entry = gate_entry(
        command,
        "unlisted",
        None,
        Claims(),
        command.policy_revision,
        now,
        line=command.line,
        route=None,
        **_counted(command),
    )
    return Applied(reply=Recorded(command.decision_id), entry=entry)


def _revoke(command: Revoke, state: State, now: int) -> Applied:
    scope = state.scopes.get(command.scope_id)
    claims = Claims(scope_id=command.scope_id)
    refusal = None
    if scope is None or scope.tenant_id != command.tenant_id:
        refusal = Refusal("scope_not_found", "No scope has this scope_id.", {"scope_id": command.scope_id})
    elif command.own_only and scope.proven_issuer != command.principal.id:
        refusal = role_required(command.principal, "operator")
    if scope is None or refusal is not None:
        assert refusal is not None
        if not command.record_denial:
            return Applied(reply=Denied(refusal, None))
        entry = gate_entry(
            command, "refused", refusal, claims, command.policy_revision, now, gatekept="scope_grant"
        )
        return Applied(reply=Denied(refusal, command.decision_id), entry=entry)
    if scope.revoked_at is None:
        scope = replace(scope, revoked_at=now)
    because: dict[str, Any] = {} if command.cause is None else {"cause": command.cause}
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
    """Append an emitted record. The switch is tested first, so that a suppressed record leaves no key."""
    if command.unless_switched in state.on:
        return Applied(reply=NotEmitted("switched_off"))
    if command.once in state.kept:
        return Applied(reply=NotEmitted("repeated"))
    entry = Entry(
        event="emitted",
        origin=command.origin,
        principal=command.principal,
        record=command.record,
        recorded_at=now,
    )
    return Applied(reply=Emitted(command.record), entry=entry, kept=command.once)


def _turn(command: Turn, state: State, now: int) -> Applied:
    entry = switched_entry(command, was_on=command.switch in state.on, now=now)
    return Applied(reply=Turned(command.on, command.decision_id), entry=entry, turned=command)


def _answered(command: Settle, answer: KeptAnswer, state: State, now: int) -> Applied:
    """Settle, and keep the answer for repeats, even if a report has ended the execution before."""
    settled = _end(endings.settle, command, state, now)
    execution = settled.execution or state.executions.get(command.admission_id)
    if execution is None or execution.status in RELEASING:
        return settled
    scope = settled.scope or state.scopes.get(execution.scope_id or "")
    claimed = idempotency.answered(state.claimed.get(answer.key), answer, execution.decision_id, scope, now)
    return replace(settled, claimed=claimed)


def _end(
    rule: Callable[[E, Execution | None, Scope | None, int], endings.Result],
    command: E,
    state: State,
    now: int,
) -> Applied:
    """Apply one of the rules by which executions end."""
    execution = state.executions.get(command.admission_id)
    if execution is None or execution.scope_id is None:
        reply, entry = rule(command, execution, None, now)
    else:
        reply, entry = rule(command, execution, state.scopes[execution.scope_id], now)
    if isinstance(reply, Settled):
        return Applied(reply=reply, scope=reply.scope, execution=reply.execution, entry=entry)
    return Applied(reply=reply)
