"""Brakes, sentence by sentence, and against an oracle that counts a plain list of admissions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.core import brakes
from sidecar.core.apply import apply
from sidecar.core.brakes import AdmissionGroup, Use, group_of, groups_containing, groups_for
from sidecar.core.command import Admit, Admitted, Command, Denied, Reconcile, Reply, Report, Settle, Settled
from sidecar.core.facts import Claims
from sidecar.core.instant import iso_time
from sidecar.core.policy import ActionPolicy, Brake, Facet, Match, PolicySet, RiskClass, Rule, Subject
from sidecar.core.principal import Principal
from sidecar.core.rules import preview
from sidecar.core.scope import Execution
from sidecar.core.state import State, names
from sidecar.errors import Refusal
from tests.unit.test_rules import When

SECOND = 1_000_000
START = 1_767_225_600 * SECOND  # 2026-01-01T00:00:00Z

ACTIONS = ("restart_pod", "restart_node", "retry_agent")


def policies_of(*rules: Rule, **changes: Any) -> PolicySet:
    """A catalogue in which nothing needs a scope, so that only rules can refuse."""
    actions = {name: ActionPolicy(risk=RiskClass.LOW) for name in ACTIONS}
    return PolicySet(**{"revision": "rev-1", "actions": actions, "rules": rules, **changes})


def braking(rule_id: str = "brake", match: Match | None = None, **brake: Any) -> Rule:
    return Rule(id=rule_id, on="execute", match=match or Match(), brake=Brake(**brake))


def admission(policies: PolicySet, decision_id: str, **facts: Any) -> Admit:
    tenant, principal = facts.pop("tenant_id", "default"), Principal(id=facts.pop("principal", "anonymous"))
    claims = Claims(**{"incident_id": "inc_1", "action": "restart_pod", **facts})
    return Admit(
        decision_id=decision_id,
        claims=claims,
        policies=policies,
        tenant_id=tenant,
        principal=principal,
        scope_required_from=RiskClass.CRITICAL,
    )


# The plain oracle ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One thing that happens: an execution is asked for (its facts), one ends, or time passes."""

    facts: tuple[tuple[str, Any], ...] = ()
    ends: int | None = None
    outcome: str = ""
    wait: int = 0


@dataclass
class Past:
    """One admission as the oracle remembers it."""

    name: str
    at: int
    facts: dict[str, Any]
    status: str = "in_flight"


