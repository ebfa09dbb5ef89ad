"""Exports the log as JSON lines that hold the exact hashed bytes. It reads in short pages, in constant
memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sidecar.core.chain import GENESIS
from sidecar.store.logfile import START, opened


def exported(path: Path, after: int = 0) -> Iterator[tuple[int, int, bytes]]:
    """Yield (record number, number of the last record, line) for each record after `after`.

    The export ends at the record that is last when it starts. Raises StoreUnavailable if the database cannot
    be read, and LogTampered if it is damaged. The export does not verify the chain; `log verify` does.
    """
    with opened(path) as log:
        last = log.last()
        previous = log.hash_of(after) or GENESIS
        for page in log.pages("CAST(hash AS BLOB), CAST(envelope AS BLOB)", after or START, last):
            for seq, hash_, envelope in page:
                head = f'{{"seq":{seq},"hash":"{hash_.hex()}","previous_hash":"{previous.hex()}","envelope":'
                yield seq, last, head.encode("ascii") + envelope + b"}\n"
                previous = hash_
