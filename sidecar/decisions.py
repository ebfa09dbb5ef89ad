"""Decision records for Python programs: Scopegate's log keeps each decision with its source, time and reason.

    from sidecar.decisions import backfill_run_id_for_request, configure
    from sidecar.decisions import emit_policy_decision, emit_routing_decision

    configure("sqlite:///decisions.db")      # without this: in memory, forgotten when the program ends
    emit_routing_decision(
        None, routed=True, selected_agent="agent-7", eligible_agents=["agent-7"], request_id="req-1"
    )
    backfill_run_id_for_request("req-1", "run-1")
    emit_policy_decision("run-1", "no-pii", evaluated=True, violated=True, severity="error")

No sidecar process is needed. `configure` chooses and opens the store: memory, or a SQLite file that one
process at a time owns. The log, its hash chain and its rules are those of the HTTP gate; `scopegate log
verify` recomputes the chain. Every function works from any thread, inside and outside a running loop. The
functions that are not async wait until the record is on disk.

When a call appends a record
    routing, recovery,     at every call
    memory, policy, budget
    budget_enforcement     once for each run_id
    policy_precheck        only if the posture is "strict" and the check failed or could not be made; once
                           for each request_id and outcome
    recovery_evaluation    for every outcome (applied, suggested, skipped), once for each run_id and
                           failure_type
    care_optimization      only if optimization is enabled and not in shadow mode, the optimized agent is not
                           the baseline, the confidence reaches `min_confidence` of `configure`, and the kill
                           switch is off; once for each request_id
A function returns its record, or None if it appends none. The store enforces "once", so it holds under
concurrency and across restarts. The position of the kill switch is stored as well.

When the store fails
    A decision record never stops its caller. If the store does not confirm a call in time, the logger
    `scopegate.decisions` logs it, and `get_decision_service().failures` and the Prometheus counter
    `scopegate_library_emissions_failed_total` count it. Then `emit` and `emit_sync` return False, the
    `emit_*` functions still return their record, a backfill returns 0, turning the kill switch returns
    False, and the switch counts as on. A record whose call timed out while it was being written may still
    appear in the log. A record of more than 1 MiB is refused in the same way.

Values in a record are copied and become JSON at once. They may have any type (see `DecisionRecord`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Number
from typing import Any

from sidecar.core.command import Bind, Emit, NotEmitted, RunBound, Switch, Turn
from sidecar.core.emission import CARESignalAccessError, Kind, check_signal, emission, once_key
from sidecar.core.record import CausalRole, DecisionOutcome, DecisionSource, DecisionTrigger, DecisionType
from sidecar.files.jsonvalue import as_text, plain
from sidecar.ids import new_decision_id
from sidecar.library.recording import (
    DecisionRecord,
    DecisionRecordService,
    core_record,
    decision_record,
    get_decision_service,
)
from sidecar.library.runtime import configure, configured_store
from sidecar.telemetry.events import LogEvent

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

_KILL_SWITCH: Switch = "care_kill_switch"

# Every call appends a record -----------------------------------------------------------------------


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
    """Record which agent a request was routed to, or why it was routed to none.

    The outcome is "selected" if the request was routed and an agent is named, and the reason then names the
    agent. It is "rejected" if the request was not routed and a reason is given, and otherwise "none". Routing
    usually happens before the run exists: see `backfill_run_id_for_request`.
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
    """Record whether a recovery was evaluated and triggered.

    The outcome is "skipped" if it was not evaluated, "selected" if it was triggered, and otherwise "none".
    """
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
    """Record the result of a memory query.

    The outcome is "skipped" if memory was not queried, "none" if nothing matched, "selected" if the match was
    injected, and "blocked" if it was not injected.
    """
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
    """Record a policy check.

    The outcome is "skipped" if the policy was not evaluated and "selected" if it was met. A violation is
    "blocked" at the severity "error" and "rejected" at any other.
    """
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
    """Record a budget check.

    The outcome is "selected" if the budget suffices. If it does not, the outcome is "blocked" under "hard"
    enforcement; otherwise "selected" if the request proceeded anyway, and "rejected" if not.
    """
    return _always_recorded("budget", locals())


# Some calls append a record ------------------------------------------------------------------------


def emit_budget_enforcement_decision(
    run_id: str,
    budget_limit_cents: int,
    budget_consumed_cents: int,
    step_cost_cents: int,
    completed_steps: int,
    total_steps: int,
    tenant_id: str = "default",
) -> DecisionRecord | None:
    """Record that a hard budget limit halted a run. None: a halt of this run is already recorded."""
    return _recorded("budget_enforcement", locals())


