"""Stubs of the interfaces that have presets, and the calls that are tried on them.

`tests/cases/presets/NAME.yaml` describes one interface. `answers` are its endpoints, and the first that
matches answers: method and path, where `{x}` is one segment and `{x...}` the rest, and perhaps a header.
`slash: redirect` answers 301 to a path that lacks the slash at its end, as Django does. Anything else is
answered with `otherwise`. The stub listens on a real socket and keeps every request as it came.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode

from tests.client import Message
from tests.support import Script

JSON = "application/json"
FORM = "application/x-www-form-urlencoded"


@dataclass(frozen=True)
class Call:
    """One call of an interface as a case writes it, and what the case says of it."""

    method: str
    target: str
    headers: tuple[tuple[str, str], ...]
    body: bytes | None
    case: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, case: Mapping[str, Any] | str) -> Call:
        """A case is a map with `call`, or `METHOD TARGET` alone."""
        given: Mapping[str, Any] = {"call": case} if isinstance(case, str) else case
        method, _, target = given["call"].partition(" ")
        kind, body = given.get("type"), None
        if "json" in given:
            kind, body = kind or JSON, json.dumps(given["json"]).encode()
        elif "form" in given:
            kind, body = kind or FORM, urlencode(given["form"]).encode()
        elif "body" in given:
            body = given["body"].encode()
        elif method == "POST":
            body = b""  # clients send Content-Length: 0
        headers = [*given.get("headers", {}).items(), *([("Content-Type", kind)] if kind else [])]
        return cls(method, target, tuple(headers), body, given)

    def __str__(self) -> str:
        return f"{self.method} {self.target}"


def stub(interface: Mapping[str, Any]) -> Script:
    """The script of a backend that answers as an interface does."""
    rows = [(_pattern(row["to"]), row) for row in interface["answers"]]

    def answer(request: Message) -> Mapping[str, Any]:
        asked = f"{request.method} {request.target.partition('?')[0]}"
        for pattern, row in rows:
            wanted = row.get("header", {})
            if pattern.fullmatch(asked) and all(
                request.header(name) == text for name, text in wanted.items()
            ):
                return dict(row)
        if interface.get("slash") == "redirect" and any(row.fullmatch(asked + "/") for row, _ in rows):
            path, question, query = request.target.partition("?")
            return {"status": 301, "headers": {"Location": path + "/" + question + query}}
        return dict(interface["otherwise"])

    async def script(request: Message, writer: asyncio.StreamWriter) -> None:
        row = answer(request)
        body = json.dumps(row["json"]).encode() if "json" in row else row.get("text", "").encode()
        kind = [("Content-Type", interface.get("type", JSON))] if body else []
        lines = [f"{name}: {value}" for name, value in [*kind, *row.get("headers", {}).items()]]
        if row["status"] not in (204, 304):
            lines.append(f"Content-Length: {len(body)}")
        head = "\r\n".join([f"HTTP/1.1 {row['status']} Stub", *lines, "", ""]).encode()
        writer.write(head if request.method == "HEAD" else head + body)

    return script


def _pattern(endpoint: str) -> re.Pattern[str]:
    """`POST|PUT /a/{x}/b` as a pattern of method and path."""
    methods, _, path = endpoint.partition(" ")
    parts = re.split(r"(\{[^}]*\})", path)
    found = (
        (".+" if part.endswith("...}") else "[^/]+") if part.startswith("{") else re.escape(part)
        for part in parts
    )
    return re.compile(f"(?:{methods}) {''.join(found)}")
