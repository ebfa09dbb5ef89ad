"""Routes that take forms, empty bodies, opaque ones and further JSON types, and facts in other places."""

from __future__ import annotations

import hashlib
import json
import random
from typing import Any

import pytest

from tests import deformingforms
from tests.client import HeaderList, Message, connect, read_message, request_bytes
from tests.support import Backend, House, Open

JSON = ("Content-Type", "application/json")
FORM = ("Content-Type", "application/x-www-form-urlencoded")
RUN = "/run"


def route(**keys: Any) -> dict[str, Any]:
    return {"routes": [{"name": "run-it", "path": RUN, "action": "const:retry_agent", **keys}]}


IN_HEADERS = {"scope_id": "header:X-Recovery-Scope-Id", "incident_id": "header:X-Recovery-Incident-Id"}


async def run(
    house: House,
    body: bytes | None,
    *headers: tuple[str, str],
    scope: dict[str, Any] | None = None,
    target: str = RUN,
) -> Message:
    """POST a body under a scope that headers name."""
    named: HeaderList = ()
    if scope is not None:
        named = [
            ("X-Recovery-Scope-Id", scope["scope_id"]),
            ("X-Recovery-Incident-Id", scope["incident_id"]),
        ]
    return await house.data("POST", target, [*headers, *named], body)


async def inputs_of(house: House, answer: Message) -> dict[str, Any]:
    record = await house.record(answer.header("Scopegate-Decision-Id") or answer.json()["decision_id"])
    found: dict[str, Any] = record["decision_inputs"]
    return found


async def assert_refused(house: House, answer: Message, status: int, error: str, **members: Any) -> None:
    body = answer.json()
    assert (answer.status, body["error"]) == (status, error), body
    assert members.items() <= body.items()
    assert house.backend.seen == []
    assert (await house.record(body["decision_id"]))["decision_reason"] == error


@pytest.mark.parametrize(
    ("body", "types", "says"),
    [
        ("json", [FORM], "A body of this Content-Type or charset (application/x-www-form-urlencoded) cannot"),
        (["json", "empty"], [FORM], "charset (application/x-www-form-urlencoded) cannot"),
        (
            "json",
            [("Content-Type", "application/json; charset=latin-1")],
            "(application/json; charset=latin-1)",
        ),
        ("json", [], "A body without a Content-Type cannot"),
        (["json", "empty"], [("Content-Type", "")], "A body without a Content-Type cannot"),
        ("json", [("Content-Type", "x/" + "y" * 99)], "A body of this Content-Type or charset cannot"),
    ],
)
async def test_a_415_says_which_content_type_came(
    open_house: Open, body: object, types: HeaderList, says: str
) -> None:
    house = await open_house(gate=route(body=body))
    answer = await house.data("POST", RUN, list(types), b"{}")
    await assert_refused(house, answer, 415, "unsupported_media_type")
    assert says in answer.json()["message"]


async def test_the_answer_to_a_request_without_a_fact_names_the_place_of_the_fact(open_house: Open) -> None:
    house = await open_house(
        gate={
            "routes": [
                {"name": "retry_agent", "path": "/run", "body": "empty"},
                {"name": "named", "path": "/named", "action": "query:do", "target_agents": "query:agent"},
            ]
        }
    )
    scope = await house.issue(target_agents=["a1"])
    id_only = [("X-Recovery-Scope-Id", scope["scope_id"])]
    asked = {"scope_id": scope["scope_id"], "incident_id": scope["incident_id"]}
    for answer, told in (
        (await run(house, b""), "reads it from header:x-recovery-scope-id."),
        (await run(house, b"", *id_only), "reads it from header:x-recovery-incident-id."),
        (await run(house, b"", scope=scope), "reads no target agents."),
        (await house.data("POST", "/named", [JSON], b"{}"), "reads it from /scope_id."),
        (await house.data("POST", "/named", [JSON], json.dumps(asked).encode()), "reads it from query:do."),
        (
            await house.data("POST", "/named?do=retry_agent", [JSON], json.dumps(asked).encode()),
            "reads it from query:agent.",
        ),
    ):
        assert answer.json()["message"].endswith(f" This route {told}")
    assert house.backend.seen == []


