"""Mistakes in configuration and policy files: each with its place, and all of them in one exception."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sidecar.errors import ScopegateError


@dataclass(frozen=True, slots=True)
class Fault:
    """One mistake in a file: its place, its key, and what to do about it.

    `place` is `file:line:column`, or the environment variable or flag that holds the value. `key` is the
    dotted key, or empty if the fault concerns the file as a whole.
    """

    place: str
    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.place}: {self.key}: {self.message}" if self.key else f"{self.place}: {self.message}"


class ConfigurationError(ScopegateError):
    """The configuration or the policies cannot be used. `faults` holds every fault that was found."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        super().__init__("\n".join(str(fault) for fault in faults))
        self.faults = tuple(faults)


def shown(text: str, limit: int = 60) -> str:
    """Text for a message: one line, bounded, without control characters."""
    cut = text if len(text) <= limit else text[:limit] + "..."
    return cut if cut.isprintable() else ascii(cut)[1:-1]
