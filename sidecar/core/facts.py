"""The claims of a request, read from the judged bytes. Types are exact, and unclear claims are refused.

The default places are `/scope_id`, `/incident_id`, `/action`, `/parameters` and, for the target agents,
`/target_agents` or `/parameters/target_agents`. A route may configure other places.

A backend may read another member than the judged one, because it compares names less strictly. Real programs
apply these rules to keys:

1. They fold case and Unicode compatibility forms (Go's encoding/json, ASP.NET, Jackson if configured so).
2. They end a name at NUL, because the name passes through C.
3. They drop control and format characters, because they clean their input.
4. They trim blanks at both ends.

Objects that hold facts are therefore checked for lookalikes: a key that equals a fact's key under any
combination of these rules, but is not identical to it, is refused. The key `__proto__` is refused there, too.
When JavaScript copies an object with this key, it reads the members of the key's value as members of the
object.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeGuard

from sidecar.core import pointer
from sidecar.core._readings import folded, is_format
from sidecar.core.cache import Cache
from sidecar.core.pointer import ABSENT, OBJECT
from sidecar.core.valueclass import valueclass
from sidecar.errors import Refusal

MAX_ID_CHARS = 256
MAX_TARGET_AGENTS = 256
# The lists of keys whose judgement is cached: the most of them, and the most characters of one.
MAX_KEY_LISTS = 256
MAX_KEY_LIST_CHARS = 1024
IDENTIFIER_RULE = f"1 to {MAX_ID_CHARS} printable characters"


def is_identifier(value: object) -> TypeGuard[str]:
    """Whether a value obeys IDENTIFIER_RULE, as every id, action and agent name does."""
    return isinstance(value, str) and 0 < len(value) <= MAX_ID_CHARS and value.isprintable()


def spellings(key: str) -> tuple[str, ...]:
    """The forms in which a lenient parser compares a key: whole, and cut at NUL."""
    if key.isascii() and key.isprintable():
        return (key.strip().lower(),)
    # A parser may trim leading NULs before it cuts at a later NUL.
    cut = next(filter(None, map(_cleaned, key.split("\0"))), "")
    return (_cleaned(key), cut) if "\0" in key else (cut,)


def _cleaned(key: str) -> str:
    dropped = {ord(each): None for each in set(key) if unicodedata.category(each) == "Cc" or is_format(each)}
    kept = key.translate(dropped) if dropped else key
    return folded(kept).strip()


@dataclass(frozen=True, slots=True)
class Source:
    """The place of one fact: a JSON pointer (RFC 6901), a path parameter, a query or header name."""

    kind: Literal["pointer", "path", "query", "header"]
    name: str
    tokens: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Source:
        """Parse `/json/pointer`, `path:name`, `query:name` or `header:Name`. Raises ValueError."""
        if text.startswith("/") and len(text) > 1:
            tokens = pointer.parse(text)
            if "" in tokens:
                raise ValueError("a JSON pointer to a fact has no empty step: write /member or /list/0")
            return cls("pointer", text, tokens)
        kind, colon, name = text.partition(":")
        if colon and name and name.isprintable() and " " not in name:
            if kind == "path":
                return cls("path", name)
            if kind == "query":
                return cls("query", name)
            if kind == "header":
                return cls("header", name.lower())
        raise ValueError("write a JSON pointer (/member), path:name, query:name or header:Name")

    def __str__(self) -> str:
        return self.name if self.kind == "pointer" else f"{self.kind}:{self.name}"


def _pointer(text: str) -> Source:
    return Source.parse(text)


@valueclass
class Request:
    """The parts of one gated request that may hold facts. Header names are in lower case."""

    document: Mapping[str, Any]
    body_bytes: int = 0
    path_params: Mapping[str, str] = field(default_factory=dict)
    query: Sequence[tuple[str, str]] = ()
    headers: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class FactSources:
    """The places of a route's facts.

    If several of the `target_agents` places hold a value, the values must be equal. `cost` is read from the
    upstream's answer, not from the request.
    """

    scope_id: Source = field(default_factory=lambda: _pointer("/scope_id"))
    incident_id: Source = field(default_factory=lambda: _pointer("/incident_id"))
    action: Source = field(default_factory=lambda: _pointer("/action"))
    parameters: Source = field(default_factory=lambda: _pointer("/parameters"))
    target_agents: tuple[Source, ...] = field(
        default_factory=lambda: (_pointer("/target_agents"), _pointer("/parameters/target_agents"))
    )
    cost: Source = field(default_factory=lambda: Source.parse("header:X-Recovery-Cost-USD"))
    # The names of the headers that hold facts of a request, in lower case.
    header_names: frozenset[str] = field(init=False)
    # The function that finds each fact of a request, in the order of `of_the_request`.
    finders: tuple[Callable[[Request], Any], ...] = field(init=False, compare=False, repr=False)
    # For each object on the path to a fact: its pointer steps, and the judgement of its keys.
    watched: tuple[tuple[tuple[str, ...], Cache[tuple[str, ...], Refusal | None]], ...] = field(
        init=False, compare=False, repr=False
    )

    @property
    def of_the_request(self) -> tuple[Source, ...]:
        return (self.scope_id, self.incident_id, self.action, self.parameters, *self.target_agents)

    def __post_init__(self) -> None:
        sources = self.of_the_request
        names = frozenset(source.name for source in sources if source.kind == "header")
        keys: dict[tuple[str, ...], set[str]] = {}
        for source in sources:
            for depth, token in enumerate(source.tokens):
                keys.setdefault(source.tokens[:depth], set()).add(token)
        watched = tuple((prefix, _keys_judged(prefix, judged)) for prefix, judged in keys.items())
        object.__setattr__(self, "header_names", names)
        object.__setattr__(self, "finders", tuple(map(_finder, sources)))
        object.__setattr__(self, "watched", watched)


def _keys_judged(prefix: tuple[str, ...], judged: Collection[str]) -> Cache[tuple[str, ...], Refusal | None]:
    """For the keys of an object that holds the judged ones: the refusal of the first bad key, or None."""
    forms = frozenset(form for name in judged for form in spellings(name))

    def refusal(keys: tuple[str, ...]) -> Refusal | None:
        for key in keys:
            if key == "__proto__":
                return _refusal("/" + "/".join((*prefix, key)), "gives an object members that it has not")
            if key not in judged and not forms.isdisjoint(spellings(key)):
                return _refusal(
                    "/" + "/".join((*prefix, key)),
                    "is spelled like a member that is judged, but not the same",
                )
        return None

    # Programs send the same keys again and again.
    return Cache(refusal, max_entries=MAX_KEY_LISTS, max_size=MAX_KEY_LIST_CHARS, size=_chars_of)


def _chars_of(keys: tuple[str, ...]) -> int:
    return sum(map(len, keys)) + len(keys)


@valueclass
class Claims:
    """The claims of a request. A missing claim is None, and the bounds decide which claims may be missing.

    `body_bytes` is the size of the request body, because records hold the parameters of small bodies only.
    """

    scope_id: str | None = None
    incident_id: str | None = None
    action: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    target_agents: tuple[str, ...] = ()
    body_bytes: int = 0


class _Unreadable(Exception):
    """A claim is not clear."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


