"""One line for each request, whatever became of it; and nobody ever waits for whoever reads the log."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from sidecar.core.shortid import short_id
from sidecar.settings.reading import Listen
from sidecar.telemetry import logqueue
from sidecar.telemetry.events import LogEvent
from sidecar.telemetry.logqueue import LogQueue, never_wait_for_logs
from sidecar.telemetry.logs import set_up_logging
from sidecar.telemetry.metrics import Metrics
from sidecar.telemetry.tracing import trace_ids
from sidecar.web.serving.datarequest import MAX_PATH_CHARS, shown_path
from tests.acceptance.conftest import PROJECT, write_configuration
from tests.client import as_json, ask, connect, read_message, request_bytes
from tests.gate.test_transport import on_both_kinds
from tests.support import (
    EXECUTE,
    SCOPE,
    SCOPES,
    Backend,
    House,
    Open,
    eventually,
    replies,
    reset,
    sends,
    unused_port,
)

FIELDS = {
    "method",
    "path",
    "status",
    "duration_ms",
    "bytes",
    "remote",
    "route",
    "outcome",
    "request_id",
    "decision_id",
    "scope_id",
    "trace_id",
}


class Lines:
    """The access lines so far, each as its fields."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self._caplog = caplog

    def all(self) -> list[dict[str, Any]]:
        records = [record for record in self._caplog.records if record.name == "scopegate.access"]
        assert {(record.levelname, record.message) for record in records} <= {("INFO", "request")}
        return [{name: vars(record)[name] for name in FIELDS} for record in records]

    async def next(self) -> dict[str, Any]:
        """The one line since the last time. It comes after the answer, in its own moment."""
        await eventually(lambda: bool(self.all()))
        (line,) = self.all()
        self._caplog.clear()
        return line


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Lines:
    caplog.set_level(logging.INFO, "scopegate.access")
    return Lines(caplog)


def told(line: dict[str, Any], *names: str) -> tuple[Any, ...]:
    return tuple(line[name] for name in names)


async def test_an_execution_leaves_a_line_that_says_what_became_of_it(house: House, lines: Lines) -> None:
    scope = await house.issue()
    assert told(await lines.next(), "route", "method", "path", "status", "outcome") == (
        "scopes",
        "POST",
        SCOPE,
        201,
        "answered",
    )
    trace = "0af7651916cd43dd8448eb211c80319c"
    headers = [("X-Request-Id", "req_1"), ("traceparent", f"00-{trace}-b7ad6b7169203331-01")]
    answer = await house.execute(scope, target=EXECUTE + "?token=secret", headers=headers)
    line = await lines.next()
    assert 0 < line.pop("duration_ms") < 5_000
    assert line == {
        "method": "POST",
        "path": EXECUTE,
        "status": 200,
        "bytes": len(answer.body),
        "remote": "127.0.0.1",
        "route": "gated",
        "outcome": "answered",
        "request_id": "req_1",
        "decision_id": answer.header("Scopegate-Decision-Id"),
        "scope_id": short_id(scope["scope_id"]),
        "trace_id": trace,
    }


async def test_granting_listing_and_revoking_are_logged_with_what_they_are_about(
    house: House, lines: Lines
) -> None:
    asked = await house.ask_for_scope()
    scope = asked.json()
    assert told(await lines.next(), "route", "status", "decision_id", "scope_id") == (
        "scopes",
        201,
        asked.header("Scopegate-Decision-Id"),
        short_id(scope["scope_id"]),
    )
    assert asked.header("Scopegate-Decision-Id")
    await house.scopes()
    assert told(await lines.next(), "status", "decision_id", "scope_id") == (200, None, None)
    revoked = await house.revoke(scope)
    assert told(await lines.next(), "status", "decision_id", "scope_id") == (
        200,
        revoked.header("Scopegate-Decision-Id"),
        short_id(scope["scope_id"]),
    )
    assert revoked.header("Scopegate-Decision-Id")
    refused = await house.data("DELETE", SCOPES + "scope%5Funknown")
    assert told(await lines.next(), "status", "decision_id", "scope_id") == (
        404,
        refused.json()["decision_id"],
        "scope_unknown",
    )
    refused = await house.ask_for_scope(max_attempts=99)
    assert told(await lines.next(), "status", "decision_id", "scope_id") == (
        422,
        refused.json()["decision_id"],
        None,
    )


