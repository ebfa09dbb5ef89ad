"""Decision records for Python programs: what was decided, by whom, when and why, in Scopegate's log.

    from sidecar.decisions import backfill_run_id_for_request, configure
    from sidecar.decisions import emit_policy_decision, emit_routing_decision

    configure("sqlite:///decisions.db")      # without this: in memory, forgotten when the program ends
    emit_routing_decision(
        None, routed=True, selected_agent="agent-7", eligible_agents=["agent-7"], request_id="req-1"
    )
    backfill_run_id_for_request("req-1", "run-1")
    emit_policy_decision("run-1", "no-pii", evaluated=True, violated=True, severity="error")

No sidecar process is needed: `configure` names the store, memory or a SQLite file that one process owns at a
time, and opens it. The log, its hash chain and its rules are those of the HTTP gate; `scopegate log verify`
recomputes the chain. Every function works from any thread, inside and outside a running loop; those that are
not async wait until the record is on disk.

When a record is left
    routing, recovery,     at every call
    memory, policy, budget
    budget_enforcement     once for each run_id
    policy_precheck        only where the posture is "strict" and the check failed or could not be made; once
                           for each request_id and outcome
    recovery_evaluation    whatever was applied, suggested or skipped, once for each run_id and failure_type
    care_optimization      only where optimization is enabled and not in shadow mode, the optimized agent is
                           another than the baseline, the confidence reaches `min_confidence` of `configure`,
                           and the kill switch is off; once for each request_id
A function returns its record, or None where there is none. "Once" is kept in the store, so it holds under
concurrency and over restarts. The kill switch does, too: it stays as it was turned.

When the store fails
    A decision record never stops its caller. What the store does not confirm in time is logged by the logger
    `scopegate.decisions` and counted, in `get_decision_service().failures` and in the Prometheus counter
    `scopegate_library_emissions_failed_total`. Then `emit` and `emit_sync` return False, the `emit_*`
    functions still return their record, a backfill returns 0, turning the kill switch False, and the switch
    counts as on. A record that was given up while it was being written may still turn up in the log. A
    record of more than 1 MiB is refused in the same way.

What is put into a record becomes JSON at once, and is copied: it may be anything (see `DecisionRecord`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from numbers import Number
from typing import Any

from sidecar.core.command import Bind, Bound, Emit, NotEmitted, Switch, Turn
from sidecar.core.emission import Kind, check_signal, emission, once_key
from sidecar.core.record import CausalRole, DecisionOutcome, DecisionSource, DecisionTrigger, DecisionType
from sidecar.errors import CARESignalAccessError
from sidecar.files.jsonvalue import as_text, plain
from sidecar.ids import new_decision_id
from sidecar.library.recording import (
    DecisionRecord,
    DecisionRecordService,
    core_record,
    decision_record,
    get_decision_service,
)
from sidecar.library.runtime import configure, library

__all__ = [
    "configure",
    "DecisionType",
    "DecisionSource",
    "DecisionTrigger",
    "DecisionOutcome",
    "CausalRole",
    "DecisionRecord",
    "DecisionRecordService",
    "get_decision_service",
    "emit_routing_decision",
    "emit_recovery_decision",
    "emit_memory_decision",
    "emit_policy_decision",
    "emit_budget_decision",
    "emit_budget_enforcement_decision",
    "emit_policy_precheck_decision",
    "emit_recovery_evaluation_decision",
    "emit_care_optimization_decision",
    "backfill_run_id_for_request",
    "check_signal_access",
    "CARESignalAccessError",
    "activate_care_kill_switch",
    "deactivate_care_kill_switch",
    "is_care_kill_switch_active",
]

logger = logging.getLogger("scopegate.decisions")

_KILL_SWITCH: Switch = "care_kill_switch"

# What only has to be true or false; as text every value would be true.
_FLAGS = frozenset(
    {
        "evaluated",
        "injected",
        "matched",
        "optimization_enabled",
        "passed",
        "proceeded",
        "queried",
        "routed",
        "service_available",
        "shadow_mode",
        "triggered",
        "violated",
    }
)


# Every call leaves a record ------------------------------------------------------------------------


def emit_routing_decision(
    run_id: str | None,
    routed: bool,
    selected_agent: str | None = None,
    eligible_agents: Sequence[Any] = (),
    rejection_reason: str | None = None,
    tenant_id: str = "default",
    details: Mapping[str, Any] | None = None,
    request_id: str | None = None,
    causal_role: CausalRole = CausalRole.PRE_RUN,
) -> DecisionRecord:
    """Record which agent a request was routed to, or why to none.

    Selected where it was routed and an agent is named, which the reason repeats; rejected where it was not
    and a reason is given; else none. Routing mostly comes before there is a run: see
    `backfill_run_id_for_request`.
    """
    return _always_recorded("routing", locals())


def emit_recovery_decision(
    run_id: str | None,
    evaluated: bool,
    triggered: bool = False,
    action: str | None = None,
    candidates_count: int = 0,
    reason: str | None = None,
    tenant_id: str = "default",
    request_id: str | None = None,
    causal_role: CausalRole = CausalRole.IN_RUN,
) -> DecisionRecord:
    """Record whether a recovery was considered (skipped where not) and triggered (selected, else none)."""
    return _always_recorded("recovery", locals())


def emit_memory_decision(
    run_id: str | None,
    queried: bool,
    matched: bool = False,
    injected: bool = False,
    sources: Sequence[Any] | None = None,
    reason: str | None = None,
    tenant_id: str = "default",
    request_id: str | None = None,
    causal_role: CausalRole = CausalRole.IN_RUN,
) -> DecisionRecord:
    """Record what became of a look into memory: not queried skipped, nothing matched none, injected selected,
    matched but not injected blocked."""
    return _always_recorded("memory", locals())


def emit_policy_decision(
    run_id: str | None,
    policy_id: str,
    evaluated: bool,
    violated: bool = False,
    severity: str = "warning",
    reason: str | None = None,
    tenant_id: str = "default",
    request_id: str | None = None,
    causal_role: CausalRole = CausalRole.IN_RUN,
) -> DecisionRecord:
    """Record a policy check: not evaluated skipped, kept selected, violated blocked at the severity "error"
    and rejected at any other."""
    return _always_recorded("policy", locals())


def emit_budget_decision(
    run_id: str | None,
    budget_requested: int,
    budget_available: int,
    enforcement: str = "soft",
    simulation_feasible: bool | None = None,
    proceeded: bool = True,
    reason: str | None = None,
    tenant_id: str = "default",
    request_id: str | None = None,
    causal_role: CausalRole = CausalRole.PRE_RUN,
) -> DecisionRecord:
    """Record a budget check: selected where it suffices; where it does not, blocked under "hard" enforcement,
    else rejected or, where it proceeded all the same, selected."""
    return _always_recorded("budget", locals())


# Some calls leave a record -------------------------------------------------------------------------


def emit_budget_enforcement_decision(
    run_id: str,
    budget_limit_cents: int,
    budget_consumed_cents: int,
    step_cost_cents: int,
    completed_steps: int,
    total_steps: int,
    tenant_id: str = "default",
) -> DecisionRecord | None:
    """Record that a hard budget limit halted a run. None: that is recorded of this run already."""
    return _recorded("budget_enforcement", locals())


def emit_policy_precheck_decision(
    request_id: str,
    posture: str,
    passed: bool,
    service_available: bool = True,
    violations: Sequence[Any] | None = None,
    tenant_id: str = "default",
) -> DecisionRecord | None:
    """Record that policy kept a request from becoming a run: blocked, or unavailable, which wins.

    None where the posture is not "strict", where the check passed, or where this outcome is recorded of this
    request already.
    """
    return _recorded("policy_precheck", locals())


def emit_recovery_evaluation_decision(
    run_id: str,
    request_id: str,
    recovery_class: str,
    recovery_action: str | None,
    failure_type: str,
    failure_context: Mapping[str, Any] | None = None,
    tenant_id: str = "default",
) -> DecisionRecord | None:
    """Record, after every halt or failure, what recovery there was: a recovery action of class "R1" applied,
    of class "R2" suggested, else skipped. None: this failure of this run is recorded already."""
    return _recorded("recovery_evaluation", locals())


def emit_care_optimization_decision(
    request_id: str,
    baseline_agent: str,
    optimized_agent: str,
    confidence_score: float,
    signals_used: Sequence[str],
    optimization_enabled: bool,
    shadow_mode: bool,
    tenant_id: str = "default",
) -> DecisionRecord | None:
    """Record that optimization chose another agent than the baseline.

    None where it is not enabled, in shadow mode, chose the baseline, was not confident enough, where the kill
    switch is on, or where it is recorded of this request already. Raises CARESignalAccessError, before all
    else, for a signal that is forbidden or unknown.
    """
    return _recorded("care_optimization", locals())


def _always_recorded(kind: Kind, arguments: Mapping[str, Any]) -> DecisionRecord:
    record = _recorded(kind, arguments)
    assert record is not None
    return record


def _recorded(kind: Kind, arguments: Mapping[str, Any]) -> DecisionRecord | None:
    """The record of a call, submitted; None where a rule or the store's word says that there is none."""
    store = library()
    made = emission(
        kind,
        {name: _argument(name, value) for name, value in arguments.items()},
        decision_id=new_decision_id(),
        now=store.now(),
        min_confidence=store.min_confidence,
    )
    if made is None:
        return None
    record = decision_record(made.record)
    command = Emit(
        record=core_record(record), origin="library", once=made.once, unless_switched=made.unless_switched
    )
    reply = get_decision_service().submit(command)
    return None if isinstance(reply, NotEmitted) else record


