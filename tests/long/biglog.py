"""A long log, as real commands leave it through the real core and engine."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sidecar.core.command import (
    Admit,
    Bind,
    Command,
    Emit,
    Issue,
    Reconcile,
    Refuse,
    Revoke,
    Settle,
    Turn,
)
from sidecar.core.facts import Claims
from sidecar.core.policy import ActionPolicy, PolicySet, RiskClass
from sidecar.core.record import (
    CausalRole,
    DecisionOutcome,
    DecisionSource,
    DecisionTrigger,
    DecisionType,
    Record,
)
from sidecar.core.scope import Scope
from sidecar.core.state import State, names
from sidecar.errors import Refusal
from sidecar.ids import new_decision_id, new_scope_id
from sidecar.store._changes import apply_all
from sidecar.store.base import ChainHead, Changes
from sidecar.store.connection import in_thread
from sidecar.store.sqlite import SqliteEngine

SEED = 5
# About what group commit makes of it under load: the records of one batch share their time.
COMMANDS_A_BATCH = 64
TENANTS = 50
BEGUN = 1_767_225_600_000_000  # 2026-01-01

Progress = Callable[[int, int], None]

ACTIONS = {
    "retry_agent": ActionPolicy(risk=RiskClass.LOW, hold=10_000),
    "restart_pod": ActionPolicy(risk=RiskClass.MEDIUM, hold=250_000, timeout_seconds=60),
    "failover_database": ActionPolicy(risk=RiskClass.CRITICAL, hold=2_000_000),
    "clear_cache": ActionPolicy(risk=RiskClass.LOW),
}
POLICIES = PolicySet(revision="5f2b9c0d1e3a4f67", actions=ACTIONS)
INTENTS = (
    "Recover from hallucinated legal response",
    "Restart after a memory leak in the summarizer; approved in the incident channel",
    "Fail over to the standby: the primary's disk is at 99 %",
    "Retry the agent that is stuck since the deploy",
)
EMITTED = (
    (DecisionType.ROUTING, DecisionOutcome.SELECTED),
    (DecisionType.MEMORY, DecisionOutcome.SELECTED),
    (DecisionType.MEMORY, DecisionOutcome.SKIPPED),
    (DecisionType.BUDGET_ENFORCEMENT, DecisionOutcome.EXECUTION_HALTED),
    (DecisionType.POLICY_PRE_CHECK, DecisionOutcome.POLICY_BLOCKED),
    (DecisionType.RECOVERY_EVALUATION, DecisionOutcome.RECOVERY_SUGGESTED),
    (DecisionType.CARE_ROUTING_OPTIMIZED, DecisionOutcome.OPTIMIZED_SELECTED),
)
REFUSALS = (
    Refusal("scoped_execution_required", "A recovery action needs an execution scope."),
    Refusal(
        "invalid_request", "/action must be a string of 1 to 256 printable characters.", {"member": "/action"}
    ),
    Refusal("ambiguous_path", "The path can be read in more than one way; spell it out."),
)


@dataclass
class Incidents:
    """One incident after the other, as the commands that it brings."""

    chance: random.Random
    number: int = 0

    def next(self, now: int) -> list[Command]:
        """What happens around one incident: about a dozen records."""
        self.number += 1
        chance = self.chance
        tenant = f"tenant-{chance.randrange(TENANTS)}"
        incident, run = f"inc_{self.number}", f"run_{self.number}"
        action = chance.choice(list(ACTIONS))
        scope = Scope(
            scope_id=new_scope_id(),
            tenant_id=tenant,
            incident_id=incident,
            allowed_actions=(action,),
            max_cost=20_000_000,
            max_attempts=chance.randint(1, 4),
            created_at=0,
            expires_at=0,
            intent=chance.choice(INTENTS),
            target_agents=(f"agent-{chance.randrange(400)}",),
            created_by=chance.choice(("api", "oncall@example.com", "runbook-7")),
        )
        commands: list[Command] = [
            *self._emitted(chance.randint(1, 3), tenant, run, now),
            Issue(
                decision_id=new_decision_id(), scope=scope, ttl=900, policies=POLICIES, request_id=_request()
            ),
        ]
        for _ in range(chance.randint(1, scope.max_attempts + 1)):  # one more is refused: it is used up
            wanted = action if chance.random() < 0.95 else "drop_table"
            commands += self._attempt(scope, wanted, tenant)
        if chance.random() < 0.3:
            refusal = chance.choice(REFUSALS)
            claims = Claims(incident_id=incident)
            commands.append(
                Refuse(
                    decision_id=new_decision_id(),
                    refusal=refusal,
                    claims=claims,
                    tenant_id=tenant,
                    policy_revision=POLICIES.revision,
                    request_id=_request(),
                )
            )
        if chance.random() < 0.2:
            revoke = Revoke(decision_id=new_decision_id(), scope_id=scope.scope_id, tenant_id=tenant)
            commands += [revoke, self._admit(scope, action, tenant)]
        if chance.random() < 0.001:
            commands += [
                Turn(decision_id=new_decision_id(), switch="care_kill_switch", on=on, origin="api")
                for on in (True, False)
            ]
        return commands

    def _emitted(self, count: int, tenant: str, run: str, now: int) -> Iterator[Command]:
        chance, request = self.chance, _request()
        for _ in range(count):
            kind, outcome = chance.choice(EMITTED)
            before_the_run = kind is DecisionType.POLICY_PRE_CHECK
            yield Emit(
                origin=chance.choice(("library", "api")),
                record=Record(
                    decision_id=new_decision_id(),
                    decision_type=kind,
                    decision_outcome=outcome,
                    decision_source=chance.choice(list(DecisionSource)),
                    decision_trigger=chance.choice(list(DecisionTrigger)),
                    decided_at=now - chance.randrange(2_000_000),
                    decision_inputs={"prompt_tokens": chance.randrange(8_000), "candidates": ["a-1", "a-7"]},
                    decision_reason="the cheapest that is good enough",
                    run_id=None if before_the_run else run,
                    workflow_id=f"workflow-{self.number % 97}",
                    tenant_id=tenant,
                    request_id=request,
                    causal_role=CausalRole.PRE_RUN if before_the_run else CausalRole.IN_RUN,
                    details={"confidence": 0.87, "model": "small-2", "budget_left_usd": 4.25},
                ),
            )
            if before_the_run:
                yield Bind(request_id=request, run_id=run)

    def _admit(self, scope: Scope, action: str, tenant: str) -> Admit:
        return Admit(
            decision_id=new_decision_id(),
            claims=Claims(
                scope_id=scope.scope_id,
                incident_id=scope.incident_id,
                action=action,
                parameters={"reason": "stuck", "retries": 3, "region": "eu-central-1"},
                target_agents=scope.target_agents,
                body_bytes=300,
            ),
            policies=POLICIES,
            tenant_id=tenant,
            request_id=_request(),
            body_sha256=f"{self.chance.getrandbits(256):064x}",
        )

    def _attempt(self, scope: Scope, action: str, tenant: str) -> Iterator[Command]:
        """An admission and how it ends; what is denied leaves nothing for the rest to end."""
        admission = self._admit(scope, action, tenant)
        ended = self.chance.random()
        yield admission
        settle = Settle(
            decision_id=new_decision_id(),
            admission_id=admission.decision_id,
            outcome="answered" if ended < 0.93 else "not_sent" if ended < 0.96 else "unknown",
            cost=self.chance.choice((None, 0, 1_234, 9_999)),
            http_status=200,
        )
        yield settle
        if settle.outcome == "unknown" and self.chance.random() < 0.8:
            yield Reconcile(
                decision_id=new_decision_id(),
                admission_id=admission.decision_id,
                outcome="executed",
                cost=5_000,
                reason="looked at the backend's log",
                request_id=_request(),
            )


def _request() -> str:
    return new_decision_id()


def build(path: Path, records: int, progress: Progress = lambda done, total: None) -> None:
    """Write a log of so many records, or a few more. Its ids are new each time, all else is the same."""
    asyncio.run(_build(path, records, progress))


async def _build(path: Path, records: int, progress: Progress) -> None:
    chance = random.Random(SEED)
    incidents = Incidents(chance)
    engine = SqliteEngine(path)
    head = await engine.open()
    connection = engine._writer
    assert connection is not None
    # An index of millions wants room.
    await in_thread(connection, lambda raw: raw.execute("PRAGMA cache_size = -400000"))
    now = max(BEGUN, head.time)
    waiting: list[Command] = []
    try:
        while head.seq < records:
            now += chance.randrange(200_000)
            while len(waiting) < COMMANDS_A_BATCH:
                waiting += incidents.next(now)
            batch, waiting = waiting[:COMMANDS_A_BATCH], waiting[COMMANDS_A_BATCH:]
            head = await _commit(engine, batch, head, now)
            progress(min(head.seq, records), records)
    finally:
        await engine.close()


async def _commit(engine: SqliteEngine, batch: Sequence[Command], head: ChainHead, now: int) -> ChainHead:
    """The end of the log behind a batch. Nothing here has to survive a power failure."""
    heads: list[ChainHead] = []

    def decide(state: State) -> Changes:
        changes, after = apply_all(batch, state, head, now, [])
        heads.append(after)
        return changes

    await engine.transact(names(batch, now), decide, durable=False)
    await engine.tidy()
    return heads[-1]
