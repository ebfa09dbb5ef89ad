"""Reads a gated request: which route it takes, what it claims, and which bytes go on to the backend."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import parse_qsl

from sidecar.core.bounds import incomplete
from sidecar.core.facts import Claims, FactSources, Request, read
from sidecar.core.target import Gated, PassThrough, Rejected, RoutePattern, classify, read_as
from sidecar.errors import Refusal
from sidecar.gate.messages import GatedRequest, RequestFacts
from sidecar.gate.places import Place
from sidecar.ids import new_traceparent
from sidecar.live.snapshot import Snapshot
from sidecar.settings.sections import GateSection, Route
from sidecar.telemetry.tracing import trace_ids
from sidecar.web.data.passthrough import target_bytes, uncarried
from sidecar.web.serving.body import PARSED_AT_ONCE, Taken, read_json
from sidecar.web.serving.datarequest import DataRequest
from sidecar.web.wire.headers import end_to_end, value_of, without_our_own
from sidecar.web.wire.request import request_id_of, tenant_of

# The headers that determine how a body is read.
FRAMING = frozenset({"content-type", "content-length", "content-encoding", "transfer-encoding"})


@dataclass(frozen=True, slots=True)
class Course:
    """The classification of a gated request: its verdict, its route, and whether that is in shadow mode."""

    verdict: Gated | Rejected
    route: Route | None
    shadow: bool


def course_of(request: DataRequest, target: str, snapshot: Snapshot) -> Course | None:
    """The classification of a request. None: it is not gated, or only reads.

    A request that an enforced route matches in any reading is enforced, even if other routes match it.
    """

    def verdict_by(patterns: Sequence[RoutePattern]) -> PassThrough | Gated | Rejected:
        return classify(request.method, target, request.headers.items(), request.body_exists, patterns)

    verdict, routes, shadow = verdict_by(snapshot.patterns), snapshot.settings.gate.routes, False
    if isinstance(verdict, PassThrough):
        return None
    if len(snapshot.enforced) < len(routes):
        enforced = verdict_by(snapshot.enforced_patterns)
        if isinstance(enforced, PassThrough):
            shadow = True
        else:
            verdict, routes = enforced, snapshot.enforced
    return Course(verdict, routes[verdict.index] if isinstance(verdict, Gated) else None, shadow)


def facts_of(request: DataRequest, snapshot: Snapshot) -> RequestFacts:
    """The facts for a record that a request shows without its body: its tenant and its id."""
    return RequestFacts(
        tenant_id=tenant_of(request, snapshot.settings.gate.tenant_header) or "default",
        request_id=request_id_of(request),
        policies=snapshot.policies,
    )


async def read_gated(
    request: DataRequest, target: str, course: Course, snapshot: Snapshot, taken: Taken, place: Place
) -> GatedRequest | Refusal:
    """Read the body of a gated request and what it claims, or say why it cannot be judged.

    `taken` gets the bytes that were read, and `place` counts them.
    """
    assert isinstance(course.verdict, Gated)
    assert course.route is not None
    gated, sources, bounds = course.verdict, course.route.sources, snapshot.settings.gate
    unfit = uncarried(request)
    if unfit is not None:
        return unfit
    body = await read_json(
        request,
        max_bytes=bounds.max_body_bytes,
        timeout_seconds=bounds.body_timeout_seconds,
        taken=taken,
        held=place,
    )
    if isinstance(body, Refusal):
        return body
    raw, document = body
    tenant = tenant_of(request, bounds.tenant_header)
    if tenant is None:
        name = bounds.tenant_header
        return Refusal("invalid_request", f"{name} must name one tenant.", {"member": f"header:{name}"})
    query = target.partition("?")[2]
    try:
        facts = Request(
            document=document,
            body_bytes=len(raw),
            path_params=gated.path_params,
            query=parse_qsl(query, keep_blank_values=True, errors="strict") if query else (),
            headers=[(name.lower(), value) for name, value in request.headers.items()],
        )
    except UnicodeDecodeError:
        return Refusal("invalid_request", "The query is not UTF-8.", {"member": "query"})
    judged_headers = _judged_headers(sources, bounds.tenant_header)
    claims: Claims | Refusal | None = _twin_of_a_judged_header(request, judged_headers)
    if claims is None and len(raw) > PARSED_AT_ONCE:
        # Each key is looked at, which takes long where there are many.
        claims = await asyncio.to_thread(read, facts, sources)
    elif claims is None:
        claims = read(facts, sources)
    if isinstance(claims, Refusal):
        return claims
    missing = incomplete(claims) if course.shadow else None
    if missing is not None:
        return missing  # recorded, and passed through unchanged
    request_id = request_id_of(request)
    headers = _upstream_headers(request, judged_headers, raw, request_id, bounds)
    trace = request.trace
    return GatedRequest(
        facts=RequestFacts(
            claims=claims,
            tenant_id=tenant,
            request_id=request_id,
            policies=snapshot.policies,
        ),
        method=request.method,
        target=target_bytes(target),
        headers=headers,
        body=raw,
        body_sha256=hashlib.sha256(raw).hexdigest(),
        cost_source=sources.cost,
        snapshot=snapshot,
        place=place,
        shadow=course.shadow,
        log_fields=trace.ids or trace_ids((value_of(headers, b"traceparent") or b"").decode("latin-1")),
        trace=trace,
    )


def _judged_headers(sources: FactSources, tenant_header: str | None) -> set[str]:
    named = {source.name for source in sources.of_the_request if source.kind == "header"}
    return named | ({tenant_header.lower()} if tenant_header else set())


def _twin_of_a_judged_header(request: DataRequest, judged_headers: set[str]) -> Refusal | None:
    """Refuse a header that differs from a judged one only in punctuation, because CGI reads both alike."""
    judged = {read_as(name): name for name in judged_headers | FRAMING}
    for name in request.headers:
        twin = judged.get(read_as(name))
        if twin is not None and twin != name.lower():
            message = f"The header {name} could be read as {twin}."
            return Refusal("invalid_request", message, {"member": f"header:{name}"})
    return None


def _upstream_headers(
    request: DataRequest, judged_headers: set[str], body: bytes, request_id: str, bounds: GateSection
) -> list[tuple[bytes, bytes]]:
    # A header that was judged must reach the backend, even if Connection names it as hop-by-hop.
    headers = without_our_own(
        end_to_end(request.raw_headers, kept={name.encode() for name in judged_headers})
    )
    if bounds.annotate_response:
        headers = [(name, value) for name, value in headers if name.lower() != b"accept-encoding"]
        headers.append((b"Accept-Encoding", b"identity"))
    if value_of(headers, b"content-length") is None:
        headers.append((b"Content-Length", b"%d" % len(body)))
    if value_of(headers, b"x-request-id") is None:
        headers.append((b"X-Request-Id", request_id.encode("utf-8")))
    if value_of(headers, b"traceparent") is None:
        headers.append((b"traceparent", new_traceparent().encode()))
    return headers
