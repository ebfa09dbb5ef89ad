"""Renders the OpenAPI document as one HTML page, which needs neither scripts nor other hosts.

The page shows what stands in the document and knows no call by name. A schema keyword that has no words here
is shown as JSON, so that the page leaves nothing out.
"""

from __future__ import annotations

import html
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import orjson

Node = Mapping[str, Any]

_METHODS = ("get", "head", "options", "post", "put", "delete")
_PROBLEM = "application/problem+json"
# The smallest and the largest value of a limit, and its unit.
_LIMITS = (
    ("minimum", "maximum", ""),
    ("minLength", "maxLength", " characters"),
    ("minItems", "maxItems", " items"),
)
# Keywords that are shown in words or as a table.
_WORDED = {"$ref", "additionalProperties", "anyOf", "const", "default", "description", "enum", "format"}
_WORDED |= {"items", "multipleOf", "pattern", "properties", "required", "title", "type"}
_WORDED |= {keyword for least, most, _ in _LIMITS for keyword in (least, most)}


class _Html(str):
    """Text that is HTML. Any other text is escaped."""

    __slots__ = ()


def page(document: Node, origin: str) -> bytes:
    """The page of a document. `origin` is the scheme and authority under which the caller reaches it."""
    return _Page(document, origin).render().encode()


