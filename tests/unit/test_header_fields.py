"""The header fields of a message answer as a walk over all its headers would, whatever came before."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sidecar.core.pattern import RoutePattern
from sidecar.core.target import GatedPaths, classify
from sidecar.core.targetheaders import read_as
from sidecar.web.wire import headers as module
from sidecar.web.wire.headers import (
    HOP_BY_HOP,
    HeaderFields,
    Headers,
    JudgedHeaders,
    end_to_end,
    without_our_own,
)
from tests.differential import ORIGINAL

NAMES = [
    "Host",
    "host",
    "Connection",
    "Upgrade",
    "TE",
    "Te_",
    "Transfer-Encoding",
    "Content-Length",
    "Content-Type",
    "Content_Type",
    "X-Tenant",
    "X_Tenant",
    "x.tenant",
    "Scopegate-Scope-Id",
    "scopegate_anything",
    "SCOPEGATE.x",
    "Scopegate",
    "X-Request-Id",
    "X-Original-URL",
    "x_original_url",
    "X-Forwarded-Host",
    "Forwarded",
    "SCRIPT_NAME",
    "Accept",
]
VALUES = [
    b"",
    b"close",
    b"keep-alive, X-Tenant",
    b" x-request-id ,accept",
    b"content-length, host",
    b"websocket",
    b"/recovery/execute",
    b"x/recovery/execute?",
    b"\xff\xc3\xa9",
]
MESSAGES = st.lists(
    st.tuples(st.sampled_from([name.encode() for name in NAMES]), st.sampled_from(VALUES)), max_size=8
)


def names_in_connection(headers: Headers) -> set[bytes]:
    values = [value for name, value in headers if name.lower() == b"connection"]
    return {name.strip().lower() for value in values for name in value.split(b",")}


@given(MESSAGES)
def test_fields_answer_as_the_headers_themselves(headers: Headers) -> None:
    fields = HeaderFields(headers)
    for name in {name.lower().encode() for name in NAMES}:
        values = [value for key, value in headers if key.lower() == name]
        texts = [value.decode("utf-8", "surrogateescape") for value in values]
        assert (name in fields.places) == bool(values)
        assert fields.values(name) == values
        assert fields.texts(name) == texts
        assert fields.text(name) == (texts[0] if texts else None)


@given(MESSAGES)
def test_the_headers_that_go_on_are_all_but_those_of_the_connection(headers: Headers) -> None:
    never = {b"host", b"content-length", b"content-type"}
    ending = HOP_BY_HOP | (names_in_connection(headers) - never)
    expected = [(name, value) for name, value in headers if name.lower() not in ending]
    assert end_to_end(headers) == expected
    foreign = [
        (name, value)
        for name, value in expected
        if not read_as(name.decode("latin-1")).startswith("scopegate-")
    ]
    fields = HeaderFields(headers)
    assert fields.forwarded(ended=fields.ended_by_connection(), ours=False) == foreign
    assert without_our_own(expected) == foreign


@given(MESSAGES, st.sampled_from(["POST", "GET", "PUT"]), st.sampled_from(["/recovery/execute", "/orders"]))
def test_headers_that_do_not_decide_make_no_difference(headers: Headers, method: str, target: str) -> None:
    whole = [(name.decode(), value.decode("utf-8", "surrogateescape")) for name, value in headers]
    deciding = HeaderFields(headers).deciding()
    assert classify(method, target, deciding, False, ORIGINAL.gated) == classify(
        method, target, whole, False, ORIGINAL.gated
    )


@given(MESSAGES)
def test_the_first_twin_of_a_judged_header_is_found(headers: Headers) -> None:
    judged = {"x-tenant", "content-type"}
    texts = [name.decode() for name, _ in headers]
    twins = [(name, one) for name in texts for one in judged if read_as(name) == one and name.lower() != one]
    assert TENANT.twin_in(HeaderFields(headers)) == (twins[0] if twins else None)


TENANT = JudgedHeaders({"x-tenant"}, {"content-type"})


def test_a_judged_header_with_an_underscore_has_the_dash_as_its_twin() -> None:
    judged = JudgedHeaders({"x_tenant"}, ())
    assert judged.twin_in(HeaderFields([(b"X-Tenant", b"a")])) == ("X-Tenant", "x_tenant")
    assert judged.twin_in(HeaderFields([(b"X_Tenant", b"a")])) is None
    assert judged.kept == {b"x_tenant"}


def test_equal_names_share_a_layout_and_never_a_value() -> None:
    first = HeaderFields([(b"X-Tenant", b"a"), (b"Upgrade", b"websocket")])
    second = HeaderFields([(b"X-Tenant", b"b"), (b"Upgrade", b"h2c")])
    assert first._layout is second._layout
    assert (first.text(b"x-tenant"), second.text(b"x-tenant")) == ("a", "b")
    assert (first.deciding(), second.deciding()) == ([("Upgrade", "websocket")], [("Upgrade", "h2c")])


def test_names_in_another_order_or_case_are_another_layout() -> None:
    for headers in (
        [(b"A", b"1"), (b"Scopegate-B", b"2")],
        [(b"Scopegate-B", b"2"), (b"A", b"1")],
        [(b"a", b"1"), (b"scopegate-b", b"2")],
    ):
        assert HeaderFields(headers).forwarded(ended=(), ours=False) == [
            pair for pair in headers if pair[0].lower() == b"a"
        ]


def test_the_layouts_of_many_clients_take_bounded_memory() -> None:
    for number in range(2 * module.MAX_LAYOUTS):
        HeaderFields([(b"X-%d" % number, b"")])
    assert len(module._layouts) <= module.MAX_LAYOUTS
    long = [(b"X-Long" + b"g" * module.MAX_LAYOUT_BYTES, b"")]
    assert HeaderFields(long).values(long[0][0].lower()) == [b""]
    assert tuple(name for name, _ in long) not in module._layouts


def test_the_paths_that_many_clients_send_take_bounded_memory() -> None:
    paths = GatedPaths([RoutePattern.parse("/v1/{name}/run")])
    for number in range(3000):
        assert paths.place(f"/v1/{number}/run?{number}") == paths.place(f"/v1/{number}/run")
    assert 0 < len(paths._places) <= 1024
