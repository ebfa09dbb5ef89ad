"""Schemathesis against a running sidecar: cases made from its OpenAPI document, each answer held to it."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import schemathesis
from schemathesis.config import SchemathesisConfig
from schemathesis.core.transport import Response
from schemathesis.engine import StopReason, events, from_schema
from schemathesis.engine.recorder import ScenarioRecorder
from schemathesis.schemas import BaseSchema

from sidecar.core.policy import ActionPolicy, RiskClass
from tests.support import POLICIES, House, replies, sends

PHASES = ("examples", "coverage", "fuzzing", "stateful")
EXACT_FLOATS = 2**53

# Every action may be executed, so that what is granted at random can be spent.
ANY_ACTION = replace(POLICIES, unlisted=ActionPolicy(risk=RiskClass.LOW))

# A configuration in which everything stands elsewhere.
ELSEWHERE: Mapping[str, Any] = {
    "scopes": {"serve_on": "admin"},
    "gate": {
        "tenant_header": "X-Tenant-Id",
        "routes": [
            {
                "path": "/v1/incidents/{incident}/runs/{run}/heal",
                "scope_id": "header:X-Scope-Id",
                "incident_id": "path:incident",
                "action": "query:action",
                "parameters": "/arguments",
                "target_agents": ["/target/agents"],
            }
        ],
    },
}

# Checks that do not hold for a call, with the reason. All others hold for all.
EXCLUDED: Sequence[Mapping[str, Any]] = (
    {
        # A missing token is answered like a wrong one, 403 and not 401, so that nothing can be told from it.
        "include-path": "/api/v1/recovery/executions/{decision_id}/complete",
        "checks": {"missing_required_header": {"enabled": False}, "ignored_auth": {"enabled": False}},
    },
    {
        # The end of a freeze must be in the future, which no schema can say.
        "include-path": "/api/v1/freezes",
        "include-method": "POST",
        "checks": {"positive_data_acceptance": {"enabled": False}},
    },
    {
        # What passes through is the backend's to refuse.
        "include-path": "/v1/incidents/{incident}/runs/{run}/heal",
        "include-method": ["GET", "HEAD", "OPTIONS"],
        "checks": {"negative_data_rejection": {"enabled": False}},
    },
    {
        # GET takes the name of a kind for a decision_id, so it answers 404, and it is among the methods that
        # are allowed at that place. OpenAPI has the two as paths of their own.
        "include-path-regex": "^/api/v1/decisions/[a-z_]+$",
        "include-method": "POST",
        "checks": {"allow_header_conformance": {"enabled": False}, "unsupported_method": {"enabled": False}},
    },
)


# Calls that lead to each other, by the links of the document.
STORIES: Sequence[Sequence[str]] = (
    ("createScope", "execute", "listScopes", "revokeScope"),
    ("listExecutions", "reconcile"),
    ("listDecisions", "getDecision"),
    ("tellBudget", "tellRouting", "turnKillSwitchOn", "turnKillSwitchOff", "getDecision"),
)


@dataclass
class Run:
    """What came of a run: cases and checks by phase, statuses by call, and what did not hold."""

    cases: Counter[str] = field(default_factory=Counter)
    checks: int = 0
    statuses: dict[str, Counter[int]] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)

    def succeeded(self, call: str) -> bool:
        return any(status < 400 for status in self.statuses[call])

    def take(self, phase: str, recorder: ScenarioRecorder) -> None:
        for case_id, interaction in recorder.interactions.items():
            self.cases[phase] += 1
            if interaction.response is not None:
                label = recorder.cases[case_id].value.operation.label
                self.statuses.setdefault(label, Counter())[interaction.response.status_code] += 1
        for case_id, checks in recorder.checks.items():
            self.checks += len(checks)
            for check in checks:
                response = recorder.interactions[case_id].response
                if check.failure_info is not None and not _is_spent(check.name, response):
                    failure = check.failure_info.failure
                    told = "" if response is None else f"{response.status_code} {response.content[:500]!r}"
                    self.wrong.setdefault(
                        f"{failure.operation}: {check.name}",
                        f"{failure.title}\n{failure.message}\n{check.failure_info.code_sample}\n{told}",
                    )


def run(
    url: str, *, examples: int, seed: int = 1, phases: Sequence[str] = PHASES, only: Sequence[str] = ()
) -> Run:
    """Every call of the document at a URL, or only those that are named, with up to so many cases each.

    The same seed makes the same cases, but for the stateful phase, which also follows the answers.
    """
    configuration = SchemathesisConfig.from_dict(
        {
            "seed": seed,
            "suppress-health-check": ["all"],  # a machine that is busy makes nothing wrong
            "generation": {"max-examples": examples, "deterministic": True, "database": "none"},
            "phases": {name: {"enabled": name in phases} for name in PHASES},
            "operations": list(EXCLUDED),
        }
    )
    schema: BaseSchema = schemathesis.openapi.from_url(url, config=configuration)
    if only:
        schema = schema.exclude(lambda context: context.operation.definition.raw["operationId"] not in only)
    schema.validate()
    found = Run()
    for event in from_schema(schema).execute():
        match event:
            case events.ScenarioFinished():
                found.take(event.phase.value, event.recorder)
            case events.NonFatalError():
                found.wrong[f"{event.label}: {event.info.title}"] = event.info.message
            case events.FatalError():
                raise event.exception
            case events.EngineFinished():
                assert event.stop_reason is StopReason.COMPLETED
    return found


def _is_spent(check: str, response: Response | None) -> bool:
    """The recovery API answers 400 also if nothing is wrong with a request but the state of its scope."""
    if check != "positive_data_acceptance" or response is None or response.status_code != 400:
        return False
    return response.json()["error"] in ("scope_exhausted", "scope_expired", "scope_revoked")


async def furnish(house: House) -> None:
    """Something to be found: scopes in every state, records, executions that ended and that are unknown."""
    used = await house.issue(incident_id="inc_123")
    await house.execute(used)
    await house.execute(used)
    await house.revoke(await house.issue(incident_id="inc_123"))
    house.backend.script = sends(then="reset")
    for _ in range(40):
        await house.execute(await house.issue(action="failover", max_cost_usd=5))
    house.backend.script = replies()


# What JSON Schema cannot say ----------------------------------------------------------------------------


@schemathesis.hook
def before_call(
    context: schemathesis.HookContext, case: schemathesis.Case[Any], kwargs: dict[str, Any]
) -> None:
    """Turns what only the schema calls valid into what is valid; what is to be refused stays as it is."""
    del context, kwargs
    if case.meta is None or not case.meta.generation.mode.is_positive:
        return
    case.path_parameters = _spelled(dict(case.path_parameters or {}))
    case.query = _spelled(dict(case.query or {}))
    if isinstance(case.body, dict):
        body = case.body = _spelled(case.body)
        if case.path.endswith("/recovery/scope") and "action" in body and "allowed_actions" in body:
            # Of two members one is to be among the other.
            body["allowed_actions"] = [body["action"], *body["allowed_actions"][1:]]
        parameters = body.get("parameters")
        if "target_agents" in body and isinstance(parameters, dict) and "target_agents" in parameters:
            # Two places are to agree.
            parameters["target_agents"] = body["target_agents"]


def _spelled(value: Any) -> Any:
    """The same, with whole numbers written as such, which is a matter of spelling that a schema cannot see;
    and without the unassigned characters that Schemathesis, unlike the document, counts among the marks."""
    match value:
        case str():
            return "".join("?" if unicodedata.category(each) == "Cn" else each for each in value)
        case float() if value.is_integer() and abs(value) < EXACT_FLOATS:
            return int(value)
        case dict():
            return {name: _spelled(member) for name, member in value.items()}
        case list():
            return [_spelled(member) for member in value]
        case _:
            return value
