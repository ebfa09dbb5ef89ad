"""The emitters, from their specification: each row of the tables as a case; then keys and signals."""

from __future__ import annotations

import copy
import inspect
import itertools
import pickle
import re
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar import decisions
from sidecar.core.emission import (
    ALLOWED_SIGNALS,
    EMITTERS,
    FORBIDDEN_SIGNALS,
    CARESignalAccessError,
    Emission,
    Kind,
    check_signal,
    emission,
    once_key,
)
from sidecar.core.record import CausalRole, DecisionType, Record
from tests.cases import load_cases

NOW = 1_767_225_600_000_000  # 2026-01-01T00:00:00Z
CASES = load_cases("emission")
UNSAID = {
    "decision_source": "system",
    "decision_reason": None,
    "run_id": None,
    "workflow_id": None,
    "tenant_id": "default",
    "request_id": None,
}


ALLOWED = """latency_p50 latency_p95 cost_per_run success_rate recovery_occurred agent_availability
    context_size_bucket"""
FORBIDDEN = """policy_outcome budget_halt_reason recovery_class customer_content safety_events
    founder_overrides failure_details user_feedback"""


def arguments_of(case: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a case's emitter: what the caller gives, and the defaults."""
    function = getattr(decisions, f"emit_{case['kind']}_decision")
    bound = inspect.signature(function).bind(**case["arguments"])
    bound.apply_defaults()
    return bound.arguments


def emitted(kind: Kind, arguments: dict[str, Any], **options: Any) -> Emission | None:
    return emission(kind, arguments, decision_id="d-1", now=NOW, **options)


def record_of(made: Emission | None) -> Record:
    assert made is not None
    return made.record


def ordinary(kind: Kind, **changes: Any) -> dict[str, Any]:
    """The arguments of the first case of a kind, which leaves a record."""
    case = next(each for each in CASES if each["kind"] == kind)
    return {**arguments_of(case), **changes}


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_an_emitter(case: dict[str, Any]) -> None:
    kind: Kind = case["kind"]
    arguments = arguments_of(case)
    before = copy.deepcopy(arguments)
    if "signal" in case:
        with pytest.raises(CARESignalAccessError) as refused:
            emitted(kind, arguments)
        assert refused.value.signal == case["signal"]
        return
    made = emitted(kind, arguments)
    if case["record"] is None:
        assert made is None
        return
    assert made is not None
    told = made.record.to_dict()
    assert (told.pop("decision_id"), told.pop("decided_at")) == ("d-1", "2026-01-01T00:00:00.000000+00:00")
    assert told == {**UNSAID, **case["record"]}
    assert list(told["decision_inputs"]) == list(case["record"]["decision_inputs"])
    assert list(told["details"]) == list(case["record"]["details"])
    wanted = once_key(made.record.decision_type, *case["once"]) if "once" in case else None
    assert made.once == wanted
    assert made.unless_switched == ("care_kill_switch" if kind == "care_optimization" else None)
    assert arguments == before


def test_every_emitter_and_every_outcome_of_one_has_a_case() -> None:
    assert list(EMITTERS) == list(get_args(Kind))
    assert {case["kind"] for case in CASES} == set(EMITTERS)
    told = [case["record"] for case in CASES if case.get("record")]
    assert {record["decision_type"] for record in told} == {member.value for member in DecisionType}
    assert {record["decision_outcome"] for record in told} == {
        *("selected", "rejected", "skipped", "blocked", "none", "execution_halted", "optimized_selected"),
        *("policy_blocked", "policy_unavailable"),
        *("recovery_applied", "recovery_suggested", "recovery_skipped"),
    }


@pytest.mark.parametrize("kind", EMITTERS)
def test_the_default_causal_role_is_that_of_the_table_and_a_fixed_one_cannot_be_given(kind: Kind) -> None:
    arguments = ordinary(kind)
    assert ("causal_role" in arguments) is not EMITTERS[kind].role_is_fixed
    if "causal_role" in arguments:
        assert arguments["causal_role"] is EMITTERS[kind].causal_role
    told = record_of(emitted(kind, {**arguments, "causal_role": CausalRole.POST_RUN}))
    fixed = EMITTERS[kind].role_is_fixed
    assert told.causal_role is (EMITTERS[kind].causal_role if fixed else CausalRole.POST_RUN)


@pytest.mark.parametrize("role", [*CausalRole, *(member.value for member in CausalRole)])
def test_a_causal_role_may_be_given_as_a_member_or_as_its_value(role: Any) -> None:
    assert record_of(emitted("policy", ordinary("policy", causal_role=role))).causal_role == role


def test_a_causal_role_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(ValueError, match="later"):
        emitted("policy", ordinary("policy", causal_role="later"))


@pytest.mark.parametrize(
    ("given", "listed"),
    [(None, []), (("a", "b"), ["a", "b"]), ({"a"}, ["a"]), (frozenset({"a"}), ["a"]), ("ab", ["ab"])],
)
def test_agents_violations_and_signals_become_lists(given: Any, listed: list[str]) -> None:
    routed = record_of(emitted("routing", ordinary("routing", eligible_agents=given)))
    assert routed.decision_inputs == {"eligible_agents": listed, "agents_count": len(listed)}
    checked = record_of(emitted("policy_precheck", ordinary("policy_precheck", violations=given)))
    assert checked.decision_inputs["violations"] == listed
    signals = ["latency_p50"]
    optimized = emitted("care_optimization", ordinary("care_optimization", signals_used=tuple(signals)))
    assert record_of(optimized).details["signals"] == signals


# Confidence ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("least", "confidence", "emits"),
    [
        (0.5, 0.5, True),
        (0.5, 0.49999, False),
        (0.9, 0.9, True),
        (0.9, 0.89999, False),
        (0.0, 0.0, True),
        (0.0, float("nan"), False),
        (0.0, float("-inf"), False),
    ],
)
def test_confidence_reaches_what_is_configured_or_nothing_is_left(
    least: float, confidence: float, emits: bool
) -> None:
    arguments = ordinary("care_optimization", confidence_score=confidence)
    assert (emitted("care_optimization", arguments, min_confidence=least) is not None) is emits


