"""The table of who.md over real sockets: who may make which call, and the record of each refusal."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sidecar.core.roles import ROLES, Holders, Role, Roles
from tests.client import Message, as_json, ask
from tests.support import EXECUTE, POLICIES, SCOPE, SCOPES, House, Open

# A trusted proxy on loopback names the caller. Each role is held by a caller of its name.
AUTH = {"proxy": {"header": "X-User", "groups_header": "X-Groups", "trusted": ["127.0.0.1"]}}
BY_NAME = replace(POLICIES, roles=Roles({role: Holders(ids=(role,)) for role in ROLES}))
RECONCILE = "/api/v1/executions/01961234-5678-7abc-8def-0123456789ab/reconcile"
WANTED = {"incident_id": "inc_1", "action": "retry_agent", "intent": "a test"}
OBSERVED = (
    *("/api/v1/decisions", "/api/v1/decisions/none", "/api/v1/executions", "/api/v1/scopes"),
    *("/api/v1/status", "/api/v1/care/kill-switch", "/openapi.json", "/docs"),
)

# The listener, the call, its body, and the roles that may make it, the weakest first.
CALLS: tuple[tuple[str, str, str, Any, tuple[Role, ...]], ...] = (
    ("data", "POST", SCOPE, WANTED, ("issuer",)),
    ("data", "GET", SCOPES + "inc_1", None, ("issuer", "operator")),
    ("data", "DELETE", SCOPES + "scope_none", None, ("issuer", "operator")),
    ("data", "POST", "/api/v1/recovery/candidates/retry/scope-test", {"action_type": "retry"}, ("observer",)),
    ("data", "POST", EXECUTE, {"incident_id": "inc_1", "action": "retry_agent"}, ("executor",)),
    *(("admin", "GET", path, None, ("observer",)) for path in OBSERVED),
    ("admin", "POST", "/api/v1/explain", {}, ("observer",)),
    ("admin", "POST", "/api/v1/decisions/memory", {"queried": True}, ("recorder",)),
    ("admin", "POST", "/api/v1/runs/run_1/backfill", {"request_id": "r"}, ("recorder",)),
    ("admin", "POST", RECONCILE, {"outcome": "executed"}, ("operator",)),
    ("admin", "POST", "/api/v1/reload", {}, ("operator",)),
    ("admin", "POST", "/api/v1/store/accept-clock", {}, ("operator",)),
    ("admin", "PUT", "/api/v1/care/kill-switch", {}, ("operator",)),
    ("admin", "DELETE", "/api/v1/care/kill-switch", None, ("operator",)),
)


async def called(house: House, listener: str, method: str, path: str, body: Any, user: str | None) -> Message:
    headers = [] if user is None else [("X-User", user)]
    if listener == "admin":
        return await house.admin(method, path, body, headers)
    if body is None:
        return await house.data(method, path, headers)
    kind, document = as_json(body)
    return await house.data(method, path, [*kind, *headers], document)


@pytest.mark.parametrize("call", CALLS, ids=[f"{method} {path}" for _, method, path, _, _ in CALLS])
async def test_a_call_is_for_those_who_hold_its_role_and_each_refusal_is_recorded(
    open_house: Open, call: tuple[str, str, str, Any, tuple[Role, ...]]
) -> None:
    listener, method, path, body, roles = call
    house = await open_house(policies=BY_NAME, auth=AUTH)
    for user in (*ROLES, "stranger", None):
        answer = await called(house, listener, method, path, body, user)
        if user in roles:
            assert answer.status not in (401, 403), answer.body
            continue
        refused = answer.json()
        assert (answer.status, refused["error"]) == (403, "role_required"), (user, answer.body)
        assert refused["role"] == roles[0]
        found = await house.admin(
            "GET", f"/api/v1/decisions/{refused['decision_id']}", None, [("X-User", "observer")]
        )
        record = found.json()
        assert (record["event"], record["decision_reason"]) == ("refused", "role_required")
        assert record["principal"] == {
            "id": user or "anonymous",
            "kind": "service",
            "method": "none" if user is None else "proxy",
        }
    assert house.backend.seen == []


async def test_without_a_method_every_caller_may_make_every_call(open_house: Open) -> None:
    house = await open_house(policies=BY_NAME)
    for listener, method, path, body, _ in CALLS:
        answer = await called(house, listener, method, path, body, "stranger")
        assert answer.status not in (401, 403), (path, answer.body)


async def test_health_and_metrics_ask_no_caller(open_house: Open) -> None:
    house = await open_house(policies=BY_NAME, auth={**AUTH, "required": True})
    for path in ("/health/live", "/health/ready", "/metrics"):
        assert (await ask(house.sidecar.ops_address, "GET", path)).status == 200
