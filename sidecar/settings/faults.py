"""From the value of a file to a section, or to every mistake in it.

Configuration, policies and policy tests are read this way. Pydantic's errors become plain sentences here that
say what is wanted and what was found. They never repeat a value, which may be a secret.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum
from typing import Any, Literal, NamedTuple, TypeVar, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from sidecar.files.faults import Fault
from sidecar.files.yamlfile import Document, KeyPath, did_you_mean, dotted
from sidecar.settings.keys import Section, keys, section_in

S = TypeVar("S", bound=Section)


class Contradiction(ValueError):
    """Keys of a section that are valid by themselves, but not together. Each is named by its path below the
    section, with its own message."""

    def __init__(self, *found: tuple[KeyPath, str]) -> None:
        super().__init__("has values that contradict each other")
        self.found = found


def refuse(*cases: tuple[object, KeyPath, str]) -> None:
    """Raise Contradiction for the cases that apply: whether it does, the path of a key, and the message."""
    found = [(path, message) for applies, path, message in cases if applies]
    if found:
        raise Contradiction(*found)


class WrongText(ValueError):
    """A text is wrong at a position: line and column in it, from 1. None stands for the text as a whole."""

    def __init__(self, message: str, position: tuple[int, int] | None = None) -> None:
        super().__init__(message)
        self.position = position


class Mistake(NamedTuple):
    """One mistake below a section. `within` is a text, and the line and column in it that are wrong."""

    path: KeyPath
    message: str
    within: tuple[str, int, int] | None = None


def validated(
    model: type[S], value: Any, context: Mapping[str, Any] | None = None
) -> tuple[S | None, list[Mistake]]:
    """The section that a value is, or its mistakes."""
    try:
        return model.model_validate(value, context=context), []
    except ValidationError as exc:
        errors = exc.errors(include_url=False)
    found: list[Mistake] = []
    for error in errors:
        path, cause = _as_written(error["loc"], value), error.get("ctx", {}).get("error")
        if isinstance(cause, Contradiction):
            found += [Mistake((*path, *below), message) for below, message in cause.found]
        elif isinstance(cause, WrongText) and cause.position is not None:
            found.append(Mistake(path, str(cause), (error["input"], *cause.position)))
        else:
            found.append(Mistake(path, _sentence(error, model)))
    return None, found


def faults(
    document: Document,
    mistakes: Iterable[Mistake],
    above: KeyPath = (),
    *,
    given: Mapping[KeyPath, str] | None = None,
) -> Iterator[Fault]:
    """Mistakes below a path of a document, with their places. What is reported as faulty YAML is left out.

    `given` holds the places of keys that were given elsewhere than in the document.
    """
    for below, message, within in mistakes:
        path = (*above, *below)
        elsewhere = [path[:length] for length in range(len(path), 0, -1) if path[:length] in (given or {})]
        if given and elsewhere:
            yield Fault(given[elsewhere[0]], dotted(path), message)
        elif not document.is_broken(path):
            place, where = document.place_within(path, *within) if within else (document.place(path), "")
            yield Fault(place, dotted(path), message + where)


def kind(value: object) -> str:
    """What a value is, for "expects ..., found ..."."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true or false"
    kinds = {
        int: "a number",
        float: "a decimal number",
        str: "text",
        dict: "a map",
        list: "a list",
        tuple: "a list",
    }
    return kinds.get(type(value), "something else")


def choices(annotation: Any) -> tuple[str, ...]:
    """The words of a type that admits only some."""
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return tuple(one.value for one in annotation)
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def one_of(words: Sequence[str], found: object) -> str:
    """The message for a value that is none of a few words."""
    near = did_you_mean(found, words) if isinstance(found, str) else ""
    return f"expects one of {', '.join(words)}{near}"


_WANTED = {"bool_type": "true or false", "dict_type": "a map", "list_type": "a list", "tuple_type": "a list"}


def _sentence(error: ErrorDetails, model: type[Section]) -> str:
    name, path, context = error["type"], error["loc"], error.get("ctx", {})
    if name == "value_error":
        return str(context["error"])
    if name in ("literal_error", "enum"):
        return one_of(re.findall("'([^']*)'", context["expected"]), error["input"])
    if name == "extra_forbidden":
        return f"is not a known key{_near(model, path)}"
    if name == "missing":
        return f"is required; add {_missing(model, path)}"
    wanted = _WANTED.get(name)
    if name == "model_type":
        section = _section_at(model, path)
        wanted = f"a map such as {section.example}" if section.example else _keys_below(section)
    if wanted:
        return f"expects {wanted}, found {kind(error['input'])}"
    return "has a value that cannot be used here; compare the shipped config/scopegate.yaml"


def _keys_below(section: type[Section]) -> str:
    return f"keys below it such as {next(iter(_fields(section)))}"


def _as_written(path: Sequence[str | int], value: Any) -> KeyPath:
    """A path without the numbers of lists that the value does not have: a single value counts as a list."""
    for length, step in enumerate(path):
        if isinstance(step, int) and not isinstance(value, list | tuple):
            return tuple(path[:length])
        try:
            value = value[step]
        except (LookupError, TypeError):
            break
    return tuple(path)


def _section_at(model: type[Section], path: Iterable[str | int]) -> type[Section]:
    """The section that a path leads to."""
    for step in path:
        if isinstance(step, str):
            model = section_in(_fields(model)[step].annotation, in_lists=True) or model
    return model


def _fields(model: type[Section]) -> dict[str, FieldInfo]:
    """The keys of a section by their names in the file."""
    return {field.alias or name: field for name, field in model.model_fields.items()}


def _near(model: type[Section], path: Sequence[str | int]) -> str:
    """What an unknown key was meant to be: a key of its section, else one of that name elsewhere."""
    *above, word = path
    near = did_you_mean(str(word), _fields(_section_at(model, above)))
    elsewhere = [key.name for key in keys(model) if key.path[-1] == word and len(key.path) > 1]
    return near or (f'; did you mean "{elsewhere[0]}"?' if elsewhere else "")


def _missing(model: type[Section], path: Sequence[str | int]) -> str:
    field = _fields(_section_at(model, path[:-1]))[str(path[-1])]
    words = choices(field.annotation)
    if words:
        return f"one of {', '.join(words)}"
    return f"it, for example {field.examples[0]}" if field.examples else "it"