# The defaults without JSON ------------------------------------------------------------------------------


@pytest.mark.parametrize("body", ["form", "empty", "any", ["form", "empty", "any"]])
async def test_without_json_headers_name_scope_and_incident_and_the_route_is_the_action(
    open_house: Open, body: object
) -> None:
    house = await open_house(gate={"routes": [{"name": "retry_agent", "path": RUN, "body": body}]})
    await assert_refused(
        house,
        await run(house, b"", FORM),
        400,
        "scoped_execution_required",
        action="retry_agent",
        route="retry_agent",
    )
    scope = await house.issue()
    assert (await run(house, b"", FORM, scope=scope)).status == 200
    other = await house.issue(action="failover")
    answer = await run(house, b"", FORM, scope=other)
    assert (answer.status, answer.json()["error"]) == (403, "action_outside_scope")


# Empty bodies -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("headers", [[], [JSON], [FORM], [("Content-Type", "text/plain")]])
@pytest.mark.parametrize("body", ["empty", ["json", "empty"], ["empty", "form"]])
async def test_an_empty_body_needs_no_content_type_and_goes_on_empty(
    open_house: Open, body: object, headers: list[tuple[str, str]]
) -> None:
    house = await open_house(gate=route(body=body, **IN_HEADERS))
    answer = await run(house, b"", *headers, scope=await house.issue())
    assert answer.status == 200, answer.body
    (seen,) = house.backend.seen
    assert (seen.body, seen.header("Content-Length"), seen.headers("Content-Type")) == (
        b"",
        "0",
        [value for _, value in headers],
    )
    inputs = await inputs_of(house, answer)
    assert (inputs["body_bytes"], inputs["body_sha256"]) == (0, hashlib.sha256(b"").hexdigest())


async def test_an_empty_body_in_chunks_is_empty(open_house: Open) -> None:
    house = await open_house(gate=route(body="empty"))
    scope = await house.issue()
    reader, writer = await connect(house.sidecar.data_address)
    headers = [
        ("Transfer-Encoding", "chunked"),
        ("X-Recovery-Scope-Id", scope["scope_id"]),
        ("X-Recovery-Incident-Id", "inc_1"),
    ]
    writer.write(request_bytes("POST", RUN, headers, b"0\r\n\r\n"))
    answer = await read_message(reader)
    writer.close()
    assert answer is not None
    assert answer.status == 200, answer.body
    (seen,) = house.backend.seen
    assert (seen.body, seen.header("Content-Length")) == (b"", "0")


@pytest.mark.parametrize("headers", [[], [FORM], [("Content-Type", "text/plain")]])
async def test_bytes_where_none_are_taken_are_415_which_names_what_is_taken(
    open_house: Open, headers: list[tuple[str, str]]
) -> None:
    house = await open_house(gate=route(body=["json", "empty"], **IN_HEADERS))
    scope = await house.issue()
    answer = await run(house, b"x", *headers, scope=scope)
    await assert_refused(house, answer, 415, "unsupported_media_type", body=["json", "empty"])
    assert "json (application/json), empty (no bytes)" in answer.json()["message"]
    chunked = await run(
        house, b"1\r\nx\r\n0\r\n\r\n", *headers, ("Transfer-Encoding", "chunked"), scope=scope
    )
    await assert_refused(house, chunked, 415, "unsupported_media_type", body=["json", "empty"])


async def test_a_client_that_waits_is_not_told_to_send_bytes_that_are_not_taken(open_house: Open) -> None:
    house = await open_house(gate=route(body="empty"))
    reader, writer = await connect(house.sidecar.data_address)
    headers = [FORM, ("Expect", "100-continue"), ("Content-Length", "3")]
    writer.write(request_bytes("POST", RUN, headers, b""))
    assert (await reader.readline()).startswith(b"HTTP/1.1 415 ")
    writer.close()


