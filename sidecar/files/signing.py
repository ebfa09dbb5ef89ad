"""Ed25519 keys: the private key signs checkpoints, and the public key verifies them."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from sidecar.core.checkpoint import Checkpoint
from sidecar.files import keyfiles
from sidecar.files.keyfiles import KeyFileUnusable


class PublicKey:
    """Verifies checkpoints. `id` identifies the key: the first 16 hex digits of the SHA-256 of the raw
    key."""

    def __init__(self, key: Ed25519PublicKey) -> None:
        self._key = key
        self.id = hashlib.sha256(key.public_bytes_raw()).hexdigest()[:16]

    def has_signed(self, checkpoint: Checkpoint) -> bool:
        """Whether this key signed the checkpoint, and the checkpoint is unchanged since."""
        try:
            self._key.verify(checkpoint.signature, checkpoint.message())
        except InvalidSignature:
            return False
        return checkpoint.key_id == self.id

    def pem(self) -> bytes:
        return self._key.public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )


class SigningKey:
    """Signs checkpoints."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public = PublicKey(key.public_key())

    @classmethod
    def generate(cls) -> SigningKey:
        return cls(Ed25519PrivateKey.generate())

    def checkpoint(self, *, writer: str, count: int, head: bytes, time: str) -> Checkpoint:
        """A signed checkpoint over the first `count` records of a writer."""
        said = Checkpoint(key_id=self.public.id, writer=writer, count=count, head=head.hex(), time=time)
        return replace(said, signature=self._key.sign(said.message()))

    def pem(self) -> bytes:
        return self._key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )


def load_signing_key(path: Path) -> SigningKey:
    """Read the private key from a file that only its owner may read. Raises KeyFileUnusable."""
    contents = keyfiles.secret(path)
    try:
        key = serialization.load_pem_private_key(contents, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        # Not raised from the cause, because the message of a library may repeat parts of the key.
        raise KeyFileUnusable("holds no Ed25519 private key (PEM, PKCS8, without a passphrase)")
    return SigningKey(key)


def load_public_key(path: Path) -> PublicKey:
    """Read the public key from a file. Raises KeyFileUnusable."""
    contents = keyfiles.public(path)
    try:
        key = serialization.load_pem_public_key(contents)
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise KeyFileUnusable("holds no Ed25519 public key (PEM)")
    return PublicKey(key)
