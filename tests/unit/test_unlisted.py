"""What becomes of requests that no route lists, and that no disguise takes an exception for its own."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.core.pattern import RoutePattern
from sidecar.core.unlisted import TREATMENTS, ExceptedPaths, Treatment, Unlisted, not_listed
from sidecar.web.wire.headers import HeaderFields
from tests import deforming, lenient

# Wide exceptions that the deformations of other paths end in or begin with.
WIDE = "/healthz **/x **/c **/y /{a} **/{a}/{b}/execute /api/{rest...} /recovery/{rest...} /v1/heal/{rest...}"
EXCEPTED = ExceptedPaths(map(RoutePattern.parse, WIDE.split()))
NONE = ExceptedPaths(())
SPARED = ExceptedPaths([RoutePattern.parse("/healthz")])


def holds(target: bytes, headers: lenient.HeaderBytes = ()) -> bool:
    return EXCEPTED.holds(target.decode("utf-8", "surrogateescape"), HeaderFields(headers).deciding())


@given(st.randoms(use_true_random=False))
def test_no_request_is_excepted_that_a_careless_backend_takes_for_another_path(draw: random.Random) -> None:
    target, headers = deforming.request(draw)
    # Paths of these routes are not excepted.
    routes = (lenient.HEAL, lenient.KICK)
    if lenient.executes(b"POST", target, headers, routes) is not None:
        assert not holds(target, headers), (target, headers)


@pytest.mark.parametrize("target", ["/a/x", "/a/X", "/api/b/x?y=/v1/heal", "/healthz"])
def test_a_plain_path_is_excepted_only_as_it_is_spelled(target: str) -> None:
    assert EXCEPTED.holds(target) is (target != "/a/X")


@pytest.mark.parametrize(
    ("path", "excepted"),
    [
        ("/", True),
        ("//", False),
        ("/login", True),
        ("/login/", True),
        ("/login//", False),
        ("/static/app.css", True),
        ("/static/a/b.html", True),
        ("/static/", False),
        ("/static//a", False),
        ("/static/../admin", False),
        ("/static/a/%2e%2e/%2e%2e/admin", False),
        ("/static/..%2fadmin", False),
        ("/static/..;/admin", False),
        ("/static/#/admin", False),
        ("/jobs/7:cancel", True),
        ("/jobs/:cancel", False),
        ("/jobs/7:cancel.json", False),
        ("/jobs/7%3acancel", False),
    ],
)
def test_an_exception_is_written_as_a_path_of_a_route_is(path: str, excepted: bool) -> None:
    paths = ("/", "/login", "/login/", "/static/{rest...}", "/jobs/{job}:cancel")
    found = ExceptedPaths(map(RoutePattern.parse, paths))
    assert found.holds(path) is excepted
    assert [found.lacks(pattern) for pattern in found.patterns] == [None] * len(paths)


def test_a_path_with_more_readings_than_are_tried_is_not_excepted() -> None:
    assert not EXCEPTED.holds("/" + "%2525%25%2e;a+b\\" * 400 + "/x")


@pytest.mark.parametrize("reads", TREATMENTS)
@pytest.mark.parametrize("writes", TREATMENTS)
def test_a_read_with_a_method_override_gets_the_stricter_treatment(
    reads: Treatment, writes: Treatment
) -> None:
    unlisted = Unlisted(reads, writes, NONE)
    stricter = max(reads, writes, key=TREATMENTS.index)
    assert unlisted.treatment("GET", "/x", [("X-HTTP-Method-Override", "PUT")])[0] == stricter
    assert unlisted.treatment("GET", "/x", []) == (reads, "reads")
    assert unlisted.treatment("TRACE", "/x", []) == (writes, "writes")


def test_an_exception_passes_whatever_the_treatment() -> None:
    unlisted = Unlisted("record", "refuse", SPARED)
    assert unlisted.treatment("GET", "/healthz", []) == ("pass", "reads")
    assert unlisted.treatment("PUT", "/healthz", []) == ("pass", "writes")
    assert unlisted.treatment("PUT", "/health", []) == ("refuse", "writes")


@pytest.mark.parametrize(
    ("name", "value", "excepted"),
    [
        ("X-Original-URL", "/healthz?full", True),
        ("X-Original-URL", "/admin", False),
        ("X-Original-URL", "/healthz, /admin", False),  # which of the two is meant cannot be told
        ("X-Forwarded-Prefix", "/", True),
        ("X-Forwarded-Prefix", "/api", False),
        ("X-Forwarded-Host", "gate.example", True),
        ("X-Forwarded-Host", "gate.example/admin?", False),
        ("X-Script-Name", "/healthz", False),
        ("X-HTTP-Method", "PUT", True),  # it changes no path
    ],
)
def test_a_header_that_leads_to_another_path_takes_the_exception_away(
    name: str, value: str, excepted: bool
) -> None:
    assert SPARED.holds("/healthz", [(name, value)]) is excepted


def test_a_prefix_is_harmless_where_the_path_is_excepted_with_it_and_without_it() -> None:
    found = ExceptedPaths(map(RoutePattern.parse, ("/api/healthz", "/healthz")))
    assert found.holds("/healthz", [("X-Forwarded-Prefix", "/api")])
    assert not found.holds("/healthz", [("X-Forwarded-Prefix", "/api"), ("X-Forwarded-Prefix", "/v1")])


def test_the_refusal_names_the_key_that_decides() -> None:
    refusal = not_listed("PUT", "writes")
    assert (refusal.code, "gate.unlisted.writes" in refusal.message) == ("not_listed", True)
