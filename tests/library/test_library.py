"""The store of a program that embeds Scopegate: opened once, replaced whole, told apart after a fork."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sidecar.core.command import Emit, Emitted
from sidecar.core.record import DecisionOutcome, DecisionType, Record
from sidecar.errors import StoreUnavailable
from sidecar.ids import new_decision_id
from sidecar.library import runtime as library
from sidecar.store.verify import verify_sqlite

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def default_afterwards() -> Iterator[None]:
    yield
    library.configure()


def emit() -> Emit:
    return Emit(
        origin="library",
        record=Record(
            decision_id=new_decision_id(),
            decision_type=DecisionType.ROUTING,
            decision_outcome=DecisionOutcome.NONE,
            decided_at=0,
        ),
    )


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"store_url": "redis://x"}, "store_url"),
        ({"store_url": ""}, "store_url"),
        ({"deadline_seconds": 0}, "deadline_seconds"),
        ({"min_confidence": 1.1}, "min_confidence"),
        ({"min_confidence": float("nan")}, "min_confidence"),
    ],
)
def test_a_wrong_value_is_named_and_the_store_before_stays(values: dict[str, Any], named: str) -> None:
    before = library.configured_store()
    with pytest.raises(ValueError, match=named):
        library.configure(**values)
    assert library.configured_store() is before


def test_a_store_that_cannot_be_opened_is_tried_again_at_the_next_use(tmp_path: Path) -> None:
    taken = tmp_path / "folder"
    (tmp_path / "folder").write_text("a file where a folder is wanted")
    with pytest.raises(StoreUnavailable):
        library.configure(f"sqlite:///{taken}/log.db")
    with pytest.raises(StoreUnavailable):
        library.configured_store().submit_sync(emit())
    taken.unlink()
    assert isinstance(library.configured_store().submit_sync(emit()), Emitted)


def test_many_threads_open_it_once(tmp_path: Path) -> None:
    chosen = library.opened(f"sqlite:///{tmp_path / 'log.db'}")
    replies: list[object] = []
    threads = [threading.Thread(target=lambda: replies.append(chosen.submit_sync(emit()))) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [type(reply) for reply in replies] == [Emitted] * 50
    chosen.close()
    assert verify_sqlite(tmp_path / "log.db").records == 50


async def test_whoever_waits_while_the_store_is_replaced_is_told(tmp_path: Path) -> None:
    """Each record is either in the log and confirmed, or refused: nobody waits for ever, nothing is half."""
    path = tmp_path / "log.db"
    library.configure(f"sqlite:///{path}")
    before = library.configured_store()
    confirmed = refused = 0

    async def load() -> None:
        nonlocal confirmed, refused
        while not refused:
            try:
                await before.submit(emit())
                confirmed += 1
            except StoreUnavailable:
                refused += 1

    loads = [asyncio.create_task(load()) for _ in range(20)]
    while confirmed < 100:
        await asyncio.sleep(0.001)
    await asyncio.to_thread(library.configure, "memory://")
    await asyncio.wait_for(asyncio.gather(*loads), 10)
    assert refused
    assert verify_sqlite(path).records == confirmed


def test_a_store_that_was_closed_stays_closed(tmp_path: Path) -> None:
    library.configure(f"sqlite:///{tmp_path / 'log.db'}")
    before = library.configured_store()
    library.configure("memory://")
    with pytest.raises(StoreUnavailable, match="closed"):
        before.submit_sync(emit())


def test_a_forked_child_leaves_the_parent_s_store_alone(tmp_path: Path) -> None:
    script = f"""
import os
from sidecar import decisions
decisions.configure("sqlite:///{tmp_path / "log.db"}")
decisions.emit_recovery_decision("run_1", True)
child = os.fork()
if child == 0:
    decisions.emit_recovery_decision("run_2", True)   # the file is the parent's: logged and counted
    os._exit(decisions.get_decision_service().failures)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
decisions.emit_recovery_decision("run_3", True)
"""
    begun = time.monotonic()
    ran = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert "in use by another process" in ran.stderr
    assert time.monotonic() - begun < 30
    assert verify_sqlite(tmp_path / "log.db").records == 2


def test_the_metrics_of_the_embedding_program_are_left_alone() -> None:
    script = """
from prometheus_client import CollectorRegistry, Counter, generate_latest
import sidecar.decisions, sidecar.scoped_execution
registry = CollectorRegistry()
Counter("mine", "mine", registry=registry).inc()
assert b"mine_created" in generate_latest(registry)
"""
    ran = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ran.returncode, ran.stderr) == (0, "")
