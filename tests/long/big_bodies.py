"""Gigabytes up and down through the sidecar, whose memory must stay flat. Sizes and digests are compared.

    python -m tests.long.big_bodies [--gib 2]

Exit code 1 where bytes were lost or changed, or the sidecar's peak grew by more than 64 MiB.
"""

from __future__ import annotations

import argparse
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path

from tests.acceptance.conftest import Address, Program, write_configuration

BLOCK = 1 << 20
MAX_GROWTH_MIB = 64.0
SILENCE_SECONDS = 60.0


def blocks(size: int) -> Iterator[bytes]:
    """`size` bytes in which no two blocks are alike, the same in every process."""
    noise = random.Random(1).randbytes(BLOCK - 8)
    for number in range(-(-size // BLOCK)):
        yield (number.to_bytes(8, "big") + noise)[: min(BLOCK, size - number * BLOCK)]


def digest_of(pieces: Iterator[bytes]) -> str:
    """How many bytes, and their CRC."""
    size = crc = 0
    for piece in pieces:
        size += len(piece)
        crc = zlib.crc32(piece, crc)
    return f"{size} bytes, crc {crc:08x}"


def send_body(connection: socket.socket, size: int, *, chunked: bool) -> None:
    for block in blocks(size):
        connection.sendall(b"%x\r\n%b\r\n" % (len(block), block) if chunked else block)
    if chunked:
        connection.sendall(b"0\r\n\r\n")


def stream_of(connection: socket.socket) -> BufferedReader[socket.SocketIO]:
    return BufferedReader(connection.makefile("rb", buffering=0), BLOCK)


def read_head(stream: BufferedReader[socket.SocketIO]) -> tuple[bytes, dict[bytes, bytes]]:
    start, headers = stream.readline(), {}
    while line := stream.readline().strip():
        name, _, value = line.partition(b":")
        headers[name.lower()] = value.strip()
    return start, headers


def read_body(stream: BufferedReader[socket.SocketIO], headers: dict[bytes, bytes]) -> Iterator[bytes]:
    length = headers.get(b"content-length")
    if length is not None:
        yield from read_sized(stream, int(length))
        return
    while size := int(stream.readline(), 16):
        yield from read_sized(stream, size)
        stream.readline()
    stream.readline()


def read_sized(stream: BufferedReader[socket.SocketIO], left: int) -> Iterator[bytes]:
    while left and (piece := stream.read1(min(BLOCK, left))):
        left -= len(piece)
        yield piece


def framing(size: int, *, chunked: bool) -> bytes:
    return b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % size


# The backend, in a process of its own ------------------------------------------------------------------


def serve(listening: socket.socket) -> None:
    """PUT answers with the digest of what came, GET /sized/n and /chunked/n with n bytes."""
    while True:
        connection, _ = listening.accept()
        threading.Thread(target=serve_one, args=(connection,), daemon=True).start()


def serve_one(connection: socket.socket) -> None:
    with connection, stream_of(connection) as stream:
        while True:
            start, headers = read_head(stream)
            if not start:
                return
            method, target, _ = start.split(b" ")
            if method == b"PUT":
                told = digest_of(read_body(stream, headers)).encode()
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(told), told))
            else:
                _, how, size = target.split(b"/")
                chunked = how == b"chunked"
                head = framing(int(size), chunked=chunked)
                connection.sendall(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n\r\n")
                send_body(connection, int(size), chunked=chunked)


# The client --------------------------------------------------------------------------------------------


def upload(address: Address, size: int, *, chunked: bool) -> str:
    """The digest that the backend answers."""
    with socket.create_connection(address, SILENCE_SECONDS) as connection:
        head = framing(size, chunked=chunked)
        connection.sendall(b"PUT /upload HTTP/1.1\r\nHost: b\r\n" + head + b"\r\n\r\n")
        send_body(connection, size, chunked=chunked)
        with stream_of(connection) as stream:
            start, headers = read_head(stream)
            body = b"".join(read_body(stream, headers))
            return body.decode() if b" 200 " in start else f"{start!r} {body!r}"


def download(address: Address, size: int, *, chunked: bool) -> str:
    """The digest of what came."""
    with socket.create_connection(address, SILENCE_SECONDS) as connection:
        target = b"/%b/%d" % (b"chunked" if chunked else b"sized", size)
        connection.sendall(b"GET " + target + b" HTTP/1.1\r\nHost: b\r\n\r\n")
        with stream_of(connection) as stream:
            return digest_of(read_body(stream, read_head(stream)[1]))


def peak_mib(pid: int) -> float:
    """The most memory that a process ever had resident."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"no VmHWM of process {pid}")


def measure(size: int, backend: Address, sidecar: Program) -> bool:
    expected = digest_of(blocks(size))
    upload(sidecar.data, BLOCK, chunked=False)
    download(sidecar.data, BLOCK, chunked=False)
    before = peak_mib(sidecar.pid)
    print(f"each way {expected}; the sidecar's peak before: {before:.1f} MiB\n", flush=True)
    print(f"{'':<24}{'directly':>12}{'through':>12}{'share':>8}{'peak':>14}", flush=True)
    well = True
    for name, transfer in (("upload", upload), ("download", download)):
        for chunked in (False, True):
            speeds = []
            for address in (backend, sidecar.data):
                begun = time.perf_counter()
                told = transfer(address, size, chunked=chunked)
                speeds.append(size / BLOCK / (time.perf_counter() - begun))
                if told != expected:
                    print(f"WRONG: {name}: {told}", flush=True)
                    well = False
            label = f"{name}, {'chunked' if chunked else 'Content-Length'}"
            peak = peak_mib(sidecar.pid)
            rates = f"{speeds[0]:>7.0f} MiB/s{speeds[1]:>6.0f} MiB/s{speeds[1] / speeds[0]:>8.0%}"
            print(f"{label:<24}{rates}{peak:>10.1f} MiB", flush=True)
    growth = peak_mib(sidecar.pid) - before
    well = well and growth <= MAX_GROWTH_MIB
    verdict = "WELL" if well else "NOT WELL"
    print(f"\nthe sidecar's peak after: {before + growth:.1f} MiB, {growth:+.1f}: {verdict}")
    return well


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--gib", type=float, default=2.0, help="the size of each body (default: 2)")
    parser.add_argument("--serve", type=int, metavar="FD", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is not None:
        serve(socket.socket(fileno=options.serve))
    with socket.create_server(("127.0.0.1", 0)) as listening, tempfile.TemporaryDirectory() as folder:
        address: Address = listening.getsockname()
        number = listening.fileno()
        backend = subprocess.Popen(
            [sys.executable, "-m", "tests.long.big_bodies", "--serve", str(number)], pass_fds=[number]
        )
        try:
            with Program(write_configuration(Path(folder), address)) as sidecar:
                return 0 if measure(int(options.gib * (1 << 30)), address, sidecar) else 1
        finally:
            backend.kill()
            backend.wait()


if __name__ == "__main__":
    sys.exit(main())
