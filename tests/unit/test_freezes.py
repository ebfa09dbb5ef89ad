"""Freezes: what they match, where they stand among the other checks, and the records that they leave."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.core.applied import Applied
from sidecar.core.apply import apply, judgment
from sidecar.core.command import (
    Admit,
    Admitted,
    Denied,
    FreezeLifted,
    FreezeSet,
    LiftFreeze,
    Recorded,
    Refuse,
    Replayed,
    SetFreeze,
)
from sidecar.core.facts import Claims
from sidecar.core.freeze import FACTS, MAX_IN_FORCE, Executing, Freeze, Pattern, describe, frozen
from sidecar.core.idempotency import Claim, Claimed, KeptAnswer
from sidecar.core.instant import SECOND, iso_time
from sidecar.core.policy import ActionPolicy, PolicySet, RiskClass
from sidecar.core.principal import ANONYMOUS, Principal
from sidecar.core.scope import Execution, Scope
from sidecar.core.state import State
from sidecar.errors import Refusal

NOW = 1_800_000_000 * SECOND
ANNA = Principal(id="anna", kind="human", groups=("oncall", "commanders"), method="tokens")
BOT = Principal(id="bot-7", kind="agent", groups=("bots",), method="tokens")
CLAIMS = Claims(scope_id="scope_1", incident_id="inc_1", action="restart_pod", target_agents=("db-1", "db-2"))
POLICIES = PolicySet(
    revision="r",
    actions={"restart_pod": ActionPolicy(risk=RiskClass.HIGH), "look": ActionPolicy(risk=RiskClass.LOW)},
)
SCOPE = Scope(
    scope_id="scope_1",
    tenant_id="default",
    incident_id="inc_1",
    allowed_actions=("restart_pod",),
    max_cost=500_000,
    max_attempts=2,
    created_at=NOW - SECOND,
    expires_at=NOW + 300 * SECOND,
    intent="a test",
    target_agents=(),
    created_by="oncall",
)


def freeze(match: Pattern | None = None, freeze_id: str = "f-1", **more: Any) -> Freeze:
    made = Freeze(
        freeze_id=freeze_id,
        tenant_id="default",
        match=match or {},
        excepted={},
        reason="the primary is split",
        set_at=NOW - SECOND,
        set_by="anna",
    )
    return replace(made, **more)


def executing(**more: Any) -> Executing:
    made = Executing(claims=CLAIMS, tenant_id="default", principal=BOT, route="restart", risk=RiskClass.HIGH)
    return replace(made, **more)


def stops(found: Freeze, given: Executing | None = None) -> bool:
    return frozen([found], given or executing(), NOW) is not None


# What a freeze matches ---------------------------------------------------------------------------------

VALUES = {
    "action": "restart_pod",
    "risk": "high",
    "incident_id": "inc_1",
    "tenant_id": "default",
    "principal": "bot-7",
    "principal_kind": "agent",
    "principal_group": "bots",
    "target_agents": "db-2",
    "route": "restart",
}


def test_a_freeze_without_facts_stops_everything() -> None:
    assert stops(freeze())
    assert stops(freeze(), executing(claims=Claims(), principal=ANONYMOUS, route=None, risk=None))


@pytest.mark.parametrize("fact", FACTS)
def test_a_fact_is_matched_by_its_value_a_glob_or_one_of_a_list(fact: str) -> None:
    value = VALUES[fact]
    assert set(VALUES) == set(FACTS)
    for globs in ((value,), (f"{value[:2]}*",), ("other", value)):
        assert stops(freeze({fact: globs}))
        assert not stops(freeze({}, excepted={fact: globs})) or fact == "target_agents"
    for globs in (("other",), (f"{value}?",)):
        assert not stops(freeze({fact: globs}))
        assert stops(freeze({}, excepted={fact: globs}))


def test_all_named_facts_must_match() -> None:
    both = {"action": ("restart_*",), "principal_kind": ("agent",)}
    assert stops(freeze(both))
    assert not stops(freeze(both), executing(principal=ANNA))
    assert not stops(freeze(both), executing(claims=replace(CLAIMS, action="look")))


def test_an_exception_needs_all_of_its_facts() -> None:
    found = freeze({}, excepted={"action": ("restart_*",), "principal_group": ("commanders",)})
    assert not stops(found, executing(principal=ANNA))
    assert stops(found)
    assert stops(found, executing(principal=ANNA, claims=replace(CLAIMS, action="look")))


@pytest.mark.parametrize(
    ("fact", "unknown"),
    [
        ("action", {"claims": replace(CLAIMS, action=None)}),
        ("incident_id", {"claims": replace(CLAIMS, incident_id=None)}),
        ("target_agents", {"claims": replace(CLAIMS, target_agents=())}),
        ("risk", {"risk": None}),
    ],
)
def test_what_is_not_known_counts_as_frozen_and_never_as_excepted(fact: str, unknown: dict[str, Any]) -> None:
    assert stops(freeze({fact: ("other",)}), executing(**unknown))
    assert stops(freeze({}, excepted={fact: ("*",)}), executing(**unknown))


def test_an_action_that_the_catalogue_lacks_may_be_one_that_it_has() -> None:
    """A backend may fold case, or strip blanks. Only a shadow route would let such an action through."""
    folded = executing(claims=replace(CLAIMS, action="Restart_Pod "), risk=None)
    assert stops(freeze({"action": ("restart_pod",)}), folded)
    assert stops(freeze({}, excepted={"action": ("*",)}), folded)
    assert not stops(freeze({"action": ("restart_pod",)}), replace(folded, risk=RiskClass.LOW))


def test_a_program_has_no_route_so_a_freeze_of_a_route_leaves_it_alone() -> None:
    assert not stops(freeze({"route": ("*",)}), executing(route=None))
    assert stops(freeze({}, excepted={"route": ("*",)}), executing(route=None))


def test_one_target_agent_is_enough_to_stop_and_all_are_needed_for_the_exception() -> None:
    assert stops(freeze({"target_agents": ("db-2",)}))
    assert stops(freeze({}, excepted={"target_agents": ("db-2",)}))
    assert not stops(freeze({}, excepted={"target_agents": ("db-*",)}))


def test_no_glob_excepts_a_caller_without_a_credential() -> None:
    for globs, stopped in ((("*",), True), (("anon*",), True), (("anonymous",), False)):
        assert stops(freeze({}, excepted={"principal": globs}), executing(principal=ANONYMOUS)) is stopped
    # In `match` it is a principal like any other.
    assert stops(freeze({"principal": ("*",)}), executing(principal=ANONYMOUS))


def test_a_freeze_holds_in_its_tenant_and_one_of_the_tenant_default_in_all() -> None:
    assert stops(freeze(), executing(tenant_id="blue"))
    assert stops(freeze(tenant_id="blue"), executing(tenant_id="blue"))
    assert not stops(freeze(tenant_id="blue"), executing(tenant_id="green"))
    assert not stops(freeze(tenant_id="blue"))


def test_a_freeze_ends_at_its_time_and_when_it_is_lifted() -> None:
    assert stops(freeze(ends_at=NOW + 1))
    assert not stops(freeze(ends_at=NOW))
    assert not stops(freeze(lifted_at=NOW - 1))


def test_of_several_freezes_the_one_that_ends_last_is_named() -> None:
    soon, late, never = (
        freeze({}, "soon", ends_at=NOW + 1),
        freeze({}, "late", ends_at=NOW + 1_500_000),
        freeze({}, "never"),
    )
    for order in ([soon, late], [late, soon]):
        found = frozen(order, executing(), NOW)
        assert found is not None
        assert found.members == {
            "freeze_id": "late",
            "reason": "the primary is split",
            "ends_at": iso_time(NOW + 1_500_000),
            "retry_after_seconds": 2,
        }
    for order in ([never, late], [late, never], [freeze({"action": ("x",)}), never]):
        found = frozen(order, executing(), NOW)
        assert found is not None
        assert (found.members["freeze_id"], found.members["ends_at"]) == ("never", None)
        assert found.members["retry_after_seconds"] is None
        assert found.message == "Executions like this one are frozen until it is lifted: the primary is split"


def test_a_freeze_is_described_in_words() -> None:
    assert describe({}, {}) == "every execution"
    said = describe({"action": ("a*", "b"), "risk": ("high",)}, {"principal_group": ("x",)})
    assert said == "action a* or b, risk high, except principal_group x"


_GLOBS = st.lists(st.sampled_from(["*", "a*", "a", "b", "?", "zz"]), min_size=1, max_size=3).map(tuple)
_PATTERNS = st.dictionaries(st.sampled_from(FACTS), _GLOBS, max_size=4)


@given(_PATTERNS, _PATTERNS, _PATTERNS)
def test_a_further_fact_narrows_what_is_frozen_and_what_is_excepted(
    match: Pattern, excepted: Pattern, more: Pattern
) -> None:
    given_one = executing(claims=Claims(incident_id="a", action="b", target_agents=("a", "b")), route="a")
    wider = stops(freeze(match, excepted=excepted), given_one)
    if not wider and not excepted:
        assert not stops(freeze({**more, **match}, excepted=excepted), given_one)
    if wider and excepted:
        assert stops(freeze(match, excepted={**more, **excepted}), given_one)


# Where it stands among the checks ----------------------------------------------------------------------


def admit(**changes: Any) -> Admit:
    return Admit(
        **{"decision_id": "d-1", "claims": CLAIMS, "policies": POLICIES, "principal": BOT, **changes}
    )


def state(*freezes: Freeze, **more: Any) -> State:
    return State(scopes={"scope_1": SCOPE}, freezes={each.freeze_id: each for each in freezes}, **more)


def refused(applied: Applied) -> str:
    assert isinstance(applied.reply, Denied)
    assert (applied.scope, applied.execution, applied.claimed) == (None, None, None)
    return applied.reply.refusal.code


def test_a_frozen_execution_consumes_nothing_and_is_recorded_as_refused() -> None:
    applied = apply(admit(), state(freeze()), NOW)
    assert refused(applied) == "frozen"
    entry = applied.entry
    assert entry is not None
    assert (entry.event, entry.record.decision_reason, entry.record.decision_outcome.value) == (
        "refused",
        "frozen",
        "blocked",
    )
    assert entry.record.details["freeze_id"] == "f-1"
    assert entry.record.details["reason"] == "the primary is split"
    assert judgment(admit(), state(freeze()), NOW).refusal == frozen([freeze()], executing(), NOW)


def test_without_a_record_of_its_own_a_frozen_execution_is_refused_all_the_same() -> None:
    applied = apply(admit(record_denial=False), state(freeze()), NOW)
    assert (refused(applied), applied.entry) == ("frozen", None)


def test_a_freeze_that_does_not_match_stops_nothing() -> None:
    applied = apply(
        admit(), state(freeze({"principal_kind": ("human",)}), freeze({}, "f-2", lifted_at=NOW)), NOW
    )
    assert isinstance(applied.reply, Admitted)


def test_the_bounds_of_the_scope_come_first_and_the_catalogue_after_the_freeze() -> None:
    stopped = state(freeze())
    assert (
        refused(apply(admit(claims=replace(CLAIMS, incident_id="inc_2")), stopped, NOW))
        == "incident_mismatch"
    )
    unlisted = replace(POLICIES, actions={})
    assert refused(apply(admit(policies=unlisted), stopped, NOW)) == "frozen"
    assert refused(apply(admit(policies=unlisted), state(), NOW)) == "policy_denied"


def test_a_freeze_holds_where_no_scope_is_needed() -> None:
    look = admit(claims=replace(CLAIMS, scope_id=None, action="look"), scope_required_from=RiskClass.MEDIUM)
    assert isinstance(apply(look, state(), NOW).reply, Admitted)
    assert refused(apply(look, state(freeze()), NOW)) == "frozen"


def test_a_freeze_wins_over_shadow_mode() -> None:
    scopeless = admit(claims=replace(CLAIMS, scope_id=None), shadow=True)
    assert isinstance(apply(scopeless, state(), NOW).reply, Admitted)
    applied = apply(scopeless, state(freeze()), NOW)
    assert refused(applied) == "frozen"
    assert applied.entry is not None
    assert applied.entry.event == "refused"


def test_a_request_that_a_shadow_route_lets_through_unread_is_frozen() -> None:
    unread = Refuse(
        decision_id="d-1", refusal=Refusal("invalid_request", "no"), shadow=True, principal=BOT, route="r"
    )
    assert isinstance(apply(unread, state(), NOW).reply, Recorded)
    applied = apply(unread, state(freeze({"action": ("restart_*",)})), NOW)
    assert refused(applied) == "frozen"
    assert applied.entry is not None
    assert (applied.entry.event, applied.entry.record.decision_reason) == ("refused", "frozen")
    # A freeze of other callers leaves it alone.
    others = state(freeze({"principal_kind": ("human",)}))
    assert isinstance(apply(unread, others, NOW).reply, Recorded)
    # A refusal that is enforced is no execution.
    assert isinstance(apply(replace(unread, shadow=False), state(freeze()), NOW).reply, Recorded)


def test_a_repeat_under_an_idempotency_key_gets_no_answer_while_it_is_frozen() -> None:
    claim = Claim(key=b"k", request=b"r", kept_for=60 * SECOND)
    execution = Execution(
        decision_id="d-0",
        scope_id="scope_1",
        tenant_id="default",
        incident_id="inc_1",
        action="restart_pod",
        request_id="r",
        attempt_number=1,
        hold=0,
        admitted_at=NOW - SECOND,
        status="answered",
    )
    claimed = Claimed(
        key=b"k",
        request=b"r",
        admission_id="d-0",
        kept_for=60 * SECOND,
        expires_at=NOW + 60 * SECOND,
        answered_at=NOW,
        answer=KeptAnswer(key=b"k", status=200, reason=b"OK", headers=(), body=b""),
    )
    answered = {"executions": {"d-0": execution}, "claimed": {b"k": claimed}}
    assert isinstance(apply(admit(claim=claim), state(**answered), NOW).reply, Replayed)
    applied = apply(admit(claim=claim), state(freeze(), **answered), NOW)
    assert refused(applied) == "frozen"
    assert applied.entry is not None
    assert applied.entry.event == "refused"
    other = state(freeze({"principal_kind": ("human",)}), **answered)
    assert isinstance(apply(admit(claim=claim), other, NOW).reply, Replayed)


# Setting and lifting -----------------------------------------------------------------------------------


def test_setting_a_freeze_records_what_why_who_and_until_when() -> None:
    command = SetFreeze(
        decision_id="f-1",
        match={"action": ("a*",)},
        excepted={"principal_group": ("x",)},
        reason="why",
        ends_at=NOW + SECOND,
        principal=ANNA,
        request_id="r-1",
    )
    applied = apply(command, state(), NOW)
    assert isinstance(applied.reply, FreezeSet)
    made = applied.reply.freeze
    assert applied.freeze == made
    assert (made.freeze_id, made.tenant_id, made.set_at, made.set_by) == ("f-1", "default", NOW, "anna")
    entry = applied.entry
    assert entry is not None
    assert (entry.event, entry.principal, entry.record.decision_source.value) == ("frozen", ANNA, "human")
    assert entry.record.decision_id == "f-1"
    assert entry.record.details == {
        "freeze_id": "f-1",
        "reason": "why",
        "match": {"action": ["a*"]},
        "except": {"principal_group": ["x"]},
        "ends_at": iso_time(NOW + SECOND),
        "rules": [],
    }


def test_there_is_a_most_of_freezes_in_force() -> None:
    full = [freeze({}, f"f{number}") for number in range(MAX_IN_FORCE)]
    one_more = SetFreeze(decision_id="d", match={}, reason="r")
    applied = apply(one_more, state(*full), NOW)
    assert refused(applied) == "invalid_freeze"
    assert (applied.freeze, applied.entry) == (None, None)
    ended = [replace(full[0], ends_at=NOW), *full[1:]]
    assert isinstance(apply(one_more, state(*ended), NOW).reply, FreezeSet)


def test_lifting_is_recorded_once_and_may_be_repeated() -> None:
    command = LiftFreeze(decision_id="l-1", freeze_id="f-1", reason="whole again", principal=ANNA)
    applied = apply(command, state(freeze()), NOW)
    assert isinstance(applied.reply, FreezeLifted)
    lifted = applied.reply.freeze
    assert (lifted.lifted_at, lifted.lifted_by, lifted.lifted_for, lifted.lifted_in) == (
        NOW,
        "anna",
        "whole again",
        "l-1",
    )
    entry = applied.entry
    assert entry is not None
    assert (entry.event, entry.record.decision_id, entry.record.details["freeze_id"]) == (
        "unfrozen",
        "l-1",
        "f-1",
    )
    assert entry.record.details["reason"] == "whole again"
    again = apply(replace(command, decision_id="l-2"), state(lifted), NOW + SECOND)
    assert again.reply == FreezeLifted(lifted)
    assert (again.freeze, again.entry) == (None, None)


def test_a_freeze_of_another_tenant_looks_as_if_it_did_not_exist() -> None:
    def lift(tenant: str, of: Freeze) -> Applied:
        command = LiftFreeze(
            decision_id="l", freeze_id="f-1", reason="r", principal=replace(ANNA, tenant_id=tenant)
        )
        return apply(command, state(of), NOW)

    blue = freeze(tenant_id="blue")
    assert refused(lift("green", blue)) == "freeze_not_found"
    assert refused(lift("blue", freeze())) == "freeze_not_found"
    assert isinstance(lift("blue", blue).reply, FreezeLifted)
    assert isinstance(lift("default", blue).reply, FreezeLifted)
    unknown = LiftFreeze(decision_id="l", freeze_id="f-2", reason="r")
    assert refused(apply(unknown, state(blue), NOW)) == "freeze_not_found"
