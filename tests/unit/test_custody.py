"""Custody: how credentials are configured, how their files are read, and how one is found in an answer."""

from __future__ import annotations

import logging
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.files.faults import ConfigurationError
from sidecar.settings.credentials import CredentialSection
from sidecar.settings.reading import load
from sidecar.upstream._head import AnswerHead
from sidecar.upstream.custody import MOST_PAST, Carried, Custody, Echo

SECRET = b"Bearer s3cr3t-of-the-backend"


def configured(folder: Path, text: str, value: bytes | None = SECRET) -> Custody:
    if value is not None:
        (folder / "token").write_bytes(value)
    (folder / "c.yaml").write_text('upstream:\n  url: "http://h:1"\n  credentials:\n' + text)
    loaded = load(folder / "c.yaml", environment={})
    assert SECRET.decode() not in repr(loaded) + str(loaded.settings.model_dump())
    return Custody(loaded.settings.upstream.credentials)


def faults(folder: Path, text: str, value: bytes | None = SECRET) -> list[str]:
    with pytest.raises(ConfigurationError) as refused:
        configured(folder, text, value)
    return [str(fault).replace(f"{folder}/", "") for fault in refused.value.faults]


def credential(folder: Path, value: bytes = SECRET, *, on: tuple[str, ...] = ("gated",)) -> Custody:
    (folder / "token").write_bytes(value)
    section = CredentialSection.model_validate(
        {"header": "Authorization", "value_file": str(folder / "token"), "on": on},
        context={"folder": folder},
    )
    return Custody([section])


def carried(custody: Custody) -> Carried:
    assert custody.gated is not None
    return custody.gated


def head(reason: bytes = b"OK", **headers: bytes) -> AnswerHead:
    pairs = tuple((name.encode(), value) for name, value in headers.items())
    return AnswerHead(
        200, reason, pairs, (1, 1), content_length=None, codings=(), upgrades=(), keep_alive=True
    )


# Configuration -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "sent"),
    [
        (b"Bearer abc", b"Bearer abc"),
        (b"Bearer abc\n", b"Bearer abc"),
        (b"Bearer abc\r\n", b"Bearer abc"),
        (b"k\xc3\xa9y", b"k\xc3\xa9y"),
    ],
)
def test_the_value_is_the_one_line_of_its_file(tmp_path: Path, value: bytes, sent: bytes) -> None:
    custody = configured(tmp_path, "    - {header: Authorization, value_file: token}\n", value)
    assert carried(custody).put([]) == [(b"Authorization", sent)]
    assert custody.passing is None


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "cannot be read (No such file or directory)"),
        (b"", "is empty"),
        (b"\n", "is empty"),
        (b"a\nb", "has several lines"),
        (b"a\n\n", "has several lines"),
        (b"a\rb", "has several lines"),
        (b" a", "begins or ends with a blank"),
        (b"a\x00b", "has a control character"),
        (b"a" * 8_001, "has more than 8,000 bytes"),
    ],
)
def test_a_file_that_holds_no_value_is_an_error_of_its_line(
    tmp_path: Path, value: bytes | None, said: str
) -> None:
    (fault,) = faults(tmp_path, "    - {header: A, value_file: token}\n", value)
    assert fault.startswith("c.yaml:4:19: upstream.credentials[0].value_file: ")
    assert said in fault
    assert fault.endswith("it holds the value of the header, as one line")


@pytest.mark.parametrize(
    "header",
    [
        "Host",
        "content_length",
        "Transfer-Encoding",
        "Connection",
        "TE",
        "Upgrade",
        "Expect",
        "keep_alive",
        "X-Request-Id",
        "traceparent",
        "Scopegate-X",
        "scopegate_x",
    ],
)
def test_a_header_that_the_sidecar_makes_itself_is_refused(tmp_path: Path, header: str) -> None:
    (fault,) = faults(tmp_path, f"    - {{header: {header}, value_file: token}}\n")
    assert fault.startswith("c.yaml:4:8: upstream.credentials[0].header: is made by the sidecar")


@pytest.mark.parametrize(
    "header",
    ["Content-Type", "content_encoding", "X-HTTP-Method-Override", "X_Original_URL", "X-Forwarded-Host"],
)
@pytest.mark.parametrize("area", ["gated", "pass"])
def test_a_header_that_changes_what_a_request_asks_for_is_refused(
    tmp_path: Path, header: str, area: str
) -> None:
    (fault,) = faults(tmp_path, f"    - {{header: {header}, value_file: token, on: [{area}]}}\n")
    assert fault.startswith("c.yaml:4:8: upstream.credentials[0].header: can change what a request asks for")