async def test_json_that_is_empty_is_no_json_where_no_empty_body_is_taken(open_house: Open) -> None:
    house = await open_house(gate=route(body="json", **IN_HEADERS))
    await assert_refused(
        house, await run(house, b"", JSON, scope=await house.issue()), 400, "invalid_request"
    )


# Forms --------------------------------------------------------------------------------------------------

IN_A_FORM = {
    "body": "form",
    "scope_id": "form:scope",
    "incident_id": "form:incident",
    "action": "form:do",
    "target_agents": "form:region/form:unit",
}


def form_of(scope: dict[str, Any], more: str = "") -> bytes:
    return f"scope={scope['scope_id']}&incident=inc%5F1&do=retry%5fagent&region=eu&unit=db+1{more}".encode()


async def test_a_form_is_judged_and_goes_on_byte_for_byte(open_house: Open) -> None:
    house = await open_house(gate=route(**IN_A_FORM))
    scope = await house.issue(target_agents=["eu/db 1"])
    body = form_of(scope, "&note=a;b&x=%F0%9F%98%80&&empty=")
    answer = await run(house, body, FORM)
    assert answer.status == 200, answer.body
    (seen,) = house.backend.seen
    assert (seen.body, seen.header("Content-Type")) == (body, FORM[1])
    inputs = await inputs_of(house, answer)
    assert inputs["target_agents"] == ["eu/db 1"]
    assert (inputs["body_bytes"], inputs["body_sha256"]) == (len(body), hashlib.sha256(body).hexdigest())
    assert "parameters" not in inputs


@pytest.mark.parametrize(
    ("more", "member"),
    [
        ("&do=retry_agent", "form:do"),
        ("&Do=failover", "form:do"),
        ("&do[]=failover", "form:do"),
        ("&do[x]=failover", "form:do"),
        ("&+do=failover", "form:do"),
        ("&do%00=failover", "form:do"),
        ("&note=x;do=failover", "form:do"),
        ("&%EF%BD%84o=failover", "form:do"),
        ("&unit.x=other", "form:unit"),
        ("&_method=DELETE", None),
        ("&note=%zz", None),
        ("&note=%ff", None),
        ("&note=\n", None),
    ],
)
async def test_a_form_that_two_backends_read_in_two_ways_is_refused(
    open_house: Open, more: str, member: str | None
) -> None:
    house = await open_house(gate=route(**IN_A_FORM))
    scope = await house.issue()
    answer = await run(house, form_of(scope, more), FORM)
    await assert_refused(house, answer, 400, "invalid_request", **({"member": member} if member else {}))
    assert (await house.scope(scope))["attempts_used"] == 0


@pytest.mark.parametrize("query", ["?do=failover", "?Do=x", "?x;do=1", "?a=1&unit[]=2"])
async def test_a_fact_of_a_form_may_not_stand_in_the_query(open_house: Open, query: str) -> None:
    house = await open_house(gate=route(**IN_A_FORM))
    scope = await house.issue()
    await assert_refused(
        house, await run(house, form_of(scope), FORM, target=RUN + query), 400, "invalid_request"
    )
    assert (await run(house, form_of(scope), FORM, target=RUN + "?page=2&done=1")).status == 200


async def test_a_part_with_the_text_between_the_parts_is_refused(open_house: Open) -> None:
    house = await open_house(gate=route(**IN_A_FORM))
    body = form_of(await house.issue()).replace(b"unit=db+1", b"unit=db%2F1")
    answer = await run(house, body, FORM)
    await assert_refused(house, answer, 400, "invalid_request", member="form:unit")


async def test_a_joined_fact_without_a_part_is_absent(open_house: Open) -> None:
    house = await open_house(gate=route(**IN_A_FORM))
    scope = await house.issue(target_agents=["eu/db 1"])
    body = form_of(scope).replace(b"unit=db+1", b"unit=")
    await assert_refused(house, await run(house, body, FORM), 403, "target_outside_scope", target_agents=[])