def _argument(name: str, value: object) -> Any:
    """An argument as the rules take it: flags as booleans, numbers and text as they are, the rest as JSON."""
    if name in _FLAGS:
        return bool(value)
    return value if type(value) is str or isinstance(value, Number) else plain(value)


# What is recorded already --------------------------------------------------------------------------


def _check_budget_enforcement_exists(run_id: str) -> bool:
    """Whether a halt of this run is recorded. False, too, where the store cannot be read."""
    return _is_kept(DecisionType.BUDGET_ENFORCEMENT, run_id)


def _check_policy_precheck_exists(request_id: str, outcome: str) -> bool:
    """Whether this outcome is recorded of this request. False, too, where the store cannot be read."""
    return _is_kept(DecisionType.POLICY_PRE_CHECK, request_id, outcome)


def _check_recovery_evaluation_exists(run_id: str, failure_type: str) -> bool:
    """Whether this failure of this run is recorded. False, too, where the store cannot be read."""
    return _is_kept(DecisionType.RECOVERY_EVALUATION, run_id, failure_type)


def _check_care_optimization_exists(request_id: str) -> bool:
    """Whether an optimization is recorded of this request. False, too, where the store cannot be read."""
    return _is_kept(DecisionType.CARE_ROUTING_OPTIMIZED, request_id)


