"""The row types of the OpenAPI document, and the parts that several calls share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from pydantic import BaseModel

from sidecar.web.wire.asked import DEFAULT_PAGE, MAX_PAGE

Schema = Mapping[str, Any]
# The listener of a call. `scopes` is the listener that `scopes.serve_on` names.
Listener = Literal["data", "scopes", "admin", "ops"]

DECISION_ID_HEADER = "Scopegate-Decision-Id"
REQUEST_ID_HEADER = "X-Request-Id"


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One parameter in a path, a query or a header."""

    name: str
    place: Literal["path", "query", "header"]
    schema: Schema
    description: str = ""
    required: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Body:
    """A JSON body: its schema or model, and working examples by name."""

    schema: Schema | type[BaseModel]
    examples: Mapping[str, Any] = field(default_factory=dict)
    required: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One answer. `status` is `default` for any status. `contents` maps media types to schemas. `headers` are
    always present. `links` maps names to OpenAPI links."""

    status: str
    description: str
    contents: Mapping[str, Schema | type[BaseModel]]
    headers: tuple[str, ...] = ()
    links: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One call.

    `errors` are the codes of its problems. `told` are headers that a problem may have. `relayed` says that
    the backend may answer with the same statuses. `tenant` says whether the call needs the tenant header, if
    one is configured.
    """

    listener: Listener
    method: Literal["get", "head", "options", "post", "put", "delete"]
    path: str
    name: str
    tag: str
    summary: str
    description: str = ""
    parameters: tuple[Parameter, ...] = ()
    body: Body | None = None
    answers: tuple[Answer, ...]
    errors: tuple[str, ...] = ()
    told: tuple[str, ...] = ()
    relayed: bool = False
    tenant: Literal["required", "optional"] | None = None


def guarded_errors(operation: Operation) -> tuple[str, ...]:
    """The codes with which the sidecar's own calls refuse a foreign host and, for a change, another site."""
    if operation.listener not in ("admin", "scopes"):
        return ()
    changes = operation.method not in ("get", "head", "options")
    return ("misdirected_request", "cross_site") if changes else ("misdirected_request",)


TAGS: Mapping[str, str] = MappingProxyType(
    {
        "Scopes": "Ask for an execution scope, list an incident's scopes, revoke one, rehearse an action.",
        "Execute": "What is gated: an execution goes to the backend only if it spends a scope.",
        "Decisions": "What was decided, by the gate or by others, in an append-only log.",
        "Emitters": "Decisions that other services make and tell.",
        "Executions": "What was admitted and how it ended.",
        "Status": "How the sidecar is.",
        "Health": "For the platform: liveness, readiness, metrics.",
        "Documentation": "This document.",
    }
)

# Every header that the document shows for an answer.
HEADERS: Mapping[str, Schema] = {
    DECISION_ID_HEADER: {
        "description": "The decision under which this is recorded.",
        "schema": {"type": "string", "format": "uuid"},
    },
    REQUEST_ID_HEADER: {
        "description": "The request's own, or the one that was made for it.",
        "schema": {"type": "string"},
    },
    "Scopegate-Scope-Status": {
        "description": "How the scope stands after this.",
        "schema": {"type": "string", "enum": ["active", "exhausted", "expired", "revoked"]},
    },
    "Scopegate-Attempts-Remaining": {
        "description": "What is left of the scope.",
        "schema": {"type": "integer", "minimum": 0},
    },
    "Retry-After": {
        "description": "The seconds after which it is worth another try.",
        "schema": {"type": "integer", "minimum": 1},
    },
    "Allow": {"description": "The methods that are served.", "schema": {"type": "string"}},
    "Location": {"description": "Where it is.", "schema": {"type": "string"}},
    "Content-Security-Policy": {
        "description": "What the page may load and call: nothing but its own listener.",
        "schema": {"type": "string"},
    },
}

# Shared parts ---------------------------------------------------------------------------------------

BODY_ERRORS = ("invalid_request", "body_timeout", "body_too_large", "unsupported_media_type")
STORE_ERRORS = ("store_unavailable",)
SUBMIT_ERRORS = ("store_unavailable", "overloaded")
UNREADY_ERRORS = ("draining", "policy_unavailable", "store_unavailable", "overloaded")

UUID: Schema = {"type": "string", "format": "uuid"}
REQUEST_ID = Parameter(
    name=REQUEST_ID_HEADER,
    place="header",
    schema={"type": "string"},
    description="Names the request in records and answers. Another one is made where it is not printable.",
)
DECISION_ID = Parameter(
    name="decision_id",
    place="path",
    schema={"type": "string", "pattern": "^[^/{}]+$"},
    description="A UUID, unless a program named its record otherwise.",
    required=True,
)
SCOPE_ID = Parameter(
    name="scope_id",
    place="path",
    schema={"type": "string", "pattern": "^[^/{}]+$"},
    required=True,
)
EXECUTION_ID = Parameter(
    name="decision_id",
    place="path",
    schema=UUID,
    description="The decision that admitted the execution.",
    required=True,
)
LIMIT = Parameter(
    name="limit",
    place="query",
    schema={"type": "integer", "minimum": 1, "maximum": MAX_PAGE, "default": DEFAULT_PAGE},
    description="How many to show.",
)
SINCE = Parameter(
    name="since",
    place="query",
    schema={"type": "string", "format": "date-time"},
    description="From this time on.",
)
AFTER_NUMBER = Parameter(
    name="before",
    place="query",
    schema={"type": "string", "pattern": "^[0-9]{1,18}$"},
    description="The `next` of the page before.",
)
AFTER_DECISION = Parameter(
    name="before",
    place="query",
    schema={"type": "string", "pattern": "^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$"},
    description="The `next` of the page before.",
)
TO_DECISION: Mapping[str, Any] = {
    "Decision": {
        "operationId": "getDecision",
        "parameters": {"decision_id": f"$response.header.{DECISION_ID_HEADER}"},
        "description": "The record that this left.",
    }
}


def filtered(name: str, description: str, values: tuple[str, ...] = ()) -> Parameter:
    schema = {"type": "string", "enum": list(values)} if values else {"type": "string"}
    return Parameter(name=name, place="query", schema=schema, description=description)


def in_json(model: Schema | type[BaseModel]) -> Mapping[str, Schema | type[BaseModel]]:
    return {"application/json": model}


def shows(description: str, model: type[BaseModel], links: Mapping[str, Any] | None = None) -> Answer:
    return Answer(status="200", description=description, contents=in_json(model), links=links or {})
