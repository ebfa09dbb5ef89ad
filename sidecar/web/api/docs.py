"""The OpenAPI document and its page, on the admin listener. The page loads nothing from other hosts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.resources import files
from types import MappingProxyType
from typing import Any

import orjson
from aiohttp import web

from sidecar.live.terms import Live
from sidecar.settings.reading import Settings
from sidecar.web.wire.problem import SERVER

# The files of the page with their media types. `swagger/README.md` says where the files come from.
PAGE = "index.html"
FILES: Mapping[str, str] = MappingProxyType(
    {
        "swagger-ui-bundle.js": "text/javascript",
        "swagger-ui.css": "text/css",
        "page.js": "text/javascript",
        "page.css": "text/css",
        "favicon-32x32.png": "image/png",
    }
)
# The page loads scripts and styles from these files only, and calls only its own listener. No page frames it.
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
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
        self._made: tuple[Settings, bytes] | None = None

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/openapi.json", self._shown),
            web.get("/docs", self._page),
            web.get("/docs/", self._redirected),
            web.get("/", self._redirected),
            web.get("/docs/{file}", self._file),
        ]

    async def _shown(self, request: web.Request) -> web.Response:
        del request
        settings = self._live.terms.settings
        if self._made is None or self._made[0] is not settings:
            self._made = settings, orjson.dumps(self._make(settings))
        return _whole(self._made[1], "application/json")

    async def _page(self, request: web.Request) -> web.Response:
        del request
        return _whole(_contents(PAGE), "text/html; charset=utf-8")

    async def _redirected(self, request: web.Request) -> web.Response:
        del request
        return web.Response(status=308, headers={**HEADERS, "Location": "/docs"})

    async def _file(self, request: web.Request) -> web.Response:
        name = request.match_info["file"]
        if name not in FILES:
            raise web.HTTPNotFound
        return _whole(_contents(name), FILES[name])


def _contents(name: str) -> bytes:
    return (files("sidecar.web.api") / "swagger" / name).read_bytes()


def _whole(body: bytes, content_type: str) -> web.Response:
    return web.Response(body=body, headers={**HEADERS, "Content-Type": content_type})
