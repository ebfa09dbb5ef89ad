"""Brakes limit how often something is executed within a time window. No clock, no I/O.

Every admission counts, except one that was provably not sent. Refusals do not count. A brake counts the rows
that admissions write, so a new brake also counts the executions before its rule existed.

A brake holds for its own window and no longer: what was admitted by a clock that ran ahead counts as admitted
just now, so that `Retry-After` is never longer than the rule says.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sidecar.core.instant import SECOND, iso_time
from sidecar.core.policy import Brake, PolicySet, Rule, Subject, Tally
from sidecar.core.rules import Objection, Preview, braked, judged, objections, satisfies, unjudged
from sidecar.core.scope import UNDER_WAY, Execution


class AdmissionGroup(NamedTuple):
    """A key for admissions that are counted together. A field that is None matches every admission.

    An incident belongs to one tenant: the same name with another tenant is another incident.
    """

    tenant_id: str | None = None
    incident_id: str | None = None
    action: str | None = None


_ALL = AdmissionGroup()
# What a brake with `one_in_flight` waits for.
_OPEN = UNDER_WAY | {"unknown"}


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


def group_of(tally: Tally, about: Subject) -> AdmissionGroup:
    """The narrowest group that contains every execution that a tally counts for a subject."""
    return AdmissionGroup(
        about.tenant_id if tally.by_incident else None,
        about.incident_id if tally.by_incident else None,
        about.action if tally.by_action else None,
    )


def groups_containing(execution: Execution) -> tuple[AdmissionGroup, ...]:
    """Every group that an execution belongs to."""
    tenant_id, incident_id, action = execution.tenant_id, execution.incident_id, execution.action
    return (
        AdmissionGroup(tenant_id, incident_id, action),
        AdmissionGroup(tenant_id, incident_id),
        AdmissionGroup(None, None, action),
        _ALL,
    )


def groups_for(
    policies: PolicySet, tenant_id: str, incident_id: str | None, action: str | None
) -> dict[AdmissionGroup, int]:
    """The groups that an execution needs, each with the number of seconds that it must cover."""
    wanted = {}
    for by_incident, by_action, seconds in policies.horizons(action or ""):
        group = AdmissionGroup(
            tenant_id if by_incident else None,
            (incident_id or "") if by_incident else None,
            (action or "") if by_action else None,
        )
        wanted[group] = seconds
    return wanted


@dataclass(slots=True)
class Counted:
    """The executions that a brake counts for one value of its facets, oldest first.

    `latest` holds, for each of them, the latest admission up to it (microseconds since 1970), because a clock
    that ran ahead leaves times that do not rise. If a brake has `one_in_flight`, `open` holds those that were
    in flight, running or unknown when they were last examined.
    """

    names: list[str] = field(default_factory=list)
    latest: list[int] = field(default_factory=list)
    open: list[str] = field(default_factory=list)

    def add(self, name: str, admitted_at: int, one_in_flight: bool) -> None:
        latest = self.latest
        self.names.append(name)
        latest.append(latest[-1] if latest and latest[-1] > admitted_at else admitted_at)
        if one_in_flight:
            self.open.append(name)

    def is_open(self, executions: Mapping[str, Execution]) -> bool:
        """Whether one of them is under way or unknown. One that has ended otherwise never opens again."""
        self.open = [name for name in self.open if executions[name].status in _OPEN]
        return bool(self.open)


@dataclass(slots=True)
class _Examined:
    """What a tally counts in one group: the number of names examined so far, and the counts by facets."""

    names: int = 0
    counts: dict[Any, Counted] = field(default_factory=dict)


# A cache of the counted executions by tally and group. The owner of the cache only appends names to a group,
# so each admission examines only the new ones.
CountCache = dict[tuple[Tally, AdmissionGroup], _Examined]
_NOTHING = Counted()


def objections_to(
    known: Preview,
    subject: Subject,
    policies: PolicySet,
    admissions: Mapping[AdmissionGroup, Sequence[str]],
    executions: Mapping[str, Execution],
    found: CountCache | None = None,
    uses: list[tuple[Rule, Use]] | None = None,
) -> list[Objection]:
    """The objections of the rules to an execution whose facts are all known. `admissions` are oldest first.

    With `found`, each execution is examined once for many decisions. The use of each brake is appended to
    `uses`. Without `uses`, a brake that cannot hold is not looked at any further.
    """
    objecting: list[Objection] = []
    now = subject.now
    found = {} if found is None else found
    conditions = [known.early] if known.conditional else []
    conditions += [judged(bundle.late, subject) for bundle in known.bundles if bundle.late]
    for holding, failed in conditions:
        for rule, failure in failed:
            objecting.append(unjudged(rule, failure))
        for rule in holding:
            objecting += objections(rule, subject)
            if rule.brake is not None:
                counted = _counted(policies.tally(rule), subject, policies, admissions, executions, found)
                objecting += _braking((rule,), counted, subject, executions, uses)
    for bundle in known.bundles:
        if bundle.denies or not satisfies(subject, bundle.strictest):
            for rule in bundle.standing:
                objecting += objections(rule, subject)
        for tally in bundle.tallies:
            counted = _counted(tally, subject, policies, admissions, executions, found)
            if uses is not None or _may_hold(tally.strictest, counted, now, executions):
                objecting += _braking(tally.rules, counted, subject, executions, uses)
    return objecting


def _braking(
    rules: Sequence[Rule],
    counted: Sequence[Counted],
    subject: Subject,
    executions: Mapping[str, Execution],
    uses: list[tuple[Rule, Use]] | None,
) -> list[Objection]:
    """The objections of brakes that count the same executions."""
    now = subject.now
    objecting: list[Objection] = []
    for rule in rules:
        assert rule.brake is not None
        if uses is None and not _may_hold(rule.brake, counted, now, executions):
            continue
        used = use(rule, counted, subject, executions, whole=uses is not None)
        if uses is not None:
            uses.append((rule, used))
        objecting += objection(rule, used, now)
    return objecting


def _may_hold(
    brake: Brake, counted: Iterable[Counted], now: int, executions: Mapping[str, Execution]
) -> bool:
    """Whether a brake may hold. If not, it does not: this takes no visit to each execution."""
    most = brake.max_attempts
    for one in counted:
        latest = one.latest
        if not latest:
            continue
        if latest[-1] > now - brake.cooldown_seconds * SECOND:
            return True
        window = now - brake.window_seconds * SECOND
        if most is not None and len(latest) >= most and latest[-most] > window:
            return True
        if brake.one_in_flight and one.is_open(executions):
            return True
    return False


def _counted(
    tally: Tally,
    subject: Subject,
    policies: PolicySet,
    admissions: Mapping[AdmissionGroup, Sequence[str]],
    executions: Mapping[str, Execution],
    found: CountCache,
) -> list[Counted]:
    """The executions that a tally counts for a subject: one count, or one for each of its target agents."""
    group = group_of(tally, subject)
    names = admissions.get(group, ())
    examined = found.get((tally, group))
    if examined is None:
        examined = found[tally, group] = _Examined()
    counts = examined.counts
    if examined.names < len(names):
        for index in range(examined.names, len(names)):
            name = names[index]
            execution = executions[name]
            if _counts(tally, execution, policies):
                for key in _keys(tally, execution):
                    count = counts.get(key)
                    if count is None:
                        count = counts[key] = Counted()
                    count.add(name, execution.admitted_at, tally.one_in_flight)
        examined.names = len(names)
    return [counts.get(key, _NOTHING) for key in _keys(tally, subject)]


def _keys(tally: Tally, about: Subject | Execution) -> Iterable[Any]:
    """The values by which a tally counts. Executions without target agents share one count."""
    facets = tally.facets(about)
    if not tally.by_agent:
        return (facets,)
    return [(facets, agent) for agent in dict.fromkeys(about.target_agents or (None,))]


def _counts(tally: Tally, execution: Execution, policies: PolicySet) -> bool:
    match = tally.match
    if tally.checks_action:
        entry = policies.action(execution.action)
        if not match.action_matches(execution.action, None if entry is None else entry.risk):
            return False
    return not tally.checks_rest or match.rest_matches(execution)


def use(
    rule: Rule,
    counted: Sequence[Counted],
    subject: Subject,
    executions: Mapping[str, Execution],
    *,
    whole: bool = True,
) -> Use:
    """The use of a brake. Of several counts, the fullest decides. Only a `whole` use has the full number."""
    whole = whole or len(counted) > 1
    uses = [_use(rule, one, subject, executions, whole=whole) for one in counted]
    return max(uses, key=lambda one: (one.why is not None, one.until or 0, one.count))


def _use(
    rule: Rule, counted: Counted, subject: Subject, executions: Mapping[str, Execution], *, whole: bool
) -> Use:
    """The use of a brake by the executions of one count."""
    brake, now = rule.brake, subject.now
    assert brake is not None
    most, window = brake.max_attempts, brake.window_seconds * SECOND
    count, flying = 0, None
    holding: list[tuple[int, str]] = []
    cools = now - brake.cooldown_seconds * SECOND
    begins = min(now - window, cools)
    for place in range(len(counted.names) - 1, -1, -1):
        one = executions[counted.names[place]]
        admitted_at = min(one.admitted_at, now)
        within = admitted_at > now - window
        if one.status != "not_sent":
            if admitted_at > cools:
                holding.append(
                    (
                        admitted_at + brake.cooldown_seconds * SECOND,
                        f"{brake.cooldown_seconds} s must lie between two executions.",
                    )
                )
                cools = now  # only the newest execution starts a cooldown
            count += within
            if within and count == most:
                # There is no room until this execution leaves the window.
                why = f"{most} executions in {brake.window_seconds} s are the most."
                holding.append((admitted_at + window, why))
            if not brake.one_in_flight and (count == most or not within):
                break  # older executions do not matter
        if not whole and counted.latest[place] <= (cools if most in (None, count) else begins):
            break
    if brake.one_in_flight and counted.is_open(executions):
        for one in (executions[name] for name in reversed(counted.open)):
            admitted_at = min(one.admitted_at, now)
            if one.status in UNDER_WAY:
                flying = f"{_named(one, subject)} is still {one.status.replace('_', ' ')}."
            elif admitted_at > now - window:
                why = f"{_named(one, subject)} is unknown; reconcile it, or wait."
                holding.append((admitted_at + window, why))
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
