"""The page under /docs in a real browser: it shows every call, loads and calls nothing but its own listener,
breaks no rule of its security policy, and can try out what is served there.

    python -m tests.long.swagger_page [--browser chromium] [--screenshot page.png]

Exit code 1 where something of that does not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
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
STATUS_CALL = "operations-Status-getStatus"
DATA_CALL = "operations-Execute-execute"
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
                told: dict[str, Any] = json.loads(await self._connection.recv())
                if told.get("id") == number:
                    assert "error" not in told, told
                    result: dict[str, Any] = told["result"]
                    return result
                self.events.append(told)

    async def value(self, expression: str) -> Any:
        """What a JavaScript expression is worth."""
        told = await self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

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
            session.get(f"http://{found[1].decode()}/json") as told,
        ):
            (page,) = [each for each in await told.json() if each["type"] == "page"]
        async with connect(page["webSocketDebuggerUrl"], max_size=None) as connection:
            yield Tab(connection)
    finally:
        process.terminate()
        await process.wait()
    await reading


async def look(page: Tab, origin: str) -> tuple[list[str], bytes]:
    """What is wrong with the page, and a picture of it."""
    wrong: list[str] = []
    for domain in ("Page", "Runtime", "Log", "Network"):
        await page.call(f"{domain}.enable")
    await page.call("Page.navigate", url=f"{origin}/docs")
    await page.until("document.querySelectorAll('.opblock').length > 30")
    shown = set(await page.value("[...document.querySelectorAll('.opblock')].map(one => one.id)"))
    wanted = await calls(origin)
    if shown != wanted:
        wrong.append(f"shown and in the document are not the same: {sorted(shown ^ wanted)}")
    for call in (STATUS_CALL, DATA_CALL):
        await page.value(f"document.querySelector('#{call} .opblock-summary-control').click()")
        await page.until(f"document.querySelector('#{call} .opblock-body') !== null")
    picture = await page.call("Page.captureScreenshot", captureBeyondViewport=True)
    if await page.value(f"document.querySelector('#{DATA_CALL} .try-out') !== null"):
        wrong.append("what another listener serves can be tried out")
    await page.value(f"document.querySelector('#{STATUS_CALL} .try-out__btn').click()")
    await page.until(f"document.querySelector('#{STATUS_CALL} .execute') !== null")
    await page.value(f"document.querySelector('#{STATUS_CALL} .execute').click()")
    answered = f"document.querySelector('#{STATUS_CALL} tr.response .response-col_status')"
    await page.until(f"{answered} !== null")
    status = await page.value(f"{answered}.innerText")
    if not status.startswith("200"):
        wrong.append(f"GET /api/v1/status, tried out, answers {status}")
    await asyncio.sleep(0.5)
    await page.value("1")  # takes in what was told meanwhile
    for event in page.events:
        if event["method"] in FAULTS:
            wrong.append(json.dumps(event))
        if event["method"] == "Network.requestWillBeSent":
            url: str = event["params"]["request"]["url"]
            if not url.startswith((f"{origin}/", "data:")):
                wrong.append(f"something is asked for elsewhere: {url}")
    return wrong, base64.b64decode(picture["data"])


async def calls(origin: str) -> set[str]:
    """The ids that the page gives to the calls of the document."""
    async with aiohttp.ClientSession() as session, session.get(f"{origin}/openapi.json") as told:
        document = await told.json()
    return {
        f"operations-{operation['tags'][0]}-{operation['operationId']}"
        for item in document["paths"].values()
        for name, operation in item.items()
        if name != "servers"
    }


async def checked(browser: str) -> tuple[list[str], bytes]:
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
    parser.add_argument("--screenshot", type=Path, help="where to put a picture of the page")
    options = parser.parse_args()
    wrong, picture = asyncio.run(checked(options.browser))
    if options.screenshot is not None:
        options.screenshot.write_bytes(picture)
    print("\n".join(wrong) or "WELL")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
