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
from sidecar.settings import Settings

FAILED = 1
MISCONFIGURED = 2
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
    pairs = []
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator:
            raise click.BadParameter(f"{override!r} is not KEY=VALUE", param_hint="--set")
        pairs.append((key, value))
    try:
        loaded, warnings = settings.load(config, environment=os.environ, overrides=pairs, read_keys=read_keys)
    except ConfigurationError as exc:
        misconfigured(str(exc))
    for warning in warnings:
        logging.getLogger("scopegate").warning(warning)
    return loaded


def failed(message: str) -> NoReturn:
    click.echo(f"scopegate: {message}", err=True)
    sys.exit(FAILED)


def misconfigured(message: str) -> NoReturn:
    click.echo(message, err=True)
    sys.exit(MISCONFIGURED)
