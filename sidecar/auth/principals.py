"""The table of principals: what it says of a caller that the caller's credential does not say.

The file is `auth.principals`:

    principals:
      "agent-*": {kind: agent, groups: [bots], tenant_id: default}

Of several globs that match an id, the most specific one decides, as in the catalogue of actions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from sidecar.auth.identity import Identity
from sidecar.core.facts import IDENTIFIER_RULE, is_identifier
from sidecar.core.globs import GlobTable, is_glob, literal_prefix
from sidecar.core.principal import ANONYMOUS_ID, PrincipalKind
from sidecar.files.faults import ConfigurationError
from sidecar.files.yamlfile import contents, in_order, survey
from sidecar.settings.faults import Mistake, faults, validated
from sidecar.settings.keys import Section
from sidecar.settings.values import LIST, Identifier, Identifiers


@dataclass(frozen=True, slots=True)
class KnownPrincipal:
    """What the table says of the ids that a glob matches. None: it does not say."""

    kind: PrincipalKind | None = None
    groups: tuple[str, ...] | None = None
    tenant_id: str | None = None


class PrincipalTable:
    def __init__(self, known: Mapping[str, KnownPrincipal]) -> None:
        self.known = dict(known)
        self._table = GlobTable(self.known)

    def completed(self, identity: Identity) -> Identity:
        """An identity, with what the table says in the place of what its credential does not say."""
        found = self._table.find(identity.id)
        if found is None:
            return identity
        _, known = found
        return replace(
            identity,
            kind=identity.kind or known.kind,
            groups=known.groups if identity.groups is None else identity.groups,
            tenant_id=identity.tenant_id or known.tenant_id,
        )


NO_PRINCIPALS = PrincipalTable({})


class PrincipalFile(Section):
    """The file as a whole. Its entries are validated one by one."""

    example = '{principals: {"agent-*": {kind: agent}}}'

    principals: dict[str, Any]


class PrincipalSection(Section):
    """What is known of the callers whose ids a glob matches."""

    example = "{kind: agent, groups: [bots]}"

    kind: PrincipalKind | None = None
    groups: Annotated[Identifiers | None, LIST] = None
    tenant_id: Identifier | None = None

    def known(self) -> KnownPrincipal:
        return KnownPrincipal(kind=self.kind, groups=self.groups, tenant_id=self.tenant_id)


def read(file: Path) -> PrincipalTable:
    """The table of a file. Blocks. Raises ConfigurationError with every fault."""
    return parse(contents(file), str(file))


def parse(raw: bytes, file: str) -> PrincipalTable:
    """The table of the contents of a file. Raises ConfigurationError with every fault."""
    document, broken = survey(raw, file)
    if document is None:
        raise ConfigurationError(broken)
    known: dict[str, KnownPrincipal] = {}
    _, mistakes = validated(PrincipalFile, document.value)
    wrong = [*broken, *faults(document, mistakes)]
    entries = document.value.get("principals") if isinstance(document.value, dict) else None
    ranks: dict[tuple[str, int], str] = {}
    for glob, entry in entries.items() if isinstance(entries, dict) else ():
        path = ("principals", glob)
        section, mistakes = validated(PrincipalSection, entry)
        if not is_identifier(glob):
            mistakes.append(Mistake((), f"an id, or a glob of ids, is {IDENTIFIER_RULE}"))
        elif glob == ANONYMOUS_ID:
            mistakes.append(
                Mistake((), "is the caller without a credential; remove it, because nothing is known of it")
            )
        elif is_glob(glob):
            other = ranks.setdefault((literal_prefix(glob), len(glob)), glob)
            if other != glob:
                message = f"begins like {other} and is as long, so neither decides; make one longer"
                mistakes.append(Mistake((), message))
        wrong += faults(document, mistakes, path)
        if section is not None:
            known[glob] = section.known()
    if wrong:
        raise ConfigurationError(in_order(wrong))
    return PrincipalTable(known)
