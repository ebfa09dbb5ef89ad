"""What a reader cannot see says nothing."""

from __future__ import annotations

import unicodedata
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.core.wording import visible_chars

# Default_Ignorable_Code_Point of Unicode 15 (DerivedCoreProperties.txt).
IGNORABLE = [
    *(0xAD, 0x34F, 0x61C, 0x115F, 0x1160, 0x17B4, 0x17B5, *range(0x180B, 0x1810), *range(0x200B, 0x2010)),
    *(*range(0x202A, 0x202F), *range(0x2060, 0x2070), 0x3164, *range(0xFE00, 0xFE10), 0xFEFF, 0xFFA0),
    *(*range(0xFFF0, 0xFFF9), *range(0x1BCA0, 0x1BCA4), *range(0x1D173, 0x1D17B), *range(0xE0000, 0xE1000)),
]
SPACES = [0x20, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x202F, 0x205F, 0x3000]
UNSEEN = [
    *IGNORABLE,
    *range(0x20),
    *range(0x7F, 0xA0),
    *range(0x300, 0x370),
    *(0x2028, 0x2029, 0x2800, 0x1D159, 0xE000, 0xF8FF, 0xF0000, 0x10FFFD, 0xFFFF, 0x378, 0xD800, 0xDFFF),
]
unseen = st.sampled_from([chr(each) for each in UNSEEN])
spaces = st.sampled_from([chr(each) for each in SPACES])
seen = st.sampled_from("aZ0-.éß中あ한नТ€🚑ा")


def test_not_one_unseen_character_counts() -> None:
    assert [hex(each) for each in chain(UNSEEN, SPACES) if visible_chars(chr(each) * 20)] == []


def test_every_letter_digit_sign_and_symbol_counts_except_the_empty_ones() -> None:
    found = {
        char
        for char in map(chr, range(0x110000))
        if unicodedata.category(char)[0] in "LNPS" and visible_chars(char) == 0
    }
    assert found == {*"\u115f\u1160\u3164\uffa0\u2800\U0001d159"}


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        (" ", 0),
        ("abc", 3),
        ("  a b  ", 3),
        ("a\tb\nc", 3),
        ("\n a \n", 1),
        ("\u200b" * 20, 0),
        ("\u200b          \u200b", 0),
        ("a          \u200b", 1),
        ("\u200b          a", 1),
        ("a \u200b b", 4),
        ("a\u3000\u00a0b", 4),
        ("e\u0301", 1),
        ("é", 1),
        ("👩\u200d🚒", 2),
        ("\u2800\u2800a\u2800\u2800", 1),
        ("\u202eabc", 3),
    ],
)
def test_spaces_count_between_what_is_seen(text: str, count: int) -> None:
    assert visible_chars(text) == count


@given(st.text(st.characters(max_codepoint=126)))
def test_ascii_needs_no_second_look(text: str) -> None:
    printable = "".join(filter(str.isprintable, text))
    assert visible_chars(printable) == visible_chars(printable + "\n") == len(printable.strip())


@given(st.lists(seen, min_size=1), st.data())
def test_what_is_unseen_changes_no_count_wherever_it_stands(chars: list[str], data: st.DataObject) -> None:
    text = "".join(f"{data.draw(st.text(unseen, max_size=2))}{char}" for char in chars)
    around = data.draw(st.text(unseen | spaces, max_size=5))
    assert visible_chars(around + text + around) == len(chars)
