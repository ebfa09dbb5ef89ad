"""`scopegate demo`: an example recovery backend, the sidecar before it, and steps A1 to A5 of the recovery
API.

HTTP servers on free loopback ports, the store on disk and the requests over sockets are real. Only the
backend is an example. It executes every request, as most recovery services do.
"""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import click
from aiohttp import ClientSession, ClientTimeout, web

from sidecar.cli.decisions import row
from sidecar.cli.options import REPEATED
from sidecar.core.policy import ActionPolicy, PolicySet, RiskClass
from sidecar.serve import Sidecar
from sidecar.settings import reading as settings
from sidecar.store.verify import verify_sqlite

# Two entries of policies/actions.yaml. They are repeated here, because an installed wheel has no such folder.
# An execution holds 100,000 micro-dollars (0.10 USD) of its scope until its real cost is known.
POLICIES = PolicySet(
    revision="demo",
    actions={
        "retry_agent": ActionPolicy(risk=RiskClass.LOW, hold=100_000),
        "restart_agent": ActionPolicy(risk=RiskClass.MEDIUM, hold=100_000),
    },
)

EXECUTE = "/api/v1/recovery/execute"
SCOPE = "/api/v1/recovery/scope"
RETRY = {"incident_id": "inc_123", "action": "retry_agent"}
RESTART = {"incident_id": "inc_123", "action": "restart_agent"}
TERMS = {"max_cost_usd": 0.5, "max_attempts": 1}
GRANT = RETRY | {"intent": "Recover from hallucinated legal response"} | TERMS

RECORDS_LEFT = ("refused", "issued", "admitted", "settled", "refused", "refused")


class ExampleBackend:
    """A backend with three agents, one of them with an open incident. It does not know about scopes."""

    def __init__(self) -> None:
        self.executions: list[str] = []
        self.agents: dict[str, dict[str, str | None]] = {
            "intake": {"status": "running", "incident_id": None},
            "legal_writer": {"status": "stuck", "incident_id": "inc_123"},
            "billing": {"status": "running", "incident_id": None},
        }

    def application(self) -> web.Application:
        application = web.Application()
        application.add_routes([web.get("/api/v1/agents", self._list), web.post(EXECUTE, self._execute)])
        return application

    async def _list(self, request: web.Request) -> web.Response:
        del request
        return web.json_response({"agents": self.agents})

    async def _execute(self, request: web.Request) -> web.Response:
        asked = await request.json()
        action, incident = asked.get("action"), asked.get("incident_id")
        self.executions.append(f"{action} for {incident}")
        agent = next((name for name, each in self.agents.items() if each["incident_id"] == incident), None)
        if agent is None or action not in ("retry_agent", "restart_agent"):
            return web.json_response({"success": False, "error": "no such incident or action"}, status=404)
        self.agents[agent]["status"] = "running"
        answer = {"success": True, "action": action, "agent": agent, **self.agents[agent]}
        # The real cost of the execution. The gate settles the hold with it.
        return web.json_response(answer, headers={"X-Recovery-Cost-USD": "0.04"})


class Running(NamedTuple):
    """The addresses of a running demo, its backend and its store."""

    gate: str
    admin: str
    ops: str
    backend: str
    example: ExampleBackend
    store: Path


@asynccontextmanager
async def running() -> AsyncIterator[Running]:
    """Run the example backend with the sidecar before it, and remove their files at the end."""
    with tempfile.TemporaryDirectory(prefix="scopegate-demo-") as folder:
        store = Path(folder, "scopegate.db")
        example = ExampleBackend()
        runner = web.AppRunner(example.application(), access_log=None, shutdown_timeout=1)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            backend = f"http://127.0.0.1:{runner.addresses[0][1]}"
            sections = {name: {"listen": "127.0.0.1:0"} for name in ("data", "admin", "ops")}
            sections["store"] = {"url": f"sqlite:///{store}"}
            configured = settings.default(backend, **sections, shutdown={"drain_seconds": 2})
            async with Sidecar(configured, POLICIES) as sidecar:
                yield Running(
                    gate=f"http://{sidecar.data_address}",
                    admin=f"http://{sidecar.admin_address}",
                    ops=f"http://{sidecar.ops_address}",
                    backend=backend,
                    example=example,
                    store=store,
                )
        finally:
            await runner.cleanup()


