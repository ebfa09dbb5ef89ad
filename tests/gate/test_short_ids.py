"""Logs, traces and tables show a scope_id as `scope_` and its first eight characters, which commands take."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from sidecar.core.shortid import short_id
from sidecar.telemetry.events import LogEvent
from sidecar.telemetry.logs import set_up_logging
from sidecar.web.api import scopes as scope_api
from tests.acceptance.conftest import scopegate
from tests.collector import SERVER, Collector
from tests.support import SCOPES, Backend, House, Open, eventually, replies, sends

BY_PATH = {
    "path": "/agents/{scope}/retry",
    "action": "const:retry_agent",
    "body": ["empty"],
    "scope_id": "path:scope",
    "incident_id": "header:X-Incident",
}
EXECUTIONS = 6  # that the first test sends
UNKNOWN = f"scope_{'0123456789abcdef' * 2}"


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """What a process writes to standard error at the level DEBUG."""
    root, written = logging.getLogger(), io.StringIO()
    handlers, level = root.handlers[:], root.level
    set_up_logging("json", "DEBUG", written)
    yield written
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Collector() as running:
        yield running


def lines(log: io.StringIO, message: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in log.getvalue().splitlines()]
    return [line for line in found if line["message"] == message]


async def test_a_whole_scope_id_stands_in_answers_and_records_and_nowhere_else(
    open_house: Open, backend: Backend, collector: Collector, log: io.StringIO
) -> None:
    house = await open_house(
        gate={"routes": [{"path": "**/recovery/execute"}, BY_PATH]},
        telemetry={"otlp_endpoint": collector.url, "access_log": "all"},
    )
    scope = await house.issue(max_attempts=4)
    scope_id, short = scope["scope_id"], short_id(scope["scope_id"])
    hexed = "".join(f"%{ord(character):02X}" for character in scope_id)
    spelled = scope_id.replace("scope_", "scope%5F")
    assert (await house.execute(scope)).status == 200
    by_path = [("X-Incident", "inc_1"), ("Content-Length", "0")]
    assert (await house.data("POST", f"/agents/{scope_id}/retry", by_path)).status == 200
    backend.script = sends(b"", then="close")
    await house.execute(scope)  # its end is unknown
    backend.script = replies()
    assert (await house.execute(scope, incident_id="inc_2")).status == 403
    assert (await house.execute({**scope, "scope_id": UNKNOWN})).status == 404
    for passed in (scope_id, spelled, hexed, scope_id.upper(), f"{'x' * 490}/{scope_id}"):
        await house.data("GET", f"/reports/{passed}/x")
    await house.data("GET", SCOPES + scope_id)
    assert (await house.data("DELETE", SCOPES + hexed)).status == 200
    assert (await house.data("DELETE", SCOPES + UNKNOWN)).status == 404
    assert (await house.admin("GET", f"/api/v1/scopes/{scope_id}")).json()["scope_id"] == scope_id
    assert (await house.execute(scope)).status == 400
    records = await house.records()
    assert {"issued", "admitted", "settled", "refused", "revoked"} <= {record["event"] for record in records}
    assert {record["scope_id"] for record in records} >= {scope_id, UNKNOWN}
    await eventually(lambda: len(lines(log, "request")) >= 14)
    await asyncio.to_thread(
        collector.wait, lambda: sum(span.kind == SERVER for span in collector.spans) == EXECUTIONS
    )

    shown = [*log.getvalue().splitlines(), *(str(span) for span in collector.spans)]
    for spelling in (scope_id, spelled, hexed, scope_id.upper(), UNKNOWN, scope_id[:-1]):
        assert not [line for line in shown if spelling in line]
    assert {line["scope_id"] for line in lines(log, "refused")} == {short, short_id(UNKNOWN)}
    assert {line["scope_id"] for line in lines(log, "executed")} == {short}
    paths = [line["path"] for line in lines(log, "request")]
    assert SCOPES + hexed[: 3 * len(short)] in paths
    assert f"/reports/{short}/x" in paths
    attributes = [span.attributes for span in collector.spans]
    assert {one["scopegate.scope_id"] for one in attributes if "scopegate.scope_id" in one} == {
        short,
        short_id(UNKNOWN),
    }
    assert f"/agents/{short}/retry" in [one.get("url.path") for one in attributes]


def test_a_traceback_and_the_message_of_a_library_show_no_whole_id(log: io.StringIO) -> None:
    LogEvent.REQUEST_FAILED.log(exc=KeyError(UNKNOWN), path="/x")
    logging.getLogger("somebody").warning("no row %s", UNKNOWN)
    LogEvent.SETTLEMENT_WAITS.log(decision_id="d", cause=f"no row {UNKNOWN}")
    assert UNKNOWN not in log.getvalue()
    assert log.getvalue().count(short_id(UNKNOWN)) == 3


# Abbreviations --------------------------------------------------------------------------------------


async def command(house: House, *arguments: str) -> subprocess.CompletedProcess[str]:
    at = ("--admin", str(house.sidecar.admin_address))
    return await asyncio.to_thread(scopegate, *arguments, *at)


@pytest.fixture
def ids(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids of the next scopes."""
    ids: list[str] = []
    monkeypatch.setattr(scope_api, "new_scope_id", lambda: ids.pop(0))
    return ids


