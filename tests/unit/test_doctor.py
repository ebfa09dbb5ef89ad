"""What a doctor finds by values alone: requests that execute nothing, SQLite's releases, skewed clocks."""

from __future__ import annotations

import time
from email.utils import formatdate
from pathlib import Path

import pytest

from sidecar.cli.client import Trust
from sidecar.cli.doctor import Examination, Patient, _skew, at_the_backend, harmless
from sidecar.cli.findings import _expiring_certificate, _of_custody, _readable, has_wal_bug, unseen
from sidecar.core.instant import iso_time
from sidecar.settings.reading import default
from tests.certificates import Authority


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
    settings = default("http://h:1", gate={"routes": [route]})
    (made,) = settings.gate.routes
    assert harmless(made, settings) == asked


def test_head_is_not_sent_where_another_route_gates_it() -> None:
    routes = [
        {"name": "start", "path": "/jobs/{id}"},
        {"name": "look", "path": "/jobs/{id}", "methods": ["GET"], "body": "empty"},
    ]
    settings = default("http://h:1", gate={"routes": routes})
    assert harmless(settings.gate.routes[0], settings) == ("OPTIONS", "/jobs/scopegate-doctor")


@pytest.mark.parametrize(
    ("mode", "is_named"), [(0o600, False), (0o400, False), (0o640, True), (0o604, True), (0o620, True)]
)
def test_a_store_that_its_group_or_others_can_open_is_named(
    tmp_path: Path, mode: int, is_named: bool
) -> None:
    file = tmp_path / "scopegate.db"
    file.touch()
    file.chmod(mode)
    settings = default("http://h:1", store={"url": f"sqlite:///{file}"})
    found = [each for each in _readable(settings) if each.code == "file_readable_by_others"]
    assert [f"{file} (store.url) has the mode {mode:04o}"] * is_named == [each.what for each in found]


def test_permissions_that_cannot_be_seen_are_said_and_are_not_taken_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = default("http://h:1", store={"url": f"sqlite:///{tmp_path}/scopegate.db"})
    assert list(unseen(settings)) == []  # there is no store yet

    def refused(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.stat", refused)
    first, second = unseen(settings)
    assert (
        first == f"The permissions of {tmp_path}/scopegate.db (store.url) were not seen: Permission denied."
    )
    assert "scopegate.db-wal" in second
    assert list(_readable(settings)) == []


def test_authorities_count_until_the_last_of_them_expires(tmp_path: Path) -> None:
    old, new = (Authority(tmp_path).issue(name, days=days) for name, days in (("old", 2), ("new", 90)))
    both = tmp_path / "both.pem"
    both.write_bytes(old.certificate_file.read_bytes() + new.certificate_file.read_bytes())
    now = time.time_ns() // 1_000
    assert list(_expiring_certificate("data.tls.client_ca_file", both, now)) == []
    # Of a certificate and those between it and its authority, peers see the first one.
    (found,) = _expiring_certificate("data.tls.certificate_file", both, now)
    assert found.code == "certificate_expires"
    (found,) = _expiring_certificate("data.tls.client_ca_file", old.certificate_file, now)
    assert "data.tls.client_ca_file" in found.what


def test_a_client_certificate_for_the_backend_is_custody_and_a_header_for_what_passes_is_not(
    tmp_path: Path,
) -> None:
    pair = Authority(tmp_path).issue("sidecar")
    (tmp_path / "token").write_text("Bearer x")
    passing = {"header": "Authorization", "value_file": str(tmp_path / "token"), "on": ["pass"]}
    for upstream, is_named in (
        ({"tls": pair.settings()}, False),
        ({"credentials": [passing]}, True),
        ({"credentials": [{**passing, "on": ["gated"]}]}, False),
    ):
        settings = default("https://h:1", upstream=upstream)
        assert [each.code for each in _of_custody(settings)] == ["no_custody"] * is_named


@pytest.mark.parametrize(("mode", "is_open"), [(0o666, True), (0o660, False)])
def test_a_backend_on_a_unix_socket_is_judged_by_who_may_connect(
    tmp_path: Path, mode: int, is_open: bool
) -> None:
    place = tmp_path / "backend.sock"
    examination = Examination()
    patient = Patient(default(f"unix:{place}"), None, Trust())
    at_the_backend(patient, examination)
    assert examination.not_tried == [
        f"The socket of the backend was not found: No such file or directory ({place})."
    ]
    place.touch()
    place.chmod(mode)
    at_the_backend(patient, examination)
    assert [each.code for each in examination.findings] == ["backend_answers_ungated"] * is_open
    assert examination.looked_at == [f"the mode of the backend's socket, {place}"]


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
