"""The rooms of `sidecar/`: no package imports what is private to another, and each says what lives there."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import sidecar
from tests.reference.rooms import MAP, map_page

ROOT = Path(sidecar.__file__).parent
MODULES = sorted(ROOT.glob("**/*.py"))
PACKAGES = sorted(path.parent for path in ROOT.glob("*/**/__init__.py"))


def imported(source: str) -> Iterator[str]:
    """The dotted name of everything that a module imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def trespasses(importer: str, source: str) -> list[str]:
    """The imports of a module that reach into the private part of a package or module that it is not in."""
    found = []
    for name in imported(source):
        parts = name.split(".")
        private = [at for at, part in enumerate(parts) if part.startswith("_") and not part.endswith("__")]
        if parts[0] == "sidecar" and private and importer.split(".")[: private[0]] != parts[: private[0]]:
            found.append(name)
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_private_is_imported_from_another_package(path: Path) -> None:
    importer = ".".join(("sidecar", *path.relative_to(ROOT).with_suffix("").parts))
    assert trespasses(importer, path.read_text(encoding="utf-8")) == []


def test_a_trespass_is_found() -> None:
    source = """
from sidecar.upstream._client import Upstream
import sidecar.core.apply
from sidecar.errors import _x
"""
    assert trespasses("sidecar.gate.execution", source) == [
        "sidecar.upstream._client.Upstream",
        "sidecar.errors._x",
    ]
    assert trespasses("sidecar.upstream.__init__", source) == ["sidecar.errors._x"]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_package_says_what_lives_there_and_its_door_is_what_it_names(package: Path) -> None:
    name = ".".join(("sidecar", *package.relative_to(ROOT).parts))
    module = importlib.import_module(name)
    first = (module.__doc__ or "").split("\n\n")[0]
    assert first.rstrip().endswith(".")
    assert {"__all__"} <= vars(module).keys() or not any(
        path.stem.startswith("_") for path in package.glob("*.py") if path.stem != "__init__"
    ), "a package with private modules names its door in __all__"


def test_the_map_shows_every_file_as_its_docstring_has_it() -> None:
    page = MAP.read_text(encoding="utf-8")
    assert page == map_page(), "run `python -m tests.reference`"
    shown = re.findall(r"^\| `sidecar/([^`]+)` \|", page, flags=re.MULTILINE)
    files = {
        path
        for path in (*MODULES, *ROOT.glob("**/*.sql"), *ROOT.glob("**/*.yaml"))
        if path.name != "__init__.py"
    }
    assert sorted(shown) == sorted(str(path.relative_to(ROOT)) for path in files)


def test_every_description_in_the_map_is_a_sentence() -> None:
    described = re.findall(r"^\| `sidecar/[^`]+` \| (.*) \|$", MAP.read_text(encoding="utf-8"), re.MULTILINE)
    assert described
    assert [text for text in described if not re.fullmatch(r"[A-Z`].*\.", text)] == []
