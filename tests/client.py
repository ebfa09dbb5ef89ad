"""The HTTP client of the tests. It writes the bytes that a test gives and hides nothing of the answer.

Nothing is decompressed, no redirect is followed and no header is added but Host and the body's framing.
One function reads messages, for the two ways to wait: `ask`, `send` and `Connection` in asyncio, and
`BlockingConnection` for tests that start threads and processes.
"""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, TypeVar

from sidecar.settings.addresses import Address, SocketFile

ANSWER_SECONDS = 15.0  # an answer that takes longer has failed
STREAM_LIMIT = 1 << 22

T = TypeVar("T")
HeaderList = Sequence[tuple[str, str]]
Body = bytes | Iterable[bytes] | None  # an iterable is sent in chunks
HostAndPort = tuple[str, int]


class Lost(ConnectionError):
    """A connection ended before its answer did."""


# Messages -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Message:
    """One request or answer as it stood on the wire."""

    first: str
    raw_headers: tuple[tuple[str, str], ...]
    body: bytes
    whole: bool = True

    def header(self, name: str) -> str | None:
        """The one value of a header, None without it. Twice is an error."""
        values = self.headers(name)
        assert len(values) < 2, f"{name} came {len(values)} times"
        return values[0] if values else None

    def headers(self, name: str) -> list[str]:
        return [value for key, value in self.raw_headers if key.lower() == name.lower()]

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def status(self) -> int:
        return int(self.first.split(" ")[1])

    @property
    def method(self) -> str:
        return self.first.split(" ")[0]

    @property
    def target(self) -> str:
        return self.first.split(" ")[1]


def as_json(document: object) -> tuple[list[tuple[str, str]], bytes]:
    """The headers and the body of a JSON request."""
    return [("Content-Type", "application/json")], json.dumps(document).encode()


def request_bytes(method: str, target: str, headers: HeaderList = (), body: Body = None) -> bytes:
    """A request as it goes onto the wire, with Host and the body's framing unless they are given."""
    names = {name.lower() for name, _ in headers}
    lines = [f"{method} {target} HTTP/1.1"]
    if "host" not in names:
        lines.append("Host: localhost")
    lines += [f"{name}: {value}" for name, value in headers]
    if body is None:
        body = b""
    elif not isinstance(body, bytes):
        lines.append("Transfer-Encoding: chunked")
        body = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in body if piece) + b"0\r\n\r\n"
    elif not names & {"content-length", "transfer-encoding"}:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


class Reader(Protocol):
    """What `read_message` uses of `asyncio.StreamReader`."""

    async def readuntil(self, separator: bytes) -> bytes: ...

    async def readexactly(self, n: int) -> bytes: ...

    async def read(self) -> bytes: ...


