"""YAML is read in one way only: every rule with the text that passes and the text that just fails."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.files import yamlfile as yamlevents
from sidecar.files.faults import ConfigurationError, Fault
from sidecar.files.yamlfile import (
    MAX_BYTES,
    MAX_DEPTH,
    MAX_NUMBER_CHARS,
    Document,
    Undecided,
    contents,
    dotted,
    parse,
    survey,
)


def read(text: str | bytes, **environment: str) -> Any:
    return parse(text, "f.yaml", environment=environment).value


def faults(text: str | bytes, **environment: str) -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        parse(text, "f.yaml", environment=environment)
    return [str(fault) for fault in caught.value.faults]


def fault(text: str | bytes, **environment: str) -> str:
    found = faults(text, **environment)
    assert len(found) == 1, found
    return found[0]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("~", None),
        ("null", None),
        ("true", True),
        ("FALSE", False),
        ("0", 0),
        ("-17", -17),
        ("+5", 5),
        ("0o17", 15),
        ("0x1F", 31),
        ("1e3", 1000.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("-1.5E-3", -0.0015),
        ("0.1", 0.1),
        ("text", "text"),
        ("tRue", "tRue"),
        ("yesterday", "yesterday"),
        ("dead_beef", "dead_beef"),
        ("2026-12-24", "2026-12-24"),
        ("2026-12-24T00:00:00Z", "2026-12-24T00:00:00Z"),
        ("127.0.0.1:8000", "127.0.0.1:8000"),
        ("8000:9000", "8000:9000"),
        ("1.2.3", "1.2.3"),
        ("0.0.0.0", "0.0.0.0"),
    ],
)
def test_a_plain_scalar_is_typed_as_yaml_1_2_types_it(text: str, value: object) -> None:
    found = read(f"key: {text}")["key"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("word", ["yes", "no", "on", "off", "y", "n", "Yes", "NO", "oN", "OFF", "Y", "N"])
def test_a_word_that_is_a_truth_value_to_yaml_1_1_only_is_refused(word: str) -> None:
    assert fault(f"a: 1\nkey: {word}") == (
        f"f.yaml:2:6: key: {word} is a truth value to YAML 1.1 only: write true or false, "
        "or put it in quotes if text is meant"
    )
    assert read(f'key: "{word}"') == {"key": word}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("017", "is octal to YAML 1.1: write it without the zero, or as 0o17"),
        ("08", "is octal to YAML 1.1: write it without the zero, or as 0o17"),
        ("-007.5", "is octal to YAML 1.1: write it without the zero, or as 0o17"),
        ("12:30", "is base 60 to YAML 1.1: write one number"),
        ("1:30:59.5", "is base 60 to YAML 1.1: write one number"),
        ("1_000", "is a number to YAML 1.1 only: write it without the underscores"),
        ("1_000.5", "is a number to YAML 1.1 only: write it without the underscores"),
        ("1.000_5", "is a number to YAML 1.1 only: write it without the underscores"),
        ("0x1_F", "is a number to YAML 1.1 only: write it without the underscores"),
        ("0b101", "is a number to YAML 1.1 only: write it in decimal"),
        ("-0x1F", "is a number to YAML 1.1 only: write it in decimal"),
        (".inf", "is not a finite number: give one that is"),
        ("-.INF", "is not a finite number: give one that is"),
        (".NaN", "is not a finite number: give one that is"),
        ("1e999", "is too large a number: give a smaller one"),
        ("=", "has a meaning of its own to YAML 1.1: write something else"),
        ("<<", "has a meaning of its own to YAML 1.1: write something else"),
    ],
)
def test_a_scalar_that_yaml_versions_read_differently_is_refused(text: str, message: str) -> None:
    assert fault(f"key: {text}") == f"f.yaml:1:6: key: {text} {message}, or put it in quotes if text is meant"
    assert read(f"key: '{text}'") == {"key": text}


def test_a_number_is_bounded_in_length() -> None:
    assert read("key: " + "9" * MAX_NUMBER_CHARS) == {"key": int("9" * MAX_NUMBER_CHARS)}
    assert "is a number of over 64 characters" in fault("key: " + "9" * (MAX_NUMBER_CHARS + 1))


def test_a_key_is_text_even_where_it_reads_like_a_truth_value() -> None:
    assert read("on: issue\nno: 1\n'1': x\n'': z\n") == {"on": "issue", "no": 1, "1": "x", "": "z"}


@pytest.mark.parametrize("key", ["1", "1.5", "true", "null", "~", "017", "12:30", ".inf"])
def test_a_key_that_is_not_text_is_refused(key: str) -> None:
    assert fault(f"a:\n  {key}: x") == (
        f"f.yaml:2:3: a: the key {key} is not text to every reader; put it in quotes"
    )


@pytest.mark.parametrize("key", ["[a, b]", "{a: b}", "? [a]\n"])
def test_a_list_or_map_as_a_key_is_refused(key: str) -> None:
    assert "a list, map or alias cannot be a key; write the key as text" in fault(f"{key}: x\nb: 1")


def test_a_key_that_stands_twice_is_refused_at_its_second_place() -> None:
    assert fault("a:\n  b: 1\n  c: 2\n  'b': 3\n") == (
        "f.yaml:4:3: a.b: is already in line 2; remove one of them"
    )
    assert read("a: {b: 1}\nc: {b: 1}") == {"a": {"b": 1}, "c": {"b": 1}}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: &x 1", "f.yaml:1:4: a: anchors (&) are refused; remove it, write each value out"),
        ("a: !!str 1", "f.yaml:1:4: a: tags (!) are refused; remove it, or put the text in quotes"),
        ("a: ! 1", "f.yaml:1:4: a: tags (!) are refused; remove it, or put the text in quotes"),
        ("a: !x {b: 1}", "f.yaml:1:4: a: tags (!) are refused; remove it, or put the text in quotes"),
        ("a: *x", "f.yaml:1:4: a: aliases (*) are refused; write the value out, or put it in quotes"),
        ("a:\n  <<: {b: 1}", "f.yaml:2:3: a: merge keys (<<) are refused; write the keys out"),
        ("a: 1\n---\nb: 2", "f.yaml:2:1: a second document begins here; keep one per file"),
        ("a:\n\tb: 1", "f.yaml:2:1: a tab stands where YAML allows only spaces; replace it by spaces"),
        ("a: @b", "f.yaml:1:4: text cannot begin with this character; put the text in quotes"),
        ("*: 1", 'f.yaml:1:2: aliases and anchors are refused; put text such as "*" in quotes'),
        (
            "a: 1\nb: 'x\nc: 2\n",
            "f.yaml:2:4: the quoted text that begins here is never closed; add the quote",
        ),
        ('a: "\\q"', "f.yaml:1:6: this is no escape; write \\\\ for a backslash, or use single quotes"),
        ("a: b: c", "f.yaml:1:5: a ': ' cannot stand here; put the text in quotes, or correct the indent"),
        ("a: 1\nb", "f.yaml:2:2: a ':' is missing behind this key; add it, or correct the indentation"),
        ("- a\nb: 1", "f.yaml:2:1: this does not fit the lines above; correct the indentation"),
        (
            "a: [1, 2",
            "f.yaml:1:9: a comma, ] or } is missing before here; inside [] or {}, text with braces such as "
            "{name} or ${...} needs quotes",
        ),
        ("a: [::1]:80", "f.yaml:1:5: a value is missing here; text that begins with a bracket needs quotes"),
        ("{a: 1}}", "f.yaml:1:7: text follows after the end of the document; remove it"),
        ("%YAML 2.0\n---\na: 1", "f.yaml:1:1: directives (%) have no use here; remove the line"),
        ("%TAG ! x:\n---\na: 1", "f.yaml:1:1: directives (%TAG) have no use here; remove the line"),
        (
            'b: 1\na: "\\UFFFFFFFF"',
            "f.yaml:2:2: behind this place stands an escape or a number that YAML does not know",
        ),
        ("a: x\x00", "f.yaml:1:5: U+0000 is refused; remove it, or write an escape"),
        ("a: 1 # \u2028b: 2", "f.yaml:1:8: U+2028 is refused; remove it, or write an escape"),
        (b"a: 1\nb: \xff", "f.yaml:2:4: is not UTF-8 here; save the file as UTF-8"),
        ('a: "\\0"', "f.yaml:1:4: a: escapes to NUL or half of a character; remove the escape"),
        ('a: "\\ud800"', "f.yaml:1:4: a: escapes to NUL or half of a character; remove the escape"),
    ],
)
def test_what_hides_or_breaks_meaning_is_refused_at_its_place(text: str | bytes, expected: str) -> None:
    assert fault(text) == expected


def test_everything_that_can_be_found_is_reported_at_once_and_in_order() -> None:
    found = faults("a: yes\nb: 017\na: 1\nc: &x 2\nd: [no, {e: *x}]\n'open\n")
    assert [line.split(": ")[0] for line in found] == [
        "f.yaml:1:4",
        "f.yaml:2:4",
        "f.yaml:3:1",
        "f.yaml:4:4",
        "f.yaml:5:5",
        "f.yaml:5:13",
        "f.yaml:6:1",
    ]


def test_the_size_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert faults(b"a: 1 #" + b"x" * MAX_BYTES) == [
        "f.yaml:1:1: is larger than 1048576 bytes; split it or make it shorter"
    ]
    monkeypatch.setattr("sidecar.files.yamlfile.MAX_BYTES", 10)
    assert read(b"a: 1 #2345") == {"a": 1}
    assert fault(b"a: 1 #23456") == "f.yaml:1:1: is larger than 10 bytes; split it or make it shorter"


def test_only_a_regular_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "f.yaml").write_bytes(b"a: 1")
    (tmp_path / "link.yaml").symlink_to("f.yaml")
    assert contents(tmp_path / "link.yaml") == b"a: 1"
    os.mkfifo(tmp_path / "pipe.yaml")
    for name in ("pipe.yaml", "/dev/zero"):
        with pytest.raises(
            ConfigurationError, match="is not a regular file; remove it, or put one in its place"
        ):
            contents(tmp_path / name)
    for name, reason in ((".", "Is a directory"), ("gone", "No such file or directory"), ("a\0", "embedded")):
        with pytest.raises(ConfigurationError, match=reason):
            contents(tmp_path / name)


def test_the_depth_is_bounded() -> None:
    assert read("[" * MAX_DEPTH + "]" * MAX_DEPTH)
    assert fault("[" * (MAX_DEPTH + 1)) == "f.yaml:1:33: is nested more than 32 levels deep; make it flatter"
    assert "nested more than" in fault("[" * 100_000)


def test_a_byte_order_mark_shifts_no_column() -> None:
    assert read(b"\xef\xbb\xbfa: 1") == {"a": 1}
    assert fault(b"\xef\xbb\xbfa: no").startswith("f.yaml:1:4: ")


def test_a_place_is_that_of_the_key_or_of_the_nearest_one_above() -> None:
    document = parse("a:\n  - b: 1\n    c: 2\n  - 3\nd:\n", "f.yaml")
    assert document.place(("a",)) == "f.yaml:1:1"
    assert document.place(("a", 0, "c")) == "f.yaml:3:5"
    assert document.place(("a", 1)) == "f.yaml:4:5"
    assert document.place(("d", "missing", 7)) == "f.yaml:5:1"
    assert document.place(("missing",)) == "f.yaml:1:1"
    assert parse("", "f.yaml").place(()) == "f.yaml:1:1"


def test_a_path_is_written_with_dots_and_brackets() -> None:
    assert dotted(("gate", "routes", 0, "mode")) == "gate.routes[0].mode"
    assert dotted(("a\n", "x" * 99)) == "a\\n." + "x" * 60 + "..."


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("${N}", 5),
        ("1${N}", 15),
        ('"${N}"', "5"),
        ("http://${HOST}:${N}/", "http://backend:5/"),
        ("${GONE:7}", 7),
        ("${GONE:}", None),
        ('"${GONE:}"', ""),
        ("${EMPTY:7}", None),
        ("${TRUTH}", True),
        ("${GONE:a:b}", "a:b"),
        ("$${N}", "${N}"),
        ("$N", "$N"),
        ("${MAP}", "{a: 1}"),
        ("${LINES}", "x: 1\ny: 2"),
        ("${NESTED}", "${N}"),
    ],
)
def test_a_variable_is_filled_in_as_text_that_is_typed_but_never_structure(text: str, value: object) -> None:
    environment = {
        "N": "5",
        "HOST": "backend",
        "EMPTY": "",
        "TRUTH": "true",
        "MAP": "{a: 1}",
        "LINES": "x: 1\ny: 2",
        "NESTED": "${N}",
    }
    found = read(f"key: {text}", **environment)["key"]
    assert found == value
    assert type(found) is type(value)


def test_a_variable_is_not_filled_in_where_no_environment_is_given_nor_in_a_key() -> None:
    assert parse("key: ${N}", "f.yaml").value == {"key": "${N}"}
    assert read('"${N}": 1', N="5") == {"${N}": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("${GONE}", "the variable GONE is not set; set it, or write ${GONE:default}"),
        ("${}", "${ is not followed by NAME} or NAME:default}; write $${ for the text ${"),
        ("${N", "${ is not followed by NAME} or NAME:default}; write $${ for the text ${"),
        ("${BYTES}", "the variable BYTES does not hold UTF-8 text; correct it"),
    ],
)
def test_a_variable_that_cannot_be_filled_in_is_named(text: str, message: str) -> None:
    assert fault(f"a:\n  key: {text}", N="5", BYTES="\udcff") == f"f.yaml:2:8: a.key: {message}"


def test_a_refused_value_of_a_variable_is_not_repeated_since_it_may_be_a_secret() -> None:
    found = fault("key: ${SECRET}", SECRET="0123456")
    assert found.startswith("f.yaml:1:6: key: ${SECRET}, once filled in, is octal to YAML 1.1")
    assert "0123456" not in found


@given(
    st.binary(max_size=60)
    | st.text(max_size=60)
    | st.text("ab:-[]{}\"'\\uUx#&*!|>%@`?<=$~019._ \n\t", max_size=30)
)
@settings(deadline=None, max_examples=150)
def test_no_text_raises_anything_but_a_configuration_error(text: str | bytes) -> None:
    with suppress(ConfigurationError):
        parse(text, "f.yaml", environment={"a": "yes"})


# NUL and halves of characters are refused, DEL stands raw in JSON but not in YAML, and YAML bounds a key.
TEXT = st.text(st.characters(exclude_characters="\0\x7f", exclude_categories=["Cs"]), max_size=40)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)


@given(JSON)
@settings(deadline=None, max_examples=100)
def test_what_json_writes_reads_back_equal(value: object) -> None:
    assert parse(json.dumps(value), "f.yaml").value == value


# Inside a text -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("a: {b: one two}", "f.yaml:1:12"),
        ("a: {b: 'one two'}", "f.yaml:1:13"),
        ('a: {b: "one two"}', "f.yaml:1:13"),
        ("a:\n  b:\n    one two # here", "f.yaml:3:9"),
        ("a:\n  b: |\n    one two\n", "f.yaml:3:9"),
        ("a:\r\n  b: |2- # block\r\n      one two\r\n", "f.yaml:3:11"),
    ],
)
def test_a_character_of_a_text_that_the_file_shows_as_it_is_has_a_place(text: str, place: str) -> None:
    document = parse(text, "f.yaml")
    value = document.value["a"]["b"]
    assert document.place_within(("a", "b"), value, 1, value.index("two") + 1) == (place, "")


def test_a_character_in_a_later_line_of_a_block_has_a_place() -> None:
    document = parse("a:\n  - |\n\n    one\n      two\n    three\n", "f.yaml")
    text = document.value["a"][0]
    assert text == "\none\n  two\nthree\n"
    assert document.place_within(("a", 0), text, 3, 3) == ("f.yaml:5:7", "")
    assert document.place_within(("a", 0), text, 4, 6) == ("f.yaml:6:10", "")


@pytest.mark.parametrize(
    "text",
    [
        "a: >\n  one\n  two\n",
        "a: one\n  two",
        "a: 'one\n  two'",
        'a: "one\\x20two"',
        "a: 'one'' two'",
        'a: "one \\"two\\""',
    ],
)
def test_a_character_of_a_text_that_reads_otherwise_in_the_file_is_told_in_words(text: str) -> None:
    document = parse(text, "f.yaml")
    value = document.value["a"]
    assert document.place_within(("a",), value, 1, 5) == (
        "f.yaml:1:4",
        " (line 1, column 5 of this text)",
    )


# Two parsers ---------------------------------------------------------------------------------------------


def undecided(text: str) -> Any:
    raise Undecided


def both_readings(text: str) -> list[tuple[Document | None, tuple[Fault, ...]]]:
    """As it is read, and as PyYAML's own parser alone reads it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(yamlevents, "fast", undecided)
        careful = survey(text, "f.yaml")
    return [survey(text, "f.yaml"), careful]


