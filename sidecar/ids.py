"""New names. The only place that draws random numbers.

A scope's id lets its bearer act, so it comes from the system's CSPRNG. Ids of decisions and traces only
have to differ: they come from a generator that the system seeded, which costs no system call each.
"""

from __future__ import annotations

import random
import secrets
import time


def new_decision_id() -> str:
    """A UUIDv7 (RFC 9562, section 5.7): sorts by the time it was made, to the millisecond."""
    milliseconds = time.time_ns() // 1_000_000
    random_a, random_b = random.getrandbits(12), random.getrandbits(62)
    digits = f"{milliseconds << 80 | 0x7 << 76 | random_a << 64 | 0x2 << 62 | random_b:032x}"
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def new_traceparent() -> str:
    """A W3C `traceparent` header that begins a trace, sampled."""
    return f"00-{random.getrandbits(128) or 1:032x}-{random.getrandbits(64) or 1:016x}-01"


def new_scope_id() -> str:
    """`scope_` and 32 hex characters, 128 bits, from the system's CSPRNG."""
    return f"scope_{secrets.token_hex(16)}"
