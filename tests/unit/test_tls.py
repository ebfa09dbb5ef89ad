"""TLS contexts from files: what cannot be used is said, and what is renewed is taken up whole."""

from __future__ import annotations

import os
import ssl
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from sidecar.errors import ScopegateError
from sidecar.files.tls import (
    Credentials,
    TlsFileUnusable,
    client_context,
    describe_failure,
    server_context,
    valid_until,
)
from tests.certificates import Authority, Pair


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def pair(authority: Authority) -> Pair:
    return authority.issue("one")


def credentials_of(pair: Pair, client_ca_file: Path | None = None) -> Credentials:
    files = {
        "certificate_file": pair.certificate_file,
        "key_file": pair.key_file,
        "client_ca_file": client_ca_file,
    }
    return Credentials("data", files, server_context)


def handshake(
    server: ssl.SSLContext, client: ssl.SSLContext, name: str = "gate.test"
) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """Both sides of a handshake in memory."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = (
        client.wrap_bio(down, up, server_hostname=name),
        server.wrap_bio(up, down, server_side=True),
    )
    for _ in range(4):
        for side in sides:
            with suppress(ssl.SSLWantReadError):
                side.do_handshake()
    return sides


def shown_by(context: ssl.SSLContext, authority: Authority) -> int:
    """The number of the certificate that a server shows."""
    shown = handshake(context, authority.client())[0].getpeercert()
    assert shown is not None
    return int(str(shown["serialNumber"]), 16)


# Contexts -----------------------------------------------------------------------------------------------


def test_both_sides_speak_tls_1_2_at_least_and_http_1_1_only(authority: Authority, pair: Pair) -> None:
    server = server_context(pair.certificate_file, pair.key_file)
    client = client_context(authority.certificate_file)
    for context in (server, client):
        assert context.minimum_version == ssl.TLSVersion.TLSv1_2
        assert context.options & ssl.OP_NO_COMPRESSION
        assert context.options & ssl.OP_NO_RENEGOTIATION
    spoken, _ = handshake(server, client)
    assert spoken.version() == "TLSv1.3"
    assert spoken.selected_alpn_protocol() == "http/1.1"


def test_a_client_that_would_rather_speak_http_2_is_served_http_1_1(authority: Authority, pair: Pair) -> None:
    client = authority.client()
    client.set_alpn_protocols(["h2", "http/1.1"])
    spoken, _ = handshake(server_context(pair.certificate_file, pair.key_file), client)
    assert spoken.selected_alpn_protocol() == "http/1.1"


def test_tls_1_1_is_refused(authority: Authority, pair: Pair) -> None:
    client = authority.client()
    client.set_ciphers("DEFAULT:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        client.minimum_version = client.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises(ssl.SSLError):
        handshake(server_context(pair.certificate_file, pair.key_file), client)


def test_a_server_is_trusted_by_authority_name_and_address(authority: Authority, pair: Pair) -> None:
    server = server_context(pair.certificate_file, pair.key_file)
    client = client_context(authority.certificate_file)
    handshake(server, client)
    handshake(server, client, "127.0.0.1")
    for name in ("other.test", "127.0.0.2"):
        with pytest.raises(ssl.SSLCertVerificationError, match="not valid for"):
            handshake(server, client, name)


def test_a_server_that_somebody_else_signed_is_not_trusted(authority: Authority, tmp_path: Path) -> None:
    stranger = Authority(tmp_path, "stranger").issue("theirs")
    with pytest.raises(ssl.SSLCertVerificationError, match="unable to get local issuer"):
        handshake(
            server_context(stranger.certificate_file, stranger.key_file),
            client_context(authority.certificate_file),
        )


def test_without_an_authority_of_its_own_only_those_of_the_system_are_trusted(pair: Pair) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(server_context(pair.certificate_file, pair.key_file), client_context())


def test_an_authority_for_clients_makes_a_certificate_required(authority: Authority, pair: Pair) -> None:
    server = server_context(pair.certificate_file, pair.key_file, authority.certificate_file)
    assert server.verify_mode == ssl.CERT_REQUIRED
    with pytest.raises(ssl.SSLError, match=r"(?i)certificate"):
        handshake(server, client_context(authority.certificate_file))
    handshake(server, client_context(authority.certificate_file, pair.certificate_file, pair.key_file))


def test_certificate_and_key_may_stand_in_one_file(authority: Authority, pair: Pair, tmp_path: Path) -> None:
    both = tmp_path / "both.pem"
    both.write_bytes(pair.key_file.read_bytes() + pair.certificate_file.read_bytes())
    assert shown_by(server_context(both, both), authority) == shown_by(
        server_context(pair.certificate_file, pair.key_file), authority
    )


# Files that cannot be used ------------------------------------------------------------------------------


def test_each_file_that_cannot_be_used_is_named_with_the_reason(
    authority: Authority, pair: Pair, tmp_path: Path
) -> None:
    other = authority.issue("other")
    hidden = authority.issue("hidden", passphrase=b"s3cret")
    nonsense, gone = tmp_path / "nonsense", tmp_path / "gone"
    nonsense.write_text("no PEM")
    certificate, key = pair.certificate_file, pair.key_file
    cases: list[tuple[tuple[Path, ...], str, Path, str]] = [
        ((gone, key), "certificate_file", gone, "cannot be read (No such file or directory)"),
        ((tmp_path, key), "certificate_file", tmp_path, "cannot be read (Is a directory)"),
        ((nonsense, key), "certificate_file", nonsense, "contains no certificate in PEM"),
        ((key, key), "certificate_file", key, "contains no certificate in PEM"),
        ((certificate, gone), "key_file", gone, "cannot be read (No such file or directory)"),
        ((certificate, nonsense), "key_file", nonsense, "contains no private key in PEM"),
        ((certificate, certificate), "key_file", certificate, "contains no private key in PEM"),
        ((certificate, other.key_file), "key_file", other.key_file, "does not belong to the certificate"),
        ((hidden.certificate_file, hidden.key_file), "key_file", hidden.key_file, "has a passphrase"),
        ((certificate, key, gone), "client_ca_file", gone, "cannot be read"),
        ((certificate, key, nonsense), "client_ca_file", nonsense, "contains no certificate in PEM"),
    ]
    for files, named, path, reason in cases:
        with pytest.raises(TlsFileUnusable) as refused:
            server_context(*files)
        assert (refused.value.key, refused.value.path) == (named, path)
        assert refused.value.reason.startswith(reason)
        assert "; " in refused.value.reason, "it says what to do"
        assert str(refused.value) == f"{named}: {path} {refused.value.reason}"


def test_the_authority_of_a_backend_is_named_as_such(tmp_path: Path) -> None:
    with pytest.raises(TlsFileUnusable, match=r"^ca_file: .*/gone cannot be read"):
        client_context(tmp_path / "gone")


def test_a_pipe_in_the_place_of_a_key_is_not_waited_for(pair: Pair, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(TlsFileUnusable, match="is not a regular file"):
        server_context(pair.certificate_file, tmp_path / "pipe")


def test_an_expired_certificate_can_be_used(authority: Authority) -> None:
    old = authority.issue("old", days=-1)
    server_context(old.certificate_file, old.key_file)
    assert timedelta(hours=23) < datetime.now(UTC) - valid_until(old.certificate_file) < timedelta(hours=25)


def test_errors_of_tls_are_told_in_words(authority: Authority, pair: Pair) -> None:
    with pytest.raises(ssl.SSLError) as refused:
        handshake(server_context(pair.certificate_file, pair.key_file), client_context())
    assert describe_failure(refused.value) == "unable to get local issuer certificate"
    assert describe_failure(ConnectionResetError("gone")) == "gone"
    assert describe_failure(None) == "closed"


# Renewal ------------------------------------------------------------------------------------------------


def test_a_renewed_pair_is_a_new_context(authority: Authority, pair: Pair) -> None:
    held = credentials_of(pair)
    before, first = held.context, shown_by(held.context, authority)
    assert not held.renew()
    assert held.context is before
    pair.replace(authority.issue("next", days=9))
    assert held.renew()
    assert held.context is not before
    assert shown_by(held.context, authority) != first
    assert shown_by(before, authority) == first, "whoever still holds the old one meets no half of the new"
    assert held.ends == valid_until(pair.certificate_file)
    assert not held.renew()


def test_a_pair_that_does_not_fit_keeps_the_old_one_and_is_reported_once(
    authority: Authority, pair: Pair
) -> None:
    held = credentials_of(pair)
    first, ends = shown_by(held.context, authority), held.ends
    newer = authority.issue("next", days=9)
    pair.certificate_file.write_bytes(newer.certificate_file.read_bytes())
    with pytest.raises(TlsFileUnusable, match="does not belong to the certificate"):
        held.renew()
    assert not held.renew()
    assert (shown_by(held.context, authority), held.ends) == (first, ends)
    pair.key_file.unlink()
    with pytest.raises(TlsFileUnusable, match="cannot be read"):
        held.renew()
    assert not held.renew()
    pair.key_file.write_bytes(newer.key_file.read_bytes())
    assert held.renew()
    assert shown_by(held.context, authority) != first


def test_what_is_in_force_may_go_and_come_back(pair: Pair) -> None:
    held = credentials_of(pair)
    context, text = held.context, pair.key_file.read_bytes()
    pair.key_file.unlink()
    with pytest.raises(TlsFileUnusable):
        held.renew()
    pair.key_file.write_bytes(text)
    assert not held.renew()
    assert held.context is context
    pair.key_file.unlink()
    with pytest.raises(TlsFileUnusable):
        held.renew()


def test_an_authority_that_is_taken_out_is_not_trusted_any_more(authority: Authority, tmp_path: Path) -> None:
    stranger = Authority(tmp_path, "stranger")
    theirs = stranger.issue("theirs")
    mine = authority.issue("mine")
    trusted = tmp_path / "trusted.pem"
    both = authority.certificate_file.read_bytes() + stranger.certificate_file.read_bytes()
    trusted.write_bytes(both)
    held = credentials_of(mine, trusted)
    handshake(held.context, authority.client(theirs))
    trusted.write_bytes(authority.certificate_file.read_bytes())
    assert held.renew()
    handshake(held.context, authority.client(mine))
    with pytest.raises(ssl.SSLError):
        handshake(held.context, authority.client(theirs))


def test_credentials_that_cannot_be_made_name_their_key(pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(ScopegateError, match=r"^data\.tls\.key_file: .*/gone cannot be read"):
        credentials_of(Pair(pair.certificate_file, tmp_path / "gone"))
