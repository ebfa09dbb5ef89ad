"""No spelling of a gated path passes, and what only looks like one does."""

from __future__ import annotations

import re
import string
import time
from dataclasses import replace
from typing import Any
from unittest.mock import patch
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.core import _readings as readings
from sidecar.core import target as module
from sidecar.core import targetheaders
from sidecar.core._lookup import Lookup
from sidecar.core._quicktest import MAX_MADE, QuickTest
from sidecar.core.pattern import RoutePattern, overlapping
from sidecar.core.target import (
    Gated,
    GatedCalls,
    GatedPaths,
    PassThrough,
    Place,
    Rejected,
    classify,
    conflicts,
)

Answer = PassThrough | Gated | Rejected

ANYWHERE = RoutePattern.parse("**/recovery/execute")
EXACT = RoutePattern.parse("/v1/run")
NAMED = RoutePattern.parse("/v1/incidents/{incident}/run")
RUN = GatedPaths([EXACT])
MIXED_CASE = RoutePattern.parse("/V1/Heal")


def ask(
    target: str,
    *patterns: RoutePattern,
    method: str = "POST",
    headers: tuple[tuple[str, str], ...] = (),
    has_body: bool = False,
) -> Answer:
    return classify(method, target, headers, has_body, GatedPaths(patterns or (ANYWHERE,)))


def code(answer: Answer) -> str:
    """The code of a refusal; what it is otherwise."""
    return answer.refusal.code if isinstance(answer, Rejected) else type(answer).__name__


def message(answer: Answer) -> str:
    assert isinstance(answer, Rejected)
    return answer.refusal.message


def test_a_remembered_place_is_that_of_its_own_path() -> None:
    paths = GatedPaths((NAMED, EXACT))
    targets = ["/v1/incidents/a/run", "/v1/incidents/b/run?x", "/v1/run", "/V1/run", "/v1/run/", "/v1/runs"]
    fresh = [GatedPaths((NAMED, EXACT)).place(target) for target in targets]
    assert len({str(place) for place in fresh}) == len(targets)
    for _ in range(2):
        assert [paths.place(target) for target in targets] == fresh


def test_other_routes_do_not_remember_the_places_of_these() -> None:
    for patterns, index in (((NAMED, EXACT), 1), ((EXACT,), 0)):
        place = GatedPaths(patterns).place("/v1/run")
        assert isinstance(place, Place)
        assert place.judged == {"POST": Gated(index, {})}
    assert GatedPaths((NAMED,)).place("/v1/run") is None


def test_a_header_decides_in_any_spelling_of_its_name() -> None:
    for known in ("upgrade", *targetheaders.OVERRIDES, *targetheaders.ORIGINALS, *targetheaders.REBUILDING):
        assert targetheaders.decides(known)
        assert targetheaders.decides(known.upper().replace("-", "_"))
    for name in ("", "Host", "Connection", "X-Forwarded-For", "Accept", "Scopegate-Decision-Id", "X-Upgrade"):
        assert not targetheaders.decides(name)


def test_a_remembered_header_is_judged_by_its_own_value() -> None:
    for _ in range(2):
        assert ask("/orders", headers=(("X-Forwarded-Host", "api.example.org"),)) == PassThrough()
        for value in ("x/recovery/execute?", "api.example.org, x/recovery/execute?"):
            answer = ask("/orders", headers=(("X-Forwarded-Host", value),))
            assert code(answer) == "override_refused"
        # The same value in another header is no plain port.
        answer = ask("/recovery/execute", headers=(("X-Forwarded-Port", "api.example.org"),))
        assert code(answer) == "override_refused"
        assert code(ask("/orders", headers=(("X-Original-URL", "api.example.org"),))) == "PassThrough"


def test_the_headers_that_many_clients_send_take_bounded_memory() -> None:
    for number in range(2 * targetheaders.MAX_HEADERS):
        assert ask("/orders", headers=(("X-Forwarded-Host", f"h{number}"),)) == PassThrough()
    assert ask("/orders", headers=(("X-Forwarded-Host", "h" * 1000),)) == PassThrough()
    assert len(targetheaders.deciding) <= targetheaders.MAX_HEADERS
    assert max(len(value) for _, value in targetheaders.deciding) <= targetheaders.LONGEST_REMEMBERED


# ---- the default route, tables ---------------------------------------------------------------------

LITERAL = [
    "/recovery/execute",
    "/api/v1/recovery/execute",
    "/API/V1/recovery/execute",
    "/recovery/execute?",
    "/recovery/execute?a=1&b=%2F..%2F",
    "/recovery/execute??next=/x",
    "/recovery/execute?x#y",
    "/recovery/execute?;//../%00",
    "/a%41b/recovery/execute",
    "/%zz/recovery/execute",
    "/%/recovery/execute",
    "/a%20b/recovery/execute",
    "/a%0Ab/recovery/execute",
    "/%C3%A9/recovery/execute",
    "/%ff/recovery/execute",
    "/x%25y/recovery/execute",
    "/x%25252e/recovery/execute",
    "/x;v=1/recovery/execute",
    "/x;v=1;w/y/recovery/execute",
    "/v1.2/recovery/execute",
    "/.../recovery/execute",
    "/.well-known/recovery/execute",
    "/a:b@c/recovery/execute",
    "/recovery/execute/recovery/execute",
    "/~a/(b)/[c]/{d}/e|f/recovery/execute",
]

