"""Makes TLS contexts of Python's ssl from PEM files, and explains why a file cannot be used.

Contexts accept TLS 1.2 or newer and HTTP/1.1 only. The certificate and the name of a server are always
verified; no setting disables that. A renewal replaces the whole context and never changes one, so that no
connection sees half of a renewal.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Mapping
from datetime import datetime
from hashlib import sha256
from pathlib import Path

from sidecar.errors import ScopegateError
from sidecar.files._regular import NotRegular, read_regular

MAX_BYTES = 16 << 20  # the CA bundle of a system is smaller than 1 MiB
# How often the files are read again if they change while they are read.
TRIES = 3

_NO_PEM = "contains no {what} in PEM; name a file that does"


class TlsFileUnusable(ScopegateError, ValueError):
    """A file of a certificate, a key or an authority cannot be used. The message never repeats its contents.

    `key` is the last part of the configuration key that names it.
    """

    def __init__(self, key: str, path: Path, reason: str) -> None:
        super().__init__(f"{key}: {path} {reason}")
        self.key, self.path, self.reason = key, path, reason


class _PassphraseWanted(Exception):
    """Raised when OpenSSL would ask for a passphrase on the terminal."""


def server_context(
    certificate_file: Path,
    key_file: Path,
    client_ca_file: Path | None = None,
    *,
    is_optional: bool = False,
) -> ssl.SSLContext:
    """The context of a listener. With `client_ca_file`, clients must show a certificate that it signed.

    If `is_optional`, a client may also show none. One that another authority signed is refused all the same.
    Raises TlsFileUnusable.
    """
    context = _strict(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
    _load_pair(context, certificate_file, key_file)
    if client_ca_file is not None:
        _load_authority(context, "client_ca_file", client_ca_file)
        context.verify_mode = ssl.CERT_OPTIONAL if is_optional else ssl.CERT_REQUIRED
    return context


def client_context(
    ca_file: Path | None = None, certificate_file: Path | None = None, key_file: Path | None = None
) -> ssl.SSLContext:
    """The context of connections to the backend. Without `ca_file` it uses the trust store of the system.

    Raises TlsFileUnusable.
    """
    context = _strict(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))  # this protocol verifies certificate and name
    if ca_file is None:
        context.load_default_certs()
    else:
        _load_authority(context, "ca_file", ca_file)
    if certificate_file is not None and key_file is not None:
        _load_pair(context, certificate_file, key_file)
    return context


def valid_until(certificate_file: Path) -> datetime:
    """When the first certificate in a file expires, which is the one that peers see. Raises
    TlsFileUnusable."""
    return _ends("certificate_file", certificate_file)[0]


def last_valid_until(authority_file: Path) -> datetime:
    """When the last of the authorities in a file expires. Raises TlsFileUnusable."""
    return max(_ends("ca_file", authority_file))


def _ends(key: str, path: Path) -> list[datetime]:
    """When each certificate in a file expires. There is at least one."""
    from cryptography import x509  # slow to import, and used only with TLS

    text = _contents(key, path)
    try:
        return [each.not_valid_after_utc for each in x509.load_pem_x509_certificates(text)]
    except ValueError as exc:
        raise TlsFileUnusable(key, path, _NO_PEM.format(what="certificate")) from exc


def describe_failure(exc: BaseException | None) -> str:
    """Describe the failure of a connection, TLS or not, for a message and without a full stop."""
    if isinstance(exc, ssl.SSLCertVerificationError):
        return exc.verify_message.rstrip(".")
    if isinstance(exc, ssl.SSLError) and exc.reason:
        return exc.reason.replace("_", " ").lower()
    return str(exc or "closed")


class Credentials:
    """The context of one listener, or of the connections to the upstream, and its source files."""

    def __init__(
        self, name: str, files: Mapping[str, Path | None], make: Callable[..., ssl.SSLContext]
    ) -> None:
        """`files` maps keyword arguments of `make` to paths. Blocks. Raises ScopegateError."""
        self.name = name
        self._files = dict(files)
        self._make = make
        # Taken before the context is made, so that `renew` notices a change in the meantime.
        self._held = self._looked_at = self._digest()
        try:
            self.context, self.ends = self._made()
        except TlsFileUnusable as exc:
            raise ScopegateError(f"{name}.tls.{exc}") from exc

    def renew(self) -> bool:
        """Make a new context if the files have changed; True if a new one is in force. Blocks.

        Raises TlsFileUnusable if the new files cannot be used, once for each change. The old context then
        stays in force.
        """
        found = self._digest()
        for _ in range(TRIES):
            if found == self._looked_at:
                return False
            made, unusable = None, None
            try:
                made = self._made()
            except TlsFileUnusable as exc:
                unusable = exc
            before, found = found, self._digest()
            if found != before:
                continue  # the files changed meanwhile, so certificate and key may not belong together
            self._looked_at = found
            if unusable is not None:
                raise unusable
            if made is None or found == self._held:
                return False  # the files are again those of the context in force
            (self.context, self.ends), self._held = made, found
            return True
        return False  # the files still change, and the next call tries again

    def _made(self) -> tuple[ssl.SSLContext, datetime | None]:
        certificate = self._files.get("certificate_file")
        ends = None if certificate is None else valid_until(certificate)
        return self._make(**self._files), ends

    def _digest(self) -> bytes:
        """A hash of what the files hold, or of why they cannot be read."""
        whole = sha256()
        for key, path in self._files.items():
            if path is None:
                continue
            try:
                content = b"+" + _contents(key, path)
            except TlsFileUnusable as exc:
                content = b"-" + str(exc).encode("utf-8", "surrogateescape")
            whole.update(len(content).to_bytes(8, "big") + content)
        return whole.digest()


def _strict(context: ssl.SSLContext) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    # Trust every certificate in the file as an authority, even if another authority has signed it.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context


def _load_pair(context: ssl.SSLContext, certificate_file: Path, key_file: Path) -> None:
    valid_until(certificate_file)
    _contents("key_file", key_file)

    def no_prompt() -> str:
        raise _PassphraseWanted

    try:
        context.load_cert_chain(certificate_file, key_file, no_prompt)
    except _PassphraseWanted as exc:
        reason = "has a passphrase; store the key without one, because the sidecar cannot ask for it"
        raise TlsFileUnusable("key_file", key_file, reason) from exc
    except ssl.SSLError as exc:
        if exc.reason == "KEY_VALUES_MISMATCH":
            reason = "does not belong to the certificate; name the key of the certificate"
            raise TlsFileUnusable("key_file", key_file, reason) from exc
        if exc.reason is None or exc.reason in ("NO_START_LINE", "PEM_LIB", "UNSUPPORTED"):
            reason = _NO_PEM.format(what="private key")
            raise TlsFileUnusable("key_file", key_file, reason) from exc
        reason = f"cannot be used ({describe_failure(exc)}); have a new certificate made"
        raise TlsFileUnusable("certificate_file", certificate_file, reason) from exc
    except OSError as exc:
        raise TlsFileUnusable("certificate_file", certificate_file, _unread(exc)) from exc


def _load_authority(context: ssl.SSLContext, key: str, path: Path) -> None:
    _contents(key, path)
    try:
        context.load_verify_locations(path)
    except ssl.SSLError as exc:
        raise TlsFileUnusable(key, path, _NO_PEM.format(what="certificate")) from exc
    except OSError as exc:
        raise TlsFileUnusable(key, path, _unread(exc)) from exc


def _contents(key: str, path: Path) -> bytes:
    try:
        return read_regular(path, MAX_BYTES)
    except NotRegular as exc:
        raise TlsFileUnusable(key, path, f"{exc}; name a file in PEM") from exc
    except OSError as exc:
        raise TlsFileUnusable(key, path, _unread(exc)) from exc


def _unread(exc: OSError) -> str:
    return f"cannot be read ({exc.strerror or exc}); check the name and the permissions"
