"""One function from row to value and one from value to row, for each table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from sidecar.core.scope import Execution, Scope
from sidecar.store.base import LogRow

SCOPE_COLUMNS = (
    "scope_id, tenant_id, incident_id, allowed_actions, max_cost, max_attempts, created_at, expires_at, "
    "intent, target_agents, created_by, attempts_used, settled, held, overrun, revoked_at, executors, "
    "issuer_kind, issuer_method, on_behalf_of"
)
EXECUTION_COLUMNS = (
    "decision_id, scope_id, tenant_id, incident_id, action, request_id, attempt_number, hold, admitted_at, "
    "status, cost, ended_at, http_status, cause, principal, target_agents, route, report_token, report_by, "
    "principal_kind, principal_method, principal_groups"
)
LOG_COLUMNS = (
    "seq, decision_id, event, decision_type, decision_outcome, decided_at, tenant_id, scope_id, incident_id, "
    "action, request_id, run_id, admission_id, envelope, hash, recorded_at"
)

Row = tuple[Any, ...]


def placeholders(columns: str) -> str:
    """One placeholder for each of some columns."""
    return ", ".join("?" for _ in columns.split(","))


def _json(texts: Sequence[str]) -> str:
    return orjson.dumps(texts).decode() if texts else "[]"


def scope_from_row(row: Row) -> Scope:
    return Scope(
        scope_id=row[0],
        tenant_id=row[1],
        incident_id=row[2],
        allowed_actions=tuple(orjson.loads(row[3])),
        max_cost=row[4],
        max_attempts=row[5],
        created_at=row[6],
        expires_at=row[7],
        intent=row[8],
        target_agents=tuple(orjson.loads(row[9])),
        created_by=row[10],
        attempts_used=row[11],
        settled=row[12],
        held=row[13],
        overrun=bool(row[14]),
        revoked_at=row[15],
        executors=tuple(orjson.loads(row[16])),
        issuer_kind=row[17],
        issuer_method=row[18],
        on_behalf_of=row[19],
    )


def scope_to_row(scope: Scope) -> Row:
    return (
        scope.scope_id,
        scope.tenant_id,
        scope.incident_id,
        _json(scope.allowed_actions),
        scope.max_cost,
        scope.max_attempts,
        scope.created_at,
        scope.expires_at,
        scope.intent,
        _json(scope.target_agents),
        scope.created_by,
        scope.attempts_used,
        scope.settled,
        scope.held,
        int(scope.overrun),
        scope.revoked_at,
        _json(scope.executors),
        scope.issuer_kind,
        scope.issuer_method,
        scope.on_behalf_of,
    )


def scope_counters(scope: Scope) -> Row:
    """The columns of a scope that change, then its id, in the order of `_UPDATE_SCOPE` in sqlite.py."""
    return (
        scope.attempts_used,
        scope.settled,
        scope.held,
        int(scope.overrun),
        scope.revoked_at,
        scope.scope_id,
    )


def execution_from_row(row: Row) -> Execution:
    return Execution(
        decision_id=row[0],
        scope_id=row[1],
        tenant_id=row[2],
        incident_id=row[3],
        action=row[4],
        request_id=row[5],
        attempt_number=row[6],
        hold=row[7],
        admitted_at=row[8],
        status=row[9],
        cost=row[10],
        ended_at=row[11],
        http_status=row[12],
        cause=row[13],
        principal=row[14],
        target_agents=tuple(orjson.loads(row[15])),
        route=row[16],
        report_token=row[17],
        report_by=row[18],
        principal_kind=row[19],
        principal_method=row[20],
        principal_groups=tuple(orjson.loads(row[21])),
    )


def execution_to_row(execution: Execution) -> Row:
    return (
        execution.decision_id,
        execution.scope_id,
        execution.tenant_id,
        execution.incident_id,
        execution.action,
        execution.request_id,
        execution.attempt_number,
        execution.hold,
        execution.admitted_at,
        execution.status,
        execution.cost,
        execution.ended_at,
        execution.http_status,
        execution.cause,
        execution.principal,
        _json(execution.target_agents),
        execution.route,
        execution.report_token,
        execution.report_by,
        execution.principal_kind,
        execution.principal_method,
        _json(execution.principal_groups),
    )


def execution_ending(execution: Execution) -> Row:
    """The columns of an execution that its end changes, then its id, in the order of `_END_EXECUTION` in
    sqlite.py."""
    return (
        execution.status,
        execution.cost,
        execution.ended_at,
        execution.http_status,
        execution.cause,
        execution.report_token,
        execution.decision_id,
    )


def log_to_row(log: LogRow) -> Row:
    entry, record = log.entry, log.entry.record
    return (
        log.seq,
        record.decision_id,
        entry.event,
        record.decision_type._value_,
        record.decision_outcome._value_,
        record.decided_at,
        record.tenant_id,
        entry.scope_id,
        entry.incident_id,
        entry.action,
        record.request_id,
        record.run_id,
        entry.admission_id,
        log.envelope,
        log.hash,
        entry.recorded_at,
    )
