"""Starts the backend, the sidecar and its peers, and prepares the requests for each of them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from string import Template
from typing import Any, Literal

import yaml

from sidecar.auth import tokenfile, tokens
from tests import tokens as issuer
from tests.bench import load
from tests.bench.processes import BenchError, Cores, Program, accepts, free_port

CHECKOUT = Path(__file__).parents[2]
PEERS = Path(__file__).parent / "peers"
ANSWER_BYTES = 1024
ATTEMPTS = 1_000_000  # the most that the sidecar's configuration lets a scope have
JSON_TYPE = {"Content-Type": "application/json"}
# Where packages of Python put programs, before wherever the system has them.
PATHS = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/sbin"])


@dataclass
class Target:
    """A proxy that runs in front of the backend, or the backend itself, which has no programs here."""

    name: str
    port: int
    programs: list[Program] = field(default_factory=list)
    issue: Callable[[str], str] = lambda incident_id: f"scope_of_{incident_id}"
    admin: int = 0  # the port of the sidecar's admin listener
    credential: Mapping[str, str] = field(default_factory=dict)  # headers of every request

    def requests(self, target: str, count: int, *, in_headers: bool = False) -> list[load.Request]:
        """Requests that are allowed, each under a scope of its own; `in_headers` also names it there."""
        made = []
        for number in range(count):
            incident_id = f"inc_{number}"
            scope_id = self.issue(incident_id) if target == load.GATED_TARGET else f"scope_{number}"
            named = {"X-Scope-Id": scope_id, "X-Incident-Id": incident_id, "X-Action": load.ACTION}
            headers = {**JSON_TYPE, **self.credential, **(named if in_headers else {})}
            made.append(load.Request(headers, load.body(scope_id, incident_id)))
        return made

    def cpu_seconds(self) -> float:
        return sum(program.cpu_seconds() for program in self.programs)

    def resident_bytes(self) -> int:
        return sum(program.resident_bytes() for program in self.programs)


class _Template(Template):
    delimiter = "@"


@dataclass
class Rig:
    """What all targets of a run share: the cores, the backend, and a folder on the disk under test."""

    folder: Path
    cores: Cores
    backend: int = 0
    _made: int = 0

    def place(self, name: str) -> Path:
        """A new folder."""
        self._made += 1
        made = self.folder / f"{self._made}-{name}"
        made.mkdir()
        return made

    def fill(self, name: str, place: Path, **values: object) -> Path:
        """A configuration of `peers/`, its `@NAME` placeholders filled in, in `place`."""
        text = (PEERS / name).read_text(encoding="utf-8")
        values = {"FOLDER": place, "BACKEND": self.backend, **values}
        (place / name).write_text(_Template(text).substitute(values), encoding="utf-8")
        return place / name

    @contextmanager
    def program(
        self,
        name: str,
        command: list[str | Path],
        place: Path,
        *,
        port: int,
        core: int | None = None,
        environment: Mapping[str, str] | None = None,
        ready: Callable[[], bool] | None = None,
    ) -> Iterator[Program]:
        """A program that listens on `port`, on the proxy's core unless another one is given."""
        core = self.cores.proxy if core is None else core
        program = Program(name, command, core=core, folder=place, environment=environment)
        try:
            program.wait_for(ready or partial(accepts, port))
            yield program
        finally:
            program.stop()

    @contextmanager
    def nginx(self, name: str, core: int, **values: object) -> Iterator[tuple[int, Program]]:
        port, place = free_port(), self.place("nginx")
        config = self.fill(name, place, PORT=port, **values)
        self.fill("common.conf", place)
        command: list[str | Path] = [found("nginx"), "-p", place, "-c", config, "-e", "stderr"]
        with self.program(f"nginx with {name}", command, place, port=port, core=core) as program:
            yield port, program

    @contextmanager
    def python(self, module: str, *arguments: str) -> Iterator[tuple[int, Program]]:
        """A peer written in Python."""
        port, place = free_port(), self.place(module)
        command: list[str | Path] = [sys.executable, "-m", f"tests.bench.peers.{module}", "--port", str(port)]
        command += [argument.replace("@FOLDER", str(place)) for argument in arguments]
        environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
        with self.program(module, command, place, port=port, environment=environment) as program:
            yield port, program


