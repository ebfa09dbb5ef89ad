"""Records that others decided: kept once under a key, kept out by a switch, bound to a run later."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from sidecar.core.command import Bind, Command, Emit, Emitted, NotEmitted, Reply, RunBound, Switch, Turn
from sidecar.core.record import CausalRole, DecisionOutcome, DecisionType, Record
from sidecar.core.state import State
from sidecar.errors import CommandFailed
from sidecar.ids import new_decision_id
from sidecar.store._changes import apply_all
from sidecar.store.base import ChainHead
from sidecar.store.batch import Store
from sidecar.store.verify import verify_sqlite
from tests.store.conftest import OpenStore, issue
from tests.support import SECOND, Clock

KILL: Switch = "care_kill_switch"


def emit(*, once: bytes | None = None, unless: Switch | None = None, **fields: Any) -> Emit:
    record = Record(
        **{
            "decision_id": new_decision_id(),
            "decision_type": DecisionType.ROUTING,
            "decision_outcome": DecisionOutcome.SELECTED,
            "decided_at": 0,
            "causal_role": CausalRole.PRE_RUN,
            **fields,
        }
    )
    return Emit(record=record, origin="library", once=once, unless_switched=unless)


def turn(*, on: bool) -> Turn:
    return Turn(decision_id=new_decision_id(), switch=KILL, on=on, origin="api")


async def total(store: Store) -> int:
    return len((await store.engine.decisions({}, before=None, limit=1000)).rows)


async def test_of_many_at_once_under_one_key_one_is_kept(store: Store) -> None:
    replies = await asyncio.gather(*(store.submit(emit(once=b"k")) for _ in range(200)))
    assert sum(isinstance(reply, Emitted) for reply in replies) == 1
    assert replies.count(NotEmitted("repeated")) == 199
    assert await total(store) == 1
    assert await store.engine.is_kept(b"k")
    assert not await store.engine.is_kept(b"K")


async def test_a_key_and_a_switch_outlive_the_store(open_store: OpenStore, tmp_path: Path) -> None:
    first = await open_store(tmp_path / "log.db")
    await first.submit(emit(once=b"k"))
    await first.submit(turn(on=True))
    await first.close()
    second = await open_store(tmp_path / "log.db")
    assert await second.submit(emit(once=b"k")) == NotEmitted("repeated")
    assert await second.submit(emit(unless=KILL)) == NotEmitted("switched_off")
    assert await second.engine.is_on(KILL)


async def test_a_switch_holds_from_the_command_behind_it(store: Store) -> None:
    commands: list[Command] = [
        emit(unless=KILL),
        turn(on=True),
        emit(unless=KILL, once=b"k"),
        turn(on=False),
        emit(unless=KILL, once=b"k"),
    ]
    replies = await asyncio.gather(*map(store.submit, commands))
    kinds = [type(reply).__name__ for reply in replies]
    assert kinds == ["Emitted", "Turned", "NotEmitted", "Turned", "Emitted"]
    assert not await store.engine.is_on(KILL)


async def test_a_run_is_bound_once_to_what_was_recorded_before(store: Store) -> None:
    waiting = [emit(request_id="req"), emit(request_id="req")]
    others = [
        emit(request_id="req", causal_role=CausalRole.IN_RUN),
        emit(request_id="req", run_id="run_0"),
        emit(request_id="other"),
        emit(),
    ]
    await asyncio.gather(*map(store.submit, [*waiting, *others]))
    assert await store.submit(Bind(request_id="req", run_id="run_1")) == RunBound(2)
    assert await store.submit(Bind(request_id="req", run_id="run_2")) == RunBound(0)
    page = await store.engine.decisions({"run_id": "run_1"}, before=None, limit=10)
    assert [row.bound_run_id for row in page.rows] == ["run_1", "run_1"]


def test_a_run_is_bound_to_what_its_own_batch_recorded_before_it(clock: Clock) -> None:
    commands: list[Command] = [
        emit(request_id="req"),
        Bind(request_id="req", run_id="run_1"),
        emit(request_id="req"),
        emit(request_id="req", causal_role=CausalRole.POST_RUN),
        Bind(request_id="req", run_id="run_2"),
    ]
    replies: list[Reply] = []
    state = State(unbound={"req": [3]})
    changes, head = apply_all(commands, state, ChainHead("w", 9, bytes(32), 0), clock(), replies)
    assert [reply for reply in replies if isinstance(reply, RunBound)] == [RunBound(2), RunBound(1)]
    assert [(seq, bind.run_id) for seq, bind in changes.bound] == [(3, "run_1"), (10, "run_1"), (11, "run_2")]
    assert head.seq == 12


async def test_a_decision_id_that_is_taken_fails_alone(store: Store) -> None:
    taken = emit(decision_id="d-1")
    await store.submit(taken)
    results = await asyncio.gather(
        store.submit(emit(once=b"a")),
        store.submit(taken),
        store.submit(emit(once=b"b")),
        return_exceptions=True,
    )
    assert [type(result) for result in results] == [Emitted, CommandFailed, Emitted]
    assert await total(store) == 3


async def test_a_time_that_a_caller_tells_does_not_move_the_clock(
    open_store: OpenStore, tmp_path: Path, clock: Clock
) -> None:
    store = await open_store(tmp_path / "log.db")
    now = clock()
    await store.submit(emit(decided_at=now + 10**15))
    assert store.now() - now < SECOND * 60
    await store.close()
    again = await open_store(tmp_path / "log.db")
    assert again.now() - now < SECOND * 60
    await again.submit(emit(decided_at=0))
    await again.close()
    last = await open_store(tmp_path / "log.db", clock=lambda: 0)
    assert 0 <= last.now() - now < SECOND * 60


@pytest.mark.parametrize("table", ["kept_once", "run_bindings", "decisions"])
@pytest.mark.parametrize("statement", ["DELETE FROM {}", "UPDATE {} SET rowid = rowid", "UPDATE {} SET {}"])
async def test_the_database_refuses_to_take_anything_back(
    open_store: OpenStore, tmp_path: Path, table: str, statement: str
) -> None:
    store = await open_store(tmp_path / "log.db")
    await store.submit(emit(once=b"k", request_id="req"))
    await store.submit(Bind(request_id="req", run_id="run_1"))
    await store.close()
    column = {"kept_once": "decision_id = 'x'", "run_bindings": "run_id = 'x'", "decisions": "run_id = 'x'"}
    with closing(sqlite3.connect(tmp_path / "log.db")) as connection:
        if table == "kept_once" and "rowid" in statement:
            statement = "UPDATE {} SET key = key"
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            connection.execute(statement.format(table, column[table]))


async def test_a_database_of_the_first_schema_is_brought_up_to_date(
    open_store: OpenStore, tmp_path: Path
) -> None:
    path = tmp_path / "log.db"
    store = await open_store(path)
    for _ in range(5):
        await store.submit(issue())
    await store.close()
    first = (resources.files("sidecar.store") / "sql/sqlite/0001_initial.sql").read_text("utf-8")
    old = tmp_path / "old.db"
    with closing(sqlite3.connect(old, isolation_level=None)) as connection:
        connection.executescript(f"{first}\nPRAGMA user_version = 1; ATTACH '{path}' AS new;")
        columns = [row[1] for row in connection.execute("PRAGMA main.table_info(decisions)")]
        assert "recorded_at" not in columns
        of_scopes = [row[1] for row in connection.execute("PRAGMA main.table_info(scopes)")]
        tables = {"meta": ["*"], "scopes": of_scopes, "decisions": columns}
        for table, listed in ((table, ", ".join(names)) for table, names in tables.items()):
            connection.execute(f"INSERT INTO main.{table} SELECT {listed} FROM new.{table}")
    migrated = await open_store(old)
    await migrated.submit(emit(once=b"k"))
    page = await migrated.engine.decisions({"event": "issued", "tenant_id": "default"}, before=None, limit=10)
    assert len(page.rows) == 5
    await migrated.close()
    assert verify_sqlite(old).records == 6
