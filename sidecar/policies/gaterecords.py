"""Reading the gate's records: the requests, the verdicts, and the reasons for missing facts.

Any member of a record's inputs and details may be masked. A masked fact is missing and is never guessed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import orjson

from sidecar.core.entries import OUTCOMES
from sidecar.core.facts import Claims
from sidecar.core.instant import parse_time
from sidecar.core.money import to_micros
from sidecar.core.principal import Principal
from sidecar.core.record import DecisionOutcome
from sidecar.core.rules import TERMS
from sidecar.core.scope import Execution, ExecutionStatus, Scope

MASKED = "masked"
# The fact that is missing if no member of the parameters is known.
ALL_PARAMETERS = "the parameters"
NOT_SAID = "not in the record"

# The missing facts by name, each with the reason.
Missing = dict[str, str]
# The result of replaying a record.
Kind = Literal["unchanged", "refused", "allowed", "otherwise", "lowered", "shadow", "undecidable"]

_MASK = re.compile(r"\[masked(:[0-9a-f]{16})?\]")
_BY_POLICY = frozenset(
    code for code, outcome in OUTCOMES.items() if outcome is DecisionOutcome.POLICY_BLOCKED
)
_STATUSES: Mapping[str, ExecutionStatus] = {status: status for status in get_args(ExecutionStatus)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A recorded or replayed verdict. If `error` is None, the request is allowed.

    `would_refuse` names the shadow objections, or is None if the record does not say. `lowered` holds the
    terms of a grant that are below the recorded ones, by their wire names.
    """

    error: str | None = None
    rules: tuple[str, ...] = ()
    would_refuse: tuple[str, ...] | None = ()
    lowered: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {
            "verdict": "allowed" if self.error is None else "refused",
            "error": self.error,
            "rules": self.rules,
            "would_refuse": self.would_refuse,
            "lowered": self.lowered,
        }

    def __str__(self) -> str:
        said = "allowed" if self.error is None else self.error
        if self.error is not None and self.rules:
            said += f" ({', '.join(self.rules)})"
        if self.lowered:
            said += " with " + ", ".join(f"{term} {value:.12g}" for term, value in self.lowered.items())
        return said + (f", in shadow: {', '.join(self.would_refuse)}" if self.would_refuse else "")