@dataclass
class History:
    """What was admitted, in a plain list. Whether a brake holds is found by going through all of it."""

    policies: PolicySet
    now: int = START
    admitted: list[Past] = field(default_factory=list)
    made: int = 0

    def next(self, step: Step) -> tuple[Command | None, bool]:
        """The command that a step is, None where it only lets time pass; whether it is allowed."""
        self.now += step.wait
        if step.ends is not None:
            return self._end(step.ends, step.outcome), True
        if not step.facts:
            return None, True
        self.made += 1
        facts = dict(step.facts)
        allowed = not any(self.holds(rule, facts, self.now) for rule in self.policies.rules)
        command = admission(self.policies, f"d-{self.made}", **facts)
        return replace(command, report_token=bytes(32), report_seconds=1_000_000), allowed

    def _end(self, which: int, outcome: str) -> Command | None:
        if not self.admitted:
            return None
        past = self.admitted[which % len(self.admitted)]
        self.made += 1
        name = f"e-{self.made}"
        ends: Any = outcome
        if past.status == "in_flight" and outcome in ("answered", "running", "not_sent", "unknown"):
            return Settle(decision_id=name, admission_id=past.name, outcome=ends)
        if past.status in ("unknown", "running") and outcome in ("executed", "not_executed"):
            return Reconcile(decision_id=name, admission_id=past.name, outcome=ends)
        if past.status in ("in_flight", "unknown", "running") and outcome in ("succeeded", "failed"):
            return Report(decision_id=name, admission_id=past.name, token_sha256=bytes(32), outcome=ends)
        return None

    def remember(self, command: Command, reply: Reply) -> None:
        if isinstance(reply, Admitted):
            assert isinstance(command, Admit)
            facts = {
                "action": command.claims.action,
                "incident_id": command.claims.incident_id,
                "tenant_id": command.tenant_id,
                "principal": command.principal.id,
                "target_agents": command.claims.target_agents,
            }
            self.admitted.append(Past(command.decision_id, self.now, facts))
        elif isinstance(reply, Settled):
            (past,) = [one for one in self.admitted if one.name == reply.execution.decision_id]
            past.status = reply.execution.status

    def holds(self, rule: Rule, facts: dict[str, Any], at: int) -> bool:
        return self.holds_for_a_time(rule, facts, at) or any(
            rule.brake is not None and rule.brake.one_in_flight and past.status in ("in_flight", "running")
            for counted in self._counted(rule, facts)
            for past in counted
        )

    def holds_for_a_time(self, rule: Rule, facts: dict[str, Any], at: int) -> bool:
        """Whether it holds, whatever is in flight."""
        brake = rule.brake
        assert brake is not None
        window, cooldown = brake.window_seconds * SECOND, brake.cooldown_seconds * SECOND
        for counted in self._counted(rule, facts):
            within = [past for past in counted if at < past.at + window]
            if brake.max_attempts is not None and len(within) >= brake.max_attempts:
                return True
            if any(at < past.at + cooldown for past in counted):
                return True
            if brake.one_in_flight and any(past.status == "unknown" for past in within):
                return True
        return False

    def ends_at(self, facts: dict[str, Any]) -> int | None:
        """The first instant from now on at which no brake holds; None: only what is in flight has to end."""
        rules = self.policies.rules
        seconds = {0, *(rule.brake.window_seconds for rule in rules if rule.brake)}
        seconds |= {rule.brake.cooldown_seconds for rule in rules if rule.brake}
        instants = {self.now, *(past.at + one * SECOND for past in self.admitted for one in seconds)}
        free = next(
            at
            for at in sorted(instants)
            if at >= self.now and not any(self.holds_for_a_time(rule, facts, at) for rule in rules)
        )
        return None if free == self.now else free

    def _counted(self, rule: Rule, facts: dict[str, Any]) -> Iterator[list[Past]]:
        """Each list of admissions that the brake counts together for what is asked for."""
        assert rule.brake is not None
        if not matches(rule.match, facts):
            return
        facets = [name for name in rule.brake.per if name != "target_agents"]
        if "incident_id" in facets:
            facets.append("tenant_id")  # an incident is a tenant's own
        counted = [
            past
            for past in self.admitted
            if past.status != "not_sent"
            and matches(rule.match, past.facts)
            and all(past.facts[name] == facts[name] for name in facets)
        ]
        if "target_agents" not in rule.brake.per:
            yield counted
        elif not facts["target_agents"]:
            yield [past for past in counted if not past.facts["target_agents"]]
        for agent in facts["target_agents"] if "target_agents" in rule.brake.per else ():
            yield [past for past in counted if agent in past.facts["target_agents"]]


def matches(match: Match, facts: dict[str, Any]) -> bool:
    for name in ("action", "incident_id", "tenant_id", "principal"):
        globs = getattr(match, name)
        if globs and not any(fnmatchcase(facts[name], glob) for glob in globs):
            return False
    agents = match.target_agents
    return not agents or any(fnmatchcase(one, glob) for one in facts["target_agents"] for glob in agents)


FACETS: tuple[Facet, ...] = ("incident_id", "action", "tenant_id", "principal", "target_agents")


