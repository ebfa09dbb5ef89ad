"""`scopegate log`: verify the decision log, make the key that signs its checkpoints, export it."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import click

from sidecar.cli.options import (
    attestation_of,
    check_known,
    config_option,
    database,
    failed,
    give_output_up,
    load_settings,
    progress_bar,
    public_key_option,
    set_option,
    tampered,
)
from sidecar.errors import LogTampered, StoreUnavailable
from sidecar.files import keyfiles
from sidecar.files.signing import SigningKey
from sidecar.store.attestation import Attestation
from sidecar.store.export import exported
from sidecar.store.verify import Verified, verify_sqlite


@click.group(
    epilog="""\b
Examples:
  scopegate log verify --config config/scopegate.yaml
  scopegate log keygen /etc/scopegate/log.key
  scopegate log export --config config/scopegate.yaml --output log.jsonl"""
)
def log() -> None:
    """The decision log: verify it, sign it, export it."""


# Verifying -----------------------------------------------------------------------------------------


@log.command(
    epilog="""\b
Examples:
  scopegate log verify --config config/scopegate.yaml
  scopegate log verify --config config/scopegate.yaml --public-key log.key.pub"""
)
@config_option
@set_option
@public_key_option
def verify(config: Path, overrides: tuple[str, ...], public_keys: tuple[Path, ...]) -> None:
    """Recompute the hash chain of the log; works beside a running sidecar. Exit code 4: tampering found.

    Signed checkpoints show whether records are missing from the end, and whether all of it was rewritten.
    The tables, the append-only triggers, the kill switch and the references to records are verified as well.
    """
    loaded = load_settings(config, overrides, read_keys=False)
    path = database(config, loaded)
    try:
        attestation = attestation_of(loaded, public_keys)
        with progress_bar("Verifying", hidden=not sys.stderr.isatty()) as progress:
            verified = verify_sqlite(path, progress, attestation)
    except LogTampered as exc:
        tampered(exc)
    except StoreUnavailable as exc:
        failed(f"cannot verify: {exc}")
    click.echo(f"ok: {verified.records} records of writer {verified.writer}, head {verified.head.hex()}")
    for line in _attested(loaded.log.checkpoint_file, attestation, verified):
        click.echo(line)
    check_known(attestation)


def _attested(file: Path | None, attestation: Attestation, verified: Verified) -> Iterator[str]:
    """Sentences that say how far the log is attested."""
    if verified.attested is not None:
        checkpoint = verified.attested.checkpoint
        yield f"Attested up to record {checkpoint.count}, by key {checkpoint.key_id} at {checkpoint.time}."
        if checkpoint.count < verified.records:
            yield f"The {verified.records - checkpoint.count} records after it are not attested yet."
    else:
        if file is None:
            why = "log.signing_key_file and log.checkpoint_file are not configured"
        elif attestation.unknown:
            why = f"no checkpoint in {file} is of a known key"
        else:
            why = f"there is no checkpoint in {file}"
        yield f"The tail is not attested: {why}, so missing records at the end would go unnoticed."


# Making a key --------------------------------------------------------------------------------------


@log.command(
    epilog="""\b
Example:
  scopegate log keygen /etc/scopegate/log.key"""
)
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
def keygen(file: Path) -> None:
    """Make a key that signs checkpoints: FILE, which stays secret, and FILE.pub, which verifies them.

    Neither is ever overwritten.
    """
    key = SigningKey.generate()
    public = Path(f"{file}.pub")
    for path, contents, mode in ((file, key.pem(), 0o600), (public, key.public.pem(), 0o644)):
        try:
            keyfiles.create(path, contents, mode)
        except OSError as exc:
            if path == public:
                with suppress(OSError):
                    os.unlink(file)  # this call created it, and a key without its other half is useless
            failed(f"cannot make {path}: {exc.strerror or exc}; nothing was changed")
    click.echo(f"key id   {key.public.id}")
    click.echo(f"private  {file}, which signs: keep it secret")
    click.echo(f"public   {public}, which verifies: give it to those who verify")
    click.echo("\nFor the configuration (keep checkpoint_file on another disk than the store):\n")
    click.echo(f"log:\n  signing_key_file: {file.absolute()}\n  checkpoint_file: var/checkpoints.jsonl")


# Exporting -----------------------------------------------------------------------------------------


@log.command(
    epilog="""\b
Examples:
  scopegate log export --config config/scopegate.yaml --output log.jsonl
  scopegate log export --config config/scopegate.yaml --after 1000 | jq .envelope.record"""
)
@config_option
@set_option
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="The file to write; it appears when it is complete.  [default: standard output]",
)
@click.option(
    "--after",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="SEQ",
    help="Skip the records up to this number.",
)
def export(config: Path, overrides: tuple[str, ...], output: Path | None, after: int) -> None:
    """Write the log as JSON lines; works beside a running sidecar.

    Each line has the number of the record, its hash, the hash of the record before, and as `envelope` the
    bytes that are hashed. A hash is SHA-256 over the hash before (32 bytes, not hex) and these bytes.
    """
    path = database(config, load_settings(config, overrides, read_keys=False))
    hidden = not sys.stderr.isatty() or (output is None and sys.stdout.isatty())
    try:
        with progress_bar("Exporting", hidden=hidden) as progress, _written(output) as stream:
            for seq, last, line in exported(path, after):
                stream.write(line)
                progress(seq - after, last - after)
    except BrokenPipeError:
        give_output_up()  # the reader of the pipe has closed it
    except LogTampered as exc:
        tampered(exc)
    except StoreUnavailable as exc:
        failed(f"cannot export: {exc}")
    except OSError as exc:
        if output is None:
            give_output_up()
        failed(f"cannot write {output or 'to standard output'}: {exc.strerror or exc}")


@contextmanager
def _written(output: Path | None) -> Iterator[BinaryIO]:
    """The stream to write to: standard output, or a file that gets its final name when it is complete."""
    if output is None:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    if output.exists() and not output.is_file():
        failed(f"{output} is not a file, so it cannot be replaced; omit --output for standard output")
    number, temporary = tempfile.mkstemp(dir=output.parent, prefix=f".{output.name}.")
    try:
        with open(number, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(number)
        os.replace(temporary, output)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
