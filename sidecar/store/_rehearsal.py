"""The commands of a rehearsal: the grant of a scope, and an execution that spends it."""

from __future__ import annotations

from sidecar.core.command import Admit, Command, Issue
from sidecar.core.facts import Claims
from sidecar.core.idempotency import Claim
from sidecar.core.policy import ActionPolicy, PolicySet, RiskClass
from sidecar.core.scope import Scope
from sidecar.ids import new_decision_id, new_scope_id

_POLICIES = PolicySet(revision="none", actions={}, unlisted=ActionPolicy(risk=RiskClass.LOW))
_CLAIM = Claim(key=b"rehearsal", request=b"", kept_for=1)  # no digest, so no client claims this key
_INCIDENT, _ACTION = "rehearsal", "rehearse"


def rehearsed() -> list[Command]:
    """Commands that touch every table that a decision touches. They are never committed."""
    scope = Scope(
        scope_id=new_scope_id(),
        tenant_id="default",
        incident_id=_INCIDENT,
        allowed_actions=(_ACTION,),
        max_cost=0,
        max_attempts=1,
        created_at=0,
        expires_at=0,
        intent="to see whether decisions can be written again",
        target_agents=(),
        created_by="scopegate",
    )
    claims = Claims(scope_id=scope.scope_id, incident_id=_INCIDENT, action=_ACTION)
    return [
        Issue(decision_id=new_decision_id(), scope=scope, ttl=60, policies=_POLICIES),
        Admit(decision_id=new_decision_id(), claims=claims, policies=_POLICIES, claim=_CLAIM),
    ]