def brake_rules(rule_id: str = "brake") -> st.SearchStrategy[Rule]:
    """Rules with a brake that brakes something, as the reader of policy files lets through."""
    some_match = st.builds(
        Match,
        action=st.sampled_from([(), (), ("restart_*",), ("restart_pod", "retry_agent")]),
        tenant_id=st.sampled_from([(), (), ("acme",)]),
        target_agents=st.sampled_from([(), (), (), ("a", "c*")]),
    )
    brake = st.builds(
        Brake,
        per=st.lists(st.sampled_from(FACETS), max_size=2, unique=True).map(tuple),
        max_attempts=st.none() | st.integers(1, 3),
        window_seconds=st.integers(1, 6),
        cooldown_seconds=st.sampled_from([0, 0, 1, 2, 7]),
        one_in_flight=st.booleans(),
    ).filter(lambda one: bool(one.max_attempts or one.cooldown_seconds or one.one_in_flight))
    return st.builds(
        lambda match, brake: Rule(id=rule_id, on="execute", match=match, brake=brake), some_match, brake
    )


FACTS = st.fixed_dictionaries(
    {
        "action": st.sampled_from(ACTIONS),
        "incident_id": st.sampled_from(["inc_1", "inc_1", "inc_2"]),
        "tenant_id": st.sampled_from(["default", "acme"]),
        "principal": st.sampled_from(["ann", "bob"]),
        "target_agents": st.sampled_from([(), ("a",), ("b",), ("a", "b"), ("b", "c")]),
    }
).map(lambda facts: tuple(facts.items()))
WAITS = st.sampled_from([1, 500_000, 999_999, SECOND, SECOND + 1, 2 * SECOND, 5 * SECOND, 6 * SECOND])
ENDINGS = st.sampled_from(
    [
        *("answered", "answered", "not_sent", "unknown", "executed", "not_executed"),
        *("running", "running", "succeeded", "failed"),
    ]
)


def histories() -> st.SearchStrategy[list[Step]]:
    asked = st.builds(Step, facts=FACTS)
    ended = st.builds(Step, ends=st.integers(0, 30), outcome=ENDINGS)
    waited = st.builds(Step, wait=WAITS)
    return st.lists(st.one_of(asked, asked, ended, waited), max_size=40)


@dataclass
class Book:
    """Executions as a store keeps them, and commands applied to them."""

    executions: dict[str, Execution] = field(default_factory=dict)

    def look(self, command: Command, now: int) -> Reply:
        """What the answer would be; nothing changes."""
        return apply(command, self._state(command), now).reply

    def submit(self, command: Command, now: int) -> Reply:
        applied = apply(command, self._state(command), now)
        if applied.execution is not None:
            self.executions[applied.execution.decision_id] = applied.execution
        return applied.reply

    def _state(self, command: Command) -> State:
        executions = self.executions.values()
        admissions = {
            group: [one.decision_id for one in executions if group in groups_containing(one)]
            for group in names([command], 0).groups
        }
        return State(executions=self.executions, admissions=admissions, found={})


def refused_by(reply: Reply) -> Refusal | None:
    return reply.refusal if isinstance(reply, Denied) else None


RULES = st.integers(1, 3).flatmap(
    lambda count: st.tuples(*(brake_rules(f"brake-{number}") for number in range(count)))
)


@given(rules=RULES, steps=histories())
def test_brakes_hold_exactly_when_a_plain_count_says_so_and_until_then(
    rules: Sequence[Rule], steps: list[Step]
) -> None:
    history, book = History(policies_of(*rules)), Book()
    for step in steps:
        command, allowed = history.next(step)
        if command is None:
            continue
        if isinstance(command, Admit):
            facts = dict(step.facts)
            refusal = refused_by(book.look(command, history.now))
            assert (refusal is None) is allowed
            if refusal is not None:
                holding = [rule.id for rule in rules if history.holds(rule, facts, history.now)]
                assert (refusal.code, refusal.members["rules"]) == ("braked", holding)
                ends_at = history.ends_at(facts)
                assert refusal.members["ends_at"] == (None if ends_at is None else iso_time(ends_at))
        history.remember(command, book.submit(command, history.now))


