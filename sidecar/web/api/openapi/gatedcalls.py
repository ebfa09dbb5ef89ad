"""The rows of the gated routes, which the configuration names, and the schemas of their bodies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sidecar.core.bodies import FORM_TYPE
from sidecar.core.facts import MAX_ID_CHARS, WHOLE_PATH, FactSources, Source
from sidecar.core.idempotency import MAX_KEY_CHARS, MIN_KEY_CHARS
from sidecar.core.pattern import RoutePattern
from sidecar.core.target import LOOKING, METHODS
from sidecar.settings.routes import Route
from sidecar.web.api.operation import (
    AUTH_ERRORS,
    BODY_ERRORS,
    DECISION_ID_HEADER,
    REQUEST_ID,
    REQUEST_ID_HEADER,
    SUBMIT_ERRORS,
    TO_DECISION,
    UNREADY_ERRORS,
    Answer,
    Body,
    Operation,
    Parameter,
    Schema,
)
from sidecar.web.wire.models import IDENTIFIER, IN_A_HEADER, TARGET_AGENTS

# The path of the recovery API, shown for every pattern that matches it.
EXECUTE_PATH = "/api/v1/recovery/execute"
OF_THE_SCOPE = ("Scopegate-Scope-Status", "Scopegate-Attempts-Remaining")
IDEMPOTENCY_KEY = Parameter(
    "Idempotency-Key",
    "header",
    {
        "type": "string",
        "minLength": MIN_KEY_CHARS,
        "maxLength": MAX_KEY_CHARS,
        # Characters that every client sends as they are. The gate takes other printable ones, too.
        "pattern": "^[!-~]([ -~]*[!-~])?$",
    },
    "The name of this action. A repeat with the same key, method, target and body gets the first answer, and "
    "executes nothing.",
)

_GIVEN = {
    "scope_id": "scope_0123456789abcdef0123456789abcdef",
    "incident_id": "inc_123",
    "action": "retry_agent",
}
_MISSING: Schema = {"type": "null"}
_EMPTY: Schema = {"const": ""}
# The schema of a {name} in a gated path: characters that all parsers read alike. Most other characters are
# refused as ambiguous.
_NAME: Schema = {
    "type": "string",
    "maxLength": MAX_ID_CHARS,
    "pattern": "^[A-Za-z0-9_~-][A-Za-z0-9._~-]*$",
}
_NAME_OR_EMPTY: Schema = {name: value for name, value in IDENTIFIER.items() if name != "minLength"}
_AGENT = "One target agent."
_UPSTREAM_ERRORS = ("credential_unavailable", "upstream_unreachable", "upstream_failed", "upstream_timeout")
_KEY_ERRORS = ("idempotency_key_reused", "idempotency_in_flight", "outcome_unknown")
_TARGET_ERRORS = ("invalid_request", "ambiguous_path", "override_refused", "upgrade_refused")
_BOUND_ERRORS = (
    "scoped_execution_required",
    "scope_not_found",
    "incident_mismatch",
    "action_outside_scope",
    "target_outside_scope",
    "executor_outside_scope",
    "frozen",
    "role_required",
    "tenant_mismatch",
    *AUTH_ERRORS,
    "scope_revoked",
    "scope_expired",
    "scope_exhausted",
    "policy_denied",
    "braked",
)


def gated_operations(routes: Sequence[Route]) -> Iterator[Operation]:
    """The calls of every gated route, path by path. Of a route with several paths, the first is shown.

    If two routes have the same call, the first route is shown.
    """
    shown: dict[str, dict[str, Operation]] = {}
    firsts: dict[str, tuple[Route, str]] = {}
    for number, route in enumerate(routes, start=1):
        path = path_of(route.path.patterns[0])
        calls, suffix = shown.setdefault(path, {}), "" if number == 1 else str(number)
        firsts.setdefault(path, (route, suffix))
        for method in (each for each in METHODS if route.calls.lists(each) and each not in calls):
            calls[method] = _execute(route, path, method, number)
    for path, calls in shown.items():
        yield from calls.values()
        route, suffix = firsts[path]
        for method in LOOKING:
            if method not in calls:
                yield _look(route, path, method, suffix)


def path_of(pattern: RoutePattern) -> str:
    """The path shown for a pattern: the recovery API's path if the pattern matches it, else the shortest."""
    path = pattern.text.removeprefix("**").replace("...}", "}")
    return EXECUTE_PATH if pattern.anywhere and EXECUTE_PATH.endswith(path) else path


