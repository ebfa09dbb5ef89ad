"""The section `gate` of the configuration: which requests need a scope, and how they are read."""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, model_validator

from sidecar.core.bodies import JSON_ONLY, Bodies
from sidecar.core.facts import DEFAULT_SOURCES, FactSources, Source, is_identifier
from sidecar.core.pattern import RoutePattern
from sidecar.core.policy import RiskClass
from sidecar.core.target import GatedCalls, conflicts
from sidecar.core.unlisted import ExceptedPaths, Treatment
from sidecar.files.yamlfile import KeyPath
from sidecar.settings import presets
from sidecar.settings.faults import refuse
from sidecar.settings.keys import LIVE, Section
from sidecar.settings.numbers import Bytes, Count, ErrorStatus, Lifetime, Seconds
from sidecar.settings.values import (
    LIST,
    AnswerPlace,
    BaseUrl,
    BodyKinds,
    BodyPlace,
    GatedPath,
    HeaderName,
    MediaTypes,
    Methods,
    Pattern,
    Place,
    Places,
    Preset,
    Risk,
    RouteName,
    ScopePlace,
)


class Route(Section):
    """One gated path, and where its facts stand. A place is a JSON pointer into the body (`/scope_id`),
    `path:name` for a `{name}` of the path, `query:name`, `form:name`, `header:Name`, or `const:text`. See
    [Places](#places)."""

    name: RouteName = None
    """The name of the route in records, answers and metrics: 1 to 64 of `A-Z a-z 0-9 . _ -`. `null`: its
    path."""
    path: GatedPath
    """A path, or a list of paths. `**/x` matches every path that ends in `/x`. Any other path matches only
    itself; a slash at its end is part of it. `{name}` takes one segment, or a part of one
    (`/actions/{action}:run`). Two of them in one segment need text between them that is more than letters and
    digits (`{team}:{agent}`). `{name...}` at the end takes one or more segments. See [Paths](#paths)."""
    methods: Methods = ("POST",)
    """The gated methods: any of GET, HEAD, POST, PUT, PATCH and DELETE. With GET, HEAD is gated, too. GET,
    HEAD and OPTIONS that no route of the path lists pass if they have no body and no override header."""
    other_methods: Literal["refuse", "pass"] = "refuse"
    """What becomes of a method that no route of the path lists: `refuse` answers 405, `pass` lets it through.
    Of several routes of a path, one that refuses is enough."""
    body: BodyKinds = JSON_ONLY.kinds
    """The kinds of body that are accepted, one or a list: `json` (one strict object), `form`
    (application/x-www-form-urlencoded), `empty` (no bytes) and `any` (opaque: no fact is read from it). See
    [Bodies](#bodies)."""
    content_types: MediaTypes = ()
    """Media types beside application/json whose bodies are read as `json`, such as
    application/merge-patch+json. Their bodies may be arrays, too."""
    mode: Literal["enforce", "shadow"] = "enforce"
    """`enforce` refuses requests without a valid scope. `shadow` forwards them and records what would have
    been refused; it protects nothing. See [Shadow routes](../../policies/README.md#shadow-routes)."""
    scope_id: ScopePlace = DEFAULT_SOURCES.scope_id
    """The place of the scope that the request spends. Without `json` in `body` the default is
    `header:X-Recovery-Scope-Id`."""
    incident_id: Place = DEFAULT_SOURCES.incident_id
    """The place of the incident. It must be the incident of the scope. Without `json` in `body` the default
    is `header:X-Recovery-Incident-Id`."""
    action: Place = DEFAULT_SOURCES.action
    """The place of the action. It must be one of the actions of the scope and of the catalogue. Without
    `json` in `body` the default is the name of the route."""
    parameters: BodyPlace = DEFAULT_SOURCES.parameters
    """The place of the action's parameters, a JSON object in the body. `null`: there are none, which is the
    default without `json` in `body`."""
    target_agents: Places = DEFAULT_SOURCES.target_agents
    """The place of the target agents, or a list of places. Those places that hold a value must agree. `[]`:
    none are read, which is the default without `json` in `body`."""
    cost: AnswerPlace = DEFAULT_SOURCES.cost
    """The place of the cost in US dollars in the backend's answer: a header or a JSON pointer into the
    body."""
    not_executed_on: Annotated[tuple[ErrorStatus, ...], LIST] = ()
    """The statuses, of 400 and above, with which this backend says that it executed nothing. The execution
    then ends `not_executed`, and the scope has its attempt and hold back. List only those by which the
    backend promises it."""
    completion: Literal["answer", "report"] = "answer"
    """`answer`: the answer ends the execution. `report`: after a 2xx answer the execution is `running` until
    its end is reported. See [Completion by report](#completion-by-report)."""
    completion_timeout_seconds: Lifetime = 3600
    """Seconds from the admission within which an execution must be reported. After that it is `unknown`, and
    no report is taken."""

    @cached_property
    def reads_status(self) -> bool:
        """Whether the status of an answer may end an execution otherwise than as `answered`."""
        return bool(self.not_executed_on) or self.completion == "report"

    @model_validator(mode="after")
    def _places_by_body(self) -> Route:
        """The defaults without a JSON body, and the keys that have no effect without one."""
        if "json" in self.body:
            return self
        message = "has no effect without json in body; add it there, or remove this key"
        named = "action" in self.model_fields_set or is_identifier(self.label)
        refuse(
            (self.content_types, ("content_types",), message),
            (not named, ("path",), "is too long for the name of an action; add a name, or the key action"),
        )
        defaults: dict[str, Source | tuple[Source, ...] | None] = {
            "scope_id": Source.parse("header:X-Recovery-Scope-Id"),
            "incident_id": Source.parse("header:X-Recovery-Incident-Id"),
            "action": Source("const", self.label),
            "parameters": None,
            "target_agents": (),
        }
        # The values become those in force. The section stays frozen for everyone else.
        self.__dict__.update(
            {name: value for name, value in defaults.items() if name not in self.model_fields_set}
        )
        return self

    @cached_property
    def bodies(self) -> Bodies:
        """Which bodies this route takes, and how they are told apart."""
        in_query = any(place.kind == "query" for place in self.sources.single)
        return Bodies(self.body, self.content_types, facts_in_query=in_query)

    @cached_property
    def calls(self) -> GatedCalls:
        """The calls that the route gates, as the core wants them."""
        return GatedCalls(self.path.patterns, frozenset(self.methods), self.other_methods == "pass")

    @cached_property
    def label(self) -> str:
        """The name under which records, answers and metrics show the route."""
        return self.name or self.path.text

    @cached_property
    def sources(self) -> FactSources:
        """Where this route's facts stand, as the core wants it."""
        return FactSources(
            scope_id=self.scope_id,
            incident_id=self.incident_id,
            action=self.action,
            parameters=self.parameters,
            target_agents=self.target_agents,
            cost=self.cost,
            lists=bool(self.content_types),
        )


