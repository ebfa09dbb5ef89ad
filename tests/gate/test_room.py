"""What bounds memory: places in flight, the bodies that they hold, and the bytes that connections hold."""

from __future__ import annotations

import asyncio
import gc
import tracemalloc

import pytest

from sidecar.files.strictjson import parse
from sidecar.gate.places import Held, MemoryBudget, Places, parsed_bytes
from sidecar.web.data.passthrough import _Slots
from sidecar.web.serving import dataconnection as server
from tests.client import connect, read_message, request_bytes
from tests.gate.test_clients import CHUNKED, said
from tests.support import EXECUTE, Backend, House, Open, eventually, replies

UNITS = [
    "[]",
    "{}",
    '{"":1}',
    '{"a":1}',
    "1.5",
    "1e1",
    "300",
    '"ab"',
    '"\u4e16"',
    "[1]",
    "[[]]",
    "[{}]",
    '{"a":{}}',
    "1",
]


@pytest.mark.parametrize("count", [1 << 14, pytest.param(1 << 18, marks=pytest.mark.slow)])
@pytest.mark.parametrize("unit", [*UNITS, "wide text", "text"])
def test_parsed_values_take_no_more_than_is_counted(unit: str, count: int) -> None:
    texts = {"wide text": f'"{"a" * count}\U0001f600"', "text": f'"{"a" * count}"'}
    values = texts.get(unit) or ",".join([unit] * count)
    body = f'{{"parameters":{{"x":[{values}]}}}}'.encode()
    tracemalloc.start()
    try:
        document = parse(body)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert document
    assert peak <= parsed_bytes(body) <= 32 * len(body)


def test_many_keys_take_no_more_than_is_counted() -> None:
    body = ("{" + ",".join(f'"{number:x}":[]' for number in range(100_000)) + "}").encode()
    tracemalloc.start()
    try:
        document = parse(body)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert document
    assert peak <= parsed_bytes(body)


def test_memory_is_held_as_long_as_its_request() -> None:
    memory = MemoryBudget(100)
    one, two = Held(memory), Held(memory)
    assert one.grow(60)
    assert not two.grow(60)
    assert two.grow(40)
    assert not one.grow(1)
    del one
    assert memory.taken == 40
    assert two.grow(1_000), "the only one always has room"
    del two
    assert memory.taken == 0


def test_a_place_is_left_once() -> None:
    told: list[int] = []
    all_places = Places(told.append)
    one = all_places.take(1)
    assert one is not None
    assert all_places.take(1) is None
    one.leave()
    one.leave()
    assert told == [1, 0]
    assert all_places.take(1) is not None


async def test_the_slots_of_pass_through_go_to_the_longest_wait_and_none_is_lost() -> None:
    slots = _Slots(1)
    assert slots.take()
    assert not slots.take()
    assert not await slots.wait(0.01), "the time is over"
    first, second, third = (asyncio.create_task(slots.wait(5)) for _ in range(3))
    await asyncio.sleep(0)
    slots.release()
    assert not slots.take(), "a slot that is given back goes to those who wait"
    assert await first
    slots.release()
    second.cancel()  # its turn has come, but it has not seen it
    with pytest.raises(asyncio.CancelledError):
        await second
    assert await third, "it passed the slot on"
    slots.release()
    assert slots.take()
    assert not slots.take()


async def test_a_wait_for_a_slot_that_is_over_leaves_nothing_behind() -> None:
    """Long streams may hold all slots for hours, while others wait for one in vain."""
    slots = _Slots(1)
    assert slots.take()
    cancelled = asyncio.create_task(slots.wait(5))
    assert not any(await asyncio.gather(*(slots.wait(0.01) for _ in range(20))))
    cancelled.cancel()
    await asyncio.wait([cancelled])
    assert not slots._waiting
    slots.release()
    assert slots.take()


