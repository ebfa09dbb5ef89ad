"""The corpus before real frameworks and servers: what their own routers execute was admitted before.

Each backend reports every execution on its standard output (tests/backends). First it hears the corpus
without the gate, which shows that the harness sees what executes, and how many spellings this backend takes
for the gated path. Then it hears it through a sidecar, where every execution that it reports needs an
admission with the same facts.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sidecar.settings.addresses import Address, Listen
from tests.backends.report import MARK
from tests.client import connect, read_message
from tests.corpus import BODY, TARGET, Case, Made, cases
from tests.support import Open, eventually, unused_port
from tests.tools import downloads, tool

pytestmark = pytest.mark.slow

PROJECT = Path(__file__).parents[2]
FOLDER = PROJECT / "tests" / "backends"
START_SECONDS = 30.0
STOP_SECONDS = 10.0
ANSWER_SECONDS = 3.0  # of which an odd request without the gate may use all
AT_ONCE = 16

# Backends parse a body by one of two JSON parsers, so that bodies are tried on one of each kind.
READ_BODIES = ("flask", "express5")
CASES = [case for case in cases() if case.made is not None and case.file not in ("framing", "bodies")]
BODIES = [case for case in cases() if case.made is not None and case.file == "bodies"]


def gunicorn(app: str) -> Callable[[int], list[str]]:
    def command(port: int) -> list[str]:
        bind = ["--bind", f"127.0.0.1:{port}", "--threads", "4", "--log-level", "critical"]
        return [sys.executable, "-m", "gunicorn", *bind, f"tests.backends.wsgi:{app}()"]

    return command


def python(name: str) -> Callable[[int], list[str]]:
    return lambda port: [sys.executable, "-m", "tests.backends.asgi", name, str(port)]


def node(name: str) -> Callable[[int], list[str]]:
    return lambda port: [tool("node"), str(FOLDER / "servers.js"), name, str(port)]


COMMANDS: Mapping[str, Callable[[int], list[str]]] = {
    "bottle-0.13": gunicorn("bottle_app"),
    "bottle-0.12": gunicorn("bottle_app"),
    "flask": gunicorn("flask_app"),
    "flask-url": gunicorn("flask_url_app"),
    "django": gunicorn("django_app"),
    "fastapi": python("fastapi"),
    "starlette-url": python("starlette-url"),
    "aiohttp": python("aiohttp"),
    "node-url": node("node-url"),
    "node-decoded-url": node("node-decoded-url"),
    "node-host-url": node("node-host-url"),
    "node-unescape": node("node-unescape"),
    "express4": node("express4"),
    "express5": node("express5"),
    "fastify": node("fastify"),
}
PACKAGES_OF_NODE = ("express4", "express5", "fastify")
EVERYDAY = ("flask", "starlette-url", "node-url", "nginx-proxy")


@dataclass
class Running:
    """A backend that runs. `reports` reads what it has executed since it was last asked."""

    process: subprocess.Popen[bytes]
    address: Address
    output: Path
    read: int = 0

    def reports(self) -> list[dict[str, Any]]:
        *whole, _ = self.output.read_bytes()[self.read :].split(b"\n")
        self.read += sum(len(line) + 1 for line in whole)
        mark = MARK.encode()
        return [json.loads(line.removeprefix(mark)) for line in whole if line.startswith(mark)]


class Stable:
    """Starts backends, each at most once, and ends them all."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self._running: dict[str, Running] = {}

    async def backend(self, name: str) -> Running:
        """The backend of this name, once it answers. Skips the test where what it needs is missing."""
        if name not in self._running:
            if name == "nginx-proxy":
                behind = await self.backend("node-url")
                self._start_nginx(name, behind)
            elif name == "nginx":
                self._start_nginx(name, None)
            else:
                port = unused_port()
                self._start(name, COMMANDS[name](port), port)
        running = self._running[name]
        async with asyncio.timeout(START_SECONDS):
            while True:
                assert running.process.poll() is None, f"{name} ended: {running.output.read_text()}"
                with suppress(OSError):
                    _, writer = await connect(running.address)
                    writer.close()
                    return running
                await asyncio.sleep(0.02)

    def _start(self, name: str, command: list[str], port: int) -> None:
        output = self._place / f"{name}.out"
        environment = {**os.environ, "PYTHONPATH": str(PROJECT), "NODE_PATH": ""}
        if name == "bottle-0.12":
            environment["PYTHONPATH"] = f"{self._bottle()}{os.pathsep}{PROJECT}"
        if name in PACKAGES_OF_NODE:
            environment["NODE_PATH"] = str(self._node_modules())
        with output.open("wb") as stream:
            process = subprocess.Popen(
                command,
                cwd=self._place,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
            )
        self._running[name] = Running(process, Listen("127.0.0.1", port), output)

    def _start_nginx(self, name: str, behind: Running | None) -> None:
        """nginx by itself, or before another backend, which is then the one that executes and reports."""
        port, proxy_port = unused_port(), unused_port()
        app = Listen("127.0.0.1", port) if behind is None else behind.address
        assert isinstance(app, Listen)
        text = (FOLDER / "nginx.conf").read_text()
        for place, value in (("{PORT}", port), ("{PROXY_PORT}", proxy_port), ("{APP_PORT}", app.port)):
            text = text.replace(place, str(value))
        folder = self._place / name
        folder.mkdir()
        (folder / "nginx.conf").write_text(text)
        command = [tool("nginx"), "-p", str(folder), "-c", "nginx.conf", "-e", "stderr"]
        self._start(name, command, port if behind is None else proxy_port)
        if behind is not None:
            running = self._running[name]
            running.output, running.read = behind.output, behind.output.stat().st_size

    def _bottle(self) -> Path:
        """Bottle 0.12, which cannot be installed beside 0.13. On Python 3.13 it needs the cgi module back."""
        target = self._place / "bottle-0.12"
        packages = ["bottle==0.12.25", *(["legacy-cgi==2.6.3"] if sys.version_info >= (3, 13) else [])]
        if not target.exists():
            downloads([sys.executable, "-m", "pip", "install", "-q", "--target", str(target), *packages])
        return target

    def _node_modules(self) -> Path:
        folder = self._place / "packages"
        if not (folder / "node_modules").exists():
            folder.mkdir(exist_ok=True)
            for name in ("package.json", "package-lock.json"):
                shutil.copy(FOLDER / name, folder)
            downloads([tool("npm"), "ci", "--ignore-scripts", "--no-audit", "--no-fund"], folder)
        return folder / "node_modules"

    def end(self) -> None:
        for running in self._running.values():
            running.process.terminate()
        for running in self._running.values():
            running.process.wait(STOP_SECONDS)


