"""What is in a trace where an execution does not go the short way."""

from __future__ import annotations

import asyncio
import logging
import re
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.sdk.trace import SpanProcessor, Tracer
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator

from sidecar.telemetry.otel import OtelTracing
from tests.client import as_json, connect, request_bytes
from tests.collector import Collector, Seen
from tests.support import EXECUTE, Backend, House, Open, eventually, replies, reset, sends, unused_port

ROOT = "POST **/recovery/execute"
STAGES = ["judge", "commit", "upstream", "settle"]


@pytest.fixture(autouse=True)
def no_thread_left_behind(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A lost collector is tried again for a while, and what is said of it would be heard by another test."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    yield
    for thread in threading.enumerate():
        if thread.name == "scopegate-spans" or "Span" in thread.name:
            thread.join(10)


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Collector() as running:
        yield running


@pytest.fixture
async def house(open_house: Open, collector: Collector) -> House:
    return await open_house(telemetry={"otlp_endpoint": collector.url}, gate={"max_answer_bytes": 1_000})


async def spans(collector: Collector, count: int) -> dict[str, Seen]:
    found = await asyncio.to_thread(collector.until, count)
    named = {span.name: span for span in found}
    assert len(named) == count
    return named


async def test_a_long_answer_is_traced_to_its_end(
    house: House, backend: Backend, collector: Collector
) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 4000\r\n\r\n"
    backend.script = sends(head + b"x" * 2_000, 0.2, b"x" * 2_000)
    assert len((await house.execute(await house.issue())).body) == 4_000
    seen = await spans(collector, 5)
    assert seen["upstream"].end - seen["upstream"].begin >= 200_000_000
    assert seen["upstream"].end <= seen["settle"].begin <= seen["settle"].end <= seen[ROOT].end
    assert not any(span.failed for span in seen.values())


async def test_a_long_answer_that_is_cut_is_an_error_though_its_status_was_sent(
    house: House, backend: Backend, collector: Collector
) -> None:
    backend.script = sends(
        b"HTTP/1.1 200 OK\r\nContent-Length: 4000\r\n\r\n" + b"x" * 2_000, 0.05, then="reset"
    )
    await house.execute(await house.issue())
    seen = await spans(collector, 5)
    assert {name for name, span in seen.items() if span.failed} == {ROOT, "upstream"}
    assert seen[ROOT].attributes["http.response.status_code"] == 200
    assert seen[ROOT].attributes["error.type"] == seen["upstream"].attributes["error.type"] == "unknown"
    assert seen["settle"].attributes["scopegate.outcome"] == "unknown"


async def test_an_execution_whose_client_left_is_traced_to_its_settlement(
    house: House, backend: Backend, collector: Collector
) -> None:
    scope = await house.issue()
    go_on = asyncio.Event()
    backend.script = replies(b"x" * 500_000, after=go_on)
    _, writer = await connect(house.sidecar.data_address)
    writer.write(request_bytes("POST", EXECUTE, *house.execution(scope)))
    await asyncio.wait_for(backend.arrived.wait(), 5)
    reset(writer)
    await asyncio.sleep(0.05)
    go_on.set()
    seen = await spans(collector, 5)
    assert seen[ROOT].attributes["http.response.status_code"] == 499
    assert {seen[name].parent_id for name in STAGES} == {seen[ROOT].span_id}
    assert seen["settle"].attributes["scopegate.outcome"] == "answered"


async def test_an_answer_of_500_is_an_error_of_the_backend(
    house: House, backend: Backend, collector: Collector
) -> None:
    backend.script = replies(status="500 Broken")
    await house.execute(await house.issue())
    seen = await spans(collector, 5)
    assert {name for name, span in seen.items() if span.failed} == {ROOT, "upstream"}
    assert seen["upstream"].attributes["error.type"] == "500"


async def test_what_is_refused_unread_has_no_route_in_its_name_and_only_a_judge(
    house: House, collector: Collector
) -> None:
    await house.data("PUT", EXECUTE)
    assert (await spans(collector, 2)).keys() == {"PUT", "judge"}
    collector.spans.clear()
    await house.data("POST", "/api/v1/recovery//execute?secret", *as_json({}))
    seen = await spans(collector, 2)
    assert seen["POST"].attributes["scopegate.outcome"] == "ambiguous_path"
    assert seen["POST"].attributes["url.path"] == "/api/v1/recovery//execute"
    assert not seen["POST"].failed


async def test_a_claim_that_is_no_plain_text_does_not_cost_the_other_spans(
    house: House, collector: Collector
) -> None:
    reader, writer = await connect(house.sidecar.data_address)
    writer.write("PUT /\xff\xfe/recovery/execute HTTP/1.1\r\nHost: x\r\n\r\n".encode("latin-1"))
    await reader.read(100)
    writer.close()
    await house.execute(None, incident_id="inc_\U0001f6a8", action="a" * 256)
    await asyncio.to_thread(collector.wait, lambda: any(span.name == ROOT for span in collector.spans))
    (root,) = [span for span in collector.spans if span.name == ROOT]
    assert root.attributes["scopegate.incident_id"] == "inc_\U0001f6a8"


class Broken(SpanProcessor):
    """What somebody plugged in, and raises at one moment of each span."""

    def __init__(self, moment: str) -> None:
        self._moment = moment
        self.called = 0

    def on_start(self, span: Any, parent_context: Any = None) -> None:
        self._raise("start")

    def on_end(self, span: Any) -> None:
        self._raise("end")

    def shutdown(self) -> None:
        self._raise("shutdown")

    def _raise(self, moment: str) -> None:
        if moment == self._moment:
            self.called += 1
            raise RuntimeError(f"broken at {moment}")


class BrokenIds(RandomIdGenerator):
    """It runs out of ids."""

    def __init__(self, good: int) -> None:
        self.left = good

    def generate_span_id(self) -> int:
        self.left -= 1
        if self.left < 0:
            raise KeyError("no more ids")
        return super().generate_span_id()


def break_tracing(house: House, how: str) -> None:
    tracing = house.sidecar.tracing
    assert isinstance(tracing, OtelTracing)
    if how.isdigit():
        assert isinstance(tracing._tracer, Tracer)
        tracing._tracer.id_generator = BrokenIds(int(how))
    else:
        tracing._provider.add_span_processor(Broken(how))


@pytest.mark.parametrize("how", ["start", "end", "shutdown", "0", "1", "2", "3", "4"])
@pytest.mark.parametrize("length", [10, 4_000])
async def test_tracing_that_is_broken_costs_spans_and_never_an_execution(
    house: House, backend: Backend, caplog: pytest.LogCaptureFixture, how: str, length: int
) -> None:
    break_tracing(house, how)
    backend.script = replies(b"x" * length)
    scope = await house.issue(max_attempts=2)
    client = [("traceparent", f"00-{'a' * 32}-{'b' * 16}-01"), ("tracestate", "a=1")]
    answer = await house.execute(scope, headers=client)
    assert (answer.status, answer.body) == (200, b"x" * length)
    decision_id = answer.header("Scopegate-Decision-Id")
    assert decision_id is not None
    assert (await house.ended(decision_id))["status"] == "answered"
    assert {"admitted", "settled"} <= {record["event"] for record in await house.records()}
    assert (await house.scope(scope))["attempts_used"] == 1
    (sent,) = backend.executions
    (parent,) = sent.headers("traceparent")
    assert parent.startswith(f"00-{'a' * 32}-")
    if how in ("start", "0", "1", "2"):
        assert parent == client[0][1], "what the client sent"
    assert sent.headers("tracestate") == ["a=1"]
    # What goes wrong goes on as ever, too.
    backend.script = sends(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n", then="reset")
    lost = await house.execute(scope)
    assert (lost.status, lost.json()["error"]) == (502, "upstream_failed")
    assert (await house.ended(lost.json()["decision_id"]))["status"] == "unknown"
    assert (await house.execute(None)).json()["error"] == "scoped_execution_required"
    await house.sidecar.stop()
    said = [record for record in caplog.records if record.name == "scopegate.tracing"]
    assert [record.message for record in said] == ["tracing does not work as it should"]
    assert re.search("broken at|no more ids", vars(said[0])["cause"])
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_a_key_in_the_collectors_url_is_sent_to_it_and_to_no_log(
    open_house: Open, collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    url = collector.url.removesuffix("/v1/traces")
    house = await open_house(telemetry={"otlp_endpoint": f"{url}?api-key=s3cret"})
    await house.execute(None)
    await spans(collector, 3)
    assert set(collector.paths) == {"/v1/traces?api-key=s3cret"}
    await house.sidecar.stop()
    nobody = await open_house(telemetry={"otlp_endpoint": f"http://127.0.0.1:{unused_port()}?api-key=s3cret"})
    await nobody.execute(None)

    def complained() -> bool:
        return any(record.name == "scopegate.tracing" for record in caplog.records)

    await eventually(complained)
    assert "s3cret" not in repr([vars(record) for record in caplog.records if record.name[:9] == "scopegate"])


async def test_a_request_that_cannot_be_recorded_is_an_error(house: House, collector: Collector) -> None:
    scope = await house.issue()
    house.database.rename(house.database.with_suffix(".away"))
    assert (await house.execute(scope)).status == 503
    seen = await spans(collector, 3)
    assert seen.keys() == {ROOT, "judge", "commit"}
    assert seen[ROOT].failed
    assert seen[ROOT].attributes["error.type"] == "store_unavailable"
    house.database.with_suffix(".away").rename(house.database)
