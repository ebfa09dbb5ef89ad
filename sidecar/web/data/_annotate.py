"""`gate.annotate_response`: adds the scope members of the recovery API that the backend's answer lacks.

It annotates only a body that is one whole JSON object and is not encoded, digested or signed. The bytes of
the backend's own members stay unchanged.
"""

from __future__ import annotations

from typing import Any

import orjson

from sidecar.core.instant import iso_time
from sidecar.core.money import to_dollars
from sidecar.files.strictjson import NotJson, parse
from sidecar.gate.messages import Forwarded
from sidecar.web.wire.headers import Headers, value_of

_BOUND_TO_THE_BYTES = (
    b"content-encoding",
    b"digest",
    b"content-digest",
    b"repr-digest",
    b"content-md5",
    b"signature",
    b"signature-input",
)
_ABOUT_THE_BYTES = (b"etag", b"content-length")


def annotated(
    forwarded: Forwarded, headers: Headers, body: bytes, *, now: int
) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """The headers and the body with the missing members added, or both unchanged."""
    unchanged = list(headers), body
    media_type = (value_of(headers, b"content-type") or b"").split(b";")[0].strip().lower()
    if media_type != b"application/json" or any(value_of(headers, name) for name in _BOUND_TO_THE_BYTES):
        return unchanged
    try:
        document = parse(body)
    except NotJson:
        return unchanged
    execution, scope = forwarded.last.execution, forwarded.last.scope
    if scope is None:
        return unchanged
    members: dict[str, Any] = {
        "scope_id": scope.scope_id,
        "attempt_number": execution.attempt_number,
        "scope_status": scope.status(now),
        "attempts_remaining": scope.attempts_remaining,
        "cost_used_usd": to_dollars(scope.spent),
        "executed_at": iso_time(now),
    }
    missing = {name: value for name, value in members.items() if name not in document}
    if not missing:
        return unchanged
    # The new members go before the closing brace, so that numbers and spacing of the others stay unchanged.
    kept = body.rstrip()[:-1]
    joined = kept + (b"," if document else b"") + orjson.dumps(missing)[1:]
    return [(name, value) for name, value in headers if name.lower() not in _ABOUT_THE_BYTES], joined
