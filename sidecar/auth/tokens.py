"""Tokens that the sidecar makes itself: bearer credentials, kept in a file as their digests.

A token is 256 random bits, so its SHA-256 does not reveal it and needs no salt. The file is
`auth.tokens.file`:

    tokens:
      - {name: ci, kind: agent, groups: [oncall], sha256: 9f86..., created_at: 2026-12-01T08:00:00Z}

1. Only the owner of the file may read it. Its digests are no secrets, but a file that others can write lets
   them in.
2. A name may have several tokens, so that a new one can be in use before the old one is revoked.
3. A token without `kind`, `groups` or `tenant_id` takes them from the table of principals.
"""

from __future__ import annotations

import hmac
import os
import re
import secrets
import string
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

from pydantic import PlainValidator

from sidecar.auth.failure import AuthFailure
from sidecar.auth.identity import Identity
from sidecar.core.instant import SECOND, parse_time
from sidecar.core.principal import PrincipalKind
from sidecar.core.valueclass import valueclass
from sidecar.files.faults import ConfigurationError, Fault
from sidecar.files.keyfiles import KeyFileUnusable, secret
from sidecar.files.yamlfile import Document, in_order, survey
from sidecar.settings.faults import Mistake, faults, kind, validated
from sidecar.settings.keys import Section
from sidecar.settings.values import LIST, Identifier, Identifiers

PREFIX = "sg_"
ALPHABET = string.digits + string.ascii_uppercase + string.ascii_lowercase
# 62 ** 43 is the first power of 62 above 2 ** 256.
_CHARS = 43
# A token takes some 250 bytes, so the file holds several thousand.
MAX_FILE_BYTES = 1_048_576

_DIGEST = re.compile("[0-9a-f]{64}")
# The same words for a token that does not exist and for one that has ended.
NOT_VALID = "the token is not valid, or no longer"


@valueclass
class Token:
    """One entry of the file. Times are in microseconds since 1970 (UTC); a token is valid before `not_after`,
    and without it until it is revoked."""

    name: str
    digest: bytes
    created_at: int
    not_after: int | None = None
    kind: PrincipalKind | None = None
    groups: tuple[str, ...] | None = None
    tenant_id: str | None = None

    def is_expired(self, now: int) -> bool:
        return self.not_after is not None and now >= self.not_after

    def identity(self) -> Identity:
        return Identity(
            id=self.name,
            kind=self.kind,
            groups=self.groups,
            tenant_id=self.tenant_id,
            expires_at=self.not_after,
        )


def new_secret() -> str:
    """A new token: `sg_` and 256 random bits in base 62."""
    number = secrets.randbits(256)
    digits = []
    for _ in range(_CHARS):
        number, digit = divmod(number, len(ALPHABET))
        digits.append(ALPHABET[digit])
    return PREFIX + "".join(reversed(digits))


def digest_of(token: str) -> bytes:
    return sha256(token.encode("utf-8", "surrogateescape")).digest()


class TokenSet:
    def __init__(self, tokens: Sequence[Token]) -> None:
        self.tokens = tuple(tokens)
        # Looking a token up by a part of its digest takes no time that depends on the rest of it.
        self._by_start: dict[bytes, list[Token]] = {}
        for token in self.tokens:
            self._by_start.setdefault(token.digest[:8], []).append(token)

    def identity(self, token: str, now: int) -> Identity | AuthFailure:
        """The holder of a token. `now` is in microseconds since 1970."""
        digest = digest_of(token)
        for known in self._by_start.get(digest[:8], ()):
            if hmac.compare_digest(known.digest, digest) and not known.is_expired(now):
                return known.identity()
        return AuthFailure("tokens", NOT_VALID)


# Reading a file -----------------------------------------------------------------------------------------


def _digest(value: object) -> bytes:
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        raise ValueError(
            "expects the SHA-256 of a token, 64 hex digits in lower case; `scopegate auth token` writes it"
        )
    return bytes.fromhex(value)


def _time(value: object) -> int:
    if not isinstance(value, str):
        raise ValueError(f"expects a time such as 2026-12-01T08:00:00Z, found {kind(value)}")
    try:
        # To the second, as the file is written. A token with a fraction of a second in its end ends earlier.
        return parse_time(value) // SECOND * SECOND
    except ValueError as exc:
        raise ValueError("expects a time with its offset from UTC, such as 2026-12-01T08:00:00Z") from exc


_Time = Annotated[int, PlainValidator(_time)]


class TokenFile(Section):
    """The file as a whole. Its tokens are validated one by one."""

    example = "{tokens: []}"

    tokens: list[Any]


class TokenSection(Section):
    """One token."""

    example = "{name: ci, sha256: 9f86..., created_at: 2026-12-01T08:00:00Z}"

    name: Identifier
    kind: PrincipalKind | None = None
    groups: Annotated[Identifiers | None, LIST] = None
    tenant_id: Identifier | None = None
    sha256: Annotated[bytes, PlainValidator(_digest)]
    created_at: _Time
    not_after: _Time | None = None

    def token(self) -> Token:
        return Token(
            name=self.name,
            digest=self.sha256,
            created_at=self.created_at,
            not_after=self.not_after,
            kind=self.kind,
            groups=self.groups,
            tenant_id=self.tenant_id,
        )


def read(file: Path) -> TokenSet:
    """The tokens of a file. Blocks. Raises ConfigurationError with every fault."""
    try:
        raw = secret(file, MAX_FILE_BYTES + 1)
    except KeyFileUnusable as exc:
        makes = "" if os.path.lexists(file) else "; `scopegate auth token NAME` makes it"
        raise ConfigurationError([Fault(str(file), "", f"{exc}{makes}")]) from exc
    return parse(raw, str(file))


def parse(raw: bytes, file: str) -> TokenSet:
    """The tokens of the contents of a file. Raises ConfigurationError with every fault."""
    document, broken = survey(raw, file)
    if document is None:
        raise ConfigurationError(broken)
    found, wrong = list[Token](), list(broken)
    _, mistakes = validated(TokenFile, document.value)
    wrong += faults(document, mistakes)
    entries = document.value.get("tokens") if isinstance(document.value, dict) else None
    places: dict[bytes, str] = {}
    for number, entry in enumerate(entries if isinstance(entries, list) else ()):
        token, faulty = _entry(document, number, entry, places)
        wrong += faulty
        if token is not None:
            found.append(token)
    if wrong:
        raise ConfigurationError(in_order(wrong))
    return TokenSet(found)


def _entry(
    document: Document, number: int, entry: Any, places: dict[bytes, str]
) -> tuple[Token | None, list[Fault]]:
    """One entry. `places` holds the places of the digests before it, and gets its own."""
    path = ("tokens", number)
    section, mistakes = validated(TokenSection, entry)
    if section is not None:
        first = places.setdefault(section.sha256, document.place(path))
        if first != document.place(path):
            mistakes.append(Mistake(("sha256",), f"is already at {first}; remove one of them"))
    return None if section is None else section.token(), list(faults(document, mistakes, path))