# Signals -------------------------------------------------------------------------------------------------


def test_the_signals_are_those_of_the_specification() -> None:
    assert set(ALLOWED.split()) == ALLOWED_SIGNALS
    assert set(FORBIDDEN.split()) == FORBIDDEN_SIGNALS


@pytest.mark.parametrize("signal", sorted(ALLOWED_SIGNALS))
def test_an_allowed_signal_passes(signal: str) -> None:
    check_signal(signal)
    made = emitted("care_optimization", ordinary("care_optimization", signals_used=[signal]))
    assert record_of(made).decision_inputs["signals"] == [signal]


@pytest.mark.parametrize(
    ("signal", "why"),
    [
        *((each, "forbidden") for each in sorted(FORBIDDEN_SIGNALS)),
        *((each, "unknown") for each in ("", "latency_p99", "LATENCY_P50", " latency_p50", None, 7, ["a"])),
    ],
)
def test_any_other_signal_is_refused_by_name(signal: Any, why: str) -> None:
    with pytest.raises(CARESignalAccessError, match=re.escape(f"{signal!r} is {why}")) as refused:
        check_signal(signal)
    assert refused.value.signal == signal
    with pytest.raises(CARESignalAccessError):
        emitted("care_optimization", ordinary("care_optimization", signals_used=["latency_p50", signal]))


def test_the_refusal_of_a_signal_survives_the_way_to_another_process() -> None:
    with pytest.raises(CARESignalAccessError) as refused:
        check_signal("user_feedback")
    again = pickle.loads(pickle.dumps(refused.value))
    assert (str(again), again.signal) == (str(refused.value), "user_feedback")


# Keys ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("budget_enforcement", {"run_id"}),
        ("policy_precheck", {"request_id", "service_available"}),  # it decides the outcome
        ("recovery_evaluation", {"run_id", "failure_type"}),
        ("care_optimization", {"request_id"}),
    ],
)
def test_a_key_depends_on_what_the_record_is_kept_once_for_and_on_nothing_else(
    kind: Kind, names: set[str]
) -> None:
    arguments = ordinary(kind)
    first = emitted(kind, arguments)
    assert first is not None
    others: dict[str, Any] = {
        name: value + type(value)(1) if isinstance(value, int | float) else f"{value}-other"
        for name, value in arguments.items()
        if isinstance(value, str | int | float) and not isinstance(value, bool) and name != "posture"
    }
    others |= {"service_available": False} if kind == "policy_precheck" else {}
    changed = set()
    for name, value in others.items():
        made = emitted(kind, {**arguments, name: value})
        assert made is not None, name
        changed |= {name} if made.once != first.once else set()
    assert changed == names


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a_b", "a%b"),
        ("a_b", "axb"),
        ("a%", "ab"),
        ("timeout", "Timeout"),
        ("timeout", "timeout "),
        ("é", "e\N{COMBINING ACUTE ACCENT}"),
        ("\ud800", "\\ud800"),
    ],
)
def test_failure_types_that_are_not_exactly_equal_have_keys_of_their_own(one: str, other: str) -> None:
    keys = {once_key(DecisionType.RECOVERY_EVALUATION, "run", each) for each in (one, other)}
    assert len(keys) == 2


PARTS = st.lists(st.text(alphabet=st.characters()), max_size=3)


@given(PARTS, PARTS)
def test_two_keys_are_the_same_exactly_where_their_parts_are(one: list[str], other: list[str]) -> None:
    keys = [once_key(DecisionType.BUDGET_ENFORCEMENT, *parts) for parts in (one, other)]
    assert (keys[0] == keys[1]) is (one == other)


def test_parts_do_not_run_into_each_other_and_types_have_keys_of_their_own() -> None:
    parts = [("a", "bc"), ("ab", "c"), ("abc",), ("abc", ""), ('a", "bc',), ('["a"', '"bc"]')]
    keys = {once_key(kind, *each) for kind, each in itertools.product(DecisionType, parts)}
    assert len(keys) == len(DecisionType) * len(parts)


def test_a_key_is_a_digest_that_tells_nothing_of_what_it_was_made_from() -> None:
    key = once_key(DecisionType.BUDGET_ENFORCEMENT, "token-very-secret")
    assert len(key) == 32
    assert b"secret" not in key
