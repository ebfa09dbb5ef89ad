"""Any sequence of commands keeps the invariants of a scope, and agrees with a model that only counts.

Answers, reports, time limits, crashes and operators end executions in any order.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.core.command import (
    Admitted,
    Command,
    Denied,
    Issued,
    Lapse,
    NotInFlight,
    Reconcile,
    Repeated,
    Report,
    Revoke,
    Settle,
    Settled,
)
from sidecar.core.policy import ActionPolicy, PolicySet, RiskClass
from sidecar.core.scope import Scope
from sidecar.ids import new_decision_id
from sidecar.store.batch import Store
from sidecar.store.crash import account_for_crash
from sidecar.store.sqlite import SqliteEngine
from sidecar.store.verify import verify_sqlite
from tests.store.conftest import admit, issue
from tests.support import SECOND

HOLDS = {"free": 0, "cheap": 100_000, "dear": 300_000}
POLICIES = PolicySet(
    revision="model",
    actions={name: ActionPolicy(risk=RiskClass.LOW, hold=hold) for name, hold in HOLDS.items()},
)
# The scopes are granted while no action holds anything, so that an execution may hold more than the ceiling.
GRANTING = PolicySet(revision="before", actions={name: ActionPolicy(risk=RiskClass.LOW) for name in HOLDS})
TTL = 60
REPORT_SECONDS = 40
OPEN = ("in_flight", "running", "unknown")
KNOWN = ("answered", "executed", "succeeded", "failed")

TOKEN = sha256(b"a token").digest()

Step = tuple[Any, ...]

steps = st.lists(
    st.one_of(
        st.tuples(st.just("admit"), st.sampled_from(sorted(HOLDS))),
        st.tuples(st.just("admit"), st.sampled_from(sorted(HOLDS))),
        st.tuples(
            st.just("settle"),
            st.integers(0, 5),
            st.sampled_from(["answered", "not_sent", "unknown", "running", "running", "not_executed"]),
            st.sampled_from([None, 0, 1, 100_000, 100_001, 300_000]),
        ),
        st.tuples(
            st.just("reconcile"),
            st.integers(0, 5),
            st.sampled_from(["executed", "not_executed"]),
            st.sampled_from([None, 0, 50_000, 400_000]),
        ),
        st.tuples(
            st.just("report"),
            st.integers(0, 5),
            st.sampled_from(["succeeded", "failed", "not_executed"]),
            st.sampled_from([None, 0, 50_000, 400_000]),
        ),
        st.tuples(st.just("lapse"), st.integers(0, 5)),
        st.tuples(st.just("crash")),
        st.tuples(st.just("revoke")),
        st.tuples(st.just("wait"), st.sampled_from([1, 25, 60])),
    ),
    max_size=24,
)
terms = st.fixed_dictionaries(
    {"max_attempts": st.integers(1, 4), "max_cost": st.sampled_from([0, 100_000, 300_000, 10**8])}
)


@dataclass
class Model:
    """What a scope is worth, by counting its executions."""

    max_attempts: int
    max_cost: int
    expires_at: int
    revoked: bool = False
    executions: list[dict[str, Any]] = field(default_factory=list)

    @property
    def used(self) -> int:
        return sum(each["status"] not in ("not_sent", "not_executed") for each in self.executions)

    @property
    def held(self) -> int:
        return sum(each["hold"] for each in self.executions if each["status"] in OPEN)

    @property
    def settled(self) -> int:
        return sum(each["cost"] for each in self.executions if each["status"] in KNOWN)

    @property
    def overrun(self) -> bool:
        return any(0 < each["hold"] < each["cost"] for each in self.executions if each["status"] in KNOWN)

    @property
    def cost_exhausted(self) -> bool:
        return self.overrun or 0 < self.max_cost <= self.settled + self.held

    def refusal(self, hold: int, now: int) -> str | None:
        if self.revoked:
            return "scope_revoked"
        if now >= self.expires_at:
            return "scope_expired"
        if self.used >= self.max_attempts:
            return "max_attempts"
        if self.cost_exhausted or self.settled + self.held + hold > self.max_cost:
            return "max_cost_usd"
        return None


@dataclass
class StandingClock:
    """A clock that stands still until it is told to go on."""

    now: int

    def __call__(self) -> int:
        return self.now


class Run:
    """One scope in a store, and its model beside it."""

    def __init__(self, store: Store, scope: Scope, clock: StandingClock) -> None:
        self.store = store
        self.clock = clock
        self.scope_id = scope.scope_id
        self.model = Model(scope.max_attempts, scope.max_cost, scope.expires_at)
        self.now = scope.created_at

    async def step(self, step: Step) -> None:
        match step:
            case ("wait", seconds):
                self.now += seconds * SECOND
                self.clock.now = self.now
            case ("admit", action):
                await self.admit(action)
            case ("settle" | "reconcile", number, outcome, cost) if self.model.executions:
                await self.end(step[0], number, outcome, cost)
            case ("report", number, outcome, cost) if self.model.executions:
                await self.report(number, outcome, cost)
            case ("lapse", number) if self.model.executions:
                await self.lapse(number)
            case ("crash",):
                await account_for_crash(self.store)
                for execution in self.model.executions:
                    if execution["status"] == "in_flight":
                        execution["status"] = "unknown"
            case ("revoke",):
                await self.store.submit(Revoke(decision_id=new_decision_id(), scope_id=self.scope_id))
                self.model.revoked = True
        await self.compare()

    async def admit(self, action: str) -> None:
        command = admit(self.scope_id, action)
        command = replace(command, policies=POLICIES, report_token=TOKEN, report_seconds=REPORT_SECONDS)
        reply = await self.store.submit(command)
        expected = self.model.refusal(HOLDS[action], self.now)
        if expected is None:
            assert isinstance(reply, Admitted), reply
            held = self.model.settled + self.model.held + HOLDS[action]
            assert held <= self.model.max_cost
            self.model.executions.append(
                {
                    "id": command.decision_id,
                    "hold": HOLDS[action],
                    "status": "in_flight",
                    "cost": None,
                    "report_by": self.now + REPORT_SECONDS * SECOND,
                    "token": True,
                }
            )
        else:
            assert isinstance(reply, Denied), reply
            assert reply.refusal.members.get("bound", reply.refusal.code) == expected

    async def end(self, kind: str, number: int, outcome: Any, cost: int | None) -> None:
        execution = self.model.executions[number % len(self.model.executions)]
        decision_id = new_decision_id()
        command: Command
        if kind == "settle":
            command = Settle(
                decision_id=decision_id, admission_id=execution["id"], outcome=outcome, cost=cost
            )
            wanted = {"in_flight"}
        else:
            command = Reconcile(
                decision_id=decision_id, admission_id=execution["id"], outcome=outcome, cost=cost
            )
            wanted = {"unknown", "running"}
        reply = await self.store.submit(command)
        if execution["status"] not in wanted:
            assert isinstance(reply, NotInFlight | Denied), reply
            return
        assert isinstance(reply, Settled), reply
        if outcome == "running" and self.now >= execution["report_by"]:
            outcome = "unknown"
        if kind == "reconcile":
            execution["token"] = False
        ends(execution, outcome, cost)

    async def report(self, number: int, outcome: Any, cost: int | None) -> None:
        execution = self.model.executions[number % len(self.model.executions)]
        reply = await self.store.submit(
            Report(
                decision_id=new_decision_id(),
                admission_id=execution["id"],
                token_sha256=TOKEN,
                outcome=outcome,
                cost=cost,
            )
        )
        before = (execution["status"], execution["cost"])
        final = 0 if outcome == "not_executed" else execution["hold"] if cost is None else cost
        valid = execution["token"] and execution["status"] != "not_sent" and self.now < execution["report_by"]
        if not valid:
            assert isinstance(reply, Denied)
            assert reply.refusal.code == "completion_refused"
        elif execution["status"] in OPEN:
            assert isinstance(reply, Settled), reply
            ends(execution, outcome, cost)
        elif before == (outcome, final):
            assert isinstance(reply, Repeated), reply
        else:
            assert isinstance(reply, Denied)
            assert reply.refusal.code == "completion_conflict"

    async def lapse(self, number: int) -> None:
        execution = self.model.executions[number % len(self.model.executions)]
        reply = await self.store.submit(Lapse(decision_id=new_decision_id(), admission_id=execution["id"]))
        if execution["status"] == "running" and self.now >= execution["report_by"]:
            assert isinstance(reply, Settled)
            ends(execution, "unknown", None)
        else:
            assert isinstance(reply, NotInFlight)

    async def compare(self) -> None:
        scope = await self.store.engine.scope(self.scope_id)
        assert scope is not None
        model = self.model
        assert scope.attempts_used == model.used <= model.max_attempts
        assert scope.held == model.held
        assert scope.settled == model.settled
        assert scope.overrun == model.overrun
        status = scope.status(self.now)
        if model.used >= model.max_attempts or model.cost_exhausted:
            assert status == "exhausted"
        elif model.revoked:
            assert status in ("revoked", "expired")
        else:
            assert status == ("expired" if self.now >= model.expires_at else "active")


def ends(execution: dict[str, Any], outcome: str, cost: int | None) -> None:
    execution["status"] = outcome
    if outcome in KNOWN:
        execution["cost"] = execution["hold"] if cost is None else cost
    elif outcome in ("not_sent", "not_executed"):
        execution["cost"] = 0


async def run_through(path: Path | None, wanted: dict[str, int], through: Sequence[Step]) -> None:
    clock = StandingClock(1_700_000_000 * SECOND)
    store = Store(SqliteEngine(path), clock=clock, deadline_seconds=5)
    await store.open()
    try:
        command = issue(allowed_actions=tuple(HOLDS), ttl=TTL, **wanted)
        command = replace(command, policies=GRANTING)
        reply = await store.submit(command)
        assert isinstance(reply, Issued)
        run = Run(store, reply.scope, clock)
        for step in through:
            await run.step(step)
    finally:
        await store.close()


@settings(max_examples=120, deadline=None)
@given(terms, steps)
def test_any_commands_keep_the_invariants_in_memory(wanted: dict[str, int], through: list[Step]) -> None:
    asyncio.run(run_through(None, wanted, through))


@settings(max_examples=20, deadline=None)
@given(terms, steps)
def test_any_commands_keep_the_invariants_in_a_file_and_leave_a_true_log(
    wanted: dict[str, int], through: list[Step]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.db"
        asyncio.run(run_through(path, wanted, through))
        verify_sqlite(path)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 6),
    st.sampled_from([100_000, 300_000, 350_000, 10**8]),
    st.lists(st.sampled_from(["free", "cheap", "dear"]), min_size=1, max_size=40),
)
def test_admissions_at_once_never_pass_a_bound(attempts: int, ceiling: int, actions: list[str]) -> None:
    async def all_at_once() -> None:
        store = Store(SqliteEngine(None), clock=lambda: 1_700_000_000 * SECOND, deadline_seconds=5)
        await store.open()
        try:
            grant = issue(allowed_actions=tuple(HOLDS), max_attempts=attempts, max_cost=ceiling)
            grant = replace(grant, policies=GRANTING)
            issued = await store.submit(grant)
            assert isinstance(issued, Issued)
            commands = [
                replace(admit(issued.scope.scope_id, action), policies=POLICIES) for action in actions
            ]
            replies = await asyncio.gather(*(store.submit(command) for command in commands))
            admitted = [reply for reply in replies if isinstance(reply, Admitted)]
            assert len(admitted) <= attempts
            assert sum(reply.execution.hold for reply in admitted) <= ceiling
            numbers = [reply.execution.attempt_number for reply in admitted]
            assert numbers == list(range(1, len(admitted) + 1))
            assert (await store.engine.decisions({}, before=None, limit=1000)).next is None
        finally:
            await store.close()

    asyncio.run(all_at_once())
