"""The page of the OpenAPI document: complete, linked, escaped, and without anything to load or run."""

from __future__ import annotations

import re
import shlex
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from sidecar.settings.addresses import SocketFile
from sidecar.settings.reading import Listen, default
from sidecar.web.api.docpage import page
from sidecar.web.api.docs import FILES
from sidecar.web.api.openapi.document import document
from tests.described import DOCUMENT, made

ORIGIN = "http://127.0.0.1:9901"
TENANTS = made(gate={"tenant_header": "X-Tenant-Id"})
VOID = {"meta", "link"}


class Page(HTMLParser):
    """A page as a browser reads it. Fails for elements that do not nest."""

    def __init__(self, document: Any, origin: str = ORIGIN) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.elements: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.curls: dict[str, list[str]] = {}
        self._open: list[str] = []
        self._call = ""
        self._in_curl = False
        self.feed(page(document, origin).decode())
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self.elements.add(tag)
        self.attributes |= attributes.keys()
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.links += [attributes[name] for name in ("href", "src") if name in attributes]
        if tag not in VOID:
            self._open.append(tag)
        if tag == "article":
            self._call = attributes["id"]
        self._in_curl = attributes.get("class") == "curl"

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        self._in_curl = False

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._in_curl:
            self.curls[self._call] = shlex.split(data.replace("\\\n", " "))


SHOWN = Page(DOCUMENT.document)


def test_it_shows_every_call_schema_error_and_parameter() -> None:
    assert set(SHOWN.curls) == DOCUMENT.names
    assert DOCUMENT.names <= set(SHOWN.ids)
    assert {f"schema-{name}" for name in DOCUMENT.document["components"]["schemas"]} <= set(SHOWN.ids)
    for path, _, call in DOCUMENT.operations():
        assert path in SHOWN.text
        for parameter in call.get("parameters", ()):
            assert parameter["name"] in SHOWN.text
        for answer in call["responses"].values():
            problems = answer.get("content", {}).get("application/problem+json", {}).get("examples", {})
            assert {f"error-{code}" for code in problems} <= set(SHOWN.ids)


def test_it_leaves_no_keyword_of_a_schema_out() -> None:
    for said in (
        '"anyOf":[{"required":["action"]},{"required":["allowed_actions"]}]',
        '"if":{"properties":{"outcome":{"const":"not_executed"}}',
        "number, 0 to 100.0, a multiple of 1e-06, default 0.5",
        "array of string, 1 to 256 characters",
        "string (uuid)",
    ):
        assert said in SHOWN.text


def test_every_link_leads_somewhere_on_this_listener_and_every_id_is_one() -> None:
    assert len(SHOWN.ids) == len(set(SHOWN.ids))
    for link in SHOWN.links:
        if link.startswith("#"):
            assert link[1:] in SHOWN.ids
        else:
            assert link in {"/openapi.json", "data:,", *(f"/docs/{name}" for name in FILES)}


def test_it_runs_nothing_and_loads_only_its_style_sheet() -> None:
    assert not SHOWN.elements & {"script", "style", "img", "iframe", "form", "object"}
    assert not {name for name in SHOWN.attributes if name == "style" or name.startswith("on")}
    style = (files("sidecar.web.api") / "page.css").read_text(encoding="utf-8")
    assert re.findall(r"url\(|@import|expression", style) == []


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "&amp; 'x'"])
def test_text_of_the_document_is_never_html(text: str) -> None:
    call = {
        "tags": [text],
        "summary": text,
        "description": f"- {text}\n- `{text}`",
        "operationId": text,
        "parameters": [
            {"name": text, "in": "header", "required": True, "description": text, "schema": {"enum": [text]}}
        ],
        "responses": {"200": {"description": text, "content": {text: {"schema": {"$ref": f"#/{text}"}}}}},
    }
    shown = Page(
        {
            "info": {"title": text, "version": text, "summary": text, "description": text},
            "servers": [{"url": text, "description": text}],
            "tags": [{"name": text, "description": text}],
            "paths": {text: {"servers": [{"url": text, "description": text}], "post": call}},
            "components": {"schemas": {text: {"type": text, "pattern": text, "odd": text}}},
        },
        text,
    )
    assert not shown.elements & {"script", "img"}
    assert shown.text.count(text) > 10


# The curl lines ---------------------------------------------------------------------------------------


def test_a_curl_line_has_what_the_call_needs() -> None:
    assert SHOWN.curls["getStatus"] == ["curl", "-i", f"{ORIGIN}/api/v1/status"]
    assert SHOWN.curls["headExecute"][:3] == ["curl", "-i", "-I"]
    words = SHOWN.curls["createScope"]
    assert words[:4] == ["curl", "-i", "-X", "POST"]
    assert words[5:7] == ["-H", "Content-Type: application/json"]
    assert words[7:8] == ["-d"]
    assert SHOWN.curls["getDecision"][-1] == f"{ORIGIN}/api/v1/decisions/DECISION_ID"
    assert SHOWN.curls["getPageFile"][-1] == f"{ORIGIN}/docs/page.css"
    assert "X-Tenant-Id: X_TENANT_ID" in Page(TENANTS.document).curls["createScope"]


def test_a_curl_line_reaches_a_listener_on_a_unix_socket() -> None:
    settings = default("http://127.0.0.1:9000")
    made = document(settings, data=SocketFile(Path("/run/a b.sock")), ops=Listen("127.0.0.1", 9902))
    words = Page(made).curls["createScope"]
    assert words[4:7] == ["--unix-socket", "/run/a b.sock", "http://localhost/api/v1/recovery/scope"]
