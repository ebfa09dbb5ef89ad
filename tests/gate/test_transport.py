"""TLS and Unix sockets, on either side of the gate: the real protocol over real sockets."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import socket
import ssl
import stat
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from sidecar.errors import ScopegateError
from sidecar.files.tls import Credentials, client_context, valid_until
from sidecar.settings.addresses import Address, Listen, SocketFile
from sidecar.settings.sections import Shutdown
from sidecar.upstream import Upstream, UpstreamTls
from tests.certificates import Authority, Pair
from tests.client import Message, ask, connect, read_message, request_bytes
from tests.support import EXECUTE, Clock, House, eventually, opened, replies, reset, sends, serving_backend

Build = Callable[..., Awaitable[House]]

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
TO_ITS_END = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"
SWITCHING = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
UPGRADE = (("Connection", "Upgrade"), ("Upgrade", "websocket"), ("Sec-WebSocket-Key", "x"))


def complaints(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was logged as wrong. A collector that an earlier test has lost is nobody's business here."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.levelno >= logging.WARNING and not record.name.startswith("opentelemetry")
    ]


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def pair(authority: Authority) -> Pair:
    return authority.issue("served")


@pytest.fixture
async def build(tmp_path: Path, clock: Clock) -> AsyncIterator[Build]:
    """Opens a backend, over TLS or a Unix socket if told so, and a sidecar before it."""
    async with AsyncExitStack() as stack:

        async def build_one(
            *,
            backend_tls: ssl.SSLContext | None = None,
            backend_path: Path | None = None,
            url_scheme: str | None = None,
            **options: Any,
        ) -> House:
            backend = await stack.enter_async_context(serving_backend(tls=backend_tls, path=backend_path))
            backend.scheme = url_scheme or backend.scheme
            return await stack.enter_async_context(opened(tmp_path, backend, clock=clock, **options))

        yield build_one


def trusting(authority: Authority, **more: str) -> dict[str, Any]:
    """The `upstream` section that trusts an authority."""
    return {"tls": {"ca_file": str(authority.certificate_file), **more}}


async def executed(house: House) -> tuple[Message, dict[str, Any]]:
    """An execution under a new scope: its answer, and how the scope is listed afterwards."""
    scope = await house.issue()
    answer = await house.execute(scope)
    return answer, await house.scope(scope)


async def ended(house: House, answer: Message) -> dict[str, Any]:
    decision = answer.header("Scopegate-Decision-Id") or answer.json()["decision_id"]
    return await house.ended(decision)


async def not_sent(house: House) -> str:
    """An execution that provably does not reach the backend; its attempt returns. Why, as clients read it."""
    answer, scope = await executed(house)
    assert (answer.status, answer.json()["error"]) == (502, "upstream_unreachable"), answer.body
    assert (await ended(house, answer))["status"] == "not_sent"
    assert (scope["status"], scope["attempts_used"]) == ("active", 0)
    (settled,) = await house.records("&event=settled")
    assert (settled["decision_outcome"], settled["details"]["outcome"]) == ("none", "not_sent")
    assert house.backend.seen == []
    message: str = answer.json()["message"]
    assert message == f"Nothing was sent: {settled['details']['cause']}."
    return message


async def unknown(house: House) -> Message:
    """An execution of which nobody knows how it ended; its attempt stays, and nothing is sent again."""
    answer, scope = await executed(house)
    assert (answer.status, answer.json()["error"]) == (502, "upstream_failed"), answer.body
    assert (await ended(house, answer))["status"] == "unknown"
    assert scope["attempts_used"] == 1
    assert len(house.backend.executions) <= 1
    return answer


@contextmanager
def blocking_backend(tls: ssl.SSLContext) -> Iterator[str]:
    """A backend on threads of its own, which answers 501 to everything. It says in TLS why it refuses
    somebody, which asyncio does not. Its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    server.socket = tls.wrap_socket(server.socket, server_side=True)
    serving = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    serving.start()
    try:
        yield f"https://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        serving.join()
        server.server_close()


# TLS towards the backend --------------------------------------------------------------------------------


async def test_a_gated_execution_goes_to_a_backend_that_a_private_authority_signed(
    build: Build, authority: Authority, pair: Pair
) -> None:
    house = await build(backend_tls=authority.server(pair), upstream=trusting(authority))
    answer, scope = await executed(house)
    assert (answer.status, answer.json()) == (200, {"done": True})
    assert (await ended(house, answer))["status"] == "answered"
    assert scope["status"] == "exhausted"
    (seen,) = house.backend.executions
    assert seen.header("Host") == "localhost", "the client's own, whatever the certificate says"


async def test_a_backend_that_somebody_else_signed_gets_nothing_and_the_attempt_returns(
    build: Build, authority: Authority, pair: Pair, tmp_path: Path
) -> None:
    stranger = Authority(tmp_path, "stranger")
    house = await build(backend_tls=authority.server(pair), upstream=trusting(stranger))
    why = await not_sent(house)
    assert f"certificate of {house.backend.address} is not trusted: unable to get local issuer" in why


async def test_a_backend_is_not_trusted_without_being_told_so(
    build: Build, authority: Authority, pair: Pair
) -> None:
    house = await build(backend_tls=authority.server(pair))
    assert "is not trusted: unable to get local issuer certificate" in await not_sent(house)