class _Page:
    def __init__(self, document: Node, origin: str) -> None:
        self._document, self._origin = document, origin
        self._errors: dict[str, Node] = {}  # an example of each error that a call names, by its code

    def render(self) -> str:
        info, tags = self._document["info"], self._document["tags"]
        calls: dict[str, list[tuple[str, str, Node, Node]]] = {tag["name"]: [] for tag in tags}
        for path, item in self._document["paths"].items():
            for method in _METHODS:
                if method in item:
                    calls[item[method]["tags"][0]].append((method, path, item[method], item["servers"][0]))
        sections = [
            _tag(
                "section",
                _tag("h2", tag["name"], id=f"tag-{tag['name']}"),
                _prose(tag["description"]),
                *(self._call(*call) for call in calls[tag["name"]]),
            )
            for tag in tags
        ]
        contents: list[_Html] = []
        for name, listed in calls.items():
            contents.append(_tag("h2", _link(f"tag-{name}", name)))
            contents.append(
                _tag(
                    "ul",
                    *(
                        _tag("li", _link(call["operationId"], _method(m), path))
                        for m, path, call, _ in listed
                    ),
                )
            )
        contents += [_tag("h2", _link(name.lower(), name)) for name in ("Errors", "Schemas")]
        body = _tag(
            "body",
            _tag("nav", *contents, aria_label="Contents"),
            _tag("main", self._top(info), *sections, self._all_errors(), self._all_schemas(), id="top"),
        )
        head = _tag(
            "head",
            _Html('<meta charset="utf-8">'),
            _Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
            _tag("title", f"{info['title']} {info['version']}: the API"),
            _Html('<link rel="icon" href="data:,"><link rel="stylesheet" href="/docs/page.css">'),
        )
        return f"<!DOCTYPE html>\n{_tag('html', head, body, lang='en')}\n"

    def _top(self, info: Node) -> _Html:
        servers = [
            (server["description"], _tag("code", self._url(server))) for server in self._document["servers"]
        ]
        return _tag(
            "header",
            _tag("h1", info["title"], " ", _tag("small", info["version"])),
            _tag("p", info["summary"], class_="lead"),
            _prose(info["description"]),
            _tag(
                "p",
                "In the curl lines, replace what stands in CAPITALS. The document itself is ",
                _tag("a", "/openapi.json", href="/openapi.json"),
                ".",
            ),
            _table(("listener", "address"), servers),
        )

    def _url(self, server: Node) -> str:
        return self._origin if server["url"] == "/" else str(server["url"])

    # One call ----------------------------------------------------------------------------------

    def _call(self, method: str, path: str, call: Node, server: Node) -> _Html:
        parts: list[str] = [
            _tag("h3", _link(call["operationId"], call["summary"])),
            _tag("p", _method(method), " ", _tag("code", path), " ", _tag("small", server["description"])),
            _prose(call["description"]),
        ]
        if "parameters" in call:
            parameters = [
                (_tag("code", one["name"]), one["in"], self._described(one["schema"], one))
                for one in call["parameters"]
            ]
            parts += [_tag("h4", "Parameters"), _table(("name", "in", "value"), parameters)]
        parts += self._request(call)
        parts.append(_tag("pre", self._curl(method, path, call, server), class_="curl", tabindex="0"))
        answers = [
            (_tag("code", status), self._answer(answer)) for status, answer in call["responses"].items()
        ]
        parts += [_tag("h4", "Answers"), _table(("status", "answer"), answers)]
        return _tag("article", *parts, id=call["operationId"])

    def _request(self, call: Node) -> Iterator[_Html]:
        if "requestBody" not in call:
            return
        yield _tag("h4", "Body", "" if call["requestBody"]["required"] else " (optional)")
        for content in call["requestBody"]["content"].values():
            yield self._schema(content["schema"])
            for name, example in content["examples"].items():
                yield _example(f"Example: {name}", example["value"])

    def _answer(self, answer: Node) -> _Html:
        contents = dict(answer.get("content", {}))
        examples = contents.pop(_PROBLEM, {}).get("examples", {})
        for code, example in examples.items():
            self._errors.setdefault(code, example["value"])
        parts = [_prose(answer["description"], {code: f"error-{code}" for code in examples})]
        for media_type, content in contents.items():
            if not examples:  # beside problems, the description names the backend's answer
                parts.append(_tag("p", _tag("code", media_type), " ", *self._type(content["schema"])))
        for name, header in answer.get("headers", {}).items():
            if header.get("required") or not examples:
                parts.append(_tag("p", _tag("code", name), ": ", header["description"]))
        return _tag("div", *parts)

    def _curl(self, method: str, path: str, call: Node, server: Node) -> str:
        """A command line for a shell. What its caller must fill in stands in capitals."""
        needed = [
            (one["in"], one["name"], _sample(one)) for one in call.get("parameters", ()) if one["required"]
        ]
        for place, name, sample in needed:
            if place == "path":
                path = path.replace(f"{{{name}}}", sample)
        url = self._url(server) + path
        if query := "&".join(f"{name}={sample}" for place, name, sample in needed if place == "query"):
            url += f"?{query}"
        words = ["curl -i", "" if method == "get" else "-I" if method == "head" else f"-X {method.upper()}"]
        if "x-unix-socket" in server:
            words.append(f"--unix-socket {shlex.quote(server['x-unix-socket'])}")
        lines = [" ".join(filter(None, [*words, shlex.quote(url)]))]
        lines += [
            f"-H {shlex.quote(f'{name}: {sample}')}" for place, name, sample in needed if place == "header"
        ]
        for media_type, content in call.get("requestBody", {}).get("content", {}).items():
            for example in list(content["examples"].values())[:1]:
                body = orjson.dumps(example["value"]).decode()
                lines += [f"-H 'Content-Type: {media_type}'", f"-d {shlex.quote(body)}"]
        return " \\\n  ".join(lines)

    # Errors and schemas ------------------------------------------------------------------------

    def _all_errors(self) -> _Html:
        parts = [
            part
            for code, example in sorted(self._errors.items())
            for part in (
                _tag("h3", _link(f"error-{code}", _tag("code", code)), id=f"error-{code}"),
                _example(f"{example['status']}: {example['title']}", example),
            )
        ]
        return _tag("section", _tag("h2", "Errors", id="errors"), *parts)

    def _all_schemas(self) -> _Html:
        parts = [
            part
            for name, schema in self._document["components"]["schemas"].items()
            for part in (
                _tag("h3", _link(f"schema-{name}", name), id=f"schema-{name}"),
                self._schema(schema),
            )
        ]
        return _tag("section", _tag("h2", "Schemas", id="schemas"), *parts)

    def _schema(self, schema: Node) -> _Html:
        """A schema with a table of its members. Of a named one, the table that its name stands for."""
        named = schema
        if "$ref" in schema:
            named = self._document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
        required = named.get("required", ())
        rows = [
            (
                _join([_tag("code", name), _tag("small", " required") if name in required else ""]),
                self._described(member, member),
            )
            for name, member in named.get("properties", {}).items()
        ]
        if not rows:
            return self._described(named, named)
        return _join([_prose(named.get("description", "")), _table(("member", "value"), rows), _rest(named)])

    def _described(self, schema: Node, beside: Node) -> _Html:
        """The type and the limits of a value, and the description that stands beside it."""
        needed = [_tag("small", "required ")] if beside.get("required") is True else []
        kind = _tag("div", *needed, *self._type(schema), _limits(schema), _rest(schema))
        return _join([kind, _prose(beside.get("description", ""))])

    def _type(self, schema: Node) -> list[str]:
        if "$ref" in schema:
            name = schema["$ref"].rpartition("/")[2]
            return [_link(f"schema-{name}", name)]
        if "anyOf" in schema and "properties" not in schema:
            kinds: list[str] = []
            for each in schema["anyOf"]:
                kinds += [" or ", *self._type(each), _limits(each)]
            return kinds[1:]
        for keyword, values in (("const", [schema.get("const")]), ("enum", schema.get("enum", ()))):
            if keyword in schema:
                return [_join((_tag("code", _json(value)) for value in values), ", ")]
        if schema.get("type") == "array":
            item = schema.get("items", {})
            return ["array of ", *self._type(item), _limits(item)]
        kind = schema.get("type", "any value")
        return [f"{kind} ({schema['format']})" if "format" in schema else kind]