def found(program: str) -> str:
    """The path of a program. Raises BenchError without it."""
    path = shutil.which(program, path=PATHS)
    if path is None:
        raise BenchError(f"{program} is not installed")
    return path


Opening = Callable[[Rig], AbstractContextManager[Target]]


@contextmanager
def backend(rig: Rig) -> Iterator[None]:
    """The backend runs on the load's core; the rig knows its port from then on."""
    answer = {"status": "done", "note": ""}
    answer["note"] = "n" * (ANSWER_BYTES - len(json.dumps(answer)))
    with rig.nginx("backend.conf", rig.cores.load, ANSWER=json.dumps(answer)) as (port, _):
        rig.backend = port
        yield


@contextmanager
def backend_again(rig: Rig) -> Iterator[Target]:
    """The backend that already runs, as one side of a comparison."""
    yield Target("the backend itself", rig.backend)


@contextmanager
def bare(rig: Rig) -> Iterator[Target]:
    with rig.python("bare", "--backend", str(rig.backend)) as (port, program):
        yield Target("bare aiohttp", port, [program])


@contextmanager
def nginx_proxy(rig: Rig) -> Iterator[Target]:
    with rig.nginx("nginx_proxy.conf", rig.cores.proxy) as (port, program):
        yield Target("nginx", port, [program])


@contextmanager
def nginx_auth_request(rig: Rig) -> Iterator[Target]:
    with (
        rig.python("authorizer", "--database", "@FOLDER/scopes.db") as (authorizer, service),
        rig.nginx("nginx_auth_request.conf", rig.cores.proxy, AUTHORIZER=authorizer) as (port, program),
    ):
        yield Target("nginx auth_request", port, [program, service], partial(_issue, authorizer, "/scopes"))


@contextmanager
def envoy(rig: Rig) -> Iterator[Target]:
    port, place = free_port(), rig.place("envoy")
    with ExitStack() as opened:
        authorizer, service = opened.enter_context(
            rig.python("authorizer", "--database", "@FOLDER/scopes.db")
        )
        config = rig.fill("envoy.yaml", place, PORT=port, AUTHORIZER=authorizer)
        command: list[str | Path] = [found("envoy"), "-c", config, "--concurrency", "1", "-l", "warning"]
        command += ["--disable-hot-restart"]
        program = opened.enter_context(rig.program("Envoy", command, place, port=port))
        yield Target("Envoy ext_authz", port, [program, service], partial(_issue, authorizer, "/scopes"))


@contextmanager
def fastapi_proxy(rig: Rig) -> Iterator[Target]:
    options = ("--backend", str(rig.backend), "--database", "@FOLDER/scopes.db")
    with rig.python("fastapi_proxy", *options) as (port, program):
        yield Target("FastAPI proxy", port, [program], partial(_issue, port, "/scopes"))


