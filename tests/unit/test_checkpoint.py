"""A checkpoint says what was signed, in one spelling only, and shows whatever is changed about it."""

from __future__ import annotations

import hashlib
import json
from base64 import b64encode
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from sidecar.core.checkpoint import DOMAIN, Checkpoint
from sidecar.files.keyfiles import KeyFileUnusable, create
from sidecar.files.signing import SigningKey, load_public_key, load_signing_key

KEY = SigningKey.generate()
SIGNED = KEY.checkpoint(
    writer="w-1", count=1_000, head=bytes(range(32)), time="2026-01-02T03:04:05.000006+00:00"
)


def test_a_line_is_read_as_it_was_written() -> None:
    line = SIGNED.line()
    assert line.endswith(b"}\n")
    assert line.count(b"\n") == 1
    assert Checkpoint.parse(line) == SIGNED
    assert json.loads(line) == {
        "key_id": KEY.public.id,
        "writer": "w-1",
        "count": 1_000,
        "head": bytes(range(32)).hex(),
        "time": "2026-01-02T03:04:05.000006+00:00",
        "signature": b64encode(SIGNED.signature).decode(),
    }


def test_the_signature_covers_the_sorted_members_behind_a_name_of_their_own() -> None:
    told = json.loads(SIGNED.line())
    del told["signature"]
    message = DOMAIN + json.dumps(told, sort_keys=True, separators=(",", ":")).encode()
    public = load_pem_public_key(KEY.public.pem())
    assert isinstance(public, Ed25519PublicKey)
    public.verify(SIGNED.signature, message)
    assert KEY.public.id == hashlib.sha256(public.public_bytes_raw()).hexdigest()[:16]
    assert DOMAIN.startswith(b"scopegate checkpoint")


def test_only_the_key_that_signed_says_so() -> None:
    assert KEY.public.has_signed(SIGNED)
    assert not SigningKey.generate().public.has_signed(SIGNED)


def test_whatever_is_changed_the_signature_no_longer_fits() -> None:
    for changed in (
        replace(SIGNED, writer="w-2"),
        replace(SIGNED, count=999),
        replace(SIGNED, head="0" * 64),
        replace(SIGNED, time="2026-01-02T03:04:05.000007+00:00"),
        replace(SIGNED, key_id="0" * 16),
        replace(SIGNED, signature=b""),
        replace(SIGNED, signature=bytes(64)),
    ):
        assert not KEY.public.has_signed(changed)


def test_every_byte_of_a_line_counts() -> None:
    line = SIGNED.line()
    for place in range(len(line)):
        for bit in (1, 0x20, 0x80):
            altered = bytearray(line)
            altered[place] ^= bit
            try:
                found = Checkpoint.parse(bytes(altered))
            except ValueError:
                continue
            # Another key's id is another key's line; all else is found out.
            assert found.key_id != KEY.public.id or not KEY.public.has_signed(found)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"\n",
        b"null\n",
        b"[]\n",
        b"{}\n",
        b"\xff\n",
        SIGNED.line()[:-1],
        b" " + SIGNED.line(),
        SIGNED.line().replace(b",", b", "),
        SIGNED.line().replace(b'"count":1000', b'"count":1000.0'),
        SIGNED.line().replace(b'"count":1000', b'"count":true'),
        SIGNED.line().replace(b'"count":1000', b'"count":-1'),
        SIGNED.line().replace(b'"count":1000', b'"count":1,"count":1000'),
        SIGNED.line().replace(b'"w-1"', b"null"),
        SIGNED.line().replace(b'"w-1"', b'"w-1","more":"x"'),
        SIGNED.line().replace(b"0001", b"00 1"),
        SIGNED.line().replace(b"1f", b"1F"),
        SIGNED.line().replace(b'=","time', b'==","time'),
        b"[" * 100_000 + b"\n",
    ],
)
def test_a_line_that_is_spelled_otherwise_is_none(line: bytes) -> None:
    with pytest.raises((ValueError, RecursionError)):
        Checkpoint.parse(line)


def test_keys_come_back_from_their_files(tmp_path: Path) -> None:
    create(tmp_path / "key", KEY.pem(), 0o600)
    create(tmp_path / "key.pub", KEY.public.pem(), 0o644)
    assert load_signing_key(tmp_path / "key").public.id == KEY.public.id
    assert load_public_key(tmp_path / "key.pub").has_signed(SIGNED)
    with pytest.raises(KeyFileUnusable, match="no Ed25519 public key"):
        load_public_key(tmp_path / "key")
    with pytest.raises(KeyFileUnusable, match="cannot be read"):
        load_public_key(tmp_path / "gone")


def test_a_key_file_is_never_overwritten(tmp_path: Path) -> None:
    create(tmp_path / "key", b"old", 0o600)
    with pytest.raises(FileExistsError):
        create(tmp_path / "key", b"new", 0o600)
    assert (tmp_path / "key").read_bytes() == b"old"
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
