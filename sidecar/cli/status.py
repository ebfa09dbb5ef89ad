"""`scopegate status` and `scopegate health`: the state of a running sidecar, for operators and the
platform."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import click

from sidecar.cli.options import FAILED, Access, asks, json_option, tell
from sidecar.web.wire.health import Liveness, Readiness


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
    from sidecar.web.wire import answers

    answer = sidecar.listener.get("/api/v1/status", answers.Status)
    if as_json:
        tell(answer.body)
    else:
        lines(_told(answer.body))


def _told(told: dict[str, Any]) -> Iterator[tuple[str, object]]:
    """The labelled lines of the answer. An older sidecar sends fewer members."""
    from datetime import UTC, datetime, timedelta

    from sidecar.cli.tables import age, plain, size, when

    up_since = datetime.now(UTC) - timedelta(seconds=told["uptime_seconds"])
    yield "version", told["version"]
    yield "up since", when(up_since.isoformat())
    yield "draining", "yes: it is shutting down" if told["draining"] else "no"
    yield "in flight", told["in_flight"]
    clock = told.get("clock")
    if clock is not None:
        yield "clock", "ok" if clock["ok"] else clock.get("reason") or "not ok"
    unknown, oldest = told["unknown_executions"], told["oldest_unknown_admitted_at"]
    yield (
        "unknown",
        "not known" if unknown is None else f"{unknown}{f', the oldest {age(oldest)}' if oldest else ''}",
    )
    store = dict(told["store"])
    yield "store", store.pop("url")
    file, wal = store.pop("size"), store.pop("wal_size")
    yield "size", "not known" if file is None or wal is None else f"{size(file)}, and {size(wal)} of WAL"
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
    for name, address in (told.get("listeners") or {}).items():
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
    path, shape = ("/health/live", Liveness) if live else ("/health/ready", Readiness)
    answer = sidecar.listener.ask("GET", path, shape, also=503)
    well, checks = answer.body["alive" if live else "ready"], answer.body.get("checks") or {}
    if as_json:
        tell(answer.body)
    else:
        from sidecar.cli.tables import line

        click.echo("alive" if live else "ready" if well else "not ready")
        for name, check in checks.items():
            click.echo(line(name, "ok" if check["ok"] else check.get("reason") or "not ok"))
    sys.exit(0 if well else FAILED)
