"""What another policy set would have said: the recorded decisions, decided again in the order of the log.

Decided again are admissions, refusals by policies, and grants. What a scope's own bounds refuse does not depend
on policies and stays; so do the attempts that the log says were used, and how executions ended. Brakes are
counted anew: what the new set admits counts, what it refuses does not. What was refused then and would be
admitted now counts as answered at once, for nobody knows how it would have ended. Grants are decided by
themselves: what was executed under one that would be refused is still judged.

An execution that needed no scope is judged without one, and needs one now if the new set gives its action a
risk above the recorded one and not below `gate.scope_required_from`. What a shadow route let through without a
scope is never refused: there, as with shadow rules, what differs is what would be refused. Where a shadow route
found a valid scope, its record looks like any other, and is judged like any other.

A rule that looks at a fact which the record does not have leaves the verdict undecidable, unless something
else refuses anyway. For the brakes, what is undecidable went on as it is recorded.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from sidecar.core import deciding
from sidecar.core.brakes import Tally, tallies_for, tallies_with
from sidecar.core.command import Admit, Denied, Issue
from sidecar.core.deciding import SHADOW_ROUTE, Past
from sidecar.core.facts import Claims
from sidecar.core.policy import SCOPE_FACTS, ActionPolicy, Phase, PolicySet, RiskClass, Rule, Subject
from sidecar.core.rules import SECOND, TERMS, Objection, preview, subject_of
from sidecar.core.scope import RELEASING, Execution, ExecutionStatus, Scope
from sidecar.errors import LogTampered
from sidecar.gaterecords import MASKED, GateRecord, Missing, Verdict, masked, objecting
from sidecar.store.logfile import START, opened

Kind = Literal["unchanged", "refused", "allowed", "otherwise", "lowered", "shadow", "undecidable"]

# Not a fact of a request, but brakes look at it.
EARLIER_AGENTS = "the target agents of earlier executions"
FLOOD = "the summary of a flood says only how many there were"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One record that was decided again. `now` None: that cannot be done, and `why` says what is missing.

    The summary of a flood stands for `count` requests.
    """

    record: GateRecord
    recorded: Verdict
    now: Verdict | None
    why: str | None = None

    @property
    def count(self) -> int:
        return self.record.count

    @property
    def what(self) -> str:
        return "grant" if self.record.of_grant else "execute"

    @property
    def action(self) -> str | None:
        """Of a grant, all of its actions."""
        allowed = self.record.details.get("allowed_actions")
        return ",".join(map(str, allowed)) if isinstance(allowed, list) else self.record.action

    @property
    def kind(self) -> Kind:
        was, now = self.recorded, self.now
        if now is None:
            return "undecidable"
        if (was.error is None) != (now.error is None):
            return "refused" if was.error is None else "allowed"
        if now.error is not None:
            same = (was.error == now.error or masked(was.error)) and set(was.rules) == set(now.rules)
            return "unchanged" if same else "otherwise"
        if now.lowered:
            return "lowered"
        told = was.would_refuse is not None and now.would_refuse is not None
        return "shadow" if told and was.would_refuse != now.would_refuse else "unchanged"

    def to_dict(self) -> dict[str, Any]:
        record = self.record
        return {
            "decision_id": record.decision_id,
            "decided_at": record.decided_at,
            "what": self.what,
            "action": self.action,
            "incident_id": record.incident_id,
            "count": self.count,
            "change": self.kind,
            "recorded": self.recorded.to_dict(),
            "now": None if self.now is None else self.now.to_dict(),
            "why": self.why,
        }


