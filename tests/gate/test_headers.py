"""The headers that the backend receives and that the client gets back."""

from __future__ import annotations

import asyncio
import re

import pytest

from tests.client import Message
from tests.support import EXECUTE, Backend, House, Open, replies, sends


async def seen_with(house: House, *headers: tuple[str, str]) -> Message:
    """What the backend saw of an execution with these headers."""
    answer = await house.execute(await house.issue(), headers=headers)
    assert answer.status == 200, answer.body
    return house.backend.seen[-1]


async def test_the_backend_is_told_decision_scope_and_attempt(house: House, backend: Backend) -> None:
    scope = await house.issue(max_attempts=2)
    for attempt in ("1", "2"):
        answer = await house.execute(scope)
        seen = backend.seen[-1]
        assert seen.header("Scopegate-Decision-Id") == answer.header("Scopegate-Decision-Id")
        assert seen.header("Scopegate-Scope-Id") == scope["scope_id"]
        assert seen.header("Scopegate-Attempt-Number") == attempt


@pytest.mark.parametrize(
    "name",
    [
        "Scopegate-Decision-Id",
        "scopegate-scope-id",
        "SCOPEGATE-ATTEMPT-NUMBER",
        "Scopegate_Decision_Id",
        "scopegate_scope-id",
        "Scopegate-Anything",
    ],
)
async def test_what_the_client_calls_scopegate_is_stripped(house: House, name: str) -> None:
    seen = await seen_with(house, (name, "forged"))
    assert "forged" not in [value for _, value in seen.raw_headers]


@pytest.mark.parametrize("name", ["Keep-Alive", "TE", "Trailer", "Proxy-Connection"])
async def test_hop_by_hop_headers_are_stripped(house: House, name: str) -> None:
    seen = await seen_with(house, (name, "x-of-this-hop"))
    assert seen.headers(name) == []


async def test_what_connection_names_is_stripped_too(house: House) -> None:
    seen = await seen_with(
        house, ("X-Hop", "1"), ("X-Other", "2"), ("X-Stays", "3"), ("Connection", "x-hop, X-Other , close")
    )
    assert seen.headers("X-Hop") == seen.headers("X-Other") == seen.headers("Connection") == []
    assert seen.header("X-Stays") == "3"


async def test_connection_cannot_strip_what_frames_the_request(house: House) -> None:
    seen = await seen_with(house, ("Connection", "host, content-length, content-type"))
    assert seen.header("Host") == "localhost"
    assert seen.header("Content-Type") == "application/json"
    assert seen.header("Content-Length") == str(len(seen.body))


async def test_connection_cannot_strip_a_header_that_is_judged(open_house: Open) -> None:
    house = await open_house(
        gate={
            "routes": [{"path": "**/recovery/execute", "scope_id": "header:X-Scope"}],
            "tenant_header": "X-Tenant",
        }
    )
    tenant = ("X-Tenant", "one")
    scope = await house.issue(headers=[tenant])
    headers = [tenant, ("X-Scope", scope["scope_id"]), ("Connection", "X-Scope, X-Tenant")]
    answer = await house.execute(scope, headers=headers, scope_id=...)
    assert answer.status == 200, answer.body
    assert house.backend.seen[0].header("X-Scope") == scope["scope_id"]
    assert house.backend.seen[0].header("X-Tenant") == "one"


async def test_other_headers_arrive_in_order_and_byte_for_byte(house: House) -> None:
    sent = [
        ("X-Two", "b"),
        ("x-TWO", "a"),
        ("Cookie", "a=1; b=2"),
        ("Authorization", "Bearer x"),
        ("X-Empty", ""),
        ("X-Latin", "caf\xe9 \xff"),
        ("Accept-Encoding", "gzip, br"),
    ]
    seen = await seen_with(house, *sent)
    names = {name.lower() for name, _ in sent}
    assert [header for header in seen.raw_headers if header[0].lower() in names] == sent


async def test_a_request_id_and_a_trace_are_added_only_where_absent(house: House) -> None:
    seen = await seen_with(house)
    assert re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-0[01]", seen.header("traceparent") or "")
    assert seen.header("X-Request-Id")
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    seen = await seen_with(house, ("X-Request-ID", "mine"), ("Traceparent", trace))
    assert seen.headers("X-Request-Id") == ["mine"]
    assert seen.headers("traceparent") == [trace]


