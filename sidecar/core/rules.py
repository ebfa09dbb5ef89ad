"""How the rules of a policy set judge one request. No clock, no I/O.

A request is judged in two steps. `preview` judges the facts of the request itself, before the store's writer
takes it. The second step runs inside the transaction, because only the writer knows the scope and the earlier
executions. A caller that skips `preview` gets the same answer from the second step alone.

Almost always no rule objects, so nothing is made for a rule that has nothing to say: rules are selected,
their conditions judged and their executions counted together. Only if these steps leave a doubt, each rule is
judged on its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any, NamedTuple

from sidecar.core.facts import Claims
from sidecar.core.instant import SECOND
from sidecar.core.money import to_dollars
from sidecar.core.policy import Bundle, Conditional, Phase, PolicySet, Require, Rule, Subject
from sidecar.core.principal import ANONYMOUS_ID, Principal
from sidecar.core.scope import Scope
from sidecar.core.wording import visible_chars
from sidecar.errors import ConditionFailed, Refusal

# The number of further rules that a message names. The member `rules` lists all of them.
SHOWN_RULES = 5


class Conditions(NamedTuple):
    """The rules whose condition holds, and those whose condition could not be judged, each with the reason.

    A rule whose condition could not be judged refuses the request.
    """

    holding: Sequence[Rule] = ()
    failed: Sequence[tuple[Rule, str]] = ()


class Preview(NamedTuple):
    """The rules that match a request, as known at `judged_at`.

    `early` are the results of the conditions on the request itself. `conditional` is true if there is such a
    condition, whether or not it holds.
    """

    judged_at: int
    bundles: tuple[Bundle, ...]
    early: Conditions = Conditions()
    conditional: bool = False


@dataclass(frozen=True, slots=True)
class Objection:
    """A refusal by one rule. Without a `rule_id`, it comes from the catalogue or a bound.

    An objection with `shadow` is only recorded. `until` is the end of a brake (microseconds since 1970).
    """

    refusal: Refusal
    rule_id: str | None
    shadow: bool = False
    until: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """The objection as records and explanations show it."""
        members = {name: value for name, value in self.refusal.members.items() if name != "rules"}
        return {
            "rule": self.rule_id,
            "error": self.refusal.code,
            "message": self.refusal.message,
            **members,
        }


def subject_of(
    claims: Claims,
    tenant_id: str,
    principal: Principal,
    policies: PolicySet,
    now: int,
    scope: Scope | None = None,
) -> Subject:
    """The facts of an execution that the rules read. Without `scope`, only those of the request are set."""
    action = claims.action or ""
    entry = policies.action(action)
    subject = Subject(
        action=action,
        risk=None if entry is None else entry.risk,
        incident_id=claims.incident_id or "",
        tenant_id=tenant_id,
        principal=principal.id,
        principal_kind=principal.kind,
        principal_groups=principal.groups,
        target_agents=claims.target_agents,
        parameters=claims.parameters,
        now=now,
    )
    if scope is not None:
        subject.intent = scope.intent
        subject.max_cost = scope.max_cost
        subject.attempts_used = scope.attempts_used
        subject.attempts_remaining = scope.attempts_remaining
        subject.scope_age_seconds = max(0, now - scope.created_at) // SECOND
        subject.issuer = scope.proven_issuer
    return subject


def previewed(claims: Claims, tenant_id: str, principal: Principal, policies: PolicySet, now: int) -> Preview:
    """As `preview` of an execution. It makes no subject if the action alone decides which rules apply."""
    bundles = policies.selected_by_action("execute", claims.action or "")
    if bundles is not None:
        return Preview(now, bundles)
    return preview(policies, "execute", subject_of(claims, tenant_id, principal, policies, now))


def preview(
    policies: PolicySet, phase: Phase, subject: Subject, asked_once: dict[str, bool | str] | None = None
) -> Preview:
    """The rules that match a request. Conditions that read the scope of an execution are deferred.

    `asked_once` caches the results of conditions that do not read the action or its risk. A grant of several
    actions therefore judges such a condition once.
    """
    bundles = policies.selected(phase, subject)
    groups = [group for bundle in bundles for group in bundle.early]
    if not groups:
        return Preview(subject.now, bundles)
    return Preview(subject.now, bundles, judged(groups, subject, asked_once), conditional=True)


def judged(
    groups: Iterable[Conditional], subject: Subject, asked_once: dict[str, bool | str] | None = None
) -> Conditions:
    """The results of conditions. `asked_once` has the same meaning as in `preview`."""
    holding: list[Rule] = []
    failed: list[tuple[Rule, str]] = []
    for rules, joint in groups:
        if joint is not None:
            try:
                results = joint(subject)
            except ConditionFailed:
                pass  # the loop below finds out which of them fails
            else:
                if True in results:
                    holding += compress(rules, results)
                continue
        for rule in rules:
            found = _holds(rule, subject, asked_once)
            if isinstance(found, str):
                failed.append((rule, found))
            elif found:
                holding.append(rule)
    return Conditions(holding, failed)


def _holds(rule: Rule, subject: Subject, asked_once: dict[str, bool | str] | None) -> bool | str:
    """Whether the condition of a rule holds, or why it could not be judged."""
    assert rule.when is not None
    once = asked_once is not None and rule.when.reads.isdisjoint(("action", "risk"))
    if asked_once is not None and once and rule.id in asked_once:
        return asked_once[rule.id]
    found: bool | str
    try:
        found = rule.when(subject)
    except ConditionFailed as exc:
        found = str(exc)
    if asked_once is not None and once:
        asked_once[rule.id] = found
    return found


# Objections ---------------------------------------------------------------------------------------------


def unjudged(rule: Rule, failure: str) -> Objection:
    """The objection of a rule whose condition could not be judged."""
    return _denied(rule, f"The condition could not be judged: {failure}", condition_error=failure)


def objections(rule: Rule, subject: Subject) -> Iterator[Objection]:
    """The objections of one applying rule to a request, except those of its limits and brakes."""
    if rule.deny:
        yield _denied(rule, "The rule denies it.")
    if rule.require is not None and not satisfies(subject, rule.require):
        wanted = rule.require.intent_min_chars
        if visible_chars(subject.intent) < wanted:
            yield _denied(
                rule,
                f"The intent must have at least {wanted} visible characters.",
                require="intent_min_chars",
            )
        if rule.require.target_agents and not subject.target_agents:
            yield _denied(rule, "Target agents must be named.", require="target_agents")
        if not _other_than_issuer(subject, rule.require):
            yield _denied(
                rule,
                "Another principal than the issuer of the scope must execute it.",
                require="executor_is_not_issuer",
            )
        if not _is_issuer(subject, rule.require):
            yield _denied(rule, "The issuer of the scope must execute it.", require="executor_is_issuer")


def satisfies(subject: Subject, require: Require) -> bool:
    return (
        (not require.target_agents or bool(subject.target_agents))
        and (not require.intent_min_chars or visible_chars(subject.intent) >= require.intent_min_chars)
        and _other_than_issuer(subject, require)
        and _is_issuer(subject, require)
    )


def _other_than_issuer(subject: Subject, require: Require) -> bool:
    """Both must be known: a caller that presents nothing may be the issuer."""
    return not require.executor_is_not_issuer or (
        subject.issuer not in (None, subject.principal) and subject.principal != ANONYMOUS_ID
    )


def _is_issuer(subject: Subject, require: Require) -> bool:
    return not require.executor_is_issuer or subject.issuer == subject.principal


def _denied(rule: Rule, what: str, **members: Any) -> Objection:
    refusal = Refusal("policy_denied", _because(rule, what), {"rules": [rule.id], **members})
    return Objection(refusal, rule.id, rule.shadow)


def _because(rule: Rule, what: str) -> str:
    return f"{what} {rule.id}: {rule.reason}" if rule.reason else f"{what} (rule {rule.id})"


def braked(rule: Rule, why: str, until: int | None, now: int, ends_at: str | None) -> Objection:
    """The objection of a brake, with the number of seconds to wait before a retry."""
    seconds = 1 if until is None else max(1, -((now - until) // SECOND))
    members = {"rules": [rule.id], "retry_after_seconds": seconds, "ends_at": ends_at}
    return Objection(Refusal("braked", _because(rule, why), members), rule.id, rule.shadow, until)


def refusal_by(found: Iterable[Objection]) -> Refusal | None:
    """The refusal that all enforced objections lead to. Any of them refuses, and their order does not matter.

    A denial precedes a brake, because waiting does not help against a denial. Of several brakes the longest
    counts, of several limits the strictest.
    """
    counting = in_order(one for one in found if not one.shadow)
    if not counting:
        return None
    first = counting[0].refusal
    alike = [one for one in counting if one.refusal.code == first.code]
    rules = sorted({one.rule_id for one in alike if one.rule_id is not None})
    others = [rule_id for rule_id in rules if rule_id != counting[0].rule_id]
    also = f" Refused by {', '.join(others[:SHOWN_RULES])} as well." if others else ""
    return Refusal(first.code, first.message + also, {**first.members, "rules": rules})


def in_order(found: Iterable[Objection]) -> list[Objection]:
    """The objections in order of importance, independent of the order of the rules."""

    def rank(one: Objection) -> tuple[bool, bool, int, int, float, str]:
        limit = one.refusal.members.get("limit")
        return (
            one.rule_id is not None,
            one.refusal.code != "policy_denied",
            -(one.until or 0),
            -1 if limit is None else TERMS.index(limit),
            0 if limit is None else one.refusal.members["value"],
            one.rule_id or "",
        )

    return sorted(found, key=rank)


# Grants -------------------------------------------------------------------------------------------------

# The wire names of the scope terms that a rule may limit.
TERMS = ("max_attempts", "ttl_seconds", "max_cost_usd")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScopeTerms:
    """One value for each term of a scope. Money is in micro-dollars."""

    max_attempts: int
    ttl_seconds: int
    max_cost: int

    def named(self, term: str) -> int:
        return {
            "max_attempts": self.max_attempts,
            "ttl_seconds": self.ttl_seconds,
            "max_cost_usd": self.max_cost,
        }[term]


@dataclass(frozen=True, slots=True)
class GrantJudgment:
    """The terms that the policies allow, the rules that lowered each term, and every objection.

    `judged_at` is the time of the judgment. `conditional` has the same meaning as in `Preview`.
    """

    terms: ScopeTerms
    lowered: Mapping[str, tuple[str, ...]]
    objections: tuple[Objection, ...]
    judged_at: int = 0
    conditional: bool = False

    @property
    def lowered_by(self) -> list[str]:
        """The rules that lowered a term."""
        return sorted({rule_id for rule_ids in self.lowered.values() for rule_id in rule_ids})


def granting(
    policies: PolicySet, subjects: Sequence[Subject], requested: ScopeTerms, defaulted: frozenset[str]
) -> GrantJudgment:
    """Judge a grant by the policies. `subjects` holds one subject for each action of the grant.

    A default term above a limit is lowered to the limit. A requested term above a limit is refused.
    """
    found: dict[tuple[str, str], Objection] = {}
    conditional = False
    asked_once: dict[str, bool | str] = {}
    limits: dict[str, dict[str, int]] = {term: {} for term in TERMS}
    for subject in subjects:
        known = preview(policies, "issue", subject, asked_once)
        conditional |= known.conditional
        for rule, failure in known.early.failed:
            found.setdefault((rule.id, failure), unjudged(rule, failure))
        standing = [rule for bundle in known.bundles for rule in bundle.standing]
        for rule in (*standing, *known.early.holding):
            for objection in objections(rule, subject):
                found.setdefault((rule.id, objection.refusal.message), objection)
            if rule.limit is None:
                continue
            for term, most in zip(
                TERMS, (rule.limit.max_attempts, rule.limit.ttl_seconds, rule.limit.max_cost), strict=True
            ):
                if most is None or requested.named(term) <= most:
                    continue
                if term not in defaulted:
                    found.setdefault((rule.id, term), _above(rule, term, most))
                elif not rule.shadow:
                    limits[term][rule.id] = most
    lowered = {term: min(by.values()) for term, by in limits.items() if by}
    lowered_by = {
        term: tuple(sorted(rule_id for rule_id, most in by.items() if most == lowered[term]))
        for term, by in limits.items()
        if by
    }
    terms = ScopeTerms(
        max_attempts=lowered.get("max_attempts", requested.max_attempts),
        ttl_seconds=lowered.get("ttl_seconds", requested.ttl_seconds),
        max_cost=lowered.get("max_cost_usd", requested.max_cost),
    )
    judged_at = subjects[0].now if subjects else 0
    return GrantJudgment(terms, lowered_by, tuple(in_order(found.values())), judged_at, conditional)


def _above(rule: Rule, term: str, most: int) -> Objection:
    shown = to_dollars(most) if term == "max_cost_usd" else most
    return _denied(rule, f"{term} may be at most {shown:.12g}.", limit=term, value=shown)
