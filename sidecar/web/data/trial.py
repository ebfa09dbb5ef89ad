"""Judges one request as the data listener does, without a client, a store or a backend.

Every step is the function that the data listener calls, in the same order: the parser, `malformed`,
`course_of`; then `read_gated`, or `upgrade_refusal`, `treatment` and `uncarried`. The trial ends where the
store would be asked.
"""

from __future__ import annotations

from dataclasses import dataclass

from sidecar.core.facts import Claims
from sidecar.core.target import LOOKING, Gated, PassThrough, Rejected, classify
from sidecar.core.unlisted import Access, Treatment, not_listed
from sidecar.errors import Refusal
from sidecar.gate.messages import GatedRequest
from sidecar.gate.places import Places
from sidecar.live.snapshot import Snapshot
from sidecar.settings.routes import Route
from sidecar.web.api.scopes import ScopeApi
from sidecar.web.data._reading import course_of, read_gated
from sidecar.web.data.passthrough import uncarried, upgrade_refusal
from sidecar.web.serving.body import Taken
from sidecar.web.serving.dataconnection import request_of
from sidecar.web.serving.datarequest import DataRequest
from sidecar.web.serving.hosts import malformed

# The reason why most routes do not take a request.
ANOTHER_PATH = "another path"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What the data listener finds out about a request before the store is asked.

    `route` takes the request; it is None if the request is not gated, or cannot be judged. `claims` are the
    facts that were read. `refusal` ends the request; on a route in shadow mode it is only recorded.
    `unlisted` says what becomes of a request that is not gated, and which key of `gate.unlisted` says so.
    `others` holds the other routes, each with the reason why it does not take the request.
    """

    is_gated: bool = False
    is_own_call: bool = False
    route: Route | None = None
    shadow: bool = False
    claims: Claims | None = None
    refusal: Refusal | None = None
    unlisted: tuple[Treatment, Access] | None = None
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
        refusal = unnamed or upgrade_refusal(request)
        return Trial(refusal=refusal, others=others) if refusal else _passing(request, snapshot, others)
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


def _passing(request: DataRequest, snapshot: Snapshot, others: tuple[tuple[Route, str], ...]) -> Trial:
    """The trial of a request that no route takes."""
    if snapshot.unlisted is None:
        treatment: Treatment = "pass"
        access: Access = "reads" if request.method in LOOKING else "writes"
    else:
        headers = request.fields.deciding()
        treatment, access = snapshot.unlisted.treatment(request.method, request.target, headers)
    refusal = not_listed(request.method, access) if treatment == "refuse" else uncarried(request.fields)
    return Trial(refusal=refusal, unlisted=(treatment, access), others=others)


def _why_not(request: DataRequest, route: Route, winner: Route | None, snapshot: Snapshot) -> str:
    """Why a route does not take a request: what would become of the request if no other route existed."""
    gate = snapshot.settings.gate.model_copy(update={"routes": (route,)})
    alone = Snapshot(snapshot.settings.model_copy(update={"gate": gate}), None)
    course = course_of(request, alone)
    verdict = None if course is None else course.verdict
    if isinstance(verdict, Gated):
        return "another route wins" if winner is None else f"{winner.label} goes first"
    if isinstance(verdict, Rejected) and verdict.refusal.code != "method_not_allowed":
        return f"{verdict.refusal.code}: {verdict.refusal.message}"
    paths, target = alone.gated_paths, request.target
    verdicts = [classify(method, target, (), method not in LOOKING, paths) for method in route.methods]
    if all(isinstance(verdict, PassThrough) for verdict in verdicts):
        return ANOTHER_PATH
    return f"{request.method} is not among its methods"
