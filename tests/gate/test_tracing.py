"""What is in a trace where an execution does not go the short way."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from tests.collector import Collector, Seen
from tests.support import EXECUTE, Backend, House, Open, as_json, connect, replies, request_bytes, sends

ROOT = "POST **/recovery/execute"
STAGES = ["judge", "commit", "upstream", "settle"]


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
    writer.close()
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


async def test_a_request_that_cannot_be_recorded_is_an_error(house: House, collector: Collector) -> None:
    scope = await house.issue()
    house.database.rename(house.database.with_suffix(".away"))
    assert (await house.execute(scope)).status == 503
    seen = await spans(collector, 3)
    assert seen.keys() == {ROOT, "judge", "commit"}
    assert seen[ROOT].failed
    assert seen[ROOT].attributes["error.type"] == "store_unavailable"
    house.database.with_suffix(".away").rename(house.database)
