"""One listener: where it listens, by TLS or not, until it closes. Nothing that is not ours is removed.

It holds a bounded number of connections, so that a flood on one listener leaves descriptors to the others and
to the rest of the sidecar. It accepts by itself, because asyncio's servers can neither turn anybody away nor
stop complaining once descriptors run out.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import resource
import socket
import ssl
import stat
import struct
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any
from weakref import WeakSet

from sidecar.errors import ScopegateError
from sidecar.files.tls import Credentials, told
from sidecar.settings.addresses import Address, Listen, SocketFile

logger = logging.getLogger("scopegate.web")

BACKLOG = 2048  # who may wait in the kernel
IN_A_ROW = 64  # accepted before the loop sees to others

# How many connections at least and at most. Services tell the admin listener of their decisions, each on a
# connection of its own if need be; ops hears from probes and Prometheus only.
OPS_CONNECTIONS = 128
ADMIN_CONNECTIONS = (128, 1_024)
DATA_CONNECTIONS = (64, 65_536)
# The database with its readers, the listening sockets, log, checkpoints, configuration, traces, event loop.
OTHER_FILES = 64

# macOS says that it allows any number, and then no more than this (OPEN_MAX).
MACOS_FILES = 10_240

TURNED_AWAY_SECONDS = 60.0  # between two lines about it
STARVED_SECONDS = 1.0
RETRY_SECONDS = 0.1  # after descriptors ran out
_STARVED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

Factory = Callable[[], asyncio.Protocol]


def connections(files: int, upstream_connections: int) -> dict[str, int]:
    """How many connections each listener may hold where the process may have this many files open.

    Admin has a quarter of them, within its bounds. Data has what is left after all that must work during a
    flood: the connections to the backend, those of admin and ops, and OTHER_FILES. Where hardly anything is
    left each still serves its least: not to serve at all would be worse than to run out.
    """
    admin = _within(ADMIN_CONNECTIONS, files // 4)
    left = files - upstream_connections - admin - OPS_CONNECTIONS - OTHER_FILES
    return {"data": _within(DATA_CONNECTIONS, left), "admin": admin, "ops": OPS_CONNECTIONS}


def _within(bounds: tuple[int, int], wanted: int) -> int:
    least, most = bounds
    return min(most, max(least, wanted))


def file_limit() -> int:
    """How many files this process may have open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1 << 30 if soft == resource.RLIM_INFINITY else soft


def raise_file_limit() -> None:
    """As many files as this process may allow itself. Raises nothing: what cannot be raised stays."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for wanted in (hard, MACOS_FILES):
        try:
            if soft not in (hard, resource.RLIM_INFINITY):
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            return
        except (OSError, ValueError) as exc:
            cause = str(exc)
    logger.info("the file limit stays as it is", extra={"cause": cause, "limit": file_limit()})


class _Connection(socket.socket):
    """Gives its place back once its descriptor is closed, whoever closes it and in whatever state."""

    __slots__ = ("_places",)

    def __init__(self, accepted: socket.socket, places: set[int]) -> None:
        super().__init__(accepted.family, accepted.type, accepted.proto, fileno=accepted.detach())
        self._places = places
        places.add(self.fileno())

    def close(self) -> None:
        self._places.discard(self.fileno())
        super().close()


class _Seldom:
    """Whether to say now what happens often: at most once in so many seconds."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._next = float("-inf")
        self._count = 0

    def due(self) -> int:
        """How often it has happened since it was last said, with this time; 0: not now."""
        self._count += 1
        now = time.monotonic()
        if now < self._next:
            return 0
        self._next = now + self._seconds
        count, self._count = self._count, 0
        return count


