"""Globs: what they match, whether two can match the same text, and which one of a table decides."""

from __future__ import annotations

import re
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.core.globs import MOST_NAMES, GlobIndex, GlobTable, globbed, is_glob, literal_prefix, overlap


@pytest.mark.parametrize(
    ("globs", "value", "means"),
    [
        ((), "anything", True),
        (("restart_pod",), "restart_pod", True),
        (("restart_pod",), "restart_pod_2", False),
        (("restart_pod",), "a restart_pod", False),
        (("restart_*",), "restart_", True),
        (("restart_*",), "restart", False),
        (("*_db",), "failover_db", True),
        (("*_db",), "failover_db2", False),
        (("temp-?",), "temp-1", True),
        (("temp-?",), "temp-12", False),
        (("temp-?",), "temp-", False),
        (("db-[12]",), "db-2", True),
        (("db-[12]",), "db-3", False),
        (("db-[!12]",), "db-3", True),
        (("db-[12]",), "db-[12]", True),  # whoever is really called so is meant, too
        (("Restart_*",), "restart_pod", False),
        (("a.c",), "abc", False),
        (("a+",), "aa", False),
        (("a", "b*"), "bc", True),
        (("a", "b*"), "c", False),
        (("*",), "", True),
        (("",), "", True),
        (("a",), "", False),
        (("*",), "two\nlines", True),
    ],
)
def test_a_glob_means_the_whole_value_and_case_counts(
    globs: tuple[str, ...], value: str, means: bool
) -> None:
    assert globbed(globs, value) is means


@pytest.mark.parametrize(
    ("glob", "prefix"),
    [("restart_*", "restart_"), ("*", ""), ("db-[12]", "db-"), ("a?c", "a"), ("?", ""), ("a*b*", "a")],
)
def test_the_literal_prefix_ends_before_the_first_wildcard(glob: str, prefix: str) -> None:
    assert is_glob(glob)
    assert literal_prefix(glob) == prefix


def test_text_without_a_wildcard_is_no_glob() -> None:
    assert not is_glob("restart_pod")
    assert literal_prefix("restart_pod") == "restart_pod"


@pytest.mark.parametrize(
    ("one", "other", "can"),
    [
        ("restart_*", "restart_pod", True),
        ("restart_*", "*_pod", True),
        ("restart_*", "stop_*", False),
        ("restart_?", "restart_*_pod", False),
        ("restart_????", "restart_*pod", True),
        ("*_pod", "*_job", False),
        ("a*b", "a*c", False),
        ("a*b", "ab", True),
        ("a?b", "ab", False),
        ("a[bc]", "ab", True),
        ("a[bc]", "ad", False),
        ("a[!b]", "ab", False),
        ("a[b", "a?b", True),  # a bracket that is never closed stands for itself
        ("a[]]", "a]", True),
        ("", "*", True),
        ("", "?", False),
        ("*", "*", True),
        ("*a*b*", "*b*a*", True),
    ],
)
def test_two_globs_overlap_if_some_text_matches_both(one: str, other: str, can: bool) -> None:
    assert overlap(one, other) is can
    assert overlap(other, one) is can


GLOBS = st.text("ab*?", max_size=5)
# Two globs of at most five parts that overlap share a text of at most eight letters.
TEXTS = ["".join(letters) for length in range(6) for letters in product("ab", repeat=length)]


@given(GLOBS, GLOBS)
def test_globs_that_share_a_text_overlap_and_without_brackets_only_those(one: str, other: str) -> None:
    shared = any(_matches(one, text) and _matches(other, text) for text in TEXTS)
    if shared:
        assert overlap(one, other)
    elif overlap(one, other):
        # The shortest shared text is longer than the texts that were tried.
        assert _least(one) + _least(other) > 5


def _matches(glob: str, text: str) -> bool:
    """The meaning of a glob without brackets, spelled out."""
    pattern = "".join(".*" if one == "*" else "." if one == "?" else re.escape(one) for one in glob)
    return re.fullmatch(pattern, text) is not None


def _least(glob: str) -> int:
    return len(glob.replace("*", ""))


@given(st.lists(GLOBS, max_size=8), GLOBS)
def test_the_index_finds_what_comparing_with_every_glob_finds(globs: list[str], glob: str) -> None:
    assert GlobIndex(globs).overlaps(glob) == any(overlap(glob, other) for other in globs)


def decider(name: str, *globs: str) -> str | None:
    found = GlobTable({glob: glob for glob in globs}).find(name)
    assert found is None or found[0] == found[1]
    return None if found is None else found[0]


@pytest.mark.parametrize(
    ("globs", "name", "decides"),
    [
        (("restart_*", "restart_db*"), "restart_db1", "restart_db*"),
        (("restart_*", "restart_db*"), "restart_pod", "restart_*"),
        (("restart_*", "*_pod"), "restart_pod", "restart_*"),  # the prefix comes first, not the length
        (("*_pod", "*_database_of_pod"), "a_database_of_pod", "*_database_of_pod"),
        (("*_pod", "?*"), "a_pod", "*_pod"),
        (("restart_*", "restart_?"), "restart_1", "restart_*"),  # both are as long; the loader refuses them
        (("restart_*",), "restart", None),
        ((), "restart", None),
    ],
)
def test_the_longest_literal_prefix_decides_and_then_the_longer_glob(
    globs: tuple[str, ...], name: str, decides: str | None
) -> None:
    assert decider(name, *globs) == decides
    assert decider(name, *reversed(globs)) == decides


@given(st.lists(GLOBS.filter(is_glob), unique=True, max_size=8), st.text("ab", max_size=6))
def test_the_table_finds_what_trying_every_glob_finds(globs: list[str], name: str) -> None:
    ranked = sorted(globs, key=lambda glob: (-len(literal_prefix(glob)), -len(glob), glob))
    assert decider(name, *globs) == next((glob for glob in ranked if globbed((glob,), name)), None)


def test_names_that_clients_make_up_do_not_pile_up_in_the_table() -> None:
    table = GlobTable({"restart_*": 1})
    for number in range(MOST_NAMES + 1_000):
        assert table.find(f"restart_{number}") == ("restart_*", 1)
        assert len(table._found) <= MOST_NAMES
