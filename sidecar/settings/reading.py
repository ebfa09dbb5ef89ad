"""Reads the configuration: a flag wins over the environment, and the environment over the file.

Every mistake is reported at once, each with its place.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sidecar.files.faults import ConfigurationError, Fault, shown
from sidecar.files.yamlfile import Document, KeyPath, contents, did_you_mean, in_order, survey
from sidecar.settings.addresses import Listen
from sidecar.settings.faults import faults, validated
from sidecar.settings.keys import complete, put
from sidecar.settings.sections import KEYS, Settings
from sidecar.settings.variables import OF_COMMANDS

__all__ = ["Listen", "Loaded", "Settings", "default", "load"]

PREFIX = "SCOPEGATE_"


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """Valid settings, warnings about the environment, the keys of the file that the environment or a flag
    overrides, and the file itself with the places of its keys.

    `places` holds the places that set each key. The first one is in force; without one, the default is.
    """

    settings: Settings
    warnings: tuple[str, ...]
    shadowed: tuple[str, ...]
    places: Mapping[str, tuple[str, ...]]
    document: Document


def load(
    path: Path,
    *,
    environment: Mapping[str, str],
    overrides: Sequence[tuple[str, str]] = (),
    read_keys: bool = True,
    starting: bool = True,
) -> Loaded:
    """The settings. Raises ConfigurationError.

    `overrides` are (dotted key, text) from flags. File names in values are relative to the file's folder,
    whether the file, the environment or a flag gives them. Without `read_keys` the key files are not read: a
    command that only reads the log need not have access to them. Unless the sidecar is `starting`, the files
    of `upstream.credentials` are not read either, because it watches them itself.
    """
    document, found = survey(contents(path), str(path), environment=environment)
    wrong = list(found)
    warnings: list[str] = []
    given: list[tuple[str, str, str]] = []
    variables = {PREFIX + name.upper().replace(".", "__"): name for name in KEYS}
    for variable in sorted(environment):
        if variable in variables:
            given.append((f"environment {variable}", variables[variable], environment[variable]))
        elif variable.startswith(PREFIX) and variable not in OF_COMMANDS:
            near = difflib.get_close_matches(variable, variables, n=1, cutoff=0.0)[0]
            nearest = f"the nearest is {variables[near]} ({near})"
            warnings.append(f"environment {variable}: no key has this name, ignored; {nearest}")
    given += [(f"--set {shown(name)}", name, text) for name, text in overrides]
    tree: Any = {} if document is None or document.value is None else document.value
    elsewhere: dict[KeyPath, str] = {}
    for place, name, text in given:
        key = KEYS.get(name)
        if key is not None:
            try:
                put(tree, key.path, key.parse(text, place))
                elsewhere[key.path] = place
            except ConfigurationError as exc:
                wrong += [Fault(place, name + fault.key, fault.message) for fault in exc.faults]
        elif any(known.startswith(f"{name}.") for known in KEYS):
            wrong.append(Fault(place, name, "is a section; name one of its keys"))
        else:
            wrong.append(Fault(place, shown(name), f"is not a known key{did_you_mean(name, KEYS)}"))
    if document is None:
        raise ConfigurationError(in_order(wrong))
    context = {"folder": Path(os.path.abspath(path)).parent, "read_keys": read_keys, "starting": starting}
    settings, mistakes = validated(Settings, complete(tree, Settings), context)
    wrong += faults(document, mistakes, given=elsewhere)
    if settings is None or wrong:
        raise ConfigurationError(in_order(wrong))
    places = {
        # The last flag wins over those before it.
        name: tuple(place for place, at, _ in reversed(given) if at == name)
        + ((document.place(key.path),) if key.path in document.marks else ())
        for name, key in KEYS.items()
    }
    return Loaded(
        settings=settings,
        warnings=tuple(warnings),
        shadowed=tuple(
            name for name in places if len(places[name]) > 1 and KEYS[name].path in document.marks
        ),
        places=places,
        document=document,
    )


def default(upstream_url: str, **sections: Any) -> Settings:
    """Settings without a file, for the demo and for tests: `default(url, store={"url": "memory://"})`.
    Raises ConfigurationError."""
    tree = {**sections, "upstream": {"url": upstream_url, **sections.get("upstream", {})}}
    settings, mistakes = validated(Settings, complete(tree, Settings), {"folder": Path.cwd()})
    if settings is None:
        raise ConfigurationError(tuple(faults(Document("settings", tree), mistakes)))
    return settings
