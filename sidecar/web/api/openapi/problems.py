"""The errors of a call in the document: one schema, the possible codes, and an example of each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, get_args

from sidecar.core.scope import ExecutionStatus
from sidecar.errors import ERRORS, MEMBERS, Refusal
from sidecar.web.api.operation import HEADERS, REQUEST_ID_HEADER
from sidecar.web.wire.problem import members_of

PROBLEM = "application/problem+json"
# The errors of every call. `invalid_request` is one, because every listener refuses a malformed host.
ALWAYS = ("invalid_request", "internal_error")

PROBLEM_SCHEMAS: Mapping[str, Mapping[str, Any]] = {
    "WrongMember": {
        "title": "WrongMember",
        "type": "object",
        "description": "One member of a body that is wrong, as a JSON pointer, and why.",
        "properties": {"member": {"type": "string"}, "problem": {"type": "string"}},
        "required": ["member", "problem"],
        "additionalProperties": False,
    },
    "Problem": {
        "title": "Problem",
        "type": "object",
        "description": "An error in the form of RFC 9457. Distinguish errors by `error`, never by the text. "
        "The members after `detail` are those of the error.",
        "properties": {
            "error": {"type": "string", "enum": list(ERRORS)},
            "message": {"type": "string"},
            "type": {"type": "string", "pattern": "^urn:scopegate:error:[a-z_]+$"},
            "title": {"type": "string"},
            "status": {"type": "integer", "minimum": 400, "maximum": 599},
            "detail": {"type": "string"},
            **MEMBERS,
            "execution_status": {**MEMBERS["execution_status"], "enum": list(get_args(ExecutionStatus))},
        },
        "required": ["error", "message", "type", "title", "status", "detail"],
        "additionalProperties": False,
    },
}


def responses(codes: Iterable[str], headers: tuple[str, ...], *, relayed: bool) -> dict[str, Any]:
    """The problems of a call, by status. `headers` are those that they may have."""
    by_status: dict[int, tuple[str, ...]] = {}
    for code in dict.fromkeys((*codes, *ALWAYS)):
        status = ERRORS[code].status
        by_status[status] = (*by_status.get(status, ()), code)
    return {
        str(status): response(status, of_status, headers, relayed=relayed)
        for status, of_status in sorted(by_status.items())
    }


def response(
    status: int, codes: tuple[str, ...], optional: tuple[str, ...] = (), *, relayed: bool = False
) -> dict[str, Any]:
    """The problems under one status. `relayed`: the backend may answer with that status, too."""
    problem = {
        "schema": {
            "allOf": [{"$ref": "#/components/schemas/Problem"}],
            "properties": {"status": {"const": status}, "error": {"enum": list(codes)}},
        },
        "examples": {code: {"value": _example(code)} for code in codes},
    }
    content: dict[str, Any] = {PROBLEM: problem}
    lines = [f"- `{code}`: {ERRORS[code].title}." for code in codes]
    if relayed:
        content["*/*"] = {"schema": {}}
        lines.append(f"- or the backend's own {status}.")
    headers = {name: dict(HEADERS[name]) for name in optional}
    for name, needed in (("Retry-After", 429), ("Retry-After", 503), ("Allow", 405)):
        if status == needed:
            headers[name] = {**HEADERS[name], "required": not relayed}
    if any("retry_after_seconds" in ERRORS[code].members for code in codes):
        headers.setdefault("Retry-After", dict(HEADERS["Retry-After"]))
    entry: dict[str, Any] = {"description": "\n".join(lines)}
    if headers:
        entry["headers"] = headers
    return {**entry, "content": content}


def shared() -> dict[str, Any]:
    """The answers to a request that matches no call."""
    return {
        "NotFound": response(404, ("not_found",)),
        "MethodNotAllowed": response(405, ("method_not_allowed",), (REQUEST_ID_HEADER,)),
    }


def _example(code: str) -> dict[str, Any]:
    return members_of(Refusal(code, f"{ERRORS[code].title}.", ERRORS[code].members))
