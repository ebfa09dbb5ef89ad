"""The words in which models of answers are written: types of members, and marks beside a type.

A model is a `TypedDict`. Handlers make it, so mypy checks each answer at no cost at run time. The OpenAPI
document and the checks of the command line are made from it. This module imports next to nothing, because
health checks use it.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any

if sys.version_info >= (3, 12):
    from typing import TypedDict as TypedDict
else:
    from typing_extensions import TypedDict as TypedDict  # Pydantic reads no other one there


class Keywords:
    """Keywords of JSON Schema beside a type, such as `Annotated[str, Keywords(format="date-time")]`."""

    def __init__(self, **keywords: Any) -> None:
        self.keywords = keywords

    def __get_pydantic_json_schema__(self, core_schema: Any, handler: Any) -> dict[str, Any]:
        return {**handler(core_schema), **self.keywords}


# Marks a member that earlier versions of the sidecar leave out.
LATER = "later"
# Marks an object in which other versions of the sidecar have other members of the same type.
OPEN = "open"

Time = Annotated[str, Keywords(format="date-time")]
Dollars = Annotated[float, Keywords(minimum=0)]
Count = Annotated[int, Keywords(minimum=0)]