def body_name(number: int = 1) -> str:
    """The name of the schema of a route's body."""
    return "ExecuteRequest" if number == 1 else f"ExecuteRequest{number}"


# The calls ------------------------------------------------------------------------------------------


def _execute(route: Route, path: str, method: str, number: int) -> Operation:
    first, *others = route.path.patterns
    gated = f"Gated is any path that ends so (`{first.text}`)." if first.anywhere else ""
    if others:
        gated += f" The route has further paths: {', '.join(f'`{one.text}`' for one in others)}."
    name = "execute" if number == 1 else f"execute{number}"
    return Operation(
        listener="data",
        call=f"{method} {path}",
        name=name if method == _main(route) else f"{name}{method.title()}",
        tag="Execute",
        summary="Execute a recovery action under a scope",
        description=(
            "Spends an attempt of the scope, then forwards method, target and body as they are, once. The "
            "answer is the backend's own, whatever its status. Errors of the sidecar are problems whose "
            f"`type` begins with `urn:scopegate:error:`. {gated.lstrip()}"
        ).rstrip(),
        parameters=(*_parameters(route), IDEMPOTENCY_KEY, REQUEST_ID),
        body=_body(route, body_name(number)),
        answers=(
            Answer(
                "The backend's answer.",
                status="default",
                contents={"*/*": {}},
                headers=(DECISION_ID_HEADER, REQUEST_ID_HEADER),
                # An action of low risk may need no scope.
                optional_headers=(*OF_THE_SCOPE, "Idempotency-Replayed"),
                links=TO_DECISION,
            ),
        ),
        errors=(
            *_TARGET_ERRORS,
            *BODY_ERRORS,
            *_BOUND_ERRORS,
            *_KEY_ERRORS,
            *_UPSTREAM_ERRORS,
            *UNREADY_ERRORS,
        ),
        error_headers=(DECISION_ID_HEADER, *OF_THE_SCOPE, REQUEST_ID_HEADER),
        relayed=True,
        tenant="required",
    )


def _main(route: Route) -> str:
    """The method whose call is named after the route."""
    return "POST" if route.calls.lists("POST") else route.methods[0]


def _look(route: Route, path: str, method: str, suffix: str) -> Operation:
    return Operation(
        listener="data",
        call=f"{method} {path}",
        name=f"{method.lower()}Execute{suffix}",
        tag="Execute",
        summary=f"{method} passes through to the backend",
        description=(
            "As long as it carries neither a body nor a method or target override, and `gate.unlisted` does "
            "not refuse it."
        ),
        parameters=tuple(_in_path(name) for name in route.path.patterns[0].names),
        answers=(Answer("The backend's answer.", status="default", contents={"*/*": {}}),),
        errors=(*_TARGET_ERRORS, *AUTH_ERRORS, "not_listed", *_UPSTREAM_ERRORS, *SUBMIT_ERRORS),
        error_headers=(DECISION_ID_HEADER, REQUEST_ID_HEADER),
        relayed=True,
    )


def spending(route: Route) -> Mapping[str, Any]:
    """The link from a granted scope to the call of the route that spends it."""
    found = {
        "scope_id": "$response.body#/scope_id",
        "incident_id": "$response.body#/incident_id",
        "action": "$response.body#/allowed_actions/0",
    }
    parameters = {
        f"{source.kind}.{source.name.title() if source.kind == 'header' else source.name}": found[name]
        for name in _GIVEN
        for source in (_source(route.sources, name),)
        if source.kind in ("path", "query", "header") and source.name != WHOLE_PATH
    }
    link: dict[str, Any] = {"operationId": "execute", "description": "Spend it."}
    if parameters:
        link["parameters"] = parameters
    return {**link, "requestBody": _filled(route.sources, found)} if "json" in route.body else link


# Parameters and bodies ------------------------------------------------------------------------------


