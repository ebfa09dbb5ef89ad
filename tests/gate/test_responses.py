"""The sidecar's own answers on the data listener are the bytes that aiohttp writes for them."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest
from aiohttp import HttpVersion, web
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http_parser import HttpRequestParser, RawRequestMessage
from aiohttp.http_writer import StreamWriter
from aiohttp.streams import EMPTY_PAYLOAD
from aiohttp.web_protocol import ERROR

from sidecar.errors import Refusal
from sidecar.web.serving._responses import serialized
from sidecar.web.serving.datarequest import DataRequest
from sidecar.web.wire.problem import answer, problem


class Transport(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""

    def write(self, data: Any) -> None:
        self.written += bytes(data)

    def is_closing(self) -> bool:
        return False


class Connection(BaseProtocol):
    """As much of a connection as `web.BaseRequest` asks for."""

    ssl_context = peername = sockname = None


def parsed(head: bytes) -> RawRequestMessage:
    loop = asyncio.get_running_loop()
    ((message, _),), _, _ = HttpRequestParser(BaseProtocol(loop), loop, 2**16).feed_data(head)
    return message


async def by_aiohttp(message: RawRequestMessage, response: web.Response) -> tuple[bytes, bool | None]:
    loop = asyncio.get_running_loop()
    connection = Connection(loop)
    connection.transport = transport = Transport()
    task = asyncio.current_task()
    request = web.BaseRequest(
        message, EMPTY_PAYLOAD, cast(Any, connection), StreamWriter(connection, loop), cast(Any, task), loop
    )
    await response.prepare(request)
    await response.write_eof()
    return transport.written, response.keep_alive


def responses() -> list[web.Response]:
    return [
        answer({"a": "\u00e4"}, status=201, request_id="r\u00e4"),
        answer(None),
        problem(Refusal("overloaded", "busy"), request_id="r", decision_id="d", allow=("GET", "POST")),
        problem(Refusal("scope_not_found", "no"), headers={"X": "y"}),
        web.Response(status=204),
        web.Response(status=304),
    ]


@pytest.mark.parametrize("number", range(len(responses())))
@pytest.mark.parametrize("close", [False, True])
@pytest.mark.parametrize("method", [b"GET", b"HEAD", b"POST"])
@pytest.mark.parametrize(
    "end", [b"1.1\r\n", b"1.1\r\nConnection: close\r\n", b"1.0\r\n", b"1.0\r\nConnection: keep-alive\r\n"]
)
async def test_an_own_answer_is_what_aiohttp_writes(
    number: int, close: bool, method: bytes, end: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiohttp.web_response.rfc822_formatted_time", lambda: "now")
    monkeypatch.setattr("sidecar.web.serving._responses.rfc822_formatted_time", lambda: "now")
    message = parsed(method + b" / HTTP/" + end + b"Host: x\r\n\r\n")
    ours, theirs = responses()[number], responses()[number]
    if close:
        ours.force_close()
        theirs.force_close()
    request = DataRequest(cast(Any, None), message)
    if number > 3:  # aiohttp names itself in a response that names no server
        ours.headers["Server"] = theirs.headers["Server"] = "scopegate"
    assert (serialized(request, ours), request.keep_alive) == await by_aiohttp(message, theirs)


async def test_the_answer_to_what_cannot_be_parsed_is_one_of_http_1_0() -> None:
    assert ERROR.version == HttpVersion(1, 0)
    data = serialized(DataRequest(cast(Any, None), ERROR), problem(Refusal("invalid_request", "no")))
    assert data.startswith(b"HTTP/1.0 400 Bad Request\r\n")
    assert b"\r\nConnection:" not in data
