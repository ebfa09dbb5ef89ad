"""kill -9 under load, again and again: what the backend saw, the log and the scopes must agree each time.

    python -m tests.long.kill_nine [--rounds 20] [--clients 32] [--seed N]

A real sidecar before a real backend, which notes each Scopegate-Decision-Id in a file (fsync) before it
works. Exit code 1 on any violation; the folder with store, logs and notes is then kept.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.acceptance.conftest import (
    ASK_SECONDS,
    EXECUTE,
    Address,
    Program,
    ask,
    ask_json,
    ask_on,
    execution,
    executions,
    scopegate,
    write_configuration,
)

RELEASED = ("not_sent", "not_executed")
MOST_ATTEMPTS = 3
SCOPES_AT_ONCE = 12


# The backend, in a process of its own ------------------------------------------------------------------


class Backend(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256
    notes: int

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A sidecar that was killed is no news."""


class Execution(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Backend

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        os.write(self.server.notes, self.headers["Scopegate-Decision-Id"].encode() + b"\n")
        os.fsync(self.server.notes)
        time.sleep(random.uniform(0.001, 0.06))
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Recovery-Cost-USD: 0.001\r\nContent-Length: 2\r\n\r\nok")


def serve(number: int, notes: Path) -> None:
    backend = Backend(("127.0.0.1", 0), Execution, bind_and_activate=False)
    backend.socket.close()
    backend.socket = socket.socket(fileno=number)
    backend.server_address = backend.socket.getsockname()
    backend.notes = os.open(notes, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    backend.serve_forever()


# The clients -------------------------------------------------------------------------------------------


@dataclass
class Load:
    """Clients that fight over a few scopes of few attempts, until their connections break."""

    data: Address
    incident: str
    random: random.Random
    attempts: dict[str, int] = field(default_factory=dict)
    answered: list[str] = field(default_factory=list)
    refused: int = 0
    broken: int = 0
    wrong: list[str] = field(default_factory=list)
    open: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def client(self) -> None:
        connection = http.client.HTTPConnection(*self.data, timeout=ASK_SECONDS)
        try:
            while True:
                self.one(connection)
        except (OSError, http.client.HTTPException):
            with self.lock:
                self.broken += 1
        finally:
            connection.close()

    def one(self, connection: http.client.HTTPConnection) -> None:
        with self.lock:
            scope = self.random.choice(self.open) if len(self.open) >= SCOPES_AT_ONCE else None
            attempts = self.random.randint(1, MOST_ATTEMPTS)
        if scope is None:
            wanted = {
                "incident_id": self.incident,
                "action": "retry_agent",
                "intent": "kill -9",
                "max_attempts": attempts,
            }
            answer = post(connection, "/api/v1/recovery/scope", wanted)
            if answer.status == 201:
                with self.lock:
                    self.attempts[answer.json()["scope_id"]] = attempts
                    self.open.append(answer.json()["scope_id"])
                return
        else:
            answer = post(connection, EXECUTE, execution(scope, incident=self.incident))
            if answer.status == 200:
                with self.lock:
                    self.answered += answer.values("scopegate-decision-id")
                return
            if answer.json()["error"] == "scope_exhausted":
                with self.lock:
                    self.refused += 1
                    if scope in self.open:
                        self.open.remove(scope)
                return
        with self.lock:
            self.wrong.append(f"{answer.status} {answer.body!r}")


def post(connection: http.client.HTTPConnection, target: str, body: dict[str, Any]) -> Any:
    headers = [("Content-Type", "application/json")]
    return ask_on(connection, "POST", target, headers, json.dumps(body).encode())


# The checks --------------------------------------------------------------------------------------------


def in_flight_on_disk(store: Path, folder: Path) -> set[str]:
    """What was in flight at the kill, from a copy, so that nothing is recovered before the sidecar does."""
    copy = folder / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir()
    for suffix in ("", "-wal"):
        if Path(f"{store}{suffix}").exists():
            shutil.copy(f"{store}{suffix}", copy / f"{store.name}{suffix}")
    connection = sqlite3.connect(copy / store.name)
    try:
        found = connection.execute("SELECT decision_id FROM executions WHERE status = 'in_flight'")
        return {decision_id for (decision_id,) in found}
    finally:
        connection.close()


def scopes(data: Address, incident: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    before = ""
    while True:
        page = ask(data, "GET", f"/api/v1/recovery/scopes/{incident}?limit=1000{before}").json()
        found |= {scope["scope_id"]: scope for scope in page["scopes"]}
        if page["next"] is None:
            return found
        before = f"&before={page['next']}"


def admitted_records(admin: Address) -> set[str]:
    found: set[str] = set()
    before = ""
    while True:
        page = ask(admin, "GET", f"/api/v1/decisions?event=admitted&limit=1000{before}").json()
        found |= {decision["decision_id"] for decision in page["decisions"]}
        if page["next"] is None:
            return found
        before = f"&before={page['next']}"


@dataclass
class Round:
    """One kill, and what was found after it."""

    sidecar: Program
    folder: Path
    notes: Path
    number: int
    clients: int
    random: random.Random
    violations: list[str] = field(default_factory=list)

    def check(self, holds: bool, violation: str) -> None:
        if not holds:
            self.violations.append(f"round {self.number}: {violation}")

    def run(self) -> str:
        sidecar, incident = self.sidecar, f"inc-{self.number}"
        pause = self.random.uniform(0.05, 1.5)
        load = Load(sidecar.data, incident, random.Random(self.random.random()))
        threads = [threading.Thread(target=load.client) for _ in range(self.clients)]
        for thread in threads:
            thread.start()
        time.sleep(pause)
        sidecar.signal(signal.SIGKILL)
        sidecar.wait()
        for thread in threads:
            thread.join()
        cut_off = in_flight_on_disk(sidecar.store, self.folder)
        begun = time.perf_counter()
        sidecar.start()
        restart = time.perf_counter() - begun
        time.sleep(0.1)  # the backend notes what still reached it
        self.check(not load.wrong, f"unexpected answers: {load.wrong[:3]}")
        seen = self.judge(load, incident, cut_off)
        self.reconcile(incident)
        verified = scopegate("log", "verify", "--config", sidecar.config)
        self.check(verified.returncode == 0, f"log verify: {verified.returncode} {verified.stderr}")
        records = verified.stdout.split()[1] if verified.returncode == 0 else "?"
        return (
            f"{self.number:>5}{pause * 1000:>8.0f}{len(load.attempts):>8}{len(load.answered):>10}"
            f"{load.refused:>9}{len(cut_off):>11}{seen:>8}{records:>9}{restart * 1000:>9.0f}"
            f"{len(self.violations):>12}"
        )

    def judge(self, load: Load, incident: str, cut_off: set[str]) -> int:
        """Scopes, executions, records and what the backend saw; how many the backend saw in all."""
        found = executions(self.sidecar.admin)
        status = {shown["decision_id"]: shown["status"] for shown in found}
        unknown = {shown["decision_id"] for shown in executions(self.sidecar.admin, "unknown")}
        self.check(unknown == cut_off, f"in flight at the kill {len(cut_off)}, unknown {len(unknown)}")
        self.check("in_flight" not in status.values(), "something is still in flight")
        used: dict[str, int] = {}
        for shown in found:
            if shown["status"] not in RELEASED:
                used[shown["scope_id"]] = used.get(shown["scope_id"], 0) + 1
        listed = scopes(self.sidecar.data, incident)
        for scope_id, attempts in load.attempts.items():
            self.check(scope_id in listed, f"scope {scope_id} was issued and is lost")
            self.check(used.get(scope_id, 0) <= attempts, f"scope {scope_id} over its {attempts} attempts")
        for scope_id, scope in listed.items():
            told = scope["attempts_used"]
            self.check(told == used.get(scope_id, 0), f"scope {scope_id} says {told} attempts used")
        records = admitted_records(self.sidecar.admin)
        seen = self.notes.read_text().split()
        self.check(len(seen) == len(set(seen)), "the backend saw a decision twice")
        self.check(set(seen) <= records, f"no record: {list(set(seen) - records)[:3]}")
        self.check(records == set(status), "records and executions differ")
        for decision_id in load.answered:
            ended = status.get(decision_id)
            self.check(ended == "answered", f"{decision_id} was answered to the client, and is {ended}")
        return len(seen)

    def reconcile(self, incident: str) -> None:
        """Half of what is unknown did happen, half did not."""
        sidecar = self.sidecar
        before = scopes(sidecar.data, incident)
        released: dict[str, int] = {}
        for number, shown in enumerate(executions(sidecar.admin, "unknown")):
            outcome = ("executed", "not_executed")[number % 2]
            if outcome == "not_executed":
                released[shown["scope_id"]] = released.get(shown["scope_id"], 0) + 1
            target = f"/api/v1/executions/{shown['decision_id']}/reconcile"
            for expected in (200, 409):
                answer = ask_json(sidecar.admin, "POST", target, {"outcome": outcome, "reason": "test"})
                self.check(answer.status == expected, f"reconcile: {answer.status}, not {expected}")
        self.check(not executions(sidecar.admin, "unknown"), "reconciled, and still unknown")
        for scope_id, scope in scopes(sidecar.data, incident).items():
            due = before[scope_id]["attempts_used"] - released.get(scope_id, 0)
            told = scope["attempts_used"]
            self.check(told == due, f"reconciled scope {scope_id}: {told} attempts used, not {due}")


def run_rounds(options: argparse.Namespace, folder: Path, address: Address) -> list[str]:
    chance = random.Random(options.seed)
    violations: list[str] = []
    print(
        f"seed {options.seed}, {options.clients} clients, store in {folder}\n\n"
        "round  kill ms  scopes  answered  refused  in flight    seen  records  back ms  violations",
        flush=True,
    )
    scopegate("log", "keygen", folder / "log.key")
    signed = {"signing_key_file": "log.key", "checkpoint_file": "checkpoints.jsonl"}  # verify heeds them, too
    config = write_configuration(folder, address, upstream={"response_timeout_seconds": 5}, log=signed)
    with Program(config) as sidecar:
        for number in range(1, options.rounds + 1):
            one = Round(sidecar, folder, folder / "seen.txt", number, options.clients, chance)
            print(one.run(), flush=True)
            violations += one.violations
    return violations


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10_000))
    parser.add_argument("--serve", nargs=2, metavar=("FD", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is not None:
        serve(int(options.serve[0]), Path(options.serve[1]))
    folder = Path(tempfile.mkdtemp(prefix="kill-nine-"))
    (folder / "seen.txt").touch()
    with socket.create_server(("127.0.0.1", 0), backlog=256) as listening:
        number = listening.fileno()
        backend = subprocess.Popen(
            [sys.executable, "-m", "tests.long.kill_nine", "--serve", str(number), str(folder / "seen.txt")],
            pass_fds=[number],
        )
        try:
            violations = run_rounds(options, folder, listening.getsockname())
        finally:
            backend.kill()
            backend.wait()
    if violations:
        print(f"\n{len(violations)} VIOLATIONS, everything kept in {folder}:")
        print("\n".join(violations[:50]))
        return 1
    shutil.rmtree(folder)
    print(f"\nWELL: {options.rounds} kills, no violation")
    return 0


if __name__ == "__main__":
    sys.exit(main())
