"""The section `auth`: how callers prove who they are.

A method is configured if its main key is set: `tokens.file`, `jwt.issuer`, `mtls.id`, `proxy.header`.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import re
from collections.abc import Mapping
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ValidationInfo, model_validator

from sidecar.core.principal import Method
from sidecar.settings.addresses import endpoint
from sidecar.settings.faults import refuse
from sidecar.settings.keys import LIVE, Section
from sidecar.settings.numbers import whole_seconds
from sidecar.settings.values import LIST, NOT_EMPTY, File, HeaderName, Kind, Text, text

Network = IPv4Network | IPv6Network | Literal["unix"]
Area = Literal["gated", "scopes", "pass"]
CertificateName = Literal["uri", "dns", "common_name"]
# Asymmetric ones only: with HMAC, a public key would be a secret that everyone has.
Algorithm = Literal["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]

MAX_LEEWAY_SECONDS = 300


def _network(value: object) -> Network:
    if isinstance(value, IPv4Network | IPv6Network):
        return value
    given = text(value)
    if given == "unix":
        return "unix"
    try:
        return ipaddress.ip_network(given)
    except ValueError:
        raise ValueError(
            "expects an address such as 10.1.2.3, a network such as 10.1.0.0/16 (the bits of the host are "
            "0), or unix"
        ) from None


def _jwks(value: object, info: ValidationInfo) -> str:
    """An https URL as it is, or the path of a file, absolute."""
    given = text(value)
    if given.startswith("https://"):
        authority = re.split("[/?]", given.removeprefix("https://"), maxsplit=1)[0]
        if "@" in given or "#" in given or " " in given:
            raise ValueError("contains a user, a password, a fragment or a blank; write https://host/path")
        endpoint(authority)
        return given
    if "://" in given:
        raise ValueError("expects a file, or a URL that begins with https://")
    return str(Path((info.context or {}).get("folder", "."), given).absolute())


def _pyjwt(value: object) -> str:
    given = text(value)
    if importlib.util.find_spec("jwt") is None:
        raise ValueError("needs the [jwt] extra: pip install 'scopegate[jwt]'")
    return given


OptionalText = Annotated[str | None, Kind(text, {"type": "string", "minLength": 1}).optional()]


class TokensSection(Section):
    """Tokens that `scopegate auth token` makes, sent as `Bearer`."""

    file: File = None
    """The file of tokens, which holds their digests. `scopegate auth token` makes it. A change is in force
    within two seconds."""
    id_prefix: OptionalText = None
    """Text before each name of a token. It keeps its ids apart from those of other methods."""


class ClaimsSection(Section):
    """The claims of a JWT that say who asks."""

    id: Text = "sub"
    """The claim that holds the id."""
    groups: Text = "groups"
    """The claim that holds the list of groups."""
    kind: Text = "scopegate_kind"
    """The claim that holds the kind: `human`, `service` or `agent`. A token without it is of kind `service`,
    unless `auth.principals` says otherwise."""
    tenant: Text = "tenant"
    """The claim that holds the tenant. A token without it is of tenant `default`, unless `auth.principals`
    says otherwise."""


class JwtSection(Section):
    """Signed JSON Web Tokens of an identity provider, sent as `Bearer`. They need the `[jwt]` extra."""

    issuer: Annotated[str | None, Kind(_pyjwt, {"type": "string", "minLength": 1}).optional()] = None
    """The issuer (`iss`) of every token, to the letter."""
    audience: OptionalText = None
    """The audience (`aud`) that every token must have."""
    jwks: Annotated[str | None, Kind(_jwks, {"type": "string", "minLength": 1}).optional()] = None
    """The public keys of the issuer: a file, or an https URL. The keys of a URL are fetched in the
    background, and the last good ones stay in force."""
    ca_file: File = None
    """The authorities that sign the certificate of the URL (PEM). `null`: those that the system trusts."""
    algorithms: Annotated[tuple[Algorithm, ...], LIST, NOT_EMPTY] = ("RS256", "ES256")
    """The algorithms of signatures that are accepted. Those with a shared secret, and `none`, do not exist
    here."""
    leeway_seconds: Annotated[int, whole_seconds(0, MAX_LEEWAY_SECONDS)] = 0
    """Seconds by which the clock of the issuer may differ."""
    claims: ClaimsSection
    id_prefix: OptionalText = None
    """Text before each id. It keeps its ids apart from those of other methods."""

    @model_validator(mode="after")
    def _whole_or_absent(self) -> JwtSection:
        missing = [name for name in ("audience", "jwks") if getattr(self, name) is None]
        given = [name for name in ("audience", "jwks", "ca_file") if getattr(self, name) is not None]
        refuse(
            *((self.issuer and name, (name,), "is needed with auth.jwt.issuer; set it") for name in missing),
            *(
                (not self.issuer and name, (name,), "has no effect without auth.jwt.issuer; set both")
                for name in given
            ),
            (
                self.ca_file and self.jwks and not self.jwks.startswith("https://"),
                ("ca_file",),
                "has no effect, because jwks is a file; remove it",
            ),
        )
        return self


class MtlsSection(Section):
    """Client certificates, which `data.tls` or `admin.tls` verifies by its `client_ca_file`."""

    id: CertificateName | None = None
    """The name in the certificate that is the id: `uri` (as SPIFFE ids), `dns` or `common_name`. A
    certificate with two names of that type is refused."""
    id_prefix: OptionalText = None
    """Text before each id. It keeps its ids apart from those of other methods."""


class ProxySection(Section):
    """A trusted proxy before the sidecar that has authenticated the caller and names it in a header."""

    header: HeaderName = None
    """The header with the id. From every other peer than those in `trusted` it is ignored, and removed."""
    groups_header: HeaderName = None
    """The header with the groups, separated by commas."""
    trusted: Annotated[
        tuple[
            Annotated[Network, Kind(_network, {"type": "string", "minLength": 1}, str)],
            ...,
        ],
        LIST,
    ] = ()
    """The peers that are believed: addresses, networks, and `unix` for a Unix socket. Every program that can
    connect from there can be anyone."""
    id_prefix: OptionalText = None
    """Text before each id. It keeps its ids apart from those of other methods."""

    @model_validator(mode="after")
    def _whole_or_absent(self) -> ProxySection:
        without = "has no effect without auth.proxy.header; set both"
        refuse(
            (
                self.header and not self.trusted,
                ("header",),
                "is believed from no peer; name the proxy in auth.proxy.trusted",
            ),
            (not self.header and self.groups_header, ("groups_header",), without),
            (not self.header and self.trusted, ("trusted",), without),
            (
                self.header and self.groups_header and _same(self.header, self.groups_header),
                ("groups_header",),
                "is auth.proxy.header, too; name another header",
            ),
        )
        return self


def _same(one: str, other: str) -> bool:
    return one.lower().replace("_", "-") == other.lower().replace("_", "-")


class AuthSection(Section):
    """How callers prove who they are. Without any method every caller is `anonymous`, and may ask for
    everything. See [Who may do what](who.md)."""

    required: Annotated[bool, LIVE] = False
    """`true`: a caller that presents no credential is refused with 401. It needs a method."""
    required_on: Annotated[tuple[Area, ...], LIST, NOT_EMPTY, LIVE] = ("gated", "scopes")
    """Where `required` holds: `gated` requests, `scopes` calls, and `pass` for requests that pass through. It
    holds on the admin listener in any case."""
    tokens: TokensSection
    jwt: JwtSection
    mtls: MtlsSection
    proxy: ProxySection
    principals: File = None
    """The file that says of ids what a credential does not say: `principals: {"agent-*": {kind: agent,
    groups: [bots], tenant_id: default}}`."""

    @property
    def prefixes(self) -> Mapping[Method, str | None]:
        """The configured methods, each with its prefix of ids."""
        found: dict[Method, str | None] = {}
        if self.tokens.file is not None:
            found["tokens"] = self.tokens.id_prefix
        if self.jwt.issuer is not None:
            found["jwt"] = self.jwt.id_prefix
        if self.mtls.id is not None:
            found["mtls"] = self.mtls.id_prefix
        if self.proxy.header is not None:
            found["proxy"] = self.proxy.id_prefix
        return found

    @property
    def methods(self) -> tuple[Method, ...]:
        """The configured methods."""
        return tuple(self.prefixes)

    @model_validator(mode="after")
    def _something_to_present(self) -> AuthSection:
        message = (
            "would refuse every caller, because no method is configured; set auth.tokens.file, for example"
        )
        refuse(
            (self.required and not self.methods, ("required",), message),
            (
                self.principals and not self.methods,
                ("principals",),
                "has no effect without a method; configure one",
            ),
        )
        return self
