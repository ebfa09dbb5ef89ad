"""What brakes count is read once and then known; whatever happens, it is what the database holds."""

from __future__ import annotations

import random
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest

from sidecar.core.brakes import AdmissionGroup
from sidecar.core.command import Admitted, Denied, Issued, Reconcile, Report, Settle, SettledOutcome
from sidecar.core.policy import Brake, Match, PolicySet, Rule
from sidecar.core.principal import Principal
from sidecar.core.scope import UNDER_WAY, Execution
from sidecar.core.state import Names, State
from sidecar.ids import new_decision_id
from sidecar.store import _admission_cache as admission_cache
from sidecar.store.batch import Store
from sidecar.store.sqlite import SqliteEngine, counted, counted_query
from tests.store.conftest import OpenStore, admit, issue
from tests.support import POLICIES, Clock

OUTCOMES: tuple[SettledOutcome, ...] = ("answered", "not_sent", "unknown", "running")
REPORTS: tuple[Literal["succeeded", "failed", "not_executed"], ...] = ("succeeded", "failed", "not_executed")
TOKEN = bytes(32)


def braked(count: int, window: int = 60, **options: Any) -> PolicySet:
    brakes = (
        Brake(max_attempts=count, window_seconds=window, **options),
        Brake(per=("action",), max_attempts=10 * count, window_seconds=3 * window),
        Brake(per=("incident_id", "action"), max_attempts=10 * count, window_seconds=window),
    )
    rules = tuple(
        Rule(id=f"brake-{number}", on="execute", brake=brake) for number, brake in enumerate(brakes)
    )
    return replace(POLICIES, rules=rules)


async def granted(store: Store) -> str:
    reply = await store.submit(issue(max_attempts=1_000_000, max_cost=10**12))
    assert isinstance(reply, Issued)
    return reply.scope.scope_id


def held_against_the_database(store: Store, path: Path) -> int:
    """How many groups the writer knows; each is compared with what a query finds."""
    assert isinstance(store.engine, SqliteEngine)
    known = store.engine._admissions
    with closing(sqlite3.connect(path)) as connection:
        for group, kept in known._groups.items():
            stored = counted(connection, group, kept.since)
            # Of what is older than asked for, the query only wants what is under way.
            counting = [
                one
                for one in (known._executions[name] for name in kept.names)
                if one.status != "not_sent" and (one.admitted_at > kept.since or one.status in UNDER_WAY)
            ]
            assert counting == stored
    return len(known._groups)


async def test_what_the_writer_knows_is_what_the_database_holds(
    open_store: OpenStore, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission_cache, "REQUESTS_PER_CHECK", 3)
    dice = random.Random(7)
    path = tmp_path / "store.db"
    store = await open_store(path)
    scope_id = await granted(store)
    policies = braked(8)
    flying: list[str] = []
    settled: list[str] = []
    answers = set()
    for _ in range(400):
        step = dice.random()
        if step < 0.6:
            action = dice.choice(["failover", "retry_agent"])
            command = admit(scope_id, action, report_token=TOKEN, report_seconds=200)
            reply = await store.submit(replace(command, policies=policies))
            answers.add(type(reply))
            if isinstance(reply, Admitted):
                flying.append(reply.execution.decision_id)
        elif step < 0.8 and flying:
            admission = flying.pop(dice.randrange(len(flying)))
            settled.append(admission)
            await store.submit(
                Settle(decision_id=new_decision_id(), admission_id=admission, outcome=dice.choice(OUTCOMES))
            )
        elif step < 0.85 and settled:
            await store.submit(
                Report(
                    decision_id=new_decision_id(),
                    admission_id=settled.pop(dice.randrange(len(settled))),
                    token_sha256=TOKEN,
                    outcome=dice.choice(REPORTS),
                )
            )
        else:
            clock.move(dice.choice([1, 7, 40]))
        held_against_the_database(store, path)
    assert answers == {Admitted, Denied}
    assert held_against_the_database(store, path) == 5


async def test_brakes_that_look_back_differently_far_do_not_make_each_other_read_again(
    open_store: OpenStore, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission_cache, "REQUESTS_PER_CHECK", 8)
    store = await open_store(tmp_path / "store.db")
    assert isinstance(store.engine, SqliteEngine)
    known = store.engine._admissions
    scope_id = await granted(store)
    everything = Brake(max_attempts=1_000, window_seconds=3_600)
    lately = Brake(max_attempts=1_000, window_seconds=10)
    rules = (
        Rule(id="far", on="execute", match=Match(action=("failover",)), brake=everything),
        Rule(id="near", on="execute", match=Match(action=("retry_agent",)), brake=lately),
    )
    policies = replace(POLICIES, rules=rules)

    async def execute(*actions: str) -> list[str]:
        for action in actions:
            reply = await store.submit(replace(admit(scope_id, action), policies=policies))
            assert isinstance(reply, Admitted)
            name = reply.execution.decision_id
            await store.submit(Settle(decision_id=new_decision_id(), admission_id=name, outcome="answered"))
            clock.move(5)
        return known._groups[AdmissionGroup()].names

    names = await execute(*["failover", "retry_agent"] * 20)
    assert len(names) == 40
    assert names is known._groups[AdmissionGroup()].names
    # Once only the near one asks, what it does not need is let go.
    assert len(await execute(*["retry_agent"] * 20)) < 40