async def test_one_request_id_is_in_the_answer_the_record_and_at_the_backend(house: House) -> None:
    scope = await house.issue(max_attempts=2)
    for headers in ([], [("X-Request-Id", "from-the-client")]):
        answer = await house.execute(scope, headers=headers)
        request_id = answer.header("X-Request-Id")
        assert request_id == house.backend.seen[-1].header("X-Request-Id")
        record = await house.record(answer.header("Scopegate-Decision-Id") or "")
        assert record["request_id"] == request_id
    assert request_id == "from-the-client"
    found = await house.records("&request_id=from-the-client")
    assert {record["event"] for record in found} == {"admitted", "settled"}


async def test_a_refusal_carries_the_request_id_too(house: House) -> None:
    answer = await house.execute(None, headers=[("X-Request-Id", "mine")])
    assert answer.header("X-Request-Id") == "mine"
    assert answer.header("Scopegate-Decision-Id") == answer.json()["decision_id"]
    assert (await house.record(answer.json()["decision_id"]))["request_id"] == "mine"


@pytest.mark.parametrize("given", ["x" * 300, "caf\xe9\xff"])
async def test_a_request_id_that_no_record_can_hold_does_no_harm(house: House, given: str) -> None:
    answer = await house.execute(await house.issue(), headers=[("X-Request-Id", given)])
    assert answer.status == 200
    assert house.backend.seen[-1].header("X-Request-Id") == given
    record = await house.record(answer.header("Scopegate-Decision-Id") or "")
    assert 0 < len(record["request_id"]) <= 256


# The answer ---------------------------------------------------------------------------------------------


async def test_the_answers_own_headers_come_through_and_ours_cannot_be_forged(
    house: House, backend: Backend
) -> None:
    told = [
        ("Content-Type", "text/x-odd; q=1"),
        ("Set-Cookie", "a=1"),
        ("Set-Cookie", "b=2"),
        ("Server", "mine/1"),
        ("ETag", '"1"'),
        ("X-Bytes", "\xff\xfe"),
        ("Scopegate-Scope-Status", "forged"),
        ("scopegate_decision_id", "forged"),
        ("Connection", "X-Hop"),
        ("X-Hop", "1"),
        ("Keep-Alive", "9"),
    ]
    backend.script = replies(b"body", headers=told)
    answer = await house.execute(await house.issue(), headers=[("X-Request-Id", "mine")])
    assert answer.body == b"body"
    assert answer.headers("Set-Cookie") == ["a=1", "b=2"]
    assert answer.header("Content-Type") == "text/x-odd; q=1"
    assert answer.header("Server") == "mine/1"
    assert answer.header("ETag") == '"1"'
    assert answer.header("X-Bytes") == "\xff\xfe"
    assert answer.headers("X-Hop") == answer.headers("Keep-Alive") == []
    assert "forged" not in [value for _, value in answer.raw_headers]
    assert answer.header("Scopegate-Scope-Status") == "exhausted"
    assert answer.header("Scopegate-Attempts-Remaining") == "0"
    assert answer.header("X-Request-Id") == "mine"
    assert answer.header("Date") is None


async def test_one_head_of_the_backend_is_relayed_to_each_client_as_it_must_be(
    house: House, backend: Backend
) -> None:
    head = (
        b"HTTP/1.1 200 OK\r\nScopegate-Forged: 1\r\nX-Request-Id: theirs\r\nX-Hop: 2\r\n"
        b"Connection: %b\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\nok"
    )
    for _ in range(2):
        for named in (b"X-Hop", b"X-Not"):
            backend.script = sends(head % named)
            passed = await house.data("GET", "/health")
            gated = await house.execute(await house.issue())
            stays = ["2"] if named == b"X-Not" else []
            assert passed.headers("X-Hop") == gated.headers("X-Hop") == stays
            assert passed.header("Scopegate-Forged") == "1"
            assert gated.headers("Scopegate-Forged") == []
            assert passed.header("X-Request-Id") == "theirs"
            assert gated.headers("X-Request-Id") != ["theirs"]
            assert len(gated.headers("X-Request-Id")) == len(gated.headers("Scopegate-Decision-Id")) == 1
            assert passed.headers("Connection") == gated.headers("Connection") == []


async def test_the_reason_phrase_comes_through(house: House, backend: Backend) -> None:
    backend.script = replies(b"", status="299 Quite Fine")
    assert (await house.execute(await house.issue())).first == "HTTP/1.1 299 Quite Fine"


