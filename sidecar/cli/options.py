"""Shared parts of the commands: options, exit codes, access to a running sidecar, and the ways to end.

The modules that read a configuration are imported on use, because a health check runs every few seconds.
"""

from __future__ import annotations

import getpass
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

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
from sidecar.settings.addresses import Listen
from sidecar.settings.location import DEFAULT, NOT_FOUND, default_file
from sidecar.telemetry.events import LogEvent

if TYPE_CHECKING:
    from sidecar.errors import LogTampered
    from sidecar.live.reload import Files
    from sidecar.settings.reading import Settings
    from sidecar.store.attestation import Attestation

FAILED = 1
MISCONFIGURED = 2
UNREACHABLE = 3
TAMPERED = 4

# Members of RFC 9457 that repeat the status line and the members `error` and `message` of a refusal.
REPEATED = {"type", "title", "status", "detail"}

_FILE = click.Path(path_type=Path, dir_okay=False)


def _config_file(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    del param
    file = value or default_file(os.environ)
    if file is None and not ctx.resilient_parsing:  # a shell that completes a command needs no configuration
        misconfigured(NOT_FOUND)
    return file


config_option = click.option(
    "--config",
    "config",
    type=_FILE,
    callback=_config_file,
    metavar="FILE",
    help=f"The configuration file (YAML).  [default: {DEFAULT}]",
)
set_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override one key, such as store.deadline_seconds=5; repeatable.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON, for programs.")


# Asking a running sidecar ---------------------------------------------------------------------------


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
        trust = replace(self.listener.trust, pinned=_certificate_of(self.settings, name))
        return replace(self.listener, name=name, place=_address(name, self.settings, address), trust=trust)

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
            type=_FILE,
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
        @click.option(
            "--ca", type=_FILE, metavar="FILE", help="TLS: trust the certificates in this PEM file."
        )
        @click.option("--cert", type=_FILE, metavar="FILE", help="TLS: the client certificate to send (PEM).")
        @click.option("--key", type=_FILE, metavar="FILE", help="TLS: the key of --cert (PEM).")
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
            # A default file may belong to another sidecar than the one whose address is given.
            named = address is not None or others.get("data") is not None
            config = config or (None if named else default_file(os.environ))
            settings = None if config is None else load_settings(config, overrides, read_keys=False)
            listener = Caller(
                name=name,
                place=_address(name, settings, address, alone=not named),
                trust=Trust(pinned=_certificate_of(settings, name), ca=ca, certificate=cert, key=key),
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
                refused(exc, as_json=others.get("as_json", False))

        return asking

    return decorated


def _address(
    name: Literal["data", "admin", "ops"], settings: Settings | None, text: str | None, *, alone: bool = True
) -> Endpoint:
    if text is not None:
        try:
            place = Endpoint.parse(text).reachable()
        except ValueError as exc:
            raise click.BadParameter(str(exc), param_hint=f"--{name}") from exc
        if name == "admin" and not place.address.is_loopback():
            raise click.BadParameter("only a sidecar on this host is called", param_hint="--admin")
    elif settings is not None:
        section = getattr(settings, name)
        place = Endpoint(address=section.listen, tls=section.tls.certificate_file is not None).reachable()
    else:
        other = "--data names a sidecar, and its configuration is not known; give --config FILE"
        raise click.UsageError(f"{NOT_FOUND if alone else other}, or --{name} HOST:PORT")
    if isinstance(place.address, Listen) and place.address.port == 0:
        misconfigured(f"{name}.listen has port 0, which is any free port; name the real one with --{name}")
    return place


def _certificate_of(settings: Settings | None, name: str) -> Path | None:
    """The configured certificate of a listener. If it is known, no other certificate is accepted."""
    return None if settings is None else getattr(settings, name).tls.certificate_file


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
    type=_FILE,
    multiple=True,
    metavar="FILE",
    help="Accept checkpoints of this public key; repeatable.  [default: the key of log.signing_key_file]",
)


def database(config: Path, loaded: Settings) -> Path:
    """The database file. Ends the program if the store is in memory."""
    if loaded.store.file is None:
        misconfigured(f"{config}: store.url: a store in memory has no log to read")
    return loaded.store.file


def attestation_of(loaded: Settings, public_keys: tuple[Path, ...]) -> Attestation:
    """Read the checkpoint file. Raises LogTampered and StoreUnavailable."""
    from sidecar.files.keyfiles import KeyFileUnusable
    from sidecar.files.signing import load_public_key, load_signing_key
    from sidecar.store.attestation import NONE, read_checkpoints

    own = loaded.log.signing_key_file
    keys, file = [], own
    try:
        for file in public_keys:
            keys.append(load_public_key(file))
        if not public_keys and own is not None:
            keys.append(load_signing_key(own).public)
    except KeyFileUnusable as exc:
        misconfigured(f"{file}: {exc}; give --public-key FILE to verify with another one")
    return NONE if loaded.log.checkpoint_file is None else read_checkpoints(loaded.log.checkpoint_file, keys)


def check_known(attestation: Attestation) -> None:
    """End the program if an unknown key signed a checkpoint."""
    for key_id, count in attestation.unknown.items():
        failed(
            f"not verified whole: {count} checkpoints are of the key {key_id}, which is unknown; give its "
            "public key with --public-key, or find out who wrote them"
        )


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


def answered(document: object, as_json: bool, labelled: Iterable[tuple[str, object]]) -> None:
    """Print an answer: as JSON, or as labelled lines."""
    from sidecar.cli.tables import lines

    if as_json:
        tell(document)
    else:
        lines(labelled)


def login_name() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a user without a name, as in many containers
        return "cli"


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
    shown = {"error", "message", *REPEATED}
    others = {name: value for name, value in problem.body.items() if name not in shown and value != []}
    click.echo(f"scopegate: {cell(problem)}", err=True)
    for line in lines_of(others):
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
