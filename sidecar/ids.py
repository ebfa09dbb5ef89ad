"""New names. The only place that draws random numbers."""

from __future__ import annotations

import os
import secrets
import time


def new_decision_id() -> str:
    """A UUIDv7 (RFC 9562, section 5.7): sorts by the time it was made, to the millisecond."""
    milliseconds = time.time_ns() // 1_000_000
    value = milliseconds << 80 | int.from_bytes(os.urandom(10), "big")
    value = value & ~(0xF << 76 | 0x3 << 62) | 0x7 << 76 | 0x2 << 62
    digits = f"{value:032x}"
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def new_scope_id() -> str:
    """`scope_` and 32 hex characters, 128 bits, from the system's CSPRNG."""
    return f"scope_{secrets.token_hex(16)}"
