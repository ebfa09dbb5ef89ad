"""`scopegate explain`: says whether a request would be admitted, and if not, why and what to do. It changes
nothing."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import click

from sidecar.cli.access import Access, asks
from sidecar.cli.client import Caller, ProblemError
from sidecar.cli.options import FAILED, answered, json_option, misconfigured
from sidecar.cli.scopeids import whole_id
from sidecar.files.faults import shown
from sidecar.web.wire import answers

PATH = "/api/v1/explain"


@click.command(
    epilog="""\b
Examples:
  scopegate explain --config config/scopegate.yaml --action restart_pod --incident-id inc_123
  scopegate explain --admin 127.0.0.1:9901 --scope-id scope_... --incident-id inc_123 --action restart_pod
  scopegate explain --admin 127.0.0.1:9901 --route '**/recovery/execute' --action retry_agent
  scopegate explain --config config/scopegate.yaml '{"incident_id": "inc_123", "action": "restart_pod"}'
  echo '{"incident_id": "inc_123", "action": "retry_agent"}' | scopegate explain --admin 127.0.0.1:9901 -"""
)
@asks("admin")
@click.option(
    "--route",
    metavar="NAME",
    help="The gated route, by its name in gate.routes, or by its path if it has no name.  [default: the "
    "first route in enforce mode, else the first route]",
)
@click.option("--tenant", metavar="NAME", help="The tenant; sent in the header gate.tenant_header.")
@click.option("--action", metavar="NAME", help="The action, instead of BODY.")
@click.option("--incident-id", metavar="ID", help="The incident, instead of BODY.")
@click.option("--scope-id", metavar="ID", help="The scope, or the beginning of its id, instead of BODY.")
@json_option
@click.argument("body", required=False)
def explain(
    sidecar: Access,
    route: str | None,
    tenant: str | None,
    action: str | None,
    incident_id: str | None,
    scope_id: str | None,
    body: str | None,
    *,
    as_json: bool,
) -> None:
    """Ask a running sidecar whether it would admit an execution, and if not, why.

    BODY is the request body of the execution: a file, JSON text, or - for standard input. The answer names
    the route that judges the request. Nothing is consumed or recorded. Exit code 0: allowed, 1: refused, 3:
    no sidecar answers.
    """
    header = sidecar.tenant_header(tenant)
    if scope_id is not None and body is None:
        scope_id = whole_id(sidecar.listener, scope_id, tenant)
    members = {"scope_id": scope_id, "incident_id": incident_id, "action": action}
    asked = _body(body, {name: value for name, value in members.items() if value is not None})
    answer = _ask(sidecar.listener, asked, route, header)
    answered(answer, as_json, _described(answer))
    sys.exit(0 if answer["allowed"] else FAILED)


# Asking -------------------------------------------------------------------------------------------------


def _body(given: str | None, members: dict[str, str]) -> bytes:
    """The request body as bytes. The sidecar judges them unchanged."""
    if (given is None) == (not members):
        raise click.UsageError("give a body, or --action, --incident-id and --scope-id instead of one")
    if given is None:
        return json.dumps(members).encode()
    if given.lstrip().startswith("{"):
        return given.encode("utf-8", "surrogateescape")
    if given == "-":
        return sys.stdin.buffer.read()
    try:
        return Path(given).read_bytes()
    except (OSError, ValueError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc)
        misconfigured(f"{given}: cannot be read ({reason}); give a file, JSON text, or - for standard input")


def _ask(listener: Caller, body: bytes, route: str | None, tenant: dict[str, bytes]) -> dict[str, Any]:
    path = PATH if route is None else f"{PATH}?{urlencode({'route': route}, errors='surrogateescape')}"
    try:
        return listener.ask("POST", path, answers.Explanation, body, tenant).body
    except ProblemError as exc:
        if route is not None and exc.body["error"] == "invalid_request":
            misconfigured(f"--route: {listener.place} answers: {shown(exc.body['message'], 2_000)}")
        if exc.status in (401, 403):
            raise
        raise listener.stranger(exc.status, exc.body) from exc  # otherwise, a sidecar explains every request


# Describing ---------------------------------------------------------------------------------------------


def _described(answer: dict[str, Any]) -> Iterator[tuple[str, object]]:
    """The labelled lines of the answer."""
    said = answer["message"] if answer["error"] is None else f"{answer['error']}: {answer['message']}"
    yield "allowed" if answer["allowed"] else "refused", said
    yield "next", answer["next"]
    yield "route", answer["route"]
    yield "rules", ", ".join(answer["rules"])
    yield "bound", answer["bound"]
    scope, left = answer["scope"], answer["left"]
    if scope is not None:
        yield "scope", f"{scope['scope_id']} for {scope['incident_id']}, {scope['status']}"
    elif not answer["scope_required"]:
        yield "scope", "none is needed"
    if left is not None:
        dollars, seconds = f"{left['cost_usd']:.12g} USD", f"{left['seconds']:.0f} s"
        attempts = "1 attempt" if left["attempts"] == 1 else f"{left['attempts']} attempts"
        yield "left", f"{attempts}, {dollars}, {seconds}"
    yield "hold", f"{answer['hold_usd']:.12g} USD until the cost is known"
    for index, brake in enumerate(answer["brakes"]):
        yield "" if index else "brakes", _brake(brake)
    for index, one in enumerate(answer["would_refuse"]):
        by = one["rule"] or "(route)"
        yield "" if index else "in shadow", f"{by}: {one['error']}: {one['message']}"
    yield "policies", f"revision {answer['policy_revision'] or 'none'}"


def _brake(brake: dict[str, Any]) -> str:
    """How much of a brake is used, and until when it holds."""
    counted = ", ".join(f"{facet} {_value(value)}" for facet, value in brake["per"].items()) or "all together"
    most = "" if brake["max_attempts"] is None else f" of {brake['max_attempts']}"
    window = f" in {brake['window_seconds']} s" if brake["window_seconds"] else ""
    holds = ""
    if brake["holds"]:
        holds = f"; holds until {brake['ends_at'] or 'the execution that is in flight has ended'}"
    shadow = ", in shadow" if brake["mode"] == "shadow" else ""
    return f"{brake['rule']} ({counted}){shadow}: {brake['used']}{most} used{window}{holds}"


def _value(value: Any) -> str:
    return ",".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