@given(rules=RULES, steps=histories())
def test_waiting_as_long_as_a_brake_says_is_enough_and_a_second_less_is_not(
    rules: Sequence[Rule], steps: list[Step]
) -> None:
    history, book = History(policies_of(*rules)), Book()
    for step in steps:
        command, _ = history.next(step)
        if command is None:
            continue
        refusal = refused_by(book.look(command, history.now)) if isinstance(command, Admit) else None
        if refusal is not None and refusal.members["ends_at"] is not None:
            seconds = refusal.members["retry_after_seconds"]
            assert seconds >= 1
            early = refused_by(book.look(command, history.now + (seconds - 1) * SECOND))
            assert early is not None
            assert early.members["ends_at"] == refusal.members["ends_at"]
            later = refused_by(book.look(command, history.now + seconds * SECOND))
            # What is left can only be an execution under way, and nobody knows when that ends.
            assert later is None or later.members["ends_at"] is None
        history.remember(command, book.submit(command, history.now))


@given(rule=brake_rules(), steps=histories())
def test_no_window_ever_holds_more_than_max_attempts_and_no_cooldown_two(
    rule: Rule, steps: list[Step]
) -> None:
    assert rule.brake is not None
    rule = replace(rule, brake=replace(rule.brake, per=()))
    assert rule.brake is not None
    history, book = History(policies_of(rule)), Book()
    for step in steps:
        command, _ = history.next(step)
        if command is not None:
            history.remember(command, book.submit(command, history.now))
    times = [
        past.at for past in history.admitted if past.status != "not_sent" and matches(rule.match, past.facts)
    ]
    for at in times:
        window = [one for one in times if at - rule.brake.window_seconds * SECOND < one <= at]
        assert len(window) <= (rule.brake.max_attempts or len(times))
    for first, second in pairwise(times):
        assert second - first >= rule.brake.cooldown_seconds * SECOND


# Sentence by sentence -----------------------------------------------------------------------------------


def execution(name: str = "d-1", *, seconds_ago: float = 0, **changes: Any) -> Execution:
    return Execution(
        **{
            "decision_id": name,
            "scope_id": None,
            "tenant_id": "default",
            "incident_id": "inc_1",
            "action": "restart_pod",
            "request_id": "r",
            "attempt_number": None,
            "hold": 0,
            "admitted_at": START - round(seconds_ago * SECOND),
            "status": "answered",
            **changes,
        }
    )


def subject(**changes: Any) -> Subject:
    return Subject(
        **{
            "action": "restart_pod",
            "risk": RiskClass.LOW,
            "incident_id": "inc_1",
            "tenant_id": "default",
            "principal": "anonymous",
            "now": START,
            **changes,
        }
    )


def used(rule: Rule, *executions: Execution, **changes: Any) -> Use:
    about, policies = subject(**changes), policies_of(rule)
    group = group_of(policies.tally(rule), about)
    oldest_first = sorted(executions, key=lambda one: one.admitted_at)
    admissions = {group: [one.decision_id for one in oldest_first if group in groups_containing(one)]}
    known = {one.decision_id: one for one in executions}
    uses: list[tuple[Rule, Use]] = []
    brakes.objections_to(preview(policies, "execute", about), about, policies, admissions, known, uses=uses)
    ((_, found),) = uses
    return found


def test_a_use_says_how_much_of_a_brake_is_used_before_it_holds() -> None:
    rule = braking(max_attempts=3, window_seconds=60)
    past = [execution(f"d-{number}", seconds_ago=number * 25) for number in range(4)]
    assert used(rule) == Use(0)
    assert used(rule, *past[2:]) == Use(1)
    assert used(rule, *past[1:]) == Use(2)
    full = used(rule, *past)
    assert (full.count, full.until) == (3, START - 50 * SECOND + 60 * SECOND)
    assert full.why == "3 executions in 60 s are the most."


class Watched(dict[str, Execution]):
    """Executions that remember which of them were looked at."""

    def __init__(self) -> None:
        self.looked_at: list[str] = []

    def __getitem__(self, name: str) -> Execution:
        self.looked_at.append(name)
        return super().__getitem__(name)


