"""Strict forms: what two parsers decode differently is refused, and everything else is read as it is."""

from __future__ import annotations

from urllib.parse import parse_qsl, urlencode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.core.form import MAX_FIELDS, NotForm, parse
from tests.lenientforms import BACKENDS

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(st.lists(st.tuples(texts, texts), max_size=8))
def test_what_a_program_encodes_is_read_as_it_was(pairs: list[tuple[str, str]]) -> None:
    # `method` with a punctuation mark before it is the field that replaces the method.
    pairs = [(name, value) for name, value in pairs if "method" not in (name + value).lower()]
    assert parse(urlencode(pairs).encode()) == pairs


@given(st.binary(max_size=60) | st.text("ab=&+%;[]. 2fF\u00fc", max_size=30).map(str.encode))
def test_a_strict_form_has_the_pairs_that_other_parsers_find(body: bytes) -> None:
    try:
        pairs = parse(body)
    except NotForm:
        return
    assert pairs == parse_qsl(body.decode(), keep_blank_values=True)
    if body.isascii():  # Django requires that everything else is escaped
        assert dict(pairs) == BACKENDS["Django"](body, b"")


@pytest.mark.parametrize(
    ("body", "pairs"),
    [
        (b"", []),
        (b"a=1&b=2", [("a", "1"), ("b", "2")]),
        (b"a=1&a=2", [("a", "1"), ("a", "2")]),
        (b"a&b=", [("a", ""), ("b", "")]),
        (b"&&a=1&", [("a", "1")]),
        (b"=1", [("", "1")]),
        (b"a=b=c", [("a", "b=c")]),
        (b"a+b=c+d", [("a b", "c d")]),
        (b"a=c d", [("a", "c d")]),
        (b"a=%2B%26%3D%25", [("a", "+&=%")]),
        (b"a=%c3%bc\xc3\xbc", [("a", "\u00fc\u00fc")]),
        (b"a=%00%0A", [("a", "\0\n")]),
        (b"a;b=c;d", [("a;b", "c;d")]),
    ],
)
def test_fields_are_decoded_once(body: bytes, pairs: list[tuple[str, str]]) -> None:
    assert parse(body) == pairs


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b"a=%", "the % at byte 2 does not begin an escape; write it as %25"),
        (b"a=%4", "the % at byte 2"),
        (b"a=%zz", "the % at byte 2"),
        (b"%u0061=1", "the % at byte 0"),
        (b"a=\xff", "it is not UTF-8"),
        (b"a=%ff", "it is not UTF-8"),
        (b"a=%c3", "it is not UTF-8"),
        (b"a=%ed%a0%80", "it is not UTF-8"),
        (b"a=%c0%af", "it is not UTF-8"),
        (b"a=1\n", "the control character at byte 3 is not escaped"),
        (b"a=1\r\nb=2", "the control character at byte 3"),
        (b"a\x00=1", "the control character at byte 1"),
        (b"a=\x7f", "the control character at byte 2"),
        (b" a=1", "a blank at its beginning or end is not escaped; write it as +"),
        (b"a=1 ", "a blank at its beginning or end"),
        (b"_method=DELETE", "a field _method could replace the method that was judged"),
        (b"a=1&_METHOD=x", "a field _method"),
        (b"a=1;_method=x", "a field _method"),
        (b"%5fmethod=x", "a field _method"),
        (b".method=x", "a field _method"),
    ],
)
def test_what_parsers_decode_differently_is_refused(body: bytes, problem: str) -> None:
    with pytest.raises(NotForm, match=problem.replace("+", r"\+")):
        parse(body)


def test_the_number_of_fields_is_bounded_because_some_parsers_drop_the_rest() -> None:
    most = b"&".join([b"a=1"] * MAX_FIELDS)
    assert len(parse(most)) == MAX_FIELDS
    with pytest.raises(NotForm, match="more than 1000 fields"):
        parse(most + b"&a=1")


def test_a_name_that_only_resembles_the_method_is_left_alone() -> None:
    assert parse(b"method=x&_methods=y&x_method=z")
