"""One map of a policy file, read key by key. A mistake is recorded with its place, and nothing taken for it.

So the reader of a map goes on to its other keys, and whoever loads a folder learns of every mistake at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

from sidecar.core.facts import MAX_ID_CHARS, is_identifier
from sidecar.errors import Fault
from sidecar.files.yamlfile import Document, KeyPath, did_you_mean, dotted
from sidecar.settings.values import kind, micros_of

IDENTIFIER = f"1 to {MAX_ID_CHARS} printable characters"


class Entry:
    """A map at a path of a document, and the list that its mistakes go to."""

    __slots__ = ("document", "faults", "path", "values")

    def __init__(
        self, document: Document, path: KeyPath, values: Mapping[str, Any], faults: list[Fault]
    ) -> None:
        self.document = document
        self.path = path
        self.values = values
        self.faults = faults

    @classmethod
    def of(
        cls,
        document: Document,
        path: KeyPath,
        value: Any,
        faults: list[Fault],
        *,
        keys: Sequence[str],
        example: str,
    ) -> Entry | None:
        """The map with these keys that a value is. Other keys are mistakes; None: it is no map at all."""
        entry = cls(document, path, value, faults)
        if not isinstance(value, dict):
            entry.fault((), f"expects a map such as {example}, found {kind(value)}")
            return None
        entry.check_keys(keys)
        return entry

    def check_keys(self, keys: Sequence[str]) -> None:
        for key in self.values:
            if key not in keys:
                self.fault((key,), f"is not a known key{did_you_mean(key, keys)}")

    def inner(self, key: str, *, keys: Sequence[str], example: str) -> Entry | None:
        """The map below a key; None, too, where there is none."""
        if key not in self.values:
            return None
        path = (*self.path, key)
        return Entry.of(self.document, path, self.values[key], self.faults, keys=keys, example=example)

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def where(self, below: KeyPath) -> tuple[str, str]:
        """The place of a path below the map, and the path with dots."""
        path = (*self.path, *below)
        return self.document.place(path), dotted(path)

    def fault(self, below: KeyPath, message: str) -> None:
        """Records a mistake at a path below the map, unless the place was found faulty as YAML already."""
        if not self.document.is_broken((*self.path, *below)):
            self.faults.append(Fault(*self.where(below), message))

    def fault_within(self, key: str, text: str, position: tuple[int, int], message: str) -> None:
        """Records a mistake at a line and column of the text that stands behind a key."""
        path = (*self.path, key)
        if not self.document.is_broken(path):
            place, where = self.document.place_within(path, text, *position)
            self.faults.append(Fault(place, dotted(path), message + where))

    def whole(self, key: str, low: int, high: int) -> int | None:
        if key not in self.values:
            return None
        value = self.values[key]
        if isinstance(value, bool) or not isinstance(value, int):
            self.fault((key,), f"expects a whole number, found {kind(value)}")
        elif not low <= value <= high:
            self.fault((key,), f"must be from {low} to {high}")
        else:
            return value
        return None

    def flag(self, key: str) -> bool:
        value = self.values.get(key, False)
        if not isinstance(value, bool):
            self.fault((key,), f"expects true or false, found {kind(value)}")
            return False
        return value

    def seconds(self, key: str, high: int) -> float | None:
        """Seconds with a fraction, above 0."""
        if key not in self.values:
            return None
        value = self.values[key]
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.fault((key,), f"expects a number of seconds, found {kind(value)}")
        elif not 0 < value <= high or not isfinite(value):
            self.fault((key,), f"must be above 0 and at most {high}")
        else:
            return float(value)
        return None

    def micros(self, key: str) -> int | None:
        """An amount of dollars, in micro-dollars."""
        if key not in self.values:
            return None
        try:
            return micros_of(self.values[key])
        except ValueError as exc:
            self.fault((key,), str(exc))
            return None

    def choice(self, key: str, choices: Sequence[str]) -> str | None:
        """One of a few words, which must be there."""
        if key not in self.values:
            self.fault((key,), f"is required; add one of {', '.join(choices)}")
            return None
        return self._one_of((key,), self.values[key], choices)

    def choices(self, key: str, choices: Sequence[str]) -> tuple[str, ...]:
        """One of a few words, or a list of them."""
        found = [self._one_of(below, value, choices) for below, value in self.items(key)]
        return tuple(word for word in found if word is not None)

    def identifiers(self, key: str) -> tuple[str, ...]:
        """One text, or a list of texts, each as ids are."""
        found = []
        for below, value in self.items(key):
            if is_identifier(value):
                found.append(value)
            elif isinstance(value, str):
                self.fault(below, f"expects {IDENTIFIER}")
            else:
                self.fault(below, f"expects text, found {kind(value)}; write it in quotes")
        return tuple(found)

    def items(self, key: str) -> list[tuple[KeyPath, Any]]:
        """What a list holds, or the one value that stands for it, each with its place."""
        value = self.values.get(key)
        if isinstance(value, list):
            return [((key, number), item) for number, item in enumerate(value)]
        return [((key,), value)] if key in self.values else []

    def _one_of(self, below: KeyPath, value: Any, choices: Sequence[str]) -> str | None:
        if isinstance(value, str) and value in choices:
            return value
        near = did_you_mean(value, choices) if isinstance(value, str) else ""
        self.fault(below, f"expects one of {', '.join(choices)}{near}")
        return None
