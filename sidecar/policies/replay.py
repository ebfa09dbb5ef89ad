"""Replay: the recorded decisions, decided again by another policy set in the order of the log.

1. Replay decides admissions, refusals by policies, and grants again. It keeps refusals by a scope's own
   bounds, the recorded attempts, and the recorded endings of executions, because these do not depend on
   policies.
2. Brakes are counted again: executions that the new set admits count, and those that it refuses do not. An
   execution that was refused and would now be admitted counts as answered at once, because its real ending is
   unknown.
3. Grants are decided independently of executions. An execution under a scope is still judged if the new set
   would refuse the grant of the scope.
4. An execution that needed no scope is judged without one. It needs a scope now if the new set gives its
   action a risk that is above the recorded one and not below `gate.scope_required_from`.
5. An admission on a shadow route is never refused. On shadow routes and for shadow rules, only the objections
   that would be recorded can differ.
6. If a rule reads a fact that the record lacks, the verdict is undecidable, unless something else refuses
   anyway. Brakes then count the execution as recorded.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sidecar.core.apply import judgment
from sidecar.core.brakes import AdmissionGroup, groups_for
from sidecar.core.command import Admit, Denied, Issue
from sidecar.core.facts import Claims
from sidecar.core.granting import issue
from sidecar.core.instant import SECOND
from sidecar.core.policy import SCOPE_FACTS, ActionPolicy, Phase, PolicySet, RiskClass, Rule, Subject
from sidecar.core.rules import TERMS, preview, subject_of
from sidecar.core.scope import RELEASING, Execution, ExecutionStatus, Scope
from sidecar.core.state import State
from sidecar.errors import LogTampered, Refusal
from sidecar.policies._conditions import CelCondition
from sidecar.policies.gaterecords import (
    ALL_PARAMETERS,
    MASKED,
    Finding,
    GateRecord,
    Missing,
    Verdict,
    masked,
    objecting,
)
from sidecar.store.logfile import START, opened

# This is not a fact of a request, but brakes read it.
EARLIER_AGENTS = "the target agents of earlier executions"
# This is no fact that a condition may read, but a requirement reads it.
ISSUER = "the issuer of the scope"
FLOOD = "the summary of a flood says only how many there were"


def replayed(path: Path, replay: Replay, progress: Callable[[int, int], None]) -> Iterator[Finding]:
    """The findings for the records of a log that are decided again. `progress` is called with (done, total).

    Raises StoreUnavailable if the log cannot be read, and LogTampered if it is damaged. It does not verify
    the hash chain; `verify` does.
    """
    with opened(path) as log:
        last = log.last()
        for page in log.pages("CAST(envelope AS BLOB)", START, last):
            for seq, envelope in page:
                try:
                    record = GateRecord.of(envelope)
                except (KeyError, TypeError, ValueError) as exc:
                    raise LogTampered(f"record {seq} is none that a sidecar wrote ({exc!r})") from exc
                finding = None if record is None else replay.read(record)
                if finding is not None:
                    yield finding
            progress(page[-1][0], last)


class Replay:
    """Decides the records of a log again, in order. Records before `since` only supply the earlier state."""

    def __init__(
        self, policies: PolicySet, *, since: int = 0, scope_required_from: RiskClass = RiskClass.LOW
    ) -> None:
        self._rules = _Rules(policies)
        self._since = since
        self._scope_required_from = scope_required_from
        self._scopes: dict[str, _Granted] = {}
        self._lapsing: list[tuple[int, str]] = []
        self._executions = _Executions(policies)

    def read(self, record: GateRecord) -> Finding | None:
        """Process the next record. The result is its finding, or None if it is not decided again."""
        self._lapse(record.now)
        self._executions.forget(record.now)
        if record.event in ("settled", "reconciled"):
            self._end(record)
        elif record.event == "revoked":
            self._scopes.pop(record.scope_id or "", None)
        elif record.event == "issued":
            self._granted(record)
        if not record.depends_on_policies:
            return None
        finding = None
        if record.now >= self._since:
            now, why = self._judged(record)
            finding = Finding(record=record, recorded=record.verdict, now=now, why=why)
        if not record.of_grant:
            self._go_on(record, finding)
        return finding

    def _judged(self, record: GateRecord) -> tuple[Verdict | None, str | None]:
        if record.count > 1:
            return None, FLOOD
        return self._granting(record) if record.of_grant else self._execution(record)

    # State ---------------------------------------------------------------------------------------------

    def _granted(self, record: GateRecord) -> None:
        request, missing = record.grant_request()
        # The requested terms may be missing, but the record holds the granted ones.
        for fact, term in (("attempts_remaining", "max_attempts"), ("max_cost_micros", "max_cost_usd")):
            if term in request.recorded:
                missing.pop(fact, None)
        ttl = request.recorded.get("ttl_seconds")
        if ttl is not None:
            heapq.heappush(self._lapsing, (record.now + int(ttl) * SECOND, request.scope.scope_id))
        known = {fact: why for fact, why in missing.items() if fact in SCOPE_FACTS}
        self._scopes[request.scope.scope_id] = _Granted(request.scope, known)

    def _lapse(self, now: int) -> None:
        """Forget expired scopes, because nothing can be admitted under them."""
        while self._lapsing and self._lapsing[0][0] <= now:
            self._scopes.pop(heapq.heappop(self._lapsing)[1], None)

    def _end(self, record: GateRecord) -> None:
        granted, status = self._scopes.get(record.scope_id or ""), record.ended
        if granted is not None and status is None:
            granted.missing["attempts_used"] = granted.missing["attempts_remaining"] = MASKED
        elif granted is not None and status in RELEASING:
            granted.used -= 1
        self._executions.end(record.admission_id, status or "unknown")

    def _go_on(self, record: GateRecord, finding: Finding | None) -> None:
        """Count an execution: for the brakes by the new verdict, for its scope by the recorded one."""
        admitted = record.event == "admitted"
        granted = self._scopes.get(record.scope_id or "")
        if granted is not None:
            granted.used += admitted
        went_on = admitted
        if finding is not None and finding.now is not None:
            went_on = finding.now.error is None
        if went_on:
            self._executions.add(record.execution("in_flight" if admitted else "answered"))

    # Deciding again ------------------------------------------------------------------------------------

    def _execution(self, record: GateRecord) -> tuple[Verdict | None, str | None]:
        claims, missing = record.claims()
        granted = self._scopes.get(claims.scope_id or "")
        if granted is not None:
            missing |= granted.missing
        elif claims.scope_id is not None:
            missing |= dict.fromkeys(
                (*SCOPE_FACTS, ISSUER), "unknown, for the log does not have the grant of the scope"
            )
        if self._executions.agents_masked and claims.target_agents and "target_agents" not in missing:
            missing[EARLIER_AGENTS] = MASKED
        policies = self._rules.without(missing)
        entry = policies.action(claims.action or "")
        subject = _subject(record, claims, policies)
        known = None
        if record.judged_at is not None:
            known = preview(policies, "execute", replace(subject, now=record.judged_at))
        command = Admit(
            decision_id=record.decision_id,
            claims=claims,
            policies=policies,
            tenant_id=record.tenant_id,
            principal=record.principal,
            preview=known,
            scope_required_from=self._threshold(record, entry),
            shadow=record.details.get("route_mode") == "shadow",
        )
        scope = None
        if claims.scope_id is not None:
            scope = _kept_to(record, claims, granted, entry)
        state = self._executions.before(subject, {} if scope is None else {scope.scope_id: scope})
        found = judgment(command, state, record.now)
        return _verdict(
            found.refusal,
            [one.to_dict() for one in found.shadow],
            list(self._rules.left_out("execute", subject, missing)),
        )

    def _threshold(self, record: GateRecord, entry: ActionPolicy | None) -> RiskClass:
        """The lowest risk that needs a scope. It is above the recorded risk, which needed none."""
        risks, recorded = list(RiskClass), record.details.get("risk")
        risk = RiskClass(recorded) if recorded in risks else entry.risk if entry else RiskClass.LOW
        above = risks[min(risks.index(risk) + 1, len(risks) - 1)]
        return max(self._scope_required_from, above)

    def _granting(self, record: GateRecord) -> tuple[Verdict | None, str | None]:
        request, missing = record.grant_request()
        if "allowed_actions" in missing:
            return None, f"the allowed actions are {missing['allowed_actions']}"
        policies = self._rules.without(missing)
        command = Issue(
            decision_id=record.decision_id,
            scope=request.scope,
            ttl=request.ttl_seconds,
            policies=policies,
            defaulted=request.defaulted,
            principal=record.principal,
        )
        decided = issue(command, record.now)
        assert decided.entry is not None
        details = decided.entry.record.details
        refusal = decided.reply.refusal if isinstance(decided.reply, Denied) else None
        if refusal is not None and refusal.code == "invalid_scope" and "max_cost_micros" in missing:
            return None, f"its actions hold an amount, and max_cost_usd is {missing['max_cost_micros']}"
        lowered = {term: details[term] for term, was in request.recorded.items() if details[term] < was}
        claims, _ = record.claims()
        left_out = [
            one
            for action in request.scope.allowed_actions
            for one in self._rules.left_out(
                "issue", _subject(record, replace(claims, action=action), policies), missing
            )
        ]
        return _verdict(refusal, details.get("would_refuse", []), left_out, lowered)


@dataclass(slots=True)
class _Granted:
    """A scope as it was granted, its missing facts, and the number of its recorded attempts."""

    scope: Scope
    missing: Missing
    used: int = 0


def _subject(record: GateRecord, claims: Claims, policies: PolicySet) -> Subject:
    return subject_of(claims, record.tenant_id, record.principal, policies, record.now)


def _kept_to(
    record: GateRecord, claims: Claims, granted: _Granted | None, entry: ActionPolicy | None
) -> Scope:
    """A scope for the rules that satisfies all of its own bounds, because they are not judged again."""
    used = granted.used if granted else 0
    return Scope(
        scope_id=claims.scope_id or "",
        tenant_id=record.tenant_id,
        incident_id=claims.incident_id or "",
        allowed_actions=(claims.action or "",),
        max_cost=granted.scope.max_cost if granted else 0,
        max_attempts=max(used + 1, granted.scope.max_attempts if granted else 0),
        created_at=granted.scope.created_at if granted else record.now,
        expires_at=record.now + 1,
        intent=granted.scope.intent if granted else "",
        target_agents=(),
        created_by=granted.scope.created_by if granted else "",
        issuer_kind=granted.scope.issuer_kind if granted else "service",
        issuer_method=granted.scope.issuer_method if granted else "none",
        attempts_used=used,
        held=-(entry.hold if entry else 0),  # leaves room for the hold of any action
    )


def _verdict(
    refusal: Refusal | None,
    shadow: Sequence[Mapping[str, Any]],
    left_out: list[tuple[Rule, str]],
    lowered: Mapping[str, float] | None = None,
) -> tuple[Verdict | None, str | None]:
    """The verdict, or the reason why it is undecidable: a rule that was left out might have refused."""
    would_refuse = None if left_out else objecting(shadow)
    if refusal is not None:
        rules = tuple(refusal.members.get("rules", ()))
        return Verdict(error=refusal.code, rules=rules, would_refuse=would_refuse), None
    for rule, why in left_out:
        if not rule.shadow:
            return None, why
    return Verdict(would_refuse=would_refuse, lowered=lowered or {}), None


# Rules and executions -----------------------------------------------------------------------------------


class _Rules:
    """A policy set, and its subsets without the rules that read missing facts."""

    def __init__(self, policies: PolicySet) -> None:
        self._whole = policies
        self._looks_at = {rule.id: _looks_at(rule) for rule in policies.rules}
        self._facts = frozenset().union(*self._looks_at.values())
        self._parts: dict[frozenset[str], PolicySet] = {frozenset(): policies}

    def without(self, missing: Missing) -> PolicySet:
        """The set without the rules that read any of these facts."""
        facts = self._facts.intersection(missing)
        if facts not in self._parts:
            kept = tuple(rule for rule in self._whole.rules if self._looks_at[rule.id].isdisjoint(facts))
            self._parts[facts] = replace(self._whole, rules=kept)
        return self._parts[facts]

    def left_out(self, phase: Phase, subject: Subject, missing: Missing) -> Iterator[tuple[Rule, str]]:
        """The rules left out of the set that may match a subject, each with the reason."""
        for rule in self._whole.about(phase, subject.action) if missing else ():
            lacking = sorted(self._looks_at[rule.id] & missing.keys())
            match = replace(rule.match, target_agents=()) if "target_agents" in missing else rule.match
            if lacking and match.rest_matches(subject):
                yield rule, f"rule {rule.id} looks at {lacking[0]}: {missing[lacking[0]]}"


def _looks_at(rule: Rule) -> frozenset[str]:
    """The facts that a rule reads and that a record may lack.

    A record always shows whether target agents were named, so `require.target_agents` needs no fact.
    """
    facts = set(() if rule.when is None else rule.when.reads)
    if isinstance(rule.when, CelCondition) and rule.when.members is not None and "parameters" in facts:
        facts.remove("parameters")
        facts |= {ALL_PARAMETERS, *(f"parameters.{name}" for name in rule.when.members)}
    if rule.match.target_agents or (rule.brake is not None and "target_agents" in rule.brake.per):
        facts |= {"target_agents"} if rule.brake is None else {"target_agents", EARLIER_AGENTS}
    if rule.require is not None and rule.require.intent_min_chars:
        facts.add("intent")
    if rule.require is not None and (rule.require.executor_is_issuer or rule.require.executor_is_not_issuer):
        facts.add(ISSUER)
    if rule.limit is not None:
        limits = (rule.limit.max_attempts, rule.limit.ttl_seconds, rule.limit.max_cost)
        facts.update(term for term, most in zip(TERMS, limits, strict=True) if most is not None)
    return frozenset(facts)


class _Executions:
    """The executions that the new set admits, as far back as its brakes look, and all those in flight."""

    def __init__(self, policies: PolicySet) -> None:
        self._policies = policies
        horizons = [rule.brake.horizon_seconds for rule in policies.rules if rule.brake is not None]
        self._horizon = max(horizons, default=0) * SECOND
        self._kept: dict[str, Execution] = {}
        self._by_group: dict[AdmissionGroup, dict[str, None]] = {}
        self._ageing: deque[str] = deque()
        self._late: set[str] = set()  # executions in flight for longer than any brake looks back
        self._masked: set[str] = set()

    @property
    def agents_masked(self) -> bool:
        """Whether the target agents of any execution are masked."""
        return bool(self._masked)

    def add(self, execution: Execution) -> None:
        name, groups = execution.decision_id, self._groups(execution)
        if not groups:
            return
        self._kept[name] = execution
        self._ageing.append(name)
        for group in groups:
            self._by_group.setdefault(group, {})[name] = None
        if any(map(masked, execution.target_agents)):
            self._masked.add(name)

    def end(self, name: str | None, status: ExecutionStatus) -> None:
        if name is not None and name in self._kept:
            self._kept[name] = replace(self._kept[name], status=status)
            if name in self._late:
                self._drop(name)

    def before(self, subject: Subject, scopes: Mapping[str, Scope]) -> State:
        """The scopes, and the executions that brakes may count for a subject."""
        admissions = {group: tuple(self._by_group.get(group, ())) for group in self._groups(subject)}
        return State(scopes=scopes, executions=self._kept, admissions=admissions)

    def forget(self, now: int) -> None:
        """Drop the executions that no brake can count any more."""
        while self._ageing and self._kept[self._ageing[0]].admitted_at + self._horizon <= now:
            name = self._ageing.popleft()
            if self._kept[name].status == "in_flight":
                self._late.add(name)
            else:
                self._drop(name)

    def _groups(self, about: Subject | Execution) -> Collection[AdmissionGroup]:
        """The groups of the brakes that may apply, empty if there are none."""
        return groups_for(self._policies, about.tenant_id, about.incident_id, about.action)

    def _drop(self, name: str) -> None:
        for group in self._groups(self._kept.pop(name)):
            names = self._by_group[group]
            del names[name]
            if not names:
                del self._by_group[group]
        self._late.discard(name)
        self._masked.discard(name)