AMBIGUOUS = [
    # letters and separators escaped once, twice, in parts
    "/recovery%2Fexecute",
    "/recovery%2fexecute",
    "%2Frecovery%2Fexecute",
    "/%72ecovery/execute",
    "/recovery/%65xecute",
    "/recovery/execut%65",
    "/recovery/execut%45",
    "/%72%65%63%6f%76%65%72%79/%65%78%65%63%75%74%65",
    "/recovery%252Fexecute",
    "/recovery%25%32%46execute",
    "/recovery%%32fexecute",
    "/recovery/%2565xecute",
    "/%2572ecovery%2fexecute",
    "/api%2fv1%2frecovery%2fexecute",
    # overlong, in all lengths, raw and composed with escapes
    "/recovery%c0%afexecute",
    "/recovery%e0%80%afexecute",
    "/recovery%f0%80%80%afexecute",
    "/recovery%f8%80%80%80%afexecute",
    "/recovery%fc%80%80%80%80%afexecute",
    "/recovery%25c0%25afexecute",
    "/recovery\udcc0\udcafexecute",
    "/recovery/%c1%a5xecute",
    "/recovery%c0%a52fexecute",
    "/recovery%f0%8f%bc%8fexecute",
    "/recovery%e0%81%9cexecute",
    # case and compatibility forms
    "/Recovery/execute",
    "/recovery/Execute",
    "/RECOVERY/EXECUTE",
    "/recovery%EF%BC%8Fexecute",
    "/recovery\uff0fexecute",
    "/recovery/%EF%BD%85xecute",
    "/\uff32\uff25covery/execute",
    "/recovery%EF%BC%852fexecute",
    "/recovery%EF%BC%BCexecute",
    "/recovery/%E2%93%94xecute",
    "/\U0001d42becovery/execute",
    "/x%E2%80%A5/recovery/execute",
    # dot segments
    "/./recovery/execute",
    "/x/../recovery/execute",
    "/../recovery/execute",
    "/recovery/./execute",
    "/recovery/x/../execute",
    "/recovery/x/%2e%2e/execute",
    "/recovery/x/%2E./execute",
    "/recovery/x%2f..%2fexecute",
    "/recovery/x/%252e%252e/execute",
    "/recovery/x/\u2025/execute",
    "/recovery/x/..;/execute",
    "/recovery/x/..;y=1/execute",
    "/recovery/execute/.",
    "/recovery/execute/x/..",
    "/recovery/execute/%2e",
    "/recovery/x/y/..//../execute",
    "/recovery/x/..\\execute",
    "/x/%2e%2e/recovery/execute",
    "/x%2e/recovery/execute",
    "/x/..;/recovery/execute",
    # slashes of all kinds
    "//recovery/execute",
    "/api//recovery/execute",
    "/recovery//execute",
    "/recovery///execute",
    "/recovery/%2f/execute",
    "\\recovery\\execute",
    "/recovery\\execute",
    "/recovery%5Cexecute",
    "/recovery%255cexecute",
    "/a\\b/recovery/execute",
    "/a%2Fb/recovery/execute",
    "/a%252Fb/recovery/execute",
    "/a%5cb/recovery/execute",
    "/;x/recovery/execute",
    "/x/;y/recovery/execute",
    # cut off, or with something at the end
    "/recovery/execute;",
    "/recovery/execute;v=1",
    "/recovery/execute;v=1/x",
    "/recovery;v=1/execute",
    "/recovery;v=1/execute;w=2",
    "/recovery/execute%3Bv=1",
    "/recovery%3bv=1%2fexecute",
    "/recovery/execute#",
    "/recovery/execute#x",
    "/recovery/execute%23x",
    "/recovery/execute%3F",
    "/recovery/execute%3Fx=1",
    "/recovery/execute%253Fx=1",
    "/recovery/execute\0",
    "/recovery/execute%00",
    "/recovery/execute%00.html",
    "/recovery/execute%2500.html",
    "/recovery/execute/",
    "/recovery/execute//",
    "/recovery/execute%2f",
    "/recovery/execute/?x",
    "/recovery/execute.",
    "/recovery/execute...",
    "/recovery/execute%2e",
    "/recovery/execute ",
    "/recovery/execute%20",
    "/recovery/execute%20.%20/",
    "/recovery/execute%09",
    "/recovery/execute%0a",
    "/recovery/execute%c2%a0",
    "/recovery/execute%E3%80%80",
    "/recovery/execute.json",
    "/recovery/execute.JSON",
    "/recovery/execute.json/",
    "/recovery/execute%2ejson",
    "/recovery/execute.json;v=1",
    "/recovery/execute.json.json",
    "/recovery/execute.xml",
    "/recovery/execute.do",
    "/recovery/execute.action",
    "/recovery/execute.html",
    "/recovery/execute.HTML;v=1",
    "/recovery/execute+",
    "/recovery/execute%2B",
    "/recovery/execute.+",
    "/recovery./execute",
    "/recovery%20/execute",
    "/recovery+/execute",
    "/recovery.%20./execute.%20",
    "/recovery/..%20/execute",
    "/recovery/x/..%20/execute",
    "/recovery/...%20./execute",
    "/recovery/%20/execute",
    "/recovery/%20execute",
    "/%c2%a0recovery/execute",
    "/recovery/+execute",
    "/recovery%c2%a0/x/../execute",
    # bytes that are not UTF-8 dropped, anywhere and in every composition
    "/recovery/execute%ff",
    "/recovery/exe%80cute",
    "/%c0recovery/execute",
    "/recovery/%c0execute",
    "/recovery%ff/%feexecute",
    "/recovery/exec%c3ute",
    "/recovery/execut%ed%a0%80e",
    "/recovery/exe%25ffcute",
    "/recovery%25c0%252fexecute",
    "/recovery/%%ff65xecute",
    "/recovery/exe\udcffcute",
    "/recovery%ff%2fexecute",
    "/recovery/%ffexecute.%ffjson",
    "/recovery/x/.%ff./execute",
    "/recovery/%25%ff65xecute",
    # controls dropped
    "/recovery/exe%0Acute",
    "/recovery/exe%09cute",
    "/recovery/exe%0D%0Acute",
    "/recovery/%01execute",
    "/recovery/execute%7f",
    "/recovery/exe%c2%85cute",
    "/recovery/exe%00cute",
    "/recovery/exe%250acute",
    "/recovery/%%0a65xecute",
    "/recovery/%6%0a5xecute",
    "/recovery/%c1%0a%a5xecute",
    "/recovery/%ef%0a%bd%0a%85xecute",
    "/recovery/x/.%0a./execute",
    "/recovery%0d%2fexecute",
    "/recovery/execute.js%0Aon",
    "/recovery/\x7fexecute",
    "/re%0acovery/exec%c3ute",
    # format characters and others without a shape dropped
    "/recovery/exe%e2%80%8bcute",
    "/recovery/exe%c2%adcute",
    "/recovery/%ef%bb%bfexecute",
    "/recovery/exe%e2%81%a0cute",
    "/recovery/exe%25e2%2580%258bcute",
    "/recovery/exe%ef%b8%8fcute",
    "/recovery/exe%cd%8fcute",
    "/recovery/exe\u200dcute",
    "/recovery/exe%f3%a0%81%a5cute",
    "/recovery/%c1%e2%80%8b%a5xecute",
    # Latin-1, whose soft hyphen is one byte, and whose letters fold
    "/recovery/exe%adcute",
    "/recovery/execute%a0",
    # %uXXXX
    "/recovery/%u0065xecute",
    "/recovery/%U0065xecute",
    "/recovery%u002fexecute",
    "/recovery%uFF0Fexecute",
    "/recovery/%25u0065xecute",
    "/recovery/%u0025%36%35xecute",
    "/recovery/%u00%36%35xecute",
    "/recovery/exe%u200bcute",
    "/recovery/%uD835%uDC86xecute",
    "/recovery/%u000a%65xecute",
    # prefixes that two parsers read in two ways
    "/a#b/recovery/execute",
    "/a%23b/recovery/execute",
    "/a%3fb/recovery/execute",
    "/a%253fb/recovery/execute",
    "/a%3bb/recovery/execute",
    "/a%00b/recovery/execute",
    "/a\0b/recovery/execute",
    "/a%2%0aeb/recovery/execute",
    "/a%%0a2fb/recovery/execute",
    "/a%c0%0a%afb/recovery/execute",
    "/a%u002fb/recovery/execute",
    "/a%%ad2fb/recovery/execute",
    "/a%c0%afb/recovery/execute",
    "/a%ef%bc%8fb/recovery/execute",
    "/a b/recovery/execute",
    "/\u00e9/recovery/execute",
    "/\udcff/recovery/execute",
    # other forms of a target
    "http://host/recovery/execute",
    "HTTPS://user@host:8443/recovery/execute",
    "http:/recovery/execute",
    "http:recovery/execute",
    "http%3a%2f%2fhost%2frecovery%2fexecute",
    "http:\\\\host\\recovery\\execute",
    "/%5cx\\u//%5c;%/recovery/execute+",
    "recovery/execute",
    "//host/recovery/execute",
    "///host/recovery/execute",
    # several of them at once
    "//h/x/..;/recovery%2F..%2frecovery%5cexecute.json%00",
    "/a/%2e%2e/Recovery//%45xecute;x=%2f#y",
    "/recovery%5c.%5cexecute%2e%20%3fx",
]

PASSING = [
    "",
    "/",
    "*",
    "/a%2Fb",
    "/x%zz",
    "/x%0A",
    "/x%00y",
    "/a//b/../c;d#e\\f",
    "/caf%C3%A9",
    "/\udcff",
    "http://host/x",
    "/recovery",
    "/recovery/",
    "/execute",
    "/recover/execute",
    "/xrecovery/execute",
    "/recovery/executex",
    "/recovery/executes",
    "/recovery/xexecute",
    "/recovery-execute",
    "/recovery/execute/history",
    "/recovery/execute%2fhistory",
    "/recovery/execute-all",
    "/recovery/execute_json",
    "/recovery/execute/../history",
    "/recovery/../execute",
    "/recovery/%2e%2e/execute",
    "/recovery;x%2fy/z/execute",
    "/recovery/x/execute",
    "/execute/recovery",
    "/login?next=/recovery/execute",
    "/execute?recovery/execute",
    "/?/recovery/execute",
    "/search?q=%2Frecovery%2Fexecute",
    "/recovery?/execute",
    "/recovery%25252Fexecute",
    "/recovery/%252565xecute",
    "/recovery/x/%25252e%25252e/execute",
    "/recovery/execut%C3%A9",
    "/recovery/execute%CC%81",
    "/recovery/exec%f0%8d%a0%80ute/execute",
    "/recovery/execute%u",
    "/recovery/execute%u00",
    "/recovery/e+xecute",
    "/recovery/exe%20cute",
    "/recovery/execute.csv",
    "/recovery/execute.jsonl",
    "/recovery/%e6%89%a7%e8%a1%8c",
    "/recovery/%2525%0a36%35xecute",
    "/files/%d0%bf%d1%80%d0%b8%d0%bc%d0%b5%d1%80/execut",
    "/recoveryexecute",
    "/recovery/exec/ute",
    "/recovery/exe;x/cute",
]


@pytest.mark.parametrize("target", LITERAL)
def test_a_path_that_spells_the_route_out_is_judged(target: str) -> None:
    assert ask(target) == Gated(0, {})


@pytest.mark.parametrize("target", AMBIGUOUS)
def test_another_spelling_of_a_gated_path_is_refused(target: str) -> None:
    for method in ("POST", "GET", "DELETE"):
        answer = ask(target, method=method)
        assert isinstance(answer, Rejected)
        assert answer.refusal.code == "ambiguous_path"
        assert answer.allow == ()


@pytest.mark.parametrize("target", PASSING)
def test_a_target_that_is_gated_in_no_reading_passes(target: str) -> None:
    for method in ("POST", "GET", "PROPFIND"):
        assert ask(target, method=method, has_body=True) == PassThrough()


def test_the_tables_are_as_large_as_promised() -> None:
    assert len(set(AMBIGUOUS)) == len(AMBIGUOUS) >= 80
    assert len(set(PASSING)) == len(PASSING) >= 30


# ---- exact routes and {name} segments --------------------------------------------------------------


@pytest.mark.parametrize(
    "target",
    [
        "/v1/run/",
        "/V1/run",
        "/v1/./run",
        "/x/../v1/run",
        "/a%2Fb/../v1/run",
        "/a%2fb/%2e%2e/v1/run",
        "/a%2Fb/%2e%2e/v1/%72un",
        "/a\uff0fb/../v1/run",
        "//host/v1/run",
        "//v1/run",
        "http://host/v1/run",
        "http:///v1/run",
        "http:/v1/run",
        "http:v1/run",
        "v1/run",
        "/v1/r%C4%B1n/../run",
        "/v1/run;x/y",
        "/v1;x/run",
        "/v1/run%3f/x",
    ],
)
def test_another_spelling_of_an_exact_route_is_refused(target: str) -> None:
    assert code(ask(target, EXACT)) == "ambiguous_path"


@pytest.mark.parametrize(
    "target", ["/api/v1/run", "/v1/run/x", "/v1/x/run", "/v1", "/run", "x/v1/run", "/api;v1/run"]
)
def test_an_exact_route_gates_no_other_path(target: str) -> None:
    assert ask(target, EXACT) == PassThrough()


def test_an_exact_route_is_judged_where_it_is_spelled_out() -> None:
    assert ask("/v1/run?x", EXACT) == Gated(0, {})


def test_a_route_with_capitals_is_judged_only_with_them() -> None:
    assert ask("/V1/Heal", MIXED_CASE) == Gated(0, {})
    assert code(ask("/v1/heal", MIXED_CASE)) == "ambiguous_path"


