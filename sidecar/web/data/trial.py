"""Judges one request as the data listener does, without a client, a store or a backend.

Every step is the function that the data listener calls, in the same order: the parser, `malformed`,
`course_of`, `upgrade_refusal` and `uncarried`, or `read_gated`. The trial ends where the store would be
asked.
"""

from __future__ import annotations

from dataclasses import dataclass

from sidecar.core.facts import Claims
from sidecar.core.target import Gated, PassThrough, Rejected, classify
from sidecar.errors import Refusal
from sidecar.gate.messages import GatedRequest
from sidecar.gate.places import Places
from sidecar.live.snapshot import Snapshot
from sidecar.settings.sections import Route
from sidecar.web.api.scopes import ScopeApi
from sidecar.web.data._reading import course_of, read_gated
from sidecar.web.data.passthrough import uncarried, upgrade_refusal
from sidecar.web.serving.body import Taken
from sidecar.web.serving.dataconnection import request_of
from sidecar.web.serving.datarequest import DataRequest
from sidecar.web.serving.hosts import malformed


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What the data listener finds out about a request before the store is asked.

    `route` takes the request; it is None if the request is not gated, or cannot be judged. `claims` are the
    facts that were read. `refusal` ends the request; on a route in shadow mode it is only recorded. `others`
    holds the other routes, each with the reason why it does not take the request.
    """

    is_gated: bool = False
    is_own_call: bool = False
    route: Route | None = None
    shadow: bool = False
    claims: Claims | None = None
    refusal: Refusal | None = None
    others: tuple[tuple[Route, str], ...] = ()


async def tried(raw: bytes, snapshot: Snapshot) -> Trial:
    """Judge the request in these bytes: head and body, as a client sends them.

    The policies of the snapshot are not asked.
    """
    request = request_of(raw)
    if isinstance(request, Refusal):
        return Trial(refusal=request)
    if snapshot.settings.scopes.serve_on == "data" and ScopeApi.owns(request.target):
        return Trial(is_own_call=True)
    unnamed = malformed(request, request.fields)
    course = course_of(request, snapshot)
    route = None if course is None else course.route
    others = tuple(
        (other, _why_not(request, other, route, snapshot))
        for other in snapshot.settings.gate.routes
        if other is not route
    )
    if course is None:
        return Trial(
            refusal=unnamed or upgrade_refusal(request) or uncarried(request.fields),
            others=others,
        )
    claims: Claims | None = None
    refusal = unnamed
    if refusal is None and isinstance(course.verdict, Rejected):
        refusal = course.verdict.refusal
    if refusal is None:
        place = Places(lambda taken: None).take(1)
        assert place is not None
        gated = await read_gated(request, course, snapshot, Taken(), place)
        if isinstance(gated, GatedRequest):
            claims = gated.facts.claims
        else:
            refusal = gated
    return Trial(
        is_gated=True,
        route=route,
        shadow=course.shadow and unnamed is None,
        claims=claims,
        refusal=refusal,
        others=others,
    )


def _why_not(request: DataRequest, route: Route, winner: Route | None, snapshot: Snapshot) -> str:
    """Why a route does not take a request: what would become of the request if no other route existed."""
    gate = snapshot.settings.gate.model_copy(update={"routes": (route,)})
    alone = Snapshot(snapshot.settings.model_copy(update={"gate": gate}), None)
    course = course_of(request, alone)
    verdict = None if course is None else course.verdict
    if isinstance(verdict, Gated):
        return "another route wins" if winner is None else f"shadowed by {winner.path.text}"
    if isinstance(verdict, Rejected) and verdict.refusal.code != "method_not_allowed":
        return f"{verdict.refusal.code}: {verdict.refusal.message}"
    paths = alone.gated_paths
    if isinstance(classify("POST", request.target, (), True, paths), PassThrough):
        return "another path"
    return f"{request.method} is not among its methods"
