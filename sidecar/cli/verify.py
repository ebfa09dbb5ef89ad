"""`scopegate log verify`: what the chain says, in words and in an exit code."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from sidecar.errors import LogTampered, StoreUnavailable
from sidecar.store.verify import verify_sqlite

FAILED = 1
TAMPERED = 4


def verify_log(path: Path) -> int:
    """Verify, print, and return the exit code."""
    shown = 0
    with click.progressbar(
        length=1, label="Verifying", file=sys.stderr, hidden=not sys.stderr.isatty()
    ) as bar:

        def progress(done: int, total: int) -> None:
            nonlocal shown
            bar.length = max(1, total)
            bar.update(done - shown)
            shown = done

        try:
            verified = verify_sqlite(path, progress)
        except LogTampered as exc:
            click.echo(f"TAMPERED: {exc}", err=True)
            return TAMPERED
        except StoreUnavailable as exc:
            click.echo(f"cannot verify: {exc}", err=True)
            return FAILED
    click.echo(f"ok: {verified.records} records of writer {verified.writer}, head {verified.head.hex()}")
    click.echo(
        "The tail is not attested: no signing key is configured, so records cut off it would not show."
    )
    return 0