def emit_policy_precheck_decision(
    request_id: str,
    posture: str,
    passed: bool,
    service_available: bool = True,
    violations: Sequence[Any] | None = None,
    tenant_id: str = "default",
) -> DecisionRecord | None:
    """Record that a policy pre-check kept a request from becoming a run.

    The outcome is "unavailable" if the policy service was not available, even if the check failed, and
    otherwise "blocked". Returns None if the posture is not "strict", if the check passed, or if this outcome
    is already recorded for this request.
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
    """Record the recovery after a halt or failure. Call it after each of them.

    A recovery action of class "R1" counts as applied, one of class "R2" as suggested, anything else as
    skipped. Returns None if this failure of this run is already recorded.
    """
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
    """Record that the optimization chose another agent than the baseline.

    Returns None if the optimization is not enabled, is in shadow mode, chose the baseline or was not
    confident enough, if the kill switch is on, or if an optimization is already recorded for this request.
    Raises CARESignalAccessError for a forbidden or unknown signal, before any other check.
    """
    return _recorded("care_optimization", locals())


# Arguments that are converted to booleans. As text, every value would count as true.
_FLAGS = frozenset(
    name
    for emitter in (value for word, value in globals().items() if word.startswith("emit_"))
    for name, annotation in emitter.__annotations__.items()
    if annotation == "bool"
)


def _always_recorded(kind: Kind, arguments: Mapping[str, Any]) -> DecisionRecord:
    record = _recorded(kind, arguments)
    assert record is not None
    return record


def _recorded(kind: Kind, arguments: Mapping[str, Any]) -> DecisionRecord | None:
    """Make and submit the record of a call; None if a rule or the store decides that there is none."""
    store = configured_store()
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
    """Convert an argument for the rules: flags to booleans, numbers and text unchanged, the rest to JSON."""
    if name in _FLAGS:
        return bool(value)
    return value if type(value) is str or isinstance(value, Number) else plain(value)


# What is recorded already --------------------------------------------------------------------------


def _check_budget_enforcement_exists(run_id: str) -> bool:
    """Whether a halt of this run is recorded. False if the store cannot be read."""
    return _is_kept(DecisionType.BUDGET_ENFORCEMENT, run_id)


def _check_policy_precheck_exists(request_id: str, outcome: str) -> bool:
    """Whether this outcome is recorded for this request. False if the store cannot be read."""
    return _is_kept(DecisionType.POLICY_PRE_CHECK, request_id, outcome)


def _check_recovery_evaluation_exists(run_id: str, failure_type: str) -> bool:
    """Whether this failure of this run is recorded. False if the store cannot be read."""
    return _is_kept(DecisionType.RECOVERY_EVALUATION, run_id, failure_type)


def _check_care_optimization_exists(request_id: str) -> bool:
    """Whether an optimization is recorded for this request. False if the store cannot be read."""
    return _is_kept(DecisionType.CARE_ROUTING_OPTIMIZED, request_id)


def _is_kept(decision_type: DecisionType, *parts: str) -> bool:
    key = once_key(decision_type, *(_argument("", part) for part in parts))
    try:
        return configured_store().read_sync(lambda engine: engine.is_kept(key))
    except Exception as exc:
        # False is safe, because a later emit still meets the unique key in the store.
        LogEvent.LOOKUP_FAILED.log(exc)
        return False


# Runs, signals, the kill switch --------------------------------------------------------------------


def backfill_run_id_for_request(request_id: str, run_id: str) -> int:
    """Bind a run to the records of its request that were made before the run existed; returns how many.

    Only records that are pre_run and have no run yet are bound. The records do not change, because the
    binding is stored beside them. Returns 0 for empty ids, and, logged and counted, if the store fails.
    """
    request, run = as_text(request_id), as_text(run_id)
    if not request or not run:
        return 0
    reply = get_decision_service().submit(Bind(request_id=request, run_id=run))
    return reply.count if isinstance(reply, RunBound) else 0


def check_signal_access(signal_name: str) -> bool:
    """True for a signal that the routing optimization may use.

    Raises CARESignalAccessError, with the name as `signal`, for a forbidden or unknown signal.
    """
    check_signal(plain(signal_name))
    return True


def activate_care_kill_switch() -> bool:
    """Stop the routing optimization: no caller on this store can record one until the switch is off again.
    True once that is on disk; False, logged, if the store fails."""
    return _turned(on=True)


def deactivate_care_kill_switch() -> bool:
    """Allow the routing optimization again. True once that is on disk; False, logged, if the store fails."""
    return _turned(on=False)


def _turned(*, on: bool) -> bool:
    turn = Turn(decision_id=new_decision_id(), switch=_KILL_SWITCH, on=on, origin="library")
    return get_decision_service().submit(turn) is not None


def is_care_kill_switch_active() -> bool:
    """Whether the kill switch is on. True if the store cannot be read, because that is the safe answer."""
    try:
        return configured_store().read_sync(lambda engine: engine.is_on(_KILL_SWITCH))
    except Exception as exc:
        LogEvent.KILL_SWITCH_UNREADABLE.log(exc)
        return True
