"""The page under /docs in a real browser, wide and narrow, light and dark: it shows every call, requests
nothing from other hosts, breaks no rule of its security policy, and fits its window.

    python -m tests.long.docs_page [--browser chromium] [--pictures FOLDER]

Exits with 1 if one of these does not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import itertools
import json
import re
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
from websockets.asyncio.client import ClientConnection, connect

from tests.support import opened, serving_backend

PATIENCE_SECONDS = 20.0
FAULTS = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")


class Tab:
    """One page of a browser, driven over its DevTools protocol."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self._number = 0
        self.events: list[dict[str, Any]] = []

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        number = self._number
        await self._connection.send(json.dumps({"id": number, "method": method, "params": parameters}))
        async with asyncio.timeout(PATIENCE_SECONDS):
            while True:
                answer: dict[str, Any] = json.loads(await self._connection.recv())
                if answer.get("id") == number:
                    assert "error" not in answer, answer
                    result: dict[str, Any] = answer["result"]
                    return result
                self.events.append(answer)

    async def value(self, expression: str) -> Any:
        """What a JavaScript expression is worth."""
        answer = await self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def until(self, expression: str) -> Any:
        """Its first value that says something."""
        end = asyncio.get_running_loop().time() + PATIENCE_SECONDS
        while not (value := await self.value(expression)):
            assert asyncio.get_running_loop().time() < end, f"it never came true: {expression}"
            await asyncio.sleep(0.1)
        return value


@asynccontextmanager
async def tab(browser: str, folder: Path) -> AsyncIterator[Tab]:
    """The tab of a browser of its own, without a window."""
    process = await asyncio.create_subprocess_exec(
        browser,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--remote-debugging-port=0",
        "--window-size=1280,1600",
        f"--user-data-dir={folder}",
        "about:blank",
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while (found := re.search(rb"ws://([^/]+)/", await process.stderr.readline())) is None:
                continue
        reading = asyncio.create_task(process.stderr.read())  # or it would hang on a full pipe
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"http://{found[1].decode()}/json") as answer,
        ):
            (page,) = [each for each in await answer.json() if each["type"] == "page"]
        async with connect(page["webSocketDebuggerUrl"], max_size=None) as connection:
            yield Tab(connection)
    finally:
        process.terminate()
        await process.wait()
    await reading


async def look(page: Tab, origin: str) -> tuple[list[str], dict[str, bytes]]:
    """The faults of the page, and a picture of it for each width and colour scheme."""
    faults: list[str] = []
    pictures: dict[str, bytes] = {}
    for domain in ("Page", "Runtime", "Log", "Network"):
        await page.call(f"{domain}.enable")
    for width, scheme in itertools.product((1280, 375), ("light", "dark")):
        await page.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=1600, deviceScaleFactor=1, mobile=False
        )
        await page.call(
            "Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}]
        )
        await page.call("Page.navigate", url=f"{origin}/docs")
        await page.until("document.readyState === 'complete' && document.querySelectorAll('article').length")
        shown = set(await page.value("[...document.querySelectorAll('article')].map(one => one.id)"))
        wanted = await calls(origin)
        if shown != wanted:
            faults.append(f"the page and the document name different calls: {sorted(shown ^ wanted)}")
        if (needed := await page.value("document.documentElement.scrollWidth")) > width:
            faults.append(f"the page is {needed} pixels wide in a window of {width}")
        for anchor in ("", "createScope"):
            await page.value(f"location.hash = '{anchor}'")
            picture = await page.call("Page.captureScreenshot")
            pictures[f"{width}-{scheme}{anchor}"] = base64.b64decode(picture["data"])
        if await page.value("document.querySelector(':target') === null"):
            faults.append("an anchor leads nowhere")
    for event in page.events:
        if event["method"] in FAULTS:
            faults.append(json.dumps(event))
        if event["method"] == "Network.requestWillBeSent":
            url: str = event["params"]["request"]["url"]
            if not url.startswith((f"{origin}/", "data:")):
                faults.append(f"the page requests {url}")
    return faults, pictures


async def calls(origin: str) -> set[str]:
    """The ids of the calls of the document."""
    async with aiohttp.ClientSession() as session, session.get(f"{origin}/openapi.json") as answer:
        document = await answer.json()
    return {
        operation["operationId"]
        for item in document["paths"].values()
        for name, operation in item.items()
        if name != "servers"
    }


async def checked(browser: str) -> tuple[list[str], dict[str, bytes]]:
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as profile:
        async with (
            serving_backend() as backend,
            opened(Path(folder), backend) as house,
            tab(browser, Path(profile)) as page,
        ):
            return await look(page, f"http://{house.sidecar.admin_address}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--browser", default="chromium", help="the command of a Chromium (default: chromium)")
    parser.add_argument("--pictures", type=Path, help="a folder for pictures of the page")
    options = parser.parse_args()
    faults, pictures = asyncio.run(checked(options.browser))
    if options.pictures is not None:
        for name, picture in pictures.items():
            (options.pictures / f"{name}.png").write_bytes(picture)
    print("\n".join(faults) or "WELL")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
