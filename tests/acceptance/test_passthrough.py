"""What is not gated behaves through the sidecar as without it: bytes, headers, times and endings.

httpbin stands for somebody else's service; where single bytes or moments matter, a backend is scripted.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import websockets.asyncio.client as websocket_client
import websockets.asyncio.server as websocket_server
from websockets import Request, Response
from websockets.exceptions import ConnectionClosed, ConnectionClosedError, InvalidStatus
from websockets.frames import CloseCode

from tests.acceptance.conftest import (
    ASK_SECONDS,
    HEAD_TIMEOUT,
    RESPONSE_TIMEOUT,
    Address,
    Pair,
    Play,
    Program,
    Script,
    ask,
    write_configuration,
)
from tests.client import BlockingConnection, Message
from tests.support import reset

HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding"}
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def end_to_end(answer: Message) -> Message:
    """The answer without what may differ: Date, and what concerns one connection."""
    other = {"date", *HOP_BY_HOP}
    kept = tuple((name, value) for name, value in answer.raw_headers if name.lower() not in other)
    return replace(answer, raw_headers=kept)


def both(
    pair: Pair,
    method: str,
    target: str,
    headers: Sequence[tuple[str, str]] = (),
    body: bytes | Callable[[], Any] | None = None,
) -> Message:
    """The answer through the sidecar, which must be the one without it; `body` may make an iterable."""
    direct, through = (
        ask(address, method, target, headers, body() if callable(body) else body)
        for address in (pair.backend, pair.sidecar.data)
    )
    assert end_to_end(through) == end_to_end(direct)
    return through


# httpbin -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "TRACE"])
def test_every_method_arrives_with_its_body_and_its_headers(httpbin: Pair, method: str) -> None:
    body = None if method in ("GET", "TRACE") else b'{"a": [1, 2]}'
    headers = [("Content-Type", "application/json"), ("X-Mine", "1"), ("Accept", "*/*")]
    answer = both(httpbin, method, "/anything/x?b=1&b=2&c=%20", headers, body)
    if method != "TRACE":
        assert answer.json()["method"] == method
        assert answer.json()["headers"].keys() <= {
            "Host",
            "Content-Type",
            "X-Mine",
            "Accept",
            "Content-Length",
        }


def test_a_get_may_carry_a_body(httpbin: Pair) -> None:
    assert both(httpbin, "GET", "/anything", body=b"unusual").json()["data"] == "unusual"


def test_head_and_options_answer_as_the_backend_does(httpbin: Pair) -> None:
    answer = both(httpbin, "HEAD", "/bytes/500?seed=1")
    assert (answer.body, answer.headers("content-length")) == (b"", ["500"])
    assert "GET" in both(httpbin, "OPTIONS", "/get").headers("allow")[0]


@pytest.mark.parametrize(
    "status",
    [
        200,
        201,
        202,
        203,
        204,
        205,
        206,
        226,
        300,
        301,
        302,
        303,
        304,
        305,
        307,
        308,
        400,
        401,
        402,
        403,
        404,
        405,
        406,
        407,
        408,
        409,
        410,
        411,
        412,
        413,
        414,
        415,
        416,
        417,
        418,
        422,
        425,
        426,
        428,
        429,
        431,
        451,
        499,
        500,
        501,
        502,
        503,
        504,
        505,
        507,
        511,
        520,
        599,
    ],
)
def test_every_status_comes_back_with_its_reason_and_body(httpbin: Pair, status: int) -> None:
    assert both(httpbin, "GET", f"/status/{status}").status == status
    assert both(httpbin, "POST", f"/status/{status}", body=b"x=1").status == status


@pytest.mark.parametrize(
    "target",
    ["/redirect/3", "/relative-redirect/2", "/absolute-redirect/2", "/redirect-to?url=http://other.test/x"],
)
def test_no_redirect_is_followed_or_rewritten(httpbin: Pair, target: str) -> None:
    answer = both(httpbin, "GET", target)
    assert answer.status == 302
    assert answer.headers("location")


@pytest.mark.parametrize(("coding", "start"), [("gzip", b"\x1f\x8b"), ("deflate", b"\x78"), ("brotli", None)])
def test_a_content_coding_stays_as_it_is(httpbin: Pair, coding: str, start: bytes | None) -> None:
    answer = both(httpbin, "GET", f"/{coding}", [("Accept-Encoding", "gzip, deflate, br")])
    assert answer.headers("content-encoding") == ["br" if coding == "brotli" else coding]
    assert not answer.body.startswith(b"{")
    if start:
        assert answer.body.startswith(start)


@pytest.mark.parametrize(
    "target",
    [
        "/get?show_env=1",
        "/stream/5",
        "/stream-bytes/5000?seed=7&chunk_size=333",
        "/bytes/0?seed=1",
        "/encoding/utf8",
        "/html",
        "/xml",
        "/json",
        "/image/png",
        "/robots.txt",
        "/deny",
        "/links/5/2",
        "/cache/60",
        "/base64/aGVsbG8=",
        "/response-headers?X-A=1&X-A=2&X-B=%C3%A9",
        "/user-agent",
        "/headers",
        "/ip",
        "/does/not/exist",
        "/cookies/set?a=1&b=2",
        "/cookies/delete?a",
    ],
)
def test_an_endpoint_answers_as_without_the_sidecar(httpbin: Pair, target: str) -> None:
    both(httpbin, "GET", target, [("User-Agent", "test/1"), ("Cookie", "a=1; b=2")])


def test_each_set_cookie_is_kept_as_a_line_of_its_own(httpbin: Pair) -> None:
    answer = both(httpbin, "GET", "/cookies/set?one=1&two=2&three=3")
    assert len(answer.headers("set-cookie")) == 3


@pytest.mark.parametrize("size", [1, 255, 1024, 16_383, 65_537, 102_400])
def test_random_bytes_arrive_unchanged_in_both_directions(httpbin: Pair, size: int) -> None:
    body = both(httpbin, "GET", f"/bytes/{size}?seed={size}").body
    assert len(body) == size
    headers = [("Content-Type", "application/octet-stream")]
    both(httpbin, "POST", "/anything", headers, body)
    both(httpbin, "PUT", "/anything", headers, lambda: iter([body[:100], body[100:]]))


def test_a_chunked_request_body_arrives_chunked_and_whole(httpbin: Pair) -> None:
    pieces = [b"one", b"two" * 1000, b"three"]
    answer = both(httpbin, "POST", "/anything", [("Content-Type", "text/plain")], lambda: iter(pieces))
    assert answer.json()["data"].encode() == b"".join(pieces)
    assert answer.json()["headers"]["Transfer-Encoding"] == "chunked"


def test_a_multipart_upload_keeps_its_parts(httpbin: Pair) -> None:
    parts = (
        b'--b\r\nContent-Disposition: form-data; name="field"\r\n\r\nvalue\r\n'
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.bin"\r\n\r\n\x00\xff\r\n--b--\r\n'
    )
    answer = both(httpbin, "POST", "/post", [("Content-Type", "multipart/form-data; boundary=b")], parts)
    assert answer.json()["form"] == {"field": "value"}
    assert list(answer.json()["files"]) == ["file"]


def test_ranges_are_served_by_the_backend(httpbin: Pair) -> None:
    answer = both(httpbin, "GET", "/range/1000", [("Range", "bytes=10-19")])
    assert (answer.status, answer.body) == (206, b"klmnopqrst")
    assert answer.headers("content-range") == ["bytes 10-19/1000"]
    assert both(httpbin, "GET", "/range/10", [("Range", "bytes=50-")]).status == 416


def test_credentials_reach_the_backend(httpbin: Pair) -> None:
    guarded = "/basic-auth/user/passwd"
    assert both(httpbin, "GET", guarded).headers("www-authenticate")
    assert both(httpbin, "GET", guarded, [("Authorization", "Basic dXNlcjpwYXNzd2Q=")]).status == 200
    assert both(httpbin, "GET", "/bearer", [("Authorization", "Bearer t")]).json()["token"] == "t"


def test_conditional_requests_are_answered_by_the_backend(httpbin: Pair) -> None:
    assert both(httpbin, "GET", "/etag/abc").headers("etag") == ["abc"]
    assert both(httpbin, "GET", "/etag/abc", [("If-None-Match", "abc")]).status == 304
    assert both(httpbin, "GET", "/etag/abc", [("If-Match", "other")]).status == 412
    assert both(httpbin, "GET", "/cache", [("If-Modified-Since", "x")]).status == 304


def test_a_slow_answer_arrives_as_it_is_sent(httpbin: Pair) -> None:
    with socket.create_connection(httpbin.sidecar.data, timeout=ASK_SECONDS) as client:
        client.sendall(b"GET /drip?duration=1&numbytes=5&delay=0 HTTP/1.1\r\nHost: b\r\n\r\n")
        stream = client.makefile("rb")
        while stream.readline() != b"\r\n":
            pass
        begun = time.monotonic()
        first = stream.read(1)
        first_after = time.monotonic() - begun
        rest = stream.read(4)
        whole_after = time.monotonic() - begun
    assert (first + rest, first_after < 0.4, whole_after > 0.6) == (b"*" * 5, True, True)


def test_one_connection_carries_many_requests(httpbin: Pair) -> None:
    with BlockingConnection(httpbin.sidecar.data) as connection:
        ports = set()
        for number in range(30):
            method, body = ("POST", b"x" * number) if number % 2 else ("GET", None)
            answer = connection.ask(method, f"/anything/{number}", body=body)
            assert answer.json()["url"].endswith(f"/{number}")
            assert connection.socket is not None
            ports.add(connection.socket.getsockname())
        assert len(ports) == 1


# Scripted backends -------------------------------------------------------------------------------------


async def take_request(reader: asyncio.StreamReader) -> bytes:
    """One request as it stood on the wire."""
    head = await reader.readuntil(b"\r\n\r\n")
    if b"transfer-encoding: chunked" in head.lower():
        return head + await reader.readuntil(b"0\r\n\r\n")
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            head += await reader.readexactly(int(value))
    return head


def recording(seen: list[bytes], answer: bytes = OK) -> Script:
    """Note each request, and answer it with these bytes."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            seen.append(await take_request(reader))
            writer.write(answer)
            await writer.drain()

    return script


