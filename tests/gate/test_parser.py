"""The bytes of one connection become requests, wherever they are split; and what of aiohttp that relies on.

Each case is fed whole, cut once at every byte, and byte by byte.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import http_exceptions as faults
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http_parser import HttpRequestParser
from aiohttp.streams import StreamReader
from aiohttp.web_protocol import RequestHandler, _ErrInfo

from sidecar.web.serving._parser import (
    MAX_CHUNK_EXTRA_BYTES,
    MAX_HEAD_BYTES,
    PIPELINED,
    READ_AHEAD_BYTES,
    BrokenBody,
    Overloaded,
    RequestParser,
)
from sidecar.web.serving.connections import refusal_of

HOST = b"Host: x\r\n"
GET = b"GET /get HTTP/1.1\r\n" + HOST + b"\r\n"
POST = b"POST /post HTTP/1.1\r\n" + HOST
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
COUNTED = POST + b"Content-Length: 5\r\n\r\n"
OFFER = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"


class Protocol(BaseProtocol):
    """As much of a connection as a body needs: one that goes on reading once its reader has taken all."""

    def resume_reading(self, resume_parser: bool = True) -> None:
        self._reading_paused = False


@dataclass
class Fed:
    """What a parser made of some bytes."""

    parser: RequestParser
    requests: list[tuple[str, str, dict[str, str], bytes | None]] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)


async def fed(*pieces: bytes, consume: bool = True) -> Fed:
    loop = asyncio.get_running_loop()
    protocol = Protocol(loop)
    broken: list[str] = []

    def broke(body: StreamReader) -> None:
        exc = body.exception()
        assert isinstance(exc, BrokenBody)
        broken.append(exc.refusal.message)

    parser = RequestParser(protocol, loop, broke=broke, refusal_of=refusal_of)
    protocol._parser = parser  # type: ignore[assignment]
    made = Fed(parser, broken=broken)
    messages: list[Any] = []

    def take(data: bytes) -> bool:
        found, _, _ = parser.feed_data(data)
        messages.extend(found)
        if consume:
            for _ in found:
                parser.message_consumed()
        return bool(found)

    for piece in pieces:
        take(piece)
        while consume and take(b""):
            pass
    for message, body in messages:
        if isinstance(message, _ErrInfo):
            made.refusals.append(refusal_of(message.exc).message)
            continue
        whole = body.read_nowait() if body.is_eof() else None
        made.requests.append((message.method, message.path, dict(message.headers), whole))
    return made


def ways(data: bytes) -> Iterator[list[bytes]]:
    yield [data]
    for at in range(1, len(data)):
        yield [data[:at], data[at:]]
    yield [data[at : at + 1] for at in range(len(data))]


BROKEN = {
    "a chunk that breaks its promise": b"4\r\nHello\r\n0\r\n\r\n",
    "a chunk size that is none": b"xyz\r\nHello\r\n0\r\n\r\n",
    "a negative chunk size": b"-5\r\nHello\r\n0\r\n\r\n",
    "a chunk size with a prefix": b"0x5\r\nHello\r\n0\r\n\r\n",
    "a chunk size with a blank": b"5 \r\nHello\r\n0\r\n\r\n",
    "a chunk size beyond 64 bits": b"fffffffffffffffff\r\nHello\r\n0\r\n\r\n",
    "no chunk size": b"\r\nHello\r\n0\r\n\r\n",
    "a chunk that ends in LF only": b"5\nHello\n0\n\n",
    "a size that ends in LF only": b"5\nHello\r\n0\r\n\r\n",
    "a chunk without its CRLF": b"5\r\nHello0\r\n\r\n",
    "a bare CR behind the size": b"5\rHello\r\n0\r\n\r\n",
    "a trailer that is none": b"5\r\nHello\r\n0\r\nno colon\r\n\r\n",
    "a trailer with a blank in its name": b"5\r\nHello\r\n0\r\nA b: c\r\n\r\n",
    "a control in an extension": b"5;a=\x01\r\nHello\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("body", BROKEN.values(), ids=BROKEN)
async def test_a_body_that_breaks_the_rules_of_chunks_is_told_to_its_request(body: bytes) -> None:
    for pieces in ways(CHUNKED + body):
        made = await fed(*pieces)
        ((method, path, _, whole),) = made.requests
        assert (method, path, whole) == ("POST", "/post", None), pieces
        assert len(made.broken) == 1, pieces
        assert made.refusals == []


@pytest.mark.parametrize("first", [GET, COUNTED + b"Hello", CHUNKED + b"5\r\nHello\r\n0\r\n\r\n"])
@pytest.mark.parametrize(
    "behind",
    [
        b"\x00",
        b"rubbish\r\n\r\n",
        b"GET /\r\n\r\n",
        b"GET / HTTP/1.1\r\nNo colon\r\n\r\n",
        b"GET / HTTP/2.0\r\n\r\n",
    ],
)
async def test_rubbish_behind_a_whole_request_takes_nothing_from_it(first: bytes, behind: bytes) -> None:
    for pieces in ways(first + behind):
        made = await fed(*pieces)
        ((_, _, _, whole),) = made.requests
        assert whole == (b"" if first == GET else b"Hello"), pieces
        assert made.broken == []
        assert len(made.refusals) == 1 or not behind.endswith(b"\n"), pieces


async def test_requests_in_one_packet_are_as_good_as_in_several() -> None:
    data = GET + COUNTED + b"Hello" + CHUNKED + b"2\r\nHe\r\n3;x=y\r\nllo\r\n0\r\n\r\n" + GET
    for pieces in ways(data):
        made = await fed(*pieces)
        assert [(method, whole) for method, _, _, whole in made.requests] == [
            ("GET", b""),
            ("POST", b"Hello"),
            ("POST", b"Hello"),
            ("GET", b""),
        ], pieces
        assert made.refusals == made.broken == []


async def test_an_empty_line_within_a_body_ends_nothing() -> None:
    inside = b"GET /inside HTTP/1.1\r\nHost: x\r\n\r\n"
    data = POST + b"Content-Length: %d\r\n\r\n" % len(inside) + inside
    data += CHUNKED + b"%x\r\n%b\r\n0\r\n\r\n" % (len(inside), inside) + GET
    for pieces in ways(data):
        made = await fed(*pieces)
        assert [whole for _, _, _, whole in made.requests] == [inside, inside, b""], pieces


@pytest.mark.parametrize("trailers", [b"X-Evil: 1\r\n", b"Host: evil\r\n", b"A: 1\r\nB: 0\r\n", b"A: 0\r\n"])
async def test_a_trailer_is_no_header_of_the_next_request(trailers: bytes) -> None:
    for pieces in ways(CHUNKED + b"5\r\nHello\r\n0\r\n" + trailers + b"\r\n" + GET):
        made = await fed(*pieces)
        assert [headers for _, _, headers, _ in made.requests][1:] == [{"Host": "x"}], pieces


@pytest.mark.parametrize(
    ("body", "sent"),
    [
        (b"\r\n", b""),
        (b"Content-Length: 0\r\n\r\n", b""),
        (b"Content-Length: 5\r\n\r\nHello", b"Hello"),
        (b"Transfer-Encoding: chunked\r\n\r\n5\r\nHello\r\n0\r\n\r\n", b"Hello"),
    ],
)
@pytest.mark.parametrize(
    "offer",
    [
        OFFER,
        b"Connection: Upgrade\r\nUpgrade: TLS/1.0\r\n",
        b"Connection: upgrade\r\nUpgrade: a, websocket\r\n",
    ],
)
async def test_nothing_is_lost_behind_an_offer_that_is_not_taken_up(
    offer: bytes, body: bytes, sent: bytes
) -> None:
    for pieces in ways(POST + offer + body + GET):
        made = await fed(*pieces)
        assert [(method, whole) for method, _, _, whole in made.requests] == [("POST", sent), ("GET", b"")], (
            pieces
        )
        assert made.refusals == made.broken == []


async def test_a_request_for_a_websocket_is_reported_once_its_body_has_ended() -> None:
    loop = asyncio.get_running_loop()
    head = POST + b"Connection: Upgrade\r\nUpgrade: websocket\r\nContent-Length: 5\r\n\r\n"
    for pieces in ways(head + b"Hello"):
        parser = RequestParser(Protocol(loop), loop, broke=lambda body: None, refusal_of=refusal_of)
        reported = [parser.feed_data(piece)[1] for piece in pieces]
        assert reported == [False] * (len(pieces) - 1) + [True], pieces


async def test_the_preface_of_http2_behind_an_offer_is_refused() -> None:
    for pieces in ways(POST + OFFER + b"Content-Length: 5\r\n\r\nHelloPRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"):
        made = await fed(*pieces)
        assert [whole for _, _, _, whole in made.requests] == [b"Hello"], pieces
        assert len(made.refusals) == 1, pieces


# Methods ------------------------------------------------------------------------------------------------

KNOWN = """
    ACL BIND CHECKOUT CONNECT COPY DELETE GET HEAD LINK LOCK M-SEARCH MERGE MKACTIVITY MKCALENDAR MKCOL MOVE
    NOTIFY OPTIONS PATCH POST PROPFIND PROPPATCH PURGE PUT QUERY REBIND REPORT SEARCH SOURCE SUBSCRIBE TRACE
    UNBIND UNLINK UNLOCK UNSUBSCRIBE