def objecting(shadow: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The rules of the shadow objections by policy, and the error code for an objection of the catalogue."""
    return tuple(sorted({one["rule"] or one["error"] for one in shadow if one["error"] in _BY_POLICY}))


@dataclass(frozen=True, slots=True, kw_only=True)
class GrantRequest:
    """The requested scope of a grant, its time to live and its default terms.

    The lowest value replaces a missing term. `recorded` holds the terms that the record has.
    """

    scope: Scope
    ttl_seconds: int
    defaulted: frozenset[str]
    recorded: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class GateRecord:
    """One record of the gate. `now` is the time of the decision, in microseconds since 1970.

    `asked_by` is the envelope's principal, None in records of releases that knew only `anonymous`.
    """

    event: str
    decision_id: str
    decided_at: str
    now: int
    tenant_id: str
    scope_id: str | None
    incident_id: str | None
    action: str | None
    admission_id: str | None
    outcome: str
    reason: str | None
    inputs: Mapping[str, Any]
    details: Mapping[str, Any]
    asked_by: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, envelope: bytes) -> GateRecord | None:
        """The record in an envelope, or None if it is not a record of the gate.

        Raises KeyError, TypeError or ValueError if no sidecar wrote the envelope.
        """
        read = orjson.loads(envelope)
        if read["event"] in ("emitted", "switched", "frozen", "unfrozen"):
            return None
        record = read["record"]
        return cls(
            event=read["event"],
            decision_id=record["decision_id"],
            decided_at=record["decided_at"],
            now=parse_time(record["decided_at"]),
            tenant_id=record["tenant_id"],
            scope_id=read["scope_id"],
            incident_id=read["incident_id"],
            action=read["action"],
            admission_id=read["admission_id"],
            outcome=record["decision_outcome"],
            reason=record["decision_reason"],
            inputs=dict(record["decision_inputs"]),
            details=dict(record["details"]),
            asked_by=read.get("principal"),
        )

    @property
    def of_grant(self) -> bool:
        return bool(self.inputs["policy_id"] == "scope_grant")

    @property
    def principal(self) -> Principal:
        principal = Principal(id=str(self.inputs["principal"]), tenant_id=self.tenant_id)
        if self.asked_by is None:
            return principal
        return replace(
            principal,
            kind=self.asked_by["kind"],
            groups=tuple(map(str, self.inputs.get("principal_groups", ()))),
            method=self.asked_by["method"],
        )

    @property
    def count(self) -> int:
        """The number of requests that the record covers, which is above one for the summary of a flood."""
        return int(self.details.get("count", 1))

    @property
    def depends_on_policies(self) -> bool:
        """Whether another policy set could have decided differently."""
        if self.event == "refused":
            # The record of a refused grant has terms only if policies judged it. If the ceiling is below a
            # hold, its outcome is that of a wrong term.
            judged = self.of_grant and "allowed_actions" in self.details
            return judged or self.outcome == DecisionOutcome.POLICY_BLOCKED.value
        # An admission without a hold passed a shadow route unread, so no policy judged it.
        return self.event == "issued" or (self.event == "admitted" and "hold_usd" in self.details)

    @property
    def verdict(self) -> Verdict:
        shadow = self.details.get("would_refuse", [])
        return Verdict(
            error=(self.reason or "refused") if self.event == "refused" else None,
            rules=tuple(self.details.get("rules", ())),
            would_refuse=None if masked(shadow) else objecting(shadow),
        )

    @property
    def ended(self) -> ExecutionStatus | None:
        """The ending of an execution, or None if it is masked."""
        return _STATUSES.get(str(self.details.get("outcome")))

    @property
    def judged_at(self) -> int | None:
        """The time when the conditions were judged, or None if the record has no separate time."""
        time = self.details.get("judged_at")
        return None if time is None or masked(time) else parse_time(time)

    def claims(self) -> tuple[Claims, Missing]:
        """The claims of the request. For masked target agents, the mask itself stands in the claims.

        If only some parameters are masked, each of them is missing as `parameters.name`.
        """
        missing: Missing = {}
        agents, parameters = self.inputs.get("target_agents", []), self.inputs.get("parameters", {})
        if masked(agents):
            missing["target_agents"] = MASKED
        if "parameters_left_out" in self.inputs:
            why = "left out of the record, for the body was large"
            missing |= {"parameters": why, ALL_PARAMETERS: why}
        elif not isinstance(parameters, dict):
            missing |= {"parameters": MASKED, ALL_PARAMETERS: MASKED}
        elif masked(parameters):
            missing["parameters"] = MASKED
            missing |= {f"parameters.{name}": MASKED for name, value in parameters.items() if masked(value)}
        claims = Claims(
            scope_id=self.scope_id,
            incident_id=self.incident_id,
            action=self.action,
            parameters={} if ALL_PARAMETERS in missing else parameters,
            target_agents=tuple(agents if isinstance(agents, list) else [agents]),
        )
        return claims, missing

    def execution(self, status: ExecutionStatus) -> Execution:
        """The execution of the record, with the fields that brakes read."""
        claims, _ = self.claims()
        return Execution(
            decision_id=self.decision_id,
            scope_id=self.scope_id,
            tenant_id=self.tenant_id,
            incident_id=self.incident_id or "",
            action=self.action or "",
            request_id="",
            attempt_number=None,
            hold=0,
            admitted_at=self.now,
            principal=self.principal.id,
            principal_kind=self.principal.kind,
            principal_method=self.principal.method,
            principal_groups=self.principal.groups,
            target_agents=claims.target_agents,
            status=status,
        )

    def grant_request(self) -> tuple[GrantRequest, Missing]:
        """The requested grant, and its missing facts."""
        claims, missing = self.claims()
        details = self.details
        actions, intent, defaulted = (
            details.get(name) for name in ("allowed_actions", "intent", "defaulted")
        )
        if not isinstance(actions, list) or masked(actions):
            missing["allowed_actions"] = MASKED if masked(actions) else NOT_SAID
        attempts, ttl, dollars = (_number(details.get(term)) for term in TERMS)
        if not isinstance(intent, str) or masked(intent):
            missing["intent"] = MASKED if masked(intent) else NOT_SAID
        for term, fact, value in (
            ("max_attempts", "attempts_remaining", attempts),
            ("ttl_seconds", None, ttl),
            ("max_cost_usd", "max_cost_micros", dollars),
        ):
            chosen = isinstance(defaulted, list) and term not in defaulted
            if not isinstance(defaulted, list) or masked(defaulted):
                missing[term] = f"not judged, because whether the request named it is {NOT_SAID}"
            elif value is None and chosen:
                missing[term] = MASKED
            if fact is not None and value is None:
                missing[fact] = MASKED
            elif fact is not None and self.event == "issued" and self.details.get("rules") and not chosen:
                missing[fact] = "recorded as it was lowered, not as it was requested"
        scope = Scope(
            scope_id=self.scope_id or "",
            tenant_id=self.tenant_id,
            incident_id=self.incident_id or "",
            allowed_actions=tuple(actions) if isinstance(actions, list) else (),
            max_cost=0 if dollars is None else to_micros(dollars),
            max_attempts=1 if attempts is None else int(attempts),
            created_at=self.now,
            expires_at=self.now,
            intent="" if "intent" in missing else str(intent),
            target_agents=claims.target_agents,
            created_by=self.principal.id,
            issuer_kind=self.principal.kind,
            issuer_method=self.principal.method,
        )
        recorded = zip(TERMS, (attempts, ttl, dollars), strict=True)
        request = GrantRequest(
            scope=scope,
            ttl_seconds=1 if ttl is None else int(ttl),
            defaulted=frozenset(defaulted if isinstance(defaulted, list) else TERMS),
            recorded={term: value for term, value in recorded if value is not None},
        )
        return request, missing


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One record that was decided again. If `now` is None, it is undecidable, and `why` gives the reason.

    The summary of a flood covers `count` requests.
    """

    record: GateRecord
    recorded: Verdict
    now: Verdict | None
    why: str | None = None

    @property
    def count(self) -> int:
        return self.record.count

    @property
    def what(self) -> str:
        return "grant" if self.record.of_grant else "execute"

    @property
    def action(self) -> str | None:
        """The action of an execution, or all actions of a grant."""
        allowed = self.record.details.get("allowed_actions")
        return ",".join(map(str, allowed)) if isinstance(allowed, list) else self.record.action

    @property
    def kind(self) -> Kind:
        was, now = self.recorded, self.now
        if now is None:
            return "undecidable"
        if (was.error is None) != (now.error is None):
            return "refused" if was.error is None else "allowed"
        known = was.would_refuse is not None and now.would_refuse is not None
        if now.error is not None:
            by_another = (was.error != now.error and not masked(was.error)) or set(was.rules) != set(
                now.rules
            )
            # A rule that could not be judged may have refused as well.
            return "otherwise" if by_another and now.would_refuse is not None else "unchanged"
        if now.lowered:
            return "lowered"
        return "shadow" if known and was.would_refuse != now.would_refuse else "unchanged"

    def to_dict(self) -> dict[str, Any]:
        record = self.record
        return {
            "decision_id": record.decision_id,
            "decided_at": record.decided_at,
            "what": self.what,
            "action": self.action,
            "incident_id": record.incident_id,
            "count": self.count,
            "change": self.kind,
            "recorded": self.recorded.to_dict(),
            "now": None if self.now is None else self.now.to_dict(),
            "why": self.why,
        }


def masked(value: Any) -> bool:
    """Whether a value contains a mask at any depth."""
    match value:
        case str():
            return _MASK.fullmatch(value) is not None
        case dict():
            return any(map(masked, value.values()))
        case list():
            return any(map(masked, value))
        case _:
            return False


def _number(value: Any) -> float | None:
    """A number of a record, or None if it is masked or absent."""
    return None if isinstance(value, bool) or not isinstance(value, int | float) else value