def test_a_header_by_which_requests_are_judged_is_refused(tmp_path: Path) -> None:
    gate = "gate:\n  tenant_header: X-Tenant\n  routes: [{path: /a, incident_id: 'header:X-Incident'}]\n"
    for header, where in (
        ("x_tenant", "gate.tenant_header"),
        ("X-Incident", "gate.routes[0]"),
        ("Idempotency-Key", "Idempotency-Key"),
    ):
        (fault,) = faults(tmp_path, f"    - {{header: {header}, value_file: token}}\n" + gate)
        assert fault.startswith("c.yaml:4:8: upstream.credentials[0].header: is read by ")
        assert fault.endswith(f"is read by {where} to judge a request; name another header")
        configured(tmp_path, f"    - {{header: {header}, value_file: token, on: [pass]}}\n" + gate)


def test_a_header_stands_once_in_each_area(tmp_path: Path) -> None:
    one = "    - {header: X-Key, value_file: token}\n"
    other = "    - {header: x_key, value_file: token, on: [pass]}\n"
    assert configured(tmp_path, one + other).passing is not None
    (fault,) = faults(tmp_path, one + other.replace("[pass]", "[pass, gated]"))
    assert fault.startswith("c.yaml:5:8: upstream.credentials[1].header: is the header of credentials[0] on")
    assert fault.endswith("on gated, too; keep one of them")


@pytest.mark.parametrize("on", ["[]", "[both]", "gated", "null"])
def test_an_area_is_gated_or_pass(tmp_path: Path, on: str) -> None:
    (fault, *_) = faults(tmp_path, f"    - {{header: X, value_file: token, on: {on}}}\n")
    assert "upstream.credentials[0].on" in fault


# The value ---------------------------------------------------------------------------------------------


def test_no_text_of_the_program_shows_the_value(tmp_path: Path) -> None:
    custody = credential(tmp_path)
    for shown in (repr(custody._credentials), repr(custody.gated), repr(custody), str(custody.trouble)):
        assert b"s3cr3t" not in shown.encode()


def test_what_the_client_sent_under_the_name_is_replaced_in_every_spelling(tmp_path: Path) -> None:
    sent = [(b"A", b"1"), (b"authorization", b"x"), (b"B", b"2"), (b"AUTHORIZATION", b"y")]
    assert carried(credential(tmp_path)).put(sent) == [(b"A", b"1"), (b"B", b"2"), (b"Authorization", SECRET)]
    section = CredentialSection.model_validate(
        {"header": "X-Key", "value_file": str(tmp_path / "token")}, context={"folder": tmp_path}
    )
    assert carried(Custody([section])).put([(b"x_key", b"x"), (b"X_KEY", b"y")]) == [(b"X-Key", SECRET)]


def looked(custody: Custody) -> int:
    """One look at the files, as `watch` does it. The number of credentials that changed."""
    changed = custody._look()
    for each in changed:
        each.adopt()
    if changed:
        custody._carry()
    return len(changed)


def test_a_change_counts_once_two_looks_have_found_the_same(tmp_path: Path) -> None:
    custody = credential(tmp_path)
    file = tmp_path / "token"
    assert looked(custody) == 0
    file.write_bytes(b"")  # it is being written
    assert (looked(custody), custody.trouble) == (0, None)
    file.write_bytes(b"Bearer half")
    assert looked(custody) == 0
    file.write_bytes(b"Bearer half and whole")
    assert looked(custody) == 0
    assert carried(custody).put([]) == [(b"Authorization", SECRET)]
    assert looked(custody) == 1
    assert carried(custody).put([]) == [(b"Authorization", b"Bearer half and whole")]
    assert looked(custody) == 0


def test_a_lost_file_makes_the_credential_unavailable_until_it_is_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    custody = credential(tmp_path)
    file = tmp_path / "token"
    file.unlink()
    assert [looked(custody) for _ in range(3)] == [0, 1, 0]
    trouble = carried(custody).trouble
    assert trouble is not None
    assert (trouble.code, trouble.members) == ("credential_unavailable", {"header": "Authorization"})
    assert custody.trouble == (
        "the file of the credential Authorization cannot be read (No such file or directory)"
    )
    # What was let through before is sent with the last value.
    assert carried(custody).put([]) == [(b"Authorization", SECRET)]
    file.write_bytes(SECRET)
    assert [looked(custody) for _ in range(3)] == [0, 1, 0]
    assert carried(custody).trouble is None
    assert custody.trouble is None
    assert [each.message for each in caplog.records] == [
        "a credential for the backend cannot be read",
        "a credential for the backend is renewed",
    ]
    assert "s3cr3t" not in caplog.text