"""
UNKNOWN = "LIST get Post FOO GETX G PLAY DESCRIBE FLUSH X-Y!#$%&'*+.^_`|~9 " + "A" * 32


@pytest.mark.parametrize("method", KNOWN.split())
async def test_these_methods_pass(method: str) -> None:
    target = b" x:1" if method == "CONNECT" else b" /x"
    made = await fed(method.encode() + target + b" HTTP/1.1\r\n" + HOST + b"\r\n")
    assert [request[0] for request in made.requests] == [method]


@pytest.mark.parametrize("method", UNKNOWN.split())
@pytest.mark.parametrize("before", [b"", b"\r\n", GET])
async def test_a_method_that_the_parser_does_not_know_is_refused_by_name(method: str, before: bytes) -> None:
    for pieces in ways(before + method.encode() + b" /v1/secret HTTP/1.1\r\n" + HOST + b"\r\n"):
        made = await fed(*pieces)
        assert len(made.requests) == (before == GET), pieces
        assert made.refusals == [f"The method {method} does not pass here, on any path."], pieces


@pytest.mark.parametrize(
    "begin",
    [
        b"SECRET",
        b"SECRET/x",
        b"A" * 33 + b" ",
        b"SECRE\xff ",
        b"SECRET\r\n",
        b"\x16\x03\x01 ",
        b'{"SECRET": 1}',
        b" ",
    ],
)
async def test_what_is_no_method_is_not_named(begin: bytes) -> None:
    for pieces in ways(begin + b"/v1/secret HTTP/1.1\r\n" + HOST + b"\r\n"):
        made = await fed(*pieces)
        (message,) = made.refusals
        assert "SECRET" not in message
        assert "AAAA" not in message


async def test_a_method_of_which_more_may_come_is_waited_for() -> None:
    made = await fed(b"LIS")
    assert (made.requests, made.refusals, made.parser.dead) == ([], [], False)


# Bounds -------------------------------------------------------------------------------------------------


async def test_a_head_that_is_too_long_in_all_its_headers_together_is_refused() -> None:
    line = b"X: " + b"x" * 10_000 + b"\r\n"
    assert len((await fed(b"GET / HTTP/1.1\r\n" + HOST + line * 5 + b"\r\n")).requests) == 1
    for pieces in ([line] * 7, [line * 7]):
        made = await fed(b"GET / HTTP/1.1\r\n" + HOST, *pieces, b"\r\n")
        assert made.requests == []
        assert made.refusals == [
            "This is not HTTP as it should be: its head, or what surrounds its chunks, is too long."
        ]
    assert len(line) * 6 < MAX_HEAD_BYTES < len(line) * 7


async def test_chunks_that_carry_nothing_are_refused_in_time() -> None:
    tiny = b"1\r\nx\r\n" * 50_000
    assert (await fed(CHUNKED, *[tiny[at : at + 6000] for at in range(0, len(tiny), 6000)])).broken == []
    for flood in (
        b"1;" + b"x" * 4 * MAX_CHUNK_EXTRA_BYTES,
        (b"1;" + b"x" * 100 + b"\r\nx\r\n") * 1_000,
        b"0\r\n" + b"A: b\r\n" * 4_000,
        b"0" * 2 * MAX_CHUNK_EXTRA_BYTES,
    ):
        made = await fed(CHUNKED, *[flood[at : at + 1_000] for at in range(0, len(flood), 1_000)])
        assert len(made.broken) == 1


async def test_only_a_few_requests_wait_and_the_rest_is_kept() -> None:
    made = await fed(GET * 10, consume=False)
    assert len(made.requests) == PIPELINED
    parser, found = made.parser, PIPELINED
    assert parser.held == len(GET) * 10
    while found < 10:
        parser.message_consumed()
        messages, _, _ = parser.feed_data(b"")
        assert len(messages) == 1
        found += 1
    for _ in range(PIPELINED):
        parser.message_consumed()
    assert parser.held == len(GET)  # of the last one
    parser.answered()
    assert parser.held == 0


@pytest.mark.parametrize("at_once", [50_000, 256 * 1024, 1 << 30])
@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_that_is_not_read_waits_and_arrives_whole(at_once: int, chunked: bool) -> None:
    chunks, loop = 1_000, asyncio.get_running_loop()
    protocol = Protocol(loop)
    parser = RequestParser(protocol, loop, broke=lambda body: None, refusal_of=refusal_of)
    protocol._parser = parser  # type: ignore[assignment]
    sent = b"x" * 1024 * chunks
    if chunked:
        head, body = CHUNKED, (b"400\r\n" + b"x" * 1024 + b"\r\n") * chunks + b"0\r\n\r\n"
    else:
        head, body = POST + b"Content-Length: %d\r\n\r\n" % len(sent), sent
    ((_, payload),) = parser.feed_data(head)[0]
    parser.message_consumed()
    data, at, taken = body + GET, 0, b""
    messages: list[Any] = []
    while not payload.at_eof():
        if protocol._reading_paused:
            if chunked:
                assert payload._size <= 2 * READ_AHEAD_BYTES + 1024
            taken += payload.read_nowait()
            messages += parser.feed_data(b"")[0]
        elif at < len(data):
            messages += parser.feed_data(data[at : at + at_once])[0]
            at += at_once
        else:
            taken += payload.read_nowait()
    assert taken == sent
    messages += parser.feed_data(data[at:])[0]
    assert [message.path for message, _ in messages] == ["/get"]


async def test_a_connection_that_holds_too_much_is_told_in_the_same_ways() -> None:
    made = await fed(CHUNKED)
    made.parser.fail(Overloaded(message="too much"))
    assert made.broken == ["The connections of this listener hold too much memory at the moment."]
    made = await fed(b"GET / HT")
    made.parser.fail(Overloaded(message="too much"))
    ((message, _),) = made.parser.feed_data(b"TP/1.1\r\n")[0]
    assert isinstance(message, _ErrInfo)
    assert refusal_of(message.exc).code == "overloaded"


# What of aiohttp this relies on -------------------------------------------------------------------------


async def test_aiohttp_still_loses_a_head_in_front_of_a_fault() -> None:
    """Where this fails, the pieces of `RequestParser` may be needed no more."""
    loop = asyncio.get_running_loop()
    parser = HttpRequestParser(Protocol(loop), loop, 2**16)
    with pytest.raises(faults.BadHttpMessage):
        parser.feed_data(CHUNKED + b"4\r\nHello\r\n0\r\n\r\n")
    parser = HttpRequestParser(Protocol(loop), loop, 2**16)
    parser.feed_data(CHUNKED)
    parser.feed_data(b"0\r\nX-Evil: 1\r\n\r\n")
    assert "X-Evil" in parser.feed_data(GET)[0][0][0].headers
    parser = HttpRequestParser(Protocol(loop), loop, 2**16)
    assert len(parser.feed_data(POST + OFFER + b"\r\n" + GET)[0]) == 1


def test_aiohttps_connection_has_what_ours_changes() -> None:
    used = {
        "_parser",
        "_messages",
        "_current_request",
        "_waiter",
        "_request_count",
        "_upgraded",
        "_payload_parser",
    }
    used |= {"_max_msg_queue_size", "_msg_queue_resume_size", "_close", "_force_close"}
    slots = {name for kind in RequestHandler.__mro__ for name in getattr(kind, "__slots__", ())}
    assert used <= slots


def test_aiohttps_protocol_has_what_the_data_connection_changes() -> None:
    used = {"_paused", "_reading_paused", "_buffer_paused", "_upgraded", "_parser", "transport"}
    assert used <= set(BaseProtocol.__slots__)
    calls = {"_drain_helper", "_pause_reading_for_buffer", "_resume_reading_for_buffer", "resume_reading"}
    assert calls <= set(vars(BaseProtocol))
