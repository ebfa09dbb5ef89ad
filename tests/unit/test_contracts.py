"""The two Python modules keep their export contracts to the letter: names, parameters, order, sync or async.

The contracts are in tests/cases, as their users wrote them.
"""

from __future__ import annotations

import inspect
import re
from enum import Enum
from types import ModuleType
from typing import Any

import pytest

from sidecar import decisions, scoped_execution
from tests.cases import load_cases

MODULES: dict[str, ModuleType] = {"000": scoped_execution, "004": decisions}
CONTRACTS = {seed: load_cases(f"seed_{seed}_contract")["exports"] for seed in MODULES}
FUNCTIONS = [(seed, each["signature"]) for seed, found in CONTRACTS.items() for each in found["functions"]]
CLASSES = [(seed, each) for seed, found in CONTRACTS.items() for each in found["classes"]]

ENUMERATIONS = {
    "DecisionType": (
        "ROUTING RECOVERY MEMORY POLICY BUDGET BUDGET_ENFORCEMENT POLICY_PRE_CHECK RECOVERY_EVALUATION "
        "CARE_ROUTING_OPTIMIZED"
    ),
    "DecisionSource": "HUMAN SYSTEM HYBRID",
    "DecisionTrigger": "EXPLICIT AUTONOMOUS REACTIVE",
    "DecisionOutcome": (
        "SELECTED REJECTED SKIPPED BLOCKED NONE EXECUTION_HALTED POLICY_BLOCKED POLICY_UNAVAILABLE "
        "RECOVERY_APPLIED RECOVERY_SUGGESTED RECOVERY_SKIPPED BASELINE_SELECTED OPTIMIZED_SELECTED"
    ),
    "CausalRole": "PRE_RUN IN_RUN POST_RUN",
    "RiskClass": "LOW MEDIUM HIGH CRITICAL",
    "ExecutionScope": "AGENT_SUBSET REQUEST_SAMPLE BUDGET_FRACTION DRY_RUN",
}

FIELDS = """decision_id decision_type decision_source decision_trigger decision_inputs decision_outcome
    decision_reason run_id workflow_id tenant_id request_id causal_role decided_at details"""


def parsed(signature: str) -> tuple[bool, str, list[str], str | None]:
    """Whether a signature of a contract is async, its name, its parameters in order, what it returns."""
    found = re.fullmatch(r"(async )?(\w+)\((.*)\)(?: -> (.+))?", signature)
    assert found, signature
    parameters = re.sub(r"\[[^()]*?\](?=,|$)", "", found[3])
    names = [part.split(":")[0].strip() for part in parameters.split(",")] if parameters else []
    return bool(found[1]), found[2], names, found[4]


def module_of(name: str) -> ModuleType:
    (module,) = [MODULES[seed] for seed, each in CLASSES if each["name"] == name]
    return module


@pytest.mark.parametrize(("seed", "signature"), FUNCTIONS, ids=[parsed(each)[1] for _, each in FUNCTIONS])
def test_a_function_of_a_contract_has_its_name_its_parameters_in_order_and_its_kind(
    seed: str, signature: str
) -> None:
    is_async, name, parameters, returned = parsed(signature)
    function: Any = getattr(MODULES[seed], name)
    actual = inspect.signature(function)
    assert list(actual.parameters) == parameters
    assert {each.kind for each in actual.parameters.values()} <= {inspect.Parameter.POSITIONAL_OR_KEYWORD}
    assert inspect.iscoroutinefunction(function) is is_async
    if returned is not None:
        assert spelled(str(actual.return_annotation)) == spelled(returned)


def spelled(annotation: str) -> str:
    """A type in one spelling: Optional[X] as X | None, Dict as dict."""
    annotation = re.sub(r"Optional\[(.+)\]$", r"\1 | None", annotation)
    return annotation.replace("Dict", "dict").replace("List", "list")


def test_the_contracts_are_read_whole() -> None:
    assert [len(found["functions"]) for found in CONTRACTS.values()] == [6, 19]
    assert [len(found["classes"]) for found in CONTRACTS.values()] == [13, 8]
    for _, signature in FUNCTIONS:
        _, name, parameters, _ = parsed(signature)
        assert all(re.fullmatch(r"[a-z_]+", each) for each in (name, *parameters)), signature


