"""The examples of routes that the README and the reference show gate what they say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from sidecar.core.policy import ActionPolicy, PolicySet, RiskClass
from sidecar.policies.files import load
from tests.client import Message
from tests.support import House, Open
from tests.unit.test_docs import README, ROOT, named_files

FILES = named_files("config/reference/routes.md")
CART = "/services/cart/restart"


def assert_refused(answer: Message, status: int, error: str) -> None:
    assert (answer.status, answer.json()["error"]) == (status, error)


async def scope_for(house: House, **terms: Any) -> list[tuple[str, str]]:
    """The two headers of a call under a scope."""
    granted = await house.issue(action="restart_service", **terms)
    return [("X-Recovery-Scope-Id", granted["scope_id"]), ("X-Recovery-Incident-Id", "inc_1")]


async def test_the_example_of_the_reference_gates_the_call_that_it_describes(
    open_house: Open, tmp_path: Path
) -> None:
    policies = tmp_path / "policies"
    policies.mkdir()
    (policies / "actions.yaml").write_text(FILES["shop-policies/actions.yaml"])
    house = await open_house(gate=yaml.safe_load(FILES["shop.yaml"])["gate"])
    house.adopt(load(policies))
    assert_refused(await house.data("POST", CART), 400, "scoped_execution_required")
    headers = await scope_for(house, target_agents=["cart"], max_attempts=2)
    assert_refused(await house.data("POST", "/services/shop/restart", headers), 403, "target_outside_scope")
    assert (await house.data("POST", CART, headers)).status == 200
    json = [*headers, ("Content-Type", "application/json")]
    assert (await house.data("POST", CART, json, b'{"force": true}')).status == 200
    assert [(one.target, one.body) for one in house.backend.executions] == [
        (CART, b""),
        (CART, b'{"force": true}'),
    ]
    assert_refused(await house.data("POST", CART, headers), 400, "scope_exhausted")
    # The action needs target agents, so a scope without them is not granted.
    assert (await house.ask_for_scope(action="restart_service")).status == 403


@pytest.mark.parametrize("body", [b"", b'{"a": 1}', b"a=1", b"\x00\xff"])
async def test_the_lines_of_the_readme_gate_a_call_whatever_its_body_is(
    open_house: Open, body: bytes
) -> None:
    (text,) = re.findall(r"^```yaml\n(gate:.+?)^```$", README, re.MULTILINE | re.DOTALL)
    house = await open_house(gate=yaml.safe_load(text)["gate"])
    house.adopt(PolicySet(revision="r", actions={"restart_service": ActionPolicy(risk=RiskClass.MEDIUM)}))
    kind = [("Content-Type", "application/octet-stream")] if body else []
    assert_refused(await house.data("POST", CART, kind, body), 400, "scoped_execution_required")
    headers = [*kind, *await scope_for(house, target_agents=["cart"])]
    assert (await house.data("POST", CART, headers, body)).status == 200
    assert [one.body for one in house.backend.executions] == [body]
    assert (await house.data("GET", "/services/cart")).status == 200


def documented(name: str) -> dict[str, Any]:
    """The example of the reference that has a route of this name, as the section gate."""
    page = (ROOT / "config/reference/routes.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```yaml\n(gate:\n  routes:.+?)^```$", page, re.MULTILINE | re.DOTALL)
    (gate,) = (yaml.safe_load(each)["gate"] for each in blocks if f"name: {name}\n" in each)
    return dict(gate)


@pytest.mark.parametrize(
    ("example", "action", "target", "call"),
    [
        ("delete-service", "restart-service", "cart", ("POST", f"{CART}/", [], b"")),
        ("delete-service", "delete-service", "cart", ("DELETE", "/services/cart", [], b"")),
        (
            "scale",
            "scale",
            "shop/cart",
            (
                "PATCH",
                "/apis/apps/v1/namespaces/shop/deployments/cart/scale",
                [("Content-Type", "application/merge-patch+json")],
                b'{"spec": {"replicas": 3}}',
            ),
        ),
    ],
)
async def test_the_other_examples_of_the_reference_admit_the_calls_that_clients_send(
    open_house: Open, example: str, action: str, target: str, call: tuple[str, str, list[Any], bytes]
) -> None:
    house = await open_house(gate=documented(example))
    house.adopt(PolicySet(revision="r", actions={action: ActionPolicy(risk=RiskClass.LOW)}))
    method, path, headers, body = call
    assert_refused(await house.data(method, path, headers, body), 400, "scoped_execution_required")
    granted = await house.issue(action=action, target_agents=[target])
    named = [("X-Recovery-Scope-Id", granted["scope_id"]), ("X-Recovery-Incident-Id", "inc_1")]
    assert (await house.data(method, path, [*headers, *named], body)).status == 200


async def test_the_methods_that_an_example_of_the_reference_lets_pass_do_pass(open_house: Open) -> None:
    house = await open_house(gate=documented("delete-service"))
    assert (await house.data("PUT", "/services/cart", [], b"")).status == 200
