"""`scopegate explain`: would this be let through, and if not, why, and what to do. Asks; changes nothing."""

from __future__ import annotations

import http.client
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlencode

import click

from sidecar.cli.options import FAILED, UNREACHABLE, load_settings, misconfigured, set_option
from sidecar.core.facts import is_identifier
from sidecar.settings import Listen, Settings
from sidecar.yamlfile import shown

PATH = "/api/v1/explain"
TIMEOUT_SECONDS = 5.0
# Far above any answer; what is longer is of something else.
MAX_ANSWER_BYTES = 1 << 20


@click.command(
    epilog="""\b
Examples:
  scopegate explain --config config/scopegate.yaml body.json
  scopegate explain --config config/scopegate.yaml '{"incident_id": "inc_1", "action": "restart_pod"}'
  scopegate explain --admin 127.0.0.1:9901 --action restart_pod --incident-id inc_1 --scope-id scope_...
  scopegate explain --config config/scopegate.yaml --route '**/recovery/execute' --tenant acme body.json"""
)
@click.option(
    "--config",
    "config",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="The configuration file (YAML); its admin.listen is asked.",
)
@set_option
@click.option(
    "--admin", metavar="HOST:PORT", help="The admin listener to ask, instead of the configuration's."
)
@click.option(
    "--route",
    metavar="PATH",
    help="The gated route that is asked about, by its path in gate.routes.  [default: the first in enforce "
    "mode, else the first]",
)
@click.option(
    "--tenant", metavar="NAME", help="Whose execution it is; sent as the configuration's gate.tenant_header."
)
@click.option("--action", metavar="NAME", help="Instead of a body: the action,")
@click.option("--incident-id", metavar="ID", help="the incident,")
@click.option("--scope-id", metavar="ID", help="and the scope, if there is one.")
@click.option("--json", "as_json", is_flag=True, help="The answer as it came.")
@click.argument("body", required=False)
def explain(
    config: Path | None,
    overrides: tuple[str, ...],
    admin: str | None,
    route: str | None,
    tenant: str | None,
    action: str | None,
    incident_id: str | None,
    scope_id: str | None,
    body: str | None,
    *,
    as_json: bool,
) -> None:
    """Ask a running sidecar whether it would let an execution through, and why not.

    BODY is what would be sent to the execute endpoint: a file, JSON text, or - for standard input. The answer
    names the route that judges it. Nothing is consumed or recorded. Exit code 0: allowed, 1: refused, 3: no
    sidecar answers.
    """
    members = {"scope_id": scope_id, "incident_id": incident_id, "action": action}
    asked = _body(body, {name: value for name, value in members.items() if value is not None})
    settings = None if config is None else load_settings(config, overrides, read_keys=False)
    address = _address(settings, admin)
    answer, text = _ask(address, asked, route, _tenant(settings, tenant))
    for line in [text] if as_json else _told(answer):
        click.echo(line)
    sys.exit(0 if answer["allowed"] else FAILED)


# Asking -------------------------------------------------------------------------------------------------


def _body(given: str | None, members: dict[str, str]) -> bytes:
    """What is asked about, as bytes: the sidecar judges them as they are."""
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


def _address(settings: Settings | None, admin: str | None) -> Listen:
    if admin is not None:
        try:
            address = Listen.parse(admin.removeprefix("http://").rstrip("/"))
        except ValueError as exc:
            raise click.BadParameter(str(exc), param_hint="--admin") from exc
        if not address.is_loopback():
            raise click.BadParameter("only a sidecar on this host is asked", param_hint="--admin")
    elif settings is not None:
        address = settings.admin.listen
    else:
        raise click.UsageError("give --config FILE, or --admin HOST:PORT")
    if address.port == 0:
        misconfigured("admin.listen has port 0, which is any free port; name the real one with --admin")
    return address


