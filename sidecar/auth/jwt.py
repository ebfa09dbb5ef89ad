"""JSON Web Tokens of one issuer (RFC 7519), signed with an asymmetric algorithm.

PyJWT verifies the signature. Everything else is checked here, because the time is that of the sidecar's
clock, and because two readers must not find different claims in a token:

1. A token has three parts in canonical base64url and strict JSON in them.
2. Its header names the algorithm, which must be a configured one and fit the key, and the key (`kid`). A key
   within the header (`jwk`, `jku`, `x5u`, `x5c`) is never looked at. A header with `crit` is refused.
3. Issuer and audience are the configured ones. It has an expiry, and neither begins nor was issued in the
   future.
4. A claim that says something of its holder says it well, or the token is refused.
"""

from __future__ import annotations

import re
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, get_args

from jwt import PyJWS
from jwt.exceptions import PyJWTError

from sidecar.auth.failure import AuthFailure
from sidecar.auth.identity import Identity
from sidecar.auth.jwks import IssuerKeys
from sidecar.core.facts import IDENTIFIER_RULE, is_identifier
from sidecar.core.instant import SECOND
from sidecar.core.principal import PrincipalKind
from sidecar.files.strictjson import NotJson, parse
from sidecar.settings.auth import JwtSection

MAX_CHARS = 16 * 1024
_KINDS: Mapping[str, PrincipalKind] = {kind: kind for kind in get_args(PrincipalKind)}
_PART = re.compile(r"[A-Za-z0-9_-]+", re.ASCII)

Claims = Mapping[str, Any]


class _Refused(Exception):
    """Why a token is not accepted. The message repeats no part of it."""


class JwtVerifier:
    """Verifies the tokens of the issuer of a section with its keys."""

    def __init__(self, section: JwtSection, keys: IssuerKeys) -> None:
        self._section = section
        self._keys = keys
        self._leeway = section.leeway_seconds * SECOND
        # It knows no other algorithms, so neither HMAC nor `none` can verify anything.
        self._jws = PyJWS(algorithms=section.algorithms)

    def identity(self, token: str, now: int) -> Identity | AuthFailure:
        """The holder of a token. `now` is in microseconds since 1970."""
        try:
            claims = self._verified(token)
            self._check_origin(claims)
            ends = self._check_times(claims, now)
            return self._holder(claims, ends)
        except _Refused as exc:
            return AuthFailure("jwt", f"the token is not accepted: {exc}")

    def _verified(self, token: str) -> Claims:
        """The claims of a token whose signature is valid."""
        parts = token.split(".", 3) if len(token) <= MAX_CHARS else []
        if len(parts) != 3:
            raise _Refused(f"it is no signed JSON Web Token of at most {MAX_CHARS} characters")
        header, _, _ = (_decoded(part) for part in parts)
        algorithm, kid = _named_in(_json(header))
        if algorithm not in self._section.algorithms:
            raise _Refused("its algorithm is none of auth.jwt.algorithms")
        found = self._keys.find(kid, algorithm)
        if isinstance(found, str):
            raise _Refused(found)
        try:
            verified = self._jws.decode_complete(token, found.key, algorithms=[algorithm])
        except PyJWTError as exc:
            raise _Refused("its signature is not valid") from exc
        return _json(verified["payload"])

    def _check_origin(self, claims: Claims) -> None:
        """Whether the token comes from the issuer, and is meant for this sidecar."""
        if claims.get("iss") != self._section.issuer:
            raise _Refused("its issuer (iss) is not auth.jwt.issuer")
        audience = claims.get("aud")
        if self._section.audience not in (audience if isinstance(audience, list) else [audience]):
            raise _Refused("its audience (aud) is not auth.jwt.audience")

    def _check_times(self, claims: Claims, now: int) -> int:
        """The time at which the token is no longer accepted, in microseconds since 1970."""
        ends = _instant(claims, "exp")
        if ends is None:
            raise _Refused("it has no expiry (exp)")
        ends += self._leeway
        if now >= ends:
            raise _Refused("it has expired")
        for name, message in (("nbf", "it is not valid yet"), ("iat", "it was issued in the future")):
            begins = _instant(claims, name)
            if begins is not None and begins - self._leeway > now:
                raise _Refused(message)
        return ends

    def _holder(self, claims: Claims, ends: int) -> Identity:
        names = self._section.claims
        holder = claims.get(names.id)
        if not is_identifier(holder):
            raise _Refused(f"its claim {names.id} must be {IDENTIFIER_RULE}")
        kind = tenant = groups = None
        if names.kind in claims:
            named = claims[names.kind]
            kind = _KINDS.get(named) if isinstance(named, str) else None
            if kind is None:
                raise _Refused(f"its claim {names.kind} must be one of {', '.join(_KINDS)}")
        if names.groups in claims:
            listed = claims[names.groups]
            groups = tuple(dict.fromkeys(_texts(listed, f"its claim {names.groups}")))
        if names.tenant in claims:
            tenant = claims[names.tenant]
            if not is_identifier(tenant):
                raise _Refused(f"its claim {names.tenant} must be {IDENTIFIER_RULE}")
        return Identity(id=holder, kind=kind, groups=groups, tenant_id=tenant, expires_at=ends)


def _decoded(part: str) -> bytes:
    """The bytes of a part. Only one text stands for them, so that no text can be changed unnoticed."""
    if _PART.fullmatch(part) and len(part) % 4 != 1:
        decoded = urlsafe_b64decode(part + "=" * (-len(part) % 4))
        if urlsafe_b64encode(decoded).rstrip(b"=").decode("ascii") == part:
            return decoded
    raise _Refused("it is not encoded as a JSON Web Token")


def _json(part: bytes) -> Claims:
    try:
        return parse(part)
    except NotJson as exc:
        raise _Refused("it does not hold strict JSON objects") from exc


def _named_in(header: Claims) -> tuple[str, str | None]:
    """The algorithm and the key that a header names."""
    algorithm, kid = header.get("alg"), header.get("kid")
    if "crit" in header or header.get("b64", True) is not True:
        raise _Refused("its header demands extensions (crit)")
    if not isinstance(algorithm, str):
        raise _Refused("its header names no algorithm (alg)")
    if "kid" in header and not isinstance(kid, str):
        raise _Refused("its header names no key (kid) as text")
    return algorithm, kid


def _instant(claims: Claims, name: str) -> int | None:
    """A time in microseconds since 1970, or None if there is none."""
    if name not in claims:
        return None
    value = claims[name]
    if type(value) is int or isinstance(value, Decimal):
        return int(value * SECOND)
    raise _Refused(f"its claim {name} must be a number of seconds")


def _texts(value: object, name: str) -> list[str]:
    """The texts of a list, or the one text that stands for a list of it."""
    listed = value if isinstance(value, list) else [value]
    texts = [each for each in listed if is_identifier(each)]
    if len(texts) < len(listed):
        raise _Refused(f"{name} must be a text or a list of texts, each {IDENTIFIER_RULE}")
    return texts
