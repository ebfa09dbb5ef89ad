"""The client towards the upstream, against scripted servers on real sockets."""

from __future__ import annotations

import asyncio
import gc
import socket
import struct
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import pytest
from httptools import HttpParserError

from sidecar.settings.addresses import Listen
from sidecar.upstream import Exchange, Failed, NotSent, TimedOut, Unanswered, Upstream
from sidecar.upstream._answer import AnswerParser, AnswerState
from sidecar.upstream._client import request_head
from sidecar.upstream._exchange import UpstreamConnection
from sidecar.upstream._head import HeadReader, whole_heads

Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
Connect = Callable[..., Upstream]
Serve = Callable[..., Awaitable[int]]

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
HOST = ((b"Host", b"backend"),)


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """Start a server that runs the script on each connection; `reset()` in a script sends RST."""
    servers: list[asyncio.Server] = []
    tasks: set[asyncio.Task[Any]] = set()

    async def start(script: Script, **options: Any) -> int:
        async def run(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            tasks.add(task)
            try:
                await script(reader, writer)
            except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                pass
            finally:
                tasks.discard(task)
                writer.close()

        server = await asyncio.start_server(run, "127.0.0.1", 0, **options)
        servers.append(server)
        port: int = server.sockets[0].getsockname()[1]
        return port

    yield start
    for server in servers:
        server.close()
    for task in tuple(tasks):
        task.cancel()
    await asyncio.sleep(0.01)


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    clients: list[Upstream] = []

    def make(
        port: int, *, host: str = "127.0.0.1", timeout: float = 2.0, reuse: float = 1.0, most: int = 8
    ) -> Upstream:
        client = Upstream(
            Listen(host, port), connect_timeout=timeout, reuse_idle_seconds=reuse, max_connections=most
        )
        clients.append(client)
        return client

    yield make
    for client in clients:
        await client.close()
        assert client.in_use == client.idle == 0, "a slot was lost"


async def take_request(reader: asyncio.StreamReader) -> bytes:
    """One request with a Content-Length, or none, as it stood on the wire."""
    head = await reader.readuntil(b"\r\n\r\n")
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            head += await reader.readexactly(int(value))
    return head


def answers(*pieces: bytes, then: str = "stay") -> Script:
    """Answer every request with these pieces, each in a packet of its own."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await take_request(reader)
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                if len(pieces) > 1:
                    await asyncio.sleep(0.002)
            if then == "close":
                return
            if then == "reset":
                reset(writer)
                return

    return script


def reset(writer: asyncio.StreamWriter) -> None:
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def body_of(exchange: Exchange) -> bytes:
    body = b""
    while piece := await exchange.read():
        body += piece
    return body


async def get(client: Upstream, *, deadline: float | None = 2.0) -> bytes:
    with await client.send(b"GET", b"/", HOST, None, head_deadline=deadline) as exchange:
        return await body_of(exchange)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(2):
        while not condition():
            await asyncio.sleep(0.001)


async def pieces_of(*pieces: bytes) -> AsyncIterator[bytes]:
    for piece in pieces:
        await asyncio.sleep(0)
        yield piece


# What goes out


async def captured(
    serve: Serve,
    connect: Connect,
    method: bytes,
    headers: Sequence[tuple[bytes, bytes]],
    body: Any,
    **how: Any,
) -> bytes:
    """What stood on the wire; a body ends in END."""
    seen = b""
    end = b"END" if body else b"\r\n\r\n"

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal seen
        while not seen.endswith(end):
            seen += await reader.read(65536)
        writer.write(OK)

    client = connect(await serve(script))
    with await client.send(method, b"/a%2Fb/../c?x=%zz;#", headers, body, head_deadline=2, **how) as exchange:
        assert await body_of(exchange) == b"ok"
    return seen


async def test_target_headers_their_case_order_and_odd_bytes_go_out_as_given(
    serve: Serve, connect: Connect
) -> None:
    headers = [
        (b"hOsT", b"b:1"),
        (b"X-B", b"\xe9\xff"),
        (b"x-a", b""),
        (b"X-B", b" two "),
        (b"X-\xc3", b"a\tb"),
    ]
    assert await captured(serve, connect, b"GET", headers, None) == (
        b"GET /a%2Fb/../c?x=%zz;# HTTP/1.1\r\n"
        b"hOsT: b:1\r\nX-B: \xe9\xff\r\nx-a: \r\nX-B:  two \r\nX-\xc3: a\tb\r\n\r\n"
    )


@pytest.mark.parametrize(
    ("method", "length", "body", "added"),
    [
        (b"POST", None, b"END", b"Content-Length: 3\r\n"),
        (b"POST", None, b"", b"Content-Length: 0\r\n"),
        (b"PATCH", None, b"", b"Content-Length: 0\r\n"),
        (b"DELETE", None, b"", b""),
        (b"DELETE", None, b"END", b"Content-Length: 3\r\n"),
        (b"POST", None, None, b""),
        (b"POST", b"3", b"END", b""),
        (b"GET", b"0", None, b""),
    ],
)
async def test_the_length_is_the_callers_or_added_where_a_body_may_be(
    serve: Serve, connect: Connect, method: bytes, length: bytes | None, body: bytes | None, added: bytes
) -> None:
    headers = [(b"content-LENGTH", length)] if length is not None else []
    given = b"content-LENGTH: %b\r\n" % length if length is not None else b""
    seen = await captured(serve, connect, method, headers, body)
    assert seen == method + b" /a%2Fb/../c?x=%zz;# HTTP/1.1\r\n" + given + added + b"\r\n" + (body or b"")


async def test_a_small_request_leaves_in_one_write(
    serve: Serve, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[bytes] = []
    write = UpstreamConnection.write

    def noted(self: UpstreamConnection, data: bytes) -> None:
        written.append(data)
        write(self, data)

    monkeypatch.setattr(UpstreamConnection, "write", noted)
    client = connect(await serve(answers(OK)))
    with await client.send("POST", b"/", HOST, b"body") as exchange:
        assert exchange.head.status == 200
    assert written == [b"POST / HTTP/1.1\r\nHost: backend\r\nContent-Length: 4\r\n\r\nbody"]


async def test_a_large_body_of_bytes_arrives_whole(serve: Serve, connect: Connect) -> None:
    sizes: list[int] = []

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sizes.append(len(await take_request(reader)))
        writer.write(OK)

    client = connect(await serve(script))
    with await client.send(b"POST", b"/", (), bytes(3_000_000)) as exchange:
        assert await body_of(exchange) == b"ok"
    assert sizes == [3_000_000 + len(b"POST / HTTP/1.1\r\nContent-Length: 3000000\r\n\r\n")]


@pytest.mark.parametrize(
    ("method", "target", "headers", "body", "chunked"),
    [
        (b"GET", b"/", [(b"X", b"a\r\nY: b")], None, False),
        (b"GET", b"/", [(b"X", b"a\nb")], None, False),
        (b"GET", b"/", [(b"X\r", b"a")], None, False),
        (b"GET", b"/", [(b"X", b"a\0")], None, False),
        (b"GET", b"/\n", [], None, False),
        (b"GET", b"/ HTTP/1.1", [], None, False),
        (b"GET", b"", [], None, False),
        (b"GE T", b"/", [], None, False),
        (b"GET", b"/", [(b"Content-Length", b"5")], None, False),
        (b"POST", b"/", [(b"Content-Length", b"5")], b"four", False),
        (b"POST", b"/", [(b"Content-Length", b"4"), (b"content-length", b"4")], b"four", False),
        (b"POST", b"/", [(b"Content-Length", b"+4")], b"four", False),
        (b"POST", b"/", [(b"Transfer-Encoding", b"chunked")], b"four", False),
        (b"POST", b"/", [], b"four", True),
        (b"POST", b"/", [], pieces_of(), False),
        (b"POST", b"/", [(b"Content-Length", b"4")], pieces_of(), True),
    ],
)
async def test_what_cannot_go_out_as_given_is_refused_before_a_connection_is_opened(
    connect: Connect, method: bytes, target: bytes, headers: Any, body: Any, chunked: bool
) -> None:
    with pytest.raises(ValueError):
        await connect(9).send(method, target, headers, body, chunked=chunked)


async def test_a_streamed_body_goes_out_under_its_length_as_it_is(serve: Serve, connect: Connect) -> None:
    body = pieces_of(b"ab", b"", b"c", b"END")
    seen = await captured(serve, connect, b"PUT", [(b"Content-Length", b"6")], body)
    assert seen.endswith(b"HTTP/1.1\r\nContent-Length: 6\r\n\r\nabcEND")


async def test_a_streamed_body_without_length_goes_out_in_chunks(serve: Serve, connect: Connect) -> None:
    seen = b""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal seen
        while not seen.endswith(b"0\r\n\r\n"):
            seen += await reader.read(65536)
        writer.write(OK)

    client = connect(await serve(script))
    body = pieces_of(b"ab", b"", b"0123456789abcdefg")
    with await client.send(b"POST", b"/", (), body, chunked=True) as exchange:
        assert await body_of(exchange) == b"ok"
    chunks = b"2\r\nab\r\n11\r\n0123456789abcdefg\r\n0\r\n\r\n"
    assert seen == b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks
    await until(lambda: client.idle + client.in_use == client.idle)


async def test_nagle_is_off(serve: Serve, connect: Connect) -> None:
    client = connect(await serve(answers(OK)))
    await get(client)
    (connection,) = client._connections
    assert connection.transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


# What comes back: the parser alone, with the answer split at every place

PLAIN = (
    b"HTTP/1.1 200 \xe9k\r\nContent-Length: 5\r\nX-Empty:\r\nX-Blank:  \r\n"
    b"x-DUP: 1\r\nx-DUP: \xe92 \r\n\r\nhello"
)
CHUNKED = (
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\nX: \r\n\r\n"
    b"2;ext=1\r\nhe\r\n3\r\nllo\r\n0\r\nX-Trailer: t\r\nX: \r\n\r\n"
)
SAYS_FIVE = b"Content-Length: 5\r\n\r\n"


def split_every_way(raw: bytes) -> list[tuple[bytes, ...]]:
    ways: list[tuple[bytes, ...]] = [(raw[:at], raw[at:]) for at in range(1, len(raw))]
    return [(raw,), *ways, tuple(raw[at : at + 1] for at in range(len(raw)))]


def parsed(pieces: Sequence[bytes], *, head_only: bool = False) -> AnswerParser:
    parser = AnswerParser(head_only, None)
    for piece in pieces:
        assert not parser.complete
        if parser.feed(piece) is AnswerState.FAILED:
            break
    return parser


@pytest.mark.parametrize(
    ("raw", "head_only", "body", "names"),
    [
        (PLAIN, False, b"hello", [b"Content-Length", b"X-Empty", b"X-Blank", b"x-DUP", b"x-DUP"]),
        (CHUNKED, False, b"hello", [b"Transfer-Encoding", b"X"]),
        (b"HTTP/1.1 200 OK\r\n" + SAYS_FIVE, True, b"", [b"Content-Length"]),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", True, b"", [b"Transfer-Encoding"]),
        (b"HTTP/1.1 204 No\r\nA: b\r\n\r\n", False, b"", [b"A"]),
        (b"HTTP/1.1 304 No\r\n" + SAYS_FIVE, False, b"", [b"Content-Length"]),
        (b"HTTP/1.1 304 No\r\nTransfer-Encoding: chunked\r\n\r\n", False, b"", [b"Transfer-Encoding"]),
        (
            b"HTTP/1.1 100 Continue\r\nI: 1\r\n\r\nHTTP/1.1 103 \r\nLink: x\r\n\r\nHTTP/1.1 199 x\r\n\r\n"
            b"HTTP/1.1 200 OK\r\n" + SAYS_FIVE + b"hello",
            False,
            b"hello",
            [b"Content-Length"],
        ),
    ],
)
def test_an_answer_is_the_same_wherever_packets_split_it(
    raw: bytes, head_only: bool, body: bytes, names: list[bytes]
) -> None:
    for pieces in split_every_way(raw):
        parser = parsed(pieces, head_only=head_only)
        assert parser.complete
        assert parser.reusable
        assert parser.take() == body
        assert parser.head is not None
        assert [name for name, _ in parser.head.headers] == names
        assert parser.head.reason == raw.rpartition(b"HTTP/1.1 ")[2].partition(b"\r\n")[0][4:]


def test_header_values_come_back_as_they_came() -> None:
    for pieces in split_every_way(PLAIN):
        head = parsed(pieces).head
        assert head is not None
        assert head.headers[1:] == (
            (b"X-Empty", b""),
            (b"X-Blank", b""),
            (b"x-DUP", b"1"),
            (b"x-DUP", b"\xe92 "),
        )
        assert (head.status, head.reason, head.version) == (200, b"\xe9k", (1, 1))


def test_a_thousand_headers_keep_their_order() -> None:
    names = [b"X-%d" % number for number in range(1000)]
    raw = b"HTTP/1.1 200 OK\r\n" + b"".join(n + b": v\r\n" for n in names) + b"Content-Length: 0\r\n\r\n"
    head = parsed([raw[:7001], raw[7001:]]).head
    assert head is not None
    assert [name for name, _ in head.headers[:-1]] == names


@pytest.mark.parametrize("method_ends", [b"\r\n\r\n", b"\r\n\r\nHTTP/1.1 200 OK\r\n\r\n", b"\r\n\r\nab"])
def test_a_101_hands_over_what_came_with_it(method_ends: bytes) -> None:
    raw = b"HTTP/1.1 101 S\r\nUpgrade: websocket\r\nConnection: upgrade" + method_ends
    for pieces in split_every_way(raw):
        parser = AnswerParser(False, b"WebSocket")
        for piece in pieces:
            parser.feed(piece)
        assert parser.tunnel
        assert not parser.complete
        assert b"".join(parser.pieces) == method_ends[4:]


@pytest.mark.parametrize(
    "raw",
    [
        b"SSH-2.0-x\r\n",
        b"HTTP/2.0 200 OK\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 099 OK\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\nContent-Length: 0\n\n",
        b"HTTP/1.1 200 OK\r\nA : b\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA: b\r\n folded\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA: b\0\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: +1\r\n\r\na",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nx",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 104 Odd\r\nContent-Length: 1\r\n\r\nx",
        b"HTTP/1.1 101 S\r\n\r\n",
        b"HTTP/1.1 101 S\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhelloX\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + bytes(65536).replace(b"\0", b"x") + b"\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 11000 + b"Content-Length: 0\r\n\r\n",
        b"HTTP/1.1 103 E\r\nLink: x\r\n\r\n" * 4000,
    ],
)
def test_an_answer_that_can_be_read_in_two_ways_or_is_none_is_malformed(raw: bytes) -> None:
    assert parsed([raw]).state is AnswerState.FAILED
    if len(raw) < 1000:
        assert parsed([raw[at : at + 1] for at in range(len(raw))]).state is AnswerState.FAILED


@pytest.mark.parametrize(
    ("start", "more"),
    [
        (b"HTTP/1.1 200 OK\r\nX: ", b"x"),
        (b"HTTP/1.1 103 E\r\n\r\n", b"HTTP/1.1 103 E\r\n\r\n"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: ", b"x"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5;", b"x"),
    ],
)
def test_heads_trailers_and_extensions_without_end_are_cut_off(start: bytes, more: bytes) -> None:
    endless = [start] + [more * (1024 // len(more))] * 100
    parser = parsed(endless)
    assert parser.state is AnswerState.FAILED
    assert parser.fault.startswith("more than 65536 bytes of ")


@pytest.mark.parametrize(
    ("raw", "head_only"),
    [
        (OK + b"x", False),
        (OK + OK, False),
        (OK + b"HTT", False),
        (b"HTTP/1.1 204 No\r\n\r\nx", False),
        (b"HTTP/1.1 200 OK\r\n" + SAYS_FIVE + b"hello", True),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz", True),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\n" + SAYS_FIVE + b"hello", False),
        (b"HTTP/1.1 200 OK\r\nConnection: keep-alive, Close\r\n" + SAYS_FIVE + b"hello", False),
        (b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\n" + SAYS_FIVE + b"hello", False),
    ],
)
def test_a_connection_with_more_to_come_or_none_is_not_reusable(raw: bytes, head_only: bool) -> None:
    parser = parsed([raw], head_only=head_only)
    assert parser.complete
    assert not parser.reusable
    assert parser.head is not None
    assert parser.head.status in (200, 204)


def verdict(raw: bytes, *, head_only: bool = False, offer: bytes | None = None) -> tuple[object, ...]:
    parser = AnswerParser(head_only, offer)
    parser.feed(raw)
    head = parser.head
    shown = (head.status, head.reason, head.headers, head.version, head.content_length) if head else None
    return parser.state, parser.fault, parser.reusable, parser.tunnel, tuple(parser.pieces), shown


def test_a_head_that_was_read_before_gives_what_it_gave_then_and_no_other_head_does() -> None:
    raw = b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nConnection: close\r\n\r\nx"
    changed = [
        raw[:at] + other + raw[at + 1 :] for at in range(len(raw)) for other in (b"0", b"1", b"\n", b" ", b"")
    ]
    for answer in (raw, *changed):
        whole_heads.clear()
        first = verdict(answer)
        verdict(raw)
        assert verdict(answer) == verdict(answer) == first


@pytest.mark.parametrize("framing", [SAYS_FIVE, b"Transfer-Encoding: gzip\r\n\r\n", b"\r\n"])
def test_a_head_that_was_read_before_is_judged_for_each_request(framing: bytes) -> None:
    asked: list[dict[str, Any]] = [{}, {"head_only": True}, {"offer": b"websocket"}, {"offer": b"h2c"}]
    for status in (b"200 OK", b"204 No", b"101 S\r\nConnection: upgrade\r\nUpgrade: websocket"):
        raw = b"HTTP/1.1 " + status + b"\r\n" + framing
        alone = []
        for each in asked:
            whole_heads.clear()
            alone.append(verdict(raw, **each))
        assert [verdict(raw, **each) for each in asked] == alone
        assert [verdict(raw, **each) for each in reversed(asked)] == alone[::-1]


def test_few_heads_are_kept_and_no_large_ones() -> None:
    whole_heads.clear()
    for number in range(1000):
        verdict(b"HTTP/1.1 200 OK\r\nX: %d\r\n\r\n" % number)
    assert 0 < len(whole_heads) <= 64
    whole_heads.clear()
    verdict(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 2048 + b"\r\n\r\n")
    verdict(b"HTTP/1.1 200 OK\r\nA: malformed")
    assert not whole_heads


# What comes back: over sockets


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (PLAIN, b"hello"),
        (CHUNKED, b"hello"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + OK, b"ok"),
        (b"HTTP/1.1 204 No\r\n\r\n", b""),
    ],
)
async def test_a_whole_answer_leaves_the_connection_in_the_pool(
    serve: Serve, connect: Connect, raw: bytes, expected: bytes
) -> None:
    for pieces in ([raw], [raw[:9], raw[9:50], raw[50:]]):
        client = connect(await serve(answers(*pieces)))
        with await client.send(b"GET", b"/", HOST, None, head_deadline=2) as exchange:
            assert await body_of(exchange) == expected
            assert exchange.complete
            assert await exchange.read() == b""
        assert (client.in_use, client.idle) == (0, 1)


async def test_the_answer_to_a_head_request_has_no_body(serve: Serve, connect: Connect) -> None:
    client = connect(await serve(answers(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n")))
    for _ in range(2):
        exchange = await client.send(b"HEAD", b"/", HOST, None, head_deadline=2)
        assert exchange.complete
        assert await exchange.read() == b""
        assert client.idle == 1


async def test_without_framing_the_end_of_the_connection_is_the_true_end(
    serve: Serve, connect: Connect
) -> None:
    client = connect(await serve(answers(b"HTTP/1.1 200 OK\r\n\r\n", b"hel", b"lo", then="close")))
    assert await get(client) == b"hello"
    await until(lambda: client.in_use == client.idle == 0)


@pytest.mark.parametrize(
    ("raw", "then"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhell", "close"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhell", "reset"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhell\r\n", "close"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhell\r\n0\r\n", "close"),
        (b"HTTP/1.1 200 OK\r\n\r\nhell", "reset"),
    ],
)
async def test_a_body_that_is_cut_gives_what_came_and_then_fails(
    serve: Serve, connect: Connect, raw: bytes, then: str
) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await take_request(reader)
        writer.write(raw)
        await proceed.wait()
        if then == "reset":
            reset(writer)

    proceed = asyncio.Event()
    client = connect(await serve(script))
    with await client.send(b"GET", b"/", HOST, None, head_deadline=2) as exchange:
        assert await exchange.read() == b"hell"
        proceed.set()
        for _ in range(2):
            with pytest.raises(Failed, match=r"127\.0\.0\.1"):
                await exchange.read()
        assert not exchange.complete
    await until(lambda: client.in_use == client.idle == 0)


@pytest.mark.parametrize("then", ["close", "reset"])
async def test_a_connection_lost_before_any_answer_is_failed_and_not_unsent(
    serve: Serve, connect: Connect, then: str
) -> None:
    client = connect(await serve(answers(b"", then=then)))
    with pytest.raises(Failed) as caught:
        await get(client)
    assert isinstance(caught.value, Unanswered)
    assert not isinstance(caught.value, NotSent)
    if then == "reset":
        assert isinstance(caught.value.__cause__, ConnectionResetError)


async def test_a_malformed_answer_fails_and_says_of_whom(serve: Serve, connect: Connect) -> None:
    port = await serve(answers(b"HTTPS-2.0-OpenSSH\r\n"))
    client = connect(port)
    with pytest.raises(Failed, match=f"malformed answer from 127.0.0.1:{port}") as caught:
        await get(client)
    assert isinstance(caught.value.__cause__, HttpParserError)


async def test_an_oversized_head_fails(serve: Serve, connect: Connect) -> None:
    client = connect(await serve(answers(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 80_000)))
    with pytest.raises(Failed, match="of head"):
        await get(client)


async def test_a_late_head_times_out_and_closes_the_connection(serve: Serve, connect: Connect) -> None:
    closed = asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await take_request(reader)
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200")
        assert await reader.read() == b""
        closed.set()

    client = connect(await serve(script))
    with pytest.raises(TimedOut, match=r"within 0\.05 s"):
        await get(client, deadline=0.05)
    await asyncio.wait_for(closed.wait(), 2)
    assert client.in_use == client.idle == 0


async def test_the_head_deadline_does_not_bound_the_body(serve: Serve, connect: Connect) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await take_request(reader)
        writer.write(OK[:-2])
        await asyncio.sleep(0.15)
        writer.write(b"ok")

    assert await get(connect(await serve(script)), deadline=0.1) == b"ok"


async def test_a_deadline_that_meets_a_head_just_read_does_not_cost_the_body(
    serve: Serve, connect: Connect
) -> None:
    client = connect(await serve(answers(OK[:-1], b"k")))
    with await client.send(b"GET", b"/", HOST, None) as exchange:
        exchange._late(0.1)
        assert await body_of(exchange) == b"ok"


async def test_a_read_can_be_given_up_and_taken_up_again(serve: Serve, connect: Connect) -> None:
    proceed = asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await take_request(reader)
        writer.write(OK[:-1])
        await proceed.wait()
        writer.write(b"k")

    client = connect(await serve(script))
    with await client.send(b"GET", b"/", HOST, None) as exchange:
        assert await exchange.read() == b"o"
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02):
                await exchange.read()
        proceed.set()
        assert await exchange.read() == b"k"
        assert exchange.complete


# Nothing left


async def test_a_refused_connection_is_not_sent(connect: Connect) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: refused
        port = taken.getsockname()[1]
        client = connect(port)
        with pytest.raises(NotSent, match=f"connection refused by 127.0.0.1:{port}") as caught:
            await get(client)
    assert isinstance(caught.value.__cause__, ConnectionRefusedError)
    assert client.in_use == 0


@pytest.mark.parametrize("error", [socket.gaierror(-2, "Name or service not known"), OSError(24, "Too many")])
async def test_what_the_system_cannot_open_is_not_sent(
    connect: Connect, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    async def fails(*_: object) -> Any:
        raise error

    monkeypatch.setattr(asyncio.get_running_loop(), "create_connection", fails)
    client = connect(9, host="no.such.host")
    with pytest.raises(NotSent, match=r"cannot connect to no\.such\.host:9: .*(Name|Too many)"):
        await get(client)
    assert client.in_use == 0


async def test_a_name_that_is_none_is_not_sent(connect: Connect) -> None:
    with pytest.raises(NotSent):
        await get(connect(9, host="a" * 70 + ".invalid"))


async def test_a_connect_that_hangs_is_not_sent(connect: Connect) -> None:
    with socket.socket() as full, socket.socket() as first, socket.socket() as second:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for filler in (first, second):  # with the queue full, Linux drops further SYNs
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        client = connect(full.getsockname()[1], timeout=0.1)
        with pytest.raises(NotSent, match=r"no connection to .* within 0\.1 s"):
            await get(client)
        assert client.in_use == 0


async def test_waiting_in_vain_for_a_free_connection_is_not_sent(serve: Serve, connect: Connect) -> None:
    client = connect(await serve(answers(b"")), timeout=0.05, most=1)
    first = asyncio.create_task(get(client))
    await until(lambda: client.in_use == 1)
    with pytest.raises(NotSent, match=r"no free connection to .* within 0\.05 s"):
        await get(client)
    assert not client._waiters
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    await until(lambda: client.in_use == 0)


@pytest.mark.parametrize("greeting", [b"", b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n"])
async def test_a_connection_that_closes_or_speaks_before_it_was_asked_is_not_sent(
    connect: Connect, serve: Serve, monkeypatch: pytest.MonkeyPatch, greeting: bytes
) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(greeting)

    async def slowly(self: Upstream) -> UpstreamConnection:
        connection = await open_(self)
        await asyncio.sleep(0.02)
        return connection

    open_ = Upstream._open
    monkeypatch.setattr(Upstream, "_open", slowly)
    with pytest.raises(NotSent, match="before anything was sent"):
        await get(connect(await serve(script)))


# The pool


async def test_a_connection_is_reused_while_it_is_fresh_and_not_beyond(
    serve: Serve, connect: Connect
) -> None:
    opened = 0

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal opened
        opened += 1
        await answers(OK)(reader, writer)

    client = connect(await serve(script), reuse=0.05, most=1)
    for _ in range(5):
        await get(client)
    assert opened == 1
    await asyncio.sleep(0.06)
    await get(client)
    assert opened == 2
    assert (client.in_use, client.idle) == (0, 1)


async def test_with_no_reuse_time_every_request_has_a_connection_of_its_own(
    serve: Serve, connect: Connect
) -> None:
    client = connect(await serve(answers(OK)), reuse=0.0)
    for _ in range(3):
        await get(client)
        assert client.idle == 0


@pytest.mark.parametrize("last", ["close", "reset", "speak"])
async def test_an_idle_connection_on_which_the_peer_acted_is_not_used(
    serve: Serve, connect: Connect, last: str
) -> None:
    peers: list[asyncio.StreamWriter] = []

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peers.append(writer)
        await answers(OK)(reader, writer)

    def act(writer: asyncio.StreamWriter) -> None:
        if last == "reset":
            reset(writer)
        elif last == "speak":
            writer.write(b"HTTP/1.1 408 Late\r\nContent-Length: 0\r\n\r\n")
        else:
            writer.close()

    client = connect(await serve(script))
    await get(client)
    act(peers[0])
    await until(lambda: client.idle == 0)  # the loop sees it and drops the connection

    await get(client)
    peer = socket.socket(fileno=peers[1].get_extra_info("socket").fileno())
    if last == "speak":  # now unseen by the loop: the check right before the write must find it
        peer.send(b"HTTP/1.1 408 Late\r\nContent-Length: 0\r\n\r\n")
    else:
        peer.shutdown(socket.SHUT_RDWR)
    peer.detach()
    assert client.idle == 1
    assert await get(client) == b"ok"
    assert len(peers) == 3


async def test_bytes_behind_an_answer_keep_the_connection_out_of_the_pool(
    serve: Serve, connect: Connect
) -> None:
    client = connect(await serve(answers(OK + b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil")))
    for _ in range(3):
        assert await get(client) == b"ok"
        assert client.idle == 0


async def test_two_hundred_requests_share_eight_connections_in_order(serve: Serve, connect: Connect) -> None:
    now = most = 0
    order: list[int] = []

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal now, most
        while True:
            request = await take_request(reader)
            now += 1
            most = max(most, now)
            order.append(int(request.split()[1][1:]))
            await asyncio.sleep(0.002)
            now -= 1
            close = b"Connection: close\r\n" if order[-1] % 5 == 0 else b""
            writer.write(b"HTTP/1.1 200 OK\r\n%bContent-Length: 2\r\n\r\nok" % close)
            if close:
                return

    client = connect(await serve(script), timeout=5, most=8)

    async def one(number: int) -> bytes:
        with await client.send(b"GET", b"/%d" % number, HOST, None, head_deadline=5) as exchange:
            assert len(client._connections) + client._opening <= 8
            return await body_of(exchange)

    assert await asyncio.gather(*map(one, range(200))) == [b"ok"] * 200
    assert most == 8
    assert all(abs(place - number) < 16 for place, number in enumerate(order)), "first come, first served"
    assert client.in_use == 0


async def test_closing_fails_what_is_under_way_and_what_waits(serve: Serve, connect: Connect) -> None:
    client = connect(await serve(answers(b"")), most=1)
    under_way = asyncio.create_task(get(client))
    await until(lambda: client.in_use == 1)
    waiting = asyncio.create_task(get(client))
    await asyncio.sleep(0.01)
    await client.close()
    with pytest.raises(Failed):
        await under_way
    with pytest.raises(NotSent):
        await waiting
    with pytest.raises(NotSent):
        await get(client)
    assert client.in_use == client.idle == 0


async def test_the_connection_that_was_used_last_is_used_next(serve: Serve, connect: Connect) -> None:
    client = connect(await serve(answers(b"", OK)))
    await asyncio.gather(*(get(client) for _ in range(3)))
    last = [*client._idle][-1]
    with await client.send(b"GET", b"/", HOST, None) as exchange:
        assert exchange._connection is last


@pytest.mark.parametrize("pieces", [[OK], [OK[:20], OK[20:]]])
async def test_a_finished_exchange_leaves_nothing_to_the_cycle_collector(
    serve: Serve, connect: Connect, pieces: list[bytes]
) -> None:
    client = connect(await serve(answers(*pieces)))

    def alive() -> int:
        # By type: an object of another test may refuse to say what it is.
        return sum(issubclass(type(each), Exchange | AnswerParser | HeadReader) for each in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        before = alive()
        whole_heads.clear()
        for _ in range(3):
            await get(client)
        assert alive() == before
    finally:
        gc.enable()


# Cancellation


@pytest.mark.parametrize("kind", ["bytes", "chunked", "waiting", "reading"])
async def test_cancelling_anywhere_loses_no_slot(serve: Serve, connect: Connect, kind: str) -> None:
    chunked = kind == "chunked"

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            request = await reader.readuntil(b"\r\n\r\n")
            if b"chunked" in request:
                await reader.readuntil(b"0\r\n\r\n")
            writer.write(OK[:-1])
            await asyncio.sleep(0)
            writer.write(b"k")

    client = connect(await serve(script), most=1)

    async def one() -> bytes:
        body = pieces_of(b"a", b"b", b"c") if chunked else None
        with await client.send(b"POST", b"/", HOST, body, chunked=chunked) as exchange:
            return await body_of(exchange)

    cancelled = finished = 0
    for steps in range(40):
        others = [asyncio.create_task(one()) for _ in range(2 if kind == "waiting" else 0)]
        task = asyncio.create_task(one())
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        try:
            await task
            finished += 1
        except asyncio.CancelledError:
            cancelled += 1
        assert await asyncio.gather(*others) == [b"ok"] * len(others)
        if kind == "reading":
            assert await one() == b"ok"
        await until(lambda: client.in_use == 0)
        assert not client._waiters
    assert cancelled > 3
    assert finished > 3
    assert await one() == b"ok"


async def test_a_connection_offered_to_a_waiter_that_gives_up_goes_to_the_next(
    serve: Serve, connect: Connect
) -> None:
    client = connect(await serve(answers(OK)), most=1)
    first = await client.send(b"GET", b"/", HOST, None)
    assert first.complete
    connection = client._pooled()
    assert connection is not None
    waiting = [asyncio.create_task(get(client)) for _ in range(2)]
    await asyncio.sleep(0)
    client.offer(connection)
    waiting[0].cancel()  # in the very moment in which it was served
    with pytest.raises(asyncio.CancelledError):
        await waiting[0]
    assert await waiting[1] == b"ok"
    assert (client.in_use, client.idle) == (0, 1)


async def test_an_exchange_left_early_closes_its_connection(serve: Serve, connect: Connect) -> None:
    client = connect(await serve(answers(OK[:-1])))
    with await client.send(b"GET", b"/", HOST, None) as exchange:
        assert await exchange.read() == b"o"
        assert client.in_use == 1
    with pytest.raises(Failed, match="given up"):
        await exchange.read()
    await until(lambda: client.in_use == client.idle == 0)


# Streaming


async def test_an_answer_before_the_end_of_the_body_is_given_and_ends_the_sending(
    serve: Serve, connect: Connect
) -> None:
    stopped = asyncio.Event()

    async def endless() -> AsyncIterator[bytes]:
        try:
            while True:
                yield bytes(16384)
                await asyncio.sleep(0)
        finally:
            stopped.set()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 413 Large\r\nContent-Length: 2\r\n\r\nno")
        while await reader.read(65536):
            pass

    client = connect(await serve(script))
    with await client.send(b"POST", b"/", HOST, endless(), chunked=True, head_deadline=2) as exchange:
        assert exchange.head.status == 413
        assert await body_of(exchange) == b"no"
    await asyncio.wait_for(stopped.wait(), 2)
    await until(lambda: client.in_use == client.idle == 0)


async def test_an_early_answer_to_a_body_of_bytes_keeps_the_connection_out_of_the_pool(
    serve: Serve, connect: Connect
) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(OK)
        await asyncio.Event().wait()

    client = connect(await serve(script))
    with await client.send(b"POST", b"/", HOST, bytes(16 << 20), head_deadline=2) as exchange:
        assert await body_of(exchange) == b"ok"
    await until(lambda: client.in_use == client.idle == 0)


async def test_an_early_answer_survives_the_reset_that_follows_it(connect: Connect) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()

        async def body() -> AsyncIterator[bytes]:
            yield bytes(16384)
            await asyncio.sleep(0.02)
            peer = listener.accept()[0]
            peer.send(b"HTTP/1.1 413 Large\r\nContent-Length: 2\r\n\r\nno")
            peer.close()  # with bytes unread: a reset, and our next write would fail
            yield bytes(16384)
            yield bytes(16384)

        client = connect(listener.getsockname()[1])
        with await client.send(b"POST", b"/", HOST, body(), chunked=True, head_deadline=2) as exchange:
            assert exchange.head.status == 413
            assert await body_of(exchange) == b"no"
    await until(lambda: client.in_use == client.idle == 0)


@pytest.mark.parametrize(
    ("length", "pieces", "why"),
    [(b"3", [b"ab"], "shorter"), (b"3", [b"ab", b"cd"], "longer"), (b"0", [b"a"], "longer")],
)
async def test_a_body_that_is_not_what_was_promised_fails(
    serve: Serve, connect: Connect, length: bytes, pieces: list[bytes], why: str
) -> None:
    seen = b""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal seen
        seen = await reader.read()

    client = connect(await serve(script))
    with pytest.raises(Failed, match=why) as caught:
        await client.send(b"POST", b"/", [(b"Content-Length", length)], pieces_of(*pieces))
    assert isinstance(caught.value.__cause__, ValueError)
    await until(lambda: client.in_use == client.idle == 0)
    assert not seen.endswith(b"d")


async def test_a_client_that_goes_away_in_its_body_surfaces_in_send_and_in_read(
    serve: Serve, connect: Connect
) -> None:
    async def breaks() -> AsyncIterator[bytes]:
        yield b"a"
        await gone.wait()
        raise ConnectionResetError("the client went away")

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if b"/early" in head:
            writer.write(OK[:-1])
        await reader.read()

    client = connect(await serve(script))
    gone = asyncio.Event()
    gone.set()
    with pytest.raises(Failed, match="went away") as caught:
        await client.send(b"POST", b"/", HOST, breaks(), chunked=True)
    assert isinstance(caught.value.__cause__, ConnectionResetError)

    gone = asyncio.Event()
    with await client.send(b"POST", b"/early", HOST, breaks(), chunked=True) as exchange:
        assert await exchange.read() == b"o"
        gone.set()
        with pytest.raises(Failed, match="went away") as caught:
            await exchange.read()
    assert isinstance(caught.value.__cause__, ConnectionResetError)
    await until(lambda: client.in_use == client.idle == 0)


async def test_large_bodies_stream_both_ways_in_little_memory(serve: Serve, connect: Connect) -> None:
    size, piece = 64 << 20, bytes(128 << 10)

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        left = size
        while left:
            echo = await reader.read(1 << 18)
            left -= len(echo)
            writer.write(echo)
            await writer.drain()

    async def body() -> AsyncIterator[bytes]:
        for _ in range(size // len(piece)):
            yield piece

    client = connect(await serve(script))
    tracemalloc.start()
    try:
        headers = [(b"Content-Length", b"%d" % size)]
        with await client.send(b"PUT", b"/", headers, body()) as exchange:
            received = 0
            while got := await exchange.read():
                received += len(got)
            assert received == size
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 6 << 20


async def test_a_reader_that_pauses_holds_the_upstream_back(serve: Serve, connect: Connect) -> None:
    sent = 0

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await take_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (64 << 20))
        while sent < 64 << 20:
            writer.write(bytes(1 << 18))
            sent += 1 << 18
            await writer.drain()

    client = connect(await serve(script))
    with await client.send(b"GET", b"/", HOST, None) as exchange:
        await asyncio.sleep(0.1)
        assert exchange._parser.waiting < 1 << 20
        assert sent < 32 << 20
        received = len(await exchange.read())
        while piece := await exchange.read():
            received += len(piece)
        assert received == 64 << 20


async def test_an_upstream_that_does_not_read_holds_the_body_back(serve: Serve, connect: Connect) -> None:
    drawn = 0
    proceed = asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        nonlocal drawn
        for _ in range(512):
            drawn += 1 << 16
            yield bytes(1 << 16)

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await proceed.wait()
        await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(512 << 16)
        writer.write(OK)

    client = connect(await serve(script))
    task = asyncio.create_task(
        client.send(b"PUT", b"/", [(b"Content-Length", b"%d" % (512 << 16))], body(), head_deadline=2)
    )
    await asyncio.sleep(0.1)
    assert drawn < 16 << 20
    proceed.set()
    assert await body_of(await task) == b"ok"
    assert drawn == 512 << 16


# Tunnels

UPGRADE = ((b"Host", b"backend"), (b"Connection", b"Upgrade"), (b"Upgrade", b"websocket"))
SWITCH = b"HTTP/1.1 101 Switching\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"


async def test_after_a_101_raw_bytes_go_both_ways_until_both_sides_end(
    serve: Serve, connect: Connect
) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await take_request(reader)
        writer.write(SWITCH + b"\x81first")
        while piece := await reader.read(65536):
            writer.write(piece.upper())
        writer.write(b"last")

    client = connect(await serve(script))
    with await client.send(b"GET", b"/ws", UPGRADE, None, head_deadline=2) as exchange:
        assert exchange.upgraded
        assert exchange.head.status == 101
        assert await exchange.read() == b"\x81first"
        await exchange.write(b"hello \xff")
        assert await exchange.read() == b"HELLO \xff"
        exchange.write_eof()
        assert await body_of(exchange) == b"last"
        with pytest.raises(Failed):
            await exchange.write(b"too late")
    await until(lambda: client.in_use == client.idle == 0)


async def test_a_tunnel_whose_upstream_ends_first_takes_all_that_is_still_written(
    serve: Serve, connect: Connect
) -> None:
    got = sent = 0
    proceed = asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal got
        await take_request(reader)
        writer.write(SWITCH)
        writer.write_eof()
        await proceed.wait()
        while piece := await reader.read(1 << 20):
            got += len(piece)

    client = connect(await serve(script))
    with await client.send(b"GET", b"/ws", UPGRADE, None, head_deadline=2) as exchange:
        assert await exchange.read() == b""
        while not exchange._connection.transport.get_write_buffer_size():
            await exchange.write(bytes(1 << 15))
            sent += 1 << 15
        exchange.write_eof()
    proceed.set()
    await until(lambda: got == sent and client.in_use == client.idle == 0)


async def test_a_tunnel_that_is_left_after_the_upstream_ended_is_closed(
    serve: Serve, connect: Connect
) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await take_request(reader)
        writer.write(SWITCH)
        writer.write_eof()
        await asyncio.Event().wait()

    client = connect(await serve(script))
    with await client.send(b"GET", b"/ws", UPGRADE, None, head_deadline=2) as exchange:
        assert await exchange.read() == b""
    await until(lambda: client.in_use == client.idle == 0)


async def test_a_write_that_waits_fails_when_the_tunnel_is_reset(serve: Serve, connect: Connect) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await take_request(reader)
        writer.write(SWITCH)
        await asyncio.sleep(0.1)
        reset(writer)

    async def fill(exchange: Exchange) -> None:
        while True:
            await exchange.write(bytes(1 << 16))

    client = connect(await serve(script))
    exchange = await client.send(b"GET", b"/ws", UPGRADE, None, head_deadline=2)
    with exchange, pytest.raises(Failed, match="lost"):
        await asyncio.wait_for(fill(exchange), 2)


async def test_a_tunnel_that_is_reset_fails_both_ways(serve: Serve, connect: Connect) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await take_request(reader)
        writer.write(SWITCH)
        await reader.read(1)
        reset(writer)

    client = connect(await serve(script))
    with await client.send(b"GET", b"/ws", UPGRADE, None, head_deadline=2) as exchange:
        await exchange.write(b"x")
        with pytest.raises(Failed):
            await exchange.read()
        with pytest.raises(Failed):
            await exchange.write(b"y")
    assert client.in_use == client.idle == 0


async def test_a_tunnel_that_is_left_is_closed(serve: Serve, connect: Connect) -> None:
    client = connect(await serve(answers(SWITCH)))
    with await client.send(b"GET", b"/ws", UPGRADE, None, head_deadline=2) as exchange:
        assert client.in_use == 1
    assert not exchange.complete
    await until(lambda: client.in_use == client.idle == 0)


async def test_writing_into_a_tunnel_waits_for_the_upstream_to_read(serve: Serve, connect: Connect) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await take_request(reader)
        writer.write(SWITCH)
        await asyncio.Event().wait()

    client = connect(await serve(script))
    with await client.send(b"GET", b"/ws", UPGRADE, None, head_deadline=2) as exchange:

        async def fill() -> None:
            while True:
                await exchange.write(bytes(1 << 16))

        for _ in range(2):  # a write that was given up does not break the next
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(fill(), 0.1)


async def test_a_switch_of_protocols_unasked_fails(serve: Serve, connect: Connect) -> None:
    client = connect(await serve(answers(SWITCH)))
    with pytest.raises(Failed, match="not offered"):
        await get(client)


async def test_an_answer_that_declines_the_upgrade_is_an_answer(serve: Serve, connect: Connect) -> None:
    client = connect(await serve(answers(b"HTTP/1.1 426 No\r\nUpgrade: h2c\r\nContent-Length: 2\r\n\r\nno")))
    with await client.send(b"GET", b"/ws", UPGRADE, None, head_deadline=2) as exchange:
        assert not exchange.upgraded
        assert await body_of(exchange) == b"no"
        with pytest.raises(RuntimeError):
            await exchange.write(b"x")
    assert client.idle == 1


def test_the_head_is_built_without_a_connection() -> None:
    assert request_head(b"GET", b"*", HOST, None, False) == (
        b"GET * HTTP/1.1\r\nHost: backend\r\n\r\n",
        None,
        None,
    )