async def read_message(reader: Reader, *, bodiless: bool = False) -> Message | None:
    """The next message of a connection, None at its end. One that is cut has `whole` False."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    lines = head.decode("latin-1").split("\r\n")[:-2]
    headers = tuple((name, value.strip()) for name, _, value in (line.partition(":") for line in lines[1:]))
    known = {name.lower(): value for name, value in headers}
    is_answer = lines[0].startswith("HTTP/")
    if is_answer and lines[0].split(" ")[1] == "100":
        return await read_message(reader, bodiless=bodiless)
    body, whole = b"", True
    if is_answer and (bodiless or lines[0].split(" ")[1] in ("204", "304")):
        return Message(lines[0], headers, body)
    try:
        if "chunked" in known.get("transfer-encoding", ""):
            while size := int(await reader.readuntil(b"\r\n"), 16):
                body += await reader.readexactly(size)
                await reader.readexactly(2)
            await reader.readuntil(b"\r\n")
        elif "content-length" in known:
            length = int(known["content-length"])
            try:
                body = await reader.readexactly(length)
            except asyncio.IncompleteReadError as exc:
                body, whole = exc.partial, False
        elif is_answer:
            body = await reader.read()
    except (asyncio.IncompleteReadError, ConnectionError, ValueError):
        whole = False
    return Message(lines[0], headers, body, whole)


def _closes(answer: Message) -> bool:
    return (answer.header("Connection") or "").lower() == "close"


# In asyncio ---------------------------------------------------------------------------------------------


async def connect(
    address: Address | HostAndPort, tls: ssl.SSLContext | None = None, *, server_name: str = "gate.test"
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    name = None if tls is None else server_name
    if isinstance(address, SocketFile):
        return await asyncio.open_unix_connection(
            address.path, limit=STREAM_LIMIT, ssl=tls, server_hostname=name
        )
    host, port = address if isinstance(address, tuple) else (address.host, address.port)
    return await asyncio.open_connection(host, port, limit=STREAM_LIMIT, ssl=tls, server_hostname=name)


async def send(
    address: Address | HostAndPort,
    request: bytes,
    *,
    bodiless: bool = False,
    tls: ssl.SSLContext | None = None,
) -> Message:
    """The answer to these bytes, on a connection of its own; it may be cut. Raises Lost without one."""
    reader, writer = await connect(address, tls)
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            writer.write(request)
            await writer.drain()
            answer = await read_message(reader, bodiless=bodiless)
        if answer is None:
            raise Lost("the connection was closed without an answer")
        return answer
    finally:
        writer.close()


async def ask(
    address: Address | HostAndPort,
    method: str,
    target: str,
    headers: HeaderList = (),
    body: Body = None,
    *,
    tls: ssl.SSLContext | None = None,
) -> Message:
    """The answer to one request on a connection of its own; it may be cut. Raises Lost without one."""
    request = request_bytes(method, target, headers, body)
    return await send(address, request, bodiless=method == "HEAD", tls=tls)


class Connection:
    """One connection that is kept, and opened again for the next request once it was lost."""

    def __init__(self, address: Address | HostAndPort) -> None:
        self.address = address
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(
        self,
        method: str,
        target: str,
        headers: HeaderList = (),
        body: Body = None,
        *,
        seconds: float = 2 * ANSWER_SECONDS,
    ) -> Message:
        """The whole answer. Raises Lost, also if it takes longer than `seconds`."""
        answer = None
        try:
            async with asyncio.timeout(seconds):
                if self._streams is None:
                    self._streams = await connect(self.address)
                reader, writer = self._streams
                writer.write(request_bytes(method, target, headers, body))
                await writer.drain()
                answer = await read_message(reader, bodiless=method == "HEAD")
        except OSError as exc:
            raise Lost(f"{method} {target}: {exc!r}") from exc
        finally:
            if answer is None or not answer.whole or _closes(answer):
                self.close()
        if answer is None or not answer.whole:
            raise Lost(f"{method} {target}: the connection was closed")
        return answer

    async def ask_json(self, method: str, target: str, document: object) -> Message:
        return await self.ask(method, target, *as_json(document))

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None

    def __enter__(self) -> Connection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


# Blocking -----------------------------------------------------------------------------------------------


class _BlockingReader:
    """Reads from a socket. Its coroutines block and never suspend."""

    def __init__(self, connected: socket.socket) -> None:
        self._stream = connected.makefile("rb")

    async def readuntil(self, separator: bytes) -> bytes:
        found = b""
        while not found.endswith(separator):
            line = self._stream.readline()
            if not line:
                raise asyncio.IncompleteReadError(found, None)
            found += line
        return found

    async def readexactly(self, n: int) -> bytes:
        found = self._stream.read(n)
        if len(found) < n:
            raise asyncio.IncompleteReadError(found, n)
        return found

    async def read(self) -> bytes:
        return self._stream.read()

    def close(self) -> None:
        self._stream.close()


def _result(coroutine: Coroutine[Any, Any, T]) -> T:
    """What a coroutine returns that never suspends."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        result: T = stop.value
        return result
    raise RuntimeError("the coroutine waits for an event loop")


class BlockingConnection:
    """One connection that is kept, and opened again for the next request once it was closed.

    Errors of the socket are raised as they are. An answer that is missing or cut raises Lost.
    """

    def __init__(self, address: HostAndPort, tls: ssl.SSLContext | None = None) -> None:
        self.address = address
        self.socket: socket.socket | None = None
        self._tls = tls

    def ask(self, method: str, target: str, headers: HeaderList = (), body: Body = None) -> Message:
        request = request_bytes(method, target, headers, body)
        return self.send(request, bodiless=method == "HEAD")

    def ask_json(self, method: str, target: str, document: object) -> Message:
        return self.ask(method, target, *as_json(document))

    def send(self, request: bytes, *, bodiless: bool = False) -> Message:
        """The answer to these bytes."""
        if self.socket is None:
            self.socket = socket.create_connection(self.address, timeout=ANSWER_SECONDS)
            if self._tls is not None:
                self.socket = self._tls.wrap_socket(self.socket, server_hostname=self.address[0])
            self._reader = _BlockingReader(self.socket)
        answer = None
        try:
            self.socket.sendall(request)
            answer = _result(read_message(self._reader, bodiless=bodiless))
        finally:
            if answer is None or not answer.whole or _closes(answer):
                self.close()
        if answer is None or not answer.whole:
            raise Lost("the connection was closed without response")
        return answer

    def close(self) -> None:
        if self.socket is not None:
            self._reader.close()
            self.socket.close()
            self.socket = None

    def __enter__(self) -> BlockingConnection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
