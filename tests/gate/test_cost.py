"""The cost of an execution: where it is read, which values are unreadable, and how it is rounded."""

from __future__ import annotations

import pytest

from tests.support import Backend, House, Open, replies

JSON = ("Content-Type", "application/json")
COST = "X-Recovery-Cost-USD"


async def cost_of(house: House, *headers: tuple[str, str], body: bytes = b"{}") -> tuple[float, bool]:
    """The cost that one execution with a hold of 0.1 is settled with, and whether it was reported."""
    house.backend.script = replies(body, headers=[JSON, *headers])
    answer = await house.execute(await house.issue(action="failover", max_cost_usd=100))
    assert answer.status == 200
    assert answer.header("Scopegate-Decision-Id")
    (record, *_) = await house.records("&event=settled")
    assert record["details"]["admission_id"] == answer.header("Scopegate-Decision-Id")
    return record["details"]["cost_usd"], record["details"]["cost_reported"]


@pytest.mark.parametrize(
    ("text", "dollars"),
    [
        ("0.05", 0.05),
        ("0", 0),
        ("0e20", 0),
        ("0E999", 0),
        ("0.00e9", 0),
        ("0.000001", 0.000001),
        ("0.0000001", 0.000001),
        ("0.0500001", 0.050001),
        ("5e-2", 0.05),
        ("1E-30", 0.000001),
        ("7", 7),
        (" 0.25 ", 0.25),
        ("0.100001", 0.100001),
    ],
)
async def test_a_reported_cost_counts_and_fractions_of_a_micro_dollar_round_up(
    house: House, text: str, dollars: float
) -> None:
    assert await cost_of(house, (COST, text)) == (dollars, True)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "NaN",
        "nan",
        "-1",
        "-0.000001",
        "1e999",
        "Infinity",
        "-inf",
        "abc",
        "$1",
        "1,5",
        "0x1",
        "1_0",
        "0.1 0.2",
        "true",
        "sNaN",
    ],
)
async def test_an_unreadable_cost_is_the_hold(house: House, text: str) -> None:
    assert await cost_of(house, (COST, text)) == (0.1, False)


async def test_an_absent_cost_is_the_hold(house: House) -> None:
    assert await cost_of(house) == (0.1, False)


async def test_two_costs_are_unreadable(house: House) -> None:
    assert await cost_of(house, (COST, "0.01"), (COST.lower(), "0.02")) == (0.1, False)


async def test_a_cost_beyond_every_measure_is_never_taken_for_the_hold(
    house: House, backend: Backend
) -> None:
    """G3: a reported cost above the hold exhausts the scope, however large it is."""
    backend.script = replies(headers=[(COST, "5000000000")])
    scope = await house.issue(action="failover", max_cost_usd=100, max_attempts=5)
    assert (await house.execute(scope)).header("Scopegate-Scope-Status") == "exhausted"


async def test_the_header_reaches_the_client_as_it_came(house: House, backend: Backend) -> None:
    backend.script = replies(headers=[(COST, "0.030")])
    answer = await house.execute(await house.issue())
    assert answer.header(COST) == "0.030"


ROUTE = {"path": "**/recovery/execute"}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"usage": {"usd": 0.05}}', (0.05, True)),
        (b'{"usage": {"usd": "0.05"}}', (0.05, True)),
        (b'{"usage": {"usd": 1}}', (1, True)),
        (b'{"usage": {"usd": 0e20}}', (0, True)),
        (b'{"usage": {"usd": -0e400}}', (0, True)),
        (b'{"usage": {"usd": "0e20"}}', (0, True)),
        (b'{"usage": {"usd": 0.0000001}}', (0.000001, True)),
        (b'{"usage": {"usd": -1}}', (0.1, False)),
        (b'{"usage": {"usd": true}}', (0.1, False)),
        (b'{"usage": {"usd": null}}', (0.1, False)),
        (b'{"usage": {"usd": [1]}}', (0.1, False)),
        (b'{"usage": {"usd": 1e999}}', (0.1, False)),
        (b'{"usage": {"usd": NaN}}', (0.1, False)),
        (b'{"usage": {"usd": 0.01, "usd": 0.02}}', (0.1, False)),
        (b'{"usage": 1}', (0.1, False)),
        (b'{"other": 1}', (0.1, False)),
        (b"[1]", (0.1, False)),
        (b"", (0.1, False)),
        (b"not json", (0.1, False)),
    ],
)
async def test_a_route_may_name_a_json_pointer(
    open_house: Open, body: bytes, expected: tuple[float, bool]
) -> None:
    house = await open_house(gate={"routes": [{**ROUTE, "cost": "/usage/usd"}]})
    assert await cost_of(house, (COST, "0.09"), body=body) == expected


@pytest.mark.parametrize(
    ("pointer", "body", "expected"),
    [
        ("/usage/0/cost", b'{"usage": [{"cost": 0.05}, {"cost": 0.06}]}', (0.05, True)),
        ("/usage/1/cost", b'{"usage": [{"cost": 0.05}, {"cost": 0.06}]}', (0.06, True)),
        ("/usage/0/cost", b'{"usage": {"0": {"cost": 0.05}}}', (0.05, True)),
        ("/0/cost", b'[{"cost": 0.05}]', (0.05, True)),
        ("/0/0", b'[["0.05"]]', (0.05, True)),
        ("/a~1b/0/m~0n", b'{"a/b": [{"m~n": 0.05}]}', (0.05, True)),
        ("/usage/2/cost", b'{"usage": [{"cost": 0.05}, {"cost": 0.06}]}', (0.1, False)),
        ("/usage/00/cost", b'{"usage": [{"cost": 0.05}]}', (0.1, False)),
        ("/usage/-/cost", b'{"usage": [{"cost": 0.05}]}', (0.1, False)),
        ("/usage/-1/cost", b'{"usage": [{"cost": 0.05}]}', (0.1, False)),
        ("/usage/cost", b'{"usage": [{"cost": 0.05}]}', (0.1, False)),
        ("/0", b'"0.05"', (0.1, False)),
        ("/0", b"0.05", (0.1, False)),
    ],
)
async def test_a_pointer_to_the_cost_leads_through_lists(
    open_house: Open, pointer: str, body: bytes, expected: tuple[float, bool]
) -> None:
    house = await open_house(gate={"routes": [{**ROUTE, "cost": pointer}]})
    assert await cost_of(house, (COST, "0.09"), body=body) == expected


async def test_a_route_may_name_another_header(open_house: Open) -> None:
    house = await open_house(gate={"routes": [{**ROUTE, "cost": "header:X-Spent"}]})
    assert await cost_of(house, (COST, "0.09"), ("x-spent", "0.07")) == (0.07, True)


async def test_a_long_answer_has_no_cost_in_its_body(open_house: Open) -> None:
    house = await open_house(gate={"routes": [{**ROUTE, "cost": "/usd"}], "max_answer_bytes": 10})
    house.backend.script = replies(b'{"usd": 0.01, "more": "than ten bytes"}')
    answer = await house.execute(await house.issue(action="failover"))
    ended = await house.ended(answer.header("Scopegate-Decision-Id") or "")
    assert (ended["status"], ended["cost_usd"]) == ("answered", 0.1)
