"""`scopegate executions`: lists executions with their outcomes, and reconciles those without a known one."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any, get_args

import click

from sidecar.cli.access import Access, asks
from sidecar.cli.client import within
from sidecar.cli.lists import action_option, incident_option, listing, name, only, since_option, usd
from sidecar.cli.options import answered, json_option, login_name
from sidecar.cli.tables import age, dollars, moment, when
from sidecar.core.scope import ExecutionStatus
from sidecar.web.wire import answers


@click.group(
    epilog="""\b
Examples:
  scopegate executions list --config config/scopegate.yaml --status unknown
  scopegate executions reconcile 0192... --config config/scopegate.yaml \\
    --outcome executed --cost-usd 0.04 --reason 'Seen in the logs'"""
)
def executions() -> None:
    """Executions: list them, and resolve those whose outcome is not known."""


@executions.command(
    epilog="""\b
Examples:
  scopegate executions reconcile 0192... --config config/scopegate.yaml \\
    --outcome executed --cost-usd 0.04 --reason 'Seen in the logs'
  scopegate executions reconcile 0192... --admin 127.0.0.1:9901 \\
    --outcome not_executed --reason 'The pod was never restarted' --by alice"""
)
@asks("admin")
@click.argument("decision_id", callback=name)
@click.option(
    "--outcome",
    type=click.Choice(["executed", "not_executed"]),
    required=True,
    help="Whether the backend executed it. not_executed gives the attempt and the hold back to the scope.",
)
@click.option("--cost-usd", callback=usd, metavar="X", help="The cost.  [default: the hold]")
@click.option("--reason", required=True, metavar="TEXT", help="How you know; the record keeps it.")
@click.option("--by", metavar="NAME", help="Who reconciles; the record keeps it.  [default: the login name]")
@json_option
def reconcile(
    sidecar: Access,
    decision_id: str,
    outcome: str,
    cost_usd: float | None,
    reason: str,
    by: str | None,
    *,
    as_json: bool,
) -> None:
    """Record whether an unknown or a running execution happened. DECISION_ID is the decision that admitted
    it, as `executions list` shows it."""
    path = f"/api/v1/executions/{within(decision_id)}/reconcile"
    by = by or login_name()
    wanted = {"outcome": outcome, "cost_usd": cost_usd, "reason": reason, "reconciled_by": by}
    look = f"scopegate decisions show {shlex.quote(decision_id)}"
    execution = sidecar.listener.ask("POST", path, answers.Execution, wanted, look=look).body
    answered(execution, as_json, [*described(execution), ("reason", reason), ("by", by)])


def described(execution: dict[str, Any]) -> Iterator[tuple[str, object]]:
    """The labelled lines of an execution."""
    attempt = execution["attempt_number"]
    yield "execution", execution["decision_id"]
    yield "status", execution["status"]
    yield "cause", execution["cause"]
    yield "action", execution["action"]
    yield "incident", execution["incident_id"]
    yield "scope", execution["scope_id"] or "none was needed"
    yield "attempt", "" if attempt is None else attempt
    yield "held", f"{dollars(execution['hold_usd'])} USD"
    yield "cost", "" if execution["cost_usd"] is None else f"{dollars(execution['cost_usd'])} USD"
    yield "http", execution["http_status"]
    yield "admitted", when(execution["admitted_at"])
    yield "report by", when(execution.get("report_by"))
    yield "ended", when(execution["ended_at"])
    yield "request", execution["request_id"]


def row(execution: dict[str, Any]) -> dict[str, str]:
    """An execution as a row of the table."""
    status = execution["http_status"]
    return {
        "decision": execution["decision_id"],
        "status": execution["status"],
        "admitted": moment(execution["admitted_at"]),
        "age": age(execution["admitted_at"]),
        "action": execution["action"],
        "incident": execution["incident_id"],
        "scope": execution["scope_id"] or "",
        "hold usd": dollars(execution["hold_usd"]),
        "cost usd": dollars(execution["cost_usd"]),
        "http": "" if status is None else str(status),
        "cause": execution["cause"] or "",
    }


listing(
    executions,
    "/api/v1/executions",
    "executions",
    answers.ExecutionList,
    row,
    only("--status", "those with this status", values=get_args(ExecutionStatus)),
    incident_option,
    action_option,
    since_option,
    help="List executions, newest first. Those with status `unknown` wait until an operator reconciles them, "
    "those with status `running` for the report of their backend.",
    examples="""\b
Examples:
  scopegate executions list --config config/scopegate.yaml --status unknown
  scopegate executions list --admin 127.0.0.1:9901 --action restart_pod --since 24h
  scopegate executions list --admin 127.0.0.1:9901 --incident-id inc_123 --json""",
)
