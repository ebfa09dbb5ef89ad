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
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from sidecar.cli.operations import READS, Backend, Operation
from sidecar.core.target import RoutePattern
from sidecar.files.faults import shown
from sidecar.files.yamlfile import plain
from sidecar.settings import presets

WRITES = ("POST", "PUT", "PATCH", "DELETE")
MAX_NAME_CHARS = 64

_HEAD = (
    "# `scopegate check` accepts this file as it is. A line with DECIDE names what only a person can know.",
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

    def overlaps(self, method: str, patterns: Iterable[RoutePattern]) -> bool:
        """Whether some request could take both this route and one with that method and those paths."""
        return self.method == method and any(
            _overlap(one, other) for one in self.patterns for other in patterns
        )

    def take_over(self, other: SuggestedRoute) -> None:
        """Take the operations of another route, too."""
        known = {pattern.folded for pattern in self.patterns}
        self.patterns += [pattern for pattern in other.patterns if pattern.folded not in known]
        self.operations += other.operations


def _overlap(one: RoutePattern, other: RoutePattern) -> bool:
    """Whether a path can match both patterns. An exact path goes before one with variables."""
    if one.folded == other.folded:
        return True
    if bool(one.names) != bool(other.names) or len(one.folded) != len(other.folded):
        return False
    return all(a == b or "{" in a or "{" in b for a, b in zip(one.folded, other.folded, strict=True))


@dataclass(slots=True, kw_only=True)
class Suggestion:
    """The suggested routes, and the reason for each operation that has none, by its index."""

    backend: Backend
    routes: list[SuggestedRoute] = field(default_factory=list)
    without: dict[int, str] = field(default_factory=dict)

    def rows(self) -> list[dict[str, str]]:
        """The table of operations and what becomes of each."""
        return [self._row(index, one) for index, one in enumerate(self.backend.operations)]

    def _row(self, index: int, operation: Operation) -> dict[str, str]:
        route = self._route_of(operation)
        row = {"method": operation.method, "path": operation.path, "action": "", "risk": ""}
        if operation.method in READS:
            return {**row, "becomes": "passes, as gate.unlisted.reads says"}
        if route is None:
            reason = self.without[index]
            return {**row, "becomes": f"no route: {reason}; it passes, as gate.unlisted.writes says"}
        first = route.operations[0]
        shared = "" if operation is first else f", shared with {first.path}: a request could mean either"
        return {**row, "action": route.name, "risk": route.risk, "becomes": f"route {route.name}{shared}"}

    def _route_of(self, operation: Operation) -> SuggestedRoute | None:
        return next(
            (route for route in self.routes if any(one is operation for one in route.operations)), None
        )

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
            operation = self.backend.operations[index]
            yield f"    # NOT GATED: {_title(operation)}"
            yield f"    #   {reason}."

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
            yield "      target_agents: []"
        yield from self._open_questions(route)

    @staticmethod
    def _open_questions(route: SuggestedRoute) -> Iterator[str]:
        names = [name for name in route.patterns[0].names if all(name in one.names for one in route.patterns)]
        if names:
            place = "/".join(f"path:{name}" for name in names)
            yield f'      # DECIDE: target_agents: ["{place}"]'
        else:
            yield "      # DECIDE: target_agents, where the request names what it acts on"
        statuses = sorted({status for one in route.operations for status in one.statuses})
        refusals = [str(status) for status in statuses if 400 <= status < 500]
        if refusals:
            listed = ", ".join(refusals)
            yield f"      # DECIDE: not_executed_on: [{listed}], those by which nothing was executed"
        if 202 in statuses:
            yield "      # DECIDE: completion: report, because 202 may come before the work is done"

    def catalogue(self) -> str:
        """The text of `policies/actions.yaml`."""
        lines = [*_CATALOGUE_HEAD, "", "actions:"]
        for route in self.routes:
            lines += [f"  # {_title(operation)}" for operation in route.operations]
            lines.append(f"  {_scalar(route.name)}: {{risk: {route.risk}}}")
        return "\n".join([*lines, ""])


def suggested(backend: Backend) -> Suggestion:
    """Routes for every operation that writes, in the order of the document."""
    found = Suggestion(backend=backend)
    names: set[str] = set()
    for index, operation in enumerate(backend.operations):
        if operation.method in READS:
            continue
        if operation.method not in WRITES:
            found.without[index] = f"a route cannot list the method {operation.method}"
            continue
        try:
            patterns = _patterns(operation)
        except ValueError as exc:
            found.without[index] = str(exc)
            continue
        route = SuggestedRoute(name=_name_of(operation, names), patterns=patterns, operations=[operation])
        sharing = [one for one in found.routes if one.overlaps(route.method, patterns)]
        if not sharing:
            names.add(route.name)
            found.routes.append(route)
            continue
        for other in (*sharing[1:], route):
            sharing[0].take_over(other)
        found.routes = [one for one in found.routes if one not in sharing[1:]]
    return found


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
    found: dict[tuple[str, ...], RoutePattern] = {}
    for base in operation.bases:
        pattern = RoutePattern.parse(_renamed(base + path))
        found.setdefault(pattern.folded, pattern)
    return list(found.values())


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