def test_a_dotless_i_is_an_i_for_who_folds_to_upper_case() -> None:
    assert code(ask("/m%C4%B1x", RoutePattern.parse("/mix"))) == "ambiguous_path"


@pytest.mark.parametrize(
    ("segment", "value"),
    [
        ("inc-42", "inc-42"),
        ("a%20b", "a b"),
        ("%C3%A9", "\u00e9"),
        ("%41", "A"),
        ("100%25", "100%"),
        ("%zz", "%zz"),
        ("a.b", "a.b"),
        ("a+b", "a+b"),
    ],
)
def test_a_named_segment_is_decoded_once(segment: str, value: str) -> None:
    assert ask(f"/v1/incidents/{segment}/run", NAMED) == Gated(0, {"incident": value})


@pytest.mark.parametrize(
    "segment",
    [
        "",
        ".",
        "..",
        "a%2Fb",
        "a%252fb",
        "a%2eb",
        "a;b",
        "a%3Bb",
        "a\\b",
        "a#b",
        "a%00",
        "a b",
        "\u00e9",
        "..;a",
    ],
)
def test_a_named_segment_with_a_separator_is_ambiguous(segment: str) -> None:
    assert code(ask(f"/v1/incidents/{segment}/run", NAMED)) == "ambiguous_path"


def test_a_named_segment_that_is_not_utf8_is_ambiguous() -> None:
    for segment in ("%ff", "%c3", "%c1%a1", "%ed%a0%80"):
        assert "{incident} is not UTF-8" in message(ask(f"/v1/incidents/{segment}/run", NAMED))


def test_a_named_segment_that_is_escaped_twice_is_ambiguous() -> None:
    assert "{incident} is escaped twice" in message(ask("/v1/incidents/%2541/run", NAMED))


def test_a_parameter_anywhere_makes_a_path_with_names_ambiguous() -> None:
    pattern = RoutePattern.parse("**/{agent}/heal")
    assert ask("/x/a1/heal", pattern) == Gated(0, {"agent": "a1"})
    assert "a ; may cut off" in message(ask("/a1/heal;/x/a2/heal", pattern))


def test_several_names_are_all_given() -> None:
    pattern = RoutePattern.parse("**/{team}/agents/{agent}/heal")
    assert ask("/api/red/agents/7/heal", pattern) == Gated(0, {"team": "red", "agent": "7"})


@pytest.mark.parametrize(
    "target",
    ["/v1/incidents//run", "/v1/incidents/a%2fb/run", "/v1/incidents/a/run.json", "/V1/incidents/a/run"],
)
def test_another_spelling_of_a_route_with_names_is_refused(target: str) -> None:
    assert code(ask(target, NAMED)) == "ambiguous_path"


@pytest.mark.parametrize("target", ["/v1/incidents/run", "/v1/incidents/a/b/run", "/v1/incidents/a/runs"])
def test_a_name_stands_for_one_segment(target: str) -> None:
    assert ask(target, NAMED) == PassThrough()


# ---- several routes --------------------------------------------------------------------------------


def test_the_first_pattern_that_is_spelled_out_counts() -> None:
    last = RoutePattern.parse("**/execute")
    assert ask("/recovery/execute", EXACT, ANYWHERE, last) == Gated(1, {})
    assert ask("/v1/run", EXACT, ANYWHERE) == Gated(0, {})
    assert ask("/x/execute", EXACT, ANYWHERE, last) == Gated(2, {})


def test_a_path_that_another_reading_gives_to_another_route_is_ambiguous() -> None:
    assert ask("/v1/run;x/recovery/execute", ANYWHERE) == Gated(0, {})
    assert "/v1/run only by cutting" in message(ask("/v1/run;x/recovery/execute", ANYWHERE, EXACT))
    assert "/v1/run only by folding case" in message(ask("/V1/run", EXACT, RoutePattern.parse("**/run")))


def test_no_routes_gate_nothing() -> None:
    assert classify("POST", "/recovery/execute", (), True, GatedPaths(())) == PassThrough()


# ---- methods, bodies and override headers ----------------------------------------------------------

OVERRIDES = [
    "X-HTTP-Method-Override",
    "X-HTTP-Method",
    "X-Method-Override",
    "X-Original-URL",
    "X-Rewrite-URL",
    "SCRIPT_NAME",
    "X-Script-Name",
]


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS"])
def test_looking_at_a_gated_path_passes(method: str) -> None:
    headers = (("Accept", "*/*"), ("X-Request-Id", "1"), ("", "x"))
    assert ask("/recovery/execute", method=method, headers=headers) == PassThrough()


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS"])
def test_looking_with_a_body_is_refused(method: str) -> None:
    answer = ask("/recovery/execute", method=method, has_body=True)
    assert code(answer) == "override_refused"
    assert f"A {method} with a body" in message(answer)


@pytest.mark.parametrize("method", ["POST", "GET", "HEAD", "OPTIONS"])
@pytest.mark.parametrize("header", OVERRIDES)
def test_an_override_header_on_a_gated_path_is_refused(method: str, header: str) -> None:
    for spelling in (header, header.lower(), header.upper().replace("-", "_"), header.replace("_", "-")):
        answer = ask("/recovery/execute", method=method, headers=(("Host", "h"), (spelling, "GET")))
        assert code(answer) == "override_refused"
        assert header in message(answer)


@pytest.mark.parametrize("method", ["POST", "GET", "HEAD", "OPTIONS"])
@pytest.mark.parametrize(
    "header", [("Upgrade", "websocket"), ("upgrade", "WebSocket"), ("UPGRADE", " websocket ")]
)
def test_a_gated_path_is_no_websocket(method: str, header: tuple[str, str]) -> None:
    answer = ask("/recovery/execute", method=method, headers=(("Host", "h"), header))
    assert code(answer) == "upgrade_refused"


@pytest.mark.parametrize("offer", ["h2c", "TLS/1.0", "foo, websocket", "websocket, h2c", "websocket/13", ""])
def test_any_other_offer_to_switch_protocols_changes_nothing(offer: str) -> None:
    headers = (("Connection", "Upgrade, HTTP2-Settings"), ("Upgrade", offer), ("HTTP2-Settings", "AAMAAABk"))
    assert isinstance(ask("/recovery/execute", method="POST", headers=headers), Gated)
    assert isinstance(ask("/recovery/execute", method="GET", headers=headers), PassThrough)


@pytest.mark.parametrize("method", ["PUT", "PATCH", "DELETE", "TRACE", "PROPFIND", "post", ""])
def test_any_other_method_on_a_gated_path_is_not_allowed(method: str) -> None:
    answer = ask("/recovery/execute", method=method, headers=(("X-HTTP-Method-Override", "POST"),))
    assert isinstance(answer, Rejected)
    assert answer.refusal.code == "method_not_allowed"
    assert answer.allow == ("POST", "GET", "HEAD", "OPTIONS")


@pytest.mark.parametrize("header", ["X-Original-URL", "X_REWRITE_URL", "x-original_url"])
@pytest.mark.parametrize(
    "value",
    [
        "/recovery/execute",
        " /recovery/execute?x ",
        "http://h/recovery/execute",
        "/recovery%2Fexecute",
        "RECOVERY/execute",
    ],
)
def test_a_header_that_would_make_a_target_gated_is_refused(header: str, value: str) -> None:
    answer = ask("/x", method="GET", headers=(("X-Original-URL", "/y"), (header, value)))
    assert isinstance(answer, Rejected)
    assert answer.refusal.code == "override_refused"
    assert answer.refusal.members == {"path": "/x"}


# Each was executed past the gate by gunicorn, or by a common WSGI middleware that compares what is decoded.
PREFIXED = {
    "/x/v1/run": [("SCRIPT_NAME", "/x")],
    "/x/v1%2Frun?a": [("script-name", " /x")],
    "//a/xyv1/run": [("SCRIPT_NAME", "//a/xy")],
    "HTTP://h/xyv1/run": [("SCRIPT_NAME", "/xy")],
    "/x%79/v1/run": [("X-Script-Name", "/xy")],
    "/x%79v1/RUN": [("x_script_name", "/xy")],
    "/x/yv1/run": [("SCRIPT_NAME", "/x"), ("X-Script-Name", "/y")],
    "/": [("SCRIPT_NAME", "/x"), ("X-Original-URL", "/x/v1/run")],
}


@pytest.mark.parametrize("target", PREFIXED)
@pytest.mark.parametrize("method", ["POST", "GET", "PUT"])
def test_a_prefix_that_could_be_taken_off_a_gated_target_is_refused(method: str, target: str) -> None:
    headers = PREFIXED[target]
    assert classify(method, target, (), True, RUN) == PassThrough()
    answer = classify(method, target, headers, True, RUN)
    assert isinstance(answer, Rejected)
    assert answer.refusal.code == "override_refused"


@given(
    st.text(string.printable, max_size=12), st.sampled_from(["/v1/run", "/V1/run/", "/v1%2frun", "/v1/ru%6e"])
)
def test_no_prefix_at_all_leads_past_the_gate(prefix: str, gated: str) -> None:
    headers = [("SCRIPT_NAME", prefix)]
    assert classify("POST", prefix.partition("?")[0] + gated, headers, True, RUN) != PassThrough()


def test_a_prefix_of_what_is_gated_by_no_name_passes() -> None:
    assert classify("POST", "/x/orders?to=/v1/run", [("SCRIPT_NAME", "/x")], True, RUN) == PassThrough()


