"""Which host a request names: one spelling, in one place, and whether that is one of a listener's."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.core.host import Host, answers_to, hosts_of

WELL_FORMED = {
    "x": Host("x", None),
    "Gate.Example:8000": Host("gate.example", 8000),
    "a_b-c~d.": Host("a_b-c~d.", None),
    "127.0.0.1:0": Host("127.0.0.1", 0),
    "[::1]": Host("[::1]", None),
    "[0:0:0:0:0:0:0:1]:99999": Host("[::1]", 99999),
    "[2001:DB8::A]:80": Host("[2001:db8::a]", 80),
}
MALFORMED = [
    "",
    " ",
    ":80",
    "x:",
    "x:8o",
    "x:-1",
    "x:+1",
    "x:123456",
    "x:80:80",
    "x:\u0661",
    "x y",
    "x\t",
    "x,y",
    "x/api/v1/recovery/execute?",
    "x/api/v1/recovery",
    "x?",
    "x#",
    "x\\y",
    "x;y",
    "u@x",
    "u:p@x:80",
    "x%2fy",
    "x%00",
    "http://x",
    "//x",
    "caf\u00e9",
    "x\udcff",
    "x\u2024y",
    "\uff4c\uff4f\uff43\uff41\uff4c",
    "::1",
    "[::1",
    "::1]",
    "[]",
    "[x]",
    "[127.0.0.1]",
    "[::1%eth0]",
    "[::1%25eth0]",
    "[v1.x]",
    "[::1]x",
    "[:::1]",
    "[::1]:",
    "x\n",
    "'x'",
    "x!",
    "x&y=z",
    "(x)",
    "*",
]


@pytest.mark.parametrize("text", WELL_FORMED)
def test_a_name_or_an_address_with_or_without_a_port_is_a_host(text: str) -> None:
    assert Host.parse(text) == WELL_FORMED[text]


@pytest.mark.parametrize("text", MALFORMED)
def test_anything_else_is_no_host(text: str) -> None:
    assert Host.parse(text) is None


@given(st.text(st.characters(max_codepoint=0x17F) | st.sampled_from("/?#@:[]%\\.;"), max_size=12))
def test_a_host_is_read_alike_by_who_puts_it_into_a_url_and_parses_that(text: str) -> None:
    host = Host.parse(text)
    if host is None:
        return
    rebuilt = urlsplit(f"http://{text}/foo")
    assert (rebuilt.path, rebuilt.query, rebuilt.fragment, rebuilt.username) == ("/foo", "", "", None)
    assert rebuilt.netloc == text
    assert re.fullmatch(r"[A-Za-z0-9._~:\[\]-]+", text)


def named(method: str, target: str, *values: str, needed: bool = True) -> tuple[str, ...] | str:
    found = hosts_of(method, target, values, needed=needed)
    return found if isinstance(found, str) else tuple(host.name for host in found)


def test_a_request_names_the_host_of_its_header() -> None:
    assert named("GET", "/x", "h:1") == ("h",)
    assert named("OPTIONS", "*", "h") == ("h",)
    assert named("GET", "//u@other/x", "h") == ("h",), "two slashes begin a path"


def test_a_target_of_the_absolute_form_names_another_one() -> None:
    for target in ("http://t", "HTTP://t:1/x", "ws://T?u@v", "a+b-c.d://t#/x"):
        assert named("GET", target, "h") == ("h", "t"), target
    assert named("GET", "http://t/", needed=False) == ("t",)
    assert named("CONNECT", "t:443", "h") == ("h", "t")


def test_only_what_need_not_name_a_host_names_none() -> None:
    assert named("GET", "/x", needed=False) == ()
    assert named("GET", "/x") == "it has no Host"
    assert "more than one" in named("GET", "/x", "h", "h")
    assert "its Host" in named("GET", "/x", "", needed=False)


@pytest.mark.parametrize(
    "target",
    [
        "http:///x",
        "http://u@t/x",
        "http://u:p@t",
        "http://t:/x",
        "http://t\\x",
        "http://t%2fx/",
        "http://[::1%25a]/",
    ],
)
def test_the_authority_of_a_target_is_held_to_the_same(target: str) -> None:
    assert "the authority of its target" in named("GET", target, "h")


@pytest.mark.parametrize(
    "target", ["", "x", "http:x", "http:/x", "urn:x", "?x", "**", "9x://t/", "://t/", "\\x"]
)
def test_a_target_of_no_known_form_is_refused(target: str) -> None:
    assert "neither a path nor" in named("GET", target, "h")


# Of a listener ------------------------------------------------------------------------------------------

LOOPBACK = [
    "localhost",
    "LocalHost.",
    "a.b.localhost",
    "127.0.0.1",
    "127.255.0.9.",
    "[::1]",
    "[::ffff:127.0.0.1]",
]
ELSEWHERE = [
    "evil.example",
    "localhost.evil.example",
    "127.0.0.1.evil.example",
    "evil-localhost",
    "localhost..",
    ".localhost",
    "..localhost",
    "a..localhost",
    ".",
    "0.0.0.0",
    "[::]",
    "128.0.0.1",
    "127.1",
    "127.0.0.01",
    "2130706433",
    "0x7f.0.0.1",
    "[::2]",
    "[::ffff:10.0.0.1]",
    "[::7f00:1]",
]


def host(text: str) -> Host:
    found = Host.parse(text)
    assert found is not None, text
    return found


@pytest.mark.parametrize("text", LOOPBACK)
def test_a_listener_answers_to_loopback_names_whatever_the_port(text: str) -> None:
    assert answers_to(host(text), ())
    assert answers_to(host(f"{text}:1"), ("x",))


@pytest.mark.parametrize("text", ELSEWHERE)
def test_a_listener_answers_to_no_other_name(text: str) -> None:
    assert not answers_to(host(text), ())
    assert not answers_to(host(text), ("gate.example",))


def test_a_listener_answers_to_the_names_that_it_is_told() -> None:
    names = ("gate.example", "[2001:db8::1]")
    for text in ("gate.example", "GATE.example.:99", "[2001:DB8:0::1]:1"):
        assert answers_to(host(text), names), text
    for text in ("a.gate.example", "gate.example.com", "gate.exampl", "[2001:db8::2]"):
        assert not answers_to(host(text), names), text


@pytest.mark.parametrize(
    ("text", "scheme", "origin"),
    [
        ("localhost:9901", "http", "http://localhost:9901"),
        ("LOCALHOST:9901", "http", "http://localhost:9901"),
        ("localhost", "http", "http://localhost:80"),
        ("localhost:443", "https", "https://localhost"),
        ("[::1]:9901", "http", "http://[0::1]:9901"),
    ],
)
def test_an_origin_is_the_listeners_own_by_scheme_name_and_port(text: str, scheme: str, origin: str) -> None:
    assert host(text).is_origin(origin, scheme)


@pytest.mark.parametrize(
    "origin",
    [
        "",
        "null",
        "http://",
        "localhost:9901",
        "//localhost:9901",
        "https://localhost:9901",
        "http://localhost",
        "http://localhost:0",
        "http://localhost:9902",
        "http://127.0.0.1:9901",
        "http://localhost.:9901",
        "http://localhost:9901/",
        "http://u@localhost:9901",
        "http://localhost:9901 http://evil.example",
        "http://evil.example",
        "http://localhost:9901.evil.example",
        " http://localhost:9901",
    ],
)
def test_any_other_origin_is_another_site(origin: str) -> None:
    assert not host("localhost:9901").is_origin(origin, "http")
