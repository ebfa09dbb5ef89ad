"""The body of a gated request: what is read from it, and what is refused."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.client import Message, connect, read_message, request_bytes
from tests.support import EXECUTE, Backend, House, Open

JSON = ("Content-Type", "application/json")


async def send(house: House, body: bytes, *headers: tuple[str, str], target: str = EXECUTE) -> Message:
    return await house.data("POST", target, headers or [JSON], body)


async def assert_refused(house: House, answer: Message, status: int, error: str) -> dict[str, Any]:
    body: dict[str, Any] = answer.json()
    assert (answer.status, body["error"]) == (status, error), body
    assert house.backend.seen == []
    assert (await house.record(body["decision_id"]))["decision_reason"] == error
    return body


# The media type -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        "application/json",
        "application/JSON",
        "Application/Json ; charset=utf-8",
        'application/json;charset="utf-8"',
        "application/json; charset=UTF-8",
    ],
)
async def test_plain_json_in_utf8_is_read(house: House, value: str) -> None:
    _, body = house.execution(await house.issue())
    assert (await send(house, body, ("Content-Type", value))).status == 200


@pytest.mark.parametrize(
    "headers",
    [
        [("X-None", "1")],
        [("Content-Type", "")],
        [("Content-Type", "text/plain")],
        [("Content-Type", "text/json")],
        [("Content-Type", "application/x-json")],
        [("Content-Type", "application/problem+json")],
        [("Content-Type", "application/json, text/plain")],
        [("Content-Type", "application/json; charset=utf-16")],
        [("Content-Type", "application/json; charset=iso-8859-1")],
        [("Content-Type", "application/json; charset=utf-7")],
        [("Content-Type", "application/json; charset=utf-8; charset=utf-16")],
        [("Content-Type", "application/json; charset=utf-8; charset=utf-8")],
        [("Content-Type", "application/json; charset=utf-8 utf-16")],
        [("Content-Type", "multipart/form-data; boundary=x")],
        [("Content-Type", "application/json"), ("Content-Encoding", "gzip")],
        [("Content-Type", "application/json"), ("Content-Encoding", "identity")],
        [("Content-Type", "application/json"), ("Content-Encoding", "")],
    ],
)
async def test_any_other_media_type_is_refused(house: House, headers: list[tuple[str, str]]) -> None:
    _, body = house.execution(await house.issue())
    await assert_refused(house, await send(house, body, *headers), 415, "unsupported_media_type")


@pytest.mark.parametrize("second", ["application/json", "text/plain"])
async def test_two_content_types_are_refused_by_the_parser(house: House, second: str) -> None:
    kind, body = house.execution(await house.issue())
    answer = await send(house, body, *kind, ("content-type", second))
    assert answer.status == 400
    assert house.backend.seen == []


# Strict JSON --------------------------------------------------------------------------------------------


def with_scope(house: House, scope_id: str, text: str) -> bytes:
    return text.replace(
        "SCOPE", f'"scope_id":"{scope_id}","incident_id":"inc_1","action":"retry_agent"'
    ).encode()


GOOD = [
    "{SCOPE}",
    " \t\r\n{SCOPE}\r\n ",
    '{SCOPE,"n":-0.0}',
    '{SCOPE,"n":1e308}',
    '{SCOPE,"n":12345678901234567890}',
    '{SCOPE,"x":{"a":1,"A":2}}',
    '{SCOPE,"x":[{"a":1},{"a":1}]}',
    '{SCOPE,"":1}',
    '{SCOPE,"s":"\\ud83d\\ude00 \u00e9"}',
    '{SCOPE,"s":"\\u0000"}',
    '{SCOPE,"parameters":{"Scope_Id":"fine here"}}',
    '{SCOPE,"x":null,"y":true}',
    '{SCOPE,"d":' + "[" * 50 + "]" * 50 + "}",
]


@pytest.mark.parametrize("text", GOOD)
async def test_json_that_reads_in_one_way_is_forwarded(house: House, text: str) -> None:
    scope = await house.issue()
    body = with_scope(house, scope["scope_id"], text)
    answer = await send(house, body)
    assert answer.status == 200, answer.body
    assert house.backend.seen[0].body == body


BAD = [
    b"",
    b" ",
    b"null",
    b"[]",
    b'"text"',
    b"1",
    b"true",
    b"{",
    b"{SCOPE",
    b"{SCOPE,}",
    b"{SCOPE}}",
    b"{SCOPE}{}",
    b"{SCOPE} x",
    b"{SCOPE}\x00",
    b"{SCOPE}\xc2\xa0",
    b"\xef\xbb\xbf{SCOPE}",
    b"\xff\xfe{\x00}\x00",
    b"{SCOPE,'a':1}",
    b"{SCOPE,a:1}",
    b"// x\n{SCOPE}",
    b"{SCOPE /* x */}",
    b"[{SCOPE}]",
    b'{SCOPE,"action":"retry_agent"}',
    b'{SCOPE,"\\u0061ction":"failover"}',
    b'{SCOPE,"x":1,"x":1}',
    b'{SCOPE,"x":{"y":1,"y":2}}',
    b'{SCOPE,"x":[[{"y":1,"\\u0079":2}]]}',
    b'{SCOPE,"parameters":{"a":1,"a":1}}',
    b'{SCOPE,"Action":"failover"}',
    b'{SCOPE,"ACTION":"x"}',
    b'{SCOPE,"Scope_ID":"x"}',
    b'{SCOPE,"incident_Id":"x"}',
    b'{SCOPE,"Parameters":{}}',
    b'{SCOPE,"Target_Agents":[]}',
    b'{SCOPE,"parameters":{"Target_Agents":[]}}',
    b'{SCOPE,"act\\u0130on":1}',
    b'{SCOPE,"\\uff41ction":1}',
    b'{SCOPE,"\\u017fcope_id":1}',
    b'{SCOPE,"n":NaN}',
    b'{SCOPE,"n":Infinity}',
    b'{SCOPE,"n":-Infinity}',
    b'{SCOPE,"n":1e999}',
    b'{SCOPE,"n":-1e999}',
    b'{SCOPE,"n":1.9e308}',
    b'{SCOPE,"n":[{"m":17976931348623159e292}]}',
    b'{SCOPE,"n":01}',
    b'{SCOPE,"n":+1}',
    b'{SCOPE,"n":.5}',
    b'{SCOPE,"n":1.}',
    b'{SCOPE,"n":0x1}',
    b'{SCOPE,"n":' + b"9" * 5000 + b"}",
    b'{SCOPE,"n":0.' + b"1" * 5000 + b"}",
    b'{SCOPE,"n":1e99999999999999999999}',
    b'{SCOPE,"s":"\\ud800"}',
    b'{SCOPE,"s":"\\udc00\\ud800"}',
    b'{SCOPE,"\\ud800":1}',
    b'{SCOPE,"s":"\xed\xa0\x80"}',
    b'{SCOPE,"s":"\xff"}',
    b'{SCOPE,"s":"\xc0\xaf"}',
    b'{SCOPE,"s":"\n"}',
    b'{SCOPE,"s":"\x00"}',
    b'{SCOPE,"s":"\\x41"}',
    b'{SCOPE,"d":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{SCOPE,"d":' + b'{"a":' * 1000 + b"1" + b"}" * 1000 + b"}",
]
# The dotted capital I does not fold to an i: another word, and no twin.
BAD.remove(b'{SCOPE,"act\\u0130on":1}')


@pytest.mark.parametrize("text", BAD, ids=range(len(BAD)))
async def test_json_that_two_parsers_could_read_in_two_ways_is_refused(house: House, text: bytes) -> None:
    scope = await house.issue()
    facts = b'"scope_id":"%b","incident_id":"inc_1","action":"retry_agent"' % scope["scope_id"].encode()
    await assert_refused(house, await send(house, text.replace(b"SCOPE", facts)), 400, "invalid_request")
    assert (await house.scope(scope))["attempts_used"] == 0


# Size and time ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_up_to_the_limit_is_read_and_one_byte_more_refused(
    open_house: Open, chunked: bool
) -> None:
    house = await open_house(gate={"max_body_bytes": 2000})
    scope = await house.issue(max_attempts=2)
    _, small = house.execution(scope)
    for size, status in ((2000, 200), (2001, 413)):
        body = small + b" " * (size - len(small))
        headers = [JSON]
        if chunked:
            headers.append(("Transfer-Encoding", "chunked"))
            body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
        answer = await house.data("POST", EXECUTE, headers, body)
        assert answer.status == status
    assert answer.json()["error"] == "body_too_large"
    assert (await house.record(answer.json()["decision_id"]))["decision_reason"] == "body_too_large"
    assert len(house.backend.seen) == 1


async def test_a_body_that_does_not_arrive_in_time_is_refused(open_house: Open) -> None:
    house = await open_house(gate={"body_timeout_seconds": 0.1})
    reader, writer = await connect(house.sidecar.data_address)
    writer.write(request_bytes("POST", EXECUTE, [JSON, ("Content-Length", "100")], b"{"))
    answer = await read_message(reader)
    assert answer is not None
    await assert_refused(house, answer, 408, "body_timeout")
    writer.close()


async def test_a_client_that_waits_to_be_told_sends_its_body_then(house: House) -> None:
    kind, body = house.execution(await house.issue())
    reader, writer = await connect(house.sidecar.data_address)
    headers = [*kind, ("Expect", "100-continue"), ("Content-Length", str(len(body)))]
    writer.write(request_bytes("POST", EXECUTE, headers, b""))
    assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(body)
    answer = await read_message(reader)
    writer.close()
    assert answer is not None
    assert answer.status == 200
    assert house.backend.seen[0].body == body


async def test_a_client_whose_body_would_be_refused_is_not_told_to_send_it(open_house: Open) -> None:
    house = await open_house(gate={"max_body_bytes": 100})
    reader, writer = await connect(house.sidecar.data_address)
    headers = [JSON, ("Expect", "100-continue"), ("Content-Length", "101")]
    writer.write(request_bytes("POST", EXECUTE, headers, b""))
    assert (await reader.readline()).startswith(b"HTTP/1.1 413 ")
    writer.close()


async def test_a_body_that_is_cut_off_is_not_judged(house: House, backend: Backend) -> None:
    scope = await house.issue()
    kind, body = house.execution(scope)
    _, writer = await connect(house.sidecar.data_address)
    writer.write(request_bytes("POST", EXECUTE, [*kind, ("Content-Length", str(len(body) + 9))], body))
    await writer.drain()
    writer.close()
    await asyncio.sleep(0.1)
    assert backend.seen == []
    assert (await house.scope(scope))["attempts_used"] == 0


# The facts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", [7, 1.5, True, False, [], {}, ["scope_x"], "x" * 257, "a\nb", "a\x00b", "\x7f", "a\u200b"]
)
@pytest.mark.parametrize("member", ["scope_id", "incident_id", "action"])
async def test_a_fact_of_a_wrong_type_is_an_invalid_request(house: House, member: str, value: Any) -> None:
    scope = await house.issue()
    answer = await house.execute(scope, **{member: value})
    assert (await assert_refused(house, answer, 400, "invalid_request"))["member"] == f"/{member}"


@pytest.mark.parametrize("value", [None, "", ...])
async def test_a_scope_id_that_is_absent_is_required_first_of_all(house: House, value: Any) -> None:
    answer = await house.execute(None, scope_id=value, incident_id="", action="restart")
    body = await assert_refused(house, answer, 400, "scoped_execution_required")
    assert (body["incident_id"], body["action"]) == (None, "restart")


@pytest.mark.parametrize("value", [None, "", ...])
@pytest.mark.parametrize("member", ["incident_id", "action"])
async def test_another_fact_that_is_absent_is_an_invalid_request(
    house: House, member: str, value: Any
) -> None:
    answer = await house.execute(await house.issue(), **{member: value})
    assert (await assert_refused(house, answer, 400, "invalid_request"))["member"].strip("/") == member


async def test_a_wrong_type_goes_before_an_absent_scope_id(house: House) -> None:
    await assert_refused(house, await house.execute(None, action=7), 400, "invalid_request")


@pytest.mark.parametrize("value", [1, "x", [], True])
async def test_parameters_are_an_object(house: House, value: Any) -> None:
    await assert_refused(
        house, await house.execute(await house.issue(), parameters=value), 400, "invalid_request"
    )


@pytest.mark.parametrize("value", [None, ""])
async def test_parameters_may_be_absent(house: House, value: Any) -> None:
    assert (await house.execute(await house.issue(), parameters=value)).status == 200


@pytest.mark.parametrize("length", [1, 256])
async def test_an_id_has_up_to_256_characters(house: House, length: int) -> None:
    scope = await house.issue(incident_id="\u00fc" * length)
    assert (await house.execute(scope)).status == 200


# Target agents ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "members",
    [
        {"target_agents": ["a"]},
        {"target_agents": ["b", "a"]},
        {"parameters": {"target_agents": ["a"]}},
        {"target_agents": ["a"], "parameters": {"target_agents": ["a"]}},
        {"target_agents": None, "parameters": {"target_agents": ["a"]}},
    ],
)
async def test_agents_within_the_scope_are_let_through(house: House, members: dict[str, Any]) -> None:
    scope = await house.issue(target_agents=["a", "b"])
    answer = await house.execute(scope, **members)
    assert answer.status == 200, answer.body


@pytest.mark.parametrize(
    ("members", "named"),
    [
        ({}, []),
        ({"target_agents": []}, []),
        ({"target_agents": ["c"]}, ["c"]),
        ({"target_agents": ["a", "c"]}, ["a", "c"]),
        ({"target_agents": ["A"]}, ["A"]),
        ({"parameters": {"target_agents": ["c"]}}, ["c"]),
    ],
)
async def test_no_agents_or_others_are_refused(
    house: House, members: dict[str, Any], named: list[str]
) -> None:
    scope = await house.issue(target_agents=["a", "b"])
    body = await assert_refused(house, await house.execute(scope, **members), 403, "target_outside_scope")
    assert (body["scope_id"], body["target_agents"]) == (scope["scope_id"], named)


@pytest.mark.parametrize(
    "members",
    [
        {"target_agents": ["a"], "parameters": {"target_agents": ["b"]}},
        {"target_agents": ["a"], "parameters": {"target_agents": []}},
        {"target_agents": "a"},
        {"target_agents": {}},
        {"target_agents": [1]},
        {"target_agents": [""]},
        {"target_agents": [None]},
        {"target_agents": ["a\n"]},
        {"parameters": {"target_agents": 1}},
    ],
)
async def test_agents_that_disagree_or_have_wrong_types_are_invalid(
    house: House, members: dict[str, Any]
) -> None:
    scope = await house.issue(target_agents=["a", "b"])
    await assert_refused(house, await house.execute(scope, **members), 400, "invalid_request")


async def test_a_scope_without_agents_asks_for_none(house: House) -> None:
    assert (await house.execute(await house.issue(), target_agents=["anybody"])).status == 200


# Routes that name other places --------------------------------------------------------------------------

ROUTE = {
    "path": "/v2/incidents/{incident}/run",
    "scope_id": "header:X-Scope",
    "incident_id": "path:incident",
    "action": "query:action",
    "parameters": "/job/args",
    "target_agents": "/job/agents",
}


async def test_a_route_names_other_places(open_house: Open, backend: Backend) -> None:
    house = await open_house(gate={"routes": [ROUTE]})
    scope = await house.issue(incident_id="inc /1", target_agents=["a"])
    body = json.dumps({"job": {"args": {"n": 1}, "agents": ["a"]}, "scope_id": "ignored"}).encode()
    target = "/v2/incidents/inc%20%2F1/run?action=retry%5Fagent&x=1"
    ambiguous = await send(house, body, JSON, ("X-Scope", scope["scope_id"]), target=target)
    assert ambiguous.json()["error"] == "ambiguous_path"
    scope = await house.issue(incident_id="inc 1", target_agents=["a"])
    target = "/v2/incidents/inc%201/run?action=retry%5Fagent&x=1"
    answer = await send(house, body, JSON, ("x-scope", scope["scope_id"]), target=target)
    assert answer.status == 200, answer.body
    record = await house.record(answer.header("Scopegate-Decision-Id") or "")
    assert (record["incident_id"], record["action"]) == ("inc 1", "retry_agent")
    assert record["decision_inputs"]["parameters"] == {"n": 1}
    assert backend.seen[0].target == target
    assert (await house.data("POST", EXECUTE, [JSON], b"{}")).status == 200  # no longer gated


@pytest.mark.parametrize(
    ("headers", "query"),
    [
        ([("X-Scope", "a"), ("x-scope", "b")], "?action=retry_agent"),
        ([("X-Scope", "a")], "?action=retry_agent&action=retry_agent"),
        ([("X-Scope", "a\xff")], "?action=retry_agent"),
        ([("X-Scope", "a")], "?action=%ff"),
        ([("X-Scope", "a")], "?action=a%0Ab"),
    ],
)
async def test_a_place_that_is_named_twice_or_unreadable_is_refused(
    open_house: Open, headers: list[tuple[str, str]], query: str
) -> None:
    house = await open_house(gate={"routes": [ROUTE]})
    answer = await send(house, b"{}", JSON, *headers, target="/v2/incidents/i/run" + query)
    await assert_refused(house, answer, 400, "invalid_request")


async def test_a_header_or_query_that_is_absent_or_empty_is_absent(open_house: Open) -> None:
    house = await open_house(gate={"routes": [ROUTE]})
    target = "/v2/incidents/i/run?action="
    await assert_refused(house, await send(house, b"{}", target=target), 400, "scoped_execution_required")
    answer = await send(house, b"{}", JSON, ("X-Scope", ""), target=target)
    await assert_refused(house, answer, 400, "scoped_execution_required")
    answer = await send(house, b"{}", JSON, ("X-Scope", "s"), target=target)
    await assert_refused(house, answer, 400, "invalid_request")