def test_what_was_found_is_not_looked_at_again_but_what_is_new_and_how_it_ended_is() -> None:
    roomy, full = (
        braking("roomy", max_attempts=9, window_seconds=60),
        braking(max_attempts=2, window_seconds=60),
    )
    about, known, found, names = subject(), Watched(), brakes.CountCache(), list[str]()

    def objecting(policies: PolicySet) -> list[str | None]:
        known.looked_at.clear()
        seen = preview(policies, "execute", about)
        answers = [
            [
                one.rule_id
                for one in brakes.objections_to(
                    seen, about, policies, {AdmissionGroup(): names}, known, cache
                )
            ]
            for cache in (found, None)
        ]
        assert answers[0] == answers[1]
        return answers[0]

    alone, both = policies_of(roomy), policies_of(roomy, full)
    for number in range(3):
        known[f"d-{number}"] = execution(f"d-{number}", seconds_ago=0)
        names.append(f"d-{number}")
        assert objecting(alone) == []
        # The one that is new with the cache, and all of them without.
        assert known.looked_at == [f"d-{number}", *names]
    assert objecting(both) == ["brake"]
    for name in ("d-1", "d-2"):
        known[name] = replace(known[name], status="not_sent")
    assert objecting(both) == []


@pytest.mark.parametrize(
    ("brake", "seconds", "allowed"),
    [
        ({"cooldown_seconds": 5}, 4.999999, False),
        ({"cooldown_seconds": 5}, 5, True),
        ({"max_attempts": 2, "window_seconds": 5}, 4, False),
        ({"max_attempts": 2, "window_seconds": 5}, 4.999999, False),
        ({"max_attempts": 2, "window_seconds": 5}, 5, True),
        ({"max_attempts": 3, "window_seconds": 5}, 1, True),
        ({"one_in_flight": True, "window_seconds": 5}, 99, False),
    ],
)
def test_each_limit_of_a_brake_is_kept_to_the_microsecond(
    brake: dict[str, Any], seconds: float, allowed: bool
) -> None:
    """Beside a looser brake that counts the same, and one with a condition."""
    loose = braking("loose", max_attempts=9, window_seconds=1, cooldown_seconds=1)
    tight = braking("tight", **brake)
    now = START + round(seconds * SECOND)
    for rule in (tight, replace(tight, when=When(frozenset({"attempts_used"})))):
        policies, book = policies_of(loose, rule), Book()
        status: Any = "in_flight" if "one_in_flight" in brake else "answered"
        for name in ("d-1", "d-2"):
            book.executions[name] = execution(name, status=status)
        refusal = refused_by(book.submit(admission(policies, "d-3"), now))
        assert (refusal is None) is allowed
        assert refusal is None or refusal.members["rules"] == ["tight"]


@pytest.mark.parametrize(
    ("brake", "looked_at"),
    [
        ({"one_in_flight": True, "window_seconds": 9_999}, 2),
        ({"one_in_flight": True, "window_seconds": 9_999, "cooldown_seconds": 9_999}, 2),
        ({"one_in_flight": True, "window_seconds": 9_999, "max_attempts": 20}, 21),
        ({"max_attempts": 20, "window_seconds": 9_999}, 20),
    ],
)
def test_a_brake_that_holds_is_not_looked_at_for_longer_than_it_takes_to_know_why(
    brake: dict[str, Any], looked_at: int
) -> None:
    policies, about, known = policies_of(braking(**brake)), subject(), Watched()
    for number in range(50):
        known[f"d-{number:02}"] = execution(f"d-{number:02}", seconds_ago=50 - number)
    known["d-09"] = replace(known["d-09"], status="in_flight")
    found, rest = brakes.CountCache(), (about, policies, {AdmissionGroup(): list(known)}, known)
    seen = preview(policies, "execute", about)
    for _ in range(2):
        known.looked_at.clear()
        (one,) = brakes.objections_to(seen, *rest, found)
    # The second time, only what may still change or decides.
    assert len(set(known.looked_at)) == looked_at
    assert [one] == brakes.objections_to(seen, *rest, None, [])


