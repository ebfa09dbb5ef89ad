"""The hash chain of the decision log. Each link covers the exact bytes that are stored."""

from __future__ import annotations

from hashlib import sha256

GENESIS = bytes(32)


def link(previous: bytes, envelope: bytes) -> bytes:
    """`SHA-256(previous || envelope)`: a record's hash, given the hash before it (gate.md, Decision log)."""
    return sha256(previous + envelope).digest()
