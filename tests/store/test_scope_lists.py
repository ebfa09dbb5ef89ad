"""The list of all scopes finds what a filter says, newest first, by pages, and looks at a piece at a time."""

from __future__ import annotations

import itertools
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sidecar.core.command import Revoke
from sidecar.core.scope import Scope
from sidecar.ids import new_decision_id
from sidecar.store import lists
from sidecar.store.base import ScopesWanted
from sidecar.store.batch import Store
from sidecar.store.lists import scopes_query
from tests.store.conftest import OpenStore, admit, issue
from tests.support import Clock

STATUSES = ("active", "exhausted", "expired", "revoked")


@pytest.fixture
async def filled(store: Store, clock: Clock) -> Store:
    """Scopes of three incidents and two tenants, of every status; the lifetime of some is over."""
    for number, (tenant, incident) in enumerate(
        itertools.product(("default", "acme"), ("inc_1", "inc_2", "inc_3"))
    ):
        for kind in STATUSES:
            ttl = 60 if kind == "expired" or number == 0 else 3600
            command = issue(tenant_id=tenant, incident_id=incident, max_attempts=1, ttl=ttl)
            await store.submit(command)
            scope_id = command.scope.scope_id
            if kind == "exhausted" and incident == "inc_1":
                await store.submit(admit(scope_id, tenant_id=tenant))
            if kind == "revoked":
                revoke = Revoke(
                    decision_id=new_decision_id(), scope_id=scope_id, policy_revision=None, tenant_id=tenant
                )
                await store.submit(revoke)
    clock.move(100)
    return store


async def every(store: Store, limit: int, **wanted: Any) -> list[Scope]:
    """All scopes that a filter finds, over pages of `limit`."""
    found: list[Scope] = []
    before: str | None = None
    while True:
        page = await store.engine.scopes_wanted(
            ScopesWanted(**wanted, now=store.now()), before=before, limit=limit
        )
        assert len(page.rows) <= limit
        found += page.rows
        if page.next is None:
            return found
        assert before is None or int(page.next) < int(before)
        before = page.next


@pytest.mark.parametrize("piece", [1, 5, 20_000])
@pytest.mark.parametrize("limit", [1, 3, 1000])
async def test_every_combination_of_filters_finds_exactly_what_it_says(
    filled: Store, monkeypatch: pytest.MonkeyPatch, piece: int, limit: int
) -> None:
    monkeypatch.setattr(lists, "LOOKED_AT", piece)
    whole = await every(filled, 1000)
    assert len(whole) == 24
    assert [scope.created_at for scope in whole] == sorted((s.created_at for s in whole), reverse=True)
    now = filled.now()
    assert {scope.status(now) for scope in whole} == set(STATUSES)
    values: dict[str, tuple[str | None, ...]] = {
        "tenant_id": (None, "default", "acme", "nobody"),
        "incident_id": (None, "inc_1", "inc_3", "inc_9"),
        "status": (None, *STATUSES),
    }
    for combination in itertools.product(*values.values()):
        tenant, incident, status = combination
        wanted = [
            scope
            for scope in whole
            if tenant in (None, scope.tenant_id)
            and incident in (None, scope.incident_id)
            and status in (None, scope.status(now))
        ]
        found = await every(filled, limit, tenant_id=tenant, incident_id=incident, status=status)
        assert found == wanted, combination


async def test_the_beginning_of_an_id_finds_the_scopes_that_begin_so(filled: Store) -> None:
    whole = await every(filled, 1000)
    chosen = whole[7]
    for length in (14, 20, len(chosen.scope_id)):
        found = await every(filled, 1, prefix=chosen.scope_id[:length])
        assert chosen in found
        assert all(scope.scope_id.startswith(chosen.scope_id[:length]) for scope in found)
    for wanted in ({"tenant_id": "nobody"}, {"incident_id": "inc_9"}):
        assert await every(filled, 1, prefix=chosen.scope_id[:14], **wanted) == []
    assert chosen in await every(
        filled,
        10,
        prefix=chosen.scope_id[:14],
        tenant_id=chosen.tenant_id,
        incident_id=chosen.incident_id,
        status=chosen.status(filled.now()),
    )


async def test_a_page_ends_at_the_piece_that_it_looked_at(
    filled: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lists, "LOOKED_AT", 5)
    wanted = ScopesWanted(tenant_id="default", now=filled.now())  # which are the twelve oldest
    page = await filled.engine.scopes_wanted(wanted, before=None, limit=100)
    assert (page.rows, page.next) == ([], "20")


async def test_no_query_sorts_or_scans_all_scopes(open_store: OpenStore, tmp_path: Path) -> None:
    await open_store(tmp_path / "scopes.db")
    with closing(sqlite3.connect(f"file:{tmp_path / 'scopes.db'}?mode=ro", uri=True)) as connection:
        for tenant, incident, status in itertools.product((None, "t"), (None, "i"), (None, *STATUSES)):
            wanted: Any = {"tenant_id": tenant, "incident_id": incident, "status": status}
            asked = ScopesWanted(**wanted, now=1)
            sql, parameters = scopes_query(asked, 1 << 62, 101)
            steps = [step for *_, step in connection.execute(f"EXPLAIN QUERY PLAN {sql}", parameters)]
            first = next(step for step in steps if "scopes" in step)
            sql, parameters = scopes_query(replace(asked, prefix="scope_01234567"), 1 << 62, 101)
            by_id = [step for *_, step in connection.execute(f"EXPLAIN QUERY PLAN {sql}", parameters)]
            index = "SEARCH scopes USING INDEX sqlite_autoindex_scopes_1 (scope_id>? AND scope_id<?)"
            assert next(step for step in by_id if "scopes" in step) == index, (wanted, by_id)
            if incident is not None:
                assert "SEARCH scopes USING INDEX scopes_by_incident (tenant_id=? AND incident_id=?" in first
            else:  # in the order of the list, and where a filter could make it long, with both ends
                ends = "rowid>? AND rowid<?" if asked.bounded else "rowid<?"
                assert first == f"SEARCH scopes USING INTEGER PRIMARY KEY ({ends})", (wanted, steps)
                assert not any("TEMP B-TREE" in step for step in steps), (wanted, steps)