def test_counts_by_the_same_facets_are_kept_together_and_never_mixed() -> None:
    """Each execution is examined once for all brakes that count alike, and counts for its own facets only."""
    by_tenant = [
        braking(f"by-tenant-{number}", per=("tenant_id",), max_attempts=number, window_seconds=60)
        for number in (1, 2, 3)
    ]
    by_agent = braking("by-agent", per=("tenant_id", "target_agents"), max_attempts=2, window_seconds=60)
    policies = policies_of(*by_tenant, by_agent)
    tally = policies.tally(by_tenant[0])
    assert [policies.tally(rule) for rule in by_tenant] == [tally] * 3
    assert policies.tally(by_agent) is not tally
    known = {
        f"d-{number}": execution(f"d-{number}", tenant_id=tenant, target_agents=agents)
        for number, (tenant, agents) in enumerate(
            [("acme", ("a", "a")), ("acme", ("b",)), ("default", ("a", "b")), ("acme", ("b", "c"))]
        )
    }
    found: brakes.CountCache = {}

    def objecting(**facts: Any) -> set[str | None]:
        about = subject(**facts)
        seen = preview(policies, "execute", about)
        objections = brakes.objections_to(
            seen, about, policies, {AdmissionGroup(): list(known)}, known, found
        )
        return {one.rule_id for one in objections}

    for _ in range(2):
        assert objecting(tenant_id="acme", target_agents=("a",)) == {rule.id for rule in by_tenant}
        assert objecting(tenant_id="acme", target_agents=("a", "b")) == {rule.id for rule in policies.rules}
        assert objecting(tenant_id="default", target_agents=("b",)) == {"by-tenant-1"}
        assert objecting(tenant_id="other", target_agents=("b",)) == set()
    assert len(found) == 2


@given(rules=RULES, steps=histories())
def test_a_brake_that_is_not_looked_at_any_further_does_not_hold(
    rules: Sequence[Rule], steps: list[Step]
) -> None:
    """With and without the cache, and with and without the use of each brake, the objections are the same."""
    conditional = replace(rules[0], id="conditional", when=When(frozenset({"attempts_used"})))
    policies = policies_of(*rules, conditional)
    history, executions, admissions = (
        History(policies),
        dict[str, Execution](),
        dict[AdmissionGroup, list[str]](),
    )
    found: brakes.CountCache = {}
    for step in steps:
        command, _ = history.next(step)
        if command is None:
            continue
        if isinstance(command, Admit):
            for group in names([command], 0).groups:
                found_by_then = [name for name, one in executions.items() if group in groups_containing(one)]
                kept = admissions.setdefault(group, [])
                kept += found_by_then[len(kept) :]
            facts = dict(step.facts)
            about = subject(risk=RiskClass.LOW, now=history.now, **facts)
            known = preview(policies, "execute", about)
            uses: list[tuple[Rule, Use]] = []
            rest = about, policies, admissions, executions
            thorough = brakes.objections_to(known, *rest, None, uses)
            assert brakes.objections_to(known, *rest, found) == thorough
            assert brakes.objections_to(known, *rest) == thorough
            assert {rule.id for rule, use in uses if use.why is not None} == {one.rule_id for one in thorough}
        state = State(executions=executions, admissions=admissions, found=found)
        applied = apply(command, state, history.now)
        if applied.execution is not None:
            executions[applied.execution.decision_id] = applied.execution
        history.remember(command, applied.reply)


