"""The data listener's own server: what its connections do between requests, and where requests go wrong."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web

from sidecar.web.data._answers import RawAnswer
from sidecar.web.serving import dataconnection
from sidecar.web.serving._parser import PIPELINED
from sidecar.web.serving.dataconnection import DataConnection, DataServer
from sidecar.web.serving.datarequest import DataRequest
from tests.client import connect, read_message
from tests.support import House, Open, eventually

GET = b"GET /agents HTTP/1.1\r\nHost: x\r\n\r\n"
Handler = Callable[[DataRequest], Awaitable[web.Response | None]]


class Transport(asyncio.Transport):
    """Keeps what is written, and whether it was closed."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.closed = self.paused = False

    def write(self, data: Any) -> None:
        self.written += bytes(data)

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        assert not self.closed, "a second call keeps a transport of TLS from being aborted"
        self.closed = True

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False

    def can_write_eof(self) -> bool:
        return False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("::ffff:192.0.2.1", 5) if name == "peername" else default


async def answers(request: DataRequest) -> web.Response | None:
    answer = RawAnswer(request, 200, b"OK", (), content_length=0, close=False)
    answer.send_whole(b"")
    return None


def opened(handler: Handler = answers) -> tuple[DataConnection, Transport, list[DataRequest]]:
    """A connection, its transport, and its requests that have ended."""
    ended: list[DataRequest] = []
    server = DataServer(handler, on_ended=lambda request, _: ended.append(request), head_timeout_seconds=10)
    connection, transport = server(), Transport()
    connection.connection_made(transport)
    return connection, transport, ended


async def test_a_connection_that_asks_nothing_more_is_closed(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataconnection, "KEEP_ALIVE_SECONDS", 0.2)
    reader, writer = await connect(house.sidecar.data_address)
    writer.write(GET)
    answer = await read_message(reader)
    assert answer is not None
    assert answer.status == 200
    assert await reader.read() == b""
    writer.close()


async def test_a_timer_that_rings_before_the_deadline_rings_again_then() -> None:
    connection, transport, ended = opened()
    head_due = connection._due
    connection.data_received(GET)
    await eventually(lambda: len(ended) == 1 and connection._waiter is not None)
    assert connection._due > head_due, "the deadline of an answered connection is later"
    connection._ring()
    assert not transport.closed
    assert connection._timer is not None
    assert connection._timer.when() == connection._due
    connection._due = 0.0
    connection._ring()
    assert transport.closed
    connection.connection_lost(None)


async def test_a_head_that_has_begun_has_a_nearer_deadline_than_an_idle_connection() -> None:
    connection, _, ended = opened()
    connection.data_received(GET)
    await eventually(lambda: len(ended) == 1 and connection._waiter is not None)
    idle = connection._due
    connection.data_received(b"GET / HT")
    begun = connection._due
    assert begun < idle
    connection.data_received(b"TP/1.1\r\n")
    assert connection._due == begun, "more of a head moves no deadline"
    assert connection._timer is not None
    assert connection._timer.when() <= begun
    connection.connection_lost(None)


async def test_the_first_head_has_its_whole_time_though_a_connection_is_kept_idle_for_less(
    open_house: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataconnection, "KEEP_ALIVE_SECONDS", 0.1)
    house = await open_house(gate={"head_timeout_seconds": 60})
    reader, writer = await connect(house.sidecar.data_address)
    writer.write(GET[:-2])
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await reader.read()  # would return if the connection were closed
    writer.write(GET[-2:])
    answer = await read_message(reader)
    assert answer is not None
    assert answer.status == 200
    writer.close()


async def test_a_timer_that_rings_during_a_request_closes_nothing() -> None:
    goes_on = asyncio.Event()

    async def waits(request: DataRequest) -> web.Response | None:
        await goes_on.wait()
        return await answers(request)

    connection, transport, ended = opened(waits)
    connection.data_received(GET)
    connection._due = 0.0
    connection._ring()
    await asyncio.sleep(0)
    connection._ring()
    assert not transport.closed
    goes_on.set()
    await eventually(lambda: len(ended) == 1 and connection._waiter is not None)
    assert connection._timer is not None, "the deadline of an idle connection has begun"
    connection.connection_lost(None)


async def test_requests_beyond_those_that_may_wait_pause_the_transport_and_all_are_answered() -> None:
    connection, transport, ended = opened()
    connection.data_received(GET * 10)
    assert transport.paused
    assert len(connection._messages) == PIPELINED
    await eventually(lambda: len(ended) == 10)
    assert transport.written.count(b"HTTP/1.1 200 OK\r\n\r\n") == 10
    assert not transport.paused
    assert connection.remote == "192.0.2.1"
    connection.connection_lost(None)


async def test_a_connection_is_counted_until_its_last_request_has_ended() -> None:
    goes_on = asyncio.Event()

    async def waits(request: DataRequest) -> web.Response | None:
        await goes_on.wait()
        return None

    connection, _, ended = opened(waits)
    connection.data_received(GET)
    await asyncio.sleep(0)
    connection.connection_lost(None)
    assert connection._server.connections == {connection}
    goes_on.set()
    await eventually(lambda: not connection._server.connections)
    assert len(ended) == 1


@pytest.mark.parametrize("ends", [DataConnection.close, lambda one: one.connection_lost(None)])
async def test_a_request_that_arrived_whole_is_handled_though_its_connection_ends_at_once(
    ends: Callable[[DataConnection], None],
) -> None:
    handled: list[str] = []

    async def notes(request: DataRequest) -> web.Response | None:
        handled.append(request.target)
        return None

    for asked_before in (False, True):
        connection, _, ended = opened(notes)
        if asked_before:
            connection.data_received(GET)
            await eventually(lambda ended=ended: len(ended) == 1)
        handled.clear()
        connection.data_received(GET)
        ends(connection)
        assert connection.task is not None
        await connection.task
        assert handled == ["/agents"]


async def test_a_handler_that_fails_closes_its_connection(caplog: pytest.LogCaptureFixture) -> None:
    async def fails(request: DataRequest) -> web.Response | None:
        raise ValueError("a defect")

    connection, transport, _ = opened(fails)
    connection.data_received(GET)
    await eventually(lambda: transport.closed)
    assert transport.written == b""
    assert "a defect" in caplog.text
    connection.connection_lost(None)


async def test_a_shutdown_closes_idle_and_busy_connections(caplog: pytest.LogCaptureFixture) -> None:
    async def hangs(request: DataRequest) -> web.Response | None:
        await asyncio.Event().wait()
        return None

    busy, its_transport, ended = opened(hangs)
    idle = DataConnection(busy._server)
    idle.connection_made(transport := Transport())
    busy.data_received(GET)
    await asyncio.sleep(0)
    busy._server.pre_shutdown()
    assert transport.closed
    assert not its_transport.closed
    await busy._server.shutdown(0.01)
    assert its_transport.closed
    await eventually(lambda: len(ended) == 1)
    assert ended[0].status is None, "a request that was given up has no answer"
    assert caplog.records == []