@pytest.mark.parametrize("header", OVERRIDES)
@pytest.mark.parametrize("value", ["/x", "POST", "", "/?/recovery/execute"])
def test_an_override_header_elsewhere_passes(header: str, value: str) -> None:
    assert ask("/x", headers=((header, value),)) == PassThrough()


def test_a_method_override_elsewhere_passes_whatever_it_says() -> None:
    assert ask("/x", headers=(("X-HTTP-Method-Override", "/recovery/execute"),)) == PassThrough()


# ---- what a refusal says ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "why"),
    [
        (
            "/x/recovery/execute/",
            "it reaches **/recovery/execute only by dropping slashes, dots or blanks at its end",
        ),
        ("/recovery%2Fexecute", "only by percent-decoding."),
        ("/RECOVERY/execute", "only by folding case"),
        ("/x//recovery/execute", "an empty segment or a dot segment"),
        ("/x%2e/recovery/execute", "an encoded slash, dot,"),
        ("/x#/recovery/execute", "it has a #"),
        ("x/recovery/execute", "does not begin with a slash"),
    ],
)
def test_a_refusal_says_why_the_path_is_ambiguous(target: str, why: str) -> None:
    assert why in message(ask(target))


@pytest.mark.parametrize(
    ("target", "members"),
    [
        ("/recovery/execute/?secret=1", {"path": "/recovery/execute/"}),
        ("/" + "x" * 200 + "/recovery/execute/", {}),
        ("/recovery/execute/\udcff;/recovery/execute", {}),
    ],
)
def test_a_refusal_shows_a_short_path_and_no_query(target: str, members: dict[str, str]) -> None:
    answer = ask(target)
    assert isinstance(answer, Rejected)
    assert answer.refusal.members == members


# ---- configured paths ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "begins with"),
        ("recovery/execute", "begins with"),
        ("*/execute", "begins with"),
        ("**", "begins with"),
        ("**execute", "begins with"),
        ("***/execute", "begins with"),
        ("http://h/x", "begins with"),
        ("**/", "no empty"),
        ("//", "no empty"),
        ("//x", "no empty"),
        ("/x//", "no empty"),
        ("/x//y", "no empty"),
        ("/./x", "no empty"),
        ("/x/..", "no empty"),
        ("/x%20", "printable ASCII"),
        ("/x?y", "printable ASCII"),
        ("/x#y", "printable ASCII"),
        ("/x;y", "printable ASCII"),
        ("/x\\y", "printable ASCII"),
        ("/x/*/y", "only in"),
        ("/**/y", "only in"),
        ("/x y", "printable ASCII"),
        ("/x\n", "printable ASCII"),
        ("/caf\u00e9", "printable ASCII"),
        ("/{}/x", "identifier"),
        ("/{1}/x", "identifier"),
        ("/{a-b}/x", "identifier"),
        ("/a}/y", "identifier"),
        ("/{a/y", "identifier"),
        ("/{a/b}/y", "identifier"),
        ("/{a...}/y", "identifier"),
        ("/x{a...}", "identifier"),
        ("/{...}", "identifier"),
        ("/{a-b...}", "identifier"),
        ("**/x/{a...}", "not both"),
        ("/{a}{b}/x", "more than letters"),
        ("/{a}x{b}/x", "more than letters"),
        ("/{{a}}/y", "identifier"),
        ("/{a}/{a}/x", "once"),
        ("/{a}/{a...}", "once"),
        ("/{a}:{a}/x", "once"),
        ("/x/run.", "last segment"),
        ("/x/{a}.", "last segment"),
    ],
)
def test_a_route_path_that_means_nothing_is_refused(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        RoutePattern.parse(text)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("/run", ()),
        ("**/run", ()),
        ("/v1.2/run.json", ()),
        ("/a/{b}/c", ("b",)),
        ("**/{b}/c/{_d2}/e", ("b", "_d2")),
        ("/", ()),
        ("/x/", ()),
        ("**/x/", ()),
        ("/x/{a}", ("a",)),
        ("/{a}", ("a",)),
        ("/x/{a}/", ("a",)),
        ("/x{a}y/{b}:run", ("a", "b")),
        ("/{a}:{b}--{c}/x", ("a", "b", "c")),
        ("/x/{a}/{rest...}", ("a", "rest")),
        ("/{rest...}", ("rest",)),
    ],
)
def test_a_route_path_keeps_its_text_and_names(text: str, names: tuple[str, ...]) -> None:
    pattern = RoutePattern.parse(text)
    assert pattern.text == text
    assert pattern.names == names


# ---- any text --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "noise",
    [
        "%ef%bc%8f%c0%ae.;%2523\\%253f%00//",
        "/x%25%32e;a\\%2523%3f.%00//",
        "/../x/%2e%2e;/%252e",
        "\udcc0\udcaf\uff0f\ufdfa",
        "%ff%0a%e2%80%8b%00;+//",
    ],
)
def test_a_target_with_very_many_readings_is_refused_after_a_bounded_number(noise: str) -> None:
    with patch.object(readings, "folded", wraps=readings.folded) as folded:
        answer = ask(("/execute" + noise * 500)[:8192])
    assert "more readings than are tried" in message(answer)
    assert folded.call_count <= 2 * readings.MAX_READINGS  # folding is a step, too


def test_a_short_target_with_very_many_readings_is_refused_after_a_bounded_number() -> None:
    with patch.object(readings, "folded", wraps=readings.folded) as folded:
        answer = ask("http://h/execute/../%253b\\#")
    assert "more readings than are tried" in message(answer)
    assert readings.MAX_READINGS / 2 < folded.call_count <= readings.MAX_READINGS


def test_a_path_that_spells_a_route_and_is_too_long_to_try_is_refused() -> None:
    assert "more readings than are tried" in message(ask("/" + "%41" * 11_000 + "/recovery/execute"))


def test_the_last_reading_of_a_path_with_too_many_is_none() -> None:
    *tried, last = readings.readings_of("http://h/execute/../%253b\\#")
    assert last is None
    assert None not in tried


@pytest.mark.parametrize("query", ["_method=DELETE", "a=1&_method=PUT", "%5fmethod=DELETE"])
@pytest.mark.parametrize("method", ["POST", "GET"])
def test_a_field_in_the_query_that_replaces_the_method_is_refused_on_a_gated_path(
    query: str, method: str
) -> None:
    assert code(ask(f"/recovery/execute?{query}", method=method)) == "override_refused"
    assert ask(f"/elsewhere?{query}", method=method) == PassThrough()


def test_two_routes_that_meet_in_several_paths_conflict_once() -> None:
    route = GatedCalls((EXACT, NAMED))
    assert [(one, other) for one, other, _, _ in conflicts([route, route])] == [(0, 1)]
    reading = GatedCalls((EXACT, NAMED), methods=frozenset({"GET"}))
    assert not list(conflicts([route, reading]))


def test_what_could_be_built_of_a_text_may_leave_routes_out() -> None:
    paths = GatedPaths((ANYWHERE, EXACT))
    assert paths.could_be_built_of("/v1/run")
    assert not paths.could_be_built_of("/v1/run", apart_from=[1])


def test_a_long_plain_path_next_to_a_gated_one_passes() -> None:
    assert ask("/recovery/execute/history" + "/item" * 1500) == PassThrough()


def test_characters_of_a_path_are_tried_at_most_up_to_the_limit() -> None:
    path = "/execute/%zz" + "a" * readings.MAX_CHARACTERS
    assert ask(path[: readings.MAX_CHARACTERS]) == PassThrough()
    assert code(ask(path)) == "ambiguous_path"


@given(st.text(st.characters()), st.text(st.characters()), st.sampled_from(["POST", "GET", "X"]))
def test_no_text_makes_it_raise(prefix: str, suffix: str, method: str) -> None:
    for target in (prefix, suffix, f"{prefix}/recovery/execute{suffix}", f"/execute{prefix}%{suffix}"):
        ask(target, ANYWHERE, NAMED, method=method)
        ask("/x", method=method, headers=(("X-Original-URL", target), (prefix, suffix)))


def spellings(character: str) -> st.SearchStrategy[str]:
    """Ways to write an ASCII character that two decodings, folding or leniency undo."""
    point = ord(character)
    escaped = f"%{point:02x}"
    overlong = f"%{0xC0 | point >> 6:02x}%{0x80 | point & 0x3F:02x}"
    return st.sampled_from(
        [
            character,
            character.upper(),
            escaped,
            escaped.upper(),
            escaped.replace("%", "%25"),
            "".join(f"%{ord(each):02X}" for each in escaped),
            overlong,
            overlong.replace("%", "%25"),
            chr(point + 0xFEE0),
            "".join(f"%{byte:02x}" for byte in chr(point + 0xFEE0).encode()),
        ]
    )


@st.composite
def disguised(draw: st.DrawFn) -> str:
    """A path that some parser reads as .../recovery/execute."""
    segments = ["recovery"]
    for _ in range(draw(st.integers(0, 2))):
        segments += draw(st.sampled_from([[""], ["."], ["x", ".."], ["x", "y", "..", ".."]]))
    path = "/" + "/".join([*segments, "execute"])
    written = "".join(draw(spellings(character)) for character in path)
    before = draw(st.sampled_from(["", "/api", "/a%2Fb", "//host", "http://host", "/x;v=1", "/x/.."]))
    after = draw(
        st.sampled_from(
            ["", "?x", "/", ".", "%20", ".json", ";v", "%00x", "#x", "%3fx", "%253Bx", "/.", "%2f"]
        )
    )
    return before + written + after


