"""What a doctor finds by values alone: requests that execute nothing, SQLite's releases, skewed clocks."""

from __future__ import annotations

import time
from email.utils import formatdate

import pytest

from sidecar.cli.doctor import _skew, harmless
from sidecar.cli.findings import has_wal_bug
from sidecar.core.instant import iso_time
from sidecar.settings.reading import default


@pytest.mark.parametrize(
    ("version", "has_it"),
    [
        ((3, 40, 1), True),
        ((3, 44, 5), True),
        ((3, 44, 6), False),
        ((3, 45, 0), True),
        ((3, 50, 6), True),
        ((3, 50, 7), False),
        ((3, 51, 2), True),
        ((3, 51, 3), False),
        ((3, 52, 0), False),
        ((4, 0, 0), False),
    ],
)
def test_the_releases_of_sqlite_with_the_bug_are_known(version: tuple[int, int, int], has_it: bool) -> None:
    assert has_wal_bug(version) is has_it


@pytest.mark.parametrize(
    ("route", "asked"),
    [
        ({"path": "/a"}, ("HEAD", "/a")),
        ({"path": "**/recovery/execute"}, ("HEAD", "/api/v1/recovery/execute")),
        ({"path": "/a/{b}/run"}, ("HEAD", "/a/scopegate-doctor/run")),
        ({"path": "/a", "methods": ["GET"], "body": "empty"}, ("OPTIONS", "/a")),
        ({"path": "/a", "methods": ["HEAD", "POST"], "body": ["empty", "json"]}, ("OPTIONS", "/a")),
    ],
)
def test_the_backend_is_asked_with_a_method_that_is_not_gated(
    route: dict[str, object], asked: tuple[str, str]
) -> None:
    (made,) = default("http://h:1", gate={"routes": [route]}).gate.routes
    assert harmless(made) == asked


@pytest.mark.parametrize("seconds", [-60, 60])
def test_a_clock_that_differs_by_more_than_five_seconds_is_named(seconds: int) -> None:
    now = time.time() + seconds
    for date in (formatdate(now, usegmt=True), iso_time(int(now * 1_000_000))):
        (found,) = _skew(date, "the backend")
        assert ("ahead of" if seconds > 0 else "behind") in found.what


@pytest.mark.parametrize("date", [None, "", "soon", "Mon, 99"])
def test_a_clock_that_agrees_or_says_nothing_is_no_finding(date: str | None) -> None:
    assert list(_skew(date, "the backend")) == []
    assert list(_skew(formatdate(usegmt=True), "the backend")) == []
