"""The presets: routes of well-known interfaces that ship with the product, one YAML file each.

A file holds a list with the syntax of `gate.routes`. Its comment names the public documentation of the
interface, the version that the routes were written for, and what they leave ungated.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from importlib import resources
from typing import Any

from sidecar.files.yamlfile import parse

_FILES = {file.name[:-5]: file for file in resources.files(__name__).iterdir() if file.name.endswith(".yaml")}

NAMES = tuple(sorted(_FILES))
"""The names that `gate.presets` takes."""


@lru_cache
def preset(name: str) -> tuple[Mapping[str, Any], ...]:
    """The routes of a preset as a file would hold them. The name is one of `NAMES`."""
    file = _FILES[name]
    routes: list[Mapping[str, Any]] = parse(file.read_bytes(), str(file)).value
    return tuple(routes)
