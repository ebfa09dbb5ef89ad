"""JSON pointers are read as RFC 6901 says, into objects and arrays."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.core.pointer import ABSENT, follow, parse

# The document and the pointers of RFC 6901, section 5.
EXAMPLE = {
    "foo": ["bar", "baz"],
    "": 0,
    "a/b": 1,
    "c%d": 2,
    "e^f": 3,
    "g|h": 4,
    "i\\j": 5,
    'k"l': 6,
    " ": 7,
    "m~n": 8,
}

texts = st.text(st.sampled_from("~/01-a é\n"), max_size=3) | st.text(max_size=3)
documents = st.recursive(
    st.none() | st.integers() | texts,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(texts, inner, max_size=3)
    ),
    max_leaves=12,
)


@pytest.mark.parametrize(
    ("pointer", "value"),
    [
        ("", EXAMPLE),
        ("/foo", ["bar", "baz"]),
        ("/foo/0", "bar"),
        ("/", 0),
        ("/a~1b", 1),
        ("/c%d", 2),
        ("/e^f", 3),
        ("/g|h", 4),
        ("/i\\j", 5),
        ('/k"l', 6),
        ("/ ", 7),
        ("/m~0n", 8),
    ],
)
def test_the_examples_of_the_rfc_are_found(pointer: str, value: object) -> None:
    assert follow(EXAMPLE, parse(pointer)) == value


@pytest.mark.parametrize(
    "text", ["a", "a/b", " /a", "~", "/~", "/a~", "/~2", "/~/0", "/~~01", "/a/~b", "\n/a"]
)
def test_what_is_no_pointer_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="JSON pointer"):
        parse(text)


@pytest.mark.parametrize(
    ("pointer", "steps"),
    [("/~01", ("~1",)), ("/~10", ("/0",)), ("//", ("", "")), ("/a\nb/", ("a\nb", "")), ("/~0~1", ("~/",))],
)
def test_escapes_are_resolved_once(pointer: str, steps: tuple[str, ...]) -> None:
    assert parse(pointer) == steps


@pytest.mark.parametrize(
    "step",
    [
        "-",
        "-1",
        "+1",
        "01",
        "00",
        "1.0",
        "1e0",
        " 1",
        "1 ",
        "1\n",
        "",
        "a",
        "\u0660",
        "\uff11",
        "3",
        "9" * 5000,
    ],
)
def test_an_index_that_names_no_item_finds_nothing(step: str) -> None:
    assert follow(["a", "b", "c"], (step,)) is ABSENT
    assert follow([["a", "b", "c"]], ("0", step)) is ABSENT


@pytest.mark.parametrize("step", ["0", "01", "-", "-1", "", "length"])
def test_in_an_object_every_step_is_a_name(step: str) -> None:
    assert follow({step: "found"}, (step,)) == "found"
    assert follow({}, (step,)) is ABSENT


@pytest.mark.parametrize("value", ["text", b"bytes", 5, 1.5, True, None, {"0"}])
def test_a_step_into_a_value_without_members_finds_nothing(value: object) -> None:
    assert follow(value, ("0",)) is ABSENT
    assert follow({"a": value}, ("a", "0")) is ABSENT


def test_null_is_a_value() -> None:
    assert follow({"a": [None]}, ("a", "0")) is None


def test_read_only_mappings_and_tuples_are_followed() -> None:
    assert follow(MappingProxyType({"a": (1, MappingProxyType({"b": 2}))}), ("a", "1", "b")) == 2


@given(documents)
def test_every_value_of_a_document_is_found_by_its_pointer(document: Any) -> None:
    for pointer, value in _everywhere(document):
        assert follow(document, parse(pointer)) is value


@given(documents, st.lists(texts, max_size=3))
def test_what_a_pointer_finds_is_the_document_value(document: Any, steps: list[str]) -> None:
    found = follow(document, steps)
    pointer = "".join("/" + step.replace("~", "~0").replace("/", "~1") for step in steps)
    assert parse(pointer) == tuple(steps)
    values = [value for where, value in _everywhere(document) if where == pointer]
    assert [found] == values if values else found is ABSENT


def _everywhere(document: Any, pointer: str = "") -> list[tuple[str, Any]]:
    """Every value with the pointer that names it."""
    found = [(pointer, document)]
    if isinstance(document, Mapping):
        for name, value in document.items():
            found += _everywhere(value, f"{pointer}/{name.replace('~', '~0').replace('/', '~1')}")
    elif isinstance(document, list | tuple):
        for place, value in enumerate(document):
            found += _everywhere(value, f"{pointer}/{place}")
    return found
