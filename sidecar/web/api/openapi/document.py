"""Builds the OpenAPI 3.1 document of a sidecar from the models, the tables of calls and the configuration.

The document has the same bytes for the same version and settings. The caller passes the listeners' addresses.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import groupby
from typing import Any

from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from sidecar import __version__
from sidecar.core.money import to_dollars
from sidecar.settings.addresses import Address, Listen, SocketFile
from sidecar.settings.reading import Settings
from sidecar.settings.routes import Route
from sidecar.settings.sections import ListenTlsSection
from sidecar.web.api.decisions import DECISIONS
from sidecar.web.api.docs import DOCUMENTATION
from sidecar.web.api.emitters import EMITTERS, RUNS_AND_SWITCH
from sidecar.web.api.executions import EXECUTIONS
from sidecar.web.api.explain import EXPLAIN
from sidecar.web.api.freezes import FREEZES
from sidecar.web.api.openapi import problems
from sidecar.web.api.openapi.gatedcalls import body_name, body_schema, gated_operations, spending
from sidecar.web.api.operation import (
    HEADERS,
    TAGS,
    Answer,
    Body,
    Operation,
    Parameter,
    Schema,
    guarded_errors,
)
from sidecar.web.api.ops import OPS
from sidecar.web.api.reports import REPORTS
from sidecar.web.api.scopelists import SCOPE_LISTS
from sidecar.web.api.scopes import MIN_TTL_SECONDS, SCOPES
from sidecar.web.api.state import STATE
from sidecar.web.wire.models import IN_A_HEADER

# The links from a scope to calls that need its tenant.
COMPLETION_TOKEN = "completionToken"
OF_A_TENANT = ("Execute", "Listed", "Revoke")

_DESCRIPTION = """\
A sidecar that lets a recovery action through only if it consumes an execution scope.

Three listeners serve these calls; each call says under `servers` where it is. What the data listener does not
name here passes through to the backend.

Every error of the sidecar is `application/problem+json` (RFC 9457) with `error` and `message` on top. On the
admin and the ops listener HEAD is answered as GET is, any other method of a path with 405 and `Allow`, and
any other path with 404; what is not HTTP gets a 400 as plain text there. Bodies are strict JSON: no duplicate
keys, no trailing bytes, whole numbers written without a fraction.

The schemas of answers name every member, because this document belongs to exactly the version that
serves it."""


def document(settings: Settings, *, data: Address, ops: Address) -> dict[str, Any]:
    """The document of a sidecar with these settings, and with its data and ops listeners at these addresses.

    The admin listener serves the document, so its own address is `/`.
    """
    operations = tuple(operations_of(settings))
    servers = {
        "admin": {"url": "/", "description": "The admin listener, which serves this document"},
        "data": _server(data, settings.data.tls, "The data listener, before the backend"),
        "ops": _server(ops, settings.ops.tls, "The ops listener"),
    }
    serves = {"scopes": settings.scopes.serve_on, "data": "data", "admin": "admin", "ops": "ops"}
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        item = paths.setdefault(operation.path, {"servers": [servers[serves[operation.listener]]]})
        item[operation.method.lower()] = _operation(
            operation, serves[operation.listener], settings.gate.tenant_header
        )
    tags = {operation.tag for operation in operations}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Scopegate",
            "version": __version__,
            "summary": "A recovery action without a valid execution scope is invalid by definition.",
            "description": _DESCRIPTION,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": list(servers.values()),
        "tags": [{"name": name, "description": text} for name, text in TAGS.items() if name in tags],
        "paths": paths,
        "components": {
            "schemas": _schemas(operations, settings),
            "responses": problems.shared(),
            "securitySchemes": {COMPLETION_TOKEN: {"type": "http", "scheme": "bearer"}},
        },
    }


def operations_of(settings: Settings) -> Iterator[Operation]:
    """Every call of a sidecar with these settings, in the order of the document.

    The document can show a path only once. If a gated path is also a path of the sidecar's own calls, on any
    listener, the document shows the sidecar's call.
    """
    routes = settings.gate.routes
    own = (
        *DECISIONS,
        *SCOPE_LISTS,
        *EXECUTIONS,
        *REPORTS,
        _without_principals(_of_routes(EXPLAIN, routes), settings),
        *EMITTERS,
        *RUNS_AND_SWITCH,
        *FREEZES,
        *STATE,
        *DOCUMENTATION,
        *OPS,
    )
    taken = {_unnamed(operation.path) for operation in (*SCOPES, *own)}
    gated: list[Operation] = []
    for path, operations in groupby(gated_operations(routes), lambda one: one.path):
        if _unnamed(path) not in taken:
            taken.add(_unnamed(path))
            gated += operations
    spend = {"Execute": spending(routes[0])} if any(one.name == "execute" for one in gated) else {}
    for operation in SCOPES:
        links = spend if operation.name == "createScope" else {}
        yield _linked(operation, links, settings.gate.tenant_header)
    yield from own
    yield from gated


def _linked(operation: Operation, links: Mapping[str, Any], tenant: str | None) -> Operation:
    """The call with further links. If a tenant header is configured, the links pass the scope's tenant on."""
    (answer,) = operation.answers
    links = {**links, **answer.links}
    if tenant is not None:
        same = {f"header.{tenant}": f"$request.header.{tenant}"}
        links = {
            name: {**link, "parameters": {**link.get("parameters", {}), **same}}
            if name in OF_A_TENANT
            else link
            for name, link in links.items()
        }
    return replace(operation, answers=(replace(answer, links=links),))


