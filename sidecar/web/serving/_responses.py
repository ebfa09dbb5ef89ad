"""Serializes the sidecar's own answers on the data listener, as aiohttp does on the other listeners.

The answers are made for all listeners alike, as `web.Response`. tests/gate/test_responses.py holds these
bytes to those that aiohttp writes.
"""

from __future__ import annotations

from aiohttp import web
from aiohttp.helpers import rfc822_formatted_time
from aiohttp.http_writer import _serialize_headers

from sidecar.web.serving.datarequest import DataRequest

_NO_LENGTH = frozenset({204})
_BODILESS = frozenset({204, 304})


def serialized(request: DataRequest, answer: web.Response) -> bytes:
    """The bytes of an answer whose body is bytes. Sets whether the connection goes on after it."""
    if answer.keep_alive is not None:
        request.keep_alive = answer.keep_alive
    body = answer.body if isinstance(answer.body, bytes) else b""
    headers, status, version = answer.headers, answer.status, request.version
    bodiless = status in _BODILESS or request.method == "HEAD"
    if (body or not bodiless) and status not in _NO_LENGTH:
        headers["Content-Length"] = str(len(body))
    headers["Date"] = rfc822_formatted_time()
    if request.keep_alive:
        if version == (1, 0):
            headers["Connection"] = "keep-alive"
    elif version == (1, 1):
        headers["Connection"] = "close"
    head = _serialize_headers(f"HTTP/{version[0]}.{version[1]} {status} {answer.reason}", headers)
    return head if bodiless else head + body
