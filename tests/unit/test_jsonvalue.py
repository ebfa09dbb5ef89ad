"""Whatever a program puts into a record becomes JSON, as a copy, and never an exception."""

from __future__ import annotations

import json
import uuid
from collections import OrderedDict, UserDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from enum import Enum, IntEnum
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import Any, NoReturn

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.files.jsonvalue import (
    CYCLE,
    MAX_DEPTH,
    MAX_SIZE,
    TOO_DEEP,
    TOO_LARGE,
    UNREADABLE,
    as_text,
    dumps,
    plain,
)

DECISION = uuid.UUID("0192a3b4-0000-7000-8000-000000000001")


class Color(Enum):
    RED = "red"


class Level(IntEnum):
    HIGH = 3


class Path(Enum):
    HOME = PurePosixPath("/home")


class Name(str):
    def __str__(self) -> str:
        raise RuntimeError("no text")

    def encode(self, *_: object) -> NoReturn:
        raise RuntimeError("no bytes")


@dataclass
class Agent:
    name: str
    tags: set[str] = field(default_factory=set)
    boss: Agent | None = None


class Silent:
    def __str__(self) -> str:
        raise RuntimeError("no words")


class Shapeless:
    def __getattribute__(self, name: str) -> NoReturn:  # isinstance asks for __class__
        raise RuntimeError("no class")


class Unlisted(list[int]):
    def __iter__(self) -> NoReturn:
        raise RuntimeError("no members")


