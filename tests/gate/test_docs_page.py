"""The page under /docs as it is served, and its curl lines as requests to the listeners."""

from __future__ import annotations

import asyncio
from urllib.parse import urlsplit

import pytest

from sidecar.settings.addresses import Listen
from sidecar.web.api.docpage import page
from tests.client import ask
from tests.described import described
from tests.support import House, Open
from tests.unit.test_docpage import Page


async def test_it_shows_the_document_of_its_listener_and_the_host_of_the_request(house: House) -> None:
    document = (await house.admin("GET", "/openapi.json")).json()
    for host in (str(house.sidecar.admin_address), "localhost:1234", "localhost:1234"):
        answer = await house.admin("GET", "/docs", headers=[("Host", host)])
        assert answer.header("Content-Type") == "text/html; charset=utf-8"
        assert answer.body == page(document, f"http://{host}")


async def test_readers_at_once_get_the_page_of_their_own_host(house: House) -> None:
    hosts = [f"localhost:{number}" for number in range(1, 9)]
    answers = await asyncio.gather(*(house.admin("GET", "/docs", headers=[("Host", host)]) for host in hosts))
    for host, answer in zip(hosts, answers, strict=True):
        assert f"http://{host}/api/v1/status".encode() in answer.body


@pytest.mark.parametrize("serve_on", ["data", "admin"])
async def test_every_curl_line_is_a_request_that_its_listener_takes(open_house: Open, serve_on: str) -> None:
    """A name in capitals may be unknown there, but nothing of the request may be wrong."""
    house = await open_house(scopes={"serve_on": serve_on})
    document = await described(house)
    shown = Page(document.document, f"http://{house.sidecar.admin_address}")
    for name, (command, *words) in shown.curls.items():
        assert command == "curl"
        method, headers, body, url = "GET", [], None, ""
        while words:
            match words.pop(0):
                case "-i":
                    pass
                case "-I":
                    method = "HEAD"
                case "-X":
                    method = words.pop(0)
                case "-H":
                    key, _, value = words.pop(0).partition(": ")
                    headers.append((key, value))
                case "-d":
                    body = words.pop(0).encode()
                case url:
                    pass
        parts = urlsplit(url)
        answer = await ask(Listen.parse(parts.netloc), method, parts.path, headers, body)
        document.assert_answered(name, answer)
        if answer.status >= 400:
            assert answer.json()["error"] in {
                "completion_refused",
                "decision_not_found",
                "freeze_not_found",
                "scope_not_found",
                "reload_refused",
            }, (name, answer.body)
