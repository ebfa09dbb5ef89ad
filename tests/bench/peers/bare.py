"""A proxy that decides nothing: aiohttp's Application in front, its ClientSession behind, tuned for speed.

    python -m tests.bench.peers.bare --port 8000 --backend 9000

No access log, no cookies, no redirects, no decompression, connections kept open, as many as are needed.
Bodies are read whole, which is faster than streaming for bodies of this size.
"""

from __future__ import annotations

import argparse

from aiohttp import ClientSession, DummyCookieJar, TCPConnector, hdrs, web
from multidict import CIMultiDict
from yarl import URL

HOP_BY_HOP = (hdrs.CONNECTION, hdrs.KEEP_ALIVE, hdrs.TRANSFER_ENCODING, hdrs.CONTENT_LENGTH, hdrs.HOST)
NEVER_ADDED = (hdrs.ACCEPT, hdrs.ACCEPT_ENCODING, hdrs.USER_AGENT, hdrs.CONTENT_TYPE)


def application(backend: str) -> web.Application:
    """The proxy in front of `backend`, a URL without a path."""
    key = web.AppKey("session", ClientSession)

    # The type of an asynchronous generator would say no more than its one yield.
    async def session(app: web.Application):  # type: ignore[no-untyped-def]
        async with ClientSession(
            connector=TCPConnector(limit=0, keepalive_timeout=60),
            cookie_jar=DummyCookieJar(),
            auto_decompress=False,
            skip_auto_headers=NEVER_ADDED,
        ) as app[key]:
            yield

    async def forward(request: web.Request) -> web.Response:
        body = await request.read() if request.body_exists else None
        async with request.app[key].request(
            request.method,
            URL(backend + request.raw_path, encoded=True),
            headers=end_to_end(request.headers.copy()),
            data=body,
            allow_redirects=False,
        ) as answer:
            return web.Response(
                status=answer.status,
                headers=end_to_end(answer.headers.copy()),
                body=await answer.read(),
            )

    app = web.Application()
    app.cleanup_ctx.append(session)
    app.router.add_route("*", "/{path:.*}", forward)
    return app


def end_to_end(headers: CIMultiDict[str]) -> CIMultiDict[str]:
    for name in HOP_BY_HOP:
        headers.popall(name, None)
    return headers


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--backend", type=int, required=True)
    arguments = parser.parse_args()
    web.run_app(
        application(f"http://127.0.0.1:{arguments.backend}"),
        host="127.0.0.1",
        port=arguments.port,
        access_log=None,
        print=None,
        keepalive_timeout=300,
        backlog=4096,
    )


if __name__ == "__main__":
    main()
