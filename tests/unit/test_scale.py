"""The databases of `tests.bench.scale`: they verify, and answer every prepared request and page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sidecar.core.policy import ActionPolicy, PolicySet, RiskClass
from sidecar.store.verify import verify_sqlite
from tests.bench import load, scale
from tests.bench.processes import BenchError
from tests.support import opened, serving_backend

POLICIES = PolicySet(revision="r", actions={load.ACTION: ActionPolicy(risk=RiskClass.LOW)})
SCOPES = 2_500  # more than two batches

pytestmark = pytest.mark.slow


async def test_a_built_database_verifies_and_serves_every_prepared_request_and_page(tmp_path: Path) -> None:
    database = tmp_path / "gate.db"
    done: list[int] = []
    await scale.build(database, SCOPES, done.append)
    assert sum(done) == SCOPES
    assert verify_sqlite(database).records == SCOPES * scale.RECORDS_PER_SCOPE

    asked, pages = scale.requests(database, 5), scale.pages(database)
    async with serving_backend() as backend, opened(tmp_path, backend, policies=POLICIES) as house:
        for path in pages:
            assert (await house.admin("GET", path)).status == 200, path
        for request in (request for each in asked.values() for request in each):
            body = json.loads(request.body)
            granted = {**body, "allowed_actions": [body["action"]]}
            assert (await house.execute(granted)).status == 200
    assert verify_sqlite(database).records == (SCOPES + 10) * scale.RECORDS_PER_SCOPE


def test_a_disk_that_is_too_small_is_named_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="GB are needed"):
        scale.build_all(tmp_path, 10**12, 1)
    assert list(tmp_path.iterdir()) == []


def test_a_database_that_is_there_is_not_built_over(tmp_path: Path) -> None:
    scale.build_all(tmp_path, 20, 10)
    with pytest.raises(BenchError, match="is there already"):
        scale.build_all(tmp_path, 20, 10)
    assert sorted(file.name for file in tmp_path.iterdir()) == [scale.BIG, scale.SMALL]
