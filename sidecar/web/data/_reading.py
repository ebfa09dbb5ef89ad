"""Reads a gated request: which route it takes, what it claims, and which bytes go on to the backend."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import parse_qsl

from sidecar.core.bodies import JSON_READINGS, Reading
from sidecar.core.bounds import incomplete
from sidecar.core.command import RequestLine
from sidecar.core.facts import FactSources, Request, read
from sidecar.core.idempotency import KEY_RULE, Claim, claim_of, is_key
from sidecar.core.instant import SECOND
from sidecar.core.target import Gated, PassThrough, Rejected, classify
from sidecar.core.valueclass import valueclass
from sidecar.errors import Refusal
from sidecar.gate.messages import GatedRequest, RequestFacts
from sidecar.gate.places import Place
from sidecar.ids import new_trace_ids
from sidecar.live.snapshot import Snapshot, leaves
from sidecar.settings.routes import GateSection, Route
from sidecar.telemetry.tracing import trace_ids
from sidecar.web.data.passthrough import target_bytes, uncarried
from sidecar.web.serving.body import FORM_PARSED_AT_ONCE, PARSED_AT_ONCE, Taken, read_body
from sidecar.web.serving.datarequest import DataRequest
from sidecar.web.wire.headers import HeaderFields, JudgedHeaders
from sidecar.web.wire.request import request_id_of, shown_tenant, tenant_for

# The headers that determine how a body is read.
FRAMING = frozenset({"content-type", "content-length", "content-encoding", "transfer-encoding"})
IDEMPOTENCY_KEY = b"idempotency-key"


@valueclass
class Course:
    """The classification of a gated request: its verdict, its route, and whether that is in shadow mode."""

    verdict: Gated | Rejected
    route: Route | None
    shadow: bool


def course_of(request: DataRequest, snapshot: Snapshot) -> Course | None:
    """The classification of a request. None: it is not gated, or only reads.

    A request that an enforced route matches in any reading is enforced, even if other routes match it.
    """
    method, target, headers = request.method, request.target, request.fields.deciding()
    has_body = request.body_exists
    verdict = classify(method, target, headers, has_body, snapshot.gated_paths)
    if isinstance(verdict, PassThrough):
        return None
    routes, shadow = snapshot.settings.gate.routes, False
    if len(snapshot.enforced) < len(routes):
        enforced = classify(method, target, headers, has_body, snapshot.enforced_paths)
        # A method that no enforced route lists may be listed by a route in shadow mode.
        if isinstance(enforced, PassThrough) or (isinstance(verdict, Gated) and leaves(enforced)):
            shadow = True
        elif not (leaves(verdict) and leaves(enforced)):
            verdict, routes = enforced, snapshot.enforced
    route = routes[verdict.index] if isinstance(verdict, Gated) else None
    return Course(verdict=verdict, route=route, shadow=shadow)


def facts_of(request: DataRequest, course: Course | None, snapshot: Snapshot) -> RequestFacts:
    """The facts for a record that a request shows without its body: its tenant, its id and its route, or its
    method and path if no route lists it."""
    fields = request.fields
    return RequestFacts(
        tenant_id=shown_tenant(request.principal, fields, snapshot.settings.gate.tenant_header),
        request_id=request_id_of(fields),
        principal=request.principal,
        route=None if course is None or course.route is None else course.route.label,
        policies=snapshot.policies,
        line=RequestLine(request.method, request.path) if course is None else None,
    )


async def read_gated(
    request: DataRequest, course: Course, snapshot: Snapshot, taken: Taken, place: Place
) -> GatedRequest | Refusal:
    """Read the body of a gated request and what it claims, or say why it cannot be judged.

    `taken` gets the bytes that were read, and `place` counts them.
    """
    assert isinstance(course.verdict, Gated)
    assert course.route is not None
    sources, bounds, fields = course.route.sources, snapshot.settings.gate, request.fields
    unfit = uncarried(fields)
    if unfit is not None:
        return unfit
    body = await read_body(
        request,
        fields,
        bodies=course.route.bodies,
        max_bytes=bounds.max_body_bytes,
        timeout_seconds=bounds.body_timeout_seconds,
        taken=taken,
        held=place,
    )
    if isinstance(body, Refusal):
        return body
    raw, reading, values = body
    tenant = tenant_for(request.principal, fields, bounds.tenant_header)
    if isinstance(tenant, Refusal):
        return tenant
    if tenant is None:
        name = bounds.tenant_header
        return Refusal("invalid_request", f"{name} must name one tenant.", {"member": f"header:{name}"})
    given = _places_of_facts(request.target, fields, course.verdict, sources, reading, values, len(raw))
    if isinstance(given, Refusal):
        return given
    judged = _judged_headers(sources.header_names, bounds.tenant_header)
    twins = judged.twin_in(fields)
    if twins is not None:
        message = f"The header {twins[0]} could be read as {twins[1]}."
        return Refusal("invalid_request", message, {"member": f"header:{twins[0]}"})
    # Each key or name is looked at, which takes long where there are many.
    at_once = len(raw) <= (FORM_PARSED_AT_ONCE if reading == "form" else PARSED_AT_ONCE)
    claims = read(given, sources) if at_once else await asyncio.to_thread(read, given, sources)
    if isinstance(claims, Refusal):
        return claims
    missing = incomplete(claims) if course.shadow else None
    if missing is not None:
        return missing  # recorded, and passed through unchanged
    request_id = request_id_of(fields)
    facts = RequestFacts(
        claims=claims,
        tenant_id=tenant,
        request_id=request_id,
        principal=request.principal,
        route=course.route.label,
        policies=snapshot.policies,
    )
    body_sha256 = hashlib.sha256(raw).hexdigest()
    claim: Claim | None = None
    if IDEMPOTENCY_KEY in fields.places:
        found = _claim_of(request, facts, body_sha256, bounds)
        if isinstance(found, Refusal):
            return found
        # A shadow route forwards every request.
        claim = None if course.shadow else found
    headers, ids = _upstream_headers(
        fields, judged, request_id, request.withheld, annotated=bounds.annotate_response
    )
    trace = request.trace
    return GatedRequest(
        facts=facts,
        method=request.method,
        target=target_bytes(request.target),
        headers=headers,
        body=raw,
        body_sha256=body_sha256,
        route=course.route,
        snapshot=snapshot,
        place=place,
        shadow=course.shadow,
        claim=claim,
        log_fields=trace.ids or ids,
        trace=trace,
    )


def _places_of_facts(
    target: str,
    fields: HeaderFields,
    gated: Gated,
    sources: FactSources,
    reading: Reading,
    values: Any,
    size: int,
) -> Request | Refusal:
    """The parts of a request that may hold facts. The query is read in any case, because it must be UTF-8."""
    path, _, query = target.partition("?")
    opaque = reading not in JSON_READINGS
    try:
        pairs = parse_qsl(query, keep_blank_values=True, errors="strict") if query else ()
    except UnicodeDecodeError:
        return Refusal("invalid_request", "The query is not UTF-8.", {"member": "query"})
    return Request(
        document={} if opaque else values,
        body_bytes=size,
        opaque=opaque,
        form=values if reading == "form" else None,
        path=path,
        path_params=gated.path_params,
        query=pairs,
        headers=_headers_with_facts(fields, sources.header_names) if sources.header_names else (),
    )


def _headers_with_facts(fields: HeaderFields, names: Collection[str]) -> list[tuple[str, str]]:
    return [(name, text) for name in names for text in fields.texts(name.encode())]


@lru_cache(maxsize=256)  # routes and tenant headers of the configuration, of which there are few
def _judged_headers(of_facts: frozenset[str], tenant_header: str | None) -> JudgedHeaders:
    named = {IDEMPOTENCY_KEY.decode()} | ({tenant_header.lower()} if tenant_header else set())
    return JudgedHeaders(of_facts | named, FRAMING)


def _claim_of(
    request: DataRequest, facts: RequestFacts, body_sha256: str, bounds: GateSection
) -> Claim | Refusal:
    """The claim of a request to the idempotency key that it names."""
    keys = request.fields.texts(IDEMPOTENCY_KEY)
    if len(keys) != 1 or not is_key(keys[0]):
        message = f"Idempotency-Key must be one header of {KEY_RULE}."
        return Refusal("invalid_request", message, {"member": "header:Idempotency-Key"})
    return claim_of(
        keys[0],
        principal=facts.principal.id,
        tenant_id=facts.tenant_id,
        route=facts.route or "",
        method=request.method,
        target=target_bytes(request.target),
        body_sha256=body_sha256,
        claims=facts.claims,
        kept_for=bounds.idempotency_ttl * SECOND,
    )


def _upstream_headers(
    fields: HeaderFields,
    judged: JudgedHeaders,
    request_id: str,
    withheld: Collection[int],
    *,
    annotated: bool,
) -> tuple[list[tuple[bytes, bytes]], Mapping[str, str]]:
    """The headers for the backend, and the ids of the trace that they name. The client of the backend adds
    the length of a body that came in chunks."""
    # A header that was judged must reach the backend, even if Connection names it as hop-by-hop.
    ended = fields.ended_by_connection() - judged.kept
    if annotated:
        ended |= {b"accept-encoding"}
    headers = fields.forwarded(ended=ended, ours=False, without=withheld)
    if annotated:
        headers.append((b"Accept-Encoding", b"identity"))
    if b"x-request-id" not in fields.places or b"x-request-id" in ended:
        headers.append((b"X-Request-Id", request_id.encode("utf-8")))
    traceparent = None if b"traceparent" in ended else fields.text(b"traceparent")
    if traceparent is not None:
        return headers, trace_ids(traceparent)
    trace_id, span_id = new_trace_ids()
    headers.append((b"traceparent", f"00-{trace_id}-{span_id}-01".encode()))
    return headers, {"trace_id": trace_id, "span_id": span_id}
