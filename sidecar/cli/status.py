"""`scopegate status` and `scopegate health`: how a running sidecar is, for operators and for the platform."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import click

from sidecar.cli.options import FAILED, Access, asks, json_option, tell


@click.command(
    epilog="""\b
Examples:
  scopegate status --config config/scopegate.yaml
  scopegate status --admin 127.0.0.1:9901 --json"""
)
@asks("admin")
@json_option
def status(sidecar: Access, *, as_json: bool) -> None:
    """What runs there, and how it is."""
    from sidecar.cli.tables import lines

    answer = sidecar.listener.get("/api/v1/status")
    if as_json:
        tell(answer.body)
    else:
        lines(_told(answer.body))


def _told(told: dict[str, Any]) -> Iterator[tuple[str, object]]:
    """What the answer says, for people; an older sidecar says less."""
    from datetime import UTC, datetime, timedelta

    from sidecar.cli.tables import age, plain, size, when

    up_since = datetime.now(UTC) - timedelta(seconds=told["uptime_seconds"])
    yield "version", told["version"]
    yield "up since", when(up_since.isoformat())
    yield "draining", "yes: it is shutting down" if told["draining"] else "no"
    yield "in flight", told["in_flight"]
    oldest = told["oldest_unknown_admitted_at"]
    yield "unknown", f"{told['unknown_executions']}{f', the oldest {age(oldest)}' if oldest else ''}"
    store = dict(told["store"])
    yield "store", store.pop("url")
    yield "size", f"{size(store.pop('size'))}, and {size(store.pop('wal_size'))} of WAL"
    for name in ("free", "growth_per_day"):
        if store.get(name) is not None:
            yield name.replace("_", " "), size(store.pop(name))
    for name, value in store.items():
        if value is not None:
            yield f"store {name.replace('_', ' ')}", plain(value)
    yield "policies", f"revision {told['policy_revision'] or 'none'}"
    yield "configuration", f"revision {told['config_revision']}"
    reload = told["last_reload"]
    yield "last reload", f"{'ok' if reload['ok'] else 'REFUSED'}, {when(reload['time'])}"
    yield from (("", error) for error in reload["errors"])
    yield "scope needed", f"from {told['scope_required_from']} risk on"
    yield "in shadow", ", ".join(told["shadow_routes"]) or "no route"
    served_on = told.get("scopes_served_on")
    for name, address in told.get("listeners", {}).items():
        yield f"{name} on", f"{address}{', which issues scopes' if name == served_on else ''}"


@click.command(
    epilog="""\b
Examples:
  scopegate health --config config/scopegate.yaml
  scopegate health --ops 127.0.0.1:9902 --live --timeout 1"""
)
@asks("ops")
@click.option("--live", is_flag=True, help="Ask only whether the process answers, not whether it is ready.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0.01, max=600),
    default=3.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait for the answer.",
)
@json_option
def health(sidecar: Access, *, live: bool, as_json: bool) -> None:
    """Ask whether a sidecar is ready, and why not. Exit code 0: ready, 1: not ready, 3: nobody answers."""
    answer = sidecar.listener.ask("GET", "/health/live" if live else "/health/ready", also=503)
    well, checks = answer.body.get("alive" if live else "ready"), answer.body.get("checks", {})
    if not isinstance(well, bool) or not isinstance(checks, dict):
        raise sidecar.listener.stranger(answer.status)
    if as_json:
        tell(answer.body)
    else:
        from sidecar.cli.tables import line

        click.echo("alive" if live else "ready" if well else "not ready")
        for name, check in checks.items():
            click.echo(line(name, "ok" if check["ok"] else check["reason"]))
    sys.exit(0 if well else FAILED)
