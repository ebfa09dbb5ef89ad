"""What commands accept as an answer: what the models say, with tolerance for sidecars of other versions."""

from __future__ import annotations

from typing import Any

import pytest

from sidecar.cli.shapes import misfit
from sidecar.web.wire import answers, health

TIME = "2026-01-31T12:00:00.000000+00:00"
STATUS: dict[str, Any] = {
    "version": "1",
    "uptime_seconds": 1,
    "draining": False,
    "in_flight": 0,
    "unknown_executions": None,
    "oldest_unknown_admitted_at": None,
    "clock": {"ok": True, "reason": None},
    "store": {"url": "sqlite", "size": None, "wal_size": 1, "free": None, "growth_per_day": 0},
    "policy_revision": None,
    "config_revision": "c",
    "last_reload": {"time": TIME, "ok": True, "errors": []},
    "scope_required_from": "low",
    "shadow_routes": [],
    "unlisted": {"reads": "pass", "writes": "record", "excepted": ["/healthz"]},
    "scopes_served_on": "data",
    "listeners": {"data": "d", "admin": "a", "ops": "o"},
}
MISSING = object()


def changed(place: str, value: Any) -> dict[str, Any]:
    """A status with another value at a place, or without it."""
    *above, name = place.split(".")
    whole = {key: dict(member) if isinstance(member, dict) else member for key, member in STATUS.items()}
    holder = whole[above[0]] if above else whole
    if value is MISSING:
        del holder[name]
    else:
        holder[name] = value
    return whole


def test_an_answer_of_this_version_fits() -> None:
    assert misfit(STATUS, answers.Status) is None


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("clock", MISSING),  # an earlier version
        ("clock", None),
        ("store.free", MISSING),
        ("scopes_served_on", MISSING),
        ("unlisted", MISSING),
        ("listeners", {"data": "d", "another": "x"}),
        ("more", {"any": "member"}),  # a later one
        ("scope_required_from", "extreme"),
        ("uptime_seconds", 0.5),
    ],
)
def test_an_answer_of_another_version_fits(place: str, value: Any) -> None:
    assert misfit(changed(place, value), answers.Status) is None


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("version", MISSING),
        ("version", None),
        ("draining", 0),
        ("in_flight", True),
        ("in_flight", 1.5),
        ("in_flight", -1),
        ("in_flight", 10**18),
        ("uptime_seconds", 1e300),
        ("uptime_seconds", float("nan")),
        ("oldest_unknown_admitted_at", "2026-01-31T12:00:00"),
        ("oldest_unknown_admitted_at", "soon"),
        ("last_reload.time", "1969-12-31T23:00:00+00:00"),
        ("last_reload.errors", "none"),
        ("store.size", "1"),
        ("clock.ok", "yes"),
        ("scope_required_from", 1),
        ("listeners", {"data": 1}),
    ],
)
def test_a_wrong_member_is_named(place: str, value: Any) -> None:
    expected = "listeners" if place.startswith("listeners") else place
    assert misfit(changed(place, value), answers.Status) == expected


def test_an_entry_of_a_list_is_named_by_its_place() -> None:
    page = {"scopes": [{"scope_id": "s", "allowed_actions": ["a", 1]}], "next": None}
    assert misfit(page, answers.ScopePage) == "scopes[0].allowed_actions[1]"
    assert misfit({"scopes": [], "next": 7}, answers.ScopePage) == "next"


def test_a_wrong_member_is_named_before_a_missing_one() -> None:
    assert misfit({"listeners": 1}, answers.Status) == "listeners"
    assert misfit({"ready": True, "checks": {"a": 1}}, health.Readiness) == "checks"


@pytest.mark.parametrize("value", [None, [], "status", 1])
def test_an_answer_that_is_no_object_does_not_fit(value: Any) -> None:
    assert misfit(value, answers.Status) == "the answer"
