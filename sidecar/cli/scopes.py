"""`scopegate scopes`: ask for an execution scope, look at scopes, revoke one."""

from __future__ import annotations

import getpass
import re
from collections.abc import Iterator
from typing import Any, get_args

import click

from sidecar.cli.calling import Listener, within
from sidecar.cli.executions import row as execution_row
from sidecar.cli.lists import before_option, limit_option, name, pages, tell_of_more, tenant_option, usd
from sidecar.cli.options import Access, asks, json_option, tell
from sidecar.cli.tables import age, dollars, lines, moment, table, when
from sidecar.core.scope import ScopeStatus

CREATE = "/api/v1/recovery/scope"
REVOKE = "/api/v1/recovery/scopes/"

_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3_600}


def duration(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """Seconds, or minutes and hours with their unit."""
    del ctx, param
    if value is None:
        return None
    found = re.fullmatch(r"([0-9]{1,9})([smh]?)", value)
    if found is None:
        raise click.BadParameter(f"{value!r} is no number of seconds, and no 90s, 5m or 1h")
    return int(found[1]) * _SECONDS[found[2]]


@click.group(
    epilog="""\b
Examples:
  scopegate scopes list --config config/scopegate.yaml --status active
  scopegate scopes show scope_... --config config/scopegate.yaml"""
)
def scopes() -> None:
    """Execution scopes: ask for one, look at them, revoke one."""


# Asking for one -------------------------------------------------------------------------------------


@scopes.command(
    epilog="""\b
Examples:
  scopegate scopes create --config config/scopegate.yaml \\
    --incident-id inc_123 --action restart_pod --intent 'The pod does not answer'
  scopegate scopes create --admin 127.0.0.1:9901 --incident-id inc_123 --action retry_agent \\
    --action restart_pod --intent 'Recover the agent' --max-attempts 2 --ttl 5m --max-cost-usd 0.50
  SCOPE=$(scopegate scopes create -q --config config/scopegate.yaml --incident-id inc_123 \\
    --action retry_agent --intent 'Recover the agent')"""
)
@asks("admin")
@click.option("--incident-id", required=True, metavar="ID", help="The only incident that it is for.")
@click.option(
    "--action",
    "actions",
    required=True,
    multiple=True,
    metavar="NAME",
    help="What it allows. May be repeated.",
)
@click.option("--intent", required=True, metavar="TEXT", help="Why: it stands in the record of the grant.")
@click.option("--max-attempts", type=int, metavar="N", help="How many executions.")
@click.option("--ttl", callback=duration, metavar="TIME", help="For how long: seconds, or 5m, or 1h.")
@click.option("--max-cost-usd", callback=usd, metavar="X", help="What its executions may cost together.")
@click.option(
    "--target-agent",
    "target_agents",
    multiple=True,
    metavar="ID",
    help="The only agent that may be acted on; without it any. May be repeated.",
)
@click.option("--created-by", metavar="NAME", help="Who asks.  [default: the login name]")
@click.option(
    "--tenant", metavar="NAME", help="Whose scope it is; sent as the configuration's gate.tenant_header."
)
@click.option("--quiet", "-q", is_flag=True, help="Print the scope_id only.")
@json_option
def create(
    sidecar: Access,
    actions: tuple[str, ...],
    ttl: int | None,
    target_agents: tuple[str, ...],
    created_by: str | None,
    tenant: str | None,
    *,
    quiet: bool,
    as_json: bool,
    **terms: Any,
) -> None:
    """Ask for a scope. What is left out gets the configuration's default."""
    header = sidecar.tenant_header(tenant)
    body = {
        **terms,
        "allowed_actions": list(actions),
        "ttl_seconds": ttl,
        "target_agents": list(target_agents),
        "created_by": created_by or _login(),
    }
    wanted = {name: value for name, value in body.items() if value is not None}
    answer = _issuer(sidecar).ask("POST", CREATE, wanted, header)
    if quiet:
        click.echo(answer.body["scope_id"])
    elif as_json:
        tell(answer.body)
    else:
        lines([*_told(answer.body), ("decision", answer.decision_id)])


def _login() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a user without a name, as in many containers
        return "cli"


def _issuer(sidecar: Access) -> Listener:
    """The listener that issues and revokes scopes, as the sidecar itself says."""
    told = sidecar.listener.get("/api/v1/status")
    on, listeners = told.body.get("scopes_served_on"), told.body.get("listeners")
    if on == "admin":
        return sidecar.listener
    if not isinstance(on, str) or not isinstance(listeners, dict) or not isinstance(listeners.get(on), str):
        raise sidecar.listener.stranger(told.status)
    return sidecar.beside(on, listeners[on])


# Looking --------------------------------------------------------------------------------------------


@scopes.command(
    "list",
    epilog="""\b
Examples:
  scopegate scopes list --config config/scopegate.yaml
  scopegate scopes list --admin 127.0.0.1:9901 --incident-id inc_123 --status active --json""",
)
@asks("admin")
@click.option("--incident-id", metavar="ID", help="Only those of this incident.")
@click.option("--status", type=click.Choice(get_args(ScopeStatus)), help="Only those that stand so now.")
@tenant_option
@limit_option
@before_option
@json_option
def list_(
    sidecar: Access,
    incident_id: str | None,
    status: str | None,
    tenant: str | None,
    limit: int,
    before: str | None,
    *,
    as_json: bool,
) -> None:
    """List scopes, newest first, of all incidents and tenants. Looking consumes nothing."""
    found = pages(
        sidecar.listener,
        "/api/v1/scopes",
        "scopes",
        limit,
        before,
        incident_id=incident_id,
        status=status,
        tenant_id=tenant,
    )
    if as_json:
        tell(found)
        return
    table([_row(scope) for scope in found["scopes"]], "There is no such scope.")
    tell_of_more(found)


@scopes.command(
    epilog="""\b
Examples:
  scopegate scopes show scope_... --config config/scopegate.yaml
  scopegate scopes show scope_... --admin 127.0.0.1:9901 --json"""
)
@asks("admin")
@click.argument("scope_id", callback=name)
@json_option
def show(sidecar: Access, scope_id: str, *, as_json: bool) -> None:
    """One scope: its terms, what is left of it, and the executions that it admitted."""
    scope = sidecar.listener.get(f"/api/v1/scopes/{within(scope_id)}").body
    if as_json:
        tell(scope)
        return
    lines(_told(scope))
    if scope["executions"]:
        click.echo()
    admitted = [{**execution_row(one), "scope": ""} for one in scope["executions"]]
    table(admitted, "It has admitted nothing.")


@scopes.command(
    epilog="""\b
Examples:
  scopegate scopes revoke scope_... --config config/scopegate.yaml
  scopegate scopes revoke scope_... --admin 127.0.0.1:9901"""
)
@asks("admin")
@click.argument("scope_id", callback=name)
@click.option("--tenant", metavar="NAME", help="Whose scope it is, where the configuration has tenants.")
@json_option
def revoke(sidecar: Access, scope_id: str, tenant: str | None, *, as_json: bool) -> None:
    """Revoke a scope: nothing is admitted on it once this has answered. Can be repeated."""
    header = sidecar.tenant_header(tenant)
    answer = _issuer(sidecar).ask("DELETE", REVOKE + within(scope_id), headers=header)
    if as_json:
        tell(answer.body)
        return
    scope = sidecar.listener.get(f"/api/v1/scopes/{within(scope_id)}").body
    lines([*_told(scope, "revoked"), ("decision", answer.decision_id)])


def _told(scope: dict[str, Any], what: str = "scope") -> Iterator[tuple[str, object]]:
    """A scope in lines for people."""
    yield what, scope["scope_id"]
    yield "status", scope["status"]
    yield "incident", scope["incident_id"]
    yield "actions", ", ".join(scope["allowed_actions"])
    yield "intent", scope["intent"]
    yield "agents", ", ".join(scope["target_agents"]) or "any"
    yield "attempts", f"{scope['attempts_remaining']} of {scope['max_attempts']} left"
    used, most = scope.get("cost_used_usd", 0), scope["max_cost_usd"]
    yield "cost", f"{dollars(max(0, most - used))} of {dollars(most)} USD left"
    yield "created", when(scope.get("created_at"))
    yield "expires", when(scope["expires_at"])
    yield "by", scope["created_by"]
    tenant = scope.get("tenant_id", "default")
    yield "tenant", tenant if tenant != "default" else ""


def _row(scope: dict[str, Any]) -> dict[str, str]:
    tenant = scope["tenant_id"]
    return {
        "scope": scope["scope_id"],
        "status": scope["status"],
        "incident": scope["incident_id"],
        "tenant": tenant if tenant != "default" else "",
        "actions": ",".join(scope["allowed_actions"]),
        "attempts": f"{scope['attempts_used']}/{scope['max_attempts']}",
        "cost usd": f"{dollars(scope['cost_used_usd'])}/{dollars(scope['max_cost_usd'])}",
        "created": moment(scope["created_at"]),
        "expires": age(scope["expires_at"]),
        "by": scope["created_by"],
        "intent": scope["intent"],
    }
