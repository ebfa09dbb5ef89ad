"""Suggests routes and a catalogue of actions for the operations of a backend.

1. Every operation that writes (POST, PUT, PATCH, DELETE) gets a route, and an action of the same name. The
   risk of DELETE is `high`, and that of the rest `medium`.
2. Scope and incident come from headers, because the bodies belong to the backend.
3. Operations whose paths could be the same one for a request share a route, so that the request is gated in
   any case. The first operation of the document names it.
4. An operation whose path no route can express gets a comment with the reason, and stays ungated.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from sidecar.cli.operations import Backend, Operation
from sidecar.core.pattern import RoutePattern
from sidecar.core.target import LOOKING, GatedCalls, GatedPaths, Rejected, classify, conflicts
from sidecar.files.faults import shown
from sidecar.files.yamlfile import plain
from sidecar.settings import presets

WRITES = ("POST", "PUT", "PATCH", "DELETE")
MAX_NAME_CHARS = 64

# The value of every variable in the requests by which the table is made.
_EXAMPLE = "example"

_HEAD = (
    "# `scopegate check` accepts this file as it is. A line with DECIDE names what only a person can know;",
    "# delete the mark before a key to set it.",
    "#",
    "# DECIDE for each route: does the operation change anything for which a recovery must account? If not,",
    "# for example because a POST only searches, remove the route and its action.",
    "# DECIDE whether a preset describes this backend already (gate.presets):",
    *textwrap.wrap(", ".join(presets.NAMES), 100, initial_indent="#   ", subsequent_indent="#   "),
    "# DECIDE whether to begin with `mode: shadow` in each route, which records refusals and enforces none.",
)
_CATALOGUE_HEAD = (
    "# The actions of the routes in scopegate.yaml. An action that is not listed is refused.",
    "#",
    "# DECIDE for each: risk (low, medium, high or critical); max_cost_usd, the most that it can cost, if it",
    "# costs anything; timeout_seconds, if it is slow; targets_required, if it must name its target agents.",
)

_KINDS = ("json", "form", "empty", "any")
_BRACED = re.compile(r"\{([^{}]*)\}")
# The last variable of a path, if it takes several segments: {proxy+}, {path*}, {path:path}, {path=**}.
_REST = re.compile(r"\{([^{}]*?)(?:\+|\*|\.\.\.|:path|:\.[*+]|=\*\*)\}$")
_PLAIN_PATH = re.compile(r"/[A-Za-z0-9._~/{}-]*")
_PLAIN_WORD = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")


@dataclass(slots=True, kw_only=True)
class SuggestedRoute:
    """A route for one operation, or for several that share paths. `operations` holds these."""

    name: str
    patterns: list[RoutePattern]
    operations: list[Operation]

    @property
    def method(self) -> str:
        return self.operations[0].method

    @property
    def risk(self) -> str:
        return "high" if self.method == "DELETE" else "medium"

    @property
    def kinds(self) -> list[str]:
        """The kinds of bodies that any of the operations takes."""
        return [kind for kind in _KINDS if any(kind in one.body.kinds for one in self.operations)]

    @property
    def content_types(self) -> list[str]:
        return list(dict.fromkeys(each for one in self.operations for each in one.body.content_types))

    @property
    def misread(self) -> str | None:
        """Why the default places would misread a body of one of the operations."""
        return next((one.body.misread for one in self.operations if one.body.misread), None)

    @property
    def parameters(self) -> str | None:
        """The pointer to the parameters, if the default places would misread a body."""
        found = {one.body.parameters for one in self.operations if "json" in one.body.kinds}
        return found.pop() if len(found) == 1 else None

    @property
    def calls(self) -> GatedCalls:
        return GatedCalls(tuple(self.patterns), frozenset({self.method}))

    def take_over(self, other: SuggestedRoute) -> None:
        """Take the operations of another route, too."""
        self.patterns = _distinct([*self.patterns, *other.patterns])
        self.operations += other.operations


def _shape(pattern: RoutePattern) -> tuple[object, ...]:
    """What two patterns have in common that differ only in case and in the names of their variables."""
    return (*(segment.texts for segment in pattern.folded), pattern.rest is None)


def _distinct(patterns: Iterable[RoutePattern]) -> list[RoutePattern]:
    """The first of each patterns that have the same shape, because a route lists no path twice."""
    found: dict[object, RoutePattern] = {}
    for pattern in patterns:
        found.setdefault(_shape(pattern), pattern)
    return list(found.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Suggestion:
    """The suggested routes.

    By the index of an operation, `without` has the reason why a writing one has no route, and `refusals` the
    refusal that every one of its requests would get.
    """

    backend: Backend
    routes: tuple[SuggestedRoute, ...]
    without: Mapping[int, str]
    refusals: Mapping[int, str]

    def rows(self) -> list[dict[str, str]]:
        """The table of operations and what becomes of each."""
        route_of = {id(one): route for route in self.routes for one in route.operations}
        found = []
        for index, operation in enumerate(self.backend.operations):
            route, refusal = route_of.get(id(operation)), self.refusals.get(index)
            if route is not None:
                first = route.operations[0]
                shared = "" if operation is first else f", shared with {first.path}"
                becomes = f"route {route.name}{shared}"
                becomes += f", which refuses every request: {refusal}" if refusal else ""
            elif refusal is not None:
                becomes = f"refused: {refusal}"
            elif index in self.without:
                becomes = f"no route: {self.without[index]}; it passes, as gate.unlisted.writes says"
            else:
                becomes = "passes, as gate.unlisted.reads says"
            found.append(
                {
                    "method": operation.method,
                    "path": operation.path,
                    "action": "" if route is None else route.name,
                    "risk": "" if route is None else route.risk,
                    "becomes": becomes,
                }
            )
        return found

    # The files ------------------------------------------------------------------------------------------

    def configuration(self) -> str:
        """The text of `scopegate.yaml`."""
        return "\n".join([*self._head(), *self._gate(), "", "policies: policies/", ""])

    def _head(self) -> Iterator[str]:
        backend = self.backend
        yield f"# Routes for {backend.title or 'a backend'}, suggested from {shown(backend.file, 200)}."
        yield from _HEAD
        for note in backend.notes:
            yield f"# DECIDE: {note}; add the other values to the paths, if there are any."
        yield ""
        yield "upstream:"
        named = f" The document names {', '.join(backend.servers)}." if backend.servers else ""
        yield f"  # DECIDE: the address of the backend.{named}"
        yield "  url: http://127.0.0.1:9000"
        yield ""

    def _gate(self) -> Iterator[str]:
        yield "gate:"
        yield "  # DECIDE what becomes of requests that no route lists: pass, record or refuse."
        yield "  unlisted: {reads: pass, writes: pass}"
        yield "  routes:"
        for route in self.routes:
            yield from self._lines(route)
        for index, reason in self.without.items():
            if index not in self.refusals:
                yield f"    # NOT GATED: {_title(self.backend.operations[index])}"
                yield f"    #   {reason}."
        for index, refusal in self.refusals.items():
            yield f"    # REFUSED with these routes: {_title(self.backend.operations[index])}"
            yield f"    #   {refusal}"

    def _lines(self, route: SuggestedRoute) -> Iterator[str]:
        for operation in route.operations:
            yield f"    # {_title(operation)}"
        if len(route.operations) > 1:
            yield "    # These operations share a route, because a request could mean either of them."
        for note in dict.fromkeys(one.body.note for one in route.operations if one.body.note):
            yield f"    # The body is taken as any, unread: {note}."
        if route.misread is not None:
            yield f"    # Places of its own, because {route.misread}."
        yield f"    - name: {_scalar(route.name)}"
        if len(route.patterns) == 1:
            yield f"      path: {_path(route.patterns[0])}"
        else:
            yield "      path:"
            yield from (f"        - {_path(pattern)}" for pattern in route.patterns)
        yield f"      methods: [{route.method}]"
        yield f"      body: {_words(route.kinds)}"
        if route.content_types:
            yield f"      content_types: {_words(route.content_types)}"
        yield f"      action: {_scalar('const:' + route.name)}"
        yield "      scope_id: header:X-Recovery-Scope-Id"
        yield "      incident_id: header:X-Recovery-Incident-Id"
        if route.misread is not None:
            yield f"      parameters: {'null' if route.parameters is None else _scalar(route.parameters)}"
        yield from self._open_questions(route)

    @staticmethod
    def _open_questions(route: SuggestedRoute) -> Iterator[str]:
        """Lines that become keys of the route if `# DECIDE: ` is deleted."""
        names = [name for name in route.patterns[0].names if all(name in one.names for one in route.patterns)]
        place = "/".join(f"path:{name}" for name in names)
        if route.misread is not None:
            yield f"      target_agents: []  # DECIDE{f': {place}' if place else ''}"
        elif names:
            yield f'      # DECIDE: target_agents: ["{place}"]'
        else:
            yield "      # DECIDE: target_agents, where the request names what it acts on"
        statuses = sorted({status for one in route.operations for status in one.statuses})
        refusals = [str(status) for status in statuses if 400 <= status < 500]
        if refusals:
            listed = ", ".join(refusals)
            yield f"      # DECIDE: not_executed_on: [{listed}]  # those by which nothing was executed"
        if 202 in statuses:
            yield "      # DECIDE: completion: report  # if 202 comes before the work is done"

    def catalogue(self) -> str:
        """The text of `policies/actions.yaml`."""
        lines = [*_CATALOGUE_HEAD, "", "actions:"]
        for route in self.routes:
            lines += [f"  # {_title(operation)}" for operation in route.operations]
            lines.append(f"  {_scalar(route.name)}: {{risk: {route.risk}}}")
        return "\n".join([*lines, ""])


def suggested(backend: Backend) -> Suggestion:
    """Routes for every operation that writes, in the order of the document."""
    routes: list[SuggestedRoute] = []
    without: dict[int, str] = {}
    names: set[str] = set()
    for index, operation in enumerate(backend.operations):
        if operation.method in LOOKING:
            continue
        if operation.method not in WRITES:
            without[index] = f"a route cannot list the method {operation.method}"
            continue
        try:
            patterns = _patterns(operation)
        except ValueError as exc:
            without[index] = str(exc)
            continue
        name = _name_of(operation, names)
        names.add(name)
        routes.append(SuggestedRoute(name=name, patterns=_distinct(patterns), operations=[operation]))
    routes = _without_conflicts(routes)
    gated = GatedPaths(route.calls for route in routes)
    judged = {index: _refusal_of(operation, gated) for index, operation in enumerate(backend.operations)}
    return Suggestion(
        backend=backend,
        routes=tuple(routes),
        without=without,
        refusals={index: refusal for index, refusal in judged.items() if refusal is not None},
    )


def _without_conflicts(routes: list[SuggestedRoute]) -> list[SuggestedRoute]:
    """The routes, of which those that conflict have become one, in the place of the first."""
    while pairs := [(one, other) for one, other, _, _ in conflicts([route.calls for route in routes])]:
        first = list(range(len(routes)))  # for each route, the one that takes its operations over
        for one, other in pairs:
            low, high = sorted((first[one], first[other]))
            first = [low if index == high else index for index in first]
        for index, route in enumerate(routes):
            if first[index] != index:
                routes[first[index]].take_over(route)
        routes = [route for index, route in enumerate(routes) if first[index] == index]
    return routes


def _refusal_of(operation: Operation, gated: GatedPaths) -> str | None:
    """The refusal of every request for an operation, by the code that judges requests, or None."""
    with suppress(ValueError):
        for pattern in _patterns(operation):
            target, has_body = pattern.filled(_EXAMPLE), operation.method not in LOOKING
            verdict = classify(operation.method, target, (), has_body, gated)
            if isinstance(verdict, Rejected):
                return f"{verdict.refusal.code}: {verdict.refusal.message}"
    return None


# Names and paths ----------------------------------------------------------------------------------------


def _name_of(operation: Operation, taken: Collection[str]) -> str:
    """A name that routes and actions accept: the operationId, else method and path."""
    given = operation.operation_id or ""
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", given).strip("._-")
    if not name:
        words = re.findall(r"[A-Za-z0-9]+", operation.path)
        name = "_".join([operation.method.lower(), *words])
    if not name[0].isalpha():
        name = f"{operation.method.lower()}_{name}"
    name = name[:MAX_NAME_CHARS]
    number, unique = 2, name
    while unique in taken:
        tail = f"_{number}"
        number, unique = number + 1, name[: MAX_NAME_CHARS - len(tail)] + tail
    return unique


def _patterns(operation: Operation) -> list[RoutePattern]:
    """The paths of a route. Raises ValueError with one sentence if no route can express the path."""
    # Some documents tell operations of one path apart by a query or a fragment. A path has neither.
    path = re.split(r"[?#]", operation.path)[0]
    return [RoutePattern.parse(_renamed(base + path)) for base in operation.bases]


def _renamed(path: str) -> str:
    """A path whose variables have names that a route accepts."""
    names: set[str] = set()
    rest = _REST.search(path)
    if rest is not None:
        path = path[: rest.start()] + "{" + rest[1] + "}"

    def rename(found: re.Match[str]) -> str:
        name = re.sub(r"[^A-Za-z0-9_]", "_", found[1])
        name = name if name.isidentifier() else f"part_{name}"
        number, unique = 2, name
        while unique in names:
            number, unique = number + 1, f"{name}_{number}"
        names.add(unique)
        return "{" + unique + ("...}" if rest is not None and found.end() == len(path) else "}")

    return _BRACED.sub(rename, path)


# YAML ---------------------------------------------------------------------------------------------------


def _title(operation: Operation) -> str:
    """The operation in a comment, with its line in the document."""
    line = operation.place.rsplit(":", 2)[-2]
    summary = f": {operation.summary}" if operation.summary else ""
    return f"{operation.method} {shown(operation.path, 200)} (line {line}){summary}"


def _scalar(text: str) -> str:
    """A text as YAML, in quotes unless every reader takes it for this text."""
    if _PLAIN_WORD.fullmatch(text) or (text.startswith("const:") and _PLAIN_WORD.fullmatch(text[6:])):
        try:
            if plain(text) == text:
                return text
        except ValueError:
            pass
    return _quoted(text)


def _path(pattern: RoutePattern) -> str:
    return pattern.text if _PLAIN_PATH.fullmatch(pattern.text) else _quoted(pattern.text)


def _quoted(text: str) -> str:
    return json.dumps(text.replace("${", "$${"))


def _words(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"[{', '.join(words)}]"
