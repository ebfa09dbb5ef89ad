"""The decision list finds what a filter says, newest first, page by page, and by an index each time."""

from __future__ import annotations

import itertools
import random
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import orjson
import pytest

from sidecar.core.command import AcceptClock, Admitted, Bind, Emit, Issued, Refuse, Revoke, Settle, Turn
from sidecar.core.principal import Principal
from sidecar.core.record import CausalRole, DecisionOutcome, DecisionType, Record
from sidecar.core.scope import Execution
from sidecar.errors import Refusal
from sidecar.ids import new_decision_id
from sidecar.store import lists
from sidecar.store.base import ExecutionsWanted
from sidecar.store.batch import Store
from sidecar.store.lists import FILTERS, decisions_query, executions_query
from tests.store.conftest import OpenStore, admit, issue
from tests.store.test_verify import tamper
from tests.support import SECOND, Clock

VALUES = {
    "type": ("policy", "routing", "budget"),
    "outcome": ("selected", "blocked", "none"),
    "event": ("emitted", "refused", "issued"),
    "scope_id": ("scope_none", "scope_other"),
    "incident_id": ("inc_1", "inc_9"),
    "action": ("failover", "none"),
    "request_id": ("req", "req_a", "req_b"),
    "run_id": ("run_1", "run_2"),
    "tenant_id": ("default", "acme"),
}


@pytest.fixture
async def filled(store: Store) -> Store:
    """A log of a hundred records of every sort, some of them with a run that came later."""
    chance = random.Random(7)
    await store.submit(issue())
    await store.submit(issue(tenant_id="acme"))
    for _ in range(10):
        await store.submit(admit("scope_none", tenant_id=chance.choice(VALUES["tenant_id"])))
        await store.submit(Refuse(decision_id=new_decision_id(), refusal=Refusal("invalid_request", "x")))
    for _ in range(70):
        await store.submit(
            Emit(
                origin="library",
                record=Record(
                    decision_id=new_decision_id(),
                    decision_type=DecisionType(chance.choice(VALUES["type"])),
                    decision_outcome=DecisionOutcome(chance.choice(VALUES["outcome"])),
                    decided_at=chance.randrange(10**15),
                    request_id=chance.choice((None, "req_a", "req_b")),
                    run_id=chance.choice((None, None, "run_1")),
                    tenant_id=chance.choice(VALUES["tenant_id"]),
                    causal_role=chance.choice((CausalRole.PRE_RUN, CausalRole.IN_RUN)),
                ),
            )
        )
    await store.submit(Bind(request_id="req_a", run_id="run_1"))
    await store.submit(Bind(request_id="req_b", run_id="run_2"))
    await store.submit(
        Turn(
            decision_id=new_decision_id(),
            switch="care_kill_switch",
            on=True,
            origin="api",
            principal=Principal(id="p"),
        )
    )
    return store


async def every(
    store: Store, filters: dict[str, str], limit: int, since: int | None = None
) -> list[dict[str, Any]]:
    """All records that a filter finds, over pages of `limit`, as the admin interface shows them."""
    found: list[dict[str, Any]] = []
    before: str | None = None
    while True:
        page = await store.engine.decisions(filters, since=since, before=before, limit=limit)
        assert len(page.rows) <= limit
        for row in page.rows:
            envelope = orjson.loads(row.envelope)
            record = envelope["record"]
            record["run_id"] = record["run_id"] or row.bound_run_id
            found.append({**record, **envelope, "type": record["decision_type"]})
        if page.next is None:
            return found
        before = page.next


async def test_every_combination_of_filters_finds_exactly_what_it_says(filled: Store) -> None:
    whole = await every(filled, {}, 1000)
    assert [record["seq"] for record in whole] == list(range(len(whole), 0, -1))
    shown = {**FILTERS, "type": "type"}
    some = 0
    for size in range(1, 4):
        for names in itertools.combinations(VALUES, size):
            for values in itertools.product(*(VALUES[name] for name in names)):
                filters = dict(zip(names, values, strict=True))
                wanted = [
                    record
                    for record in whole
                    if all(record[shown[name]] == value for name, value in filters.items())
                ]
                assert await every(filled, filters, 1000) == wanted, filters
                some += len(wanted)
    assert some > 1000


async def test_pages_join_without_a_gap_or_an_overlap(filled: Store) -> None:
    for filters in ({}, {"type": "routing"}, {"tenant_id": "acme"}, {"run_id": "run_1"}):
        assert await every(filled, filters, 3) == await every(filled, filters, 1000)


