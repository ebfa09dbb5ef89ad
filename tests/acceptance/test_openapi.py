"""Schemathesis holds a running sidecar to its OpenAPI document. Longer: tests/long/schemathesis_run.py."""

from __future__ import annotations

import asyncio

import pytest

from tests.fuzzing import ANY_ACTION, ELSEWHERE, furnish, run
from tests.support import Open

ADMITTED = {"POST /api/v1/recovery/execute", "POST /v1/incidents/{incident}/runs/{run}/heal"}
# And this one needs an execution that is unknown; the story below finds one.
RECONCILED = {"POST /api/v1/executions/{decision_id}/reconcile"}
# And this one needs the id of a scope, which another story grants first.
REVOKED = {"DELETE /api/v1/recovery/scopes/{id}"}
# And this one needs a token, which only a backend learns.
REPORTED = {"POST /api/v1/recovery/executions/{decision_id}/complete"}
# This one has no files that it could reload.
WITHOUT_FILES = {"POST /api/v1/reload"}


@pytest.mark.slow
async def test_every_call_does_what_the_document_says(open_house: Open) -> None:
    house = await open_house(policies=ANY_ACTION)
    await furnish(house)
    url = f"http://{house.sidecar.admin_address}/openapi.json"
    found = await asyncio.to_thread(run, url, examples=15, phases=("examples", "coverage", "fuzzing"))
    assert found.wrong == {}
    assert found.cases.keys() == {"examples", "coverage", "fuzzing"}
    assert found.cases.total() > 1_500
    # What is spent needs a scope that was granted; all else is reached by cases alone.
    beyond = ADMITTED | RECONCILED | REVOKED | REPORTED | WITHOUT_FILES
    assert {call for call in found.statuses if not found.succeeded(call)} <= beyond


@pytest.mark.slow
async def test_a_scope_that_was_granted_can_be_revoked(open_house: Open) -> None:
    house = await open_house(policies=ANY_ACTION)
    await furnish(house)
    url = f"http://{house.sidecar.admin_address}/openapi.json"
    only = ("createScope", "revokeScope")
    found = await asyncio.to_thread(run, url, examples=10, phases=("stateful",), only=only)
    assert found.wrong == {}
    assert all(found.succeeded(call) for call in REVOKED)


@pytest.mark.slow
async def test_an_unknown_execution_that_a_list_shows_can_be_reconciled(open_house: Open) -> None:
    house = await open_house(policies=ANY_ACTION)
    await furnish(house)
    url = f"http://{house.sidecar.admin_address}/openapi.json"
    only = ("listExecutions", "reconcile")
    found = await asyncio.to_thread(run, url, examples=10, phases=("stateful",), only=only)
    assert found.wrong == {}
    assert all(found.succeeded(call) for call in RECONCILED)


@pytest.mark.slow
async def test_it_does_so_in_another_configuration(open_house: Open) -> None:
    house = await open_house(**ELSEWHERE)
    url = f"http://{house.sidecar.admin_address}/openapi.json"
    found = await asyncio.to_thread(run, url, examples=5, phases=("coverage",))
    assert found.wrong == {}
    assert found.cases.total() > 500
