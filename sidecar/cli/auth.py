"""`scopegate auth`: makes the tokens by which callers prove who they are, lists them, and revokes them.

The commands change the file of tokens, not a running sidecar, which reads a change within two seconds.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_args

import click

from sidecar.cli.options import (
    config_option,
    duration_between,
    failed,
    json_option,
    load_settings,
    misconfigured,
    set_option,
    tell,
)
from sidecar.cli.tables import cell, line, table
from sidecar.core.facts import IDENTIFIER_RULE, is_identifier
from sidecar.core.instant import SECOND
from sidecar.core.principal import ANONYMOUS_ID, DEFAULT_TENANT, PrincipalKind
from sidecar.files.faults import ConfigurationError
from sidecar.files.yamlfile import did_you_mean

if TYPE_CHECKING:
    from sidecar.auth.identity import Identity
    from sidecar.auth.tokens import Token
    from sidecar.core.principal import Principal
    from sidecar.settings.auth import AuthSection

DAY = 86_400
# A token that is to last longer needs no end.
MAX_DAYS = 3_650
SOON_DAYS = 30


@click.group(
    epilog="""\b
Examples:
  scopegate auth token ci --kind agent --group automation --expires 90d --output ci.token
  scopegate auth list
  scopegate auth revoke ci --older-than 1h"""
)
def auth() -> None:
    """Tokens of callers: make one, list them, revoke them."""


def _identifier(ctx: click.Context, param: click.Parameter, value: str | tuple[str, ...] | None) -> Any:
    del ctx, param
    for one in (value,) if isinstance(value, str) else value or ():
        if not is_identifier(one):
            raise click.BadParameter(f"{one!r} must be {IDENTIFIER_RULE}")
    return value


def _lifetime(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    return None if value is None else duration_between(60, MAX_DAYS * DAY)(ctx, param, value)


@auth.command(
    epilog="""\b
Examples:
  scopegate auth token ci --kind agent --group automation --expires 90d --output ci.token
  scopegate auth token anna --kind human --group oncall --group sre-leads
\b
To rotate: make a second token of the name, give it to the caller, then revoke the first:
  scopegate auth revoke ci --older-than 1h"""
)
@click.argument("name", callback=_identifier)
@click.option(
    "--kind",
    type=click.Choice(get_args(PrincipalKind)),
    help="What the caller is. Only a human can approve.  [default: what auth.principals says, else service]",
)
@click.option(
    "--group",
    "groups",
    multiple=True,
    metavar="GROUP",
    callback=_identifier,
    help="A group; repeatable.  [default: what auth.principals says, else none]",
)
@click.option(
    "--tenant",
    callback=_identifier,
    help=f"The tenant in which the caller acts.  [default: what auth.principals says, else {DEFAULT_TENANT}]",
)
@click.option(
    "--expires",
    "lifetime",
    metavar="DURATION",
    callback=_lifetime,
    help="How long it is valid, such as 90d.  [default: until it is revoked]",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write the token to a new file that only you can read, for --token-file. Without it, print it.",
)
@config_option
@set_option
def token(
    name: str,
    kind: PrincipalKind | None,
    groups: tuple[str, ...],
    tenant: str | None,
    lifetime: float | None,
    output: Path | None,
    config: Path,
    overrides: tuple[str, ...],
) -> None:
    """Make a token for the caller NAME, and add its digest to the file of tokens.

    The token is shown this once, because the file holds only its digest. Each run makes a further token:
    the tokens of a name are valid side by side until they expire or are revoked.
    """
    from sidecar.auth.identity import Identity
    from sidecar.auth.tokens import Token, digest_of, new_secret

    settings = _settings(config, overrides)
    file = _file_of(settings, config)
    if name == ANONYMOUS_ID:
        raise click.BadParameter("is the caller without a credential; choose another name", param_hint="NAME")
    text, now = new_secret(), _now()
    told = Identity(id=name, kind=kind, groups=tuple(dict.fromkeys(groups)) or None, tenant_id=tenant)
    meant = _meant(settings, told)
    made = Token(
        name=name,
        digest=digest_of(text),
        created_at=now,
        not_after=None if lifetime is None else now + int(lifetime) * SECOND,
        kind=meant.kind,
        groups=meant.groups,
        tenant_id=meant.tenant_id,
    )
    if output is not None:
        _write(output, text)
    try:
        _change(file, lambda tokens: (*tokens, made))
    except BaseException:
        if output is not None:
            with suppress(OSError):
                os.unlink(output)  # this call created it, and its token is not valid
        raise
    if output is None:
        click.echo(text)
    until = "until it is revoked" if made.not_after is None else f"until {_moment(made.not_after)}"
    labelled = {
        "token": "above, shown only this once" if output is None else str(output),
        "caller": f"{name}, {'an' if made.kind == 'agent' else 'a'} {made.kind} of tenant {made.tenant_id}",
        "groups": ", ".join(made.groups or ()) or "none",
        "valid": until,
        "digest": f"in {file}, which a running sidecar reads within two seconds",
    }
    for label, value in labelled.items():
        click.echo(line(label, value), err=True)


@auth.command(
    "list",
    epilog="""\b
