"""`scopegate executions`: lists executions with their outcomes, and reconciles those with unknown outcome."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any, get_args

import click

from sidecar.cli.calling import within
from sidecar.cli.lists import before_option, limit_option, name, pages, tell_of_more, usd
from sidecar.cli.options import Access, asks, json_option, tell
from sidecar.cli.tables import age, dollars, lines, moment, table, when
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
    """Admitted executions: list them, say what became of unknown ones."""


@executions.command(
    "list",
    epilog="""\b
Examples:
  scopegate executions list --config config/scopegate.yaml --status unknown
  scopegate executions list --admin 127.0.0.1:9901 --limit 20 --json""",
)
@asks("admin")
@click.option("--status", type=click.Choice(get_args(ExecutionStatus)), help="Only those that stand so.")
@limit_option
@before_option
@json_option
def list_(sidecar: Access, status: str | None, limit: int, before: str | None, *, as_json: bool) -> None:
    """List executions, newest first. Those that are `unknown` wait for somebody to reconcile them."""
    found = pages(
        sidecar.listener,
        "/api/v1/executions",
        "executions",
        answers.ExecutionList,
        limit,
        before,
        status=status,
    )
    if as_json:
        tell(found)
        return
    table([row(execution) for execution in found["executions"]], "There is no such execution.")
    tell_of_more(found)


@executions.command(
    epilog="""\b
Examples:
  scopegate executions reconcile 0192... --config config/scopegate.yaml \\
    --outcome executed --cost-usd 0.04 --reason 'Seen in the logs'
  scopegate executions reconcile 0192... --admin 127.0.0.1:9901 \\
    --outcome not_executed --reason 'The pod was never restarted'"""
)
@asks("admin")
@click.argument("decision_id", callback=name)
@click.option(
    "--outcome",
    type=click.Choice(["executed", "not_executed"]),
    required=True,
    help="What became of it. not_executed gives its attempt and its hold back.",
)
@click.option("--cost-usd", callback=usd, metavar="X", help="What it cost; without it, what it held.")
@click.option("--reason", required=True, metavar="TEXT", help="How you know: it stands in the record.")
@json_option
def reconcile(
    sidecar: Access, decision_id: str, outcome: str, cost_usd: float | None, reason: str, *, as_json: bool
) -> None:
    """Say what became of an execution that ended unknown. DECISION_ID is the decision that admitted it."""
    path = f"/api/v1/executions/{within(decision_id)}/reconcile"
    wanted = {"outcome": outcome, "cost_usd": cost_usd, "reason": reason}
    look = f"scopegate decisions show {shlex.quote(decision_id)}"
    execution = sidecar.listener.ask("POST", path, answers.Execution, wanted, look=look).body
    if as_json:
        tell(execution)
    else:
        lines(told(execution))


def told(execution: dict[str, Any]) -> Iterator[tuple[str, object]]:
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
