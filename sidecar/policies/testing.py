"""Policy tests: cases in `policies/tests/*.yaml` that state the expected decisions of the gate.

The core decides a case as it decides a request: the facts of the case become a command and its rows, and
`apply` decides. If one file has a mistake, no case runs, because a silently skipped case looks like a passing
one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, model_validator

from sidecar.core.apply import apply
from sidecar.core.brakes import AdmissionGroup, groups_containing
from sidecar.core.command import Admit, Denied, Issue
from sidecar.core.facts import Claims
from sidecar.core.instant import SECOND, parse_time
from sidecar.core.policy import PolicySet
from sidecar.core.principal import ANONYMOUS_ID, Principal, PrincipalKind
from sidecar.core.roles import Role, role_required
from sidecar.core.rules import TERMS
from sidecar.core.scope import Execution, ExecutionStatus, Scope
from sidecar.core.state import State
from sidecar.errors import ERRORS, Refusal
from sidecar.files.faults import ConfigurationError, Fault
from sidecar.files.yamlfile import Document, KeyPath, contents, did_you_mean, in_order, survey
from sidecar.settings.faults import Mistake, faults, one_of, refuse, validated
from sidecar.settings.keys import Section
from sidecar.settings.numbers import Dollars, whole, whole_seconds
from sidecar.settings.values import (
    LIST,
    NOT_EMPTY,
    Identifier,
    Identifiers,
    Text,
)

FOLDER = "tests"

# The defaults of a case. Money is in micro-dollars.
NOW = "2026-01-01T12:00:00Z"
INTENT = "A policy test that does not say why it asks, in words enough for most rules."
TTL_SECONDS, CEILING = 300, 500_000

_SCOPE_ID, _DECISION_ID = "scope_test", "the decision of this test"

# The file format ----------------------------------------------------------------------------------------


def _instant(value: object) -> int:
    """Microseconds since 1970."""
    try:
        return parse_time(str(value))
    except ValueError as exc:
        raise ValueError(f"expects a time with its offset in ISO 8601, such as {NOW}") from exc


def _code(value: object) -> str:
    if value not in ERRORS:
        near = did_you_mean(value, tuple(ERRORS)) if isinstance(value, str) else ""
        raise ValueError(f"is not an error code{near}")
    return str(value)


Natural = Annotated[int, whole(0, 1_000_000_000)]
Positive = Annotated[int, whole(1, 1_000_000_000)]
Ago = Annotated[int, whole_seconds(0, 1_000_000_000)]
Lasting = Annotated[int, whole_seconds(1, 1_000_000_000)]


class CaseFile(Section):
    """One file. Its cases are validated one by one."""

    example = "{tests: [...]}"

    tests: Annotated[list[Any], NOT_EMPTY]


class ScopeFacts(Section):
    """The scope of an execution. An omitted member gets a value that allows the execution."""

    intent: Text = INTENT
    max_attempts: Positive | None = None
    attempts_used: Natural = 0
    max_cost_usd: Dollars | None = None
    age_seconds: Ago = 0
    issuer: Identifier = "issuer_test"


class Who(Section):
    incident_id: Identifier = "inc_test"
    tenant_id: Identifier = "default"
    principal: Identifier = ANONYMOUS_ID
    principal_kind: PrincipalKind = "service"
    principal_groups: Identifiers = ()
    target_agents: Identifiers = ()

    @property
    def asking(self) -> Principal:
        """The principal of the facts. It does not matter which method has established it."""
        return Principal(
            id=self.principal,
            kind=self.principal_kind,
            groups=self.principal_groups,
            tenant_id=self.tenant_id,
            method="none" if self.principal == ANONYMOUS_ID else "tokens",
        )


class GrantFacts(Who):
    """A requested grant. Omitted terms are the defaults, which policies may lower."""

    action: Identifiers = ()
    actions: Identifiers = ()
    intent: Text = INTENT
    max_attempts: Positive = 1
    ttl_seconds: Lasting = TTL_SECONDS
    max_cost_usd: Dollars = CEILING

    @model_validator(mode="after")
    def _one_of_the_two(self) -> GrantFacts:
        message = "is required, or actions as a list; give one of the two"
        refuse((bool(self.action) == bool(self.actions), ("action",), message))
        return self


class ExecutionFacts(Who):
    action: Identifier
    parameters: dict[str, Any] = Field(default_factory=dict)
    scope: ScopeFacts = ScopeFacts()


class Before(Who):
    """An earlier execution. An omitted member has the value of the facts."""

    seconds_ago: Ago
    status: ExecutionStatus = "answered"
    action: Identifier = ""


class Wanted(Section):
    """The expected decision. Only the members that are given are compared."""

    verdict: Literal["allowed", "refused"]
    error: Annotated[str | None, PlainValidator(_code)] = None
    rules: Identifiers = ()
    would_refuse: Identifiers = ()

    @model_validator(mode="after")
    def _of_the_verdict(self) -> Wanted:
        only = {"error": "refused", "retry_after_seconds": "refused", **dict.fromkeys(TERMS, "allowed")}
        refuse(
            *(
                (verdict != self.verdict, (name,), f"applies only if the verdict is {verdict}; remove it")
                for name, verdict in only.items()
                if name in self.model_fields_set
            )
        )
        return self


class WantedGrant(Wanted):
    max_attempts: Positive | None = None
    ttl_seconds: Lasting | None = None
    max_cost_usd: Dollars = 0


class WantedExecution(Wanted):
    retry_after_seconds: Lasting | None = None


class Case(Section):
    example = "{name: ..., on: execute, facts: {...}, want: {...}}"

    name: Identifier
    now: Annotated[int, PlainValidator(_instant)] = _instant(NOW)


class GrantCase(Case):
    on: Literal["issue"]
    facts: GrantFacts
    want: WantedGrant

    def command(self, policies: PolicySet) -> tuple[Issue, State]:
        facts = self.facts
        scope = Scope(
            scope_id=_SCOPE_ID,
            tenant_id=facts.tenant_id,
            incident_id=facts.incident_id,
            allowed_actions=tuple(dict.fromkeys(facts.action or facts.actions)),
            max_cost=facts.max_cost_usd,
            max_attempts=facts.max_attempts,
            created_at=0,
            expires_at=0,
            intent=facts.intent,
            target_agents=facts.target_agents,
            created_by=facts.principal,
        )
        issue = Issue(
            decision_id=_DECISION_ID,
            scope=scope,
            ttl=facts.ttl_seconds,
            policies=policies,
            defaulted=frozenset(TERMS) - facts.model_fields_set,
            principal=facts.asking,
        )
        return issue, State()


class ExecutionCase(Case):
    on: Literal["execute"]
    facts: ExecutionFacts
    history: Annotated[tuple[Before, ...], LIST] = ()
    want: WantedExecution

    def command(self, policies: PolicySet) -> tuple[Admit, State]:
        facts = self.facts
        claims = Claims(
            scope_id=_SCOPE_ID,
            incident_id=facts.incident_id,
            action=facts.action,
            parameters=facts.parameters,
            target_agents=facts.target_agents,
        )
        admit = Admit(
            decision_id=_DECISION_ID,
            claims=claims,
            policies=policies,
            tenant_id=facts.tenant_id,
            principal=facts.asking,
        )
        before = sorted(map(self._before, range(len(self.history))), key=lambda one: one.admitted_at)
        executions = {one.decision_id: one for one in before}
        admissions: dict[AdmissionGroup, list[str]] = {}
        for execution in executions.values():
            for group in groups_containing(execution):
                admissions.setdefault(group, []).append(execution.decision_id)
        scopes = {_SCOPE_ID: self._scope(policies)}
        return admit, State(scopes=scopes, executions=executions, admissions=admissions)

    def _scope(self, policies: PolicySet) -> Scope:
        facts, given = self.facts, self.facts.scope
        entry = policies.action(facts.action)
        room = max(CEILING, entry.hold) if entry else CEILING
        return Scope(
            scope_id=_SCOPE_ID,
            tenant_id=facts.tenant_id,
            incident_id=facts.incident_id,
            allowed_actions=(facts.action,),
            max_cost=room if given.max_cost_usd is None else given.max_cost_usd,
            max_attempts=given.max_attempts or given.attempts_used + 1,
            created_at=self.now - given.age_seconds * SECOND,
            expires_at=self.now + TTL_SECONDS * SECOND,
            intent=given.intent,
            target_agents=facts.target_agents,
            created_by=given.issuer,
            issuer_method="none" if given.issuer == ANONYMOUS_ID else "tokens",
            attempts_used=given.attempts_used,
        )

    def _before(self, index: int) -> Execution:
        past = self.history[index]
        about = {"action", *Who.model_fields}
        return Execution(
            decision_id=f"history[{index}]",
            scope_id=_SCOPE_ID,
            request_id="",
            attempt_number=None,
            hold=0,
            admitted_at=self.now - past.seconds_ago * SECOND,
            status=past.status,
            **(self.facts.model_dump(include=about) | past.model_dump(include=about, exclude_unset=True)),
        )


class RoleFacts(Who):
    role: Role


class WantedRole(Section):
    """Whether the principal holds the role."""

    verdict: Literal["allowed", "refused"]


class RoleCase(Case):
    on: Literal["role"]
    facts: RoleFacts
    want: WantedRole


# Deciding -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyTest:
    """One case and its place in a file."""

    case: GrantCase | ExecutionCase | RoleCase
    document: Document
    path: KeyPath


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The gate's answer: the message of a refusal, and every difference from the expected decision."""

    message: str | None
    differences: tuple[Fault, ...]


