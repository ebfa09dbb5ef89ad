"""`scopegate scopes`: request an execution scope, show scopes, revoke one or all of them.

A scope counts as revoked when the log of the admin listener has its revocation. The status is not enough,
because an exhausted scope is still shown as exhausted after it is revoked.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Annotated, Any, get_args

import click

from sidecar.cli.access import Access, asks
from sidecar.cli.client import (
    Caller,
    CallResult,
    ProblemError,
    UncertainError,
    UnreachableError,
    within,
)
from sidecar.cli.decisions import PATH as DECISIONS
from sidecar.cli.executions import row as execution_row
from sidecar.cli.lists import (
    duration,
    identifier,
    incident_option,
    listing,
    name,
    only,
    pages,
    tenant_option,
    usd,
)
from sidecar.cli.options import FAILED, answered, ended, json_option, login_name, progress_bar, tell
from sidecar.cli.scopeids import SCOPES, whole_id
from sidecar.cli.tables import Verbatim, age, cell, dollars, lines, moment, table, when
from sidecar.core.scope import ScopeStatus
from sidecar.web.wire import answers
from sidecar.web.wire.forms import LATER, Dollars, Time

CREATE = "/api/v1/recovery/scope"


class Grant(answers.GrantedScope):
    """A granted scope. Another version may answer with more members of a scope, and these are shown, too."""

    tenant_id: Annotated[str, LATER]
    created_at: Annotated[Time, LATER]
    cost_used_usd: Annotated[Dollars, LATER]


data_option = click.option(
    "--data",
    metavar="ADDRESS",
    help="The address of the same sidecar's data listener, written like --admin. Needed with --admin if the "
    "data listener serves scopes, because the sidecar does not know how this host reaches it.",
)


@click.group(
    epilog="""\b
Examples:
  scopegate scopes list --config config/scopegate.yaml --status active
  scopegate scopes show scope_... --config config/scopegate.yaml"""
)
def scopes() -> None:
    """Execution scopes: create one, list and show them, revoke one or all."""


# Creating one ---------------------------------------------------------------------------------------


@scopes.command(
    epilog="""\b
Examples:
  scopegate scopes create --config config/scopegate.yaml \\
    --incident-id inc_123 --action restart_pod --intent 'The pod does not answer'
  scopegate scopes create --admin 127.0.0.1:9901 --data 127.0.0.1:8000 \\
    --incident-id inc_123 --action retry_agent --action restart_pod \\
    --intent 'Recover the agent' --max-attempts 2 --ttl 5m --max-cost-usd 0.50
  SCOPE=$(scopegate scopes create -q --config config/scopegate.yaml --incident-id inc_123 \\
    --action retry_agent --intent 'Recover the agent')"""
)
@asks("admin")
@click.option("--incident-id", required=True, metavar="ID", help="The incident that the scope is for.")
@click.option(
    "--action",
    "actions",
    required=True,
    multiple=True,
    metavar="NAME",
    help="An action that the scope allows; repeatable.",
)
@click.option(
    "--intent", required=True, metavar="TEXT", help="Why the actions are needed; the record keeps it."
)
@click.option("--max-attempts", type=int, metavar="N", help="The most executions.")
@click.option(
    "--ttl",
    callback=duration,
    metavar="TIME",
    help="How long the scope is valid: seconds, or 5m, 2h or 1d. The least is 60 seconds.",
)
@click.option(
    "--max-cost-usd", callback=usd, metavar="X", help="The most that all executions may cost together."
)
@click.option(
    "--target-agent",
    "target_agents",
    multiple=True,
    metavar="ID",
    help="An agent that the actions may target; repeatable.  [default: any agent]",
)
@click.option("--created-by", metavar="NAME", help="Who creates the scope.  [default: the login name]")
@click.option("--tenant", metavar="NAME", help="The tenant; sent in the header gate.tenant_header.")
@data_option
@click.option("--quiet", "-q", is_flag=True, help="Print the scope_id only.")
@json_option
def create(
    sidecar: Access,
    actions: tuple[str, ...],
    ttl: int | None,
    target_agents: tuple[str, ...],
    created_by: str | None,
    tenant: str | None,
    data: str | None,
    *,
    quiet: bool,
    as_json: bool,
    **terms: Any,
) -> None:
    """Create a scope. Limits that are not given have the configuration's defaults."""
    if quiet and as_json:
        raise click.UsageError("give --quiet or --json, not both")
    header = sidecar.tenant_header(tenant)
    body = {
        **terms,
        "allowed_actions": list(actions),
        "ttl_seconds": ttl,
        "target_agents": list(target_agents),
        "created_by": created_by or login_name(),
    }
    wanted = {name: value for name, value in body.items() if value is not None}
    issuer = _issuer(sidecar, data)
    look = f"scopegate scopes list --incident-id {shlex.quote(terms['incident_id'])}"
    answer = issuer.ask("POST", CREATE, Grant, wanted, header, look=look)
    if issuer is not sidecar.listener:
        _check_known(sidecar.listener, issuer, answer, header)
    if quiet:
        click.echo(answer.body["scope_id"])
    else:
        scope = {**answer.body, "scope_id": Verbatim(answer.body["scope_id"])}
        answered(answer.body, as_json, [*_described(scope), ("decision", answer.decision_id)])


