"""Reads from connections without an allocation for each read.

asyncio's usual protocols get each piece from a read into 256 KiB that are allocated for it, of which a
request takes a few hundred bytes. The system gives such an allocation fresh pages and takes them back, which
costs as much as the rest of the read five times over. Here all connections of one owner read into one
buffer, and copy what came out of it.
"""

from __future__ import annotations

import asyncio

READ_BYTES = 64 * 1024


class ReadBuffer:
    """The buffer of connections on one event loop. What one of them reads stays until the next one reads."""

    __slots__ = ("view",)

    def __init__(self) -> None:
        self.view = memoryview(bytearray(READ_BYTES))


class Receiver(asyncio.BufferedProtocol):
    """A protocol whose `data_received` is called as that of an asyncio.Protocol is.

    A class that derives from it sets `read_buffer` before its connection is made.
    """

    read_buffer: ReadBuffer

    def data_received(self, data: bytes) -> None:
        """Bytes arrived."""
        raise NotImplementedError

    def get_buffer(self, sizehint: int) -> memoryview:
        return self.read_buffer.view

    def buffer_updated(self, nbytes: int) -> None:
        self.data_received(bytes(self.read_buffer.view[:nbytes]))
