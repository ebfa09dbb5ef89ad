"""What a doctor finds: the table of findings, and those that the files alone show.

`exposed` is a way to act without the gate, or as somebody else. `warning` is what will break, or what gives
away more than it should. `note` is good to know and needs no action.
"""

from __future__ import annotations

import ipaddress
import os
import sqlite3
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from sidecar.core.instant import SECOND, to_instant
from sidecar.core.policy import RiskClass
from sidecar.core.roles import Role

if TYPE_CHECKING:
    from sidecar.live.reload import Contents
    from sidecar.settings.sections import Settings

Level = Literal["exposed", "warning", "note"]

SOON_DAYS = 30
_SOON = SOON_DAYS * 86_400 * SECOND
# The roles without whose holders calls are refused that every deployment makes.
_NEEDED: tuple[Role, ...] = ("issuer", "executor", "observer", "operator")
# SQLite has mended the bug in these releases, by its branch.
_MENDED = {(3, 44): 6, (3, 50): 7, (3, 51): 3}

# Each finding by its code: how bad it is, and what to do.
KINDS: Mapping[str, tuple[Level, str]] = MappingProxyType(
    {
        # From the files
        "no_auth_method": (
            "exposed",
            "configure a method, such as auth.tokens.file with tokens of `scopegate auth token`, and set "
            "auth.required: true",
        ),
        "credential_not_required": (
            "warning",
            "set auth.required: true, unless anonymous callers have roles on purpose",
        ),
        "tokens_without_tls": (
            "warning",
            "set data.tls.certificate_file, or let a proxy on this host speak TLS, and listen on loopback",
        ),
        "wide_trusted_proxy": ("exposed", "name only the addresses of your proxies in auth.proxy.trusted"),
        "shadow_route": ("exposed", "set mode: enforce once its would_refuse records are as you want them"),
        "unlisted_writes_pass": (
            "exposed",
            "set gate.unlisted.writes: refuse, or record, and list in gate.unlisted.except what has to pass",
        ),
        "shadow_rule": ("warning", "remove mode: shadow once its would_refuse records are as you want them"),
        "scopeless_actions": (
            "exposed",
            "set gate.scope_required_from: low, so that every execution needs a scope",
        ),
        "file_readable_by_others": (
            "exposed",
            "chmod 600 it, and replace its contents if others may have read it",
        ),
        "no_custody": (
            "warning",
            "put the credential of the backend into upstream.credentials, so that callers cannot go round "
            "the gate with it",
        ),
        "credential_lent": (
            "warning",
            "add `pass` to auth.required_on, or remove it from `on` of the credential",
        ),
        "no_rules": ("warning", "add rules to the policies: limits on scopes, and brakes on executions"),
        "no_roles": ("warning", "list the holders in `roles:` of the policies"),
        "role_without_holder": ("warning", "name its holders in `roles:` of the policies"),
        "roles_without_method": ("warning", "configure a method of `auth`, or remove `roles:`"),
        "ids_without_prefix": (
            "warning",
            "set id_prefix on all methods but one, unless their ids mean the same callers",
        ),
        "certificate_expires": (
            "warning",
            "put a new certificate in its place; a running sidecar reads it by itself",
        ),
        "token_expires": (
            "warning",
            "make a new one with `scopegate auth token`, and remove the old one with `scopegate auth revoke`",
        ),
        "sqlite_wal_bug": (
            "note",
            "let no other program write to the database; the locks of the sidecar keep a second one out",
        ),
        # By asking
        "backend_answers_ungated": (
            "exposed",
            "let only the sidecar reach the backend, or let the backend demand a credential that "
            "upstream.credentials holds",
        ),
        "backend_rejects_credential": (
            "warning",
            "put the credential that the backend takes into its value_file",
        ),
        "admin_reachable": (
            "exposed",
            "let admin.listen be a loopback address, or configure admin.tls.certificate_file",
        ),
        "gate_lets_through": (
            "exposed",
            "find out what listens on data.listen; an execution without a scope must be refused",
        ),
        "not_ready": ("warning", "mend what `scopegate health` names"),
        "stale_configuration": ("warning", "restart the sidecar, so that it runs with this configuration"),
        "clock_skew": ("warning", "synchronise the clocks of both hosts, for example with chrony"),
    }
)


