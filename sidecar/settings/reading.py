"""Configuration: flag over environment over file. Every mistake is named with its place, all at once.

Pydantic stands here because text comes in here; its errors become plain sentences before anybody sees them.
The sections stand in sections, key by key; what a value may be stands in configvalues.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from sidecar.errors import ConfigurationError, Fault
from sidecar.files.yamlfile import Document, KeyPath, contents, did_you_mean, dotted, in_order, shown, survey
from sidecar.settings import location
from sidecar.settings.addresses import Listen
from sidecar.settings.keys import Below, Section, complete, keys_of, put, section_of, typed
from sidecar.settings.sections import Route, Settings
from sidecar.settings.values import sentence

__all__ = ["Listen", "Loaded", "Settings", "default", "load"]

PREFIX = "SCOPEGATE_"


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """Settings that are valid, and what else there is to say: warnings about the environment, the keys of the
    file that the environment or a flag overrides, and the file itself, which knows where its keys stand.

    `places` says of each key where it was given; of several the first is in force, without one the default.
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
) -> Loaded:
    """The settings. Raises ConfigurationError.

    `overrides` are (dotted key, text) from flags. File names in values are relative to the file's folder,
    wherever they were given. Without `read_keys` the key files are not looked into: whoever only reads the
    log need not have what it is written with.
    """
    document, faults = survey(contents(path), str(path), environment=environment)
    keys = {dotted(key): field for key, field in keys_of(Settings)}
    warnings: list[str] = []
    given: list[tuple[str, str, str]] = []
    for variable in sorted(environment):
        if variable.startswith(PREFIX) and variable != location.VARIABLE:
            key = variable.removeprefix(PREFIX).lower().replace("__", ".")
            if key in keys and not section_of(keys[key]) and variable == _variable(key):
                given.append((f"environment {variable}", key, environment[variable]))
            else:
                warnings.append(_unknown_variable(variable, keys))
    given += [(f"--set {shown(key)}", key, text) for key, text in overrides]
    found = list(faults)
    tree: Any = {} if document is None or document.value is None else document.value
    places: dict[KeyPath, str] = {}
    for place, key, text in given:
        field = keys.get(key)
        if field is None:
            near = did_you_mean(key, [name for name, field in keys.items() if not section_of(field)])
            found.append(Fault(place, shown(key), f"is not a known key{near}"))
        elif section_of(field):
            found.append(Fault(place, key, "is a section; name one of its keys"))
        else:
            try:
                put(tree, tuple(key.split(".")), typed(field, text, place))
                places[tuple(key.split("."))] = place
            except ConfigurationError as exc:
                found += [Fault(place, key + fault.key, fault.message) for fault in exc.faults]
    if document is None:
        raise ConfigurationError(in_order(found))
    context = {"folder": Path(os.path.abspath(path)).parent, "read_keys": read_keys}
    settings, wrong = _validated(tree, context, document, places)
    if settings is None or found:
        raise ConfigurationError(in_order([*found, *wrong]))
    told = {key: _places(key, given, document) for key, field in keys.items() if not section_of(field)}
    return Loaded(
        settings=settings,
        warnings=tuple(warnings),
        shadowed=tuple(key for key in told if len(told[key]) > 1 and tuple(key.split(".")) in document.marks),
        places=told,
        document=document,
    )


def default(upstream_url: str, **sections: Any) -> Settings:
    """Settings without a file, for the demo and for tests: `default(url, store={"url": "memory://"})`."""
    tree = {**sections, "upstream": {"url": upstream_url, **sections.get("upstream", {})}}
    settings, wrong = _validated(tree, {"folder": Path.cwd()}, Document("settings", tree), {})
    if settings is None:
        raise ConfigurationError(wrong)
    return settings


def _validated(
    tree: Any, context: dict[str, Any], document: Document, places: Mapping[KeyPath, str]
) -> tuple[Settings | None, list[Fault]]:
    try:
        return Settings.model_validate(complete(tree, Settings), context=context), []
    except ValidationError as exc:
        errors = exc.errors(include_url=False)
    faults: list[Fault] = []
    for error in errors:
        cause = error.get("ctx", {}).get("error")
        unknown = error["type"] == "extra_forbidden"
        message = f"is not a known key{_nearest(error['loc'])}" if unknown else sentence(dict(error))
        below = cause.found if isinstance(cause, Below) else [((), message)]
        for rest, message in below:
            path = (*error["loc"], *rest)
            above = [places[path[:length]] for length in range(len(path), 0, -1) if path[:length] in places]
            if above or not document.is_broken(path):
                place = above[0] if above else document.place(path)
                faults.append(Fault(place, dotted(path), message))
    return None, faults


def _places(key: str, given: Sequence[tuple[str, str, str]], document: Document) -> tuple[str, ...]:
    """Where a key was given, what wins first: flags over variables over the file."""
    path = tuple(key.split("."))
    overrides = tuple(place for place, name, _ in reversed(given) if name == key)
    return (*overrides, document.place(path)) if path in document.marks else overrides


def _variable(key: str) -> str:
    return PREFIX + key.upper().replace(".", "__")


def _unknown_variable(variable: str, keys: Mapping[str, FieldInfo]) -> str:
    variables = {_variable(key): key for key, field in keys.items() if not section_of(field)}
    near = difflib.get_close_matches(variable, variables, n=1, cutoff=0.0)[0]
    return f"environment {variable}: no key has this name, ignored; the nearest is {variables[near]} ({near})"


def _nearest(path: KeyPath) -> str:
    """What an unknown key was meant to be: a key of its section, else one of that name elsewhere."""
    model: type[Section] = Route if path[:2] == ("gate", "routes") else Settings
    for step in path[:-1] if model is Settings else ():
        model = section_of(model.model_fields[str(step)]) or model
    word = str(path[-1])
    near = did_you_mean(word, [field.alias or name for name, field in model.model_fields.items()])
    elsewhere = [dotted(key) for key, _ in keys_of(Settings) if key[-1] == word and len(key) > 1]
    return near or (f'; did you mean "{elsewhere[0]}"?' if elsewhere else "")
