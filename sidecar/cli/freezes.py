"""`scopegate freeze`, `freezes` and `unfreeze`: an operator stops executions, and lets them go on."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from typing import Any

import click

from sidecar.cli.access import Access, asks
from sidecar.cli.client import within
from sidecar.cli.options import answered, json_option, tell
from sidecar.cli.tables import moment, table, when
from sidecar.core.freeze import Fact, describe
from sidecar.web.wire import answers

# The option of each fact, without the dashes; with `except-` before it, that of the exception. Further words
# are other names of the same option.
OPTIONS: dict[Fact, tuple[str, ...]] = {
    "action": ("action",),
    "risk": ("risk",),
    "incident_id": ("incident-id",),
    "tenant_id": ("tenant",),
    "principal": ("principal",),
    "principal_kind": ("principal-kind", "kind"),
    "principal_group": ("principal-group", "group"),
    "target_agents": ("target-agent",),
    "route": ("route",),
}
_MEANT: dict[Fact, str] = {
    "action": "of this action",
    "risk": "of actions of this risk",
    "incident_id": "for this incident",
    "tenant_id": "of this tenant",
    "principal": "by the caller with this id",
    "principal_kind": "by callers of this kind: human, service or agent",
    "principal_group": "by members of this group",
    "target_agents": "that act on this agent",
    "route": "by the route of this name",
}

Command = Callable[..., Any]


def _patterns(command: Command) -> Command:
    """Add the options of all facts: what is frozen, and what is not."""
    for before, what in (("except-", "Not those"), ("", "Those")):
        for fact in reversed(OPTIONS):
            command = click.option(
                *(f"--{before}{word}" for word in OPTIONS[fact]),
                f"{before.replace('-', '_')}{fact}",
                multiple=True,
                metavar="GLOB",
                help=f"{what} {_MEANT[fact]}; repeatable.",
            )(command)
    return command


def _until(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """The time when it ends, as the admin interface takes it."""
    del ctx, param
    if value is None:
        return None
    import time

    from sidecar.core.duration import EXAMPLES, seconds_of
    from sidecar.core.instant import SECOND, iso_time, parse_time

    seconds = seconds_of(value)
    if seconds is not None:
        try:
            return iso_time(time.time_ns() // 1_000 + seconds * SECOND)
        except OverflowError as exc:
            message = f"{value!r} ends after the year 9999; omit --until to freeze until it is lifted"
            raise click.BadParameter(message) from exc
    try:
        return iso_time(parse_time(value))
    except ValueError as exc:
        message = (
            f"{value!r} is neither a duration such as {EXAMPLES}, nor a time such as 2026-12-24T12:00:00Z"
        )
        raise click.BadParameter(message) from exc


@click.command(
    epilog="""\b
Examples:
  scopegate freeze --principal-kind agent --reason 'the primary is split'
  scopegate freeze --action 'restart_*' --except-group incident-commanders --until 2h \\
    --reason 'a storm of restarts'
  scopegate freeze --all --reason 'a bad release of the backend'"""
)
@asks("admin")
@_patterns
@click.option("--all", "everything", is_flag=True, help="Freeze every execution.")
@click.option(
    "--until",
    metavar="TIME",
    callback=_until,
    help="For how long, such as 2h, or a time, such as 2026-12-24T12:00:00Z.  [default: until it is lifted]",
)
@click.option("--reason", required=True, metavar="TEXT", help="Why; refusals and records quote it.")
@json_option
def freeze(
    sidecar: Access,
    *,
    everything: bool,
    until: str | None,
    reason: str,
    as_json: bool,
    **globs: tuple[str, ...],
) -> None:
    """Stop executions. Once the command has ended, none that matches is admitted.

    An execution is frozen if every given option matches it; of an option that is repeated, one is enough.
    The --except options name what goes on. Executions that run already are not stopped. A GLOB may contain
    *, ? and [...].
    """
    match = {fact: list(globs[fact]) for fact in OPTIONS if globs[fact]}
    excepted = {fact: list(globs[f"except_{fact}"]) for fact in OPTIONS if globs[f"except_{fact}"]}
    if not match and not everything:
        raise click.UsageError(
            "say what to freeze, for example --action 'restart_*' or --principal-kind agent; with --all, "
            "every execution is frozen"
        )
    if match and everything:
        raise click.UsageError("--all freezes every execution; omit it, or the options that say which")
    wanted = {"match": match, "except": excepted, "reason": reason, "until": until}
    look = "scopegate freezes"
    set_freeze = sidecar.listener.ask(
        "POST", "/api/v1/freezes", answers.Freeze, wanted, also=201, look=look
    ).body
    answered(set_freeze, as_json, described(set_freeze))


@click.command(
    epilog="""\b
Examples:
  scopegate freezes
  scopegate freezes --all --json"""
)
@asks("admin")
@click.option("--all", "everything", is_flag=True, help="Those that have ended or were lifted, too.")
@json_option
def freezes(sidecar: Access, *, everything: bool, as_json: bool) -> None:
    """List the freezes that are in force, newest first."""
    query = {"all": "true" if everything else None}
    found = sidecar.listener.get("/api/v1/freezes", answers.FreezeList, **query).body
    if as_json:
        tell(found)
        return
    table([_row(each) for each in found["freezes"]], "no freeze" if everything else "nothing is frozen")


@click.command(
    epilog="""\b
Example:
  scopegate unfreeze 0192... --reason 'the primary is whole again'"""
)
@asks("admin")
@click.argument("freeze_id")
@click.option("--reason", required=True, metavar="TEXT", help="Why; the record keeps it.")
@json_option
def unfreeze(sidecar: Access, freeze_id: str, reason: str, *, as_json: bool) -> None:
    """Lift a freeze. FREEZE_ID is its id, as `scopegate freezes` shows it."""
    look = f"scopegate freezes --all  # is {shlex.quote(freeze_id)} lifted?"
    lifted = sidecar.listener.ask(
        "DELETE", f"/api/v1/freezes/{within(freeze_id)}", answers.Freeze, {"reason": reason}, look=look
    ).body
    answered(lifted, as_json, described(lifted))


def described(found: dict[str, Any]) -> Iterator[tuple[str, object]]:
    """The labelled lines of a freeze."""
    yield "freeze", found["freeze_id"]
    yield "frozen", describe(found["match"], found["except"])
    yield "reason", found["reason"]
    yield "set", f"{when(found['set_at'])}, by {found['set_by']}"
    yield "ends", "when it is lifted" if found["ends_at"] is None else when(found["ends_at"])
    if found["lifted_at"] is not None:
        yield "lifted", f"{when(found['lifted_at'])}, by {found['lifted_by']}"
        yield "because", found["lifted_because"]


def _row(found: dict[str, Any]) -> dict[str, str]:
    """A freeze as a row of the table."""
    state = "active" if found["active"] else "lifted" if found["lifted_at"] is not None else "ended"
    return {
        "freeze": found["freeze_id"],
        "state": state,
        "set": moment(found["set_at"]),
        "by": found["set_by"],
        "ends": moment(found["ends_at"]) or "when it is lifted",
        "frozen": describe(found["match"], found["except"]),
        "reason": found["reason"],
    }