@pytest.mark.parametrize(("seed", "wanted"), CLASSES, ids=[each["name"] for _, each in CLASSES])
def test_a_class_of_a_contract_has_its_name_and_methods(seed: str, wanted: dict[str, Any]) -> None:
    found = getattr(MODULES[seed], wanted["name"])
    assert inspect.isclass(found)
    assert found.__name__ == wanted["name"]
    for method in wanted["methods"]:
        assert callable(getattr(found, method)), method


@pytest.mark.parametrize(
    ("name", "method", "is_async", "parameters"),
    [
        ("DecisionRecordService", "__init__", False, ["self", "db_url"]),
        ("DecisionRecordService", "emit", True, ["self", "record"]),
        ("DecisionRecordService", "emit_sync", False, ["self", "record"]),
        ("DecisionRecord", "to_dict", False, ["self"]),
        (
            "ScopedExecutionContext",
            "__init__",
            False,
            ["self", "action", "scope", "scope_fraction", "timeout_ms"],
        ),
        ("ScopedExecutionContext", "execute", True, ["self"]),
        ("BoundExecutionScope", "is_valid", False, ["self"]),
        ("BoundExecutionScope", "can_execute", False, ["self", "action", "incident_id"]),
        ("BoundExecutionScope", "consume", False, ["self", "action", "cost_usd"]),
        ("BoundExecutionScope", "to_dict", False, ["self"]),
        ("ScopeStore", "get_scope", False, ["self", "scope_id"]),
        ("ScopeStore", "get_scopes_for_incident", False, ["self", "incident_id"]),
        ("ScopeStore", "revoke_scope", False, ["self", "scope_id"]),
        ("ScopeStore", "cleanup_expired", False, ["self"]),
    ],
)
def test_a_method_takes_what_the_specification_says(
    name: str, method: str, is_async: bool, parameters: list[str]
) -> None:
    function = inspect.getattr_static(getattr(module_of(name), name), method)
    assert list(inspect.signature(function).parameters) == parameters
    assert inspect.iscoroutinefunction(function) is is_async


@pytest.mark.parametrize("name", ENUMERATIONS)
def test_an_enumeration_has_its_members_in_order_and_their_names_in_lower_case_as_values(name: str) -> None:
    found = getattr(module_of(name), name)
    assert issubclass(found, str)
    assert issubclass(found, Enum)
    wanted = ENUMERATIONS[name].split()
    assert [(member.name, member.value) for member in found] == [(each, each.lower()) for each in wanted]


def test_what_a_contract_calls_an_exception_is_one() -> None:
    errors = [
        getattr(MODULES[seed], each["name"])
        for seed, each in CLASSES
        if re.search(r"Error$|Required$|NotFound$|Exhausted$|Expired$|Mismatch$", each["name"])
    ]
    assert len(errors) == 7
    assert all(issubclass(error, Exception) for error in errors)


# DecisionRecord ------------------------------------------------------------------------------------------


def test_a_decision_record_has_the_14_fields_in_order() -> None:
    fields = decisions.DecisionRecord.model_fields
    assert list(fields) == FIELDS.split()
    assert {name for name, field in fields.items() if field.is_required()} == {
        "decision_type",
        "decision_source",
        "decision_trigger",
        "decision_outcome",
    }


@pytest.mark.parametrize(
    ("function", "defaults"),
    [
        ("emit_routing_decision", {"causal_role": decisions.CausalRole.PRE_RUN, "eligible_agents": ()}),
        ("emit_recovery_decision", {"causal_role": decisions.CausalRole.IN_RUN}),
        ("emit_memory_decision", {"causal_role": decisions.CausalRole.IN_RUN}),
        ("emit_policy_decision", {"causal_role": decisions.CausalRole.IN_RUN, "severity": "warning"}),
        (
            "emit_budget_decision",
            {"causal_role": decisions.CausalRole.PRE_RUN, "enforcement": "soft", "proceeded": True},
        ),
        ("emit_budget_enforcement_decision", {}),
        ("emit_policy_precheck_decision", {"service_available": True}),
        ("emit_recovery_evaluation_decision", {"failure_context": None}),
        ("emit_care_optimization_decision", {}),
    ],
)
def test_an_emitter_has_the_defaults_of_the_specification(function: str, defaults: dict[str, Any]) -> None:
    parameters = inspect.signature(getattr(decisions, function)).parameters
    for name, wanted in {"tenant_id": "default", **defaults}.items():
        assert parameters[name].default == wanted, name
