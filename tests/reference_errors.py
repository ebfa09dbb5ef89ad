"""Makes the tables of errors in the reference from the code: `python -m tests.reference_errors`."""

from __future__ import annotations

import re
from pathlib import Path

from sidecar.errors import ERRORS, MEMBERS

WIRE_PAGE = Path(__file__).parents[1] / "config/reference/wire.md"
COMMAND = "python -m tests.reference_errors"
BEGIN = f"<!-- Made from sidecar/errors.py by `{COMMAND}`. Do not edit down to the next such line. -->"
END = "<!-- The end of what is made. -->"


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


def page() -> str:
    """The page with the tables of this code in it."""
    text = WIRE_PAGE.read_text(encoding="utf-8")
    made = f"{BEGIN}\n\n{tables()}\n\n{END}"
    return re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: made, text, count=1, flags=re.DOTALL)


if __name__ == "__main__":
    WIRE_PAGE.write_text(page(), encoding="utf-8")
