"""Translates the calls of an embedding program to commands, and the replies to values or exceptions.

Nothing is judged here. Facts are read by the same rules as HTTP requests, and the core decides.
"""

from __future__ import annotations

from collections.abc import Awaitable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from decimal import Decimal
from typing import Any

import orjson

from sidecar.core.command import Admit, Admitted, Denied, Gatekept, Issue, Recorded, Refuse, Reply, Settled
from sidecar.core.facts import DEFAULT_SOURCES, IDENTIFIER_RULE, Claims, Request, is_identifier, read
from sidecar.core.money import is_whole_micros, to_micros
from sidecar.core.policy import PolicySet
from sidecar.core.rehearsal import reported_cost
from sidecar.core.scope import MAX_INTENT_CHARS, Scope
from sidecar.core.wording import visible_chars
from sidecar.errors import Refusal, StoreUnavailable
from sidecar.files.jsonvalue import plain
from sidecar.ids import new_decision_id, new_scope_id
from sidecar.library.actions import ending
from sidecar.library.refusals import scope_refused
from sidecar.library.runtime import Ending, ThreadedStore
from sidecar.telemetry.events import LogEvent

TENANT = "default"

# The terms of a scope that a call leaves out. Money is in micro-dollars.
DEFAULTS = {"max_attempts": 1, "ttl_seconds": 300, "max_cost_usd": 500_000}
MAX_ATTEMPTS = 1_000_000_000
MAX_TTL_SECONDS = 100 * 365 * 24 * 3_600


# Scopes -------------------------------------------------------------------------------------------------


def grant(
    policies: PolicySet,
    incident_id: object,
    allowed_actions: object,
    intent: object,
    max_cost_usd: object,
    max_attempts: object,
    ttl_seconds: object,
    target_agents: object,
    created_by: object,
) -> Issue:
    """The command that grants a scope. Raises ValueError, naming the wrong term."""
    scope = Scope(
        scope_id=new_scope_id(),
        tenant_id=TENANT,
        incident_id=_identifier("incident_id", incident_id),
        allowed_actions=tuple(dict.fromkeys(_identifiers("allowed_actions", allowed_actions))),
        max_cost=_ceiling(max_cost_usd),
        max_attempts=_whole("max_attempts", max_attempts, MAX_ATTEMPTS),
        created_at=0,
        expires_at=0,
        intent=_intent(intent),
        target_agents=() if target_agents is None else _identifiers("target_agents", target_agents),
        created_by=_identifier("created_by", created_by),
    )
    if not scope.allowed_actions:
        raise ValueError("allowed_actions must name at least one action")
    ttl = _whole("ttl_seconds", ttl_seconds, MAX_TTL_SECONDS)
    requested = {"max_attempts": scope.max_attempts, "ttl_seconds": ttl, "max_cost_usd": scope.max_cost}
    return Issue(
        decision_id=new_decision_id(),
        scope=scope,
        ttl=ttl,
        # A call that passes a default value looks like one that leaves the term out.
        defaulted=frozenset(term for term, value in requested.items() if value == DEFAULTS[term]),
        policies=policies,
        origin="library",
    )


def micros_of(name: str, dollars: object) -> int:
    """An amount of dollars in micro-dollars, rounded up. Raises ValueError."""
    if isinstance(dollars, bool) or not isinstance(dollars, int | float | Decimal):
        raise ValueError(f"{name} must be a number of dollars")
    try:
        return to_micros(dollars)
    except ValueError as exc:
        raise ValueError(f"{name}: {exc}") from exc


def _ceiling(dollars: object) -> int:
    micros = micros_of("max_cost_usd", dollars)
    assert isinstance(dollars, int | float | Decimal)
    if not is_whole_micros(Decimal(float.__repr__(dollars) if isinstance(dollars, float) else dollars)):
        raise ValueError("max_cost_usd must have at most six decimals")
    return micros


