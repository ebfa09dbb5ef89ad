"""Shared parts of the commands: options, exit codes, access to a running sidecar, and the ways to end.

The modules that read a configuration are imported on use, because a health check runs every few seconds.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar

import click

from sidecar.cli.calling import (
    TIMEOUT_SECONDS,
    Listener,
    Place,
    ProblemError,
    Trust,
    UncertainError,
    UnreachableError,
    UnusableError,
)
from sidecar.settings.addresses import Listen
from sidecar.telemetry.events import LogEvent

if TYPE_CHECKING:
    from sidecar.errors import LogTampered
    from sidecar.files.signing import PublicKey
    from sidecar.live.reload import Files
    from sidecar.settings.reading import Settings
    from sidecar.store.attestation import Attestation

T = TypeVar("T")

FAILED = 1
MISCONFIGURED = 2
UNREACHABLE = 3
TAMPERED = 4

config_option = click.option(
    "--config",
    "config",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    metavar="FILE",
    help="The configuration file (YAML).",
)
set_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override one key, for example --set store.deadline_seconds=5. May be repeated.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="The answer as JSON, and nothing else.")


# Asking a running sidecar ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """A running sidecar, found by the options of a command."""

    listener: Listener
    settings: Settings | None

    def beside(self, name: Literal["data"], address: str | None) -> Listener:
        """Another listener of the same sidecar, at the address of the options or of the configuration. The
        address in the sidecar's status is not used, because it may be valid only on the sidecar's host."""
        if address is None and self.settings is None:
            raise click.UsageError(
                f"this sidecar serves scopes on {name}; give its address with --{name}, as this host reaches "
                "it, since the sidecar knows only how its own host does. Or give --config FILE"
            )
        place = _place(name, self.settings, address)
        trust = self.listener.trust
        pinned = None if self.settings is None else _certificate_of(self.settings, name)
        return Listener(
            name=name,
            place=place,
            trust=Trust(pinned=pinned, ca=trust.ca, certificate=trust.certificate, key=trust.key),
            timeout=self.listener.timeout,
        )

    def tenant_header(self, tenant: str | None) -> dict[str, bytes]:
        """The header that names the tenant, if the configuration has one."""
        from sidecar.core.facts import is_identifier

        if tenant is not None and not is_identifier(tenant):
            raise click.BadParameter("must be 1 to 256 printable characters", param_hint="--tenant")
        if self.settings is None:
            if tenant is not None:
                raise click.UsageError("give --config FILE with --tenant; it has the header that names it")
            return {}
        header = self.settings.gate.tenant_header
        if header is None and tenant is not None:
            misconfigured(
                "the configuration has no gate.tenant_header, so there are no tenants; omit --tenant"
            )
        if header is not None and tenant is None:
            misconfigured(
                f"gate.tenant_header is {header}: what is asked is a tenant's; name it with --tenant"
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
            type=click.Path(path_type=Path, dir_okay=False),
            metavar="FILE",
            help=f"The configuration file (YAML); its {name}.listen is asked.",
        )
        @set_option
        @click.option(
            f"--{name}",
            "address",
            metavar="ADDRESS",
            help=f"The {name} listener to ask, instead of the configuration's: HOST:PORT, "
            "https://HOST:PORT or unix:/PATH.",
        )
        @click.option("--ca", type=_FILE, metavar="FILE", help="With TLS: trust what this PEM file has.")
        @click.option("--cert", type=_FILE, metavar="FILE", help="With TLS: the certificate to show (PEM),")
        @click.option("--key", type=_FILE, metavar="FILE", help="and its key.")
        @wraps(command)
        def asking(
            config: Path | None,
            overrides: tuple[str, ...],
            address: str | None,
            ca: Path | None,
            cert: Path | None,
            key: Path | None,
            **others: Any,
        ) -> None:
            if key is not None and cert is None:
                raise click.UsageError("give the certificate that --key belongs to with --cert")
            settings = None if config is None else load_settings(config, overrides, read_keys=False)
            listener = Listener(
                name=name,
                place=_place(name, settings, address),
                trust=Trust(
                    pinned=None if settings is None else _certificate_of(settings, name),
                    ca=ca,
                    certificate=cert,
                    key=key,
                ),
                timeout=others.pop("timeout", TIMEOUT_SECONDS),
            )
            of_tls = listener.place.tls or (others.get("data") or "").startswith("https://")
            if not of_tls and (ca, cert) != (None, None):
                raise click.UsageError(
                    f"--ca, --cert and --key are for TLS, and {listener.place} is asked without; "
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
                refused(exc, as_json=others.get("as_json", False))

        return asking

    return decorated


_FILE = click.Path(path_type=Path, dir_okay=False)


def _place(name: Literal["data", "admin", "ops"], settings: Settings | None, text: str | None) -> Place:
    if text is not None:
        try:
            place = Place.parse(text).reachable()
        except ValueError as exc:
            raise click.BadParameter(str(exc), param_hint=f"--{name}") from exc
        if name == "admin" and not place.address.is_loopback():
            raise click.BadParameter("only a sidecar on this host is asked", param_hint="--admin")
    elif settings is not None:
        section = getattr(settings, name)
        place = Place(address=section.listen, tls=section.tls.certificate_file is not None).reachable()
    else:
        raise click.UsageError(f"give --config FILE, or --{name} HOST:PORT")
    if isinstance(place.address, Listen) and place.address.port == 0:
        misconfigured(f"{name}.listen has port 0, which is any free port; name the real one with --{name}")
    return place


def _certificate_of(settings: Settings, name: str) -> Path | None:
    """The certificate of a listener. It is known on the listener's own host, so no other is accepted
    there."""
    certificate: Path | None = getattr(settings, name).tls.certificate_file
    return certificate


# Reading a configuration ----------------------------------------------------------------------------


def load_settings(config: Path, overrides: tuple[str, ...], *, read_keys: bool = True) -> Settings:
    """Load the settings. Ends the program with a message about every mistake in them."""
    from sidecar.files.faults import ConfigurationError
    from sidecar.settings import reading as settings

    try:
        loaded = settings.load(
            config, environment=os.environ, overrides=pairs(overrides), read_keys=read_keys
        )
    except ConfigurationError as exc:
        misconfigured(str(exc))
    warn(loaded.warnings)
    return loaded.settings


def files_of(config: Path, overrides: tuple[str, ...]) -> Files:
    """The files of the configuration, and the values that override them now and at every reload."""
    from sidecar.live.reload import Files

    return Files(config, environment=os.environ, overrides=pairs(overrides))


def pairs(overrides: tuple[str, ...]) -> list[tuple[str, str]]:
    found = []
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator:
            raise click.BadParameter(f"{override!r} is not KEY=VALUE", param_hint="--set")
        found.append((key, value))
    return found


def warn(warnings: tuple[str, ...]) -> None:
    for warning in warnings:
        LogEvent.UNKNOWN_VARIABLE.log(warning)


# Reading the log ------------------------------------------------------------------------------------

# The most redraws of a progress bar.
STEPS = 200

public_key_option = click.option(
    "--public-key",
    "public_keys",
    type=click.Path(path_type=Path, dir_okay=False),
    multiple=True,
    metavar="FILE",
    help="A key whose checkpoints count; by default the one of log.signing_key_file. May be repeated.",
)


def database(config: Path, loaded: Settings) -> Path:
    """The database file. Ends the program if the store is in memory."""
    if loaded.store.file is None:
        misconfigured(f"{config}: store.url: a store in memory has no log that could be read")
    return loaded.store.file


def attestation_of(loaded: Settings, public_keys: tuple[Path, ...]) -> Attestation:
    """Read the checkpoint file. Raises LogTampered and StoreUnavailable."""
    from sidecar.store.attestation import NONE, read_checkpoints

    keys = _keys(loaded, public_keys)
    if loaded.log.checkpoint_file is None:
        return NONE
    return read_checkpoints(loaded.log.checkpoint_file, keys)


def check_known(attestation: Attestation) -> None:
    """End the program if an unknown key signed a checkpoint."""
    for key_id, count in attestation.unknown.items():
        failed(
            f"not verified whole: {count} checkpoints are of the key {key_id}, which is not known; "
            "give its public key with --public-key, or find out who wrote them"
        )


def _keys(loaded: Settings, files: tuple[Path, ...]) -> list[PublicKey]:
    """The public keys whose checkpoints are accepted."""
    from sidecar.files.keyfiles import KeyFileUnusable
    from sidecar.files.signing import load_public_key, load_signing_key

    signing = loaded.log.signing_key_file
    try:
        if files or signing is None:
            return [_named(file, load_public_key) for file in files]
        return [_named(signing, load_signing_key).public]
    except KeyFileUnusable as exc:
        misconfigured(f"{exc}; give --public-key FILE to verify with another one")


def _named(file: Path, load: Callable[[Path], T]) -> T:
    from sidecar.files.keyfiles import KeyFileUnusable

    try:
        return load(file)
    except KeyFileUnusable as exc:
        raise KeyFileUnusable(f"{file}: {exc}") from exc


@contextmanager
def progress_bar(label: str, *, hidden: bool) -> Iterator[Callable[[int, int], None]]:
    """Draw a bar on standard error. Yields the function that takes (done, total)."""
    drawn = 0
    with click.progressbar(length=1, label=label, file=sys.stderr, hidden=hidden) as bar:

        def progress(done: int, total: int) -> None:
            nonlocal drawn
            if done - drawn < total / STEPS and done != total:
                return
            bar.length = max(1, total)
            bar.update(done - drawn)
            drawn = done

        yield progress


def tampered(exc: LogTampered) -> NoReturn:
    click.echo(f"TAMPERED: {exc}", err=True)
    sys.exit(TAMPERED)


# Ending ---------------------------------------------------------------------------------------------


def tell(document: object) -> None:
    """Print a JSON document on one line, in ASCII, so that it contains no control characters."""
    click.echo(json.dumps(document).replace("\x7f", "\\u007f"))


def give_output_up() -> None:
    """Redirect standard output to /dev/null, so that Python does not write the rest again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def refused(problem: ProblemError, *, as_json: bool = False) -> NoReturn:
    """End the program with the sidecar's error: its code and message, then its other members."""
    from sidecar.cli.tables import cell, lines_of

    if as_json:
        tell(problem.body)
    told = {"type", "title", "status", "detail", "error", "message"}
    brought = {name: value for name, value in problem.body.items() if name not in told and value != []}
    click.echo(f"scopegate: {cell(problem)}", err=True)
    for line in lines_of(brought):
        click.echo(line, err=True)
    sys.exit(FAILED)


def failed(message: str) -> NoReturn:
    click.echo(f"scopegate: {message}", err=True)
    sys.exit(FAILED)


def misconfigured(message: str) -> NoReturn:
    click.echo(message, err=True)
    sys.exit(MISCONFIGURED)


def ended(code: int, message: str) -> NoReturn:
    """End the program with a message on one line, without control characters."""
    from sidecar.files.yamlfile import shown

    click.echo(f"scopegate: {shown(message, 4_000)}", err=True)
    sys.exit(code)