def run(test: PolicyTest, policies: PolicySet) -> Outcome:
    """Decide one case."""
    case = test.case
    if isinstance(case, RoleCase):
        role = case.facts.role
        refusal = (
            None if policies.roles.hold(case.facts.asking, role) else role_required(case.facts.asking, role)
        )
        got: dict[str, Any] = {"verdict": "refused" if refusal else "allowed"}
        return _compared(test, got, refusal)
    command, state = case.command(policies)
    applied = apply(command, state, case.now)
    assert applied.entry is not None
    details = applied.entry.record.details
    refusal = applied.reply.refusal if isinstance(applied.reply, Denied) else None
    got = {
        "verdict": "refused" if refusal else "allowed",
        "error": refusal.code if refusal else None,
        "rules": details["rules"],
        "would_refuse": [one["rule"] for one in details.get("would_refuse", ())],
        "retry_after_seconds": refusal.members.get("retry_after_seconds") if refusal else None,
        **{term: details.get(term) for term in TERMS},
    }
    return _compared(test, got, refusal)


def _compared(test: PolicyTest, got: dict[str, Any], refusal: Refusal | None) -> Outcome:
    differences = []
    for name, value in test.case.want.model_dump(exclude_unset=True).items():
        want = _shown(value)
        was = _shown(got[name])
        if want != was:
            place = test.document.place((*test.path, "want", name))
            differences.append(Fault(place, f"want.{name}", f"wanted {want}, got {was}"))
    message = f"{refusal.code}: {refusal.message}" if refusal else None
    return Outcome(message=message, differences=tuple(differences))


