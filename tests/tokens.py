"""An issuer of JSON Web Tokens for tests: its keys, its key set, and tokens that are right or wrong."""

from __future__ import annotations

import json
from base64 import urlsafe_b64encode
from collections.abc import Mapping
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import AllowedPrivateKeys, get_default_algorithms

ISSUER = "https://issuer.test"
AUDIENCE = "scopegate"

# Making an RSA key takes a tenth of a second, so all tests share these.
RSA_KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)
OTHER_RSA_KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)
EC_KEY = ec.generate_private_key(ec.SECP256R1())
P384_KEY = ec.generate_private_key(ec.SECP384R1())
P521_KEY = ec.generate_private_key(ec.SECP521R1())
ED_KEY = ed25519.Ed25519PrivateKey.generate()

# The key that signs with each algorithm.
SIGNING: Mapping[str, AllowedPrivateKeys] = {
    **dict.fromkeys(("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"), RSA_KEY),
    "ES256": EC_KEY,
    "ES384": P384_KEY,
    "ES512": P521_KEY,
    "EdDSA": ED_KEY,
}


def jwk(key: AllowedPrivateKeys, kid: str | None = None, **members: Any) -> dict[str, Any]:
    """The public part of a key as an entry of a set. A member that is `...` is left out."""
    kinds: dict[type[Any], str] = {rsa.RSAPrivateKey: "RS256", ec.EllipticCurvePrivateKey: "ES256"}
    algorithm = next((name for kind, name in kinds.items() if isinstance(key, kind)), "EdDSA")
    entry = get_default_algorithms()[algorithm].to_jwk(key.public_key(), as_dict=True)
    entry.pop("key_ops", None)
    entry |= {} if kid is None else {"kid": kid}
    return {name: value for name, value in {**entry, **members}.items() if value is not ...}


def private_jwk(key: AllowedPrivateKeys, kid: str) -> dict[str, Any]:
    """A key as it must never be published."""
    algorithm = "RS256" if isinstance(key, rsa.RSAPrivateKey) else "ES256"
    return {**get_default_algorithms()[algorithm].to_jwk(key, as_dict=True), "kid": kid}


def key_set(*entries: Mapping[str, Any]) -> bytes:
    return json.dumps({"keys": entries}).encode()


def claims(now: int, **more: Any) -> dict[str, Any]:
    """The claims of a token that is valid for an hour from `now`, in seconds since 1970.

    A claim that is `...` is left out.
    """
    found = {"iss": ISSUER, "aud": AUDIENCE, "sub": "alice", "exp": now + 3600, **more}
    return {name: value for name, value in found.items() if value is not ...}


def signed(
    payload: Mapping[str, Any] | bytes,
    key: AllowedPrivateKeys = RSA_KEY,
    algorithm: str = "RS256",
    **header: Any,
) -> str:
    """A token with these claims, or with these bytes in their place. `kid` is k1 if the header has none."""
    text = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    head = {name: value for name, value in {"kid": "k1", **header}.items() if value is not ...}
    return jwt.PyJWS().encode(text, key, algorithm, headers=head)


def assembled(header: Mapping[str, Any] | bytes, payload: Mapping[str, Any] | bytes, signature: bytes) -> str:
    """A token of parts that need not belong together."""
    parts = (part if isinstance(part, bytes) else json.dumps(part).encode() for part in (header, payload))
    return ".".join(b64(part) for part in (*parts, signature))


def signed_as(header: Mapping[str, Any] | bytes, payload: bytes, key: rsa.RSAPrivateKey = RSA_KEY) -> str:
    """A token with this header to the letter, and with a valid signature by RS256 over it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    begun = f"{b64(text)}.{b64(payload)}"
    return f"{begun}.{b64(get_default_algorithms()['RS256'].sign(begun.encode(), key))}"


def b64(part: bytes) -> str:
    return urlsafe_b64encode(part).rstrip(b"=").decode("ascii")
