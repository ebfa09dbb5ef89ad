"""The calls of the sidecar as rows, and the parts that several rows share.

The routes and the OpenAPI document are made from the rows. Each row stands in the file of its handler. The
return type of the handler is the model of the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType, UnionType
from typing import Any, Generic, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel

from sidecar.core.roles import Role
from sidecar.store.lists import CURSOR, DECISION_CURSOR
from sidecar.web.wire.request import DEFAULT_PAGE, MAX_PAGE

T = TypeVar("T")

Schema = Mapping[str, Any]
# The listener of a call. `scopes` is the listener that `scopes.serve_on` names.
Listener = Literal["data", "scopes", "admin", "ops"]

DECISION_ID_HEADER = "Scopegate-Decision-Id"
REQUEST_ID_HEADER = "X-Request-Id"


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter in a path, a query or a header. In a path it is always required."""

    name: str
    place: Literal["path", "query", "header"]
    schema: Schema
    description: str = ""
    required: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Body:
    """A JSON body: its schema or model, and working examples by name. Without `schema` it is not JSON.
    `others` maps the further media types that the body may have to their schemas."""

    schema: Schema | type[BaseModel] | None
    examples: Mapping[str, Any] = field(default_factory=dict)
    required: bool = True
    others: Mapping[str, Schema] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer. `status` is `default` for any status. `contents` maps media types to schemas; without it,
    the answer is what the handler returns, as JSON. `headers` are always present, `optional_headers` only
    sometimes. `links` maps names to OpenAPI links."""

    description: str
    status: str = "200"
    contents: Mapping[str, Schema] | None = None
    headers: tuple[str, ...] = ()
    optional_headers: tuple[str, ...] = ()
    links: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Reply(Generic[T]):
    """A JSON answer that needs another status than 200, or names the decision that records it."""

    body: T
    status: int = 200
    decision_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One call, such as `GET /api/v1/status`.

    `handler` is a method that takes the request and, if the row has query parameters, their `Query`. Rows of
    gated routes have none, because the data listener has no router. `errors` are the codes of its problems.
    `error_headers` are headers that a problem may have. `relayed` says that the backend may answer with the
    same statuses. `tenant` says whether the call needs the tenant header, if one is configured.
    `secured` says that it needs a completion token. With a method of authentication, its caller needs one of
    `roles`, of which the first is the weakest; without any, every caller may make it.
    """

    call: str
    listener: Listener = "admin"
    name: str
    tag: str
    summary: str
    description: str = ""
    parameters: tuple[Parameter, ...] = ()
    body: Body | None = None
    answers: tuple[Answer, ...]
    errors: tuple[str, ...] = ()
    error_headers: tuple[str, ...] = ()
    relayed: bool = False
    tenant: Literal["required", "optional"] | None = None
    secured: bool = False
    roles: tuple[Role, ...] = ()
    handler: Callable[..., Any] | None = None

    @property
    def method(self) -> str:
        return self.call.partition(" ")[0]

    @property
    def path(self) -> str:
        return self.call.partition(" ")[2]

    @property
    def query(self) -> tuple[Parameter, ...]:
        return tuple(parameter for parameter in self.parameters if parameter.place == "query")

    def model(self) -> Any:
        """The model of the JSON that the handler returns."""
        return next(_models(get_type_hints(self.handler)["return"]))


def _models(returned: Any) -> Iterator[Any]:
    """The models among the types that a handler returns."""
    if get_origin(returned) in (Union, UnionType):
        for one in get_args(returned):
            yield from _models(one)
    elif get_origin(returned) is Reply:
        yield from _models(*get_args(returned))
    elif hasattr(returned, "__total__"):
        yield returned


def guarded_errors(operation: Operation) -> tuple[str, ...]:
    """The codes with which the sidecar's own calls refuse a foreign host, for a change another site, and a
    caller that may not make them."""
    if operation.listener not in ("admin", "scopes"):
        return ()
    changes = operation.method not in ("GET", "HEAD", "OPTIONS")
    hosts = ("misdirected_request", "cross_site") if changes else ("misdirected_request",)
    return (*hosts, *AUTH_ERRORS, "role_required") if operation.roles else hosts


