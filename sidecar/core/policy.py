"""The policy set: what operators allow, as one immutable value. No files here, only meaning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum


class RiskClass(str, Enum):
    """How much harm a recovery action can do, in rising order."""

    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"
    CRITICAL = "critical"

    # Text sorts by letter; risk does not.
    def __lt__(self, other: str) -> bool:
        return _rank(self) < _rank(other)

    def __le__(self, other: str) -> bool:
        return _rank(self) <= _rank(other)

    def __gt__(self, other: str) -> bool:
        return _rank(self) > _rank(other)

    def __ge__(self, other: str) -> bool:
        return _rank(self) >= _rank(other)


def _rank(risk: str) -> int:
    return tuple(RiskClass).index(RiskClass(risk))


@dataclass(frozen=True, slots=True, kw_only=True)
class ActionPolicy:
    """One entry of the catalogue.

    `hold` is what an execution sets aside until its cost is known, in micro-dollars;
    `timeout_seconds` replaces the upstream's response timeout where it is given.
    """

    risk: RiskClass
    hold: int = 0
    timeout_seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicySet:
    """All policies at one moment. `revision` is a hash of the files' content."""

    revision: str
    actions: Mapping[str, ActionPolicy]
    unlisted: ActionPolicy | None = None

    def action(self, name: str) -> ActionPolicy | None:
        """The entry for an action, the `"*"` entry for one that is not listed, or None: refused."""
        return self.actions.get(name, self.unlisted)

    def label(self, name: str) -> str:
        """The action as a metric label: only names of the catalogue, so labels stay bounded."""
        return name if name in self.actions else "other"