class Client:
    """A connection on which bytes are written and read."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def send(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.writer.write(piece)
            await self.writer.drain()

    async def head(self) -> bytes:
        async with asyncio.timeout(ASK_SECONDS):
            return await self.reader.readuntil(b"\r\n\r\n")

    async def exactly(self, size: int) -> bytes:
        async with asyncio.timeout(ASK_SECONDS):
            return await self.reader.readexactly(size)

    async def rest(self) -> bytes:
        """All that comes until the connection ends."""
        async with asyncio.timeout(ASK_SECONDS):
            return await self.reader.read()


def content_length(head: bytes) -> int:
    return int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])


@pytest.fixture
async def connect() -> AsyncIterator[Callable[[Address], Any]]:
    clients: list[Client] = []

    async def open_connection(address: Address) -> Client:
        clients.append(Client(*await asyncio.open_connection(*address)))
        return clients[-1]

    yield open_connection
    for client in clients:
        client.writer.close()
    await asyncio.sleep(0)


@pytest.mark.parametrize(
    "target",
    [
        b"/",
        b"/anything/a%2Fb",
        b"/a%zz",
        b"/a%",
        b"//x",
        b"//x//y",
        b"/./a",
        b"/a/../b",
        b"/%2e%2e/a",
        b"/?a=%20&b",
        b"/a;p=1",
        b"/a?x=1?y=2&&=",
        b"/a%0Ab%00",
        b"/a\\b",
        b'/a?b="<>^`{|}',
        b"/a#fragment",
        b"/a?",
        b"/a?q#f",
        b"http://other.test/x?y",
        b"/" + b"x" * 8000,
        b"http://other.test",
        b"/a:b@c",
        b"/:80",
        b"//user:pw@host:99999/x",
    ],
)
async def test_a_target_reaches_the_backend_as_it_came(
    play: Play, sidecar: Program, connect: Any, target: bytes
) -> None:
    seen: list[bytes] = []
    await play(recording(seen))
    client = await connect(sidecar.data)
    request = b"GET " + target + b" HTTP/1.1\r\nHost: backend.test\r\n\r\n"
    await client.send(request)
    assert await client.exactly(len(OK)) == OK
    assert seen == [request]


async def test_options_asterisk_reaches_the_backend(play: Play, sidecar: Program, connect: Any) -> None:
    seen: list[bytes] = []
    await play(recording(seen))
    client = await connect(sidecar.data)
    await client.send(b"OPTIONS * HTTP/1.1\r\nHost: backend.test\r\n\r\n")
    assert await client.exactly(len(OK)) == OK
    assert seen == [b"OPTIONS * HTTP/1.1\r\nHost: backend.test\r\n\r\n"]


@pytest.mark.parametrize(
    "framing",
    [
        b"\r\n",
        b"Content-Length: 5\r\n\r\nhello",
        b"content-length: 0\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    ],
)
async def test_headers_reach_the_backend_byte_for_byte_and_none_is_added(
    play: Play, sidecar: Program, connect: Any, framing: bytes
) -> None:
    seen: list[bytes] = []
    await play(recording(seen))
    client = await connect(sidecar.data)
    request = (
        b"POST /x HTTP/1.1\r\nx-LOWER-Upper: 1\r\nHost: backend.test\r\nX-Latin: caf\xe9\r\nX-Dup: a\r\n"
        b"Accept: */*\r\nx-dup: b, c\r\nX-Empty: \r\nX-Utf-8: \xc3\xa9\r\nCookie: a=1\r\nCookie: b=2\r\n"
        b"X_Under_Score: 1\r\nScopegate-Mine: 1\r\nVia: 1.1 other\r\nX-Forwarded-For: 10.0.0.1\r\n"
    ) + framing
    await client.send(request)
    assert await client.exactly(len(OK)) == OK
    assert seen == [request]


async def test_only_hop_by_hop_headers_end_at_the_sidecar(play: Play, sidecar: Program, connect: Any) -> None:
    seen: list[bytes] = []
    await play(recording(seen))
    client = await connect(sidecar.data)
    await client.send(
        b"GET /x HTTP/1.1\r\nHost: b\r\nConnection: keep-alive, X-Hop\r\nX-Hop: 1\r\nKeep-Alive: 5\r\n"
        b"TE: trailers\r\nProxy-Connection: x\r\nTrailer: x\r\nX-End: 1\r\n\r\n"
    )
    assert await client.exactly(len(OK)) == OK
    assert seen == [b"GET /x HTTP/1.1\r\nHost: b\r\nX-End: 1\r\n\r\n"]


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 299 Caf\xe9  it is\r\nx-ODD-case: 1\r\nX-Latin: caf\xe9\r\nSet-Cookie: a\r\n"
        b"X-Empty: \r\nset-cookie: b\r\nContent-Length: 3\r\n\r\nabc",
        b"HTTP/1.1 200 \r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 204 No Content\r\nX-A: 1\r\n\r\n",
        b"HTTP/1.1 304 Not Modified\r\nETag: x\r\nContent-Length: 77\r\n\r\n",
        b"HTTP/1.1 404 Nein\r\nContent-Length: 1\r\nScopegate-Decision-Id: theirs\r\nServer: x\r\n\r\n?",
        b"HTTP/1.1 200 OK\r\nX-A: 1\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    ],
)
async def test_an_answer_comes_back_byte_for_byte_and_nothing_is_added(
    play: Play, sidecar: Program, connect: Any, answer: bytes
) -> None:
    await play(recording([], answer))
    client = await connect(sidecar.data)
    for _ in range(2):  # twice, so that neither leaves anything behind on the connection
        await client.send(b"GET /x HTTP/1.1\r\nHost: b\r\n\r\n")
        assert await client.exactly(len(answer)) == answer


async def test_head_has_the_headers_of_get_and_no_body(play: Play, sidecar: Program, connect: Any) -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 12345\r\nX-A: 1\r\n\r\n"
    await play(recording([], answer))
    client = await connect(sidecar.data)
    await client.send(b"HEAD /x HTTP/1.1\r\nHost: b\r\n\r\n" * 2)
    assert await client.exactly(2 * len(answer)) == 2 * answer


async def test_interim_answers_do_not_disturb_the_final_one(
    play: Play, sidecar: Program, connect: Any
) -> None:
    interim = b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n"
    await play(recording([], interim + OK))
    client = await connect(sidecar.data)
    await client.send(b"GET /x HTTP/1.1\r\nHost: b\r\n\r\n")
    assert await client.exactly(len(OK)) == OK


async def test_pipelined_requests_are_answered_in_order(play: Play, sidecar: Program, connect: Any) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            target = (await take_request(reader)).split(b" ")[1]
            if target == b"/1":
                await asyncio.sleep(0.1)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n" + target)

    await play(script)
    client = await connect(sidecar.data)
    await client.send(b"".join(b"GET /%d HTTP/1.1\r\nHost: b\r\n\r\n" % number for number in (1, 2, 3)))
    for number in (1, 2, 3):
        assert await client.exactly(len(OK)) == OK[:-2] + b"/%d" % number


async def test_an_http_1_0_client_gets_the_whole_answer_and_then_the_end(
    play: Play, sidecar: Program, connect: Any
) -> None:
    await play(recording([], b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"))
    client = await connect(sidecar.data)
    await client.send(b"GET /x HTTP/1.0\r\nHost: b\r\n\r\n")
    assert await client.rest() == b"HTTP/1.0 200 OK\r\n\r\nabc"


async def test_an_http_1_0_client_may_keep_its_connection(play: Play, sidecar: Program, connect: Any) -> None:
    await play(recording([]))
    client = await connect(sidecar.data)
    for _ in range(2):
        await client.send(b"GET /x HTTP/1.0\r\nHost: b\r\nConnection: keep-alive\r\n\r\n")
        assert b"\r\nConnection: keep-alive\r\n" in await client.head()
        assert await client.exactly(2) == b"ok"


async def test_a_client_that_wants_the_end_gets_it(play: Play, sidecar: Program, connect: Any) -> None:
    await play(recording([]))
    client = await connect(sidecar.data)
    await client.send(b"GET /x HTTP/1.1\r\nHost: b\r\nConnection: close\r\n\r\n")
    assert await client.rest() == OK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")


async def test_a_client_that_waits_for_100_continue_is_told_to_go_on(
    play: Play, sidecar: Program, connect: Any
) -> None:
    seen: list[bytes] = []
    await play(recording(seen))
    client = await connect(sidecar.data)
    head = b"POST /x HTTP/1.1\r\nHost: b\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n"
    await client.send(head)
    assert await client.head() == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert seen == []
    await client.send(b"hello")
    assert await client.exactly(len(OK)) == OK
    assert seen == [head + b"hello"]


async def test_an_early_answer_reaches_a_client_that_is_still_uploading(
    play: Play, sidecar: Program, connect: Any
) -> None:
    early = b"HTTP/1.1 413 Too Much\r\nContent-Length: 4\r\n\r\nstop"

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(early)
        await writer.drain()
        await asyncio.sleep(0.3)

    await play(script)
    client = await connect(sidecar.data)
    await client.send(b"POST /x HTTP/1.1\r\nHost: b\r\nContent-Length: 100000000\r\n\r\n", b"x" * 100_000)
    answer = await client.head() + await client.exactly(4)
    assert answer.startswith(b"HTTP/1.1 413 Too Much\r\n")
    assert answer.endswith(b"stop")


async def test_an_early_answer_reaches_a_client_that_pushes_on(
    play: Play, sidecar: Program, connect: Any
) -> None:
    """The backend answers and closes at once, while the client never stops to look."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 413 Too Much\r\nContent-Length: 4\r\nConnection: close\r\n\r\nstop")
        await writer.drain()

    await play(script)
    client = await connect(sidecar.data)
    await client.send(b"POST /x HTTP/1.1\r\nHost: b\r\nContent-Length: 3000000\r\n\r\n")
    await client.send(*[b"x" * 100_000] * 30)
    assert (await client.head()).startswith(b"HTTP/1.1 413 Too Much\r\n")
    assert await client.exactly(4) == b"stop"


