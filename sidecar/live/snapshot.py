"""A snapshot: the configuration and policies that apply to a request, as one immutable value.

A reload creates a new snapshot. A request reads the snapshot once, when it begins, and keeps it to its end.
No request is therefore judged by a mixture of two versions.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256

from sidecar.auth.methods import NO_METHODS, Methods
from sidecar.core.policy import PolicySet
from sidecar.core.target import LOOKING, Gated, GatedPaths, PassThrough, Rejected, classify
from sidecar.core.unlisted import ExceptedPaths, Unlisted
from sidecar.settings.routes import Route
from sidecar.settings.sections import Settings


@dataclass(frozen=True)
class Snapshot:
    """The configuration, the policies and the methods of authentication of one moment.

    Without policies, every gated request is refused. Without methods, every caller is anonymous.
    """

    settings: Settings
    policies: PolicySet | None
    methods: Methods = NO_METHODS

    @cached_property
    def revision(self) -> str:
        """The revision of the configuration: the first 16 hex digits of a SHA-256 over all its values."""
        return sha256(self.settings.model_dump_json().encode()).hexdigest()[:16]

    @cached_property
    def gated_paths(self) -> GatedPaths:
        """The paths of all routes, in their order."""
        return _paths_of(self.settings.gate.routes)

    @cached_property
    def enforced(self) -> tuple[Route, ...]:
        """The routes in enforce mode. On the other routes, refusals are only recorded."""
        return tuple(route for route in self.settings.gate.routes if route.mode == "enforce")

    @cached_property
    def enforced_paths(self) -> GatedPaths:
        return _paths_of(self.enforced)

    @cached_property
    def unlisted(self) -> Unlisted | None:
        """How requests are treated that no route lists. None: all of them pass, and nothing is recorded."""
        section = self.settings.gate.unlisted
        if section.reads == section.writes == "pass":
            return None
        return Unlisted(section.reads, section.writes, ExceptedPaths(section.excepted))

    @cached_property
    def shadow_routes(self) -> tuple[Route, ...]:
        """The routes that refuse nothing: routes in shadow mode that no enforced route overlaps."""
        return tuple(
            route
            for route in self.settings.gate.routes
            if route.mode == "shadow"
            and all(leaves(self._verdict(route, method, self.enforced_paths)) for method in route.methods)
        )

    def judging(self, route: Route) -> Route:
        """The route that judges paths of this route: the first enforced match, else the first match."""
        for routes, paths in (
            (self.enforced, self.enforced_paths),
            (self.settings.gate.routes, self.gated_paths),
        ):
            verdict = self._verdict(route, route.methods[0], paths)
            if isinstance(verdict, Gated):
                return routes[verdict.index]
        return route

    @staticmethod
    def _verdict(route: Route, method: str, paths: GatedPaths) -> PassThrough | Gated | Rejected:
        """The verdict on a request for the first path of a route.

        An asterisk fills its variables, because no other pattern can spell one.
        """
        return classify(method, route.path.patterns[0].filled("*"), (), method not in LOOKING, paths)


def leaves(enforced: PassThrough | Gated | Rejected) -> bool:
    """Whether enforced routes, by their verdict, leave a request to routes in shadow mode.

    They do if they let it pass, and if they refuse it only because none of them lists its method.
    """
    return isinstance(enforced, PassThrough) or (
        isinstance(enforced, Rejected) and enforced.refusal.code == "method_not_allowed"
    )


def _paths_of(routes: Iterable[Route]) -> GatedPaths:
    return GatedPaths(route.calls for route in routes)


class Live:
    """The snapshot in force. Only a reload replaces it."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