async def test_every_filter_is_served_by_an_index(open_store: OpenStore, tmp_path: Path) -> None:
    await open_store(tmp_path / "log.db")
    with closing(sqlite3.connect(f"file:{tmp_path / 'log.db'}?mode=ro", uri=True)) as connection:
        for size in range(len(FILTERS) + 1):
            for names in itertools.combinations(FILTERS, size):
                sql, parameters = decisions_query(dict.fromkeys(names, "x"), 1 << 62, 101)
                plan = connection.execute(f"EXPLAIN QUERY PLAN {sql}", parameters).fetchall()
                steps = [step for *_, step in plan]
                unserved = [step for step in steps if step.startswith("SCAN") and "SUBQUERY" not in step]
                # Found are sequence numbers; nothing may read the whole log to find them.
                assert [step for step in unserved if not step.startswith("SCAN (")] == [], (names, steps)


async def test_a_scope_finds_all_its_records_whatever_incident_they_name(store: Store) -> None:
    scopes = []
    for _ in range(2):
        reply = await store.submit(issue())
        assert isinstance(reply, Issued)
        scopes.append(reply.scope.scope_id)
    for scope_id in scopes:
        outcomes: tuple[Literal["answered", "unknown"], ...] = ("answered", "unknown")
        for outcome in outcomes:
            admitted = await store.submit(admit(scope_id))
            assert isinstance(admitted, Admitted)
            await store.submit(
                Settle(
                    decision_id=new_decision_id(),
                    admission_id=admitted.execution.decision_id,
                    outcome=outcome,
                )
            )
        elsewhere = replace(admit(scope_id).claims, incident_id="inc_other")
        await store.submit(replace(admit(scope_id), claims=elsewhere))
        await store.submit(Revoke(decision_id=new_decision_id(), scope_id=scope_id))
    whole = await every(store, {}, 100)
    for scope_id in scopes:
        wanted = [record for record in whole if record["scope_id"] == scope_id]
        assert [record["event"] for record in reversed(wanted)] == [
            "issued", "admitted", "settled", "admitted", "settled", "refused", "revoked"
        ]  # fmt: skip
        for limit in (1, 2, 100):
            assert await every(store, {"scope_id": scope_id}, limit) == wanted
        executed = await store.engine.executions_of(scope_id)
        # Within a millisecond, ids have no order.
        assert [one.decision_id for one in executed] == sorted(
            record["decision_id"] for record in wanted if record["event"] == "admitted"
        )
    assert await every(store, {"scope_id": "scope_that_is_none"}, 100) == []


# A time, and what no index serves -------------------------------------------------------------------------


async def test_a_time_finds_the_records_from_then_on(store: Store, clock: Clock) -> None:
    times = []
    for _ in range(5):
        times.append(store.now())
        await store.submit(issue())
        clock.move(60)
    whole = await every(store, {}, 100)
    for number, time in enumerate(times):
        for filters in ({}, {"event": "issued"}, {"incident_id": "inc_1"}, {"tenant_id": "default"}):
            assert await every(store, filters, 2, since=time) == whole[: 5 - number]
    assert await every(store, {}, 100, since=0) == whole
    assert await every(store, {}, 100, since=store.now()) == []


async def test_a_log_from_which_records_were_taken_can_still_be_looked_at(
    open_store: OpenStore, tmp_path: Path, clock: Clock
) -> None:
    path = tmp_path / "log.db"
    store = await open_store(path)
    begun = store.now()
    for _ in range(9):
        await store.submit(issue())
        clock.move(60)
    await store.close()
    tamper(path, "DELETE FROM decisions WHERE seq IN (1, 4, 5, 6)")
    store = await open_store(path)
    for minutes, seqs in ((0, [9, 8, 7, 3, 2]), (4, [9, 8, 7]), (7, [9, 8]), (10, [])):
        found = await every(store, {}, 100, since=begun + minutes * 60 * SECOND)
        assert [record["seq"] for record in found] == seqs
    assert (await store.engine.footprint(store.now())).growth_per_day


async def test_a_time_finds_the_records_before_and_after_a_clock_was_set_back(
    store: Store, clock: Clock
) -> None:
    begun = store.now()
    await store.submit(issue())
    clock.move(3_600)
    await store.submit(issue())
    clock.set(-3_600)
    await store.submit(AcceptClock(decision_id=new_decision_id()))
    await store.submit(issue())
    seqs = {record["seq"] for record in await every(store, {}, 100, since=begun + 1_800 * SECOND)}
    assert seqs == {2}
    assert len(await every(store, {}, 100, since=begun)) == 4
    clock.move(7_200)
    await store.submit(issue())
    seqs = {record["seq"] for record in await every(store, {}, 100, since=begun + 1_800 * SECOND)}
    assert seqs == {2, 5}


