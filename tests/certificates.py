"""A certificate authority for tests, and certificates that it signs."""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import NameOID

DAY = timedelta(days=1)


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, as files."""

    certificate_file: Path
    key_file: Path

    def settings(self, **more: Path) -> dict[str, str]:
        """The `tls` section that names them."""
        named = {"certificate_file": self.certificate_file, "key_file": self.key_file, **more}
        return {key: str(path) for key, path in named.items()}

    def replace(self, other: Pair) -> None:
        """Other contents in the same files, as a renewal leaves them."""
        self.certificate_file.write_bytes(other.certificate_file.read_bytes())
        self.key_file.write_bytes(other.key_file.read_bytes())


class Authority:
    """Signs certificates for the name `gate.test` and the address 127.0.0.1, unless told otherwise."""

    def __init__(self, folder: Path, name: str = "authority") -> None:
        self._folder = folder
        self._name = name
        self._key = ec.generate_private_key(ec.SECP256R1())
        self.certificate_file = folder / f"{name}.pem"
        self._own = self._signed(name, self._key.public_key(), authority=True)
        self.certificate_file.write_bytes(self._own.public_bytes(Encoding.PEM))

    def issue(
        self,
        name: str,
        *,
        host: str = "gate.test",
        address: str = "127.0.0.1",
        days: float = 1,
        passphrase: bytes | None = None,
        hosts: Sequence[str] = (),
        uris: Sequence[str] = (),
    ) -> Pair:
        """A certificate that ends in so many days; it has ended where they are negative.

        `hosts` are further DNS names, and `uris` are names such as those of SPIFFE.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        names: list[x509.GeneralName] = [x509.DNSName(each) for each in (host, *hosts) if each]
        names += [x509.IPAddress(ip_address(address)), *map(x509.UniformResourceIdentifier, uris)]
        certificate = self._signed(name, key.public_key(), names=names, days=days)
        pair = Pair(self._folder / f"{name}.pem", self._folder / f"{name}.key")
        pair.certificate_file.write_bytes(certificate.public_bytes(Encoding.PEM))
        hidden = NoEncryption() if passphrase is None else BestAvailableEncryption(passphrase)
        pair.key_file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, hidden))
        return pair

    def client(self, pair: Pair | None = None) -> ssl.SSLContext:
        """What a client speaks TLS with that trusts this authority, and nobody else."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(self.certificate_file)
        if pair is not None:
            context.load_cert_chain(pair.certificate_file, pair.key_file)
        return context

    def server(self, pair: Pair, *, asks_clients: bool = False) -> ssl.SSLContext:
        """What a backend speaks TLS with, to those only whom this authority signed if it asks them."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pair.certificate_file, pair.key_file)
        if asks_clients:
            context.load_verify_locations(self.certificate_file)
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def _signed(
        self,
        name: str,
        key: ec.EllipticCurvePublicKey,
        *,
        authority: bool = False,
        names: Sequence[x509.GeneralName] = (),
        days: float = 1,
    ) -> x509.Certificate:
        ends = datetime.now(UTC) + timedelta(days=days)
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, self._name)]))
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(min(ends, datetime.now(UTC)) - DAY)
            .not_valid_after(ends)
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        )
        if not authority:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(self._key, hashes.SHA256())
