"""The decision list finds what a filter says, newest first, page by page, and by an index each time."""

from __future__ import annotations

import itertools
import random
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import orjson
import pytest

from sidecar.core.command import Bind, Emit, Refuse, Turn
from sidecar.core.record import CausalRole, DecisionOutcome, DecisionType, Record
from sidecar.errors import Refusal
from sidecar.ids import new_decision_id
from sidecar.store.batch import Store
from sidecar.store.lists import FILTERS, decisions_query
from tests.store.conftest import OpenStore, admit, issue

VALUES = {
    "type": ("policy", "routing", "budget"),
    "outcome": ("selected", "blocked", "none"),
    "event": ("emitted", "refused", "issued"),
    "scope_id": ("scope_none", "scope_other"),
    "incident_id": ("inc_1", "inc_9"),
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
        Turn(decision_id=new_decision_id(), switch="care_kill_switch", on=True, origin="api", principal="p")
    )
    return store


async def every(store: Store, filters: dict[str, str], limit: int) -> list[dict[str, Any]]:
    """All records that a filter finds, over pages of `limit`, as the admin interface shows them."""
    found: list[dict[str, Any]] = []
    before: str | None = None
    while True:
        page = await store.engine.decisions(filters, before=before, limit=limit)
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
