"""JSON that can be read in one way only."""

from __future__ import annotations

import json
import math
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.files.strictjson import NotJson, parse, parse_value

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**30), 10**30),
    st.text(st.characters(exclude_categories=["Cs"])),
)
documents = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.recursive(
        scalars,
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=4)
        ),
        max_leaves=20,
    ),
    max_size=6,
)


@given(documents, st.booleans(), st.sampled_from([None, 2]))
def test_what_json_writes_reads_as_the_same(
    document: dict[str, Any], ascii_only: bool, indent: int | None
) -> None:
    text = json.dumps(document, ensure_ascii=ascii_only, indent=indent)
    assert parse(text.encode()) == document


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_keeps_its_digits(number: float) -> None:
    text = repr(number)
    assert parse(b'{"n": %b}' % text.encode())["n"] == Decimal(text)


@given(st.decimals(allow_nan=False, allow_infinity=False))
def test_no_number_is_accepted_that_others_read_as_infinite_or_as_zero(number: Decimal) -> None:
    try:
        value = parse(b'{"n": %b}' % str(number).lower().encode())["n"]
    except NotJson:
        return
    assert math.isfinite(float(value))
    assert bool(float(value)) == bool(value)


@pytest.mark.parametrize("text", ["1.8e308", "-1.9e308", "9.99e308", "179769313486231590e291"])
def test_the_smallest_numbers_that_others_read_as_infinite_are_refused(text: str) -> None:
    assert math.isinf(float(text))
    with pytest.raises(NotJson):
        parse(b'{"n": %b}' % text.encode())


@pytest.mark.parametrize("text", ["2e-324", "-2.4e-324", "0.02e-322", "1e-400"])
def test_the_largest_numbers_that_others_read_as_zero_are_refused(text: str) -> None:
    assert float(text) == 0
    with pytest.raises(NotJson):
        parse(b'{"n": %b}' % text.encode())


@given(st.binary(max_size=60))
def test_no_bytes_break_it(text: bytes) -> None:
    try:
        found = parse(text)
    except NotJson:
        return
    assert found == json.loads(text)


@given(documents, st.text(max_size=3), st.text(max_size=3))
def test_nothing_may_stand_around_it(document: dict[str, Any], before: str, after: str) -> None:
    body = json.dumps(document)
    text = (before + body + after).encode("utf-8", "surrogatepass")
    if (before + after).strip(" \t\r\n"):
        with pytest.raises(NotJson):
            parse(text)
    else:
        assert parse(text) == document


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), st.integers(0, 3))
def test_a_key_stands_once_however_it_is_escaped_and_however_deep(key: str, depth: int) -> None:
    escaped = "".join(f"\\u{unit:04x}" for unit in units(key))
    inner = f'{{{json.dumps(key)}: 1, "{escaped}": 1}}'
    for _ in range(depth):
        inner = f'{{"x": [{inner}]}}'
    with pytest.raises(NotJson, match="uplicate"):
        parse(inner.encode())


def units(text: str) -> list[int]:
    raw = text.encode("utf-16-be")
    return [int.from_bytes(raw[place : place + 2], "big") for place in range(0, len(raw), 2)]


@pytest.mark.parametrize(("depth", "fits"), [(150, True), (100_000, False)])
def test_depth_is_bounded(depth: int, fits: bool) -> None:
    text = b'{"d": ' + b"[" * depth + b"]" * depth + b"}"
    if fits:
        parse(text)
    else:
        with pytest.raises(NotJson):
            parse(text)


@pytest.mark.parametrize(("digits", "fits"), [(64, True), (65, False), (4000, False), (100_000, False)])
@pytest.mark.parametrize("form", ["{}", "-{}", "{}.5", "0.{}"])
def test_the_length_of_a_number_is_bounded(digits: int, fits: bool, form: str) -> None:
    text = form.format("7" * (digits - ("5" in form))).encode()
    if fits:
        parse(b'{"n": [%b]}' % text)
    else:
        with pytest.raises(NotJson):
            parse(b'{"n": [%b]}' % text)


@pytest.mark.parametrize(
    "text", [b"\xef\xbb\xbf{}", '{"a":1}'.encode("utf-16"), b"{}\x00", b"[]", b'"x"', b"1", b""]
)
def test_it_is_one_object_in_utf8_without_a_mark(text: bytes) -> None:
    with pytest.raises(NotJson):
        parse(text)


@pytest.mark.parametrize(("text", "value"), [(b"[1, 2]", [1, 2]), (b'"a"', "a"), (b"1.5", Decimal("1.5"))])
def test_a_value_need_not_be_an_object_but_a_body_must_be(text: bytes, value: object) -> None:
    assert parse_value(text) == value
    with pytest.raises(NotJson, match="one JSON object"):
        parse(text)


@pytest.mark.parametrize("text", [b"1e999", b"[1e999]", b"9" * 65, b"[NaN]", b'[{"a": 1, "a": 2}]', b"[1] 2"])
def test_a_value_is_read_as_strictly_as_an_object(text: bytes) -> None:
    with pytest.raises(NotJson):
        parse_value(text)
