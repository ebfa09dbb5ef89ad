"""How much a connection reads at once.

asyncio reads into 256 KiB that it allocates for each read, of which a request takes a few hundred bytes. Such
a large allocation gets fresh pages from the system and gives them back, which costs five times as much as the
rest of the read. Up to 128 KiB, the C library takes it from memory that the process has already.
"""

from __future__ import annotations

import asyncio

READ_BYTES = 64 * 1024


def limit_reads(transport: asyncio.BaseTransport) -> None:
    """Read at most READ_BYTES at once.

    asyncio has no public call for this. A transport of TLS has its own buffer and ignores the limit. Other
    event loops have transports of their own.
    """
    if hasattr(transport, "max_size"):
        transport.max_size = READ_BYTES
