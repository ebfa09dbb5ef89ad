"""Reads a body to be judged: whole, within its deadline and size limits, and with one possible reading."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sidecar.core import form
from sidecar.core.bodies import JSON_ONLY, Bodies, Reading
from sidecar.errors import Refusal
from sidecar.files import strictjson
from sidecar.gate.places import Held, MemoryBudget, form_bytes, parsed_bytes
from sidecar.web.serving._parser import BrokenBody
from sidecar.web.wire.headers import HeaderFields, fields_of
from sidecar.web.wire.request import AnyRequest

# The most bytes that are parsed and read in the event loop. A form takes longer per byte, because each of its
# names is compared with the names of the facts in many readings.
PARSED_AT_ONCE = 64 * 1024
FORM_PARSED_AT_ONCE = 4 * 1024

# Limits for the admin listener's own calls.
MAX_DOCUMENT_BYTES = 1_048_576
DOCUMENT_TIMEOUT_SECONDS = 10.0
# Counts the bodies of all the sidecar's own calls, on all listeners.
_documents = MemoryBudget()
_NO_ROOM = Refusal("overloaded", "Request bodies hold as much memory as they may.", {"cause": "memory"})

# A longer Content-Type is not repeated in an answer.
MAX_SHOWN = 100

# How the bytes of a body become values, with the memory that the values take.
PARSERS: dict[Reading, tuple[Callable[[bytes], Any], Callable[[bytes], int]]] = {
    "json": (strictjson.parse, parsed_bytes),
    "array or object": (strictjson.parse_document, parsed_bytes),
    "form": (form.parse, form_bytes),
}


def reading_of(fields: HeaderFields, bodies: Bodies) -> Reading | Refusal:
    """How a body is to be read by its content type, which must be one that the route takes."""
    if b"content-encoding" in fields.places and not bodies.may_be_encoded:
        return _unsupported("A body with a Content-Encoding cannot be judged", bodies)
    types = fields.values(b"content-type")
    reading = bodies.untyped
    if types:
        reading = bodies.by_type[types[0]] if len(types) == 1 else None
    if reading is None:
        return _unsupported(_of_this_type(fields), bodies)
    return reading


def _of_this_type(fields: HeaderFields) -> str:
    """What is wrong with a content type, with the type itself if it is one short text."""
    given = b", ".join(fields.values(b"content-type")).decode("latin-1")
    if not given:
        return "A body without a Content-Type cannot be judged here"
    shown = f" ({given})" if len(given) <= MAX_SHOWN and given.isascii() and given.isprintable() else ""
    return f"A body of this Content-Type or charset{shown} cannot be judged here"


def _unsupported(problem: str, bodies: Bodies) -> Refusal:
    message = f"{problem}; the kinds of body accepted here: {bodies.described}."
    return Refusal("unsupported_media_type", message, {"body": list(bodies.kinds)})


@dataclass(slots=True)
class Taken:
    """The part of a body that was read, even if reading failed, and its size in bytes.

    `begun`: the client was asked to send it.
    """

    pieces: list[bytes] = field(default_factory=list)
    size: int = 0
    begun: bool = False


async def read_body(
    request: AnyRequest,
    fields: HeaderFields,
    *,
    bodies: Bodies = JSON_ONLY,
    max_bytes: int,
    timeout_seconds: float,
    taken: Taken | None = None,
    held: Held | None = None,
) -> tuple[bytes, Reading, Any] | Refusal:
    """Return the bytes of the body, how they were read, and the values in them, or why they cannot be judged.

    The values are a JSON document or the pairs of a form, and None for a body that is empty or opaque.
    `taken` gets the bytes that were read, and `held` counts them.
    """
    taken = Taken() if taken is None else taken
    held = Held(_documents) if held is None else held
    reading = reading_of(fields, bodies)
    if isinstance(reading, Refusal):
        return reading
    limit = 0 if reading == "empty" else max_bytes
    if (request.content_length or 0) > limit:
        return _too_large(limit, fields, bodies)
    taken.begun = True
    expect_continue(request, fields)
    try:
        if request.content.is_eof():  # the whole body is here, so there is nothing to wait for
            refusal = _take(request.content.read_nowait(), taken, held, limit, fields, bodies)
        else:
            refusal = None
            async with asyncio.timeout(timeout_seconds):
                while refusal is None and (piece := await request.content.readany()):
                    refusal = _take(piece, taken, held, limit, fields, bodies)
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
    if not body and bodies.may_be_empty:
        return body, "empty", None
    if reading == "any":
        return body, reading, None
    parse, size = PARSERS[reading]
    if not held.grow(size(body)):
        return _NO_ROOM
    try:
        # A large body is parsed in a thread, because parsing it here would block other requests.
        at_once = len(body) <= (FORM_PARSED_AT_ONCE if reading == "form" else PARSED_AT_ONCE)
        values = parse(body) if at_once else await asyncio.to_thread(parse, body)
        return body, reading, values
    except strictjson.NotJson as exc:
        return Refusal("invalid_request", f"The body is not strict JSON: {exc}.")
    except form.NotForm as exc:
        return Refusal("invalid_request", f"The body is not a strict form: {exc}.")


def _take(
    piece: bytes, taken: Taken, held: Held, limit: int, fields: HeaderFields, bodies: Bodies
) -> Refusal | None:
    """Take a piece of a body, or say why the body cannot be read any further."""
    taken.pieces.append(piece)
    taken.size += len(piece)
    if taken.size > limit:
        return _too_large(limit, fields, bodies)
    return None if held.grow(len(piece)) else _NO_ROOM


def _too_large(limit: int, fields: HeaderFields, bodies: Bodies) -> Refusal:
    if not limit:  # the content type is none that the route takes, unless there are no bytes
        return _unsupported(_of_this_type(fields), bodies)
    return Refusal("body_too_large", f"The body is larger than {limit} bytes.", {"max_bytes": limit})


async def read_document(request: AnyRequest) -> dict[str, Any] | Refusal:
    """Return the object in the body of a call to the admin listener, or why it cannot be read."""
    return await read_json(request, max_bytes=MAX_DOCUMENT_BYTES, timeout_seconds=DOCUMENT_TIMEOUT_SECONDS)


async def read_json(
    request: AnyRequest, *, max_bytes: int, timeout_seconds: float
) -> dict[str, Any] | Refusal:
    """Return the object in a body of application/json, or why it cannot be read."""
    read = await read_body(request, fields_of(request), max_bytes=max_bytes, timeout_seconds=timeout_seconds)
    if isinstance(read, Refusal):
        return read
    document: dict[str, Any] = read[2]
    return document


def expect_continue(request: AnyRequest, fields: HeaderFields) -> None:
    """Send `100 Continue` to a client that waits for it before its body (RFC 9110, section 10.1.1)."""
    expected = fields.text(b"expect")
    if expected is not None and request.version >= (1, 1) and expected.lower() == "100-continue":
        transport = request.transport
        if transport is not None and not transport.is_closing():
            transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
