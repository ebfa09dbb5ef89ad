"""Reads a checkpoint file. Only checkpoints that a known key has signed attest anything."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from sidecar.core.checkpoint import Checkpoint
from sidecar.errors import LogTampered, StoreUnavailable

if TYPE_CHECKING:
    from sidecar.files.signing import PublicKey  # slow to import, and used only if the log is signed


@dataclass(frozen=True, slots=True)
class Attested:
    """A checkpoint with a valid signature, and its line number in the file."""

    line: int
    checkpoint: Checkpoint

    def __str__(self) -> str:
        return f"the checkpoint of {self.checkpoint.time} (line {self.line})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Attestation:
    """`attested` is in the order of the file. `unknown` counts the lines signed by other keys, by key id."""

    attested: Sequence[Attested] = ()
    unknown: Mapping[str, int] = field(default_factory=dict)


NONE = Attestation()


def read_checkpoints(path: Path, keys: Sequence[PublicKey]) -> Attestation:
    """Read a checkpoint file. A file that does not exist attests nothing.

    A last line without a line end was never written completely, so it is skipped. Raises LogTampered at the
    first complete line that is not a checkpoint or has a wrong signature, and StoreUnavailable if the file
    cannot be read.
    """
    known = {key.id: key for key in keys}
    attested: list[Attested] = []
    unknown: Counter[str] = Counter()
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.endswith(b"\n"):
                    break
                try:
                    checkpoint = Checkpoint.parse(line)
                except (ValueError, RecursionError) as exc:
                    raise LogTampered(f"line {number} of {path} was altered: it is no checkpoint") from exc
                key = known.get(checkpoint.key_id)
                if key is None:
                    unknown[checkpoint.key_id] += 1
                elif key.has_signed(checkpoint):
                    attested.append(Attested(number, checkpoint))
                else:
                    raise LogTampered(f"line {number} of {path} was altered: its signature does not fit")
    except FileNotFoundError:
        return NONE
    except OSError as exc:
        raise StoreUnavailable(f"cannot read the checkpoints in {path}: {exc.strerror or exc}") from exc
    return Attestation(attested=attested, unknown=unknown)
