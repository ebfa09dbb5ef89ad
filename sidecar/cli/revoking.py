"""Revoking, one scope or all of them: what is said to be revoked is so in the log of the admin listener.

An exhausted scope goes on being shown as exhausted once it is revoked, so the log is asked, not its status.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import click

from sidecar.cli import shapes
from sidecar.cli.calling import Answer, Listener, ProblemError, UncertainError, UnreachableError, within
from sidecar.cli.decisions import PATH as DECISIONS
from sidecar.cli.lists import pages
from sidecar.cli.options import FAILED, Access, progress_bar, tell
from sidecar.cli.tables import cell

REVOKE = "/api/v1/recovery/scopes/"
# While somebody goes on asking for scopes, no pass finds none.
PASSES = 20
# Below this many a bar would only flicker.
MANY = 20
# A pass looks twice at active ones: an exhausted scope may come to life between the first two looks.
LOOKS = ("active", "exhausted", "active")


class DifferentSidecarsError(Exception):
    """The listener that issues scopes is not of the sidecar whose admin listener is asked."""

    def __init__(self, admin: Listener, issuer: Listener, found: str) -> None:
        super().__init__(
            f"{issuer.place} (data) and {admin.place} (admin) are of different sidecars: {found}; "
            "give --data, or data.listen in the configuration, as this host reaches the same one"
        )


def withdraw(admin: Listener, issuer: Listener, scope_id: str, header: dict[str, bytes]) -> Answer:
    """Revoke one. Raises what asking raises, and DifferentSidecarsError."""
    look = f"scopegate decisions list --scope-id {shlex.quote(scope_id)} --event revoked"
    try:
        answer = issuer.ask("DELETE", REVOKE + within(scope_id), shapes.REVOKED, headers=header, look=look)
    except ProblemError as exc:
        if issuer is admin or exc.body["error"] != "scope_not_found":
            raise
        found = f"the first does not know {scope_id}, which the second does (or it is another tenant's)"
        raise DifferentSidecarsError(admin, issuer, found) from exc
    if issuer is not admin and not is_revoked(admin, scope_id):
        found = f"the first says that {scope_id} is revoked, and the second does not know of it"
        raise DifferentSidecarsError(admin, issuer, found)
    return answer


def is_revoked(admin: Listener, scope_id: str) -> bool:
    """Whether the log has its revocation, whatever its status says."""
    return bool(
        pages(admin, DECISIONS, "decisions", shapes.DECISION, 1, None, scope_id=scope_id, event="revoked")[
            "decisions"
        ]
    )


# All of them ------------------------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class Sweep:
    """Revokes what stands, pass after pass, until nothing does."""

    sidecar: Access
    issuer: Listener
    filters: dict[str, str | None]
    revoked: list[str] = field(default_factory=list)
    # Why not, by scope.
    failures: dict[str, str] = field(default_factory=dict)
    _over: set[str] = field(default_factory=set)

    def standing(self) -> dict[str, dict[str, Any]]:
        """What has neither expired nor been revoked, by id."""
        admin = self.sidecar.listener
        now = _date(admin.get("/api/v1/status", shapes.SERVED))
        found: dict[str, dict[str, Any]] = {}
        for status in LOOKS:
            listed = pages(
                admin, "/api/v1/scopes", "scopes", shapes.SCOPE, None, None, status=status, **self.filters
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
        """Gives those that still stand at the end, and why."""
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
        endless = "it was issued meanwhile, and there was no end of them; stop what asks for scopes first"
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
        """What failed and does not stand any more was revoked after all, or has expired."""
        for scope_id in self.failures.keys() - left.keys() - set(self.revoked):
            if is_revoked(self.sidecar.listener, scope_id):
                self.revoked.append(scope_id)

    def _header(self, tenant: str) -> dict[str, bytes]:
        """Each scope is revoked in the name of its own tenant, where there are tenants."""
        settings = self.sidecar.settings
        header = None if settings is None else settings.gate.tenant_header
        return {} if header is None else {header: tenant.encode()}


def revoke_all(sweep: Sweep, *, sure: bool, as_json: bool) -> None:
    """Ask whether, revoke them, say how many, and name those that could not be."""
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


def _date(answer: Answer) -> datetime:
    """The time by the clock of the sidecar's host: the one here may be another."""
    try:
        return parsedate_to_datetime(answer.date or "")
    except ValueError:
        return datetime.now(UTC)
