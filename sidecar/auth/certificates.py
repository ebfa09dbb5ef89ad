"""Client certificates: the name in a verified certificate that says who its holder is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sidecar.auth.failure import AuthFailure
from sidecar.auth.identity import Identity
from sidecar.settings.auth import CertificateName

# How Python's ssl calls the types of names: of the alternative names, and of the parts of a subject.
_ALTERNATIVE = {"uri": "URI", "dns": "DNS"}
_COMMON_NAME = "commonName"
_SHOWN = {"uri": "URI", "dns": "DNS name", "common_name": "common name"}


class CertificateNames:
    """Reads the name of one type. The TLS handshake has verified the certificate before.

    A certificate with two names of that type is refused, because either could be meant. A DNS name is taken
    in lower case, because DNS does not tell cases apart.
    """

    def __init__(self, kind: CertificateName) -> None:
        self._kind = kind

    def identity(self, certificate: Mapping[str, Any]) -> Identity | AuthFailure:
        """The holder of a certificate, in the shape of `ssl.SSLObject.getpeercert()`."""
        names = tuple(self._names(certificate))
        shown = _SHOWN[self._kind]
        if len(names) != 1:
            count = "no" if not names else "more than one"
            return AuthFailure("mtls", f"the client certificate has {count} {shown}, and needs exactly one")
        if self._kind != "dns":
            return Identity(id=names[0])
        if "*" in names[0]:
            return AuthFailure("mtls", "the DNS name of the client certificate has a wildcard")
        return Identity(id=names[0].lower())

    def _names(self, certificate: Mapping[str, Any]) -> Iterator[str]:
        if self._kind == "common_name":
            pairs = (pair for part in certificate.get("subject", ()) for pair in part)
            wanted = _COMMON_NAME
        else:
            pairs = iter(certificate.get("subjectAltName", ()))
            wanted = _ALTERNATIVE[self._kind]
        return (value for kind, value in pairs if kind == wanted)