async def test_a_scope_that_cannot_be_revoked_now_is_named_all_the_same(house: House, lines: Lines) -> None:
    scope = await house.issue()
    await lines.next()
    away = house.database.with_suffix(".away")
    house.database.rename(away)
    await house.revoke(scope)
    away.rename(house.database)
    line = await lines.next()
    assert told(line, "status", "outcome", "scope_id") == (
        503,
        "store_unavailable",
        short_id(scope["scope_id"]),
    )


async def test_a_client_of_the_other_kind_of_address_is_named_as_it_names_itself(
    open_house: Open, lines: Lines
) -> None:
    house = await on_both_kinds(open_house)
    address = house.sidecar.data_address
    assert isinstance(address, Listen)
    for host in ("127.0.0.1", "::1"):
        await ask(Listen(host, address.port), "GET", "/agents")
        assert (await lines.next())["remote"] == host


async def test_a_refusal_is_logged_with_its_code_and_its_decision(house: House, lines: Lines) -> None:
    answer = await house.execute(None)
    line = await lines.next()
    assert told(line, "route", "status", "outcome") == ("gated", 400, "scoped_execution_required")
    assert line["decision_id"] == answer.json()["decision_id"]
    assert line["request_id"] == answer.header("X-Request-Id")
    assert line["bytes"] == len(answer.body)

    await house.data("PUT", EXECUTE)
    assert told(await lines.next(), "route", "status", "outcome") == ("gated", 405, "method_not_allowed")
    await house.data("DELETE", SCOPES + "scope_unknown")
    assert told(await lines.next(), "route", "status", "outcome") == ("scopes", 404, "scope_not_found")