async def demonstrate(*, once: bool) -> bool:
    """Walk through A1 to A5 and say whether all of them held, or serve until SIGINT or SIGTERM."""
    if not once:
        await serve()
        return True
    async with running() as demo:
        _introduce(demo)
        held = await Walk(demo.gate).all_steps()
        left = await _what_is_left(demo)
    well = held and left
    words = "All of A1 to A5 hold." if well else "NOT everything holds; see above."
    click.secho(f"\n{words}", bold=True, fg="green" if well else "red")
    return well


# `demo --once` ---------------------------------------------------------------------------------


class StepAnswer(NamedTuple):
    """The answer to one step."""

    status: int
    headers: Mapping[str, str]
    body: dict[str, Any]


class Walk:
    """The steps A1 to A5 in order, each with its expected answer."""

    def __init__(self, gate: str) -> None:
        self._gate = gate
        self._held: list[bool] = []

    async def all_steps(self) -> bool:
        """Send, show and check every step. True if all five held."""
        answer = await self._send("A1  Execute without a scope", EXECUTE, RETRY)
        self._expect(answer, 400, "scoped_execution_required")

        answer = await self._send("A2  Ask for a scope, and say why", SCOPE, GRANT)
        named = all(answer.body.get(name) for name in ("scope_id", "expires_at", "intent"))
        self._expect(answer, 201, "scope_id, expires_at and intent", named)
        scope = {"scope_id": answer.body.get("scope_id", "none")}

        answer = await self._send("A3  Execute with the scope", EXECUTE, {**RETRY, **scope})
        spent = answer.headers.get("Scopegate-Scope-Status") == "exhausted"
        well = spent and answer.body.get("success") is True
        self._expect(answer, 200, "the backend's own success, and the scope is exhausted", well)

        answer = await self._send("A4  Use the scope a second time", EXECUTE, {**RETRY, **scope})
        self._expect(answer, 400, "scope_exhausted")

        answer = await self._send("A5  Try another action on it", EXECUTE, {**RESTART, **scope})
        self._expect(answer, 403, "action_outside_scope")
        return len(self._held) == 5 and all(self._held)

    async def _send(self, title: str, path: str, body: dict[str, Any]) -> StepAnswer:
        click.secho(f"\n{title}", bold=True)
        click.secho(f"  > POST {path}", fg="cyan")
        _show(body, "  > ", "cyan")
        async with (
            ClientSession(timeout=ClientTimeout(total=30)) as session,
            session.post(self._gate + path, json=body) as response,
        ):
            text = await response.text()
            document = json.loads(text) if response.content_type.endswith("json") else {"text": text}
            answer = StepAnswer(response.status, response.headers, document)
            click.echo(f"  < {response.status} {response.reason}")
        for name, value in answer.headers.items():
            if name.startswith("Scopegate-") or name == "X-Recovery-Cost-USD":
                click.echo(f"  < {name}: {value}")
        repeated = REPEATED if "error" in answer.body else ()  # the status of a scope is not the answer's
        _show({name: value for name, value in answer.body.items() if name not in repeated}, "  < ")
        return answer

    def _expect(self, answer: StepAnswer, status: int, what: str, holds: bool | None = None) -> None:
        """Print whether the step passed. `what` is the expected error code, unless `holds` is given."""
        error = answer.body.get("error")
        held = answer.status == status and (error == what if holds is None else holds)
        found = "" if held else f", but it answered {answer.status} {error or 'otherwise'}"
        _verdict(held, f"expected {status}: {what}{found}")
        self._held.append(held)


