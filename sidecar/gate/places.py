"""Limits on concurrent gated requests: their number, and the memory that their bodies hold.

A request takes a place before its body is read and has it to the end of its execution, so that slow bodies
count like slow backends. Its memory is counted as it comes, and is free once nothing refers to the request
any more. A refusal that waits for the summary of a flood has left its place, but still holds what it sent.

A body is held as its bytes and as the parsed values, which may take thirty times as much: `[],` becomes a
list of 56 bytes and a pointer to it. The memory of the values is estimated from the bytes before they are
parsed. Without these limits, 1,000 bodies of 1 MiB would hold 30 GiB.
"""

from __future__ import annotations

from collections.abc import Callable

from sidecar.core.form import MAX_FIELDS

# The limit for the bodies of all gated requests. The bodies of the sidecar's own API have the same limit.
BODY_BYTES = 256 * 1024 * 1024

# The most bytes of one value (Python 3.11 to 3.13): a Decimal or a list with its pointer; an object.
_VALUE_BYTES = 120
_OBJECT_BYTES = 240
# The most bytes per byte of text: four for each character if one character needs four, and one for the UTF-8.
_TEXT_FACTOR = 5
# No tested shape takes more bytes per byte: {"":1} 29, [{}] 29, {"a":{}} 30, 1.5 30.
_MOST_FACTOR = 32


def parsed_bytes(body: bytes) -> int:
    """The most memory, in bytes, that the values of a JSON text take."""
    values = body.count(b",") + body.count(b"[")
    estimate = _TEXT_FACTOR * len(body) + _VALUE_BYTES * values + _OBJECT_BYTES * body.count(b"{")
    return min(_MOST_FACTOR * len(body), estimate)


def form_bytes(body: bytes) -> int:
    """The most memory, in bytes, that the names and values of a form take."""
    return _TEXT_FACTOR * len(body) + _OBJECT_BYTES * min(body.count(b"&") + 1, MAX_FIELDS)


class MemoryBudget:
    """The memory that all bodies hold together, and its limit, both in bytes."""

    def __init__(self, max_bytes: int = BODY_BYTES) -> None:
        self.max_bytes = max_bytes
        self.taken = 0


class Held:
    """The memory that one request holds. It is freed when this object is deleted."""

    __slots__ = ("_memory", "_size")

    def __init__(self, memory: MemoryBudget) -> None:
        self._memory, self._size = memory, 0

    def grow(self, size: int) -> bool:
        """Hold `size` more bytes if there is room. A request that is the only holder always has room."""
        memory = self._memory
        if memory.taken + size > memory.max_bytes and memory.taken > self._size:
            return False
        memory.taken += size
        self._size += size
        return True

    def __del__(self) -> None:
        self._memory.taken -= self._size


class Place(Held):
    """A place in flight, until `leave`. With `carried`, the execution owns it and leaves it at its end."""

    __slots__ = ("_places", "carried")

    def __init__(self, places: Places) -> None:
        super().__init__(places.memory)
        self._places: Places | None = places
        self.carried = False
        places.change(+1)

    def leave(self) -> None:
        """Free the place for another request. The memory stays held. A second call does nothing."""
        places, self._places = self._places, None
        if places is not None:
            places.change(-1)

    def __del__(self) -> None:
        """A request leaves its place even after a fault for which there is no handler."""
        self.leave()
        super().__del__()


class Places:
    """The places of all gated requests. `changed` is called with the number of taken places."""

    def __init__(self, changed: Callable[[int], object]) -> None:
        self.memory = MemoryBudget()
        self.taken = 0
        self._changed = changed

    def take(self, max_places: int) -> Place | None:
        """A place, unless so many are taken."""
        return Place(self) if self.taken < max_places else None

    def change(self, by: int) -> None:
        """Count a place that was taken (1) or left (-1)."""
        self.taken += by
        self._changed(self.taken)