def _of_routes(operation: Operation, routes: Iterable[Route]) -> Operation:
    """The call with its query parameter `route` limited to the configured routes."""
    labels = [each.label for each in routes]
    parameters = tuple(
        replace(one, schema={**one.schema, "enum": labels}) if one.name == "route" else one
        for one in operation.parameters
    )
    return replace(operation, parameters=parameters)


def _without_principals(operation: Operation, settings: Settings) -> Operation:
    """The call without the parameters that name a principal, if no method of authentication is configured."""
    if settings.auth.methods:
        return operation
    kept = tuple(one for one in operation.parameters if not one.name.startswith("principal"))
    return replace(operation, parameters=kept)


def _unnamed(path: str) -> str:
    """The path without its parameter names, because OpenAPI ignores them when it compares paths."""
    return re.sub(r"\{\w+\}", "{}", path)


def _server(address: Address, tls: ListenTlsSection, description: str) -> dict[str, str]:
    """The server entry of a listener. A wildcard address is shown as localhost."""
    scheme = "http" if tls.certificate_file is None else "https"
    if isinstance(address, SocketFile):
        return {
            "url": f"{scheme}://localhost",
            "description": f"{description}, on {address}",
            "x-unix-socket": str(address.path),
        }
    if address.host in ("0.0.0.0", "::"):
        address = Listen("localhost", address.port)
    return {"url": f"{scheme}://{address}", "description": description}


# One call -------------------------------------------------------------------------------------------


def _operation(operation: Operation, listener: str, tenant: str | None) -> dict[str, Any]:
    parameters = list(operation.parameters)
    if tenant is not None and operation.tenant is not None:
        parameters.append(
            Parameter(
                tenant,
                "header",
                IN_A_HEADER if operation.tenant == "required" else {"type": "string"},
                "The tenant.",
                required=operation.tenant == "required",
            )
        )
    entry: dict[str, Any] = {
        "tags": [operation.tag],
        "summary": operation.summary,
        "description": f"{operation.description}\n\nOn the {listener} listener.".strip(),
        "operationId": operation.name,
    }
    if parameters:
        entry["parameters"] = [_parameter(parameter) for parameter in parameters]
    if operation.body is not None:
        entry["requestBody"] = _body(operation.body)
    entry["responses"] = _responses(operation)
    if operation.secured:
        entry["security"] = [{COMPLETION_TOKEN: []}]
    return entry


