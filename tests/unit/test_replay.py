"""What was decided under one policy set, decided again under another: from real logs, in their order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.core.apply import apply
from sidecar.core.brakes import AdmissionGroup, groups_containing
from sidecar.core.command import (
    Admit,
    Admitted,
    Command,
    Denied,
    Emit,
    Issue,
    Issued,
    Reconcile,
    Refuse,
    Reply,
    Report,
    Revoke,
    Settle,
)
from sidecar.core.facts import Claims
from sidecar.core.masking import Mask, pointer
from sidecar.core.policy import (
    ActionPolicy,
    Brake,
    Limit,
    Match,
    PolicySet,
    Require,
    RiskClass,
    Rule,
    Subject,
)
from sidecar.core.principal import Principal
from sidecar.core.record import DecisionOutcome, DecisionType, Record
from sidecar.core.rules import preview, subject_of
from sidecar.core.scope import Execution, Scope
from sidecar.core.state import State
from sidecar.errors import ConditionFailed, Refusal
from sidecar.ids import new_decision_id, new_scope_id
from sidecar.policies._conditions import condition
from sidecar.policies.gaterecords import Finding, GateRecord
from sidecar.policies.replay import FLOOD, Replay
from sidecar.store.base import StoredDecision
from sidecar.store.batch import Store
from sidecar.store.sqlite import SqliteEngine

SECOND = 1_000_000
BEGIN = 1_767_225_600 * SECOND  # 2026-01-01T00:00:00Z
ACTIONS = {
    "restart_pod": ActionPolicy(risk=RiskClass.MEDIUM, hold=100_000),
    "restart_node": ActionPolicy(risk=RiskClass.HIGH),
    "retry": ActionPolicy(risk=RiskClass.LOW),
}
OPEN = PolicySet(revision="open", actions=ACTIONS)


def policies(*rules: Rule, **actions: ActionPolicy) -> PolicySet:
    return PolicySet(revision="new", actions={**ACTIONS, **actions}, rules=rules)


@dataclass(frozen=True)
class When:
    """A condition as a Python function."""

    reads: frozenset[str]
    judge: Callable[[Subject], bool]
    text: str = "a condition of a test"

    def __call__(self, subject: Subject) -> bool:
        return self.judge(subject)


def when(judge: Callable[[Subject], bool], *reads: str) -> When:
    return When(frozenset(reads), judge)


@dataclass
class Log:
    """A real store in memory, its clock set by hand, and what it wrote."""

    policies: PolicySet = OPEN
    mask: Sequence[str] = ()
    now: int = BEGIN
    commands: list[tuple[int, Command]] = field(default_factory=list)

    def _later(self, command: Command) -> None:
        self.commands.append((self.now, command))

    def wait(self, seconds: float) -> None:
        self.now += int(seconds * SECOND)

    def issue(
        self, *actions: str, defaulted: Sequence[str] = (), principal: str = "anonymous", **terms: Any
    ) -> str:
        """The id of a scope for ten attempts of all actions."""
        scope = Scope(
            scope_id=new_scope_id(),
            tenant_id="default",
            incident_id="inc_1",
            allowed_actions=actions or tuple(ACTIONS),
            max_cost=10_000_000,
            max_attempts=10,
            created_at=0,
            expires_at=0,
            intent="a test of what was decided",
            target_agents=(),
            created_by="tests",
        )
        ttl = terms.pop("ttl", 86_400)
        self._later(
            Issue(
                decision_id=new_decision_id(),
                scope=replace(scope, **terms),
                ttl=ttl,
                policies=self.policies,
                defaulted=frozenset(defaulted),
                principal=Principal(id=principal),
            )
        )
        return scope.scope_id

    def execute(
        self,
        scope_id: str | None,
        action: str = "restart_pod",
        *,
        settled: str | None = "answered",
        principal: str = "anonymous",
        judged_at: int | None = None,
        scope_required_from: RiskClass = RiskClass.LOW,
        shadow: bool = False,
        reported: bool = False,
        **claimed: Any,
    ) -> str:
        """The id of the decision."""
        claims = Claims(**{"scope_id": scope_id, "incident_id": "inc_1", "action": action, **claimed})
        known = None
        if judged_at is not None:
            subject = subject_of(claims, "default", Principal(id=principal), self.policies, judged_at)
            known = preview(self.policies, "execute", subject)
        decision_id = new_decision_id()
        self._later(
            Admit(
                decision_id=decision_id,
                claims=claims,
                policies=self.policies,
                principal=Principal(id=principal),
                preview=known,
                scope_required_from=scope_required_from,
                shadow=shadow,
                report_token=bytes(32) if reported else None,
                report_seconds=3_600 if reported else None,
            )
        )
        if settled is not None:
            self.settle(decision_id, settled)
        return decision_id

    def settle(self, admission_id: str, outcome: Any) -> None:
        kind: Any = Reconcile if outcome in ("executed", "not_executed") else Settle
        self._later(kind(decision_id=new_decision_id(), admission_id=admission_id, outcome=outcome))

    def report(self, admission_id: str, outcome: Any) -> None:
        self._later(
            Report(
                decision_id=new_decision_id(),
                admission_id=admission_id,
                token_sha256=bytes(32),
                outcome=outcome,
            )
        )

    def also(self, command: Command) -> None:
        self._later(command)

    def written(self) -> tuple[list[bytes], list[Reply]]:
        return asyncio.run(self._written())

    async def _written(self) -> tuple[list[bytes], list[Reply]]:
        mask = Mask(pointers=tuple(map(pointer, self.mask))) if self.mask else None
        times = [BEGIN]
        store = Store(SqliteEngine(None), clock=lambda: times[-1], deadline_seconds=10, mask=mask)
        await store.open()
        try:
            replies = []
            for now, command in self.commands:
                times.append(now)
                replies.append(await store.submit(command))
            rows: list[StoredDecision] = []
            page = await store.engine.decisions({}, before=None, limit=500)
            rows += page.rows
            while page.next is not None:
                page = await store.engine.decisions({}, before=page.next, limit=500)
                rows += page.rows
            return [row.envelope for row in reversed(rows)], replies
        finally:
            await store.close()

    def under(self, new: PolicySet, **options: Any) -> dict[str, Finding]:
        """What comes of each record that is decided again, by its decision."""
        return findings(self.written()[0], Replay(new, **options))


def findings(envelopes: Sequence[bytes], replay: Replay) -> dict[str, Finding]:
    found = {}
    for envelope in envelopes:
        record = GateRecord.of(envelope)
        finding = None if record is None else replay.read(record)
        if finding is not None:
            found[finding.record.decision_id] = finding
    return found


def kinds(found: Mapping[str, Finding]) -> list[str]:
    return [finding.kind for finding in found.values() if finding.what == "execute"]


def grants(found: Mapping[str, Finding]) -> list[Finding]:
    return [finding for finding in found.values() if finding.what == "grant"]


def one(found: Mapping[str, Finding]) -> Finding:
    """The only execution among them."""
    (finding,) = (finding for finding in found.values() if finding.what == "execute")
    return finding


DENY_PODS = Rule(id="no-pods", on="execute", match=Match(action=("restart_pod",)), deny=True)


# Executions ---------------------------------------------------------------------------------------------


def test_the_same_set_changes_nothing() -> None:
    braked = policies(
        DENY_PODS, Rule(id="brake", on="execute", brake=Brake(max_attempts=1, window_seconds=60))
    )
    log = Log(braked)
    scope = log.issue()
    for action in ("restart_pod", "retry", "restart_node", "retry"):
        log.execute(scope, action)
        log.wait(1)
    found = log.under(braked)
    assert kinds(found) == ["unchanged"] * 4
    assert [str(finding.now) for finding in found.values() if finding.what == "execute"] == [
        "policy_denied (no-pods)",
        "allowed",
        "braked (brake)",
        "braked (brake)",
    ]


def test_what_a_new_rule_denies_would_be_refused_and_nothing_else() -> None:
    log = Log()
    scope = log.issue()
    pod, _ = log.execute(scope), log.execute(scope, "retry")
    found = log.under(policies(DENY_PODS))
    assert kinds(found) == ["refused", "unchanged"]
    assert found[pod].to_dict() == {
        "decision_id": pod,
        "decided_at": "2026-01-01T00:00:00.000000+00:00",
        "what": "execute",
        "action": "restart_pod",
        "incident_id": "inc_1",
        "count": 1,
        "change": "refused",
        "recorded": {"verdict": "allowed", "error": None, "rules": (), "would_refuse": (), "lowered": {}},
        "now": {
            "verdict": "refused",
            "error": "policy_denied",
            "rules": ("no-pods",),
            "would_refuse": (),
            "lowered": {},
        },
        "why": None,
    }


def test_what_only_an_old_rule_denied_would_be_allowed() -> None:
    log = Log(policies(DENY_PODS))
    log.execute(log.issue())
    finding = one(log.under(OPEN))
    assert (finding.kind, str(finding.recorded)) == ("allowed", "policy_denied (no-pods)")


def test_another_rule_or_another_error_is_another_reason() -> None:
    log = Log(policies(DENY_PODS))
    log.execute(log.issue())
    assert one(log.under(policies(replace(DENY_PODS, id="other")))).kind == "otherwise"
    unlisted = PolicySet(revision="new", actions={"retry": ACTIONS["retry"]})
    finding = one(log.under(unlisted))
    assert (finding.kind, str(finding.now)) == ("otherwise", "policy_denied")


def test_an_action_that_is_no_longer_listed_or_now_needs_targets_would_be_refused() -> None:
    log = Log()
    scope = log.issue()
    log.execute(scope, "retry")
    log.execute(scope, "retry", target_agents=("a",))
    unlisted = PolicySet(revision="new", actions={"restart_pod": ACTIONS["restart_pod"]})
    assert kinds(log.under(unlisted)) == ["refused", "refused"]
    targeted = policies(retry=ActionPolicy(risk=RiskClass.LOW, targets_required=True))
    assert kinds(log.under(targeted)) == ["refused", "unchanged"]


def test_what_a_bound_of_the_scope_refused_is_not_decided_again_and_a_larger_hold_refuses_nothing() -> None:
    log = Log()
    scope = log.issue(max_attempts=1)
    log.execute(scope)
    log.execute(scope)
    log.execute("scope_unknown")
    dearer = policies(restart_pod=ActionPolicy(risk=RiskClass.MEDIUM, hold=10**9))
    assert kinds(log.under(dearer)) == ["unchanged"]


def test_conditions_see_the_attempts_that_the_log_says_were_used() -> None:
    log = Log()
    scope = log.issue()
    log.execute(scope)
    log.execute(scope, settled="not_sent")
    log.execute(scope)
    unknown = log.execute(scope, settled="unknown")
    log.settle(unknown, "not_executed")
    log.execute(scope)
    seen: list[tuple[int, int]] = []

    def look(subject: Subject) -> bool:
        seen.append((subject.attempts_used, subject.attempts_remaining))
        return False

    facts = ("attempts_used", "attempts_remaining")
    assert (
        kinds(log.under(policies(Rule(id="r", on="execute", when=when(look, *facts), deny=True))))
        == ["unchanged"] * 5
    )
    assert seen == [(0, 10), (1, 9), (1, 9), (2, 8), (2, 8)]


def test_conditions_see_the_scope_the_request_and_the_time() -> None:
    log = Log()
    scope = log.issue(intent="why not", max_cost=250_000)
    log.wait(7)
    log.execute(scope, "retry", target_agents=("a", "b"), parameters={"x": [1]}, principal="ann")
    seen: list[Subject] = []

    def look(subject: Subject) -> bool:
        seen.append(subject)
        return False

    log.under(policies(Rule(id="r", on="execute", when=when(look, "intent"), deny=True)))
    assert seen == [
        Subject(
            action="retry",
            risk=RiskClass.LOW,
            incident_id="inc_1",
            tenant_id="default",
            principal="ann",
            target_agents=("a", "b"),
            parameters={"x": [1]},
            intent="why not",
            max_cost=250_000,
            attempts_used=0,
            attempts_remaining=10,
            scope_age_seconds=7,
            now=BEGIN + 7 * SECOND,
        )
    ]


def test_conditions_are_judged_when_they_were_and_brakes_when_it_was_written_down() -> None:
    freeze = Rule(
        id="freeze",
        on="execute",
        when=when(lambda subject: subject.now < BEGIN + 10 * SECOND, "now"),
        deny=True,
    )
    log = Log(policies(replace(freeze, shadow=True)))
    scope = log.issue()
    log.wait(10)
    log.execute(scope, judged_at=BEGIN + 9 * SECOND)
    log.execute(scope)
    assert kinds(log.under(policies(freeze))) == ["refused", "unchanged"]


def test_a_condition_that_fails_refuses_here_as_well() -> None:
    def fail(subject: Subject) -> bool:
        raise ConditionFailed("no such key")

    log = Log()
    log.execute(log.issue())
    finding = one(log.under(policies(Rule(id="r", on="execute", when=when(fail, "parameters"), deny=True))))
    assert str(finding.now) == "policy_denied (r)"


# Brakes -------------------------------------------------------------------------------------------------


def braking(**brake: Any) -> PolicySet:
    return policies(Rule(id="brake", on="execute", brake=Brake(**brake)))


def test_a_stricter_brake_lists_exactly_what_it_would_have_refused_for_refusals_do_not_count() -> None:
    log = Log()
    scope = log.issue()
    for _ in range(8):
        log.execute(scope)
        log.wait(10)
    # At 0 and 10; 20 is one too many; at 30 the first has left the window; and so on.
    assert kinds(log.under(braking(max_attempts=2, window_seconds=30))) == [
        "unchanged",
        "unchanged",
        "refused",
        "unchanged",
        "unchanged",
        "refused",
        "unchanged",
        "unchanged",
    ]


def test_what_would_be_admitted_now_counts_as_answered_at_once() -> None:
    log = Log(policies(DENY_PODS))
    scope = log.issue()
    log.execute(scope, "restart_pod")
    log.execute(scope, "retry")
    assert kinds(log.under(braking(one_in_flight=True, window_seconds=60))) == ["allowed", "unchanged"]
    assert kinds(log.under(braking(max_attempts=1, window_seconds=60))) == ["allowed", "refused"]


def test_brakes_see_how_executions_ended_and_when() -> None:
    log = Log()
    scope = log.issue()
    log.execute(scope, settled="not_sent")
    unknown = log.execute(scope, settled="unknown")
    log.execute(scope)
    log.settle(unknown, "not_executed")
    flying = log.execute(scope, settled=None)
    log.wait(3_600)
    log.execute(scope)
    log.settle(flying, "answered")
    log.execute(scope)
    one_at_a_time = braking(one_in_flight=True, window_seconds=60)
    assert kinds(log.under(one_at_a_time)) == [
        "unchanged",
        "unchanged",
        "refused",
        "unchanged",
        "refused",
        "unchanged",
    ]
    # Of those, not_sent does not count, and not_executed does.
    assert kinds(log.under(braking(max_attempts=1, window_seconds=60)))[:3] == [
        "unchanged",
        "unchanged",
        "refused",
    ]


def test_an_execution_that_is_reported_is_under_way_until_then() -> None:
    log = Log()
    scope = log.issue()
    running = log.execute(scope, settled=None, reported=True)
    log.settle(running, "running")
    log.wait(3_000)
    log.execute(scope)
    log.report(running, "failed")
    lost = log.execute(scope, reported=True, settled="unknown")
    log.report(lost, "not_executed")
    log.execute(scope)
    found = kinds(log.under(braking(one_in_flight=True, window_seconds=60)))
    assert found == ["unchanged", "refused", "unchanged", "unchanged"]


def test_an_execution_that_ended_late_is_forgotten_then() -> None:
    log = Log()
    scope = log.issue()
    flying = log.execute(scope, settled=None)
    log.wait(3_600)
    log.execute(scope, "retry")
    log.settle(flying, "unknown")
    log.execute(scope, "retry")
    replay = Replay(braking(one_in_flight=True, window_seconds=60))
    assert kinds(findings(log.written()[0], replay)) == ["unchanged", "refused", "unchanged"]
    assert flying not in replay._executions._kept
    assert not replay._executions._late


def test_what_was_executed_before_counts_though_it_is_not_decided_again() -> None:
    log = Log()
    scope = log.issue()
    log.execute(scope)
    log.wait(10)
    log.execute(scope)
    found = log.under(braking(max_attempts=1, window_seconds=60), since=log.now)
    assert kinds(found) == ["refused"]
    assert grants(found) == []


def test_only_what_a_brake_may_look_at_and_live_scopes_are_kept_in_memory() -> None:
    log = Log()
    for number in range(150):
        incident = f"inc_{number}"
        log.execute(log.issue(incident_id=incident, ttl=30), "retry", incident_id=incident)
        log.wait(1)
    envelopes, _ = log.written()
    per_incident = braking(per=("incident_id",), cooldown_seconds=20)
    for new, most in ((per_incident, 20), (OPEN, 0)):
        replay = Replay(new)
        assert len(kinds(findings(envelopes, replay))) == 150
        assert len(replay._executions._kept) == len(replay._executions._ageing) <= most
        assert len(replay._executions._by_group) <= most
        assert len(replay._scopes) == len(replay._lapsing) == 30


# What is missing ----------------------------------------------------------------------------------------

READS_PARAMETERS = Rule(
    id="careful",
    on="execute",
    match=Match(incident_id=("inc_*",)),
    when=when(lambda subject: subject.parameters.get("force") is True, "parameters"),
    deny=True,
)


def test_a_masked_fact_leaves_undecided_only_what_looks_at_it() -> None:
    log = Log(mask=["/decision_inputs/parameters/force"])
    scope = log.issue()
    log.execute(scope, parameters={"force": False})
    log.execute(scope, parameters={"other": 1})
    assert kinds(log.under(policies())) == ["unchanged", "unchanged"]
    found = log.under(policies(READS_PARAMETERS))
    assert kinds(found) == ["undecidable", "unchanged"]
    assert next(iter(finding.why for finding in found.values() if finding.why)) == (
        "rule careful looks at parameters: masked"
    )
    elsewhere = replace(READS_PARAMETERS, match=Match(incident_id=("inc_2",)))
    assert kinds(log.under(policies(elsewhere))) == ["unchanged", "unchanged"]
    assert kinds(log.under(policies(replace(READS_PARAMETERS, shadow=True)))) == ["unchanged", "unchanged"]


def test_what_another_rule_refuses_anyway_is_refused() -> None:
    log = Log(mask=["/decision_inputs/parameters"])
    log.execute(log.issue(), parameters={"force": True})
    finding = one(log.under(policies(READS_PARAMETERS, DENY_PODS)))
    assert (finding.kind, str(finding.now)) == ("refused", "policy_denied (no-pods)")
    # That the rule with the masked fact refused as well then is no other reason.
    log = Log(policies(READS_PARAMETERS, DENY_PODS), mask=["/decision_inputs/parameters"])
    log.execute(log.issue(), parameters={"force": True})
    assert one(log.under(policies(READS_PARAMETERS, DENY_PODS))).kind == "unchanged"


def test_parameters_that_were_too_large_for_the_record_are_missing() -> None:
    log = Log()
    log.execute(log.issue(), parameters={"force": True}, body_bytes=10**6)
    finding = one(log.under(policies(READS_PARAMETERS)))
    assert finding.why == "rule careful looks at parameters: left out of the record, for the body was large"


def careful(text: str) -> Rule:
    return replace(READS_PARAMETERS, when=condition(text))


def test_masked_parameters_leave_undecided_only_the_conditions_that_read_them() -> None:
    log = Log(mask=["/decision_inputs/parameters/customer"])
    scope = log.issue()
    log.execute(scope, parameters={"customer": {"name": "Ann"}, "n": 7})
    log.execute(scope, parameters={"customer": "Bob", "n": 1})
    log.execute(scope, parameters={"n": 8})
    number = "parameters.n > 5"
    assert kinds(log.under(policies(careful(number)))) == ["refused", "unchanged", "refused"]
    for text, fact in (
        ("has(parameters.customer)", "parameters.customer"),
        ("parameters.n > 5 && parameters.customer != ''", "parameters.customer"),
        ("size(parameters) > 1", "parameters"),
    ):
        found = [one for one in log.under(policies(careful(text))).values() if one.what == "execute"]
        assert [one.why for one in found[:2]] == [f"rule careful looks at {fact}: masked"] * 2
        assert found[2].now is not None


def test_values_that_only_look_masked_take_no_room_however_they_are_named() -> None:
    log = Log()
    scope = log.issue(max_attempts=30)
    for index in range(30):
        log.execute(scope, parameters={f"name{index}": "[masked]", "n": 7})
    replay = Replay(policies(careful("parameters.n > 5")))
    assert kinds(findings(log.written()[0], replay)) == ["refused"] * 30
    assert len(replay._rules._parts) == 1


def test_a_mask_below_a_member_hides_that_member_and_one_over_all_hides_each() -> None:
    below = Log(mask=["/decision_inputs/parameters/order/customer"])
    whole = Log(mask=["/decision_inputs/parameters"])
    large = Log()
    for log in (below, whole):
        log.execute(log.issue(), parameters={"order": {"customer": "Ann", "items": 3}, "n": 7})
    large.execute(large.issue(), parameters={"n": 7}, body_bytes=10**6)
    number, order = policies(careful("parameters.n > 5")), policies(careful("parameters.order.items > 2"))
    assert one(below.under(number)).kind == "refused"
    assert one(below.under(order)).why == "rule careful looks at parameters.order: masked"
    assert one(whole.under(number)).why == "rule careful looks at the parameters: masked"
    assert one(large.under(number)).why == (
        "rule careful looks at the parameters: left out of the record, for the body was large"
    )


def test_masked_target_agents_are_named_all_the_same() -> None:
    log = Log(mask=["/decision_inputs/target_agents"])
    scope = log.issue()
    log.execute(scope, target_agents=("db-1",))
    log.execute(scope)
    targeted = policies(restart_pod=replace(ACTIONS["restart_pod"], targets_required=True))
    assert kinds(log.under(targeted)) == ["unchanged", "refused"]
    required = policies(Rule(id="r", on="execute", require=Require(target_agents=True)))
    assert kinds(log.under(required)) == ["unchanged", "refused"]
    matched = policies(Rule(id="r", on="execute", match=Match(target_agents=("db-*",)), deny=True))
    assert kinds(log.under(matched)) == ["undecidable", "unchanged"]
    per_agent = braking(per=("target_agents",), max_attempts=1, window_seconds=60)
    assert kinds(log.under(per_agent)) == ["undecidable", "unchanged"]


def test_brakes_that_count_by_agents_cannot_be_judged_after_executions_whose_agents_are_masked() -> None:
    masked, clear = Log(mask=["/decision_inputs/target_agents"]), Log()
    masked.execute(masked.issue(), target_agents=("a",))
    scope = clear.issue()
    clear.execute(scope, target_agents=("a",))
    clear.execute(scope)
    clear.wait(60)
    clear.execute(scope, target_agents=("a",))
    per_agent = braking(per=("target_agents",), max_attempts=1, window_seconds=60)
    found = findings([*masked.written()[0], *clear.written()[0]], Replay(per_agent))
    assert kinds(found) == ["undecidable", "undecidable", "unchanged", "unchanged"]
    assert [finding.why for finding in found.values() if finding.why][1] == (
        "rule brake looks at the target agents of earlier executions: masked"
    )


def test_a_scope_whose_grant_is_not_in_the_log_leaves_undecided_what_looks_at_the_scope() -> None:
    log = Log()
    log.execute(log.issue())
    envelopes = log.written()[0][1:]
    reads_scope = Rule(id="r", on="execute", when=when(lambda _: True, "scope_age_seconds"), deny=True)
    finding = one(findings(envelopes, Replay(policies(reads_scope))))
    assert finding.why == (
        "rule r looks at scope_age_seconds: unknown, for the log does not have the grant of the scope"
    )
    wordy = Rule(id="w", on="execute", require=Require(intent_min_chars=3))
    assert one(findings(envelopes, Replay(policies(wordy)))).kind == "undecidable"
    assert one(findings(envelopes, Replay(policies(DENY_PODS)))).kind == "refused"
    assert one(findings(envelopes, Replay(OPEN))).kind == "unchanged"


def test_masked_terms_of_a_grant_are_missing_when_it_is_used() -> None:
    log = Log(mask=["/details/intent", "/details/max_cost_usd", "/details/max_attempts"])
    log.execute(log.issue())
    for fact in ("intent", "max_cost_micros", "attempts_remaining"):
        rule = Rule(id="r", on="execute", when=when(lambda _: True, fact), deny=True)
        assert one(log.under(policies(rule))).why == f"rule r looks at {fact}: masked"
    rule = Rule(id="r", on="execute", when=when(lambda s: s.attempts_used == 0, "attempts_used"), deny=True)
    assert one(log.under(policies(rule))).kind == "refused"


def test_how_an_execution_ended_may_be_masked() -> None:
    log = Log(mask=["/details/outcome"])
    scope = log.issue()
    log.execute(scope, settled="not_sent")
    log.execute(scope)
    counts = Rule(id="r", on="execute", when=when(lambda s: s.attempts_used > 5, "attempts_used"), deny=True)
    assert kinds(log.under(policies(counts))) == ["unchanged", "undecidable"]


def test_the_summary_of_a_flood_is_undecidable_and_stands_for_as_many() -> None:
    log = Log()
    denied = Refusal("policy_denied", "40 refusals", {"rules": ["x"]})
    for gatekept in ("scoped_execution", "scope_grant"):
        log.also(
            Refuse(
                decision_id=new_decision_id(),
                refusal=denied,
                gatekept=gatekept,
                count=40,
                summary={"subjects": ["inc_1"]},
            )
        )
    found = log.under(OPEN)
    assert [(finding.why, finding.count) for finding in found.values()] == [(FLOOD, 40), (FLOOD, 40)]
    assert [finding.what for finding in found.values()] == ["execute", "grant"]


def test_masked_reasons_and_shadow_words_are_not_held_against_a_verdict() -> None:
    log = Log(policies(DENY_PODS), mask=["/decision_reason", "/details/would_refuse", "/details/judged_at"])
    log.execute(log.issue(), judged_at=BEGIN)
    assert one(log.under(policies(DENY_PODS))).kind == "unchanged"


def test_undecided_executions_count_for_brakes_as_they_were_recorded() -> None:
    log = Log(mask=["/decision_inputs/parameters"])
    scope = log.issue()
    log.execute(scope, "retry", parameters={"force": True})
    log.execute(scope, "restart_pod")
    careful = replace(READS_PARAMETERS, match=Match(action=("retry",)))
    brake = Rule(id="brake", on="execute", brake=Brake(max_attempts=1, window_seconds=60))
    assert kinds(log.under(policies(careful, brake))) == ["undecidable", "refused"]


def test_what_only_looks_like_a_record_of_the_gate_is_not_decided_again() -> None:
    log = Log()
    log.also(
        Emit(
            record=Record(
                decision_id=new_decision_id(),
                decision_type=DecisionType.POLICY,
                decision_outcome=DecisionOutcome.POLICY_BLOCKED,
                decided_at=BEGIN,
                decision_inputs={"policy_id": "scoped_execution", "principal": "mallory"},
                details={"hold_usd": 0, "rules": []},
            ),
            origin="api",
        )
    )
    log.also(Revoke(decision_id=new_decision_id(), scope_id="scope_unknown", record_denial=True))
    assert log.under(OPEN) == {}
    assert len(log.written()[0]) == 2


# Without a scope, and in shadow -------------------------------------------------------------------------


def test_what_needed_no_scope_needs_one_only_where_the_risk_rose_to_the_threshold() -> None:
    log = Log()
    log.execute(None, "retry", scope_required_from=RiskClass.HIGH)
    needed = {"scope_required_from": RiskClass.HIGH}
    assert one(log.under(OPEN, **needed)).kind == "unchanged"
    # The threshold that is configured by now says nothing about the policies.
    assert one(log.under(OPEN)).kind == "unchanged"
    medium = policies(retry=ActionPolicy(risk=RiskClass.MEDIUM))
    assert one(log.under(medium, **needed)).kind == "unchanged"
    high = policies(retry=ActionPolicy(risk=RiskClass.HIGH))
    assert str(one(log.under(high, **needed)).now) == "scoped_execution_required"
    denied = policies(Rule(id="r", on="execute", deny=True))
    assert str(one(log.under(denied, **needed)).now) == "policy_denied (r)"


def test_what_was_refused_without_a_scope_may_be_allowed_without_one() -> None:
    log = Log(policies(Rule(id="r", on="execute", deny=True)))
    log.execute(None, "retry", scope_required_from=RiskClass.HIGH)
    assert one(log.under(OPEN)).kind == "allowed"


def test_rules_in_shadow_are_told_apart_from_those_that_refuse() -> None:
    shadow = replace(DENY_PODS, shadow=True)
    log = Log(policies(shadow))
    log.execute(log.issue())
    assert one(log.under(policies(shadow))).kind == "unchanged"
    assert one(log.under(policies(DENY_PODS))).kind == "refused"
    gone = one(log.under(OPEN))
    assert (gone.kind, str(gone.recorded), str(gone.now)) == (
        "shadow",
        "allowed, in shadow: no-pods",
        "allowed",
    )


def test_a_shadow_route_refuses_nothing_under_any_set() -> None:
    log = Log()
    log.execute(None, shadow=True)
    log.execute(None, "unheard_of", shadow=True)
    log.execute(log.issue(), shadow=True)
    log.also(
        Refuse(
            decision_id=new_decision_id(),
            refusal=Refusal("invalid_request", "It is no JSON."),
            shadow=True,
        )
    )
    assert [kind for kind in kinds(log.under(OPEN)) if kind != "unchanged"] == []
    found = [finding for finding in log.under(policies(DENY_PODS)).values() if not finding.record.of_grant]
    assert [(finding.kind, str(finding.now)) for finding in found] == [
        ("shadow", "allowed, in shadow: no-pods"),
        ("unchanged", "allowed, in shadow: policy_denied"),
        ("shadow", "allowed, in shadow: no-pods"),
    ]


# Grants -------------------------------------------------------------------------------------------------


def grant_rule(**members: Any) -> PolicySet:
    return policies(Rule(id="terms", on="issue", **members))


def test_a_grant_above_a_limit_would_be_refused_and_a_default_lowered() -> None:
    log = Log()
    log.issue(max_attempts=5)
    log.issue(max_attempts=5, defaulted=["max_attempts"])
    log.issue(max_attempts=2)
    asked, default, low = grants(log.under(grant_rule(limit=Limit(max_attempts=2))))
    assert (asked.kind, str(asked.now)) == ("refused", "policy_denied (terms)")
    assert (default.kind, str(default.now)) == ("lowered", "allowed with max_attempts 2")
    assert low.kind == "unchanged"
    assert asked.action == "restart_pod,restart_node,retry"


def test_grants_meet_the_catalogue_requirements_and_conditions() -> None:
    log = Log(policies(Rule(id="terms", on="issue", deny=True)))
    log.issue("retry", intent="short", max_cost=2_000_000)
    (refused,) = grants(log.under(OPEN))
    assert refused.kind == "allowed"
    assert grants(log.under(grant_rule(require=Require(intent_min_chars=20))))[0].kind == "unchanged"
    unlisted = PolicySet(revision="new", actions={})
    assert grants(log.under(unlisted))[0].kind == "otherwise"
    targeted = policies(retry=replace(ACTIONS["retry"], targets_required=True))
    assert grants(log.under(targeted))[0].kind == "otherwise"
    costly = when(lambda subject: subject.max_cost > 1_000_000, "max_cost_micros")
    assert grants(log.under(grant_rule(when=costly, deny=True)))[0].kind == "unchanged"
    cheap = when(lambda subject: subject.max_cost < 1_000_000, "max_cost_micros")
    assert grants(log.under(grant_rule(when=cheap, deny=True)))[0].kind == "allowed"


def test_actions_that_only_a_glob_lists_are_decided_by_its_entry() -> None:
    log = Log()
    scope = log.issue()
    for action in ("restart_pod", "restart_node", "retry"):
        log.execute(scope, action)
    globs = {"restart_*": ActionPolicy(risk=RiskClass.MEDIUM, hold=100_000)}
    new = PolicySet(revision="new", actions={"retry": ACTIONS["retry"]}, globs=globs)
    assert [finding.kind for finding in log.under(new).values()] == ["unchanged"] * 4
    critical = {"restart_*": ActionPolicy(risk=RiskClass.CRITICAL, targets_required=True)}
    assert kinds(log.under(replace(new, globs=critical))) == ["refused", "refused", "unchanged"]


def test_a_grant_whose_ceiling_is_below_a_hold_would_be_refused_and_one_that_was_would_be_granted() -> None:
    dear = policies(retry=replace(ACTIONS["retry"], hold=1_000_001))
    log = Log()
    log.issue("retry", max_cost=1_000_000)
    (found,) = grants(log.under(dear))
    assert (found.kind, str(found.now)) == ("refused", "invalid_scope")
    log = Log(dear)
    log.issue("retry", max_cost=1_000_000)
    (found,) = grants(log.under(OPEN))
    assert (found.kind, str(found.recorded)) == ("allowed", "invalid_scope")
    assert grants(log.under(dear))[0].kind == "unchanged"


def test_whether_a_hold_fits_is_undecidable_where_the_ceiling_is_not_known() -> None:
    dear = policies(retry=replace(ACTIONS["retry"], hold=1_000_001))
    log = Log(mask=["/details/max_cost_usd"])
    log.issue("retry", max_cost=2_000_000)
    (found,) = grants(log.under(dear))
    assert found.why == "its actions hold an amount, and max_cost_usd is masked"
    assert grants(log.under(OPEN))[0].kind == "unchanged"
    log = Log(grant_rule(limit=Limit(max_cost=1_000_000)))
    log.issue("retry", max_cost=2_000_000, defaulted=["max_cost_usd"])
    (found,) = grants(log.under(dear))
    assert (found.why or "").endswith("max_cost_usd is recorded as it was lowered, not as it was requested")


def test_an_execution_under_a_grant_that_would_be_refused_is_judged_by_itself() -> None:
    log = Log()
    log.execute(log.issue(max_attempts=5))
    found = log.under(grant_rule(limit=Limit(max_attempts=2)))
    assert [finding.kind for finding in found.values()] == ["refused", "unchanged"]


def test_masked_members_of_a_grant_leave_undecided_only_what_looks_at_them() -> None:
    log = Log(mask=["/details/intent", "/details/max_attempts"])
    log.issue("retry")
    log.issue("retry", defaulted=["max_attempts"])
    wordy = grant_rule(require=Require(intent_min_chars=3))
    assert [finding.why for finding in grants(log.under(wordy))] == ["rule terms looks at intent: masked"] * 2
    few = grant_rule(limit=Limit(max_attempts=2))
    assert [finding.kind for finding in grants(log.under(few))] == ["undecidable", "unchanged"]
    short = grant_rule(limit=Limit(ttl_seconds=60))
    assert [finding.kind for finding in grants(log.under(short))] == ["refused", "refused"]
    log = Log(mask=["/details/allowed_actions"])
    log.execute(log.issue("retry"), "retry")
    found = log.under(wordy)
    assert [finding.why for finding in grants(found)] == ["the allowed actions are masked"]
    # What the scope was granted for is known all the same.
    assert one(log.under(policies(Rule(id="r", on="execute", require=Require(intent_min_chars=3))))).now


def test_a_default_that_was_lowered_is_not_taken_for_what_was_asked() -> None:
    log = Log(grant_rule(limit=Limit(max_cost=1_000_000)))
    scope = log.issue("retry", max_cost=5_000_000, defaulted=["max_cost_usd"])
    log.execute(scope, "retry")
    asks_much = Rule(
        id="much", on="issue", when=when(lambda s: s.max_cost > 2_000_000, "max_cost_micros"), deny=True
    )
    (grant,) = grants(log.under(policies(asks_much)))
    assert grant.why == (
        "rule much looks at max_cost_micros: recorded as it was lowered, not as it was requested"
    )
    # What it was granted with is known.
    has_little = replace(
        asks_much, on="execute", when=when(lambda s: s.max_cost == 1_000_000, "max_cost_micros")
    )
    assert one(log.under(policies(has_little))).kind == "refused"


# Any log, any two sets ----------------------------------------------------------------------------------


CONDITIONS = (
    None,
    when(lambda subject: subject.parameters.get("x", 0) > 0, "parameters"),
    when(lambda subject: subject.attempts_used > 2, "attempts_used"),
    when(lambda subject: subject.scope_age_seconds % 2 == 1, "scope_age_seconds"),
    when(lambda subject: subject.now // SECOND % 3 == 0, "now"),
)
matches = st.builds(
    Match,
    action=st.sampled_from([(), ("retry",), ("restart_*",)]),
    incident_id=st.sampled_from([(), ("inc_1",)]),
    principal=st.sampled_from([(), ("ann",)]),
    target_agents=st.sampled_from([(), ("a",)]),
)
brakes = st.builds(
    Brake,
    per=st.sampled_from([(), ("incident_id",), ("action",), ("incident_id", "action"), ("target_agents",)]),
    max_attempts=st.sampled_from([None, 1, 2, 3]),
    window_seconds=st.sampled_from([5, 20, 60]),
    cooldown_seconds=st.sampled_from([0, 0, 3, 30]),
    one_in_flight=st.booleans(),
)
rules = st.builds(
    Rule,
    id=st.just("r"),
    on=st.just("execute"),
    match=matches,
    when=st.sampled_from(CONDITIONS),
    brake=st.none() | brakes,
    deny=st.sampled_from([False, False, True]),
    shadow=st.sampled_from([False, False, True]),
)
sets = st.lists(rules, max_size=3).map(
    lambda found: policies(*(replace(rule, id=f"r{index}") for index, rule in enumerate(found)))
)
steps = st.lists(
    st.one_of(
        st.tuples(
            st.just("execute"),
            st.sampled_from(["inc_1", "inc_2"]),
            st.sampled_from(sorted(ACTIONS)),
            st.sampled_from([(), ("a",), ("a", "b")]),
            st.sampled_from(["ann", "bob"]),
            st.integers(0, 1),
        ),
        st.tuples(
            st.just("settle"), st.integers(0, 30), st.sampled_from(["answered", "not_sent", "unknown"])
        ),
        st.tuples(st.just("reconcile"), st.integers(0, 30), st.sampled_from(["executed", "not_executed"])),
        st.tuples(st.just("wait"), st.sampled_from([1, 4, 20, 61])),
    ),
    max_size=30,
)


class Freshly:
    """Decides requests in order under a set, by the core, with all of the past at hand."""

    def __init__(self, new: PolicySet) -> None:
        self.policies = new
        self.executions: dict[str, Execution] = {}
        self.admissions: dict[AdmissionGroup, list[str]] = {}

    def decide(self, command: Admit, scope: Scope, now: int, admitted_then: bool) -> tuple[Any, ...]:
        state = State(scopes={scope.scope_id: scope}, executions=self.executions, admissions=self.admissions)
        applied = apply(replace(command, policies=self.policies), state, now)
        assert applied.entry is not None
        details = applied.entry.record.details
        shadow = sorted({each["rule"] for each in details.get("would_refuse", ())})
        if isinstance(applied.reply, Denied):
            return applied.reply.refusal.code, details["rules"], shadow
        assert applied.execution is not None
        self.executions[command.decision_id] = replace(
            applied.execution, status="in_flight" if admitted_then else "answered"
        )
        for group in groups_containing(applied.execution):
            self.admissions.setdefault(group, []).append(command.decision_id)
        return None, [], shadow

    def end(self, name: str, status: Any) -> None:
        if name in self.executions:
            self.executions[name] = replace(self.executions[name], status=status)


@settings(max_examples=150, deadline=None)
@given(old=sets, new=sets, plan=steps)
def test_any_log_replayed_is_the_same_requests_decided_freshly(
    old: PolicySet, new: PolicySet, plan: list[tuple[Any, ...]]
) -> None:
    log = Log(old)
    scopes = {name: log.issue(incident_id=name, max_attempts=10**6) for name in ("inc_1", "inc_2")}
    asked: list[str] = []
    for step in plan:
        match step:
            case ("execute", incident, action, agents, principal, x):
                asked.append(
                    log.execute(
                        scopes[incident],
                        action,
                        settled=None,
                        principal=principal,
                        incident_id=incident,
                        target_agents=agents,
                        parameters={"x": x},
                    )
                )
            case ("wait", seconds):
                log.wait(seconds)
            case (_, index, outcome) if index < len(asked):
                log.settle(asked[index], outcome)
    envelopes, replies = log.written()

    fresh = Freshly(new)
    used: dict[str, Scope] = {}
    expected: dict[str, tuple[Any, ...]] = {}
    for (now, command), reply in zip(log.commands, replies, strict=True):
        match command, reply:
            case Issue(), Issued():
                used[reply.scope.scope_id] = reply.scope
            case Admit(), Admitted() | Denied():
                scope = used[command.claims.scope_id or ""]
                # With room for every hold: bounds are not what is compared.
                roomy = replace(scope, settled=0, held=0)
                expected[command.decision_id] = fresh.decide(command, roomy, now, isinstance(reply, Admitted))
                if isinstance(reply, Admitted):
                    assert reply.scope is not None
                    used[reply.scope.scope_id] = reply.scope
            case Settle() | Reconcile(), _ if getattr(reply, "scope", None) is not None:
                settled: Any = reply
                used[settled.scope.scope_id] = settled.scope
                fresh.end(command.admission_id, command.outcome)
    found = {
        name: (finding.now.error, list(finding.now.rules), list(finding.now.would_refuse or ()))
        for name, finding in findings(envelopes, Replay(new)).items()
        if finding.what == "execute" and finding.now is not None
    }
    assert found == expected
