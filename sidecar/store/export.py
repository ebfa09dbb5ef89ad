"""The log as JSON lines, with the exact bytes that its hashes cover. In short pages and constant memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sidecar.core.chain import GENESIS
from sidecar.store.logfile import START, opened


def exported(path: Path, after: int = 0) -> Iterator[tuple[int, int, bytes]]:
    """(number of the record, number of the last one, its line) for each behind `after`, up to the last now.

    Raises StoreUnavailable where the database cannot be read, LogTampered where it is damaged. Whether the
    log is true is for verify to say.
    """
    with opened(path) as log:
        last = log.last()
        previous = log.hash_of(after) or GENESIS
        for page in log.pages("CAST(hash AS BLOB), CAST(envelope AS BLOB)", after or START, last):
            for seq, hash_, envelope in page:
                head = f'{{"seq":{seq},"hash":"{hash_.hex()}","previous_hash":"{previous.hex()}","envelope":'
                yield seq, last, head.encode("ascii") + envelope + b"}\n"
                previous = hash_