def test_a_brake_names_the_execution_that_is_waited_for() -> None:
    rule = braking(one_in_flight=True, window_seconds=60)
    flying = used(rule, execution("d-fly", status="in_flight", seconds_ago=999))
    assert flying == Use(0, "Execution d-fly is still in flight.", None)
    lost = used(rule, execution("d-lost", status="unknown", seconds_ago=59))
    assert lost == Use(1, "Execution d-lost is unknown; reconcile it, or wait.", START + SECOND)
    assert used(rule, execution("d-lost", status="unknown", seconds_ago=60)) == Use(0)
    running = used(rule, execution("d-run", status="running", seconds_ago=999))
    assert running == Use(0, "Execution d-run is still running.", None)
    theirs = used(rule, execution("d-fly", status="in_flight", seconds_ago=1, tenant_id="acme"))
    assert theirs == Use(1, "An execution of another tenant is still in flight.")


def test_a_brake_that_holds_objects_with_the_instant_at_which_it_ends() -> None:
    rule = braking("storm", max_attempts=1, window_seconds=60)
    assert list(brakes.objection(rule, Use(0), START)) == []
    (timed,) = brakes.objection(rule, Use(1, "Too often.", START + SECOND + 1), START)
    assert timed.refusal.members == {
        "rules": ["storm"],
        "retry_after_seconds": 2,
        "ends_at": "2026-01-01T00:00:01.000001+00:00",
    }
    (flying,) = brakes.objection(rule, Use(1, "In flight.", None), START)
    assert (flying.refusal.members["retry_after_seconds"], flying.refusal.members["ends_at"]) == (1, None)


def test_what_ends_at_a_known_time_is_said_before_what_is_in_flight() -> None:
    rule = braking(one_in_flight=True, window_seconds=60, cooldown_seconds=10)
    flying = execution("d-fly", status="in_flight", seconds_ago=4)
    assert used(rule, flying).until == START + 6 * SECOND
    assert used(rule, replace(flying, admitted_at=START - 10 * SECOND)).until is None


def test_of_the_agents_that_are_named_the_fullest_decides() -> None:
    rule = braking(per=("target_agents",), max_attempts=2, window_seconds=60)
    past = [
        execution("d-1", seconds_ago=50, target_agents=("a",)),
        execution("d-2", seconds_ago=40, target_agents=("a", "b")),
        execution("d-3", seconds_ago=30, target_agents=("b",)),
        execution("d-4", seconds_ago=20),
    ]
    assert used(rule, *past, target_agents=("c",)) == Use(0)
    assert used(rule, *past) == Use(1)
    assert used(rule, *past, target_agents=("c", "a")).until == START + 10 * SECOND
    assert used(rule, *past, target_agents=("a", "b", "c")).until == START + 20 * SECOND
    assert used(rule, *past[:2], target_agents=("b", "c")) == Use(1)


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({}, 1),
        ({"action": "restart_node"}, 1),
        ({"action": "retry_agent"}, 0),
        ({"action": "gone_from_the_catalogue"}, 0),
        ({"incident_id": "inc_2"}, 0),
        ({"tenant_id": "acme"}, 0),
        ({"principal": "eve"}, 0),
        ({"target_agents": ("web-1",)}, 0),
        ({"target_agents": ()}, 0),
        ({"status": "not_sent"}, 0),
        ({"status": "not_executed"}, 1),
        ({"status": "executed"}, 1),
        ({"status": "unknown"}, 1),
        ({"status": "in_flight"}, 1),
    ],
)
def test_a_brake_counts_what_its_match_is_about(changes: dict[str, Any], count: int) -> None:
    match = Match(
        risk=frozenset({RiskClass.LOW}),
        action=("restart_*",),
        incident_id=("inc_1",),
        tenant_id=("default",),
        principal=("anonymous",),
        target_agents=("db-*",),
    )
    rule = braking(match=match, max_attempts=9, window_seconds=60)
    past = execution(**{"target_agents": ("web-1", "db-1"), **changes})
    assert used(rule, past, target_agents=("db-2",)).count == count


def test_an_execution_belongs_to_its_incident_its_action_and_to_all() -> None:
    assert set(groups_containing(execution(tenant_id="acme"))) == {
        AdmissionGroup(tenant_id="acme", incident_id="inc_1", action="restart_pod"),
        AdmissionGroup(tenant_id="acme", incident_id="inc_1"),
        AdmissionGroup(action="restart_pod"),
        AdmissionGroup(),
    }


