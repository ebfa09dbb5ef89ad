"""Unlisted requests and `kill -9`: none reaches the backend without its record, singly or in a flood."""

from __future__ import annotations

import asyncio
import json
import random
import sqlite3
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from sidecar.store.verify import verify_sqlite
from tests.acceptance.conftest import Address, Program, write_configuration
from tests.client import Connection, Lost, Message
from tests.support import serving_backend

KILLS = 4
CLIENTS = 60
# Long enough for more requests than the burst that is recorded one by one.
SECONDS = (0.8, 2.5)


def records(database: Path) -> Iterator[dict[str, Any]]:
    with closing(sqlite3.connect(database)) as connection:
        for (envelope,) in connection.execute("SELECT CAST(envelope AS TEXT) FROM decisions ORDER BY seq"):
            yield json.loads(envelope)["record"]


async def send(address: Address, kill: int, client: int, answers: list[str]) -> None:
    """Send writes until the sidecar is killed. `answers` gets the paths of those that were answered."""
    number = 0
    with suppress(Lost, OSError), Connection(address) as connection:
        while True:
            path = f"/jobs/{kill}-{client}-{number}"
            answer: Message = await connection.ask("PUT", path, [("Content-Length", "0")])
            assert answer.status == 200, answer
            answers.append(path)
            number += 1


@pytest.mark.slow
async def test_after_kill_nine_each_request_that_the_backend_saw_is_recorded(tmp_path: Path) -> None:
    draw, answered, loop = random.Random(1), list[str](), asyncio.get_running_loop()
    async with serving_backend() as backend:
        # This backend listens on a TCP port, never on a Unix socket.
        address = (backend.address.host, backend.address.port)  # type: ignore[union-attr]
        config = write_configuration(tmp_path, address, gate={"unlisted": {"writes": "record"}})
        sidecar = Program(config)
        try:
            for kill in range(KILLS):
                await loop.run_in_executor(None, sidecar.start)
                clients = [
                    asyncio.create_task(send(sidecar.data, kill, client, answered))
                    for client in range(CLIENTS)
                ]
                await asyncio.sleep(draw.uniform(*SECONDS))
                await loop.run_in_executor(None, sidecar.kill)
                await asyncio.gather(*clients)
        finally:
            sidecar.kill()
        seen = [message.target for message in backend.seen]
    assert len(set(seen)) == len(seen)
    assert set(answered) <= set(seen)
    assert verify_sqlite(sidecar.store).records > 0
    singly, counted = set(), 0
    for record in records(sidecar.store):
        assert record["decision_inputs"]["policy_id"] == "scoped_execution"
        counted += record["details"].get("count", 1)
        singly.add(record["decision_inputs"].get("path"))
    assert counted >= len(seen) > 0
    # What stands in no record of its own is counted in one.
    assert len(set(seen) - singly) <= counted - (len(singly) - (None in singly))
