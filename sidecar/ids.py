"""New ids. This is the only module that draws random numbers.

A scope's id lets its bearer act, so it comes from the system's CSPRNG. Ids of decisions and traces only need
to be unique. They come from a generator that the system seeded, because it needs no system call for each id.
"""

from __future__ import annotations

import os
import random
import secrets
import time

# This generator is separate, because a host program may seed the global one. Each forked process seeds it
# again, because two processes must not share a state.
_random = random.Random()
_NOT_ZERO = 1 << 64 | 1  # one bit of a trace's id and one of a span's, because neither may be zero
os.register_at_fork(after_in_child=_random.seed)


def new_decision_id() -> str:
    """A UUIDv7 (RFC 9562, section 5.7). It sorts by its creation time, to the millisecond."""
    milliseconds = time.time_ns() // 1_000_000
    random_a, random_b = _random.getrandbits(12), _random.getrandbits(62)
    digits = f"{milliseconds << 80 | 0x7 << 76 | random_a << 64 | 0x2 << 62 | random_b:032x}"
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def new_trace_ids() -> tuple[str, str]:
    """The ids of a new trace and of its first span, in the form of a W3C `traceparent` header."""
    digits = f"{_random.getrandbits(192) | _NOT_ZERO:048x}"
    return digits[:32], digits[32:]


def new_scope_id() -> str:
    """`scope_` and 32 hex characters, 128 bits, from the system's CSPRNG."""
    return f"scope_{secrets.token_hex(16)}"
