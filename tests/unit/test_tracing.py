"""How a trace is continued and passed on (W3C Trace Context), and what the setting needs."""

from __future__ import annotations

import asyncio
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry import trace as api

from sidecar.errors import ScopegateError
from sidecar.files.faults import ConfigurationError
from sidecar.settings.reading import load
from sidecar.telemetry.otel import OtelTracing
from sidecar.telemetry.tracing import NO_TRACE, Headers, Trace, Tracing

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
VALID = f"00-{TRACE}-{SPAN}-01"
BODY = (b"Content-Length", b"2")


@pytest.fixture(scope="module")
def tracing() -> Iterator[OtelTracing]:
    """Nothing is sent: no span of these tests ends."""
    made = OtelTracing("http://127.0.0.1:9/v1/traces")
    yield made
    asyncio.run(made.close(5))


def begun(tracing: Tracing, headers: Headers, path: str = "/recovery/execute") -> Trace:
    return tracing.begin(
        method="POST", path=path, route="**/recovery/execute", headers=headers, begun=time.perf_counter()
    )


def passed_on(tracing: Tracing, headers: Headers) -> tuple[str, dict[str, list[str]]]:
    """The trace id, and the trace headers that the backend gets."""
    trace = begun(tracing, headers)
    sent = trace.sent_on([BODY, *headers])
    assert BODY in sent
    found: dict[str, list[str]] = {}
    for name, value in sent:
        if name.lower() in (b"traceparent", b"tracestate"):
            found.setdefault(name.decode(), []).append(value.decode())
    return trace.ids["trace_id"], found


def test_a_valid_trace_is_continued_with_a_new_parent_and_the_same_state(tracing: OtelTracing) -> None:
    headers = [(b"Traceparent", VALID.encode()), (b"TraceState", b"a=1,b=2"), (b"tracestate", b"c=3")]
    trace_id, sent = passed_on(tracing, headers)
    assert trace_id == TRACE
    (parent,) = sent["traceparent"]
    assert re.fullmatch(rf"00-{TRACE}-[0-9a-f]{{16}}-01", parent)
    assert SPAN not in parent
    assert sent["tracestate"] == ["a=1,b=2,c=3"]


def test_what_comes_unsampled_goes_on_unsampled(tracing: OtelTracing) -> None:
    trace_id, sent = passed_on(tracing, [(b"traceparent", f"00-{TRACE}-{SPAN}-00".encode())])
    assert trace_id == TRACE
    assert sent["traceparent"][0].endswith("-00")


@pytest.mark.parametrize(
    "given",
    [
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{TRACE[:-1]}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}0-01",
        f"00-{TRACE}-{SPAN}-01-more",
        f"00-{TRACE}-{SPAN}",
        f"0-{TRACE}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-1",
        "",
        "garbage",
        "x" * 10_000,
    ],
)
def test_an_invalid_traceparent_begins_a_new_trace_without_its_state(
    tracing: OtelTracing, given: str
) -> None:
    trace_id, sent = passed_on(tracing, [(b"traceparent", given.encode()), (b"tracestate", b"a=1")])
    assert trace_id.lower() != TRACE
    (parent,) = sent["traceparent"]
    assert re.fullmatch(rf"00-{trace_id}-[0-9a-f]{{16}}-0[13]", parent)
    assert "tracestate" not in sent


def test_of_two_traceparents_neither_is_believed(tracing: OtelTracing) -> None:
    other = f"00-{'1' * 32}-{SPAN}-01"
    trace_id, sent = passed_on(
        tracing, [(b"traceparent", VALID.encode()), (b"Traceparent", other.encode()), (b"tracestate", b"a=1")]
    )
    assert trace_id not in (TRACE, "1" * 32)
    assert len(sent["traceparent"]) == 1
    assert "tracestate" not in sent


def test_a_later_version_is_read_as_far_as_it_is_known(tracing: OtelTracing) -> None:
    trace_id, sent = passed_on(tracing, [(b"traceparent", f"cc-{TRACE}-{SPAN}-01-what".encode())])
    assert trace_id == TRACE
    assert sent["traceparent"][0].startswith(f"00-{TRACE}-")


def test_a_state_that_cannot_be_read_does_not_cost_the_trace(tracing: OtelTracing) -> None:
    for state in (b"no pairs here", b"a=1,a=2", b"a=" + b"x" * 600):
        trace_id, sent = passed_on(tracing, [(b"traceparent", VALID.encode()), (b"tracestate", state)])
        assert trace_id == TRACE
        assert "tracestate" not in sent


@given(parent=st.binary(max_size=80), state=st.binary(max_size=80), path=st.text())
def test_no_header_and_no_path_does_any_harm(
    tracing: OtelTracing, parent: bytes, state: bytes, path: str
) -> None:
    for headers in ([(b"traceparent", parent)], [(b"traceparent", VALID.encode()), (b"tracestate", state)]):
        begun(tracing, headers, path + "\udc80")
        _, sent = passed_on(tracing, headers)
        assert len(sent["traceparent"]) == 1


def test_without_tracing_headers_stay_as_they_are() -> None:
    headers = [BODY, (b"traceparent", b"whatever")]
    trace = begun(Tracing(), headers)
    assert trace is NO_TRACE
    assert trace.sent_on(headers) is headers
    assert not trace.ids


def test_a_sampler_of_the_environment_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    tracing = OtelTracing("http://127.0.0.1:9")
    trace_id, sent = passed_on(tracing, [(b"traceparent", VALID.encode())])
    assert trace_id == TRACE
    assert sent["traceparent"][0].endswith("-00")
    asyncio.run(tracing.close(5))


def test_an_sdk_that_is_disabled_leaves_headers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    tracing = OtelTracing("http://127.0.0.1:9")
    assert begun(tracing, []) is NO_TRACE
    asyncio.run(tracing.close(5))


def test_variables_that_cannot_work_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "-1")
    with pytest.raises(ScopegateError, match=r"telemetry\.otlp_endpoint: .*OTEL_\* variables"):
        OtelTracing("http://127.0.0.1:9")


def test_a_programs_own_tracer_provider_is_left_alone(tracing: OtelTracing) -> None:
    assert type(api.get_tracer_provider()) is api.ProxyTracerProvider


@pytest.mark.parametrize("missing", ["opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http"])
def test_an_endpoint_without_the_extra_is_a_mistake_that_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    file = tmp_path / "scopegate.yaml"
    file.write_text(
        "upstream: {url: http://127.0.0.1:9}\ntelemetry:\n  otlp_endpoint: http://127.0.0.1:4318\n"
    )
    assert load(file, environment={}).settings.telemetry.otlp_endpoint == "http://127.0.0.1:4318"
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ConfigurationError) as caught:
        load(file, environment={})
    (fault,) = caught.value.faults
    assert str(fault) == (
        f"{file}:3:3: telemetry.otlp_endpoint: needs the [otel] extra: pip install 'scopegate[otel]'"
    )


async def test_a_token_for_the_collector_that_is_written_wrongly_does_not_reach_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "Authorization: Bearer t0p-s3cret")
    tracing = OtelTracing("http://127.0.0.1:1/v1/traces")
    await tracing.close(2.0)
    (told,) = [record for record in caplog.records if record.name == "scopegate.tracing"]
    assert "Header format invalid" in vars(told)["cause"]
    assert "s3cret" not in str(vars(told))
