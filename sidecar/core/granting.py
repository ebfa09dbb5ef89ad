"""The decision on a grant: the scope that the policies allow, or the refusal."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sidecar.core.applied import Applied, shadow_details
from sidecar.core.bounds import never_spendable, not_in_catalogue, targets_required
from sidecar.core.command import Denied, Issue, Issued
from sidecar.core.entries import gate_entry
from sidecar.core.facts import Claims
from sidecar.core.instant import SECOND, iso_time
from sidecar.core.money import to_dollars
from sidecar.core.policy import Subject
from sidecar.core.rules import GrantJudgment, ScopeTerms, granting, refusal_by, subject_of
from sidecar.core.scope import Scope
from sidecar.errors import Refusal


def issue(command: Issue, now: int) -> Applied:
    """Grant a scope on the terms that the policies allow, or refuse it."""
    requested = _terms(command)
    found = command.judged or granted(command, now)
    refusal = _not_granted(command) or refusal_by(found.objections)
    if refusal is None:
        # The rules come first, because they decide what the ceiling is.
        lowered_by = found.lowered.get("max_cost_usd", ())
        actions = command.scope.allowed_actions
        refusal = never_spendable(command.policies, actions, found.terms.max_cost, lowered_by)
    shadow = tuple(one for one in found.objections if one.shadow)
    details = shadow_details(shadow)
    if command.judged is not None and found.conditional:
        details["judged_at"] = iso_time(found.judged_at)
    if refusal is not None:
        denied = Denied(refusal, command.decision_id if command.record_denial else None, found.objections)
        if not command.record_denial:
            return Applied(reply=denied)
        claims = _claims(replace(command.scope, scope_id=""))
        details |= _term_details(command, requested)
        return Applied(
            reply=denied,
            entry=gate_entry(
                command,
                "refused",
                refusal,
                claims,
                command.policies.revision,
                now,
                gatekept="scope_grant",
                **details,
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
        rules=found.lowered_by,
        **_term_details(command, terms),
        **details,
    )
    return Applied(reply=Issued(scope, command.decision_id, shadow), scope=scope, entry=entry)


def granted(command: Issue, now: int) -> GrantJudgment:
    """Judge a grant by the rules. They read nothing that only the store's writer knows."""
    return granting(command.policies, _subjects(command, now), _terms(command), command.defaulted)


def _terms(command: Issue) -> ScopeTerms:
    scope = command.scope
    return ScopeTerms(max_attempts=scope.max_attempts, ttl_seconds=command.ttl, max_cost=scope.max_cost)


def _subjects(command: Issue, now: int) -> list[Subject]:
    """One subject for each action of a grant, because the rules judge each action separately."""
    scope = replace(command.scope, created_at=now)
    claims = replace(_claims(scope), scope_id=None)
    return [
        subject_of(
            replace(claims, action=action), scope.tenant_id, command.principal, command.policies, now, scope
        )
        for action in scope.allowed_actions
    ]


def _not_granted(command: Issue) -> Refusal | None:
    """The refusal of a grant by the catalogue, or None."""
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


def _term_details(command: Issue, terms: ScopeTerms) -> dict[str, Any]:
    """The terms of a grant for its record: the granted terms, or the refused ones."""
    scope = command.scope
    return {
        "allowed_actions": list(scope.allowed_actions),
        "max_attempts": terms.max_attempts,
        "max_cost_usd": to_dollars(terms.max_cost),
        "ttl_seconds": terms.ttl_seconds,
        "defaulted": sorted(command.defaulted),
        "intent": scope.intent,
        "created_by": scope.created_by,
        "created_by_verified": scope.proven_issuer is not None,
    } | _further_terms(scope)


def _further_terms(scope: Scope) -> dict[str, Any]:
    """The terms that few grants have."""
    further: dict[str, Any] = {}
    if scope.executors:
        further["executors"] = list(scope.executors)
    if scope.on_behalf_of is not None:
        further["on_behalf_of"] = {"id": scope.on_behalf_of, "verified": False}
    return further
