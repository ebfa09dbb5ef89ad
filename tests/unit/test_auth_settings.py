"""What of the listeners and the methods of authentication fits together in a configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from sidecar.files.faults import ConfigurationError
from sidecar.settings.keys import differing
from sidecar.settings.reading import load
from sidecar.settings.sections import Settings
from tests.certificates import Authority

UPSTREAM = 'upstream: {url: "http://127.0.0.1:9000"}\n'
TLS = "certificate_file: a.pem, key_file: a.key"
VERIFYING = f"{TLS}, client_ca_file: authority.pem"
TOKENS = 'auth: {jwt: {issuer: "https://a", audience: a, jwks: "https://a/jwks"}}\n'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Authority(tmp_path).issue("a")
    return tmp_path


def settings_of(folder: Path, text: str) -> Settings:
    file = folder / "c.yaml"
    file.write_text(UPSTREAM + text)
    return load(file, environment={}).settings


def faults(folder: Path, text: str) -> list[str]:
    with pytest.raises(ConfigurationError) as refused:
        settings_of(folder, text)
    return [str(fault).replace(f"{folder}/", "") for fault in refused.value.faults]


# Client certificates ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "is_optional"),
    [("", False), (", client_certificate: required", False), (", client_certificate: optional", True)],
)
def test_a_client_certificate_is_required_unless_it_is_optional(
    folder: Path, text: str, is_optional: bool
) -> None:
    for listener in ("data", "admin", "ops"):
        settings = settings_of(folder, f"{listener}: {{tls: {{{VERIFYING}{text}}}}}\n")
        assert getattr(settings, listener).tls.is_certificate_optional is is_optional


@pytest.mark.parametrize("value", ["required", "optional"])
@pytest.mark.parametrize("tls", ["", f"{TLS}, "])
def test_without_an_authority_for_clients_the_key_has_no_effect(folder: Path, value: str, tls: str) -> None:
    (said,) = faults(folder, f"data: {{tls: {{{tls}client_certificate: {value}}}}}\n")
    assert said.endswith(": data.tls.client_certificate: has no effect without client_ca_file; set both")


def test_another_word_is_refused(folder: Path) -> None:
    (said,) = faults(folder, f"data: {{tls: {{{VERIFYING}, client_certificate: no}}}}\n")
    assert "data.tls.client_certificate: " in said


@pytest.mark.parametrize(
    "text",
    [
        "",
        f"data: {{tls: {{{TLS}}}}}\n",
        f"ops: {{tls: {{{VERIFYING}}}}}\n",  # nobody is asked there
    ],
)
def test_ids_by_certificate_need_a_listener_that_verifies_certificates(folder: Path, text: str) -> None:
    assert faults(folder, text + "auth: {mtls: {id: uri}}\n") == [
        f"c.yaml:{text.count(chr(10)) + 2}:15: auth.mtls.id: needs a listener that verifies client "
        "certificates; set data.tls.client_ca_file or admin.tls.client_ca_file"
    ]


@pytest.mark.parametrize("listener", ["data", "admin"])
def test_a_listener_with_an_authority_for_clients_is_enough(folder: Path, listener: str) -> None:
    text = f"{listener}: {{tls: {{{VERIFYING}}}}}\n"
    one, other = settings_of(folder, text), settings_of(folder, text + "auth: {mtls: {id: uri}}\n")
    assert other.auth.methods == ("mtls",)
    assert differing(one, other) == ("auth.mtls.id",)


# The admin listener beyond loopback ---------------------------------------------------------------------


@pytest.mark.parametrize("address", ["0.0.0.0:9901", '"[::]:9901"', "10.0.0.1:9901", "gate.example:9901"])
def test_the_admin_listener_leaves_loopback_only_with_a_method_and_tls(folder: Path, address: str) -> None:
    plain, secured = f"admin: {{listen: {address}}}\n", f"admin: {{listen: {address}, tls: {{{TLS}}}}}\n"
    no_method = (
        "c.yaml:2:9: admin.listen: must be a loopback address, because no method of auth is configured; "
        "write 127.0.0.1:9901, or configure a method, such as auth.tokens.file, and "
        "admin.tls.certificate_file"
    )
    assert faults(folder, plain) == faults(folder, secured) == [no_method]
    assert faults(folder, plain + TOKENS) == [
        "c.yaml:2:9: admin.listen: is beyond loopback, where credentials need TLS; set "
        "admin.tls.certificate_file, or write 127.0.0.1:9901"
    ]
    assert not settings_of(folder, secured + TOKENS).admin.listen.is_loopback()


@pytest.mark.parametrize("address", ["127.0.0.1:9901", "localhost:9901", '"[::1]:1"', '"unix:/run/a.sock"'])
@pytest.mark.parametrize("auth", ["", TOKENS])
def test_on_loopback_it_needs_neither(folder: Path, address: str, auth: str) -> None:
    assert settings_of(folder, f"admin: {{listen: {address}}}\n" + auth).admin.listen.is_loopback()


PROXY = "auth: {proxy: {header: X-User, trusted: [10.0.0.0/8]}}\n"


@pytest.mark.parametrize(
    ("admin", "auth", "names"),
    [
        ("listen: 127.0.0.1:9901", "", ()),
        ("listen: 127.0.0.1:9901", TOKENS, ()),
        ("listen: 127.0.0.1:9901, allowed_hosts: [a.b]", TOKENS, ("a.b",)),
        ('listen: "unix:/run/a.sock"', "", None),
        ('listen: "unix:/run/a.sock", allowed_hosts: [a.b]', "", ("a.b",)),
        (f"listen: 0.0.0.0:9901, tls: {{{TLS}}}", TOKENS, None),
        (f"listen: 0.0.0.0:9901, tls: {{{VERIFYING}}}", "auth: {mtls: {id: dns}}\n", None),
        (f"listen: 0.0.0.0:9901, tls: {{{TLS}}}, allowed_hosts: [a.b]", TOKENS, ("a.b",)),
        (f"listen: 0.0.0.0:9901, tls: {{{TLS}}}", PROXY, ()),
        (f"listen: 0.0.0.0:9901, tls: {{{TLS}}}, allowed_hosts: [a.b]", PROXY, ("a.b",)),
    ],
)
def test_the_names_under_which_the_admin_listener_answers(
    folder: Path, admin: str, auth: str, names: tuple[str, ...] | None
) -> None:
    assert settings_of(folder, f"admin: {{{admin}}}\n{auth}").hosts_of("admin") == names


# Key sets -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://idp.example/jwks", "expects a file, or a URL that begins with https://"),
        ("https://u:p@idp.example/jwks", "contains a user, a password, a fragment or a blank"),
        ("https://idp.example/jwks#x", "contains a user, a password, a fragment or a blank"),
        ("https:///jwks", "expects host:port"),
        ("https://idp.example:99999/jwks", "names a port above 65535"),
    ],
)
def test_a_url_of_keys_that_cannot_be_fetched_is_refused(folder: Path, url: str, said: str) -> None:
    (found,) = faults(folder, f'auth: {{jwt: {{issuer: i, audience: a, jwks: "{url}"}}}}\n')
    assert f"auth.jwt.jwks: {said}" in found


@pytest.mark.parametrize(
    "url", ["https://idp.example", "https://[::1]:8443/a/b?c=d", "https://a.b/jwks.json"]
)
def test_a_url_of_keys_is_kept_as_it_is(folder: Path, url: str) -> None:
    text = f'auth: {{jwt: {{issuer: i, audience: a, jwks: "{url}"}}}}\n'
    assert settings_of(folder, text).auth.jwt.jwks == url


def test_without_the_extra_a_configured_issuer_names_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (found,) = faults(folder, "auth: {jwt: {issuer: i, audience: a, jwks: k.json}}\n")
    assert found.endswith("auth.jwt.issuer: needs the [jwt] extra: pip install 'scopegate[jwt]'")
