"""Reloads while requests are judged: none fails, none is judged by a mixture, the last good set holds."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from sidecar.live.reload import Files
from sidecar.serve import Sidecar
from tests.support import Backend, Clock, House

RELOADS = 100
CLIENTS = 8


def policies_of(number: int) -> str:
    """A set in which everything says which one it is: the hold, and two rules that object in shadow."""
    rules = "".join(
        f"  - {{id: {name}-{number}, on: execute, effect: deny, mode: shadow}}\n"
        for name in ("first", "second")
    )
    return f"actions:\n  retry_agent: {{risk: low, max_cost_usd: 0.{number:03}}}\nrules:\n{rules}"


def config_of(backend: Backend, attempts: int) -> str:
    return f"""\
upstream: {{url: "http://{backend.address}"}}
data: {{listen: 127.0.0.1:0}}
admin: {{listen: 127.0.0.1:0}}
ops: {{listen: 127.0.0.1:0}}
store: {{url: sqlite:///gate.db}}
policies: policies/
scopes: {{defaults: {{max_attempts: {attempts}, max_cost_usd: 1}}, limits: {{max_attempts: 1000}}}}
shutdown: {{drain_seconds: 1}}
"""


@pytest.fixture
async def house(tmp_path: Path, backend: Backend, clock: Clock) -> AsyncIterator[House]:
    (tmp_path / "policies").mkdir()
    write(tmp_path / "policies/all.yaml", policies_of(1))
    write(tmp_path / "scopegate.yaml", config_of(backend, 1))
    files = Files(tmp_path / "scopegate.yaml", environment={})
    loaded, policies, _ = files.read()
    async with Sidecar(loaded.settings, policies, clock=clock, files=files) as sidecar:
        yield House(sidecar, backend, clock, tmp_path / "gate.db")


def write(file: Path, text: str) -> None:
    """As an editor does: beside it, then over it."""
    beside = file.with_name(f"{file.name}~")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, file)


async def test_100_reloads_under_load_half_of_them_invalid(house: House, tmp_path: Path) -> None:
    revisions: dict[str, int] = {}
    failed: Counter[int] = Counter()
    executed = 0
    over = asyncio.Event()

    async def client() -> None:
        nonlocal executed
        while not over.is_set():
            answer = await house.ask_for_scope()
            if answer.status == 201:
                answer = await house.execute(answer.json())
                executed += answer.status == 200
            if answer.status not in (200, 201):
                failed[answer.status] += 1

    def remember(number: int) -> None:
        held = house.sidecar.live.snapshot.policies
        assert held is not None
        revisions[held.revision] = number

    remember(1)
    clients = [asyncio.create_task(client()) for _ in range(CLIENTS)]
    good = 1
    for number in range(2, RELOADS + 2):
        valid = number % 2 == 0
        write(tmp_path / "policies/all.yaml", policies_of(number) + ("" if valid else "rulez: []\n"))
        answer = await house.admin("POST", "/api/v1/reload")
        if valid:
            assert answer.status == 200, answer.body
            good = number
            remember(number)
            assert answer.json()["policy_revision"] in revisions
        else:
            assert answer.status == 409
            assert "all.yaml:6:1: rulez" in answer.json()["errors"][0]
        held = house.sidecar.live.snapshot.policies
        assert held is not None
        assert revisions[held.revision] == good
        await asyncio.sleep(0.01)
    over.set()
    await asyncio.gather(*clients)

    assert failed == Counter()
    assert executed > RELOADS
    judged_by: Counter[int] = Counter()
    for record in await house.records("&event=admitted"):
        details: dict[str, Any] = record["details"]
        number = revisions[details["policy_revision"]]
        judged_by[number] += 1
        assert {one["rule"] for one in details["would_refuse"]} == {f"first-{number}", f"second-{number}"}
        assert details["hold_usd"] == number / 1000
    assert len(judged_by) > RELOADS // 4
    assert judged_by.total() == executed


async def test_a_live_key_takes_effect_at_once_and_another_one_refuses_the_whole(
    house: House, tmp_path: Path, backend: Backend
) -> None:
    write(tmp_path / "scopegate.yaml", config_of(backend, 7))
    answer = await house.admin("POST", "/api/v1/reload")
    assert answer.status == 200
    # Unless the watching was faster.
    assert answer.json()["changed"] in (["scopes.defaults.max_attempts"], [])
    assert (await house.issue())["max_attempts"] == 7

    moved = config_of(backend, 9).replace("sqlite:///gate.db", "sqlite:///other.db")
    write(tmp_path / "scopegate.yaml", moved)
    answer = await house.admin("POST", "/api/v1/reload")
    assert (answer.status, answer.json()["error"]) == (409, "reload_refused")
    (error,) = answer.json()["errors"]
    assert "scopegate.yaml:5:9: store.url: cannot change while it runs" in error
    assert (await house.issue())["max_attempts"] == 7
    status = (await house.admin("GET", "/api/v1/status")).json()
    assert status["last_reload"]["ok"] is False
    assert status["last_reload"]["errors"] == [error]
    write(tmp_path / "scopegate.yaml", config_of(backend, 7))