def _issuer(sidecar: Access, data: str | None) -> Caller:
    """The listener that issues and revokes scopes. The sidecar says which one it is; `data` or the
    configuration gives its address."""
    status = sidecar.listener.get("/api/v1/status", answers.Status)
    on = status.body.get("scopes_served_on")
    if on == "admin":
        return sidecar.listener
    if on != "data":
        raise sidecar.listener.stranger(status.status, odd="scopes_served_on")
    return sidecar.beside("data", data)


def _check_known(admin: Caller, issuer: Caller, granted: CallResult, header: dict[str, bytes]) -> None:
    """Check that the admin listener knows the new scope. If not, the scope belongs to another sidecar, so it
    is revoked at its issuer."""
    scope_id = granted.body["scope_id"]
    try:
        admin.get(f"{SCOPES}/{within(scope_id)}", answers.SpentScope)
    except (ProblemError, UnreachableError) as exc:
        if not isinstance(exc, ProblemError) or exc.body["error"] != "scope_not_found":
            ended(FAILED, f"{scope_id} was made on {issuer.place}, but cannot be read back: {exc}")
        what = "was revoked again"
        try:
            issuer.ask("DELETE", REVOKE + within(scope_id), answers.Revocation, headers=header, look="")
        except (ProblemError, UnreachableError, UncertainError) as failure:
            what = f"could not be revoked again ({failure})"
        found = f"{scope_id} was made on the first, which the second does not know, and {what}"
        ended(FAILED, str(DifferentSidecarsError(admin, issuer, found)))


# Looking --------------------------------------------------------------------------------------------


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
    """Show one scope: its limits, how much of them is left, and the executions that it admitted. SCOPE_ID may
    be its beginning, as tables and logs show it."""
    scope_id = whole_id(sidecar.listener, scope_id)
    scope = sidecar.listener.get(f"{SCOPES}/{within(scope_id)}", answers.SpentScope).body
    answered(scope, as_json, _described(scope))
    if not as_json:
        if scope["executions"]:
            click.echo()
        admitted = [{**execution_row(one), "scope": ""} for one in scope["executions"]]
        table(admitted, "It has admitted nothing.")


# Revoking ---------------------------------------------------------------------------------------------------


