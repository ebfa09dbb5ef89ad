"""Every error code, produced once: its status, its members and its shape."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from sidecar.core.policy import Brake, Rule
from sidecar.core.roles import Holders, Roles
from sidecar.errors import ERRORS
from sidecar.store import batch
from sidecar.web.serving.identity import MOST_FAILURES
from tests.client import Message, connect, read_message, request_bytes
from tests.support import EXECUTE, POLICIES, SCOPES, Open, eventually, replies, sends, unused_port

# The status of every error code.
STATUSES = {
    400: "scoped_execution_required scope_exhausted scope_expired scope_revoked invalid_request "
    "ambiguous_path override_refused upgrade_refused",
    401: "unauthenticated",
    403: "executor_outside_scope role_required tenant_mismatch frozen "
    "incident_mismatch action_outside_scope target_outside_scope policy_denied cross_site not_listed "
    "completion_refused",
    404: "scope_not_found decision_not_found freeze_not_found",
    405: "method_not_allowed",
    408: "body_timeout",
    409: "not_reconcilable completion_conflict reload_refused idempotency_in_flight outcome_unknown",
    413: "body_too_large",
    415: "unsupported_media_type",
    421: "misdirected_request",
    422: "invalid_scope invalid_freeze idempotency_key_reused",
    429: "braked auth_throttled",
    502: "upstream_unreachable upstream_failed",
    503: "store_unavailable policy_unavailable credential_unavailable overloaded draining",
    504: "upstream_timeout",
}
WIRE = {code: status for status, codes in STATUSES.items() for code in codes.split()}
# What the table in the code has beyond the spec's: an unknown path of the admin listener, and our own bugs.
BEYOND = {"not_found": 404, "internal_error": 500}

# The members that each refusal of a scope adds to its body.
MEMBERS = {
    "scoped_execution_required": {"incident_id", "action"},
    "scope_not_found": {"scope_id"},
    "incident_mismatch": {"scope_id", "incident_id"},
    "action_outside_scope": {"scope_id", "action"},
    "target_outside_scope": {"scope_id", "target_agents"},
    "executor_outside_scope": {"scope_id", "principal"},
    "role_required": {"role", "principal"},
    "tenant_mismatch": {"tenant_id"},
    "frozen": {"freeze_id", "reason", "ends_at", "retry_after_seconds"},
    "freeze_not_found": {"freeze_id"},
    "credential_unavailable": {"header"},
    "invalid_freeze": {"member", "errors"},
    "unauthenticated": {"methods"},
    "auth_throttled": {"methods", "retry_after_seconds"},
    "scope_revoked": {"scope_id"},
    "scope_expired": {"scope_id", "expires_at"},
    "scope_exhausted": {"scope_id", "bound"},
    "policy_denied": {"rules"},
    "invalid_scope": {"member"},
    "braked": {"rules", "ends_at", "retry_after_seconds"},
    "reload_refused": {"errors"},
    "idempotency_in_flight": {"decision_id", "retry_after_seconds"},
    "outcome_unknown": {"decision_id", "execution_status"},
}
FLAT = {"type", "title", "status", "detail", "error", "message"}
# Codes of requests that are recorded, and so carry the decision_id under which they are found.
UNRECORDED = {
    *("decision_not_found", "not_reconcilable", "completion_refused", "completion_conflict"),
    *("freeze_not_found", "invalid_freeze"),
}
RECORDED = set(WIRE) - UNRECORDED - {"reload_refused", "store_unavailable"}

# Their `decision_id` is the first request's execution. The header names the record of the refusal.
HELD = {"idempotency_in_flight", "outcome_unknown"}

Way = Callable[[Open], Awaitable[Message]]
WAYS: dict[str, Way] = {}


def way(function: Way) -> Way:
    """A way to the error that the function is named after."""
    WAYS[function.__name__] = function
    return function


@way
async def scoped_execution_required(open_house: Open) -> Message:
    return await (await open_house()).execute(None)


@way
async def scope_exhausted(open_house: Open) -> Message:
    house = await open_house()
    scope = await house.issue()
    await house.execute(scope)
    return await house.execute(scope)


@way
async def scope_expired(open_house: Open) -> Message:
    house = await open_house()
    scope = await house.issue()
    house.clock.move(301)
    return await house.execute(scope)


@way
async def scope_revoked(open_house: Open) -> Message:
    house = await open_house()
    scope = await house.issue()
    await house.revoke(scope)
    return await house.execute(scope)


@way
async def invalid_request(open_house: Open) -> Message:
    return await (await open_house()).execute(None, scope_id=7)


@way
async def ambiguous_path(open_house: Open) -> Message:
    return await (await open_house()).execute(None, target="/api/v1/recovery/./execute")


@way
async def override_refused(open_house: Open) -> Message:
    return await (await open_house()).data("GET", "/", [("X_Original_URL", EXECUTE)])


@way
async def upgrade_refused(open_house: Open) -> Message:
    house = await open_house()
    return await house.execute(None, headers=[("Connection", "Upgrade"), ("Upgrade", "websocket")])


@way
async def incident_mismatch(open_house: Open) -> Message:
    house = await open_house()
    return await house.execute(await house.issue(), incident_id="inc_2")


@way
async def action_outside_scope(open_house: Open) -> Message:
    house = await open_house()
    return await house.execute(await house.issue(), action="failover")


@way
async def target_outside_scope(open_house: Open) -> Message:
    house = await open_house()
    return await house.execute(await house.issue(target_agents=["a"]), target_agents=["b"])


@way
async def policy_denied(open_house: Open) -> Message:
    house = await open_house()
    scope = await house.issue()
    house.adopt(replace(POLICIES, actions={"failover": POLICIES.actions["failover"]}))
    return await house.execute(scope)


@way
async def cross_site(open_house: Open) -> Message:
    return await (await open_house()).ask_for_scope(headers=[("Origin", "http://evil.example")])


@way
async def misdirected_request(open_house: Open) -> Message:
    return await (await open_house()).ask_for_scope(headers=[("Host", "evil.example")])


@way
async def scope_not_found(open_house: Open) -> Message:
    return await (await open_house()).execute(None, scope_id="scope_none")


@way
async def decision_not_found(open_house: Open) -> Message:
    return await (await open_house()).admin("GET", "/api/v1/decisions/none")


@way
async def method_not_allowed(open_house: Open) -> Message:
    return await (await open_house()).data("DELETE", EXECUTE)


@way
async def body_timeout(open_house: Open) -> Message:
    house = await open_house(gate={"body_timeout_seconds": 0.05})
    reader, writer = await connect(house.sidecar.data_address)
    headers = [("Content-Type", "application/json"), ("Content-Length", "9")]
    writer.write(request_bytes("POST", EXECUTE, headers, b""))
    answer = await read_message(reader)
    writer.close()
    assert answer is not None
    return answer


@way
async def not_reconcilable(open_house: Open) -> Message:
    house = await open_house()
    answer = await house.execute(await house.issue())
    path = f"/api/v1/executions/{answer.header('Scopegate-Decision-Id')}/reconcile"
    return await house.admin("POST", path, {"outcome": "executed"})


@way
async def completion_refused(open_house: Open) -> Message:
    house = await open_house()
    target, _ = await house.running()
    return await house.report(target, [("Authorization", "Bearer of-another")], outcome="succeeded")


@way
async def completion_conflict(open_house: Open) -> Message:
    house = await open_house()
    target, token = await house.running()
    assert (await house.report(target, token, outcome="failed")).status == 200
    return await house.report(target, token, outcome="succeeded")


@way
async def body_too_large(open_house: Open) -> Message:
    house = await open_house(gate={"max_body_bytes": 10})
    return await house.execute(None)


@way
async def unsupported_media_type(open_house: Open) -> Message:
    return await (await open_house()).data("POST", EXECUTE, [], b"{}")


@way
async def invalid_scope(open_house: Open) -> Message:
    return await (await open_house()).ask_for_scope(intent=" ")


@way
async def upstream_unreachable(open_house: Open) -> Message:
    house = await open_house(upstream_port=unused_port())
    return await house.execute(await house.issue())


@way
async def upstream_failed(open_house: Open) -> Message:
    house = await open_house()
    house.backend.script = sends(then="reset")
    return await house.execute(await house.issue())


@way
async def upstream_timeout(open_house: Open) -> Message:
    house = await open_house()
    house.backend.script = sends(then="hang")
    return await house.execute(await house.issue(action="patient"))


@way
async def store_unavailable(open_house: Open) -> Message:
    house = await open_house()
    scope = await house.issue()
    house.database.unlink()
    return await house.execute(scope)


@way
async def policy_unavailable(open_house: Open) -> Message:
    return await (await open_house(policies=None)).execute(None)


@way
async def overloaded(open_house: Open) -> Message:
    house = await open_house(gate={"max_in_flight": 1})
    done = asyncio.Event()
    house.backend.script = replies(after=done)
    scope = await house.issue(max_attempts=2)
    executing = asyncio.create_task(house.execute(scope))
    await house.backend.arrived.wait()
    answer = await house.execute(scope)
    done.set()
    await executing
    return answer


@way
async def braked(open_house: Open) -> Message:
    once = Rule(id="once", on="execute", brake=Brake(cooldown_seconds=60))
    house = await open_house(policies=replace(POLICIES, rules=(once,)))
    scope = await house.issue(max_attempts=2)
    await house.execute(scope)
    return await house.execute(scope)


@way
async def reload_refused(open_house: Open) -> Message:
    house = await open_house()
    return await house.admin("POST", "/api/v1/reload")


@way
async def draining(open_house: Open) -> Message:
    house = await open_house()
    scope = await house.issue()
    house.sidecar.gate.draining = True
    return await house.execute(scope)


@way
async def not_listed(open_house: Open) -> Message:
    house = await open_house(gate={"unlisted": {"writes": "refuse"}})
    return await house.data("POST", "/elsewhere")


UNDER_A_KEY = [("Idempotency-Key", "the-action-1")]


@way
async def idempotency_in_flight(open_house: Open) -> Message:
    house = await open_house()
    done = asyncio.Event()
    house.backend.script = replies(after=done)
    scope = await house.issue()
    executing = asyncio.create_task(house.execute(scope, headers=UNDER_A_KEY))
    await house.backend.arrived.wait()
    answer = await house.execute(scope, headers=UNDER_A_KEY)
    done.set()
    await executing
    return answer


@way
async def outcome_unknown(open_house: Open) -> Message:
    house = await open_house()
    house.backend.script = sends(then="reset")
    scope = await house.issue()
    await house.execute(scope, headers=UNDER_A_KEY)
    return await house.execute(scope, headers=UNDER_A_KEY)


@way
async def idempotency_key_reused(open_house: Open) -> Message:
    house = await open_house()
    scope = await house.issue()
    await house.execute(scope, headers=UNDER_A_KEY)
    return await house.execute(scope, headers=UNDER_A_KEY, parameters={"another": True})


# A trusted proxy on loopback names the caller.
PROXY = {"header": "X-User", "trusted": ["127.0.0.1"]}
ANN = [("X-User", "ann")]
BY_NAME = replace(POLICIES, roles=Roles({"issuer": Holders(ids=("ann",)), "executor": Holders(ids=("ann",))}))


@way
async def unauthenticated(open_house: Open) -> Message:
    house = await open_house(policies=BY_NAME, auth={"proxy": PROXY})
    return await house.execute(None, headers=[*ANN, *ANN])


@way
async def auth_throttled(open_house: Open) -> Message:
    house = await open_house(policies=BY_NAME, auth={"proxy": PROXY})
    for _ in range(MOST_FAILURES):
        assert (await house.execute(None, headers=[*ANN, *ANN])).status == 401
    return await house.execute(None, headers=[*ANN, *ANN])


@way
async def role_required(open_house: Open) -> Message:
    house = await open_house(policies=BY_NAME, auth={"proxy": PROXY})
    return await house.execute(None, headers=[("X-User", "bob")])


@way
async def tenant_mismatch(open_house: Open) -> Message:
    house = await open_house(policies=BY_NAME, auth={"proxy": PROXY}, gate={"tenant_header": "X-Tenant"})
    return await house.execute(None, headers=[*ANN, ("X-Tenant", "acme")])


@way
async def executor_outside_scope(open_house: Open) -> Message:
    house = await open_house(policies=BY_NAME, auth={"proxy": PROXY})
    scope = await house.issue(headers=ANN, executors=["bob"])
    return await house.execute(scope, headers=ANN)


@way
async def credential_unavailable(open_house: Open) -> Message:
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"Bearer of-the-backend")
        file.flush()
        entry = {"header": "Authorization", "value_file": file.name}
        house = await open_house(upstream={"credentials": [entry]})
    await eventually(lambda: house.sidecar.custody.trouble is not None)
    return await house.execute(await house.issue())


@way
async def frozen(open_house: Open) -> Message:
    house = await open_house()
    scope = await house.issue()
    await house.admin("POST", "/api/v1/freezes", {"match": {}, "reason": "a test"})
    return await house.execute(scope)


@way
async def invalid_freeze(open_house: Open) -> Message:
    house = await open_house()
    return await house.admin("POST", "/api/v1/freezes", {"match": {}})


@way
async def freeze_not_found(open_house: Open) -> Message:
    house = await open_house()
    return await house.admin("DELETE", "/api/v1/freezes/none", {"reason": "a test"})


@pytest.mark.parametrize("code", sorted(WIRE))
async def test_each_code_has_its_status_its_members_and_its_record(open_house: Open, code: str) -> None:
    answer = await WAYS[code](open_house)
    assert answer.status == WIRE[code], answer.body
    assert answer.header("Content-Type") == "application/problem+json"
    body: dict[str, Any] = answer.json()
    assert set(body) >= FLAT | MEMBERS.get(code, set())
    assert (body["error"], body["status"]) == (code, WIRE[code])
    assert body["message"]
    if code == "decision_not_found":
        assert body["decision_id"] == "none"  # the one that was asked for
    else:
        assert ("decision_id" in body) == (code in RECORDED)
    if code in RECORDED:
        assert (answer.header("Scopegate-Decision-Id") == body["decision_id"]) == (code not in HELD)
    tells_when = answer.status in (429, 503) or code == "idempotency_in_flight"
    assert (answer.header("Retry-After") is not None) == tells_when
    assert (answer.header("Allow") is not None) == (answer.status == 405)


def test_the_table_in_the_code_is_the_table_of_the_spec() -> None:
    assert {code: kind.status for code, kind in ERRORS.items()} == WIRE | BEYOND
    assert set(WAYS) == set(WIRE)


async def test_pass_through_errors_are_problems_too(open_house: Open) -> None:
    house = await open_house(upstream_port=unused_port())
    answer = await house.data("GET", "/elsewhere")
    assert (answer.status, answer.json()["error"]) == (502, "upstream_unreachable")
    assert await house.records() == []


async def test_a_store_that_is_overloaded_says_so_to_whoever_asks_for_a_scope(
    open_house: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = await open_house()
    scope = await house.issue()
    monkeypatch.setattr(batch, "MAX_QUEUE", 0)
    for answer in (await house.execute(scope), await house.ask_for_scope()):
        assert (answer.status, answer.json()["error"]) == (503, "overloaded")
        assert answer.header("Retry-After")


async def test_our_own_bug_is_a_500_and_nothing_is_forwarded(
    open_house: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = await open_house()
    scope = await house.issue()

    async def bug(*args: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(house.sidecar.gate, "execute", bug)
    answer = await house.execute(scope)
    assert (answer.status, answer.json()["error"]) == (500, "internal_error")
    assert house.backend.seen == []
    assert (await house.data("GET", SCOPES + "inc_1")).status == 200
