"""The errors of a call in the document: one schema, the possible codes, and an example of each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from sidecar.errors import ERRORS, Refusal
from sidecar.web.api.openapi.operation import HEADERS, REQUEST_ID_HEADER
from sidecar.web.wire.problem import members_of

PROBLEM = "application/problem+json"
# The errors of every call. `invalid_request` is one, because every listener refuses a malformed host.
ALWAYS = ("invalid_request", "internal_error")

_SCOPE_ID = "scope_0123456789abcdef0123456789abcdef"
_WRONG: Mapping[str, Any] = {
    "member": "intent",
    "errors": [{"member": "/intent", "problem": "is required and must say why; it cannot be blank"}],
}

# Examples of the additional members of each error code. A code that is not listed has none.
BROUGHT: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "scoped_execution_required": {"incident_id": "inc_123", "action": "retry_agent"},
        "scope_exhausted": {"scope_id": _SCOPE_ID, "bound": "max_attempts"},
        "scope_expired": {"scope_id": _SCOPE_ID, "expires_at": "2026-01-31T12:05:00.000000+00:00"},
        "scope_revoked": {"scope_id": _SCOPE_ID},
        "incident_mismatch": {"scope_id": _SCOPE_ID, "incident_id": "inc_124"},
        "action_outside_scope": {"scope_id": _SCOPE_ID, "action": "restart_pod"},
        "target_outside_scope": {"scope_id": _SCOPE_ID, "target_agents": ["agent_2"]},
        "policy_denied": {"rules": [], "action": "drop_database"},
        "braked": {
            "rules": ["storm-brake"],
            "retry_after_seconds": 1740,
            "ends_at": "2026-01-31T12:34:56.000000+00:00",
        },
        "scope_not_found": {"scope_id": _SCOPE_ID},
        "decision_not_found": {"decision_id": "01961234-5678-7abc-8def-0123456789ab"},
        "not_reconcilable": {"execution_status": "answered"},
        "reload_refused": {
            "errors": ["policies/actions.yaml:3:11: actions.retry_agent.risk: expects one of low, medium"]
        },
        "body_too_large": {"max_bytes": 1_048_576},
        "invalid_scope": _WRONG,
        "upstream_unreachable": {"cause": "connection refused"},
        "upstream_failed": {"cause": "the connection was reset"},
        "upstream_timeout": {"cause": "no whole answer within 30 s"},
        "store_unavailable": {"cause": "disk I/O error"},
    }
)


def responses(codes: Iterable[str], told: tuple[str, ...], *, relayed: bool) -> dict[str, Any]:
    """The problems of a call, by status. `told` are headers that they may have."""
    by_status: dict[int, tuple[str, ...]] = {}
    for code in dict.fromkeys((*codes, *ALWAYS)):
        status = ERRORS[code].status
        by_status[status] = (*by_status.get(status, ()), code)
    return {
        str(status): response(status, of_status, told, relayed=relayed)
        for status, of_status in sorted(by_status.items())
    }


def response(
    status: int, codes: tuple[str, ...], told: tuple[str, ...] = (), *, relayed: bool = False
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
    headers = {name: dict(HEADERS[name]) for name in told}
    for name, needed in (("Retry-After", 429), ("Retry-After", 503), ("Allow", 405)):
        if status == needed:
            headers[name] = {**HEADERS[name], "required": not relayed}
    shown: dict[str, Any] = {"description": "\n".join(lines)}
    if headers:
        shown["headers"] = headers
    return {**shown, "content": content}


def shared() -> dict[str, Any]:
    """The answers to a request that matches no call."""
    return {
        "NotFound": response(404, ("not_found",)),
        "MethodNotAllowed": response(405, ("method_not_allowed",), (REQUEST_ID_HEADER,)),
    }


def _example(code: str) -> dict[str, Any]:
    return members_of(Refusal(code, f"{ERRORS[code].title}.", BROUGHT.get(code, {})))