@scopes.command(
    epilog="""\b
Examples:
  scopegate scopes revoke scope_... --config config/scopegate.yaml
  scopegate scopes revoke scope_... --admin 127.0.0.1:9901 --data 127.0.0.1:8000
  scopegate scopes revoke --all --yes --config config/scopegate.yaml
  scopegate scopes revoke --all --incident-id inc_123 --yes --config config/scopegate.yaml"""
)
@asks("admin")
@click.argument("scope_id", required=False, callback=name)
@click.option(
    "--all",
    "every",
    is_flag=True,
    help="Instead of SCOPE_ID: every scope that is neither expired nor revoked.",
)
@click.option(
    "--incident-id", callback=identifier, metavar="ID", help="With --all: only scopes of this incident."
)
@click.option(
    "--tenant",
    metavar="NAME",
    help="The tenant of the scope, if the configuration has tenants. With --all: only this tenant's.",
)
@data_option
@click.option(
    "--yes", is_flag=True, help="With --all: do not ask for confirmation. Required without a terminal."
)
@json_option
def revoke(
    sidecar: Access,
    scope_id: str | None,
    incident_id: str | None,
    tenant: str | None,
    data: str | None,
    *,
    every: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Revoke a scope. Once this command has ended, the scope admits nothing. It can be repeated. SCOPE_ID may
    be its beginning, as tables and logs show it.

    With --all, revoke every scope that has neither expired nor been revoked, of all incidents and tenants:
    after a restored backup, or when recovery itself does harm. Exhausted scopes are revoked as well, because
    an execution that is reconciled as not_executed gives its attempt back. Scopes that are issued meanwhile
    are revoked too. Executions in flight continue. Exit code 1: some could not be revoked; they are named.
    """
    if every == (scope_id is not None):
        raise click.UsageError("give SCOPE_ID, or --all instead of it")
    if scope_id is not None:
        if incident_id is not None or yes:
            raise click.UsageError("--incident-id and --yes go with --all; SCOPE_ID names one scope")
        _revoke_one(sidecar, scope_id, tenant, data, as_json=as_json)
        return
    if not yes and not sys.stdin.isatty():
        raise click.UsageError("give --yes with --all, because there is no terminal to ask for confirmation")
    if tenant is not None:
        sidecar.tenant_header(tenant)
    filters = {"incident_id": incident_id, "tenant_id": tenant}
    sweep = Sweep(sidecar=sidecar, issuer=_issuer(sidecar, data), filters=filters)
    revoke_all(sweep, sure=yes, as_json=as_json)


def _revoke_one(
    sidecar: Access, scope_id: str, tenant: str | None, data: str | None, *, as_json: bool
) -> None:
    header = sidecar.tenant_header(tenant)
    scope_id = whole_id(sidecar.listener, scope_id, tenant)
    path = f"{SCOPES}/{within(scope_id)}"
    # This read ends the command for an unknown scope, before anything is revoked.
    sidecar.listener.get(path, answers.SpentScope)
    try:
        answer = withdraw(sidecar.listener, _issuer(sidecar, data), scope_id, header)
    except DifferentSidecarsError as exc:
        ended(FAILED, str(exc))
    if as_json:
        tell(answer.body)
        return
    scope = sidecar.listener.get(path, answers.SpentScope).body
    lines([*_described(scope, "revoked"), ("decision", answer.decision_id)])


def _described(scope: dict[str, Any], what: str = "scope") -> Iterator[tuple[str, object]]:
    """The labelled lines of a scope."""
    yield what, scope["scope_id"]
    yield "status", scope["status"]
    yield "incident", scope["incident_id"]
    yield "actions", ", ".join(scope["allowed_actions"])
    yield "intent", scope["intent"]
    yield "agents", ", ".join(scope["target_agents"]) or "any"
    yield "attempts", f"{scope['attempts_remaining']} of {scope['max_attempts']} left"
    used, most = scope.get("cost_used_usd") or 0, scope["max_cost_usd"]
    yield "cost", f"{dollars(max(0, most - used))} of {dollars(most)} USD left"
    yield "created", when(scope.get("created_at"))
    yield "expires", when(scope["expires_at"])
    yield "by", scope["created_by"]
    tenant = scope.get("tenant_id")
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


listing(
    scopes,
    SCOPES,
    "scopes",
    answers.ScopePage,
    _row,
    incident_option,
    only("--status", "those with this status now", values=get_args(ScopeStatus)),
    tenant_option,
    help="List scopes, newest first, of all incidents and tenants. Listing consumes nothing.",
    examples="""\b
Examples:
  scopegate scopes list --config config/scopegate.yaml
  scopegate scopes list --admin 127.0.0.1:9901 --incident-id inc_123 --status active --json""",
)

REVOKE = "/api/v1/recovery/scopes/"
# The passes are limited, because clients that keep requesting scopes would make the sweep endless.
PASSES = 20
# A progress bar is shown from this many scopes on, because it would only flicker for fewer.
MANY = 20
# A pass lists active scopes twice, because an exhausted scope may become active between the first two lists.
LOOKS = ("active", "exhausted", "active")


class DifferentSidecarsError(Exception):
    """The listener that issues scopes and the admin listener belong to different sidecars."""

    def __init__(self, admin: Caller, issuer: Caller, found: str) -> None:
        super().__init__(
            f"{issuer.place} (data) and {admin.place} (admin) are of different sidecars: {found}; "
            "give --data, or data.listen in the configuration, as this host reaches the same one"
        )


def withdraw(admin: Caller, issuer: Caller, scope_id: str, header: dict[str, bytes]) -> CallResult:
    """Revoke one scope. Raises the errors of `Caller.ask`, and DifferentSidecarsError."""
    look = f"scopegate decisions list --scope-id {shlex.quote(scope_id)} --event revoked"
    try:
        answer = issuer.ask(
            "DELETE", REVOKE + within(scope_id), answers.Revocation, headers=header, look=look
        )
    except ProblemError as exc:
        if issuer is admin or exc.body["error"] != "scope_not_found":
            raise
        found = f"the first does not know {scope_id}, which the second does (or it is another tenant's)"
        raise DifferentSidecarsError(admin, issuer, found) from exc
    if issuer is not admin and not is_revoked(admin, scope_id):
        found = f"the first says that {scope_id} is revoked, and the second does not know of it"
        raise DifferentSidecarsError(admin, issuer, found)
    return answer


def is_revoked(admin: Caller, scope_id: str) -> bool:
    """Whether the log holds the revocation of a scope. The status of the scope does not matter."""
    return bool(
        pages(
            admin, DECISIONS, "decisions", answers.DecisionList, 1, None, scope_id=scope_id, event="revoked"
        )["decisions"]
    )


# All of them ------------------------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class Sweep:
    """Revokes all valid scopes in repeated passes, until none is left."""

    sidecar: Access
    issuer: Caller
    filters: dict[str, str | None]
    revoked: list[str] = field(default_factory=list)
    # The reason of each failure, by scope id.
    failures: dict[str, str] = field(default_factory=dict)
    _over: set[str] = field(default_factory=set)

    def standing(self) -> dict[str, dict[str, Any]]:
        """The scopes that have neither expired nor been revoked, by id."""
        admin = self.sidecar.listener
        now = _date(admin.get("/api/v1/status", answers.Status))
        found: dict[str, dict[str, Any]] = {}
        for status in LOOKS:
            listed = pages(
                admin,
                SCOPES,
                "scopes",
                answers.ScopePage,
                None,
                None,
                status=status,
                **self.filters,
            )
            for scope in listed["scopes"]:
                if scope["scope_id"] not in found and self._stands(scope, status, now):
                    found[scope["scope_id"]] = scope
        return found

    def _stands(self, scope: dict[str, Any], status: str, now: datetime) -> bool:
        if scope["scope_id"] in self._over:
            return False
        if status == "exhausted":
            if datetime.fromisoformat(scope["expires_at"]) <= now:
                return False
            if is_revoked(self.sidecar.listener, scope["scope_id"]):
                self._over.add(scope["scope_id"])
                return False
        return True

    def run(self, left: dict[str, dict[str, Any]]) -> dict[str, str]:
        """Run the passes. Returns the scopes that are left at the end, each with the reason."""
        try:
            for _ in range(PASSES):
                before = len(self.revoked)
                self._pass(left)
                left = self.standing()
                if not left or len(self.revoked) == before:
                    break
            self._settle_doubts(left)
        except UnreachableError as exc:
            left = {scope_id: scope for scope_id, scope in left.items() if scope_id not in self._over}
            self.failures.update(dict.fromkeys(left.keys() - self.failures.keys(), str(exc)))
        endless = "it was issued during the command, as were many others; stop what requests scopes first"
        return {scope_id: self.failures.get(scope_id, endless) for scope_id in left}

    def _pass(self, left: dict[str, dict[str, Any]]) -> None:
        hidden = len(left) < MANY or not sys.stderr.isatty()
        with progress_bar("Revoking", hidden=hidden) as progress:
            for number, (scope_id, scope) in enumerate(left.items(), 1):
                try:
                    withdraw(self.sidecar.listener, self.issuer, scope_id, self._header(scope["tenant_id"]))
                    self.revoked.append(scope_id)
                    self._over.add(scope_id)
                except (ProblemError, DifferentSidecarsError, UncertainError) as exc:
                    self.failures[scope_id] = str(exc)
                progress(number, len(left))

    def _settle_doubts(self, left: dict[str, dict[str, Any]]) -> None:
        """Recheck failed scopes that are no longer listed: they were revoked after all, or have expired."""
        for scope_id in self.failures.keys() - left.keys() - set(self.revoked):
            if is_revoked(self.sidecar.listener, scope_id):
                self.revoked.append(scope_id)

    def _header(self, tenant: str) -> dict[str, bytes]:
        """The header that names the tenant of a scope. It is empty if no tenant header is configured."""
        settings = self.sidecar.settings
        header = None if settings is None else settings.gate.tenant_header
        return {} if header is None else {header: tenant.encode()}


def revoke_all(sweep: Sweep, *, sure: bool, as_json: bool) -> None:
    """Ask for confirmation, revoke the scopes, print their number, and name the failures."""
    found = sweep.standing()
    if found and not sure:
        incidents = len({scope["incident_id"] for scope in found.values()})
        asked = f"Revoke {_counted(len(found), 'scope')} of {_counted(incidents, 'incident')}"
        click.confirm(f"{asked} at {sweep.issuer.place}?", abort=True, err=True)
    left = sweep.run(found) if found else {}
    if as_json:
        tell({"revoked": sweep.revoked})
    elif found:
        click.echo(f"{_counted(len(sweep.revoked), 'scope')} revoked")
    else:
        click.echo("There is no scope to revoke.", err=True)
    if left:
        click.echo(f"scopegate: {_counted(len(left), 'scope')} not revoked:", err=True)
        for scope_id, why in left.items():
            click.echo(f"{cell(scope_id)}: {cell(why)}", err=True)
        sys.exit(FAILED)


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def _date(answer: CallResult) -> datetime:
    """The time on the sidecar's host, because the local clock may differ."""
    try:
        return parsedate_to_datetime(answer.date or "")
    except ValueError:
        return datetime.now(UTC)
