"""The data listener: it judges a request, answers it itself, or passes it through unchanged.

The raw request target decides which, because a router would normalise it first.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast
from urllib.parse import parse_qsl

from aiohttp import web

from sidecar.core.bounds import Case, judge
from sidecar.core.facts import Claims, FactSources, Request, read
from sidecar.core.target import Gated, PassThrough, Rejected, RoutePattern, classify, read_as
from sidecar.errors import Refusal, StoreUnavailable, unavailable
from sidecar.gate import deadlines
from sidecar.gate.execution import Gate
from sidecar.gate.messages import Forwarded, Judged, Undelivered
from sidecar.gate.places import Place
from sidecar.gate.refusal_log import Asked, Refused
from sidecar.ids import new_traceparent
from sidecar.live.terms import Live, Terms
from sidecar.settings.sections import Gate as GateSettings
from sidecar.settings.sections import Route
from sidecar.telemetry.metrics import Metrics, trace_ids
from sidecar.telemetry.tracing import Tracing
from sidecar.web.api.scopes import ScopeApi
from sidecar.web.data import passthrough
from sidecar.web.data.annotate import annotated
from sidecar.web.data.answers import RawAnswer
from sidecar.web.serving.accesslog import AccessLog, visit_of
from sidecar.web.serving.body import PARSED_AT_ONCE, Taken, read_json
from sidecar.web.serving.connections import DataConnection, broken_body
from sidecar.web.serving.hosts import Guard, malformed
from sidecar.web.wire.headers import end_to_end, value_of, without_our_own
from sidecar.web.wire.problem import problem, refused_problem
from sidecar.web.wire.request import request_id_of, tenant_of

logger = logging.getLogger("scopegate.web")


# The headers that determine how a body is read.
FRAMING = frozenset({"content-type", "content-length", "content-encoding", "transfer-encoding"})


@dataclass(frozen=True, slots=True)
class Course:
    """The classification of a gated request: its verdict, its route, and whether that is in shadow mode."""

    verdict: Gated | Rejected
    route: Route | None
    shadow: bool


class DataPlane:
    """The handler of the data listener."""

    def __init__(
        self,
        *,
        gate: Gate,
        passing: passthrough.PassThrough,
        scopes: ScopeApi | None,
        live: Live,
        metrics: Metrics,
        access: AccessLog,
        tracing: Tracing,
    ) -> None:
        self._gate = gate
        self._passing = passing
        self._scopes = scopes
        self._live = live
        self._guard = Guard("data", live)
        self._metrics = metrics
        self._access = access
        self._tracing = tracing

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request. An unexpected error is logged and answered with 500, never forwarded."""
        self._access.begin(request)
        try:
            answer = await self._route(request)
        except StoreUnavailable as exc:
            answer = self._failed(request, unavailable(exc))
        except ConnectionError:
            answer = passthrough.client_left()
        except asyncio.CancelledError:
            self._access.ended(request, None)
            raise
        except Exception:
            logger.exception("a request failed", extra={"method": request.method})
            refusal = Refusal("internal_error", "The sidecar failed; nothing more was forwarded.")
            answer = self._failed(request, refusal)
        if self._gate.draining or cast(DataConnection, request.protocol).ending:
            answer.force_close()
        return answer

    @staticmethod
    def _failed(request: web.BaseRequest, refusal: Refusal) -> web.StreamResponse:
        """The answer after a fault: a problem, or a cut if the head of another answer has already been sent.

        A second head would become part of the first answer's body.
        """
        return passthrough.broken_off(request) if request.writer.output_size > 0 else problem(refusal)

    async def _route(self, request: web.BaseRequest) -> web.StreamResponse:
        target = request._message.path  # the raw target, because yarl has changed every public form
        visit = visit_of(request)
        if self._scopes is not None and self._scopes.owns(target):
            visit.route = "scopes"
            foreign = self._guard.refusal(request)
            if foreign is not None:
                return await self._scopes.refuse(request, target, request_id_of(request), foreign)
            return await self._scopes.handle(request, target, request_id_of(request))
        unnamed = malformed(request)
        terms = self._live.terms
        course = _course(request, target, terms)
        if course is None:
            if unnamed is not None:
                self._metrics.passed.labels(unnamed.code).inc()
                return problem(unnamed)
            switching = passthrough.upgrade_refusal(request)
            if switching is not None:
                return problem(switching)
            return await self._passing.carry(request, _bytes(target))
        visit.route = "gated"
        visit.trace = self._tracing.begin(
            method=request.method,
            path=visit.path,
            route=None if course.route is None else course.route.path.text,
            headers=request.raw_headers,
            begun=visit.begun,
        )
        visit.trace_id = visit.trace.ids.get("trace_id", visit.trace_id)
        try:
            async with asyncio.timeout(deadlines.judging_seconds(terms.settings)) as visit.deadline:
                if unnamed is not None:
                    # Shadow routes refuse it too, because the backend would choose where it goes.
                    visit.trace.over("judge", visit.begun)
                    asked = _asked(request, terms)
                    refused = await self._gate.refusals.refuse(unnamed, asked)
                    return refused_problem(refused, asked.request_id or "")
                if isinstance(course.verdict, Rejected):
                    visit.trace.over("judge", visit.begun)
                    return await self._refuse(request, target, course, course.verdict.refusal, terms, Taken())
                return await self._judge(request, target, course, terms)
        except TimeoutError:
            if visit.deadline is None or not visit.deadline.expired():
                raise
        return self._given_up(request, terms)

    # A gated request ---------------------------------------------------------------------------

    def _given_up(self, request: web.BaseRequest, terms: Terms) -> web.StreamResponse:
        """The outer deadline passed, which is not the request's fault. Nothing of it was forwarded: the gate
        ends what it has begun before that."""
        asked = _asked(request, terms)
        logger.error("a gated request was not decided in time", extra={"request_id": asked.request_id})
        refused = self._gate.refusals.undecided("it was not decided in time", asked)
        return refused_problem(refused, asked.request_id or "")

    async def _refuse(
        self,
        request: web.BaseRequest,
        target: str,
        course: Course,
        refusal: Refusal,
        terms: Terms,
        taken: Taken,
    ) -> web.StreamResponse:
        """Refuse a request that cannot be judged. On a shadow route, record that and pass it through."""
        asked = _asked(request, terms)
        request_id = asked.request_id or ""
        retry_after = None
        if course.shadow:
            unfit = (
                passthrough.upgrade_refusal(request) or passthrough.uncarried(request) or broken_body(request)
            )
            unready = self._gate.unready(terms)
            if unfit is None and unready is None:
                recorded = await self._gate.refusals.pass_over(refusal, asked)
                if isinstance(recorded, Refused):
                    return refused_problem(recorded, request_id)
                visit_of(request).decision_id = recorded
                visit_of(request).extend(None)
                return await self._passing.carry(
                    request, _bytes(target), passthrough.Recorded(recorded, taken)
                )
            if unfit is not None:
                refusal = unfit
            elif unready is not None:
                refusal, retry_after = unready
        refused = await self._gate.refusals.refuse(refusal, asked, retry_after=retry_after)
        allow = course.verdict.allow if isinstance(course.verdict, Rejected) else ()
        return refused_problem(refused, request_id, allow=allow)

    async def _judge(
        self, request: web.BaseRequest, target: str, course: Course, terms: Terms
    ) -> web.StreamResponse:
        taken, visit = Taken(), visit_of(request)
        place = self._gate.enter(terms)
        if not isinstance(place, Place):
            # The gate has no place for the request, so its body is not read.
            visit.trace.over("judge", visit.begun)
            asked = _asked(request, terms)
            refused = await self._gate.refusals.refuse(place[0], asked, retry_after=place[1])
            return refused_problem(refused, asked.request_id or "")
        judged: Judged | Refusal | None = None
        try:
            judged = await self._read(request, target, course, terms, taken, place)
        finally:
            # A refusal may have to wait for its summary; it must not hold a place meanwhile.
            if not isinstance(judged, Judged):
                place.leave()
        visit.trace.over("judge", visit.begun)
        self._metrics.judge.observe(time.perf_counter() - visit.begun)
        if isinstance(judged, Refusal):
            if not course.shadow:
                taken.pieces.clear()
                del place  # gives back the memory that it counts
            return await self._refuse(request, target, course, judged, terms, taken)
        visit.request_id, visit.scope_id = judged.request_id, judged.claims.scope_id
        visit.trace_id = judged.log_fields.get("trace_id")
        visit.extend(deadlines.executing_seconds(judged) + deadlines.judging_seconds(terms.settings))
        try:
            outcome = await self._gate.execute(judged)
        finally:
            if not judged.place.carried:
                judged.place.leave()
        visit.extend(None)
        if isinstance(outcome, Refused):
            return refused_problem(outcome, judged.request_id)
        if isinstance(outcome, Undelivered):
            return problem(
                outcome.refusal,
                request_id=judged.request_id,
                decision_id=outcome.decision_id,
                headers={name.decode(): value.decode() for name, value in self._told(outcome)},
            )
        return await self._answer(request, judged, outcome)

    async def _read(
        self, request: web.BaseRequest, target: str, course: Course, terms: Terms, taken: Taken, place: Place
    ) -> Judged | Refusal:
        assert isinstance(course.verdict, Gated)
        assert course.route is not None
        gated, sources, bounds = course.verdict, course.route.sources, terms.settings.gate
        uncarried = passthrough.uncarried(request)
        if uncarried is not None:
            return uncarried
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
        if course.shadow and (claims.incident_id is None or claims.action is None):
            # A scope or a brake cannot judge a request without these claims, so it passes through unchanged.
            too_little = judge(Case(claims, tenant, None, None, now=0))
            assert too_little is not None
            return too_little
        request_id = request_id_of(request)
        headers = _upstream_headers(request, judged_headers, raw, request_id, bounds)
        trace = visit_of(request).trace
        trace.claimed(claims)
        return Judged(
            claims=claims,
            tenant_id=tenant,
            request_id=request_id,
            principal="anonymous",
            method=request.method,
            target=_bytes(target),
            headers=headers,
            body=raw,
            body_sha256=hashlib.sha256(raw).hexdigest(),
            cost_source=sources.cost,
            terms=terms,
            place=place,
            shadow=course.shadow,
            log_fields=dict(trace.ids)
            or trace_ids((value_of(headers, b"traceparent") or b"").decode("latin-1")),
            trace=trace,
        )

    async def _answer(
        self, request: web.BaseRequest, judged: Judged, forwarded: Forwarded
    ) -> web.StreamResponse:
        head = forwarded.head
        headers = without_our_own(end_to_end(head.headers))
        headers = [(name, value) for name, value in headers if name.lower() != b"x-request-id"]
        body = forwarded.body
        settings = judged.terms.settings
        if settings.gate.annotate_response and forwarded.rest is None:
            headers, body = annotated(forwarded, headers, body, now=self._gate.now())
        headers += self._told(forwarded)
        headers.append((b"X-Request-Id", judged.request_id.encode("utf-8")))
        length = passthrough.declared_length(headers)
        if length is None and forwarded.rest is None:
            length = len(body)
            if request.method != "HEAD" and head.status not in (204, 304):
                headers.append((b"Content-Length", b"%d" % length))
        answer = RawAnswer(
            head.status,
            head.reason,
            headers,
            content_length=length,
            close=self._gate.draining or cast(DataConnection, request.protocol).ending,
        )
        rest, patience = forwarded.rest, settings.upstream.response_timeout_seconds
        visit = visit_of(request)
        visit.outcome, visit.decision_id = "answered", forwarded.decision_id
        try:
            await answer.prepare(request)
            if rest is None:
                async with asyncio.timeout(patience):
                    await answer.write_eof(body)
                visit.head_sent, visit.sent = True, len(body)
                return answer
            async with asyncio.timeout(deadlines.answering_seconds(judged)):
                piece = body
                while piece:
                    async with asyncio.timeout(patience):
                        await answer.write(piece)
                    visit.sent += len(piece)
                    piece = await rest.read()
            if rest.cut:
                visit.outcome = "unknown"
                passthrough.cut(request, answer)
            else:
                await answer.write_eof()
        except (ConnectionError, TimeoutError) as exc:
            if isinstance(exc, TimeoutError) and request.transport is not None:
                request.transport.abort()  # a client that does not read must not hold the connection for ever
            answer.mark_ended()
            if rest is not None:
                visit.outcome = "client_left"
                rest.abandon()
        except Exception:
            if rest is not None:
                rest.abandon()
            raise
        return answer

    @staticmethod
    def _told(outcome: Forwarded | Undelivered) -> list[tuple[bytes, bytes]]:
        """What the answer says of the scope."""
        told = [(b"Scopegate-Decision-Id", outcome.decision_id.encode())]
        if outcome.scope is not None and outcome.scope_status is not None:
            told += [
                (b"Scopegate-Scope-Status", outcome.scope_status.encode()),
                (b"Scopegate-Attempts-Remaining", b"%d" % outcome.scope.attempts_remaining),
            ]
        return told


