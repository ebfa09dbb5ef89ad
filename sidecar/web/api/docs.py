"""Serves the OpenAPI document and its page on the admin listener. The page loads nothing from other hosts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from importlib.resources import files
from types import MappingProxyType
from typing import Any

import orjson
from aiohttp import web

from sidecar.live.terms import Live
from sidecar.settings.reading import Settings
from sidecar.web.api.docpage import page
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

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/openapi.json", self._json),
            web.get("/docs", self._page),
            web.get("/docs/", self._redirected),
            web.get("/docs/{file}", self._file),
        ]

    def _document(self) -> dict[str, Any]:
        settings = self._live.terms.settings
        if self._made is None or self._made[0] is not settings:
            self._made = settings, self._make(settings)
        return self._made[1]

    async def _json(self, request: web.Request) -> web.Response:
        del request
        return _whole(orjson.dumps(self._document()), "application/json")

    async def _page(self, request: web.Request) -> web.Response:
        document, origin = self._document(), f"{request.scheme}://{request.host}"
        if self._rendered is None or self._rendered[0] is not document or self._rendered[1] != origin:
            # In a thread, because rendering takes longer than requests may be held up.
            self._rendered = document, origin, await asyncio.to_thread(page, document, origin)
        return _whole(self._rendered[2], "text/html; charset=utf-8")

    async def _redirected(self, request: web.Request) -> web.Response:
        del request
        return web.Response(status=308, headers={**HEADERS, "Location": "/docs"})

    async def _file(self, request: web.Request) -> web.Response:
        name = request.match_info["file"]
        if name not in FILES:
            raise web.HTTPNotFound
        return _whole((files("sidecar.web.api") / name).read_bytes(), FILES[name])


def _whole(body: bytes, content_type: str) -> web.Response:
    return web.Response(body=body, headers={**HEADERS, "Content-Type": content_type})