def _shown(value: Any) -> str:
    """A value as text. Rules are sorted, because their order has no meaning."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(sorted(set(value)))}]"
    return "none" if value is None else f"{value:.12g}" if isinstance(value, float) else str(value)


# Reading ------------------------------------------------------------------------------------------------


def read(folder: Path) -> list[PolicyTest]:
    """The cases of a policies folder, file by file. Raises ConfigurationError with every fault."""
    tests: list[PolicyTest] = []
    found: list[Fault] = []
    files = sorted(path for path in (folder / FOLDER).glob("[!.]*") if path.suffix in (".yaml", ".yml"))
    if not files:
        found.append(Fault(str(folder / FOLDER), "", "contains no *.yaml file; put one with tests: there"))
    for path in files:
        try:
            document, broken = survey(contents(path), str(path))
        except ConfigurationError as exc:
            found += exc.faults
            continue
        found += broken
        if document is not None:
            tests += _tests(document, found)
    if found:
        raise ConfigurationError(in_order(found))
    return tests


def _tests(document: Document, found: list[Fault]) -> Iterator[PolicyTest]:
    """The cases of one file. Faults go to `found`."""
    top = {} if document.value is None else document.value
    _, mistakes = validated(CaseFile, top)
    found += faults(document, mistakes)
    entries = top.get("tests") if isinstance(top, dict) else None
    names: dict[str, str] = {}
    for index, entry in enumerate(entries if isinstance(entries, list) else ()):
        path: KeyPath = ("tests", index)
        case, mistakes = _case(entry)
        if case is not None:
            if case.name in names:
                message = f"is already at {names[case.name]}; give it its own name"
                mistakes.append(Mistake(("name",), message))
            names.setdefault(case.name, document.place((*path, "name")))
            yield PolicyTest(case=case, document=document, path=path)
        found += faults(document, mistakes, path)


def _case(entry: Any) -> tuple[GrantCase | ExecutionCase | RoleCase | None, list[Mistake]]:
    kinds: dict[str, type[GrantCase | ExecutionCase | RoleCase]] = {
        "issue": GrantCase,
        "execute": ExecutionCase,
        "role": RoleCase,
    }
    on = entry.get("on") if isinstance(entry, dict) else "execute"
    if on not in tuple(kinds):
        return None, [Mistake(("on",), one_of(tuple(kinds), on))]
    return validated(kinds[on], entry)
