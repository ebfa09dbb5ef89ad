"""Reads a body to be judged: whole, within its deadline and size limits, and with one possible reading."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from sidecar.core.cache import Cache
from sidecar.errors import Refusal
from sidecar.files.strictjson import NotJson, parse
from sidecar.gate.places import Held, MemoryBudget, parsed_bytes
from sidecar.web.serving._parser import BrokenBody
from sidecar.web.wire.headers import HeaderFields, fields_of, text_of
from sidecar.web.wire.request import AnyRequest

PARSED_AT_ONCE = 64 * 1024

# Limits for the admin listener's own calls.
MAX_DOCUMENT_BYTES = 1_048_576
DOCUMENT_TIMEOUT_SECONDS = 10.0
# Counts the bodies of all the sidecar's own calls, on all listeners.
_documents = MemoryBudget()
_NO_ROOM = Refusal("overloaded", "Request bodies hold as much memory as they may.", {"cause": "memory"})


def media_type_refusal(fields: HeaderFields) -> Refusal | None:
    """Require exactly one content type `application/json`, no charset but utf-8, and no content encoding."""
    if b"content-encoding" in fields.places:
        return Refusal("unsupported_media_type", "A body with a Content-Encoding cannot be judged.")
    types = fields.values(b"content-type")
    if len(types) != 1:
        return Refusal("unsupported_media_type", "Send exactly one Content-Type: application/json.")
    if not _are_json[types[0]]:
        return Refusal("unsupported_media_type", "Only application/json in utf-8 can be judged.")
    return None


def _is_json(media_type: bytes) -> bool:
    essence, *parameters = (part.strip().lower() for part in text_of(media_type).split(";"))
    charsets = [part for part in parameters if part]
    plain = all(part in ("charset=utf-8", 'charset="utf-8"') for part in charsets) and len(charsets) < 2
    return essence == "application/json" and plain


_are_json = Cache(_is_json, max_entries=64, max_size=64)


@dataclass(slots=True)
class Taken:
    """The part of a body that was read, even if reading failed, and its size in bytes.

    `begun`: the client was asked to send it.
    """

    pieces: list[bytes] = field(default_factory=list)
    size: int = 0
    begun: bool = False


async def read_json(
    request: AnyRequest,
    fields: HeaderFields,
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
    refusal = media_type_refusal(fields)
    if refusal is not None:
        return refusal
    if (request.content_length or 0) > max_bytes:
        return _too_large(max_bytes)
    taken.begun = True
    expect_continue(request, fields)
    try:
        if request.content.is_eof():  # the whole body is here, so there is nothing to wait for
            refusal = _take(request.content.read_nowait(), taken, held, max_bytes)
        else:
            async with asyncio.timeout(timeout_seconds):
                while refusal is None and (piece := await request.content.readany()):
                    refusal = _take(piece, taken, held, max_bytes)
    except TimeoutError:
        return Refusal("body_timeout", f"The body did not arrive within {timeout_seconds:g} s.")
    except BrokenBody as exc:
        return exc.refusal
    except Exception as exc:
        return Refusal("invalid_request", f"The body did not arrive whole ({type(exc).__name__}).")
    if refusal is not None:
        return refusal
    body = b"".join(taken.pieces)
    taken.pieces[:] = [body]  # drops the pieces, so that the body is not held twice
    if not held.grow(parsed_bytes(body)):
        return _NO_ROOM
    try:
        # A large body is parsed in a thread, because parsing it here would block other requests.
        document = parse(body) if len(body) <= PARSED_AT_ONCE else await asyncio.to_thread(parse, body)
        return body, document
    except NotJson as exc:
        return Refusal("invalid_request", f"The body is not strict JSON: {exc}.")


def _take(piece: bytes, taken: Taken, held: Held, max_bytes: int) -> Refusal | None:
    """Take a piece of a body, or say why the body cannot be read any further."""
    taken.pieces.append(piece)
    taken.size += len(piece)
    if taken.size > max_bytes:
        return _too_large(max_bytes)
    return None if held.grow(len(piece)) else _NO_ROOM


def _too_large(max_bytes: int) -> Refusal:
    return Refusal("body_too_large", f"The body is larger than {max_bytes} bytes.", {"max_bytes": max_bytes})


async def read_document(request: AnyRequest) -> dict[str, Any] | Refusal:
    """Return the object in the body of a call to the admin listener, or why it cannot be read."""
    body = await read_json(
        request,
        fields_of(request),
        max_bytes=MAX_DOCUMENT_BYTES,
        timeout_seconds=DOCUMENT_TIMEOUT_SECONDS,
    )
    return body if isinstance(body, Refusal) else body[1]


def expect_continue(request: AnyRequest, fields: HeaderFields) -> None:
    """Send `100 Continue` to a client that waits for it before its body (RFC 9110, section 10.1.1)."""
    expected = fields.text(b"expect")
    if expected is not None and request.version >= (1, 1) and expected.lower() == "100-continue":
        transport = request.transport
        if transport is not None and not transport.is_closing():
            transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
