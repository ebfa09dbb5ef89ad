"""The token that a command presents: from a file or the environment, never from its arguments.

Other users of a host can read the arguments of a process, and shells keep them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from sidecar.settings.variables import TOKEN, TOKEN_FILE

if TYPE_CHECKING:
    from sidecar.cli.client import ProblemError

# A sidecar reads 8,190 bytes of a header.
MAX_TOKEN_CHARS = 8_000
# The characters of a token in `Authorization` (RFC 9110, 11.2, with those of RFC 6750).
_TOKEN = re.compile("[!-~]+")

_PASS = f"pass a valid token with --token-file FILE, {TOKEN_FILE} or {TOKEN}"


class TokenUnusableError(Exception):
    """A token cannot be sent. The message says where it comes from, why, and what to do, not the token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """A bearer token, and what it was read from."""

    text: str = field(repr=False)
    source: str


def token_of(file: Path | None, environment: Mapping[str, str]) -> Token | None:
    """The token of the file, else of SCOPEGATE_TOKEN_FILE, else of SCOPEGATE_TOKEN, else None. An empty
    variable counts as not set. Raises TokenUnusableError."""
    if file is None and environment.get(TOKEN_FILE):
        file = Path(environment[TOKEN_FILE])
    if file is not None:
        return _checked(_read(file), str(file))
    if environment.get(TOKEN):
        return _checked(environment[TOKEN], TOKEN)
    return None


def advice(problem: ProblemError, token: Token | None) -> str | None:
    """What a user can do about an answer that asks for a credential or a role; None for other answers."""
    match problem.body["error"]:
        case "unauthenticated" if token is not None:
            return f"the token of {token.source} is not valid here, or no longer; {_PASS}"
        case "unauthenticated":
            return f"{_PASS}, or a client certificate with --cert and --key"
        case "role_required":
            role = problem.body.get("role")
            missing = f"the role {role}" if isinstance(role, str) else "a role"
            caller = "the caller" if token is None else f"the owner of the token of {token.source}"
            return f"{caller} lacks {missing}; an operator gives it in `roles:` of the policies, or {_PASS}"
        case _:
            return None


def _read(file: Path) -> str:
    from sidecar.files.keyfiles import KeyFileUnusable, secret

    try:
        content = secret(file)
    except KeyFileUnusable as exc:
        raise TokenUnusableError(f"{file}: {exc}") from exc
    text = content.decode("utf-8", "replace").removesuffix("\n").removesuffix("\r")
    if not text.strip():
        raise TokenUnusableError(f"{file}: holds no token; write the token into it, as one line")
    if "\n" in text or "\r" in text:
        raise TokenUnusableError(f"{file}: has several lines; write the token alone into it, as one line")
    return text


def _checked(text: str, source: str) -> Token:
    if not _TOKEN.fullmatch(text):
        raise TokenUnusableError(
            f"{source}: the token has a character that no header may hold; a token has printable characters "
            "of ASCII and no blanks"
        )
    if len(text) > MAX_TOKEN_CHARS:
        raise TokenUnusableError(
            f"{source}: the token has {len(text):,} characters, more than {MAX_TOKEN_CHARS:,}, which no "
            "sidecar reads; give the file of the token"
        )
    return Token(text=text, source=source)