async def test_what_was_not_committed_is_forgotten(open_store: OpenStore, tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    store = await open_store(path)
    scope_id = await granted(store)
    command = replace(admit(scope_id), policies=braked(2))
    assert isinstance(await store.submit(command), Admitted)

    def fail(state: State) -> Any:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        await store.engine.transact(Names(groups={AdmissionGroup(): 0}), fail, durable=True)
    assert held_against_the_database(store, path) == 0
    # The same decision twice breaks a constraint, after it was decided on.
    with pytest.raises(Exception, match="UNIQUE"):
        await store.submit(command)
    assert held_against_the_database(store, path) == 0
    replies = [await store.submit(replace(admit(scope_id), policies=braked(2))) for _ in range(2)]
    assert [type(reply) for reply in replies] == [Admitted, Denied]


async def test_an_execution_reconciled_long_after_its_admission_does_not_hide_younger_ones(
    open_store: OpenStore, tmp_path: Path, clock: Clock
) -> None:
    store = await open_store(tmp_path / "store.db")
    scope_id = await granted(store)
    old = await store.submit(admit(scope_id))
    assert isinstance(old, Admitted)
    name = old.execution.decision_id
    await store.submit(Settle(decision_id=new_decision_id(), admission_id=name, outcome="unknown"))
    clock.move(600)
    limited = replace(admit(await granted(store)), policies=braked(2))
    first = await store.submit(replace(limited, decision_id=new_decision_id()))
    await store.submit(
        Reconcile(
            decision_id=new_decision_id(), admission_id=name, outcome="executed", principal=Principal(id="p")
        )
    )
    held_against_the_database(store, tmp_path / "store.db")
    others = [await store.submit(replace(limited, decision_id=new_decision_id())) for _ in range(2)]
    assert [type(reply) for reply in (first, *others)] == [Admitted, Admitted, Denied]


async def test_more_than_can_be_kept_is_read_again(
    open_store: OpenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission_cache, "MAX_GROUPS", 1)
    store = await open_store(tmp_path / "store.db")
    scope_id = await granted(store)
    replies = [await store.submit(replace(admit(scope_id), policies=braked(5))) for _ in range(8)]
    assert [type(reply) for reply in replies] == [Admitted] * 5 + [Denied] * 3


def test_what_a_batch_adds_lies_over_what_is_cached_and_does_not_change_it() -> None:
    cached = {"e-1": executed("e-1"), "e-2": executed("e-2")}
    names = list(cached)
    executions, grown = admission_cache.Overlaid(cached), admission_cache.Grown(names)
    executions["e-2"] = replace(cached["e-2"], status="answered")
    executions["e-3"] = executed("e-3")
    grown.append("e-3")
    assert [executions[name].status for name in grown] == ["in_flight", "answered", "in_flight"]
    assert (len(grown), grown[2], executions.get("e-1"), executions.get("none")) == (
        3,
        "e-3",
        cached["e-1"],
        None,
    )
    assert (names, cached["e-2"].status, list(cached)) == (["e-1", "e-2"], "in_flight", ["e-1", "e-2"])
    with pytest.raises(KeyError):
        executions["none"]
    # What the cache learns later is seen as well.
    cached["e-4"] = executed("e-4")
    assert executions["e-4"] is cached["e-4"]


def executed(name: str) -> Execution:
    return Execution(
        decision_id=name,
        scope_id=None,
        tenant_id="default",
        incident_id="inc_1",
        action="failover",
        request_id="r",
        attempt_number=None,
        hold=0,
        admitted_at=0,
    )


async def test_the_counts_of_many_incidents_are_bounded(
    open_store: OpenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission_cache, "MAX_COUNTS", 8)
    store = await open_store(tmp_path / "store.db")
    assert isinstance(store.engine, SqliteEngine)
    together = Brake(max_attempts=9, window_seconds=60)
    separately = replace(together, per=("incident_id",))
    rules = tuple(Rule(id=f"{each.per}", on="execute", brake=each) for each in (together, separately))
    policies, counts = replace(POLICIES, rules=rules), []
    for number in range(20):
        command = admit(None, shadow=True)
        claims = replace(command.claims, incident_id=f"incident-{number}")
        reply = await store.submit(replace(command, claims=claims, policies=policies))
        assert isinstance(reply, Admitted)
        counts.append(len(store.engine._admissions.found))
    # The brake without facets has one count for all incidents.
    assert counts[:3] == [2, 3, 4]
    assert max(counts) <= 9


@pytest.mark.parametrize(
    ("group", "index"),
    [
        (AdmissionGroup(), "executions_by_time"),
        (AdmissionGroup(action="failover"), "executions_by_action"),
        (AdmissionGroup(tenant_id="default", incident_id="inc_1"), "executions_by_incident"),
        (
            AdmissionGroup(tenant_id="default", incident_id="inc_1", action="failover"),
            "executions_by_incident",
        ),
    ],
)
async def test_each_group_is_read_by_its_index_and_what_is_in_flight_by_another(
    open_store: OpenStore, tmp_path: Path, group: AdmissionGroup, index: str
) -> None:
    await open_store(tmp_path / "store.db")
    with closing(sqlite3.connect(tmp_path / "store.db")) as connection:
        sql, parameters = counted_query(group, 1)
        plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {sql}", parameters)]
    searches = [line for line in plan if line.startswith("SEARCH")]
    assert len(searches) == 2, plan
    assert any(index in line and "admitted_at>?" in line for line in searches), plan
    assert any("executions_not_answered" in line and "status=?" in line for line in searches), plan
