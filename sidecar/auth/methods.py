"""The methods of authentication that are configured, as one immutable value of a moment.

A method finds out who holds a credential. What follows is the same for all of them: the prefix of its ids,
that the id is well-formed and not `anonymous`, and what the table of principals says of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from typing import Any, Protocol

from sidecar.auth.callers import NO_CALLERS, Callers
from sidecar.auth.certificates import CertificateNames
from sidecar.auth.failure import AuthFailure
from sidecar.auth.identity import Identity
from sidecar.auth.proxy import TrustedProxies
from sidecar.auth.tokens import PREFIX
from sidecar.core.facts import IDENTIFIER_RULE, is_identifier
from sidecar.core.principal import ANONYMOUS_ID, Method, Principal
from sidecar.settings.auth import AuthSection

# The most credentials whose holders are cached, by their digests.
MOST_CACHED = 4_096

Found = Principal | AuthFailure


class Bearers(Protocol):
    """A method whose credential is a text that the caller bears."""

    def identity(self, token: str, now: int) -> Identity | AuthFailure:
        """The holder of a token. `now` is in microseconds since 1970."""


class Certificates(Protocol):
    def identity(self, certificate: Mapping[str, Any]) -> Identity | AuthFailure:
        """The holder of a verified client certificate, as `ssl.SSLObject.getpeercert` gives it."""


class Proxies(Protocol):
    def trusts(self, peer: str) -> bool:
        """Whether a peer is believed: an IP address as text, or `unix`."""

    def identity(self, ids: Sequence[str], groups: Sequence[str]) -> Identity | AuthFailure:
        """The caller that a trusted proxy names, by all values of its two headers."""


class Methods:
    """The configured methods. One that is None is not configured.

    The holders of bearer credentials are cached, because to verify a signature takes longer than all the rest
    of a request. The cache belongs to this value, and is emptied when the keys change.
    """

    def __init__(
        self,
        callers: Callers = NO_CALLERS,
        *,
        jwt: Bearers | None = None,
        mtls: Certificates | None = None,
        proxy: Proxies | None = None,
        prefixes: Mapping[Method, str | None] | None = None,
    ) -> None:
        self.callers = callers
        self.jwt = jwt
        self.mtls = mtls
        self.proxy = proxy
        methods: tuple[tuple[Method, object], ...] = (
            ("tokens", callers.tokens),
            ("jwt", jwt),
            ("mtls", mtls),
            ("proxy", proxy),
        )
        # The names of the configured methods, which each request reads.
        self.names = tuple(name for name, method in methods if method is not None)
        # Whether a method takes a text that the caller bears.
        self.takes_bearers = callers.tokens is not None or jwt is not None
        self._prefixes = dict(prefixes or {})
        # None as the time: the credential does not expire.
        self._holders: dict[bytes, tuple[Principal, int | None]] = {}

    @classmethod
    def configured(
        cls,
        auth: AuthSection,
        callers: Callers = NO_CALLERS,
        *,
        jwt: Bearers | None = None,
    ) -> Methods:
        """The methods of a section. What reads files or fetches keys is made elsewhere, and passed."""
        return cls(
            callers,
            jwt=jwt,
            mtls=None if auth.mtls.id is None else CertificateNames(auth.mtls.id),
            proxy=None if auth.proxy.header is None else TrustedProxies(auth.proxy.trusted),
            prefixes=auth.prefixes,
        )

    def replaced(self, callers: Callers) -> Methods:
        """The same methods with the contents of newer files."""
        return Methods(callers, jwt=self.jwt, mtls=self.mtls, proxy=self.proxy, prefixes=self._prefixes)

    def bearer(self, token: str, clock: Callable[[], int]) -> Found:
        """The principal that bears a token. `clock` is in microseconds since 1970."""
        digest = sha256(token.encode("utf-8", "surrogateescape")).digest()
        known = self._holders.get(digest)
        if known is not None and (known[1] is None or clock() < known[1]):
            return known[0]
        # No JSON Web Token begins like this, because each begins with an encoded brace.
        method: Method = "tokens" if token.startswith(PREFIX) or self.jwt is None else "jwt"
        verifier = self.callers.tokens if method == "tokens" else self.jwt
        if verifier is None:
            return AuthFailure("tokens", "no method takes a bearer token of this kind here")
        found = verifier.identity(token, clock())
        principal = self._principal(found, method)
        if isinstance(principal, Principal) and isinstance(found, Identity):
            if len(self._holders) >= MOST_CACHED:
                self._holders.clear()
            self._holders[digest] = principal, found.expires_at
        return principal

    def forget(self) -> None:
        """Verify every credential anew, because the keys that verified it have changed."""
        self._holders.clear()

    def certificate(self, certificate: Mapping[str, Any]) -> Found:
        """The principal that a verified client certificate names."""
        assert self.mtls is not None
        return self._principal(self.mtls.identity(certificate), "mtls")

    def proxied(self, ids: Sequence[str], groups: Sequence[str]) -> Found:
        """The principal that a trusted proxy names."""
        assert self.proxy is not None
        return self._principal(self.proxy.identity(ids, groups), "proxy")

    def _principal(self, found: Identity | AuthFailure, method: Method) -> Found:
        if isinstance(found, AuthFailure):
            return found
        identity = replace(found, id=(self._prefixes.get(method) or "") + found.id)
        if not is_identifier(identity.id):
            return AuthFailure(method, f"the id of the caller must be {IDENTIFIER_RULE}")
        if identity.id == ANONYMOUS_ID:
            return AuthFailure(method, f"no caller can be {ANONYMOUS_ID} by a credential")
        return self.callers.principals.completed(identity).principal(method)


# Nothing is configured: every caller is anonymous.
NO_METHODS = Methods()
