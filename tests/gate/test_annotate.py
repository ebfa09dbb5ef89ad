"""`gate.annotate_response`: the members of the seed's result that the backend's answer lacks."""

from __future__ import annotations

import json

import pytest

from tests.support import EXECUTE, Backend, House, Open, replies

JSON = ("Content-Type", "application/json")
MEMBERS = {"scope_id", "attempt_number", "scope_status", "attempts_remaining", "cost_used_usd", "executed_at"}


@pytest.fixture
async def house(open_house: Open) -> House:
    return await open_house(gate={"annotate_response": True})


async def test_a_json_object_gets_what_it_lacks(house: House, backend: Backend) -> None:
    backend.script = replies(b'{"ok": 1.0, "n": 12345678901234567890 }\n', headers=[JSON, ("ETag", '"1"')])
    scope = await house.issue(action="failover", max_attempts=3)
    answer = await house.execute(scope)
    assert answer.body.startswith(b'{"ok": 1.0, "n": 12345678901234567890 ')
    body = answer.json()
    assert set(body) == {"ok", "n"} | MEMBERS
    assert body["scope_id"] == scope["scope_id"]
    assert (body["attempt_number"], body["attempts_remaining"]) == (1, 2)
    assert (body["scope_status"], body["cost_used_usd"]) == ("active", 0.1)
    assert body["executed_at"][:2] == "20"
    assert answer.header("ETag") is None
    assert answer.header("Content-Length") == str(len(answer.body))


async def test_what_the_backend_says_itself_stays(house: House, backend: Backend) -> None:
    backend.script = replies(b'{"scope_status": "mine", "attempt_number": null}', headers=[JSON])
    body = (await house.execute(await house.issue())).json()
    assert (body["scope_status"], body["attempt_number"]) == ("mine", None)
    assert set(body) == MEMBERS


async def test_an_empty_object_is_an_object(house: House, backend: Backend) -> None:
    backend.script = replies(b" { } ", headers=[("Content-Type", "application/json; charset=utf-8")])
    assert set((await house.execute(await house.issue())).json()) == MEMBERS


async def test_a_complete_answer_stays_as_it_is(house: House, backend: Backend) -> None:
    whole = json.dumps(dict.fromkeys(sorted(MEMBERS), 1)).encode()
    backend.script = replies(whole, headers=[JSON, ("ETag", '"1"')])
    answer = await house.execute(await house.issue())
    assert (answer.body, answer.header("ETag")) == (whole, '"1"')


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (b"[1]", [JSON]),
        (b'"text"', [JSON]),
        (b"{broken", [JSON]),
        (b'{"a": 1, "a": 2}', [JSON]),
        (b"", [JSON]),
        (b"{}", [("Content-Type", "text/plain")]),
        (b"{}", []),
        (b"{}", [JSON, ("Digest", "sha-256=x")]),
        (b"{}", [JSON, ("Content-Digest", "sha-256=:x:")]),
        (b"{}", [JSON, ("Repr-Digest", "sha-256=:x:")]),
        (b"{}", [JSON, ("Content-MD5", "x")]),
        (b"{}", [JSON, ("Signature", "sig1=:x:")]),
        (b"{}", [JSON, ("Signature-Input", "sig1=()")]),
        (b"{}", [JSON, ("Content-Encoding", "gzip")]),
    ],
)
async def test_all_else_is_left_as_it_is(
    house: House, backend: Backend, body: bytes, headers: list[tuple[str, str]]
) -> None:
    backend.script = replies(body, headers=[*headers, ("ETag", '"1"')])
    answer = await house.execute(await house.issue())
    assert (answer.body, answer.header("ETag")) == (body, '"1"')
    assert answer.header("Scopegate-Scope-Status") == "exhausted"


async def test_an_error_answer_is_annotated_with_its_status(house: House, backend: Backend) -> None:
    backend.script = replies(b'{"no": 1}', status="500 Oh", headers=[JSON])
    answer = await house.execute(await house.issue())
    assert (answer.status, set(answer.json())) == (500, {"no"} | MEMBERS)


async def test_the_backend_is_asked_for_identity(house: House, backend: Backend) -> None:
    await house.execute(await house.issue(), headers=[("Accept-Encoding", "gzip"), ("accept-encoding", "br")])
    assert backend.seen[0].headers("Accept-Encoding") == ["identity"]
    await house.data("GET", EXECUTE, [("Accept-Encoding", "gzip")])
    assert backend.seen[1].headers("Accept-Encoding") == ["gzip"]


async def test_a_long_answer_is_left_as_it_is(open_house: Open, backend: Backend) -> None:
    house = await open_house(gate={"annotate_response": True, "max_answer_bytes": 100})
    body = b'{"long": "%b"}' % (b"x" * 200)
    backend.script = replies(body, headers=[JSON])
    assert (await house.execute(await house.issue())).body == body


async def test_without_the_setting_nothing_is_added(open_house: Open, backend: Backend) -> None:
    house = await open_house()
    answer = await house.execute(await house.issue(), headers=[("Accept-Encoding", "gzip")])
    assert answer.body == b'{"done": true}'
    assert backend.seen[0].header("Accept-Encoding") == "gzip"
