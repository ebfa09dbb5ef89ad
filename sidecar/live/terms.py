"""What requests are judged and carried by, as one value that never changes; a reload makes another one.

A request takes the terms once, when it begins, and keeps them to its end; so none is judged by a mixture.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256

from sidecar.core.policy import PolicySet
from sidecar.core.target import Gated, PassThrough, RoutePattern, classify
from sidecar.settings.sections import Route, Settings


@dataclass(frozen=True)
class Terms:
    """The configuration and the policies of one moment. Without policies everything gated is refused."""

    settings: Settings
    policies: PolicySet | None

    @cached_property
    def revision(self) -> str:
        """Of the configuration: the beginning of a SHA-256 over all its values."""
        return sha256(self.settings.model_dump_json().encode()).hexdigest()[:16]

    @cached_property
    def patterns(self) -> tuple[RoutePattern, ...]:
        """What is gated, route by route."""
        return tuple(route.path for route in self.settings.gate.routes)

    @cached_property
    def enforced(self) -> tuple[Route, ...]:
        """The routes that refuse; on the others it is only recorded what would have been refused."""
        return tuple(route for route in self.settings.gate.routes if route.mode == "enforce")

    @cached_property
    def enforced_patterns(self) -> tuple[RoutePattern, ...]:
        return tuple(route.path for route in self.enforced)

    @cached_property
    def shadow_routes(self) -> tuple[Route, ...]:
        """The routes that refuse nothing: in shadow mode, and no enforced one matches what they match."""
        return tuple(
            route
            for route in self.settings.gate.routes
            if route.mode == "shadow"
            and isinstance(
                classify("POST", _spelled(route.path), (), True, self.enforced_patterns), PassThrough
            )
        )

    def judging(self, route: Route) -> Route:
        """The route that judges what spells this one: the enforced go first, then the first that matches."""
        for routes in (self.enforced, self.settings.gate.routes):
            patterns = tuple(one.path for one in routes)
            verdict = classify("POST", _spelled(route.path), (), True, patterns)
            if isinstance(verdict, Gated):
                return routes[verdict.index]
        return route


def _spelled(pattern: RoutePattern) -> str:
    """A path that a pattern matches. No pattern has an asterisk, so what fills its names is no other's."""
    return "/" + "/".join("*" if segment[0] == "{" else segment for segment in pattern.segments)


class Live:
    """The terms in force. Only a reload replaces them."""

    def __init__(self, terms: Terms) -> None:
        self.terms = terms