SHIPPED = [
    path.read_text(encoding="utf-8")
    for folder in ("policies", "config")
    for path in sorted((Path(__file__).parents[2] / folder).glob("*.yaml"))
]
EVERYTHING = """# a comment
---
on: issue
list:
- plain
  on two lines
-
- - {a: b, "c": 'd''e', f: , g: [1, 2.5, true, ~]}
  - "with \\u00e9 and \\
     joined"
-   - |2-
      block

       of text
    - >+
      folded

- k: v # why?
  "what?": 1
"""


def test_what_people_write_is_read_by_the_fast_parser() -> None:
    assert yaml.__with_libyaml__
    for text in (*SHIPPED, EVERYTHING):
        assert list(yamlevents.fast(text))
        fast, careful = both_readings(text)
        assert fast == careful
        assert repr(fast) == repr(careful)


@pytest.mark.parametrize(
    "text",
    [
        "a: 1\t",
        "a\n\t",
        "a: |#\n",
        "a: >-#b\n  c\n",
        "{a?b: 1}",
        "{?a: 1}",
        "[a?b, 1]",
        "? a\n: b",
        "{? }",
        "--- ",
        "{a: }",
        "a: !t:u v",
        '"\\ud83d\\ude00"',
        "a: what?",
        "a\n--- \n",
    ],
)
def test_where_the_parsers_differ_the_careful_one_decides(text: str) -> None:
    fast, careful = both_readings(text)
    assert fast == careful


