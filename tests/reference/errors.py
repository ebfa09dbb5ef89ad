"""Makes the tables of errors in the reference from the code."""

from __future__ import annotations

from pathlib import Path

from sidecar.errors import ERRORS, MEMBERS

WIRE_PAGE = Path(__file__).parents[2] / "config/reference/wire.md"


def parts() -> dict[tuple[Path, str], str]:
    """The tables of the page about the wire."""
    return {(WIRE_PAGE, "errors"): tables()}


def tables() -> str:
    """Every code with what to do about it, and every member that a code adds."""
    codes = [
        f"| {row.status} | `{row.code}` | {row.title} | {row.advice} | {'yes' if row.retry else ''} "
        f"| {', '.join(f'`{name}`' for name in row.members)} |"
        for row in ERRORS.values()
    ]
    members = [f"| `{name}` | {schema['description']} |" for name, schema in MEMBERS.items()]
    return "\n".join(
        [
            "| status | error | what it means | what to do | retry | members |",
            "|---|---|---|---|---|---|",
            *codes,
            "",
            "| member | what it says |",
            "|---|---|",
            *members,
        ]
    )