@dataclass(frozen=True, slots=True)
class Finding:
    """One finding. `what` is a sentence without a full stop."""

    code: str
    what: str

    @property
    def level(self) -> Level:
        return KINDS[self.code][0]

    @property
    def remedy(self) -> str:
        return KINDS[self.code][1]

    def to_dict(self) -> dict[str, str]:
        return {"code": self.code, "level": self.level, "finding": self.what, "remedy": self.remedy}


def of_files(contents: Contents, now: int) -> Iterator[Finding]:
    """What the configuration, the policies and the files that they name show. `now` is in microseconds since
    1970."""
    settings = contents.loaded.settings
    yield from of_callers(contents, now)
    yield from _of_the_gate(settings)
    rules = contents.policies.rules
    for rule in rules:
        if rule.shadow:
            yield Finding("shadow_rule", f"The rule {rule.id} is in shadow mode, so it refuses nothing")
    if not rules:
        yield Finding(
            "no_rules", "The policies have no rules, so a scope may have every term within the limits"
        )
    yield from _readable(settings)
    yield from _of_sqlite(settings)
    yield from _of_custody(settings)


def _of_custody(settings: Settings) -> Iterator[Finding]:
    upstream = settings.upstream
    if not any("gated" in each.on for each in upstream.credentials) and upstream.tls.certificate_file is None:
        yield Finding("no_custody", "The sidecar holds no credential of the backend, so its callers must")


def of_callers(contents: Contents, now: int) -> Iterator[Finding]:
    """What concerns callers and the files that prove who they are, which `scopegate check` shows as well."""
    settings, roles = contents.loaded.settings, contents.policies.roles.holders
    methods = settings.auth.methods
    if not methods:
        yield Finding(
            "no_auth_method",
            "No method of authentication is configured: every caller is anonymous and may do everything",
        )
        if roles:
            yield Finding(
                "roles_without_method", "The policies list roles, which have no effect without a method"
            )
    else:
        if not roles:
            yield Finding("no_roles", "The policies list no roles, so every call that needs one is refused")
        for role in _NEEDED if roles else ():
            if role not in roles:
                yield Finding(
                    "role_without_holder", f"No caller holds the role {role}, so its calls are refused"
                )
        if not settings.auth.required:
            yield Finding("credential_not_required", "A caller without a credential is not refused as such")
    bearing = {"tokens", "jwt"} & set(methods)
    if bearing and not settings.data.listen.is_loopback() and not settings.data.tls.certificate_file:
        yield Finding(
            "tokens_without_tls",
            f"Tokens come to {settings.data.listen} without TLS, so that others on the way can read them",
        )
    lent = [each.header for each in settings.upstream.credentials if "pass" in each.on]
    if lent and not (settings.auth.required and "pass" in settings.auth.required_on):
        yield Finding(
            "credential_lent",
            f"The credential {lent[0]} goes with every request that passes, from any caller",
        )
    plain = [name for name, prefix in settings.auth.prefixes.items() if not prefix]
    if len(plain) > 1:
        yield Finding(
            "ids_without_prefix",
            f"The methods {' and '.join(plain)} give ids without a prefix, so one id of them is one caller",
        )
    for network in settings.auth.proxy.trusted:
        if network != "unix" and not _is_private(network):
            yield Finding("wide_trusted_proxy", f"auth.proxy.trusted has {network}, which is not private")
    yield from _expiring(contents, now)


def _is_private(network: ipaddress.IPv4Network | ipaddress.IPv6Network) -> bool:
    return network.is_private and network.prefixlen > 0


def _of_the_gate(settings: Settings) -> Iterator[Finding]:
    gate = settings.gate
    for route in gate.routes:
        if route.mode == "shadow":
            yield Finding("shadow_route", f"The route {route.label} is in shadow mode, so it refuses nothing")
    if gate.unlisted.writes == "pass":
        yield Finding("unlisted_writes_pass", "Writes that no route lists pass, unrecorded")
    if gate.scope_required_from > RiskClass.LOW:
        least = gate.scope_required_from.value
        yield Finding("scopeless_actions", f"Actions below {least} risk need no scope")