class Broken(UserDict[str, int]):
    def items(self) -> NoReturn:
        raise RuntimeError("no members")


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        *[(each, each) for each in (None, True, False, 0, -1, 1.5, "", "text", "é")],
        ([], []),
        ({}, {}),
        (datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC), "2026-01-02T03:04:05.000006+00:00"),
        (datetime(2026, 1, 2, tzinfo=timezone(timedelta(hours=1))), "2026-01-02T00:00:00+01:00"),
        (date(2026, 1, 2), "2026-01-02"),
        (timedelta(seconds=90), "0:01:30"),
        (Color.RED, "red"),
        (Level.HIGH, 3),
        (Path.HOME, "/home"),
        (DECISION, str(DECISION)),
        (Decimal("0.10"), "0.10"),
        (b"caf\xc3\xa9 \xff", "café \\xff"),
        (bytearray(b"a"), "a"),
        (memoryview(b"a"), "a"),
        ({"b", "a"}, ["a", "b"]),
        (frozenset({2, 10}), [10, 2]),  # in the order of their text
        ((1, (2,)), [1, [2]]),
        (deque([1]), [1]),
        (OrderedDict(a=1), {"a": 1}),
        (MappingProxyType({"a": {1}}), {"a": [1]}),
        (UserDict({"a": 1}), {"a": 1}),
        (
            Agent("a", {"x"}, Agent("b")),
            {"name": "a", "tags": ["x"], "boss": {"name": "b", "tags": [], "boss": None}},
        ),
        (Agent, str(Agent)),
        (2**64 - 1, 2**64 - 1),
        (2**64, "18446744073709551616"),
        (-(2**63), -(2**63)),
        (-(2**63) - 1, "-9223372036854775809"),
        (float("nan"), "NaN"),
        (float("inf"), "Infinity"),
        (float("-inf"), "-Infinity"),
        ("a\ud800b", "a\\ud800b"),
        (Name("agent"), "agent"),
        (ValueError("a cause"), "a cause"),
        (PurePosixPath("/a"), "/a"),
        (
            {1: "a", None: "b", False: "c", (1, 2): "d", Color.RED: "e"},
            {"1": "a", "null": "b", "false": "c", "[1, 2]": "d", "red": "e"},
        ),
        ({"\udfff": 1}, {"\\udfff": 1}),
        ({"1": "a", 1: "b", "1 #2": "c"}, {"1": "a", "1 #2": "b", "1 #2 #3": "c"}),
        (Silent(), UNREADABLE),
        (Shapeless(), UNREADABLE),
        (Unlisted([1]), UNREADABLE),
        (Broken(), UNREADABLE),
        ({"good": 1, "bad": Silent()}, {"good": 1, "bad": UNREADABLE}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_value_becomes(value: Any, wanted: Any) -> None:
    copied = plain(value)
    assert copied == wanted
    assert type(copied) is type(wanted)


def test_an_integer_with_more_digits_than_python_writes_is_kept() -> None:
    assert plain(1 << 40_000) == hex(1 << 40_000)


@pytest.mark.parametrize(
    ("value", "wanted"),
    [(None, None), ("run", "run"), (DECISION, str(DECISION)), (7, "7"), (True, "true"), (["a"], '["a"]')],
)
def test_ids_and_reasons_become_text(value: Any, wanted: str | None) -> None:
    assert as_text(value) == wanted


def test_it_is_a_copy() -> None:
    given: dict[str, Any] = {"agents": ["a"], "by": {"name": "x"}}
    copied = plain(given)
    given["agents"].append("b")
    given["by"]["name"] = "y"
    assert copied == {"agents": ["a"], "by": {"name": "x"}}


# What has no end -----------------------------------------------------------------------------------------


def test_what_contains_itself_is_cut_off_there() -> None:
    loop: dict[str, Any] = {"name": "a"}
    loop["me"] = [loop]
    assert plain(loop) == {"name": "a", "me": [CYCLE]}
    agent = Agent("a")
    agent.boss = agent
    assert plain(agent) == {"name": "a", "tags": [], "boss": CYCLE}


def test_what_only_occurs_twice_is_copied_twice() -> None:
    shared = ["a"]
    assert plain([shared, shared]) == [["a"], ["a"]]


def nested(levels: int) -> list[Any]:
    value: list[Any] = ["end"]
    for _ in range(levels - 1):
        value = [value]
    return value


def test_64_levels_are_kept_and_the_65th_is_cut_off() -> None:
    assert MAX_DEPTH == 64
    assert plain(nested(64)) == nested(64)
    cut = plain(nested(65))
    assert TOO_DEEP in json.dumps(cut)
    assert "end" not in json.dumps(cut)
    assert TOO_DEEP in json.dumps(plain(nested(5_000)))


def test_lists_that_grow_for_ever_when_copied_are_cut_off_and_then_too_large_for_a_record() -> None:
    bomb: Any = "x"
    for _ in range(60):
        bomb = [bomb, bomb]
    copied = json.dumps(plain(bomb))  # a whole copy would have 2^60 items
    assert MAX_SIZE < len(copied) < 20 * MAX_SIZE
    assert TOO_LARGE in copied


@pytest.mark.parametrize(
    "make",
    [
        lambda: ["x" * 1_000] * 100_000,
        lambda: {str(number): 0 for number in range(1_000_000)},
        lambda: {"a": "é\ud800" * 500_000},
    ],
    ids=["a list of long texts", "an object of many members", "one long text"],
)
def test_what_is_larger_than_a_record_stays_so(make: Callable[[], Any]) -> None:
    assert MAX_SIZE < len(orjson.dumps(plain(make()))) < 8 * MAX_SIZE


@pytest.mark.parametrize("value", [[0] * 100_000, {str(n): n for n in range(50_000)}, ["x" * 200] * 4_000])
def test_what_fits_into_a_record_is_not_cut(value: Any) -> None:
    assert len(orjson.dumps(value)) < MAX_SIZE
    assert plain(value) == value


# Anything ------------------------------------------------------------------------------------------------

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.decimals(),
    st.text(alphabet=st.characters()),  # lone surrogates among them
    st.binary(),
    st.datetimes(timezones=st.none() | st.timezones()),
    st.dates(),
    st.times(),
    st.timedeltas(),
    st.uuids(),
    st.complex_numbers(),
    st.sampled_from([Color.RED, Level.HIGH, object, len]),
    st.builds(Silent),
)
KEYS = st.one_of(
    st.text(alphabet=st.characters()), st.integers(), st.none(), st.booleans(), st.binary(), st.dates()
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.lists(inner, max_size=4).map(deque),
        st.sets(KEYS, max_size=4),
        st.dictionaries(KEYS, inner, max_size=4),
        st.builds(Agent, name=inner, boss=inner),
    ),
    max_leaves=30,
)


@given(VALUES)
def test_anything_becomes_json_that_reads_back_as_it_is(value: Any) -> None:
    copied = plain(value)
    assert orjson.loads(orjson.dumps(copied)) == copied


@given(VALUES)
def test_what_is_json_already_does_not_change(value: Any) -> None:
    copied = plain(value)
    assert plain(copied) == copied


@given(st.dictionaries(KEYS, st.integers(0, 9)))
def test_no_member_is_lost_though_keys_become_the_same_text(value: dict[Any, int]) -> None:
    assert sorted(plain(value).values()) == sorted(value.values())


@given(VALUES)
def test_anything_has_a_text(value: Any) -> None:
    text = as_text(value)
    assert (text is None) is (plain(value) is None)
    assert orjson.loads(orjson.dumps(text)) == text


# Bytes ---------------------------------------------------------------------------------------------------


def test_dumps_writes_decimals_as_numbers_and_integers_beyond_64_bits_as_their_digits() -> None:
    assert dumps({"b": Decimal("0.5"), "a": [2**64, (1,)]}) == b'{"b":0.5,"a":["18446744073709551616",[1]]}'
    assert dumps({"b": 1, "a": 2}, sort_keys=True) == b'{"a":2,"b":1}'
    with pytest.raises(TypeError):
        dumps({"a": object()})