class Listener:
    """Serves each connection by a protocol of its own.

    A Unix socket has `mode`. With `credentials` it speaks TLS; a connection that does not come through its
    handshake within `handshake_seconds` is closed, and the protocol never hears of it. Whoever comes when
    `most` are connected, handshakes included, is turned away at once.
    """

    def __init__(
        self,
        name: str,
        protocol: Factory,
        *,
        credentials: Credentials | None,
        handshake_seconds: float,
        mode: int,
        most: int,
    ) -> None:
        self.name = name
        self.credentials = credentials
        self.handshake_seconds = handshake_seconds
        self._mode = mode
        self.protocol = protocol
        self._factory: Factory = protocol if credentials is None else lambda: _Handshake(self)
        self._most = most
        self._places: set[int] = set()  # the descriptors of its connections
        self._turned_away = _Seldom(TURNED_AWAY_SECONDS)
        self._starved = _Seldom(STARVED_SECONDS)
        self._listening: list[socket.socket] = []
        self._file: tuple[SocketFile, tuple[int, int]] | None = None
        self.tasks: set[asyncio.Task[Any]] = set()  # handshakes, and connections that just came
        self.secured: WeakSet[asyncio.Transport] = WeakSet()

    async def open(self, address: Address) -> Address:
        """Listen, and tell the address that it really has. Raises ScopegateError."""
        try:
            with ExitStack() as unless_all_is_well:
                sockets = [self._bind(address)] if isinstance(address, SocketFile) else await _bound(address)
                for listening in sockets:
                    unless_all_is_well.callback(listening.close)
                for listening in sockets:
                    listening.setblocking(False)
                    listening.listen(BACKLOG)
                unless_all_is_well.pop_all()
        except OSError as exc:
            reason = exc.strerror or exc
            raise ScopegateError(f"{self.name}.listen: cannot listen on {address}: {reason}") from exc
        if isinstance(address, Listen):
            address = Listen(*sockets[0].getsockname()[:2])  # with the port that the system chose for port 0
        self._listening = sockets
        for listening in sockets:
            self._accept_from(listening)
        logger.info("listening", extra={"listener": self.name, "address": str(address)})
        return address

    def close(self) -> None:
        """Take nobody new in, but serve whoever has connected already."""
        loop = asyncio.get_running_loop()
        listening_until_now, self._listening = self._listening, []
        for listening in listening_until_now:
            loop.remove_reader(listening)
            with listening, suppress(OSError):  # descriptors ran out: whoever still waits is reset
                while self._take(listening):
                    pass
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

    def _accept_from(self, listening: socket.socket) -> None:
        if listening in self._listening:  # else it was closed meanwhile
            asyncio.get_running_loop().add_reader(listening, self._accept, listening)

    def _accept(self, listening: socket.socket) -> None:
        """Somebody is waiting."""
        try:
            for _ in range(IN_A_ROW):
                if not self._take(listening):
                    return
        except OSError as exc:
            if exc.errno not in _STARVED:
                logger.debug("a connection broke off", extra={"listener": self.name, "cause": str(exc)})
                return
            # The system would go on saying that somebody is waiting.
            loop = asyncio.get_running_loop()
            loop.remove_reader(listening)
            loop.call_later(RETRY_SECONDS, self._accept_from, listening)
            if self._starved.due():
                cause = exc.strerror
                logger.error("cannot accept connections", extra={"listener": self.name, "cause": cause})

    def _take(self, listening: socket.socket) -> bool:
        """The next connection that waits, if any; beyond the limit it is reset. Raises OSError."""
        try:
            accepted, _ = listening.accept()
        except BlockingIOError:
            return False
        except (InterruptedError, ConnectionAbortedError):
            return True
        if len(self._places) >= self._most:
            with accepted:
                # A reset leaves nothing behind, and the client knows at once.
                accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            if count := self._turned_away.due():
                told_of = {"listener": self.name, "limit": self._most, "count": count}
                logger.warning("too many connections", extra=told_of)
            return True
        connection = _Connection(accepted, self._places)
        connection.setblocking(False)
        self.keep(asyncio.get_running_loop().create_task(self._serve(connection)))
        return True

    async def _serve(self, connection: socket.socket) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(self._factory, connection)
        except OSError as exc:
            connection.close()
            logger.debug("a connection broke off", extra={"listener": self.name, "cause": str(exc)})
        except BaseException:
            connection.close()
            raise

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


async def _bound(address: Listen) -> list[socket.socket]:
    """A socket for each address that the host has. Raises OSError."""
    if not address.host.strip("0:") and socket.has_dualstack_ipv6():
        where = (address.host, address.port)
        # asyncio would leave IPv4 out.
        return [socket.create_server(where, family=socket.AF_INET6, backlog=BACKLOG, dualstack_ipv6=True)]
    loop = asyncio.get_running_loop()
    server = await loop.create_server(asyncio.Protocol, address.host, address.port, start_serving=False)
    try:
        # asyncio's sockets cannot be accepted on; a duplicate of the descriptor can.
        return [socket.socket(fileno=os.dup(bound.fileno())) for bound in server.sockets]
    finally:
        server.close()


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