async def test_what_passes_through_is_logged_with_its_outcome(
    house: House, backend: Backend, lines: Lines
) -> None:
    backend.script = replies(b"x" * 100_000)
    await house.data("GET", "/agents/7?verbose=1")
    line = await lines.next()
    assert told(line, "method", "path", "route", "status", "outcome", "bytes") == (
        "GET",
        "/agents/7",
        "passed",
        200,
        "answered",
        100_000,
    )
    assert told(line, "decision_id", "scope_id", "request_id", "trace_id") == (None, None, None, None)
    await house.data("HEAD", "/agents/7")
    assert told(await lines.next(), "method", "status", "bytes") == ("HEAD", 200, 0)

    backend.script = sends(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n12345", then="reset")
    await house.data("GET", "/cut")
    assert told(await lines.next(), "outcome", "status", "bytes") == ("cut", 200, 5)


async def test_a_backend_that_cannot_be_reached_is_logged_as_such(open_house: Open, lines: Lines) -> None:
    house = await open_house(upstream_port=unused_port())
    await house.data("GET", "/agents")
    assert told(await lines.next(), "route", "status", "outcome") == ("passed", 502, "upstream_unreachable")
    scope = await house.issue()
    await lines.next()
    answer = await house.execute(scope)
    line = await lines.next()
    assert told(line, "route", "status", "outcome") == ("gated", 502, "upstream_unreachable")
    assert told(line, "decision_id", "scope_id") == (
        answer.json()["decision_id"],
        short_id(scope["scope_id"]),
    )


async def leave(house: House, backend: Backend, request: bytes) -> None:
    """Send a request, and go away once the backend has it."""
    backend.arrived.clear()
    _, writer = await connect(house.sidecar.data_address)
    writer.write(request)
    await asyncio.wait_for(backend.arrived.wait(), 5)
    reset(writer)  # a FIN would only say that it asks for nothing more


async def test_a_client_that_left_before_its_answer_is_a_499(
    house: House, backend: Backend, lines: Lines
) -> None:
    go_on = asyncio.Event()
    backend.script = replies(after=go_on)
    await leave(house, backend, request_bytes("GET", "/agents"))
    assert told(await lines.next(), "route", "status", "outcome", "bytes") == (
        "passed",
        499,
        "client_left",
        0,
    )
    scope = await house.issue()
    await lines.next()
    await leave(house, backend, request_bytes("POST", EXECUTE, *house.execution(scope)))
    await asyncio.sleep(0.05)
    go_on.set()
    # The client is gone; the execution was carried through all the same.
    line = await lines.next()
    assert told(line, "route", "status", "outcome", "bytes") == ("gated", 499, "answered", 0)
    assert (await house.ended(line["decision_id"]))["status"] == "answered"


async def test_a_client_that_left_after_the_head_of_a_stream_got_its_status(
    house: House, backend: Backend, lines: Lines
) -> None:
    backend.script = sends(b"HTTP/1.1 202 Accepted\r\nContent-Type: text/event-stream\r\n\r\n", then="hang")
    reader, writer = await connect(house.sidecar.data_address)
    writer.write(request_bytes("GET", "/events"))
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 202 ")
    writer.close()
    line = await lines.next()
    assert told(line, "status", "outcome", "bytes") == (202, "client_left", 0)


async def test_a_client_that_leaves_its_websocket_before_a_byte_came_had_switched(
    house: House, backend: Backend, lines: Lines
) -> None:
    backend.script = sends(
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
        0.1,
        then="close",
    )
    reader, writer = await connect(house.sidecar.data_address)
    upgrade = [("Connection", "Upgrade"), ("Upgrade", "websocket")]
    writer.write(request_bytes("GET", "/socket", upgrade))
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 ")
    reset(writer)
    assert told(await lines.next(), "status", "outcome", "bytes") == (101, "tunnelled", 0)


async def test_a_long_answer_is_logged_once_it_has_ended_and_a_cut_one_as_unknown(
    open_house: Open, backend: Backend, lines: Lines
) -> None:
    house = await open_house(gate={"max_answer_bytes": 1_000})
    backend.script = replies(b"x" * 300_000)
    scope = await house.issue(max_attempts=2)
    await lines.next()
    await house.execute(scope)
    assert told(await lines.next(), "outcome", "bytes") == ("answered", 300_000)
    backend.script = sends(
        b"HTTP/1.1 200 OK\r\nContent-Length: 10000\r\n\r\n" + b"x" * 2_000, 0.05, then="reset"
    )
    await house.execute(scope)
    assert told(await lines.next(), "outcome", "status", "bytes") == ("unknown", 200, 2_000)


async def test_a_request_that_cannot_be_parsed_is_logged(house: House, lines: Lines) -> None:
    reader, writer = await connect(house.sidecar.data_address)
    writer.write(b"NONSENSE\x01 / HTTP/1.1\r\n\r\n")
    answer = await read_message(reader)
    writer.close()
    assert answer is not None
    assert answer.status == 400
    line = await lines.next()
    assert told(line, "method", "path", "route", "status", "outcome") == (
        None,
        None,
        None,
        400,
        "invalid_request",
    )
    assert line["bytes"] == len(answer.body)


@pytest.fixture
def resets_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each connection is reset just before it is half-closed, so that the system refuses that."""

    def refused(transport: object) -> None:
        raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")

    monkeypatch.setattr("asyncio.selector_events._SelectorSocketTransport.write_eof", refused)


async def test_a_client_that_is_gone_before_its_connection_is_half_closed_leaves_its_line(
    house: House, lines: Lines, resets_in_between: None, caplog: pytest.LogCaptureFixture
) -> None:
    _, writer = await connect(house.sidecar.data_address)
    writer.write(
        b"POST /agents HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nHello\r\n"
    )
    assert told(await lines.next(), "status", "outcome") == (400, "invalid_request")
    writer.close()
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


async def test_a_tunnel_whose_client_is_gone_before_it_is_half_closed_has_ended_well(
    house: House, backend: Backend, lines: Lines, resets_in_between: None, caplog: pytest.LogCaptureFixture
) -> None:
    backend.script = sends(
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
        then="close",
    )
    reader, writer = await connect(house.sidecar.data_address)
    writer.write(request_bytes("GET", "/socket", [("Connection", "Upgrade"), ("Upgrade", "websocket")]))
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 ")
    writer.close()
    assert told(await lines.next(), "status", "outcome") == (101, "tunnelled")
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


async def test_each_request_of_a_connection_has_its_own_line(house: House, lines: Lines) -> None:
    reader, writer = await connect(house.sidecar.data_address)
    for number in range(3):
        writer.write(request_bytes("GET", f"/agents/{number}"))
        assert await read_message(reader) is not None
    writer.close()
    await eventually(lambda: len(lines.all()) == 3)
    assert [line["path"] for line in lines.all()] == ["/agents/0", "/agents/1", "/agents/2"]


async def test_what_is_still_under_way_when_the_sidecar_stops_is_logged(
    open_house: Open, backend: Backend, lines: Lines
) -> None:
    house = await open_house()
    backend.script = sends(
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: 1\n\n", then="hang"
    )
    reader, writer = await connect(house.sidecar.data_address)
    writer.write(request_bytes("GET", "/events"))
    await reader.readuntil(b"data: 1")
    assert lines.all() == []
    await house.sidecar.stop()
    writer.close()
    line = await lines.next()
    assert told(line, "path", "status", "bytes", "outcome") == ("/events", 200, 9, "cut")


async def test_a_shadow_route_is_logged_as_gated_with_its_decision(open_house: Open, lines: Lines) -> None:
    house = await open_house(gate={"routes": [{"path": "**/recovery/execute", "mode": "shadow"}]})
    answer = await house.data("POST", EXECUTE, *as_json({"no": "facts"}))
    line = await lines.next()
    assert told(line, "route", "status", "outcome") == ("gated", 200, "answered")
    assert line["decision_id"] == answer.header("Scopegate-Decision-Id")


@pytest.mark.parametrize(
    ("setting", "routes"),
    [("all", ["scopes", "gated", None, "passed"]), ("gated", ["scopes", "gated", None])],
)
async def test_the_setting_says_what_is_logged(
    open_house: Open, lines: Lines, setting: str, routes: list[str | None]
) -> None:
    house = await open_house(telemetry={"access_log": setting})
    await ask_all(house)
    await eventually(lambda: len(lines.all()) >= len(routes))
    assert [line["route"] for line in lines.all()] == routes


async def test_none_logs_none(open_house: Open, lines: Lines) -> None:
    house = await open_house(telemetry={"access_log": "none"})
    await ask_all(house)
    await asyncio.sleep(0.1)
    assert lines.all() == []


async def ask_all(house: House) -> None:
    await house.execute(await house.issue())
    reader, writer = await connect(house.sidecar.data_address)
    writer.write(b"GET\x01 / HTTP/1.1\r\n\r\n")
    await read_message(reader)
    writer.close()
    await house.data("GET", "/agents")


# What is shown ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "shown"),
    [
        ("/a/b?token=secret", "/a/b"),
        ("/a#secret", "/a"),
        ("http://user:secret@host/a?x", "http://host/a"),
        ("user:secret@host:443", "host:443"),
        ("//user:secret@host/a", "//host/a"),
        ("///user:secret@host/a", "///host/a"),
        ("//host/someone@host", "//host/someone@host"),
        ("http://user:se%3Fcret@host/a", "http://host/a"),
        ("/a%3Ftoken=secret", "/a"),
        ("/a%3ftoken=secret", "/a"),
        ("/a%23secret", "/a"),
        ("/a%253Ftoken=secret", "/a"),
        ("/a%3Dtoken", "/a%3Dtoken"),
        ("*", "*"),
        ("/mail/someone@host", "/mail/someone@host"),
        ("/" + "x" * 10_000, "/" + "x" * (MAX_PATH_CHARS - 1)),
    ],
)
def test_a_path_is_shown_without_what_may_be_secret_and_not_at_any_length(target: str, shown: str) -> None:
    assert shown_path(target) == shown


@pytest.mark.parametrize(
    ("traceparent", "valid"),
    [
        (f"00-{'a' * 32}-{'b' * 16}-01", True),
        (f"cc-{'a' * 32}-{'b' * 16}-01-more", True),
        (f"00-{'a' * 32}-{'b' * 16}-01-more", False),
        (f"ff-{'a' * 32}-{'b' * 16}-01", False),
        (f"0-{'a' * 32}-{'b' * 16}-01", False),
        (f"00-{'A' * 32}-{'b' * 16}-01", False),
        (f"00-{'a' * 32}-{'B' * 16}-01", False),
        (f"00-{'0' * 32}-{'b' * 16}-01", False),
        (f"00-{'a' * 32}-{'0' * 16}-01", False),
        (f"00-{'a' * 31}-{'b' * 16}-01", False),
        (f"00-{'secret: x' * 3}12345-{'b' * 16}-01", False),
        (f"00-{'a' * 32}-{'b' * 16}-", False),
        (f"00-{'a' * 32}-{'b' * 16}", False),
        ("", False),
        (None, False),
    ],
)
def test_only_a_valid_traceparent_names_a_trace(traceparent: str | None, valid: bool) -> None:
    assert trace_ids(traceparent) == ({"trace_id": "a" * 32, "span_id": "b" * 16} if valid else {})


HOSTILE = 'a"\n{"level": "INFO", "message": "forged"}\r\n\x1b[2J\u2028\udc80 status=200'


@contextmanager
def logging_to_a_pipe(format: Any) -> Iterator[tuple[int, LogQueue]]:
    """The program's logging, in place of the test's; gives the end to read from."""
    reading, writing = os.pipe()
    root = logging.getLogger()
    before = root.handlers[:], root.level
    with open(writing, "w") as stream:
        set_up_logging(format, stream=stream)
        never_wait_for_logs()
        (queue,) = root.handlers
        assert isinstance(queue, LogQueue)
        try:
            yield reading, queue
            queue.flush()
        finally:
            root.handlers[:] = before[0]
            root.setLevel(before[1])
            os.close(reading)


@pytest.mark.parametrize("format", ["json", "text"])
def test_values_of_clients_neither_break_a_line_nor_add_a_field(format: str) -> None:
    with logging_to_a_pipe(format) as (reading, queue):
        fields = {"path": HOSTILE, "request_id": HOSTILE, "status": 404}
        logging.getLogger("scopegate.access").info("request", extra=fields)
        queue.flush()
        written = os.read(reading, 65_536).decode()
    assert written.count("\n") == 1
    assert written.endswith("\n")
    assert written.isascii()
    assert "\x1b" not in written
    assert "\r" not in written
    if format == "json":
        line = json.loads(written)
        assert (line["path"], line["message"], line["status"]) == (HOSTILE, "request", 404)
    else:
        assert f" path={json.dumps(HOSTILE)} " in written
        assert written.endswith(" status=404\n")


def test_a_line_with_an_exception_shows_where_it_came_from() -> None:
    with logging_to_a_pipe("json") as (reading, queue):
        try:
            raise RuntimeError("broken")
        except RuntimeError:
            logging.getLogger("scopegate").exception("a request failed")
        queue.flush()
        line = json.loads(os.read(reading, 65_536))
    assert line["message"] == "a request failed"
    assert line["exc_info"].endswith("RuntimeError: broken")


def say(number: int) -> None:
    LogEvent.DRAIN_IS_OVER.log(count=number)


@contextmanager
def counted_records() -> Iterator[list[logging.LogRecord]]:
    """The records that `logging` makes from here on."""
    made: list[logging.LogRecord] = []

    def make(*args: Any, **options: Any) -> logging.LogRecord:
        made.append(logging.LogRecord(*args, **options))
        return made[-1]

    logging.setLogRecordFactory(make)
    try:
        yield made
    finally:
        logging.setLogRecordFactory(logging.LogRecord)


def test_an_event_that_only_the_queue_hears_goes_straight_into_it() -> None:
    begun = datetime.now(UTC)
    with logging_to_a_pipe("json") as (reading, queue), counted_records() as made:
        say(1)
        logging.getLogger("another").info("said")
        LogEvent.DRAIN_IS_OVER.log_fields({"count": 2})
        queue.flush()
        lines = os.read(reading, 65_536).splitlines()
    assert [record.getMessage() for record in made] == ["said"]
    assert b'"message":"said"' in lines.pop(1)
    times = [datetime.fromisoformat(json.loads(line)["time"]) for line in lines]
    assert begun <= times[0] <= times[1] <= datetime.now(UTC)
    assert lines == [
        b'{"level":"WARNING","logger":"scopegate","message":"the drain is over; executions end as unknown",'
        b'"count":%d,"time":"%s"}' % (count, time.isoformat().encode())
        for count, time in zip((1, 2), times, strict=True)
    ]


@pytest.mark.parametrize("where", ["", "scopegate", "scopegate.web"])
def test_a_handler_beside_the_queue_hears_an_event(where: str) -> None:
    class Listening(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    heard: list[str] = []
    logger, handler = logging.getLogger(where), Listening()
    with logging_to_a_pipe("json") as (reading, queue):
        LogEvent.UNDECIDED.log(request_id="req_1")
        logger.addHandler(handler)
        LogEvent.UNDECIDED.log(request_id="req_2")
        logger.removeHandler(handler)
        LogEvent.UNDECIDED.log(request_id="req_3")
        queue.flush()
        lines = [json.loads(line) for line in os.read(reading, 65_536).splitlines()]
    assert heard == ["a gated request was not decided in time"]
    assert [line["request_id"] for line in lines] == ["req_1", "req_2", "req_3"]


def test_a_filter_and_a_level_are_asked_about_an_event() -> None:
    logger = LogEvent.DRAIN_IS_OVER.logger
    with logging_to_a_pipe("json") as (reading, queue):
        logger.addFilter(refuse_all)
        say(1)
        logger.removeFilter(refuse_all)
        logger.setLevel(logging.ERROR)
        say(2)
        logger.setLevel(logging.NOTSET)
        say(3)
        queue.flush()
        lines = [json.loads(line) for line in os.read(reading, 65_536).splitlines()]
    assert [line["count"] for line in lines] == [3]


def refuse_all(record: logging.LogRecord) -> bool:
    return False


def test_a_factory_of_records_is_asked_about_an_event() -> None:
    with counted_records() as made, logging_to_a_pipe("json"):
        say(1)
    assert len(made) == 1


def test_an_event_has_its_traceback_and_its_arguments_in_the_queue_too() -> None:
    with logging_to_a_pipe("json") as (reading, queue):
        LogEvent.RENEWAL_FAILED.log(exc=RuntimeError("broken"))
        LogEvent.SCOPELESS_ACTIONS.log("low")
        queue.flush()
        failed, said = map(json.loads, os.read(reading, 65_536).splitlines())
    assert failed["exc_info"] == "RuntimeError: broken"
    assert said["message"] == "actions below low risk need no scope"


def test_an_event_that_cannot_be_written_costs_no_other_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with logging_to_a_pipe("json") as (reading, queue):
        say(10**5_000)  # more digits than Python writes
        say(1)
        queue.flush()
        lines = [json.loads(line) for line in os.read(reading, 65_536).splitlines()]
    assert [line["count"] for line in lines] == [1, 1]
    assert {line["message"] for line in lines} >= {"log lines were dropped"}
    assert queue.dropped == 1


@pytest.mark.parametrize("kind", ["record", "event"])
def test_lines_beyond_the_bound_are_dropped_counted_and_confessed(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(logqueue, "MAX_WAITING_LINES", 500)
    monkeypatch.setattr(logqueue, "FLUSH_SECONDS", 0.2)
    logger = logging.getLogger("scopegate.access")
    with logging_to_a_pipe("json") as (reading, queue):
        begun = time.monotonic()
        for number in range(5_000):
            if kind == "record":
                logger.info("request", extra={"count": number})
            else:
                say(number)
        queue.flush()
        assert time.monotonic() - begun < 5
        assert queue.dropped > 3_000
        assert f"scopegate_log_lines_dropped_total {float(queue.dropped)}".encode() in Metrics().page()
        # Somebody reads again.
        written, confessed = b"", 0
        end = time.monotonic() + 10
        while confessed < queue.dropped and time.monotonic() < end:
            written += os.read(reading, 65_536)
            whole = written[: written.rindex(b"\n") + 1]
            read = [json.loads(line) for line in whole.splitlines()]
            confessions = [line for line in read if line["message"] == "log lines were dropped"]
            confessed = sum(line["count"] for line in confessions)
    assert confessed == queue.dropped
    assert {line["level"] for line in confessions} == {"WARNING"}
    # What was kept is whole and in order.
    kept = [line["count"] for line in read if line["message"] != "log lines were dropped"]
    assert len(kept) + queue.dropped == 5_000
    assert kept == sorted(kept)


def test_a_reader_that_is_gone_for_good_costs_lines_and_nothing_else() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    queue = LogQueue(writing)
    queue.acquire()  # as logging.shutdown does
    for _ in range(3):
        queue.emit(logging.makeLogRecord({"msg": "a line"}))
        queue.flush()
    assert queue.dropped >= 3
    queue.release()
    assert any(thread.name == "scopegate-log" and thread.is_alive() for thread in threading.enumerate())
    os.close(writing)


@pytest.mark.slow
async def test_a_log_that_nobody_reads_stops_neither_the_gate_nor_its_end(tmp_path: Path) -> None:
    config = write_configuration(tmp_path, ("127.0.0.1", 9), shutdown={"drain_seconds": 2})
    reading, writing = os.pipe()
    process = _started(config, writing)
    os.close(writing)
    try:
        # The pipe is read until the addresses are known, and then never again.
        said = await asyncio.to_thread(_read_until, reading, b'"listener":"data"')
        address = {line["listener"]: Listen.parse(line["address"]) for line in said if "listener" in line}
        reader, writer = await connect(address["data"])
        for _ in range(200):
            writer.write(request_bytes("PUT", SCOPE) * 100)
            for _ in range(100):
                answer = await asyncio.wait_for(read_message(reader), 10)
                assert answer is not None
                assert answer.status == 405
        writer.close()
        page = (await ask(address["ops"], "GET", "/metrics")).body.decode()
        (dropped,) = [
            line for line in page.splitlines() if line.startswith("scopegate_log_lines_dropped_total")
        ]
        assert float(dropped.split()[1]) > 5_000
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, 6) == 0
    finally:
        process.kill()
        process.wait()
        os.close(reading)


def _started(config: Path, stderr: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "sidecar", "run", "--config", str(config)]
    return subprocess.Popen(command, cwd=PROJECT, stdin=subprocess.DEVNULL, stderr=stderr)


def _read_until(descriptor: int, wanted: bytes) -> list[dict[str, Any]]:
    read = b""
    while wanted not in read or not read.endswith(b"\n"):
        piece = os.read(descriptor, 4_096)
        assert piece, f"the program ended:\n{read.decode()}"
        read += piece
    return [json.loads(line) for line in read.splitlines()]
