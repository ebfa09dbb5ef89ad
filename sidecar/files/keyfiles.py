"""Key files: checks their permissions, reads them and creates new ones. No message repeats their contents."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from sidecar.errors import ScopegateError
from sidecar.files._regular import NotRegular, read_regular

MAX_BYTES = 65_536
MIN_MASK_KEY_BYTES = 16
# Common servers read 8 KiB of a header.
MAX_HEADER_BYTES = 8_000
# RFC 9110, section 5.5, with the bytes above ASCII that it calls obsolete.
_HEADER_VALUE = re.compile(rb"[!-~\x80-\xff]([\t -~\x80-\xff]*[!-~\x80-\xff])?")


class KeyFileUnusable(ScopegateError, ValueError):
    """A key file cannot be used. The message says why, and never shows the contents of the file."""


def secret(path: Path, most: int = MAX_BYTES) -> bytes:
    """At most this number of bytes of a file that only its owner may read. Raises KeyFileUnusable."""
    return _contents(path, _check_private, most)


def public(path: Path) -> bytes:
    """The contents of a file that everyone may read. Raises KeyFileUnusable."""
    return _contents(path)


def mask_key(path: Path) -> bytes:
    """The key for masks: the bytes of the file without trailing line ends. Raises KeyFileUnusable."""
    key = secret(path).rstrip(b"\r\n")
    if len(key) < MIN_MASK_KEY_BYTES:
        raise KeyFileUnusable(f"has fewer than {MIN_MASK_KEY_BYTES} bytes, which can be guessed")
    return key


def header_value(path: Path) -> bytes:
    """The value of a header that a file holds as its only line. Raises KeyFileUnusable."""
    raw = _contents(path)
    value = raw.removesuffix(b"\n").removesuffix(b"\r")
    if not value:
        raise KeyFileUnusable("is empty")
    if len(value) > MAX_HEADER_BYTES:
        raise KeyFileUnusable(f"has more than {MAX_HEADER_BYTES:,} bytes, which no backend reads as a header")
    if b"\n" in value or b"\r" in value:
        raise KeyFileUnusable("has several lines")
    if not _HEADER_VALUE.fullmatch(value):
        raise KeyFileUnusable(
            "begins or ends with a blank, or has a control character, which no header may hold"
        )
    return value


def create(path: Path, contents: bytes, mode: int) -> None:
    """Create a file and sync it to the disk. Raises OSError, and leaves no file then."""
    number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with open(number, "wb") as stream:
            stream.write(contents)
            stream.flush()
            os.fsync(number)
    except OSError:
        with suppress(OSError):
            os.unlink(path)
        raise


def _check_private(status: os.stat_result) -> None:
    """Check that only the owner may read the file. If root owns it, the group of the file may read it, too.

    The files of a Kubernetes Secret have such permissions. PostgreSQL has the same rule for its server key.
    """
    mode = stat.S_IMODE(status.st_mode)
    handed = status.st_uid == 0 and os.geteuid() != 0
    if mode & (0o037 if handed else 0o077):
        raise KeyFileUnusable(
            f"may be read or written by others than its owner (mode {mode:04o}); "
            "chmod 600 it, and replace its contents if others may have read it"
        )


def _contents(
    path: Path, check: Callable[[os.stat_result], None] | None = None, most: int = MAX_BYTES
) -> bytes:
    try:
        return read_regular(path, most, check)
    except NotRegular as exc:
        raise KeyFileUnusable(str(exc)) from exc
    except OSError as exc:
        raise KeyFileUnusable(f"cannot be read ({exc.strerror or exc})") from exc