Examples:
  scopegate auth list
  scopegate auth list --json | jq '.tokens[] | select(.state != "valid")'""",
)
@json_option
@config_option
@set_option
def list_tokens(config: Path, overrides: tuple[str, ...], *, as_json: bool) -> None:
    """List the tokens of the file, without their secrets, which it does not hold."""
    file, now = _file(config, overrides), _now()
    rows = [
        _described(one, now) for one in sorted(_existing(file), key=lambda one: (one.name, one.created_at))
    ]
    if as_json:
        tell({"tokens": rows})
        return
    table(
        [
            {
                "name": row["name"],
                "kind": row["kind"] or "",
                "groups": ", ".join(row["groups"] or ()),
                "tenant": row["tenant_id"] or "",
                "created": row["created_at"],
                "expires": row["not_after"] or "never",
                "state": row["state"],
                "digest": row["sha256"][:8],
            }
            for row in rows
        ],
        f"{file} has no tokens; `scopegate auth token NAME` makes one",
    )


@auth.command(
    epilog="""\b
Examples:
  scopegate auth revoke ci                    every token of ci
  scopegate auth revoke ci --older-than 1h    after a rotation: all but the new one"""
)
@click.argument("name")
@click.option(
    "--older-than",
    "age",
    metavar="DURATION",
    callback=lambda ctx, param, value: (
        None if value is None else duration_between(0, MAX_DAYS * DAY)(ctx, param, value)
    ),
    help="Only the tokens that were made longer ago, such as 30d.",
)
@config_option
@set_option
def revoke(name: str, age: float | None, config: Path, overrides: tuple[str, ...]) -> None:
    """Revoke the tokens of the caller NAME. A running sidecar refuses them within two seconds."""
    file, now = _file(config, overrides), _now()
    revoked: list[Token] = []
    left: list[Token] = []

    def without(tokens: Sequence[Token]) -> list[Token]:
        def ends(one: Token) -> bool:
            return one.name == name and (age is None or one.created_at < now - int(age * SECOND))

        revoked[:] = [one for one in tokens if ends(one)]
        left[:] = [one for one in tokens if not ends(one)]
        return left

    _change(file, without)
    remaining = sum(one.name == name for one in left)
    if not revoked:
        if remaining:
            failed(f"{cell(name)} has {remaining} tokens, but none is that old; omit --older-than for all")
        known = did_you_mean(name, {one.name for one in left})
        failed(f"{cell(name)} has no tokens in {file}{known or '; `scopegate auth list` lists them'}")
    click.echo(
        f"Revoked {len(revoked)} of {len(revoked) + remaining} tokens of {cell(name)}. A running sidecar "
        "reads the change within two seconds."
    )


# The file -----------------------------------------------------------------------------------------------


def _settings(config: Path, overrides: tuple[str, ...]) -> AuthSection:
    return load_settings(config, overrides, read_keys=False).auth


def _file(config: Path, overrides: tuple[str, ...]) -> Path:
    return _file_of(_settings(config, overrides), config)


def _meant(settings: AuthSection, identity: Identity) -> Principal:
    """Whom a token is for: as its options say, else as the table of principals says, else by default."""
    from sidecar.auth import principals

    table = principals.NO_PRINCIPALS
    if settings.principals is not None:
        try:
            table = principals.read(settings.principals)
        except ConfigurationError as exc:
            misconfigured(f"{exc}\nNothing was changed.")
    known = table.completed(replace(identity, id=(settings.tokens.id_prefix or "") + identity.id))
    return known.principal("tokens")


def _file_of(settings: AuthSection, config: Path) -> Path:
    file = settings.tokens.file
    if file is None:
        misconfigured(
            f"{config}: auth.tokens.file is not set; name the file of tokens there, for example "
            "auth: {tokens: {file: tokens.yaml}}"
        )
    return file


def _existing(file: Path) -> tuple[Token, ...]:
    from sidecar.auth.tokenfile import existing

    try:
        return existing(file)
    except ConfigurationError as exc:
        misconfigured(str(exc))


def _change(file: Path, changed: Any) -> None:
    from sidecar.auth.tokenfile import change

    try:
        change(file, changed)
    except ConfigurationError as exc:
        misconfigured(f"{exc}\nNothing was changed.")
    except OSError as exc:
        _unwritable(file, exc)


def _write(output: Path, text: str) -> None:
    from sidecar.files import keyfiles

    try:
        keyfiles.create(output, f"{text}\n".encode(), 0o600)
    except OSError as exc:
        _unwritable(output, exc)


def _unwritable(file: Path, exc: OSError) -> NoReturn:
    failed(f"cannot write {file}: {exc.strerror or exc}; nothing was changed")


def _described(one: Token, now: int) -> dict[str, Any]:
    from sidecar.auth.tokenfile import members

    state = "valid"
    if one.is_expired(now):
        state = "expired"
    elif one.not_after is not None and one.not_after < now + SOON_DAYS * DAY * SECOND:
        state = "expires soon"
    return {**members(one), "state": state}


def _moment(instant: int) -> str:
    from sidecar.auth.tokenfile import time_text

    return time_text(instant)


def _now() -> int:
    """The time to the second, as the file holds it."""
    return int(time.time()) * SECOND
