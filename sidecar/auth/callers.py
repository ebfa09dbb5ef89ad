"""The files that say who callers are: the tokens and the table of principals. A reload reads them again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sidecar.auth import principals, tokens
from sidecar.auth.principals import NO_PRINCIPALS, PrincipalTable
from sidecar.auth.tokens import TokenSet
from sidecar.files.faults import ConfigurationError, Fault
from sidecar.settings.auth import AuthSection


@dataclass(frozen=True, slots=True)
class Callers:
    """The tokens, None where they are not configured, and the table of principals."""

    tokens: TokenSet | None = None
    principals: PrincipalTable = NO_PRINCIPALS

    def differing(self, other: Callers) -> Iterator[str]:
        """The keys of the files that say something else."""
        if (self.tokens and self.tokens.tokens) != (other.tokens and other.tokens.tokens):
            yield "auth.tokens.file"
        if self.principals.known != other.principals.known:
            yield "auth.principals"


NO_CALLERS = Callers()


def files_of(auth: AuthSection) -> tuple[Path, ...]:
    return tuple(file for file in (auth.tokens.file, auth.principals) if file is not None)


def read(auth: AuthSection) -> Callers:
    """The contents of the files. Blocks. Raises ConfigurationError with the faults of both."""
    faults: list[Fault] = []
    found, table = None, NO_PRINCIPALS
    try:
        if auth.tokens.file is not None:
            found = tokens.read(auth.tokens.file)
    except ConfigurationError as exc:
        faults += exc.faults
    try:
        if auth.principals is not None:
            table = principals.read(auth.principals)
    except ConfigurationError as exc:
        faults += exc.faults
    if faults:
        raise ConfigurationError(faults)
    return Callers(found, table)
