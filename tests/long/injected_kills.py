"""The process is killed at each place of one execution, and started again: nothing is lost or invented.

    python -m tests.long.injected_kills [--one-in 1]

For each kill a process is forked, which runs a sidecar before a backend that notes each decision in a file
before it answers. Exit code 1 on any violation.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
from pathlib import Path

from sidecar.store.verify import verify_sqlite
from tests.client import Message
from tests.gate.test_injected_faults import RELEASED, Run, house_with_faults
from tests.injection import KILLED, everywhere
from tests.support import Script, opened, replies, serving_backend

KILLED_IN = ("answered", "a long answer", "reset")


def noting(script: Script, file: Path) -> Script:
    """A backend that notes an execution, surely, before it does anything."""
    number = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    async def noted(request: Message, writer: asyncio.StreamWriter) -> None:
        os.write(number, (request.header("Scopegate-Decision-Id") or "").encode() + b"\n")
        await script(request, writer)

    return noted


async def execute(folder: Path, scenario: str, at: int) -> None:
    """One execution that is killed at a place, or whose places are counted into a file."""
    with everywhere():
        async with house_with_faults(folder, 10) as (house, injection):
            run = Run(house, injection, scenario)
            run.script = noting(run.script, folder / "seen.txt")
            await run.go(at, "kill" if at >= 0 else None)
            await asyncio.to_thread((folder / "places.txt").write_text, "\n".join(injection.met))


def in_child(folder: Path, scenario: str, at: int) -> int:
    """The exit code of a process that does so."""
    folder.mkdir()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            asyncio.run(execute(folder, scenario, at))
            code = 0
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


async def violations(folder: Path) -> tuple[list[str], bool]:
    """What is wrong after the next start, and whether an attempt was spent without an execution."""
    found: list[str] = []
    seen = await asyncio.to_thread((folder / "seen.txt").read_text)
    came = seen.split()
    async with serving_backend() as backend, opened(folder, backend) as house:
        engine = house.sidecar.store.engine
        (scope,) = (await engine.scopes("default", "inc_1", before=None, limit=10))[0].rows
        executions = {each.decision_id: each for each in await engine.executions_of(scope.scope_id)}
        admitted = {record["decision_id"] for record in await house.records("&event=admitted")}
        if set(executions) != admitted:
            found.append(f"admitted {admitted}, executions {set(executions)}")
        if not set(came) <= admitted or len(came) != len(set(came)) or len(came) > 1:
            found.append(f"the backend saw {came}, admitted were {admitted}")
        found += [
            f"{each.decision_id} is {each.status}"
            for each in executions.values()
            if each.status == "in_flight" or (each.decision_id in came and each.status == "not_sent")
        ]
        spent = [each for each in executions.values() if each.status not in RELEASED]
        if scope.attempts_used != len(spent) or len(spent) > 1:
            found.append(f"{scope.attempts_used} attempts used, {len(spent)} executions")
        backend.script = replies()
        if (await house.execute(await house.issue())).status != 200:
            found.append("a later request was not executed")
        database = house.database
    if verify_sqlite(database).records == 0:
        found.append("the log is empty")
    return found, bool(spent) and not came


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--one-in", type=int, default=1, help="kill at one place in so many")
    options = parser.parse_args()
    wrong = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for scenario in KILLED_IN:
            counted = folder / scenario.replace(" ", "-")
            if in_child(counted, scenario, -1) != 0:
                print(f"{scenario}: an execution without a fault failed")
                return 1
            met = (counted / "places.txt").read_text().split("\n")
            kills = spent = 0
            for at in range(0, len(met), options.one_in):
                place = folder / f"{counted.name}-{at}"
                if in_child(place, scenario, at) != KILLED:
                    continue  # of what ends last, the one or the other may come first
                kills += 1
                (place / "seen.txt").touch()
                found, without = asyncio.run(violations(place))
                spent += without
                for violation in found:
                    wrong += 1
                    print(f"{scenario}, killed at {at} ({met[at]}): {violation}")
            print(
                f"{scenario}: {len(met)} places, {kills} kills, {spent} attempts spent without an execution"
            )
            wrong += not kills
    print("WELL" if not wrong else f"{wrong} VIOLATIONS")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
