"""`scopegate decisions`: lists decision records, shows one, and follows new ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, get_args

import click

from sidecar.cli import executions
from sidecar.cli.access import Access, asks
from sidecar.cli.client import Caller, ProblemError, UnreachableError, within
from sidecar.cli.lists import (
    MAX_PAGE,
    Cursors,
    action_option,
    incident_option,
    listing,
    name,
    named,
    only,
    pages,
    since_option,
    tenant_option,
)
from sidecar.cli.options import answered, duration_between, json_option, tell
from sidecar.cli.shapes import is_number
from sidecar.cli.tables import cell, dollars, fitted, lines, lines_of, moment, plain, when
from sidecar.core.record import DecisionOutcome, DecisionType, Event
from sidecar.web.wire import answers

PATH = "/api/v1/decisions"


FILTERS = (
    only("--type", "those of this type", values=[kind.value for kind in DecisionType]),
    only(
        "--outcome",
        "those with this decision_outcome, which --json shows; the column OUTCOME has other words",
        values=[outcome.value for outcome in DecisionOutcome],
    ),
    only("--event", "those of this event", values=get_args(Event)),
    only("--scope-id", "those about this scope; the beginning of its id will do"),
    incident_option,
    action_option,
    # These two are not validated, because callers of the library may choose any run and request ids.
    only("--request-id", "those of this request", check=None),
    only("--run-id", "those of this run", check=None),
    tenant_option,
)


def filters(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that filter decisions."""
    for option in reversed(FILTERS):
        command = option(command)
    return command


@click.group(
    epilog="""\b
Examples:
  scopegate decisions list --config config/scopegate.yaml --event refused --limit 20
  scopegate decisions tail --config config/scopegate.yaml"""
)
def decisions() -> None:
    """Decision records: list them, show one, follow new ones."""


@decisions.command(
    epilog="""\b
Examples:
  scopegate decisions show 0192... --config config/scopegate.yaml
  scopegate decisions show 0192... --admin 127.0.0.1:9901 --json"""
)
@asks("admin")
@click.argument("decision_id", callback=name)
@json_option
def show(sidecar: Access, decision_id: str, *, as_json: bool) -> None:
    """Show one decision: the request, the decision and its reason, its place in the log, and the outcome."""
    decision = sidecar.listener.get(f"{PATH}/{within(decision_id)}", answers.Decision).body
    answered(decision, as_json, _described(decision))
    if as_json:
        return
    for head, member in (("inputs", "decision_inputs"), ("details", "details")):
        if decision[member]:
            click.echo(f"\n{head}")
            for line in lines_of(decision[member]):
                click.echo(f"  {line}")
    if decision["execution"] is not None:
        click.echo()
        lines(executions.described(decision["execution"]))


# Following ------------------------------------------------------------------------------------------


@decisions.command(
    epilog="""\b
Examples:
  scopegate decisions tail --config config/scopegate.yaml
  scopegate decisions tail --admin 127.0.0.1:9901 -n 0 --interval 0.5 --event refused --json"""
)
@asks("admin")
@filters
@click.option(
    "-n",
    "--last",
    type=click.IntRange(0, MAX_PAGE),
    default=10,
    show_default=True,
    metavar="N",
    help="How many existing decisions to show first.",
)
@click.option(
    "--interval",
    callback=duration_between(0.1, 3_600),
    default="1",
    show_default=True,
    metavar="TIME",
    help="How often to look for new decisions: seconds, or 5s, or 1m.",
)
@json_option
def tail(sidecar: Access, last: int, interval: float, *, as_json: bool, **wanted: Any) -> None:
    """Show the newest decisions, oldest first, then each new one, until Ctrl-C.

    The command continues across restarts of the sidecar. A record that was shown is not shown again
    when a run is bound to it.
    """
    following = Following(sidecar.listener, named(sidecar.listener, wanted))
    try:
        found = following.first(last)
        while True:
            for decision in found:
                if as_json:
                    tell(decision)
                else:
                    click.echo(fitted(_line(row(decision)), _BEGIN_OF_WHY))
            time.sleep(interval)
            found = following.new()
    except KeyboardInterrupt:
        pass  # Ctrl-C is the normal end of this command


