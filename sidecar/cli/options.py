"""Shared parts of the commands: options, exit codes, files that they read, and the ways to end.

Every command imports this module, so it imports other modules of the sidecar on use.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from sidecar.settings.location import DEFAULT, NOT_FOUND, default_file

if TYPE_CHECKING:
    from sidecar.cli.client import ProblemError
    from sidecar.errors import LogTampered
    from sidecar.live.reload import Contents, Files
    from sidecar.settings.reading import Settings
    from sidecar.store.attestation import Attestation

FAILED = 1
MISCONFIGURED = 2
UNREACHABLE = 3
TAMPERED = 4

# Members of RFC 9457 that repeat the status line and the members `error` and `message` of a refusal.
REPEATED = {"type", "title", "status", "detail"}

FILE = click.Path(path_type=Path, dir_okay=False)


def _config_file(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    del param
    file = value or default_file(os.environ)
    if file is None and not ctx.resilient_parsing:  # a shell that completes a command needs no configuration
        misconfigured(NOT_FOUND)
    return file


config_option = click.option(
    "--config",
    "config",
    type=FILE,
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


def duration_between(low: float, high: float) -> Callable[..., float]:
    """The callback of an option that takes a number of seconds, or a duration such as 10s, 5m, 2h or 1d."""

    def parsed(ctx: click.Context, param: click.Parameter, value: str) -> float:
        from sidecar.core.duration import EXAMPLES, seconds_of

        del ctx, param
        found: float | None = seconds_of(value)
        try:
            seconds = float(value) if found is None else found
        except ValueError as exc:
            message = f"{value!r} is not a number of seconds, nor a duration such as {EXAMPLES}"
            raise click.BadParameter(message) from exc
        if not low <= seconds <= high:
            raise click.BadParameter(f"{value!r} is not from {low:g} to {high:g} seconds")
        return seconds

    return parsed


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


def contents_of(files: Files) -> Contents:
    """What the files hold. Ends the program with a message about every mistake."""
    from sidecar.files.faults import ConfigurationError

    try:
        contents = files.read()
    except ConfigurationError as exc:
        warn(files.warnings)
        misconfigured(str(exc))
    warn(files.warnings)
    return contents


def pairs(overrides: tuple[str, ...]) -> list[tuple[str, str]]:
    found = []
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator:
            raise click.BadParameter(f"{override!r} is not KEY=VALUE", param_hint="--set")
        found.append((key, value))
    return found


def warn(warnings: tuple[str, ...]) -> None:
    if not warnings:
        return
    from sidecar.telemetry.events import LogEvent

    for warning in warnings:
        LogEvent.UNKNOWN_VARIABLE.log(warning)


# Reading the log ------------------------------------------------------------------------------------

# The most redraws of a progress bar.
STEPS = 200

public_key_option = click.option(
    "--public-key",
    "public_keys",
    type=FILE,
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
    import getpass

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


def refused(problem: ProblemError, *, as_json: bool = False, advice: str | None = None) -> NoReturn:
    """End the program with the sidecar's error: its code and message, then its other members, then advice."""
    from sidecar.cli.tables import cell, lines_of

    if as_json:
        tell(problem.body)
    shown = {"error", "message", *REPEATED}
    others = {name: value for name, value in problem.body.items() if name not in shown and value != []}
    click.echo(f"scopegate: {cell(problem)}", err=True)
    for line in lines_of(others if advice is None else {**others, "next": advice}):
        click.echo(line, err=True)
    sys.exit(FAILED)


def failed(message: str) -> NoReturn:
    click.echo(f"scopegate: {message}", err=True)
    sys.exit(FAILED)


def misconfigured(message: str) -> NoReturn:
    click.echo(message, err=True)
    sys.exit(MISCONFIGURED)


def ended(code: int, message: str) -> NoReturn:
    """End the program with a message on one line, without control characters and whole scope_ids."""
    from sidecar.core.shortid import shortened
    from sidecar.files.faults import shown

    click.echo(f"scopegate: {shown(shortened(message), 4_000)}", err=True)
    sys.exit(code)