# Echoes ------------------------------------------------------------------------------------------------


def test_a_credential_is_found_in_the_reason_the_headers_and_the_body(tmp_path: Path) -> None:
    found = carried(credential(tmp_path))
    assert not found.is_echoed(head(X=b"Bearer other"), b"s3cr3t-of-the-backen")
    for answer, body in (
        (head(), b'{"seen": "Bearer s3cr3t-of-the-backend"}'),
        (head(), b'{"token": "s3cr3t-of-the-backend"}'),
        (head(X=b"s3cr3t-of-the-backend"), b""),
        (head(b"got s3cr3t-of-the-backend"), b""),
        (head(**{"s3cr3t-of-the-backend": b"x"}), b""),
    ):
        assert found.is_echoed(answer, body)


def test_a_short_token_is_looked_for_together_with_its_scheme(tmp_path: Path) -> None:
    found = carried(credential(tmp_path, b"Bearer abc"))
    assert not found.is_echoed(head(), b"abc")
    assert found.is_echoed(head(), b"Bearer abc")


@given(st.binary(max_size=40), st.binary(max_size=40), st.lists(st.integers(0, 120), max_size=6))
def test_a_credential_is_found_across_pieces(before: bytes, after: bytes, cuts: list[int]) -> None:
    secret = b"s3cr3t-of-the-backend"
    for body in (before + secret + after, before + after):
        places = sorted({0, len(body), *(cut for cut in cuts if cut < len(body))})
        echo = Echo((secret,), head())
        for begin, end in pairwise(places):
            echo.hear(body[begin:end])
        assert echo.heard == (secret in body)


@pytest.mark.parametrize(
    ("value", "texts"),
    [
        (b"Basic dXNlcjpwYXNz", [b"dXNlcjpwYXNz"]),
        (
            b"session=abcdef; csrf=ghijkl",
            [b"session=abcdef;", b"csrf=ghijkl", b"session=abcdef; csrf=ghijkl"],
        ),
        (b'Token token="a-secret", v=2', [b'token="a-secret",', b'Token token="a-secret", v=2']),
    ],
)
def test_each_long_word_of_a_value_is_looked_for_but_its_scheme(
    tmp_path: Path, value: bytes, texts: list[bytes]
) -> None:
    found = carried(credential(tmp_path, value))
    for text in texts:
        assert found.is_echoed(head(), b"seen: " + text)
    assert found.hidden(f"got {value.decode()}!") in ("got Basic [credential]!", "got [credential]!")
    assert not found.is_echoed(head(), b"Basic Token session csrf token")


def test_a_value_of_one_byte_leaves_nothing_of_the_pieces_behind(tmp_path: Path) -> None:
    echo = carried(credential(tmp_path, b"x")).listening(head())
    for _ in range(3):
        echo.hear(b"a" * 100)
    assert (echo.heard, echo._rest) == (False, b"")
    echo.hear(b"x")
    assert echo.heard


def test_the_values_before_the_present_one_are_still_recognised(tmp_path: Path) -> None:
    custody = credential(tmp_path)
    for number in range(1, MOST_PAST + 1):
        (tmp_path / "token").write_bytes(b"Bearer the-value-number-%d" % number)
        assert [looked(custody) for _ in range(2)] == [0, 1]
    assert carried(custody).put([]) == [(b"Authorization", b"Bearer the-value-number-16")]
    assert carried(custody).is_echoed(head(), SECRET)
    assert (
        carried(custody).hidden("s3cr3t-of-the-backend, the-value-number-3") == "[credential], [credential]"
    )
    (tmp_path / "token").write_bytes(b"Bearer one-more-value")
    assert [looked(custody) for _ in range(2)] == [0, 1]
    assert not carried(custody).is_echoed(head(), SECRET)


def test_a_text_is_recorded_without_the_credential(tmp_path: Path) -> None:
    found = carried(credential(tmp_path))
    assert found.hidden("sent with Bearer s3cr3t-of-the-backend!") == "sent with Bearer [credential]!"
