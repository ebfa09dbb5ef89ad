"""Makes the map of `sidecar/` in `sidecar/README.md` from the first sentence of each docstring."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
MAP = ROOT / "sidecar/README.md"
MADE = (
    "<!-- From here on made from the docstrings by `python -m tests.reference`. "
    "Change those, and run that again. -->"
)
# The packages in the order in which they build on each other, the lowest first.
ORDER = (
    ".",
    "eventloop",
    "core",
    "files",
    "telemetry",
    "settings",
    "settings/presets",
    "store",
    "policies",
    "upstream",
    "auth",
    "live",
    "gate",
    "library",
    "web/wire",
    "web/serving",
    "web/api",
    "web/api/openapi",
    "web/data",
    "cli",
)


def pages() -> dict[Path, str]:
    """The map, as a file."""
    return {MAP: map_page()}


def map_page() -> str:
    """The page: what is written by hand, and below the mark a table for each package."""
    lines = [MAP.read_text(encoding="utf-8").partition(MADE)[0] + MADE]
    for name in ORDER:
        folder = ROOT / "sidecar" / name
        lines += ["", f"## `{name if name != '.' else 'sidecar'}`", ""]
        lines += [_described(folder / "__init__.py"), "", "| file | what it holds |", "|---|---|"]
        lines += [f"| `{file.relative_to(ROOT)}` | {_described(file)} |" for file in _files(folder)]
    return "\n".join(lines) + "\n"


def _files(folder: Path) -> Iterator[Path]:
    yield from (file for file in sorted(folder.glob("*.py")) if file.name != "__init__.py")
    yield from sorted([*folder.glob("sql/**/*.sql"), *folder.glob("*.yaml")])


def _described(file: Path) -> str:
    """The first sentence of a docstring, or of the comment that a SQL or a YAML file begins with."""
    source = file.read_text(encoding="utf-8")
    if file.suffix == ".sql":
        text = source.partition("\n")[0].removeprefix("-- ")
    elif file.suffix == ".yaml":
        text = summary(source)
    else:
        text = ast.get_docstring(ast.parse(source)) or ""
    return re.split(r"(?<=\.)\s", " ".join(text.split("\n\n")[0].split()))[0]


def summary(source: str) -> str:
    """The first sentence of the comment that a YAML file begins with."""
    paragraph = source.partition("\n#\n")[0]
    return paragraph.replace("\n#", "").removeprefix("# ")