def _is_kept(decision_type: DecisionType, *parts: str) -> bool:
    key = once_key(decision_type, *(_argument("", part) for part in parts))
    try:
        return library().read_sync(lambda engine: engine.is_kept(key))
    except Exception as exc:
        # Not the last word: who then emits meets the unique key in the store.
        logger.warning("the store cannot say whether a decision is recorded: %s", exc)
        return False


# Runs, signals, the kill switch --------------------------------------------------------------------


def backfill_run_id_for_request(request_id: str, run_id: str) -> int:
    """Bind a run to the records that were left of its request before it existed; returns how many.

    Only records that are pre_run and have no run yet. The records themselves do not change: the binding is
    kept beside them. 0 for empty ids, and, logged and counted, where the store fails.
    """
    request, run = as_text(request_id), as_text(run_id)
    if not request or not run:
        return 0
    reply = get_decision_service().submit(Bind(request_id=request, run_id=run))
    return reply.count if isinstance(reply, Bound) else 0


def check_signal_access(signal_name: str) -> bool:
    """True for a signal that the optimization of routing may look at.

    Raises CARESignalAccessError, with the name as `signal`, for one that is forbidden or unknown.
    """
    check_signal(plain(signal_name))
    return True


def activate_care_kill_switch() -> bool:
    """Stop the optimization of routing: nothing more of it is recorded, by anybody on this store, until the
    switch is turned back. True once that is on disk; False, logged, where the store fails."""
    return _turned(on=True)


def deactivate_care_kill_switch() -> bool:
    """Allow the optimization of routing again. True once that is on disk; False, logged, where the store
    fails."""
    return _turned(on=False)


def _turned(*, on: bool) -> bool:
    turn = Turn(decision_id=new_decision_id(), switch=_KILL_SWITCH, on=on, origin="library")
    return get_decision_service().submit(turn) is not None


def is_care_kill_switch_active() -> bool:
    """Whether the kill switch is on. True, too, where the store cannot be read: then restraint is right."""
    try:
        return library().read_sync(lambda engine: engine.is_on(_KILL_SWITCH))
    except Exception as exc:
        logger.warning("the store cannot say whether the kill switch is on, so it counts as on: %s", exc)
        return True