def test_without_libyaml_everything_reads_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [survey(text, "f.yaml") for text in SHIPPED]
    monkeypatch.delattr(yaml, "CSafeLoader")
    with pytest.raises(Undecided):
        list(yamlevents.fast("a: 1"))
    assert [survey(text, "f.yaml") for text in SHIPPED] == found


PIECES = st.sampled_from(
    [
        *(
            "a",
            "b: ",
            "c: 1",
            "- ",
            "-",
            "? ",
            "?",
            ": ",
            ":",
            "[",
            "]",
            "{",
            "}",
            ", ",
            "'",
            '"',
            "''",
            "\\",
            "#",
        ),
        *(
            " #c",
            "|\n",
            ">\n",
            "|-\n",
            ">+\n",
            "|2\n",
            "|#",
            "\n",
            "\n",
            "\n ",
            " ",
            "  ",
            "\t",
            "\r",
            "\r\n",
            "&x ",
        ),
        *(
            "*x",
            "!t ",
            "! ",
            "%YAML 1.1\n",
            "---\n",
            "--- ",
            "...",
            "@",
            "~",
            "yes",
            "<<: ",
            "\u00e9",
            "\U0001f600",
        ),
        *(
            "k: v\n",
            "- i\n",
            "  k: v\n",
            "=",
            "a:b",
            "\\x41",
            "\\ud800",
            "\\\n",
            "a b c",
            "x" * 1025,
            "?x",
            "017",
        ),
    ]
)


@st.composite
def altered(draw: st.DrawFn) -> str:
    """A text that somebody might have written, with something else in a few places."""
    text = draw(st.sampled_from([*SHIPPED[0].splitlines(keepends=True), EVERYTHING, EVERYTHING, SHIPPED[0]]))
    for _ in range(draw(st.integers(0, 3))):
        begin = draw(st.integers(0, len(text)))
        text = text[:begin] + draw(PIECES | st.just("")) + text[begin + draw(st.integers(0, 6)) :]
    return text


@given(st.lists(PIECES, max_size=12).map("".join) | altered())
@settings(deadline=None, max_examples=400)
def test_both_parsers_read_the_same_in_the_same_places(text: str) -> None:
    fast, careful = both_readings(text)
    assert fast == careful
    assert repr(fast) == repr(careful)
