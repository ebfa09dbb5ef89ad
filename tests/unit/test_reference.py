"""The generated pages are as the code has it, and the tables they are made of leave nothing out."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from prometheus_client.parser import text_string_to_metric_families

from sidecar.core.command import NotEmitted
from sidecar.core.entries import outcome_of
from sidecar.errors import ERRORS, Refusal
from sidecar.telemetry.events import FIELDS, LOGGERS, LogEvent
from sidecar.telemetry.metrics import TABLE, Metrics
from tests import reference
from tests.reference import COMMAND, ROOT, differences, filled, made, main
from tests.reference.logs import EVERY_LINE


def test_every_generated_page_is_as_the_code_has_it() -> None:
    texts = made()
    assert {page.name for page in texts} >= {"metrics.md", "logs.md"}
    assert "\n".join(differences(texts).values()) == "", f"run `{COMMAND}`"


def test_the_command_shows_what_differs_and_fails_or_writes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text("one\ntwo\n")
    monkeypatch.setattr(reference, "ROOT", tmp_path)
    monkeypatch.setattr(reference, "made", lambda: {page: "one\n2\n"})
    with pytest.raises(SystemExit, match="1 files are out of date"):
        main(["--check"])
    assert capsys.readouterr().out == "--- page.md\n+++ page.md\n@@ -1,2 +1,2 @@\n one\n-two\n+2\n"
    main([])
    assert capsys.readouterr().out == "page.md\n"
    assert page.read_text() == "one\n2\n"
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--check"])


def test_a_part_is_put_between_its_marks() -> None:
    page = "a\n<!-- generated: one -->\nold\n<!-- end -->\n<!-- generated: two -->\n<!-- end -->\nb\n"
    assert filled(filled(page, "one", "1\n"), "two", r"\2") == (
        "a\n<!-- generated: one -->\n1\n<!-- end -->\n<!-- generated: two -->\n\\2\n<!-- end -->\nb\n"
    )
    with pytest.raises(ValueError, match="generated: three"):
        filled(page, "three", "")


# Log lines ----------------------------------------------------------------------------------------------


def test_every_field_and_logger_is_explained_and_no_other() -> None:
    assert {name for event in LogEvent for name in event.fields} - {"exc_info"} == FIELDS.keys()
    assert {event.logger.name for event in LogEvent} == LOGGERS.keys()
    assert EVERY_LINE.keys() & FIELDS.keys() == set()
    assert vars(logging.makeLogRecord({})).keys() & FIELDS.keys() == set()


def test_every_log_line_is_an_event() -> None:
    files = [file for file in ROOT.glob("sidecar/**/*.py") if 'getLogger("scopegate' in file.read_text()]
    assert [file.name for file in files] == ["demo.py"], "only the demo, which shows what the gate logs"


def test_no_two_events_say_the_same() -> None:
    assert len({(event.logger, event.message) for event in LogEvent}) == len(LogEvent.__members__)


# Metrics ------------------------------------------------------------------------------------------------


def test_the_table_says_what_the_metrics_page_shows() -> None:
    page = Metrics().page().decode()
    shown = text_string_to_metric_families(page)
    assert [(family.name, family.type, family.documentation) for family in shown] == [
        (row.family, row.kind, row.meaning) for row in TABLE
    ]
    assert len(TABLE) > 25
    assert [row.name for row in TABLE if not row.meaning.endswith(".")] == []
    assert {bool(row.buckets) for row in TABLE if row.kind == "histogram"} == {True}


def test_the_values_of_labels_are_those_of_the_code() -> None:
    refused = {outcome_of(Refusal(code, "")).value for code in ERRORS}
    assert {*Metrics.decisions.labels["outcome"]} == {"selected", "none", *refused}
    not_emitted = get_args(get_type_hints(NotEmitted)["why"])
    assert {*Metrics.emissions.labels["result"]} == {"recorded", "ruled_out", *not_emitted}


def test_the_children_of_a_label_are_looked_up_once() -> None:
    metrics = Metrics()
    child = metrics.reloads.labels("ok")
    assert metrics.reloads.labels("ok") is child
    assert metrics.reloads.labels("refused") is not child
    child.inc(2)
    assert metrics.registry.get_sample_value("scopegate_reloads_total", {"result": "ok"}) == 2