@pytest.mark.parametrize(
    "part",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nha",
    ],
)
@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
async def test_an_answer_that_is_cut_is_seen_to_be_cut(
    play: Play, sidecar: Program, connect: Any, part: bytes, version: bytes
) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await take_request(reader)
        writer.write(part)
        await writer.drain()
        await asyncio.sleep(0.05)

    await play(script)
    client = await connect(sidecar.data)
    await client.send(b"GET /x HTTP/1." + version[2:] + b"\r\nHost: b\r\n\r\n")
    head = await client.head()
    if version == b"1.0" and b"Content-Length" not in head:
        with pytest.raises(ConnectionResetError):  # an ordinary end would be the end of the body
            await client.rest()
        return
    body = await client.rest()
    assert b"0\r\n\r\n" not in body
    assert len(body) < 100


async def test_an_answer_without_a_length_ends_with_the_backends_connection(
    play: Play, sidecar: Program, connect: Any
) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await take_request(reader)
        writer.write(b"HTTP/1.0 200 OK\r\nX-A: 1\r\n\r\nall")

    await play(script)
    client = await connect(sidecar.data)
    await client.send(b"GET /x HTTP/1.1\r\nHost: b\r\n\r\n")
    whole = b"HTTP/1.1 200 OK\r\nX-A: 1\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nall\r\n0\r\n\r\n"
    assert await client.exactly(len(whole)) == whole