async def test_a_body_that_is_on_its_way_has_a_place_in_flight(open_house: Open) -> None:
    house = await open_house(gate={"max_in_flight": 1})
    scope = await house.issue()
    kind, body = house.execution(scope)
    reader, writer = await connect(house.sidecar.data_address)
    writer.write(request_bytes("POST", EXECUTE, [*kind, ("Content-Length", str(len(body)))], body[:5]))

    async def taken() -> bool:
        return await house.metric("scopegate_in_flight") == 1

    await eventually(taken)
    refused = await house.execute(scope)
    assert (refused.status, refused.json()["error"]) == (503, "overloaded")
    assert refused.json()["cause"] == "in_flight"
    assert refused.header("Retry-After") == "1"
    assert (await house.record(refused.json()["decision_id"]))["decision_reason"] == "overloaded"
    writer.write(body[5:])
    answer = await read_message(reader)
    assert answer is not None
    assert answer.status == 200
    writer.close()
    assert await house.metric("scopegate_in_flight") == 0


@pytest.mark.parametrize("sent", [b"no json", b"x" * 2_000_000, b"[", b""])
async def test_a_refused_body_leaves_its_place(open_house: Open, sent: bytes) -> None:
    house = await open_house(gate={"max_in_flight": 1})
    for _ in range(3):
        answer = await house.data("POST", EXECUTE, [("Content-Type", "application/json")], sent)
        assert answer.status in (400, 413)
    (broken,) = await said(house.sidecar.data_address, request_bytes("POST", EXECUTE, CHUNKED) + b"zz\r\n")
    assert broken.status == 400
    assert (await house.execute(await house.issue())).status == 200


async def test_bodies_beyond_their_memory_are_refused_and_recorded(house: House, backend: Backend) -> None:
    house.sidecar.gate._places.memory.max_bytes = 10_000_000
    scope = await house.issue(max_attempts=5)
    go_on = asyncio.Event()
    backend.script = replies(after=go_on)
    hostile: dict[str, list[list[int]]] = {"x": [[]] * 60_000}
    first = asyncio.create_task(house.execute(scope, parameters=hostile))
    await asyncio.wait_for(backend.arrived.wait(), 5)
    refused = await house.execute(scope, parameters=hostile)
    assert (refused.status, refused.json()["error"]) == (503, "overloaded")
    assert refused.json()["cause"] == "memory"
    assert (await house.record(refused.json()["decision_id"]))["decision_reason"] == "overloaded"
    second = asyncio.create_task(house.execute(scope))  # a small one has room
    await eventually(lambda: len(backend.executions) == 2)
    go_on.set()
    assert (await first).status == (await second).status == 200
    gc.collect()
    assert house.sidecar.gate._places.memory.taken == 0
    assert (await house.execute(scope, parameters=hostile)).status == 200
    assert (await house.scope(scope))["attempts_used"] == 3


async def test_connections_that_hold_too_much_are_refused_and_small_requests_pass(
    open_house: Open, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "RECOUNT_SECONDS", 0.0)
    house = await open_house(upstream={"max_connections": 4, "connect_timeout_seconds": 30})
    buffers = house.sidecar._data_server.buffers
    buffers._max_bytes = 300_000
    backend.script = replies(after=asyncio.Event())
    held = []
    for _ in range(3):  # as many as may pass through; then bodies wait for a connection to the backend
        held.append(await connect(house.sidecar.data_address))
        held[-1][1].write(request_bytes("GET", "/slow"))
    await eventually(lambda: len(backend.seen) == 3)
    for _ in range(2):
        held.append(await connect(house.sidecar.data_address))
        held[-1][1].write(request_bytes("POST", "/large", [("Content-Length", "1000000")], b"x" * 120_000))
    await eventually(lambda: sum(each.held for each in house.sidecar._data_server.connections) > 240_000)
    reader, writer = await connect(house.sidecar.data_address)
    writer.write(request_bytes("POST", "/large", [("Content-Length", "1000000")], b"x" * 120_000))
    answer = await asyncio.wait_for(read_message(reader), 5)
    assert answer is not None
    assert (answer.status, answer.json()["error"], answer.json()["cause"]) == (503, "overloaded", "memory")
    writer.close()
    backend.script = replies()
    assert (await house.execute(await house.issue())).status == 200
    for _, one in held:
        one.close()


async def test_what_has_arrived_is_counted_only_when_it_may_be_too_much(house: House) -> None:
    buffers = house.sidecar._data_server.buffers
    buffers._max_bytes = 50_000
    for _ in range(20):  # far more in total
        assert (await house.data("POST", "/agents", [], b"x" * 10_000)).status == 200