async def test_a_large_form_is_judged_as_a_small_one_is(open_house: Open) -> None:
    house = await open_house(gate=route(**IN_A_FORM))
    scope = await house.issue(max_attempts=2)
    body = form_of(scope, "&note=" + "x" * 100_000)
    assert (await run(house, body, FORM)).status == 200
    assert house.backend.seen[0].body == body
    answer = await run(house, form_of(scope, "&note=" + "x" * 100_000 + "&DO=x"), FORM)
    assert answer.json()["member"] == "form:do"


async def test_the_bytes_of_every_form_that_is_judged_are_those_that_the_backend_gets(
    open_house: Open,
) -> None:
    keys = route(body="form", action="form:action", target_agents="form:target")
    house = await open_house(gate=keys, scopes={"limits": {"max_attempts": 1000}})
    scope = await house.issue(max_attempts=1000)
    draw, executed = random.Random(3), 0
    for number in range(80):
        sent, query = deformingforms.form(draw)
        target = RUN + "?" + "".join(chr(byte) if 0x21 <= byte <= 0x7E else "%20" for byte in query)
        framing, body = [FORM], sent
        if number % 2 and sent:
            framing = [FORM, ("Transfer-Encoding", "chunked")]
            cut = draw.randrange(len(sent)) + 1
            pieces = [piece for piece in (sent[:cut], sent[cut:], b"") if piece] + [b""]
            body = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
        answer = await run(house, body, *framing, scope=scope, target=target)
        inputs = await inputs_of(house, answer)
        if answer.status == 200:
            executed += 1
            assert [seen.body for seen in house.backend.seen] == [sent]
            assert inputs["body_sha256"] == hashlib.sha256(sent).hexdigest()
        else:
            assert house.backend.seen == []
        house.backend.seen.clear()
    assert 10 < executed < 70


# Opaque bodies ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("Content-Type", "application/yaml")],
        [("Content-Type", "nonsense")],
        [JSON],
        [FORM, ("Content-Encoding", "gzip")],
    ],
)
@pytest.mark.parametrize("body", [b"", b"\x00\xff{", b"{broken", b"x" * 20_000])
async def test_an_opaque_body_goes_on_as_it_came_and_its_record_has_size_and_digest(
    open_house: Open, body: bytes, headers: list[tuple[str, str]]
) -> None:
    house = await open_house(gate=route(body="any"))
    answer = await run(house, body, *headers, scope=await house.issue())
    assert answer.status == 200, answer.body
    (seen,) = house.backend.seen
    assert seen.body == body
    assert [pair for pair in seen.raw_headers if pair in headers] == headers
    inputs = await inputs_of(house, answer)
    assert (inputs["body_bytes"], inputs["body_sha256"]) == (len(body), hashlib.sha256(body).hexdigest())
    assert not {"parameters", "parameters_left_out"} & inputs.keys()


async def test_an_opaque_body_is_bounded(open_house: Open) -> None:
    house = await open_house(gate=route(body="any") | {"max_body_bytes": 100})
    scope = await house.issue()
    await assert_refused(house, await run(house, b"x" * 101, scope=scope), 413, "body_too_large")
    assert (await run(house, b"x" * 100, scope=scope)).status == 200


BOTH = {"body": ["json", "any"], **IN_HEADERS, "parameters": "/job", "target_agents": "/agents"}


async def test_with_json_and_any_the_content_type_decides(open_house: Open) -> None:
    house = await open_house(gate=route(**BOTH))
    scope = await house.issue(max_attempts=3)
    document = json.dumps({"job": {"n": 1}, "agents": ["a"]}).encode()
    as_json = await inputs_of(house, await run(house, document, JSON, scope=scope))
    assert (as_json["parameters"], as_json["target_agents"]) == ({"n": 1}, ["a"])
    opaque = await inputs_of(house, await run(house, document, ("Content-Type", "text/yaml"), scope=scope))
    assert opaque["body_bytes"] == len(document)
    assert not {"parameters", "target_agents"} & opaque.keys()


