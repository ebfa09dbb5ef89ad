"""Log lines: what a call of an event writes."""

from __future__ import annotations

import logging

import pytest

from sidecar.telemetry.events import LogEvent


def test_a_line_has_the_logger_level_message_and_fields_of_its_event(
    caplog: pytest.LogCaptureFixture,
) -> None:
    LogEvent.RELOAD_IMPOSSIBLE.log(cause="signal", errors=("why",))
    (record,) = caplog.records
    assert (record.name, record.levelname, record.getMessage()) == (
        "scopegate.reload",
        "WARNING",
        "reload refused",
    )
    assert (vars(record)["cause"], vars(record)["errors"]) == ("signal", ("why",))


def test_arguments_fill_the_message(caplog: pytest.LogCaptureFixture) -> None:
    LogEvent.SCOPELESS_ACTIONS.log("low")
    assert caplog.messages == ["actions below low risk need no scope"]


def test_a_traceback_comes_with_the_line(caplog: pytest.LogCaptureFixture) -> None:
    LogEvent.COMMAND_FAILED.log(exc=ValueError("odd"))
    assert "ValueError: odd" in caplog.text


def test_a_line_names_the_place_of_its_call(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the fixture that checks every call would be the place
    LogEvent.SPANS_LOST.log()
    LogEvent.SCOPELESS_ACTIONS.log("low")
    LogEvent.SPANS_LOST.log_fields({})
    here = test_a_line_names_the_place_of_its_call.__code__
    assert [(record.filename, record.funcName) for record in caplog.records] == [
        ("test_events.py", here.co_name)
    ] * 3
    assert [record.lineno - here.co_firstlineno for record in caplog.records] == [4, 5, 6]


def test_nothing_is_made_of_a_line_that_is_not_wanted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "scopegate.reload")
    LogEvent.SCOPELESS_ACTIONS.log("low")
    assert caplog.records == []
