"""Access to a running sidecar: the options that locate it, and what a command does with its errors."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from sidecar.cli.client import (
    TIMEOUT_SECONDS,
    Caller,
    Endpoint,
    ProblemError,
    Trust,
    UncertainError,
    UnreachableError,
    UnusableError,
)
from sidecar.cli.credentials import TokenUnusableError, advice, token_of
from sidecar.cli.options import (
    FAILED,
    FILE,
    UNREACHABLE,
    ended,
    load_settings,
    misconfigured,
    refused,
    set_option,
)
from sidecar.settings.addresses import Listen
from sidecar.settings.location import DEFAULT, NOT_FOUND, default_file
from sidecar.settings.variables import TOKEN, TOKEN_FILE

if TYPE_CHECKING:
    from sidecar.settings.reading import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """A running sidecar, found by the options of a command."""

    listener: Caller
    settings: Settings | None

    def beside(self, name: Literal["data"], address: str | None) -> Caller:
        """Another listener of the same sidecar, at the address of the options or of the configuration. The
        address in the sidecar's status is not used, because it may be valid only on the sidecar's host."""
        if address is None and self.settings is None:
            raise click.UsageError(
                f"this sidecar serves scopes on the {name} listener; give its address with --{name}, as "
                "this host reaches it, or give --config FILE"
            )
        trust = replace(self.listener.trust, pinned=certificate_of(self.settings, name))
        return replace(self.listener, name=name, place=address_of(name, self.settings, address), trust=trust)

    def tenant_header(self, tenant: str | None) -> dict[str, bytes]:
        """The header that names the tenant, if the configuration has one."""
        from sidecar.core.facts import is_identifier

        if tenant is not None and not is_identifier(tenant):
            raise click.BadParameter("must be 1 to 256 printable characters", param_hint="--tenant")
        if self.settings is None:
            if tenant is not None:
                raise click.UsageError(
                    "give --config FILE with --tenant; the file has the header for the tenant"
                )
            return {}
        header = self.settings.gate.tenant_header
        if header is None and tenant is not None:
            misconfigured(
                "the configuration has no gate.tenant_header, so there are no tenants; omit --tenant"
            )
        if header is not None and tenant is None:
            misconfigured(
                f"gate.tenant_header is {header}, so every scope belongs to a tenant; name it with --tenant"
            )
        return {} if header is None or tenant is None else {header: tenant.encode()}


def asks(name: Literal["admin", "ops"]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a command that calls a listener: adds the options that locate it, and passes an `Access`.

    If no sidecar answers, the command ends with exit code 3 and a message. If the sidecar answers with an
    error, or a change may or may not have been made, it ends with exit code 1 and a message.
    """

    def decorated(command: Callable[..., None]) -> Callable[..., None]:
        @click.option(
            "--config",
            "config",
            type=FILE,
            metavar="FILE",
            help=f"The configuration file (YAML). Its {name}.listen is called.  [default: {DEFAULT}, unless "
            f"--{name} is given]",
        )
        @set_option
        @click.option(
            f"--{name}",
            "address",
            metavar="ADDRESS",
            help=f"The {name} listener to call, instead of the configuration's: HOST:PORT, "
            "https://HOST:PORT or unix:/PATH.",
        )
        @click.option("--ca", type=FILE, metavar="FILE", help="TLS: trust the certificates in this PEM file.")
        @click.option("--cert", type=FILE, metavar="FILE", help="TLS: the client certificate to send (PEM).")
        @click.option("--key", type=FILE, metavar="FILE", help="TLS: the key of --cert (PEM).")
        @click.option(
            "--token-file",
            type=FILE,
            metavar="FILE",
            help="A file with the token to send, which only its owner may read.  [default: "
            f"${TOKEN_FILE}, else the token in ${TOKEN}]"
            + (". The ops listener requires none, so none is sent." if name == "ops" else ""),
        )
        @wraps(command)
        def asking(
            config: Path | None,
            overrides: tuple[str, ...],
            address: str | None,
            ca: Path | None,
            cert: Path | None,
            key: Path | None,
            token_file: Path | None,
            **others: Any,
        ) -> None:
            if key is not None and cert is None:
                raise click.UsageError("give the certificate that --key belongs to with --cert")
            # A default file may belong to another sidecar than the one whose address is given.
            named = address is not None or others.get("data") is not None
            config = config or (None if named else default_file(os.environ))
            settings = None if config is None else load_settings(config, overrides, read_keys=False)
            try:
                # No call of the ops listener requires a credential, and a health check must not fail for one.
                token = None if name == "ops" else token_of(token_file, os.environ)
            except TokenUnusableError as exc:
                misconfigured(str(exc))
            listener = Caller(
                name=name,
                place=address_of(name, settings, address, alone=not named),
                trust=Trust(pinned=certificate_of(settings, name), ca=ca, certificate=cert, key=key),
                token=token,
                timeout=others.pop("timeout", TIMEOUT_SECONDS),
            )
            of_tls = listener.place.tls or (others.get("data") or "").startswith("https://")
            if not of_tls and (ca, cert) != (None, None):
                raise click.UsageError(
                    f"--ca, --cert and --key are for TLS, and {listener.place} is called without TLS; "
                    f"write --{name} https://HOST:PORT"
                )
            try:
                command(Access(listener=listener, settings=settings), **others)
            except UnreachableError as exc:
                ended(UNREACHABLE, str(exc))
            except UncertainError as exc:
                ended(FAILED, str(exc))
            except UnusableError as exc:
                misconfigured(str(exc))
            except ProblemError as exc:
                refused(exc, as_json=others.get("as_json", False), advice=advice(exc, token))

        return asking

    return decorated


def address_of(
    name: Literal["data", "admin", "ops"], settings: Settings | None, text: str | None, *, alone: bool = True
) -> Endpoint:
    if text is not None:
        try:
            place = Endpoint.parse(text).reachable()
        except ValueError as exc:
            raise click.BadParameter(str(exc), param_hint=f"--{name}") from exc
        if name == "admin" and not (place.tls or place.address.is_loopback()):
            raise click.BadParameter(
                "another host is called only with TLS; write https://HOST:PORT", param_hint="--admin"
            )
    elif settings is not None:
        section = getattr(settings, name)
        place = Endpoint(address=section.listen, tls=section.tls.certificate_file is not None).reachable()
    else:
        other = "--data names a sidecar, and its configuration is not known; give --config FILE"
        raise click.UsageError(f"{NOT_FOUND if alone else other}, or --{name} HOST:PORT")
    if isinstance(place.address, Listen) and place.address.port == 0:
        misconfigured(f"{name}.listen has port 0, which is any free port; name the real one with --{name}")
    return place


def certificate_of(settings: Settings | None, name: str) -> Path | None:
    """The configured certificate of a listener. If it is known, no other certificate is accepted."""
    return None if settings is None else getattr(settings, name).tls.certificate_file
