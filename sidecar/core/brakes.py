"""Brakes: how often something was executed lately, and when it may be again. No clock, no I/O.

Every admission counts but one that was provably not sent; refusals do not (source: policies.md, `brake`).
What was executed is read from the same rows that admissions write, so a brake also counts what happened
before somebody thought of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from sidecar.core.policy import PolicySet, Rule, Subject
from sidecar.core.record import iso_time
from sidecar.core.rules import SECOND, Objection, braked
from sidecar.core.scope import Execution


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """Admissions to be looked at together: those that agree with what is not None.

    An incident is a tenant's own: the same name with another tenant is another incident.
    """

    tenant_id: str | None = None
    incident_id: str | None = None
    action: str | None = None


@dataclass(frozen=True, slots=True)
class Use:
    """How far a brake is used: counted admissions in its window; why and until when it holds, if it does.

    `until` None while it holds: until the execution that is under way has ended.
    """

    count: int
    why: str | None = None
    until: int | None = None


def tally_of(rule: Rule, tenant_id: str, incident_id: str, action: str) -> Tally:
    """The smallest tally in which all is that a brake counts for an execution."""
    assert rule.brake is not None
    if "incident_id" in rule.brake.per:
        return Tally(tenant_id=tenant_id, incident_id=incident_id)
    if "action" in rule.brake.per:
        return Tally(action=action)
    return Tally()


def tallies_with(execution: Execution) -> tuple[Tally, ...]:
    """Every tally that an execution belongs to."""
    return (
        Tally(tenant_id=execution.tenant_id, incident_id=execution.incident_id),
        Tally(action=execution.action),
        Tally(),
    )


def tallies_for(
    policies: PolicySet, tenant_id: str, incident_id: str | None, action: str | None
) -> dict[Tally, int]:
    """What has to be counted for an execution, with how many seconds back."""
    wanted: dict[Tally, int] = {}
    for rule in policies.brakes(action or ""):
        assert rule.brake is not None
        tally = tally_of(rule, tenant_id, incident_id or "", action or "")
        wanted[tally] = max(wanted.get(tally, 0), rule.brake.horizon_seconds)
    return wanted


def use(
    rule: Rule,
    subject: Subject,
    policies: PolicySet,
    admissions: Mapping[Tally, Sequence[str]],
    executions: Mapping[str, Execution],
) -> Use:
    """How far an applying brake is used by what the subject is about."""
    tally = tally_of(rule, subject.tenant_id, subject.incident_id, subject.action)
    past = [
        execution
        for execution in (executions[name] for name in admissions.get(tally, ()))
        if execution.status != "not_sent" and _counts(rule, execution, subject, policies)
    ]
    assert rule.brake is not None
    if "target_agents" not in rule.brake.per:
        return _use(rule, past, subject.now)
    # Each agent has a count of its own, and the fullest decides; whoever names none shares one.
    uses = []
    for agent in subject.target_agents or (None,):
        with_agent = [
            execution
            for execution in past
            if (agent in execution.target_agents if agent is not None else not execution.target_agents)
        ]
        uses.append(_use(rule, with_agent, subject.now))
    return max(uses, key=lambda one: (one.why is not None, one.until or 0, one.count))


def _counts(rule: Rule, execution: Execution, subject: Subject, policies: PolicySet) -> bool:
    assert rule.brake is not None
    entry = policies.action(execution.action)
    return (
        rule.match.action_matches(execution.action, None if entry is None else entry.risk)
        and rule.match.rest_matches(
            execution.incident_id, execution.tenant_id, execution.principal, execution.target_agents
        )
        and all(
            getattr(execution, facet) == getattr(subject, facet)
            for facet in rule.brake.per
            if facet != "target_agents"
        )
    )


def _use(rule: Rule, past: Iterable[Execution], now: int) -> Use:
    brake = rule.brake
    assert brake is not None
    window = brake.window_seconds * SECOND
    newest_first = sorted(past, key=lambda one: one.admitted_at, reverse=True)
    within = [one for one in newest_first if one.admitted_at > now - window]
    holding: list[tuple[int, str]] = []
    if brake.max_attempts is not None and len(within) >= brake.max_attempts:
        # The one that has to leave the window before there is room again.
        leaves = within[brake.max_attempts - 1].admitted_at + window
        holding.append((leaves, f"{brake.max_attempts} executions in {brake.window_seconds} s are the most."))
    if newest_first and newest_first[0].admitted_at + brake.cooldown_seconds * SECOND > now:
        cool = newest_first[0].admitted_at + brake.cooldown_seconds * SECOND
        holding.append((cool, f"{brake.cooldown_seconds} s must lie between two executions."))
    if brake.one_in_flight:
        for one in within:
            if one.status == "unknown":
                why = f"Execution {one.decision_id} is unknown; reconcile it, or wait."
                holding.append((one.admitted_at + window, why))
        for one in newest_first:
            if one.status == "in_flight" and not holding:
                return Use(len(within), f"Execution {one.decision_id} is still in flight.")
    if not holding:
        return Use(len(within))
    until, why = max(holding)
    return Use(len(within), why, until)


def objection(rule: Rule, used: Use, now: int) -> Iterator[Objection]:
    """What a brake has against an execution, if it holds."""
    if used.why is not None:
        yield braked(rule, used.why, used.until, now, None if used.until is None else iso_time(used.until))