# Parts ----------------------------------------------------------------------------------------------


def _tag(name: str, *content: str, **attributes: str) -> _Html:
    shown = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(value)}"' for key, value in attributes.items()
    )
    return _Html(f"<{name}{shown}>{_join(content)}</{name}>")


def _join(parts: Iterable[str], between: str = "") -> _Html:
    return _Html(between.join(part if isinstance(part, _Html) else html.escape(part) for part in parts))


def _link(anchor: str, *content: str) -> _Html:
    return _tag("a", *content, href=f"#{anchor}")


def _method(method: str) -> _Html:
    return _tag("b", method.upper(), class_=f"method {method}")


def _table(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> _Html:
    head = _tag("tr", *(_tag("th", each, scope="col") for each in heads))
    body = [_tag("tr", *(_tag("td", cell) for cell in row)) for row in rows]
    return _tag("div", _tag("table", _tag("thead", head), _tag("tbody", *body)), class_="table")


def _example(title: str, value: Any) -> _Html:
    text = orjson.dumps(value, option=orjson.OPT_INDENT_2).decode()
    return _tag("details", _tag("summary", title), _tag("pre", text, tabindex="0"))


def _prose(text: str, anchors: Mapping[str, str] | None = None) -> _Html:
    """Paragraphs and lists with `code`. Code that has an anchor is a link to it."""
    blocks = []
    for block in filter(None, re.split(r"\n{2,}", text)):
        lines = block.split("\n- ")
        if block.startswith("- "):
            items = [_tag("li", _inline(line.removeprefix("- "), anchors or {})) for line in lines]
            blocks.append(_tag("ul", *items))
        else:
            blocks.append(_tag("p", _inline(block, anchors or {})))
    return _join(blocks)


def _inline(text: str, anchors: Mapping[str, str]) -> _Html:
    parts: list[str] = []
    for number, part in enumerate(text.split("`")):
        code = _tag("code", part) if number % 2 else part
        parts.append(_link(anchors[part], code) if number % 2 and part in anchors else code)
    return _join(parts)


def _limits(schema: Node) -> _Html:
    """What a value must keep to, in words."""
    words: list[str] = []
    for least, most, unit in _LIMITS:
        if least in schema and most in schema:
            words.append(f"{schema[least]} to {schema[most]}{unit}")
        elif least in schema:
            words.append(f"at least {schema[least]}{unit}")
        elif most in schema:
            words.append(f"at most {schema[most]}{unit}")
    if "multipleOf" in schema:
        words.append(f"a multiple of {schema['multipleOf']}")
    if "pattern" in schema:
        words.append(_join(["matches ", _tag("code", schema["pattern"], class_="pattern")]))
    if "default" in schema:
        words.append(_join(["default ", _tag("code", _json(schema["default"]))]))
    return _join(["", *words], ", ")


def _rest(schema: Node) -> _Html:
    """The keywords that have no words, as JSON."""
    rest = {name: value for name, value in schema.items() if name not in _WORDED}
    if "properties" in schema and "anyOf" in schema:
        rest["anyOf"] = schema["anyOf"]
    return _tag("p", "and ", _tag("code", _json(rest))) if rest else _Html("")


def _sample(parameter: Node) -> str:
    """A value for a parameter: one that its schema names, or its name in capitals."""
    schema = parameter["schema"]
    values = [schema["default"]] if "default" in schema else schema.get("enum", ())
    return str(values[0]) if values else re.sub(r"\W", "_", parameter["name"]).upper()


def _json(value: Any) -> str:
    return orjson.dumps(value).decode()
