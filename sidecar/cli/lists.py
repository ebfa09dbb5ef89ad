"""Shared parts of the list commands: their options, the validation of these, and paging."""

from __future__ import annotations

from decimal import Decimal, InvalidOperation
from typing import Any

import click

from sidecar.cli.calling import Listener
from sidecar.cli.shapes import Shape
from sidecar.core.facts import is_identifier

MAX_PAGE = 1_000


def name(ctx: click.Context, param: click.Parameter, value: str) -> str:
    """Validate an id that is put into a path."""
    del ctx, param
    if not is_identifier(value) or set(value) & set("/{}") or value in (".", ".."):
        raise click.BadParameter("must be 1 to 256 printable characters, none of them a slash or a brace")
    return value


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
        raise click.BadParameter(f"{value!r} is no amount of dollars, such as 0.25")
    return float(amount)


tenant_option = click.option(
    "--tenant", callback=identifier, metavar="NAME", help="Only what belongs to this tenant."
)
limit_option = click.option(
    "--limit",
    type=click.IntRange(1, MAX_PAGE),
    default=100,
    show_default=True,
    metavar="N",
    help="How many, at most.",
)
before_option = click.option("--before", metavar="CURSOR", help="Go on behind a page: its `next`.")


def pages(
    listener: Listener,
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

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._seen: set[str] = set()

    def next(self, cursor: str | None) -> str | None:
        if cursor is not None:
            if cursor in self._seen:
                raise self._listener.stranger(200, odd="next")
            self._seen.add(cursor)
        return cursor


def tell_of_more(found: dict[str, Any]) -> None:
    """Say on standard error that a list is incomplete."""
    if found["next"] is not None:
        click.echo(f"There are more; go on with --before {found['next']}", err=True)