def _whole(name: str, value: object, largest: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be a whole number")
    if not 1 <= value <= largest:
        raise ValueError(f"{name} must be from 1 to {largest}")
    return value


def _intent(value: object) -> str:
    if not isinstance(value, str) or not visible_chars(value):
        raise ValueError("intent is required and must say why; it cannot be blank")
    if len(value) > MAX_INTENT_CHARS:
        raise ValueError(f"intent must have at most {MAX_INTENT_CHARS} characters")
    if value != value.encode("utf-8", "replace").decode():
        raise ValueError("intent must be text that UTF-8 can hold")
    return value


def _identifier(name: str, value: object) -> str:
    if not isinstance(value, str) or not is_identifier(value):
        raise ValueError(f"{name} must be a string of {IDENTIFIER_RULE}")
    return value


def _identifiers(name: str, values: object) -> tuple[str, ...]:
    if not isinstance(values, list | tuple) or not all(is_identifier(value) for value in values):
        raise ValueError(f"{name} must be a list of strings of {IDENTIFIER_RULE}")
    return tuple(values)


# Executions ---------------------------------------------------------------------------------------------


def admission(
    policies: PolicySet,
    *,
    scope_id: object,
    incident_id: object,
    action: object,
    parameters: object = None,
    target_agents: object = None,
    announced_cost: int = 0,
) -> Admit | Refuse:
    """The command that asks for one execution, or, if its facts cannot be read, the command that refuses
    it."""
    judged = parameters
    if isinstance(parameters, Mapping):
        judged = {name: value for name, value in parameters.items() if isinstance(name, str)}
    document = {
        "scope_id": scope_id,
        "incident_id": incident_id,
        "action": action,
        "parameters": judged,
        "target_agents": target_agents,
    }
    claims = read(Request(document=document), DEFAULT_SOURCES)
    if isinstance(claims, Refusal):
        return refusal_of(policies, claims, known(scope_id, incident_id, action))
    if isinstance(parameters, Mapping):
        recorded = plain(parameters)
        claims = replace(claims, parameters=recorded, body_bytes=len(orjson.dumps(recorded)))
    return Admit(
        decision_id=new_decision_id(),
        claims=claims,
        policies=policies,
        tenant_id=TENANT,
        announced_cost=announced_cost,
        origin="library",
    )


def copied(value: Any, seen: dict[int, Any] | None = None) -> Any:
    """A deep copy of dicts and lists, so that the judged value cannot change before it is executed."""
    seen = {} if seen is None else seen
    if id(value) in seen:
        return seen[id(value)]
    match value:
        case dict():
            members: dict[Any, Any] = {}
            seen[id(value)] = members
            members.update((name, copied(member, seen)) for name, member in value.items())
            return members
        case list():
            items: list[Any] = []
            seen[id(value)] = items
            items.extend(copied(item, seen) for item in value)
            return items
        case _:
            return value


def known(scope_id: object, incident_id: object, action: object) -> Claims:
    """The claims that are valid identifiers. The others are None."""
    return Claims(scope_id=_readable(scope_id), incident_id=_readable(incident_id), action=_readable(action))


def _readable(value: object) -> str | None:
    return value if isinstance(value, str) and is_identifier(value) else None


def refusal_of(
    policies: PolicySet, refusal: Refusal, claims: Claims, gatekept: Gatekept = "scoped_execution"
) -> Refuse:
    """The command that records a refusal that was decided without a scope."""
    return Refuse(
        decision_id=new_decision_id(),
        refusal=refusal,
        gatekept=gatekept,
        claims=claims,
        policy_revision=policies.revision,
        tenant_id=TENANT,
        origin="library",
    )


def allowed(command: Admit | Issue | Refuse, reply: Reply) -> Reply:
    """Return the reply, or raise ScopeRefused if the reply is a refusal.

    Terms that only the catalogue shows to be invalid raise ValueError, as all invalid terms do.
    """
    if isinstance(reply, Denied):
        if reply.refusal.code == "invalid_scope":
            raise ValueError(reply.refusal.message)
        raise scope_refused(reply.refusal, reply.decision_id)
    if isinstance(command, Refuse):
        assert isinstance(reply, Recorded)
        raise scope_refused(command.refusal, reply.decision_id)
    return reply


async def admit(store: ThreadedStore, command: Admit | Refuse) -> Admitted:
    """Admit an execution. Raises ScopeRefused or StoreUnavailable; nothing may be executed then.

    If the caller is cancelled before it gets the reply, the store gives the admission back.
    """
    return _admitted(command, await store.submit(command))


def admit_sync(store: ThreadedStore, command: Admit | Refuse) -> Admitted:
    """As `admit`."""
    return _admitted(command, store.submit_sync(command))


def _admitted(command: Admit | Refuse, reply: Reply) -> Admitted:
    admitted = allowed(command, reply)
    assert isinstance(admitted, Admitted)
    return admitted


async def settle(
    store: ThreadedStore,
    admitted: Admitted,
    outcome: Ending,
    cost: int | None = None,
    cause: str | None = None,
) -> Scope:
    """Settle an execution, and return the last known state of its scope. Never raises for a failing store,
    because the execution has already happened."""
    settled: Settled | None = None
    with _logged(admitted):
        settled = await store.wait_async(store.begin_settling(admitted, outcome, cost=cost, cause=cause))
    return _scope_after(settled or admitted)


def settle_sync(
    store: ThreadedStore,
    admitted: Admitted,
    outcome: Ending,
    cost: int | None = None,
    cause: str | None = None,
) -> Scope:
    """As `settle`."""
    settled: Settled | None = None
    with _logged(admitted):
        settled = store.wait(store.begin_settling(admitted, outcome, cost=cost, cause=cause))
    return _scope_after(settled or admitted)


def _scope_after(last: Settled | Admitted) -> Scope:
    assert last.scope is not None, "nothing is executed without a scope here"
    return last.scope


@contextmanager
def _logged(admitted: Admitted) -> Iterator[None]:
    """Log a settlement that the store did not take, and go on."""
    try:
        yield
    except StoreUnavailable as exc:
        LogEvent.END_UNCONFIRMED.log(decision_id=admitted.execution.decision_id, cause=str(exc))


async def to_its_end(store: ThreadedStore, admitted: Admitted, running: Awaitable[Any]) -> tuple[Any, Scope]:
    """Await an admitted execution and settle it. Returns its result and the scope after the settlement.

    Exceptions of the execution propagate.
    """
    try:
        returned = await running
    except GeneratorExit:
        # The event loop has ended, so the settlement cannot be awaited.
        with suppress(StoreUnavailable):
            store.begin_settling(admitted, "unknown", cause="the loop of the program ended before the action")
        raise
    except BaseException as exc:
        outcome, cause = ending(exc)
        await settle(store, admitted, outcome, cause=cause)
        raise
    return returned, await settle(store, admitted, "answered", reported_cost(returned))
