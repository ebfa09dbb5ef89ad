"""Reads the values that every listener reads alike from a request: its id, its tenant, paging and times."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from typing import Protocol

from aiohttp import HttpVersion
from aiohttp.http_parser import RawRequestMessage
from aiohttp.streams import StreamReader

from sidecar.core.facts import is_identifier
from sidecar.core.instant import parse_time
from sidecar.core.principal import DEFAULT_TENANT, Principal
from sidecar.errors import Refusal
from sidecar.ids import new_decision_id
from sidecar.web.wire.headers import HeaderFields, Headers
from sidecar.web.wire.models import wrong

MAX_REQUEST_ID_CHARS = 256
DEFAULT_PAGE = 100
MAX_PAGE = 1_000


class AnyRequest(Protocol):
    """What aiohttp's request, on admin and ops, and that of the data listener have in common."""

    @property
    def _message(self) -> RawRequestMessage: ...

    @property
    def method(self) -> str: ...

    @property
    def version(self) -> HttpVersion: ...

    @property
    def raw_headers(self) -> Headers: ...

    @property
    def content(self) -> StreamReader: ...

    @property
    def content_length(self) -> int | None: ...

    @property
    def transport(self) -> asyncio.Transport | None: ...


def request_id_of(fields: HeaderFields) -> str:
    """The client's X-Request-Id, cut to the length that a record holds, or a new id."""
    given = fields.text(b"x-request-id")
    if given and given.isprintable():
        return given[:MAX_REQUEST_ID_CHARS]
    return new_decision_id()


def paging_of(query: Mapping[str, str]) -> tuple[int, str | None] | Refusal:
    """`limit` (100 by default, 1000 at most) and the cursor `before`."""
    text = query.get("limit", str(DEFAULT_PAGE))
    if not re.fullmatch(r"[1-9][0-9]{0,3}", text) or int(text) > MAX_PAGE:
        return wrong("invalid_request", "limit", f"must be from 1 to {MAX_PAGE}")
    return int(text), query.get("before")


def since_of(query: Mapping[str, str]) -> int | Refusal | None:
    """The time `since`, in microseconds since 1970; None if it is absent."""
    if "since" not in query:
        return None
    try:
        return parse_time(query["since"])
    except ValueError:
        message = "must be a time with its offset, such as 2026-12-24T12:00:00Z (in a URL, + is written %2B)"
        return wrong("invalid_request", "since", message)


def tenant_of(fields: HeaderFields, header: str | None) -> str | None:
    """The tenant: `default` without a configured header, None if the header does not name exactly one."""
    if header is None:
        return DEFAULT_TENANT
    values = fields.texts(header.lower().encode())
    if len(values) != 1 or not is_identifier(values[0]):
        return None
    return values[0]


def tenant_for(
    principal: Principal, fields: HeaderFields, header: str | None, *, across: bool = False
) -> str | Refusal | None:
    """The tenant of a request by a principal, or the refusal if the header names another one.

    The tenant of an authenticated principal counts. With `across`, one of tenant `default` may name any
    tenant in the header. None: a header is configured, and does not name exactly one tenant.
    """
    if not principal.is_authenticated:
        return tenant_of(fields, header)
    if header is None or header.lower().encode() not in fields.places:
        return principal.tenant_id
    named = tenant_of(fields, header)
    if named in (None, principal.tenant_id) or (across and principal.tenant_id == DEFAULT_TENANT):
        return named
    return Refusal(
        "tenant_mismatch",
        f"{header} names another tenant than that of {principal.id}.",
        {"tenant_id": principal.tenant_id},
    )


def shown_tenant(principal: Principal, fields: HeaderFields, header: str | None) -> str:
    """The tenant for the record of a request that may name none, or another one than its caller's."""
    if principal.is_authenticated:
        return principal.tenant_id
    return tenant_of(fields, header) or DEFAULT_TENANT


def unknown(name: str, known: Sequence[str]) -> Refusal:
    """The refusal of a parameter whose value is not one of the known values."""
    return wrong("invalid_request", name, f"must be one of {', '.join(known)}")