@given(disguised())
def test_no_disguise_of_a_gated_path_passes(target: str) -> None:
    answer = ask(target)
    assert isinstance(answer, Gated | Rejected)
    if isinstance(answer, Gated):
        assert target.partition("?")[0].endswith("/recovery/execute")


PIECES = (
    "/ \\ %2f %252f %5c \uff0f %ef%bc%8f \udcc0\udcaf %c0%af % %25 %2525 \uff05 %ef%bc%85 %c0%a5 2 f 2f 25 "
    "\uff12 c0 af . .. %2e ; # %3f \0 : a: face FACE fa ce %66 %2561 \uff46 \ufb00 e %c1 \udcc1 %a5 \udca5 "
    "\udce0\udc80 \u0301 %cc%81 .json v1 /v1/face //h \xa0 "
    "%ff %0a %250a %09 \x7f %c2%85 %ad %e2%80%8b \u200b %u0066 %u0061 %25u0063 %u %ufb00 + %2b "
    "f a c e 6 %6 61 "
    "\xe9 %c3%a9 %e6%97%a5 \ue000 %ee%80%80 \udcc3 %aa %c3%aa %c2%aa \xaa \u0130 %c4%b0 \u2488 %efbb%bf "
    "%u65e5 %u00aa"
)


@given(st.lists(st.sampled_from(PIECES.split(" ")), max_size=9).map("".join))
def test_the_quick_test_lets_no_matching_reading_slip(path: str) -> None:
    # "face" is made of hexadecimal digits: an escape would swallow it if one could.
    patterns = (RoutePattern.parse("**/face"), RoutePattern.parse("/v1/face"))
    clause = GatedPaths(patterns).other_reading(path)
    if clause is not None and "more readings" not in clause:
        assert QuickTest(patterns).could_reach(path)


@pytest.mark.parametrize(
    "name",
    [
        "\u65e5\u672c\u8a9e\u306e\u8cc7\u6599",
        "r\xe9sum\xe9 \xfcber na\xefve",
        "\u043e\u0442\u0447\u0435\u0442",
        "\U0001f469\u200d\U0001f469\u200d\U0001f467",
        "\uff21\uff22\uff23\uff11\uff12\uff13",
        "\u05e9\u05dc\u05d5\u05dd\u200f",
    ],
)
@pytest.mark.parametrize("between", ["%20", "%2520", "+%20/", "+%2F", "+/%20-%3A%2F%2F"])
def test_a_long_name_in_any_language_passes(name: str, between: str) -> None:
    for escaped in (quote(name), quote(quote(name))):
        assert ask(f"/files/{between.join([escaped] * 40)}/1.json") == PassThrough()


@pytest.mark.slow
def test_no_character_becomes_more_ascii_characters_than_the_quick_test_expects() -> None:
    for code in range(0x80, 0x110000):
        runs = re.findall("[!-~]+", readings.folded(chr(code)))
        assert max(map(len, runs), default=0) <= MAX_MADE, hex(code)


# ---- rebuilt targets -------------------------------------------------------------------------------

# A target, and headers of which some application makes the URL of a gated path.
REBUILT: list[tuple[str, list[tuple[str, str]]]] = [
    ("/foo", [("X-Forwarded-Host", "x/v1/run?")]),
    ("/foo", [("X_Forwarded_Host", "x/v1/run#")]),
    ("/foo", [("X-Forwarded-Host", "u@x/v1/run?")]),
    ("/foo", [("X-Forwarded-Host", "a.example, x/v1/run?")]),
    ("/foo", [("X-Forwarded-Host", "x/v1/run?, a.example")]),
    ("/foo", [("X-Forwarded-Host", "a.example"), ("X-Forwarded-Host", "x/v1%2frun?")]),
    ("/run", [("X-Forwarded-Host", "x/v1")]),
    ("/ru%6e", [("X-Forwarded-Host", "x\\v1")]),
    ("/x/..", [("X-Forwarded-Host", "x/v1/run;")]),
    ("/foo", [("X-Original-Host", "x/v1/run?")]),
    ("/foo", [("X-HTTP-Host-Override", "x/v1/run?")]),
    ("/run", [("X-Forwarded-PathBase", "/v1")]),
    ("/run", [("X-Forwarded-Context", "/v1")]),
    ("/foo", [("X-Forwarded-Port", "80/v1/run?")]),
    ("/foo", [("X-Forwarded-Proto", "http://x/v1/run?")]),
    ("/foo", [("X-Forwarded-Scheme", "http://x/v1/run#")]),
    ("/run", [("X-Forwarded-Prefix", "/v1")]),
    ("/run", [("X-Forwarded-Prefix", "/v1/")]),
    ("/foo", [("X-Forwarded-Prefix", "/v1/run?")]),
    ("/foo", [("X-Forwarded-Prefix", "/v1/exe%ff/../run;")]),
    ("/api/v1/run", [("X-Forwarded-Prefix", "/api")]),
    ("/a%70i/v1/run", [("X-Forwarded-Prefix", "/API")]),
    ("/apiv1/run", [("X-Forwarded-Prefix", "/api")]),
    ("/run", [("X-Forwarded-Host", "x/"), ("X-Forwarded-Prefix", "v1")]),
    ("/n", [("X-Forwarded-Host", "x/v1"), ("X-Forwarded-Prefix", "/ru%6e;")]),
    ("/foo", [("Forwarded", "for=1.2.3.4;host=x/v1/run?;proto=https")]),
    ("/foo", [("forwarded", 'for=1.2.3.4, host="x\\/v1/run?"')]),
    ("/foo", [("Forwarded", 'Proto="http://x/v1/run?"')]),
    ("/..", [("X-Forwarded-Host", "x/"), ("X-Forwarded-Port", "80/")]),
    ("/../run", [("X-Forwarded-Prefix", "/v1")]),
    ("/host/v1/run", [("X-Forwarded-Prefix", "/")]),
    ("/run", [("X-Forwarded-Prefix", "/x, /v1")]),
    ("/../run", [("X-Forwarded-Prefix", "/x"), ("X-Forwarded-Prefix", "/v1")]),
    ("/my app/v1%2frun", [("X-Forwarded-Prefix", "/my%20app")]),
    ("/my%20app/v1%2frun", [("X-Forwarded-Prefix", "/my%20app/")]),
]


@pytest.mark.parametrize(("path", "headers"), REBUILT)
@pytest.mark.parametrize("method", ["POST", "GET", "PUT"])
def test_a_header_by_which_a_gated_target_could_be_rebuilt_is_refused(
    method: str, path: str, headers: list[tuple[str, str]]
) -> None:
    assert classify(method, path, (), True, RUN) == PassThrough()
    answer = classify(method, path, headers, True, RUN)
    assert code(answer) == "override_refused"
    assert "a gated path could be built" in message(answer)


@pytest.mark.parametrize("path", ["/foo", "/v1/run/x?y=/v1/run", "/api/orders", "/history/run"])
@pytest.mark.parametrize(
    "headers",
    [
        [("X-Forwarded-Host", "shop.example:8443"), ("X-Forwarded-Proto", "https")],
        [("X-Forwarded-Host", "a.example, b.example"), ("X-Forwarded-Port", "443")],
        [("X-Forwarded-Host", "[2001:db8::1]:80"), ("X-Forwarded-Prefix", "/api")],
        [("Forwarded", 'for=192.0.2.60;proto=http;by=203.0.113.43;host="a.example:80"')],
        [("X-Forwarded-Host", ""), ("X-Forwarded-Prefix", "/"), ("Forwarded", "")],
        [("X-Forwarded-Prefix", "/my%20app")],
        [("X-Forwarded-Prefix", "/")],
        [("X-Forwarded-For", "/v1/run"), ("From", "/v1/run"), ("X-Forwarded-Hostess", "x/v1/run?")],
    ],
)
def test_headers_that_rebuild_no_gated_target_pass(path: str, headers: list[tuple[str, str]]) -> None:
    assert classify("POST", path, headers, True, RUN) == PassThrough()


ORIGINALS = [
    "X-Original-URI",
    "X_FORWARDED_URI",
    "X-Forwarded-Path",
    "X-Replaced-Path",
    "X.Envoy.Original.Path",
    "X-Forwarded-URL",
    "X-Override-Url",
    "X-Waws-Unencoded-URL",
]


@pytest.mark.parametrize("header", ORIGINALS)
def test_a_header_that_says_how_a_target_read_before_cannot_bring_in_a_gated_one(header: str) -> None:
    assert code(ask("/x", headers=((header, "/recovery/exe%ffcute"),))) == "override_refused"
    for value in ("/recovery/execute", "/recovery/execute, /y", "/y,/recovery/execute/,/z"):
        assert code(ask("/x", headers=((header, value),))) == "override_refused"
    for value in ("/recovery", "/recovery,/execute"):
        assert ask("/x", headers=((header, value),)) == PassThrough()
    for value in ("/recovery/execute?x", "/public/recovery/execute", "/elsewhere"):
        assert ask("/recovery/execute", headers=((header, value),)) == Gated(0, {})
    agent = RoutePattern.parse("**/{agent}/heal")
    assert ask("/a1/heal", agent, headers=((header, "/api/a1/heal"),)) == Gated(0, {"agent": "a1"})
    assert code(ask("/a1/heal", agent, headers=((header, "/a2/heal"),))) == "override_refused"
    assert (
        code(ask("/recovery/execute", ANYWHERE, EXACT, headers=((header, "/v1/run"),))) == "override_refused"
    )


