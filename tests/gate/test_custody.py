"""Custody over real sockets: where a credential is sent, and what becomes of one that is sent back."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sidecar.core.roles import Holders, Roles
from sidecar.upstream import custody
from tests.client import HeaderList, Message, as_json, ask
from tests.support import EXECUTE, POLICIES, House, Open, eventually, replies, sends

SECRET = "Bearer s3cr3t-of-the-backend"
PASS = "/elsewhere"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A changed file counts after a few milliseconds."""
    monkeypatch.setattr(custody, "LOOK_SECONDS", 0.005)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return written(tmp_path / "token")


def written(path: Path, value: str = SECRET) -> Path:
    path.write_text(value + "\n")
    return path


def held(file: Path, *on: str, header: str = "Authorization") -> dict[str, Any]:
    entry = {"header": header, "value_file": str(file), "on": list(on or ("gated",))}
    return {"upstream": {"credentials": [entry]}}


def sent(house: House, header: str = "Authorization") -> list[str]:
    """All values of a header of the last request, in every spelling."""
    message = house.backend.seen[-1]
    return [value for name, value in message.raw_headers if name.lower().replace("_", "-") == header.lower()]


OWN = [("Authorization", "Bearer mine"), ("authorization", "Basic mine")]


async def test_it_is_set_on_what_is_admitted_and_replaces_what_the_client_sent(
    open_house: Open, file: Path
) -> None:
    house = await open_house(**held(file))
    scope = await house.issue(max_attempts=2)
    assert (await house.execute(scope)).status == 200
    assert sent(house) == [SECRET]
    assert (await house.execute(scope, headers=[*OWN, ("Connection", "authorization")])).status == 200
    assert sent(house) == [SECRET]
    # A request that passes keeps its own.
    assert (await house.data("GET", PASS, OWN)).status == 200
    assert sent(house) == ["Bearer mine", "Basic mine"]
    # Nothing is sent with a refusal.
    before = len(house.backend.seen)
    assert (await house.execute(None)).status == 400
    assert len(house.backend.seen) == before


async def test_a_careless_spelling_of_the_name_is_dropped_too(open_house: Open, file: Path) -> None:
    house = await open_house(**held(file, header="X-Backend-Key"))
    scope = await house.issue()
    answer = await house.execute(scope, headers=[("X_Backend_Key", "mine"), ("x-backend_key", "mine")])
    assert answer.status == 200
    assert sent(house, "X-Backend-Key") == [SECRET]


async def test_it_is_set_on_what_passes_only_where_that_is_listed(open_house: Open, file: Path) -> None:
    house = await open_house(**held(file, "pass"))
    assert (await house.data("GET", PASS, OWN)).status == 200
    assert sent(house) == [SECRET]
    scope = await house.issue()
    assert (await house.execute(scope, headers=OWN)).status == 200
    assert sent(house) == ["Bearer mine", "Basic mine"]


async def test_it_goes_with_a_websocket_that_passes(open_house: Open, file: Path) -> None:
    house = await open_house(**held(file, "pass"))
    await house.data("GET", PASS, [("Connection", "Upgrade"), ("Upgrade", "websocket"), *OWN])
    assert sent(house) == [SECRET]


@pytest.mark.parametrize("body", [b'{"incident_id": "inc_1", "action": "retry_agent"}', b"{"])
async def test_it_goes_with_an_admission_in_shadow_mode_even_of_an_unread_request(
    open_house: Open, file: Path, body: bytes
) -> None:
    house = await open_house(gate={"routes": [{"path": EXECUTE, "mode": "shadow"}]}, **held(file))
    kind = ("Content-Type", "application/json")
    assert (await house.data("POST", EXECUTE, [kind, *OWN], body)).status == 200
    assert sent(house) == [SECRET]


@pytest.mark.parametrize(
    ("method", "target", "headers"),
    [
        ("POST", f"{EXECUTE};/../../../../admin/delete-all", ()),
        ("POST", f"{EXECUTE}%3f/../../../../admin/delete-all", ()),
        ("POST", EXECUTE, (("X-Rewrite-URL", "/admin/delete-all"),)),
        ("GET", EXECUTE, (("X-HTTP-Method-Override", "DELETE"),)),
        ("DELETE", EXECUTE, ()),
    ],
)
async def test_it_does_not_go_with_a_request_of_a_shadow_route_that_may_reach_another_path(
    open_house: Open, file: Path, method: str, target: str, headers: HeaderList
) -> None:
    house = await open_house(gate={"routes": [{"path": EXECUTE, "mode": "shadow"}]}, **held(file))
    kind, body = as_json({"incident_id": "inc_1", "action": "retry_agent"})
    sent_along = [*kind, *headers, ("Authorization", "Bearer mine")]
    assert (await house.data(method, target, sent_along, body)).status == 200
    assert sent(house) == ["Bearer mine"]


