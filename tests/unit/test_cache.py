"""A bounded cache returns what it would compute, and holds neither many values nor long keys."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sidecar.core.cache import Cache


class Doubling:
    """Doubles texts, and counts how often it does."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __call__(self, text: str) -> str:
        self.calls.append(text)
        return text * 2


def test_a_value_is_computed_once() -> None:
    doubling = Doubling()
    cache = Cache(doubling, max_entries=4, max_size=4)
    assert [cache["ab"], cache["c"], cache["ab"]] == ["abab", "cc", "abab"]
    assert doubling.calls == ["ab", "c"]


def test_a_full_cache_forgets_everything() -> None:
    doubling = Doubling()
    cache = Cache(doubling, max_entries=2, max_size=4)
    for text in ("a", "b", "c", "a"):
        assert cache[text] == text * 2
    assert doubling.calls == ["a", "b", "c", "a"]
    assert dict(cache) == {"c": "cc", "a": "aa"}


def test_a_value_of_a_long_key_is_not_kept() -> None:
    cache = Cache(Doubling(), max_entries=4, max_size=3)
    assert (cache["abc"], cache["abcd"]) == ("abcabc", "abcdabcd")
    assert list(cache) == ["abc"]


def test_the_size_of_a_key_can_be_other_than_its_length() -> None:
    def total(numbers: tuple[int, ...]) -> int:
        return sum(numbers)

    cache = Cache(total, max_entries=4, max_size=5, size=total)
    assert (cache[(2, 3)], cache[(6,)]) == (5, 6)
    assert list(cache) == [(2, 3)]


def test_a_computed_nothing_is_kept_too() -> None:
    calls: list[str] = []
    cache = Cache(calls.append, max_entries=4, max_size=4)
    assert cache["a"] is cache["a"] is None
    assert calls == ["a"]


@given(st.lists(st.text(max_size=6), max_size=60), st.integers(1, 5), st.integers(0, 5))
def test_no_key_gets_the_value_of_another(keys: list[str], max_entries: int, max_size: int) -> None:
    cache = Cache(Doubling(), max_entries=max_entries, max_size=max_size)
    for key in keys:
        assert cache[key] == key * 2
        assert len(cache) <= max_entries
        assert all(len(kept) <= max_size for kept in cache)