@pytest.mark.parametrize(
    "name", ["X.Original.URL", "X!Original~URL", "x_http.method|override", "SCRIPT.NAME"]
)
def test_a_header_name_is_read_as_servers_write_it_for_cgi(name: str) -> None:
    assert code(ask("/recovery/execute", headers=((name, "/x"),))) == "override_refused"


def test_a_forwarded_part_that_is_not_plain_passes_where_no_gated_name_is_in_sight() -> None:
    for headers in ([("X-Forwarded-Host", "x/orders")], [("X-Forwarded-Prefix", "/a/../b")]):
        assert classify("POST", "/api/orders?to=/v1/run", headers, True, RUN) == PassThrough()
        assert code(classify("POST", "/history/run", headers, True, RUN)) == "override_refused"


PROXY_HEADERS = [
    ("X-Forwarded-Host", "shop.example:8443"),
    ("X-Forwarded-Port", "8443"),
    ("X-Forwarded-Proto", "https"),
    ("X-Forwarded-Prefix", "/api"),
    ("Forwarded", 'for=192.0.2.60;proto=http;host="a.example:80"'),
]


def test_what_proxies_add_in_good_faith_leaves_a_gated_request_judged() -> None:
    assert classify("POST", "/v1/run", PROXY_HEADERS, True, RUN) == Gated(0, {})
    assert ask("/recovery/execute", headers=tuple(PROXY_HEADERS)) == Gated(0, {})


@pytest.mark.parametrize("header", PROXY_HEADERS)
def test_a_gated_request_with_a_forwarded_part_that_is_not_plain_is_refused(header: tuple[str, str]) -> None:
    # The route is the same, but another segment may name the agent.
    pattern = RoutePattern.parse("**/{agent}/heal")
    for value in ("x/a2/heal?", "u@h", "/a/../b", "http://h"):
        given = f"host={value}" if header[0] == "Forwarded" else value
        answer = ask("/a1/heal", pattern, headers=((header[0], given),))
        assert code(answer) == "override_refused"
        assert header[0] in message(answer)


def test_a_gated_request_whose_prefix_leads_to_another_route_is_refused() -> None:
    other = RoutePattern.parse("/api/v1/run")
    for patterns, path in (((EXACT, other), "/v1/run"), ((other, EXACT), "/api/v1/run")):
        assert isinstance(ask(path, *patterns), Gated)
        answer = ask(path, *patterns, headers=(("X-Forwarded-Prefix", "/api"),))
        assert code(answer) == "override_refused"


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["X-Forwarded-Host", "X-Forwarded-Prefix", "X-Forwarded-Proto", "Forwarded"]),
            st.text(st.characters()),
        ),
        max_size=3,
    ),
    st.text(st.characters()),
)
def test_no_header_makes_it_raise(headers: list[tuple[str, str]], path: str) -> None:
    for pattern in (ANYWHERE, NAMED):
        ask(path, pattern, headers=tuple(headers))
        ask("/recovery/execute", pattern, headers=tuple(headers))


# ---- what a search may take ------------------------------------------------------------------------


@pytest.mark.parametrize("blanks", ["+", "%20", "%u0020", "\u3000"])
def test_blanks_amid_a_segment_take_time_in_proportion_to_their_number(blanks: str) -> None:
    begun = time.process_time()
    blank = readings.decoded_as_by_iis(blanks.replace("+", " "))
    readings._BLANK_ENDS.sub("", "/executex" + blank * 60_000 + "x")
    ask("/recovery/executex" + blanks * 5_000 + "x")
    assert time.process_time() - begun < 5  # it took minutes when each blank was tried as the first one


@pytest.mark.parametrize("header", ["X-Forwarded-Prefix", "X-Original-URL", "X-Forwarded-Uri"])
@pytest.mark.parametrize("path", ["/execute/x;y", "/recovery/execute"])
def test_a_header_with_many_values_is_refused_instead_of_reading_each_of_them(header: str, path: str) -> None:
    values = [f"/api{number}/execute%20x" for number in range(100)]
    lists = ((header, ", ".join(value.replace("%20", "+") for value in values)),)
    for headers in (lists, tuple((header, value) for value in values)):
        with patch.object(module, "readings_of", wraps=readings.readings_of) as searched:
            answer = ask(path, headers=headers)
        assert code(answer) in ("override_refused", "Gated")
        assert searched.call_count < 50


def test_several_prefixes_pass_where_no_gated_name_is_in_sight() -> None:
    pattern = RoutePattern.parse("/v1/tasks/{task}/kick-it")
    headers = [("X-Forwarded-Prefix", "/x, /v1/tasks")]
    assert classify("POST", "/t7/orders", headers, True, GatedPaths([pattern])) == PassThrough()
    # Joined, /v1/tasks, /x and the target are one gated path.
    for path in ("/t7/../kick-it%3bx", "/kick-it"):
        assert code(classify("POST", path, headers, True, GatedPaths([pattern]))) == "override_refused"


# ---- patterns: variables anywhere, slashes, lists of paths -----------------------------------------


def routes(*calls: GatedCalls | str | list[str]) -> GatedPaths:
    """Routes by their calls, or by the paths of routes that gate POST."""
    return GatedPaths(each if isinstance(each, GatedCalls) else calls_of(each) for each in calls)


def calls_of(paths: str | list[str], *methods: str, passes_others: bool = False) -> GatedCalls:
    patterns = tuple(map(RoutePattern.parse, [paths] if isinstance(paths, str) else paths))
    return GatedCalls(patterns, frozenset(methods or ("POST",)), passes_others)


def verdict(target: str, gated: GatedPaths, method: str = "POST", **options: Any) -> Answer:
    return classify(method, target, options.get("headers", ()), options.get("has_body", False), gated)


SPELLED = [
    ("/x/", "/x/", {}),
    ("/x/", "/x/?a=/", {}),
    ("/", "/", {}),
    ("/", "/?x", {}),
    ("**/x/", "/x/", {}),
    ("**/x/", "/a%41/x/", {}),
    ("/x/{a}", "/x/web", {"a": "web"}),
    ("/x/{a}", "/x/web.json", {"a": "web.json"}),
    ("/x/{a}", "/x/web.tar.gz", {"a": "web.tar.gz"}),
    ("/x/{a}", "/x/web.", {"a": "web."}),
    ("/x/{a}", "/x/a%20b", {"a": "a b"}),
    ("/x/{a}/", "/x/web/", {"a": "web"}),
    ("/{a}", "/web", {"a": "web"}),
    ("**/purge/{a}", "/v1/purge/web", {"a": "web"}),
    ("/actions/{a}:run", "/actions/restart:run", {"a": "restart"}),
    ("/actions/{a}:run", "/actions/a:b:run", {"a": "a:b"}),
    ("/actions/{a}:run", "/actions/:run:run", {"a": ":run"}),
    ("/v1/{kind}s/restart", "/v1/pods/restart", {"kind": "pod"}),
    ("/v1/{kind}s/restart", "/v1/ss/restart", {"kind": "s"}),
    ("/v{n}/x", "/v1.2/x", {"n": "1.2"}),
    ("/{a}:{b}/x", "/red:7/x", {"a": "red", "b": "7"}),
    ("/{a}--{b}.{c}/x", "/r-d--7.z/x", {"a": "r-d", "b": "7", "c": "z"}),
    ("/files/{rest...}", "/files/a", {"rest": "a"}),
    ("/files/{rest...}", "/files/a/b%20c/d.json", {"rest": "a/b c/d.json"}),
    ("/{rest...}", "/a/b", {"rest": "a/b"}),
    ("/{a}/x/{rest...}", "/t/x/b", {"a": "t", "rest": "b"}),
]


@pytest.mark.parametrize(("pattern", "target", "values"), SPELLED)
def test_a_path_that_spells_any_pattern_out_is_judged(
    pattern: str, target: str, values: dict[str, str]
) -> None:
    assert verdict(target, routes(pattern)) == Gated(0, values)


UNSPELLED = {
    "/": [
        *(
            "",
            "/./",
            "//",
            "///",
            "/x/..",
            "/x/../",
            "/%2e",
            "/;a",
            "/;",
            "/#",
            "/#x",
            "/%23x",
            "/%3fx",
            "/..",
            "/.",
        ),
        *(
            "/%20",
            "/+",
            "/\\",
            "\\",
            "/%00",
            "/%0a",
            "/.json",
            "/x/y/../..",
            "//host",
            "http://host",
            "http://h/",
        ),
        *(
            "/%2f",
            "/%252e",
            "/%e2%80%8b",
            "/a/%2e%2e",
            "/a%2f..",
            "/a/%252e%252e",
            "/%u002e",
            "/%ff",
            "/a/.%0a.",
        ),
    ],
    "/x/": [
        *(
            "/x",
            "/x//",
            "/X/",
            "/x/.",
            "/x/%20",
            "/x;/",
            "/x/;a",
            "/%78/",
            "/x%2f",
            "/y/../x/",
            "/y/../x",
            "//x",
        ),
        *("/x.json", "/x.", "/x/.json", "/x/?".replace("?", "%3f"), "/x/y/..", "/./x/"),
    ],
    "**/x/": ["/a/x", "/a/X/", "/a//x/", "/a/x//", "/a/x/;"],
    "/x/{a}": [
        *(
            "/x/",
            "/x//",
            "/x/a%2fb",
            "/x/a%252fb",
            "/x/a%3b",
            "/x/..",
            "/x/.",
            "/X/a",
            "/x//a",
            "/x/a/",
        ),
        *("/x/a#", "/y/../x/a", "/x/a/../b", "/x/a%2e", "/x/%2e%2e", "/%78/a", "//x/a"),
        *("/x/a/;y", "/x/a/%20", "/x/a%00", "/x/a\\b", "http://h/x/a", "/x/a%ef%bc%8fb", "/x/a%ef%bc%8fb/"),
    ],
    "/x/{a}/": ["/x/a", "/x//", "/x/a//", "/x/a/.", "/x/a%2fb/", "/x/a%ef%bc%8fb"],
    "/{a}": ["/", "//a", "/a/", "/a%2fb", "/a/.", "/b/../a", "/a/b/..", "/%2fa", "/a/%23", "/%252fa"],
    "/actions/{a}:run": [
        *("/actions/:run", "/actions/a:RUN", "/actions/a%3arun", "/actions/a:run/", "/actions/a:run.json"),
        *(
            "/actions/a:r%75n",
            "/actions/a%2fb:run",
            "/actions/a:run;x",
            "/actions//a:run",
            "/actions/x/../a:run",
        ),
    ],
    "/v1/{kind}s/restart": ["/v1/s/restart", "/v1/podS/restart", "/v1/pod%73/restart", "/v1/pods./restart"],
    "/{a}:{b}/x": ["/:b/x", "/a:/x", "/a%3ab/x", "/a:b/x/"],
    "/files/{rest...}": [
        *(
            "/files/",
            "/files//",
            "/files/a/",
            "/files/a//b",
            "/files/a%2fb",
            "/files/a/..",
            "/files/./a",
            "/FILES/a",
        ),
        *("/files/a/b/", "/files/../files/a", "//files/a", "/files/a/b#c"),
    ],
}


