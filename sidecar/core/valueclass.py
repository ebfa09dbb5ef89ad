"""The decorator of values that every request makes.

A frozen dataclass assigns each field through `object.__setattr__`, so making one takes three times as long as
making a plain one. `@valueclass` makes a plain dataclass that mypy takes for a frozen one: an assignment to a
field is an error of the type check, and costs nothing at run time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar, dataclass_transform

Class = TypeVar("Class")


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field,))
def valueclass(cls: type[Class]) -> type[Class]:
    """Make the class a dataclass with slots, whose fields are named in calls and never change."""
    return dataclass(slots=True, kw_only=True)(cls)