async def test_a_pointer_that_an_opaque_body_cannot_hold_is_absent_and_the_bounds_decide(
    open_house: Open,
) -> None:
    house = await open_house(gate=route(**BOTH))
    scope = await house.issue(target_agents=["a"])
    answer = await run(house, b'{"agents": ["a"]}', ("Content-Type", "text/yaml"), scope=scope)
    await assert_refused(house, answer, 403, "target_outside_scope")
    assert (await run(house, b'{"agents": ["a"]}', JSON, scope=scope)).status == 200


@pytest.mark.parametrize("body", [b"{broken", b"", b'{"a":1,"a":2}', b"[]"])
async def test_broken_json_never_becomes_opaque(open_house: Open, body: bytes) -> None:
    house = await open_house(gate=route(**BOTH))
    answer = await run(house, body, JSON, scope=await house.issue())
    if body:
        await assert_refused(house, answer, 400, "invalid_request")
    else:
        assert answer.status == 200  # an opaque body may have no bytes


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("Content-Type", "text/json")],
        [("Content-Type", "application/json; charset=utf-16")],
        [("Content-Type", "application/ld+json")],
        [("Content-Type", "text/plain"), ("Content-Encoding", "gzip")],
    ],
)
async def test_beside_json_a_body_that_could_be_read_as_json_is_not_opaque(
    open_house: Open, headers: list[tuple[str, str]]
) -> None:
    house = await open_house(gate=route(**BOTH))
    answer = await run(house, b'{"agents": ["b"]}', *headers, scope=await house.issue())
    await assert_refused(house, answer, 415, "unsupported_media_type", body=["json", "any"])


async def test_where_the_query_holds_a_fact_no_opaque_body_is_a_form(open_house: Open) -> None:
    house = await open_house(gate=route(body="any", action="query:do"))
    scope = await house.issue()
    answer = await run(house, b"do=failover", FORM, scope=scope, target=RUN + "?do=retry_agent")
    await assert_refused(house, answer, 415, "unsupported_media_type")
    plain = ("Content-Type", "text/plain")
    answer = await run(house, b"do=failover", plain, scope=scope, target=RUN + "?do=retry_agent")
    assert answer.status == 200


# Further JSON types -------------------------------------------------------------------------------------

PATCH = ("Content-Type", "application/json-patch+json")


async def test_a_further_media_type_is_strict_json_and_may_be_an_array(open_house: Open) -> None:
    house = await open_house(
        gate=route(content_types="application/json-patch+json", **IN_HEADERS, target_agents="/0/agents")
    )
    scope = await house.issue(max_attempts=3, target_agents=["a"])
    for body in (b'[{"op": "add", "agents": ["a"]}]', b'{"0": {"agents": ["a"]}}'):
        answer = await run(house, body, PATCH, scope=scope)
        assert answer.status == 200, answer.body
        assert house.backend.seen.pop().body == body
    for body in (b'[{"agents": ["a"], "Agents": ["b"]}]', b'[{"op": 1, "op": 2}]', b'"text"', b"[] []"):
        await assert_refused(house, await run(house, body, PATCH, scope=scope), 400, "invalid_request")
    # application/json itself still holds an object.
    await assert_refused(house, await run(house, b"[]", JSON, scope=scope), 400, "invalid_request")
    other = ("Content-Type", "application/merge-patch+json")
    await assert_refused(house, await run(house, b"{}", other, scope=scope), 415, "unsupported_media_type")


# Headers and paths --------------------------------------------------------------------------------------

JOINED = {
    "routes": [
        {
            "path": "/v1/{space}/{pod}/evict",
            "body": ["empty", "any"],
            "action": "const:retry_agent",
            "target_agents": "path:space/path:pod@header:X-Region",
        }
    ]
}