@pytest.fixture
async def house(open_house: Open) -> House:
    return await open_house(scopes={"serve_on": "admin"}, gate={"tenant_header": "X-Tenant"})


async def issue(house: House, ids: list[str], scope_id: str, tenant: str = "acme") -> None:
    ids.append(scope_id)
    wanted = {"incident_id": "inc_1", "action": "retry_agent", "intent": "a test"}
    answer = await house.admin("POST", "/api/v1/recovery/scope", wanted, [("X-Tenant", tenant)])
    assert (answer.status, answer.json()["scope_id"]) == (201, scope_id)


def made(beginning: str) -> str:
    return f"scope_{beginning:0<32}"


async def test_the_beginning_that_tables_show_names_a_scope_where_it_is_unique(
    house: House, ids: list[str]
) -> None:
    for beginning in ("0123456701", "0123456702", "01234567022", "76543210"):
        await issue(house, ids, made(beginning))
    listed = await command(house, "scopes", "list")
    assert [row.split()[0] for row in listed.stdout.splitlines()[1:]] == [
        "scope_76543210",
        *["scope_01234567"] * 3,
    ]
    shown = await command(house, "scopes", "show", "scope_76543210", "--json")
    assert json.loads(shown.stdout)["scope_id"] == made("76543210")
    plain = await command(house, "scopes", "show", "scope_76543210")
    assert "scope      scope_76543210\n" in plain.stdout
    for given in ("scope_01234567", "scope_0123456702"):
        several = await command(house, "scopes", "show", given)
        assert (several.returncode, several.stdout) == (1, "")
        assert f"{given} is not unique; name one of " in several.stderr
        assert "scope_01234567020, scope_01234567022" in several.stderr
    assert "scope_0123456701, " in (await command(house, "scopes", "show", "scope_01234567")).stderr
    one = await command(house, "scopes", "show", "scope_0123456701", "--json")
    assert json.loads(one.stdout)["scope_id"] == made("0123456701")
    about = await command(house, "decisions", "list", "--scope-id", "scope_76543210", "--json")
    assert [record["scope_id"] for record in json.loads(about.stdout)["decisions"]] == [made("76543210")]
    for given in ("scope_0123456", "scope_99999999", made("99999999")):
        none = await command(house, "scopes", "show", given)
        assert (none.returncode, none.stdout) == (1, "")
        assert "scope_not_found" in none.stderr


async def test_a_scope_of_another_tenant_makes_no_beginning_ambiguous(
    house: House, ids: list[str], tmp_path: Any
) -> None:
    await issue(house, ids, made("012345671"))
    await issue(house, ids, made("012345672"), tenant="other")
    config = tmp_path / "scopegate.yaml"
    config.write_text("upstream: {url: 'http://127.0.0.1:1'}\ngate: {tenant_header: X-Tenant}\n")
    asked = ("scopes", "revoke", "scope_01234567", "--config", str(config), "--tenant", "acme")
    ended = await command(house, *asked)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "revoked    scope_01234567\n" in ended.stdout
    states = {
        scope["scope_id"]: scope["status"]
        for scope in (await house.admin("GET", "/api/v1/scopes")).json()["scopes"]
    }
    assert states == {made("012345671"): "revoked", made("012345672"): "active"}


@pytest.mark.parametrize("prefix", ["", "scope_", "scope_0123456", "scope_0123456g", "01234567", "scope_%"])
async def test_a_list_takes_no_beginning_that_is_shorter_than_what_is_shown(
    house: House, prefix: str
) -> None:
    answer = await house.admin("GET", f"/api/v1/scopes?scope_id_prefix={prefix.replace('%', '%25')}")
    assert (answer.status, answer.json()["error"]) == (400, "invalid_request")
    assert answer.json()["member"] == "scope_id_prefix"
