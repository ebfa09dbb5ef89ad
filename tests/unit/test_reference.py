"""The two pages of reference say what the code says, and the tables that help them leave nothing out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sidecar.telemetry.metrics import LOG_FIELDS
from tests.logged import Logged, Source, Unreadable
from tests.reference import (
    CLOSED,
    COMMAND,
    EVERY_LINE,
    LOGS_PAGE,
    METRICS_PAGE,
    logged,
    logs_page,
    metrics,
    metrics_page,
)
from tests.reference_words import LOGGERS, MESSAGES, VALUES

TABLE_OF_FIELDS = "LOG_FIELDS of sidecar/telemetry/metrics.py"
TABLE_OF_WORDS = "tests/reference_words.py"


def test_every_field_of_a_log_line_is_explained_and_no_other() -> None:
    carried = {name: each for each in logged() for name in each.fields}
    missing = [
        f"{name!r}, which {line.logger} logs with {line.message!r}, is not explained in {TABLE_OF_FIELDS}"
        for name, line in carried.items()
        if name not in LOG_FIELDS
    ]
    left_over = [
        f"{name!r} stands in {TABLE_OF_FIELDS}, but no log line carries it"
        for name in LOG_FIELDS.keys() - carried.keys()
    ]
    assert [*missing, *left_over] == []
    assert EVERY_LINE.keys() & LOG_FIELDS.keys() == set()


def test_every_message_and_logger_is_explained_and_no_other() -> None:
    said = {(each.logger, each.message) for each in logged()}
    missing = [
        f"{message!r} of {logger} is not in {TABLE_OF_WORDS}" for logger, message in said - MESSAGES.keys()
    ]
    left_over = [
        f"{message!r} of {logger} stands in {TABLE_OF_WORDS}, but nothing logs it"
        for logger, message in MESSAGES.keys() - said
    ]
    assert [*missing, *left_over] == []
    assert LOGGERS.keys() == {logger for logger, _ in said}


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


# How log lines are read from code -----------------------------------------------------------------------


def read(tmp_path: Path, *lines: str) -> list[Logged]:
    package = tmp_path / "package"
    package.mkdir()
    (package / "module.py").write_text("\n".join(["logger = logging.getLogger('one')", *lines]))
    return Source(package).logged()


def test_a_field_is_found_however_the_line_came_by_it(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        "def ids(): return {'c': 1}",
        "def told(log_fields):",
        "    new = {'a': 1}",
        "    late = {'e': 1}",
        "    late['f'] = 2",
        "    old = {f'old_{key}': value for key, value in new.items()}",
        "    logger.info('first', extra={**new, **old, 'b': 2, **log_fields})",
        "    logger.warning('second' if new else 'third %s', extra=late)",
        "    logger.exception(f'fourth {new}')",
        "told(log_fields=ids())",
    )
    assert found == [
        Logged("one", "first", "info", ("a", "old_a", "b", "c"), False),
        Logged("one", "fourth …", "error", (), True),
        Logged("one", "second", "warning", ("e", "f"), False),
        Logged("one", "third …", "warning", ("e", "f"), False),
    ]


def test_a_level_that_depends_on_something_goes_with_the_message_that_does(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        "less = 'with less' if fewer else 'as ever'",
        "logger.log(logging.WARNING if fewer else logging.INFO, less)",
    )
    assert [(each.level, each.message) for each in found] == [("info", "as ever"), ("warning", "with less")]


@pytest.mark.parametrize("extra", ["made()", "given", "{name: 1}", "[1]"])
def test_fields_that_cannot_be_read_are_an_error_that_names_the_line(tmp_path: Path, extra: str) -> None:
    with pytest.raises(Unreadable, match=r"^package/module\.py:3: the field of this log line cannot be read"):
        read(tmp_path, "def told(given, name):", f"    logger.info('first', extra={extra})")


def test_a_name_belongs_to_the_nearest_function_that_sets_it(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        "fields = {'outer': 1}",
        "def told():",
        "    fields = {'inner': 1}",
        "    logger.info('first', extra=fields)",
        "logger.info('second', extra=fields)",
    )
    assert [each.fields for each in found] == [("inner",), ("outer",)]
