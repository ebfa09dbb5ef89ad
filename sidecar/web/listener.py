"""One listener: where it listens, by TLS or not, until it closes. Nothing that is not ours is removed."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import ssl
import stat
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from weakref import WeakSet

from sidecar.addresses import Address, Listen, SocketFile
from sidecar.errors import ScopegateError
from sidecar.tls import Credentials, told

logger = logging.getLogger("scopegate.web")

BACKLOG = 2048

Factory = Callable[[], asyncio.Protocol]


class Listener:
    """Serves each connection by a protocol of its own.

    A Unix socket has `mode`. With `credentials` it speaks TLS; a connection that does not come through its
    handshake within `handshake_seconds` is closed, and the protocol never hears of it.
    """

    def __init__(
        self,
        name: str,
        protocol: Factory,
        *,
        credentials: Credentials | None,
        handshake_seconds: float,
        mode: int,
    ) -> None:
        self.name = name
        self.credentials = credentials
        self.handshake_seconds = handshake_seconds
        self._mode = mode
        self.protocol = protocol
        self._factory: Factory = protocol if credentials is None else lambda: _Handshake(self)
        self._server: asyncio.Server | None = None
        self._file: tuple[SocketFile, tuple[int, int]] | None = None
        self.tasks: set[asyncio.Task[Any]] = set()  # handshakes, and connections that came late
        self.secured: WeakSet[asyncio.Transport] = WeakSet()

    async def open(self, address: Address) -> Address:
        """Listen, and tell the address that it really has. Raises ScopegateError."""
        loop = asyncio.get_running_loop()
        try:
            if isinstance(address, SocketFile):
                bound = self._bind(address)
                self._server = await loop.create_unix_server(self._factory, sock=bound, backlog=BACKLOG)
            elif not address.host.strip("0:") and socket.has_dualstack_ipv6():
                both = socket.create_server(
                    (address.host, address.port),
                    family=socket.AF_INET6,
                    backlog=BACKLOG,
                    dualstack_ipv6=True,  # asyncio would leave IPv4 out
                )
                self._server = await loop.create_server(self._factory, sock=both, backlog=BACKLOG)
                address = Listen(*both.getsockname()[:2])
            else:
                self._server = await loop.create_server(
                    self._factory, address.host, address.port, backlog=BACKLOG
                )
                # With the port that the system chose for port 0.
                address = Listen(*self._server.sockets[0].getsockname()[:2])
        except OSError as exc:
            reason = exc.strerror or exc
            raise ScopegateError(f"{self.name}.listen: cannot listen on {address}: {reason}") from exc
        logger.info("listening", extra={"listener": self.name, "address": str(address)})
        return address

    def close(self) -> None:
        """Take nobody new in, but serve whoever has connected already."""
        if self._server is None:
            return
        loop = asyncio.get_running_loop()
        for listening in self._server.sockets:
            # asyncio's sockets cannot be accepted on; a duplicate of the descriptor can.
            duplicate = socket.socket(fileno=os.dup(listening.fileno()))
            duplicate.setblocking(False)
            with duplicate:
                while True:
                    try:
                        connection, _ = duplicate.accept()
                    except OSError:
                        break
                    connection.setblocking(False)
                    self.keep(loop.create_task(loop.connect_accepted_socket(self._factory, connection)))
        self._server.close()
        self._server = None
        if self._file is not None:
            address, ours = self._file
            with suppress(OSError):  # then it is gone, or its folder is
                found = os.lstat(address.path)
                if (found.st_dev, found.st_ino) == ours:
                    os.unlink(address.path)

    def abort(self) -> None:
        """End what TLS still does: handshakes, and connections that wait for the other side's farewell."""
        for task in self.tasks:
            task.cancel()
        for transport in self.secured:
            transport.abort()

    def keep(self, task: asyncio.Task[Any]) -> None:
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def _bind(self, address: SocketFile) -> socket.socket:
        """A socket in the file system, in place of one on which nobody listens any more."""
        _make_room(self.name, address)
        bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # Made under the mask, the file has its mode from the first moment on.
        before = os.umask(0o777 & ~self._mode)
        try:
            bound.bind(str(address.path))
            made = os.lstat(address.path)
        except BaseException:
            bound.close()
            raise
        finally:
            os.umask(before)
        self._file = address, (made.st_dev, made.st_ino)
        return bound


def _make_room(name: str, address: SocketFile) -> None:
    """Remove a socket on which nobody answers. Raises ScopegateError, OSError."""
    try:
        found = os.lstat(address.path)
    except FileNotFoundError:
        folder = address.path.parent
        if folder.is_dir():
            return
        message = f"{name}.listen: cannot listen on {address}: there is no folder {folder}; make it first"
        raise ScopegateError(message) from None
    if not stat.S_ISSOCK(found.st_mode):
        message = f"{name}.listen: {address.path} is there and is no socket; remove it, or name another one"
        raise ScopegateError(message)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as knocking:
        knocking.setblocking(False)
        answered = knocking.connect_ex(str(address.path))
    if answered == errno.ENOENT:
        return
    if answered != errno.ECONNREFUSED:
        message = f"{name}.listen: another process listens on {address}; stop it, or name another socket"
        if answered not in (0, errno.EAGAIN):
            message = f"{name}.listen: cannot listen on {address}: {os.strerror(answered)}"
        raise ScopegateError(message)
    os.unlink(address.path)


class _Handshake(asyncio.Protocol):
    """A connection until its TLS handshake is done. Then the listener's own protocol takes over."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._early = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        plain = transport
        assert isinstance(plain, asyncio.Transport)
        plain.pause_reading()  # until TLS reads
        self._listener.keep(asyncio.get_running_loop().create_task(self._secure(plain)))

    def data_received(self, data: bytes) -> None:
        self._early += data  # it came together with the end of the handshake

    async def _secure(self, plain: asyncio.Transport) -> None:
        listener = self._listener
        assert listener.credentials is not None
        try:
            secured: asyncio.Transport | None = await asyncio.get_running_loop().start_tls(
                plain,
                self,
                listener.credentials.context,
                server_side=True,
                ssl_handshake_timeout=listener.handshake_seconds,
            )
        except ssl.SSLError as exc:
            logger.info("a TLS handshake failed", extra={"listener": listener.name, "cause": told(exc)})
            return
        except OSError as exc:  # it left, or took too long
            logger.debug("a TLS handshake broke off", extra={"listener": listener.name, "cause": told(exc)})
            return
        if secured is None:
            return  # lost as soon as it was there
        listener.secured.add(secured)
        protocol = listener.protocol()
        secured.set_protocol(protocol)
        protocol.connection_made(secured)
        if self._early:
            protocol.data_received(self._early)
