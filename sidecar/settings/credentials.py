"""The credentials that the sidecar presents to the backend, so that its callers need not hold them.

A setting is only the name of the file. `upstream.custody` reads what the file holds, and no value that is
shown, compared or written contains it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import ValidationInfo

from sidecar.core.headernames import HOP_BY_HOP, is_our_own
from sidecar.core.targetheaders import decides, read_as
from sidecar.files import keyfiles
from sidecar.files.keyfiles import KeyFileUnusable
from sidecar.settings.keys import Section
from sidecar.settings.values import LIST, NOT_EMPTY, Kind, folder_of, header_name, reads_keys

CredentialArea = Literal["gated", "pass"]

# Headers that are made anew for each request, because they say where it goes, where it ends and which it is.
_MADE = HOP_BY_HOP | {"host", "content-length", "expect", "x-request-id", "traceparent", "tracestate"}
# Headers that say how the body is read. The backend must read it as the gate did.
_OF_THE_BODY = frozenset({"content-type", "content-encoding"})


def _sent_header(value: object) -> str:
    name = header_name(value)
    if is_our_own(name) or read_as(name) in _MADE:
        raise ValueError("is made by the sidecar for each request; name a header such as Authorization")
    if read_as(name) in _OF_THE_BODY or decides(name):
        raise ValueError("can change what a request asks for; name a header such as Authorization")
    return name


def _value_file(value: object, info: ValidationInfo) -> Path:
    path = folder_of(value, info)
    if reads_keys(info) and (info.context or {}).get("starting", True):
        try:
            keyfiles.header_value(path)
        except KeyFileUnusable as exc:
            raise ValueError(f"{exc}; it holds the value of the header, as one line") from exc
    return path


class CredentialSection(Section):
    """A header with which the sidecar, and not the caller, proves itself to the backend."""

    example = "{header: Authorization, value_file: backend-token}"

    header: Annotated[str, Kind(_sent_header, {"type": "string", "minLength": 1})]
    """The header, such as `Authorization`. What a client sends under this name is dropped where it is set."""
    value_file: Annotated[Path, Kind(_value_file, {"type": "string", "minLength": 1})]
    """The file with its value as one line, such as `Bearer ...`. It is read again when it changes."""
    on: Annotated[tuple[CredentialArea, ...], LIST, NOT_EMPTY] = ("gated",)
    """Where it is sent: `gated`, with requests that were admitted; `pass`, with those that pass through."""
