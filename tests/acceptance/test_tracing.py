"""A trace from the client to the backend, through the real program, as a collector sees it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sidecar import __version__
from sidecar.settings.reading import Listen
from tests.acceptance.conftest import Program, write_configuration
from tests.client import HeaderList, Message, as_json, ask
from tests.collector import CLIENT, INTERNAL, SERVER, Collector, Seen
from tests.support import EXECUTE, SCOPE, Backend, replies, unused_port

pytestmark = pytest.mark.slow

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED = ("traceparent", f"00-{TRACE}-{SPAN}-01")
UNSAMPLED = ("traceparent", f"00-{TRACE}-{SPAN}-00")
STATE = ("tracestate", "vendor=abc,other=1")


@pytest.fixture
def sidecar(tmp_path: Path, backend: Backend, collector: Collector) -> Iterator[Program]:
    with Program(configured(tmp_path, backend, collector.url)) as running:
        yield running


def configured(folder: Path, backend: Backend, endpoint: str, **sections: Any) -> Path:
    assert isinstance(backend.address, Listen)
    address = (backend.address.host, backend.address.port)
    return write_configuration(folder, address, telemetry={"otlp_endpoint": endpoint}, **sections)


async def issue(sidecar: Program) -> str:
    asked = {"incident_id": "inc_1", "action": "retry_agent", "intent": "a test"}
    answer = await ask(Listen(*sidecar.data), "POST", SCOPE, *as_json(asked))
    assert answer.status == 201, answer.body
    return str(answer.json()["scope_id"])


async def execute(sidecar: Program, scope_id: str, headers: HeaderList = (), query: str = "") -> Message:
    kind, body = as_json({"incident_id": "inc_1", "action": "retry_agent", "scope_id": scope_id})
    return await ask(Listen(*sidecar.data), "POST", EXECUTE + query, [*kind, *headers], body)


def by_name(spans: list[Seen]) -> dict[str, Seen]:
    named = {span.name: span for span in spans}
    assert len(named) == len(spans)
    return named


ROOT = "POST **/recovery/execute"


async def test_a_trace_goes_from_the_client_through_four_spans_to_the_backend(
    sidecar: Program, backend: Backend, collector: Collector
) -> None:
    backend.script = replies(after=0.05)
    scope_id = await issue(sidecar)
    answer = await execute(sidecar, scope_id, [SAMPLED, STATE], "?token=secret")
    assert answer.status == 200
    spans = collector.until(5)
    assert {span.trace_id for span in spans} == {TRACE}
    assert [(span.name, span.kind) for span in spans] == [
        (ROOT, SERVER),
        ("judge", INTERNAL),
        ("commit", INTERNAL),
        ("upstream", CLIENT),
        ("settle", INTERNAL),
    ]
    root, *stages = spans
    assert root.parent_id == SPAN
    assert {stage.parent_id for stage in stages} == {root.span_id}
    # One after the other, and all of them within the whole.
    moments = [root.begin, *(moment for stage in stages for moment in (stage.begin, stage.end)), root.end]
    assert moments == sorted(moments)
    assert stages[2].end - stages[2].begin >= 50_000_000

    (execution,) = backend.executions
    assert execution.header("traceparent") == f"00-{TRACE}-{stages[2].span_id}-01"
    assert execution.header("tracestate") == STATE[1]

    assert root.attributes == {
        "http.request.method": "POST",
        "http.route": "**/recovery/execute",
        "url.path": EXECUTE,
        "http.response.status_code": 200,
        "scopegate.scope_id": scope_id[:14],
        "scopegate.incident_id": "inc_1",
        "scopegate.action": "retry_agent",
        "scopegate.outcome": "answered",
        "scopegate.decision_id": answer.header("Scopegate-Decision-Id"),
    }
    assert stages[2].attributes == {"http.response.status_code": 200}
    assert stages[3].attributes == {"scopegate.outcome": "answered"}
    assert not any(span.failed for span in spans)
    assert all(span.state == STATE[1] for span in spans)
    assert (root.resource["service.name"], root.resource["service.version"]) == ("scopegate", __version__)


async def test_log_lines_name_the_trace_and_the_record_of_the_decision_is_as_without_it(
    sidecar: Program, collector: Collector
) -> None:
    answer = await execute(sidecar, await issue(sidecar), [SAMPLED])
    (root, *_) = collector.until(5)
    executed = sidecar.until_logged("executed")
    assert (executed["trace_id"], executed["span_id"]) == (TRACE, root.span_id)
    lines = [line for line in sidecar.log_lines() if line["message"] == "request"]
    assert [(line["route"], line["trace_id"]) for line in lines] == [("scopes", None), ("gated", TRACE)]
    decision = answer.header("Scopegate-Decision-Id")
    record = await ask(Listen(*sidecar.admin), "GET", f"/api/v1/decisions/{decision}")
    assert TRACE.encode() not in record.body


async def test_a_refused_execution_ends_its_trace_where_it_was_refused(
    sidecar: Program, collector: Collector
) -> None:
    answer = await execute(sidecar, "scope_unknown", [SAMPLED])
    assert answer.status == 404
    root, judge, commit = collector.until(3)
    assert (root.name, judge.name, commit.name) == (ROOT, "judge", "commit")
    assert root.attributes["http.response.status_code"] == 404
    assert root.attributes["scopegate.outcome"] == "scope_not_found"
    assert root.attributes["scopegate.decision_id"] == answer.json()["decision_id"]
    assert not root.failed

    collector.spans.clear()
    kind = [("Content-Type", "text/plain")]
    assert (await ask(Listen(*sidecar.data), "POST", EXECUTE, kind, b"{}")).status == 415
    assert [span.name for span in collector.until(2)] == [ROOT, "judge"]


async def test_an_execution_of_which_nobody_knows_the_end_is_an_error(
    tmp_path: Path, backend: Backend, collector: Collector
) -> None:
    backend.script = replies(after=30)
    limits = {"response_timeout_seconds": 0.2}
    with Program(configured(tmp_path, backend, collector.url, upstream=limits)) as sidecar:
        assert (await execute(sidecar, await issue(sidecar))).status == 504
        spans = by_name(collector.until(5))
    assert spans[ROOT].failed
    assert spans[ROOT].attributes["scopegate.outcome"] == "upstream_timeout"
    assert spans["upstream"].failed
    assert spans["upstream"].attributes == {"error.type": "upstream_timeout"}
    assert spans["settle"].attributes == {"scopegate.outcome": "unknown"}


async def test_a_client_that_does_not_sample_is_not_traced_and_neither_is_its_backend(
    sidecar: Program, backend: Backend, collector: Collector
) -> None:
    assert (await execute(sidecar, await issue(sidecar), [UNSAMPLED, STATE])).status == 200
    (execution,) = backend.executions
    version, trace_id, _, flags = str(execution.header("traceparent")).split("-")
    assert (version, trace_id, flags) == ("00", TRACE, "00")
    assert execution.header("tracestate") == STATE[1]
    # The next one is traced: what would have come of the first has come by then.
    assert (await execute(sidecar, "scope_unknown")).status == 404
    assert [span.name for span in collector.until(3)] == [ROOT, "judge", "commit"]


async def test_what_passes_through_and_the_scope_endpoints_are_not_touched_by_tracing(
    sidecar: Program, backend: Backend, collector: Collector
) -> None:
    await issue(sidecar)
    await ask(Listen(*sidecar.data), "GET", "/api/v1/agents", [SAMPLED, STATE])
    await ask(Listen(*sidecar.data), "GET", "/api/v1/agents")
    assert [message.header("traceparent") for message in backend.seen] == [SAMPLED[1], None]
    assert (await execute(sidecar, "scope_unknown")).status == 404
    assert [span.name for span in collector.until(3)] == [ROOT, "judge", "commit"]


async def test_the_last_spans_are_sent_before_the_program_ends(
    tmp_path: Path, backend: Backend, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "60000")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "recovery-gate")
    with Program(configured(tmp_path, backend, collector.url)) as sidecar:
        assert (await execute(sidecar, await issue(sidecar))).status == 200
        assert collector.spans == []
        assert await asyncio.to_thread(sidecar.stop) == 0
    assert {span.resource["service.name"] for span in collector.until(5)} == {"recovery-gate"}


@pytest.mark.parametrize("what", ["hangs", "is down"])
async def test_a_collector_that_does_not_work_changes_nothing(
    tmp_path: Path, backend: Backend, collector: Collector, what: str
) -> None:
    endpoint = collector.url
    if what == "hangs":
        collector.go_on.clear()
    else:
        endpoint = f"http://127.0.0.1:{unused_port()}/v1/traces"
    drain = {"drain_seconds": 4}
    with Program(configured(tmp_path, backend, endpoint, shutdown=drain)) as sidecar:
        for _ in range(5):
            assert (await execute(sidecar, await issue(sidecar), [SAMPLED])).status == 200
        if what == "hangs":
            assert await asyncio.to_thread(collector.asked.wait, 10)
        else:
            sidecar.until_logged("tracing does not work as it should")
        assert (await execute(sidecar, await issue(sidecar))).status == 200
        begun = time.monotonic()
        assert await asyncio.to_thread(sidecar.stop) == 0
        assert time.monotonic() - begun < 4.5
        complaints = [line for line in sidecar.log_lines() if line["logger"].startswith("opentelemetry")]
        assert complaints == []
        told = [line["message"] for line in sidecar.log_lines() if line["level"] == "WARNING"]
    assert told.count("tracing does not work as it should") <= 1
    assert "spans are lost; the collector did not take them in time" in told