class Following:
    """Yields each decision once, also across restarts, by the writer and the record number."""

    def __init__(self, listener: Caller, wanted: dict[str, str | None]) -> None:
        self._listener = listener
        self._wanted = wanted
        self._seen: dict[str, int] = {}
        self._lost = False

    def first(self, count: int) -> list[dict[str, Any]]:
        """The newest decisions, oldest first. `new` returns those after them."""
        found = self._page(max(1, count), None)["decisions"]
        self._remember(found)
        return list(reversed(found[:count]))

    def new(self) -> list[dict[str, Any]]:
        """The decisions since the last call, oldest first; none while the sidecar is away, which is reported
        once."""
        try:
            found = self._since()
        except (UnreachableError, ProblemError) as exc:
            if isinstance(exc, ProblemError) and exc.status < 500:
                raise
            if not self._lost:
                click.echo(f"scopegate: {cell(str(exc))}; trying again until it answers", err=True)
            self._lost = True
            return []
        if self._lost:
            click.echo("scopegate: it answers again", err=True)
        self._lost = False
        self._remember(found)
        return found[::-1]

    def _since(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        before: str | None = None
        cursors = Cursors(self._listener)
        while True:
            page = self._page(100 if before is None else MAX_PAGE, before)
            new = [one for one in page["decisions"] if one["seq"] > self._seen.get(one["writer"], 0)]
            found += new
            before = cursors.next(page["next"])
            if before is None or len(new) < len(page["decisions"]):
                return found

    def _page(self, limit: int, before: str | None) -> dict[str, Any]:
        return pages(self._listener, PATH, "decisions", answers.DecisionList, limit, before, **self._wanted)

    def _remember(self, decisions: list[dict[str, Any]]) -> None:
        for one in decisions:
            self._seen[one["writer"]] = max(one["seq"], self._seen.get(one["writer"], 0))


# Rows and lines -------------------------------------------------------------------------------------


def row(decision: dict[str, Any]) -> dict[str, str]:
    """A decision as a row of the table. Only emitted records show their type, because the event of the others
    says enough."""
    event: str = decision["event"]
    return {
        "time": moment(decision["decided_at"]),
        "event": f"{event} {decision['decision_type']}" if event == "emitted" else event.replace("_", " "),
        "outcome": _outcome(decision),
        "action": _action(decision),
        "incident": decision["incident_id"] or "",
        "scope": decision["scope_id"] or "",
        "decision": decision["decision_id"],
        "why": "; ".join(part for describe in WHY.get(event, (_reason,)) if (part := describe(decision))),
    }


def _outcome(decision: dict[str, Any]) -> str:
    """How an execution ended, which part of the gate refused, or the outcome of an emitted record. The event
    says the rest."""
    recorded: str = decision["decision_outcome"]
    match decision["event"]:
        case "settled" | "reconciled":
            return plain(decision["details"].get("outcome") or "").replace("_", " ")
        case "refused":
            return REFUSED_BY.get(recorded, recorded)
        case "emitted":
            return recorded.replace("_", " ")
        case _:
            return ""


REFUSED_BY = {"blocked": "by gate", "policy_blocked": "by policy", "policy_unavailable": "not decided"}


def _action(decision: dict[str, Any]) -> str:
    """The action; of a grant, all actions that the scope allows."""
    allowed = decision["details"].get("allowed_actions")
    return decision["action"] or (plain(allowed) if allowed else "")


# The "why" of a record: what each event says besides its columns. Any member of `details` may be masked; then
# the mask is shown.


def _reason(decision: dict[str, Any]) -> str | None:
    reason: str | None = decision["decision_reason"]
    return reason


def _line_of(decision: dict[str, Any]) -> str | None:
    """The method and the path of a request that no route lists; of a flood, the first ones."""
    inputs, subjects = decision["decision_inputs"], decision["details"].get("subjects")
    if "path" in inputs:
        return f"{plain(inputs.get('method'))} {plain(inputs['path'])}"
    return plain(subjects) if decision["event"] == "unlisted" and subjects else None


def _rules(decision: dict[str, Any]) -> str | None:
    rules = decision["details"].get("rules")
    return f"rules {plain(rules)}" if rules else None


def _would_refuse(decision: dict[str, Any]) -> str | None:
    """The shadow rules that would refuse; if the gate itself would refuse, its error."""
    found = decision["details"].get("would_refuse")
    if not isinstance(found, list):
        return f"would refuse: {plain(found)}" if found else None
    names = [(one.get("rule") or one.get("error")) if isinstance(one, dict) else one for one in found]
    return f"would refuse: {', '.join(plain(one) for one in names)}" if names else None


def _without_scope(decision: dict[str, Any]) -> str | None:
    return "without a scope" if decision["scope_id"] is None else None


def _cost(decision: dict[str, Any]) -> str | None:
    cost, overrun = decision["details"].get("cost_usd"), decision["details"].get("cost_overrun")
    if cost is None:
        return None
    amount = f"{dollars(cost)} USD" if is_number(cost) else plain(cost)
    return f"cost {amount}{' (overrun)' if overrun is True else ''}"


def _count(decision: dict[str, Any]) -> str | None:
    """The number of requests that the summary of a flood represents."""
    count = decision["details"].get("count")
    return f"{plain(count)} requests" if count is not None else None


def _switch(decision: dict[str, Any]) -> str | None:
    turned = decision["details"].get("on")
    position = plain(turned) if not isinstance(turned, bool) else "on" if turned else "off"
    return f"{plain(decision['decision_inputs'].get('policy_id'))} {position}"


def _frozen(decision: dict[str, Any]) -> str | None:
    from sidecar.core.freeze import describe

    return describe(decision["details"]["match"], decision["details"]["except"])


def _step(decision: dict[str, Any]) -> str | None:
    step = decision["details"].get("step_seconds")
    return f"{step:+.3f} s" if is_number(step) else None


def _principal(decision: dict[str, Any]) -> str | None:
    principal = decision["decision_inputs"].get("principal")
    return f"by {plain(principal)}" if principal not in (None, "anonymous") else None


def _other_principal(decision: dict[str, Any]) -> str | None:
    """The principal, if it is another one than the creator of the scope."""
    asked = decision["decision_inputs"].get("principal")
    return None if asked == decision["details"].get("created_by") else _principal(decision)


def _detail(name: str, text: str = "{}") -> Callable[[dict[str, Any]], str | None]:
    """A member of `details` in a text."""

    def describe(decision: dict[str, Any]) -> str | None:
        value = decision["details"].get(name)
        return text.format(plain(value)) if value else None

    return describe


WHY: Mapping[str, tuple[Callable[[dict[str, Any]], str | None], ...]] = {
    "issued": (_detail("intent"), _detail("created_by", "by {}"), _other_principal, _rules, _would_refuse),
    "admitted": (_without_scope, _would_refuse, _principal),
    "refused": (
        _reason,
        _line_of,
        _rules,
        _would_refuse,
        _count,
        _detail("intent", "intent: {}"),
        _principal,
    ),
    "replayed": (_detail("admission_id", "answer of {}"), _count, _principal),
    "settled": (_without_scope, _detail("cause"), _cost),
    "reconciled": (
        _detail("reconciled_because"),
        _detail("reconciled_by", "by {}"),
        _principal,
        _without_scope,
        _detail("cause"),
        _cost,
    ),
    "revoked": (_detail("cause"), _principal),
    "frozen": (_frozen, _detail("reason"), _principal),
    "unfrozen": (_frozen, _detail("reason"), _principal),
    "clock_accepted": (_step, _principal),
    "unlisted": (_line_of, _count, _principal),
    "switched": (_switch, _principal),
    "emitted": (_reason,),
}

_LINE = "{time}  {event:<10}  {outcome:<12}  {action:<15}  {incident:<12}  {scope:<14}  {decision}  {why}"
_BEGIN_OF_WHY = 20 + 2 + 10 + 2 + 12 + 2 + 15 + 2 + 12 + 2 + 14 + 2 + 36 + 2


def _line(row: dict[str, str]) -> str:
    return _LINE.format_map({name: cell(value) for name, value in row.items()}).rstrip()


def _described(decision: dict[str, Any]) -> Iterator[tuple[str, object]]:
    """The labelled lines of a decision."""
    yield "decision", decision["decision_id"]
    yield "time", when(decision["decided_at"])
    yield "recorded", when(decision.get("recorded_at"))
    shown = row(decision)
    yield "event", shown["event"]
    yield "outcome", shown["outcome"]
    yield "reason", decision["decision_reason"]
    yield "action", shown["action"]
    yield "record", f"type {decision['decision_type']}, outcome {decision['decision_outcome']}"
    for label in ("incident", "scope", "tenant", "request", "run", "workflow", "admission"):
        yield label, decision[f"{label}_id"]
    trigger, role = decision["decision_trigger"], decision["causal_role"]
    yield "source", f"{decision['decision_source']}, trigger {trigger}, role {role}"
    yield "log", f"record {decision['seq']} of writer {decision['writer']}, from the {decision['origin']}"
    yield "hash", decision["hash"]
    yield "previous", decision["previous_hash"]


listing(
    decisions,
    PATH,
    "decisions",
    answers.DecisionList,
    row,
    *FILTERS,
    since_option,
    help="List decisions, newest first. A decision is shown if all filters match.",
    examples="""\b
Examples:
  scopegate decisions list --config config/scopegate.yaml --event refused --limit 20
  scopegate decisions list --admin 127.0.0.1:9901 --action restart_pod --since 1h
  scopegate decisions list --admin 127.0.0.1:9901 --incident-id inc_123 --json""",
)
