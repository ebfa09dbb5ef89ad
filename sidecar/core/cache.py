"""A bounded cache of what follows from a text alone.

Clients choose the texts (paths, hosts, header names), so the cache bounds their number and their size. When
it is full, it forgets everything. That needs no bookkeeping for each use, and a client that sends new texts
all the time only causes the work that it would cause without a cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sized
from typing import TypeVar

Key = TypeVar("Key", bound=Sized)
Value = TypeVar("Value")


class Cache(dict[Key, Value]):
    """`cache[key]` is `compute(key)`, which depends on nothing else and returns an immutable value.

    At most `max_entries` values are kept, of keys whose `size` is at most `max_size`. By default the size of
    a key is its length.
    """

    __slots__ = ("_compute", "_max_entries", "_max_size", "_size")

    def __init__(
        self,
        compute: Callable[[Key], Value],
        *,
        max_entries: int,
        max_size: int,
        size: Callable[[Key], int] = len,
    ) -> None:
        super().__init__()
        self._compute, self._size = compute, size
        self._max_entries, self._max_size = max_entries, max_size

    def __missing__(self, key: Key) -> Value:
        value = self._compute(key)
        if self._size(key) <= self._max_size:
            if len(self) >= self._max_entries:
                self.clear()
            self[key] = value
        return value