def read(request: Request, sources: FactSources) -> Claims | Refusal:
    """The claims of a request, or a refusal `invalid_request` that names the unreadable member."""
    document = request.document
    for prefix, refusal_of in sources.watched:
        holder = pointer.follow(document, prefix) if prefix else document
        if isinstance(holder, OBJECT):
            refusal = refusal_of[tuple(holder)]
            if refusal is not None:
                return refusal
    find_scope_id, find_incident_id, find_action, find_parameters, *find_agents = sources.finders
    try:
        return Claims(
            scope_id=_identifier(find_scope_id(request), sources.scope_id),
            incident_id=_identifier(find_incident_id(request), sources.incident_id),
            action=_identifier(find_action(request), sources.action),
            parameters=_parameters(find_parameters(request), sources.parameters),
            target_agents=_target_agents(request, find_agents, sources.target_agents),
            body_bytes=request.body_bytes,
        )
    except _Unreadable as exc:
        return exc.refusal


def _identifier(value: Any, source: Source) -> str | None:
    if is_identifier(value):
        return value
    if value is ABSENT or value is None or value == "":
        return None
    raise _Unreadable(_refusal(str(source), f"must be a string of {IDENTIFIER_RULE}"))


def _parameters(value: Any, source: Source) -> Mapping[str, Any]:
    if isinstance(value, OBJECT):
        return value
    if value is ABSENT or value is None or value == "":
        return {}
    raise _Unreadable(_refusal(str(source), "must be a JSON object"))