@pytest.mark.parametrize(
    ("pattern", "target"), [(pattern, target) for pattern, found in UNSPELLED.items() for target in found]
)
def test_another_spelling_of_any_pattern_is_refused(pattern: str, target: str) -> None:
    for method in ("POST", "GET", "DELETE"):
        assert code(verdict(target, routes(pattern), method)) == "ambiguous_path"


NEIGHBOURS = {
    "/": [
        "/x",
        "/x/y",
        "/x?/",
        "/orders/7.json",
        "/caf%C3%A9",
        "/a%2Fb",
        "/a;b",
        "/x/y/..",
        "/.well-known/x",
        "*",
    ],
    "/x/": ["/", "/x/y", "/xy", "/y/x/", "/x/y/"],
    "/x/{a}": ["/x", "/x/a/b", "/y/a", "/", "/a/x/b", "/xx/a", "/x.json"],
    "/x/{a}/": ["/x", "/x/", "/x/a/b", "/x/a/b/"],
    "/{a}": ["/a/b", "/a/b.json", "/a/b/", "/a/b%20c", "/a/b;c"],
    "/actions/{a}:run": [
        "/actions/a:running",
        "/actions/arun",
        "/actions/run",
        "/actions/a/:run/x",
        "/actions/",
    ],
    "/v1/{kind}s/restart": ["/v1/pod/restart", "/v1/pods/restarts", "/v1/restart", "/v1/pods/x/restart"],
    "/files/{rest...}": ["/files", "/file/a", "/x/files/a"],
    "**/purge/{a}": ["/purge", "/v1/purge", "/purge/a/b", "/purges/a"],
}


@pytest.mark.parametrize(
    ("pattern", "target"), [(pattern, target) for pattern, found in NEIGHBOURS.items() for target in found]
)
def test_what_no_reading_makes_a_path_of_the_pattern_passes(pattern: str, target: str) -> None:
    for method in ("POST", "GET", "DELETE"):
        assert verdict(target, routes(pattern), method) == PassThrough()


@pytest.mark.parametrize(
    "target",
    [
        "/api%ef%bc%09%8f%14",  # without the tab, a slash, and a control character for a task
        "/api%ef%bc%00%8f%14/",
        "/api/x/y/../..",  # without its last dots, /api/x/
        "/a%2fb\uff0ft7/",
        "/a%2fb%ef%bc%8ft7",
    ],
)
def test_what_a_parser_leaves_may_fill_a_variable(target: str) -> None:
    assert code(verdict(target, routes("/{kind}/{task}/"))) == "ambiguous_path"


def test_readings_among_the_paths_of_one_route_make_nothing_ambiguous() -> None:
    both = routes(["/x", "/x/", "/y/{a}", "/y/{a}/", "/z/{a}", "/z/run"])
    for target in ("/x", "/x/", "/y/web/", "/z/web.json"):
        assert isinstance(verdict(target, both), Gated)
    assert verdict("/y/web", both) == verdict("/y/web/", both) == Gated(0, {"a": "web"})
    assert verdict("/z/run", both) == Gated(0, {})  # the exact path counts
    assert verdict("/z/RUN", both) == Gated(0, {"a": "RUN"})
    for target in ("/x//", "/X", "/x/.", "/y/web//", "/y//"):
        assert code(verdict(target, both)) == "ambiguous_path"


def test_readings_that_reach_another_route_are_ambiguous() -> None:
    for gated in (routes("/x", "/x/"), routes("/x/{a}", "/x/run"), routes(["/x/{a}"], ["/y", "/x/run/"])):
        for target in ("/x/run.json", "/x/RUN", "/x/run/", "/X"):
            assert code(verdict(target, gated)) in ("ambiguous_path", "PassThrough")
    assert code(verdict("/x/run.json", routes("/x/{a}", "/x/run"))) == "ambiguous_path"
    assert code(verdict("/x/RUN", routes("/x/{a}", "/x/run"))) == "ambiguous_path"
    assert "only by adding a slash at its end" in message(verdict("/x", routes("/x", "/x/")))


def test_another_reading_that_reaches_a_route_with_another_method_does_not_matter() -> None:
    gated = routes(["/pods/{pod}", "/pods/{pod}/"], calls_of("/pods/{pod}", "DELETE"))
    assert verdict("/pods/web/", gated) == Gated(0, {"pod": "web"})
    assert verdict("/pods/web", gated, "DELETE") == Gated(1, {"pod": "web"})
    assert code(verdict("/pods/web/", gated, "DELETE")) == "ambiguous_path"
    for target in ("/pods/web/", "/pods/web"):
        assert code(verdict(target, gated, "PUT")) == "method_not_allowed"
        assert verdict(target, gated, "GET") == PassThrough()
    lenient = routes(calls_of("/x/", "POST", passes_others=True), calls_of("/x", "PUT"))
    assert verdict("/x/", lenient) == Gated(0, {})
    assert code(verdict("/x/", lenient, "PUT")) == "ambiguous_path"
    # A route of another reading has a say in what becomes of further methods.
    assert code(verdict("/x/", lenient, "PATCH")) == "method_not_allowed"


def test_an_empty_variable_does_not_take_the_exact_path_from_its_route() -> None:
    assert verdict("/", routes("/", "/{a}")) == Gated(0, {})
    assert code(verdict("/x/", routes("/x/", "/{a}"))) == "ambiguous_path"  # without its slash
    gated = routes("/x/", calls_of("/x/{a}", "DELETE"))
    assert verdict("/x/", gated) == Gated(0, {})
    assert "would be empty" in message(verdict("/x/", gated, "DELETE"))
    assert verdict("/x/", gated, "GET") == PassThrough()


def test_a_variable_that_is_ambiguous_says_why() -> None:
    assert "a variable of /x/{a} would be empty" in message(verdict("/x/", routes("/x/{a}")))
    for target, why in (
        ("/a:b:c/x", "{}:{} can be split in more than one way"),
        ("/a%3ab:c/x", "{}:{} can be split in more than one way"),
        ("/a::c/x", "{}:{} can be split in more than one way"),
        ("/a:b;c/x", "a ; may cut off"),
        ("/%ff:b/x", "{a} is not UTF-8"),
        ("/a:%2541/x", "{b} is escaped twice"),
    ):
        assert why in message(verdict(target, routes("/{a}:{b}/x")))
        # The facts of a method that is not gated are not read.
        assert verdict(target, routes("/{a}:{b}/x"), "GET") == PassThrough()
    assert "{rest} is not UTF-8" in message(verdict("/a/%ff", routes("/a/{rest...}")))


# ---- methods ---------------------------------------------------------------------------------------

SHARED = (calls_of("/x/{a}", "DELETE", "PUT"), calls_of("/x/{a}", "POST"), calls_of("/x/run", "POST"))


@pytest.mark.parametrize(
    ("method", "target", "index"),
    [
        ("DELETE", "/x/web", 0),
        ("PUT", "/x/web", 0),
        ("POST", "/x/web", 1),
        ("POST", "/x/run", 2),  # the exact path goes before the variable
        ("DELETE", "/x/run", 0),  # among the routes that list the method
    ],
)
def test_the_method_is_looked_for_among_all_routes_of_the_path(method: str, target: str, index: int) -> None:
    for gated in (GatedPaths(SHARED), GatedPaths(reversed(SHARED))):
        answer = verdict(target, gated, method)
        assert isinstance(answer, Gated)
        assert gated.routes[answer.index] is SHARED[index]


@pytest.mark.parametrize("method", ["PATCH", "TRACE", "PROPFIND", "post"])
def test_a_method_that_no_route_of_the_path_lists_is_refused_with_those_that_are_allowed(method: str) -> None:
    answer = verdict("/x/run", GatedPaths(SHARED), method)
    assert isinstance(answer, Rejected)
    assert answer.refusal.code == "method_not_allowed"
    assert set(answer.allow) == {"POST", "PUT", "DELETE", "GET", "HEAD", "OPTIONS"}
    assert len(answer.allow) == 6