class UnlistedSection(Section):
    """What becomes of a request whose path or method no route lists: `pass` lets it through unrecorded,
    `record` lets it through once a decision record is on disk, and `refuse` answers 403 `not_listed`. See
    [What no route lists](routes.md#what-no-route-lists)."""

    reads: Annotated[Treatment, LIVE] = "pass"
    """What becomes of GET, HEAD, OPTIONS and WebSockets: `pass`, `record` or `refuse`."""
    writes: Annotated[Treatment, LIVE] = "pass"
    """What becomes of all other methods: `pass`, `record` or `refuse`."""
    excepted: Annotated[tuple[Pattern, ...], LIST, LIVE] = Field((), alias="except")
    """Paths that pass in any case, unrecorded, such as `/healthz`; they are written like the path of a route.
    A path passes only if every reading of it is excepted. What a route lists stays gated."""

    @model_validator(mode="after")
    def _exceptions_that_can_hold(self) -> UnlistedSection:
        excepted = ExceptedPaths(self.excepted)
        refuse(
            *(
                (other, ("except", index), f"can also be read as {other}; add that path, too")
                for index, path in enumerate(self.excepted)
                for other in [excepted.lacks(path)]
            )
        )
        return self


def _some_route(value: object, info: ValidationInfo) -> object:
    """Refuse null, and the empty list unless presets add routes."""
    if value is None and info.data.get("presets"):
        raise ValueError("is empty; write [] if the presets are all, or add a route")
    if value is None or (value == [] and not info.data.get("presets", True)):
        raise ValueError("is empty; add a route here or a name to gate.presets, or remove the key")
    return value