@contextmanager
def scopegate(
    rig: Rig,
    *,
    name: str = "Scopegate",
    checkout: Path = CHECKOUT,
    rules: str = "",
    database: Path | None = None,
    auth: Literal["tokens", "jwt"] | None = None,
) -> Iterator[Target]:
    """The sidecar of a checkout, with a new database unless one is given.

    `rules` is the text of a policy file beside the catalogue. With `auth`, callers must show a token of the
    sidecar or of an issuer, and the load does.

    Only what scopes may ask for is raised. Files that the sidecar watches (the configuration, the policies)
    stand apart from the store.
    """
    place = rig.place("scopegate")
    data, admin, ops = free_port(), free_port(), free_port()
    for folder in ("config", "policies", "store"):
        (place / folder).mkdir()
    catalogue = f"actions:\n  {load.ACTION}: {{risk: low, max_cost_usd: 0.10}}\n"
    (place / "policies/actions.yaml").write_text(catalogue, encoding="utf-8")
    if rules:
        (place / "policies/rules.yaml").write_text(rules, encoding="utf-8")
    config = place / "config/scopegate.yaml"
    settings = {
        "data": {"listen": f"127.0.0.1:{data}"},
        "admin": {"listen": f"127.0.0.1:{admin}"},
        "ops": {"listen": f"127.0.0.1:{ops}"},
        "upstream": {"url": f"http://127.0.0.1:{rig.backend}"},
        "store": {"url": f"sqlite:///{database or place / 'store/scopegate.db'}"},
        "scopes": {"limits": {"max_attempts": ATTEMPTS, "max_cost_usd": ATTEMPTS}},
        "policies": "../policies/",
    }
    secret = None
    if auth is not None:
        settings["auth"], secret = credentials(place / "config", auth)
        (place / "policies/roles.yaml").write_text(ROLES, encoding="utf-8")
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SCOPEGATE_")}
    environment["PYTHONPATH"] = str(checkout)
    _check_origin(checkout, place, environment)
    command: list[str | Path] = [sys.executable, "-m", "sidecar", "run", "--config", config]
    ready = partial(_is_ready, ops)
    with rig.program(name, command, place, port=data, environment=environment, ready=ready) as program:
        issuing = {} if secret is None else {"Authorization": f"Bearer {secret}"}
        executing = {} if secret is None else {"Scopegate-Authorization": f"Bearer {secret}"}
        issue = partial(_issue, data, "/api/v1/recovery/scope", headers=issuing)
        yield Target(name, data, [program], issue, admin, executing)


ROLES = "roles: {issuer: {ids: ['*']}, executor: {ids: ['*']}, observer: {ids: ['*']}}\n"


def credentials(folder: Path, method: Literal["tokens", "jwt"]) -> tuple[dict[str, Any], str]:
    """The section `auth` with a method, and a token of a caller."""
    if method == "tokens":
        secret = tokens.new_secret()
        made = tokens.Token(name="bench", digest=tokens.digest_of(secret), created_at=0, kind="agent")
        tokenfile.change(folder / "tokens.yaml", lambda _: [made])
        return {"required": True, "tokens": {"file": "tokens.yaml"}}, secret
    (folder / "jwks.json").write_bytes(issuer.key_set(issuer.jwk(issuer.RSA_KEY, "k1")))
    keys = {"issuer": issuer.ISSUER, "audience": issuer.AUDIENCE, "jwks": "jwks.json"}
    return {"required": True, "jwt": keys}, issuer.signed(issuer.claims(int(time.time())))


def _check_origin(checkout: Path, place: Path, environment: Mapping[str, str]) -> None:
    """Raises BenchError if Python would import the sidecar from elsewhere than this checkout."""
    command = [sys.executable, "-c", "import sidecar; print(sidecar.__file__)"]
    ran = subprocess.run(
        command, cwd=place, env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    origin = Path(ran.stdout.strip())
    if origin.resolve().parents[1] != checkout.resolve():
        raise BenchError(f"the sidecar of {checkout} was to be measured, and Python imports {origin}")


def _is_ready(ops: int) -> bool:
    return accepts(ops) and load.ask(ops, "GET", "/health/ready")[0] == 200


def _issue(port: int, target: str, incident_id: str, *, headers: Mapping[str, str] = load.NO_HEADERS) -> str:
    """The id of a new scope with as many attempts as a run needs. Raises BenchError without one."""
    terms = {
        "incident_id": incident_id,
        "action": load.ACTION,
        "intent": "measure how fast executions are",
        "max_attempts": ATTEMPTS,
        "max_cost_usd": ATTEMPTS,
        "ttl_seconds": 3600,
    }
    status, answer = load.ask(port, "POST", target, terms, headers)
    if status != 201:
        raise BenchError(f"no scope was issued: {status} {answer}")
    return str(answer["scope_id"])
