"""What commands make of addresses, times, amounts and foreign text."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from sidecar.cli import tables
from sidecar.cli.client import Endpoint, Trust, UnusableError, within
from sidecar.settings.addresses import Listen, SocketFile


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("127.0.0.1:9901", Endpoint(address=Listen("127.0.0.1", 9901))),
        ("http://127.0.0.1:9901/", Endpoint(address=Listen("127.0.0.1", 9901))),
        ("https://[::1]:9901", Endpoint(address=Listen("::1", 9901), tls=True)),
        ("unix:/run/admin.sock", Endpoint(address=SocketFile(Path("/run/admin.sock")))),
        (
            "https://unix:/run/admin.sock",
            Endpoint(address=SocketFile(Path("/run/admin.sock")), tls=True),
        ),
    ],
)
def test_an_address_is_read_and_told_in_the_same_way(text: str, place: Endpoint) -> None:
    assert Endpoint.parse(text) == place
    assert Endpoint.parse(str(place)) == place


@pytest.mark.parametrize("text", ["", "127.0.0.1", "unix:admin.sock", "ftp://127.0.0.1:1", "http://h:1/path"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expects"):
        Endpoint.parse(text)


@pytest.mark.parametrize(
    ("text", "asked"), [("0.0.0.0:80", "127.0.0.1:80"), ("[::]:80", "[::1]:80"), ("h:80", "h:80")]
)
def test_a_listener_on_every_interface_is_asked_on_loopback(text: str, asked: str) -> None:
    assert str(Endpoint.parse(text).reachable()) == asked


def test_a_file_that_tls_cannot_use_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.pem").write_text("not a certificate")
    for trust in (
        Trust(pinned=tmp_path / "text.pem"),
        Trust(ca=tmp_path / "text.pem"),
        Trust(certificate=tmp_path / "text.pem"),
        Trust(ca=tmp_path / "none.pem"),
    ):
        with pytest.raises(UnusableError, match=r"/(text|none)\.pem: cannot be used for TLS"):
            trust.context()


def test_a_name_is_one_segment_of_a_path() -> None:
    assert within("a/b?c#d%e") == "a%2Fb%3Fc%23d%25e"


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (0, "0 s ago"),
        (59, "59 s ago"),
        (61, "1 min ago"),
        (3_700, "62 min ago"),
        (7_300, "2 h ago"),
        (200_000, "2 d ago"),
        (-299.5, "in 5 min"),
    ],
)
def test_an_age_has_the_unit_that_fits_it(seconds: float, told: str) -> None:
    then = datetime.now(UTC) - timedelta(seconds=seconds)
    assert tables.age(then.isoformat()) == told


def test_times_are_told_in_utc_and_in_seconds() -> None:
    assert tables.moment("2026-05-01T14:00:59.999999+02:00") == "2026-05-01T12:00:59Z"
    assert (tables.moment(None), tables.age(None), tables.when(None)) == ("", "", "")


@pytest.mark.parametrize(
    ("count", "told"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 << 30, "3.0 GiB"), (-2048, "-2.0 KiB")],
)
def test_bytes_have_the_unit_that_fits_them(count: int, told: str) -> None:
    assert tables.size(count) == told


def test_money_is_told_as_it_is() -> None:
    assert [tables.dollars(amount) for amount in (0.1, 0.000001, 100, 0, None)] == [
        "0.1",
        "0.000001",
        "100",
        "0",
        "",
    ]


def test_a_table_leaves_out_what_is_empty_and_escapes_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"id": "1e5", "none": "", "words": "a\nb \x1b[2J"},
        {"id": "0012", "none": "", "words": "  c"},
    ]
    tables.table(rows, "There is none.")
    assert capsys.readouterr() == ("ID    WORDS\n1e5   a\\nb \\x1b[2J\n0012  c\n", "")
    tables.table([], "There is none.")
    assert capsys.readouterr() == ("", "There is none.\n")
