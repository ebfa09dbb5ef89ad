"""The keys of a file as a tree of sections, and the way from text of the environment or a flag to its key.

A section is a pydantic model. Everything about a key stands at the key: its type says what it accepts, LIVE
and SECRET mark it, and the text below it describes it.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from functools import lru_cache
from itertools import pairwise
from types import NoneType
from typing import Any, ClassVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict
from pydantic.fields import FieldInfo

from sidecar.files.faults import ConfigurationError, Fault
from sidecar.files.yamlfile import KeyPath, dotted, plain, survey


class Mark(Enum):
    """What a key says of itself beside its type, as in `Annotated[Seconds, LIVE]`."""

    LIVE = auto()
    SECRET = auto()


# A reload may change the key. A key without this mark needs a restart, which is the safe assumption.
LIVE = Mark.LIVE
# No message repeats the value, because it may contain a password.
SECRET = Mark.SECRET


class Section(BaseModel):
    """A map in a file. `example` shows one in messages, if the section has one."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    example: ClassVar[str] = ""


@dataclass(frozen=True, slots=True)
class Key:
    """One key of a file, which may hold a section."""

    path: tuple[str, ...]
    owner: type[Section]
    field_name: str

    @property
    def field(self) -> FieldInfo:
        return self.owner.model_fields[self.field_name]

    @property
    def name(self) -> str:
        """The dotted key."""
        return dotted(self.path)

    @property
    def text(self) -> str:
        """The description. It may hold links, relative to the page of the reference that shows it."""
        text = descriptions(self.owner).get(self.path[-1])
        return " ".join((text or inspect.getdoc(self.section) or "").split())

    @property
    def section(self) -> type[Section] | None:
        """The section that stands below the key."""
        return section_in(self.field.annotation)

    @property
    def is_live(self) -> bool:
        return LIVE in self.field.metadata

    @property
    def is_secret(self) -> bool:
        return SECRET in self.field.metadata

    def parse(self, text: str, place: str) -> Any:
        """A value from the environment or a flag. YAML reads numbers, truth values and lists; text is taken
        as it is. Raises ConfigurationError."""
        wanted = self.field.annotation
        nothing = NoneType in get_args(wanted) and text in ("", "~", "null")
        if not nothing and any(get_origin(kind) is tuple for kind in (wanted, *get_args(wanted))):
            document, faults = survey(text, place)
            if document is None or faults:
                raise ConfigurationError(faults)
            return document.value
        if nothing or wanted in (int, float, bool, NoneType):
            try:
                return plain(text)
            except ValueError as exc:
                raise ConfigurationError([Fault(place, "", f"the value {exc}")]) from exc
        return text


def keys(model: type[Section], above: tuple[str, ...] = ()) -> Iterator[Key]:
    """Every key below a section, in the order of the file, sections included. A list is one key."""
    for field_name, field in model.model_fields.items():
        key = Key((*above, field.alias or field_name), model, field_name)
        yield key
        if key.section:
            yield from keys(key.section, key.path)


def section_in(annotation: Any, *, in_lists: bool = False) -> type[Section] | None:
    """The section that a type admits: itself, a member of a union, or an item of a list."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    if get_origin(annotation) is tuple and not in_lists:
        return None
    found = (section_in(one, in_lists=in_lists) for one in get_args(annotation))
    return next((section for section in found if section), None)


def without_links(text: str) -> str:
    """A description for a place that has no links: without references to other sections."""
    return re.sub(r"\[([^]]+)\]\([^)]+\)", r"\1", re.sub(r" See \[[^]]+\]\([^)]+\)\.", "", text))


@lru_cache
def descriptions(model: type[BaseModel]) -> Mapping[str, str]:
    """The text below each key, by the name of the file. It is read from the source when it is needed,
    because pydantic would read it at each start, which takes longer than to make the models."""
    found = {}
    for statement, below in pairwise(ast.iter_child_nodes(ast.parse(inspect.getsource(model)).body[0])):
        match statement, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                found[model.model_fields[name].alias or name] = " ".join(text.split())
    return found


def complete(tree: Any, model: type[Section]) -> Any:
    """The tree with every section in it. A section that is left out, or empty, has all its defaults."""
    if not isinstance(tree, dict):
        return tree
    opened = dict(tree)
    for name, field in model.model_fields.items():
        inner = section_in(field.annotation)
        if inner:
            opened[name] = complete({} if opened.get(name) is None else opened[name], inner)
    return opened


def values_of(section: Section) -> dict[str, Any]:
    """Every value by its dotted key, as a file would hold it."""
    dumped = section.model_dump(mode="json", by_alias=True)
    values: dict[str, Any] = {}
    for key in keys(type(section)):
        if not key.section:
            value: Any = dumped
            for step in key.path:
                value = value[step]
            values[key.name] = value
    return values


def differing(one: Section, other: Section) -> tuple[str, ...]:
    """The dotted keys in which two sections of a kind differ. A list differs as a whole."""
    others = values_of(other)
    return tuple(key for key, value in values_of(one).items() if value != others[key])


def put(tree: Any, path: KeyPath, value: Any) -> None:
    """Set a key of a tree. If the tree has no map on the way, nothing happens: that is a fault of its own."""
    for step in path[:-1]:
        if not isinstance(tree, dict):
            return
        if tree.get(step) is None:
            tree[step] = {}
        tree = tree[step]
    if isinstance(tree, dict):
        tree[path[-1]] = value
