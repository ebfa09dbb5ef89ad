"""Changes of the file of tokens: every change writes a new file beside the old one, and renames it.

A reader therefore sees the old file or the new one. A lock on the folder lets two changes at once follow each
other, and each begins with what the other has written.
"""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sidecar.auth.tokens import Token, parse, read
from sidecar.core.instant import iso_time

_HEADING = """\
# Tokens, as the SHA-256 of each. `scopegate auth token` and `scopegate auth revoke` write this file anew, and
# keep no comments. A sidecar reads a change within two seconds.
"""


def existing(file: Path) -> tuple[Token, ...]:
    """The tokens of the file; none if there is no file. Raises ConfigurationError."""
    return read(file).tokens if os.path.lexists(file) else ()


def change(file: Path, changed: Callable[[tuple[Token, ...]], Sequence[Token]]) -> None:
    """Replace the tokens of the file by what `changed` makes of them, with times in whole seconds. If it
    does not exist, it is created.

    Raises ConfigurationError if the present file cannot be read, OSError if a new one cannot be written, and
    ValueError if the new tokens would be read otherwise, such as one with a fraction of a second in a time;
    then nothing is changed.
    """
    target = Path(os.path.realpath(file))  # a link stays a link
    with _locked(target.parent):
        before = existing(target)
        after = tuple(changed(before))
        if after == before:
            return
        text = written(after)
        # What the reader makes of the text decides, before it replaces anything.
        if parse(text, str(file)).tokens != after:
            raise ValueError(f"these tokens cannot be written to {file}: {after}")
        _replace(target, text)


def written(tokens: Sequence[Token]) -> bytes:
    """The contents of a file with these tokens: one line for each."""
    # JSON in a flow mapping is YAML.
    lines = [f"  - {{{', '.join(_as_json(members(token)))}}}\n" for token in tokens]
    body = "tokens:\n" + "".join(lines) if lines else "tokens: []\n"
    return (_HEADING + body).encode()


def members(token: Token) -> dict[str, Any]:
    """A token as its entry in the file and as `auth list --json` show it."""
    return {
        "name": token.name,
        "kind": token.kind,
        "groups": None if token.groups is None else list(token.groups),
        "tenant_id": token.tenant_id,
        "sha256": token.digest.hex(),
        "created_at": time_text(token.created_at),
        "not_after": None if token.not_after is None else time_text(token.not_after),
    }


def _as_json(entry: Mapping[str, Any]) -> Iterator[str]:
    return (f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in entry.items())


def time_text(instant: int) -> str:
    """A time to the second, in UTC."""
    return f"{iso_time(instant)[:19]}Z"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    number = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(number, fcntl.LOCK_EX)
        yield
    finally:
        os.close(number)


def _replace(target: Path, text: bytes) -> None:
    """Put a file in the place of another one, with the same owner and the same permissions."""
    number, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")  # mode 0600
    try:
        with open(number, "wb") as stream:
            with suppress(FileNotFoundError):
                status = os.stat(target)
                if (status.st_uid, status.st_gid) != (os.geteuid(), os.getegid()):
                    # A sidecar that runs as the owner must be able to read what root has written.
                    os.fchown(number, status.st_uid, status.st_gid)
                os.fchmod(number, status.st_mode & 0o777)
            stream.write(text)
            stream.flush()
            os.fsync(number)
        os.replace(name, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise
    folder = os.open(target.parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
