"""Room for gated requests: how many there may be at once, and how much memory they may hold.

A request takes a place before its body is read and has it to the end of its execution, so that slow bodies
count like slow backends. Its memory is counted as it comes, and is free once nothing refers to the request
any more. A refusal that waits for the summary of a flood has left its place, but still holds what it sent.

A body is held as its bytes and as the values that were parsed from it, which take up to thirty times as
much: `[],` becomes a list of 56 bytes and a pointer to it. What they will take is estimated from the bytes,
before they are parsed. Without these bounds 1,000 bodies of 1 MiB would hold 30 GiB.
"""

from __future__ import annotations

from collections.abc import Callable

# For the bodies of all gated requests, and as much for those of the sidecar's own calls.
BODY_BYTES = 256 * 1024 * 1024

# What a value takes at most (Python 3.11 to 3.13): a Decimal or a list with its pointer; an object.
_VALUE_BYTES = 120
_OBJECT_BYTES = 240
# Of text: four bytes a character where one of them needs as many, beside its UTF-8.
_TEXT_FACTOR = 5
# No shape that was tried takes more: {"":1} 29, [{}] 29, {"a":{}} 30, 1.5 30.
_MOST_FACTOR = 32


def parsed_bytes(body: bytes) -> int:
    """How much memory, in bytes, the values of a JSON text take at most."""
    values = body.count(b",") + body.count(b"[")
    estimate = _TEXT_FACTOR * len(body) + _VALUE_BYTES * values + _OBJECT_BYTES * body.count(b"{")
    return min(_MOST_FACTOR * len(body), estimate)


class Memory:
    """How much memory bodies hold together, in bytes, and how much they may."""

    def __init__(self, max_bytes: int = BODY_BYTES) -> None:
        self.max_bytes = max_bytes
        self.taken = 0


class Held:
    """What one request holds of it, for as long as anything refers to this."""

    __slots__ = ("_memory", "_size")

    def __init__(self, memory: Memory) -> None:
        self._memory, self._size = memory, 0

    def grow(self, size: int) -> bool:
        """Hold so many bytes more, if there is room. A request that holds all that is held always has it."""
        memory = self._memory
        if memory.taken + size > memory.max_bytes and memory.taken > self._size:
            return False
        memory.taken += size
        self._size += size
        return True

    def __del__(self) -> None:
        self._memory.taken -= self._size


class Place(Held):
    """A place in flight, until `leave`. `carried`: an execution has it, and leaves it when it ends."""

    __slots__ = ("_places", "carried")

    def __init__(self, places: Places) -> None:
        super().__init__(places.memory)
        self._places: Places | None = places
        self.carried = False
        places.change(+1)

    def leave(self) -> None:
        """Leave the place to another request. What is held stays held. Called again it does nothing."""
        places, self._places = self._places, None
        if places is not None:
            places.change(-1)

    def __del__(self) -> None:
        """A request leaves its place even after a fault for which there is no handler."""
        self.leave()
        super().__del__()


class Places:
    """The places of all gated requests. `changed` is told how many are taken."""

    def __init__(self, changed: Callable[[int], object]) -> None:
        self.memory = Memory()
        self.taken = 0
        self._changed = changed

    def take(self, max_places: int) -> Place | None:
        """A place, unless so many are taken."""
        return Place(self) if self.taken < max_places else None

    def change(self, by: int) -> None:
        """A place was taken (1) or left (-1)."""
        self.taken += by
        self._changed(self.taken)
