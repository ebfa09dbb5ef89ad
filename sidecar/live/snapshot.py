"""A snapshot: the configuration and policies that apply to a request, as one immutable value.

A reload creates a new snapshot. A request reads the snapshot once, when it begins, and keeps it to its end.
No request is therefore judged by a mixture of two versions.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256

from sidecar.core.policy import PolicySet
from sidecar.core.target import Gated, PassThrough, RoutePattern, classify
from sidecar.settings.sections import Route, Settings


@dataclass(frozen=True)
class Snapshot:
    """The configuration and policies of one moment. Without policies, every gated request is refused."""

    settings: Settings
    policies: PolicySet | None

    @cached_property
    def revision(self) -> str:
        """The revision of the configuration: the first 16 hex digits of a SHA-256 over all its values."""
        return sha256(self.settings.model_dump_json().encode()).hexdigest()[:16]

    @cached_property
    def patterns(self) -> tuple[RoutePattern, ...]:
        """The path pattern of each route."""
        return tuple(route.path for route in self.settings.gate.routes)

    @cached_property
    def enforced(self) -> tuple[Route, ...]:
        """The routes in enforce mode. On the other routes, refusals are only recorded."""
        return tuple(route for route in self.settings.gate.routes if route.mode == "enforce")

    @cached_property
    def enforced_patterns(self) -> tuple[RoutePattern, ...]:
        return tuple(route.path for route in self.enforced)

    @cached_property
    def shadow_routes(self) -> tuple[Route, ...]:
        """The routes that refuse nothing: routes in shadow mode that no enforced route overlaps."""
        return tuple(
            route
            for route in self.settings.gate.routes
            if route.mode == "shadow"
            and isinstance(
                classify("POST", _spelled(route.path), (), True, self.enforced_patterns), PassThrough
            )
        )

    def judging(self, route: Route) -> Route:
        """The route that judges paths of this route: the first enforced match, else the first match."""
        for routes in (self.enforced, self.settings.gate.routes):
            patterns = tuple(one.path for one in routes)
            verdict = classify("POST", _spelled(route.path), (), True, patterns)
            if isinstance(verdict, Gated):
                return routes[verdict.index]
        return route


def _spelled(pattern: RoutePattern) -> str:
    """A path that the pattern matches.

    An asterisk fills its names, because no other pattern can spell one.
    """
    return "/" + "/".join("*" if segment[0] == "{" else segment for segment in pattern.segments)


class Live:
    """The snapshot in force. Only a reload replaces it."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