TAGS: Mapping[str, str] = MappingProxyType(
    {
        "Scopes": "Request an execution scope, list scopes, revoke one, rehearse an action.",
        "Execute": "Gated requests: an execution goes to the backend only if it consumes a scope.",
        "Decisions": "The decisions of the gate and of other services, in an append-only log.",
        "Emitters": "Records of decisions that other services make.",
        "Executions": "Admitted executions and their outcomes.",
        "Freezes": "An operator stops executions, and lets them go on.",
        "Status": "The state of the sidecar.",
        "Health": "For the platform: liveness, readiness, metrics.",
        "Documentation": "This document.",
    }
)

# Every header that the document shows for an answer.
HEADERS: Mapping[str, Schema] = {
    DECISION_ID_HEADER: {
        "description": "The decision that records this.",
        "schema": {"type": "string", "format": "uuid"},
    },
    REQUEST_ID_HEADER: {
        "description": "The id of the request: its own, or a new one.",
        "schema": {"type": "string"},
    },
    "Scopegate-Scope-Status": {
        "description": "The status of the scope after this.",
        "schema": {"type": "string", "enum": ["active", "exhausted", "expired", "revoked"]},
    },
    "Scopegate-Attempts-Remaining": {
        "description": "The attempts that remain of the scope.",
        "schema": {"type": "integer", "minimum": 0},
    },
    "Idempotency-Replayed": {
        "description": "This is the answer of an earlier request under the same `Idempotency-Key`, whose "
        "decision `Scopegate-Decision-Id` names.",
        "schema": {"const": "true"},
    },
    "Retry-After": {
        "description": "The seconds after which a retry may succeed.",
        "schema": {"type": "integer", "minimum": 1},
    },
    "Allow": {"description": "The methods that are served.", "schema": {"type": "string"}},
    "Location": {"description": "Where it is.", "schema": {"type": "string"}},
    "Content-Security-Policy": {
        "description": "What the page may load.",
        "schema": {"type": "string"},
    },
}

# Shared parts ---------------------------------------------------------------------------------------

# Of a credential that is missing or not valid.
AUTH_ERRORS = ("unauthenticated", "auth_throttled")
BODY_ERRORS = ("invalid_request", "body_timeout", "body_too_large", "unsupported_media_type")
STORE_ERRORS = ("store_unavailable",)
SUBMIT_ERRORS = ("store_unavailable", "overloaded")
UNREADY_ERRORS = ("draining", "policy_unavailable", "store_unavailable", "overloaded")

UUID: Schema = {"type": "string", "format": "uuid"}
REQUEST_ID = Parameter(
    REQUEST_ID_HEADER,
    "header",
    {"type": "string"},
    "Names the request in records and answers. If it is not printable, a new one is made.",
)
DECISION_ID = Parameter(
    "decision_id",
    "path",
    {"type": "string", "pattern": "^[^/{}]+$"},
    "A UUID, unless a program gave its record another id.",
)
SCOPE_ID = Parameter("scope_id", "path", {"type": "string", "pattern": "^[^/{}]+$"})
EXECUTION_ID = Parameter("decision_id", "path", UUID, "The decision that admitted the execution.")
LIMIT = Parameter(
    "limit",
    "query",
    {"type": "integer", "minimum": 1, "maximum": MAX_PAGE, "default": DEFAULT_PAGE},
    "How many to show.",
)
SINCE = Parameter("since", "query", {"type": "string", "format": "date-time"}, "From this time on.")
AFTER_NUMBER = Parameter(
    "before", "query", {"type": "string", "pattern": f"^{CURSOR}$"}, "The `next` of the page before."
)
AFTER_DECISION = Parameter(
    "before", "query", {"type": "string", "pattern": f"^{DECISION_CURSOR}$"}, "The `next` of the page before."
)


def link(name: str, **parameters: str) -> dict[str, Any]:
    """A link to the call of this name, with its parameters from the request or the answer."""
    return {"operationId": name, "parameters": parameters}


TO_DECISION: Mapping[str, Any] = {
    "Decision": {
        **link("getDecision", decision_id=f"$response.header.{DECISION_ID_HEADER}"),
        "description": "The record that this left.",
    }
}


def choice(name: str, description: str, values: tuple[str, ...] = ()) -> Parameter:
    """A query parameter that takes one of some values, or any text."""
    schema = {"type": "string", "enum": list(values)} if values else {"type": "string"}
    return Parameter(name, "query", schema, description)
