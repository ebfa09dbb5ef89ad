"""`scopegate config`: shows the values in force and their sources, and the schema of the file for editors.

A value that may hold a password is never shown in full. No file but the configuration is read, so the command
does not need access to the keys.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import yaml

from sidecar.cli.options import config_option, failed, misconfigured, pairs, set_option, warn
from sidecar.cli.tables import cell
from sidecar.files.faults import ConfigurationError, shown
from sidecar.files.yamlfile import Document, did_you_mean, survey
from sidecar.settings import reading as settings
from sidecar.settings import schema as configschema
from sidecar.settings.keys import Key, values_of
from sidecar.settings.keys import keys as every_key
from sidecar.settings.reading import Loaded, Settings
from sidecar.settings.sections import KEYS

MASKED = "***"

# The password of a URL, up to the last @, because an unescaped password may hold any character.
_PASSWORD = re.compile(r"([^:/?#]+://[^:@/]*):.*@", re.DOTALL)
# An @ after a question mark. It may belong to a password or to the query; the two cannot be told apart.
_EITHER = re.compile(r"(?<=://).*[?#].*@.*", re.DOTALL)
# The value of a member of the query. A member without a name, and a fragment, count as a value.
_MEMBER = re.compile(r"(?<=[?&;])(?:([^=&;#]+=)[^&;#]*|[^&;#]+)|(?<=#).+", re.DOTALL)
# The names of variables that hold a secret: a part of the name ends like this, unless it names a file.
_SECRET_NAME = re.compile(
    r"(?!.*_(?:file|path|dir|folder)$).*"
    r"(?:pass|passw(?:or)?d|passphrase|pwd|pw|secret|token|key|cred(?:ential)?|auth)s?[0-9]*(?:_|$)",
    re.IGNORECASE,
)

_VARIABLE = re.compile(r"\$\$\{|\$\{([A-Za-z_][A-Za-z0-9_]*)")


@click.group(
    epilog="""\b
Examples:
  scopegate config show --config config/scopegate.yaml
  scopegate config schema --output scopegate.schema.json""",
)
def config() -> None:
    """Show the configuration in force and its sources; print its schema for editors."""


# Showing ----------------------------------------------------------------------------------------------------


@config.command(
    epilog="""\b