async def test_a_header_that_is_part_of_a_joined_place_always_arrives(
    open_house: Open, backend: Backend
) -> None:
    house = await open_house(gate=JOINED)
    scope = await house.issue(target_agents=["shop/cart-0@eu"])
    region = ("X-Region", "eu")
    target = "/v1/shop/cart-0/evict"
    for twin in (("X_Region", "us"), ("x-region", "us")):
        await assert_refused(
            house, await run(house, b"", region, twin, scope=scope, target=target), 400, "invalid_request"
        )
    answer = await run(house, b"", region, ("Connection", "X-Region"), scope=scope, target=target)
    assert answer.status == 200, answer.body
    assert backend.seen[0].header("X-Region") == "eu"


async def test_the_whole_path_tells_folders_apart(open_house: Open, backend: Backend) -> None:
    house = await open_house(
        gate={
            "routes": [
                {
                    "path": "**/build",
                    "body": "any",
                    "action": "const:retry_agent",
                    "target_agents": "path:*",
                }
            ]
        }
    )
    scope = await house.issue(target_agents=["/job/shop/job/cart/build"], max_attempts=2)
    for target in ("/job/other/job/cart/build", "/job/shop/build"):
        await assert_refused(
            house, await run(house, b"", scope=scope, target=target), 403, "target_outside_scope"
        )
    for target in ("/job/shop/job/cart/build", "/job/%73hop/job/cart/build?delay=0"):
        assert (await run(house, b"", scope=scope, target=target)).status == 200
        assert backend.seen.pop().target == target
    answer = await run(house, b"", scope=scope, target="/job/shop;x/job/cart/build")
    assert answer.status == 400


# explain ------------------------------------------------------------------------------------------------


async def test_explain_takes_what_the_route_reads_elsewhere_from_the_body(open_house: Open) -> None:
    house = await open_house(gate=route(body="form", target_agents="form:unit"))
    scope = await house.issue(target_agents=["db"])
    told = await house.explain(scope, action="ignored", target_agents=["db"])
    assert (told["allowed"], told["route"]) == (True, "run-it")
    assert (await house.explain(scope, target_agents=["other"]))["error"] == "target_outside_scope"
    assert (await house.explain(None))["error"] == "scoped_execution_required"
    named = await house.admin("POST", "/api/v1/explain?route=run-it", {"scope_id": scope["scope_id"]})
    assert (named.json()["route"], named.json()["members"]["member"]) == ("run-it", "incident_id")
    assert (await house.admin("POST", "/api/v1/explain?route=/run", {})).status == 400


async def test_explain_judges_a_route_by_its_pointers_and_constants(open_house: Open) -> None:
    house = await open_house(gate=route(scope_id="/job/scope", incident_id="header:X-Incident"))
    scope = await house.issue()
    body = {"job": {"scope": scope["scope_id"]}, "incident_id": "inc_1", "action": "failover"}
    told = (await house.admin("POST", "/api/v1/explain", body)).json()
    assert (told["allowed"], told["scope"]["scope_id"]) == (True, scope["scope_id"])


@pytest.mark.parametrize("method", ["POST", "PATCH", "GET"])
@pytest.mark.parametrize(
    "query",
    ["_method=DELETE", "a=1&%5Fmethod=DELETE", "_METHOD=x", "_method[]=x", "a=1;_method=x", "_met%FFhod=x"],
)
async def test_a_query_that_replaces_the_method_is_refused_on_a_gated_path(
    open_house: Open, method: str, query: str
) -> None:
    routes = [
        {"name": "remove", "path": RUN, "methods": ["DELETE"], "other_methods": "pass", "body": "any"},
        {"name": "change", "path": RUN, "methods": ["PATCH"], "other_methods": "pass", "body": "any"},
    ]
    house = await open_house(gate={"routes": routes})
    answer = await house.data(method, f"{RUN}?{query}")
    await assert_refused(house, answer, 400, "override_refused")


async def test_other_fields_of_a_query_replace_no_method(open_house: Open) -> None:
    house = await open_house(gate=route(methods=["DELETE"], other_methods="pass", body="any"))
    for query in ("method=DELETE", "a=_method", "x_method=1"):
        assert (await house.data("POST", f"{RUN}?{query}")).status == 200
    assert (await house.data("POST", "/elsewhere?_method=DELETE")).status == 200