def _expiring(contents: Contents, now: int) -> Iterator[Finding]:
    settings = contents.loaded.settings
    tls = {"data": settings.data.tls, "admin": settings.admin.tls, "ops": settings.ops.tls}
    files: list[tuple[str, Path | None]] = [
        (f"{name}.tls.{key}", getattr(section, key))
        for name, section in tls.items()
        for key in ("certificate_file", "client_ca_file")
    ]
    upstream = settings.upstream.tls
    files += [
        ("upstream.tls.certificate_file", upstream.certificate_file),
        ("upstream.tls.ca_file", upstream.ca_file),
    ]
    for key, file in files:
        if file is not None:
            yield from _expiring_certificate(key, file, now)
    tokens = () if contents.callers.tokens is None else contents.callers.tokens.tokens
    for token in tokens:
        if token.not_after is not None and token.not_after < now + _SOON:
            made = _when(token.not_after, now)
            yield Finding("token_expires", f"A token of {token.name} ({token.digest.hex()[:8]}) {made}")


def _expiring_certificate(key: str, file: Path, now: int) -> Iterator[Finding]:
    from sidecar.files.tls import TlsFileUnusable, last_valid_until, valid_until

    try:
        # Of several authorities, as in a rotation, the last one to expire counts.
        is_own = key.endswith(".certificate_file")
        ends = to_instant(valid_until(file) if is_own else last_valid_until(file))
    except TlsFileUnusable:
        return  # reading the configuration reports it
    if ends < now + _SOON:
        yield Finding("certificate_expires", f"The certificate of {key} ({file}) {_when(ends, now)}")


def _when(ends: int, now: int) -> str:
    days = (ends - now) // (86_400 * SECOND)
    if ends <= now:
        return "has expired"
    return f"expires in {days} days" if days > 1 else "expires within two days"


def _readable(settings: Settings) -> Iterator[Finding]:
    """Files that hold secrets, or decide who may do what, and that others may read or write."""
    for key, file in _private_files(settings):
        try:
            status = os.stat(file)
        except OSError:
            continue  # `unseen` says so
        # As for every key file: the group may read what root hands to another user, as in a mounted Secret.
        handed = status.st_uid == 0 and os.geteuid() != 0
        if stat.S_IMODE(status.st_mode) & (0o037 if handed else 0o077):
            mode = f"{stat.S_IMODE(status.st_mode):04o}"
            yield Finding("file_readable_by_others", f"{file} ({key}) has the mode {mode}")


def unseen(settings: Settings) -> Iterator[str]:
    """A sentence for each private file whose permissions this user cannot see. A store that does not exist
    yet is none of them."""
    for key, file in _private_files(settings):
        try:
            os.stat(file)
        except FileNotFoundError:
            continue
        except OSError as exc:
            yield f"The permissions of {file} ({key}) were not seen: {exc.strerror}."


def _private_files(settings: Settings) -> Iterator[tuple[str, Path]]:
    """The files that only the sidecar should read, each with its key."""
    store = settings.store.file
    named: list[tuple[str, Path | None]] = [
        ("store.url", store),
        ("store.url", None if store is None else Path(f"{store}-wal")),
        ("log.signing_key_file", settings.log.signing_key_file),
        ("log.mask_key_file", settings.log.mask_key_file),
        ("auth.tokens.file", settings.auth.tokens.file),
        *(("upstream.credentials", each.value_file) for each in settings.upstream.credentials),
    ]
    sections = ("data", "admin", "ops", "upstream")
    named += [(f"{name}.tls.key_file", getattr(settings, name).tls.key_file) for name in sections]
    yield from ((key, file) for key, file in named if file is not None)


def _of_sqlite(settings: Settings) -> Iterator[Finding]:
    if settings.store.file is not None and has_wal_bug(sqlite3.sqlite_version_info):
        yield Finding(
            "sqlite_wal_bug",
            f"SQLite {sqlite3.sqlite_version} can damage a database that two connections write or checkpoint",
        )


def has_wal_bug(version: tuple[int, ...]) -> bool:
    """Whether this release can damage a WAL database that two connections write or checkpoint.

    SQLite has mended it in 3.51.3, and in 3.44.6 and 3.50.7 of its older branches.
    """
    major, minor, patch = version[:3]
    mended = _MENDED.get((major, minor))
    return (major, minor, patch) < (3, 51, 3) if mended is None else patch < mended