@pytest.fixture(scope="module")
def stable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stable]:
    started = Stable(tmp_path_factory.mktemp("backends"))
    try:
        yield started
    finally:
        started.end()


def marked(made: Made, number: object, scope_id: str) -> bytes:
    """A case as it goes out, with a header that names it."""
    head, blank, body = made.bytes_for(scope_id).partition(b"\r\n\r\n")
    return b"%b\r\nX-Case: %b%b%b" % (head, str(number).encode(), blank, body)


async def tell(address: Address, raw: bytes) -> None:
    reader, writer = await connect(address)
    try:
        writer.write(raw)
        async with asyncio.timeout(ANSWER_SECONDS):
            await read_message(reader, bodiless=raw.startswith(b"HEAD"))
    except (ConnectionError, TimeoutError, ValueError, IndexError):
        pass  # what a backend makes of an odd request is its own matter
    finally:
        writer.close()


async def executed(
    backend: Running, address: Address, told: list[Case], scope_id: str
) -> list[dict[str, Any]]:
    """What a backend reports after it, or the gate before it, was told these cases; without the last one."""
    places = asyncio.Semaphore(AT_ONCE)

    async def one(number: int, made: Made) -> None:
        async with places:
            await tell(address, marked(made, number, scope_id))

    await asyncio.gather(*(one(number, case.made) for number, case in enumerate(told) if case.made))
    last = Made("POST", TARGET, "sidecar.test", "application/json", (), BODY, False)
    await tell(address, marked(last, "last", scope_id))
    reports: list[dict[str, Any]] = []

    def heard() -> bool:
        reports.extend(backend.reports())
        return any(report["case"] == "last" for report in reports)

    await eventually(heard)
    return [report for report in reports if report["case"] != "last"]


def backends() -> Iterator[Any]:
    """All of them. The everyday run has one of each language and kind, of those that need no download."""
    for name in (*COMMANDS, "nginx", "nginx-proxy"):
        yield name if name in EVERYDAY else pytest.param(name, marks=pytest.mark.slow)


@pytest.mark.parametrize("name", list(backends()))
async def test_what_a_real_backend_executes_was_admitted_before(
    open_house: Open, stable: Stable, name: str
) -> None:
    backend = await stable.backend(name)
    assert isinstance(backend.address, Listen)
    told = [*CASES, *BODIES] if name in READ_BODIES else CASES
    without = await executed(backend, backend.address, CASES, "scope_none")
    house = await open_house(
        upstream_port=backend.address.port,
        scopes={"limits": {"max_attempts": 100_000, "ttl_seconds": 3600, "max_cost_usd": 100}},
    )
    scope_id = (await house.issue(max_attempts=100_000, ttl_seconds=3600))["scope_id"]
    reports = await executed(backend, house.sidecar.data_address, told, scope_id)
    admitted = {record["decision_id"]: record for record in await house.records("&event=admitted")}
    unjudged = []
    for report in reports:
        record, facts = admitted.get(report["decision_id"]), report["facts"]
        case = told[int(report["case"])] if report["case"] else "a request that is not of the corpus"
        if record is None:
            unjudged.append(f"{case}: it executes without an admission")
        elif any(
            facts.get(fact, record[fact]) != record[fact] for fact in ("scope_id", "incident_id", "action")
        ):
            unjudged.append(f"{case}: {facts} executes where {record['action']} was admitted")
    elsewhere = {report["case"] for report in without if "judged" not in CASES[int(report["case"])].owed}
    print(f"{name}: without the gate {len(elsewhere)} requests execute that no scope would cover;")
    print(f"through it {len(reports)} execute, {len(unjudged)} of them unjudged")
    assert reports
    if unjudged:
        pytest.fail("\n".join(unjudged), pytrace=False)
