"""Brakes limit how often something is executed within a time window. No clock, no I/O.

Every admission counts, except one that was provably not sent. Refusals do not count. A brake counts the rows
that admissions write, so a new brake also counts the executions before its rule existed.

A brake holds for its own window and no longer: what was admitted by a clock that ran ahead counts as admitted
just now, so that `Retry-After` is never longer than the rule says.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sidecar.core.instant import SECOND, iso_time
from sidecar.core.policy import Brake, PolicySet, Rule, Subject
from sidecar.core.rules import Objection, braked
from sidecar.core.scope import Execution


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionGroup:
    """A key for admissions that are counted together. A field that is None matches every admission.

    An incident belongs to one tenant: the same name with another tenant is another incident.
    """

    tenant_id: str | None = None
    incident_id: str | None = None
    action: str | None = None


@dataclass(frozen=True, slots=True)
class Use:
    """The use of a brake: the counted admissions in its window, and why and until when it holds.

    Counting stops as soon as the result is known, so `count` may be lower than the full number. `why` is None
    if the brake does not hold. `until` is in microseconds since 1970 (UTC). If `why` is set and `until` is
    None, the brake holds until the execution in flight ends.
    """

    count: int
    why: str | None = None
    until: int | None = None


def group_of(rule: Rule, tenant_id: str, incident_id: str, action: str) -> AdmissionGroup:
    """The narrowest group that contains every execution that the brake counts for this one."""
    assert rule.brake is not None
    per = rule.brake.per
    return AdmissionGroup(
        tenant_id=tenant_id if "incident_id" in per else None,
        incident_id=incident_id if "incident_id" in per else None,
        action=action if "action" in per else None,
    )


def groups_containing(execution: Execution) -> tuple[AdmissionGroup, ...]:
    """Every group that an execution belongs to."""
    tenant_id, incident_id, action = execution.tenant_id, execution.incident_id, execution.action
    return (
        AdmissionGroup(tenant_id=tenant_id, incident_id=incident_id, action=action),
        AdmissionGroup(tenant_id=tenant_id, incident_id=incident_id),
        AdmissionGroup(action=action),
        AdmissionGroup(),
    )


def groups_for(
    policies: PolicySet, tenant_id: str, incident_id: str | None, action: str | None
) -> dict[AdmissionGroup, int]:
    """The groups that an execution needs, each with the number of seconds that it must cover."""
    wanted: dict[AdmissionGroup, int] = {}
    for rule in policies.brakes(action or ""):
        assert rule.brake is not None
        group = group_of(rule, tenant_id, incident_id or "", action or "")
        wanted[group] = max(wanted.get(group, 0), rule.brake.horizon_seconds)
    return wanted


# A cache of the counted ids per brake: the policy set, the number of ids examined so far, and the ids that
# count. The owner of the cache only appends ids to the groups, so each admission examines only the new ones.
# The entry keeps the policy set alive, because the key contains the id() of the set.
CountCache = dict[tuple[Any, ...], tuple[PolicySet, int, list[str]]]


def use(
    rule: Rule,
    subject: Subject,
    policies: PolicySet,
    admissions: Mapping[AdmissionGroup, Sequence[str]],
    executions: Mapping[str, Execution],
    found: CountCache | None = None,
) -> Use:
    """The use of an applying brake for a subject. `admissions` are oldest first."""
    names = _counted(rule, subject, policies, admissions, executions, {} if found is None else found)
    newest_first = (executions[name] for name in reversed(names))
    assert rule.brake is not None
    if "target_agents" not in rule.brake.per:
        roomy = found is not None and _is_roomy(rule.brake, names, executions, subject.now)
        return _use(rule, newest_first, subject, roomy=roomy)
    # Each agent has its own count, and the fullest decides. Executions without target agents share one count.
    by_agent: dict[str | None, list[Execution]] = {agent: [] for agent in subject.target_agents or (None,)}
    for execution in newest_first:
        for agent in by_agent.keys() & set(execution.target_agents or (None,)):
            by_agent[agent].append(execution)
    uses = [_use(rule, past, subject) for past in by_agent.values()]
    return max(uses, key=lambda one: (one.why is not None, one.until or 0, one.count))


def _counted(
    rule: Rule,
    subject: Subject,
    policies: PolicySet,
    admissions: Mapping[AdmissionGroup, Sequence[str]],
    executions: Mapping[str, Execution],
    found: CountCache,
) -> list[str]:
    """The executions that the rule counts for the subject, oldest first.

    Target agents are not compared here.
    """
    assert rule.brake is not None
    group = group_of(rule, subject.tenant_id, subject.incident_id, subject.action)
    names = admissions.get(group, ())
    facets = (getattr(subject, facet) for facet in rule.brake.per if facet != "target_agents")
    # The key uses identity, because a rule with the same id in another set is another rule.
    key = (id(policies), id(rule), group, *facets)
    _, seen, counted = found.get(key, (policies, 0, []))
    for index in range(seen, len(names)):
        if _counts(rule, executions[names[index]], subject, policies):
            counted.append(names[index])
    found[key] = policies, len(names), counted
    return counted


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


def _is_roomy(brake: Brake, names: Sequence[str], executions: Mapping[str, Execution], now: int) -> bool:
    """Whether a brake cannot be full. A bisection answers this without a visit to each execution."""
    if brake.one_in_flight or brake.max_attempts is None:
        return False
    begins = now - brake.window_seconds * SECOND
    older = bisect_right(names, begins, key=lambda name: executions[name].admitted_at)
    return len(names) - older < brake.max_attempts


def _use(rule: Rule, newest_first: Iterable[Execution], subject: Subject, *, roomy: bool = False) -> Use:
    """The use of a brake for these executions. With `roomy`, only the newest one can matter for the brake."""
    brake, now = rule.brake, subject.now
    assert brake is not None
    window = brake.window_seconds * SECOND
    count, flying = 0, None
    holding: list[tuple[int, str]] = []
    cools = now - brake.cooldown_seconds * SECOND
    for one in newest_first:
        admitted_at = min(one.admitted_at, now)
        within = admitted_at > now - window
        if one.status == "not_sent":
            continue
        if admitted_at > cools:
            holding.append(
                (
                    admitted_at + brake.cooldown_seconds * SECOND,
                    f"{brake.cooldown_seconds} s must lie between two executions.",
                )
            )
            cools = now  # only the newest execution starts a cooldown
        count += within
        if within and count == brake.max_attempts:
            # There is no room until this execution leaves the window.
            why = f"{brake.max_attempts} executions in {brake.window_seconds} s are the most."
            holding.append((admitted_at + window, why))
        if not brake.one_in_flight and (roomy or count == brake.max_attempts or not within):
            break  # older executions do not matter
        if brake.one_in_flight and one.status == "unknown" and within:
            why = f"{_named(one, subject)} is unknown; reconcile it, or wait."
            holding.append((admitted_at + window, why))
        if brake.one_in_flight and one.status == "in_flight":
            flying = f"{_named(one, subject)} is still in flight."
    if holding:
        until, why = max(holding)
        return Use(count, why, until)
    return Use(count, flying)


def _named(execution: Execution, subject: Subject) -> str:
    """A description of an execution. It does not identify the execution of another tenant."""
    if execution.tenant_id == subject.tenant_id:
        return f"Execution {execution.decision_id}"
    return "An execution of another tenant"


def objection(rule: Rule, used: Use, now: int) -> Iterator[Objection]:
    """The objection of a brake to an execution, if the brake holds."""
    if used.why is not None:
        yield braked(rule, used.why, used.until, now, None if used.until is None else iso_time(used.until))
