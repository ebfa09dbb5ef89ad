"""One listener on TCP or a Unix socket, with or without TLS. It removes only its own or a dead socket file.

It holds a bounded number of connections, so that a flood on one listener leaves descriptors to the others and
to the rest of the sidecar. It accepts connections itself, because asyncio's servers cannot refuse a
connection, and they log without limit once descriptors run out.
"""

from __future__ import annotations

import asyncio
import errno
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
from sidecar.files.tls import Credentials, describe_failure
from sidecar.settings.addresses import Address, Listen, SocketFile
from sidecar.telemetry.events import LogEvent

BACKLOG = 2048  # connections that may wait in the kernel
IN_A_ROW = 64  # connections accepted in one turn of the event loop

# The minimum and maximum of connections. Services report their decisions to the admin listener, possibly each
# on a connection of its own. The ops listener serves only probes and Prometheus.
OPS_CONNECTIONS = 128
ADMIN_CONNECTIONS = (128, 1_024)
DATA_CONNECTIONS = (64, 65_536)
# Descriptors for the database with its readers, the listening sockets, log, checkpoints, configuration,
# traces and event loop.
OTHER_FILES = 64

# macOS reports no limit, but allows no more than this (OPEN_MAX).
MACOS_FILES = 10_240

TURNED_AWAY_SECONDS = 60.0  # between two log lines about refused connections
STARVED_SECONDS = 1.0
RETRY_SECONDS = 0.1  # pause in accepting after descriptors ran out
_STARVED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

Factory = Callable[[], asyncio.Protocol]


def connections(files: int, upstream_connections: int) -> dict[str, int]:
    """How many connections each listener may hold if the process may have this many files open.

    Admin gets a quarter of the files, within its bounds. Data gets the rest, after the share that must work
    during a flood: the connections to the backend, those of admin and ops, and OTHER_FILES. If hardly any are
    left, each listener still gets its minimum, because not serving is worse than running out of files.
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
    """Raise the file limit to the maximum for this process. Leave it, without an error, if that fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for wanted in (hard, MACOS_FILES):
        try:
            if soft not in (hard, resource.RLIM_INFINITY):
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            return
        except (OSError, ValueError) as exc:
            cause = str(exc)
    LogEvent.FILE_LIMIT_STAYS.log(cause=cause, limit=file_limit())


class _Connection(socket.socket):
    """A socket that gives its place back when its descriptor is closed, no matter where it is closed."""

    __slots__ = ("_places",)

    def __init__(self, accepted: socket.socket, places: set[int]) -> None:
        super().__init__(accepted.family, accepted.type, accepted.proto, fileno=accepted.detach())
        self._places = places
        places.add(self.fileno())

    def close(self) -> None:
        self._places.discard(self.fileno())
        super().close()