@pytest.mark.parametrize("body", [b'{"incident_id": "inc_1", "action": "retry_agent"}', b"{"])
async def test_it_does_not_go_with_a_request_of_a_shadow_route_whose_caller_may_not_execute(
    open_house: Open, file: Path, body: bytes
) -> None:
    house = await open_house(
        policies=replace(POLICIES, roles=Roles({"executor": Holders(groups=("runners",))})),
        auth={"proxy": {"header": "X-User", "groups_header": "X-Groups", "trusted": ["127.0.0.1"]}},
        gate={"routes": [{"path": EXECUTE, "mode": "shadow"}]},
        **held(file),
    )
    own = [("Content-Type", "application/json"), ("Authorization", "Bearer mine")]
    for group, value in (("lookers", "Bearer mine"), ("runners", SECRET)):
        named = [("X-User", "anna"), ("X-Groups", group)]
        assert (await house.data("POST", EXECUTE, [*own, *named], body)).status == 200
        assert sent(house) == [value]
    assert (await house.data("POST", EXECUTE, own, body)).status == 200
    assert sent(house) == ["Bearer mine"]


async def lose(house: House, file: Path) -> None:
    os.unlink(file)
    await eventually(lambda: house.sidecar.custody.trouble is not None)


async def test_without_its_file_nothing_is_consumed_and_the_refusal_is_recorded(
    open_house: Open, file: Path
) -> None:
    house = await open_house(**held(file))
    scope = await house.issue()
    await lose(house, file)
    refused = await house.execute(scope)
    assert refused.status == 503
    assert (refused.json()["error"], refused.json()["header"]) == ("credential_unavailable", "Authorization")
    assert refused.header("Retry-After")
    record = (await house.admin("GET", f"/api/v1/decisions/{refused.json()['decision_id']}")).json()
    assert (record["event"], record["decision_reason"], record["decision_outcome"]) == (
        "refused",
        "credential_unavailable",
        "policy_unavailable",
    )
    assert house.backend.seen == []
    ready = await ask(house.sidecar.ops_address, "GET", "/health/ready")
    assert ready.status == 503
    assert ready.json()["checks"]["credentials"]["reason"].startswith(
        "the file of the credential Authorization"
    )
    assert 'scopegate_ready{check="credentials"} 0.0' in await house.metrics()
    # What passes does not need it here.
    assert (await house.data("GET", PASS)).status == 200
    explained = await house.admin("POST", "/api/v1/explain", {"scope_id": scope["scope_id"]})
    assert explained.json()["error"] == "credential_unavailable"
    written(file)
    await eventually(lambda: house.sidecar.custody.trouble is None)
    assert (await house.execute(scope)).status == 200
    assert (await ask(house.sidecar.ops_address, "GET", "/health/ready")).status == 200


async def test_without_its_file_nothing_passes_where_it_is_listed(open_house: Open, file: Path) -> None:
    house = await open_house(**held(file, "pass"))
    await lose(house, file)
    refused = await house.data("GET", PASS)
    assert (refused.status, refused.json()["error"]) == (503, "credential_unavailable")
    assert refused.header("Retry-After")
    assert house.backend.seen == []
    assert (await house.execute(await house.issue())).status == 200


async def test_without_its_file_an_unread_request_of_a_shadow_route_is_refused(
    open_house: Open, file: Path
) -> None:
    house = await open_house(gate={"routes": [{"path": EXECUTE, "mode": "shadow"}]}, **held(file))
    await lose(house, file)
    refused = await house.data("POST", EXECUTE, [("Content-Type", "application/json")], b"{")
    assert (refused.status, refused.json()["error"]) == (503, "credential_unavailable")
    assert house.backend.seen == []


# Echoes ------------------------------------------------------------------------------------------------

KEY = [("Idempotency-Key", "a-key-of-one-action")]


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (b'{"seen": "Bearer s3cr3t-of-the-backend"}', ()),
        (b"{}", (("X-Seen", "s3cr3t-of-the-backend"),)),
    ],
)
async def test_an_answer_that_repeats_it_passes_on_is_counted_and_keeps_its_status_only(
    open_house: Open, file: Path, body: bytes, headers: Any
) -> None:
    house = await open_house(**held(file))
    house.backend.script = replies(body, headers=[("Content-Type", "application/json"), *headers])
    scope = await house.issue()
    first = await house.execute(scope, headers=KEY)
    assert (first.status, first.body) == (200, body)
    assert "scopegate_credential_echoes_total 1.0" in await house.metrics()
    again = await house.execute(scope, headers=KEY)
    assert (again.status, again.header("Idempotency-Replayed")) == (200, "true")
    assert again.json() == {"status": 200, "decision_id": first.header("Scopegate-Decision-Id")}
    assert again.header("X-Seen") is None
    assert len(house.backend.seen) == 1
    stored = b"".join(each.read_bytes() for each in house.database.parent.glob("gate.db*"))
    assert b"s3cr3t" not in stored


async def test_a_long_answer_that_repeats_it_is_counted(open_house: Open, file: Path) -> None:
    house = await open_house(gate={"max_answer_bytes": 1024}, **held(file, "gated", "pass"))
    house.backend.script = replies(b"x" * 100_000 + b"s3cr3t-of-the-backend" + b"x" * 100_000)
    assert (await house.execute(await house.issue())).status == 200
    await eventually(lambda: house.sidecar.gate.in_flight == 0)
    assert "scopegate_credential_echoes_total 1.0" in await house.metrics()
    assert (await house.data("GET", PASS)).status == 200
    assert "scopegate_credential_echoes_total 2.0" in await house.metrics()


