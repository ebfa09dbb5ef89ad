"""The comparisons: two sides each, opened once and then measured in turn, A B A B."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from tests.bench import load, targets
from tests.bench.processes import BenchError, pinned
from tests.bench.report import Figure, Run
from tests.bench.targets import Opening, Rig, Target

MANY_CONNECTIONS = 256
FDATASYNCS = 300
FDATASYNC_BYTES = 4096
STORE_CALLERS = 64
# A flood that a single client keeps up on a core that it shares with the load and the backend.
WRONG_A_SECOND = 200
WARM_UP = 0.25  # of the seconds of a run, before the first one of each side

Side = Callable[[], Run]
Sides = AbstractContextManager[tuple[Side, Side]]


@dataclass(frozen=True)
class Scale:
    """How long one run takes, and over how many connections."""

    seconds: float
    connections: int


@dataclass(frozen=True)
class Comparison:
    """What is compared, how to open both sides, and which figures show the result, the first one first.

    `shown` is the measure that the picture shows as bars.
    """

    name: str
    title: str
    left: str
    right: str
    open: Callable[[Rig, Scale], Sides]
    figures: tuple[Figure, ...]
    needs: tuple[str, ...] = ("wrk", "nginx")
    shown: str = "rate"


def send(rig: Rig, target: Target, path: str, requests: list[load.Request], seconds: float) -> load.Load:
    """One run of wrk: as many connections as there are requests."""
    try:
        return load.run(
            f"http://127.0.0.1:{target.port}{path}",
            requests,
            connections=len(requests),
            seconds=seconds,
            core=rig.cores.load,
            folder=rig.folder,
        )
    except BenchError as exc:
        raise BenchError(f"{target.name}: {exc}\n{_tails(target)}") from exc


def measure(rig: Rig, target: Target, path: str, requests: list[load.Request], seconds: float) -> Run:
    before = target.cpu_seconds()
    sent = send(rig, target, path, requests, seconds)
    if not sent.requests:
        raise BenchError(f"{target.name} answered nothing within {seconds:g} s\n{_tails(target)}")
    run = {
        "rate": sent.requests / sent.seconds,
        "p50_ms": sent.p50 / 1000,
        "p99_ms": sent.p99 / 1000,
    }
    if target.programs:
        used = target.cpu_seconds() - before
        run |= {"cpu_us": used / sent.requests * 1e6, "busy": used / sent.seconds * 100}
    return run


def _tails(target: Target) -> str:
    return "\n".join(f"{program.name} printed last:\n{program.tail()}" for program in target.programs)


@contextmanager
def pair(
    left: Opening,
    right: Opening,
    path: str,
    rig: Rig,
    scale: Scale,
    *,
    connections: int | None = None,
    in_headers: bool = False,
) -> Iterator[tuple[Side, Side]]:
    """Both sides get the same kind of requests. While one is measured, the other one is idle."""
    with left(rig) as one, right(rig) as other:
        sides = []
        for target in (one, other):
            requests = target.requests(path, connections or scale.connections, in_headers=in_headers)
            send(rig, target, path, requests, scale.seconds * WARM_UP)
            sides.append(partial(measure, rig, target, path, requests, scale.seconds))
        yield sides[0], sides[1]


@contextmanager
def flooded(rig: Rig, scale: Scale) -> Iterator[tuple[Side, Side]]:
    """The same sidecar, with callers that show a token, while another caller floods it with wrong ones."""
    with targets.scopegate(rig, name="with tokens", auth="tokens") as target:
        requests = target.requests(load.GATED_TARGET, scale.connections)
        send(rig, target, load.GATED_TARGET, requests, scale.seconds * WARM_UP)
        quiet = partial(measure, rig, target, load.GATED_TARGET, requests, scale.seconds)

        def flood() -> Run:
            with load.Flood(target.port, WRONG_A_SECOND) as sent:
                run = quiet()
            if set(sent.answers) - {401, 429}:
                raise BenchError(f"wrong tokens were answered with {dict(sent.answers)}")
            return {**run, "wrong_tokens": sent.answers.total() / scale.seconds}

        yield flood, quiet


@contextmanager
def one_connection(rig: Rig, scale: Scale) -> Iterator[tuple[Side, Side]]:
    """The sidecar at one connection, and the backend without it; the disk is measured beside the latter."""
    with pair(targets.scopegate, targets.backend_again, load.GATED_TARGET, rig, scale, connections=1) as both:
        left, right = both
        yield left, lambda: {**right(), "fdatasync_ms": fdatasync_ms(rig.folder)}


def fdatasync_ms(folder: Path) -> float:
    """The median time of an fdatasync after 4 KiB were appended to a file in this folder."""
    taken = []
    file = folder / "fdatasync"
    with file.open("wb", buffering=0) as opened:
        for _ in range(FDATASYNCS):
            opened.write(b"\0" * FDATASYNC_BYTES)
            begun = time.perf_counter()
            os.fdatasync(opened.fileno())
            taken.append(time.perf_counter() - begun)
    file.unlink()
    return statistics.median(taken) * 1000


@contextmanager
def store(rig: Rig, scale: Scale) -> Iterator[tuple[Side, Side]]:
    """`tests.bench.admissions`: this store alone, and the same store with one command a transaction."""

    def run(way: str) -> Run:
        command = [sys.executable, "-m", "tests.bench.admissions", "--json", "--only", way]
        command += ["--folder", str(rig.folder), "--concurrency", str(STORE_CALLERS)]
        command += ["--seconds", str(scale.seconds)]
        done = subprocess.run(
            pinned(rig.cores.proxy, command),
            cwd=targets.CHECKOUT,
            capture_output=True,
            text=True,
            timeout=scale.seconds + 60,
        )
        if done.returncode != 0:
            raise BenchError(f"{' '.join(command)} failed:\n{done.stderr}")
        said: dict[str, float] = json.loads(done.stdout)
        count, seconds, used = said["admissions"], said["seconds"], said["cpu_seconds"]
        return {"rate": count / seconds, "cpu_us": used / count * 1e6, "busy": used / seconds * 100}

    yield partial(run, "group commit"), partial(run, "one transaction each")


@contextmanager
def idle_memory(rig: Rig, scale: Scale) -> Iterator[tuple[Side, Side]]:
    """Resident memory of a new process with idle connections that carried one passing request each."""
    del scale

    def run(opening: Opening) -> Run:
        with opening(rig) as target, ExitStack() as held:
            load.idle_connections(target.port, MANY_CONNECTIONS, held)
            time.sleep(0.5)
            return {"resident_mib": target.resident_bytes() / 2**20}

    yield partial(run, targets.scopegate), partial(run, targets.bare)


@contextmanager
def busy_memory(rig: Rig, scale: Scale) -> Iterator[tuple[Side, Side]]:
    """The most resident memory of a new process while gated requests come over all connections."""

    def run(opening: Opening) -> Run:
        with opening(rig) as target:
            resident: list[int] = []
            load.run(
                f"http://127.0.0.1:{target.port}{load.GATED_TARGET}",
                target.requests(load.GATED_TARGET, MANY_CONNECTIONS),
                connections=MANY_CONNECTIONS,
                seconds=scale.seconds,
                core=rig.cores.load,
                folder=rig.folder,
                beside=lambda: resident.append(target.resident_bytes()),
            )
            return {"resident_mib": max(resident) / 2**20}

    yield partial(run, targets.scopegate), partial(run, targets.bare)


def hundred_rules(actions: int) -> str:
    """A policy file of a hundred rules on execution, about so many actions in turn; none refuses.

    The measured action is one of them. Half of the rules hold a brake, half a condition in CEL.
    """
    names = [load.ACTION, *(f"other_action_{number}" for number in range(1, actions))]
    lines = ["actions:", *(f"  {name}: {{risk: low}}" for name in names[1:])] if names[1:] else []
    lines.append("rules:")
    for number in range(100):
        action = names[number // 2 % actions]
        lines += [f"  - id: rule-{number}", "    on: execute", f"    match: {{action: {action}}}"]
        if number % 2:
            lines.append("    brake: {per: [incident_id, action], max_attempts: 1000000, window_seconds: 1}")
        else:
            lines.append(f'    when: attempts_used > {10**7 + number} && risk != "critical"')
            lines.append("    effect: deny")
        lines.append(f"    reason: Rule {number} refuses nothing that the bench sends.")
    return "\n".join(lines) + "\n"


def rate(at_least: float | None = None) -> Figure:
    return Figure("throughput ratio", lambda a, b: a["rate"] / b["rate"], at_least=at_least)


def tail(at_most: float | None = None) -> Figure:
    return Figure("p99 ratio", lambda a, b: a["p99_ms"] / b["p99_ms"], at_most=at_most)


CPU = Figure("ratio of CPU a request", lambda a, b: a["cpu_us"] / b["cpu_us"])
ADDED = Figure(
    "added p50, in fdatasyncs",
    lambda a, b: (a["p50_ms"] - b["p50_ms"]) / b["fdatasync_ms"],
    at_most=4,
)
SHARE = Figure(
    "share of the CPU of a gated request, %",
    lambda a, b: (a["cpu_us"] - b["cpu_us"]) / a["cpu_us"] * 100,
    at_most=10,
)
MEMORY = Figure("memory ratio", lambda a, b: a["resident_mib"] / b["resident_mib"], at_most=1.5)
GATED, PASSING = load.GATED_TARGET, load.PASSING_TARGET


def _against_peer(
    name: str, title: str, right: str, opening: Opening, figures: tuple[Figure, ...], *needs: str
) -> Comparison:
    opened = partial(pair, targets.scopegate, opening, GATED, in_headers=True)
    return Comparison(name, title, "Scopegate", right, opened, figures, ("wrk", "nginx", *needs))


def _with_rules(name: str, title: str, actions: int, figures: tuple[Figure, ...]) -> Comparison:
    many = partial(targets.scopegate, name="100 rules", rules=hundred_rules(actions))
    none = partial(targets.scopegate, name="no rules")
    opened = partial(pair, many, none, GATED)
    return Comparison(name, title, "100 rules", "no rules", opened, figures, shown="cpu_us")


def _with_auth(name: str, shown: str, method: Literal["tokens", "jwt"], at_most: float) -> Comparison:
    """The part of a gated request's CPU that it takes to find out who asks."""
    asking = partial(targets.scopegate, name=f"with {shown}", auth=method)
    open_ = partial(targets.scopegate, name="without authentication")
    added = Figure(
        "CPU that it adds to a gated request, %",
        lambda a, b: (a["cpu_us"] / b["cpu_us"] - 1) * 100,
        at_most=at_most,
    )
    title = f"Gated requests of callers that show {shown} / without authentication"
    opened = partial(pair, asking, open_, GATED)
    return Comparison(name, title, shown, "without authentication", opened, (added, rate()), shown="cpu_us")


