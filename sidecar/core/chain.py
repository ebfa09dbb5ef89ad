"""The hash chain of the decision log. Each link covers the exact bytes that are stored."""

from __future__ import annotations

from hashlib import sha256

GENESIS = bytes(32)


def link(previous: bytes, envelope: bytes) -> bytes:
    """The hash of a record: `SHA-256(previous || envelope)`.

    `previous` is the hash of the previous record.
    """
    return sha256(previous + envelope).digest()
