"""Stubs of the interfaces that have presets, and the calls that are tried on them.

`tests/cases/presets/NAME.yaml` describes one interface. `answers` are its endpoints, and the first that
matches answers: method and path, where `{x}` is one segment and `{x...}` the rest, and perhaps a header.
`slash: redirect` answers 301 to a path that lacks the slash at its end, as Django does. Anything else is
answered with `otherwise`. The stub listens on a real socket and keeps every request as it came.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode

from sidecar.core.policy import ActionPolicy, PolicySet, RiskClass
from tests.client import Message
from tests.support import House, Script

# Every action is known, and needs a scope.
POLICIES = PolicySet(revision="rev-1", actions={}, unlisted=ActionPolicy(risk=RiskClass.HIGH))
SCOPE, INCIDENT = "X-Recovery-Scope-Id", "X-Recovery-Incident-Id"
JSON = "application/json"
FORM = "application/x-www-form-urlencoded"


@dataclass(frozen=True)
class Call:
    """One call of an interface as a case writes it, and what the case says of it."""

    method: str
    target: str
    headers: tuple[tuple[str, str], ...]
    body: bytes | None
    case: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, case: Mapping[str, Any] | str) -> Call:
        """A case is a map with `call`, or `METHOD TARGET` alone."""
        given: Mapping[str, Any] = {"call": case} if isinstance(case, str) else case
        method, _, target = given["call"].partition(" ")
        kind, body = given.get("type"), None
        if "json" in given:
            kind, body = kind or JSON, json.dumps(given["json"]).encode()
        elif "form" in given:
            kind, body = kind or FORM, urlencode(given["form"]).encode()
        elif "body" in given:
            body = given["body"].encode()
        elif method == "POST":
            body = b""  # clients send Content-Length: 0
        headers = [*given.get("headers", {}).items(), *([("Content-Type", kind)] if kind else [])]
        return cls(method, target, tuple(headers), body, given)

    def __str__(self) -> str:
        return f"{self.method} {self.target}"


def stub(interface: Mapping[str, Any]) -> Script:
    """The script of a backend that answers as an interface does."""
    rows = [(_pattern(row["to"]), row) for row in interface["answers"]]

    def answer(request: Message) -> Mapping[str, Any]:
        asked = f"{request.method} {request.target.partition('?')[0]}"
        for pattern, row in rows:
            wanted = row.get("header", {})
            if pattern.fullmatch(asked) and all(
                request.header(name) == text for name, text in wanted.items()
            ):
                return dict(row)
        if interface.get("slash") == "redirect" and any(row.fullmatch(asked + "/") for row, _ in rows):
            path, question, query = request.target.partition("?")
            return {"status": 301, "headers": {"Location": path + "/" + question + query}}
        return dict(interface["otherwise"])

    async def script(request: Message, writer: asyncio.StreamWriter) -> None:
        row = answer(request)
        body = json.dumps(row["json"]).encode() if "json" in row else row.get("text", "").encode()
        kind = [("Content-Type", interface.get("type", JSON))] if body else []
        lines = [f"{name}: {value}" for name, value in [*kind, *row.get("headers", {}).items()]]
        if row["status"] not in (204, 304):
            lines.append(f"Content-Length: {len(body)}")
        head = "\r\n".join([f"HTTP/1.1 {row['status']} Stub", *lines, "", ""]).encode()
        writer.write(head if request.method == "HEAD" else head + body)

    return script


def _pattern(endpoint: str) -> re.Pattern[str]:
    """`POST|PUT /a/{x}/b` as a pattern of method and path."""
    methods, _, path = endpoint.partition(" ")
    parts = re.split(r"(\{[^}]*\})", path)
    found = (
        (".+" if part.endswith("...}") else "[^/]+") if part.startswith("{") else re.escape(part)
        for part in parts
    )
    return re.compile(f"(?:{methods}) {''.join(found)}")


# Trying a call ------------------------------------------------------------------------------------------


async def through(house: House, call: Call, *more: tuple[str, str]) -> Message:
    return await house.data(call.method, call.target, [*call.headers, *more], call.body)


async def granted(house: House, call: Call, **other: Any) -> tuple[tuple[str, str], dict[str, Any]]:
    """The header of a scope for a call, and the scope."""
    agents = call.case.get("agents")
    wanted = {"action": call.case["action"], **({"target_agents": agents} if agents else {}), **other}
    scope = await house.issue(**wanted)
    return (SCOPE, scope["scope_id"]), scope


async def is_refused_without_a_scope_of_its_own(house: House, call: Call) -> None:
    """A call is refused without a scope, an incident, or a scope for its action, target and incident."""
    at_inc_1 = (INCIDENT, "inc_1")
    (mine, _), (of_another_action, _), (of_another_agent, _) = await asyncio.gather(
        granted(house, call),
        granted(house, call, action="another.action"),
        granted(house, call, target_agents=["another-agent"]),
    )
    cases = (
        ([at_inc_1], "scoped_execution_required"),
        ([at_inc_1, of_another_action], "action_outside_scope"),
        ([at_inc_1, of_another_agent], "target_outside_scope"),
        ([(INCIDENT, "inc_2"), mine], "incident_mismatch"),
        ([mine], "invalid_request"),
    )
    answers = await asyncio.gather(*(through(house, call, *headers) for headers, _ in cases))
    for refused, (_, error) in zip(answers, cases, strict=True):
        if call.method == "HEAD":
            assert refused.status >= 400
        else:
            assert refused.json()["error"] == error, refused.body
            assert refused.json()["route"] == call.case["route"]
    assert house.backend.seen == []


async def arrives_and_is_recorded(house: House, call: Call) -> None:
    """With its scope a call arrives as it was sent, and its record has the facts that the case names."""
    case = call.case
    mine, scope = await granted(house, call)
    answer = await through(house, call, mine, (INCIDENT, "inc_1"))
    assert answer.status == case["status"], answer.body
    (arrived,) = house.backend.seen
    assert (arrived.method, arrived.target) == (call.method, call.target)
    assert arrived.body == (call.body or b"")
    assert set(call.headers) <= set(arrived.raw_headers)

    decision_id = answer.header("Scopegate-Decision-Id")
    assert decision_id is not None
    record = await house.record(decision_id)
    inputs = record["decision_inputs"]
    assert record["details"]["route"] == case["route"]
    assert (record["scope_id"], record["incident_id"]) == (scope["scope_id"], "inc_1")
    assert record["action"] == case["action"]
    assert inputs.get("target_agents", []) == case.get("agents", [])
    parameters = inputs.get("parameters", {})
    assert parameters == case.get("parameters", parameters)
    # The execution is settled before its answer goes to the client.
    ends = case.get("ends", "answered")
    assert record["execution"]["status"] == ends
    if ends == "not_executed":
        assert (await house.scope(scope))["attempts_remaining"] == 1
