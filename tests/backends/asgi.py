"""ASGI applications, served by uvicorn, and one of aiohttp: `python -m tests.backends.asgi NAME PORT`."""

from __future__ import annotations

import sys
from typing import Any

import uvicorn
from aiohttp import web
from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse, Response

from tests.backends.report import PATHS, executed


def fastapi_app() -> Any:
    """FastAPI as it comes."""
    app = FastAPI()

    async def execute(request: Request) -> Response:
        return PlainTextResponse(executed(request.headers, await request.body()))

    for path in PATHS:
        app.add_api_route(path, execute, methods=["POST"])
    return app


def starlette_url_app() -> Any:
    """An application that dispatches on request.url.path, as middleware and gateways do."""
    app = FastAPI()

    @app.api_route("/{path:path}", methods=["POST", "PUT", "PATCH", "DELETE"])
    async def any_path(request: Request) -> Response:
        if request.url.path in PATHS:
            return PlainTextResponse(executed(request.headers, await request.body()))
        return PlainTextResponse("another path", 404)

    return app


def aiohttp_app() -> web.Application:
    """aiohttp's own router."""
    app = web.Application()

    async def execute(request: web.Request) -> web.Response:
        return web.Response(text=executed(request.headers, await request.read()))

    for path in PATHS:
        app.router.add_post(path, execute)
    return app


def main(name: str, port: int) -> None:
    if name == "aiohttp":
        web.run_app(aiohttp_app(), host="127.0.0.1", port=port, print=lambda *_: None)
    else:
        app = {"fastapi": fastapi_app, "starlette-url": starlette_url_app}[name]()
        uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", proxy_headers=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
