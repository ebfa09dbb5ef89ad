"""Log lines are written as the standard library's json writes them, whatever they carry."""

from __future__ import annotations

import io
import json
import logging
import math
from collections.abc import Iterator
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import PurePosixPath
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.telemetry.events import LogEvent
from sidecar.telemetry.logs import JsonFormatter, event_line, set_up_logging

CREATED = datetime(2026, 11, 23, 16, 21, 32, 630502, UTC)


@pytest.fixture(autouse=True)
def the_loggers_of_the_process_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    for name in ("logThreads", "logProcesses", "logMultiprocessing", "logAsyncioTasks"):
        monkeypatch.setattr(logging, name, getattr(logging, name, True), raising=False)
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def formatter() -> logging.Formatter:
    set_up_logging("json", stream=io.StringIO())
    (handler,) = logging.getLogger().handlers
    assert handler.formatter is not None
    return handler.formatter


def line(fields: dict[str, Any], message: str = "said", created: datetime = CREATED, **more: Any) -> str:
    record = logging.makeLogRecord({"name": "one", "levelname": "INFO", "msg": message, **more, **fields})
    record.created = created.timestamp()
    return formatter().format(record)


def as_json_writes(members: dict[str, Any]) -> str:
    return json.dumps(
        {"level": "INFO", "logger": "one", **members, "time": "2026-11-23T16:21:32.630502+00:00"},
        default=str,
        separators=(",", ":"),
    )


class Colour(StrEnum):
    RED = "red"


class Odd:
    def __repr__(self) -> str:
        return 'an "odd" one'


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        0,
        -1,
        2**63,
        2**64,
        -(2**70),
        0.0,
        -0.0,
        5.7,
        math.nan,
        math.inf,
        -math.inf,
        "",
        'quotes " and \\ and /',
        "a\nb\tc\r\b\f\x00\x1b\x1f",
        "\x7f and \x80",
        "grün, 漢字, 😀",
        "\ud800 alone",
        b"bytes",
        Colour.RED,
        Odd(),
        ValueError("why"),
        PurePosixPath("/a/b"),
        CREATED,
        ("a", "b"),
        ["a", [math.nan, "ü"]],
        {"a": {"b": Odd(), 1: 2}},
    ],
    ids=repr,
)
def test_an_odd_value_is_written_as_json_writes_it(value: object) -> None:
    assert line({"value": value, "after": 1}) == as_json_writes(
        {"message": "said", "value": value, "after": 1}
    )


@given(st.dictionaries(st.sampled_from("abc"), st.none() | st.booleans() | st.integers() | st.text()))
def test_plain_values_are_written_as_json_writes_them(fields: dict[str, Any]) -> None:
    assert line(fields) == as_json_writes({"message": "said", **fields})


def as_a_record(event: LogEvent, fields: dict[str, Any]) -> str:
    record = logging.makeLogRecord({"name": event.logger.name, "levelno": event.level, "msg": event.message})
    record.levelname = logging.getLevelName(event.level)
    vars(record).update(fields)
    record.created = CREATED.timestamp()
    return JsonFormatter().format(record)


@given(
    st.sampled_from([LogEvent.REQUEST, LogEvent.REFUSED, LogEvent.STOPPED]),
    st.dictionaries(
        st.sampled_from(["method", "count", "rules"]),
        st.none()
        | st.booleans()
        | st.integers()
        | st.sampled_from([0.0, -0.0, 0.1, 5.7, 1_234.5])
        | st.text()
        | st.sampled_from(["\x7f", "\ud800", '"', "\n", 2**63, 2**64, -(2**70)])
        | st.lists(st.text()),
    ),
)
def test_the_line_of_an_event_is_that_of_its_record(event: LogEvent, fields: dict[str, Any]) -> None:
    written = event_line(event, {**fields}, CREATED)
    assert written.decode("ascii") == as_a_record(event, fields)


@given(st.floats())
def test_a_number_is_read_back_as_it_was(value: float) -> None:
    assert repr(json.loads(line({"value": value}))["value"]) == repr(value)


def test_a_message_beyond_ascii_is_escaped_too() -> None:
    assert '"message":"gr\\u00fcn"' in line({}, "grün")


def test_a_traceback_stands_before_the_fields() -> None:
    try:
        raise ValueError("odd")
    except ValueError as exc:
        members = json.loads(line({"a": 1}, exc_info=(type(exc), exc, exc.__traceback__)))
    assert [*members] == ["level", "logger", "message", "exc_info", "a", "time"]
    assert members["exc_info"].startswith("Traceback (most recent call last):\n")
    assert members["exc_info"].endswith("\nValueError: odd")
    assert json.loads(line({"a": 1}, exc_text="as text", stack_info="where")) == {
        "level": "INFO",
        "logger": "one",
        "message": "said",
        "exc_info": "as text",
        "stack_info": "where",
        "a": 1,
        "time": "2026-11-23T16:21:32.630502+00:00",
    }


def test_a_private_attribute_of_a_record_is_not_written() -> None:
    assert "_private" not in line({"_private": 1})


@pytest.mark.parametrize("other", ["", "ü"], ids=["plain", "through json"])
def test_a_whole_second_has_no_fraction(other: str) -> None:
    told = line({"other": other}, created=CREATED.replace(microsecond=0))
    assert told.endswith(',"time":"2026-11-23T16:21:32+00:00"}')