class _Seldom:
    """Limits the log lines about a frequent event to one in so many seconds."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._next = float("-inf")
        self._count = 0

    def due(self) -> int:
        """Count an event. Return the number of events since the last line if a line is due, else 0."""
        self._count += 1
        now = time.monotonic()
        if now < self._next:
            return 0
        self._next = now + self._seconds
        count, self._count = self._count, 0
        return count


class Listener:
    """Accepts connections and creates a protocol for each.

    `mode` is the mode of a Unix socket's file. With `credentials` the listener speaks TLS. A connection that
    does not finish its handshake within `handshake_seconds` is closed before `protocol` is called for it.
    Beyond `most` connections, handshakes included, a new one is reset at once.
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
        self._places: set[int] = set()  # the descriptors of the open connections
        self._turned_away = _Seldom(TURNED_AWAY_SECONDS)
        self._starved = _Seldom(STARVED_SECONDS)
        self._listening: list[socket.socket] = []
        self._file: tuple[SocketFile, tuple[int, int]] | None = None
        self.tasks: set[asyncio.Task[Any]] = set()  # handshakes, and connections just accepted
        self.secured: WeakSet[asyncio.Transport] = WeakSet()

    async def open(self, address: Address) -> Address:
        """Listen, and return the actual address. Raises ScopegateError."""
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
            # The text of asyncio repeats the address; that of the system does not.
            reason = os.strerror(exc.errno) if exc.errno and exc.errno > 0 else exc.strerror or exc
            raise ScopegateError(f"{self.name}.listen: cannot listen on {address}: {reason}") from exc
        if isinstance(address, Listen):
            address = Listen(*sockets[0].getsockname()[:2])  # port 0 becomes the port that the system chose
        self._listening = sockets
        for listening in sockets:
            self._accept_from(listening)
        LogEvent.LISTENING.log(listener=self.name, address=str(address))
        return address

    def close(self) -> None:
        """Stop listening. Clients that have connected already are still served."""
        loop = asyncio.get_running_loop()
        listening_until_now, self._listening = self._listening, []
        for listening in listening_until_now:
            loop.remove_reader(listening)
            with listening, suppress(OSError):  # descriptors ran out: connections that still wait are reset
                while self._take(listening):
                    pass
        if self._file is not None:
            address, ours = self._file
            with suppress(OSError):  # the file or its folder is gone
                found = os.lstat(address.path)
                if (found.st_dev, found.st_ino) == ours:
                    os.unlink(address.path)

    def abort(self) -> None:
        """Abort the remaining TLS work: handshakes, and connections that wait for a close_notify."""
        for task in self.tasks:
            task.cancel()
        for transport in self.secured:
            transport.abort()

    def keep(self, task: asyncio.Task[Any]) -> None:
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def _accept_from(self, listening: socket.socket) -> None:
        if listening in self._listening:  # otherwise it was closed meanwhile
            asyncio.get_running_loop().add_reader(listening, self._accept, listening)

    def _accept(self, listening: socket.socket) -> None:
        """Accept the connections that wait, at most IN_A_ROW of them."""
        try:
            for _ in range(IN_A_ROW):
                if not self._take(listening):
                    return
        except OSError as exc:
            if exc.errno not in _STARVED:
                LogEvent.CONNECTION_BROKE_OFF.log(listener=self.name, cause=str(exc))
                return
            # Pause, because the loop would call this again at once: the connection still waits.
            loop = asyncio.get_running_loop()
            loop.remove_reader(listening)
            loop.call_later(RETRY_SECONDS, self._accept_from, listening)
            if self._starved.due():
                LogEvent.CANNOT_ACCEPT.log(listener=self.name, cause=exc.strerror)

    def _take(self, listening: socket.socket) -> bool:
        """Accept one connection, or reset it beyond the limit. Return False if none waits. Raises OSError."""
        try:
            accepted, _ = listening.accept()
        except BlockingIOError:
            return False
        except (InterruptedError, ConnectionAbortedError):
            return True
        if len(self._places) >= self._most:
            with accepted:
                # A reset leaves no state in the kernel, and tells the client at once.
                accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            if count := self._turned_away.due():
                LogEvent.TOO_MANY_CONNECTIONS.log(listener=self.name, limit=self._most, count=count)
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
            LogEvent.CONNECTION_BROKE_OFF.log(listener=self.name, cause=str(exc))
        except BaseException:
            connection.close()
            raise

    def _bind(self, address: SocketFile) -> socket.socket:
        """Bind a socket in the file system. It replaces a dead one."""
        _make_room(self.name, address)
        bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # The umask gives the file its mode from the first moment on.
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
    """Bind a socket for each address of the host. Raises OSError."""
    if not address.host.strip("0:") and socket.has_dualstack_ipv6():
        where = (address.host, address.port)
        # asyncio would bind IPv6 only.
        return [socket.create_server(where, family=socket.AF_INET6, backlog=BACKLOG, dualstack_ipv6=True)]
    loop = asyncio.get_running_loop()
    server = await loop.create_server(asyncio.Protocol, address.host, address.port, start_serving=False)
    try:
        # asyncio's socket objects do not allow `accept`, so duplicate their descriptors.
        return [socket.socket(fileno=os.dup(bound.fileno())) for bound in server.sockets]
    finally:
        server.close()


def _make_room(name: str, address: SocketFile) -> None:
    """Remove a socket file on which no process listens. Raises ScopegateError, OSError."""
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
    """Holds a connection until its TLS handshake is done. Then the listener's own protocol takes over."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._early = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        plain = transport
        assert isinstance(plain, asyncio.Transport)
        plain.pause_reading()  # until TLS takes over reading
        self._listener.keep(asyncio.get_running_loop().create_task(self._secure(plain)))

    def data_received(self, data: bytes) -> None:
        self._early += data  # arrived together with the end of the handshake

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
            LogEvent.HANDSHAKE_FAILED.log(listener=listener.name, cause=describe_failure(exc))
            return
        except OSError as exc:  # the client left, or took too long
            LogEvent.HANDSHAKE_BROKE_OFF.log(listener=listener.name, cause=describe_failure(exc))
            return
        if secured is None:
            return  # the connection was lost right after the handshake
        listener.secured.add(secured)
        protocol = listener.protocol()
        secured.set_protocol(protocol)
        protocol.connection_made(secured)
        if self._early:
            protocol.data_received(self._early)
