"""Bodies of hostile JSON, many at once, before a slow backend: the sidecar's peak of memory.

    python -m tests.long.hostile_bodies [--clients 1000] [--shape '[]'] [--mib 1] [--scope]

Each body is as large as `gate.max_body_bytes` allows, and repeats one shape. With `--scope` ten may execute.
Exit code 1 where the sidecar's peak exceeds 1 GiB.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.acceptance.conftest import Program, ask, write_configuration
from tests.client import request_bytes
from tests.support import EXECUTE, SCOPE, serving_backend

MAX_MIB = 1024.0
BACKEND_SECONDS = 5.0


def peak_mib(pid: int) -> float:
    """The most memory that a process has had, as Linux tells it."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


async def send(address: tuple[str, int], request: bytes) -> str:
    try:
        reader, writer = await asyncio.open_connection(*address)
        try:
            writer.write(request)
            line = await reader.readline()
            rest = await reader.read(4096)
            return line.decode().strip() + (" overloaded" if b'"overloaded"' in rest else "")
        finally:
            writer.close()
    except OSError as exc:
        return type(exc).__name__


async def run(clients: int, shape: str, mib: float, scoped: bool) -> int:
    async with serving_backend() as backend:

        async def slowly(request: object, writer: asyncio.StreamWriter) -> None:
            await asyncio.sleep(BACKEND_SECONDS)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

        backend.script = slowly
        address = (backend.address.host, backend.address.port)  # type: ignore[union-attr]
        with tempfile.TemporaryDirectory() as folder:
            config = write_configuration(Path(folder), address, upstream={"response_timeout_seconds": 30})
            with Program(config) as program:
                asked: dict[str, object] = {"incident_id": "inc-1", "action": "retry_agent"}
                if scoped:
                    grant = {**asked, "intent": "a test", "max_attempts": 10, "ttl_seconds": 600}
                    answer = await asyncio.to_thread(
                        ask,
                        program.data,
                        "POST",
                        SCOPE,
                        [("Content-Type", "application/json")],
                        json.dumps(grant).encode(),
                    )
                    asked["scope_id"] = answer.json()["scope_id"]
                head = json.dumps(asked)[:-1] + ', "parameters": {"x": ['
                room = int(mib * (1 << 20)) - len(head) - 3
                body = (head + ",".join([shape] * (room // (len(shape) + 1))) + "]}}").encode()
                request = request_bytes("POST", EXECUTE, [("Content-Type", "application/json")], body)
                idle, begun = peak_mib(program.pid), time.monotonic()
                answers = Counter(
                    await asyncio.gather(*(send(program.data, request) for _ in range(clients)))
                )
                took, peak = time.monotonic() - begun, peak_mib(program.pid)
    print(f"{clients} bodies of {len(body)} bytes, {shape!r}: {dict(answers)} in {took:.0f} s")
    print(f"idle {idle:.0f} MiB, peak {peak:.0f} MiB")
    return 0 if peak < MAX_MIB else 1


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--shape", default="[]")
    parser.add_argument("--mib", type=float, default=1.0)
    parser.add_argument("--scope", action="store_true")
    asked = parser.parse_args()
    return asyncio.run(run(asked.clients, asked.shape, asked.mib, asked.scope))


if __name__ == "__main__":
    sys.exit(main())