def _target_agents(
    request: Request, finders: Iterable[Callable[[Request], Any]], sources: Iterable[Source]
) -> tuple[str, ...]:
    agents: tuple[str, ...] | None = None
    for find, source in zip(finders, sources, strict=True):
        value = find(request)
        if value is ABSENT or value is None or value == "":
            continue
        if source.kind != "pointer":
            value = [value]
        if not isinstance(value, list) or not all(is_identifier(agent) for agent in value):
            problem = f"must be a list of strings of {IDENTIFIER_RULE}"
        elif len(value) > MAX_TARGET_AGENTS:
            problem = f"must name at most {MAX_TARGET_AGENTS} agents"
        elif agents is not None and agents != tuple(value):
            problem = "names other target agents than another place in the same request"
        else:
            agents = tuple(value)
            continue
        raise _Unreadable(_refusal(str(source), problem))
    return agents or ()


def _finder(source: Source) -> Callable[[Request], Any]:
    """The function that finds a fact. It returns its value or `ABSENT`, or raises _Unreadable."""
    name, tokens = source.name, source.tokens
    if source.kind == "path":
        return lambda request: request.path_params.get(name, ABSENT)
    if source.kind == "query":
        return lambda request: _in_query(request.query, source)
    if source.kind == "header":
        return lambda request: _only_one(request.headers, source)
    if len(tokens) == 1:
        return lambda request: request.document.get(tokens[0], ABSENT)
    return lambda request: pointer.follow(request.document, tokens)


def _in_query(query: Sequence[tuple[str, str]], source: Source) -> Any:
    for name, value in query:
        others = [] if name == source.name else [name]
        others += [part.partition("=")[0] for part in value.split(";")[1:]]  # as older servers split
        if any(_may_be_read_as(other, source.name) for other in others):
            problem = "could be read from another place in the query as well"
            raise _Unreadable(_refusal(str(source), problem))
    return _only_one(query, source)


def _only_one(pairs: Sequence[tuple[str, str]], source: Source) -> Any:
    values = [value for name, value in pairs if name == source.name]
    if len(values) > 1:
        raise _Unreadable(_refusal(str(source), "is given more than once"))
    return values[0] if values else ABSENT


def _may_be_read_as(name: str, judged: str) -> bool:
    """Whether some server may read one query name as another.

    ASP.NET ignores case. Some servers read a[b] and a.b as parts of a. PHP drops leading blanks, and replaces
    blank, dot and [ by `_`.
    """
    return any(
        form in (found, re.split(r"[\[.\s;]", found)[0], re.sub(r"[ .\[]", "_", found))
        for found in spellings(name)
        for form in spellings(judged)
    )


def _refusal(member: str, problem: str) -> Refusal:
    return Refusal("invalid_request", f"{member} {problem}.", {"member": member})


DEFAULT_SOURCES = FactSources()
