"""`scopegate status` and `scopegate health`: the state of a running sidecar, for operators and the
platform."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import click

from sidecar.cli.access import Access, asks
from sidecar.cli.options import FAILED, answered, duration_between, json_option, tell
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
    """Show whether a sidecar is ready, and if not, why; then its version, store, revisions and listeners."""
    from sidecar.web.wire import answers

    answer = sidecar.listener.get("/api/v1/status", answers.Status)
    answered(answer.body, as_json, _described(answer.body))


def _described(found: dict[str, Any]) -> Iterator[tuple[str, object]]:
    """The labelled lines of the answer. An older sidecar sends fewer members."""
    from datetime import UTC, datetime, timedelta

    from sidecar.cli.tables import age, moment, plain, size, when
    from sidecar.core.freeze import describe

    for each in found.get("freezes") or ():
        ends = "until it is lifted" if each["ends_at"] is None else f"until {moment(each['ends_at'])}"
        yield (
            "FROZEN",
            f"{describe(each['match'], each['except'])}; {ends}: {each['reason']} ({each['set_by']})",
        )
    if found.get("ready") is not None:
        yield "gate", "ready" if found["ready"] else f"NOT READY: {_problems(found.get('checks') or {})}"
    up_since = datetime.now(UTC) - timedelta(seconds=found["uptime_seconds"])
    yield "version", found["version"]
    yield "up since", when(up_since.isoformat())
    yield "draining", "yes: it is shutting down" if found["draining"] else "no"
    yield "in flight", found["in_flight"]
    clock = found.get("clock")
    if clock is not None:
        yield "clock", "ok" if clock["ok"] else clock.get("reason") or "not ok"
    unknown, oldest = found["unknown_executions"], found["oldest_unknown_admitted_at"]
    since = f", the oldest {age(oldest)}" if oldest else ""
    yield "unknown", "not known" if unknown is None else f"{unknown} to reconcile{since}"
    if found.get("running_executions") is not None:
        yield "running", f"{found['running_executions']} to be reported"
    store = dict(found["store"])
    yield "store", store.pop("url")
    file, wal = store.pop("size"), store.pop("wal_size")
    yield "size", "not known" if file is None or wal is None else f"{size(file)}, and {size(wal)} of WAL"
    for name in ("free", "growth_per_day"):
        if store.get(name) is not None:
            yield name.replace("_", " "), size(store.pop(name))
    for name, value in store.items():
        if value is not None:
            yield f"store {name.replace('_', ' ')}", plain(value)
    yield "policies", f"revision {found['policy_revision'] or 'none'}"
    yield "configuration", f"revision {found['config_revision']}"
    reload = found["last_reload"]
    yield "last reload", f"{'ok' if reload['ok'] else 'REFUSED'}, {when(reload['time'])}"
    yield from (("", error) for error in reload["errors"])
    yield "scope needed", f"from {found['scope_required_from']} risk on"
    yield "in shadow", ", ".join(found["shadow_routes"]) or "no route"
    auth = found.get("auth")
    if auth is not None:
        yield "callers", auth["says"]
    unlisted = found.get("unlisted")
    if unlisted is not None:
        excepted = f", except {', '.join(unlisted['excepted'])}" if unlisted["excepted"] else ""
        yield "not listed", f"reads {unlisted['reads']}, writes {unlisted['writes']}{excepted}"
    served_on = found.get("scopes_served_on")
    for name, address in (found.get("listeners") or {}).items():
        yield f"{name} on", f"{address}{', which issues scopes' if name == served_on else ''}"


def _problems(checks: dict[str, Any]) -> str:
    """The failing checks with their reasons. Checks with the same reason are named together."""
    failing: dict[str, list[str]] = {}
    for name, check in checks.items():
        if not check["ok"]:
            failing.setdefault(check.get("reason") or "not ok", []).append(name)
    return "; ".join(f"{', '.join(names)}: {reason}" for reason, names in failing.items())


@click.command(
    epilog="""\b
Examples:
  scopegate health --config config/scopegate.yaml
  scopegate health --ops 127.0.0.1:9902 --live --timeout 1"""
)
@asks("ops")
@click.option("--live", is_flag=True, help="Check only that the process answers, not that it is ready.")
@click.option(
    "--timeout",
    callback=duration_between(0.01, 600),
    default="3",
    show_default=True,
    metavar="TIME",
    help="How long to wait for the answer: seconds, or 5s, or 1m.",
)
@json_option
def health(sidecar: Access, *, live: bool, as_json: bool) -> None:
    """Check whether a sidecar is ready, and if not, why. Exit code 0: ready, 1: not ready, 3: no sidecar
    answers."""
    path, shape = ("/health/live", Liveness) if live else ("/health/ready", Readiness)
    answer = sidecar.listener.ask("GET", path, shape, also=503)
    well, checks = answer.body["alive" if live else "ready"], answer.body.get("checks") or {}
    if as_json:
        tell(answer.body)
    else:
        from sidecar.cli.tables import line

        click.echo("alive" if live else "ready" if well else "not ready")
        for name, check in checks.items():
            well_said = "no" if name == "draining" else "ok"
            click.echo(line(name, well_said if check["ok"] else check.get("reason") or "not ok"))
        if answer.body.get("freezes_active"):
            click.echo(line("frozen", f"{answer.body['freezes_active']} in force; see `scopegate freezes`"))
    sys.exit(0 if well else FAILED)
