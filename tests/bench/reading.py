"""What it costs to decide what a request is, and to read what it claims: CPU a request, in microseconds.

    python -m tests.bench.reading [--requests 4000] [--rounds 7] [--profile]

The requests come from the parser of the data listener, but no socket, gate or store takes part. "Proxied"
ones have the headers that a proxy before the sidecar adds. The lowest of some rounds is shown, because other
work on the machine only adds to it. `--profile` shows the functions, too.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import pstats
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, cast

from aiohttp.base_protocol import BaseProtocol

from sidecar.gate.messages import GatedRequest
from sidecar.gate.places import Place, Places
from sidecar.live.snapshot import Snapshot
from sidecar.settings.reading import default
from sidecar.web.data._reading import course_of, read_gated
from sidecar.web.data.passthrough import target_bytes, uncarried, upgrade_refusal
from sidecar.web.serving._parser import RequestParser
from sidecar.web.serving.body import Taken
from sidecar.web.serving.datarequest import DataRequest
from sidecar.web.serving.hosts import malformed

BODY = (
    b'{"scope_id":"scope_0123456789abcdef0123456789abcdef","incident_id":"inc_20260101_0001",'
    b'"action":"restart_pod","parameters":{"pod":"api-7f9c4d-x2x","namespace":"production",'
    b'"grace_seconds":30,"reason":"memory above 95 percent for ten minutes","drain":true},'
    b'"note":"automatic recovery from the watchdog"}'
)
USUAL = (
    b"Host: 127.0.0.1:8000\r\nUser-Agent: python-httpx/0.27\r\nAccept: */*\r\n"
    b"Accept-Encoding: gzip, deflate\r\nConnection: keep-alive\r\n"
    b"X-Request-Id: 0193f2c4-1111-7000-8000-000000000042\r\n"
)
PROXIED = (
    b"X-Forwarded-For: 198.51.100.7\r\nX-Forwarded-Proto: https\r\nX-Forwarded-Host: api.example.org\r\n"
    b"X-Forwarded-Port: 443\r\n"
)
SNAPSHOT = Snapshot(default("http://127.0.0.1:1"), None)


def gated(_: int, more: bytes = b"") -> bytes:
    kind = b"Content-Type: application/json\r\nContent-Length: %d\r\n" % len(BODY)
    return b"POST /api/v1/recovery/execute HTTP/1.1\r\n" + USUAL + more + kind + b"\r\n" + BODY


def passing(number: int, more: bytes = b"") -> bytes:
    return b"GET /api/v1/runs/%d/steps?limit=20 HTTP/1.1\r\n" % number + USUAL + more + b"\r\n"


def received(head_and_body: bytes, protocol: BaseProtocol) -> DataRequest:
    """The request that the data listener would make of these bytes."""
    parser = RequestParser(
        protocol, asyncio.get_running_loop(), broke=lambda _: None, refusal_of=lambda exc: cast(Any, exc)
    )
    ((message, content),), _, _ = parser.feed_data(head_and_body)
    return DataRequest(cast(Any, protocol), cast(Any, message), content)


async def read(request: DataRequest, places: Places) -> None:
    assert malformed(request, request.fields) is None
    course = course_of(request, SNAPSHOT)
    if course is None:
        assert upgrade_refusal(request) is None
        assert uncarried(request.fields) is None
        request.fields.end_to_end()
        target_bytes(request.target)
    else:
        judged = await read_gated(request, course, SNAPSHOT, Taken(), Place(places))
        assert isinstance(judged, GatedRequest), judged


async def measured(
    make: Callable[[int], bytes], count: int, rounds: int, profile: cProfile.Profile | None
) -> float:
    """The lowest CPU time of one request, in microseconds."""
    protocol = BaseProtocol(asyncio.get_running_loop())
    times = []
    for _ in range(rounds):
        places = Places(lambda _: None)
        requests = [received(make(number), protocol) for number in range(count)]
        with profile or nullcontext():
            begun = time.process_time()
            for request in requests:
                await read(request, places)
            times.append(time.process_time() - begun)
    return min(times) / count * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=4_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    for name, make in (
        ("gated", gated),
        ("gated, proxied", partial(gated, more=PROXIED)),
        ("passing", passing),
        ("passing, proxied", partial(passing, more=PROXIED)),
    ):
        profile = cProfile.Profile() if options.profile else None
        lowest = asyncio.run(measured(make, options.requests, options.rounds, profile))
        print(f"{name:20s} {lowest:6.1f} us")
        if profile is not None:
            pstats.Stats(profile).sort_stats("tottime").print_stats(25)


if __name__ == "__main__":
    main()