def _parameter(parameter: Parameter) -> dict[str, Any]:
    described = {"description": parameter.description} if parameter.description else {}
    return {
        "name": parameter.name,
        "in": parameter.place,
        **described,
        "required": parameter.required or parameter.place == "path",
        "schema": parameter.schema,
    }


def _body(body: Body) -> dict[str, Any]:
    contents: dict[str, Any] = {}
    if body.schema is not None:
        examples = {name: {"value": value} for name, value in body.examples.items()}
        contents["application/json"] = {"schema": _reference(body.schema), "examples": examples}
    contents |= {kind: {"schema": schema, "examples": {}} for kind, schema in body.others.items()}
    return {"required": body.required, "content": contents}


def _responses(operation: Operation) -> dict[str, Any]:
    """The answers by status. `default` comes last."""
    errors = problems.responses(
        (*operation.errors, *guarded_errors(operation)), operation.error_headers, relayed=operation.relayed
    )
    answers = {answer.status: _answer(answer, operation) for answer in operation.answers}
    return dict(sorted({**errors, **answers}.items()))


def _answer(answer: Answer, operation: Operation) -> dict[str, Any]:
    entry: dict[str, Any] = {"description": answer.description}
    headers = {name: {**HEADERS[name], "required": True} for name in answer.headers}
    headers |= {name: dict(HEADERS[name]) for name in answer.optional_headers}
    if headers:
        entry["headers"] = headers
    if answer.contents is None:
        entry["content"] = {"application/json": {"schema": _reference(operation.model())}}
    elif answer.contents:
        entry["content"] = {kind: {"schema": schema} for kind, schema in answer.contents.items()}
    if answer.links:
        entry["links"] = dict(answer.links)
    return entry


# Schemas --------------------------------------------------------------------------------------------


class _Schemas(GenerateJsonSchema):
    """Generates schemas whose members have no title, because the member's name suffices. Answers have no
    members beside those of their model."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        del schema
        return False

    def typed_dict_schema(self, schema: Any) -> dict[str, Any]:
        return {"additionalProperties": False, **super().typed_dict_schema(schema)}


def _reference(schema: Schema | type[BaseModel]) -> Schema:
    if isinstance(schema, type):
        return {"$ref": f"#/components/schemas/{schema.__name__}"}
    return schema


def _models_of(operations: Iterable[Operation]) -> Iterator[type[Any]]:
    """The models of bodies and answers."""
    for operation in operations:
        if operation.body is not None and isinstance(operation.body.schema, type):
            yield operation.body.schema
        if any(answer.contents is None for answer in operation.answers):
            yield operation.model()


def _schemas(operations: Iterable[Operation], settings: Settings) -> dict[str, Any]:
    """The named schemas, by name."""
    models = dict.fromkeys(_models_of(operations))
    _, made = TypeAdapter.json_schemas(
        [(model.__name__, "validation", TypeAdapter(model)) for model in models],
        ref_template="#/components/schemas/{model}",
        schema_generator=_Schemas,
    )
    schemas: dict[str, Any] = {**made["$defs"], **problems.PROBLEM_SCHEMAS}
    _bound(schemas["ScopeRequest"]["properties"], settings)
    if not settings.auth.methods:
        del schemas["ScopeRequest"]["properties"]["executors"]
    for number, route in enumerate(settings.gate.routes, start=1):
        schemas[body_name(number)] = body_schema(route.sources)
    return dict(sorted(schemas.items()))


def _bound(terms: dict[str, Any], settings: Settings) -> None:
    """Add the configured limits and defaults to the terms of a scope."""
    limits, defaults = settings.scopes.limits, settings.scopes.defaults
    for name, least, most, default in (
        ("max_attempts", 1, limits.max_attempts, defaults.max_attempts),
        ("ttl_seconds", min(MIN_TTL_SECONDS, limits.ttl_seconds), limits.ttl_seconds, defaults.ttl_seconds),
        ("max_cost_usd", 0, to_dollars(limits.max_cost), to_dollars(defaults.max_cost)),
    ):
        terms[name] |= {"minimum": least, "maximum": most, "default": default}