def _parameters(route: Route) -> tuple[Parameter, ...]:
    sources = route.sources
    found = {name: _in_path(name) for name in route.path.patterns[0].names}
    places = [(part, name) for name in _GIVEN for part in _source(sources, name).single]
    places += [(part, "") for source in sources.target_agents for part in source.single]
    for source, fact in reversed(places):  # what is required wins
        of_a_joined = not fact or source is not _source(sources, fact)
        description = f"The {fact}." if not of_a_joined else f"A part of the {fact}." if fact else _AGENT
        if source.kind == "path" and source.name != WHOLE_PATH:
            found[source.name] = _in_path(source.name, description)
        elif source.kind == "query":
            schema = IDENTIFIER if fact else _NAME_OR_EMPTY
            found[str(source)] = Parameter(source.name, "query", schema, description, required=bool(fact))
        elif source.kind == "header":
            name = source.name.title()
            found[str(source)] = Parameter(name, "header", IN_A_HEADER, description, required=bool(fact))
    return tuple(found.values())


def _in_path(name: str, description: str = "") -> Parameter:
    return Parameter(name, "path", _NAME, description)


def _body(route: Route, name: str) -> Body | None:
    """The body of a route's calls; None if it has no bytes."""
    others: dict[str, Schema] = {media_type: {} for media_type in route.content_types}
    if "form" in route.body:
        others[FORM_TYPE] = _form_schema(route.sources)
    if "any" in route.body:
        others["*/*"] = {}
    is_json = "json" in route.body
    if not is_json and not others:
        return None
    return Body(
        schema={"$ref": f"#/components/schemas/{name}"} if is_json else None,
        examples={"with a scope of yours": _filled(route.sources, _GIVEN)} if is_json else {},
        required=not route.bodies.may_be_empty,
        others=others,
    )


def _form_schema(sources: FactSources) -> Schema:
    """The schema of a form: the fields from which the gate reads facts."""
    fields = {place.name: {"type": "string"} for place in sources.single if place.kind == "form"}
    return {"type": "object", "properties": fields}


@dataclass(slots=True)
class _Place:
    """One member on the path to a fact in a body: its own schema, and the members below it."""

    below: dict[str, _Place] = field(default_factory=dict)
    schema: Schema | None = None
    holds_parameters: bool = False

    def at(self, tokens: Sequence[str]) -> _Place:
        place = self
        for token in tokens:
            place = place.below.setdefault(token, _Place())
        return place

    @property
    def required(self) -> bool:
        return self.schema is IDENTIFIER or any(place.required for place in self.below.values())

    def rendered(self) -> dict[str, Any]:
        if self.schema is not None:
            return dict(self.schema)
        members: dict[str, Any] = {}
        if self.below:
            members["properties"] = {name: place.rendered() for name, place in self.below.items()}
        needed = [name for name, place in self.below.items() if place.required]
        if self.holds_parameters and not needed:
            return {"anyOf": [{"type": "object", **members}, _MISSING, _EMPTY]}
        if needed:
            return {"type": "object", **members, "required": needed}
        return members  # a member with only optional members may have any type


def body_schema(sources: FactSources) -> dict[str, Any]:
    """The schema of a gated body. It constrains only the members from which the gate reads facts."""
    body = _Place()
    for name in _GIVEN:
        _put(body, _source(sources, name), IDENTIFIER)
    for source in sources.target_agents:
        _put(body, source, {"anyOf": [TARGET_AGENTS, _MISSING, _EMPTY]})
    if sources.parameters is not None:
        body.at(sources.parameters.tokens).holds_parameters = True
    description = (
        "What is executed, and under which scope. Other members are the backend's. Where several places hold "
        "target agents, they agree."
    )
    return {"description": description, **body.rendered(), "type": "object"}


def _put(body: _Place, source: Source, schema: Schema) -> None:
    if source.kind == "pointer":
        body.at(source.tokens).schema = schema


def _filled(sources: FactSources, values: Mapping[str, str]) -> dict[str, Any]:
    """A body with these values at the places where the route reads them."""
    body: dict[str, Any] = {}
    for name, value in values.items():
        tokens = _source(sources, name).tokens
        holder = body
        for token in tokens[:-1]:
            holder = holder.setdefault(token, {})
        if tokens:
            holder[tokens[-1]] = value
    return body


def _source(sources: FactSources, name: str) -> Source:
    source: Source = getattr(sources, name)
    return source