async def test_a_backend_with_a_certificate_for_another_name_gets_nothing(
    build: Build, authority: Authority
) -> None:
    other = authority.issue("other", address="127.0.0.2")
    house = await build(backend_tls=authority.server(other), upstream=trusting(authority))
    assert "IP address mismatch, certificate is not valid for '127.0.0.1'" in await not_sent(house)


async def test_a_backend_may_have_another_name_than_its_url_where_it_is_configured(
    build: Build, authority: Authority
) -> None:
    other = authority.issue("other", host="backend.internal", address="127.0.0.2")
    server = authority.server(other)
    asked_for: list[str | None] = []
    server.sni_callback = lambda _, name, __: asked_for.append(name)
    house = await build(backend_tls=server, upstream=trusting(authority, server_name="backend.internal"))
    answer, _ = await executed(house)
    assert answer.status == 200
    assert asked_for == ["backend.internal"]


async def test_a_backend_with_an_expired_certificate_gets_nothing(build: Build, authority: Authority) -> None:
    old = authority.issue("old", days=-1)
    house = await build(backend_tls=authority.server(old), upstream=trusting(authority))
    assert "is not trusted: certificate has expired" in await not_sent(house)


async def test_a_backend_that_speaks_no_tls_gets_nothing(build: Build, authority: Authority) -> None:
    async def speaks_plainly(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    house = await build(url_scheme="https", upstream=trusting(authority))
    house.backend.instead = speaks_plainly
    assert f"no TLS with {house.backend.address}: wrong version number" in await not_sent(house)


async def test_a_backend_that_does_not_finish_the_handshake_in_time_gets_nothing(
    build: Build, authority: Authority
) -> None:
    async def says_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(says_nothing, "127.0.0.1", 0)
    url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    house = await build(upstream={**trusting(authority), "url": url, "connect_timeout_seconds": 0.2})
    assert "within 0.2 s" in await not_sent(house)
    server.close()


async def test_a_backend_that_asks_for_a_certificate_is_shown_ours(
    build: Build, authority: Authority, pair: Pair
) -> None:
    ours = authority.issue("ours")
    house = await build(
        backend_tls=authority.server(pair, asks_clients=True), upstream=trusting(authority, **ours.settings())
    )
    answer, _ = await executed(house)
    assert answer.status == 200


async def test_a_certificate_that_the_backend_refuses_gives_the_attempt_back(
    build: Build, authority: Authority, pair: Pair, tmp_path: Path
) -> None:
    # In TLS 1.3 this comes when our side of the handshake is long done.
    theirs = Authority(tmp_path, "stranger").issue("theirs")
    with blocking_backend(authority.server(pair, asks_clients=True)) as url:
        house = await build(upstream={**trusting(authority, **theirs.settings()), "url": url})
        for _ in range(20):  # it does so whoever is faster
            answer, scope = await executed(house)
            assert (answer.status, scope["attempts_used"]) == (502, 0)
            assert "before anything was sent: tlsv1 alert unknown ca" in answer.json()["message"]


@pytest.mark.parametrize("most", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_without_a_certificate_that_the_backend_asks_for_nothing_is_executed(
    build: Build, authority: Authority, pair: Pair, most: ssl.TLSVersion
) -> None:
    server = authority.server(pair, asks_clients=True)
    server.maximum_version = most
    house = await build(backend_tls=server, upstream=trusting(authority))
    if most is ssl.TLSVersion.TLSv1_2:
        assert "it closed the connection" in await not_sent(house)
    else:
        # The request is on its way by the time the refusal comes: only the backend knows what it read. Should
        # the refusal be faster, it was not sent.
        answer, scope = await executed(house)
        status = (await ended(house, answer))["status"]
        assert (answer.status, status, scope["attempts_used"]) in ((502, "unknown", 1), (502, "not_sent", 0))
    assert house.backend.seen == []


async def test_a_certificate_is_not_waited_for_where_the_backend_tells_nothing(
    build: Build, authority: Authority, pair: Pair
) -> None:
    server = authority.server(pair)
    server.num_tickets = 0
    house = await build(
        backend_tls=server, upstream=trusting(authority, **authority.issue("ours").settings())
    )
    answer, _ = await executed(house)
    assert answer.status == 200


async def test_a_connection_over_tls_is_used_again(build: Build, authority: Authority, pair: Pair) -> None:
    house = await build(backend_tls=authority.server(pair), upstream=trusting(authority))
    for _ in range(5):
        answer, _ = await executed(house)
        assert answer.status == 200
        assert (await house.data("GET", "/status")).status == 200
    assert house.backend.connections == 1


async def test_a_connection_that_the_backend_closed_meanwhile_is_not_used_again(
    build: Build, authority: Authority, pair: Pair
) -> None:
    house = await build(
        backend_tls=authority.server(pair), upstream={**trusting(authority), "reuse_idle_seconds": 60}
    )
    for then in ("close", "reset", "close"):
        house.backend.script = sends(OK, 0.02, then=then)
        answer, _ = await executed(house)
        assert (answer.status, answer.body) == (200, b"ok")
        await asyncio.sleep(0.06)
    assert (len(house.backend.executions), house.backend.connections) == (3, 3)


async def test_nothing_is_sent_twice_while_the_backend_closes_idle_connections(
    build: Build, authority: Authority, pair: Pair
) -> None:
    # The next request meets every moment of the farewell.
    house = await build(
        backend_tls=authority.server(pair), upstream={**trusting(authority), "reuse_idle_seconds": 60}
    )
    endings = {"answered": 0, "unknown": 0}
    for number in range(60):
        house.backend.script = sends(OK, number / 20_000, then="close")
        answer = await house.execute(await house.issue(), headers=[("X-Number", str(number))])
        endings[(await ended(house, answer))["status"]] += 1
    numbers = [seen.header("X-Number") for seen in house.backend.executions]
    assert len(numbers) == len(set(numbers))
    assert endings["answered"] >= 30
    assert endings["answered"] + endings["unknown"] == 60


@pytest.mark.parametrize(
    ("begun", "then"),
    [
        (b"", "reset"),
        (b"", "close"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf", "close"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf", "reset"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n", "close"),
        (TO_ITS_END + b"half", "reset"),
        (TO_ITS_END + b"half", "cut"),
    ],
)
async def test_an_answer_that_is_cut_over_tls_is_unknown(
    build: Build, authority: Authority, pair: Pair, begun: bytes, then: str
) -> None:
    house = await build(backend_tls=authority.server(pair), upstream=trusting(authority))

    async def cut(request: Message, writer: asyncio.StreamWriter) -> None:
        """An end of the connection without TLS's farewell, as anybody on the way can bring it about."""
        await sends(begun)(request, writer)
        raw = writer.get_extra_info("socket")
        raw.shutdown(socket.SHUT_WR)
        await asyncio.sleep(0.05)

    house.backend.script = cut if then == "cut" else sends(begun, then=then)
    await unknown(house)


async def test_an_answer_that_ends_with_tls_is_whole(build: Build, authority: Authority, pair: Pair) -> None:
    house = await build(backend_tls=authority.server(pair), upstream=trusting(authority))
    house.backend.script = sends(TO_ITS_END + b"all of it", then="close")
    answer, _ = await executed(house)
    assert (answer.status, answer.body) == (200, b"all of it")
    assert (await ended(house, answer))["status"] == "answered"


@pytest.mark.parametrize("size", range(300_000, 1_100_000, 100_000))
async def test_an_answer_that_is_read_slowly_is_whole_though_the_backend_left_long_ago(
    authority: Authority, pair: Pair, caplog: pytest.LogCaptureFixture, size: int
) -> None:
    credentials = Credentials("upstream", {"ca_file": authority.certificate_file}, client_context)
    async with serving_backend(tls=authority.server(pair)) as backend:
        client = Upstream(
            backend.address,
            secured=UpstreamTls(credentials=credentials, server_name="gate.test"),
            connect_timeout=2,
            reuse_idle_seconds=1,
            max_connections=1,
        )

        async def leaves(request: Message, writer: asyncio.StreamWriter) -> None:
            head = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % size
            await sends(head + b"x" * size)(request, writer)
            raw = writer.get_extra_info("socket")
            writer.close()
            await asyncio.sleep(0.02)
            with suppress(OSError):  # where the last is read already
                raw.shutdown(socket.SHUT_WR)

        backend.script = leaves
        exchange = await client.send("GET", b"/", [(b"Host", b"x")], None)
        got = 0
        with exchange:
            while True:
                await asyncio.sleep(0.03)  # what can come has come, the end of the connection, too
                if not (piece := await exchange.read()):
                    break
                got += len(piece)
        assert got == size
        await client.close()
        assert client.in_use == 0
    assert complaints(caplog) == []


async def test_a_busy_sidecar_takes_session_tickets_for_what_they_are(
    build: Build, authority: Authority, pair: Pair
) -> None:
    blocks = partial(time.sleep, 0.004)

    async def is_busy() -> None:
        while True:
            blocks()
            await asyncio.sleep(0)

    with blocking_backend(authority.server(pair)) as url:
        house = await build(upstream={**trusting(authority), "url": url, "reuse_idle_seconds": 0})
        busy = asyncio.create_task(is_busy())
        for _ in range(10):
            assert (await house.data("GET", "/status")).status == 501
        busy.cancel()


async def test_a_long_answer_to_a_slow_client_arrives_whole_though_the_backend_has_left(
    build: Build, authority: Authority, pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    house = await build(backend_tls=authority.server(pair), upstream=trusting(authority))
    body = os.urandom(6 << 20)
    house.backend.script = sends(TO_ITS_END + body, then="close")
    reader, writer = await connect(house.sidecar.data_address)
    writer.write(request_bytes("GET", "/long"))
    await asyncio.sleep(0.3)  # everything on the way is full by now
    answer = await read_message(reader)
    assert answer is not None
    assert answer.body == body
    writer.close()
    assert complaints(caplog) == []


# Both kinds of IP addresses -----------------------------------------------------------------------------


async def on_both_kinds(build: Callable[..., Awaitable[House]], **sections: Any) -> House:
    """A house that clients reach at every address of the machine; skips the test where IPv6 is off."""
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            pass
    except OSError:
        pytest.skip("needs IPv6, which is off here")
    return await build(data={"listen": "[::]:0"}, **sections)


async def test_a_listener_on_two_colons_takes_ipv6_and_ipv4(build: Build) -> None:
    house = await on_both_kinds(build)
    address = house.sidecar.data_address
    assert isinstance(address, Listen)
    assert str(address) == f"[::]:{address.port}"
    assert address.port
    for host in ("127.0.0.1", "::1"):
        assert (await ask(Listen(host, address.port), "GET", "/agents")).status == 200


async def test_a_listener_on_ipv4_only_takes_no_ipv6(build: Build) -> None:
    house = await build(data={"listen": "0.0.0.0:0"})
    address = house.sidecar.data_address
    assert isinstance(address, Listen)
    assert (await ask(Listen("127.0.0.1", address.port), "GET", "/agents")).status == 200
    with pytest.raises(OSError):
        await ask(Listen("::1", address.port), "GET", "/agents")


@pytest.mark.parametrize("wanted", ["127.0.0.1", "0.0.0.0", "[::]"])
async def test_an_address_that_is_taken_is_named(build: Build, wanted: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"{wanted}:{taken.getsockname()[1]}"
        said = rf"data\.listen: cannot listen on {re.escape(address)}: .*(?i:address already in use)"
        with pytest.raises(ScopegateError, match=said):
            await build(data={"listen": address})


# TLS on the listeners -----------------------------------------------------------------------------------


async def test_every_face_of_the_sidecar_works_by_tls_and_unix_sockets(
    build: Build, authority: Authority, pair: Pair, tmp_path: Path
) -> None:
    house = await build(
        backend_tls=authority.server(pair),
        upstream=trusting(authority),
        data={"listen": "127.0.0.1:0", "tls": pair.settings()},
        admin={"listen": f"unix:{tmp_path}/admin.sock"},
        ops={"listen": f"unix:{tmp_path}/ops.sock", "tls": pair.settings()},
        tls=authority.client(),
    )
    answer, scope = await executed(house)
    assert (answer.status, answer.json()) == (200, {"done": True})
    assert scope["status"] == "exhausted"
    assert (await ended(house, answer))["status"] == "answered"
    assert (await house.execute(scope)).json()["error"] == "scope_exhausted"
    ends = valid_until(pair.certificate_file).timestamp()
    for listener in ("data", "ops"):
        name = f'scopegate_certificate_expiry_timestamp_seconds{{listener="{listener}"}}'
        assert await house.metric(name) == ends
    assert 'listener="admin"' not in await house.metrics()
    status = (await house.admin("GET", "/api/v1/status")).json()
    assert status["listeners"]["admin"] == f"unix:{tmp_path}/admin.sock"
    servers = (await house.admin("GET", "/openapi.json")).json()["servers"]
    assert [server["url"] for server in servers] == [
        "/",
        f"https://{house.sidecar.data_address}",
        "https://localhost",
    ]


async def test_a_listener_with_an_authority_for_clients_lets_only_those_in_whom_it_signed(
    build: Build, authority: Authority, pair: Pair, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    stranger = Authority(tmp_path, "stranger")
    house = await build(
        data={
            "listen": "127.0.0.1:0",
            "tls": pair.settings(client_ca_file=authority.certificate_file),
        },
        tls=authority.client(authority.issue("client")),
    )
    assert (await house.data("GET", "/status")).status == 200
    for turned_away in (authority.client(), authority.client(stranger.issue("theirs"))):
        with pytest.raises((OSError, AssertionError)):
            await ask(house.sidecar.data_address, "GET", "/status", tls=turned_away)
    assert len(house.backend.seen) == 1
    causes = [
        vars(record)["cause"] for record in caplog.records if record.message == "a TLS handshake failed"
    ]
    assert causes == ["peer did not return a certificate", "unable to get local issuer certificate"]


async def test_whoever_speaks_no_tls_to_a_tls_listener_is_closed_in_one_line_of_log(
    build: Build, authority: Authority, pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    house = await build(data={"listen": "127.0.0.1:0", "tls": pair.settings()}, tls=authority.client())
    caplog.clear()
    reader, writer = await connect(house.sidecar.data_address)
    writer.write(request_bytes("GET", "/"))
    assert b"HTTP" not in await reader.read()
    writer.close()
    await eventually(lambda: len(caplog.records) == 1)
    (record,) = caplog.records
    assert (record.message, record.exc_info) == ("a TLS handshake failed", None)
    assert vars(record)["cause"] == "http request"
    reader, writer = await connect(house.sidecar.data_address)  # and one that only looks whether it is there
    writer.close()
    assert (await house.data("GET", "/status")).status == 200
    assert len([line for line in caplog.records if line.name != "scopegate.access"]) == 1


async def test_a_client_that_does_not_finish_its_handshake_holds_nothing(
    build: Build, authority: Authority, pair: Pair
) -> None:
    house = await build(
        data={"listen": "127.0.0.1:0", "tls": pair.settings()},
        gate={"head_timeout_seconds": 0.15},
        tls=authority.client(),
    )
    started = asyncio.get_running_loop().time()
    reader, writer = await connect(house.sidecar.data_address)
    assert await reader.read() == b""
    assert 0.1 < asyncio.get_running_loop().time() - started < 2
    writer.close()


async def test_a_request_that_comes_with_the_last_of_the_handshake_is_served(
    build: Build, authority: Authority, pair: Pair
) -> None:
    house = await build(data={"listen": "127.0.0.1:0", "tls": pair.settings()}, tls=authority.client())
    address = house.sidecar.data_address
    assert not isinstance(address, SocketFile)
    reader, writer = await asyncio.open_connection(address.host, address.port)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = authority.client().wrap_bio(incoming, outgoing, server_hostname="gate.test")
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    while True:
        writer.write(outgoing.read())
        incoming.write(await reader.read(65_536))
        try:
            client.do_handshake()
            break
        except ssl.SSLWantReadError:
            continue
    client.write(request_bytes("GET", "/at-once"))
    writer.write(outgoing.read())  # the end of the handshake and the request in one packet
    answer = b""
    while b"done" not in answer:
        incoming.write(await reader.read(65_536))
        try:
            answer += client.read(65_536)
        except ssl.SSLWantReadError:
            continue
    assert answer.startswith(b"HTTP/1.1 200 OK")
    writer.close()


async def test_a_client_that_leaves_ends_its_pass_through_request(
    build: Build, authority: Authority, pair: Pair
) -> None:
    house = await build(
        backend_tls=authority.server(pair),
        upstream=trusting(authority),
        data={"listen": "127.0.0.1:0", "tls": pair.settings()},
        tls=authority.client(),
    )
    house.backend.script = sends(then="hang")
    for leave in (lambda one: one.close(), reset):
        house.backend.arrived.clear()
        _, writer = await connect(house.sidecar.data_address, house.tls)
        writer.write(request_bytes("GET", "/events"))
        await house.backend.arrived.wait()
        assert house.sidecar.passing.under_way == 1
        leave(writer)
        await eventually(lambda: house.sidecar.passing.under_way == 0)
        await eventually(lambda: house.sidecar.upstream.in_use == 0)


async def test_a_client_that_leaves_does_not_stop_its_execution(
    build: Build, authority: Authority, pair: Pair
) -> None:
    house = await build(
        backend_tls=authority.server(pair),
        upstream=trusting(authority),
        data={"listen": "127.0.0.1:0", "tls": pair.settings()},
        tls=authority.client(),
    )
    goes_on = asyncio.Event()
    house.backend.script = replies(after=goes_on)
    scope = await house.issue()
    kind, body = house.execution(scope)
    _, writer = await connect(house.sidecar.data_address, house.tls)
    writer.write(request_bytes("POST", EXECUTE, kind, body))
    await house.backend.arrived.wait()
    reset(writer)
    await asyncio.sleep(0.05)
    goes_on.set()
    (execution,) = (await house.admin("GET", "/api/v1/executions")).json()["executions"]
    assert (await house.ended(execution["decision_id"]))["status"] == "answered"


# Passing through ----------------------------------------------------------------------------------------


@asynccontextmanager
async def both_sides(
    build: Build, authority: Authority, pair: Pair, folder: Path, kind: str
) -> AsyncIterator[tuple[House, Address, ssl.SSLContext | None]]:
    """A sidecar that clients and backend reach by TLS, or both by a Unix socket."""
    if kind == "tls":
        house = await build(
            backend_tls=authority.server(pair),
            upstream=trusting(authority),
            data={"listen": "127.0.0.1:0", "tls": pair.settings()},
            tls=authority.client(),
        )
    else:
        house = await build(backend_path=folder / "b.sock", data={"listen": f"unix:{folder}/d.sock"})
    yield house, house.sidecar.data_address, house.tls


KINDS = pytest.mark.parametrize("kind", ["tls", "unix"])


@KINDS
async def test_bodies_stream_through_in_both_directions(
    build: Build, authority: Authority, pair: Pair, tmp_path: Path, kind: str
) -> None:
    body = os.urandom(3 << 20)

    async def echoes(request: Message, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for start in range(0, len(request.body), 100_000):
            piece = request.body[start : start + 100_000]
            writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            await writer.drain()
        writer.write(b"0\r\n\r\n")

    async with both_sides(build, authority, pair, tmp_path, kind) as (house, _, _):
        house.backend.script = echoes
        answer = await house.data("POST", "/upload", (), body)
        assert answer.whole
        assert answer.body == body
        assert house.backend.seen[0].body == body


@KINDS
async def test_events_come_through_as_they_happen(
    build: Build, authority: Authority, pair: Pair, tmp_path: Path, kind: str
) -> None:
    async with both_sides(build, authority, pair, tmp_path, kind) as (house, address, tls):
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        house.backend.script = sends(head, b"7\r\ndata: 1\r\n", then="hang")
        reader, writer = await connect(address, tls)
        writer.write(request_bytes("GET", "/events"))
        async with asyncio.timeout(5):
            assert (await reader.readuntil(b"data: 1")).startswith(b"HTTP/1.1 200 OK")
        writer.close()
        await eventually(lambda: house.sidecar.passing.under_way == 0)


@KINDS
@pytest.mark.parametrize("closes", ["backend", "client"])
async def test_a_websocket_goes_through_until_either_side_closes_it(
    build: Build,
    authority: Authority,
    pair: Pair,
    tmp_path: Path,
    kind: str,
    closes: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    heard = b""
    over = asyncio.Event()

    async with both_sides(build, authority, pair, tmp_path, kind) as (house, address, tls):

        async def talks(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal heard
            await reader.readuntil(b"\r\n\r\n")
            writer.write(SWITCHING + b"hello")
            heard = await reader.readexactly(5)
            if closes == "backend":
                writer.write(b"bye")
            else:
                heard += await reader.read()
            writer.close()
            over.set()

        house.backend.instead = talks
        reader, writer = await connect(address, tls)
        writer.write(request_bytes("GET", "/socket", UPGRADE))
        async with asyncio.timeout(5):
            assert (await reader.readuntil(b"hello")).startswith(b"HTTP/1.1 101 ")
            writer.write(b"there")
            if closes == "backend":
                assert await reader.read() == b"bye"
            else:
                writer.write(b"last words")
                await writer.drain()
                writer.close()
            await over.wait()
        assert heard == (b"there" if closes == "backend" else b"therelast words")
        writer.close()
        await eventually(lambda: house.sidecar.passing.under_way == 0)
        await eventually(lambda: house.sidecar.upstream.in_use == 0)
    assert complaints(caplog) == []


async def test_an_answer_that_only_its_end_delimits_is_not_ended_well_when_it_was_cut(
    build: Build, authority: Authority, pair: Pair
) -> None:
    house = await build(data={"listen": "127.0.0.1:0", "tls": pair.settings()}, tls=authority.client())
    address = house.sidecar.data_address
    assert not isinstance(address, SocketFile)
    where = (address.host, address.port)

    def as_a_client() -> bytes:
        """Strict about the end of TLS, as asyncio is not."""
        got = b""
        with (
            socket.create_connection(where, timeout=5) as plain,
            authority.client().wrap_socket(
                plain, server_hostname="gate.test", suppress_ragged_eofs=False
            ) as secured,
        ):
            secured.sendall(b"GET /old HTTP/1.0\r\n\r\n")
            while piece := secured.recv(65_536):
                got += piece
        return got

    house.backend.script = sends(TO_ITS_END + b"half", 0.1, then="close")
    assert (await asyncio.to_thread(as_a_client)).endswith(b"half")
    house.backend.script = sends(TO_ITS_END + b"half", 0.1, then="reset")
    with pytest.raises(OSError, match=r"(?i)eof|reset"):
        await asyncio.to_thread(as_a_client)


# Unix sockets -------------------------------------------------------------------------------------------


async def test_a_gated_execution_goes_to_a_backend_on_a_unix_socket(build: Build, tmp_path: Path) -> None:
    house = await build(backend_path=tmp_path / "b.sock")
    for _ in range(3):
        answer, scope = await executed(house)
        assert (answer.status, scope["status"]) == (200, "exhausted")
    assert house.backend.connections == 1
    assert house.backend.executions[0].header("Host") == "localhost"


@pytest.mark.parametrize(
    ("left", "why"),
    [
        ("nothing", "cannot connect to {}: No such file or directory"),
        ("stale", "connection refused by {}"),
        ("file", "connection refused by {}"),
    ],
)
async def test_a_backend_that_has_left_its_socket_gets_nothing(
    build: Build, tmp_path: Path, left: str, why: str
) -> None:
    path = tmp_path / "gone.sock"
    if left == "stale":
        stale_socket(path)
    elif left == "file":
        path.write_text("no socket")
    house = await build(upstream={"url": f"unix:{path}"})
    assert why.format(f"unix:{path}") in await not_sent(house)


async def test_a_backend_whose_queue_is_full_gets_nothing(build: Build, tmp_path: Path) -> None:
    path = tmp_path / "full.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        listening.bind(str(path))
        listening.listen(0)
        queued = []
        while True:
            one = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            queued.append(one)
            one.setblocking(False)
            if one.connect_ex(str(path)):
                break
        house = await build(upstream={"url": f"unix:{path}", "connect_timeout_seconds": 0.2})
        assert f"no connection to unix:{path} within 0.2 s" in await not_sent(house)
        for one in queued:
            one.close()


@pytest.mark.parametrize("begun", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf"])
async def test_an_answer_that_is_cut_on_a_unix_socket_is_unknown(
    build: Build, tmp_path: Path, begun: bytes
) -> None:
    house = await build(backend_path=tmp_path / "b.sock")
    house.backend.script = sends(begun, then="close")
    await unknown(house)


def stale_socket(path: Path) -> None:
    """What a process leaves behind that was killed."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as bound:
        bound.bind(str(path))


def sockets_in(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if name.endswith(".sock"))


def on_sockets(folder: Path) -> dict[str, Any]:
    return {name: {"listen": f"unix:{folder}/{name}.sock"} for name in ("data", "admin", "ops")}


async def test_the_admin_socket_is_its_owners_and_the_others_are_their_groups_too(
    build: Build, tmp_path: Path
) -> None:
    before = os.umask(0)
    try:
        await build(**on_sockets(tmp_path))
    finally:
        assert os.umask(before) == 0
    modes = {name: (tmp_path / f"{name}.sock").stat().st_mode for name in ("data", "admin", "ops")}
    assert {name: stat.S_IMODE(mode) for name, mode in modes.items()} == {
        "data": 0o660,
        "admin": 0o600,
        "ops": 0o660,
    }


async def test_a_socket_that_nobody_listens_on_is_replaced(build: Build, tmp_path: Path) -> None:
    for name in ("data", "admin", "ops"):
        stale_socket(tmp_path / f"{name}.sock")
    house = await build(**on_sockets(tmp_path))
    answer, _ = await executed(house)
    assert answer.status == 200


async def test_a_socket_that_somebody_answers_on_is_left_alone(build: Build, tmp_path: Path) -> None:
    async with serving_backend(path=tmp_path / "data.sock") as somebody:
        with pytest.raises(ScopegateError, match=r"another process listens on unix:.*/data\.sock; stop it"):
            await build(**on_sockets(tmp_path))
        assert (await ask(somebody.address, "GET", "/")).status == 200
        assert sockets_in(tmp_path) == ["data.sock"], "its own ones are gone again"


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
async def test_what_is_no_socket_is_never_removed(build: Build, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "data.sock"
    if kind == "file":
        path.write_text("precious")
    elif kind == "folder":
        path.mkdir()
    else:
        stale_socket(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    found = path.lstat()
    with pytest.raises(ScopegateError, match=r"data\.sock is there and is no socket; remove it"):
        await build(**on_sockets(tmp_path))
    assert path.lstat().st_ino == found.st_ino


async def test_a_socket_in_a_folder_that_is_not_there_is_refused(build: Build, tmp_path: Path) -> None:
    with pytest.raises(ScopegateError, match=r"there is no folder .*/run; make it first"):
        await build(data={"listen": f"unix:{tmp_path}/run/data.sock"})


async def test_sockets_are_removed_at_the_end_but_not_those_of_somebody_else(
    tmp_path: Path, clock: Clock
) -> None:
    async with serving_backend() as backend:
        async with opened(tmp_path, backend, clock=clock, **on_sockets(tmp_path)):
            assert sockets_in(tmp_path) == ["admin.sock", "data.sock", "ops.sock"]
            (tmp_path / "ops.sock").unlink()
            stale_socket(tmp_path / "ops.sock")
            theirs = (tmp_path / "ops.sock").stat().st_ino
        assert sockets_in(tmp_path) == ["ops.sock"]
        assert (tmp_path / "ops.sock").stat().st_ino == theirs


# Stopping -----------------------------------------------------------------------------------------------


@KINDS
async def test_what_is_in_flight_is_settled_and_answered_when_the_sidecar_stops(
    build: Build, authority: Authority, pair: Pair, tmp_path: Path, kind: str
) -> None:
    async with both_sides(build, authority, pair, tmp_path, kind) as (house, address, tls):
        house.sidecar.live.terms = replace(
            house.sidecar.live.terms,
            settings=house.sidecar.settings.model_copy(update={"shutdown": Shutdown(drain_seconds=5)}),
        )
        goes_on = asyncio.Event()
        house.backend.script = replies(after=goes_on)
        scope = await house.issue()
        headers, body = house.execution(scope)
        reader, writer = await connect(address, tls)
        writer.write(request_bytes("POST", EXECUTE, headers, body))
        await house.backend.arrived.wait()
        stopping = asyncio.create_task(house.sidecar.stop())
        await asyncio.sleep(0.05)
        goes_on.set()
        answer = await read_message(reader)
        assert answer is not None
        assert (answer.status, answer.header("Scopegate-Scope-Status")) == (200, "exhausted")
        writer.close()
        await stopping


@KINDS
async def test_whoever_connected_before_the_end_is_still_answered(
    build: Build, authority: Authority, pair: Pair, tmp_path: Path, kind: str
) -> None:
    async with both_sides(build, authority, pair, tmp_path, kind) as (house, address, tls):
        family = socket.AF_UNIX if isinstance(address, SocketFile) else socket.AF_INET
        name = str(address.path) if isinstance(address, SocketFile) else (address.host, address.port)
        with socket.socket(family, socket.SOCK_STREAM) as late:
            late.setblocking(False)
            late.connect_ex(name)  # nothing has been awaited since: it waits in the queue of the listener
            stopping = asyncio.create_task(house.sidecar.stop())
            named = None if tls is None else "gate.test"
            reader, writer = await asyncio.open_connection(sock=late, ssl=tls, server_hostname=named)
            writer.write(request_bytes("POST", EXECUTE, *house.execution(None)))
            answer = await read_message(reader)
            assert answer is not None
            assert (answer.status, answer.json()["error"]) == (503, "draining")
            writer.close()
            await stopping


async def test_a_tls_client_that_does_not_react_holds_no_stop_up(
    build: Build, authority: Authority, pair: Pair
) -> None:
    house = await build(data={"listen": "127.0.0.1:0", "tls": pair.settings()}, tls=authority.client())
    address = house.sidecar.data_address
    assert not isinstance(address, SocketFile)

    def connects() -> list[socket.socket]:
        """One in the middle of its handshake, and one that is through and reads nothing more."""
        begun = socket.create_connection((address.host, address.port))
        through = socket.create_connection((address.host, address.port))
        return [begun, authority.client().wrap_socket(through, server_hostname="gate.test")]

    held = await asyncio.to_thread(connects)
    started = asyncio.get_running_loop().time()
    await house.sidecar.stop()
    assert asyncio.get_running_loop().time() - started < 3
    for one in held:
        raw = socket.socket(fileno=os.dup(one.fileno()))  # beneath TLS, whose farewell is no end yet
        raw.settimeout(2)
        with raw, suppress(ConnectionResetError):
            while await asyncio.to_thread(raw.recv, 65_536):
                pass
        one.close()


# Renewal ------------------------------------------------------------------------------------------------


async def shown(house: House, authority: Authority) -> float:
    """The end of the certificate that the data listener shows now."""
    _, writer = await connect(house.sidecar.data_address, authority.client())
    ends = writer.get_extra_info("peercert")["notAfter"]
    writer.close()
    return ssl.cert_time_to_seconds(ends)


EXPIRY = 'scopegate_certificate_expiry_timestamp_seconds{listener="%s"}'


async def test_a_renewed_certificate_is_served_without_a_restart(
    build: Build, authority: Authority, pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    house = await build(
        data={"listen": "127.0.0.1:0", "tls": pair.settings()}, tls=authority.client(), renewal_seconds=0.05
    )
    reader, writer = await connect(house.sidecar.data_address, house.tls)
    old = await shown(house, authority)
    assert await house.metric(EXPIRY % "data") == old
    pair.replace(authority.issue("next", days=9))

    async def renewed() -> bool:
        return await shown(house, authority) > old

    await eventually(renewed)
    assert await house.metric(EXPIRY % "data") == await shown(house, authority)
    (line,) = [record for record in caplog.records if record.message == "certificate renewed"]
    assert vars(line)["listener"] == "data"
    assert vars(line)["valid_until"] == valid_until(pair.certificate_file).isoformat()
    writer.write(request_bytes("GET", "/status"))  # whoever is connected already is not disturbed
    answer = await read_message(reader)
    assert answer is not None
    assert answer.status == 200
    writer.close()


async def test_a_reload_takes_a_renewed_certificate_up(
    build: Build, authority: Authority, pair: Pair
) -> None:
    house = await build(data={"listen": "127.0.0.1:0", "tls": pair.settings()}, tls=authority.client())
    old = await shown(house, authority)
    pair.replace(authority.issue("next", days=9))
    assert await shown(house, authority) == old
    await house.admin("POST", "/api/v1/reload")
    assert await shown(house, authority) > old


async def test_a_renewal_that_does_not_fit_keeps_the_old_and_is_logged_once(
    build: Build, authority: Authority, pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    house = await build(
        data={"listen": "127.0.0.1:0", "tls": pair.settings()}, tls=authority.client(), renewal_seconds=0.02
    )
    old = await shown(house, authority)
    newer = authority.issue("next", days=9)
    pair.key_file.write_bytes(newer.key_file.read_bytes())

    def complained() -> list[logging.LogRecord]:
        return [
            record
            for record in caplog.records
            if record.name == "scopegate.tls" and record.levelno >= logging.WARNING
        ]

    await eventually(lambda: len(complained()) == 1)
    await asyncio.sleep(0.15)
    (complaint,) = complained()
    assert complaint.levelno == logging.ERROR
    assert "key_file: " in vars(complaint)["cause"]
    assert "does not belong to the certificate" in vars(complaint)["cause"]
    assert await shown(house, authority) == old == await house.metric(EXPIRY % "data")
    pair.replace(newer)

    async def renewed() -> bool:
        return await shown(house, authority) > old

    await eventually(renewed)


async def test_the_certificate_that_the_backend_is_shown_and_whom_we_trust_are_renewed(
    build: Build, authority: Authority, pair: Pair, tmp_path: Path
) -> None:
    ours, trusted = authority.issue("ours", days=-1), tmp_path / "trusted.pem"
    trusted.write_bytes(Authority(tmp_path, "stranger").certificate_file.read_bytes())
    house = await build(
        backend_tls=authority.server(pair, asks_clients=True),
        upstream={"tls": {**ours.settings(), "ca_file": str(trusted)}},
        renewal_seconds=0.02,
    )
    assert "is not trusted" in await not_sent(house)
    trusted.write_bytes(authority.certificate_file.read_bytes())
    ours.replace(authority.issue("next", days=9))

    async def works() -> bool:
        return (await house.data("GET", "/status")).status == 200

    await eventually(works)
    answer, _ = await executed(house)
    assert answer.status == 200
    assert await house.metric(EXPIRY % "upstream") == valid_until(ours.certificate_file).timestamp()


async def test_an_expired_certificate_is_warned_about_and_served(
    build: Build, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    old = authority.issue("old", days=-1)
    await build(data={"listen": "127.0.0.1:0", "tls": old.settings()})
    (warning,) = [record for record in caplog.records if record.message in complaints(caplog)]
    assert (warning.message, vars(warning)["listener"]) == ("certificate has expired; renew it", "data")
