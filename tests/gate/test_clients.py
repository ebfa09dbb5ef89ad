"""Clients that break their word, offer what is not taken up, or have nothing more to ask."""

from __future__ import annotations

import asyncio
import socket
import ssl
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from sidecar.settings.addresses import Address
from tests.certificates import Authority
from tests.client import Message, connect, read_message, request_bytes
from tests.support import EXECUTE, Backend, House, Open, eventually, replies, reset, sends

CHUNKED = [("Content-Type", "application/json"), ("Transfer-Encoding", "chunked")]
BROKEN = b"4\r\nHello\r\n0\r\n\r\n"
H2C = [
    ("Connection", "Upgrade, HTTP2-Settings"),
    ("Upgrade", "h2c"),
    ("HTTP2-Settings", "AAMAAABkAAQCAAAAAAIAAAAA"),
]
AT_ONCE = 5.0  # far below every deadline of these houses


@pytest.fixture
async def patient(open_house: Open) -> House:
    """A sidecar whose deadlines no test waits for."""
    return await open_house(
        upstream={"response_timeout_seconds": 60},
        gate={"body_timeout_seconds": 60, "head_timeout_seconds": 60},
    )


async def said(address: Address, *pieces: bytes, eof: bool = False) -> list[Message]:
    """Send pieces, each in a packet of its own, and read all answers until the connection ends."""
    reader, writer = await connect(address)
    answers = []
    try:
        async with asyncio.timeout(AT_ONCE):
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0.01)
            if eof:
                writer.write_eof()
            while (answer := await read_message(reader)) is not None:
                answers.append(answer)
    finally:
        writer.close()
    return answers


# A body that breaks its word ----------------------------------------------------------------------------


@pytest.mark.parametrize("packets", [1, 2, 3])
async def test_a_broken_body_that_passes_through_is_a_400_at_once(patient: House, packets: int) -> None:
    head = request_bytes("POST", "/agents", CHUNKED)
    pieces = {1: [head + BROKEN], 2: [head, BROKEN], 3: [head, BROKEN[:6], BROKEN[6:]]}[packets]
    (answer,) = await said(patient.sidecar.data_address, *pieces)
    assert (answer.status, answer.json()["error"]) == (400, "invalid_request")
    assert answer.header("Connection") == "close"
    assert [message for message in patient.backend.seen if message.whole] == []
    assert await patient.metric('scopegate_passed_through_total{outcome="upstream_failed"}') == 0
    assert await patient.metric('scopegate_passed_through_total{outcome="invalid_request"}') == 1


@pytest.mark.parametrize("packets", [1, 2, 3])
async def test_a_broken_gated_body_is_refused_and_recorded_at_once(patient: House, packets: int) -> None:
    scope = await patient.issue()
    head = request_bytes("POST", EXECUTE, CHUNKED)
    pieces = {1: [head + BROKEN], 2: [head, BROKEN], 3: [head, BROKEN[:6], BROKEN[6:]]}[packets]
    (answer,) = await said(patient.sidecar.data_address, *pieces)
    assert (answer.status, answer.json()["error"]) == (400, "invalid_request")
    assert answer.header("Connection") == "close"
    record = await patient.record(answer.json()["decision_id"])
    assert (record["event"], record["decision_reason"]) == ("refused", "invalid_request")
    assert patient.backend.seen == []
    assert (await patient.scope(scope))["attempts_used"] == 0


