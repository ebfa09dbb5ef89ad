"""Documents of other programs: JSON and YAML as their readers read them, with the place of each value."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.files import foreign
from sidecar.files.faults import ConfigurationError

VALUES = st.recursive(
    st.none() | st.booleans() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=20,
)


def read(text: str) -> Any:
    return foreign.parse(text.encode(), "d").value


def refused(text: str | bytes) -> str:
    with pytest.raises(ConfigurationError) as caught:
        foreign.parse(text if isinstance(text, bytes) else text.encode(), "d")
    (fault,) = caught.value.faults
    return str(fault)


@given(value=VALUES, indent=st.sampled_from([None, 2, "\t"]), ascii=st.booleans())
@settings(max_examples=200, deadline=None)
def test_json_is_read_as_it_was_written_and_every_place_is_that_of_its_key(
    value: Any, indent: int | str | None, ascii: bool
) -> None:
    text = json.dumps({"whole": value}, indent=indent, ensure_ascii=ascii)
    try:
        raw = text.encode()
    except UnicodeEncodeError:  # half of a character, which no UTF-8 file holds
        return
    document = foreign.parse(raw, "d")
    assert document.value == {"whole": value}
    lines = text.split("\n")
    for path, (line, column) in document.marks.items():
        if path and isinstance(path[-1], str) and "\r" not in text:
            key = json.dumps(path[-1], ensure_ascii=ascii)
            assert lines[line - 1][column - 1 :].startswith(key), path


@given(value=VALUES)
@settings(max_examples=100, deadline=None)
def test_yaml_is_read_as_it_was_written(value: Any) -> None:
    text = yaml.safe_dump({"whole": value}, allow_unicode=False)
    assert foreign.parse(text.encode(), "d").value == {"whole": value}


def test_what_the_sidecars_own_files_may_not_hold_is_read_here() -> None:
    text = "base: &base {200: ok, on: yes}\nmore:\n  <<: *base\n  own: 1.10\nagain: *base\ntagged: !x y\n"
    assert read(text) == {
        "base": {"200": "ok", "on": True},
        "more": {"200": "ok", "on": True, "own": "1.10"},
        "again": {"200": "ok", "on": True},
        "tagged": "y",
    }
    assert read('\ufeff{"a":\t[1, 2.50, null, true]}') == {"a": ["1", "2.50", None, True]}
    assert read("") is None


def test_aliases_are_read_once_however_many_there_are() -> None:
    bomb = "a0: &a0 [x]\n" + "".join(
        f"a{n}: &a{n} [{', '.join(f'*a{n - 1}' for _ in range(10))}]\n" for n in range(1, 40)
    )
    assert len(foreign.parse(bomb.encode(), "d").marks) < 1_000


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": 1,\n "a": 2}', "d:2:2: a is already in line 1"),
        ("a: 1\nb: 2\na: 3\n", "d:3:1: a is already in line 1"),
        ('{"a": [1,]}', "d:1:"),
        ('{"a": 1', "d:1:8: is not JSON here"),
        ("a: [1\nb: 2\n", "d:2:2: is not YAML here"),
        ("a: &a [*a]\n", "d:1:4: contains itself"),
        ("? [a]\n: b\n", "d:1:3: a list or a map cannot be a key"),
        ("a: 1\n---\nb: 2\n", "d:2:1: is not YAML here"),
        (b"a: \xff\n", "d:1:4: is not UTF-8 here"),
        ("[" * 500 + "]" * 500, "d:1:129: is nested more than 128 levels deep"),
        ("[" * 100_000 + "]" * 100_000, "is nested more than 128 levels deep"),
        ("a:\n" + "".join("  " * n + "- b:\n" for n in range(200)), "is nested more than 128 levels deep"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_document_that_cannot_be_read_is_refused_with_its_line(text: str | bytes, words: str) -> None:
    assert words in refused(text)


def test_a_file_that_is_no_file_is_refused_by_name(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    cases = {
        tmp_path: "Is a directory",
        tmp_path / "none": "No such file",
        tmp_path / "pipe": "not a regular file",
    }
    for path, words in cases.items():
        with pytest.raises(ConfigurationError, match=words) as caught:
            foreign.read(path)
        assert str(caught.value).startswith(f"{path}: ")
    large = tmp_path / "large"
    large.write_bytes(b" " * (foreign.MAX_BYTES + 1))
    with pytest.raises(ConfigurationError, match="is larger than"):
        foreign.read(large)