async def _what_is_left(demo: Running) -> bool:
    """Print the records of the walk as the admin listener shows them, and the requests at the backend."""
    async with ClientSession() as session, session.get(f"{demo.admin}/api/v1/decisions") as response:
        records = (await response.json())["decisions"][::-1]
    click.secho("\nThe decision records that this left, oldest first", bold=True)
    click.echo(f"  {'#':<3}{'event':<10}{'outcome':<10}{'action':<15}why")
    for record in records:
        shown = row(record)
        line = "  {seq:<3}{event:<10}{outcome:<10}{action:<15}{why}".format(seq=record["seq"], **shown)
        click.echo(line.rstrip())
    events = tuple(record["event"] for record in records)
    _verdict(events == RECORDS_LEFT, f"expected {len(RECORDS_LEFT)} records: {', '.join(RECORDS_LEFT)}")
    verified = await asyncio.to_thread(verify_sqlite, demo.store)  # raises if the log was tampered with
    _verdict(True, f"their hash chain verifies, up to {verified.head.hex()[:16]}...")
    seen = demo.example.executions
    _verdict(len(seen) == 1, f"expected one call of the backend: {', '.join(seen) or 'none'}")
    return events == RECORDS_LEFT and verified.records == len(records) and len(seen) == 1


# `demo` ----------------------------------------------------------------------------------------


async def serve() -> None:
    """Print commands to try, then serve until SIGINT or SIGTERM."""
    stopping = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    async with running() as demo:
        _introduce(demo)
        click.echo(f"\nTry this in another terminal, from top to bottom.\n\n{commands(demo)}")
        click.secho("\nCtrl-C stops everything. What the gate decides shows up below.", bold=True)
        logging.getLogger("scopegate.gate").setLevel(logging.INFO)
        await stopping.wait()
    click.echo("Stopped.")


def commands(demo: Running) -> str:
    """The steps A1 to A5, and commands that show the results, as shell commands with the real addresses."""
    get = "curl -s -w '\\n'"
    scopes = f"{demo.gate}/api/v1/recovery/scopes"

    def post(path: str, body: dict[str, Any]) -> str:
        # The quotes close before $SCOPE and open again after it, so that the shell expands it.
        text = json.dumps(body).replace("$SCOPE", "'$SCOPE'")
        return f"{get} -i {demo.gate}{path} -H 'Content-Type: application/json' \\\n  -d '{text}'"

    return f"""\
# A1. Without a scope nothing is executed: 400 scoped_execution_required
{post(EXECUTE, RETRY)}

# A2. Ask for a scope, and say why: 201. The shell keeps its scope_id for what follows
ANSWER=$({post(SCOPE, GRANT)})
printf '%s\\n' "$ANSWER"; SCOPE=$(printf %s "$ANSWER" | grep -oE 'scope_[0-9a-f]{{24,}}')

# A3. With the scope it is executed: 200, and Scopegate-Scope-Status says exhausted
{post(EXECUTE, RETRY | {"scope_id": "$SCOPE"})}

# A4. A scope for one attempt works once: 400 scope_exhausted
{post(EXECUTE, RETRY | {"scope_id": "$SCOPE"})}

# A5. And only for the actions that it lists: 403 action_outside_scope
{post(EXECUTE, RESTART | {"scope_id": "$SCOPE"})}

# The scopes of the incident; and how one is revoked
{get} {scopes}/inc_123
{get} -X DELETE {scopes}/$SCOPE

# Everything else passes through untouched
{get} {demo.gate}/api/v1/agents

# admin: what was decided, newest first, and how the executions ended
{get} {demo.admin}/api/v1/decisions | python3 -m json.tool
{get} {demo.admin}/api/v1/executions | python3 -m json.tool

# ops: is it ready, and how is it faring
{get} {demo.ops}/health/ready
{get} {demo.ops}/metrics | grep scopegate_decisions_total"""


def _introduce(demo: Running) -> None:
    click.echo("Scopegate: ", nl=False)
    click.secho("a recovery action without a valid execution scope is invalid by definition.", bold=True)
    click.echo(f"""
  gate     {demo.gate}   what clients talk to: it judges, records and forwards
  admin    {demo.admin}   what operators talk to: decisions and executions
  ops      {demo.ops}   what the platform talks to: readiness and metrics
  backend  {demo.backend}   the example: it executes every request""")


def _show(body: dict[str, Any], prefix: str, colour: str | None = None) -> None:
    for line in json.dumps(body, indent=2, ensure_ascii=False).splitlines():
        click.secho(prefix + line, fg=colour)


def _verdict(held: bool, words: str) -> None:
    plain = "utf" not in (sys.stdout.encoding or "").lower()
    mark = ("ok" if held else "FAILED") if plain else ("✓" if held else "✗")
    click.secho(f"  {mark} {words}", fg="green" if held else "red")