def _tenant(settings: Settings | None, tenant: str | None) -> dict[str, bytes]:
    """The header that names the tenant, where the configuration has one."""
    if tenant is not None and not is_identifier(tenant):
        raise click.BadParameter("must be 1 to 256 printable characters", param_hint="--tenant")
    if settings is None:
        if tenant is not None:
            raise click.UsageError("give --config FILE with --tenant; it has the header that names it")
        return {}
    header = settings.gate.tenant_header
    if header is None and tenant is not None:
        misconfigured("the configuration has no gate.tenant_header, so there are no tenants; omit --tenant")
    if header is not None and tenant is None:
        misconfigured(f"gate.tenant_header is {header}: each execution is a tenant's; name it with --tenant")
    return {} if header is None or tenant is None else {header: tenant.encode()}


def _ask(
    address: Listen, body: bytes, route: str | None, tenant: dict[str, bytes]
) -> tuple[dict[str, Any], str]:
    path = PATH if route is None else f"{PATH}?{urlencode({'route': route}, errors='surrogateescape')}"
    connection = http.client.HTTPConnection(address.host, address.port, timeout=TIMEOUT_SECONDS)
    try:
        connection.request("POST", path, body, {"Content-Type": "application/json", **tenant})
        response = connection.getresponse()
        text = response.read(MAX_ANSWER_BYTES).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException) as exc:
        reason = f"not within {TIMEOUT_SECONDS:g} s" if isinstance(exc, TimeoutError) else exc
        _unreachable(
            f"no sidecar answers on {address} ({reason}); is it running, and is this its admin.listen?"
        )
    finally:
        connection.close()
    try:
        answer = json.loads(text)
    except ValueError:
        answer = None
    if not isinstance(answer, dict) or not isinstance(answer.get("allowed"), bool):
        problem = answer.get("message", answer.get("detail")) if isinstance(answer, dict) else None
        if route is not None and problem and answer.get("error") == "invalid_request":
            misconfigured(f"--route: {address} answers: {problem}")
        said = (
            f"{response.status}: {problem}" if problem else f"{response.status}, and not as a sidecar would"
        )
        _unreachable(f"{address} answers {said}; is this its admin.listen?")
    return answer, text


def _unreachable(message: str) -> NoReturn:
    click.echo(f"scopegate: {message}", err=True)
    sys.exit(UNREACHABLE)


# Telling ------------------------------------------------------------------------------------------------


def _told(answer: dict[str, Any]) -> Iterator[str]:
    """The answer in lines for people."""
    said = answer["message"] if answer["error"] is None else f"{answer['error']}: {answer['message']}"
    yield _line("allowed" if answer["allowed"] else "refused", said)
    yield _line("next", answer["next"])
    yield _line("route", answer["route"])
    if answer["rules"]:
        yield _line("rules", ", ".join(answer["rules"]))
    if answer["bound"]:
        yield _line("bound", answer["bound"])
    scope, left = answer["scope"], answer["left"]
    if scope is not None:
        yield _line("scope", f"{scope['scope_id']} for {scope['incident_id']}, {scope['status']}")
    elif not answer["scope_required"]:
        yield _line("scope", "none is needed")
    if left is not None:
        dollars, seconds = f"{left['cost_usd']:.12g} USD", f"{left['seconds']:.0f} s"
        yield _line("left", f"{left['attempts']} attempts, {dollars}, {seconds}")
    yield _line("hold", f"{answer['hold_usd']:.12g} USD until the cost is known")
    for index, brake in enumerate(answer["brakes"]):
        yield _line("" if index else "brakes", _brake(brake))
    for index, one in enumerate(answer["would_refuse"]):
        by = one["rule"] or "(route)"
        yield _line("" if index else "in shadow", f"{by}: {one['error']}: {one['message']}")
    yield _line("policies", f"revision {answer['policy_revision'] or 'none'}")


def _brake(brake: dict[str, Any]) -> str:
    """How far it is used, and until when it holds."""
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


def _line(label: str, text: str) -> str:
    return f"{label:<10} {shown(str(text), 2_000)}"