def _course(request: web.BaseRequest, target: str, terms: Terms) -> Course | None:
    """The classification of a request. None: it is not gated, or only reads.

    A request that an enforced route matches in any reading is enforced, even if other routes match it.
    """

    def verdict_by(patterns: Sequence[RoutePattern]) -> PassThrough | Gated | Rejected:
        return classify(request.method, target, request.headers.items(), request.body_exists, patterns)

    verdict, routes, shadow = verdict_by(terms.patterns), terms.settings.gate.routes, False
    if isinstance(verdict, PassThrough):
        return None
    if len(terms.enforced) < len(routes):
        enforced = verdict_by(terms.enforced_patterns)
        if isinstance(enforced, PassThrough):
            shadow = True
        else:
            verdict, routes = enforced, terms.enforced
    return Course(verdict, routes[verdict.index] if isinstance(verdict, Gated) else None, shadow)


def _asked(request: web.BaseRequest, terms: Terms) -> Asked:
    """Tenant and request id for a record, without the body of the request."""
    return Asked(
        tenant_id=tenant_of(request, terms.settings.gate.tenant_header) or "default",
        request_id=request_id_of(request),
        policies=terms.policies,
    )


def _bytes(target: str) -> bytes:
    return target.encode("utf-8", "surrogateescape")


def _judged_headers(sources: FactSources, tenant_header: str | None) -> set[str]:
    named = {source.name for source in sources.of_the_request if source.kind == "header"}
    return named | ({tenant_header.lower()} if tenant_header else set())


def _twin_of_a_judged_header(request: web.BaseRequest, judged_headers: set[str]) -> Refusal | None:
    """Refuse a header that differs from a judged one only in punctuation, because CGI reads both alike."""
    judged = {read_as(name): name for name in judged_headers | FRAMING}
    for name in request.headers:
        twin = judged.get(read_as(name))
        if twin is not None and twin != name.lower():
            message = f"The header {name} could be read as {twin}."
            return Refusal("invalid_request", message, {"member": f"header:{name}"})
    return None


def _upstream_headers(
    request: web.BaseRequest, judged_headers: set[str], body: bytes, request_id: str, bounds: GateSettings
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