def _with_presets(routes: tuple[Route, ...], info: ValidationInfo) -> tuple[Route, ...]:
    """The configured routes, then those of the presets whose names no configured route has."""
    taken = {route.name for route in routes}
    of_presets = (route for name in info.data.get("presets", ()) for route in routes_of_preset(name))
    return (*routes, *(route for route in of_presets if route.name not in taken))


@lru_cache
def routes_of_preset(name: str) -> tuple[Route, ...]:
    """The routes that a preset ships. The name is one of `presets.NAMES`."""
    return tuple(Route.model_validate(route) for route in presets.preset(name))


class GateSection(Section):
    """Which requests need a scope, and how they are read."""

    presets: Annotated[tuple[Preset, ...], LIST, LIVE] = ()
    """The interfaces whose routes ship with Scopegate, for example `[awx]`. They read the scope and the
    incident from the headers `X-Recovery-Scope-Id` and `X-Recovery-Incident-Id`. A route in `gate.routes`
    with the name of a preset's route replaces it. See [Presets](routes.md#presets)."""
    routes: Annotated[
        tuple[Route, ...], LIST, BeforeValidator(_some_route), AfterValidator(_with_presets), LIVE
    ] = Field([{"path": "**/recovery/execute"}], validate_default=True)
    """The gated paths, at least one unless there are presets. A request is gated if any reading of its path
    matches one of them. See [Routes](routes.md)."""
    unlisted: UnlistedSection
    max_body_bytes: Annotated[Bytes, LIVE] = 1_048_576
    """Bytes of a gated request body, which is held in memory. A longer body gets 413."""
    max_answer_bytes: Annotated[Bytes, LIVE] = 1_048_576
    """Bytes of a gated answer that are held back until the execution is settled. A longer answer is streamed,
    and its cost can only come from a header."""
    head_timeout_seconds: Seconds = 10.0
    """Seconds for a request head to arrive, on any path, after which the connection is closed. This bounds
    what slow or idle clients can hold open."""
    body_timeout_seconds: Annotated[Seconds, LIVE] = 10.0
    """Seconds for a gated body to arrive. A slower body gets 408."""
    max_in_flight: Annotated[Count, LIVE] = 1024
    """Gated requests at once, from the first byte of the body. One more gets 503 `overloaded`. Lower it to
    protect a small backend."""
    annotate_response: Annotated[bool, LIVE] = False
    """`true` adds scope_id, attempt_number, scope_status, attempts_remaining, cost_used_usd and executed_at
    to JSON answers that lack them, for clients that do not read the `Scopegate-` headers. `false` leaves the
    body unchanged."""
    tenant_header: Annotated[HeaderName, LIVE] = None
    """The header that names the tenant. Set it only if a proxy before the sidecar controls this header.
    `null`: every request belongs to the tenant `default`."""
    idempotency_ttl: Annotated[Lifetime, LIVE] = 86_400
    """Seconds for which an `Idempotency-Key` is kept after its execution ended. A repeat within this time
    gets the stored answer and executes nothing. The key of an unknown execution is kept until the execution
    is reconciled. See [Idempotency keys](wire.md#idempotency-keys)."""
    scope_required_from: Annotated[Risk, LIVE] = RiskClass.LOW
    """The lowest risk that needs a scope: `low` (every action), `medium`, `high` or `critical`. Actions of
    lower risk are executed without a scope and recorded, and each start logs a warning. See [Risk
    threshold](../../policies/README.md#risk-threshold)."""
    completion_base_url: Annotated[BaseUrl, LIVE] = None
    """The URL under which the backend reaches the data listener, to report the end of executions: `http` or
    `https`, a host, and a path if a proxy before the listener needs one. `null`: the address of
    `data.listen`. It is required for `completion: report` if `data.listen` is a Unix socket, every interface
    or port 0. See [Completion by report](routes.md#completion-by-report)."""

    def preset_of(self, route: Route) -> str | None:
        """The preset that a route came with, None for a configured one."""
        return next(
            (name for name in self.presets if any(route is each for each in routes_of_preset(name))), None
        )

    @model_validator(mode="after")
    def _each_preset_once(self) -> GateSection:
        message = "is listed twice; remove it here"
        refuse(
            *(
                (name in self.presets[:index], ("presets", index), message)
                for index, name in enumerate(self.presets)
            )
        )
        return self

    @model_validator(mode="after")
    def _each_call_has_one_route(self) -> GateSection:
        cases: list[tuple[object, KeyPath, str]] = []
        rivals = set()
        presets = set()
        for one, other, pattern, another in conflicts([route.calls for route in self.routes]):
            pair = self.preset_of(self.routes[one]), self.preset_of(self.routes[other])
            if all(pair):
                # There may be dozens, and nothing in the file tells them apart.
                message = f"gates {another.text}, which {pair[0]} gates, too; use one of the two"
                cases.append((pair not in presets, self._key(other, "path"), message))
                presets.add(pair)
                continue
            # A fault for each of the two names both lines.
            cases.append((True, self._key(one, "path"), self._same_calls(pattern, another, other)))
            cases.append((True, self._key(other, "path"), self._same_calls(another, pattern, one)))
            rivals.add((one, other))
        names: dict[str, int] = {}
        paths: dict[tuple[object, ...], int] = {}
        for index, route in enumerate(self.routes):
            first = index if route.name is None else names.setdefault(route.name, index)
            message = f"is the name of gate.routes[{first}], too; use another one"
            cases.append((first != index, ("routes", index, "name"), message))
            for pattern in route.path.patterns:
                first = paths.setdefault((pattern.anywhere, pattern.folded, pattern.rest), index)
                shared = first != index and (first, index) not in rivals
                for unnamed, other in ((first, index), (index, first)):
                    message = f"is a path of {self._shown(other)}, too; give each of the two a name"
                    cases.append(
                        (shared and self.routes[unnamed].name is None, self._key(unnamed, "path"), message)
                    )
        refuse(*cases)
        return self

    def _key(self, index: int, name: str) -> KeyPath:
        """Where a key of a route stands below this section: of a preset, where its name stands."""
        preset = self.preset_of(self.routes[index])
        return ("routes", index, name) if preset is None else ("presets", self.presets.index(preset))

    def _shown(self, index: int) -> str:
        """A route as messages name it."""
        preset = self.preset_of(self.routes[index])
        return f"gate.routes[{index}]" if preset is None else f"{self.routes[index].name} (preset {preset})"

    def _same_calls(self, own: RoutePattern, other: RoutePattern, index: int) -> str:
        """The fault at the route of `own`, about the route of `other` with this index."""
        shown = self._shown(index)
        is_preset = self.preset_of(self.routes[index]) is not None
        replace = f", or take its name, {self.routes[index].name}, to replace it" if is_preset else ""
        if (own.anywhere, own.folded, own.rest) == (other.anywhere, other.folded, other.rest):
            return f"is the path of {shown} for the same methods, too; keep one of them{replace}"
        return (
            f"matches requests that {other.text} of {shown} matches, too, with the same methods; "
            f"change one of them{replace or ', or join the two routes'}"
        )
