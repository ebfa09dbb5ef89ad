"""Serves the OpenAPI document and its page on the admin listener. The page loads nothing from other hosts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from importlib.resources import files
from types import MappingProxyType
from typing import Any

import orjson
from aiohttp import web

from sidecar.live.snapshot import Live
from sidecar.settings.reading import Settings
from sidecar.web.api.operation import Answer, Operation, Parameter
from sidecar.web.wire.problem import SERVER

# The files beside the page with their media types.
FILES: Mapping[str, str] = MappingProxyType({"page.css": "text/css"})
# The page runs no scripts, calls nothing, and loads its style sheet only. No page frames it.
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "style-src 'self'",
        "img-src data:",
        "frame-ancestors 'none'",
        "base-uri 'none'",
        "form-action 'none'",
    )
)
HEADERS: Mapping[str, str] = MappingProxyType(
    {
        "Server": SERVER,
        "Cache-Control": "no-store",
        "Content-Security-Policy": CONTENT_SECURITY_POLICY,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }
)


class Docs:
    """Serves the page and the document. `make` builds the document once for each configuration in force."""

    def __init__(self, make: Callable[[Settings], dict[str, Any]], live: Live) -> None:
        self._make = make
        self._live = live
        self._made: tuple[Settings, dict[str, Any]] | None = None
        self._rendered: tuple[dict[str, Any], str, bytes] | None = None

    def _document(self) -> dict[str, Any]:
        settings = self._live.snapshot.settings
        if self._made is None or self._made[0] is not settings:
            self._made = settings, self._make(settings)
        return self._made[1]

    async def document(self, request: web.Request) -> web.Response:
        del request
        return _whole(orjson.dumps(self._document()), "application/json")

    async def page(self, request: web.Request) -> web.Response:
        document, origin = self._document(), f"{request.scheme}://{request.host}"
        if self._rendered is None or self._rendered[0] is not document or self._rendered[1] != origin:
            # In a thread, because rendering takes longer than requests may be held up.
            self._rendered = document, origin, await asyncio.to_thread(_rendered, document, origin)
        return _whole(self._rendered[2], "text/html; charset=utf-8")

    async def redirected(self, request: web.Request) -> web.Response:
        del request
        return web.Response(status=308, headers={**HEADERS, "Location": "/docs"})

    async def file(self, request: web.Request) -> web.Response:
        name = request.match_info["file"]
        if name not in FILES:
            raise web.HTTPNotFound
        return _whole((files("sidecar.web.api") / name).read_bytes(), FILES[name])


def _rendered(document: dict[str, Any], origin: str) -> bytes:
    from sidecar.web.api.docpage import page  # read by few

    return page(document, origin)


def _whole(body: bytes, content_type: str) -> web.Response:
    return web.Response(body=body, headers={**HEADERS, "Content-Type": content_type})


DOCUMENTATION = (
    Operation(
        call="GET /openapi.json",
        name="getDocument",
        tag="Documentation",
        summary="This document",
        answers=(
            Answer(
                "OpenAPI 3.1, for this version and configuration.",
                contents={"application/json": {"type": "object", "required": ["openapi", "info", "paths"]}},
            ),
        ),
        roles=("observer",),
        handler=Docs.document,
    ),
    Operation(
        call="GET /docs",
        name="getPage",
        tag="Documentation",
        summary="This document as a page",
        answers=(
            Answer(
                "The page.", contents={"text/html": {"type": "string"}}, headers=("Content-Security-Policy",)
            ),
        ),
        roles=("observer",),
        handler=Docs.page,
    ),
    Operation(
        call="GET /docs/",
        name="getPageElsewhere",
        tag="Documentation",
        summary="The page under another spelling",
        answers=(Answer("It is at /docs.", status="308", contents={}, headers=("Location",)),),
        roles=("observer",),
        handler=Docs.redirected,
    ),
    Operation(
        call="GET /",
        name="getRoot",
        tag="Documentation",
        summary="Leads to the page",
        answers=(Answer("It is at /docs.", status="308", contents={}, headers=("Location",)),),
        roles=("observer",),
        handler=Docs.redirected,
    ),
    Operation(
        call="GET /docs/{file}",
        name="getPageFile",
        tag="Documentation",
        summary="A file of the page",
        parameters=(Parameter("file", "path", {"type": "string", "enum": list(FILES)}),),
        answers=(
            Answer(
                "The file.", contents={"text/css": {"type": "string"}}, headers=("Content-Security-Policy",)
            ),
        ),
        errors=("not_found",),
        roles=("observer",),
        handler=Docs.file,
    ),
)
