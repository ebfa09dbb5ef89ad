"""`scopegate store`: backs up the store while it is in use, and accepts a clock that is behind the log."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import click

from sidecar.cli.access import Access, asks
from sidecar.cli.options import (
    FAILED,
    attestation_of,
    check_known,
    config_option,
    database,
    failed,
    json_option,
    load_settings,
    misconfigured,
    progress_bar,
    public_key_option,
    set_option,
    tampered,
    tell,
)
from sidecar.errors import LogTampered, StoreUnavailable
from sidecar.settings.reading import Settings
from sidecar.store.backup import Backup, back_up
from sidecar.web.wire.answers import AcceptedClock


@click.group(
    epilog="""\b
Example:
  scopegate store backup /backup/scopegate.db --config config/scopegate.yaml"""
)
def store() -> None:
    """The store: back it up, and accept the clock if the log disagrees with it."""


@store.command(
    epilog="""\b
Examples:
  scopegate store backup /backup/scopegate.db --config config/scopegate.yaml
  scopegate store backup /backup/latest.db --force --json --config config/scopegate.yaml"""
)
@click.argument("file", type=click.Path(path_type=Path))
@config_option
@set_option
@public_key_option
@click.option("--force", is_flag=True, help="Replace an existing FILE, once the new copy is verified.")
@json_option
def backup(
    file: Path,
    config: Path,
    overrides: tuple[str, ...],
    public_keys: tuple[Path, ...],
    force: bool,
    as_json: bool,
) -> None:
    """Copy the store, as it is at one moment, to FILE. Works beside a running sidecar.

    The copy is verified as `log verify` verifies the store, and page by page, before it is named FILE. If
    anything is wrong, there is no FILE. The copy is a single file. Exit code 4: tampering or damage found.
    """
    _end_as_by_ctrl_c()
    loaded = load_settings(config, overrides, read_keys=False)
    source = database(config, loaded)
    target = file.absolute()
    if "?" in str(target) or "#" in str(target):
        misconfigured(f"FILE: {target} holds ? or #, which store.url cannot name; choose another name")
    if not _is_text(target):
        misconfigured(f"FILE: {target} is not UTF-8, so store.url cannot name it; choose another name")
    if target.parent.resolve().is_relative_to(loaded.policies.resolve()):
        misconfigured(f"FILE: {file} is in the folder of the policies; put the backup elsewhere")
    for used, what in _in_use(config, loaded, source):
        if _is_same(target, used):
            misconfigured(f"FILE: {file} is {what}; give the backup a name of its own")
    begun = time.monotonic()
    try:
        attestation = attestation_of(loaded, public_keys)
        check_known(attestation)
        with progress_bar("Copying and verifying", hidden=not sys.stderr.isatty()) as progress:
            made = back_up(
                source,
                target,
                replace=force,
                attestation=attestation,
                progress=progress,
                hung=_end_while_it_hangs,
            )
    except LogTampered as exc:
        tampered(exc)
    except StoreUnavailable as exc:
        failed(f"cannot back up: {exc}")
    seconds = time.monotonic() - begun
    if as_json:
        click.echo(json.dumps(_as_json(target, made, seconds)))
        return
    verified = made.verified
    click.echo(f"ok: {verified.records} records of writer {verified.writer}, head {verified.head.hex()}")
    click.echo(f"{target}: {made.size:,} bytes, copied and verified in {seconds:.2f} s")
    click.echo(f"To verify it again:\n  {_verification(config, loaded, overrides, target)}")


@store.command(
    "accept-clock",
    epilog="""\b
Examples:
  scopegate store accept-clock --config config/scopegate.yaml
  scopegate store accept-clock --admin 127.0.0.1:9901 --json""",
)
@asks("admin")
@json_option
def accept_clock(sidecar: Access, *, as_json: bool) -> None:
    """Accept the wall clock of a running sidecar, if the clock jumped ahead or is behind the log.

    Check the clock first (`date`), because scopes expire by it from now on. The acceptance is recorded.
    """
    look = "scopegate status"
    path = "/api/v1/store/accept-clock"
    accepted = sidecar.listener.ask("POST", path, AcceptedClock, look=look).body
    if as_json:
        tell(accepted)
    else:
        step = f"{accepted['step_seconds']:+.3f} s"
        click.echo(f"accepted: the time is {accepted['now']}, {step} from the sidecar's time before")
        click.echo(f"recorded as {accepted['decision_id']}")


def _end_as_by_ctrl_c() -> None:
    """Handle SIGTERM (a time limit) and SIGHUP (a closed terminal) like Ctrl-C, so that the backup cleans
    up."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup wants it ignored
            signal.signal(number, signal.default_int_handler)


def _end_while_it_hangs(exc: StoreUnavailable) -> None:
    """End the process while the copy hangs on a disk, because that releases the WAL of the store.

    If standard error hangs as well, the process ends without its message.
    """
    message = f"scopegate: cannot back up: {exc}"
    said = threading.Thread(target=click.echo, args=(message,), kwargs={"err": True}, daemon=True)
    said.start()
    said.join(1.0)
    os._exit(FAILED)


def _is_text(path: Path) -> bool:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def _in_use(config: Path, loaded: Settings, source: Path) -> Iterator[tuple[Path, str]]:
    """The files that a backup may not replace, each with its description."""
    # SQLite keeps its other files beside the target of a symbolic link.
    database = source.resolve()
    yield database, "the store itself"
    for suffix in ("-wal", "-shm", "-journal", ".lock"):
        yield Path(f"{database}{suffix}"), "a part of the store"
    yield config, "the configuration"
    for policy in loaded.policies.glob("*.yaml"):  # a link leads out of the folder
        yield policy, "a policy file"
    for key in ("checkpoint_file", "signing_key_file", "mask_key_file"):
        used: Path | None = getattr(loaded.log, key)
        if used is not None:
            yield used, f"log.{key}"
    for name in ("data", "admin", "ops", "upstream"):
        for key, used in getattr(loaded, name).tls.files().items():
            if used is not None:
                yield used, f"{name}.tls.{key}"


def _is_same(one: Path, other: Path) -> bool:
    if one.exists() and other.exists():
        return one.samefile(other)
    return one.resolve() == other.resolve()


def _as_json(target: Path, made: Backup, seconds: float) -> dict[str, str | int | float]:
    return {
        "file": str(target),
        "records": made.verified.records,
        "head": made.verified.head.hex(),
        "bytes": made.size,
        "seconds": round(seconds, 3),
    }


def _verification(config: Path, loaded: Settings, overrides: tuple[str, ...], target: Path) -> str:
    """The command that verifies the backup. It leaves out the checkpoint file, which soon covers records that
    the backup lacks."""
    sets = [*overrides, f"store.url=sqlite:///{target}"]
    if loaded.log.checkpoint_file is not None:
        sets += ["log.signing_key_file=null", "log.checkpoint_file=null"]
    words = ["scopegate", "log", "verify", "--config", str(config)]
    return shlex.join([*words, *(word for one in sets for word in ("--set", one))])
