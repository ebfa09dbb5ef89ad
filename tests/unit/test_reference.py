"""The two pages of reference say what the code says, and the tables that help them leave nothing out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sidecar.telemetry.events import FIELDS, LOGGERS, LogEvent
from tests.reference import (
    CLOSED,
    COMMAND,
    EVERY_LINE,
    LOGS_PAGE,
    METRICS_PAGE,
    logs_page,
    metrics,
    metrics_page,
)
from tests.reference_words import VALUES

TABLE_OF_WORDS = "tests/reference_words.py"


def test_every_field_and_logger_is_explained_and_no_other() -> None:
    assert {name for event in LogEvent for name in event.fields} - {"exc_info"} == FIELDS.keys()
    assert {event.logger.name for event in LogEvent} == LOGGERS.keys()
    assert EVERY_LINE.keys() & FIELDS.keys() == set()


def test_every_label_is_explained_and_no_other() -> None:
    labels = {(each.family, label) for each in metrics() for label in each.labels}
    assert len(labels) > 10
    told = CLOSED.keys() | {key for key, words in VALUES.items() if isinstance(words, str)}
    assert labels - told == set(), f"say in {TABLE_OF_WORDS} what values these labels have"
    assert (told | VALUES.keys()) - labels == set()
    for key, words in VALUES.items():
        assert isinstance(words, str) or words.keys() <= set(CLOSED[key]), key


@pytest.mark.parametrize(
    ("page", "made"), [(METRICS_PAGE, metrics_page), (LOGS_PAGE, logs_page)], ids=["metrics", "logs"]
)
def test_the_pages_are_as_the_code_has_it(page: Path, made: Callable[[], str]) -> None:
    is_new = page.exists() and page.read_text(encoding="utf-8") == made()
    assert is_new, f"{page.name} is out of date: run `{COMMAND}`"


def test_every_metric_has_a_meaning_and_a_histogram_its_buckets() -> None:
    found = metrics()
    assert len(found) > 25
    assert [each.name for each in found if not each.meaning.endswith(".")] == []
    assert {bool(each.buckets) for each in found if each.kind == "histogram"} == {True}
