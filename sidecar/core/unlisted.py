"""What becomes of a request that no route lists: it passes, passes with a record, or is refused. No I/O.

1. GET, HEAD and OPTIONS are reads, and a WebSocket is one, because it begins with a GET. Every other method
   is a write. A backend may take a read that carries a method override for a write, so the stricter of the
   two treatments holds for it.
2. An exception passes in any case. It holds only where no parser behind the sidecar could find another path:
   the target spells an excepted path out, every reading of the target is excepted, and no header leads to a
   path that is not. In doubt a request is not excepted.
3. Exceptions never open a gated path, because they concern only what `classify` lets pass.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from sidecar.core._readings import STEPS, Step, decoded, readings_of, steps_for, taking_off
from sidecar.core.cache import Cache
from sidecar.core.pattern import RoutePattern
from sidecar.core.target import LOOKING, MAX_PLACES, MAX_VALUES, matches, spells
from sidecar.core.targetheaders import LONGEST_REMEMBERED, METHOD_OVERRIDES, leads, path_of, read_as
from sidecar.errors import Refusal

Treatment = Literal["pass", "record", "refuse"]
Access = Literal["reads", "writes"]

# From the most lenient to the strictest.
TREATMENTS: tuple[Treatment, ...] = ("pass", "record", "refuse")


class ExceptedPaths:
    """The paths that always pass, and what was found out about the paths that came lately."""

    __slots__ = ("_found", "patterns")

    def __init__(self, patterns: Iterable[RoutePattern]) -> None:
        self.patterns = tuple(patterns)
        self._found: Cache[str, bool] = Cache(
            lambda path: self.spells(path) and self.stray_reading(path) is None,
            max_entries=MAX_PLACES,
            max_size=LONGEST_REMEMBERED,
        )

    def holds(self, target: str, headers: Collection[tuple[str, str]] = ()) -> bool:
        """Whether a request is excepted. `headers` may lack those that `decides` excludes."""
        path = path_of(target)
        return self._found[path] and not self._led_astray(path, headers)

    def spells(self, path: str) -> bool:
        """Whether a path spells an excepted one out."""
        return any(spells(one, path) for one in self.patterns)

    def stray_reading(self, path: str, more: Sequence[Step] = ()) -> str | None:
        """A reading of the path that is not excepted, None if there is none. It is "" if there are too many
        readings to try. `more` are additional steps."""
        for reading in readings_of(path, (*STEPS, *more) if more else steps_for(path)):
            if reading is None:
                return ""
            # Without the slash at its end, "/" is empty, which parsers read as "/" again.
            if not any(matches(one, reading[0] or "/") for one in self.patterns):
                return reading[0]
        return None

    def lacks(self, pattern: RoutePattern) -> str | None:
        """The path that must be excepted, too, because parsers also read paths of this pattern as that one;
        None if there is none."""
        before = "/x" if pattern.anywhere else ""
        example = before + pattern.filled("x")
        stray = self.stray_reading(example)
        return stray and ("**" if before else "") + stray.removeprefix(before)

    def _led_astray(self, path: str, headers: Collection[tuple[str, str]]) -> bool:
        """Whether a header could lead a backend to a path that is not excepted."""
        prefixes: set[str] = set()
        for count, (to, text) in enumerate(leads(headers)):
            if to == "unknown" or count >= MAX_VALUES or (to == "target" and not self._found[text]):
                return True
            if to == "prefix" and text:
                prefixes.add(text)
        return len(prefixes) > 1 or not all(self._holds_with(prefix, path) for prefix in prefixes)

    def _holds_with(self, prefix: str, path: str) -> bool:
        """Whether a path is excepted with a prefix put before it, and with the prefix taken off."""
        without = [taking_off(prefix), taking_off(decoded(prefix))]
        return self._found[prefix + path] and self.stray_reading(path, without) is None


@dataclass(frozen=True, slots=True)
class Unlisted:
    """How requests are treated that no route lists."""

    reads: Treatment
    writes: Treatment
    excepted: ExceptedPaths

    def treatment(
        self, method: str, target: str, headers: Collection[tuple[str, str]]
    ) -> tuple[Treatment, Access]:
        """What becomes of a request, and whether it counts as a read or a write.

        `headers` may lack those that `decides` excludes.
        """
        access: Access = "reads" if method in LOOKING else "writes"
        if access == "reads" and any(read_as(name) in METHOD_OVERRIDES for name, _ in headers):
            access = max(("reads", "writes"), key=lambda one: TREATMENTS.index(getattr(self, one)))
        treatment: Treatment = getattr(self, access)
        if treatment != "pass" and self.excepted.patterns and self.excepted.holds(target, headers):
            treatment = "pass"
        return treatment, access


def not_listed(method: str, access: Access) -> Refusal:
    """The refusal of a request that no route lists."""
    return Refusal("not_listed", f"No route lists {method} for this path; gate.unlisted.{access} is refuse.")
