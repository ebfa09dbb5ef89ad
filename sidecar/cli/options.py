"""What commands share: their options, their exit codes, and how they end."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import NoReturn

import click

from sidecar import settings
from sidecar.errors import ConfigurationError
from sidecar.reload import Files
from sidecar.settings import Settings

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


def load_settings(config: Path, overrides: tuple[str, ...], *, read_keys: bool = True) -> Settings:
    """The settings, or the end of the program with every mistake in them."""
    try:
        loaded = settings.load(
            config, environment=os.environ, overrides=_pairs(overrides), read_keys=read_keys
        )
    except ConfigurationError as exc:
        misconfigured(str(exc))
    warn(loaded.warnings)
    return loaded.settings


def files_of(config: Path, overrides: tuple[str, ...]) -> Files:
    """The files to run with, and what overrides them from now on."""
    return Files(config, environment=os.environ, overrides=_pairs(overrides))


def _pairs(overrides: tuple[str, ...]) -> list[tuple[str, str]]:
    pairs = []
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator:
            raise click.BadParameter(f"{override!r} is not KEY=VALUE", param_hint="--set")
        pairs.append((key, value))
    return pairs


def warn(warnings: tuple[str, ...]) -> None:
    for warning in warnings:
        logging.getLogger("scopegate").warning(warning)


def failed(message: str) -> NoReturn:
    click.echo(f"scopegate: {message}", err=True)
    sys.exit(FAILED)


def misconfigured(message: str) -> NoReturn:
    click.echo(message, err=True)
    sys.exit(MISCONFIGURED)