@pytest.mark.parametrize("answering", [b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\nx", b""])
async def test_a_client_that_hangs_up_ends_the_upstream_exchange(
    play: Play, sidecar: Program, connect: Any, answering: bytes
) -> None:
    """While the answer is silent, or, by a reset, before it has begun: the backend learns of it at once."""
    came, left = asyncio.Event(), asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await take_request(reader)
        writer.write(answering)
        await writer.drain()
        came.set()
        try:
            await reader.read()
        finally:
            left.set()

    await play(script)
    client = await connect(sidecar.data)
    await client.send(b"GET /x HTTP/1.1\r\nHost: b\r\n\r\n")
    async with asyncio.timeout(ASK_SECONDS):
        await came.wait()
    if answering:
        await client.head()
        client.writer.transport.abort()
    else:
        reset(client.writer)  # a FIN would only say that it asks for nothing more
    async with asyncio.timeout(RESPONSE_TIMEOUT / 2):
        await left.wait()


async def test_a_client_that_hangs_up_while_uploading_is_not_taken_for_complete(
    play: Play, sidecar: Program, connect: Any
) -> None:
    got: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        body = b""
        try:
            while piece := await reader.read(1000):
                body += piece
        finally:
            got.set_result(body)

    await play(script)
    client = await connect(sidecar.data)
    await client.send(b"POST /x HTTP/1.1\r\nHost: b\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n")
    await asyncio.sleep(0.1)
    client.writer.close()
    async with asyncio.timeout(RESPONSE_TIMEOUT / 2):
        assert await got == b"4\r\nhalf\r\n"


async def test_a_backend_that_does_not_answer_is_a_504(play: Play, sidecar: Program) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await take_request(reader)
        await asyncio.sleep(ASK_SECONDS)

    await play(script)
    begun = time.monotonic()
    answer = await asyncio.to_thread(ask, sidecar.data, "GET", "/x")
    assert RESPONSE_TIMEOUT - 0.1 < time.monotonic() - begun < RESPONSE_TIMEOUT + 1
    assert (answer.status, answer.json()["error"]) == (504, "upstream_timeout")
    assert answer.headers("content-type") == ["application/problem+json"]


@pytest.mark.slow
async def test_an_upload_that_takes_longer_than_the_timeout_is_no_timeout(
    play: Play, sidecar: Program, connect: Any
) -> None:
    """The backend answers at once, but only when it has all."""
    seen: list[bytes] = []
    await play(recording(seen))
    client = await connect(sidecar.data)
    await client.send(b"POST /x HTTP/1.1\r\nHost: b\r\nContent-Length: 8\r\n\r\n")
    for _ in range(8):
        await asyncio.sleep(RESPONSE_TIMEOUT / 5)
        await client.send(b"x")
    assert await client.exactly(len(OK)) == OK


async def test_a_backend_that_resets_is_a_502(play: Play, sidecar: Program) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await take_request(reader)
        writer.transport.abort()

    await play(script)
    answer = await asyncio.to_thread(ask, sidecar.data, "GET", "/x")
    assert (answer.status, answer.json()["error"]) == (502, "upstream_failed")


async def test_what_is_no_http_is_a_502(play: Play, sidecar: Program) -> None:
    await play(recording([], b"SSH-2.0-OpenSSH_9.6\r\n\r\n"))
    answer = await asyncio.to_thread(ask, sidecar.data, "GET", "/x")
    assert (answer.status, answer.json()["error"]) == (502, "upstream_failed")


def test_a_backend_that_is_down_is_a_502(tmp_path: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: whoever connects is refused
        with Program(write_configuration(tmp_path, taken.getsockname())) as sidecar:
            answer = ask(sidecar.data, "GET", "/x")
            assert (answer.status, answer.json()["error"]) == (502, "upstream_unreachable")
            assert answer.headers("content-type") == ["application/problem+json"]
            assert {"type", "title", "status", "detail", "message"} <= answer.json().keys()


async def test_server_sent_events_arrive_as_they_are_sent(play: Play, sidecar: Program, connect: Any) -> None:
    sent: list[float] = []
    gap = 0.15

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await take_request(reader)
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        for number in range(8):
            await asyncio.sleep(gap)
            event = b"id: %d\ndata: tick\n\n" % number
            sent.append(time.monotonic())
            writer.write(b"%x\r\n%b\r\n" % (len(event), event))
            await writer.drain()
        await asyncio.sleep(gap)  # nothing may wait for the end

    await play(script)
    client = await connect(sidecar.data)
    await client.send(b"GET /events HTTP/1.1\r\nHost: b\r\nAccept: text/event-stream\r\n\r\n")
    assert b"Content-Type: text/event-stream\r\n" in await client.head()
    assert not sent, "the head waited for the first event"
    late = []
    for number in range(8):
        async with asyncio.timeout(ASK_SECONDS):
            event = await client.reader.readuntil(b"\n\n")
        assert b"id: %d\n" % number in event
        late.append(time.monotonic() - sent[number])
    assert max(late) < gap / 2, late


async def test_a_stream_may_last_longer_than_the_timeout(play: Play, sidecar: Program, connect: Any) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await take_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n")
        await asyncio.sleep(RESPONSE_TIMEOUT + 0.3)
        writer.write(b"ok")

    await play(script)
    client = await connect(sidecar.data)
    await client.send(b"GET /x HTTP/1.1\r\nHost: b\r\n\r\n")
    assert await client.exactly(len(OK)) == OK


async def test_a_slow_reader_slows_the_backend_down(play: Play, sidecar: Program, connect: Any) -> None:
    """Nothing is piled up in between: of 200 MB, only what the buffers hold gets out of the backend."""
    written = 0

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal written
        await take_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 200000000\r\n\r\n")
        for _ in range(2000):
            writer.write(b"x" * 100_000)
            await writer.drain()
            written += 100_000

    await play(script)
    with socket.create_connection(sidecar.data) as client:
        client.sendall(b"GET /x HTTP/1.1\r\nHost: b\r\n\r\n")
        before = -1
        while written != before:
            before = written
            await asyncio.sleep(0.3)
    assert 0 < written < 40_000_000


async def test_many_clients_get_their_own_answers(play: Play, sidecar: Program, connect: Any) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            body = (await take_request(reader)).partition(b"\r\n\r\n")[2]
            digest = hashlib.sha256(body).hexdigest().encode()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 64\r\n\r\n" + digest)

    await play(script)

    async def one(number: int) -> None:
        client = await connect(sidecar.data)
        for turn in range(10):
            body = b"%d-%d " % (number, turn) * (1 + number * turn * 10)
            await client.send(b"POST /x HTTP/1.1\r\nHost: b\r\nContent-Length: %d\r\n\r\n" % len(body), body)
            await client.head()
            assert await client.exactly(64) == hashlib.sha256(body).hexdigest().encode()

    await asyncio.gather(*(one(number) for number in range(40)))


# Switching protocols -----------------------------------------------------------------------------------


@pytest.fixture
async def echo(
    stage: tuple[socket.socket, Program],
) -> AsyncIterator[list[websocket_server.ServerConnection]]:
    """A WebSocket backend; gives the connections that it accepted."""
    accepted: list[websocket_server.ServerConnection] = []

    async def handle(connection: websocket_server.ServerConnection) -> None:
        accepted.append(connection)
        async for message in connection:
            if message == "close":
                await connection.close(4321, "as you wish")
                return
            await connection.send(message)

    def process(connection: websocket_server.ServerConnection, request: Request) -> Response | None:
        if request.path == "/refused":
            return connection.respond(403, "not for you\n")
        return None

    server = await websocket_server.serve(
        handle,
        sock=stage[0].dup(),
        process_request=process,
        max_size=None,
        subprotocols=None,
        close_timeout=2,
    )
    yield accepted
    server.close()
    await server.wait_closed()


def websocket(sidecar: Program, path: str = "/ws", **options: Any) -> websocket_client.connect:
    host, port = sidecar.data
    return websocket_client.connect(
        f"ws://{host}:{port}{path}", max_size=None, proxy=None, close_timeout=2, **options
    )


async def test_a_websocket_echoes_text_and_bytes_compressed(
    echo: list[websocket_server.ServerConnection], sidecar: Program
) -> None:
    async with asyncio.timeout(ASK_SECONDS), websocket(sidecar) as client:
        assert client.response is not None
        assert "permessage-deflate" in client.response.headers["Sec-WebSocket-Extensions"]
        for message in ("hello", "é" * 10_000, b"\x00\xff" * 5000, "", b""):
            await client.send(message)
            assert await client.recv() == message
        await client.close(4000, "done")
        await echo[0].wait_closed()
    assert (echo[0].close_code, echo[0].close_reason) == (4000, "done")
    assert echo[0].request is not None
    assert "scopegate" not in str(echo[0].request.headers).lower()


async def test_a_websocket_echoes_large_frames_and_fragments(
    echo: list[websocket_server.ServerConnection], sidecar: Program
) -> None:
    large = bytes(range(256)) * 32_768  # 8 MiB
    async with asyncio.timeout(ASK_SECONDS), websocket(sidecar, compression=None) as client:
        assert client.response is not None
        assert "Sec-WebSocket-Extensions" not in client.response.headers
        await client.send(large)
        assert await client.recv() == large
        await client.send(["frag", "men", "ted"])
        assert await client.recv() == "fragmented"
        pong = await client.ping()
        assert await pong >= 0
        await client.close()
        await echo[0].wait_closed()
    assert echo[0].close_code == CloseCode.NORMAL_CLOSURE


async def test_a_websocket_that_the_backend_closes_tells_its_code(
    echo: list[websocket_server.ServerConnection], sidecar: Program
) -> None:
    async with asyncio.timeout(ASK_SECONDS), websocket(sidecar) as client:
        await client.send("close")
        with pytest.raises(ConnectionClosedError) as closed:
            await client.recv()
        assert closed.value.rcvd is not None
        assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (4321, "as you wish")
        begun = time.monotonic()
        await client.wait_closed()
    assert time.monotonic() - begun < 1, "the tunnel outlived its WebSocket"
    assert len(echo) == 1


async def test_a_websocket_whose_client_vanishes_is_dropped_at_the_backend(
    echo: list[websocket_server.ServerConnection], sidecar: Program
) -> None:
    async with asyncio.timeout(ASK_SECONDS):
        client = await websocket(sidecar)
        await client.send("hello")
        assert await client.recv() == "hello"
        client.transport.abort()
        await echo[0].wait_closed()
        assert echo[0].close_code == CloseCode.ABNORMAL_CLOSURE


async def test_a_websocket_whose_backend_vanishes_is_dropped_at_the_client(
    echo: list[websocket_server.ServerConnection], sidecar: Program
) -> None:
    async with asyncio.timeout(ASK_SECONDS), websocket(sidecar) as client:
        await client.send("hello")
        assert await client.recv() == "hello"
        echo[0].transport.abort()
        with pytest.raises(ConnectionClosed):
            await client.recv()
        assert client.close_code == CloseCode.ABNORMAL_CLOSURE


@pytest.mark.usefixtures("echo")
async def test_a_websocket_that_the_backend_refuses_gets_its_answer(sidecar: Program) -> None:
    with pytest.raises(InvalidStatus) as refused:
        async with asyncio.timeout(ASK_SECONDS), websocket(sidecar, "/refused"):
            pass
    assert (refused.value.response.status_code, refused.value.response.body) == (403, b"not for you\n")


@pytest.mark.parametrize(
    "connection",
    [b"Upgrade", b"keep-alive, upgrade", b"UPGRADE,close", b"keep-alive\r\nConnection: Upgrade"],
)
async def test_bytes_sent_right_behind_the_handshake_are_not_lost(
    play: Play, sidecar: Program, connect: Any, connection: bytes
) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await take_request(reader)
        writer.write(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
            b"from the server"
        )
        writer.write(await reader.readexactly(15))

    await play(script)
    client = await connect(sidecar.data)
    await client.send(
        b"GET /ws HTTP/1.1\r\nHost: b\r\nUpgrade: websocket\r\nConnection: " + connection + b"\r\n\r\n"
        b"from the client"
    )
    assert b"Upgrade: websocket\r\n" in await client.head()
    assert await client.rest() == b"from the serverfrom the client"


@pytest.mark.parametrize(
    "request_head",
    [
        b"POST /x HTTP/1.1\r\nHost: b\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Content-Length: 0\r\n\r\n",
        b"GET /x HTTP/1.1\r\nHost: b\r\nUpgrade: websocket\r\n\r\n",
        b"GET /x HTTP/1.1\r\nHost: b\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"CONNECT other.test:443 HTTP/1.1\r\nHost: other.test:443\r\n\r\n",
    ],
)
async def test_no_other_protocol_is_switched_to(
    play: Play, sidecar: Program, connect: Any, request_head: bytes
) -> None:
    seen: list[bytes] = []
    await play(recording(seen))
    client = await connect(sidecar.data)
    await client.send(request_head)
    head = await client.head()
    body = await client.exactly(content_length(head))
    assert head.startswith(b"HTTP/1.1 400 ")
    assert json.loads(body)["error"] == "upgrade_refused"
    assert seen == []


# Clients that are up to no good ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "before", [b"", b"GET /x HTTP/1.1\r\nHost: b\r\n\r\n"], ids=["new connection", "used connection"]
)
async def test_an_unfinished_request_head_is_closed_in_time(
    play: Play, sidecar: Program, connect: Any, before: bytes
) -> None:
    await play(recording([]))
    client = await connect(sidecar.data)
    if before:
        await client.send(before)
        assert await client.exactly(len(OK)) == OK
    begun = time.monotonic()

    async def dribble() -> None:
        for byte in b"GET /slow HTTP/1.1\r\nHost: backend.test\r\nX-Slow: " + b"x" * 100:
            await asyncio.sleep(0.05)
            await client.send(bytes([byte]))

    dribbling = asyncio.ensure_future(dribble())
    try:
        await client.rest()
    except ConnectionError:
        pass  # a reset is an end, too
    finally:
        dribbling.cancel()
        await asyncio.gather(dribbling, return_exceptions=True)
    assert HEAD_TIMEOUT - 0.1 < time.monotonic() - begun < HEAD_TIMEOUT + 1


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET /x HTTP/1.1\r\nHost: b\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /x HTTP/1.1\r\nHost: b\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx",
        b"POST /x HTTP/1.1\r\nHost: b\r\nContent-Length: +1\r\n\r\nx",
        b"GET /x HTTP/1.1\r\nHost: b\r\nX-A : 1\r\n\r\n",
        b"GET /x HTTP/1.1\r\nHost: b\r\nX-A: 1\r\n folded\r\n\r\n",
        b"GET /x HTTP/1.1\r\nHost: b\r\nX-A: a\x00b\r\n\r\n",
        b"POST /x HTTP/1.1\r\nHost: b\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"GET /x HTTP/1.1\r\nHost: b\r\nX-A: " + b"x" * 100_000 + b"\r\n\r\n",
        b"POST /x HTTP/1.1\r\nHost: b\r\nTransfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"0\r\n\r\n",
        b"GET /caf\xe9 HTTP/1.1\r\nHost: b\r\n\r\n",
        b"GET http://[::bad/x HTTP/1.1\r\nHost: b\r\n\r\n",
        b"GARBAGE\r\n\r\n",
    ],
)
async def test_a_request_that_is_no_proper_http_is_refused(
    play: Play, sidecar: Program, connect: Any, request_bytes: bytes
) -> None:
    seen: list[bytes] = []
    await play(recording(seen))
    client = await connect(sidecar.data)
    await client.send(request_bytes)
    head = await client.head()
    body = await client.exactly(content_length(head))
    assert head.split(b" ")[1] == b"400"
    assert seen == []
    assert b"Content-Type: application/problem+json\r\n" in head
    assert json.loads(body)["error"] == "invalid_request"
