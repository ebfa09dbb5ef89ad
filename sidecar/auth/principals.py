"""The principals file: what it says of ids that a credential does not say itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sidecar.auth.identity import Identity
from sidecar.core.globs import GlobTable, is_glob
from sidecar.core.principal import DEFAULT_TENANT, Method, Principal, PrincipalKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """One entry of the file."""

    kind: PrincipalKind = "service"
    groups: tuple[str, ...] = ()
    tenant_id: str = DEFAULT_TENANT


UNDESCRIBED = Described()


class PrincipalTable:
    """The entries by id or glob. The id itself decides before a glob, a longer glob before a shorter one."""

    def __init__(self, entries: Mapping[str, Described] | None = None) -> None:
        entries = entries or {}
        self._named = {name: entry for name, entry in entries.items() if not is_glob(name)}
        self._by_glob = GlobTable({name: entry for name, entry in entries.items() if is_glob(name)})

    def principal(self, identity: Identity, method: Method) -> Principal:
        """The principal of an identity. What its credential says counts before the file."""
        entry = self._named.get(identity.id)
        if entry is None:
            found = self._by_glob.find(identity.id)
            entry = UNDESCRIBED if found is None else found[1]
        return Principal(
            id=identity.id,
            kind=identity.kind or entry.kind,
            groups=entry.groups if identity.groups is None else identity.groups,
            tenant_id=identity.tenant_id or entry.tenant_id,
            method=method,
        )
