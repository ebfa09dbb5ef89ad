"""Whether the gate and careless parsers see different things in one target, or in one body."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any
from urllib.parse import parse_qsl

import orjson
import rapidjson
import ujson

from sidecar.core import form
from sidecar.core.facts import DEFAULT_SOURCES, FactSources, Request, Source, read
from sidecar.core.pattern import RoutePattern
from sidecar.core.target import Gated, GatedPaths, PassThrough, classify
from sidecar.errors import Refusal
from sidecar.files.strictjson import NotJson, parse
from sidecar.web.wire.headers import HeaderFields
from tests import deforming, lenient, lenientforms
from tests.lenient import ROUTES, HeaderBytes, Route


@dataclass(frozen=True)
class Case:
    """Routes as the gate has them, as a careless backend has them, and paths that spell them."""

    gated: GatedPaths
    routes: tuple[Route, ...]
    spelled: tuple[bytes, ...]


def case(*spelled: tuple[str, str]) -> Case:
    """The case of some patterns, each with a path that spells it out."""
    patterns = [RoutePattern.parse(pattern) for pattern, _ in spelled]
    routes = tuple(
        Route(re.sub(r"\{[^{}]*\}", "*", text.replace("...}", "}*")).encode(), anywhere=pattern.anywhere)
        for pattern in patterns
        for text in [pattern.text.removeprefix("**")]
    )
    return Case(GatedPaths(patterns), routes, tuple(path.encode() for _, path in spelled))


ORIGINAL = Case(
    GatedPaths(map(RoutePattern.parse, ("**/recovery/execute", "/v1/heal", "/v1/tasks/{task}/kick-it"))),
    ROUTES,
    deforming.PATHS,
)
# Patterns that end with a variable or a slash, that have parts of segments, and that have no word.
FURTHER = (
    case(
        ("/v2/heal/", "/v2/heal/"),
        ("/v2/tasks/{task}", "/v2/tasks/t7"),
        ("/v2/acts/{act}:kick-it", "/v2/acts/t7:kick-it"),
        ("/v2/{kind}s/restart", "/v2/tasks/restart"),
        ("/v2/files/{rest...}", "/v2/files/a/b7"),
        ("**/purge/{agent}/", "/api/purge/a7/"),
        ("/v2/{team}:{agent}/kick", "/v2/red:a7/kick"),
    ),
    case(("/", "/")),
    case(("/{task}", "/t7")),
    case(("/x{task}k/", "/xt7k/")),
    case(("/{kind}/{task}/", "/tasks/t7/"), ("/", "/")),
    case(("/api/{rest...}", "/api/t7")),
)
PARSERS: Mapping[str, Callable[[str], Any]] = {
    "json": json.loads,
    "orjson": orjson.loads,
    "ujson": ujson.loads,
    "rapidjson": lambda text: rapidjson.loads(
        text, parse_mode=rapidjson.PM_COMMENTS | rapidjson.PM_TRAILING_COMMAS, allow_nan=True
    ),
}
EXACT_INTEGERS = 2**53


def of_request(target: bytes, headers: HeaderBytes = (), case: Case = ORIGINAL) -> tuple[str, str | None]:
    """The verdict on a target and headers that are sent with POST, and the differential, if there is one."""
    verdict = classify("POST", _text(target), HeaderFields(headers).deciding(), True, case.gated)
    shown = f"{target!r} {list(headers) or ''}".rstrip()
    if isinstance(verdict, Gated):
        path = target.partition(b"?")[0]
        plain = case.routes[verdict.index].matches(path) and b"//" not in path and b"\\" not in path
        return "judged", None if plain else f"{shown} is judged and does not spell the route"
    if isinstance(verdict, PassThrough):
        executes = lenient.executes(b"POST", target, headers, case.routes)
        return "passes", f"{shown} passes and executes {executes.path!r}" if executes else None
    return verdict.refusal.code, None


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


def of_body(body: bytes) -> tuple[str, list[str]]:
    """The verdict on a body, and what each parser reads in it that was not judged."""
    try:
        document = parse(body)
    except NotJson:
        return "no strict JSON", []
    claims = read(Request(document=document, body_bytes=len(body)), DEFAULT_SOURCES)
    if isinstance(claims, Refusal):
        return claims.code, []
    judged: dict[str, Any] = {
        "scope_id": claims.scope_id,
        "incident_id": claims.incident_id,
        "action": claims.action,
        "target_agents": list(claims.target_agents) or None,
    }
    found = []
    for name, loads in PARSERS.items():
        try:
            other = loads(body.decode())
        except (ValueError, RecursionError):
            continue  # what cannot be read is not executed
        members = {key: other.get(key) for key in judged}
        nested = other.get("parameters") or {}
        members["target_agents"] = members["target_agents"] or nested.get("target_agents")
        read_here = {key: value or None for key, value in members.items()}
        if read_here != judged:
            found.append(f"{name} reads {read_here}, and {judged} is judged: {body!r}")
        elif _numbers(nested) != _numbers(claims.parameters):
            found.append(f"{name} reads the parameters {nested}: {body!r}")
    for path, values in lenient.facts(body).items():
        wanted = judged["target_agents" if path[-1] == "target_agents" else path[0]]
        if any((value or None) != wanted for value in values if value or path[-1] != "target_agents"):
            found.append(f"a careless backend reads {path} as {values}, and {wanted} is judged: {body!r}")
    return "judged", found


FORM_FACTS = ("scope_id", "incident_id", "action", "target")
_IN_A_FORM = FactSources(
    scope_id=Source.parse("form:scope_id"),
    incident_id=Source.parse("form:incident_id"),
    action=Source.parse("form:action"),
    parameters=None,
    target_agents=(Source.parse("form:target"),),
)


def of_form(body: bytes, query: bytes) -> tuple[str, list[str]]:
    """The verdict on a form and its request's query, and what each backend reads that was not judged."""
    try:
        pairs = form.parse(body)
        asked = parse_qsl(query.decode("utf-8", "surrogateescape"), keep_blank_values=True, errors="strict")
    except form.NotForm:
        return "no strict form", []
    except UnicodeDecodeError:
        return "no UTF-8 query", []
    claims = read(Request(document={}, opaque=True, form=pairs, query=asked), _IN_A_FORM)
    if isinstance(claims, Refusal):
        return claims.code, []
    agent = claims.target_agents[0] if claims.target_agents else None
    judged = dict(zip(FORM_FACTS, (claims.scope_id, claims.incident_id, claims.action, agent), strict=True))
    found = []
    for name, parse_as in lenientforms.BACKENDS.items():
        try:
            members = parse_as(body, query)
        except (ValueError, UnicodeError):
            continue  # what cannot be read is not executed
        other = {fact: members.get(fact) or None for fact in FORM_FACTS}
        if other != judged:
            found.append(f"{name} reads {other}, and {judged} is judged: {body!r} {query!r}")
    for fact, values in lenientforms.facts(body, query, FORM_FACTS).items():
        if values - {judged[fact]}:
            found.append(
                f"a careless backend reads {fact} as {values}, and {judged} is judged: {body!r} {query!r}"
            )
    return "judged", found


def _numbers(value: Any) -> Any:
    """The same, with each number as a double where that is what most parsers make of it."""
    if isinstance(value, Mapping):
        return {name: _numbers(member) for name, member in value.items()}
    if isinstance(value, list):
        return [_numbers(member) for member in value]
    if isinstance(value, Decimal) or (isinstance(value, int) and abs(value) > EXACT_INTEGERS):
        return float(value)
    return value
