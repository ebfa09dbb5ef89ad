"""A checkpoint: the holder of a key attests the length and the last hash of a log at some time."""

from __future__ import annotations

import json
import re
from base64 import b64decode, b64encode
from dataclasses import dataclass

# This prefix keeps the signature of a checkpoint from being valid for any other message.
DOMAIN = b"scopegate checkpoint v1\n"

_HEAD = re.compile(r"[0-9a-f]{64}")
_MEMBERS = {"count": int, "head": str, "key_id": str, "signature": str, "time": str, "writer": str}


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The signed state of a log at `time`, which is ISO 8601 in UTC.

    `count` is the number of records of the writer. `head` is the hash of the last record, in hex.
    `signature` covers all other fields. It is empty until the checkpoint is signed.
    """

    key_id: str
    writer: str
    count: int
    head: str
    time: str
    signature: bytes = b""

    def message(self) -> bytes:
        """The bytes that are signed."""
        return DOMAIN + _json(self._said())

    def line(self) -> bytes:
        """The line of a checkpoint file, including the line feed."""
        return _json({**self._said(), "signature": b64encode(self.signature).decode("ascii")}) + b"\n"

    def _said(self) -> dict[str, str | int]:
        return {
            "key_id": self.key_id,
            "writer": self.writer,
            "count": self.count,
            "head": self.head,
            "time": self.time,
        }

    @classmethod
    def parse(cls, line: bytes) -> Checkpoint:
        """The checkpoint of a line. Raises ValueError for a line that `line` would write differently."""
        members = json.loads(line)
        if (
            not isinstance(members, dict)
            or {name: type(value) for name, value in members.items()} != _MEMBERS
        ):
            raise ValueError("is no checkpoint")
        if members["count"] < 0 or not _HEAD.fullmatch(members["head"]):
            raise ValueError("holds a count or a head that cannot be")
        found = cls(**{**members, "signature": b64decode(members["signature"], validate=True)})
        if found.line() != line:
            raise ValueError("is not written as a checkpoint is")
        return found


def _json(members: dict[str, str | int]) -> bytes:
    return json.dumps(members, sort_keys=True, separators=(",", ":")).encode("ascii")
