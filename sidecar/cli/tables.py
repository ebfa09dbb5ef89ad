"""Formats answers for people: tables, aligned lines, times and amounts.

The contents of an answer are foreign input, so every cell is escaped. A scope_id has its short form, which
commands take in its place. Other ids are never cut, because people copy them. Free text in the last column is
cut at the width of the terminal.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import click

from sidecar.core.shortid import shortened
from sidecar.files.faults import shown

# Longer than every id, intent and reason, because a cell is escaped but not cut.
_WHOLE = 1 << 16
_LABEL = 10

Rows = Sequence[Mapping[str, str]]


# Tables ---------------------------------------------------------------------------------------------


def table(rows: Rows, none: str) -> None:
    """Print rows under their heads, without empty columns. Without rows, print the sentence `none`."""
    if not rows:
        click.echo(none, err=True)
        return
    from tabulate import tabulate

    heads = [head for head in rows[0] if any(row[head] for row in rows)]
    cells = [[cell(row[head]) for head in heads] for row in rows]
    text = tabulate(cells, [head.upper() for head in heads], tablefmt="plain", disable_numparse=True)
    for line in text.splitlines():
        click.echo(fitted(line.rstrip(), _begin_of_last(text)))


def fitted(line: str, least: int) -> str:
    """A line cut to the width of the terminal, but to no less than `least` characters. It is whole if
    standard output is not a terminal."""
    if not sys.stdout.isatty():
        return line
    width = max(shutil.get_terminal_size().columns, least + 1)
    return line if len(line) <= width else line[: width - 1] + "…"


def _begin_of_last(text: str) -> int:
    heads = text.splitlines()[0].rstrip()
    return len(heads) - len(heads.rpartition("  ")[2])


class Verbatim(str):
    """A text that may hold a whole scope_id."""

    __slots__ = ()


def cell(value: object) -> str:
    """Text on one line, without control characters and, unless it is Verbatim, without a whole scope_id."""
    text = shown(value if isinstance(value, str) else str(value), _WHOLE)
    return text if isinstance(value, Verbatim) else shortened(text)


# Lines ----------------------------------------------------------------------------------------------


def line(label: str, value: object, width: int = _LABEL) -> str:
    """`label     value`."""
    return f"{cell(label):<{width}} {cell(value)}".rstrip()


def lines(labelled: Iterable[tuple[str, object]]) -> None:
    """Print the labels that have a value, aligned."""
    kept = [(label, value) for label, value in labelled if value not in (None, "")]
    width = max((len(label) for label, _ in kept), default=0)
    for label, value in kept:
        click.echo(line(label, value, max(width, _LABEL)))


def lines_of(members: Mapping[str, Any]) -> Iterator[str]:
    """Members of an object as aligned lines."""
    width = max((len(cell(name)) for name in members), default=0)
    for name, value in members.items():
        yield line(name, plain(value), max(width, _LABEL))


def plain(value: Any) -> str:
    """A JSON value on one line. Text has no quotes."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
        return ", ".join(value)
    return json.dumps(value, ensure_ascii=False)


# Values ---------------------------------------------------------------------------------------------


def moment(text: str | None) -> str:
    """A time of an answer, in UTC, to the second."""
    return "" if text is None else datetime.fromisoformat(text).astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def age(text: str | None) -> str:
    """The time since, or until, a time of an answer."""
    if text is None:
        return ""
    seconds = (datetime.now(UTC) - datetime.fromisoformat(text)).total_seconds()
    return f"in {span(-seconds)}" if seconds < 0 else f"{span(seconds)} ago"


def when(text: str | None) -> str:
    """A time of an answer, and the time since or until it."""
    return "" if text is None else f"{moment(text)} ({age(text)})"


def span(seconds: float) -> str:
    """A duration in a fitting unit."""
    for size, name in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * size or (size == 60 and seconds >= size):
            return f"{seconds / size:.0f} {name}"
    return f"{seconds:.0f} s"


def dollars(amount: float | None) -> str:
    """An amount of dollars with at most six decimals."""
    return "" if amount is None else f"{amount:.6f}".rstrip("0").rstrip(".")


def size(count: float) -> str:
    """A number of bytes."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while abs(count) >= 1024 and len(units) > 1:
        count /= 1024
        units.pop(0)
    return f"{count:.0f} B" if units[0] == "B" else f"{count:.1f} {units[0]}"
