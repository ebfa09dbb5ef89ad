"""The two `tls` sections of the configuration, and what their files must hold together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationInfo, model_validator

from sidecar.files import tls
from sidecar.files.yamlfile import KeyPath
from sidecar.settings.keys import Below, Section
from sidecar.settings.values import File, HostName


class ListenTls(Section):
    """TLS on a listener: off without a certificate."""

    certificate_file: File = None
    """a certificate in PEM, with those between it and its authority; with it the listener speaks TLS"""
    key_file: File = None
    """its key, without a passphrase"""
    client_ca_file: File = None
    """who signs clients' certificates; then a client needs one"""

    @model_validator(mode="after")
    def _what_belongs_together(self, info: ValidationInfo) -> ListenTls:
        wrong = _half_a_pair(self.certificate_file, self.key_file)
        if self.client_ca_file is not None and self.certificate_file is None:
            message = "asks nobody for a certificate without certificate_file; give both"
            wrong.append((("client_ca_file",), message))
        if wrong:
            raise Below(wrong)
        if self.certificate_file is not None:
            _try(lambda: tls.server_context(**self.files()), info)
        return self

    def files(self) -> dict[str, Any]:
        """As `tls.server_context` takes them."""
        return {name: getattr(self, name) for name in ListenTls.model_fields}


class UpstreamTls(Section):
    """TLS towards the backend, which an https:// url switches on."""

    ca_file: File = None
    """who signs the certificate of an https backend; `null`: whom this system trusts"""
    certificate_file: File = None
    """the certificate that is shown to it"""
    key_file: File = None
    """its key, without a passphrase"""
    server_name: HostName = None
    """the name in its certificate, where that is not the host of the url"""

    @model_validator(mode="after")
    def _what_belongs_together(self, info: ValidationInfo) -> UpstreamTls:
        wrong = _half_a_pair(self.certificate_file, self.key_file)
        if wrong:
            raise Below(wrong)
        if any(self.files().values()):
            _try(lambda: tls.client_context(**self.files()), info)
        return self

    def files(self) -> dict[str, Any]:
        """As `tls.client_context` takes them."""
        return {name: getattr(self, name) for name in ("ca_file", "certificate_file", "key_file")}


def _half_a_pair(certificate: Path | None, key: Path | None) -> list[tuple[KeyPath, str]]:
    if certificate is not None and key is None:
        return [(("certificate_file",), "needs key_file, too; name the key that it was made for")]
    if key is not None and certificate is None:
        return [(("key_file",), "does nothing without certificate_file; give both")]
    return []


def _try(make: Callable[[], object], info: ValidationInfo) -> None:
    """Whether TLS can use the files, unless the context says that keys are not read."""
    if (info.context or {}).get("read_keys", True):
        try:
            make()
        except tls.TlsFileUnusable as exc:
            raise Below([((exc.key,), exc.reason)]) from exc
