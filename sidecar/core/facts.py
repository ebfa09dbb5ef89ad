"""The claims of a request, read from the judged bytes. Types are exact, and unclear claims are refused.

The default places are `/scope_id`, `/incident_id`, `/action`, `/parameters` and, for the target agents,
`/target_agents` or `/parameters/target_agents`. A route may configure other places.

A place is a JSON pointer (RFC 6901), the value of a `{name}` in the path, a name in the query or in a form, a
header, or a constant. A joined place keeps the text between its parts: `path:namespace/path:pod` reads
`shop/cart-0`. Two requests never give a joined place the same value from different parts, because a part that
contains the text between the parts is refused.

Objects, queries and forms that hold facts are checked for lookalikes (`lookalikes`): a name that a lenient
backend reads as a fact's name, but that is not identical to it, is refused. The key `__proto__` is refused
there, too. When JavaScript copies an object with this key, it reads the members of the key's value as members
of the object. Frameworks also read the names of queries, forms and JSON bodies together, so a fact that is
read from one of them is refused where another one has its name as well.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeGuard
from urllib.parse import unquote_to_bytes

from sidecar.core import pointer
from sidecar.core._readings import ESCAPE
from sidecar.core.cache import Cache
from sidecar.core.lookalikes import lookalike, pattern_of, spellings
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


Named = Literal["path", "query", "header", "form"]
NAMED: tuple[Named, ...] = ("path", "query", "header", "form")
WHOLE_PATH = "*"
_PART = re.compile(r"(path|query|header|form):([A-Za-z0-9_.-]+)")
_BEGINS_A_PLACE = re.compile(r"(?:path|query|header|form|const):")


@dataclass(frozen=True, slots=True)
class Source:
    """The place of one fact, made by `parse`.

    `name` is the JSON pointer, the name after the colon, or the text of a constant or a joined place. A
    joined place has `parts`, and the texts between them in `literals`.
    """

    kind: Literal["pointer", "path", "query", "header", "form", "const", "joined"]
    name: str
    tokens: tuple[str, ...] = ()
    parts: tuple[Source, ...] = ()
    literals: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Source:
        """Parse a place as a configuration writes it. Raises ValueError with one sentence."""
        if text.startswith("/") and len(text) > 1:
            tokens = pointer.parse(text)
            if "" in tokens:
                raise ValueError("a JSON pointer to a fact has no empty step: write /member or /list/0")
            return cls("pointer", text, tokens)
        kind, colon, name = text.partition(":")
        if kind == "const" and colon:
            if not is_identifier(name):
                raise ValueError(f"const: takes {IDENTIFIER_RULE}")
            return cls("const", name)
        for each in NAMED:
            if kind == each and name:
                if len(_BEGINS_A_PLACE.findall(text)) > 1:
                    return cls._joined(text)
                if name.isprintable() and " " not in name:
                    return _named(each, name)
        raise ValueError(
            "write a JSON pointer (/member), path:name, query:name, header:Name, form:name or const:text"
        )

    @classmethod
    def _joined(cls, text: str) -> Source:
        before, *pieces = _PART.split(text)
        parts = tuple(
            _named(kind, name)
            for found, name in zip(pieces[::3], pieces[1::3], strict=True)
            for kind in NAMED
            if kind == found
        )
        *literals, after = pieces[2::3] or [""]
        if before or after or len(parts) < 2 or not all(literals):
            raise ValueError(
                "a joined place begins and ends with a part, path:name, query:name, header:Name or form:name "
                "with a name of A-Z a-z 0-9 _ . -, and has text between its parts"
            )
        if any(_BEGINS_A_PLACE.search(literal) or not literal.isprintable() for literal in literals):
            raise ValueError("joins path:, query:, header: and form: with names of A-Z a-z 0-9 _ . - only")
        shown = "".join(f"{part}{literal}" for part, literal in zip(parts, (*literals, ""), strict=True))
        return cls("joined", shown, parts=parts, literals=tuple(literals))

    @property
    def single(self) -> tuple[Source, ...]:
        """The places from which the value comes: the parts of a joined place, else the place itself."""
        return self.parts or (self,)

    def __str__(self) -> str:
        return self.name if self.kind in ("pointer", "joined") else f"{self.kind}:{self.name}"


def _named(kind: Named, name: str) -> Source:
    return Source(kind, name.lower() if kind == "header" else name)


def _pointer(text: str) -> Source:
    return Source.parse(text)


@valueclass
class Request:
    """The parts of one gated request that may hold facts. Header names are in lower case.

    `document` is the JSON document, which may be a list where `FactSources.lists` says so; a body without
    one has an empty object. `form` holds the fields of a form, None for any other body. `opaque` says that
    the body has no parameters that could be read. `path` is the path of the target, as it was sent.
    """

    document: Any
    body_bytes: int = 0
    opaque: bool = False
    form: Sequence[tuple[str, str]] | None = None
    path: str = ""
    path_params: Mapping[str, str] = field(default_factory=dict)
    query: Sequence[tuple[str, str]] = ()
    headers: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class FactSources:
    """The places of a route's facts.

    If several of the `target_agents` places hold a value, the values must be equal. `cost` is read from the
    upstream's answer, not from the request. Without a place for `parameters` there are none. With `lists`,
    the document of a body may be a list.
    """

    scope_id: Source = field(default_factory=lambda: _pointer("/scope_id"))
    incident_id: Source = field(default_factory=lambda: _pointer("/incident_id"))
    action: Source = field(default_factory=lambda: _pointer("/action"))
    parameters: Source | None = field(default_factory=lambda: _pointer("/parameters"))
    target_agents: tuple[Source, ...] = field(
        default_factory=lambda: (_pointer("/target_agents"), _pointer("/parameters/target_agents"))
    )
    cost: Source = field(default_factory=lambda: Source.parse("header:X-Recovery-Cost-USD"))
    lists: bool = False
    # The names of the headers that hold facts of a request, in lower case.
    header_names: frozenset[str] = field(init=False)
    # The function that finds each fact of a request, in the order of `single`.
    finders: tuple[Callable[[Request], Any], ...] = field(init=False, compare=False, repr=False)
    # For each object on the path to a fact: its pointer steps, and the judgement of its keys.
    watched: tuple[tuple[tuple[str, ...], Cache[tuple[str, ...], Refusal | None]], ...] = field(
        init=False, compare=False, repr=False
    )

    @property
    def single(self) -> tuple[Source, ...]:
        """Every place in a request from which a fact, or a part of one, is read."""
        sources = (self.scope_id, self.incident_id, self.action, self.parameters, *self.target_agents)
        return tuple(each for source in sources if source for each in source.single)

    def __post_init__(self) -> None:
        names = frozenset(source.name for source in self.single if source.kind == "header")
        keys: dict[tuple[str, ...], set[str]] = {}
        for source in self.single:
            for depth, token in enumerate(source.tokens):
                keys.setdefault(source.tokens[:depth], set()).add(token)
        # Names that a framework reads from the members of a document as well.
        elsewhere = [source.name for source in self.single if source.kind in ("query", "form")]
        if elsewhere:
            keys.setdefault((), set())
        watched = tuple(
            (prefix, _keys_judged(prefix, judged, () if prefix else elsewhere))
            for prefix, judged in keys.items()
        )
        object.__setattr__(self, "header_names", names)
        singular = (self.scope_id, self.incident_id, self.action, self.parameters)
        finders = [_finder(source, self.lists) for source in singular]
        finders += [_finder(source, self.lists, self.target_agents) for source in self.target_agents]
        object.__setattr__(self, "finders", tuple(finders))
        object.__setattr__(self, "watched", watched)


def _keys_judged(
    prefix: tuple[str, ...], judged: Collection[str], elsewhere: Collection[str]
) -> Cache[tuple[str, ...], Refusal | None]:
    """For the keys of an object that holds the judged ones: the refusal of the first bad key, or None.

    A key that is not judged must not be readable as a name that is read from elsewhere.
    """
    forms = frozenset(form for name in judged for form in spellings(name))
    others = frozenset(form for name in elsewhere for form in spellings(name))

    def refusal(keys: tuple[str, ...]) -> Refusal | None:
        for key in keys:
            if key == "__proto__":
                return _refusal("/" + "/".join((*prefix, key)), "gives an object members that it has not")
            if key not in judged and not forms.isdisjoint(spellings(key)):
                return _refusal(
                    "/" + "/".join((*prefix, key)),
                    "is spelled like a member that is judged, but not the same",
                )
            if others and key not in judged and not others.isdisjoint(spellings(key)):
                return _refusal(f"/{key}", "could be read in place of a fact of the query or of a form")
        return None

    # Programs send the same keys again and again.
    return Cache(refusal, max_entries=MAX_KEY_LISTS, max_size=MAX_KEY_LIST_CHARS, size=_chars_of)


def _chars_of(keys: tuple[str, ...]) -> int:
    return sum(map(len, keys)) + len(keys)


@valueclass
class Claims:
    """The claims of a request. A missing claim is None, and the bounds decide which claims may be missing.

    `body_bytes` is the size of the request body, because records hold the parameters of small bodies only.
    From an `opaque` body no parameters can be read, and the record holds its size.
    """

    scope_id: str | None = None
    incident_id: str | None = None
    action: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    target_agents: tuple[str, ...] = ()
    body_bytes: int = 0
    opaque: bool = False


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
            opaque=request.opaque,
        )
    except _Unreadable as exc:
        return exc.refusal


def _identifier(value: Any, source: Source) -> str | None:
    if is_identifier(value):
        return value
    if value is ABSENT or value is None or value == "":
        return None
    raise _Unreadable(_refusal(str(source), f"must be a string of {IDENTIFIER_RULE}"))


def _parameters(value: Any, source: Source | None) -> Mapping[str, Any]:
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


def _finder(source: Source | None, lists: bool, alike: Collection[Source] = ()) -> Callable[[Request], Any]:
    """The function that finds a fact. It returns its value or `ABSENT`, or raises _Unreadable.

    `alike` are the places that must hold the same value. A name may stand in both the query and a form if
    both are such places.
    """
    if source is None:
        return lambda request: ABSENT
    name, tokens = source.name, source.tokens
    if source.kind == "const":
        return lambda request: name
    if source.kind == "joined":
        finders = tuple(_finder(part, lists) for part in source.parts)
        return lambda request: _joined(request, source, finders)
    if source.kind == "path":
        if name == WHOLE_PATH:
            return lambda request: _whole_path(request.path, source)
        return lambda request: request.path_params.get(name, ABSENT)
    if source.kind == "header":
        return lambda request: _only_one(request.headers, source)
    if source.kind in ("query", "form"):
        return _in_query_or_form(source, alike)
    if len(tokens) == 1 and not lists:
        return lambda request: request.document.get(tokens[0], ABSENT)
    return lambda request: pointer.follow(request.document, tokens)


def _joined(request: Request, source: Source, finders: Sequence[Callable[[Request], Any]]) -> Any:
    """The parts of a joined place with the literals between them, `ABSENT` if a part is absent or empty."""
    values = [find(request) for find in finders]
    if any(value is ABSENT or value == "" for value in values):
        return ABSENT
    for value, part in zip(values, source.parts, strict=True):
        if any(literal in value for literal in source.literals):
            problem = f"contains text that stands between the parts of {source}"
            raise _Unreadable(_refusal(str(part), problem))
    whole: str = values[0]
    for literal, value in zip(source.literals, values[1:], strict=True):
        whole += literal + value
    # With `--` between them, `x-` and `y` join to the text that `x` and `-y` join to.
    rest = whole
    for literal, value in zip(source.literals, values, strict=False):
        found, _, rest = rest.partition(literal)
        if found != value:
            problem = "can be divided into its parts in more than one way"
            raise _Unreadable(_refusal(str(source), problem))
    return whole


def _whole_path(path: str, source: Source) -> str:
    """The path, decoded once as the values of path parameters are."""
    if ";" in path:
        raise _Unreadable(_refusal(str(source), "has a ; that may cut off or change a segment"))
    try:
        value = unquote_to_bytes(path).decode()
    except UnicodeError:
        raise _Unreadable(_refusal(str(source), "is not UTF-8")) from None
    if ESCAPE.search(value):
        raise _Unreadable(_refusal(str(source), "is escaped twice"))
    return value


def _in_query_or_form(source: Source, alike: Collection[Source]) -> Callable[[Request], Any]:
    """The finder of a name in the query or in a form, which must not be readable from the other one."""
    pattern = pattern_of(source.name)
    here, there = ("query", "form") if source.kind == "query" else ("form", "query")
    in_both = any(place.kind == there and place.name == source.name for place in alike)

    def find(request: Request) -> Any:
        pairs, others = request.query, request.form or ()
        if here == "form":
            pairs, others = others, pairs
        if lookalike(pairs, source.name, pattern) is not None:
            problem = f"could be read from another place in the {here} as well"
            raise _Unreadable(_refusal(str(source), problem))
        if not in_both and others and lookalike(others, "", pattern) is not None:
            raise _Unreadable(_refusal(str(source), f"could be read from the {there} as well"))
        return _only_one(pairs, source)

    return find


def _only_one(pairs: Sequence[tuple[str, str]], source: Source) -> Any:
    values = [value for name, value in pairs if name == source.name]
    if len(values) > 1:
        raise _Unreadable(_refusal(str(source), "is given more than once"))
    return values[0] if values else ABSENT


def _refusal(member: str, problem: str) -> Refusal:
    return Refusal("invalid_request", f"{member} {problem}.", {"member": member})


DEFAULT_SOURCES = FactSources()
