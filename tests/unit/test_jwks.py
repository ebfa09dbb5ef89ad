"""Key sets: which keys of a document verify tokens, and which documents are refused."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from sidecar.auth.jwks import MAX_BYTES, IssuerKeys, KeySet, Times, parse, read
from sidecar.files.faults import ConfigurationError
from sidecar.telemetry.metrics import Metrics
from tests.support import eventually
from tests.tokens import (
    EC_KEY,
    ED_KEY,
    OTHER_RSA_KEY,
    P384_KEY,
    P521_KEY,
    RSA_KEY,
    jwk,
    key_set,
    private_jwk,
)

RSA_ALGORITHMS = {"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"}


def faults(raw: bytes) -> list[str]:
    with pytest.raises(ConfigurationError) as refused:
        parse(raw, "jwks.json")
    return [str(fault) for fault in refused.value.faults]


def kids(keys: KeySet) -> list[str | None]:
    return [key.kid for key in keys.keys]


# A document ---------------------------------------------------------------------------------------------


def test_each_key_verifies_the_algorithms_of_its_type() -> None:
    found = parse(
        key_set(
            *(jwk(RSA_KEY, "a"), jwk(EC_KEY, "b"), jwk(P384_KEY, "c"), jwk(P521_KEY, "d"), jwk(ED_KEY, "e")),
            jwk(OTHER_RSA_KEY, "f", alg="PS256", use="sig", key_ops=["verify"]),
        ),
        "jwks.json",
    )
    assert {key.kid: set(key.algorithms) for key in found.keys} == {
        "a": RSA_ALGORITHMS,
        "b": {"ES256"},
        "c": {"ES384"},
        "d": {"ES512"},
        "e": {"EdDSA"},
        "f": {"PS256"},
    }
    assert found.ignored == ()


def test_members_that_are_not_known_do_not_matter() -> None:
    document = {"keys": [jwk(RSA_KEY, "a", x5c=["MII"], x5t="x", exp=5, ext=True)], "more": {"a": [1]}}
    assert kids(parse(b"\n " + json.dumps(document).encode(), "jwks.json")) == ["a"]


SHORT_KEY = rsa.generate_private_key(public_exponent=65537, key_size=1024)
NOT_ON_THE_CURVE = jwk(EC_KEY, "x", x=jwk(EC_KEY)["y"])


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (jwk(RSA_KEY, "x", use="enc"), "is not for verifying signatures"),
        (jwk(RSA_KEY, "x", key_ops=["encrypt"]), "is not for verifying signatures"),
        (jwk(RSA_KEY, "x", alg="RSA-OAEP"), "is for an algorithm that does not fit its type"),
        (jwk(RSA_KEY, "x", alg="HS256"), "is for an algorithm that does not fit its type"),
        (jwk(RSA_KEY, "x", alg=None), "is for an algorithm that does not fit its type"),
        (jwk(EC_KEY, "x", alg="ES384"), "is for an algorithm that does not fit its type"),
        (jwk(EC_KEY, "x", crv="secp256k1"), "is of a type that is not known here"),
        (jwk(EC_KEY, "x", crv=["P-256"]), "is of a type that is not known here"),
        ({"kty": "AKP", "pub": "x"}, "is of a type that is not known here"),
        ({"kty": ["RSA"]}, "is of a type that is not known here"),
        ({}, "is of a type that is not known here"),
        (jwk(SHORT_KEY, "x"), "has 1024 bits, and needs 2048 to 8192"),
        (jwk(RSA_KEY, "x", n=...), "is not a well-formed key of its type"),
        (jwk(RSA_KEY, "x", n="!"), "is not a well-formed key of its type"),
        (jwk(RSA_KEY, "x", n=["AQAB"]), "is not a well-formed key of its type"),
        (jwk(RSA_KEY, "x", e=""), "is not a well-formed key of its type"),
        (jwk(EC_KEY, "x", y="AQAB"), "is not a well-formed key of its type"),
        (NOT_ON_THE_CURVE, "is not a well-formed key of its type"),
        (jwk(ED_KEY, "x", x="AQAB"), "is not a well-formed key of its type"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_key_that_verifies_no_signature_here_is_ignored(entry: dict[str, Any], said: str) -> None:
    found = parse(key_set(entry, jwk(RSA_KEY, "good")), "jwks.json")
    assert kids(found) == ["good"]
    assert found.ignored == (f"jwks.json:1:11: {said}",)
    assert faults(key_set(entry)) == [
        f"jwks.json:1:2: has no key that verifies signatures; jwks.json:1:11: {said}"
    ]


@pytest.mark.parametrize(
    ("entry", "member"),
    [
        (private_jwk(RSA_KEY, "x"), "d"),
        (private_jwk(EC_KEY, "x"), "d"),
        (jwk(RSA_KEY, "x", p="AQAB"), "p"),
        (jwk(RSA_KEY, "x", use="enc", qi="AQAB"), "qi"),
        ({"kty": "oct", "k": "c2VjcmV0", "kid": "x"}, "k"),
        ({"kty": "oct"}, "k"),
        ({"kty": "AKP", "priv": "c2VjcmV0"}, "priv"),
    ],
)
def test_a_set_with_a_secret_is_refused_as_a_whole(entry: dict[str, Any], member: str) -> None:
    (said,) = faults(key_set(entry, jwk(RSA_KEY, "good")))
    assert said == (
        f"jwks.json:1:11: holds a secret (member {member}); publish public keys only, and replace this one"
    )


def test_every_mistake_is_named_at_its_place_and_no_key_is_repeated() -> None:
    entries = [5, jwk(RSA_KEY, ""), jwk(RSA_KEY, "a"), private_jwk(EC_KEY, "b"), jwk(RSA_KEY, "a")]
    found = faults(b'{"keys": [\n' + b",\n".join(json.dumps(entry).encode() for entry in entries) + b"]}")
    assert found == [
        "jwks.json:2:1: must be a JSON object",
        "jwks.json:3:1: has a kid that is no text of 1 to 256 characters",
        "jwks.json:5:1: holds a secret (member d); publish public keys only, and replace this one",
        "jwks.json:6:1: another key of the set is also called a",
    ]
    secret = private_jwk(EC_KEY, "b")["d"]
    assert not any(secret in said or jwk(RSA_KEY)["n"] in said for said in found)


def test_two_keys_of_one_name_are_told_apart_by_their_algorithms() -> None:
    assert kids(parse(key_set(jwk(RSA_KEY, "a"), jwk(EC_KEY, "a")), "jwks.json")) == ["a", "a"]


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", 'jwks.json: is no JSON Web Key Set; it must be JSON of the form {"keys": [...]}'),
        (b"<html>", 'jwks.json: is no JSON Web Key Set; it must be JSON of the form {"keys": [...]}'),
        (b"keys: []", 'jwks.json: is no JSON Web Key Set; it must be JSON of the form {"keys": [...]}'),
        (b"[]", 'jwks.json: is no JSON Web Key Set; it must be JSON of the form {"keys": [...]}'),
        (b"{}", 'jwks.json:1:1: is no JSON Web Key Set; it must have a list "keys"'),
        (b'{"keys": {}}', 'jwks.json:1:2: is no JSON Web Key Set; it must have a list "keys"'),
        (b'{"keys": []}', "jwks.json:1:2: has no key that verifies signatures"),
        (b'{"keys": [}', "jwks.json:1:11: is not JSON here (Expecting value); correct it"),
        (b'{"keys": [], "keys": []}', "jwks.json:1:14: keys is already in line 1; remove one of them"),
        (b'{"\xff": 1}', "jwks.json:1:3: is not UTF-8 here; save the file as UTF-8"),
        (b"{" * 200_000, "jwks.json:1:2: is not JSON here"),
        (b'{"a":' * 50_000, "jwks.json: is nested more than 128 levels deep; make it flatter"),
        (
            b'{"keys": [' + b" " * MAX_BYTES + b"]}",
            f"jwks.json: is larger than {MAX_BYTES} bytes, so it is no JSON Web Key Set",
        ),
    ],
    ids=range(13),
)
def test_a_document_that_is_no_key_set_is_refused(raw: bytes, said: str) -> None:
    (found,) = faults(raw)
    assert found.startswith(said)


# A file -------------------------------------------------------------------------------------------------


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    file = tmp_path / "jwks.json"
    with pytest.raises(ConfigurationError, match=r"jwks\.json: cannot be read \(No such file"):
        read(file)
    file.write_bytes(key_set(jwk(RSA_KEY, "a")))
    assert kids(read(file)) == ["a"]


async def test_a_file_is_read_again_when_it_changes_and_the_last_good_keys_are_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    file, metrics, changes = tmp_path / "jwks.json", Metrics(), list[str | None]()
    file.write_bytes(key_set(jwk(RSA_KEY, "a")))
    keys = IssuerKeys(str(file), metrics=metrics, times=Times(look=3600))
    keys.on_change = lambda: changes.extend(kids(keys.keys))
    await keys.start()
    try:
        assert changes == ["a"]
        for _ in range(3):
            await keys.look(file)  # nothing has changed
        file.write_bytes(key_set(jwk(RSA_KEY, "b"), jwk(EC_KEY, "c", use="enc")))
        await keys.look(file)
        assert (kids(keys.keys), changes) == (["b"], ["a", "b"])
        file.write_text('{"keys": [')
        for _ in range(3):
            await keys.look(file)  # one line for each change
        file.unlink()
        for _ in range(3):
            await keys.look(file)
        assert kids(keys.keys) == ["b"]
        file.write_bytes(key_set(jwk(RSA_KEY, "b"), jwk(EC_KEY, "c", use="enc")))
        await keys.look(file)
        assert changes == ["a", "b"]
    finally:
        await keys.close()
    lines = [(record.levelname, record.message) for record in caplog.records]
    kept = ("ERROR", "the keys of the issuer could not be read; the last good ones stay in force")
    in_force = ("INFO", "the keys of the issuer are in force")
    assert lines == [in_force, in_force, kept, kept, in_force]
    assert vars(caplog.records[1])["ignored"] == (
        f"{file}:1:{_column(file)}: is not for verifying signatures",
    )
    assert "jwks.json:1:11: is not JSON here" in vars(caplog.records[2])["cause"]
    assert "No such file" in vars(caplog.records[3])["cause"]
    page = metrics.page().decode()
    assert "scopegate_jwt_keys 1.0" in page
    assert "scopegate_jwt_key_failures_total 2.0" in page


def _column(file: Path) -> int:
    """The column of the second key."""
    return file.read_text().index('{"kty": "EC"') + 1


async def test_a_change_of_a_file_is_found_without_being_asked(tmp_path: Path) -> None:
    file = tmp_path / "jwks.json"
    file.write_bytes(key_set(jwk(RSA_KEY, "a")))
    keys = IssuerKeys(str(file), metrics=Metrics(), times=Times(look=0.01))
    await keys.start()
    try:
        file.write_text("{")
        await eventually(lambda: keys._failures == 1)
        file.write_bytes(key_set(jwk(RSA_KEY, "b")))
        await eventually(lambda: kids(keys.keys) == ["b"])
    finally:
        await keys.close()
    assert not keys.reading


@pytest.mark.parametrize("text", [None, "{", '{"keys": []}'])
async def test_a_file_that_cannot_be_used_at_the_start_is_an_error(tmp_path: Path, text: str | None) -> None:
    file = tmp_path / "jwks.json"
    if text is not None:
        file.write_text(text)
    keys = IssuerKeys(str(file), metrics=Metrics())
    with pytest.raises(ConfigurationError, match=r"jwks\.json"):
        await keys.start()
    await keys.close()


async def test_an_unknown_kid_fetches_no_file(tmp_path: Path) -> None:
    file = tmp_path / "jwks.json"
    file.write_bytes(key_set(jwk(RSA_KEY, "a")))
    keys = IssuerKeys(str(file), metrics=Metrics(), times=Times(look=3600))
    await keys.start()
    try:
        assert keys.find("b", "RS256") == "its issuer has no key of this name (kid)"
        await asyncio.sleep(0)
    finally:
        await keys.close()