COMPARISONS = (
    Comparison(
        "gated-bare",
        "Gated requests / the same requests through bare aiohttp",
        "Scopegate",
        "bare aiohttp",
        partial(pair, targets.scopegate, targets.bare, GATED),
        (rate(1.2), CPU, tail(1.0)),
    ),
    Comparison(
        "pass-bare",
        "Requests that pass / through bare aiohttp",
        "Scopegate",
        "bare aiohttp",
        partial(pair, targets.scopegate, targets.bare, PASSING),
        (rate(1.8), CPU, tail()),
    ),
    Comparison(
        "pass-nginx",
        "Requests that pass / through nginx",
        "Scopegate",
        "nginx",
        partial(pair, targets.scopegate, targets.nginx_proxy, PASSING),
        (rate(), CPU, tail()),
    ),
    Comparison(
        "one-connection",
        "Gated requests over one connection / the backend itself",
        "Scopegate",
        "the backend itself",
        one_connection,
        (ADDED,),
        shown="p50_ms",
    ),
    _against_peer(
        "gated-auth-request",
        "Gated requests / nginx auth_request with a FastAPI service",
        "nginx auth_request",
        targets.nginx_auth_request,
        (rate(4), CPU, tail()),
        "fastapi",
    ),
    _against_peer(
        "gated-envoy",
        "Gated requests / Envoy ext_authz with a FastAPI service",
        "Envoy ext_authz",
        targets.envoy,
        (rate(6), CPU, tail()),
        "fastapi",
        "envoy",
    ),
    _against_peer(
        "gated-fastapi",
        "Gated requests / a proxy of FastAPI, SQLAlchemy and httpx",
        "FastAPI proxy",
        targets.fastapi_proxy,
        (rate(20), CPU, tail()),
        "fastapi",
        "sqlalchemy",
        "httpx",
    ),
    Comparison(
        "store",
        "The store alone: group commit / one transaction each",
        "group commit",
        "one transaction each",
        store,
        (rate(5), CPU),
        (),
    ),
    Comparison(
        "memory-idle",
        f"Memory with {MANY_CONNECTIONS} idle connections / bare aiohttp",
        "Scopegate",
        "bare aiohttp",
        idle_memory,
        (MEMORY,),
        shown="resident_mib",
    ),
    Comparison(
        "memory-busy",
        f"Memory with {MANY_CONNECTIONS} busy connections, gated / bare aiohttp",
        "Scopegate",
        "bare aiohttp",
        busy_memory,
        (MEMORY,),
        shown="resident_mib",
    ),
    _with_auth("auth-tokens", "a token", "tokens", 5),
    _with_auth("auth-jwt", "a JSON Web Token", "jwt", 10),
    Comparison(
        "auth-flood",
        f"Gated requests with tokens: beside {WRONG_A_SECOND} wrong tokens a second / without",
        "flooded",
        "quiet",
        flooded,
        (rate(0.9), tail()),
    ),
    _with_rules("rules", "100 rules, of which ten are about the action / no rules", 10, (SHARE,)),
    _with_rules(
        "rules-one-action",
        "100 rules, all about the action / no rules",
        1,
        (Figure(SHARE.title, SHARE.compute),),
    ),
)


def against(checkout: Path) -> tuple[Comparison, ...]:
    """This checkout compared with another one, whose `sidecar` package stands in `checkout`."""
    other = partial(targets.scopegate, name="the other", checkout=checkout)
    this = partial(targets.scopegate, name="this checkout")
    made = []
    for name, title, path, connections in (
        ("gated", "Gated requests", GATED, None),
        ("pass", "Requests that pass", PASSING, None),
        ("one-connection", "Gated requests over one connection", GATED, 1),
    ):
        made.append(
            Comparison(
                name,
                f"{title}: this checkout / {checkout}",
                "this checkout",
                "the other",
                partial(pair, this, other, path, connections=connections),
                (
                    rate(),
                    CPU,
                    Figure("p50 ratio", lambda a, b: a["p50_ms"] / b["p50_ms"]),
                    tail(),
                ),
            )
        )
    return tuple(made)
