"""What `limit_reads` relies on in asyncio."""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import suppress

from sidecar.eventloop.receiving import READ_BYTES, limit_reads


class Sizes(asyncio.Protocol):
    """Notes the size of each piece until the other side has ended."""

    def __init__(self) -> None:
        self.pieces: list[int] = []
        self.ended = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        limit_reads(transport)
        transport.pause_reading()  # until more has arrived than is read at once

    def data_received(self, data: bytes) -> None:
        self.pieces.append(len(data))

    def eof_received(self) -> None:
        self.ended.set_result(None)


def waiting_in(protocol: Sizes) -> int:
    """The number of bytes in the socket, up to one more than the limit."""
    with suppress(BlockingIOError):
        raw = protocol.transport.get_extra_info("socket")
        with socket.socket(fileno=os.dup(raw.fileno())) as duplicate:
            return len(duplicate.recv(READ_BYTES + 1, socket.MSG_PEEK))
    return 0


async def test_a_connection_reads_no_more_at_once_than_the_limit_and_loses_nothing() -> None:
    loop = asyncio.get_running_loop()
    accepted: list[Sizes] = []

    def accept() -> Sizes:
        accepted.append(Sizes())
        return accepted[-1]

    server = await loop.create_server(accept, "127.0.0.1", 0)
    async with server:
        _, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.write(b"x" * 1_000_000)
        writer.write_eof()
        while not accepted or waiting_in(accepted[0]) <= READ_BYTES:
            await asyncio.sleep(0.001)
        accepted[0].transport.resume_reading()
        await accepted[0].ended
        writer.close()
    assert sum(accepted[0].pieces) == 1_000_000
    assert max(accepted[0].pieces) == READ_BYTES
