"""Reads regular files without blocking: opening a pipe would otherwise wait for its writer."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path


class NotRegular(OSError):
    """The name is that of a pipe, a device or a folder. `strerror` is empty."""


def read_regular(path: Path, most: int, check: Callable[[os.stat_result], None] | None = None) -> bytes:
    """At most this number of bytes of a file. `check` sees its status before it is read.

    Raises OSError, and NotRegular if it is no regular file.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as stream:
        status = os.fstat(stream.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise NotRegular("is not a regular file")
        if check is not None:
            check(status)
        return stream.read(most)