Examples:
  scopegate config show --config config/scopegate.yaml
  scopegate config show --config config/scopegate.yaml --set gate.max_in_flight=64 gate store.url
  scopegate config show --config config/scopegate.yaml --json scopes.limits"""
)
@config_option
@set_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON: an object by key.")
@click.argument("keys", nargs=-1, metavar="[KEY]...")
def show(config: Path, overrides: tuple[str, ...], keys: tuple[str, ...], *, as_json: bool) -> None:
    """Show the value of each key as it takes effect, and its source. Passwords are masked.

    KEY is a key or a section; without it all keys are shown. A reload can change the keys that LIVE marks;
    the others need a restart. File names are shown as they resolve; the files are not read.
    """
    wanted = _wanted(keys)
    try:
        loaded = settings.load(config, environment=os.environ, overrides=pairs(overrides), read_keys=False)
    except ConfigurationError as exc:
        misconfigured(str(exc))
    warn(loaded.warnings)
    found = _in_force(loaded, wanted)
    if as_json:
        click.echo(json.dumps({one.key.name: one.to_dict() for one in found}, indent=2))
        return
    from tabulate import tabulate

    rows = [
        (one.key.name, "\n".join(one.lines()), "yes" if one.key.is_live else "", one.origin())
        for one in found
    ]
    text = tabulate(rows, ("KEY", "VALUE", "LIVE", "SOURCE"), tablefmt="plain", disable_numparse=True)
    click.echo("\n".join(line.rstrip() for line in text.splitlines()))


def _wanted(words: Sequence[str]) -> list[Key]:
    """The requested keys, in the order of the file."""
    known = {key.name for key in every_key(Settings)}
    for word in words:
        if word not in known:
            message = f"{shown(word)} is not a known key{did_you_mean(word, known)}"
            raise click.BadParameter(message, param_hint="KEY")
    below = tuple(f"{word}." for word in words)
    return [key for name, key in KEYS.items() if not words or f"{name}.".startswith(below)]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Setting:
    """One key: its value without secrets, and the places that set it. The place in force comes first."""

    key: Key
    value: Any
    places: tuple[str, ...]
    variables: Mapping[str, bool]  # by name, whether it is set

    def to_dict(self) -> dict[str, Any]:
        return {
            "value": self.value,
            "source": self.places[0] if self.places else "default",
            "overrides": list(self.places[1:]),
            "variables": list(self.variables),
            "live": self.key.is_live,
        }

    def lines(self) -> Iterator[str]:
        """The value as the file would hold it. A list that is not empty takes several lines."""
        if isinstance(self.value, list) and self.value:
            text = yaml.safe_dump(self.value, sort_keys=False, allow_unicode=True, default_flow_style=None)
            yield from map(cell, text.splitlines())
        elif isinstance(self.value, float):
            yield f"{self.value:.12g}"
        else:
            yield cell(self.value if isinstance(self.value, str) else json.dumps(self.value))

    def origin(self) -> str:
        if not self.places:
            return "default"
        names = [f"${{{name}}}" + ("" if is_set else " (not set)") for name, is_set in self.variables.items()]
        parts = [self.places[0]]
        parts += [f"from {', '.join(names)}"] if names else []
        parts += [f"overrides {', '.join(self.places[1:])}"] if self.places[1:] else []
        return cell(", ".join(parts))


def _in_force(loaded: Loaded, keys: Sequence[Key]) -> list[_Setting]:
    values = values_of(loaded.settings)
    written, _ = survey(loaded.document.source, loaded.document.file)
    found = []
    for key in keys:
        places = loaded.places[key.name]
        in_file = places[:1] == (loaded.document.place(key.path),)
        variables = _variables(written, key.path) if in_file else {}
        value = without_secrets(key, values[key.name], variables)
        found.append(_Setting(key=key, value=value, places=places, variables=variables))
    return found


def _variables(written: Document | None, path: tuple[str, ...]) -> dict[str, bool]:
    """The variables that the text of a value in the file names."""
    value = written.value if written is not None else None
    for step in path:
        value = value.get(step) if isinstance(value, dict) else None
    names = (found[1] for found in _VARIABLE.finditer(json.dumps(value)) if found[1])
    return {name: name in os.environ for name in names}


def without_secrets(key: Key, value: Any, variables: Mapping[str, bool]) -> Any:
    """The value with its secrets masked."""
    if any(map(_SECRET_NAME.match, variables)):
        return MASKED
    if not key.is_secret or value is None:
        return value
    if not isinstance(value, str) or "://" not in value:
        return MASKED
    masked = _PASSWORD.sub(rf"\1:{MASKED}@", _EITHER.sub(MASKED, value))
    return _MEMBER.sub(lambda member: f"{member[1] or ''}{MASKED}", masked)


# The schema -------------------------------------------------------------------------------------------------


@config.command(
    epilog="""\b
Examples:
  scopegate config schema --output scopegate.schema.json
\b
and the first line of the configuration:
  # yaml-language-server: $schema=scopegate.schema.json"""
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="The file to write; standard output by default.",
)
def schema(output: Path | None) -> None:
    """Print the JSON Schema of the configuration file, with which editors complete and check it.

    The schema accepts everything that Scopegate accepts. `scopegate check` checks more.
    """
    made = configschema.schema_of(
        Settings,
        title="Scopegate configuration",
        description="Every key but upstream.url has a default. The environment may supply each of them.",
    )
    text = json.dumps(made, indent=2) + "\n"
    if output is None:
        click.echo(text, nl=False)
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as exc:
        failed(f"cannot write {shown(str(output), 1_000)} ({exc.strerror}); name a file that can be written")
