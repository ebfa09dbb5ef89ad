"""The two decisions: may this scope be granted, may this be executed? No clock, no I/O.

First what the request and its scope say (bounds), then the catalogue, then the rules; then, if nothing
refuses, what changes and what is recorded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sidecar.core import brakes
from sidecar.core.bounds import (
    CATALOGUE_BOUNDS,
    SCOPE_BOUNDS,
    UNSCOPED_BOUNDS,
    Case,
    judge,
    not_in_catalogue,
    targets_required,
)
from sidecar.core.brakes import Found, Tally, Use
from sidecar.core.command import Admit, Admitted, Denied, Issue, Issued
from sidecar.core.entries import gate_entry
from sidecar.core.facts import Claims
from sidecar.core.money import to_dollars
from sidecar.core.policy import Rule, Subject
from sidecar.core.record import Entry, iso_time
from sidecar.core.rules import (
    SECOND,
    GrantJudgment,
    Objection,
    ScopeTerms,
    applying,
    granting,
    in_order,
    objections,
    preview,
    refusal_by,
    subject_of,
    with_scope,
)
from sidecar.core.scope import Execution, Scope
from sidecar.errors import Refusal

SHADOW_ROUTE = "the route is in shadow mode"


@dataclass(frozen=True, slots=True, kw_only=True)
class Decided:
    """What a decision comes to: the reply, the rows that change, the entry for the log."""

    reply: Admitted | Issued | Denied
    scope: Scope | None = None
    execution: Execution | None = None
    entry: Entry | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgment:
    """What is to be said to one execution. `refusal` None: it may go on.

    `scope` is the one that it consumes, None where it needs none, and `waived` says why; `shadow` is what
    would have been refused, `objections` all that rules and catalogue have against it; `uses` says how far
    each brake is used.
    """

    case: Case
    scope: Scope | None
    refusal: Refusal | None
    shadow: tuple[Objection, ...] = ()
    objections: tuple[Objection, ...] = ()
    uses: tuple[tuple[Rule, Use], ...] = ()
    waived: str | None = None


@dataclass(frozen=True, slots=True)
class Past:
    """What was executed lately: executions by name, and the names by tally, oldest first.

    With `found` each is looked at once while a batch is decided; without it all are counted to the last.
    """

    admissions: Mapping[Tally, Sequence[str]] = field(default_factory=dict)
    executions: Mapping[str, Execution] = field(default_factory=dict)
    found: Found | None = None


# An execution -------------------------------------------------------------------------------------------


def judgment(command: Admit, scope: Scope | None, past: Past, now: int) -> Judgment:
    """What `admit` decides by; `explain` asks the same question."""
    claims, policies = command.claims, command.policies
    case = Case.of(claims, command.tenant_id, scope, policies, now, command.announced_cost)
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
    if refusal is not None:
        return Judgment(case=case, scope=None, refusal=refusal)
    consumed = None if waived is not None else case.granted
    refusal = judge(case, CATALOGUE_BOUNDS)
    if refusal is not None:
        found.append(Objection(refusal, None))
    uses: list[tuple[Rule, Use]] = []
    found += _objections(command, consumed, past, now, uses)
    if command.shadow:
        found = [replace(one, shadow=True) for one in found]
    return Judgment(
        case=case,
        scope=consumed,
        refusal=refusal_by(found),
        shadow=tuple(in_order(one for one in found if one.shadow)),
        objections=tuple(found),
        uses=tuple(uses),
        waived=waived,
    )


def _objections(
    command: Admit, scope: Scope | None, past: Past, now: int, uses: list[tuple[Rule, Use]]
) -> Iterator[Objection]:
    """What the rules have against it; how far each brake is used goes into `uses`."""
    policies = command.policies
    subject = subject_of(command.claims, command.tenant_id, command.principal, policies, now, scope)
    known = command.preview or preview(policies, "execute", subject)
    for each in applying(known, subject):
        yield from objections(each, subject)
        if each.rule.brake is not None and each.failure is None:
            used = brakes.use(each.rule, subject, policies, past.admissions, past.executions, past.found)
            uses.append((each.rule, used))
            yield from brakes.objection(each.rule, used, now)


def admit(command: Admit, scope: Scope | None, past: Past, now: int) -> Decided:
    """Consume the scope, hold the cost and record it, or refuse."""
    claims, revision = command.claims, command.policies.revision
    found = judgment(command, scope, past, now)
    told = _told(found.shadow)
    if command.preview is not None and command.preview.conditional:
        # Conditions on the time were judged then, and not when this was written down.
        told["judged_at"] = iso_time(command.preview.judged_at)
    if command.shadow:
        told["route_mode"] = "shadow"
    if found.refusal is not None:
        if not command.record_denial:
            return Decided(reply=Denied(found.refusal, None, found.objections))
        return Decided(
            reply=Denied(found.refusal, command.decision_id, found.objections),
            entry=gate_entry(command, "refused", found.refusal, claims, revision, now, **told),
        )
    case, hold = found.case, found.case.hold
    consumed = found.scope
    if consumed is not None:
        consumed = replace(consumed, attempts_used=consumed.attempts_used + 1, held=consumed.held + hold)
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
        principal=command.principal,
        target_agents=claims.target_agents,
    )
    if found.waived is not None:
        told["scope_waived"] = found.waived
    entry = gate_entry(
        command,
        "admitted",
        None,
        # A scope that was named and not consumed is not what this was executed under.
        claims if consumed is not None else replace(claims, scope_id=None),
        revision,
        now,
        attempt_number=execution.attempt_number,
        attempts_remaining=None if consumed is None else consumed.attempts_remaining,
        hold_usd=to_dollars(hold),
        risk=case.entry.risk.value if case.entry else None,
        granted_to=None if consumed is None else consumed.created_by,
        **told,
    )
    timeout = case.entry.timeout_seconds if case.entry else None
    return Decided(
        reply=Admitted(consumed, execution, timeout, found.shadow),
        scope=consumed,
        execution=execution,
        entry=entry,
    )


def _told(shadow: Iterable[Objection]) -> dict[str, Any]:
    """What a record says of refusals that were none."""
    would_refuse = [one.to_dict() for one in shadow]
    return {"would_refuse": would_refuse} if would_refuse else {}


# A grant ------------------------------------------------------------------------------------------------


def issue(command: Issue, now: int) -> Decided:
    """Grant a scope on the terms that policies leave, or refuse."""
    asked = _terms(command)
    found = command.judged or granted(command, now)
    refusal = _not_granted(command) or refusal_by(found.objections)
    shadow = tuple(one for one in found.objections if one.shadow)
    told = _told(shadow)
    if command.judged is not None and found.conditional:
        told["judged_at"] = iso_time(found.judged_at)
    if refusal is not None:
        denied = Denied(refusal, command.decision_id if command.record_denial else None, found.objections)
        if not command.record_denial:
            return Decided(reply=denied)
        claims = _claims(replace(command.scope, scope_id=""))
        told |= _asked(command, asked)
        return Decided(
            reply=denied,
            entry=gate_entry(
                command,
                "refused",
                refusal,
                claims,
                command.policies.revision,
                now,
                gatekept="scope_grant",
                **told,
            ),
        )
    terms = found.terms
    scope = replace(
        command.scope,
        max_attempts=terms.max_attempts,
        max_cost=terms.max_cost,
        created_at=now,
        expires_at=now + terms.ttl_seconds * SECOND,
    )
    entry = gate_entry(
        command,
        "issued",
        None,
        _claims(scope),
        command.policies.revision,
        now,
        gatekept="scope_grant",
        expires_at=iso_time(scope.expires_at),
        rules=list(found.lowered_by),
        **_asked(command, terms),
        **told,
    )
    return Decided(reply=Issued(scope, command.decision_id, shadow), scope=scope, entry=entry)


def granted(command: Issue, now: int) -> GrantJudgment:
    """What the rules say to a grant. They look at nothing that only the writer knows."""
    return granting(command.policies, _subjects(command, now), _terms(command), command.defaulted)


def _terms(command: Issue) -> ScopeTerms:
    scope = command.scope
    return ScopeTerms(max_attempts=scope.max_attempts, ttl_seconds=command.ttl, max_cost=scope.max_cost)


def _subjects(command: Issue, now: int) -> list[Subject]:
    """A grant as the rules see it: each of its actions by itself."""
    scope = replace(command.scope, created_at=now)
    claims = replace(_claims(scope), scope_id=None)
    return [
        with_scope(
            subject_of(
                replace(claims, action=action), scope.tenant_id, command.principal, command.policies, now
            ),
            scope,
        )
        for action in scope.allowed_actions
    ]


def _not_granted(command: Issue) -> Refusal | None:
    """What the catalogue has against it."""
    for action in command.scope.allowed_actions:
        entry = command.policies.action(action)
        if entry is None:
            return not_in_catalogue(action)
        if entry.targets_required and not command.scope.target_agents:
            return targets_required(action)
    return None


def _claims(scope: Scope) -> Claims:
    return Claims(
        scope_id=scope.scope_id or None, incident_id=scope.incident_id, target_agents=scope.target_agents
    )


def _asked(command: Issue, terms: ScopeTerms) -> dict[str, Any]:
    """The terms of a grant as its record has them: those granted, or those that were refused."""
    scope = command.scope
    return {
        "allowed_actions": list(scope.allowed_actions),
        "max_attempts": terms.max_attempts,
        "max_cost_usd": to_dollars(terms.max_cost),
        "ttl_seconds": terms.ttl_seconds,
        "defaulted": sorted(command.defaulted),
        "intent": scope.intent,
        "created_by": scope.created_by,
        "created_by_verified": command.created_by_verified,
    }