async def test_an_answer_without_a_body_stays_without(house: House, backend: Backend) -> None:
    async def script(request: Message, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")

    backend.script = script
    answer = await house.execute(await house.issue())
    assert (answer.status, answer.body) == (204, b"")
    assert answer.header("Content-Length") is None


FRAMINGS = [b"Content-Length: 5", b"Content-Length: 0", b"content-length: 5", b"Transfer-Encoding: chunked"]


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("framing", FRAMINGS)
async def test_204_carries_no_framing(house: House, backend: Backend, framing: bytes, gated: bool) -> None:
    """A client that believed a length there would take the next answer for this one's body."""
    backend.script = sends(b"HTTP/1.1 204 No Content\r\nX-A: b\r\n%b\r\n\r\n" % framing)
    scope = await house.issue(max_attempts=2)
    for _ in range(2):
        answer = await (house.execute(scope) if gated else house.data("DELETE", "/elsewhere"))
        assert (answer.status, answer.body, answer.header("X-A")) == (204, b"", "b")
        assert answer.header("Content-Length") is None
        assert answer.header("Transfer-Encoding") is None


@pytest.mark.parametrize("gated", [True, False])
async def test_304_keeps_its_length_and_no_coding(house: House, backend: Backend, gated: bool) -> None:
    for framing, length in ((b"Content-Length: 5", "5"), (b"Transfer-Encoding: chunked", None)):
        backend.script = sends(b"HTTP/1.1 304 Not Modified\r\n%b\r\n\r\n" % framing)
        answer = await (house.execute(await house.issue()) if gated else house.data("GET", "/elsewhere"))
        assert (answer.status, answer.header("Content-Length")) == (304, length)
        assert answer.header("Transfer-Encoding") is None


@pytest.mark.parametrize("framing", [*FRAMINGS, b"X-Nothing: 1"])
async def test_the_answer_to_head_keeps_its_length_unless_it_is_204(
    house: House, backend: Backend, framing: bytes
) -> None:
    length = framing.rpartition(b" ")[2].decode() if b"ength" in framing else None
    for status in (200, 204):
        backend.script = sends(b"HTTP/1.1 %d X\r\n%b\r\n\r\n" % (status, framing))
        answer = await house.data("HEAD", "/elsewhere")
        assert answer.status == status
        assert answer.header("Content-Length") == (length if status == 200 else None)
        assert answer.header("Transfer-Encoding") is None


async def test_a_switch_of_protocols_carries_no_framing(house: House, backend: Backend) -> None:
    head = b"HTTP/1.1 101 S\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nContent-Length: 0\r\n\r\n"
    backend.script = sends(head, then="close")
    answer = await house.data("GET", "/ws", [("Connection", "Upgrade"), ("Upgrade", "websocket")])
    assert (answer.status, answer.header("Content-Length")) == (101, None)


# Routes that only look ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS"])
async def test_looking_at_a_gated_path_passes_untouched(house: House, backend: Backend, method: str) -> None:
    answer = await house.data(method, EXECUTE + "?a=1", [("Scopegate-Mine", "kept"), ("X-A", "b")])
    assert answer.status == 200
    (seen,) = backend.seen
    assert (seen.method, seen.target) == (method, EXECUTE + "?a=1")
    assert [header for header in seen.raw_headers if header[0] != "Host"] == [
        ("Scopegate-Mine", "kept"),
        ("X-A", "b"),
    ]
    assert await house.records() == []


@pytest.mark.parametrize(("gated", "step"), [(True, 7), (False, 1)])
async def test_no_byte_of_a_header_value_is_altered_on_its_way(house: House, gated: bool, step: int) -> None:
    """A value arrives as it came, or its request is refused: nothing in between."""
    refused = set()
    for byte in range(1, 256, step):
        value = f"a{chr(byte)}b"
        house.backend.seen.clear()
        if gated:
            answer = await house.execute(await house.issue(), headers=[("X-Odd", value)])
        else:
            answer = await house.data("POST", "/elsewhere", [("X-Odd", value)], b"x")
        if answer.status == 200:
            (request,) = house.backend.seen
            assert request.header("X-Odd") == value
        else:
            assert answer.status == 400
            assert not house.backend.seen
            refused.add(byte)
    assert all(byte < 0x20 or byte == 0x7F for byte in refused)


@pytest.mark.parametrize(
    "value", ["/api/v1/recovery/execute\xff", "/api/v1/recovery/ex\x80ecute", "\xff/recovery/execute"]
)
@pytest.mark.parametrize("name", ["X-Original-URL", "X_Rewrite_URL"])
async def test_a_target_in_a_header_that_becomes_gated_without_its_odd_bytes_is_refused(
    house: House, name: str, value: str
) -> None:
    answer = await house.data("POST", "/elsewhere", [(name, value)], b"x")
    assert answer.status == 400
    assert answer.json()["error"] == "override_refused"
    assert not house.backend.seen