async def test_the_backend_loses_a_connection_whose_request_broke_off(
    patient: House, backend: Backend
) -> None:
    lost = asyncio.Event()

    async def hear(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.read()
        finally:
            lost.set()

    backend.instead = hear
    head = request_bytes("POST", "/agents", CHUNKED)
    (answer,) = await said(patient.sidecar.data_address, head, b"5\r\nHello\r\n", b"zz\r\n")
    assert answer.status == 400
    await asyncio.wait_for(lost.wait(), AT_ONCE)


async def test_a_body_that_breaks_once_its_answer_has_begun_cuts_the_answer(
    patient: House, backend: Backend
) -> None:
    async def answer_early(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
        await reader.read()

    backend.instead = answer_early
    reader, writer = await connect(patient.sidecar.data_address)
    writer.write(request_bytes("POST", "/agents", CHUNKED) + b"5\r\nHello\r\n")
    async with asyncio.timeout(AT_ONCE):
        assert (await reader.readuntil(b"half")).startswith(b"HTTP/1.1 200 OK\r\n")
        writer.write(b"zz\r\n")
        assert await reader.read() == b""
    writer.close()


async def test_a_broken_body_does_not_wait_for_a_backend_that_reads_nothing(
    patient: House, backend: Backend
) -> None:
    async def read_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # asyncio types the transport of a writer as one that only writes.
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        await asyncio.Event().wait()

    backend.instead = read_nothing
    reader, writer = await connect(patient.sidecar.data_address)
    writer.write(request_bytes("POST", "/agents", CHUNKED) + b"5\r\nHello\r\n")
    async with asyncio.timeout(AT_ONCE):
        await asyncio.sleep(0.05)
        writer.write(b"zz\r\n")
        answer = await read_message(reader)
    assert answer is not None
    assert (answer.status, answer.json()["error"]) == (400, "invalid_request")
    writer.close()


async def test_rubbish_behind_a_request_leaves_its_execution_alone(patient: House, backend: Backend) -> None:
    scope = await patient.issue()
    _, body = patient.execution(scope)
    request = request_bytes("POST", EXECUTE, CHUNKED) + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    done, refused = await said(patient.sidecar.data_address, request + b"rubbish\r\n\r\n")
    assert (done.status, refused.status) == (200, 400)
    assert len(backend.executions) == 1


async def test_every_split_of_a_broken_body_ends_in_the_same_way(patient: House) -> None:
    data = request_bytes("POST", "/agents", CHUNKED) + BROKEN

    async def split(at: int) -> list[int]:
        answers = await said(patient.sidecar.data_address, data[:at], data[at:])
        return [answer.status for answer in answers]

    assert await asyncio.gather(*(split(at) for at in range(1, len(data), 3))) == [[400]] * len(
        range(1, len(data), 3)
    )


@pytest.mark.parametrize("listener", ["data", "admin"])
async def test_our_own_endpoints_refuse_a_broken_body_at_once(patient: House, listener: str) -> None:
    address = getattr(patient.sidecar, f"{listener}_address")
    target = {"data": "/api/v1/recovery/scope", "admin": "/api/v1/decisions/routing"}[listener]
    for pieces in ([BROKEN], [b"", BROKEN]):
        (answer,) = await said(address, request_bytes("POST", target, CHUNKED) + pieces[0], *pieces[1:])
        assert (answer.status, answer.json()["error"]) == (400, "invalid_request")


async def test_a_body_that_breaks_in_shadow_is_refused(open_house: Open) -> None:
    house = await open_house(gate={"routes": [{"path": "**/recovery/execute", "mode": "shadow"}]})
    (answer,) = await said(house.sidecar.data_address, request_bytes("POST", EXECUTE, CHUNKED) + BROKEN)
    assert (answer.status, answer.json()["error"]) == (400, "invalid_request")
    assert house.backend.seen == []


# Offers -------------------------------------------------------------------------------------------------

OFFERS = {
    "h2c": H2C,
    "h2c without settings": [("Connection", "Upgrade"), ("Upgrade", "h2c")],
    "tls": [("Connection", "Upgrade"), ("Upgrade", "TLS/1.0")],
    "a list": [("Connection", "Upgrade"), ("Upgrade", "foo, websocket")],
    "two lines": [("Connection", "Upgrade"), ("Upgrade", "websocket"), ("Upgrade", "h2c")],
    "settings alone": [("HTTP2-Settings", "AAMAAABk")],
}


@pytest.mark.parametrize("offer", OFFERS.values(), ids=OFFERS)
async def test_an_offer_ends_here_and_its_request_goes_on(house: House, offer: list[tuple[str, str]]) -> None:
    scope = await house.issue()
    answers = [
        await house.data("GET", "/agents", offer),
        await house.data("POST", "/agents", offer, b"a body"),
        await house.execute(scope, headers=offer),
        await house.data("GET", EXECUTE, offer),
    ]
    assert [answer.status for answer in answers] == [200] * 4
    assert house.backend.seen[1].body == b"a body"
    assert house.backend.seen[2].body == house.execution(scope)[1]
    for message in house.backend.seen:
        assert message.headers("Upgrade") == message.headers("HTTP2-Settings") == []
        assert message.headers("Connection") == []


async def test_a_gated_request_with_an_offer_is_judged_as_ever(house: House) -> None:
    refused = await house.execute(None, headers=H2C)
    assert (refused.status, refused.json()["error"]) == (400, "scoped_execution_required")
    assert house.backend.seen == []


async def test_a_connection_goes_on_after_an_offer(house: House, backend: Backend) -> None:
    """In packets of their own or in one: no request is swallowed, and none is made of another's body."""
    inside = request_bytes("GET", "/inside")
    posted = request_bytes("POST", "/first", H2C, inside)
    for pieces in ([posted, request_bytes("GET", "/second")], [posted + request_bytes("GET", "/second")]):
        backend.seen.clear()
        last = request_bytes("GET", "/third", [("Connection", "close")])
        answers = await said(house.sidecar.data_address, *pieces, last)
        assert [answer.status for answer in answers] == [200] * 3
        assert [message.target for message in backend.seen] == ["/first", "/second", "/third"]
        assert backend.seen[0].body == inside


async def test_http2_behind_an_offer_is_not_forwarded(house: House, backend: Backend) -> None:
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
    for pieces in (
        [request_bytes("GET", "/agents", H2C), preface],
        [request_bytes("GET", "/agents", H2C) + preface],
    ):
        backend.seen.clear()
        answered, refused = await said(house.sidecar.data_address, *pieces)
        assert (answered.status, refused.status) == (200, 400)
        assert [message.target for message in backend.seen] == ["/agents"]


async def test_a_backend_that_switches_unasked_gets_nowhere(house: House, backend: Backend) -> None:
    backend.script = sends(
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n\0\0\0\4\0\0\0\0\0"
    )
    answer = await house.execute(await house.issue(), headers=H2C)
    assert (answer.status, answer.json()["error"]) == (502, "upstream_failed")


async def test_a_client_that_offers_a_websocket_and_more_has_its_connection_closed(house: House) -> None:
    (answer,) = await said(
        house.sidecar.data_address,
        request_bytes("GET", "/agents", OFFERS["two lines"]) + request_bytes("GET", "/second"),
    )
    assert answer.status == 200
    assert answer.header("Connection") == "close"


# Half-closed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("apart", [False, True])
async def test_a_client_that_asks_nothing_more_gets_its_answer(
    house: House, backend: Backend, apart: bool
) -> None:
    go_on = asyncio.Event()
    backend.script = replies(after=go_on)
    scope = await house.issue()
    for request in (
        request_bytes("GET", "/agents"),
        request_bytes("POST", "/agents", [], b"a body"),
        request_bytes("POST", EXECUTE, *house.execution(scope)),
    ):
        go_on.clear()
        backend.arrived.clear()
        reader, writer = await connect(house.sidecar.data_address)
        writer.write(request)
        if apart:
            await asyncio.wait_for(backend.arrived.wait(), AT_ONCE)
        writer.write_eof()
        await asyncio.wait_for(backend.arrived.wait(), AT_ONCE)
        await asyncio.sleep(0.02)
        go_on.set()
        async with asyncio.timeout(AT_ONCE):
            answer = await read_message(reader)
            assert answer is not None
            assert (answer.status, answer.body) == (200, b'{"done": true}')
            assert answer.header("Connection") == "close"
            assert await reader.read() == b""
        writer.close()
    assert (await house.scope(scope))["attempts_used"] == 1


@pytest.mark.parametrize("listener", ["data", "admin", "ops"])
async def test_every_listener_answers_a_half_closed_client(house: House, listener: str) -> None:
    address = getattr(house.sidecar, f"{listener}_address")
    target = {"data": "/api/v1/recovery/scopes/inc_1", "admin": "/api/v1/status", "ops": "/health/ready"}[
        listener
    ]
    (answer,) = await said(address, request_bytes("GET", target), eof=True)
    assert answer.status == 200


async def test_all_requests_before_the_end_are_answered(house: House, backend: Backend) -> None:
    data = b"".join(request_bytes("GET", f"/{number}") for number in range(9))
    answers = await said(house.sidecar.data_address, data, eof=True)
    assert [answer.status for answer in answers] == [200] * 9
    assert [message.target for message in backend.seen] == [f"/{number}" for number in range(9)]


@pytest.mark.parametrize(
    "begun",
    [
        b"GET / HT",
        request_bytes("POST", "/a", [("Content-Length", "9")], b"half"),
        request_bytes("POST", "/a", CHUNKED),
    ],
)
async def test_an_end_within_a_request_means_that_the_client_left(patient: House, begun: bytes) -> None:
    assert await said(patient.sidecar.data_address, begun, eof=True) == []


async def test_a_gated_body_that_ends_too_early_is_recorded_and_consumes_nothing(patient: House) -> None:
    scope = await patient.issue()
    kind, body = patient.execution(scope)
    request = request_bytes("POST", EXECUTE, [*kind, ("Content-Length", str(len(body) + 1))], body)
    assert await said(patient.sidecar.data_address, request, eof=True) == []

    async def recorded() -> bool:
        return [record["decision_reason"] for record in await patient.records("&event=refused")] == [
            "invalid_request"
        ]

    await eventually(recorded)
    assert patient.backend.seen == []
    assert (await patient.scope(scope))["attempts_used"] == 0


async def test_a_client_that_half_closed_and_then_left_ends_the_exchange(
    patient: House, backend: Backend
) -> None:
    backend.script = sends(then="hang")
    _, writer = await connect(patient.sidecar.data_address)
    writer.write(request_bytes("GET", "/agents"))
    writer.write_eof()
    await asyncio.wait_for(backend.arrived.wait(), AT_ONCE)
    await eventually(lambda: patient.sidecar.passing.under_way == 1)
    reset(writer)
    await eventually(lambda: patient.sidecar.passing.under_way == 0)


@pytest.mark.skipif(sys.platform != "linux", reason="the options have other names elsewhere")
async def test_the_system_asks_whether_a_half_closed_client_is_still_there(
    patient: House, backend: Backend
) -> None:
    """Whether its answer shows that it left takes a minute; this is what makes it ask."""
    backend.script = sends(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhello", then="hang")
    reader, writer = await connect(patient.sidecar.data_address)
    writer.write(request_bytes("GET", "/agents"))
    writer.write_eof()
    await reader.readuntil(b"hello")
    (connection,) = patient.sidecar._data_server.connections
    assert connection.transport is not None
    asked = connection.transport.get_extra_info("socket").getsockopt
    assert asked(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    assert asked(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) <= 60
    assert asked(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) <= 60
    reset(writer)


async def test_a_unix_client_that_left_altogether_ends_the_exchange(
    open_house: Open, backend: Backend, tmp_path: Path
) -> None:
    house = await open_house(
        data={"listen": f"unix:{tmp_path}/d.sock"}, upstream={"response_timeout_seconds": 60}
    )
    backend.script = sends(then="hang")
    _, writer = await connect(house.sidecar.data_address)
    writer.write(request_bytes("GET", "/agents"))
    await asyncio.wait_for(backend.arrived.wait(), AT_ONCE)
    writer.close()
    await eventually(lambda: house.sidecar.passing.under_way == 0)


async def test_over_tls_an_end_means_that_the_client_left(
    open_house: Open, backend: Backend, tmp_path: Path
) -> None:
    authority = Authority(tmp_path)
    house = await open_house(data={"listen": "127.0.0.1:0", "tls": authority.issue("served").settings()})
    backend.script = sends(then="hang")
    address: Any = house.sidecar.data_address

    def leave() -> None:
        with (
            socket.create_connection((address.host, address.port), timeout=AT_ONCE) as raw,
            authority.client().wrap_socket(raw, server_hostname="gate.test") as client,
        ):
            client.sendall(request_bytes("GET", "/agents"))
            with suppress(ssl.SSLError, OSError):
                client.unwrap()  # TLS's farewell, then the FIN

    await asyncio.to_thread(leave)
    await eventually(lambda: house.sidecar.passing.under_way == 0)


async def test_a_tunnel_half_closes_in_both_directions(house: House, backend: Backend) -> None:
    async def farewell(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 101 S\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
        writer.write(b"heard " + await reader.read())  # to the end of what the client has to say

    backend.instead = farewell
    reader, writer = await connect(house.sidecar.data_address)
    writer.write(request_bytes("GET", "/ws", [("Connection", "Upgrade"), ("Upgrade", "websocket")]))
    async with asyncio.timeout(AT_ONCE):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"all of this")
        writer.write_eof()
        assert await reader.read() == b"heard all of this"
    writer.close()


async def test_a_tunnel_whose_client_ended_its_side_before_it_began_is_half_closed(
    house: House, backend: Backend
) -> None:
    switches = asyncio.Event()

    async def farewell(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        backend.arrived.set()
        await switches.wait()
        writer.write(b"HTTP/1.1 101 S\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
        writer.write(b"heard " + await reader.read())

    backend.instead = farewell
    reader, writer = await connect(house.sidecar.data_address)
    writer.write(request_bytes("GET", "/ws", [("Connection", "Upgrade"), ("Upgrade", "websocket")]))
    writer.write(b"all of this")
    writer.write_eof()
    await backend.arrived.wait()
    (connection,) = house.sidecar._data_server.connections
    await eventually(lambda: connection._half_closed)
    switches.set()
    async with asyncio.timeout(AT_ONCE):
        assert (await reader.read()).endswith(b"\r\n\r\nheard all of this")
    writer.close()


# Methods ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["LIST", "get", "FOO", "PLAY"])
@pytest.mark.parametrize("listener", ["data", "admin", "ops"])
async def test_an_unknown_method_is_refused_by_name(house: House, listener: str, method: str) -> None:
    address = getattr(house.sidecar, f"{listener}_address")
    (answer,) = await said(address, request_bytes(method, "/v1/secret"))
    assert (answer.status, answer.json()["error"]) == (400, "invalid_request")
    assert answer.json()["message"] == f"The method {method} does not pass here, on any path."
    assert house.backend.seen == []
