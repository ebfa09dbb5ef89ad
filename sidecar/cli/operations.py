"""The operations of a backend, read from its OpenAPI 3 document.

Only what a route needs is read: methods, paths, base paths, ids, the kinds of bodies and the statuses of
answers. Everything else may be wrong without being noticed. References are followed within the document.
"""

from __future__ import annotations

import posixpath
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from sidecar.core.bodies import FORM_TYPE, JSON_TYPE
from sidecar.core.lookalikes import spellings
from sidecar.core.target import LOOKING
from sidecar.files import foreign
from sidecar.files.faults import ConfigurationError, Fault, shown
from sidecar.files.yamlfile import Document, KeyPath, in_order

# The methods of an OpenAPI path item. QUERY came with OpenAPI 3.2.
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "QUERY")

# One operation under more base paths than this would give an unreadable route.
MAX_BASES = 16
# The most combinations of the values of server variables that are tried.
MAX_COMBINATIONS = 10_000
MAX_SCHEMA_DEPTH = 16

_VARIABLE = re.compile(r"\{([^{}]*)\}")
_ORIGIN = re.compile(r"(?:[A-Za-z][A-Za-z0-9+.-]*:)?//[^/?#]*")

# The facts that a route reads from a JSON body by default, and the type that each must have.
_JUDGED = {"parameters": "object", "target_agents": "array"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Body:
    """The bodies that an operation takes, in the words of a route.

    `kinds` and `content_types` are the keys `body` and `content_types` of the route. If `misread` is set, the
    default places of parameters and target agents would misread a body, and it says why; `parameters` is then
    the pointer to the parameters, None if there are none. `note` says why a JSON body is taken as `any`.
    """

    kinds: tuple[str, ...]
    content_types: tuple[str, ...] = ()
    parameters: str | None = None
    misread: str | None = None
    note: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One operation. `path` is the path as the document has it, and `bases` are the base paths before it,
    each without a slash at its end. `statuses` are those of its answers. `place` is `file:line:column`."""

    method: str
    path: str
    bases: tuple[str, ...]
    operation_id: str | None
    summary: str
    body: Body
    statuses: tuple[int, ...]
    place: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """What a document says about a backend. `servers` are the URLs as the document has them."""

    file: str
    title: str
    servers: tuple[str, ...]
    operations: tuple[Operation, ...]
    notes: tuple[str, ...]


def read(path: Path | None) -> Backend:
    """Read an OpenAPI 3 document from a file, or from standard input. Raises ConfigurationError with every
    fault that was found; each names file, line and column, and the member as a JSON pointer."""
    if path is None:
        document = foreign.parse(sys.stdin.buffer.read(foreign.MAX_BYTES + 1), "standard input")
    else:
        document = foreign.read(path)
    reading = _Reading(document)
    backend = reading.backend()
    if reading.faults:
        raise ConfigurationError(in_order(reading.faults))
    return backend


class _Wrong(Exception):
    """A member cannot be used; the fault is noted already."""


class _Reading:
    """One pass over a document. It notes faults and goes on with the next operation."""

    def __init__(self, document: Document) -> None:
        self._document = document
        self._notes: dict[str, None] = {}
        self.faults: list[Fault] = []

    def backend(self) -> Backend:
        whole = self._document.value
        servers: tuple[str, ...] = ()
        title = ""
        operations: list[Operation] = []
        try:
            whole = self._map(whole, ())
            self._check_version(whole)
            info = whole.get("info")
            title = self._words(info.get("title")) if isinstance(info, dict) else ""
            bases = self._bases(whole, ()) or ("",)
            servers = tuple(self._server_urls(whole))
            for path, item in self._map(whole.get("paths", {}), ("paths",)).items():
                if not path.startswith("x-"):
                    operations += self._of_path(path, item, bases)
        except _Wrong:
            pass
        return Backend(
            file=self._document.file,
            title=title,
            servers=servers,
            operations=tuple(operations),
            notes=tuple(self._notes),
        )

    def _check_version(self, whole: dict[str, Any]) -> None:
        if isinstance(whole.get("swagger"), str):
            message = (
                "is a version before OpenAPI 3; convert the document first, for example with swagger2openapi"
            )
            raise self._wrong(("swagger",), message)
        version = whole.get("openapi")
        if not isinstance(version, str) or not re.match(r"3(\.|$)", version):
            raise self._wrong(("openapi",), "is missing or not 3.x; name an OpenAPI 3 document")

    # Operations ----------------------------------------------------------------------------------

    def _of_path(self, path: str, item: Any, bases: tuple[str, ...]) -> Iterator[Operation]:
        at: KeyPath = ("paths", path)
        try:
            if not path.startswith("/"):
                raise self._wrong(at, "is no path; begin it with a slash")
            item, within = self._resolved(item, at)
            item = self._map(item, within)
            bases = self._bases(item, within) or bases
        except _Wrong:
            return
        for name, operation in item.items():
            if name.upper() in METHODS and name == name.lower():
                try:
                    yield self._operation(name.upper(), path, operation, (*within, name), bases)
                except _Wrong:
                    continue

    def _operation(
        self, method: str, path: str, found: Any, at: KeyPath, bases: tuple[str, ...]
    ) -> Operation:
        operation = self._map(found, at)
        name = operation.get("operationId")
        if name is not None and not isinstance(name, str):
            raise self._wrong((*at, "operationId"), "is not text; write a name")
        answers = operation.get("responses")
        return Operation(
            method=method,
            path=path,
            bases=self._bases(operation, at) or bases,
            operation_id=name,
            summary=self._words(operation.get("summary")),
            body=Body(kinds=("empty",)) if method in LOOKING else self._body(operation, at),
            statuses=tuple(
                sorted(int(code) for code in answers if re.fullmatch("[1-5][0-9]{2}", code))
                if isinstance(answers, dict)
                else ()
            ),
            place=self._document.place(at),
        )

    # Bodies --------------------------------------------------------------------------------------

    def _body(self, operation: dict[str, Any], at: KeyPath) -> Body:
        if "requestBody" not in operation:
            return Body(kinds=("empty",))
        body, within = self._resolved(operation["requestBody"], (*at, "requestBody"))
        body = self._map(body, within)
        content = self._map(body.get("content", {}), (*within, "content"))
        readable: dict[str, None] = {}
        opaque = [] if content else ["*/*"]
        types: list[str] = []
        note: str | None = None
        shape = _Shape(self._document.value)
        for written, described in content.items():
            media_type = written.partition(";")[0].strip().lower()
            schema = described.get("schema") if isinstance(described, dict) else None
            if media_type == JSON_TYPE or media_type.endswith("+json"):
                shape.look(schema)
                if media_type == JSON_TYPE and shape.other_type is not None:
                    opaque.append(media_type)
                    note = f"the body may be of type {shape.other_type}, and only an object is read as json"
                    continue
                readable["json"] = None
                types += [] if media_type == JSON_TYPE else [media_type]
            elif media_type == FORM_TYPE:
                readable["form"] = None
            else:
                opaque.append(media_type)
        # Beside a kind that is read, a body of a type that resembles this kind is not taken as any.
        if any(kind in media_type for kind in readable for media_type in opaque):
            readable, types = {}, []
        kinds = [*readable, *(["any"] if opaque else [])]
        if body.get("required") is not True and not opaque:
            kinds.append("empty")
        misread = shape.misread if "json" in readable else None
        return Body(
            kinds=tuple(kind for kind in ("json", "form", "empty", "any") if kind in kinds),
            content_types=tuple(dict.fromkeys(types)),
            parameters=shape.parameters if misread else None,
            misread=misread,
            note=note,
        )

    # Servers -------------------------------------------------------------------------------------

    def _server_urls(self, holder: dict[str, Any]) -> Iterator[str]:
        servers = holder.get("servers")
        for server in servers if isinstance(servers, list) else []:
            if isinstance(server, dict) and isinstance(server.get("url"), str):
                url = self._words(server["url"])
                if not url.startswith((".", "/")):  # a relative URL names no address
                    yield url

    def _bases(self, holder: dict[str, Any], at: KeyPath) -> tuple[str, ...]:
        """The base paths of the servers of a document, path or operation; none if it names no server."""
        servers = holder.get("servers")
        if servers is None:
            return ()
        if not isinstance(servers, list):
            raise self._wrong((*at, "servers"), "is not a list; write one")
        found: dict[str, None] = {}
        for index, server in enumerate(servers):
            within = (*at, "servers", index)
            server = self._map(server, within)
            url = server.get("url", "/")
            if not isinstance(url, str):
                raise self._wrong((*within, "url"), "is not text; write a URL")
            found |= dict.fromkeys(self._bases_of(url, server, within))
        if len(found) > MAX_BASES:
            message = (
                f"gives {len(found)} base paths; leave those that this backend serves, {MAX_BASES} at most"
            )
            raise self._wrong((*at, "servers"), message)
        return tuple(found)

    def _bases_of(self, url: str, server: dict[str, Any], at: KeyPath) -> Iterator[str]:
        """The base paths that a URL gives with each combination of the values of its variables.

        A variable without an entry stays a variable of the path.
        """
        variables = server.get("variables")
        variables = {} if variables is None else self._map(variables, (*at, "variables"))
        choices: list[list[tuple[str, str]]] = []
        for name in dict.fromkeys(_VARIABLE.findall(url)):
            if name not in variables:
                continue
            within = (*at, "variables", name)
            variable = self._map(variables[name], within)
            default, listed = variable.get("default"), variable.get("enum")
            if not isinstance(default, str):
                raise self._wrong(within, "has no text as its default; write one")
            values = [value for value in listed if isinstance(value, str)] if isinstance(listed, list) else []
            if not values and "\0" in _base_of(url, {name: "\0", **_defaults(variables, name)}):
                self._notes[f"the server variable {{{name}}} is taken as its default, {default!r}"] = None
            choices.append([(name, value) for value in dict.fromkeys([default, *values])])
        combinations = list(islice(product(*choices), MAX_COMBINATIONS + 1))
        if len(combinations) > MAX_COMBINATIONS:
            message = (
                f"has over {MAX_COMBINATIONS} combinations of values; leave those that this backend serves"
            )
            raise self._wrong((*at, "variables"), message)
        yield from dict.fromkeys(_base_of(url, dict(values)) for values in combinations)

    # Members -------------------------------------------------------------------------------------

    def _map(self, value: Any, at: KeyPath) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self._wrong(at, "is not a map; write one")
        return value

    def _resolved(self, value: Any, at: KeyPath) -> tuple[Any, KeyPath]:
        """A value behind its references, and its place."""
        seen: set[KeyPath] = set()
        while isinstance(value, dict) and isinstance(value.get("$ref"), str):
            reference = (*at, "$ref")
            text = shown(value["$ref"])
            if at in seen:
                raise self._wrong(reference, "leads back to itself; correct it")
            seen.add(at)
            if not value["$ref"].startswith("#/"):
                message = f"refers to another document ({text}); put everything into one document first"
                raise self._wrong(reference, message)
            found = _follow(self._document.value, value["$ref"])
            if found is None:
                raise self._wrong(reference, f"refers to {text}, which does not exist; correct it")
            value, at = found
        return value, at

    def _wrong(self, at: KeyPath, message: str) -> _Wrong:
        fault = Fault(self._document.place(at), _pointer(at), message)
        if fault not in self.faults:  # several operations may refer to the same part
            self.faults.append(fault)
        return _Wrong()

    @staticmethod
    def _words(value: Any) -> str:
        """Text of the document on one line, for a comment."""
        return shown(" ".join(value.split()), 100) if isinstance(value, str) else ""


def _pointer(at: KeyPath) -> str:
    """A path as a JSON pointer (RFC 6901) in a URL fragment, as OpenAPI documents write references."""
    return "#" + "".join("/" + shown(str(step).replace("~", "~0").replace("/", "~1"), 200) for step in at)


def _follow(value: Any, reference: str) -> tuple[Any, KeyPath] | None:
    """The value that `#/a/b` refers to, and its path; None if it does not exist."""
    at: KeyPath = ()
    for raw in reference[2:].split("/"):
        step: str | int = unquote(raw).replace("~1", "/").replace("~0", "~")
        if isinstance(value, list) and str(step).isdecimal() and int(step) < len(value):
            step = int(step)
        elif not isinstance(value, dict) or step not in value:
            return None
        value, at = value[step], (*at, step)
    return value, at


def _defaults(variables: dict[str, Any], without: str) -> dict[str, str]:
    return {
        name: variable["default"]
        for name, variable in variables.items()
        if name != without and isinstance(variable, dict) and isinstance(variable.get("default"), str)
    }


def _base_of(url: str, values: dict[str, str]) -> str:
    """The path of a server's URL, without dot segments and without a slash at its end.

    A relative URL counts from the root, because the place of the document is unknown.
    """
    filled = _VARIABLE.sub(lambda found: values.get(found[1], found[0]), url)
    path = re.split(r"[?#]", _ORIGIN.sub("", filled, count=1) if _ORIGIN.match(filled) else filled)[0]
    return posixpath.normpath("/" + path).replace("//", "/", 1).rstrip("/")


# Schemas ------------------------------------------------------------------------------------------------


class _Shape:
    """What the schema of a JSON body says about its outermost value."""

    def __init__(self, document: Any) -> None:
        self._document = document
        self._types: set[str] = set()
        self._members: dict[str, set[str]] = {}
        self._seen: set[int] = set()

    def look(self, schema: Any, depth: int = 0) -> None:
        """Note the types and members that a schema and its parts name. What cannot be read is left out."""
        for _ in range(MAX_SCHEMA_DEPTH):
            reference = schema.get("$ref") if isinstance(schema, dict) else None
            if not isinstance(reference, str):
                break
            found = _follow(self._document, reference) if reference.startswith("#/") else None
            schema = None if found is None else found[0]
        if not isinstance(schema, dict) or id(schema) in self._seen or depth > MAX_SCHEMA_DEPTH:
            return
        self._seen.add(id(schema))
        self._types |= _types_of(schema)
        members = schema.get("properties")
        for name, described in members.items() if isinstance(members, dict) else ():
            self._members.setdefault(name, set()).update(self._types_behind(described))
        for word in ("allOf", "anyOf", "oneOf"):
            parts = schema.get(word)
            for part in parts if isinstance(parts, list) else ():
                self.look(part, depth + 1)

    def _types_behind(self, schema: Any) -> set[str]:
        shape = _Shape(self._document)
        shape._seen = set(self._seen)
        shape.look(schema, MAX_SCHEMA_DEPTH - 1)
        return shape._types

    @property
    def other_type(self) -> str | None:
        """A type other than object that the value may have."""
        return next(iter(sorted(self._types - {"object", "null"})), None)

    @property
    def misread(self) -> str | None:
        """Why the default places would misread a member of the value, or None if they would not."""
        for name, wanted in _JUDGED.items():
            for member in self._alike(name):
                if member != name or self._members[member] - {wanted, "null"}:
                    return f"the member {shown(member)} of the body would be taken for {name}"
        return None

    @property
    def parameters(self) -> str | None:
        """The pointer to the object that is spelled like `parameters`, if there is exactly one."""
        alike = self._alike("parameters")
        if len(alike) != 1 or self._members[alike[0]] - {"object", "null"}:
            return None
        return "/" + alike[0].replace("~", "~0").replace("/", "~1")

    def _alike(self, name: str) -> Sequence[str]:
        forms = set(spellings(name))
        return [member for member in self._members if forms & set(spellings(member))]


def _types_of(schema: dict[str, Any]) -> set[str]:
    """The types that a schema names itself: one as in OpenAPI 3.0, or a list as in 3.1."""
    named = schema.get("type")
    return set(filter(lambda one: isinstance(one, str), named if isinstance(named, list) else [named]))
