"""The data listener: every request is judged, served by the sidecar itself, or passed through untouched.

The raw request target decides, before any router could normalise it.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

from aiohttp import web

from sidecar.core.facts import FactSources, Request, read
from sidecar.core.target import Gated, Rejected, RoutePattern, classify
from sidecar.errors import Refusal, StoreUnavailable, unavailable
from sidecar.gate import Gate
from sidecar.ids import new_traceparent
from sidecar.outcomes import Forwarded, Judged, Undelivered
from sidecar.refusals import Asked, Refused
from sidecar.telemetry import Metrics, trace_ids
from sidecar.web import passthrough
from sidecar.web.annotate import annotated
from sidecar.web.answers import RawAnswer
from sidecar.web.asked import request_id_of, tenant_of
from sidecar.web.body import read_json
from sidecar.web.headers import end_to_end, value_of, without_our_own
from sidecar.web.problem import problem
from sidecar.web.scopes import ScopeApi

logger = logging.getLogger("scopegate.web")


# What says how a body is to be read.
FRAMING = frozenset({"content-type", "content-length", "content-encoding", "transfer-encoding"})


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedRoute:
    """A configured route: where it is, and where its facts stand."""

    pattern: RoutePattern
    sources: FactSources


@dataclass(frozen=True, slots=True, kw_only=True)
class DataLimits:
    """Bounds of one gated request; times in seconds, sizes in bytes."""

    max_body_bytes: int
    body_timeout_seconds: float
    write_timeout_seconds: float
    annotate_response: bool
    tenant_header: str | None


class DataPlane:
    """The handler of the data listener."""

    def __init__(
        self,
        *,
        gate: Gate,
        passing: passthrough.PassThrough,
        scopes: ScopeApi | None,
        routes: Sequence[GatedRoute],
        limits: DataLimits,
        metrics: Metrics,
    ) -> None:
        self._gate = gate
        self._passing = passing
        self._scopes = scopes
        self._routes = routes
        self._patterns = [route.pattern for route in routes]
        self._limits = limits
        self._metrics = metrics

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request. Whatever fails inside is answered 500 and logged, never forwarded."""
        try:
            answer = await self._route(request)
        except StoreUnavailable as exc:
            answer = problem(unavailable(exc))
        except ConnectionError:
            raise
        except Exception:
            logger.exception("a request failed", extra={"method": request.method})
            answer = problem(Refusal("internal_error", "The sidecar failed; nothing more was forwarded."))
        if self._gate.draining or "Upgrade" in request.headers or "HTTP2-Settings" in request.headers:
            # After an upgrade that did not happen aiohttp's parser does not read on reliably.
            answer.force_close()
        return answer

    async def _route(self, request: web.BaseRequest) -> web.StreamResponse:
        target = request._message.path  # raw: every public form has been through yarl
        if self._scopes is not None and self._scopes.owns(target):
            return await self._scopes.handle(request, target, request_id_of(request))
        begun = time.perf_counter()
        verdict = classify(
            request.method, target, request.headers.items(), request.body_exists, self._patterns
        )
        if isinstance(verdict, Rejected):
            return await self._refuse(request, verdict.refusal, allow=verdict.allow)
        if isinstance(verdict, Gated):
            return await self._judge(request, target, verdict, begun)
        switching = upgrade_refusal(request)
        if switching is not None:
            return problem(switching)
        return await self._passing.carry(request, target.encode("utf-8", "surrogateescape"))

    # A gated request ---------------------------------------------------------------------------

    async def _refuse(
        self, request: web.BaseRequest, refusal: Refusal, *, allow: tuple[str, ...] = ()
    ) -> web.StreamResponse:
        request_id = request_id_of(request)
        refused = await self._gate.refuse(
            refusal, Asked(tenant_id=self._tenant(request) or "default", request_id=request_id)
        )
        return problem(refusal, request_id=request_id, decision_id=refused.decision_id, allow=allow)

    async def _judge(
        self, request: web.BaseRequest, target: str, gated: Gated, begun: float
    ) -> web.StreamResponse:
        route = self._routes[gated.index]
        judged = await self._read(request, target, gated, route)
        self._metrics.judge.observe(time.perf_counter() - begun)
        if isinstance(judged, Refusal):
            return await self._refuse(request, judged)
        outcome = await self._gate.execute(judged)
        if isinstance(outcome, Refused):
            return problem(
                outcome.refusal,
                request_id=judged.request_id,
                decision_id=outcome.decision_id,
                retry_after=outcome.retry_after,
            )
        if isinstance(outcome, Undelivered):
            return problem(
                outcome.refusal,
                request_id=judged.request_id,
                decision_id=outcome.decision_id,
                headers={name.decode(): value.decode() for name, value in self._told(outcome)},
            )
        return await self._answer(request, judged, outcome)

    async def _read(
        self, request: web.BaseRequest, target: str, gated: Gated, route: GatedRoute
    ) -> Judged | Refusal:
        unready = self._gate.unready()
        if unready is not None:
            # Not worth reading a body for; the gate says so again where it counts.
            body: tuple[bytes, dict[str, Any]] | Refusal = (b"", {})
        else:
            body = await read_json(
                request,
                max_bytes=self._limits.max_body_bytes,
                timeout_seconds=self._limits.body_timeout_seconds,
            )
        if isinstance(body, Refusal):
            return body
        raw, document = body
        tenant = self._tenant(request)
        if tenant is None:
            name = self._limits.tenant_header
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
        claims = self._twin_of_a_judged_header(request, route.sources) or read(facts, route.sources)
        if isinstance(claims, Refusal):
            return claims
        request_id = request_id_of(request)
        headers = self._upstream_headers(request, route.sources, raw, request_id)
        return Judged(
            claims=claims,
            tenant_id=tenant,
            request_id=request_id,
            principal="anonymous",
            method=request.method,
            target=target.encode("utf-8", "surrogateescape"),
            headers=headers,
            body=raw,
            body_sha256=hashlib.sha256(raw).hexdigest(),
            cost_source=route.sources.cost,
            log_fields=trace_ids((value_of(headers, b"traceparent") or b"").decode("latin-1")),
        )

    def _judged_headers(self, sources: FactSources) -> set[str]:
        named = {source.name for source in sources.of_the_request if source.kind == "header"}
        return named | ({self._limits.tenant_header.lower()} if self._limits.tenant_header else set())

    def _twin_of_a_judged_header(self, request: web.BaseRequest, sources: FactSources) -> Refusal | None:
        """CGI and WSGI read `_` as `-`: a header that only so becomes one that was judged is refused."""
        judged = {name.replace("_", "-"): name for name in self._judged_headers(sources) | FRAMING}
        for name in request.headers:
            read_as = judged.get(name.lower().replace("_", "-"))
            if read_as is not None and read_as != name.lower():
                message = f"The header {name} could be read as {read_as}."
                return Refusal("invalid_request", message, {"member": f"header:{name}"})
        return None

    def _upstream_headers(
        self, request: web.BaseRequest, sources: FactSources, body: bytes, request_id: str
    ) -> list[tuple[bytes, bytes]]:
        # A header that was judged must arrive, whatever Connection says of it.
        judged = {name.encode() for name in self._judged_headers(sources)}
        headers = without_our_own(end_to_end(request.raw_headers, kept=judged))
        if self._limits.annotate_response:
            headers = [(name, value) for name, value in headers if name.lower() != b"accept-encoding"]
            headers.append((b"Accept-Encoding", b"identity"))
        if value_of(headers, b"content-length") is None:
            headers.append((b"Content-Length", b"%d" % len(body)))
        if value_of(headers, b"x-request-id") is None:
            headers.append((b"X-Request-Id", request_id.encode("utf-8")))
        if value_of(headers, b"traceparent") is None:
            headers.append((b"traceparent", new_traceparent().encode()))
        return headers

    async def _answer(
        self, request: web.BaseRequest, judged: Judged, forwarded: Forwarded
    ) -> web.StreamResponse:
        head = forwarded.head
        headers = without_our_own(end_to_end(head.headers))
        headers = [(name, value) for name, value in headers if name.lower() != b"x-request-id"]
        body = forwarded.body
        if self._limits.annotate_response and forwarded.rest is None:
            headers, body = annotated(forwarded, headers, body, now=self._gate.now())
        headers += self._told(forwarded)
        headers.append((b"X-Request-Id", judged.request_id.encode("utf-8")))
        length = passthrough.declared_length(headers)
        if length is None and forwarded.rest is None:
            length = len(body)
            if request.method != "HEAD" and head.status not in (204, 304):
                headers.append((b"Content-Length", b"%d" % length))
        answer = RawAnswer(
            head.status, head.reason, headers, content_length=length, close=self._gate.draining
        )
        rest = forwarded.rest
        try:
            await answer.prepare(request)
            if rest is None:
                async with asyncio.timeout(self._limits.write_timeout_seconds):
                    await answer.write_eof(body)
                return answer
            piece = body
            while piece:
                async with asyncio.timeout(self._limits.write_timeout_seconds):
                    await answer.write(piece)
                piece = await rest.read()
            if rest.cut:
                passthrough.cut(request, answer)
            else:
                await answer.write_eof()
        except (ConnectionError, TimeoutError) as exc:
            if isinstance(exc, TimeoutError) and request.transport is not None:
                request.transport.abort()  # a client that does not read holds nothing for ever
            answer.mark_ended()
            if rest is not None:
                rest.abandon()
        return answer

    @staticmethod
    def _told(outcome: Forwarded | Undelivered) -> list[tuple[bytes, bytes]]:
        """What the answer says of the scope (gate.md, step 7)."""
        scope = outcome.scope
        return [
            (b"Scopegate-Decision-Id", outcome.decision_id.encode()),
            (b"Scopegate-Scope-Status", outcome.scope_status.encode()),
            (b"Scopegate-Attempts-Remaining", b"%d" % scope.attempts_remaining),
        ]

    def _tenant(self, request: web.BaseRequest) -> str | None:
        """The tenant, None where the header that names it is missing, doubled or not a name."""
        return tenant_of(request, self._limits.tenant_header)


def upgrade_refusal(request: web.BaseRequest) -> Refusal | None:
    """Only a WebSocket may switch protocols; CONNECT and h2c would carry requests past the gate."""
    if request.method == "CONNECT":
        return Refusal("upgrade_refused", "CONNECT is refused.")
    if "Upgrade" in request.headers and not passthrough.is_websocket(request):
        return Refusal("upgrade_refused", "Only a WebSocket may switch protocols.")
    if "HTTP2-Settings" in request.headers:
        return Refusal("upgrade_refused", "HTTP/2 upgrades are refused.")
    return None