async def test_a_long_answer_that_repeats_it_and_breaks_off_is_counted(open_house: Open, file: Path) -> None:
    house = await open_house(gate={"max_answer_bytes": 1024}, **held(file))
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 200000\r\n\r\n"
    house.backend.script = sends(head + SECRET.encode() + b"x" * 100_000, then="close")
    await house.execute(await house.issue())
    await eventually(lambda: house.sidecar.gate.in_flight == 0)
    assert "scopegate_credential_echoes_total 1.0" in await house.metrics()


async def test_an_answer_without_it_is_not_counted_and_is_kept(open_house: Open, file: Path) -> None:
    house = await open_house(**held(file, "gated", "pass"))
    scope = await house.issue()
    first = await house.execute(scope, headers=KEY)
    again = await house.execute(scope, headers=KEY)
    assert first.body == again.body
    assert (await house.data("GET", PASS)).status == 200
    assert "scopegate_credential_echoes_total 0.0" in await house.metrics()


# Rotation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["renamed", "rewritten", "linked"])
async def test_a_rotation_under_load_loses_no_request(
    open_house: Open, file: Path, tmp_path: Path, how: str
) -> None:
    """The backend takes the value before as well, as it must while sidecars read the new one."""
    house = await open_house(gate={"scope_required_from": "critical"}, **held(file, "gated", "pass"))
    valid = {SECRET}
    wrong: list[str] = []
    answer = house.backend.script

    async def checks(message: Message, writer: asyncio.StreamWriter) -> None:
        if message.header("Authorization") not in valid:
            wrong.append(str(message.header("Authorization")))
        await answer(message, writer)

    house.backend.script = checks
    if how == "linked":
        os.rename(file, tmp_path / "v0")
        os.symlink(tmp_path / "v0", file)

    def write(number: int, value: str) -> None:
        if how == "rewritten":
            file.write_text("")
            file.write_text(value)
            return
        fresh = tmp_path / f"v{number}"
        fresh.write_text(value)
        if how == "linked":
            (tmp_path / "next").symlink_to(fresh)
            fresh = tmp_path / "next"
        fresh.replace(file)

    over = False
    statuses: list[int] = []

    async def load(number: int) -> None:
        while not over:
            answers = (await house.execute(None), await house.data("GET", PASS))
            statuses.extend(each.status for each in answers)

    running = [asyncio.create_task(load(number)) for number in range(8)]
    for number in range(1, 6):
        value = f"Bearer s3cr3t-number-{number}"
        valid.add(value)
        write(number, value)

        def arrived(value: str = value) -> bool:
            return any(each.header("Authorization") == value for each in house.backend.seen[-50:])

        await eventually(arrived)
    over = True
    await asyncio.gather(*running)
    assert set(statuses) == {200}
    assert wrong == []


@pytest.mark.parametrize("rest", [b"", b" " * 5_000])
async def test_an_answer_that_repeats_the_value_it_was_asked_with_is_not_kept_although_that_has_changed(
    open_house: Open, file: Path, rest: bytes
) -> None:
    house = await open_house(gate={"max_answer_bytes": 1_024}, **held(file))

    async def rotated(request: Message, writer: asyncio.StreamWriter) -> None:
        seen = request.header("Authorization")
        assert seen == SECRET
        for number in range(custody.MOST_PAST + 1):
            value = f"Bearer the-value-number-{number}"
            written(file, value)
            await eventually(lambda value=value: held_now(house) == value)
        await replies(f'{{"seen": "{seen}"}}'.encode() + rest)(request, writer)

    house.backend.script = rotated
    scope = await house.issue(max_attempts=2)
    assert SECRET.encode() in (await house.execute(scope, headers=KEY)).body
    again = await house.execute(scope, headers=KEY)
    assert again.header("Idempotency-Replayed") == "true"
    assert set(again.json()) == {"status", "decision_id"}
    assert "scopegate_credential_echoes_total 1.0" in await house.metrics()


def held_now(house: House) -> str:
    """The value that the next request is sent with."""
    assert house.sidecar.custody.gated is not None
    ((_, value),) = house.sidecar.custody.gated.put([])
    return value.decode()


async def test_a_websocket_whose_head_repeats_it_is_counted(open_house: Open, file: Path) -> None:
    house = await open_house(**held(file, "pass"))
    upgrade = "Upgrade: websocket\r\nConnection: Upgrade\r\n"
    head = f"HTTP/1.1 101 Switching Protocols\r\n{upgrade}X-Seen: {SECRET}\r\n\r\n"
    house.backend.script = sends(head.encode(), then="close")
    answer = await house.data("GET", PASS, [("Connection", "Upgrade"), ("Upgrade", "websocket")])
    assert (answer.status, answer.header("X-Seen")) == (101, SECRET)

    async def counted() -> bool:
        return "scopegate_credential_echoes_total 1.0" in await house.metrics()

    await eventually(counted)
