"""Makes the pages and tables of documentation that the code is the source of.

`python -m tests.reference` writes them. With `--check` it prints what it would change, and exits with 1 if
there is anything; tests/unit/test_reference.py does the same. Each module of this package is a generator. It
has one or both of these functions:

- `pages() -> dict[Path, str]`: whole files;
- `parts() -> dict[tuple[Path, str], str]`: of a file that is otherwise written by hand, the text between the
  lines `<!-- generated: NAME -->` and `<!-- end -->`, by file and NAME.
"""

from __future__ import annotations

import pkgutil
import re
import sys
from difflib import unified_diff
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parents[2]
COMMAND = "python -m tests.reference"
MADE = (
    f"<!-- Made from the code by `{COMMAND}`. Do not edit this page: change the code, and run that again. -->"
)


def made() -> dict[Path, str]:
    """Every file that is generated, whole or in part, as the code now says it should be."""
    names = [found.name for found in pkgutil.iter_modules(__path__) if found.name != "__main__"]
    modules = [import_module(f"{__name__}.{name}") for name in names]
    texts: dict[Path, str] = {}
    for module in modules:
        texts |= getattr(module, "pages", dict)()
    for module in modules:
        for (page, name), text in getattr(module, "parts", dict)().items():
            texts[page] = filled(texts.get(page) or page.read_text(encoding="utf-8"), name, text)
    return texts


def filled(page: str, name: str, text: str) -> str:
    """The page with this text between the marks of this name. Raises ValueError unless there is one place."""
    place = re.compile(rf"(?<=^<!-- generated: {re.escape(name)} -->\n).*?(?=^<!-- end -->$)", re.M | re.S)
    if len(place.findall(page)) != 1:
        raise ValueError(f"the page needs one place between <!-- generated: {name} --> and <!-- end -->")
    return place.sub(lambda _: text.strip("\n") + "\n", page)


def differences(texts: dict[Path, str]) -> dict[Path, str]:
    """The files that differ from these texts, each with what writing its text would change."""
    found = {}
    for page, text in texts.items():
        old = page.read_text(encoding="utf-8") if page.exists() else ""
        if old != text:
            name = str(page.relative_to(ROOT))
            found[page] = "\n".join(
                unified_diff(old.splitlines(), text.splitlines(), name, name, lineterm="")
            )
    return found


def main(arguments: list[str]) -> None:
    texts = made()
    found = differences(texts)
    if arguments == ["--check"]:
        for difference in found.values():
            print(difference)
        sys.exit(f"{len(found)} files are out of date: run `{COMMAND}`" if found else 0)
    for page in found:
        page.write_text(texts[page], encoding="utf-8")
        print(page.relative_to(ROOT))
