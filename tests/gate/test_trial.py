"""A trial finds what the data listener finds: the same requests, once tried and once sent."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sidecar.core.facts import Claims
from sidecar.live.snapshot import Snapshot
from sidecar.settings.reading import default
from sidecar.web.data.trial import tried
from tests.client import HeaderList, as_json, request_bytes
from tests.corpus import cases
from tests.support import EXECUTE, SCOPE, Open

JSON, EMPTY = as_json({})
FORM = [("Content-Type", "application/x-www-form-urlencoded")]
ROUTES: list[dict[str, Any]] = [
    {"path": "**/recovery/execute"},
    {"path": "/services/{name}/run", "target_agents": "path:name"},
    {
        "name": "stop",
        "path": ["/jobs/{job}/stop", "/jobs/{job}/stop/"],
        "body": ["form", "empty"],
        "incident_id": "form:incident",
        "target_agents": "path:job",
    },
    {"name": "delete", "path": "/jobs/{job}", "methods": ["DELETE"], "body": "any"},
    {"name": "delete-all", "path": "/jobs/all", "methods": "DELETE", "body": "empty"},
    {"name": "build", "path": "/jobs/{job}/build", "methods": ["GET", "POST"], "body": "empty"},
]
REQUESTS: list[tuple[str, str, HeaderList, bytes | None]] = [
    ("POST", EXECUTE, (), None),
    ("POST", EXECUTE, JSON, EMPTY),
    ("POST", EXECUTE, JSON, b'{"action": 1}'),
    ("POST", EXECUTE, JSON, b"{"),
    ("POST", EXECUTE, JSON, b'{"Action": "a"}'),
    ("POST", EXECUTE, [("Content-Type", "text/plain")], b"{}"),
    ("POST", EXECUTE, [*JSON, ("Content-Encoding", "gzip")], b"{}"),
    ("POST", EXECUTE, [*JSON, ("Host", "")], b"{}"),
    ("POST", EXECUTE + "?%ff", JSON, EMPTY),
    ("POST", EXECUTE + "/", JSON, EMPTY),
    ("POST", EXECUTE.replace("/", "//"), JSON, EMPTY),
    ("POST", EXECUTE.upper(), JSON, EMPTY),
    ("PUT", EXECUTE, JSON, EMPTY),
    ("GET", EXECUTE, (), None),
    ("GET", EXECUTE, JSON, EMPTY),
    ("GET", EXECUTE, [("X-HTTP-Method-Override", "POST")], None),
    ("GET", EXECUTE, [("Connection", "Upgrade"), ("Upgrade", "websocket")], None),
    ("POST", "/agents", [("X-Rewrite-URL", EXECUTE)], None),
    ("POST", "/agents", JSON, EMPTY),
    ("GET", "/agents", (), None),
    ("GET", "/healthz", (), None),
    ("GET", "/healthz", [("X-Original-URL", "/agents")], None),
    ("POST", "/agents", [("Host", "a b")], None),
    ("POST", "/services/cart/run", JSON, EMPTY),
    ("POST", "/services//run", JSON, EMPTY),
    ("POST", "/services/a%2Fb/run", JSON, EMPTY),
    ("POST", "/jobs/7/stop", (), None),
    ("POST", "/jobs/7/stop/", (), b""),
    ("POST", "/jobs/7/stop", JSON, b"[]"),
    ("POST", "/jobs/7/stop", FORM, b"job=7"),
    ("POST", "/jobs/7/stop", [*FORM, ("Idempotency-Key", "short")], b"incident=inc_1"),
    ("POST", "/jobs/7/stop?incident=x", FORM, b"incident=inc_1"),
    ("DELETE", "/jobs/7", (), None),
    ("DELETE", "/jobs/a%2fb", (), None),
    ("DELETE", "/jobs/all", (), None),
    ("PATCH", "/jobs/7", JSON, EMPTY),
    ("GET", "/jobs/7", (), None),
    ("HEAD", "/jobs/7/build", (), None),
    ("GET", "/jobs/7/build", (), None),
    ("BREW", "/agents", (), None),
    ("CONNECT", "agents:80", (), None),
]


@pytest.mark.parametrize("unlisted", ["refuse", pytest.param("record", marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", REQUESTS, ids=lambda case: f"{case[0]} {case[1]}")
async def test_what_is_tried_ends_as_it_does_when_it_is_sent(
    case: tuple[str, str, HeaderList, bytes | None], unlisted: str, open_house: Open
) -> None:
    method, target, headers, body = case
    house = await open_house(
        gate={"routes": ROUTES, "unlisted": {"reads": unlisted, "writes": unlisted, "except": ["/healthz"]}}
    )
    trial = await tried(request_bytes(method, target, headers, body), house.sidecar.live.snapshot)
    sent = await house.data(method, target, headers, body)
    passed = bool(house.backend.seen)
    assert passed == (not trial.is_gated and trial.refusal is None)
    if passed:
        return
    if method == "HEAD":
        assert sent.status >= 400
        return
    error = sent.json()["error"]
    if trial.refusal is not None:
        assert error == trial.refusal.code
    else:
        # Only the decision itself is left.
        assert error in ("scoped_execution_required", "invalid_request")
        assert trial.claims is not None


async def test_the_claims_of_a_trial_are_those_of_the_record(open_house: Open) -> None:
    house = await open_house()
    scope = await house.issue(target_agents=["a"])
    headers, body = house.execution(scope, target_agents=["a"], parameters={"wait": 1})
    trial = await tried(request_bytes("POST", EXECUTE, headers, body), house.sidecar.live.snapshot)
    assert trial.claims == Claims(
        scope_id=scope["scope_id"],
        incident_id="inc_1",
        action="retry_agent",
        parameters={"wait": 1},
        target_agents=("a",),
        body_bytes=len(body),
    )
    answer = await house.data("POST", EXECUTE, headers, body)
    assert answer.status == 200
    record = await house.record(answer.headers("Scopegate-Decision-Id")[0])
    assert record["scope_id"] == trial.claims.scope_id
    assert json.loads(body)["action"] == record["action"]


async def test_a_trial_leaves_nothing_behind(open_house: Open) -> None:
    house = await open_house()
    before = await house.records()
    await tried(request_bytes("POST", EXECUTE, JSON, EMPTY), house.sidecar.live.snapshot)
    assert await house.records() == before
    assert (await tried(request_bytes("POST", SCOPE, JSON, EMPTY), house.sidecar.live.snapshot)).is_own_call


async def test_each_request_of_the_corpus_is_tried_with_the_verdict_that_it_is_owed() -> None:
    gate = {"routes": [{"path": "**/recovery/execute"}], "body_timeout_seconds": 0.5}
    snapshot = Snapshot(default("http://127.0.0.1:1", gate=gate), None)
    wrong, count = [], 0
    for case in cases():
        # What the scope does not allow is decided by the store. A raw case may hold several requests.
        if case.made is None or case.kind == "what the scope does not allow":
            continue
        trial = await tried(case.bytes_for("scope_1"), snapshot)
        if trial.refusal is not None:
            verdict = trial.refusal.code
        else:
            verdict = "own" if trial.is_own_call else "judged" if trial.is_gated else "passes"
        count += 1
        if verdict not in case.owed:
            wrong.append(f"{case}: {verdict}, not {case.owed}")
    assert wrong == []
    assert count > 800
