"""What careless backends read in a form and in a query. Independent of the gate's own code.

A model of the most careless backend, and parsers of real frameworks beside it. The model splits at `&`, or at
`;` as well, cleans every name in every way that tests/lenient.py knows for keys, reads `a[b]` and `a.b` as
`a`, writes names as PHP does, and reads form and query together. A fact that has two values in these readings
is a way around the gate.

Nothing here may import sidecar: a hole that two models share is found by neither.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from urllib.parse import parse_qsl, unquote_to_bytes

import bottle
from django.conf import settings as django_settings
from django.http import QueryDict
from yarl import URL

from tests.lenient import CLEANINGS

Pairs = list[tuple[str, str]]

if not django_settings.configured:
    django_settings.configure()


def _split(text: bytes, separators: bytes) -> Iterator[tuple[str, str]]:
    for field in re.split(b"[" + separators + b"]", text):
        name, _, value = field.partition(b"=")
        yield _decoded(name), _decoded(value)


def _decoded(text: bytes) -> str:
    return unquote_to_bytes(text.replace(b"+", b" ")).decode("utf-8", "replace")


def _as_php(name: str) -> str:
    name = name.lstrip(" ").partition("\0")[0]
    before, bracket, _ = name.partition("[")
    return re.sub(r"[ .]", "_", before + ("" if bracket and "]" in name else bracket.replace("[", "_")))


NAMINGS: tuple[Callable[[str], str], ...] = (
    *CLEANINGS,
    lambda name: name.partition("[")[0],
    lambda name: name.partition(".")[0],
    lambda name: name.lstrip(" \t"),
    _as_php,
    lambda name: re.sub(r"[ .\[]", "_", name),
    lambda name: name.replace("[", ".").replace("]", ""),
)


@lru_cache(maxsize=4096)
def _readings(name: str) -> frozenset[str]:
    seen, waiting = {name}, [name]
    for reading in waiting:
        for change in NAMINGS:
            made = change(reading)
            if made not in seen and len(seen) < 500:
                seen.add(made)
                waiting.append(made)
    return frozenset(seen)


def facts(form: bytes, query: bytes, names: Iterable[str]) -> dict[str, set[str]]:
    """Each fact's different values that are not empty, over all readings of a form and a query."""
    wanted = {spelling: name for name in names for spelling in (name, name.upper())}
    values: dict[str, set[str]] = {name: set() for name in names}
    for text in (form, query):
        for separators in (b"&", b"&;"):
            for name, value in _split(text, separators):
                for reading in _readings(name) & wanted.keys():
                    values[wanted[reading]].add(value)
    return {name: found - {""} for name, found in values.items()}


def _of_servlets(form: bytes, query: bytes) -> Mapping[str, str]:
    """getParameter: the first value, of the query before those of the form."""
    return dict(reversed([*_split(query, b"&"), *_split(form, b"&")]))


def _of_rails(form: bytes, query: bytes) -> Mapping[str, str]:
    """params: the last value, of the form before those of the query; `&` and, before Rack 3, `;` separate."""
    return dict([*_split(query, b"&;"), *_split(form, b"&;")])


def _of_php(form: bytes, query: bytes) -> Mapping[str, str]:
    """$_REQUEST: the last value, of the form before those of the query, of the first 1,000 fields."""
    pairs = [*list(_split(query, b"&"))[:1000], *list(_split(form, b"&"))[:1000]]
    return {_as_php(name): value for name, value in pairs}


def _of_node(form: bytes, query: bytes) -> Mapping[str, str]:
    """Express with `qs`: the first 1,000 fields; the body is asked before the query."""
    pairs = [*list(_split(query, b"&"))[:1000], *list(_split(form, b"&"))[:1000]]
    return {name.replace("[]", ""): value for name, value in pairs}


def _of_aspnet(form: bytes, query: bytes) -> Mapping[str, str]:
    """Request[name]: names in any case, all values of the query joined before those of the form."""
    found: dict[str, str] = {}
    for name, value in _split(query, b"&"):
        found[name.lower()] = f"{found[name.lower()]},{value}" if name.lower() in found else value
    for name, value in _split(form, b"&"):
        found.setdefault(name.lower(), value)
    return found


def _of_urllib(form: bytes, query: bytes) -> Mapping[str, str]:
    """Python before 3.10, where both separators are read."""
    text = (query + b"&" + form).replace(b";", b"&").decode("utf-8", "replace")
    return dict(parse_qsl(text, keep_blank_values=True))


def _of_django(form: bytes, query: bytes) -> Mapping[str, str]:
    return {**QueryDict(query.decode("latin-1")).dict(), **QueryDict(form).dict()}


def _of_bottle(form: bytes, query: bytes) -> Mapping[str, str]:
    pairs = [*bottle._parse_qsl(query.decode("latin-1")), *bottle._parse_qsl(form.decode("latin-1"))]
    return {name.encode("latin-1").decode(): value.encode("latin-1").decode() for name, value in pairs}


def _of_yarl(form: bytes, query: bytes) -> Mapping[str, str]:
    both = "&".join(text.decode("utf-8", "replace") for text in (form, query))
    return dict(URL(f"http://h/?{both}", encoded=True).query)


BACKENDS: Mapping[str, Callable[[bytes, bytes], Mapping[str, str]]] = {
    "a servlet": _of_servlets,
    "Rails": _of_rails,
    "PHP": _of_php,
    "Express": _of_node,
    "ASP.NET": _of_aspnet,
    "urllib": _of_urllib,
    "Django": _of_django,
    "Bottle": _of_bottle,
    "yarl": _of_yarl,
}