@pytest.mark.parametrize("limit", [1, 3, 1000])
async def test_an_action_is_found_piece_by_piece(
    filled: Store, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    combinations = (
        {"action": "failover"},
        {"action": "failover", "event": "admitted"},
        {"action": "failover", "tenant_id": "acme"},
        {"action": "none"},
    )
    whole = [await every(filled, filters, 1000) for filters in combinations]
    assert len(whole[0]) == 10
    monkeypatch.setattr(lists, "LOOKED_AT", 7)
    assert [await every(filled, filters, limit) for filters in combinations] == whole
    page = await filled.engine.decisions({"action": "none"}, before=None, limit=100)
    assert page.rows == []
    assert page.next is not None
    recent = await filled.engine.decisions(
        {"action": "none"}, since=filled.now() + SECOND, before=None, limit=100
    )
    assert (recent.rows, recent.next) == ([], None)


# Executions -----------------------------------------------------------------------------------------------


@pytest.fixture
async def executed(store: Store, clock: Clock) -> Store:
    """Forty executions in two incidents of two tenants, a minute apart; half of them have ended."""
    chance = random.Random(7)
    for number in range(40):
        tenant, incident = chance.choice(("default", "acme")), chance.choice(("inc_1", "inc_2"))
        granted = issue(tenant_id=tenant, incident_id=incident)
        await store.submit(granted)
        action = chance.choice(("failover", "retry_agent"))
        command = admit(granted.scope.scope_id, action, tenant_id=tenant)
        command = replace(command, claims=replace(command.claims, incident_id=incident))
        reply = await store.submit(command)
        assert isinstance(reply, Admitted)
        if number % 2:
            outcome: Literal["answered", "unknown"] = chance.choice(("answered", "unknown"))
            settle = Settle(decision_id=new_decision_id(), admission_id=command.decision_id, outcome=outcome)
            await store.submit(settle)
        clock.move(60)
    return store


async def every_execution(store: Store, wanted: ExecutionsWanted, limit: int) -> list[Execution]:
    found: list[Execution] = []
    before: str | None = None
    while True:
        page = await store.engine.executions(wanted, before=before, limit=limit)
        assert len(page.rows) <= limit
        found += page.rows
        if page.next is None:
            return found
        before = page.next


@pytest.mark.parametrize(("limit", "piece"), [(1000, 20_000), (3, 20_000), (3, 5), (1000, 5), (5, 5)])
async def test_every_combination_of_filters_finds_exactly_those_executions(
    executed: Store, monkeypatch: pytest.MonkeyPatch, limit: int, piece: int
) -> None:
    monkeypatch.setattr(lists, "LOOKED_AT", piece)
    whole = await every_execution(executed, ExecutionsWanted(), 1000)
    assert [one.decision_id for one in whole] == sorted((one.decision_id for one in whole), reverse=True)
    middle = sorted(one.admitted_at for one in whole)[20]
    values: dict[str, tuple[Any, ...]] = {
        "status": (None, "answered", "unknown", "in_flight"),
        "incident_id": (None, "inc_1", "inc_9"),
        "action": (None, "failover", "none"),
        "since": (None, middle, middle + 10**12),
    }
    for chosen in itertools.product(*values.values()):
        filters = dict(zip(values, chosen, strict=True))
        expected = [
            one
            for one in whole
            if all(
                value is None
                or (one.admitted_at >= value if name == "since" else getattr(one, name) == value)
                for name, value in filters.items()
            )
        ]
        assert await every_execution(executed, ExecutionsWanted(**filters), limit) == expected, filters


async def test_no_list_of_executions_reads_all_of_them(open_store: OpenStore, tmp_path: Path) -> None:
    await open_store(tmp_path / "log.db")
    with closing(sqlite3.connect(f"file:{tmp_path / 'log.db'}?mode=ro", uri=True)) as connection:
        for chosen in itertools.product((None, "unknown", "answered"), (None, "x"), (None, "x"), (None, 1)):
            status, incident, action, since = chosen
            wanted = ExecutionsWanted(status=status, incident_id=incident, action=action, since=since)
            sql, parameters = executions_query(wanted, "~", 101)
            plan = connection.execute(f"EXPLAIN QUERY PLAN {sql}", parameters).fetchall()
            steps = [step for *_, step in plan]
            assert [step for step in steps if step.startswith("SCAN executions")] == [], (wanted, steps)
            if incident is None:
                assert "USE TEMP B-TREE FOR ORDER BY" not in steps, (wanted, steps)
            if status == "unknown" and incident is None:
                assert any("executions_not_answered" in step for step in steps), (wanted, steps)
