"""kill -9 under load, again and again: what the backend saw, the log and the scopes must agree each time.

    python -m tests.long.kill_nine [--rounds 1000] [--lanes 2] [--clients 16] [--seed N] [--quick]

1,000 rounds take about 17 minutes on two cores; --quick does 40 in 40 seconds. Each lane has a sidecar, a
store of its own, and a backend that counts. In a round the sidecar starts on what the last kill left, clients
issue scopes and fight over their attempts, half of them under idempotency keys that they repeat until they
have an answer, an operator reconciles what is unknown by what the backend saw.
kill -9 comes 0.05 to 0.6 s later. In about each fifth round it comes while the sidecar starts.

After each kill a copy of the database is judged, so that nothing is recovered before the sidecar does:
  no scope over its attempts, by the executions table (admissions <= max_attempts + released), by the scope's
    own counter, and by what the backend saw;
  each execution that the backend saw has its admission and its record, and came once;
  what a client was told (a scope, an answer) is there; what was released was not executed;
  the backend saw each idempotency key once, and a replay names that execution;
  `PRAGMA integrity_check`, and the chain with its signed checkpoints by the code of `log verify`.
Every 25 rounds the sidecar starts once more, lists what is unknown and stops in order, and `log verify` runs;
the lane goes on with a new store. Exit code 1 on any violation; the folder of that store is then kept.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import random
import shutil
import sqlite3
import sys
import tempfile
import time
import uuid
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty
from typing import Any

from sidecar.errors import LogTampered, StoreUnavailable
from sidecar.files.signing import SigningKey
from sidecar.store.attestation import read_checkpoints
from sidecar.store.verify import verify_sqlite
from tests.acceptance.conftest import write_configuration
from tests.client import Lost
from tests.long.rig import (
    Backend,
    Client,
    DidNotStart,
    Findings,
    Progress,
    Sidecar,
    command,
    median,
    pages,
    raise_on_sigterm,
    serving,
    table,
)

INCIDENT = "inc-1"
UNKNOWN = "/api/v1/executions?status=unknown"
RELEASED = ("not_sent", "not_executed")
MOST_ATTEMPTS = 3
SCOPES_AT_ONCE = 12
ROUNDS_A_STORE = 25
KEYED = 0.5  # of the executions
REPEATS = 0.3
KILL_SECONDS = (0.05, 0.6)
IN_START = 0.2  # of the kills
EXECUTION_SECONDS = (0.001, 0.06)
SILENT_SECONDS = 180.0  # after which a lane is given up


# The load ----------------------------------------------------------------------------------------------


@dataclass
class Load:
    """What clients were told on one store, over all its rounds."""

    chance: random.Random
    attempts: dict[str, int] = field(default_factory=dict)
    answered: set[str] = field(default_factory=set)
    open: list[str] = field(default_factory=list)
    unanswered: list[tuple[str, str]] = field(default_factory=list)  # scopes and keys to repeat
    told: dict[str, str] = field(default_factory=dict)  # the execution of each key that was answered
    wrong: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    async def client(self, sidecar: Sidecar) -> None:
        """Issue and execute, until the sidecar is killed."""
        with Client(sidecar.data) as client:
            while True:
                try:
                    await self._one(client)
                except Lost:
                    return

    async def _one(self, client: Client) -> None:
        scope = self.chance.choice(self.open) if len(self.open) >= SCOPES_AT_ONCE else None
        if scope is None:
            attempts = self.chance.randint(1, MOST_ATTEMPTS)
            answer = await client.issue(INCIDENT, attempts, ttl_seconds=3600)
            if answer.status == 201:
                scope_id = answer.json()["scope_id"]
                self.attempts[scope_id] = attempts
                self.open.append(scope_id)
                return
        elif self.unanswered and self.chance.random() < REPEATS:
            self.counts["repeated under a key"] += 1
            await self._under_a_key(client, *self.unanswered.pop(self.chance.randrange(len(self.unanswered))))
            return
        elif self.chance.random() < KEYED:
            await self._under_a_key(client, scope, uuid.uuid4().hex)
            return
        else:
            answer = await client.execute(scope, INCIDENT)
            if answer.status == 200:
                self.answered.add(answer.header("Scopegate-Decision-Id") or "")
                return
            if answer.json()["error"] == "scope_exhausted":
                self.counts["refused"] += 1
                if scope in self.open:
                    self.open.remove(scope)
                return
        if answer.status == 503 and answer.header("Retry-After"):
            self.counts["told to come again"] += 1  # a busy machine: the store's deadline passed
            return
        self.wrong.append(f"{answer.status} {answer.body[:200]!r}")

    async def _under_a_key(self, client: Client, scope: str, key: str) -> None:
        """Execute under a key. A request without an answer, and a few others, are repeated later."""
        again = True
        try:
            answer = await client.execute(scope, INCIDENT, key=key)
            error = None if answer.status == 200 else answer.json()["error"]
            again = error in ("idempotency_in_flight", "store_unavailable", "overloaded")
            if error is None:
                execution = answer.header("Scopegate-Decision-Id") or ""
                replayed = answer.header("Idempotency-Replayed") == "true"
                self.counts["replayed"] += replayed
                if self.told.setdefault(key, execution) != execution:
                    self.wrong.append(f"key {key} was answered by {self.told[key]} and {execution}")
                self.answered.add(execution)
                again = self.chance.random() < REPEATS
            elif error == "outcome_unknown":
                self.counts["outcome unknown under a key"] += 1
                again = answer.json()["execution_status"] == "unknown"  # until the operator has ended it
            elif error == "scope_exhausted":
                self.counts["refused"] += 1
            elif not again:
                self.wrong.append(f"{answer.status} {answer.body[:200]!r}")
        finally:
            if again:
                self.unanswered.append((scope, key))

    async def operator(self, sidecar: Sidecar, backend: Backend) -> None:
        """Reconcile what is unknown, by what the backend saw; what was not executed is tried again."""
        seen = {execution.decision_id for execution in backend.seen}
        try:
            unknown = [one async for one in pages(sidecar.admin, UNKNOWN, "executions")]
            self.chance.shuffle(unknown)
            with Client(sidecar.admin) as client:
                for one in unknown:
                    outcome = "executed" if one["decision_id"] in seen else "not_executed"
                    target = f"/api/v1/executions/{one['decision_id']}/reconcile"
                    answer = await client.ask_json(
                        "POST", target, {"outcome": outcome, "reason": "as it was"}
                    )
                    if answer.status != 200:
                        self.wrong.append(f"reconcile: {answer.status} {answer.body[:200]!r}")
                    self.counts[f"reconciled as {outcome}"] += 1
                    if outcome == "not_executed" and one["scope_id"] not in self.open:
                        self.open.append(one["scope_id"])
        except Lost:
            return


# The checks --------------------------------------------------------------------------------------------


class Generation:
    """The rounds of one store."""

    def __init__(self, folder: Path, backend: Backend, chance: random.Random, clients: int) -> None:
        self.folder = folder
        self.backend = backend
        self.chance = chance
        self.clients = clients
        self.load = Load(chance)
        self.counts = self.load.counts
        self.findings = Findings()
        self.restarts: list[float] = []
        self._start_seconds = 1.0
        self._left_over: set[str] = set()  # in flight at the last kill
        self.key = SigningKey.generate()
        key_file = folder / "log.key"
        key_file.touch(mode=0o600)
        key_file.write_bytes(self.key.pem())
        self.sidecar = Sidecar(
            write_configuration(
                folder,
                backend.address,
                upstream={"response_timeout_seconds": 5},
                log={"signing_key_file": "log.key", "checkpoint_file": "checkpoints.jsonl"},
            )
        )
        self.store = folder / "var" / "scopegate.db"

    def violated(self, kind: str, what: str) -> None:
        self.counts[kind] += 1
        self.findings.found.append(f"{self.folder.name}, round {self.counts['rounds']}: {kind}: {what}")

    async def round(self) -> None:
        self.counts["rounds"] += 1
        begun = time.monotonic()
        self.sidecar.spawn()
        listened = False
        if self.chance.random() < IN_START:
            self.counts["killed in start-up"] += 1
            await asyncio.sleep(self.chance.uniform(0.0, self._start_seconds))
            self.sidecar.kill()
        else:
            self.counts["killed under load"] += 1
            await self.sidecar.listening()
            listened = True
            self._start_seconds = time.monotonic() - begun
            self.restarts.append(self._start_seconds)
            loads = [asyncio.create_task(self.load.client(self.sidecar)) for _ in range(self.clients)]
            loads.append(asyncio.create_task(self.load.operator(self.sidecar, self.backend)))
            await asyncio.sleep(self.chance.uniform(*KILL_SECONDS))
            if not self.sidecar.running:
                self.violated("ended by itself", self.sidecar.log()[-1000:])
            self.sidecar.kill()
            await asyncio.gather(*loads)
        await self.backend.idle()
        in_flight = self.judge(listened)
        if listened:
            seen = {execution.decision_id for execution in self.backend.seen}
            self.counts["in flight at the kill"] += len(in_flight)
            self.counts["spent without an execution"] += len(in_flight - seen)
        self._left_over = in_flight

    def judge(self, listened: bool) -> set[str]:
        """Judge a copy of the database; the executions that are in flight in it."""
        copy = self.folder / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        copy.mkdir()
        for suffix in ("", "-wal"):
            if Path(f"{self.store}{suffix}").exists():
                shutil.copy(f"{self.store}{suffix}", copy / f"{self.store.name}{suffix}")
        path = copy / self.store.name
        try:
            with closing(sqlite3.connect(path)) as database:
                found = [line for (line,) in database.execute("PRAGMA integrity_check")]
                if found != ["ok"]:
                    self.violated("corrupt", "; ".join(found[:3]))
                tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master")}
                if not {"scopes", "executions", "decisions"} <= tables:
                    if self.load.attempts:
                        self.violated("corrupt", f"only these tables are left: {sorted(tables)}")
                    return set()
                in_flight = self._judge_rows(database, listened)
        except sqlite3.Error as exc:
            self.violated("corrupt", str(exc))
            return set()
        try:
            attestation = read_checkpoints(self.folder / "checkpoints.jsonl", [self.key.public])
            verify_sqlite(path, attestation=attestation)
        except (LogTampered, StoreUnavailable) as exc:
            self.violated("chain broken", str(exc))
        return in_flight

    def _judge_rows(self, database: sqlite3.Connection, listened: bool) -> set[str]:
        status: dict[str, str] = {}
        used: Counter[str] = Counter()
        for decision_id, scope_id, ended in database.execute(
            "SELECT decision_id, scope_id, status FROM executions"
        ):
            status[decision_id] = ended
            if ended not in RELEASED:
                used[scope_id] += 1
        recorded = {
            decision_id
            for (decision_id,) in database.execute(
                "SELECT decision_id FROM decisions WHERE event = 'admitted'"
            )
        }
        seen = Counter(execution.decision_id for execution in self.backend.seen)
        seen_of = Counter(execution.scope_id for execution in self.backend.seen)
        under = Counter(execution.key for execution in self.backend.seen if execution.key is not None)
        for key, times in under.items():
            if times > 1:
                self.violated("executed twice under a key", f"{key}: {times} times")
        of_key = {execution.key: execution.decision_id for execution in self.backend.seen}
        for key, decision_id in self.load.told.items():
            if of_key.get(key) != decision_id:
                self.violated("wrong replay", f"{key}: {decision_id}, not {of_key.get(key)}")
        listed: dict[str, int] = {}
        for scope_id, most, counted in database.execute(
            "SELECT scope_id, max_attempts, attempts_used FROM scopes"
        ):
            listed[scope_id] = most
            if used[scope_id] > most or seen_of[scope_id] > most:
                told = f"{used[scope_id]} admitted, {seen_of[scope_id]} seen by the backend, {most} allowed"
                self.violated("over", f"scope {scope_id}: {told}")
            if counted != used[scope_id]:
                self.violated("miscounted", f"scope {scope_id} says {counted}, not {used[scope_id]}")
        for decision_id, times in seen.items():
            if decision_id not in recorded or decision_id not in status:
                self.violated("unrecorded", decision_id)
            if times > 1:
                self.violated("executed twice", decision_id)
            if status.get(decision_id) in RELEASED:
                self.violated("released and executed", f"{decision_id} is {status[decision_id]}")
        if recorded != set(status):
            self.violated("unrecorded", f"records and executions differ by {len(recorded ^ set(status))}")
        for decision_id in self.load.answered:
            if status.get(decision_id) != "answered":
                self.violated("answer lost", f"{decision_id} is {status.get(decision_id)}")
        for scope_id, attempts in self.load.attempts.items():
            if listed.get(scope_id) != attempts:
                self.violated("scope lost", f"{scope_id}: {listed.get(scope_id)}, not {attempts} attempts")
        in_flight = {decision_id for decision_id, ended in status.items() if ended == "in_flight"}
        if listened and in_flight & self._left_over:
            self.violated("silent crash", f"{len(in_flight & self._left_over)} in flight over a start")
        while self.load.wrong:
            self.violated("unexpected answer", self.load.wrong.pop())
        return in_flight

    async def finish(self) -> None:
        """Start once more, look at everything through the program itself, and stop in order."""
        sidecar = self.sidecar
        await sidecar.start()
        try:
            listed = {one["decision_id"] async for one in pages(sidecar.admin, UNKNOWN, "executions")}
            if not self._left_over <= listed:
                self.violated("silent crash", f"{len(self._left_over - listed)} are not listed as unknown")
            with Client(sidecar.ops) as client:
                ready = await client.ask("GET", "/health/ready")
            if ready.status != 200:
                self.violated("not ready", f"{ready.body[:300]!r}")
            self.counts["left unknown at the end"] += len(listed)
            ended = await sidecar.stop()
        finally:
            sidecar.kill()
        if ended != 0:
            self.violated("stop", f"exit code {ended}: {sidecar.log()[-500:]}")
        self._left_over = set()
        self.judge(listened=True)
        verified = await asyncio.to_thread(command, "log", "verify", "--config", sidecar.config)
        if verified.returncode != 0:
            self.violated("chain broken", f"log verify: {verified.returncode} {verified.stderr[-500:]}")
        else:
            self.counts["records"] += int(verified.stdout.split()[1])
        self.counts["scopes issued"] += len(self.load.attempts)
        self.counts["executed"] += len(self.backend.seen)
        self.counts["answered to clients"] += len(self.load.answered)


# Running it --------------------------------------------------------------------------------------------


async def run_store(folder: Path, rounds: int, chance: random.Random, clients: int, told: Any) -> Findings:
    async with serving(delay=EXECUTION_SECONDS, chance=random.Random(chance.random())) as backend:
        generation = Generation(folder, backend, chance, clients)
        try:
            for _ in range(rounds):
                await generation.round()
                told.put(("round", len(generation.findings.found)))
            await generation.finish()
        except DidNotStart as exc:
            generation.violated("did not start", str(exc))
        except Lost as exc:
            generation.violated("unexpected answer", str(exc))
        finally:
            generation.sidecar.kill()
        told.put(("store", dict(generation.counts), generation.findings.found, generation.restarts))
        return generation.findings


def lane(number: int, rounds: int, seed: int, clients: int, folder: Path, told: Any) -> None:
    """One sidecar after the other, in a process of its own."""
    raise_on_sigterm()
    chance = random.Random(f"{seed}.{number}")
    left, store = rounds, 0
    while left > 0:
        store += 1
        here = folder / f"lane-{number}-store-{store}"
        here.mkdir()
        findings = asyncio.run(run_store(here, min(left, ROUNDS_A_STORE), chance, clients, told))
        left -= ROUNDS_A_STORE
        if not findings.found:
            shutil.rmtree(here)
    told.put(("end",))


def follow(
    lanes: list[Any],
    told: Any,
    rounds: int,
    counts: Counter[str],
    findings: Findings,
    restarts: list[float],
) -> None:
    """Gather what the lanes tell, until all have ended."""
    progress, done, ended = Progress("kills", rounds), 0, 0
    heard = time.monotonic()
    while ended < len(lanes):
        try:
            kind, *rest = told.get(timeout=1.0)
        except Empty:
            dead = [one.exitcode for one in lanes if one.exitcode not in (None, 0)]
            if dead or time.monotonic() - heard > SILENT_SECONDS:
                findings.found.append(f"a lane broke off or hangs (exit codes {dead}); see above")
                break
            continue
        heard = time.monotonic()
        if kind == "round":
            done += 1
            progress.show(done, f"({done} kills, {len(findings.found) + rest[0]} violations)")
        elif kind == "store":
            counts.update(rest[0])
            findings.found += rest[1]
            restarts += rest[2]
        else:
            ended += 1


def summary(counts: Counter[str], restarts: list[float], seconds: float) -> None:
    held = (
        ("scopes over their attempts", "over"),
        ("scopes with a wrong counter", "miscounted"),
        ("executions without an admission record", "unrecorded"),
        ("executions that the backend saw twice", "executed twice"),
        ("idempotency keys that the backend saw twice", "executed twice under a key"),
        ("replays of another execution", "wrong replay"),
        ("released and yet executed", "released and executed"),
        ("answers that clients got and the store lost", "answer lost"),
        ("scopes that clients got and the store lost", "scope lost"),
        ("in flight over a start (no outcome)", "silent crash"),
        ("corrupt databases (integrity_check)", "corrupt"),
        ("chains that do not verify", "chain broken"),
        ("starts that failed", "did not start"),
        ("unexpected answers", "unexpected answer"),
    )
    under_load = counts["killed under load"]
    in_flight, spent = counts["in flight at the kill"], counts["spent without an execution"]
    print()
    table(
        [
            ("kills", counts["rounds"]),
            ("  under load", under_load),
            ("  in start-up", counts["killed in start-up"]),
            ("scopes issued", counts["scopes issued"]),
            ("executions seen by backends", counts["executed"]),
            ("  answered to clients", counts["answered to clients"]),
            ("repeated under a key", counts["repeated under a key"]),
            ("  replayed", counts["replayed"]),
            ("  outcome unknown", counts["outcome unknown under a key"]),
            ("refused, exhausted", counts["refused"]),
            ("answered 503, Retry-After", counts["told to come again"]),
            ("records in the logs", counts["records"]),
            ("start to listening, median", f"{median(restarts) * 1000:.0f} ms"),
            ("minutes in all", f"{seconds / 60:.1f}"),
        ]
    )
    print("\nThe price of crash safety:")
    table(
        [
            ("unknown: in flight at a kill", in_flight, f"{in_flight / max(1, under_load):.2f} a kill"),
            ("  the backend had executed them", in_flight - spent, ""),
            ("  spent without an execution", spent, f"{spent / max(1, under_load):.2f} a kill"),
            ("reconciled as executed", counts["reconciled as executed"], ""),
            ("reconciled as not executed, released", counts["reconciled as not_executed"], ""),
            ("left unknown at the ends", counts["left unknown at the end"], ""),
        ]
    )
    print("\nWhat must be 0:")
    table([(name, counts[kind]) for name, kind in held])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--lanes", type=int, default=2, help="sidecars side by side (default: 2)")
    parser.add_argument("--clients", type=int, default=16, help="clients of each (default: 16)")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10_000))
    parser.add_argument("--quick", action="store_true", help="40 rounds")
    options = parser.parse_args()
    rounds = min(40, options.rounds) if options.quick else options.rounds
    raise_on_sigterm()
    folder = Path(tempfile.mkdtemp(prefix="kill-nine-"))
    print(f"seed {options.seed}, {options.lanes} lanes of {options.clients} clients, in {folder}", flush=True)
    context = multiprocessing.get_context("spawn")
    told = context.Queue()
    lanes = [
        context.Process(
            target=lane,
            args=(
                number,
                rounds // options.lanes + (number < rounds % options.lanes),
                options.seed,
                options.clients,
                folder,
                told,
            ),
        )
        for number in range(options.lanes)
    ]
    begun = time.monotonic()
    counts: Counter[str] = Counter()
    findings = Findings()
    restarts: list[float] = []
    try:
        for one in lanes:
            one.start()
        follow(lanes, told, rounds, counts, findings, restarts)
    except KeyboardInterrupt:
        findings.found.append("interrupted; the figures are of the stores that were done")
    finally:
        for one in lanes:
            if one.is_alive():
                one.join(2.0)
                one.terminate()
            one.join(10.0)
    summary(counts, restarts, time.monotonic() - begun)
    findings.check(counts["rounds"] == rounds, f"only {counts['rounds']} of {rounds} rounds were done")
    findings.check(counts["executed"] > 0, "nothing was executed")
    if not findings.found:
        shutil.rmtree(folder)
    else:
        print(f"\nkept: {folder}")
    return findings.report(f"{rounds} kills, no violation")


if __name__ == "__main__":
    sys.exit(main())
