"""Reads a body to be judged: whole, within its deadline and size limits, and with one possible reading."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from sidecar.errors import Refusal
from sidecar.files.strictjson import NotJson, parse
from sidecar.gate.places import Held, MemoryBudget, parsed_bytes
from sidecar.web.serving._parser import BrokenBody
from sidecar.web.wire.request import AnyRequest

PARSED_AT_ONCE = 64 * 1024

# Limits for the admin listener's own calls.
MAX_DOCUMENT_BYTES = 1_048_576
DOCUMENT_TIMEOUT_SECONDS = 10.0
# Counts the bodies of all the sidecar's own calls, on all listeners.
_documents = MemoryBudget()
_NO_ROOM = Refusal("overloaded", "Request bodies hold as much memory as they may.", {"cause": "memory"})


def media_type_refusal(request: AnyRequest) -> Refusal | None:
    """Require exactly one content type `application/json`, no charset but utf-8, and no content encoding."""
    if "Content-Encoding" in request.headers:
        return Refusal("unsupported_media_type", "A body with a Content-Encoding cannot be judged.")
    types = request.headers.getall("Content-Type", [])
    if len(types) != 1:
        return Refusal("unsupported_media_type", "Send exactly one Content-Type: application/json.")
    essence, *parameters = (part.strip().lower() for part in types[0].split(";"))
    charsets = [part for part in parameters if part]
    plain = all(part in ("charset=utf-8", 'charset="utf-8"') for part in charsets) and len(charsets) < 2
    if essence != "application/json" or not plain:
        return Refusal("unsupported_media_type", "Only application/json in utf-8 can be judged.")
    return None


@dataclass(slots=True)
class Taken:
    """The part of a body that was read, even if reading failed. `begun`: the client was asked to send it."""

    pieces: list[bytes] = field(default_factory=list)
    begun: bool = False


async def read_json(
    request: AnyRequest,
    *,
    max_bytes: int,
    timeout_seconds: float,
    taken: Taken | None = None,
    held: Held | None = None,
) -> tuple[bytes, dict[str, Any]] | Refusal:
    """Return the bytes of the body and the object in them, or why they cannot be judged.

    `taken` gets the bytes that were read, and `held` counts them.
    """
    taken = Taken() if taken is None else taken
    held = Held(_documents) if held is None else held
    refusal = media_type_refusal(request)
    if refusal is not None:
        return refusal
    too_large = Refusal(
        "body_too_large", f"The body is larger than {max_bytes} bytes.", {"max_bytes": max_bytes}
    )
    if (request.content_length or 0) > max_bytes:
        return too_large
    pieces, size = taken.pieces, 0
    try:
        async with asyncio.timeout(timeout_seconds):
            taken.begun = True
            await expect_continue(request)
            while piece := await request.content.readany():
                pieces.append(piece)
                size += len(piece)
                if size > max_bytes:
                    return too_large
                if not held.grow(len(piece)):
                    return _NO_ROOM
    except TimeoutError:
        return Refusal("body_timeout", f"The body did not arrive within {timeout_seconds:g} s.")
    except BrokenBody as exc:
        return exc.refusal
    except Exception as exc:
        return Refusal("invalid_request", f"The body did not arrive whole ({type(exc).__name__}).")
    body = b"".join(pieces)
    pieces[:] = [body]  # drops the pieces, so that the body is not held twice
    if not held.grow(parsed_bytes(body)):
        return _NO_ROOM
    try:
        # A large body is parsed in a thread, because parsing it here would block other requests.
        document = parse(body) if len(body) <= PARSED_AT_ONCE else await asyncio.to_thread(parse, body)
        return body, document
    except NotJson as exc:
        return Refusal("invalid_request", f"The body is not strict JSON: {exc}.")


async def read_document(request: AnyRequest) -> dict[str, Any] | Refusal:
    """Return the object in the body of a call to the admin listener, or why it cannot be read."""
    body = await read_json(request, max_bytes=MAX_DOCUMENT_BYTES, timeout_seconds=DOCUMENT_TIMEOUT_SECONDS)
    return body if isinstance(body, Refusal) else body[1]


async def expect_continue(request: AnyRequest) -> None:
    """Send `100 Continue` to a client that waits for it before its body (RFC 9110, section 10.1.1)."""
    if request.version >= (1, 1) and request.headers.get("Expect", "").lower() == "100-continue":
        transport = request.transport
        if transport is not None and not transport.is_closing():
            transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