@pytest.mark.parametrize(
    ("per", "group"),
    [
        ((), AdmissionGroup()),
        (("principal",), AdmissionGroup()),
        (("tenant_id", "target_agents"), AdmissionGroup()),
        (("action",), AdmissionGroup(action="restart_pod")),
        (("incident_id",), AdmissionGroup(tenant_id="acme", incident_id="inc_1")),
        (
            ("action", "incident_id"),
            AdmissionGroup(tenant_id="acme", incident_id="inc_1", action="restart_pod"),
        ),
    ],
)
def test_what_a_brake_counts_is_found_in_the_smallest_group_that_has_it_all(
    per: tuple[Facet, ...], group: AdmissionGroup
) -> None:
    rule = braking(per=per, max_attempts=1, window_seconds=60)
    assert group_of(policies_of(rule).tally(rule), subject(tenant_id="acme")) == group
    assert group in groups_containing(execution(tenant_id="acme"))


def test_an_admission_names_each_group_once_and_as_far_back_as_any_brake_looks() -> None:
    policies = policies_of(
        braking("short", max_attempts=1, window_seconds=60),
        braking("cool", cooldown_seconds=600),
        braking("wide", per=("principal",), one_in_flight=True, window_seconds=300),
        braking("by-action", per=("action",), max_attempts=1, window_seconds=5),
        braking("by-incident", per=("incident_id",), max_attempts=1, window_seconds=7),
        braking("others", match=Match(action=("retry_agent",)), max_attempts=1, window_seconds=9_999),
        Rule(id="no-brake", on="execute", deny=True),
    )
    wanted = {
        AdmissionGroup(): 600,
        AdmissionGroup(action="restart_pod"): 5,
        AdmissionGroup(tenant_id="default", incident_id="inc_1"): 7,
    }
    assert groups_for(policies, "default", "inc_1", "restart_pod") == wanted
    now = 10_000 * SECOND
    since = {group: now - seconds * SECOND for group, seconds in wanted.items()}
    assert names([admission(policies, "d-1")], now).groups == since
    shorter = replace(policies, rules=policies.rules[-3:])
    assert names([admission(shorter, "d-0"), admission(policies, "d-1")], now).groups == since


def test_an_admission_without_brakes_names_nothing_to_count() -> None:
    assert groups_for(policies_of(), "default", "inc_1", "restart_pod") == {}
    brake = braking(per=("incident_id",), max_attempts=1, window_seconds=60)
    # Malformed claims are refused before any brake, but what they need can still be named.
    assert groups_for(policies_of(brake), "default", None, None) == {
        AdmissionGroup(tenant_id="default", incident_id=""): 60
    }


@pytest.mark.parametrize(
    "brake",
    [
        {"max_attempts": 1, "window_seconds": 10},
        {"cooldown_seconds": 10},
        {"one_in_flight": True, "window_seconds": 10},
    ],
)
def test_an_admission_by_a_clock_that_ran_ahead_holds_for_no_longer_than_the_window(
    brake: dict[str, Any],
) -> None:
    ahead = execution(seconds_ago=-86_400, status="unknown")
    until = used(braking(**brake), ahead).until
    assert until is not None
    assert until <= subject().now + 10 * SECOND


def test_an_admission_by_a_clock_that_ran_ahead_is_not_hidden_by_later_ones() -> None:
    policies = policies_of(braking(one_in_flight=True, window_seconds=5, cooldown_seconds=5))
    known = {
        "d-1": execution("d-1", seconds_ago=-3_600),
        "d-2": execution("d-2", seconds_ago=60),
    }
    seen = preview(policies, "execute", subject())
    rest = subject(), policies, {AdmissionGroup(): list(known)}, known
    (one,) = brakes.objections_to(seen, *rest)
    assert [one] == brakes.objections_to(seen, *rest, None, [])
    assert one.until == START + 5 * SECOND
