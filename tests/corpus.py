"""The corpus of raw requests in tests/gate/corpus: how it is written is told in its README.md."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent / "gate" / "corpus"
TARGET = "/api/v1/recovery/execute"
BODY = '{"scope_id":"SCOPE","incident_id":"inc_1","action":"retry_agent","parameters":{"n":1}}'
EXECUTED = frozenset({"judged", "passes"})  # the verdicts under which a request arrives


@dataclass(frozen=True)
class Case:
    """One request of the corpus. `made` is what it was made of, None where it is raw."""

    file: str
    kind: str
    owed: tuple[str, ...]
    raw: bytes
    made: Made | None

    def bytes_for(self, scope_id: str) -> bytes:
        """The request as it goes onto the wire, under a scope whose id is as long as `SCOPE` is not."""
        if self.made is not None:
            return self.made.bytes_for(scope_id)
        body = BODY.replace("SCOPE", scope_id).encode()
        smuggled = Made("POST", TARGET, "sidecar.test", "application/json", (), BODY, False)
        raw = self.raw.replace(b"SMUGGLED", smuggled.bytes_for(scope_id))
        raw = raw.replace(b"CHUNKED", b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))
        return raw.replace(b"LENGTH", b"%d" % len(body)).replace(b"BODY", body)

    def __str__(self) -> str:
        return f"{self.file}, {self.kind}: {self.made or repr(self.raw)}"


@dataclass(frozen=True)
class Made:
    """A request that is written as its parts. In its texts a character is a byte."""

    method: str
    target: str
    host: str | None
    type: str | None
    headers: tuple[str, ...]
    body: str | None
    chunked: bool

    def __str__(self) -> str:
        lines = [
            line
            for line in self.lines
            if line not in ("Host: sidecar.test", "Content-Type: application/json")
        ]
        body = "" if self.body == BODY else f" {self.body!r}"
        return f"{self.method} {self.target!r} {', '.join(map(repr, lines))}{body}"

    @property
    def lines(self) -> list[str]:
        lines = [] if self.host is None else [f"Host: {self.host}"]
        if self.type is not None and self.body is not None:
            lines.append(f"Content-Type: {self.type}")
        return [*lines, *self.headers]

    def body_bytes(self, scope_id: str) -> bytes:
        return (self.body or "").replace("SCOPE", scope_id).encode("latin-1")

    def bytes_for(self, scope_id: str) -> bytes:
        body, lines = self.body_bytes(scope_id), self.lines
        if self.chunked:
            lines.append("Transfer-Encoding: chunked")
            pieces = [body[start : start + 7] for start in range(0, len(body), 7)]
            body = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
        elif self.body is not None:
            lines.append(f"Content-Length: {len(body)}")
        head = "\r\n".join([f"{self.method} {self.target} HTTP/1.1", *lines, "", ""])
        return head.encode("latin-1") + body


def cases() -> Iterator[Case]:
    """The whole corpus, in its order. ValueError names a group that is not written as the README says."""
    for file in sorted(FOLDER.glob("*.yaml")):
        for group in yaml.load(file.read_text(), yaml.CSafeLoader):
            if set(group) != {"kind", "why", "owed", "requests"}:
                raise ValueError(
                    f"{file.name}: a group has a kind, a why, what is owed and requests: {group}"
                )
            for written in group["requests"]:
                parts = {"target": written} if isinstance(written, str) else dict(written)
                owed = parts.pop("owed", group["owed"])
                owed = (owed,) if isinstance(owed, str) else tuple(owed)
                made = None if "raw" in parts else _made(parts)
                raw = parts.pop("raw", "").encode("latin-1")
                if parts:
                    raise ValueError(f"{file.name}, {group['kind']}: not known: {', '.join(parts)}")
                yield Case(file.stem, group["kind"], owed, raw, made)


def _made(parts: dict[str, Any]) -> Made:
    return Made(
        method=parts.pop("method", "POST"),
        target=parts.pop("target", TARGET),
        host=parts.pop("host", "sidecar.test"),
        type=parts.pop("type", "application/json"),
        headers=tuple(parts.pop("headers", ())),
        body=parts.pop("body", BODY),
        chunked=parts.pop("chunked", False),
    )


HOP_BY_HOP = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "http2-settings",
    }
)


def end_to_end(lines: list[str]) -> list[tuple[str, str]]:
    """The headers of these lines that go on, as RFC 9110, 7.6.1, says; framing is each side's own."""
    pairs = [(name, value.strip(" \t")) for name, _, value in (line.partition(":") for line in lines)]
    named = {
        option.strip().lower()
        for name, value in pairs
        if name.lower() == "connection"
        for option in value.split(",")
    }
    ending = HOP_BY_HOP | named | {"content-length"}
    return [(name, value) for name, value in pairs if name.lower() not in ending]


def is_own(name: str) -> bool:
    """Whether only the gate may send a header of this name."""
    return re.match(r"scopegate[-_]", name, re.IGNORECASE) is not None


def counted(found: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {name}" for name, number in sorted(found.items()))
