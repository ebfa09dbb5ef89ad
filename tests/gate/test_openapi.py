"""The OpenAPI document and the sidecar that serves it: every route is in it, every answer is as it says."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest
from aiohttp import web

from sidecar import __version__
from sidecar.core.command import Emit
from sidecar.core.pattern import RoutePattern
from sidecar.core.policy import ActionPolicy, RiskClass
from sidecar.core.record import DecisionOutcome, DecisionType, Record
from sidecar.core.target import Gated, GatedPaths, classify
from sidecar.errors import ERRORS
from sidecar.gate.reports import COMPLETE, EXECUTIONS_PREFIX
from sidecar.web.api.docs import CONTENT_SECURITY_POLICY, FILES
from sidecar.web.api.scopes import SCOPE_PATH, SCOPES_PREFIX
from sidecar.web.api.scopetest import PREFIX, SUFFIX
from sidecar.web.wire.emittermodels import EMITTER_MODELS
from tests.client import Message, as_json, ask
from tests.described import DOCUMENT, METHODS, STRANGE, Described, described
from tests.gate.test_errors import WAYS, WIRE
from tests.support import EXECUTE, POLICIES, SCOPE, SCOPES, Backend, House, Open, replies, sends

# Routes -------------------------------------------------------------------------------------------------


def unnamed(path: str) -> str:
    return re.sub(r"\{\w+\}", "{}", path)


def routes_of(application: web.Application) -> set[tuple[str, str]]:
    """Method and path of every route; HEAD goes with GET, and * is every method that is described."""
    found: set[tuple[str, str]] = set()
    for route in application.router.routes():
        assert route.resource is not None
        path = route.resource.canonical
        kinds = EMITTER_MODELS if "{kind}" in path else [""]
        for kind in kinds:
            found.add((route.method.lower(), unnamed(path.replace("{kind}", kind))))
    return {
        (method, path)
        for method, path in found
        if (method, path) != ("head", path) or ("get", path) not in found
    }


def served_by(document: Described, url: str) -> set[tuple[str, str]]:
    """Method and path of every call that the document has on one listener."""
    return {
        (method, unnamed(path))
        for path, method, _ in document.operations()
        if document.document["paths"][path]["servers"][0]["url"] == url
    }


@pytest.mark.parametrize("serve_on", ["data", "admin"])
async def test_the_routes_and_the_document_are_the_same(open_house: Open, serve_on: str) -> None:
    house = await open_house(scopes={"serve_on": serve_on})
    document = await described(house)
    on_admin = served_by(document, "/")
    routed = routes_of(house.sidecar._admin.application())
    any_method = {path for method, path in routed if method == "*"}
    assert any_method == (
        {unnamed(path) for path in (SCOPE_PATH, SCOPES_PREFIX + "{id}", f"{PREFIX}{{id}}{SUFFIX}")}
        if serve_on == "admin"
        else set()
    )
    assert {each for each in on_admin if each[1] not in any_method} == {
        each for each in routed if each[1] not in any_method
    }
    assert any_method <= {path for _, path in on_admin}
    on_ops = served_by(document, f"http://{house.sidecar.ops_address}")
    assert on_ops == routes_of(house.sidecar._ops.application())


async def test_the_data_listener_serves_what_the_document_says(house: House) -> None:
    document = await described(house)
    found = served_by(document, f"http://{house.sidecar.data_address}")
    paths = GatedPaths([RoutePattern.parse("**/recovery/execute")])
    assert isinstance(classify("POST", EXECUTE, (), True, paths), Gated)
    assert found == {
        ("post", SCOPE),
        *((method, SCOPES + "{}") for method in ("get", "delete")),
        ("post", f"{PREFIX}{{}}{SUFFIX}"),
        ("post", f"{EXECUTIONS_PREFIX}{{}}{COMPLETE}"),
        *((method, EXECUTE) for method in ("get", "head", "options", "post")),
    }
    for method in METHODS:  # those that are not described are not served
        for path in {path for _, path in found}:
            if (method, path) not in found:
                answer = await house.data(method.upper(), path.replace("{}", "x"))
                assert answer.status == 405, (method, path)
                allowed = {each.lower() for each in (answer.header("Allow") or "").split(", ")}
                assert allowed == {each for each, at in found if at == path}


async def test_other_paths_and_methods_answer_as_the_document_says(house: House) -> None:
    document = await described(house)
    shared = document.document["components"]["responses"]
    for address in (house.sidecar.admin_address, house.sidecar.ops_address):
        document.assert_described(shared["NotFound"], await ask(address, "GET", "/nothing"))
    document.assert_described(shared["MethodNotAllowed"], await house.admin("DELETE", "/api/v1/status"))
    document.assert_described(shared["MethodNotAllowed"], await house.data("PUT", SCOPE))


# Answers ------------------------------------------------------------------------------------------------

Walk = Callable[[House], Awaitable[Message]]


async def an_unknown(house: House) -> str:
    """The decision_id of an execution whose answer was lost."""
    house.backend.script = sends(then="reset")
    lost = await house.execute(await house.issue())
    house.backend.script = replies()
    decision_id: str = lost.json()["decision_id"]
    return decision_id


async def a_report(house: House) -> Message:
    target, token = await house.running()
    return await house.report(target, token, outcome="succeeded", cost_usd=0.5, detail="all of it")


async def a_page(house: House, path: str) -> Message:
    """A list with something of everything in it."""
    await house.execute(await house.issue(target_agents=["a"]), target_agents=["a"], parameters={"n": 0.5})
    await house.execute(None)
    await an_unknown(house)
    return await house.admin("GET", path)


async def a_decision(house: House) -> Message:
    answer = await house.execute(await house.issue())
    return await house.admin("GET", f"/api/v1/decisions/{answer.header('Scopegate-Decision-Id')}")


async def a_scope(house: House) -> Message:
    """With an execution in it."""
    scope = await house.issue()
    await house.execute(scope)
    return await house.admin("GET", f"/api/v1/scopes/{scope['scope_id']}")


async def a_reconciliation(house: House) -> Message:
    path = f"/api/v1/executions/{await an_unknown(house)}/reconcile"
    return await house.admin("POST", path, {"outcome": "executed", "cost_usd": 0.04})


async def an_execution(house: House) -> Message:
    return await house.execute(await house.issue())


async def a_revocation(house: House) -> Message:
    return await house.revoke(await house.issue())


async def a_list_of_scopes(house: House) -> Message:
    await house.execute(await house.issue())
    return await house.data("GET", SCOPES + "inc_1")


async def a_rehearsal(house: House) -> Message:
    kind, body = as_json({"action_type": "retry", "risk_class": "low", "scope_type": "request_sample"})
    return await house.data("POST", f"{PREFIX}c{SUFFIX}", kind, body)


async def explained(house: House) -> Message:
    kind, body = house.execution(await house.issue())
    return await ask(house.sidecar.admin_address, "POST", "/api/v1/explain", kind, body)


def looks(path: str) -> Walk:
    async def look(house: House) -> Message:
        return await house.admin("GET", path)

    return look


def asks_ops(path: str) -> Walk:
    async def look(house: House) -> Message:
        return await ask(house.sidecar.ops_address, "GET", path)

    return look


def passes(method: str) -> Walk:
    async def pass_through(house: House) -> Message:
        return await house.data(method, EXECUTE)

    return pass_through


def tells(kind: str, name: str) -> Walk:
    """The example of the document, told."""

    async def tell(house: House) -> Message:
        return await house.admin("POST", f"/api/v1/decisions/{kind}", DOCUMENT.example(name))

    return tell


def turns(method: str) -> Walk:
    async def turn(house: House) -> Message:
        return await house.admin(method, "/api/v1/care/kill-switch")

    return turn


async def accepts_the_clock(house: House) -> Message:
    return await house.admin("POST", "/api/v1/store/accept-clock")


async def reloads(house: House) -> Message:
    return await house.admin("POST", "/api/v1/reload")


FREEZE = {"match": {"action": "a*"}, "except": {"principal": ["x"]}, "reason": "a test"}


async def frozen(house: House) -> Message:
    await house.admin("POST", "/api/v1/freezes", FREEZE)
    return await house.admin("GET", "/api/v1/freezes?all=true")


async def a_lifting(house: House) -> Message:
    made = await house.admin("POST", "/api/v1/freezes", FREEZE)
    return await house.admin("DELETE", f"/api/v1/freezes/{made.json()['freeze_id']}", {"reason": "over"})


WALKS: dict[str, tuple[Walk, int]] = {
    "createScope": (lambda house: house.ask_for_scope(), 201),
    "listScopes": (a_list_of_scopes, 200),
    "revokeScope": (a_revocation, 200),
    "testScope": (a_rehearsal, 200),
    "execute": (an_execution, 200),
    **{f"{method.lower()}Execute": (passes(method), 200) for method in ("GET", "HEAD", "OPTIONS")},
    "listDecisions": (lambda house: a_page(house, "/api/v1/decisions"), 200),
    "getDecision": (a_decision, 200),
    "listAllScopes": (lambda house: a_page(house, "/api/v1/scopes?status=exhausted"), 200),
    "getScope": (a_scope, 200),
    "listExecutions": (lambda house: a_page(house, "/api/v1/executions"), 200),
    "reconcile": (a_reconciliation, 200),
    "reportExecution": (a_report, 200),
    "explain": (explained, 200),
    "backfill": (lambda house: house.admin("POST", "/api/v1/runs/run_1/backfill", {"request_id": "r"}), 200),
    **{
        name: (tells(kind, name), 201)
        for kind in EMITTER_MODELS
        for name in (f"tell{kind.title().replace('_', '')}",)
    },
    "getKillSwitch": (turns("GET"), 200),
    "turnKillSwitchOn": (turns("PUT"), 200),
    "turnKillSwitchOff": (turns("DELETE"), 200),
    "getStatus": (looks("/api/v1/status"), 200),
    "setFreeze": (lambda house: house.admin("POST", "/api/v1/freezes", FREEZE), 201),
    "listFreezes": (frozen, 200),
    "liftFreeze": (a_lifting, 200),
    "acceptClock": (accepts_the_clock, 200),
    "reload": (reloads, 409),  # nothing was read from files here; acceptance/test_reload.py has the rest
    "getDocument": (looks("/openapi.json"), 200),
    "getPage": (looks("/docs"), 200),
    "getPageElsewhere": (looks("/docs/"), 308),
    "getRoot": (looks("/"), 308),
    "getPageFile": (looks("/docs/page.css"), 200),
    "getLiveness": (asks_ops("/health/live"), 200),
    "getReadiness": (asks_ops("/health/ready"), 200),
    "getMetrics": (asks_ops("/metrics"), 200),
}


@pytest.mark.parametrize("name", WALKS)
async def test_every_call_answers_as_the_document_says(house: House, name: str) -> None:
    walk, status = WALKS[name]
    answer = await walk(house)
    assert answer.status == status, answer.body
    (await described(house)).assert_answered(name, answer)


async def test_no_call_of_the_document_is_left_out(house: House) -> None:
    assert set(WALKS) == (await described(house)).names


@pytest.mark.parametrize("code", sorted(WIRE))
async def test_every_problem_is_as_the_document_says(open_house: Open, code: str) -> None:
    answer = await WAYS[code](open_house)
    responses = [
        *(each for _, _, operation in DOCUMENT.operations() for each in operation["responses"].values()),
        *DOCUMENT.document["components"]["responses"].values(),
    ]
    those = [
        response
        for response in responses
        if code in response.get("content", {}).get("application/problem+json", {}).get("examples", {})
    ]
    assert those
    for response in those:
        DOCUMENT.assert_described(response, answer)
    assert set(ERRORS[code].members) <= set(answer.json())
    assert ERRORS[code].status == answer.status


async def test_what_was_told_already_is_answered_null(house: House) -> None:
    for status in (201, 200):
        answer = await tells("budget_enforcement", "tellBudgetEnforcement")(house)
        assert answer.status == status
        (await described(house)).assert_answered("tellBudgetEnforcement", answer)
    assert answer.json() is None


async def test_a_record_that_a_program_named_is_as_the_document_says(house: House) -> None:
    record = Record(
        decision_id="mine 1",
        decision_type=DecisionType.BUDGET,
        decision_outcome=DecisionOutcome.SELECTED,
        decided_at=1,
        details={"any": [1, None, {"x": 0.5}]},
    )
    await house.sidecar.store.submit(Emit(record=record, origin="library"))
    answer = await house.admin("GET", "/api/v1/decisions/mine%201")
    assert (answer.status, answer.json()["decision_id"]) == (200, "mine 1")
    DOCUMENT.assert_answered("getDecision", answer)
    DOCUMENT.assert_answered("listDecisions", await house.admin("GET", "/api/v1/decisions"))


async def test_readiness_that_is_none_is_as_the_document_says(open_house: Open) -> None:
    house = await open_house(policies=None)
    answer = await ask(house.sidecar.ops_address, "GET", "/health/ready")
    assert answer.status == 503
    DOCUMENT.assert_answered("getReadiness", answer)


# Bodies, where more than the model decides --------------------------------------------------------------


@pytest.mark.parametrize(
    "member", ["max_attempts", "ttl_seconds", "max_cost_usd", "allowed_actions", "action"]
)
async def test_a_scope_is_granted_if_and_only_if_the_schema_allows_its_terms(
    open_house: Open, member: str
) -> None:
    house = await open_house(policies=replace(POLICIES, unlisted=ActionPolicy(risk=RiskClass.LOW)))
    schema = (await described(house)).validator({"$ref": "#/components/schemas/ScopeRequest"})
    for value in STRANGE:
        body = {"incident_id": "i", "intent": "why", member: value}
        if member not in ("allowed_actions", "action"):
            body["action"] = "a"
        answer = await house.data("POST", SCOPE, *as_json(body))
        assert (answer.status == 201) == schema.is_valid(body), (body, answer.body)


@pytest.mark.parametrize(
    ("name", "path", "member"),
    [
        ("testScope", f"{PREFIX}c{SUFFIX}", "parameters"),
        ("tellCareOptimization", "/api/v1/decisions/care_optimization", "signals_used"),
    ],
)
async def test_a_body_is_taken_if_and_only_if_the_schema_allows_it(
    open_house: Open, name: str, path: str, member: str
) -> None:
    house = await open_house(scopes={"serve_on": "admin"})
    content = DOCUMENT.operation(name)["requestBody"]["content"]["application/json"]
    schema, whole = DOCUMENT.validator(content["schema"]), DOCUMENT.example(name)
    for value in STRANGE:
        body = {**whole, member: value}
        answer = await house.admin("POST", path, body)
        assert (answer.status < 300) == schema.is_valid(body), (body, answer.body)


async def test_explain_takes_whatever_comes(house: House) -> None:
    document = await described(house)
    for body in (b"", b"[]", b'{"scope_id": 7}', b"\xff", b'{"action": "a"}'):
        for kind in ("application/json", "text/plain"):
            headers = [("Content-Type", kind)]
            answer = await ask(house.sidecar.admin_address, "POST", "/api/v1/explain", headers, body)
            assert answer.status == 200
            document.assert_answered("explain", answer)


# The document and the page ------------------------------------------------------------------------------


async def test_the_document_is_served_for_this_version_and_these_listeners(house: House) -> None:
    document = (await house.admin("GET", "/openapi.json")).json()
    assert document["info"]["version"] == __version__
    assert [server["url"] for server in document["servers"]] == [
        "/",
        f"http://{house.sidecar.data_address}",
        f"http://{house.sidecar.ops_address}",
    ]
    assert (await house.admin("GET", "/openapi.json")).body == (
        await house.admin("GET", "/openapi.json")
    ).body


async def test_the_page_and_its_files_may_load_nothing_from_elsewhere(house: House) -> None:
    for path, kind in {
        "/docs": "text/html; charset=utf-8",
        **{f"/docs/{n}": k for n, k in FILES.items()},
    }.items():
        answer = await house.admin("GET", path)
        assert (answer.status, answer.header("Content-Type")) == (200, kind), path
        assert answer.header("Content-Security-Policy") == CONTENT_SECURITY_POLICY
        assert answer.header("X-Content-Type-Options") == "nosniff"
        assert answer.header("Referrer-Policy") == "no-referrer"
        assert answer.body
        head = await house.admin("HEAD", path)
        assert (head.status, head.header("Content-Length")) == (200, str(len(answer.body)))
    rules = dict(rule.split(" ", 1) for rule in CONTENT_SECURITY_POLICY.split("; "))
    assert rules["default-src"] == "'none'"
    assert rules["style-src"] == "'self'"
    assert not rules.keys() & {"script-src", "connect-src"}
    assert {rules[name] for name in ("frame-ancestors", "base-uri", "form-action")} == {"'none'"}


async def test_the_page_has_one_address(house: House) -> None:
    answer = await house.admin("GET", "/docs/")
    assert (answer.status, answer.header("Location")) == (308, "/docs")


@pytest.mark.parametrize(
    "name", ["nothing.js", "README.md", "index.html", "..%2Fdocs.py", "%2e%2e/docs.py", "docs.py"]
)
async def test_nothing_else_is_served_beside_the_page(house: House, name: str) -> None:
    answer = await house.admin("GET", f"/docs/{name}")
    assert (answer.status, answer.json()["error"]) == (404, "not_found")


async def test_the_data_and_the_ops_listener_do_not_serve_the_document(
    house: House, backend: Backend
) -> None:
    for path in ("/openapi.json", "/docs"):
        assert (await ask(house.sidecar.ops_address, "GET", path)).status == 404
        assert (await house.data("GET", path)).json() == {"done": True}
    assert [message.target for message in backend.seen] == ["/openapi.json", "/docs"]