def test_the_methods_that_are_allowed_are_each_named_once() -> None:
    gated = routes(calls_of("/x", "GET", "DELETE"))
    answer = verdict("/x", gated, "POST")
    assert isinstance(answer, Rejected)
    assert answer.allow == ("GET", "HEAD", "DELETE", "OPTIONS")
    assert (
        answer.refusal.message
        == "Only GET, HEAD and DELETE execute here; OPTIONS without a body needs no scope."
    )


def test_a_listed_get_gates_head_and_leaves_options() -> None:
    gated = routes(calls_of("/x", "GET"))
    for has_body in (False, True):
        assert verdict("/x", gated, "GET", has_body=has_body) == Gated(0, {})
        assert verdict("/x", gated, "HEAD", has_body=has_body) == Gated(0, {})
    assert verdict("/x", gated, "OPTIONS") == PassThrough()
    assert code(verdict("/x", gated, "OPTIONS", has_body=True)) == "override_refused"
    only_head = routes(calls_of("/x", "HEAD"))
    assert verdict("/x", only_head, "HEAD") == Gated(0, {})
    assert verdict("/x", only_head, "GET") == PassThrough()


def test_a_route_may_let_other_methods_pass_but_one_that_refuses_is_enough() -> None:
    passing = calls_of("/x/{a}", "DELETE", passes_others=True)
    assert verdict("/x/web", GatedPaths([passing]), "PATCH", has_body=True) == PassThrough()
    assert verdict("/x/web", GatedPaths([passing]), "DELETE") == Gated(0, {"a": "web"})
    for other, expected in (
        (calls_of("/x/{a}", "POST", passes_others=True), "PassThrough"),
        (calls_of("/x/web", "POST"), "method_not_allowed"),
        (calls_of("/y/{a}", "POST"), "PassThrough"),  # of another path
    ):
        assert code(verdict("/x/web", GatedPaths([passing, other]), "PATCH")) == expected


@pytest.mark.parametrize("header", OVERRIDES)
def test_an_override_header_on_a_method_that_passes_is_refused(header: str) -> None:
    passing = GatedPaths([calls_of("/x", "DELETE", passes_others=True)])
    for method in ("PATCH", "GET", "POST"):
        assert verdict("/x", passing, method) == PassThrough()
        answer = verdict("/x", passing, method, headers=((header, "DELETE"),))
        assert code(answer) == "override_refused"


def test_a_prefix_header_is_no_trouble_for_routes_that_share_a_path() -> None:
    headers = (("X-Forwarded-Prefix", "/api"),)
    shared = GatedPaths([calls_of("/x", "DELETE"), calls_of("/x", "POST")])
    for method, index in (("DELETE", 0), ("POST", 1)):
        assert verdict("/x", shared, method, headers=headers) == Gated(index, {})
    for other in (calls_of("**/x", "POST"), calls_of("/api/x", "PUT")):
        gated = GatedPaths([calls_of("/x", "POST"), other])
        assert code(verdict("/x", gated, headers=headers)) == "override_refused"


@pytest.mark.parametrize(
    ("pattern", "target", "headers"),
    [
        ("/", "/x", [("SCRIPT_NAME", "/x")]),
        ("/", "/x", [("X-Forwarded-Prefix", "/x")]),
        ("/", "/orders", [("X-Forwarded-Host", "h/?")]),
        ("/", "/orders", [("X-Original-URL", "/x/..")]),
        ("/{a}", "/x/y", [("X-Forwarded-Prefix", "/x")]),
        ("/{a}", "/x/y", [("X-Forwarded-Host", "h/a?")]),
        ("/v1/{a}", "/x", [("X-Forwarded-Prefix", "/v1")]),
        ("/v1/{a}", "/x", [("X-Forwarded-Host", "h/v1")]),
        ("/v1/{a}", "/x/y", [("X-Forwarded-Host", "h/v1;"), ("X-Forwarded-Prefix", "/z")]),
        ("/v1/run", "/x/..", [("X-Forwarded-Host", "h/v1"), ("X-Forwarded-Prefix", "/run")]),
        ("/files/{rest...}", "/a/b", [("X-Forwarded-Prefix", "/files")]),
        ("/files/{rest...}", "/a/b", [("X-Forwarded-Prefix", "/fil%65s")]),
        ("/x/run/", "/run", [("X-Forwarded-Prefix", "/x")]),
        ("/actions/{a}:run", "/b:run", [("X-Forwarded-Prefix", "/actions")]),
    ],
)
def test_a_header_by_which_a_path_of_any_pattern_could_be_built_is_refused(
    pattern: str, target: str, headers: list[tuple[str, str]]
) -> None:
    assert verdict(target, routes(pattern)) == PassThrough()
    assert code(verdict(target, routes(pattern), headers=headers)) == "override_refused"


# ---- what no search is needed for ------------------------------------------------------------------

MANY = [
    "/",
    "/{a}",
    "/face/",
    "/v1/{a}",
    "/v1/{a}:face",
    "/{a}e/face",
    "**/face/{a}",
    "/fa/ce/{rest...}",
    "/{a}:{b}",
    "**/fa.ce",
    "/{a}/{b}/",
]


@given(
    st.lists(st.sampled_from(PIECES.split(" ")), max_size=9).map("".join),
    st.lists(st.sampled_from(MANY), min_size=1, max_size=4, unique=True),
)
def test_the_quick_test_lets_no_reading_of_any_pattern_slip(path: str, texts: list[str]) -> None:
    patterns = [RoutePattern.parse(text) for text in texts]
    clause = GatedPaths(patterns).other_reading(path)
    if clause is not None and "more readings" not in clause:
        assert QuickTest(patterns).could_reach(path)
        assert QuickTest(patterns).could_be_held(path)


@given(
    st.lists(
        st.sampled_from(
            ["a", "face", ".json", ".xml", ".", "x.y", ":", "/", "//", "@", "run", "~", "-", ".do.", "..json"]
        ),
        max_size=9,
    ),
    st.lists(st.sampled_from(MANY), min_size=1, max_size=4, unique=True),
)
def test_a_plain_path_has_no_other_readings_than_those_at_its_end(
    pieces: list[str], texts: list[str]
) -> None:
    path = "/" + "".join(pieces)
    gated = GatedPaths([RoutePattern.parse(text) for text in texts])
    quick = gated.other_reading(path)
    with patch.object(module, "steps_for", return_value=readings.STEPS):
        assert (quick is None) == (gated.other_reading(path) is None)


def test_a_plain_path_next_to_a_gated_one_passes_without_a_search() -> None:
    steps = [replace(step, read=unused) for step in readings.STEPS if "end" not in step.name]
    assert len(steps) > 20
    paths = ["/recovery/execute/history", "/v1.2/recovery/execute-all", "/a.b/x/execute", "/execute/recovery"]
    with patch.object(readings, "STEPS", (*steps, *readings.AT_THE_END)):
        for path in paths:
            assert ask(path) == PassThrough()


def unused(text: str) -> str:
    raise AssertionError(text)


# ---- the tree of patterns --------------------------------------------------------------------------

PARTS = st.sampled_from(["a", "b", "as", "{}", "{}s", "a{}", "{}:{}", "a{}:{}s"])


@st.composite
def written(draw: st.DrawFn) -> RoutePattern:
    names = iter("klmnopqr")
    parts = draw(st.lists(PARTS, min_size=1, max_size=3))
    text = "".join("/" + re.sub(r"\{\}", lambda _: f"{{{next(names)}}}", part) for part in parts)
    anywhere = draw(st.booleans())
    end = draw(st.sampled_from(["", "/"] if anywhere else ["", "/", "/{rest...}"]))
    return RoutePattern.parse(("**" if anywhere else "") + text + end)


SOME_PATHS = st.lists(st.sampled_from(["a", "b", "as", "a:s", ":", "x", "xs", "a:b:s"]), max_size=5).map(
    lambda parts: "/" + "/".join(parts)
)


@given(st.lists(written(), max_size=5), SOME_PATHS)
def test_a_lookup_finds_the_patterns_that_match_and_no_others(
    patterns: list[RoutePattern], path: str
) -> None:
    found = [entry for entry in Lookup(enumerate(patterns)).matching(path) if not entry.adds_slash]
    assert len(set(found)) == len(found)
    segments = path[1:].split("/")
    spelled = {index for index, one in enumerate(patterns) if one.spelled_by(segments) is not None}
    assert spelled <= {entry.route for entry in found}
    for entry in found:
        if entry.route not in spelled:  # with a variable that is empty
            before = len(segments) - len(entry.pattern.segments) if entry.pattern.anywhere else 0
            assert not all(all(values) for _, values in entry.pattern.values(segments[before:]))


@given(written(), written(), st.lists(SOME_PATHS, min_size=1, max_size=20))
def test_patterns_that_one_path_spells_overlap(
    one: RoutePattern, other: RoutePattern, paths: list[str]
) -> None:
    assert one.overlaps(other) == other.overlaps(one)
    assert one.overlaps(one)
    for path in paths:
        segments = path[1:].split("/")
        if one.spelled_by(segments) is not None and other.spelled_by(segments) is not None:
            assert one.overlaps(other)
            if one.is_exact == other.is_exact:
                assert list(overlapping([one, other])) == [(0, 1)]


@given(written(), st.sampled_from(["x", "a-b", "7"]))
def test_a_pattern_is_spelled_by_what_fills_it(pattern: RoutePattern, value: str) -> None:
    answer = classify("POST", pattern.filled(value), (), True, GatedPaths([pattern]))
    assert isinstance(answer, Gated)
    assert answer.path_params == dict.fromkeys(pattern.names, value)
