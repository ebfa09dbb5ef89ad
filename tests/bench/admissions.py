"""Group commit against one transaction each, in one run: admissions a second at N concurrent callers.

    python tests/bench/admissions.py [--folder /dev/shm] [--concurrency 64] [--seconds 5]

Both sides run the same store on the same kind of file with the same durability; the only difference is
how many commands share a transaction.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from sidecar.core.command import Admit, Admitted, Issue, Issued
from sidecar.core.facts import Claims
from sidecar.core.policy import ActionPolicy, PolicySet, RiskClass
from sidecar.core.scope import Scope
from sidecar.ids import new_decision_id, new_scope_id
from sidecar.store import batch
from sidecar.store.batch import Store
from sidecar.store.sqlite import SqliteEngine

POLICIES = PolicySet(revision="bench", actions={"retry_agent": ActionPolicy(risk=RiskClass.LOW, hold=1)})


def wall_clock() -> int:
    return time.time_ns() // 1000


def issue(number: int) -> Issue:
    return Issue(
        decision_id=new_decision_id(),
        ttl=3600,
        policies=POLICIES,
        scope=Scope(
            scope_id=new_scope_id(),
            tenant_id="default",
            incident_id=f"inc_{number}",
            allowed_actions=("retry_agent",),
            max_cost=10**12,
            max_attempts=10**9,
            created_at=0,
            expires_at=0,
            intent="measure the store",
            target_agents=(),
            created_by="bench",
        ),
    )


async def measure(folder: Path, concurrency: int, seconds: float, max_batch: int) -> tuple[int, float]:
    """(admissions, seconds) with at most `max_batch` commands a transaction."""
    with mock.patch.object(batch, "MAX_BATCH", max_batch):
        store = Store(SqliteEngine(folder / f"bench-{max_batch}.db"), clock=wall_clock, deadline_seconds=30)
        await store.open()
        scopes = []
        for number in range(concurrency):
            issued = await store.submit(issue(number))
            assert isinstance(issued, Issued)
            scopes.append(issued.scope)
        begun = time.perf_counter()
        until = begun + seconds

        async def admit(scope: Scope, clock: Callable[[], float] = time.perf_counter) -> int:
            count = 0
            while clock() < until:
                reply = await store.submit(
                    Admit(
                        decision_id=new_decision_id(),
                        request_id=new_decision_id(),
                        policies=POLICIES,
                        body_sha256="0" * 64,
                        claims=Claims(
                            scope_id=scope.scope_id,
                            incident_id=scope.incident_id,
                            action="retry_agent",
                            parameters={"agent": "a-17", "reason": "stuck", "retries": 3},
                        ),
                    )
                )
                assert isinstance(reply, Admitted), reply
                count += 1
            return count

        counts = await asyncio.gather(*(admit(scope) for scope in scopes))
        taken = time.perf_counter() - begun
        await store.close()
        return sum(counts), taken


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default="/dev/shm", help="where the databases are made (default: tmpfs)")
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        rates = {}
        for name, max_batch in (("one transaction each", 1), ("group commit", batch.MAX_BATCH)):
            count, taken = await measure(Path(folder), arguments.concurrency, arguments.seconds, max_batch)
            rates[name] = count / taken
            print(f"{name:22} {count:8d} admissions in {taken:.2f} s: {rates[name]:8.0f} a second")
        print(f"ratio                  {rates['group commit'] / rates['one transaction each']:.1f}")


if __name__ == "__main__":
    asyncio.run(main())
