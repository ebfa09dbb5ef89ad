"""List commands: their options with the validation of these, paging, and the command itself."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

import click

from sidecar.cli.access import Access, asks
from sidecar.cli.client import Caller
from sidecar.cli.options import json_option, tell
from sidecar.cli.scopeids import whole_id
from sidecar.cli.shapes import Shape
from sidecar.cli.tables import table
from sidecar.clock import wall_clock
from sidecar.core.duration import EXAMPLES, seconds_of
from sidecar.core.facts import is_identifier
from sidecar.core.instant import SECOND, iso_time, parse_time

MAX_PAGE = 1_000

Decorator = Callable[[Callable[..., None]], Callable[..., None]]


# Values ---------------------------------------------------------------------------------------------


def name(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Validate an id that is put into a path."""
    del ctx, param
    if value is None or (is_identifier(value) and not set(value) & set("/{}") and value not in (".", "..")):
        return value
    raise click.BadParameter("must be 1 to 256 printable characters, none of them a slash or a brace")


def identifier(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Validate an id that is used as a filter."""
    del ctx, param
    if value is not None and not is_identifier(value):
        raise click.BadParameter("must be 1 to 256 printable characters")
    return value


def usd(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    """Validate an amount of dollars."""
    del ctx, param
    if value is None:
        return None
    try:
        amount = Decimal(value)
    except InvalidOperation:
        amount = Decimal("NaN")
    if not (amount.is_finite() and 0 <= amount < 10**12):
        raise click.BadParameter(f"{value!r} is not an amount of dollars, such as 0.25")
    return float(amount)


def duration(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """Parse a time to live: a whole number of seconds, or a duration."""
    del ctx, param
    if value is None:
        return None
    found = int(value) if re.fullmatch("[0-9]{1,9}", value) else seconds_of(value)
    if found is None:
        raise click.BadParameter(f"{value!r} is not a number of seconds, nor a duration such as {EXAMPLES}")
    return found


def since(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """Parse a time, or how long ago it was. Returns microseconds since 1970."""
    del ctx, param
    if value is None:
        return None
    ago = seconds_of(value)
    if ago is not None:
        return max(0, wall_clock() - ago * SECOND)
    try:
        return parse_time(value)
    except ValueError as exc:
        raise click.BadParameter(
            f"{value!r} is not a time with its offset, such as 2026-12-24T12:00:00Z, nor a duration such as "
            "90m, 24h or 7d"
        ) from exc


# Options --------------------------------------------------------------------------------------------


def only(flag: str, help: str, *, values: Sequence[str] = (), check: Any = identifier) -> Decorator:
    """An option that filters a list: by an id, or by one of some values."""
    if values:
        return click.option(flag, type=click.Choice(values), help=f"Only {help}.")
    return click.option(flag, callback=check, metavar="ID", help=f"Only {help}.")


tenant_option = click.option("--tenant", callback=identifier, metavar="NAME", help="Only this tenant's.")
incident_option = only("--incident-id", "those of this incident")
action_option = click.option(
    "--action", callback=identifier, metavar="NAME", help="Only those of this action."
)
since_option = click.option(
    "--since",
    callback=since,
    metavar="WHEN",
    help="Only from this time on: 90m, 24h or 7d ago, or a time such as 2026-12-24T12:00:00Z.",
)


def named(admin: Caller, wanted: Mapping[str, Any]) -> dict[str, str | None]:
    """The filters of a command as the admin interface takes them, with whole scope_ids."""
    found = {("tenant_id" if name == "tenant" else name): value for name, value in wanted.items()}
    if found.get("since") is not None:
        found["since"] = iso_time(found["since"])
    if found.get("scope_id") is not None:
        found["scope_id"] = whole_id(admin, found["scope_id"], found.get("tenant_id"))
    return found


def listing(
    group: click.Group,
    path: str,
    member: str,
    shape: Shape,
    row: Callable[[dict[str, Any]], dict[str, str]],
    *filters: Decorator,
    help: str,
    examples: str,
) -> None:
    """Add the command `list` to a group. It prints a table of the rows that the filters find."""

    def list_(sidecar: Access, limit: int, before: str | None, *, as_json: bool, **wanted: Any) -> None:
        found = pages(sidecar.listener, path, member, shape, limit, before, **named(sidecar.listener, wanted))
        if as_json:
            tell(found)
            return
        table([row(one) for one in found[member]], f"There is no such {member[:-1]}.")
        if found["next"] is not None:
            click.echo(f"There are more: go on with --before {found['next']}", err=True)

    list_.__doc__ = help
    command: Callable[..., None] = list_
    limit = click.option(
        "--limit",
        type=click.IntRange(1, MAX_PAGE),
        default=100,
        show_default=True,
        metavar="N",
        help="The most rows to show.",
    )
    before = click.option(
        "--before", metavar="CURSOR", help="Continue behind an earlier page: the value of its `next`."
    )
    options: tuple[Decorator, ...] = (*filters, limit, before, json_option)
    for option in reversed(options):
        command = option(command)
    group.command("list", epilog=examples)(asks("admin")(command))


# Pages ----------------------------------------------------------------------------------------------


def pages(
    listener: Caller,
    path: str,
    member: str,
    shape: Shape,
    limit: int | None,
    before: str | None,
    **filters: str | None,
) -> dict[str, Any]:
    """Up to `limit` members of a list, or all, as one document with the `next` of the last page. A page may
    be shorter than requested and still have a next page."""
    found: list[Any] = []
    cursors = Cursors(listener)
    while True:
        size = MAX_PAGE if limit is None else limit - len(found)
        asked: dict[str, str | int | None] = {**filters, "before": before, "limit": size}
        answer = listener.get(path, shape, **asked)
        found += answer.body[member]
        before = cursors.next(answer.body["next"])
        if before is None or (limit is not None and len(found) >= limit):
            return {member: found, "next": before}


class Cursors:
    """Checks the cursors of a list. A cursor that repeats would make the list endless."""

    def __init__(self, listener: Caller) -> None:
        self._listener = listener
        self._seen: set[str] = set()

    def next(self, cursor: str | None) -> str | None:
        if cursor is not None:
            if cursor in self._seen:
                raise self._listener.stranger(200, odd="next")
            self._seen.add(cursor)
        return cursor