def replayed(path: Path, replay: Replay, progress: Callable[[int, int], None]) -> Iterator[Finding]:
    """What comes of each record of a log that is decided again; `progress` is told (done, in all).

    Raises StoreUnavailable where the log cannot be read, LogTampered where it is damaged. Whether it is true is
    for verify to say.
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
    """Decides the records of a log again, in their order. Those before `since` only say what was under way."""

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
        """The next record; what comes of it, if it is decided again."""
        self._lapse(record.now)
        if record.event in ("settled", "reconciled"):
            self._end(record)
        elif record.event == "revoked":
            self._scopes.pop(record.scope_id or "", None)
        elif record.event == "issued":
            self._grant(record)
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

    # What is under way ---------------------------------------------------------------------------------

    def _grant(self, record: GateRecord) -> None:
        asked, missing = record.asked()
        if asked is None or record.scope_id is None:
            return
        # These were asked for otherwise, perhaps, but this is what was granted.
        for fact, term in (("attempts_remaining", "max_attempts"), ("max_cost_micros", "max_cost_usd")):
            if term in asked.recorded:
                missing.pop(fact, None)
        ttl = asked.recorded.get("ttl_seconds")
        if ttl is not None:
            heapq.heappush(self._lapsing, (record.now + int(ttl) * SECOND, record.scope_id))
        known = {fact: why for fact, why in missing.items() if fact in SCOPE_FACTS}
        self._scopes[record.scope_id] = _Granted(asked.scope, known)

    def _lapse(self, now: int) -> None:
        """Forget scopes under which nothing can be admitted any more."""
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
        """Count an execution that goes on, for the brakes by the new set, for its scope by the log."""
        admitted = record.event == "admitted"
        granted = self._scopes.get(record.scope_id or "")
        if granted is not None:
            granted.used += admitted
        went_on = admitted
        if finding is not None and finding.now is not None:
            went_on = finding.now.error is None
        if went_on:
            claims, _ = record.claims()
            self._executions.add(_executed(record, claims, "in_flight" if admitted else "answered"))

    # Deciding again ------------------------------------------------------------------------------------

    def _execution(self, record: GateRecord) -> tuple[Verdict | None, str | None]:
        claims, missing = record.claims()
        granted = self._scopes.get(claims.scope_id or "")
        if granted is not None:
            missing |= granted.missing
        elif claims.scope_id is not None:
            missing |= dict.fromkeys(SCOPE_FACTS, "unknown, for the log does not have the grant of the scope")
        if self._executions.agents_masked and claims.target_agents and "target_agents" not in missing:
            missing[EARLIER_AGENTS] = MASKED
        policies = self._rules.without(missing)
        entry = policies.action(claims.action or "")
        subject = subject_of(claims, record.tenant_id, record.principal, policies, record.now)
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
            shadow=record.details.get("scope_waived") == SHADOW_ROUTE,
        )
        scope = None
        if claims.scope_id is not None:
            scope = _kept_to(record, claims, granted, entry)
        found = deciding.judgment(command, scope, self._executions.before(subject), record.now)
        left_out = list(self._rules.left_out("execute", subject, missing))
        if found.refusal is not None:
            return _verdict(found.refusal.code, found.refusal.members, found.shadow, left_out)
        return _verdict(None, {}, found.shadow, left_out)

    def _threshold(self, record: GateRecord, entry: ActionPolicy | None) -> RiskClass:
        """From which risk on a scope is needed. What needed none then needs none now for the same risk."""
        risks, told = list(RiskClass), record.details.get("risk")
        risk = RiskClass(told) if told in risks else entry.risk if entry else RiskClass.LOW
        above = risks[min(risks.index(risk) + 1, len(risks) - 1)]
        return max(self._scope_required_from, above)

    def _granting(self, record: GateRecord) -> tuple[Verdict | None, str | None]:
        asked, missing = record.asked()
        if asked is None:
            return None, f"the allowed actions are {missing['allowed_actions']}"
        policies = self._rules.without(missing)
        command = Issue(
            decision_id=record.decision_id,
            scope=asked.scope,
            ttl=asked.ttl_seconds,
            policies=policies,
            defaulted=asked.defaulted,
            principal=record.principal,
        )
        decided = deciding.issue(command, record.now)
        assert decided.entry is not None
        details = decided.entry.record.details
        claims = Claims(incident_id=record.incident_id, target_agents=asked.scope.target_agents)
        left_out = [
            one
            for action in asked.scope.allowed_actions
            for one in self._rules.left_out(
                "issue",
                subject_of(
                    replace(claims, action=action), record.tenant_id, record.principal, policies, record.now
                ),
                missing,
            )
        ]
