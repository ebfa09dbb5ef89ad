"""Policies as operators write them, through the store: what is answered, consumed and recorded."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis

from sidecar.core.command import (
    Admit,
    Admitted,
    Command,
    Denied,
    Issue,
    Issued,
    Reconcile,
    Reply,
    Settle,
    Settled,
)
from sidecar.core.facts import Claims
from sidecar.core.money import to_dollars, to_micros
from sidecar.core.policy import ActionPolicy, Brake, PolicySet, RiskClass, Rule
from sidecar.core.principal import Principal
from sidecar.core.rules import preview, subject_of
from sidecar.core.scope import Scope
from sidecar.ids import new_decision_id, new_scope_id
from sidecar.policies.files import load
from sidecar.store.base import ExecutionsWanted
from sidecar.store.batch import Store
from sidecar.store.sqlite import SqliteEngine
from tests.cases import load_cases
from tests.store.conftest import OpenStore
from tests.store.test_commands import Gate, whole_log
from tests.support import SECOND
from tests.unit.test_brakes import START, History, Step, brake_rules, histories, policies_of

DOCUMENT = load_cases("policies")
CASES: list[dict[str, Any]] = DOCUMENT["cases"]

# The rows of the table in policies.md that are decided here; reload, tests and replay are tested with them.
ROWS = {
    "combination",
    "catalogue",
    "limit on issue",
    "brake",
    "when",
    "shadow rule",
    "shadow route",
    "risk threshold",
}
# What may be wanted of each kind of step: of one that is refused, of one that goes on.
REFUSED = {"error", "rules", "members", "has", "lacks", "says", "would_refuse", "details", "times"}
ISSUED = {"rules", "granted", "would_refuse", "details"}
ADMITTED = {"attempt", "hold_usd", "timeout_seconds", "used", "would_refuse", "details", "times"}
STEPS = {
    "issue": (REFUSED, ISSUED),
    "execute": (REFUSED | {"used"}, ADMITTED),
    "settle": (set(), {"used"}),
    "reconcile": (set(), {"used"}),
    "wait": (set(), set()),
    "adopt": (set(), set()),
}
DEFAULTS = {"max_attempts": 1, "ttl_seconds": 300, "max_cost_usd": 0.5}
POLICY_CODES = {"policy_denied", "braked"}


@dataclass
class StandingClock:
    """A clock that stands still until it is told to go on."""

    now: int = START

    def __call__(self) -> int:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += round(seconds * SECOND)


@dataclass
class Play:
    """A case on its way through a store. `judged_before`: the rules are asked before the writer is."""

    store: Store
    clock: StandingClock
    folder: Path
    judged_before: bool
    policies: PolicySet | None = None
    scopes: dict[str, str] = field(default_factory=dict)
    executions: dict[str, str] = field(default_factory=dict)
    last: str = ""

    def adopt(self, text: str) -> None:
        """Policies as they stand in files from now on."""
        catalogue = "# in rules.yaml\n" if text.startswith("actions:") else DOCUMENT["catalogue"]
        (self.folder / "actions.yaml").write_text(catalogue, encoding="utf-8")
        (self.folder / "rules.yaml").write_text(text, encoding="utf-8")
        self.policies = load(self.folder)

    async def scope(self, name: str = "s") -> Scope:
        found = await self.store.engine.scope(self.scopes[name])
        assert found is not None
        return found

    def issue(
        self,
        *,
        allowed_actions: list[str] | None = None,
        incident_id: str = "inc_1",
        tenant_id: str = "default",
        principal: str = "anonymous",
        intent: str = "bring it back",
        target_agents: tuple[str, ...] = (),
        **terms: Any,
    ) -> Issue:
        asked = {**DEFAULTS, **terms}
        assert asked.keys() == DEFAULTS.keys()
        assert self.policies is not None
        scope = Scope(
            scope_id=new_scope_id(),
            tenant_id=tenant_id,
            incident_id=incident_id,
            allowed_actions=tuple(allowed_actions or ["restart_pod"]),
            max_cost=to_micros(asked["max_cost_usd"]),
            max_attempts=asked["max_attempts"],
            created_at=0,
            expires_at=0,
            intent=intent,
            target_agents=tuple(target_agents),
            created_by="oncall",
        )
        return Issue(
            decision_id=new_decision_id(),
            scope=scope,
            ttl=asked["ttl_seconds"],
            policies=self.policies,
            defaulted=frozenset(DEFAULTS.keys() - terms.keys()),
            principal=Principal(id=principal),
        )

    async def execute(
        self,
        *,
        scope: str | None = "s",
        principal: str = "anonymous",
        tenant_id: str | None = None,
        scope_required_from: str = "low",
        shadow: bool = False,
        **claimed: Any,
    ) -> Admit:
        granted = await self.scope(scope) if scope in self.scopes else None
        tenant = tenant_id or (granted.tenant_id if granted else "default")
        claimed.setdefault("incident_id", granted.incident_id if granted else "inc_1")
        claimed.setdefault("action", granted.allowed_actions[0] if granted else "restart_pod")
        claimed["target_agents"] = tuple(claimed.get("target_agents", ()))
        claims = Claims(scope_id=scope and self.scopes.get(scope, f"scope_{scope}"), **claimed)
        assert self.policies is not None
        known = None
        if self.judged_before:
            subject = subject_of(claims, tenant, Principal(id=principal), self.policies, self.clock.now)
            known = preview(self.policies, "execute", subject)
        return Admit(
            decision_id=new_decision_id(),
            claims=claims,
            policies=self.policies,
            tenant_id=tenant,
            principal=Principal(id=principal),
            preview=known,
            scope_required_from=RiskClass(scope_required_from),
            shadow=shadow,
        )

    async def envelope(self, decision_id: str) -> dict[str, Any]:
        """A record with what is around it, as the log holds it."""
        stored = await self.store.engine.decision(decision_id)
        assert stored is not None
        found: dict[str, Any] = orjson.loads(stored.envelope)
        return found

    async def step(self, step: dict[str, Any]) -> None:
        (kind,) = STEPS.keys() & step.keys()
        what, wanted = step[kind], {key: value for key, value in step.items() if key != kind}
        refused, goes_on = STEPS[kind]
        assert wanted.keys() <= (refused if "error" in wanted else goes_on), "wanted, but not compared"
        for _ in range(wanted.get("times", 1)):
            await self._step(kind, what, wanted)
        if "used" in wanted:
            scope = what.get("scope") if kind == "execute" else None
            assert (await self.scope(scope or "s")).attempts_used == wanted["used"]

    async def _step(self, kind: str, what: Any, wanted: dict[str, Any]) -> None:
        match kind:
            case "wait":
                self.clock.wait(what)
            case "adopt":
                self.adopt(what)
            case "issue":
                name = what.get("as", "s")
                command = self.issue(**{key: value for key, value in what.items() if key != "as"})
                reply = await self.store.submit(command)
                await self._compare(reply, command, wanted)
                if isinstance(reply, Issued):
                    self.scopes[name] = reply.scope.scope_id
            case "execute":
                name = what.get("as", "")
                asked = await self.execute(**{key: value for key, value in what.items() if key != "as"})
                before = await self.store.engine.scope(asked.claims.scope_id or "")
                reply = await self.store.submit(asked)
                await self._compare(reply, asked, wanted)
                after = await self.store.engine.scope(asked.claims.scope_id or "")
                if not isinstance(reply, Admitted):
                    assert after == before, "a refusal consumed something"
                    assert await self.store.engine.execution(asked.decision_id) is None
                else:
                    assert await self.store.engine.execution(asked.decision_id) == reply.execution
                    assert after == (before if reply.scope is None else reply.scope)
                    self.executions[name] = self.last = asked.decision_id
            case _:
                await self._end(kind, what)

    async def _end(self, kind: str, what: dict[str, Any]) -> None:
        admission = self.executions[what["execution"]] if "execution" in what else self.last
        cost = to_micros(what["cost_usd"]) if "cost_usd" in what else None
        ending = Settle if kind == "settle" else Reconcile
        reply = await self.store.submit(
            ending(decision_id=new_decision_id(), admission_id=admission, outcome=what["outcome"], cost=cost)
        )
        assert isinstance(reply, Settled), reply
        assert reply.execution.status == what["outcome"]

    async def _compare(self, reply: Reply, command: Issue | Admit, wanted: dict[str, Any]) -> None:
        envelope = await self.envelope(command.decision_id)
        record = envelope["record"]
        details = record["details"]
        assert self.policies is not None
        assert details["policy_revision"] == self.policies.revision
        on_shadow_route = isinstance(command, Admit) and command.shadow
        assert details.get("route_mode") == ("shadow" if on_shadow_route else None)
        would_refuse = details.get("would_refuse", [])
        assert len(would_refuse) == len(wanted.get("would_refuse", [])), would_refuse
        for told, what in zip(would_refuse, wanted.get("would_refuse", []), strict=True):
            assert {key: told.get(key) for key in what} == what
        if "error" in wanted:
            assert isinstance(reply, Denied), reply
            self._compare_refusal(reply, envelope, wanted)
        elif isinstance(command, Issue):
            assert isinstance(reply, Issued), reply
            assert (envelope["event"], envelope["scope_id"]) == ("issued", reply.scope.scope_id)
            assert await self.store.engine.scope(reply.scope.scope_id) == reply.scope
            granted = {
                "max_attempts": reply.scope.max_attempts,
                "ttl_seconds": (reply.scope.expires_at - reply.scope.created_at) / SECOND,
                "max_cost_usd": to_dollars(reply.scope.max_cost),
            }
            assert {key: details[key] for key in granted} == granted
            for term, value in wanted.get("granted", {}).items():
                assert granted[term] == value
            assert details["rules"] == wanted.get("rules", details["rules"])
        else:
            assert isinstance(reply, Admitted), reply
            self._compare_admission(reply, envelope, wanted)
        if "error" not in wanted:
            assert (record["decision_outcome"], record["decision_reason"]) == ("selected", None)
        assert [one.to_dict() for one in getattr(reply, "shadow", ())] == (
            would_refuse if not isinstance(reply, Denied) else []
        )
        for key, value in wanted.get("details", {}).items():
            assert details[key] == value

    def _compare_refusal(self, reply: Denied, envelope: dict[str, Any], wanted: dict[str, Any]) -> None:
        refusal, record = reply.refusal, envelope["record"]
        assert refusal.code == wanted["error"], refusal
        assert envelope["event"] == "refused"
        assert record["decision_reason"] == wanted["error"]
        by_policy = wanted["error"] in POLICY_CODES
        assert record["decision_outcome"] == ("policy_blocked" if by_policy else "blocked")
        assert by_policy == ("rules" in wanted), "a case says which rules refuse, if it is rules"
        if by_policy:
            assert refusal.members["rules"] == wanted["rules"]
        assert record["details"]["rules"] == wanted.get("rules", [])
        assert ("retry_after_seconds" in refusal.members) == (wanted["error"] == "braked")
        for key, value in wanted.get("members", {}).items():
            assert refusal.members[key] == value, key
        told = {key: value for key, value in record["details"].items() if key in refusal.members}
        assert told == refusal.members
        assert refusal.members.keys() >= set(wanted.get("has", []))
        assert refusal.members.keys().isdisjoint(wanted.get("lacks", []))
        says = wanted.get("says", [])
        for words in [says] if isinstance(says, str) else says:
            assert words in refusal.message

    def _compare_admission(self, reply: Admitted, envelope: dict[str, Any], wanted: dict[str, Any]) -> None:
        details, execution = envelope["record"]["details"], reply.execution
        assert envelope["event"] == "admitted"
        assert details["rules"] == []
        consumed = execution.attempt_number is not None
        assert ((reply.scope is None), (execution.scope_id is None)) == (not consumed, not consumed)
        assert envelope["scope_id"] == (reply.scope.scope_id if reply.scope else None)
        assert details["attempt_number"] == execution.attempt_number
        assert ("scope_waived" in details) is not consumed
        found = {
            "attempt": execution.attempt_number,
            "hold_usd": to_dollars(execution.hold),
            "timeout_seconds": reply.timeout_seconds,
        }
        for key, value in found.items():
            assert value == wanted.get(key, value), key


@pytest.mark.parametrize("judged_before", [False, True], ids=["judged-within", "judged-before"])
@pytest.mark.parametrize("engine", ["memory", "sqlite"])
@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
async def test_a_policy(
    case: dict[str, Any], engine: str, judged_before: bool, open_store: OpenStore, tmp_path: Path
) -> None:
    assert case.keys() - {"starts"} == {"name", "row", "policies", "steps"}
    clock = StandingClock()
    if "starts" in case:
        clock.now = round(datetime.fromisoformat(case["starts"]).timestamp() * SECOND)
    store = await open_store(None if engine == "memory" else tmp_path / "store.db", clock=clock)
    folder = tmp_path / "policies"
    folder.mkdir()
    play = Play(store, clock, folder, judged_before)
    play.adopt(case["policies"])
    for number, step in enumerate(case["steps"]):
        try:
            await play.step(step)
        except AssertionError as exc:
            exc.add_note(f"in step {number + 1}: {step}")
            raise


def test_every_row_of_the_table_has_a_case_that_passes_and_one_that_is_refused_or_recorded() -> None:
    for row in ROWS:
        steps = [step for case in CASES if case["row"] == row for step in case["steps"]]
        asked = [step for step in steps if {"issue", "execute"} & step.keys()]
        assert any("error" not in step for step in asked), row
        assert any("error" in step or step.get("would_refuse") for step in asked), row
    assert {case["row"] for case in CASES} == ROWS


# Batches ------------------------------------------------------------------------------------------------


FIVE = PolicySet(
    revision="rev-five",
    actions={
        "restart_pod": ActionPolicy(risk=RiskClass.MEDIUM),
        "retry_agent": ActionPolicy(risk=RiskClass.LOW),
    },
    rules=(
        Rule(id="five", on="execute", brake=Brake(per=("incident_id",), max_attempts=5, window_seconds=3600)),
    ),
)


def free(policies: PolicySet = FIVE, incident_id: str = "inc_1", **options: Any) -> Admit:
    """An execution that needs no scope, so that nothing but rules can refuse it."""
    claims = Claims(incident_id=incident_id, action="restart_pod")
    return Admit(
        decision_id=new_decision_id(),
        claims=claims,
        policies=policies,
        scope_required_from=RiskClass.CRITICAL,
        **options,
    )


def end(admission_id: str, outcome: Any) -> Settle:
    return Settle(decision_id=new_decision_id(), admission_id=admission_id, outcome=outcome)


async def together(store: Store, *commands: Admit | Settle | Reconcile) -> list[Reply]:
    """Submit all of them so that they are written in one batch: the writer is held up until they wait."""
    with Gate(store) as gate:
        first = asyncio.create_task(store.submit(free(incident_id="nobody's")))
        await gate.entered.wait()
        waiting = [asyncio.create_task(store.submit(command)) for command in commands]
        await asyncio.sleep(0)
        assert store.waiting == len(commands)
        gate.free.set()
        await first
        return await asyncio.gather(*waiting)


def admitted_of(replies: list[Reply]) -> list[bool]:
    return [isinstance(reply, Admitted) for reply in replies]


@pytest.mark.parametrize("engine", ["memory", "sqlite"])
async def test_of_two_hundred_at_once_exactly_as_many_are_admitted_as_the_brake_allows(
    engine: str, open_store: OpenStore, tmp_path: Path
) -> None:
    path = None if engine == "memory" else tmp_path / "store.db"
    clock = StandingClock()
    store = await open_store(path, clock=clock)
    replies = await together(store, *(free() for _ in range(200)))
    assert admitted_of(replies) == [True] * 5 + [False] * 195
    assert {reply.refusal.code for reply in replies if isinstance(reply, Denied)} == {"braked"}
    log = await whole_log(store)
    events = [orjson.loads(row.envelope)["event"] for row in log[1:]]
    assert (events.count("admitted"), events.count("refused")) == (5, 195)
    if path is not None:
        await store.close()
        store = await open_store(path, clock=clock)
        assert admitted_of(await together(store, *(free() for _ in range(200)))) == [False] * 200
        found = (await store.engine.executions(ExecutionsWanted(), before=None, limit=1000)).rows
        assert sum(execution.incident_id == "inc_1" for execution in found) == 5
        clock.wait(3600)
        assert admitted_of(await together(store, *(free() for _ in range(9)))) == [True] * 5 + [False] * 4


async def test_a_batch_that_is_not_held_up_admits_no_more_either(store: Store) -> None:
    replies = await asyncio.gather(*(store.submit(free()) for _ in range(200)))
    assert sum(admitted_of(list(replies))) == 5


async def test_a_batch_counts_each_incident_by_itself(store: Store) -> None:
    commands = [free(incident_id=f"inc_{number % 3}") for number in range(24)]
    replies = await together(store, *commands)
    assert admitted_of(replies) == [True] * 15 + [False] * 9


async def test_a_batch_counts_under_the_policies_that_each_request_began_with(store: Store) -> None:
    (rule,) = FIVE.rules
    assert rule.brake is not None
    two = replace(FIVE, revision="rev-two", rules=(replace(rule, brake=replace(rule.brake, max_attempts=2)),))
    none = replace(FIVE, revision="rev-none", rules=())
    sets = [none, two, two, none, two, FIVE, FIVE, FIVE, none]
    replies = await together(store, *(free(policies) for policies in sets))
    assert admitted_of(replies) == [True, True, False, True, False, True, True, False, True]


@pytest.mark.parametrize("longest_first", [True, False])
async def test_a_batch_looks_as_far_back_as_any_of_its_requests_has_to(
    open_store: OpenStore, longest_first: bool
) -> None:
    (rule,) = FIVE.rules
    clock = StandingClock()
    store = await open_store(None, clock=clock)
    earlier = [free() for _ in range(5)]
    assert admitted_of(await together(store, *earlier)) == [True] * 5
    await together(store, *(end(command.decision_id, "answered") for command in earlier))
    clock.wait(1800)
    short = replace(rule, brake=Brake(per=("incident_id",), max_attempts=5, window_seconds=60))
    sets = [FIVE, replace(FIVE, rules=(short,))]
    replies = await together(store, *(free(policies) for policies in sets[:: 1 if longest_first else -1]))
    assert admitted_of(replies) == ([False, True] if longest_first else [True, False])


async def test_an_end_in_a_batch_is_seen_by_what_comes_after_it_in_the_same_batch(store: Store) -> None:
    alone = replace(
        FIVE,
        rules=(Rule(id="alone", on="execute", brake=Brake(one_in_flight=True, window_seconds=3600)),),
    )
    under_way = await store.submit(free(alone))
    assert isinstance(under_way, Admitted)

    first, second, third = free(alone), free(alone), free(alone)
    with Gate(store) as gate:
        held = asyncio.create_task(store.submit(end(under_way.execution.decision_id, "answered")))
        await gate.entered.wait()
        commands: list[Command] = [
            first,
            free(alone),
            end(first.decision_id, "not_sent"),
            second,
            end(second.decision_id, "unknown"),
            free(alone),
            Reconcile(decision_id=new_decision_id(), admission_id=second.decision_id, outcome="not_executed"),
            third,
        ]
        waiting = [asyncio.create_task(store.submit(command)) for command in commands]
        await asyncio.sleep(0)
        gate.free.set()
        await held
        replies = await asyncio.gather(*waiting)
    kinds = [Admitted, Denied, Settled, Admitted, Settled, Denied, Settled, Admitted]
    assert [type(reply) for reply in replies] == kinds


# Against the plain oracle -------------------------------------------------------------------------------


@given(rule=brake_rules(), steps=histories())
@hypothesis(max_examples=15)
async def test_the_store_counts_as_the_plain_oracle_does(rule: Rule, steps: list[Step]) -> None:
    """The rows that a transaction loads are all that a brake may count, whatever the history."""
    clock = StandingClock()
    store = Store(SqliteEngine(None), clock=clock, deadline_seconds=5.0)
    await store.open()
    try:
        history = History(policies_of(rule))
        for step in steps:
            command, allowed = history.next(step)
            if command is None:
                clock.now = history.now
                continue
            reply = await store.submit(command)
            if isinstance(command, Admit):
                assert isinstance(reply, Admitted) is allowed
            history.remember(command, reply)
    finally:
        await store.close()
