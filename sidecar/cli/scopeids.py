"""From a scope_id as tables and logs show it, which is its beginning, to the whole one."""

from __future__ import annotations

import re
from collections.abc import Sequence

from sidecar.cli.client import Caller
from sidecar.cli.options import failed
from sidecar.core.shortid import ABBREVIATION, PREFIX, SHORT_LENGTH
from sidecar.web.wire import answers

SCOPES = "/api/v1/scopes"
# New ids have 32 digits.
WHOLE_LENGTH = len(PREFIX) + 32
# The most candidates that are read. Even of millions of scopes, hardly two begin with the same eight digits.
CANDIDATES = 100


def whole_id(admin: Caller, given: str, tenant: str | None = None) -> str:
    """The scope_id that begins as given; the given text if no scope begins so.

    Of several tenants, only `tenant` counts. If several scopes begin so, the program ends and names them.
    """
    if len(given) >= WHOLE_LENGTH or not re.fullmatch(ABBREVIATION, given):
        return given
    page = admin.get(SCOPES, answers.ScopePage, scope_id_prefix=given, tenant_id=tenant, limit=CANDIDATES)
    found = sorted({scope["scope_id"] for scope in page.body["scopes"]})
    if not all(scope_id.startswith(given) for scope_id in found):
        raise admin.stranger(page.status, odd="scope_id")
    if len(found) > 1:
        more = ", and more" if page.body["next"] is not None else ""
        failed(f"{given} is not unique; name one of {', '.join(told_apart(found))}{more}")
    return found[0] if found else given


def told_apart(scope_ids: Sequence[str]) -> list[str]:
    """Each of these different ids, which are sorted, as far as it takes to tell it from the others."""
    shown: list[str] = []
    for index, scope_id in enumerate(scope_ids):
        beside = [*scope_ids[max(0, index - 1) : index], *scope_ids[index + 1 : index + 2]]
        length = SHORT_LENGTH
        while length < len(scope_id) and any(other.startswith(scope_id[:length]) for other in beside):
            length += 1
        shown.append(scope_id[:length])
    return shown
